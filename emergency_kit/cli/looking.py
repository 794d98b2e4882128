"""Looking at things: config, data, knowledge cards, trained models, and this command line itself. Nothing here trains.

In: flags. Out: what is asked for, on the console. What a verb needs is imported when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

from typer import Argument, Option

from emergency_kit.cli.command import COMPLETE, PROGRAM, Verbs, app
from emergency_kit.cli.flags import ConfigPath, Debug, OutputDir, Overwrite, Profile, Settings, Source, resolve
from emergency_kit.errors import UsageError

config_group = Verbs("See every setting, and where it came from.")
data_group = Verbs("Build datasets, and look at yours before anything is trained on it.")
cache_group = Verbs("Tokenised splits kept for the next run.")
knowledge_group = Verbs("Read the knowledge cards: what is true about each hazard, with sources.")
runs_group = Verbs("See trained models and lay them side by side.")
SHELLS = ("bash", "zsh", "fish")
# zsh loads the file when TAB is pressed for the first time, and Typer's script then only defines the function.
AT_ONCE = f"""
if [ "$funcstack[1]" = "_{PROGRAM}" ]; then
  _{PROGRAM.replace('-', '_')}_completion "$@"
fi
"""
SPLITS = ("train", "validation", "test")
app.add_typer(data_group, name="data", short_help="Build, inspect and preview datasets")
data_group.add_typer(cache_group, name="cache", short_help="Tokenised splits kept for the next run")
app.add_typer(knowledge_group, name="knowledge", short_help="Read the cards that answers are built from")
app.add_typer(runs_group, name="runs", short_help="Trained models, listed and compared")
app.add_typer(config_group, name="config", short_help="Every setting, and where it came from")


@config_group.verb("explain", example="config explain --profile mistral-7b")
def config_explain(config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False) -> None:
    """Print every resolved value and where it came from."""
    from emergency_kit.artifacts import redact
    from emergency_kit.config import flatten

    resolved = resolve(profile, config, set_)
    print(f"Profile {resolved.profile} ({resolved.profile_reason})")
    for key, value in flatten(resolved.config).items():
        print(f"{key} = {redact(value)}  [{resolved.origins.get(key, 'default')}]")


@config_group.verb("reference")
def config_reference(debug: Debug = False) -> None:
    """Print the table of all keys that docs/Configuration.md carries."""
    from emergency_kit.config import reference

    print(reference(), end="")


@data_group.verb("build", example="data build --seed 3 --size 500", then="data preview outputs/data/embedded")
def data_build(
    output: Annotated[Path, Option(help="Folder for the three JSONL files and the dataset card.", metavar="FOLDER")] = Path("outputs/data/embedded"),
    seed: Annotated[Optional[int], Option(help="Seed of the builder; the same seed and size give the same bytes.")] = None,
    size: Annotated[Optional[int], Option(help="Records, all splits together.")] = None,
    overwrite: Overwrite = False, debug: Debug = False,
) -> None:
    """Build the embedded dataset from the knowledge cards."""
    from emergency_kit.data.build import build as stage

    stage(resolve("embedded", None, None, dataset__build_seed=seed, dataset__build_size=size), output, overwrite=overwrite)


@data_group.verb("inspect", example="data inspect my.jsonl --html survey.html", then="data preview")
def data_inspect(
    source: Source = None,
    html: Annotated[Optional[Path], Option(help="Write a page with plots to this file.", metavar="FILE")] = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False,
) -> None:
    """Show what a dataset is made of and what is wrong with it."""
    from emergency_kit.data.survey import inspect as stage

    stage(resolve(profile, config, set_), source, html)


@data_group.verb("preview", example="data preview embedded -n 3", then="plan")
def data_preview(
    source: Source = None,
    number: Annotated[int, Option("-n", help="Rows to show.", min=1, metavar="ROWS")] = 1,
    split: Annotated[str, Option(help="train, validation or test.", metavar="NAME", autocompletion=lambda: list(SPLITS))] = "train",
    ids: Annotated[bool, Option("--ids", help="One line a token, with its id and label.")] = False,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False,
) -> None:
    """Show rows as the model reads them, what is supervised in colour."""
    from emergency_kit.data.preview import preview as stage

    if split not in SPLITS:
        raise UsageError(f"--split: got {split!r}; expected train, validation or test")
    stage(resolve(profile, config, set_), source, split, number, ids)


@cache_group.verb("list")
def data_cache_list(output_dir: OutputDir = None, config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False) -> None:
    """List tokenised splits with their size and last use."""
    from emergency_kit.data.cache import list_cache

    list_cache(resolve(profile, config, set_, training__output_dir=output_dir))


@cache_group.verb("prune", example="data cache prune --days 7")
def data_cache_prune(
    days: Annotated[float, Option(help="Keep what was used within so many days; 0 removes all.", min=0, metavar="DAYS")] = 30,
    output_dir: OutputDir = None, config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False,
) -> None:
    """Remove tokenised splits not used lately, and leftovers of killed processes."""
    from emergency_kit.data.cache import prune_cache

    prune_cache(resolve(profile, config, set_, training__output_dir=output_dir), days)


@runs_group.verb("list")
def runs_list(
    folders: Annotated[Optional[list[Path]], Argument(help="Folders to look below; by default outputs.", metavar="FOLDER")] = None, debug: Debug = False,
) -> None:
    """List trained models and unfinished runs, the newest first."""
    from emergency_kit.training.runs import list_runs

    list_runs(folders or [Path("outputs")])


@runs_group.verb("show", example="runs show outputs/checkpoints/final")
def runs_show(folder: Annotated[Path, Argument(help="Folder of a trained model or checkpoint.", metavar="RUN")], debug: Debug = False) -> None:
    """Show one run: results, settings, data, machine, versions."""
    from emergency_kit.training.runs import show_run

    show_run(folder)


@runs_group.verb("compare", example="runs compare outputs/a outputs/b")
def runs_compare(folders: Annotated[list[Path], Argument(help="Folders of trained models or checkpoints.", metavar="RUN")], debug: Debug = False) -> None:
    """Lay runs side by side: settings that differ first, then data and machine, then results."""
    from emergency_kit.training.runs import compare_runs

    compare_runs(folders)


@knowledge_group.verb("list", then="knowledge show stroke")
def knowledge_list(debug: Debug = False) -> None:
    """List every card."""
    from emergency_kit.knowledge.show import list_cards

    list_cards()


@knowledge_group.verb("show", example="knowledge show stroke --country GB")
def knowledge_show(
    hazard: Annotated[str, Argument(help="Id or name of a card, for instance stroke; all: knowledge list.", metavar="HAZARD")],
    country: Annotated[str, Option(help="Two-letter code of the country whose emergency number is shown.", metavar="CODE")] = "", debug: Debug = False,
) -> None:
    """Show one card in full, with its sources."""
    from emergency_kit.knowledge.show import show_card

    show_card(hazard, country)


@knowledge_group.verb("find", example='knowledge find "my pan is on fire"')
def knowledge_find(
    scenario: Annotated[str, Argument(help="What is reported, in words.", metavar="SITUATION")],
    number: Annotated[int, Option("-n", help="Cards to rank.", min=1, metavar="CARDS")] = 5, debug: Debug = False,
) -> None:
    """Rank the cards for a scenario, with the words that matched."""
    from emergency_kit.knowledge.show import find_cards

    find_cards(scenario, number)


@knowledge_group.verb("check")
def knowledge_check(debug: Debug = False) -> None:
    """Report contradictions, missing sources, stale years and rules that no phrase can satisfy."""
    from emergency_kit.knowledge.show import print_check

    print_check()


@knowledge_group.verb("reference")
def knowledge_reference(debug: Debug = False) -> None:
    """Print docs/Knowledge.md."""
    from emergency_kit.knowledge.show import reference as page

    print(page(), end="")


@app.verb(short="This command line in full, as Markdown")
def reference(debug: Debug = False) -> None:
    """Print docs/CLI.md: every verb and flag, and the exit codes."""
    from emergency_kit.cli.reference import reference as page

    print(page(), end="")


@app.verb("completion", short="Let your shell complete verbs and flags", example="completion bash --install")
def complete(
    shell: Annotated[str, Argument(help="bash, zsh or fish.", metavar="SHELL", autocompletion=lambda: list(SHELLS))],
    install: Annotated[bool, Option("--install", help="Write it where that shell looks for it, below your home folder, instead of printing it.")] = False,
    debug: Debug = False,
) -> None:
    """Print the script that completes verbs, flags and many of their values when TAB is pressed, or install it."""
    from typer import completion

    scripts: Any = completion
    if shell not in SHELLS:
        raise UsageError(f"completion: got {shell!r}; expected {', '.join(SHELLS)}")
    more = AT_ONCE if shell == "zsh" else ""
    if install:
        _, place = scripts.install(shell=shell, prog_name=PROGRAM, complete_var=COMPLETE)
        with place.open("a") as file:
            file.write(more)
        print(f"Completion for {shell} is in {place}. Next: open a new terminal, type {PROGRAM} tr and press TAB")
    else:
        print(scripts.get_completion_script(prog_name=PROGRAM, complete_var=COMPLETE, shell=shell) + more)
