"""A tiny random Llama, a model that follows a script, and a byte-level tokenizer, made in memory in milliseconds."""

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from streaming.models.loading import LoadedModel

CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
N_CONTEXT = 512

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# As that of many models: who brings no system prompt gets one.
SYSTEM = "<|im_start|>system\nYou are a helpful model.<|im_end|>\n"
SYSTEM_TEMPLATE = "{% if messages[0]['role'] != 'system' %}" + SYSTEM + "{% endif %}" + CHAT_TEMPLATE


def byte_tokenizer(chat_template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Every byte is a token (ids 0 to 255), then the control tokens; characters take one to four tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(CONTROL_TOKENS)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@functools.cache
def _tiny_weights(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256 + len(CONTROL_TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=N_CONTEXT,
        bos_token_id=257,
        eos_token_id=258,
        pad_token_id=256,
    )
    return LlamaForCausalLM(config)


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """A random Llama in fp32 with 2 layers; its greedy output never meets an end token by luck of the seed."""
    # A config of its own: transformers notes `is_causal` in it while it runs a batch (utils.generic, 5.23).
    model = LlamaForCausalLM(copy.deepcopy(_tiny_weights(seed).config))
    model.load_state_dict(_tiny_weights(seed).state_dict())
    return model.eval()


class ScriptedConfig(PreTrainedConfig):
    model_type = "scripted"

    def __init__(self, vocab_size: int = 256 + len(CONTROL_TOKENS), **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = 8
        self.num_hidden_layers = 1
        self.num_attention_heads = 1
        super().__init__(**kwargs)


class ScriptedModel(PreTrainedModel, GenerationMixin):
    """A causal LM that says the ids of a script, whatever it is asked, and does `at[k]()` before its k-th token.

    While it reads a prompt in chunks, `k` counts up to 0 from below: the tokens that are still to be read.
    """

    config_class = ScriptedConfig

    def __init__(self, script: Sequence[int] = (), at: dict[int, Callable[[], None]] | None = None):
        super().__init__(ScriptedConfig())
        self.embedding = torch.nn.Embedding(self.config.vocab_size, 8)
        self.script = list(script)
        self.at = at or {}
        self.n_prompt: int | None = None
        self.n_forwards = 0
        self.generation_config = GenerationConfig(eos_token_id=258, pad_token_id=256, bos_token_id=257)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def expect(self, n_prompt: int) -> None:
        """Say how long the coming prompt is, so that prompt chunks are told from steps."""
        self.n_prompt = n_prompt

    def forward(self, input_ids, past_key_values=None, logits_to_keep=0, **kwargs):
        self.n_forwards += 1
        n_new = input_ids.shape[1]
        if past_key_values is not None:
            states = torch.zeros(1, 1, n_new, 8)
            past_key_values.update(states, states, 0)
        n_seen = past_key_values.get_seq_length()
        k = n_seen - (self.n_prompt or 0)
        logits = torch.zeros(1, 1, self.config.vocab_size)
        self.at.get(k, lambda: None)()
        if k >= 0:
            logits[0, 0, self.script[k] if k < len(self.script) else 258] = 10.0
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


class Parrot(ScriptedModel):
    """Says its script after any prompt that is read in one go."""

    def forward(self, input_ids, past_key_values=None, **kwargs):
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            self.expect(input_ids.shape[1])
        return super().forward(input_ids, past_key_values=past_key_values, **kwargs)


def loaded(model, tokenizer=None, n_context: int = N_CONTEXT) -> LoadedModel:
    """Dress a model as what load_model gives."""
    return LoadedModel(model=model, tokenizer=tokenizer or byte_tokenizer(), model_id="tiny", n_context=n_context)


ALPHABET = "abcdefghijklmnopqrstuvwxyz "


def chanting_llama(n_context: int = 16384) -> LlamaForCausalLM:
    """A Llama that says the alphabet over and over, so that a token too many or too few shows; some ms a token."""
    tokenizer = byte_tokenizer()
    n_vocab, n_hidden = 256 + len(CONTROL_TOKENS), 512
    config = LlamaConfig(
        vocab_size=n_vocab,
        hidden_size=n_hidden,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=n_context,
        bos_token_id=257,
        eos_token_id=258,
        pad_token_id=256,
    )
    model = LlamaForCausalLM(config).eval()
    said = tokenizer(ALPHABET)["input_ids"]
    follower = dict(zip(said, [*said[1:], said[0]], strict=True))
    with torch.no_grad():
        for layer in model.model.layers:  # the layers add nothing: what comes next depends on the last token alone
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(n_vocab, n_hidden))
        model.lm_head.weight.zero_()
        for token_id in range(n_vocab):
            model.lm_head.weight[follower.get(token_id, said[0]), token_id] = 1.0
    return model
