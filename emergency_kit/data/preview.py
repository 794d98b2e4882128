"""Preview: rows as the model reads them, what is supervised set apart.

In: a dataset. Out: on a terminal the supervised text in colour, in a pipe between «»; with ids each token
with its id and label.
"""

from __future__ import annotations

import sys
from itertools import islice
from typing import Any

from rich.console import Console
from rich.text import Text

from emergency_kit.config import Resolved
from emergency_kit.data.load import open_split
from emergency_kit.data.survey import choose_dataset
from emergency_kit.data.tokenize import Encoded, encode


def preview(resolved: Resolved, source: str | None, split: str, number: int, ids: bool = False) -> None:
    """Print the first rows of a split."""
    from emergency_kit.model.backend import load_tokenizer

    resolved = choose_dataset(resolved, source)
    tokenizer = load_tokenizer(resolved.config.model)
    console = Console(highlight=False, soft_wrap=True)
    for row in encode(islice(open_split(resolved, split), number), tokenizer, resolved):
        if not row.ids:
            console.print(f"--- {row.record.id}: {row.tokens} tokens, dropped (model.max_seq_length {resolved.config.model.max_seq_length})", markup=False)
            continue
        cut = f", cut from {row.tokens}" if len(row.ids) < row.tokens else ""
        console.print(f"--- {row.record.id}: {len(row.ids)} tokens{cut}, {len(row.ids) - row.prompt} supervised", markup=False)
        console.print(_tokens(row, tokenizer) if ids else _text(row, tokenizer))


def _text(row: Encoded, tokenizer: Any) -> Text:
    asked, answered = tokenizer.decode(row.ids[:row.prompt]), tokenizer.decode(row.ids[row.prompt:])
    if not sys.stdout.isatty():
        return Text(f"{asked}«{answered}»")
    return Text.assemble((asked, "dim"), (answered, "bold green"))


def _tokens(row: Encoded, tokenizer: Any) -> Text:
    """One line a token: its id, its label (`-` where it is not supervised), its text."""
    lines = Text()
    for place, token in enumerate(row.ids):
        label = "-" if place < row.prompt else str(token)
        lines.append(f"{token:>7} {label:>7} {tokenizer.decode([token])!r}\n", "green" if label != "-" else "dim")
    return lines
