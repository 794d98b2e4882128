"""Held-out data for the certificate: answers to read, prompts to answer.

In: the test split of the config's dataset; where it cannot be had (a Hub dataset without a network) or names no hazards, the
embedded dataset's in its place, and that is said. Out: `HeldOut`, the same every time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from emergency_kit.config import Resolved, load_config
from emergency_kit.data.format import Record, record_messages
from emergency_kit.data.load import load_split
from emergency_kit.data.tokenize import encode_row
from emergency_kit.errors import DataError, ExportError
from emergency_kit.knowledge.cards import load_cards


@dataclass(frozen=True)
class HeldOut:
    """sequences: `(ids, first)` of prompt and answer without its last token; places from `first` on predict `targets`, flat.
    asked: records whose prompts are answered. source: which data. grounding: how their prompts are rendered."""

    sequences: list[tuple[list[int], int]]
    targets: list[int]
    asked: list[Record]
    source: str
    grounding: str


def load_held_out(resolved: Resolved, tokenizer: Any) -> HeldOut:
    """Draw records until their answers have `export.certificate_answer_tokens` tokens, and prompts beside."""
    export, grounding = resolved.config.export, resolved.config.dataset.grounding
    try:
        records, source = load_split(resolved, "test"), f"test split of {resolved.config.dataset.name}"
    except DataError as error:
        embedded = load_config("embedded", settings=[f"training.output_dir={resolved.config.training.output_dir}"])
        records, source = load_split(embedded, "test"), "test split of embedded"
        print(f"  note: held-out answers are the embedded dataset's, since {resolved.config.dataset.name} cannot be had ({str(error)[:120]})", flush=True)
    random.Random(0).shuffle(records)
    sequences, targets = _draw_answers(records, tokenizer, grounding, export.certificate_answer_tokens, resolved.config.model.max_seq_length)
    if not sequences:
        raise ExportError(f"{source}: no record fits into model.max_seq_length ({resolved.config.model.max_seq_length} tokens), "
                          "so there is nothing to prove the export on; raise it")
    with_hazards = [record for record in records if record.hazards]
    if not with_hazards:
        with_hazards = load_split(load_config("embedded", settings=[f"training.output_dir={resolved.config.training.output_dir}"]), "test")
        random.Random(0).shuffle(with_hazards)
    return HeldOut(sequences, targets, with_hazards[:export.certificate_prompts], source, grounding)


def _draw_answers(records: list[Record], tokenizer: Any, grounding: str, wanted: int, limit: int) -> tuple[list[tuple[list[int], int]], list[int]]:
    cards = load_cards()
    sequences: list[tuple[list[int], int]] = []
    targets: list[int] = []
    for record in records:
        if len(targets) >= wanted:
            break
        ids, prompt = encode_row(tokenizer, record_messages(record, cards, grounding), record.output)
        if len(ids) <= limit:
            sequences.append((ids[:-1], prompt - 1))
            targets += ids[prompt:]
    return sequences, targets
