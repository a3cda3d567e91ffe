"""Addresses of servers: user-info taken off before anything shows or saves them, and which proxy the environment names.

Only the standard library: the command line checks an address before it knows whether httpx is installed.
"""

from __future__ import annotations

import ipaddress
import socket
import urllib.request
from collections.abc import Sequence
from urllib.parse import unquote, urlsplit

__all__ = ["environment_proxy", "redacted", "split_userinfo"]

# Top-level domains that no public DNS has (RFC 6761, RFC 6762, ICANN's .internal).
_PRIVATE_DOMAINS = (".localhost", ".local", ".internal")


def redacted(url: str) -> str:
    """A URL for messages: ``***`` in the place of user-info, of a query and of a fragment, well-formed or not."""
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
    """The root of a URL without user-info, trailing slash and ``/v1``; and the user name and password, if it has them.

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
    except ValueError:  # a port that is no number, a bracket that is not closed
        valid = False
    # urlsplit removes tabs and line ends
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

    An address on this machine or in a private network has none, nor has what ``NO_PROXY`` lists.
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
    """Whether a host is on this machine or in a private network; a name by its domain, and by what it resolves to."""
    name = host.rstrip(".").lower()
    if name.endswith(_PRIVATE_DOMAINS) or ("." not in name and ":" not in name):
        return True
    try:
        # also resolves what is no name: 127.1 is 127.0.0.1
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):  # not known here: the proxy may know it
        return False
    return any(not ipaddress.ip_address(address).is_global for address in addresses)
