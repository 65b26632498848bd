// The picture to change: a canvas to draw on, in the size of the picture to make.
import { byId, element } from "./page.js";

const STRENGTHS = [0.25, 0.5, 0.75, 1];
const DEFAULT_STRENGTH = 0.75;
const MAX_UNDO = 20;

let undone = []; // what the canvas showed before each stroke, the latest last
let isDown = false;
let onChange = () => {};

const canvas = () => byId("canvas");
const ink = () => canvas().getContext("2d");

export const isDrawing = () => !byId("drawing").hidden;
export const isStroke = () => isDown;

// Calls `changed` after each change, many times during a stroke.
export function watchDrawing(changed) {
  onChange = changed;
  byId("strength").replaceChildren(...STRENGTHS.map(strengthChoice));
  byId("strength").addEventListener("change", () => onChange());
  byId("drawing-close").addEventListener("click", () => closeDrawing());
  byId("undo").addEventListener("click", undo);
  byId("drawing-file").addEventListener("change", async ({ target }) => {
    const [file] = target.files;
    target.value = ""; // the same file may be opened again
    if (file) await openFile(file);
  });
  canvas().addEventListener("pointerdown", beginStroke);
  canvas().addEventListener("pointermove", goOn);
  for (const end of ["pointerup", "pointercancel"]) canvas().addEventListener(end, endStroke);
}

function strengthChoice(strength) {
  const checked = strength === DEFAULT_STRENGTH;
  const input = element("input", { type: "radio", name: "strength", value: strength, checked, autocomplete: "off" });
  return element("label", {}, input, element("span", {}, `${100 * strength} %`));
}

// Opens the canvas in a size such as "64x64", with a picture or empty.
export async function openDrawing(size, source) {
  const [width, height] = size.split("x").map(Number);
  Object.assign(canvas(), { width, height });
  undone = [];
  byId("drawing").hidden = false;
  fill("white");
  if (source) await draw(source);
  onChange();
}

export function closeDrawing() {
  if (!isDrawing()) return;
  byId("drawing").hidden = true;
  onChange();
}

// The fields of a request; none if the canvas is closed.
export function drawnFields() {
  if (!isDrawing()) return {};
  const strength = Number(byId("strength").querySelector(":checked").value);
  return { image: canvas().toDataURL("image/png"), strength };
}

// Shows a request's picture again. A request without one closes the canvas.
export async function restoreDrawing({ image, strength }) {
  byId("drawing").hidden = image === undefined;
  if (image === undefined) return;
  const picture = await loaded(image);
  Object.assign(canvas(), { width: picture.naturalWidth, height: picture.naturalHeight });
  ink().drawImage(picture, 0, 0);
  const choice = byId("strength").querySelector(`[value="${strength}"]`);
  if (choice) choice.checked = true;
}

async function openFile(file) {
  const source = URL.createObjectURL(file);
  try {
    keep();
    fill("white");
    await draw(source);
    onChange();
  } catch {
    undo();
  } finally {
    URL.revokeObjectURL(source);
  }
}

async function loaded(source) {
  const picture = new Image();
  picture.src = source;
  await picture.decode();
  return picture;
}

// Draws a picture over the whole canvas; what does not fit is cut off evenly.
async function draw(source) {
  const picture = await loaded(source);
  const { width, height } = canvas();
  const scale = Math.max(width / picture.naturalWidth, height / picture.naturalHeight);
  const [w, h] = [picture.naturalWidth * scale, picture.naturalHeight * scale];
  ink().drawImage(picture, (width - w) / 2, (height - h) / 2, w, h);
}

function fill(colour) {
  ink().fillStyle = colour;
  ink().fillRect(0, 0, canvas().width, canvas().height);
}

// ---- Strokes ----

function keep() {
  undone.push(ink().getImageData(0, 0, canvas().width, canvas().height));
  undone = undone.slice(-MAX_UNDO);
}

function undo() {
  const before = undone.pop();
  if (!before) return;
  ink().putImageData(before, 0, 0);
  onChange();
}

function placeOf({ clientX, clientY }) {
  const box = canvas().getBoundingClientRect();
  return [((clientX - box.left) / box.width) * canvas().width, ((clientY - box.top) / box.height) * canvas().height];
}

function beginStroke(event) {
  if (event.button !== 0) return;
  keep();
  isDown = true;
  canvas().setPointerCapture(event.pointerId);
  const shorter = Math.min(canvas().width, canvas().height);
  const width = (Number(byId("brush").value) / 100) * shorter;
  Object.assign(ink(), { strokeStyle: byId("colour").value, lineWidth: width, lineCap: "round", lineJoin: "round" });
  ink().beginPath();
  ink().moveTo(...placeOf(event));
  goOn(event);
}

function goOn(event) {
  if (!isDown) return;
  ink().lineTo(...placeOf(event));
  ink().stroke();
  onChange();
}

function endStroke() {
  if (!isDown) return;
  isDown = false;
  onChange();
}
