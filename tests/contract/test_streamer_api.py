"""What Brook relies on in transformers' streamer API, which its documentation calls "subject to change".

Each test states one thing in its docstring. When one fails after an upgrade, that statement is what changed; what
relies on it is streaming/streamers/base.py (every streamer) and streaming/engine/ (the engine's own).
`.ci/newest-transformers` runs this file against the newest release that the range admits.
"""

import inspect
import queue
import threading

import pytest
import torch
from transformers import (
    AsyncTextIteratorStreamer,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

from streaming import IteratorStreamer
from tests.tiny import ScriptedModel, byte_tokenizer, tiny_llama

PROMPT = torch.tensor([[72, 73, 74, 72, 73, 74, 72, 73]])
PAD, EOS = 256, 258
N_NEW = 12


class Recorder(BaseStreamer):
    """Keeps every call, with the thread that made it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, torch.Tensor | None, threading.Thread]] = []

    def put(self, value):
        self.calls.append(("put", value, threading.current_thread()))

    def end(self):
        self.calls.append(("end", None, threading.current_thread()))

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.calls]

    @property
    def values(self) -> list[torch.Tensor]:
        return [value for _, value, _ in self.calls if value is not None]


def generate(streamer, model=None, prompt=PROMPT, **options) -> torch.Tensor:
    options = {"max_new_tokens": N_NEW, "do_sample": False, "pad_token_id": PAD, **options}
    return (model or tiny_llama()).generate(prompt, attention_mask=(prompt != PAD).long(), streamer=streamer, **options)


class TestOrder:
    @pytest.mark.parametrize(
        "options", [{}, {"do_sample": True}, {"return_dict_in_generate": True}, {"use_cache": False}]
    )
    def test_the_prompt_then_every_step_then_one_end(self, options):
        """put() brings the prompt once, then the tokens of each step in order; end() comes once, last."""
        recorder = Recorder()
        output = generate(recorder, **options)
        output = output if isinstance(output, torch.Tensor) else output.sequences
        assert recorder.names == ["put"] * (len(recorder.calls) - 1) + ["end"]
        assert torch.equal(recorder.values[0], PROMPT)
        assert torch.equal(torch.cat([PROMPT[0], *recorder.values[1:]]), output[0])

    def test_the_shapes(self):
        """The prompt is (batch, seq), a step is (batch,); both are integers."""
        recorder = Recorder()
        generate(recorder)
        prompt, *steps = recorder.values
        assert prompt.shape == PROMPT.shape
        assert {step.shape for step in steps} == {(1,)}
        assert not any(value.is_floating_point() for value in recorder.values)

    def test_the_device(self):
        """Every value is on the CPU, wherever the model is."""
        recorder = Recorder()
        generate(recorder)
        assert {value.device.type for value in recorder.values} == {"cpu"}

    def test_the_thread(self):
        """The calls come from the thread that called generate(), before it returns."""
        recorder = Recorder()
        thread = threading.Thread(target=generate, args=(recorder,), name="brook-test-generate")
        thread.start()
        thread.join(60)
        assert {caller for _, _, caller in recorder.calls} == {thread}
        assert recorder.names[-1] == "end"

    def test_the_prompt_comes_before_the_model_is_run(self):
        """put(prompt) precedes the first forward pass: a cancel that waits for it costs nothing."""
        order: list[str] = []
        model = tiny_llama()
        model.register_forward_pre_hook(lambda *_: order.append("forward"))

        class Streamer(Recorder):
            def put(self, value):
                order.append("put")

        generate(Streamer(), model)
        assert order == ["put"] + ["forward", "put"] * N_NEW

    def test_chunked_prefill_hands_the_prompt_over_whole_and_once(self):
        """With prefill_chunk_size the model reads the prompt in pieces; put() still gets it in one."""
        recorder, model, sizes = Recorder(), tiny_llama(), []
        model.register_forward_pre_hook(
            lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        generate(recorder, model, prefill_chunk_size=3)
        assert sizes[:3] == [3, 3, 2]
        assert [tuple(value.shape) for value in recorder.values] == [(1, 8)] + [(1,)] * N_NEW

    def test_an_encoder_decoder_begins_with_the_decoders_own_prompt(self):
        """For encoder-decoder models the first put() is the decoder's start token, not the text that was read."""
        config = T5Config(
            vocab_size=300, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        recorder = Recorder()
        T5ForConditionalGeneration(config).eval().generate(PROMPT, streamer=recorder, max_new_tokens=3)
        assert torch.equal(recorder.values[0], torch.tensor([[0]]))


class TestEnd:
    def test_it_is_not_called_when_the_model_raises(self):
        """end() is in no `finally`: whoever waits for it must be told of the failure in another way."""

        def fail():
            raise ValueError("boom")

        recorder, model = Recorder(), ScriptedModel([65, 66, 67], {1: fail})
        model.expect(8)
        with pytest.raises(ValueError, match="boom"):
            generate(recorder, model)
        assert recorder.names == ["put", "put"]

    def test_a_bad_argument_is_refused_before_any_call(self):
        """Nothing is put, and nothing ended, when generate() refuses its arguments."""
        recorder = Recorder()
        with pytest.raises(ValueError, match="no_such_option"):
            generate(recorder, no_such_option=1)
        assert recorder.calls == []

    def test_a_stopping_criterion_ends_it_after_the_token_that_it_saw(self):
        """The token that met a stopping criterion is put, then end() comes."""

        class AfterThree(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return torch.tensor([input_ids.shape[1] >= 11])

        recorder = Recorder()
        generate(recorder, stopping_criteria=StoppingCriteriaList([AfterThree()]))
        assert recorder.names == ["put"] * 4 + ["end"]


class TestCancel:
    @pytest.mark.parametrize("after", [0, 1, 5])
    def test_what_put_raises_leaves_generate_as_it_is(self, after):
        """An exception from put() unwinds generate() at once: no other forward pass, no end(), the same object."""

        class Enough(Exception):
            pass

        enough, model = Enough(), tiny_llama()
        forwards: list[int] = []
        model.register_forward_pre_hook(lambda *_: forwards.append(1))

        class Streamer(Recorder):
            def put(self, value):
                super().put(value)
                if len(self.calls) > after:
                    raise enough

        streamer = Streamer()
        with pytest.raises(Enough) as caught:
            generate(streamer, model)
        assert caught.value is enough
        assert (len(forwards), streamer.names) == (after, ["put"] * (after + 1))

    def test_the_model_generates_again_afterwards(self):
        """Nothing of a generation that was unwound stays in the model."""

        class Streamer(Recorder):
            def put(self, value):
                raise KeyError

        model = tiny_llama()
        expected = generate(None, model)
        with pytest.raises(KeyError):
            generate(Streamer(), model)
        assert torch.equal(generate(None, model), expected)


class TestSeveralTokens:
    @pytest.mark.parametrize("kind", ["prompt lookup", "assistant"])
    def test_assisted_decoding_hands_all_accepted_tokens_over_at_once(self, kind):
        """Steps are (1, n) there, also for n = 1; joined they are the output, none lost, none twice."""
        options = {"prompt_lookup_num_tokens": 3} if kind == "prompt lookup" else {"assistant_model": tiny_llama()}
        recorder = Recorder()
        output = generate(recorder, **options)
        prompt, *steps = recorder.values
        assert {(step.dim(), step.shape[0]) for step in steps} == {(2, 1)}
        assert max(step.shape[1] for step in steps) > 1
        assert torch.equal(torch.cat([prompt, *steps], dim=1), output)
        assert recorder.names[-1] == "end"

    def test_and_ours_shows_them(self):
        """IteratorStreamer tells such a step from a new prompt."""
        plain, assisted = (IteratorStreamer(byte_tokenizer(), skip_prompt=True) for _ in range(2))
        generate(plain)
        generate(assisted, prompt_lookup_num_tokens=3)
        assert assisted.log.token_ids() == plain.log.token_ids()


class TestBatch:
    def test_rows_that_ended_are_padded(self):
        """In a batch a step is (batch,); a row that has ended gets pad_token_id at every further step."""
        model = tiny_llama()
        prompts = torch.tensor([[72, 73], [90, 91]])
        first = generate(None, model, prompts)[0, 2].item()
        recorder = Recorder()
        output = generate(recorder, model, prompts, eos_token_id=first)
        prompt, *steps = recorder.values
        assert torch.equal(prompt, prompts)
        assert torch.equal(torch.stack(steps, dim=1), output[:, 2:])
        assert [step[0].item() for step in steps] == [first] + [PAD] * (len(steps) - 1)
        assert len(steps) > 1

    def test_num_return_sequences_expands_the_prompt(self):
        """The prompt put() gets has a row for every sequence that is returned."""
        recorder = Recorder()
        generate(recorder, do_sample=True, num_return_sequences=3)
        assert recorder.values[0].shape == (3, PROMPT.shape[1])
        assert {step.shape for step in recorder.values[1:]} == {(3,)}

    def test_beam_search_is_refused(self):
        """generate() itself refuses a streamer with beams, before it calls it."""
        recorder = Recorder()
        with pytest.raises(ValueError, match="`streamer` cannot be used with beam search"):
            generate(recorder, num_beams=2)
        assert recorder.calls == []


class TestWhatOursStandsInFor:
    @pytest.mark.parametrize("kind", [TextIteratorStreamer, AsyncTextIteratorStreamer])
    def test_the_constructor(self, kind):
        """Theirs takes (tokenizer, skip_prompt=False, timeout=None, **decode_kwargs), and ours the same."""

        def positional(cls):
            parameters = list(inspect.signature(cls).parameters.values())
            return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

        assert positional(kind) == positional(IteratorStreamer)
        assert list(inspect.signature(kind).parameters.values())[-1].kind is inspect.Parameter.VAR_KEYWORD

    def test_a_timeout(self):
        """TextIteratorStreamer raises queue.Empty when nothing came in time."""
        with pytest.raises(queue.Empty):
            next(TextIteratorStreamer(byte_tokenizer(), timeout=0.01))
