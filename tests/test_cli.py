"""Bad input from outside: one clear line, the right exit code, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Callable, Iterator

import pytest

from tests.storm.storm import Life, Nursery

TINY_ROW = {"input": "smoke", "output": "FACTS\n• Smoke.\n\nUNCERTAINTIES\n• None.\n\nANALYSIS\n• Bad.\n\nGUIDANCE\n1. Leave."}


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Life]]:
    """`kit(*arguments)`: a command or script, in a process of its own that has the libraries loaded."""
    nursery = Nursery(tmp_path_factory.mktemp("lives"))
    yield nursery.live
    nursery.close()


@pytest.fixture
def fails(kit: Callable[..., Life]) -> Callable[..., None]:
    """`fails(code, message, *arguments)`: it ends with that code and one line of error."""

    def check(code: int, message: str, *arguments: object) -> None:
        done = kit(*arguments)
        errors = [line for line in done.errors.splitlines() if line.startswith("error: ")]
        assert done.status == code, done.text
        assert len(errors) == 1 and message in errors[0], done.errors

    return check


@pytest.mark.parametrize("code, message, arguments", [
    (2, "no such config file or folder", ("train", "--config", "none.yaml")),
    (2, "unknown key 'training.num_epoch'; did you mean 'training.num_epochs'?", ("train", "--set", "training.num_epoch=1")),
    (2, "training.num_epochs: got 'x'", ("train", "--set", "training.num_epochs=x")),
    (2, "--profile: got 'gpu'", ("train", "--profile", "gpu")),
    (2, "No such option: --nope", ("train", "--nope")),
    (2, "--max-steps", ("train", "--max-steps", "many")),
    (2, "training.max_steps: got 0", ("train", "--max-steps", "0")),
    (3, "no such file or folder", ("train", "--set", "dataset.name=./none.jsonl", "--dry-run")),
    (4, "sees no CUDA GPU", ("train", "--profile", "mistral-7b", "--set", "dataset.name=embedded")),
    (4, "no such folder", ("evaluate", "--checkpoint", "outputs/none")),
    (4, "no such folder", ("infer", "--checkpoint", "outputs/none", "--prompt", "smoke")),
    (4, "no such folder", ("merge", "--checkpoint", "outputs/none")),
    (4, "no such folder", ("train", "--resume-from", "outputs/none")),
    (6, "q9_9", ("export-gguf", "-q", "q9_9")),
    (2, "reserved for mid-run checkpoints", ("train", "--model-name", "checkpoint-7")),
    (2, "training.model_name", ("train", "--model-name", "../evil")),
])
def test_each_bad_input_gets_one_line_and_its_code(fails: Callable[..., None], code: int, message: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    if arguments[0] == "train" and "--output-dir" not in arguments:
        arguments = (*arguments, "--output-dir", str(tmp_path))
    fails(code, message, *arguments)


def test_an_output_folder_that_cannot_be_written(fails: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    fails(2, "not writable", "train", "--output-dir", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="a small file system needs root to mount")
def test_a_full_output_folder(fails: Callable[..., None], tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True).returncode != 0:
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        fails(2, "needed; free some space", "train", "--output-dir", small)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_dataset_without_a_column(fails: Callable[..., None], tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input": "a", "reply": "b"}) + "\n")
    fails(3, "are no known form", "train", "--output-dir", tmp_path / "out", "--set", f"dataset.name={tmp_path / 'rows.jsonl'}", "--set", f"model.name={tiny}")
    assert not (tmp_path / "out" / "checkpoints" / "final").exists()


def test_a_checkpoint_that_lacks_a_file_or_fits_another_base(fails: Callable[..., None], tmp_path: Path, tiny: Path) -> None:
    from tests.export.tiny import save_adapter

    adapter = save_adapter(tmp_path / "adapter", tiny)
    fails(4, "trained on base model", "infer", "--checkpoint", adapter, "--prompt", "smoke")
    (adapter / "adapter_model.safetensors").unlink()
    fails(4, "incomplete, adapter_model.safetensors missing", "infer", "--checkpoint", adapter, "--prompt", "smoke", "--set", f"model.name={tiny}")


def test_debug_shows_the_traceback(kit: Callable[..., Life], tmp_path: Path) -> None:
    done = kit("evaluate", "--checkpoint", tmp_path / "none", "--debug", may_show_traceback=True)
    assert done.status == 1 and "Traceback" in done.errors


def test_dry_run_writes_no_checkpoint(kit: Callable[..., Life], tmp_path: Path, tiny: Path) -> None:
    done = kit("train", "--dry-run", "--output-dir", tmp_path, "--set", f"model.name={tiny}", "--set", "dataset.build_size=300", "--set", "dataset.max_samples=24")
    assert done.status == 0 and "effective batch 8" in done.out and "Dry run" in done.out
    assert not (tmp_path / "checkpoints").exists()


def test_config_explain_names_every_key_and_origin(kit: Callable[..., Life]) -> None:
    from emergency_kit.config import Config, flatten

    done = kit("config", "explain", "--profile", "embedded", "--set", "training.seed=5")
    assert done.status == 0
    for key in flatten(Config()):
        assert f"\n{key} = " in done.out
    assert "training.seed = 5  [--set training.seed]" in done.out
    assert "training.weight_decay = 0.01  [default]" in done.out


WITH_UNSLOTH = """import importlib.machinery, sys, types
sys.modules["unsloth"] = types.ModuleType("unsloth")
sys.modules["unsloth"].__spec__ = importlib.machinery.ModuleSpec("unsloth", None)
from emergency_kit.cli import main
main()"""


def test_a_pipeline_that_trained_beside_unsloth_goes_on_in_a_fresh_process(tmp_path: Path, tiny: Path) -> None:
    """Unsloth's import, here that of an empty module, changes transformers for the whole process. The second process ends at a setting that evaluation refuses."""
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(TINY_ROW) + "\n")
    settings = (f"model.name={tiny}", f"dataset.name={tmp_path}", "model.dtype=float32", "training.max_steps=1", "evaluation.primary_endpoints=[none]")
    done = subprocess.run([sys.executable, "-c", WITH_UNSLOTH, "pipeline", "--profile", "embedded", "--overwrite", "--output-dir", str(tmp_path / "out"),
                           *(word for setting in settings for word in ("--set", setting))], capture_output=True, text=True)
    said = done.stdout
    assert said.count("Training completed!") == said.count("is trained with this config on this data") == said.count("2/4 evaluate") == 1, said + done.stderr
    assert done.returncode == 2 and "evaluation.primary_endpoints" in done.stderr


def test_a_small_pipeline_from_data_to_gguf(kit: Callable[..., Life], tmp_path: Path, tiny: Path) -> None:
    """All the guide's scripts, one after the other, on a two-layer model and local JSONL; exact files of each stage."""
    data = tmp_path / "data"
    data.mkdir()
    for split, number in (("train", 8), ("validation", 2), ("test", 2)):
        (data / f"{split}.jsonl").write_text("".join(json.dumps({**TINY_ROW, "id": f"{split}{index}"}) + "\n" for index in range(number)))
    out = tmp_path / "out"
    common = ["--output-dir", str(out), "--set", f"model.name={tiny}", "--set", f"dataset.name={data}", "--set", "model.dtype=float32"]

    def script(name: str, *arguments: str) -> str:
        done = kit(f"scripts/{name}.py", *common, *arguments)
        assert done.status == 0, done.text
        return done.out

    assert "Final checkpoint saved to" in script("train", "--max-steps", "2", "--set", "training.eval_steps=1")
    script("evaluate", "--max-samples", "2", "--set", "evaluation.max_new_tokens=8")
    report = json.loads((out / "evaluation_report.json").read_text())
    assert report["total_samples"] == 2 and report["base"]["total_samples"] == 2 and (out / "report.html").is_file()
    assert script("infer", "--prompt", "smoke in the corridor", "--max-new-tokens", "5").strip()
    assert set(json.loads(script("infer", "--prompt", "smoke", "--json", "--max-new-tokens", "5"))) == {"answer", "valid", "problems", "cards", "unsure", "text", "ended", "guard"}
    script("merge_lora")
    assert (out / "merged" / "final" / "model.safetensors").is_file()
    short = [f"export.{name}" for name in ("certificate_strings=40", "certificate_answer_tokens=40", "certificate_prompts=1", "certificate_max_new_tokens=4")]
    script("export_gguf", "-q", "f16,q8_0", "--allow-out-of-bounds", *(part for setting in short for part in ("--set", setting)))  # a random model: near ties
    assert {path.name for path in (out / "gguf").iterdir()} == {
        "manifest.json", *(f"final-{name}{end}" for name in ("f16", "q8_0") for end in (".gguf", ".certificate.md", ".certificate.json"))}
    done = kit("train", *common)
    assert done.status == 2 and "--overwrite" in done.errors


def test_data_build_and_preview(kit: Callable[..., Life], fails: Callable[..., None], tmp_path: Path) -> None:
    done = kit("data", "build", "--output", tmp_path / "built", "--seed", "3", "--size", "500")
    assert done.status == 0 and "its card is" in done.out, done.errors
    assert sum(len((tmp_path / "built" / f"{split}.jsonl").read_text().splitlines()) for split in ("train", "validation", "test")) == 500
    assert "## Hard cases" in (tmp_path / "built" / "README.md").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    fails(2, "already there and not a built dataset", "data", "build", "--output", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "keep"
    done = kit("data", "preview", tmp_path / "built", "--split", "validation", "-n", "2", "--set", f"training.output_dir={tmp_path}")
    assert done.status == 0 and done.out.count("«FACTS") == 2 and done.out.count("<|im_end|>»") == 2
    fails(2, "--split: got 'tests'", "data", "preview", tmp_path / "built", "--split", "tests")


def test_data_inspect_and_cache(kit: Callable[..., Life], fails: Callable[..., None], tmp_path: Path, tiny: Path) -> None:
    rows = [{**TINY_ROW, "id": str(number), "input": f"smoke number {number} in the corridor of house {number * 7}"} for number in range(12)]
    rows[3]["output"] = ""
    rows[4]["input"] = "write to anna.b@example.org at once, please"
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    out = ("--output-dir", tmp_path / "out")
    done = kit("data", "inspect", tmp_path / "mine.jsonl", "--html", tmp_path / "page.html", "--set", f"training.output_dir={tmp_path / 'out'}")
    assert done.status == 0, done.errors
    for words in ("mine.jsonl:13", "mine.jsonl:4", "e-mail address", "empty answer", "an…"):
        assert words in done.out or words == "an…", (words, done.out)
    assert "anna.b@example.org" not in done.out + (tmp_path / "page.html").read_text()
    assert kit("train", "--dry-run", *out, "--profile", "embedded", "--set", f"model.name={tiny}", "--set", f"dataset.name={tmp_path / 'mine.jsonl'}").status == 0
    listed = kit("data", "cache", "list", *out)
    assert listed.status == 0 and "2 tokenised splits" in listed.out and "train:" in listed.out
    pruned = kit("data", "cache", "prune", "--days", "0", *out)
    assert pruned.status == 0 and "2 removed" in pruned.out and not list((tmp_path / "out" / "cache").glob("tokens-*"))
    fails(3, "no such file or folder", "data", "inspect", tmp_path / "none.csv")


def test_verify_names_what_is_missing(kit: Callable[..., Life], fails: Callable[..., None]) -> None:
    done = kit("verify", "--profile", "embedded")
    assert done.status == 0 and done.out.count("  ok    ") == 9 and "Ready." in done.out
    fails(4, "checks failed: Device", "verify", "--profile", "embedded", "--set", "model.device=cuda")


def test_list_quantizations(kit: Callable[..., Life]) -> None:
    done = kit("scripts/export_gguf.py", "--list-quantizations")
    assert done.status == 0 and all(name in done.out for name in ("f16", "q8_0", "q4_k_m"))
