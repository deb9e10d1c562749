"""Reasoning blocks: which tags a model puts around them, and whether a reply begins inside one.

The page folds what stands between the tags. Tags come from the tokenizer: models add them to the vocabulary, some as
control tokens, which detokenizing leaves out; their ids are then turned back into the tag's text here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_PAIRS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
)
# Tags that some tokenizers have besides: Magistral's [THINK], Command A's <|START_THINKING|>, Seed's <seed:think>.
_OPENING = re.compile(
    r"(<\|?|\[)(?:START_|begin_of_)?([a-z]+:)?(think|thinking|thought|reasoning)(\|?>|\])", re.IGNORECASE
)
_N_TAIL_TOKENS = 16


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """The pairs of tags to fold, and the ids of those that detokenizing leaves out."""

    pairs: tuple[tuple[str, str], ...] = _PAIRS
    hidden: dict[int, str] = field(default_factory=dict)

    def text_of(self, token_id: int, text: str) -> str:
        """Give a token's text, with a hidden tag put back."""
        return text or self.hidden.get(token_id, "")


def find_tags(tokenizer: Any) -> ReasoningTags:
    """Find the tags in a tokenizer's added tokens; the usual ones are always looked for."""
    added = getattr(tokenizer, "added_tokens_decoder", {}) if tokenizer is not None else {}
    by_text = {token.content: (token_id, token.special) for token_id, token in added.items()}
    pairs = list(_PAIRS)
    for opening in by_text:
        match = _OPENING.fullmatch(opening)
        closing = next((c for c in _closings(opening) if c in by_text), None) if match else None
        if closing and (opening, closing) not in pairs:
            pairs.append((opening, closing))
    hidden = {by_text[tag][0]: tag for pair in pairs for tag in pair if tag in by_text and by_text[tag][1]}
    return ReasoningTags(tuple(pairs), hidden)


def begins_in_reasoning(tokenizer: Any, prompt_ids: Sequence[int], tags: ReasoningTags) -> bool:
    """Whether a prompt ends inside a reasoning block, as templates that write the opening tag themselves leave it."""
    if tokenizer is None or not prompt_ids:
        return False
    tail = tokenizer.decode(list(prompt_ids[-_N_TAIL_TOKENS:]), skip_special_tokens=False).rstrip()
    return any(tail.endswith(opening) for opening, _ in tags.pairs)


def _closings(opening: str) -> list[str]:
    """The closing tags that may go with an opening one."""
    return [
        re.sub(r"^(<\|?|\[)", r"\1/", opening),
        opening.replace("START_", "END_"),
        opening.replace("begin_of_", "end_of_"),
    ]
