// What this device keeps: settings and the last answers, in localStorage. Where that is full or forbidden, nothing is kept and all else works.

const PREFIX = "emergency-kit.";
const ANSWERS_KEPT = 20;

export function read(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function write(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export function answers() {
  return read("answers", []);
}

// Keep an answer in front of the others; where there is no room, with fewer of the old ones.
export function keepAnswer(entry) {
  const kept = [entry, ...answers().filter((other) => other.answer.id !== entry.answer.id)].slice(0, ANSWERS_KEPT);
  while (kept.length && !write("answers", kept)) kept.pop();
}

export function forgetAnswers() {
  write("answers", []);
}
