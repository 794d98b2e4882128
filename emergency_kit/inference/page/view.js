// Builds what the page shows. Text reaches the document only as text nodes: nothing here, or anywhere in the page, parses HTML.

export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") node.addEventListener("click", value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const list = (kind, items, attributes = {}) => el(kind, attributes, ...items.map((item) => (item instanceof Node ? item : el("li", {}, item))));
const part = (title, items) => (items.length ? [el("h4", {}, title), list("ul", items)] : []);

// Whom to call: the service that the card names, the number to prefer first; else one number that all services share, or one for each.
export function showNumbers(box, country, service, t) {
  box.replaceChildren();
  if (!country) {
    box.append(el("p", {}, t("noRegion")));
    return;
  }
  const link = (number, text, second) => el("a", { class: second ? "number second" : "number", href: `tel:${number}` }, text);
  if (service && service !== "any") {
    const [first, ...others] = country[service];
    box.append(link(first, t("callService", { service: t(service), number: first })), ...others.map((number) => link(number, t("or", { number }), true)));
    return;
  }
  const shared = country.ambulance.filter((number) => country.fire.includes(number) && country.police.includes(number));
  if (shared.length) {
    box.append(...shared.map((number, rank) => link(number, t(rank ? "or" : "call", { number }), rank > 0)));
    return;
  }
  box.append(...["ambulance", "fire", "police"].map((name) => link(country[name][0], t("callService", { service: t(name), number: country[name][0] }))));
}

export function showCards(box, cards, t) {
  box.replaceChildren(...cards.map((card) => cardOf(card, t)));
}

function cardOf(card, t) {
  const steps = card.critical_actions.map((action) => el("li", {}, el("span", {}, action.text,
    action.instead ? el("span", { class: "instead" }, `Without ${action.needs}: ${action.instead}`) : null)));
  return el("article", { class: "card", "data-card": card.id },
    el("h3", {}, card.name),
    el("p", {}, el("strong", { lang: document.documentElement.lang }, `${t("danger")}: `), card.dangers.join(" ")),
    heading(t("doThis")), list("ol", steps, { class: "steps" }),
    heading(t("never")), list("ul", card.never.map((rule) => el("li", {}, el("span", {}, rule))), { class: "never" }),
    el("details", { class: "more" }, el("summary", { lang: document.documentElement.lang }, t("more")),
      ...part(t("worse"), card.escalate_when), ...part(t("findOut"), card.uncertainties), ...part(t("signs"), card.signs), ...part(t("differs"), card.regional_notes),
      ...part(t("sources"), card.sources.map((source) => `${source.body}: ${source.title} (${source.year})`))));
}

const heading = (text) => el("h4", { lang: document.documentElement.lang }, text);

// What is read aloud of cards: their steps with numbers, then what never to do.
export function sentencesOf(cards) {
  return cards.flatMap((card) => [card.name + ".", ...card.critical_actions.map((action, place) => `${place + 1}. ${action.text}`), ...card.never]);
}

// The model's lines by section, each as written; struck ones named, a card's line with a slip shown from the card, added steps marked.
export function showLines(box, lines, added, t, writing = false) {
  const names = [...(lines.some((line) => !line.section) ? [null] : []), "facts", "uncertainties", "analysis", "guidance"];
  const sections = names.map((name) => {
    const shown = lines.filter((line) => line.section === name).map((line) => lineOf(line, t));
    if (name === "guidance") shown.push(...added.map((step) => addedOf(step, t)));
    return shown.length ? el("section", { class: `section ${name ?? "before"}` }, el("h3", {}, t(name ?? "before")), list(name === "guidance" ? "ol" : "ul", shown, { lang: "en" })) : null;
  }).filter(Boolean);
  if (writing && sections.length) sections.at(-1).querySelector("h3").classList.add("writing");
  box.replaceChildren(...sections);
}

const note = (text, kind = "") => el("span", { class: `why ${kind}`, lang: document.documentElement.lang }, text);

function lineOf(line, t) {
  if (line.struck) return el("li", { class: "struck" }, note(t("struck", { rule: line.struck.rule })), el("s", {}, line.text));
  if (line.from_card) return el("li", { class: "added" }, el("span", {}, line.from_card.text), note(t("slip"), "green"), el("span", { class: "instead" }, t("wrote", { text: line.text })));
  return el("li", {}, line.text, line.unknown_numbers.length ? note(t("unknownNumber", { number: line.unknown_numbers.join(", ") }), "amber") : null,
    line.on_card === false ? note(t("ownWords")) : null);
}

function addedOf(step, t) {
  return el("li", { class: "added" }, note(t("added"), "green"), step.text, step.instead ? el("span", { class: "instead" }, `Without ${step.needs}: ${step.instead}`) : null);
}

export function checksOf(answer, t) {
  const origin = answer.provenance;
  const rows = [
    [t("fourSections"), t(answer.checks.four_sections ? "yes" : "no")], [t("ended"), t(answer.checks.ended ? "yes" : "no")], [t("guard"), t(answer.checks.guard ? "yes" : "no")],
    [t("model"), origin.model + (origin.model_sha256 ? ` (sha256 ${origin.model_sha256.slice(0, 12)})` : "")], [t("kind"), origin.kind],
    [t("took"), t("seconds", { count: origin.seconds.toFixed(1) })], [t("tokens"), `${origin.prompt_tokens} + ${origin.completion_tokens}`],
    [t("cardsVersion"), origin.cards_sha256.slice(0, 12)], [t("kitVersion"), origin.kit_version],
  ];
  return el("details", { class: "more" }, el("summary", {}, t("checks")),
    el("dl", { class: "facts-list" }, ...rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
}
