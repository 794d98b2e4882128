"""Uploads through huggingface_hub's own client to a server that speaks the Hub's API: every byte, the card, the refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from emergency_kit import cli
from emergency_kit.artifacts import hash_parent
from tests.export import tiny
from tests.export.hub_server import HubServer


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(outputs: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """A verb of the command line, in this process, against a server and under a token."""

    def call(verb: str, hub: HubServer, *arguments: str, token: str = "hf_write") -> Done:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(outputs / "no-token"))
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(sys, "argv", ["emergency-kit", verb, "--profile", "embedded", "--output-dir", str(outputs), "--set", f"model.name={base}", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        return Done(stop.value.code or 0, said.out, said.err)

    return call


def download(hub: HubServer, repo: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import snapshot_download

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.co")  # which its client replaces by `endpoint`
    return Path(snapshot_download(repo, endpoint=hub.address, local_dir=folder, token=False))


def test_gguf_files_arrive_byte_for_byte_with_a_card(run: Callable[..., Done], hub: HubServer, outputs: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("upload-gguf", hub, "--repo", "someone/kit-GGUF", "--private")
    assert done.returncode == 0, done.stderr
    assert "Uploaded: " in done.stdout and hub.repos["someone/kit-GGUF"]["private"]
    folder = download(hub, "someone/kit-GGUF", tmp_path / "down", monkeypatch)
    sent = {name: (outputs / "gguf" / name).read_bytes() for name in os.listdir(outputs / "gguf")}
    got = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert set(got) == {*sent, "README.md"} and all(got[name] == sent[name] for name in sent)
    card = got["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "gguf" and head["language"] == "en" and "base_model" not in head, "a folder of this machine is no one's base model"
    for heading in ("Verdict", "Limits", "Data", "Training", "Evaluation", "Files", "Licence"):
        assert f"\n## {heading}\n" in card
    assert "None: no gate has judged this model." in card and "not a doctor" in card and "| `final-q8_0.gguf` |" in card


def test_merged_model_and_adapter_are_uploaded_with_what_made_them(run: Callable[..., Done], hub: HubServer, outputs: Path) -> None:
    done = run("upload-hf", hub, "--repo", "someone/kit")
    assert done.returncode == 0, done.stderr
    files = hub.repos["someone/kit"]["files"]
    assert {"model.safetensors", "config.json", "tokenizer.json", "manifest.json", "README.md"} <= set(files)
    assert files["model.safetensors"] == (outputs / "merged/final/model.safetensors").read_bytes() and not hub.repos["someone/kit"]["private"]
    card = files["README.md"].decode()
    assert "library_name: transformers" in card and "LoRA of rank 16" in card and "Not evaluated" in card
    report = {"made": {"parents": [{"path": "x", "sha256": hash_parent(outputs / "checkpoints/final")}]}, "total_samples": 48, "valid_structure_percentage": 97.9,
              "critical_action_recall": {"overall": 93.1, "seen_hazards": 94.0, "test_only_hazards": 90.2}}
    (outputs / "evaluation_report.json").write_text(json.dumps(report))
    done = run("upload-hf", hub, "--repo", "someone/adapter", "--checkpoint", str(outputs / "checkpoints/final"))
    (outputs / "evaluation_report.json").unlink()
    assert done.returncode == 0, done.stderr
    card = hub.repos["someone/adapter"]["files"]["README.md"].decode()
    assert "library_name: peft" in card and "48 held-out records" in card and "93.1 %" in card


def test_refusals_are_one_line_and_leave_no_commit(run: Callable[..., Done], hub: HubServer, outputs: Path) -> None:
    for token, words in (("", "no token for the Hub"), ("hf_bad", "HTTP 401"), ("hf_read", "may not write there")):
        done = run("upload-gguf", hub, "--repo", "someone/kit", token=token)
        assert done.returncode == 6 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert token == "" or token not in done.stderr + done.stdout
    done = run("upload-gguf", hub, "--repo", "no-owner")
    assert done.returncode == 2 and "expected owner/name" in done.stderr
    run("upload-gguf", hub, "--repo", "someone/public")
    done = run("upload-gguf", hub, "--repo", "someone/public", "--private")
    assert done.returncode == 6 and "already there and public" in done.stderr
    verdict = {"ship": False, "reasons": ["two never-rules broken"], "judged": {"path": "x", "sha256": hash_parent(outputs / "merged/final")}, "override": None}
    (outputs / "verdict.json").write_text(json.dumps(verdict))
    refused = run("upload-gguf", hub, "--repo", "someone/bad")
    told = run("upload-gguf", hub, "--repo", "someone/told", "--override-verdict", "research only")
    (outputs / "verdict.json").unlink()
    assert refused.returncode == 7 and "two never-rules broken" in refused.stderr and "someone/bad" not in hub.repos
    assert told.returncode == 0 and "do not ship (overridden: research only)" in hub.repos["someone/told"]["files"]["README.md"].decode()


def test_a_changed_file_is_not_uploaded(run: Callable[..., Done], hub: HubServer, outputs: Path, tmp_path: Path) -> None:
    folder = tiny.copy_folder(outputs / "gguf", tmp_path / "gguf")
    with open(folder / "final-q8_0.gguf", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    done = run("upload-gguf", hub, "--repo", "someone/kit", "--folder", str(folder))
    assert done.returncode == 6 and "final-q8_0.gguf differs from its recorded sha256" in done.stderr and not hub.repos
    listed = run("export-gguf", hub, "--list-exports", "--output", str(folder))
    assert listed.returncode == 6 and "FILE CHANGED" in listed.stdout


def test_the_hub_out_of_reach(run: Callable[..., Done]) -> None:
    with HubServer() as server:
        pass
    done = run("upload-gguf", server, "--repo", "someone/kit")
    assert done.returncode == 6 and "cannot be reached" in done.stderr, done.stderr


def test_export_and_push_in_one_command_with_endpoint_and_token_from_the_environment(hub: HubServer, outputs: Path, base: Path, tmp_path: Path) -> None:
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_write", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    short = [f"model.name={base}", f"dataset.name={tiny.HELD_OUT}", "export.certificate_strings=20", "export.certificate_answer_tokens=20",
             "export.certificate_prompts=1", "export.certificate_max_new_tokens=4", "export.min_top1_percent={q8_0: 0, q4_0: 0}"]
    done = subprocess.run([sys.executable, "scripts/export_gguf.py", "--profile", "embedded", "--checkpoint", str(outputs / "merged/final"), "--model-name", "pan",
                           "--output", str(tmp_path / "out"), "--output-dir", str(tmp_path), "-q", "q8_0,Q4_0", "--push-to-hub", "someone/kit", "--private",
                           "--allow-out-of-bounds", *(part for setting in short for part in ("--set", setting))],
                          capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    repo = hub.repos["someone/kit"]
    assert repo["private"] and repo["files"]["pan-q8_0.gguf"] == (tmp_path / "out" / "pan-q8_0.gguf").read_bytes()
    assert {"pan-q4_0.gguf", "pan-q4_0.certificate.md", "manifest.json", "README.md"} <= set(repo["files"])
