// @ts-check
/** Tokens of an answer: read out of events, lined up with its text, and what their weights say. Knows no page. */

/**
 * @typedef {object} Alternative
 * @property {string} text
 * @property {number} logprob
 */

/**
 * @typedef {object} Token
 * @property {string} text what it adds to the answer; empty if it only begins a character, or ends the answer
 * @property {string} name its own text, whatever it adds
 * @property {number | null} id
 * @property {number[] | null} weights of the specialists
 * @property {boolean} drafted whether it was guessed ahead
 * @property {number | null} logprob
 * @property {Alternative[]} top the likeliest tokens in its place
 */

/**
 * The tokens of one choice of an event, without what they add to the answer.
 * @param {any} choice
 * @returns {Token[]}
 */
export function readTokens(choice) {
  const ids = choice.token_ids ?? [];
  const rows = choice.gate_weights?.content ?? [];
  const drafts = choice.drafted?.content ?? [];
  const entries = choice.logprobs?.content ?? [];
  return Array.from({ length: Math.max(ids.length, rows.length, entries.length) }, (_, index) => ({
    text: "",
    name: entries[index]?.token ?? "",
    id: ids[index] ?? null,
    weights: rows[index] ?? null,
    drafted: drafts[index] ?? false,
    logprob: entries[index]?.logprob ?? null,
    top: (entries[index]?.top_logprobs ?? []).map((/** @type {any} */ entry) => ({
      text: entry.token,
      logprob: entry.logprob,
    })),
  }));
}

/** @type {Token} */
const NO_TOKEN = { text: "", name: "", id: null, weights: null, drafted: false, logprob: null, top: [] };

/**
 * Gives each token its part of the answer's text.
 *
 * The text is the truth; a token's own text only says where its part ends. The two differ: tokens that begin a
 * character have no text of their own yet, tokens that end the answer are not shown, a tokenizer may drop a leading
 * space, and where a stop string could begin the text comes later than its tokens.
 */
export class Aligner {
  #text = "";
  /** @type {Token[]} */
  #waiting = [];

  /**
   * @param {Token[]} tokens of the next event
   * @param {string} text of the next event
   * @returns {Token[]} tokens whose part is certain now, in order
   */
  push(tokens, text) {
    this.#waiting.push(...tokens);
    this.#text += text;
    return this.#settle();
  }

  /** @returns {Token[]} the tokens that are left, once the answer has ended */
  finish() {
    const settled = this.#settle();
    const [first, ...others] = this.#waiting;
    if (first) settled.push({ ...first, text: this.#text }, ...others);
    else if (this.#text) settled.push({ ...NO_TOKEN, text: this.#text });
    this.#waiting = [];
    this.#text = "";
    return settled;
  }

  /** @returns {Token[]} */
  #settle() {
    /** @type {Token[]} */
    const settled = [];
    while (this.#waiting.length > 0 && this.#text !== "") {
      const length = this.#lengthOfFirst();
      if (length === null) break;
      const [token] = this.#waiting.splice(0, 1);
      settled.push({ ...token, text: this.#text.slice(0, length) });
      this.#text = this.#text.slice(length);
    }
    return settled;
  }

  /** @returns {number | null} length of the first waiting token's part; null if it cannot be known yet */
  #lengthOfFirst() {
    const [first, ...others] = this.#waiting;
    const end = endOf(this.#text, first.name);
    if (end !== null) return end;
    const [name, begun] = [first.name.trimStart(), this.#text.trimStart()];
    if (name.length > begun.length && name.startsWith(begun)) return null;
    // A later one fits: this one is not shown. None fits: the last one must be what is there.
    return others.length > 0 ? 0 : this.#text.length;
  }
}

/**
 * Where a token's part ends if the text begins with it, white space and broken characters aside.
 * @param {string} text
 * @param {string} name
 * @returns {number | null}
 */
function endOf(text, name) {
  const begin = name ? text.indexOf(name) : -1;
  return begin >= 0 && /^[\s\uFFFD]*$/.test(text.slice(0, begin)) ? begin + name.length : null;
}

/**
 * The specialist with the largest weight, the first of equals.
 * @param {number[]} weights
 * @returns {number}
 */
export function leaderOf(weights) {
  return weights.indexOf(Math.max(...weights));
}

/**
 * How far the leader is ahead: 0 at equal weights, 1 where it has all the weight.
 * @param {number[]} weights
 * @returns {number}
 */
export function strengthOf(weights) {
  const least = 1 / weights.length;
  return weights.length === 1 ? 1 : Math.max(0, (Math.max(...weights) - least) / (1 - least));
}

/**
 * Entropy of the weights in nats: 0 where one has all, the logarithm of their number where all are equal.
 * @param {number[]} weights
 * @returns {number}
 */
export function entropyOf(weights) {
  return weights.reduce((sum, weight) => (weight > 0 ? sum - weight * Math.log(weight) : sum), 0);
}

/** Running means over an answer's tokens. */
export class Means {
  count = 0;
  #drafted = 0;
  #entropy = 0;
  /** @type {number[]} */
  #weights = [];

  /** @param {Token} token */
  add({ weights, drafted }) {
    if (!weights) return;
    this.#drafted += drafted ? 1 : 0;
    this.#weights = weights.map((weight, index) => weight + (this.#weights[index] ?? 0));
    this.#entropy += entropyOf(weights);
    this.count += 1;
  }

  /** @returns {number[]} of each specialist; empty before the first token */
  get weights() {
    return this.#weights.map((sum) => sum / this.count);
  }

  /** @returns {number} nats */
  get entropy() {
    return this.count ? this.#entropy / this.count : 0;
  }

  /** @returns {number} share of the tokens that were guessed ahead */
  get drafted() {
    return this.count ? this.#drafted / this.count : 0;
  }
}

/** How fast an answer comes: its tokens behind the first event's, which waits for the prompt, over their time. */
export class Pace {
  #count = 0;
  /** @type {number | null} */
  #begin = null;
  #end = 0;

  /**
   * @param {number} numTokens of the next event
   * @param {number} milliseconds when it came
   */
  push(numTokens, milliseconds) {
    if (numTokens === 0) return;
    if (this.#begin === null) this.#begin = milliseconds;
    else this.#count += numTokens;
    this.#end = milliseconds;
  }

  /** @returns {number | null} null before the second event */
  get tokensPerSecond() {
    return this.#begin !== null && this.#end > this.#begin ? (1000 * this.#count) / (this.#end - this.#begin) : null;
  }
}

/** Follows a text and says which of its pieces are code: those between two lines of three backticks. */
export class CodeFences {
  #isOpen = false;
  #ticks = 0;

  /**
   * @param {string} piece the next piece
   * @returns {boolean}
   */
  push(piece) {
    const wasOpen = this.#isOpen;
    for (const character of piece) {
      this.#ticks = character === "`" ? this.#ticks + 1 : 0;
      if (this.#ticks === 3) this.#isOpen = !this.#isOpen;
    }
    return wasOpen || this.#isOpen;
  }
}
