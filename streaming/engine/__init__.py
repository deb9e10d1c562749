"""Engines: they turn GenerationRequests into streams of events."""
