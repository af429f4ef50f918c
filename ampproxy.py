#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "aiohttp>=3.11.10,<4",
#     "pyyaml>=6,<7",
#     "msgspec>=0.19,<1",
#     "uvloop>=0.21,<1; sys_platform != 'win32'",
# ]
# ///
"""The model calls of AI coding clients, answered by the subscriptions you already pay for.

client     an AI coding tool: the Amp CLI, Claude Code, Codex CLI, droid, an SDK
provider   who answers model calls: claude, codex, or who an API key is of; a row of a table
dialect    how bytes are worded: anthropic, chat, responses or gemini
account    one signed-in subscription, kept as one token file, or one API key of the config
thread     one conversation of a client; it stays with its account
rest       the time during which an account is left alone after an error
way        a model name, its effort and the providers to ask for it; a mapping adds ways
ampcode    ampcode.com: gets what is no model call, and the model calls that nobody here serves

The sections, each using only those above it:

Common ground          errors, JSON, numbers and times, what may be shown to a person, the log
Provider table         one row a provider: addresses, paths, models, login, headers
Configuration          the keys of config.yaml, reading and checking it, taking up a change
Token files            one JSON file a login: read, saved whole, merged with others' edits
The network            sessions to the outside, outbound proxies, listening
Signing in             OAuth with PKCE, the callback or what is pasted, the token endpoint
Accounts               who may answer next, what an error means for that, refreshing tokens
Server-sent events     runs of whole events out of whatever pieces arrive
Dialects               paths, errors, ends and token counts of the four ways to word things
Provider rules         what a login's backend asks of a request
Who asks, and what     may this request be served, which model call is it, of which thread
Who answers            suffixes and efforts, mappings, the ways to try, lists of models
Answers on their way   an answer as an iterator of the client's bytes; silence, ends, errors
Forwarding             the story of one model call
ampcode.com            everything else, as it came; the tunnel; paid calls
Status                 what was served, and how the accounts stand
The server             the one place that takes requests, and the one exit for errors
Command line           one coroutine a command

Start at Server.handle; a model call goes on to Forwarder.answer, the rest to Ampcode.forward.
Left out on purpose: TLS, a database, imitation of the official clients.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import ctypes
import dataclasses
import difflib
import errno
import fnmatch
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import re
import secrets
import select
import signal
import stat
import sys
import threading
import time
import urllib.request
import webbrowser
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
)
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn
from urllib.parse import parse_qsl, quote, unquote, unquote_plus, urlencode

try:
    import aiohttp
    import yaml
    from aiohttp import web
    from multidict import CIMultiDict
    from yarl import URL
except ImportError as error:
    sys.exit(f"ampproxy needs {error.name}: `uv run ampproxy.py`, or pip install aiohttp pyyaml")

msgspec: Any = None  # the standard library does the same, more slowly
with suppress(ImportError):
    msgspec = importlib.import_module("msgspec")

__version__ = "0.1.0"

# == Common ground =================================================================================
#
# Errors, JSON, numbers and times, files, and what may be shown to a person.
#
# There are two errors.  A Failure is one sentence for the person at the terminal.  A ProxyError is
# for a client and carries a Problem: what went wrong as plain data.  Only a Problem is ever kept;
# an exception holds its traceback, and that the frames with the client's whole prompt in them.

Json = dict[str, Any]
Headers = CIMultiDict[str]
Upstream = aiohttp.ClientResponse

MINUTE, HOUR, DAY = 60, 3600, 86400
NEVER = float("inf")
BODY_LIMIT = 64 << 20  # bytes of a request, and of what is collected of an answer
LARGE = 1 << 20  # bytes: what is more is copied as rarely as can be
CLOCK = SimpleNamespace(time=time.time, monotonic=time.monotonic, sleep=asyncio.sleep)

log = logging.getLogger("ampproxy")


class Failure(Exception):
    """A sentence that tells the person at the terminal what to do."""


@dataclass
class Problem:
    """Why a call was not answered."""

    status: int
    message: str  # in our words; for the log and for a client
    retry_after: float = 0  # seconds; 0 where nobody said
    text: str = ""  # the provider's own words, with its codes in front
    codes: frozenset[str] = frozenset()  # its codes alone, in lower case
    windows: frozenset[str] = frozenset()  # quota windows that its headers call full
    body: bytes = b""  # its error, worded in the client's dialect
    headers: Headers = field(default_factory=Headers)  # of its answer, that a client may see


# Codes of ours, beside the provider's own.
LOCAL = "@local"  # a shortage of this machine: files, memory, disk, network
RETRIABLE = "@retriable"  # it says that the next try may do, and names no limit and no time


class ProxyError(Exception):
    """A Problem on its way to whoever knows what to do about it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def fault(status: int, message: str, retry_after: float = 0) -> ProxyError:
    return ProxyError(Problem(status, message, retry_after))


def explain(error: BaseException) -> str:
    """An error in one line, without the password of an outbound proxy."""
    text = error.problem.message if isinstance(error, ProxyError) else str(error)
    return re.sub(r"//[^/\s]+@", "//", text or type(error).__name__)


# -- JSON: the one place that parses and writes it --


def finite(digits: str) -> float:
    number = float(digits)
    if abs(number) == float("inf"):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number


def no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def parse_json(raw: bytes | bytearray) -> Any:
    """ValueError for what is no JSON: also for NaN and 1e999, which no provider takes."""
    if msgspec:
        with suppress(ValueError, RecursionError):
            return msgspec.json.decode(raw)
    try:  # what msgspec refuses may be right all the same: half a surrogate pair, long numbers
        return json.loads(raw.decode(), parse_constant=no_constant, parse_float=finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_object(raw: bytes | bytearray) -> Json:
    value = parse_json(raw)
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def write_json(value: Any) -> bytes:
    """ValueError for what is nested too deeply."""
    if msgspec:
        with suppress(ValueError, RecursionError, TypeError):
            return bytes(msgspec.json.encode(value))
    try:
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return text.encode(errors="backslashreplace")  # half a surrogate pair stays an escape


MOST_VALUES = 1_000_000  # in one body: each is a token at least, and no model takes as many
SAMPLES, SAMPLE = 64, 1024  # looks into a body, and the bytes of each


def has_too_many_values(raw: bytes | bytearray) -> bool:
    """Whether reading it would take the time and memory of everybody else.

    A body is looked into here and there; it is counted only where these look bad.
    """
    if len(raw) < 2 * MOST_VALUES:
        return False
    starts = [secrets.randbelow(len(raw) - SAMPLE) for _ in range(SAMPLES)]
    seen = b"".join(raw[start : start + SAMPLE] for start in starts)
    if count_values(seen) * len(raw) < MOST_VALUES / 2 * len(seen):
        return False
    return count_values(raw) > MOST_VALUES


def count_values(raw: bytes | bytearray) -> int:
    return raw.count(b",") + raw.count(b"[") + raw.count(b"{")


def spliced(raw: bytes | bytearray, old: Json, new: Json) -> list[Any]:
    """The JSON of `new` in pieces: what it shares with `old` is cut out of `raw`, not copied."""
    if not msgspec:
        return [write_json(new)]
    parts = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    pieces: list[Any] = []
    for name, value in new.items():
        shared = name in old and old[name] is value
        written = memoryview(parts[name]) if shared else write_json(value)
        pieces += [b"," if pieces else b"{", write_json(name), b":", written]
    return [*pieces, b"}"]


def as_dict(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def as_dicts(value: Any) -> list[Json]:
    """The tables in a list, without what else is in it."""
    return [item for item in as_list(value) if isinstance(item, dict)]


# -- Numbers and times --


def number(value: Any) -> float:
    """A number, or 0 for what is none or absurd."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return 0
    if isinstance(value, (int, float)) and abs(value) < 1e11:
        return value
    return 0


DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(ms|[smh]?)")
UNITS = {"ms": 0.001, "s": 1, "m": MINUTE, "h": HOUR, "": 1}


def duration(text: str) -> float:
    """Seconds of 2h, 1h30m, 500ms, 3.5s or a bare number; 0 for what has none of these."""
    parts = DURATION.findall(text[:64])
    return sum(float(amount) * UNITS[unit] for amount, unit in parts)


def rfc3339(moment: float) -> str:
    return rfc3339_of_second(int(moment))


@functools.lru_cache(16)
def rfc3339_of_second(moment: int) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(value: Any) -> float:
    """Seconds since 1970 of an RFC 3339 time; 0 for what is none."""
    try:
        return datetime.fromisoformat(value).astimezone(UTC).timestamp()
    except (ValueError, TypeError, OverflowError):
        return 0.0


def http_delay(value: str, now: float) -> float:
    """Seconds of a Retry-After, which may be a date; 0 for what is neither, and for the past."""
    try:
        return max(0, parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return max(0, number(value))


FILE_LIMIT = 4 << 20  # bytes of a file that a person or a program wrote for us


def read_file(path: Path) -> bytes:
    """A regular file, without a byte order mark; ValueError for another kind, and a large one.

    Opened without waiting: a FIFO would never answer.
    """
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no regular file")
        raw = file.read(FILE_LIMIT + 1)
    if len(raw) > FILE_LIMIT:
        raise ValueError("it is larger than 4 MiB")
    return raw.removeprefix(b"\xef\xbb\xbf")


GZIP = b"\x1f\x8b"  # how it begins
CODINGS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # that can be unpacked here; zlib's wbits


class Unpacker:
    """Of what comes in pieces; members may stand behind each other (RFC 1952, 2.2)."""

    def __init__(self, coding: str) -> None:
        self.bits = CODINGS[coding]
        self.left = b""  # came, and was not unpacked yet
        self.stream: Any = None

    @property
    def is_whole(self) -> bool:
        return self.stream is not None and self.stream.eof and not self.left.strip(b"\0")

    def take(self, data: bytes) -> bytes:
        """What these bytes, and those left, hold; 1 MiB at the most.  zlib.error for garbage."""
        self.left += data
        ended = self.stream is not None and self.stream.eof
        if ended:
            self.left = self.left.lstrip(b"\0")
        if not self.left:
            return b""
        if self.stream is None or ended:
            raw = self.bits == 15 and self.left[0] & 15 != 8  # deflate without zlib's head
            self.stream = zlib.decompressobj(-15 if raw else self.bits)
        plain: bytes = self.stream.decompress(self.left, LARGE)
        self.left = self.stream.unconsumed_tail or self.stream.unused_data
        return plain


MEMBERS, MEMBER_PIECE = 10_000, 16384  # of one body; bytes that are looked at together


def unpack(raw: bytes, coding: str = "gzip") -> bytes | None:
    """None for what is not packed so, is not whole, or would be larger than BODY_LIMIT."""
    unpacker, plain, members = Unpacker(coding), bytearray(), 0
    try:
        for start in range(0, len(raw), MEMBER_PIECE):
            unpacker.left += raw[start : start + MEMBER_PIECE]
            while unpacker.left:
                plain += unpacker.take(b"")
                members += unpacker.stream is not None and unpacker.stream.eof
                if len(plain) > BODY_LIMIT or members > MEMBERS:
                    return None
    except zlib.error:
        return None
    return bytes(plain) if unpacker.is_whole else None


def accepts(header: str, coding: str) -> bool:
    """Whether an Accept-Encoding names a coding."""
    for choice in header.lower().split(","):
        name, _, more = choice.partition(";")
        if name.strip() in (coding, "*"):
            return re.fullmatch(r"\s{0,9}q\s?=\s?0(\.0{0,3})?\s{0,9}", more) is None
    return False


def give_back_memory() -> None:
    """Freed memory to the system: glibc keeps what large prompts took, unless it is told."""
    with suppress(OSError, AttributeError, TypeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


# -- What may be shown to a person --

SECRET = re.compile(
    r"(?<![\w.+%-])(?P<kind>(?:claude|codex|gemini|antigravity)-)?(?P<mail>[\w.+%-]{1,200}@[\w.-]+)"
    r"|(?:sk-|sgamp_|ya29|AIza|eyJ|rt_)[\w.~+/=-]{8,}"
    r"|(?<=Bearer )\S+"
)
HINTS = ("@", "sk-", "sgamp_", "ya29", "AIza", "eyJ", "rt_", "Bearer ")  # one is in every secret


def equal(one: str, other: str) -> bool:
    """In a time that does not tell how much of them is alike."""
    return secrets.compare_digest(one.encode(errors="replace"), other.encode(errors="replace"))


def mask(secret: str) -> str:
    """The first letters of a secret, or of an e-mail address."""
    return secret[:3].partition("@")[0] + "..." if len(secret) > 6 else "..."


def mask_match(found: re.Match[str]) -> str:
    if found["mail"]:
        return (found["kind"] or "") + mask(found["mail"])
    return mask(found[0])


def printable(text: str) -> str:
    """Without what steers a terminal, or turns the direction of what is written."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def redact(text: str) -> str:
    """What may stand in the log: no secret, no whole e-mail address, nothing but one line."""
    if any(hint in text for hint in HINTS):
        text = SECRET.sub(mask_match, text)
    return printable(text)


def say(text: str) -> None:
    """Print lines for the person at the terminal."""
    print("\n".join(map(printable, text.split("\n"))), flush=True)


class LogFormatter(logging.Formatter):
    """One short line an entry.  The time is put into words once a second."""

    second, clock = -1, ""

    def format(self, record: logging.LogRecord) -> str:
        if int(record.created) != self.second:
            self.second = int(record.created)
            self.clock = time.strftime("%X", time.localtime(self.second))
        return f"{self.clock} {record.levelname:<7} {redact(record.getMessage())}"


def set_up_log(debug: bool, lines: Iterable[str]) -> None:
    """To standard error; and `lines`, which reading the configuration had to say."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.DEBUG if debug else logging.INFO)
    logging.basicConfig(handlers=[logging.NullHandler()])  # the libraries' own logs stay silent
    # Nobody reads these; the logging guide, "Optimization", names them as what may be turned off.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    for line in lines:
        log.warning("%s", line)


# == Provider table ================================================================================
#
# Who answers model calls: a row each, and nothing else about providers that could change overnight.
# The facts are those of providers.md; what a row says can be overridden in config.yaml, under the
# field's name with hyphens.
#
# To add a provider, add a row; if its backend asks for more than a row can say, add a function to
# RULES (section "Provider rules").


@dataclass(frozen=True, eq=False)
class Provider:
    """A row.  A pattern such as `claude-*` is any name that begins so, in any case of letters."""

    name: str = ""  # in the log, the status and the header x-ampproxy-provider
    enabled: bool = True

    # -- What it answers, and where --
    base_url: str = ""  # with or without the version part of the paths
    paths: dict[str, str] = field(default_factory=dict)  # verb of a call -> path; none: no calls
    models: tuple[
        Any, ...
    ] = ()  # names, patterns, {name, alias}; names alone are listed to clients
    excluded_models: tuple[str, ...] = ()
    thinking: dict[str, str] = field(default_factory=dict)  # model -> levels, or range of budgets
    max_tokens: int = 0  # for an Anthropic client that says none; 0: as many as the model writes

    # -- What it is sent --
    headers: dict[str, str] = field(default_factory=dict)
    passes: tuple[str, ...] = ()  # patterns of a client's headers that travel on
    drops: tuple[str, ...] = ()  # patterns of fields that go; read by ChatGPT's rules alone
    drop_betas: tuple[str, ...] = ()  # patterns of Claude's beta flags that go
    identity: bool = False  # the first system block that a Claude login wants; by Claude's alone
    key_header: str = "Authorization"  # where the token goes, as a bearer token...
    key_host: str = ""  # ...but bare where key_header is another one; to this host only, if named

    proxy_url: str = ""  # the way out to it; "direct": none; "": that of all

    # -- How one signs in --
    authorize_url: str = ""
    authorize_query: dict[str, str] = field(default_factory=dict)
    token_url: str = ""
    other_token_url: str = ""  # where to ask when that answers 404
    token_form: bool = False  # the token endpoint takes a form; else JSON
    client_id: str = ""
    client_secret: str = ""
    scope: str = ""
    profile_url: str = ""  # asked for an e-mail address that the token's answer lacks
    callback_port: int = 0
    callback_path: str = "/callback"
    refresh_lead: int = 300  # seconds before its expiry that a token is refreshed
    also: tuple[str, ...] = ()  # other words for `login`

    @functools.cached_property
    def names(self) -> dict[str, str]:
        """What clients may ask for -> what is asked for there."""
        pairs = [m if isinstance(m, dict) else {"name": m, "alias": ""} for m in self.models]
        return {pair["alias"] or pair["name"]: pair["name"] for pair in pairs}

    @functools.cached_property
    def written(self) -> dict[str, str]:
        """The same in lower case, without what is a pattern."""
        return {n.lower(): own for n, own in self.names.items() if not set(n) & set("*?[")}

    def served(self, model: str) -> str:
        """What is asked for there, for a name in any case of letters."""
        return self.written.get(model.lower(), model)


# How a model can be told to think: its levels, or its least and largest budget in tokens.  "auto"
# before the levels: it thinks unless it is told not to.  Of several patterns that fit the longest
# counts; nothing: the model does not think.  Who is not named is taken for one of the newest.
THINKING = {
    "claude-*": "auto low medium high xhigh max",
    "claude-opus-4-6*": "low medium high max",
    "claude-opus-4-[78]*": "low medium high xhigh max",
    "claude-sonnet-4-6*": "low medium high",
    "claude-*-4-5*": "1024-59904",
    "claude-sonnet-4-[02]*": "1024-59904",
    "claude-opus-4-[012]*": "1024-27904",
    "claude-3-7-*": "1024-4096",
    "claude-[23]*": "",
    "gemini-*": "minimal low medium high",
    "gemini-3-pro*": "low high",
    "gemini-3.1-pro*": "low medium high",
    "gemini-2*": "0-24576",
    "gemini-2.5-pro*": "128-32768",
    "gemma-*": "",
    "gpt-[34]*": "",
    "*": "none minimal low medium high xhigh",
}
MOST_TOKENS = {  # that a model writes (providers.md 1.7); of several patterns the longest counts
    "claude-*": 128000,
    "claude-*-4-5*": 64000,
    "claude-sonnet-4-*": 64000,
    "claude-opus-4-[012]*": 32000,
    "claude-3-[57]-*": 8192,
    "claude-[23]*": 4096,
    "*": 32000,
}
CLAUDE_SAMPLES = (
    "claude-[23]*",
    "claude-*-4-[0-6]*",
)  # later ones refuse temperature, top_p, top_k
# OpenAI's that think refuse them, too, and want another word for max_tokens in Chat.
OPENAI_THINKS = ("gpt-[5-9]*", "o[1-9]*", "codex-*")
MESSAGES = {
    "messages": "/v1/messages",
    "count_tokens": "/v1/messages/count_tokens",
}
GEMINI_METHODS = {
    "generateContent": "/v1beta/models/{model}:generateContent",
    "streamGenerateContent": "/v1beta/models/{model}:streamGenerateContent",
    "countTokens": "/v1beta/models/{model}:countTokens",
}
CHAT = {"completions": "/v1/chat/completions"}
CLIENT_HEADERS = (  # of every SDK; a key's own service may want any of them
    "anthropic-version",
    "anthropic-beta",
    "anthropic-dangerous-*",
    "openai-beta",
    "user-agent",
    "x-goog-api-client",
    "x-app",
    "x-stainless-*",
    "x-claude-code-*",
)

LOGINS = {
    "claude": Provider(
        name="claude",
        also=("anthropic",),
        base_url="https://api.anthropic.com",
        paths=MESSAGES,
        models=(
            "claude-opus-4-8",
            "claude-opus-4-7",
            "claude-opus-4-6",
            "claude-opus-4-5-20251101",
            "claude-sonnet-4-6",
            "claude-sonnet-4-5-20250929",
            "claude-haiku-4-5-20251001",
            "claude-*",
        ),
        thinking=THINKING,
        headers={
            "anthropic-version": "2023-06-01",
            "anthropic-beta": "oauth-2025-04-20",  # without it a login's token is refused
        },
        passes=CLIENT_HEADERS,
        drop_betas=("context-1m*",),  # would be billed beside the plan
        identity=True,
        authorize_url="https://claude.ai/oauth/authorize",
        authorize_query={"code": "true"},
        token_url="https://api.anthropic.com/v1/oauth/token",
        other_token_url="https://platform.claude.com/v1/oauth/token",  # providers.md 1.1
        client_id="9d1c250a-e61b-44d9-88ed-5944d1962f5e",
        scope=(
            "user:profile user:inference user:sessions:claude_code user:mcp_servers"
            " user:file_upload"
        ),
        profile_url="https://api.anthropic.com/api/oauth/profile",
        callback_port=54545,
    ),
    "codex": Provider(
        name="codex",
        also=("openai", "chatgpt"),
        base_url="https://chatgpt.com/backend-api/codex",
        paths={
            "responses": "/backend-api/codex/responses",
            "compact": "/backend-api/codex/responses/compact",
        },
        models=("gpt-5.5", "gpt-5.4", "gpt-5.4-mini", "gpt-5.3-codex-spark", "gpt-*", "codex-*"),
        thinking=THINKING,
        headers={"originator": "codex_cli_rs", "User-Agent": "codex_cli_rs/0.101.0"},
        passes=(
            "originator",
            "user-agent",
            "version",
            "openai-beta",
            "session-id",
            "session_id",
            "x-codex-*",
        ),
        drops=(  # each of them is a 400 there (providers.md 2.3)
            *("max_*", "top_*", "temperature", "*_penalty", "n", "seed", "stop", "log*"),
            *("prompt_cache_[ro]*", "truncation", "context_*", "stream_o*", "user", "metadata"),
            *("safety_*", "*_format", "reasoning_e*"),
        ),
        authorize_url="https://auth.openai.com/oauth/authorize",
        authorize_query={
            "id_token_add_organizations": "true",
            "codex_cli_simplified_flow": "true",
        },
        token_url="https://auth.openai.com/oauth/token",
        token_form=True,
        client_id="app_EMoamEEZ73f0CkXaXp7hrann",
        scope="openid email profile offline_access",
        callback_port=1455,
        callback_path="/auth/callback",
    ),
    "gemini": Provider(name="gemini"),  # served by nothing yet: no paths
    "antigravity": Provider(name="antigravity"),
}

API_KEYS = {  # the lists of keys in config.yaml; an entry overrides its list's row
    "claude-api-key": Provider(
        name="claude-api-key",
        base_url="https://api.anthropic.com",
        paths=MESSAGES,
        models=("claude-*",),
        thinking=THINKING,
        headers={"anthropic-version": "2023-06-01"},
        passes=CLIENT_HEADERS,
        key_header="x-api-key",
        key_host="api.anthropic.com",  # other hosts take a bearer token (providers.md 1.2)
    ),
    "codex-api-key": Provider(
        name="codex-api-key",
        base_url="https://api.openai.com",
        paths={"responses": "/v1/responses", "compact": "/v1/responses/compact", **CHAT},
        models=("gpt-*", "chatgpt-*", "codex-*", "o[1-9]*"),
        thinking=THINKING,
        passes=CLIENT_HEADERS,
    ),
    "gemini-api-key": Provider(
        name="gemini-api-key",
        base_url="https://generativelanguage.googleapis.com",
        paths=GEMINI_METHODS,
        models=("gemini-*", "gemma-*"),
        thinking=THINKING,
        passes=CLIENT_HEADERS,
        key_header="x-goog-api-key",
    ),
    "openai-compatibility": Provider(paths=CHAT, thinking=THINKING, passes=CLIENT_HEADERS),
}


@functools.lru_cache(256)
def any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("(?i)" + "|".join(map(fnmatch.translate, patterns)))


@functools.lru_cache(4096)
def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a name fits one of the patterns, in any case of letters.  Callers cut long ones."""
    return bool(patterns) and any_of(patterns).match(name) is not None


def best_fit(name: str, patterns: Iterable[str]) -> str:
    """The longest of the patterns that fit; `*` for none."""
    return max((p for p in patterns if matches(name[:200], (p,))), key=len, default="*")


def most_tokens(model: str) -> int:
    return MOST_TOKENS[best_fit(model, MOST_TOKENS)]


# The words of an effort, and the tokens that they stand for where a model takes a budget.
BUDGETS = {
    "none": 0,
    "minimal": 512,
    "low": 1024,
    "medium": 8192,
    "high": 24576,
    "xhigh": 32768,
    "max": 128000,
    "ultra": 256000,
}


class Thinking(NamedTuple):
    """How a model can be told to think; neither levels nor limits: it does not."""

    levels: list[str]
    limits: list[int]  # its least and largest budget, or none
    by_itself: bool


@functools.lru_cache(1024)
def read_thinking(told: str) -> Thinking:
    """Of a line of THINKING."""
    levels = [word for word in told.split() if word in BUDGETS]
    limits = [int(digits) for digits in re.findall(r"\d{1,9}", told)]
    return Thinking(levels, limits if len(limits) == 2 else [], "auto" in told.split())


def thinking_of(table: dict[str, str], model: str) -> Thinking:
    return read_thinking(table.get(best_fit(model, table), ""))


# == Configuration =================================================================================
#
# config.yaml, with CLIProxyAPI's names, so that its users can bring their file.  The keys stand in
# one table of rules; a rule says what a value may be and what it is when nobody names it.  A file
# is read and checked whole, and only then takes effect.
#
# To add a key, add a line to KEYS and to config.yaml.


@dataclass(frozen=True)
class Value:
    """A text, number or switch: `fits` decides, and `expected` says in an error what would."""

    default: Any
    expected: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class ListOf:
    member: Rule
    default: tuple[Any, ...] = ()
    lone: bool = False  # a member alone stands for a list of one
    expected: str = "a list"


@dataclass(frozen=True)
class Table:
    keys: dict[str, Rule]
    needs: tuple[str, ...] = ()
    others: Rule | None = None  # of keys that `keys` does not name; None: they are unknown
    switch: bool = False  # true and false stand for {enabled: ...}
    or_text: bool = False  # a text stays a text
    expected: str = "a table"


Rule = Value | ListOf | Table
TEXT_HINT = "a text (in quotes, if it looks like something else)"


def text_key(default: str = "") -> Value:
    return Value(default, TEXT_HINT, lambda value: isinstance(value, str))


def switch_key(default: bool) -> Value:
    return Value(default, "true or false", lambda value: isinstance(value, bool))


def whole_key(default: int, low: int, high: int) -> Value:
    return Value(
        default,
        f"a whole number from {low} to {high:g}",
        lambda value: type(value) is int and low <= value <= high,
    )


def amount_key(default: float) -> Value:
    return Value(
        default,
        "a number from 0 to 1e+09",
        lambda value: type(value) in (int, float) and 0 <= value <= 1e9,
    )


def choice_key(*words: str) -> Value:
    return Value(words[0], f"one of {', '.join(words)}", lambda value: value in words)


def span_key(default: str) -> Value:
    """A length of time."""
    pattern = re.compile(r"\d{1,9}|(\d{1,9}[smh]){1,9}")
    expected = "a length of time such as 2h, 30m or 90"
    return Value(default, expected, lambda value: bool(pattern.fullmatch(str(value))))


def is_address(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        url = URL(value)
    except ValueError:
        return False
    return value == "" or (url.scheme in ("http", "https") and bool(url.host))


def is_proxy(value: Any) -> bool:
    return value == "direct" or is_address(value)


def proxy_key() -> Value:
    expected = "an address that begins with http:// or https:// (no SOCKS), or direct"
    return Value("", expected, is_proxy)


def address_key(default: str = "") -> Value:
    return Value(default, "an address that begins with http:// or https://", is_address)


MODEL = Table({"name": text_key(), "alias": text_key()}, needs=("name",), or_text=True)
MAPPING = Table(
    {"from": text_key(), "to": ListOf(text_key(), lone=True), "regex": switch_key(False)},
    needs=("from", "to"),
)
CLIENT_KEYS = Table(
    {"upstream-api-key": text_key(), "api-keys": ListOf(text_key())},
    needs=("upstream-api-key", "api-keys"),
)


def rule_of(name: str, default: Any) -> Rule:
    """The rule of a provider row's field: what it may be follows from what it is."""
    if name == "models":
        return ListOf(MODEL, default)
    if name == "proxy_url":
        return proxy_key()
    if name.endswith("_port"):
        return whole_key(default, 0, 65535)
    if name.endswith("_url"):
        return address_key(default)
    match default:
        case bool():
            return switch_key(default)
        case int():
            return whole_key(default, 0, 1_000_000_000)
        case str():
            return text_key(default)
        case tuple():
            return ListOf(text_key(), default)
    return Table({key: text_key(value) for key, value in default.items()}, others=text_key())


def row_rule(row: Provider, more: dict[str, Rule], needs: tuple[str, ...] = ()) -> Table:
    """The rule of a table in the configuration that is laid over a row."""
    fields = (f.name for f in dataclasses.fields(row) if f.name != "name")
    keys = {name.replace("_", "-"): rule_of(name, getattr(row, name)) for name in fields}
    return Table({**more, **keys}, needs, switch=not needs)


def key_rules() -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    for name, row in API_KEYS.items():
        if name == "openai-compatibility":
            entry: dict[str, Rule] = {"api-key": text_key(), "proxy-url": proxy_key()}
            entries = ListOf(Table(entry, needs=("api-key",)))
            named: dict[str, Rule] = {"name": text_key(), "api-key-entries": entries}
            rules[name] = ListOf(row_rule(row, named, ("name", "base-url")))
        else:
            rules[name] = ListOf(row_rule(row, {"api-key": text_key()}, ("api-key",)))
    return rules


STRATEGIES = ("least-connections", "round-robin", "fill-first", "soonest-reset")
KEYS = Table(
    {
        "host": text_key("127.0.0.1"),
        "port": whole_key(8317, 0, 65535),
        "auth-dir": text_key("~/.ampproxy"),
        "api-keys": ListOf(text_key()),
        "debug": switch_key(False),
        "logging-to-file": switch_key(False),
        "proxy-url": proxy_key(),
        "request-retry": whole_key(3, 1, 100),
        "max-retry-interval": amount_key(30.0),
        "max-cooldown": amount_key(1800.0),
        "routing": Table(
            {
                "strategy": choice_key(*STRATEGIES),
                "session-affinity-ttl": span_key("2h"),
            }
        ),
        "streaming": Table(
            {
                "keepalive-seconds": amount_key(15.0),
                "idle-timeout-seconds": amount_key(300.0),
            }
        ),
        "ampcode": Table(
            {
                "upstream-url": address_key("https://ampcode.com"),
                "upstream-api-key": text_key(),
                "upstream-api-keys": ListOf(CLIENT_KEYS),
                "restrict-management-to-localhost": switch_key(False),
                "fallback": choice_key("always", "unserved", "never"),
                "client-inference": switch_key(True),
                "force-model-mappings": switch_key(False),
                "model-mappings": ListOf(MAPPING),
            }
        ),
        "providers": Table({name: row_rule(row, {}) for name, row in LOGINS.items()}),
        **key_rules(),
    }
)


def default_of(rule: Rule) -> Any:
    if isinstance(rule, Table):
        return {name: default_of(inner) for name, inner in rule.keys.items()}
    if isinstance(rule, ListOf):
        return [*rule.default]
    return rule.default


class ConfigFile:
    """One reading of a file: its `config` in full, and `warnings` about what it does not know.

    Raises Failure with file, line, key and what was expected.
    """

    def __init__(self, path: Path, running: bool) -> None:
        self.path = path
        self.warnings: list[str] = []
        try:
            self.loader: Any = yaml.SafeLoader(read_file(path).decode())
            node = self.loader.get_single_node()
            if running and (node is None or not node.value or node.tag.endswith(":null")):
                raise ValueError("it is empty")
            self.config: Json = self.read(node, KEYS, "")
        except (yaml.YAMLError, OSError, ValueError, TypeError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            place = f"{path}:{mark.line + 1}" if mark else f"{path}"
            reason = getattr(error, "problem", None) or explain(error)
            raise Failure(f"{place}: cannot be read: {reason}") from error

    def fail(self, node: yaml.Node, key: str, reason: str) -> NoReturn:
        raise Failure(f"{self.path}:{node.start_mark.line + 1}: {key or 'the file'}: {reason}")

    def read(self, node: yaml.Node | None, rule: Rule, key: str) -> Any:
        if node is None or node.tag.endswith(":null"):
            return default_of(rule)
        if isinstance(rule, Table) and isinstance(node, yaml.MappingNode):
            return self.read_table(node, rule, key)
        if isinstance(rule, ListOf) and isinstance(node, yaml.SequenceNode):
            members = enumerate(node.value)
            return [self.read(member, rule.member, f"{key}[{i}]") for i, member in members]
        return self.read_value(node, rule, key)

    def read_value(self, node: yaml.Node, rule: Rule, key: str) -> Any:
        value = self.loader.construct_object(node, deep=True)
        if isinstance(value, str):
            value = self.with_environment(node, key, value).strip()
        if isinstance(rule, Table) and rule.switch and isinstance(value, bool):
            return {**default_of(rule), "enabled": value}
        if isinstance(rule, Table) and rule.or_text and value and isinstance(value, str):
            return value
        if isinstance(rule, ListOf) and rule.lone and value and isinstance(value, str):
            return [value]
        if not isinstance(rule, Value) or not rule.fits(value):
            self.fail(node, key, f"expected {rule.expected}")
        return value

    def with_environment(self, node: yaml.Node, key: str, value: str) -> str:
        for variable in re.findall(r"\$\{(\w+)\}", value):
            if variable not in os.environ:
                self.fail(node, key, f"the environment variable {variable} is not set")
            value = value.replace(f"${{{variable}}}", os.environ[variable])
        return value

    def read_table(self, node: yaml.MappingNode, rule: Table, key: str) -> Json:
        self.loader.flatten_mapping(node)
        rules, given = dict(rule.keys), {str(name.value): value for name, value in node.value}
        if rule.others:
            rules |= {name: rule.others for name in given if name not in rules}
        dot = f"{key}." if key else ""
        values = {name: self.read(given.get(name), rules[name], dot + name) for name in rules}
        if rule is KEYS:
            self.read_old_names(values["ampcode"], given)
        for name_node, _ in node.value:
            if str(name_node.value) in given.keys() - rules.keys():
                self.warn(name_node, rules)
        for name in rule.needs:
            if not values[name]:
                self.fail(node, key, f"needs {name!r}")
        if rule is MAPPING and values["regex"]:
            self.check_pattern(given["from"], values["from"], f"{dot}from")
        return values

    def read_old_names(self, ampcode: Json, given: dict[str, yaml.Node]) -> None:
        """CLIProxyAPI's older files have amp-upstream-url and others at the top."""
        rule = KEYS.keys["ampcode"]
        assert isinstance(rule, Table)
        for name, inner in rule.keys.items():
            old = given.pop(f"amp-{name}", None)
            if old is not None and ampcode[name] == default_of(inner):
                ampcode[name] = self.read(old, inner, f"amp-{name}")

    def warn(self, node: yaml.Node, known: Collection[str]) -> None:
        near = difflib.get_close_matches(str(node.value), known, 1, 0)[0]
        place = f"{self.path}:{node.start_mark.line + 1}"
        self.warnings.append(f"{place}: unknown key {node.value!r}; the nearest is {near!r}")

    def check_pattern(self, node: yaml.Node, pattern: str, key: str) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            self.fail(node, key, f"is no regular expression: {error}")


def find_config(given: str | None) -> Path | None:
    """The file to read: the one that was named, else the first one there."""
    if given:
        return Path(given).expanduser()
    own = Path("~/.config/ampproxy").expanduser()
    for folder in (Path.cwd(), Path(__file__).resolve().parent, own):
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    return None


def is_loopback(host: str) -> bool:
    return bool(re.fullmatch(r"(::ffff:)?127(\.\d{1,3}){3}|::1|localhost", host.lower()))


def stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when a file does; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


# -- Rows as they are in effect --


@dataclass(frozen=True, eq=False)
class Row:
    """A provider in effect, and the API keys for it; none for a kind of login."""

    id: str  # the same after the configuration was read anew
    kind: str  # the name of the row in LOGINS or API_KEYS
    provider: Provider
    keys: tuple[str, ...] = ()
    proxies: dict[str, str] = field(default_factory=dict)  # of some keys, the way out

    @property
    def name(self) -> str:
        return self.provider.name


def overlaid(row: Provider, given: Json) -> Provider:
    """A row with what the configuration says, which is all fields of it."""
    changes: Json = {}
    for one in dataclasses.fields(row):
        value = given.get(one.name.replace("_", "-"), "")
        if one.name == "base_url":
            value = value or row.base_url
        if isinstance(getattr(row, one.name), tuple):
            value = tuple(value)
        changes[one.name] = value
    changes["name"] = given.get("name") or row.name
    if changes["token_url"] != row.token_url and changes["other_token_url"] == row.other_token_url:
        changes["other_token_url"] = ""  # a token goes to no other host than the one named
    return Provider(**changes)


def rows_of(config: Json) -> list[Row]:
    """Who may answer, in the order of asking: logins before keys."""
    rows = []
    for kind, row in LOGINS.items():
        provider = overlaid(row, config["providers"][kind])
        rows.append(Row(kind, kind, provider))
    for kind, row in API_KEYS.items():
        for index, entry in enumerate(config[kind]):
            provider = overlaid(row, entry)
            entries = entry.get("api-key-entries", ())
            keys = [one["api-key"] for one in entries]
            keys = [entry["api-key"]] if "api-key" in entry else keys
            proxies = {one["api-key"]: one["proxy-url"] for one in entries if one["proxy-url"]}
            # A service on this machine may want no key at all, but a header must say something.
            rows.append(Row(f"{kind} {index}", kind, provider, tuple(keys) or ("-",), proxies))
    return [row for row in rows if row.provider.enabled and row.provider.paths]


class Live:
    """The configuration in effect.  `version` grows with each change that is taken up."""

    def __init__(self, path: Path | None, **given: Any) -> None:
        self.path, self.given = path, given
        self.seen = stamp(path) if path else None
        self.version = 0
        self.load()
        self.given |= {"host": self.config["host"], "port": self.config["port"]}

    def load(self, running: bool = False) -> None:
        file = ConfigFile(self.path, running) if self.path else None
        config: Json = {**(file.config if file else default_of(KEYS)), **self.given}
        config["api-keys"] = [key for key in config["api-keys"] if key]
        if not is_loopback(config["host"]) and not config["api-keys"]:
            raise Failure(f"host {config['host']!r} is open to other machines: set api-keys")
        auth_dir = Path(config["auth-dir"]).expanduser()
        rows = rows_of(config)
        self.config, self.auth_dir, self.rows = config, auth_dir, rows
        self.warnings = file.warnings if file else []
        self.version += 1

    def reload(self) -> bool:
        """Whether the file has changed and is in effect; raises for a broken one, once."""
        if not self.path:
            return False
        before, self.seen = self.seen, stamp(self.path) or self.seen
        if self.seen == before:
            return False
        self.load(running=True)
        log.info("%s is taken up", self.path)
        return True


# == Token files ===================================================================================
#
# One JSON file an account, `<type>-<email>.json`, in CLIProxyAPI's format.  Keys of others, and
# what others changed meanwhile, survive each save.


def save_token(path: Path, token: Json) -> None:
    """All of it or nothing: private from the first byte, synced, renamed over the old file."""
    path = path.resolve()  # the target of a link, not the link
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(OSError):  # somebody else's directory, that we may write to
        path.parent.chmod(0o700)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(json.dumps(token, indent=2).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def read_token(path: Path) -> Json:
    token = parse_object(read_file(path))
    if not isinstance(token.get("type"), str):
        raise ValueError("it has no 'type'")
    if not is_proxy(proxy_of(token)):
        raise ValueError(f"its proxy-url: expected {proxy_key().expected}")
    return token


def proxy_of(token: Json) -> Any:
    """The way out for one login; CLIProxyAPI writes it with an underscore."""
    return token.get("proxy_url") or token.get("proxy-url") or ""


def sweep_drafts(folder: Path) -> None:
    """Remove what a crash in the middle of save_token left."""
    with suppress(OSError):
        for path in folder.glob(".*.json.*.tmp"):
            path.unlink(missing_ok=True)


LOCK_LOOK = 0.05  # seconds between looks whether another process has let a lock go


def lock_of(path: Path) -> Path:
    place = path.resolve()
    return place.with_name(f".{place.name}.lock")


@asynccontextmanager
async def alone_with(path: Path) -> AsyncIterator[None]:
    """Wait until no other process is at a token file; one that is killed lets it go.

    The lock is a file beside it, as the token file itself is replaced at each save.  Where there
    can be none (Windows, a directory that is read only) nobody waits.
    """
    with ExitStack() as stack:
        with suppress(ImportError, OSError):
            fcntl: Any = importlib.import_module("fcntl")
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            number = os.open(lock_of(path), flags, 0o600)
            stack.callback(os.close, number)
            while True:
                try:
                    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(LOCK_LOOK)
        yield


def merge_token(path: Path, known: Json, changes: Json) -> Json:
    """The changes over what the file says now; over what was known where it cannot be read."""
    with suppress(OSError, ValueError):
        known = read_token(path)
    return known | changes


def expiry(token: Json) -> float:
    """Seconds since 1970; never, for a token that nothing could refresh (a setup token)."""
    if not token.get("refresh_token"):
        return NEVER
    return parse_time(token.get("expired"))


def claims(token: Json) -> Json:
    """E-mail, account_id and plan, as far as ChatGPT's id token tells (providers.md 2.1)."""
    try:
        payload = str(token["id_token"]).split(".")[1]
        told = parse_object(base64.urlsafe_b64decode(payload + "=="))
    except (ValueError, LookupError):
        return {}
    auth = as_dict(told.get("https://api.openai.com/auth"))
    found = {
        "account_id": auth.get("chatgpt_account_id"),
        "plan": auth.get("chatgpt_plan_type"),
        "email": auth.get("email") or told.get("email"),
    }
    return {name: value for name, value in found.items() if value}


# == The network ===================================================================================
#
# The way out, and the way in.  No cookie is kept, no redirect followed, no header added, nothing
# unpacked unless somebody asks for it.  Time limits are those of a head; bodies have their own.

NET_ERRORS = (aiohttp.ClientError, OSError, LookupError, ValueError, zlib.error)


class Redirected(ValueError):
    """Of a WebSocket's handshake."""


async def refuse_redirect(*_: object) -> None:
    """For WebSockets: aiohttp has no switch for them, and would follow with all our keys."""
    raise Redirected


NET_WORDS: tuple[tuple[type[Exception], str], ...] = (  # the first that fits
    (Redirected, "it redirects"),
    (TimeoutError, "it does not answer in time"),
    (aiohttp.ServerDisconnectedError, "it hung up without an answer"),
    (aiohttp.ClientConnectorCertificateError, "its certificate is not trusted"),
    (aiohttp.ClientSSLError, "no TLS connection can be made"),
    (aiohttp.ClientConnectorDNSError, "its name is not known"),
    (aiohttp.ClientPayloadError, "its answer was cut short"),
    (web.RequestPayloadError, "it was cut short"),
    (aiohttp.ClientResponseError, "what it sent is no HTTP"),
    (aiohttp.InvalidURL, "this is no address"),
    (zlib.error, "what it packed cannot be unpacked"),
)


LOCAL_ERRORS = {  # shortages of this machine, and of its way out: nobody's fault
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOBUFS,
    errno.ENOSPC,
    errno.EADDRNOTAVAIL,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
}


def is_local(error: BaseException) -> bool:
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return True
    return isinstance(error, OSError) and error.errno in LOCAL_ERRORS


def net_words(error: BaseException) -> str:
    """What went wrong, in our words: a library's may hold headers, keys and pieces of a body."""
    for kind, words in NET_WORDS:
        if isinstance(error, kind):
            return words
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    if isinstance(error, (aiohttp.ClientError, ConnectionError)):
        return "the connection broke"
    return type(error).__name__


@functools.lru_cache(256)
def short_url(url: str) -> URL:
    return URL(url, encoded=True)


def as_url(url: str) -> URL:
    if "#" in url or url.endswith("?"):  # yarl would drop them: to it, all is path
        scheme, _, rest = url.partition("://")
        authority, slash, target = rest.partition("/")
        return URL.build(scheme=scheme, authority=authority, path=slash + target, encoded=True)
    return short_url(url) if len(url) < 300 else URL(url, encoded=True)


def has_bytes(transport: Any) -> bool:
    """Whether the other side has sent something, or has hung up, that was not read yet."""
    try:
        number = transport.get_extra_info("socket").fileno()
        waiting = select.poll()  # not select(): that ends at file 1,024
        waiting.register(number, select.POLLIN)
    except (AttributeError, OSError, ValueError):  # Windows has no poll
        return False
    return bool(waiting.poll(0))


class Connector(aiohttp.TCPConnector):
    """Gives out no kept connection on which anything came after the end of its answer.

    aiohttp takes what comes there for the next answer, and so would give it to the next client.
    """

    async def connect(self, *args: Any, **more: Any) -> Any:
        while True:
            connection = await super().connect(*args, **more)
            protocol = connection.protocol
            if protocol is None or not (protocol.should_close or has_bytes(protocol.transport)):
                return connection
            connection.close()


def environment_proxies() -> dict[str, str]:
    """The outbound proxies that the environment names, by scheme; Failure for SOCKS."""
    given = {scheme: url for scheme, url in urllib.request.getproxies().items() if url}
    used = {"http": given.get("http") or given.get("all"), "no": given.get("no")}
    used["https"] = given.get("https") or given.get("all")
    for scheme, url in used.items():
        if scheme != "no" and url and url.lower().startswith("socks"):
            name = scheme if scheme in given else "all"
            raise Failure(
                f"{name.upper()}_PROXY in the environment is a SOCKS proxy, which is not supported:"
                " set proxy-url to an http proxy, or to direct"
            )
    return {scheme: url for scheme, url in used.items() if url}


class Net:
    def __init__(self, live: Live) -> None:
        self.live = live
        self.retired: dict[Upstream, asyncio.Task[None]] = {}
        # aiohttp's own look into the environment is slow, and reads ~/.netrc, too.
        self.proxies = {} if live.config["proxy-url"] else environment_proxies()
        connector = Connector(limit=0, keepalive_timeout=20)
        options: Any = {
            "connector": connector,
            "cookie_jar": aiohttp.DummyCookieJar(),
            "auto_decompress": False,
            "skip_auto_headers": ("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            "max_line_size": 65536,
            "max_field_size": 65536,
        }
        trace = aiohttp.TraceConfig()
        trace.on_request_redirect.append(refuse_redirect)
        self.session = aiohttp.ClientSession(**options)
        self.sockets = aiohttp.ClientSession(
            **options, connector_owner=False, trace_configs=[trace]
        )

    async def close(self) -> None:
        for task in self.retired.values():
            task.cancel()
        await self.sockets.close()
        await self.session.close()

    def proxy(self, url: str, own: str = "") -> str | None:
        """The outbound proxy for an address: its own, the configuration's, the environment's."""
        if given := own or self.live.config["proxy-url"]:
            return None if given == "direct" else str(given)
        given = self.proxies.get(url.partition(":")[0])
        if not given or urllib.request.proxy_bypass(as_url(url).host or ""):
            return None
        return given if "://" in given else f"http://{given}"

    async def ask(
        self, method: str, url: str, idle: float, proxy: str = "", **more: Any
    ) -> Upstream:
        """An answer whose headers have come, within `idle` seconds; 0 is any time.

        Whoever asks releases it in the end.  ProxyError 502 when none comes.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
        more |= {"timeout": timeout, "proxy": self.proxy(url, proxy), "allow_redirects": False}
        try:
            async with asyncio.timeout(idle or None):
                return await self.session.request(method, as_url(url), **more)
        except NET_ERRORS as error:
            host = as_url(url).host or "an empty upstream-url"
            problem = Problem(502, f"{host} cannot be reached: {net_words(error)}")
            if is_local(error):
                problem.codes = frozenset({LOCAL})
            raise ProxyError(problem) from None

    def release(self, response: Upstream, over: bool = False) -> None:
        """Close its connection, unless all was read: then it is in the pool again already.

        `over`: the answer is, though the upstream may not have ended it; that gets a second.
        """
        if over and not response.content.at_eof():
            self.retired[response] = asyncio.create_task(self.await_end(response))
        else:
            response.close()

    async def await_end(self, response: Upstream) -> None:
        try:
            async with asyncio.timeout(1):
                await response.content.readany()  # one more piece is one too many: it is closed
        except NET_ERRORS:
            pass
        finally:
            response.close()
            del self.retired[response]

    async def ask_json(
        self, method: str, url: str, headers: Json, data: Any, proxy: str = ""
    ) -> tuple[int, Json]:
        """Status and answer; {"error": words} for an answer that is no JSON object."""
        headers = {"Accept": "application/json", "User-Agent": f"ampproxy/{__version__}", **headers}
        response = await self.ask(method, url, 30, proxy, headers=headers, data=data)
        try:
            async with asyncio.timeout(30):
                raw = await response.read()
        finally:
            self.release(response)
        status = response.status
        try:
            return status, parse_object(unpack(raw) or raw)
        except ValueError:
            if coding := unknown_coding(response):
                return status, {"error": f"an answer packed as {coding}"}
            # What is no JSON under a 200 might hold a token.
            words = raw[:300].decode(errors="replace") if status != 200 else "no JSON"
            return status, {"error": words}


def unknown_coding(response: Upstream) -> str:
    """How a body is packed, if it cannot be unpacked here."""
    coding = response.headers.get("Content-Encoding", "").strip().lower()[:50]
    return "" if coding in ("", "identity", *CODINGS) else printable(coding)


def error_parts(answer: Json) -> Json:
    """The table of an error, wherever it stands in an answer."""
    return as_dict(answer.get("error")) or answer


ERROR_KEYS = ("type", "code", "status", "error", "message", "error_description", "detail")


def error_text(answer: Json, *keys: str) -> str:
    """What an error says in these keys, each thing once."""
    parts = error_parts(answer)
    told = [str(parts[key])[:300] for key in keys or ERROR_KEYS if parts.get(key)]
    return ": ".join(dict.fromkeys(words for words in told if words != "error"))[:300]


HEAD_LIMIT, HEAD_WAIT = 65536, 30  # bytes and seconds of a client's head
UPLOAD_WAIT = 600  # seconds for a body to go up, and the head of its answer to come
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n\r\n"


class Connection(web.RequestHandler):
    """One client's connection, with the limits of a head that aiohttp does not have."""

    listener: Listener | None = None
    body: Any = None  # of the request whose head came last
    head_size = 0
    head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.expect_head(transport)
        if self.listener:
            self.listener.welcome(self, transport)

    def connection_lost(self, error: BaseException | None) -> None:
        self.head_came()
        self.known()
        super().connection_lost(error)

    def eof_received(self) -> bool:  # type: ignore[override]
        """A client that ends in the middle of a body may still be listening: it gets its 400."""
        if self.body is None or self.body.is_eof():
            return False
        self.body.set_exception(web.RequestPayloadError("cut short"))
        self.body.feed_eof()
        self.close()  # after the answer
        return True

    def expect_head(self, transport: Any) -> None:
        if self.head_timer is None:
            self.head_timer = self._loop.call_later(HEAD_WAIT, self.too_slow, transport)

    def too_slow(self, transport: Any) -> None:
        self.head_timer = None
        if self._current_request is None:  # else it is the next head, or none: it may wait
            transport.abort()

    def head_came(self) -> None:
        self.head_size = 0
        if self.head_timer:
            self.head_timer.cancel()
            self.head_timer = None

    def known(self) -> None:
        """It has shown a key, or needs none."""
        if self.listener:
            self.listener.strangers.pop(self, None)

    def data_received(self, data: bytes) -> None:
        heads = self._request_count
        is_head = self.body is None or self.body.is_eof()
        super().data_received(data)
        if self._request_count != heads:
            self.head_came()
            self.body = self._messages[-1][1]
        elif data and is_head and not self._upgraded and self.transport:
            self.expect_head(self.transport)
            self.head_size += len(data)
            if self.head_size > HEAD_LIMIT:
                self.transport.write(TOO_LARGE)
                self.transport.close()


class Listener(web.Server):
    """Makes the connections, and bounds those of strangers: the oldest of too many goes."""

    def __init__(self, handler: Any, most_strangers: int = 1024, **options: Any) -> None:
        super().__init__(handler, **options)
        self.strangers: dict[Connection, Any] = {}  # who has shown no key yet, the oldest first
        self.most_strangers = most_strangers

    def __call__(self) -> Connection:
        connection = Connection(self, loop=self._loop, **self._kwargs)
        connection.listener = self
        return connection

    def welcome(self, connection: Connection, transport: Any) -> None:
        self.strangers[connection] = transport
        if len(self.strangers) > self.most_strangers:
            oldest = next(iter(self.strangers))
            self.strangers.pop(oldest).abort()


def raise_file_limit() -> int:
    """As many open files as the system lets this process have; how many these are."""
    try:
        resource: Any = importlib.import_module("resource")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = FILES if hard == resource.RLIM_INFINITY else hard
        if soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return int(max(soft, most))
    except (ImportError, OSError, ValueError):  # Windows, or it may not
        return 256


FILES, STRANGERS = 65536, 4096  # open files where there is no limit; strangers at the most


@asynccontextmanager
async def listen(server: web.Server, host: str, port: int, hint: str) -> AsyncIterator[int]:
    """Serve until the block ends; yields the port.  `hint`: what to do when it is taken."""
    runner = web.ServerRunner(server, shutdown_timeout=5)  # aiohttp waits twice as long
    await runner.setup()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(runner.cleanup)
        try:
            await web.TCPSite(runner, host or None, port, backlog=4096).start()
        except OSError as error:
            raise Failure(f"cannot listen on {host}:{port} ({error.strerror}): {hint}") from error
        yield runner.addresses[0][1]


# == Signing in ====================================================================================
#
# OAuth with PKCE (RFC 7636).  The callback comes to this machine, or its address is pasted into the
# terminal, whichever is first.

FATAL = (  # words of a token endpoint after which only a new login helps
    "invalid_grant",
    "refresh_token_reused",
    "refresh_token_expired",
    "refresh_token_invalidated",
    "refresh_token_revoked",
    "invalid_refresh_token",
    "app_session_expired",
    "app_session_terminated",
    "session_expired",
    "token_expired",
    "token_revoked",
    "account_deactivated",
    "unauthorized_client",
)
FATAL_WORDS = ("log in again", "sign in again", "logging in again", "signing in again")


def pkce() -> tuple[str, str]:
    """Verifier and challenge."""
    verifier = secrets.token_urlsafe(64)
    digest = hashlib.sha256(verifier.encode()).digest()
    return verifier, base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def read_callback(line: str) -> dict[str, str]:
    """code, state, error of a URL, its query or fragment, or `code#state`; {} for no sense."""
    line = line.strip().strip("'\"<>")[:8192]
    found = dict(parse_qsl(re.sub("[?#]", "&", line)))
    pair = re.fullmatch(r"(?:\S*code=)?([^\s#=&?/]+)#([^\s#=&?/]+)", unquote_plus(line))
    if pair:
        found |= {"code": pair[1], "state": pair[2]}
    return found if found.get("code") or "error" in found else {}


def read_lines(loop: asyncio.AbstractEventLoop, use: Callable[[str], object]) -> None:
    with suppress(OSError, AttributeError, RuntimeError):  # no input at all, or the login is over
        for line in os.fdopen(sys.stdin.fileno(), "rb", 0, closefd=False):
            loop.call_soon_threadsafe(use, line.decode(errors="replace"))


async def sign_in(live: Live, provider: Provider, browser: bool) -> tuple[str, Path]:
    """Who signed in, and the file that keeps the login."""
    verifier, challenge = pkce()
    state = secrets.token_urlsafe(24)
    query = {
        "client_id": provider.client_id,
        "scope": provider.scope,
        **provider.authorize_query,
        "response_type": "code",
        "state": state,
        "code_challenge": challenge,
        "code_challenge_method": "S256",
    }
    found, redirect = await await_callback(provider, query, browser)
    if "error" in found:
        raise Failure(f"the login was refused: {error_text(found)}")
    form = {
        "grant_type": "authorization_code",
        "code": found["code"],
        "redirect_uri": redirect,
        "code_verifier": verifier,
    }
    if not provider.token_form:
        form["state"] = state
    net = Net(live)
    try:
        answer = await ask_token(net, provider, form)
        who = await identity_of(net, provider, answer)
    finally:
        await net.close()
    token = {"type": provider.name, "refresh_token": "", "id_token": "", **who}
    token |= token_fields(answer, time.time())
    name = f"{provider.name}-{re.sub(r'[^A-Za-z0-9.@+_-]', '_', token['email'])}.json"
    path = live.auth_dir / name
    save_token(path, merge_token(path, {}, token))
    return token["email"], path


async def await_callback(
    provider: Provider, query: Json, browser: bool
) -> tuple[dict[str, str], str]:
    """What the callback said, and the address that it was asked to come to.

    Any web page can call the callback: one with another state than ours is ignored.
    """
    callback = asyncio.Future[dict[str, str]]()

    def take(text: str) -> bool:
        found = read_callback(text)
        if not found:
            say("That is no callback: it has neither a code nor an error. Still waiting.")
        elif not equal(found.get("state", ""), query["state"]):
            say("A callback whose state belongs to another login was ignored. Still waiting.")
            found = {}
        elif not callback.done():
            callback.set_result(found)
        return bool(found)

    async def handle(request: web.BaseRequest) -> web.Response:
        if request.path != provider.callback_path or not take(request.raw_path):
            return web.Response(status=404, text="This is not the callback.\n")
        return web.Response(text="The terminal says how the login went; you can close this page.\n")

    def paste(line: str) -> None:
        if line.strip():
            take(line)

    hint = f"end what holds it, or set providers.{provider.name}.callback-port"
    async with listen(Listener(handle), "127.0.0.1", provider.callback_port, hint) as port:
        redirect = f"http://localhost:{port}{provider.callback_path}"
        url = f"{provider.authorize_url}?{urlencode(query | {'redirect_uri': redirect})}"
        say(f"Open this address in a browser to sign in to {provider.name}:\n\n{url}\n")
        if browser:
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        say(f"A browser elsewhere needs: ssh -L {port}:127.0.0.1:{port} USER@THIS-MACHINE\n")
        say(f"Or paste the address that the browser ends at ({redirect}?code=...) here:")
        threading.Thread(target=read_lines, args=(callback.get_loop(), paste), daemon=True).start()
        return await callback, redirect


async def ask_token(net: Net, provider: Provider, form: Json, proxy: str = "") -> Json:
    """The token endpoint's answer; ProxyError with its words, 401 when they are final, else 503."""
    own = {"client_id": provider.client_id, "client_secret": provider.client_secret}
    form = {name: value for name, value in own.items() if value} | form
    kind = "x-www-form-urlencoded" if provider.token_form else "json"
    data = form if provider.token_form else write_json(form)
    headers = {"Content-Type": f"application/{kind}"}
    proxy = proxy or provider.proxy_url
    status, answer = await net.ask_json("POST", provider.token_url, headers, data, proxy)
    if status == 404 and provider.other_token_url:
        status, answer = await net.ask_json("POST", provider.other_token_url, headers, data, proxy)
    if status == 200 and answer.get("access_token") and isinstance(answer["access_token"], str):
        return answer
    secret = str(form.get("refresh_token") or form["code"])
    words = error_text(answer).replace(secret, "...")
    final = any(code in words for code in FATAL)
    if 400 <= status < 500:  # a refusal may have no such code
        final = final or any(phrase in words.lower() for phrase in FATAL_WORDS)
    message = f"{provider.name}'s token endpoint answered {status}: {words}"
    raise fault(401 if final else 503, message)


def token_fields(answer: Json, now: float) -> Json:
    """What a token endpoint's answer changes in a token file."""
    names = ("access_token", "refresh_token", "id_token")
    given = {name: answer[name] for name in names if answer.get(name)}
    lasts = max(5 * MINUTE, number(answer.get("expires_in")) or HOUR)
    return given | {"last_refresh": rfc3339(now), "expired": rfc3339(now + lasts)}


async def identity_of(net: Net, provider: Provider, answer: Json) -> Json:
    """The e-mail address of who signed in, from wherever it is told; else a name is made up."""
    who = {"email": f"account-{secrets.token_hex(4)}", **claims(answer)}
    account = as_dict(answer.get("account"))
    if provider.profile_url and not account.get("email_address"):
        headers = {"Authorization": f"Bearer {answer['access_token']}"}
        with suppress(ProxyError, *NET_ERRORS):
            url, proxy = provider.profile_url, provider.proxy_url
            _, profile = await net.ask_json("GET", url, headers, None, proxy)
            account = as_dict(profile.get("account")) or profile
    email = account.get("email_address") or account.get("email")
    if isinstance(email, str):
        who["email"] = email
    return who


# == Accounts ======================================================================================
#
# Who may answer next, with which token, and what an error means for that.  Knows no dialect.  Rests
# and tokens live by the clock that it is given, so that a test can live a day in a second.
#
# A thread stays with its account while that can answer; the prompt cache is worth it.  A new one
# goes to an account that is not nearly spent, of the highest priority, and then as routing.strategy
# says: with the fewest running requests and recent threads, in turn, the first, or the one whose
# quota window ends first, so that what is left of it is used.
#
# To add a rule about errors, add a row to rest_rules.  A time that the error itself names comes
# before the row's, and the configuration's max-cooldown cuts both.

SHORT_WAIT = 10  # seconds: a throttle that asks for no more is waited for on the same account
RETRY_PAUSE = 0.3  # seconds between tries after an error that names no time
PROBE = 2  # seconds that others leave an account alone that has just woken and is being tried
REFRESH_WAIT = 30  # seconds that a refresh may take
REFRESH_PAUSES = (1, 2, 4, 8, 16, 30)  # seconds after one that failed, then another, ...
NEARLY_SPENT = 95  # per cent of a quota window
THREADS = 10_000  # that are remembered
RESTING_MODELS = 1000  # of one account, that are remembered
MOST_DOUBLINGS = 20  # of a rest: a few seconds are months by then, and max-cooldown cuts them


class RestRule(NamedTuple):
    """What an error means.  It fits by its status and, where they are named, a code or words."""

    statuses: Collection[int]
    codes: frozenset[str]  # of the provider, in lower case; "@7d_oi": a full window of that name
    words: tuple[str, ...]  # patterns for its text, for errors that have no code of their own
    rests: str  # "account", "model" or nobody: ""
    seconds: float  # where the error names no time; twice as long after each failed probe
    # again: as often as request-retry says; once more: after a pause, then the next account;
    # wait: if the error asks for a short one, else next; refresh: with another token, then next;
    # next; stop
    then: str


def rest_rules() -> tuple[RestRule, ...]:
    some = frozenset
    any_status, refused = range(400, 600), range(400, 500)
    extra_usage = ("*extra usage*", "*long context*")  # Claude's, billed beside the plan
    bad_key = ("*api?key not valid*", "*api?key expired*")  # Google's, with a 400
    no_credit = ("*credit balance*", "*usage_not_included*")
    no_model = ("*model*not supported*",)  # ChatGPT's, for a model that the plan lacks
    revoked = ("*revoked*", "*token*expired*", "*expired*token*")  # Claude's, with a 403
    quota = some({"resource_exhausted", "quota_exhausted", "@7d_oi"})  # one model's, not all
    spent = some({"usage_limit_reached", "insufficient_quota"})  # ChatGPT's comes with a 400, too
    retried = (408, 500, 502, 503, 504, 529)
    return (
        RestRule(any_status, some({LOCAL}), (), "", 0, "again"),
        RestRule(refused, some(), extra_usage, "", 0, "stop"),
        RestRule((401,), some(), (), "account", NEVER, "refresh"),
        RestRule((403,), some(), revoked, "account", NEVER, "refresh"),
        RestRule((400,), some(), bad_key, "account", NEVER, "next"),
        RestRule((402,), some(), (), "account", 30 * MINUTE, "next"),
        RestRule(any_status, some(), no_credit, "account", 30 * MINUTE, "next"),
        RestRule((403,), some(), (), "account", DAY, "next"),
        RestRule((404,), some(), (), "model", 30 * MINUTE, "next"),
        RestRule((400,), some(), no_model, "model", 30 * MINUTE, "next"),
        RestRule((429,), quota, (), "model", MINUTE, "wait"),
        RestRule(any_status, some(), ("* at capacity*",), "model", MINUTE, "wait"),
        RestRule(refused, spent, (), "account", MINUTE, "wait"),
        RestRule((429,), some({RETRIABLE}), (), "account", 5, "once more"),
        RestRule((429,), some(), (), "account", MINUTE, "wait"),
        RestRule(retried, some(), (), "account", 5, "again"),
        RestRule(range(500, 600), some(), (), "account", 5, "next"),
        RestRule(any_status, some(), (), "", 0, "stop"),
    )


RESTS = rest_rules()


def verdict(problem: Problem) -> RestRule:
    """The first row of RESTS that fits."""
    codes = problem.codes | {f"@{name}" for name in problem.windows}
    for rule in RESTS:
        if problem.status in rule.statuses:
            if not rule.codes and not rule.words:
                return rule
            if codes & rule.codes or matches(problem.text[:300].replace("\n", " "), rule.words):
                return rule
    return RESTS[-1]


@dataclass
class Rest:
    """Of an account, or of one model of it.  Times are the monotonic clock's."""

    status: int
    message: str
    began: float
    wakes: float
    failures: int = 0  # in a row that named no time: the first, and failed probes
    probe_until: float = 0  # somebody tries meanwhile whether it is over


@dataclass
class Window:
    """What an answer's headers told about a quota."""

    name: str
    full: bool
    used_percent: float
    resets_at: float  # seconds since 1970


class Account:
    """One subscription or key, and how it stands.  Rests have the model as key, "" is all of it."""

    hint = ""  # what to do when it rests for ever

    def __init__(self, kind: str, label: str) -> None:
        self.kind, self.label = kind, label
        self.name = f"{kind} {mask(label)}"  # for the log
        self.rests: dict[str, Rest] = {}
        self.quota: list[Window] = []
        self.in_flight = self.threads = self.turn = 0
        self.counts = Counter(requests=0, errors=0, input_tokens=0, output_tokens=0)
        self.row: Row | None = None  # that it is bound to now

    disabled = False
    priority = 0.0
    plan = ""
    expires = NEVER
    own_proxy = ""

    @property
    def proxy(self) -> str:
        """The way out for it; "": that of all."""
        return self.own_proxy or (self.row.provider.proxy_url if self.row else "")

    def resting(self, model: str) -> list[Rest]:
        if not self.rests:
            return []
        return [self.rests[key] for key in {"", model} if key in self.rests]

    def wait(self, model: str, now: float) -> float:
        """Seconds until it may be asked for a model."""
        rests = self.resting(model)
        return max((max(rest.wakes, rest.probe_until) - now for rest in rests), default=0.0)

    def state(self, now: float) -> str:
        if self.disabled:
            return "disabled"
        wait = self.wait("", now)
        if wait == NEVER:
            return "needs-login"
        return "resting" if wait > 0 else "ready"

    def nearly_spent(self, moment: float) -> bool:
        """By the windows of all its models; a name with a `_` is that of some of them only."""
        for window in self.quota:
            spent = window.full or window.used_percent >= NEARLY_SPENT
            if spent and window.resets_at > moment and "_" not in window.name:
                return True
        return False

    def resets_at(self, moment: float) -> float:
        """When the first of its known windows ends; never, where none is known."""
        ends = [w.resets_at for w in self.quota if w.resets_at > moment and "_" not in w.name]
        return min(ends, default=NEVER)

    @contextmanager
    def leased(self) -> Iterator[None]:
        self.in_flight += 1
        self.counts["requests"] += 1
        try:
            yield
        finally:
            self.in_flight -= 1


class ApiKey(Account):
    """A key of the configuration."""

    def __init__(self, row: Row, key: str) -> None:
        # A part of a digest tells keys apart that nobody may read.
        self.id = hashlib.sha256(f"{row.provider.base_url} {key}".encode()).hexdigest()[:8]
        super().__init__(row.kind, f"{self.id} {row.name}")
        self.key = key


class Login(Account):
    """A token file, and the refresh that runs for it."""

    def __init__(self, path: Path, token: Json) -> None:
        super().__init__(str(token["type"]), str(token.get("email") or path.stem))
        self.path = path
        self.hint = f"run `ampproxy.py login {self.kind}`"
        self.retry_at, self.trouble = 0.0, ""  # no refresh before then (monotonic), and why
        self.refreshes_failed = 0  # in a row
        self.replaced = "-"  # the access token in the file that the present one came for
        self.refreshing: asyncio.Task[None] | None = None
        self.take(token)

    def take(self, token: Json) -> None:
        self.token = token
        told = claims(token)
        self.plan = str(told.get("plan") or token.get("plan") or "")
        self.account_id = str(token.get("account_id") or told.get("account_id") or "")
        self.expires = expiry(token)
        self.disabled = token.get("disabled") is True
        self.priority = number(token.get("priority"))
        self.own_proxy = str(proxy_of(token))

    @property
    def access_token(self) -> str:
        return str(self.token.get("access_token") or "")

    def stale(self, refused: str, moment: float) -> bool:
        """Whether its token was refused, or has expired by then."""
        return refused == self.token.get("access_token") or self.expires < moment


class Pool:
    """All accounts.  `version` grows when it changes which of them there are."""

    def __init__(self, live: Live, net: Net | None = None, clock: Any = CLOCK) -> None:
        self.live, self.net, self.clock = live, net, clock
        self.accounts: dict[Path | str, Account] = {}
        self.by_row: dict[str, list[Account]] = {}
        self.stamps: dict[Path, Any] = {}
        self.homes: OrderedDict[str, tuple[Account, float]] = OrderedDict()  # longest unused first
        self.turn = self.version = 0
        self.bound: Any = None

    # -- Which accounts there are --

    def scan(self) -> list[Account]:
        """Look at the auth directory.  A file that is gone for two looks is gone."""
        folder = self.live.auth_dir
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        stamps = {path: stamp(path) for path in files if path.match("[!.]*.json")}
        seen, self.stamps = self.stamps, stamps
        for path in [path for path in self.accounts if isinstance(path, Path)]:
            if path not in stamps and path not in seen:
                del self.accounts[path]
        for path, now in stamps.items():
            if now != seen.get(path):
                self.read(path)
        self.bind()
        return list(self.accounts.values())

    def read(self, path: Path) -> None:
        """Take up what a token file says."""
        try:
            token = read_token(path)
        except (OSError, ValueError) as error:
            log.error("%s is no token file: %s", path, explain(error))
            if is_local(error):
                self.stamps[path] = None  # it may be one in a second
            return
        account = self.accounts.get(path)
        if not isinstance(account, Login):
            self.accounts[path] = Login(path, token)
            return
        given, known = token.get("access_token"), account.token.get("access_token")
        if given == account.replaced != known:  # what could not be saved is newer
            edited = ("disabled", "priority", "proxy_url", "proxy-url")
            kept = {key: token[key] for key in edited if key in token}
            self.save(account, account.token | kept)
            return
        if given != known:
            account.rests, account.retry_at, account.refreshes_failed = {}, 0.0, 0
        account.take(token)

    def bind(self) -> None:
        """Put each account under its row; the API keys follow the configuration."""
        keys: dict[Path | str, Account] = {}
        for row in self.live.rows:
            for key in row.keys:
                made = ApiKey(row, key)
                place = f"{row.id} {made.id}"
                keys[place] = self.accounts.get(place, made)
                keys[place].row = row
                keys[place].own_proxy = row.proxies.get(key, "")
        logins = {i: a for i, a in self.accounts.items() if isinstance(a, Login)}
        self.accounts = keys | logins
        kinds = {row.id: row for row in self.live.rows if not row.keys}
        for login in logins.values():
            login.row = kinds.get(login.kind)
        by_row: dict[str, list[Account]] = {}
        for account in self.accounts.values():
            if account.row and not account.disabled:
                by_row.setdefault(account.row.id, []).append(account)
        bound = (self.live.version, by_row)
        if bound != self.bound:
            self.by_row, self.bound = by_row, bound
            self.version += 1

    def of(self, rows: Iterable[Row]) -> list[Account]:
        if self.bound and self.bound[0] != self.live.version:
            self.bind()
        return [account for row in rows for account in self.by_row.get(row.id, ())]

    # -- Who is next --

    async def choose(
        self, rows: list[Row], model: str, thread: str, tried: Collection[Account], until: float
    ) -> Account | None:
        """The account to ask, after a wait for it to wake up if that is over by `until`."""
        while True:
            now = self.clock.monotonic()
            left = [account for account in self.of(rows) if account not in tried]
            free = [account for account in left if account.wait(model, now) <= 0]
            if free:
                account = self.home(thread, free, now)
                for rest in account.resting(model):  # it is over: this is the probe
                    rest.probe_until = now + PROBE
                return account
            pause = min((account.wait(model, now) for account in left), default=NEVER)
            if now + pause > until:
                return None
            await self.clock.sleep(pause)

    def home(self, thread: str, free: list[Account], now: float) -> Account:
        """The thread's own account, else the best; of the first row that has any."""
        name = free[0].row.name if free[0].row else ""
        free = [account for account in free if account.row and account.row.name == name]
        self.forget_threads(now)
        thread = thread and name + thread
        account, _ = self.homes.pop(thread, (None, 0.0))
        if account:
            account.threads -= 1
        if account not in free:
            account = free[0] if len(free) == 1 else min(free, key=self.order())
        if thread:
            self.homes[thread] = account, now
            account.threads += 1
        self.turn += 1
        account.turn = self.turn
        return account

    def forget_threads(self, now: float) -> None:
        oldest = now - duration(str(self.live.config["routing"]["session-affinity-ttl"]))
        while self.homes:
            account, used = next(iter(self.homes.values()))
            if len(self.homes) < THREADS and used >= oldest:
                return
            self.homes.popitem(last=False)
            account.threads -= 1

    def order(self) -> Callable[[Account], tuple[Any, ...]]:
        """What the best account has least of."""
        strategy, moment = self.live.config["routing"]["strategy"], self.clock.time()

        def key(account: Account) -> tuple[Any, ...]:
            busy = account.in_flight + account.threads if strategy == "least-connections" else 0
            ends = account.resets_at(moment) if strategy == "soonest-reset" else 0
            turn = 0 if strategy == "fill-first" else account.turn
            spent = account.nearly_spent(moment)
            return spent, -account.priority, ends, busy, turn, account.label

        return key

    # -- What an answer means --

    def answered(self, account: Account, model: str, began: float) -> None:
        """A success ends the rests that began before it was asked for."""
        for key in ("", model):
            if key in account.rests and account.rests[key].began < began:
                del account.rests[key]

    @contextmanager
    def probing(self, account: Account, model: str) -> Iterator[None]:
        """While this lasts others leave an account alone that has just woken, up to PROBE."""
        tried = account.resting(model)
        try:
            yield
        finally:
            for rest in tried:
                rest.probe_until = 0

    def failed(self, account: Account, problem: Problem, model: str, began: float) -> None:
        """An error of a request that was sent at `began`: a rest begins, or ends."""
        account.counts["errors"] += 1
        rule = verdict(problem)
        if rule.rests:
            self.rest(account, rule, problem, model, began)
        elif LOCAL not in problem.codes:  # the request's own fault: it was answered
            self.answered(account, model, began)

    def rest(
        self, account: Account, rule: RestRule, problem: Problem, model: str, began: float
    ) -> None:
        """Leave an account, or a model of it, alone for as long as the error asks.

        Where it names no time the rest is twice as long after each failed probe.  Of requests that
        ran side by side one counts: the others were sent before the rest was over.
        """
        now, key = self.clock.monotonic(), model if rule.rests == "model" else ""
        old = account.rests.get(key)
        failures = old.failures if old else 0
        if not problem.retry_after and (old is None or began >= old.wakes):
            failures = min(failures + 1, MOST_DOUBLINGS)
        length = rule.seconds
        if length != NEVER or isinstance(account, ApiKey):  # a key may be good again
            most = self.live.config["max-cooldown"]
            grown = length * 2 ** max(0, failures - 1)
            length = max(1, min(problem.retry_after or grown, most))
        wakes = max(now + length, old.wakes if old else 0)
        kept = {k: r for k, r in account.rests.items() if k in ("", key) or r.wakes > now}
        status = 404 if rule.rests == "model" and problem.status == 400 else problem.status
        account.rests = {**kept, key: Rest(status, problem.message, now, wakes, failures)}
        self.bound_rests(account)
        then = account.hint if length == NEVER else f"rests for {length:.0f} s"
        log.warning("%s: %s; %s", f"{account.name} {key[:100]}".strip(), problem.message, then)

    def bound_rests(self, account: Account) -> None:
        """Anybody can ask for any number of models: those that wake first are forgotten."""
        models = [key for key in account.rests if key]
        if len(models) > RESTING_MODELS:
            del account.rests[min(models, key=lambda key: account.rests[key].wakes)]

    def nobody(self, rows: list[Row], model: str, last: Problem | None = None) -> Problem:
        """Why none of the accounts can answer now, each by its name; `last`: what one just said."""
        now, told, waits, statuses = self.clock.monotonic(), [], [NEVER], []
        for account in self.of(rows):
            wait = account.wait(model, now)
            waits.append(wait)
            rests = account.resting(model)
            statuses.append([rest.status for rest in rests])
            then = account.hint if wait == NEVER else f"wakes in {wait:.0f} s"
            reasons = ", ".join(rest.message for rest in rests)
            told.append(f"{account.kind} {account.label}: {reasons}; {then}")
        first = max(1, min(waits))
        status = 429
        if first == NEVER:
            status = 401
        elif all(found and set(found) == {404} for found in statuses):
            status = 404  # they all lack the model
        message = "no account can answer; " + ". ".join(told)
        text = f"{last.text}; {message}" if last and last.text else ""
        return Problem(status, message, first if status == 429 else 0, text)

    # -- Tokens --

    async def bearer(self, account: Account, refused: str = "") -> str:
        """A token that is good for the next minute; `refused`: not this one.

        ProxyError 401 when only a login helps, 503 when the refresh failed for now.
        """
        if isinstance(account, ApiKey):
            return account.key
        assert isinstance(account, Login)
        now = self.clock.time()
        if account.stale(refused, now + MINUTE):
            if account.refreshing is None:
                account.refreshing = asyncio.create_task(
                    self.refresh(account, refused, now + MINUTE)
                )
            await asyncio.wait([account.refreshing])  # a client that leaves does not cancel it
        if account.wait("", 0) == NEVER or not account.access_token:
            raise fault(401, f"the login has ended ({account.trouble}): {account.hint}")
        if account.retry_at > self.clock.monotonic() and account.stale(refused, now):
            raise fault(503, account.trouble)
        return account.access_token

    async def refresh(self, account: Login, refused: str, soon: float) -> None:
        """Adopt a newer token from the file, else ask, save, and only then use it."""
        try:
            async with asyncio.timeout(REFRESH_WAIT), alone_with(account.path):
                await self.refresh_alone(account, refused, soon)
        except ProxyError as error:
            self.refresh_failed(account, error.problem)
        except NET_ERRORS as error:
            codes = frozenset({LOCAL}) if is_local(error) else frozenset[str]()
            self.refresh_failed(account, Problem(503, net_words(error), codes=codes))
        finally:
            account.refreshing = None

    async def refresh_alone(self, account: Login, refused: str, soon: float) -> None:
        self.read(account.path)
        if not account.stale(refused, soon) or account.retry_at > self.clock.monotonic():
            return
        assert self.net and account.row
        form = {
            "grant_type": "refresh_token",
            "refresh_token": account.token.get("refresh_token"),
        }
        if not form["refresh_token"]:
            raise fault(401, "refused, and there is no refresh token")
        answer = await ask_token(self.net, account.row.provider, form, account.own_proxy)
        self.read(account.path)
        if account.token.get("refresh_token") != form["refresh_token"]:
            return  # a new login came meanwhile
        on_disk = merge_token(account.path, account.token, {})
        account.replaced = str(on_disk.get("access_token"))
        self.save(account, account.token | token_fields(answer, self.clock.time()))
        account.refreshes_failed = 0
        log.info("%s: token refreshed", account.name)

    def save(self, account: Login, changes: Json) -> None:
        """On disk before it is used; where that fails it is used, and tried again each second."""
        account.take(merge_token(account.path, account.token, changes))
        try:
            account.path.stat()  # gone: the person logged out, or an editor is at it
            save_token(account.path, account.token)
        except OSError as error:
            self.stamps[account.path] = None
            log.error("%s: the new token cannot be saved: %s", account.name, explain(error))

    def refresh_failed(self, account: Login, problem: Problem) -> None:
        last = 0 if LOCAL in problem.codes else len(REFRESH_PAUSES) - 1
        pause = REFRESH_PAUSES[min(account.refreshes_failed, last)]
        account.refreshes_failed += 1
        now = self.clock.monotonic()
        account.retry_at = now + pause
        self.read(account.path)
        if not account.retry_at:
            return  # a newer token was there
        account.trouble = f"refresh failed: {problem.message}"
        log.error("%s: %s", account.name, account.trouble)
        if problem.status == 401 or account.stale("", self.clock.time()):
            problem.retry_after = pause
            self.failed(account, problem, "", now)

    def refresh_ahead(self) -> None:
        """Begin the refreshes that are due; one that has just been made is not made again."""
        now, monotonic = self.clock.time(), self.clock.monotonic()
        for account in self.of(self.live.rows):
            if not isinstance(account, Login) or not account.row or account.refreshing:
                continue
            soon = now + account.row.provider.refresh_lead
            fresh = parse_time(account.token.get("last_refresh")) + MINUTE > now
            due = account.stale("", soon) and not fresh and account.retry_at <= monotonic
            if due and account.wait("", 0) < NEVER:
                account.refreshing = asyncio.create_task(self.refresh(account, "", soon))


# == Server-sent events ============================================================================
#
# The HTML standard's event streams: lines end in LF, CRLF or CR, an event in an empty line, and
# bytes arrive in pieces of any size.  What passes is passed in runs of whole events, byte for byte;
# so a comment may be put between two runs, and nobody ever gets half an event.

LINE_END = rb"(?:\r\n|\n|\r)"
EVENT_END = re.compile(LINE_END + rb"(?:\r\n|\n|\r(?!\n))")
LONGEST_END = 4  # bytes


def event_end(data: bytes) -> int:
    """Where the last whole event ends; -1 for nowhere."""
    if b"\r" not in data:
        end = data.rfind(b"\n\n")
        return end + 2 if end >= 0 else -1
    ends = [found.end() for found in EVENT_END.finditer(data)]
    return ends[-1] if ends else -1


async def whole_events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Runs of whole events, each as soon as it is there; at the end what is left, if anything."""
    held: list[bytes] = []  # pieces of an event that has not ended
    size = 0
    tail = b""  # the last bytes of `held`: the end of an event may be cut in two
    async for data in pieces:
        if not held and data.endswith(b"\n\n"):
            yield data
            continue
        end = event_end(data)
        if end < 0 and held:
            end = event_end(tail + data[:LONGEST_END]) - len(tail)
        if end <= 0:
            held.append(data)
            size += len(data)
            tail = (tail + data)[-LONGEST_END:]
            if size > BODY_LIMIT:
                raise fault(413, "the upstream sent no whole answer: an event has no end")
            continue
        yield b"".join((*held, memoryview(data)[:end]))
        rest = data[end:]
        held, size, tail = ([rest], len(rest), rest[-LONGEST_END:]) if rest else ([], 0, b"")
    if held:
        yield b"".join(held)


def split_events(run: bytes) -> list[bytes]:
    """The events of a run, with their ends."""
    if b"\r" not in run:
        parts = run.split(b"\n\n")
        last = parts.pop()
        return [part + b"\n\n" for part in parts] + ([last] if last else [])
    events, start = [], 0
    for found in EVENT_END.finditer(run):
        events.append(run[start : found.end()])
        start = found.end()
    return events + ([run[start:]] if start < len(run) else [])


def event_data(event: bytes) -> bytes:
    """Its data lines, joined as the standard says; b"" for a comment."""
    if event.startswith(b"data: ") and event.find(b"\n") >= len(event) - 2:
        return event[6:].rstrip(b"\r\n")  # the plainest form, and the commonest
    lines = []
    for line in event.removeprefix(b"\xef\xbb\xbf").splitlines():
        if line.startswith(b"data:"):
            lines.append(line[5:].removeprefix(b" "))
    return b"\n".join(lines)


def with_data(event: bytes, data: bytes) -> bytes:
    """The event with other data; its other lines stay."""
    lines = event.removeprefix(b"\xef\xbb\xbf").splitlines()
    kept = [line for line in lines if line and not line.startswith(b"data:")]
    kept += [b"data: " + line for line in data.split(b"\n")]
    return b"\n".join(kept) + b"\n\n"


# == Dialects ======================================================================================
#
# The four ways to word a model call, as far as an answer in the client's own dialect needs it: what
# errors look like, which events matter, where an answer ends, how tokens are counted.
#
# An event that has none of a dialect's `marks` passes unread.
#
# To add a dialect, add a row here, its paths to MODEL_PATH and DIALECTS, what it calls an effort to
# EFFORT_WORDS, effort_of and with_effort, and its verbs to the providers' paths and to VERBS.


@dataclass(frozen=True)
class Dialect:
    name: str
    error: Callable[[int, str], Json]  # the body of an error
    error_event: Callable[[Json], bytes]  # the event that ends a broken stream, of that body
    comment: bytes  # the line that keeps a silent stream alive; b"" where clients break on it
    marks: tuple[bytes, ...]  # one is in every event that must be looked at
    model_key: str  # where an answer names its model...
    model_marks: tuple[bytes, ...]  # ...and what is in events that do, where many of them do
    short_ends: bool  # its last events are small: of a long run only the end is searched
    ending: Callable[[Json], str]  # of an event: "over", "whole" when the end may come, or ""
    usage: Callable[[Json], tuple[float, float]]  # input and output tokens, of what `holder` finds
    cuts_errors: bool = False  # clients only notice an error when the connection breaks, too


# What SDKs look for in an error: Anthropic's type, OpenAI's type and code, Google's status.
KINDS = {
    400: ("invalid_request_error", "invalid_request_error", "INVALID_ARGUMENT"),
    401: ("authentication_error", "authentication_error", "UNAUTHENTICATED"),
    403: ("permission_error", "permission_error", "PERMISSION_DENIED"),
    404: ("not_found_error", "not_found_error", "NOT_FOUND"),
    413: ("request_too_large", "invalid_request_error", "INVALID_ARGUMENT"),
    429: ("rate_limit_error", "rate_limit_error", "RESOURCE_EXHAUSTED"),
    500: ("api_error", "server_error", "INTERNAL"),
    529: ("overloaded_error", "server_error", "UNAVAILABLE"),
}
OTHER_CODES = {  # of errors inside a 200, beside those above
    "invalid_prompt": 400,
    "context_length_exceeded": 400,
    "invalid_encrypted_content": 400,
    "rate_limit_exceeded": 429,
    "usage_limit_reached": 429,
    "insufficient_quota": 429,
    "server_is_overloaded": 529,
}
STATUSES = {str(code): code for code in range(400, 600)}
for code in reversed(KINDS):  # invalid_request_error is a 400, not a 413
    STATUSES |= dict.fromkeys(KINDS[code], code)
STATUSES |= OTHER_CODES


def kinds(status: int) -> tuple[str, str, str]:
    return KINDS.get(status, KINDS[400 if status < 500 else 500])


def anthropic_error(status: int, message: str) -> Json:
    return {"type": "error", "error": {"type": kinds(status)[0], "message": message}}


def openai_error(status: int, message: str) -> Json:
    kind = kinds(status)[1]
    return {"error": {"message": message, "type": kind, "code": kind}}


def gemini_error(status: int, message: str) -> Json:
    return {"error": {"code": status, "message": message, "status": kinds(status)[2]}}


def data_event(value: Json) -> bytes:
    return b"data: %b\n\n" % write_json(value)


def anthropic_error_event(body: Json) -> bytes:
    return b"event: error\n" + data_event(body)


def responses_error_event(body: Json) -> bytes:
    """Codex takes notice of no other (clients.md)."""
    failed = {"status": "failed", **body, "output": []}
    return data_event({"type": "response.failed", "response": failed})


RESPONSE_ENDS = ("response.completed", "response.incomplete", "response.failed")


def anthropic_ending(event: Json) -> str:
    return "over" if event.get("type") == "message_stop" else ""


def chat_ending(event: Json) -> str:
    """Usage may come behind the reason, then [DONE], which is no JSON."""
    choices = as_dicts(event.get("choices"))
    return "whole" if any(choice.get("finish_reason") for choice in choices) else ""


def responses_ending(event: Json) -> str:
    return "over" if event.get("type") in RESPONSE_ENDS else ""


def gemini_ending(event: Json) -> str:
    blocked = as_dict(event.get("promptFeedback")).get("blockReason")
    candidates = as_dicts(event.get("candidates"))
    ended = any(candidate.get("finishReason") for candidate in candidates)
    return "whole" if ended or blocked else ""


def holder(event: Json) -> Json:
    """The part of an event, or of a whole answer, that names the model and counts tokens."""
    return as_dict(event.get("message")) or as_dict(event.get("response")) or event


def added(usage: Any, *names: str) -> float:
    """The sum of these figures, as far as they are there."""
    total = 0.0
    if isinstance(usage, dict):
        for name in names:
            if name in usage:
                total += number(usage[name])
    return total


def anthropic_usage(inside: Json) -> tuple[float, float]:
    usage = inside.get("usage")
    cache = ("cache_read_input_tokens", "cache_creation_input_tokens")
    return added(usage, "input_tokens", *cache), added(usage, "output_tokens")


def chat_usage(inside: Json) -> tuple[float, float]:
    usage = inside.get("usage")
    return added(usage, "prompt_tokens"), added(usage, "completion_tokens")


def responses_usage(inside: Json) -> tuple[float, float]:
    usage = inside.get("usage")
    return added(usage, "input_tokens"), added(usage, "output_tokens")


def gemini_usage(inside: Json) -> tuple[float, float]:
    usage = inside.get("usageMetadata")
    read = added(usage, "promptTokenCount", "toolUsePromptTokenCount")
    return read, added(usage, "candidatesTokenCount", "thoughtsTokenCount")


ANTHROPIC = Dialect(
    name="anthropic",
    error=anthropic_error,
    error_event=anthropic_error_event,
    comment=b": keep-alive\n\n",
    marks=(b'"message_', b'"error"'),  # message_delta counts tokens, message_stop ends it
    model_key="model",
    model_marks=(),  # message_start, the first event, alone
    short_ends=True,
    ending=anthropic_ending,
    usage=anthropic_usage,
)
CHAT_COMPLETIONS = Dialect(
    name="chat",
    error=openai_error,
    error_event=data_event,
    # openai's Python SDK raises for one with an empty line behind it after an id (clients.md).
    comment=b": keep-alive\n",
    marks=(b"[DONE]", b'"finish_reason":"', b'"finish_reason": "', b'"usage":', b'"error"'),
    model_key="model",
    model_marks=(b'"model"',),
    short_ends=True,
    ending=chat_ending,
    usage=chat_usage,
)
RESPONSES = Dialect(
    name="responses",
    error=openai_error,
    error_event=responses_error_event,
    comment=b": keep-alive\n",
    marks=(b'"response"', b"response.output_item.done", b'"error"'),
    model_key="model",
    model_marks=(),  # they all have a "response"
    short_ends=False,
    ending=responses_ending,
    usage=responses_usage,
)
GEMINI = Dialect(
    name="gemini",
    error=gemini_error,
    error_event=data_event,
    comment=b"",  # Google's SDKs raise, or drop the event behind it (clients.md)
    marks=(b'"finishReason"', b'"blockReason"', b'"usageMetadata"', b'"error"'),
    model_key="modelVersion",
    model_marks=(b'"modelVersion"',),
    short_ends=False,
    ending=gemini_ending,
    usage=gemini_usage,
    cuts_errors=True,
)


# == Provider rules ================================================================================
#
# What a login's backend asks of a request (providers.md 1.3, 2.3).  A rule takes a body and returns
# one: it shares what it does not change, and changes nothing in place, as the client's own body is
# sent where nothing had to change, and is asked with again at another provider.
#
# To add a rule, write a function and name it in RULES.

IDENTITY = "You are Claude Code, Anthropic's official CLI for Claude."
TOOL_USE_KEYS = {"type", "id", "name", "input", "cache_control", "caller"}
# A Claude signature is base64 of a first byte 0x12, encoded once or twice (providers.md 1.3.12).
SIGNATURE = re.compile(r"E[g-v]|R[WX]")
TOOL_ID = re.compile(r"[a-zA-Z0-9_-]*")
DEEPEST = 9  # lists of blocks in blocks; Claude itself knows three
LEAST_BUDGET, MOST_MARKS = 1024, 4


def claude_rules(body: Json, headers: Headers, provider: Provider) -> Json:
    body = as_claude_takes_it(with_betas(body, headers, provider), provider.thinking)
    if provider.identity:
        body = {**body, "system": with_identity(body.get("system"))}
    return body


def claude_key_rules(body: Json, headers: Headers, provider: Provider) -> Json:
    """Others speak Claude's dialect, too; what their models take is theirs to say."""
    is_claude = matches(str(body.get("model"))[:200], ("*claude-*",))
    if provider.drop_betas:
        body = with_betas(body, headers, provider)
    return as_claude_takes_it(body, provider.thinking) if is_claude else body


def as_claude_takes_it(body: Json, table: dict[str, str]) -> Json:
    """What Claude refuses with a 400 put right (providers.md 1.3); `table`: see THINKING."""
    model = str(body.get("model"))
    thinking = thinking_of(table, model)
    for name in ("system", "messages"):
        if isinstance(body.get(name), list):
            body = {**body, name: cleaned(body[name])}
    body = with_fitting_thought(body, thinking)
    thinks = is_thinking(body, thinking)
    if not thinks:
        body = without_clear_thinking(body)
    return with_few_marks(without_sampling(body, model, thinks))


def forces_tool(body: Json) -> bool:
    return as_dict(body.get("tool_choice")).get("type") in ("any", "tool")


def is_thinking(body: Json, thinking: Thinking) -> bool:
    kind = as_dict(body.get("thinking")).get("type")
    return kind in ("enabled", "adaptive") or (kind is None and thinking.by_itself)


def without_thought(body: Json, thinking: Thinking) -> Json:
    """Thinking off, and the effort with it; some models must be told."""
    body = {name: value for name, value in body.items() if name != "thinking"}
    output = body.get("output_config")
    if isinstance(output, dict) and "effort" in output:
        body["output_config"] = {k: v for k, v in output.items() if k != "effort"}
    if thinking.by_itself:
        body["thinking"] = {"type": "disabled"}
    return body


def with_fitting_thought(body: Json, thinking: Thinking) -> Json:
    """Thinking off for a forced tool, else a budget of 1,024 to less than max_tokens."""
    if forces_tool(body) and is_thinking(body, thinking):
        return without_thought(body, thinking)
    given = as_dict(body.get("thinking"))
    if given.get("type") == "auto":  # a word of Amp's only
        if forces_tool(body):
            return without_thought(body, thinking)
        given = {**given, "type": "adaptive"}
        if thinking.limits:
            given = {"type": "enabled", "budget_tokens": BUDGETS["medium"]}
        body = {**body, "thinking": given}
    budget, most = given.get("budget_tokens"), body.get("max_tokens")
    if given.get("type") != "enabled" or type(budget) is not int:
        return body
    fits = max(budget, LEAST_BUDGET)
    if type(most) is int and most <= fits:  # something must be left for the answer
        fits = max(most * 3 // 4, LEAST_BUDGET)
        if most <= fits:
            return without_thought(body, thinking)
    return body if fits == budget else {**body, "thinking": {**given, "budget_tokens": fits}}


def without_clear_thinking(body: Json) -> Json:
    """Without the edit of old thoughts, which is refused when there are no new ones."""
    management = as_dict(body.get("context_management"))
    edits = as_list(management.get("edits"))
    kept = [e for e in edits if not str(as_dict(e).get("type")).startswith("clear_thinking")]
    if len(kept) == len(edits):
        return body
    if kept:
        return {**body, "context_management": {**management, "edits": kept}}
    return {name: value for name, value in body.items() if name != "context_management"}


def without_sampling(body: Json, model: str, thinks: bool) -> Json:
    """Without what is refused beside thinking, by newer models, and beside each other."""
    gone: set[str] = set()
    old = matches(model[:200], CLAUDE_SAMPLES)
    if thinks or (matches(model[:200], ("claude-*",)) and not old):
        gone = {"temperature", "top_p", "top_k"} & body.keys()
    elif body.get("temperature") is not None and body.get("top_p") is not None:
        gone = {"top_p"}
    return {name: value for name, value in body.items() if name not in gone} if gone else body


MARKED = {"tools": 2, "system": 1, "messages": 0}  # where marks are, in Claude's order -> who stays


def with_few_marks(body: Json) -> Json:
    """At most four cache marks, and none for an hour behind one for five minutes.

    The earliest in `messages` go first: the last ones and those before it serve the next turn.
    """
    marks = [(name, mark) for name in MARKED for mark in marks_in(body.get(name), DEEPEST)]
    surplus = len(marks) + isinstance(body.get("cache_control"), dict) - MOST_MARKS
    by_worth = sorted(range(len(marks)), key=lambda index: (MARKED[marks[index][0]], index))
    gone = set(by_worth[: max(0, surplus)])
    new: list[Json | None] = []
    short = False
    for index, (_, mark) in enumerate(marks):
        is_short = mark.get("ttl") != "1h"
        if index in gone:
            new.append(None)
        elif short and not is_short:
            new.append({name: value for name, value in mark.items() if name != "ttl"})
        else:
            short = short or is_short
            new.append(mark)
    if new == [mark for _, mark in marks]:
        return body
    left = iter(new)
    changed = {name: remarked(body[name], left, DEEPEST) for name in MARKED if name in body}
    return body | changed


def marks_in(blocks: Any, depth: int) -> Iterator[Json]:
    """The cache marks of blocks, and of the blocks in them."""
    if isinstance(blocks, list) and depth:
        for block in as_dicts(blocks):
            yield from marks_in(block.get("content"), depth - 1)
            if isinstance(block.get("cache_control"), dict):
                yield block["cache_control"]


def remarked(blocks: Any, new: Iterator[Json | None], depth: int) -> Any:
    """The blocks with these marks, in the order of marks_in."""
    if not isinstance(blocks, list) or not depth:
        return blocks
    made = []
    for block in blocks:
        changed = block
        if isinstance(block, dict):
            content = remarked(block.get("content"), new, depth - 1)
            if content is not block.get("content"):
                changed = {**changed, "content": content}
            if isinstance(block.get("cache_control"), dict):
                mark = next(new)
                changed = {k: v for k, v in changed.items() if k != "cache_control"}
                changed |= {"cache_control": mark} if mark else {}
        made.append(changed)
    return made


def with_betas(body: Json, headers: Headers, provider: Provider) -> Json:
    """One list in the header, without those that the row drops."""
    own = provider.headers.get("anthropic-beta", "")
    asked = [headers.get("anthropic-beta", ""), *as_list(body.get("betas")), own]
    kept = beta_list(",".join(map(str, asked))[:2000], provider.drop_betas)
    headers.popall("anthropic-beta", None)
    if kept:
        headers["anthropic-beta"] = kept
    if "betas" in body:
        body = {name: value for name, value in body.items() if name != "betas"}
    return body


@functools.lru_cache(256)
def beta_list(asked: str, drops: tuple[str, ...]) -> str:
    betas = dict.fromkeys(re.findall(r"[^\s,]+", asked))
    return ",".join(beta for beta in betas if not matches(beta[:200], drops))


def cleaned(blocks: list[Any], depth: int = DEEPEST) -> list[Any]:
    """Messages or blocks without what Claude refuses; the list itself where nothing had to go."""
    kept, same = [], True
    for block in blocks:
        clean = cleaned_block(block, depth) if isinstance(block, dict) else block
        same = same and clean is block
        if clean is not None or block is None:
            kept.append(clean)
    return blocks if same else kept


def is_blank(text: Any) -> bool:
    return isinstance(text, str) and not text.strip()


def cleaned_block(block: Json, depth: int) -> Json | None:
    """A message or block as Claude takes it; None when nothing of it is left."""
    kind = block.get("type")
    if kind == "text" and is_blank(block.get("text")):
        return None
    if "role" in block and is_blank(block.get("content")):
        return None
    if kind == "thinking" and not SIGNATURE.match(str(block.get("signature"))):
        return None
    if kind == "tool_use" and not block.keys() <= TOOL_USE_KEYS:
        block = {name: block[name] for name in block if name in TOOL_USE_KEYS}
    id_key = {"tool_use": "id", "tool_result": "tool_use_id"}.get(str(kind), "")
    given = block.get(id_key)
    if isinstance(given, str) and not TOOL_ID.fullmatch(given):
        block = {**block, id_key: re.sub(r"[^a-zA-Z0-9_-]", "_", given)}
    content = block.get("content")
    if isinstance(content, list) and content and depth:
        clean = cleaned(content, depth - 1)
        if not clean and "role" in block:
            return None
        if clean is not content:
            block = {**block, "content": clean}
    return block


def with_identity(system: Any) -> list[Any]:
    """The sentence that a plan's login wants first, unless it is there (providers.md 1.2)."""
    blocks = system if isinstance(system, list) else [{"type": "text", "text": system or ""}]
    blocks = cleaned(blocks)
    start = "\n".join(str(block.get("text")) for block in as_dicts(blocks[:2]))
    billing = "x-anthropic-billing-header"  # Claude Code's own first line
    if start.startswith(billing):
        start = start.partition("\n")[2].lstrip("\n")
    if start.startswith(IDENTITY):
        return blocks
    return [{"type": "text", "text": IDENTITY}, *blocks]


def codex_rules(body: Json, headers: Headers, provider: Provider) -> Json:
    if body.get("previous_response_id"):
        raise fault(400, "previous_response_id: no answer is kept here, send the whole input")
    kept = {}
    for name, value in body.items():
        wrong_tier = name == "service_tier" and value != "priority"
        if not wrong_tier and not matches(name[:100], provider.drops):
            kept[name] = value
    told, items = split_system(body.get("input"))
    told.insert(0, body.get("instructions"))
    words = "\n\n".join(text for text in told if text and isinstance(text, str))
    kept |= {
        "input": items,
        "instructions": words or "You are a helpful assistant.",
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
    }
    kept.setdefault("parallel_tool_calls", True)
    return kept


def split_system(given: Any) -> tuple[list[Any], list[Any]]:
    """The texts of system items, which are instructions here, and the other items of an input."""
    if not isinstance(given, list):
        part = {"type": "input_text", "text": str(given or "")}
        return [], [{"role": "user", "content": [part]}]
    told: list[Any] = []
    items: list[Any] = []
    for item in given:
        if not isinstance(item, dict):
            items.append(item)
        elif item.get("role") == "system":
            content = item.get("content")
            parts = content if isinstance(content, list) else [{"text": content}]
            told += [part.get("text") for part in as_dicts(parts)]
        elif is_readable(item):
            items.append(readable(item))
    return told, items


def is_readable(item: Json) -> bool:
    """Whether the backend, which keeps nothing, can make sense of an item of another answer."""
    if item.get("type") == "reasoning":
        return str(item.get("encrypted_content")).startswith("gAAAA")
    return item.get("type") != "item_reference"


def readable(item: Json) -> Json:
    """Without its id, which nobody keeps there, and with a call_id of at most 64 characters."""
    if "id" in item:
        item = {name: value for name, value in item.items() if name != "id"}
    call_id = str(item.get("call_id") or "")
    if len(call_id) > 64:
        digest = hashlib.sha256(call_id.encode(errors="replace")).hexdigest()[:16]
        item = {**item, "call_id": f"{call_id[:47]}_{digest}"}
    return item


def without_reasoning(body: Json) -> Json:
    """For a login that cannot decrypt what another one encrypted."""
    items = as_list(body.get("input"))
    kept = [item for item in items if not (isinstance(item, dict) and "summary" in item)]
    return {**body, "input": kept} if len(kept) < len(items) else body


RULES: dict[str, Callable[[Json, Headers, Provider], Json]] = {
    "claude": claude_rules,
    "claude-api-key": claude_key_rules,
    "codex": codex_rules,
}


# == Who asks, and what ============================================================================
#
# A request before its body is read: may it be served (design.md, "Security"), and is it a model
# call?  Then the call itself: what is known of it, its thread (the session that a header or the
# body names), and what comes to be known on its way.

BROWSER_PATHS = re.compile(r"/(auth|threads|docs|settings)(/|$)")
KEY_HEADERS = ("authorization", "x-api-key", "x-goog-api-key")
KEY_PARAMETERS = ("key", "auth_token")
KEPT_PARAMETERS = (  # that reach no provider: credentials, and what is asked for anew
    *KEY_PARAMETERS,
    *("access_token", "oauth_token", "api_key", "alt", "$alt"),
)
MODEL_PATH = re.compile(
    r"(?P<amp>/api/provider/[^/]+)?"
    r"(?:/v1(?:beta1?(?:/publishers/google)?)?){0,3}"
    r"/(?P<end>messages(/count_tokens)?|chat/completions|responses(/compact)?"
    r"|models/(?P<model>[^/:]+):(?P<verb>\w+))"
)
DIALECTS = {  # by the first word of a path's end
    "messages": ANTHROPIC,
    "chat": CHAT_COMPLETIONS,
    "responses": RESPONSES,
    "models": GEMINI,
}
SESSION_HEADERS = (  # that name the thread (clients.md); the first one counts
    "x-amp-thread-id",
    "x-claude-code-session-id",
    "session-id",
    "session_id",
    "thread-id",
    "x-session-id",
    "x-session-affinity",
)


class Request(web.BaseRequest):
    """As aiohttp's server makes them; its limit of a body is not used, read_body has its own."""


def bare(value: str) -> str:
    """A key without the word in front of it."""
    return re.sub(r"(?i)^bearer\s{1,9}", "", value.strip())


@functools.lru_cache(1024)
def refuse_strangers(
    host: str, origin: str, site: str, browses: bool, bound: str, keyed: bool
) -> str:
    """Why a request may not be served, by what a browser says of it; "" if it may.

    `bound`: the address that is listened on; `browses`: it only follows a link to ampcode.com.
    """
    name = re.sub(r":\d+$", "", host).strip("[]")
    if not keyed and not is_loopback(name) and name != bound.lower():
        return f"Host {host[:100]!r} is not an address of this proxy"
    foreign = re.match("https?://|null", origin) and origin.partition("://")[2] != host
    other_site = site in ("cross-site", "same-site") and not origin.startswith("vscode-webview://")
    if (foreign or other_site) and not browses:
        return "requests on behalf of another web site are refused"
    return ""


def check_origin(request: Request, config: Json, browser_path: bool) -> None:
    """ProxyError 403 for what a web page may have sent, and for names that are not ours."""
    headers = request.headers
    host, origin = headers.get("Host", "").lower(), headers.get("Origin", "").lower()
    browses = browser_path and headers.get("Sec-Fetch-Mode") == "navigate"
    site = headers.get("Sec-Fetch-Site", "")
    keyed = bool(config["api-keys"])
    told = (host[:300], origin[:300], site[:20])
    reason = refuse_strangers(*told, browses, config["host"], keyed)
    if reason:
        raise fault(403, reason)


HANDSHAKE_KEY = re.compile(r"[A-Za-z0-9+/]{22}==")  # 16 bytes in base64 (RFC 6455, 4.1)


def asks_for_socket(request: Request) -> bool:
    """ProxyError 400 for a handshake that is none; a request with a body asks for no socket."""
    headers = request.headers
    words = [word.strip().lower() for word in headers.get("Connection", "").split(",")]
    asked = headers.get("Upgrade", "").strip().lower() == "websocket" and "upgrade" in words
    if not asked or request.method != "GET" or request.body_exists:
        return False
    version, key = headers.get("Sec-WebSocket-Version", ""), headers.get("Sec-WebSocket-Key", "")
    if version not in ("13", "8", "7") or not HANDSHAKE_KEY.fullmatch(key):
        raise fault(400, "this is no WebSocket handshake")
    return True


def client_key(request: Request, keys: list[str]) -> str:
    """The one of our keys that a client shows; ProxyError 401 where one is needed."""
    if not keys:
        return ""
    given = [request.headers.get(name) for name in KEY_HEADERS]
    given += [request.query.get(name) for name in KEY_PARAMETERS]
    shown = [bare(value) for value in given if value and value.strip()]
    right = [key for key in keys for value in shown if equal(key, value)]
    if not right:
        raise fault(401, "Invalid API key" if shown else "Missing API key")
    return right[0]


def target_without_keys(raw_path: str, keys: list[str]) -> str:
    """Path and query as they came, but for the parameters that carried one of our keys."""
    path, mark, query = raw_path.partition("?")
    if not query or not keys:
        return raw_path
    kept = []
    for pair in query.split("&"):
        name, _, value = pair.partition("=")
        carries = unquote_plus(name) in KEY_PARAMETERS and bare(unquote_plus(value)) in keys
        if not carries:
            kept.append(pair)
    return path + (mark + "&".join(kept) if kept else "")


def query_for_provider(query: str) -> str:
    """What a client asked for in the query, without credentials, and the form of the answer."""
    pairs = query.split("&")
    kept = [pair for pair in pairs if unquote_plus(pair.partition("=")[0]) not in KEPT_PARAMETERS]
    return "&".join(pair for pair in kept if pair)


class Call:
    """One model call: what the client asks, and what comes of it."""

    def __init__(self, request: Request, found: re.Match[str]) -> None:
        first, _, last = found["end"].partition("/")
        self.request = request
        self.dialect = DIALECTS[first]
        self.amp = bool(found["amp"])  # a path of Amp's: ampcode.com could answer, too
        self.verb = found["verb"] or last or first  # a key of a provider's paths
        self.model = unquote(found["model"] or "")  # the name that the client gave
        self.wanted = self.effort = ""  # the same without its suffix, and the suffix
        self.thread = ""
        self.raw: bytes | bytearray = b""
        self.body = Json()
        self.streams = self.verb == "streamGenerateContent"
        # Google's way to stream without alt=sse: one JSON list.
        self.lists = self.streams and "sse" not in request.query.getall("alt", ())
        self.was_read = False
        # Who answers, as far as that is known; for the log, the status and the answer's headers.
        self.route, self.provider, self.account, self.served_model = "none", "", "", ""
        self.trouble = ""
        self.tokens = {"input_tokens": 0, "output_tokens": 0}

    async def read(self) -> None:
        """ProxyError 400 and 413 for a body that is none."""
        self.raw = await read_body(self.request)
        self.was_read = True
        if has_too_many_values(self.raw):
            raise fault(400, "The request body holds more than a million values")
        try:
            self.body = parse_object(self.raw)
        except ValueError as error:
            words = "no JSON" if isinstance(error, UnicodeError) else explain(error)
            raise fault(400, f"The request body cannot be read: {words}") from None
        model = self.model or self.body.get("model")
        if not isinstance(model, str) or not model:
            raise fault(400, "The request names no model")
        self.model = model
        self.thread = self.find_thread()
        self.streams = self.streams or bool(self.body.get("stream"))

    def find_thread(self) -> str:
        headers = self.request.headers
        for name in SESSION_HEADERS:
            if name in headers:
                return headers[name][:1000]
        user = as_dict(self.body.get("metadata")).get("user_id")
        for value in (user, self.body.get("prompt_cache_key")):
            if value and isinstance(value, str):
                return value[:1000]
        return ""

    def let_go(self) -> None:
        """An answer has begun: nobody else will be asked, and the prompt's memory is free."""
        self.raw, self.body = b"", {}

    def count(self, read: float, written: float) -> None:
        """Tokens.  Figures may come more than once and grow: the largest is right."""
        if self.verb != "count_tokens":
            tokens = self.tokens
            tokens["input_tokens"] = max(tokens["input_tokens"], int(read))
            tokens["output_tokens"] = max(tokens["output_tokens"], int(written))

    def marks(self) -> dict[str, str]:
        """The headers that say who answers."""
        told = {"route": self.route, "provider": self.provider, "model": self.served_model}
        return {f"x-ampproxy-{k}": header_value(v[:200]) for k, v in told.items() if v}


@functools.lru_cache(1024)
def header_value(text: str) -> str:
    return re.sub(r"[^ -~]", "?", text)


async def read_body(request: Request) -> bytes | bytearray:
    """The whole body.  A large one is put where it will stay as it comes in."""
    length = request.content_length or 0
    large = bytearray(length) if LARGE < length <= BODY_LIMIT else None
    pieces, size = [], 0
    try:
        async with asyncio.timeout(UPLOAD_WAIT):
            while data := await request.content.readany():
                if large is None:
                    pieces.append(data)
                else:
                    large[size : size + len(data)] = data
                size += len(data)
                if size > BODY_LIMIT:
                    raise fault(413, "The request body is larger than 64 MiB")
    except TimeoutError:
        raise fault(408, "The request body did not come within ten minutes") from None
    except (web.RequestPayloadError, *NET_ERRORS) as error:
        raise fault(400, f"The request body cannot be read: {net_words(error)}") from None
    return b"".join(pieces) if large is None else large


# == Who answers ===================================================================================
#
# The name of a model decides.  A suffix such as (high) is cut off first and becomes the effort.
# Who has the model here is asked, else the mappings name another; each is a way, tried in order.
#
# An effort is read from a body by effort_of and worded by with_effort, in the dialect of whoever
# answers, so that no model is asked to think in the words of another generation.

SUFFIX = re.compile(r"(.+)\(([\w-]*)\)|(gpt-(?!oss).+)-(low|medium|x?high)", re.I)
WAYS_KEPT = 1000  # names of models whose ways are remembered


def split_model(model: str) -> tuple[str, str]:
    """A model's name, and its suffix: a level, a budget, or "" for words that nobody knows."""
    return split_short(model) if len(model) < 300 else split_any(model)


def split_any(model: str) -> tuple[str, str]:
    found = SUFFIX.fullmatch(model)
    if not found:
        return model, ""
    name, word = found[1] or found[3], (found[2] or found[4] or "").lower()
    known = word in BUDGETS or word == "auto" or re.fullmatch("[0-9]{1,9}", word)
    return name, word if known else ""


split_short = functools.lru_cache(1024)(split_any)


def effort_of(body: Json, dialect: str) -> str:
    """What a body asks for: a level, a budget in digits, auto, none; "" where it says nothing."""
    match dialect:
        case "anthropic":
            asked = asked_of_claude(body)
        case "gemini":
            config = as_dict(as_dict(body.get("generationConfig")).get("thinkingConfig"))
            budget = config.get("thinkingBudget")
            asked = budget if type(budget) is int else config.get("thinkingLevel")
        case _:
            reasoning = as_dict(body.get("reasoning"))  # in Chat it is OpenRouter's
            asked = reasoning.get("effort") or reasoning.get("max_tokens")
            if dialect == "chat":
                asked = body.get("reasoning_effort") or asked
    if type(asked) is int and asked <= 0:
        return "auto" if asked else "none"
    if type(asked) is int:
        return str(asked)
    word = asked.lower() if isinstance(asked, str) else ""
    return word if word in BUDGETS or word == "auto" else ""


def asked_of_claude(body: Json) -> Any:
    thinking, output = as_dict(body.get("thinking")), as_dict(body.get("output_config"))
    match thinking.get("type"):
        case "disabled":
            return "none"
        case "enabled":
            return thinking.get("budget_tokens")
        case "adaptive" | "auto":
            return output.get("effort") or "auto"
    return output.get("effort")


# Where a body says how to think: dialect -> a field that goes whole, or the parts of it that go.
EFFORT_WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "anthropic": {"thinking": (), "output_config": ("effort",)},
    "chat": {"reasoning_effort": (), "reasoning": ("effort", "max_tokens")},
    "responses": {"reasoning": ("effort",)},
    "gemini": {"generationConfig": ("thinkingConfig",)},
}


def without_effort(body: Json, dialect: str) -> Json:
    """A body that says nothing about how much to think."""
    body = dict(body)
    for name, parts in EFFORT_WORDS[dialect].items():
        inside = as_dict(body.get(name))
        if not parts:
            body.pop(name, None)
        elif inside.keys() & set(parts):
            body[name] = {key: value for key, value in inside.items() if key not in parts}
    return body


def with_effort(body: Json, dialect: str, table: dict[str, str], effort: str, model: str) -> Json:
    """A body in the dialect of who answers, with this effort as near as the model goes to it.

    `effort` is as effort_of gives it, and beats what the body says; "" leaves it; for `table` see
    THINKING.
    """
    if not effort:
        return body
    takes = thinking_of(table, model)
    before, body = body, without_effort(body, dialect)
    if not takes.levels and not takes.limits:
        return body  # it does not think
    auto = effort == "auto"
    asked = BUDGETS["medium" if auto else effort] if auto or effort in BUDGETS else int(effort)
    tokens = asked
    if takes.limits:
        tokens = max(takes.limits[0], min(asked, takes.limits[1]))
    levels = takes.levels or thinking_of({"*": table.get("*", "")}, "").levels or [*BUDGETS]
    level = next((word for word in levels if BUDGETS[word] >= asked), levels[-1])
    match dialect:
        case "chat":
            return body if auto else {**body, "reasoning_effort": level}
        case "responses":
            reasoning = as_dict(body.get("reasoning")) | ({} if auto else {"effort": level})
            return {**body, "reasoning": reasoning} if reasoning else body
        case "gemini":
            how: Json = {"thinkingBudget": -1 if auto else tokens}
            if not takes.limits:
                how = {} if auto else {"thinkingLevel": level}
            thinking = {"thinkingConfig": {"includeThoughts": asked > 0, **how}}
            return {**body, "generationConfig": as_dict(body.get("generationConfig")) | thinking}
    if not asked or forces_tool(body):
        return without_thought(body, takes)
    if takes.limits:
        return with_budget(body, tokens)
    return with_level(body, "" if auto else level, as_dict(before.get("thinking")))


def with_level(body: Json, level: str, given: Json) -> Json:
    """Claude's newer way; `given`: what the body said of thinking, which may say what to show."""
    shown = {name: value for name, value in given.items() if name == "display"}
    body = {**body, "thinking": {"type": "adaptive", **shown}}
    if level:
        body["output_config"] = {**as_dict(body.get("output_config")), "effort": level}
    return body


def with_budget(body: Json, tokens: int) -> Json:
    """Claude's budget is a part of max_tokens: there must be room for the answer."""
    most = max(int(number(body.get("max_tokens"))), tokens + 4096)
    return {**body, "thinking": {"type": "enabled", "budget_tokens": tokens}, "max_tokens": most}


def with_sampling(body: Json, dialect: str, model: str) -> Json:
    """A mapped body without the sampling values and limits of another generation of models.

    What Claude refuses of them is the same for every body: see as_claude_takes_it.
    """
    if dialect == "anthropic":
        most, given = most_tokens(model), body.get("max_tokens")
        return {**body, "max_tokens": most} if type(given) is int and given > most else body
    if dialect == "gemini" or not matches(model[:200], OPENAI_THINKS) or "-chat" in model:
        return body
    gone = {"temperature", "top_p", "presence_penalty", "frequency_penalty"} & body.keys()
    if gone:
        body = {name: value for name, value in body.items() if name not in gone}
    if dialect == "chat" and "max_tokens" in body:
        given = body["max_tokens"]
        body = {name: value for name, value in body.items() if name != "max_tokens"}
        body.setdefault("max_completion_tokens", given)
    return body


@dataclass(frozen=True)
class Way:
    route: str  # local or mapped
    model: str
    effort: str
    rows: list[Row]


class Chooser:
    """Who could answer what, by the configuration and the accounts that there are."""

    def __init__(self, live: Live, pool: Pool) -> None:
        self.live, self.pool = live, pool
        self.kept: dict[tuple[str, str, str], tuple[list[Way], list[str]]] = {}
        self.kept_for = (0, 0)

    def split(self, model: str) -> tuple[str, str]:
        """A model's name and its suffix; a name that the configuration writes has none."""
        if any(model.lower() in row.provider.written for row in self.live.rows):
            return model, ""
        return split_model(model)

    def ways(self, model: str, effort: str, verb: str) -> tuple[list[Way], list[str]]:
        """The ways in the order to try, and what was found while looking for them."""
        version = (self.live.version, self.pool.version)
        if version != self.kept_for or len(self.kept) >= WAYS_KEPT:
            self.kept, self.kept_for = {}, version
        key = (model, effort, verb)
        if len(model) > 200:
            return self.find_ways(*key)
        if key not in self.kept:
            self.kept[key] = self.find_ways(*key)
        return self.kept[key]

    def find_ways(self, model: str, effort: str, verb: str) -> tuple[list[Way], list[str]]:
        mapped = [("mapped", *target) for target in self.targets(model, effort)]
        own = [("local", model, effort)]
        forced = self.live.config["ampcode"]["force-model-mappings"]
        ways, notes = [], []
        for route, name, level in mapped + own if forced else own + mapped:
            rows = []
            for row in self.live.rows:
                lack = self.lacks(row, name, verb)
                notes.append(f"{row.name} {lack or 'serves'} {name[:100]}")
                if not lack:
                    rows.append(row)
            if rows:
                ways.append(Way(route, name, level, rows))
        if not forced:  # who has the model itself needs no mapping
            ways = [way for way in ways if way.route == ways[0].route]
        return ways, notes

    def targets(self, model: str, effort: str) -> list[tuple[str, str]]:
        """What the mappings name instead, with the effort: exact rules first, then patterns."""
        rules = self.live.config["ampcode"]["model-mappings"]
        fits = []
        for rule in sorted(rules, key=lambda rule: rule["regex"]):
            exact = split_model(rule["from"])[0].lower() == model.lower()
            if exact or (rule["regex"] and re.search(rule["from"], model[:200], re.I)):
                fits.append(rule)
        pairs = [self.split(target) for rule in fits for target in rule["to"]]
        return [(name, level or effort) for name, level in pairs]

    def lacks(self, row: Row, model: str, verb: str) -> str:
        """Why a row does not serve a model; "" if it does.  verb "": in any dialect."""
        provider, name = row.provider, model[:300]
        served = matches(name, tuple(provider.names))
        if not served or matches(name, provider.excluded_models):
            return "does not have"
        if verb and verb not in provider.paths:
            return "in another dialect could serve"
        if not self.pool.of([row]):
            return f"after `ampproxy.py login {row.name}` would serve"
        return ""

    def listed(self, verb: str = "") -> dict[str, str]:
        """The names that the present accounts serve, and who does; patterns are no names."""
        pairs = []
        for row in self.live.rows:
            pairs += [(name, name) for name in row.provider.names if not set(name) & set("*?[")]
        for rule in self.live.config["ampcode"]["model-mappings"]:
            if not rule["regex"]:
                pairs += [(rule["from"], self.split(target)[0]) for target in rule["to"]]
        found: dict[str, str] = {}
        for name, model in pairs:
            for row in reversed(self.live.rows):  # the first that serves it has the last word
                if not self.lacks(row, model, verb):
                    found[name] = row.name
        return found


# -- Lists of models, in the shapes of the dialects --

LISTING = re.compile(r"(/api/provider/[^/]+)?(/v1(beta1?)?){0,3}/models")


def models_for_gemini(owners: dict[str, str]) -> Json:
    methods = [*GEMINI_METHODS]
    rows = [
        {"name": f"models/{name}", "displayName": name, "supportedGenerationMethods": methods}
        for name in owners
    ]
    return {"models": rows}


def models_for_others(owners: dict[str, str]) -> Json:
    """Anthropic's and OpenAI's clients find their keys in one list."""
    rows = [
        {
            "id": name,
            "type": "model",
            "object": "model",
            "display_name": name,
            "owned_by": owner,
            "created": 0,
            "created_at": rfc3339(0),
        }
        for name, owner in owners.items()
    ]
    ends = {"first_id": min(owners, default=None), "last_id": max(owners, default=None)}
    return {"object": "list", "data": rows, "has_more": False, **ends}


def model_list(request: Request, chooser: Chooser) -> Json:
    owners = dict(sorted(chooser.listed().items()))
    if "x-goog-api-key" in request.headers or re.search("/v1beta|/google/", request.path):
        return models_for_gemini(owners)
    return models_for_others(owners)


# == Answers on their way ==========================================================================
#
# An answer is an async iterator of bytes that are ready for the client, made of small generators:
# pieces from the upstream, runs of whole events, events looked at and put right.  Its first item
# proves success.  Until then an error is the next account's chance; afterwards it ends the stream.
#
# A Delivery is the client's end of it.  It has one timer, however many pieces come: a comment goes
# out when nothing did for a while, and what stands still for too long is broken off.

TOLD_AFTER = {  # events that say nothing yet: the answer may still become an error
    "ping",
    "response.created",
    "response.in_progress",
    "response.queued",
    "codex.rate_limits",
}
LONG_RUN, LAST_PART = 16384, 2048  # bytes; see Dialect.short_ends
SETTLE_WAIT = 3  # seconds for usage, and the end, behind the reason why an answer ends
LOOK_EVERY = 15  # seconds between looks whether a connection died silently; not for comments


LIST_MARK = b",\r\n"  # before each element of a list but the first


def listed(run: bytes) -> bytes:
    """Events as elements of a list that has begun."""
    elements = [event_data(event) for event in split_events(run)]
    return b"".join(LIST_MARK + element for element in elements if element)


class StreamResponse(web.StreamResponse):
    """Its head goes out together with the first bytes, in aiohttp from 3.13 on."""

    _send_headers_immediately = False


class Delivery:
    """What the client of one call gets: one head, then pieces."""

    def __init__(self, call: Call, keepalive: float, idle: float) -> None:
        self.call, self.request = call, call.request
        self.response: web.StreamResponse | None = None
        self.problem: Problem | None = None  # what broke the answer off after that
        self.keepalive = keepalive if call.streams and call.dialect.comment else 0
        self.idle = idle
        self.upstream: Upstream | None = None  # that is being read
        self.writing = False
        self.loop = asyncio.get_running_loop()
        self.moved = self.loop.time()  # when the last piece came or went
        self.sent = self.moved  # when the last piece or comment went
        self.comments: set[asyncio.Task[None]] = set()
        self.timer = self.look_again()

    def __enter__(self) -> Delivery:
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        self.upstream = None
        for task in self.comments:
            task.cancel()

    # -- The timer --

    def look_again(self) -> asyncio.TimerHandle:
        """When the next comment is due, or the end; then it turns out whether it still is."""
        now = self.loop.time()
        due = now + LOOK_EVERY
        if self.keepalive:
            due = min(due, self.sent + self.keepalive)
        if self.idle and (self.upstream or self.writing):
            due = min(due, self.moved + self.idle)
        return self.loop.call_at(max(due, now + 0.01), self.look)

    def look(self) -> None:
        """A comment, the end of what stands still, or nothing."""
        now = self.loop.time()
        silent = now - self.moved
        stands_still = self.idle and silent >= self.idle
        is_over = self.upstream and not self.writing and is_dead(self.upstream)
        if stands_still or is_over:
            self.break_off()
        elif self.keepalive and now - self.sent >= self.keepalive:
            self.sent = now
            if not self.writing:
                task = self.loop.create_task(self.write_comment())
                self.comments.add(task)
                task.add_done_callback(self.comments.discard)
        self.timer = self.look_again()

    def watch(self, upstream: Upstream) -> None:
        """From now on its silence counts."""
        self.upstream, self.moved = upstream, self.loop.time()
        self.timer.cancel()
        self.timer = self.look_again()

    def settle(self) -> None:
        """All has been said: what still comes may take a moment, not the whole idle time."""
        self.idle = min(self.idle or SETTLE_WAIT, SETTLE_WAIT)
        self.timer.cancel()
        self.timer = self.look_again()

    def break_off(self) -> None:
        """Wake up who waits: for the client's socket, or for the upstream's next bytes."""
        if self.writing:
            if self.request.transport:
                self.request.transport.abort()
        elif self.upstream:
            self.upstream.content.set_exception(TimeoutError())

    async def write_comment(self) -> None:
        with suppress(ConnectionError, RuntimeError):  # the client has left, or all has been said
            headers = Headers({"Content-Type": "text/event-stream", **self.call.marks()})
            response = await self.start(200, None, headers)
            await response.write(self.call.dialect.comment)

    # -- What the client gets --

    async def start(self, status: int, reason: str | None, headers: Headers) -> web.StreamResponse:
        """The response; its head is that of the first call, whatever the later ones say."""
        if self.response is None:
            self.response = StreamResponse(status=status, reason=reason, headers=headers)
            await self.response.prepare(self.request)  # which waits for nothing
        return self.response

    async def stream(
        self, upstream: Upstream, headers: Headers, first: bytes, rest: AsyncIterator[bytes]
    ) -> web.StreamResponse:
        """The whole stream.  What breaks it off is told to the client, and kept as `problem`."""
        response = self.response
        if response is None:
            response = await self.start(upstream.status, upstream.reason, headers)
        if first:
            await self.write(response, first)
        try:
            async for data in rest:  # as in `write`, for each event
                self.writing = True
                await response.write(data)
                self.writing = False
                self.moved = self.sent = self.loop.time()
        except ProxyError as error:
            self.problem = error.problem
        if self.problem:
            await self.end(response, self.problem)
        return response

    async def write(self, response: web.StreamResponse, data: bytes) -> None:
        self.writing = True
        await response.write(data)
        self.writing = False
        self.moved = self.sent = self.loop.time()

    async def end(self, response: web.StreamResponse, problem: Problem) -> None:
        """Of a stream that broke off, as its dialect says it."""
        dialect = self.call.dialect
        body = parse_object(problem.body) if problem.body else {}
        body = body or dialect.error(problem.status, problem.text or problem.message)
        frame = (
            LIST_MARK + write_json(body) + b"]" if self.call.lists else dialect.error_event(body)
        )
        await self.write(response, frame)
        if dialect.cuts_errors and self.request.transport:
            self.request.transport.abort()


def is_dead(upstream: Upstream) -> bool:
    """aiohttp tells nobody who waits for bytes that it closed a connection after a bad chunk."""
    connection = upstream.connection
    transport = connection.transport if connection else None
    return connection is not None and (transport is None or transport.is_closing())


class Pieces:
    """What arrives from an upstream, as it arrives, unpacked; ProxyError 502 when that breaks off.

    Some pack with gzip and do not say so, or say so and do not: its first bytes decide.
    """

    def __init__(self, upstream: Upstream, delivery: Delivery) -> None:
        self.content, self.delivery = upstream.content, delivery
        self.unread = b""  # was looked at, and comes once more
        self.coding = upstream.headers.get("Content-Encoding", "").strip().lower()
        self.unknown = unknown_coding(upstream)
        self.unpacker = Unpacker("deflate") if self.coding == "deflate" else None
        self.began = False
        self.packed: list[bytes] | None = None  # as it came, while that is kept
        if self.coding in CODINGS:
            self.packed = []
        delivery.watch(upstream)

    def __aiter__(self) -> Pieces:
        return self

    async def __anext__(self) -> bytes:
        if self.unread:
            data, self.unread = self.unread, b""
            return data
        try:
            data = await self.next_unpacked() if self.unpacker else await self.next_piece()
        except (RuntimeError, *NET_ERRORS) as error:
            raise fault(502, f"the upstream broke off: {net_words(error)}") from None
        if not data:
            raise StopAsyncIteration
        return data

    async def next_piece(self) -> bytes:
        """b"" at the end."""
        if self.unknown:
            raise fault(502, f"the upstream packed its answer as {self.unknown}")
        data = await self.content.readany()
        if not self.began:
            while data == GZIP[:1] and (more := await self.content.readany()):
                data += more
            self.began = True
            if data.startswith(GZIP):
                self.unpacker = Unpacker("gzip")
                self.take(data)
                return await self.next_unpacked()
        self.delivery.moved = self.delivery.loop.time()
        return data

    async def next_unpacked(self) -> bytes:
        assert self.unpacker
        while True:
            if self.unpacker.left and (plain := self.unpacker.take(b"")):
                return plain
            if self.unpacker.left:
                continue
            data = await self.content.readany()
            if not data:
                if self.unpacker.stream and not self.unpacker.is_whole:
                    raise aiohttp.ClientPayloadError
                return b""
            self.take(data)

    def take(self, packed: bytes) -> None:
        assert self.unpacker
        self.delivery.moved = self.delivery.loop.time()
        self.unpacker.left = packed
        if self.packed is not None:
            self.packed.append(packed)


@dataclass
class Answer:
    """Of an upstream, in the client's own dialect, once its first event or its whole is good."""

    events: bool  # a stream of them; else `first` is all there is
    first: bytes
    rest: AsyncIterator[bytes]


BLANK = b"\xef\xbb\xbf \t\r\n"  # what may stand before the first letter
NO_EVENTS = (b"{", b"[", b"<", b'"')  # JSON, or a page; a stream begins with a field or a colon


async def begin_answer(
    call: Call, pieces: Pieces, folds: bool, settle: Callable[[], None]
) -> Answer:
    """Read until success is certain; ProxyError otherwise.

    What is a stream is seen from its first bytes: labels are wrong too often.  `folds`: the backend
    only streams, and the client asked for one piece.  `settle` is called when the end may come.
    """
    first = b""
    async for data in pieces:
        first += data
        if first.lstrip(BLANK) or len(first) > LONG_RUN:
            break
    pieces.unread = first
    if first.lstrip(BLANK)[:1] in (b"", *NO_EVENTS):
        return Answer(False, await whole_answer(call, pieces), pieces)
    events = checked_events(call, whole_events(pieces), settle)
    if folds:
        return Answer(False, await folded(call, events), pieces)
    return Answer(True, await anext(events), events)


# -- In one piece --


async def whole_answer(call: Call, pieces: AsyncIterator[bytes]) -> bytes:
    """An answer in one piece, with the model's name that the client gave."""
    kept, size = [], 0
    async for data in pieces:
        kept.append(data)
        size += len(data)
        if size > BODY_LIMIT:
            raise fault(413, f"{call.provider} sent no whole answer within 64 MiB")
    raw = b"".join(kept)
    try:
        answer = parse_object(raw)
    except ValueError:
        raise no_whole_answer(call) from None
    inside = holder(answer)
    if has_error(answer, inside):
        raise ProxyError(failure(call, answer))
    call.count(*call.dialect.usage(inside))
    return renamed(raw, answer, inside, call) or raw


async def folded(call: Call, events: AsyncIterator[bytes]) -> bytes:
    """The answer that a stream of Responses tells in its last event."""
    last = b""
    async for run in events:
        last = split_events(run)[-1]
    event = parse_object(event_data(last))
    inside = holder(event)
    if has_error(event, inside):
        raise ProxyError(failure(call, event))
    return write_json(inside)


def no_whole_answer(call: Call) -> ProxyError:
    return fault(502, f"{call.provider} sent no whole answer")


def renamed(raw: bytes, answer: Json, inside: Json, call: Call) -> bytes | None:
    """JSON with the name that the client gave; None where it says no other.

    `inside`: the part of `answer` that names the model.  Byte for byte the same otherwise, if no
    other place, such as a tool's input, has that name.
    """
    key = call.dialect.model_key
    served = inside.get(key)
    if not isinstance(served, str) or served == call.model:
        return None
    given, asked = write_json(served), write_json(call.model)
    if raw.count(given) == 1:
        return raw.replace(given, asked)
    inside[key] = call.model
    return write_json(answer)


# -- In events --


class Items:
    """The output items of a Responses answer by their index, and how much is kept in all."""

    def __init__(self) -> None:
        self.found: dict[int, Any] = {}
        self.size = 0

    def grow(self, call: Call, size: int) -> None:
        self.size += size
        if self.size > BODY_LIMIT:
            raise fault(413, f"{call.provider} sent no whole answer within 64 MiB")


class Looked(NamedTuple):
    """An event that was read."""

    raw: bytes  # as the client gets it
    ending: str = ""  # see Dialect.ending
    tells: bool = False  # it proves success
    renames: bool = False  # the provider has another name for the model


async def checked_events(
    call: Call, runs: AsyncIterator[bytes], settle: Callable[[], None], told: bool = False
) -> AsyncIterator[bytes]:
    """Runs of events, ready for the client; the first one has an event that proves success.

    Ends with the dialect's last event, whatever is behind it; ProxyError when that does not come.
    `told`: whatever comes, the client gets.
    """
    marks = call.dialect.marks
    items = Items()
    held: list[bytes] = []
    ending = ""
    short_ends = False  # the first run begins with what names the model and counts the input
    try:
        async for run in runs:
            if told and not is_notable(run, marks, short_ends):
                yield run
                continue
            short_ends = call.dialect.short_ends
            for raw in split_events(run):
                looked = Looked(raw)
                if not told or is_notable(raw, marks, False):
                    looked = look_at(call, raw, items, told)
                held.append(looked.raw)
                told, ending = told or looked.tells, looked.ending or ending
                if looked.renames:
                    marks = call.dialect.marks + call.dialect.model_marks
                if ending == "over":
                    break
            if told:
                yield b"".join(held)
                held = []
            if ending == "over":
                break
            if ending:
                settle()
    except ProxyError:
        if told and held:
            yield b"".join(held)
        if not ending:
            raise
    if not told:
        raise no_whole_answer(call)
    if not ending:
        raise fault(502, "the stream stopped before its end")


def is_notable(run: bytes, marks: tuple[bytes, ...], short_ends: bool) -> bool:
    """Whether one of the marks is in a run; a long one is not searched for what comes last."""
    part = run[-LAST_PART:] if short_ends and len(run) > LONG_RUN else run
    for mark in marks:  # noqa: SIM110 - this runs for every event, and any() takes twice as long
        if mark in part:
            return True
    return False


def look_at(call: Call, raw: bytes, items: Items, late: bool) -> Looked:
    """One event.  ProxyError for garbage or an error before the client has got anything."""
    data = event_data(raw).strip()
    if not late:
        items.grow(call, len(raw))
    if data == b"[DONE]":
        return Looked(raw, "over")
    if not data:
        return Looked(raw)  # a comment
    try:
        event = parse_json(data)
    except ValueError:
        if event_end(raw) != len(raw):
            return Looked(b"")  # it was cut short
        if late:
            return Looked(raw)
        raise no_whole_answer(call) from None
    if not isinstance(event, dict):
        return Looked(raw)  # nobody knows what it means
    kind, inside = event.get("type"), holder(event)
    if has_error(event, inside):
        told_as_it_is = not call.dialect.cuts_errors and (
            kind == "response.failed" or call.dialect is not RESPONSES
        )
        if late and told_as_it_is:
            return Looked(raw, "over")
        raise ProxyError(failure(call, event))
    if b'"usage' in data:
        call.count(*call.dialect.usage(inside))
    ending = call.dialect.ending(event)
    if kind == "response.output_item.done":
        index = event.get("output_index", len(items.found))
        if type(index) is not int:
            raise no_whole_answer(call)
        items.found[index] = event.get("item")
        items.grow(call, len(raw))
    filled = ending == "over" and bool(items.found) and not inside.get("output")
    new = renamed(data, event, inside, call)
    if filled:  # ChatGPT's backend leaves it out of its last event
        inside["output"] = [item for _, item in sorted(items.found.items())]
        inside["model"] = call.model
        raw = with_data(raw, write_json(event))
    elif new:
        raw = with_data(raw, new)
    return Looked(raw, ending, kind not in TOLD_AFTER, new is not None)


# -- Errors --


def has_error(event: Json, inside: Json) -> bool:
    """Whether an event, or a whole answer, is an error; `inside`: what `holder` finds."""
    if event.get("type") == "error":
        return True
    error = inside.get("error") or event.get("error")
    return isinstance(error, dict) or (isinstance(error, str) and "choices" not in event)


DELAYS = ("resets_in_seconds", "retryDelay", "quotaResetDelay")  # OpenAI's, and Google's two


def asked_delay(error: Any, depth: int = 5) -> float:
    """The seconds that an error asks to wait, wherever it says so."""
    if isinstance(error, dict):
        for name in DELAYS:
            value = error.get(name)
            if isinstance(value, (str, int, float)):
                return duration(str(value)) if isinstance(value, str) else max(0, number(value))
        error = list(error.values())
    if isinstance(error, list) and depth:
        return max((asked_delay(inner, depth - 1) for inner in error[:50]), default=0)
    return 0


def failure(call: Call, answer: Json, status: int = 0) -> Problem:
    """A provider's error as a Problem; `status` 0: it stood in an answer, and its code decides."""
    told = holder(answer)
    parts = error_parts(told)
    words = [str(parts[name]) for name in ("code", "type", "status") if parts.get(name)]
    how = f"answered {status}" if status else "answered with an error:"
    message = f"{call.provider} {how} {error_text(told, 'type', 'status')}"
    if not status:
        status = next((STATUSES[word] for word in words if word in STATUSES), 502)
    status = status if 400 <= status <= 599 else 502
    text = error_text(told)
    return Problem(
        status,
        message.rstrip(": "),
        retry_after=asked_delay(parts),
        text=text,
        codes=frozenset(word.lower()[:100] for word in words),
        body=write_json(own_error(call.dialect, status, parts, text)) if answer else b"",
    )


def own_error(dialect: Dialect, status: int, parts: Json, text: str) -> Json:
    """A provider's message and codes in the client's dialect; ours where it names none."""
    message = parts.get("message")
    body = dialect.error(status, message if message and isinstance(message, str) else text)
    for name in body["error"].keys() - {"message"}:
        given = parts.get(name)
        if given and given != "error" and type(given) is type(body["error"][name]):
            body["error"][name] = given
    return body


REFUSAL_HEADERS = (
    "request-id",
    "content-type",
    "x-should-retry",
    "retry-after",
    "anthropic-*",
)


ERROR_LIMIT, ERROR_WAIT = 1 << 20, 10  # bytes and seconds of an error's body that are read


async def refusal(
    call: Call, upstream: Upstream, windows: list[Window], now: float, delivery: Delivery
) -> Problem:
    """What an answer with another status than 200 means."""
    raw, answer = b"", Json()
    with suppress(ProxyError, TimeoutError):
        async with asyncio.timeout(ERROR_WAIT):
            async for data in Pieces(upstream, delivery):
                raw += data
                if len(raw) > ERROR_LIMIT:
                    break
    raw = raw.strip()
    with suppress(ValueError):
        answer = parse_object(raw.removeprefix(b"[").removesuffix(b"]"))  # Google's may be a list
    problem = failure(call, answer, upstream.status)
    if coding := unknown_coding(upstream):
        problem.message += f" in words packed as {coding}"
    full = {window.name: window.resets_at - now for window in windows if window.full}
    problem.windows = frozenset(full)
    waits = [problem.retry_after, http_delay(upstream.headers.get("Retry-After", ""), now)]
    waits.append(number(error_parts(answer).get("resets_at")) - now)  # a time in the past is none
    if problem.status == 429:
        waits += full.values()
    problem.retry_after = max(waits)
    again = upstream.headers.get("x-should-retry") == "true" and not problem.retry_after
    if again and not any("ratelimit" in name.lower() for name in upstream.headers):
        problem.codes |= {RETRIABLE}
    if answer:
        for name, value in upstream.headers.items():
            if matches(name[:100], REFUSAL_HEADERS):
                problem.headers.add(name, value)
    if isinstance(answer.get("error"), dict):
        problem.body = raw.removeprefix(b"[").removesuffix(b"]")  # the provider's own words
    return problem


HOP_HEADERS = (  # RFC 9110, 7.6.1, what the HTTP library writes itself, and CORS
    "connection",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "host",
    "expect",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "access-control-*",
    "sec-websocket-*",
)


@functools.lru_cache(256)
def hop_names(connection: str) -> frozenset[str]:
    """The headers that a Connection header keeps from travelling on."""
    return frozenset(name.strip().lower() for name in connection.split(","))


@functools.lru_cache(1024)
def is_hop_header(name: str) -> bool:
    return matches(name, HOP_HEADERS)


def passing(headers: Any, *without: str) -> Headers:
    """Headers that travel on: not the hop's own, not those that Connection names, nor `without`."""
    kept = Headers()
    named = hop_names(",".join(headers.getall("Connection", ()))[:1000])
    for name, value in headers.items():
        lower = name.lower()
        if lower not in named and lower not in without and not is_hop_header(lower[:100]):
            kept.add(name, value)
    return kept


# == Forwarding ====================================================================================
#
# The story of one model call: its ways in order, on each way the accounts, on each account some
# tries.  A failure before the first event is a Problem that is returned, and says who is next; what
# has begun is finished where it began.

QUOTA_HEADER = re.compile(
    r"(?:anthropic-ratelimit-unified|x-codex)-(?P<window>(?!overage)\w+)-"
    r"(?P<field>status|utilization|used-percent|reset(?:-at)?)"
)
NOT_ASKED = {  # fields that a helper call must not have
    "count_tokens": ("max_tokens", "stream"),
    "compact": ("stream",),
}
# A 404 or 429 of these says nothing about the model or the account: Claude Code counts 35 times in
# a second, and backends do without them (clients.md).
HELPERS = ("count_tokens", "countTokens", "compact")
AMP_HINT = "ampcode.com may charge for it; to avoid that: fallback: never"
Pay = Callable[[Call, str, Delivery], Awaitable[web.StreamResponse]]  # Ampcode.pay
Outcome = web.StreamResponse | Problem  # what the client gets, or why it got nothing from here


@dataclass
class Prepared:
    """A call as one provider is asked: all but the account's own headers."""

    way: Way
    row: Row
    headers: Headers
    body: list[Any]  # in pieces of bytes
    url: str
    folds: bool  # it only streams, and the client wants one piece

    def data(self) -> Any:
        """What aiohttp sends; large pieces are not put together."""
        return self.body[0] if len(self.body) == 1 else in_pieces(self.body)


async def in_pieces(pieces: list[Any]) -> AsyncIterator[Any]:
    for piece in pieces:
        yield piece


class Forwarder:
    def __init__(self, live: Live, net: Net, pool: Pool, pay: Pay) -> None:
        self.live, self.net, self.pool, self.pay = live, net, pool, pay
        self.chooser = Chooser(live, pool)
        self.clock = pool.clock

    async def answer(self, call: Call, key: str, delivery: Delivery) -> web.StreamResponse:
        """By the first way that works, else from ampcode.com; ProxyError when nobody can."""
        call.wanted, call.effort = self.chooser.split(call.model)
        ways, notes = self.chooser.ways(call.wanted, call.effort, call.verb)
        problem: Problem | None = None
        deadline = self.clock.monotonic() + self.live.config["max-retry-interval"]
        for way in ways:
            call.route = way.route
            until = deadline if way is ways[-1] else 0
            outcome = await self.try_way(way, until, delivery)
            if not isinstance(outcome, Problem):
                return outcome
            problem = outcome
            if verdict(problem).then == "stop":
                raise ProxyError(problem)
        problem = problem or self.unserved(call, notes)
        allowed = ("always",) if ways else ("always", "unserved")
        if not call.amp or self.live.config["ampcode"]["fallback"] not in allowed:
            raise ProxyError(problem)
        call.route, call.provider, call.account = "amp", "ampcode", ""
        call.served_model = call.model
        call.trouble = f"{problem.message}; {AMP_HINT}{self.mapping_hint(call, ways)}"
        return await self.pay(call, key, delivery)

    def unserved(self, call: Call, notes: list[str]) -> Problem:
        near = "; ".join(note for note in notes if "does not have" not in note)
        message = f"no account here serves {call.model[:100]!r}: {near or 'map it'}"
        return Problem(404, message)

    def mapping_hint(self, call: Call, ways: list[Way]) -> str:
        """The mapping that would have kept the call here, if any account could serve one."""
        target = next(iter(self.chooser.listed(call.verb)), "") if not ways else ""
        if not target:
            return ""
        return f", model-mappings: [{{from: {call.wanted[:100]}, to: {target}}}]"

    async def try_way(self, way: Way, until: float, delivery: Delivery) -> Outcome:
        """Ask the accounts of a way, and wait until then for one to wake up."""
        call = delivery.call
        problem: Problem | None = None
        tried: set[Account] = set()
        prepared: Prepared | None = None
        call.provider, call.served_model = way.rows[0].name, way.model
        while True:
            account = await self.pool.choose(way.rows, way.model, call.thread, tried, until)
            if account is None or account.row is None:
                break
            if prepared is None or prepared.row is not account.row:
                prepared = prepare(call, way, account.row)
            outcome = await self.try_account(account, prepared, delivery)
            if not isinstance(outcome, Problem):
                return outcome
            problem = outcome
            then = verdict(problem).then
            if then == "stop":
                return problem
            rests = account.wait(way.model, self.clock.monotonic()) > 0
            if then != "wait" or not rests or self.clock.monotonic() >= until:
                tried.add(account)
        accounts = self.pool.of(way.rows)
        at_rest = any(account.resting(way.model) for account in accounts)
        if problem and (len(accounts) <= 1 or not at_rest):
            return problem
        return self.pool.nobody(way.rows, way.model, problem)

    async def try_account(
        self, account: Account, prepared: Prepared, delivery: Delivery
    ) -> Outcome:
        """Ask one account, as often as the error and request-retry allow."""
        retries = self.live.config["request-retry"]
        most = {"again": retries, "wait": retries + 1, "once more": 2}
        longest = max(RETRY_PAUSE, min(SHORT_WAIT, self.live.config["max-retry-interval"]))
        tries, refused, model = 0, "", prepared.way.model
        delivery.call.account = account.label
        with account.leased(), self.pool.probing(account, model):
            while True:
                began = self.clock.monotonic()
                try:
                    token = await self.pool.bearer(account, refused)
                except ProxyError as error:
                    return error.problem
                outcome = await self.exchange(account, prepared, token, began, delivery)
                if not isinstance(outcome, Problem):
                    return outcome
                tries += 1
                then = verdict(outcome).then
                pause = outcome.retry_after or (NEVER if then == "wait" else RETRY_PAUSE)
                if then == "refresh" and not refused and isinstance(account, Login):
                    refused = token
                elif "invalid_encrypted_content" in outcome.text and forget_reasoning(prepared):
                    log.info("%s: reasoning of another account is left out", account.name)
                elif tries < most.get(then, 0) and pause <= longest:
                    await self.clock.sleep(pause)
                else:
                    newer = isinstance(account, Login) and token != account.access_token
                    if then == "refresh" and newer:
                        return outcome
                    if delivery.call.verb not in HELPERS or outcome.status not in (404, 429):
                        self.pool.failed(account, outcome, model, began)
                    return outcome

    async def exchange(
        self, account: Account, prepared: Prepared, token: str, began: float, delivery: Delivery
    ) -> Outcome:
        """One request to a provider, and its answer to the client."""
        call, model = delivery.call, prepared.way.model
        sent: Any = {"headers": account_headers(prepared, account, token), "data": prepared.data()}
        upstream, over = None, False
        try:
            upstream = await self.net.ask(
                "POST", prepared.url, delivery.idle, account.proxy, **sent
            )
            sent.clear()
            windows = quota_of(upstream.headers)
            account.quota = windows or account.quota
            if upstream.status != 200:
                return await refusal(call, upstream, windows, self.clock.time(), delivery)
            pieces = Pieces(upstream, delivery)
            answer = await begin_answer(call, pieces, prepared.folds, delivery.settle)
            if delivery.response and not answer.events:  # a comment has gone out
                raise fault(502, f"{call.provider} sent no stream")
            self.pool.answered(account, model, began)
            call.let_go()
            prepared.body = []
            packed = b"" if prepared.folds or answer.events else b"".join(pieces.packed or ())
            pieces.packed = None
            response = await deliver(delivery, upstream, answer, prepared.folds, packed)
            over = True
        except ProxyError as error:
            return error.problem
        finally:
            for name, figure in call.tokens.items():
                account.counts[name] += figure
            delivery.upstream = None
            if upstream:
                self.net.release(upstream, over)
        if delivery.problem:
            call.trouble = delivery.problem.message
            self.pool.failed(account, delivery.problem, model, began)
        return response


async def list_of(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for run in events:
        yield listed(run)
    yield b"]"


async def deliver(
    delivery: Delivery, upstream: Upstream, answer: Answer, folds: bool, packed: bytes
) -> web.StreamResponse:
    """What has been proved to be an answer, to the client; packed, where it came so and is fine."""
    call = delivery.call
    headers = passing(upstream.headers, "content-length", "content-encoding", "set-cookie")
    headers.update(call.marks())
    if answer.events and call.lists:
        headers["Content-Type"] = "application/json; charset=UTF-8"
        first = b"[" + listed(answer.first).removeprefix(LIST_MARK)
        return await delivery.stream(upstream, headers, first, list_of(answer.rest))
    if answer.events:
        if upstream.content_type != "text/event-stream":
            headers["Content-Type"] = "text/event-stream"
        return await delivery.stream(upstream, headers, answer.first, answer.rest)
    if folds:
        headers["Content-Type"] = "application/json"
    body = b"[%b]" % answer.first if call.lists else answer.first
    coding = upstream.headers.get("Content-Encoding", "").strip().lower()
    accepted = accepts(call.request.headers.get("Accept-Encoding", ""), coding)
    if packed and accepted and unpack(packed, coding) == body:  # nothing had to change
        body, headers["Content-Encoding"] = packed, coding
    return web.Response(status=upstream.status, reason=upstream.reason, headers=headers, body=body)


def prepare(call: Call, way: Way, row: Row) -> Prepared:
    """The call as a provider takes it; ProxyError 400 for what it could only refuse."""
    provider = row.provider
    call.provider = row.name
    call.served_model = provider.served(way.model)
    headers = client_headers(call.request.headers, provider)
    headers["Accept-Encoding"] = "identity"
    headers["Content-Type"] = "application/json"
    streams = call.streams
    only_streams = row.kind == "codex" and call.verb == "responses"
    body = call.body
    if call.dialect is not GEMINI and body.get("model") != call.served_model:
        body = {**body, "model": call.served_model}
    if call.verb == "messages" and not body.get("max_tokens"):
        body = {**body, "max_tokens": provider.max_tokens or most_tokens(call.served_model)}
    if way.route == "mapped":
        body = with_sampling(body, call.dialect.name, call.served_model)
    effort = effort_for(call, way)
    body = with_effort(body, call.dialect.name, provider.thinking, effort, call.served_model)
    if row.kind in RULES:
        body = RULES[row.kind](body, headers, provider)
    gone = [name for name in NOT_ASKED.get(call.verb, ()) if name in body]
    if gone:
        body = {name: value for name, value in body.items() if name not in gone}
    headers["Accept"] = "text/event-stream" if streams or only_streams else "application/json"
    for name, value in headers.items():
        if not value.isprintable():
            raise fault(400, f"{name} holds a character that cannot be sent in a header")
    pieces = worded(call, body)
    headers["Content-Length"] = str(sum(map(len, pieces)))
    folds = only_streams and not streams
    return Prepared(way, row, headers, pieces, address_of(call, provider), folds)


def effort_for(call: Call, way: Way) -> str:
    """The suffix's, but for a count; a mapped call says its own in the words of the other model."""
    asked = "" if call.verb in ("count_tokens", "countTokens") else way.effort
    if way.route == "mapped" and asked in ("", "auto"):
        return effort_of(call.body, call.dialect.name)
    return "" if asked == "auto" else asked


def client_headers(given: Any, provider: Provider) -> Headers:
    """The provider's own, and those of the client that may travel on; the client's win."""
    headers, seen = Headers(provider.headers), set()
    named = hop_names(",".join(given.getall("Connection", ()))[:1000])
    for name, value in given.items():
        lower = name.lower()[:100]
        if matches(lower, provider.passes) and lower not in named and not is_hop_header(lower):
            headers[name] = f"{headers[name]},{value}" if lower in seen else value
            seen.add(lower)
    return headers


def worded(call: Call, body: Json) -> list[Any]:
    """The client's own bytes where nothing had to change, else the body in JSON.

    Equality of dicts and lists short-cuts on identity, so what rules share costs nothing here.  A
    key that stands twice is read once, and the provider might read the other one.
    """
    if (body is call.body or body == call.body) and call.raw.count(b'"model"') < 2:
        return [call.raw]
    try:
        if len(call.raw) > LARGE:
            return spliced(call.raw, call.body, body)
        return [write_json(body)]
    except ValueError as error:
        raise fault(400, f"The request body cannot be sent on: {explain(error)}") from None


def forget_reasoning(prepared: Prepared) -> bool:
    """Whether there was any: then the next try goes without it."""
    body = parse_object(b"".join(prepared.body))
    changed = without_reasoning(body)
    if changed is body:
        return False
    prepared.body = [write_json(changed)]
    prepared.headers["Content-Length"] = str(len(prepared.body[0]))
    return True


@functools.lru_cache(1024)
def joined(base: str, path: str) -> str:
    """An address with a path; a version part that both have stands there once."""
    base = base.rstrip("/")
    if re.search(r"/(v\d\w{0,9}(/openai)?|backend-api/codex)$", base):
        path = re.sub(r"^/(v\d\w*|backend-api/codex)", "", path)
    return base + path


def address_of(call: Call, provider: Provider) -> str:
    address = joined(provider.base_url, provider.paths[call.verb])
    if "{model}" in address:
        address = address.replace("{model}", quote(call.served_model, "", None, "replace"))
    query = query_for_provider(call.request.rel_url.raw_query_string)
    if call.verb == "streamGenerateContent":
        query = f"alt=sse&{query}".rstrip("&")
    mark = "&" if "?" in address else "?"
    return f"{address}{mark}{query}" if query else address


def account_headers(prepared: Prepared, account: Account, token: str) -> Headers:
    provider = prepared.row.provider
    headers = prepared.headers.copy()
    host = as_url(prepared.url).host
    if provider.key_header != "Authorization" and provider.key_host in ("", host):
        headers[provider.key_header] = token
    else:
        headers["Authorization"] = f"Bearer {token}"
    if isinstance(account, Login) and account.account_id:
        headers["Chatgpt-Account-Id"] = account.account_id
    return headers


def quota_of(headers: Any) -> list[Window]:
    """The windows that an answer tells of (providers.md 1.6, 2.6)."""
    told: dict[str, Json] = {}
    for name, value in headers.items():
        lower = name.lower()
        if not lower.startswith(("anthropic-ratelimit-unified-", "x-codex-")):
            continue
        if found := QUOTA_HEADER.fullmatch(lower):
            told.setdefault(found["window"], {})[found["field"]] = value
    windows = []
    for name, fields in told.items():
        used = number(fields.get("used-percent")) or 100 * number(fields.get("utilization"))
        at = fields.get("reset", fields.get("reset-at"))
        full = fields.get("status") == "rejected"
        windows.append(Window(name, full, round(used, 1), number(at) or parse_time(at)))
    return windows


# == ampcode.com ===================================================================================
#
# It gets what is no model call, byte for byte, WebSockets too; and, for credits, the model calls
# that nobody here answers.

SECRETS_FILE = Path("~/.local/share/amp/secrets.json")
# The feature that takes clients of April and May 2026 off the proxy, and a comma (amp-client.md 3).
FLAG = re.compile(
    rb"(?:,|(\[))\s{0,99}\{[^{}]{0,99}"
    rb'"name"\s{0,9}:\s{0,9}"thread-actors-tui"[^{}]{0,99}\}(?(1)\s{0,99},?)'
)
USER_INFO = re.compile(r"/api/internal\?getUserInfo(?![\w-])")


class Ampcode:
    def __init__(self, live: Live, net: Net, clock: Any) -> None:
        self.live, self.net, self.clock = live, net, clock
        self.tunnels: dict[Any, web.WebSocketResponse] = {}  # the client's end, by the other one
        self.secrets, self.secrets_until = Json(), 0.0  # what the secrets file said, until then

    # -- Addresses and keys --

    def base(self) -> str:
        return str(self.live.config["ampcode"]["upstream-url"]).rstrip("/")

    def address(self, request: Request) -> str:
        return self.base() + target_without_keys(request.raw_path, self.live.config["api-keys"])

    def key_of_file(self) -> str:
        """The key that Amp itself keeps for this address; its lack is remembered, too."""
        now, base = self.clock.monotonic(), self.base()
        if self.secrets_until <= now:
            self.secrets, self.secrets_until = Json(), now + 5 * MINUTE
            with suppress(OSError, ValueError):
                self.secrets = parse_object(SECRETS_FILE.expanduser().read_bytes())
        found = self.secrets.get(f"apiKey@{base}/") or self.secrets.get(f"apiKey@{base}") or ""
        return str(found).strip()

    def upstream_key(self, key: str) -> str:
        """Ours at ampcode.com, for a client with this key of ours."""
        config = self.live.config["ampcode"]
        for row in config["upstream-api-keys"]:
            if key in row["api-keys"]:
                return str(row["upstream-api-key"])
        environment = os.environ.get("AMP_API_KEY", "").strip()
        return str(config["upstream-api-key"] or environment or self.key_of_file())

    def headers(self, request: Request, key: str) -> Headers:
        """The client's, its credentials replaced by ours; its own stay where we have none."""
        own = self.upstream_key(key)
        headers = passing(request.headers, *(KEY_HEADERS if own or key else ()))
        if own:
            headers["Authorization"] = f"Bearer {own}"
            headers["X-Api-Key"] = own
        return headers

    # -- Requests --

    async def forward(self, request: Request, key: str) -> web.StreamResponse:
        """Anything that is no model call; bodies stream both ways, without a limit."""
        headers = self.headers(request, key)
        edits = self.live.config["ampcode"]["client-inference"] and USER_INFO.match(
            request.raw_path
        )
        if edits:
            headers["Accept-Encoding"] = "identity"
        data = request.content if request.body_exists else None
        url = self.address(request)
        idle = self.live.config["streaming"]["idle-timeout-seconds"]
        wait = idle if data is None else idle and max(idle, UPLOAD_WAIT)
        try:
            upstream = await self.net.ask(request.method, url, wait, headers=headers, data=data)
        except ProxyError:
            if request.content.exception():  # it is the client's
                raise fault(400, "The request body cannot be read: it was cut short") from None
            raise
        try:
            check_status(upstream)
            return await passed(request, upstream, passing(upstream.headers), idle, bool(edits))
        finally:
            self.net.release(upstream)

    async def pay(self, call: Call, key: str, delivery: Delivery) -> web.StreamResponse:
        """A model call that nobody here answers, as it came; streams end as the dialect says."""
        request, idle = call.request, delivery.idle
        headers = self.headers(request, key)
        url = self.address(request)
        upstream = await self.net.ask("POST", url, idle, headers=headers, data=call.raw)
        over = False
        try:
            check_status(upstream)
            call.let_go()
            headers = passing(upstream.headers)
            headers.update(call.marks())
            streams = upstream.content_type == "text/event-stream"
            if not streams or "Content-Encoding" in headers:
                delivery.keepalive = 0  # no comment in the middle of it
                if delivery.response:  # one has gone out
                    status = max(upstream.status, 400)
                    raise fault(status, f"ampcode.com answered {upstream.status} without a stream")
                delivery.watch(upstream)
                return await passed(request, upstream, headers, idle, delivery=delivery)
            runs = whole_events(Pieces(upstream, delivery))
            events = checked_events(call, runs, delivery.settle, told=True)
            response = await delivery.stream(upstream, headers, b"", events)
            over = True
        finally:
            delivery.upstream = None
            self.net.release(upstream, over)
        if delivery.problem:
            call.trouble = f"{call.trouble}; {delivery.problem.message}"
        return response

    # -- WebSockets --

    async def tunnel(self, request: Request, key: str) -> web.StreamResponse:
        asked = re.findall(r"[^\s,]+", request.headers.get("Sec-WebSocket-Protocol", ""))
        options: Any = {"max_msg_size": BODY_LIMIT, "autoclose": False, "autoping": False}
        try:
            upstream = await self.net.sockets.ws_connect(
                as_url(self.address(request)),
                headers=self.headers(request, key),
                protocols=asked,
                proxy=self.net.proxy(self.base()),
                **options,
            )
        except aiohttp.WSServerHandshakeError as error:
            status = error.status if 400 <= error.status <= 599 else 502
            words = f"ampcode.com refused the WebSocket: it answered {error.status}\n"
            return web.Response(status=status, text=words)
        except NET_ERRORS as error:
            raise fault(502, f"ampcode.com cannot be reached: {net_words(error)}") from None
        client = web.WebSocketResponse(protocols=[upstream.protocol or ""], **options)
        self.tunnels = {up: down for up, down in self.tunnels.items() if not up.closed}
        self.tunnels[upstream] = client
        try:
            await client.prepare(request)
            await asyncio.gather(pass_frames(client, upstream), pass_frames(upstream, client))
        finally:
            await upstream.close(code=aiohttp.WSCloseCode.GOING_AWAY)
        return client

    async def close_tunnels(self) -> None:
        ends = [end for pair in self.tunnels.items() for end in pair if not end.closed]
        closing = (end.close(code=aiohttp.WSCloseCode.GOING_AWAY) for end in ends)
        await asyncio.gather(*closing, return_exceptions=True)


async def pass_frames(source: Any, sink: Any) -> None:
    """Frames one way, pings too; then the close with its code and reason."""
    kinds, reason = aiohttp.WSMsgType, ""
    sends = {
        kinds.TEXT: sink.send_str,
        kinds.BINARY: sink.send_bytes,
        kinds.PING: sink.ping,
        kinds.PONG: sink.pong,
    }
    with suppress(ConnectionError, RuntimeError):
        while (frame := await source.receive()).type in sends:
            await sends[frame.type](frame.data)
        if frame.type is kinds.CLOSING:
            return  # it is we who close it
        if frame.type is kinds.CLOSE:
            reason = frame.extra or ""
    # 0: it closed without a code; 1006 says that it broke, and may not be sent.
    code = {0: 1000, 1006: 1011}.get(source.close_code, source.close_code)
    if code and sink.close_code is None:  # else the closing is under way
        for end in (sink, source):
            await end.close(code=code, message=reason.encode())


async def passed(
    request: Request,
    upstream: Upstream,
    headers: Headers,
    idle: float,
    edits: bool = False,
    delivery: Delivery | None = None,
) -> web.StreamResponse:
    """An answer of ampcode.com as it came, but for gzip that it does not label, and the flag."""
    first = await opened(upstream, headers, edits)
    response = web.StreamResponse(status=upstream.status, reason=upstream.reason, headers=headers)
    if delivery:
        response = await delivery.start(upstream.status, upstream.reason, headers)
    else:
        await response.prepare(request)
    try:
        if first:
            await write_within(idle, request, response, first)
        async for data in upstream.content.iter_any():
            await write_within(idle, request, response, data)
            if delivery:
                delivery.moved = delivery.loop.time()
    except (ConnectionResetError, asyncio.CancelledError):
        raise  # it is the client that left
    except (RuntimeError, *NET_ERRORS) as error:
        # What has begun cannot become an error: the client must see that it broke off.
        log.warning("ampcode.com broke off in mid-answer: %s", net_words(error))
        if request.transport:
            request.transport.abort()
        return web.Response(status=502)
    return response


def check_status(upstream: Upstream) -> None:
    """ProxyError 502 for a 101 that nobody asked for, and for what is no status at all."""
    if not 200 <= upstream.status <= 599:
        raise fault(502, f"ampcode.com answered {upstream.status}, which is no answer")


async def write_within(
    idle: float, request: Request, response: web.StreamResponse, data: bytes
) -> None:
    """Cut a client that takes nothing for so many seconds; its upstream would wait as long."""
    try:
        async with asyncio.timeout(idle or None):
            await response.write(data)
    except TimeoutError:
        if request.transport:
            request.transport.abort()
        raise ConnectionResetError from None


async def opened(upstream: Upstream, headers: Headers, edits: bool) -> bytes:
    """The answer's beginning, or all of it where it must be changed; `headers` follow."""
    labelled = "Content-Encoding" in headers or upstream.content_type == "text/event-stream"
    if not edits and (labelled or "zip" in upstream.content_type):
        return b""
    raw = b""
    try:
        while not upstream.content.at_eof() and len(raw) <= BODY_LIMIT:
            if not edits and raw[:2] not in (b"", GZIP[:1], GZIP):
                break
            raw += await upstream.content.readany()
    except (RuntimeError, *NET_ERRORS) as error:
        raise fault(502, f"ampcode.com broke off: {net_words(error)}") from None
    body = unpack(raw) or raw
    if edits:
        body = FLAG.sub(rb"\1", body)
    if body != raw:
        headers.popall("Content-Encoding", None)
        headers["Content-Length"] = str(len(body))
    return body


# == Status ========================================================================================
#
# What was served, and how the accounts stand: for GET /status and the log.  No secret, no prompt.

ROUTE_WORDS = {
    "local": "LOCAL_PROVIDER",
    "mapped": "MODEL_MAPPING",
    "amp": "AMP_CREDITS",
    "none": "NO_PROVIDER",
}
PAID_MODELS = 100  # names of models that are counted
NO_ACCOUNT = {  # whether ampcode.com may be asked -> what is said where there is no account
    True: "there is no login and no API key here: Amp answers every model call, and bills it."
    " To use a plan of yours: ampproxy.py login claude",
    False: "there is no login and no API key here: no model call can be answered."
    " To use a plan of yours: ampproxy.py login claude",
}
AMP_BILLS = "AMP_CREDITS this client's model runs on Amp's servers: Amp bills it, not your logins"


class Ledger:
    """The last requests, and counters since the start."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.clock = pool, pool.clock
        self.began = pool.clock.monotonic()
        self.requests: deque[Json] = deque(maxlen=100)
        self.routes = Counter(dict.fromkeys(ROUTE_WORDS, 0))
        self.paid: Counter[str] = Counter()  # by model
        self.server_side = 0  # threads whose model runs on Amp's servers
        self.warn_at = 0.0  # not before then, that there is no account

    def note(self, call: Call, status: int, took: float) -> None:
        """A call that has ended; 499 when the client left."""
        self.routes[call.route] += 1
        model = call.model[:200]
        known = model in self.paid or len(self.paid) < PAID_MODELS
        if call.route == "amp" and status in (200, 499) and known:
            self.paid[model] += 1
        if call.route == "amp" and self.clock.monotonic() >= self.warn_at:
            self.warn_of_no_account()
        self.requests.append(
            {
                "dialect": call.dialect.name,
                "model": model,
                "route": call.route,
                "provider": call.provider[:200],
                "account": call.account[:200],
                "served_model": call.served_model[:200],
                **call.tokens,
                "time": rfc3339(self.clock.time()),
                "status": status,
                "seconds": round(took, 3),
            }
        )
        level = logging.WARNING if call.trouble or status >= 400 else logging.INFO
        word, model = ROUTE_WORDS[call.route], model[:100] or "-"
        who = f"{call.provider or '-'} {mask(call.account) if call.account else ''}"
        log.log(level, "%s %s %s %d %.1fs %s", word, model, who, status, took, call.trouble)

    def warn_of_no_account(self) -> None:
        """At the start, and once in an hour of paid calls."""
        if self.pool.of(self.pool.live.rows):
            return
        self.warn_at = self.clock.monotonic() + HOUR
        pays = self.pool.live.config["ampcode"]["fallback"] != "never"
        log.warning("%s", NO_ACCOUNT[pays])

    def note_server_side(self, path: str) -> None:
        self.server_side += path == "/api/thread-actors"
        log.warning(AMP_BILLS)

    def report(self) -> Json:
        return {
            "version": __version__,
            "uptime_seconds": int(self.clock.monotonic() - self.began),
            "routes": dict(self.routes),
            "paid": dict(self.paid.most_common()),
            "accounts": [self.report_account(a) for a in self.pool.accounts.values()],
            "server_side_threads": self.server_side,
            "requests": [*self.requests],
        }

    def report_account(self, account: Account) -> Json:
        now, moment = self.clock.monotonic(), self.clock.time()
        state, wait = account.state(now), account.wait("", now)
        reasons = []
        for model, rest in sorted(account.rests.items())[:20]:
            reasons.append(f"{model[:100]}: {rest.message}" if model else rest.message)
        quota = []
        for window in account.quota:
            left = max(0, round(window.resets_at - moment))
            quota.append(
                {
                    "window": window.name,
                    "used_percent": window.used_percent,
                    "resets_in_seconds": left,
                }
            )
        expires = account.expires - moment
        return {
            "provider": account.kind,
            "account": account.label,
            "state": state,
            "reason": "; ".join(reasons),
            "wakes_in_seconds": round(wait) if state == "resting" else None,
            "expires_in_seconds": round(expires) if expires < 1e12 else None,
            "plan": account.plan,
            "in_flight": account.in_flight,
            "threads": account.threads,
            **account.counts,
            "quota": quota,
        }


# == The server ====================================================================================
#
# The one place that takes requests: checks them, hands them on, and is the one exit for errors.

PROBES = {  # answered without a key (clients.md)
    "GET /healthz": 200,
    "HEAD /healthz": 200,
    "HEAD /": 200,
    "HEAD /api/hello": 404,
}


TIDY_AFTER = 0.5  # seconds after a large body that memory is given back


class Server:
    def __init__(self, live: Live, net: Net, clock: Any = CLOCK) -> None:
        self.live, self.net, self.clock = live, net, clock
        self.pool = Pool(live, net, clock)
        self.ampcode = Ampcode(live, net, clock)
        self.forwarder = Forwarder(live, net, self.pool, self.ampcode.pay)
        self.ledger = Ledger(self.pool)
        self.tidying: asyncio.TimerHandle | None = None
        self.told = ""  # the last error of a tick: it is said once

    # -- One request --

    async def handle(self, request: Any) -> web.StreamResponse:
        found = MODEL_PATH.fullmatch(request.rel_url.raw_path)
        call = Call(request, found) if found else None
        began = self.clock.monotonic()
        status = 499  # the client left
        try:
            response = await self.dispatch(request, call)
            status = response.status
        except ProxyError as error:
            response = self.refuse(request, call, error.problem)
            status = response.status
        except ConnectionError:
            raise  # the client is gone
        except Exception as error:  # a fault of this program, which survives it
            log.error("internal error: %s: %s", type(error).__name__, explain(error))
            problem = Problem(500, "internal error of ampproxy, see its log")
            response = self.refuse(request, call, problem)
            status = response.status
        finally:
            if call and call.was_read:
                self.ledger.note(call, status, self.clock.monotonic() - began)
        return response

    async def dispatch(self, request: Request, call: Call | None) -> web.StreamResponse:
        config, path, method = self.live.config, request.rel_url.raw_path, request.method
        if not request.raw_path.startswith("/") or method == "CONNECT":
            raise fault(400, "only targets that begin with / are served, and no tunnels")
        if method == "TRACE":
            raise fault(405, "TRACE is not served")
        if request.version not in ((1, 0), (1, 1)):
            raise fault(505, "only HTTP 1.0 and 1.1 are served")
        browser_path = method in ("GET", "HEAD") and bool(BROWSER_PATHS.match(path))
        check_origin(request, config, browser_path)
        if call is None:
            if probe := PROBES.get(f"{method} {path}"):
                return web.json_response({"status": "ok"}, status=probe)
            if browser_path:  # a browser's cookies are valid only there
                location = {"Location": self.ampcode.address(request)}
                return web.Response(status=302, headers=location)
        key = client_key(request, config["api-keys"])
        if isinstance(request.protocol, Connection):
            request.protocol.known()
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        upgrades = asks_for_socket(request)
        if call and upgrades:
            raise fault(426, "model calls are not served over WebSockets here: use POST")
        if call and method == "POST":
            return await self.model_call(call, key)
        return await self.management(request, key, bool(call), upgrades)

    async def model_call(self, call: Call, key: str) -> web.StreamResponse:
        await call.read()
        large = len(call.raw) > LARGE
        streaming = self.live.config["streaming"]
        keepalive, idle = streaming["keepalive-seconds"], streaming["idle-timeout-seconds"]
        with Delivery(call, keepalive, idle) as delivery:
            try:
                return await self.forwarder.answer(call, key, delivery)
            except ProxyError as error:
                if delivery.response is None:
                    raise
                # A comment has gone out, and with it status 200.
                call.trouble = f"{call.trouble}; {error.problem.message}".removeprefix("; ")
                await delivery.end(delivery.response, error.problem)
                return delivery.response
            finally:
                if large and self.tidying is None:
                    self.tidying = delivery.loop.call_later(TIDY_AFTER, self.tidy)

    async def management(
        self, request: Request, key: str, model_path: bool, upgrades: bool
    ) -> web.StreamResponse:
        """What is no model call: lists, the status, and all that ampcode.com answers."""
        path, method = request.rel_url.raw_path, request.method
        local = self.live.config["ampcode"]["restrict-management-to-localhost"]
        if local and not model_path and not is_loopback(request.remote or ""):
            raise fault(403, "Access denied: management routes restricted to localhost")
        if method == "GET" and LISTING.fullmatch(path) and not upgrades:
            return web.json_response(model_list(request, self.forwarder.chooser))
        if method == "GET" and path in ("/", "/status"):
            return web.json_response(self.ledger.report())
        acts = path.startswith(("/api/thread-actors", "/actors/"))
        if acts and (method == "POST" or upgrades):
            self.ledger.note_server_side(path)
        if upgrades:
            return await self.ampcode.tunnel(request, key)
        return await self.ampcode.forward(request, key)

    def refuse(self, request: Request, call: Call | None, problem: Problem) -> web.Response:
        """The one exit for errors: in the client's dialect, or as Amp's clients know them."""
        headers = problem.headers
        if call:
            headers.update(call.marks())
            call.trouble = f"{call.trouble}; {problem.message}".removeprefix("; ")
        headers.setdefault("Content-Type", "application/json")
        wait = max(1, round(problem.retry_after)) if problem.retry_after else 0
        if wait:
            headers["Retry-After"] = str(wait)
        if wait > 30:  # SDKs would sleep it out without a word (clients.md)
            headers["x-should-retry"] = "false"
        body = self.error_body(call, problem, wait)
        return web.Response(status=problem.status, body=body, headers=headers)

    def error_body(self, call: Call | None, problem: Problem, wait: int) -> bytes:
        if call is None and problem.status == 502:
            return write_json({"error": "amp_upstream_proxy_error", "message": problem.message})
        if call is None:
            return write_json({"error": problem.message})
        limit = "usage_limit_reached"
        spent = call.dialect is RESPONSES and problem.status == 429 and wait > 30
        if problem.body and not (spent and limit.encode() not in problem.body):
            return problem.body
        body = call.dialect.error(problem.status, problem.text or problem.message)
        if spent:  # Codex waits out any other 429 in silence (clients.md)
            ends = {"resets_in_seconds": wait, "resets_at": round(self.clock.time()) + wait}
            body["error"] |= {"type": limit, "code": limit, **ends}
        return write_json(body)

    # -- The process --

    def tidy(self) -> None:
        self.tidying = None
        give_back_memory()

    def tick(self) -> None:
        """Once a second: changed files, tokens that are due."""
        try:
            if self.live.reload():
                set_up_log(self.live.config["debug"], self.live.warnings)
            self.pool.scan()
            self.pool.refresh_ahead()
            self.told = ""
        except Exception as error:  # whatever is in the files: the next look comes
            words = explain(error)
            if words != self.told:
                log.error("%s; what was read before stays in effect", words)
            self.told = words

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        """Take requests until the block ends; yields the port."""
        sweep_drafts(self.live.auth_dir)
        self.pool.scan()
        loop = asyncio.get_running_loop()
        server = Listener(
            self.handle,
            min(raise_file_limit() // 4, STRANGERS),
            handler_cancellation=True,
            auto_decompress=False,
            access_log=None,
            max_line_size=HEAD_LIMIT,
            max_field_size=HEAD_LIMIT,
            request_factory=functools.partial(Request, loop=loop, client_max_size=BODY_LIMIT),
        )
        hint = "is ampproxy running already? --port takes another one"
        config = self.live.config
        try:
            async with listen(server, config["host"], config["port"], hint) as port:
                yield port
                await self.ampcode.close_tunnels()
        finally:
            await self.finish_refreshes()
            await self.net.close()

    async def finish_refreshes(self) -> None:
        """A token that is on its way is worth the wait: the old one is void."""
        logins = [a for a in self.pool.accounts.values() if isinstance(a, Login)]
        running = [login.refreshing for login in logins if login.refreshing]
        if running:
            await asyncio.wait(running, timeout=REFRESH_WAIT)


# == Command line ==================================================================================
#
# One coroutine a command; its docstring is its help.  A Failure is what main says in one sentence.
#
# To add a command, write a coroutine, name it in COMMANDS, and its arguments in ARGUMENTS.

VERBS = {  # what `route` asks for
    "anthropic": "messages",
    "chat": "completions",
    "responses": "responses",
    "gemini": "generateContent",
}
NAMES = {  # for `login`
    word: kind for kind, row in LOGINS.items() if row.authorize_url for word in (kind, *row.also)
}


async def serve(live: Live, args: Json) -> None:
    """Run the proxy; also without a command."""
    server = Server(live, Net(live))
    stop = asyncio.get_running_loop().create_future()
    for name in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError):  # Windows: there Ctrl-C ends the program at once
            stop.get_loop().add_signal_handler(name, stop.cancel)
    async with server.serving() as port:
        log.info("ampproxy %s: http://%s:%d", __version__, live.config["host"], port)
        server.ledger.warn_of_no_account()
        while not (await asyncio.wait([stop], timeout=1))[0]:
            server.tick()
        log.info("stopping: running answers get 10 seconds")


async def login(live: Live, args: Json) -> None:
    """Sign in to a provider; several logins are several accounts."""
    if not args["provider"]:
        kinds = "|".join(dict.fromkeys(NAMES.values()))
        raise Failure(f"say which provider: ampproxy.py login {kinds}")
    kind = NAMES[args["provider"]]
    remote = os.environ.keys() & {"SSH_CONNECTION", "SSH_TTY"}
    browser = "no_browser" not in args and not remote
    provider = overlaid(LOGINS[kind], live.config["providers"][kind])
    email, path = await sign_in(live, provider, browser)
    say(f"Signed in to {kind} as {email}; the login is kept in {path}")


async def logout(live: Live, args: Json) -> None:
    """Delete a login."""
    kind, account = NAMES[args["provider"]], args["account"]
    there = [a for a in Pool(live).scan() if isinstance(a, Login) and a.kind == kind]
    wanted = [a for a in there if account in (None, a.label, a.path.name, a.path.stem)]
    if len(wanted) != 1:
        problem = "several accounts, say which one of" if wanted else "no such account among"
        names = ", ".join(a.label for a in there) or "none"
        raise Failure(f"{problem}: {names} ({live.auth_dir})")
    wanted[0].path.unlink()
    say(f"Logged out as {wanted[0].label}: {wanted[0].path} is deleted")


async def accounts(live: Live, args: Json) -> None:
    """List the accounts."""
    line = "{:<20}  {:<30}  {:<6}  {:<12}  {:<11}  {}"
    say(line.format("PROVIDER", "ACCOUNT", "PLAN", "EXPIRES", "STATE", "FILE"))
    found = Pool(live).scan()
    for account in found:
        left = (account.expires - time.time()) / HOUR
        ends = "refresh due" if left < 0 else f"in {left:.1f} h" if left < 1e9 else "never"
        place = account.path if isinstance(account, Login) else account.label
        state = account.state(0)
        say(line.format(account.kind, account.label, account.plan or "-", ends, state, place))
    if not found:
        say(f"No accounts in {live.auth_dir} yet. Next: ampproxy.py login claude")


async def status(live: Live, args: Json) -> None:
    """Ask the running proxy how it stands, as JSON."""
    host, keys = live.config["host"] or "localhost", [*live.config["api-keys"], ""]
    url = URL.build(scheme="http", host=host, port=live.config["port"], path="/status")
    more: Any = {"headers": {"X-Api-Key": keys[0]}, "timeout": aiohttp.ClientTimeout(total=10)}
    try:
        async with aiohttp.request("GET", url, raise_for_status=True, **more) as answer:
            told = parse_object(await answer.read())
    except NET_ERRORS as error:
        raise Failure(
            f"no proxy to ask at {url} ({net_words(error)}): start it, see --config"
        ) from error
    say(json.dumps(told, indent=2, ensure_ascii=False))


async def route(live: Live, args: Json) -> None:
    """Say who would serve a model, and why; nothing is sent."""
    pool = Pool(live)
    pool.scan()
    verb = VERBS.get(args["dialect"], "")
    chooser = Chooser(live, pool)
    ways, notes = chooser.ways(*chooser.split(args["model"]), verb)
    chosen = [f"{way.route}: {way.rows[0].name} as {way.model} {way.effort}" for way in ways]
    nobody = f"nobody here; fallback: {live.config['ampcode']['fallback']}"
    say("\n".join([*notes, f"So {', then '.join(chosen) or nobody}"]))


async def check(live: Live, args: Json) -> None:
    """Check the configuration and print what is in effect."""
    if not live.config["proxy-url"]:
        environment_proxies()
    Pool(live).scan()  # says which token files are none
    say(f"# In effect, from {live.path or 'the defaults (no config.yaml was found)'}:")
    say(yaml.safe_dump(masked(live.config), sort_keys=False, allow_unicode=True).rstrip())


SECRET_KEYS = re.compile(r"api-keys?$|secret$|proxy-url$|headers (?!anthropic-)")


def masked(value: Any, key: str = "") -> Any:
    """The configuration as it may be shown; `key` is the path to the value."""
    if isinstance(value, dict):
        return {name: masked(inner, f"{key} {name}".lower()) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(inner, key) for inner in value]
    if not isinstance(value, str):
        return value
    text = re.sub(r"//[^/@\s]+@", "//...@", value)
    return mask(text) if text and SECRET_KEYS.search(key) else text


COMMANDS = {
    command.__name__: command for command in (serve, login, logout, accounts, status, route, check)
}
ARGUMENTS: dict[str, Json] = {  # "": of every command; those of `serve` need not name it
    "": {"--config": {"metavar": "FILE", "help": "the configuration file"}},
    "serve": {
        "--host": {"metavar": "H", "help": "listen on this address"},
        "--port": {"metavar": "N", "type": int, "help": "listen on this port"},
        "--debug": {"action": "store_true", "help": "say more in the log"},
    },
    "login": {
        "provider": {"nargs": "?", "choices": NAMES, "default": None},
        "--no-browser": {"action": "store_true", "help": "print the address only"},
    },
    "logout": {"provider": {"choices": NAMES}, "account": {"nargs": "?", "default": None}},
    "route": {"model": {}, "--dialect": {"choices": VERBS, "default": ""}},
    "status": {"--json": {"action": "store_true"}},
}


def parse(argv: list[str] | None) -> Json:
    options: Any = {"allow_abbrev": False, "argument_default": argparse.SUPPRESS}
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser("ampproxy.py", description=about, **options)
    parser.add_argument("--version", action="version", version=f"ampproxy {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        about = command.__doc__ or ""
        commands.add_parser(name, help=about, description=about, **options)
    for name, made in [("serve", parser), *commands.choices.items()]:
        for argument, more in (ARGUMENTS[""] | ARGUMENTS.get(name, {})).items():
            made.add_argument(argument, **more)
    args = vars(parser.parse_args(argv))
    if not 0 <= args.get("port", 0) <= 65535:
        parser.error("argument --port: a port is a number from 0 to 65535")
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, with one sentence on standard error, 2 wrong usage."""
    args = parse(argv)
    given = {name: args[name] for name in ("host", "port", "debug") if name in args}
    try:
        live = Live(find_config(args.get("config")), **given)
        set_up_log(live.config["debug"], live.warnings)
        loop = "uvloop" if importlib.util.find_spec("uvloop") else "asyncio"
        run = importlib.import_module(loop).run
        run(COMMANDS[args.get("command") or "serve"](live, args))
    except (Exception, KeyboardInterrupt) as error:  # a fault of this program: one sentence, too
        problem = explain(error) if isinstance(error, Exception) else "stopped"
        print(f"ampproxy: {printable(problem)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
