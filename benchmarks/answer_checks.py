"""Structure and safety of answers with and without grammar and guard, on test prompts and red-team prompts.

In: a checkpoint (GGUF, or a folder for PyTorch), the test split, a JSONL file of answers so far (so that it can be stopped and gone on with). Out: a
Markdown table. Modes: `plain` (no grammar), `grammar`. Guard is a check on the same answers, so it costs no
generation. "Dangerous" is what `knowledge/rules.py::examine` finds affirmed against the cards of the true
hazard, which retrieval may have missed. Run: `make bench-answers`, or with --report for the table alone.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, Iterator, Mapping

from emergency_kit.config import load_config
from emergency_kit.data.format import Record, build_messages, read_answer, shown_cards
from emergency_kit.data.load import load_split
from emergency_kit.evaluation.run import select_records
from emergency_kit.inference.engine import Messages, open_engine
from emergency_kit.inference.grammar import build_grammar
from emergency_kit.inference.guard import guard_found
from emergency_kit.knowledge.cards import Card, load_cards
from emergency_kit.knowledge.retrieve import Found, Retriever
from emergency_kit.knowledge.rules import Examination, examine

MODES = ("plain", "grammar")
NEW_TOKENS = 2048
PLAIN_TOKENS = 400  # what the evaluation allows; a plain answer that goes round would else fill its whole limit
CHUNK = 4  # batches that are written down together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("outputs/gguf/final-q4_k_m.gguf"))
    parser.add_argument("--answers", type=Path, default=Path("outputs/answer_checks.jsonl"))
    parser.add_argument("--red-team", type=Path, default=Path("emergency_kit/evaluation/red_team.yaml"), help="red-team prompts; they are asked first")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--seconds", type=float, default=3600, help="stop after this long; run again to go on")
    parser.add_argument("--batch", type=int, default=4, help="answers at once")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    prompts = list(list_prompts(options.samples, options.red_team))
    prompts.sort(key=lambda record: not record.id.startswith("red/"))
    if not options.report:
        answer(options, prompts)
    report(options, prompts)


def list_prompts(samples: int, red_team: Path) -> Iterator[Record]:
    """Test records spread over hazards, then the red team's, whose ids begin with `red/`."""
    resolved = load_config("embedded")
    yield from select_records(load_split(resolved, "test"), samples, 42, frozenset())
    if red_team.is_file():
        import yaml

        groups = yaml.safe_load(red_team.read_text(encoding="utf-8"))
        for group, items in groups.items():
            for number, item in enumerate(items if isinstance(items, list) else ()):
                (key, text), = item.items()
                hazard = key.split()[0]  # card id, then what the evaluation looks for
                yield Record(f"red/{group}/{number}", text, "", hazards=(hazard,) if hazard in load_cards() else ())


def answer(options: argparse.Namespace, prompts: list[Record]) -> None:
    """Answer what is not in the file yet, the modes in turn on a few prompts at a time; these are written together."""
    done = {(row["id"], row["mode"]) for row in read(options.answers)}
    library = load_cards()
    retriever = Retriever(library, 2)
    engine = open_engine(load_config("embedded").config.model, options.checkpoint, options.batch)
    until = time.monotonic() + options.seconds
    limits = {"plain": (PLAIN_TOKENS, ""), "grammar": (NEW_TOKENS, build_grammar(NEW_TOKENS))}
    modes = options.modes.split(",")
    wanted, finished = sum((record.id, mode) not in done for record in prompts for mode in modes), 0
    for start in range(0, len(prompts), CHUNK * options.batch):
        for mode in modes:
            records = [record for record in prompts[start:start + CHUNK * options.batch] if (record.id, mode) not in done]
            if not records or time.monotonic() > until:
                continue
            answers = engine.generate([_messages(record, retriever.find(record.input), library) for record in records], limits[mode][0], options.batch, grammar=limits[mode][1])
            with options.answers.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"id": record.id, "mode": mode, "text": each.text, "tokens": each.tokens, "ended": each.ended}) + "\n" for record, each in zip(records, answers))
            finished += len(answers)
            print(f"{finished} answers", flush=True)
    engine.close()
    print(f"{finished} of {wanted} open answers written" + ("; run again to go on" if finished < wanted else ""))


def _messages(record: Record, found: Found, library: Mapping[str, Card]) -> Messages:
    return build_messages(record.input, shown_cards(found.ids, library), country=record.country, fits=found.fits)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def report(options: argparse.Namespace, prompts: list[Record]) -> None:
    library = load_cards()
    retriever = Retriever(library, 2)
    rows = read(options.answers)
    records = {record.id: record for record in prompts}
    groups = [("test", [record for record in prompts if not record.id.startswith("red/")]), ("red team", [record for record in prompts if record.id.startswith("red/")])]
    for name, group in groups:
        ids = {record.id for record in group if record.hazards}
        founds = {record.id: retriever.find(record.input) for record in group}
        right = sum(all(hazard in founds[i].ids for hazard in records[i].hazards) for i in ids)
        if ids:
            print(f"\n{name}: {len(ids)} prompts with a known hazard; retrieval shows every card of it for {right}, unsure on {sum(founds[i].unsure for i in ids)}")
            print("\n| mode | guard | answers | valid | ended | actions given | answers with dangerous advice | of them with every card of the hazard shown | dangerous lines |\n|---|---|---|---|---|---|---|---|---|")
        for mode in MODES:
            answers = [row for row in rows if row["mode"] == mode and row["id"] in ids]
            if not answers:
                continue
            for guarded in (False, True):
                counts = {"given": 0, "actions": 0, "bad": 0, "known": 0, "lines": 0}
                for row in answers:
                    record = records[row["id"]]
                    checked = guard_found(row["text"], founds[row["id"]], library, record.country, record.input)
                    text = checked.shown_text if guarded else checked.text
                    found = examine(text, [library[hazard] for hazard in record.hazards], record.country, record.lacks)
                    counts["given"] += sum(item.given for item in found.actions)
                    counts["actions"] += len(found.actions)
                    dangers = list_dangers(found)
                    counts["bad"] += bool(dangers)
                    counts["known"] += bool(dangers) and all(hazard in founds[row["id"]].ids for hazard in record.hazards)
                    counts["lines"] += len(dangers)
                    if guarded and dangers:
                        options.answers.with_suffix(".dangers.txt").open("a").write(f"{mode} {row['id']} {founds[row['id']].ids}: " + "; ".join(f"{text[s:e]!r} breaks {w}" for (s, e), w in dangers) + "\n")
                valid = sum(read_answer(row["text"]).valid for row in answers)
                ended = sum(row["ended"] for row in answers)
                print(f"| {mode} | {'on' if guarded else 'off'} | {len(answers)} | {valid / len(answers):.1%} | {ended / len(answers):.1%} | "
                      f"{counts['given'] / max(1, counts['actions']):.1%} | {counts['bad']} | {counts['known']} | {counts['lines']} |")


def list_dangers(found: Examination) -> list[tuple[tuple[int, int], str]]:
    return [(rule.span, rule.rule) for rule in found.rules if rule.stance == "affirmed" and rule.span] + [(item.span, item.what) for item in found.prohibitions]


if __name__ == "__main__":
    main()
