"""A real engine on a scripted model that is told in the message what to say, so that tests of the page can steer it."""

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

from streaming.engine.local import LocalEngine
from streaming.engine.run import Run
from streaming.models.loading import LoadedModel
from tests.tiny import ScriptedModel, byte_tokenizer, loaded

N_CONTEXT = 4096
SLOW_S = 0.03
MAX_HOLD_S = 60.0
LONG = "slow: " + "x" * 2000
"""Takes a minute to say: whoever waits for its end waits for somebody to stop it."""


class _Before:
    """What the model does before each token: ScriptedModel takes it for its dict of callbacks."""

    def __init__(self) -> None:
        self.do: Callable[[int], None] = lambda k: None

    def get(self, k: int, _default: Any) -> Callable[[], None]:
        return lambda: self.do(k)


class ScriptedEngine(LocalEngine):
    """Replies to a message of the form `verb: text`.

    `say: X` says X. `slow: X` says it at a reader's pace. `fail: X` says X and breaks, the first time it is asked. Any
    other message is said back. Plain prompts go on with " and so on".
    """

    def __init__(self, load: Callable[[Any], LoadedModel] | None = None, name: str = "tiny", **limits: int) -> None:
        self.model = ScriptedModel()
        self.before = self.model.at = _Before()
        self.failed: set[str] = set()
        self.held = threading.Event()
        self.go = threading.Event()
        own = dataclasses.replace(loaded(self.model, n_context=N_CONTEXT), model_id=name)
        super().__init__(load or (lambda progress: own), "scripted", **limits)

    def _serve(self, run: Run, loaded_model: LoadedModel) -> None:
        request = run.generation.request
        asked = request.messages[-1]["content"] if request.messages else "say: and so on"
        verb, _, text = asked.partition(": ")
        script = byte_tokenizer()(text if verb in ("say", "slow", "fail", "hold") else asked)["input_ids"]
        fails = verb == "fail" and asked not in self.failed
        self.failed.add(asked)
        n_there = len(request.prefix_ids)
        self.model.script = script[n_there:]

        def before(k: int) -> None:
            if verb == "slow" and k >= 0:
                time.sleep(SLOW_S)
            if verb == "hold":
                self.held.set()
                self.go.wait(MAX_HOLD_S)
            if fails and k == len(self.model.script):
                raise RuntimeError("the scripted failure")

        self.before.do = before
        self.model.expect(len(run.generation.prompt_ids))
        super()._serve(run, loaded_model)


class LateEngine(ScriptedEngine):
    """A ScriptedEngine that loads once `before_load` has returned, and is called `name` from then on."""

    def __init__(self, name: str, before_load: Callable[[], Any]) -> None:
        def load(_progress: Any) -> LoadedModel:
            before_load()
            return dataclasses.replace(loaded(self.model, n_context=N_CONTEXT), model_id=name)

        super().__init__(load)
