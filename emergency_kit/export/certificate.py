"""The parity certificate: proof that a GGUF file in llama.cpp still is the model that was trained.

In: a file, and its source as a `Reference`. Out: a JSON object, `<file>.certificate.json`, and the same for people,
`<file>.certificate.md`. It holds the tokenizers on strings that break tokenizers, the chat template, the next-token
distributions at held-out answer tokens, greedy answers, and what these answers give and break.
Which figures are out of bounds stands under `outside`; the bounds are the config's.
"""

from __future__ import annotations

import importlib.metadata
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Callable

import numpy
import torch

from emergency_kit.config import ExportConfig, Resolved
from emergency_kit.data.format import record_messages
from emergency_kit.data.template import as_accepted, render_prompt
from emergency_kit.errors import ExportError
from emergency_kit.export import held_out, parity
from emergency_kit.export.progress import report_while
from emergency_kit.export.quantize import Quantization
from emergency_kit.export.reference import Reference
from emergency_kit.export.safety import measure_safety
from emergency_kit.export.strings import build_strings
from emergency_kit.files import scratch_folder
from emergency_kit.data.tokenize import encode_prompt, end_of_turn
from emergency_kit.knowledge.cards import load_cards

# Places compared at once: 256 rows of a vocabulary of 150,000 are 150 MB.
CHUNK = 256


@dataclass
class Examiner:
    """What every file of one source is compared with; the reference is loaded, and asked, once."""

    resolved: Resolved
    tokenizer: Any
    load: Callable[[], Reference]

    @property
    def export(self) -> ExportConfig:
        """The config's section."""
        return self.resolved.config.export

    @cached_property
    def reference(self) -> Reference:
        """The merged model."""
        return self.load()

    @cached_property
    def strings(self) -> list[str]:
        """What both tokenizers split."""
        return build_strings(self.tokenizer, self.export.certificate_strings)

    @cached_property
    def sent(self) -> list[str]:
        """The strings as llama.cpp gets them: composed (NFC) where the tokenizer composes, which llama.cpp leaves to its caller (Qwen)."""
        normaliser = self.tokenizer.backend_tokenizer.normalizer
        if normaliser is None or normaliser.normalize_str("e\u0301") != "\u00e9":
            return self.strings
        return [unicodedata.normalize("NFC", text) for text in self.strings]

    @cached_property
    def held_out(self) -> held_out.HeldOut:
        """Sequences and prompts that training has not seen."""
        return held_out.load_held_out(self.resolved, self.tokenizer)

    @cached_property
    def conversations(self) -> list[list[dict[str, str]]]:
        """Chats whose rendering is compared."""
        return [*parity.build_messages_for_proof(self.resolved), *self.prompts]

    @cached_property
    def prompts(self) -> list[list[dict[str, str]]]:
        """The held-out prompts as chat messages."""
        cards = load_cards()
        return [record_messages(record, cards, self.held_out.grounding) for record in self.held_out.asked]

    @cached_property
    def hidden(self) -> torch.Tensor:
        """The reference's final hidden states at the answer tokens."""
        with report_while("the merged model reads held-out answers"):
            return self.reference.hidden(self.held_out.sequences)

    @cached_property
    def answers(self) -> list[str] | None:
        """The reference's greedy answers; None for one that is read tensor by tensor."""
        if not self.reference.whole:
            return None
        with report_while("the merged model answers held-out prompts"):
            return [item.text for item in self.reference.answer(self.prompts, self.export.certificate_max_new_tokens)]


def certify(path: Path, quantization: Quantization, examiner: Examiner, lora: Path | None = None) -> dict[str, Any]:
    """Compare a file (and an adapter file on it) with the reference; returns the certificate.

    Raises ExportError when llama.cpp cannot load the file.
    """
    tokenizer, export, held = examiner.tokenizer, examiner.export, examiner.held_out
    ids = [encode_prompt(tokenizer, messages) for messages in examiner.prompts]
    with scratch_folder(path.parent) as scratch:
        logits_file = scratch / "logits"
        reply = parity.ask_llama({
            "model": str(path.resolve()), "lora": str(lora.resolve()) if lora else "", "texts": examiner.sent, "messages": [as_accepted(tokenizer, messages) for messages in examiner.conversations],
            "prompts": ids, "new_tokens": export.certificate_max_new_tokens, "sequences": held.sequences, "logits_file": str(logits_file.resolve())},
            path.stat().st_size)
        logits = numpy.memmap(logits_file, numpy.float32, "r").reshape(-1, reply["vocabulary"])
        distributions = _compare_distributions(examiner, logits)
        del logits
    answers = [_text(tokenizer, generated) for generated in reply["generated"]]
    certificate: dict[str, Any] = {
        "quantization": quantization.name,
        "llama_cpp": f"xllamacpp {importlib.metadata.version('xllamacpp')}",
        "reference": "merged model in PyTorch, float32" + ("" if examiner.reference.whole else ", one tensor at a time"),
        "tokenizer": _compare_tokens(tokenizer, examiner, reply["tokens"]),
        "template": _compare_templates(tokenizer, examiner.conversations, reply["rendered"]),
        "distributions": {"data": held.source, "records": len(held.sequences), **distributions},
        "greedy": _compare_answers(examiner, answers),
        "safety": _compare_safety(examiner, answers),
    }
    if examiner.reference.merge_difference is not None:
        certificate["merge_max_abs_logit_difference"] = examiner.reference.merge_difference
    certificate["bounds"] = {
        "max_mean_kl": export.max_mean_kl[quantization.name], "min_top1_percent": export.min_top1_percent[quantization.name],
        "max_recall_loss_points": export.max_recall_loss_points[quantization.name], "max_more_broken_rules": export.max_more_broken_rules}
    certificate["outside"] = _find_outside(certificate)
    return certificate


def check(certificate: dict[str, Any], export: ExportConfig) -> None:
    """Raise ExportError for a certificate out of bounds, unless the config allows that."""
    if certificate["outside"] and not export.allow_out_of_bounds:
        raise ExportError(f"{certificate['quantization']}: {'; '.join(certificate['outside'])}. The file was not kept. Next: another type with -q, "
                          "other bounds under export in the config, or --allow-out-of-bounds, which the certificate then says")


def _compare_distributions(examiner: Examiner, logits: numpy.ndarray) -> dict[str, Any]:
    """KL divergence of the file's distributions from the reference's, in nats, and agreement of the likeliest token."""
    targets = torch.tensor(examiner.held_out.targets)
    if len(logits) != len(targets):
        raise ExportError(f"llama.cpp gave {len(logits)} rows of logits for {len(targets)} places; report this with --debug")
    divergences, same, losses = [], 0, torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(targets), CHUNK):
        expected = examiner.reference.log_probabilities(examiner.hidden[start:start + CHUNK])
        found = torch.from_numpy(logits[start:start + CHUNK].copy())[:, :expected.shape[1]].log_softmax(-1)
        divergences.append((expected.exp() * (expected - found)).sum(-1).double())
        same += int((expected.argmax(-1) == found.argmax(-1)).sum())
        for number, values in enumerate((expected, found)):
            losses[number] -= values.gather(1, targets[start:start + CHUNK, None]).double().sum()
    kl = torch.cat(divergences)
    return {"answer_tokens": len(targets), "mean_kl": kl.mean().item(), "median_kl": kl.median().item(), "p99_kl": kl.quantile(0.99).item(),
            "max_kl": kl.max().item(), "top1_percent": round(100 * same / len(targets), 3),
            "reference_perplexity": (losses[0] / len(targets)).exp().item(), "perplexity": (losses[1] / len(targets)).exp().item()}


def _compare_tokens(tokenizer: Any, examiner: Examiner, found: list[list[int]]) -> dict[str, Any]:
    strings = examiner.strings
    expected = [parity.tokenize(tokenizer, text) for text in strings]
    unequal = [number for number, pair in enumerate(zip(expected, found)) if pair[0] != pair[1]]
    result: dict[str, Any] = {"strings": len(strings), "equal": len(strings) - len(unequal), "first_difference": None,
                              "composed_before": sum(one != other for one, other in zip(strings, examiner.sent))}
    if unequal:
        first = unequal[0]
        result["first_difference"] = {"text": strings[first], "expected": tokenizer.convert_ids_to_tokens(expected[first]),
                                      "found": tokenizer.convert_ids_to_tokens(found[first])}
    return result


def _compare_templates(tokenizer: Any, conversations: list[list[dict[str, str]]], rendered: list[str | None]) -> dict[str, int]:
    """llama.cpp leaves a leading BOS to its tokenizer."""
    equal = 0
    for messages, found in zip(conversations, rendered):
        expected = render_prompt(tokenizer, messages)
        equal += found is not None and (found == expected or (tokenizer.bos_token or "") + found == expected)
    return {"chats": len(conversations), "equal": equal}


def _compare_answers(examiner: Examiner, answers: list[str]) -> dict[str, Any]:
    listed: list[dict[str, Any]] = [{"id": record.id, "answer": answer} for record, answer in zip(examiner.held_out.asked, answers)]
    if examiner.answers is None:
        return {"prompts": len(answers), "same": None, "same_beginning_percent": None, "answers": listed}
    shares = []
    for entry, expected in zip(listed, examiner.answers):
        entry["same"] = entry["answer"] == expected
        if not entry["same"]:
            entry["reference"] = expected
        alike = next((place for place, (one, other) in enumerate(zip(entry["answer"], expected)) if one != other), min(len(entry["answer"]), len(expected)))
        shares.append(1.0 if entry["same"] else alike / max(1, len(expected)))
    return {"prompts": len(answers), "same": sum(entry["same"] for entry in listed), "same_beginning_percent": round(100 * sum(shares) / len(shares), 1),
            "answers": listed}


def _compare_safety(examiner: Examiner, answers: list[str]) -> dict[str, Any]:
    records = examiner.held_out.asked
    return {"file": measure_safety(records, answers),
            "reference": measure_safety(records, examiner.answers) if examiner.answers is not None else None}


def _find_outside(certificate: dict[str, Any]) -> list[str]:
    """What is out of bounds, in words."""
    bounds, numbers, outside = certificate["bounds"], certificate["distributions"], []
    tokens, template = certificate["tokenizer"], certificate["template"]
    if tokens["equal"] < tokens["strings"]:
        first = tokens["first_difference"]
        outside.append(f"llama.cpp splits {tokens['strings'] - tokens['equal']} of {tokens['strings']} strings into other tokens than the model was trained with "
                       f"({first['text'][:60]!r}: {first['found'][:8]} for {first['expected'][:8]})")
    if template["equal"] < template["chats"]:
        outside.append(f"llama.cpp renders {template['chats'] - template['equal']} of {template['chats']} chats otherwise than the trained model's template")
    if not numbers["mean_kl"] <= bounds["max_mean_kl"]:  # also true for NaN
        outside.append(f"mean KL divergence {numbers['mean_kl']:.3g} is over {bounds['max_mean_kl']:g}")
    if numbers["top1_percent"] < bounds["min_top1_percent"]:
        outside.append(f"top-1 agreement {numbers['top1_percent']:g} % is under {bounds['min_top1_percent']:g} %")
    file, reference = certificate["safety"]["file"], certificate["safety"]["reference"]
    if reference is not None:
        loss = reference["recall_percent"] - file["recall_percent"] if reference["actions"] else 0.0
        if loss > bounds["max_recall_loss_points"]:
            outside.append(f"its answers give {file['recall_percent']:g} % of the critical actions, the merged model's {reference['recall_percent']:g} %; "
                           f"{bounds['max_recall_loss_points']:g} points may be lost")
        harm, before = (side["broken_rules"] + side["dangerous_prohibitions"] for side in (file, reference))
        if harm - before > bounds["max_more_broken_rules"]:
            outside.append(f"its answers break never-rules or forbid help {harm} times, the merged model's {before}; "
                           f"{bounds['max_more_broken_rules']} more are allowed ({'; '.join(file['found'])})")
    return outside


def _text(tokenizer: Any, ids: list[int]) -> str:
    """As `inference.engine` makes text of ids: end tokens left out."""
    ends = {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    return tokenizer.decode([token for token in ids if token not in ends], skip_special_tokens=True, clean_up_tokenization_spaces=False)
