"""Odd surroundings: clocks that jump, other time zones and locales, strange paths, no home, no network, secrets in the environment."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from emergency_kit.artifacts import redact
from tests.storm.storm import FULL, Nursery, assert_same, result, settings, share_data

SECRETS = {"HF_TOKEN": "hf_plantedtokenplantedtoken", "WANDB_API_KEY": "0123plantedkey4567plantedkey89", "OPENAI_API_KEY": "sk-planted-in-the-environment"}


@pytest.mark.parametrize("case, env", [
    ("zone", {"TZ": "Pacific/Kiritimati"}), ("turkish", {"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8"}),
    ("japanese", {"LC_ALL": "ja_JP.eucJP", "LANG": "ja_JP.eucJP", "PYTHONIOENCODING": "euc_jp"}), ("plain-c", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"})])
def test_other_zones_and_locales(nursery: Nursery, tiny: Path, undisturbed: Path, before: Path, place: Path, case: str, env: dict[str, str]) -> None:
    if case in ("zone", "turkish") and not FULL:
        pytest.skip("in make storm")
    out = place / case
    shutil.copytree(before, out)
    life = nursery.live("train", *settings(tiny, out), env=env)
    assert life.status == 0, life.text
    assert_same(result(undisturbed), result(out))


def test_a_clock_that_jumps(faulty: Nursery, tiny: Path, undisturbed: Path, before: Path, place: Path) -> None:
    """Every reading of the wall clock is a day off, back and forth: order, pruning and losses do not depend on it."""
    out = place / "clock"
    shutil.copytree(before, out)
    life = faulty.live("train", *settings(tiny, out), env={"FAULT_CLOCK": "86400"})
    assert life.status == 0, life.text
    assert_same(result(undisturbed), result(out))


@pytest.mark.parametrize("name", ["with spaces  and 'quotes'", "日本語 ünïcödé 🚑", "n" * 255, "-dash", "[x]*?"], ids=["spaces", "unicode", "long", "dash", "glob"])
def test_strange_folder_names(nursery: Nursery, tiny: Path, undisturbed: Path, before: Path, place: Path, name: str) -> None:
    if name[0] in "-[日" and not FULL:
        pytest.skip("in make storm")
    (place / "names").mkdir(exist_ok=True)
    out = place / "names" / name
    shutil.copytree(before, out)
    life = nursery.live("train", *settings(tiny, out))
    assert life.status == 0, life.text
    assert_same(result(undisturbed), result(out))
    shutil.rmtree(out)


def test_a_folder_that_is_a_link(nursery: Nursery, tiny: Path, undisturbed: Path, before: Path, place: Path) -> None:
    if not FULL:
        pytest.skip("in make storm")
    shutil.copytree(before, place / "real-folder")
    (place / "link").symlink_to(place / "real-folder")
    assert nursery.live("train", *settings(tiny, place / "link")).status == 0
    assert_same(result(undisturbed), result(place / "real-folder"))


def test_a_home_that_cannot_be_written(nursery: Nursery, tiny: Path, undisturbed: Path, before: Path, place: Path) -> None:
    out = place / "homeless"
    shutil.copytree(before, out)
    life = nursery.live("train", *settings(tiny, out), env={"HOME": "/proc/nobody", "XDG_CACHE_HOME": "/proc/nobody", "HF_HOME": "/proc/nobody", "TMPDIR": "/proc/nobody"})
    assert life.status == 0, life.text
    assert_same(result(undisturbed), result(out))


def test_no_socket_is_opened(nursery: Nursery, tiny: Path, undisturbed: Path, place: Path) -> None:
    """Training, and merging with its proof, with every socket an error. (llama.cpp, which evaluation asks, listens on a loopback port.)"""
    out = place / "no-sockets"
    flags = settings(tiny, out)
    for argv in (["train", *flags], ["merge", *flags]):
        life = nursery.live(*argv, no_sockets=True)
        assert life.status == 0, life.text
    assert_same(result(undisturbed), result(out))


def test_secrets_reach_nothing(nursery: Nursery, tiny: Path, undisturbed: Path, place: Path) -> None:
    """Planted keys are in no file and no line: of a whole run, of a refusal, of a traceback."""
    out = share_data(undisturbed, place / "secrets")
    addresses = ["https://someone:hunter2secret@example.invalid/data.jsonl", f"missing/{SECRETS['HF_TOKEN']}.jsonl"]
    lives = [nursery.live("train", *settings(tiny, out), env=SECRETS)]
    assert lives[0].status == 0
    for address in addresses:
        for debug in ([], ["--debug"]):
            lives.append(nursery.live("train", *settings(tiny, out, f"dataset.name={address}"), "--overwrite", *debug, env=SECRETS, may_show_traceback=bool(debug)))
            assert lives[-1].status != 0 and ("Traceback" in lives[-1].text) == bool(debug), lives[-1].text
    told = "".join(life.text for life in lives)
    for secret in (*SECRETS.values(), "hunter2secret"):
        assert secret not in told, told
        for path in out.rglob("*"):
            if path.is_file():
                assert secret.encode() not in path.read_bytes(), path


def test_an_env_file_is_read_and_left_alone(nursery: Nursery, tiny: Path, undisturbed: Path, place: Path) -> None:
    here = Path(".env")
    if here.exists():
        pytest.skip("a .env of the developer's stands here")
    out = share_data(undisturbed, place / "env-file")
    here.write_text("HF_TOKEN=hf_frozenintheenvfile12345\n")
    try:
        life = nursery.live("train", *settings(tiny, out, "training.max_steps=2", "dataset.name=https://a:hf_frozenintheenvfile12345@example.invalid/x.jsonl"))
        assert life.status != 0 and "hf_frozen" not in life.text
        assert here.read_text() == "HF_TOKEN=hf_frozenintheenvfile12345\n"
    finally:
        here.unlink()


def test_redaction() -> None:
    os.environ["PLANTED_TOKEN"] = "abcdefgh12345678"
    try:
        assert redact({"a": ["x abcdefgh12345678 y", 3], "b": "http://me:pass@host/p"}) == {"a": ["x *** y", 3], "b": "http://***@host/p"}
    finally:
        del os.environ["PLANTED_TOKEN"]


def test_a_tracker_that_fails_does_not_stop_training(tmp_path: Path) -> None:
    """A third party's callback that raises in every event it hears."""
    import logging

    from transformers import TrainerCallback

    from emergency_kit.training.callbacks import EVENTS, LOG, TrackerGuard

    class Broken(TrainerCallback):
        calls = 0

        def on_train_begin(self, *_: object, **__: object) -> None:
            Broken.calls += 1
            raise ConnectionError("no network for wandb.example")

        on_log = on_train_end = on_train_begin

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    LOG.addHandler(handler)
    try:
        guard = TrackerGuard(Broken())
        for event in EVENTS:
            getattr(guard, event)(None, None, None)
    finally:
        LOG.removeHandler(handler)
    assert Broken.calls == 1 and lines == ["Tracker Broken failed (ConnectionError: no network for wandb.example); training goes on without it"]


@pytest.mark.skipif(not FULL, reason="needs the trackers of .[track]; in make storm")
def test_a_real_tracker_with_a_bad_key(nursery: Nursery, tiny: Path, undisturbed: Path, before: Path, place: Path) -> None:
    """Weights & Biases without network and with a key that is none; then offline, whose files hold no planted secret."""
    pytest.importorskip("wandb")
    out = place / "wandb"
    shutil.copytree(before, out)
    env = {"WANDB_API_KEY": "0" * 39 + "f", "WANDB_MODE": "online", "WANDB_INIT_TIMEOUT": "10", "WANDB_HTTP_TIMEOUT": "5", "WANDB_DIR": str(place), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    life = nursery.live("train", *settings(tiny, out, 'training.report_to=["wandb"]'), env=env)
    assert life.status == 0 and "training goes on without it" in life.text, life.text
    assert_same(result(undisturbed), result(out))
    shutil.rmtree(out / "checkpoints" / "final")
    life = nursery.live("train", *settings(tiny, out, 'training.report_to=["wandb"]'), env={**SECRETS, "WANDB_MODE": "offline", "WANDB_DIR": str(place)})
    assert life.status == 0, life.text
    written = [path for path in (place / "wandb").rglob("*") if path.is_file()] + [path for path in place.glob("wandb/**/*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    assert all(secret.encode() not in path.read_bytes() for path in written for secret in SECRETS.values() if path.exists())
