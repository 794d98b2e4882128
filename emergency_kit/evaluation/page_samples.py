"""Samples of the report's page: every scenario with every model's answer, matched phrases marked in place.

In: the report's samples. Out: HTML. Marks are character offsets into the answer as the model wrote it, so the text between
them is the answer's, byte for byte, escaped. Overlapping marks: the more dangerous one stays.
"""

from __future__ import annotations

from html import escape
from typing import Any, Sequence

RANK = {"danger": 2, "warned": 1, "given": 0}
TOLD = {"danger": "dangerous", "warned": "warned against, rightly", "given": "critical action given"}


def render_worst(report: dict[str, Any]) -> str:
    """The ten worst answers of the first model, in full."""
    if not report["worst"]:
        return "<h2>The worst answers</h2><p>No answer has a fault that was looked for.</p>"
    return ("<h2>The worst answers, in full</h2>" + "".join(_body(report["samples"][index], f"<h3>{index}. {escape(report['samples'][index]['id'])} {_tags(report['samples'][index])}</h3>", first_only=True)
                                                            for index in report["worst"]))


def render_samples(report: dict[str, Any]) -> str:
    """All samples with filters for text, finding, hazard and grounding."""
    samples = report["samples"]
    hazards = sorted({hazard for sample in samples for hazard in sample["hazards"]})
    grounds = sorted({sample["slices"]["grounding"][0] for sample in samples})
    filters = (f'<div class="filters"><label>words<input id="find" type="search"></label>'
               f'<label>finding<select id="kind"><option value="">any</option>{_options(["danger", "missing", "form", "clean"])}</select></label>'
               f'<label>hazard<select id="hazard"><option value="">any</option>{_options(hazards)}</select></label>'
               f'<label>prompt carried<select id="ground"><option value="">any</option>{_options(grounds)}</select></label><span id="count" class="soft" role="status"></span></div>')
    rows = "".join(_sample(index, sample) for index, sample in enumerate(samples))
    legend = '<p class="soft">Marked in the answers: <mark class="given">critical action given</mark>, <mark class="warned">danger warned against</mark>, <mark class="danger">danger</mark>.</p>'
    return f"<h2>Answers</h2>{legend}{filters}{rows}"


def render_red_team(found: dict[str, Any] | None) -> str:
    """Prompts that pull toward harm, the failed ones first."""
    if not found:
        return ""
    rates = "".join(f"<tr><td>{escape(row['kind'].replace('_', ' '))}</td><td>{row['safe']} of {row['n']} without harm</td><td>{row['passed']} with all that must come back</td></tr>" for row in found["kinds"])
    rows = "".join(f'<tr><td class="text">{escape(row["prompt"])}</td><td class="{"good" if row["passed"] else "bad"}">{"held" if row["passed"] else "lacking" if row["safe"] else "HARM"}</td>'
                   f'<td class="text">{escape("; ".join(row["reasons"]))}</td></tr>' for row in sorted(found["prompts"], key=lambda row: (row["safe"], row["passed"])))
    safe, passed = found["safe"], found["passed"]
    return (f'<h2>Red team</h2><p>{len(found["prompts"])} prompts that pull toward harm. No harm came back in {safe["value"]:.1%} ({safe["low"]:.1%} to {safe["high"]:.1%}); '
            f'all that must come back did, too, in {passed["value"]:.1%} ({passed["low"]:.1%} to {passed["high"]:.1%}).</p>'
            f'<div class="box"><table><tbody>{rates}</tbody></table></div><details><summary>All prompts</summary><div class="box"><table><tbody>{rows}</tbody></table></div></details>')


def highlight(text: str, marks: Sequence[Sequence[Any]]) -> str:
    """The text escaped, with `<mark>` around what was matched."""
    chosen: list[Sequence[Any]] = []
    for mark in sorted(marks, key=lambda mark: (-RANK[mark[2]], mark[0])):
        if 0 <= mark[0] < mark[1] <= len(text) and all(mark[1] <= other[0] or other[1] <= mark[0] for other in chosen):
            chosen.append(mark)
    parts, place = [], 0
    for start, end, kind, what in sorted(chosen, key=lambda mark: mark[0]):
        parts += [escape(text[place:start]), f'<mark class="{kind}" title="{TOLD[kind]}: {escape(str(what))}">{escape(text[start:end])}</mark>']
        place = end
    return "".join([*parts, escape(text[place:])])


def _options(values: Sequence[str]) -> str:
    return "".join(f'<option value="{escape(value)}">{escape(value.replace("_", " "))}</option>' for value in values)


def _tags(sample: dict[str, Any]) -> str:
    tags = [("bad", name) for name in dict.fromkeys(danger.split(",")[0].split(":")[0] for danger in sample["dangers"] if not danger.startswith("a number"))]
    tags += [("warn", f"{len(sample['missing_actions'])} missing")] if sample["missing_actions"] else []
    tags += [("warn", f"{len(sample['problems'])} of form")] if sample["problems"] else []
    return "".join(f'<span class="tag {css}">{escape(text)}</span>' for css, text in tags or [("good", "clean")])


def _sample(index: int, sample: dict[str, Any]) -> str:
    kinds = [name for name, value in (("danger", sample["dangers"]), ("missing", sample["missing_actions"]), ("form", sample["problems"])) if value] or ["clean"]
    head = f"<summary>{index}. {escape(sample['id'])} {_tags(sample)}</summary>"
    return (f'<details class="sample" data-kinds="{" ".join(kinds)}" data-hazards="{escape(" ".join(sample["hazards"]))}" '
            f'data-ground="{escape(sample["slices"]["grounding"][0])}">{_body(sample, head)}</details>')


def _body(sample: dict[str, Any], head: str, first_only: bool = False) -> str:
    wrong = sample["dangers"] + sample["problems"] + [f"missing: {item['action']} ({item['card']})" for item in sample["missing_actions"]]
    listed = "".join(f"<li>{escape(problem)}</li>" for problem in wrong)
    answers = list(sample["answers"].items())[:1 if first_only else None]
    columns = "".join(f'<div class="answer"><h4>{escape(name)}</h4><pre>{highlight(answer["text"], answer["marks"])}</pre></div>' for name, answer in answers)
    cards = ", ".join(sample["cards"]) or "none"
    place = f" Country {escape(sample['country'])}." if sample["country"] else ""
    lacks = f" Lacking: {escape(', '.join(sample['lacks']))}." if sample["lacks"] else ""
    return (f'{head}<p class="said">{escape(sample["input"])}</p><p class="soft">Hazards: {escape(", ".join(sample["hazards"]) or "none")}. Cards shown: {escape(cards)}.{place}{lacks}</p>'
            f'{f"<ul class=bad>{listed}</ul>" if listed else ""}<div class="columns">{columns}</div>')
