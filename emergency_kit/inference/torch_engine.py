"""Engine: answers from a loaded model, one as a stream of text or many in left-padded batches.

In: chat messages of `data/format.py`. Out: what the model wrote, never cleaned. One decoding loop,
`_decode`, serves both ways, so that a streamed answer and a batched one agree; it takes nothing from the
model's own generation defaults (a repetition penalty, a sampling temperature). A batched row may
differ from the same row alone in bfloat16, where the order of a sum shows; in float32 they agree.
"""

from __future__ import annotations

import threading
from typing import Any, Callable, Iterator, Sequence

import torch
from transformers import Cache

from emergency_kit.data.tokenize import encode_prompt, end_of_turn
from emergency_kit.inference import kv_cache
from emergency_kit.inference.engine import Generated, Messages, Progress, State, Stream, check_length, repeats_itself
from emergency_kit.inference.grammar import Constraint, build_tokenizer
from emergency_kit.model.backend import Loaded

# Finished rows are dropped once they are a quarter of the batch: copying the cache costs about a step.
SHRINK_BELOW = 0.75


class Engine:
    """Generation with one loaded model. Streams may run in several threads at once; each has its own cache."""

    def __init__(self, loaded: Loaded):
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self._preallocated = loaded.kind != "training" and kv_cache.use(self.model)
        self.description = ", ".join([loaded.kind, f"attention {self.model.config._attn_implementation}", *loaded.notes])
        config = self.model.config.get_text_config()
        self.context_tokens: int | None = getattr(config, "max_position_embeddings", None)
        listed = getattr(self.model.generation_config, "eos_token_id", None)
        listed = listed if isinstance(listed, list) else [listed]
        self.end_ids = {token for token in (*listed, self.tokenizer.eos_token_id, end_of_turn(self.tokenizer)) if token is not None}
        self._vocabulary: int = config.vocab_size
        self._grammar_tokenizer: Any = None
        self._lock = threading.Lock()

    def encode(self, messages: Messages) -> list[int]:
        """Token ids of a prompt, as in training."""
        return encode_prompt(self.tokenizer, messages)

    def stream(self, messages: Messages, max_new_tokens: int, temperature: float = 0.0, seed: int | None = None,
               should_stop: Callable[[], bool] | None = None, stop: Sequence[str] = (), grammar: str = "") -> Stream:
        """The answer to one prompt in pieces; joined, they are its text.

        temperature: 0 is greedy. seed: fixes a sampled answer; None draws a new one each time.
        should_stop is asked before every token. stop: the answer ends before the first of these texts.
        grammar: of `grammar.py`, which the answer then follows. Raises ModelError at once when the prompt and
        `max_new_tokens` do not fit the model's context.
        """
        prompt = self.encode(messages)
        check_length(prompt, max_new_tokens, self.context_tokens, "the prompt")

        def pieces(state: State) -> Iterator[str]:
            ids: list[int] = []
            sent = 0
            steps = self._decode([prompt], max_new_tokens, temperature, None if seed is None else [seed], grammar)
            while not (should_stop and should_stop()) and (step := next(steps, None)):
                ids += step[1]
                state.tokens = len(ids)
                if ids[-1] in self.end_ids:
                    state.ended = True
                    break
                # Decoded from the start each time: a piece alone would lose the space before its first word.
                text = self._text(ids)
                if len(text) > sent and not text.endswith("\ufffd"):  # half of a character so far
                    yield text[sent:]
                    sent = len(text)
            if rest := self._text(ids)[sent:]:
                yield rest

        return Stream(pieces, stop, grammar)

    def generate(self, batch: Sequence[Messages], max_new_tokens: int, batch_size: int = 8,
                 progress: Progress | None = None, grammar: str = "", temperature: float = 0.0, seeds: Sequence[int] | None = None) -> list[Generated]:
        """Answers to many prompts, in their order; `batch_size` of similar length are decoded together.

        temperature: 0 is greedy. seeds: one a prompt, which fixes its sampled answer whatever stands beside it. Raises ModelError before the first token when a prompt and `max_new_tokens` do not fit the
        model's context.
        """
        prompts = [self.encode(messages) for messages in batch]
        for number, prompt in enumerate(prompts, 1):
            check_length(prompt, max_new_tokens, self.context_tokens, f"prompt {number} of {len(prompts)}")
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        answers: list[Generated | None] = [None] * len(prompts)
        tokens_before = 0
        for start in range(0, len(order), batch_size):
            chosen = order[start:start + batch_size]
            written: list[list[int]] = [[] for _ in chosen]
            open_rows = set(range(len(chosen)))
            steps = self._decode([prompts[index] for index in chosen], max_new_tokens, temperature, [seeds[index] for index in chosen] if seeds else None, grammar)
            for step, (rows, tokens) in enumerate(steps, 1):
                for row, token in zip(rows, tokens):
                    written[row].append(token)
                    if token in self.end_ids:
                        open_rows.discard(row)
                if progress:
                    done = len(chosen) - len(open_rows) * (1 - step / max_new_tokens)
                    progress(start + done, tokens_before + sum(map(len, written)))
            tokens_before += sum(map(len, written))
            for row, index in enumerate(chosen):
                text = self._text(written[row])
                text = text.removesuffix("\n") if grammar and repeats_itself(text) else text
                answers[index] = Generated(text, len(written[row]), row not in open_rows)
        return [answer for answer in answers if answer is not None]

    def close(self) -> None:
        """Nothing to free here; the other engine has a server to stop."""

    def _text(self, ids: list[int]) -> str:
        ids = [token for token in ids if token not in self.end_ids]  # an end token need not be a special one
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _decode(self, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0,
                seeds: list[int] | None = None, grammar: str = "") -> Iterator[tuple[list[int], list[int]]]:
        """`(rows, tokens)` of every step: the next token of each row that has not ended, rows ascending."""
        device = self.model.device
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        random = [torch.Generator(device) for _ in prompts] if temperature else []
        for row, generator in enumerate(random):
            generator.manual_seed(seeds[row]) if seeds else generator.seed()
        constraints = [self._constrain(grammar) for _ in prompts] if grammar else []
        slots = list(range(len(prompts)))  # which row stands in each line of the tensors
        open_rows = set(slots)
        logits, cache = self._read(ids, mask, positions)
        for number in range(max_new_tokens):
            if number:
                logits = self._step(ids, mask, positions, cache)
            next_ids = _choose(logits, temperature, [random[row] for row in slots] if random else [])
            for line, row in enumerate(slots if grammar else ()):
                if row in open_rows:
                    next_ids[line] = _choose_allowed(constraints[row], logits[line], next_ids[line], temperature, random[row:row + 1])
            tokens = next_ids.tolist()
            given = [(row, token) for row, token in zip(slots, tokens) if row in open_rows]
            yield [row for row, _ in given], [token for _, token in given]
            open_rows -= {row for row, token in given if token in self.end_ids}
            if not open_rows:
                return
            ids, positions = next_ids[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(slots), 1)], dim=1)
            if len(open_rows) <= SHRINK_BELOW * len(slots):
                kept = torch.tensor([line for line, row in enumerate(slots) if row in open_rows], device=device)
                cache.batch_select_indices(kept)
                ids, positions, mask = ids[kept], positions[kept], mask[kept]
                slots = [row for row in slots if row in open_rows]

    def _read(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, Cache]:
        """Logits after the prompts, and the cache; on a CPU a few rows at a time."""
        size = max(1, kv_cache.PROMPT_TOKENS // ids.shape[1]) if self._preallocated else len(ids)
        parts = [slice(start, start + size) for start in range(0, len(ids), size)]
        caches = [kv_cache.new_cache(self.model, self._preallocated) for _ in parts]
        logits = [self._step(ids[part], mask[part], positions[part], cache) for part, cache in zip(parts, caches)]
        return torch.cat(logits), kv_cache.join(caches)

    @torch.inference_mode()
    def _step(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Float32 logits [rows, vocabulary] after ids [rows, new tokens]; mask [rows, all tokens]."""
        return self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                          use_cache=True, logits_to_keep=1).logits[:, -1].float()

    def _constrain(self, grammar: str) -> Constraint:
        with self._lock:
            if self._grammar_tokenizer is None:
                self._grammar_tokenizer = build_tokenizer(self.tokenizer, self._vocabulary, self.end_ids)
        return Constraint(self._grammar_tokenizer, grammar, self._text, self.end_ids)


def _choose(logits: torch.Tensor, temperature: float, random: Sequence[torch.Generator]) -> torch.Tensor:
    """Token ids [rows] by logits [rows, vocabulary]; random: a generator a row."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in zip(probabilities, random)])


def _choose_allowed(constraint: Constraint, logits: torch.Tensor, chosen: torch.Tensor, temperature: float, random: Sequence[torch.Generator]) -> torch.Tensor:
    """The chosen token where the grammar allows it, else one chosen among those that it allows: the same distribution, and far cheaper."""
    if not constraint.allows(int(chosen)):
        chosen = _choose(constraint.mask(logits)[None], temperature, random)[0]
    constraint.take(int(chosen))
    return chosen
