"""What a GPU must have for training, each check a line or an error with its remedy.

In: `Card`, read from torch and the driver. Out: sentences for `verify`; ModelError where something does not do. Sources: NVIDIA's table of the
drivers that each CUDA needs (12: 525.60.13, 13: 580.65.06); bf16 and the flash-attn package begin with compute capability 8.0, Triton, which Unsloth
is written in, with 7.0. Limits: the first GPU that this process sees. `read_card` was not run on a GPU by us.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from emergency_kit.config import ModelSection
from emergency_kit.errors import ModelError

LEAST_DRIVER = {12: (525, 60, 13), 13: (580, 65, 6)}
AMPERE, TRITON = (8, 0), (7, 0)
OLDEST_LOCKED = (7, 0)  # of the kernels in torch 2.10.0 for CUDA 12.8; those for CUDA 13 begin later


@dataclass(frozen=True)
class Card:
    """capability: of its kernels; free_bytes, total_bytes: of video memory; cuda: that torch was built for; architectures: that torch has kernels of."""

    name: str
    capability: tuple[int, int]
    free_bytes: int
    total_bytes: int
    cuda: str
    architectures: tuple[str, ...]
    driver: str | None


def read_card() -> Card:
    """The first GPU; torch must see one."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return Card(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), free, total, torch.version.cuda or "", tuple(torch.cuda.get_arch_list()), read_driver())


def read_driver(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The NVIDIA driver's version by the kernel module, or by nvidia-smi; None where neither tells."""
    with contextlib.suppress(OSError):
        found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", path.read_text(errors="replace"))
        if found:
            return found[1]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=10).stdout.split()
        return said[0] if said else None
    return None


def explain_no_cuda(torch_version: str, torch_cuda: str | None, driver: str | None) -> str:
    """Why torch sees no GPU though the driver shows one, and what to do."""
    if torch_cuda is None:
        return f"the driver ({driver or 'unknown version'}) shows a GPU, but torch {torch_version} is a build for CPUs; next: make setup-gpu CUDA={13 if _version(driver) >= LEAST_DRIVER[13] else 12}"
    return f"the driver shows a GPU, but torch {torch_version} for CUDA {torch_cuda} cannot use it; {_driver_remedy(driver, torch_cuda) or 'look at nvidia-smi and at CUDA_VISIBLE_DEVICES'}"


def check_driver(card: Card) -> str:
    remedy = _driver_remedy(card.driver, card.cuda)
    if remedy:
        raise ModelError(f"driver {card.driver} is too old for CUDA {card.cuda}, which torch was built for; {remedy}")
    return f"{card.driver or 'version unknown'}, torch for CUDA {card.cuda}"


def _driver_remedy(driver: str | None, cuda: str) -> str:
    least = LEAST_DRIVER.get(int(cuda.partition(".")[0] or 0))
    if driver is None or least is None or _version(driver) >= least:
        return ""
    older = "; or make setup-gpu CUDA=12, which takes 525 and newer" if least == LEAST_DRIVER[13] and _version(driver) >= LEAST_DRIVER[12] else ""
    return f"next: install driver {'.'.join(f'{part:02}' for part in least)} or newer{older}"


def check_capability(card: Card) -> str:
    """A kernel runs on cards of its own major number that are no older; code for `compute_` is compiled for newer ones."""
    major, minor = card.capability
    known = [(kind, int(digits[:-1]), int(digits[-1])) for kind, digits in (re.fullmatch(r"(sm|compute)_(\d+)[af]?", name).groups() for name in card.architectures  # type: ignore[union-attr]
                                                                            if re.fullmatch(r"(sm|compute)_(\d+)[af]?", name))]
    if known and not any((has, part) <= (major, minor) and (kind == "compute" or has == major) for kind, has, part in known):
        remedy = f"make setup-gpu CUDA={12 if card.cuda.startswith('13') else 13}" if card.capability >= OLDEST_LOCKED else "neither GPU lock has any; CUDA_VISIBLE_DEVICES= trains on the CPU"
        raise ModelError(f"{card.name} has compute capability {major}.{minor}, torch's build for CUDA {card.cuda} has kernels for {', '.join(card.architectures)}; next: {remedy}")
    note = "" if card.capability >= TRITON else "; too old for Unsloth (7.0): --set model.backend=hf"
    return f"{card.name}, compute capability {major}.{minor}{note}"


def check_bf16(card: Card, model: ModelSection) -> str:
    if card.capability >= AMPERE:
        return "yes"
    if model.dtype == "bfloat16":
        raise ModelError(f"model.dtype is bfloat16, which {card.name} ({card.capability[0]}.{card.capability[1]}, needs 8.0) only emulates; next: --set model.dtype=auto, which takes float16")
    return "no (needs 8.0): float16 with scaled gradients is used"


def check_memory(card: Card, weight_bytes: float) -> str:
    """weight_bytes: of the loaded base model, less than which nothing can be done; the plan knows the rest."""
    said = f"{card.free_bytes / 1e9:.1f} of {card.total_bytes / 1e9:.1f} GB free, the base model takes {weight_bytes / 1e9:.1f} GB; the whole run: make plan"
    if card.free_bytes < weight_bytes:
        others = card.total_bytes - card.free_bytes > 0.1 * card.total_bytes
        raise ModelError(f"{said}. {'Next: end what else uses the GPU (nvidia-smi shows it), or' if others else 'Next:'} --set model.load_in_4bit=true, a smaller model.name, or --profile embedded")
    return said


def check_attention(card: Card, model: ModelSection) -> str:
    installed = importlib.util.find_spec("flash_attn") is not None
    if model.attn_implementation == "flash_attention_2" and not (installed and card.capability >= AMPERE):
        raise ModelError(f"model.attn_implementation is flash_attention_2, which {'needs the package flash-attn' if not installed else f'{card.name} is too old for'}; "
                         "next: --set model.attn_implementation=auto, which takes PyTorch's own")
    if installed and card.capability >= AMPERE:
        return "the package flash-attn"
    return "PyTorch's own (SDPA), without the package flash-attn"


def check_bitsandbytes(on_gpu: bool) -> str:
    """bitsandbytes' own self-test, in a process of its own: `python -m bitsandbytes`."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("bitsandbytes is not installed, which 4-bit weights need; next: pip install '.[gpu]', or --set model.load_in_4bit=false")
    done = subprocess.run([sys.executable, "-m", "bitsandbytes"], capture_output=True, text=True)
    wanted = "SUCCESS!" if on_gpu else "CPU library loaded successfully"
    if done.returncode or wanted not in done.stdout:
        last = ((done.stderr or done.stdout).strip().splitlines() or ["it said nothing"])[-1]
        raise ModelError(f"bitsandbytes' self-test fails ({last[:200]}); next: {sys.executable} -m bitsandbytes shows why, make setup-gpu installs the tested version")
    return f"self-test passed{'' if on_gpu else ' (CPU)'}"


def _version(driver: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", driver or "0"))
