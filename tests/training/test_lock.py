"""The lock of an output folder when its holder is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emergency_kit.errors import UsageError
from emergency_kit.training import lock

# Holds the folder, and has a child that keeps the lock's file open for so many seconds, as one between fork and exec does.
HOLDER = """
import os, subprocess, sys, time
from pathlib import Path
from emergency_kit.training import lock
with lock.hold(Path(sys.argv[1]), print):
    files = [int(name) for name in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{name}").endswith(".training.lock")]
    subprocess.Popen(["sleep", sys.argv[2]], pass_fds=files)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds the lock's file by /proc")
@pytest.mark.parametrize("seconds, freed", [(1.0, True), (4.0, False)])
def test_a_killed_holder_s_last_child_is_waited_for(seconds: float, freed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LAST_BREATH_SECONDS", 3)
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path), str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UsageError, match=f"another run is training into it .process {process.pid} "), lock.hold(tmp_path, print):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    started, said = time.monotonic(), []
    if freed:
        with lock.hold(tmp_path, said.append):
            assert f"The lock of process {process.pid}" in said[0] and "is taken over" in said[0]
    else:
        with pytest.raises(UsageError, match="another run is training into it"), lock.hold(tmp_path, said.append):
            pass
    assert time.monotonic() - started < 4
