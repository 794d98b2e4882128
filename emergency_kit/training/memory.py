"""Memory of a training run, term by term, from shapes alone.

In: a model's `Shape`, the config and a `Workload` (tokens of its largest pass). Out: `{term: bytes}` for each phase; the peak is the
largest phase. Sources: what autograd keeps of each operation is counted as Korthikanti et al. 2022 ("Reducing Activation
Recomputation in Large Transformer Models") do, here for frozen weights, gated MLPs and grouped keys; NF4 with double quantisation is
4 + 8/64 + 32/(64 * 256) bits a weight (Dettmers et al. 2023, "QLoRA", section 3); AdamW keeps two float32 moments. The `fused` engine's
terms are its named buffers (fused/layer.py), a test compares them with the real ones, another with what one GPU took. Limits: one device,
LoRA adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

from emergency_kit.config import LoraSection, Resolved
from emergency_kit.model.shape import Shape
from emergency_kit.training.fused.attention import BLOCK, tile_of
from emergency_kit.training.fused.step import head_rows

GROUPS = {"qkv": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",), "gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
FLOAT = 4
# A CPU's 16-bit products are compiled for every shape, and those last used are kept (emergency_kit/__init__.py); with what others before them left in
# the heap (measured, benchmarks/RESULTS.md).
COMPILED_BYTES = 100_000_000
# A CUDA context with cuBLAS; an assumption, cards differ between 0.3 and 0.7 GB.
CUDA_CONTEXT_BYTES = 500_000_000
# Share of the rest that torch's caching allocator, or malloc, holds in vain; an assumption on a GPU, measured on a CPU (make bench-plan).
GPU_FRAGMENTATION, CPU_FRAGMENTATION = 0.08, 0.04
# What may be filled of the memory that is free when training begins: of a computer's, and of a GPU's, which nobody else is about to take.
SHARE_OF_FREE, SHARE_OF_FREE_GPU = 0.8, 0.95


@dataclass(frozen=True)
class Workload:
    """Tokens of the largest pass. tokens: all of them, padding included where there is any; longest: of its longest row;
    supervised: tokens with a label; shared: of the beginnings that `fused` computes once; eval_*: of the largest validation batch."""

    tokens: int
    longest: int
    supervised: int
    shared: int
    eval_tokens: int
    eval_longest: int
    eval_supervised: int


@dataclass(frozen=True)
class Setting:
    """How it is computed. compute_bytes: of the compute type; fused: the engine; on_gpu, four_bit; eager: attention keeps its probabilities.
    recompute: activations are made again on the way back; kept_layers: of how many layers `fused` keeps them nevertheless. integers: gradients go back
    through a second copy of the frozen weights, in 8-bit integers."""

    compute_bytes: int
    fused: bool
    on_gpu: bool
    four_bit: bool
    eager: bool
    recompute: bool
    dropout: bool
    kept_layers: int = 0
    integers: bool = False


def ranks(shape: Shape, lora: LoraSection) -> dict[str, int]:
    """Adapters' ranks of each group of linear modules that share an input, added up."""
    return {group: lora.r * sum(name in targets(shape, lora) for name in names) for group, names in GROUPS.items()}


def targets(shape: Shape, lora: LoraSection) -> list[str]:
    """Linear modules that get an adapter; `all-linear` is all of them."""
    return [name for name in shape.linears if name in lora.target_modules or "all-linear" in lora.target_modules]


def adapter_parameters(shape: Shape, lora: LoraSection) -> int:
    """Trained numbers: A (r, inputs) and B (outputs, r) of every target in every layer."""
    return shape.layers * lora.r * sum(sum(shape.linears[name]) for name in targets(shape, lora))


def estimate(shape: Shape, resolved: Resolved, setting: Setting, work: Workload, process_bytes: int) -> dict[str, dict[str, float]]:
    """`{phase: {term: bytes}}` of loading, training and evaluating. process_bytes: what the process holds with all libraries and no model."""
    full, lora = resolved.config.training.finetuning_type == "full", resolved.config.lora
    if full:
        lora = lora.model_copy(update={"target_modules": ()})
    base = {"CUDA context" if setting.on_gpu else "Python, torch and libraries": float(CUDA_CONTEXT_BYTES if setting.on_gpu else process_bytes),
            "base weights": float(shape.parameters * FLOAT) if full else shape.weight_bytes(setting.four_bit, setting.compute_bytes)}
    trained = shape.parameters * FLOAT if full else adapter_parameters(shape, lora) * FLOAT
    learned = {"gradients" if full else "adapters' gradients": float(trained), "optimizer (AdamW's two moments)": 2.0 * trained} | ({} if full else {"adapters": float(trained)})
    if setting.fused:
        kept, spent = fused_buffers(shape, lora, setting, work)
        # Stacked gradients as wide as their modules, one copy on their way to the parameters, the stacked A and the weights' adapter columns.
        stacks = shape.layers * sum(ranks(shape, lora)[group] * (_inputs(shape, group) + _outputs(shape, group)) for group in GROUPS)
        learned |= {"adapters' gradients": 2.0 * trained + stacks * FLOAT, "stacked adapters": float(stacks * setting.compute_bytes)}
        if setting.integers:
            learned["frozen weights in 8-bit integers"] = float(shape.linear_parameters)
        if tile_of(setting.on_gpu, setting.compute_bytes) > 1:
            learned["compiled products"] = float(COMPILED_BYTES)
        logits = float(fused_logits_bytes(shape, setting, work))
        training = {"activations": kept, "working memory": spent - logits, "logits": logits}
        evaluating = training  # the same buffers stay
    else:
        training = module_activations(shape, lora, setting, work)
        evaluating = {"activations": 2.0 * work.eval_tokens * shape.hidden * FLOAT + _attention_bytes(shape, setting, work.eval_tokens, work.eval_longest),
                      "working memory": work.eval_tokens * 3.0 * shape.intermediate * max(2, setting.compute_bytes),
                      "logits": work.eval_supervised * shape.vocabulary * (setting.compute_bytes + 2.0 * FLOAT)}
        if setting.four_bit or setting.compute_bytes == 2:
            training["autocast's copies of weights"] = 2.0 * adapter_parameters(shape, lora)
        training["AdamW's work on all adapters at once"] = 2.0 * trained if setting.on_gpu else 0.0
    # A file in another type is read beside its copy; `fused` stacks copies of weights that are still the file's pages.
    twice = shape.file_bytes if setting.fused and not setting.four_bit or shape.file_type_bytes != setting.compute_bytes else 0
    phases = {"loading": base | {"the checkpoint's file, mapped": 0.0 if setting.on_gpu else float(twice)},
              "training": base | learned | training, "evaluating": base | learned | evaluating}
    share = GPU_FRAGMENTATION if setting.on_gpu else CPU_FRAGMENTATION
    for terms in phases.values():
        terms["fragmentation"] = share * (sum(terms.values()) - base[next(iter(base))])
    return phases


def peak(phases: dict[str, dict[str, float]]) -> tuple[str, float]:
    """`(phase, bytes)` of the largest phase."""
    name = max(phases, key=lambda phase: sum(phases[phase].values()))
    return name, sum(phases[name].values())


def _inputs(shape: Shape, group: str) -> int:
    return shape.linears[GROUPS[group][0]][0]


def _outputs(shape: Shape, group: str) -> int:
    return sum(shape.linears[name][1] for name in GROUPS[group])


def fused_buffers(shape: Shape, lora: LoraSection, setting: Setting, work: Workload) -> tuple[float, float]:
    """`(kept for the way back, scratch)` of the fused engine in bytes, buffer by buffer as fused/layer.py names them.

    Per token and layer it keeps x, middle (hidden each), q, k, v, attended, gate_up, z and two norms. With flash attention the elementwise kernels need no room of their own either.
    """
    r, hidden, inner, heads = ranks(shape, lora), shape.hidden, shape.intermediate, shape.heads * shape.width
    b = setting.compute_bytes
    flash = setting.on_gpu and b == 2
    keys = shape.key_heads * shape.width
    seen = heads + 2 * keys
    rest = (seen + heads + r["o"] + hidden + 2 * inner + r["qkv"] + r["gate_up"] + r["down"]) * b + 2 * FLOAT
    tokens, shared = work.tokens, work.shared
    times = min(shape.layers, setting.kept_layers + 1) if setting.recompute else shape.layers
    kept = tokens * (rest * times + hidden * b * shape.layers) + tokens * hidden * b
    kept += shared * ((shape.layers - 1) * (rest + hidden * b) + (seen + r["qkv"]) * b + FLOAT + 2 * shape.layers * keys * FLOAT + hidden * b) if shared else 0
    kept += 0 if setting.recompute else work.eval_tokens * rest  # an evaluation's one layer has names of its own
    most, widest = max(tokens, shared, work.eval_tokens), max(hidden, heads, inner)
    block = min(work.longest, 2 * BLOCK)
    spent = most * b * (seen + hidden + r["qkv"] + 2 * (inner + r["down"]) + (0 if flash else inner + hidden) + max(heads + r["o"], hidden + r["gate_up"], hidden + r["qkv"])
                        + 2 * inner + hidden + max(r.values()))
    spent += most * b * seen  # dq, dk, dv
    spent += b * ((heads + seen) * most if flash else 3 * shape.heads * block * work.longest + 5 * keys * work.longest + 2 * heads * block)
    if setting.integers:  # a gradient turned and in integers, sums
        outputs = max(_outputs(shape, group) for group in GROUPS)
        spent += most * (outputs * (FLOAT + 1) + widest * FLOAT)
    if setting.four_bit:  # spread out, by group, and the largest module's once more
        spent += b * (sum(_outputs(shape, group) * (_inputs(shape, group) + r[group]) for group in GROUPS) + max(i * o for i, o in shape.linears.values()))
    spent += fused_logits_bytes(shape, setting, work) + 4 * work.supervised * hidden * b
    spent += ((most + 1024) * widest + 2 * most * widest) * b if setting.dropout else 0
    return float(kept), float(spent)


def module_activations(shape: Shape, lora: LoraSection, setting: Setting, work: Workload) -> dict[str, float]:
    """What autograd keeps through transformers' own modules, in bytes, by term.

    residual: bytes of the stream between layers; mixed: adapters' float32 inputs are cast.
    """
    tokens, layer = work.tokens, layer_bytes(shape, lora, setting, work)
    residual = setting.compute_bytes
    between = tokens * shape.hidden * residual * (shape.layers + 1.0)
    temporary = 3.0 * tokens * shape.intermediate * residual + (2.0 * shape.heads * tokens * work.longest * FLOAT if setting.eager else 0.0)
    temporary += 2.0 * max(inputs * outputs for inputs, outputs in shape.linears.values()) * 2 if setting.four_bit else 0.0
    logits = logits_bytes(shape, setting, work)
    if setting.recompute:
        # The head's gradient is gone before the first layer is made again, so only the larger of the two counts.
        made = {"logits": logits} if logits > layer + temporary else {"activations (one layer made again)": layer + temporary}
        return {"activations (layers' inputs)": between} | made
    return {"activations": shape.layers * layer + tokens * shape.hidden * residual, "logits": logits, "working memory": temporary}


def fused_logits_bytes(shape: Shape, setting: Setting, work: Workload) -> int:
    """Logits of a few rows at a time, in the compute type and in float32."""
    return min(head_rows(setting.on_gpu, setting.compute_bytes), work.supervised) * shape.vocabulary * (FLOAT if setting.compute_bytes == FLOAT else setting.compute_bytes + FLOAT)


def logits_bytes(shape: Shape, setting: Setting, work: Workload) -> float:
    """Logits in the compute type, in float32, their log-softmax, and the gradients of both; with float32 the first two are one."""
    return work.supervised * shape.vocabulary * (3.0 * FLOAT if setting.compute_bytes == FLOAT else 3.0 * FLOAT + 2 * setting.compute_bytes)


def layer_bytes(shape: Shape, lora: LoraSection, setting: Setting, work: Workload) -> float:
    """Bytes that autograd keeps of one layer: inputs of norms, of adapters, of the attention, of SwiGLU."""
    residual, mixed = setting.compute_bytes, setting.compute_bytes != FLOAT
    norms = shape.hidden * 2 * (residual if residual == FLOAT else residual + FLOAT)
    inputs = 0.0
    for group, names in GROUPS.items():
        count = sum(name in targets(shape, lora) for name in names)
        width = _inputs(shape, group)
        if not count:
            continue
        if setting.dropout:
            inputs += count * width * ((2 if mixed else residual) + 1)  # a mask and what it leaves, of each module's own
        else:
            inputs += width * (count * 2 if mixed and residual == FLOAT else residual)
    gated = 3 * shape.intermediate * residual  # gate, silu(gate), up
    z = sum(ranks(shape, lora).values()) * (2 if mixed else FLOAT)
    return work.tokens * (norms + inputs + gated + z) + _attention_bytes(shape, setting, work.tokens, work.longest)


def _attention_bytes(shape: Shape, setting: Setting, tokens: int, longest: int) -> float:
    """q, k, v and the output; eager attention also its probabilities, in float32 and once more in a narrower compute type."""
    heads, keys, b = shape.heads * shape.width, shape.key_heads * shape.width, setting.compute_bytes
    if setting.eager:
        return float(tokens * 3 * heads * b + tokens * shape.heads * longest * (FLOAT if b == FLOAT else FLOAT + b))
    return float(tokens * ((2 * heads + 2 * keys) * b + shape.heads * FLOAT))
