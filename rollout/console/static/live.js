// Renews the marked parts of a page every few seconds, and leaves forms alone.
"use strict";

const SECONDS = 3;

async function renew() {
  if (document.hidden) return;
  const answer = await fetch(location.href, { headers: { accept: "text/html" } });
  if (!answer.ok || answer.redirected) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of document.querySelectorAll("[data-live]")) {
    const name = CSS.escape(part.dataset.live);
    const next = fresh.querySelector(`[data-live="${name}"]`);
    if (next && next.innerHTML !== part.innerHTML) part.replaceWith(next);
  }
}

async function keepLive() {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, SECONDS * 1000));
    try {
      await renew();
    } catch {
      // The controller restarts or the network is gone: try again.
    }
  }
}

keepLive();
