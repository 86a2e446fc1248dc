"""ASGI middleware that checks the origin of requests and sets security headers."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# NiiVue's font image needs data: and blob:. Nothing else from outside this server, no inline script or style.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def is_loopback(host: str) -> bool:
    """Return whether an address or name refers to this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Reject requests under another name than the server's (DNS rebinding), and requests from other sites.

    Args:
        app: The wrapped app.
        host: Address that the server listens on.
        names: Further allowed host names.
    """

    def __init__(self, app: ASGIApp, host: str, names: Iterable[str]) -> None:
        from starlette.middleware.trustedhost import TrustedHostMiddleware  # here, since it is of the extra `serve`

        self._app = app
        self._trusted_names = TrustedHostMiddleware(self._same_site, [*LOOPBACK, host, *names], www_redirect=False)
        # Rebinding needs a name. Beyond loopback an address as such is what users of the network type.
        self._addresses = not is_loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                security = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *security]
            await send(message)

        checked = self._same_site if self._addresses and _is_address(_headers(scope)) else self._trusted_names
        await checked(scope, receive, with_headers)

    async def _same_site(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.responses import PlainTextResponse

        refused = _of_another_site(scope["method"], _headers(scope))
        await (PlainTextResponse("another site asked", 403) if refused else self._app)(scope, receive, send)


def _headers(scope: Scope) -> dict[str, str]:
    return {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}


def _is_address(headers: dict[str, str]) -> bool:
    """Whether the request names the server by an IP address."""
    try:
        ipaddress.ip_address(urlsplit(f"//{headers.get('host', '')}").hostname or "")
    except ValueError:
        return False
    return True


def _of_another_site(method: str, headers: dict[str, str]) -> bool:
    host = headers.get("host", "")
    if headers.get("origin") not in (None, f"http://{host}", f"https://{host}"):
        return True
    followed_a_link = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
    return headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not followed_a_link
