"""A taken port is told before anything is started."""

import socket

import pytest

from streaming.errors import AddressUnavailable
from streaming.server.address import require_free


def test_a_taken_port_says_what_to_do_and_a_free_one_stays_free():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(AddressUnavailable, match=rf"127\.0\.0\.1:{port} .*--port"):
            require_free("127.0.0.1", port)
    require_free("127.0.0.1", port)
    require_free("127.0.0.1", port)
