"""What the step by hand is divided into before anything is computed: rows in a tree of shared beginnings, blocks of queries, dropout's masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emergency_kit.data.tokenize import IGNORE
from emergency_kit.training.fused import attention
from emergency_kit.training.fused.linears import Masks
from emergency_kit.training.fused.tree import LEAST_SAVED_TOKENS, Row, plan_step
from tests.training.test_fused import ROWS


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(2, 60), st.integers(0, 59)), min_size=1, max_size=9), st.integers(1, 4))
def test_a_plan_holds_every_row_once(shapes: list[tuple[int, int, int, int]], pass_rows: int) -> None:
    """Following a row's ancestors and its own node gives back its tokens, and every label has its one place."""
    pools = np.random.default_rng(0).integers(2, 50, (2, 4, 60))
    rows = []
    for first, second, own, prompt in shapes:
        ids = np.concatenate([pools[0, first], pools[1, second], np.random.default_rng(own).integers(2, 50, own)]).astype(np.int64)
        labels = ids.copy()
        labels[:len(ids) - own + min(prompt, own)] = IGNORE
        rows.append(Row(ids, labels))
    plan = plan_step(rows, pass_rows)
    learning = [row for row in rows if row.first_predicting < len(row.ids)]
    leaves = [(part, node) for part in plan.passes for node in part.nodes]
    assert len(leaves) == len(learning) and all(len(part.nodes) <= pass_rows for part in plan.passes)
    assert not (plan.shared.targets != IGNORE).any()
    for row, (part, node) in zip(learning, leaves):
        pieces = [plan.shared.ids[start:end] for start, end in node.ancestors] + [part.ids[node.start:node.end]]
        assert np.array_equal(np.concatenate(pieces), row.ids) and node.first == len(row.ids) - node.length
        positions = np.arange(node.first, len(row.ids) - 1)
        assert np.array_equal(part.targets[node.start:node.end - 1], row.labels[positions + 1]) and part.targets[node.end - 1] == IGNORE
        assert (row.labels[1:node.first + 1] == IGNORE).all()
    saved = sum(len(row.ids) for row in learning) - plan.tokens
    assert saved >= LEAST_SAVED_TOKENS * len(plan.shared.nodes)


@pytest.mark.parametrize("tile", [1, 32])
def test_blocks_cover_every_query_and_key_it_may_see(tile: int) -> None:
    plan = plan_step(ROWS, 2)
    for part in [plan.shared, *plan.passes]:
        for node, found in zip(part.nodes, attention.plan_blocks(part, tile), strict=True):
            keys = tile if tile == 1 else 2 * tile
            assert all(block.rows % tile == block.seen % keys == 0 and 0 <= block.seen - block.keys < keys for block in found)
            assert all(0 <= block.rows - (block.end - block.start) < tile and block.end - block.start <= 192 for block in found)
            assert [found[0].start, found[-1].end] == [node.start, node.end]
            assert all(left.end == right.start for left, right in zip(found, found[1:]))
            before = sum(end - start for start, end in node.ancestors)
            assert all(block.keys == before + block.end - node.start for block in found)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 900), st.integers(8, 300), st.floats(0.01, 0.9), st.integers(0, 2**31))
def test_masks_drop_as_often_as_asked_and_differ_from_token_to_token(tokens: int, width: int, dropout: float, seed: int) -> None:
    torch.manual_seed(seed)
    masks = Masks(tokens, 300, dropout, torch.float32, torch.device("cpu"))
    kept = masks.draw(tokens, width)
    places = tokens * width
    assert kept.shape == (tokens, width) and set(kept.unique().tolist()) <= {0.0, 1.0}
    assert abs(float(kept.sum()) - places * (1 - dropout)) < 6 * (places * dropout * (1 - dropout)) ** 0.5 + 3
    starts = {masks.draw(tokens, width).data_ptr() for _ in range(20)}
    assert len(starts) > 10
