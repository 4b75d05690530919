// @ts-check
/** The form of system prompt and sampling: what is empty is not sent, so that the server's default holds. */

const NUM_ALTERNATIVES = 5;

export class Controls {
  /** @param {HTMLFormElement} form whose number fields have the request's names */
  constructor(form) {
    this.form = form;
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  /** The system prompt; empty for none. */
  get system() {
    return /** @type {HTMLTextAreaElement} */ (this.form.elements.namedItem("system")).value.trim();
  }

  /**
   * The sampling fields that are set.
   * @returns {Record<string, number> | null} null if one is out of its range; the browser has said so then
   */
  sampling() {
    if (!this.form.checkValidity()) {
      this.form.closest("details")?.setAttribute("open", "");
      this.form.reportValidity();
      return null;
    }
    const fields = [...this.form.querySelectorAll("input")].filter((input) => input.value !== "");
    return { top_logprobs: NUM_ALTERNATIVES, ...Object.fromEntries(fields.map((f) => [f.name, f.valueAsNumber])) };
  }
}
