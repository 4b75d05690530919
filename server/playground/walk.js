// @ts-check
/**
 * Arrow keys over the children of an element: one of them is in the tab order, the keys hand this place on. Left and
 * right go to the neighbour, up and down to the nearest on the next line, Home and End to the first and the last.
 */

/** @param {HTMLElement} group */
export function walkWithKeys(group) {
  group.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const next = nextOf(event.key, /** @type {HTMLElement} */ (event.target), group);
    if (!next) return;
    event.preventDefault();
    next.focus();
  });
  // However focus comes (key, click, tap), the place in the tab order moves with it.
  group.addEventListener("focusin", (event) => {
    for (const former of group.querySelectorAll("[tabindex='0']")) /** @type {HTMLElement} */ (former).tabIndex = -1;
    /** @type {HTMLElement} */ (event.target).tabIndex = 0;
  });
}

/**
 * @param {string} key
 * @param {HTMLElement} from
 * @param {HTMLElement} group
 * @returns {HTMLElement | null}
 */
function nextOf(key, from, group) {
  /** @type {Record<string, () => Element | null>} */
  const steps = {
    ArrowLeft: () => from.previousElementSibling,
    ArrowRight: () => from.nextElementSibling,
    ArrowUp: () => onNextLine(from, (element) => element.previousElementSibling),
    ArrowDown: () => onNextLine(from, (element) => element.nextElementSibling),
    Home: () => group.firstElementChild,
    End: () => group.lastElementChild,
  };
  return /** @type {HTMLElement | null} */ (steps[key]?.() ?? null);
}

/**
 * The element of the next line that lies nearest below or above.
 * @param {Element} from
 * @param {(element: Element) => Element | null} step
 * @returns {Element | null}
 */
function onNextLine(from, step) {
  const start = from.getBoundingClientRect();
  let line = start.top;
  let [best, distance] = [/** @type {Element | null} */ (null), Infinity];
  for (let element = step(from); element; element = step(element)) {
    const box = element.getBoundingClientRect();
    if (Math.abs(box.top - start.top) < start.height / 2) continue;
    if (best && Math.abs(box.top - line) > start.height / 2) break;
    line = box.top;
    if (Math.abs(box.left - start.left) < distance) [best, distance] = [element, Math.abs(box.left - start.left)];
  }
  return best;
}
