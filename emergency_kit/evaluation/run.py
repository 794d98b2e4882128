"""Evaluate: answer the test split with a model and others beside it, score all, write the report.

In: a resolved config and what answers: by default the finished model and its base. Out: `evaluation_report.json` and
`report.html` beside it, written whole or not at all; answers are kept under `<output_dir>/cache/answers` as they end, so that
an interrupted run goes on where it was and a repeated one gives the same report. Under torchrun every rank answers its part; rank 0 alone reads the data,
asks a judge, prints and writes, and what it writes is what one process would.
Run: `emergency-kit evaluate`, with others: `emergency-kit evaluate --compare outputs/merged/final outputs/gguf/final-q8_0.gguf`.
"""

from __future__ import annotations

import json
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

from emergency_kit import artifacts, files
from emergency_kit.config import Resolved
from emergency_kit.data.format import Record, record_messages
from emergency_kit.data.load import dataset_hash, load_split, open_split
from emergency_kit.errors import DataError, Interrupted, ModelError, UsageError
from emergency_kit.evaluation import baselines
from emergency_kit.evaluation.console import print_report
from emergency_kit.evaluation.contestant import Contestant, ask, open_contestant
from emergency_kit.evaluation.gate import decide
from emergency_kit.evaluation.metrics import BY_NAME, Answered, Scored, score
from emergency_kit.evaluation.page import render_html
from emergency_kit.evaluation.report import build_report
from emergency_kit.knowledge.cards import Card, load_cards
from emergency_kit.model import backend
from emergency_kit.training import ranks

# How long other ranks stay while the first may ask a judge; a dead one is torchrun's to notice.
REPORT_SECONDS = 86400.0

def evaluate(resolved: Resolved, checkpoint: str | Path | None = None, out: Path | None = None, compare: Sequence[str] = (),
             ai: bool = False, yes: bool = False) -> Path:
    """Answer and score the test split; returns the report's path.

    checkpoint: adapter, merged or base folder, GGUF file or endpoint; by default the first of `compare`, else the config's
    finished model. compare: others beside it. ai: ask a judge, too; yes: without asking before money is spent. out: the report file; by default
    `<output_dir>/evaluation_report.json`. Raises UsageError when the report cannot be written, ModelError or DataError before
    anything is generated, Interrupted on Ctrl-C, when the answers so far are kept.
    """
    config, first = resolved.config, ranks.is_first()
    specs = [str(spec) for spec in ([checkpoint] if checkpoint else []) + list(compare)] or [str(resolved.finished_model)]
    out = Path(out or Path(config.training.output_dir) / "evaluation_report.json")
    _check_primary(config.evaluation.primary_endpoints)
    if ai:
        from emergency_kit.evaluation.judge import open_judge

        open_judge(resolved)  # a missing key is said before anything is generated
    named = list(zip(specs, _names(specs))) + ([("base", "base")] if config.evaluation.compare_base and "base" not in specs else [])
    ranks.join(backend.pick_device(config.model), config.training.rank_timeout_seconds)
    opened = ranks.first_then_others(lambda: [open_contestant(resolved, spec, name) for spec, name in named], "opening the models", config.training.rank_timeout_seconds)
    page = _check_output(out) if first else out
    task = ranks.shared(_load_task(resolved) if first else None)
    assert task is not None
    last = _load_last(out)
    print(f"Answering {len(task.records)} of {task.available} test records with {', '.join(item.name for item in opened)}", flush=True)
    try:
        answered = [_answer(resolved, item, task, fewer=item.is_base and place > 0) for place, item in enumerate(opened)]
        beside = _baselines(resolved, opened, answered, task)
        parts = _parts(resolved, opened)
        if not first:
            ranks.wait("the report", REPORT_SECONDS)
            return out
        report = _build(resolved, opened, answered, beside, task) | parts
        if ai:
            from emergency_kit.evaluation.judge import judge

            report["ai_evaluation"] = judge(resolved, answered[0].scored, yes)
        report["last_run"] = last
        report["verdict"] = decide(resolved, report)
        artifacts.save_text(page, render_html(report))
        artifacts.save_json(out, report)
        ranks.wait("the report", REPORT_SECONDS)
    except KeyboardInterrupt:
        raise _interrupted(out) from None
    except RuntimeError as error:
        if gone := ranks.lost(error, f"{out} is as it was, and the answers so far are kept: the same command goes on there"):
            raise ModelError(gone) from error
        raise
    finally:
        for item in opened:
            item.close()
    print_report(report, out, page)
    return out


def _interrupted(out: Path) -> Interrupted:
    if ranks.world() > 1:  # torchrun passes on what the terminal has sent already, which must not cut short what is said
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    why = "interrupted" if ranks.world() == 1 else "interrupted, by a signal or because another rank ended"
    return Interrupted(f"evaluation {why}; {out} is as it was, and the answers so far are kept: the same command goes on there")


@dataclass(frozen=True)
class Task:
    """What is asked. records: those chosen, in their own order; base_ids: ids of those that the base model answers; available: in the split."""

    records: list[Record]
    base_ids: frozenset[str]
    cards: Mapping[str, Card]
    trained: frozenset[str]
    grounding: str
    available: int


def _load_task(resolved: Resolved) -> Task:
    config = resolved.config
    test = load_split(resolved, "test")
    if config.dataset.streaming:
        print("Which hazards were trained is not known of a stream: all of the test records' count as trained", flush=True)
        trained = frozenset(hazard for record in test for hazard in record.hazards)
    else:
        train = open_split(resolved, "train")
        trained = frozenset(hazard for record in (train if train.limit and not train.held_out else train.every()) for hazard in record.hazards)
    records = select_records(test, config.evaluation.max_samples, config.training.seed, trained)
    cards = load_cards()
    _check_cards(records, cards, config.dataset.grounding)
    base = select_records(records, config.evaluation.base_samples, config.training.seed, trained)
    return Task(records, frozenset(record.id for record in base), cards, trained, config.dataset.grounding, len(test))


def _names(specs: Sequence[str]) -> list[str]:
    """Short names: the last part of a path, more of it where two would be equal."""
    names = []
    for spec in specs:
        parts = [spec] if "://" in spec else [part for part in Path(spec).parts if part not in ("/", ".")] or [spec]
        length = 1
        while any(other != spec and other.endswith("/".join(parts[-length:])) for other in specs) and length < len(parts):
            length += 1
        names.append("/".join(parts[-length:]))
    return names


def _check_primary(names: Sequence[str]) -> None:
    for name in names:
        if name not in BY_NAME:
            raise UsageError(f"evaluation.primary_endpoints: got {name!r}; expected some of {', '.join(BY_NAME)}")


def _check_output(out: Path) -> Path:
    """The page's path, after looking that both files can be written."""
    page = out.with_name("report.html")
    if out.is_dir() or out.suffix != ".json":
        raise UsageError(f"--output: got {out}; expected a file that ends with .json, for instance {out.with_suffix('') / 'evaluation_report.json'}")
    if page.is_dir():
        raise UsageError(f"--output: {page} is a folder, but the report's page goes there; choose another folder with --output")
    files.check_writable(out.parent, remedy="choose another with --output")
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


def _answer(resolved: Resolved, contestant: Contestant, task: Task, fewer: bool) -> Answered:
    """All answers of one contestant, scored. fewer: only those that the base model is asked for."""
    settings = resolved.config.evaluation
    records = [record for record in task.records if not fewer or record.id in task.base_ids]
    prompts = [record_messages(record, task.cards, task.grounding) for record in records]
    rounds = [(0.0, 0)] + [(resolved.config.inference.temperature or settings.samples_temperature, 1000 * number) for number in range(1, settings.samples + 1)]
    generated = ask(contestant, prompts, settings.max_new_tokens, rounds)
    scored = tuple(score(record, first, task.cards, others) for record, (first, *others) in zip(records, generated))
    return Answered(scored, contestant.seconds, contestant.tokens)


def _baselines(resolved: Resolved, opened: Sequence[Contestant], answered: Sequence[Answered], task: Task) -> dict[str, list[Scored]]:
    """Answers that stand beside the models; those of the base model only where `evaluation.baselines` is set."""
    records = [item.record for item in answered[0].scored]
    table: dict[str, list[Scored]] = {}
    if task.grounding == "cards":
        table[baselines.CARD_ALONE] = [score(record, baselines.answer_card_alone(record, task.cards), task.cards) for record in records]
    table[baselines.CALL_ALONE] = [score(record, baselines.answer_call_alone(record), task.cards) for record in records]
    shuffled = baselines.shuffle_answers(records, [item.generated for item in answered[0].scored])
    table[baselines.SHUFFLED] = [score(record, answer, task.cards) for record, answer in zip(records, shuffled)]
    base = next((item for item in opened if item.is_base), None)
    if base and resolved.config.evaluation.baselines:
        asked = [record for record in task.records if record.id in task.base_ids]
        for name, build in ((baselines.BARE, baselines.bare_messages), (baselines.FORMATTED, baselines.formatted_messages)):
            answers = ask(base, [build(record) for record in asked], resolved.config.evaluation.max_new_tokens, name=name)
            table[name] = [score(record, answer, task.cards) for record, (answer,) in zip(asked, answers)]
    return table


def _build(resolved: Resolved, opened: Sequence[Contestant], answered: Sequence[Answered], beside: dict[str, list[Scored]], task: Task) -> dict[str, Any]:
    about = [{"name": item.name, "kind": item.kind, "path": item.path, "sha256": item.sha256, "engine": item.engine, "seconds": round(item.seconds, 1),
              "tokens_per_second": round(item.tokens / item.seconds, 1) if item.seconds else None, "kept_answers": item.kept} for item in opened]
    base = next((found for item, found in zip(opened[1:], answered[1:]) if item.is_base), None)
    made = artifacts.describe("evaluate", resolved, dataset_hash(task.records), parents=[Path(item.path) for item in opened[:1] if item.kind != "endpoint"])
    return build_report(answered[0], base, task.trained, made, models=list(zip(about, answered)), baselines=beside,
                        primary=resolved.config.evaluation.primary_endpoints, grounding=task.grounding)


def _parts(resolved: Resolved, opened: Sequence[Contestant]) -> dict[str, Any]:
    """The parts of the report that are asked for by name: what tuning cost, the red team."""
    settings = resolved.config.evaluation
    parts: dict[str, Any] = {"tuning_cost": None, "red_team": None}
    if settings.tuning_cost:
        from emergency_kit.evaluation.tuning_cost import measure_cost

        parts["tuning_cost"] = measure_cost(resolved, opened)
    if settings.red_team:
        from emergency_kit.evaluation.attack import attack

        parts["red_team"] = attack(resolved, opened[0])
    return parts


def _load_last(out: Path) -> dict[str, Any] | None:
    """The metrics of the report that stands there, for comparison; None where there is none or it is of an older form."""
    try:
        report = json.loads(out.read_text(encoding="utf-8"))
        return {"created": report["made"]["created"], "name": report["models"][0]["name"], "sha256": report["models"][0]["sha256"],
                "dataset_hash": report["made"]["dataset_hash"], "metrics": report["models"][0]["metrics"]}
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None
