"""`emergency-kit evaluate` as a script; all flags: --help."""

from emergency_kit.cli import main

main("evaluate")
