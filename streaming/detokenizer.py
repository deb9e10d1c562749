"""Token ids → text that is never taken back.

A Detokenizer is `feed(id)` for every token and `flush()` once at the end, both giving the new text; a StopMatcher
cuts that text at the first stop string in the same two calls. The joined outputs of a Detokenizer equal
`tokenizer.decode(all ids)`, with one exception that its docstring names.
"""

import codecs
import functools
import json
import re
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import TokenizersBackend

from streaming.errors import StreamerMisuse

_REPLACEMENT = "\ufffd"
_MAX_UNFINISHED_BYTES = 3  # of one character in UTF-8
_MAX_WINDOW = 6  # pieces; more are decoded only while their text is not settled
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_EACH_BYTE = "brook-replace-each-byte"

_APPENDING = {"BPEDecoder", "ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}


class Detokenizer:
    """Decode one sequence incrementally, O(1) amortised a token, for any tokenizer that has `decode()`.

    (O(n) for a run of n tokens that have no text yet: spaces that a tokenizer in Python strips at the end.)

    Only a few tokens are decoded at a time: the pending ones, whose text may still change, after the ones before
    them, which decide on a leading space. Text is given once no further token can change it.

    `context_ids` were shown before: they are read first, so that a following word keeps its space and a character
    that they began is completed, but their text (`context_text`) is not given again.

    The exception to "equals the full decode": tokenizers with byte fallback decode a run of byte tokens all or
    nothing, so that one malformed byte turns the whole characters beside it into U+FFFD as well, which may have been
    shown. Here they stay, and each malformed byte alone is U+FFFD, as SentencePiece (0.2.3) decodes it.

    Raises:
        StreamerMisuse: the tokenizer cannot decode, or it does not know an id.
    """

    def __init__(self, tokenizer: Any, context_ids: Iterable[int] = (), *, skip_special_tokens: bool = False) -> None:
        vocabulary = _read(tokenizer, skip_special_tokens)
        self._piece, self._join = vocabulary.piece, vocabulary.join
        self._skipped_ids = vocabulary.skipped_ids
        self._has_byte_pieces = vocabulary.has_byte_pieces
        self._only_appends = vocabulary.only_appends
        self._n_ids = vocabulary.n_ids
        self._window: list[Any] = []  # the pieces that still count: some were given, and decide on a space
        self._n_clean = 0  # pieces of the window, up to the last moment when nothing was held
        self._n_given = 0  # characters of the window's text that were given
        self._run: list[str] = []  # byte pieces after the window, of a character that is not whole yet
        self._bytes = b""  # theirs
        self.held = ""  # the text, as it stands, that a further token may still change: what flush() would give
        self.context_text = "".join(self.feed(token_id) for token_id in context_ids)

    def feed(self, token_id: int) -> str:
        """Give the text that this token settles: empty while a character is unfinished."""
        if token_id in self._skipped_ids:
            return ""
        try:
            piece = self._piece(token_id) if token_id >= 0 else None
        except (OverflowError, IndexError):  # `tokenizers` has 32 bits for an id
            piece = None
        if piece is None:
            raise StreamerMisuse(
                f"Token id {token_id} is not one of the {self._n_ids:,} that the tokenizer knows; "
                "give the model's own tokenizer."
            )
        if not self._has_byte_pieces:
            return self._feed_piece(piece)
        byte = _BYTE_PIECE.fullmatch(piece)
        if byte is None:
            return (self.flush() if self._bytes else "") + self._feed_piece(piece)
        return ("" if self._bytes else self.flush()) + self._feed_byte(piece, int(byte[1], 16))

    def flush(self) -> str:
        """Give what is held, because nothing that comes can change it: there is no more, or it is of another kind."""
        text, self.held = self.held, ""
        if self._bytes:
            self._restart(self._run)
            self._run, self._bytes = [], b""
        else:
            self._n_given += len(text)
        self._n_clean = len(self._window)
        return text

    def _feed_piece(self, piece: Any) -> str:
        window = self._window
        window.append(piece)
        whole = self._join(window)
        # The quick way to what _count_settled() gives for nearly every token.
        is_settled = self._only_appends and not whole.endswith(_REPLACEMENT)
        n_settled = len(whole) if is_settled else self._count_settled(window, whole)
        text = whole[self._n_given : n_settled]
        self._n_given += len(text)
        self.held = whole[self._n_given :]
        if self.held:
            if len(window) - self._n_clean > _MAX_WINDOW:
                text += self._let_go()
        elif text:
            if len(window) > _MAX_WINDOW:
                self._restart(window[self._n_clean :])
            self._n_clean = len(self._window)
        return text

    def _count_settled(self, window: list[Any], whole: str) -> int:
        """Count the characters of `whole`, the window's text, that stay whatever comes next."""
        n_settled = len(whole)
        if not self._only_appends:
            # "hel@@" is "hel" before any other piece, such as itself.
            n_settled = _n_common(whole, self._join([*window, window[-1]]))
        if whole.endswith(_REPLACEMENT):
            n_replaced = len(whole) - len(whole.rstrip(_REPLACEMENT))
            n_settled = min(n_settled, len(whole) - min(n_replaced, _MAX_UNFINISHED_BYTES))
        return n_settled

    def _let_go(self) -> str:
        """Settle the older pieces where something is held again and again, as with bytes that make no character."""
        held = self.held
        # A character that is not whole yet has no more pieces than bytes; one more tells where it begins.
        self._window = self._window[-_MAX_UNFINISHED_BYTES - 1 :]
        whole = self._join(self._window)
        n_held = min(len(held), len(whole) - self._count_settled(self._window, whole))
        self._n_clean = 0
        self._n_given = len(whole) - n_held
        self.held = held[len(held) - n_held :]
        return held[: len(held) - n_held]

    def _feed_byte(self, piece: str, byte: int) -> str:
        self._run.append(piece)
        self._bytes += bytes([byte])
        text, n_read = codecs.utf_8_decode(self._bytes, _EACH_BYTE, False)
        self._bytes = self._bytes[n_read:]
        self.held = _REPLACEMENT * len(self._bytes)
        if n_read:
            if n_read == 1 and not self._window:
                text = self._join(self._run[:1])  # the first piece of all may lose a leading space
            done, self._run = self._run[:n_read], self._run[n_read:]
            self._restart(done)
        return text

    def _restart(self, window: list[Any]) -> None:
        """Go on from these pieces, whose text was given."""
        self._window = window
        self._n_clean = 0
        self._n_given = len(self._join(window))


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """What a Detokenizer needs of a tokenizer."""

    piece: Callable[[int], Any]  # of an id; None where there is none
    join: Callable[[list[Any]], str]  # the text of pieces
    skipped_ids: Container[int]
    n_ids: int
    has_byte_pieces: bool = False
    only_appends: bool = False  # whether the text of pieces begins the text of more


def _read(tokenizer: Any, skip_special_tokens: bool) -> _Vocabulary:
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor, which TextStreamer takes as well
    backend = _backend(tokenizer)
    if backend is not None:
        added = backend.get_added_tokens_decoder() if skip_special_tokens else {}
        join = " ".join if backend.decoder is None else backend.decoder.decode
        return _Vocabulary(
            backend.id_to_token,
            join,
            frozenset(token_id for token_id, token in added.items() if token.special),
            backend.get_vocab_size(),
            has_byte_pieces=join(["<0xC3>", "<0xA9>"]) == "é",
            only_appends=_only_appends(backend.decoder),
        )
    if not callable(getattr(tokenizer, "decode", None)):
        raise StreamerMisuse(
            f"A streamer needs the model's tokenizer, which has decode(), but got {type(tokenizer).__name__}."
        )
    skipped_ids = frozenset(getattr(tokenizer, "all_special_ids", ()) if skip_special_tokens else ())
    n_ids = len(tokenizer)
    # The pieces of a tokenizer in Python are the ids themselves: only its decode() knows how they join.
    return _Vocabulary(range(n_ids).__getitem__, functools.partial(_decode, tokenizer), skipped_ids, n_ids)


def _only_appends(decoder: Any) -> bool:
    """Whether a decoder (`tokenizers.decoders`) never writes pieces differently because of those that follow."""
    if decoder is None:
        return True
    try:
        state = json.loads(decoder.__getstate__())
    except Exception:  # it is somebody's own
        return False
    return all(step["type"] in _APPENDING and not step.get("stop") for step in state.get("decoders", [state]))


def _backend(tokenizer: Any) -> Tokenizer | None:
    """The Rust tokenizer that decodes, unless a subclass decodes in its own way."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    kind = type(tokenizer)
    is_plain = (
        isinstance(tokenizer, TokenizersBackend)
        and kind._decode is TokenizersBackend._decode
        and kind.decode is TokenizersBackend.decode
    )
    return tokenizer.backend_tokenizer if is_plain else None


def _decode(tokenizer: Any, token_ids: list[int]) -> str:
    text: str = tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
    return text


def _n_common(a: str, b: str) -> int:
    """Length of the common beginning."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return _REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


class StopMatcher:
    """Cut text at the first stop string, holding back only what may still become one.

    A stop string is found wherever it lies over token borders. Of several, the one that is complete first wins (of
    those, the longest), so that the outcome does not depend on how the text was cut into tokens.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(s for s in stop if s)
        self.held = ""  # text that was fed but may be the beginning of a stop string
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Give the text that is certain to lie before any stop string."""
        if not self._stop or self.matched is not None:
            return "" if self.matched is not None else text
        text = self.held + text
        found = [(at + len(s), at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            _, at, self.matched = min(found)
            self.held = ""
            return text[:at]
        n_held = max(_overlap(text, s) for s in self._stop)
        self.held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def flush(self) -> str:
        """Give what was held back, because no more text comes."""
        text, self.held = self.held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
