// Finds the cards that fit a report, as knowledge/retrieve.py and knowledge/index.py do, from the numbers that they were fitted to.
// In: kit.json's `retrieval`, features.txt (a name a line), numbers.bin (idf in float32, then weights by row in float16). Out: {ids, fits, unsure, ranked}.

const QUOTES = { "‘": "'", "’": "'", "‛": "'", "ʼ": "'", "“": '"', "”": '"', "„": '"' };
// As in knowledge/cards.py: inside a number a point stays, inside a word an apostrophe.
const PUNCTUATION = /(?!(?<=\p{Nd})\.(?=\p{Nd}))(?!(?<=[\p{L}\p{N}_])'(?=[\p{L}\p{N}_]))(?:[^\p{L}\p{N}]|_)/gu;

export function normalise(text) {
  const plain = text.normalize("NFKC").replace(/[‘’‛ʼ“”„]/g, (mark) => QUOTES[mark]).toLowerCase();
  return plain.replace(PUNCTUATION, " ").split(" ").filter(Boolean).join(" ");
}

function stem(word) {
  const letters = [...word];
  for (const ending of ["ing", "ed", "es", "s", "ly"]) {
    if (word.endsWith(ending) && letters.length - ending.length >= 3) return letters.slice(0, -ending.length).join("");
  }
  return word;
}

// What the 16 bits of a float16 stand for; not every browser has Float16Array.
const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => {
  const exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const size = exponent === 0 ? fraction * 2 ** -24 : exponent === 31 ? (fraction ? NaN : Infinity) : (1 + fraction / 1024) * 2 ** (exponent - 15);
  return bits & 0x8000 ? -size : size;
});

export class Retriever {
  constructor(settings, features, numbers) {
    this.settings = settings;
    this.places = new Map(features.map((name, place) => [name, place]));
    this.columns = settings.card_ids.length + 2;
    this.idf = new Float32Array(numbers, 0, features.length);
    this.weights = new Uint16Array(numbers, 4 * features.length);
    this.stopwords = new Set(settings.stopwords);
    if (this.weights.length !== features.length * this.columns) throw new Error("numbers.bin does not fit features.txt");
  }

  find(report) {
    const { card_ids: ids, categories, top_k: most, applies: least, unsure_applies: doubt, unsure_margin: margin, second_score: second } = this.settings;
    const words = normalise(report).split(" ").filter(Boolean);
    const scores = this.#windows(words);
    const ranked = ids.map((id, place) => ({ id, score: scores[place] })).sort((a, b) => b.score - a.score);
    if (!ranked.length || !scores.some((score) => score !== 0)) return { ids: [], fits: 0, unsure: false, ranked: [] };
    const applies = scores.at(-1) + ranked[0].score;
    if (applies < least) return { ids: [], fits: 0, unsure: applies > least - doubt, ranked };
    const both = ranked.length > 1 && ranked[1].score > second && categories[ranked[0].id] !== categories[ranked[1].id];
    const near = ranked.length > 1 && ranked[0].score - ranked[1].score < margin;
    const shown = ranked.slice(0, near || both ? most : 1).map(({ id }) => id);
    return { ids: shown, fits: both && most > 1 ? 2 : 1, unsure: (near && !both) || applies < least + doubt, ranked };
  }

  // A long report is also read in overlapping windows.
  #windows(words) {
    const { window_words: size, window_share: share } = this.settings;
    const whole = this.#score(words);
    if (words.length <= size) return whole;
    const best = new Float64Array(this.columns).fill(-Infinity);
    for (let start = 0; start < words.length - Math.floor(size / 2); start += Math.floor(size / 2)) {
      this.#score(words.slice(start, start + size)).forEach((score, column) => { best[column] = Math.max(best[column], score); });
    }
    return whole.map((score, column) => (1 - share) * score + share * best[column]);
  }

  #score(words) {
    const counts = new Map();
    for (const name of this.#features(words)) {
      const place = this.places.get(name);
      if (place !== undefined) counts.set(place, (counts.get(place) ?? 0) + 1);
    }
    const values = [...counts].map(([place, count]) => [place, Math.fround((1 + Math.log(count)) * this.idf[place])]);
    const length = Math.sqrt(values.reduce((sum, [, value]) => sum + value * value, 0));
    const scores = new Float64Array(this.columns);
    for (const [place, value] of values) {
      for (let column = 0; column < this.columns; column++) scores[column] += (value / length) * HALVES[this.weights[place * this.columns + column]];
    }
    return scores;
  }

  #features(words) {
    const stems = words.map(stem);
    const features = stems.slice(1).map((word, place) => `p:${stems[place]} ${word}`);
    words.forEach((word, place) => {
      if (this.stopwords.has(word)) return;
      features.push(`w:${stems[place]}`);
      const marked = [..."^", ...word, "$"];
      for (const length of this.settings.piece_letters) {
        for (let start = 0; start + length <= marked.length; start++) features.push(`c:${marked.slice(start, start + length).join("")}`);
      }
    });
    return features;
  }
}
