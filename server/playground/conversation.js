// @ts-check
/** A conversation as data: what is sent with the next question, and what is exported. Knows no page and no server. */

import { entropyOf, Means, Pace } from "./tokens.js";

/** @typedef {import("./tokens.js").Token} Token */
/** @typedef {import("./errors.js").Explanation} Explanation */

/** A question and its answer. */
export class Turn {
  /** @type {Token[]} */
  tokens = [];
  /** @type {Record<string, unknown>} the request's fields, without the messages */
  request = {};
  /** @type {string | null} */
  finishReason = null;
  /** @type {Record<string, unknown> | null} */
  usage = null;
  /** @type {Explanation | null} */
  error = null;
  isStopped = false;
  means = new Means();
  pace = new Pace();

  /** @param {string} question */
  constructor(question) {
    this.question = question;
  }

  /** @param {Token} token the next one of the answer */
  add(token) {
    this.tokens.push(token);
    this.means.add(token);
  }

  /** The answer's text. */
  get answer() {
    return this.tokens.map((token) => token.text).join("");
  }
}

/** All turns, and what holds for them. */
export class Conversation {
  /** @type {Turn[]} */
  turns = [];
  model = "";
  system = "";
  /** @type {string[]} names of the specialists, in the order of the weights */
  specialists = [];

  /**
   * What the model reads before it answers a turn: that question, and before it every turn that has an answer.
   * @param {Turn} current
   * @returns {{role: string, content: string}[]}
   */
  messages(current) {
    const before = this.turns.slice(0, this.turns.indexOf(current)).filter((turn) => turn.answer !== "");
    return [
      ...(this.system ? [{ role: "system", content: this.system }] : []),
      ...before.flatMap((turn) => [
        { role: "user", content: turn.question },
        { role: "assistant", content: turn.answer },
      ]),
      { role: "user", content: current.question },
    ];
  }

  /** Everything that is shown, for `JSON.stringify`; weights and log probabilities as the server gave them. */
  toJSON() {
    return {
      format: "ultrafuser-conversation-1",
      model: this.model,
      specialists: this.specialists,
      system: this.system,
      turns: this.turns.map((turn) => ({
        question: turn.question,
        request: turn.request,
        answer: turn.answer,
        finish_reason: turn.finishReason,
        stopped: turn.isStopped,
        error: turn.error,
        usage: turn.usage,
        mean: turn.means.weights,
        mean_entropy_nats: turn.means.entropy,
        drafted_share: turn.means.drafted,
        tokens_per_second: turn.pace.tokensPerSecond,
        tokens: turn.tokens.map(exported),
      })),
    };
  }
}

/** @param {Token} token */
function exported({ text, name, id, weights, drafted, logprob, top }) {
  const entropy = weights ? entropyOf(weights) : null;
  const shown = { text, token: name, token_id: id, gate_weights: weights, entropy_nats: entropy };
  return { ...shown, drafted, logprob, top_logprobs: top };
}
