"""Bodies → requests: every member is used, known to be harmless, or refused by its name."""

import pytest

from streaming.server.api_errors import ApiError
from streaming.server.openai_schema import HARMLESS, parse_chat, parse_completion

MESSAGES = [{"role": "user", "content": "Hi"}]


def chat(**members):
    return parse_chat({"messages": MESSAGES, **members}, "me")


def refusal(parse, body) -> tuple[int, str | None, str | None]:
    with pytest.raises(ApiError) as refused:
        parse(body, "me")
    return refused.value.status_code, refused.value.param, refused.value.code


def test_every_setting_reaches_the_request():
    asked = chat(
        model="m", temperature=0.5, top_p=0.9, max_tokens=7, stop=["a", "b"], seed=3, n=2, logprobs=True,
        top_logprobs=4, frequency_penalty=0.1, presence_penalty=-0.2, top_k=5, min_p=0.01, repetition_penalty=1.1,
        stream=True, stream_options={"include_usage": True, "resume_s": 2},
    )  # fmt: skip
    first, second = asked.requests
    assert first.messages == MESSAGES
    assert (first.temperature, first.top_p, first.max_new_tokens, first.stop) == (0.5, 0.9, 7, ["a", "b"])
    assert (first.frequency_penalty, first.presence_penalty) == (0.1, -0.2)
    assert (first.top_k, first.min_p, first.repetition_penalty, first.logprobs) == (5, 0.01, 1.1, 4)
    assert (first.seed, second.seed, first.owner) == (3, 4, "me")
    assert (asked.model, asked.n, asked.is_stream, asked.has_usage, asked.n_top, asked.resume_s) == (
        "m", 2, True, True, 4, 2,
    )  # fmt: skip


def test_what_is_left_open_or_null_is_the_models():
    null = ("temperature", "top_p", "stop", "seed", "n", "logprobs", "stream", "stream_options", "tools", "logit_bias")
    for asked in (chat(), chat(**dict.fromkeys(null))):
        [request] = asked.requests
        assert (request.temperature, request.top_p, request.seed, request.stop, request.logprobs) == (
            None, None, None, [], 0,
        )  # fmt: skip
        assert request.max_new_tokens == 1_000_000  # as much as the context holds
        assert not asked.is_stream
    assert parse_completion({"prompt": "x"}, "").requests[0].max_new_tokens == 16


@pytest.mark.parametrize(
    ("seed", "seeds"), [(0, [0, 1]), (-1, [2**63 - 1, 0]), (-(2**63), [0, 1]), (2**63 - 1, [2**63 - 1, 0])]
)
def test_every_seed_of_64_bits_is_one_for_each_choice(seed, seeds):
    assert [request.seed for request in chat(seed=seed, n=2).requests] == seeds


def test_top_k_is_off_at_zero_and_at_vllms_minus_one():
    assert [chat(top_k=k).requests[0].top_k for k in (0, -1, 1, None)] == [0, 0, 1, None]


def test_what_changes_nothing_is_accepted():
    chat(**dict.fromkeys(HARMLESS, "x"))
    chat(
        response_format={"type": "text"}, modalities=["text"], tools=[], tool_choice="none", logit_bias={},
        parallel_tool_calls=True,
    )  # fmt: skip
    parse_completion({"prompt": "x", "echo": False, "best_of": 1, "suffix": ""}, "")
    parse_chat({"messages": [{"role": "user", "content": "x", "name": None}]}, "")


@pytest.mark.parametrize(
    "member",
    [
        {"tools": [{}]},
        {"logit_bias": {"1": 5}},
        {"response_format": {"type": "json_object"}},
        {"reasoning_effort": "high"},
        {"echo": True},
        {"best_of": 2},
        {"temprature": 1},
        {"add_generation_prompt": False},
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(member):
    [name] = member
    assert refusal(parse_chat, {"messages": MESSAGES, **member}) == (400, name, "unsupported_parameter")
    assert refusal(parse_completion, {"prompt": "x", **member}) == (400, name, "unsupported_parameter")


@pytest.mark.parametrize(
    ("member", "param"),
    [
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"seed": 10**400}, "seed"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 1, "max_tokens": 1}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"top_k": -2}, "top_k"),
        ({"stop": [1]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": "\ud800"}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": {"resume_s": 61}}, "stream_options.resume_s"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"model": 1}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "x", "name": "ann"}]}, "messages[0].name"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"continue_final_message": True}, "continue_final_message"),
    ],
)
def test_a_wrong_value_is_named(member, param):
    status, named, _ = refusal(parse_chat, {"messages": MESSAGES, **member})
    assert (status, named) == (400, param)


@pytest.mark.parametrize("prompt", [None, 1, [], [1, "x"], [[]], [[1, True]], [1.5], {"x": 1}])
def test_a_wrong_prompt_is_named(prompt):
    assert refusal(parse_completion, {"prompt": prompt}) == (400, "prompt", "invalid_value")


def test_prompts_are_texts_or_ids_or_lists_of_either():
    def prompts(prompt):
        return [r.prompt or r.prompt_ids for r in parse_completion({"prompt": prompt}, "").requests]

    assert prompts("a") == ["a"]
    assert prompts(["a", "b"]) == ["a", "b"]
    assert prompts([1, 2]) == [[1, 2]]
    assert prompts([[1, 2], [3]]) == [[1, 2], [3]]
    assert refusal(parse_completion, {"prompt": ["a"] * 4, "n": 5}) == (400, "n", "invalid_value")


@pytest.mark.parametrize("body", [None, [], "x", 1])
def test_a_body_is_an_object(body):
    assert refusal(parse_chat, body) == (400, None, "invalid_value")


def test_a_final_message_can_be_continued():
    messages = [*MESSAGES, {"role": "assistant", "content": "Hel"}]
    asked = parse_chat({"messages": messages, "continue_final_message": True, "add_generation_prompt": False}, "")
    [request] = asked.requests
    assert (request.messages, request.prefix_text) == (MESSAGES, "Hel")
