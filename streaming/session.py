"""A conversation in the terminal: messages, and commands that begin with a slash."""

import dataclasses
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from streaming.engine.base import Engine, GenerationRequest
from streaming.errors import InvalidRequest
from streaming.events import FinishEvent
from streaming.printing import Printer, Reply, follow

HELP = """\
/help               this
/system TEXT        what the model is told before anything else; without TEXT, nothing
/set NAME VALUE     change a setting; without NAME, show all
/save FILE          write the conversation to a file
/load FILE          go on with a conversation from a file
/retry              have the last reply written again
/undo               take the last message and its reply back
/stats              how the last reply went
/exit               leave (Ctrl-D as well)
Enter sends, Alt-Enter begins a new line, Ctrl-C stops the reply."""

_KINDS: dict[str, Callable[[str], Any]] = {
    "max_new_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
    "stop": lambda value: (value,),
}


class Session:
    """Read messages, print replies, obey commands. Only replies go to standard output."""

    def __init__(
        self, engine: Engine, printer: Printer, sampling: dict[str, Any], *, system: str | None = None
    ) -> None:
        self._engine = engine
        self._printer = printer
        self._sampling = dict(sampling)
        self._system = system or ""
        self._messages: list[dict[str, Any]] = []
        self._finish: FinishEvent | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: say(HELP),
            "/system": self._set_system,
            "/set": self._set,
            "/save": self._save,
            "/load": self._load,
            "/retry": self._retry,
            "/undo": self._undo,
            "/stats": self._show_stats,
        }

    def run(self) -> int:
        """Hold the conversation; give the exit code."""
        if sys.stdin.isatty():
            say(f"{self._engine.model_id} · /help tells the commands")
        for text in _read_messages():
            command, _, argument = text.strip().partition(" ")
            if command == "/exit" or self._printer.is_closed:
                break
            if not command.startswith("/"):
                if text.strip():
                    self._messages.append({"role": "user", "content": text})
                    self._reply()
            elif command in self._commands:
                self._commands[command](argument.strip())
            else:
                say(f"There is no command {command}; /help tells those that there are.")
        return 0

    def _reply(self) -> None:
        """Have the model answer the last message; one that cannot be answered is taken back."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        try:
            request = GenerationRequest(messages=[*system, *self._messages], owner="terminal", **self._sampling)
            generation = self._engine.submit(request)
        except InvalidRequest as error:
            self._messages.pop()
            say(str(error))
            return
        if generation.n_dropped_messages:
            say(f"(The oldest {generation.n_dropped_messages} messages no longer fit and were left out.)")
        reply: Reply = follow(generation, self._printer)
        self._finish = reply.finish
        if reply.finish.reason == "error":
            say(reply.finish.error or "The model failed.")
        result = generation.result(0)
        self._messages.append({"role": "assistant", "content": result.text, "token_ids": result.token_ids})

    # Commands

    def _set_system(self, text: str) -> None:
        self._system = text
        say("The system prompt is set." if text else "There is no system prompt now.")

    def _set(self, argument: str) -> None:
        if not argument:
            defaults = dataclasses.asdict(self._engine.defaults)
            for name in _KINDS:
                own = self._sampling.get(name)
                say(f"{name} = {defaults.get(name, 'none') if own is None else own}")
            return
        name, _, value = argument.replace("-", "_", 1).partition(" ")
        name = name.replace("-", "_")
        if name not in _KINDS:
            say(f"There is no setting {name}; there are {', '.join(_KINDS)}.")
            return
        try:
            changed = {**self._sampling, name: _KINDS[name](value.strip())}
            GenerationRequest(prompt="", **changed)
        except InvalidRequest as error:
            say(str(error))
        except ValueError:
            say(f"{name} is a number, not {value.strip()!r}.")
        else:
            self._sampling = changed
            say(f"{name} = {value.strip()}")

    def _save(self, argument: str) -> None:
        if not argument:
            say("Say where: /save FILE")
            return
        content = {"model": self._engine.model_id, "system": self._system, "messages": self._messages}
        try:
            Path(argument).expanduser().write_text(json.dumps(content, ensure_ascii=False, indent=1), "utf-8")
        except OSError as error:
            say(f"{argument} cannot be written ({error.strerror}).")
        else:
            say(f"Saved {len(self._messages)} messages to {argument}.")

    def _load(self, argument: str) -> None:
        try:
            content = json.loads(Path(argument).expanduser().read_text("utf-8"))
            messages = [
                _checked(message, content.get("model") == self._engine.model_id) for message in content["messages"]
            ]
            system = str(content.get("system", ""))
        except OSError as error:
            say(f"{argument or 'The file'} cannot be read ({error.strerror}).")
        except (ValueError, TypeError, KeyError, AttributeError):
            say(f"{argument} holds no conversation that /save wrote.")
        else:
            self._messages, self._system = messages, system
            say(f"Loaded {len(messages)} messages from {argument}.")

    def _retry(self, _: str) -> None:
        if self._messages and self._messages[-1]["role"] == "assistant":
            self._messages.pop()
        if self._messages:
            self._reply()
        else:
            say("There is no reply to write again.")

    def _undo(self, _: str) -> None:
        if not self._messages:
            say("There is nothing to take back.")
            return
        while self._messages and self._messages.pop()["role"] != "user":
            pass
        say(f"Took the last message back; {len(self._messages)} are left.")

    def _show_stats(self, _: str) -> None:
        if self._finish is None:
            say("There is no reply yet.")
            return
        finish, timings = self._finish, self._finish.timings
        first = "no token" if timings.ttft_s is None else f"first token after {timings.ttft_s:.2f} s"
        pace = "" if timings.tokens_per_s is None else f", {timings.tokens_per_s:.1f} tokens/s"
        say(
            f"{finish.n_prompt_tokens} tokens read ({finish.n_reused_tokens} of them known from before), "
            f"{finish.n_generated_tokens} written, {first}{pace}, ended by {finish.reason}."
        )


def say(text: str) -> None:
    """Tell the person something that is no reply; a terminal gets it wrapped."""
    if sys.stderr.isatty():
        columns = shutil.get_terminal_size().columns
        text = "\n".join(textwrap.fill(line, columns) for line in text.split("\n"))
    print(text, file=sys.stderr, flush=True)


def _checked(message: dict[str, Any], keeps_ids: bool) -> dict[str, Any]:
    """Take a message from a file; its token ids mean something to the model that wrote them only."""
    role, content = message["role"], message["content"]
    if role not in ("user", "assistant") or not isinstance(content, str):
        raise ValueError(role)
    ids = message.get("token_ids") if keeps_ids else None
    return {"role": role, "content": content, **({"token_ids": [int(i) for i in ids]} if ids else {})}


def _read_messages() -> Iterator[str]:
    """Give what a person types, or the lines of a pipe, until the end of input."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def break_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        key_bindings=keys, multiline=True, prompt_continuation="  ", output=create_output(stdout=sys.stderr)
    )
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
