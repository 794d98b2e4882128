"""find_verdict: whose verdict counts, and what stands in the way of packing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emergency_kit.artifacts import hash_file, hash_parent, save_manifest
from emergency_kit.errors import VerdictError
from emergency_kit.export.verdict import describe_verdict, find_verdict
from tests.export import tiny


@pytest.fixture
def made(tmp_path: Path) -> tuple:
    """An adapter, a model merged from it, another model, and the config."""
    resolved = tiny.resolve(tmp_path, tmp_path / "outputs")
    for name in ("adapter", "merged", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    save_manifest(tmp_path / "adapter", "train", resolved)
    save_manifest(tmp_path / "merged", "merge", resolved, parents=[tmp_path / "adapter"])
    save_manifest(tmp_path / "other", "train", resolved)
    return resolved, tmp_path


def save(folder: Path, judged: Path, digest: str | None, ship: bool) -> None:
    (folder / "outputs").mkdir(exist_ok=True)
    (folder / "outputs" / "verdict.json").write_text(json.dumps(
        {"ship": ship, "reasons": [] if ship else ["breaks a never-rule"], "judged": {"path": str(judged), "sha256": digest}, "override": None}))


def test_without_a_verdict_or_with_one_of_another_model_there_is_none(made: tuple) -> None:
    resolved, folder = made
    assert find_verdict(resolved, folder / "merged") == {"verdict": "none", "file": None, "reasons": [], "override": None}
    save(folder, folder / "other", hash_parent(folder / "other"), ship=False)
    assert find_verdict(resolved, folder / "merged")["verdict"] == "none"


@pytest.mark.parametrize("judged", ["adapter", "merged"])
@pytest.mark.parametrize("digest", [hash_parent, lambda folder: hash_file(folder / "manifest.json")], ids=["files", "manifest"])
def test_a_verdict_counts_for_the_folder_and_for_what_was_merged_from_it(made: tuple, judged: str, digest) -> None:
    resolved, folder = made
    save(folder, folder / judged, digest(folder / judged), ship=True)
    assert find_verdict(resolved, folder / "merged")["verdict"] == "ship"
    save(folder, folder / judged, digest(folder / judged), ship=False)
    with pytest.raises(VerdictError, match=r"do not ship .*breaks a never-rule.*--override-verdict") as error:
        find_verdict(resolved, folder / "merged")
    assert error.value.exit_code == 7
    with pytest.raises(VerdictError):
        find_verdict(resolved, folder / "merged", "  ")
    entry = find_verdict(resolved, folder / "merged", " a drill ")
    assert describe_verdict(entry) == "do not ship (overridden: a drill)" and entry["reasons"] == ["breaks a never-rule"]


def test_a_model_that_changed_after_it_was_judged_needs_a_reason(made: tuple) -> None:
    resolved, folder = made
    save(folder, folder / "merged", hash_parent(folder / "merged"), ship=True)
    (folder / "merged" / "weights").write_text("changed")
    save_manifest(folder / "merged", "merge", resolved, parents=[folder / "adapter"])
    with pytest.raises(VerdictError, match="changed after it was judged"):
        find_verdict(resolved, folder / "merged")
    assert find_verdict(resolved, folder / "merged", "typo in the card")["override"] == "typo in the card"


def test_a_broken_verdict_is_named(made: tuple) -> None:
    resolved, folder = made
    (folder / "outputs").mkdir()
    for text in ("{", "[]", '{"ship": true}', '{"ship": true, "reasons": [], "judged": null}'):
        (folder / "outputs" / "verdict.json").write_text(text)
        with pytest.raises(VerdictError, match="verdict.json: not readable as a verdict"):
            find_verdict(resolved, folder / "merged")
