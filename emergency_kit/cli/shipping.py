"""Shipping a model: merge, export, pack and upload it; and ask it, here or over HTTP; one verb a stage.

In: flags. Out: what the stage prints and writes. Stages are imported when their verb runs, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

from typer import Option

from emergency_kit.cli.command import app
from emergency_kit.cli.flags import (
    Checkpoint, ConfigPath, Country, Debug, ModelName, OutputDir, Override, Overwrite, Private, Profile, Quantization, Repo, Settings, resolve)
from emergency_kit.errors import UsageError


@app.verb(short="Fold the adapter into its base model", then="export-gguf")
def merge(
    checkpoint: Annotated[Optional[Path], Option(help="Adapter, or model trained in full; by default the finished model of the config.", metavar="FOLDER")] = None,
    output: Annotated[Optional[Path], Option(help="Folder; by default <output-dir>/merged/<model-name>.", metavar="FOLDER")] = None,
    output_dir: OutputDir = None, model_name: ModelName = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, overwrite: Overwrite = False, debug: Debug = False,
) -> None:
    """Merge the adapter into the full-precision base model and prove that nothing changed."""
    resolved = resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir)
    from emergency_kit.export.merge import merge as stage

    stage(resolved, checkpoint=checkpoint, out=output, overwrite=overwrite)


@app.verb(short="Write files for llama.cpp, with proof", example="export-gguf -q q8_0 --ollama", then="kit")
def export_gguf(
    checkpoint: Annotated[Optional[Path], Option(help="Adapter, merged or base folder; by default the merged model, else the adapter.", metavar="FOLDER")] = None,
    output: Annotated[Optional[Path], Option(help="Folder; by default <output-dir>/gguf.", metavar="FOLDER")] = None,
    quantization: Quantization = None,
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
    resolved = resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir, export__quantizations=names,
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


@app.verb(short="Pack a USB stick that answers offline", example="kit --size-limit 200MB", then="kit --verify outputs/kit")
def kit(
    model: Annotated[Optional[Path], Option(help="Exported GGUF file; by default the smallest in <output-dir>/gguf whose certificate is within bounds.", metavar="FILE")] = None,
    output: Annotated[Optional[Path], Option(help="Folder; by default <output-dir>/kit.", metavar="FOLDER")] = None,
    size_limit: Annotated[Optional[str], Option(help="Most that the kit may weigh; what does not fit is left out and named.", metavar="200MB")] = None,
    platform: Annotated[Optional[list[str]], Option(metavar="NAME", help="System that gets llama.cpp's wheels, for instance linux-x86_64, repeatable, "
                                                                            "the most wanted first; none packs none.")] = None,
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
    resolved = resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir,
                       kit__platforms=[] if platform == ["none"] else platform, kit__python_versions=python)
    from emergency_kit.kit.pack import kit as stage

    stage(resolved, model, output, size_limit, override_verdict, sign_key, not no_browser, overwrite)


@app.verb(short="Publish the model on the Hugging Face Hub", example="upload-hf --repo owner/name --private")
def upload_hf(
    repo: Repo, private: Private = False,
    checkpoint: Annotated[Optional[Path], Option(help="Adapter or merged folder; by default the merged model, else the adapter.", metavar="FOLDER")] = None,
    override_verdict: Override = None, output_dir: OutputDir = None, model_name: ModelName = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False,
) -> None:
    """Upload the merged model or the adapter, with a model card, to the Hugging Face Hub."""
    resolved = resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir)
    from emergency_kit.export.hub import upload_hf as stage

    stage(resolved, repo, private, checkpoint, override_verdict)


@app.verb(short="Publish the GGUF files there", example="upload-gguf --repo owner/name --private")
def upload_gguf(
    repo: Repo, private: Private = False,
    folder: Annotated[Optional[Path], Option(help="Export folder; by default <output-dir>/gguf.", metavar="FOLDER")] = None,
    override_verdict: Override = None, output_dir: OutputDir = None, model_name: ModelName = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False,
) -> None:
    """Upload exported GGUF files, with certificates and a model card, to the Hugging Face Hub."""
    resolved = resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir)
    from emergency_kit.export.hub import upload_gguf as stage

    stage(resolved, repo, private, folder, override_verdict)


@app.verb(short="Ask the model, once or in a session", example='infer --prompt "my pan is on fire"', then="serve")
def infer(
    checkpoint: Checkpoint = None,
    prompt: Annotated[Optional[str], Option(help="The situation in words; without it a session starts.", metavar="TEXT")] = None,
    max_new_tokens: Annotated[Optional[int], Option(help="Longest answer in tokens.")] = None,
    temperature: Annotated[Optional[float], Option(help="0, the default, gives the same answer every time; higher draws.")] = None,
    country: Country = None,
    json: Annotated[bool, Option("--json", help="Print the answer as JSON.")] = False,
    no_guard: Annotated[bool, Option("--no-guard", help="The model's text alone, without checked guidance beside it.")] = False,
    output_dir: OutputDir = None, model_name: ModelName = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False,
) -> None:
    """Ask the model: one prompt, or a session (quit or Ctrl-D leaves, Ctrl-C stops an answer)."""
    resolved = resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir,
                       inference__max_new_tokens=max_new_tokens, inference__temperature=temperature, inference__country=country,
                       inference__guard=False if no_guard else None)
    from emergency_kit.inference.chat import infer as stage

    stage(resolved, checkpoint=checkpoint, prompt=prompt, as_json=json)


@app.verb(short="A page for people, an API for programs", example="serve --port 0")
def serve(
    checkpoint: Checkpoint = None,
    host: Annotated[Optional[str], Option(help="Address to listen on, 127.0.0.1 by default; one that others can reach needs --token.", metavar="ADDRESS")] = None,
    port: Annotated[Optional[int], Option(help="Port, 8000 by default; 0 takes any that is free.")] = None,
    token: Annotated[Optional[str], Option(metavar="SECRET", help="Bearer token that clients must send; better set EMERGENCY_KIT_TOKEN, "
                                                                     "which no list of processes shows.")] = None,
    country: Country = None,
    output_dir: OutputDir = None, model_name: ModelName = None,
    config: ConfigPath = None, profile: Profile = "auto", set_: Settings = None, debug: Debug = False,
) -> None:
    """Serve the model on this machine: a page for people, an OpenAI-compatible API for programs."""
    resolved = resolve(profile, config, set_, training__model_name=model_name, training__output_dir=output_dir,
                       serve__host=host, serve__port=port, inference__country=country)
    from emergency_kit.inference.server import serve as stage

    stage(resolved, checkpoint=checkpoint, token=token)


