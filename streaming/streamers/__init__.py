"""Streamers: what `generate()` writes to. One shared base, one file for each kind of place that text goes to."""

from streaming.streamers.base import EventStreamer as EventStreamer
from streaming.streamers.callback import CallbackStreamer as CallbackStreamer
from streaming.streamers.console import ConsoleStreamer as ConsoleStreamer
from streaming.streamers.files import FileStreamer as FileStreamer
from streaming.streamers.iterator import IteratorStreamer as IteratorStreamer
from streaming.streamers.network import SocketStreamer as SocketStreamer
from streaming.streamers.row import RowStream as RowStream
from streaming.streamers.sse import SSEStreamer as SSEStreamer
from streaming.streamers.tee import TeeStreamer as TeeStreamer
