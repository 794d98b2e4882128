"""Builder of the embedded dataset: knowledge cards and hand-written situations become records.

In: `knowledge/cards/*.yaml` (what is true), `knowledge/situations/*.yaml` (what people report). Out: three JSONL
files, a dataset card (README.md) and a manifest. The answer to copy from is in the prompt, but where only a
wrong card is; the builder adds the hard cases in stated shares. Same seed and size, same bytes, on any machine.
Run: `emergency-kit data build --seed 7 --size 3600`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Iterator, Mapping, Sequence

from emergency_kit.artifacts import hash_json, load_manifest, save_manifest
from emergency_kit.config import Resolved
from emergency_kit.data.answers import Telling, build_answer, check_record
from emergency_kit.data.format import Record, render_answer
from emergency_kit.data.variation import hurry, join, load_additions, shingles, shout
from emergency_kit.errors import DataError, UsageError
from emergency_kit.files import staged_folder
from emergency_kit.knowledge.cards import SAFE_MINIMUM, Card, card_digest, load_cards
from emergency_kit.knowledge.emergency_numbers import find_country, load_numbers
from emergency_kit.knowledge.situations import SPLITS, Situation, load_situations

BUILDER_VERSION = 3
# Shares of the training records of one hazard that show a changed set of cards; the rest shows the right card alone.
SHARES = {"extra card": 0.40, "wrong card only": 0.04, "no card": 0.04}
# Share of the records with an extra card in which the right card stands second, as when retrieval errs.
SECOND_PLACE = 0.10
# Share of the cards that do not fit which come from the right card's own category, as retrieval's mistakes do.
SAME_CATEGORY = 0.6
# Share of the records whose cards show a country's emergency number instead of "your local emergency number".
COUNTRY = 0.30
# Shares of the varied records (all beyond the hand-written tellings) that get each kind of variation.
WRONG_ADVICE, ADDITION, OPENING, HURRIED, SHOUTED = 0.10, 0.85, 0.25, 0.25, 0.02
# Word triples that a varied telling may share with any other of its situation, of all that either has.
MOST_ALIKE = 0.65
TRIES, ROUNDS = 12, 20


def dataset_digest(seed: int, size: int) -> str:
    """sha256 of everything that shapes the embedded dataset."""
    situations = [vars(situation) for situation in load_situations()]
    additions = {use: [vars(item) for item in items] for use, items in load_additions().items()}
    shares = [SHARES, SECOND_PLACE, SAME_CATEGORY, COUNTRY, WRONG_ADVICE, ADDITION, OPENING, HURRIED, SHOUTED]
    countries = {code: country.model_dump() for code, country in load_numbers().items()}
    return hash_json([BUILDER_VERSION, seed, size, shares, card_digest(load_cards()), countries, situations, additions])


def build_records(seed: int, size: int, top_k: int = 2) -> dict[str, list[Record]]:
    """Records of the three splits, `size` in all. Test records name no cards: they get what retrieval finds when they are loaded, as in use.

    Raises DataError where a situation names no card, or the material cannot give `size` distinct records.
    """
    cards = load_cards()
    chance = random.Random(seed)
    situations = load_situations()
    unknown = sorted({hazard for situation in situations for hazard in situation.hazards if hazard not in cards})
    if unknown:
        raise DataError(f"scenarios: hazard {unknown[0]!r} has no knowledge card")
    countries = sorted(load_numbers())
    records: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for situation, telling, letter in _tellings(situations, size, chance):
        country = chance.choice(countries) if chance.random() < COUNTRY else ""
        shown, fits = (None, 1) if situation.split == "test" else _shown_cards(situation, cards, chance, top_k)
        records[situation.split].append(_record(situation, telling, f"{situation.name}{letter}", shown, fits, country, cards))
    for split in SPLITS:
        chance.shuffle(records[split])
    return records


def _tellings(situations: Sequence[Situation], size: int, chance: random.Random) -> Iterator[tuple[Situation, Telling, str]]:
    """`size` tellings: the hand-written ones (the hazards in turn where there are too many), then varied ones."""
    written = [(situation, Telling(role, text, (), situation.lacks, situation.wrong_advice), letter)
               for situation in situations for letter, (role, text) in zip("abcdefgh", situation.tellings)]
    if size <= len(written):
        yield from _balanced(written, size, chance)
        return
    yield from written
    seen: dict[str, list[frozenset[str]]] = defaultdict(list)
    for situation, telling, _ in written:
        seen[situation.name].append(shingles(telling.text))
    made = len(written)
    # Every telling once more, then again, so that no situation is told much more often than another.
    for round_ in range(1, ROUNDS + 1):
        for situation, telling, letter in chance.sample(written, len(written)):
            if made >= size:
                return
            for _ in range(TRIES):
                varied = _vary(situation, telling, chance)
                words = shingles(varied.text)
                if all(len(words & other) < MOST_ALIKE * len(words | other) for other in seen[situation.name]):
                    seen[situation.name].append(words)
                    made += 1
                    yield situation, varied, f"{letter}{round_}"
                    break
    raise DataError(f"data build: the material gives no {size} distinct records; ask for fewer with --size")


def _balanced(written: list[tuple[Situation, Telling, str]], size: int, chance: random.Random) -> list[tuple[Situation, Telling, str]]:
    turns: dict[tuple[str, ...], list[tuple[Situation, Telling, str]]] = defaultdict(list)
    for item in chance.sample(written, len(written)):
        turns[(item[0].split, *item[0].hazards)].append(item)
    order = [(turn, items[turn]) for items in turns.values() for turn in range(len(items))]
    return [item for _, item in sorted(order, key=lambda pair: pair[0])[:size]]


def _vary(situation: Situation, telling: Telling, chance: random.Random) -> Telling:
    """Another telling of the same situation: sentences added, advice passed on, or typed in a hurry."""
    sentences = {use: [item for item in items if item.split == situation.split] for use, items in load_additions().items()}
    text, facts, lacks, advice = telling.text, [], list(telling.lacks), telling.wrong_advice
    misleading = _own_share(situation)
    if not advice and misleading and chance.random() < WRONG_ADVICE:
        advice = chance.choice(misleading)
        speaker = chance.choice(sentences["speakers"])
        text = join(text, speaker.text.replace("{advice}", advice))
        facts.append(speaker.fact.replace("{advice}", advice))
    if chance.random() < ADDITION or text == telling.text:
        fitting = [item for item in sentences["additions"] if situation.setting in item.settings and item.lacks not in (lacks or (None,))]
        for addition in chance.sample(fitting, min(len(fitting), chance.choice((1, 1, 2)))):
            text = join(addition.text, text) if chance.random() < 0.35 else join(text, addition.text)
            # What does not bear on the emergency stays out of the answer's FACTS: leaving it aside is taught too.
            if addition.lacks:
                facts.append(addition.fact)
                lacks.append(addition.lacks)
    if chance.random() < OPENING:
        text = join(chance.choice(sentences["openings"]).text, text)
    draw = chance.random()
    text = hurry(text, chance) if draw < HURRIED else shout(text) if draw < HURRIED + SHOUTED else text
    return replace(telling, text=text, facts=tuple(facts), lacks=tuple(dict.fromkeys(lacks)), wrong_advice=advice)


def _own_share(situation: Situation) -> tuple[str, ...]:
    """The wrong advice of a hazard that a split may use: train the first ones, the others the last one."""
    return situation.misleading[:-1] if situation.split == "train" else situation.misleading[-1:]


def _shown_cards(situation: Situation, cards: Mapping[str, Card], chance: random.Random, top_k: int) -> tuple[list[str], int]:
    """`(cards shown, how many of them fit)`, by the stated shares; a card that does not fit is mostly of the same category."""
    right = list(situation.hazards)
    others = [card.id for card in cards.values() if card.id not in (*right, SAFE_MINIMUM)]
    near = [card_id for card_id in others if cards[card_id].category == cards[right[0]].category]
    others = chance.sample(near if len(near) > 1 and chance.random() < SAME_CATEGORY else others, 2)
    draw = chance.random()
    if right == [SAFE_MINIMUM]:
        return (others[:1], 1) if draw < 0.3 else ([], 0)
    if len(right) > 1:
        return right[:top_k], len(right[:top_k])
    if draw < SHARES["wrong card only"]:
        return others[:1], 1
    if draw < SHARES["wrong card only"] + SHARES["no card"]:
        return [], 0
    if draw < sum(SHARES.values()) and top_k > 1:
        shown = others[:1 if top_k == 2 or chance.random() < 0.7 else 2]
        shown.insert(0 if chance.random() > SECOND_PLACE else 1, right[0])
        return shown, 1
    return right, 1


def _record(situation: Situation, telling: Telling, name: str, shown: Sequence[str] | None, fits: int, country: str, cards: Mapping[str, Card]) -> Record:
    # A training answer can only be held to what its prompt shows; a test answer to what is right.
    followed = list(situation.hazards) if shown is None else [hazard for hazard in situation.hazards if hazard in shown] or [SAFE_MINIMUM]
    answer = build_answer(situation, telling, [cards[card_id] for card_id in followed], find_country(country))
    record = Record(
        id=name, category=cards[situation.hazards[0]].category, role=telling.role, input=telling.text, output=render_answer(answer),
        hazards=tuple(followed), cards=None if shown is None else tuple(shown), fits=fits, lacks=telling.lacks, country=country,
        sources=tuple(dict.fromkeys(f"{source.body}, {source.title}, {source.year}" for card_id in followed for source in cards[card_id].sources)))
    problems = check_record(record, cards, followed)
    if problems:
        raise DataError(f"record {name}: its answer fails its own card: {problems[0]}; mend the card's phrases or the situation")
    return record


def build(resolved: Resolved, out: Path, overwrite: bool = False) -> Path:
    """Write `train.jsonl`, `validation.jsonl`, `test.jsonl`, the dataset card `README.md` and `manifest.json` into `out`."""
    from emergency_kit.data.describe import describe

    if out.exists() and any(out.iterdir()) and not overwrite and load_manifest(out) is None:
        raise UsageError(f"{out}: already there and not a built dataset; name another folder with --output, or pass --overwrite")
    dataset = resolved.config.dataset
    records = build_records(dataset.build_seed, dataset.build_size, dataset.top_k)
    with staged_folder(out) as folder:
        for split in SPLITS:
            (folder / f"{split}.jsonl").write_text("".join(f"{record.to_json()}\n" for record in records[split]), encoding="utf-8")
        (folder / "README.md").write_text(describe(records, dataset.build_seed), encoding="utf-8")
        save_manifest(folder, "data", resolved, dataset_hash=dataset_digest(dataset.build_seed, dataset.build_size),
                      extra={"records": {split: len(records[split]) for split in SPLITS}, "top_k": dataset.top_k})
    print(f"Dataset built in {out}: " + ", ".join(f"{len(records[split])} {split}" for split in SPLITS) + f"; its card is {out / 'README.md'}")
    return out


def ensure_built(resolved: Resolved) -> Path:
    """Folder of the embedded dataset under the output folder, built anew where it is missing or stale."""
    out = Path(resolved.config.training.output_dir) / "data" / "embedded"
    manifest, dataset = load_manifest(out), resolved.config.dataset
    fresh = manifest is not None and manifest.get("top_k") == dataset.top_k \
        and manifest["dataset_hash"] == dataset_digest(dataset.build_seed, dataset.build_size)
    return out if fresh else build(resolved, out, overwrite=True)
