"""Mutated input for every reader: no exception but the project's own, no second of computing, no memory without bound.

100,000 inputs a reader in `make storm`, a few hundred in `make test`. A failing input is told by its seed.
"""

from __future__ import annotations

import contextlib
import gc
import gzip
import io
import json
import random
import resource
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emergency_kit.artifacts import hash_json, load_manifest, verify_folder
from emergency_kit.config import load_config
from emergency_kit.data.format import parse_answer, parse_json_answer, read_answer
from emergency_kit.data.load import load_split
from emergency_kit.errors import KitError
from emergency_kit.knowledge import cards
from emergency_kit.training.checkpoint import load_training_state
from tests.storm.storm import FULL

EXAMPLES = 100_000 if FULL else 150
MOST_SECONDS, MOST_BYTES = 1.0, 1_500_000_000  # of growth over all inputs of a reader
NASTY = [b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\x85", b"*a", b"&a [*a, *a]", b"&a {b: *a}", b"<<: *a", b"!!python/object/apply:os.system [x]",
         b"[" * 300, b"{" * 300, b"{\"a\":" * 300, b"- " * 300, b"9" * 5000, b"1e999", b"-1", b"NaN", b"Infinity", b"null", b"true", b"~", b"2e-4", b"0x10", b"1_0", b"1:30:00",
         b"2001-13-45", b"'", b'"', b"\\u0000", b"\\ud800", b"#", b": ", b"\n\n", b"\t", b"%YAML 9.9\n", b"---\n", b"...\n", b"| ", b"? ", b"../../../etc/passwd", b"/", b"\xf0\x9f\x9a\x91",
         b"FACTS:", b"GUIDANCE:", b"UNCERTAINTIES", b"\xe2\x80\xa2 ", b"1. ", b"A" * 20000]


def mutate(content: bytes, others: list[bytes], seed: int) -> bytes:
    """A few cuts, flips, repeats and splices, all drawn from the seed."""
    draw, mutated = random.Random(seed), bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        at, kind = draw.randint(0, len(mutated)), draw.randrange(8)
        size = draw.choice((1, 2, 7, 40, 400))
        if kind == 0 and mutated:
            mutated[at % len(mutated)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            mutated[at:at] = draw.choice(NASTY)
        elif kind == 2:
            del mutated[at:at + size]
        elif kind == 3:
            mutated[at:at] = mutated[at:at + size] * draw.choice((1, 3, 50))
        elif kind == 4:
            other = draw.choice(others)
            start = draw.randint(0, len(other))
            mutated[at:at + size] = other[start:start + size]
        elif kind == 5:
            mutated[at:at + size] = draw.randbytes(size)
        elif kind == 6:
            del mutated[at:]
        else:
            mutated[at:at + size] = draw.choice(NASTY)
    return bytes(mutated)


def storm_of(corpus: list[bytes], read: Callable[[bytes], Any]) -> None:
    """Feed a reader; KitError is an answer, anything else, and a second of the processor's time, is a failure."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(corpus) - 1), st.integers(0, 2**63))
    def feed(which: int, seed: int) -> None:
        content = mutate(corpus[which], corpus, seed)
        gc.disable()  # hypothesis keeps every example, and a sweep over 100,000 of them takes seconds that no reader has used
        try:
            started = time.process_time()
            with contextlib.suppress(KitError), contextlib.redirect_stdout(io.StringIO()):
                read(content)
            taken = time.process_time() - started
        finally:
            gc.enable()
        assert taken < MOST_SECONDS, f"{taken:.1f} s"

    feed()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MOST_BYTES


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Callable[[str, bytes], Path]]:
    def save(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    yield save


def test_config(write: Callable[[str, bytes], Path]) -> None:
    corpus = [path.read_bytes() for path in sorted(Path("configs").rglob("*_config.yaml"))]
    storm_of(corpus, lambda content: load_config("embedded", write("overlay.yaml", content)))


def test_settings() -> None:
    corpus = [b"training.learning_rate=1e-4", b'training.report_to=["wandb"]', b"dataset.columns={input: Input}", b"lora.target_modules=[q_proj]", b"model.name=x"]
    storm_of(corpus, lambda content: load_config("embedded", settings=[content.decode("utf-8", errors="surrogateescape")]))


ROWS = [{"id": str(number), "category": "fire", "role": "bystander", "instruction": "What now?", "input": f"A pan burns, case {number}.",
         "output": "FACTS:\n• a pan burns\nUNCERTAINTIES:\n• none\nANALYSIS:\n• fire\nGUIDANCE:\n1. leave", "hazards": ["kitchen_grease_fire"]} for number in range(3)]


def dataset_files(folder: Path) -> dict[str, bytes]:
    """The same three records in every format that is read."""
    import csv

    import pyarrow
    import pyarrow.parquet

    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    flat = [{key: value for key, value in row.items() if isinstance(value, str)} for row in ROWS]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat[0]))
    writer.writeheader()
    writer.writerows(flat)
    table, parquet, arrow = pyarrow.Table.from_pylist(flat), io.BytesIO(), io.BytesIO()
    pyarrow.parquet.write_table(table, parquet)
    with pyarrow.ipc.new_file(arrow, table.schema) as sink:
        sink.write_table(table)
    return {"a.jsonl": lines, "a.json": json.dumps(ROWS).encode(), "a.csv": text.getvalue().encode(), "a.tsv": text.getvalue().replace(",", "\t").encode(),
            "a.parquet": parquet.getvalue(), "a.arrow": arrow.getvalue(), "a.jsonl.gz": gzip.compress(lines)}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow", "a.jsonl.gz"])
def test_datasets(write: Callable[[str, bytes], Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = dataset_files(tmp_path)[name]
    monkeypatch.setattr("tests.storm.test_fuzz.EXAMPLES", EXAMPLES // 7 + 1)

    def read(mutated: bytes) -> None:
        path = write(name, mutated)
        load_split(load_config("embedded", settings=[f"dataset.name={path}", "dataset.grounding=none", f"training.output_dir={tmp_path / 'out'}"]), "train")

    storm_of([content], read)


def test_answers() -> None:
    corpus = [row["output"].encode() for row in ROWS] + [json.dumps({"facts": ["a"], "uncertainties": [], "analysis": ["b"], "guidance": ["Call 112", "10 cm"]}).encode(),
              "FACTS\n- x\n* y\n1. z\nUNCERTAINTIES:\nGUIDANCE:\n1. Call 911 now\n2. Do not move them".encode()]
    storm_of(corpus, lambda content: [read(content.decode("utf-8", errors="replace")) for read in (parse_answer, parse_json_answer, read_answer)])


def test_manifests(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    manifest = {"schema_version": 1, "stage": "train", "files": {"a": "0" * 64, "sub/b": "1" * 64}, "config": {"training": {"seed": 1}}, "parents": [{"path": "x", "sha256": None}]}
    corpus = [json.dumps(manifest).encode(), json.dumps(manifest | {"self": hash_json(manifest)}, indent=1).encode(), json.dumps({"step": 3, "epoch": 1.0, "loss_history": []}).encode()]

    def read(content: bytes) -> None:
        for name in ("manifest.json", "training_state.json"):
            (tmp_path / name).write_bytes(content)
        load_manifest(tmp_path)
        verify_folder(tmp_path)
        load_training_state(tmp_path)

    storm_of(corpus, read)


def test_cards(tmp_path: Path) -> None:
    whole = (cards.CARD_FOLDER / "fire.yaml").read_text(encoding="utf-8")
    corpus = [whole[:whole.index("\n  - id:", whole.index("- id:") + 1)].encode()]

    def read(content: bytes) -> None:
        (tmp_path / "fire.yaml").write_bytes(content)
        cards._load_folder.cache_clear()
        cards.load_cards(tmp_path)

    storm_of(corpus, read)
