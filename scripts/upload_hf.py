"""`emergency-kit upload-hf` as a script; all flags: --help."""

from emergency_kit.cli import main

main("upload-hf")
