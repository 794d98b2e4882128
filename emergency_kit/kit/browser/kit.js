// The panel under the page: what of the kit is on this device, whether the model is ready, the printable cards, and two checks:
// every byte against SHA256SUMS, and three known questions against what was recorded when the kit was packed.

import { isKept, sha256 } from "./engine.js";
import { engine, prepare, retriever, settings, watchers } from "./model.js";
import { el } from "./view.js";

const WORDS = {
  en: { title: "This kit", none: "This kit has no model; the checked cards work.", waiting: "The model is loaded with your first question.", load: "Load the model now", loading: "Loading the model: {count} %", ready: "The model is ready: {how}.",
    failed: "The model cannot be used: {why}. The checked cards work.", kept: "Page, cards and model are kept on this device and work in flight mode.", pageKept: "Page and cards are kept on this device; the model is not yet.",
    notKept: "Nothing is kept on this device: that needs this computer's own address (localhost) or https.", print: "All cards, to print", check: "Check every byte", checking: "Checking: {count} of {all} files", whole: "{count} files checked: all as packed.", absent: " Not at hand here: {count}.",
    damaged: "DAMAGED, do not use: {names}", noDigest: "This browser can check only on localhost or over https.", ask: "Ask three known questions", asking: "Asking known question {count} of {all}", same: "Known questions: {count} of {all} prompts the same, {answers} of {all} answers begin as recorded.", differs: " NOT AS RECORDED: {names}" },
  es: { title: "Este kit", none: "Este kit no tiene modelo; las fichas comprobadas funcionan.", waiting: "El modelo se carga con la primera pregunta.", load: "Cargar el modelo ahora", loading: "Cargando el modelo: {count} %", ready: "El modelo está listo: {how}.",
    failed: "El modelo no se puede usar: {why}. Las fichas comprobadas funcionan.", kept: "La página, las fichas y el modelo están guardados en este dispositivo y funcionan en modo avión.", pageKept: "La página y las fichas están guardadas en este dispositivo; el modelo todavía no.",
    notKept: "Nada queda guardado en este dispositivo: hace falta la dirección propia de este ordenador (localhost) o https.", print: "Todas las fichas, para imprimir", check: "Comprobar cada byte", checking: "Comprobando: {count} de {all} archivos", whole: "{count} archivos comprobados: todos como se empaquetaron.", absent: " No disponibles aquí: {count}.",
    damaged: "DAÑADO, no lo use: {names}", noDigest: "Este navegador solo puede comprobar en localhost o por https.", ask: "Hacer tres preguntas conocidas", asking: "Pregunta conocida {count} de {all}", same: "Preguntas conocidas: {count} de {all} preguntas iguales, {answers} de {all} respuestas empiezan como se registró.", differs: " DISTINTO DE LO REGISTRADO: {names}" },
  fr: { title: "Ce kit", none: "Ce kit n'a pas de modèle ; les fiches vérifiées fonctionnent.", waiting: "Le modèle se charge à la première question.", load: "Charger le modèle maintenant", loading: "Chargement du modèle : {count} %", ready: "Le modèle est prêt : {how}.",
    failed: "Le modèle est inutilisable : {why}. Les fiches vérifiées fonctionnent.", kept: "La page, les fiches et le modèle sont gardés sur cet appareil et fonctionnent en mode avion.", pageKept: "La page et les fiches sont gardées sur cet appareil ; le modèle pas encore.",
    notKept: "Rien n'est gardé sur cet appareil : il faut l'adresse propre de cet ordinateur (localhost) ou https.", print: "Toutes les fiches, à imprimer", check: "Vérifier chaque octet", checking: "Vérification : {count} fichiers sur {all}", whole: "{count} fichiers vérifiés : tous tels qu'emballés.", absent: " Absents ici : {count}.",
    damaged: "ENDOMMAGÉ, ne pas utiliser : {names}", noDigest: "Ce navigateur ne peut vérifier que sur localhost ou en https.", ask: "Poser trois questions connues", asking: "Question connue {count} sur {all}", same: "Questions connues : {count} sur {all} identiques, {answers} réponses sur {all} commencent comme enregistré.", differs: " DIFFÈRE DE L'ENREGISTREMENT : {names}" },
};
const t = (key, values = {}) => WORDS[document.documentElement.lang]?.[key].replace(/\{(\w+)\}/g, (_, name) => values[name]) ?? "";
const said = { model: ["waiting"], kept: [""], checked: [""], asked: [""] };
const spots = Object.fromEntries(Object.keys(said).map((name) => [name, el("p", { class: "hint", role: "status", id: `kit-${name}` })]));
const [title, print] = [el("h2", { id: "kit-title" }), el("a", { href: "../cards.html" })];
const button = (id, run) => el("button", { type: "button", class: "plain", id, on: (event) => guarded(event.currentTarget, run) });
const buttons = { load: button("kit-load", () => engine().catch(() => {})), check: button("kit-check", checkFiles), ask: button("kit-ask", askKnown) };

async function guarded(pressed, run) {
  pressed.disabled = true;
  try {
    await run();
  } finally {
    pressed.disabled = false;
    showKept();
  }
}

function say(spot, ...message) {
  said[spot] = message;
  draw();
}

function draw() {
  for (const [name, [key, values]] of Object.entries(said)) spots[name].textContent = key ? t(key, values) + (values?.more ? t(...values.more) : "") : "";
  title.textContent = t("title");
  print.textContent = t("print");
  for (const [name, node] of Object.entries(buttons)) node.textContent = t(name);
}

async function showKept() {
  const { model } = await settings();
  const controlled = "serviceWorker" in navigator && (await Promise.race([navigator.serviceWorker.ready, new Promise((resolve) => setTimeout(resolve, 20000))]));
  say("kept", !controlled ? "notKept" : model && !(await isKept(model.parts)) ? "pageKept" : "kept");
}

// A file as the kit holds it, past what this device keeps; where there is no network, what is kept.
async function bytesOf(path) {
  for (const request of [`${path}?fresh`, path]) {
    const response = await fetch(request, { cache: "no-store" }).catch(() => null);
    if (response?.ok) return response.arrayBuffer();
  }
  return null;
}

async function checkFiles() {
  const listed = await bytesOf("../SHA256SUMS");
  const kept = listed ?? (await (await fetch("sums.txt")).arrayBuffer());
  if (!(await sha256(kept))) return say("checked", "noDigest");
  const lines = new TextDecoder().decode(kept).trim().split("\n").map((line) => /^([0-9a-f]{64}) {2}(.+)$/.exec(line) ?? [line, "", line]);
  const damaged = [];
  let absent = 0;
  for (const [place, [, digest, name]] of lines.entries()) {
    say("checked", "checking", { count: place + 1, all: lines.length });
    const bytes = listed || name.startsWith("page/") ? await bytesOf(listed ? `../${name}` : name.slice("page/".length)) : null;
    if (!bytes) absent += 1;
    else if ((await sha256(bytes)) !== digest) damaged.push(name);
  }
  if (damaged.length) say("checked", "damaged", { names: damaged.join(", ") });
  else say("checked", "whole", { count: lines.length - absent, more: absent ? ["absent", { count: absent }] : null });
}

async function askKnown() {
  const { self_test: known } = await settings();
  const differing = new Set();
  let [prompts, answers] = [0, 0];
  for (const [place, { situation, country, prompt_sha256, answer }] of known.questions.entries()) {
    say("asked", "asking", { count: place + 1, all: known.questions.length });
    const { prompt } = await prepare(situation, country);
    const digest = await sha256(new TextEncoder().encode(prompt));
    if (digest === null || digest === prompt_sha256) prompts += 1;
    else differing.add(situation);
    let text = "";
    for await (const piece of (await engine()).generate(prompt, known.tokens)) text += piece.text;
    // The first words are the same on every machine; later ones may differ by rounding.
    if (text.slice(0, known.same_letters) === answer.slice(0, known.same_letters)) answers += 1;
    else differing.add(situation);
  }
  say("asked", "same", { count: prompts, answers, all: known.questions.length, more: differing.size ? ["differs", { names: [...differing].join("; ") }] : null });
}

watchers.add((state, value) => {
  say("model", state, { count: Math.round(100 * value), how: value, why: value });
  if (state === "ready") showKept();
});
new MutationObserver(draw).observe(document.documentElement, { attributeFilter: ["lang"] });
document.querySelector("main").append(el("section", { class: "panel", "aria-labelledby": "kit-title", id: "kit-panel" }, title, spots.model, spots.kept, el("p", {}, print),
  el("div", { class: "buttons" }, ...Object.values(buttons)), spots.checked, spots.asked));
settings().then(({ model }) => {
  if (model) return;
  buttons.load.remove();
  buttons.ask.remove();
  say("model", "none");
});
retriever().catch((error) => console.warn(error.message));
draw();
showKept();
