// The latency panel: the time of each stage of a picture, and its latency budget.
import { byId, element, duration, setText } from "./page.js";

export function showLatency({ request, answer, roundTripMs }) {
  const { timings, predicted_ms, latency_budget_kept, is_cached } = answer;
  const budgetMs = request.latency_budget_ms;
  const how = is_cached ? " (cached)" : request.num_inference_steps === "auto" ? " (auto)" : "";
  setText("outcome-round-trip", duration(roundTripMs));
  setText("outcome-total", duration(timings.total_ms));
  setText("outcome-predicted", duration(predicted_ms));
  setText("outcome-steps", `${timings.steps_ms.length}${how}`);
  byId("outcome-budget-tile").hidden = budgetMs === undefined;
  byId("outcome-budget-tile").dataset.kept = latency_budget_kept;
  setText("outcome-kept", latency_budget_kept ? "Budget kept" : "Budget missed");
  setText("outcome-budget", duration(budgetMs ?? 0));
  const stages = stagesOf(timings, roundTripMs);
  showBar(stages, roundTripMs, budgetMs);
  byId("latency-legend").replaceChildren(...stages.map(legendRow));
}

// Returns [kind, label, ms] of each stage of the round trip.
function stagesOf(timings, roundTripMs) {
  const stages = [
    ["queue", "queue", timings.queue_ms],
    ["text", "text", timings.text_ms],
    ["image", "image", timings.image_ms],
    ...timings.steps_ms.map((ms, index) => [`step step-${index + 1}`, `step ${index + 1}`, ms]),
    ["decode", "decode", timings.decode_ms],
    ["encode", "encode", timings.encode_ms],
  ];
  // Time that the server spent between the stages, for example on previews.
  const betweenMs = timings.total_ms - stages.reduce((sum, [, , ms]) => sum + ms, 0);
  if (betweenMs >= 0.05) stages.push(["between", "between", betweenMs]);
  // The rest, which only the page can measure: the network, and HTTP and JSON at both ends.
  stages.push(["network", "network", Math.max(0, roundTripMs - timings.total_ms)]);
  return stages;
}

function showBar(stages, roundTripMs, budgetMs = 0) {
  const wholeMs = Math.max(roundTripMs, budgetMs);
  const parts = stages.filter(([, , ms]) => ms > 0).map(([kind, label, ms]) => {
    const part = element("span", { className: `stage ${kind}`, title: `${label}, ${duration(ms)}` });
    part.style.width = `${(100 * ms) / wholeMs}%`;
    return part;
  });
  if (budgetMs) {
    const mark = element("span", { className: "budget-mark", title: `budget, ${budgetMs} ms` });
    mark.style.left = `${(100 * budgetMs) / wholeMs}%`;
    parts.push(mark);
  }
  byId("latency-bar").replaceChildren(...parts);
}

function legendRow([kind, label, ms]) {
  const swatch = element("span", { className: `stage ${kind}`, ariaHidden: "true" });
  return element("li", {}, swatch, `${label} `, element("b", {}, duration(ms)));
}
