"""One kit of a tiny random model, exported and packed by the real stages; nothing writes into it."""

import shutil
from pathlib import Path

import pytest
import torch

from emergency_kit.artifacts import save_manifest
from emergency_kit.config import load_config
from emergency_kit.export.gguf import export_gguf
from emergency_kit.kit.fetch import WLLAMA_FILE
from emergency_kit.kit.pack import kit
from tests.export.tiny import HELD_OUT
from tests.tiny import WHOLE, save_tiny_model

def resolve(model: Path, output: Path, *settings: str):
    """The embedded profile on a tiny model, with a short certificate; archives that were fetched before are used again."""
    return load_config("embedded", settings=[
        f"model.name={model}", "model.dtype=float32", f"training.output_dir={output}", f"dataset.name={HELD_OUT}", "export.quantizations=[f32]", "export.certificate_strings=40",
        "export.certificate_answer_tokens=40", "export.certificate_prompts=1", "export.certificate_max_new_tokens=4", "export.allow_out_of_bounds=true", "kit.part_megabytes=8",
        "kit.platforms=[]", "inference.max_new_tokens=48", *settings])


@pytest.fixture(scope="session")
def outputs(tmp_path_factory):
    """What train, merge and export leave, on the tiny model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("kit-outputs")
    merged = save_tiny_model(folder / "merged" / "final", tokens=WHOLE)
    resolved = resolve(merged, folder)
    save_manifest(merged, "merge", resolved)
    export_gguf(resolved, merged)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="session")
def model(outputs):
    """The exported file."""
    return next((outputs / "gguf").glob("*.gguf"))


def pack(outputs, model, out, *settings, **flags):
    """A kit without the browser's engine, so that no registry is asked."""
    return kit(resolve(outputs / "merged" / "final", outputs, *settings), model, out, **{"browser": False} | flags)


@pytest.fixture(scope="session")
def plain(outputs, model, tmp_path_factory):
    return pack(outputs, model, tmp_path_factory.mktemp("kits") / "kit")


def archive() -> list[str]:
    """A setting that names the npm package where an earlier run left it; npm fetches it else."""
    kept = Path("outputs/cache/kit") / WLLAMA_FILE
    return [f"kit.wllama_archive={kept.resolve()}"] if kept.is_file() else []


@pytest.fixture(scope="session")
def packed(outputs, model):
    """A kit with the browser's engine."""
    if not archive() and shutil.which("npm") is None:
        pytest.skip(f"no npm and no outputs/cache/kit/{WLLAMA_FILE}: the browser's engine cannot be had; install Node.js")
    return kit(resolve(outputs / "merged" / "final", outputs, *archive()), model, outputs / "kit")
