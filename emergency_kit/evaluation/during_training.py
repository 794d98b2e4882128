"""Scores of a model that is being trained: validation records answered greedily, and the answers judged as in an evaluation.

In: the config, the tokenizer; then the model as it stands. Out: `valid_structure`, `critical_action_recall` and `dangerous_advice` as shares
from 0 to 1, for `training.metric_for_best_model`. Draws no random number. Several ranks answer a part each and score all. Limits: a few records
(`training.best_samples`) give a coarse scale, and generating takes time at every evaluation; a finished model is still judged on the test split.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable

from emergency_kit.config import Resolved
from emergency_kit.data.format import record_messages
from emergency_kit.data.load import load_split
from emergency_kit.errors import DataError
from emergency_kit.evaluation.division import bring_together, deal
from emergency_kit.evaluation.metrics import BY_NAME, score, values_of
from emergency_kit.inference.torch_engine import Engine
from emergency_kit.inference.engine import Generated
from emergency_kit.knowledge.cards import load_cards
from emergency_kit.model.backend import Loaded
from emergency_kit.training import ranks

MEASURED = ("valid_structure", "critical_action_recall", "dangerous_advice")


def build_scorer(resolved: Resolved, tokenizer: Any) -> Callable[[Any, Callable[[], None]], dict[str, float]]:
    """A function of the model, and of one that is called before every token and may raise. Raises DataError where the records name no card
    to judge a safety metric by."""
    config, cards = resolved.config, load_cards()
    training, dataset = config.training, config.dataset
    limit = min(training.best_samples, dataset.max_eval_samples or training.best_samples)
    drawn = config.model_copy(update={"dataset": dataset.model_copy(update={"max_eval_samples": limit})})
    records = ranks.shared(load_split(dataclasses.replace(resolved, config=drawn), "validation") if ranks.is_first() else [])
    if training.metric_for_best_model != "valid_structure" and not any(record.hazards for record in records):
        raise DataError(f"training.metric_for_best_model: the validation records of {dataset.name} name no knowledge card (hazards) to judge "
                        f"{training.metric_for_best_model} by; choose loss or valid_structure")
    prompts = [record_messages(record, cards, dataset.grounding) for record in records]

    def measure(model: Any, check: Callable[[], None]) -> dict[str, float]:
        engine = Engine(Loaded(model, tokenizer, "training", ""))
        mine: dict[int, Generated] = {}
        for places in deal(prompts, range(len(prompts)), config.evaluation.batch_size):
            answers = engine.generate([prompts[place] for place in places], config.evaluation.max_new_tokens, len(places), progress=lambda done, tokens: check())
            mine |= zip(places, answers)
        found_answers = bring_together(mine)
        scored = [score(record, found_answers[place], cards) for place, record in enumerate(records)]
        found = {name: values_of(scored, BY_NAME[name])[0] for name in MEASURED}
        return {name: sum(values) / len(values) for name, values in found.items() if values}

    return measure
