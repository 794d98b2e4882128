"""`make train NPROC=N`, `make evaluate NPROC=N`: torchrun with N processes on this machine.

In: N, the verb (train where none is named) and its flags. Out: the run, and the exit code of the process that ended first where one failed; that process has said why, so that
torchrun's own account of it is left out (EMERGENCY_KIT_DEBUG=1 shows it). The processes share the machine's cores. Several machines: torchrun or
`accelerate launch` themselves (docs/Scaling.md). Run: python -m emergency_kit.training.launch N [train|evaluate] [its flags].
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from emergency_kit.errors import Interrupted, UsageError
from emergency_kit.model.process_memory import cores


def main(arguments: list[str]) -> int:
    """Start the processes and wait for them; the exit code."""
    number = int(arguments[0]) if arguments and arguments[0].isdecimal() else 0
    if number < 1:
        print(f"error: NPROC: got {arguments[0] if arguments else 'nothing'!r}; expected a number of processes, for instance make train NPROC=2", file=sys.stderr)
        return UsageError.exit_code
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    verb, flags = (arguments[1], arguments[2:]) if arguments[1:2] and arguments[1] in ("train", "evaluate") else ("train", arguments[1:])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // number)))
    debug = os.environ.get("EMERGENCY_KIT_DEBUG") == "1"
    if not debug:
        logging.disable(logging.ERROR)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    try:
        run.main(["--standalone", "--nproc-per-node", str(number), f"scripts/{verb}.py", *flags])
    except ChildFailedError as error:
        if debug:
            raise
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # all others have said why
            print(f"error: rank {rank} of {number} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException:
        return Interrupted.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
