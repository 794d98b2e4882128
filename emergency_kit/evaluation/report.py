"""Report: what evaluation found, as JSON for programs and as one self-contained page for people.

In: the tuned model's answers and, where compared, the base model's. Out: a dict that holds the keys
of the original system at its top level and ours beside them, and HTML made from that dict alone.
"""

from __future__ import annotations

from html import escape
from typing import Any

from emergency_kit.evaluation.metrics import Answered, measure

ORIGINAL_KEYS = ("total_samples", "valid_json", "valid_json_percentage", "valid_structured_text", "valid_structured_text_percentage",
                 "valid_structure", "valid_structure_percentage", "errors", "ai_evaluation")
# Label, path into the numbers of a model, unit.
ROWS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("four sections", ("valid_structure_percentage",), "%"),
    ("ended by itself", ("ended_percentage",), "%"),
    ("valid JSON", ("valid_json_percentage",), "%"),
    ("critical actions given", ("critical_action_recall", "overall"), "%"),
    ("  hazards seen in training", ("critical_action_recall", "seen_hazards"), "%"),
    ("  hazards only in test", ("critical_action_recall", "test_only_hazards"), "%"),
    ("mean length, tokens", ("mean_tokens",), ""),
    ("answers that loop", ("loops",), ""),
    ("seconds", ("seconds",), ""),
    ("tokens a second", ("tokens_per_second",), ""),
)


def build_report(tuned: Answered, base: Answered | None, trained: frozenset[str], made: dict[str, Any]) -> dict[str, Any]:
    """The report. `base` and `base_answer` are None where the base model was not asked.

    `errors` lists answers that fail a check of form; missing critical actions stand in `samples`.
    """
    numbers = measure(tuned, trained)
    errors = [{"sample_idx": index, "error": "; ".join(item.checks.problems)}
              for index, item in enumerate(tuned.scored) if item.checks.problems]
    known = numbers | {"errors": errors, "ai_evaluation": None}
    return {
        **{key: known[key] for key in ORIGINAL_KEYS},
        **{key: value for key, value in numbers.items() if key not in ORIGINAL_KEYS},
        "base": measure(base, trained) if base else None,
        "samples": [{
            "id": item.record.id,
            "hazards": list(item.record.hazards),
            "cards": list(item.record.cards or ()),
            "input": item.record.input or item.record.instruction,
            "answer": item.generated.text,
            "base_answer": base.scored[index].generated.text if base else None,
            "problems": list(item.checks.problems),
            "missing_actions": [{"card": action.card_id, "action": action.action} for action in item.actions if not action.given],
        } for index, item in enumerate(tuned.scored)],
        "made": made,
    }


def table_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """`(label, tuned, base)` of every number; `-` where there is none."""
    return [(label, _cell(report, path, unit), _cell(report["base"], path, unit)) for label, path, unit in ROWS]


def failing_samples(report: dict[str, Any]) -> list[tuple[int, str, str]]:
    """`(sample_idx, id, what is wrong)` of every sample with a problem of form or a missing critical action."""
    failing = []
    for index, sample in enumerate(report["samples"]):
        wrong = sample["problems"] + [f"missing: {missing['action']}" for missing in sample["missing_actions"]]
        if wrong:
            failing.append((index, sample["id"], "; ".join(wrong)))
    return failing


def _cell(numbers: dict[str, Any] | None, path: tuple[str, ...], unit: str) -> str:
    value: Any = numbers
    for key in path:
        value = value[key] if value is not None else None
    return "-" if value is None else f"{value:g}{unit}" if isinstance(value, int) else f"{value:.1f}{unit}"


_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse } th, td { padding: .25rem 1rem; text-align: right; border-bottom: 1px solid #8884 }
th:first-child, td:first-child { text-align: left; white-space: pre }
pre { white-space: pre-wrap; background: #8881; padding: .75rem; border-radius: .25rem }
details { border-bottom: 1px solid #8884; padding: .5rem 0 } summary { cursor: pointer }
.wrong { color: #c0392b } .columns { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem }
"""


def render_html(report: dict[str, Any]) -> str:
    """The report as one HTML page that loads nothing; every text from data or model is escaped."""
    compared = report["base"] is not None
    head = "".join(f"<th>{name}</th>" for name in ("", "tuned", *(["base"] if compared else [])))
    rows = "".join(f"<tr><td>{escape(label)}</td><td>{escape(tuned)}</td>{f'<td>{escape(base)}</td>' if compared else ''}</tr>\n"
                   for label, tuned, base in table_rows(report))
    made = report["made"]
    checkpoint = ", ".join(parent["path"] for parent in made["parents"])
    samples = "\n".join(_sample(index, sample) for index, sample in enumerate(report["samples"]))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation report</title><style>{_STYLE}</style></head><body>
<h1>Evaluation report</h1>
<p>{report['total_samples']} test records, answered by {escape(checkpoint)}, {escape(made['created'])}, profile {escape(made['profile'])}.</p>
<table><thead><tr>{head}</tr></thead><tbody>
{rows}</tbody></table>
<p>Critical actions are matched as phrases in the GUIDANCE section; a high number says that they stand there, not that the answer is safe.</p>
<h2>Answers</h2>
{samples}
</body></html>
"""


def _sample(index: int, sample: dict[str, Any]) -> str:
    wrong = sample["problems"] + [f"missing: {missing['action']} ({missing['card']})" for missing in sample["missing_actions"]]
    listed = "".join(f"<li>{escape(problem)}</li>" for problem in wrong)
    answers = f"<div><h4>Tuned</h4><pre>{escape(sample['answer'])}</pre></div>"
    if sample["base_answer"] is not None:
        answers += f"<div><h4>Base</h4><pre>{escape(sample['base_answer'])}</pre></div>"
    state = f'<span class="wrong">{len(wrong)} to look at</span>' if wrong else "ok"
    return (f"<details><summary>{index}. {escape(sample['id'])}: {state}</summary>"
            f"<p>{escape(sample['input'])}</p><p>Hazards: {escape(', '.join(sample['hazards']) or 'none')}. "
            f"Cards shown: {escape(', '.join(sample['cards']) or 'none')}.</p>"
            f'<ul class="wrong">{listed}</ul><div class="columns">{answers}</div></details>')
