"""Who is there and what their tab shows. What is kept is in the store, what is being written in the runs."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from streaming.conversations.tree import Conversation, Message, new_id
from streaming.engine.base import SamplingDefaults

# The tab says whose it is and what it shows (page.js), in the place of its input; the session's is the server's own.
SAY_WHO = "(session, tab, ...inputs) => [session, brook.tab(), ...inputs]"

_BROWSER_ID = re.compile(r"[A-Za-z0-9_-]{22,64}")
_NOTICES = {
    "abandoned": "Stopped: nobody was watching.",
    "interrupted": "Interrupted: the server was stopped.",
}


def owner_of(tab: Mapping[str, Any] | None, request: gr.Request | None) -> str:
    """Say whose conversations a tab may see: its account's or, where there are no accounts, its browser's.

    A browser is known by a secret that it made itself and keeps (page.js); here only its hash is kept. One that sends
    none is nobody, which nobody else is.
    """
    if request is not None and request.username:
        return f"account:{request.username}"
    secret = str((tab or {}).get("browser", ""))
    if not _BROWSER_ID.fullmatch(secret):
        return f"nobody:{new_id()}"
    return f"browser:{hashlib.sha256(secret.encode()).hexdigest()}"


def caller_of(request: gr.Request) -> str:
    """Say whose a program's requests are: its account's or, where there are no accounts, its Gradio session's.

    Not its address's: behind a proxy, as on a Space, everyone has the same.
    """
    return f"account:{request.username}" if request.username else f"session:{request.session_hash}"


def for_page(message: Message, siblings: Sequence[str] = ()) -> dict[str, Any]:
    """Give a message as the transcript shows it; `siblings` are the ids of its alternatives, itself among them."""
    return {
        "id": message.id,
        "role": message.role,
        "text": message.content,
        "reasoning": message.in_reasoning,
        "notice": message.error or _NOTICES.get(message.reason or "", ""),
        "failed": message.error is not None,
        "resumable": message.can_continue,
        "rating": message.rating,
        "note": message.note,
        "siblings": list(siblings),
    }


class Session:
    """What one tab shows: `conversation` is its id ("" for one that is new), `leaf` its last message, `words` what its
    list of conversations was searched for. `model` is the one that it has chosen ("" for the first), `defaults` those
    that its settings show.

    `view` counts what the tab was told to show: a handler that still writes for an older view leaves the page alone.
    Used from the event loop only, so it needs no lock.
    """

    def __init__(self) -> None:
        self.conversation = ""
        self.leaf: str | None = None
        self.words = ""
        self.view = 0
        self.model = ""
        self.defaults = SamplingDefaults()
        self.n_chosen = 0

    def show(self, conversation: Conversation) -> None:
        """Take note of what the tab shows from now on."""
        self.conversation = conversation.id if conversation.messages else ""
        self.leaf = conversation.leaf
        self.view += 1
