"""The best evaluation of a run: which it is, and whether a run still gets better.

In: the history of evaluations, the metric. Nothing is kept beside the history that checkpoints
hold, so a resumed run decides as one never killed.
"""

from __future__ import annotations

from typing import Any

from emergency_kit.config import TrainingConfig

# The others are shares that should be high.
LOWER_IS_BETTER = ("loss", "dangerous_advice")


def validation_history(state: Any) -> list[dict[str, Any]]:
    """`{step, loss}` of every validation so far, with the other metrics that were measured."""
    return [{"step": entry["step"], **{name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}}
            for entry in state.log_history if "eval_loss" in entry]


def order(entry: dict[str, Any], metric: str) -> tuple[float, float]:
    """Sorts evaluations, the best first; equal ones by their loss."""
    return entry[metric] if metric in LOWER_IS_BETTER else -entry[metric], entry["loss"]


def best_evaluation(history: list[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """The best evaluation, of equal ones the first; entries without the metric do not count."""
    return min((entry for entry in history if metric in entry), key=lambda entry: order(entry, metric), default=None)


def evaluations_without_progress(history: list[dict[str, Any]], metric: str, threshold: float) -> int:
    """How many of the last evaluations in a row were not better than the best before them by more than the threshold."""
    best: float | None = None
    waited = 0
    for entry in history:
        value = order(entry, metric)[0]
        if best is None or value < best - threshold:
            best, waited = value, 0
        else:
            waited += 1
    return waited


def is_exhausted(history: list[dict[str, Any]], training: TrainingConfig) -> bool:
    """Whether early stopping ends the run here."""
    patience = training.early_stopping_patience
    return patience is not None and evaluations_without_progress(history, training.metric_for_best_model, training.early_stopping_threshold) >= patience
