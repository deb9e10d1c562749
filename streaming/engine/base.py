"""What every engine is: `submit()` a GenerationRequest, follow the Generation that comes back."""

import reprlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from streaming.errors import InvalidRequest, StreamTimeout
from streaming.events import Event, FinishEvent
from streaming.log import EventLog

State = Literal["waiting", "reading", "writing", "done"]


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a request gets where it leaves a setting open; a model's generation config says so."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0


# Setting → smallest, largest value that is accepted.
LIMITS: Mapping[str, tuple[float, float]] = {
    "max_new_tokens": (1, 1_000_000),
    "temperature": (0.0, 5.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 1_000_000),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.1, 10.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "seed": (0, 2**63 - 1),
    "logprobs": (0, 20),
}
SESSION_HEADER = "x-session-id"
"""The HTTP header that tells owners behind one client apart. Ray Serve sends a session to one replica by it."""
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What to generate from, and how. Exactly one of `prompt`, `messages`, `prompt_ids` is given.

    `prefix_ids` are tokens of the reply that are already there: generation goes on after them; `prefix_text` is that
    as text, for who has no ids. A setting left None
    takes the model's default; `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off; `frequency_penalty` lowers
    a token's logit for each time that the reply has it, `presence_penalty` once, as in OpenAI's API; `seed` None is a
    fresh one; text ends before the first of the `stop` strings; `logprobs` is how many likeliest tokens each event
    carries in `top` (and with any, its own `logprob`). What was read for one `owner` (a person, a session) is reused
    for that owner's later requests only; with what every chat begins by the model's template, for everyone's. Owners
    take turns; a limit on one person's requests counts those of a `person`, "" is the owner. `model` names one of the
    engine's models where it has several, "" the first.

    Raises:
        InvalidRequest: a value is out of range; `field` names it.
    """

    prompt: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    prompt_ids: Sequence[int] | None = None
    prefix_ids: Sequence[int] = ()
    prefix_text: str = ""
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    logprobs: int = 0
    owner: str = ""
    person: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        given = [name for name in ("prompt", "messages", "prompt_ids") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidRequest(
                "Give exactly one of prompt, messages and prompt_ids; "
                + (f"got {', '.join(given)}." if given else "got none."),
                field="prompt",
            )
        if self.prefix_ids and self.prefix_text:
            raise InvalidRequest("Give prefix_ids or prefix_text, not both.", field="prefix_text")
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int | float) or not low <= value <= high:
                shown = reprlib.repr(value)  # an integer may have hundreds of digits
                raise InvalidRequest(f"{name} must be between {low:g} and {high:g}, not {shown}.", field=name)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if len(self.stop) > MAX_STOP_STRINGS or any(not s or len(s) > MAX_STOP_CHARS for s in self.stop):
            raise InvalidRequest(
                f"Give at most {MAX_STOP_STRINGS} stop strings of 1 to {MAX_STOP_CHARS} characters.",
                field="stop",
            )


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a generation is: `n_read` of `n_to_read` prompt tokens, `n_ahead` requests before it in the queue."""

    state: State = "waiting"
    n_read: int = 0
    n_to_read: int = 0
    n_ahead: int = 0


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A whole generation: what the log holds once it has ended."""

    text: str
    token_ids: list[int]
    finish: FinishEvent


class Generation:
    """One request being served: a log that any number of readers follow, and the one place to cancel it.

    `prompt_ids` is what the model was given, after templating and with `prefix_ids`; `prefix_text` is the text of
    `prefix_ids` that events continue; `seed` is the one used; `n_dropped_messages` counts the oldest messages left
    out to fit the context.
    """

    def __init__(
        self,
        request: GenerationRequest,
        prompt_ids: Sequence[int],
        *,
        log: EventLog,
        seed: int,
        cancel: Callable[["Generation"], None],
        prefix_text: str = "",
        n_dropped_messages: int = 0,
    ) -> None:
        self.request = request
        self.prompt_ids = tuple(prompt_ids)
        self.prefix_text = prefix_text
        self.seed = seed
        self.n_dropped_messages = n_dropped_messages
        self.log = log
        self.progress = Progress(n_to_read=len(self.prompt_ids))
        self._cancel = cancel

    @property
    def finish(self) -> FinishEvent | None:
        """The last event once generation has ended, else None."""
        return self.log.finish

    def events(self, after: int = 0, timeout: float | None = None) -> Iterator[Event]:
        """Follow the events from offset `after`, in any thread; see EventLog.events."""
        return self.log.events(after, timeout)

    def aevents(self, after: int = 0, timeout: float | None = None) -> AsyncIterator[Event]:
        """Follow the events from offset `after`, in an event loop; see EventLog.aevents."""
        return self.log.aevents(after, timeout)

    def cancel(self) -> None:
        """End the generation: at once when queued, else within one token or one chunk of the prompt."""
        self._cancel(self)

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Wait for the end.

        Raises:
            StreamTimeout: it did not end within `timeout` seconds; it goes on.
        """
        finish = self.log.wait_finish(timeout)
        if finish is None:
            raise StreamTimeout(f"The generation did not end within {timeout:g} s; it goes on.")
        return GenerationResult(self.log.text(), self.log.token_ids(), finish)


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """How an engine is: what `/healthz`, `/metrics` and the page show. `n_cache_bytes` is what kept prefixes take.

    `part` is how much of a loading step is done, from 0 to 1, where that is known. An "unloaded" model loads when it is
    next asked for something.
    """

    state: Literal["unloaded", "loading", "ready", "failed", "closed"]
    model_id: str
    device: str = ""
    n_active: int = 0
    n_queued: int = 0
    detail: str = ""
    part: float | None = None
    n_cache_bytes: int = 0


class Engine(Protocol):
    """A model that serves requests. Every method may be called from any thread."""

    kind: str

    @property
    def model_id(self) -> str:
        """The model's name, as shown to people."""

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, None where the model is elsewhere; waits for it while the model loads."""

    @property
    def defaults(self) -> SamplingDefaults:
        """What a request gets where it leaves a setting open."""

    def submit(self, request: GenerationRequest) -> Generation:
        """Accept a request.

        Raises:
            InvalidRequest: it cannot be run as asked.
            EngineClosed: after `close()`.
            ModelUnavailable: the model could not be loaded.
        """

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until the model is loaded; False when it takes longer.

        Raises:
            ModelUnavailable: it could not be loaded.
        """

    def status(self) -> EngineStatus:
        """Say how the engine is, without waiting."""

    def close(self) -> None:
        """Cancel everything, free the model and join the worker."""
