"""The command line: one verb per arrow of the data's way.

In: flags. Out: what the stage prints, and an exit code of `errors.py`. Stages are imported when
their verb runs, so that `--help` answers at once. Run: `emergency-kit VERB`, `python scripts/VERB.py`.
This file holds the one broad handler; `--debug` (or EMERGENCY_KIT_DEBUG=1) lets a traceback through.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer import Argument, Option

from emergency_kit.errors import ConfigError, Interrupted, KitError, UsageError

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help="AI Emergency Kit: train, prove and ship an offline assistant for emergencies.")
config_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at the config.")
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Build and look at data.")
cache_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Tokenised splits kept for the next run.")
knowledge_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at the knowledge cards and emergency numbers.")
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
data_app.add_typer(cache_app, name="cache")
app.add_typer(knowledge_app, name="knowledge")

Profile = Annotated[str, Option(help="auto, embedded or mistral-7b.")]
ConfigPath = Annotated[Optional[str], Option("--config", help="Config folder (three YAML files), or one YAML file laid over the profile's.", metavar="FILE_OR_DIR")]
Settings = Annotated[Optional[list[str]], Option("--set", help="One config value, repeatable.", metavar="SECTION.KEY=VALUE")]
ModelName = Annotated[Optional[str], Option(help="Name of the finished model's folder under <output-dir>/checkpoints.")]
OutputDir = Annotated[Optional[str], Option(help="Folder for checkpoints, logs and what later stages write.")]
Checkpoint = Annotated[Optional[Path], Option(help="Adapter, merged or base folder; by default the finished model of the config.")]
Source = Annotated[Optional[str], Argument(help="embedded, a Hub dataset, a file, a folder or a glob; by default the configured dataset.", metavar="SOURCE")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an output that is already there.")]
Debug = Annotated[bool, Option("--debug", help="Show tracebacks.")]


def _resolve(profile: str, config: str | None, settings: list[str] | None, **flags: Any) -> Any:
    from emergency_kit.config import load_config

    return load_config(profile, config, settings, {key.replace("__", "."): value for key, value in flags.items()})


def print_config(resolved: Any) -> None:
    """Print the profile and every value that is not the class default, with its origin."""
    print(f"Profile {resolved.profile} ({resolved.profile_reason})")
    for key, value, origin in resolved.differences():
        print(f"  {key} = {value}  [{origin}]")
    sys.stdout.flush()


@app.command()
def setup(debug: Debug = False) -> None:
    """Prepare the bundled base model and the index of retrieval in models/ where they are missing."""
    from emergency_kit.config import load_config
    from emergency_kit.knowledge.cards import load_cards
    from emergency_kit.knowledge.index import load_index
    from emergency_kit.model import bundled

    folder = bundled.setup(load_config("embedded"))
    load_index(load_cards())
    print(f"Base model ready: {folder}")


@app.command()
def verify(profile: Profile = "auto", config: ConfigPath = None, set_: Settings = None, debug: Debug = False) -> None:
    """Check the environment: packages, base model, tokenizer, GPU, disk."""
    from emergency_kit.model.verify import verify as stage

    stage(_resolve(profile, config, set_))


@app.command()
def train(
    model_name: ModelName = None, output_dir: OutputDir = None,
    resume_from: Annotated[Optional[Path], Option(help="Checkpoint folder to go on from.", metavar="CKPT")] = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None,
    max_steps: Annotated[Optional[int], Option(help="Stop after this many optimizer steps.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the config and the plan, load nothing.")] = False,
    overwrite: Overwrite = False, debug: Debug = False,
) -> None:
    """Train LoRA adapters."""
    resolved = _resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir, training__max_steps=max_steps)
    print_config(resolved)
    from emergency_kit.training.run import train as stage

    stage(resolved, resume_from=resume_from, overwrite=overwrite, dry_run=dry_run)


@app.command()
def evaluate(
    checkpoint: Checkpoint = None,
    max_samples: Annotated[Optional[int], Option(help="Most test records that are answered.")] = None,
    output: Annotated[Optional[Path], Option(help="Report file; by default <output-dir>/evaluation_report.json.")] = None,
    output_dir: OutputDir = None, model_name: ModelName = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False,
) -> None:
    """Answer the test split and score the answers, the base model's beside the tuned one's."""
    resolved = _resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir, evaluation__max_samples=max_samples)
    print_config(resolved)
    from emergency_kit.evaluation.run import evaluate as stage

    stage(resolved, checkpoint=checkpoint, out=output)


@app.command()
def infer(
    checkpoint: Checkpoint = None,
    prompt: Annotated[Optional[str], Option(help="The situation; without it a session starts.")] = None,
    max_new_tokens: Annotated[Optional[int], Option(help="Longest answer in tokens.")] = None,
    temperature: Annotated[Optional[float], Option(help="0 is greedy.")] = None,
    country: Annotated[Optional[str], Option(help="Two-letter code of the country whose emergency number answers name.")] = None,
    json: Annotated[bool, Option("--json", help="Print the answer as JSON.")] = False,
    output_dir: OutputDir = None, model_name: ModelName = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False,
) -> None:
    """Ask the model: one prompt, or a session (quit or Ctrl-D leaves, Ctrl-C stops an answer)."""
    resolved = _resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir,
                        inference__max_new_tokens=max_new_tokens, inference__temperature=temperature, inference__country=country)
    from emergency_kit.inference.chat import infer as stage

    stage(resolved, checkpoint=checkpoint, prompt=prompt, as_json=json)


@app.command()
def merge(
    checkpoint: Checkpoint = None,
    output: Annotated[Optional[Path], Option(help="Folder; by default <output-dir>/merged/<model-name>.")] = None,
    output_dir: OutputDir = None, model_name: ModelName = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, overwrite: Overwrite = False, debug: Debug = False,
) -> None:
    """Merge the adapter into the full-precision base model and prove that nothing changed."""
    resolved = _resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir)
    from emergency_kit.export.merge import merge as stage

    stage(resolved, checkpoint=checkpoint, out=output, overwrite=overwrite)


@app.command()
def export_gguf(
    checkpoint: Checkpoint = None,
    output: Annotated[Optional[Path], Option(help="Folder; by default <output-dir>/gguf.")] = None,
    quantization: Annotated[Optional[list[str]], Option("-q", "--quantization", help="GGUF type, repeatable or comma-separated.", metavar="NAME[,NAME...]")] = None,
    list_quantizations: Annotated[bool, Option("--list-quantizations", help="List the GGUF types and leave.")] = False,
    output_dir: OutputDir = None, model_name: ModelName = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, overwrite: Overwrite = False, debug: Debug = False,
) -> None:
    """Write GGUF files for llama.cpp."""
    from emergency_kit.export.quantize import list_quantizations as list_stage

    if list_quantizations:
        list_stage()
        return
    names = [name.strip().lower() for item in quantization or [] for name in item.split(",") if name.strip()] or None
    resolved = _resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir, export__quantizations=names)
    from emergency_kit.export.gguf import export_gguf as stage

    stage(resolved, checkpoint=checkpoint, out=output, overwrite=overwrite)


@app.command()
def pipeline(
    model_name: ModelName = None, output_dir: OutputDir = None, config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None,
    max_steps: Annotated[Optional[int], Option(help="Stop training after this many optimizer steps.")] = None,
    overwrite: Overwrite = False, debug: Debug = False,
) -> None:
    """Train, evaluate, merge; then say what to do next."""
    resolved = _resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir, training__max_steps=max_steps)
    print_config(resolved)
    from emergency_kit.training.run import is_trained_as
    from emergency_kit.training.run import train as train_stage

    training = resolved.config.training
    adapter = Path(training.output_dir) / "checkpoints" / training.model_name
    if adapter.exists() and not overwrite and is_trained_as(resolved, adapter):
        print(f"1/3 train: {adapter} is already trained with this config on this data; --overwrite trains anew", flush=True)
    else:
        print("1/3 train", flush=True)
        train_stage(resolved, overwrite=overwrite)
    print("2/3 evaluate", flush=True)
    from emergency_kit.evaluation.run import evaluate as evaluate_stage
    from emergency_kit.export.merge import merge as merge_stage

    evaluate_stage(resolved)
    print("3/3 merge", flush=True)
    merged = merge_stage(resolved, overwrite=True)
    print(f"Done. Model: {merged}. Next: make infer (ask it), make export-gguf (files for llama.cpp).")


@config_app.command("explain")
def config_explain(config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False) -> None:
    """Print every resolved value and where it came from."""
    from emergency_kit.config import flatten

    resolved = _resolve(profile, config, set_)
    print(f"Profile {resolved.profile} ({resolved.profile_reason})")
    for key, value in flatten(resolved.config).items():
        print(f"{key} = {value}  [{resolved.origins.get(key, 'default')}]")


@config_app.command("reference")
def config_reference(debug: Debug = False) -> None:
    """Print the table of all keys that docs/Configuration.md carries."""
    from emergency_kit.config import reference

    print(reference(), end="")


@data_app.command("build")
def data_build(
    output: Annotated[Path, Option(help="Folder for the three JSONL files and the dataset card.")] = Path("outputs/data/embedded"),
    seed: Annotated[Optional[int], Option(help="Seed of the builder.")] = None,
    size: Annotated[Optional[int], Option(help="Records, all splits together.")] = None,
    overwrite: Overwrite = False, debug: Debug = False,
) -> None:
    """Build the embedded dataset from the knowledge cards."""
    from emergency_kit.data.build import build as stage

    stage(_resolve("embedded", None, None, dataset__build_seed=seed, dataset__build_size=size), output, overwrite=overwrite)


@data_app.command("inspect")
def data_inspect(
    source: Source = None,
    html: Annotated[Optional[Path], Option(help="Write a page with plots to this file.", metavar="FILE")] = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False,
) -> None:
    """Show what a dataset is made of and what is wrong with it."""
    from emergency_kit.data.survey import inspect as stage

    stage(_resolve(profile, config, set_), source, html)


@data_app.command("preview")
def data_preview(
    source: Source = None,
    number: Annotated[int, Option("-n", help="Rows to show.", min=1)] = 1,
    split: Annotated[str, Option(help="train, validation or test.")] = "train",
    ids: Annotated[bool, Option("--ids", help="One line a token, with its id and label.")] = False,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False,
) -> None:
    """Show rows as the model reads them, what is supervised in colour."""
    from emergency_kit.data.preview import preview as stage

    if split not in ("train", "validation", "test"):
        raise UsageError(f"--split: got {split!r}; expected train, validation or test")
    stage(_resolve(profile, config, set_), source, split, number, ids)


@cache_app.command("list")
def data_cache_list(output_dir: OutputDir = None, config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False) -> None:
    """List tokenised splits with their size and last use."""
    from emergency_kit.data.cache import list_cache

    list_cache(_resolve(profile, config, set_, training__output_dir=output_dir))


@cache_app.command("prune")
def data_cache_prune(
    days: Annotated[float, Option(help="Keep what was used within so many days; 0 removes all.", min=0)] = 30,
    output_dir: OutputDir = None, config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False,
) -> None:
    """Remove tokenised splits not used lately, and leftovers of killed processes."""
    from emergency_kit.data.cache import prune_cache

    prune_cache(_resolve(profile, config, set_, training__output_dir=output_dir), days)


@knowledge_app.command("list")
def knowledge_list(debug: Debug = False) -> None:
    """List every card."""
    from emergency_kit.knowledge.show import list_cards

    list_cards()


@knowledge_app.command("show")
def knowledge_show(
    hazard: Annotated[str, Argument(help="Id or name of a card, for instance stroke.")],
    country: Annotated[str, Option(help="Two-letter code of the country whose emergency number is shown.")] = "", debug: Debug = False,
) -> None:
    """Show one card in full, with its sources."""
    from emergency_kit.knowledge.show import show_card

    show_card(hazard, country)


@knowledge_app.command("find")
def knowledge_find(
    scenario: Annotated[str, Argument(help="What is reported, in words.")],
    number: Annotated[int, Option("-n", help="Cards to rank.", min=1)] = 5, debug: Debug = False,
) -> None:
    """Rank the cards for a scenario, with the words that matched."""
    from emergency_kit.knowledge.show import find_cards

    find_cards(scenario, number)


@knowledge_app.command("check")
def knowledge_check(debug: Debug = False) -> None:
    """Report contradictions, missing sources, stale years and rules that no phrase can satisfy."""
    from emergency_kit.knowledge.show import print_check

    print_check()


@knowledge_app.command("reference")
def knowledge_reference(debug: Debug = False) -> None:
    """Print docs/Knowledge.md."""
    from emergency_kit.knowledge.show import reference

    print(reference(), end="")


def main(verb: str | None = None) -> None:
    """Entry point; `verb` is fixed by the scripts. Exits with the code of the error family."""
    arguments = ([verb] if verb else []) + sys.argv[1:]
    name = f"scripts/{Path(sys.argv[0]).name}" if verb else "emergency-kit"
    debug = "--debug" in arguments or os.environ.get("EMERGENCY_KIT_DEBUG") == "1"
    try:
        code = app(args=arguments, prog_name=name, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except ConfigError as error:
        if debug:
            raise
        for problem in error.problems:
            _say(problem)
        sys.exit(error.exit_code)
    except KitError as error:
        if debug:
            raise
        _say(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(Interrupted.exit_code)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except Exception as error:
        if debug:
            raise
        sys.exit(_explain(error, arguments[0] if arguments else ""))


def _say(message: str) -> None:
    sys.stdout.flush()
    print("error: " + " ".join(message.split()), file=sys.stderr)


def _explain(error: Exception, verb: str) -> int:
    """Say an unexpected error in one line and return its exit code."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's own family of usage errors
        _say(f"{error.format_message()} Next: --help")
        return UsageError.exit_code
    stage_code = {"train": 5, "pipeline": 5, "merge": 6, "export-gguf": 6, "evaluate": 4, "infer": 4, "data": 3, "knowledge": 3}.get(verb, 1)
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


if __name__ == "__main__":
    main()
