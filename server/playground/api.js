// @ts-check
/** The server's API as the page uses it. The key lives in this object and nowhere else. Knows no page. */

import { ApiError, BrokenOff, Unreachable } from "./errors.js";
import { readEvents } from "./sse.js";

/**
 * @typedef {object} Model
 * @property {string} id
 * @property {string[]} [specialists]
 */

export class Api {
  /** @param {string} base address of the page; the API lies beside it, whatever prefix a proxy has put before both */
  constructor(base) {
    this.base = base;
    this.key = "";
  }

  /**
   * The model that is served.
   * @returns {Promise<Model>}
   */
  async model() {
    const response = await this.#fetch("v1/models", {});
    return (await response.json()).data[0];
  }

  /**
   * The events of a streamed answer.
   * @param {object} body of the request
   * @param {AbortSignal} signal ends the request, on the server too
   * @returns {AsyncGenerator<any, void, void>}
   */
  async *chat(body, signal) {
    const response = await this.#fetch("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
    if (!response.body) throw new BrokenOff();
    try {
      for await (const data of readEvents(response.body)) {
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(0, event.error);
        yield event;
      }
    } catch (error) {
      if (error instanceof ApiError || signal.aborted) throw error;
    }
    throw new BrokenOff();
  }

  /**
   * @param {string} path relative to the page
   * @param {RequestInit} init
   * @returns {Promise<Response>} a good one
   */
  async #fetch(path, init) {
    const headers = new Headers({ "Content-Type": "application/json" });
    if (this.key) headers.set("Authorization", `Bearer ${this.key}`);
    let response;
    try {
      response = await fetch(new URL(path, this.base), { ...init, headers, credentials: "omit", cache: "no-store" });
    } catch (error) {
      throw init.signal?.aborted ? error : new Unreachable();
    }
    if (!response.ok) throw await errorOf(response);
    return response;
  }
}

/**
 * @param {Response} response
 * @returns {Promise<ApiError>}
 */
async function errorOf(response) {
  const text = await response.text().catch(() => "");
  let told = { message: `${response.status} ${response.statusText}` };
  try {
    told = JSON.parse(text).error ?? told;
  } catch {
    // Something between the page and the server has answered in its own way; the status says enough.
  }
  return new ApiError(response.status, told, response.headers.get("Retry-After"));
}
