"""One nursery, one library of faults, one undisturbed run, for all tests of the storm."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Iterator

import pytest

from tests.storm.storm import BRIEF, Nursery, build_faults, settings, share_data
from tests.tiny import save_tiny_model


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storm")


@pytest.fixture(scope="session")
def tiny(place: Path) -> Path:
    return save_tiny_model(place / "tiny")


@pytest.fixture(scope="session")
def faults(place: Path) -> Path:
    library = build_faults(place)
    if library is None:
        pytest.skip("no C compiler here: faults of the file layer are not planted")
    return library


@pytest.fixture(scope="session")
def nursery(place: Path) -> Iterator[Nursery]:
    nursery = Nursery(place)
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def faulty(place: Path, faults: Path) -> Iterator[Nursery]:
    folder = place / "faulty"
    folder.mkdir()
    nursery = Nursery(folder, faults)
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def undisturbed(nursery: Nursery, tiny: Path, place: Path) -> Path:
    """Output folder of the run that nobody disturbs: 10 steps over two epochs."""
    out = place / "undisturbed"
    life = nursery.live("train", *settings(tiny, out, "training.save_total_limit=9"))
    assert life.status == 0, life.text
    return out


@pytest.fixture(scope="session")
def before(undisturbed: Path, place: Path) -> Path:
    """The same run at step 6 of 10."""
    return _up_to(undisturbed, "checkpoint-6", place / "before")


@pytest.fixture(scope="session")
def brief(nursery: Nursery, tiny: Path, place: Path) -> Path:
    """Output folder of an undisturbed run of two steps: it saves as a longer one does, with little arithmetic between."""
    out = place / "brief"
    life = nursery.live("train", *settings(tiny, out, *BRIEF, "training.save_total_limit=9"))
    assert life.status == 0, life.text
    return out


@pytest.fixture(scope="session")
def brief_before(brief: Path, place: Path) -> Path:
    """The same run at step 1 of 2."""
    return _up_to(brief, "checkpoint-1", place / "brief-before")


def _up_to(finished: Path, checkpoint: str, out: Path) -> Path:
    """A run's folder as it was when that checkpoint was its last."""
    share_data(finished, out)
    shutil.copytree(finished / "checkpoints" / checkpoint, out / "checkpoints" / checkpoint)
    shutil.copy(finished / ".training.json", out)
    return out
