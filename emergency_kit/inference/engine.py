"""Engine: answers from a loaded model, one as a stream of text or many in left-padded batches.

In: chat messages of `data/format.py`. Out: what the model wrote, never cleaned. One decoding loop,
`_decode`, serves both ways, so that a streamed answer and a batched one agree; it takes nothing from the
model's own generation defaults (a repetition penalty, a sampling temperature). A batched row may
differ from the same row alone in bfloat16, where the order of a sum shows; in float32 they agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterator, Sequence

import torch
from transformers import DynamicCache

from emergency_kit.data.tokenize import encode_prompt
from emergency_kit.errors import ModelError
from emergency_kit.model.backend import Loaded

Messages = list[dict[str, str]]
# Called after every decoding step with the work done in answers (fractions within a batch) and the tokens so far.
Progress = Callable[[float, int], None]
# Finished rows are dropped once they are a quarter of the batch: copying the cache costs about a step.
SHRINK_BELOW = 0.75


@dataclass(frozen=True)
class Generated:
    """One answer. text: without the end token; tokens: generated, the end token included; ended: it wrote
    an end token before the limit."""

    text: str
    tokens: int
    ended: bool


class Stream(Iterator[str]):
    """Pieces of one answer's text as they are generated; `result` holds the whole once it is exhausted or stopped."""

    def __init__(self, pieces: Callable[["Stream"], Iterator[str]]):
        self.ids: list[int] = []
        self.text = ""
        self.ended = False
        self._pieces = pieces(self)

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    @property
    def result(self) -> Generated:
        """The answer as far as it has been taken from the stream."""
        return Generated(self.text, len(self.ids), self.ended)


class Engine:
    """Generation with one loaded model. Streams may run in several threads at once; each has its own cache."""

    def __init__(self, loaded: Loaded):
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        config = self.model.config.get_text_config()
        self.context_tokens: int | None = getattr(config, "max_position_embeddings", None)
        listed = getattr(self.model.generation_config, "eos_token_id", None)
        listed = listed if isinstance(listed, list) else [listed]
        self.end_ids = {token for token in (*listed, self.tokenizer.eos_token_id) if token is not None}

    def encode(self, messages: Messages) -> list[int]:
        """Token ids of a prompt, as in training."""
        return encode_prompt(self.tokenizer, messages)

    def stream(self, messages: Messages, max_new_tokens: int, temperature: float = 0.0, seed: int | None = None,
               should_stop: Callable[[], bool] | None = None) -> Stream:
        """The answer to one prompt in pieces; joined, they are its text.

        temperature: 0 is greedy. seed: fixes a sampled answer; None draws a new one each time.
        should_stop is asked before every token. Raises ModelError at once when the prompt and
        `max_new_tokens` do not fit the model's context.
        """
        prompt = self.encode(messages)
        self._check_length(prompt, max_new_tokens, "the prompt")

        def pieces(stream: Stream) -> Iterator[str]:
            sent = 0
            steps = self._decode([prompt], max_new_tokens, temperature, seed)
            while not (should_stop and should_stop()) and (step := next(steps, None)):
                stream.ids += step[1]
                if stream.ids[-1] in self.end_ids:
                    stream.ended = True
                    break
                # Decoded from the start each time: a piece alone would lose the space before its first word.
                text = self._text(stream.ids)
                if len(text) > sent and not text.endswith("\ufffd"):  # half of a character so far
                    yield text[sent:]
                    sent = len(text)
            if rest := self._text(stream.ids)[sent:]:
                yield rest

        return Stream(pieces)

    def generate(self, batch: Sequence[Messages], max_new_tokens: int, batch_size: int = 8,
                 progress: Progress | None = None) -> list[Generated]:
        """Greedy answers to many prompts, in their order; `batch_size` of similar length are decoded together.

        Raises ModelError before the first token when a prompt and `max_new_tokens` do not fit the
        model's context.
        """
        prompts = [self.encode(messages) for messages in batch]
        for number, prompt in enumerate(prompts, 1):
            self._check_length(prompt, max_new_tokens, f"prompt {number} of {len(prompts)}")
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        answers: list[Generated | None] = [None] * len(prompts)
        tokens_before = 0
        for start in range(0, len(order), batch_size):
            chosen = order[start:start + batch_size]
            written: list[list[int]] = [[] for _ in chosen]
            open_rows = set(range(len(chosen)))
            for step, (rows, tokens) in enumerate(self._decode([prompts[index] for index in chosen], max_new_tokens), 1):
                for row, token in zip(rows, tokens):
                    written[row].append(token)
                    if token in self.end_ids:
                        open_rows.discard(row)
                if progress:
                    done = len(chosen) - len(open_rows) * (1 - step / max_new_tokens)
                    progress(start + done, tokens_before + sum(map(len, written)))
            tokens_before += sum(map(len, written))
            for row, index in enumerate(chosen):
                answers[index] = Generated(self._text(written[row]), len(written[row]), row not in open_rows)
        return [answer for answer in answers if answer is not None]

    def _check_length(self, prompt: list[int], max_new_tokens: int, name: str) -> None:
        if self.context_tokens is None or len(prompt) + max_new_tokens <= self.context_tokens:
            return
        left = self.context_tokens - len(prompt)
        remedy = f"lower max_new_tokens to {left} or less, or shorten the prompt" if left > 0 else "shorten the prompt"
        raise ModelError(f"{name} is {len(prompt)} tokens long, and with max_new_tokens {max_new_tokens} it exceeds "
                         f"the model's context of {self.context_tokens} tokens; {remedy}")

    def _text(self, ids: list[int]) -> str:
        ids = [token for token in ids if token not in self.end_ids]  # an end token need not be a special one
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _decode(self, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0,
                seed: int | None = None) -> Iterator[tuple[list[int], list[int]]]:
        """`(rows, tokens)` of every step: the next token of each row that has not ended, rows ascending."""
        device = self.model.device
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config.get_text_config())
        random = torch.Generator(device)
        random.manual_seed(seed) if seed is not None else random.seed()
        slots = list(range(len(prompts)))  # which row stands in each line of the tensors
        open_rows = set(slots)
        for _ in range(max_new_tokens):
            next_ids = self._step(ids, mask, positions, cache, temperature, random)
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

    @torch.inference_mode()
    def _step(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache,
              temperature: float, random: torch.Generator) -> torch.Tensor:
        """Next token ids [rows] after ids [rows, new tokens]; mask [rows, all tokens]."""
        logits = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                            use_cache=True, logits_to_keep=1).logits[:, -1].float()
        if temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial((logits / temperature).softmax(-1), 1, generator=random)[:, 0]
