"""A kit on a computer: the start script of Linux, the page that it serves, and known questions in llama.cpp itself."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from emergency_kit.files import save_bytes
from emergency_kit.inference.llama_engine import LlamaEngine
from emergency_kit.kit import known
from emergency_kit.kit.page import load_retrieval
from emergency_kit.knowledge.cards import load_cards
from emergency_kit.knowledge.index import load_index


@pytest.fixture(scope="module")
def folder(plain, tmp_path_factory):
    """A copy with room beside it for a home."""
    return Path(shutil.copytree(plain, tmp_path_factory.mktemp("started") / "kit"))


@contextlib.contextmanager
def started(folder, *arguments, **environment):
    """The start script as a person runs it, with this Python first; the address that it prints."""
    env = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(folder.parent / "home"), **environment}
    process = subprocess.Popen(["sh", str(folder / "start-linux.sh"), "--no-open", *arguments], cwd="/", env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if address := re.search(r"http://127\.0\.0\.1:\d+/\S*", line):
                yield address[0], said
                return
        raise AssertionError("".join(said))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def test_without_wheels_for_this_python_the_page_is_served_with_the_headers_for_threads(folder):
    with started(folder, "--port", "0") as (address, said):
        found = httpx.get(address)
        assert "the browser runs the model" in said[0] and found.status_code == 200 and "Emergency Kit" in found.text
        assert found.headers["cross-origin-opener-policy"] == "same-origin" and found.headers["cross-origin-embedder-policy"] == "require-corp"
        assert httpx.get(f"{address}page.js").headers["content-type"] == "text/javascript"
        assert httpx.get(f"{address}../../../../etc/passwd").status_code == 404
        assert json.loads(httpx.get(f"{address}kit.json").text)["model"]["parts"]
    assert not (folder.parent / "home").exists()


def test_a_damaged_wheel_or_part_is_refused_at_the_start(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "kit"))
    table = {f"{system}-{sys.version_info[0]}.{sys.version_info[1]}": ["x-1-py3-none-any.whl"] for system in ("linux-x86_64", "linux-aarch64", "macos-arm64", "macos-x86_64")}
    (copy / "computer" / "wheels.json").write_text(json.dumps(table))
    save_bytes(copy / "computer" / "wheels" / "x-1-py3-none-any.whl", b"not what the list says")
    done = subprocess.run([sys.executable, str(copy / "computer" / "start.py"), "--no-open"], capture_output=True, text=True, env=os.environ | {"EMERGENCY_KIT_HOME": str(tmp_path / "home")})
    assert done.returncode == 1 and "x-1-py3-none-any.whl is not as it was packed; do not use this kit" in done.stderr and not list((tmp_path / "home").glob("*"))


def test_known_questions_are_the_same_again_and_differences_are_told(folder, model):
    recorded = json.loads((folder / "self_test.json").read_text())
    engine = LlamaEngine(model, slots=1)
    try:
        assert known.compare(engine, load_cards(), 2, True, recorded) == []
        recorded["questions"][0]["answer"] = "FACTS\n• Something else entirely, and long enough."
        recorded["questions"][1]["prompt_sha256"] = "0" * 64
        problems = known.compare(engine, load_cards(), 2, True, recorded)
        assert len(problems) == 2 and "the answer begins" in problems[0] and "another prompt" in problems[1]
    finally:
        engine.close()


def test_the_kits_numbers_of_retrieval_are_the_fitted_ones(folder):
    mine, theirs = load_index(load_cards()), load_retrieval(folder / "page")
    assert (mine.card_ids, mine.features) == (theirs.card_ids, theirs.features)
    # A fit by another number of threads adds up in another order, which moves weights of up to 1 by 1.6e-6; another test may have had them fitted anew.
    assert mine.idf.tobytes() == theirs.idf.tobytes()
    np.testing.assert_allclose(mine.weights, theirs.weights, rtol=0, atol=5e-6)


@pytest.mark.skipif(not os.environ.get("KIT_FOLDER"), reason="make prove-kit asks a kit with wheels")
def test_a_kit_answers_in_llama_cpp_with_no_network_and_an_empty_home(tmp_path):
    folder = Path(os.environ["KIT_FOLDER"]).resolve()
    tried = subprocess.run(["unshare", "-rn", "ip", "link", "set", "lo", "up"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no network namespace can be made here: {tried.stderr.strip()}")
    (tmp_path / "home").mkdir()
    done = subprocess.run(["unshare", "-rn", "sh", "tests/kit/native.sh", str(folder), str(tmp_path / "home")], capture_output=True, text=True, timeout=550, env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All as recorded when this kit was packed." in done.stdout
    answer = json.loads(done.stdout.splitlines()[-1])
    made = answer["provenance"]
    assert answer["checks"]["four_sections"] and answer["cards"][0]["id"] == "kitchen_grease_fire"
    assert made["model_sha256"] == json.loads((folder / "certificate.json").read_text())["sha256"]
    print(f"\nnatively, {made['kind']}: {made['prompt_tokens']} prompt tokens, first token {made['first_token_seconds']:.2f} s, {made['completion_tokens']} tokens, "
          f"{(made['completion_tokens'] - 1) / (made['seconds'] - made['first_token_seconds']):.1f} tokens/s")
