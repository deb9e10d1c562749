"""What settings become, which tags are found, and what the words say: without a page."""

from dataclasses import dataclass

import gradio as gr
import pytest

from streaming.engine.base import EngineStatus, Generation, GenerationRequest, Progress, SamplingDefaults
from streaming.errors import InvalidRequest
from streaming.events import FinishEvent, Timings
from streaming.log import EventLog
from streaming.reasoning import begins_in_reasoning, find_tags
from streaming.ui.settings_panel import ChatSettings, offer_defaults, validate
from streaming.ui.status import describe_finish, describe_loading, describe_progress

DEFAULTS = ChatSettings("", 64, 0.0, 1.0, 0, 0.0, 1.0, 0, "")
EOS = 258


def settings(**changed) -> tuple:
    values = {name: getattr(DEFAULTS, name) for name in ChatSettings.__slots__} | changed
    return tuple(values.values())


class TestSettings:
    def test_they_become_a_request(self):
        request = ChatSettings("", 5, None, 0.9, 0, 0.0, 1.0, 0, "END\n\\n\\n\n").for_request()
        assert request["stop"] == ("END", "\n\n")
        assert request["seed"] is None
        assert request["temperature"] is None
        GenerationRequest(prompt="x", **request)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("temperature", -0.1), ("top_p", 1.5), ("top_k", -1), ("min_p", 2), ("max_new_tokens", 0), ("seed", -5)],
    )
    def test_what_the_engine_refuses_is_told_at_its_field(self, name, value):
        values = settings(**{name: value})
        wrong = [v["is_valid"] for v in validate(values)].index(False)
        assert list(ChatSettings.__slots__)[wrong] == name
        with pytest.raises(InvalidRequest) as refused:
            GenerationRequest(prompt="x", **{name: value})
        assert refused.value.field == name

    def test_a_models_defaults_fill_what_was_left_alone(self):
        initial = settings(max_new_tokens=256)
        changed = list(initial)
        changed[2] = 0.5
        defaults = SamplingDefaults(temperature=0.2, top_p=0.9)
        assert offer_defaults(initial, defaults)[2:4] == [0.2, 0.9]
        assert offer_defaults(changed, defaults)[2:4] == [gr.skip(), 0.9]

    def test_what_stays_is_not_sent_back_over_what_was_typed_meanwhile(self):
        assert offer_defaults(settings(), SamplingDefaults(temperature=0.2))[0:2] == [gr.skip()] * 2

    def test_emptied_fields_and_values_in_range_are_fine(self):
        assert all(v["is_valid"] for v in validate(settings(temperature=None, top_k=None)))
        assert all(v["is_valid"] for v in validate(settings()))


@dataclass
class Added:
    """An added token, as tokenizers list them."""

    content: str
    special: bool


class TagTokenizer:
    """A tokenizer with reasoning tags of its own, of which one pair is control tokens."""

    added_tokens_decoder = {  # noqa: RUF012
        1: Added("[THINK]", True),
        2: Added("[/THINK]", True),
        3: Added("<seed:think>", False),
        4: Added("</seed:think>", False),
        5: Added("<|im_end|>", True),
    }

    def decode(self, ids, skip_special_tokens):
        return "".join(self.added_tokens_decoder[i].content if i in self.added_tokens_decoder else "a" for i in ids)


class TestReasoning:
    def test_the_tokenizers_own_tags_are_found_and_control_tokens_put_back(self):
        tags = find_tags(TagTokenizer())
        assert ("[THINK]", "[/THINK]") in tags.pairs
        assert ("<seed:think>", "</seed:think>") in tags.pairs
        assert tags.text_of(1, "") == "[THINK]"
        assert tags.text_of(5, "") == ""
        assert tags.text_of(9, "word") == "word"

    def test_a_prompt_that_opens_the_block_is_known(self):
        tokenizer = TagTokenizer()
        tags = find_tags(tokenizer)
        assert begins_in_reasoning(tokenizer, [9, 9, 3], tags)
        assert not begins_in_reasoning(tokenizer, [3, 9, 4], tags)
        assert not begins_in_reasoning(tokenizer, [], tags)


class TestWords:
    def test_every_state_has_its_words(self):
        assert describe_loading(EngineStatus("loading", "m")) == "Loading the model"
        assert describe_loading(EngineStatus("loading", "m", detail="Fetching · 4 %")) == "Fetching · 4 %"
        assert describe_progress(Progress("waiting", n_ahead=2), 0, 0) == "Waiting · 2 ahead of you"
        assert describe_progress(Progress("reading", 256, 1024), 0, 0) == "Reading the prompt · 25 %"
        assert describe_progress(Progress("writing"), 1, 0) == "Writing · 1 token"
        assert describe_progress(Progress("writing"), 11, 2.0) == "Writing · 11 tokens · 5.0 tokens/s"

    def test_the_end_tells_how_much_how_fast_and_what_was_left_out(self):
        run = Generation(
            GenerationRequest(prompt="x"), (1,), log=EventLog(), seed=7, cancel=lambda run: None, n_dropped_messages=4
        )
        finish = FinishEvent("length", n_generated_tokens=1200, timings=Timings(0.0, 0.25, 31.25))
        assert describe_finish(run, finish) == (
            "Stopped at the length limit · 1,200 tokens · 31.2 tokens/s · first after 0.25 s · "
            "4 oldest messages left out to fit · seed 7"
        )


def test_skipped_updates_are_what_gradio_takes_for_no_change():
    assert gr.skip() == {"__type__": "update"}
