"""llama.cpp in a process of its own, so that it can be stopped, and so that its aborts kill nobody else.

In: one JSON request on standard input: model (path), context_tokens, threads, exact (float32 cache,
no flash attention), texts to tokenise, prompts as token ids, new_tokens, messages to render. Out: one JSON
object on standard output: tokens (ids a text), generated (ids a prompt, greedy), rendered (text or
None a conversation). Uses only xllamacpp and the standard library.
Run: `python -m emergency_kit.export.llama_process`, by `parity.ask_llama` alone.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before OpenMP starts: spinning threads stall on shared machines


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Load the model and do what is asked; raises RuntimeError where llama.cpp cannot load it."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    params.n_ctx = request["context_tokens"]
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    params.warmup = params.ui = False
    params.cache_ram_mib = 0
    if request["exact"]:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        sent = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with opener.open(sent) as reply:
            return json.load(reply)

    def render(messages: list[dict[str, str]]) -> str | None:
        try:
            return post("/apply-template", {"messages": messages})["prompt"]
        except urllib.error.HTTPError:
            return None

    greedy = {"n_predict": request["new_tokens"], "temperature": 0.0, "top_k": 1, "return_tokens": True, "cache_prompt": False}
    return {
        "tokens": [post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"] for text in request["texts"]],
        "generated": [post("/completion", {"prompt": prompt, **greedy})["tokens"] for prompt in request["prompts"]],
        "rendered": [render(messages) for messages in request["messages"]],
    }


if __name__ == "__main__":
    reply = sys.stdout
    sys.stdout = sys.stderr
    reply.write(json.dumps(answer(json.load(sys.stdin))))
    reply.flush()
    os._exit(0)  # llama.cpp's own threads need no farewell
