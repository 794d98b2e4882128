"""One GGUF file: which type every tensor gets, and the file written tensor by tensor.

In: a model's skeleton, its `Weights` on the disk, its vocabulary. Out: the file. Blocks of rows are read and encoded side by side, one a
core, and written in their order. Memory: two blocks a core (`weights.BLOCK_WEIGHTS`) as they are stored, in float32 and encoded.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emergency_kit.export import architecture
from emergency_kit.export.architecture import Family, Place
from emergency_kit.export.progress import INTERVAL_SECONDS
from emergency_kit.export.quantize import Quantization, choose_type, count_bytes, encode_rows
from emergency_kit.export.vocabulary import Vocabulary, add_vocabulary
from emergency_kit.export.weights import Weights, cut_rows
from emergency_kit.model.process_memory import cores

if TYPE_CHECKING:
    from typing import BinaryIO

    import numpy


@dataclass
class Plan:
    """Type of every tensor of one file, by GGUF name in the file's order. fallbacks: type that rows got instead, to number of tensors."""

    quantization: Quantization
    places: list[Place]
    types: dict[str, str] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    total_bytes: int = 0


def build_plan(skeleton: Any, quantization: Quantization, source: str) -> Plan:
    """Choose each tensor's type; the skeleton needs no weights."""
    plan = Plan(quantization, architecture.list_tensors(skeleton, source))
    shape = architecture.shape_of(skeleton.config)
    for place in plan.places:
        tensor_type, fell_back = choose_type(quantization, place.gguf, len(place.shape), place.shape[-1], shape)
        plan.types[place.gguf] = tensor_type
        plan.total_bytes += count_bytes(tensor_type, place.weights)
        if fell_back:
            plan.fallbacks[tensor_type] = plan.fallbacks.get(tensor_type, 0) + 1
    return plan


@dataclass
class _Stream:
    """What GGUFWriter takes for an array: its size, and a way into the file. Encodes as it writes."""

    place: Place
    tensor_type: str
    weights: Weights
    config: Any
    family: Family
    pool: ThreadPoolExecutor
    ahead: int

    @property
    def nbytes(self) -> int:
        return count_bytes(self.tensor_type, self.place.weights)

    def tofile(self, file: "BinaryIO") -> None:
        head = architecture.head_weights(self.config) if architecture.is_reordered(self.place.gguf, self.family) else 1
        waiting: deque[Future[numpy.ndarray]] = deque()
        for rows in cut_rows(self.place.shape, head):
            if len(waiting) == self.ahead:
                waiting.popleft().result().tofile(file)
            waiting.append(self.pool.submit(self._encode, rows))
        while waiting:
            waiting.popleft().result().tofile(file)

    def _encode(self, rows: range) -> "numpy.ndarray":
        name = self.place.gguf
        return encode_rows(architecture.reorder_rows(name, self.weights.block(self.place.name, rows), self.config, self.family), self.tensor_type, name)


def write_gguf(path: Path, plan: Plan, config: Any, weights: Weights, vocabulary: Vocabulary, family: Family, name: str,
               license_id: str | None = None) -> None:
    """Write one file. config: the model's, as transformers has it."""
    from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter

    import numpy

    quantization, threads = plan.quantization, cores()
    writer, pool = GGUFWriter(path, family.name), ThreadPoolExecutor(threads)
    try:
        architecture.add_metadata(writer, config, family, name, license_id)
        writer.add_file_type(quantization.file_type)
        if not quantization.exact:
            writer.add_quantization_version(GGML_QUANT_VERSION)
        add_vocabulary(writer, vocabulary)
        factors = architecture.build_rope_factors(config)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for place in plan.places:
            tensor_type = plan.types[place.gguf]
            writer.add_tensor_info(place.gguf, place.shape, numpy.dtype(numpy.float32), count_bytes(tensor_type, place.weights),
                                   raw_dtype=GGMLQuantizationType[tensor_type])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        last = time.monotonic()
        for number, place in enumerate(plan.places, 1):
            writer.write_tensor_data(_Stream(place, plan.types[place.gguf], weights, config, family, pool, 2 * threads))
            if time.monotonic() - last > INTERVAL_SECONDS:
                last = time.monotonic()
                print(f"  ... {quantization.name}: tensor {number} of {len(plan.places)}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
        writer.close()
