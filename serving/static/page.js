// Functions that change the page. They insert text as text nodes and properties, never as markup.

export const byId = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// Writing the same text again would make a screen reader repeat it.
export function setText(id, text) {
  if (byId(id).textContent !== text) byId(id).textContent = text;
}

const ANNOUNCE_DELAY_MS = 700;
let announceTimer = 0;

// Announces only the last of many texts to screen readers, because typing makes many pictures.
export function announce(text) {
  clearTimeout(announceTimer);
  announceTimer = setTimeout(() => setText("status", text), ANNOUNCE_DELAY_MS);
}

// Resolves to the first frame of an animation, as a data URL.
export async function stillOf(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  const canvas = Object.assign(document.createElement("canvas"), { width: image.naturalWidth, height: image.naturalHeight });
  canvas.getContext("2d").drawImage(image, 0, 0);
  return canvas.toDataURL();
}

export const duration = (ms) =>
  ms < 10_000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(1)} s`;
export const countSteps = (count) => `${count} step${count === 1 ? "" : "s"}`;
