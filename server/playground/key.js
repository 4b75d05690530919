// @ts-check
/** The dialog that asks for the API key. It hands the key on and forgets it; nothing is stored. */

export class KeyDialog {
  /** @type {(key: string) => void} */
  #then = () => {};

  /**
   * @param {HTMLDialogElement} dialog
   * @param {HTMLElement} button says whether there is a key
   */
  constructor(dialog, button) {
    this.dialog = dialog;
    this.button = button;
    this.field = /** @type {HTMLInputElement} */ (dialog.querySelector("input"));
    dialog.querySelector("form")?.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#done();
    });
    dialog.querySelector(".cancel")?.addEventListener("click", () => dialog.close());
    // The event comes late: the dialog may be open again, with a key to correct.
    dialog.addEventListener("close", () => dialog.open || (this.field.value = ""));
  }

  /**
   * @param {string} key the one in use
   * @param {string} reason why it is asked for; may be empty
   * @param {(key: string) => void} then gets the new one
   */
  open(key, reason, then) {
    this.#then = then;
    this.field.value = key;
    const told = /** @type {HTMLElement} */ (this.dialog.querySelector(".reason"));
    told.textContent = reason;
    told.hidden = reason === "";
    if (!this.dialog.open) this.dialog.showModal();
    this.field.select();
  }

  #done() {
    const key = this.field.value.trim();
    this.dialog.close();
    this.button.textContent = key ? "API key: set" : "API key";
    this.#then(key);
  }
}
