"""Where the page listens, and where a remote engine's server does."""

import socket
import urllib.request
from urllib.parse import urlsplit

from streaming.errors import AddressUnavailable, ModelUnavailable

REACH_TIMEOUT_S = 1.0


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


def require_reachable(url: str) -> None:
    """Raise ModelUnavailable where nobody listens at a server's `url`; what is behind a proxy is taken on trust."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((host, port), REACH_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise ModelUnavailable(
            f"The server at {parts.netloc} cannot be reached ({error}); check --base-url."
        ) from error
