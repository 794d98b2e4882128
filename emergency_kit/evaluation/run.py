"""Evaluate: answer the test split with the tuned model and its base, score both, write the report.

In: a resolved config and a checkpoint. Out: `evaluation_report.json` and `report.html` beside it, written
whole or not at all. Answers are greedy, so a second run on the same machine gives the same report.
Run: `emergency-kit evaluate`.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Mapping, Sequence

from emergency_kit import artifacts
from emergency_kit.config import Resolved
from emergency_kit.data.format import Record, record_messages
from emergency_kit.data.load import dataset_hash, load_split, open_split
from emergency_kit.errors import DataError, Interrupted, UsageError
from emergency_kit.evaluation.console import Progress, print_report
from emergency_kit.evaluation.metrics import Answered, score
from emergency_kit.evaluation.report import build_report, render_html
from emergency_kit.inference.engine import Engine
from emergency_kit.knowledge.cards import Card, load_cards
from emergency_kit.model import backend
from emergency_kit.model.backend import Loaded


def evaluate(resolved: Resolved, checkpoint: Path | None = None, out: Path | None = None) -> Path:
    """Answer and score the test split; returns the report's path.

    checkpoint: adapter, merged or base folder; by default the config's finished model. out: the
    report file; by default `<output_dir>/evaluation_report.json`. Raises UsageError when the report
    cannot be written, ModelError or DataError before anything is generated, Interrupted on Ctrl-C.
    """
    config = resolved.config
    checkpoint = Path(checkpoint or Path(config.training.output_dir) / "checkpoints" / config.training.model_name)
    out = Path(out or Path(config.training.output_dir) / "evaluation_report.json")
    backend.check_checkpoint(checkpoint, config.model)
    if config.evaluation.compare_base:
        backend.require_base(config.model)
    page = _check_output(out)
    test = load_split(resolved, "test")
    train = open_split(resolved, "train")
    trained = frozenset(hazard for record in (train if train.limit and not train.held_out else train.every()) for hazard in record.hazards)
    records = select_records(test, config.evaluation.max_samples, config.training.seed, trained)
    cards = load_cards()
    _check_cards(records, cards, config.dataset.grounding)
    print(f"Answering {len(records)} of {len(test)} test records with {checkpoint}", flush=True)
    try:
        tuned = _answer(resolved, backend.load_checkpoint(config.model, checkpoint, fold=True), records, cards, "tuned")
        base = _answer(resolved, backend.load_base(config.model), records, cards, "base") if config.evaluation.compare_base else None
        made = artifacts.describe("evaluate", resolved, dataset_hash(records), parents=[checkpoint])
        report = build_report(tuned, base, trained, made)
        artifacts.save_text(page, render_html(report))
        artifacts.save_json(out, report)
    except KeyboardInterrupt:
        raise Interrupted(f"evaluation interrupted; nothing was written, {out} is as it was") from None
    print_report(report, out, page)
    return out


def _check_output(out: Path) -> Path:
    """The page's path, after looking that both files can be written."""
    page = out.with_name("report.html")
    if out.is_dir() or out.suffix != ".json":
        raise UsageError(f"--output: got {out}; expected a file that ends with .json, for instance {out.with_suffix('') / 'evaluation_report.json'}")
    if page.is_dir():
        raise UsageError(f"--output: {page} is a folder, but the report's page goes there; choose another folder with --output")
    artifacts.check_writable(out.parent, remedy="choose another with --output")
    return page


def _check_cards(records: Sequence[Record], cards: Mapping[str, Card], grounding: str) -> None:
    for record in records:
        named = (*record.hazards, *((record.cards or ()) if grounding == "cards" else ()))
        for card_id in named:
            if card_id not in cards:
                raise DataError(f"test record {record.id}: card {card_id!r} is not among the {len(cards)} knowledge cards; "
                                "mend the record's hazards or cards, or add the card to emergency_kit/knowledge/cards")


def select_records(records: Sequence[Record], limit: int | None, seed: int, trained: frozenset[str]) -> list[Record]:
    """At most `limit` records, in their own order, spread evenly over hazards (over categories where there are none).

    Hazards take turns, drawn by seed; those that training never saw come first, so that none is lost.
    """
    if limit is None or len(records) <= limit:
        return list(records)
    queues: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        for group in record.hazards or (f"category {record.category}",):
            queues.setdefault(group, []).append(index)
    draw = random.Random(seed)
    groups = sorted(queues)
    draw.shuffle(groups)
    for group in groups:
        draw.shuffle(queues[group])
    groups.sort(key=lambda group: group in trained or group.startswith("category "))
    chosen: set[int] = set()
    while len(chosen) < limit:
        for group in groups:
            queue = queues[group]
            while queue and queue[-1] in chosen:
                queue.pop()
            if queue and len(chosen) < limit:
                chosen.add(queue.pop())
    return [records[index] for index in sorted(chosen)]


def _answer(resolved: Resolved, loaded: Loaded, records: Sequence[Record], cards: Mapping[str, Card], name: str) -> Answered:
    settings = resolved.config.evaluation
    print(f"Model {name}: {', '.join([loaded.kind, *loaded.notes])}", flush=True)
    prompts = [record_messages(record, cards, resolved.config.dataset.grounding) for record in records]
    engine = Engine(loaded)
    started = time.monotonic()
    with Progress(name, len(records)) as progress:
        generated = engine.generate(prompts, settings.max_new_tokens, settings.batch_size, progress=progress.update)
    seconds = time.monotonic() - started
    return Answered(tuple(score(record, answer, cards) for record, answer in zip(records, generated)), seconds)
