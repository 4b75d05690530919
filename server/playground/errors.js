// @ts-check
/** What can go wrong with a request, and how it is said in plain words. Knows no page. */

/** The server's answer was OpenAI's error object, as a response or as the last event of a stream. */
export class ApiError extends Error {
  /**
   * @param {number} status of HTTP; 0 where a stream had already begun
   * @param {{message?: string, param?: string | null, code?: string | null}} told
   * @param {string | null} [retryAfter] seconds
   */
  constructor(status, told, retryAfter = null) {
    super(told.message ?? "");
    this.status = status;
    this.param = told.param ?? null;
    this.code = told.code ?? null;
    this.retryAfter = retryAfter;
  }

  /** Whether a key is missing or wrong. */
  get isAboutKey() {
    return this.status === 401;
  }
}

/** No answer came. */
export class Unreachable extends Error {}

/** The stream ended before the answer did. */
export class BrokenOff extends Error {}

/**
 * @typedef {object} Explanation
 * @property {string} title one sentence in plain words
 * @property {string} detail the server's own words, or what to do; may be empty
 */

/**
 * @param {unknown} error
 * @returns {Explanation}
 */
export function explain(error) {
  if (error instanceof ApiError) return { title: titleOf(error), detail: error.message };
  if (error instanceof Unreachable) {
    return { title: "The server cannot be reached.", detail: "Is it still running? Try again in a moment." };
  }
  if (error instanceof BrokenOff) {
    return { title: "The answer broke off.", detail: "The connection ended before the answer did." };
  }
  return { title: "The page failed.", detail: String(error) };
}

/**
 * @param {ApiError} error
 * @returns {string}
 */
function titleOf(error) {
  if (error.isAboutKey) return "The server wants an API key.";
  if (error.code === "context_length_exceeded") return "The conversation is too long for the model. Start a new chat.";
  if (error.code === "engine_dead") return "The model has stopped; the server is about to end.";
  if (error.status === 404) return "The server does not have this model.";
  if (error.status === 413) return "The message is too large.";
  if (error.status === 429 || error.status === 503) {
    const when = error.retryAfter ? `in ${error.retryAfter} s` : "in a moment";
    return `The server has no room for this request now. Try again ${when}.`;
  }
  if (error.status >= 500 || error.status === 0) return "The server failed to answer.";
  return error.param ? `The server refuses the value of ${error.param}.` : "The server refuses this request.";
}
