"""A conversation in the terminal: `ultrafuser chat`. See docs/operations.md.

Puts the parts of `server/terminal/` together.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial

from prompt_toolkit import PromptSession
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from pydantic import model_validator

from ultrafuser.gating.commands.fields import CommandSettings
from ultrafuser.gating.commands.flags import parse_command
from ultrafuser.gating.commands.places import output_file
from ultrafuser.gating.errors import CommandError
from ultrafuser.gating.files import write_json_lines
from ultrafuser.server.settings import PREFIX
from ultrafuser.server.start.signals import EXIT_INTERRUPTED
from ultrafuser.server.terminal.chat_client import ChatClient, TurnError
from ultrafuser.server.terminal.demo_server import demo_server
from ultrafuser.server.terminal.dialogue import STOPPED, Answer, Dialogue
from ultrafuser.server.terminal.pieces import Aligner, Piece, mean_weights
from ultrafuser.server.terminal.screen import QUIET, Screen, keyboard_waits

PROMPT = "> "
KEY_VARIABLES = (f"{PREFIX}API_KEY", "OPENAI_API_KEY")
"""Where a key is looked for if none is given: the server's own (of several the first), then the official client's."""


class ChatSettings(CommandSettings):
    """One chat."""

    base_url: str = "http://127.0.0.1:8000/v1"
    """The server's OpenAI API."""

    demo: bool = False
    """Start a server of the demo for this chat, and end it afterwards."""

    model: str | None = None
    """Model to ask; default: the first that the server names."""

    api_key: str | None = None
    """Key that the server wants; default: ULTRAFUSER_API_KEY, else OPENAI_API_KEY."""

    @model_validator(mode="after")
    def _check(self) -> "ChatSettings":
        if self.demo and "base_url" in self.model_fields_set:
            raise CommandError("demo: starts a server of its own; leave --base-url out")
        return self


parse_settings = partial(
    parse_command,
    ChatSettings,
    prog="ultrafuser chat",
    usage="[--base-url URL | --demo] [options]",
    description="Chat in the terminal with a running server. Where in- or output is no terminal, all of the input is\n"
    "one message, and the answer ends the command.",
)
"""Reads the command line of `ultrafuser chat`, as `parse_command` does."""


def run(argv: Sequence[str], cache: str | None = None) -> int:
    """The command; returns the exit status: 0, or 1 if the one message of a pipe got no answer.

    Raises:
        CommandError: one line for the user.
        EngineStartError: the demo has not started.
    """
    settings = parse_settings(argv, cache)
    with demo_server(os.environ) if settings.demo else nullcontext(settings.base_url) as base_url:
        key = None if settings.demo else settings.api_key or _key_of(os.environ)
        client = ChatClient(base_url, key, settings.model)
        chat = Chat(client, Screen(client.specialists))
        if sys.stdin.isatty() and sys.stdout.isatty():
            chat.talk()
            return 0
        if not (text := _piped().strip("\n")):
            raise CommandError("no message: standard input is empty; write one into it, or chat in a terminal")
        try:
            finish_reason = chat.ask(text)
        except BrokenPipeError:  # whoever reads the answer has enough: `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at the end
            return 1
        return EXIT_INTERRUPTED if finish_reason == STOPPED else int(finish_reason is None)


def _piped() -> str:
    """All of standard input, UTF-8 whatever the locale, with or without a byte order mark."""
    try:
        with open(sys.stdin.fileno(), encoding="utf-8-sig", closefd=False) as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise CommandError(f"no message: standard input is not UTF-8 (byte {error.start + 1}); convert it") from error


def _key_of(environ: Mapping[str, str]) -> str | None:
    keys = (environ.get(name, "").partition(",")[0].strip() for name in KEY_VARIABLES)
    return next(filter(None, keys), None)


class Chat:
    """One conversation, at the keyboard or of one message."""

    def __init__(self, client: ChatClient, screen: Screen) -> None:
        self._client = client
        self._screen = screen
        self._dialogue = Dialogue()
        self._commands: Mapping[str, tuple[Callable[[str], bool | None], str]] = {
            "/system": (self._set_system, "TEXT: set the system prompt for what follows; without a text, none"),
            "/weights": (self._show_weights, "how much each specialist counted for the last answer"),
            "/save": (self._save, "FILE: write the conversation, with the gate's weights, as one line of JSON"),
            "/help": (self._help, "this list"),
            "/quit": (self._quit, "end; so does Ctrl-D"),
        }

    def talk(self) -> None:
        """Ask for messages, and answer them, until the user has enough."""
        self._screen.say(f"{self._client.model}; /help lists commands")
        self._screen.legend()
        session: PromptSession[str] = PromptSession(key_bindings=_key_bindings())
        while True:
            try:
                if self._take(session.prompt(PROMPT)):
                    return
            except KeyboardInterrupt:
                continue  # the line is given up
            except EOFError:
                return

    def ask(self, question: str) -> str | None:
        """Show the answer to a message as it comes; returns the reason of its end.

        None is a turn that has failed: it leaves nothing behind, neither the message nor what came of the answer.
        """
        pieces: list[Piece] = []
        try:
            finish_reason = self._stream(question, pieces)
        except KeyboardInterrupt:
            finish_reason = STOPPED
        except TurnError as error:
            begin = "\n" if pieces else ""
            self._screen.say(f"{begin}ultrafuser: {error}; the message is not kept in the conversation")
            return None
        self._screen.write("\n")
        if finish_reason != "stop":
            self._screen.say(f"[{finish_reason}]")
        answer = Answer(pieces, finish_reason)
        if answer.text:
            self._dialogue.turns.append((question, answer))
        else:
            self._screen.say("the answer is empty; the message is not kept in the conversation")
        return finish_reason

    def _stream(self, question: str, pieces: list[Piece]) -> str:
        """Show an answer and add its pieces; returns the reason of its end."""
        aligner, finish_reason = Aligner(), ""
        with closing(self._client.answer(self._dialogue.messages(question))) as events:
            for event in events:
                self._screen.write(event.thought, QUIET)
                if event.thought and not event.text:
                    pieces += [Piece("", token.weights) for token in event.tokens]
                else:
                    self._show(aligner.push(event.tokens, event.text), pieces)
                finish_reason = event.finish_reason or finish_reason
        self._show(aligner.finish(), pieces)
        return finish_reason

    def _show(self, new: Sequence[Piece], pieces: list[Piece]) -> None:
        for piece in new:
            pieces.append(piece)
            self._screen.piece(piece)

    def _take(self, text: str) -> bool | None:
        """Do what a line says, a command or a message; true ends the chat."""
        name, _, argument = text.partition(" ")
        if name in self._commands and "\n" not in text:
            return self._commands[name][0](argument.strip())
        if name.startswith("/") and name[1:].isalpha() and "\n" not in text:
            self._screen.say(f"{name}: no such command; /help lists them, a space in front makes it a message")
        elif text.strip():
            with keyboard_waits():
                self.ask(text)
        return False

    def _set_system(self, text: str) -> None:
        self._dialogue.system = text
        self._screen.say("the system prompt is set" if text else "there is no system prompt")

    def _show_weights(self, _: str) -> None:
        if not self._dialogue.turns:
            self._screen.say("there is no answer yet")
        elif mean_weights(pieces := self._dialogue.turns[-1][1].pieces):
            self._screen.weights(pieces)
        else:
            self._screen.say("this server tells no weights")

    def _save(self, name: str) -> None:
        try:
            if not name:
                raise CommandError("/save: name a file")
            path = output_file(name, "/save")
            if path.exists():
                raise CommandError(f"/save: {path} is there already; name another file")
            if not self._dialogue.turns:
                raise CommandError("/save: there is no answer yet")
            write_json_lines(path, [self._dialogue.as_json(self._client.model, self._client.specialists)])
            self._screen.say(f"written: {path}")
        except (CommandError, OSError) as error:
            self._screen.say(str(error))

    def _help(self, _: str) -> None:
        for name, (_command, text) in self._commands.items():
            self._screen.say(f"{name:8} {text}")
        self._screen.say("Ctrl-C stops an answer, Alt-Enter begins a new line, the arrow keys bring messages back")

    def _quit(self, _: str) -> bool:
        return True


def _key_bindings() -> KeyBindings:
    """Enter sends, also a pasted text of several lines, which comes as one; Alt-Enter is a new line."""
    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings
