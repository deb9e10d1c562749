"""Servers in processes of their own."""

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
END_S = 30.0


@contextlib.contextmanager
def started(command: list[str], **environment: str) -> Iterator[tuple[float, psutil.Process]]:
    """Run a server for the time of a block; give the moment it was started, and its process."""
    at = time.perf_counter()
    # Neither may wait for a network that may not be there.
    env = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"} | environment
    process = psutil.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield at, process
    finally:
        process.terminate()
        process.wait(timeout=END_S)


def free_port() -> int:
    """Give a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
