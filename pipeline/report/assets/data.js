// What a page's script reads: one block of JSON, compressed, and arrays of numbers in it as base64.

/** The data of the page. Browsers of before 2023 cannot unpack it: the page then says what it says without a script. */
async function readData() {
  const packed = bytesOf(JSON.parse(document.getElementById("data").textContent));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

/** Numbers of 32 bits, little end first whatever the machine. */
function floatsOf(base64) {
  const view = new DataView(bytesOf(base64).buffer);
  return Float32Array.from({ length: view.byteLength / 4 }, (_, i) => view.getFloat32(4 * i, true));
}

/**
 * Responses of one policy to prompts of one split, prompt by prompt.
 * `starts` holds the first row of each prompt and, last, the number of rows; `columns` a Float32Array a name.
 */
function responsesOf(packed) {
  const starts = new Int32Array(packed.counts.length + 1);
  packed.counts.forEach((count, p) => { starts[p + 1] = starts[p] + count; });
  const columns = Object.fromEntries(Object.entries(packed.columns).map(([name, text]) => [name, floatsOf(text)]));
  return { ...packed, starts, columns, size: starts[starts.length - 1] };
}
