"""`emergency-kit export-gguf` as a script; all flags: --help."""

from emergency_kit.cli import main

main("export-gguf")
