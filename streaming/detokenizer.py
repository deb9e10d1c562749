"""Token ids → text that is never taken back.

A Detokenizer is `feed(id)` for every token and `flush()` once at the end, both giving the new text; a StopMatcher
cuts that text at the first stop string in the same two calls. The joined outputs of a Detokenizer equal
`tokenizer.decode(all ids)`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Decode one sequence incrementally, O(1) amortised a token, through `tokenizers.decoders.DecodeStream`.

    `context_ids` were shown before: they are read first, so that a following word keeps its space and a character
    that they began is completed, but their text (`context_text`) is not given again.
    """

    def __init__(self, tokenizer: Any, context_ids: Iterable[int] = (), *, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._n_chars = 0
        self.context_text = "".join(self.feed(token_id) for token_id in context_ids)

    @property
    def has_tail(self) -> bool:
        """Whether the last token left bytes of an unfinished character behind."""
        return self._tail_pending

    def feed(self, token_id: int) -> str:
        """Give the text that this token completes: empty while a character is unfinished."""
        self._ids.append(token_id)
        text = self._stream.step(self._backend, token_id)
        self._tail_pending = text is None
        if text is None:
            return ""
        self._n_chars += len(text)
        return text

    def flush(self) -> str:
        """Give what the full decode has beyond the text given so far."""
        full: str = self._tokenizer.decode(
            self._ids, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )
        tail = full[self._n_chars :]
        self._n_chars = len(full)
        self._tail_pending = False
        return tail


class StopMatcher:
    """Cut text at the first stop string, holding back only what may still become one.

    A stop string is found wherever it lies over token borders. When several match, the one that begins first wins.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self.matched: str | None = None

    @property
    def held(self) -> str:
        """Text that was fed but may be the beginning of a stop string."""
        return self._held

    def feed(self, text: str) -> str:
        """Give the text that is certain to lie before any stop string."""
        if not self._stop or self.matched is not None:
            return "" if self.matched is not None else text
        text = self._held + text
        found = [(at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            at, self.matched = min(found, key=lambda pair: pair[0])
            self._held = ""
            return text[:at]
        n_held = max(_overlap(text, s) for s in self._stop)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def flush(self) -> str:
        """Give what was held back, because no more text comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
