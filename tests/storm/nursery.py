"""Many short lives of the command line: forked from one process that has the libraries loaded, so that a life costs its work alone.

In: lines of JSON on standard input: argv (after `emergency-kit`, or a script's name and its flags), env, out and errors (files for its output), kill_after (seconds to SIGKILL, or
null), signals ([seconds, number] each), limit (seconds). Out: a line of JSON each: status (exit code, or minus the signal's
number) and seconds. A life is a real process with its own memory, killed by the real signal; only imports are shared.
Run by storm.Nursery: python -m tests.storm.nursery
"""

import json
import os
import runpy
import signal
import sys
import time
from typing import Any


def preload() -> None:
    """What every verb imports, and the package's own data read; no thread exists that a fork could lose."""
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer  # noqa: F401

    import emergency_kit.cli  # noqa: F401
    import emergency_kit.evaluation.run  # noqa: F401
    import emergency_kit.export.gguf  # noqa: F401
    import emergency_kit.export.merge  # noqa: F401
    import emergency_kit.training.callbacks  # noqa: F401
    import emergency_kit.training.run  # noqa: F401
    import emergency_kit.training.trainer  # noqa: F401
    from emergency_kit.data.build import dataset_digest

    dataset_digest(seed=0, size=0)  # reads cards, situations and numbers


def forbid_sockets() -> None:
    """Make every socket of this process an error, whoever asks for it."""

    def hook(event: str, _: object) -> None:
        if event.startswith("socket.") and event != "socket.gethostname":
            raise RuntimeError(f"a socket was opened: {event}")

    sys.addaudithook(hook)


def fail_once_out_of_memory(step: int) -> None:
    """Let memory run out in the middle of the backward pass of one optimizer step (counted over the run)."""
    import torch

    from emergency_kit.training.trainer import KitTrainer

    real = KitTrainer._step_in_pieces

    def tight(self: Any, model: Any, inputs: Any, number: Any) -> Any:
        if self.state.global_step + 1 == step and self.facts.pieces == 1:
            real(self, model, {name: value[:1] for name, value in inputs.items()}, number)  # gradients and random numbers are spent
            raise torch.OutOfMemoryError("planted")
        return real(self, model, inputs, number)

    KitTrainer._step_in_pieces = tight


def live(request: dict[str, Any]) -> None:
    """In the child: become the command."""
    os.setsid()
    for descriptor, name in ((1, "out"), (2, "errors")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    os.environ.update(request.get("env", {}))
    if "TZ" in request.get("env", {}):
        time.tzset()
    if request.get("no_sockets"):
        forbid_sockets()
    if request.get("out_of_memory_at"):
        fail_once_out_of_memory(request["out_of_memory_at"])
    script = request["argv"][0].endswith(".py")
    sys.argv = request["argv"] if script else ["emergency-kit", *request["argv"]]
    from emergency_kit import cli

    code = 1
    try:
        if script:
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:  # what a process of its own would show before it ends
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def watch(pid: int, request: dict[str, Any]) -> int:
    """Wait for a life, and end it in time; its exit code, or minus the signal's number."""
    started = time.monotonic()
    due = sorted([list(item) for item in request.get("signals", [])] + ([[request["kill_after"], signal.SIGKILL]] if request.get("kill_after") is not None else [])
                 + [[request.get("limit", 300), signal.SIGKILL]])
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if due and time.monotonic() - started >= due[0][0]:
            os.kill(pid, due.pop(0)[1])
        time.sleep(0.002)


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    preload()
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        started = time.monotonic()
        pid = os.fork()
        if not pid:
            live(request)
        print(json.dumps({"status": watch(pid, request), "seconds": time.monotonic() - started}), file=replies, flush=True)


if __name__ == "__main__":
    main()
