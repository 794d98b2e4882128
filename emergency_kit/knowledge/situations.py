"""Situations: what people report, written by hand; each belongs to one split, so no telling of it crosses.

In: `situations/<category>.yaml`: under each hazard (or `first+second` for two at once) the wrong advice that
people give there, and situations. Out: frozen `Situation`s in file order, every problem a `DataError`.
The dataset is built from all of them; retrieval learns from those of the training split.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Mapping

import yaml

from emergency_kit.errors import DataError

SITUATION_FOLDER = Path(__file__).parent / "situations"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Situation:
    """One reported situation.

    hazards: cards that apply, the one to act on first in front. tellings: `(role, text)` that report the
    same facts. settled: numbers, from 1, of the first card's open questions that the tellings answer.
    lacks: resources that the tellings say are missing. misleading: wrong advice that fits the hazard.
    """

    hazards: tuple[str, ...]
    number: int
    split: str
    setting: str
    facts: tuple[str, ...]
    unknown: tuple[str, ...]
    tellings: tuple[tuple[str, str], ...]
    settled: tuple[int, ...] = ()
    lacks: tuple[str, ...] = ()
    wrong_advice: str = ""
    analysis: tuple[str, ...] = ()
    misleading: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`stroke/3`."""
        return f"{'+'.join(self.hazards)}/{self.number}"


@lru_cache(maxsize=4)
def load_situations(folder: Path = SITUATION_FOLDER) -> tuple[Situation, ...]:
    """All situations, in file and position order; raises DataError naming file, hazard and number."""
    situations = []
    for path in sorted(folder.glob("*.yaml")):
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"{path.name}: not valid YAML ({error})") from None
        for hazard, entry in content.items():
            if not isinstance(entry, dict) or set(entry) != {"misleading", "situations"}:
                raise DataError(f"{path.name}: {hazard}: expected exactly two keys, misleading and situations")
            for number, item in enumerate(entry["situations"], 1):
                situations.append(_read(f"{path.name}: {hazard} {number}", hazard, number, item, tuple(entry["misleading"])))
    return tuple(situations)


def _read(place: str, hazard: str, number: int, item: Mapping[str, Any], misleading: tuple[str, ...]) -> Situation:
    try:
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in item.items()}
        values["tellings"] = tuple((telling["role"], telling["text"]) for telling in item["tellings"])
        situation = Situation(hazards=tuple(hazard.split("+")), number=number, misleading=misleading, **values)
    except (KeyError, TypeError) as error:
        raise DataError(f"{place}: {error}; expected split, setting, facts, unknown, tellings with role and text, and known keys") from None
    if situation.split not in SPLITS:
        raise DataError(f"{place}: split is {situation.split!r}; expected one of {', '.join(SPLITS)}")
    return situation
