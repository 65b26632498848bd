// Pictures that follow a drawing: a websocket on which the newest request is answered.
import { getKey, SERVER, ServerError } from "./server.js";

const URL_OF_LIVE = `${SERVER.replace(/^http/, "ws")}/v1/images/live`;
const KEY_PROTOCOL = "openai-insecure-api-key.";
const PROTOCOL = "realtime"; // the server takes it, as a browser wants one of those that it offers

export class Live {
  // `onPicture` receives what `makePicture` resolves to, `onPreview` {request, previews} and `onError` a ServerError.
  // `onUnavailable` is called where no connection can be opened, as behind a proxy without websockets.
  constructor({ onPicture, onPreview, onError, onUnavailable }) {
    Object.assign(this, { onPicture, onPreview, onError, onUnavailable });
    this.socket = null;
    this.waiting = null; // the newest request that was not sent yet
    this.sent = new Map(); // by the number of its message: {request, sentMs, previews}
    this.numSent = 0;
    this.isSendingSoon = false;
  }

  // Sends a request in the next frame of the browser, if no newer one comes before.
  send(request) {
    this.waiting = request;
    if (this.socket === null) this.open();
    if (this.isSendingSoon) return;
    this.isSendingSoon = true;
    requestAnimationFrame(() => {
      this.isSendingSoon = false;
      this.flush();
    });
  }

  isBusy() {
    return this.waiting !== null || this.sent.size > 0;
  }

  close() {
    this.waiting = null;
    this.sent.clear();
    this.socket?.close();
    this.socket = null;
  }

  open() {
    const key = getKey();
    const socket = (this.socket = new WebSocket(URL_OF_LIVE, key ? [PROTOCOL, `${KEY_PROTOCOL}${key}`] : []));
    let wasOpen = false;
    this.sent.clear();
    this.numSent = 0;
    socket.addEventListener("open", () => {
      wasOpen = true;
      this.flush();
    });
    socket.addEventListener("message", ({ data }) => this.socket === socket && this.take(JSON.parse(data)));
    socket.addEventListener("close", () => {
      if (this.socket !== socket) return;
      this.socket = null; // the next request opens another
      if (!wasOpen) this.onUnavailable();
    });
  }

  flush() {
    if (this.waiting === null || this.socket?.readyState !== WebSocket.OPEN) return;
    this.sent.set(++this.numSent, { request: this.waiting, sentMs: performance.now(), previews: [] });
    this.socket.send(JSON.stringify(this.waiting));
    this.waiting = null;
  }

  take({ message, latency_ms, ...event }) {
    if (!this.sent.has(message)) return; // of a drawing that was closed
    const { request, sentMs, previews } = this.sent.get(message);
    const isLast = !event.type.endsWith(".partial_image");
    for (const number of this.sent.keys()) if (number < message || (isLast && number === message)) this.sent.delete(number);
    if (event.error) {
      this.onError(new ServerError(event.error.message, { ...event.error, status: event.status, retryAfterMs: event.retry_after_ms }));
    } else if (isLast) {
      this.onPicture({ request, answer: event, previews, roundTripMs: performance.now() - sentMs });
    } else {
      previews.push(event);
      this.onPreview({ request, previews });
    }
  }
}
