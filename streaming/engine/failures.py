"""What goes wrong with a model, as one sentence for whoever asked."""

import torch

from streaming.errors import ModelUnavailable


def as_unavailable(error: BaseException) -> ModelUnavailable:
    """Give what loading a model raised as the exception that says so."""
    if isinstance(error, ModelUnavailable):
        return error
    return ModelUnavailable(f"The model could not be loaded ({_name(error)}); try another with --model.")


def explain(error: BaseException) -> str:
    """Say in one sentence what went wrong while the model wrote, and what to do."""
    text = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text or "out of memory" in text:
        return "The machine ran out of memory; shorten the conversation or lower max new tokens, then try again."
    return f"The model stopped with an error ({_name(error)}); try again."


def _name(error: BaseException) -> str:
    first_line = str(error).strip().split("\n")[0][:200]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
