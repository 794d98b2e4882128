"""Causal attention over the nodes of a pass, by products of exactly what each query may see.

A node's queries see its ancestors' keys in the shared pass, then its own up to themselves; no mask is needed but on
the diagonal of a block of queries, and no token of another row is ever multiplied. Query heads that share keys stand beside each
other, token by token, so that one product takes them together and sums over them on the way back.
Probabilities grow with the square of a row's length, so they are made again on the way back instead of being kept.
On a CPU's 16-bit matrix units products have sides of whole tiles, since oneDNN compiles and keeps a program for every shape that it meets: what a
product takes beyond a node's end is another token's or padding, is masked or zero, and is never read.
On a GPU that has it, torch's flash attention takes all rows of a pass in one launch; nothing is shared between rows then.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emergency_kit.training.fused.tree import Node, Pass

# Queries of one product, about: with fewer, products get small; with more, half of the last one's keys are in vain.
BLOCK = 128
# Tokens of a tile on a CPU's 16-bit matrix units. A pass and the queries of a product fill whole tiles, the keys that they see KEY_TILES at once:
# each kind of shape that is left away is one that oneDNN need not compile; what fills a pass up is computed in vain.
TILE, KEY_TILES = 32, 2
# Fewer products than these of float32 on a CPU are made one by one.
LEAST_TOGETHER = 8


@dataclass
class Keys:
    """k, v: (key heads, tokens, width) of the shared pass in one layer; dk, dv: what its descendants added, float32."""

    k: Tensor
    v: Tensor
    dk: Tensor
    dv: Tensor


@dataclass(frozen=True)
class Block:
    """Queries start to end of a pass, which see the first `keys` of their node's path. rows, seen: how many queries and keys its products take, whole tiles."""

    start: int
    end: int
    keys: int
    rows: int
    seen: int


def tile_of(on_gpu: bool, item_bytes: int) -> int:
    """Tokens of a tile; 1 where products may have any side."""
    return TILE if not on_gpu and item_bytes < 4 else 1


def whole(number: int, tile: int) -> int:
    """The next multiple of a tile."""
    return -(-number // tile) * tile


def plan_blocks(part: Pass, tile: int = 1) -> list[list[Block]]:
    """Blocks of about BLOCK queries of each node of a pass."""
    plan, seen_tile = [], tile if tile == 1 else KEY_TILES * tile
    for node in part.nodes:
        before = sum(end - start for start, end in node.ancestors)
        size = whole(-(-node.length // max(1, round(node.length / BLOCK))), tile)
        edges = [*range(0, node.length, size), node.length]
        plan.append([Block(node.start + start, node.start + end, before + end, whole(end - start, tile), whole(before + end, seen_tile))
                     for start, end in zip(edges, edges[1:])])
    return plan


def reach(part: Pass, plan: list[list[Block]], tokens: int) -> int:
    """Places that queries, keys and values need: those of the tokens, and what whole tiles reach beyond them, which is zero."""
    ends = ((node.end + blocks[-1].seen - blocks[-1].keys, blocks[-1].start + blocks[-1].rows) for node, blocks in zip(part.nodes, plan))
    return max((tokens, *(max(pair) for pair in ends)))


def forward(part: Pass, plan: list[list[Block]], q: Tensor, k: Tensor, v: Tensor, above: Keys | None, out: Tensor, scratch: Any) -> None:
    """Attention of every node into out, (key heads, tokens, heads that share one, width), which may be a view. q: as out; k, v: (key heads, tokens, width)."""
    for node, blocks in zip(part.nodes, plan):
        keys, values = _paths(node, k, v, above, blocks[-1].seen, scratch)
        for block in blocks:
            _sum_over(values, _probabilities(q, keys, block, scratch), block, out, scratch)


def backward(part: Pass, plan: list[list[Block]], q: Tensor, k: Tensor, v: Tensor, above: Keys | None, dout: Tensor,
             dq: Tensor, dk: Tensor, dv: Tensor, add: bool, scratch: Any) -> None:
    """Gradients into dq, dk, dv of the shapes of q, k, v; what belongs to ancestors is added to theirs.

    add: whether dk and dv come in holding what descendants added, as those of the shared pass do.
    """
    for node, blocks in zip(part.nodes, plan):
        keys, values = _paths(node, k, v, above, blocks[-1].seen, scratch)
        dkeys, dvalues = scratch("dkeys", *keys.shape), scratch("dvalues", *values.shape)
        values = values.transpose(1, 2)
        # The last block sees every key, so it comes first and the others add to it.
        for block in reversed(blocks):
            length = block.end - block.start
            p = _probabilities(q, keys, block, scratch)
            drows = scratch("drows", len(q), block.rows, *q.shape[2:])
            drows[:, :length] = dout[:, block.start:block.end]
            drows[:, length:] = 0
            dresult = drows.flatten(1, 2)
            dp = _product(dresult, values[:, :, :block.seen], scratch("dp", *p.shape))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype, grad_input=scratch("ds", *p.shape))
            _sum_over(keys, ds, block, dq, scratch)
            for total, left, right in ((dvalues, p, dresult), (dkeys, ds, _queries(q, block))):
                if block is blocks[-1]:
                    _product(left.transpose(1, 2), right, total)
                else:
                    total[:, :block.seen] += _product(left.transpose(1, 2), right, scratch("partial", len(q), block.seen, total.shape[-1]))
        _give_back(node, dkeys, dk, above.dk if above else dk, add)
        _give_back(node, dvalues, dv, above.dv if above else dv, add)


def can_flash(like: Tensor, width: int) -> bool:
    """Whether flash attention takes tensors of this type and place (compute capability 8.0 and heads of up to 256)."""
    return like.is_cuda and like.dtype in (torch.bfloat16, torch.float16) and width <= 256 and width % 8 == 0 \
        and torch.cuda.get_device_capability(like.device) >= (8, 0)


def forward_flash(part: Pass, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, ...]:
    """Attention of every row into out; shapes as in `forward`. q carries the scores' scale. Returns what the way back needs."""
    edges, longest = _edges(part, q.device)
    found, *more, _ = torch.ops.aten._flash_attention_forward(*map(_for_flash, (q, k, v)), edges, edges, longest, longest, 0.0, True, False, scale=1.0)
    out.transpose(0, 1).copy_(found.view(out.transpose(0, 1).shape))
    return tuple(more)


def backward_flash(part: Pass, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: tuple[Tensor, ...], dout: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Gradients into dq, dk, dv. kept: of `forward_flash`; dout: as out."""
    edges, longest = _edges(part, q.device)
    logsumexp, state, unused = kept
    found = torch.ops.aten._flash_attention_backward(*map(_for_flash, (dout, q, k, v, out)), logsumexp, edges, edges, longest, longest, 0.0, True,
                                                     state, unused, scale=1.0)
    for into, gradient in zip((dq, dk, dv), found):
        into.transpose(0, 1).copy_(gradient.view(into.transpose(0, 1).shape))


def _edges(part: Pass, device: torch.device) -> tuple[Tensor, int]:
    """Where rows begin and end, int32 (rows + 1,), and the longest; kept with the pass, since every layer asks."""
    if part.edges is None:
        part.edges = torch.tensor([0, *(node.end for node in part.nodes)], dtype=torch.int32, device=device), max(node.length for node in part.nodes)
    return part.edges


def _for_flash(x: Tensor) -> Tensor:
    """(tokens, heads, width) of what is by key head; a view of queries that lie token by token."""
    return x.transpose(0, 1).flatten(1, -2)


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Products of some matrices each. A CPU's float32 library gives every core matrices of its own, so that few of them leave some idle; they go one by one."""
    if left.is_cuda or left.dtype != torch.float32 or len(left) >= LEAST_TOGETHER:
        return torch.bmm(left, right, out=out)
    for one, other, into in zip(left, right, out):
        torch.mm(one, other, out=into)
    return out


def _queries(q: Tensor, block: Block) -> Tensor:
    """Those of a block, (key heads, queries of all heads that share one, width), a view."""
    return q[:, block.start:block.start + block.rows].flatten(1, 2)


def _probabilities(q: Tensor, keys: Tensor, block: Block, scratch: Any) -> Tensor:
    """Softmax of the scores of a block's queries over what it sees of keys, (key heads, path, width), whose last are its own: (key heads, queries, seen)."""
    shape = (len(q), block.rows, q.shape[2], block.seen)
    p = _product(_queries(q, block), keys[:, :block.seen].transpose(1, 2), scratch("p", shape[0], shape[1] * shape[2], shape[3]))
    own = block.keys - (block.end - block.start)
    first = own - own % TILE  # additions to whole tiles are three times as fast
    p.view(shape)[..., first:] += _mask(block.rows, block.seen - first, own - first, p)[:, None]
    return torch.softmax(p, -1, out=p)


def _sum_over(keys: Tensor, weights: Tensor, block: Block, out: Tensor, scratch: Any) -> None:
    """Keys or values summed by the weights (key heads, queries, seen) of a block's queries, into their places of out."""
    result = scratch("result", len(out), block.rows, *out.shape[2:])
    _product(weights, keys[:, :block.seen], result.flatten(1, 2))
    out[:, block.start:block.end] = result[:, :block.end - block.start]


def _paths(node: Node, k: Tensor, v: Tensor, above: Keys | None, seen: int, scratch: Any) -> tuple[Tensor, Tensor]:
    """Keys and values, (key heads, seen, width), of a node's ancestors and of itself, and what follows it up to `seen` of them."""
    return _path(node, k, above.k if above else k, seen, "keys", scratch), _path(node, v, above.v if above else v, seen, "values", scratch)


def _path(node: Node, own: Tensor, shared: Tensor, seen: int, name: str, scratch: Any) -> Tensor:
    """Keys or values of a path; a view where all are its own."""
    if not node.ancestors:
        return own[:, node.start:node.start + seen]
    path, place = scratch(name, len(own), seen, own.shape[-1]), 0
    for start, end in node.ancestors:
        path[:, place:place + end - start] = shared[:, start:end]
        place += end - start
    path[:, place:] = own[:, node.start:node.start + seen - place]
    return path


def _give_back(node: Node, gradient: Tensor, own: Tensor, shared: Tensor, add: bool) -> None:
    place = 0
    for start, end in node.ancestors:
        shared[:, start:end] += gradient[:, place:place + end - start]
        place += end - start
    mine = own[:, node.start:node.end]
    if add:
        mine += gradient[:, place:place + node.length]
    else:
        mine.copy_(gradient[:, place:place + node.length])


@functools.cache
def _whole_mask(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((2 * BLOCK, TILE + 2 * BLOCK + KEY_TILES * TILE), float("-inf"), dtype=dtype, device=device).triu(TILE + 1)


def _mask(rows: int, columns: int, before: int, like: Tensor) -> Tensor:
    """(rows, columns): 0 where a query may look, -inf where not. before: columns that all of them may see, at most a tile."""
    return _whole_mask(like.dtype, like.device)[:rows, TILE - before:TILE - before + columns]
