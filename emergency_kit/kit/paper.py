"""Paper: all cards as one page to print, a sheet a hazard, that opens without a server or a script.

In: cards and emergency numbers. Out: cards.html. Its texts are the cards' own; sheets are A4 or Letter.
"""

from __future__ import annotations

from html import escape
from typing import Iterable, Mapping

from emergency_kit.knowledge.cards import SAFE_MINIMUM, Card
from emergency_kit.knowledge.emergency_numbers import Country

STYLE = """
@page { size: A4; margin: 12mm; }
* { box-sizing: border-box; }
body { font: 10.5pt/1.32 system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; color: #111; background: #fff; margin: 0 auto; max-width: 190mm; padding: 4mm; }
section { break-after: page; padding-block: 3mm; }
h1 { font-size: 20pt; margin: 0 0 2mm; } h2 { font-size: 11.5pt; margin: 2.5mm 0 1mm; border-bottom: 1px solid #777; }
p, ul, ol { margin: 0 0 1.5mm; } ul, ol { padding-left: 6mm; }
.call { border: 2px solid #b0121c; padding: 2mm 3mm; font-weight: 700; } .steps li { font-size: 11.5pt; font-weight: 600; margin-bottom: .8mm; } .instead { font-weight: 400; }
.never li::marker { content: "\\2715  "; color: #b0121c; } .small { font-size: 8pt; line-height: 1.22; color: #333; } .index { columns: 2; } .numbers { columns: 3; font-size: 8pt; line-height: 1.3; list-style: none; padding: 0; }
@media print { body { padding: 0; } section { padding: 0; } a { color: inherit; text-decoration: none; } }
"""


def build_sheets(cards: Mapping[str, Card], countries: Mapping[str, Country], cards_sha256: str) -> str:
    """The document: an index, a sheet a card, the numbers of all countries."""
    ordered = [cards[SAFE_MINIMUM], *(card for card in cards.values() if card.id != SAFE_MINIMUM)]
    sheets = "\n".join(_sheet(card) for card in ordered)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Emergency cards</title>
<style>{STYLE}</style>
</head>
<body>
<section id="index">
<h1>Emergency cards</h1>
<p class="call">In an emergency call for help first. The last sheet has the numbers of {len(countries)} countries.</p>
<p>{len(cards)} sheets of general first aid and safety, one a hazard, from the publications named on each. This is not a doctor, and no clinician has reviewed it.
It does not replace training. Where guidance differs between regions, the sheet says so.</p>
<ul class="index">{"".join(f'<li><a href="#{card.id}">{escape(card.name)}</a></li>' for card in ordered)}</ul>
<p class="small">Cards, sha256 {cards_sha256}</p>
</section>
{sheets}
<section id="emergency-numbers">
<h1>Emergency numbers</h1>
<ul class="numbers">{"".join(_country(country) for country in sorted(countries.values(), key=lambda country: country.name))}</ul>
</section>
</body>
</html>
"""


def _sheet(card: Card) -> str:
    steps = "".join(f"<li>{escape(action.text)}" + (f' <span class="instead">Without {escape(action.needs or "")}: {escape(action.instead)}</span>' if action.instead else "") + "</li>"
                    for action in card.critical_actions)
    sources = "; ".join(f"{source.body}: {source.title} ({source.year})" for source in card.sources)
    more = "".join(f"<h2>{title}</h2>{_list(items)}" for title, items in (("It gets worse when", card.escalate_when), ("Find out", card.uncertainties)) if items)
    notes = f'<p class="small"><b>Where guidance differs.</b> {escape(" ".join(card.regional_notes))}</p>' if card.regional_notes else ""
    return f"""<section id="{card.id}">
<h1>{escape(card.name)}</h1>
<p><b>Signs.</b> {escape("; ".join(card.signs))}.</p>
<p><b>Danger.</b> {escape(" ".join(card.dangers))}</p>
<h2>Do this, in order</h2><ol class="steps">{steps}</ol>
<h2>Never</h2>{_list((rule.text for rule in card.never), "never")}
{more}
{notes}
<p class="small"><b>Sources.</b> {escape(sources)}. Not a doctor; not reviewed by a clinician.</p>
</section>"""


def _list(items: Iterable[str], kind: str = "") -> str:
    return f'<ul{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>'


def _country(country: Country) -> str:
    return f"<li><b>{escape(country.name)}</b> {escape(country.number('any'))}</li>"
