"""`make train NPROC=N`: torchrun with N processes on this machine.

In: N and the flags of `train`. Out: the run, and the exit code of the process that ended first where one failed; that process has said why, so that
torchrun's own account of it is left out (EMERGENCY_KIT_DEBUG=1 shows it). The processes share the machine's cores. Several machines: torchrun or
`accelerate launch` themselves (docs/Scaling.md). Run: python -m emergency_kit.training.launch N [flags of train].
"""

from __future__ import annotations

import logging
import os
import sys

from emergency_kit.errors import Interrupted, UsageError


def main(arguments: list[str]) -> int:
    """Start the processes and wait for them; the exit code."""
    number = int(arguments[0]) if arguments and arguments[0].isdigit() else 0
    if number < 1:
        print(f"error: NPROC: got {arguments[0] if arguments else 'nothing'!r}; expected a number of processes, for instance make train NPROC=2", file=sys.stderr)
        return UsageError.exit_code
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // number)))
    debug = os.environ.get("EMERGENCY_KIT_DEBUG") == "1"
    if not debug:
        logging.disable(logging.ERROR)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    try:
        run.main(["--standalone", "--nproc-per-node", str(number), "scripts/train.py", *arguments[1:]])
    except ChildFailedError as error:
        if debug:
            raise
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException:
        return Interrupted.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
