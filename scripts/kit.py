"""`emergency-kit kit` as a script; all flags: --help."""

from emergency_kit.cli import main

main("kit")
