"""Two real processes give the gradients of one."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.training.test_fused import FAMILIES, ROWS, adapt, assert_equal, naive


def test_two_ranks_equal_the_naive_reference(tmp_path: Path) -> None:
    # The store lives here and outlives both ranks: one in a file, or in a rank, can go while the other still needs it.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [subprocess.Popen([sys.executable, "tests/training/two_ranks.py", str(tmp_path), str(rank), str(store.port)], stderr=subprocess.PIPE, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ".", "GLOO_SOCKET_IFNAME": "lo"}) for rank in range(2)]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
    torch.manual_seed(7)
    wanted = naive(adapt(FAMILIES["llama"]()), ROWS)
    for engine in ("fused", "modules", "divided"):
        found = torch.load(tmp_path / f"{engine}.pt", weights_only=True)
        assert_equal((found["loss"], found["gradients"]), wanted)
