// Server-sent events from a fetched body. EventSource can neither POST nor send a key.

// Yields {type, data}. An incomplete event at the end of the stream is dropped, as the standard requires.
export async function* readEvents(body) {
  let type = "";
  let data = [];
  for await (const line of readLines(body)) {
    if (line === "") {
      if (data.length) yield { type: type || "message", data: data.join("\n") };
      [type, data] = ["", []];
      continue;
    }
    const [, field, value] = /^([^:]*):? ?(.*)$/s.exec(line); // a comment has the field name ""
    if (field === "event") type = value;
    if (field === "data") data.push(value);
  }
}

async function* readLines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      // A carriage return at the end of a chunk may be half of a line break, so it waits for the next chunk.
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      yield* lines;
    }
  } finally {
    reader.cancel().catch(() => {}); // the reader may have stopped before the end
  }
}
