"""Where a reply is, in words: what the status line says."""

from streaming.engine.base import EngineStatus, Generation, Progress
from streaming.events import FinishEvent

_ENDINGS = {
    "stop": "Finished",
    "length": "Stopped at the length limit",
    "cancelled": "Stopped",
    "error": "Stopped by an error",
}


def describe_loading(status: EngineStatus) -> str:
    """Say how far the model is: `Loading the model · 42 %`."""
    return status.detail or "Loading the model"


def describe_progress(progress: Progress, n_tokens: int, writing_s: float) -> str:
    """Say where a running reply is; `writing_s` counts seconds since its first token."""
    if progress.state == "waiting":
        if progress.n_ahead:
            return f"Waiting · {progress.n_ahead} ahead of you"
        return "Waiting"
    if n_tokens == 0:
        percent = 100 * progress.n_read // max(1, progress.n_to_read)
        return f"Reading the prompt · {percent} %"
    return f"Writing · {_count(n_tokens)}{_pace(n_tokens, writing_s)}"


def describe_finish(run: Generation, finish: FinishEvent) -> str:
    """Say how a reply ended, how much it was, how fast, and with which seed."""
    parts = [_ENDINGS[finish.reason], _count(finish.n_generated_tokens)]
    if finish.timings.tokens_per_s is not None:
        parts.append(f"{finish.timings.tokens_per_s:.1f} tokens/s")
    if finish.timings.ttft_s is not None:
        parts.append(f"first after {finish.timings.ttft_s:.2f} s")
    if finish.n_reused_tokens:
        parts.append(f"reused {finish.n_reused_tokens:,} of {finish.n_prompt_tokens:,}")
    if run.n_dropped_messages:
        parts.append(f"{_count(run.n_dropped_messages, 'oldest message')} left out to fit")
    parts.append(f"seed {run.seed}")
    return " · ".join(parts)


def _count(n: int, noun: str = "token") -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _pace(n_tokens: int, writing_s: float) -> str:
    return f" · {(n_tokens - 1) / writing_s:.1f} tokens/s" if n_tokens > 1 and writing_s > 0 else ""
