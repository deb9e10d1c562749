"""/metrics tells what the engine did, whoever asked it, and only to those who may know."""

import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from streaming.engine.base import EngineStatus, Generation, GenerationRequest
from streaming.errors import InvalidRequest
from streaming.events import NO_ID, FinishEvent, Timings, TokenEvent
from streaming.log import EventLog
from streaming.server.metrics import MeteredEngine
from tests.scripted import LONG
from tests.serving import WAIT_S, ask, said, serving, wait_for


def samples(text: str | bytes) -> dict[str, float]:
    """Give the samples by name and labels."""
    text = text if isinstance(text, str) else text.decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_it_counts_tokens_and_endings_and_what_is_going_on(scripted):
    with serving(scripted) as url:

        def chat(text, **options):
            return ask(f"{url}v1/chat/completions", {"messages": said(text), **options})

        zero = samples(ask(f"{url}metrics")[1])
        assert zero["brook_generated_tokens_total"] == zero["brook_generations_total{reason=cancelled}"] == 0
        assert zero["brook_engine_info{device=cpu,engine=local,model=tiny,state=ready}"] == 1
        chat("say: hello")
        chat("say: hello", max_tokens=3)
        chat("fail: abc")
        assert chat("x" * 9000)[0] == 400
        seen = samples(ask(f"{url}metrics")[1])
        assert seen["brook_generated_tokens_total"] == 6 + 3 + 3
        assert seen["brook_generations_total{reason=stop}"] == 1
        assert seen["brook_generations_total{reason=length}"] == 1
        assert seen["brook_generations_total{reason=error}"] == 1
        assert seen["brook_refused_requests_total{error=PromptTooLong}"] == 1
        assert seen["brook_time_to_first_token_seconds_count"] == 3
        assert seen["brook_inter_token_seconds_count"] == 5 + 2 + 2
        assert seen["brook_reused_tokens_total"] > 0
        assert seen["brook_prompt_tokens_total"] > seen["brook_reused_tokens_total"]
        assert seen["brook_cache_bytes"] > 0
        assert seen["brook_active_generations"] == seen["brook_queued_generations"] == 0


def test_a_running_stream_is_counted_before_it_ends(scripted):
    metered = MeteredEngine(scripted)
    run = metered.submit(GenerationRequest(messages=said(LONG), max_new_tokens=2000))
    waiting = metered.submit(GenerationRequest(messages=said(LONG)))
    wait_for(lambda: len(run.log) > 3)
    seen = samples(metered.exposition())
    assert 3 <= seen["brook_generated_tokens_total"] < 2000
    assert (seen["brook_active_generations"], seen["brook_queued_generations"]) == (1, 1)
    waiting.cancel()
    run.cancel()
    run.result(WAIT_S)
    seen = samples(metered.exposition())
    assert seen["brook_generated_tokens_total"] == len(run.log) - 1
    assert seen["brook_generations_total{reason=cancelled}"] == 2
    assert seen["brook_time_to_first_token_seconds_count"] == 1, "what was cancelled in the queue had no token"


def test_a_page_without_a_key_keeps_them_from_strangers(scripted):
    with serving(scripted, space=True) as url:
        assert ask(f"{url}metrics")[0] == 403
    with serving(scripted, api_key=("sk-some-key",)) as url:
        assert ask(f"{url}metrics")[0] == 401
        assert ask(f"{url}metrics", authorization="Bearer sk-some-key")[0] == 200


class _LogEngine:
    """An engine whose generations are there whole at once."""

    kind, model_id = "log", "log"

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens

    def submit(self, request):
        if request.prompt == "refuse":
            raise InvalidRequest("no", "prompt")
        log = EventLog()
        for i in range(self.n_tokens):
            log.append(TokenEvent(i, i, "x", t_s=0.01 * (i + 1)))
        log.append(FinishEvent("length", n_generated_tokens=self.n_tokens, timings=Timings(0.0, 0.01, 100.0)))
        return Generation(request, (1,), log=log, seed=1, cancel=lambda run: None)

    def status(self):
        return EngineStatus("ready", self.model_id)


def test_tokens_that_came_several_in_an_event_are_all_counted_once_the_engine_says_how_many():
    log = EventLog()
    engine = _LogEngine(0)
    engine.submit = lambda request: Generation(request, (1,), log=log, seed=1, cancel=lambda run: None)
    metered, seen = MeteredEngine(engine), []
    metered.submit(GenerationRequest(prompt="x"))
    for event in (
        TokenEvent(0, NO_ID, "one two", t_s=0.1),
        TokenEvent(1, NO_ID, " three four", t_s=0.2),
        FinishEvent("stop", n_generated_tokens=5, timings=Timings(0.0, 0.1, 10.0)),
    ):
        log.append(event)
        seen.append(samples(metered.exposition())["brook_generated_tokens_total"])
    assert seen == [1, 2, 5]


def test_what_has_ended_is_let_go_of_without_anyone_asking_for_metrics():
    metered = MeteredEngine(_LogEngine(3))
    for _ in range(50):
        metered.submit(GenerationRequest(prompt="x"))
    assert len(metered._followed) == 1
    with pytest.raises(InvalidRequest):
        metered.submit(GenerationRequest(prompt="refuse"))


def test_counting_takes_less_than_a_hundredth_of_the_fastest_decoding():
    n_tokens = 20_000
    metered = MeteredEngine(_LogEngine(n_tokens))
    metered.submit(GenerationRequest(prompt="x"))
    began = time.perf_counter()
    metered._count()
    counting_s = (time.perf_counter() - began) / n_tokens
    assert metered._followed == []
    assert counting_s < 0.01 * (1 / 100), "a token takes 10 ms at 100 tokens/s"
