"""Compare: models beside each other on the same scenarios, differences paired.

In: scored answers of two models. Out: for each metric the difference with its interval and p-value, and Holm's correction
over the primary endpoints, which the config names before the run. Flags are tested by exact McNemar, shares by flipping
the signs of whole hazards; both intervals come from the bootstrap over hazards. Limits: only scenarios that both answered.
"""

from __future__ import annotations

from typing import Any, Sequence

from emergency_kit.evaluation.metrics import BY_NAME, METRICS, Metric, Scored, cluster_of
from emergency_kit.evaluation.statistics import bootstrap_mean, holm, mcnemar, sign_flip


def compare(first: Sequence[Scored], second: Sequence[Scored], primary: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`{metric: {first, second, difference, low, high, p, p_holm, n, primary, verdict}}`, second minus first.

    p_holm stands for primary endpoints alone. verdict: better, worse or no difference shown, of the second model.
    """
    table = {}
    for metric in METRICS:
        row = _difference(first, second, metric)
        if row:
            table[metric.name] = row | {"primary": metric.name in primary}
    adjusted = holm({name: row["p"] for name, row in table.items() if row["primary"]})
    for name, row in table.items():
        row["p_holm"] = adjusted.get(name)
        row["verdict"] = _word(BY_NAME[name], row)
    return table


def _difference(first: Sequence[Scored], second: Sequence[Scored], metric: Metric) -> dict[str, Any] | None:
    answers = {item.record.id: item for item in first}
    pairs = [(one, other, cluster_of(item.record)) for item in second if item.record.id in answers
             and (one := metric.get(answers[item.record.id])) is not None and (other := metric.get(item)) is not None]
    if not pairs:
        return None
    differences, clusters = [other - one for one, other, _ in pairs], [cluster for _, _, cluster in pairs]
    interval = bootstrap_mean(differences, clusters)
    assert interval is not None
    p = mcnemar([bool(one) for one, _, _ in pairs], [bool(other) for _, other, _ in pairs]) if metric.flag else sign_flip(differences, clusters)
    number = len(pairs)
    return {"first": round(sum(one for one, _, _ in pairs) / number, 4), "second": round(sum(other for _, other, _ in pairs) / number, 4),
            "difference": round(interval.value, 4), "low": round(interval.low, 4), "high": round(interval.high, 4), "p": float(f"{p:.3g}"), "n": number}


def _word(metric: Metric, row: dict[str, Any]) -> str:
    p = row["p_holm"] if row["p_holm"] is not None else row["p"]
    if not metric.better:
        return ""
    if p >= 0.05 or row["difference"] == 0:
        return "no difference shown"
    return "better" if (row["difference"] > 0) == (metric.better == "high") else "worse"
