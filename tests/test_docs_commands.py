"""Every command of README.md and docs/*.md, really run, page by page, in a scratch copy: `make test-docs` (the fast suite only looks at the lists below).

The bundled model is trained on eight records and answers with a few tokens: what is shown is that the commands do what they say, not how good the model is. The tutorials
have their own run. A page's commands go in their order; what a command needs and an earlier page made, or what is in its way, is seen to by NEEDED and CLEARED.
Limits: NOT_RUN, each with its reason.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Iterator

import pytest
import yaml

PAGES = [Path("docs/Getting-Started.md"), Path("README.md"),
         *(path for path in sorted(Path("docs").glob("*.md")) if path.name != "Getting-Started.md")]
SMALL: dict[str, dict[str, dict[str, Any]]] = {
    "dataset_config.yaml": {"dataset": {"max_samples": 8, "max_eval_samples": 2}},
    "training_config.yaml": {
        "training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "warmup_steps": 1, "eval_steps": 2, "save_steps": 2},
        "evaluation": {"max_samples": 2, "batch_size": 2, "max_new_tokens": 16}, "inference": {"max_new_tokens": 16},
        "export": {"certificate_strings": 20, "certificate_answer_tokens": 40, "certificate_prompts": 1, "certificate_max_new_tokens": 16}}}
# What a page shows in the large, as it is run here.
SMALLER = {"checkpoint-20": "checkpoint-2", "--max-steps 30": "--max-steps 2", "max_samples=200": "max_samples=4", "--max-samples 100": "--max-samples 2",
           "learning_rate=1e-3,2e-3,4e-3": "learning_rate=1e-3,2e-3", "--max-new-tokens 2000": "--max-new-tokens 16", "outputs/a outputs/b": "outputs/checkpoints/final outputs/experiment1", "--lr-range 1e-5:1e-1": "--lr-range 1e-5:1e-1 --max-steps 4"}
# Commands (the beginning of a line) that are not run, and why.
NOT_RUN = {
    "make test": "the whole suite, an hour",
    "make prove-kit": "every browser's and computer's start of a kit; a target of its own",
    "make kit": "npm and the package index; the tutorial of the stick packs a kit",
    "emergency-kit kit --verify": "needs that kit",
    "make evaluate-ai": "a key and its costs", "make evaluate-openai": "a key and its costs", "make evaluate-gemini": "a key and its costs",
    "emergency-kit evaluate --ai": "a judge that listens; tests/evaluation/test_judge.py has one",
    "emergency-kit evaluate --checkpoint http": "a server that listens; tests/evaluation/test_endpoint.py has one",
    "emergency-kit evaluate --red-team": "an hour; tests/evaluation does each part on a tiny model",
    "make upload-": "the Hub, and rights there; tests/export/test_hub.py has a stand-in for its server", "emergency-kit upload-": "likewise",
    "python scripts/export_gguf.py -q q4_k_m --push-to-hub": "the Hub, and rights there",
    "emergency-kit train --set dataset.name='s3": "a bucket; tests/data/test_stream.py streams from files",
    "torchrun": "several GPUs, or four whole models in memory; make prove-ranks runs it on a tiny one",
    "accelerate launch": "several GPUs, or four whole models in memory; make prove-ranks runs it on a tiny one",
    "make train NPROC=4": "four whole models in memory; make prove-ranks runs it on a tiny one",
    "TORCH_INDEX=URL": "an address is to be filled in",
    "pip install -e": "it would change the environment that this suite runs in; make prove-deepspeed has one of its own",
    "watch -n 1 nvidia-smi": "a GPU, and it does not end", "nvidia-smi": "a GPU",
    "tail -f": "does not end"}
# A path or verb that a command needs, and what makes it where it is not there.
NEEDED = [
    (r"runs compare", "outputs/experiment1", "emergency-kit train --output-dir outputs/experiment1"),
    (r"make (?:infer|serve|evaluate|merge|export)|scripts/(?:infer|evaluate|merge|export)|kit (?:infer|serve|evaluate|merge|gate|runs)|lora\.adapter|checkpoints/final|ls -la|du -sh",
     "outputs/checkpoints/final", "emergency-kit train --overwrite"),
    (r"^(?!.*merge_lora).*merged/final", "outputs/merged/final", "emergency-kit merge --overwrite"),
    (r"-q8_0\.gguf|-q4_k_m\.gguf|--list-exports", "outputs/gguf/final-q4_k_m.gguf", "emergency-kit export-gguf --overwrite"),
    (r"\bgate\b", "outputs/evaluation_report.json", "emergency-kit evaluate"),
    (r"data (?:inspect|preview)|my\.jsonl", "outputs/data/embedded/train.jsonl", "emergency-kit data build"),
    (r"my\.jsonl", "my.jsonl", "head -n 40 outputs/data/embedded/train.jsonl > my.jsonl"),
    (r"--resume-from", "outputs/checkpoints/checkpoint-2", "emergency-kit train --overwrite")]
# What is in a command's way, or would make it another command: a finished model, another run's checkpoints, a verdict on a model that is trained for a test.
CLEARED = [
    (r"--resume-from", "outputs/checkpoints/final"),
    (r"^(?:make train|make pipeline|python scripts/train\.py(?!.*(?:--resume-from|--output-dir))|emergency-kit train --(?:model-name|set training))", "outputs/checkpoints/{final,crisis_agent_v2,preferred,checkpoint-*}"),
    (r"train\.py.*--output-dir", "outputs/experiment*"), (r"sweep", "outputs/sweep"), (r"^make merge|merge_lora", "outputs/merged"),
    (r"make export|export_gguf", "outputs/verdict.json"), (r"make export-(?:gguf|ollama|lmstudio)|export_gguf\.py.*--checkpoint", "outputs/gguf")]
NOT_TO_SHIP = 7
RUN: set[str] = set()  # commands that an earlier page has had run


def blocks(page: Path) -> list[str]:
    """A page's commands in their order, each once, without their comments."""
    found = [line.strip() for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL) for line in block.replace("\\\n", " ").splitlines()]
    return list(dict.fromkeys(line.split(" #")[0].strip() for line in found if line and not line.startswith("#")))


def reason_not_to_run(line: str) -> str:
    return next((why for start, why in NOT_RUN.items() if line.startswith(start)), "")


def test_the_list_of_what_is_not_run_is_current() -> None:
    lines = [line for page in PAGES for line in blocks(page)]
    assert len(lines) > 80
    assert not [start for start in NOT_RUN if not any(line.startswith(start) for line in lines)], "no page shows these any more"
    assert not [text for text in SMALLER if not any(text in line for line in lines)], "no page shows these any more"
    assert sum(not reason_not_to_run(line) for line in lines) > 60


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the project with small settings, beside the same environment and base model."""
    folder = tmp_path_factory.mktemp("docs") / "kit"
    shutil.copytree(Path(), folder, ignore=shutil.ignore_patterns(".git", ".venv", "models", "outputs", "__pycache__", ".pytest_cache"))
    for name in (".venv", "models"):
        (folder / name).symlink_to(Path(name).resolve())
    for name in ("requirements.lock", "requirements-test.lock", "pyproject.toml"):
        os.utime(folder / name, (0, 0))  # older than the environment, which is not to be made again
    for name, sections in SMALL.items():
        path = folder / "configs/embedded" / name
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        for section, values in sections.items():
            content[section] = content.get(section, {}) | values
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
    yield folder
    shutil.rmtree(folder)


def bash(line: str, folder: Path) -> tuple[int, str]:
    environment = os.environ | {"PATH": f"{folder / '.venv/bin'}:{os.environ['PATH']}", "PYTHONPATH": str(folder), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
                                # The environment is another folder's, and is not to be told of a new place; ARGS are those of make test-docs.
                                "MAKEFLAGS": "STALE=", "ARGS": ""}
    process = subprocess.Popen(["bash", "-c", line], cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    if re.search(r"\bserve\b", line):
        return served(process)
    said, _ = process.communicate("n\n" if "clean" in line else "quit\n", timeout=1800)
    return process.returncode, said


def served(process: subprocess.Popen[str]) -> tuple[int, str]:
    """A server is stopped as soon as it says where it is."""
    said = ""
    for line in process.stdout:
        said += line
        if "Serving " in line:
            time.sleep(1)
            os.killpg(process.pid, signal.SIGINT)
    return process.wait(timeout=60) and 0 if "Serving " in said else process.wait(), said


def prepare(line: str, folder: Path) -> None:
    for pattern, path in CLEARED:
        if re.search(pattern, line):
            bash(f"rm -rf {path}", folder)
    for pattern, path, command in NEEDED:
        if re.search(pattern, line) and not (folder / path).exists() and not line.startswith(("make train", "python scripts/train.py --m", "make pipeline")):
            code, said = bash(command, folder)
            assert code == 0, f"{command}: {said[-2000:]}"
    for pattern, path in CLEARED[:1]:
        if re.search(pattern, line):
            bash(f"rm -rf {path}", folder)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_runs(page: Path, scratch: Path) -> None:
    if os.environ.get("EMERGENCY_KIT_DOCS") != "full":
        pytest.skip("long: make test-docs")
    failed = []
    for line in blocks(page):
        if line in RUN:
            continue
        if why := reason_not_to_run(line):
            print(f"{page}: not run ({why}): {line}", flush=True)
            continue
        shown = line
        for large, small in SMALLER.items():
            line = line.replace(large, small)
        prepare(line, scratch)
        begun = time.monotonic()
        code, said = bash(line, scratch)
        well = code == 0 or line.startswith("grep ") and code == 1 or "do not ship" in said and code in (2, NOT_TO_SHIP)
        print(f"{page}: {'ok' if well else f'exit code {code}'}, {time.monotonic() - begun:.0f} s: {line}", flush=True)
        RUN.add(shown)
        if not well:
            failed.append(f"{line}: exit code {code}: {said[-600:]}")
    assert not failed, "\n\n".join(failed)
