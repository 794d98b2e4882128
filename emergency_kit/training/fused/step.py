"""An optimizer step of a causal language model with LoRA adapters: the loss, and every adapter's gradient.

In: the rows of the step. Out: the loss, as one number that autograd knows, so that DDP, accelerate and the Trainer see
an ordinary model. Forward and backward run together, pass by pass: the shared beginnings forward, then each pass forward
and back, then the shared beginnings back. `unsupported` says why a model cannot be taken; it then trains through
transformers' own modules.
"""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import torch
from torch import Tensor

from emergency_kit.data.tokenize import IGNORE
from emergency_kit.model.process_memory import give_back
from emergency_kit.training.fused.attention import Keys, plan_blocks, reach, tile_of, whole
from emergency_kit.training.fused.elementwise import add_norm_gradient, inverse_norm
from emergency_kit.training.fused.layer import Buffers, Layer, Rotation, Saved
from emergency_kit.training.fused.linears import Masks
from emergency_kit.training.fused.tree import Pass, Plan, Row, plan_step

# model_type of those whose layer it computes.
FAMILIES = ("llama", "mistral", "qwen2")
# By bytes of a value: on a CPU a pass of more tokens is no faster, and what it keeps for the way back is larger.
CPU_PASS_TOKENS = {4: 640, 2: 1152}


def head_rows(on_gpu: bool, item_bytes: int) -> int:
    """Rows of logits made at once. In float32 on a CPU 128 are as fast as 256 but for half a percent of a step, and 25 MB less of a vocabulary of 49,152."""
    return 128 if not on_gpu and item_bytes == 4 else 256


def pass_limits(pass_rows: int, row_tokens: int, on_gpu: bool, item_bytes: int) -> tuple[int | None, int | None]:
    """`(most rows, most tokens)` of a pass: as many rows as fill the place of `pass_rows` rows of `row_tokens` tokens, which is what must fit anyhow, on
    a CPU no more than pays: launches, small operations, and 4-bit weights spread out, cost by the pass. item_bytes: of a value of the compute type.
    A pass of one row is one everywhere but on a GPU, where the place of a longest row may hold several."""
    if on_gpu:
        return (None, pass_rows * row_tokens) if row_tokens else (pass_rows, None)
    most = CPU_PASS_TOKENS[item_bytes]
    return (None, min(pass_rows * row_tokens, most)) if row_tokens and pass_rows > 1 else (pass_rows, most)


class FusedStep:
    """The layers of one model, taken over from its modules (their weights become views of ours, but 4-bit ones).

    pass_rows, row_tokens: what goes through the model together, see `pass_limits`. share: compute once what rows begin with in common; not
    where flash attention takes rows by themselves.
    recompute: keep the layers' inputs alone and make the rest again on the way back (gradient checkpointing); `kept_layers` says of how many
    layers the rest is kept nevertheless, and can be set between steps.
    neftune_alpha: noise on the embeddings in training (Jain et al. 2023), scaled by a row's length, so nothing is shared then.
    """

    def __init__(self, causal_lm: Any, pass_rows: int, share: bool = True, recompute: bool = False, neftune_alpha: float = 0.0, row_tokens: int = 0):
        config, body = causal_lm.config, causal_lm.model
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.causal_lm, self.body, self.head, self.config = causal_lm, body, causal_lm.get_output_embeddings(), config
        self.layers = [Layer(module, config, width) for module in body.layers]
        if causal_lm.device.type == "cpu":
            _unmap(causal_lm)
            give_back()  # what the weights took before they were copied side by side
        self.dtype, self.device, self.scale = self.head.weight.dtype, self.head.weight.device, width ** -0.5
        self.flash, self.tile = self.layers[0].flash, tile_of(self.device.type == "cuda", self.dtype.itemsize)
        self.pass_rows, self.row_tokens, self.share = pass_rows, row_tokens, share and not self.flash
        self.kept_layers, self.neftune_alpha = 0 if recompute else len(self.layers), neftune_alpha
        self.scratch, self.kept, self.shared_kept = (Buffers(self.dtype, self.device) for _ in range(3))
        self.linears = [one for layer in self.layers for one in layer.linears]
        self.parameters = [parameter for one in self.linears for adapter in one.adapters for parameter in (adapter.a, adapter.b)]
        self.lowest = min((index for index, layer in enumerate(self.layers) if any(one.adapters for one in layer.linears)), default=len(self.layers))
        self.on_pass: Callable[[int], None] = lambda done: None
        self.last_plan: Plan | None = None
        # Of a step, its largest pass alone is computed: for trying whether it fits.
        self.largest_pass_only = False

    def __call__(self, rows: list[Row], divisor: Tensor | int | None) -> Tensor:
        """Loss of the rows as a float32 scalar: summed cross-entropy over divisor (None: over the labels of these rows)."""
        if torch.is_grad_enabled():
            return _Step.apply(self, rows, divisor, *self.parameters)
        return self.run(rows, divisor, backward=False)[0]

    @property
    def layer_bytes(self) -> int:
        """What one layer that is kept takes, for passes as large as any so far that was computed while one was not kept."""
        return sum(tensor.nbytes for name, tensor in self.kept.memory.items() if not name[0].isdigit())

    @property
    def four_bit(self) -> bool:
        """Whether the frozen weights are 4-bit."""
        return any(one.quantised for one in self.linears)

    @property
    def in_integers(self) -> bool:
        """Whether gradients go through the frozen weights in 8-bit integers."""
        return any(one.in_integers for one in self.linears)

    def go_back_in_integers(self) -> None:
        """Gradients go through the frozen weights in 8-bit integers from here on (fused/integers.py); for float32 on a CPU."""
        for one in self.linears:
            one.in_integers = True

    def keep_none(self) -> None:
        """Make every layer's activations again from here on, and give back what kept ones took."""
        self.kept_layers = 0
        self.kept.clear()

    @torch.no_grad()
    def run(self, rows: list[Row], divisor: Tensor | int | None, backward: bool) -> tuple[Tensor, list[Tensor]]:
        """`(loss, gradients)`, the gradients in float32 in the order of `parameters`; none without `backward`."""
        with torch.autocast(self.device.type, enabled=False):
            return self._run(rows, divisor, backward)

    def _run(self, rows: list[Row], divisor: Tensor | int | None, backward: bool) -> tuple[Tensor, list[Tensor]]:
        training = self.causal_lm.training
        for one in self.linears:
            one.refresh(training)
            if backward:
                one.clear_gradients()
        noisy = training and self.neftune_alpha > 0
        if divisor is None:
            divisor = max(1, sum(int((row.labels[1:] != IGNORE).sum()) for row in rows))
        most_rows, most_tokens = pass_limits(self.pass_rows, self.row_tokens, self.device.type == "cuda", self.dtype.itemsize)
        plan = self.last_plan = plan_step(rows, most_rows, self.share and not noisy, most_tokens)
        for buffers in (self.scratch, self.kept, self.shared_kept):
            buffers.views.clear()
        self.scratch.content.clear()  # the adapters in it are of the step before
        if self.largest_pass_only:
            plan.passes = [max(plan.passes, key=lambda part: part.tokens)]
        masks = self._masks(plan) if training else None
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        keys: list[Keys] = []
        if plan.shared.tokens:
            shared = _Tokens(self, plan.shared)
            shared_saved, keys = self._forward_shared(shared, masks, backward)
        for done, part in enumerate(plan.passes):
            self.on_pass(done)
            total += self._pass(_Tokens(self, part, self.neftune_alpha if noisy else 0.0), keys, masks, divisor, backward)
        if backward and plan.shared.tokens:
            self._backward_shared(shared, shared_saved, keys)
        return total, [gradient for one in self.linears for gradient in one.gradients()] if backward else []

    def _masks(self, plan: Plan) -> Masks | None:
        dropping = [one for one in self.linears if one.dropout and one.ranks]
        if not dropping:
            return None
        longest = max(whole(part.tokens, self.tile) for part in [plan.shared, *plan.passes])
        return Masks(longest, max(one.inputs for one in dropping), dropping[0].dropout, self.dtype, self.device)

    def _forward_shared(self, tokens: "_Tokens", masks: Masks | None, backward: bool) -> tuple[list[Saved], list[Keys]]:
        x, kept, last = tokens.x, self.shared_kept, len(self.layers) - 1
        saved, keys = [], []
        for index, layer in enumerate(self.layers):
            slot, read = f"{index} ", layer.draw(len(x), masks)
            if index == last:
                # Nothing of the shared pass is predicted from: its last layer is only looked at.
                one = Saved(x, read)
                layer.keys(x, one, tokens.rotation, reach(tokens.part, tokens.blocks, len(x)), self.scratch, kept, slot)
            else:
                out = kept(slot + "x", *x.shape)
                one = layer.forward(tokens.part, tokens.blocks, x, None, tokens.rotation, read, self.scratch, kept, slot, out)
                x = out
            saved.append(one)
            assert one.k is not None and one.v is not None
            gradients = [kept(slot + name, *one.k.shape, dtype=torch.float32).zero_() for name in ("dk", "dv")] if backward else [one.k, one.v]
            keys.append(Keys(one.k, one.v, *gradients))
        return saved, keys

    def _backward_shared(self, tokens: "_Tokens", saved: list[Saved], keys: list[Keys]) -> None:
        dx = self.scratch("dx", *tokens.x.shape).zero_()
        for index in reversed(range(self.lowest, len(self.layers))):
            layer, own, below = self.layers[index], keys[index], index > self.lowest
            if index == len(self.layers) - 1:
                layer.backward_keys(saved[index], None, own.dk, own.dv, tokens.rotation, self.scratch, dx, below)
            else:
                layer.backward(tokens.part, tokens.blocks, saved[index], None, own, tokens.rotation, self.scratch, dx, below)

    def _pass(self, tokens: "_Tokens", keys: list[Keys], masks: Masks | None, divisor: Tensor | int, backward: bool) -> Tensor:
        x, saved, whole = tokens.x, [], self.kept_layers if backward else 0
        for index, layer in enumerate(self.layers):
            # Where nothing is kept, two places for x take turns and the rest is written over.
            out = self.kept(f"{index if backward else index % 2} x", *x.shape)
            one = layer.forward(tokens.part, tokens.blocks, x, keys[index] if keys else None, tokens.rotation, layer.draw(len(x), masks),
                                self.scratch, self.kept, f"{index} " if index < whole else "", out)
            saved.append(one)
            x = out
        loss, dx = self._loss(tokens.part, x, divisor, backward)
        if backward:
            for index in reversed(range(self.lowest, len(self.layers))):
                layer, one, above = self.layers[index], saved[index], keys[index] if keys else None
                if whole <= index < len(self.layers) - 1:  # what the last one keeps has not been written over
                    one = layer.forward(tokens.part, tokens.blocks, one.x, above, tokens.rotation, one.read, self.scratch, self.kept, "", None)
                layer.backward(tokens.part, tokens.blocks, one, above, None, tokens.rotation, self.scratch, dx, index > self.lowest)
        return loss

    def _loss(self, part: Pass, x: Tensor, divisor: Tensor | int, backward: bool) -> tuple[Tensor, Tensor | None]:
        """Loss of a pass and the gradient of x."""
        wanted = torch.from_numpy(np.flatnonzero(part.targets != IGNORE)).to(self.device)
        targets = torch.from_numpy(part.targets).to(self.device)[wanted]
        norm = self.body.norm
        chosen = x[wanted]
        r = inverse_norm(chosen, self.config.rms_norm_eps)
        count = len(chosen)
        # The last rows of logits fill whole tiles, too; what is beyond the labels is zero and stays it.
        h = chosen.new_zeros(whole(count, self.tile), chosen.shape[1])
        h[:count] = (chosen * r).to(x.dtype).mul_(norm.weight)
        dh, total = torch.empty_like(h), torch.zeros((), dtype=torch.float32, device=self.device)
        weight = self.head.weight.detach()
        at_once = head_rows(self.device.type == "cuda", self.dtype.itemsize)
        for start in range(0, len(h), at_once):
            rows, wants = h[start:start + at_once], targets[start:start + at_once, None]
            logits = torch.mm(rows, weight.t(), out=self.scratch("logits", len(rows), len(weight)))
            scores = logits if logits.dtype == torch.float32 else self.scratch("scores", *logits.shape, dtype=torch.float32).copy_(logits)
            labelled = scores[:len(wants)]
            torch.log_softmax(labelled, 1, out=labelled)
            total -= labelled.gather(1, wants).sum()
            if backward:
                labelled.exp_().scatter_add_(1, wants, torch.full_like(wants, -1, dtype=torch.float32))
                scores[len(wants):] = 0
                torch.mm(scores if scores is logits else logits.copy_(scores), weight, out=dh[start:start + at_once])
        if not backward:
            return total / divisor, None
        dh = dh[:count].div_(divisor)
        dchosen = torch.zeros_like(chosen)
        add_norm_gradient(dh, chosen, r, norm.weight.detach(), self.scratch, dchosen)
        dx = self.scratch("dx", *x.shape).zero_()
        dx[wanted] = dchosen
        return total / divisor, dx


class _Tokens:
    """A pass on the device: x (tokens, width) embeddings, rotation of its positions, blocks of its attention. Tokens beyond the nodes fill it up to whole tiles;
    nothing sees them, and their gradients are zero."""

    def __init__(self, step: FusedStep, part: Pass, neftune_alpha: float = 0.0):
        self.part, self.blocks = part, plan_blocks(part, step.tile)
        more = (0, whole(part.tokens, step.tile) - part.tokens)
        ids, positions = (torch.from_numpy(np.pad(values, more)).to(step.device)[None] for values in (part.ids, part.positions))
        self.x = step.body.embed_tokens(ids)[0].to(step.dtype)
        if neftune_alpha:
            for node in part.nodes:
                row = self.x[node.start:node.end]
                row += torch.empty_like(row).uniform_(-1, 1) * (neftune_alpha / row.numel() ** 0.5)
        cos, sin = step.body.rotary_emb(torch.empty(0, dtype=torch.float32, device=step.device), positions)
        halves = [value[0, :, None, None, :value.shape[-1] // 2] for value in (cos, sin)]
        self.rotation = Rotation(*((value * scale).to(step.dtype) for scale in (step.scale, 1.0) for value in halves))


def _unmap(causal_lm: Any) -> None:
    """Copy what is left in the checkpoint's mapped file, whose pages would stay in memory beside our copies of its weights."""
    copies: dict[int, Tensor] = {}
    for parameter in causal_lm.parameters():
        if not parameter.requires_grad and parameter.is_contiguous() and not hasattr(parameter, "quant_state"):
            place = parameter.data_ptr()
            if place not in copies:  # tied weights stay one
                copies[place] = parameter.data.clone()
            parameter.data = copies[place]


class _Step(torch.autograd.Function):
    """The loss; its gradients are at hand when it is."""

    @staticmethod
    def forward(ctx: Any, step: FusedStep, rows: list[Row], divisor: Tensor | int | None, *parameters: Tensor) -> Tensor:
        loss, ctx.gradients = step.run(rows, divisor, backward=True)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        factor = float(gradient)
        if factor != 1.0:
            torch._foreach_mul_(ctx.gradients, factor)
        return None, None, None, *ctx.gradients


def slides(config: Any) -> bool:
    """Whether a model attends within a sliding window only."""
    return bool(getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))


def unsupported(peft_model: Any) -> str | None:
    """Why a model cannot be taken, in words for the console; None when it can."""
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer

    causal_lm = peft_model.get_base_model()
    config = causal_lm.config
    if config.model_type not in FAMILIES:
        return f"a model of type {config.model_type}"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
        return f"rope of type {rope.get('rope_type')}"
    if rope.get("partial_rotary_factor", 1) != 1:
        return "rope on a part of a head"
    if config.hidden_act != "silu" or getattr(config, "attention_dropout", 0) or getattr(config, "layer_types", None) and set(config.layer_types) != {"full_attention"}:
        return "an activation, attention dropout or attention pattern of its own"
    if slides(config):
        return "sliding-window attention"
    inside = [module for layer in causal_lm.model.layers for module in layer.modules()]
    if sum(isinstance(module, BaseTunerLayer) for module in peft_model.modules()) != sum(isinstance(module, BaseTunerLayer) for module in inside):
        return "adapters outside the decoder's layers"
    if any(parameter.requires_grad and ".lora_" not in name for name, parameter in peft_model.named_parameters()):
        return "modules trained in full"
    for module in inside:
        if isinstance(module, BaseTunerLayer):
            if any(module.use_dora.values()):
                return "DoRA"
            plain = type(module) is LoraLinear and type(module.base_layer) is torch.nn.Linear
            in_4bit = type(module).__name__ == "Linear4bit" and getattr(module.base_layer.weight, "quant_state", None) is not None
            if in_4bit and module.base_layer.weight.quant_state.dtype != causal_lm.get_output_embeddings().weight.dtype:
                return "4-bit weights that were made from another type than the head's"
            if not (plain or in_4bit) or len(module.active_adapters) != 1 or module.merged or any(module.lora_bias.values()):
                return f"adapters of another kind ({type(module).__name__})"
    return None
