"""One run by the model's own `generate()`, and when a run has written its last token."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessorList

from streaming.engine.decode_loop import compiled_step, decode_loop
from streaming.engine.run import Run
from streaming.errors import NotACausalLM
from streaming.models.kv_cache import is_continuable, make_growing
from streaming.models.loading import LoadedModel

PREFILL_CHUNK_TOKENS = 256
"""The prompt is read in chunks of this many tokens: cancelling and progress happen between them."""


def generate(run: Run, cache: Cache, loaded: LoadedModel) -> None:
    """Call `generate()`; the tokens arrive in the run's log, what was read stays in `cache`."""
    loop = functools.partial(decode_loop, streamer=run, before_chunk=run.before_forward)
    _generate(run, loaded, past_key_values=cache, streamer=run, custom_generate=loop)


def new_cache(loaded: LoadedModel) -> DynamicCache:
    """Make an empty cache for a request; without a compiled step, which brings its own, one that grows in blocks.

    On a CPU that saves 5 % of a step at 1,500 positions; on a GPU copying takes no time that shows.
    """
    model: Any = loaded.model
    cache = DynamicCache(config=model.config)
    if model.device.type == "cpu" and is_continuable(cache) and not reads_with_step(loaded):
        make_growing(cache, model.dtype)
    return cache


def require_servable(loaded: LoadedModel) -> None:
    """Raise NotACausalLM for a model whose cache cannot tell how much it holds: one without any attention."""
    try:
        DynamicCache(config=loaded.model.config).get_seq_length()
    except ValueError as error:
        raise NotACausalLM(
            f"{loaded.model_id} is a recurrent model without attention, which cannot be served here; choose another."
        ) from error


def prepare_processors(run: Run, loaded: LoadedModel) -> LogitsProcessorList:
    """Give the processors that `generate()` would draw a run's tokens with: its own, and what the model's config adds.

    They are what generate() hands to a custom loop (transformers 5.23).
    """
    prepared = []

    def take(_model: Any, input_ids: torch.Tensor, logits_processor: LogitsProcessorList, *_: Any, **__: Any) -> Any:
        prepared.append(logits_processor)
        return input_ids

    _generate(run, loaded, custom_generate=take)
    return prepared[0]


def _generate(run: Run, loaded: LoadedModel, **options: Any) -> None:
    model: Any = loaded.model
    tokenizer = loaded.tokenizer
    ids = torch.tensor([run.generation.prompt_ids], device=model.device)
    eos_ids = sorted(_eos_ids(model))
    config = GenerationConfig(
        # Whatever the processors do is switched off here: generate() fills what is left open from the model's own
        # config, and would do it twice.
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        max_new_tokens=_n_max_tokens(run, loaded),
        prefill_chunk_size=PREFILL_CHUNK_TOKENS,
        eos_token_id=eos_ids or None,
        pad_token_id=eos_ids[0] if tokenizer.pad_token_id is None and eos_ids else tokenizer.pad_token_id,
    )
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        logits_processor=run.processors,
        **options,
    )


@torch.no_grad()
def read(ids: Sequence[int], cache: Cache, loaded: LoadedModel) -> None:
    """Append tokens, at most a chunk, to a cache."""
    model: Any = loaded.model
    if reads_with_step(loaded):
        compiled_step(model).read_on(cache, ids)
    else:
        model(torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)


def reads_with_step(loaded: LoadedModel) -> bool:
    """Whether a compiled step reads the model's prompts, which takes a few tokens hardly longer than one."""
    step = compiled_step(loaded.model)
    return step is not None and bool(step.reads_prompts)


def has_stopped(run: Run, loaded: LoadedModel) -> bool:
    """Say whether the model has ended its reply by itself."""
    return run.row.last_id in _eos_ids(loaded.model)


def is_over(run: Run, loaded: LoadedModel) -> bool:
    """Say whether the run has written its last token, as `generate()` would see it."""
    return len(run.token_ids) >= _n_max_tokens(run, loaded) or (bool(run.token_ids) and has_stopped(run, loaded))


def _n_max_tokens(run: Run, loaded: LoadedModel) -> int:
    """How many tokens the run may write: what was asked for, within the model's context."""
    return min(run.sampling.max_new_tokens, loaded.n_context - len(run.generation.prompt_ids))


def _eos_ids(model: Any) -> frozenset[int]:
    eos = model.generation_config.eos_token_id
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)
