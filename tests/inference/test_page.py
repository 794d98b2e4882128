"""The page in a real Chromium, before a real server: asking, streaming, stopping, offline, tokens, hostile text, accessibility.

Screenshots for the docs: `make screenshots` (KIT_SCREENSHOTS names their folder, KIT_CHECKPOINT the model that answers).
"""

import contextlib
import json
import os
import re
from pathlib import Path

import httpx
import pytest

from benchmarks.serve_load import served
from emergency_kit.knowledge.cards import load_cards
from tests.inference.reciting import save_reciting_model
from tests.inference.serving import OIL, is_idle, serving, wait_for
from tests.tiny import save_tiny_model

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; make test installs it")
expect = playwright.expect
TOKEN = "correct-horse-battery"
PHONE, NARROW, DESKTOP = {"width": 390, "height": 844}, {"width": 320, "height": 640}, {"width": 1280, "height": 900}
WORDS = Path("emergency_kit/inference/page/words.js")
HOSTILE = """FACTS
• <img src=x onerror="document.title='pwned'"> a pan burns & <b>oil</b>.

UNCERTAINTIES
• Whether <script>document.title='pwned'</script> it spreads.

ANALYSIS
• [x](javascript:alert(1)) {{7*7}}

GUIDANCE
1. Turn off the heat if you can reach the control safely.
2. Pour water on the burning oil.
3. Cover the pan with a lid, baking shet or fire blanket.
4. Tell your <u>neighbours</u>."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_reciting_model(tmp_path_factory.mktemp("reciting"), {OIL: HOSTILE}, country="GB")


@pytest.fixture(scope="module")
def address(folder):
    with serving(folder, inference__max_new_tokens=300) as address:
        yield address


@contextlib.contextmanager
def opened(browser, address, size=DESKTOP, **options):
    """A page in a context of its own; anything asked of another host and any error of the page's scripts fails the test."""
    context = browser.new_context(viewport=size, locale=options.pop("locale", "en-GB"), **options)
    page = context.new_page()
    foreign, problems = [], []
    context.on("request", lambda request: foreign.append(request.url) if not request.url.startswith(address) else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" and "Failed to load resource" not in message.text else None)
    try:
        page.goto(address)
        yield page
        assert not foreign and not problems
    finally:
        context.close()


def ask(page, situation=OIL, region="GB"):
    """Ask and wait for the whole answer."""
    if region:
        page.locator("#region option").nth(50).wait_for(state="attached")
        page.select_option("#region", region)
    page.fill("#situation", situation)
    page.press("#situation", "Enter")
    expect(page.locator("#status")).to_have_text("The answer is complete.", timeout=300000)


def check_accessibility(page):
    """WCAG 2.2 A and AA and axe's best practices, all of its rules."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}).response
    assert len(found["passes"]) > 15
    assert not found["violations"], json.dumps([(item["id"], [node["html"][:150] for node in item["nodes"]]) for item in found["violations"]], indent=1)


def fits(page):
    """Whether nothing is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_asking_shows_checked_guidance_beside_the_models_words_and_injects_nothing(browser, address):
    with opened(browser, address) as page:
        ask(page)
        expect(page.locator("#cards h3")).to_have_text("Kitchen grease fire")
        expect(page.locator("#cards .steps > li")).to_have_count(5)
        call = page.locator("#numbers a").first
        assert (call.get_attribute("href"), call.inner_text()) == ("tel:999", "Fire: 999")
        page.locator("#cards summary").click()
        expect(page.locator("#cards .more")).to_contain_text("NFPA")
        written = page.locator("#sections")
        for line in ("<img src=x onerror=\"document.title='pwned'\"> a pan burns & <b>oil</b>.", "Whether <script>document.title='pwned'</script> it spreads.", "[x](javascript:alert(1)) {{7*7}}"):
            expect(written).to_contain_text(line)
        assert written.locator("img, script, b, a, u").count() == 0 and page.title() == "Emergency Kit"
        struck = written.locator("li.struck")
        expect(struck).to_have_count(1)
        expect(struck).to_contain_text("Do not pour water on burning oil.")
        assert struck.locator("s").inner_text() == "Pour water on the burning oil."
        expect(written.locator(".guidance li", has_text="The model's own words, on no card.")).to_have_text(["Tell your <u>neighbours</u>.The model's own words, on no card."])
        expect(written).to_contain_text("The model wrote: Cover the pan with a lid, baking shet or fire blanket.")
        expect(written.locator(".guidance li.added", has_text="Added from the checked card:")).to_have_count(3)


def test_hostile_reports_stay_text_everywhere(browser, address):
    hostile = "<img src=x onerror=\"document.title='pwned'\"> \"'><svg onload=alert(1)>\u202e the oil in my pan is on fire"
    with opened(browser, address) as page:
        ask(page, hostile)
        page.locator("#history summary").click()
        expect(page.locator("#history-list button")).to_contain_text("<svg onload=alert(1)>")
        page.reload()
        page.locator("#history summary").click()
        page.locator("#history-list button").click()
        expect(page.locator("#situation")).to_have_value(hostile)
        assert page.locator("#history img, #result img, main svg").count() == 0 and page.title() == "Emergency Kit"


def test_the_browser_itself_forbids_what_no_script_here_does(browser, address):
    context = browser.new_context()
    page = context.new_page()
    page.goto(address)
    with pytest.raises(playwright.Error, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<p>'")
    with pytest.raises(playwright.Error, match="Failed to fetch"):
        page.evaluate("fetch('http://127.0.0.2:9/')")
    context.close()


def test_wrong_token_then_right_then_streaming_and_stopping(browser, tmp_path):
    folder = save_tiny_model(tmp_path / "tiny")
    with serving(folder, token=TOKEN, inference__max_new_tokens=8000) as address, opened(browser, address, PHONE) as page:
        page.fill("#situation", OIL)
        page.get_by_role("button", name="Get guidance").click()
        expect(page.locator("#token-form")).to_be_visible()
        page.fill("#token", "wrong-token")
        page.get_by_role("button", name="Use this token").click()
        expect(page.locator("#token-text")).to_have_text("That token was refused. Check it and try again.")
        check_accessibility(page)
        page.fill("#token", TOKEN)
        page.press("#token", "Enter")
        expect(page.locator("#cards .card")).to_have_count(1)
        expect(page.locator("#sections")).to_have_attribute("aria-busy", "true")
        page.locator("#sections li").first.wait_for(timeout=20000)
        assert page.locator("#cards .card").is_visible() and page.get_by_role("button", name="Stop", exact=True).is_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#status")).to_have_text("Stopped. The answer is not whole.")
        written = page.locator("#sections").inner_text()
        wait_for(lambda: is_idle(address))
        assert page.locator("#sections").inner_text() == written and page.locator("#history").is_hidden()


def test_after_a_reload_with_no_server_cards_and_answers_are_there(browser, folder):
    server = contextlib.ExitStack()
    address = server.enter_context(serving(folder, inference__max_new_tokens=300))
    with server, opened(browser, address, PHONE) as page:
        ask(page)
        page.evaluate("navigator.serviceWorker.ready.then(() => null)")
        expect(page.locator("#card-list button")).to_have_count(len(load_cards()))
        server.close()
        with pytest.raises(httpx.ConnectError):
            httpx.get(address)
        page.reload()
        expect(page.get_by_role("heading", name="What is happening?")).to_be_visible()
        expect(page.locator("#numbers a").first).to_have_attribute("href", "tel:999")
        page.select_option("#region", "FR")
        expect(page.locator("#numbers a").first).to_have_attribute("href", "tel:112")
        expect(page.locator("#card-list button")).to_have_count(len(load_cards()))
        page.locator("#history summary").click()
        page.locator("#history-list button").click()
        expect(page.locator("#sections li.struck")).to_have_count(1)
        page.fill("#situation", "there is smoke and my pan of oil burns")
        page.press("#situation", "Enter")
        expect(page.locator("#status")).to_contain_text("No connection to the kit.")
        check_accessibility(page)
        page.locator("#choice-buttons button", has_text="Kitchen grease fire").click()
        expect(page.locator("#guidance")).to_be_focused()
        expect(page.locator("#cards .steps")).to_contain_text("Call 18 or 112 from outside.")
        expect(page.locator("#model")).to_be_hidden()
        page.locator("#all-cards summary").click()
        page.fill("#search", "snake")
        page.locator("#card-list button").first.click()
        expect(page.locator("#cards h3")).to_have_text("Snake bite")


def test_a_broken_connection_keeps_the_checked_guidance(browser, address):
    with opened(browser, address) as page:
        cards = httpx.post(f"{address}/answer", json={"situation": OIL, "stream": True}).text.split("\n\n")[0] + "\n\n"
        page.route("**/answer", lambda route: route.fulfill(status=200, content_type="text/event-stream", body=cards))
        page.fill("#situation", OIL)
        page.press("#situation", "Enter")
        expect(page.locator("#status")).to_contain_text("The connection to the kit broke off.")
        expect(page.locator("#cards .card")).to_have_count(1)


def test_long_text_is_bounded_counted_and_never_widens_a_narrow_page(browser, address):
    with opened(browser, address, NARROW) as page:
        page.locator("#situation").fill("a" * 3990)
        expect(page.locator("#left")).to_have_text("10 characters left")
        page.locator("#situation").press_sequentially("b" * 20)
        assert len(page.locator("#situation").input_value()) == 4000
        ask(page, "oil fire " + "w" * 600)
        assert fits(page)
        page.get_by_role("button", name="Large text").click()
        assert fits(page)
        page.locator("#history summary").click()
        page.locator("#all-cards summary").click()
        assert fits(page)


def test_one_tap_chooses_a_card_where_retrieval_is_unsure(browser, address):
    with opened(browser, address, PHONE) as page:
        ask(page, "there is water everywhere")
        expect(page.locator("#choices h2")).to_have_text("Is it one of these?")
        check_accessibility(page)
        name = page.locator("#choice-buttons button").nth(1).inner_text()
        page.locator("#choice-buttons button").nth(1).click()
        expect(page.locator("#fits")).to_have_text("From the card you chose.", timeout=30000)
        expect(page.locator("#cards h3")).to_have_text(name)


@pytest.mark.parametrize("size, options", [(PHONE, {"color_scheme": "light"}), (DESKTOP, {"color_scheme": "dark"}), (NARROW, {"color_scheme": "light", "forced_colors": "active"})],
                         ids=["phone-light", "desktop-dark", "narrow-forced"])
def test_axe_finds_nothing_at_any_width_and_theme(browser, address, size, options):
    with opened(browser, address, size, **options) as page:
        check_accessibility(page)
        ask(page)
        page.locator("#cards summary").click()
        page.locator("#sections summary").click()
        page.locator("#all-cards summary").click()
        check_accessibility(page)
        if "forced_colors" not in options:
            page.get_by_role("button", name="High contrast").click()
            page.get_by_role("button", name="Large text").click()
            expect(page.get_by_role("button", name="Large text")).to_have_attribute("aria-pressed", "true")
            check_accessibility(page)
            page.reload()
            expect(page.get_by_role("button", name="High contrast")).to_have_attribute("aria-pressed", "true")
        assert fits(page)


def test_everything_can_be_done_with_the_keyboard_alone(browser, address):
    with opened(browser, address) as page:
        page.locator("#region option").nth(50).wait_for(state="attached")
        page.keyboard.press("Tab")
        expect(page.locator(".skip")).to_be_focused()
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        if not page.evaluate("document.activeElement.id === 'situation'"):
            page.focus("#situation")
        page.keyboard.type(OIL)
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("at home")
        assert page.locator("#situation").input_value() == f"{OIL}\nat home"
        page.keyboard.press("Enter")
        expect(page.locator("#cards .card")).to_have_count(1)
        reached = set()
        for _ in range(40):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        assert {"speak", "SUMMARY", "language", "size", "contrast", "region", "situation", "go"} <= reached


def test_the_interface_speaks_three_languages_and_cards_stay_english(browser, address):
    for locale, question, answered in (("es-MX", "¿Qué está pasando?", "La respuesta está completa."), ("fr-CA", "Que se passe-t-il ?", "La réponse est complète."), ("de-DE", "What is happening?", "The answer is complete.")):
        with opened(browser, address, PHONE, locale=locale) as page:
            expect(page.locator("h1")).to_have_text(question)
            page.fill("#situation", OIL)
            page.press("#situation", "Enter")
            expect(page.locator("#status")).to_have_text(answered, timeout=60000)
            assert page.locator("html").get_attribute("lang") == locale[:2].replace("de", "en")
            assert page.locator("#cards").get_attribute("lang") == "en"
            expect(page.locator("#cards .steps")).to_contain_text("Turn off the heat")
            page.select_option("#language", "en")
            expect(page.locator("#status")).to_have_text("The answer is complete.")
            expect(page.locator("#guidance-title")).to_have_text("Checked guidance")


def test_every_language_has_every_word_with_the_same_places():
    text = WORDS.read_text(encoding="utf-8")
    blocks = re.split(r"const (?:EN|ES|FR) = \{", text)[1:]
    words = [dict(re.findall(r'(\w+): "((?:[^"\\]|\\.)*)"', block)) for block in blocks]
    assert len(words[0]) > 80 and words[0].keys() == words[1].keys() == words[2].keys()
    for key, value in words[0].items():
        places = set(re.findall(r"\{\w+\}", value))
        assert all(set(re.findall(r"\{\w+\}", other[key])) == places for other in words), key
    used = set(re.findall(r'data-t(?:-label)?="(\w+)"', Path("emergency_kit/inference/page/index.html").read_text(encoding="utf-8")))
    assert used <= words[0].keys()
    scripts = "".join(path.read_text(encoding="utf-8") for path in WORDS.parent.glob("*.js") if path != WORDS)
    unused = [key for key in words[0] if key not in used and not re.search(rf"[\"`.]{key}\b|\b{key}\b", scripts) and key not in ("nearTitle", "nearText", "unsureTitle", "unsureText")]
    assert not unused


def test_reading_aloud_speaks_the_checked_steps_in_order(browser, address):
    with opened(browser, address) as page:
        page.add_init_script("""
          window.spoken = []; let busy = false;
          Object.defineProperty(window, 'speechSynthesis', {value: {
            getVoices: () => [], cancel: () => { busy = false; }, speak: (said) => { busy = true; window.spoken.push([said.text, said.lang]); },
            get speaking() { return busy; }, get pending() { return false; }}});""")
        page.reload()
        ask(page)
        page.get_by_role("button", name="Read aloud").click()
        spoken = page.evaluate("window.spoken")
        card = load_cards()["kitchen_grease_fire"]
        assert spoken[0] == ["Kitchen grease fire.", "en"] and spoken[1][0] == f"1. {card.critical_actions[0].text}"
        assert [text for text, _ in spoken[-len(card.never):]] == [rule.text for rule in card.never] and "999 or 112" in str(spoken)
        page.get_by_role("button", name="Stop reading").click()
        expect(page.get_by_role("button", name="Read aloud")).to_be_visible()


def test_no_page_file_parses_html_and_the_worker_keeps_them_all():
    files = {path.name for path in WORDS.parent.iterdir()}
    worker = (WORDS.parent / "service_worker.js").read_text(encoding="utf-8")
    assert files - {"service_worker.js"} <= set(re.findall(r'"([\w.]+)"', worker))
    for path in WORDS.parent.glob("*.js"):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|DOMParser|https?://", path.read_text(encoding="utf-8")), path


def test_screenshots(browser, address, tmp_path):
    target = Path(os.environ.get("KIT_SCREENSHOTS") or tmp_path)
    with contextlib.ExitStack() as stack:
        if model := os.environ.get("KIT_CHECKPOINT"):
            address, _ = stack.enter_context(served(Path(model)))
        for name, size, scheme in (("phone", PHONE, "light"), ("phone-dark", PHONE, "dark"), ("desktop", DESKTOP, "light"), ("desktop-dark", DESKTOP, "dark")):
            with opened(browser, address, size, color_scheme=scheme) as page:
                ask(page)
                page.screenshot(path=target / f"page-{name}.png")
                assert 5000 < (target / f"page-{name}.png").stat().st_size < 250_000
