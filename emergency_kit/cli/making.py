"""Making a model: set up, plan, train, evaluate, judge; one verb a stage.

In: flags. Out: what the stage prints and writes. Stages are imported when their verb runs, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Optional

from typer import Argument, Option

from emergency_kit.cli.command import app
from emergency_kit.cli.flags import ConfigPath, Debug, MaxSteps, ModelName, OutputDir, Overwrite, Profile, Settings, choices, print_config, resolve
from emergency_kit.errors import UsageError, VerdictError

TRAINED = "EMERGENCY_KIT_TRAINED"  # the finished model of a pipeline that goes on in a fresh process


@app.verb(short="Prepare the bundled base model", then="verify")
def setup(debug: Debug = False) -> None:
    """Prepare the bundled base model and the index of retrieval in models/ where they are missing."""
    from emergency_kit.api import setup as stage

    print(f"Base model ready: {stage()}")


@app.verb(short="Check packages, base model, GPU and disk", then="pipeline")
def verify(profile: Profile = "auto", config: ConfigPath = None, set_: Settings = None, debug: Debug = False) -> None:
    """Check the environment: packages, base model, tokenizer, GPU, disk."""
    from emergency_kit.model.verify import verify as stage

    stage(resolve(profile, config, set_))


@app.verb(short="Foresee time, memory and disk of training", example="plan --gpu 16GB --fit", then="train")
def plan(
    gpu: Annotated[Optional[str], Option(help="Plan for a GPU of so much memory instead of this machine.", metavar="16GB")] = None,
    fit: Annotated[bool, Option("--fit", help="Change settings until it fits, the effective batch stays, and print them as flags.")] = False,
    no_timing: Annotated[bool, Option("--no-timing", help="Predict no time, which takes a few timed steps of a small model.")] = False,
    output_dir: OutputDir = None, config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None,
    max_steps: MaxSteps = None, debug: Debug = False,
) -> None:
    """Say what training will take before it loads anything: steps, tokens, time, peak memory, disk."""
    resolved = resolve("mistral-7b" if gpu and profile == "auto" else profile, config, set_, training__output_dir=output_dir, training__max_steps=max_steps)
    print_config(resolved)
    from emergency_kit.training.plan import plan as stage

    stage(resolved, gpu=gpu, fit=fit, timed=not no_timing)


@app.verb(short="Train adapters; goes on with a stopped run", example="train --set training.num_epochs=2", then="evaluate")
def train(
    model_name: ModelName = None, output_dir: OutputDir = None,
    resume_from: Annotated[Optional[Path], Option(help="Checkpoint folder to go on from, or latest: the newest that verifies.", metavar="CKPT")] = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None,
    max_steps: MaxSteps = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the config and the plan, load nothing.")] = False,
    accept_changes: Annotated[bool, Option("--accept-changes", help="Go on though data or settings differ from the checkpoint's.")] = False,
    overwrite: Overwrite = False, debug: Debug = False,
) -> None:
    """Train LoRA adapters; an unfinished run of the same model is gone on with."""
    resolved = resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir, training__max_steps=max_steps)
    print_config(resolved)
    from emergency_kit.api import lazy_scorer
    from emergency_kit.training.run import train as stage

    stage(resolved, resume_from=resume_from, overwrite=overwrite, dry_run=dry_run, accept_changes=accept_changes, scorer=lazy_scorer)


@app.verb(short="Train several settings and rank them", example="sweep --set lora.r=8,16", then="runs list")
def sweep(
    set_: Annotated[Optional[list[str]], Option("--set", help="One config value, or several parted by commas, repeatable: every combination is trained.",
                                                metavar="SECTION.KEY=VALUE[,VALUE...]")] = None,
    lr_range: Annotated[Optional[str], Option(help="Instead: one short run whose learning rate rises from LOW to HIGH (a range test).", metavar="LOW:HIGH")] = None,
    output_dir: OutputDir = None, config: ConfigPath = None, profile: Profile = "auto",
    max_steps: Annotated[Optional[int], Option(help="Optimizer steps of each run.")] = None,
    workers: Annotated[int, Option(min=1, metavar="N", help="Runs side by side, each in a process of its own with its share of the cores; "
                                                                  "N runs need N times the memory.")] = 1,
    overwrite: Overwrite = False, debug: Debug = False,
) -> None:
    """Train every combination of settings and rank them by validation loss (outputs/sweep/sweep.md)."""
    from emergency_kit.api import lazy_scorer
    from emergency_kit.training.sweep import start

    start(lambda settings: resolve(profile, config, settings, training__max_steps=max_steps), set_ or [], output_dir, lr_range, overwrite, lazy_scorer, workers)


@app.verb(short="Score answers for structure and safety", example="evaluate --max-samples 20", then="gate")
def evaluate(
    others: Annotated[Optional[list[str]], Argument(help="More models for --compare.", metavar="MODEL")] = None,
    checkpoint: Annotated[Optional[str], Option(metavar="MODEL", help="What answers: base, an adapter, merged or base folder, a .gguf file, or an endpoint "
                                                                                "(http://host:port/v1#name); by default the finished model of the config.")] = None,
    max_samples: Annotated[Optional[int], Option(help="Most test records that are answered; fewer are quicker and say less.")] = None,
    output: Annotated[Optional[Path], Option(help="Report file; by default <output-dir>/evaluation_report.json.", metavar="FILE")] = None,
    compare: Annotated[Optional[list[str]], Option("--compare", metavar="MODEL [MODEL]...",
                                                          help="Models side by side: --compare A B C; the first is what the others are compared with.")] = None,
    engine: Annotated[Optional[str], Option(help="What runs a folder: auto, llama.cpp or torch.", metavar="NAME", autocompletion=choices("evaluation.engine"))] = None,
    samples: Annotated[Optional[int], Option(help="Answers drawn per record beside the greedy one; safety counts the worst.")] = None,
    baselines: Annotated[Optional[bool], Option("--baselines", help="Ask the base model also without card and without format.")] = None,
    tuning_cost: Annotated[Optional[bool], Option("--tuning-cost", help="Perplexity and multiple choice before and after tuning.")] = None,
    red_team: Annotated[Optional[bool], Option("--red-team", help="Answer the prompts that pull toward harm, too.")] = None,
    ai: Annotated[bool, Option("--ai", help="Ask a language model to judge answers; the cost is estimated first.")] = False,
    ai_provider: Annotated[Optional[str], Option(metavar="NAME", autocompletion=choices("judge.provider"),
                                                   help="Whose language model judges: anthropic, openai, gemini or openai-compatible.")] = None,
    ai_model: Annotated[Optional[str], Option(help="The judge's name at the provider.", metavar="NAME")] = None,
    ai_base_url: Annotated[Optional[str], Option(help="Address of an openai-compatible judge.", metavar="URL")] = None,
    ai_max_samples: Annotated[Optional[int], Option(help="Most answers that are judged.")] = None,
    ai_budget: Annotated[Optional[float], Option(help="Most US dollars that judging may cost.", metavar="USD")] = None,
    yes: Annotated[bool, Option("--yes", help="Spend what is estimated without being asked.")] = False,
    output_dir: OutputDir = None, model_name: ModelName = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False,
) -> None:
    """Answer the test split and score the answers, the base model's and others' beside them."""
    if others and not compare:
        raise UsageError(f"got {others[0]!r} without a flag; expected --checkpoint {others[0]}, or --compare {others[0]} and others")
    resolved = resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir, evaluation__max_samples=max_samples,
                       evaluation__engine=engine, evaluation__samples=samples, evaluation__baselines=baselines, evaluation__tuning_cost=tuning_cost,
                       evaluation__red_team=red_team, judge__provider=ai_provider, judge__model=ai_model, judge__base_url=ai_base_url,
                       judge__max_samples=ai_max_samples, judge__budget_usd=ai_budget)
    print_config(resolved)
    from emergency_kit.evaluation.run import evaluate as stage

    stage(resolved, checkpoint=checkpoint, out=output, compare=[*(compare or []), *(others or [])], ai=ai, yes=yes)


@app.verb(short="Say whether the model may ship", then="export-gguf")
def gate(
    report: Annotated[Optional[Path], Option(help="Report to judge by; by default <output-dir>/evaluation_report.json.", metavar="FILE")] = None,
    override_verdict: Annotated[str, Option(help="Reason to ship although the verdict is no; recorded in it.", metavar="REASON")] = "",
    output_dir: OutputDir = None, model_name: ModelName = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False,
) -> None:
    """Say whether the evaluated model may ship; exit code 7 when it may not."""
    resolved = resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir)
    from emergency_kit.evaluation.gate import gate as stage

    stage(resolved, report_path=report, override=override_verdict)


@app.verb(short="Train, evaluate, merge and judge in one go", example="pipeline --output-dir outputs/mine", then="export-gguf")
def pipeline(
    model_name: ModelName = None, output_dir: OutputDir = None, config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None,
    max_steps: MaxSteps = None,
    overwrite: Overwrite = False, debug: Debug = False,
) -> None:
    """Train, evaluate, merge, judge; then say what to do next. Exit code 7 when the verdict is not to ship."""
    resolved = resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir, training__max_steps=max_steps)
    print_config(resolved)
    from emergency_kit.api import lazy_scorer
    from emergency_kit.training.run import is_trained_as
    from emergency_kit.training.run import train as train_stage

    adapter = resolved.finished_model
    trained = os.environ.get(TRAINED) == str(adapter.resolve())
    if adapter.exists() and (trained or not overwrite) and is_trained_as(resolved, adapter):
        print(f"1/4 train: {adapter} is {'' if trained else 'already '}trained with this config on this data{'' if trained else '; --overwrite trains anew'}", flush=True)
    else:
        print("1/4 train", flush=True)
        train_stage(resolved, overwrite=overwrite, scorer=lazy_scorer)
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
    then = "make export-gguf ARGS='--override-verdict REASON' (an export needs a reason where the verdict is no)" if verdict else "make export-gguf (files for llama.cpp)"
    print(f"Done. Model: {merged}. Next: make infer (ask it), {then}.", flush=True)
    if verdict:
        raise verdict
