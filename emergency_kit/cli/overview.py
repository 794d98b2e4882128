"""Overview: the first page, and the nearest of what there is to what was typed.

In: a verb or flag that nobody knows, or nothing. Out: all verbs in the order of the data's way with what to do next here, or a usage
error that names the nearest. Reads Typer's notes about the verbs: to build them all takes three times as long as all else of `--help`.
"""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path
from typing import Any

from typer.main import get_command_from_info, get_command_name, get_group_from_info

from emergency_kit.cli.command import PROGRAM, SETTINGS, app, fill
from emergency_kit.errors import UsageError

# Every verb once; a test holds it to that.
FLOW = {
    "Prepare": ("setup", "verify"),
    "Data": ("data", "knowledge"),
    "Train": ("plan", "train", "sweep"),
    "Prove": ("evaluate", "gate"),
    "Ship": ("merge", "export-gguf", "kit", "upload-hf", "upload-gguf"),
    "Ask": ("infer", "serve"),
    "All in one": ("pipeline",),
    "Look": ("runs", "config", "reference", "completion"),
}
# What strangers type that is spelt too unlike the verb to be found by its letters.
OTHER_NAMES = {"ask": "infer", "chat": "infer", "prompt": "infer", "run": "pipeline", "start": "pipeline", "all": "pipeline",
               "install": "setup", "init": "setup",
               "check": "verify", "doctor": "verify", "test": "evaluate", "score": "evaluate", "finetune": "train", "learn": "train", "fine-tune": "train", "estimate": "plan",
               "quantize": "export-gguf", "gguf": "export-gguf", "ollama": "export-gguf --ollama", "web": "serve", "api": "serve", "pack": "kit",
               "usb": "kit", "cards": "knowledge", "dataset": "data", "version": "--version"}
# What a newcomer makes one after the other, and the verb that makes it.
WAY = (("models/SmolLM2-135M-Instruct/manifest.json", "setup", "the base model is not there yet"),
       ("outputs/checkpoints/final/manifest.json", "pipeline", "nothing is trained in outputs yet"),
       ("outputs/evaluation_report.json", "evaluate", "the trained model has not been evaluated"),
       ("outputs/merged/final/manifest.json", "merge", "the trained model is not merged yet"),
       ("outputs/gguf/manifest.json", "export-gguf", "the merged model is not exported yet"),
       ("outputs/kit/manifest.json", "kit", "no kit is packed yet"))


def _commands(verbs: Any = app) -> dict[str, Any]:
    """Typer's note about each command and group, by name."""
    return {info.name or get_command_name(info.callback.__name__): info for info in verbs.registered_commands} | {info.name: info for info in verbs.registered_groups}


def overview(here: Path = Path(".")) -> str:
    """The first page: every verb in one line, and the next command to try in this folder."""
    width = max(50, min(80, shutil.get_terminal_size().columns))
    known = _commands()
    column = 4 + max(map(len, known))
    lines = [fill(app.info.help or "", width), "", f"Usage: {PROGRAM} VERB [OPTIONS]"]
    for heading, verbs in FLOW.items():
        lines += ["", heading, *(fill(known[verb].short_help, width, f"  {verb}".ljust(column), " " * column) for verb in verbs)]
    verb, why = next_verb(here)
    return "\n".join([*lines, "", f"Next: {PROGRAM} {verb}", fill(f"({why})", width, "      ", "      "), f"A verb's flags: {PROGRAM} {verb} --help", ""])


def next_verb(here: Path) -> tuple[str, str]:
    """`(verb, why)` that goes on from what lies in a folder, by the default names."""
    return next(((verb, why) for file, verb, why in WAY if not (here / file).exists()), ("infer", "all is made; ask it"))


def find_command(arguments: list[str]) -> tuple[Any, list[str]]:
    """`(command, the words that name it)`: a verb, the verb of a group, or a group, built alone. Raises UsageError that names the nearest."""
    verbs, named = app, list[str]()
    info: Any = None
    for word in arguments:
        if named and word in SETTINGS["help_option_names"]:
            break
        info = _commands(verbs).get(word)
        if info is None:
            place = " ".join([PROGRAM, *named])
            raise UsageError(f"got {word!r} where a verb stands; all verbs: {place}" if word.startswith("-") else
                             f"no such verb {word!r}{_nearest_verb(word, verbs, named)}; all verbs: {place}")
        named.append(word)
        if not hasattr(info, "typer_instance"):
            return get_command_from_info(info, pretty_exceptions_short=False, rich_markup_mode=None), named
        verbs = info.typer_instance
    return get_group_from_info(info, pretty_exceptions_short=False, suggest_commands=True, rich_markup_mode=None), named


def _nearest_verb(name: str, verbs: Any, named: list[str]) -> str:
    """`; did you mean ...?` over the verbs of a group, all verbs, those within groups, and other names."""
    known = {verb: [*named, verb] for verb in _commands(verbs)}
    for verb, info in _commands().items():
        known.setdefault(verb, [verb])
        for inner in _commands(info.typer_instance) if hasattr(info, "typer_instance") else ():
            known.setdefault(inner, [verb, inner])
    known |= {other: [verb] for other, verb in OTHER_NAMES.items() if not named}
    word = name.lower().replace("_", "-")
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.7) or [verb for verb in known if len(word) > 2 and (verb.startswith(word) or word.startswith(verb))]
    return f"; did you mean {' '.join([PROGRAM, *known[close[0]]])}?" if close else ""


def suggest_flag(error: Any) -> str:
    """The message of Typer's usage error; for an unknown flag with the nearest one, or the config key of nearly that name."""
    flag = getattr(error, "option_name", None)
    if flag is None or not hasattr(error, "possibilities"):
        return str(error.format_message())
    from emergency_kit.config import ALIASES, Config, flatten

    keys = {key.partition(".")[2]: key for key in reversed((*ALIASES, *flatten(Config())))}
    alike = difflib.get_close_matches(flag.lstrip("-").replace("-", "_"), keys, n=1, cutoff=0.7)
    near = list(error.possibilities or [])[:1] or [f"--set {keys[name]}=VALUE" for name in alike]
    return f"{error.message}; did you mean {near[0]}?" if near else str(error.message)
