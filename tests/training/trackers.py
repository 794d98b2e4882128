"""What a tracker wrote, read back from its own files: `{tag: [(step, value)]}`. Run as a script it trains shortly with each and compares.

TensorBoard by its event reader, Weights & Biases (offline) record by record from the `.wandb` file (LevelDB's log format), MLflow and trackio by
their clients. Run: `make prove-trackers`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Callable, Iterator

Values = dict[str, list[tuple[int, float]]]


def read_tensorboard(logs: Path) -> Values:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def read_wandb(logs: Path) -> Values:
    from wandb.proto import wandb_internal_pb2

    file, = (logs / "wandb").glob("offline-run-*/*.wandb")
    found: Values = {}
    for content in _leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for tag, value in row.items():
            if isinstance(value, (int, float)):
                found.setdefault(tag, []).append((int(row.get("train/global_step", -1)), float(value)))
    return found


def _leveldb_records(content: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format after a header of 7 bytes: blocks of 32 KiB, each record checksum, length, kind, bytes."""
    place, parts = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place:place + 7])
        if not kind:
            break
        parts += content[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield parts
            parts = b""


def read_mlflow(logs: Path) -> Values:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{logs / 'mlflow.db'}")
    run, = client.search_runs([client.get_experiment_by_name("ai-emergency-kit").experiment_id])
    return {tag: [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, tag)] for tag in run.data.metrics}


def read_trackio(logs: Path) -> Values:
    os.environ["TRACKIO_DIR"] = str(logs / "trackio")
    from trackio.sqlite_storage import SQLiteStorage

    found: Values = {}
    run, = SQLiteStorage.get_runs("ai-emergency-kit")
    for row in SQLiteStorage.get_logs("ai-emergency-kit", run):
        for tag, value in row.items():
            if isinstance(value, (int, float)):
                found.setdefault(tag, []).append((int(row["step"]), float(value)))
    return found


READERS: dict[str, Callable[[Path], Values]] = {"tensorboard": read_tensorboard, "wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}


def losses_of(read: Values) -> list[float]:
    """The training losses that a tracker has, in order of their steps."""
    tag = next(tag for tag in ("train/loss", "loss") if tag in read)
    return [value for _, value in sorted(read[tag])]


def main() -> None:
    """Train eight steps of a two-layer model with each tracker, read its files back, compare with the checkpoint's own losses."""
    from tests.tiny import save_tiny_model

    with tempfile.TemporaryDirectory() as place:
        tiny = save_tiny_model(Path(place) / "tiny")
        wrong = 0
        for name, read in READERS.items():
            if sys.argv[1:] and name not in sys.argv[1:]:
                continue
            if importlib.util.find_spec(name) is None:
                print(f"{name}: not installed")
                wrong += 1
                continue
            out = Path(place) / name
            flags = [f"model.name={tiny}", "model.dtype=float32", f"training.output_dir={out}", "dataset.build_size=200", "dataset.max_samples=24", "dataset.max_eval_samples=4", "training.max_steps=8",
                     "training.eval_steps=4", "training.save_steps=8", f"training.report_to=[{name}]"]
            done = subprocess.run([sys.executable, "-m", "emergency_kit.cli", "train", "--profile", "embedded", *(part for flag in flags for part in ("--set", flag))],
                                  capture_output=True, text=True, env=os.environ | {"WANDB_MODE": "offline"})
            if done.returncode:
                print(f"{name}: training ended with {done.returncode}: {done.stderr[-500:]}")
                wrong += 1
                continue
            found = read(out / "logs")
            state = json.loads((out / "checkpoints" / "final" / "training_state.json").read_text())
            expected = [entry["loss"] for entry in state["loss_history"]]
            got = losses_of(found)
            same = len(got) == len(expected) and all(abs(one - other) < 1e-4 for one, other in zip(got, expected))
            wrong += not same
            print(f"{name}: {len(got)} losses read back, {'as trained' if same else f'but {expected} were trained'}; {len(found)} series: {', '.join(sorted(found)[:14])}", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
