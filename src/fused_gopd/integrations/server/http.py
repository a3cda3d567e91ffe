"""Requests to an inference server: secrets that are masked in messages, proxies, and retries.

The requests of one call run as coroutines in a separate thread. An interrupt of the caller cancels them and closes
their connections, so that neither side waits for the other.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import email.utils
import html
import importlib
import inspect
import json
import logging
import random
import re
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar, cast
from urllib.parse import quote, quote_plus

from ...installing import extra, packages
from ...values import require_count, require_positive
from .. import needs
from ..addresses import environment_proxy, redacted, split_userinfo

with needs(__name__.rpartition(".")[0], "httpx", install=partial(extra, "train")):
    httpx: Any = importlib.import_module("httpx")

T = TypeVar("T")
logger = logging.getLogger(__name__)

_LONGEST_BACKOFF = 30.0
_LONGEST_RETRY_AFTER = 600.0
_TOO_BUSY = (408, 425, 429)
_NOT_IMPLEMENTED = 501
# RFC 9110: the characters of a header's name
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")


class TeacherServerError(RuntimeError):
    """The teacher's server cannot be reached, refuses a request, or sends an unexpected answer.

    Attributes:
        status: of the last HTTP answer; None where there was none, or nothing was asked.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class LostAnswerError(Exception):
    """An answer that is not there, or not whole, because its server stopped meanwhile: the request is repeated."""


class Request(NamedTuple):
    """An HTTP request."""

    method: str
    path: str
    body: dict[str, Any] | None


# ------------------------------------------------------------------------------------------------------------- secrets


class Secrets:
    """Texts that messages must not show, in all forms in which servers repeat them."""

    def __init__(self, values: Iterable[str]) -> None:
        forms = {form for value in values for form in _written_forms(value)}
        self._forms = sorted(forms - {""}, key=len, reverse=True)

    def shown(self, text: str, limit: int = 500) -> str:
        """A text of the server for a message: secrets masked, unprintable characters escaped, then shortened."""
        for form in self._forms:
            text = text.replace(form, "***")
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        return text if len(text) <= limit else text[:limit] + "..."


def _written_forms(value: str) -> set[str]:
    escaped = {json.dumps(value)[1:-1], repr(value)[1:-1], html.escape(value), quote(value, safe=""), quote_plus(value)}
    return {value, *escaped, base64.b64encode(value.encode()).decode()}


class _Own:
    """Headers, and user name and password, in an object that shows none of them."""

    def __init__(self, headers: dict[str, str], userinfo: tuple[str, str] | None) -> None:
        self.headers, self.userinfo = headers, userinfo


def bearer(api_key: object) -> str:
    """The key without surrounding whitespace, such as the line end of a file."""
    if not isinstance(api_key, str):
        raise TypeError(f"api_key must be a str, got {type(api_key).__name__}")
    key = api_key.strip()
    if not key or not all("!" <= character <= "~" for character in key):
        what = "is empty" if not key else "has a space, a control character or one that is not ASCII within it"
        raise ValueError(f"api_key must be printable ASCII without spaces, and it {what} (it is not shown here)")
    return key


def checked_headers(headers: Mapping[str, str] | None, api_key: str | None) -> dict[str, str]:
    """Check headers, and strip whitespace around their values; errors do not show the values."""
    checked: dict[str, str] = {}
    for i, (name, value) in enumerate((headers or {}).items()):
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise ValueError(f"headers must have names of letters, digits and hyphens, and entry {i} has another")
        if not isinstance(value, str):
            raise TypeError(f"headers[{name!r}] must be a str, got {type(value).__name__}")
        value = value.strip()
        if not all(" " <= character <= "~" or character == "\t" for character in value):
            raise ValueError(
                f"headers[{name!r}] must be printable ASCII, and has another character (it is not shown here)"
            )
        checked[name] = value
    if api_key is not None:
        if any(name.lower() == "authorization" for name in checked):
            raise ValueError("api_key and headers['Authorization'] are two authorisations: give one of them")
        checked["Authorization"] = f"Bearer {api_key}"
    return checked


def _secrets_in_headers(headers: Mapping[str, str]) -> Iterable[str]:
    """The values and their words: of ``Bearer KEY``, a server may repeat the key alone."""
    for value in headers.values():
        yield value
        yield from (word for word in value.split() if len(word) > 3 and word.lower() not in ("bearer", "basic"))


# ------------------------------------------------------------------------------------------------------------- requests


class Connection:
    """The connection to one server; see :class:`ServerTeacher` for the arguments."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None,
        headers: Mapping[str, str] | None,
        proxy: str | Literal[False] | None,
        timeout: float,
        retries: int,
        backoff: float,
        max_concurrency: int,
        advice: Callable[[int], str],  # advice for a refusal, by its status
    ) -> None:
        self.base_url, userinfo = split_userinfo("base_url", base_url)
        self.timeout, self.backoff = require_positive("timeout", timeout), require_positive("backoff", backoff)
        self.retries = require_count("retries", retries, 0)
        self.max_concurrency = require_count("max_concurrency", max_concurrency)
        self._own_advice = advice
        self.patience = 0.0  # seconds after its first failure during which a request is repeated beyond retries
        key = None if api_key is None else bearer(api_key)
        checked = checked_headers(headers, key)
        if userinfo is not None and any(name.lower() == "authorization" for name in checked):
            raise ValueError("base_url has a user name and api_key or headers an authorisation: give one of them")
        try:
            httpx.URL(self.base_url)
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ValueError(f"base_url must be an address, got {self.base_url!r} ({error})") from None
        self._own = _Own(checked, userinfo)
        self._proxy, proxy_userinfo = _proxy_of(self.base_url, proxy)
        self.secrets = Secrets(
            [
                *_secrets_in_headers(checked),
                *_secrets_in_userinfo(userinfo),
                *_secrets_in_userinfo(proxy_userinfo),
            ]
        )
        # without TLS an empty context, which is cheap to make
        secure = self.base_url.startswith("https:")
        self._tls = _tls_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._random = random.Random()  # separate, so that it does not change the random numbers of the training
        self._answers = True  # whether the last request was answered
        self._closed = False

    def close(self) -> None:
        self._closed = True

    def request_all(self, requests: Sequence[Request], read: Callable[[int, Any], T | Awaitable[T]]) -> list[T]:
        """``read(index, answer)`` of the answer to each request, with ``max_concurrency`` requests at a time.

        What ``read`` returns is awaited if it can be. Where it raises :class:`LostAnswerError` the request is repeated.
        The first failure cancels the other requests. So does an interrupt, which does not wait for them.
        """
        if self._closed:
            raise TeacherServerError(f"the connection to {self.base_url} is closed")
        return _in_thread(self._request_all(requests, read)) if requests else []

    async def _request_all(self, requests: Sequence[Request], read: Callable[[int, Any], T | Awaitable[T]]) -> list[T]:
        limits = httpx.Limits(max_connections=self.max_concurrency, max_keepalive_connections=self.max_concurrency)
        # an explicit transport: without one the client uses all proxies of the environment
        transport = httpx.AsyncHTTPTransport(verify=self._tls, limits=limits, proxy=self._proxy)
        under_way = asyncio.Semaphore(self.max_concurrency)
        client = httpx.AsyncClient(
            base_url=self.base_url,
            transport=transport,
            headers=self._own.headers,  # no variable has them, which a traceback may show
            auth=self._own.userinfo,
            timeout=self.timeout,
        )
        async with client:

            async def answer_to(i: int, request: Request) -> T:
                async with under_way:
                    return await self._request(client, request, partial(read, i))

            tasks = [asyncio.create_task(answer_to(i, request)) for i, request in enumerate(requests)]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _request(self, client: Any, request: Request, read: Callable[[Any], T | Awaitable[T]]) -> T:
        """Send a request, with retries, and return what ``read`` makes of its answer."""
        where, attempt = self.base_url + request.path, 0
        patient_until: float | None = None  # from the first failure on: until then a request may have waited long
        while True:
            asked_to_wait = status = None
            try:
                response = await client.request(request.method, request.path, json=request.body)
            except httpx.TimeoutException as error:
                failure = f"timeout={self.timeout:g} s was not enough ({type(error).__name__})"
            except (httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.InvalidURL, UnicodeError) as error:
                # a retry would fail in the same way
                raise TeacherServerError(f"{where} cannot be asked ({self._described(error)})") from None
            except httpx.TransportError as error:
                failure = f"no connection ({self._described(error)})"
            except httpx.DecodingError as error:
                failure = f"an answer whose compression is broken ({self._described(error)})"
            else:
                status = response.status_code
                if status < 300:
                    try:
                        read_from = read(self._json(response, where))
                        found: T = await read_from if inspect.isawaitable(read_from) else read_from
                    except LostAnswerError as error:
                        failure = str(error)
                    else:
                        self._note_answer()
                        return found
                else:
                    failure = f"status {status}: {self._message(response)}"
                    if is_refusal(status):
                        raise TeacherServerError(f"{where} refused, {failure}{self._advice(response)}", status)
                    asked_to_wait = _retry_after(response.headers.get("Retry-After"))
            now = time.monotonic()
            patient_until = now + self.patience if patient_until is None else patient_until
            left = patient_until - now
            if attempt >= self.retries and left <= 0:
                raise self._no_answer(where, attempt + 1, failure, status)
            pause = self._pause(attempt, asked_to_wait)
            if asked_to_wait is None and attempt >= self.retries:
                pause = min(pause, left)  # so that the last attempt is at the end of patience
            self._note_failure(where, failure, left)
            await asyncio.sleep(pause)
            attempt += 1

    def _no_answer(self, where: str, attempts: int, failure: str, status: int | None) -> TeacherServerError:
        proxy = "" if self._proxy is None else f", through the proxy {redacted(str(self._proxy.url))}"
        return TeacherServerError(
            f"no answer from {where}{proxy} in {attempts} attempts; the last: {failure}. Is the server up and "
            "reachable from here? Where it is slow, raise timeout or lower batch_size and max_concurrency; where it "
            "restarts now and then, raise retries or patience",
            status,
        )

    def _pause(self, attempt: int, asked_to_wait: float | None) -> float:
        if asked_to_wait is not None:
            if asked_to_wait > _LONGEST_RETRY_AFTER:
                raise TeacherServerError(
                    f"{self.base_url} asks to be left alone for {asked_to_wait:.0f} s (Retry-After), more than the "
                    f"{_LONGEST_RETRY_AFTER:.0f} s that a training waits"
                )
            return asked_to_wait
        # the exponent is bounded too, since patience allows thousands of attempts
        return min(_LONGEST_BACKOFF, self.backoff * 2.0 ** min(attempt, 60)) * self._random.uniform(0.5, 1.0)

    def _note_failure(self, where: str, failure: str, left: float) -> None:
        """Warn once that the server does not answer: with patience, a long wait would look like a hang."""
        if self._answers and left > 0:
            logger.warning("no answer from %s (%s): it is asked again for up to %.0f s", where, failure, left)
            self._answers = False

    def _note_answer(self) -> None:
        if not self._answers:
            logger.warning("%s answers again", self.base_url)
            self._answers = True

    # ----------------------------------------------------------------------------------------------- what came instead

    def _described(self, error: Exception) -> str:
        return f"{type(error).__name__}: {self.secrets.shown(str(error))}"

    def _json(self, response: Any, where: str) -> Any:
        try:
            return response.json()
        except (ValueError, RecursionError):  # not JSON, a wrong encoding, or thousands of brackets
            raise TeacherServerError(
                f"{where} answered with status {response.status_code} and something that is not JSON: "
                f"{self.secrets.shown(_text(response), 200)!r}. Is base_url that of the model's server, or of a proxy "
                "in front of it?",
                response.status_code,
            ) from None

    def _message(self, response: Any) -> str:
        """The message in an error's answer; servers nest it in different ways."""
        try:
            answer = response.json()
            for _ in range(2):
                if isinstance(answer, dict):
                    answer = answer.get("error", answer.get("message", answer.get("detail", answer)))
            return self.secrets.shown(answer if isinstance(answer, str) else json.dumps(answer))
        except (ValueError, RecursionError):
            return repr(self.secrets.shown(_text(response), 300))

    def _advice(self, response: Any) -> str:
        status = response.status_code
        if status < 400:
            target = self.secrets.shown(redacted(response.headers.get("Location", "nowhere")))
            return f", which redirects to {target}: base_url must be where the server itself is"
        if status in (401, 403):
            return ": pass api_key, or the headers that the server wants"
        if status == 407:
            return ": it is a proxy that wants a user name and password (proxy=)"
        return self._own_advice(status)


def is_refusal(status: int) -> bool:
    """Whether a server that answers so will not do what is asked, rather than being busy or down."""
    return status not in _TOO_BUSY and (status < 500 or status == _NOT_IMPLEMENTED)


def _secrets_in_userinfo(userinfo: tuple[str, str] | None) -> list[str]:
    """The password, or a user name without password (a token), and both as HTTP encodes them."""
    if userinfo is None:
        return []
    user, password = userinfo
    return [password or user, base64.b64encode(f"{user}:{password}".encode()).decode()]


def _proxy_of(base_url: str, proxy: str | Literal[False] | None) -> tuple[Any, tuple[str, str] | None]:
    """httpx's object for the given proxy, else for the environment's, and (user name, password)."""
    if proxy is False:
        return None, None
    name = "proxy"
    if proxy is None:
        found = environment_proxy(base_url)
        if found is None:
            return None, None
        name, proxy = found
        proxy = proxy if "://" in proxy else f"http://{proxy}"
    elif not isinstance(proxy, str):
        raise TypeError(f"proxy must be an address, False for no proxy, or None, got {type(proxy).__name__}")
    url, userinfo = split_userinfo(name, proxy, _PROXY_SCHEMES)
    if url.startswith("socks"):
        try:
            importlib.import_module("socksio")
        except ImportError:
            raise ImportError(f"{name} is a SOCKS proxy, which needs socksio: {packages('httpx[socks]')}") from None
    try:
        return httpx.Proxy(url, auth=userinfo), userinfo
    except (httpx.InvalidURL, ValueError) as error:
        raise ValueError(f"{name} must be the address of a proxy, got {url!r} ({error})") from None


def _text(response: Any) -> str:
    """The answer decoded as UTF-8, whatever its charset: some of Python's codecs do not decode to text."""
    return cast("bytes", response.content).decode(errors="replace")


def _tls_context() -> Any:
    """The context of all requests, since reading the certificates takes longer than a request."""
    try:
        return httpx.create_ssl_context()
    except OSError as error:  # ssl's exceptions are subclasses of it
        raise TeacherServerError(f"the certificates of SSL_CERT_FILE or SSL_CERT_DIR cannot be read: {error}") from None


def _retry_after(value: str | None) -> float | None:
    """Seconds in a ``Retry-After`` header, which is a number or a date; None if it is missing or invalid."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _in_thread(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a daemon thread. An interrupt of this thread cancels it without waiting for it."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)
    result: Future[T] = Future()

    def run() -> None:
        try:
            outcome = loop.run_until_complete(task)
        except BaseException as error:
            result.set_exception(error)
        else:
            result.set_result(outcome)
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    thread = threading.Thread(target=run, daemon=True, name="teacher-server")
    try:
        thread.start()
        return result.result()
    finally:
        if not result.done():
            with contextlib.suppress(RuntimeError):  # the loop was closed in the meantime
                loop.call_soon_threadsafe(task.cancel)
