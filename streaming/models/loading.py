"""Load a model and its tokenizer: the only caller of `from_pretrained`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far loading is: `done` of `total` in the stage's own unit."""

    stage: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to generate. `n_context` is the most tokens it can attend to."""

    model: Any
    tokenizer: Any
    model_id: str
    n_context: int


def load_model(
    model: str, *, dtype: str = "auto", progress: Callable[[LoadProgress], None] | None = None
) -> LoadedModel:
    """Load a local folder."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32 if dtype == "float32" else torch.bfloat16
    ).eval()
    return LoadedModel(loaded, tokenizer, str(model), loaded.config.max_position_embeddings)
