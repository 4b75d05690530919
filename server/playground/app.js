// @ts-check
/** The page: wires the parts together and runs one answer at a time. */

import { TurnView } from "./answer.js";
import { Api } from "./api.js";
import { TokenCard } from "./card.js";
import { Controls } from "./controls.js";
import { Conversation, Turn } from "./conversation.js";
import { ApiError, explain } from "./errors.js";
import { KeyDialog } from "./key.js";
import { MixPanel } from "./mix.js";
import { Aligner, Means, Pace, readTokens } from "./tokens.js";

/** @param {string} id */
const byId = (id) => /** @type {HTMLElement} */ (document.getElementById(id));
const log = byId("log");
const message = /** @type {HTMLTextAreaElement} */ (byId("message"));

class Playground {
  #api = new Api(document.baseURI);
  #card = new TokenCard(byId("card"));
  #controls = new Controls(/** @type {HTMLFormElement} */ (byId("controls")));
  #key = new KeyDialog(/** @type {HTMLDialogElement} */ (byId("key-dialog")), byId("key"));
  #mix = new MixPanel(document);
  #conversation = new Conversation();
  /** @type {AbortController | null} */
  #running = null;
  #isAtEnd = true;
  #model = "";

  start() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send(message.value.trim());
    });
    message.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send(message.value.trim());
    });
    for (const example of document.querySelectorAll(".example")) {
      example.addEventListener("click", () => this.#send(example.querySelector(".prompt")?.textContent ?? ""));
    }
    byId("stop").addEventListener("click", () => this.#running?.abort());
    byId("new").addEventListener("click", () => this.#clear());
    byId("export").addEventListener("click", () => this.#export());
    byId("reload").addEventListener("click", () => this.#connect());
    byId("key").addEventListener("click", () => this.#askForKey());
    new IntersectionObserver(([entry]) => (this.#isAtEnd = entry.isIntersecting), { rootMargin: "80px" }).observe(byId("end"));
    if (matchMedia("(max-width: 60rem), (max-height: 36rem)").matches) byId("settings").removeAttribute("open");
    if (matchMedia("(pointer: fine)").matches) message.focus();
    this.#connect();
  }

  /** Ask what is served; until that is known nothing can be sent. */
  async #connect() {
    byId("notice").hidden = true;
    try {
      const model = await this.#api.model();
      this.#model = model.id;
      byId("model").textContent = model.id;
      this.#name(model.specialists ?? []);
    } catch (error) {
      if (error instanceof ApiError && error.isAboutKey) return this.#askForKey(error);
      const { title, detail } = explain(error);
      byId("notice-text").textContent = `${title} ${detail}`;
      byId("notice").hidden = false;
    }
  }

  /** @param {string} question */
  #send(question) {
    const sampling = this.#controls.sampling();
    if (this.#running || !question || !sampling) return;
    const turn = new Turn(question);
    this.#conversation.turns.push(turn);
    const view = new TurnView(turn, this.#conversation.turns.length, this.#card, () => this.#conversation.specialists);
    byId("empty").hidden = true;
    log.insertBefore(view.root, byId("end"));
    message.value = "";
    this.#answer(turn, view, sampling);
  }

  /**
   * @param {Turn} turn
   * @param {TurnView} view
   * @param {Record<string, number>} sampling
   */
  async #answer(turn, view, sampling) {
    const running = new AbortController();
    const conversation = this.#conversation;
    this.#setRunning(running);
    conversation.system = this.#controls.system;
    conversation.model = this.#model;
    Object.assign(turn, { tokens: [], means: new Means(), pace: new Pace() });
    Object.assign(turn, { error: null, isStopped: false, finishReason: null, usage: null });
    turn.request = { ...(this.#model && { model: this.#model }), ...FIXED_FIELDS, ...sampling };
    view.begin();
    this.#mix.show(turn);
    this.#scroll(true);
    /** @type {unknown} */
    let failure = null;
    try {
      await this.#stream(turn, view, conversation, running.signal);
    } catch (error) {
      failure = error;
      turn.isStopped = running.signal.aborted;
      turn.error = turn.isStopped ? null : explain(error);
    }
    const retry = () => {
      const again = this.#controls.sampling();
      if (!this.#running && again) this.#answer(turn, view, again);
    };
    view.end(retry);
    if (this.#running !== running) return; // a new chat has begun in the meantime
    this.#setRunning(null);
    this.#scroll();
    byId("status").textContent = outcomeOf(turn, conversation.specialists);
    if (failure instanceof ApiError && failure.isAboutKey) this.#askForKey(failure, retry);
  }

  /**
   * @param {Turn} turn
   * @param {TurnView} view
   * @param {Conversation} conversation
   * @param {AbortSignal} signal
   */
  async #stream(turn, view, conversation, signal) {
    const aligner = new Aligner();
    const add = (/** @type {import("./tokens.js").Token[]} */ tokens) => {
      for (const token of tokens) {
        turn.add(token);
        view.add(token);
      }
      if (conversation === this.#conversation) this.#mix.show(turn);
      this.#scroll();
    };
    try {
      for await (const event of this.#api.chat({ ...turn.request, messages: conversation.messages(turn) }, signal)) {
        if (event.specialists) this.#name(event.specialists);
        if (event.usage) turn.usage = event.usage;
        for (const choice of event.choices) {
          turn.finishReason = choice.finish_reason ?? turn.finishReason;
          const tokens = readTokens(choice);
          turn.pace.push(tokens.length, performance.now());
          add(aligner.push(tokens, choice.delta.content ?? ""));
        }
      }
    } finally {
      add(aligner.finish());
    }
  }

  /** @param {string[]} specialists */
  #name(specialists) {
    this.#conversation.specialists = specialists;
    this.#mix.name(specialists);
    byId("no-specialists").hidden = specialists.length > 0;
  }

  /** @param {AbortController | null} running */
  #setRunning(running) {
    const hadFocus = document.activeElement === byId("stop");
    this.#running = running;
    byId("send").hidden = running !== null;
    byId("stop").hidden = running === null;
    if (running) byId("status").textContent = "Answering.";
    else if (hadFocus) message.focus();
  }

  /**
   * Keep the end in sight, unless the user reads elsewhere.
   * @param {boolean} [isWanted]
   */
  #scroll(isWanted = false) {
    const isWalking = document.activeElement?.classList.contains("token");
    if (isWanted || (this.#isAtEnd && !isWalking)) byId("end").scrollIntoView({ block: "end" });
  }

  #clear() {
    this.#running?.abort();
    this.#setRunning(null);
    this.#card.hide();
    const { specialists } = this.#conversation;
    this.#conversation = new Conversation();
    this.#conversation.specialists = specialists;
    for (const turn of log.querySelectorAll(".turn")) turn.remove();
    byId("empty").hidden = false;
    byId("status").textContent = "New chat.";
    this.#mix.show(new Turn(""));
    message.focus();
  }

  #export() {
    const text = JSON.stringify(this.#conversation, null, 1);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = `${this.#model || "conversation"}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  /**
   * @param {ApiError} [refusal] why it is asked for
   * @param {() => void} [retry] what was refused
   */
  #askForKey(refusal, retry) {
    this.#key.open(this.#api.key, refusal?.message ?? "", (key) => {
      this.#api.key = key;
      if (!this.#model) this.#connect();
      retry?.();
    });
  }
}

const FIXED_FIELDS = {
  stream: true,
  stream_options: { include_usage: true },
  gate_weights: true,
  drafted: true,
  logprobs: true,
  return_token_ids: true,
};

/**
 * What a screen reader is told once, at the end.
 * @param {Turn} turn
 * @param {string[]} specialists
 * @returns {string}
 */
function outcomeOf(turn, specialists) {
  const { weights } = turn.means;
  const parts = weights.map((weight, index) => `${specialists[index]} ${weight.toFixed(2)}`);
  if (turn.error) return turn.error.title;
  return `Answer ${turn.isStopped ? "stopped" : "complete"}: ${turn.tokens.length} tokens. Mean weights: ${parts.join(", ")}.`;
}

new Playground().start();
