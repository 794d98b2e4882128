"""llama.cpp in a process of its own, so that it can be stopped, and so that its aborts kill nobody else.

In: one JSON request on standard input: model (path), threads, lora (path of an adapter or ""), texts to tokenise,
messages to render, prompts (token ids) to answer greedily with at most new_tokens each, sequences (`[ids, from]`)
whose logits from position `from` on go to logits_file. Out: one JSON object on standard output: tokens (ids a text),
rendered (text or None a conversation), generated (ids a prompt), vocabulary (width of a row of the file). Uses
xllamacpp and numpy only. Limits: logits are read through llama.cpp's C functions, which xllamacpp's library exports but
does not promise; its version is pinned, and wrong numbers cannot pass a comparison with PyTorch.
Run: `python -m emergency_kit.export.llama_process`, by `parity.ask_llama` alone.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import json
import os
import sys
import urllib.error
import urllib.request
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before OpenMP starts: spinning threads stall on shared machines
SLOTS = 4


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Load the model and do what is asked; raises RuntimeError where llama.cpp cannot load it."""
    reply = _ask_server(request)
    if request["sequences"]:
        reply["vocabulary"] = _write_logits(request)
    return reply


def _ask_server(request: dict[str, Any]) -> dict[str, Any]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    slots = max(1, min(SLOTS, len(request["prompts"])))
    longest = max(map(len, request["prompts"]), default=64) + request["new_tokens"] + 8
    params.n_ctx = longest * slots
    params.n_parallel = slots
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    params.warmup = params.ui = False
    params.cache_ram_mib = 0
    if request["lora"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(request["lora"], 1.0)]
    server = xllamacpp.Server(params)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        sent = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with opener.open(sent) as reply:
            return json.load(reply)

    def render(messages: list[dict[str, str]]) -> str | None:
        try:
            return post("/apply-template", {"messages": messages, "chat_template_kwargs": request["template_settings"]})["prompt"]
        except urllib.error.HTTPError:
            return None

    greedy = {"n_predict": request["new_tokens"], "temperature": 0.0, "top_k": 1, "return_tokens": True, "cache_prompt": False}
    with concurrent.futures.ThreadPoolExecutor(slots) as pool:
        generated = list(pool.map(lambda prompt: post("/completion", {"prompt": prompt, **greedy})["tokens"], request["prompts"]))
    return {
        "tokens": [post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"] for text in request["texts"]],
        "rendered": [render(messages) for messages in request["messages"]],
        "generated": generated,
    }


class _Params(ctypes.Structure):
    """llama.cpp's parameter structures: passed by value, so more than large enough; only the first words are set here."""

    _fields_ = [("words", ctypes.c_uint32 * 256)]


class _Batch(ctypes.Structure):
    """`llama_batch` of llama.h."""

    _fields_ = [("n_tokens", ctypes.c_int32), ("token", ctypes.POINTER(ctypes.c_int32)), ("embd", ctypes.c_void_p),
                ("pos", ctypes.POINTER(ctypes.c_int32)), ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
                ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))), ("logits", ctypes.POINTER(ctypes.c_int8))]


# Words of llama_context_params: n_ctx, n_batch, n_outputs_max and n_outputs_max_per_seq (0: as n_batch).
_N_CTX, _N_BATCH, _OUTPUTS, _OUTPUTS_PER_SEQUENCE = 0, 1, 5, 6


def _open_library() -> ctypes.CDLL:
    import xllamacpp

    library, pointer, number = ctypes.CDLL(xllamacpp.xllamacpp.__file__), ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
            ("llama_model_default_params", _Params, []), ("llama_context_default_params", _Params, []),
            ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Params]), ("llama_init_from_model", pointer, [pointer, _Params]),
            ("llama_set_n_threads", None, [pointer, number, number]), ("llama_model_get_vocab", pointer, [pointer]),
            ("llama_vocab_n_tokens", number, [pointer]), ("llama_batch_init", _Batch, [number] * 3),
            ("llama_get_memory", pointer, [pointer]), ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
            ("llama_decode", number, [pointer, _Batch]), ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, number]),
            ("llama_adapter_lora_init", pointer, [pointer, ctypes.c_char_p]),
            ("llama_set_adapters_lora", number, [pointer, ctypes.POINTER(pointer), ctypes.c_size_t, ctypes.POINTER(ctypes.c_float)])):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _write_logits(request: dict[str, Any]) -> int:
    """Write float32 logits, one row a wanted position, sequence after sequence; returns the vocabulary's size."""
    import numpy

    library = _open_library()
    model = library.llama_model_load_from_file(request["model"].encode(), library.llama_model_default_params())
    width = max(len(ids) for ids, _ in request["sequences"])
    params = library.llama_context_default_params()
    params.words[_N_CTX] = params.words[_N_BATCH] = (width + 255) // 256 * 256
    params.words[_OUTPUTS] = params.words[_OUTPUTS_PER_SEQUENCE] = 0
    context = library.llama_init_from_model(model, params)
    library.llama_set_n_threads(context, request["threads"], request["threads"])
    if request["lora"]:
        adapter = library.llama_adapter_lora_init(model, request["lora"].encode())
        if not adapter or library.llama_set_adapters_lora(context, (ctypes.c_void_p * 1)(adapter), 1, (ctypes.c_float * 1)(1.0)):
            raise RuntimeError("error: llama.cpp does not apply the adapter")
    vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    batch = library.llama_batch_init(width, 0, 1)
    with open(request["logits_file"], "wb") as file:
        for ids, start in request["sequences"]:
            library.llama_memory_clear(library.llama_get_memory(context), True)
            batch.n_tokens = len(ids)
            for place, token in enumerate(ids):
                batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
                batch.seq_id[place][0], batch.logits[place] = 0, place >= start
            if library.llama_decode(context, batch):
                raise RuntimeError(f"error: llama.cpp cannot decode {len(ids)} tokens")
            for place in range(start, len(ids)):
                file.write(numpy.ctypeslib.as_array(library.llama_get_logits_ith(context, place), (vocabulary,)).data)
    return vocabulary


if __name__ == "__main__":
    reply = sys.stdout
    sys.stdout = sys.stderr
    reply.write(json.dumps(answer(json.load(sys.stdin))))
    reply.flush()
    os._exit(0)  # llama.cpp's own threads need no farewell
