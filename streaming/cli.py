"""The terminal: `complete` and `chat`. Text goes to standard output, everything else to standard error.

Nothing heavy is imported until the arguments are known to be right.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from streaming.engine.base import GenerationRequest
from streaming.errors import BrookError, InvalidRequest, ModelUnavailable
from streaming.settings import QUANTIZATIONS, device_name
from streaming.startup import collector_paused

if TYPE_CHECKING:
    from streaming.engine.local import LocalEngine

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130  # exit codes

SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; give the exit code."""
    options = _Parser().parse_args(arguments)
    sampling = {name: getattr(options, name) for name in SAMPLING if getattr(options, name) is not None}
    try:
        GenerationRequest(prompt="", **sampling)  # refuses what is out of range before the model loads
        text = _read_text(options.text)
    except InvalidRequest as error:
        return _refuse(f"--{error.field.replace('_', '-')}: {error}")
    except KeyboardInterrupt:
        return INTERRUPTED
    try:
        engine = _load(options)
    except ModelUnavailable as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED  # loading cannot be cancelled; its thread ends with the process
    try:
        return _run(options, sampling, text, engine)
    except InvalidRequest as error:
        return _refuse(str(error))
    except BrookError as error:
        print(error, file=sys.stderr)
        return FAILED
    finally:
        engine.close()


def _run(options: argparse.Namespace, sampling: dict[str, Any], text: str | None, engine: "LocalEngine") -> int:
    from streaming.printing import build_printer, follow
    from streaming.session import Session

    printer = build_printer(is_json=options.json, is_markdown=options.command == "chat", tee=options.tee)
    try:
        if text is None:
            return Session(engine, printer, sampling, system=options.system).run()
        if options.command == "chat":
            system = [{"role": "system", "content": options.system}] if options.system else []
            request = GenerationRequest(messages=[*system, {"role": "user", "content": text}], **sampling)
        else:
            # What a plain prompt has for a system prompt is text before it, which is not printed.
            request = GenerationRequest(prompt=f"{options.system}\n\n{text}" if options.system else text, **sampling)
            printer.show_prompt(text)
        reply = follow(engine.submit(request), printer)
    finally:
        failure = printer.close()
    if failure is not None:
        print(failure, file=sys.stderr)
    if reply.is_interrupted:
        return INTERRUPTED
    if reply.finish.reason == "error":
        print(reply.finish.error, file=sys.stderr)
        return FAILED
    return FAILED if failure is not None else DONE


def _load(options: argparse.Namespace) -> "LocalEngine":
    """Load the model, showing on standard error how far it is."""
    with collector_paused(), _ProgressLine(sys.stderr) as line:
        line.show("Loading the model")
        from streaming.engine.load import load_engine

        engine = load_engine(options.model, wait=False, device=options.device, quantize=options.quantize)
        try:
            while not engine.wait_ready(0.1):
                line.show(engine.status().detail)
        except ModelUnavailable:
            engine.close()
            raise
    return engine


class _ProgressLine:
    """One line that is written over, on a terminal; elsewhere a line for each stage that takes long."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._is_terminal = file.isatty()
        self._shown = ""
        self._began_s = time.monotonic()

    def __enter__(self) -> "_ProgressLine":
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_terminal:
            print("\r\x1b[K", end="", file=self._file, flush=True)

    def show(self, text: str) -> None:
        if self._is_terminal:
            if text and text != self._shown:
                print(f"\r\x1b[K{text} …", end="", file=self._file, flush=True)
                self._shown = text
        elif text.split(" · ")[0] not in ("", self._shown) and time.monotonic() - self._began_s > 2:
            self._shown = text.split(" · ")[0]
            print(f"{self._shown} …", file=self._file, flush=True)


def _read_text(text: str | None) -> str | None:
    if text != "-":
        return text
    return sys.stdin.read().removesuffix("\n")


def _refuse(reason: str) -> int:
    print(reason, file=sys.stderr)
    return REFUSED


class _Parser(argparse.ArgumentParser):
    """The arguments; what is wrong with them is said in one sentence."""

    def __init__(self, **kwargs: Any) -> None:
        if kwargs:  # a command's own parser
            super().__init__(**kwargs, allow_abbrev=False)
            return
        super().__init__(
            prog="python -m streaming",
            description="Stream a Hugging Face model's text to the terminal, a pipe or a file.",
            allow_abbrev=False,
        )
        commands = self.add_subparsers(dest="command", required=True, metavar="complete|chat")
        complete = commands.add_parser("complete", help="print a prompt and its continuation")
        complete.add_argument("text", metavar="PROMPT", help="text to continue; - reads standard input")
        chat = commands.add_parser("chat", help="print a reply; without a message, hold a conversation")
        chat.add_argument("text", metavar="MESSAGE", nargs="?", help="what to say; - reads standard input")
        for command in (complete, chat):
            _add_options(command)

    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, f"{message.removeprefix('argument ')}\n")


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="ID_OR_PATH", help="hub id, folder or .gguf file (default: SmolLM2-135M-Instruct)")
    add("--max-new-tokens", type=int, metavar="N", help="the most tokens to write (default: 256)")
    add("--temperature", type=float, metavar="T", help="0 always takes the likeliest token (default: the model's)")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that make up P (default: the model's)")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens, 0 for all (default: the model's)")
    add("--min-p", type=float, metavar="P", help="leave out tokens less than P times as likely as the likeliest")
    add("--repetition-penalty", type=float, metavar="R", help="above 1, what was said is less likely to come again")
    add("--seed", type=int, metavar="N", help="the same seed draws the same text (default: a fresh one)")
    add("--stop", nargs="+", action="extend", metavar="STRING", help="end before the first of these")
    add("--system", metavar="TEXT", help="what the model is told before anything else")
    add("--json", action="store_true", help="print events, one JSON object a line")
    add("--tee", metavar="FILE", help="write what is printed to this file as well")
    add("--quantize", choices=QUANTIZATIONS, default="auto", help="how weights are packed (default: auto)")
    add("--device", type=device_name, default="auto", help="auto, cpu, mps, cuda or cuda:N (default: auto)")
