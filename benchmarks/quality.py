"""How near packed weights stay to the model they stand for, teacher-forced on fixed texts.

The default model: Brook's (by chunks and by single tokens, through the compiled step) and the stock bf16 model
against the dequantized float32 model. Another model, quantized at load: 4 bits against bf16, with `--model`.

    python -m benchmarks.quality [--model FOLDER_OR_HUB_ID]
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.report import report
from streaming.models.llama_step import step_of
from streaming.models.loading import load_model

TEXTS = Path(__file__).parent / "texts"
N_TOKENS = 2000
CHUNK = 256

Read = Callable[[torch.Tensor], Iterator[torch.Tensor]]
"""From ids `(1, seq)` to log-probabilities `(n, vocab)`, n positions at a time in order."""


def texts(tokenizer: Any) -> dict[str, torch.Tensor]:
    """Return the ids `(1, at most N_TOKENS)` of each kind of text."""
    ids = {kind: tokenizer((TEXTS / f"{kind}.txt").read_text())["input_ids"] for kind in ("prose", "code")}
    messages = json.loads((TEXTS / "chat.json").read_text())
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    ids["chat"] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return {kind: torch.tensor([values[:N_TOKENS]]) for kind, values in ids.items()}


def in_chunks(model: Any) -> Read:
    def read(ids: torch.Tensor) -> Iterator[torch.Tensor]:
        cache = DynamicCache(config=model.config)
        for chunk in ids.split(CHUNK, dim=1):
            yield model(chunk, past_key_values=cache, use_cache=True).logits[0].float().log_softmax(-1)

    return read


def by_step(model: Any, n_tokens: int) -> Read:
    def read(ids: torch.Tensor) -> Iterator[torch.Tensor]:
        step: Any = step_of(model)
        with step.continuing(DynamicCache(config=model.config)) as append:
            for chunk in ids[0].split(n_tokens):
                yield append(*chunk.tolist()).log_softmax(-1)

    return read


@torch.no_grad()
def compare(read: Read, reference: Read, ids: torch.Tensor) -> tuple[float, float, float]:
    """Return the mean KL(reference || read) in nats, top-1 agreement in %, and the change of perplexity in %."""
    logs, exact = torch.cat(list(read(ids))), torch.cat(list(reference(ids)))
    kl = (exact.exp() * (exact - logs)).sum(-1).mean()
    agreement = (logs.argmax(-1) == exact.argmax(-1)).float().mean()
    targets = ids[0, 1:, None]
    losses = [-each[:-1].gather(1, targets).mean().item() for each in (logs, exact)]
    return kl.item(), agreement.item() * 100, (math.exp(losses[0] - losses[1]) - 1) * 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="compare this model in 4 bits with itself in bf16")
    arguments = parser.parse_args()
    packed = load_model(arguments.model, quantize="int4")
    if step_of(packed.model) is None:
        readers = {"Brook, 4 bits": in_chunks(packed.model)}
    else:
        readers = {"Brook, 4 bits, by chunks": by_step(packed.model, CHUNK), "by tokens": by_step(packed.model, 1)}
    exact_dtype = "bfloat16" if arguments.model else "float32"
    reference = in_chunks(load_model(arguments.model, quantize="none", dtype=exact_dtype).model)
    if not arguments.model:
        readers["stock bf16"] = in_chunks(load_model(quantize="none", dtype="bfloat16").model)
    rows = []
    for kind, ids in texts(packed.tokenizer).items():
        for name, read in readers.items():
            kl, agreement, perplexity = compare(read, reference, ids)
            rows.append([kind, ids.shape[1], name, f"{kl:.2e}", f"{agreement:.2f}", f"{perplexity:+.3f}"])
    columns = ["text", "tokens", "against the dequantized model", "mean KL, nats", "top-1, %", "perplexity, %"]
    report("quality" if not arguments.model else "quality_other", columns, rows, model=packed.model_id)


if __name__ == "__main__":
    main()
