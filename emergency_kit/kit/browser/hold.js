// Holds what the model wrote to the cards shown, line by line, stricter and simpler than inference/guard.py: a step of GUIDANCE stays only
// where it is a line of a card that fits, or nearly one (then the card's own is shown); any other is struck, and missing steps are added.
// In other sections a line that holds a phrase which breaks a never-rule, and no word of warning, is struck.

import { normalise } from "./retrieve.js";

const HEADING = /^[ \t]*(?:#{1,6}[ \t]*)?(?:\*\*|__)?(FACTS|UNCERTAINTIES|ANALYSIS|GUIDANCE)(?:\*\*|__)?[ \t]*:?(?:\*\*|__)?[ \t]*$/;
const BULLET = /^[ \t]*(?:[•*\-–]|\d{1,3}[.)])[ \t]+(\S.*?)[ \t]*$/;
const SECTIONS = ["facts", "uncertainties", "analysis", "guidance"];
const SLIP_RATIO = 80; // as in inference/guard.py
const WARNS = /\b(?:not|never|don't|avoid|without|no|stop|instead)\b/;
const OFF_CARD = "Guidance comes from the card that fits; this line does not stand there.";

// {lines: [{section, text}], four: whether the four sections stand there, in order, none empty}
export function readLines(text) {
  const lines = [];
  const names = [];
  let section = null;
  for (const line of text.split("\n").map((line) => line.trimEnd())) {
    const heading = HEADING.exec(line);
    if (heading) names.push(section = heading[1].toLowerCase());
    else if (line.trim()) lines.push({ section, text: BULLET.exec(line)?.[1] ?? line.trim() });
  }
  const four = names.join() === SECTIONS.join() && SECTIONS.every((name) => lines.some((line) => line.section === name)) && lines.every((line) => line.section);
  return { lines, four };
}

// Whether the last whole line is a step that stood before: a small model may go round like that.
export function repeatsItself(text) {
  const steps = text.split("\n").filter((line) => /^\d/.test(line) && line.slice(0, 5).includes(". ")).map((line) => line.slice(line.indexOf(". ") + 2));
  return text.endsWith("\n") && /\n?\d+\. [^\n]*\n$/.test(text) && steps.slice(0, -1).includes(steps.at(-1));
}

// Likeness of two texts, 0 to 100: rapidfuzz.fuzz.ratio, twice their longest common subsequence over their lengths.
export function ratio(first, second) {
  const [a, b] = [[...first], [...second]];
  let row = new Array(b.length + 1).fill(0);
  for (const letter of a) {
    const next = [0];
    for (let place = 0; place < b.length; place++) next.push(letter === b[place] ? row[place] + 1 : Math.max(row[place + 1], next[place]));
    row = next;
  }
  return a.length + b.length ? (200 * row[b.length]) / (a.length + b.length) : 100;
}

// {line: {card_id, rule}}: actions of one card that another forbids (aspirin, beside a stroke). contested: of inference/guard.py, [card, its rule, other card, action, part].
function findContested(cards, contested) {
  const found = new Map();
  for (const card of cards) {
    for (const [id, rule, other, place, part] of contested) {
      const line = card.critical_actions[place]?.[part];
      if (other === card.id && line && !found.has(line) && cards.some((forbids) => forbids !== card && forbids.id === id)) found.set(line, { card_id: id, rule });
    }
  }
  return found;
}

// cards: localised, those that fit; broken: {card id: [[rule, phrases]]}. Returns {lines, added} as the server sends them.
export function holdToCards(text, cards, broken, contested, whole) {
  const { lines, four } = readLines(text);
  const own = cards.flatMap((card) => [...card.critical_actions.flatMap((action) => [action.text, action.instead].filter(Boolean)), ...card.never].map((line) => ({ id: card.id, line, plain: normalise(line) })));
  const forbidden = findContested(cards, contested);
  const given = new Set();
  const held = lines.map((line) => {
    const plain = normalise(line.text);
    const sent = { section: line.section, text: line.text, struck: null, from_card: null, unknown_numbers: [] };
    if (line.section === "guidance") {
      const near = own.map((other) => ({ ...other, like: ratio(plain, other.plain) })).sort((a, b) => b.like - a.like)[0];
      if (!near || near.like < SLIP_RATIO) return { ...sent, struck: { card_id: null, rule: OFF_CARD } };
      if (forbidden.has(near.line)) return { ...sent, struck: forbidden.get(near.line) };
      given.add(near.line);
      return near.plain === plain ? sent : { ...sent, from_card: { card_id: near.id, text: near.line } };
    }
    const rule = cards.flatMap((card) => (broken[card.id] ?? []).map(([text, phrases]) => ({ id: card.id, text, phrases }))).find(({ phrases }) => phrases.some((phrase) => ` ${plain} `.includes(` ${phrase} `)));
    return rule && !WARNS.test(plain) ? { ...sent, struck: { card_id: rule.id, rule: rule.text } } : sent;
  });
  const missing = (card) => card.critical_actions.filter((action) => !given.has(action.text) && !given.has(action.instead) && !forbidden.has(action.text))
    .map((action) => ({ card_id: card.id, text: action.text, needs: action.needs, instead: action.instead }));
  return { lines: held, added: whole ? cards.flatMap(missing) : [], four };
}
