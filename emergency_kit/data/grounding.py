"""Grounding: the cards that a record shows in its prompt, where it names none itself.

In: a record. Out: the same with `cards` and `fits`. The index of retrieval is loaded for the first record that needs it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable

from emergency_kit.config import DatasetConfig
from emergency_kit.data.format import Record
from emergency_kit.knowledge.cards import load_cards
from emergency_kit.knowledge.retrieve import Retriever


def grounding(dataset: DatasetConfig) -> Callable[[Record], Record]:
    """What gives a record that names no cards those that retrieval finds, under `dataset.grounding`."""
    retriever: Any = None

    def ground(record: Record) -> Record:
        nonlocal retriever
        if record.cards is not None or dataset.grounding != "cards":
            return record
        retriever = retriever or Retriever(load_cards(), dataset.top_k)
        found = retriever.find(record.input or record.instruction)
        return replace(record, cards=tuple(found.ids), fits=found.fits)

    return ground
