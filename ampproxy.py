#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "aiohttp>=3.11.10,<4",
#     "pyyaml>=6,<7",
#     "msgspec>=0.19,<1",
#     "uvloop>=0.21,<1; sys_platform != 'win32'",
#     "backports.zstd>=1,<2; python_version < '3.14'",
# ]
# ///
"""The model calls of AI coding clients, answered by the subscriptions you already pay for.

client     an AI coding tool: the Amp CLI, Claude Code, Codex CLI, droid, an SDK
provider   who answers model calls: claude, codex, gemini, antigravity, or who an API key is of
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
The network            sessions to the outside, a lean way for model calls, listening
Signing in             OAuth with PKCE, callbacks, device codes, the project of a Google login
Accounts               who may answer next, what an error means for that, refreshing tokens
The neutral form       what a request and an answer are in any dialect; histories put right
Server-sent events     runs of whole events out of whatever pieces arrive
Anthropic Messages     ...
Chat Completions       ... read and written: a request, the events of an answer, a whole one
Responses              ...
Gemini                 ...
Dialects               a row each: errors, marks, ends, and the functions above
Provider rules         what a login's backend asks of a request, Google's envelope among it
Who asks, and what     may this request be served, which model call is it, of which thread
Who answers            suffixes and efforts, mappings, the ways to try, lists of models
Answers on their way   an answer as an iterator of the client's bytes; silence, ends, errors
Forwarding             the story of one model call
ampcode.com            everything else, as it came; the tunnel; paid calls
Status                 what was served, and how the accounts stand
The server             the one place that takes requests, and the one exit for errors
Amp's modes            which models Amp asks for, and who would answer
Setting up clients     what a client's own settings must say; one writer that can undo
The login menu         all logins on the whole terminal, with the arrow keys
Command line           one coroutine a command

Start at Server.handle; a model call goes on to Forwarder.answer, the rest to Ampcode.forward.
Left out on purpose: TLS, a database, imitation of the official clients.

Where a comment names providers.md, clients.md, amp-client.md, peers.md or design.md, its fact comes
from there: notes about the world outside, which are no part of this repository.
"""

from __future__ import annotations

import os
import sys

# CPython keeps the syntax tree of a script as long as that runs: 29 of 74 MB here.  Of a module it
# keeps none, and finds it compiled at the next start.  So a server goes on as one, in its process.
SHORT_COMMANDS = {"login", "logout", "accounts", "status", "route", "check", "setup", "import"}
AS_MODULE = (
    "import importlib, os, sys; folder, name = os.path.split(os.path.abspath(sys.argv.pop(1)));"
    " sys.path = [folder, *filter(None, sys.path)];"
    " sys.exit(importlib.import_module(name.removesuffix('.py')).main())"
)
FLAGS = sys.orig_argv[1 : -len(sys.argv)]  # with -m or -c another program runs this script
IS_SCRIPT = __name__ == "__main__" and __spec__ is None and not {"-m", "-c"} & {*FLAGS}
STEM, DOT, ENDING = __file__.rpartition("/")[2].partition(".")
IS_MODULE_NAME = ENDING == "py" and STEM not in ("", "importlib", *sys.modules)
GOES_ON = IS_SCRIPT and IS_MODULE_NAME and os.name == "posix" and bool(sys.executable)
if GOES_ON and not SHORT_COMMANDS & {*sys.argv}:
    # -P: else modules of the folder that it is started in would come before Python's own.
    command = [sys.executable, "-P", *FLAGS, "-c", AS_MODULE, __file__, *sys.argv[1:]]
    os.execv(sys.executable, command)

import argparse
import asyncio
import base64
import ctypes
import dataclasses
import difflib
import errno
import fnmatch
import functools
import gc
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import logging
import logging.handlers
import re
import secrets
import select
import shutil
import signal
import stat
import threading
import time
import tomllib
import urllib.request
import uuid
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
from contextlib import (
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, NoReturn
from urllib.parse import parse_qsl, quote, unquote, unquote_plus, urlencode

try:
    import aiohttp
    import yaml
    from aiohttp import web
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.http import HttpProcessingError
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
# Errors, JSON, numbers and times, files, packed bodies, what may be shown to a person, and the log.
#
# There are two errors.  A Failure is one sentence for the person at the terminal.  A ProxyError is
# for a client and carries a Problem: what went wrong as plain data.  Only a Problem is ever kept;
# an exception holds its traceback, and that the frames with the client's whole prompt in them.

Json = dict[str, Any]
Headers = CIMultiDict[str]

MINUTE, HOUR, DAY = 60, 3600, 86400
NEVER = float("inf")
BODY_LIMIT = 64 << 20  # bytes of a request, and of what is collected of an answer
SPLICED = 1 << 15  # bytes: of what is more the parts that did not change are not written anew
LARGE = 1 << 20  # bytes: what is more is copied as rarely as can be
CLOCK = SimpleNamespace(time=time.time, monotonic=time.monotonic, sleep=asyncio.sleep)

log = logging.getLogger("ampproxy")


class Failure(Exception):
    """A sentence that tells the person at the terminal what to do."""


class Misuse(Failure):
    """The same, for a command that was not given what it needs: exit status 2."""


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


def fault(status: int, message: str) -> ProxyError:
    return ProxyError(Problem(status, message))


def explain(error: BaseException) -> str:
    """An error in one line, without the password of an outbound proxy."""
    text = error.problem.message if isinstance(error, ProxyError) else str(error)
    return re.sub(r"//[^/\s]+@", "//", text or type(error).__name__)


# -- JSON: the one place that parses and writes it --


def finite(digits: str) -> float:
    value = float(digits)
    if abs(value) == float("inf"):
        raise ValueError(f"{digits[:20]} is too large a number")
    return value


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


def without(table: Json, *names: str) -> Json:
    """A copy that lacks these names."""
    return {name: value for name, value in table.items() if name not in names}


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


# -- Files --

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


def folder_of(variable: str, usual: str) -> Path:
    """Where an environment variable says that something is kept, else the usual place."""
    return Path(os.environ.get(variable) or usual).expanduser()


# -- Packed bodies, and memory --

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
        piece: bytes = self.stream.decompress(self.left, LARGE)
        self.left = self.stream.unconsumed_tail or self.stream.unused_data
        return piece


MEMBERS, MEMBER_PIECE = 10_000, 16384  # of one body; bytes that are looked at together


def unpack(raw: bytes, coding: str = "gzip") -> bytes | None:
    """None for what is not packed so, is not whole, or would be larger than BODY_LIMIT."""
    with suppress(zlib.error, OverflowError):
        return unpack_whole(raw, coding)
    return None


def unpack_whole(raw: bytes | bytearray, coding: str) -> bytes:
    """zlib.error for what is not packed so, or not whole; OverflowError above BODY_LIMIT."""
    unpacker, whole, members = Unpacker(coding), bytearray(), 0
    for start in range(0, len(raw), MEMBER_PIECE):
        unpacker.left += raw[start : start + MEMBER_PIECE]
        while unpacker.left:
            whole += unpacker.take(b"")
            members += unpacker.stream is not None and unpacker.stream.eof
            if len(whole) > BODY_LIMIT or members > MEMBERS:
                raise OverflowError
    if not unpacker.is_whole:
        raise zlib.error
    return bytes(whole)


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


# -- Secrets, and what may be shown to a person --


def equal(one: str, other: str) -> bool:
    """In a time that does not tell how much of them is alike."""
    return secrets.compare_digest(one.encode(errors="replace"), other.encode(errors="replace"))


# sk- and rt_ stand inside words, too (task-force, part_number): they count at a word's beginning.
# That may be behind an escape, whose last letter belongs to no word: %3dsk-, %253dsk-, \nsk-, ...
ESCAPES = (r"%..", r"%25..", r"\\[a-z]", r"\\x..", r"\\u....")
WORD_START = "|".join([r"(?<![a-z])", *(f"(?<={escape})" for escape in ESCAPES)])
SECRET = re.compile(
    r"(?<![\w.+%-])(?P<kind>(?:claude|codex|gemini|antigravity)-)?(?P<mail>[\w.+%-]{1,200}@[\w.-]+)"
    rf"|(?:(?:{WORD_START})(?:sk-|rt_)|sgamp_|ya29|AIza|eyJ|1//0|GOCSPX)[\w.~+/=-]{{8,}}"
    r"|(?<=Bearer )\S+"
)
WORDS_OF_SECRETS = "@ sk- sgamp_ ya29 AIza eyJ rt_ 1//0 GOCSPX"
HINTS = (*WORDS_OF_SECRETS.split(), "Bearer ")  # one is in every secret


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


COLOURS = {  # escape sequences (ECMA-48, "SGR"); none: plain
    "": "",
    "green": "\x1b[32m",
    "cyan": "\x1b[36m",
    "yellow": "\x1b[33m",
    "red": "\x1b[1;31m",
    "bold": "\x1b[1m",
    "dim": "\x1b[2m",
}
Paint = Callable[[str, str], str]  # a text and the name of a colour -> what is written


def coloured(text: str, colour: str) -> str:
    return f"{COLOURS[colour]}{text}\x1b[0m" if colour and text else text


def plain(text: str, colour: str) -> str:
    return text


def paint_for(stream: Any) -> Paint:
    """Colours for a terminal whose user has not said NO_COLOR (no-color.org)."""
    refused = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if refused or sys.platform == "win32" or not stream or not stream.isatty():
        return plain
    return coloured


# -- The log --

LEVEL_COLOURS = {"DEBUG": "dim", "WARNING": "yellow", "ERROR": "red"}


class LogFormatter(logging.Formatter):
    """One short line an entry.  The time is put into words once a second."""

    second, clock = -1, ""

    def __init__(self, times: str, paint: Paint) -> None:
        super().__init__()
        self.times, self.paint = times, paint

    def format(self, record: logging.LogRecord) -> str:
        if int(record.created) != self.second:
            self.second = int(record.created)
            self.clock = time.strftime(self.times, time.localtime(self.second))
        text, colour = redact(record.getMessage()), getattr(record, "colour", None)
        if colour is not None:  # a request's line: its first word says how it went
            word, space, rest = text.partition(" ")
            text = self.paint(word, colour) + space + rest
        elif record.levelname in LEVEL_COLOURS:
            level = self.paint(record.levelname, LEVEL_COLOURS[record.levelname])
            text = f"{level} {text}"
        return f"{self.clock} {text}"


LOG_SIZE, LOG_FILES = 5_000_000, 5  # bytes of a log file, and how many older ones are kept


class LogFile(logging.handlers.RotatingFileHandler):
    """Private, as the token files beside it are."""

    def _open(self) -> Any:
        def private(path: str, flags: int) -> int:
            return os.open(path, flags, 0o600)

        return open(self.baseFilename, self.mode, encoding="utf-8", opener=private)


def log_to(path: Path) -> LogFile:
    try:
        for directory in (path.parent.parent, path.parent):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return LogFile(path, maxBytes=LOG_SIZE, backupCount=LOG_FILES)
    except OSError as error:
        raise Failure(f"the log cannot be written to {path}: {explain(error)}") from error


def set_up_log(debug: bool, lines: Iterable[str], path: Path | None = None) -> None:
    """To standard error and to a file; and `lines`, which reading the configuration had to say."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    handlers[0].setFormatter(LogFormatter("%X", paint_for(sys.stderr)))
    if path:
        handlers.append(log_to(path))
        handlers[1].setFormatter(LogFormatter("%Y-%m-%d %H:%M:%S", plain))
    old, log.handlers, log.propagate = log.handlers, handlers, False
    for handler in old:
        handler.close()
    log.setLevel(logging.DEBUG if debug else logging.INFO)
    logging.basicConfig(handlers=[logging.NullHandler()])  # the libraries' own logs stay silent
    logging.raiseExceptions = False  # a terminal that has gone, a full disk: no traceback
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
    more_hosts: tuple[str, ...] = ()  # asked in turn where that one fails; not with one's own
    paths: dict[str, str] = field(default_factory=dict)  # verb of a call -> path; none: no calls
    # Names, patterns, {name, alias}; clients are shown the names alone.
    models: tuple[Any, ...] = ()
    excluded_models: tuple[str, ...] = ()
    only_streams: tuple[str, ...] = ()  # patterns of models that give no answer in one piece
    thinking: dict[str, str] = field(default_factory=dict)  # model -> levels, or range of budgets
    max_tokens: int = 0  # of an answer that nobody limits; 0: as many as the model writes

    # -- What it is sent --
    headers: dict[str, str] = field(default_factory=dict)
    passes: tuple[str, ...] = ()  # patterns of a client's headers that travel on
    own_headers: tuple[str, ...] = ()  # of an answer: back to the account that gave them, alone
    drops: tuple[str, ...] = ()  # patterns of fields that go; read by ChatGPT's rules alone
    hosted: tuple[str, ...] = ("web_search", "code_interpreter")  # OpenAI's own tools that it has
    drop_betas: tuple[str, ...] = ()  # patterns of Claude's beta flags that go
    identity: bool = False  # the first system block that a Claude login wants; by Claude's alone
    key_header: str = "Authorization"  # where the token goes, as a bearer token...
    key_host: str = ""  # ...but bare where key_header is another one; to this host only, if named
    wraps: bool = False  # in Code Assist's envelope, which names a project (providers.md 3)
    envelope: dict[str, str] = field(default_factory=dict)  # what else it says
    proxy_url: str = ""  # the way out to it; "direct": none; "": that of all

    # -- How one signs in --
    warning: str = ""  # said before the address
    login_wait: int = 600  # seconds, then a login that nobody has finished ends
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
    device_url: str = ""  # gives out codes to type in elsewhere (providers.md 2.1)
    device_page_url: str = ""  # where they are typed in
    device_callback_url: str = ""  # named when what they gave is redeemed
    refresh_lead: int = 300  # seconds before its expiry that a token is refreshed
    also: tuple[str, ...] = ()  # other words for `login`

    # -- Where a Google login's project comes from (providers.md 3, 4) --
    project: str = ""  # one's own, for paid licences; else the one that Code Assist names
    load_path: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    onboard_path: str = ""
    onboard_metadata: dict[str, str] = field(default_factory=dict)
    tier_key: str = "tierId"
    tier: str = ""  # where Code Assist names none as its default
    onboard_tries: int = 15
    onboard_pause: int = 2  # seconds between them

    @functools.cached_property
    def names(self) -> dict[str, str]:
        """What clients may ask for -> what is asked for there."""
        pairs = [m if isinstance(m, dict) else {"name": m, "alias": ""} for m in self.models]
        return {pair["alias"] or pair["name"]: pair["name"] for pair in pairs}

    @functools.cached_property
    def written(self) -> dict[str, str]:
        """The same in lower case, without what is a pattern."""
        return {name.lower(): own for name, own in self.names.items() if not is_pattern(name)}

    @functools.cached_property
    def betas(self) -> str:
        """Its own, in whatever case of letters a person wrote the header."""
        return str(Headers(self.headers).get("anthropic-beta", ""))

    def served(self, model: str) -> str:
        """What is asked for there, for a name in any case of letters."""
        return self.written.get(model.lower(), model)


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

# What a suffix such as (high) may become: a model's levels, or its least and largest budget in
# tokens.  Of several patterns that fit the longest counts; nothing: the model does not think.
# Names that no row knows are taken for one of the newest.  "auto" before the levels: it thinks
# unless it is told not to (clients.md).
OLDER_EFFORTS = "none minimal low medium high xhigh"
CLAUDE_THINKING = {
    "claude-*": "auto low medium high xhigh max",
    "claude-[23]*": "",
    "claude-3-7-*": "1024-4096",
    "claude-*-4-5*": "1024-59904",
    "claude-opus-4-[012]*": "1024-27904",
    "claude-opus-4-6*": "low medium high max",
    "claude-opus-4-[78]*": "low medium high xhigh max",
    "claude-sonnet-4-[02]*": "1024-59904",
    "claude-sonnet-4-6*": "low medium high",
}
GPT_THINKING = {
    "gpt-*": "low medium high xhigh max ultra",
    "gpt-*-luna*": "low medium high xhigh max",
    "gpt-[34]*": "",
    "gpt-5": OLDER_EFFORTS,
    "gpt-5-*": OLDER_EFFORTS,
    "gpt-5.[0-5]*": OLDER_EFFORTS,
    "gpt-oss-*": "low medium high",
    "codex-auto-review": "low medium high xhigh max",
}
GEMINI_THINKING = {
    "gemini-*": "minimal low medium high",
    "gemini-3-pro*": "low high",
    "gemini-3.1-pro*": "low medium high",
    "gemini-2*": "0-24576",
    "gemini-2.5-pro*": "128-32768",
    "gemma-*": "",
}
THINKING = {**CLAUDE_THINKING, **GPT_THINKING, **GEMINI_THINKING, "*": OLDER_EFFORTS}

MOST_TOKENS = {  # that a model writes (providers.md 1.7); of several patterns the longest counts
    "claude-*": 128000,
    "claude-*-4-5*": 64000,
    "claude-sonnet-4-*": 64000,
    "claude-opus-4-[012]*": 32000,
    "claude-3-[57]-*": 8192,
    "claude-[23]*": 4096,
    "*": 32000,
}
# Of Claude's models these take temperature, top_p and top_k; later ones refuse them.
CLAUDE_SAMPLES = ("claude-[23]*", "claude-*-4-[0-6]*")
# OpenAI's that think refuse them, too, and want another word for max_tokens in Chat.
OPENAI_THINKS = ("gpt-[5-9]*", "o[1-9]*", "codex-*")

# The names that clients are shown; a pattern behind them serves what comes next year.
CLAUDE_MODELS = (
    *("claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5"),
    *("claude-opus-5", "claude-sonnet-5"),
    *("claude-fable-5-2", "claude-fable-5-1", "claude-fable-5"),
    *("claude-mythos-5-2", "claude-mythos-5-1", "claude-mythos-5"),
    *("claude-opus-4-8", "claude-opus-4-7", "claude-opus-4-6", "claude-opus-4-5-20251101"),
    *("claude-sonnet-4-6", "claude-sonnet-4-5-20250929", "claude-haiku-4-5-20251001"),
)
GPT_MODELS = (
    *("gpt-6.2-sol", "gpt-6.2-astra", "gpt-6.1-sol", "gpt-6.1-terra"),
    *("gpt-6-sol", "gpt-6-astra", "gpt-6-luna"),
    *("gpt-5.6-sol", "gpt-5.6-terra", "gpt-5.6-luna", "gpt-5.5", "gpt-5.4", "gpt-5.4-mini"),
)
GEMINI_MODELS = (
    *("gemini-3.5-flash", "gemini-3.1-pro-preview", "gemini-3.1-flash-lite"),
    *("gemini-3-pro-preview", "gemini-3-flash-preview"),
    *("gemini-2.5-pro", "gemini-2.5-flash", "gemini-2.5-flash-lite"),
)
ANTIGRAVITYS_OWN = ("gemini-claude-*", "gemini-3*-pro-high", "gemini-3*-pro-low")
MESSAGES = {
    "messages": "/v1/messages",
    "count_tokens": "/v1/messages/count_tokens",
}
GEMINI_METHODS = {
    "generateContent": "/v1beta/models/{model}:generateContent",
    "streamGenerateContent": "/v1beta/models/{model}:streamGenerateContent",
    "countTokens": "/v1beta/models/{model}:countTokens",
}
CODE_ASSIST_METHODS = {
    "generateContent": "/v1internal:generateContent",
    "streamGenerateContent": "/v1internal:streamGenerateContent",
    "countTokens": "/v1internal:countTokens",
}
CHAT = {"completions": "/v1/chat/completions"}
GOOGLE_SCOPES = (
    "https://www.googleapis.com/auth/cloud-platform"
    " https://www.googleapis.com/auth/userinfo.email"
    " https://www.googleapis.com/auth/userinfo.profile"
)
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

GEMINI_METADATA = {
    "ideType": "IDE_UNSPECIFIED",
    "platform": "PLATFORM_UNSPECIFIED",
    "pluginType": "GEMINI",
}

LOGINS = {
    "claude": Provider(
        name="claude",
        also=("anthropic",),
        base_url="https://api.anthropic.com",
        paths=MESSAGES,
        models=(*CLAUDE_MODELS, "claude-*"),
        excluded_models=("claude-*-thinking",),  # names of Antigravity's
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
        models=(*GPT_MODELS, "gpt-5.3-codex-spark", "codex-auto-review", "gpt-*", "codex-*"),
        excluded_models=("gpt-oss-*",),
        only_streams=("*",),
        thinking=THINKING,
        headers={"originator": "codex_cli_rs", "User-Agent": "codex_cli_rs/0.101.0"},
        passes=(
            "originator",
            "user-agent",
            "version",
            "openai-beta",
            "session-id",
            "session_id",
            "thread-id",
            "x-client-request-id",
            "x-openai-internal-codex-responses-lite",  # models refuse calls without it (clients.md)
            "x-codex-[!r]*",  # not x-codex-routing-hint: it is of the login that the client has
        ),
        own_headers=("x-codex-turn-state",),
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
        device_url="https://auth.openai.com/api/accounts/deviceauth",
        device_page_url="https://auth.openai.com/codex/device",
        device_callback_url="https://auth.openai.com/deviceauth/callback",
    ),
    "gemini": Provider(
        name="gemini",
        also=("google", "gemini-cli"),
        base_url="https://cloudcode-pa.googleapis.com",
        paths=CODE_ASSIST_METHODS,
        models=(*GEMINI_MODELS, "gemini-*"),
        excluded_models=ANTIGRAVITYS_OWN,
        thinking=THINKING,
        headers={"User-Agent": "GeminiCLI/0.34.0"},
        wraps=True,
        warning=(
            "Google ended Code Assist logins of consumer accounts in June 2026. Accounts with a\n"
            "paid licence can still use it; they may have to name their Google Cloud project as\n"
            "providers.gemini.project in config.yaml.\n"
        ),
        authorize_url="https://accounts.google.com/o/oauth2/v2/auth",
        authorize_query={"access_type": "offline", "prompt": "consent"},
        token_url="https://oauth2.googleapis.com/token",
        token_form=True,
        client_id="681255809395-oo8ft2oprdrnp9e3aqf6av3hmdib135j.apps.googleusercontent.com",
        # Of an installed app, as Google publishes it: no secret.  Scanners know the whole form.
        client_secret="GOCSPX" + "-4uHgMPm-1o7Sk-geV6Cu5clXFsxl",
        scope=GOOGLE_SCOPES,
        profile_url="https://www.googleapis.com/oauth2/v1/userinfo?alt=json",
        callback_port=8085,
        callback_path="/oauth2callback",
        load_path="/v1internal:loadCodeAssist",
        metadata=GEMINI_METADATA,
        onboard_path="/v1internal:onboardUser",
        onboard_metadata=GEMINI_METADATA,
        tier="legacy-tier",
    ),
    "antigravity": Provider(
        name="antigravity",
        base_url="https://daily-cloudcode-pa.googleapis.com",
        more_hosts=("https://cloudcode-pa.googleapis.com",),
        paths=CODE_ASSIST_METHODS,
        models=(  # what clients call them -> what the backend does (providers.md 4)
            {"alias": "gemini-3.1-pro-preview", "name": "gemini-3.1-pro-high"},
            {"alias": "gemini-3-pro-preview", "name": "gemini-3-pro-high"},
            {"alias": "gemini-3-flash-preview", "name": "gemini-3-flash"},
            {"alias": "gemini-3-pro-image-preview", "name": "gemini-3-pro-image"},
            {"alias": "gemini-2.5-computer-use-preview-10-2025", "name": "rev19-uic3-1p"},
            {"alias": "gemini-claude-sonnet-4-5", "name": "claude-sonnet-4-5"},
            {"alias": "gemini-claude-sonnet-4-5-thinking", "name": "claude-sonnet-4-5-thinking"},
            {"alias": "gemini-claude-opus-4-5-thinking", "name": "claude-opus-4-5-thinking"},
            {"alias": "gemini-claude-opus-4-6-thinking", "name": "claude-opus-4-6-thinking"},
            *("gemini-3.1-pro-high", "gemini-3.1-pro-low", "gemini-3.1-flash-image"),
            *("gemini-3-pro-high", "gemini-3-pro-low", "gemini-3-flash"),
            *("claude-opus-4-6-thinking", "claude-sonnet-4-6", "gpt-oss-120b-medium"),
            # No claude-*: a mapping of a Claude model would never come to its turn.
            *("gemini-*", "claude-*-thinking", "gpt-oss-*"),
        ),
        only_streams=("claude-*", "gemini-3-pro*", "*-image*"),
        thinking={**GEMINI_THINKING, "claude-*": "1024-64000", "*": ""},
        max_tokens=64000,
        headers={"User-Agent": "antigravity/2.1.0 darwin/arm64"},
        wraps=True,
        envelope={"userAgent": "antigravity", "requestType": "agent"},
        warning=(
            "Google has disabled accounts that used an Antigravity login in other programs than\n"
            "Antigravity, with a 403 that speaks of its terms of service. It may happen to yours,\n"
            "and the account is the one that your mail is in.\n"
        ),
        authorize_url="https://accounts.google.com/o/oauth2/v2/auth",
        authorize_query={"access_type": "offline", "prompt": "consent"},
        token_url="https://oauth2.googleapis.com/token",
        token_form=True,
        client_id="1071006060591-tmhssin2h21lcre235vtolojh4g403ep.apps.googleusercontent.com",
        client_secret="GOCSPX" + "-K58FWR486LdLJ1mLB8sXC4z6qDAf",  # as above
        scope=(
            f"{GOOGLE_SCOPES} https://www.googleapis.com/auth/cclog"
            " https://www.googleapis.com/auth/experimentsandconfigs"
        ),
        profile_url="https://www.googleapis.com/oauth2/v2/userinfo?alt=json",
        callback_port=51121,
        callback_path="/oauth-callback",
        load_path="/v1internal:loadCodeAssist",
        metadata={"ideType": "ANTIGRAVITY"},
        onboard_path="/v1internal:onboardUser",
        onboard_metadata={
            "ide_type": "ANTIGRAVITY",
            "ide_version": "2.1.0",
            "ide_name": "antigravity",
        },
        tier_key="tier_id",
        tier="free-tier",
        onboard_tries=5,
    ),
}

API_KEYS = {  # the lists of keys in config.yaml; an entry overrides its list's row
    "claude-api-key": Provider(
        name="claude-api-key",
        base_url="https://api.anthropic.com",
        paths=MESSAGES,
        models=(*CLAUDE_MODELS, "claude-*"),
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
        models=(*GPT_MODELS, "gpt-*", "chatgpt-*", "codex-*", "o[1-9]*"),
        thinking=THINKING,
        passes=CLIENT_HEADERS,
    ),
    "gemini-api-key": Provider(
        name="gemini-api-key",
        base_url="https://generativelanguage.googleapis.com",
        paths=GEMINI_METHODS,
        models=(*GEMINI_MODELS, "gemini-*", "gemma-*"),
        excluded_models=ANTIGRAVITYS_OWN,
        thinking=THINKING,
        passes=CLIENT_HEADERS,
        key_header="x-goog-api-key",
    ),
    "openai-compatibility": Provider(paths=CHAT, thinking=THINKING, passes=CLIENT_HEADERS),
}


def is_pattern(name: str) -> bool:
    return bool(set(name) & set("*?["))


@functools.lru_cache(256)
def any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("(?i)" + "|".join(map(fnmatch.translate, patterns)))


@functools.lru_cache(4096)
def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a name fits one of the patterns, in any case of letters.  Callers cut long ones."""
    return bool(patterns) and any_of(patterns).match(name) is not None


def best_fit(name: str, patterns: Iterable[str]) -> str:
    """The longest of the patterns that fit; `*` for none."""
    return longest_fit(name[:200], tuple(patterns))


@functools.lru_cache(1024)
def longest_fit(name: str, patterns: tuple[str, ...]) -> str:
    return max((p for p in patterns if matches(name, (p,))), key=len, default="*")


def most_tokens(model: str) -> int:
    return MOST_TOKENS[best_fit(model, MOST_TOKENS)]


class Thinking(NamedTuple):
    """How a model can be told to think; neither levels nor limits: it does not."""

    levels: list[str]
    limits: list[int]  # its least and largest budget, or none
    by_itself: bool


@functools.lru_cache(1024)
def read_thinking(line: str) -> Thinking:
    """Of a line of THINKING."""
    levels = [word for word in line.split() if word in BUDGETS]
    limits = [int(digits) for digits in re.findall(r"\d{1,9}", line)]
    return Thinking(levels, limits if len(limits) == 2 else [], "auto" in line.split())


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
        f"a whole number from {low} to {high}",
        lambda value: type(value) is int and low <= value <= high,
    )


def amount_key(default: float) -> Value:
    return Value(
        default,
        "a number from 0 to 1000000000",
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
    if name == "more_hosts":
        return ListOf(address_key(), default)
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
            reason = getattr(error, "problem", None) or getattr(error, "strerror", None)
            raise Failure(f"{place}: cannot be read: {reason or explain(error)}") from error

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
    for directory in (Path.cwd(), Path(__file__).resolve().parent, own):
        if (directory / "config.yaml").is_file():
            return directory / "config.yaml"
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


def one_of_each(headers: dict[str, str]) -> dict[str, str]:
    """Of headers that differ in the case of letters the last one: a person's, not the row's."""
    return dict({name.lower(): (name, value) for name, value in headers.items()}.values())


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
    if changes["base_url"] != row.base_url and changes["more_hosts"] == row.more_hosts:
        changes["more_hosts"] = ()  # they stand for the row's own address only
    changes["headers"] = one_of_each(changes["headers"])
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

    def address(self, port: int = 0) -> str:
        """Where clients on this machine find the proxy."""
        everywhere = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
        host = str(self.config["host"])
        host = everywhere.get(host, host)
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{port or self.config['port']}"

    @property
    def log_file(self) -> Path | None:
        return self.auth_dir / "logs/ampproxy.log" if self.config["logging-to-file"] else None

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
#
# In Gemini's files the tokens stand in a table of their own, `token` (peers.md 1.12).  Here all
# tokens are flat: reading lifts them out, and saving puts them back.

NESTED = {"access_token": "access_token", "refresh_token": "refresh_token", "expired": "expiry"}


def flat(token: Json) -> Json:
    """A token file's table, with what stands in its inner one."""
    inner = as_dict(token.get("token"))
    return token | {name: inner[key] for name, key in NESTED.items() if key in inner}


def nested(token: Json) -> Json:
    """The same as it is kept in the file: in an inner table where the file has one."""
    inner = token.get("token")
    if not isinstance(inner, dict):
        return token
    outer = without(token, *NESTED)
    changes = {key: token[name] for name, key in NESTED.items() if name in token}
    return outer | {"token": inner | changes}


def replace_file(path: Path, raw: bytes, mode: int = 0o600) -> None:
    """All of it or nothing: private from the first byte, synced, renamed over the old file."""
    path = path.resolve()  # the target of a link, not the link
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        draft.chmod(mode)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def save_token(path: Path, token: Json) -> None:
    path = path.resolve()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(OSError):  # somebody else's directory, that we may write to
        path.parent.chmod(0o700)
    replace_file(path, json.dumps(nested(token), indent=2).encode() + b"\n")


def read_token(path: Path) -> Json:
    token = parse_object(read_file(path))
    if not isinstance(token.get("type"), str):
        raise ValueError("it has no 'type'")
    if not is_proxy(proxy_of(token)):
        raise ValueError(f"its proxy-url: expected {proxy_key().expected}")
    return flat(token)


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
            descriptor = os.open(lock_of(path), flags, 0o600)
            stack.callback(os.close, descriptor)
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


def jwt_payload(token: Any) -> Json:
    """What a JSON web token says, unchecked: it only names its owner to himself."""
    try:
        payload = str(token).split(".")[1]
        return parse_object(base64.urlsafe_b64decode(payload + "=="))
    except (ValueError, LookupError):
        return {}


def claims(token: Json) -> Json:
    """E-mail, account_id and plan, as far as ChatGPT's id token tells (providers.md 2.1)."""
    payload = jwt_payload(token.get("id_token"))
    auth = as_dict(payload.get("https://api.openai.com/auth"))
    found = {
        "account_id": auth.get("chatgpt_account_id"),
        "plan": auth.get("chatgpt_plan_type"),
        "email": auth.get("email") or payload.get("email"),
    }
    return {name: value for name, value in found.items() if value}


def token_name(kind: str, email: str) -> str:
    return f"{kind}-{re.sub(r'[^A-Za-z0-9.@+_-]', '_', email)}.json"


# -- Logins of other programs on this machine --
#
# They are read, never written, and nothing of them is redeemed here.  A copy remembers the file
# that it came from: near its expiry that is read again, as the other program may have refreshed
# what both of them use.  A reader makes a token of ours out of a file, or nothing: {}.
#
# To add a program, write its reader and name it in SOURCES.

# What is taken from there when it is newer.
REFRESHED = ("access_token", "refresh_token", "id_token", "expired", "last_refresh", "token")


def text_in(path: Path, *keys: str) -> str:
    """A text in a JSON file; "" for none."""
    try:
        value: Any = parse_object(read_file(path))
    except (OSError, ValueError):
        return ""
    for key in keys:
        value = as_dict(value).get(key)
    return value if isinstance(value, str) else ""


def of_milliseconds(value: Any) -> str:
    return rfc3339(number(value // 1000)) if isinstance(value, (int, float)) else ""


def read_claude_code(stored: Json, path: Path) -> Json:
    found = as_dict(stored.get("claudeAiOauth"))
    places = (path.with_name(".claude.json"), path.parent.parent / ".claude.json")
    emails = [text_in(place, "oauthAccount", "emailAddress") for place in places]
    return {
        "type": "claude",
        "email": next(filter(None, emails), ""),
        "access_token": found.get("accessToken"),
        "refresh_token": found.get("refreshToken") or "",
        "expired": of_milliseconds(found.get("expiresAt")),
        "plan": found.get("subscriptionType") or "",
    }


def read_codex_cli(stored: Json, path: Path) -> Json:
    found = as_dict(stored.get("tokens"))
    ends = number(jwt_payload(found.get("access_token")).get("exp"))
    return {
        "type": "codex",
        "email": claims(found).get("email", ""),
        "access_token": found.get("access_token"),
        "refresh_token": found.get("refresh_token") or "",
        "id_token": found.get("id_token") or "",
        "account_id": found.get("account_id") or "",
        "expired": rfc3339(ends) if ends else "",
        "last_refresh": stored.get("last_refresh") or "",
    }


def read_gemini_cli(stored: Json, path: Path) -> Json:
    """In CLIProxyAPI's form, which has the token in a table of its own."""
    ends = of_milliseconds(stored.get("expiry_date"))
    names = ("access_token", "refresh_token", "token_type", "scope")
    token = {name: stored[name] for name in names if name in stored}
    active = text_in(path.with_name("google_accounts.json"), "active")
    email = jwt_payload(stored.get("id_token")).get("email") or active
    return {"type": "gemini", "email": email, "token": {**token, "expiry": ends}}


def read_cliproxyapi(stored: Json, path: Path) -> Json:
    return stored if str(stored.get("type")) in LOGINS else {}


@dataclass(frozen=True)
class Program:
    name: str
    folder: Callable[[], Path]
    pattern: str  # of its files there
    read: Callable[[Json, Path], Json]


SOURCES = (
    Program(
        "Claude Code",
        lambda: folder_of("CLAUDE_CONFIG_DIR", "~/.claude"),
        ".credentials.json",
        read_claude_code,
    ),
    Program("Codex CLI", lambda: folder_of("CODEX_HOME", "~/.codex"), "auth.json", read_codex_cli),
    Program(
        "Gemini CLI",
        lambda: folder_of("", "~/.gemini"),
        "oauth_creds.json",
        read_gemini_cli,
    ),
    Program(
        "CLIProxyAPI", lambda: folder_of("", "~/.cli-proxy-api"), "[!.]*.json", read_cliproxyapi
    ),
)


def ends_at(token: Json) -> float:
    """When its access token expires; 0 where nobody said."""
    return parse_time(token.get("expired"))


def read_source(source: Program, path: Path) -> Json:
    """Another program's login as a token of ours; {} where the file holds none.  May raise."""
    token = flat(source.read(parse_object(read_file(path)), path))
    return token if token.get("access_token") else {}


def newer_at_source(token: Json) -> Json:
    """What the file that a login was copied from says now, if that is newer; else {}."""
    origin = as_dict(token.get("source"))
    found = Json()
    for source in SOURCES:
        if source.name == origin.get("program"):
            with suppress(OSError, ValueError):
                found = read_source(source, Path(str(origin.get("file"))))
    same_owner = found.get("email") in ("", None, token.get("email"))
    if not found or not same_owner or ends_at(found) <= ends_at(token):
        return {}
    return {name: found[name] for name in REFRESHED if name in found}


# == The network ===================================================================================
#
# The way out, and the way in.  No cookie is kept, no redirect followed, no header added, nothing
# unpacked unless somebody asks for it.  Time limits are those of a head; bodies have their own.

NET_ERRORS = (
    aiohttp.ClientError,
    HttpProcessingError,
    OSError,
    LookupError,
    ValueError,
    zlib.error,
)


class Redirected(ValueError):
    """Of a WebSocket's handshake."""


class BrokenHeader(ValueError):
    """It would begin another one."""


async def refuse_redirect(*_: object) -> None:
    """For WebSockets: aiohttp has no switch for them, and would follow with all our keys."""
    raise Redirected


NET_WORDS: tuple[tuple[type[Exception], str], ...] = (  # the first that fits
    (Redirected, "it redirects"),
    (BrokenHeader, "a header for it, perhaps the token, holds a line break"),
    (TimeoutError, "it does not answer in time"),
    (aiohttp.ServerDisconnectedError, "it hung up without an answer"),
    (aiohttp.ClientConnectorCertificateError, "its certificate is not trusted"),
    (aiohttp.ClientSSLError, "no TLS connection can be made"),
    (aiohttp.ClientConnectorDNSError, "its name is not known"),
    (aiohttp.ClientPayloadError, "its answer was cut short"),
    (web.RequestPayloadError, "it was cut short"),
    (aiohttp.ClientResponseError, "what it sent is no HTTP"),
    (HttpProcessingError, "what it sent is no HTTP"),
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


@functools.lru_cache(1024)
def joined(base: str, path: str) -> str:
    """An address with a path; a version part that both have stands there once."""
    base = base.rstrip("/")
    found = re.search(r"/(?:v\d\w{0,9}(?:/openai)?|backend-api(?:/codex)?)$", base)
    if found and found[0].startswith("/backend-api"):
        path = path.removeprefix(found[0])
    elif found:
        path = re.sub(r"^/v\d\w*", "", path)
    return base + path


HEAD_LIMIT = 65536  # bytes of a head, a client's or an answer's
ANSWER_HEAD_WAIT = 60  # seconds from the first byte of an answer to the end of its head


class AnswerReader(ResponseHandler):
    """aiohttp's, with a time for the head of an answer: one that drips, or has 1xx without end.

    The first byte may come late: a long answer in one piece takes minutes before its head.
    """

    awaits_head = False
    is_new = True  # nothing was asked on this connection yet
    head_timer: asyncio.TimerHandle | None = None
    arrivals: Any = None  # a poll object for its socket

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        with suppress(AttributeError, OSError, ValueError):  # Windows has no poll
            number = transport.get_extra_info("socket").fileno()
            self.arrivals = select.poll()  # not select(): that ends at file 1,024
            self.arrivals.register(number, select.POLLIN)

    def has_bytes(self) -> bool:
        """Whether the other side has sent something, or has hung up, that was not read yet."""
        return self.arrivals is not None and bool(self.arrivals.poll(0))

    def set_response_params(self, **params: Any) -> None:
        self.awaits_head, self.is_new = True, False
        super().set_response_params(**params)

    def data_received(self, data: bytes) -> None:
        if not self.awaits_head and self._payload is not None and self._payload.is_eof():
            self.force_close()  # half a head is a remainder, too, and the parser says nothing of it
        super().data_received(data)
        if self.awaits_head and self.head_timer is None and self.transport:
            self.head_timer = self._loop.call_later(ANSWER_HEAD_WAIT, self.too_slow)

    def resume_reading(self, *args: Any, **how: Any) -> None:
        """aiohttp asks for it with each piece; there is rarely anything to resume."""
        if self._reading_paused:
            super().resume_reading(*args, **how)

    def feed_data(self, data: Any, size: int = 0) -> None:
        if data[0].code >= 200 or data[0].code == 101:  # a WebSocket lives for hours
            self.head_came()
        super().feed_data(data, size)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.head_came()
        super().connection_lost(exc)

    def head_came(self) -> None:
        self.awaits_head = False
        if self.head_timer:
            self.head_timer.cancel()
            self.head_timer = None

    def too_slow(self) -> None:
        self.set_exception(TimeoutError())
        if self.transport:
            self.transport.abort()


class Connector(aiohttp.TCPConnector):
    """Gives out no kept connection on which anything came after the end of its answer.

    aiohttp takes what comes there for the next answer, and so would give it to the next client.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        factory: Any = functools.partial(AnswerReader, loop=self._loop)
        self._factory = factory

    async def connect(self, *args: Any, **more: Any) -> Any:
        while True:
            connection = await super().connect(*args, **more)
            protocol: Any = connection.protocol
            if protocol.is_new and protocol.is_connected():
                return connection
            if not (protocol.should_close or protocol.has_bytes()):
                return connection
            connection.close()
            if protocol.is_new:  # a port forwarded to nobody: another one would end like it
                raise aiohttp.ServerDisconnectedError


# -- The lean way --
#
# aiohttp's client makes a request, a response, a writer's task and a timeout for each call: of a
# small one that was a fifth of all the time spent here.  A model call needs none of them.  It takes
# a connection from the same connector (its pool, names, TLS and limits), writes a head made here,
# and has the answer read by the same parser.  Whatever is unusual goes the ordinary way.

JOINED = 1 << 18  # bytes of a request that are copied into one write


class LeanAnswer:
    """An answer whose head has come: what is used of aiohttp's ClientResponse, by its names."""

    def __init__(self, connection: aiohttp.connector.Connection, message: Any, content: Any):
        self.status: int = message.code
        self.reason: str = message.reason
        self.headers: Any = message.headers
        self.content: aiohttp.StreamReader = content
        self.connection: aiohttp.connector.Connection | None = connection
        content.on_eof(self.ended)

    @property
    def content_type(self) -> str:
        return str(self.headers.get("Content-Type", "")).partition(";")[0].strip().lower()

    def ended(self) -> None:
        """The last byte is here: another call may have the connection, if it took all of ours."""
        if not self.connection:
            return
        if has_unsent(self.connection):
            cut(self.connection)
        else:
            self.connection.release()
        self.connection = None

    def close(self) -> None:
        if self.connection:
            cut(self.connection)
            self.connection = None
            self.content.set_exception(aiohttp.ClientConnectionError("closed"))


def has_unsent(connection: aiohttp.connector.Connection) -> bool:
    return bool(connection.transport and connection.transport.get_write_buffer_size())


def cut(connection: aiohttp.connector.Connection) -> None:
    """Close it.  Nobody gets the rest of a prompt whose answer is over, or wanted no longer.

    At once: TLS would wait half a minute for an upstream that takes nothing, and keep the prompt.
    """
    if connection.transport:
        connection.transport.abort()
    connection.close()


Upstream = aiohttp.ClientResponse | LeanAnswer


def request_head(url: URL, headers: Headers) -> bytes:
    """BrokenHeader for a line break, or a NUL, in a header."""
    lines = [f"POST {url.raw_path_qs} HTTP/1.1"]
    if "Host" not in headers:
        lines.append(f"Host: {url.host_port_subcomponent}")
    lines += [f"{name}: {value}" for name, value in headers.items()]
    head = "\r\n".join(lines)
    breaks = len(lines) - 1
    if head.count("\r") != breaks or head.count("\n") != breaks or "\0" in head:
        raise BrokenHeader
    return head.encode() + b"\r\n\r\n"


def send_request(transport: Any, head: bytes, body: list[Any]) -> None:
    """All of it at once: the body is in memory anyway, and an answer may come before its end."""
    pieces = [head, *body]
    if sum(map(len, body)) < JOINED:
        transport.write(b"".join(pieces))
    else:
        transport.writelines(pieces)


async def answer_head(protocol: Any, idle: float) -> tuple[Any, Any]:
    """Head and body of the answer, past any 1xx; TimeoutError when it does not come."""

    def too_late() -> None:
        protocol.set_exception(TimeoutError())

    timer = protocol._loop.call_later(idle, too_late) if idle else None
    try:
        while True:
            message, content = await protocol.read()
            if message.code >= 200 or message.code == 101:
                return message, content
    finally:
        if timer:
            timer.cancel()


@functools.lru_cache(64)
def connect_limits(idle: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=None, connect=idle or None, sock_connect=30)


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


MOST_ORIGINS = 100  # that are remembered; only a person who edits the configuration adds one


def unreachable(url: str, error: Exception) -> ProxyError:
    host = as_url(url).host or "an empty upstream-url"
    problem = Problem(502, f"{host} cannot be reached: {net_words(error)}")
    if is_local(error):
        problem.codes = frozenset({LOCAL})
    return ProxyError(problem)


def sendable(body: list[Any]) -> Any:
    """What aiohttp sends; large pieces are not put together."""
    return body[0] if len(body) == 1 else in_pieces(body)


async def in_pieces(pieces: list[Any]) -> AsyncIterator[Any]:
    for piece in pieces:
        yield piece


class Net:
    def __init__(self, live: Live) -> None:
        self.live = live
        self.retired: dict[Upstream, asyncio.Task[None]] = {}
        # aiohttp's own look into the environment is slow, and reads ~/.netrc, too.
        self.proxies = {} if live.config["proxy-url"] else environment_proxies()
        self.connector = Connector(limit=0, keepalive_timeout=20)
        self.origins: dict[URL, aiohttp.ClientRequest] = {}  # what the connector wants to know
        options: Any = {
            "connector": self.connector,
            "cookie_jar": aiohttp.DummyCookieJar(),
            "auto_decompress": False,
            "skip_auto_headers": ("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            "max_line_size": HEAD_LIMIT,
            "max_field_size": HEAD_LIMIT,
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
    ) -> aiohttp.ClientResponse:
        """An answer whose headers have come, within `idle` seconds; 0 is any time.

        Whoever asks releases it in the end.  ProxyError 502 when none comes.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
        more |= {"timeout": timeout, "proxy": self.proxy(url, proxy), "allow_redirects": False}
        try:
            async with asyncio.timeout(idle or None):
                return await self.session.request(method, as_url(url), **more)
        except NET_ERRORS as error:
            raise unreachable(url, error) from None

    async def post(
        self, url: str, headers: Headers, body: list[Any], idle: float, proxy: str = ""
    ) -> Upstream:
        """As `ask`, for a model call: its body is here, in pieces."""
        headers["Content-Length"] = str(sum(map(len, body)))
        target = as_url(url)
        if self.proxy(url, proxy) or target.raw_user or not target.raw_host:
            return await self.ask("POST", url, idle, proxy, headers=headers, data=sendable(body))
        try:
            return await self.post_lean(target, headers, body, idle)
        except NET_ERRORS as error:
            raise unreachable(url, error) from None

    async def post_lean(
        self, url: URL, headers: Headers, body: list[Any], idle: float
    ) -> LeanAnswer:
        head = request_head(url, headers)
        request = self.origin(url)
        connection = await self.connector.connect(request, [], connect_limits(idle))
        try:
            protocol, transport = connection.protocol, connection.transport
            if protocol is None or transport is None:  # it broke as soon as it was there
                raise aiohttp.ServerDisconnectedError
            protocol.set_response_params(
                read_until_eof=True,
                auto_decompress=False,
                max_line_size=HEAD_LIMIT,
                max_field_size=HEAD_LIMIT,
            )
            send_request(transport, head, body)
            message, content = await answer_head(protocol, idle)
            return LeanAnswer(connection, message, content)
        except BaseException:
            cut(connection)
            raise

    def origin(self, url: URL) -> aiohttp.ClientRequest:
        origin = url.origin()
        if origin not in self.origins:
            if len(self.origins) >= MOST_ORIGINS:
                self.origins.clear()
            loop = asyncio.get_running_loop()
            self.origins[origin] = aiohttp.ClientRequest("POST", origin, loop=loop)
        return self.origins[origin]

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
        except NET_ERRORS as error:
            error.__traceback__ = None  # the stream keeps the error
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
    told = [words for words in told if not words.isdigit()]  # Google's code is the status again
    return ": ".join(dict.fromkeys(words for words in told if words != "error"))[:300]


HEAD_WAIT = 30  # seconds for a client's head
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
        # These know the connection: without them it goes at once, with all that it holds.
        self.body = self._keepalive_handle = None

    def eof_received(self) -> bool:  # type: ignore[override]
        """A client that ends in the middle of a body may still be listening: it gets its 400."""
        if self.body is None or self.body.is_eof():
            return False
        self.body.set_exception(web.RequestPayloadError("cut short"))
        self.body.feed_eof()
        self.close()  # after the answer
        return True

    def resume_reading(self, *args: Any, **how: Any) -> None:
        """As AnswerReader's."""
        if self._reading_paused:
            super().resume_reading(*args, **how)

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


FILES, STRANGERS = 65536, 4096  # open files where there is no limit; strangers at the most


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
            reason = os.strerror(error.errno) if error.errno else explain(error)
            raise Failure(f"cannot listen on {host}:{port} ({reason}): {hint}") from error
        yield runner.addresses[0][1]


# == Signing in ====================================================================================
#
# OAuth with PKCE (RFC 7636).  The callback comes to this machine, or its address is pasted into the
# terminal, or a code is typed in on another device, whichever is first.  A login of Google's needs
# a project, too, which Code Assist names or makes.

DEVICE_PAUSE = 5  # seconds between questions whether a code was typed in, where nobody names them
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
    hashed = hashlib.sha256(verifier.encode()).digest()
    return verifier, base64.urlsafe_b64encode(hashed).rstrip(b"=").decode()


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
    if provider.warning:
        say(provider.warning)
    net = Net(live)
    try:
        form = await await_grant(net, provider, browser)
        answer = await ask_token(net, provider, form)
        who = await identity_of(net, provider, answer)
        if provider.wraps:
            who |= await first_project(net, provider, answer["access_token"])
    finally:
        await net.close()
    token = {"type": provider.name, **who, **token_fields(answer, time.time())}
    path = file_of(live.auth_dir, provider, token["email"])
    save_token(path, merge_token(path, {"refresh_token": "", "id_token": ""}, token))
    return token["email"], path


def file_of(folder: Path, provider: Provider, email: str) -> Path:
    """Where a login is kept: in CLIProxyAPI's file of a Google account, if there is one.

    Of others an address may have several accounts, a team's among them.
    """
    own = folder / token_name(provider.name, email)
    if provider.wraps and not own.exists():
        for path in sorted(folder.glob("*.json")):  # older ones do not begin with the provider
            with suppress(OSError, ValueError):
                token = read_token(path)
                if (token["type"], token.get("email")) == (provider.name, email):
                    return path
    return own


async def await_grant(net: Net, provider: Provider, browser: bool) -> Json:
    """What a login that somebody has finished, in whichever way, is redeemed with."""
    waiting = {asyncio.create_task(grant_of_callback(provider, browser))}
    if provider.device_url and not browser:
        waiting.add(asyncio.create_task(grant_of_device(net, provider)))
    try:
        async with asyncio.timeout(provider.login_wait):
            while True:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if form := task.result():
                        return form
    except TimeoutError:
        minutes = f"{provider.login_wait / MINUTE:g} minutes"
        raise Failure(f"nobody has finished the login within {minutes}: run it again") from None
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def grant_of_callback(provider: Provider, browser: bool) -> Json:
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
    return form


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


async def grant_of_device(net: Net, provider: Provider) -> Json:
    """Of a code that is typed in on another device; {} where there is none to be had."""
    status, answer = await ask_device(net, provider, "usercode", {"client_id": provider.client_id})
    code = answer.get("user_code") or answer.get("usercode")  # both occur (providers.md 2.1)
    if status != 200 or not isinstance(code, str):
        say(f"There is no code for another device ({status}: {error_text(answer)}).")
        return {}
    say(f"Or open {provider.device_page_url} on any device, and type in the code {code}\n")
    asked = {"device_auth_id": answer.get("device_auth_id"), "user_code": code}
    pause = max(0.1, number(answer.get("interval")) or DEVICE_PAUSE)
    while True:
        await asyncio.sleep(pause)
        status, answer = await ask_device(net, provider, "token", asked)
        if status == 200 and isinstance(answer.get("authorization_code"), str):
            return {
                "grant_type": "authorization_code",
                "code": answer["authorization_code"],
                "redirect_uri": provider.device_callback_url,
                "code_verifier": str(answer.get("code_verifier")),
            }
        # 403 and 404: nobody has typed it in yet.
        if status not in (403, 404, 408, 429) and status < 500:
            say(f"The code for another device has ended ({status}: {error_text(answer)}).")
            return {}


async def ask_device(net: Net, provider: Provider, what: str, body: Json) -> tuple[int, Json]:
    url, headers = f"{provider.device_url}/{what}", {"Content-Type": "application/json"}
    status, answer, _ = await post_json(net, url, headers, body, provider.proxy_url)
    return status, answer


async def post_json(
    net: Net, url: str, headers: Json, body: Json, proxy: str
) -> tuple[int, Json, frozenset[str]]:
    """Status and answer, a 502 with the reason where none comes; and the codes of a Problem."""
    try:
        status, answer = await net.ask_json("POST", url, headers, write_json(body), proxy)
    except ProxyError as error:
        return 502, {"error": explain(error)}, error.problem.codes
    except NET_ERRORS as error:
        return 502, {"error": net_words(error)}, frozenset()
    return status, answer, frozenset()


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


def token_fields(answer: Json, now: float, known: Json | None = None) -> Json:
    """What a token endpoint's answer changes in a token file, which says `known`."""
    names = ("access_token", "refresh_token", "id_token")
    given = {name: answer[name] for name in names if answer.get(name)}
    lasts = max(5 * MINUTE, number(answer.get("expires_in")) or HOUR)
    if known and "timestamp" in known:  # CLIProxyAPI's files of Antigravity say it once more
        given |= {"expires_in": int(lasts), "timestamp": int(now * 1000)}
    return given | {"last_refresh": rfc3339(now), "expired": rfc3339(now + lasts)}


def client_of(token: Json) -> Json:
    """The app that a token was given to, where its file names one; no other may refresh it."""
    inner = as_dict(token.get("token"))
    found = {name: inner.get(name) for name in ("client_id", "client_secret")}
    return found if all(value and isinstance(value, str) for value in found.values()) else {}


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


# -- The project of a Google login (providers.md 3, 4) --


async def first_project(net: Net, provider: Provider, token: str) -> Json:
    """For the token file; {} where it may be had later.  Failure where Google gives none."""
    try:
        return {"project_id": await find_project(net, provider, token)}
    except ProxyError as error:
        if error.problem.status < 500:
            raise Failure(f"the login is of no use: {explain(error)}") from None
        say(f"{explain(error)}. It is looked for again with the first request.")
        return {}


async def find_project(
    net: Net, provider: Provider, token: str, proxy: str = "", clock: Any = CLOCK
) -> str:
    """The login's project; where it has none, its onboarding makes one.  ProxyError if not."""
    hosts = [provider.base_url, *provider.more_hosts]
    how = (token, proxy or provider.proxy_url)
    named = {"cloudaicompanionProject": provider.project} if provider.project else {}
    body = {"metadata": provider.metadata, **named}
    # Antigravity's projects are known at its last host, production, and made at the first.
    loaded = await ask_code_assist(net, provider, hosts[::-1], provider.load_path, how, body)
    if found := project_of(loaded):
        return found
    tier, why_not = tier_of(loaded, provider), refused_tiers(loaded)
    if tier:
        given = {} if tier == "free-tier" else named
        body = {provider.tier_key: tier, "metadata": provider.onboard_metadata, **given}
        for _ in range(provider.onboard_tries):
            made = await ask_code_assist(net, provider, hosts, provider.onboard_path, how, body)
            if made.get("done"):
                found = project_of(as_dict(made.get("response"))) or provider.project
                break
            await clock.sleep(provider.onboard_pause)
    if not found:
        hint = why_not or f"set providers.{provider.name}.project, if you have one"
        raise fault(403, f"{provider.name} gave the login no project: {hint}")
    return found


async def ask_code_assist(
    net: Net, provider: Provider, hosts: list[str], path: str, how: tuple[str, str], body: Json
) -> Json:
    """The answer of the first host that has one; ProxyError with the words of the last.

    `how`: the token, and the outbound proxy.
    """
    token, proxy = how
    own = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    problem = Problem(502, "it has no host")
    for host in hosts:
        url, headers = joined(host, path), {**provider.headers, **own}
        status, answer, codes = await post_json(net, url, headers, body, proxy)
        if status == 200 and "error" not in answer:
            return answer
        text = error_text(answer)
        words = f"{provider.name} names no project, it answered {status}: {text}"
        status = status if 400 <= status <= 599 else 502
        problem = Problem(status, words, text=text, codes=codes)
        if not is_hosts_fault(status):
            break
    raise ProxyError(problem)


def is_hosts_fault(status: int) -> bool:
    """Whether another host may do better (providers.md 4)."""
    return status in (404, 429) or status >= 500


def project_of(answer: Json) -> str:
    """A text, or a table with an id, under one of three names."""
    for name in ("cloudaicompanionProject", "projectId", "project"):
        value = answer.get(name)
        found = as_dict(value).get("id") or value
        if found and isinstance(found, str):
            return found
    return ""


def tier_of(loaded: Json, provider: Provider) -> str:
    """What to ask the onboarding for; "" where Google says why there is nothing to ask for."""
    allowed = as_dicts(loaded.get("allowedTiers"))
    default = next((tier for tier in allowed if tier.get("isDefault")), {})
    current = as_dict(loaded.get("currentTier"))
    if not allowed and not current and refused_tiers(loaded):
        return ""
    return str(default.get("id") or current.get("id") or provider.tier)


def refused_tiers(loaded: Json) -> str:
    rows = as_dicts(loaded.get("ineligibleTiers"))
    reasons = [str(row.get("reasonMessage") or row.get("reasonCode")) for row in rows]
    return "; ".join(dict.fromkeys(reasons))[:300]


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

SPENT = ("usage_limit_reached", "insufficient_quota")  # codes of a quota's end, ChatGPT's
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


FIREWALL = "@page"  # the code of a page of HTML where an error is expected: a firewall's
PAGE_REST = 2 * MINUTE


def rest_rules() -> tuple[RestRule, ...]:
    some = frozenset
    any_status, refused = range(400, 600), range(400, 500)
    extra_usage = ("*extra usage*", "*long context*")  # Claude's, billed beside the plan
    bad_key = ("*api?key not valid*", "*api?key expired*")  # Google's, with a 400
    no_credit = ("*credit balance*", "*usage_not_included*")
    no_model = ("*model*not supported*",)  # ChatGPT's, for a model that the plan lacks
    revoked = ("*revoked*", "*token*expired*", "*expired*token*")  # Claude's, with a 403
    quota = some({"resource_exhausted", "quota_exhausted", "@7d_oi"})  # one model's, not all
    no_answer = some({"malformed_function_call", "unexpected_tool_call", "empty_answer"})
    no_room = some({"model_capacity_exhausted"})
    spent = some(SPENT)  # it comes with a 400, too
    retried = (408, 500, 502, 503, 504, 529)
    return (
        RestRule(any_status, some({LOCAL}), (), "", 0, "again"),
        RestRule(refused, some(), extra_usage, "", 0, "stop"),
        RestRule((401,), some(), (), "account", NEVER, "refresh"),
        RestRule((403,), some(), revoked, "account", NEVER, "refresh"),
        RestRule((400,), some(), bad_key, "account", NEVER, "next"),
        RestRule(any_status, no_answer, (), "", 0, "again"),
        RestRule((402,), some(), (), "account", 30 * MINUTE, "next"),
        RestRule(any_status, some(), no_credit, "account", 30 * MINUTE, "next"),
        RestRule((403,), some({FIREWALL}), (), "account", PAGE_REST, "next"),
        RestRule((403,), some(), (), "account", DAY, "next"),
        RestRule((404,), some(), (), "model", 30 * MINUTE, "next"),
        RestRule((400,), some(), no_model, "model", 30 * MINUTE, "next"),
        RestRule(any_status, no_room, ("*no capacity*",), "model", 5, "again"),
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
    disabled = False
    priority = 0.0
    plan = ""
    expires = NEVER
    own_proxy = ""

    def __init__(self, kind: str, label: str) -> None:
        self.kind, self.label = kind, label
        self.name = f"{kind} {mask(label)}"  # for the log
        self.rests: dict[str, Rest] = {}
        self.quota: list[Window] = []
        self.in_flight = self.threads = self.turn = 0
        self.counts = Counter(requests=0, errors=0, input_tokens=0, output_tokens=0)
        self.row: Row | None = None  # that it is bound to now

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
        if not self.rests:
            return 0.0
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


class Lease:
    """While an account is being asked: it is counted, and left alone by others, up to PROBE, if it
    has just woken.
    """

    def __init__(self, account: Account, model: str) -> None:
        self.account, self.probed = account, account.resting(model)

    def __enter__(self) -> None:
        self.account.in_flight += 1
        self.account.counts["requests"] += 1

    def __exit__(self, *_: object) -> None:
        self.account.in_flight -= 1
        for rest in self.probed:
            rest.probe_until = 0


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
        self.replaced = "-"  # the access token in the file when ours, or more, was saved there
        self.unsaved = 0  # the errno if that failed: the file says what was before
        self.refreshing: asyncio.Task[None] | None = None
        self.finding: asyncio.Task[Problem | None] | None = None  # its project
        self.take(token)

    def take(self, token: Json) -> None:
        self.token = token
        told = claims(token)
        self.plan = str(told.get("plan") or token.get("plan") or "")
        self.account_id = str(token.get("account_id") or told.get("account_id") or "")
        # CLIProxyAPI's files may list several projects; the first one is asked.
        self.project = str(token.get("project_id") or "").partition(",")[0].strip()
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
        # What could not be saved is newer.
        if given == account.replaced and (account.unsaved or given != known):
            edited = ("disabled", "priority", "proxy_url", "proxy-url")
            kept = {key: token[key] for key in edited if key in token}
            self.save(account, account.token | kept)
            return
        if given != known:
            account.rests, account.retry_at, account.refreshes_failed = {}, 0.0, 0
        account.unsaved = 0
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
        self.adopt(account)
        if not account.stale(refused, soon) or account.retry_at > self.clock.monotonic():
            return
        assert self.net and account.row
        form = {
            "grant_type": "refresh_token",
            "refresh_token": account.token.get("refresh_token"),
            **client_of(account.token),
        }
        if not form["refresh_token"]:
            raise fault(401, "refused, and there is no refresh token")
        if program := as_dict(account.token.get("source")).get("program"):
            log.warning("%s: %s may need a new login now", account.name, program)
        answer = await ask_token(self.net, account.row.provider, form, account.own_proxy)
        self.read(account.path)
        if account.token.get("refresh_token") != form["refresh_token"]:
            return  # a new login came meanwhile
        fields = token_fields(answer, self.clock.time(), account.token)
        self.save(account, account.token | fields)
        account.refreshes_failed = 0
        log.info("%s: token refreshed", account.name)

    async def project(self, account: Account, provider: Provider, token: str) -> str:
        """What a Google login's calls are billed to; looked for once if its file names none."""
        assert isinstance(account, Login)
        if not provider.project and not account.project:
            if account.finding is None:
                finding = self.find_and_save_project(account, provider, token)
                account.finding = asyncio.create_task(finding)
            finished = account.finding
            await asyncio.wait([finished])  # a client that leaves does not cancel it
            if problem := finished.result():
                raise ProxyError(dataclasses.replace(problem, headers=Headers()))
        return provider.project or account.project

    async def find_and_save_project(
        self, account: Login, provider: Provider, token: str
    ) -> Problem | None:
        """Why it was not found, if it was not."""
        assert self.net
        try:
            found = await find_project(self.net, provider, token, account.own_proxy, self.clock)
        except ProxyError as error:
            return error.problem
        finally:
            account.finding = None
        self.read(account.path)
        self.save(account, account.token | {"project_id": found})
        log.info("%s: its project is known now", account.name)
        return None

    def adopt(self, account: Login) -> None:
        """Take a newer token from the program that this login was copied from."""
        if newer := newer_at_source(account.token):
            self.save(account, account.token | newer)
            account.rests, account.retry_at = {}, 0.0
            log.info("%s: %s has a newer token", account.name, account.token["source"]["program"])

    def save(self, account: Login, changes: Json) -> None:
        """On disk before it is used; where that fails it is used, and tried again each second."""
        on_disk = merge_token(account.path, account.token, {})
        if not account.unsaved:
            account.replaced = str(on_disk.get("access_token"))
        account.take(on_disk | changes)
        try:
            account.path.stat()  # gone: the person logged out, or an editor is at it
            save_token(account.path, account.token)
            account.unsaved = 0
        except OSError as error:
            self.stamps[account.path] = None
            if error.errno != account.unsaved:  # once is enough
                words = "%s: the new token cannot be saved: %s"
                log.error(words, account.name, explain(error))
            account.unsaved = error.errno or errno.EIO

    def refresh_failed(self, account: Login, problem: Problem) -> None:
        last = 0 if LOCAL in problem.codes else len(REFRESH_PAUSES) - 1
        pause = REFRESH_PAUSES[min(account.refreshes_failed, last)]
        account.refreshes_failed += 1
        now = self.clock.monotonic()
        account.retry_at = now + pause
        self.read(account.path)
        self.adopt(account)
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


# == The neutral form ==============================================================================
#
# What the four dialects have in common: an Ask is a request, a Reply an answer in the making.  Each
# dialect reads its own words into them and writes them out again; so four readers and four writers
# make sixteen pairs.  What several of them need stands here, too: which names, seals and schemas
# the providers take.
#
# A history is put right before it is written: results behind their calls, nothing empty, no id
# twice.  What a provider makes for itself alone (a seal: Claude's signatures, OpenAI's encrypted
# reasoning, Google's thought signatures) travels through foreign clients in a mark of ours, and
# goes back to its maker only.


class Seal(NamedTuple):
    """An opaque text of a provider about its own thoughts."""

    maker: str  # dialect and family of models, such as anthropic/claude
    data: str
    redacted: bool = False  # it stands for thoughts that nobody may read


class Source(NamedTuple):
    """Where an answer has something from."""

    url: str
    title: str
    quote: str = ""


@dataclass
class Text:
    text: str = ""
    cache: Json | None = None  # the client's mark: the prompt is to be cached up to here
    sources: list[Source] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)  # of an answer that is still being written
    done: bool = False


@dataclass
class Thought:
    text: str = ""
    seal: Seal | None = None
    pieces: list[str] = field(default_factory=list)
    done: bool = False


@dataclass
class ToolCall:
    id: str
    name: str
    text: str = ""  # its arguments: JSON, or the bare text of a free-text tool
    namespace: str = ""
    free: bool = False  # of a free-text tool
    wrapped: bool = False  # ...whose text comes as the one argument of a function
    pieces: list[str] = field(default_factory=list)
    done: bool = False


@dataclass
class Media:
    kind: str  # image, document or audio
    mime: str = ""
    data: str = ""  # in base64...
    url: str = ""  # ...or where it is
    name: str = ""
    cache: Json | None = None


@dataclass
class ToolResult:
    id: str
    parts: list[Text | Media]
    failed: bool = False
    cache: Json | None = None
    call: ToolCall | None = None  # whose result it is, once the history is put right


Part = Text | Thought | ToolCall | ToolResult | Media
Block = Text | Thought | ToolCall | Media  # a part of an answer


@dataclass
class Turn:
    role: str  # user, assistant or system
    parts: list[Part]


@dataclass
class Tool:
    name: str
    description: str = ""
    schema: Json = field(default_factory=dict)  # JSON Schema of its arguments
    namespace: str = ""
    free: bool = False  # it takes bare text, maybe by a grammar
    grammar: Json = field(default_factory=dict)  # its syntax and definition
    strict: bool = False
    cache: Json | None = None


@dataclass
class Ask:
    """A request of a client, whatever its dialect."""

    turns: list[Turn] = field(default_factory=list)
    tools: list[Tool] = field(default_factory=list)
    hosted: dict[str, Json] = field(default_factory=dict)  # web_search, code_execution: options
    choice: str = ""  # auto, any, none, or tool: one of `allowed`
    allowed: list[str] = field(default_factory=list)  # names of tools; empty: all
    parallel: bool | None = None  # several calls at once
    limit: int = 0  # tokens of the answer; 0: the client says none
    stops: list[str] = field(default_factory=list)
    sampling: dict[str, Any] = field(default_factory=dict)  # temperature, top_p, top_k, seed, ...
    schema: Json | None = None  # of a JSON answer; {}: any JSON
    schema_name: str = "answer"
    schema_strict: bool = False
    verbosity: str = ""
    cache_key: str = ""
    # The turns put right, by the maker whose thoughts stay: see history_of.
    histories: dict[str, list[Turn]] = field(default_factory=dict, init=False, compare=False)


@dataclass
class Usage:
    """Tokens: `read` with what came from and went to a cache, `written` with thoughts."""

    read: int = 0
    cached: int = 0
    cache_written: int = 0
    written: int = 0
    thought: int = 0

    def update(self, **figures: Any) -> None:
        """Figures may come more than once, grow, or be null: the largest is right."""
        for name, figure in figures.items():
            if figure:
                setattr(self, name, max(getattr(self, name), int(number(figure))))


def text_of(value: Any) -> str:
    return value if isinstance(value, str) else ""


def plain_parts(parts: list[Part]) -> list[Text | Media]:
    """Those that the result of a call may have."""
    return [part for part in parts if isinstance(part, Text | Media)]


def words_of(parts: Iterable[Part], between: str = "\n") -> str:
    """The texts among the parts."""
    return between.join(part.text for part in parts if isinstance(part, Text))


def digest(*texts: str) -> str:
    """For ids that are made up: the same each time for the same history."""
    text = "\0".join(texts).encode(errors="replace")
    return hashlib.sha256(text).hexdigest()[:24]


# -- Seals on their way through foreign clients --

SEAL_MARK = "ampproxy"
SEAL_MARK_64 = base64.b64encode(b"ampproxy:").decode().rstrip("=")[:11]


def family_of(dialect: str, model: str) -> str:
    """Who can read a seal again: another family of models refuses it."""
    name = model.rpartition("/")[2].lower()
    if dialect == "gemini":
        return "gemini/claude" if "claude" in name else "gemini/gemini"
    if dialect == "chat":
        return "chat/" + re.split(r"[-:.]", name)[0]
    return "anthropic/claude" if dialect == "anthropic" else "responses/gpt"


def seal_text(seal: Seal, dialect: str) -> str:
    """A seal as a client of a dialect carries it: its own as it is, others with our mark."""
    if dialect != "chat" and seal.maker.startswith(dialect + "/") and not seal.redacted:
        return seal.data
    flag = "redacted" if seal.redacted else ""
    marked = f"{SEAL_MARK}:{seal.maker}:{flag}:{seal.data}"
    if dialect == "gemini":  # its SDKs decode what stands there
        return base64.b64encode(marked.encode()).decode()
    return marked


def read_seal(value: Any, own: str) -> Seal | None:
    """`own`: who makes the seals in this dialect that have no mark of ours."""
    if not isinstance(value, str) or not value:
        return None
    text = value
    if text.startswith(SEAL_MARK_64):
        with suppress(ValueError):
            text = base64.b64decode(text).decode()
    if not text.startswith(SEAL_MARK + ":"):
        return Seal(own, value)
    _, maker, flag, data = (text + ":::").split(":", 3)
    return Seal(maker, data.removesuffix(":::"), flag == "redacted")


# -- Arguments of calls; names and ids as a provider wants them --


def arguments_of(call: ToolCall) -> Json:
    """The arguments as an object; {} for what is none."""
    if call.free:
        return {"input": call.text}
    with suppress(ValueError):
        return as_dict(parse_json(call.text.encode()))
    return {}


def json_text(value: Any) -> str:
    return write_json(value).decode()


class NameRule(NamedTuple):
    """How a provider wants a name or an id to look."""

    bad: re.Pattern[str]  # what must not stand there
    longest: int
    first: str = ""  # what it must begin with, as a pattern


WORD_NAME = NameRule(re.compile(r"[^a-zA-Z0-9_-]"), 64)
GOOGLE_NAME = NameRule(re.compile(r"[^a-zA-Z0-9_.:-]"), 64, "[a-zA-Z_]")


def fitted(name: str, rule: NameRule) -> str:
    """A name by the rule; what had to change is told apart by a digest of the whole."""
    clean = rule.bad.sub("_", name)
    if rule.first and not re.match(rule.first, clean):
        clean = "_" + clean
    if clean == name and len(name) <= rule.longest:
        return name
    return f"{clean[: rule.longest - 9]}_{digest(name)[:8]}"


class Names:
    """What the tools of one request are called at the provider, and the way back."""

    def __init__(self, ask: Ask, rule: NameRule) -> None:
        self.rule = rule
        self.there: dict[tuple[str, str], str] = {}
        self.tools: dict[str, Tool] = {}
        for tool in sorted(ask.tools, key=lambda tool: bool(tool.namespace)):
            self.tools.setdefault(self.of(tool.name, tool.namespace), tool)

    def of(self, name: str, namespace: str = "") -> str:
        key = (name, namespace)
        if key not in self.there:
            whole = f"{namespace.rstrip('_')}__{name}" if namespace else name
            wire = fitted(whole, self.rule)
            if wire in self.there.values():
                wire = fitted(f"{whole}\0{namespace}", self.rule)
            self.there[key] = wire
        return self.there[key]

    def meant(self, wire: str) -> Tool:
        """The tool that a call names; of one that was never declared, as it came."""
        return self.tools.get(wire) or Tool(wire)


@dataclass
class Target:
    """Whom a request is written for."""

    model: str
    maker: str  # see family_of
    names: Names
    max_tokens: int  # of an answer, for who must be told one
    hosted: tuple[str, ...] = ()  # the tools of its own that may be asked for


# -- Histories, put right --


def history_of(ask: Ask, maker: str) -> list[Turn]:
    """The turns of a request, put right once for each maker; nobody may change them."""
    if maker not in ask.histories:
        ask.histories[maker] = repaired(ask.turns, maker)
    return ask.histories[maker]


def repaired(turns: list[Turn], maker: str = "") -> list[Turn]:
    """A history as every provider takes it; the given one stays as it is.

    Each call has one result, in the turn behind it, in the order of the calls; whatever was said
    in between comes behind them.  No text is blank, no two turns of one role follow each other.
    `maker`: whose thoughts stay; "" for everybody's.
    """
    merged = merged_turns([Turn(turn.role, sayable(turn, maker)) for turn in turns])
    results = paired(merged)
    kept: list[Turn] = []
    for turn in merged:
        parts: list[Part] = []
        answers: list[Part] = []
        for part in turn.parts:
            if isinstance(part, ToolCall):
                answer = results[id(part)]
                parts.append(answer.call or part)
                answers.append(answer)
            elif not isinstance(part, ToolResult):
                parts.append(part)
        kept += [Turn(turn.role, parts), Turn("user", answers)]
    return merged_turns(kept)


def merged_turns(turns: list[Turn]) -> list[Turn]:
    merged: list[Turn] = []
    for turn in turns:
        if merged and merged[-1].role == turn.role:
            merged[-1].parts += turn.parts
        elif turn.parts:
            merged.append(Turn(turn.role, [*turn.parts]))
    return merged


def sayable(turn: Turn, maker: str) -> list[Part]:
    """No blank text; calls and thoughts are the model's alone, and a system only talks."""
    parts: list[Part] = []
    for part in turn.parts:
        match part:
            case Text():
                fits = bool(part.text.strip())
            case Thought():
                own = not maker or (part.seal is not None and part.seal.maker == maker)
                fits = turn.role == "assistant" and own
            case ToolCall():
                fits = turn.role == "assistant"
            case Media():
                fits = turn.role != "system"
            case _:
                fits = True
        if fits:
            parts.append(part)
    return parts


def paired(turns: list[Turn]) -> dict[int, ToolResult]:
    """The result of each call, by the call's identity; in it the call, with an id of its own.

    A result belongs to the latest turn that called its id.
    """
    calls: list[ToolCall] = []
    waiting: dict[str, deque[ToolCall]] = {}
    found: dict[int, ToolResult] = {}
    early: dict[str, ToolResult] = {}  # results that stand in front of their call
    for turn in turns:
        called = [part for part in turn.parts if isinstance(part, ToolCall)]
        waiting |= {call.id: deque() for call in called}
        for part in turn.parts:
            if isinstance(part, ToolCall):
                calls.append(part)
                waiting[part.id].append(part)
            elif isinstance(part, ToolResult) and part.id not in waiting:
                early.setdefault(part.id, part)
            elif isinstance(part, ToolResult) and waiting[part.id]:
                found[id(waiting[part.id].popleft())] = part
    used: set[str] = set()
    results: dict[int, ToolResult] = {}
    for index, call in enumerate(calls):
        own = dataclasses.replace(call, id=unused_id(call, index, used))
        result = found.get(id(call)) or early.pop(call.id, None) or INTERRUPTED
        inner = [p for p in result.parts if not isinstance(p, Text) or p.text.strip()]
        results[id(call)] = dataclasses.replace(result, id=own.id, parts=inner, call=own)
    return results


INTERRUPTED = ToolResult("", [Text("The call was interrupted: it has no result.")], failed=True)


def unused_id(call: ToolCall, index: int, used: set[str]) -> str:
    wanted = call.id or "call_" + digest(call.name, call.text, str(index))
    free, again = wanted, 1
    while free in used:
        again += 1
        free = f"{wanted}_{again}"
    used.add(free)
    return free


def split_off_system(
    ask: Ask, maker: str, in_place: bool = False, user_first: bool = False
) -> tuple[list[Text], list[Turn]]:
    """The system's texts, and the other turns, put right.

    `in_place`: those in the middle stay there; `user_first`: nobody else may begin.  Somebody has
    to say something: a request of system texts alone is the user's.
    """
    system: list[Text] = []
    turns: list[Turn] = []
    for turn in history_of(ask, maker):
        if turn.role == "system" and not (in_place and turns):
            system += [part for part in turn.parts if isinstance(part, Text)]
        else:
            turns.append(turn)
    turns = merged_turns(turns)
    if not turns and not system:
        raise fault(400, "The request has no messages")
    if not turns:
        return [], [Turn("user", [*system])]
    if user_first and turns[0].role != "user":
        turns.insert(0, Turn("user", [Text(".")]))
    return system, turns


def is_cut_off(ask: Ask, maker: str, each_step: bool) -> bool:
    """Whether the last step is one of a tool loop whose own thoughts did not come back.

    Claude refuses to think on then (providers.md 1.3, 5.3).  `each_step`: a model that takes
    budgets thinks before every call; others think when they like, so one thought will do.
    """
    steps = 0
    for turn in reversed(history_of(ask, maker)):
        if turn.role == "assistant":
            steps += 1
            if any(isinstance(part, Thought) for part in turn.parts):
                return False
            if each_step:
                return True
        elif not any(isinstance(part, ToolResult) for part in turn.parts):
            break
    return steps > 0


# -- Which tools may be called, and free-text tools as functions --


def usable_tools(ask: Ask) -> list[Tool]:
    """The tools that may be called, each once; a tool that must be called hides no other one."""
    found: dict[tuple[str, str], Tool] = {}
    for tool in ask.tools:
        if ask.choice == "tool" or not ask.allowed or tool.name in ask.allowed:
            found.setdefault((tool.namespace, tool.name), tool)
    return list(found.values())


def forced_tool(ask: Ask) -> Tool | None:
    if ask.choice != "tool":
        return None
    return next((tool for tool in ask.tools if tool.name in ask.allowed), None)


def free_hosted(ask: Ask) -> dict[str, Json]:
    """The hosted tools whose names no function has."""
    return without(ask.hosted, *(tool.name for tool in ask.tools))


def described(tool: Tool) -> Tool:
    """A free-text tool as a function with one text."""
    if not tool.free:
        return tool
    text: Json = {"type": "string"}
    if tool.grammar:
        definition = text_of(tool.grammar.get("definition"))
        text["description"] = f"Text by this grammar:\n{definition}"
    schema = {
        "type": "object",
        "properties": {"input": text},
        "required": ["input"],
        "additionalProperties": False,
    }
    return dataclasses.replace(tool, schema=schema)


def bare_text(words: str) -> str:
    """The text of a free-text tool out of the function that stood for it."""
    try:
        found = parse_object(words.encode())
    except ValueError:
        return words
    texts = [value for value in found.values() if isinstance(value, str)]
    if isinstance(found.get("input"), str):
        return str(found["input"])
    return texts[0] if len(texts) == 1 else words


# -- Pictures, documents, sound; and what has no words elsewhere --


def data_url(media: Media) -> str:
    return media.url or f"data:{media.mime or 'application/octet-stream'};base64,{media.data}"


DATA_URL = re.compile(r"data:([^;,]{0,200})(?:;[^;,]{0,200}){0,9},")


def media_from_url(kind: str, url: str, name: str = "") -> Media:
    """A picture, document or sound that a data URL holds, or an address names."""
    found = DATA_URL.match(url[:3000])
    if not found:
        return Media(kind, url=url, name=name)
    return Media(kind, found[1], url[found.end() :], name=name)


def cannot(what: str) -> ProxyError:
    """A request that another dialect has no words for."""
    return fault(400, f"{what} cannot be translated for the provider that serves this model")


# -- JSON Schemas, as Google, Claude and OpenAI take them --

# The words of Google's Schema that all of its backends take: Antigravity refuses limits of texts
# and of objects (providers.md 5.1).
GOOGLE_WORDS = {
    *("type", "format", "title", "description", "nullable", "enum", "items", "minItems"),
    *("maxItems", "properties", "required", "anyOf", "minimum", "maximum"),
}
GOOGLE_KINDS: dict[str, Any] = {  # what these may be
    **dict.fromkeys(("format", "title", "description"), str),
    **dict.fromkeys(("minItems", "maxItems"), int),
    **dict.fromkeys(("minimum", "maximum"), (int, float)),
    "nullable": bool,
}
GOOGLE_FORMATS = ("enum", "date-time", "float", "double", "int32", "int64")
DEEPEST_SCHEMA = 40


class GoogleSchema:
    """A JSON Schema in the words of Google's list: refs resolved, cycles cut (providers.md 5.1)."""

    MOST = 5000  # schemas in one: those that name each other in circles have no end otherwise

    def __init__(self, root: Json) -> None:
        self.root = root
        self.count = 0

    def read(self, schema: Any, seen: tuple[str, ...] = ()) -> Json:
        self.count += 1
        if not isinstance(schema, dict) or len(seen) > DEEPEST_SCHEMA or self.count > self.MOST:
            return {"type": "string" if schema is True else "object"}
        whole, seen = self.resolved(schema, (*seen, ""))
        if whole is None:
            return {"type": "object"}
        whole = self.with_merged(whole)
        kept = {name: value for name, value in whole.items() if name in GOOGLE_WORDS}
        for name, kinds in GOOGLE_KINDS.items():
            if name in kept and not isinstance(kept[name], kinds):
                del kept[name]
        self.put_type(kept, whole)
        self.put_enum(kept, whole)
        self.put_inner(kept, whole, seen)
        if kept.get("format") not in GOOGLE_FORMATS:
            kept.pop("format", None)
        if not kept.keys() & {"type", "anyOf"}:
            kept["type"] = "string"
        return kept

    def resolved(self, schema: Json, seen: tuple[str, ...]) -> tuple[Json | None, tuple[str, ...]]:
        """Without a $ref; None for one that leads back to itself."""
        for _ in range(DEEPEST_SCHEMA):
            ref = schema.get("$ref")
            if not isinstance(ref, str):
                return schema, seen
            if ref in seen:
                return None, seen
            seen = (*seen, ref)
            schema = {**self.named(ref), **without(schema, "$ref")}
        return None, seen

    def named(self, ref: str) -> Json:
        """What a JSON pointer leads to; {} for nothing."""
        target: Any = self.root
        for step in ref.removeprefix("#").strip("/").split("/"):
            if isinstance(target, list) and re.fullmatch("[0-9]{1,4}", step):
                target = dict(enumerate(target)).get(int(step))
            elif step:
                target = as_dict(target).get(unquote(step).replace("~1", "/").replace("~0", "~"))
        return as_dict(target)

    def with_merged(self, schema: Json, depth: int = 9) -> Json:
        """With the schemas of allOf laid into it, and a oneOf called anyOf."""
        merged = without(schema, "allOf", "oneOf")
        if "oneOf" in schema:
            merged["anyOf"] = as_list(merged.get("anyOf")) + as_list(schema["oneOf"])
        for part in as_dicts(schema.get("allOf")) if depth else ():
            whole = self.resolved(part, ())[0] or {}
            for name, value in self.with_merged(whole, depth - 1).items():
                if name == "properties":
                    merged[name] = {**as_dict(merged.get(name)), **as_dict(value)}
                elif name == "required":
                    merged[name] = [*as_list(merged.get(name)), *as_list(value)]
                else:
                    merged.setdefault(name, value)
        return merged

    def put_type(self, kept: Json, schema: Json) -> None:
        """One type; null is `nullable`; several are an anyOf."""
        kinds = [kind for kind in as_list(schema.get("type")) if isinstance(kind, str)]
        if kinds:
            others = [kind for kind in kinds if kind != "null"]
            kept["type"] = others[0] if len(others) == 1 else None
            if "null" in kinds:
                kept["nullable"] = True
            if len(others) > 1 and "anyOf" not in kept:
                kept["anyOf"] = [{**schema, "type": kind} for kind in others]
        kind = kept.pop("type", None)
        if isinstance(kind, str):
            kept["type"] = kind.lower()
        elif "properties" in kept:
            kept["type"] = "object"
        elif "items" in kept or "prefixItems" in schema:
            kept["type"] = "array"

    def put_enum(self, kept: Json, schema: Json) -> None:
        """Google knows enums of texts, without an empty one."""
        values = [schema["const"]] if "const" in schema else as_list(schema.get("enum"))
        kept.pop("enum", None)
        if None in values:
            kept["nullable"] = True
        texts = [v if isinstance(v, str) else json_text(v) for v in values if v not in (None, "")]
        if texts:
            kept["type"], kept["enum"] = "string", list(dict.fromkeys(texts))

    def put_inner(self, kept: Json, schema: Json, seen: tuple[str, ...]) -> None:
        if "properties" in kept:
            properties = as_dict(kept["properties"])
            kept["properties"] = {str(k): self.read(v, seen) for k, v in properties.items()}
        required = [name for name in as_list(kept.pop("required", None)) if isinstance(name, str)]
        names = as_dict(kept.get("properties"))
        known = [name for name in dict.fromkeys(required) if name in names]
        if known:
            kept["required"] = known
        items = kept.pop("items", schema.get("prefixItems"))
        if kept.get("type") == "array":
            choices = items if isinstance(items, list) else [items]
            read = [self.read(item, seen) for item in choices if item is not None]
            kept["items"] = one_or_any(read) if read else {"type": "string"}
        if "anyOf" in kept:
            self.put_any(kept, seen)

    def put_any(self, kept: Json, seen: tuple[str, ...]) -> None:
        """An anyOf stands alone there: what stood beside it goes into its branches."""
        branches = as_dicts(kept.pop("anyOf"))
        if any(branch.get("type") == "null" for branch in branches):
            kept["nullable"] = True
        read = [self.read(branch, seen) for branch in branches if branch.get("type") != "null"]
        beside = {**kept}
        if len(read) == 1:
            kept |= without(read[0], *beside)
        elif read:
            kept.clear()
            kept["anyOf"] = [{**beside, **branch} for branch in read]


def one_or_any(schemas: list[Json]) -> Json:
    different = [schema for i, schema in enumerate(schemas) if schema not in schemas[:i]]
    return different[0] if len(different) == 1 else {"anyOf": different}


def google_schema(schema: Json) -> Json:
    return GoogleSchema(schema).read(schema)


UNIONS = ("anyOf", "oneOf", "allOf")


def object_schema(schema: Json) -> Json:
    """A tool's schema whose root is an object without a union: Claude and OpenAI take no other."""
    if not any(name in schema for name in UNIONS):
        if schema.get("type") == "object" and "properties" in schema:
            return schema
        return {**schema, "type": "object", "properties": as_dict(schema.get("properties"))}
    merged = without(schema, *UNIONS)
    properties = {**as_dict(schema.get("properties"))}
    required = [name for name in as_list(schema.get("required")) if isinstance(name, str)]
    resolve = GoogleSchema(schema).resolved
    for union in UNIONS:
        branches = [resolve(branch, ())[0] or {} for branch in as_dicts(schema.get(union))]
        wanted = [set(map(str, as_list(branch.get("required")))) for branch in branches]
        for branch in branches:
            for name, inner in as_dict(branch.get("properties")).items():
                properties.setdefault(name, inner)
        if wanted:
            needed = set.union(*wanted) if union == "allOf" else set.intersection(*wanted)
            required += sorted(needed - set(required))
    merged |= {"type": "object", "properties": properties}
    if required:
        merged["required"] = required
    return merged


NOT_IN_ANSWERS = {  # words of a schema that Claude's JSON answers do not know
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength"),
    *("maxLength", "maxItems", "uniqueItems", "minProperties", "maxProperties"),
    *("patternProperties", "propertyNames", "$schema", "$id", "default", "examples"),
}


def is_strict(schema: Any, depth: int = DEEPEST_SCHEMA) -> bool:
    """Whether OpenAI takes it as strict: every object closed, every property required."""
    if isinstance(schema, list):
        return all(is_strict(item, depth - 1) for item in schema)
    if not isinstance(schema, dict) or depth < 0:
        return depth >= 0
    properties = as_dict(schema.get("properties"))
    if schema.get("type") == "object" or properties:
        is_closed = schema.get("additionalProperties") is False
        if not is_closed or set(properties) != set(map(str, as_list(schema.get("required")))):
            return False
    inner = without(schema, *NAME_TABLES).values()
    tables = [list(as_dict(schema.get(name)).values()) for name in NAME_TABLES]
    return all(is_strict(value, depth - 1) for value in [*inner, *tables])


NAME_TABLES = ("properties", "$defs", "definitions")  # whose keys are names, not words
LITERALS = ("enum", "const", "required")  # words whose values are no schemas


def reworded(schema: Any, change: Callable[[Json], Json], depth: int = DEEPEST_SCHEMA) -> Any:
    """A schema with each table in it changed, the inner ones first."""
    if isinstance(schema, list):
        return [reworded(item, change, depth - 1) for item in schema]
    if not isinstance(schema, dict) or depth < 0:
        return schema
    new: Json = {}
    for name, value in schema.items():
        if name in NAME_TABLES:
            new[name] = {k: reworded(v, change, depth - 1) for k, v in as_dict(value).items()}
        else:
            new[name] = value if name in LITERALS else reworded(value, change, depth - 1)
    return change(new)


def closed_schema(schema: Any) -> Any:
    """The schema of an answer as Claude takes it: every object closed, no limits of figures."""
    return reworded(schema, closed)


def closed(schema: Json) -> Json:
    schema = without(schema, *NOT_IN_ANSWERS)
    if schema.get("type") == "object" or "properties" in schema:
        schema["additionalProperties"] = False
    return schema


# Stop sequences that a provider of a dialect takes; what is more is watched for here.
MOST_STOPS = {"anthropic": 1000, "chat": 4, "responses": 0, "gemini": 5}

# -- An answer in the making --


class Reply:
    """The blocks of an answer, one after the other, whatever order their pieces come in.

    A reader calls the verbs below (`say`, `think`, `seal`, `call`, ...).  One block is open at a
    time; what comes of another one meanwhile waits behind it.  A writer is a Reply that also puts
    the client's bytes into `out` when a block opens, grows and closes.
    """

    size = 0

    def __init__(self, stops: list[str], model: str, maker: str, names: Names) -> None:
        self.model, self.maker, self.names = model, maker, names
        self.id, self.is_named = secrets.token_hex(12), False
        self.created = int(time.time())
        self.repeated: Json = {}  # of the request, in a Responses answer
        self.tells_usage = False  # to a Chat client that asked for it, in a stream
        self.blocks: list[Block] = []
        self.opened_blocks = 0
        self.current: Block | None = None  # the one that is open
        self.latest: Block | None = None  # the one that was begun last
        self.calls: dict[Any, ToolCall] = {}  # by what the provider tells them apart with
        self.usage = Usage()
        self.stop = ""  # why it ended, in the words of STOPS; "": nobody said
        self.stop_text = ""  # the stop sequence that ended it
        self.stops = stops
        self.held = ""  # text that may be the beginning of a stop sequence
        self.sources: list[Source] = []  # of the text that comes next
        self.cut = False  # it was ended by a stop sequence that only we know
        self.out: list[bytes] = []

    def id_with(self, prefix: str) -> str:
        """The answer's id as a dialect's clients know it."""
        return self.id if self.id.startswith(prefix) else prefix + fitted(self.id, WORD_NAME)

    @property
    def is_told(self) -> bool:
        """Whether it says anything: then it is no failure any more."""
        return bool(self.blocks or self.stop)

    # -- What a reader calls --

    def name(self, id: Any) -> None:
        """The provider's own id of the answer; the first one counts."""
        if id and isinstance(id, str) and not self.is_named:
            self.id, self.is_named = id, True

    def say(self, words: str) -> None:
        if self.stops:
            words = self.until_stop(words)
        if words:
            block = self.latest
            if type(block) is not Text or block.done:
                block = self.begin(Text())
                for source in self.sources:
                    self.cite(source)
                self.sources = []
            self.add(block, words)

    def think(self, words: str) -> None:
        if words and not self.cut:
            block = self.latest
            if type(block) is not Thought or block.done:
                block = self.begin(Thought())
            self.add(block, words)

    def seal(self, data: Any, redacted: bool = False) -> None:
        """Of the thought that is open, else of one without words."""
        if not data or not isinstance(data, str) or self.cut:
            return
        block, seal = self.latest, Seal(self.maker, data, redacted)
        if type(block) is not Thought or block.done or redacted:
            block = self.begin(Thought(seal=seal))
        block.seal = seal
        self.end(block)

    def call(self, key: Any, id: str, name: str, free: bool = False) -> None:
        """`key`: what the provider tells its calls apart with."""
        tool = self.names.meant(name)
        id = id or "call_" + digest(self.id, str(len(self.blocks)), name)
        call = ToolCall(id, tool.name, namespace=tool.namespace, free=tool.free or free)
        call.wrapped = tool.free and not free
        self.call_done(key)  # one that had the same key before
        self.calls[key] = call
        if not self.cut:
            self.begin(call)

    def arguments(self, key: Any, words: str) -> None:
        call = self.calls.get(key)
        if call is not None and words and not call.done:
            self.add(call, words)

    def call_done(self, key: Any, whole: str = "") -> None:
        """`whole`: the arguments, for where no piece of them came."""
        call = self.calls.get(key)
        if call is not None and not call.done:
            if whole and not call.pieces:
                self.add(call, whole)
            self.end(call)

    def cite(self, source: Source) -> None:
        """Of the text that is open, else of the next one."""
        block = self.latest
        if type(block) is not Text or block.done:
            self.sources.append(source)
        elif source.url and source not in block.sources:
            block.sources.append(source)
            if block is self.current:
                self.cited(block, source)

    def show(self, media: Media) -> None:
        if not self.cut:
            self.begin(media)

    def stopped(self, reason: str, text: str = "") -> None:
        """Why it ends; nothing of what a provider says counts behind a stop sequence of ours."""
        if reason and not self.cut:
            self.stop, self.stop_text = reason, text

    def finish(self) -> None:
        """The answer is whole: what is open closes, and the end is written."""
        self.say_held()
        for call in self.calls.values():
            self.end(call)
        if self.latest is not None:
            self.end(self.latest)
        if self.stop in ("", "end", "call"):
            has_calls = any(isinstance(block, ToolCall) for block in self.blocks)
            self.stop = "call" if has_calls else "end"
        self.ended()

    def say_held(self) -> None:
        words, self.held = self.held, ""
        stops, self.stops = self.stops, []
        self.say(words)
        self.stops = stops

    # -- Order --

    def begin(self, block: Any) -> Any:
        if self.held and not isinstance(block, Text):
            self.say_held()
        latest = self.latest
        if latest is not None and not isinstance(latest, ToolCall):
            self.end(latest)
        self.latest = block
        self.blocks.append(block)
        if self.current is None:
            self.open_next()
        return block

    def add(self, block: Text | Thought | ToolCall, words: str) -> None:
        self.size += len(words)
        if self.size > BODY_LIMIT:
            raise fault(413, "the provider sent no whole answer within 64 MiB")
        block.pieces.append(words)
        if block is self.current:
            self.grew(block, words)

    def end(self, block: Block) -> None:
        if isinstance(block, Media) or block.done:
            return
        block.done = True
        if isinstance(block, Thought) and block.seal is None and self.maker.startswith("chat/"):
            block.seal = Seal(self.maker, "")  # such providers take their thoughts back as they are
        if block is self.current:
            self.close()

    def open_next(self) -> None:
        """The first block that waits; those that are whole already close at once."""
        block: Block = self.blocks[self.opened_blocks]
        self.current = block
        self.opened_blocks += 1
        self.opened(block)
        if isinstance(block, Media):
            self.close()
            return
        if block.pieces:
            self.grew(block, "".join(block.pieces))
        if block.done:
            self.close()

    def close(self) -> None:
        block, self.current = self.current, None
        if block is not None and not isinstance(block, Media):
            block.text = "".join(block.pieces)
            if isinstance(block, ToolCall) and block.wrapped:
                block.text = bare_text(block.text)
            block.pieces = []
        if block is not None:
            self.closed(block)
        if self.opened_blocks < len(self.blocks):
            self.open_next()

    def until_stop(self, words: str) -> str:
        """What may be said: nothing from a stop sequence on, which this provider does not know."""
        if self.cut:
            return ""
        text = self.held + words
        places = [(text.find(stop), stop) for stop in self.stops if stop in text]
        if places:
            place, self.stop_text = min(places)
            self.stop, self.cut, self.held = "sequence", True, ""
            return text[:place]
        keep = 0
        for stop in self.stops:
            for size in range(min(len(stop) - 1, len(text)), keep, -1):
                if text.endswith(stop[:size]):
                    keep = size
                    break
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    # -- What a writer does --

    def opened(self, block: Block) -> None: ...

    def grew(self, block: Block, words: str) -> None: ...

    def cited(self, block: Text, source: Source) -> None: ...

    def closed(self, block: Block) -> None: ...

    def ended(self) -> None: ...


class Reader:
    """Reads the events of one dialect into a Reply."""

    may_just_end = False  # usage without a reason is an end, too, if nothing follows
    must_speak = False  # an answer that says nothing is a failure

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.over = False  # its last event has come

    def read(self, event: Json) -> None:
        raise NotImplementedError

    def read_whole(self, answer: Json) -> None:
        """An answer in one piece."""
        raise NotImplementedError

    @staticmethod
    def count(found: Usage, event: Json) -> None:
        """The tokens that an event, or an answer, tells of."""
        raise NotImplementedError


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


def data_event(value: Json) -> bytes:
    return b"data: %b\n\n" % write_json(value)


# == Anthropic Messages ============================================================================
#
# The same five parts as in the other three dialects: a request read and written, the events of an
# answer read and written, and an answer in one piece.
#
# Claude wants thoughts back with their signatures, results in front of a user's turn, at most four
# cache marks, and max_tokens always (providers.md 1.3).

ANTHROPIC_MAKER = "anthropic/claude"
ANTHROPIC_STOPS = {
    "end_turn": "end",
    "tool_use": "call",
    "max_tokens": "length",
    "stop_sequence": "sequence",
    "refusal": "refusal",
    "pause_turn": "pause",
    "model_context_window_exceeded": "context",
}
BILLING_LINE = "x-anthropic-billing-header"  # Claude Code's own, for Anthropic alone (clients.md)
ANTHROPIC_SAMPLING = ("temperature", "top_p", "top_k")
MOST_MARKS = 4  # of the prompt cache, in one request
EPHEMERAL = {"type": "ephemeral"}


def flip(table: dict[str, str]) -> dict[str, str]:
    """The way back: of several words for one thing the first."""
    return {value: key for key, value in reversed(table.items())}


def read_anthropic_request(body: Json) -> Ask:
    ask = Ask(limit=int(number(body.get("max_tokens"))))
    ask.turns.append(Turn("system", without_billing(anthropic_parts(body.get("system")))))
    for message in as_dicts(body.get("messages")):
        role = text_of(message.get("role"))
        parts = anthropic_parts(message.get("content"))
        ask.turns.append(Turn(role if role in ("assistant", "system") else "user", parts))
    read_anthropic_tools(ask, body)
    ask.stops = [stop for stop in as_list(body.get("stop_sequences")) if isinstance(stop, str)]
    ask.sampling = {k: body[k] for k in ANTHROPIC_SAMPLING if k in body}
    output = as_dict(body.get("output_config"))
    wanted = as_dict(output.get("format")) or as_dict(body.get("output_format"))
    if wanted.get("type") == "json_schema":
        ask.schema = as_dict(wanted.get("schema"))
        ask.schema_strict = is_strict(ask.schema)
    if body.get("mcp_servers"):
        raise cannot("mcp_servers")
    return ask


def without_billing(parts: list[Part]) -> list[Part]:
    """Without Claude Code's billing line, which differs from turn to turn."""
    for part in parts:
        if isinstance(part, Text) and part.text.startswith(BILLING_LINE):
            part.text = part.text.partition("\n")[2]
    return parts


def anthropic_parts(content: Any) -> list[Part]:
    if isinstance(content, str):
        return [Text(content)]
    parts: list[Part] = []
    for block in as_dicts(content):
        parts += anthropic_part(block)
    return parts


def anthropic_part(block: Json) -> list[Part]:
    """A block; nothing for one that means something to Claude alone, such as a hosted tool's."""
    cache = as_dict(block.get("cache_control")) or None
    match block.get("type"):
        case "text":
            return [Text(text_of(block.get("text")), cache)]
        case "image" | "document" as kind:
            return anthropic_media(kind, block, cache)
        case "thinking":
            seal = read_seal(block.get("signature"), ANTHROPIC_MAKER)
            return [Thought(text_of(block.get("thinking")), seal)]
        case "redacted_thinking":
            seal = read_seal(block.get("data"), ANTHROPIC_MAKER)
            return [Thought("", seal and seal._replace(redacted=True))]
        case "tool_use":
            words = json_text(as_dict(block.get("input")))
            return [ToolCall(text_of(block.get("id")), text_of(block.get("name")), words)]
        case "tool_result":
            inner = plain_parts(anthropic_parts(block.get("content")))
            failed = bool(block.get("is_error"))
            for part in inner:
                cache, part.cache = part.cache or cache, None
            return [ToolResult(text_of(block.get("tool_use_id")), inner, failed, cache)]
        case "search_result":
            return anthropic_parts(block.get("content"))
    return []


def anthropic_media(kind: str, block: Json, cache: Json | None) -> list[Part]:
    source, name = as_dict(block.get("source")), text_of(block.get("title"))
    mime = text_of(source.get("media_type"))
    match source.get("type"):
        case "base64":
            return [Media(kind, mime, text_of(source.get("data")), name=name, cache=cache)]
        case "url":
            return [Media(kind, mime, url=text_of(source.get("url")), name=name, cache=cache)]
        case "text":
            return [Text(text_of(source.get("data")), cache)]
        case "content":
            return anthropic_parts(source.get("content"))
    raise cannot(f"A {kind} that was uploaded elsewhere")


def read_anthropic_tools(ask: Ask, body: Json) -> None:
    for tool in as_dicts(body.get("tools")):
        kind = text_of(tool.get("type")) or "custom"
        if kind.startswith("web_search"):
            names = ("allowed_domains", "blocked_domains", "user_location")
            ask.hosted["web_search"] = {name: tool[name] for name in names if tool.get(name)}
        elif kind.startswith("code_execution"):
            ask.hosted["code_execution"] = {}
        elif kind != "custom":
            log.debug("the tool %s is left out: only Claude has it", kind[:100])
        else:
            read = Tool(text_of(tool.get("name")), text_of(tool.get("description")))
            read.schema = as_dict(tool.get("input_schema"))
            read.strict, read.cache = bool(tool.get("strict")), tool.get("cache_control")
            ask.tools.append(read)
    choice = as_dict(body.get("tool_choice"))
    ask.choice = text_of(choice.get("type"))
    if ask.choice == "tool":
        ask.allowed = [text_of(choice.get("name"))]
    if "disable_parallel_tool_use" in choice:
        ask.parallel = not choice["disable_parallel_tool_use"]


def write_anthropic_request(ask: Ask, target: Target) -> Json:
    system, turns = split_off_system(ask, target.maker, user_first=True)
    body: Json = {"model": target.model, "stream": True}
    body["max_tokens"] = ask.limit or target.max_tokens
    body["messages"] = [anthropic_message(turn, target) for turn in turns]
    blocks: list[Json] = [anthropic_text(part) for part in system]
    if ask.schema == {}:
        blocks.append({"type": "text", "text": "Answer with one JSON object and nothing else."})
    if blocks:
        body["system"] = blocks
    write_anthropic_tools(body, ask, target)
    if ask.stops:
        body["stop_sequences"] = ask.stops
    body |= {k: v for k, v in ask.sampling.items() if k in ANTHROPIC_SAMPLING}
    if "temperature" in body:
        body["temperature"] = min(1, number(body["temperature"]))
    if ask.schema:
        wanted = {"type": "json_schema", "schema": closed_schema(ask.schema)}
        body["output_config"] = {"format": wanted}
    if not sets_cache(ask):
        put_cache_marks(body)
    return body


def anthropic_message(turn: Turn, target: Target) -> Json:
    return {"role": turn.role, "content": [anthropic_block(part, target) for part in turn.parts]}


def anthropic_text(part: Text) -> Json:
    return marked_for_cache({"type": "text", "text": part.text}, part.cache)


def anthropic_block(part: Part, target: Target) -> Json:
    match part:
        case Text():
            return anthropic_text(part)
        case Media():
            return anthropic_source(part)
        case ToolCall():
            name = target.names.of(part.name, part.namespace)
            id = fitted(part.id, WORD_NAME)
            return {"type": "tool_use", "id": id, "name": name, "input": arguments_of(part)}
        case ToolResult():
            inner = [anthropic_block(inner, target) for inner in part.parts]
            id = fitted(part.id, WORD_NAME)
            result: Json = {"type": "tool_result", "tool_use_id": id, "content": inner}
            if part.failed:
                result["is_error"] = True
            return marked_for_cache(result, part.cache)
        case Thought(seal=Seal(redacted=True, data=data)):
            return {"type": "redacted_thinking", "data": data}
        case Thought(seal=Seal(data=data)):
            return {"type": "thinking", "thinking": part.text, "signature": data}
    raise TypeError(part)  # only thoughts of its own come here


def marked_for_cache(block: Json, cache: Json | None) -> Json:
    return {**block, "cache_control": cache} if cache else block


def anthropic_source(media: Media) -> Json:
    mime = media.mime or ("image/png" if media.kind == "image" else "application/pdf")
    if media.kind not in ("image", "document"):
        raise cannot({"audio": "Sound", "video": "A film"}.get(media.kind, mime))
    if media.url:
        source = {"type": "url", "url": media.url}
    elif mime.startswith("text/"):
        source = {"type": "text", "media_type": "text/plain", "data": plain_text(media.data)}
    else:
        source = {"type": "base64", "media_type": mime, "data": media.data}
    block: Json = {"type": media.kind, "source": source}
    if media.name and media.kind == "document":
        block["title"] = media.name
    return marked_for_cache(block, media.cache)


def plain_text(data: str) -> str:
    with suppress(ValueError):
        return base64.b64decode(data).decode()
    raise cannot("A text that is not UTF-8")


def write_anthropic_tools(body: Json, ask: Ask, target: Target) -> None:
    tools: list[Json] = []
    for tool in map(described, usable_tools(ask)):
        written: Json = {
            "name": target.names.of(tool.name, tool.namespace),
            "description": tool.description,
            "input_schema": object_schema(tool.schema),
        }
        if tool.strict:
            written["strict"] = True
        tools.append(marked_for_cache(written, tool.cache))
    hosted = free_hosted(ask)
    if "web_search" in hosted:
        search = {"type": "web_search_20250305", "name": "web_search"}
        tools.append({**search, **hosted["web_search"]})
    if "code_execution" in hosted:
        tools.append({"type": "code_execution_20250522", "name": "code_execution"})
    if not tools:
        return
    body["tools"] = tools
    forced = forced_tool(ask)
    choice: Json = {"type": ask.choice if ask.choice in ("any", "none") else "auto"}
    if forced:
        choice = {"type": "tool", "name": target.names.of(forced.name, forced.namespace)}
    if ask.parallel is False and choice["type"] != "none":
        choice["disable_parallel_tool_use"] = True
    if ask.choice or len(choice) > 1:
        body["tool_choice"] = choice


def sets_cache(ask: Ask) -> bool:
    parts = [part for turn in ask.turns for part in turn.parts]
    return any(getattr(part, "cache", None) for part in [*parts, *ask.tools])


def put_cache_marks(body: Json) -> None:
    """Where the client could set none: without them each turn is paid in full.

    On the last tool, the last text of the system, and the last two turns of the user.
    """
    ends = [as_list(body.get("tools")), as_list(body.get("system"))]
    users = [m["content"] for m in body["messages"] if m["role"] == "user"]
    for blocks in (ends + users[-2:])[:MOST_MARKS]:
        if blocks:
            blocks[-1] = {**blocks[-1], "cache_control": EPHEMERAL}


class AnthropicReader(Reader):
    def __init__(self, reply: Reply) -> None:
        super().__init__(reply)
        self.whole_inputs: dict[Any, str] = {}  # of calls whose arguments stand in their start

    def read(self, event: Json) -> None:
        match event.get("type"):
            case "content_block_delta":
                self.delta(event.get("index"), as_dict(event.get("delta")))
            case "content_block_start":
                self.start(event.get("index"), as_dict(event.get("content_block")))
            case "content_block_stop":
                self.end(event.get("index"))
            case "message_start":
                message = as_dict(event.get("message"))
                self.reply.name(message.get("id"))
                self.count(self.reply.usage, message)
            case "message_delta":
                self.count(self.reply.usage, event)
                self.stop(as_dict(event.get("delta")))
            case "message_stop":
                self.over = True

    def delta(self, index: Any, delta: Json) -> None:
        match delta.get("type"):
            case "text_delta":
                self.reply.say(text_of(delta.get("text")))
            case "thinking_delta":
                self.reply.think(text_of(delta.get("thinking")))
            case "input_json_delta":
                self.reply.arguments(index, text_of(delta.get("partial_json")))
            case "signature_delta":
                self.reply.seal(delta.get("signature"))
            case "citations_delta":
                self.cite(as_dict(delta.get("citation")))

    def start(self, index: Any, block: Json) -> None:
        match block.get("type"):
            case "text":
                self.reply.say(text_of(block.get("text")))
                for citation in as_dicts(block.get("citations")):
                    self.cite(citation)
            case "thinking":
                self.reply.think(text_of(block.get("thinking")))
                self.reply.seal(block.get("signature"))
            case "redacted_thinking":
                self.reply.seal(block.get("data"), redacted=True)
            case "tool_use":
                self.reply.call(index, text_of(block.get("id")), text_of(block.get("name")))
                self.whole_inputs[index] = json_text(as_dict(block.get("input")))

    def end(self, index: Any) -> None:
        self.reply.call_done(index, self.whole_inputs.pop(index, ""))

    def cite(self, citation: Json) -> None:
        title = text_of(citation.get("title")) or text_of(citation.get("document_title"))
        self.reply.cite(
            Source(text_of(citation.get("url")), title, text_of(citation.get("cited_text")))
        )

    @staticmethod
    def count(found: Usage, event: Json) -> None:
        usage = as_dict(event.get("usage"))
        cached = usage.get("cache_read_input_tokens")
        made = usage.get("cache_creation_input_tokens")
        found.update(
            read=number(usage.get("input_tokens")) + number(cached) + number(made),
            cached=cached,
            cache_written=made,
            written=usage.get("output_tokens"),
        )

    def stop(self, ending: Json) -> None:
        if reason := text_of(ending.get("stop_reason")):
            stop = ANTHROPIC_STOPS.get(reason, "end")
            self.reply.stopped(stop, text_of(ending.get("stop_sequence")))

    def read_whole(self, answer: Json) -> None:
        self.reply.name(answer.get("id"))
        for index, block in enumerate(as_dicts(answer.get("content"))):
            self.start(index, block)
            self.end(index)
        self.count(self.reply.usage, answer)
        self.stop(answer)
        self.over = True


def anthropic_usage_of(usage: Usage) -> Json:
    return {
        "input_tokens": max(0, usage.read - usage.cached - usage.cache_written),
        "cache_creation_input_tokens": usage.cache_written,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.written,
    }


def anthropic_answer_block(block: Block) -> Json:
    match block:
        case Text():
            written: Json = {"type": "text", "text": block.text}
            if block.sources:
                written["citations"] = [anthropic_citation(source) for source in block.sources]
            return written
        case Thought(seal=Seal(maker="anthropic/claude", redacted=True, data=data)):
            return {"type": "redacted_thinking", "data": data}
        case Thought():
            signature = seal_text(block.seal, "anthropic") if block.seal else ""
            return {"type": "thinking", "thinking": block.text, "signature": signature}
        case ToolCall():
            id = fitted(block.id, WORD_NAME)
            return {"type": "tool_use", "id": id, "name": block.name, "input": arguments_of(block)}
    return {}  # a picture: Claude makes none, and there is no place for one


def anthropic_citation(source: Source) -> Json:
    return {
        "type": "web_search_result_location",
        "url": source.url,
        "title": source.title,
        "cited_text": source.quote,
        "encrypted_index": "",
    }


def anthropic_start(reply: Reply) -> Json:
    return {
        "id": reply.id_with("msg_"),
        "type": "message",
        "role": "assistant",
        "model": reply.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": anthropic_usage_of(reply.usage),
    }


def anthropic_end(reply: Reply) -> Json:
    reason = flip(ANTHROPIC_STOPS)[reply.stop]
    return {"stop_reason": reason, "stop_sequence": reply.stop_text or None}


def write_anthropic_answer(reply: Reply) -> Json:
    content = [block for part in reply.blocks if (block := anthropic_answer_block(part))]
    return {**anthropic_start(reply), "content": content, **anthropic_end(reply)}


def named_event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\n" % kind.encode() + data_event({"type": kind, **fields})


class AnthropicWriter(Reply):
    index = -1  # of the block that is open
    begun = False
    DELTA = (
        b"event: content_block_delta\n"
        b'data: {"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":%b}}\n\n'
    )
    WORDS: ClassVar[dict[type, tuple[bytes, bytes]]] = {
        Text: (b"text_delta", b"text"),
        Thought: (b"thinking_delta", b"thinking"),
    }

    def begin_message(self) -> None:
        if not self.begun:
            self.begun = True
            self.out.append(named_event("message_start", message=anthropic_start(self)))

    def opened(self, block: Block) -> None:
        self.begin_message()
        if isinstance(block, Media):
            return
        self.index += 1
        start = anthropic_answer_block(block)
        if "signature" in start:
            start["signature"] = ""  # it has a delta of its own
        self.out.append(named_event("content_block_start", index=self.index, content_block=start))

    def grew(self, block: Block, words: str) -> None:
        kind, key = self.WORDS.get(type(block), (b"input_json_delta", b"partial_json"))
        self.out.append(self.DELTA % (self.index, kind, key, write_json(words)))

    def cited(self, block: Text, source: Source) -> None:
        delta = {"type": "citations_delta", "citation": anthropic_citation(source)}
        self.out.append(named_event("content_block_delta", index=self.index, delta=delta))

    def closed(self, block: Block) -> None:
        if isinstance(block, Media):
            return
        if isinstance(block, Thought) and block.seal:
            whole = anthropic_answer_block(block)
            if "signature" in whole:
                delta = {"type": "signature_delta", "signature": whole["signature"]}
                self.out.append(named_event("content_block_delta", index=self.index, delta=delta))
        self.out.append(named_event("content_block_stop", index=self.index))

    def ended(self) -> None:
        self.begin_message()
        usage = anthropic_usage_of(self.usage)
        self.out.append(named_event("message_delta", delta=anthropic_end(self), usage=usage))
        self.out.append(named_event("message_stop"))


# == Chat Completions ==============================================================================
#
# OpenAI's older dialect, and that of all compatible providers.  A call comes in pieces that name
# their index; usage comes behind the reason why the answer ended, then [DONE].
#
# It has no place for a seal but the one that OpenRouter made, reasoning_details.

CHAT_STOPS = {
    "stop": "end",
    "tool_calls": "call",
    "function_call": "call",
    "length": "length",
    "content_filter": "refusal",
}
CHAT_REASONS = {  # the last three have no word of their own
    **flip(CHAT_STOPS),
    "sequence": "stop",
    "pause": "stop",
    "context": "length",
}
CHAT_SAMPLING = ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty")
SOUND_TYPES = {"wav": "audio/wav", "mp3": "audio/mpeg"}
SOUND_FORMATS = {"audio/x-wav": "wav", "audio/mp3": "mp3"} | {v: k for k, v in SOUND_TYPES.items()}


def read_chat_request(body: Json) -> Ask:
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    ask = Ask(limit=int(number(limit)), cache_key=text_of(body.get("prompt_cache_key")))
    for message in as_dicts(body.get("messages")):
        ask.turns.append(chat_turn(message))
    read_chat_tools(ask, body)
    stop = body.get("stop")
    ask.stops = [s for s in (stop if isinstance(stop, list) else [stop]) if s and text_of(s)]
    ask.sampling = {k: body[k] for k in (*CHAT_SAMPLING, "top_k") if body.get(k) is not None}
    ask.verbosity = text_of(body.get("verbosity"))
    wanted = as_dict(body.get("response_format"))
    read_answer_schema(ask, text_of(wanted.get("type")), as_dict(wanted.get("json_schema")))
    for name, usual in (("n", 1), ("logprobs", False), ("modalities", ["text"])):
        if body.get(name) not in (None, usual):
            raise cannot(f"{name}: {str(body[name])[:50]}")
    return ask


def read_answer_schema(ask: Ask, kind: str, wanted: Json) -> None:
    """A JSON answer, as both of OpenAI's dialects ask for it."""
    if kind == "json_object":
        ask.schema = {}
    elif kind == "json_schema":
        ask.schema = as_dict(wanted.get("schema"))
        ask.schema_name = text_of(wanted.get("name")) or ask.schema_name
        ask.schema_strict = bool(wanted.get("strict"))


def chat_turn(message: Json) -> Turn:
    role = message.get("role")
    parts = chat_parts(message.get("content"))
    if role in ("system", "developer"):
        return Turn("system", parts)
    if role in ("tool", "function"):
        id = text_of(message.get("tool_call_id")) or text_of(message.get("name"))
        return Turn("user", [ToolResult(id, plain_parts(parts))])
    if role != "assistant":
        return Turn("user", parts)
    thoughts = [part for part in chat_thoughts(message) if part.text or part.seal]
    refused = [Text(text_of(message.get("refusal")))]
    calls = [chat_call(call) for call in as_dicts(message.get("tool_calls"))]
    if isinstance(message.get("function_call"), dict):
        old = message["function_call"]
        calls.append(chat_call({"id": old.get("name"), "function": old}))
    return Turn("assistant", [*thoughts, *parts, *refused, *calls])


def chat_thoughts(message: Json) -> list[Thought]:
    """The thoughts of an earlier answer: with our seals, or in bare words."""
    thoughts = []
    for detail in as_dicts(message.get("reasoning_details")):
        seal = read_seal(detail.get("data"), "")
        if seal and seal.maker:
            thoughts.append(Thought(text_of(detail.get("text")), seal))
    words = text_of(message.get("reasoning_content")) or text_of(message.get("reasoning"))
    return thoughts or [Thought(words)]


def chat_call(call: Json) -> ToolCall:
    custom, function = as_dict(call.get("custom")), as_dict(call.get("function"))
    inner = custom or function
    words = inner.get("input") if custom else inner.get("arguments")
    text = words if isinstance(words, str) else json_text(as_dict(words))
    return ToolCall(text_of(call.get("id")), text_of(inner.get("name")), text, free=bool(custom))


def chat_parts(content: Any) -> list[Part]:
    if isinstance(content, str):
        return [Text(content)]
    parts: list[Part] = []
    for part in as_dicts(content):
        cache = as_dict(part.get("cache_control")) or None
        match part.get("type"):
            case "text" | "input_text" | "output_text":
                parts.append(Text(text_of(part.get("text")), cache))
            case "refusal":
                parts.append(Text(text_of(part.get("refusal"))))
            case "image_url":
                image = part.get("image_url")
                url = image if isinstance(image, str) else as_dict(image).get("url")
                parts.append(media_from_url("image", text_of(url)))
            case "input_audio":
                sound = as_dict(part.get("input_audio"))
                mime = SOUND_TYPES.get(text_of(sound.get("format")), "audio/wav")
                parts.append(Media("audio", mime, text_of(sound.get("data"))))
            case "file":
                parts.append(openai_file(as_dict(part.get("file"))))
    return parts


def openai_file(file: Json) -> Media:
    """A document as both of OpenAI's dialects tell it."""
    name, data = text_of(file.get("filename")), text_of(file.get("file_data"))
    if file.get("file_url"):
        return media_from_url("document", text_of(file["file_url"]), name)
    if not data:
        raise cannot("A file that was uploaded elsewhere")
    if data.startswith("data:"):
        return media_from_url("document", data, name)
    return Media("document", "application/pdf", data, name=name)


def read_chat_tools(ask: Ask, body: Json) -> None:
    for tool in as_dicts(body.get("tools")):
        inner = as_dict(tool.get("function")) or as_dict(tool.get("custom"))
        if not inner:
            log.debug("the tool %s is left out: it is hosted", text_of(tool.get("type"))[:100])
            continue
        read = Tool(text_of(inner.get("name")), text_of(inner.get("description")))
        read.schema, read.strict = as_dict(inner.get("parameters")), bool(inner.get("strict"))
        read.cache = tool.get("cache_control") or inner.get("cache_control")
        if "custom" in tool:
            read.free = True
            read.grammar = as_dict(as_dict(inner.get("format")).get("grammar"))
        ask.tools.append(read)
    for function in as_dicts(body.get("functions")):
        read = Tool(text_of(function.get("name")), text_of(function.get("description")))
        read.schema = as_dict(function.get("parameters"))
        ask.tools.append(read)
    if isinstance(body.get("web_search_options"), dict):
        ask.hosted["web_search"] = {}
    read_openai_choice(ask, body, body.get("tool_choice") or body.get("function_call"))


OPENAI_CHOICES = {"auto": "auto", "none": "none", "required": "any"}
CHOICES_OF_OPENAI = flip(OPENAI_CHOICES)


def read_openai_choice(ask: Ask, body: Json, choice: Any) -> None:
    """Of both of OpenAI's dialects: a word, one tool, or the tools that are allowed."""
    if isinstance(body.get("parallel_tool_calls"), bool):
        ask.parallel = body["parallel_tool_calls"]
    if isinstance(choice, str):
        ask.choice = OPENAI_CHOICES.get(choice, "")
        return
    asked = as_dict(choice)
    some = as_dict(asked.get("allowed_tools")) or (asked if "tools" in asked else {})
    if some:
        ask.choice = OPENAI_CHOICES.get(text_of(some.get("mode")), "auto")
        ask.allowed = [openai_tool_name(tool) for tool in as_dicts(some.get("tools"))]
    elif name := openai_tool_name(asked):
        ask.choice, ask.allowed = "tool", [name]


def openai_tool_name(tool: Json) -> str:
    inner = as_dict(tool.get("function")) or as_dict(tool.get("custom")) or tool
    return text_of(inner.get("name"))


def write_chat_request(ask: Ask, target: Target) -> Json:
    system, turns = split_off_system(ask, target.maker)
    messages: list[Json] = []
    if system:
        messages.append({"role": "system", "content": words_of(system, "\n\n")})
    for turn in turns:
        if turn.role == "assistant":
            messages.append(chat_answer_turn(turn, target))
        else:
            messages += chat_user_turn(turn)
    body: Json = {"model": target.model, "messages": messages, "stream": True}
    body["stream_options"] = {"include_usage": True}
    if ask.limit:
        body["max_tokens"] = ask.limit
    if ask.stops:
        body["stop"] = ask.stops[: MOST_STOPS["chat"]]
    body |= {k: v for k, v in ask.sampling.items() if k in CHAT_SAMPLING}
    write_chat_tools(body, ask, target)
    if ask.schema == {}:
        body["response_format"] = {"type": "json_object"}
    elif ask.schema is not None:
        wanted = {"name": ask.schema_name, "schema": ask.schema, "strict": ask.schema_strict}
        body["response_format"] = {"type": "json_schema", "json_schema": wanted}
    return body


def chat_answer_turn(turn: Turn, target: Target) -> Json:
    message: Json = {"role": "assistant", "content": words_of(turn.parts, "\n\n") or None}
    thoughts = [part.text for part in turn.parts if isinstance(part, Thought)]
    if thoughts:
        message["reasoning_content"] = "\n\n".join(thoughts)
    calls = [part for part in turn.parts if isinstance(part, ToolCall)]
    if calls:
        message["tool_calls"] = [chat_call_of(call, target) for call in calls]
    return message


def chat_call_of(call: ToolCall, target: Target) -> Json:
    name = target.names.of(call.name, call.namespace)
    function = {"name": name, "arguments": json_text(arguments_of(call))}
    return {"id": fitted(call.id, CHAT_ID), "type": "function", "function": function}


CHAT_ID = WORD_NAME._replace(longest=40)  # OpenAI's own limit of tool_calls[].id


def chat_user_turn(turn: Turn) -> list[Json]:
    """Results first, a message each; their pictures stand behind them with what the user says."""
    messages: list[Json] = []
    parts: list[Text | Media] = []
    for part in turn.parts:
        if isinstance(part, ToolResult):
            id = fitted(part.id, CHAT_ID)
            messages.append({"role": "tool", "tool_call_id": id, "content": words_of(part.parts)})
            parts += [inner for inner in part.parts if isinstance(inner, Media)]
        elif isinstance(part, Text | Media):
            parts.append(part)
    if parts:
        messages.append({"role": "user", "content": chat_content(parts)})
    return messages


def chat_content(parts: list[Text | Media]) -> Any:
    """A text alone is a text: some compatible providers take nothing else."""
    if all(isinstance(part, Text) for part in parts):
        return words_of(parts, "\n\n")
    return [chat_part(part) for part in parts]


def chat_part(part: Text | Media) -> Json:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    if part.kind == "image":
        return {"type": "image_url", "image_url": {"url": data_url(part)}}
    if part.url or part.kind == "video":
        raise cannot(f"The address of a file, or a film ({part.kind})")
    if part.kind == "audio":
        return sound_part(part)
    file = {"filename": part.name or "document.pdf", "file_data": data_url(part)}
    return {"type": "file", "file": file}


def sound_part(media: Media) -> Json:
    if media.mime not in SOUND_FORMATS:
        raise cannot(f"Sound of the type {media.mime[:50]}")
    sound = {"data": media.data, "format": SOUND_FORMATS[media.mime]}
    return {"type": "input_audio", "input_audio": sound}


def write_chat_tools(body: Json, ask: Ask, target: Target) -> None:
    tools: list[Json] = []
    for tool in map(described, usable_tools(ask)):
        name = target.names.of(tool.name, tool.namespace)
        function: Json = {"name": name, "description": tool.description}
        function["parameters"] = object_schema(tool.schema)
        if tool.strict:
            function["strict"] = True
        tools.append({"type": "function", "function": function})
    for name in ask.hosted:
        log.debug("the tool %s is left out: a compatible provider has none", name)
    if not tools:
        return
    body["tools"] = tools
    if forced := forced_tool(ask):
        function = {"name": target.names.of(forced.name, forced.namespace)}
        body["tool_choice"] = {"type": "function", "function": function}
    elif ask.choice in CHOICES_OF_OPENAI:
        body["tool_choice"] = CHOICES_OF_OPENAI[ask.choice]
    if ask.parallel is not None:
        body["parallel_tool_calls"] = ask.parallel


class ChatReader(Reader):
    may_just_end = True

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply)
        self.keys: dict[Any, Any] = {}  # index of a piece -> the key of its call
        self.early: dict[Any, str] = {}  # arguments that came before the name of their tool
        self.latest_index: Any = 0  # of the call that was told last
        self.refused = False

    def read(self, event: Json) -> None:
        reply = self.reply
        if not reply.is_named:
            reply.name(event.get("id"))
        for choice in as_list(event.get("choices"))[:1]:
            self.delta(as_dict(as_dict(choice).get("delta")))
            self.choice(as_dict(choice))
        if event.get("usage"):
            self.count(reply.usage, event)

    def choice(self, choice: Json) -> None:
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            stop = CHAT_STOPS.get(reason, "end")
            self.reply.stopped("refusal" if self.refused and stop == "end" else stop)
        if choice.get("usage"):
            self.count(self.reply.usage, choice)

    def delta(self, delta: Json) -> None:
        reply = self.reply
        words = delta.get("reasoning_content") or delta.get("reasoning")
        if words:
            reply.think(text_of(words))
        words = delta.get("content")
        if isinstance(words, str):
            reply.say(words)
        elif words:
            for part in chat_parts(words):
                if isinstance(part, Text):
                    reply.say(part.text)
        if delta.get("refusal"):
            self.refused = True
            reply.say(text_of(delta["refusal"]))
        if delta.get("tool_calls"):
            for piece in as_dicts(delta["tool_calls"]):
                self.piece(piece)
        elif isinstance(delta.get("function_call"), dict):
            self.piece({"index": 0, "function": delta["function_call"]})
        for image in as_dicts(delta.get("images")):
            reply.show(media_from_url("image", text_of(as_dict(image.get("image_url")).get("url"))))
        for note in as_dicts(delta.get("annotations")):
            citation = as_dict(note.get("url_citation"))
            reply.cite(Source(text_of(citation.get("url")), text_of(citation.get("title"))))

    def piece(self, piece: Json) -> None:
        """Of a call.  A new id begins a new one, even where a provider counts them all as 0."""
        function = as_dict(piece.get("function")) or as_dict(piece.get("custom"))
        id, name = text_of(piece.get("id")), text_of(function.get("name"))
        words = function.get("arguments") or function.get("input")
        text = words if isinstance(words, str) else json_text(words) if words else ""
        index = piece.get("index")
        if index is None:  # of the call that was named last, if it is not a new one
            index = self.latest_index if not name else len(self.reply.calls)
        self.latest_index = index
        key = self.keys.get(index)
        known = self.reply.calls.get(key)
        again = known is not None and self.is_same(known, id, name)
        if name and not again:
            key = self.keys[index] = (index, len(self.reply.calls))
            self.reply.call(key, id, name, "custom" in piece)
            text = self.early.pop(index, "") + text
        elif known is None:
            self.early[index] = self.early.get(index, "") + text
        self.reply.arguments(key, text)

    def is_same(self, known: ToolCall, id: str, name: str) -> bool:
        """Some providers say id and name once more with each piece, others count all calls as 0."""
        if id and id != known.id:
            return False
        return self.reply.names.meant(name).name == known.name

    @staticmethod
    def count(found: Usage, event: Json) -> None:
        usage = as_dict(event.get("usage"))
        prompt = as_dict(usage.get("prompt_tokens_details"))
        answer = as_dict(usage.get("completion_tokens_details"))
        found.update(
            read=usage.get("prompt_tokens"),
            cached=prompt.get("cached_tokens"),
            written=usage.get("completion_tokens"),
            thought=answer.get("reasoning_tokens"),
        )

    def read_whole(self, answer: Json) -> None:
        """A message has the same form as a delta."""
        self.reply.name(answer.get("id"))
        for choice in as_dicts(answer.get("choices"))[:1]:
            self.delta(as_dict(choice.get("message")))
            self.choice(choice)
        self.count(self.reply.usage, answer)
        self.over = True


def chat_usage_of(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.read,
        "completion_tokens": usage.written,
        "total_tokens": usage.read + usage.written,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.thought},
    }


def chat_answer_call(call: ToolCall) -> Json:
    if call.free:
        custom = {"name": call.name, "input": call.text}
        return {"id": call.id, "type": "custom", "custom": custom}
    function = {"name": call.name, "arguments": call.text or "{}"}
    return {"id": call.id, "type": "function", "function": function}


def chat_seal(thought: Thought, index: int) -> Json:
    """`index`: of the thought; SDKs put together what has the same one."""
    data = seal_text(thought.seal, "chat") if thought.seal else ""
    detail = {"type": "reasoning.encrypted", "data": data, "format": SEAL_MARK, "index": index}
    return {**detail, "text": thought.text}


def openai_citation(source: Source) -> Json:
    return {"url": source.url, "title": source.title, "start_index": 0, "end_index": 0}


def chat_citation(source: Source) -> Json:
    return {"type": "url_citation", "url_citation": openai_citation(source)}


def chat_message(reply: Reply) -> Json:
    texts = [block for block in reply.blocks if isinstance(block, Text)]
    thoughts = [block for block in reply.blocks if isinstance(block, Thought)]
    message: Json = {"role": "assistant", "content": "".join(text.text for text in texts) or None}
    lists = {
        "reasoning_details": [chat_seal(t, i) for i, t in enumerate(thoughts) if t.seal],
        "tool_calls": [chat_answer_call(b) for b in reply.blocks if isinstance(b, ToolCall)],
        "images": [chat_part(block) for block in reply.blocks if isinstance(block, Media)],
        "annotations": [chat_citation(source) for text in texts for source in text.sources],
    }
    words = "\n\n".join(thought.text for thought in thoughts if thought.text)
    if words:
        message["reasoning_content"] = words
    return message | {name: value for name, value in lists.items() if value}


def write_chat_answer(reply: Reply) -> Json:
    choice = {"index": 0, "message": chat_message(reply), "logprobs": None}
    return {
        "id": reply.id_with("chatcmpl-"),
        "object": "chat.completion",
        "created": reply.created,
        "model": reply.model,
        "choices": [{**choice, "finish_reason": CHAT_REASONS[reply.stop]}],
        "usage": chat_usage_of(reply.usage),
    }


class ChatWriter(Reply):
    begun = False
    head = b""  # of a chunk, up to its delta
    call_index = -1
    thoughts = -1  # the index of the latest
    thinks = False  # words of one were told
    apart = False  # those of the latest stand apart from them
    WORDS: ClassVar[dict[type, bytes]] = {Text: b"content", Thought: b"reasoning_content"}
    TAIL = b',"finish_reason":null}]}\n\n'

    def chunk(self, choices: list[Json], **more: Any) -> Json:
        names = {
            "id": self.id_with("chatcmpl-"),
            "object": "chat.completion.chunk",
            "created": self.created,
        }
        return {**names, "model": self.model, "choices": choices, **more}

    def put(self, delta: Json, reason: str | None = None) -> None:
        if not self.begun:
            self.begun = True
            start = write_json(self.chunk([])).removesuffix(b"]}")
            self.head = b"data: " + start + b'{"index":0,"delta":'
            delta = {"role": "assistant", "content": "", **delta}
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        self.out.append(data_event(self.chunk([choice])))

    def opened(self, block: Block) -> None:
        if isinstance(block, ToolCall) and not block.free:
            self.call_index += 1
            function = {"name": block.name, "arguments": ""}
            call = {"index": self.call_index, "id": block.id, "type": "function"}
            self.put({"tool_calls": [{**call, "function": function}]})
        elif not self.begun:
            self.put({})
        if isinstance(block, Thought):
            self.thoughts += 1
            self.apart = self.thinks

    def grew(self, block: Block, words: str) -> None:
        text = write_json(words)
        if not isinstance(block, ToolCall):
            delta = b'{"%b":%b}' % (self.WORDS[type(block)], text)
        elif block.free:
            return
        else:
            values = (self.call_index, text)
            delta = b'{"tool_calls":[{"index":%d,"function":{"arguments":%b}}]}' % values
        if isinstance(block, Thought):
            if self.apart:
                self.put({"reasoning_content": "\n\n"})
            self.thinks, self.apart = True, False
        self.out.append(self.head + delta + self.TAIL)

    def cited(self, block: Text, source: Source) -> None:
        self.put({"annotations": [chat_citation(source)]})

    def closed(self, block: Block) -> None:
        if isinstance(block, Media):
            self.put({"images": [chat_part(block)]})
        elif isinstance(block, Thought) and block.seal:
            self.put({"reasoning_details": [chat_seal(block, self.thoughts)]})
        elif isinstance(block, ToolCall) and block.free:
            self.call_index += 1
            self.put({"tool_calls": [{"index": self.call_index, **chat_answer_call(block)}]})
        elif isinstance(block, ToolCall) and not block.text:
            self.grew(block, "{}")

    def ended(self) -> None:
        self.put({}, CHAT_REASONS[self.stop])
        if self.tells_usage:
            self.out.append(data_event(self.chunk([], usage=chat_usage_of(self.usage))))
        self.out.append(b"data: [DONE]\n\n")


# == Responses =====================================================================================
#
# OpenAI's newer dialect: a history is a list of items, an answer another one.  Every event carries
# a sequence number, and the last one the whole answer again.
#
# Codex sends namespaces of functions, free-text tools and, for most models, its tools as an item
# (clients.md, "Responses Lite").

RESPONSES_MAKER = "responses/gpt"
SEARCH_TYPES = ("web_search", "web_search_preview", "web_search_preview_2025_03_11")
UNKEPT = ("previous_response_id", "conversation", "prompt", "background")  # nothing is kept here
RESPONSE_STOPS = {"max_output_tokens": "length", "content_filter": "refusal"}
RESPONSE_REASONS = {**flip(RESPONSE_STOPS), "context": "max_output_tokens"}
RESPONSE_SAMPLING = ("temperature", "top_p")


def read_responses_request(body: Json) -> Ask:
    for name in UNKEPT:
        if body.get(name):
            raise cannot(f"{name} (no answer is kept here)")
    ask = Ask(limit=int(number(body.get("max_output_tokens"))))
    ask.cache_key = text_of(body.get("prompt_cache_key"))
    ask.turns.append(Turn("system", [Text(text_of(body.get("instructions")))]))
    given = body.get("input")
    if isinstance(given, str):
        ask.turns.append(Turn("user", [Text(given)]))
    read_responses_tools(ask, as_dicts(body.get("tools")))
    for item in as_dicts(given):
        read_responses_item(ask, item)
    read_openai_choice(ask, body, body.get("tool_choice"))
    ask.sampling = {k: body[k] for k in RESPONSE_SAMPLING if body.get(k) is not None}
    text = as_dict(body.get("text"))
    ask.verbosity = text_of(text.get("verbosity"))
    wanted = as_dict(text.get("format"))
    read_answer_schema(ask, text_of(wanted.get("type")), wanted)
    return ask


def read_responses_item(ask: Ask, item: Json) -> None:
    kind = text_of(item.get("type")) or "message"
    match kind:
        case "message":
            role = item.get("role")
            role = "system" if role in ("system", "developer") else text_of(role)
            parts = responses_parts(item.get("content"))
            ask.turns.append(Turn(role if role in ("system", "assistant") else "user", parts))
        case "function_call" | "custom_tool_call" | "local_shell_call":
            ask.turns.append(Turn("assistant", [responses_call(item)]))
        case "function_call_output" | "custom_tool_call_output" | "local_shell_call_output":
            inner = plain_parts(responses_parts(item.get("output")))
            ask.turns.append(Turn("user", [ToolResult(text_of(item.get("call_id")), inner)]))
        case "reasoning":
            words = [text_of(part.get("text")) for part in as_dicts(item.get("summary"))]
            seal = read_seal(item.get("encrypted_content"), RESPONSES_MAKER)
            ask.turns.append(Turn("assistant", [Thought("\n\n".join(words), seal)]))
        case "additional_tools":
            read_responses_tools(ask, as_dicts(item.get("tools")))
        case "compaction_trigger" | "compaction" | "compaction_summary" | "item_reference":
            raise cannot(f"An input item of type {kind}")


def responses_call(item: Json) -> ToolCall:
    free = item.get("type") == "custom_tool_call"
    words = item.get("input") if free else item.get("arguments", item.get("action"))
    text = words if isinstance(words, str) else json_text(as_dict(words))
    name = text_of(item.get("name")) or "local_shell"
    call = ToolCall(text_of(item.get("call_id")), name, text, free=free)
    call.namespace = text_of(item.get("namespace"))
    return call


def responses_parts(content: Any) -> list[Part]:
    if isinstance(content, str):
        return [Text(content)]
    parts: list[Part] = []
    for part in as_dicts(content):
        match part.get("type"):
            case "input_image":
                if not part.get("image_url"):
                    raise cannot("A picture that was uploaded elsewhere")
                parts.append(media_from_url("image", text_of(part["image_url"])))
            case "input_file":
                parts.append(openai_file(part))
            case "input_audio":
                parts += chat_parts([part])
            case "refusal":
                parts.append(Text(text_of(part.get("refusal"))))
            case _:
                parts.append(Text(text_of(part.get("text"))))
    return parts


def read_responses_tools(ask: Ask, tools: list[Json], namespace: str = "") -> None:
    for tool in tools:
        kind = text_of(tool.get("type")) or "function"
        name, about = text_of(tool.get("name")), text_of(tool.get("description"))
        if kind == "namespace":
            read_responses_tools(ask, as_dicts(tool.get("tools")), name)
        elif kind == "function":
            schema, strict = as_dict(tool.get("parameters")), tool.get("strict") is True
            ask.tools.append(Tool(name, about, schema, namespace, strict=strict))
        elif kind == "custom":
            grammar = as_dict(tool.get("format"))
            ask.tools.append(Tool(name, about, {}, namespace, free=True, grammar=grammar))
        elif kind in SEARCH_TYPES:
            domains = as_dict(tool.get("filters")).get("allowed_domains")
            options = {"allowed_domains": domains, "user_location": tool.get("user_location")}
            ask.hosted["web_search"] = {key: value for key, value in options.items() if value}
        elif kind == "code_interpreter":
            ask.hosted["code_execution"] = {}
        else:
            log.debug("the tool %s is left out: only OpenAI has it", kind[:100])


def write_responses_request(ask: Ask, target: Target) -> Json:
    system, turns = split_off_system(ask, target.maker, in_place=True)
    items = [item for turn in turns for item in responses_items(turn, target)]
    body: Json = {"model": target.model, "input": items, "stream": True, "store": False}
    body["instructions"] = words_of(system, "\n\n")
    body["include"] = ["reasoning.encrypted_content"]
    if ask.limit:
        body["max_output_tokens"] = max(16, ask.limit)  # less is a 400 there
    if ask.cache_key:
        body["prompt_cache_key"] = ask.cache_key
    body |= {k: v for k, v in ask.sampling.items() if k in RESPONSE_SAMPLING}
    write_responses_tools(body, ask, target)
    text: Json = {}
    if ask.verbosity:
        text["verbosity"] = ask.verbosity
    if ask.schema == {}:
        text["format"] = {"type": "json_object"}
    elif ask.schema is not None:
        wanted = {"name": ask.schema_name, "schema": ask.schema, "strict": ask.schema_strict}
        text["format"] = {"type": "json_schema", **wanted}
    if text:
        body["text"] = text
    return body


def responses_items(turn: Turn, target: Target) -> list[Json]:
    """The items of a turn; texts and pictures that stand together are one message."""
    items: list[Json] = []
    role = {"system": "developer"}.get(turn.role, turn.role)
    for part in turn.parts:
        if isinstance(part, Text | Media):
            content = responses_content(part, role == "assistant")
            if items and items[-1].get("type") == "message":
                items[-1]["content"].append(content)
            else:
                items.append({"type": "message", "role": role, "content": [content]})
        elif item := responses_history_item(part, target):
            items.append(item)
    return items


def responses_history_item(part: Part, target: Target) -> Json | None:
    match part:
        case Thought(seal=Seal(data=data)) if data:
            summary = [{"type": "summary_text", "text": part.text}] if part.text else []
            item = {"type": "reasoning", "id": "rs_" + digest(data), "summary": summary}
            return {**item, "content": None, "encrypted_content": data}
        case ToolCall():
            item = {"call_id": fitted(part.id, WORD_NAME)}
            item["name"] = target.names.of(part.name, part.namespace)
            if part.free:
                return {"type": "custom_tool_call", **item, "input": part.text}
            return {"type": "function_call", **item, "arguments": json_text(arguments_of(part))}
        case ToolResult():
            free = part.call is not None and part.call.free
            kind = "custom_tool_call_output" if free else "function_call_output"
            id = fitted(part.id, WORD_NAME)
            return {"type": kind, "call_id": id, "output": responses_output(part.parts)}
    return None


def responses_output(parts: list[Text | Media]) -> Any:
    """A text; a list where a picture is among them."""
    if all(isinstance(part, Text) for part in parts):
        return words_of(parts)
    return [responses_content(part, False) for part in parts]


def responses_content(part: Text | Media, answered: bool) -> Json:
    if isinstance(part, Text):
        if answered:
            return {"type": "output_text", "text": part.text, "annotations": []}
        return {"type": "input_text", "text": part.text}
    if part.kind == "image":
        return {"type": "input_image", "image_url": data_url(part), "detail": "auto"}
    if part.kind == "audio":
        return sound_part(part)
    if part.kind == "video":
        raise cannot("A film")
    if part.url:
        return {"type": "input_file", "file_url": part.url}
    name = part.name or "document.pdf"
    return {"type": "input_file", "filename": name, "file_data": data_url(part)}


def write_responses_tools(body: Json, ask: Ask, target: Target) -> None:
    tools: list[Json] = []
    for tool in usable_tools(ask):
        written: Json = {"type": "function", "name": target.names.of(tool.name, tool.namespace)}
        written["description"] = tool.description
        if tool.free:
            written["type"] = "custom"
            if tool.grammar:
                written["format"] = {"syntax": "lark", **tool.grammar, "type": "grammar"}
        else:
            written["parameters"] = object_schema(tool.schema)
            written["strict"] = tool.strict  # what is not named is strict there
        tools.append(written)
    hosted = [hosted_for_openai(name, options) for name, options in free_hosted(ask).items()]
    tools += [tool for tool in hosted if tool["type"] in target.hosted]
    if not tools:
        return
    body["tools"] = tools
    if forced := forced_tool(ask):
        name = target.names.of(forced.name, forced.namespace)
        body["tool_choice"] = {"type": "custom" if forced.free else "function", "name": name}
    elif ask.choice in CHOICES_OF_OPENAI:
        body["tool_choice"] = CHOICES_OF_OPENAI[ask.choice]
    if ask.parallel is not None:
        body["parallel_tool_calls"] = ask.parallel


def hosted_for_openai(name: str, options: Json) -> Json:
    if name == "code_execution":
        return {"type": "code_interpreter", "container": {"type": "auto"}}
    tool: Json = {"type": "web_search"}
    if options.get("allowed_domains"):
        tool["filters"] = {"allowed_domains": options["allowed_domains"]}
    if options.get("user_location"):
        tool["user_location"] = options["user_location"]
    return tool


class ResponsesReader(Reader):
    def __init__(self, reply: Reply) -> None:
        super().__init__(reply)
        self.worded: set[Any] = set()  # outputs whose words came in pieces
        self.summary_part = 0  # that is being told
        self.refused = False

    def read(self, event: Json) -> None:
        kind = text_of(event.get("type")).removeprefix("response.")
        key = event.get("output_index", event.get("item_id"))
        match kind:
            case "output_text.delta" | "refusal.delta":
                self.worded.add(key)
                self.refused = self.refused or kind == "refusal.delta"
                self.reply.say(text_of(event.get("delta")))
            case "reasoning_summary_text.delta" | "reasoning_text.delta":
                self.worded.add(key)
                self.think(event)
            case "function_call_arguments.delta" | "custom_tool_call_input.delta":
                self.reply.arguments(key, text_of(event.get("delta")))
            case "function_call_arguments.done" | "custom_tool_call_input.done":
                whole = event.get("arguments") or event.get("input")
                self.reply.call_done(key, text_of(whole))
            case "output_item.added":
                self.begin(key, as_dict(event.get("item")))
            case "output_item.done":
                self.item(key, as_dict(event.get("item")))
            case "output_text.annotation.added":
                self.cite(as_dict(event.get("annotation")))
            case "created":
                self.reply.name(as_dict(event.get("response")).get("id"))
            case "completed" | "incomplete":
                self.whole(as_dict(event.get("response")))

    def think(self, event: Json) -> None:
        """Several parts of a summary are one thought."""
        part = event.get("summary_index", 0)
        new_part = part != self.summary_part
        if new_part and type(self.reply.latest) is Thought and not self.reply.latest.done:
            self.reply.think("\n\n")
        self.summary_part = part
        self.reply.think(text_of(event.get("delta")))

    def begin(self, key: Any, item: Json) -> None:
        if item.get("type") in ("function_call", "custom_tool_call"):
            free = item["type"] == "custom_tool_call"
            self.reply.call(key, text_of(item.get("call_id")), text_of(item.get("name")), free)
            call = self.reply.calls[key]
            call.namespace = text_of(item.get("namespace")) or call.namespace

    def item(self, key: Any, item: Json) -> None:
        """A whole item: what was not told in pieces is told now."""
        match item.get("type"):
            case "function_call" | "custom_tool_call":
                if key not in self.reply.calls:
                    self.begin(key, item)
                whole = item.get("arguments") or item.get("input")
                self.reply.call_done(key, text_of(whole))
            case "reasoning":
                if key not in self.worded:
                    parts = as_dicts(item.get("summary")) or as_dicts(item.get("content"))
                    self.reply.think("\n\n".join(text_of(part.get("text")) for part in parts))
                self.summary_part = 0
                self.reply.seal(item.get("encrypted_content"))
            case "message":
                for part in as_dicts(item.get("content")):
                    if key not in self.worded:
                        self.refused = self.refused or bool(part.get("refusal"))
                        self.reply.say(text_of(part.get("text")) or text_of(part.get("refusal")))
                    for note in as_dicts(part.get("annotations")):
                        self.cite(note)
            case "image_generation_call":
                self.reply.show(Media("image", "image/png", text_of(item.get("result"))))
        self.worded.add(key)

    def cite(self, note: Json) -> None:
        self.reply.cite(Source(text_of(note.get("url")), text_of(note.get("title"))))

    def whole(self, response: Json) -> None:
        """The end: usage, the reason, and the items that no event told."""
        reply = self.reply
        reply.name(response.get("id"))
        for index, item in enumerate(as_dicts(response.get("output"))):
            if not self.worded & {index, item.get("id")}:
                self.item(index, item)
        self.count(reply.usage, response)
        reason = text_of(as_dict(response.get("incomplete_details")).get("reason"))
        if response.get("status") == "incomplete":
            reply.stopped(RESPONSE_STOPS.get(reason, "length"))
        else:
            reply.stopped("refusal" if self.refused else "end")
        self.over = True

    @staticmethod
    def count(found: Usage, event: Json) -> None:
        usage = as_dict(event.get("usage"))
        found.update(
            read=usage.get("input_tokens"),
            cached=as_dict(usage.get("input_tokens_details")).get("cached_tokens"),
            written=usage.get("output_tokens"),
            thought=as_dict(usage.get("output_tokens_details")).get("reasoning_tokens"),
        )

    def read_whole(self, answer: Json) -> None:
        self.whole(answer)


def responses_item_of(block: Block, id: str, done: bool = True) -> Json:
    """An item of an answer: as it begins, or whole."""
    item: Json = {"id": id, "status": "completed" if done else "in_progress"}
    match block:
        case Text():
            content = [output_text(block)] if done else []
            return {**item, "type": "message", "role": "assistant", "content": content}
        case Thought():
            summary = [{"type": "summary_text", "text": block.text}] if done and block.text else []
            item = {"id": id, "type": "reasoning", "summary": summary}
            if done and block.seal:
                item["encrypted_content"] = seal_text(block.seal, "responses")
            return item
        case ToolCall():
            item |= {"call_id": block.id, "name": block.name}
            if block.namespace:
                item["namespace"] = block.namespace
            words = block.text if done else ""
            if block.free:
                return {"type": "custom_tool_call", **item, "input": words}
            return {"type": "function_call", **item, "arguments": words or ("{}" if done else "")}
    return {"type": "image_generation_call", **item, "result": block.data if done else None}


def output_text(text: Text) -> Json:
    notes = [response_note(source) for source in text.sources]
    return {"type": "output_text", "text": text.text, "annotations": notes, "logprobs": []}


def response_note(source: Source) -> Json:
    return {"type": "url_citation", **openai_citation(source)}


ITEM_IDS: dict[type, str] = {Text: "msg", Thought: "rs", ToolCall: "fc", Media: "ig"}


def response_item_id(reply: Reply, index: int) -> str:
    block = reply.blocks[index]
    kind = "ctc" if isinstance(block, ToolCall) and block.free else ITEM_IDS[type(block)]
    return f"{kind}_{digest(reply.id, str(reply.created), str(index))}"


# What a Responses answer repeats of its request, and what stands there when it said nothing.
REPEATED: Json = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "service_tier": "default",
    "store": False,
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": None,
    "truncation": "disabled",
}


def responses_usage_of(usage: Usage) -> Json:
    return {
        "input_tokens": usage.read,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.written,
        "output_tokens_details": {"reasoning_tokens": usage.thought},
        "total_tokens": usage.read + usage.written,
    }


def response_start(reply: Reply, status: str) -> Json:
    return {
        "id": reply.id_with("resp_"),
        "object": "response",
        "created_at": reply.created,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "model": reply.model,
        "output": [],
        "usage": None,
        **REPEATED,
        **reply.repeated,
    }


def write_responses_answer(reply: Reply) -> Json:
    reason = RESPONSE_REASONS.get(reply.stop)
    answer = response_start(reply, "incomplete" if reason else "completed")
    if reason:
        answer["incomplete_details"] = {"reason": reason}
    answer["output"] = [
        responses_item_of(block, response_item_id(reply, index))
        for index, block in enumerate(reply.blocks)
    ]
    answer["usage"] = responses_usage_of(reply.usage)
    return answer


class ResponsesWriter(Reply):
    number = 0  # of the next event
    index = -1  # of the item that is open
    item_id = ""
    head = b""  # of the item's deltas
    part_is_open = False  # the part of a message or a summary that words go into
    DELTAS: ClassVar[dict[type, tuple[str, str]]] = {
        Text: ("output_text.delta", "content_index"),
        Thought: ("reasoning_summary_text.delta", "summary_index"),
        ToolCall: ("function_call_arguments.delta", ""),
    }

    def put(self, kind: str, **fields: Any) -> None:
        event = {"type": "response." + kind, "sequence_number": self.number, **fields}
        self.number += 1
        self.out.append(b"event: response.%b\n" % kind.encode() + data_event(event))

    def place(self, **more: Any) -> Json:
        return {"item_id": self.item_id, "output_index": self.index, **more}

    def begin_response(self) -> None:
        if self.number == 0:
            self.put("created", response=response_start(self, "in_progress"))
            self.put("in_progress", response=response_start(self, "in_progress"))

    def opened(self, block: Block) -> None:
        self.begin_response()
        self.index += 1
        self.item_id = response_item_id(self, self.index)
        item = responses_item_of(block, self.item_id, done=False)
        self.put("output_item.added", output_index=self.index, item=item)
        kind, counter = self.DELTAS.get(type(block), ("", ""))
        place = self.place(**({counter: 0} if counter else {}))
        start = json_text({"type": "response." + kind, **place}).removesuffix("}")
        self.head = f"event: response.{kind}\ndata: {start}".encode()
        if isinstance(block, Text):
            part = output_text(Text())
            self.put("content_part.added", **self.place(content_index=0, part=part))

    def grew(self, block: Block, words: str) -> None:
        if isinstance(block, ToolCall) and block.free:
            return
        if isinstance(block, Thought) and not self.part_is_open:
            self.part_is_open = True
            part = {"type": "summary_text", "text": ""}
            self.put("reasoning_summary_part.added", **self.place(summary_index=0, part=part))
        values = (self.head, self.number, write_json(words))
        self.number += 1
        self.out.append(b'%b,"sequence_number":%d,"delta":%b}\n\n' % values)

    def cited(self, block: Text, source: Source) -> None:
        place = self.place(content_index=0, annotation_index=len(block.sources) - 1)
        self.put("output_text.annotation.added", **place, annotation=response_note(source))

    def closed(self, block: Block) -> None:
        match block:
            case Text():
                place = self.place(content_index=0)
                self.put("output_text.done", **place, text=block.text, logprobs=[])
                self.put("content_part.done", **place, part=output_text(block))
            case Thought() if self.part_is_open:
                self.part_is_open = False
                place = self.place(summary_index=0)
                self.put("reasoning_summary_text.done", **place, text=block.text)
                part = {"type": "summary_text", "text": block.text}
                self.put("reasoning_summary_part.done", **place, part=part)
            case ToolCall(free=True):
                self.put("custom_tool_call_input.delta", **self.place(delta=block.text))
                self.put("custom_tool_call_input.done", **self.place(input=block.text))
            case ToolCall():
                place = self.place(name=block.name, arguments=block.text or "{}")
                self.put("function_call_arguments.done", **place)
        item = responses_item_of(block, self.item_id)
        self.put("output_item.done", output_index=self.index, item=item)

    def ended(self) -> None:
        self.begin_response()
        answer = write_responses_answer(self)
        self.put(answer["status"], response=answer)


# == Gemini ========================================================================================
#
# Google's generateContent.  Calls come whole and mostly without ids; the answers of calls that were
# made at once stand in one turn, in their order.  Every chunk of a stream is an answer with what is
# new; usage is that of the last one.
#
# Seals stand on the part behind the thought: on a call, a text, or an empty text at the end.
# Gemini 3 wants one on the first call of a turn (providers.md 5.3).

GEMINI_MAKER = "gemini/gemini"
GEMINI_STOPS = {
    "STOP": "end",
    "MAX_TOKENS": "length",
    "SAFETY": "refusal",
    "PROHIBITED_CONTENT": "refusal",
    "BLOCKLIST": "refusal",
    "SPII": "refusal",
    "RECITATION": "refusal",
    "LANGUAGE": "refusal",
    "IMAGE_SAFETY": "refusal",
    "IMAGE_PROHIBITED_CONTENT": "refusal",
}
GEMINI_FAILURES = ("MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL")
GEMINI_REASONS = {  # the last four have no word of their own
    **flip(GEMINI_STOPS),
    "call": "STOP",
    "sequence": "STOP",
    "pause": "STOP",
    "context": "MAX_TOKENS",
}
GEMINI_SAMPLING = {
    "temperature": "temperature",
    "top_p": "topP",
    "top_k": "topK",
    "seed": "seed",
    "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
}
GEMINI_CHOICES = {"AUTO": "auto", "ANY": "any", "NONE": "none"}
NO_SEAL = "skip_thought_signature_validator"  # Google's own word for a call that has none


def camel(table: Json) -> Json:
    """A table with Google's own keys, which clients may send with underscores; both are one."""
    if not any("_" in name for name in table):
        return table
    found: Json = {}
    for name, value in table.items():
        whole = re.sub(r"_([a-z])", lambda part: part[1].upper(), name)
        both = isinstance(value, dict) and isinstance(found.get(whole), dict)
        found[whole] = found[whole] | value if both else value
    return found


def read_gemini_request(body: Json) -> Ask:
    body = camel(as_dict(body.get("generateContentRequest")) or body)
    settings = camel(as_dict(body.get("generationConfig")))
    ask = Ask(limit=int(number(settings.get("maxOutputTokens"))))
    given = body.get("systemInstruction")
    system = given if isinstance(given, (str, list)) else as_dict(given).get("parts")
    ask.turns.append(Turn("system", GeminiHistory().parts(system)))
    history = GeminiHistory()
    for content in gemini_contents(body.get("contents")):
        role = {"model": "assistant", "system": "system"}.get(text_of(content.get("role")), "user")
        parts = history.parts(content.get("parts"))
        if role == "assistant":
            put_answered(ask.turns, parts)
        else:
            ask.turns.append(Turn(role, parts))
    read_gemini_tools(ask, body)
    ask.stops = [stop for stop in as_list(settings.get("stopSequences")) if isinstance(stop, str)]
    found = {name: settings.get(theirs) for name, theirs in GEMINI_SAMPLING.items()}
    ask.sampling = {name: value for name, value in found.items() if value is not None}
    if settings.get("responseMimeType") == "application/json":
        schema = settings.get("responseJsonSchema") or settings.get("responseSchema")
        ask.schema = plain_schema(as_dict(schema))
    if number(settings.get("candidateCount")) > 1:
        raise cannot("candidateCount")
    if body.get("cachedContent"):
        raise cannot("cachedContent")
    if settings.get("responseModalities") not in (None, [], ["TEXT"]):
        raise cannot("responseModalities")
    return ask


def parts_of(content: Any) -> list[Json]:
    return as_dicts(as_dict(content).get("parts"))


def put_answered(turns: list[Turn], parts: list[Part]) -> None:
    """What a model said comes back in the pieces of its stream, maybe each as a turn."""
    if turns[-1].role != "assistant":
        turns.append(Turn("assistant", []))
    earlier = turns[-1].parts
    for part in parts:
        last = earlier[-1] if earlier else None
        if isinstance(part, Text) and isinstance(last, Text):
            last.text += part.text
        elif isinstance(part, Thought) and isinstance(last, Thought) and last.seal is None:
            last.text += part.text
            last.seal = part.seal
        else:
            earlier.append(part)


def gemini_contents(contents: Any) -> list[Json]:
    if isinstance(contents, str):
        return [{"parts": [{"text": contents}]}]
    return [contents] if isinstance(contents, dict) else as_dicts(contents)


class GeminiHistory:
    """Reads the parts of all turns; gives ids to calls without one, and to their results."""

    def __init__(self) -> None:
        self.open: list[tuple[str, str]] = []  # (name, id) of calls that wait for a result
        self.calls = 0

    def parts(self, given: Any) -> list[Part]:
        if isinstance(given, str):
            return [Text(given)]
        parts: list[Part] = []
        for part in map(camel, as_dicts([given] if isinstance(given, dict) else given)):
            read = self.part(part)
            seal = read_seal(part.get("thoughtSignature"), GEMINI_MAKER)
            if seal and not isinstance(read, Thought):
                put_seal(parts, seal)
            elif seal and isinstance(read, Thought):
                read.seal = seal
            if read:
                parts.append(read)
        return parts

    def part(self, part: Json) -> Part | None:
        if isinstance(part.get("functionCall"), dict):
            return self.call(part["functionCall"])
        if isinstance(part.get("functionResponse"), dict):
            return self.result(camel(part["functionResponse"]))
        if isinstance(part.get("inlineData"), dict):
            return gemini_media(camel(part["inlineData"]))
        if isinstance(part.get("fileData"), dict):
            return gemini_media(camel(part["fileData"]))
        if part.get("thought"):
            return Thought(text_of(part.get("text")))
        return Text(text_of(part.get("text"))) if "text" in part else None

    def call(self, call: Json) -> ToolCall:
        name, words = text_of(call.get("name")), json_text(as_dict(call.get("args")))
        self.calls += 1
        id = text_of(call.get("id")) or "call_" + digest(name, words, str(self.calls))
        self.open.append((name, id))
        return ToolCall(id, name, words)

    def result(self, answer: Json) -> ToolResult:
        """The id of a call by its name, the oldest first, where the client gives none."""
        name, id = text_of(answer.get("name")), text_of(answer.get("id"))
        waiting = [pair for pair in self.open if (pair[1] == id if id else pair[0] == name)]
        if waiting:
            self.open.remove(waiting[0])
            id = waiting[0][1]
        response = as_dict(answer.get("response"))
        failed = "error" in response and len(response) == 1
        only = response.get("error") if failed else response.get("output", response.get("result"))
        lone = only if len(response) == 1 and isinstance(only, str) else json_text(response)
        parts: list[Text | Media] = [Text(lone)]
        for part in map(camel, as_dicts(answer.get("parts"))):
            data = as_dict(part.get("inlineData")) or as_dict(part.get("fileData"))
            parts.append(gemini_media(camel(data)))
        return ToolResult(id or "call_" + digest(name), parts, failed)


def put_seal(parts: list[Part], seal: Seal) -> None:
    """A seal belongs to the thought in front of it, if that has none."""
    last = parts[-1] if parts else None
    if isinstance(last, Thought) and last.seal is None:
        last.seal = seal
    else:
        parts.append(Thought("", seal))


def gemini_media(source: Json) -> Media:
    mime = text_of(source.get("mimeType"))
    family = mime.partition("/")[0]
    kind = family if family in ("image", "audio", "video") else "document"
    url, data = text_of(source.get("fileUri")), text_of(source.get("data"))
    if url and not url.startswith(("http://", "https://")):
        raise cannot("A file that was uploaded elsewhere")
    return Media(kind, mime, data.replace("-", "+").replace("_", "/"), url)


def read_gemini_tools(ask: Ask, body: Json) -> None:
    for tool in map(camel, as_dicts(body.get("tools"))):
        for declared in map(camel, as_dicts(tool.get("functionDeclarations"))):
            schema = declared.get("parametersJsonSchema") or declared.get("parameters")
            name, about = text_of(declared.get("name")), text_of(declared.get("description"))
            ask.tools.append(Tool(name, about, plain_schema(as_dict(schema))))
        if "googleSearch" in tool or "googleSearchRetrieval" in tool:
            ask.hosted["web_search"] = {}
        if "codeExecution" in tool:
            ask.hosted["code_execution"] = {}
    choice = camel(as_dict(camel(as_dict(body.get("toolConfig"))).get("functionCallingConfig")))
    mode = text_of(choice.get("mode")).upper()
    ask.choice = GEMINI_CHOICES.get(mode, "")
    ask.allowed = [n for n in as_list(choice.get("allowedFunctionNames")) if isinstance(n, str)]


def plain_schema(schema: Any) -> Any:
    """JSON Schema of Google's own form: types in capitals, `nullable`."""
    return reworded(schema, in_plain_words)


def in_plain_words(schema: Json) -> Json:
    kept = without(schema, "nullable", "propertyOrdering")
    types = kept.get("type")
    if isinstance(types, str):
        kept["type"] = types.lower()
        if schema.get("nullable") is True:
            kept["type"] = [types.lower(), "null"]
    elif isinstance(types, list):
        kept["type"] = [kind.lower() for kind in types if isinstance(kind, str)]
    for name in INT64_WORDS & kept.keys():  # Google writes such figures as texts
        kept[name] = int(number(kept[name]))
    return kept


INT64_WORDS = {"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"}


def write_gemini_request(ask: Ask, target: Target) -> Json:
    system, turns = split_off_system(ask, target.maker, user_first=True)
    roles = {"assistant": "model", "user": "user"}
    contents = [{"role": roles[turn.role], "parts": gemini_parts(turn, target)} for turn in turns]
    body: Json = {"contents": contents}
    if system:
        body["systemInstruction"] = {"parts": [{"text": part.text} for part in system]}
    settings = {GEMINI_SAMPLING[k]: v for k, v in ask.sampling.items() if k in GEMINI_SAMPLING}
    if ask.limit:
        settings["maxOutputTokens"] = ask.limit
    if ask.stops:
        settings["stopSequences"] = ask.stops[: MOST_STOPS["gemini"]]
    if ask.schema is not None:
        settings["responseMimeType"] = "application/json"
        if ask.schema:
            settings["responseSchema"] = google_schema(ask.schema)
    if settings:
        body["generationConfig"] = settings
    write_gemini_tools(body, ask, target)
    return body


def gemini_parts(turn: Turn, target: Target) -> list[Json]:
    """The parts of a turn; pictures of results stand behind the results."""
    results = [part for part in turn.parts if isinstance(part, ToolResult)]
    others = sealed_calls([part for part in turn.parts if not isinstance(part, ToolResult)])
    parts = [{"functionResponse": gemini_response(result, target)} for result in results]
    parts += [gemini_data(p) for result in results for p in result.parts if isinstance(p, Media)]
    written = [
        gemini_call(part, target) if isinstance(part, ToolCall) else gemini_part(part)
        for part in others
    ]
    parts += with_seals(others, written)
    return with_call_sealed(parts) if wants_seals(target.model) else parts


def wants_seals(model: str) -> bool:
    """Gemini 3 does, on the first call of each step (providers.md 5.3)."""
    return "gemini" in model and not re.search(r"gemini-[12]", model)


def with_call_sealed(parts: list[Any]) -> list[Any]:
    """The parts of a turn, with Google's own word where its first call has no seal."""
    for index, part in enumerate(parts):
        if isinstance(part, dict) and "functionCall" in part:
            if part.get("thoughtSignature"):
                return parts
            sealed = {**part, "thoughtSignature": NO_SEAL}
            return [*parts[:index], sealed, *parts[index + 1 :]]
    return parts


def sealed_calls(parts: list[Part]) -> list[Part]:
    """The seal in front of the first call, which Google seals rather than the text before it.

    A Chat client tells all thoughts first.
    """
    call = next((i for i, part in enumerate(parts) if isinstance(part, ToolCall)), 0)
    last = next((i for i in reversed(range(call)) if isinstance(parts[i], Thought)), -1)
    thought = parts[last] if 0 <= last < call - 1 else None
    if not isinstance(thought, Thought):
        return parts
    words, seal = dataclasses.replace(thought, seal=None), dataclasses.replace(thought, text="")
    return [*parts[:last], words, *parts[last + 1 : call], seal, *parts[call:]]


def with_seals(parts: Iterable[Part], written: Iterable[Json]) -> list[Json]:
    """The written parts; a seal goes from its thought to the part behind it."""
    sealed: list[Json] = []
    seal = ""
    for part, words in zip(parts, written, strict=True):
        if not isinstance(part, Thought):
            if seal:
                words["thoughtSignature"] = seal
            seal = ""
            sealed.append(words)
            continue
        if seal:
            sealed.append({"text": "", "thoughtSignature": seal})
        seal = seal_text(part.seal, "gemini") if part.seal else ""
        if part.text:
            sealed.append(words)
    if seal:
        sealed.append({"text": "", "thoughtSignature": seal})
    return sealed


def gemini_part(part: Part) -> Json:
    """Of an answer; of a history, all but its calls."""
    match part:
        case Text():
            return {"text": part.text}
        case Thought():
            return {"text": part.text, "thought": True}
        case Media():
            return gemini_data(part)
        case ToolCall():
            call = {"id": part.id, "name": part.name, "args": arguments_of(part)}
            return {"functionCall": call}
    raise TypeError(part)  # results stand elsewhere


def gemini_call(call: ToolCall, target: Target) -> Json:
    written: Json = {"name": target.names.of(call.name, call.namespace), "args": arguments_of(call)}
    if target.maker == "gemini/claude":  # Antigravity hands it to Claude, who pairs by ids
        written["id"] = fitted(call.id, WORD_NAME)
    return {"functionCall": written}


def gemini_response(result: ToolResult, target: Target) -> Json:
    """Google wants an object: a text that is none is put into one."""
    words = words_of(result.parts)
    response: Json = {"error" if result.failed else "result": words}
    if not result.failed and words[:1] == "{":
        with suppress(ValueError):
            response = parse_object(words.encode())
    call = result.call or ToolCall("", "")
    written: Json = {"name": target.names.of(call.name, call.namespace), "response": response}
    if target.maker == "gemini/claude":
        written["id"] = fitted(result.id, WORD_NAME)
    return written


MIME_TYPES = {".png": "image/png", ".gif": "image/gif", ".webp": "image/webp"}
KIND_TYPES = {"image": "image/jpeg", "audio": "audio/wav", "document": "application/pdf"}


def gemini_data(media: Media) -> Json:
    if not media.url:
        mime = media.mime or KIND_TYPES[media.kind]
        return {"inlineData": {"mimeType": mime, "data": media.data}}
    ending = Path(as_url(media.url).path).suffix.lower()
    mime = media.mime or MIME_TYPES.get(ending) or KIND_TYPES[media.kind]
    return {"fileData": {"mimeType": mime, "fileUri": media.url}}


def write_gemini_tools(body: Json, ask: Ask, target: Target) -> None:
    functions: list[Json] = []
    for tool in map(described, usable_tools(ask)):
        name = target.names.of(tool.name, tool.namespace)
        function: Json = {"name": name, "description": tool.description}
        schema = google_schema(object_schema(tool.schema))
        if schema.get("properties"):  # an object without any is refused
            function["parameters"] = schema
        functions.append(function)
    tools: list[Json] = [{"functionDeclarations": functions}] if functions else []
    hosted = {"web_search": "googleSearch", "code_execution": "codeExecution"}
    for name in free_hosted(ask):
        if functions:
            log.debug("the tool %s is left out: Google takes none beside functions", name)
        else:
            tools.append({hosted[name]: {}})
    if not tools:
        return
    body["tools"] = tools
    forced = forced_tool(ask)
    config: Json = {"mode": "ANY" if forced else flip(GEMINI_CHOICES).get(ask.choice, "")}
    if forced:
        config["allowedFunctionNames"] = [target.names.of(forced.name, forced.namespace)]
    if functions and config["mode"]:
        body["toolConfig"] = {"functionCallingConfig": config}


class GeminiReader(Reader):
    may_just_end = must_speak = True

    def read(self, event: Json) -> None:
        reply = self.reply
        reply.name(event.get("responseId"))
        for candidate in as_dicts(event.get("candidates"))[:1]:
            for part in parts_of(candidate.get("content")):
                self.part(part)
            self.stop(candidate)
            grounds = as_dict(candidate.get("groundingMetadata")).get("groundingChunks")
            for ground in as_dicts(grounds):
                web_page = as_dict(ground.get("web"))
                reply.cite(Source(text_of(web_page.get("uri")), text_of(web_page.get("title"))))
        if as_dict(event.get("promptFeedback")).get("blockReason"):
            reply.stopped("refusal")
        if "usageMetadata" in event:
            self.count(reply.usage, event)

    def part(self, part: Json) -> None:
        reply, words = self.reply, part.get("text")
        if part.get("thought"):
            reply.think(text_of(words))
            reply.seal(part.get("thoughtSignature"))
            return
        reply.seal(part.get("thoughtSignature"))
        if words:
            reply.say(text_of(words))
        elif isinstance(part.get("functionCall"), dict):
            call = part["functionCall"]
            key = len(reply.blocks)
            reply.call(key, text_of(call.get("id")), text_of(call.get("name")))
            reply.call_done(key, json_text(as_dict(call.get("args"))))
        elif isinstance(part.get("inlineData"), dict):
            reply.show(gemini_media(part["inlineData"]))

    def stop(self, candidate: Json) -> None:
        reason = text_of(candidate.get("finishReason"))
        if reason in GEMINI_FAILURES:
            words = text_of(candidate.get("finishMessage"))[:300]
            words = f"the model made a call that cannot be read: {reason} {words}".strip()
            raise ProxyError(Problem(502, words, codes=frozenset({reason.lower()})))
        if reason:
            self.reply.stopped(GEMINI_STOPS.get(reason, "end"))

    @staticmethod
    def count(found: Usage, event: Json) -> None:
        usage = as_dict(event.get("usageMetadata"))
        prompt, tools = usage.get("promptTokenCount"), usage.get("toolUsePromptTokenCount")
        thoughts = number(usage.get("thoughtsTokenCount"))
        found.update(
            read=number(prompt) + number(tools),
            cached=usage.get("cachedContentTokenCount"),
            written=number(usage.get("candidatesTokenCount")) + thoughts,
            thought=thoughts,
        )

    def read_whole(self, answer: Json) -> None:
        self.read(answer)
        self.over = True


def gemini_usage_of(usage: Usage) -> Json:
    counts = {
        "promptTokenCount": usage.read,
        "candidatesTokenCount": max(0, usage.written - usage.thought),
        "totalTokenCount": usage.read + usage.written,
    }
    more = {"cachedContentTokenCount": usage.cached, "thoughtsTokenCount": usage.thought}
    return counts | {name: figure for name, figure in more.items() if figure}


def gemini_answer(reply: Reply, parts: list[Json], ended: bool) -> Json:
    candidate: Json = {"content": {"role": "model", "parts": parts}, "index": 0}
    if ended:
        candidate["finishReason"] = GEMINI_REASONS[reply.stop]
        pages = [s for block in reply.blocks if isinstance(block, Text) for s in block.sources]
        if pages:
            chunks = [{"web": {"uri": page.url, "title": page.title}} for page in pages]
            candidate["groundingMetadata"] = {"groundingChunks": chunks}
    answer: Json = {"candidates": [candidate], "modelVersion": reply.model, "responseId": reply.id}
    if ended:
        answer["usageMetadata"] = gemini_usage_of(reply.usage)
    return answer


def write_gemini_answer(reply: Reply) -> Json:
    parts = with_seals(reply.blocks, map(gemini_part, reply.blocks))
    return gemini_answer(reply, parts, ended=True)


class GeminiWriter(Reply):
    seal_waits = ""  # for the part behind its thought
    tail = b""
    LEFT = b'data: {"candidates":[{"content":{"role":"model","parts":['

    def put(self, part: Json) -> None:
        if self.seal_waits:
            part["thoughtSignature"], self.seal_waits = self.seal_waits, ""
        self.out.append(data_event(gemini_answer(self, [part], ended=False)))

    def opened(self, block: Block) -> None:
        if not self.tail:
            names = {"modelVersion": self.model, "responseId": self.id}
            self.tail = b']},"index":0}],' + write_json(names)[1:] + b"\n\n"
        if isinstance(block, Thought) and self.seal_waits:
            self.put({"text": ""})

    def grew(self, block: Block, words: str) -> None:
        if isinstance(block, ToolCall):
            return
        if self.seal_waits:
            self.put({"text": words})
            return
        thought = b',"thought":true' if isinstance(block, Thought) else b""
        self.out.append(b'%b{"text":%b%b}%b' % (self.LEFT, write_json(words), thought, self.tail))

    def closed(self, block: Block) -> None:
        if isinstance(block, Thought):
            self.seal_waits = seal_text(block.seal, "gemini") if block.seal else ""
        elif not isinstance(block, Text):
            self.put(gemini_part(block))

    def ended(self) -> None:
        part: Json = {"text": ""}  # Google's chats forget an answer that has a chunk without parts
        if self.seal_waits:
            part["thoughtSignature"] = self.seal_waits
        self.out.append(data_event(gemini_answer(self, [part], ended=True)))


# == Dialects ======================================================================================
#
# The four ways to word a model call, a row each: what errors look like, which events matter, where
# an answer ends, and what the four sections above have made.
#
# In an answer that is in the client's own dialect an event that has none of the `marks` passes
# unread; `says`, `ending` and `flaw` judge the others.  One that is translated has its Reader.
#
# To add a dialect, add a section above and a row here, who makes its seals to family_of, how many
# stop sequences it takes to MOST_STOPS, its paths to MODEL_PATH and DIALECTS, what it calls an
# effort to EFFORT_WORDS, effort_of and with_effort, the row to SPOKES, and its verbs to VERBS and
# the providers' paths.


@dataclass(frozen=True)
class Dialect:
    name: str
    error: Callable[[int, str], Json]  # the body of an error
    error_event: Callable[[Json, bytes], bytes]  # ends a stream; of that, and the last events
    comment: bytes  # the line that keeps a silent stream alive; b"" where clients break on it
    marks: tuple[bytes, ...]  # one is in every event that must be looked at
    model_key: str  # where an answer names its model...
    model_marks: tuple[bytes, ...]  # ...and what is in events that do, where many of them do
    short_ends: bool  # its last events are small: of a long run only the end is searched
    ending: Callable[[Json], str]  # of an event: "over", "whole" when the end may come, or ""
    # -- From and to the neutral form --
    verb: str  # of a provider's paths: what it is asked for
    name_rule: NameRule  # of the names of tools
    read_request: Callable[[Json], Ask]
    write_request: Callable[[Ask, Target], Json]
    reader: type[Reader]  # of an answer's events
    writer: type[Reply]
    write_answer: Callable[[Reply], Json]  # in one piece
    cuts_errors: bool = False  # clients only notice an error when the connection breaks, too
    says: Callable[[Json], str] = lambda event: "answer"  # some of it, "thought", or ""
    flaw: Callable[[Json], str] = lambda event: ""  # why an end is none; see gemini_flaw

    def usage(self, event: Json) -> tuple[int, int]:
        """Input and output tokens, of what `holder` finds."""
        found = Usage()
        self.reader.count(found, event)
        return found.read, found.written


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


def error_kinds(status: int) -> tuple[str, str, str]:
    return KINDS.get(status, KINDS[400 if status < 500 else 500])


def anthropic_error(status: int, message: str) -> Json:
    return {"type": "error", "error": {"type": error_kinds(status)[0], "message": message}}


def openai_error(status: int, message: str) -> Json:
    kind = error_kinds(status)[1]
    return {"error": {"message": message, "type": kind, "code": kind}}


def gemini_error(status: int, message: str) -> Json:
    return {"error": {"code": status, "message": message, "status": error_kinds(status)[2]}}


def plain_error_event(body: Json, last: bytes) -> bytes:
    return data_event(body)


def anthropic_error_event(body: Json, last: bytes) -> bytes:
    return b"event: error\n" + data_event(body)


NUMBERED_END = 1 << 16  # bytes at the end of a stream in which its last number is looked for
SEQUENCE_NUMBER = re.compile(rb'"sequence_number": ?(\d{1,9})')


def responses_error_event(body: Json, last: bytes) -> bytes:
    """Codex takes notice of no other (clients.md); numbers go on from those of `last`."""
    failed = {"object": "response", "status": "failed", **body, "output": []}
    numbers = SEQUENCE_NUMBER.findall(last[-NUMBERED_END:])
    next_number = max(map(int, numbers), default=-1) + 1
    return data_event(
        {"type": "response.failed", "sequence_number": next_number, "response": failed}
    )


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


SAID_BESIDE = {"text", "thought", "thoughtSignature", "partMetadata"}


def gemini_says(event: Json) -> str:
    candidates = as_dicts(event.get("candidates"))
    parts = [part for candidate in candidates for part in parts_of(candidate.get("content"))]
    answers = [part for part in parts if not part.get("thought")]
    if any(part.get("text") or part.keys() - SAID_BESIDE for part in answers):
        return "answer"
    return "thought" if any(part.get("thought") and part.get("text") for part in parts) else ""


EMPTY_ANSWER = "EMPTY_ANSWER"  # no word of Google's
GENERATES = ("generateContent", "streamGenerateContent", "messages")  # these have an answer proper


def anthropic_says(event: Json) -> str:
    return "" if event.get("type") in ("ping", "message_delta", "message_stop") else "answer"


def anthropic_flaw(event: Json) -> str:
    """An end alone is none."""
    return EMPTY_ANSWER if event.get("type") == "message_stop" else ""


def gemini_flaw(event: Json) -> str:
    """What makes an end no end; STOP alone is one only behind something that was said."""
    if as_dict(event.get("promptFeedback")).get("blockReason"):
        return ""
    reasons = [one.get("finishReason") for one in as_dicts(event.get("candidates"))]
    flaws = [reason for reason in reasons if reason in GEMINI_FAILURES]
    if flaws:
        return str(flaws[0])
    quiet = all(reason in (None, "STOP", "FINISH_REASON_UNSPECIFIED") for reason in reasons)
    return EMPTY_ANSWER if quiet else ""


def holder(event: Json) -> Json:
    """The part of an event, or of a whole answer, that names the model and counts tokens."""
    return as_dict(event.get("message")) or as_dict(event.get("response")) or event


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
    verb="messages",
    name_rule=WORD_NAME,
    read_request=read_anthropic_request,
    write_request=write_anthropic_request,
    reader=AnthropicReader,
    writer=AnthropicWriter,
    write_answer=write_anthropic_answer,
    says=anthropic_says,
    flaw=anthropic_flaw,
)
CHAT_COMPLETIONS = Dialect(
    name="chat",
    error=openai_error,
    error_event=plain_error_event,
    # openai's Python SDK raises for one with an empty line behind it after an id (clients.md).
    comment=b": keep-alive\n",
    marks=(b"[DONE]", b'"finish_reason":"', b'"finish_reason": "', b'"usage":', b'"error"'),
    model_key="model",
    model_marks=(b'"model"',),
    short_ends=True,
    ending=chat_ending,
    verb="completions",
    name_rule=WORD_NAME,
    read_request=read_chat_request,
    write_request=write_chat_request,
    reader=ChatReader,
    writer=ChatWriter,
    write_answer=write_chat_answer,
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
    verb="responses",
    name_rule=WORD_NAME,
    read_request=read_responses_request,
    write_request=write_responses_request,
    reader=ResponsesReader,
    writer=ResponsesWriter,
    write_answer=write_responses_answer,
)
GEMINI = Dialect(
    name="gemini",
    error=gemini_error,
    error_event=plain_error_event,
    comment=b"",  # Google's SDKs raise, or drop the event behind it (clients.md)
    marks=(b'"candidates"', b'"blockReason"', b'"usageMetadata"', b'"error"'),  # all of them
    model_key="modelVersion",
    model_marks=(),
    short_ends=False,
    ending=gemini_ending,
    verb="streamGenerateContent",
    name_rule=GOOGLE_NAME,
    read_request=read_gemini_request,
    write_request=write_gemini_request,
    reader=GeminiReader,
    writer=GeminiWriter,
    write_answer=write_gemini_answer,
    cuts_errors=True,
    says=gemini_says,
    flaw=gemini_flaw,
)


# == Provider rules ================================================================================
#
# What a login's backend asks of a request (providers.md 1.3, 2.3).  A rule takes a body and returns
# one.  It changes nothing in place: the next provider is asked with the same body.  What it leaves
# alone it shares: a body that is still the client's own is sent as the bytes that came.
#
# To add a rule, write a function and name it in RULES; Code Assist's two kinds of login have
# code_assist_rules, which need the model and the verb as well.

IDENTITY = "You are Claude Code, Anthropic's official CLI for Claude."
TOOL_USE_KEYS = {"type", "id", "name", "input", "cache_control", "caller"}
# A Claude signature is base64 of a first byte 0x12, encoded once or twice (providers.md 1.3.12).
SIGNATURE = re.compile(r"E[g-v]|R[WX]")
DEEPEST = 9  # lists of blocks in blocks; Claude itself knows three
LEAST_BUDGET = 1024  # of Claude's thinking
ANSWER_ROOM = 4096  # tokens that a budget leaves for the answer


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
    return kind in ("enabled", "adaptive", "auto") or (kind is None and thinking.by_itself)


def without_thought(body: Json, thinking: Thinking) -> Json:
    """Thinking off, and the effort with it; some models must be told."""
    body = without(body, "thinking")
    output = body.get("output_config")
    if isinstance(output, dict) and "effort" in output:
        body["output_config"] = without(output, "effort")
    if thinking.by_itself:
        body["thinking"] = {"type": "disabled"}
    return body


def with_fitting_thought(body: Json, thinking: Thinking) -> Json:
    """Thinking off for a forced tool, else a budget of 1,024 to less than max_tokens."""
    if forces_tool(body) and is_thinking(body, thinking):
        return without_thought(body, thinking)
    given = as_dict(body.get("thinking"))
    if given.get("type") == "auto":  # a word of Amp's only
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
    return without(body, "context_management")


def without_sampling(body: Json, model: str, thinks: bool) -> Json:
    """Without what is refused beside thinking, by newer models, and beside each other."""
    gone: set[str] = set()
    old = matches(model[:200], CLAUDE_SAMPLES)
    if thinks or (matches(model[:200], ("claude-*",)) and not old):
        gone = set(ANTHROPIC_SAMPLING) & body.keys()
    elif body.get("temperature") is not None and body.get("top_p") is not None:
        gone = {"top_p"}
    return without(body, *gone) if gone else body


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
            new.append(without(mark, "ttl"))
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
                changed = without(changed, "cache_control")
                changed |= {"cache_control": mark} if mark else {}
        made.append(changed)
    return made


def with_betas(body: Json, headers: Headers, provider: Provider) -> Json:
    """One list in the header, without those that the row drops."""
    asked = [headers.get("anthropic-beta", ""), *as_list(body.get("betas")), provider.betas]
    kept = beta_list(",".join(map(str, asked))[:2000], provider.drop_betas)
    headers.popall("anthropic-beta", None)
    if kept:
        headers["anthropic-beta"] = kept
    if "betas" in body:
        body = without(body, "betas")
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


def is_blank_text(text: Any) -> bool:
    return isinstance(text, str) and not text.strip()


def cleaned_block(block: Json, depth: int) -> Json | None:
    """A message or block as Claude takes it; None when nothing of it is left."""
    kind = block.get("type")
    if kind == "text" and is_blank_text(block.get("text")):
        return None
    if "role" in block and is_blank_text(block.get("content")):
        return None
    if kind == "thinking" and not SIGNATURE.match(str(block.get("signature"))):
        return None
    if kind == "tool_use" and not block.keys() <= TOOL_USE_KEYS:
        block = {name: block[name] for name in block if name in TOOL_USE_KEYS}
    id_key = {"tool_use": "id", "tool_result": "tool_use_id"}.get(str(kind), "")
    given = block.get(id_key)
    if isinstance(given, str) and WORD_NAME.bad.search(given):
        block = {**block, id_key: WORD_NAME.bad.sub("_", given)}
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
    if start.startswith(BILLING_LINE):
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
    system, items = split_system(body.get("input"))
    system.insert(0, body.get("instructions"))
    words = "\n\n".join(text for text in system if text and isinstance(text, str))
    kept |= {
        "input": items,
        "instructions": words,  # must be there; nothing is made up (clients.md, Responses Lite)
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
    system: list[Any] = []
    items: list[Any] = []
    for item in given:
        if not isinstance(item, dict):
            items.append(item)
        elif item.get("role") == "system":
            content = item.get("content")
            parts = content if isinstance(content, list) else [{"text": content}]
            system += [part.get("text") for part in as_dicts(parts)]
        elif is_readable(item):
            items.append(readable(item))
    return system, items


def is_readable(item: Json) -> bool:
    """Whether the backend, which keeps nothing, can make sense of an item of another answer."""
    if item.get("type") == "reasoning":
        return str(item.get("encrypted_content")).startswith("gAAAA")
    return item.get("type") != "item_reference"


WHOLE_ITEMS = ("additional_tools", "compaction")  # as the backend and its client word them


def readable(item: Json) -> Json:
    """Without its id, which nobody keeps there, and with a call_id of at most 64 characters."""
    if item.get("type") in WHOLE_ITEMS:
        return item
    if "id" in item:
        item = without(item, "id")
    call_id = str(item.get("call_id") or "")
    if len(call_id) > 64:
        item = {**item, "call_id": f"{call_id[:47]}_{digest(call_id)[:16]}"}
    return item


def is_reasoning(item: Any) -> bool:
    """Also one that names no type; not a compaction, which holds all that was said before."""
    return isinstance(item, dict) and "summary" in item and item.get("type") not in WHOLE_ITEMS


def without_reasoning(body: Json) -> Json:
    """For a login that cannot decrypt what another one encrypted."""
    items = as_list(body.get("input"))
    kept = [item for item in items if not is_reasoning(item)]
    return {**body, "input": kept} if len(kept) < len(items) else body


# -- Code Assist's two kinds of login: Gemini's words, and what Antigravity wants of them --


def code_assist_rules(body: Json, model: str, provider: Provider, verb: str) -> Json:
    """A Gemini call as it stands in the envelope."""
    body = as_dict(body.get("generateContentRequest")) or body
    body = in_camel_case(body, CAMEL_PLACES)
    if verb == "countTokens":
        return {"model": f"models/{model}", **without(body, "model", "safetySettings")}
    if "model" in body:
        body = without(body, "model")
    if model.startswith("claude-"):
        body = google_claude_rules(body, provider)
    elif wants_seals(model) and isinstance(body.get("contents"), list):
        body = {**body, "contents": with_calls_sealed(body["contents"])}
    return antigravity_rules(body, model) if provider.envelope else body


def in_camel_case(value: Any, places: Json) -> Any:
    """Google takes system_instruction and systemInstruction, and its own SDK sends both kinds.

    Only the places of CAMEL_PLACES: what is in a tool's arguments or a schema is not ours to name.
    """
    if isinstance(value, list):
        items = [in_camel_case(item, places) if isinstance(item, dict) else item for item in value]
        same = all(new is old for new, old in zip(items, value, strict=True))
        return value if same else items
    if not isinstance(value, dict):
        return value
    found = camel(value)
    for name, inner in places.items():
        worded_part = in_camel_case(found.get(name), inner)
        if worded_part is not found.get(name):
            found = {**found, name: worded_part}
    return found


CAMEL_PLACES: Json = {
    "contents": {"parts": {"inlineData": {}, "fileData": {}}},
    "generationConfig": {"thinkingConfig": {}},
    "toolConfig": {"functionCallingConfig": {}},
    "tools": {"functionDeclarations": {}},
}


def antigravity_rules(body: Json, model: str) -> Json:
    """Without what Antigravity refuses; a session's number keeps its cache (providers.md 4)."""
    body = without(body, "safetySettings")
    config = body.get("generationConfig")
    if isinstance(config, dict) and not model.startswith("claude-"):
        body["generationConfig"] = without(config, "maxOutputTokens")
    if isinstance(body.get("tools"), list):
        body["tools"] = [with_plain_schemas(tool) for tool in body["tools"]]
    body["sessionId"] = f"-{int(digest(first_words(body))[:16], 16) >> 1}"
    return body


def envelope_of(body: Json, model: str, provider: Provider, verb: str) -> Json:
    """What stands around a request, but for the account's project."""
    if verb == "countTokens":
        return {}
    around = {"model": model, **provider.envelope}
    if "requestType" in around and "-image" in model:
        around["requestType"] = "image_gen"
    elif "requestType" in around and any("googleSearch" in t for t in as_dicts(body.get("tools"))):
        around["requestType"] = "web_search"
    return around


def first_words(body: Json) -> str:
    """Of the user; the same in each call of a conversation."""
    for content in as_dicts(body.get("contents")):
        for part in parts_of(content):
            if content.get("role") != "model" and isinstance(part.get("text"), str):
                return str(part["text"])
    return ""


def turn_start(contents: list[Any]) -> int:
    """Where the user spoke last; results of calls are no words of his."""
    for index in range(len(contents) - 1, -1, -1):
        parts = parts_of(contents[index])
        results = [part for part in parts if "functionResponse" in part]
        speaks = not results or any(part.get("text") for part in parts)
        if as_dict(contents[index]).get("role") != "model" and speaks:
            return index
    return 0


def with_calls_sealed(contents: list[Any]) -> list[Any]:
    """For a client of Gemini's own: each step of the current turn, as gemini_parts does it."""
    start = turn_start(contents)
    sealed = []
    for content in contents[start:]:
        parts = as_dict(content).get("parts")
        new = with_call_sealed(parts) if isinstance(parts, list) else parts
        sealed.append(content if new is parts else {**content, "parts": new})
    return contents[:start] + sealed


def google_claude_rules(body: Json, provider: Provider) -> Json:
    """For Antigravity's Claude models (providers.md 4, 5.3)."""
    body = dict(body)
    if isinstance(body.get("contents"), list):
        contents = [with_claudes_thoughts(content) for content in body["contents"]]
        body["contents"] = [content for content in contents if content is not None]
    config = dict(as_dict(body.get("generationConfig")))
    thinking = as_dict(config.pop("thinkingConfig", None))
    most = number(config.get("maxOutputTokens"))
    budget = claude_budget(thinking, provider)
    if budget and not lost_thoughts(as_list(body.get("contents"))):
        # The limit must be above the budget.
        most = min(provider.max_tokens, max(most or provider.max_tokens, budget + 1024))
        how = {"includeThoughts": True, "thinkingBudget": int(min(budget, most - 1))}
        config["thinkingConfig"] = how
    if most:
        config["maxOutputTokens"] = int(min(most, provider.max_tokens))
    if config or "generationConfig" in body:
        body["generationConfig"] = config
    calling = as_dict(as_dict(body.get("toolConfig")).get("functionCallingConfig"))
    if body.get("tools") and calling.get("mode") != "NONE":
        body["toolConfig"] = {"functionCallingConfig": {**calling, "mode": "VALIDATED"}}
    return body


def claude_budget(thinking: Json, provider: Provider) -> float:
    """The tokens for thoughts that a thinkingConfig asks for; 0 for none."""
    budget = number(thinking.get("thinkingBudget"))
    level = str(thinking.get("thinkingLevel") or "").lower()
    off = thinking.get("includeThoughts") is False or thinking.get("thinkingBudget") == 0
    if off or not thinking:
        return 0
    if budget <= 0:  # -1: as much as it likes
        budget = BUDGETS.get(level, BUDGETS["medium"])
    return max(LEAST_BUDGET, min(budget, provider.max_tokens - 1))


def with_claudes_thoughts(content: Any) -> Any:
    """Without thoughts that Claude has not signed; None where nothing is left."""
    if not isinstance(content, dict) or not isinstance(content.get("parts"), list):
        return content
    kept = []
    for part in content["parts"]:
        given = part.get("thoughtSignature") if isinstance(part, dict) else None
        own = isinstance(given, str) and SIGNATURE.match(given)
        if own or not isinstance(part, dict):
            kept.append(part)
        elif not part.get("thought"):
            kept.append(without(part, "thoughtSignature"))
    return {**content, "parts": kept} if kept or not content["parts"] else None


def lost_thoughts(contents: list[Any]) -> bool:
    """Whether the current turn has a call without the thoughts that led to it.

    Every step of it counts, and the request may be a Gemini client's own.  is_cut_off asks less:
    of the last step of what is translated for any Claude.
    """
    for content in contents[turn_start(contents) :]:
        parts = parts_of(content)
        calls = any("functionCall" in part for part in parts)
        if calls and not any(part.get("thought") for part in parts):
            return True
    return False


def with_plain_schemas(tool: Any) -> Any:
    """Antigravity knows no parametersJsonSchema."""
    declared = tool.get("functionDeclarations") if isinstance(tool, dict) else None
    if not isinstance(declared, list):
        return tool
    return {**tool, "functionDeclarations": [with_plain_schema(one) for one in declared]}


def with_plain_schema(function: Any) -> Any:
    schema = as_dict(function).get("parametersJsonSchema")
    if not isinstance(schema, dict):
        return function
    kept = without(function, "parametersJsonSchema")
    return {**kept, "parameters": google_schema(object_schema(schema))}


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
HELD_BACK = (  # that reach no provider: credentials, and what is asked for anew
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
    shown = (host[:300], origin[:300], site[:20])
    if reason := refuse_strangers(*shown, browses, config["host"], keyed):
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
    kept = [pair for pair in pairs if unquote_plus(pair.partition("=")[0]) not in HELD_BACK]
    return "&".join(pair for pair in kept if pair)


TURN_PAUSE = 0.004  # seconds between two turns at least: a small call is through by then


class Turns:
    """Large prompts take turns, and half of the time where there are other calls.

    To read one of 10 MB takes some 15 ms, in which nobody else is served, and to prepare it as
    long.  Side by side, four of them would keep a small call waiting at each of its steps.
    """

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.calls = 0  # that are being answered, small ones, too
        self.free_at = 0.0  # by the loop's clock

    async def take(self, work: Callable[[], Any]) -> Any:
        loop = asyncio.get_running_loop()
        async with self.lock:
            pause = self.free_at - loop.time()
            if self.calls > 1 and pause > 0:
                await asyncio.sleep(pause)
            began = loop.time()
            done = work()
            ended = loop.time()
            self.free_at = ended + max(TURN_PAUSE, ended - began)
        return done


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
        self.was_read = self.was_packed = False
        self.ask: Ask | None = None  # the body in the neutral form, once somebody needs it
        self.is_foreign = False  # the provider that is asked speaks another dialect
        # Who answers, as far as that is known; for the log, the status and the answer's headers.
        self.route, self.provider, self.account, self.served_model = "none", "", "", ""
        self.trouble = ""
        self.tokens = {"input_tokens": 0, "output_tokens": 0}

    async def read(self, turns: Turns) -> None:
        """ProxyError 400, 413 and 415 for a body that is none."""
        packed = await read_body(self.request)
        self.was_read = True
        if len(packed) < LARGE:
            self.parse(packed)
        else:
            await turns.take(functools.partial(self.parse, packed))

    def parse(self, packed: bytes | bytearray) -> None:
        self.raw = unpacked(packed, self.request.headers.get("Content-Encoding", ""))
        self.was_packed = self.raw is not packed
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
        self.raw, self.body, self.ask = b"", {}, None

    def neutral(self) -> Ask:
        """ProxyError 400 for what no other dialect has words for."""
        if self.ask is None:
            self.ask = self.dialect.read_request(self.body)
            if self.thread and not self.ask.cache_key:
                self.ask.cache_key = digest(self.thread)
        return self.ask

    def count(self, read: int, written: int) -> None:
        """Tokens.  Figures may come more than once and grow: the largest is right."""
        if self.verb != "count_tokens":
            tokens = self.tokens
            tokens["input_tokens"] = max(tokens["input_tokens"], read)
            tokens["output_tokens"] = max(tokens["output_tokens"], written)

    def proxy_headers(self) -> dict[str, str]:
        """The headers that say who answers."""
        values = {"route": self.route, "provider": self.provider, "model": self.served_model}
        return {f"x-ampproxy-{k}": header_value(v[:200]) for k, v in values.items() if v}


@functools.lru_cache(1024)
def header_value(text: str) -> str:
    return re.sub(r"[^ -~]", "?", text)


def too_large() -> ProxyError:
    return fault(413, "The request body is larger than 64 MiB")


# Python 3.14's, and two packages.
ZSTD_MODULES = ("compression.zstd", "backports.zstd", "zstandard")
NO_ZSTD = (
    "The request body is packed with zstd, which this Python cannot read: install backports.zstd"
    " or, for Codex, set features.enable_request_compression = false in its config.toml"
)


def unpacked(raw: bytes | bytearray, encoding: str) -> bytes | bytearray:
    """A body without its packing; ProxyError 413 counts what was in it."""
    kind = encoding.strip().lower()
    if kind in ("", "identity"):
        return raw
    if kind not in ("gzip", "x-gzip", "deflate", "zstd"):
        words = f"Content-Encoding {encoding[:40]!r} is not read here: gzip, deflate, zstd"
        raise fault(415, words)
    try:
        # Some take gzip for `deflate`: the bytes say which it is.
        coding = "gzip" if raw[:2] == GZIP else "deflate"
        whole = unpack_zstd(raw) if kind == "zstd" else unpack_whole(raw, coding)
    except OverflowError:
        raise too_large() from None
    except (zlib.error, EOFError, ValueError):
        raise fault(400, f"The request body cannot be read: it is no {kind}") from None
    if len(whole) > BODY_LIMIT:
        raise too_large()
    return whole


def unpack_zstd(raw: bytes | bytearray) -> bytes:
    module: Any = None
    for name in ZSTD_MODULES:
        with suppress(ImportError):
            module = importlib.import_module(name)
            break
    if module is None:
        raise fault(415, NO_ZSTD)
    pieces, size = [], 0
    try:
        with module.open(io.BytesIO(raw), "rb") as file:
            while size <= BODY_LIMIT and (piece := file.read(LARGE)):
                pieces.append(piece)
                size += len(piece)
    except module.ZstdError:
        raise ValueError from None
    return b"".join(pieces)


async def read_body(request: Request) -> bytes | bytearray:
    """The whole body.  A large one is put where it will stay as it comes in."""
    length = request.content_length or 0
    large = bytearray(length) if LARGE < length <= BODY_LIMIT else None
    pieces, size = [], 0
    try:
        if request.content.is_eof() and request.content.total_bytes < LARGE:
            return request.content.read_nowait()  # it came with the head
        async with asyncio.timeout(UPLOAD_WAIT):
            while data := await request.content.readany():
                if large is None:
                    pieces.append(data)
                else:
                    large[size : size + len(data)] = data
                size += len(data)
                if size > BODY_LIMIT:
                    raise too_large()
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
            settings = camel(as_dict(camel(body).get("generationConfig")))
            config = camel(as_dict(settings.get("thinkingConfig")))
            budget = config.get("thinkingBudget")
            asked = budget if type(budget) is int else config.get("thinkingLevel")
        case _:
            reasoning = as_dict(body.get("reasoning"))  # in Chat it is OpenRouter's
            asked = reasoning.get("effort") or reasoning.get("max_tokens")
            if "enabled" in reasoning and not asked:
                asked = "auto" if reasoning["enabled"] else "none"
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
            body[name] = without(inside, *parts)
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
    most = max(int(number(body.get("max_tokens"))), tokens + ANSWER_ROOM)
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
    body = without(body, "temperature", "top_p", "presence_penalty", "frequency_penalty")
    if dialect == "chat" and "max_tokens" in body:
        given = body["max_tokens"]
        body = without(body, "max_tokens")
        body.setdefault("max_completion_tokens", given)
    return body


SPOKES = (ANTHROPIC, RESPONSES, GEMINI, CHAT_COMPLETIONS)  # whom a foreign client is put to, first
TRANSLATED = {*(dialect.verb for dialect in SPOKES), "generateContent"}


def spoke_of(provider: Provider, call: Call) -> Dialect:
    """The dialect that a provider is asked in: the client's, if it has that."""
    if call.verb in provider.paths:
        return call.dialect
    return next(dialect for dialect in SPOKES if dialect.verb in provider.paths)


def has_verb(provider: Provider, verb: str) -> bool:
    """Whether it answers such calls, in their own dialect or by translation."""
    if verb in provider.paths:
        return True
    return verb in TRANSLATED and any(dialect.verb in provider.paths for dialect in SPOKES)


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
        lower = model.lower()
        for row in self.live.rows:
            if lower in row.provider.written:
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
        if verb and not has_verb(provider, verb):
            return "has no such call for"
        if not self.pool.of([row]):
            return f"after `ampproxy.py login {row.name}` would serve"
        return ""

    def owner(self, model: str) -> str:
        """Who serves a name, be it listed or not; "" for nobody."""
        found = self.listed().get(model)
        ways, _ = self.ways(*self.split(model), "")
        return found or (ways[0].rows[0].name if ways else "")

    def listed(self, verb: str = "") -> dict[str, str]:
        """The names that the present accounts serve, and who does; patterns are no names."""
        pairs = []
        for row in self.live.rows:
            pairs += [(name, name) for name in row.provider.names if not is_pattern(name)]
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

LISTING = re.compile(
    r"(/api/provider/[^/]+)?(/v1(beta1?(/publishers/google)?)?){0,3}/models(/(?P<id>[^:]+))?"
)


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


def model_list(request: Request, chooser: Chooser, wanted: str) -> Json:
    """The names that are served, or one of them; ProxyError 404 for one that is not."""
    gemini = asks_as_gemini(request)
    shape = models_for_gemini if gemini else models_for_others
    if wanted:
        owner = chooser.owner(wanted)
        if not owner:
            raise fault(404, f"no account here serves {wanted[:100]!r}")
        listed = shape({wanted: owner})
        return dict((listed.get("data") or listed["models"])[0])
    listed = shape(dict(sorted(chooser.listed().items())))
    if "client_version" in request.query:  # Codex wants a list of its own kind (clients.md)
        listed["models"] = []
    return listed


def asks_as_gemini(request: Request) -> bool:
    return "x-goog-api-key" in request.headers or bool(re.search("/v1beta|/google/", request.path))


def dialect_of_list(request: Request) -> Dialect:
    """Of who asks for models: the path is the same for three."""
    if asks_as_gemini(request):
        return GEMINI
    return ANTHROPIC if "anthropic-version" in request.headers else CHAT_COMPLETIONS


# == Answers on their way ==========================================================================
#
# An answer is an async iterator of bytes that are ready for the client, made of small generators:
# pieces from the upstream, runs of whole events, events looked at and put right, or read by a
# Reader and written in another dialect.  Its first item proves success.  Until then an error is the
# next account's chance; afterwards it ends the stream.
#
# A Delivery is the client's end of it.  It has one timer, however many pieces come: a comment goes
# out when nothing did for a while, and what stands still for too long is broken off.

SAYS_NOTHING = {  # events with which no answer has begun: it may still become an error
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

    def __init__(self, call: Call, keepalive: float, idle: float, clock: Any = CLOCK) -> None:
        self.call, self.request, self.clock = call, call.request, clock
        self.response: web.StreamResponse | None = None
        self.problem: Problem | None = None  # what broke the answer off after that
        self.keepalive = keepalive if call.streams and call.dialect.comment else 0
        self.idle = idle
        self.settle_wait = 0.0  # for the upstream, once all has been said
        self.upstream: Upstream | None = None  # that is being read
        self.writing = False
        self.loop = asyncio.get_running_loop()
        self.moved = self.loop.time()  # when the last piece came or went
        self.sent = self.moved  # when the last piece or comment went
        self.last = b""  # what went last of a stream
        self.is_over = False  # what is sent next is the end of it
        self.comment: asyncio.Task[None] | None = None  # that is on its way
        self.timer = self.look_again()

    def __enter__(self) -> Delivery:
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        self.upstream = None
        if self.comment:
            self.comment.cancel()

    # -- The timer --

    def look_again(self) -> asyncio.TimerHandle:
        """When the next comment is due, or the end; then it turns out whether it still is.

        Soon enough to see in time a silence that begins meanwhile.
        """
        now = self.loop.time()
        due = now + min(LOOK_EVERY, self.settle_wait or self.idle or LOOK_EVERY)
        if self.keepalive:
            due = min(due, self.sent + self.keepalive)
        if self.patience and (self.upstream or self.writing):
            due = min(due, self.moved + self.patience)
        return self.loop.call_at(max(due, now + 0.01), self.look)

    @property
    def patience(self) -> float:
        """Seconds that something may stand still; 0 is any time."""
        return self.idle if self.writing else self.settle_wait or self.idle

    def look(self) -> None:
        """A comment, the end of what stands still, or nothing."""
        now = self.loop.time()
        silent = now - self.moved
        stands_still = self.patience and silent >= self.patience
        is_over = self.upstream and not self.writing and is_dead(self.upstream)
        if stands_still or is_over:
            self.break_off()
        elif self.keepalive and now - self.sent >= self.keepalive:
            self.sent = now
            if not self.writing:
                self.comment = self.loop.create_task(self.write_comment())
        self.timer = self.look_again()

    def watch(self, upstream: Upstream) -> None:
        """From now on its silence counts; what an earlier one said last does not."""
        self.upstream, self.moved = upstream, self.loop.time()
        self.is_over, self.settle_wait = False, 0.0

    def settle(self, is_over: bool) -> None:
        """All has been said: what still comes may take a moment, not the whole idle time.

        `is_over`: nothing does, what is sent next is the end.
        """
        if is_over:
            self.is_over = not self.call.lists  # there the bracket is the end
            return
        if not self.settle_wait:
            self.settle_wait = min(self.idle or SETTLE_WAIT, SETTLE_WAIT)
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
            headers = Headers({"Content-Type": "text/event-stream", **self.call.proxy_headers()})
            response = await self.start(200, None, headers)
            if not self.writing:  # what is being written meanwhile may be the end
                await response.write(self.call.dialect.comment)

    # -- What the client gets --

    async def start(self, status: int, reason: str | None, headers: Headers) -> web.StreamResponse:
        """The response; its head is that of the first call, whatever the later ones say."""
        if self.response is None:
            self.response = StreamResponse(status=status, reason=reason, headers=headers)
            await self.response.prepare(self.request)  # which waits for nothing
        return self.response

    async def stream(
        self, upstream: Upstream, headers: Headers, answer: Answer
    ) -> web.StreamResponse:
        """The whole stream.  What breaks it off is told to the client, and kept as `problem`."""
        response = await self.start(upstream.status, upstream.reason, headers)
        if answer.first:
            await self.write(response, answer.first)
            answer.first = b""  # its memory is free for as long as the stream runs
        try:
            write = response.write
            async for data in answer.rest:  # as in `write`, for each event
                if self.is_over:
                    await self.write(response, data)
                    continue
                self.writing = True
                await write(data)
                self.last = data
                self.writing = False
                self.moved = self.sent = self.loop.time()
        except ProxyError as error:
            self.problem = error.problem
            await self.end(response, error.problem)
        return response

    async def write(self, response: web.StreamResponse, data: bytes) -> None:
        self.writing = True
        if self.is_over and len(data) < LONG_RUN:
            await response.write_eof(data)  # which waits for nobody, and is one packet
        else:
            await response.write(data)
        self.last = data
        self.writing = False
        self.moved = self.sent = self.loop.time()

    async def end(self, response: web.StreamResponse, problem: Problem) -> None:
        """Of a stream that broke off, as its dialect says it."""
        dialect = self.call.dialect
        body = parse_object(worded_error(self.call, problem, self.clock.time()))
        if self.call.lists:
            frame = LIST_MARK + write_json(body) + b"]"
        else:
            frame = dialect.error_event(body, self.last)
        await self.write(response, frame)
        if dialect.cuts_errors and self.request.transport:
            self.request.transport.abort()


def worded_error(call: Call, problem: Problem, now: float) -> bytes:
    """An error in the client's dialect; the provider's own words where they can pass."""
    wait = round(problem.retry_after)
    spent = problem.status == 429 and (wait > 30 or bool(problem.codes & set(SPENT)))
    if call.dialect is not RESPONSES or not spent:
        plain = call.dialect.error(problem.status, problem.text or problem.message)
        return problem.body or write_json(plain)
    # Codex waits out any other 429 in silence (clients.md).
    body = parse_object(problem.body) if problem.body else {}
    body = body or call.dialect.error(problem.status, problem.text or problem.message)
    error, wait = body["error"], wait or MINUTE
    if error.get("type") == SPENT[0] and number(error.get("resets_at")) > now:
        return problem.body or write_json(body)
    ends = {"resets_in_seconds": wait, "resets_at": round(now) + wait}
    body["error"] = {**error, "type": SPENT[0], "code": SPENT[0], **ends}
    return write_json(body)


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
            if self.unpacker:
                data = await self.next_unpacked()
            elif self.began:
                data = await self.content.readany()
                self.delivery.moved = self.delivery.loop.time()
            else:
                data = await self.first_piece()
        except (RuntimeError, *NET_ERRORS) as error:
            error.__traceback__ = None  # the stream keeps the error, and so would keep the call
            raise fault(502, f"the upstream broke off: {net_words(error)}") from None
        if not data:
            raise StopAsyncIteration
        return data

    async def first_piece(self) -> bytes:
        """b"" for an answer without a body."""
        if self.unknown:
            raise fault(502, f"the upstream packed its answer as {self.unknown}")
        data = await self.content.readany()
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


async def begin_answer(pieces: Pieces, folds: bool, wrapped: bool, reader: Reader | None) -> Answer:
    """Read until success is certain; ProxyError otherwise.

    What is a stream is seen from its first bytes: labels are wrong too often.  `folds`: the backend
    only streams, and the client asked for one piece.  `wrapped`: it comes in Code Assist's
    envelope.  `reader`: of another dialect than the client's.
    """
    call, settle = pieces.delivery.call, pieces.delivery.settle
    first = b""
    async for data in pieces:
        first += data
        if first.lstrip(BLANK) or len(first) > LONG_RUN:
            break
    pieces.unread = first
    in_one_piece = first.lstrip(BLANK)[:1] in (b"", *NO_EVENTS)
    if reader:
        events = translated(call, reader, pieces, in_one_piece, settle, wrapped)
    elif in_one_piece:
        return Answer(False, await whole_answer(call, pieces, wrapped), pieces)
    else:
        runs = whole_events(pieces)
        events = checked_events(call, without_envelope(runs) if wrapped else runs, settle)
    if reader and not call.streams:
        async for _ in events:
            pass
        return Answer(False, write_json(call.dialect.write_answer(reader.reply)), pieces)
    if folds:
        return Answer(False, await folded(call, events), pieces)
    return Answer(True, await anext(events), events)


# -- In one piece --


async def whole_answer(call: Call, pieces: AsyncIterator[bytes], wrapped: bool) -> bytes:
    """An answer in one piece, with the model's name that the client gave."""
    raw, answer = await read_answer(call, pieces, wrapped)
    inside = holder(answer)
    refuse_silence(call, answer, call.dialect.says(answer) == "answer")
    call.count(*call.dialect.usage(inside))
    return renamed(raw, answer, inside, call) or raw


async def read_answer(
    call: Call, pieces: AsyncIterator[bytes], wrapped: bool
) -> tuple[bytes, Json]:
    """An answer in one piece, as it came and read; ProxyError for one that is an error."""
    kept, size = [], 0
    async for data in pieces:
        kept.append(data)
        size += len(data)
        if size > BODY_LIMIT:
            raise endless_answer(call)
    raw = b"".join(kept)
    try:
        answer = parse_object(raw)
    except ValueError:
        raise no_whole_answer(call) from None
    if wrapped and isinstance(answer.get("response"), dict):
        answer = answer["response"]
        raw = write_json(answer)
    if has_error(answer, holder(answer)):
        raise ProxyError(failure(call, answer))
    return raw, answer


async def folded(call: Call, events: AsyncIterator[bytes]) -> bytes:
    """The answer that a stream of Responses tells in its last event, one of Gemini's in all."""
    if call.dialect is GEMINI:
        return await folded_contents(call, events)
    last = b""
    async for run in events:
        last = split_events(run)[-1]
    event = parse_object(event_data(last))
    inside = holder(event)
    if has_error(event, inside):
        raise ProxyError(failure(call, event))
    return write_json(inside)


async def folded_contents(call: Call, events: AsyncIterator[bytes]) -> bytes:
    """The chunks of a Gemini stream as one answer: the last one's fields, everybody's parts."""
    whole: Json = {}
    candidates: dict[int, Json] = {}
    parts: dict[int, list[Any]] = {}
    seen = Seen()
    async for run in events:
        seen.grow(call, len(run))
        for chunk in map(read_event, split_events(run)):
            whole |= chunk
            for candidate in as_dicts(chunk.get("candidates")):
                index = int(number(candidate.get("index")))
                candidates[index] = candidates.get(index, {}) | candidate
                more = as_list(as_dict(candidate.get("content")).get("parts"))
                parts.setdefault(index, []).extend(more)
    for index, candidate in candidates.items():
        if parts[index]:
            candidate["content"] = {"role": "model", "parts": with_joined_texts(parts[index])}
    if candidates:
        whole["candidates"] = [candidates[index] for index in sorted(candidates)]
    return write_json(whole)


def read_event(event: bytes) -> Json:
    """What its data says; {} for what is no JSON object."""
    try:
        return parse_object(event_data(event))
    except ValueError:
        return {}


def with_joined_texts(parts: list[Any]) -> list[Any]:
    """Neighbouring texts of one kind as one."""
    joined_up = []
    for _, run in itertools.groupby(parts, kind_of_text):
        first, *others = run
        if others:
            first = {**first, "text": "".join(part["text"] for part in (first, *others))}
        joined_up.append(first)
    return joined_up


def kind_of_text(part: Any) -> Any:
    """The same for parts that are words and nothing else; a signature stays with its own part."""
    plain = isinstance(part, dict) and part.keys() <= {"text", "thought"}
    if plain and isinstance(part.get("text"), str):
        return "thought" if part.get("thought") else "text"
    return object()  # like no other


def refuse_silence(call: Call, event: Json, spoke: bool) -> None:
    """ProxyError 502 for an end that has nothing before it, or a call that nobody can read.

    Clients would take either for an answer.
    """
    flaw = call.dialect.flaw(event) if call.verb in GENERATES else ""
    if flaw == EMPTY_ANSWER and spoke:
        return
    if flaw:
        how = "it ended without a word" if flaw == EMPTY_ANSWER else flaw
        words = f"{call.provider} gave no answer: {how}"
        raise ProxyError(Problem(502, words, codes=frozenset({flaw.lower()})))


def no_whole_answer(call: Call) -> ProxyError:
    return fault(502, f"{call.provider} sent no whole answer")


def endless_answer(call: Call) -> ProxyError:
    return fault(413, f"{call.provider} sent no whole answer within 64 MiB")


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


async def without_envelope(runs: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Events without Code Assist's envelope."""
    async for run in runs:
        events = split_events(run)
        for index, event in enumerate(events):
            inside = read_event(event).get("response")
            if isinstance(inside, dict):
                events[index] = with_data(event, write_json(inside))
        yield b"".join(events)


class Seen:
    """What the events of an answer have told so far, as far as that is needed at its end."""

    def __init__(self) -> None:
        self.items: dict[int, Any] = {}  # of a Responses answer, by their index
        self.size = 0  # of what is kept
        self.spoke = False  # see Dialect.says

    def grow(self, call: Call, size: int) -> None:
        self.size += size
        if self.size > BODY_LIMIT:
            raise endless_answer(call)


class Looked(NamedTuple):
    """An event that was read."""

    raw: bytes  # as the client gets it
    ending: str = ""  # see Dialect.ending
    tells: bool = False  # it proves success
    renames: bool = False  # the provider has another name for the model


async def checked_events(
    call: Call, runs: AsyncIterator[bytes], settle: Callable[[bool], None], told: bool = False
) -> AsyncIterator[bytes]:
    """Runs of events, ready for the client; the first one has an event that proves success.

    Ends with the dialect's last event, whatever is behind it; ProxyError when that does not come.
    `told`: whatever comes, the client gets.
    """
    marks = call.dialect.marks
    seen = Seen()
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
                    looked = look_at(call, raw, seen, told)
                held.append(looked.raw)
                told, ending = told or looked.tells, looked.ending or ending
                if looked.renames:
                    marks = call.dialect.marks + call.dialect.model_marks
                if ending == "over":
                    break
            if ending:
                settle(ending == "over")
            if told:
                yield b"".join(held)
                held = []
            if ending == "over":
                break
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


def look_at(call: Call, raw: bytes, seen: Seen, late: bool) -> Looked:
    """One event.  ProxyError for garbage or an error before the client has got anything."""
    data = event_data(raw).strip()
    if not late:
        seen.grow(call, len(raw))
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
    tells = proves(call, event, ending, seen)
    if kind == "response.output_item.done":
        index = event.get("output_index", len(seen.items))
        if type(index) is not int:
            raise no_whole_answer(call)
        seen.items[index] = event.get("item")
        seen.grow(call, len(raw))
    new = renamed(data, event, inside, call)
    if ending == "over" and lost_output(kind, inside, seen):
        inside["output"] = [item for _, item in sorted(seen.items.items())]
        inside["model"] = call.model
        raw = with_data(raw, write_json(event))
    elif new:
        raw = with_data(raw, new)
    return Looked(raw, ending, tells, new is not None)


def proves(call: Call, event: Json, ending: str, seen: Seen) -> bool:
    """Whether the answer has begun with it.  ProxyError where it ends one that says nothing."""
    says = call.dialect.says(event)
    seen.spoke = seen.spoke or says == "answer"
    if ending:
        refuse_silence(call, event, seen.spoke)
    return bool(says or ending) and text_of(event.get("type")) not in SAYS_NOTHING


def lost_output(kind: Any, inside: Json, seen: Seen) -> bool:
    """ChatGPT's backend leaves it out of its last event: it says [], null or nothing."""
    output = inside.get("output")
    nulled = output is None and kind in RESPONSE_ENDS[:2]
    return not output and (bool(seen.items) or nulled)


# -- From another dialect --


async def translated(
    call: Call,
    reader: Reader,
    pieces: AsyncIterator[bytes],
    in_one_piece: bool,
    settle: Callable[[bool], None],
    wrapped: bool = False,
) -> AsyncIterator[bytes]:
    """Runs of events in the client's dialect, as `checked_events` has them in its own.

    What came together leaves together.  Nothing is yielded for a client that wants one piece.
    """
    reply = reader.reply
    try:
        if in_one_piece:
            _, answer = await read_answer(call, pieces, wrapped)
            feed(call, answer, reader.read_whole)
        else:
            runs = whole_events(pieces)
            async for run in without_envelope(runs) if wrapped else runs:
                read_run(call, reader, run)
                if reader.over or reply.cut:
                    break
                if reply.stop:
                    settle(False)
                if reply.is_told and reply.out:
                    yield b"".join(reply.out)
                    reply.out.clear()
        whole = reader.over or reply.stop or (reader.may_just_end and reply.usage.written)
        if not whole:
            raise fault(502, "the stream stopped before its end")
    except ProxyError:
        if not reply.stop:
            if reply.is_told and reply.out:
                yield b"".join(reply.out)
            raise
    finally:
        call.count(reply.usage.read, reply.usage.written)
    refuse_nothing(call, reader)
    reply.finish()
    settle(True)
    if reply.out:
        yield b"".join(reply.out)


def refuse_nothing(call: Call, reader: Reader) -> None:
    """ProxyError 502 for an answer that has ended without any."""
    reply = reader.reply
    if not reply.is_told and not reply.usage.written:
        raise no_whole_answer(call)
    if reader.must_speak and not reply.blocks and reply.stop in ("", "end"):
        words = f"{call.provider} gave no answer: it ended without a word"
        raise ProxyError(Problem(502, words, codes=frozenset({EMPTY_ANSWER.lower()})))


def read_run(call: Call, reader: Reader, run: bytes) -> None:
    for raw in split_events(run):
        data = event_data(raw)
        if data[:6] == b"[DONE]":
            reader.over = True
            return
        if not data:
            continue  # a comment
        try:
            event = parse_json(data)
        except ValueError:
            if event_end(raw) != len(raw) or reader.reply.is_told:
                continue  # it was cut short, or nobody knows what it means
            raise no_whole_answer(call) from None
        if isinstance(event, dict):
            feed(call, event, reader.read)
        if reader.over:
            return


def feed(call: Call, event: Json, read: Callable[[Json], None]) -> None:
    if (event.get("error") or event.get("type") in FAILED) and has_error(event, holder(event)):
        raise ProxyError(failure(call, event))
    try:
        read(event)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        log.debug("%s sent an event that cannot be read: %s", call.provider, type(error).__name__)
        raise no_whole_answer(call) from None


# -- Errors --

FAILED = ("error", "response.failed")  # types of events that are errors


def has_error(event: Json, inside: Json) -> bool:
    """Whether an event, or a whole answer, is an error; `inside`: what `holder` finds."""
    if event.get("type") == "error":
        return True
    error = inside.get("error") or event.get("error")
    return isinstance(error, dict) or (isinstance(error, str) and "choices" not in event)


DELAYS = ("resets_in_seconds", "retryDelay", "quotaResetDelay")  # OpenAI's, and Google's two
DELAY_WORDS = re.compile(r"(?:after|retry in) ((?:\d{1,9}(?:\.\d{1,9})?(?:ms|[hms])){1,4})")


def asked_delay(error: Json, now: float = NEVER) -> float:
    """The seconds that an error asks to wait: the first that says some (providers.md 4.1).

    `now`, in seconds since 1970: a time that is named counts, too, if it is to come.
    """
    for name in DELAYS:
        for value in said_of(error, name):
            told = duration(value) if isinstance(value, str) else number(value)
            if told > 0:
                return told
    if found := DELAY_WORDS.search(str(error.get("message"))[:2000]):
        return duration(found[1])
    times = [parse_time(value) - now for value in said_of(error, "quotaResetTimeStamp")]
    return max(0, *times) if times else 0


def said_of(error: Any, name: str, depth: int = 5) -> list[Any]:
    """What an error says under a name, wherever it does."""
    if isinstance(error, dict):
        here = [error[name]] if name in error else []
        return here + said_of(list(error.values()), name, depth)
    if isinstance(error, list) and depth:
        return [value for inner in error[:50] for value in said_of(inner, name, depth - 1)]
    return []


def failure(call: Call, answer: Json, status: int = 0, now: float = NEVER) -> Problem:
    """A provider's error as a Problem; `status` 0: it stood in an answer, and its code decides."""
    told = holder(answer)
    parts = error_parts(told)
    words = [str(parts[name]) for name in ("code", "type", "status") if parts.get(name)]
    reasons = [str(one["reason"]) for one in as_dicts(parts.get("details")) if one.get("reason")]
    how = f"answered {status}" if status else "answered with an error:"
    message = f"{call.provider} {how} {error_text(told, 'type', 'status')}"
    if not status:
        status = next((STATUSES[word] for word in words if word in STATUSES), 502)
    status = status if 400 <= status <= 599 else 502
    text = error_text(told)
    return Problem(
        status,
        message.rstrip(": "),
        retry_after=asked_delay(parts, now),
        text=text,
        codes=frozenset(word.lower()[:100] for word in words + reasons),
        body=write_json(own_error(call, status, parts, text)) if answer else b"",
    )


def own_error(call: Call, status: int, parts: Json, text: str) -> Json:
    """A provider's message and codes in the client's dialect; ours where it names none."""
    message = parts.get("message")
    body = call.dialect.error(status, message if message and isinstance(message, str) else text)
    if call.is_foreign:
        return body  # its codes are no words of this dialect
    for name in body["error"].keys() - {"message"}:
        given = parts.get(name)
        if given and given != "error" and type(given) is type(body["error"][name]):
            body["error"][name] = given
    return body


REFUSAL_HEADERS = ("request-id", "content-type", "x-should-retry", "retry-after", "anthropic-*")
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
    raw = raw.strip().removeprefix(b"[").removesuffix(b"]")  # Google's may be a list
    with suppress(ValueError):
        answer = parse_object(raw)
    problem = failure(call, answer, upstream.status, now)
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
    if problem.status == 403 and raw[:1] == b"<":
        problem.codes |= {FIREWALL}
        problem.retry_after = min(problem.retry_after or PAGE_REST, PAGE_REST)
    if answer:
        for name, value in upstream.headers.items():
            if matches(name[:100], REFUSAL_HEADERS):
                problem.headers.add(name, value)
    if isinstance(answer.get("error"), dict) and not call.is_foreign:
        problem.body = raw  # the provider's own words
    return problem


# -- Headers that travel on --

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


def passing(headers: Any, *dropped: str) -> Headers:
    """Headers that travel on: not the hop's own, not those that Connection names, nor `dropped`."""
    kept, connection = Headers(), connection_of(headers)
    for name, value in headers.items():
        if travels(name[:100], connection, dropped):
            kept.add(name, value)
    return kept


@functools.lru_cache(4096)
def travels(name: str, connection: str, dropped: tuple[str, ...]) -> bool:
    lower = name.lower()
    return not (lower in hop_names(connection) or lower in dropped or matches(lower, HOP_HEADERS))


def connection_of(headers: Any) -> str:
    """What Connection says, in one line and cut."""
    given = headers.getall("Connection", None)
    return ",".join(given)[:1000] if given else ""


# == Forwarding ====================================================================================
#
# The story of one model call: its ways in order, on each way the accounts, on each account some
# tries.  A failure before the first event is a Problem that is returned, and says who is next; what
# has begun is finished where it began.

QUOTA_HEADER = re.compile(
    r"(?:anthropic-ratelimit-unified|x-codex)-(?P<window>(?!overage)\w+)-"
    r"(?P<field>status|utilization|used-percent|reset(?:-at)?)"
)
ESTIMATES = {"count_tokens": "input_tokens", "countTokens": "totalTokens"}  # verb -> what it asks
STREAMING = {  # verb -> the one that streams, at backends that do nothing else
    "responses": "responses",
    "generateContent": "streamGenerateContent",
    "streamGenerateContent": "streamGenerateContent",
}
NOT_ASKED = {  # fields that a helper call must not have
    "count_tokens": ("max_tokens", "stream"),
    "compact": ("stream",),
}
# A 404 or 429 of these says nothing about the model or the account: Claude Code counts 35 times in
# a second, and backends do without them (clients.md).
HELPERS = (*ESTIMATES, "compact")
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
    urls: list[str]  # the provider's hosts, in the order to ask them
    folds: bool  # it only streams, and the client wants one piece
    envelope: Json | None = None  # see envelope_of; None: there is none
    token: str = ""  # of the account that is asked now
    new_reader: Callable[[], Reader] | None = None  # for a provider of another dialect

    def let_go(self) -> None:
        """As Call's: a stream may run for an hour."""
        self.headers, self.body, self.urls = Headers(), [], []


class Forwarder:
    def __init__(self, live: Live, net: Net, pool: Pool, turns: Turns, pay: Pay) -> None:
        self.live, self.net, self.pool, self.pay = live, net, pool, pay
        self.chooser = Chooser(live, pool)
        self.turns = turns
        self.clock = pool.clock
        self.givers: OrderedDict[str, Account] = OrderedDict()  # of own_headers, by their value

    async def answer(self, call: Call, key: str, delivery: Delivery) -> web.StreamResponse:
        """By the first way that works, else from ampcode.com; ProxyError when nobody can."""
        call.wanted, call.effort = self.chooser.split(call.model)
        ways, notes = self.chooser.ways(call.wanted, call.effort, call.verb)
        if not ways and call.verb in ESTIMATES:
            foreign, _ = self.chooser.ways(call.wanted, call.effort, "")
            if foreign:
                return estimate(call, foreign[0])
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
        tried: list[Account] = []
        prepared: Prepared | None = None
        call.provider = way.rows[0].name
        call.served_model = way.rows[0].provider.served(way.model)
        while True:
            account = await self.pool.choose(way.rows, way.model, call.thread, tried, until)
            if account is None or account.row is None:
                break
            if prepared is None or prepared.row is not account.row:
                if len(call.raw) < LARGE:
                    prepared = prepare(call, way, account.row)
                else:
                    work = functools.partial(prepare, call, way, account.row)
                    prepared = await self.turns.take(work)
            outcome = await self.try_account(account, prepared, delivery)
            if not isinstance(outcome, Problem):
                return outcome
            problem = outcome
            then = verdict(problem).then
            if then == "stop":
                return problem
            rests = account.wait(way.model, self.clock.monotonic()) > 0
            if then != "wait" or not rests or self.clock.monotonic() >= until:
                tried.append(account)
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
        with Lease(account, model):
            while True:
                began = self.clock.monotonic()
                try:
                    token = await self.pool.bearer(account, refused)
                except ProxyError as error:
                    return error.problem
                prepared.token = token
                outcome = await self.ask_hosts(account, prepared, began, delivery)
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

    async def ask_hosts(
        self, account: Account, prepared: Prepared, began: float, delivery: Delivery
    ) -> Outcome:
        """One try: the provider's hosts in turn, until one answers or says what they all would.

        A spent quota is the better reason, whatever another host says.
        """
        problems: list[Problem] = []
        for url in prepared.urls:
            outcome = await self.exchange(account, prepared, url, began, delivery)
            if not isinstance(outcome, Problem):
                return outcome
            problems.append(outcome)
            if LOCAL in outcome.codes or not is_hosts_fault(outcome.status):
                return outcome
        spent = [problem for problem in problems if problem.status == 429]
        return spent[0] if spent else problems[-1]

    async def request_of(
        self, account: Account, prepared: Prepared, url: str
    ) -> tuple[Headers, list[Any]]:
        """Headers and body as this account asks."""
        body = await self.enveloped(account, prepared)
        headers = account_headers(prepared, url, account)
        # What an account gave goes back to it alone, and what nobody here gave to nobody.
        for name in prepared.row.provider.own_headers:
            if name in headers and self.givers.get(headers[name][:1000]) is not account:
                headers.popall(name)
        return headers, body

    async def enveloped(self, account: Account, prepared: Prepared) -> list[Any]:
        """The body in Code Assist's envelope, with the account's project."""
        if prepared.envelope is None:
            return prepared.body
        around = dict(prepared.envelope)
        if around:
            provider = prepared.row.provider
            around["project"] = await self.pool.project(account, provider, prepared.token)
        if "requestType" in around:
            around["requestId"] = f"agent-{uuid.uuid4()}"
        start = write_json(around)[:-1] + (b"," if around else b"")
        return [start + b'"request":', *prepared.body, b"}"]

    def remember_headers(self, given: Any, account: Account, prepared: Prepared) -> None:
        """Who gave a header that is its giver's own."""
        for name in prepared.row.provider.own_headers:
            if name in given:
                self.givers[given[name][:1000]] = account
                self.givers.move_to_end(given[name][:1000])
        while len(self.givers) > THREADS:
            self.givers.popitem(last=False)

    async def exchange(
        self, account: Account, prepared: Prepared, url: str, began: float, delivery: Delivery
    ) -> Outcome:
        """One request to a provider, and its answer to the client."""
        call, model = delivery.call, prepared.way.model
        upstream, over = None, False
        try:
            headers, body = await self.request_of(account, prepared, url)
            upstream = await self.net.post(url, headers, body, delivery.idle, account.proxy)
            del headers, body
            self.remember_headers(upstream.headers, account, prepared)
            windows = quota_of(upstream.headers)
            account.quota = windows or account.quota
            if upstream.status != 200:
                return await refusal(call, upstream, windows, self.clock.time(), delivery)
            pieces = Pieces(upstream, delivery)
            wrapped = prepared.envelope is not None
            reader = prepared.new_reader() if prepared.new_reader else None
            answer = await begin_answer(pieces, prepared.folds, wrapped, reader)
            if delivery.response and not answer.events:  # a comment has gone out
                raise fault(502, f"{call.provider} sent no stream")
            self.pool.answered(account, model, began)
            call.let_go()
            prepared.let_go()
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


def estimate(call: Call, way: Way) -> web.Response:
    """A quarter of the characters: the model's provider does not count in the client's dialect."""
    ask = call.neutral()
    texts = [part for turn in ask.turns for part in turn.parts]
    size = sum(map(characters, texts))
    size += sum(len(t.name + t.description) + len(write_json(t.schema)) for t in ask.tools)
    call.route, call.provider = way.route, way.rows[0].name
    call.served_model = way.rows[0].provider.served(way.model)
    headers = {**call.proxy_headers(), "x-ampproxy-estimate": "true"}
    counted = {ESTIMATES[call.verb]: max(1, -(-size // 4))}
    return web.json_response(counted, headers=headers)


def characters(part: Part) -> int:
    match part:
        case ToolResult():
            return sum(map(characters, part.parts))
        case Media():
            return 0
    return len(part.text)


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
    headers.update(call.proxy_headers())
    if answer.events and call.lists:
        headers["Content-Type"] = "application/json; charset=UTF-8"
        answer.first = b"[" + listed(answer.first).removeprefix(LIST_MARK)
        answer.rest = list_of(answer.rest)
        return await delivery.stream(upstream, headers, answer)
    if answer.events:
        if upstream.content_type != "text/event-stream":
            headers["Content-Type"] = "text/event-stream"
        return await delivery.stream(upstream, headers, answer)
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
    theirs = spoke_of(provider, call)
    call.is_foreign = theirs is not call.dialect
    new_reader = None
    if call.is_foreign:
        headers, verb = Headers(provider.headers), theirs.verb
        body, new_reader = translated_body(call, way, row, theirs)
    else:
        headers, verb = client_headers(call.request.headers, provider), call.verb
        body = own_body(call, way, provider)
    headers["Accept-Encoding"] = "identity"
    headers["Content-Type"] = "application/json"
    forced = verb in STREAMING and matches(call.served_model[:200], provider.only_streams)
    asks_stream = forced or call.is_foreign
    verb = STREAMING.get(verb, verb) if asks_stream else verb
    if row.kind in RULES:
        body = RULES[row.kind](body, headers, provider)
    if provider.wraps:
        body = code_assist_rules(body, call.served_model, provider, verb)
    body = without(body, *NOT_ASKED.get(verb, ()))
    headers["Accept"] = "text/event-stream" if call.streams or asks_stream else "application/json"
    for name, value in headers.items():
        if not value.isprintable():
            raise fault(400, f"{name} holds a character that cannot be sent in a header")
    envelope = envelope_of(body, call.served_model, provider, verb) if provider.wraps else None
    urls = addresses_of(call, provider, verb)
    folds = asks_stream and not call.streams
    pieces = worded(call, body)
    return Prepared(way, row, headers, pieces, urls, folds, envelope, new_reader=new_reader)


def own_body(call: Call, way: Way, provider: Provider) -> Json:
    """The client's body for a provider of its own dialect."""
    body = call.body
    mark = SEAL_MARK_64 if call.dialect is GEMINI else SEAL_MARK
    if mark.encode() in call.raw:
        body = without_our_seals(body)
    if call.dialect is not GEMINI and body.get("model") != call.served_model:
        body = {**body, "model": call.served_model}
    if call.verb == "messages" and not body.get("max_tokens"):
        body = {**body, "max_tokens": provider.max_tokens or most_tokens(call.served_model)}
    if way.route == "mapped":
        body = with_sampling(body, call.dialect.name, call.served_model)
    effort = effort_for(call, way)
    return with_effort(body, call.dialect.name, provider.thinking, effort, call.served_model)


SEAL_KEYS = ("signature", "data", "encrypted_content")  # of thoughts, in their dialects
HISTORY_KEYS = ("messages", "input", "contents")  # of a body
CONTENT_KEYS = ("content", "parts", "reasoning_details")  # of what stands in a history


def without_our_seals(body: Json) -> Json:
    """A body without the thoughts of other providers, which its own one would refuse.

    They came to the client in our mark while another model answered.
    """
    body = {**body}
    for key in HISTORY_KEYS:
        if isinstance(body.get(key), list):
            items = [item for item in body[key] if not is_foreign_thought(item)]
            body[key] = [item for each in items if (item := without_foreign_content(each))]
    return body


def without_foreign_content(item: Any) -> Any:
    """An item of a history; None where it held nothing but foreign thoughts."""
    if not isinstance(item, dict):
        return item
    item = {**item}
    for key in CONTENT_KEYS:
        parts = item.get(key)
        if isinstance(parts, list) and parts:
            item[key] = [without_foreign_seal(p) for p in parts if not is_foreign_thought(p)]
            if not item[key] and key != "reasoning_details":
                return None
    return item


def without_foreign_seal(part: Any) -> Any:
    """For Gemini, where the seal of a thought stands on the part behind it."""
    if isinstance(part, dict) and text_of(part.get("thoughtSignature")).startswith(SEAL_MARK_64):
        return {**part, "thoughtSignature": NO_SEAL}
    return part


def is_foreign_thought(item: Any) -> bool:
    if not isinstance(item, dict):
        return False
    return any(text_of(item.get(key)).startswith(SEAL_MARK + ":") for key in SEAL_KEYS)


def translated_body(
    call: Call, way: Way, row: Row, theirs: Dialect
) -> tuple[Json, Callable[[], Reader]]:
    """The body for a provider of another dialect, and what reads its answer."""
    ask, provider, model = call.neutral(), row.provider, call.served_model
    maker = family_of(theirs.name, model)
    names = Names(ask, theirs.name_rule)
    most = provider.max_tokens or most_tokens(model)
    target = Target(model, maker, names, most, provider.hosted)
    body = with_sampling(theirs.write_request(ask, target), theirs.name, model)
    effort = effort_for(call, way) or effort_of(call.body, call.dialect.name)
    takes = thinking_of(provider.thinking, model)
    if maker.endswith("/claude") and is_cut_off(ask, maker, bool(takes.limits)):
        effort = "none"
    effort = effort_within(effort, ask.limit, takes)
    body = with_effort(body, theirs.name, provider.thinking, effort, model)
    if ask.limit and theirs is ANTHROPIC:
        body["max_tokens"] = ask.limit  # the budget fits
    if theirs is RESPONSES and effort not in ("", "none") and takes.levels:
        # Who asks for an effort wants to read thoughts, too.
        body = {**body, "reasoning": {"summary": "auto", **as_dict(body.get("reasoning"))}}
    stops = ask.stops[MOST_STOPS[theirs.name] :]
    settings = {name: call.body[name] for name in REPEATED if call.body.get(name) is not None}
    tells_usage = bool(as_dict(call.body.get("stream_options")).get("include_usage"))

    def new_reader() -> Reader:
        kind = call.dialect.writer if call.streams else Reply
        reply = kind(stops, call.model, maker, names)
        reply.repeated, reply.tells_usage = settings, tells_usage
        return theirs.reader(reply)

    return body, new_reader


def effort_for(call: Call, way: Way) -> str:
    """The suffix's, but for a count; a mapped call says its own in the words of the other model."""
    asked = "" if call.verb in ESTIMATES else way.effort
    if way.route == "mapped" and asked in ("", "auto"):
        return effort_of(call.body, call.dialect.name)
    return "" if asked == "auto" else asked


def effort_within(effort: str, limit: int, takes: Thinking) -> str:
    """A budget is a part of the client's limit: three quarters, if it asks for more than all."""
    if not limit or not takes.limits or effort in ("", "auto", "none"):
        return effort
    tokens = min(BUDGETS.get(effort) or int(effort), takes.limits[1])
    if tokens < limit:
        return effort
    most = max(takes.limits[0], limit * 3 // 4)
    return str(most) if most < limit else "none"


def client_headers(given: Any, provider: Provider) -> Headers:
    """The provider's own, and those of the client that may travel on; the client's win."""
    headers, seen, connection = Headers(provider.headers), set(), connection_of(given)
    for name, value in given.items():
        if reaches_provider(name[:100], connection, provider.passes):
            lower = name.lower()
            headers[name] = f"{headers[name]},{value}" if lower in seen else value
            seen.add(lower)
    return headers


@functools.lru_cache(4096)
def reaches_provider(name: str, connection: str, passes: tuple[str, ...]) -> bool:
    return travels(name, connection, ()) and matches(name.lower(), passes)


def worded(call: Call, body: Json) -> list[Any]:
    """The client's own bytes where nothing had to change, else the body in JSON.

    Equality of dicts and lists short-cuts on identity, so what rules share costs nothing here.  A
    key that stands twice is read once, and the provider might read the other one.
    """
    if (body is call.body or body == call.body) and call.raw.count(b'"model"') < 2:
        return [call.raw]
    try:
        if len(call.raw) > SPLICED:
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
    return True


def addresses_of(call: Call, provider: Provider, verb: str) -> list[str]:
    """Of each host of a provider, in the order to ask them."""
    path = provider.paths[verb]
    path = path.replace("{model}", quote(call.served_model, "", None, "replace"))
    query = "" if call.is_foreign else query_for_provider(call.request.rel_url.raw_query_string)
    if verb == "streamGenerateContent":
        query = f"alt=sse&{query}".rstrip("&")
    addresses = [joined(host, path) for host in (provider.base_url, *provider.more_hosts)]
    return [f"{url}{'&' if '?' in url else '?'}{query}" if query else url for url in addresses]


def account_headers(prepared: Prepared, url: str, account: Account) -> Headers:
    provider, token = prepared.row.provider, prepared.token
    headers = prepared.headers.copy()
    host = as_url(url).host
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


def secrets_file() -> Path:
    """Where Amp keeps its keys, one an address."""
    return folder_of("XDG_DATA_HOME", "~/.local/share") / "amp/secrets.json"


def stored_keys() -> Json:
    """What that file says; {} where it cannot be read."""
    try:
        return parse_object(read_file(secrets_file()))
    except (OSError, ValueError):
        return {}


def stored_key(stored: Json, base: str) -> str:
    """Amp's own key for an address, from that file."""
    found = stored.get(f"apiKey@{base}/") or stored.get(f"apiKey@{base}") or ""
    return str(found).strip()


# The feature that takes clients of April and May 2026 off the proxy, and a comma (amp-client.md 3).
FLAG = re.compile(
    rb"(?:,|(\[))\s{0,99}\{[^{}]{0,99}"
    rb'"name"\s{0,9}:\s{0,9}"thread-actors-tui"[^{}]{0,99}\}(?(1)\s{0,99},?)'
)
USER_INFO = re.compile(r"/api/internal\?getUserInfo(?![\w-])")
AMP_UNREACHABLE = "amp_upstream_proxy_error"  # Amp's clients know it from CLIProxyAPI


def unreachable_error(dialect: Dialect, problem: Problem) -> Json:
    """The same for a model call: an error of its dialect, in which that is the type or code."""
    body = dialect.error(problem.status, problem.message)
    key = {"anthropic": "type", "gemini": "status"}.get(dialect.name, "code")
    body["error"][key] = AMP_UNREACHABLE
    return body


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
            self.secrets, self.secrets_until = stored_keys(), now + 5 * MINUTE
        return stored_key(self.secrets, base)

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
        if call.was_packed:
            headers.popall("Content-Encoding")
        url = self.address(request)
        try:
            upstream = await self.net.post(url, headers, [call.raw], idle)
        except ProxyError as error:
            error.problem.body = write_json(unreachable_error(call.dialect, error.problem))
            raise
        over = False
        try:
            check_status(upstream)
            call.let_go()
            headers = passing(upstream.headers)
            headers.update(call.proxy_headers())
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
            response = await delivery.stream(upstream, headers, Answer(True, b"", events))
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
# What was served, and how the accounts stand: for the log, GET /status, the start, the terminal and
# the page at /.  No secret, no prompt.

ROUTE_WORDS = {
    "local": "LOCAL_PROVIDER",
    "mapped": "MODEL_MAPPING",
    "amp": "AMP_CREDITS",
    "none": "NO_PROVIDER",
}
ROUTE_COLOURS = {"local": "green", "mapped": "cyan", "amp": "red", "none": "yellow"}
COUNTED_MODELS = 100  # names of models that are counted apart, in all and of paid calls
FIRST_LOGIN = "ampproxy.py login claude (or codex)"  # for who has no account
NO_ACCOUNT = {  # whether ampcode.com may be asked -> what the log says where there is none
    True: "NO LOGIN AND NO KEY: Amp answers every model call, and bills it.",
    False: "NO LOGIN AND NO KEY: no model call can be answered.",
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
        self.models: dict[tuple[str, str], Counter[str]] = {}  # by who answered, and the model
        self.server_side = 0  # threads whose model runs on Amp's servers
        self.warn_at = 0.0  # not before then, that there is no account

    def note(self, call: Call, status: int, took: float) -> None:
        """A call that has ended; 499 when the client left."""
        self.routes[call.route] += 1
        model = call.model[:200]
        known = model in self.paid or len(self.paid) < COUNTED_MODELS
        if call.route == "amp" and status in (200, 499) and known:
            self.paid[model] += 1
        self.count_model(call, status)
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
        who = f"{call.provider or '-'} {mask(call.account) if call.account else ''}".strip()
        if call.route == "mapped":
            who = f"{who} as {call.served_model[:100]}"
        trouble = f" {call.trouble}" if call.trouble else ""
        line = "%-14s %d %6.1fs %-28s %s%s"
        values = (ROUTE_WORDS[call.route], status, took, model[:100] or "-", who, trouble)
        log.log(level, line, *values, extra={"colour": ROUTE_COLOURS[call.route]})

    def count_model(self, call: Call, status: int) -> None:
        key = (call.provider[:200], (call.served_model or call.model)[:200])
        if call.route == "none" or (key not in self.models and len(self.models) >= COUNTED_MODELS):
            return
        if key not in self.models:
            self.models[key] = Counter(requests=0, errors=0)
        counts = self.models[key]
        counts["requests"] += 1
        counts["errors"] += status >= 400
        for name, figure in call.tokens.items():
            counts[name] += figure

    def wake(self, name: str, provider: str = "") -> list[Account]:
        """End the rests of the accounts of that name by hand: those that there are."""
        found = []
        for account in self.pool.accounts.values():
            if account.label.lower() == name.lower() and provider in ("", account.kind):
                found.append(account)
                account.rests = {}
                if isinstance(account, Login):
                    account.retry_at = 0.0
                log.info("%s: its rest was ended by hand", account.name)
        return found

    def warn_of_no_account(self) -> None:
        """At the start, and once in an hour of paid calls."""
        if self.pool.of(self.pool.live.rows):
            return
        self.warn_at = self.clock.monotonic() + HOUR
        pays = self.pool.live.config["ampcode"]["fallback"] != "never"
        log.warning("%s To use a plan of yours: %s", NO_ACCOUNT[pays], FIRST_LOGIN)

    def note_server_side(self, path: str) -> None:
        self.server_side += path == "/api/thread-actors"
        log.warning(AMP_BILLS)

    def report(self) -> Json:
        return {
            "version": __version__,
            "uptime_seconds": int(self.clock.monotonic() - self.began),
            "routes": dict(self.routes),
            "paid": dict(self.paid.most_common()),
            "fallback": self.pool.live.config["ampcode"]["fallback"],
            "accounts": [self.report_account(a) for a in self.pool.accounts.values()],
            "models": [self.report_model(*key) for key in sorted(self.models)],
            "server_side_threads": self.server_side,
            "notices": self.notices(),
            "requests": [*self.requests],
        }

    def notices(self) -> list[str]:
        """What costs money, or will."""
        lines = []
        if calls := self.routes["amp"]:
            names = ", ".join(f"{name} ({n})" for name, n in self.paid.most_common(5))
            words = (
                f"PAID: ampcode.com was asked {calls} time{'s' * (calls > 1)} and may charge for it"
            )
            lines.append(f"{words}: {names}" if names else words)
        if self.server_side:
            words = f"{self.server_side} threads run on Amp's servers: Amp bills them"
            lines.append(f"PAID: {words}, not your logins")
        if not self.pool.accounts:
            lines.append(f"No login and no key: run {FIRST_LOGIN}")
        return lines

    def report_model(self, provider: str, model: str) -> Json:
        return {"provider": provider, "model": model, **self.models[provider, model]}

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
            "provider": account.row.name if account.row else account.kind,
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


# -- What the start tells --


def standing(live: Live, pool: Pool) -> list[str]:
    """What the start tells, beside the address: what is in effect, and what it means."""
    kinds = Counter(
        (account.row.name, type(account)) for account in pool.of(live.rows) if account.row
    )
    words = {Login: "login", ApiKey: "key"}
    present = [f"{name} {n} {words[kind]}{'s' * (n > 1)}" for (name, kind), n in kinds.items()]
    rules = live.config["ampcode"]["model-mappings"]
    mapped = [f"{rule['from']} > {' or '.join(rule['to'])}" for rule in rules]
    more = f", and {len(mapped) - 5} more" if len(mapped) > 5 else ""
    return [
        f"config    {live.path or 'none found: the defaults'}",
        f"accounts  {', '.join(present) or 'none'}",
        f"mapped    {', '.join(mapped[:5]) or 'nothing'}{more}",
        f"paid      {PAID_WORDS[live.config['ampcode']['fallback']]}",
    ]


PAID_WORDS = {  # what ampcode.fallback means
    "always": "ampcode.com may charge for what no account here answers (fallback: always)",
    "unserved": "ampcode.com may charge for models that nobody here serves (fallback: unserved)",
    "never": "nothing: ampcode.com is never asked for a model (fallback: never)",
}


# -- Asking the running proxy --


async def ask_proxy(live: Live, path: str = "/status", body: Json | None = None) -> Json:
    """What the proxy that runs with this configuration answers; Failure when it does not."""
    keys, url = [*live.config["api-keys"], ""], live.address() + path
    headers = {"X-Api-Key": keys[0], "Content-Type": "application/json"}
    data = None if body is None else write_json(body)
    try:
        async with (
            asyncio.timeout(10),
            aiohttp.request("POST" if body else "GET", url, headers=headers, data=data) as answer,
        ):
            raw = await answer.read()
    except NET_ERRORS as error:
        raise Failure(
            f"no proxy to ask at {url} ({net_words(error)}): start it, or say its --config"
        ) from error
    try:
        report = parse_object(raw)
    except ValueError:
        raise Failure(f"what answers at {url} is no ampproxy: see --config") from None
    if answer.status != 200:
        raise Failure(f"{url} answered {answer.status}: {error_text(report)}")
    return report


# -- A table for the terminal --

STATE_COLOURS = {"ready": "green", "resting": "yellow", "needs-login": "red", "disabled": "dim"}
SHORT_ROUTES = {"local": "local", "mapped": "mapped", "amp": "PAID", "none": "refused"}


def span(seconds: float) -> str:
    """4 d 3 h, 2 h 10 min, 12 min, 40 s."""
    left = max(0, int(seconds))
    if left >= DAY:
        return f"{left // DAY} d {left % DAY // HOUR} h"
    if left >= HOUR:
        return f"{left // HOUR} h {left % HOUR // MINUTE} min"
    return f"{left // MINUTE} min" if left >= MINUTE else f"{left} s"


def state_words(account: Json) -> str:
    match account["state"]:
        case "resting":
            return f"resting, wakes in {span(account['wakes_in_seconds'])}"
        case "needs-login":
            return "needs login"
    return str(account["state"])


@dataclass(frozen=True)
class Sheet:
    """What lines are written on: colours or none, its width, the two signs of a bar."""

    paint: Paint
    width: int
    signs: str

    def line(self, *pieces: tuple[str, str]) -> str:
        """Texts with their colours, as much of them as fits."""
        left, line = self.width, ""
        for text, colour in pieces:
            shown = printable(text)[:left]
            left -= len(shown)
            line += self.paint(shown, colour)
        return line

    def bar(self, percent: float, size: int = 20) -> str:
        full = min(size, max(0, round(percent * size / 100)))
        return self.signs[0] * full + self.signs[1] * (size - full)


def sheet_for(stream: Any) -> Sheet:
    width = shutil.get_terminal_size().columns if stream.isatty() else 200
    try:
        "█░".encode(stream.encoding or "ascii")
    except (UnicodeError, LookupError):
        return Sheet(paint_for(stream), width, "#-")
    return Sheet(paint_for(stream), width, "█░")


def account_lines(sheet: Sheet, account: Json) -> list[str]:
    name = account["account"] + (f" ({account['plan']})" if account["plan"] else "")
    name = name if len(name) <= 32 else f"{name[:31]}\N{HORIZONTAL ELLIPSIS}"
    head = f"{account['provider']:<13.13} {name:<32} "
    lines = [sheet.line((head, "bold"), (state_words(account), STATE_COLOURS[account["state"]]))]
    indent = " " * 14
    if account["reason"]:
        lines.append(sheet.line((indent + account["reason"], "yellow")))
    if account["state"] == "needs-login":
        lines.append(sheet.line((f"{indent}run ampproxy.py login {account['provider']}", "red")))
    for quota in account["quota"]:
        used = quota["used_percent"]
        ends = quota["resets_in_seconds"]
        words = f"{used:>4.0f} %  {f'resets in {span(ends)}' if ends else ''}"
        colour = "red" if used >= NEARLY_SPENT else "cyan"
        window = f"{indent}{quota['window']:<10.10} "
        lines.append(sheet.line((window, ""), (sheet.bar(used), colour), (words, "")))
    calls = f"calls {account['requests']:,}, failed {account['errors']:,}; "
    tokens = f"tokens in {account['input_tokens']:,}, out {account['output_tokens']:,}"
    lines.append(sheet.line((indent + calls + tokens, "dim")))
    return lines


def request_line(sheet: Sheet, request: Json) -> str:
    clock = time.strftime("%X", time.localtime(parse_time(request["time"])))
    colour = ROUTE_COLOURS[request["route"]]
    took = f" {request['status']} {request['seconds']:>6.1f}s {request['model']:<28} "
    who = f"{request['provider']} {request['account']}".strip()
    if request["route"] == "mapped":
        who += f" as {request['served_model']}"
    tail = "red" if request["route"] == "amp" else ""
    word = f"{SHORT_ROUTES[request['route']]:<7}"
    return sheet.line((f"{clock} ", ""), (word, colour), (took + who, tail))


def model_line(sheet: Sheet, model: Json) -> str:
    counts = f"{model['requests']:>7,} {model['errors']:>7,}"
    tokens = f"{model['input_tokens']:>12,} {model['output_tokens']:>11,}"
    colour = "red" if model["provider"] == "ampcode" else ""
    who = f"{model['model']:<28.28} {model['provider']:<12.12}"
    return sheet.line((f"{who}{counts}{tokens}", colour))


def status_lines(report: Json, sheet: Sheet, most: int = 10) -> list[str]:
    """The table, with the last `most` requests, the newest first."""
    routes = [f"{report['routes'][name]:,} {word}" for name, word in SHORT_ROUTES.items()]
    up = f"ampproxy {report['version']}, up {span(report['uptime_seconds'])}"
    lines = [sheet.line((f"{up}; calls: {', '.join(routes)}", "bold"))]
    lines += [sheet.line((notice, "red")) for notice in report["notices"]]
    for account in report["accounts"]:
        lines += ["", *account_lines(sheet, account)]
    if report["models"]:
        heads = f"{'MODEL':<28} {'PROVIDER':<12}  CALLS  FAILED   TOKENS IN         OUT"
        lines += ["", sheet.line((heads, "dim"))]
        lines += [model_line(sheet, model) for model in report["models"]]
    if most > 0 and report["requests"]:
        lines += ["", sheet.line(("LAST REQUESTS", "dim"))]
        lines += [request_line(sheet, one) for one in report["requests"][: -most - 1 : -1]]
    return lines


# -- The page at / --
#
# One page without any outside file.  It holds no data: it asks /status as any client does, with the
# key that the person gives it where one is needed.  What a client sent is only ever text in it.

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>ampproxy</title>
<link rel="icon" href="data:,">
<style>
:root {
  --back: #f6f7f9; --card: #fff; --line: #d5d9e0; --text: #1b2130; --soft: #566076;
  --local: #14692f; --mapped: #0b5c86; --paid: #b3151f; --none: #7a4d00; --bar: #3f6fd8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #12151c; --card: #1b202b; --line: #343c4c; --text: #e7eaf1; --soft: #a3adc0;
    --local: #7bd694; --mapped: #7cc7f0; --paid: #ff8a8a; --none: #f0c36b; --bar: #7aa2ff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 80rem;
  background: var(--back); color: var(--text); font: 16px/1.45 system-ui, sans-serif;
}
h1 { font-size: 1.3rem; margin: 0; }
h2 { font-size: 1.05rem; margin: 1.6rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
p { margin: .3rem 0; }
header { display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: baseline; }
.soft, header p, dt, th { color: var(--soft); }
[hidden] { display: none !important; }
:focus-visible { outline: 3px solid var(--bar); outline-offset: 2px; }
button, input {
  font: inherit; color: inherit; background: var(--card);
  border: 1px solid var(--soft); border-radius: .4rem; padding: .35rem .8rem;
}
button { cursor: pointer; }
form { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; margin-top: 2rem; }
#paid {
  margin: 1rem 0 0; padding: .6rem .9rem; border: 2px solid var(--paid); border-radius: .5rem;
  color: var(--paid); font-weight: 700; overflow-wrap: anywhere;
}
.figures { display: flex; flex-wrap: wrap; gap: .6rem 2rem; margin: 0; }
.figures dd { margin: 0; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.cards {
  display: grid; gap: .8rem; padding: 0; margin: 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr));
}
.cards > li {
  background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem;
}
.top { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .3rem .6rem; }
.top > div { flex: 1 1 12rem; }
.mark {
  align-self: start; border: 1px solid currentColor; border-radius: 1rem; padding: 0 .6rem;
  font-size: .85rem; font-weight: 600; white-space: nowrap;
}
.local, .ready { color: var(--local); }
.mapped { color: var(--mapped); }
.none, .resting { color: var(--none); }
.amp, .needs-login { color: var(--paid); }
.disabled { color: var(--soft); }
.why { overflow-wrap: anywhere; }
.window { margin-top: .7rem; font-size: .9rem; }
.window > div:first-child { display: flex; justify-content: space-between; gap: 1rem; }
[role=progressbar] {
  height: .6rem; border: 1px solid var(--soft); border-radius: .3rem; overflow: hidden;
}
[role=progressbar] span { display: block; height: 100%; background: var(--bar); }
[role=progressbar].full span { background: var(--paid); }
.small {
  display: grid; grid-template-columns: auto 1fr; gap: 0 .8rem; margin: .8rem 0 0; font-size: .9rem;
}
.small dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
table { width: 100%; border-collapse: collapse; font-size: .92rem; }
th { text-align: left; font-weight: 600; }
th, td { padding: .35rem .6rem .35rem 0; border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.t { white-space: nowrap; }
tr.amp td { color: var(--paid); font-weight: 700; }
@media (max-width: 700px) {
  thead { position: absolute; clip-path: inset(50%); height: 1px; width: 1px; overflow: hidden; }
  tr { display: flex; flex-wrap: wrap; gap: 0 .8rem; padding: .5rem 0; }
  tr { border-bottom: 1px solid var(--line); }
  td { border: 0; padding: 0; }
  td[data-label]::before { content: attr(data-label) " "; color: var(--soft); font-weight: 400; }
  td.wide { flex-basis: 100%; }
}
</style>
</head>
<body>
<header>
  <h1>ampproxy</h1>
  <p id="about"></p>
  <p id="link" role="status"></p>
</header>
<noscript><p>This page needs JavaScript; <a href="/status">the same as JSON</a> does not.</p>
</noscript>
<form id="ask" hidden>
  <label for="key">A key of this proxy (api-keys)</label>
  <input id="key" type="password" autocomplete="off" required aria-describedby="wrong">
  <button>Show the status</button>
  <p id="wrong" role="alert"></p>
</form>
<main id="all" hidden>
  <p id="paid" role="status" hidden></p>
  <p id="said" role="status"></p>
  <section aria-labelledby="calls-title">
    <h2 id="calls-title">Calls since the start</h2>
    <dl id="calls" class="figures"></dl>
  </section>
  <section aria-labelledby="accounts-title">
    <h2 id="accounts-title">Accounts</h2>
    <ul id="accounts" class="cards"></ul>
  </section>
  <section aria-labelledby="models-title">
    <h2 id="models-title">Models</h2>
    <div id="models"></div>
  </section>
  <section aria-labelledby="requests-title">
    <h2 id="requests-title">Last requests</h2>
    <div id="requests"></div>
  </section>
</main>
<script>
"use strict";
const EVERY = 2000, KEPT = "ampproxy-key";
const ROUTES = {local: "local", mapped: "mapped", amp: "PAID", none: "refused"};
const find = id => document.getElementById(id);
const count = number => Math.round(number || 0).toLocaleString("en");
let key = sessionStorage.getItem(KEPT) || "", timer = 0;

function make(tag, about, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(about || {})) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function span(seconds) {
  const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const first = units.findIndex(([size]) => seconds >= size);
  if (first < 0) return "0 s";
  const [size, name] = units[first], rest = Math.floor(seconds % size);
  const words = `${Math.floor(seconds / size)} ${name}`;
  if (first > 1) return words;
  const [less, lesser] = units[first + 1];
  return `${words} ${Math.floor(rest / less)} ${lesser}`;
}

// What has not changed is left alone, so that focus and reading position stay where they are.
function put(id, ...children) {
  const there = find(id), fresh = there.cloneNode(false);
  fresh.append(...children);
  if (there.isEqualNode(fresh)) return;
  const focused = document.activeElement && document.activeElement.id;
  there.replaceChildren(...fresh.childNodes);
  if (focused && document.activeElement.id !== focused) find(focused)?.focus();
}

function pairs(table) {
  return table.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
}

function figure(route, number) {
  const mark = make("dd", {class: number ? route : ""}, count(number));
  return make("div", {}, make("dt", {}, ROUTES[route]), mark);
}

function bar(account, quota) {
  const used = Math.min(100, Math.max(0, quota.used_percent));
  const resets = quota.resets_in_seconds ? `resets in ${span(quota.resets_in_seconds)}` : "";
  const box = make("div", {
    role: "progressbar", "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": used,
    "aria-label": `${account.provider} ${account.account}: quota ${quota.window}`,
    "aria-valuetext": `${used} % used${resets && ", " + resets}`,
    class: used >= 95 ? "full" : "",
  }, make("span"));
  box.firstChild.style.width = `${used}%`;
  const words = make("div", {}, make("span", {}, `${quota.window}: ${used} %`),
                     make("span", {class: "soft"}, resets));
  return make("div", {class: "window"}, words, box);
}

function button(account) {
  const id = encodeURIComponent(`wake ${account.provider} ${account.account}`);
  const about = {type: "button", id, "data-provider": account.provider,
                "data-account": account.account, "aria-label": `Try ${account.account} again now`};
  return make("p", {}, make("button", about, "Try again now"));
}

function card(account) {
  const words = {resting: `resting, wakes in ${span(account.wakes_in_seconds)}`,
                 "needs-login": "needs login"};
  const title = make("h3", {}, account.account);
  const kinds = [account.provider, account.plan].filter(Boolean).join(", ");
  const kind = make("p", {class: "soft"}, kinds), state = words[account.state] || account.state;
  const mark = make("span", {class: `mark ${account.state}`}, state);
  const box = make("li", {}, make("div", {class: "top"}, make("div", {}, title, kind), mark));
  if (account.reason) box.append(make("p", {class: "why"}, account.reason));
  if (account.state === "needs-login")
    box.append(make("p", {}, "Run ", make("code", {}, `ampproxy.py login ${account.provider}`)));
  if (account.state === "resting" || (account.state === "ready" && account.reason))
    box.append(button(account));
  box.append(...account.quota.map(quota => bar(account, quota)));
  const expires = account.expires_in_seconds, table = [
    ["calls, failed", `${count(account.requests)}, ${count(account.errors)}`],
    ["running, threads", `${count(account.in_flight)}, ${count(account.threads)}`],
    ["tokens in, out", `${count(account.input_tokens)}, ${count(account.output_tokens)}`],
  ];
  if (expires !== null)
    table.push(["token", expires > 0 ? `good for ${span(expires)}` : "is refreshed when needed"]);
  box.append(make("dl", {class: "small"}, ...pairs(table)));
  return box;
}

// Rows that a phone lays out as lines lose their meaning unless they say what they are.
function table(heads, rows) {
  const cells = (tag, role, row) => row.map(([text, kind, label]) => {
    const about = {role};
    if (kind) about.class = kind;
    if (label && tag === "td") about["data-label"] = label;
    return make(tag, tag === "th" ? {...about, scope: "col"} : about, text);
  });
  const head = make("thead", {role: "rowgroup"},
                    make("tr", {role: "row"}, ...cells("th", "columnheader", heads)));
  const body = rows.map(([kind, row]) =>
    make("tr", {role: "row", class: kind}, ...cells("td", "cell", row)));
  return make("table", {role: "table"}, head, make("tbody", {role: "rowgroup"}, ...body));
}

function modelTable(models) {
  if (!models.length) return make("p", {class: "soft"}, "No model has been asked yet.");
  const heads = [["model"], ["answered by"], ["calls", "n"], ["failed", "n"],
                 ["tokens in", "n"], ["tokens out", "n"]];
  return table(heads, models.map(m => [m.provider === "ampcode" ? "amp" : "", [
    [m.model, "wide"], [m.provider], [count(m.requests), "n", "calls"],
    [count(m.errors), "n", "failed"], [count(m.input_tokens), "n", "in"],
    [count(m.output_tokens), "n", "out"]]]));
}

function requestTable(requests) {
  if (!requests.length) return make("p", {class: "soft"}, "No request has come yet.");
  const heads = [["time"], ["route"], ["model"], ["answered by"], ["status", "n"],
                 ["seconds", "n"], ["tokens in", "n"], ["tokens out", "n"]];
  return table(heads, [...requests].reverse().map(r => {
    const when = new Date(r.time).toLocaleTimeString("en", {hour12: false});
    const mapped = r.served_model && r.served_model !== r.model ? ` as ${r.served_model}` : "";
    const mark = make("span", {class: `mark ${r.route}`}, ROUTES[r.route]);
    return [r.route === "amp" ? "amp" : "", [
      [when, "t"], [mark], [r.model, "wide"], [`${r.provider} ${r.account}${mapped}`],
      [`${r.status}`, "n"], [r.seconds.toFixed(1), "n", "seconds"],
      [count(r.input_tokens), "n", "in"], [count(r.output_tokens), "n", "out"]]];
  }));
}

function show(report) {
  find("ask").hidden = true;
  find("all").hidden = false;
  const up = `${report.version}, up ${span(report.uptime_seconds)}`;
  put("about", `${up}, fallback: ${report.fallback}`);
  const words = report.notices.join(". ");
  find("paid").hidden = !words;
  put("paid", words);
  put("calls", ...Object.keys(ROUTES).map(route => figure(route, report.routes[route])));
  put("accounts", ...report.accounts.map(card));
  put("models", modelTable(report.models));
  put("requests", requestTable(report.requests));
}

function askForKey() {
  find("all").hidden = true;
  if (find("ask").hidden) {
    find("ask").hidden = false;
    find("key").focus();
  }
  put("wrong", key ? "That is not a key of this proxy." : "");
  key = "";
  sessionStorage.removeItem(KEPT);
}

function ask(path, about) {
  const headers = {"Accept": "application/json", "Content-Type": "application/json"};
  if (key) headers["X-Api-Key"] = key;
  return fetch(path, {cache: "no-store", ...about, headers});
}

async function look() {
  clearTimeout(timer);
  if (document.hidden) return;  // it looks again when it is shown
  try {
    const answer = await ask("/status");
    if (answer.status === 401) {
      put("link", "");
      askForKey();
      return;  // the form looks again
    }
    if (!answer.ok) throw new Error(`it answered ${answer.status}`);
    show(await answer.json());
    put("link", "live");
  } catch (error) {
    put("link", `out of reach (${error.message}); what follows may be old`);
  }
  timer = setTimeout(look, EVERY);
}

find("ask").addEventListener("submit", event => {
  event.preventDefault();
  key = find("key").value.trim();
  sessionStorage.setItem(KEPT, key);
  find("key").value = "";
  look();
});
find("accounts").addEventListener("click", async event => {
  const {provider, account} = event.target.dataset;
  if (!account) return;
  const answer = await ask("/status/wake", {
    method: "POST", body: JSON.stringify({provider, account})}).catch(() => ({ok: false}));
  put("said", answer.ok ? `${account} may be asked again` : `${account} could not be woken`);
  look();
});
document.addEventListener("visibilitychange", look);
look();
</script>
</body>
</html>
"""


@functools.cache
def page_headers() -> dict[str, str]:
    """Only the page's own script and style run, and no other page may frame it."""
    hashes = []
    for part in re.findall("<(?:style|script)>(.*?)</", PAGE, re.S):
        hashed = hashlib.sha256(part.encode()).digest()
        hashes.append(f"'sha256-{base64.b64encode(hashed).decode()}'")
    style, script = hashes
    policy = (
        f"default-src 'none'; style-src {style}; script-src {script}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "Content-Type": "text/html; charset=utf-8",
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
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
NOT_AMPS = re.compile(r"/(v1|v1beta1?|embeddings|images|audio|completions)(/|$)")


def is_not_amps(raw_path: str) -> bool:
    """Whether a path is one of the SDKs: beside the model calls none of these is ampcode.com's."""
    return NOT_AMPS.match(re.sub("/+", "/", unquote(raw_path))) is not None


def dialect_of_sdk(request: Request) -> Dialect | None:
    """Of an SDK that asks for no model call, but for models, say; None: it is no path of theirs."""
    path = request.rel_url.raw_path
    if request.method == "GET" and LISTING.fullmatch(path):
        return dialect_of_list(request)
    if not is_not_amps(path):
        return None
    return ANTHROPIC if "/messages" in path else dialect_of_list(request)


class Server:
    def __init__(self, live: Live, net: Net, clock: Any = CLOCK) -> None:
        self.live, self.net, self.clock = live, net, clock
        self.pool = Pool(live, net, clock)
        self.ampcode = Ampcode(live, net, clock)
        self.turns = Turns()
        self.forwarder = Forwarder(live, net, self.pool, self.turns, self.ampcode.pay)
        self.ledger = Ledger(self.pool)
        self.tidying: asyncio.TimerHandle | None = None
        self.trouble_told = ""  # the last error of a tick: it is said once

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
        if request.version < (1, 1) and response.content_length is None:
            response.force_close()  # there is no other end; aiohttp would keep the connection
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
            if f"{method} {path}" == "GET /" and "text/html" in request.headers.get("Accept", ""):
                self.check_place(request)
                return web.Response(text=PAGE, headers=page_headers())  # needs no key: no data
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
        self.turns.calls += 1
        try:
            await call.read(self.turns)
            return await self.answer(call, key)
        finally:
            self.turns.calls -= 1

    async def answer(self, call: Call, key: str) -> web.StreamResponse:
        large = len(call.raw) > LARGE
        streaming = self.live.config["streaming"]
        keepalive, idle = streaming["keepalive-seconds"], streaming["idle-timeout-seconds"]
        with Delivery(call, keepalive, idle, self.clock) as delivery:
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
        if not model_path:
            self.check_place(request)
        listing = LISTING.fullmatch(path) if method == "GET" and not upgrades else None
        if listing:
            wanted = unquote(listing["id"] or "")
            return web.json_response(model_list(request, self.forwarder.chooser, wanted))
        if is_not_amps(path):  # a prompt never goes to ampcode.com by accident
            words = f"there is no {method} {path[:100]} here"
            raise ProxyError(Problem(404, words, headers=Headers({"x-ampproxy-route": "none"})))
        if method == "GET" and path in ("/", "/status"):
            return web.json_response(self.ledger.report())
        if method == "POST" and path == "/status/wake":
            return await self.wake(request)
        acts = path.startswith(("/api/thread-actors", "/actors/"))
        if acts and (method == "POST" or upgrades):
            self.ledger.note_server_side(path)
        if upgrades:
            return await self.ampcode.tunnel(request, key)
        return await self.ampcode.forward(request, key)

    def check_place(self, request: Request) -> None:
        local = self.live.config["ampcode"]["restrict-management-to-localhost"]
        if local and not is_loopback(request.remote or ""):
            raise fault(403, "Access denied: management routes restricted to localhost")

    async def wake(self, request: Request) -> web.Response:
        """End an account's rest: {"account": name}, and its provider where two have that name."""
        if request.content_type != "application/json":  # what a form of another site cannot send
            raise fault(415, "this wants Content-Type: application/json")
        try:
            asked = parse_object(await read_body(request))
        except ValueError as error:
            raise fault(400, f"The request body cannot be read: {explain(error)}") from None
        name, provider = str(asked.get("account", "")), str(asked.get("provider", ""))
        woken = self.ledger.wake(name, provider)
        if not woken:
            names = ", ".join(account.label for account in self.pool.accounts.values())
            raise fault(404, f"no account {name[:100]!r}; there are: {names or 'none'}")
        return web.json_response({"woken": [f"{one.kind} {one.label}" for one in woken]})

    def refuse(self, request: Request, call: Call | None, problem: Problem) -> web.Response:
        """The one exit for errors: in the client's dialect, or as Amp's clients know them."""
        headers = problem.headers
        if call:
            headers.update(call.proxy_headers())
            call.trouble = f"{call.trouble}; {problem.message}".removeprefix("; ")
        headers.setdefault("Content-Type", "application/json")
        wait = max(1, round(problem.retry_after)) if problem.retry_after else 0
        if wait:
            headers["Retry-After"] = str(wait)
        if wait > 30:  # SDKs would sleep it out without a word (clients.md)
            headers["x-should-retry"] = "false"
        body = self.error_body(request, call, problem)
        return web.Response(status=problem.status, body=body, headers=headers)

    def error_body(self, request: Request, call: Call | None, problem: Problem) -> bytes:
        if call:
            return worded_error(call, problem, self.clock.time())
        if dialect := dialect_of_sdk(request):
            return write_json(dialect.error(problem.status, problem.message))
        if problem.status == 502:
            return write_json({"error": AMP_UNREACHABLE, "message": problem.message})
        return write_json({"error": problem.message})

    # -- The process --

    def tidy(self) -> None:
        self.tidying = None
        give_back_memory()

    def tick(self) -> None:
        """Once a second: changed files, tokens that are due."""
        try:
            if self.live.reload():
                set_up_log(self.live.config["debug"], self.live.warnings, self.live.log_file)
            self.pool.scan()
            self.pool.refresh_ahead()
            self.trouble_told = ""
        except Exception as error:  # whatever is in the files: the next look comes
            words = explain(error)
            if words != self.trouble_told:
                log.error("%s; what was read before stays in effect", words)
            self.trouble_told = words

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


# == Amp's modes ===================================================================================
#
# Which models Amp's clients ask for where they call models themselves (January to May 2026), and
# who would answer them here: for `check`.  Sub-agents and handoff use the model of the mode.
#
# To add a mode, or what a newer client asks for in one, change AMP_MODES.


class Mode(NamedTuple):
    name: str
    verb: str  # of its calls
    models: tuple[str, ...]  # the newest client's first (amp-client.md 1)
    small: bool = False  # a quick model will do


HAIKU = "claude-haiku-4-5-20251001"
AMP_MODES = (
    Mode("smart", "messages", ("claude-opus-4-7", "claude-opus-4-6", "claude-opus-4-5-20251101")),
    Mode("rush", "messages", (HAIKU,), small=True),
    Mode("large", "messages", ("claude-opus-4-6", "claude-sonnet-4-5-20250929")),
    Mode("deep", "responses", ("gpt-5.4", "gpt-5.2-codex")),
    Mode("title", "messages", (HAIKU,), small=True),
    Mode("oracle", "responses", ("gpt-5.4", "gpt-5.2", "gpt-5.1")),
    Mode("finder, look_at", "generateContent", ("gemini-3-flash-preview",), small=True),
    Mode("librarian", "messages", ("claude-sonnet-4-6", HAIKU), small=True),
    Mode("review", "generateContent", ("gemini-3.1-pro-preview", "gemini-3-pro-preview")),
    Mode("painter", "generateContent", ("gemini-3-pro-image-preview",)),
)
SMALL_MODEL = re.compile("haiku|mini|flash|lite|nano|spark", re.I)
IMAGE_MODEL = re.compile("image", re.I)


def who_answers(chooser: Chooser, model: str, verb: str) -> tuple[str, str]:
    """The route that a model takes here, and who answers there."""
    ways, _ = chooser.ways(*chooser.split(model), verb)
    if ways:
        name = ways[0].rows[0].name
        return ways[0].route, name if ways[0].route == "local" else f"{name} as {ways[0].model}"
    never = chooser.live.config["ampcode"]["fallback"] == "never"
    return ("none", "nobody") if never else ("amp", "ampcode.com")


def stand_in(chooser: Chooser, mode: Mode, model: str) -> str:
    """The model here that could answer instead; "" where there is none of that kind."""
    names = [
        name
        for name in chooser.listed(mode.verb)
        if who_answers(chooser, name, mode.verb)[0] == "local"
    ]
    paints = bool(IMAGE_MODEL.search(model))
    names = [name for name in names if bool(IMAGE_MODEL.search(name)) == paints]
    fitting = [name for name in names if bool(SMALL_MODEL.search(name)) == mode.small]
    return next(iter(fitting or names), "")


def mode_lines(chooser: Chooser) -> list[str]:
    """A line for each mode and each model that a client asks for in it."""
    lines = [f"{'mode or helper':<17}{'model':<29}answered by"]
    for mode in AMP_MODES:
        for model in mode.models:
            route, who = who_answers(chooser, model, mode.verb)
            name = mode.name if model == mode.models[0] else ""
            lines.append(f"{name:<17}{model:<29}{SHORT_ROUTES[route]}: {who}")
    return lines


def who_could(model: str) -> str:
    """What to get for a model: a login, or a key."""
    logins = [kind for kind, row in LOGINS.items() if row.authorize_url]
    words = [f"ampproxy.py login {k}" for k in logins if matches(model, (*LOGINS[k].names,))]
    words += [f"a key under {k}" for k, row in API_KEYS.items() if matches(model, (*row.names,))]
    return " or ".join(words) or "no provider that is known here"


def mapping_lines(chooser: Chooser) -> tuple[list[str], list[str]]:
    """Lines for model-mappings that keep all of that here, and words about what cannot be kept."""
    rules: dict[str, str] = {}
    lost: dict[str, str] = {}
    for mode in AMP_MODES:
        for model in mode.models:
            if who_answers(chooser, model, mode.verb)[0] in ("local", "mapped"):
                continue
            if target := stand_in(chooser, mode, model):
                rules.setdefault(model, f"- {{from: {model}, to: {target}}}")
            else:
                lost[model] = f"{model}: {who_could(model)}"
    return [*rules.values()], [*lost.values()]


def model_lines(chooser: Chooser) -> list[str]:
    """What each account and each key serves."""
    lines = []
    for account in chooser.pool.accounts.values():
        row = account.row
        names = ", ".join(row.provider.names) if row else "nothing: its provider is not served here"
        but = ", ".join(row.provider.excluded_models) if row else ""
        state = " (disabled)" if account.disabled else ""
        lines.append(f"{account.kind} {account.label}{state}: {names}{but and f', but not {but}'}")
    return lines or ["none: run `ampproxy.py login claude` (or codex)"]


# == Setting up clients ============================================================================
#
# What a client's own settings must say so that it comes here.  There is one writer for all of them:
# it changes a text in a few places, so that comments and order stay, reads the result, and refuses
# it when anything else has changed with it.  What was there before is kept beside it for --undo.
#
# To add a client, write the function that says what its files must hold and name it in CLIENTS.

Keys = tuple[str | int, ...]  # the way to a value in tables and lists
Step = tuple[Keys, Any]  # the value that belongs there; GONE: none
GONE: Any = object()
BACKUP = ".before-ampproxy"  # an empty one: there was no file


def value_at(table: Any, keys: Keys) -> Any:
    for key in keys:
        try:
            table = table[key]
        except (LookupError, TypeError):
            return GONE
    return table


# -- JSON with comments and trailing commas, edited as text --

BLANKS = re.compile(r"(?:\s++|//[^\n]*+|/\*.*?\*/)*+", re.S)
REST_OF_LINE = re.compile(r"[ \t]*(?://[^\n]*|/\*[^\n]*?\*/)?")


@dataclass
class Node:
    """A value, where it stands in the text, and its members: where each begins, and its node."""

    value: Any
    start: int
    end: int
    members: dict[str | int, tuple[int, Node]] = field(default_factory=dict)


class JsonText:
    """Reads such a text.  ValueError, with the line, for what is none."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def whole(self) -> Node:
        try:
            node = self.value()
        except RecursionError:
            raise self.wrong("it is nested too deeply") from None
        self.skip()
        if self.at < len(self.text):
            raise self.wrong("something stands behind its end")
        return node

    def wrong(self, reason: str) -> ValueError:
        return ValueError(f"line {self.text.count(chr(10), 0, self.at) + 1}: {reason}")

    def skip(self) -> None:
        found = BLANKS.match(self.text, self.at)
        self.at = found.end() if found else self.at

    def takes(self, sign: str) -> bool:
        self.skip()
        found = self.text.startswith(sign, self.at)
        self.at += found
        return found

    def value(self) -> Node:
        self.skip()
        start = self.at
        if self.takes("{"):
            members = self.members("}")
            table = {name: node.value for name, (_, node) in members.items()}
            return Node(table, start, self.at, members)
        if self.takes("["):
            members = self.members("]")
            return Node([node.value for _, node in members.values()], start, self.at, members)
        try:
            value, self.at = json.JSONDecoder().raw_decode(self.text, start)
        except ValueError:
            raise self.wrong("no value stands where one is expected") from None
        return Node(value, start, self.at)

    def members(self, closing: str) -> dict[str | int, tuple[int, Node]]:
        found: dict[str | int, tuple[int, Node]] = {}
        goes_on = True
        while not self.takes(closing):
            if not goes_on:
                raise self.wrong(f"a comma or {closing} is missing")
            start, key = self.at, len(found)
            if closing == "}":
                key = self.value().value
                if not isinstance(key, str) or not self.takes(":"):
                    raise self.wrong("a name and a colon are expected")
            found[key] = start, self.value()
            goes_on = self.takes(",")
        return found


def read_json_text(text: str) -> Json:
    value = JsonText(text).whole().value if text.strip() else {}
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def indent_at(text: str, place: int) -> str:
    """The blanks at the beginning of the line."""
    line = text[text.rfind("\n", 0, place) + 1 :]
    return line[: len(line) - len(line.lstrip(" \t"))]


def json_put(text: str, keys: Keys, value: Any) -> str:
    """The text with the value there; a list is made longer at its end only."""
    text = text if text.strip() else "{}\n"
    node = JsonText(text).whole()
    for depth, key in enumerate(keys):
        if not isinstance(node.value, list if isinstance(key, int) else dict):
            raise ValueError(f"{keys[depth - 1]} is of another kind")
        if key not in node.members:
            for inner in reversed(keys[depth + 1 :]):
                value = [value] if isinstance(inner, int) else {inner: value}
            return json_inserted(text, node, key, value)
        _, node = node.members[key]
    own = json_written(value, indent_at(text, node.start))
    return text[: node.start] + own + text[node.end :]


def json_written(value: Any, indent: str) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False).replace("\n", "\n" + indent)


def json_inserted(text: str, node: Node, key: str | int, value: Any) -> str:
    """Behind the last member of a table or list, and behind the comment on its line."""
    outer = indent_at(text, node.start)
    name = "" if isinstance(key, int) else f"{json.dumps(key)}: "
    if not node.members:
        own = f"\n{outer}  {name}{json_written(value, outer + '  ')}"
        inside = text[node.start + 1 : node.end - 1].rstrip()
        return f"{text[: node.start + 1]}{own}{inside}\n{outer}{text[node.end - 1 :]}"
    start, last = max(node.members.values(), key=lambda member: member[1].end)
    in_lines = "\n" in text[node.start : start]
    reader = JsonText(text)
    reader.at = last.end
    ends_in_comma = reader.takes(",")
    behind = reader.at if ends_in_comma else last.end
    indent = indent_at(text, start) if in_lines else outer
    own = f"{name}{json_written(value, indent)}"
    if not in_lines:
        return f"{text[:behind]}{'' if ends_in_comma else ','} {own}{text[behind:]}"
    comment = REST_OF_LINE.match(text, behind)
    line_end = comment.end() if comment else behind
    kept = text[last.end : line_end] if ends_in_comma else f",{text[last.end : line_end]}"
    comma = "," if ends_in_comma else ""
    return f"{text[: last.end]}{kept}\n{indent}{own}{comma}{text[line_end:]}"


def json_drop(text: str, keys: Keys) -> str:
    """The text without that member, its comma and its line."""
    node = JsonText(text).whole()
    for key in keys[:-1]:
        _, node = node.members[key]
    start, gone = node.members[keys[-1]]
    end, reader = gone.end, JsonText(text)
    reader.at = end
    before = [member.end for _, member in node.members.values() if member.end < start]
    is_last = not reader.takes(",")
    if not is_last:
        end = reader.at
    elif before:  # the comma in front of it goes
        reader.at = max(before)
        reader.takes(",")
        text = text[: reader.at - 1] + text[reader.at :]
        start, end = start - 1, end - 1
    line_start = text.rfind("\n", 0, start) + 1
    comment = REST_OF_LINE.match(text, end)
    line_end = comment.end() if comment else end
    if not text[line_start:start].strip() and text[line_end : line_end + 1] == "\n":
        return text[:line_start] + text[line_end + 1 :]
    above = text[:start].rstrip(" ") if is_last else text[:start]
    return above + text[end:].lstrip(" ")


def json_line(keys: Keys, value: Any) -> str:
    for key in reversed(keys[1:]):
        value = [value] if isinstance(key, int) else {key: value}
    return f"{json.dumps(keys[0])}: {json.dumps(value, ensure_ascii=False)}"


# -- TOML, edited as text: texts at the top, and whole tables --

TOML_HEAD = re.compile(r"(?m)^[ \t]*\[")


def read_toml(text: str) -> Json:
    return tomllib.loads(text)


def toml_value(value: Any) -> str:
    if isinstance(value, dict):
        pairs = (f"{json.dumps(name)} = {toml_value(inner)}" for name, inner in value.items())
        return f"{{ {', '.join(pairs)} }}"
    return json.dumps(value, ensure_ascii=False)


def toml_table(keys: Keys, value: Json) -> str:
    lines = [f"[{'.'.join(map(str, keys))}]"]
    lines += [f"{name} = {toml_value(inner)}" for name, inner in value.items()]
    return "\n".join(lines) + "\n"


def toml_place(text: str, keys: Keys, whole_table: bool) -> tuple[int, int]:
    """Where a table or a line stands; (-1, -1) for nowhere."""
    if whole_table:
        name = re.escape(".".join(map(str, keys)))
        head = re.search(rf"(?m)^[ \t]*\[{name}\][ \t]*(#.*)?\n?", text)
        if not head:
            return -1, -1
        following = TOML_HEAD.search(text, head.end())
        return head.start(), following.start() if following else len(text)
    first = TOML_HEAD.search(text)
    top = text[: first.start()] if first else text
    value = "\"[^\"\\n]*\"|'[^'\\n]*'|[\\w.+-]+"
    line = re.search(rf"(?m)^[ \t]*{keys[0]}[ \t]*=[ \t]*({value})", top)
    return line.span(1) if line else (-1, -1)


def toml_put(text: str, keys: Keys, value: Any) -> str:
    whole_table = isinstance(value, dict)
    start, end = toml_place(text, keys, whole_table)
    if start >= 0:
        if not whole_table:
            return text[:start] + toml_value(value) + text[end:]
        return text[:start] + toml_table(keys, value) + "\n" * (end < len(text)) + text[end:]
    if whole_table:
        between = "\n" * (bool(text) and not text.endswith("\n")) + "\n" * bool(text)
        return f"{text}{between}{toml_table(keys, value)}"
    return f"{keys[0]} = {toml_value(value)}\n{text}"  # in front of all tables


def toml_drop(text: str, keys: Keys) -> str:
    whole_table = isinstance(value_at(read_toml(text), keys), dict)
    start, end = toml_place(text, keys, whole_table)
    if start < 0:
        raise ValueError(f"{keys[-1]} was not found")
    if whole_table:
        above, below = text[:start].rstrip("\n"), text[end:]
        return above + "\n" * bool(above) + "\n" * bool(above and below) + below
    return text[: text.rfind("\n", 0, start) + 1] + text[end:].partition("\n")[2]


def toml_line(keys: Keys, value: Any) -> str:
    if isinstance(value, dict):
        return toml_table(keys, value).rstrip()
    return f"{keys[0]} = {toml_value(value)}"


@dataclass(frozen=True)
class Format:
    name: str
    read: Callable[[str], Json]
    put: Callable[[str, Keys, Any], str]
    drop: Callable[[str, Keys], str]
    line: Callable[[Keys, Any], str]  # what a person would add


JSON_FORMAT = Format("JSON", read_json_text, json_put, json_drop, json_line)
TOML_FORMAT = Format("TOML", read_toml, toml_put, toml_drop, toml_line)


# -- The one writer --


@dataclass(frozen=True)
class Edit:
    """What a file of a client must say, by what it says; and which values there are ours."""

    path: Path
    form: Format
    steps: Callable[[Json], list[Step]]
    ours: Callable[[Json], list[Keys]]

    @property
    def backup(self) -> Path:
        return self.path.with_name(self.path.name + BACKUP)

    def text(self) -> str:
        try:
            return read_file(self.path).decode() if self.path.exists() else ""
        except (OSError, ValueError) as error:
            raise Failure(f"{self.path} cannot be read: {explain(error)}") from error

    def wanted(self, text: str) -> list[Step]:
        """The steps that change something; Failure, with what to do by hand, for no such file."""
        try:
            found = self.form.read(text)
        except ValueError as error:
            raise Failure(
                f"{self.path} is no {self.form.name} ({explain(error)}) and stays as it is;"
                f" mend it, or add by hand: {self.by_hand(self.steps({}))}"
            ) from error
        steps = self.steps(found)
        if any(value is GONE for _, value in steps):
            return steps  # places move
        return [(keys, value) for keys, value in steps if value_at(found, keys) != value]

    def by_hand(self, steps: list[Step]) -> str:
        lines = []
        for keys, value in steps:
            if value is not GONE:
                lines.append(self.form.line(keys, shown_value(keys[-1], value)).replace("\n", "; "))
        return ", ".join(lines) or "nothing; take out what names ampproxy"

    def changed(self, text: str, steps: list[Step]) -> str:
        """The text after the steps; Failure when more than these would change."""
        expected = self.form.read(text)
        new = text
        try:
            for keys, value in steps:
                if value is GONE:
                    new = self.form.drop(new, keys)
                else:
                    new = self.form.put(new, keys, value)
                expected = with_step(expected, keys, value)
            if pruned(self.form.read(new)) != pruned(expected):
                raise ValueError("its layout is unusual")
        except (ValueError, LookupError, TypeError) as error:
            raise Failure(
                f"{self.path} cannot be edited ({explain(error)}) and stays as it is;"
                f" add by hand: {self.by_hand(steps)}"
            ) from error
        return new

    def write(self, text: str, new: str) -> None:
        """The new text in place, what was there before beside it."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self.backup.exists():
                replace_file(self.backup, text.encode())
            self.replace(new)
        except OSError as error:
            raise Failure(f"{self.path} cannot be written: {explain(error)}") from error

    def replace(self, new: str) -> None:
        mode = stat.S_IMODE(self.path.stat().st_mode) if self.path.exists() else 0o600
        replace_file(self.path, new.encode(), mode)

    def undo(self) -> bool:
        """Whether there was anything to undo; what others changed since stays."""
        if not self.backup.exists():
            return False
        try:
            text, before = self.text(), read_file(self.backup).decode()
            new = before
            if text != self.changed(before, self.wanted(before)):
                new = self.without_ours(text, before)
            left = [
                value for value in self.form.read(new).values() if pruned(value) not in ({}, [])
            ]
            if before.strip() or left:
                self.replace(new)
            else:
                self.path.unlink(missing_ok=True)
            self.backup.unlink()
        except (OSError, ValueError) as error:
            raise Failure(f"{self.path} cannot be written: {explain(error)}") from error
        return True

    def without_ours(self, text: str, before: str) -> str:
        """With the earlier values in the places of ours."""
        self.wanted(text)  # Failure for what cannot be read
        found, earlier = self.form.read(text), self.form.read(before)
        steps = []
        for keys in reversed(self.ours(found)):
            old = GONE if isinstance(keys[-1], int) else value_at(earlier, keys)
            if value_at(found, keys) not in (old, GONE):
                steps.append((keys, old))
        return self.changed(text, steps)


def pruned(table: Any) -> Any:
    """Without tables that are empty: TOML does not show them."""
    if not isinstance(table, dict):
        return table
    inner = {name: pruned(value) for name, value in table.items()}
    return {name: value for name, value in inner.items() if value != {}}


def with_step(table: Any, keys: Keys, value: Any) -> Any:
    """A copy of plain tables and lists with one value changed."""
    key, *deeper = keys
    if isinstance(key, int):
        items = as_list(table)
        return items[:key] + ([] if value is GONE else [value]) + items[key + 1 :]
    kept = dict(table) if isinstance(table, dict) else {}
    if deeper:
        empty: Any = [] if isinstance(deeper[0], int) else {}
        kept[key] = with_step(kept.get(key, empty), (*deeper,), value)
    elif value is GONE:
        kept.pop(key, None)
    else:
        kept[key] = value
    return kept


def shown_value(name: Any, value: Any) -> Any:
    """A value as a person may see it."""
    if isinstance(value, dict):
        return {key: shown_value(key, inner) for key, inner in value.items()}
    secret = re.search("(?i)key|token", str(name)) and value != "any"
    return mask(str(value)) if secret else value


def in_words(keys: Keys, old: Any, new: Any) -> str:
    """A change in one line."""

    def words(value: Any) -> str:
        if value is GONE:
            return "nothing"
        if isinstance(value, dict):
            return str(value.get("displayName") or value.get("base_url") or "a table")
        return json.dumps(shown_value(keys[-1], value), ensure_ascii=False)

    return f"  {'.'.join(map(str, keys))}: {words(old)} -> {words(new)}"


# -- The clients --


@dataclass(frozen=True)
class Destination:
    """Where clients are to go, and what they can have there."""

    url: str
    key: str  # that they must show; "any" where none is needed
    amp_key: str  # the person's own at ampcode.com
    chooser: Chooser

    def models(self, verb: str) -> list[str]:
        """Those that need no translation first."""
        rows = {row.name: row.provider for row in self.chooser.live.rows}
        served = self.chooser.listed(verb)
        return sorted(served, key=lambda name: verb not in rows[served[name]].paths)


def fixed(path: Path, form: Format, values: dict[Keys, Any]) -> Edit:
    """An edit whose values do not depend on what the file says."""
    return Edit(path, form, lambda found: [*values.items()], lambda found: [*values])


def amp_settings() -> Path:
    if given := os.environ.get("AMP_SETTINGS_FILE"):
        return Path(given).expanduser()
    path = folder_of("XDG_CONFIG_HOME", "~/.config") / "amp/settings.json"
    other = path.with_suffix(".jsonc")
    return other if other.is_file() and not path.exists() else path


def amp_line(url: str, by_hand: bool = False) -> str:
    """For the start: what Amp's settings must say, and whether they do.

    `by_hand`: the address is not the one that `setup` would find by itself.
    """
    found = Json()
    with suppress(OSError, ValueError):
        found = read_json_text(read_file(amp_settings()).decode())
    there = text_of(found.get("amp.url")).rstrip("/") == url
    command = f"ampproxy.py setup amp{f' --url {url}' if by_hand else ''}"
    hint = "is in its settings" if there else f"in its settings; `{command}` does it"
    return f'Amp       "amp.url": "{url}"  {hint}'


def amp_edits(target: Destination) -> list[Edit]:
    edits = [fixed(amp_settings(), JSON_FORMAT, {("amp.url",): target.url})]
    key = target.amp_key if target.key == "any" else target.key
    if key:  # Amp keeps one key an address, as it is spelled
        steps: list[Step] = [((f"apiKey@{target.url}{end}",), key) for end in ("", "/")]

        def ours(found: Json) -> list[Keys]:
            return [(name,) for name, value in found.items() if value == key]  # of any --url

        edits.append(Edit(secrets_file(), JSON_FORMAT, lambda found: steps, ours))
    return edits


DROID_WORDS = (  # what droid calls a dialect, a verb of it, and what its base URL ends in
    ("anthropic", "messages", ""),
    ("openai", "responses", "/v1"),
    ("generic-chat-completion-api", "completions", "/v1"),
)
DROID_MARK = " (ampproxy)"  # at the end of the names that are ours


def droid_models(target: Destination) -> list[Json]:
    """An entry a model, in the dialect of who serves it where droid knows that one."""
    rows = {row.name: row for row in target.chooser.live.rows}
    served = {verb: target.models(verb) for _, verb, _ in DROID_WORDS}
    models = []
    for name, owner in target.chooser.listed().items():
        own = rows[owner].provider.paths
        for word, verb, end in sorted(DROID_WORDS, key=lambda one: one[1] not in own):
            if name in served[verb]:
                about = {"model": name, "displayName": name + DROID_MARK, "provider": word}
                place = {"baseUrl": target.url + end, "apiKey": target.key}
                models.append({**about, **place, "maxOutputTokens": 32000})
                break
    return models


def droid_edits(target: Destination) -> list[Edit]:
    models = droid_models(target)

    def ours(found: Json) -> list[Keys]:
        models = map(as_dict, as_list(found.get("customModels")))
        names = [str(model.get("displayName")) for model in models]
        return [("customModels", i) for i, name in enumerate(names) if name.endswith(DROID_MARK)]

    def steps(found: Json) -> list[Step]:
        old = ours(found)
        pairs = zip(models, (as_dict(value_at(found, keys)) for keys in old), strict=False)
        if len(old) == len(models) and all(new.items() <= has.items() for new, has in pairs):
            return []  # droid adds fields of its own
        start = len(as_list(found.get("customModels"))) - len(old)
        new = [(("customModels", start + i), model) for i, model in enumerate(models)]
        return [(keys, GONE) for keys in reversed(old)] + new

    return [Edit(Path("~/.factory/settings.json").expanduser(), JSON_FORMAT, steps, ours)]


def claude_code_edits(target: Destination) -> list[Edit]:
    environment = {
        "ANTHROPIC_BASE_URL": target.url,
        "ANTHROPIC_AUTH_TOKEN": target.key,
        "ENABLE_TOOL_SEARCH": "true",  # it turns that off for hosts it does not know (clients.md)
    }
    models = target.models("messages")
    if models and not any(name.startswith("claude-") for name in models):
        names = ("ANTHROPIC_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL")
        environment |= dict.fromkeys(names, models[0])
    path = folder_of("CLAUDE_CONFIG_DIR", "~/.claude") / "settings.json"
    return [fixed(path, JSON_FORMAT, {("env", name): value for name, value in environment.items()})]


def codex_edits(target: Destination) -> list[Edit]:
    provider: Json = {"name": "ampproxy", "base_url": f"{target.url}/v1", "wire_api": "responses"}
    if target.key != "any":
        provider["http_headers"] = {"X-Api-Key": target.key}
    models = target.models("responses")
    place: Keys = ("model_providers", "ampproxy")

    def steps(found: Json) -> list[Step]:
        wanted: list[Step] = [(("model_provider",), "ampproxy"), (place, provider)]
        model, _ = target.chooser.split(str(found.get("model")))
        if models and not target.chooser.ways(model, "", "responses")[0]:
            wanted.insert(0, (("model",), models[0]))
        return wanted

    def ours(found: Json) -> list[Keys]:
        model: list[Keys] = [("model",)] if found.get("model") in models else []
        return [*model, ("model_provider",), place]

    return [Edit(folder_of("CODEX_HOME", "~/.codex") / "config.toml", TOML_FORMAT, steps, ours)]


@dataclass(frozen=True)
class Client:
    title: str
    program: str  # by whose name it is found on the PATH
    edits: Callable[[Destination], list[Edit]]


CLIENTS = {
    "amp": Client("Amp", "amp", amp_edits),
    "droid": Client("Factory's droid", "droid", droid_edits),
    "claude-code": Client("Claude Code", "claude", claude_code_edits),
    "codex": Client("Codex CLI", "codex", codex_edits),
}


def is_installed(client: Client, edits: list[Edit]) -> bool:
    return bool(shutil.which(client.program)) or edits[0].path.parent.is_dir()


def changes_of(client: Client, edits: list[Edit]) -> tuple[list[str], list[tuple[Edit, str, str]]]:
    """What setting up would change, in words and as texts; Failure before anything is written."""
    lines, writes = [], []
    for edit in edits:
        text = edit.text()
        steps = edit.wanted(text)
        if steps:
            found = edit.form.read(text)
            lines.append(f"{client.title}: {edit.path}")
            for keys, value in steps:
                old = value_at(found, keys)
                if value is not GONE or old is not GONE:
                    lines.append(in_words(keys, old, value))
            writes.append((edit, text, edit.changed(text, steps)))
    return lines, writes


# == The login menu ================================================================================
#
# All logins on the whole terminal, with the arrow keys.  It shows what the running proxy says, and
# what the token files say where none runs.  A login is a process of its own: it talks to the
# terminal itself, and may be stopped without ending the list.

NAMES = {  # for `login`
    word: kind for kind, row in LOGINS.items() if row.authorize_url for word in (kind, *row.also)
}

MENU_KEYS = "Up and Down choose   Enter signs in   d disconnects   q leaves"
MENU_PAUSE = 2  # seconds between looks at the proxy and at the files


@contextmanager
def handling(stop: Callable[[], object], *names: str) -> Iterator[None]:
    """What signals of these names do, until the block ends."""
    loop = asyncio.get_running_loop()
    signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
    for one in signals:
        loop.add_signal_handler(one, stop)
    try:
        yield
    finally:
        for one in signals:
            loop.remove_signal_handler(one)


@contextmanager
def curses_screen() -> Iterator[tuple[Any, Any]]:
    """curses and its screen; the terminal is as it was before after any end of the block."""
    try:
        curses: Any = importlib.import_module("curses")
        screen = curses.initscr()
    except Exception as error:  # Windows has no curses, and TERM may name no terminal
        words = f"this terminal cannot show the list ({explain(error)})"
        raise Failure(f"{words}: {say_which_login()}") from error
    log.disabled = True  # its lines would stand across the list
    try:
        curses.noecho()
        curses.cbreak()
        screen.keypad(True)
        screen.nodelay(True)
        with suppress(curses.error):
            curses.curs_set(0)
        yield curses, screen
    finally:
        log.disabled = False
        with suppress(curses.error):
            curses.curs_set(1)
        screen.keypad(False)
        curses.nocbreak()
        curses.echo()
        curses.endwin()


def say_which_login() -> str:
    return f"ampproxy.py login {'|'.join(dict.fromkeys(NAMES.values()))}"


class Menu:
    """What is on the list, what is chosen, and what a key does."""

    def __init__(self, live: Live) -> None:
        self.live, self.pool = live, Pool(live)
        self.report = Json()  # of the running proxy
        self.running = False
        self.chosen = self.top = 0
        self.message = ""
        self.doomed: Login | None = None  # to be disconnected after a yes
        self.items: list[tuple[str, Login | None]] = []

    def look(self) -> None:
        """Take up the token files."""
        self.pool.scan()
        logins = [a for a in self.pool.accounts.values() if isinstance(a, Login)]
        kinds = [*dict.fromkeys([*NAMES.values(), *(login.kind for login in logins)])]
        self.items = []
        for kind in kinds:
            self.items += [(kind, login) for login in logins if login.kind == kind]
            self.items += [(kind, None)] if kind in NAMES.values() else []
        self.chosen = min(self.chosen, len(self.items) - 1)

    async def ask(self) -> None:
        """What the running proxy says."""
        try:
            self.report, self.running = await ask_proxy(self.live), True
        except Failure:
            self.report, self.running = {}, False

    def report_of(self, login: Login) -> Json:
        for account in as_dicts(self.report.get("accounts")):
            if (account["provider"], account["account"]) == (login.kind, login.label):
                return account
        return {"provider": login.kind, "state": login.state(0), "quota": [], "reason": ""}

    def lines(self, signs: str) -> list[tuple[str, int]]:
        """The list: its lines, and the item that each belongs to; -1: a heading."""
        lines, last = [], ""
        for index, (kind, login) in enumerate(self.items):
            if kind != last:
                lines += [("", -1)] * bool(last) + [(kind, -1)]
                last = kind
            mark = ">" if index == self.chosen else " "
            if login:
                lines += [(line, index) for line in self.login_lines(login, mark, signs)]
            else:
                which = "an" if lines[-1] == (kind, -1) else "another"
                lines.append((f" {mark} sign in with {which} account", index))
        return lines

    def login_lines(self, login: Login, mark: str, signs: str) -> list[str]:
        report, left = self.report_of(login), login.expires - time.time()
        token = f"token {span(left)}" if left > 0 else "refresh due"
        if login.expires == NEVER:
            token = "no expiry"
        name = login.label + (f" ({login.plan})" if login.plan else "")
        lines = [f" {mark} {name:<30.30} {state_words(report):<28.28} {token}"]
        lines += [f"     {report['reason']}"] if report["reason"] else []
        sheet = Sheet(plain, 80, signs)
        for quota in report["quota"]:
            used, resets = quota["used_percent"], quota["resets_in_seconds"]
            ends = f"resets in {span(resets)}" if resets else ""
            lines.append(f"     {quota['window']:<10.10} {sheet.bar(used)}{used:>4.0f} %  {ends}")
        return lines

    def draw(self, curses: Any, screen: Any, signs: str) -> None:
        rows, _ = screen.getmaxyx()
        lines = self.lines(signs)
        own = [place for place, (_, index) in enumerate(lines) if index == self.chosen]
        room = max(1, rows - 4)  # beside the title and the last two lines
        if own:
            self.top = min(self.top, max(0, own[0] - 1))
            self.top = max(self.top, own[-1] - room + 1)
        where = "running" if self.running else "not running"
        screen.erase()
        put_line(screen, 0, f" ampproxy: logins (proxy {where})", curses.A_BOLD)
        for row, (text, index) in enumerate(lines[self.top : self.top + room], 2):
            heading = curses.A_BOLD if index < 0 else 0
            put_line(screen, row, text, curses.A_REVERSE if index == self.chosen else heading)
        put_line(screen, rows - 2, f" {self.message}", curses.A_BOLD)
        put_line(screen, rows - 1, f" {MENU_KEYS}", 0)
        screen.refresh()

    def take(self, curses: Any, key: int) -> str:
        """What a key means: a provider to sign in to, "quit", or "" for nothing more."""
        if self.doomed:
            self.message = "" if key not in (ord("y"), ord("Y")) else disconnect(self.doomed)
            self.doomed = None
            self.look()
            return ""
        self.message = ""
        kind, login = self.items[self.chosen]
        if key in (curses.KEY_UP, ord("k")):
            self.chosen = max(0, self.chosen - 1)
        elif key in (curses.KEY_DOWN, ord("j")):
            self.chosen = min(len(self.items) - 1, self.chosen + 1)
        elif key in (ord("\n"), ord("\r"), curses.KEY_ENTER):
            if kind in NAMES.values():
                return kind
            self.message = f"ampproxy.py has no login for {kind}"
        elif key == ord("d") and login:
            self.doomed = login
            self.message = f"Disconnect {login.label} (deletes {login.path.name})? y or n"
        elif key == ord("d"):
            self.message = "Choose an account to disconnect"
        return "quit" if key in (ord("q"), 3, 4) else ""


def put_line(screen: Any, row: int, text: str, style: int) -> None:
    """As much of a line as there is room for; the last column of a terminal may wrap."""
    rows, columns = screen.getmaxyx()
    if 0 <= row < rows and columns > 1:
        screen.addnstr(row, 0, printable(text), columns - 1, style)


def disconnect(login: Login) -> str:
    """Delete a login's file, and say so."""
    try:
        login.path.unlink(missing_ok=True)
    except OSError as error:
        return f"{login.path} cannot be deleted: {explain(error)}"
    return f"{login.label} is disconnected"


async def choose_login(menu: Menu) -> str:
    """Show the list until a provider to sign in to is chosen; "" when the person leaves."""
    stop, moved = asyncio.Event(), asyncio.Event()
    stdin = sys.stdin.fileno()
    loop = asyncio.get_running_loop()

    def leave() -> None:
        stop.set()
        moved.set()

    async def keep_asking() -> None:
        while True:
            await menu.ask()
            moved.set()
            await asyncio.sleep(MENU_PAUSE)

    with (
        curses_screen() as (curses, screen),
        handling(leave, "SIGINT", "SIGTERM", "SIGHUP"),
        handling(moved.set, "SIGWINCH"),
    ):
        loop.add_reader(stdin, moved.set)
        asking = asyncio.create_task(keep_asking())
        try:
            while not stop.is_set():
                menu.look()
                size = shutil.get_terminal_size()
                if screen.getmaxyx() != (size.lines, size.columns):
                    curses.resizeterm(size.lines, size.columns)
                menu.draw(curses, screen, sheet_for(sys.stdout).signs)
                await moved.wait()
                moved.clear()
                while (key := screen.getch()) != -1:
                    if chosen := menu.take(curses, key):
                        return "" if chosen == "quit" else chosen
        finally:
            loop.remove_reader(stdin)
            asking.cancel()
    return ""


async def log_in_there(live: Live, kind: str, options: list[str]) -> tuple[str, bool]:
    """Run a login on this terminal: how it ended, in words, and whether the list goes on."""
    config = ["--config", str(live.path)] if live.path else []
    command = [sys.executable, __file__, "login", kind, *options, *config]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    ended = asyncio.Event()

    def end() -> None:
        ended.set()
        with suppress(ProcessLookupError):
            process.terminate()

    # Ctrl-C is for the login; the terminal sends it to both.
    with handling(bool, "SIGINT"), handling(end, "SIGTERM", "SIGHUP"):
        _, errors = await process.communicate()
    words = errors.decode(errors="replace").strip().splitlines()
    if process.returncode == 0:
        return f"Signed in to {kind}", not ended.is_set()
    reason = words[-1].removeprefix("ampproxy: ") if words else "the login was stopped"
    return reason, not ended.is_set()


async def show_menu(live: Live, options: list[str]) -> None:
    menu, goes_on = Menu(live), True
    while goes_on and (kind := await choose_login(menu)):
        menu.message, goes_on = await log_in_there(live, kind, options)


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
IMPORTABLE = {word: kind for kind, row in LOGINS.items() for word in (kind, *row.also)}


def stop_signal() -> asyncio.Future[None]:
    """Done when the person, or the system, wants the program to end."""
    stop = asyncio.get_running_loop().create_future()
    for name in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError):  # Windows: there Ctrl-C ends the program at once
            stop.get_loop().add_signal_handler(name, stop.cancel)
    return stop


GARBAGE_AFTER = (5000, 5, 4)  # new objects, looks at them, and at older ones; Python's: 700, 10, 10


async def serve(live: Live, args: Json) -> None:
    """Run the proxy; also without a command."""
    server = Server(live, Net(live))
    stop = stop_signal()
    async with server.serving() as port:
        address = live.address(port)
        log.info("ampproxy %s: %s", __version__, address)
        for line in standing(live, server.pool):
            log.info("%s", line)
        log.info("%s", amp_line(address, bool(args.keys() & {"config", "host", "port"})))
        server.ledger.warn_of_no_account()
        gc.freeze()  # what is there by now stays: nobody need look for garbage in it
        gc.set_threshold(*GARBAGE_AFTER)
        while not (await asyncio.wait([stop], timeout=1))[0]:
            server.tick()
        log.info("stopping: running answers get 10 seconds")


async def login(live: Live, args: Json) -> None:
    """Sign in to a provider, again for another account; without one: a list of all logins."""
    if not args["provider"]:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise Misuse(f"the list of logins needs a terminal; without one: {say_which_login()}")
        await show_menu(live, ["--no-browser"] if "no_browser" in args else [])
        return
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
    if not there:
        raise Failure(f"no such account: there is no {kind} login in {live.auth_dir}")
    if len(wanted) != 1:
        problem = "several accounts, say which one of" if wanted else "no such account among"
        names = ", ".join(a.label for a in there)
        raise Failure(f"{problem}: {names} ({live.auth_dir})")
    wanted[0].path.unlink()
    say(f"Logged out as {wanted[0].label}: {wanted[0].path} is deleted")


async def import_(live: Live, args: Json) -> None:
    """Copy the logins of other programs on this machine."""
    kind = IMPORTABLE.get(args["provider"], "")
    copies = show_sources(live, kind)
    if not copies:
        say("There is nothing to copy.")
        return
    say(SHARING)
    if "yes" not in args and not (sys.stdin.isatty() and await confirmed("Copy? [y/N] ")):
        raise Failure("nothing was copied; `ampproxy.py import --yes` does it")
    for path, token in copies:
        try:
            save_token(path, token)
        except OSError as error:
            words = f"{path} cannot be written: {explain(error)}"
            raise Failure(f"{words}; auth-dir can name another folder") from error
        say(f"Copied to {path}")
    say("Next: ampproxy.py")


SHARING = """
Both programs then use one login.  A refresh token of Claude or ChatGPT works once: who uses it
first logs the other out.  ampproxy never writes to the other program's files, takes a newer token
from there whenever it needs one, and only where there is none uses the refresh token itself; then
the other program may ask for a new login.  A login of its own (ampproxy.py login) has none of this.
"""


def show_sources(live: Live, kind: str) -> list[tuple[Path, Json]]:
    """Say which logins were found, and return the tokens to save, and where."""
    here = {(a.kind, a.label): a for a in Pool(live).scan() if isinstance(a, Login)}
    copies: dict[tuple[str, str], tuple[Path, Json]] = {}
    looked, found_any = [], False
    for source in SOURCES:
        place = source.folder()
        looked.append(f"{place / source.pattern}".replace("[!.]", ""))
        own = place.resolve() == live.auth_dir.resolve()
        for path in [] if own else sorted(place.glob(source.pattern)):
            words, token = judge_source(source, path)
            if token and kind not in ("", token["type"]):
                continue
            found_any = True
            if token:
                who = (str(token["type"]), str(token["email"]))
                judged, copy = judge_copy(live, path, token, here.get(who))
                words += f"; {judged}" if who not in copies else "; found above already"
                if copy:
                    copies.setdefault(who, copy)
            say(f"{source.name}: {words}  ({path})")
    if not found_any:
        raise Failure(f"no login of another program was found; looked at {', '.join(looked)}")
    return [*copies.values()]


def judge_source(source: Program, path: Path) -> tuple[str, Json]:
    """What a file of another program holds, in words, and as a token of ours."""
    try:
        token = read_source(source, path)
    except (OSError, ValueError) as error:
        return f"cannot be read: {explain(error)}", {}
    if not token:
        return "no login is in it", {}
    token["email"] = str(token.get("email") or f"from-{path.parent.name.strip('.')}")
    token["source"] = {"program": source.name, "file": str(path)}
    left = ends_at(token) - time.time()
    ends = f"expired {span(-left)} ago" if left < 0 else f"good for {span(left)}"
    ends = ends if ends_at(token) else "expiry unknown"
    return f"{token['type']} {token['email']}, {ends}", token


def judge_copy(
    live: Live, path: Path, token: Json, login: Login | None
) -> tuple[str, tuple[Path, Json] | None]:
    """Whether it may be copied, in words, and what is to be saved where."""
    if login is None:
        name = token_name(token["type"], token["email"])
        if path.name.startswith(f"{token['type']}-"):
            name = path.name  # CLIProxyAPI's: it may name a plan or a project, too
        return "can be copied", (live.auth_dir / name, token)
    if login.token.get("source") != token["source"]:
        return "signed in here already", None
    if newer := newer_at_source(login.token):
        return "newer than the copy here", (login.path, login.token | newer)
    return "copied already", None


async def confirmed(question: str) -> bool:
    """Ask the person at the terminal; Ctrl-C ends the program, as ever."""
    loop = asyncio.get_running_loop()
    answer = loop.create_future()

    def read() -> None:
        if not answer.done():
            answer.set_result(sys.stdin.readline())

    print(question, end="", flush=True)
    try:
        loop.add_reader(sys.stdin.fileno(), read)
    except NotImplementedError:  # Windows
        read()
    try:
        return str(await answer).strip().lower() in ("y", "yes")
    finally:
        with suppress(NotImplementedError):
            loop.remove_reader(sys.stdin.fileno())


async def setup(live: Live, args: Json) -> None:
    """Point a client's own settings to the proxy; without a client: say what that would change."""
    pool, config = Pool(live), live.config
    pool.scan()
    upstream = str(config["ampcode"]["upstream-url"]).rstrip("/")
    amp_key = stored_key(stored_keys(), upstream) or str(config["ampcode"]["upstream-api-key"])
    url = str(args.get("url") or live.address()).rstrip("/")
    if not is_address(url):
        raise Misuse(f"--url {url!r} is no address that begins with http:// or https://")
    target = Destination(url, [*config["api-keys"], "any"][0], amp_key, Chooser(live, pool))
    if args["client"]:
        set_up(target, args["client"], "undo" in args)
    elif "undo" in args:
        raise Misuse(f"say which client: ampproxy.py setup {'|'.join(CLIENTS)} --undo")
    else:
        survey(target)


def set_up(target: Destination, name: str, undo: bool) -> None:
    client = CLIENTS[name]
    edits = client.edits(target)
    if undo:
        undone = [str(edit.path) for edit in edits if edit.undo()]
        for path in undone:
            say(f"{client.title}: {path} is as it was before")
        if not undone:
            say(f"{client.title}: there is nothing to undo")
        return
    lines, writes = changes_of(client, edits)
    for edit, text, new in writes:
        edit.write(text, new)
    say("\n".join(lines) if lines else f"{as_it_is(client, edits)}; nothing was changed")
    if writes:
        say(f"Done. `ampproxy.py setup {name} --undo` brings back what was there before.")
    if name == "amp" and len(edits) == 1:
        say("No key of Amp was found: it will ask for a login, which goes to ampcode.com as ever.")
    if not target.models(""):
        say(f"No account serves anything yet. First: {FIRST_LOGIN}")
    if not has_steps(edits):
        say(f"Next: ampproxy.py setup {name}, once more.")
        return
    say(f"Next: ampproxy.py, and then {client.program} in another terminal.")


def has_steps(edits: list[Edit]) -> bool:
    """Whether there is anything to write; droid gets an entry for each model that is served."""
    return any(edit.steps({}) for edit in edits)


def as_it_is(client: Client, edits: list[Edit]) -> str:
    return f"{client.title} {'is set up already' if has_steps(edits) else 'needs models first'}"


def survey(target: Destination) -> None:
    """Which clients there are, and what setting them up would change."""
    ready: list[str] = []
    for name, client in CLIENTS.items():
        edits = client.edits(target)
        if not is_installed(client, edits):
            say(f"{client.title}: not found on this machine")
            continue
        try:
            lines, _ = changes_of(client, edits)
        except Failure as error:
            say(f"{client.title}: {error}")
            continue
        say("\n".join(lines) if lines else as_it_is(client, edits))
        ready += [name] if lines else []
    if ready:
        say(f"Nothing was changed. Next: ampproxy.py setup {'|'.join(ready)}")


async def accounts(live: Live, args: Json) -> None:
    """List the accounts."""
    line = "{:<20}  {:<30}  {:<6}  {:<12}  {:<11}  {}"
    say(line.format("PROVIDER", "ACCOUNT", "PLAN", "EXPIRES", "STATE", "FILE"))
    found = Pool(live).scan()
    for account in found:
        left = (account.expires - time.time()) / HOUR
        ends = "refresh due" if left < 0 else f"in {left:.1f} h" if left < 1e9 else "never"
        place = account.path if isinstance(account, Login) else live.path
        state = account.state(0)
        say(line.format(account.kind, account.label, account.plan or "-", ends, state, place))
    if not found:
        say(f"No accounts in {live.auth_dir} yet. Next: {FIRST_LOGIN}")


async def status(live: Live, args: Json) -> None:
    """Ask the running proxy how it stands; end an account's rest by hand."""
    if "wake" in args:
        answer = await ask_proxy(live, "/status/wake", {"account": args["wake"]})
        say(f"{', '.join(answer['woken'])}: may be asked again")
    elif "watch" in args:
        await watch_status(live, "json" in args)
    else:
        show_status(await ask_proxy(live), "json" in args)


def show_status(report: Json, as_json: bool) -> None:
    if as_json:
        say(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print("\n".join(status_lines(report, sheet_for(sys.stdout))), flush=True)


async def watch_status(live: Live, as_json: bool) -> None:
    """The same again and again, in place on a terminal, until it is told to stop."""
    stop, report = stop_signal(), await ask_proxy(live)
    in_place = sys.stdout.isatty() and not as_json
    trouble = ""
    with full_screen() if in_place else nullcontext():
        while not stop.done():
            if in_place:
                draw_status(report, trouble)
            elif not trouble:
                show_status(report, as_json)
            await asyncio.wait([stop], timeout=2)
            try:
                report, trouble = await ask_proxy(live), ""
            except Failure as error:
                trouble = explain(error)


@contextmanager
def full_screen() -> Iterator[None]:
    """The terminal's other screen, without a cursor; what was on the first comes back."""
    print("\x1b[?1049h\x1b[?25l", end="", flush=True)
    try:
        yield
    finally:
        print("\x1b[?25h\x1b[?1049l", end="", flush=True)


def draw_status(report: Json, trouble: str) -> None:
    sheet, rows = sheet_for(sys.stdout), shutil.get_terminal_size().lines
    lines = [sheet.line((trouble, "red"))] if trouble else []
    room = rows - len(lines) - len(status_lines(report, sheet, 0)) - 2  # for the last requests
    lines += status_lines(report, sheet, room)
    shown = "\x1b[K\r\n".join(lines[:rows])
    print(f"\x1b[H{shown}\x1b[K\x1b[J", end="", flush=True)


async def route(live: Live, args: Json) -> None:
    """Say who would serve a model, and why; nothing is sent."""
    pool = Pool(live)
    pool.scan()
    verb = VERBS.get(args["dialect"], "")
    chooser = Chooser(live, pool)
    ways, notes = chooser.ways(*chooser.split(args["model"]), verb)
    chosen = []
    for way in ways:
        name = f"{way.rows[0].provider.served(way.model)} {way.effort}".rstrip()
        chosen.append(f"{way.route}: {way.rows[0].name} as {name}")
    nobody = f"nobody here; fallback: {live.config['ampcode']['fallback']}"
    say("\n".join([*notes, f"So {', then '.join(chosen) or nobody}"]))


async def check(live: Live, args: Json) -> None:
    """Print the configuration in effect, what each account serves, and who answers Amp."""
    if not live.config["proxy-url"]:
        environment_proxies()
    pool = Pool(live)
    pool.scan()  # says which token files are none
    say(f"# In effect, from {live.path or 'the defaults (no config.yaml was found)'}:")
    say(yaml.safe_dump(masked(live.config), sort_keys=False, allow_unicode=True).rstrip())
    chooser = Chooser(live, pool)
    comments = ["", "Accounts and keys, and the models that each serves (* is anything):", ""]
    comments += [*model_lines(chooser), "", "Amp, as far as its clients call models (to May 2026):"]
    comments += ["", *mode_lines(chooser), "", NEWER_AMP]
    rules, lost = mapping_lines(chooser)
    if lost:
        comments += ["", "No account here can answer these; what could:", "", *lost]
    if rules:
        place = live.path or "config.yaml"
        comments += ["", f"To answer the others here, too, put this into {place}:", ""]
    say("\n".join(f"# {line}".rstrip() for line in comments))
    if rules:
        say("\n".join(["ampcode:", "  model-mappings:", *(f"    {rule}" for rule in rules)]))


NEWER_AMP = "Clients of July 2026 and newer run all models on Amp's servers: Amp bills those."
SECRET_KEYS = re.compile(
    r"api-keys?$|secret$|proxy-url$|headers (?!anthropic-|user-agent$|originator$)"
)


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
    command.__name__.rstrip("_"): command
    for command in (serve, login, logout, accounts, status, route, check, setup, import_)
}
PROVIDER_WORD = {"metavar": "PROVIDER", "help": "claude, codex, gemini or antigravity"}
ARGUMENTS: dict[str, Json] = {  # "": of every command; those of `serve` need not name it
    "": {"--config": {"metavar": "FILE", "help": "the configuration file"}},
    "serve": {
        "--host": {"metavar": "H", "help": "listen on this address"},
        "--port": {"metavar": "N", "type": int, "help": "listen on this port"},
        "--debug": {"action": "store_true", "help": "say more in the log"},
    },
    "login": {
        "provider": {"nargs": "?", **PROVIDER_WORD, "choices": NAMES, "default": None},
        "--no-browser": {"action": "store_true", "help": "print the address only"},
    },
    "logout": {
        "provider": {**PROVIDER_WORD, "choices": NAMES},
        "account": {
            "nargs": "?",
            "default": None,
            "metavar": "ACCOUNT",
            "help": "which of several",
        },
    },
    "setup": {
        "client": {"nargs": "?", "choices": CLIENTS, "default": None, "help": "else: all, to look"},
        "--url": {"help": "the proxy's address, where it is not the configuration's"},
        "--undo": {"action": "store_true", "help": "bring back what was there before"},
    },
    "import": {
        "provider": {"nargs": "?", **PROVIDER_WORD, "choices": IMPORTABLE, "default": None},
        "--yes": {"action": "store_true", "help": "copy without asking"},
    },
    "route": {
        "model": {"metavar": "MODEL", "help": "as a client names it"},
        "--dialect": {"choices": VERBS, "default": "", "help": "of the client; else any"},
    },
    "status": {
        "--json": {"action": "store_true", "help": "as JSON, with the last 100 requests"},
        "--watch": {"action": "store_true", "help": "again every two seconds; Ctrl-C ends it"},
        "--wake": {"metavar": "ACCOUNT", "help": "end this account's rest"},
    },
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
    found, unknown = parser.parse_known_args(argv)
    args = vars(found)
    # Older Pythons leave a word behind an option over, as in `logout claude --config F me`.
    if len(unknown) == 1 and not unknown[0].startswith("-") and args.get("account", "") is None:
        args["account"] = unknown.pop()
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if not 0 <= args.get("port", 0) <= 65535:
        parser.error("argument --port: a port is a number from 0 to 65535")
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, with one sentence on standard error, 2 wrong usage."""
    try:
        try:
            return run(parse(argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read has read enough: `check | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(args: Json) -> int:
    given = {name: args[name] for name in ("host", "port", "debug") if name in args}
    try:
        live = Live(find_config(args.get("config")), **given)
        command = args.get("command") or "serve"
        path = live.log_file if command == "serve" else None
        set_up_log(live.config["debug"], live.warnings, path)
        loop = "uvloop" if importlib.util.find_spec("uvloop") else "asyncio"
        importlib.import_module(loop).run(COMMANDS[command](live, args))
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as error:  # a fault of this program: one sentence, too
        problem = explain(error) if isinstance(error, Exception) else "stopped"
        print(f"ampproxy: {printable(problem)}", file=sys.stderr)
        return 2 if isinstance(error, Misuse) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
