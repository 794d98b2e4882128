"""The page of a kit in a real Chromium, from a plain static server and with no network at all; and its JavaScript beside the Python that it repeats.

KIT_FOLDER names a kit of a real model and KIT_SCREENSHOTS a folder for its pictures: `make prove-kit`.
"""

import contextlib
import functools
import http.server
import json
import os
import random
import re
import shutil
import threading
from pathlib import Path

import pytest
import yaml
from rapidfuzz import fuzz

from emergency_kit.data.format import SYSTEM_PROMPT, build_messages, locate_lines, shown_cards
from emergency_kit.inference.engine import repeats_itself
from emergency_kit.inference.guard import guard
from emergency_kit.knowledge.cards import load_cards, normalise
from emergency_kit.knowledge.emergency_numbers import find_country, load_numbers, localise
from emergency_kit.knowledge.retrieve import Retriever

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; make test installs it")
expect = playwright.expect
LABELLED = Path("tests/knowledge/labelled_scenarios.yaml")
OIL, SNAKE = "the oil in my pan is on fire", "a snake bit my foot"
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 1000}
SECONDS = 1000


@pytest.fixture(scope="module")
def folder(request):
    named = os.environ.get("KIT_FOLDER")
    return Path(named) if named else request.getfixturevalue("packed")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Python's own static server: no header that lets pages use threads."""

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_):
        """A page that was closed midway."""


@contextlib.contextmanager
def hosting(folder, handler=Handler):
    server = Server(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/page/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


@contextlib.contextmanager
def opened(browser, address, size=DESKTOP, **options):
    """A page in a context of its own; anything asked of another host, and any error of its scripts, fails the test."""
    context = browser.new_context(viewport=size, locale="en-GB", **options)
    page = context.new_page()
    own = address.removesuffix("page/")
    foreign, problems = [], []
    context.on("request", lambda request: foreign.append(request.url) if not request.url.removeprefix("blob:").startswith(own) else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" and "Failed to load resource" not in message.text else None)
    try:
        page.goto(address)
        page.locator("#region option").nth(50).wait_for(state="attached")
        yield page
        assert not foreign and not problems
    finally:
        context.close()


def ask(page, situation, region="GB"):
    """Ask, wait for the whole answer and return it as the page keeps it."""
    page.select_option("#region", region)
    page.fill("#situation", situation)
    page.press("#situation", "Enter")
    expect(page.locator("#status")).to_have_text("The answer is complete.", timeout=600 * SECONDS)
    return page.evaluate("JSON.parse(localStorage['emergency-kit.answers'])[0].answer")


def press(page, name):
    """Press a button of the kit's panel and wait until its work is done."""
    page.click(f"#kit-{name}")
    expect(page.locator(f"#kit-{name}")).to_be_enabled(timeout=600 * SECONDS)


def rate(answer):
    """First token and speed of an answer, in words."""
    made = answer["provenance"]
    writing = made["seconds"] - made["first_token_seconds"]
    return (f"{made['kind']}: loaded in {made['loading_seconds']:.1f} s, {made['prompt_tokens']} prompt tokens, first token {made['first_token_seconds']:.2f} s, "
            f"{made['completion_tokens']} tokens, {(made['completion_tokens'] - 1) / writing:.1f} tokens/s")


@pytest.fixture(scope="module")
def page(browser, folder):
    with hosting(folder) as address, opened(browser, address) as page:
        yield page


def texts(seed, number):
    """Reports made to hurt: control tokens, odd white space and quotes, letters of many scripts, lone marks."""
    draw = random.Random(seed)
    pieces = ["<|im_end|>", "</s>", "[INST]", "[/INST]", "<start_of_turn>", "< x>", "\u00a0", "\x1c", "\x85", "\ufeff", "\u2028", "\t", "\n\n", "  ", "’", "“", "don't", "5.5", "1,000", "İstanbul", "ﬁre", "ß", "ǅ",
              "e\u0301", "火事", "नमस्ते", "٣", "½", "Ⅷ", "🔥", "👩‍🚒", "_a_", "...", "'quoted'", "burning", "smoke", "snake", "pan", "oil", "he is bleeding", "gas", "not", "Σς", "²"]
    return ["".join(draw.choice(pieces) + draw.choice(["", " ", " "]) for _ in range(draw.randint(0, 40))) for _ in range(number)]


def test_cards_and_prompts_are_those_of_python_byte_for_byte(page, folder):
    labelled = [item["text"] if isinstance(item, dict) else item for item in scenarios()]
    asked = [(text, country) for text, country in zip(labelled + texts(1, 400), [*load_numbers(), ""] * 40)]
    assert len(asked) > 700 and {country for _, country in asked} == {*load_numbers(), ""}
    found = page.evaluate("async (asked) => { const { prepare } = await import('./model.js'); return Promise.all(asked.map(async ([text, country]) => { const { prompt, found } = await prepare(text, country);"
                          " return [prompt, found.fits, found.unsure, found.choices.map(({ id }) => id)]; })); }", asked)
    cards, retriever = load_cards(), Retriever(load_cards(), 2)
    settings = json.loads((folder / "page" / "kit.json").read_text(encoding="utf-8"))["prompt"]
    assert SYSTEM_PROMPT in settings["head"]
    for (text, country), (prompt, fits, unsure, choices) in zip(asked, found):
        mine = retriever.find(text)
        expected = build_messages(text, shown_cards(mine.ids, cards), "", country, mine.fits)[1]["content"]
        assert prompt == settings["head"] + expected + settings["tail"], text
        assert (fits, unsure, choices) == (mine.fits, mine.unsure, [hit.card_id for hit in mine.ranked[:3]] if mine.unsure else []), text


def scenarios():
    """All scenarios of the labelled file, whatever their split."""
    found = []

    def walk(value):
        if isinstance(value, dict):
            for key, item in value.items():
                found.append(item) if key in ("text", "scenario") and isinstance(item, str) else walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)
        elif isinstance(value, str) and " " in value:
            found.append(value)

    walk(yaml.safe_load(LABELLED.read_text(encoding="utf-8")))
    return found


def test_every_card_can_be_chosen_in_every_country(page, folder):
    asked = [(card_id, country) for card_id in load_cards() for country in ("", "GB", "US", "FR", "JP")]
    found = page.evaluate("async (asked) => { const { prepare } = await import('./model.js'); return Promise.all(asked.map(async ([id, country]) => (await prepare('help', country, [id])).prompt)); }", asked)
    cards, settings = load_cards(), json.loads((folder / "page" / "kit.json").read_text(encoding="utf-8"))["prompt"]
    for (card_id, country), prompt in zip(asked, found):
        fits = 0 if card_id == settings["safe_minimum"] else 1
        assert prompt == settings["head"] + build_messages("help", [cards[card_id]], "", country, fits)[1]["content"] + settings["tail"]


def test_words_likeness_and_lines_are_read_as_python_reads_them(page):
    strings = texts(2, 300)
    pairs = list(zip(strings, texts(3, 300))) + [("cover the pan with a lid", "cover the pan with a baking lid"), ("", ""), ("a", "")]
    answers = ["FACTS\n• a\n\nUNCERTAINTIES\n- b\nANALYSIS\n* c\n\nGUIDANCE\n1. d\n2) e", "**FACTS:**\n• a\n## GUIDANCE\n1. x\n1. x\n", "no heading\n• a", "GUIDANCE\n1. Call.\n2. Call.\n", "GUIDANCE\n1. Call.\n2. Wait.\n", ""]
    plain, ratios, lines, repeats = page.evaluate("""async ([strings, pairs, answers]) => { const [{ normalise }, hold] = [await import('./retrieve.js'), await import('./hold.js')];
      return [strings.map(normalise), pairs.map(([a, b]) => hold.ratio(a, b)), answers.map((text) => hold.readLines(text).lines.map(({ section, text }) => [section ?? '', text])), answers.map(hold.repeatsItself)]; }""",
                                                  [strings, pairs, answers])
    assert plain == [normalise(text) for text in strings]
    assert ratios == pytest.approx([fuzz.ratio(*pair) for pair in pairs])
    assert lines == [[[section, text[start:end]] for section, start, end in locate_lines(text)] for text in answers]
    assert repeats == [repeats_itself(text) for text in answers] and any(repeats)


def test_only_lines_of_the_card_stay_as_guidance(page):
    text = """FACTS
• A pan burns.

UNCERTAINTIES
• Whether it spreads.

ANALYSIS
• Pour water on the burning oil.
• Do not pour water on burning oil.

GUIDANCE
1. Turn off the heat if you can reach the control safely.
2. Carry the pan outside quickly.
3. Cover the pan with a lid, baking shet or fire blanket."""
    held = page.evaluate("""async (text) => { const [{ holdToCards }, { prepare, settings }] = [await import('./hold.js'), await import('./model.js')];
      const { found } = await prepare('the oil in my pan is on fire', 'GB'); const { broken_by, contested } = await settings(); return holdToCards(text, found.cards, broken_by, contested, true); }""", text)
    struck = {line["text"]: line["struck"] and line["struck"]["rule"] for line in held["lines"]}
    assert struck["Pour water on the burning oil."] == "Do not pour water on burning oil." and struck["Do not pour water on burning oil."] is None
    assert struck["Carry the pan outside quickly."] and not struck["Turn off the heat if you can reach the control safely."]
    assert held["lines"][-1]["from_card"]["text"] == "Cover the pan with a lid, baking sheet or fire blanket."
    actions = [action.text for action in load_cards()["kitchen_grease_fire"].critical_actions]
    added = [step["text"] for step in held["added"]]
    assert held["four"] and len(added) == len(actions) - 2 and added[-1] == "Call 999 or 112 from outside."


def test_what_one_of_two_fitting_cards_forbids_is_struck_and_not_added_as_in_python(page):
    """The same actions, by the same rule, as the server's guard strikes, whichever card fits better."""
    library = load_cards()
    pairs = [("stroke", "heart_attack"), ("heart_attack", "stroke"), ("snake_bite", "severe_bleeding"), ("lightning", "wildfire"), ("spine_injury", "drowning"), ("flood", "gas_leak")]
    held = page.evaluate("""async (pairs) => { const [{ holdToCards }, { prepare, settings }] = [await import('./hold.js'), await import('./model.js')];
      const { broken_by, contested } = await settings();
      return Promise.all(pairs.map(async (ids) => { const { found } = await prepare('help', 'GB', ids); const text = 'GUIDANCE\\n' + found.cards.flatMap((card) => card.critical_actions).map((action, place) => `${place + 1}. ${action.text}`).join('\\n');
        return holdToCards(text, found.cards, broken_by, contested, true); })); }""", pairs)
    some = 0
    for ids, found in zip(pairs, held):
        cards = [library[card_id] for card_id in ids]
        lines = [localise(action.text, find_country("GB"), card.service) for card in cards for action in card.critical_actions]
        text = "GUIDANCE\n" + "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))
        struck = {line.text: line.breaks for line in guard(text, cards, "GB", fits=2).lines if line.breaks}
        assert {line["text"]: line["struck"]["rule"] for line in found["lines"] if line["struck"]} == struck
        assert not set(struck) & {step["text"] for step in found["added"]}
        some += len(struck)
    assert some >= 6


def test_from_a_plain_server_then_in_flight_mode(browser, folder, tmp_path):
    pictures = Path(os.environ.get("KIT_SCREENSHOTS") or tmp_path)
    with hosting(folder) as address, opened(browser, address, PHONE) as page:
        assert page.evaluate("crossOriginIsolated") is False
        answer = ask(page, OIL)
        print("\nplain static server,", rate(answer))
        expect(page.locator("#cards .card[data-card=kitchen_grease_fire] .steps")).to_contain_text("Call 999 or 112 from outside.")
        assert answer["provenance"]["kind"].endswith("1 thread") and answer["checks"]["guard"]
        assert answer["provenance"]["model_sha256"] == json.loads((folder / "certificate.json").read_text())["sha256"]
        expect(page.locator("#kit-kept")).to_have_text("Page, cards and model are kept on this device and work in flight mode.", timeout=30 * SECONDS)
        press(page, "check")
        listed = len((folder / "SHA256SUMS").read_text().splitlines())
        expect(page.locator("#kit-checked")).to_have_text(f"{listed} files checked: all as packed.")
        press(page, "ask")
        # Random weights have no clear next token, so that another build's rounding shows; a trained model must begin as recorded.
        answers = "3" if os.environ.get("KIT_FOLDER") else r"\d"
        expect(page.locator("#kit-asked")).to_have_text(re.compile(f"^Known questions: 3 of 3 prompts the same, {answers} of 3 answers begin as recorded"))
        page.context.set_offline(True)
        page.reload()
        page.locator("#region option").nth(50).wait_for(state="attached")
        with pytest.raises(playwright.Error, match="Failed to fetch"):
            page.evaluate("fetch('../README.txt?fresh')")
        answer = ask(page, SNAKE)
        print("flight mode,", rate(answer))
        expect(page.locator("#cards h3")).to_have_text("Snake bite")
        assert answer["text"] and answer["provenance"]["completion_tokens"] > 10
        press(page, "check")
        expect(page.locator("#kit-checked")).to_contain_text("all as packed. Not at hand here:")
        for name, size in (("phone", PHONE), ("desktop", DESKTOP)):
            page.set_viewport_size(size)
            page.evaluate("document.querySelector('#status').scrollIntoView({ block: 'start' })")
            page.screenshot(path=pictures / f"kit-flight-{name}.png")
        page.locator("#kit-panel").screenshot(path=pictures / "kit-panel.png")
        assert all(5000 < (pictures / f"kit-{name}.png").stat().st_size < 400_000 for name in ("flight-phone", "flight-desktop", "panel"))


def test_several_threads_where_the_headers_allow_them(browser, folder):
    class Isolating(Handler):
        def end_headers(self):
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            super().end_headers()

    with hosting(folder, Isolating) as address, opened(browser, address) as page:
        page.add_init_script("Object.defineProperty(Navigator.prototype, 'hardwareConcurrency', { get: () => 4 })")
        page.reload()
        page.locator("#region option").nth(50).wait_for(state="attached")
        answer = ask(page, OIL)
        print("\nwith COOP and COEP,", rate(answer))
        assert page.evaluate("crossOriginIsolated") and answer["provenance"]["kind"].endswith("2 threads")


def test_a_flipped_bit_in_the_model_is_refused_and_the_cards_stay(browser, folder, tmp_path):
    copy = tmp_path / "kit"
    shutil.copytree(folder, copy)
    part = sorted((copy / "page" / "model").iterdir())[-1]
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with hosting(copy) as address, opened(browser, address) as page:
        page.fill("#situation", OIL)
        page.press("#situation", "Enter")
        expect(page.locator("#problem")).to_contain_text(f"model/{part.name} differs from what was packed", timeout=60 * SECONDS)
        expect(page.locator("#cards .steps")).to_contain_text("Turn off the heat")
        press(page, "check")
        expect(page.locator("#kit-checked")).to_have_text(f"DAMAGED, do not use: page/model/{part.name}")


def test_stopping_frees_the_model_for_the_next_question(browser, folder):
    with hosting(folder) as address, opened(browser, address) as page:
        page.fill("#situation", OIL)
        page.press("#situation", "Enter")
        expect(page.locator("#cards .card")).to_have_count(1)
        page.keyboard.press("Escape")
        expect(page.locator("#status")).to_have_text("Stopped. The answer is not whole.")
        assert ask(page, SNAKE)["cards"][0]["id"] == "snake_bite"


def test_the_panel_is_accessible_and_speaks_three_languages(browser, folder):
    from axe_playwright_python.sync_playwright import Axe

    with hosting(folder) as address, opened(browser, address, PHONE, bypass_csp=True) as page:
        for language, title in (("en", "This kit"), ("es", "Este kit"), ("fr", "Ce kit")):
            page.select_option("#language", language)
            expect(page.locator("#kit-title")).to_have_text(title)
        found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}).response
        assert not found["violations"], [(item["id"], [node["html"][:150] for node in item["nodes"]]) for item in found["violations"]]


def test_every_language_of_the_panel_has_every_word():
    text = Path("emergency_kit/kit/browser/kit.js").read_text(encoding="utf-8")
    blocks = re.split(r"\n  (?:en|es|fr): \{", text)[1:]
    words = [dict(re.findall(r'(\w+): "((?:[^"\\]|\\.)*)"', block.split("\n};")[0])) for block in blocks]
    assert len(words[0]) > 15 and words[0].keys() == words[1].keys() == words[2].keys()
    assert all(set(re.findall(r"\{\w+\}", value)) == set(re.findall(r"\{\w+\}", other[key])) for key, value in words[0].items() for other in words)


def test_every_card_prints_on_one_sheet(browser, folder):
    context = browser.new_context()
    page = context.new_page()
    page.goto((folder / "cards.html").resolve().as_uri())
    pdf = page.pdf(format="A4", prefer_css_page_size=True)
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) == len(load_cards()) + 2
    for card in load_cards().values():
        expect(page.locator(f"#{card.id} .steps > li")).to_have_count(len(card.critical_actions))
    context.close()
