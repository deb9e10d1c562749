"""Sampling settings → logits processors for `generate()`.

`generate()` draws from torch's global random generator, which everyone shares. Brook has it pick the likeliest token
(`do_sample=False`) from scores in which the last processor has already drawn one, with the request's own generator.
"""

from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from streaming.engine.base import SamplingDefaults
from streaming.events import TopToken


class SeededSampler(LogitsProcessor):
    """Draw one token a row from the scores' softmax, within the nucleus `top_p`; leave only it finite.

    Scores are `(batch, vocab)`. The nucleus is looked for among the `n_head` likeliest tokens first: sorting a whole
    vocabulary costs milliseconds on a CPU and is hardly ever needed.
    """

    def __init__(self, seed: int, device: torch.device, top_p: float = 1.0, n_head: int = 512) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._top_p = top_p
        self._n_head = n_head

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        probs = scores.softmax(dim=-1, dtype=torch.float32)
        if self._top_p < 1.0:
            head, ids = probs.topk(min(self._n_head, probs.shape[-1]), dim=-1)
            if bool((head.sum(dim=-1) < self._top_p).any()):
                head, ids = probs.sort(dim=-1, descending=True)
            mass = head.cumsum(dim=-1)
            # A token belongs when the likelier ones do not fill the nucleus yet; the likeliest always belongs.
            head = head.masked_fill(mass - head >= self._top_p, 0.0)
            head[..., 0].clamp_(min=torch.finfo(head.dtype).tiny)
            drawn = ids.gather(-1, self._draw(head))
        else:
            drawn = self._draw(probs)
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn, 0.0)

    def _draw(self, weights: torch.Tensor) -> torch.Tensor:
        """Pick an index a row with chances in proportion to `weights`, `(batch, n)` → `(batch, 1)`."""
        mass = weights.cumsum(dim=-1)
        point = torch.rand((weights.shape[0], 1), generator=self._generator, device=weights.device, dtype=mass.dtype)
        # right=True: an index without weight is never drawn, even by a point of exactly 0.
        index = torch.searchsorted(mass, point * mass[..., -1:], right=True)
        last = weights.shape[-1] - 1 - (weights.flip(-1) > 0).to(torch.int8).argmax(dim=-1, keepdim=True)
        return torch.minimum(index, last)


class ReplyPenalties(LogitsProcessor):
    """Lower the logits of tokens that the reply has already: `frequency` for each time, `presence` once.

    Scores are `(batch, vocab)`; the first `n_prompt` of the ids, `(batch, seq)`, are no part of the reply.
    Source: OpenAI's API reference, "Frequency and presence penalties".
    """

    def __init__(self, n_prompt: int, frequency: float, presence: float) -> None:
        self._n_prompt = n_prompt
        self._frequency = frequency
        self._presence = presence

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        reply_ids = input_ids[:, self._n_prompt :]
        penalty = torch.zeros_like(scores)
        penalty.scatter_(-1, reply_ids, self._presence)
        penalty.scatter_add_(-1, reply_ids, torch.full_like(reply_ids, self._frequency, dtype=scores.dtype))
        return scores - penalty


class LogprobRecorder(LogitsProcessor):
    """Keep the model's own scores of the newest step, before any setting changes them, to tell logprobs from."""

    def __init__(self, tokenizer: Any, n_top: int) -> None:
        self._tokenizer = tokenizer
        self._n_top = n_top
        self._logprobs: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._logprobs = scores[0].float().log_softmax(dim=-1)
        return scores

    def of(self, token_id: int) -> tuple[float | None, tuple[TopToken, ...] | None]:
        """Give the newest step's logprob of a token, and its likeliest tokens."""
        if self._logprobs is None:
            return None, None
        values, ids = self._logprobs.topk(self._n_top)
        top = tuple(
            TopToken(i, self._tokenizer.decode([i]), value)
            for i, value in zip(ids.tolist(), values.tolist(), strict=True)
        )
        return float(self._logprobs[token_id]), top


def build_processors(
    sampling: SamplingDefaults,
    seed: int,
    device: torch.device,
    recorder: LogprobRecorder | None,
    *,
    n_prompt: int,
) -> LogitsProcessorList:
    """Give the processors for one request, in transformers' own order; none that would change nothing.

    The reply begins after `n_prompt` tokens.
    """
    processors = LogitsProcessorList()
    if recorder is not None:
        processors.append(recorder)
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.frequency_penalty or sampling.presence_penalty:
        processors.append(ReplyPenalties(n_prompt, sampling.frequency_penalty, sampling.presence_penalty))
    if sampling.temperature == 0.0 or sampling.top_k == 1:
        return processors
    if sampling.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    processors.append(SeededSampler(seed, device, sampling.top_p))
    return processors
