"""Files and folders that are there whole or not at all, and manifests that notice a changed byte."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from emergency_kit.artifacts import hash_json, load_manifest, save_json, save_manifest, verify_folder
from emergency_kit.config import load_config
from emergency_kit.errors import UsageError
from emergency_kit.files import check_writable, staged_file, staged_folder


def fill(folder: Path) -> Path:
    with staged_folder(folder) as temporary:
        (temporary / "a.txt").write_text("a")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "b.bin").write_bytes(bytes(1000))
        save_manifest(temporary, "test", load_config("embedded"), dataset_hash="d", parents=[folder.parent / "parent.txt"])
    return folder


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    fill(tmp_path / "out")
    with pytest.raises(RuntimeError):
        with staged_folder(tmp_path / "out") as temporary:
            (temporary / "half.txt").write_text("half")
            raise RuntimeError
    assert not verify_folder(tmp_path / "out") and (tmp_path / "out" / "a.txt").read_text() == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_of_an_artifact_can_be_passed_on(tmp_path: Path) -> None:
    """A library that writes for the owner alone does not decide; the umask does."""
    with staged_folder(tmp_path / "out") as temporary:
        (temporary / "model.safetensors").write_bytes(b"x")
        (temporary / "model.safetensors").chmod(0o600)
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = save_json(tmp_path / "deep" / "x.json", {"a": "é"})
    with pytest.raises(RuntimeError):
        with staged_file(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert json.loads(path.read_text()) == {"a": "é"} and [item.name for item in path.parent.iterdir()] == ["x.json"]


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "a.txt").write_text("b"), lambda folder: (folder / "a.txt").unlink(),
    lambda folder: (folder / "sub" / "b.bin").write_bytes(bytes(999)), lambda folder: (folder / "manifest.json").unlink(),
    lambda folder: (folder / "manifest.json").write_text("{")])
def test_every_damage_is_seen(tmp_path: Path, damage: object) -> None:
    folder = fill(tmp_path / "out")
    assert verify_folder(folder) == []
    damage(folder)  # type: ignore[operator]
    assert len(verify_folder(folder)) == 1


def test_the_manifest_says_how_it_was_made(tmp_path: Path) -> None:
    (tmp_path / "parent.txt").write_text("p")
    manifest = load_manifest(fill(tmp_path / "out"))
    assert manifest.keys() >= {"schema_version", "stage", "config", "profile", "git_commit", "packages", "hardware", "dataset_hash", "parents", "files"}
    assert len(manifest["parents"][0]["sha256"]) == 64 and set(manifest["files"]) == {"a.txt", "sub/b.bin"}
    assert manifest["packages"]["torch"] == importlib.metadata.version("torch")


def test_more_space_than_there_is(tmp_path: Path) -> None:
    check_writable(tmp_path / "new")
    with pytest.raises(UsageError, match="MB free, .* MB needed"):
        check_writable(tmp_path, needed_bytes=10**18)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=5))
def test_a_hash_does_not_depend_on_the_order_of_keys(value: dict[str, object]) -> None:
    assert hash_json(value) == hash_json(dict(reversed(value.items())))


def test_half_a_surrogate_pair_is_a_problem_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    for files in ({"a": "\ud800"}, {"\udfff": "0" * 64}):
        (tmp_path / "manifest.json").write_text(json.dumps({"files": files, "self": "\ud800"}))
        problems = verify_folder(tmp_path)
        assert len(problems) == 2 and "\n".join(problems).encode("utf-8")
