"""Entry: from the words of a call to the verb that they name, and from whatever goes wrong to one line and an exit code.

In: `sys.argv`. Out: what the verb prints, and an exit code of `errors.py`. This file holds the one broad handler; `--debug` (or
EMERGENCY_KIT_DEBUG=1) lets a traceback through. Run: `emergency-kit VERB`, `python scripts/VERB.py`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import typer

import emergency_kit
from emergency_kit import terminal
from emergency_kit.cli import looking, making, shipping  # noqa: F401  they register their verbs
from emergency_kit.cli.command import COMPLETE, PROGRAM, app
from emergency_kit.cli.overview import find_command, overview, suggest_flag
from emergency_kit.errors import ConfigError, Interrupted, KitError, UsageError
from emergency_kit.training import ranks

LONG_VERBS = {"train", "sweep", "evaluate", "merge", "export-gguf", "pipeline"}
# Their output is another program's, or wraps itself.
UNFOLDED_VERBS = {"infer", "serve", "reference", "completion"}
# Of an error that no class of errors.py stands for.
STAGE_CODES = {"train": 5, "sweep": 5, "plan": 5, "pipeline": 5, "merge": 6, "kit": 6, "export-gguf": 6, "upload-hf": 6, "upload-gguf": 6,
               "evaluate": 4, "infer": 4, "serve": 4, "runs": 4, "gate": 7, "data": 3, "knowledge": 3}


def main(verb: str | None = None) -> None:
    """Entry point; `verb` is fixed by the scripts. Exits with the code of the error family."""
    arguments = ([verb] if verb else []) + sys.argv[1:]
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    name = f"scripts/{Path(sys.argv[0]).name}" if verb else ""
    debug = "--debug" in arguments or os.environ.get("EMERGENCY_KIT_DEBUG") == "1"
    _prepare_process()
    with contextlib.ExitStack() as around:
        if set(arguments[:1]) & LONG_VERBS:  # what runs for long must not end with the terminal that it was started from
            around.enter_context(terminal.surviving())
        if not set(arguments) & UNFOLDED_VERBS:
            around.enter_context(terminal.folding())
        try:
            code = _call(arguments, name, debug)
        except KeyboardInterrupt:  # while an error was being said
            code = Interrupted.exit_code
    sys.exit(code)


def _prepare_process() -> None:
    """SIGTERM ends as Ctrl-C does, of several ranks the first alone prints, `.env` is read, a narrow terminal encoding replaces what it
    cannot show, tracebacks hide secrets."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.excepthook = _show_traceback
    if not ranks.is_first() or sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:  # closed by whoever started this
        sys.stderr = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if Path(".env").is_file():
        from dotenv import load_dotenv

        load_dotenv(".env")  # what the environment holds already stays


def _call(arguments: list[str], name: str, debug: bool) -> int:
    try:
        return _run(arguments, name)
    except ConfigError as error:
        if debug:
            raise
        for problem in error.problems:
            _say(problem)
        return error.exit_code
    except KitError as error:
        if debug:
            raise
        if ranks.is_first() or not isinstance(error, Interrupted):
            _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        if ranks.is_first():
            _say("interrupted")
        return Interrupted.exit_code
    except typer.Exit as stop:
        return stop.exit_code
    except Exception as error:
        if debug:
            raise
        return _explain(error, arguments[0] if arguments else "")


def _run(arguments: list[str], name: str) -> int:
    """Call the verb, or what stands in for one; its exit code. name: of the script that fixes the verb."""
    if os.environ.get(COMPLETE):
        _complete()
    elif not arguments or arguments[0] in ("-h", "--help"):
        print(overview(), end="")
    elif arguments[0] == "--version":
        print(f"{PROGRAM} {emergency_kit.__version__}")
    else:
        command, words = find_command(arguments)
        code = command(args=arguments[len(words):], prog_name=name or " ".join([PROGRAM, *words]), standalone_mode=False)
        return code if isinstance(code, int) else 0
    return 0


def _complete() -> None:
    """Tell a shell what may follow; the script of `completion` has put the line into the environment."""
    from typer import completion

    scripts: Any = completion
    scripts.completion_init()
    typer.main.get_command(app)(args=[], prog_name=PROGRAM, complete_var=COMPLETE, standalone_mode=False)


def _show_traceback(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    import traceback

    from emergency_kit.artifacts import redact

    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def _say(message: str) -> None:
    from emergency_kit.artifacts import redact

    sys.stdout.flush()
    if not ranks.is_first():
        # What all ranks meet rank 0 has said by now, and the launcher ends the others.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(8)
        message = f"rank {ranks.rank()} of {ranks.world()}: {message}"
    print("error: " + redact(" ".join(message.split())), file=sys.stderr)


def _explain(error: Exception, verb: str) -> int:
    """Say an unexpected error in one line and return its exit code."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # Typer's own family of usage errors, which it keeps to itself
        context: Any = getattr(error, "ctx", None)
        place = context.command_path if context else PROGRAM
        _say(f"{suggest_flag(error).rstrip('.')}; next: {place} --help")
        return UsageError.exit_code
    stage_code = STAGE_CODES.get(verb, KitError.exit_code)
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, OSError) and error.errno is not None:
        remedy = {errno.ENOSPC: "free some space", errno.EACCES: "check its permissions", errno.EROFS: "it is read-only"}.get(error.errno, "")
        _say(f"{error.filename or 'writing'}: {error.strerror}{'; ' + remedy if remedy else ''}; nothing half-written was left")
        return stage_code
    if isinstance(error, MemoryError):
        _say("out of memory; lower --set training.per_device_train_batch_size or close other programs")
        return stage_code
    _say(f"unexpected {type(error).__name__}: {error}; run the same command with --debug and report it")
    return stage_code
