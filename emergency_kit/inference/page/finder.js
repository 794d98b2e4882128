// Finds kept cards by the words they share with a report, for when no server can be asked. Plain counting of words, rare ones
// first; it says which cards are near, never that one fits.

const words = (text) => new Set(text.toLowerCase().normalize("NFKD").match(/[\p{L}\p{N}]{3,}/gu) ?? []);

export function findCards(cards, report, most = 5) {
  const asked = words(report);
  const own = cards.map((card) => words([card.name, ...card.also_called, ...card.signs].join(" ")));
  const held = new Map();
  for (const set of own) for (const word of set) held.set(word, (held.get(word) ?? 0) + 1);
  const scores = own.map((set) => [...asked].filter((word) => set.has(word)).reduce((sum, word) => sum + Math.log(1 + cards.length / held.get(word)), 0));
  return cards.map((card, place) => ({ card, score: scores[place] }))
    .filter(({ card, score }) => score > 0 && card.id !== "safe_minimum").sort((a, b) => b.score - a.score).slice(0, most).map(({ card }) => card);
}

// Cards whose words begin with every typed word; all where nothing is typed.
export function filterCards(cards, typed) {
  const asked = [...words(typed)];
  if (!asked.length) return cards;
  return cards.filter((card) => {
    const own = [...words([card.name, ...card.also_called, ...card.signs, card.category].join(" "))];
    return asked.every((word) => own.some((other) => other.startsWith(word)));
  });
}
