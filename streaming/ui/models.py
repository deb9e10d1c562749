"""The header's menu of models: what it shows, and what happens when someone chooses one."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import gradio as gr

from streaming.engine.base import SamplingDefaults
from streaming.engine.menu import MenuModel, ModelMenu
from streaming.errors import BrookError
from streaming.ui.reasoning import find_tags
from streaming.ui.settings_panel import offer_defaults
from streaming.ui.status import describe_loading

POLL_S = 0.2
"""How often the page is told how far a model has loaded."""

About = AsyncGenerator[dict[str, Any], None]


class ModelChoice:
    """Which model a tab has chosen ("" for the first), and whose defaults its settings show."""

    def __init__(self) -> None:
        self.name = ""
        self.defaults = SamplingDefaults()
        self.n_chosen = 0


class ModelHandlers:
    """Tell a tab's header about the models. Used from event loops only."""

    def __init__(self, menu: ModelMenu) -> None:
        self._menu = menu

    def of(self, choice: ModelChoice) -> MenuModel:
        """Give the model that answers in a tab; the first one where the chosen one is not offered any more."""
        offered = {model.model_id: model for model in self._menu.models}
        return offered.get(choice.name, self._menu.first)

    async def greet(self, choice: ModelChoice, tab: Mapping[str, Any] | None) -> About:
        """Show what there is when the page opens, with the model that the tab had before a reload."""
        choice.name = str((tab or {}).get("model", ""))
        model = self.of(choice)
        if not any(model.is_loaded for model in self._menu.models):
            model.load()
        try:
            while model.status().state == "loading" and not model.wait_ready(0):
                yield self._about(model, loading=model)
                await asyncio.sleep(POLL_S)
            if model.status().state == "failed":
                model.wait_ready(0)
            yield self._about(model)
        except BrookError as error:
            yield self._about(model, problem=str(error), failed=True)

    async def choose(self, choice: ModelChoice, event: gr.EventData) -> About:
        """Load a model, and have it answer once it is there; where it cannot be had, the one before stays."""
        before = self.of(choice)
        choice.n_chosen += 1
        n_chosen = choice.n_chosen
        try:
            model = self._menu.find(str(event._data["name"]))
        except BrookError as error:
            yield self._about(before, problem=str(error))
            return
        try:
            await asyncio.to_thread(model.load)
            while not model.wait_ready(0):
                if choice.n_chosen != n_chosen:  # another one was chosen meanwhile; this one loads on for later
                    return
                yield self._about(before, loading=model)
                await asyncio.sleep(POLL_S)
            choice.name = model.model_id
            yield self._about(model)
        except BrookError as error:
            self._menu.drop(model)
            yield self._about(before, problem=str(error))

    async def offer(self, choice: ModelChoice, *values: Any) -> Sequence[Any]:
        """Show the model's own defaults in the settings that nobody changed."""
        model = self.of(choice)
        if model.status().state != "ready":
            return values
        before, choice.defaults = choice.defaults, model.defaults
        return offer_defaults(values, choice.defaults, before)

    def _about(
        self, model: MenuModel, *, loading: MenuModel | None = None, problem: str = "", failed: bool = False
    ) -> dict[str, Any]:
        status = None if loading is None else loading.status()
        is_known = status is None and not failed and model.status().state == "ready"
        return {
            "model": model.model_id,
            "models": [{"id": other.model_id, "state": other.status().state} for other in self._menu.models],
            "open": self._menu.is_open,
            "loading": None if status is None else {"words": describe_loading(status), "part": status.part},
            "problem": problem,
            "failed": failed,
            "tags": [list(pair) for pair in find_tags(model.tokenizer).pairs] if is_known else None,
        }
