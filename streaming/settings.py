"""Every option of the app, in one place: a flag, its environment twin `BROOK_<FLAG>`, its default, one line of help.

A flag wins over its twin. Nothing heavy is imported here: `--help` and a wrong flag answer at once.
"""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import platformdirs

ENGINES = ("auto", "local", "batched", "remote")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("auto", "none", "int4")
SHARED_GRACE_S = 15.0
SPACE_DISK = Path("/data")
"""Where a Space has its persistent disk, if it has one."""

_SWITCHES = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True, slots=True)
class Settings:
    """What the app was asked to do.

    `models` are those that can be chosen on the page, the first one at the start; empty is the default model.
    `model_memory` and `cache_memory` count MB; None leaves them to what is free. `trust_remote_code` lets code run that
    comes with a model.
    `base_url` is there with the remote engine alone; `api_key_env` names the variable that holds that server's key.
    `auth` holds (user, password) pairs, `api_key` the keys of the API; both stay out of the repr.
    `grace` counts the seconds that a reply goes on when nobody watches it.
    `data_dir` is for what cannot be had again, such as conversations, `cache_dir` for what can. `space` says that this
    is a Hugging Face Space.
    """

    models: tuple[str, ...] = ()
    model_memory: int | None = None
    trust_remote_code: bool = False
    engine: str = "auto"
    base_url: str | None = None
    api_key_env: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantize: str = "auto"
    cache_memory: int | None = None
    max_active: int = 16
    max_queued: int = 128
    host: str = "127.0.0.1"
    port: int = 7860
    share: bool = False
    auth: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    api_key: tuple[str, ...] = field(default=(), repr=False)
    grace: float = 60.0
    data_dir: Path = field(default_factory=lambda: platformdirs.user_data_path("brook"))
    cache_dir: Path = field(default_factory=lambda: platformdirs.user_cache_path("brook"))
    offline: bool = False
    space: bool = False

    @property
    def is_public(self) -> bool:
        """Whether strangers can reach the app from anywhere."""
        return self.share or self.space

    @property
    def server(self) -> str | None:
        """The remote engine's server, as it is shown to people."""
        return None if self.base_url is None else urlsplit(self.base_url).netloc

    @property
    def is_shared(self) -> bool:
        """Whether others than its owner are to reach the app: from other machines, or with passwords or keys."""
        is_home = self.host in ("127.0.0.1", "localhost", "::1")
        return self.is_public or not is_home or bool(self.auth or self.api_key)


def load_settings(arguments: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> Settings:
    """Read the flags (`sys.argv` by default) and their twins (`os.environ` by default).

    A wrong value ends the process with exit code 2 and one sentence on standard error.
    """
    environment = os.environ if environment is None else environment
    # A Space is reached through a proxy outside its container.
    on_space = "SPACE_ID" in environment
    host = "0.0.0.0" if on_space else "127.0.0.1"
    parser = _Parser(host)
    options: dict[str, Any] = {"host": host, **parser.parse_with_twins(arguments, environment)}
    parser.check_remote(options, environment)
    if "data_dir" in options:
        options["cache_dir"] = options["data_dir"] / "cache"
    elif on_space and os.access(SPACE_DISK, os.W_OK):
        options["data_dir"] = SPACE_DISK / "brook"
    if on_space or options.get("share"):  # strangers come and go
        options.setdefault("grace", SHARED_GRACE_S)
    for name in ("models", "auth", "api_key"):
        options[name] = tuple(options.get(name, ()))
    return Settings(**options, space=on_space)


class _Parser(argparse.ArgumentParser):
    """An argument parser that leaves out what was not given, and says what is wrong in one sentence."""

    def __init__(self, host: str) -> None:
        super().__init__(
            prog="app.py",
            description="Chat with a Hugging Face model in the browser, token by token.",
            epilog="Every flag has an environment twin, which it wins over: --data-dir is BROOK_DATA_DIR. The twin "
            "of a flag that can be repeated takes values separated by commas, that of a flag without a value 1 or 0.",
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        self._twin = ""
        self._flags = [
            self.add_argument("--model", dest="models", metavar="ID_OR_PATH", action="append", type=_text,
                help="hub id, folder or .gguf file; repeated, a menu of them (default: SmolLM2-135M-Instruct)"),
            self.add_argument("--model-memory", metavar="MB", type=_megabytes,
                help="memory for all loaded models; the one used longest ago leaves (default: what is free)"),
            self.add_argument("--trust-remote-code", action="store_true",
                help="let code run that comes with a model (default: off)"),
            self.add_argument("--engine", choices=ENGINES,
                help="local serves one request at a time, batched many at once (default: auto, which is batched), "
                "remote asks another machine's server"),
            self.add_argument("--base-url", metavar="URL", type=_url,
                help="where the remote engine's server has OpenAI's API (default: none)"),
            self.add_argument("--api-key-env", metavar="NAME", type=_text,
                help="variable that holds that server's key (default: no key)"),
            self.add_argument("--device", type=device_name,
                help="auto, cpu, mps, cuda or cuda:N (default: auto, the fastest there is)"),
            self.add_argument("--dtype", choices=DTYPES,
                help="how weights are held (default: auto, the fastest on the device)"),
            self.add_argument("--quantize", choices=QUANTIZATIONS,
                help="how weights are packed (default: auto, what suits model and device)"),
            self.add_argument("--cache-memory", metavar="MB", type=_megabytes,
                help="memory for what was read before, 0 for none (default: a quarter of the free, at most 2048)"),
            self.add_argument("--max-active", metavar="N", type=_count,
                help="requests of one person at a time, waiting or running, 0 for any number (default: 16)"),
            self.add_argument("--max-queued", metavar="N", type=_count,
                help="requests of all people that may wait, 0 for any number (default: 128)"),
            self.add_argument("--host", type=_text,
                help=f"address to listen on, 0.0.0.0 for all (default: {host})"),
            self.add_argument("--port", type=_port,
                help="port to listen on, 0 for any free one (default: 7860)"),
            self.add_argument("--share", action="store_true",
                help="also open a public link through Gradio's relay (default: off)"),
            self.add_argument("--auth", metavar="USER:PASSWORD", action="append", type=_user_and_password,
                help="let only this user in; can be repeated (default: everyone)"),
            self.add_argument("--api-key", metavar="KEY", action="append", type=_api_key,
                help="let programs with this key use /v1; can be repeated (default: programs on this machine alone)"),
            self.add_argument("--grace", metavar="SECONDS", type=_seconds,
                help="how long a reply goes on when nobody watches it (default: 60; 15 where shared)"),
            self.add_argument("--data-dir", metavar="DIR", type=_folder,
                help="folder for all that Brook keeps (default: the system's own for data and caches)"),
            self.add_argument("--offline", action="store_true", help="never touch the network (default: off)"),
        ]  # fmt: skip

    def parse_with_twins(self, arguments: Sequence[str] | None, environment: Mapping[str, str]) -> dict[str, Any]:
        """Parse the flags, then the twins of those that were not given, by the same rules."""
        options = vars(self.parse_args(arguments))
        for flag in self._flags:
            name = flag.option_strings[0]
            self._twin = "BROOK_" + name.removeprefix("--").replace("-", "_").upper()
            value = environment.get(self._twin, "")
            if value and flag.dest not in options:
                options |= vars(self.parse_args(self._spell_out(flag, name, value)))
        return options

    def check_remote(self, options: dict[str, Any], environment: Mapping[str, str]) -> None:
        """Refuse a remote engine without its server, and a server without the remote engine."""
        self._twin = ""
        is_remote, variable = options.get("engine") == "remote", options.get("api_key_env")
        if is_remote != ("base_url" in options):
            self.error("argument --base-url: goes with --engine remote, neither without the other")
        if variable is not None and not is_remote:
            self.error("argument --api-key-env: goes with --engine remote")
        if variable is not None and not environment.get(variable):
            self.error(f"argument --api-key-env: there is no variable {variable} in the environment")

    def _spell_out(self, flag: argparse.Action, name: str, value: str) -> list[str]:
        if flag.nargs == 0:
            if value.lower() not in _SWITCHES:
                self.error(f"{name}: must be 1 or 0, not {value!r}")
            return [name] if _SWITCHES[value.lower()] else []
        parts = value.split(",") if flag.dest in ("models", "auth", "api_key") else [value]
        return [f"{name}={part.strip()}" for part in parts]

    def error(self, message: str) -> NoReturn:
        name, separator, rest = message.removeprefix("argument ").partition(": ")
        self.exit(2, f"{self._twin or name}{separator}{rest}\n")


def _text(value: str) -> str:
    if not value.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return value


def device_name(value: str) -> str:
    """Check the name of a device, for argparse."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, mps, cuda or cuda:N, not {value!r}")
    return value


def _url(value: str) -> str:
    if not re.fullmatch(r"https?://[^/@\s]+(/[^@\s]*)?", value):  # nor this value, which may hold a password
        raise argparse.ArgumentTypeError("must be an address such as http://127.0.0.1:8000/v1, without a user")
    return value


def _port(value: str) -> int:
    if not value.isascii() or not value.isdigit() or int(value) > 65535:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 65535, not {value!r}")
    return int(value)


def _megabytes(value: str) -> int:
    if not value.isascii() or not value.isdigit() or int(value) > 2**40:
        raise argparse.ArgumentTypeError(f"must be a whole number of megabytes, not {value!r}")
    return int(value)


def _seconds(value: str) -> float:
    if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]+)?", value):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, not {value!r}")
    return float(value)


def _count(value: str) -> int:
    if not value.isascii() or not value.isdigit() or int(value) > 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {value!r}")
    return int(value)


def _user_and_password(value: str) -> tuple[str, str]:
    user, _, password = value.partition(":")
    if not user or not password:  # the value is not repeated here: it may be a password
        raise argparse.ArgumentTypeError("must be USER:PASSWORD, with neither of them empty")
    return user, password


def _api_key(value: str) -> str:
    if not re.fullmatch(r"[!-+\--~]{8,}", value):  # nor is this value repeated
        raise argparse.ArgumentTypeError("must be 8 or more letters, digits and signs, without spaces and commas")
    return value


def _folder(value: str) -> Path:
    return Path(_text(value)).expanduser().absolute()
