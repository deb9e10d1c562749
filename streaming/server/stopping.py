"""How the server ends when it is told to: in order, and soon."""

import os
import signal
import sys
import threading
from types import FrameType

EXIT_S = 4.5
"""How long a model that does not let go can hold up the end; what ends servers seldom waits longer than 5 s or 10."""


def exit_on_sigterm() -> None:
    """Have SIGTERM end the process as a return from the main thread does, within EXIT_S whatever others do."""

    def end(_signal: int, _frame: FrameType | None) -> None:
        timer = threading.Timer(EXIT_S, os._exit, [0])
        timer.daemon = True
        timer.start()
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)
