"""The converted default model is the model in the GGUF file: the same values, the same token ids."""

import itertools
import random

import pytest
import regex
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from streaming.errors import DefaultModelUnavailable
from streaming.models.embedded import find_gguf
from streaming.models.gguf import GgufFile
from streaming.models.loading import load_model
from tests.conftest import skip_or_fail

pytestmark = pytest.mark.model

TEXTS = [
    "An increasing sequence: one, two, three",
    "I can't believe it's 2026 already; we've 1,234.56 reasons (and they're good)!",
    "def f(x):\n    return {x: [1, 2, 3]}  # 0x1F\n\n\n\tif not f(42):\r\n\t\tpass\n",
    "   leading, trailing and   inner spaces   \n \n\t\t ",
    "昔々、あるところに。안녕하세요 세계! مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดีชาวโลก Привет, мир Γειά σου",
    "👩‍👩‍👧‍👦🏳️‍🌈 é e\u0301 ﬁ ½ ² Ⅷ ٣٤٥ １２３ ๑๒ \u200b\ufeff\x00\x7f",
    "<|im_start|>user\nhello<|im_end|>\n<|endoftext|><repo_name><|im_end><|im_end|>12<|im_end|>",
    "|im_end|> < |im_end|> <file_sep>x=1",
    "",
]


def random_texts(n: int) -> list[str]:
    """Strings of characters from all over Unicode, seeded, with runs of spaces and digits between them."""
    source = random.Random(0)
    blocks = [(0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0xDFF), (0xE00, 0x10FF)]
    blocks += [(0x2000, 0x2BFF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF)]

    def piece() -> str:
        low, high = source.choice(blocks)
        return "".join(chr(source.randint(low, high)) for _ in range(source.randint(1, 6)))

    glue = ["", " ", "  ", "\n", "\t", "7", "42", "'s", "'LL", " <|im_end|>"]
    return ["".join(piece() + source.choice(glue) for _ in range(source.randint(1, 12))) for _ in range(n)]


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory):
    try:
        return find_gguf(tmp_path_factory.mktemp("wheel"))
    except DefaultModelUnavailable as error:
        skip_or_fail(f"the default model's file is not here: {error}")


def test_every_weight_equals_what_transformers_unpacks_bit_for_bit(default_model, gguf_path):
    theirs = AutoModelForCausalLM.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32)
    weights = default_model.model.state_dict()
    assert weights.keys() == theirs.state_dict().keys()
    different = [name for name, value in theirs.state_dict().items() if not torch.equal(weights[name], value)]
    assert different == [], "transformers.integrations.gguf unpacks these blocks or names these weights differently"
    ids = torch.tensor([default_model.tokenizer.encode(TEXTS[1])])
    with torch.inference_mode():
        assert torch.equal(default_model.model(ids).logits, theirs.eval()(ids).logits)


def test_the_file_itself_loads_as_the_same_model(default_model, gguf_path):
    direct = load_model(str(gguf_path), dtype="float32", quantize="none", device="cpu")
    weights = default_model.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in direct.model.state_dict().items())
    assert direct.tokenizer.encode(TEXTS[4]) == default_model.tokenizer.encode(TEXTS[4])


def test_the_config_is_that_of_the_hub(default_model):
    config = default_model.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_position_embeddings, config.tie_word_embeddings) == (49152, 8192, True)
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert default_model.n_context == 8192
    assert default_model.model_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert default_model.model.num_parameters() == 134_515_008


def test_special_tokens_are_those_of_the_hub(default_model):
    tokenizer = default_model.tokenizer
    for model_config in (default_model.model.config, default_model.model.generation_config):
        ids = (model_config.bos_token_id, model_config.eos_token_id, model_config.pad_token_id)
        assert ids == (1, 2, 2)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.unk_token == "<|endoftext|>"
    assert len(tokenizer) == 49152
    assert [tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<empty_output>")] == [0, 16]
    assert tokenizer.decode([1, 17, 2, 16], skip_special_tokens=True) == "!"


def test_the_chat_template_brings_its_own_system_prompt(default_model):
    messages = [{"role": "user", "content": "Hi"}]
    text = default_model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_token_ids_equal_a_slow_reference_on_every_kind_of_text(default_model, gguf_path):
    reference = SlowTokenizer(gguf_path)
    for text in TEXTS + random_texts(600):
        assert default_model.tokenizer.encode(text) == reference.encode(text), repr(text)
        assert default_model.tokenizer.decode(default_model.tokenizer.encode(text)) == text


def test_where_no_digits_meet_token_ids_equal_those_of_transformers(default_model, gguf_path):
    theirs = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    for text in (regex.sub(r"\p{N}", "", text) for text in TEXTS + random_texts(600)):
        assert default_model.tokenizer.encode(text) == theirs.encode(text), repr(text)


class SlowTokenizer:
    """llama.cpp's "smollm" tokenizer in plain Python, from the file's own vocabulary and merges.

    Rules: llama.cpp `llama-vocab.cpp`, LLAMA_VOCAB_PRE_TYPE_SMOLLM: split at each `\\p{N}`, then by GPT-2's pattern.
    """

    WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(self, gguf_path):
        metadata = GgufFile.open(gguf_path).metadata
        tokens = metadata["tokenizer.ggml.tokens"]
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(metadata["tokenizer.ggml.merges"])}
        control = [t for t, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True) if kind == 3]
        self.control = regex.compile("(" + "|".join(map(regex.escape, sorted(control, key=len, reverse=True))) + ")")
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in shown]
        self.spelling = {b: chr(b) for b in shown} | {b: chr(256 + n) for n, b in enumerate(hidden)}

    def encode(self, text: str) -> list[int]:
        ids = []
        for part in self.control.split(text):
            if self.control.fullmatch(part):
                ids.append(self.ids[part])
                continue
            for piece in regex.split(r"(\p{N})", part):
                for word in self.WORD.findall(piece):
                    ids += [self.ids[token] for token in self.merge([self.spelling[b] for b in word.encode()])]
        return ids

    def merge(self, parts: list[str]) -> list[str]:
        while len(parts) > 1:
            ranked = [(self.ranks.get(pair, len(self.ranks)), i) for i, pair in enumerate(itertools.pairwise(parts))]
            rank, i = min(ranked)
            if rank == len(self.ranks):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts
