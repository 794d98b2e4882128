"""What goes into a kit, what is left out, and what stands in the way."""

import html
import json
import shutil
import subprocess
import sys
import time
import zipfile

import pytest

from emergency_kit.artifacts import hash_file, load_manifest, save_json, verify_folder
from emergency_kit.errors import ExportError, UsageError, VerdictError
from emergency_kit.export.modelfile import parse_modelfile
from emergency_kit.files import folder_bytes
from emergency_kit.kit import fetch
from emergency_kit.kit.check import verify_kit
from emergency_kit.kit.pack import find_export, kit, pick_model, read_size, split
from emergency_kit.knowledge.cards import load_cards
from tests.kit.conftest import pack, resolve

ALWAYS = {"README.txt", "SHA256SUMS", "cards.html", "certificate.json", "certificate.md", "index.html", "licences", "manifest.json", "page", "verdict.json", "verify.sh"}
WITH_MODEL = {"computer", "ollama", "self_test.json", "start-linux.sh", "start-macos.command", "start-windows.bat"}


def test_a_kit_holds_exactly_these_and_its_model_in_parts_is_the_file(plain, model):
    assert {path.name for path in plain.iterdir()} == ALWAYS | WITH_MODEL
    parts = sorted((plain / "page" / "model").iterdir())
    assert len(parts) == 4 and max(path.stat().st_size for path in parts) == 8_000_000
    assert b"".join(path.read_bytes() for path in parts) == model.read_bytes()
    settings = json.loads((plain / "page" / "kit.json").read_text())
    assert [part["sha256"] for part in settings["model"]["parts"]] == [hash_file(path) for path in parts] and settings["model"]["sha256"] == hash_file(model)
    assert json.loads((plain / "certificate.json").read_text())["sha256"] == hash_file(model)
    manifest = load_manifest(plain)
    assert manifest["kit"]["verdict"]["verdict"] == "none" and manifest["parents"] == [{"path": str(model), "sha256": hash_file(model)}] and not verify_folder(plain)
    assert json.loads((plain / "verdict.json").read_text())["sha256"] == hash_file(model)
    assert len(json.loads((plain / "self_test.json").read_text())["questions"]) == 3
    assert parse_modelfile((plain / "ollama" / "Modelfile").read_text()).source == f"./{model.name}"
    assert f"cat ../page/model/{parts[0].name}" in (plain / "ollama" / "README.txt").read_text()
    assert (plain / "start-linux.sh").stat().st_mode & 0o111 and not list(plain.parent.glob(".*"))
    assert not list(plain.rglob("*@*")) and "@" not in (plain / "README.txt").read_text().replace("@wllama", "")
    for path in plain.rglob("*"):
        assert " " not in path.name
    assert {"emergency-kit-LICENSE", "llama.cpp-LICENSE", "README.txt"} <= {path.name for path in (plain / "licences").iterdir()}


def test_readme_says_what_it_is_not_and_what_was_left_out(plain):
    text = (plain / "README.txt").read_text()
    assert "not a doctor" in text and "no clinician has reviewed it" in text and "call for help first" in text
    assert "llama.cpp for the browser: --no-browser" in text and "llama.cpp for computers: no platform was named" in text
    assert max(map(len, text.splitlines())) < 130


def test_the_program_in_a_kit_is_whole(plain):
    with zipfile.ZipFile(plain / "computer" / "emergency-kit.zip") as archive:
        names = set(archive.namelist())
    assert {"kit.yaml", "configs/embedded/model_config.yaml", "emergency_kit/kit/boot.py", "emergency_kit/knowledge/cards/fire.yaml"} <= names and not any("__pycache__" in name for name in names)


def test_every_card_and_source_is_on_paper(plain):
    text = html.unescape((plain / "cards.html").read_text())
    for card in load_cards().values():
        assert f'<section id="{card.id}">' in text and all(source.body in text for source in card.sources)
    assert "<script" not in text and "http" not in text.replace("http-equiv", "")


def test_a_size_limit_leaves_out_what_does_not_fit_and_says_so(plain, outputs, model, tmp_path, capsys):
    small = pack(outputs, model, tmp_path / "small", size_limit="45MB")
    assert {path.name for path in small.iterdir()} == ALWAYS and folder_bytes(small) <= 45_000_000
    assert json.loads((small / "page" / "kit.json").read_text())["model"] is None
    said = capsys.readouterr().out
    assert f"LEFT OUT the model {model.name}" in said and "27.2 MB, with" in said and f"the model {model.name}" in (small / "README.txt").read_text().split("left out")[1]
    verify_kit(small)
    larger = pack(outputs, model, tmp_path / "larger", size_limit="80MB")
    assert ALWAYS | WITH_MODEL == {path.name for path in larger.iterdir()} and folder_bytes(larger) <= 80_000_000
    for name in ("page/service_worker.js", "computer/emergency-kit.zip", "cards.html"):  # the same each time
        assert (larger / name).read_bytes() == (plain / name).read_bytes()


def test_a_limit_that_even_cards_exceed_leaves_nothing(outputs, model, tmp_path):
    with pytest.raises(ExportError, match="even without what can be left out, more than --size-limit 1MB"):
        pack(outputs, model, tmp_path / "kit", size_limit="1MB")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text, expected", [("200MB", 200_000_000), ("1.5 GB", 1_500_000_000), ("150 MiB", 157_286_400), ("7", 7), ("3kb", 3000)])
def test_sizes_are_read(text, expected):
    assert read_size(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "0MB", "many", "1TB", "1MB2"])
def test_other_sizes_are_refused(text):
    with pytest.raises(UsageError, match="expected a size such as 200MB"):
        read_size(text)


def test_parts_join_to_the_file_whatever_their_size(tmp_path):
    (tmp_path / "x.gguf").write_bytes(bytes(range(256)) * 3)
    for size in (1_000_000, 768, 767, 100):
        (tmp_path / str(size)).mkdir()
        assert b"".join(path.read_bytes() for path in split(tmp_path / "x.gguf", tmp_path / str(size), size)) == bytes(range(256)) * 3


def test_only_an_exported_file_is_packed(model, tmp_path):
    with pytest.raises(UsageError, match="not a GGUF file; next: make export-gguf"):
        find_export(tmp_path / "none.gguf")
    with pytest.raises(UsageError, match=f"there: {model.name}"):
        find_export(model.parent / "other.gguf")
    alone = shutil.copyfile(model, tmp_path / model.name)
    with pytest.raises(ExportError, match="no export's manifest beside it"):
        find_export(alone)
    shutil.copyfile(model.parent / "manifest.json", tmp_path / "manifest.json")
    assert find_export(alone)["sha256"] == hash_file(model)
    with alone.open("r+b") as stream:
        stream.seek(5_000_000)
        stream.write(b"?")
    with pytest.raises(ExportError, match="not the file that was exported and proved"):
        find_export(alone)


def test_without_a_name_the_smallest_sound_file_is_taken(tmp_path):
    files = {"a.gguf": (5, []), "b.gguf": (3, ["KL too large"]), "c.gguf": (4, []), "gone.gguf": (1, [])}
    for name in ("a.gguf", "b.gguf", "c.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    save_json(tmp_path / "manifest.json", {"stage": "export", "files": {}, "export": {"files": {name: {"bytes": size, "certificate": {"outside": outside}} for name, (size, outside) in files.items()}}})
    assert pick_model(tmp_path).name == "c.gguf"
    with pytest.raises(ExportError, match="no exported GGUF file within its bounds"):
        pick_model(tmp_path / "empty")


def test_a_folder_in_the_way_is_replaced_only_when_told_and_only_a_kit(outputs, model, tmp_path):
    out = tmp_path / "kit"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    with pytest.raises(UsageError, match="already there; replace it with --overwrite"):
        pack(outputs, model, out)
    with pytest.raises(UsageError, match="holds something else than a kit"):
        pack(outputs, model, out, overwrite=True)
    assert (out / "diary.txt").read_text() == "mine"
    shutil.rmtree(out)
    pack(outputs, model, out, size_limit="45MB")
    pack(outputs, model, out, size_limit="45MB", overwrite=True)
    verify_kit(out)


def test_a_model_that_the_gate_did_not_pass_needs_a_reason_which_the_kit_carries(outputs, model, tmp_path):
    merged = outputs / "merged" / "final"
    (tmp_path / "o").mkdir()
    judged = {"ship": False, "reasons": ["it forgets steps"], "judged": {"path": str(merged), "sha256": hash_file(merged / "manifest.json")}}
    save_json(tmp_path / "o" / "verdict.json", judged)
    config = resolve(merged, tmp_path / "o")
    with pytest.raises(VerdictError, match="do not ship .*it forgets steps.*--override-verdict"):
        kit(config, model, tmp_path / "kit", browser=False)
    assert not (tmp_path / "kit").exists()
    out = kit(config, model, tmp_path / "kit", size_limit="45MB", override_verdict="a drill, not for use", browser=False)
    assert json.loads((out / "verdict.json").read_text())["override"] == load_manifest(out)["kit"]["verdict"]["override"] == "a drill, not for use"
    assert "do not ship (overridden: a drill, not for use)" in (out / "README.txt").read_text()


def test_another_archive_than_the_pinned_one_is_refused(tmp_path):
    (tmp_path / "other.tgz").write_bytes(b"not wllama")
    with pytest.raises(ExportError, match="its sha512 differs"):
        fetch.fetch_engine(tmp_path, str(tmp_path / "other.tgz"))
    with pytest.raises(UsageError, match="no such file; npm pack"):
        fetch.fetch_engine(tmp_path, str(tmp_path / "none.tgz"))


def test_without_npm_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportError, match="npm is not installed.*wllama_archive=FILE.*--no-browser"):
        fetch.fetch_engine(tmp_path)


def test_wheels_that_cannot_be_fetched_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ExportError, match="wheels for linux-x86_64, Python 3.12: pip could not fetch them.*--platform none"):
        fetch.fetch_wheels(tmp_path, "linux-x86_64", "3.12")


def test_every_wheel_that_serving_imports_is_packed():
    """In a process of its own: what `serve` with a GGUF file imports from outside the standard library."""
    import subprocess
    import sys

    code = ("import sys\nfrom emergency_kit.kit import boot\nfrom emergency_kit.inference import server, answer, api, service, llama_engine\nimport uvicorn.protocols.http.h11_impl, xllamacpp, llguidance, jinja2\n"
            "import importlib.metadata as m\ntops = {name.split('.')[0] for name in sys.modules}\nby = m.packages_distributions()\n"
            "print('\\n'.join(sorted({d for t in tops for d in by.get(t, [])})))")
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    def plain(name):
        return name.lower().replace("_", "-")

    # Optional for who imports them: anyio looks for sniffio, and the editable install is the program itself.
    missing = {plain(name) for name in listed} - {plain(name) for name in fetch.SERVING} - {"ai-emergency-kit", "sniffio", "setuptools"}
    assert not missing and not {"torch", "transformers"} & {plain(name) for name in listed}


PACK = """
import sys
from pathlib import Path
from tests.kit.conftest import pack
print("ready", flush=True)
pack(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
"""


def test_a_kill_while_packing_leaves_no_kit_and_the_next_packing_is_whole(outputs, model, tmp_path):
    """SIGKILL spread over the time that packing takes: what stands under the kit's name is whole or is not there."""
    command = [sys.executable, "-c", PACK, str(outputs), str(model), str(tmp_path / "kit")]

    def begin() -> subprocess.Popen[str]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    process, started = begin(), time.monotonic()
    process.communicate(timeout=120)
    needed = time.monotonic() - started
    verify_kit(tmp_path / "kit")
    unfinished = 0
    for share in (0.25, 0.55, 0.85):
        shutil.rmtree(tmp_path / "kit", ignore_errors=True)
        process = begin()
        time.sleep(share * needed)
        process.kill()
        process.communicate(timeout=30)
        if (tmp_path / "kit").exists():
            verify_kit(tmp_path / "kit")
        unfinished += process.returncode != 0
    assert unfinished >= 2, f"packing takes {needed:.1f} s, and the kills came too late"
    shutil.rmtree(tmp_path / "kit", ignore_errors=True)
    pack(outputs, model, tmp_path / "kit")
    verify_kit(tmp_path / "kit")
    assert [path.name for path in tmp_path.iterdir()] == ["kit"], "the next packing clears what a killed one left"
