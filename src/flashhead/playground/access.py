"""Who may ask: pages of the server's own only, and over a network whoever has the token.

A browser also runs other people's pages. They can send requests to 127.0.0.1, and by DNS rebinding
read the answers under a name of their own. So a loopback server answers to loopback names only, a
request that computes must be JSON (a foreign page has to ask before it sends that, and is refused)
and must not name another origin. Nothing allows cross-origin reads.
"""

import hmac
import http.cookies
import ipaddress
import secrets
import urllib.parse
from email.message import Message

from flashhead.errors import FlashHeadError

LEAST_TOKEN_CHARS = 16


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address or `localhost`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Access:
    """The checks of a server.

    Args:
        host: it is bound to.
        token: that clients must know, or None.

    Raises:
        FlashHeadError: others can reach `host` and there is no token; or the token is short or has
            characters that a URL cannot carry as they are.
    """

    def __init__(self, host: str, token: str | None) -> None:
        self._loopback = is_loopback(host)
        if token is None and not self._loopback:
            raise FlashHeadError(
                f"--host {host}: others can reach it; wanted --token too, or 127.0.0.1"
            )
        if token is not None:
            plain = token.isascii() and token.replace("-", "").replace("_", "").isalnum()
            if len(token) < LEAST_TOKEN_CHARS or not plain:
                raise FlashHeadError(
                    f"--token: wanted {LEAST_TOKEN_CHARS} or more letters, digits, - and _"
                )
        self._token, self._session = token, secrets.token_urlsafe(32)

    def knows_host(self, header: str | None) -> bool:
        """Whether a Host header names this server. With a token any name will do: the cookie of
        one name is not sent to another.
        """
        if not self._loopback:
            return header is not None
        name = _split(f"//{header or ''}").hostname
        return name is not None and is_loopback(name)

    def same_origin(self, headers: "Message[str, str]") -> bool:
        """Whether a request comes from the server's own page, or from no page at all."""
        if headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            return False
        origin = headers.get("Origin")
        return origin is None or _split(origin).netloc == headers.get("Host")

    def accepts_token(self, token: str) -> bool:
        """Whether it is the token."""
        return self._token is not None and _equal(token, self._token)

    def cookie(self, port: int) -> str:
        """Set-Cookie of a client that has shown the token. Ports share cookies, so its name has
        the port.
        """
        return f"{_cookie_name(port)}={self._session}; HttpOnly; SameSite=Strict; Path=/"

    def entitled(self, headers: "Message[str, str]", port: int) -> bool:
        """Whether a request carries the token (`Authorization: Bearer`) or the cookie."""
        if self._token is None:
            return True
        kind, _, value = headers.get("Authorization", "").partition(" ")
        if kind.lower() == "bearer" and _equal(value.strip(), self._token):
            return True
        try:
            cookies = http.cookies.SimpleCookie(headers.get("Cookie", ""))
        except http.cookies.CookieError:
            return False
        found = cookies.get(_cookie_name(port))
        return found is not None and _equal(found.value, self._session)


def _split(url: str) -> urllib.parse.SplitResult:
    """Parts of a URL; of what is none, empty ones."""
    try:
        return urllib.parse.urlsplit(url)
    except ValueError:
        return urllib.parse.urlsplit("")


def _cookie_name(port: int) -> str:
    return f"flashhead_{port}"


def _equal(one: str, other: str) -> bool:
    """In a time that does not tell where they differ."""
    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode())
