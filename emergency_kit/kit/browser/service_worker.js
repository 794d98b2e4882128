// Keeps the whole page on this device, so that it opens in flight mode. VERSION and FILES are filled in when the kit is packed; the
// model's parts are kept by engine.js. Documents get the two headers that let llama.cpp use several threads.
const VERSION = "@VERSION@";
const FILES = "@FILES@";
const CACHE = `emergency-kit-page-${VERSION}`;

self.addEventListener("install", (event) => {
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(FILES.map((path) => new Request(path, { cache: "no-store" })))).then(() => self.skipWaiting()));
});

self.addEventListener("activate", (event) => {
  event.waitUntil(caches.keys().then((names) => Promise.all(names.filter((name) => name.startsWith("emergency-kit-page-") && name !== CACHE).map((name) => caches.delete(name)))).then(() => self.clients.claim()));
});

self.addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  if (event.request.method !== "GET" || url.origin !== self.location.origin || url.search) return; // "?fresh" asks the kit itself
  event.respondWith(keptOrFetched(event.request));
});

async function keptOrFetched(request) {
  const kept = await (await caches.open(CACHE)).match(request);
  const response = kept ?? await fetch(request);
  if (request.mode !== "navigate" && request.destination !== "worker") return response;
  const headers = new Headers(response.headers);
  headers.set("cross-origin-opener-policy", "same-origin");
  headers.set("cross-origin-embedder-policy", "require-corp");
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}
