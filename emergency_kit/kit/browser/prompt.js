// The prompt of a report, byte for byte as data/format.py builds it; its texts (system prompt, headings, template) come from kit.json.
// A test compares both for every card, every country and thousands of texts.

const ANY_COUNTRY = "your local emergency number";
// What Python calls white space, which is not quite what JavaScript does.
const SPACE = "\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const CONTROL = new RegExp(`<(?=[|\\uff5c/]?[^<>${SPACE}]{1,60}>)|\\[(?=/?[A-Z_]{2,40}\\])`, "gu");
const OUTER = new RegExp(`^[${SPACE}]+|[${SPACE}]+$`, "g");

export const strip = (text) => text.replace(OUTER, "");

export function numberOf(country, service) {
  if (service !== "any") return country[service].join(" or ");
  const shared = country.ambulance.filter((number) => country.fire.includes(number) && country.police.includes(number));
  return shared.length ? shared.join(" or ") : `${country.ambulance[0]} (ambulance), ${country.fire[0]} (fire) or ${country.police[0]} (police)`;
}

export function localise(text, country, service) {
  return country && text ? text.replaceAll(ANY_COUNTRY, numberOf(country, service)) : text;
}

// A card with the country's number in its texts, as the server sends it.
export function localisedCard(card, country) {
  const put = (text) => localise(text, country, card.service);
  return { ...card, critical_actions: card.critical_actions.map((action) => ({ ...action, text: put(action.text), instead: put(action.instead) })) };
}

function renderCard(card, heading, country) {
  return [`${heading}: ${card.name}`, ...card.dangers.map((danger) => `Danger: ${danger}`),
    ...card.critical_actions.map((action, place) => `${place + 1}. ${localise(action.text, country, card.service)}${action.instead ? ` Without ${action.needs}: ${action.instead}` : ""}`),
    ...card.never.map((rule) => `Never: ${rule}`), ...card.uncertainties.map((unknown) => `Ask: ${unknown}`)].join("\n");
}

// cards: as in cards.json, best first; fits: how many of them fit. Returns the text up to where the answer begins.
export function buildPrompt(settings, cards, fits, report, country) {
  const blocks = cards.map((card, rank) => renderCard(card, card.id === settings.safe_minimum ? settings.safe_heading : rank < fits ? "CARD" : "OTHER CARD", country));
  const said = strip(report.replace(CONTROL, (mark) => `${mark} `));
  if (said) blocks.push(`SITUATION: ${said}`);
  return settings.head + strip(blocks.join("\n\n")) + settings.tail;
}
