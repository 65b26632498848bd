// The playground: makes a picture or a clip from a prompt and shows the time of each stage.
// The fields of the form are the state of the settings. Each picture has the request that made it.
import { asCurl, asPython, copy } from "./copies.js";
import { closeDrawing, drawnFields, isDrawing, isStroke, openDrawing, restoreDrawing, watchDrawing } from "./drawing.js";
import { showLatency } from "./latency.js";
import { Live } from "./live.js";
import { announce, byId, countSteps, element, duration, setText, stillOf } from "./page.js";
import { fetchMp4, forgetKey, getKey, listModels, makePicture, readReadiness, SERVER, setKey, sourceOf } from "./server.js";

const DEBOUNCE_MS = 150;
const HEALTH_PERIOD_MS = 5000;
const TYPING_PAUSE_MS = 2000; // a picture that typing replaces sooner is not kept in the history
const FEEDBACK_MS = 1500;
const HISTORY_LENGTH = 48;
const MAX_LINK_LENGTH = 2000;
const PARTIAL_IMAGES = 3;
const OUTPUT_FORMAT = "png"; // the only format of pictures that holds a receipt
const CLIP_FORMAT = "webp"; // loses nothing, and repeats without a player
const wantsStills = matchMedia("(prefers-reduced-motion: reduce)");
const EXAMPLES = [
  "a red heart left of an avocado",
  "a small strawberry at the top on yellow",
  "a big pizza on a black background",
  "a rocket above the earth globe on purple",
];
const SHORTCUTS = [
  ["/", "write a prompt (Escape leaves it)", () => byId("prompt").select()],
  ["m", "make the picture again", () => generate()],
  ["r", "roll the seed", () => generate({ keepSeed: false })],
  ["l", "lock or unlock the seed", () => byId("seed-lock").click()],
  ["1 to 9, a", "set the number of steps, or auto", null],
  ["c", "compare step counts", () => byId("compare").click()],
  ["d", "download", () => byId("download").click()],
  ["[", "the picture before", () => restoreNeighbour(1)],
  ["]", "the picture after", () => restoreNeighbour(-1)],
];

let models = [];
let model = null; // the chosen entry of `models`; null until the server is ready
let shown = null; // the picture on display, as `makePicture` returned it
let pictures = []; // the history, newest first
let timer = 0; // timeout after which the next picture is made
let isFollowing = false; // whether pictures follow a drawing one by one
let isChanged = false; // whether the drawing changed since the latest of them began
let isLiveServed = true; // false once no live connection could be opened
let generation = new AbortController();
let comparison = new AbortController();

// ---- Settings ----

async function connect() {
  try {
    models = await listModels();
  } catch (error) {
    return showProblem(error);
  }
  byId("model").replaceChildren(...models.map(({ id }) => element("option", { value: id }, id)));
  byId("model-field").hidden = models.length < 2;
  chooseModel(models[0].id);
  applyLink();
  generate();
}

function chooseModel(id) {
  model = models.find((entry) => entry.id === id);
  byId("model").value = id;
  setText("model-facts", `${id} · ${model.backend}`);
  byId("steps").replaceChildren(...[...model.step_counts, "auto"].map(stepsChoice));
  byId("size").replaceChildren(...model.sizes.map((size) => element("option", { value: size }, size)));
  byId("size-field").hidden = model.sizes.length < 2;
  byId("frames-field").hidden = !model.frames;
  byId("draft-field").hidden = byId("draw").hidden = byId("edit").hidden = Boolean(model.frames);
  byId("draw").disabled = false;
  if (model.frames) closeDrawing();
  if (model.frames) {
    const { step, max_frames } = model.frames;
    Object.assign(byId("frames"), { min: 1, step, max: max_frames, value: model.frames.default });
  }
  byId("compare").disabled = byId("compare").hidden = model.step_counts.length < 2;
  chooseSteps(model.default_steps);
}

function stepsChoice(steps) {
  const input = element("input", { type: "radio", name: "steps", value: steps, autocomplete: "off" });
  return element("label", {}, input, element("span", {}, String(steps)));
}

const stepsInput = (steps) => byId("steps").querySelector(`[value="${CSS.escape(steps)}"]`);

function chooseSteps(steps) {
  const input = stepsInput(steps);
  if (input) input.checked = true; // a link may have a step count that this model does not have
  byId("budget-field").hidden = !stepsInput("auto").checked;
}

function rollSeed() {
  byId("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
}

function currentRequest() {
  if (byId("seed").value === "") rollSeed();
  const steps = byId("steps").querySelector(":checked").value;
  const budget = byId("budget").value;
  return {
    model: model.id,
    prompt: byId("prompt").value.trim(),
    ...(model.sizes.length > 1 && { size: byId("size").value }),
    seed: Number(byId("seed").value), // the server checks the range
    num_inference_steps: steps === "auto" ? steps : Number(steps),
    ...(steps === "auto" && budget !== "" && { latency_budget_ms: Number(budget) }),
    partial_images: isStroke() ? 0 : PARTIAL_IMAGES,
    ...drawnFields(),
    ...(model.frames
      ? { output_format: CLIP_FORMAT, num_frames: Number(byId("frames").value) || model.frames.default }
      : { output_format: OUTPUT_FORMAT, draft: byId("draft").checked && !isStroke() }),
  };
}

function applySettings({ model: id, prompt, size, seed, num_inference_steps, latency_budget_ms, num_frames, draft }) {
  if (id && id !== model.id && models.some((entry) => entry.id === id)) chooseModel(id);
  if (prompt !== undefined) byId("prompt").value = prompt;
  if (model.sizes.includes(size)) byId("size").value = size;
  if (seed !== undefined) {
    byId("seed").value = seed;
    byId("seed-lock").checked = true; // otherwise the next keystroke would replace it
  }
  byId("budget").value = latency_budget_ms ?? "";
  if (num_inference_steps !== undefined) chooseSteps(num_inference_steps);
  if (model.frames && num_frames !== undefined) byId("frames").value = num_frames;
  if (draft !== undefined) byId("draft").checked = draft;
}

// ---- Links: the settings in the fragment, which browsers do not send to servers ----

const LINKED = ["prompt", "seed", "num_inference_steps", "latency_budget_ms", "size", "num_frames", "model"];

function linkOf(request) {
  const linked = LINKED.filter((name) => request[name] !== undefined && (name !== "model" || models.length > 1));
  const link = `#${new URLSearchParams(linked.map((name) => [name, request[name]]))}`;
  return link.length <= MAX_LINK_LENGTH ? link : "";
}

function applyLink() {
  const settings = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  if (location.hash) applySettings(settings);
}

// ---- Making pictures ----

function generateSoon() {
  stopGenerating();
  timer = setTimeout(generate, DEBOUNCE_MS, { isTyped: true });
}

// Makes pictures of a drawing while it changes. They keep their seed, so that they do not flicker.
function follow() {
  if (!isDrawing()) {
    live.close();
    generate({ keepSeed: true, isTyped: true });
  } else if (isLiveServed && model && byId("prompt").value.trim()) {
    stopGenerating();
    byId("frame").ariaBusy = "true";
    live.send(currentRequest());
  } else {
    followOneByOne();
  }
}

const live = new Live({
  onPicture: (picture) => {
    byId("frame").ariaBusy = String(live.isBusy());
    finish(picture);
  },
  onPreview: display,
  onError: (error) => {
    byId("frame").ariaBusy = String(live.isBusy());
    showProblem(error, true);
  },
  onUnavailable: () => {
    isLiveServed = false;
    followOneByOne();
  },
});

async function followOneByOne() {
  isChanged = true;
  if (isFollowing) return;
  isFollowing = true;
  while (isChanged) {
    isChanged = false;
    await generate({ keepSeed: true, isTyped: true });
  }
  isFollowing = false;
}

const sizeToDraw = () => (model.sizes.length > 1 ? byId("size").value : model.sizes[0]);

function stopGenerating() {
  clearTimeout(timer);
  generation.abort();
  comparison.abort();
  byId("frame").ariaBusy = "false";
}

async function generate({ keepSeed = byId("seed-lock").checked, isTyped = false, isRetry = false } = {}) {
  stopGenerating();
  if (!model || !byId("prompt").value.trim()) return;
  const mine = (generation = new AbortController());
  if (!keepSeed) rollSeed();
  byId("frame").ariaBusy = "true";
  try {
    finish(await makePicture(currentRequest(), mine.signal, display), isTyped);
  } catch (error) {
    if (mine !== generation) return;
    if (shown) display(shown); // replaces previews of the failed picture
    showProblem(error, isRetry);
  } finally {
    if (mine === generation) byId("frame").ariaBusy = "false";
  }
}

function finish(picture, isTyped = true) {
  showProblem(null);
  addToHistory(picture, isTyped);
  show(picture);
  announce(`Ready in ${duration(picture.roundTripMs)}, ${countSteps(picture.answer.num_inference_steps)}.`);
  if (!byId("comparison").hidden) compareSteps();
}

async function compareSteps() {
  if (!model || !byId("prompt").value.trim()) return;
  comparison.abort();
  const mine = (comparison = new AbortController());
  const { latency_budget_ms, partial_images, draft, ...base } = currentRequest();
  const strip = byId("comparison-strip");
  byId("comparison").hidden = false;
  strip.ariaBusy = "true"; // old pictures stay until they are replaced, so that nothing jumps
  try {
    // One after another, so that no picture waits for another.
    for (const [index, num_inference_steps] of model.step_counts.entries()) {
      const picture = await makePicture({ ...base, num_inference_steps }, mine.signal);
      const caption = element("span", {}, element("b", {}, countSteps(num_inference_steps)),
        ` ${duration(picture.answer.timings.total_ms)}`);
      const item = element("li", {}, thumbnail(picture, caption));
      if (strip.children[index]) strip.children[index].replaceWith(item);
      else strip.append(item);
    }
    while (strip.children.length > model.step_counts.length) strip.lastChild.remove();
    strip.ariaBusy = "false";
    markShown();
    announce(`Compared ${model.step_counts.length} step counts.`);
  } catch (error) {
    if (mine === comparison) showProblem(error, true);
  }
}

// ---- Refusals ----

// Shows the server's message. A refusal with a retry time is retried once at that time; after that, the user can retry.
function showProblem(error, isRetry = false) {
  if (error?.name === "AbortError") return; // a newer request replaced it
  byId("refusal").hidden = !error;
  setText("error", error?.message ?? "");
  const waitMs = error?.retryAfterMs ?? null;
  const isWaiting = error?.status === 429 && waitMs !== null && !isRetry;
  const plan = isWaiting ? "; trying once more then" : "";
  setText("retry-note", waitMs === null ? "" : `The server has room in about ${duration(waitMs)}${plan}.`);
  byId("retry").hidden = !error || isWaiting || error.status === 400 || error.status === 401;
  if (isWaiting) timer = setTimeout(generate, waitMs, { keepSeed: true, isRetry: true });
  if (error?.status === 401) askForKey();
}

function askForKey() {
  byId("key-form").hidden = false;
  // Leave the focus in the prompt while the user types.
  if (document.activeElement !== byId("prompt")) byId("key").focus();
}

function takeKey(event) {
  event.preventDefault();
  setKey(byId("key").value.trim());
  byId("key").value = "";
  byId("key-form").hidden = true;
  byId("forget-key").hidden = false;
  tryAgain();
}

function tryAgain() {
  showProblem(null);
  if (model) generate({ keepSeed: true });
  else connect();
}

// ---- Showing pictures ----

const keyOf = ({ request }) => JSON.stringify(request);

function show(picture) {
  shown = picture;
  const { request, answer } = picture;
  display(picture);
  setText("warnings", answer.warnings.join(" "));
  showLatency(picture);
  const file = fileName(picture);
  Object.assign(byId("download"), { href: sourceOf(answer), download: file, ariaDisabled: "false" });
  showReceipt(answer.receipt, isClip(answer) ? file.replace(/webp$/, "mp4") : file);
  for (const id of ["copy-curl", "copy-python", "copy-link", "edit"]) byId(id).disabled = false;
  history.replaceState(null, "", linkOf(request) || location.pathname);
  markShown();
}

function display({ request, answer, previews }) {
  const last = answer ?? previews.at(-1);
  Object.assign(byId("picture"), { alt: request.prompt, hidden: false });
  showSource(last);
  const length = answer && isClip(answer) ? ` · ${answer.num_frames} frames` : "";
  setText("facts", answer
    ? `${answer.size}${length} · ${stepsOf(answer)} · seed ${answer.seed}`
    : last.is_draft ? "draft, taking the steps" : `expected after step ${last.num_steps_taken}`);
  showFilmstrip(answer ? [...previews, answer] : previews);
}

// An edit takes the last of its steps only.
function stepsOf({ num_inference_steps, num_steps_taken = num_inference_steps }) {
  const all = countSteps(num_inference_steps);
  return num_steps_taken < num_inference_steps ? `${num_steps_taken} of ${all}` : all;
}

const isClip = ({ num_frames }) => num_frames !== undefined;

// Shows a picture, preview or clip. Where motion is unwelcome a clip stands still until it is played.
async function showSource(event, isPlayed = !wantsStills.matches) {
  const isStill = isClip(event) && !isPlayed;
  byId("picture").src = sourceOf(event);
  byId("play").hidden = !isStill;
  byId("play").onclick = () => showSource(event, true);
  if (!isStill) return;
  const still = await stillOf(sourceOf(event));
  if (byId("picture").src === sourceOf(event)) byId("picture").src = still;
}

async function downloadMp4(event) {
  if (!shown || !isClip(shown.answer)) return; // the link itself has the picture
  event.preventDefault();
  try {
    const url = URL.createObjectURL(await fetchMp4(shown.request, shown.answer.seed));
    element("a", { href: url, download: fileName(shown).replace(/webp$/, "mp4") }).click();
    setTimeout(() => URL.revokeObjectURL(url), FEEDBACK_MS);
  } catch (error) {
    showProblem(error, true);
  }
}

const previewName = ({ is_draft, num_steps_taken }) => (is_draft ? "draft" : `step ${num_steps_taken}`);

// Shows a button for each preview, and one for the picture itself.
function showFilmstrip(events) {
  const buttons = events.map((event) => {
    const name = event.receipt === undefined ? previewName(event) : isClip(event) ? "clip" : "picture";
    const button = element("button", { type: "button", ariaPressed: String(event === events.at(-1)) },
      smallImage(event, { alt: "" }), name);
    button.addEventListener("click", () => {
      showSource(event);
      for (const other of buttons) other.ariaPressed = String(other === button);
    });
    return button;
  });
  byId("filmstrip").replaceChildren(...buttons.map((button) => element("li", {}, button)));
}

function showReceipt(receipt, file) {
  const rows = Object.entries(receipt).map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, Array.isArray(value) ? value.join(" x ") : String(value))));
  byId("receipt-fields").replaceChildren(...rows);
  setText("receipt-command", `tdm-generate --verify ${file}`);
  byId("receipt").hidden = false;
}

function fileName({ answer }) {
  const name = answer.receipt.prompt.toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 60).replace(/^-|-$/g, "");
  return `${name || "picture"}-seed${answer.seed}-steps${answer.num_inference_steps}.${answer.output_format}`;
}

// Returns a small image of an event. One of a clip stands still, so that a page of them does not flicker.
function smallImage(event, properties) {
  const image = element("img", properties);
  if (isClip(event)) stillOf(sourceOf(event)).then((still) => (image.src = still));
  else image.src = sourceOf(event);
  return image;
}

function thumbnail(picture, ...caption) {
  const { request, answer } = picture;
  const name = `${request.prompt}, ${countSteps(answer.num_inference_steps)}, seed ${answer.seed}`;
  const image = smallImage(answer, { alt: name, title: name });
  const button = element("button", { type: "button" }, image, ...caption);
  button.addEventListener("click", () => restore(picture));
  button.dataset.key = keyOf(picture);
  return button;
}

function markShown() {
  for (const button of document.querySelectorAll("#history button, #comparison-strip button")) {
    button.ariaCurrent = String(shown !== null && button.dataset.key === keyOf(shown));
  }
}

// ---- History ----

function addToHistory(picture, isTyped) {
  const key = keyOf(picture);
  const now = performance.now();
  const isTypedOver = ({ typedAtMs }) => isTyped && now - typedAtMs < TYPING_PAUSE_MS;
  pictures = pictures.filter((other, index) => keyOf(other) !== key && !(index === 0 && isTypedOver(other)));
  pictures.unshift(Object.assign(picture, { typedAtMs: isTyped ? now : -Infinity }));
  pictures.length = Math.min(pictures.length, HISTORY_LENGTH);
  byId("history-strip").replaceChildren(...pictures.map((entry) => element("li", {}, thumbnail(entry))));
  byId("history").hidden = false;
}

function restore(picture) {
  stopGenerating();
  showProblem(null);
  applySettings(picture.request);
  restoreDrawing(picture.request);
  show(picture);
  announce("Restored prompt, steps and seed.");
}

function restoreNeighbour(distance) {
  const neighbour = pictures[pictures.indexOf(shown) + distance];
  if (neighbour) restore(neighbour);
}

// ---- Copying ----

async function copyFrom(button, text) {
  const label = button.textContent;
  try {
    await copy(text);
    button.textContent = "Copied";
    announce("Copied.");
  } catch (error) {
    showProblem(new Error(`Copying failed: ${error.message}.`), true);
  }
  setTimeout(() => (button.textContent = label), FEEDBACK_MS);
}

function copyOnClick(id, textOf) {
  byId(id).addEventListener("click", ({ target }) => target.textContent === "Copied" || copyFrom(target, textOf()));
}

// ---- Health ----

async function checkHealth() {
  if (document.hidden) return;
  const { health, live, max_live } = await readReadiness(HEALTH_PERIOD_MS);
  byId("badge").dataset.health = health;
  setText("health", health);
  setText("load", live === undefined ? "" : ` · ${live}${max_live === undefined ? "" : ` of ${max_live}`} in flight`);
  // If the page was opened before the server was ready, start now.
  if (health === "ready" && !model && byId("key-form").hidden) await connect();
}

// ---- Keyboard ----

function pressShortcut(event) {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || !byId("shortcuts").checked) return;
  if (event.target.closest("textarea, select, input:not([type=radio], [type=checkbox])")) return;
  const press = SHORTCUTS.find(([key]) => key === event.key)?.[2];
  const steps = model && stepsInput(event.key === "a" ? "auto" : event.key);
  if (!press && !steps) return;
  event.preventDefault();
  if (press) press();
  else steps.click();
}

function writePrompt(event) {
  if (event.isComposing) return; // this Enter belongs to an input method
  if (event.key === "Escape") event.target.blur();
  if (event.key !== "Enter" || event.shiftKey) return;
  event.preventDefault();
  generate();
}

// ---- Start ----

function exampleChip(text) {
  const button = element("button", { type: "button" }, text);
  button.addEventListener("click", () => {
    byId("prompt").value = text;
    generate();
  });
  return element("li", {}, button);
}

function listen() {
  const on = (id, type, listener) => byId(id).addEventListener(type, listener);
  on("prompt", "input", (event) => event.isComposing || generateSoon());
  on("prompt", "compositionend", generateSoon);
  on("prompt", "keydown", writePrompt);
  on("make", "click", () => generate());
  on("retry", "click", tryAgain);
  on("dismiss", "click", () => {
    stopGenerating();
    showProblem(null);
  });
  on("steps", "change", ({ target }) => {
    chooseSteps(target.value);
    generate();
  });
  on("budget", "input", generateSoon);
  on("seed", "input", ({ target }) => {
    if (target.value === "") return stopGenerating(); // the user is about to type another seed
    byId("seed-lock").checked = true; // keep a typed seed
    generateSoon();
  });
  on("dice", "click", () => generate({ keepSeed: false }));
  on("size", "change", () => (isDrawing() ? openDrawing(sizeToDraw(), drawnFields().image) : generate()));
  on("draw", "click", () => openDrawing(sizeToDraw()));
  on("edit", "click", () => openDrawing(shown.answer.size, sourceOf(shown.answer)));
  watchDrawing(follow);
  on("draft", "change", () => generate());
  on("frames", "change", () => generate());
  on("download", "click", downloadMp4);
  on("model", "change", ({ target }) => {
    chooseModel(target.value);
    generate();
  });
  on("pixels", "change", ({ target }) => document.body.classList.toggle("pixels", target.checked));
  on("compare", "click", compareSteps);
  on("comparison-close", "click", () => {
    comparison.abort();
    byId("comparison").hidden = true;
    byId("compare").focus();
  });
  on("key-form", "submit", takeKey);
  on("forget-key", "click", () => {
    forgetKey();
    byId("forget-key").hidden = true;
  });
  copyOnClick("copy-curl", () => asCurl(shown.request, SERVER, getKey() !== null));
  copyOnClick("copy-python", () => asPython(shown.request, SERVER, getKey() !== null));
  copyOnClick("copy-link", () => location.href);
  document.addEventListener("keydown", pressShortcut);
  document.addEventListener("visibilitychange", checkHealth);
  addEventListener("hashchange", () => {
    if (model) applyLink(), generate();
  });
}

byId("examples").append(...EXAMPLES.map(exampleChip));
byId("shortcut-list").append(...SHORTCUTS.map(([key, what]) =>
  element("div", {}, element("dt", {}, element("kbd", {}, key)), element("dd", {}, what))));
byId("forget-key").hidden = getKey() === null;
listen();
checkHealth();
setInterval(checkHealth, HEALTH_PERIOD_MS);
