"""Sources: every format and packing, folders and globs, and a Hub that is a small server on this machine."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path
from typing import Any, Iterator

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emergency_kit.data.formats import read_file
from emergency_kit.data.load import load_split
from emergency_kit.data.sources import Files, Hub, open_source
from emergency_kit.errors import DataError
from tests.data.files import FORMATS, PACKINGS, resolve, write

ROWS = [{"input": f"line one\nline two, \"quoted\" {number} é 火", "output": "FACTS\n• Fire.", "cards": ["stroke"] * (number % 3), "fits": 1} for number in range(11)]


def open_files(source: object, *settings: str) -> Files:
    source_ = open_source(resolve(source, *settings).config.dataset)
    assert isinstance(source_, Files)
    return source_


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_and_packing_gives_the_same_records(tmp_path: Path, kind: str, packing: str) -> None:
    (tmp_path / f"rows.{kind}{packing}").write_bytes(PACKINGS[packing](FORMATS[kind](ROWS)))
    records = load_split(resolve(tmp_path, "dataset.validation_split=train"), "train")
    assert [(r.input, r.output, list(r.cards or ()), r.fits) for r in records] == [(r["input"], r["output"], r["cards"], 1) for r in ROWS]


# No lone surrogates, which are rejected, and no NUL or bare CR, which CSV cannot tell from its own line ends everywhere.
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00\r"), min_size=1, max_size=30).filter(lambda text: text.strip())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=st.lists(st.fixed_dictionaries({
    "id": st.integers(0, 10**6).map(lambda number: f"r{number}"), "instruction": TEXT, "input": TEXT, "output": TEXT,
    "category": st.sampled_from(["", "fire", "gas"]), "cards": st.none() | st.lists(st.sampled_from(["stroke", "a, b", "[x"]), max_size=3)}),
    min_size=1, max_size=8), packing=st.sampled_from(list(PACKINGS)))
def test_any_list_of_records_comes_back_equal_from_any_format(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], packing: str) -> None:
    folder = tmp_path_factory.mktemp("formats")
    read = {}
    for kind, encode in FORMATS.items():
        path = folder / f"rows.{kind}{packing}"
        path.write_bytes(PACKINGS[packing](encode(rows)))
        read[kind] = [r.to_json() for r in load_split(resolve(path, "dataset.validation_split=train", f"training.output_dir={folder}"), "train")]
    for kind, records in read.items():
        assert records == read["jsonl"], kind
    assert [(r["id"], r["instruction"], r["input"], r["output"], r["category"], r["cards"]) for r in map(json.loads, read["jsonl"])] == [
        (r["id"], r["instruction"], r["input"], r["output"], r["category"], r["cards"]) for r in rows]


def test_splits_are_told_by_file_and_folder_names(tmp_path: Path) -> None:
    for name in ("train-00000-of-2.jsonl", "train-00001-of-2.jsonl", "dev.csv.gz", "test/part.jsonl", "notes.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    files = open_files(tmp_path)
    names = {split: [path.name for path in files.files(split)] for split in files.splits()}
    assert list(names) == ["train", "validation", "test"]
    assert names == {"validation": ["dev.csv.gz"], "train": ["train-00000-of-2.jsonl", "train-00001-of-2.jsonl"], "test": ["part.jsonl"]}
    assert [path.name for path in files.ignored] == ["notes.json"]


@pytest.mark.parametrize("name, split", [
    ("pans_test.jsonl", "test"), ("train.jsonl", "train"), ("training.v2.jsonl", "train"), ("val-1.jsonl", "validation"),
    ("testament.jsonl", "train"), ("latest.jsonl", "train"), ("all.jsonl", "train")])
def test_one_file(tmp_path: Path, name: str, split: str) -> None:
    folder = tmp_path / "test" / "dev"  # what stands above the named file says nothing
    assert open_files(write(folder / name, ROWS[0])).splits() == [split]


def test_globs(tmp_path: Path) -> None:
    for name in ("a/train.jsonl", "b/train.jsonl", "b/test.jsonl", "b/readme.txt"):
        write(tmp_path / name, ROWS[0])
    files = open_files(tmp_path / "*" / "*.jsonl")
    assert [str(path.relative_to(tmp_path)) for path in files.files("train")] == ["a/train.jsonl", "b/train.jsonl"]
    assert len(list(files.rows("test"))) == 1
    assert open_files(tmp_path / "**" / "test.*").splits() == ["test"]


def test_the_digest_is_of_the_bytes_not_the_names(tmp_path: Path) -> None:
    one, same, other = write(tmp_path / "a.jsonl", ROWS[0]), write(tmp_path / "b.jsonl", ROWS[0]), write(tmp_path / "c.jsonl", ROWS[1])
    digests = [open_files(path).digest("train") for path in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]


JSONL = FORMATS["jsonl"](ROWS * 50)


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b"", "empty; expected one row"),
    ("a.jsonl.gz", gzip.compress(JSONL)[:200], "damaged or cut short"),
    ("a.jsonl.gz", b"no gzip", "damaged or cut short"),
    ("a.jsonl.gz", gzip.compress(JSONL)[:-6] + b"\0" * 6, "damaged or cut short"),
    ("a.jsonl.zst", pa.compress(JSONL, codec="zstd", asbytes=True)[:-9], "cannot be read.*[Tt]runcated"),
    ("a.jsonl.zst", b"no zstd at all", "cannot be read"),
    ("a.parquet", FORMATS["parquet"](ROWS)[:-20], "damaged or cut short"),
    ("a.arrow", b"no arrow file", "damaged or cut short"),
    ("a.json", b'[{"input": "a"', "not valid JSON"),
    ("a.json", b'{"input": "a"}', "expected a list of objects"),
    ("a.json", "é".encode("latin1"), "not UTF-8 at byte 0"),
    ("a.csv", b'input,output\nx,"y\nz,z\n', r"a.csv:2: not valid CSV \(unexpected end of data\)"),
    ("a.csv", b"input,input\n1,2\n", "column 'input' stands twice"),
    ("a.jsonl", '{"input": "a"}'.encode("utf-16"), "UTF-16; save the file as UTF-8"),
])
def test_a_file_that_cannot_be_read_is_one_error_with_its_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        list(read_file(tmp_path / name))
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_broken_lines_are_rows_with_a_problem_and_the_others_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n\n{"a": \n[1]\n{"a": "caf\xe9"}\n{"a": 2}')
    rows = list(read_file(tmp_path / "a.jsonl"))
    assert [(row.place.split("/")[-1], row.problem.split(" (")[0]) for row in rows] == [
        ("a.jsonl:1", ""), ("a.jsonl:3", "not a whole JSON object"), ("a.jsonl:4", "not a JSON object but list"), ("a.jsonl:5", "not UTF-8"), ("a.jsonl:6", "")]
    (tmp_path / "a.csv").write_bytes(b'a,b\n1,"two\nlines"\n3\n"4"x,5\ncaf\xe9,6\n\n7,8\n')
    rows = list(read_file(tmp_path / "a.csv"))
    assert [(row.place.split("/")[-1], row.problem.split(" (")[0]) for row in rows] == [
        ("a.csv:2", ""), ("a.csv:4", "not as many fields as the header"), ("a.csv:5", "not valid CSV"), ("a.csv:6", "not UTF-8"), ("a.csv:8", "")]


@pytest.mark.parametrize("name, message", [
    ("none.jsonl", "no such file or folder"), ("*.jsonl", "no file matches"), ("~/none-of-these.csv", "no such file"), (".", "no file that can be read; expected .jsonl")])
def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        open_source(resolve(name).config.dataset)


# --- the Hub -------------------------------------------------------------------------------------

HUB_FILES = {
    "README.md": "---\nconfigs:\n- config_name: small\n  data_files: [{split: train, path: small.jsonl}]\n"
                 "- config_name: large\n  data_files: [{split: train, path: large.jsonl}, {split: dev, path: small.jsonl}]\n"
                 "- config_name: many\n  data_files: [{split: train, path: part-*.jsonl}, {split: dev, path: small.jsonl}]\n---\n",
    "small.jsonl": '{"instruction": "What now?", "response": "small"}\n',
    **{f"part-{part}.jsonl": "".join(f'{{"instruction": "What now?", "input": "{part} {number}", "response": "Leave."}}\n' for number in range(3 + part % 2)) for part in range(4)},
    "large.jsonl": "".join(f'{{"instruction": "What now, number {number}?", "response": "COMMIT"}}\n' for number in range(3)),
}
COMMITS = {"main": "a" * 40, "v2": "b" * 40}


class HubServer(http.server.BaseHTTPRequestHandler):
    """The endpoints of the Hub that `datasets.load_dataset` asks, for one private dataset, me/pans."""

    asked: list[str]

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.asked.append(path)
        match = re.fullmatch(r"(?:/api)?/datasets/me/pans/(resolve|revision|tree|paths-info)/([^/]+)/?(.*)", path)
        if self.headers.get("authorization") != "Bearer hf_right":
            return self._answer(b"{}", 401, X_Error_Code="RepoNotFound")
        if match is None:
            return self._answer(b"{}", 404)
        what, revision, name = match.groups()
        commit = COMMITS.get(revision, revision)
        if commit not in COMMITS.values():
            return self._answer(b"{}", 404, X_Error_Code="RevisionNotFound")
        files = {name: text.replace("COMMIT", commit).encode() for name, text in HUB_FILES.items()}
        if what == "resolve":
            if name not in files:
                return self._answer(b"{}", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return self._answer(files[name], ETag=f'"{hashlib.sha1(files[name]).hexdigest()}"', X_Repo_Commit=commit)
        wanted = urllib.parse.parse_qs(body.decode()).get("paths", []) if body[:1] != b"{" else json.loads(body)["paths"]
        entries = [{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                   for name, data in files.items() if what == "tree" or name in wanted]
        siblings = [{"rfilename": name} for name in files]
        return self._answer(json.dumps({"id": "me/pans", "sha": commit, "siblings": siblings} if what == "revision" else entries).encode())

    do_HEAD = do_POST = do_GET

    def _answer(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture()
def hub(tmp_path: Path) -> Iterator[Any]:
    handler = type("Handler", (HubServer,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.asked = handler.asked  # type: ignore[attr-defined]
    yield server
    server.shutdown()
    server.server_close()


LOAD = """
import sys; from tests.data.files import resolve; from emergency_kit.data.load import load_split; from emergency_kit.errors import DataError
resolved = resolve(*sys.argv[1:])
try: print('answers', [record.output for record in load_split(resolved, 'train')], [record.output for record in load_split(resolved, 'validation')])
except DataError as error: print('DataError', error)
"""


def ask_hub(home: Path, server: Any, name: str, *settings: str, token: str = "hf_right", code: str = LOAD, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh process, as `datasets` reads its environment once; by itself it loads the training split and prints the answers."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", code, name, "dataset.config_name=large", f"training.output_dir={home}", *settings], capture_output=True, text=True, timeout=120,
        env={**clean, "HF_HOME": str(home), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": token, **environment})


def test_a_private_hub_dataset_by_revision_and_config_then_from_the_cache(tmp_path: Path, hub: Any) -> None:
    second = str(["b" * 40] * 3) + " ['small']"
    assert "DataError dataset me/pans:v2: cannot be loaded from the Hub" in (refused := ask_hub(tmp_path, hub, "me/pans:v2", token="hf_wrong")).stdout
    assert "HF_TOKEN" in refused.stdout and "Traceback" not in refused.stderr
    done = ask_hub(tmp_path, hub, "me/pans:v2")
    assert f"answers {second}" in done.stdout, done.stdout + done.stderr[-2000:]
    assert "train: me/pans:v2 (train) read as instruction/response (instruction, response)" in done.stdout
    assert "validation: me/pans:v2 (dev) read as" in done.stdout
    assert "/datasets/me/pans/resolve/v2/README.md" in hub.asked and f"/datasets/me/pans/resolve/{'b' * 40}/large.jsonl" in hub.asked
    assert "DataError dataset me/pans:v9: cannot be loaded from the Hub (Revision 'v9' doesn't exist" in ask_hub(tmp_path, hub, "me/pans:v9").stdout
    hub.shutdown()
    hub.server_close()
    offline = {"HF_HUB_OFFLINE": "1"}
    assert f"answers {second}" in ask_hub(tmp_path, hub, "me/pans", "dataset.revision=v2", **offline).stdout
    # `datasets` would hand out the cached v2 for any revision.
    assert "revision 'main' is not to be had" in ask_hub(tmp_path, hub, "me/pans", **offline).stdout
    assert "DataError dataset me/other: cannot be loaded from the Hub" in ask_hub(tmp_path, hub, "me/other", **offline).stdout


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emergency_kit.data.sources.Hub.__init__", lambda self, dataset: None)
    monkeypatch.chdir(tmp_path)
    for name in ("squad", "me/pans", "me/pans:v1.0", "me/pans:refs/pr/1"):
        assert isinstance(open_source(resolve(name).config.dataset), Hub), name
    for name in ("./me/pans", "/me/pans", "~/pans", "pans.jsonl", "me/pans/*.csv", "a/b/c", "me/pans.csv.gz"):
        with pytest.raises(DataError, match="no such file|no file matches"):
            open_source(resolve(name).config.dataset)


def test_two_revisions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dataset.revision is 'v1'; name one revision"):
        open_source(resolve("me/pans:v2", "dataset.revision=v1").config.dataset)


def test_a_private_hub_dataset_is_streamed(tmp_path: Path, hub: Any) -> None:
    done = ask_hub(tmp_path, hub, "me/pans:v2", "dataset.streaming=true")
    assert f"answers {['b' * 40] * 3} ['small']" in done.stdout, done.stdout + done.stderr[-2000:]
    assert not list(tmp_path.rglob("*.arrow")), "nothing is prepared"


STREAM = """
import sys; from tests.data.test_stream import open_rows, read_by, resolve, told
resolved = resolve(*sys.argv[1:], 'dataset.streaming=true', 'dataset.config_name=many', 'training.max_steps=9', 'dataset.shuffle_window=4')
rows = open_rows(resolved, None)
order = [told(rows.record(place)) for place in range(32)]
print(rows.describe(), sorted(filter(None, order[:16])), [told(open_rows(resolved, None, rows.state_at(18)).record(18))] == order[18:19])
found, ranks, _ = read_by(2, range(32), lambda rank: open_rows(resolved, None, None, rank, 2))
print(found == order, read_by(4, range(18, 32), lambda rank: open_rows(resolved, None, ranks[0].state_at(18), rank, 4))[0] == order[18:])
"""
ONE_LANE = """
import sys; from tests.data.test_stream import open_split, resolve
source = open_split(resolve(*sys.argv[1:], 'dataset.streaming=true', 'dataset.config_name=many'), 'train').source
print([row['place'] for row in source.stream('train', source.lanes('train', 2), 1)])
"""


def test_a_hub_dataset_of_several_shards_is_divided_among_ranks(tmp_path: Path, hub: Any) -> None:
    done = ask_hub(tmp_path, hub, "me/pans:v2", code=STREAM)
    records = sorted(f"{part} {number}" for part in range(4) for number in range(3 + part % 2))
    assert f"Stream: 4 files in 4 lanes {records} True\n" in done.stdout and "True True\n" in done.stdout, done.stdout + done.stderr[-2000:]
    hub.asked.clear()
    done = ask_hub(tmp_path, hub, "me/pans:v2", code=ONE_LANE)
    assert str([f"me/pans:v2/train, lane 1 of 2:{number}" for number in range(1, 9)]) in done.stdout, done.stdout + done.stderr[-2000:]
    assert {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path and "part" in path} == {"part-0.jsonl", "part-1.jsonl", "part-3.jsonl"}, "datasets itself looks at the first; no other is read"


# --- addresses -----------------------------------------------------------------------------------


def test_addresses_are_read_like_files(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for kind, packing in (("jsonl", ".gz"), ("csv", ".zst"), ("parquet", ""), ("arrow", ".gz"), ("json", "")):
        memory.pipe(f"/bucket/{kind}/train-0.{kind}{packing}", PACKINGS[packing](FORMATS[kind](ROWS)))
        memory.pipe(f"/bucket/{kind}/dev.jsonl", FORMATS["jsonl"](ROWS[:2]))
        for name in (f"memory://bucket/{kind}", f"memory://bucket/{kind}/*.*"):
            resolved = resolve(name, f"training.output_dir={tmp_path}")
            assert [record.input for record in load_split(resolved, "train")] == [row["input"] for row in ROWS], name
            assert len(load_split(resolved, "validation")) == 2
    files = open_files("memory://bucket/jsonl")
    before = files.digest("train")
    assert before == files.digest("train")
    memory.pipe("/bucket/jsonl/train-0.jsonl.gz", PACKINGS[".gz"](FORMATS["jsonl"](ROWS[:5])))
    assert files.digest("train") != before


@pytest.mark.parametrize("name, message", [
    ("s3://bucket/*.jsonl.gz", r"s3:// needs a package that is not installed; next: pip install s3fs$"), ("memory://nowhere/*.csv", "no file matches; check dataset.name$"),
    ("memory://nowhere", "no such file or folder; check dataset.name$"), ("s4://bucket", "Protocol not known: s4; expected one of s3, gs, "),
    ("http://127.0.0.1:9/train.jsonl", "no such file, or its server cannot be reached; check dataset.name$")])
def test_addresses_where_nothing_is(name: str, message: str) -> None:
    if name.startswith("s3") and importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(DataError, match=rf"^dataset {re.escape(name)}: {message}"):
        open_source(resolve(name).config.dataset)


def test_a_file_behind_http_and_one_that_breaks_off(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(FORMATS["jsonl"](ROWS))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(FORMATS["jsonl"](ROWS))[:-20])
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda self, *_: None})
    handler = functools.partial(quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        records = load_split(resolve(f"{address}/rows.jsonl?key=1", "dataset.validation_split=train", f"training.output_dir={tmp_path}"), "train")
        assert [record.input for record in records] == [row["input"] for row in ROWS]
        with pytest.raises(DataError, match=f"{address}/cut.jsonl.gz: damaged or cut short"):
            load_split(resolve(f"{address}/cut.jsonl.gz", "dataset.validation_split=train", f"training.output_dir={tmp_path}"), "train")
        with pytest.raises(DataError, match="no such file, or its server"):
            open_source(resolve(f"{address}/none.jsonl").config.dataset)
        server.shutdown()
