// Client of the server's API: errors, streamed pictures and the API key.
import { readEvents } from "./sse.js";

// Address of the server, which may lie behind a proxy's path: this file is /playground/static/server.js.
export const SERVER = new URL("../..", import.meta.url).href.replace(/\/$/, "");
const KEY_NAME = "tdm-api-key";

export const getKey = () => sessionStorage.getItem(KEY_NAME);
export const setKey = (key) => sessionStorage.setItem(KEY_NAME, key);
export const forgetKey = () => sessionStorage.removeItem(KEY_NAME);

export class ServerError extends Error {
  constructor(message, { status = 0, code = null, retryAfterMs = null } = {}) {
    super(message);
    Object.assign(this, { name: "ServerError", status, code, retryAfterMs });
  }
}

export async function listModels() {
  const { data } = await (await ask("/v1/models")).json();
  if (!data.length) throw new ServerError("The server lists no models.");
  return data;
}

// Resolves to {health, live, max_live}. The counts are undefined if the server does not report them.
export async function readReadiness(timeoutMs) {
  try {
    const response = await fetch(`${SERVER}/ready`, { cache: "no-store", signal: AbortSignal.timeout(timeoutMs) });
    if (!response.ok) return { health: "not ready" };
    const { live, max_live } = await response.json();
    return { health: "ready", live, max_live };
  } catch {
    return { health: "unreachable" };
  }
}

export function routeOf({ num_frames, image }) {
  if (num_frames !== undefined) return "/v1/videos/generations";
  return image === undefined ? "/v1/images/generations" : "/v1/images/edits";
}

// Resolves to {request, answer, previews, roundTripMs}; `answer` and `previews` are events of the stream.
// After each preview, `onPreview` receives {request, previews}.
export async function makePicture(request, signal, onPreview = () => {}) {
  const startedMs = performance.now();
  const previews = [];
  const response = await ask(routeOf(request), {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...request, stream: true }),
    signal,
  });
  for await (const { data } of readEvents(response.body)) {
    const event = JSON.parse(data);
    if (event.error) throw new ServerError(event.error.message, event.error);
    if (event.type.endsWith(".completed")) {
      return { request, answer: event, previews, roundTripMs: performance.now() - startedMs };
    }
    if (event.type.endsWith(".partial_image")) {
      previews.push(event);
      onPreview({ request, previews });
    }
  }
  throw new ServerError("The stream ended before the picture did.");
}

// Resolves to a clip as an MP4 file, which the server makes from the frames that it kept, or makes again.
export async function fetchMp4({ stream, partial_images, ...request }, seed) {
  const response = await ask(routeOf(request), {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "video/mp4" },
    body: JSON.stringify({ ...request, seed, output_format: "mp4" }),
  });
  return response.blob();
}

export const sourceOf = ({ output_format, b64_json }) => `data:image/${output_format};base64,${b64_json}`;

async function ask(path, { headers = {}, ...options } = {}) {
  const key = getKey();
  if (key) headers = { ...headers, Authorization: `Bearer ${key}` };
  const response = await fetch(SERVER + path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new ServerError("The server cannot be reached.");
  });
  if (!response.ok) throw await readError(response);
  return response;
}

async function readError(response) {
  // A proxy in between may answer in HTML; then the message is the status.
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The server answered HTTP ${response.status} without a reason.`;
  const retryAfterMs = readRetryAfterMs(response.headers);
  return new ServerError(message, { status: response.status, code: body?.error?.code, retryAfterMs });
}

function readRetryAfterMs(headers) {
  const exactMs = headers.get("retry-after-ms");
  const waitMs = exactMs === null ? 1000 * Number(headers.get("retry-after") ?? NaN) : Number(exactMs);
  return Number.isFinite(waitMs) ? waitMs : null; // `retry-after` may also be a date, which our server never sends
}
