// The page's one way to a model and to the cards, all of it on this device: retrieval, prompt, llama.cpp in WebAssembly, the lines held to
// the cards. The same exports as the file that it stands for (inference/page/model.js), which asks a server.

import { Engine } from "./engine.js";
import { holdToCards, repeatsItself } from "./hold.js";
import { buildPrompt, localisedCard } from "./prompt.js";
import { Retriever } from "./retrieve.js";

export class Unreachable extends Error {}
export class NeedsToken extends Error {}
export class Refused extends Error {}

const CHOICES = 3; // as in inference/guard.py
const loaded = {};
const once = (name, load) => (loaded[name] ??= load().catch((error) => { delete loaded[name]; throw error; }));
const get = async (path) => {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: ${response.status}`);
  return response;
};

export const settings = () => once("settings", async () => (await get("kit.json")).json());
export const knowledge = () => once("knowledge", async () => (await get("cards.json")).json());
export const retriever = () => once("retriever", async () => {
  const [{ retrieval }, features, numbers] = await Promise.all([settings(), get("retrieval/features.txt").then((file) => file.text()), get("retrieval/numbers.bin").then((file) => file.arrayBuffer())]);
  return new Retriever(retrieval, features.split("\n"), numbers);
});
// Told of what happens to the model: "loading" with a share, "ready" with how it runs, "failed" with why.
export const watchers = new Set();
const tell = (state, value) => watchers.forEach((watch) => watch(state, value));
export const engine = () => once("engine", async () => {
  const { model } = await settings();
  if (!model) throw new Refused("this kit was packed without a model");
  try {
    tell("loading", 0);
    const engine = await Engine.load(model, (share) => tell("loading", share));
    tell("ready", engine.description);
    return engine;
  } catch (error) {
    tell("failed", error.message);
    throw error;
  }
});

// What retrieval finds, with the cards as they are shown, and the prompt.
export async function prepare(report, code, chosen = []) {
  const [kit, { cards, countries }, finder] = await Promise.all([settings(), knowledge(), retriever()]);
  const country = countries.find((other) => other.code === code) ?? null;
  let found = finder.find(report);
  if (chosen.length) {
    const ids = chosen.join() === kit.prompt.safe_minimum ? [] : chosen;
    found = { ...found, ids, fits: ids.length, unsure: false };
  }
  const ids = found.ids.length ? found.ids : [kit.prompt.safe_minimum];
  const raw = ids.map((id) => cards.find((card) => card.id === id));
  const name = (id) => cards.find((card) => card.id === id).name;
  return {
    prompt: buildPrompt(kit.prompt, kit.prompt.grounded ? raw : [], found.fits, report, country),
    found: { cards: raw.map((card) => localisedCard(card, country)), fits: found.fits, unsure: found.unsure,
      choices: found.unsure ? found.ranked.slice(0, CHOICES).map(({ id }) => ({ id, name: name(id) })) : [], emergency: { service: raw[0].service, country } },
  };
}

export class Kit {
  token = "";

  async knowledge() {
    return knowledge();
  }

  // Events of one answer, in order: cards, line, done. Aborting the signal stops the model, too.
  async *ask({ situation, country, cards }, signal) {
    const { prompt, found } = await prepare(situation, country, cards);
    yield { name: "cards", data: found };
    const kit = await settings();
    const started = performance.now();
    let text = "";
    let sent = 0;
    let last = { tokens: 0, promptTokens: 0, ended: false };
    let first = null;
    const trusted = found.cards.slice(0, Math.max(found.fits, 1));
    try {
      const model = await untilAborted(engine(), signal);
      const begun = performance.now();
      for await (const piece of model.generate(prompt, kit.model.max_new_tokens, signal)) {
        if (piece.text) first ??= performance.now() - begun;
        text += piece.text;
        last = { tokens: piece.tokens ?? last.tokens, promptTokens: piece.promptTokens ?? last.promptTokens, ended: piece.ended };
        if (!piece.text.includes("\n")) continue;
        const whole = text.slice(0, text.lastIndexOf("\n") + 1);
        const { lines } = holdToCards(whole, trusted, kit.broken_by, kit.contested, false);
        for (const line of lines.slice(sent)) yield { name: "line", data: line };
        sent = lines.length;
        if (repeatsItself(whole)) {
          last.ended = true;
          break;
        }
      }
      const seconds = (performance.now() - begun) / 1000;
      const { lines, added, four } = holdToCards(text, trusted, kit.broken_by, kit.contested, true);
      for (const line of lines.slice(sent)) yield { name: "line", data: line };
      yield { name: "done", data: {
        ...found, id: `answer-${crypto.getRandomValues(new Uint32Array(3)).join("-")}`, created: Math.floor(Date.now() / 1000), text, lines, added,
        checks: { four_sections: four, problems: [], ended: last.ended, guard: true },
        provenance: { model: kit.model.name, kind: model.description, model_sha256: kit.model.sha256, cards_sha256: kit.cards_sha256, kit_version: kit.kit_version, prompt_tokens: last.promptTokens,
          completion_tokens: last.tokens, seconds, first_token_seconds: (first ?? 0) / 1000, loading_seconds: (begun - started) / 1000, temperature: 0, seed: null } } };
    } catch (error) {
      if (error.name === "AbortError" || error instanceof Refused) throw error;
      throw new Refused(error.message);
    }
  }
}

// A promise, given up on when the signal aborts; the work behind it goes on.
function untilAborted(promise, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => reject(new DOMException("stopped", "AbortError"));
    if (signal?.aborted) stop();
    signal?.addEventListener("abort", stop);
    promise.then(resolve, reject);
  });
}
