"""The command line: one verb per arrow of the data's way, and verbs to look at things.

`entry.py` starts, catches what goes wrong and ends with an exit code; `making.py`, `shipping.py` and `looking.py` hold the verbs;
`flags.py` the flags that they share; `command.py` how a verb shows its help; `overview.py` the first page and the nearest verb;
`reference.py` docs/CLI.md. Run: `emergency-kit VERB`, `python -m emergency_kit.cli VERB`, `python scripts/VERB.py`.
"""

from emergency_kit.cli.entry import main

__all__ = ["main"]
