"""ASGI middleware that checks the origin of requests and sets security headers."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Messages = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

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
LOOPBACK = ("localhost", "127.0.0.1", "::1")


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

    def __init__(
        self, app: Callable[[Scope, Messages, Send], Awaitable[None]], host: str, names: Iterable[str]
    ) -> None:
        self._app = app
        self._names = {name.lower() for name in (*LOOPBACK, host, *names)}
        # Rebinding needs a name, so plain addresses are allowed if the server is reachable from the network.
        self._addresses = not is_loopback(host)

    async def __call__(self, scope: Scope, receive: Messages, send: Send) -> None:
        """Handle a request (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        host = headers.get("host", "")
        refusal = None
        if not self._known(host):
            refusal = (421, "unknown host name; restart the explorer with --allow-host NAME to allow it")
        elif _of_another_site(scope["method"], headers, host):
            refusal = (403, "requests from other sites are not allowed")

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                security = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *security]
            await send(message)

        if refusal is None:
            await self._app(scope, receive, with_headers)
            return
        body = refusal[1].encode()
        kind = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
        await with_headers({"type": "http.response.start", "status": refusal[0], "headers": kind})
        await with_headers({"type": "http.response.body", "body": body})

    def _known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self._addresses


def _of_another_site(method: str, headers: dict[str, str], host: str) -> bool:
    if headers.get("origin") not in (None, f"http://{host}", f"https://{host}"):
        return True
    followed_a_link = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
    return headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not followed_a_link
