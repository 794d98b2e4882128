"""Linear modules that share an input, with their adapters, as one product forward and one back.

With h the input, W the stacked frozen weights, A the stacked and B the block-diagonal adapters and s their scale:
y = [h, z] [W, sB]^T with z = dropout(h) A^T, and backward [dh, dz] = dy [W, sB]. So the thin products y += zB and
dz = dyB ride on the thick ones. The stacked weight takes the place of the modules' own, which become views of it;
weights in 4-bit stay as they are and are spread out into a scratch tensor for every product, once for a layer's way back.
Where gradients go back in integers, dz is a product of its own.
Dropout is drawn once for an input, where PEFT draws it once for every module that reads it: the same expectation.
Its masks are rows of one table drawn for the step, from a random row on for each input: independent from token to
token, and one pass over the input to apply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emergency_kit.training.fused import elementwise
from emergency_kit.training.fused.integers import IntegerWeight


@dataclass
class Adapter:
    """One LoRA pair: a (rank, inputs), b (outputs, rank) parameters; rows and columns: its place in the stack."""

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scale: float
    rows: slice
    columns: slice


class Linears:
    """weight: (outputs, inputs + ranks), of 4-bit modules the last columns alone; stacked_a: (ranks, inputs); gradients of both adapters'
    stacks in float32. name: of the group, for the scratch tensor of 4-bit weights. in_integers: multiply gradients by the frozen weights in 8-bit
    integers, which are made when the first one comes back."""

    def __init__(self, name: str, modules: list[torch.nn.Module]):
        bases = [_base(module) for module in modules]
        self.name = name
        self.inputs = bases[0].in_features
        self.outputs = sum(base.out_features for base in bases)
        self.adapters: list[Adapter] = []
        self.dropout = 0.0
        row = rank = 0
        for module, base in zip(modules, bases):
            if hasattr(module, "lora_A"):
                name, = module.active_adapters
                a, b = module.lora_A[name].weight, module.lora_B[name].weight
                self.adapters.append(Adapter(a, b, module.scaling[name], slice(row, row + base.out_features), slice(rank, rank + len(a))))
                self.dropout = getattr(module.lora_dropout[name], "p", 0.0)
                rank += len(a)
            row += base.out_features
        self.ranks = rank
        self.in_integers = False
        self.integers: IntegerWeight | None = None
        first = bases[0].weight
        self.quantised = [base.weight for base in bases] if hasattr(first, "quant_state") else []
        dtype = first.quant_state.dtype if self.quantised else first.dtype
        self.first_rank = 0 if self.quantised else self.inputs
        self.weight = torch.zeros(self.outputs, self.first_rank + rank, dtype=dtype, device=first.device)
        self.stacked_a = torch.zeros(rank, self.inputs, dtype=dtype, device=first.device)
        self.bias = torch.cat([base.bias if base.bias is not None else self.weight.new_zeros(base.out_features) for base in bases]).detach().to(dtype) \
            if any(base.bias is not None for base in bases) else None
        if self.quantised:
            return
        row = 0
        for base in bases:
            view = self.weight[row:row + base.out_features, :self.inputs]
            view.copy_(base.weight.detach())
            base.weight.data = view
            row += base.out_features

    def refresh(self, training: bool) -> None:
        """Read the adapters' current values. training: whether inputs will be dropped."""
        self.keep = 1.0 - self.dropout if training else 1.0
        for adapter in self.adapters:
            columns = slice(self.first_rank + adapter.columns.start, self.first_rank + adapter.columns.stop)
            self.weight[adapter.rows, columns] = (adapter.b.detach() * adapter.scale).to(self.weight.dtype)
            self.stacked_a[adapter.columns] = (adapter.a.detach() / self.keep).to(self.weight.dtype)

    def whole(self, scratch: Any) -> Tensor:
        """The stacked weight, (outputs, inputs + ranks). scratch: remembers whose 4-bit weights it holds spread out."""
        if not self.quantised:
            return self.weight
        name = f"weight {self.name}"
        weight = scratch(name, self.outputs, self.inputs + self.ranks)
        if scratch.content.get(name) is not self:
            row = 0
            for packed in self.quantised:
                rows = packed.quant_state.shape[0]
                elementwise.spread(packed.data, packed.quant_state, weight[row:row + rows, :self.inputs])
                row += rows
            weight[:, self.inputs:] = self.weight
            scratch.content[name] = self
        return weight

    def clear_gradients(self) -> None:
        """Begin the adapters' gradients at zero, before a step goes back."""
        self.gradient_a = torch.zeros(self.ranks, self.inputs, dtype=torch.float32, device=self.weight.device)
        self.gradient_b = torch.zeros(self.outputs, self.ranks, dtype=torch.float32, device=self.weight.device)

    def draw(self, tokens: int, masks: Masks | None) -> Tensor | None:
        """Which places of an input are kept, (tokens, inputs) of 0 and 1; None where all are."""
        return masks.draw(tokens, self.inputs) if masks and self.dropout and self.ranks else None

    def forward(self, h: Tensor, kept: Tensor | None, out: Tensor | None, scratch: Any, residual: Tensor | None = None) -> None:
        """y, plus residual where given, into out (tokens, outputs), where that is wanted. h: (tokens, inputs + ranks); z is put into its last columns."""
        if self.ranks:
            z = torch.mm(self._read(h, kept, scratch), self.stacked_a.t(), out=scratch("z", len(h), self.ranks))
            h[:, self.inputs:] = z
        if out is None:
            return
        weight = self.whole(scratch).t()
        if residual is None:
            torch.mm(h, weight, out=out)
        else:
            torch.addmm(residual, h, weight, out=out)
        if self.bias is not None:
            out += self.bias

    def backward(self, dy: Tensor, h: Tensor, kept: Tensor | None, out: Tensor, scratch: Any) -> Tensor:
        """dh, (tokens, inputs), a view of out (tokens, inputs + ranks); adds to the adapters' gradients.

        h: (tokens, inputs + ranks) as `forward` left it.
        """
        dh, dz = self._products_back(dy, out, scratch)
        if self.ranks:
            _add_product(self.gradient_b, dy.t(), h[:, self.inputs:])
            _add_product(self.gradient_a, dz.t(), self._read(h, kept, scratch))
            if kept is None:
                dh.addmm_(dz, self.stacked_a)
            else:
                elementwise.add_masked(dh, torch.mm(dz, self.stacked_a, out=scratch("back", len(h), self.inputs)), kept)
        return dh

    def _products_back(self, dy: Tensor, out: Tensor, scratch: Any) -> tuple[Tensor, Tensor]:
        """Frozen part of dh, a view of out, and dz."""
        dh, dz = out[:, :self.inputs], scratch("z", len(dy), self.ranks)
        if not self.in_integers:
            torch.mm(dy, self.whole(scratch), out=out)
            return dh, dz.copy_(out[:, self.inputs:])
        if self.integers is None:
            self.integers = IntegerWeight(self.weight[:, :self.inputs])
        return self.integers.product(dy, dh, scratch), torch.mm(dy, self.weight[:, self.inputs:], out=dz)

    def _read(self, h: Tensor, kept: Tensor | None, scratch: Any) -> Tensor:
        read = h[:, :self.inputs]
        return read if kept is None else elementwise.mask(read, kept, scratch("read", *read.shape))

    def gradients(self) -> list[Tensor]:
        """Gradients of a and b of every adapter, in order, in float32."""
        found: list[Tensor] = []
        for adapter in self.adapters:
            found += [self.gradient_a[adapter.columns] / self.keep, self.gradient_b[adapter.rows, adapter.columns] * adapter.scale]
        return found


class Masks:
    """The dropout masks of a step: a table of `tokens` rows and some more, whose rows serve one input after the other.

    Drawn from torch's generator, whose state checkpoints hold.
    """

    MORE_ROWS = 1024

    def __init__(self, tokens: int, widest: int, dropout: float, dtype: torch.dtype, device: torch.device):
        self.table = torch.empty(tokens + self.MORE_ROWS, widest, dtype=dtype, device=device).bernoulli_(1 - dropout)

    def draw(self, tokens: int, width: int) -> Tensor:
        """A view of the table, (tokens, width), that begins at a random row."""
        start = int(torch.randint(len(self.table) - tokens + 1, (1,)))
        return self.table[start:start + tokens, :width]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, within the product where the types agree."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right)


def _base(module: Any) -> Any:
    return getattr(module, "base_layer", module)
