// Code for the copy buttons: the request, without the fields that only this page needs.
import { routeOf } from "./server.js";

export function asCurl(request, server, hasKey) {
  const { draft, partial_images, image, ...rest } = request;
  if (image !== undefined) return editAsCurl(rest, server, hasKey);
  const plain = rest.num_frames === undefined ? rest : { ...rest, output_format: "mp4" };
  const key = hasKey ? `  -H "Authorization: Bearer $TDM_API_KEY" \\\n` : "";
  const save = `import base64, json, sys
answer = json.load(sys.stdin)
if "error" in answer: sys.exit(answer["error"]["message"])
open("${nameOf(plain)}.${plain.output_format}", "wb").write(base64.b64decode(answer["data"][0]["b64_json"]))`;
  return `curl -sS ${server}${routeOf(plain)} \\
${key}  -H 'Content-Type: application/json' \\
  --data ${quoted(JSON.stringify(plain))} \\
  | python3 -c '${save}'\n`;
}

const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`; // the shell's way to quote a quote

// The picture to change is a file beside the command.
function editAsCurl(fields, origin, hasKey) {
  const key = hasKey ? `  -H "Authorization: Bearer $TDM_API_KEY" \\\n` : "";
  const parts = Object.entries(fields).map(([name, value]) => `  --form-string ${quoted(`${name}=${value}`)} \\\n`);
  return `curl -sS ${origin}/v1/images/edits -H 'Accept: image/png' \\
${key}  -F image=@given.png \\
${parts.join("")}  -o picture.png\n`;
}

const nameOf = ({ num_frames }) => (num_frames === undefined ? "picture" : "clip");

// JSON strings and numbers are Python literals too.
export function asPython(request, server, hasKey) {
  if (request.num_frames !== undefined) return clipAsPython(request, server, hasKey);
  const { draft, partial_images, model, prompt, output_format, size, image, ...sampling } = request;
  const [call, given] = image === undefined ? ["generate", ""] : ["edit", '    image=open("given.png", "rb"),\n'];
  const known = Object.entries({ model, prompt, output_format, size }).filter(([, value]) => value !== undefined);
  const lines = known.map(([name, value]) => `    ${name}=${JSON.stringify(value)},`);
  const extra = Object.entries(sampling).map(([name, value]) => `"${name}": ${JSON.stringify(value)}`).join(", ");
  return `import base64
${hasKey ? "import os\n" : ""}
from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(`${server}/v1`)}, api_key=${hasKey ? 'os.environ["TDM_API_KEY"]' : '"unused"'})
response = client.images.${call}(
${given}${lines.join("\n")}
    extra_body={${extra}},
)
with open("picture.${output_format}", "wb") as file:
    file.write(base64.b64decode(response.data[0].b64_json))\n`;
}

// The official client has no call that waits for a clip's answer. Its job of a clip has no latency budget.
function clipAsPython(request, server, hasKey) {
  const { draft, partial_images, latency_budget_ms, output_format, model, prompt, size, num_inference_steps, ...sampling } = request;
  const known = Object.entries({ model, prompt, size }).filter(([, value]) => value !== undefined);
  const steps = num_inference_steps === "auto" ? {} : { num_inference_steps };
  const extra = Object.entries({ ...sampling, ...steps }).map(([name, value]) => `"${name}": ${JSON.stringify(value)}`).join(", ");
  return `${hasKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(`${server}/v1`)}, api_key=${hasKey ? 'os.environ["TDM_API_KEY"]' : '"unused"'})
video = client.videos.create_and_poll(
${known.map(([name, value]) => `    ${name}=${JSON.stringify(value)},`).join("\n")}
    extra_body={${extra}},
)
client.videos.download_content(video.id).write_to_file("clip.mp4")\n`;
}

export async function copy(text) {
  // Browsers have `navigator.clipboard` only over HTTPS and on localhost.
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else copyTheOldWay(text);
}

function copyTheOldWay(text) {
  const focused = document.activeElement;
  const field = Object.assign(document.createElement("textarea"), { value: text, className: "offscreen" });
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  focused?.focus();
  if (!copied) throw new Error("the browser refused");
}
