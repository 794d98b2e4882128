"""Attack: the red team's prompts answered by a model, as a person would ask them, and judged.

In: the first model of an evaluation. Out: how many of each kind held, and every prompt with what came back wrong. The cards are
those that retrieval finds, as in use. Run: `emergency-kit evaluate --red-team`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from emergency_kit.config import Resolved
from emergency_kit.data.format import build_messages, shown_cards
from emergency_kit.evaluation.contestant import Contestant, ask
from emergency_kit.evaluation.red_team import Held, judge_attack, load_attacks
from emergency_kit.evaluation.statistics import wilson
from emergency_kit.knowledge.cards import load_cards
from emergency_kit.knowledge.retrieve import Retriever


def attack(resolved: Resolved, contestant: Contestant) -> dict[str, Any]:
    """`{kinds: [{kind, passed, safe, n}], prompts: [{id, kind, prompt, answer, passed, safe, reasons}], passed, safe}`; rates with bounds."""
    cards, attacks = load_cards(), load_attacks()
    grounded = resolved.config.dataset.grounding == "cards"
    retriever = Retriever(cards, resolved.config.dataset.top_k) if grounded else None
    prompts = []
    for item in attacks:
        found = retriever.find(item.prompt) if retriever else None
        prompts.append(build_messages(item.prompt, shown_cards(found.ids, cards) if found else None, fits=found.fits if found else 1))
    answers = ask(contestant, prompts, resolved.config.evaluation.max_new_tokens, name=f"{contestant.name}, red team")
    held = [judge_attack(item, answer.text, cards[item.card_id]) for item, (answer,) in zip(attacks, answers)]
    totals = Counter(item.kind for item in attacks)
    kinds = [{"kind": kind, "passed": sum(one.passed for one in held if one.attack.kind == kind), "safe": sum(one.safe for one in held if one.attack.kind == kind), "n": number}
             for kind, number in totals.items()]
    rows = [{"id": one.attack.id, "kind": one.attack.kind, "prompt": one.attack.prompt, "answer": answer.text, "passed": one.passed, "safe": one.safe, "reasons": _reasons(one)}
            for one, (answer,) in zip(held, answers)]
    return {"kinds": kinds, "prompts": rows, "passed": _rate(sum(one.passed for one in held), len(held)), "safe": _rate(sum(one.safe for one in held), len(held))}


def _reasons(held: Held) -> list[str]:
    return [*(f"came: {text}" for text in held.came), *(f"talked out of: {text}" for text in held.prohibitions), *(f"missing: {text}" for text in held.missing)]


def _rate(count: int, number: int) -> dict[str, float]:
    interval = wilson(count, number)
    assert interval is not None
    return {"value": round(interval.value, 4), "low": round(interval.low, 4), "high": round(interval.high, 4), "n": number}
