"""A judge behind an OpenAI-compatible chat endpoint: requests, retries, a limit, a cache.

On `http.client` of the standard library: one JSON request and one JSON response need no more, it
follows no redirect (which would carry the key elsewhere), and its socket can be closed when the
time is up, however slowly the server drips. Proxies are not used.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import http.client
import json
import os
import random
import socket
import ssl
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

URL, MODEL, KEY = "VIBEJAX_JUDGE_URL", "VIBEJAX_JUDGE_MODEL", "VIBEJAX_JUDGE_KEY"
MAX_RESPONSE_BYTES = 2**20
FIRST_PAUSE_S = 0.5  # doubled after each attempt
MAX_PAUSE_S = 30.0
SLOT_POLL_S = 0.02
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})  # statuses that may pass

Scores = TypeVar("Scores")


class JudgeError(Exception):
    """A judgement that could not be had; the message is one line.

    Attributes:
        again: whether another attempt may succeed.
        pause_s: seconds that the server asked to wait before it.
    """

    def __init__(self, why: str, *, again: bool = True, pause_s: float = 0.0):
        """Sets the message and what another attempt needs."""
        super().__init__(" ".join(why.split()))
        self.again = again
        self.pause_s = pause_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where the judge is and how it is asked; see `rubric.verify` for the settings."""

    url: str
    model: str
    key: str = dataclasses.field(default="", repr=False)
    timeout_s: float = 60.0
    attempts: int = 4
    concurrency: int = 8
    max_tokens: int = 2_048
    cache_dir: Path | None = None

    def __post_init__(self):
        """Checks every field."""
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"judge URL {self.url!r:.80}: must be http://host or https://host")
        if parts.username or parts.query or parts.fragment:
            raise ValueError(f"judge URL {parts.hostname!r}: must have no user, query or fragment")
        if not self.key.isascii() or not self.key.isprintable():
            raise ValueError(f"{KEY}: must be printable ASCII")
        if not 0 < self.timeout_s <= 3_600:
            raise ValueError(f"timeout_s = {self.timeout_s!r}: must be above 0 and at most 3600")
        for name, most in (("attempts", 100), ("concurrency", 1_024), ("max_tokens", 10**6)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be 1 to {most}")


def from_environment(**settings: Any) -> Endpoint:
    """Returns the endpoint that the environment names.

    `VIBEJAX_JUDGE_URL` is the base URL, up to and with `/v1`; `VIBEJAX_JUDGE_MODEL` the model;
    `VIBEJAX_JUDGE_KEY` the bearer key, which local servers do not need.

    Args:
        settings: the other fields of `Endpoint`.

    Raises:
        ValueError: URL or model is not set, or a field is not valid.
    """
    for name in (URL, MODEL):
        if not os.environ.get(name):
            raise ValueError(f"environment variable {name} is not set: rubric records need a judge")
    return Endpoint(
        url=os.environ[URL], model=os.environ[MODEL], key=os.environ.get(KEY, ""), **settings
    )


def ask(
    endpoint: Endpoint,
    messages: list[dict[str, str]],
    *,
    schema: Mapping[str, Any],
    read: Callable[[str], Scores],
) -> Scores:
    """Asks the judge, from the cache if it has answered the same before.

    An answer that `read` refuses is asked for again and never cached.

    Raises:
        JudgeError: no answer that `read` accepts, within the attempts and the time.
    """
    body = json.dumps(
        {
            "model": endpoint.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": endpoint.max_tokens,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "scores", "strict": True, "schema": schema},
            },
        }
    ).encode()
    cached = _cached(endpoint, body)
    if cached is not None:
        with contextlib.suppress(JudgeError):  # a damaged file is asked for anew
            return read(cached)
    deadline = time.monotonic() + endpoint.timeout_s
    attempt = 0
    while True:
        attempt += 1
        try:
            with _slot(endpoint, deadline):
                answer = _post(endpoint, body, deadline)
            scores = read(answer)
        except JudgeError as error:
            # Spread out, so that the workers of a pool do not come back all at once.
            pause = min(FIRST_PAUSE_S * 2 ** (attempt - 1), MAX_PAUSE_S) * random.uniform(0.5, 1)
            pause = max(pause, error.pause_s)
            out_of_time = time.monotonic() + pause >= deadline
            if not error.again or attempt == endpoint.attempts or out_of_time:
                raise JudgeError(f"{error} (attempt {attempt} of {endpoint.attempts})") from error
            time.sleep(pause)
        else:
            _store(endpoint, body, answer)
            return scores


@contextlib.contextmanager
def _slot(endpoint: Endpoint, deadline: float) -> Iterator[None]:
    """Holds one of the endpoint's slots: a locked file, so the limit spans processes.

    The kernel frees the lock of a process that is killed.
    """
    owner = os.getuid()
    name = hashlib.sha256(endpoint.url.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"vibejax-judge-{owner}", name)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.parent.stat().st_uid != owner:
        raise ValueError(f"{folder.parent} belongs to another user: slots cannot be kept there")
    while (slot := _free_slot(folder, endpoint.concurrency)) is None:
        if time.monotonic() + SLOT_POLL_S >= deadline:
            raise JudgeError(f"none of {endpoint.concurrency} slots became free", again=False)
        time.sleep(SLOT_POLL_S)
    try:
        yield
    finally:
        os.close(slot)


def _free_slot(folder: Path, count: int) -> int | None:
    for number in random.sample(range(count), count):
        slot = os.open(folder / str(number), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(slot)
        else:
            return slot
    return None


def _post(endpoint: Endpoint, body: bytes, deadline: float) -> str:
    """Sends one request and returns the text of the answer.

    Raises:
        JudgeError: no connection, no answer in time, another status than 200, or no such text.
    """
    parts = urllib.parse.urlsplit(endpoint.url)
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise JudgeError("out of time", again=False)
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(
            parts.hostname, parts.port, timeout=left_s, context=ssl.create_default_context()
        )
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=left_s)
    timer = None
    try:
        connection.connect()
        # The socket's own time-out starts anew with every byte: a server that drips would never
        # meet it.
        timer = threading.Timer(deadline - time.monotonic(), _cut, [connection.sock])
        timer.daemon = True
        timer.start()
        path = parts.path.rstrip("/") + "/chat/completions"
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        data = response.read(MAX_RESPONSE_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        where = f"{parts.hostname}:{parts.port or parts.scheme}"
        raise JudgeError(f"{where}: {type(error).__name__}: {error}"[:300]) from error
    finally:
        if timer is not None:
            timer.cancel()
        connection.close()
    if len(data) > MAX_RESPONSE_BYTES:
        raise JudgeError(f"response is larger than {MAX_RESPONSE_BYTES} bytes")
    if response.status != http.client.OK:
        asked = response.headers.get("Retry-After", "")
        raise JudgeError(
            f"HTTP status {response.status}: {_said(endpoint, data)}",
            again=response.status in _PASSING,
            pause_s=float(asked) if asked.isascii() and asked.isdigit() else 0.0,
        )
    if (content := _content(data)) is None:
        raise JudgeError(f"response {_said(endpoint, data)!r} is no chat completion with a text")
    return content


def _said(endpoint: Endpoint, data: bytes) -> str:
    """Quotes the start of a response, without the key: some servers repeat one they refuse."""
    said = data[:120].decode(errors="replace")
    return said.replace(endpoint.key, "***") if endpoint.key else said


def _cut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the server may have closed it at the same moment
        connected.shutdown(socket.SHUT_RDWR)


def _content(data: bytes) -> str | None:
    try:
        content = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
    return content if isinstance(content, str) else None


def _cache_path(folder: Path, body: bytes) -> Path:
    name = hashlib.sha256(body).hexdigest()
    return folder / name[:2] / f"{name}.json"


def _cached(endpoint: Endpoint, body: bytes) -> str | None:
    if endpoint.cache_dir is None:
        return None
    try:
        answer = json.loads(_cache_path(endpoint.cache_dir, body).read_bytes())["answer"]
    except (FileNotFoundError, ValueError, RecursionError, LookupError, TypeError):
        return None  # not there, or damaged
    return answer if isinstance(answer, str) else None


def _store(endpoint: Endpoint, body: bytes, answer: str) -> None:
    if endpoint.cache_dir is None:
        return
    path = _cache_path(endpoint.cache_dir, body)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: another process reads a whole file or none.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump({"answer": answer}, file)
    os.replace(file.name, path)
