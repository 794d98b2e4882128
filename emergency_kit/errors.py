"""The one family of errors a user can cause, and the exit code each owns.

    KitError
    ├── UsageError      2   a flag, or a config file, key or value
    │   └── ConfigError 2   several config problems, reported together
    ├── DataError       3   a dataset, a record, a knowledge card
    ├── ModelError      4   a base model, adapter, checkpoint or tokenizer
    ├── TrainingError   5   the training run itself
    ├── ExportError     6   merging, GGUF, quantisation
    ├── VerdictError    7   the evaluation says: do not ship
    └── Interrupted   130   Ctrl-C or a termination signal, after saving

A message says what is wrong, the value, the place, and the next command to run.
`cli.main` prints it on one line and exits with the code; nothing else catches these.
"""

from __future__ import annotations


class KitError(Exception):
    """Base of every error whose message is meant for the user."""

    exit_code = 1


class UsageError(KitError):
    """A wrong flag or argument."""

    exit_code = 2


class ConfigError(UsageError):
    """One or more config problems, each as `file: key: got X; expected Y`."""

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        super().__init__("; ".join(self.problems))


class DataError(KitError):
    """A dataset, record or knowledge card that cannot be used as it is."""

    exit_code = 3


class ModelError(KitError):
    """A base model, adapter, checkpoint or tokenizer that is missing, broken or does not fit."""

    exit_code = 4


class TrainingError(KitError):
    """The training run cannot start or cannot go on."""

    exit_code = 5


class ExportError(KitError):
    """Merging or exporting failed, or its proof did."""

    exit_code = 6


class VerdictError(KitError):
    """The evaluation says that this model must not ship."""

    exit_code = 7


class Interrupted(KitError):
    """The user stopped the run; what can be saved has been saved."""

    exit_code = 130
