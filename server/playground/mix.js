// @ts-check
/** The panel beside the conversation: the legend, what the latest answer's weights are in the mean, and how fast it
 * comes. */

import { asSpeed, bar, element, inDigits, inWholePercent, nameTag } from "./marks.js";

/** @typedef {import("./conversation.js").Turn} Turn */

export class MixPanel {
  /** @type {{filled: HTMLElement, number: HTMLElement}[]} */
  #rows = [];

  /** @param {Document} page */
  constructor(page) {
    this.list = /** @type {HTMLElement} */ (page.getElementById("specialists"));
    this.count = /** @type {HTMLElement} */ (page.getElementById("num-tokens"));
    this.entropy = /** @type {HTMLElement} */ (page.getElementById("entropy"));
    this.entropyBar = /** @type {HTMLElement} */ (page.getElementById("entropy-bar"));
    this.speed = /** @type {HTMLElement} */ (page.getElementById("speed"));
    this.drafted = /** @type {HTMLElement} */ (page.getElementById("drafted"));
    this.draftedShare = /** @type {HTMLElement} */ (page.getElementById("drafted-share"));
    this.most = /** @type {HTMLElement} */ (page.getElementById("entropy-most"));
  }

  /** @param {string[]} names of the specialists */
  name(names) {
    if (names.length === this.#rows.length) return;
    this.#rows = [];
    const rows = names.map((name, index) => {
      const number = element("span", "number", "–");
      const line = bar(index, 0);
      this.#rows.push({ filled: /** @type {HTMLElement} */ (line.firstElementChild), number });
      return element("li", "", nameTag(name, index), number, line);
    });
    this.list.replaceChildren(...rows);
    this.most.textContent = inDigits(Math.log(names.length));
  }

  /** @param {Turn} turn whose answer is shown */
  show({ means, pace }) {
    const weights = means.weights;
    this.#rows.forEach(({ filled, number }, index) => {
      const weight = weights[index];
      filled.style.setProperty("--share", String(weight ?? 0));
      number.textContent = weight === undefined ? "–" : inDigits(weight);
    });
    const most = Math.log(Math.max(2, this.#rows.length));
    this.count.textContent = means.count ? String(means.count) : "–";
    this.entropy.textContent = means.count ? inDigits(means.entropy) : "–";
    this.entropyBar.style.setProperty("--share", String(means.entropy / most));
    this.speed.textContent = pace.tokensPerSecond === null ? "–" : asSpeed(pace.tokensPerSecond);
    this.drafted.hidden = means.drafted === 0;
    this.draftedShare.textContent = inWholePercent(means.drafted);
  }
}
