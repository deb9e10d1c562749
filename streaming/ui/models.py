"""The header's menu of models: what it shows, and what happens when someone chooses one."""

import asyncio
import functools
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import gradio as gr

from streaming.engine.menu_model import MenuModel
from streaming.errors import BrookError
from streaming.server.access import is_local
from streaming.server.runs import Runs
from streaming.ui.session import Session
from streaming.ui.settings_panel import offer_defaults
from streaming.ui.status import describe_loading

POLL_S = 0.2
"""How often the page is told how far a model has loaded."""

About = AsyncGenerator[dict[str, Any], None]


class ModelHandlers:
    """Tell a tab's header about the models. Used from event loops only."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._menu = runs.menu

    def of(self, session: Session) -> MenuModel:
        """Give the model that answers in a tab; the first one where the chosen one is not offered any more."""
        offered = {model.name: model for model in self._menu.models}
        return offered.get(session.model, self._menu.first)

    async def greet(self, session: Session, tab: Mapping[str, Any] | None, request: gr.Request) -> About:
        """Show what there is when the page opens, with the model that the tab had before a reload."""
        about = functools.partial(self._about, request)
        session.model = str((tab or {}).get("model", ""))
        model = self.of(session)
        try:
            if not any(model.is_loaded for model in self._menu.models):
                model.load()
            while model.status().state in ("loading", "failed") and not model.wait_ready(0):
                yield about(model, loading=model)
                await asyncio.sleep(POLL_S)
            yield about(model)
        except BrookError as error:
            yield about(model, problem=str(error), failed=True)

    async def choose(self, session: Session, _tab: Any, event: gr.EventData, request: gr.Request) -> About:
        """Load a model, and have it answer once it is there; where it cannot be had, the one before stays."""
        about = functools.partial(self._about, request)
        before = self.of(session)
        session.n_chosen += 1
        n_chosen = session.n_chosen
        try:
            model = self._menu.find(str(event._data["name"]), may_add=_is_local(request))
        except BrookError as error:
            yield about(before, problem=str(error))
            return
        try:
            await asyncio.to_thread(model.load)
            while not model.wait_ready(0):
                if session.n_chosen != n_chosen:  # another one was chosen meanwhile; this one loads on for later
                    return
                yield about(before, loading=model)
                await asyncio.sleep(POLL_S)
            session.model = model.name
            yield about(model)
        except BrookError as error:
            self._menu.drop(model)
            yield about(before, problem=str(error))

    async def offer(self, session: Session, *values: Any) -> Sequence[Any]:
        """Show the model's own defaults in the settings that nobody changed."""
        model = self.of(session)
        if model.status().state != "ready":
            return [gr.skip()] * len(values)
        before, session.defaults = session.defaults, model.defaults
        return offer_defaults(values, session.defaults, before)

    def _about(
        self,
        request: gr.Request,
        model: MenuModel,
        *,
        loading: MenuModel | None = None,
        problem: str = "",
        failed: bool = False,
    ) -> dict[str, Any]:
        status, own = None if loading is None else loading.status(), model.status()
        is_known = status is None and not failed and own.state == "ready"
        return {
            "model": model.name,
            "models": [
                {"id": other.name, "label": other.model_id, "state": other.status().state}
                for other in self._menu.models
            ],
            "open": self._menu.is_open and _is_local(request),
            "loading": None if status is None else {"words": describe_loading(status), "part": status.part},
            "problem": problem,
            "failed": failed,
            "note": own.detail if is_known else "",
            "tags": [list(pair) for pair in self._runs.tags(model).pairs] if is_known else None,
        }


def _is_local(request: gr.Request) -> bool:
    """Whether the page is open on this machine, and nothing stands between that others may reach it through."""
    return request.request is not None and is_local(request.request)
