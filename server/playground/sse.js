// @ts-check
/**
 * Server-sent events out of a stream of bytes, as the HTML standard defines them. `EventSource` can neither POST nor
 * send a key, so the bytes of a `fetch` are read here. Knows no API.
 */

/** Takes text in pieces of any size and gives the data of the events that are complete. */
export class EventParser {
  #line = "";
  #endsInReturn = false;
  /** @type {string[]} */
  #data = [];

  /**
   * @param {string} text the next piece
   * @returns {string[]} data of the events that this piece completes
   */
  push(text) {
    // A "\n" after a piece that ended in "\r" belongs to the same line end.
    const rest = this.#endsInReturn && text.startsWith("\n") ? text.slice(1) : text;
    if (text) this.#endsInReturn = text.endsWith("\r");
    const lines = (this.#line + rest).split(/\r\n|\r|\n/);
    this.#line = lines.pop() ?? "";
    return lines.flatMap((line) => this.#take(line));
  }

  /**
   * @param {string} line
   * @returns {string[]}
   */
  #take(line) {
    if (line === "") {
      const event = this.#data.join("\n");
      const isThere = this.#data.length > 0;
      this.#data = [];
      return isThere ? [event] : [];
    }
    // A line that begins with a colon is a comment: it keeps the connection alive.
    const [, field, value] = /^([^:]*)(?:: ?(.*))?$/s.exec(line) ?? [];
    if (field === "data") this.#data.push(value ?? "");
    return [];
  }
}

/**
 * The data of a response body's events; a character may be split over two pieces of it.
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<string, void, void>}
 */
export async function* readEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  const parser = new EventParser();
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
