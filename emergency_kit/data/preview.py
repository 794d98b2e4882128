"""Preview: rows as the model reads them, what is supervised set apart.

In: a dataset. Out: the supervised text in colour, or between «» where there is no colour; with ids each
token with its id and label. Run: `emergency-kit data preview SOURCE -n 3 --ids`.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

from rich.console import Console
from rich.text import Text

from emergency_kit.config import Resolved
from emergency_kit.data.load import open_split
from emergency_kit.data.survey import choose_dataset, printable
from emergency_kit.data.tokenize import NO_LIMIT, Encoded, encode


def preview(resolved: Resolved, source: str | None, split: str, number: int, ids: bool = False) -> None:
    """Print the first rows of a split; one that is over the limit is shown whole where training would stop at it."""
    from emergency_kit.model.backend import load_tokenizer

    resolved = choose_dataset(resolved, source)
    tokenizer = load_tokenizer(resolved.config.model)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    limit = resolved.config.model.max_seq_length
    stops = resolved.config.dataset.overlength == "error"
    for row in encode(islice(open_split(resolved, split), number), tokenizer, resolved, NO_LIMIT if stops else limit):
        name = printable(row.record.id)
        if not row.ids:
            console.print(f"--- {name}: {row.tokens} tokens, dropped (model.max_seq_length {limit})")
            continue
        note = f", cut from {row.tokens}" if len(row.ids) < row.tokens else f", over model.max_seq_length {limit}: training stops at it" if row.tokens > limit else ""
        console.print(f"--- {name}: {len(row.ids)} tokens{note}, {len(row.ids) - row.prompt} supervised")
        console.print(_tokens(row, tokenizer) if ids else _text(row, tokenizer, console.is_terminal and not console.no_color))


def _text(row: Encoded, tokenizer: Any, colour: bool) -> Text:
    asked, answered = (printable(tokenizer.decode(part)) for part in (row.ids[:row.prompt], row.ids[row.prompt:]))
    if not colour:
        return Text(f"{asked}«{answered}»")
    return Text.assemble((asked, "dim"), (answered, "bold green"))


def _tokens(row: Encoded, tokenizer: Any) -> Text:
    """One line a token: its id, its label (`-` where it is not supervised), its text."""
    lines = Text()
    for place, token in enumerate(row.ids):
        label = "-" if place < row.prompt else str(token)
        lines.append(f"{token:>7} {label:>7} {tokenizer.decode([token])!r}\n", "green" if label != "-" else "dim")
    return lines
