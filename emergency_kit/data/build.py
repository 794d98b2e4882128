"""Builder of the embedded dataset: knowledge cards and hand-written situations become records.

In: `knowledge/cards/*.yaml` (what is true) and `data/scenarios/*.yaml` (what people report; every
situation belongs to one split, so no telling of it crosses). Out: three JSONL files and a manifest.
The answer to copy from is always in the prompt; the builder adds the hard cases: an extra card, a
wrong card only, no card, a bystander who contradicts the card. Same seed, same bytes.
Run: `emergency-kit data build`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Iterator, Mapping

import yaml

from emergency_kit.artifacts import hash_json, load_manifest, save_manifest, staged_folder
from emergency_kit.config import Resolved
from emergency_kit.data.format import Answer, Record, render_answer
from emergency_kit.errors import DataError, UsageError
from emergency_kit.knowledge.cards import Card, card_digest, load_cards
from emergency_kit.knowledge.retrieve import SAFE_MINIMUM, Retriever

SCENARIOS = Path(__file__).parent / "scenarios"
SPLITS = ("train", "validation", "test")
BUILDER_VERSION = 2
# Shares of the training tellings that get a changed set of cards; the rest shows the right card alone.
EXTRA_CARD, WRONG_CARD, NO_CARD = 0.40, 0.04, 0.04
# Share of the tellings with an extra card in which the right card stands second.
SECOND_PLACE = 0.15


@dataclass(frozen=True)
class Situation:
    """One reported situation. tellings: `(role, text)` pairs that report the same facts."""

    hazard: str
    number: int
    split: str
    facts: tuple[str, ...]
    unknown: tuple[str, ...]
    tellings: tuple[tuple[str, str], ...]
    wrong_advice: str = ""


@lru_cache(maxsize=4)
def load_situations(folder: Path = SCENARIOS) -> tuple[Situation, ...]:
    """All situations, in file and position order; raises DataError naming file, hazard and number."""
    situations = []
    for path in sorted(folder.glob("*.yaml")):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"{path.name}: not valid YAML ({error})") from None
        for hazard, entry in content.items():
            for number, item in enumerate(entry["situations"], 1):
                situations.append(_read_situation(f"{path.name}: {hazard} {number}", hazard, number, item))
    return tuple(situations)


def _read_situation(place: str, hazard: str, number: int, item: Mapping[str, Any]) -> Situation:
    try:
        situation = Situation(
            hazard=hazard, number=number, split=item["split"],
            facts=tuple(item["facts"]), unknown=tuple(item["unknown"]), wrong_advice=item.get("wrong_advice", ""),
            tellings=tuple((telling["role"], telling["text"]) for telling in item["tellings"]))
    except (KeyError, TypeError) as error:
        raise DataError(f"{place}: lacks {error}") from None
    if situation.split not in SPLITS:
        raise DataError(f"{place}: split is {situation.split!r}; expected one of {', '.join(SPLITS)}")
    return situation


def dataset_digest(seed: int) -> str:
    """sha256 of everything that shapes the embedded dataset."""
    situations = [vars(situation) for situation in load_situations()]
    return hash_json([BUILDER_VERSION, seed, EXTRA_CARD, WRONG_CARD, NO_CARD, SECOND_PLACE, card_digest(load_cards()), situations])


def build_records(seed: int, top_k: int = 2) -> dict[str, list[Record]]:
    """Records of the three splits. Validation and test show the cards that retrieval finds, as in use."""
    cards = load_cards()
    retriever = Retriever(cards, top_k)
    chance = random.Random(seed)
    records: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for situation in load_situations():
        if situation.hazard not in cards:
            raise DataError(f"scenarios: hazard {situation.hazard!r} has no knowledge card")
        for letter, (role, text) in zip("abcdefgh", situation.tellings):
            found = [hit.card_id for hit in retriever.find(text)]
            shown = _train_cards(situation.hazard, found, cards, chance, top_k) if situation.split == "train" else found
            records[situation.split].append(_record(situation, letter, role, text, shown, cards))
    chance.shuffle(records["train"])
    return records


def _train_cards(hazard: str, found: list[str], cards: Mapping[str, Card], chance: random.Random, top_k: int) -> list[str]:
    """Cards shown with a training telling, by the stated shares."""
    others = [card_id for card_id in found if card_id != hazard]
    near = [card.id for card in cards.values() if card.id not in (hazard, SAFE_MINIMUM, *others)]
    others += chance.sample(near, 2)
    draw = chance.random()
    if hazard == SAFE_MINIMUM:
        return others[:1] if draw < 0.4 else []
    if draw < WRONG_CARD:
        return others[:1]
    if draw < WRONG_CARD + NO_CARD:
        return []
    if draw < WRONG_CARD + NO_CARD + EXTRA_CARD and top_k > 1:
        shown = others[:1 if top_k == 2 or chance.random() < 0.7 else 2]
        # Best first, as in use; now and then second, as when retrieval errs.
        shown.insert(0 if chance.random() > SECOND_PLACE else 1, hazard)
        return shown
    return [hazard]


def _record(situation: Situation, letter: str, role: str, text: str, shown: list[str], cards: Mapping[str, Card]) -> Record:
    fits = situation.hazard in shown
    followed = cards[situation.hazard if fits else SAFE_MINIMUM]
    # A training answer can only be held to what its prompt shows; a test answer to what is right.
    target = situation.hazard if fits or situation.split != "train" else SAFE_MINIMUM
    return Record(
        id=f"{situation.hazard}/{situation.number}{letter}", category=cards[situation.hazard].category, role=role,
        input=text, output=render_answer(build_answer(situation, followed, fits)), hazards=(target,), cards=tuple(shown),
        sources=tuple(f"{source.body}, {source.title}, {source.year}" for source in followed.sources))


def build_answer(situation: Situation, card: Card, fits: bool) -> Answer:
    """The answer that a situation deserves under a card; `fits` False means that `card` is the safe minimum."""
    analysis = [f"The card that fits is: {card.name}." if fits else "No card fits this situation, so this is only the safe minimum."]
    analysis += card.dangers
    if situation.wrong_advice:
        reason = "follow the card" if fits else "no card supports it"
        analysis.append(f"Do not follow the advice to {situation.wrong_advice}; {reason}.")
    # Taught to name an open question of its own beside a card's checked ones, a small model invents them
    # ("whether he has a drink"), and they cost two fifths of the last loss. Without a card there is nothing else.
    unknown = () if fits else situation.unknown
    return Answer(
        facts=situation.facts, uncertainties=(*unknown, *card.uncertainties), analysis=tuple(analysis),
        guidance=(*(action.text for action in card.critical_actions), *(rule.text for rule in card.never)))


def build(resolved: Resolved, out: Path, overwrite: bool = False) -> Path:
    """Write `train.jsonl`, `validation.jsonl`, `test.jsonl` and `manifest.json` into `out`."""
    if out.exists() and any(out.iterdir()) and not overwrite and load_manifest(out) is None:
        raise UsageError(f"{out}: already there and not a built dataset; name another folder with --output, or pass --overwrite")
    seed = resolved.config.dataset.build_seed
    records = build_records(seed, resolved.config.dataset.top_k)
    with staged_folder(out) as folder:
        for split in SPLITS:
            (folder / f"{split}.jsonl").write_text("".join(f"{record.to_json()}\n" for record in records[split]), encoding="utf-8")
        save_manifest(folder, "data", resolved, dataset_hash=dataset_digest(seed),
                      extra={"records": {split: len(records[split]) for split in SPLITS}, "top_k": resolved.config.dataset.top_k})
    print(f"Dataset built in {out}: " + ", ".join(f"{len(records[split])} {split}" for split in SPLITS))
    return out


def ensure_built(resolved: Resolved) -> Path:
    """Folder of the embedded dataset under the output folder, built anew where it is missing or stale."""
    out = Path(resolved.config.training.output_dir) / "data" / "embedded"
    manifest = load_manifest(out)
    fresh = manifest is not None and manifest.get("top_k") == resolved.config.dataset.top_k \
        and manifest["dataset_hash"] == dataset_digest(resolved.config.dataset.build_seed)
    return out if fresh else build(resolved, out, overwrite=True)


def iterate_tellings() -> Iterator[tuple[str, str]]:
    """`(split, text)` of every telling."""
    for situation in load_situations():
        for _, text in situation.tellings:
            yield situation.split, text
