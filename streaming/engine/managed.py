"""Several runs at once by transformers' continuous batching, for models on a GPU and those without a compiled step.

The manager's own thread runs the model over a paged cache. Everything that is a request's own happens in the one
logits processor that the manager is given here: it draws each request's token with that request's processors and
generator, writes it into the request's log at once, and leaves the manager nothing to choose. So settings, seed, stop
strings and logprobs are as in every other engine, although the manager knows of none of them for a single request.

What the manager does not do: it reads a request's prompt anew instead of reusing a kept prefix, because its own
sharing of blocks would cross between people; it does not say how far it has read; and it takes no model whose
attention it does not replace. Whether it suits a model is tried before the first request (`try_manager`).

Source: transformers 5.23, `generation.continuous_batching` (`continuous_api.ContinuousBatchingManager`,
`cb_logits_processors.ContinuousBatchingLogitsProcessor`).
"""

import itertools
import logging
import queue
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

from streaming.engine.base import Progress
from streaming.engine.batch import End, choose_token
from streaming.engine.run import Run
from streaming.errors import GenerationCancelled
from streaming.models.device import free_bytes

logger = logging.getLogger(__name__)

PAGE_TOKENS = 256
STEP_TOKENS = 256
"""The most tokens in a step: a long prompt holds up those who are writing by no more than this."""
WAIT_S = 0.01
"""How long `advance` waits at most for something to happen, before the engine looks for newcomers again."""
STOP_TIMEOUT_S = 30.0
PROBE_TIMEOUT_S = 120.0

# How much of the free memory the paged cache may take, and how far the probe's probabilities may be from the model's.
_MEMORY_SHARE = {"cuda": 0.5, "cpu": 0.25}
_MAX_PROBE_DISTANCE = 0.1


class ManagedBatch:
    """Serves runs with a ContinuousBatchingManager. Made by `try_manager`."""

    reads_caches = False

    def __init__(self, model: Any, n_context: int, n_seats: int, is_over: Callable[[Run], bool], end: End) -> None:
        self._is_over = is_over
        self._end = end
        self._names = map(str, itertools.count())
        self._seats: dict[str, Run] = {}
        self._n_runs = 0  # those in `_seats` and in `_done`, and one on its way from there to here
        self._done: queue.SimpleQueue[tuple[Run, BaseException | None]] = queue.SimpleQueue()
        n_blocks = _count_blocks(model, n_context, n_seats)
        self._n_room = n_blocks * PAGE_TOKENS
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=n_blocks,
                max_batch_tokens=max(STEP_TOKENS, n_seats),
                max_requests_per_batch=n_seats,
                allow_block_sharing=False,
                # The processor is Python, and what it draws must be known before the next step.
                use_cuda_graph=False,
                use_async_batching=False,
                auto_switch_to_flash=False,
            ),
        )
        self._manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([_Chooser(self)]))
        self._manager.logit_processor.tensors_required = 1
        self._probe: list[torch.Tensor] = []
        self._manager.warmup()
        self._manager.start()

    @property
    def n_runs(self) -> int:
        return self._n_runs

    def join(self, run: Run) -> None:
        ids = [*run.generation.prompt_ids, *run.token_ids]
        if self._is_over(run):
            self._end(run, None)
            return
        if len(ids) >= self._n_room:
            raise MemoryError
        if not self._manager.is_running():
            self._manager.start()
        name = next(self._names)
        self._seats[name] = run
        self._n_runs += 1
        if not run.token_ids:
            run.show(Progress("reading", 0, len(ids)))
        self._manager.add_request(ids, request_id=name, max_new_tokens=self._n_room - len(ids))

    def advance(self) -> None:
        for name, run in list(self._seats.items()):
            if run.cancelled:
                self._leave(name, GenerationCancelled())
        while (output := self._manager.get_result(timeout=0)) is not None:
            self._leave(output.request_id, RuntimeError(output.error) if output.error else None)
        if not self._manager.is_running():
            for name in list(self._seats):
                self._leave(name, RuntimeError("continuous batching stopped"))
        try:
            run, error = self._done.get(timeout=WAIT_S)
        except queue.Empty:
            return
        self._n_runs -= 1
        self._end(run, error)

    def paused(self) -> AbstractContextManager[Any]:
        if not self._manager.is_running():
            self._manager.start()
        pause: AbstractContextManager[Any] = self._manager.pause()
        return pause

    def close(self) -> None:
        self._manager.stop(block=True, timeout=STOP_TIMEOUT_S, hard_stop=True)
        del self._manager  # it holds the model, and they each other: the model's memory would wait for a collection

    def choose(self, name: str, scores: torch.Tensor) -> int:
        """Draw and write a request's next token from its scores `(1, vocab)`; called by the manager's thread."""
        run = self._seats.get(name)
        if run is None:
            if name == _PROBE:
                self._probe.append(scores[0].cpu())
            return int(scores.argmax())
        token_id = 0
        try:
            token_id = choose_token(run, [*run.generation.prompt_ids, *run.token_ids], scores)
            run.add([token_id])
            if self._is_over(run):
                self._leave(name, None)
        except BaseException as error:
            self._leave(name, error)
        return token_id

    def _leave(self, name: str, error: BaseException | None) -> None:
        """Free a request's place in the manager and hand its run to the worker, which ends it; once for each."""
        run = self._seats.pop(name, None)
        if run is not None:
            self._manager.cancel_request(name)
            self._done.put((run, error))

    def suits(self, model: Any) -> bool:
        """Say whether the manager computes what the model's own forward does, for a prompt and the token after it."""
        ids = list(range(8))
        self._manager.add_request(ids, request_id=_PROBE, max_new_tokens=2)
        deadline = time.monotonic() + PROBE_TIMEOUT_S
        while (output := self._manager.get_result(timeout=0.1)) is None:
            if not self._manager.is_running() or time.monotonic() > deadline:
                return False
        if output.error is not None or len(self._probe) != 2:
            return False
        with self.paused(), torch.no_grad():
            own = model(torch.tensor([[*ids, *output.generated_tokens[:1]]], device=model.device)).logits[0, -2:]
        distance = torch.stack(self._probe).softmax(-1) - own.float().cpu().softmax(-1)
        return bool(distance.abs().sum(-1).max() < _MAX_PROBE_DISTANCE)


_PROBE = "probe"


class _Chooser(ContinuousBatchingLogitsProcessor):
    """Leaves only the drawn token of each request finite; rows are requests, in the order that is told before."""

    supported_kwargs = {}  # noqa: RUF012
    ignored_kwargs = ()

    def __init__(self, batch: ManagedBatch) -> None:
        self._batch = batch
        self._names: list[str] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        self._names = [request.state.request_id for request in requests_with_new_token]
        return torch.zeros(len(self._names), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        ids = [self._batch.choose(name, scores[row : row + 1]) for row, name in enumerate(self._names)]
        chosen = torch.full_like(scores, -torch.inf)
        chosen[range(len(ids)), ids] = 0.0
        return chosen


def try_manager(
    model: Any, n_context: int, n_seats: int, is_over: Callable[[Run], bool], end: End
) -> ManagedBatch | None:
    """Start a manager for a model, warmed up, or give None where it does not suit the model."""
    # What does not hand its attention to transformers' functions would ignore the paged cache.
    if not getattr(model, "_supports_attention_backend", False) or model.config._attn_implementation == "eager":
        return None
    try:
        batch = ManagedBatch(model, n_context, n_seats, is_over, end)
    except Exception:
        logger.exception("Continuous batching could not be started")
        return None
    if batch.suits(model):
        return batch
    batch.close()
    return None


def _count_blocks(model: Any, n_context: int, n_seats: int) -> int:
    """Count the pages that everyone's whole context takes, or as many as fit into a share of the free memory."""
    config, device = model.config.get_text_config(), model.device
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    page_bytes = 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize * PAGE_TOKENS
    share = _MEMORY_SHARE["cuda" if device.type == "cuda" else "cpu"]
    n_fit: int = int(free_bytes(device) * share) // page_bytes
    return max(2, min(n_seats * -(-n_context // PAGE_TOKENS), n_fit))
