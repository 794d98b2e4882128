"""One decoder layer of the Llama family over the tokens of a pass: forward, and backward by hand.

Kept for the way back: the layer's input and the residual between, q, k, v, the attention's output,
gate and up, and every z. Normed inputs, probabilities and the product of gate and up are made again: they cost less
than the memory. The same buffers serve every pass, so memory does not grow with steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from emergency_kit.training.fused import attention, elementwise
from emergency_kit.training.fused.attention import Keys
from emergency_kit.training.fused.linears import Linears, Masks
from emergency_kit.training.fused.tree import Pass


# Blocks of queries of each node of a pass.
Blocks = list[list[attention.Block]]


class Buffers:
    """Named flat memory that grows to the largest use and is used again. content: of some names, whose values they hold.
    views: those of a step, since making one takes as long as a small operation; `FusedStep` forgets them, or shapes would pile up."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.memory: dict[str, Tensor] = {}
        self.views: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self.content: dict[str, Any] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the shape, its content undefined."""
        view = self.views.get((name, shape))
        if view is None:
            size = math.prod(shape)
            held = self.memory.get(name)
            if held is None or held.numel() < size:
                self.memory.pop(name, None)
                self.views.clear()
                held = self.memory[name] = torch.empty(size, dtype=dtype or self.dtype, device=self.device)
            view = self.views[name, shape] = held[:size].view(shape)
        return view

    def clear(self) -> None:
        """Give all memory back."""
        self.memory.clear()
        self.views.clear()


@dataclass
class Saved:
    """What one layer keeps of one pass; tensors as named in `Layer.forward`."""

    x: Tensor
    read: dict[str, Tensor | None]
    r1: Tensor | None = None
    r2: Tensor | None = None
    z: dict[str, Tensor] = field(default_factory=dict)
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    attended: Tensor | None = None
    flash: tuple[Tensor, ...] = ()
    middle: Tensor | None = None
    gate_up: Tensor | None = None


@dataclass
class Rotation:
    """Cosines and sines of the tokens of a pass, (tokens, 1, 1, half width); those for queries carry the scores' scale."""

    q_cos: Tensor
    q_sin: Tensor
    k_cos: Tensor
    k_sin: Tensor


class Layer:
    """The weights of one layer, grouped by input."""

    def __init__(self, module: Any, config: Any, head_width: int):
        attention_module, mlp = module.self_attn, module.mlp
        self.qkv = Linears("qkv", [attention_module.q_proj, attention_module.k_proj, attention_module.v_proj])
        self.o = Linears("o", [attention_module.o_proj])
        self.gate_up = Linears("gate_up", [mlp.gate_proj, mlp.up_proj])
        self.down = Linears("down", [mlp.down_proj])
        self.norm1, self.norm2 = module.input_layernorm, module.post_attention_layernorm
        self.key_heads, self.width = config.num_key_value_heads, head_width
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.epsilon = config.rms_norm_eps
        self.flash = attention.can_flash(self.qkv.weight, head_width)

    @property
    def linears(self) -> list[Linears]:
        return [self.qkv, self.o, self.gate_up, self.down]

    def draw(self, tokens: int, masks: Masks | None) -> dict[str, Tensor | None]:
        """What dropout leaves of the input of each group of linear modules."""
        groups = {"qkv": self.qkv, "o": self.o, "gate_up": self.gate_up, "down": self.down}
        return {name: linears.draw(tokens, masks) for name, linears in groups.items()}

    def keys(self, x: Tensor, saved: Saved, rotation: Rotation, reach: int, scratch: Buffers, kept: Buffers, slot: str) -> None:
        """Norm, q, k and v with their rotation, into `saved`. reach: see `attention.reach`; the places beyond the tokens are zero."""
        tokens = len(x)
        h = self._normed(x, self.norm1, "r1", saved, self.qkv, scratch, kept, slot)
        qkv = scratch("qkv", tokens, self.qkv.outputs)
        self.qkv.forward(h, saved.read["qkv"], qkv, scratch)
        saved.z["qkv"] = kept(slot + "z qkv", tokens, self.qkv.ranks).copy_(h[:, self.qkv.inputs:])
        saved.q = self._queries(kept, slot + "q", reach)
        saved.k, saved.v = (kept(slot + name, self.key_heads, reach, self.width) for name in "kv")
        for filled in (saved.q, saved.k, saved.v) if reach > tokens else ():
            filled[:, tokens:] = 0
        q, k, v = self._split(qkv)
        elementwise.rotate(q, rotation.q_cos, rotation.q_sin, self._by_token(saved.q[:, :tokens]))
        elementwise.rotate(k, rotation.k_cos, rotation.k_sin, self._by_token(saved.k[:, :tokens]))
        self._by_token(saved.v[:, :tokens]).copy_(v)

    def forward(self, part: Pass, plan: Blocks, x: Tensor, above: Keys | None, rotation: Rotation,
                read: dict[str, Tensor | None], scratch: Buffers, kept: Buffers, slot: str, out: Tensor | None) -> Saved:
        """Output (tokens, width of the model) into out, None where only what is kept is wanted; read: from `draw`; slot: prefix of the
        names of what is kept."""
        tokens, saved = len(x), Saved(x, read)
        self.keys(x, saved, rotation, attention.reach(part, plan, tokens), scratch, kept, slot)
        saved.attended = kept(slot + "attended", tokens, self.o.inputs + self.o.ranks)
        attended = self._by_head(saved.attended[:, :self.o.inputs])
        if self.flash:
            saved.flash = attention.forward_flash(part, saved.q, saved.k, saved.v, attended)
        else:
            attention.forward(part, plan, saved.q, saved.k, saved.v, above, attended, scratch)
            attended[:, part.tokens:] = 0
        saved.middle = kept(slot + "middle", tokens, self.o.outputs)
        self.o.forward(saved.attended, saved.read["o"], saved.middle, scratch, residual=x)
        h = self._normed(saved.middle, self.norm2, "r2", saved, self.gate_up, scratch, kept, slot)
        saved.gate_up = kept(slot + "gate_up", tokens, self.gate_up.outputs)
        self.gate_up.forward(h, saved.read["gate_up"], saved.gate_up, scratch)
        saved.z["gate_up"] = kept(slot + "z gate_up", tokens, self.gate_up.ranks).copy_(h[:, self.gate_up.inputs:])
        m = scratch("m", tokens, self.down.inputs + self.down.ranks)
        elementwise.swiglu(saved.gate_up, m[:, :self.down.inputs], scratch)
        self.down.forward(m, saved.read["down"], out, scratch, residual=saved.middle)
        saved.z["down"] = kept(slot + "z down", tokens, self.down.ranks).copy_(m[:, self.down.inputs:])
        return saved

    def backward(self, part: Pass, plan: Blocks, saved: Saved, above: Keys | None, own: Keys | None, rotation: Rotation, scratch: Buffers,
                 dx: Tensor, need_input: bool) -> None:
        """Turn dx, the gradient of the output, into that of the input, in place; adapters' gradients are added up.

        own: of the shared pass, its keys with what descendants added; None elsewhere. need_input: whether anything below learns.
        """
        self._backward_mlp(saved, scratch, dx)
        assert saved.q is not None and saved.k is not None and saved.v is not None and saved.attended is not None
        tokens = len(dx)
        dattended = scratch("dh", tokens, self.o.inputs + self.o.ranks)
        da = self.o.backward(dx, saved.attended, saved.read["o"], dattended, scratch)
        dq = self._queries(scratch, "dq", saved.q.shape[1])
        dk, dv = (own.dk, own.dv) if own else (scratch("dk", *saved.k.shape), scratch("dv", *saved.v.shape))
        if self.flash:
            attention.backward_flash(part, saved.q, saved.k, saved.v, self._by_head(saved.attended[:, :self.o.inputs]), saved.flash, self._by_head(da), dq, dk, dv)
        else:
            attention.backward(part, plan, saved.q, saved.k, saved.v, above, self._by_head(da), dq, dk, dv, own is not None, scratch)
            for gradient in (dq, dk, dv):
                gradient[:, part.tokens:] = 0
        self.backward_keys(saved, dq, dk, dv, rotation, scratch, dx, need_input)

    def backward_keys(self, saved: Saved, dq: Tensor | None, dk: Tensor, dv: Tensor, rotation: Rotation, scratch: Buffers,
                      dx: Tensor, need_input: bool) -> None:
        """From the gradients of q, k and v, of which the tokens' are read, to that of the input, added to dx. dq None: no query was used."""
        tokens = len(dx)
        dqkv = scratch("qkv", tokens, self.qkv.outputs)
        into_q, into_k, into_v = self._split(dqkv)
        if dq is None:
            into_q.zero_()
        else:
            elementwise.rotate(self._by_token(dq[:, :tokens]), rotation.q_cos, rotation.q_sin, into_q, back=True)
        elementwise.rotate(self._by_token(dk[:, :tokens]), rotation.k_cos, rotation.k_sin, into_k, back=True)
        into_v.copy_(self._by_token(dv[:, :tokens]))
        h = self._again(saved.x, saved.r1, self.norm1, self.qkv, saved.z["qkv"], scratch)
        dh = self.qkv.backward(dqkv, h, saved.read["qkv"], scratch("dh", tokens, self.qkv.inputs + self.qkv.ranks), scratch)
        if need_input:
            elementwise.add_norm_gradient(dh, saved.x, saved.r1, self.norm1.weight.detach(), scratch, dx)

    def _backward_mlp(self, saved: Saved, scratch: Buffers, dx: Tensor) -> None:
        tokens = len(dx)
        m = scratch("m", tokens, self.down.inputs + self.down.ranks)
        silu = elementwise.swiglu(saved.gate_up, m[:, :self.down.inputs], scratch)
        m[:, self.down.inputs:] = saved.z["down"]
        dm = self.down.backward(dx, m, saved.read["down"], scratch("dm", tokens, self.down.inputs + self.down.ranks), scratch)
        dgate_up = scratch("dgate_up", tokens, self.gate_up.outputs)
        elementwise.swiglu_gradient(dm, saved.gate_up, silu, dgate_up)
        h = self._again(saved.middle, saved.r2, self.norm2, self.gate_up, saved.z["gate_up"], scratch)
        dh = self.gate_up.backward(dgate_up, h, saved.read["gate_up"], scratch("dh", tokens, self.gate_up.inputs + self.gate_up.ranks), scratch)
        elementwise.add_norm_gradient(dh, saved.middle, saved.r2, self.norm2.weight.detach(), scratch, dx)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views (tokens, key heads, group, width) and twice (tokens, key heads, 1, width)."""
        heads, groups, width = self.key_heads, self.group, self.width
        parts = qkv.split([heads * groups * width, heads * width, heads * width], 1)
        return parts[0].unflatten(1, (heads, groups, width)), parts[1].unflatten(1, (heads, 1, width)), parts[2].unflatten(1, (heads, 1, width))

    def _queries(self, buffers: Buffers, name: str, places: int) -> Tensor:
        """Memory for queries, (key heads, places, heads that share one, width); it lies by token for flash attention, by key head for products."""
        if self.flash:
            return buffers(name, places, self.key_heads, self.group, self.width).transpose(0, 1)
        return buffers(name, self.key_heads, places, self.group, self.width)

    def _by_head(self, x: Tensor) -> Tensor:
        """(tokens, heads * width) as (key heads, tokens, heads that share one, width)."""
        return x.unflatten(1, (self.key_heads, self.group, self.width)).transpose(0, 1)

    def _by_token(self, x: Tensor) -> Tensor:
        """(key heads, tokens, heads that share one, width), or keys (key heads, tokens, width), as (tokens, key heads, heads that share one, width)."""
        return x.view(*x.shape[:2], -1, self.width).transpose(0, 1)

    def _normed(self, x: Tensor, norm: Any, name: str, saved: Saved, reader: Linears, scratch: Buffers, kept: Buffers, slot: str) -> Tensor:
        r = kept(slot + name, len(x), 1, dtype=torch.float32)
        setattr(saved, name, r)
        h = scratch("h", len(x), reader.inputs + reader.ranks)
        elementwise.norm(x, norm.weight.detach(), self.epsilon, r, h[:, :reader.inputs])
        return h

    def _again(self, x: Tensor, r: Tensor, norm: Any, reader: Linears, z: Tensor, scratch: Buffers) -> Tensor:
        h = scratch("h", len(x), reader.inputs + reader.ranks)
        elementwise.norm_again(x, norm.weight.detach(), self.epsilon, r, h[:, :reader.inputs])
        h[:, reader.inputs:] = z
        return h
