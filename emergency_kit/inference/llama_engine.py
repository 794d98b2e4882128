"""LlamaEngine: answers from a GGUF file by llama.cpp, with the methods and results of `torch_engine.Engine`.

In: chat messages of `data/format.py`. Out: what the model wrote, never cleaned. llama.cpp (xllamacpp) runs in this
process; several answers are generated at once, one a slot, and a slot keeps what its last prompt began with,
so that the system prompt is computed once. Its own HTTP server listens on loopback behind a random key and is
used only to render and tokenise prompts. Limits: a CPU; the batched arithmetic of quantised weights may round
differently beside other answers, as in any engine.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import threading
import time
import urllib.error
import urllib.request
import weakref
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

from emergency_kit.data.tokenize import encode_prompt
from emergency_kit.errors import ModelError
from emergency_kit.inference.engine import Generated, Messages, Progress, State, Stream, check_length
from emergency_kit.inference.grammar import check_grammar
from emergency_kit.model.process_memory import cores

# Tokens of context a slot; a prompt with two cards and the longest answer take about 1,800. Memory grows with it.
CONTEXT_TOKENS = 4096
# How often a waiting thread looks whether it should stop.
POLL_SECONDS = 0.05
PROGRESS_SECONDS = 0.2
# Prompts that a slot has left are kept in memory: a hazard that is asked about again costs no new prompt (about 10 MB each
# with the bundled model, 6 MB the beginnings that `remember` computes). Tokens of a prompt in one step: between steps a stopped stream leaves its slot.
CACHE_MIB, BATCH_TOKENS, STEP_TOKENS, PIECE_TOKENS = 512, 256, 128, 64
# For how long llama.cpp's HTTP server waits for the rest of a request; an hour unless told, and an engine cannot close until then.
READ_SECONDS = 5
# Drafts: where the last DRAFT_MATCH tokens stood before, the DRAFT_TOKENS that followed them there are computed at once, and those that the model chooses
# itself, under the grammar, are kept. An answer copies its card's lines, so one in two is (benchmarks/RESULTS.md).
DRAFT_MATCH, DRAFT_TOKENS = 5, 5
# Nothing of llama.cpp's own defaults (top-k 40, top-p 0.95): the distribution is the model's, as in `torch_engine.Engine`.
PLAIN_SAMPLING = {"samplers": ["temperature"], "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}


class LlamaEngine:
    """Generation with one GGUF file. Streams may run in several threads at once; beyond `slots` they wait their turn."""

    def __init__(self, path: Path, slots: int = 4, context_tokens: int = CONTEXT_TOKENS, threads: int | None = None, drafts: bool = False):
        """Load the file; raises ModelError where llama.cpp cannot use it. threads: by default one a core. drafts: take the tokens that stood before behind the
        same ones as a guess at the next; one answer comes faster, several at once slower, and a near tie may fall otherwise."""
        self._server, self._key = _start(path, slots, context_tokens, threads or _count_cores(), drafts)
        self._asking = threading.Lock()
        self.slots = slots
        self._permits = threading.Semaphore(slots)
        self._closing = threading.Event()
        self._workers: set[threading.Thread] = set()
        self._activity = _Activity()
        properties = self._ask("/props")
        self.context_tokens: int = properties["default_generation_settings"]["n_ctx"]
        self.tokenizer = _Tokenizer(self._ask, properties["bos_token"], properties["eos_token"])
        self.description = f"llama.cpp, {properties.get('model_ftype', 'GGUF')}, {slots} at once, {self.context_tokens} tokens each"
        weakref.finalize(self, _stop, self._closing, self._workers)  # threads inside llama.cpp must be out before Python ends

    def encode(self, messages: Messages) -> list[int]:
        """Token ids of a prompt, as in training: the file's own template and tokenizer, through `data/format.py`."""
        return encode_prompt(self.tokenizer, messages)

    def stream(self, messages: Messages, max_new_tokens: int, temperature: float = 0.0, seed: int | None = None,
               should_stop: Callable[[], bool] | None = None, stop: Sequence[str] = (), grammar: str = "") -> Stream:
        """The answer to one prompt in pieces; joined, they are its text.

        temperature: 0 is greedy. seed: fixes a sampled answer; None draws a new one each time.
        should_stop is asked before every token, and while it waits. stop: the answer ends before the first of
        these texts. grammar: of `grammar.py`, which the answer then follows. Raises ModelError at once when the prompt
        and `max_new_tokens` do not fit the context, and on the way when llama.cpp refuses.
        """
        prompt = self.encode(messages)
        check_length(prompt, max_new_tokens, self.context_tokens, "the prompt")
        if grammar:
            check_grammar(grammar)
        request = _build_request(prompt, max_new_tokens, temperature, seed, grammar)

        def pieces(state: State) -> Iterator[str]:
            events: queue.SimpleQueue[Any] = queue.SimpleQueue()
            cancelled = threading.Event()
            self._begin(request, events.put, cancelled)
            try:
                while not (should_stop and should_stop()):
                    try:
                        event = events.get(timeout=POLL_SECONDS)
                    except queue.Empty:
                        continue
                    if event is None:
                        return
                    text = _read_event(state, event)
                    if text:
                        yield text
            finally:
                cancelled.set()

        return Stream(pieces, stop, grammar)

    def generate(self, batch: Sequence[Messages], max_new_tokens: int, batch_size: int = 8,
                 progress: Progress | None = None, grammar: str = "", temperature: float = 0.0, seeds: Sequence[int] | None = None) -> list[Generated]:
        """Answers to many prompts, in their order; as many at once as there are slots (`batch_size` at most).

        temperature: 0 is greedy. seeds: one a prompt, for sampled answers. Raises ModelError before the first token when a prompt and
        `max_new_tokens` do not fit the context.
        """
        for number, messages in enumerate(batch, 1):
            check_length(self.encode(messages), max_new_tokens, self.context_tokens, f"prompt {number} of {len(batch)}")
        halted = threading.Event()
        streams = [self.stream(messages, max_new_tokens, temperature, seeds[number] if seeds else None, halted.is_set, grammar=grammar) for number, messages in enumerate(batch)]
        with ThreadPoolExecutor(min(self.slots, batch_size)) as pool:
            running = {pool.submit(_exhaust, stream) for stream in streams}
            try:
                while running:
                    finished, running = wait(running, PROGRESS_SECONDS, FIRST_COMPLETED)
                    for answer in finished:
                        answer.result()
                    if progress:
                        done = len(streams) - len(running)
                        progress(done + sum(min(1.0, stream.tokens / max_new_tokens) for stream in streams if stream.tokens and not stream.over) if running
                                 else float(done), sum(stream.tokens for stream in streams))
            finally:
                halted.set()
        return [stream.result for stream in streams]

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._closing.is_set()

    def idle_seconds(self) -> float:
        """For how long nothing has been asked; 0 while an answer is on its way or waits."""
        return self._activity.idle_seconds()

    def remember(self, prompt: list[int], should_stop: Callable[[], bool]) -> bool:
        """Compute what a prompt begins with, so that one that goes on from there costs its rest alone; False where it was stopped, or every slot is taken.

        The prompts that were left last are kept, up to CACHE_MIB. Raises ModelError where llama.cpp refuses.
        """
        if self._closing.is_set() or not self._permits.acquire(blocking=False):
            return False
        failed: list[Any] = []

        def receive(event: Any) -> bool:
            failed.extend([event] if "error" in event else [])
            return should_stop() or self._closing.is_set()

        self._workers.add(threading.current_thread())
        try:
            # In pieces, since whoever asks meanwhile waits for the piece that is being computed.
            for end in range(PIECE_TOKENS, len(prompt) + PIECE_TOKENS, PIECE_TOKENS):
                if should_stop() or self._closing.is_set():
                    return False
                self._server.handle_completions(_build_request(prompt[:end], 0, 0.0, 0, ""), receive)
                if failed:
                    _read_event(State(), failed[0])
        finally:
            self._workers.discard(threading.current_thread())
            self._permits.release()
        return True

    def close(self) -> None:
        """Stop every stream, then llama.cpp; a second call does nothing."""
        _stop(self._closing, self._workers)
        with self._asking:  # llama.cpp ends once its requests have, and keeps Python's threads from running until then
            self._server = None

    def _begin(self, request: dict[str, Any], put: Callable[[Any], None], cancelled: threading.Event) -> None:
        """Generate in a thread of its own: `put` gets llama.cpp's events, then None."""
        if self._closing.is_set():
            raise ModelError("this engine has been closed")
        server, permits, closing, workers, activity = self._server, self._permits, self._closing, self._workers, self._activity

        def halted(*_: Any) -> bool:
            return cancelled.is_set() or closing.is_set()

        def receive(event: Any) -> bool:
            put(event)
            return halted()

        def work() -> None:
            try:
                while not permits.acquire(timeout=POLL_SECONDS):
                    if halted():
                        return
                try:
                    if not halted():
                        server.handle_completions(request, receive)
                finally:
                    permits.release()
            finally:
                activity.end()
                put(None)
                workers.discard(threading.current_thread())

        activity.begin()
        thread = threading.Thread(target=work, name="llama.cpp answer", daemon=True)
        workers.add(thread)
        thread.start()

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """A request to llama.cpp's own server on loopback; raises urllib's HTTPError where it refuses."""
        with self._asking:
            if self._server is None:
                raise ModelError("this engine has been closed")
            sent = urllib.request.Request(self._server.listening_address + path, None if body is None else json.dumps(body).encode(),
                                          {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"})
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sent, timeout=60) as reply:
                return json.load(reply)


class _Activity:
    """How many answers are on their way, and since when there are none."""

    def __init__(self) -> None:
        self._lock, self._running, self._since = threading.Lock(), 0, time.monotonic()

    def begin(self) -> None:
        with self._lock:
            self._running += 1

    def end(self) -> None:
        with self._lock:
            self._running, self._since = self._running - 1, time.monotonic()

    def idle_seconds(self) -> float:
        with self._lock:
            return 0.0 if self._running else time.monotonic() - self._since


class _Tokenizer:
    """As much of a Hugging Face tokenizer as `data/format.py` and `encode_prompt` use, answered by llama.cpp."""

    def __init__(self, ask: Callable[..., Any], bos_token: str, eos_token: str):
        self._ask = weakref.WeakMethod(ask)
        self.bos_token, self.eos_token = bos_token, eos_token
        ids = self._tokenise(bos_token, special=False) if bos_token else []
        self.bos_token_id = ids[0] if len(ids) == 1 else None

    def __call__(self, text: str, add_special_tokens: bool = True) -> "_Encoded":
        return _Encoded(self._tokenise(text, add_special_tokens))

    def apply_chat_template(self, messages: Messages, tokenize: bool = False, add_generation_prompt: bool = True, **settings: Any) -> str:
        """The file's chat template; raises jinja2.TemplateError where it refuses, as transformers does, and for a conversation that ends
        in an answer, which llama.cpp would go on with."""
        import jinja2

        assert not tokenize
        if not add_generation_prompt:
            raise jinja2.TemplateError("llama.cpp renders prompts alone")
        try:
            return self._call("/apply-template", {"messages": messages, "chat_template_kwargs": settings})["prompt"]
        except urllib.error.HTTPError as error:
            raise jinja2.TemplateError(error.read().decode(errors="replace")) from None

    def _tokenise(self, text: str, special: bool) -> list[int]:
        return self._call("/tokenize", {"content": text, "add_special": special, "parse_special": True})["tokens"]

    def _call(self, path: str, body: dict[str, Any]) -> Any:
        ask = self._ask()
        if ask is None:
            raise ModelError("this engine has been closed")
        return ask(path, body)


class _Encoded:
    def __init__(self, input_ids: list[int]):
        self.input_ids = input_ids


def _start(path: Path, slots: int, context_tokens: int, threads: int, drafts: bool) -> tuple[Any, str]:
    """`(llama.cpp's server, its key)`."""
    import xllamacpp

    key = secrets.token_hex(16)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel = slots
    params.n_ctx = slots * context_tokens
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_ram_mib = CACHE_MIB
    params.n_batch, params.n_ubatch = BATCH_TOKENS, STEP_TOKENS
    if drafts:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
        params.speculative.ngram_simple.size_n, params.speculative.ngram_simple.size_m = DRAFT_MATCH, DRAFT_TOKENS
    params.n_threads_http, params.timeout_read = 2, READ_SECONDS
    params.verbosity = 0
    params.ui = params.endpoint_slots = False
    params.api_keys = [key]
    params.cors_origins = "http://127.0.0.1"
    try:
        return xllamacpp.Server(params), key
    except RuntimeError as error:
        raise ModelError(f"checkpoint {path}: llama.cpp cannot load it ({error}); the file is damaged, of an unknown kind, or larger than "
                         "the memory. Next: make export-gguf") from None


def _count_cores() -> int:
    """Cores this process may use; OMP_NUM_THREADS, where set, says how many it shall."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted):
        return int(wanted)
    return cores()


def _build_request(prompt: list[int], max_new_tokens: int, temperature: float, seed: int | None, grammar: str) -> dict[str, Any]:
    request = {"prompt": prompt, "max_tokens": max_new_tokens, "temperature": temperature, "seed": secrets.randbits(31) if seed is None else seed,
               "stream": True, "timings_per_token": True, "return_progress": True, "cache_prompt": True, **PLAIN_SAMPLING}
    return request | ({"grammar": f"%llguidance {{}}\n{grammar}"} if grammar else {})


def _read_event(state: State, event: Any) -> str:
    """The text of one event, after taking its counts into the state; raises ModelError for a refusal."""
    if "error" in event:
        raise ModelError(f"llama.cpp: {event['error'].get('message', event['error'])}")
    timings = event.get("timings", {})
    state.tokens, state.cached_tokens = timings.get("predicted_n", state.tokens), timings.get("cache_n", state.cached_tokens)
    choice = event["choices"][0]
    state.ended = choice["finish_reason"] == "stop"
    return choice["text"]


def _exhaust(stream: Stream) -> None:
    for _ in stream:
        pass


def _stop(closing: threading.Event, workers: set[threading.Thread]) -> None:
    closing.set()
    for thread in list(workers):
        if thread.ident:  # one that has not started yet will find `closing` set
            thread.join(timeout=60)
