// @ts-check
/** How specialists and tokens look: classes, marks and words that several parts of the page share. */

const NUM_COLOURS = 7;
const NUM_LINES = 5;

/**
 * Classes of the specialist at this place: a colour, and an underline for those who see no colour. Pairs of both
 * repeat after 35.
 * @param {number} index
 * @returns {string[]}
 */
export function classesOf(index) {
  return [`colour-${index % NUM_COLOURS}`, `line-${index % NUM_LINES}`];
}

/**
 * A new element.
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {string} classes separated by spaces; may be empty
 * @param {(Node | string)[]} content strings become text, never markup
 * @returns {HTMLElementTagNameMap[K]}
 */
export function element(tag, classes, ...content) {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  made.append(...content);
  return made;
}

/**
 * A specialist's mark and name.
 * @param {string} name
 * @param {number} index
 * @returns {HTMLElement}
 */
export function nameTag(name, index) {
  const tag = element("span", "name-tag", name);
  tag.classList.add(...classesOf(index));
  return tag;
}

/**
 * The coloured part of a bar.
 * @param {number} index of the specialist
 * @param {number} share 0 to 1
 * @returns {HTMLElement}
 */
export function filled(index, share) {
  const part = element("span", "filled");
  part.classList.add(...classesOf(index));
  part.style.setProperty("--share", String(share));
  return part;
}

/**
 * A bar as long as a share of its place.
 * @param {number} index of the specialist
 * @param {number} share 0 to 1
 * @returns {HTMLElement}
 */
export function bar(index, share) {
  const whole = element("span", "bar", filled(index, share));
  whole.setAttribute("aria-hidden", "true");
  return whole;
}

/**
 * A text with its white space and control characters made visible.
 * @param {string} text
 * @returns {string}
 */
export function visible(text) {
  return text
    .replaceAll(" ", "\u2423")
    .replaceAll("\n", "\u21b5")
    .replaceAll("\t", "\u21e5")
    .replaceAll("\x7f", "\u2421")
    .replace(/[\0-\x1f]/g, (control) => String.fromCharCode(0x2400 + control.charCodeAt(0)));
}

/**
 * @param {number} weight
 * @returns {string}
 */
export function inDigits(weight) {
  return weight.toFixed(3);
}

/**
 * @param {number} perSecond
 * @returns {string} in two digits or more
 */
export function asSpeed(perSecond) {
  return `${perSecond.toFixed(perSecond < 10 ? 1 : 0)} tokens/s`;
}

/**
 * @param {number} share
 * @returns {string}
 */
export function inWholePercent(share) {
  return `${(100 * share).toFixed(0)} %`;
}

/**
 * @param {number} logprob
 * @returns {string} the probability
 */
export function inPercent(logprob) {
  return `${(100 * Math.exp(logprob)).toFixed(1)} %`;
}
