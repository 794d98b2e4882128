"""One tiny model, one adapter, and what train, merge and export leave of them, for all export tests; nothing writes into them."""

from pathlib import Path

import pytest

from emergency_kit.artifacts import save_manifest
from emergency_kit.export.gguf import export_gguf
from tests.export import tiny
from tests.one_thread import one_thread  # noqa: F401


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_adapter(tmp_path_factory.mktemp("checkpoints") / "final", base)


@pytest.fixture(scope="session")
def outputs(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What train, merge and export leave, on the tiny model."""
    folder = tmp_path_factory.mktemp("hub")
    resolved = tiny.resolve(base, folder, "export.quantizations=[q8_0]")
    save_manifest(tiny.copy_folder(adapter, folder / "checkpoints" / "final"), "train", resolved, parents=[base])
    save_manifest(tiny.copy_folder(base, folder / "merged" / "final"), "merge", resolved, parents=[folder / "checkpoints" / "final", base])
    export_gguf(resolved)
    return folder
