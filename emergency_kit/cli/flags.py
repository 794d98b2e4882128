"""Flags that several verbs share, and the way from flags to a config.

In: what was given on the command line. Out: a resolved config, flags over `--set` over YAML. Values that a shell may complete are
looked up when it asks.
"""

from __future__ import annotations

import sys
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Callable, Optional

from typer import Argument, Option

if TYPE_CHECKING:
    from emergency_kit.config import Resolved


def choices(key: str) -> Callable[[], list[str]]:
    """For completion: the values that a config key may have."""

    def find() -> list[str]:
        from emergency_kit.config import Config

        section, _, name = key.partition(".")
        kind: Any = Config.model_fields[section].annotation
        return [str(value) for value in typing.get_args(kind.model_fields[name].annotation)]

    return find


def _profiles() -> list[str]:
    from emergency_kit.config import PROFILES

    return ["auto", *PROFILES]


def _settings() -> list[str]:
    from emergency_kit.config import Config, flatten

    return [f"{key}=" for key in flatten(Config())]


def _types() -> list[str]:
    from emergency_kit.config import BOUNDS

    return list(BOUNDS["max_mean_kl"])


Profile = Annotated[str, Option(metavar="NAME", autocompletion=_profiles,
                                help="auto, embedded (no GPU needed) or mistral-7b; auto takes mistral-7b where a CUDA GPU is.")]
ConfigPath = Annotated[Optional[str], Option("--config", help="Config folder (three YAML files), or one YAML file laid over the profile's.", metavar="FILE_OR_DIR")]
Settings = Annotated[Optional[list[str]], Option("--set", help="One config value, repeatable; all keys: config explain.", metavar="SECTION.KEY=VALUE", autocompletion=_settings)]
ModelName = Annotated[Optional[str], Option(help="Name of the finished model's folder under <output-dir>/checkpoints; final by default.", metavar="NAME")]
OutputDir = Annotated[Optional[str], Option(help="Folder for checkpoints, logs and what later stages write; outputs by default.", metavar="FOLDER")]
Checkpoint = Annotated[Optional[Path], Option(help="GGUF file, or adapter, merged or base folder; by default the finished model of the config.", metavar="MODEL")]
Country = Annotated[Optional[str], Option(help="Two-letter code of the country whose emergency number answers name.", metavar="CODE")]
Override = Annotated[Optional[str], Option("--override-verdict", metavar="REASON", help="Reason to pack a model that the gate did not pass, or that changed since; "
                                                                                       "the manifest carries it.")]
Quantization = Annotated[Optional[list[str]], Option("-q", "--quantization", metavar="NAME[,NAME...]", autocompletion=_types,
                                                     help="GGUF type, repeatable or comma-separated; by default those of export.quantizations.")]
Repo = Annotated[str, Option(help="Repository of the Hub, owner/name; made where it is missing.", metavar="REPO")]
Private = Annotated[bool, Option("--private", help="Make that repository private.")]
Source = Annotated[Optional[str], Argument(help="embedded, a Hub dataset, a file, a folder or a glob; by default the configured dataset.", metavar="SOURCE")]
MaxSteps = Annotated[Optional[int], Option(help="Stop training after this many optimizer steps.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an output that is already there.")]
Debug = Annotated[bool, Option("--debug", help="Show the traceback of an error.")]


def resolve(profile: str, config: str | None, settings: list[str] | None, **flags: Any) -> Resolved:
    """The config of a call; `section__key=value` is a flag's, None where it was not given."""
    from emergency_kit.config import load_config

    return load_config(profile, config, settings, {key.replace("__", "."): value for key, value in flags.items()})


def print_config(resolved: Resolved) -> None:
    """Print the profile and every value that is not the class default, with its origin."""
    from emergency_kit.artifacts import redact

    print(f"Profile {resolved.profile} ({resolved.profile_reason})")
    for key, value, origin in resolved.differences():
        print(f"  {key} = {redact(value)}  [{redact(origin)}]")
    sys.stdout.flush()
