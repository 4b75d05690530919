// @ts-check
/**
 * The card with one token's numbers, beside the token that is pointed at, tapped or focused. A focused token is
 * described by it, so that a screen reader reads it out.
 */

import { bar, element, inDigits, inPercent, nameTag, visible } from "./marks.js";
import { entropyOf } from "./tokens.js";

/** @typedef {import("./tokens.js").Token} Token */

const GAP_PX = 8;
const LINGER_MS = 120;

export class TokenCard {
  /** @type {HTMLElement | null} */
  #anchor = null;
  #timer = 0;

  /** @param {HTMLElement} box an empty element that is placed by its style */
  constructor(box) {
    this.box = box;
    box.addEventListener("pointerenter", () => clearTimeout(this.#timer));
    box.addEventListener("pointerleave", () => this.leave());
    window.addEventListener("scroll", () => this.#place(), { capture: true, passive: true });
    window.addEventListener("resize", () => this.#place());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.hide();
    });
  }

  /**
   * @param {HTMLElement} anchor
   * @param {Token} token
   * @param {string[]} specialists
   */
  show(anchor, token, specialists) {
    clearTimeout(this.#timer);
    if (this.#anchor !== anchor) {
      this.hide();
      this.#anchor = anchor;
      this.box.replaceChildren(...contentOf(token, specialists));
      anchor.setAttribute("aria-describedby", this.box.id);
      this.box.hidden = false;
    }
    this.#place();
  }

  /** Hide soon, unless the pointer comes to the card or to another token; a focused token keeps its card. */
  leave() {
    clearTimeout(this.#timer);
    this.#timer = window.setTimeout(() => {
      if (this.#anchor !== document.activeElement) this.hide();
    }, LINGER_MS);
  }

  /** Hide now. */
  hide() {
    clearTimeout(this.#timer);
    this.#anchor?.removeAttribute("aria-describedby");
    this.#anchor = null;
    this.box.hidden = true;
  }

  #place() {
    if (!this.#anchor) return;
    const [line] = this.#anchor.getClientRects();
    if (!line) return this.hide();
    const width = this.box.offsetWidth;
    const height = this.box.offsetHeight;
    const left = Math.max(GAP_PX, Math.min(line.left + line.width / 2 - width / 2, innerWidth - width - GAP_PX));
    const isRoomBelow = line.bottom + GAP_PX + height + GAP_PX <= innerHeight;
    const top = isRoomBelow ? line.bottom + GAP_PX : Math.max(GAP_PX, line.top - GAP_PX - height);
    this.box.style.setProperty("--left", `${Math.round(left)}px`);
    this.box.style.setProperty("--top", `${Math.round(top)}px`);
  }
}

/**
 * @param {Token} token
 * @param {string[]} specialists
 * @returns {HTMLElement[]}
 */
function contentOf(token, specialists) {
  const id = token.id === null ? "" : `token ${token.id}`;
  const head = element("p", "card-head", element("code", "", visible(token.name || token.text)), element("span", "", id));
  /** @type {HTMLElement[]} */
  const parts = [head];
  if (token.text === "") parts.push(element("p", "card-note", noteOn(token)));
  if (token.drafted) parts.push(element("p", "card-note", "Drafted: guessed ahead, then verified."));
  if (token.weights) parts.push(weightsOf(token.weights, specialists), factsOf(token.weights, token.logprob));
  if (token.top.length > 0) parts.push(alternativesOf(token));
  return parts;
}

/** @param {Token} token */
function noteOn(token) {
  return token.name === "" ? "Begins a character that the next token completes." : "Adds nothing to the text.";
}

/**
 * @param {number[]} weights
 * @param {string[]} specialists
 */
function weightsOf(weights, specialists) {
  const rows = weights.map((weight, index) =>
    element(
      "li",
      "",
      nameTag(specialists[index] ?? `${index + 1}`, index),
      bar(index, weight),
      element("span", "number", inDigits(weight)),
    ),
  );
  return element("ul", "card-weights", ...rows);
}

/**
 * @param {number[]} weights
 * @param {number | null} logprob
 */
function factsOf(weights, logprob) {
  const facts = element("p", "card-facts", `entropy ${inDigits(entropyOf(weights))} nats`);
  if (logprob !== null) facts.append(` · probability ${inPercent(logprob)}`);
  return facts;
}

/** @param {Token} token */
function alternativesOf(token) {
  const rows = token.top.map(({ text, logprob }) => {
    const row = element("li", "", element("code", "", visible(text) || "…"), element("span", "number", inPercent(logprob)));
    if (text === token.name && logprob === token.logprob) row.className = "drawn";
    return row;
  });
  return element("div", "card-top", element("h3", "", "Likeliest tokens"), element("ol", "", ...rows));
}
