"""The command line: one verb per arrow of the data's way.

In: flags. Out: what the stage prints, and an exit code of `errors.py`. Stages are imported when
their verb runs, so that `--help` answers at once. Run: `emergency-kit VERB`, `python scripts/VERB.py`.
This file holds the one broad handler; `--debug` (or EMERGENCY_KIT_DEBUG=1) lets a traceback through.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer import Argument, Option
from typer.main import get_command_from_info, get_command_name, get_group

from emergency_kit import terminal
from emergency_kit.errors import ConfigError, Interrupted, KitError, UsageError, VerdictError
from emergency_kit.training import ranks

TRAINED = "EMERGENCY_KIT_TRAINED"  # the finished model of a pipeline that goes on in a fresh process
LONG_VERBS = {"train", "sweep", "evaluate", "merge", "export-gguf", "pipeline"}

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help="AI Emergency Kit: train, prove and ship an offline assistant for emergencies.")
config_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at the config.")
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Build and look at data.")
cache_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Tokenised splits kept for the next run.")
knowledge_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at the knowledge cards and emergency numbers.")
runs_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at trained models and lay them side by side.")
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
data_app.add_typer(cache_app, name="cache")
app.add_typer(knowledge_app, name="knowledge")
app.add_typer(runs_app, name="runs")

Profile = Annotated[str, Option(help="auto, embedded or mistral-7b.")]
ConfigPath = Annotated[Optional[str], Option("--config", help="Config folder (three YAML files), or one YAML file laid over the profile's.", metavar="FILE_OR_DIR")]
Settings = Annotated[Optional[list[str]], Option("--set", help="One config value, repeatable.", metavar="SECTION.KEY=VALUE")]
ModelName = Annotated[Optional[str], Option(help="Name of the finished model's folder under <output-dir>/checkpoints.")]
OutputDir = Annotated[Optional[str], Option(help="Folder for checkpoints, logs and what later stages write.")]
Checkpoint = Annotated[Optional[Path], Option(help="Adapter, merged or base folder, or for infer a GGUF file; by default the finished model of the config.")]
Source = Annotated[Optional[str], Argument(help="embedded, a Hub dataset, a file, a folder or a glob; by default the configured dataset.", metavar="SOURCE")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an output that is already there.")]
Debug = Annotated[bool, Option("--debug", help="Show tracebacks.")]


def _resolve(profile: str, config: str | None, settings: list[str] | None, **flags: Any) -> Any:
    from emergency_kit.config import load_config

    return load_config(profile, config, settings, {key.replace("__", "."): value for key, value in flags.items()})


def _scorer(resolved: Any, tokenizer: Any) -> Any:
    from emergency_kit.evaluation.during_training import build_scorer

    return build_scorer(resolved, tokenizer)


def print_config(resolved: Any) -> None:
    """Print the profile and every value that is not the class default, with its origin."""
    from emergency_kit.artifacts import redact

    print(f"Profile {resolved.profile} ({resolved.profile_reason})")
    for key, value, origin in resolved.differences():
        print(f"  {key} = {redact(value)}  [{redact(origin)}]")
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
    resume_from: Annotated[Optional[Path], Option(help="Checkpoint folder to go on from, or latest: the newest that verifies.", metavar="CKPT")] = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None,
    max_steps: Annotated[Optional[int], Option(help="Stop after this many optimizer steps.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the config and the plan, load nothing.")] = False,
    accept_changes: Annotated[bool, Option("--accept-changes", help="Go on though data or settings differ from the checkpoint's.")] = False,
    overwrite: Overwrite = False, debug: Debug = False,
) -> None:
    """Train LoRA adapters; an unfinished run of the same model is gone on with."""
    resolved = _resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir, training__max_steps=max_steps)
    print_config(resolved)
    from emergency_kit.training.run import train as stage

    stage(resolved, resume_from=resume_from, overwrite=overwrite, dry_run=dry_run, accept_changes=accept_changes, scorer=_scorer)


@app.command()
def sweep(
    set_: Annotated[Optional[list[str]], Option("--set", help="One config value, or several parted by commas, repeatable: every combination is trained.",
                                                metavar="SECTION.KEY=VALUE[,VALUE...]")] = None,
    lr_range: Annotated[Optional[str], Option(help="Instead: one short run whose learning rate rises from LOW to HIGH (a range test).", metavar="LOW:HIGH")] = None,
    output_dir: OutputDir = None, config: ConfigPath = None, profile: Profile = "auto",
    max_steps: Annotated[Optional[int], Option(help="Optimizer steps of each run.")] = None,
    workers: Annotated[int, Option(help="Runs side by side, each in a process of its own with its share of the cores; N runs need N times the memory.", min=1, metavar="N")] = 1,
    overwrite: Overwrite = False, debug: Debug = False,
) -> None:
    """Train every combination of settings and rank them by validation loss (outputs/sweep/sweep.md)."""
    from emergency_kit.training.sweep import start

    start(lambda settings: _resolve(profile, config, settings, training__max_steps=max_steps), set_ or [], output_dir, lr_range, overwrite, _scorer, workers)


@app.command()
def plan(
    gpu: Annotated[Optional[str], Option(help="Plan for a GPU of so much memory instead of this machine.", metavar="16GB")] = None,
    fit: Annotated[bool, Option("--fit", help="Change settings until it fits, the effective batch stays, and print them as flags.")] = False,
    no_timing: Annotated[bool, Option("--no-timing", help="Predict no time (it takes a few timed steps of a small model).")] = False,
    output_dir: OutputDir = None, config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None,
    max_steps: Annotated[Optional[int], Option(help="Stop after this many optimizer steps.")] = None, debug: Debug = False,
) -> None:
    """Say what training will take before it loads anything: steps, tokens, time, peak memory, disk."""
    resolved = _resolve("mistral-7b" if gpu and profile == "auto" else profile, config, set_, training__output_dir=output_dir, training__max_steps=max_steps)
    print_config(resolved)
    from emergency_kit.training.plan import plan as stage

    stage(resolved, gpu=gpu, fit=fit, timed=not no_timing)


@app.command()
def evaluate(
    others: Annotated[Optional[list[str]], Argument(help="More models for --compare.", metavar="[MODEL]...")] = None,
    checkpoint: Annotated[Optional[str], Option(help="base, an adapter, merged or base folder, a .gguf file, or an endpoint (http://host:port/v1#name).", metavar="MODEL")] = None,
    max_samples: Annotated[Optional[int], Option(help="Most test records that are answered.")] = None,
    output: Annotated[Optional[Path], Option(help="Report file; by default <output-dir>/evaluation_report.json.")] = None,
    compare: Annotated[Optional[list[str]], Option("--compare", help="Models side by side: --compare A B C; the first is what the others are compared with.", metavar="MODEL [MODEL]...")] = None,
    engine: Annotated[Optional[str], Option(help="What runs a folder: auto, llama.cpp or torch.")] = None,
    samples: Annotated[Optional[int], Option(help="Answers drawn per record beside the greedy one; safety counts the worst.")] = None,
    baselines: Annotated[Optional[bool], Option("--baselines", help="Ask the base model also without card and without format.")] = None,
    tuning_cost: Annotated[Optional[bool], Option("--tuning-cost", help="Perplexity and multiple choice before and after tuning.")] = None,
    red_team: Annotated[Optional[bool], Option("--red-team", help="Answer the prompts that pull toward harm, too.")] = None,
    ai: Annotated[bool, Option("--ai", help="Ask a language model to judge answers; the cost is estimated first.")] = False,
    ai_provider: Annotated[Optional[str], Option(help="anthropic, openai, gemini or openai-compatible.")] = None,
    ai_model: Annotated[Optional[str], Option(help="The judge's name at the provider.")] = None,
    ai_base_url: Annotated[Optional[str], Option(help="Address of an openai-compatible judge.")] = None,
    ai_max_samples: Annotated[Optional[int], Option(help="Most answers that are judged.")] = None,
    ai_budget: Annotated[Optional[float], Option(help="Most US dollars that judging may cost.")] = None,
    yes: Annotated[bool, Option("--yes", help="Spend the estimate without being asked.")] = False,
    output_dir: OutputDir = None, model_name: ModelName = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False,
) -> None:
    """Answer the test split and score the answers, the base model's and others' beside them."""
    if others and not compare:
        raise UsageError(f"got {others[0]!r} without a flag; expected --checkpoint {others[0]}, or --compare {others[0]} and others")
    resolved = _resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir, evaluation__max_samples=max_samples,
                        evaluation__engine=engine, evaluation__samples=samples, evaluation__baselines=baselines, evaluation__tuning_cost=tuning_cost,
                        evaluation__red_team=red_team, judge__provider=ai_provider, judge__model=ai_model, judge__base_url=ai_base_url,
                        judge__max_samples=ai_max_samples, judge__budget_usd=ai_budget)
    print_config(resolved)
    from emergency_kit.evaluation.run import evaluate as stage

    stage(resolved, checkpoint=checkpoint, out=output, compare=[*(compare or []), *(others or [])], ai=ai, yes=yes)


@app.command()
def gate(
    report: Annotated[Optional[Path], Option(help="Report to judge by; by default <output-dir>/evaluation_report.json.")] = None,
    override_verdict: Annotated[str, Option(help="Reason to ship although the verdict is no; recorded in it.", metavar="REASON")] = "",
    output_dir: OutputDir = None, model_name: ModelName = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False,
) -> None:
    """Say whether the evaluated model may ship; exit code 7 when it may not."""
    resolved = _resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir)
    from emergency_kit.evaluation.gate import gate as stage

    stage(resolved, report_path=report, override=override_verdict)


@app.command()
def infer(
    checkpoint: Checkpoint = None,
    prompt: Annotated[Optional[str], Option(help="The situation; without it a session starts.")] = None,
    max_new_tokens: Annotated[Optional[int], Option(help="Longest answer in tokens.")] = None,
    temperature: Annotated[Optional[float], Option(help="0 is greedy.")] = None,
    country: Annotated[Optional[str], Option(help="Two-letter code of the country whose emergency number answers name.")] = None,
    json: Annotated[bool, Option("--json", help="Print the answer as JSON.")] = False,
    no_guard: Annotated[bool, Option("--no-guard", help="The model's text alone, without checked guidance beside it.")] = False,
    output_dir: OutputDir = None, model_name: ModelName = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False,
) -> None:
    """Ask the model: one prompt, or a session (quit or Ctrl-D leaves, Ctrl-C stops an answer)."""
    resolved = _resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir,
                        inference__max_new_tokens=max_new_tokens, inference__temperature=temperature, inference__country=country,
                        inference__guard=False if no_guard else None)
    from emergency_kit.inference.chat import infer as stage

    stage(resolved, checkpoint=checkpoint, prompt=prompt, as_json=json)


@app.command()
def serve(
    checkpoint: Checkpoint = None,
    host: Annotated[Optional[str], Option(help="Address to listen on; one that others can reach needs --token.")] = None,
    port: Annotated[Optional[int], Option(help="Port; 0 takes any that is free.")] = None,
    token: Annotated[Optional[str], Option(help="Bearer token that clients must send; better set EMERGENCY_KIT_TOKEN, which no list of processes shows.")] = None,
    country: Annotated[Optional[str], Option(help="Two-letter code of the country whose emergency number answers name.")] = None,
    output_dir: OutputDir = None, model_name: ModelName = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False,
) -> None:
    """Serve the model on this machine: a page for people, an OpenAI-compatible API for programs."""
    resolved = _resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir,
                        serve__host=host, serve__port=port, inference__country=country)
    from emergency_kit.inference.server import serve as stage

    stage(resolved, checkpoint=checkpoint, token=token)


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


Override = Annotated[Optional[str], Option("--override-verdict", help="Reason to pack a model that the gate did not pass, or that changed since; the manifest carries it.", metavar="REASON")]


@app.command()
def export_gguf(
    checkpoint: Checkpoint = None,
    output: Annotated[Optional[Path], Option(help="Folder; by default <output-dir>/gguf.")] = None,
    quantization: Annotated[Optional[list[str]], Option("-q", "--quantization", help="GGUF type, repeatable or comma-separated.", metavar="NAME[,NAME...]")] = None,
    list_quantizations: Annotated[bool, Option("--list-quantizations", help="List the GGUF types and leave.")] = False,
    list_exports: Annotated[bool, Option("--list-exports", help="List the exported files with sizes, hashes and verdicts, and leave.")] = False,
    adapter: Annotated[bool, Option("--adapter", help="The adapter alone, for llama.cpp's --lora (f32, f16 or bf16).")] = False,
    ollama: Annotated[bool, Option("--ollama", help="Also a folder with a Modelfile for Ollama.")] = False,
    ollama_name: Annotated[Optional[str], Option(help="The model's name in Ollama; implies --ollama.", metavar="NAME")] = None,
    lmstudio: Annotated[bool, Option("--lmstudio", help="Also LM Studio's folders.")] = False,
    push_to_hub: Annotated[Optional[str], Option(help="Push the folder to this repository of the Hugging Face Hub (token: HF_TOKEN or hf auth login).", metavar="REPO")] = None,
    private: Annotated[bool, Option("--private", help="Make that repository private.")] = False,
    allow_out_of_bounds: Annotated[Optional[bool], Option("--allow-out-of-bounds", help="Keep files whose certificate is out of bounds.")] = None,
    override_verdict: Override = None,
    output_dir: OutputDir = None, model_name: ModelName = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, overwrite: Overwrite = False, debug: Debug = False,
) -> None:
    """Write GGUF files for llama.cpp, each with its parity certificate."""
    from emergency_kit.export.quantize import list_quantizations as list_stage

    if list_quantizations:
        list_stage()
        return
    names = [name.strip().lower() for item in quantization or [] for name in item.split(",") if name.strip()] or None
    resolved = _resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir, export__quantizations=names,
                        export__allow_out_of_bounds=allow_out_of_bounds)
    if list_exports:
        from emergency_kit.export.listing import list_exports as listing

        listing(resolved, output)
        return
    if private and not push_to_hub:
        raise UsageError("--private: only with --push-to-hub REPO")
    if adapter and (ollama or ollama_name or lmstudio):
        raise UsageError("--adapter: goes with neither --ollama nor --lmstudio, which run whole models")
    if push_to_hub:
        from emergency_kit.export.hub import check_repo

        check_repo(push_to_hub)
    if adapter:
        from emergency_kit.export.adapter_file import export_adapter

        paths = export_adapter(resolved, checkpoint, output, overwrite, override_verdict)
    else:
        from emergency_kit.export.gguf import export_gguf as stage
        from emergency_kit.export.layouts import Layouts

        paths = stage(resolved, checkpoint, output, overwrite, Layouts(ollama or bool(ollama_name), ollama_name, lmstudio), override_verdict)
    if push_to_hub:
        from emergency_kit.export.hub import upload_gguf as upload

        upload(resolved, push_to_hub, private, paths[0].parent, override_verdict=override_verdict)


Repo = Annotated[str, Option(help="Repository of the Hub, owner/name; made where it is missing.", metavar="REPO")]
Private = Annotated[bool, Option("--private", help="Make that repository private.")]


@app.command()
def upload_hf(
    repo: Repo, private: Private = False,
    checkpoint: Annotated[Optional[Path], Option(help="Adapter or merged folder; by default the merged model, else the adapter.")] = None,
    override_verdict: Override = None, output_dir: OutputDir = None, model_name: ModelName = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False,
) -> None:
    """Upload the merged model or the adapter, with a model card, to the Hugging Face Hub."""
    resolved = _resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir)
    from emergency_kit.export.hub import upload_hf as stage

    stage(resolved, repo, private, checkpoint, override_verdict)


@app.command()
def upload_gguf(
    repo: Repo, private: Private = False,
    folder: Annotated[Optional[Path], Option(help="Export folder; by default <output-dir>/gguf.")] = None,
    override_verdict: Override = None, output_dir: OutputDir = None, model_name: ModelName = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False,
) -> None:
    """Upload exported GGUF files, with certificates and a model card, to the Hugging Face Hub."""
    resolved = _resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir)
    from emergency_kit.export.hub import upload_gguf as stage

    stage(resolved, repo, private, folder, override_verdict)


@app.command()
def kit(
    model: Annotated[Optional[Path], Option(help="Exported GGUF file; by default the smallest in <output-dir>/gguf whose certificate is within bounds.", metavar="FILE")] = None,
    output: Annotated[Optional[Path], Option(help="Folder; by default <output-dir>/kit.")] = None,
    size_limit: Annotated[Optional[str], Option(help="Most that the kit may weigh; what does not fit is left out and named.", metavar="200MB")] = None,
    platform: Annotated[Optional[list[str]], Option(help="System that gets llama.cpp's wheels, repeatable, the most wanted first; none packs none.", metavar="NAME")] = None,
    python: Annotated[Optional[list[str]], Option(help="Python that the wheels are for, repeatable.", metavar="3.12")] = None,
    no_browser: Annotated[bool, Option("--no-browser", help="Without llama.cpp for the browser.")] = False,
    sign_key: Annotated[Optional[Path], Option(help="Private SSH key that signs the kit.", metavar="KEY")] = None,
    verify: Annotated[Optional[Path], Option(help="Check every byte of a kit, and leave.", metavar="FOLDER")] = None,
    signer: Annotated[Optional[Path], Option(help="With --verify: public key that must have signed it.", metavar="KEY.pub")] = None,
    override_verdict: Override = None, output_dir: OutputDir = None, model_name: ModelName = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, overwrite: Overwrite = False, debug: Debug = False,
) -> None:
    """Pack a folder for a USB stick that answers without a network, or check one."""
    if signer and not verify:
        raise UsageError("--signer: only with --verify FOLDER")
    if verify:
        from emergency_kit.kit.check import verify_kit

        verify_kit(verify, signer)
        return
    resolved = _resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir,
                        kit__platforms=[] if platform == ["none"] else platform, kit__python_versions=python)
    from emergency_kit.kit.pack import kit as stage

    stage(resolved, model, output, size_limit, override_verdict, sign_key, not no_browser, overwrite)


@app.command()
def pipeline(
    model_name: ModelName = None, output_dir: OutputDir = None, config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None,
    max_steps: Annotated[Optional[int], Option(help="Stop training after this many optimizer steps.")] = None,
    overwrite: Overwrite = False, debug: Debug = False,
) -> None:
    """Train, evaluate, merge, judge; then say what to do next. Exit code 7 when the verdict is not to ship."""
    resolved = _resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir, training__max_steps=max_steps)
    print_config(resolved)
    from emergency_kit.training.run import is_trained_as
    from emergency_kit.training.run import train as train_stage

    training = resolved.config.training
    adapter = Path(training.output_dir) / "checkpoints" / training.model_name
    trained = os.environ.get(TRAINED) == str(adapter.resolve())
    if adapter.exists() and (trained or not overwrite) and is_trained_as(resolved, adapter):
        print(f"1/4 train: {adapter} is {'' if trained else 'already '}trained with this config on this data{'' if trained else '; --overwrite trains anew'}", flush=True)
    else:
        print("1/4 train", flush=True)
        train_stage(resolved, overwrite=overwrite, scorer=_scorer)
        if "unsloth" in sys.modules:  # it has made transformers its own, for a GPU alone: what follows needs a fresh process
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {TRAINED: str(adapter.resolve())})
    print("2/4 evaluate", flush=True)
    from emergency_kit.evaluation.run import evaluate as evaluate_stage
    from emergency_kit.export.merge import merge as merge_stage

    evaluate_stage(resolved)
    print("3/4 merge", flush=True)
    merged = merge_stage(resolved, overwrite=True)
    print("4/4 gate", flush=True)
    from emergency_kit.evaluation.gate import gate as gate_stage

    verdict: VerdictError | None = None
    try:
        gate_stage(resolved)
    except VerdictError as error:  # everything is made and said before the exit code is
        verdict = error
    print(f"Done. Model: {merged}. Next: make infer (ask it), make export-gguf (files for llama.cpp).", flush=True)
    if verdict:
        raise verdict


@config_app.command("explain")
def config_explain(config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False) -> None:
    """Print every resolved value and where it came from."""
    from emergency_kit.artifacts import redact
    from emergency_kit.config import flatten

    resolved = _resolve(profile, config, set_)
    print(f"Profile {resolved.profile} ({resolved.profile_reason})")
    for key, value in flatten(resolved.config).items():
        print(f"{key} = {redact(value)}  [{resolved.origins.get(key, 'default')}]")


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


@runs_app.command("list")
def runs_list(
    folders: Annotated[Optional[list[Path]], Argument(help="Folders to look below; by default outputs.", metavar="[FOLDER]...")] = None, debug: Debug = False,
) -> None:
    """List trained models and unfinished runs, the newest first."""
    from emergency_kit.training.runs import list_runs

    list_runs(folders or [Path("outputs")])


@runs_app.command("show")
def runs_show(folder: Annotated[Path, Argument(help="Folder of a trained model or checkpoint.", metavar="RUN")], debug: Debug = False) -> None:
    """Show one run: results, settings, data, machine, versions."""
    from emergency_kit.training.runs import show_run

    show_run(folder)


@runs_app.command("compare")
def runs_compare(folders: Annotated[list[Path], Argument(help="Folders of trained models or checkpoints.", metavar="RUN RUN...")], debug: Debug = False) -> None:
    """Lay runs side by side: settings that differ first, then data and machine, then results."""
    from emergency_kit.training.runs import compare_runs

    compare_runs(folders)


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
    name = f"scripts/{Path(sys.argv[0]).name}" if verb else f"emergency-kit {arguments[0]}" if arguments[:1] else "emergency-kit"
    debug = "--debug" in arguments or os.environ.get("EMERGENCY_KIT_DEBUG") == "1"
    _prepare_process()
    # What runs for long must not end with the terminal that it was started from.
    with terminal.surviving() if set(arguments[:1]) & LONG_VERBS else contextlib.nullcontext():
        try:
            code = _call(arguments, name, debug)
        except KeyboardInterrupt:  # while an error was being said
            code = Interrupted.exit_code
    sys.exit(code)


def _prepare_process() -> None:
    """SIGTERM ends as Ctrl-C does, of several ranks the first alone prints, `.env` is read, a narrow terminal encoding replaces what it cannot show, tracebacks hide secrets."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.excepthook = _show_traceback
    if not ranks.is_first():
        sys.stdout = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if Path(".env").is_file():
        from dotenv import load_dotenv

        load_dotenv(".env")  # what the environment holds already stays


def _command(verb: str) -> Any:
    """The one command of this name, or None. To put all thirty together, and read a group's arguments, takes three times as long as all else of --help."""
    named = [info for info in app.registered_commands if (info.name or get_command_name(info.callback.__name__)) == verb]
    return get_command_from_info(named[0], pretty_exceptions_short=False, rich_markup_mode=None) if named else None


def _call(arguments: list[str], name: str, debug: bool) -> int:
    try:
        command = _command(arguments[0]) if arguments else None
        if command is not None:
            code = command(args=arguments[1:], prog_name=name, standalone_mode=False)
        else:
            code = get_group(app)(args=arguments, prog_name="emergency-kit", standalone_mode=False)
        return code if isinstance(code, int) else 0
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
    if type(error).__name__ == "NoArgsIsHelpError":  # Typer keeps its family of errors to itself
        print(error.format_message(), file=sys.stderr)
        return UsageError.exit_code
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's own family of usage errors
        _say(f"{error.format_message()} Next: --help")
        return UsageError.exit_code
    stage_code = {"train": 5, "pipeline": 5, "merge": 6, "kit": 6, "export-gguf": 6, "upload-hf": 6, "upload-gguf": 6, "evaluate": 4, "gate": 7, "infer": 4,
                  "serve": 4, "data": 3, "knowledge": 3, "plan": 5, "runs": 4}.get(verb, 1)
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
    from emergency_kit.cli import main as start  # by the module's own name: a sweep's workers look there for what they are handed

    start()
