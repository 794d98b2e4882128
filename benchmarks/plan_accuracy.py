"""The plan's predictions beside what a run then takes, for several settings of the embedded profile: memory, time, disk.

In: the bundled model. Out: a table on the console. Each prediction and each run is a process of its own, one after the other, so that
neither sees the other's memory. Limits: time means something on a quiet machine alone; memory does anywhere.
Run: `make bench-plan`, ARGS="--steps 1 --only default" for one setting and as few steps as can be.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# glibc's heap keeps freed blocks of up to 32 MB; the modules' many intermediates then hold twice what is used. So it does not.
CALM = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
SETTINGS: dict[str, list[str]] = {
    "default": [],
    "fused, layers made again, 4 rows x 2 passes": ["training.gradient_checkpointing=true", "training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=2"],
    "fused, rank 64, no sharing": ["lora.r=64", "training.prefix_sharing=false"],
    "modules": ["training.engine=modules"],
    "modules, layers made again, dropout 0.05": ["training.engine=modules", "training.gradient_checkpointing=true", "lora.dropout=0.05"],
    "modules, 1 row x 8 passes, rank 64": ["training.engine=modules", "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=8", "lora.r=64"],
}
WITHIN = 0.15


def predict(profile: str, settings: list[str], timed: bool) -> None:
    """Print the prediction, then as one JSON line what is compared."""
    from emergency_kit.config import load_config
    from emergency_kit.training.plan import plan

    made = plan(load_config(profile, settings=settings), timed=timed)
    total = made.seconds["training"] + made.seconds["evaluations"] if made.seconds else None
    print(json.dumps({"bytes": made.peak_bytes, "seconds": total, "disk": sum(made.disk.values()),
                      "training": made.seconds["training"] if made.seconds else None, "kept_layers": made.setting.kept_layers}))


def run(settings: list[str], out: Path) -> dict[str, Any]:
    """Train and say what it took."""
    flags = [part for setting in settings for part in ("--set", setting)]
    subprocess.run([sys.executable, "-m", "emergency_kit.cli", "train", "--profile", "embedded", *flags], check=True, stdout=subprocess.DEVNULL,
                   env=os.environ | (CALM if "training.engine=modules" in settings else {}))
    state = json.loads((out / "checkpoints" / "final" / "training_state.json").read_text())
    disk = sum(path.stat().st_size for folder in ("checkpoints", "cache") for path in (out / folder).rglob("*") if path.is_file())
    return {"bytes": state["summary"]["peak_memory_bytes"], "seconds": state["wall_seconds"], "disk": disk}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", help="part of a setting's name")
    parser.add_argument("--untimed", action="store_true", help="memory and disk alone")
    parser.add_argument("--set", nargs="*", default=[], dest="more", help="settings for all")
    parser.add_argument("--profile", default="embedded", help=argparse.SUPPRESS)
    parser.add_argument("--predict", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.predict is not None:
        return predict(given.profile, given.predict, not given.untimed)
    print(f"{'setting':46} {'memory: plan':>13} {'run':>8} {'off':>7}   {'time: plan':>10} {'run':>8} {'off':>7}   {'disk: plan':>10} {'run':>8}", flush=True)
    outside = 0
    for name, settings in SETTINGS.items():
        if given.only and given.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            # One compute type: the trial of `auto` can fall either way where other work runs.
            whole = [*settings, "model.dtype=float32", f"training.max_steps={given.steps}", f"training.output_dir={folder}", "dataset.max_eval_samples=4", *given.more]
            command = [sys.executable, __file__, *(["--untimed"] if given.untimed else []), "--predict", *whole]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            plan, got = json.loads(said.strip().splitlines()[-1]), run(whole, Path(folder))
        off = {key: plan[key] / got[key] - 1 for key in ("bytes", "seconds") if plan[key]}
        outside += sum(abs(value) > WITHIN for value in off.values())
        time = f"{plan['seconds']:>8.1f} s {got['seconds']:>6.1f} s {off['seconds']:>+7.1%}" if plan["seconds"] else f"{'-':>10} {got['seconds']:>6.1f} s {'-':>7}"
        print(f"{name:46} {plan['bytes'] / 1e9:>10.2f} GB {got['bytes'] / 1e9:>5.2f} GB {off['bytes']:>+7.1%}   {time}   {plan['disk'] / 1e6:>7.0f} MB {got['disk'] / 1e6:>5.0f} MB", flush=True)
    print(f"{outside} predictions off by more than {WITHIN:.0%}")
    sys.exit(outside > 0)


if __name__ == "__main__":
    main()
