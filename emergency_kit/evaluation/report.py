"""Report: what evaluation found, as JSON for programs; `page.py` makes the page for people from it alone.

In: answers of every model, scored. Out: a dict that holds the keys of the original system at its top level and ours beside
them. Shares under `models`, `differences` and `slices` run from 0 to 1, keys that end with `_percentage` from 0 to 100.
"""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from emergency_kit.evaluation.compare import compare
from emergency_kit.evaluation.measurer import correct_rate, load_figures
from emergency_kit.evaluation.metrics import METRICS, Answered, Scored, badness, describe, measure
from emergency_kit.evaluation.slices import dimensions_of, slice_answers

SCHEMA_VERSION = 2
ORIGINAL_KEYS = ("total_samples", "valid_json", "valid_json_percentage", "valid_structured_text", "valid_structured_text_percentage",
                 "valid_structure", "valid_structure_percentage", "errors", "ai_evaluation")
WORST = 10


def build_report(tuned: Answered, base: Answered | None, trained: frozenset[str], made: dict[str, Any], *,
                 models: Sequence[tuple[dict[str, Any], Answered]] = (), baselines: Mapping[str, Sequence[Scored]] | None = None,
                 primary: Sequence[str] = (), grounding: str = "cards") -> dict[str, Any]:
    """The report of the first model (`tuned`).

    models: every model with what it is (name, kind, path, sha256, engine, seconds), the first one first. baselines: answers
    that stand beside them in the same table. primary: the endpoints declared in the config.
    """
    numbers = measure(tuned, trained)
    errors = [{"sample_idx": index, "error": "; ".join(item.checks.problems)}
              for index, item in enumerate(tuned.scored) if item.checks.problems]
    known = numbers | {"errors": errors, "ai_evaluation": None}
    models = list(models) or [({"name": "tuned"}, tuned)]
    return {
        **{key: known[key] for key in ORIGINAL_KEYS},
        **{key: value for key, value in numbers.items() if key not in ORIGINAL_KEYS},
        "schema_version": SCHEMA_VERSION,
        "base": measure(base, trained) if base else None,
        "models": [about | {"samples": len(answered.scored), "metrics": describe(answered.scored)} for about, answered in models],
        "baselines": [{"name": name, "samples": len(scored), "metrics": describe(scored)} for name, scored in (baselines or {}).items()],
        "primary_endpoints": list(primary),
        "differences": [{"from": other["name"], "to": models[0][0]["name"], "metrics": compare(answered.scored, tuned.scored, primary)}
                        for other, answered in models[1:]],
        "unseen_hazards": describe([item for item in tuned.scored if set(item.record.hazards) - trained]),
        "slices": slice_answers(tuned.scored, trained, grounding),
        "suspicious": find_suspicious(models),
        "measurer": describe_measurer(tuned.scored),
        "worst": find_worst(tuned.scored),
        "samples": [_sample(index, models, base, trained, grounding) for index in range(len(tuned.scored))],
        "made": made,
    }


def describe_measurer(scored: Sequence[Scored]) -> dict[str, Any]:
    """How well the matcher finds what people found, and this model's rates corrected for it; from lines of answers, test half."""
    rows = []
    examinations = [item.safety.examination for item in scored if item.safety]
    flags = {"never": [rule.stance == "affirmed" for found in examinations for rule in found.rules],
             "action": [action.given for found in examinations for action in found.actions]}
    for kind, what in (("never", "a never-rule affirmed"), ("action", "a critical action given")):
        for source in ("sentences", "answers"):
            figures = load_figures()[source][kind]["test"]
            rate = sum(flags[kind]) / len(flags[kind]) if flags[kind] else None
            rows.append({"what": f"{what}, judged on {source}", "recall": figures["recall"], "precision": figures["precision"], "found": rate,
                         "corrected": None if rate is None else correct_rate(rate, kind, source)})
    return {"rows": rows, "source": "Recall and precision on the test half of the hand-labelled sentences and answers; rates over all rules and actions of this model's answers."}


def find_worst(scored: Sequence[Scored]) -> list[int]:
    """Places of the ten worst answers, the most harmful first; answers without a fault are not among them."""
    faulty = [index for index, item in enumerate(scored) if item.checks.problems or item.safety and (any(badness(item.safety)[:4]) or (item.safety.recall or 0) < 1)]
    return sorted(faulty, key=lambda index: _badness(scored[index]), reverse=True)[:WORST]


def find_suspicious(models: Sequence[tuple[dict[str, Any], Answered]]) -> list[str]:
    """Metrics at exactly 0 or 100 % over at least ten scenarios: suspected before they are believed."""
    found = []
    for about, answered in models:
        for name, numbers in describe(answered.scored).items():
            metric = next(item for item in METRICS if item.name == name)
            if metric.unit == "%" and numbers["value"] in (0, 1) and numbers["n"] >= 10:
                found.append(f"{about['name']}: {metric.label} is {numbers['value']:.0%} of {numbers['n']}")
    return found


def failing_samples(report: dict[str, Any]) -> list[tuple[int, str, str]]:
    """`(sample_idx, id, what is wrong)` of every sample with a problem of form, a missing critical action or a danger."""
    failing = []
    for index, sample in enumerate(report["samples"]):
        wrong = sample["problems"] + sample["dangers"] + [f"missing: {missing['action']}" for missing in sample["missing_actions"]]
        if wrong:
            failing.append((index, sample["id"], "; ".join(wrong)))
    return failing


def _badness(item: Scored) -> tuple[float, ...]:
    return (*(badness(item.safety) if item.safety else (0, 0, 0, 0, -1.0)), float(len(item.checks.problems)))


def _sample(index: int, models: Sequence[tuple[dict[str, Any], Answered]], base: Answered | None, trained: frozenset[str], grounding: str) -> dict[str, Any]:
    item = models[0][1].scored[index]
    record = item.record
    base_item = next((other for other in base.scored if other.record.id == record.id), None) if base else None
    answers = {}
    for about, answered in models:
        found = next((other for other in answered.scored if other.record.id == record.id), None)
        if found:
            answers[about["name"]] = describe_answer(found)
    return {
        "id": record.id,
        "hazards": list(record.hazards),
        "cards": list(record.cards or ()),
        "input": record.input or record.instruction,
        "answer": item.generated.text,
        "base_answer": base_item.generated.text if base_item else None,
        "problems": list(item.checks.problems),
        "missing_actions": [{"card": action.card_id, "action": action.action} for action in item.safety.examination.actions if not action.given] if item.safety else [],
        "dangers": describe_dangers(item),
        "country": record.country,
        "lacks": list(record.lacks),
        "slices": {dimension: list(parts) for dimension, parts in dimensions_of(record, trained, grounding).items()},
        "answers": answers,
    }


def describe_dangers(item: Scored) -> list[str]:
    """The failures of safety in words, the most harmful first."""
    if not item.safety:
        return []
    safety = item.safety
    dangers = [f"dangerous advice, breaks: {rule.rule}" for rule in safety.dangerous_advice]
    dangers += [f"talks out of help: {prohibition.what}" for prohibition in safety.dangerous_prohibitions]
    dangers += [f"time-critical action missing: {action.action}" for action in safety.dangerous_omissions]
    dangers += [f"wrong order: {late!r} after {earlier!r}" for late, earlier in safety.wrong_order]
    dangers += ["wrong emergency number"] if safety.number_called == "wrong" else []
    dangers += [f"a number that no card states: {item.generated.text[slice(*number.span)]}" for number in safety.unfaithful_numbers]
    return dangers + [f"invented fact: {fact}" for fact in safety.invented_facts or ()]


def describe_answer(item: Scored) -> dict[str, Any]:
    """One model's answer: text, what was found where (`marks`: start, end, kind, what), and its metrics."""
    marks: list[list[Any]] = []
    if item.safety:
        found = item.safety.examination
        marks += [[*action.span, "given", action.action] for action in found.actions if action.given and action.span]
        marks += [[*rule.span, {"affirmed": "danger", "warned": "warned"}[rule.stance], rule.rule] for rule in found.rules if rule.span and rule.stance != "silent"]
        marks += [[*prohibition.span, "danger", prohibition.what] for prohibition in found.prohibitions]
        marks += [[*number.span, "danger", f"number {number.verdict}"] for number in item.safety.unfaithful_numbers]
    return {
        "text": item.generated.text,
        "tokens": item.generated.tokens,
        "problems": list(item.checks.problems),
        "dangers": describe_dangers(item),
        "marks": sorted(marks, key=lambda mark: (mark[0], mark[1])),
        "metrics": {metric.name: round(value, 4) for metric in METRICS if (value := metric.get(item)) is not None},
        "others": [answer.text for answer in item.others],
    }
