"""Page: the report for people, one HTML file that loads nothing.

In: the report's dict. Out: HTML, verdict first, then numbers with intervals, plots, slices, danger, samples. Every text from data
or model is escaped. It reads on a phone (tables scroll in their own box), on paper (samples closed, colours kept apart by
words), and in the dark. The only script filters the samples; without it everything is still there.
"""

from __future__ import annotations

from html import escape
from typing import Any

from emergency_kit.evaluation.metrics import METRICS
from emergency_kit.evaluation.page_plots import draw_heat_map, draw_intervals
from emergency_kit.evaluation.page_samples import render_red_team, render_samples, render_worst

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#fff;--soft:#5b6570;--line:#d5dae0;--tint:#f3f5f7;--good:#1a7f4b;--bad:#b3261e;--warn:#8a5a00;--one:#1f5fa8;--two:#b5651d;--three:#6b4fa0;--four:#2f7d7d}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--paper:#16191d;--soft:#a3acb6;--line:#3a424b;--tint:#20252b;--good:#5fce95;--bad:#ff8a80;--warn:#f0b95a;--one:#7db4f5;--two:#f0a868;--three:#b9a3f0;--four:#6fc7c7}}
*{box-sizing:border-box}html{font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;color:var(--ink);background:var(--paper)}
body{max-width:66rem;margin:0 auto;padding:1rem 1rem 4rem}h1{font-size:1.5rem;margin:.5rem 0}h2{font-size:1.2rem;margin:2.2rem 0 .5rem;border-top:2px solid var(--line);padding-top:.8rem}h3{font-size:1rem;margin:1.2rem 0 .3rem}
.verdict{border:2px solid;border-radius:.5rem;padding:.8rem 1rem;margin:1rem 0}.verdict.no{border-color:var(--bad)}.verdict.yes{border-color:var(--good)}.verdict strong{font-size:1.4rem}.verdict.no strong{color:var(--bad)}.verdict.yes strong{color:var(--good)}
.verdict ul{margin:.4rem 0;padding-left:1.2rem}.box{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}th,td{padding:.3rem .6rem;text-align:right;min-width:5.2rem;border-bottom:1px solid var(--line);vertical-align:top}th:first-child,td:first-child{text-align:left}thead th{color:var(--soft);font-weight:600;vertical-align:bottom}
td.text{text-align:left;min-width:14rem}small,.soft{color:var(--soft);font-size:.85rem}tr.primary td:first-child{font-weight:600}.good{color:var(--good)}.bad{color:var(--bad)}
svg{max-width:100%;height:auto;display:block}svg text{fill:var(--ink);font:12px system-ui,sans-serif}svg .soft{fill:var(--soft)}
.heat td{text-align:center;min-width:4.5rem;color:#111;border:1px solid var(--paper)}.heat td:first-child{color:inherit;text-align:left;min-width:9rem}.heat td.none{color:var(--soft)}
.filters{display:flex;flex-wrap:wrap;gap:.5rem;align-items:end;margin:.6rem 0;position:sticky;top:0;background:var(--paper);padding:.5rem 0;z-index:1}.filters label{display:flex;flex-direction:column;font-size:.8rem;color:var(--soft);flex:1 1 8rem}
.filters input,.filters select{font:inherit;font-size:1rem;padding:.3rem;border:1px solid var(--line);border-radius:.3rem;background:var(--paper);color:inherit;min-width:0;width:100%}
details{border-bottom:1px solid var(--line);padding:.45rem 0}summary{cursor:pointer;overflow-wrap:anywhere}.tag{display:inline-block;font-size:.78rem;border:1px solid;border-radius:1rem;padding:0 .5rem;margin-left:.25rem;white-space:nowrap}.tag.bad{color:var(--bad)}.tag.warn{color:var(--warn)}.tag.good{color:var(--good)}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr));gap:.8rem}.answer{background:var(--tint);border-radius:.4rem;padding:.6rem .8rem;min-width:0}.answer h4{margin:0 0 .3rem;font-size:.9rem}
.answer pre{white-space:pre-wrap;overflow-wrap:anywhere;font:.88rem/1.45 ui-monospace,monospace;margin:0}.said{border-left:4px solid var(--line);padding:.2rem .8rem;margin:.5rem 0;overflow-wrap:anywhere}
mark{background:none;color:inherit;border-bottom:2px solid;padding:0}mark.given{border-color:var(--good)}mark.warned{border-color:var(--one);border-bottom-style:dotted}mark.danger{border-color:var(--bad);background:#b3261e26;font-weight:600}
@media print{body{max-width:none;padding:0;font-size:10pt}.filters{display:none}.box{overflow:visible}h2{break-after:avoid}details,.answer,tr{break-inside:avoid}details.sample{display:none}a{color:inherit}}
"""
SCRIPT = """
const $=id=>document.getElementById(id),rows=[...document.querySelectorAll('.sample')];
function filter(){const text=$('find').value.toLowerCase(),kind=$('kind').value,hazard=$('hazard').value,ground=$('ground').value;let shown=0;
for(const row of rows){const ok=(!text||row.textContent.toLowerCase().includes(text))&&(!kind||row.dataset.kinds.split(' ').includes(kind))&&(!hazard||row.dataset.hazards.split(' ').includes(hazard))&&(!ground||row.dataset.ground===ground);row.hidden=!ok;shown+=ok}
$('count').textContent=shown+' of '+rows.length}
for(const id of ['find','kind','hazard','ground'])$(id).addEventListener('input',filter);filter();
"""


def render_html(report: dict[str, Any]) -> str:
    """The report as one HTML page."""
    made = report["made"]
    asked = ", ".join(model["name"] for model in report["models"])
    parts = [
        render_verdict(report),
        _numbers(report),
        _differences(report),
        "<h2>Plots</h2>" + draw_intervals(report),
        _slices(report),
        render_red_team(report.get("red_team")),
        _tuning_cost(report.get("tuning_cost")),
        _judge(report.get("ai_evaluation")),
        render_worst(report),
        render_samples(report),
        _about(report),
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation report</title><style>{STYLE}</style></head><body>
<h1>Evaluation report</h1>
<p class="soft">{report['total_samples']} test scenarios, answered by {escape(asked)}. {escape(made['created'])}, profile {escape(made['profile'])}.</p>
{"".join(parts)}
<script>{SCRIPT}</script></body></html>
"""


def render_verdict(report: dict[str, Any]) -> str:
    """The verdict's box; says so where none has been given."""
    verdict = report.get("verdict")
    if not verdict:
        return '<div class="verdict"><strong>No verdict yet.</strong> Next: emergency-kit gate</div>'
    judged = escape(str(verdict["judged"]["path"]))
    rows = "".join(f'<li class="{"good" if check["holds"] else "bad"}">{"Yes" if check["holds"] else "No"}: {escape(check["says"])}</li>'
                   for check in sorted(verdict["checks"], key=lambda check: check["holds"]))
    override = f'<p class="bad">Overridden: {escape(verdict["override"])}</p>' if verdict.get("override") else ""
    word = "Ship" if verdict["ship"] else "Do not ship"
    return f'<div class="verdict {"yes" if verdict["ship"] else "no"}"><strong>{word}</strong> <span class="soft">{judged}</span>{override}<ul>{rows}</ul></div>'


def _value(numbers: dict[str, Any] | None, unit: str) -> str:
    if not numbers:
        return "–"
    scale, form = (100, ".1f") if unit == "%" else (1, ".1f")
    value, low, high = (numbers[key] * scale for key in ("value", "low", "high"))
    return f"{value:{form}}{unit} <small>{low:{form}} to {high:{form}}</small>"


def _numbers(report: dict[str, Any]) -> str:
    """Every metric of every model and baseline, with 95 % intervals."""
    columns = [*report["models"], *report["baselines"]]
    last = report.get("last_run")
    heads = "".join(f'<th>{escape(column["name"])}<br><small>{escape(column.get("kind") or "baseline")}, {column["samples"]}</small></th>' for column in columns)
    heads += f'<th>last run<br><small>{escape(last["name"])}, {escape(last["created"][:16])}</small></th>' if last else ""
    rows = []
    for metric in METRICS:
        cells = "".join(f"<td>{_value(column['metrics'].get(metric.name), metric.unit)}</td>" for column in columns)
        cells += f"<td>{_value(last['metrics'].get(metric.name), metric.unit)}</td>" if last else ""
        primary = ' class="primary"' if metric.name in report["primary_endpoints"] else ""
        wanted = f" <small>{metric.better} is good</small>" if metric.better else ""
        rows.append(f"<tr{primary}><td>{escape(metric.label)}{wanted}</td>{cells}</tr>")
    speed = "".join(f"<td>{column['tokens_per_second']:.0f}</td>" if column.get("tokens_per_second") else "<td>–</td>" for column in columns) + ("<td>–</td>" if last else "")
    suspicious = "".join(f"<li>{escape(line)}</li>" for line in report["suspicious"])
    measured = render_measurer(report.get("measurer"))
    return ('<h2>Numbers</h2><p class="soft">With 95 % intervals over scenarios: Wilson for rates (3/n where nothing was seen), bootstrap over hazards for means. '
            "Bold: primary endpoints, declared before the run. Ceiling and floor stand in the same table: the card alone as an answer, and a call for help alone.</p>"
            f'<div class="box"><table><thead><tr><th></th>{heads}</tr></thead><tbody>{"".join(rows)}<tr><td>tokens a second, this run</td>{speed}</tr></tbody></table></div>{measured}'
            + (f"<h3>At exactly 0 or 100 %: to be suspected before it is believed</h3><ul>{suspicious}</ul>" if suspicious else ""))


def render_measurer(measurer: dict[str, Any] | None) -> str:
    """What the matcher itself misses, and rates corrected for it."""
    if not measurer:
        return '<p class="soft">Dangers and actions are found by matching text; what no pattern foresees is not found, so a low rate of danger is not proof of safety.</p>'
    rows = "".join(f"<tr><td>{escape(row['what'])}</td>" + "".join("<td>–</td>" if row[key] is None else f"<td>{row[key]:.1%}</td>"
                   for key in ("recall", "precision", "found", "corrected")) + "</tr>" for row in measurer["rows"])
    return ("<h3>The measurer measured</h3><div class=box><table><thead><tr><th>what the matcher looks for</th><th>recall</th><th>precision</th><th>rate found</th>"
            f"<th>rate corrected</th></tr></thead><tbody>{rows}</tbody></table></div><p class=soft>{escape(measurer['source'])}</p>")


def _differences(report: dict[str, Any]) -> str:
    if not report["differences"]:
        return ""
    blocks = []
    for item in report["differences"]:
        rows = []
        for metric in METRICS:
            row = item["metrics"].get(metric.name)
            if not row or not metric.better:
                continue
            p = f"{row['p_holm']:.3g} <small>Holm</small>" if row["p_holm"] is not None else f"{row['p']:.3g}"
            css = {"better": "good", "worse": "bad"}.get(row["verdict"], "soft")
            rows.append(f'<tr{" class=primary" if row["primary"] else ""}><td>{escape(metric.label)}</td><td>{row["first"]:.1%}</td><td>{row["second"]:.1%}</td>'
                        f'<td>{row["difference"]:+.1%} <small>{row["low"]:+.1%} to {row["high"]:+.1%}</small></td><td>{p}</td><td>{row["n"]}</td><td class="{css}">{row["verdict"]}</td></tr>')
        blocks.append(f'<h3>{escape(item["from"])} → {escape(item["to"])}</h3><div class="box"><table><thead><tr><th></th><th>{escape(item["from"])}</th><th>{escape(item["to"])}</th>'
                      f'<th>difference</th><th>p</th><th>pairs</th><th></th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>')
    return ('<h2>Differences</h2><p class="soft">Paired: the same scenario answered by both. Flags by exact McNemar, shares by flipping the signs of whole hazards.</p>'
            + "".join(blocks))


def _slices(report: dict[str, Any]) -> str:
    return '<h2>Slices</h2><p class="soft">The first model. Green is good, red is bad; small numbers of scenarios say little.</p>' + draw_heat_map(report["slices"])


def _tuning_cost(cost: dict[str, Any] | None) -> str:
    if not cost:
        return ""
    rows = "".join(f"<tr><td>{escape(row['name'])}</td><td>{row['perplexity']:.2f}</td><td>{row['right']:.1%} <small>{row['low']:.1%} to {row['high']:.1%}</small></td>"
                   f"<td>{row['instructions']:.1%}</td></tr>" for row in cost["models"])
    return (f'<h2>What tuning cost</h2><p class="soft">Perplexity on {cost["text_tokens"]} tokens of plain text, {cost["questions"]} multiple-choice questions of general knowledge '
            f'(chance is {cost["chance"]:.0%}), {cost["instruction_prompts"]} simple instructions.</p><div class="box"><table><thead><tr><th></th><th>perplexity</th><th>right</th>'
            f"<th>instructions followed</th></tr></thead><tbody>{rows}</tbody></table></div>")


def _judge(found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{'–' if value is None else f'{value:.1f}'}</td></tr>" for name, value in found["scores"].items())
    spent = f"{found['judged']} of {found['asked']} answers judged by {found['model']} ({found['provider']}), about {found['cost_usd']:.4f} USD"
    failed = "".join(f"<li>{escape(item['id'])}: {escape(item['error'])}</li>" for item in found["failed"])
    agree = "; ".join(f"{name}: {value}" for name, value in found["agreement"].items() if value is not None)
    return (f'<h2>A language model as judge</h2><p class="soft">{escape(spent)}. A second opinion, not part of the verdict.{" Agreement: " + escape(agree) + "." if agree else ""}</p>'
            f'<div class="box"><table><tbody>{rows}</tbody></table></div>' + (f"<h3>Not judged</h3><ul>{failed}</ul>" if failed else ""))


def _about(report: dict[str, Any]) -> str:
    rows = "".join(f"<tr><td>{escape(model['name'])}</td><td class=text>{escape(str(model.get('path', '')))}</td><td class=text>{escape(str(model.get('engine', '')))}</td>"
                   f"<td class=text><code>{escape(str(model.get('sha256') or '')[:16])}</code></td></tr>" for model in report["models"])
    versions = ", ".join(f"{name} {version}" for name, version in report["made"].get("packages", {}).items())
    return (f'<h2>What was run</h2><div class="box"><table><thead><tr><th></th><th>path</th><th>engine</th><th>sha256</th></tr></thead><tbody>{rows}</tbody></table></div>'
            f'<p class="soft">Dataset {escape(str(report["made"].get("dataset_hash"))[:16])}; {escape(versions)}. Nobody with medical training has read the answers.</p>')
