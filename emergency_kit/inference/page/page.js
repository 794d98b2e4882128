// The page: takes a report, shows the checked cards at once and the model's lines as they come, and keeps both for later.

import { Kit, NeedsToken, Refused, Unreachable } from "./model.js";
import { filterCards, findCards } from "./finder.js";
import { canSpeak, isSpeaking, speak, stopSpeaking } from "./speech.js";
import { answers, forgetAnswers, keepAnswer, read, write } from "./store.js";
import { checksOf, el, sentencesOf, showCards, showLines, showNumbers } from "./view.js";
import { pickLanguage, translator } from "./words.js";

const $ = (id) => document.getElementById(id);
const WARN_LEFT = 200;
const kit = new Kit();
kit.token = read("token", "");
const user = read("user", "") || crypto.getRandomValues(new Uint32Array(2)).join("-");
write("user", user);

let t = translator("en");
let knowledge = { cards: [], countries: [], country: "" };
let running = null; // the AbortController of the answer being written
let shown = null; // what stands in the result: {situation, found, lines, added, answer, chosen}
let status = null; // [key, values] of the status line, so that a change of language changes it too

function applyLanguage(language) {
  t = translator(language);
  document.documentElement.lang = language;
  document.title = t("name");
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
  for (const node of document.querySelectorAll("[data-t-label]")) node.setAttribute("aria-label", t(node.dataset.tLabel));
  $("language").value = language;
  fillRegions();
  showSpeak();
  say(...(status ?? [""]));
  if (shown) showResult();
  showHistory();
  showCardList();
  countLeft();
}

function say(key, values) {
  status = key ? [key, values] : null;
  $("status").textContent = key ? t(key, values) : "";
}

function complain(text) {
  $("problem").hidden = !text;
  $("problem").textContent = text ?? "";
}

function fillRegions() {
  const names = new Intl.DisplayNames([document.documentElement.lang], { type: "region" });
  const options = knowledge.countries.map(({ code }) => [code, names.of(code)]).sort((a, b) => a[1].localeCompare(b[1], document.documentElement.lang));
  const wanted = read("region", knowledge.country);
  $("region").replaceChildren(el("option", { value: "" }, t("chooseRegion")), ...options.map(([code, name]) => el("option", { value: code }, name)));
  $("region").value = knowledge.countries.some(({ code }) => code === wanted) ? wanted : "";
  showCall();
}

function showCall() {
  const country = knowledge.countries.find(({ code }) => code === $("region").value);
  showNumbers($("numbers"), country, shown?.found?.emergency?.service, t);
}

function showResult() {
  const { found, lines, added, answer, chosen, offline } = shown;
  $("result").hidden = false;
  $("fits").textContent = t(chosen ? "chosen" : found.fits === 0 ? "fitsNone" : found.cards.length > found.fits ? "fitsNear" : "fitsOne");
  showCards($("cards"), found.cards, t);
  $("model").hidden = Boolean(offline);
  showLines($("sections"), lines, added, t, running !== null);
  if (answer) $("sections").append(checksOf(answer, t));
  showChoices(offline || chosen ? [] : found.choices, "unsure");
  showSpeak();
  showCall();
}

function showChoices(choices, kind) {
  $("choices").hidden = choices.length === 0;
  $("choices-title").textContent = t(`${kind}Title`);
  $("choices").querySelector("p").textContent = t(`${kind}Text`);
  const none = kind === "unsure" && choices.length ? [el("button", { type: "button", class: "plain", lang: document.documentElement.lang, on: () => choose("safe_minimum") }, t("noneOfThese"))] : [];
  $("choice-buttons").replaceChildren(...choices.map(({ id, name }) => el("button", { type: "button", class: "plain", on: () => choose(id) }, name)), ...none);
}

function choose(id) {
  const card = knowledge.cards.find((candidate) => candidate.id === id);
  if (shown?.offline || !shown) openCard(card);
  else ask(shown.situation, [id]);
}

// A card alone, with no model's answer beside it.
function openCard(card) {
  running?.abort();
  shown = { situation: "", found: { cards: [localised(card)], fits: 1, choices: [], emergency: { service: card.service } }, lines: [], added: [], answer: null, chosen: true, offline: true };
  showResult();
  $("guidance").tabIndex = -1;
  $("guidance").focus();
}

// Kept cards say "your local emergency number"; where the region is known and has one number for all, they name it as the server does.
function localised(card) {
  const country = knowledge.countries.find(({ code }) => code === $("region").value);
  if (!country) return card;
  const shared = country.ambulance.filter((number) => country.fire.includes(number) && country.police.includes(number));
  const any = shared.length ? shared.join(" or ") : `${country.ambulance[0]} (ambulance), ${country.fire[0]} (fire) or ${country.police[0]} (police)`;
  const number = card.service === "any" ? any : country[card.service].join(" or ");
  const put = (text) => text?.replaceAll("your local emergency number", number);
  return { ...card, critical_actions: card.critical_actions.map((action) => ({ ...action, text: put(action.text), instead: put(action.instead) })) };
}

async function ask(situation, cards = []) {
  running?.abort();
  const own = (running = new AbortController());
  stopSpeaking();
  complain(null);
  $("token-form").hidden = true;
  $("stop").hidden = false;
  $("sections").setAttribute("aria-busy", "true");
  shown = null;
  $("result").hidden = true;
  showChoices([], "unsure");
  say("looking");
  try {
    for await (const { name, data } of kit.ask({ situation, country: $("region").value, cards, user }, own.signal)) {
      if (own !== running) return;
      take(name, data, situation, cards.length > 0);
    }
    say("done");
  } catch (error) {
    if (own !== running) return;
    explain(error, situation, cards);
  } finally {
    if (own === running) {
      running = null;
      $("stop").hidden = true;
      $("sections").setAttribute("aria-busy", "false");
      if (shown) showResult();
    }
  }
}

function take(name, data, situation, chosen) {
  if (name === "cards") {
    shown = { situation, found: data, lines: [], added: [], answer: null, chosen, offline: false };
    say("writing");
    showResult();
    $("situation").blur(); // a phone's keyboard would hide the guidance
    $("status").scrollIntoView({ block: "start" });
  } else if (name === "waiting") {
    say("waiting", { count: data.waiting });
  } else if (name === "line") {
    if (!shown.lines.length) say("writing");
    shown.lines.push(data);
    showLines($("sections"), shown.lines, [], t, true);
  } else if (name === "done") {
    const { cards, fits, unsure, choices, emergency } = data;
    shown = { ...shown, found: { cards, fits, unsure, choices, emergency }, lines: data.lines, added: data.added, answer: data };
    keepAnswer({ when: Date.now(), situation, chosen, answer: data });
    showHistory();
  }
}

function explain(error, situation, cards) {
  if (error.name === "AbortError") {
    say("stopped");
  } else if (error instanceof NeedsToken) {
    say("");
    $("token-form").hidden = false;
    $("token-text").textContent = t(kit.token ? "tokenWrong" : "tokenText");
    $("token-form").onsubmit = (event) => {
      event.preventDefault();
      kit.token = $("token").value.trim();
      write("token", kit.token);
      $("token").value = "";
      loadKnowledge();
      ask(situation, cards);
    };
    $("token").focus();
  } else if (error instanceof Unreachable) {
    if (shown) {
      say("brokeOff");
      return;
    }
    say(knowledge.cards.length ? "offline" : "offlineNothing");
    const near = cards.length ? knowledge.cards.filter(({ id }) => cards.includes(id)) : findCards(knowledge.cards, situation);
    showChoices(near, "near");
  } else if (error instanceof Refused) {
    say("");
    complain(t("refused", { message: error.message }));
  } else {
    throw error;
  }
}

function showHistory() {
  const kept = answers();
  $("history").hidden = kept.length === 0;
  const time = new Intl.DateTimeFormat(document.documentElement.lang, { dateStyle: "medium", timeStyle: "short" });
  $("history-list").replaceChildren(...kept.map((entry) => el("li", {}, el("button", { type: "button", class: "row", on: () => reopen(entry) },
    entry.situation.slice(0, 120), el("small", {}, `${time.format(entry.when)} · ${entry.answer.cards.map((card) => card.name).join(", ")}`)))));
}

function reopen({ situation, answer, chosen }) {
  running?.abort();
  shown = { situation, found: answer, lines: answer.lines, added: answer.added, answer, chosen, offline: false };
  $("situation").value = situation;
  say("done");
  showResult();
  $("guidance").tabIndex = -1;
  $("guidance").focus();
}

function showCardList() {
  const found = filterCards(knowledge.cards, $("search").value);
  $("card-count").textContent = t("cardCount", { count: found.length });
  $("card-list").replaceChildren(...found.map((card) => el("li", {}, el("button", { type: "button", class: "row", on: () => openCard(card) },
    card.name, el("small", {}, card.category.replaceAll("_", " "))))));
}

function showSpeak() {
  $("speak").hidden = !canSpeak();
  $("speak").textContent = t(isSpeaking() ? "stopReading" : "readAloud");
}

function countLeft() {
  const left = $("situation").maxLength - $("situation").value.length;
  $("left").hidden = left > WARN_LEFT;
  $("left").textContent = t("left", { count: left });
}

async function loadKnowledge() {
  try {
    const found = await kit.knowledge();
    if (found) knowledge = found;
  } catch (error) {
    if (!(error instanceof NeedsToken)) throw error; // asked for when a question is
  }
  fillRegions();
  showCardList();
}

function setUp() {
  for (const [id, name, on] of [["size", "size", "large"], ["contrast", "contrast", "high"]]) {
    const apply = (value) => {
      document.documentElement.dataset[name] = value;
      $(id).setAttribute("aria-pressed", String(value === on));
    };
    apply(read(name, name === "contrast" && matchMedia("(prefers-contrast: more)").matches ? on : ""));
    $(id).addEventListener("click", () => {
      const value = document.documentElement.dataset[name] === on ? "" : on;
      write(name, value);
      apply(value);
    });
  }
  $("language").addEventListener("change", () => {
    write("language", $("language").value);
    applyLanguage($("language").value);
  });
  $("region").addEventListener("change", () => {
    write("region", $("region").value);
    showCall();
  });
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const situation = $("situation").value.trim();
    if (situation) ask(situation);
    else {
      say("empty");
      $("situation").focus();
    }
  });
  // On a keyboard Enter asks, as in any messenger; Shift and Enter begin a new line.
  $("situation").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("ask").requestSubmit();
    }
  });
  $("situation").addEventListener("input", countLeft);
  document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
  $("stop").addEventListener("click", () => running?.abort());
  $("speak").addEventListener("click", () => {
    if (isSpeaking()) stopSpeaking();
    else speak(sentencesOf(shown.found.cards), "en", () => setTimeout(showSpeak));
    showSpeak();
  });
  $("search").addEventListener("input", showCardList);
  $("forget").addEventListener("click", () => {
    forgetAnswers();
    showHistory();
  });
  addEventListener("pagehide", stopSpeaking);
}

function keepPage() {
  if (!("serviceWorker" in navigator)) return;
  const policy = globalThis.trustedTypes?.createPolicy("kit", { createScriptURL: () => "./service_worker.js" });
  navigator.serviceWorker.register(policy ? policy.createScriptURL("") : "./service_worker.js").catch((error) => console.warn("the page is not kept:", error.message));
}

setUp();
applyLanguage(read("language", pickLanguage(navigator.languages)));
loadKnowledge();
keepPage();
