"""Page: the static page that answers in a browser alone, and what it needs to find cards and build prompts as Python does.

In: cards, retrieval's numbers, the engine of the packed model. Out: the folder page/ of a kit: the files of `inference/page`, those of
`kit/browser` in front of them, cards.json, retrieval/, kit.json, the engine and the model in parts. No file asks another host.
Limits: retrieval's numbers are by far the largest file beside model and engine; they are those of `knowledge/index.py`, bit for bit, so that the page finds what Python finds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emergency_kit import __version__
from emergency_kit.artifacts import hash_file, hash_json
from emergency_kit.config import Config
from emergency_kit.data.format import SAFE_HEADING, SYSTEM_PROMPT, build_messages
from emergency_kit.errors import ExportError
from emergency_kit.files import write_bytes
from emergency_kit.inference.answer import build_knowledge
from emergency_kit.inference.grammar import build_gbnf
from emergency_kit.inference.guard import list_contested
from emergency_kit.inference.llama_engine import CONTEXT_TOKENS, LlamaEngine
from emergency_kit.kit.known import prompt_text
from emergency_kit.knowledge import index, retrieve
from emergency_kit.knowledge.cards import SAFE_MINIMUM, card_digest, load_cards

PAGE, BROWSER = Path(__file__).parent.parent / "inference" / "page", Path(__file__).parent / "browser"
POLICY = ("default-src 'none'; script-src 'self' 'wasm-unsafe-eval' blob:; worker-src 'self' blob:; style-src 'self'; img-src 'self'; connect-src 'self' blob:; "
          "manifest-src 'self'; base-uri 'none'; form-action 'none'")
FEATURES, NUMBERS = "retrieval/features.txt", "retrieval/numbers.bin"


def save_page(folder: Path, country: str) -> None:
    """The page with its cards, without a model: `kit.json` comes with `save_settings`."""
    folder.mkdir(parents=True)
    for path in (*sorted(PAGE.iterdir()), *sorted(BROWSER.iterdir())):
        (folder / path.name).write_bytes(path.read_bytes())
    document = (folder / "index.html").read_text(encoding="utf-8")
    head = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<script type="module" src="kit.js"></script>\n</head>'
    assert document.count("</head>") == 1
    (folder / "index.html").write_text(document.replace("</head>", head), encoding="utf-8")
    (folder / "cards.json").write_text(build_knowledge(load_cards(), country).model_dump_json(), encoding="utf-8")
    save_retrieval(folder)


def save_retrieval(folder: Path) -> None:
    """Retrieval's fitted model as two files that JavaScript reads, and `load_retrieval` too."""
    fitted = index.load_index(load_cards())
    (folder / "retrieval").mkdir()
    write_bytes(folder / FEATURES, "\n".join(fitted.features).encode())
    write_bytes(folder / NUMBERS, fitted.idf.astype("<f4").tobytes() + fitted.weights.astype("<f2").tobytes())


def load_retrieval(folder: Path) -> index.Index:
    """What `save_retrieval` wrote."""
    import numpy

    settings = json.loads((folder / "kit.json").read_text(encoding="utf-8"))["retrieval"]
    features = (folder / FEATURES).read_text(encoding="utf-8").split("\n")
    idf, weights = numpy.fromfile(folder / NUMBERS, "<f4", len(features)), numpy.fromfile(folder / NUMBERS, "<f2", offset=4 * len(features))
    return index.Index(tuple(settings["card_ids"]), {name: place for place, name in enumerate(features)}, idf, weights.reshape(len(features), -1))


def build_settings(config: Config, engine: LlamaEngine | None, model: dict[str, Any] | None, self_test: dict[str, Any] | None) -> dict[str, Any]:
    """kit.json. model: name, sha256 and parts of the packed file; None for a kit of cards alone.

    Raises ExportError where the model's chat template does more than wrap the user's text.
    """
    cards = load_cards()
    fitted = index.load_index(cards)
    head, tail = find_wrap(engine) if engine else ("", "")
    return {
        "kit_version": __version__, "cards_sha256": card_digest(cards), "self_test": self_test,
        "prompt": {"head": head, "tail": tail, "safe_minimum": SAFE_MINIMUM, "safe_heading": SAFE_HEADING, "grounded": config.dataset.grounding == "cards"},
        "model": model and {**model, "context_tokens": CONTEXT_TOKENS, "max_new_tokens": min(config.inference.max_new_tokens, CONTEXT_TOKENS // 2),
                            "grammar": build_gbnf() if config.inference.grammar else ""},
        "contested": list_contested(cards),
        "broken_by": {card.id: [[rule.text, list(rule.broken_by)] for rule in card.never] for card in cards.values()},
        "retrieval": {
            "card_ids": list(fitted.card_ids), "categories": {card.id: card.category for card in cards.values()}, "top_k": config.dataset.top_k,
            "applies": retrieve.APPLIES, "unsure_applies": retrieve.UNSURE_APPLIES, "unsure_margin": retrieve.UNSURE_MARGIN, "second_score": retrieve.SECOND_SCORE,
            "window_words": retrieve.WINDOW_WORDS, "window_share": retrieve.WINDOW_SHARE, "stopwords": sorted(index.STOPWORDS), "piece_letters": list(index.PIECE_LETTERS)}}


def find_wrap(engine: LlamaEngine) -> tuple[str, str]:
    """What the model's chat template puts before and behind the user's text, the system prompt within the first."""
    rendered, asked = [], []
    for text in ("first mark", "CARD: second\n\nmark {{ 1 }} <b> \u2019"):
        messages = build_messages(text, None)
        asked.append(messages[1]["content"])
        rendered.append(prompt_text(engine, messages))
    head, mark, tail = rendered[0].partition(asked[0])
    if not mark or SYSTEM_PROMPT not in head or rendered[1] != head + asked[1] + tail:
        raise ExportError("the model's chat template does more than wrap system prompt and report, so that the page cannot build its prompts; serve the GGUF file with make serve")
    return head, tail


def save_settings(folder: Path, settings: dict[str, Any]) -> None:
    """kit.json."""
    (folder / "kit.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")


def save_worker(folder: Path) -> None:
    """The service worker with the list of what it keeps and a version that changes with any of it; call it last."""
    kept = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "service_worker.js" and "model" != path.parent.name]
    names = [path.relative_to(folder).as_posix() for path in kept]
    version = hash_json([[name, hash_file(path)] for name, path in zip(names, kept)])[:16]
    text = (BROWSER / "service_worker.js").read_text(encoding="utf-8")
    (folder / "service_worker.js").write_text(text.replace('"@VERSION@"', json.dumps(version)).replace('"@FILES@"', json.dumps(["./", *names])), encoding="utf-8")
