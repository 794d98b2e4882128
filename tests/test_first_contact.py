"""The first `make setup` of a stranger, with the real make and shell: what is wrong is said in one sentence with the next command, and nothing half-made stays.

No network: the package index is a dead port. What takes whole downloads runs under `make prove-first-contact`.
"""

from __future__ import annotations

import http.server
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

FULL = os.environ.get("EMERGENCY_KIT_FIRST_CONTACT") == "full"
CARRIED = ("Makefile", "activate_env.sh", "pyproject.toml", "requirements.lock", "requirements-test.lock", "requirements-dev.lock", "scripts")
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
PYTHON = str(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")
SYSTEM = "/usr/local/bin:/usr/bin:/bin"


def environment(**more: str) -> dict[str, str]:
    """A stranger's: no settings of pip's but an index that is not there, the C locale."""
    kept = {name: value for name, value in os.environ.items() if not re.match(r"(?i)(pip_|.*_proxy$|make|mflags|virtual_env|lc_|lang)", name)}
    return kept | {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1", "LC_ALL": "C"} | more


def make(folder: Path, *arguments: str, python: str = PYTHON, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "--no-print-directory", *(arguments or ("setup",)), f"PYTHON={python}"], cwd=folder, capture_output=True, text=True,
                          env=environment(**more), encoding="utf-8")


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence; make adds a line of its own, and pip's last words may stand before it."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done
    return lines[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What set-up reads of a clone, under a path with a space and letters that are not ASCII."""
    return copy_to(tmp_path / "Ünï kit ñ")


def copy_to(folder: Path) -> Path:
    folder.mkdir()
    for name in CARRIED:
        (shutil.copytree if Path(name).is_dir() else shutil.copy)(name, folder / name)
    return folder


def stub(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def make_venv(folder: Path) -> Path:
    """An environment without pip, which takes no time, and the kit's command in it."""
    venv = folder / ".venv"
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", str(venv)], check=True)
    (venv / "bin" / "emergency-kit").write_text(f"#!/bin/sh\n'''exec' \"{venv}/bin/python\" \"$0\" \"$@\"\n")
    shutil.copy(folder / "requirements.lock", venv / "installed.txt")
    return venv


def stale(folder: Path) -> bool:
    said = subprocess.run(["bash", "scripts/setup.sh", "stale"], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    assert said in ("", "stale")
    return said == "stale"


@pytest.mark.parametrize("version", ["3.10.13", "3.14.0", "2.7.18"])
def test_a_python_that_does_not_fit(folder: Path, tmp_path: Path, version: str) -> None:
    old = stub(tmp_path / "bin" / "python3", f'[ "$1" = -V ] && echo "Python {version}" && exit 0\nexit 1\n')
    for other in ("python3.11", "python3.12", "python3.13"):
        stub(tmp_path / "bin" / other, "exit 127\n")  # as pyenv's shims are for what is not chosen
    said = error_of(make(folder, "train", python=old, PATH=f"{tmp_path / 'bin'}:{SYSTEM}"))
    assert said == f"error: {old} is Python {version}; Python 3.11 to 3.13 is needed. Next: install one of them, or make train PYTHON=/path/to/python3.12"
    (tmp_path / "bin" / "python3.12").unlink()
    os.symlink(PYTHON, tmp_path / "bin" / "python3.12")
    assert error_of(make(folder, python=old, PATH=f"{tmp_path / 'bin'}:{SYSTEM}")).endswith("Next: make setup PYTHON=python3.12")
    assert not (folder / ".venv").exists()


def test_a_python_that_is_not_there(folder: Path) -> None:
    assert "PYTHON=no such python: no such program; Python 3.11 to 3.13 is needed. Next: " in error_of(make(folder, python="no such python"))


def test_a_python_without_venv(folder: Path, tmp_path: Path) -> None:
    bare = stub(tmp_path / "python3", f'[ "$1" = -m ] && echo "The virtual environment was not created successfully because ensurepip is not available." >&2 && exit 1\nexec {PYTHON} "$@"\n')
    assert "has no venv with pip. Next, on Debian and Ubuntu: sudo apt-get install python3-venv; then: make setup" in error_of(make(folder, python=bare))


def test_no_network_leaves_nothing(folder: Path) -> None:
    said = error_of(make(folder, "pipeline"))
    assert said == "error: torch could not be installed: the package index cannot be reached. Next: check the network and the index (pip config list; PIP_INDEX_URL, " \
                   "TORCH_INDEX), then: make pipeline"
    assert not (folder / ".venv").exists()


# What pip 23 to 26 prints to standard error, shortened.
WORDS = {
    "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device": r"no space left on the disk of .*Ünï kit ñ or of .*\. Next: free 2500 MB",
    "WARNING: Retrying (Retry(total=0)) after connection broken by 'ProxyError('Cannot connect to proxy.', OSError(111))': /simple/torch/": r"the proxy does not answer or refuses "
        r"\(HTTPS_PROXY=http://\*\*\*@127\.0\.0\.1:9\)\. Next: correct or unset it",
    "WARNING: Retrying after connection broken by 'SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]'))'": r"certificate of the package index .*PIP_CERT=FILE",
    "ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: '/x/y'": r"'/x/y' may not be written\. Next: look whose it is",
    "  error: command 'gcc' failed: No such file or directory\n  ERROR: Failed building wheel for x": r"no ready-built wheel for this system \(.*Python 3\.",
    "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES": r"a download was damaged or cut off\. Next: .venv/bin/python -m pip cache purge",
    "ERROR: No matching distribution found for torch==2.13.0": r"no such version for this system \(",
    "ERROR: something that nobody foresaw": r"see pip's words above; then: make setup",
}


@pytest.mark.parametrize("words", WORDS, ids=lambda words: words[:40])
def test_what_pip_says_becomes_the_next_step(folder: Path, words: str) -> None:
    """pip itself is played by a program that prints its words: a full disk or a company's proxy is not to be had in a test."""
    venv = make_venv(folder)
    (venv / "installed.txt").unlink()
    (venv / "mine").write_text("x")
    (venv / "bin" / "python").unlink()
    (folder / "words").write_text(words + "\n")
    stub(venv / "bin" / "python", f'case "$*" in *"pip install"*) cat "{folder}/words" >&2; exit 1;; "-c import pip") exit 0;; esac\nexec {PYTHON} "$@"\n')
    done = make(folder, HTTPS_PROXY="http://me:secret@127.0.0.1:9")
    assert re.search(r"^error: torch could not be installed: .*" + WORDS[words], error_of(done)), done.stderr
    assert "secret" not in done.stdout + done.stderr
    assert (venv / "mine").exists() and not (venv / "installed.txt").exists(), "an environment that was there before stays, and is not called ready"


def test_a_real_proxy_that_does_not_answer(folder: Path) -> None:
    make_venv(folder)
    (folder / ".venv" / "installed.txt").unlink()
    said = error_of(make(folder, HTTPS_PROXY="http://me:secret@127.0.0.1:9", PIP_INDEX_URL="https://index.invalid/simple", PIP_RETRIES="1"))
    assert "the proxy does not answer or refuses (HTTPS_PROXY=http://***@127.0.0.1:9)" in said


def in_a_mount(script: str) -> subprocess.CompletedProcess[str]:
    """A script in mounts of its own, which end with it."""
    if not ROOT or shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mounts need root")
    return subprocess.run(["unshare", "-m", "bash", "-c", script], capture_output=True, text=True, env=environment(), encoding="utf-8")


def test_no_room(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    said = error_of(in_a_mount(f'mount -t tmpfs -o size=90m tmpfs "{tmp_path}/small" && cp -r "{folder}" "{tmp_path}/small/kit" && make -C "{tmp_path}/small/kit" setup PYTHON={PYTHON}'))
    assert re.fullmatch(rf"error: {tmp_path}/small/kit: \d\d MB free, 2500 MB needed for \.venv and models\. Next: free some space, or move the folder to a larger disk, then: make setup", said)


def test_a_folder_that_may_not_be_written(folder: Path) -> None:
    if ROOT:
        done = in_a_mount(f'mount --bind "{folder}" "{folder}" && mount -o remount,ro,bind "{folder}" && make -C "{folder}" setup PYTHON={PYTHON}')
    else:
        folder.chmod(0o555)
        done = make(folder)
        folder.chmod(0o755)
    assert re.search(r"Ünï kit ñ: \S+ may not write here, and \.venv, models and outputs are made here\. Next: copy the folder to a place of your own, and there: make setup", error_of(done))


def test_what_was_set_up_is_current_until_something_changes(folder: Path, tmp_path: Path) -> None:
    venv = make_venv(folder)
    assert not stale(folder)
    lock = (folder / "requirements.lock").read_text()
    (folder / "requirements.lock").write_text(lock.replace("torch==", "torch==9"))
    os.utime(folder / "requirements.lock", (0, 0))  # unpacked over the old one with its old date
    assert stale(folder)
    (folder / "requirements.lock").write_text(lock)
    config = (venv / "pyvenv.cfg").read_text()
    (venv / "pyvenv.cfg").write_text(re.sub(r"version = 3\.\d+", "version = 3.10", config))
    assert stale(folder)
    (venv / "pyvenv.cfg").write_text(config)
    assert not stale(folder)
    folder.rename(tmp_path / "moved")
    assert stale(tmp_path / "moved")
    (tmp_path / "moved").rename(folder)
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").symlink_to(tmp_path / "uninstalled")
    assert stale(folder)


def test_an_environment_of_another_python_is_made_anew(folder: Path, tmp_path: Path) -> None:
    venv = make_venv(folder)
    (venv / "pyvenv.cfg").write_text(f"home = {tmp_path}\nversion = 3.10.13\n")
    venv.rename(tmp_path / "elsewhere")
    venv.symlink_to(tmp_path / "elsewhere")
    assert error_of(make(folder)).endswith(f".venv is a link to {tmp_path}/elsewhere, which was made by Python 3.10.13. Next: rm .venv, then: make setup")
    venv.unlink()
    (tmp_path / "elsewhere").rename(venv)
    done = make(folder)
    assert ".venv was made by Python 3.10.13; it is made anew." in done.stdout and "the package index cannot be reached" in error_of(done)


def test_a_folder_of_somebody_elses_is_not_touched(folder: Path) -> None:
    (folder / ".venv").mkdir()
    (folder / ".venv" / "thesis.txt").write_text("x")
    assert "holds something else. Next: move it away, then: make setup" in error_of(make(folder))
    assert (folder / ".venv" / "thesis.txt").exists()


def test_activating_says_where_it_failed(folder: Path) -> None:
    done = subprocess.run(["bash", "-c", "source activate_env.sh; echo code $?"], cwd=folder, capture_output=True, text=True, env=environment(PATH=SYSTEM, PYTHON="/no/python"), encoding="utf-8")
    assert done.stdout.endswith("code 2\n") and done.stderr.rstrip().endswith("error: the environment could not be made; see the message above, then: make setup")


@pytest.mark.parametrize("script", sorted(Path("scripts").glob("*.py")), ids=str)
def test_a_script_under_another_python_says_so(script: Path, tmp_path: Path) -> None:
    done = subprocess.run([PYTHON, "-I", str(script), "--help"], capture_output=True, text=True, env=environment())
    if done.returncode == 0:
        pytest.skip("the kit is installed for that Python")
    assert done.stderr == "error: No module named 'emergency_kit': this is not the project's Python. Next: source activate_env.sh, then the same command\n" and done.returncode == 1


def test_a_checkout_on_windows_has_the_line_ends_of_unix(tmp_path: Path) -> None:
    if not Path(".git").exists():
        pytest.skip("not a git checkout")
    subprocess.run(["git", "-c", "core.autocrlf=true", "-c", "core.eol=crlf", "clone", "--quiet", "--config", "core.autocrlf=true", "--no-hardlinks", ".", str(tmp_path / "clone")], check=True)
    texts = [path for path in (tmp_path / "clone").rglob("*") if path.is_file() and ".git" not in path.parts and path.suffix not in (".png",)]
    assert len(texts) > 300 and [path for path in texts if b"\r\n" in path.read_bytes()] == []


def test_yaml_with_windows_line_ends_and_a_mark_reads_the_same(tmp_path: Path) -> None:
    from emergency_kit.config import load_config

    for path in Path("configs/embedded").glob("*.yaml"):
        (tmp_path / path.name).write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_config("embedded", str(tmp_path)).config == load_config("embedded").config


def test_the_base_model_says_where_it_cannot_be_put(tmp_path: Path) -> None:
    from emergency_kit.config import load_config
    from emergency_kit.errors import UsageError
    from emergency_kit.model import bundled

    (tmp_path / "models").write_text("a file")
    with pytest.raises(UsageError, match=r"models: not writable \(.+\); move the kit's folder to a place of your own with room, then: make setup"):
        bundled.setup(load_config("embedded"), out=tmp_path / "models" / "m")


def test_loopback_goes_through_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    from emergency_kit.evaluation.wire import Client

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"ours": true}')

        def log_message(self, *_: object) -> None:
            pass

    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert Client(5, 0, {}).post(f"http://127.0.0.1:{server.server_port}/", {}) == {"ours": True}
        server.shutdown()


@pytest.mark.skipif(not FULL, reason="in make prove-first-contact: two downloads and ten minutes")
def test_a_whole_set_up_as_a_stranger_meets_it(tmp_path: Path) -> None:
    """From a copy without git, without compiler, with no home to write to, killed in the middle; then moved and set up with no network."""
    place = tmp_path / "Ünï kit ñ"
    if Path(".git").exists():
        place.mkdir()
        subprocess.run(["bash", "-c", 'git archive HEAD | tar x -C "$0"', str(place)], check=True)
    else:
        shutil.copytree(".", place, ignore=shutil.ignore_patterns(".venv", "models", "outputs"))
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in "awk bash cat chmod cmp cp df env grep head id ls make mkdir mv readlink rm sed sh sleep sort tail touch tr uname wc".split():
        (tools / name).symlink_to(str(shutil.which(name)))
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name.endswith(("_proxy", "_PROXY"))}
    stranger = {"PATH": str(tools), "HOME": os.devnull, "LC_ALL": "C"} | pip
    command = ["make", "--no-print-directory", "setup", f"PYTHON={PYTHON}"]
    half = subprocess.Popen(command, cwd=place, env=stranger, start_new_session=True)
    until = time.monotonic() + 600
    while not any(place.glob(".venv/lib/python3*/site-packages/torch/_C*")):  # pip is copying
        assert time.monotonic() < until and half.poll() is None
        time.sleep(0.2)
    os.killpg(half.pid, signal.SIGKILL)
    half.wait()
    assert not (place / ".venv" / "installed.txt").exists()
    subprocess.run(command, cwd=place, env=stranger, check=True)
    ask = [".venv/bin/emergency-kit", "infer", "--checkpoint", "models/SmolLM2-135M-Instruct", "--prompt", "the oil in my pan is on fire"]
    answer = subprocess.run(ask, cwd=place, env=stranger, capture_output=True, text=True, check=True, encoding="utf-8").stdout
    assert "CHECKED GUIDANCE: Kitchen grease fire" in answer
    moved = place.rename(tmp_path / "moved kit")
    offline = stranger | {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    done = subprocess.run(command, cwd=moved, env=offline, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and ".venv was made in another folder; it is told its new place." in done.stdout, done
    where = subprocess.run([".venv/bin/python", "-c", "import emergency_kit; print(emergency_kit.__file__)"], cwd=tmp_path / "moved kit", env=offline, capture_output=True, text=True, check=True)
    assert str(moved) in where.stdout
    assert subprocess.run(ask, cwd=moved, env=offline, capture_output=True, text=True, check=True, encoding="utf-8").stdout == answer
