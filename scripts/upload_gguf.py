"""`emergency-kit upload-gguf` as a script; all flags: --help."""

from emergency_kit.cli import main

main("upload-gguf")
