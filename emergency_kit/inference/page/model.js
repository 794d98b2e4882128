// The page's one way to a model and to the cards. Another carrier of the page (a model in WebAssembly, say) exports the same:
//   new Kit(), kit.token, kit.knowledge() -> {cards, countries, country}, kit.ask(question, signal) -> events {name, data}
// with the names cards, waiting, line, done as in the server's /answer, and throws Unreachable, NeedsToken or Refused.

export class Unreachable extends Error {}
export class NeedsToken extends Error {}
export class Refused extends Error {}

const CACHE = "emergency-kit";

export class Kit {
  token = "";

  // All cards and countries: from the server where it answers, else what was kept; null where there is neither.
  async knowledge() {
    const request = new Request("./cards");
    const kept = "caches" in globalThis ? await caches.open(CACHE) : null;
    try {
      const response = await this.#fetch(request, { headers: this.#headers() });
      const text = await response.text();
      await kept?.put(request, new Response(text, { headers: { "content-type": "application/json" } }));
      return JSON.parse(text);
    } catch (error) {
      const copy = await kept?.match(request);
      if (copy) return copy.json();
      if (error instanceof NeedsToken) throw error;
      return null;
    }
  }

  // Events of one answer, in order. Aborting the signal stops the model, too.
  async *ask(question, signal) {
    const response = await this.#fetch("./answer", {
      method: "POST", signal, headers: { ...this.#headers(), "content-type": "application/json" }, body: JSON.stringify({ ...question, stream: true }),
    });
    let whole = false;
    for await (const event of readEvents(response.body)) {
      if (event.name === "error") throw new Refused(event.data.error.message);
      whole ||= event.name === "done";
      yield event;
    }
    if (!whole) throw new Unreachable("the answer broke off");
  }

  #headers() {
    return this.token ? { authorization: `Bearer ${this.token}` } : {};
  }

  async #fetch(request, options) {
    let response;
    try {
      response = await fetch(request, { cache: "no-store", ...options });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Unreachable(error.message);
    }
    if (response.ok) return response;
    if (response.status === 401) throw new NeedsToken();
    const body = await response.json().catch(() => null);
    throw new Refused(body?.error?.message ?? `${response.status}`);
  }
}

// Server-sent events of a response's body.
async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new Unreachable(error.message);
      });
      if (done) return;
      held += value;
      let end;
      while ((end = held.indexOf("\n\n")) >= 0) {
        const event = readEvent(held.slice(0, end));
        held = held.slice(end + 2);
        if (event) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function readEvent(block) {
  let name = "message";
  let data = "";
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) name = line.slice(7);
    else if (line.startsWith("data: ")) data += line.slice(6);
  }
  return data ? { name, data: JSON.parse(data) } : null;
}
