"""How near packed weights stay to the model they stand for, teacher-forced on fixed texts.

The default model: Brook's (by chunks and by single tokens, through the compiled step) and the stock bf16 model
against the dequantized float32 model. Another model, quantized at load: 4 bits against bf16, with `--model`; or with
`--regrouped` the default model with its columns in another order, which computes the same, but in which no group of
32 weights is one that the file has rounded before.

    python -m benchmarks.quality [--model FOLDER_OR_HUB_ID | --regrouped]
"""

import argparse
import json
import math
import tempfile
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


@torch.no_grad()
def save_regrouped(folder: str) -> None:
    """Save the default model in bf16 with hidden, intermediate and value dimensions in a random order."""
    exact = load_model(quantize="none", dtype="float32")
    model, config = exact.model, exact.model.config
    source = torch.Generator().manual_seed(0)
    hidden = torch.randperm(config.hidden_size, generator=source)
    inner = torch.randperm(config.intermediate_size, generator=source)
    n_queries = config.num_attention_heads // config.num_key_value_heads
    heads = [
        number * config.head_dim + torch.randperm(config.head_dim, generator=source)
        for number in range(config.num_key_value_heads)
    ]
    values = torch.cat(heads)
    attended = torch.cat([
        (number * n_queries + query) * config.head_dim + order - number * config.head_dim
        for number, order in enumerate(heads)
        for query in range(n_queries)
    ])  # fmt: skip
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:, hidden])
    model.model.norm.weight.copy_(model.model.norm.weight[hidden])
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.copy_(norm.weight[hidden])
        for linear, rows, columns in (
            (attention.q_proj, None, hidden),
            (attention.k_proj, None, hidden),
            (attention.v_proj, values, hidden),
            (attention.o_proj, hidden, attended),
            (mlp.gate_proj, inner, hidden),
            (mlp.up_proj, inner, hidden),
            (mlp.down_proj, hidden, inner),
        ):
            weight = linear.weight[:, columns]
            linear.weight.copy_(weight if rows is None else weight[rows])
    model.bfloat16().save_pretrained(folder)
    exact.tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="compare this model in 4 bits with itself in bf16")
    which.add_argument("--regrouped", action="store_true", help="the same for the default model, regrouped")
    arguments = parser.parse_args()
    if not arguments.regrouped:
        measure(arguments.model)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_regrouped(folder)
        measure(folder, "SmolLM2-135M-Instruct, regrouped")


def measure(model: str | None, title: str | None = None) -> None:
    packed = load_model(model, quantize="int4")
    if step_of(packed.model) is None:
        readers = {"Brook, 4 bits": in_chunks(packed.model)}
    else:
        readers = {"Brook, 4 bits, by chunks": by_step(packed.model, CHUNK), "by tokens": by_step(packed.model, 1)}
    exact_dtype = "bfloat16" if model else "float32"
    reference = in_chunks(load_model(model, quantize="none", dtype=exact_dtype).model)
    if not model:
        readers["stock bf16"] = in_chunks(load_model(quantize="none", dtype="bfloat16").model)
    rows = []
    for kind, ids in texts(packed.tokenizer).items():
        for name, read in readers.items():
            kl, agreement, perplexity = compare(read, reference, ids)
            rows.append([kind, ids.shape[1], name, f"{kl:.2e}", f"{agreement:.2f}", f"{perplexity:+.3f}"])
    columns = ["text", "tokens", "against the dequantized model", "mean KL, nats", "top-1, %", "perplexity, %"]
    report("quality" if not model else "quality_other", columns, rows, model=title or packed.model_id)


if __name__ == "__main__":
    main()
