"""What `verify` says of a GPU, its driver and bitsandbytes, by facts given, and of a base model on a Hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from emergency_kit.config import ModelSection, load_config
from emergency_kit.errors import ModelError
from emergency_kit.model import gpu, hub, verify
from tests.export.hub_server import HubServer
from tests.model.test_hub import server, tiny  # noqa: F401  fixtures

HOPPER = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
T4 = gpu.Card("Tesla T4", (7, 5), 15_000_000_000, 15_800_000_000, "12.6", ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"), "550.54.15")
ADA = gpu.Card("NVIDIA RTX 4080", (8, 9), 14_000_000_000, 17_000_000_000, "13.0", HOPPER, "580.159.03")


def test_a_card_that_does_all() -> None:
    model = ModelSection()
    assert gpu.check_driver(ADA) == "580.159.03, torch for CUDA 13.0"
    assert gpu.check_capability(ADA) == "NVIDIA RTX 4080, compute capability 8.9"  # by the kernels of 8.6
    assert gpu.check_bf16(ADA, model) == "yes"
    assert gpu.check_memory(ADA, 4.65e9) == "14.0 of 17.0 GB free, the base model takes 4.7 GB; the whole run: make plan"
    assert gpu.check_attention(ADA, model) == "PyTorch's own (SDPA), without the package flash-attn"


def test_an_older_card_gets_float16() -> None:
    assert gpu.check_driver(T4) == "550.54.15, torch for CUDA 12.6" and gpu.check_capability(T4) == "Tesla T4, compute capability 7.5"
    assert gpu.check_bf16(T4, ModelSection()) == "no (needs 8.0): float16 with scaled gradients is used"
    with pytest.raises(ModelError, match=r"model.dtype is bfloat16, which Tesla T4 \(7.5, needs 8.0\) only emulates; next: --set model.dtype=auto"):
        gpu.check_bf16(T4, ModelSection(dtype="bfloat16"))
    assert gpu.check_capability(replace(T4, name="Tesla P100", capability=(6, 0))).endswith("compute capability 6.0; too old for Unsloth (7.0): --set model.backend=hf")


@pytest.mark.parametrize("driver, cuda, remedy", [
    ("570.86.10", "13.0", r"driver 570.86.10 is too old for CUDA 13.0, .* next: install driver 580.65.06 or newer; or make setup-gpu CUDA=12, which takes 525 and newer"),
    ("470.82.01", "13.0", r"next: install driver 580.65.06 or newer$"), ("470.82.01", "12.6", r"next: install driver 525.60.13 or newer$")])
def test_a_driver_that_is_too_old(driver: str, cuda: str, remedy: str) -> None:
    with pytest.raises(ModelError, match=remedy):
        gpu.check_driver(replace(ADA, driver=driver, cuda=cuda))


def test_a_card_that_torch_has_no_kernels_for() -> None:
    with pytest.raises(ModelError, match=r"RTX 4080 has compute capability 7.0, torch's build for CUDA 13.0 has kernels for sm_75, .*; next: make setup-gpu CUDA=12"):
        gpu.check_capability(replace(ADA, capability=(7, 0)))
    with pytest.raises(ModelError, match="P100 has compute capability 6.0, .* next: neither GPU lock has any"):
        gpu.check_capability(replace(ADA, name="P100", capability=(6, 0)))
    with pytest.raises(ModelError, match="capability 12.0, .* next: make setup-gpu CUDA=13"):
        gpu.check_capability(replace(T4, capability=(12, 0)))
    assert gpu.check_capability(replace(ADA, capability=(12, 1))).endswith("12.1") and gpu.check_capability(replace(ADA, capability=(13, 0))).endswith("13.0")  # compiled anew


def test_a_card_that_is_full_or_too_small() -> None:
    with pytest.raises(ModelError, match=r"2.0 of 17.0 GB free, the base model takes 4.7 GB; .*end what else uses the GPU \(nvidia-smi shows it\), or --set"):
        gpu.check_memory(replace(ADA, free_bytes=2_000_000_000), 4.65e9)
    with pytest.raises(ModelError, match=r"Next: --set model.load_in_4bit=true, a smaller model.name, or --profile embedded"):
        gpu.check_memory(replace(ADA, free_bytes=3_900_000_000, total_bytes=4_000_000_000), 4.65e9)
    with pytest.raises(ModelError, match="flash_attention_2, which needs the package flash-attn; next: --set model.attn_implementation=auto"):
        gpu.check_attention(ADA, ModelSection(attn_implementation="flash_attention_2"))


def test_why_torch_sees_no_gpu() -> None:
    assert gpu.explain_no_cuda("2.13.0+cpu", None, "580.159.03").endswith("torch 2.13.0+cpu is a build for CPUs; next: make setup-gpu CUDA=13")
    assert gpu.explain_no_cuda("2.13.0+cpu", None, "550.54.15").endswith("CUDA=12")
    assert gpu.explain_no_cuda("2.13.0", "13.0", "550.54.15").endswith("or make setup-gpu CUDA=12, which takes 525 and newer")
    assert gpu.explain_no_cuda("2.13.0", "13.0", "580.159.03").endswith("look at nvidia-smi and at CUDA_VISIBLE_DEVICES")


def test_the_driver_by_the_kernel_module(tmp_path: Path) -> None:
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.03  Release Build\nGCC version:  gcc version 12.3.0\n")
    assert gpu.read_driver(tmp_path / "version") == "580.159.03"


def test_the_memory_of_mistral_is_about_the_guides_figure() -> None:
    """4 to 5 GB for the base in 4-bit."""
    assert 4e9 < verify._weight_bytes(load_config("mistral-7b")) < 5e9


def test_bitsandbytes_tests_itself() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; make test installs it")
    on_gpu = torch.cuda.is_available()
    assert gpu.check_bitsandbytes(on_gpu) == f"self-test passed{'' if on_gpu else ' (CPU)'}"


def test_a_base_model_on_the_hub(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    assert hub.check_access("me/tiny", None) == ("me/tiny may be read, no token (none needed)", False)
    server.closed["me/tiny"] = "gated"
    with pytest.raises(ModelError, match="me/tiny: is gated on the Hub; accept its terms at .*, then log in with a token"):
        hub.check_access("me/tiny", None)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ModelError, match=r"was refused by the Hub \(HTTP 401\); use another token"):
        hub.check_access("me/tiny", None)
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    assert hub.check_access("me/tiny", None) == ("me/tiny may be read, token of me (write)", False)
    with pytest.raises(ModelError, match="has no revision 'v9'"):
        hub.check_access("me/tiny", "v9")
    from huggingface_hub import snapshot_download

    snapshot_download("me/tiny", endpoint=server.address)
    assert hub.check_access("me/tiny", None) == ("me/tiny may be read, token of me (write); whole in the cache", True)
    server.__exit__()
    assert hub.check_access("me/tiny", None) == ("me/tiny is whole in the cache; the Hub cannot be reached", True)
    with pytest.raises(ModelError, match="me/other: is not in the cache .* cannot be reached"):
        hub.check_access("me/other", None)
