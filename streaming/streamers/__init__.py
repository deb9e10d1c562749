"""Streamers: what `generate()` writes to. One shared base, one file for each kind of place that text goes to."""

from streaming.streamers.base import EventStreamer as EventStreamer
from streaming.streamers.iterator import IteratorStreamer as IteratorStreamer
from streaming.streamers.row import RowStream as RowStream
