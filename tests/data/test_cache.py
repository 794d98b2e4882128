"""The cache of tokenised splits with real processes: two at once, one killed half-way, damage, and what makes an entry stale."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from emergency_kit.config import Resolved
from emergency_kit.data import cache
from emergency_kit.data.cache import list_cache, list_entries, load_rows, lock_cache, prune_cache
from emergency_kit.data.load import open_split
from emergency_kit.data.tokenize import TokenRows
from emergency_kit.errors import DataError
from tests.data import files
from tests.data.files import write

ROWS = [{"id": f"r{number}", "input": f"smoke in hall {number}", "output": f"FACTS\n• Smoke {number}."} for number in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast.from_pretrained("models/SmolLM2-135M-Instruct")


def resolve(folder: Path, *settings: str) -> Resolved:
    return files.resolve(folder / "data", f"training.output_dir={folder}", *settings)


def load(folder: Path, tokenizer: Any, *settings: str) -> TokenRows:
    resolved = resolve(folder, *settings)
    return load_rows(open_split(resolved, "train"), tokenizer, resolved)


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "data" / "train.jsonl", *ROWS)
    write(tmp_path / "data" / "validation.jsonl", *ROWS[:4])
    return tmp_path


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("tokens-*"))


# A process of its own that tokenises the training split; `slow` gives each batch of rows half a second more.
BUILDER = """
import sys, time
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from emergency_kit.data import cache, load, tokenize
from tests.data.test_cache import resolve
slow, folder = sys.argv[1] == "slow", Path(sys.argv[2])
resolved = resolve(folder)
split = load.open_split(resolved, "train")
tokenizer = PreTrainedTokenizerFast.from_pretrained("models/SmolLM2-135M-Instruct")
if slow:
    tokenize.BATCH = 8
    batches = tokenize._batches
    def slowly(*arguments):
        for batch in batches(*arguments):
            print("batch", flush=True)
            time.sleep(0.5)
            yield batch
    tokenize._batches = slowly
print("ready", flush=True)
rows = cache.load_rows(split, tokenizer, resolved)
print("rows", len(rows), rows.ids.sum(), flush=True)
"""


def start(folder: Path, speed: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", BUILDER, speed, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for read in process.stdout:
        if read.strip() == line:
            return
    pytest.fail(f"the process ended without {line!r}")


def test_two_processes_build_the_same_entry_once(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    processes = [start(folder, "slow"), start(folder, "slow")]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    wanted = load(folder, tokenizer)
    assert [output.splitlines()[-1] for output in outputs] == [f"rows 40 {wanted.ids.sum()}"] * 2, outputs
    assert sorted(output.count("batch") for output in outputs) == [0, 5], outputs
    assert len(entries(folder)) == 1 and sorted(path.name for path in (folder / "cache").iterdir()) == [".lock", entries(folder)[0].name]


def test_after_a_builder_that_was_killed_the_next_one_succeeds(folder: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]) -> None:
    process = start(folder, "slow")
    wait_for(process, "batch")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    leftovers = list((folder / "cache").glob(".*.partial"))
    assert len(leftovers) == 1 and entries(folder) == []
    assert len(load(folder, tokenizer)) == 40 and len(entries(folder)) == 1
    assert not leftovers[0].exists()


def test_prune_leaves_a_builder_at_work_alone(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    process = start(folder, "slow")
    wait_for(process, "batch")
    with pytest.raises(DataError, match="another process is tokenising into it; prune again"):
        prune_cache(resolve(folder), 0)
    assert "rows 40" in process.communicate(timeout=60)[0]


def test_a_second_run_reads_what_the_first_one_wrote_and_says_the_same(folder: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "data" / "train.jsonl", *ROWS, {"input": "smoke", "output": ""})
    first = load(folder, tokenizer)
    said = capsys.readouterr().out
    made = {path: path.stat().st_mtime_ns for path in entries(folder)[0].iterdir() if path.name != "about.json"}
    again = load(folder, tokenizer)
    assert list(again) == list(first) and capsys.readouterr().out == said
    assert said.splitlines() == [f"train: {folder}/data/train.jsonl read as input/output (input, output, id)",
                                 f"train: 1 rows rejected (1 empty answer); listed in {entries(folder)[0]}/rejected.jsonl"]
    assert {path: path.stat().st_mtime_ns for path in made} == made
    with pytest.raises(DataError, match="dataset.strict"):
        load(folder, tokenizer, "dataset.strict=true")
    assert json.loads((entries(folder)[0] / "rejected.jsonl").read_text())["place"] == f"{folder}/data/train.jsonl:41"


@pytest.mark.parametrize("name", ["ids.bin", "rows.npz", "overlength.json", "about.json"])
def test_an_entry_with_a_flipped_byte_is_made_anew(folder: Path, tokenizer: PreTrainedTokenizerBase, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = list(load(folder, tokenizer))
    path = entries(folder)[0] / name
    good = path.read_bytes()
    for place in (0, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1:])
        capsys.readouterr()
        assert list(load(folder, tokenizer)) == wanted
        assert "not readable" in capsys.readouterr().out
        assert list(load(folder, tokenizer)) == wanted and "not readable" not in capsys.readouterr().out
    path.unlink()
    assert list(load(folder, tokenizer)) == wanted and len(entries(folder)) == 1


def test_whatever_shapes_the_rows_makes_another_entry(folder: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(*settings: str) -> bool:
        before = entries(folder)
        load(folder, tokenizer, *settings)
        return entries(folder) != before

    assert changed() and not changed()
    assert not changed("training.learning_rate=1e-5") and not changed("dataset.strict=true")
    for setting in ("model.max_seq_length=999", "dataset.overlength=drop", "dataset.max_samples=20", "dataset.columns={category: id}", "dataset.grounding=cards"):
        assert changed(setting), setting
    assert changed("dataset.max_samples=20", "training.seed=1") and not changed("training.seed=1")
    assert changed("dataset.grounding=cards", "dataset.top_k=1")
    write(folder / "data" / "train.jsonl", *ROWS[:-1])
    assert changed()
    template = tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", template.replace("<|im_start|>user", "<|im_start|> user") + " ")
    assert changed()
    monkeypatch.setattr(tokenizer, "chat_template", template)
    monkeypatch.setattr("emergency_kit.data.format.SYSTEM_PROMPT", "You answer.")
    assert changed()
    monkeypatch.setattr(cache, "_code_digest", lambda: "other code")
    assert changed()


def test_every_file_that_shapes_rows_counts_as_code() -> None:
    imported: set[str] = set()
    for name in ("load", "tokenize", "sources"):
        tree = ast.parse(Path(f"emergency_kit/data/{name}.py").read_text())
        modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        imported |= {module.removeprefix("emergency_kit.").replace(".", "/") + ".py" for module in modules if module.startswith(("emergency_kit.data.", "emergency_kit.knowledge."))}
    # The embedded dataset stands in the digest with its content; a rejected row becomes no tokens; the lanes of a stream stand in its own digest.
    assert imported - {"data/build.py", "data/rejected.py", "data/lanes.py"} <= set(cache._CODE)
    assert all((Path("emergency_kit") / name).is_file() for name in cache._CODE)


def test_a_file_that_changes_while_it_is_tokenised_leaves_no_entry(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    resolved = resolve(folder)
    split = open_split(resolved, "train")

    class Meddling:
        """The real tokenizer, and a file that grows while its rows are tokenised."""

        def __getattr__(self, name: str) -> Any:
            if name == "backend_tokenizer" and any((folder / "cache").glob(".*.partial")):
                with (folder / "data" / "train.jsonl").open("a") as stream:
                    stream.write(json.dumps(ROWS[0]) + "\n")
            return getattr(tokenizer, name)

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return tokenizer(*arguments, **options)

    with pytest.raises(DataError, match="changed while it was read; run again"):
        load_rows(split, Meddling(), resolved)
    assert entries(folder) == [] and [path.name for path in (folder / "cache").iterdir()] == [".lock"]


def test_a_failure_leaves_nothing_behind(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    write(folder / "data" / "train.jsonl", *ROWS, {"id": "long", "input": "x " * 3000, "output": "A"})
    with pytest.raises(DataError, match="record long: .* model.max_seq_length is 1024"):
        load(folder, tokenizer)
    assert [path.name for path in (folder / "cache").iterdir()] == [".lock"]


def test_list_and_prune(folder: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]) -> None:
    resolved = resolve(folder)
    list_cache(resolved)
    assert capsys.readouterr().out == f"0 tokenised splits in {folder}/cache, 0.0 MB\n"
    rows = load(folder, tokenizer)
    load(folder, tokenizer, "dataset.max_samples=5")
    fresh, old = sorted(list_entries(folder / "cache"), key=lambda entry: -entry.rows)
    assert (fresh.rows, fresh.tokens, fresh.split, fresh.dataset, old.rows) == (40, len(rows.ids), "train", f"{folder}/data", 5)
    month_ago = time.time() - 40 * 86400
    os.utime(old.folder / "about.json", (month_ago, month_ago))
    (folder / "cache" / ".dead.partial").mkdir()
    (folder / "cache" / ".dead.partial" / "ids.bin").write_bytes(b"x" * 1000)
    (folder / "cache" / "tokens-broken").mkdir()
    capsys.readouterr()
    list_cache(resolved)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{fresh.folder.name}  {folder}/data train: 40 rows, {len(rows.ids):,} tokens") and "used 40.0 days ago" in lines[1]
    assert lines[2].startswith("2 tokenised splits in") and lines[2].endswith("make room: emergency-kit data cache prune")
    prune_cache(resolved, 30)
    assert "3 removed from" in (said := capsys.readouterr().out) and "1 kept" in said
    assert entries(folder) == [fresh.folder] and list(rows) == list(load(folder, tokenizer))
    prune_cache(resolved, 0)
    assert entries(folder) == []
    assert rows[39]["input_ids"]  # rows that are in use stay readable


def test_a_waiting_process_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lock_cache(folder / "cache"):
        process = start(folder, "quick")
        wait_for(process, "ready")
        assert process.stdout is not None
        assert process.stdout.readline().strip() == f"Waiting for another process that tokenises into {folder}/cache"
    assert "rows 40" in process.communicate(timeout=60)[0]
