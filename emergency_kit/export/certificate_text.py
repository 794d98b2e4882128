"""A parity certificate in words: two lines for the console, a page of Markdown to keep beside the file."""

from __future__ import annotations

from typing import Any


def summarise(proof: dict[str, Any], seconds: float) -> str:
    """The console's lines."""
    numbers, greedy, tokens = proof["distributions"], proof["greedy"], proof["tokenizer"]
    same = f", {greedy['same']} of {greedy['prompts']} greedy answers the same" if greedy["same"] is not None else ""
    lines = [f"  llama.cpp: {tokens['equal']} of {tokens['strings']} strings split into the same tokens, {proof['template']['equal']} of "
             f"{proof['template']['chats']} chats rendered alike",
             f"  against the merged model at {numbers['answer_tokens']} held-out answer tokens: mean KL {numbers['mean_kl']:.2g}, "
             f"top-1 {numbers['top1_percent']:.4g} %{same}", f"  {_safety_line(proof)}; compared in {seconds:.0f} s"]
    lines += [f"  OUT OF BOUNDS, kept as told: {problem}" for problem in proof["outside"]]
    return "\n".join(lines)


def render(proof: dict[str, Any]) -> str:
    """The page."""
    numbers, greedy, tokens, bounds = proof["distributions"], proof["greedy"], proof["tokenizer"], proof["bounds"]
    file, reference = proof["safety"]["file"], proof["safety"]["reference"]
    verdict = "within its bounds" if not proof["outside"] else "**OUT OF ITS BOUNDS**, kept because the export was told to: " + "; ".join(proof["outside"])

    def pair(key: str, unit: str = "") -> str:
        return f"{file[key]}{unit}" + (f" (merged model: {reference[key]}{unit})" if reference is not None else " (merged model: not measured)")

    same = "not measured: the merged model does not fit into memory whole"
    if greedy["same"] is not None:
        same = f"{greedy['same']} of {greedy['prompts']} the same; on average the first {greedy['same_beginning_percent']} % of the text is"
    composed = f"; {tokens['composed_before']} of them only once their accents are composed (NFC), which llama.cpp leaves to its caller" if tokens["composed_before"] else ""
    rows = [
        ("tokens of test strings", f"{tokens['equal']} of {tokens['strings']} equal{composed}", "all"),
        ("chat template", f"{proof['template']['equal']} of {proof['template']['chats']} chats rendered alike", "all"),
        ("answer tokens compared", f"{numbers['answer_tokens']} in {numbers['records']} records ({numbers['data']})", ""),
        ("mean KL divergence, nats", f"{numbers['mean_kl']:.3g} (median {numbers['median_kl']:.2g}, 99th percentile {numbers['p99_kl']:.2g}, largest {numbers['max_kl']:.2g})",
         f"at most {bounds['max_mean_kl']:g}"),
        ("top-1 agreement", f"{numbers['top1_percent']:.4g} %", f"at least {bounds['min_top1_percent']:g} %"),
        ("perplexity of these answers", f"{numbers['perplexity']:.4f} (merged model: {numbers['reference_perplexity']:.4f})", ""),
        ("greedy answers", same, ""),
        ("critical actions given", f"{pair('given')} of {file['actions']}, {pair('recall_percent', ' %')}", f"at most {bounds['max_recall_loss_points']:g} points fewer"),
        ("never-rules broken", pair("broken_rules"), f"at most {bounds['max_more_broken_rules']} more, both together"),
        ("help forbidden", pair("dangerous_prohibitions"), ""),
        ("answers with all four sections", f"{pair('valid_structure')} of {file['answers']}", ""),
    ]
    fallbacks = ", ".join(f"{number} tensors as {name}" for name, number in proof["fallbacks"].items()) or "none"
    return "\n".join([
        f"# Parity certificate: {proof['file']}", "", f"{proof['quantization']}, {proof['bytes'] / 1e6:.1f} MB, sha256 `{proof['sha256']}`: {verdict}.", "",
        f"Run in {proof['llama_cpp']}, compared with the {proof['reference']}. Rows that the type cannot pack: {fallbacks}.", "",
        "| what | found | bound |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows), "",
        *(f"- The file's {' '.join(line.split())}" for line in file["found"]), *([""] if file["found"] else []),
        f"The answers themselves are in `{proof['file'].removesuffix('.gguf')}.certificate.json`.", ""])


def _safety_line(proof: dict[str, Any]) -> str:
    file, reference = proof["safety"]["file"], proof["safety"]["reference"]
    text = f"{file['answers']} answers give {file['given']} of {file['actions']} critical actions and break {file['broken_rules']} never-rules"
    return text + (f" (merged model: {reference['given']} and {reference['broken_rules']})" if reference is not None else "")
