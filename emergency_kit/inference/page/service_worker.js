// Keeps the page for when there is no server. The newest copy comes from the server where it answers in time; the cards
// are put into the same cache by model.js. Answers themselves are kept by store.js, requests to ask are never kept.
const CACHE = "emergency-kit";
const SHELL = ["./", "index.html", "page.css", "page.js", "model.js", "view.js", "words.js", "store.js", "speech.js", "finder.js", "icon.svg", "kit.webmanifest"];
const PATIENCE_MS = 3000;

self.addEventListener("install", (event) => {
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(SHELL)).then(() => self.skipWaiting()));
});

self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  const path = url.pathname.slice(new URL(self.registration.scope).pathname.length);
  if (event.request.method !== "GET" || url.origin !== self.location.origin || !SHELL.includes(path || "./")) return;
  event.respondWith(newestOrKept(event.request));
});

async function newestOrKept(request) {
  const cache = await caches.open(CACHE);
  try {
    const response = await fetch(request, { signal: AbortSignal.timeout(PATIENCE_MS) });
    if (response.ok) await cache.put(request, response.clone());
    return response;
  } catch {
    return (await cache.match(request, { ignoreSearch: true })) ?? Response.error();
  }
}
