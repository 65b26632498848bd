// The playground: words in, a picture out, and where the milliseconds went.
// Server text only ever reaches the page as text nodes and properties, never as markup.

const DEBOUNCE_MS = 150;
const HEALTH_PERIOD_MS = 5000;
const HISTORY_LENGTH = 24;
const OUTPUT_FORMAT = "png";
const EXAMPLES = [
  "a red heart",
  "a red heart left of a butterfly on a blue background",
  "a small cat at the top on a yellow background",
  "a big pizza on black",
  "a rocket above the crescent moon on a purple background",
];

const byId = (id) => document.getElementById(id);
const promptField = byId("prompt");
const stepsSlider = byId("steps");
const seedField = byId("seed");
const seedLock = byId("seed-lock");

let models = [];
let model = null; // the chosen entry of `models`; null until the server is ready
let shown = null; // the picture on display, as `render` returned it
let typingTimer = 0;
let generation = new AbortController();
let comparison = new AbortController();

// ---- Page vocabulary ----

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// Writing the same text again would make a screen reader repeat it.
function setText(id, text) {
  if (byId(id).textContent !== text) byId(id).textContent = text;
}

const announce = (text) => setText("status", text);
const milliseconds = (ms) => `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
const countSteps = (count) => `${count} step${count === 1 ? "" : "s"}`;

function reportError(error) {
  if (error.name === "AbortError") return; // a newer request took its place
  setText("error", error.message);
}

// ---- Server ----

async function callServer(path, options = {}) {
  const response = await fetch(path, options).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("The server cannot be reached.");
  });
  const text = await response.text();
  let body = null;
  try {
    body = JSON.parse(text);
  } catch {
    // A proxy in between may answer in HTML; the status says enough.
  }
  if (response.ok && body) return body;
  throw new Error(body?.error?.message ?? `The server answered HTTP ${response.status} without JSON.`);
}

async function render(request, signal) {
  const started = performance.now();
  const answer = await callServer("/v1/images/generations", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(request),
    signal,
  });
  const roundTripMs = performance.now() - started;
  const { b64_json, seed, num_inference_steps } = answer.data[0];
  return {
    // What the server says it used, so that copies reproduce this very picture.
    request: { ...request, seed, num_inference_steps },
    source: `data:image/${answer.output_format};base64,${b64_json}`,
    format: answer.output_format,
    size: answer.size,
    timings: answer.timings,
    warnings: answer.warnings ?? [],
    roundTripMs,
  };
}

async function checkHealth() {
  const options = { cache: "no-store", signal: AbortSignal.timeout(HEALTH_PERIOD_MS) };
  const health = await fetch("/ready", options)
    .then((response) => (response.ok ? "ready" : "not ready"), () => "unreachable");
  byId("health").dataset.health = health;
  setText("health", health);
  // A page opened before the server is up starts by itself once it is.
  if (health === "ready" && !model) await loadModels().catch(reportError);
}

// ---- Settings ----

async function loadModels() {
  models = (await callServer("/v1/models")).data;
  if (!models.length) throw new Error("The server lists no models.");
  byId("model").replaceChildren(...models.map(({ id }) => element("option", { value: id }, id)));
  byId("model-field").hidden = models.length < 2;
  chooseModel(models[0].id);
  generate();
}

function chooseModel(id) {
  model = models.find((entry) => entry.id === id);
  const counts = model.step_counts;
  byId("model").value = id;
  setText("model-name", id);
  // The slider walks positions in the list: a model may be trained for 1, 2 and 4 only.
  stepsSlider.max = counts.length - 1;
  const compare = byId("compare");
  stepsSlider.disabled = compare.disabled = compare.hidden = counts.length < 2;
  setText("compare", `Compare ${counts[0]} to ${counts.at(-1)} steps`);
  chooseSteps(model.default_steps);
}

function chooseSteps(count) {
  stepsSlider.value = model.step_counts.indexOf(count);
  describeSteps();
}

function describeSteps() {
  const count = model.step_counts[stepsSlider.value];
  stepsSlider.ariaValueText = countSteps(count);
  setText("steps-shown", String(count));
}

function rollSeed() {
  seedField.value = crypto.getRandomValues(new Uint32Array(1))[0];
}

function currentRequest() {
  if (seedField.value === "") rollSeed();
  return {
    model: model.id,
    prompt: promptField.value.trim(),
    seed: Number(seedField.value), // out of range is the server's to refuse, in its words
    num_inference_steps: model.step_counts[stepsSlider.value],
    output_format: OUTPUT_FORMAT,
  };
}

// ---- Making pictures ----

function generateSoon() {
  clearTimeout(typingTimer);
  typingTimer = setTimeout(generate, DEBOUNCE_MS);
}

async function generate({ keepSeed = seedLock.checked } = {}) {
  stopGenerating();
  if (!model) return announce("Waiting for the server.");
  if (!promptField.value.trim()) return announce("Type a prompt to make a picture.");
  const mine = (generation = new AbortController());
  if (!keepSeed) rollSeed();
  byId("frame").ariaBusy = "true";
  try {
    const picture = await render(currentRequest(), mine.signal);
    addToHistory(picture);
    show(picture);
    announce(`Ready in ${milliseconds(picture.roundTripMs)}.`);
  } catch (error) {
    reportError(error);
  } finally {
    if (mine === generation) byId("frame").ariaBusy = "false";
  }
}

function stopGenerating() {
  clearTimeout(typingTimer);
  generation.abort();
  byId("frame").ariaBusy = "false";
}

async function compareSteps() {
  const base = currentRequest();
  if (!base.prompt) return announce("Type a prompt to compare.");
  comparison.abort();
  const mine = (comparison = new AbortController());
  byId("comparison").hidden = false;
  byId("comparison-strip").replaceChildren();
  setText("comparison-facts", `${base.prompt}, seed ${base.seed}`);
  try {
    // One after another, so that no picture's time includes waiting for its neighbours.
    for (const count of model.step_counts) {
      const picture = await render({ ...base, num_inference_steps: count }, mine.signal);
      const caption = `${countSteps(count)}, ${milliseconds(picture.timings.total_ms)}`;
      byId("comparison-strip").append(thumbnail(picture, caption));
    }
    markShown();
    setText("error", "");
    announce(`Compared ${model.step_counts.length} step counts.`);
  } catch (error) {
    reportError(error);
  }
}

// ---- Showing pictures ----

const keyOf = (picture) => JSON.stringify(picture.request);

function show(picture) {
  shown = picture;
  const { prompt, seed, num_inference_steps: count } = picture.request;
  Object.assign(byId("picture"), { src: picture.source, alt: prompt, hidden: false });
  setText("facts", `${picture.size}, ${countSteps(count)}, seed ${seed}`);
  setText("error", "");
  setText("warnings", picture.warnings.join(" "));
  showLatency(picture);
  const name = prompt.toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 60);
  const download = `${name}-seed${seed}-steps${count}.${picture.format}`;
  Object.assign(byId("download"), { href: picture.source, download, ariaDisabled: "false" });
  byId("copy-curl").disabled = byId("copy-python").disabled = false;
  markShown();
}

function restore(picture) {
  stopGenerating();
  if (picture.request.model !== model.id) chooseModel(picture.request.model);
  promptField.value = picture.request.prompt;
  chooseSteps(picture.request.num_inference_steps);
  seedField.value = picture.request.seed;
  seedLock.checked = true; // otherwise the next keystroke would lose the restored seed
  show(picture);
  announce("Restored prompt, steps and seed.");
}

function thumbnail(picture, caption = "") {
  const { prompt, seed, num_inference_steps: count } = picture.request;
  const image = element("img", { src: picture.source, alt: prompt });
  const title = `${prompt}, ${countSteps(count)}, seed ${seed}`;
  const onclick = () => restore(picture);
  const button = element("button", { type: "button", title, onclick }, image, caption);
  button.dataset.key = keyOf(picture);
  return element("li", {}, button);
}

function addToHistory(picture) {
  const strip = byId("history-strip");
  const same = [...strip.children].find((item) => item.firstChild.dataset.key === keyOf(picture));
  same?.remove();
  strip.prepend(thumbnail(picture));
  while (strip.children.length > HISTORY_LENGTH) strip.lastChild.remove();
  byId("history").hidden = false;
}

function markShown() {
  for (const button of document.querySelectorAll(".strip button")) {
    button.ariaCurrent = String(shown !== null && button.dataset.key === keyOf(shown));
  }
}

// ---- Latency ----

function latencyStages({ timings, roundTripMs }) {
  const stages = [
    ["queue", "queue", timings.queue_ms],
    ["text", "text", timings.text_ms],
    ...timings.steps_ms.map((ms, index) => ["step", `step ${index + 1}`, ms]),
    ["decode", "decode", timings.decode_ms],
    ["encode", "encode", timings.encode_ms],
  ];
  // Whatever the server spent between its stages is shown, so that the bar adds up.
  const otherMs = timings.total_ms - stages.reduce((sum, [, , ms]) => sum + ms, 0);
  if (otherMs >= 0.05) stages.push(["other", "other", otherMs]);
  // Measured here: the way there and back, and HTTP and JSON at both ends.
  stages.push(["network", "network", Math.max(0, roundTripMs - timings.total_ms)]);
  return stages;
}

function showLatency(picture) {
  const stages = latencyStages(picture);
  const bars = stages.filter(([, , ms]) => ms > 0).map(([kind, , ms]) => {
    const bar = element("span", { className: `stage ${kind}` });
    bar.style.flexGrow = ms;
    return bar;
  });
  const rows = stages.map(([kind, label, ms]) => element("li", {},
    element("span", { className: `stage ${kind}`, ariaHidden: "true" }),
    `${label} `, element("b", {}, milliseconds(ms))));
  byId("latency-bar").replaceChildren(...bars);
  byId("latency-legend").replaceChildren(...rows);
  setText("latency-title", `Latency: ${milliseconds(picture.roundTripMs)} round trip`);
  byId("latency").hidden = false;
}

// ---- Copying ----

function asCurl(request) {
  const body = JSON.stringify(request).replaceAll("'", "'\\''"); // the shell's way to quote a quote
  return `curl -sS ${location.origin}/v1/images/generations \\
  -H 'Content-Type: application/json' \\
  --data '${body}' \\
  | jq -r '.data[0].b64_json' | base64 -d > picture.${request.output_format}\n`;
}

// JSON strings and numbers are Python literals too.
function asPython({ model, prompt, output_format, seed, num_inference_steps }) {
  return `import base64

from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(`${location.origin}/v1`)}, api_key="unused")
response = client.images.generate(
    model=${JSON.stringify(model)},
    prompt=${JSON.stringify(prompt)},
    output_format=${JSON.stringify(output_format)},
    extra_body={"seed": ${seed}, "num_inference_steps": ${num_inference_steps}},
)
with open("picture.${output_format}", "wb") as file:
    file.write(base64.b64decode(response.data[0].b64_json))\n`;
}

async function copy(text, what) {
  try {
    // Absent over plain HTTP to another machine, where browsers keep only the old way.
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else copyTheOldWay(text);
    announce(`Copied the ${what}.`);
  } catch (error) {
    reportError(new Error(`Copying failed: ${error.message}`));
  }
}

function copyTheOldWay(text) {
  const focused = document.activeElement;
  const field = element("textarea", { value: text, className: "offscreen" });
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  focused?.focus();
  if (!copied) throw new Error("the browser refused.");
}

// ---- Start ----

function exampleChip(text) {
  const onclick = () => {
    promptField.value = text;
    generate();
  };
  return element("li", {}, element("button", { type: "button", onclick }, text));
}

function listen() {
  const on = (id, type, listener) => byId(id).addEventListener(type, listener);
  on("prompt", "input", (event) => event.isComposing || generateSoon());
  on("prompt", "compositionend", generateSoon);
  on("prompt", "keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    generate();
  });
  on("steps", "input", () => {
    describeSteps();
    generateSoon();
  });
  on("seed", "input", () => {
    seedLock.checked = true; // a typed seed is meant to be used
    generateSoon();
  });
  on("dice", "click", () => generate({ keepSeed: false }));
  on("model", "change", (event) => {
    chooseModel(event.target.value);
    generate();
  });
  on("compare", "click", compareSteps);
  on("pixels", "change", (event) => document.body.classList.toggle("pixels", event.target.checked));
  on("copy-curl", "click", () => copy(asCurl(shown.request), "curl command"));
  on("copy-python", "click", () => copy(asPython(shown.request), "Python program"));
  document.addEventListener("visibilitychange", () => document.hidden || checkHealth());
}

byId("examples").append(...EXAMPLES.map(exampleChip));
listen();
checkHealth();
setInterval(() => document.hidden || checkHealth(), HEALTH_PERIOD_MS);
