"""Addresses of servers: removal of user-info before an address is shown or saved, and the proxy of the environment.

Uses the standard library alone: the command line checks addresses before it requires httpx.
"""

from __future__ import annotations

import ipaddress
import socket
import urllib.request
from collections.abc import Sequence
from urllib.parse import unquote, urlsplit

__all__ = ["environment_proxy", "redacted", "split_userinfo"]

# Top-level domains that are not in the public DNS (RFC 6761, RFC 6762, ICANN's .internal).
_PRIVATE_DOMAINS = (".localhost", ".local", ".internal")


def redacted(url: str) -> str:
    """A URL for messages: ``***`` in place of user-info, query and fragment, also where the URL is malformed."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    _, at, host = rest.rpartition("@")
    for mark in "?#":
        start, found, _ = host.partition(mark)
        host = f"{start}{mark}***" if found else host
    return f"{scheme}{separator}{'***@' if at else ''}{host}"


def split_userinfo(
    name: str, url: object, schemes: Sequence[str] = ("http", "https")
) -> tuple[str, tuple[str, str] | None]:
    """Split a URL into its root, without user-info, trailing slash and ``/v1``, and (user name, password) or None.

    Raises:
        ValueError: naming the argument; the message does not show user-info.
    """
    expected = f"{name} must be an address such as '{schemes[0]}://localhost:8000'"
    if not isinstance(url, str):
        raise ValueError(f"{expected}, got {type(url).__name__}")
    url = url.strip()
    expected += f", got {redacted(url)!r}"
    try:
        parts = urlsplit(url)
        valid = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:  # for example a port that is not a number, or an unclosed bracket
        valid = False
    # on the whole URL, since urlsplit removes tabs and line ends
    if not valid or any(character.isspace() or not character.isprintable() for character in url):
        raise ValueError(expected)
    if "@" in parts.path + parts.query + parts.fragment:
        raise ValueError(f"{expected}: the characters / ? # @ of a user name or password must be percent-encoded")
    if parts.query or parts.fragment:
        raise ValueError(f"{expected}: it must have no query and no fragment")
    userinfo, _, host = parts.netloc.rpartition("@")
    user, _, password = userinfo.partition(":")
    root = f"{parts.scheme}://{host}{parts.path}".rstrip("/").removesuffix("/v1").rstrip("/")
    return root, (unquote(user), unquote(password)) if userinfo else None


def environment_proxy(url: str) -> tuple[str, str] | None:
    """The name of the environment's proxy for a URL, such as ``HTTPS_PROXY``, and its address; None for no proxy.

    Addresses on this machine or in a private network have none, nor do those in ``NO_PROXY``.
    """
    proxies = urllib.request.getproxies()
    parts = urlsplit(url)
    host = parts.hostname or ""
    for kind in (parts.scheme, "all"):
        if proxies.get(kind):
            bypassed = urllib.request.proxy_bypass(parts.netloc) or _is_private(host)
            return None if bypassed else (f"{kind.upper()}_PROXY", proxies[kind])
    return None


def _is_private(host: str) -> bool:
    """Whether a host is on this machine or in a private network, by its domain or by its resolved addresses."""
    name = host.rstrip(".").lower()
    if name.endswith(_PRIVATE_DOMAINS) or ("." not in name and ":" not in name):
        return True
    try:
        # also resolves abbreviated addresses: 127.1 is 127.0.0.1
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):  # unknown here: the proxy may resolve it
        return False
    return any(not ipaddress.ip_address(address).is_global for address in addresses)
