"""Where the page listens."""

import socket

from streaming.errors import AddressUnavailable


def require_free(host: str, port: int) -> None:
    """Raise AddressUnavailable where nothing can listen on `host`:`port` now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise AddressUnavailable(
                f"Cannot listen on {host}:{port} ({error.strerror}); choose another with --port or --host."
            ) from error
