// @ts-check
/** One turn on the page: the question, the answer token by token, and below it what the answer was made of. */

import { asSpeed, classesOf, element, filled, inDigits, inWholePercent, nameTag } from "./marks.js";
import { CodeFences, leaderOf, strengthOf } from "./tokens.js";
import { walkWithKeys } from "./walk.js";

/** @typedef {import("./tokens.js").Token} Token */
/** @typedef {import("./conversation.js").Turn} Turn */
/** @typedef {import("./card.js").TokenCard} TokenCard */

const NO_GLYPH = /^[\p{Cc}\p{Cf}]*$/u;

export class TurnView {
  #fences = new CodeFences();
  /** @type {WeakMap<Element, Token>} */
  #tokens = new WeakMap();

  /**
   * @param {Turn} turn
   * @param {number} number from 1
   * @param {TokenCard} card
   * @param {() => string[]} specialists
   */
  constructor(turn, number, card, specialists) {
    this.turn = turn;
    this.specialists = specialists;
    this.answer = element("div", "answer");
    this.answer.setAttribute("role", "group");
    this.answer.setAttribute("aria-label", `Answer ${number}. Arrow keys walk over its tokens.`);
    this.foot = element("footer", "turn-foot");
    const question = element("div", "question", turn.question);
    this.root = element("article", "turn", element("h2", "unseen", `Question ${number}`), question, this.answer, this.foot);
    walkWithKeys(this.answer);
    this.#showCard(card);
  }

  /** Begin the answer: what was there of it is gone. */
  begin() {
    this.#fences = new CodeFences();
    this.answer.replaceChildren();
    this.foot.replaceChildren();
    this.root.setAttribute("aria-busy", "true");
  }

  /** @param {Token} token the next one */
  add(token) {
    const shown = spanOf(token, this.#fences.push(token.text));
    shown.tabIndex = this.answer.firstChild ? -1 : 0;
    this.#tokens.set(shown, token);
    this.answer.append(shown);
  }

  /** @param {() => void} retry called when the user wants a failed answer again */
  end(retry) {
    this.root.removeAttribute("aria-busy");
    const { error, means } = this.turn;
    /** @type {HTMLElement[]} */
    const parts = [];
    if (error) parts.push(failure(error, retry));
    if (means.count) parts.push(this.#mixture(), element("p", "facts", factsOf(this.turn)));
    this.foot.replaceChildren(...parts);
  }

  #mixture() {
    const { weights } = this.turn.means;
    const stack = element("div", "stack", ...weights.map((weight, index) => filled(index, weight)));
    stack.setAttribute("aria-hidden", "true");
    const names = this.specialists();
    const words = weights.map((weight, index) =>
      element("span", "part", nameTag(names[index] ?? "", index), ` ${inDigits(weight)}`),
    );
    return element("div", "mixture", stack, element("p", "", ...words));
  }

  /** @param {TokenCard} card */
  #showCard(card) {
    const show = (/** @type {Event} */ event) => {
      const shown = /** @type {HTMLElement} */ (event.target);
      const token = this.#tokens.get(shown);
      if (token) card.show(shown, token, this.specialists());
    };
    this.answer.addEventListener("pointerover", show);
    this.answer.addEventListener("focusin", show);
    this.answer.addEventListener("pointerout", () => card.leave());
    this.answer.addEventListener("focusout", () => card.leave());
  }
}

/**
 * @param {Token} token
 * @param {boolean} isCode
 * @returns {HTMLElement}
 */
function spanOf(token, isCode) {
  const shown = element("span", "token", token.text);
  if (token.weights) {
    shown.classList.add(...classesOf(leaderOf(token.weights)));
    shown.style.setProperty("--strength", strengthOf(token.weights).toFixed(3));
  }
  // These would have no place to point at: a mark stands for them that is no part of the text.
  if (/^\s*\n\s*$/.test(token.text)) shown.classList.add("line-end");
  else if (NO_GLYPH.test(token.text) && token.text !== "\t") shown.classList.add("silent");
  shown.classList.toggle("code", isCode);
  shown.classList.toggle("drafted", token.drafted);
  return shown;
}

/**
 * @param {Turn} turn
 * @returns {string}
 */
function factsOf(turn) {
  const { tokens, means, pace } = turn;
  const facts = [`${tokens.length} ${tokens.length === 1 ? "token" : "tokens"}${endOf(turn)}`];
  if (pace.tokensPerSecond !== null) facts.push(asSpeed(pace.tokensPerSecond));
  if (means.drafted) facts.push(`${inWholePercent(means.drafted)} drafted`);
  return facts.join(" · ");
}

/**
 * @param {Turn} turn
 * @returns {string}
 */
function endOf({ finishReason, isStopped, error }) {
  if (isStopped) return ", stopped by you";
  if (error) return ", not finished";
  return finishReason === "length" ? ", cut at the longest answer" : "";
}

/**
 * @param {import("./errors.js").Explanation} error
 * @param {() => void} retry
 */
function failure({ title, detail }, retry) {
  const again = element("button", "quiet retry", "Try again");
  again.type = "button";
  again.addEventListener("click", retry);
  const box = element("div", "failure", element("p", "", element("strong", "", title)));
  if (detail) box.append(element("p", "detail", detail));
  box.append(again);
  return box;
}
