// llama.cpp in WebAssembly (wllama): keeps the parts of the model on this device, checks each against its sha256, generates.
// One thread where the page is not isolated (no COOP and COEP headers), else as many as half of the cores.

import { Wllama, LoggerWithoutDebug } from "./engine/wllama.js";

const CACHE = "emergency-kit-model";
const MOST_THREADS = 8;

export class Damaged extends Error {}

// sha256 in hex; null where the browser gives no digest (pages over plain http from another machine).
export async function sha256(bytes) {
  if (!globalThis.crypto?.subtle) return null;
  return [...new Uint8Array(await crypto.subtle.digest("SHA-256", bytes))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

const openCache = async () => ("caches" in globalThis ? caches.open(CACHE) : null);

// One part: from this device, else fetched and kept. A part that differs from what was packed is thrown out.
async function loadPart(part) {
  const cache = await openCache();
  const request = new Request(`${part.name}?${part.sha256}`);
  const kept = await cache?.match(request);
  const response = kept ?? await fetch(new Request(part.name, { cache: "no-store" }));
  if (!response.ok) throw new Error(`${part.name}: ${response.status}`);
  const bytes = await response.arrayBuffer();
  const digest = await sha256(bytes);
  if (bytes.byteLength !== part.bytes || (digest && digest !== part.sha256)) {
    await cache?.delete(request);
    throw new Damaged(`${part.name} differs from what was packed`);
  }
  // Where the disk is full, or keeping is forbidden, the model works until the page is closed.
  if (cache && !kept) await cache.put(request, new Response(bytes)).catch((error) => console.warn("not kept:", error.message));
  return new Blob([bytes]);
}

export async function isKept(parts) {
  const cache = await openCache();
  const found = await Promise.all(parts.map((part) => cache?.match(`${part.name}?${part.sha256}`)));
  return found.every(Boolean);
}

export function countThreads() {
  const cores = navigator.hardwareConcurrency || 1;
  return globalThis.crossOriginIsolated ? Math.min(MOST_THREADS, Math.max(1, Math.floor(cores / 2))) : 1;
}

export class Engine {
  // progress: called with the share of the model's bytes that are here, 0 to 1.
  static async load(settings, progress) {
    const blobs = [];
    const all = settings.parts.reduce((sum, part) => sum + part.bytes, 0);
    for (const part of settings.parts) {
      blobs.push(await loadPart(part));
      progress(blobs.reduce((sum, blob) => sum + blob.size, 0) / all);
    }
    const cache = await openCache();
    for (const request of (await cache?.keys()) ?? []) {
      if (!settings.parts.some((part) => request.url.endsWith(`/${part.name}?${part.sha256}`))) await cache.delete(request); // of an earlier kit
    }
    const llama = new Wllama({ default: "./engine/wllama.wasm" }, { suppressNativeLog: true, logger: LoggerWithoutDebug });
    llama.setCompat(null); // its default would fetch from a CDN
    await llama.loadModel([new Blob(blobs)], { n_ctx: settings.context_tokens, n_threads: countThreads(), n_gpu_layers: 0, n_parallel: 1, n_batch: 256, n_ubatch: 128 });
    return new Engine(llama, settings);
  }

  constructor(llama, settings) {
    this.llama = llama;
    this.settings = settings;
    this.description = `llama.cpp in WebAssembly, ${llama.getNumThreads()} thread${llama.getNumThreads() > 1 ? "s" : ""}`;
  }

  // Greedy pieces of an answer: {text, tokens, promptTokens, ended}. Aborting the signal stops llama.cpp at its next token.
  async *generate(prompt, most, signal) {
    const queue = [];
    let wake = () => {};
    const put = (item) => { queue.push(item); wake(); };
    const halted = new AbortController();
    signal?.addEventListener("abort", () => halted.abort());
    const running = this.llama.createCompletion({
      prompt, max_tokens: most, temperature: 0, samplers: ["temperature"], top_k: 0, top_p: 1, min_p: 0, repeat_penalty: 1, grammar: this.settings.grammar || undefined,
      cache_prompt: true, timings_per_token: true, stream: true, abortSignal: halted.signal,
      onData: (chunk) => put({ text: chunk.choices[0]?.text ?? "", tokens: chunk.timings?.predicted_n, promptTokens: chunk.timings ? chunk.timings.prompt_n + (chunk.timings.cache_n ?? 0) : undefined, ended: chunk.choices[0]?.finish_reason === "stop" }),
    }).then(() => put(null), (error) => put(error));
    try {
      for (;;) {
        while (!queue.length) await new Promise((resolve) => { wake = resolve; });
        const item = queue.shift();
        if (item === null) return;
        if (item instanceof Error) throw item.name === "AbortError" ? new DOMException("stopped", "AbortError") : item;
        yield item;
      }
    } finally {
      halted.abort();
      await running;
    }
  }
}
