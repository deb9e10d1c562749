"""Who may ask the API: with keys, whoever has one; without, programs on this machine alone. And who is on this machine.

A browser on this machine is not asked by its owner alone: any site that it shows can send requests to loopback
addresses. Browsers name that site in `Origin`, or, once a name of the site's points to this machine (DNS rebinding), in
`Host`; proxies, tunnels among them, name themselves in forwarding headers. Any of these closes the API to whoever has
no key.
"""

import hashlib
import ipaddress
import secrets
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request

from streaming.engine.base import SESSION_HEADER
from streaming.server.api_errors import ApiError

_FORWARDING = ("forwarded", "via", "x-real-ip")


class Access:
    """The rule for `/v1` and `/metrics`. `is_public` says that strangers can reach the app: a share link, a Space."""

    def __init__(self, keys: Iterable[str], *, is_public: bool) -> None:
        # Digests are all of one length: comparing them tells nothing of a key, not even how long it is.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._is_public = is_public

    def owner_of(self, request: Request) -> str:
        """Give the name that the request's generations are queued under, and reuse what was read under.

        It is the person's, and with SESSION_HEADER the session's: a page that asks for many people names each of them.

        Raises:
            ApiError: the request may not be made.
        """
        return f"{self.person_of(request)} {request.headers.get(SESSION_HEADER, '')}"

    def person_of(self, request: Request) -> str:
        """Give the name that the request's generations are counted under: its key's, whatever sessions that names.

        Raises:
            ApiError: the request may not be made.
        """
        if self._digests:
            return self._person_by_key(request.headers.get("authorization", ""))
        if self._is_public:
            raise _refusal("The API is closed to everyone on a shared page; start Brook with --api-key to open it.")
        if not is_local(request):
            raise _refusal("The API answers this machine alone; start Brook with --api-key to open it to others.")
        return "api"

    def _person_by_key(self, authorization: str) -> str:
        scheme, _, token = authorization.partition(" ")
        given = hashlib.sha256(token.strip().encode()).digest()
        found = [digest for digest in self._digests if secrets.compare_digest(digest, given)]  # always all of them
        if scheme.lower() != "bearer" or not found:
            raise ApiError(
                401,
                "The API key is missing or wrong; send it as Authorization: Bearer KEY.",
                type="authentication_error",
                code="invalid_api_key",
            )
        return f"api key {given.hex()[:16]}"


def _refusal(message: str) -> ApiError:
    return ApiError(403, message, type="permission_error", code="api_closed")


def is_local(request: Request) -> bool:
    """Whether a program on this machine sent the request, by itself."""
    headers, host = request.headers, request.headers.get("host", "")
    origin = headers.get("origin")
    return (
        request.client is not None
        and _is_loopback(request.client.host)
        and not _is_forwarded(headers)
        and _is_loopback(_hostname(host))
        and (origin is None or urlsplit(origin).netloc == host)
    )


def _is_forwarded(headers: Headers) -> bool:
    return any(name in _FORWARDING or name.startswith("x-forwarded-") for name in headers)


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
