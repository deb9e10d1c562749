"""JSON from elsewhere, read with care: what is not as it should be is told with the line that it stands in."""

import json
import re
from collections.abc import Iterator
from typing import Any, TypeVar

from streaming.errors import ImportRefused

_SPACE = re.compile(r"[ \t\n\r]*")
_KINDS = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
}
_MAX_WHOLE = 2**63
_REQUIRED: Any = object()

T = TypeVar("T")


class Item:
    """An object in a JSON text, whose fields are checked as they are read."""

    def __init__(self, value: Any, text: str, path: tuple[str | int, ...] = (), first_line: int = 1) -> None:
        self._text = text
        self._path = path
        self._first_line = first_line
        if not isinstance(value, dict):
            raise self._refusal("Here must be an object")
        self.value: dict[str, Any] = value

    def get(self, key: str, kind: type[T], default: T = _REQUIRED) -> T:
        """Give a field of a kind; a missing or null one is `default` where there is one."""
        value = self.value.get(key)
        if value is None and default is not _REQUIRED:
            return default
        is_kind = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if kind is float and type(value) is int and abs(value) < _MAX_WHOLE:
            return float(value)  # type: ignore[return-value]
        if not is_kind or not isinstance(value, kind):
            raise self._refusal(f"{key!r} must be {_KINDS[kind]}", key)
        return value

    def item(self, key: str) -> "Item":
        """Give a field that is an object."""
        return self._inside(self.get(key, dict), key)

    def items(self, key: str) -> "list[Item]":
        """Give a field that is a list of objects."""
        return [self._inside(value, key, i) for i, value in enumerate(self.get(key, list))]

    def members(self, key: str) -> "Iterator[tuple[str, Item]]":
        """Give the members of a field that is an object of objects."""
        for name, value in self.get(key, dict).items():
            yield name, self._inside(value, key, name)

    def refusal(self, words: str) -> ImportRefused:
        """Say what is wrong with this object, to be raised."""
        return self._refusal(words)

    def _inside(self, value: Any, *steps: str | int) -> "Item":
        return Item(value, self._text, (*self._path, *steps), self._first_line)

    def _refusal(self, words: str, *steps: str) -> ImportRefused:
        at = _find(self._text, (*self._path, *steps))
        return ImportRefused(words, self._first_line + self._text.count("\n", 0, at))


def read_json(text: str, first_line: int = 1) -> Any:
    """Read a JSON text.

    Raises:
        ImportRefused: it is none.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        return value if r"\u" not in text else _whole(value)
    except _NoNumber as error:
        raise ImportRefused(f"This is not JSON ({error} is no number of it)", first_line) from error
    except json.JSONDecodeError as error:
        raise ImportRefused(f"This is not JSON ({error.msg})", first_line + error.lineno - 1) from error
    except RecursionError as error:
        raise ImportRefused("This is nested too deeply", first_line) from error


class _NoNumber(Exception):
    """NaN or Infinity, which Python's reader lets through."""


def _refuse_constant(name: str) -> Any:
    raise _NoNumber(name)


def _whole(value: Any) -> Any:
    """Put the sign for "unknown" where half a surrogate pair stands, which is no text and cannot be kept."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_whole(one) for one in value]
    return {_whole(name): _whole(one) for name, one in value.items()} if isinstance(value, dict) else value


def _find(text: str, path: tuple[str | int, ...]) -> int:
    """Find where in a JSON text that can be read a value stands; the nearest there is, where it is missing."""
    decode, at = json.JSONDecoder().raw_decode, _skip(text, 0)
    for step in path:
        inner, end = _skip(text, at + 1), "}" if isinstance(step, str) else "]"
        number = 0
        while inner < len(text) and text[inner] != end:
            key: str | int = number
            begin = inner
            if isinstance(step, str):
                key, inner = decode(text, inner)
                begin = _skip(text, _skip(text, inner) + 1)
            if key == step:
                at = begin
                break
            inner = _skip(text, decode(text, begin)[1])
            inner = _skip(text, inner + 1) if text[inner : inner + 1] == "," else inner
            number += 1
        else:
            return at
    return at


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return at if match is None else match.end()
