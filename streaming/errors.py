"""The exceptions of Brook, as a tree: everything raised on purpose is a BrookError.

A message is one sentence that says what went wrong and what to do; it can be shown to a person as it is.
"""

import queue


class BrookError(Exception):
    """Any error that Brook raises on purpose."""


class InvalidRequest(BrookError, ValueError):
    """A request that cannot be run as asked.

    `field` names the argument at fault, so that a page can put the message beside it.
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class PromptTooLong(InvalidRequest):
    """A prompt that does not fit the model's context even with every older turn left out.

    It is `n_prompt_tokens` long, or `at_least` that where its characters alone are too many.
    """

    def __init__(self, n_prompt_tokens: int, n_max_prompt_tokens: int, *, at_least: bool = False) -> None:
        super().__init__(
            f"The message is {'at least ' * at_least}{n_prompt_tokens:,} tokens long but the model can read at most "
            f"{n_max_prompt_tokens:,}; shorten it and send it again.",
            field="prompt",
        )
        self.n_prompt_tokens = n_prompt_tokens
        self.n_max_prompt_tokens = n_max_prompt_tokens


class EngineClosed(BrookError):
    """A request made to an engine after `close()`."""


class EngineBusy(BrookError):
    """A request refused because the queue is full."""


class GenerationFailed(BrookError):
    """`generate()` raised; the cause is chained and the partial output is kept in the log."""


class GenerationCancelled(BrookError):
    """Raised inside `generate()` to unwind it after `cancel()`; never reaches a reader."""


class StreamerMisuse(BrookError, RuntimeError):
    """A streamer called in a way that it cannot serve, such as `put` after `end`."""


class ConversationInvalid(BrookError, ValueError):
    """Messages that make no conversation: one is there twice, or answers one that is not there."""


class SinkFailed(BrookError):
    """A place that a stream was written to cannot take more; the cause is chained."""


class StreamTimeout(BrookError, TimeoutError, queue.Empty):
    """A reader waited longer than it said it would.

    It is what TextIteratorStreamer raises (`queue.Empty`) and AsyncTextIteratorStreamer (`TimeoutError`) as well.
    """


class ModelUnavailable(BrookError):
    """A model that cannot be found, fetched, read or loaded."""


class ModelNotFound(ModelUnavailable):
    """A model id that the hub does not know, or a path that is not there."""


class HubUnreachable(ModelUnavailable):
    """A model that is not on this machine, and a hub that does not answer."""


class ModelGated(ModelUnavailable):
    """A model that the hub gives only to people it knows."""


class NotACausalLM(ModelUnavailable):
    """A model that cannot continue text token by token."""


class ModelTooLarge(ModelUnavailable):
    """A model that needs more memory than the device has free."""


class ModelDamaged(ModelUnavailable):
    """Files of a model that are incomplete, corrupt or of a kind that cannot be read."""


class DeviceUnavailable(ModelUnavailable):
    """A device that this machine does not have."""


class DefaultModelUnavailable(ModelUnavailable):
    """The default model, found in none of the places it can come from."""


class AddressUnavailable(BrookError):
    """A host and port on which nothing can listen, mostly because another program does."""


class ImportRefused(BrookError, ValueError):
    """A file of conversations that cannot be read; `line` is the one at fault, counted from 1."""

    def __init__(self, words: str, line: int) -> None:
        super().__init__(f"Line {line:,}: {words[:1].lower()}{words[1:]}. Nothing was imported.")
        self.line = line
