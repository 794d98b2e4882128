"""A flipped bit in any file of a kit is found, by the command and by the shell script; so is a file too many or too few, or another's signature."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from emergency_kit.artifacts import hash_json, save_json
from emergency_kit.errors import ExportError, UsageError
from emergency_kit.kit.check import SIGNATURE, SUMS, find_problems, list_sums, sign, verify_kit


SCRIPT = Path("emergency_kit/kit/texts/verify.sh").resolve()


@pytest.fixture
def copy(plain, tmp_path):
    return Path(shutil.copytree(plain, tmp_path / "kit"))


def shell(folder):
    return subprocess.run(["sh", str(folder / "verify.sh")], capture_output=True, text=True)


def flip(path, place, bit):
    with path.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1 << bit]))


def test_a_whole_kit_passes_both_checks(plain, capsys):
    verify_kit(plain)
    assert "every byte as packed" in capsys.readouterr().out
    done = shell(plain)
    assert done.returncode == 0 and done.stdout.endswith("files, every byte as packed.\n"), done.stderr


def test_a_flipped_bit_in_every_file_is_found(copy):
    draw = random.Random(10)
    files = sorted(path for path in copy.rglob("*") if path.is_file() and path.name not in (SUMS, "manifest.json"))
    assert len(files) > 40
    for path in files:  # all at once: each must be named
        flip(path, draw.randrange(path.stat().st_size), draw.randrange(8))
    problems = "; ".join(find_problems(copy))
    done = subprocess.run(["sh", str(SCRIPT)], env=os.environ | {"KIT": str(copy)}, capture_output=True, text=True)
    assert done.returncode == 1 and "do not use this kit" in done.stderr
    for path in files:
        name = path.relative_to(copy).as_posix()
        assert f"{name}: differs" in problems and f" {name} " in f"{done.stderr} ".replace("\n", " "), name
    with pytest.raises(ExportError, match="NOT as packed, do not use it.* more. Next"):
        verify_kit(copy)


@pytest.mark.parametrize("name", [SUMS, "manifest.json"])
def test_a_flipped_bit_anywhere_in_a_list_is_found(copy, name):
    slim(copy)
    draw = random.Random(11)
    size = (copy / name).stat().st_size
    places = [(place, bit) for place in (3, 64, 66, size - 1) for bit in range(8)] + [(draw.randrange(size), draw.randrange(8)) for _ in range(40)]
    for count, (place, bit) in enumerate(places):
        flip(copy / name, place, bit)
        assert find_problems(copy), (place, bit)
        if name == SUMS and count < 32 and count % 2 or count % 8 == 0:
            assert shell(copy).returncode == 1, (place, bit)
        flip(copy / name, place, bit)
    assert not find_problems(copy) and shell(copy).returncode == 0


def slim(folder):
    """Take the large files out of a kit and its lists, which are written again as packing writes them."""
    for path in [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 200_000 and path.name not in ("manifest.json", SUMS)]:
        path.unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: digest for name, digest in manifest["files"].items() if (folder / name).exists()}
    del manifest["self"]
    save_json(folder / "manifest.json", manifest | {"self": hash_json(manifest)})
    (folder / SUMS).write_text(list_sums(folder))


def test_a_file_too_many_or_too_few_is_found(copy):
    (copy / "page" / "extra.js").write_text("alert(1)")
    with pytest.raises(ExportError, match="page/extra.js: was not packed"):
        verify_kit(copy)
    assert shell(copy).returncode == 1
    (copy / "page" / "extra.js").unlink()
    (copy / "cards.html").unlink()
    with pytest.raises(ExportError, match="cards.html: is missing"):
        verify_kit(copy)
    assert "cards.html (missing)" in shell(copy).stderr


def test_what_is_no_kit_is_said_to_be_none(tmp_path):
    with pytest.raises(ExportError, match="no kit: neither SHA256SUMS nor manifest.json is there"):
        verify_kit(tmp_path)


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_a_signature_tells_who_packed_it(copy, tmp_path, capsys):
    for name in ("mine", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    with pytest.raises(ExportError, match="not signed"):
        verify_kit(copy, tmp_path / "mine.pub")
    sign(copy, tmp_path / "mine")
    verify_kit(copy, tmp_path / "mine.pub")
    assert "Signed by the holder of" in capsys.readouterr().out and shell(copy).returncode == 0
    verify_kit(copy)
    with pytest.raises(ExportError, match="NOT signed by the holder of"):
        verify_kit(copy, tmp_path / "other.pub")
    flip(copy / SIGNATURE, 90, 2)
    with pytest.raises(ExportError, match="NOT signed by the holder of"):
        verify_kit(copy, tmp_path / "mine.pub")
    with pytest.raises(UsageError, match="not readable as a public key"):
        verify_kit(copy, tmp_path / "none.pub")
    with pytest.raises(ExportError, match="ssh-keygen could not sign"):
        sign(copy, tmp_path / "none")
