"""The stage `verify`: look at everything that training will need, and say what is missing.

In: a config. Out: one line a check on the console; ModelError when one of them failed. With a GPU, also what the card, its driver and
bitsandbytes can do; with a base model of the Hub, whether it may be read and where it will be kept.
Run: `make verify`, `python scripts/verify_setup.py`.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
import time
from pathlib import Path
from typing import Callable

from emergency_kit.artifacts import hardware, verify_folder
from emergency_kit.config import REPOSITORY, Resolved, find_cuda
from emergency_kit.errors import KitError, ModelError
from emergency_kit.model import backend, bundled, gpu, hub
from emergency_kit.model.process_memory import available_bytes
from emergency_kit.model.shape import load_shape

FREE_BYTES = 3_000_000_000


def verify(resolved: Resolved) -> None:
    """Run all checks, print them, and raise ModelError naming those that failed."""
    checks: list[tuple[str, Callable[[Resolved], str]]] = [
        ("Python", _python), ("Packages", _packages), ("Hardware", _hardware), ("Device", _device),
        *_gpu_checks(resolved), ("Base model", _base_model), ("Tokenizer", _tokenizer), ("Knowledge cards", _cards), ("Disk", _disk)]
    print(f"Profile {resolved.profile} ({resolved.profile_reason})")
    failed = []
    for name, check in checks:
        try:
            print(f"  ok    {name}: {check(resolved)}", flush=True)
        except KitError as error:
            failed.append(name)
            print(f"  FAIL  {name}: {error}", flush=True)
    if failed:
        raise ModelError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}; see the lines above")
    print("Ready. Next: make train, or make pipeline")


def _python(resolved: Resolved) -> str:
    return f"{sys.version.split()[0]} in {sys.prefix}"


def _packages(resolved: Resolved) -> str:
    wrong, count = [], 0
    for line in (REPOSITORY / "requirements.lock").read_text(encoding="utf-8").splitlines():
        name, pinned, version = line.partition("==")
        if not pinned or line.startswith("#"):
            continue
        count += 1
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found.partition("+")[0] != version:
            wrong.append(f"{name} {found} (pinned {version})")
    if wrong:
        raise ModelError(f"{', '.join(wrong[:5])}; next: rm .venv/installed.txt, then make setup")
    return f"{count} as pinned, torch {importlib.metadata.version('torch')}"


def _hardware(resolved: Resolved) -> str:
    found = hardware()
    memory = f"{found['memory_bytes'] / 1e9:.0f} GB memory" if found["memory_bytes"] else "memory unknown"
    return f"{found['processor'] or 'processor unknown'}, {found['cores']} cores, {memory}, {', '.join(found['gpus']) or 'no GPU'}"


def _gpu_checks(resolved: Resolved) -> list[tuple[str, Callable[[Resolved], str]]]:
    import torch

    model = resolved.config.model
    four_bit: list[tuple[str, Callable[[Resolved], str]]] = [("bitsandbytes", lambda _: gpu.check_bitsandbytes(torch.cuda.is_available()))] if model.load_in_4bit else []
    if not torch.cuda.is_available() or model.device == "cpu":
        return four_bit + [("Without a GPU", _without_gpu)]
    card = gpu.read_card()
    return [("Driver", lambda _: gpu.check_driver(card)), ("GPU", lambda _: gpu.check_capability(card)), ("bf16", lambda _: gpu.check_bf16(card, model)),
            ("GPU memory", lambda _: gpu.check_memory(card, _weight_bytes(resolved))), ("Flash attention", lambda _: gpu.check_attention(card, model)), *four_bit]


def _weight_bytes(resolved: Resolved) -> float:
    model = resolved.config.model
    return load_shape(model).weight_bytes(model.load_in_4bit)


def _without_gpu(resolved: Resolved) -> str:
    import torch

    if find_cuda() and not torch.cuda.is_available() and resolved.config.model.device != "cpu":
        raise ModelError(gpu.explain_no_cuda(torch.__version__, torch.version.cuda, gpu.read_driver()))
    name, free = resolved.config.model.name, available_bytes()
    room = f", {free / 1e9:.1f} GB of memory free" if free else ""
    if name == "bundled":
        return f"the embedded profile trains, evaluates, merges, exports and serves its 135M model on this CPU{room}; how long: make plan"
    here = "the config wants a GPU" if resolved.config.model.device == "cuda" else f"{name} is trained on this CPU; how long: make plan"
    return f"{here}{room}. Made for a CPU: --profile embedded; for a card that is not here: make plan ARGS=\"--profile mistral-7b --gpu 16GB\""


def _device(resolved: Resolved) -> str:
    model = resolved.config.model
    choice = backend.choose(model)
    device = choice.device
    return f"{device}, backend {choice.name} ({choice.reason}), compute {str(backend.pick_dtype(model, device)).removeprefix('torch.')}, " \
           f"attention {backend.pick_attention(model, device)}"


def _base_model(resolved: Resolved) -> str:
    model = resolved.config.model
    backend.require_base(model)
    if Path(model.name).is_dir():
        hub.require_whole(Path(model.name))
        return f"{model.name} is whole (loaded when it is used)"
    if model.name != "bundled":
        said, cached = hub.check_access(model.name, model.revision)
        return said if cached else f"{said}; {_room_for_download(resolved)}"
    problems = verify_folder(bundled.FOLDER)
    if problems:
        raise ModelError(f"{bundled.FOLDER}: {'; '.join(problems)}; next: delete the folder, then make setup")
    backend.load_tokenizer(model)  # imports transformers, which is not the model's time
    started = time.perf_counter()
    backend.load_base(model)
    return f"{bundled.FOLDER} is whole and loads in {time.perf_counter() - started:.1f} s"


def _tokenizer(resolved: Resolved) -> str:
    if resolved.config.model.name != "bundled":
        return "that of the base model"
    tokenizer = backend.load_tokenizer(resolved.config.model)
    pieces = tokenizer.tokenize("112")
    if pieces != ["1", "1", "2"] or tokenizer.eos_token != "<|im_end|>":
        raise ModelError(f"112 is read as {pieces}, end token {tokenizer.eos_token}; next: delete {bundled.FOLDER}, then make setup")
    return "reads numbers digit by digit, ends with <|im_end|>"


def _cards(resolved: Resolved) -> str:
    from emergency_kit.knowledge.cards import load_cards

    cards = load_cards()
    return f"{len(cards)} in {len({card.category for card in cards.values()})} categories"


def _room_for_download(resolved: Resolved) -> str:
    from huggingface_hub import constants

    needed, free = load_shape(resolved.config.model).file_bytes, _free_bytes(Path(constants.HF_HUB_CACHE))
    said = f"{needed / 1e9:.1f} GB to download to {constants.HF_HUB_CACHE}, {free / 1e9:.0f} GB free"
    if free < needed:
        raise ModelError(f"{said}; next: free some space, or export HF_HOME=FOLDER on a larger disk")
    return said


def _free_bytes(folder: Path) -> int:
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _disk(resolved: Resolved) -> str:
    free = _free_bytes(Path(resolved.config.training.output_dir))
    if free < FREE_BYTES:
        raise ModelError(f"{free / 1e9:.1f} GB free for {resolved.config.training.output_dir}, {FREE_BYTES / 1e9:.0f} GB wanted; free some space")
    return f"{free / 1e9:.0f} GB free"
