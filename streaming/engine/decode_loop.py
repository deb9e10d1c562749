"""generate()'s own loop, without what it spends between two tokens.

    model.generate(ids, custom_generate=functools.partial(decode_loop, streamer=streamer), streamer=streamer, …)

generate() prepares everything as always (processors, stopping criteria, cache); then, for models that the compiled step
knows, it reads the prompt in chunks, and each token is one call, or less where guesses are right (see `lookup`). Every
other model or setting is handed on to generate()'s own sampling loop. The streamer is named twice because transformers
5.23 gives the prompt to the one and does not pass it on to a custom loop.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from streaming.engine.lookup import PromptLookup
from streaming.models.graph_step import graph_step_of
from streaming.models.kv_cache import is_continuable

# Asking for any of these makes generate() collect what the compiled step does not return.
_RECORDS = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")


def decode_loop(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    before_chunk: Callable[[int], None] = lambda _n_tokens: None,
    **model_kwargs: Any,
) -> torch.Tensor:
    """Generate with `model` from `input_ids` `(1, seq)`; return the prompt and what was generated, `(1, seq)`.

    `before_chunk` is called with the number of tokens that the compiled step is about to read, as a hook of the model's
    is where its own forward reads them.

    Whatever the streamer, a processor or a criterion raises goes through to the caller of generate(); the cache then
    holds every token that the model has read.
    """
    step = compiled_step(model)
    if step is None or not _is_plain(input_ids, generation_config, model_kwargs):
        stock_loop: Any = GenerationMixin._sample
        generated: torch.Tensor = stock_loop(
            model, input_ids, logits_processor, stopping_criteria, generation_config, streamer=streamer, **model_kwargs
        )
        return generated
    cache, device = model_kwargs["past_key_values"], input_ids.device
    unread = input_ids[0, cache.get_seq_length() :]
    if step.reads_prompts:
        for chunk in unread.split(generation_config.prefill_chunk_size or len(unread)):
            before_chunk(len(chunk))
            logits = step.read_on(cache, chunk.tolist())
    else:
        logits = model._prefill(input_ids, generation_config, model_kwargs).logits[:, -1].float()
    input_ids = input_ids.cpu()  # counted and looked at there: on a GPU each look would be a launch and a wait
    lookup = PromptLookup(input_ids[0].tolist(), step.guess_sizes)
    guessed: list[int] = []
    with step.continuing(cache) as read:
        while True:
            try:  # a token from each row of logits, as long as the guess before it was right
                for n_right, row in enumerate(logits.split(1)):
                    scores = logits_processor(input_ids.to(device), row)  # type: ignore[arg-type]
                    next_id = _choose(scores, generation_config.do_sample).cpu()
                    input_ids = torch.cat([input_ids, next_id[:, None]], dim=-1)
                    finished = bool(stopping_criteria(input_ids, None)[0])
                    if streamer is not None:
                        streamer.put(next_id)
                    lookup.append(int(next_id))
                    if finished or guessed[n_right : n_right + 1] != [int(next_id)]:
                        break
            finally:
                if n_right < len(guessed):  # the model has read what was guessed wrongly
                    cache.crop(n_right - len(guessed))
            if finished:
                break
            guessed = lookup.guess()
            started = time.perf_counter()
            logits = read(int(next_id), *guessed)
            lookup.measured(len(guessed), time.perf_counter() - started)
    if streamer is not None:
        streamer.end()
    return input_ids.to(device)


def compiled_step(model: Any) -> Any:
    """Return the model's GraphStep or LlamaStep, or None.

    Only packed weights have a LlamaStep, and its kernels take a second to import.
    """
    if model.device.type == "cuda":
        return graph_step_of(model)
    if all(parameter.dtype != torch.uint8 for parameter in model.parameters()):
        return None
    from streaming.models.llama_step import step_of

    return step_of(model)


def _choose(scores: torch.Tensor, do_sample: bool | None) -> torch.Tensor:
    """Return the next token's id, `(1,)`, from scores `(1, vocab)`."""
    if do_sample:
        return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)[0]
    if not scores.is_cpu:
        return scores.argmax(dim=-1)
    # torch.argmax takes 0.1 ms over 49,152 scores, NumPy 6 µs.
    return torch.from_numpy(scores.numpy().argmax(axis=-1))


def _is_plain(input_ids: torch.Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> bool:
    """Whether this is one whole, unpadded sequence with the usual cache, of which only the tokens are wanted.

    A sequence may be given without what its cache holds; the mask then tells how long it is, and where it was all ones
    generate() keeps its length in the configuration (transformers 5.23, `GenerationMixin._prefill`).
    """
    n_ids = input_ids.shape[1]
    return (
        len(input_ids) == 1
        and getattr(config, "_mask_length", n_ids) == n_ids
        and model_kwargs.get("attention_mask") is None
        and model_kwargs.get("inputs_embeds") is None
        and bool(model_kwargs.get("use_cache"))
        and is_continuable(model_kwargs.get("past_key_values"))
        and model_kwargs["past_key_values"].get_seq_length() < n_ids
        and not any(getattr(config, name) for name in _RECORDS)
    )
