"""Prompt lookup: what followed the newest tokens when they came up before is guessed to follow again.

Where text repeats (editing, summarizing, code) many guesses are right, and a model reads several tokens at once in
less time than one after another. Each token is still chosen from the model's own scores after all before it, so a
guess changes when a token comes and never which.

Source of the idea: Saxena, "Prompt Lookup Decoding" (2023); in transformers `prompt_lookup_num_tokens`.
"""

from collections.abc import Iterable, Sequence

# How many newest tokens must have come up before.
_KEY_TOKENS = 2

# Weight of the newest guess in the mean of how many were right: some ten guesses are remembered.
_NEWEST = 0.2

# What a guessed token is taken to cost, as a share of a step, until it was measured.
_ASSUMED_COST = 0.25

# A time is the least seen, which noise can only lengthen, and ages by this factor: steps get longer with the text.
_AGEING = 1.01


class PromptLookup:
    """Guesses for one sequence, given only while they pay; not thread-safe.

    `sizes` is how many tokens may be guessed, 0 and up.

    How often guesses are right is learned from all of them, also from those that were not given, by comparing them
    with what came. So a text that does not repeat costs next to nothing, and one that begins to is soon noticed.
    """

    def __init__(self, token_ids: Iterable[int], sizes: Sequence[int]) -> None:
        self._sizes = tuple(sizes)
        self._ids: list[int] = []
        self._continuations: dict[tuple[int, ...], int] = {}  # newest tokens → where what followed them begins
        self._on_trial: list[int] = []
        self._n_right = 0
        self._mean_right = dict.fromkeys(self._sizes, 0.0)
        self._step_s: dict[int, float] = {}
        for token_id in token_ids:
            self._note(token_id)

    def append(self, token_id: int) -> None:
        """Take note of the next token of the sequence."""
        self._note(token_id)
        if self._on_trial:
            is_right = self._on_trial[self._n_right] == token_id
            self._n_right += is_right
            if not is_right or self._n_right == len(self._on_trial):
                self._settle()
        if not self._on_trial:
            self._on_trial, self._n_right = self._find(), 0

    def guess(self) -> list[int]:
        """Return the next tokens as far as guessing pays: none, or at most as many as one of the sizes."""
        if not self._step_s:
            return []
        size = max(self._sizes, key=lambda size: (1 + self._mean_right[size]) / self._seconds(size))
        return self._find()[:size]

    def measured(self, n_guessed: int, seconds: float) -> None:
        """Learn how long the step took in which the model read the newest token and `n_guessed` more."""
        if n_guessed in self._sizes:
            self._step_s[n_guessed] = min(seconds, self._step_s.get(n_guessed, seconds) * _AGEING)

    def _note(self, token_id: int) -> None:
        # The newest tokens are found only once something has followed them.
        if len(self._ids) >= _KEY_TOKENS:
            self._continuations[tuple(self._ids[-_KEY_TOKENS:])] = len(self._ids)
        self._ids.append(token_id)

    def _find(self) -> list[int]:
        start = self._continuations.get(tuple(self._ids[-_KEY_TOKENS:]))
        return [] if start is None else self._ids[start : start + self._sizes[-1]]

    def _settle(self) -> None:
        for size in self._sizes:
            self._mean_right[size] += _NEWEST * (min(size, self._n_right) - self._mean_right[size])
        self._on_trial = []

    def _seconds(self, size: int) -> float:
        return self._step_s.get(size, self._step_s[0] * (1 + _ASSUMED_COST * size))
