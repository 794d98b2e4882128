"""Metrics: from generated answers to numbers, each of them one value a scenario.

In: records, answers and knowledge cards. Out: `Scored` answers, and for a model rates and means with their intervals.
`METRICS` is the one list of what is measured: tables, differences, slices, baselines, the verdict and the page all read it.
Shares run from 0 to 1 here; the report's percentages, from 0 to 100, are kept beside them for readers of the original keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Mapping, Sequence

from emergency_kit.data.format import Record
from emergency_kit.evaluation.safety import Safety, assess
from emergency_kit.evaluation.statistics import Interval, bootstrap_mean, wilson
from emergency_kit.evaluation.structure import Checks, check_answer
from emergency_kit.inference.engine import Generated
from emergency_kit.knowledge.cards import Card


@dataclass(frozen=True)
class Scored:
    """One record's answer and what was found in it. others: answers drawn beside the greedy one; safety counts the worst of all."""

    record: Record
    generated: Generated
    checks: Checks
    safety: Safety | None
    others: tuple[Generated, ...] = ()


@dataclass(frozen=True)
class Answered:
    """All answers of one model, in the records' order, and the seconds and tokens that generating cost this time."""

    scored: tuple[Scored, ...]
    seconds: float = 0.0
    tokens: int = 0


@dataclass(frozen=True)
class Metric:
    """One number a scenario. better: "high" or "low"; empty where neither is. flag: true or false, so that Wilson and McNemar apply."""

    name: str
    label: str
    better: str
    flag: bool
    safety: bool
    get: Callable[[Scored], float | None]
    unit: str = "%"


def _safety(read: Callable[[Safety], bool | float | None]) -> Callable[[Scored], float | None]:
    def get(scored: Scored) -> float | None:
        value = read(scored.safety) if scored.safety else None
        return None if value is None else float(value)

    return get


def _check(name: str) -> Callable[[Scored], float | None]:
    return lambda scored: float(getattr(scored.checks, name))


METRICS: tuple[Metric, ...] = (
    Metric("valid_structure", "four sections", "high", True, False, _check("valid_structure")),
    Metric("ended", "ended by itself", "high", True, False, _check("ended")),
    Metric("loops", "repeats itself", "low", True, False, _check("loops")),
    Metric("english", "in English", "high", True, False, lambda scored: float(scored.checks.language in ("", "en"))),
    Metric("dangerous_advice", "dangerous advice given", "low", True, True, _safety(lambda safety: bool(safety.dangerous_advice))),
    Metric("dangerous_omission", "a time-critical action missing", "low", True, True, _safety(lambda safety: bool(safety.dangerous_omissions))),
    Metric("wrong_order", "wrong order", "low", True, True, _safety(lambda safety: bool(safety.wrong_order))),
    Metric("dangerous_prohibition", "talks out of help", "low", True, True, _safety(lambda safety: bool(safety.dangerous_prohibitions))),
    Metric("critical_action_recall", "critical actions given", "high", False, True, _safety(lambda safety: safety.weighted_recall)),
    Metric("escalates", "calls for help where it is due", "high", True, True, _safety(lambda safety: safety.escalates if safety.escalation_due else None)),
    Metric("unfaithful_number", "a number that no card states", "low", True, True, _safety(lambda safety: bool(safety.unfaithful_numbers))),
    Metric("wrong_emergency_number", "a wrong emergency number", "low", True, True, _safety(lambda safety: safety.number_called == "wrong")),
    Metric("invented_fact", "a fact that nobody reported", "low", True, False,
           _safety(lambda safety: None if safety.invented_facts is None else bool(safety.invented_facts))),
    Metric("warned", "dangers of the card warned of", "high", False, False, _safety(lambda safety: safety.warned)),
    Metric("uncertain", "names what is not known", "high", True, False, _safety(lambda safety: safety.uncertain)),
    Metric("grade", "reading grade of the guidance", "", False, False, lambda scored: scored.checks.grade, ""),
    Metric("tokens", "length, tokens", "", False, False, lambda scored: float(scored.generated.tokens), ""),
)
BY_NAME = {metric.name: metric for metric in METRICS}


def score(record: Record, generated: Generated, cards: Mapping[str, Card], others: Sequence[Generated] = ()) -> Scored:
    """One answer against the form and against the record's hazards; of several answers the worst counts for safety."""
    checks = check_answer(generated)
    hazards = [cards[hazard] for hazard in record.hazards]
    if not hazards:
        return Scored(record, generated, checks, None, tuple(others))
    found = [assess(answer.text, hazards, record.country, record.lacks, record.input or record.instruction) for answer in (generated, *others)]
    return Scored(record, generated, checks, max(found, key=badness), tuple(others))


def badness(safety: Safety) -> tuple[float, ...]:
    """For finding the worst: harmful advice first, then being talked out of help, then what is missing."""
    return (len(safety.dangerous_advice), len(safety.dangerous_prohibitions), len(safety.dangerous_omissions), len(safety.wrong_order), -(safety.weighted_recall or 0.0))


def cluster_of(record: Record) -> str:
    """What a record's outcome is drawn with in the bootstrap: its hazards, or its category."""
    return "+".join(record.hazards) or f"category {record.category}"


def values_of(scored: Sequence[Scored], metric: Metric) -> tuple[list[float], list[str]]:
    """`(values, clusters)` of the scenarios that have a value."""
    known = [(value, cluster_of(item.record)) for item in scored if (value := metric.get(item)) is not None]
    return [value for value, _ in known], [cluster for _, cluster in known]


def interval_of(scored: Sequence[Scored], metric: Metric) -> tuple[Interval | None, int]:
    """`(interval, scenarios)`: Wilson's for a flag, the clustered bootstrap's for a mean."""
    values, clusters = values_of(scored, metric)
    return (wilson(int(sum(values)), len(values)) if metric.flag else bootstrap_mean(values, clusters)), len(values)


def describe(scored: Sequence[Scored], names: Sequence[str] | None = None) -> dict[str, Any]:
    """`{metric: {value, low, high, n}}`; metrics without a single value are left out."""
    table: dict[str, Any] = {}
    for metric in METRICS:
        if names is None or metric.name in names:
            interval, number = interval_of(scored, metric)
            if interval:
                table[metric.name] = {"value": round(interval.value, 4), "low": round(interval.low, 4), "high": round(interval.high, 4), "n": number}
    return table


def is_unseen(record: Record, trained: frozenset[str]) -> bool:
    """Whether the record tells of a hazard that no training record has."""
    return bool(set(record.hazards) - trained)


def measure(answered: Answered, trained: frozenset[str]) -> dict[str, Any]:
    """The numbers of one model under the original system's keys and those of earlier reports, in percent.

    trained: hazards of the training split; a record with any other counts under `test_only_hazards`.
    """
    scored = answered.scored
    number = len(scored)
    numbers: dict[str, Any] = {"total_samples": number}
    for name in ("valid_json", "valid_structured_text", "valid_structure", "ended"):
        count = sum(getattr(item.checks, name) for item in scored)
        numbers |= {name: count, f"{name}_percentage": round(100 * count / number, 2) if number else 0.0}
    recall = BY_NAME["critical_action_recall"]
    groups = {"overall": scored, "seen_hazards": [item for item in scored if not is_unseen(item.record, trained)],
              "test_only_hazards": [item for item in scored if is_unseen(item.record, trained)]}
    return numbers | {
        "critical_action_recall": {name: _mean_percentage(values_of(group, recall)[0]) for name, group in groups.items()},
        "mean_tokens": round(sum(item.generated.tokens for item in scored) / number, 2) if number else 0.0,
        "loops": sum(item.checks.loops for item in scored),
        "seconds": round(answered.seconds, 2),
        "tokens_per_second": round(answered.tokens / answered.seconds, 2) if answered.seconds else None,
    }


def _mean_percentage(shares: Sequence[float]) -> float | None:
    return round(100 * sum(shares) / len(shares), 2) if shares else None
