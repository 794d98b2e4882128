"""A base model from the Hub: what is refused, cut off or out of reach is one clear line, and a filled cache or a folder is enough."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest
import torch

from emergency_kit import cli
from emergency_kit.errors import ModelError
from emergency_kit.model import backend, hub
from emergency_kit.model.shape import load_shape
from tests.export.hub_server import HubServer
from tests.tiny import resolve, save_tiny_model

IDS = torch.arange(40, 60)[None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", tied=True)


@pytest.fixture
def server(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that holds the model as me/tiny, and a client with an empty cache and no token."""
    with HubServer() as server:
        server.repos["me/tiny"] = {"private": False, "messages": [], "files": {path.name: path.read_bytes() for path in tiny.iterdir()}}
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def section(name: object = "me/tiny", **settings: object) -> Any:
    return resolve(Path(str(name)), **settings).config.model


@torch.no_grad()
def logits(name: object = "me/tiny") -> torch.Tensor:
    model = backend.load_base(section(name)).model
    return model(IDS.to(model.device)).logits


def refusal(name: object = "me/tiny", **settings: object) -> str:
    """What the tokenizer is refused with; the model says the same of itself."""
    said = []
    for load in (backend.load_tokenizer, backend.load_base):
        with pytest.raises(ModelError) as refused:
            load(section(name, **settings))
        said.append(str(refused.value))
    assert said[0].removeprefix("tokenizer of ") == said[1].removeprefix("model ") and "\n" not in said[0]
    return said[0]


def test_a_model_by_its_name_then_from_the_cache_alone(server: HubServer, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = logits(tiny)
    assert torch.equal(logits(), wanted) and load_shape(section()).layers == 2
    asked = len(server.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert torch.equal(logits(), wanted) and len(server.requests) == asked
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server.__exit__()
    assert torch.equal(logits(), wanted)  # out of reach, and without a minute of tries


@pytest.mark.parametrize("closed, token, line", [
    ("gated", None, "is gated on the Hub; accept its terms at {address}/me/tiny, then log in with a token that may read it: hf auth login, or HF_TOKEN"),
    ("gated", "hf_read", "is gated on the Hub; accept its terms at {address}/me/tiny, then use another token (hf auth login, or HF_TOKEN): this one may not read it"),
    ("private", None, "is not on the Hub under this name, or is private; check model.name, or log in with a token that may read it: hf auth login, or HF_TOKEN"),
    ("private", "hf_read", "is not on the Hub under this name, or is private; check model.name, or use another token (hf auth login, or HF_TOKEN): this one may not read it"),
    ("private", "hf_wrong", "was refused by the Hub (HTTP 401); use another token (hf auth login, or HF_TOKEN): this one may not read it")])
def test_what_may_not_be_read(server: HubServer, monkeypatch: pytest.MonkeyPatch, closed: str, token: str | None, line: str) -> None:
    server.closed["me/tiny"] = closed
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert refusal() == f"tokenizer of me/tiny: {line.format(address=server.address)}"
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    assert backend.load_tokenizer(section())


def test_names_and_revisions_that_are_not_there(server: HubServer) -> None:
    assert "me/none: is not on the Hub under this name, or is private" in refusal("me/none")
    assert refusal(model__revision="v9").endswith("has no revision 'v9' on the Hub; check model.revision")
    assert refusal("a/b/c").endswith("is neither a folder nor a name that a model on the Hub can have; check model.name")
    with pytest.raises(ModelError, match="config.json of me/none: is not on the Hub .* or one of mistral-7b"):
        load_shape(section("me/none"))


def test_out_of_reach_with_nothing_or_half_in_the_cache(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    backend.load_base(section())
    server.__exit__()
    assert refusal("me/other").endswith(f", and the Hub at {server.address} cannot be reached; check the network, then the same command again goes on where it stopped; "
                                        "or name a folder")
    snapshot = hub.cached_snapshot("me/tiny", None)
    assert snapshot
    weights = (snapshot / "model.safetensors").resolve()
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model me/tiny: is only half in the cache \(model.safetensors has [\d,]+ of [\d,]+ bytes\), and the Hub at .* cannot be reached"):
        backend.load_base(section())
    (snapshot / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"model me/tiny: is only half in the cache \(model.safetensors missing\), and HF_HUB_OFFLINE is set; unset it, then"):
        backend.load_base(section())
    assert "me/other: is not in the cache (" in (said := refusal("me/other")) and "HF_HUB_OFFLINE is set; unset it" in said


def test_a_folder_that_was_copied_in_half(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny, folder)
    assert hub.weight_problems(folder) == []
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"model .*copy: its download or copy is not whole \(model.safetensors (has|is no) .*\); copy or download it again"):
        backend.load_base(section(folder))
    weights.unlink()
    (folder / hub.INDEX).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}')
    shutil.copy(tiny / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match=r"not whole \(model-00002-of-00002.safetensors missing\)"):
        backend.load_base(section(folder))


def test_the_command_line_says_it_in_one_line(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    server.closed["me/tiny"] = "gated"
    monkeypatch.setattr(sys, "argv", ["emergency-kit", "plan", "--profile", "embedded", "--output-dir", str(tmp_path / "out"), "--set", "model.name=me/tiny"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    assert stop.value.code == 4 and said.err.strip().count("\n") == 0 and "is gated on the Hub" in said.err and "Traceback" not in said.err + said.out
