#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.11,<4", "pyyaml>=6,<7"]
# ///
"""The model calls of AI coding clients, answered by the subscriptions you already pay for.

client     an AI coding tool on this machine, for instance the Amp CLI
provider   who answers model calls: claude is the first; each is a row of the provider table
dialect    how bytes are worded: anthropic, chat, responses or gemini
account    one signed-in subscription of a provider, kept as one token file
rest       the time during which an account is left alone after an error
ampcode    ampcode.com: gets what is no model call, and the model calls that nobody here serves

One request, from the top: Server.handle checks host, origin and key; a model call goes to
Forwarder.answer, which asks the accounts in turn and relays the first good answer, byte for byte;
everything else goes to Ampcode.forward.  config.yaml shows what can be set, README.md how to run it.

Left out on purpose: TLS, a database, imitation of the official clients beyond what a login requires.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import difflib
import fnmatch
import hashlib
import hmac
import html
import ipaddress
import json
import logging
import logging.handlers
import os
import re
import secrets
import signal
import sys
import threading
import time
import urllib.request
import webbrowser
import zlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qsl, unquote_plus, urlencode, urlsplit

try:
    import aiohttp
    import yaml
    from aiohttp import web
    from multidict import CIMultiDict
    from yarl import URL
except ImportError as error:
    sys.exit(
        f"ampproxy needs aiohttp and PyYAML ({error.name} is missing): start it with "
        "`uv run ampproxy.py`, or install them with `python -m pip install aiohttp pyyaml`"
    )
with suppress(ImportError):
    import uvloop

__version__ = "0.1.0"

# == Common ground =================================================================================
#
# Small words that the other sections use.  Errors are of two kinds: a Failure is one sentence for the
# person at the terminal, a ProxyError is one for the client, worded in the client's dialect.

Json = dict[str, Any]
Headers = CIMultiDict[str]
Request = web.BaseRequest
Answer = web.StreamResponse
Upstream = aiohttp.ClientResponse
MINUTE, HOUR, MIB = 60, 3600, 1 << 20
log = logging.getLogger("ampproxy")


class Failure(Exception):
    """A command cannot be done; the text says why and what to do (exit status 1)."""


@dataclass(eq=False)
class ProxyError(Exception):
    """An answer that is no success; `body` and `headers` are the provider's own, where it sent some."""

    status: int
    message: str
    retry_after: float = 0
    needs_login: bool = False
    body: bytes = b""
    headers: Headers = field(default_factory=CIMultiDict)


class Clock:
    """Time as the program sees it; a test hands in one that it moves by hand."""

    monotonic = staticmethod(time.monotonic)  # never steps back: rests and durations
    time = staticmethod(time.time)  # seconds since 1970: when tokens end
    sleep = staticmethod(asyncio.sleep)


def compact(value: Any) -> bytes:
    """JSON without spaces, as UTF-8; lone surrogates, which UTF-8 lacks, stay escaped."""
    try:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def read_object(raw: bytes) -> Json:
    """The JSON object in `raw`; ValueError with a plain reason for anything else."""
    try:
        value = json.loads(raw.decode())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def dicts(value: Any) -> Iterator[Json]:
    """The objects of a list; nothing where a client sent something else."""
    return (v for v in value if isinstance(v, dict)) if isinstance(value, list) else iter(())


def inflate(raw: bytes, limit: int = 64 * MIB) -> bytes | None:
    """Gzip or zlib data unpacked; None when it is cut short, corrupt, or larger than `limit`."""
    unpacker, plain = zlib.decompressobj(47), b""
    with suppress(zlib.error):
        plain = unpacker.decompress(raw, limit + 1)
    return plain if unpacker.eof and len(plain) <= limit else None


def why(error: BaseException) -> str:
    """An exception in one line, never empty."""
    return str(error) or type(error).__name__


def mask(secret: str) -> str:
    """Enough of a secret or an address to tell two apart, never enough to use."""
    return f"{secret[:3]}..." if len(secret) > 6 else "..."


class Redact(logging.Filter):
    """The last wall: what looks like a secret or an e-mail address leaves a log line masked."""

    secrets = re.compile(
        r"[\w.+-]+@[\w-]+\.[\w.-]+|(?:sk-|sgamp_|ya29\.|eyJ|rt_)[\w.~+/=-]{8,}|(?<=Bearer )\S+"
    )

    def filter(self, record: logging.LogRecord) -> bool:
        line = self.secrets.sub(lambda m: mask(m[0]), record.getMessage())
        record.msg, record.args = re.sub(r"[\x00-\x1f\x7f]", "?", line), None
        return True


# == Errors in each dialect ========================================================================
#
# The words that each dialect's SDK looks for (clients.md, "Errors").  To add a status, add a row.

KINDS = {  # status: Anthropic's type, OpenAI's type, Google's status
    400: ("invalid_request_error", "invalid_request_error", "INVALID_ARGUMENT"),
    401: ("authentication_error", "authentication_error", "UNAUTHENTICATED"),
    402: ("billing_error", "insufficient_quota", "FAILED_PRECONDITION"),
    403: ("permission_error", "permission_error", "PERMISSION_DENIED"),
    404: ("not_found_error", "not_found_error", "NOT_FOUND"),
    413: ("request_too_large", "invalid_request_error", "INVALID_ARGUMENT"),
    429: ("rate_limit_error", "rate_limit_error", "RESOURCE_EXHAUSTED"),
    500: ("api_error", "server_error", "INTERNAL"),
    529: ("overloaded_error", "server_error", "UNAVAILABLE"),
}


def error_body(dialect: str, status: int, message: str) -> Json:
    """An error as the dialect words it; the dialect "" is this program's own {"error": message}."""
    anthropic, openai, google = KINDS.get(status, KINDS[400 if status < 500 else 500])
    if dialect == "anthropic":
        return {"type": "error", "error": {"type": anthropic, "message": message}}
    if dialect == "gemini":
        return {"error": {"code": status, "message": message, "status": google}}
    return {"error": {"message": message, "type": openai, "code": openai} if dialect else message}


def error_response(dialect: str, error: ProxyError) -> web.Response:
    """The whole answer; a wait over 30 s tells SDKs not to sit through it (clients.md, "Errors")."""
    headers = Headers(error.headers)
    if error.retry_after:
        headers["Retry-After"] = str(max(1, round(error.retry_after)))
    if error.retry_after > 30:
        headers["x-should-retry"] = "false"
    headers.setdefault("Content-Type", "application/json")
    body = error.body or compact(error_body(dialect, error.status, error.message))
    return web.Response(status=error.status, body=body, headers=headers)


def error_frame(dialect: str, message: str) -> bytes:
    """The event that ends a broken stream; its first newline closes a line that was cut short."""
    event = b"event: error\n" if dialect == "anthropic" else b""
    return b"\n%bdata: %b\n\n" % (event, compact(error_body(dialect, 502, message)))


# == Configuration and provider table ==============================================================
#
# One YAML file with CLIProxyAPI's names, read over these defaults; a default's type is the rule for what
# may stand there.  "a|b" is a choice, "!" what a table cannot do without, a list of texts with a "" or a
# table in it shows one member and is empty by default.  To add a key, add a row.
#
# `providers` is the provider table (facts of providers.md): who can answer, where, with which headers,
# for which models.  All of a row can be overridden.  To add a provider, add a row, and, for what is
# peculiar to it, one small function in RULES.

Config = Json  # what DEFAULTS describe, every key present: config["ampcode"]["fallback"]
Row = Json  # one of config["providers"], with its "name"
DEFAULTS: Json = yaml.safe_load(r"""
host: 127.0.0.1
port: 8317
auth-dir: ~/.ampproxy
api-keys: ['']
debug: false
logging-to-file: false
proxy-url: ''
request-retry: 3
max-retry-interval: 30.0
max-cooldown: 1800.0
routing: {strategy: least-connections|round-robin|fill-first, session-affinity-ttl: 2h}
streaming: {keepalive-seconds: 15.0, idle-timeout-seconds: 300.0}
ampcode:
  upstream-url: https://ampcode.com
  upstream-api-key: ''
  upstream-api-keys: [{upstream-api-key!: '', api-keys!: ['']}]
  restrict-management-to-localhost: false
  fallback: always|unserved|never
  client-inference: true
  force-model-mappings: false
  model-mappings: [{from!: '', to!: [''], regex: false}]
claude-api-key: [&key {api-key!: '', base-url: '', models: [&model {name!: '', alias: ''}],
                       excluded-models: [''], headers: {}}]
codex-api-key: [*key]
gemini-api-key: [*key]
openai-compatibility: [{name!: '', base-url!: '', models: [*model], excluded-models: [''], headers: {},
                        api-key-entries: [{api-key!: ''}]}]
providers:
  claude:
    enabled: true
    aliases: [anthropic]
    dialect: anthropic
    base-url: https://api.anthropic.com
    paths: {messages: /v1/messages, count_tokens: /v1/messages/count_tokens}
    headers: {anthropic-version: '2023-06-01', anthropic-beta: oauth-2025-04-20}
    passes: [anthropic-, x-stainless-, x-claude-code-, x-app, user-agent]  # of the client's headers
    identity: true
    models: [claude-*]
    excluded-models: ['']
    known: [claude-fable-5, claude-opus-4-8, claude-opus-4-7, claude-opus-4-6, claude-sonnet-4-6,
      claude-opus-4-5-20251101, claude-haiku-4-5-20251001, claude-sonnet-4-5-20250929,
      claude-opus-4-1-20250805, claude-sonnet-4-20250514]
    limits: {claude-3-7-*: '8192', 'claude-opus-4-[678]*': '128000', claude-fable-*: '128000',  # output
      claude-opus-4-5*: '64000', claude-opus-4-*: '32000', claude-*-4-*: '64000', '*': '1024'}
    authorize-url: https://claude.ai/oauth/authorize
    token-url: https://api.anthropic.com/v1/oauth/token
    token-url-2: https://platform.claude.com/v1/oauth/token  # asked when the first one answers 404
    profile-url: https://api.anthropic.com/api/oauth/profile
    client-id: 9d1c250a-e61b-44d9-88ed-5944d1962f5e
    client-secret: ''
    scope: user:profile user:inference user:sessions:claude_code user:mcp_servers user:file_upload
    callback-port: 54545
    callback-path: /callback
    authorize-query: {code: 'true'}
    refresh-lead: 4h  # before a token ends, though never in its first half
  codex: &later {enabled: true, dialect: '', base-url: '', authorize-url: '', token-url: '', profile-url: '',
    callback-port: 0, headers: {}, models: [''], excluded-models: [''], client-id: '', client-secret: ''}
  gemini: *later
  antigravity: *later
""")
OLD_NAMES = {  # CLIProxyAPI's, from before it had the table `ampcode`
    "amp-upstream-url", "amp-upstream-api-key", "amp-restrict-management-to-localhost", "amp-model-mappings",
}  # fmt: skip
TEXT_TABLES = {"headers", "paths", "limits", "authorize-query"}
RANGES = {"port": (0, 65535), "callback-port": (0, 65535), "request-retry": (1, 100)}


def seconds(length: Any) -> float:
    """A length of time: 90, "90s", "1h30m"; ValueError for anything else."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", str(length))
    if parts and "".join(n + unit for n, unit in parts) == length:
        return sum(float(n) * {"s": 1, "m": MINUTE, "h": HOUR}[unit] for n, unit in parts)
    return float(length)


def is_length(value: Any) -> bool:
    with suppress(ValueError, TypeError):
        return not isinstance(value, bool) and 0 <= seconds(value) < 1e9
    return False


def are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(text, str) for kv in value.items() for text in kv
    )


def expected(example: Any, name: str) -> tuple[str, Callable[[Any], bool]]:
    """What may stand for a default: in words, and as a test."""
    low, high = RANGES.get(name, (0, 1e9))
    match example:
        case bool():
            return "true or false", lambda v: isinstance(v, bool)
        case int():
            return (
                f"a whole number from {low} to {high:g}",
                lambda v: type(v) is int and low <= v <= high,
            )
        case float():
            return "a number, not negative", lambda v: type(v) in (int, float) and low <= v <= high
        case dict() if name in TEXT_TABLES:
            return "a table of texts", are_texts
        case dict() | list():
            return "a list" if isinstance(example, list) else "a table", lambda v: False
        case str() if is_length(example):
            return "a length of time such as 2h, 30m or 90", is_length
        case str() if "|" in example:
            return f"one of {example.replace('|', ', ')}", lambda v: v in example.split("|")
    return "a text (in quotes, where it looks like something else)", lambda v: isinstance(v, str)


def default(example: Any) -> Any:
    """What holds when a key is not given."""
    match example:
        case dict():
            return {name.rstrip("!"): default(inner) for name, inner in example.items()}
        case ["" | {}, *_]:
            return []
        case str() if "|" in example:
            return example.split("|")[0]
    return example


class ConfigFile:
    """One file, read and checked: `config`, and `warnings` about keys that nobody here knows."""

    def __init__(self, path: Path) -> None:
        self.path, self.warnings = path, list[str]()
        try:
            self.loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
            node = self.loader.get_single_node()
        except (OSError, UnicodeDecodeError) as error:
            raise Failure(f"{path}: cannot be read: {why(error)}") from error
        except yaml.YAMLError as error:
            line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
            raise Failure(f"{path}:{line}: not YAML: {getattr(error, 'problem', error)}") from error
        self.config: Config = self.read(node, DEFAULTS, "")

    def fail(self, node: yaml.Node, key: str, reason: str) -> NoReturn:
        raise Failure(f"{self.path}:{node.start_mark.line + 1}: {key or 'the file'}: {reason}")

    def read(self, node: yaml.Node | None, example: Any, key: str) -> Any:
        """What `node` holds, checked; `key` is its dotted name for messages."""
        name = key.rpartition(".")[2]
        if node is None or node.tag == "tag:yaml.org,2002:null":
            return default(example)
        if (
            isinstance(node, yaml.MappingNode)
            and isinstance(example, dict)
            and name not in TEXT_TABLES
        ):
            return self.read_table(node, example, key)
        if isinstance(node, yaml.SequenceNode) and isinstance(example, list):
            return [self.read(n, example[0], f"{key}[{i}]") for i, n in enumerate(node.value)]
        value = self.expand(node, key, self.loader.construct_object(node, deep=True))
        match (
            example,
            value,
        ):  # short forms: a switch for a row, one text for a list, a name for a model
            case {"enabled": _}, bool():
                return {**default(example), "enabled": value}
            case [""], str() if name == "to":
                return [value]
            case {"alias": _}, str():
                return {"name": value, "alias": ""}
        words, fits = expected(example, name)
        if not fits(value):
            self.fail(node, key, f"expected {words}")
        return {**example, **value} if isinstance(example, dict) else value

    def read_table(self, node: yaml.MappingNode, example: Json, key: str) -> Json:
        """A table's keys; old names move to their place, an unknown one is named with the nearest."""
        self.loader.flatten_mapping(node)
        names = {name.rstrip("!"): inner for name, inner in example.items()}
        found, prefix = dict[str, yaml.Node](), f"{key}." if key else ""
        for name_node, value in node.value:
            if (name := str(name_node.value)) not in {*names, *OLD_NAMES}:
                near = difflib.get_close_matches(name, names, 1, 0)[0]
                where = f"{self.path}:{name_node.start_mark.line + 1}"
                self.warnings.append(
                    f"{where}: unknown key {name!r}; the nearest known one is {near!r}"
                )
            found[name] = value
        table = {
            name: self.read(found.get(name), inner, prefix + name) for name, inner in names.items()
        }
        for name in OLD_NAMES & found.keys() if example is DEFAULTS else ():
            new, inner = name.removeprefix("amp-"), example["ampcode"]
            if table["ampcode"][new] == default(inner[new]):
                table["ampcode"][new] = self.read(found[name], inner[new], name)
        for name in example:
            if name.endswith("!") and not table[name[:-1]]:
                self.fail(node, key, f"needs {name[:-1]!r}")
        if table.get("regex"):
            try:
                re.compile(table["from"])
            except re.error as error:
                self.fail(found["from"], prefix + "from", f"expected a regular expression: {error}")
        return table

    def expand(self, node: yaml.Node, key: str, value: Any) -> Any:
        """`${NAME}` becomes the environment's value, in texts at any depth."""
        if isinstance(value, dict):
            return {k: self.expand(node, key, v) for k, v in value.items()}
        for name in re.findall(r"\$\{(\w+)\}", value) if isinstance(value, str) else ():
            if name not in os.environ:
                self.fail(node, key, f"the environment variable {name} is not set")
            value = value.replace(f"${{{name}}}", os.environ[name])
        return value.strip() if isinstance(value, str) else value


def find_config(given: str | None) -> Path | None:
    """--config, else the folder, beside the script, the user's own; None when there is none."""
    if given:
        return Path(given).expanduser()
    folders = (Path.cwd(), Path(__file__).resolve().parent, Path("~/.config/ampproxy").expanduser())
    return next((d / "config.yaml" for d in folders if (d / "config.yaml").is_file()), None)


def is_loopback(host: str) -> bool:
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    return host.lower() == "localhost"


def stamp(path: Path | None) -> tuple[int, ...] | None:
    """What changes when a file does; None while there is none."""
    with suppress(OSError):
        found = path.stat() if path else None
        return found and (found.st_mtime_ns, found.st_size, found.st_ino)
    return None


class Live:
    """The configuration in effect; a changed file is taken up whole, or not at all."""

    def __init__(self, path: Path | None, **given: Any) -> None:
        self.path, self.given, self.seen = path, given, stamp(path)
        self.config, self.warnings = self.load()
        self.given |= {"host": self.config["host"], "port": self.config["port"]}

    def load(self) -> tuple[Config, list[str]]:
        """The file over the defaults, the command line over both; Failure for what must not run."""
        file = ConfigFile(self.path) if self.path else None
        config = {**(file.config if file else default(DEFAULTS)), **self.given}
        config["api-keys"] = [key for key in config["api-keys"] if key]
        if not is_loopback(config["host"]) and not config["api-keys"]:
            raise Failure(
                f"host {config['host']!r} is open to other machines: set api-keys, or use 127.0.0.1"
            )
        return config, file.warnings if file else []

    def reload(self) -> bool:
        """Look at the file once; True when a new configuration took effect."""
        now = stamp(self.path)
        if now is None or now == self.seen:
            return False
        self.seen = now
        try:
            if not now[1]:
                raise Failure(f"{self.path}: is empty")
            self.config, self.warnings = self.load()
        except Failure as error:
            log.error("%s; the configuration from before stays in effect", error)
            return False
        log.info("%s is taken up", self.path)
        return True

    @property
    def auth_dir(self) -> Path:
        return Path(self.config["auth-dir"]).expanduser()

    def row(self, name: str) -> Row:
        """A provider's row; its base-url means the same with and without slash or version part."""
        row = {**self.config["providers"][name], "name": name}
        return {**row, "base-url": re.sub(r"(/v\d\w*)?/*$", "", row["base-url"].rstrip("/"))}

    def rows(self) -> list[Row]:
        """The providers that are switched on and known here."""
        rows = self.config["providers"]
        return [self.row(name) for name in rows if rows[name]["enabled"] and rows[name]["dialect"]]


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns)


def serves(row: Row, model: str) -> bool:
    """Whether the row's patterns take this model; whether a plan has it, only the provider knows."""
    return matches(model, row["models"]) and not matches(model, row["excluded-models"])


# == Claude's rules ================================================================================
#
# What api.anthropic.com asks of a request that carries a plan's login (providers.md 1.2 and 1.3, whose
# numbers stand here).  Pure: changes body and headers in place.  No tool is renamed.

IDENTITY = "You are Claude Code, Anthropic's official CLI for Claude."
SIGNATURE = re.compile(r"E[g-v]|R[WX]")  # base64 of a first byte 0x12, once or twice encoded (12)
TOOL_USE_KEYS = {"type", "id", "name", "input", "cache_control", "caller"}
EMPTY_TEXT = {"type": "text", "text": ""}


def prepare_claude(body: Json, headers: Headers, row: Row) -> None:
    """The beta list, then the body's rules.  context-1m would be billed beside the plan: it is dropped."""
    listed, own = body.pop("betas", None), row["headers"]["anthropic-beta"]
    asked = [headers.get("anthropic-beta", ""), *(listed if isinstance(listed, list) else ()), own]
    betas = dict.fromkeys(beta.strip() for text in asked for beta in str(text).split(","))
    kept = [beta for beta in betas if beta and not beta.startswith("context-1m")]
    headers["anthropic-beta"] = ",".join(kept)
    if not any(beta.startswith("fast-mode") for beta in kept):
        body.pop("speed", None)
    settle_thinking(body)
    if isinstance(body.get("messages"), list):
        body["messages"] = [message for message in body["messages"] if clean_message(message)]
    if row["identity"]:
        body["system"] = with_identity(body.get("system"))
    limit_markers(body)


def settle_thinking(body: Json) -> None:
    """Rules 1 to 6: what may stand beside thinking, and how large its budget may be."""
    choice, thinking, limit = (body.get(k) for k in ("tool_choice", "thinking", "max_tokens"))
    if isinstance(choice, dict) and choice.get("type") in ("any", "tool"):
        body.pop("thinking", None)
        if isinstance(body.get("output_config"), dict):
            body["output_config"].pop("effort", None)
    elif isinstance(thinking, dict):
        if thinking.get("type") == "auto":
            thinking["type"] = "adaptive"
        if isinstance(budget := thinking.get("budget_tokens"), int) and isinstance(limit, int):
            thinking["budget_tokens"] = max(1024, min(budget, limit - 1))
            if limit <= 1024:
                body["thinking"] = {"type": "disabled"}
        if body["thinking"].get("type") in ("enabled", "adaptive"):
            refused = {"temperature": lambda t: t != 1, "top_p": lambda p: p < 0.95, "top_k": bool}
            for key, test in refused.items():
                if isinstance(body.get(key), (int, float)) and test(body[key]):
                    del body[key]
    if "temperature" in body:
        body.pop("top_p", None)


def clean_message(message: Any) -> bool:
    """Rules 10 to 13 on one message; False when nothing of it is left."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list) and content:
        message["content"] = [block for block in content if clean_block(block)]
        return bool(message["content"])
    return True


def clean_block(block: Any) -> bool:
    """False for what Anthropic would refuse: empty text, thinking that no Claude model has signed."""
    match block:
        case {"type": "text", "text": ""}:
            return False
        case {"type": "thinking"}:
            return bool(SIGNATURE.match(str(block.get("signature"))))
        case {"type": "tool_use", "id": str(name)}:
            block["id"] = re.sub(r"[^a-zA-Z0-9_-]", "_", name)
            for key in block.keys() - TOOL_USE_KEYS:
                del block[key]
        case {"type": "tool_result", "tool_use_id": str(name)}:
            block["tool_use_id"] = re.sub(r"[^a-zA-Z0-9_-]", "_", name)
            if isinstance(block.get("content"), list):
                block["content"] = [part for part in block["content"] if clean_block(part)]
    return True


def with_identity(system: Any) -> list[Any]:
    """The client's system blocks behind the sentence without which a plan's login is refused.

    Claude Code's billing line may stand before its own identity: that pair stays as it is.
    """
    blocks = system if isinstance(system, list) else [{"type": "text", "text": system or ""}]
    blocks = [block for block in blocks if block != EMPTY_TEXT]
    texts = [str(block.get("text")) for block in dicts(blocks[:2])]
    own = texts[1:] if texts and texts[0].startswith("x-anthropic-billing-header") else texts
    there = bool(own) and own[0].startswith(IDENTITY)
    return blocks if there else [{"type": "text", "text": IDENTITY}, *blocks]


def limit_markers(body: Json) -> None:
    """Rules 7 and 8: at most four cache_control markers, and no 1h one behind a 5-minute one."""
    blocks = [b for m in dicts(body.get("messages")) for b in dicts(m.get("content"))]
    inner = (part for block in blocks for part in (block, *dicts(block.get("content"))))
    places = (dicts(body.get("tools")), dicts(body.get("system")), inner)
    tools, system, messages = ([b for b in place if b.get("cache_control")] for place in places)
    surplus = system[:-1] + tools[:-1] + messages + system[-1:] + tools[-1:]
    for block in surplus[: max(0, len(surplus) - 4)]:
        del block["cache_control"]
    short = False
    for marker in (b["cache_control"] for b in tools + system + messages if "cache_control" in b):
        if isinstance(marker, dict) and marker.get("ttl") == "1h" and short:
            del marker["ttl"]
        short = short or not isinstance(marker, dict) or marker.get("ttl") != "1h"


RULES = {"claude": prepare_claude}
# == Token files ===================================================================================
#
# One JSON file an account, in CLIProxyAPI's format (peers.md 1.12).  Only the fields that changed are
# written, over what the file holds by then, so that nobody else's edit is lost.


def write_private(path: Path, data: bytes) -> None:
    """The whole file or none of it: a new one, 0600 from its first byte, synced, renamed over the old."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def save_token(path: Path, changes: Json) -> Json:
    """The token with `changes`, on disk before it is returned; keys that others put there survive."""
    token: Json = {}
    with suppress(OSError, ValueError):
        token = read_object(path.read_bytes())
    token |= changes
    write_private(path, json.dumps(token, indent=2).encode() + b"\n")
    path.parent.chmod(0o700)
    return token


def rfc3339(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def moment(value: Any) -> float:
    """Seconds since 1970 of an RFC 3339 time; 0 when it is none."""
    with suppress(ValueError, TypeError, OverflowError):
        return datetime.fromisoformat(value).astimezone(UTC).timestamp()
    return 0.0


def expiry(token: Json) -> float:
    """When the access token ends: never for a setup token, long ago for a file that does not say."""
    return moment(token.get("expired")) if token.get("refresh_token") else float("inf")


# == The way out ===================================================================================
#
# One pool of connections for everything.  Bytes come and go as they are: no cookie is kept, no redirect
# followed, nothing unpacked, no header added.

NET_ERRORS = (aiohttp.ClientError, OSError, TimeoutError, ValueError, zlib.error)


class Net:
    def __init__(self, live: Live) -> None:
        self.live = live
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=20),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            max_line_size=65536,
            max_field_size=65536,
        )

    def proxy(self, url: URL) -> str | None:
        """The outbound proxy for this address: `proxy-url`, else the environment's."""
        if own := self.live.config["proxy-url"]:
            return str(own)
        around = urllib.request.proxy_bypass(url.host or "")
        return None if around else urllib.request.getproxies().get(url.scheme)

    @asynccontextmanager
    async def ask(self, method: str, url: URL, **more: Any) -> AsyncIterator[Upstream]:
        """The answer, its headers read; closed on the way out.  ProxyError 502 when there is none."""
        idle = more.pop("idle", None) or self.live.config["streaming"]["idle-timeout-seconds"]
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=idle or None)
        more |= {"timeout": timeout, "proxy": self.proxy(url), "allow_redirects": False}
        try:
            response = await self.session.request(method, url, **more)
        except NET_ERRORS as error:
            raise ProxyError(502, f"{url.host} cannot be reached: {why(error)}") from error
        try:
            yield response
        finally:
            (response.release if response.content.at_eof() else response.close)()

    async def ask_json(self, method: str, url: str, **more: Any) -> tuple[int, Json]:
        """One small call; an answer that is no JSON object comes back as {"error": its text}."""
        own = {"Accept": "application/json", "User-Agent": f"ampproxy/{__version__}"}
        headers = {**own, **more.pop("headers", {})}
        async with self.ask(method, URL(url), idle=30, headers=headers, **more) as response:
            raw = await response.read()
        try:
            return response.status, read_object(inflate(raw) or raw)
        except ValueError:
            return response.status, {"error": raw[:300].decode(errors="replace")}


def error_text(answer: Json) -> str:
    """What a provider said went wrong, in any of the shapes in use."""
    inner = answer.get("error")
    parts = inner if isinstance(inner, dict) else answer
    keys = ("type", "code", "error", "message", "error_description", "detail")
    said = [str(parts[key]) for key in keys if parts.get(key) and parts[key] != "error"]
    return ": ".join(dict.fromkeys(said))[:300]


@asynccontextmanager
async def listen(
    server: web.Server, host: str, port: int, hint: str, grace: float = 0.1
) -> AsyncIterator[int]:
    """An open port (0: any free one); on the way out, running answers get `grace` seconds."""
    runner = web.ServerRunner(server, shutdown_timeout=grace)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host or None, port).start()
        except OSError as error:
            raise Failure(
                f"cannot listen on {host}:{port} ({error.strerror or error}): {hint}"
            ) from error
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


# == Signing in ====================================================================================
#
# OAuth with PKCE (RFC 7636) and a callback on this machine; the address that the browser ends at can also
# be pasted, for a browser that runs elsewhere.  Whichever comes first wins.

LOGIN_WAIT = 10 * MINUTE
PAGE = "<!doctype html><meta charset=utf-8><title>ampproxy</title><p>{}<p>You can close this page."


def say(line: str) -> None:
    print(line, flush=True)


def pkce() -> tuple[str, str]:
    """A verifier and its S256 challenge."""
    verifier = secrets.token_urlsafe(64)
    digest = hashlib.sha256(verifier.encode()).digest()
    return verifier, base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def read_callback(line: str) -> dict[str, str]:
    """code, state, error of a callback however it was copied: the whole URL, without its scheme, from the
    `?` on, `code=...&state=...`, parameters in the fragment, `code#state`.  {} when it makes no sense."""
    line = line.strip().strip("'\"<>")
    found = dict(pair for part in re.split(r"[?#]", line) for pair in parse_qsl(part))
    first, mark, last = line.rpartition("#")
    if not found and mark and re.fullmatch(r"[^\s/?=&]+", first):
        found["code"] = first
    code, _, state = found.get("code", "").partition("#")
    if not code and "error" not in found:
        return {}
    return {"state": state or (last if mark and "=" not in last else ""), **found, "code": code}


def check_callback(found: dict[str, str], state: str) -> str:
    """The code; Failure when the provider refused, or the answer belongs to another login."""
    if not hmac.compare_digest(found.get("state", "").encode(), state.encode()):
        raise Failure(
            "the callback's state is not that of this login: start again, use the new address"
        )
    if "error" in found:
        raise Failure(f"the login was refused: {error_text(dict(found))}")
    return found["code"]


def read_lines(loop: asyncio.AbstractEventLoop, use: Callable[[str], object]) -> None:
    """Hand on every line of standard input; by os.read, as a buffered read would hold up the exit."""
    rest, data = b"", b"..."
    with suppress(OSError, ValueError, RuntimeError):  # there is no input, or the login is over
        while data:
            data = os.read(sys.stdin.fileno(), 65536)
            *lines, rest = (rest + data or rest + b"\n").split(b"\n")
            for line in lines:
                loop.call_soon_threadsafe(use, line.decode(errors="replace"))


def has_browser() -> bool:
    shown = any(name in os.environ for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
    far = "SSH_CONNECTION" in os.environ or "SSH_TTY" in os.environ
    return not far and (shown or sys.platform in ("darwin", "win32"))


class Login:
    """One login, from the address that the person opens to the token file."""

    def __init__(self, live: Live, row: Row, clock: Clock) -> None:
        self.live, self.row, self.clock, self.loop = live, row, clock, asyncio.get_running_loop()
        (self.verifier, self.challenge), self.state = pkce(), secrets.token_urlsafe(24)
        self.redirect, self.found = "", self.loop.create_future()

    async def run(self, browser: bool) -> tuple[str, Path]:
        """The e-mail address and the file; Failure says in one sentence what went wrong."""
        hint = f"end the program that holds it, or set providers.{self.row['name']}.callback-port"
        async with listen(
            web.Server(self.handle), "127.0.0.1", self.row["callback-port"], hint
        ) as port:
            self.redirect = f"http://localhost:{port}{self.row['callback-path']}"
            self.show(browser, port)
            threading.Thread(target=read_lines, args=(self.loop, self.paste), daemon=True).start()
            try:
                code = check_callback(await asyncio.wait_for(self.found, LOGIN_WAIT), self.state)
            except TimeoutError as error:
                raise Failure(f"no callback came within {LOGIN_WAIT // MINUTE} minutes") from error
        net = Net(self.live)
        try:
            return await self.redeem(net, code)
        except (ProxyError, *NET_ERRORS) as error:
            raise Failure(f"the login could not be completed: {why(error)}") from error
        finally:
            await net.session.close()

    def show(self, browser: bool, port: int) -> None:
        query = {
            **self.row["authorize-query"], "client_id": self.row["client-id"], "response_type": "code",
            "scope": self.row["scope"], "redirect_uri": self.redirect, "state": self.state,
            "code_challenge": self.challenge, "code_challenge_method": "S256",
        }  # fmt: skip
        url = f"{self.row['authorize-url']}?{urlencode(query)}"
        say(f"Open this address in a browser to sign in to {self.row['name']}:\n\n{url}\n")
        if browser:
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        else:
            tunnel = f"ssh -L {port}:127.0.0.1:{port} USER@THIS-MACHINE"
            say(f"If the browser runs on another machine, run this there first:\n\n    {tunnel}\n")
        say(f"Or paste the address that the browser ends at ({self.redirect}?code=...) here:")

    async def handle(self, request: Request) -> Answer:
        found = dict(request.rel_url.query)
        if request.rel_url.path != self.row["callback-path"] or not found.keys() & {
            "code",
            "error",
        }:
            return web.Response(status=404, text="This is not the callback.\n")
        self.take(found)
        said = (
            f"The login was refused: {found['error']}."
            if "error" in found
            else "Back to the terminal."
        )
        return web.Response(text=PAGE.format(html.escape(said)), content_type="text/html")

    def paste(self, line: str) -> None:
        if found := read_callback(line):
            self.take(found)
        elif line.strip():
            say("That is no callback: it has neither a code nor an error. Still waiting.")

    def take(self, found: dict[str, str]) -> None:
        if not self.found.done():
            self.found.set_result(found)

    async def redeem(self, net: Net, code: str) -> tuple[str, Path]:
        """The code for a token, the token for a file."""
        code, _, state = code.partition("#")
        form = {"grant_type": "authorization_code", "code": code, "state": state or self.state,
                "redirect_uri": self.redirect, "code_verifier": self.verifier}  # fmt: skip
        answer = await ask_token(net, self.row, form)
        account = answer.get("account")
        email = account.get("email_address") if isinstance(account, dict) else None
        email = str(email or await ask_email(net, self.row, answer["access_token"]))
        path = (
            self.live.auth_dir
            / f"{self.row['name']}-{re.sub(r'[^A-Za-z0-9.@+_-]', '_', email)}.json"
        )
        token = {"type": self.row["name"], "email": email, "refresh_token": "", "id_token": ""}
        save_token(path, token | token_fields(answer, self.clock.time()))
        return email, path


async def ask_token(net: Net, row: Row, form: Json) -> Json:
    """The token endpoint's answer; ProxyError with its words, `needs_login` when only a login can help."""
    form = {"client_id": row["client-id"], **form}
    status, answer = await net.ask_json("POST", row["token-url"], json=form)
    own = DEFAULTS["providers"][row["name"]]["token-url"]
    if status == 404 and row["token-url"] == own and row["token-url-2"]:
        status, answer = await net.ask_json("POST", row["token-url-2"], json=form)
    if status == 200 and isinstance(answer.get("access_token"), str):
        return answer
    said = error_text(answer)
    final = re.search(
        "invalid_grant|refresh_token_(reused|expired|invalidated)|unauthorized_client", said
    )
    raise ProxyError(
        status, f"{row['name']}'s token endpoint answered {status}: {said}", needs_login=bool(final)
    )


def token_fields(answer: Json, now: float) -> Json:
    """What a token answer changes in the file; a refresh token that it does not name stays."""
    named = {name: answer[name] for name in ("refresh_token", "id_token") if answer.get(name)}
    life = answer.get("expires_in")
    ends = rfc3339(now + (life if isinstance(life, (int, float)) else HOUR))
    return {
        "access_token": answer["access_token"],
        "last_refresh": rfc3339(now),
        "expired": ends,
        **named,
    }


async def ask_email(net: Net, row: Row, token: str) -> str:
    """The address from the profile; a token that may not read it is named by its hash."""
    with suppress(ProxyError, *NET_ERRORS):
        _, profile = await net.ask_json(
            "GET", row["profile-url"], headers={"Authorization": f"Bearer {token}"}
        )
        account = profile["account"] if isinstance(profile.get("account"), dict) else profile
        if email := account.get("email") or account.get("email_address"):
            return str(email)
    return "account-" + hashlib.sha256(token.encode()).hexdigest()[:8]


# == Accounts ======================================================================================
#
# Who may answer, and with which token.  Knows no dialect; all time comes from the clock it is given.
# What an error means for an account stands in RESTS: to add a case, add a row above a wider one.

RESTS: tuple[tuple[set[int], str, float | None, bool], ...] = (
    # status             words in it                 seconds; None: Retry-After  goes on to the next
    ({400, 429},         "extra usage|long context", 0,                          False),  # about money
    ({401},              "",                         5 * MINUTE,                 True),
    ({402},              "",                         30 * MINUTE,                True),
    ({403},              "",                         24 * HOUR,                  True),
    ({404},              "",                         0,                          True),
    ({429},              "",                         None,                       True),
    ({529},              "",                         30,                         True),
    ({408, 500, 502, 503, 504}, "",                  5,                          True),
)  # fmt: skip
RETRIED = {408, 500, 502, 503, 504, 529}  # worth another try on the same account
REFRESH_WAIT, REFRESH_PAUSE = 30, 30


def verdict(error: ProxyError) -> tuple[float, bool]:
    """Seconds for which the account is left alone, and whether somebody else should be asked."""
    said = f"{error.message} {error.body[:2000].decode(errors='replace')}".lower()
    for statuses, words, rest, goes_on in RESTS:
        if error.status in statuses and re.search(words, said):
            return error.retry_after or MINUTE if rest is None else rest, goes_on
    return (5, True) if error.status >= 500 else (0, False)


@dataclass(eq=False)
class Account:
    """One token file and what this process knows of it; `wakes` and `retry` are monotonic moments."""

    path: Path
    token: Json
    wakes: float = 0.0
    retry: float = 0.0  # no refresh before this
    reason: str = ""
    needs_login: bool = False
    in_flight: int = 0
    requests: int = 0
    errors: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    refreshing: asyncio.Task[None] | None = None

    @property
    def provider(self) -> str:
        return str(self.token["type"])

    @property
    def email(self) -> str:
        return str(self.token.get("email") or self.path.stem)

    def state(self, now: float) -> str:
        if self.token.get("disabled") is True:
            return "disabled"
        return "needs-login" if self.needs_login else "resting" if self.wakes > now else "ready"

    def __str__(self) -> str:
        return f"{self.provider} {mask(self.email)}"


class Pool:
    """The accounts of the auth directory."""

    def __init__(self, live: Live, net: Net | None = None, clock: Clock | None = None) -> None:
        self.live, self.net, self.clock = live, net, clock or Clock()
        self.accounts: dict[Path, Account] = {}
        self.stamps: dict[Path, Any] = {}

    def scan(self) -> None:
        """Take up files that are new, changed or gone."""
        found = sorted(p for p in self.live.auth_dir.glob("*.json") if not p.name.startswith("."))
        stamps = {path: stamp(path) for path in found}
        for path in self.accounts.keys() - stamps.keys():
            del self.accounts[path]
        for path in found:
            if stamps[path] != self.stamps.get(path):
                self.read(path)
        self.stamps = stamps

    def read(self, path: Path) -> None:
        """One file; what cannot be used is named and left alone, what was known of it stays."""
        try:
            token = read_object(path.read_bytes())
            if not isinstance(token.get("type"), str):
                raise ValueError("it has no 'type'")
        except (OSError, ValueError) as error:
            log.error("%s is no token file: %s", path, why(error))
            return
        account = self.accounts.setdefault(path, Account(path, token))
        if token.get("access_token") != account.token.get("access_token"):
            account.needs_login, account.wakes, account.retry = False, 0.0, 0.0
        account.token = token

    def of(self, row: Row) -> list[Account]:
        """The accounts of a provider that are not disabled, by priority, then the least busy, then name."""
        there = [
            a
            for a in self.accounts.values()
            if (a.provider, a.state(0)) != (row["name"], "disabled")
        ]
        mine = [a for a in there if a.provider == row["name"]]
        return sorted(mine, key=lambda a: (-int(a.token.get("priority") or 0), a.in_flight, a.path))

    def ready(self, row: Row) -> list[Account]:
        now = self.clock.monotonic()
        return [account for account in self.of(row) if account.state(now) == "ready"]

    def nobody(self, row: Row) -> ProxyError:
        """Why none of a provider's accounts can be asked, each by name, and when the first one wakes."""
        now = self.clock.monotonic()
        told = [f"{a} {a.state(now)}: {a.reason or self.hint(a)}" for a in self.of(row)]
        waits = [a.wakes - now for a in self.of(row) if a.state(now) == "resting"]
        status = 429 if waits else 401
        return ProxyError(
            status, "no account can answer: " + "; ".join(told), min(waits, default=0)
        )

    def hint(self, account: Account) -> str:
        return f"run `ampproxy.py login {account.provider}`"

    def rest(self, account: Account, error: ProxyError) -> bool:
        """Leave the account alone as long as the error asks for; True when the next should be asked."""
        length, goes_on = verdict(error)
        account.errors += 1
        account.needs_login = account.needs_login or error.needs_login
        if length or error.needs_login:
            account.reason = error.message
            length = min(length, self.live.config["max-cooldown"])
            account.wakes = max(account.wakes, self.clock.monotonic() + length)
            log.warning("%s rests for %d s: %s", account, length, error.message)
        return goes_on

    async def bearer(self, row: Row, account: Account, refused: str = "") -> str:
        """An access token that is good for another minute and is not the one that was `refused`."""
        token = account.token
        if refused == token.get("access_token") or expiry(token) < self.clock.time() + MINUTE:
            await self.refresh(row, account, refused)
        fresh = str(account.token.get("access_token") or "")
        if account.needs_login or not fresh:
            raise ProxyError(401, f"the login has ended: {self.hint(account)}", needs_login=True)
        if fresh == refused or expiry(account.token) < self.clock.time():
            raise ProxyError(503, account.reason or "the token cannot be refreshed now")
        return fresh

    async def refresh(self, row: Row, account: Account, refused: str) -> None:
        """Wait for one refresh, whoever began it; it goes on when the client that waits leaves."""
        await asyncio.wait([account.refreshing or self.begin_refresh(row, account, refused)])

    def begin_refresh(self, row: Row, account: Account, refused: str) -> asyncio.Task[None]:
        task = account.refreshing = asyncio.create_task(self.renew(row, account, refused))
        task.add_done_callback(lambda _: setattr(account, "refreshing", None))
        return task

    async def renew(self, row: Row, account: Account, refused: str) -> None:
        """One refresh: adopt a newer token from the file, else ask, save, and only then use it."""
        self.read(account.path)
        old, now = account.token, self.clock.time()
        if expiry(old) > now + MINUTE and old.get("access_token") != refused:
            return
        if not old.get("refresh_token"):
            account.needs_login, account.reason = True, "refused, and there is no refresh token"
        elif self.net and account.retry <= self.clock.monotonic():
            form = {"grant_type": "refresh_token", "refresh_token": old["refresh_token"]}
            try:
                async with asyncio.timeout(REFRESH_WAIT):
                    answer = await ask_token(self.net, row, form)
                account.token = save_token(account.path, token_fields(answer, self.clock.time()))
                account.reason = ""
                log.info("%s: token refreshed", account)
            except (ProxyError, *NET_ERRORS) as error:
                self.refresh_failed(account, old, error)

    def refresh_failed(self, account: Account, old: Json, error: Exception) -> None:
        """Another program may have been faster: then its token is in the file by now, and adopted."""
        self.read(account.path)
        if account.token.get("refresh_token") == old["refresh_token"]:
            account.reason = (
                f"refresh failed: {error.message if isinstance(error, ProxyError) else why(error)}"
            )
            account.needs_login = isinstance(error, ProxyError) and error.needs_login
            account.retry = self.clock.monotonic() + REFRESH_PAUSE
            log.error(
                "%s: %s%s", account, account.reason, f"; {self.hint(account)}" * account.needs_login
            )

    def refresh_ahead(self) -> None:
        """Begin the refreshes that are due: `lead` before the end, but not in a token's first half."""
        for row in self.live.rows():
            for account in self.of(row):
                ends = expiry(account.token)
                began = moment(account.token.get("last_refresh")) or ends - 10 * MINUTE
                due = (
                    ends - min(seconds(row["refresh-lead"]), max(0.0, ends - began) / 2)
                    <= self.clock.time()
                )
                idle = not (account.refreshing or account.needs_login)
                if due and idle and account.retry <= self.clock.monotonic():
                    self.begin_refresh(row, account, str(account.token.get("access_token")))


# == Model calls ===================================================================================
#
# Which paths are model calls, in which dialect, and what such a call says.  The path's ending names the
# dialect; the model, not the path, names the provider.

PREFIX = r"(?P<amp>/api/provider/[^/]+)?(?:/v1(?:beta1?(?:/publishers/google)?)?)*"
ROUTES = tuple((re.compile(PREFIX + path), dialect, verb) for path, dialect, verb in (
    (r"/messages", "anthropic", "messages"),
    (r"/messages/count_tokens", "anthropic", "count_tokens"),
    (r"/chat/completions", "chat", "completions"),
    (r"/responses", "responses", "responses"),
    (r"/models/(?P<model>[^/:]+):(?P<verb>\w+)", "gemini", ""),
    (r"/models", "", "models"),
))  # fmt: skip
BODY_LIMIT = 64 * MIB
BODY_WAIT = 60  # seconds for the next piece of a body


@dataclass(eq=False)
class Call:
    """One model call: what was asked (`raw` as it came, `body` as it reads) and who answered."""

    request: Request
    dialect: str
    verb: str
    amp: bool  # under /api/provider, where ampcode.com may answer
    model: str = ""
    key: str = ""  # the client's
    stream: bool = False
    raw: bytes = b""
    body: Json = field(default_factory=dict)
    route: str = "none"
    provider: str = ""
    account: str = ""
    served_model: str = ""
    trouble: str = ""  # what broke the answer off
    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def marks(self) -> Headers:
        """The headers that make the choice visible; a model's name may hold what a header may not."""
        marks = {"route": self.route, "provider": self.provider, "model": self.served_model}
        clean = ((name, re.sub(r"[^\x20-\x7e]", "?", value)[:200]) for name, value in marks.items())
        return CIMultiDict((f"x-ampproxy-{name}", value) for name, value in clean if value)


def find_call(request: Request) -> Call | None:
    """The call that a path means; None for what is no model call."""
    for pattern, dialect, verb in ROUTES:
        if found := pattern.fullmatch(request.rel_url.raw_path):
            parts = found.groupdict()
            model = unquote_plus(parts.get("model") or "")
            return Call(request, dialect, parts.get("verb") or verb, bool(parts["amp"]), model)
    return None


async def read_call(call: Call) -> None:
    """Read the body; ProxyError 400 or 413 for one that nobody could answer."""
    call.raw = await read_body(call.request)
    packed = call.request.headers.get("Content-Encoding", "identity").lower() != "identity"
    plain = inflate(call.raw, BODY_LIMIT) if packed else call.raw
    try:
        if plain is None:
            raise ValueError("no gzip, or too large when unpacked")
        call.body = read_object(plain)
    except ValueError as error:
        raise ProxyError(400, f"The request body cannot be read: {why(error)}") from error
    google = call.dialect == "gemini"
    call.stream = call.verb.startswith("stream") if google else call.body.get("stream") is True
    call.model = call.model or call.body.get("model") or ""
    if not isinstance(call.model, str) or not call.model:
        call.model = ""
        raise ProxyError(400, "The request names no model")


async def read_body(request: Request) -> bytes:
    """All of it, at most 64 MiB."""
    body = bytearray()
    try:
        while len(body) <= BODY_LIMIT >= (request.content_length or 0):
            chunk = await asyncio.wait_for(request.content.readany(), BODY_WAIT)
            if not chunk:
                return bytes(body)
            body += chunk
    except (web.RequestPayloadError, *NET_ERRORS) as error:
        raise ProxyError(400, "The request body was cut short") from error
    raise ProxyError(413, f"The request body is larger than {BODY_LIMIT // MIB} MiB")


# == Who asks, and may they? =======================================================================
#
# Checks on a request's head, before a byte of its body is read (design.md, "Security"): against DNS
# rebinding (Host), other web pages (Origin, Sec-Fetch-Site) and strangers (keys).

BROWSER_PATHS = re.compile(r"/(auth|threads|docs|settings)(/|$)")
KEY_HEADERS, KEY_PARAMETERS = (
    ("authorization", "x-api-key", "x-goog-api-key"),
    ("key", "auth_token"),
)


def is_upgrade(request: Request) -> bool:
    return request.headers.get("Upgrade", "").lower() == "websocket"


def is_browser_path(request: Request) -> bool:
    fits = request.method in ("GET", "HEAD") and BROWSER_PATHS.match(request.rel_url.raw_path)
    return bool(fits) and not is_upgrade(request)


def refuse_strangers(request: Request, config: Config) -> None:
    """403 for a Host that is not ours, and for what a browser sends on behalf of another site."""
    host, origin = (request.headers.get(name, "").lower() for name in ("Host", "Origin"))
    try:
        name, own = urlsplit(f"//{host}").hostname or "", urlsplit(origin).netloc == host
    except ValueError:
        name, own = "", False
    if not (config["api-keys"] or is_loopback(name) or (name and name == config["host"].lower())):
        raise ProxyError(403, f"Host {host[:100]!r} is not an address of this proxy")
    foreign = origin.startswith(("http://", "https://", "null")) and not own
    if foreign or request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
        if request.headers.get("Sec-Fetch-Mode") != "navigate" or not is_browser_path(request):
            raise ProxyError(403, "requests on behalf of another web site are refused")


def same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(errors="replace"), other.encode(errors="replace"))


def client_key(request: Request, keys: list[str]) -> str:
    """Which of `keys` the client shows, in any of the five places; ProxyError 401 for none."""
    shown = [request.headers.get(name, "") for name in KEY_HEADERS]
    shown += [request.query.get(name, "") for name in KEY_PARAMETERS]
    shown = [re.sub(r"(?i)^bearer\s+", "", value.strip()) for value in shown if value.strip()]
    right = [key for key in keys for value in shown if same(key, value)]
    if not right:
        raise ProxyError(401, "Invalid API key" if shown else "Missing API key")
    return right[0]


def check_local(request: Request) -> None:
    """By the socket's other end: forwarding headers prove nothing."""
    peer = request.transport.get_extra_info("peername") if request.transport else None
    if not peer or not is_loopback(str(peer[0])):
        raise ProxyError(403, "Access denied: management routes restricted to localhost")


def target_without(request: Request, keys: Iterable[str]) -> str:
    """Path and query as they came, less the parameters that carry one of the proxy's own keys."""
    path, mark, query = request.raw_path.partition("?")
    pairs = [(pair, *pair.partition("=")) for pair in query.split("&")]
    kept = [pair for pair, name, _, value in pairs
            if name not in KEY_PARAMETERS or not any(same(unquote_plus(value), key) for key in keys)]  # fmt: skip
    return path + (mark + "&".join(kept) if kept else "")


# == Passing answers on ============================================================================
#
# From an upstream to the client as it comes: bytes, headers, end.  Until its first byte has gone out, a
# ProxyError can still turn into something better; after it, what breaks ends the answer visibly.

TAIL = 4096
OWN_HEADERS = {"content-length", "content-encoding", "set-cookie"}
HOP_HEADERS = set(  # RFC 9110, 7.6.1, and what the HTTP library writes itself
    "connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    "transfer-encoding upgrade host expect".split()
)


def passing(headers: Any, without: Iterable[str] = ()) -> Headers:
    """Headers that travel on: not the hop's own, nor those that Connection names, nor `without`."""
    named = {n.strip().lower() for v in headers.getall("Connection", ()) for n in v.split(",")}
    gone = HOP_HEADERS | named | set(without)
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in gone)


def accepts(request: Request, coding: str) -> bool:
    offered = request.headers.get("Accept-Encoding", "").lower().replace(" ", "").split(",")
    return coding in [o.partition(";")[0] for o in offered if not o.endswith(";q=0")]


class Source:
    """An upstream's body: `read` gives the next bytes as they came and as they read; b"" at the end."""

    def __init__(self, upstream: Upstream) -> None:
        self.content = upstream.content
        coding = upstream.headers.get("Content-Encoding", "").lower()
        self.coding = "" if coding == "identity" else coding
        self.unpacker = zlib.decompressobj(47) if self.coding else None

    async def read(self) -> tuple[bytes, bytes]:
        raw = await self.content.readany()
        return raw, self.unpacker.decompress(raw) if self.unpacker else raw


class Reply:
    """A stream on its way to the client; comments keep it alive while the upstream is silent."""

    def __init__(self, request: Request, response: Answer, every: float) -> None:
        self.request, self.response, self.every = request, response, every
        self.tail, self.busy, self.loop = b"\n\n", False, asyncio.get_running_loop()
        self.last = self.loop.time()
        self.timer = self.loop.call_later(every, self.pulse) if every else None

    async def write(self, data: bytes, plain: bytes | None = None) -> None:
        """`plain` is how `data` reads when it goes out packed."""
        self.tail = (self.tail + (data if plain is None else plain))[-TAIL:]
        self.last, self.busy = self.loop.time(), True
        if not self.response.prepared:
            await self.response.prepare(self.request)
        if data:
            await self.response.write(data)
        self.busy = False

    def pulse(self) -> None:
        """A comment between two events; never inside one, nor while the client is not reading."""
        silent = self.loop.time() - self.last
        if silent >= self.every and not self.busy and self.tail.endswith((b"\n\n", b"\r\n\r\n")):
            comment = self.loop.create_task(self.write(b": keep-alive\n\n"))
            comment.add_done_callback(lambda task: task.cancelled() or task.exception())
        self.timer = self.loop.call_later(max(self.every - silent, 0) or self.every, self.pulse)

    async def copy(self, source: Source, packed: bool) -> str:
        """The rest of a body; returns what broke the upstream off, "" for nothing."""
        while True:
            try:
                raw, plain = await source.read()
            except NET_ERRORS as error:
                return why(error)
            if not raw:
                return ""
            await self.write(raw if packed else plain, plain)


def cut(request: Request) -> NoReturn:
    """Cut the connection: after the first byte the honest way to say that an answer is not whole."""
    if request.transport:
        request.transport.abort()
    raise ConnectionResetError("the upstream broke off")


# == ampcode.com ===================================================================================
#
# What is no model call goes there as it came: path and query, bodies both ways, WebSockets.  Only the
# credentials change.  Model calls come here when nobody else answers them; that may cost credits.

SECRETS_FILE = Path("~/.local/share/amp/secrets.json")
FLAG = "thread-actors-tui"  # takes clients of April and May 2026 off the proxy (amp-client.md 3)


class Ampcode:
    def __init__(self, live: Live, net: Net, clock: Clock) -> None:
        self.live, self.net, self.clock = live, net, clock
        self.from_file = (0.0, "", "")  # good until, upstream, key
        self.sockets: set[web.WebSocketResponse] = set()

    @property
    def base(self) -> str:
        return str(self.live.config["ampcode"]["upstream-url"]).rstrip("/")

    def upstream_key(self, key: str) -> str:
        """The key for ampcode.com: the client's own row, config, AMP_API_KEY, Amp's secrets file."""
        amp = self.live.config["ampcode"]
        own = (
            row["upstream-api-key"] for row in amp["upstream-api-keys"] if key in row["api-keys"]
        )
        given = (
            next(own, "") or amp["upstream-api-key"] or os.environ.get("AMP_API_KEY", "").strip()
        )
        return str(given or self.file_key())

    def file_key(self) -> str:
        """The secrets file's entry for this upstream; it, or its lack, is kept for five minutes."""
        until, base, key = self.from_file
        if base != self.base or until <= self.clock.monotonic():
            entries, key = Json(), ""
            with suppress(FileNotFoundError):
                try:
                    entries = read_object(SECRETS_FILE.expanduser().read_bytes())
                except ValueError as error:
                    log.error("%s cannot be read: %s", SECRETS_FILE, why(error))
            for name in (f"apiKey@{self.base}/", f"apiKey@{self.base}"):
                key = key or str(entries.get(name) or "").strip()
            self.from_file = (self.clock.monotonic() + 5 * MINUTE, self.base, key)
        return key

    def address(self, request: Request) -> str:
        return self.base + target_without(request, self.live.config["api-keys"])

    def outgoing(self, request: Request, key: str) -> Headers:
        """The client's headers with the upstream key in place of the client's."""
        own = self.upstream_key(key)
        headers = passing(request.headers, KEY_HEADERS if own or key else ())
        if own:
            headers["Authorization"], headers["X-Api-Key"] = f"Bearer {own}", own
        return headers

    async def forward(self, request: Request, key: str, call: Call | None = None) -> Answer:
        """One request there, its answer back; the body of a `call` was read already."""
        headers = self.outgoing(request, key)
        data: Any = call.raw if call else request.content if request.body_exists else None
        if call or data is None:
            headers.popall("Content-Length", None)
        asked = (request.rel_url.raw_path, request.query_string.partition("=")[0])
        edits = self.live.config["ampcode"]["client-inference"] and asked == (
            "/api/internal",
            "getUserInfo",
        )
        if edits:
            headers["Accept-Encoding"] = "identity"
        url = URL(self.address(request), encoded=True)
        try:
            async with self.net.ask(request.method, url, headers=headers, data=data) as upstream:
                return await self.pass_on(request, upstream, call, edits)
        except ProxyError as error:
            if not call:
                body = {"error": "amp_upstream_proxy_error", "message": error.message}
                error.body = compact(body)
            raise

    async def pass_on(
        self, request: Request, upstream: Upstream, call: Call | None, edits: bool
    ) -> Answer:
        headers = passing(upstream.headers)
        first = await opened(upstream, headers, edits)
        if call:
            headers.update(call.marks)
        response = web.StreamResponse(
            status=upstream.status, reason=upstream.reason, headers=headers
        )
        reply = Reply(request, response, 0)
        await reply.write(first, b"")
        if broken := await reply.copy(Source(upstream), True):
            log.warning("ampcode.com broke an answer off: %s", broken)
            if not call or upstream.content_type != "text/event-stream":
                cut(request)
            await reply.write(error_frame(call.dialect, f"ampcode.com broke off: {broken}"))
        await response.write_eof()
        return response

    async def tunnel(self, request: Request, key: str) -> Answer:
        """A WebSocket, frame by frame, with the upstream's choice of subprotocol and its close code."""
        asked = [p.strip() for p in request.headers.get("Sec-WebSocket-Protocol", "").split(",")]
        headers = self.outgoing(request, key)
        for name in {name for name in headers if name.lower().startswith("sec-websocket-")}:
            headers.popall(name)
        url = URL(self.address(request), encoded=True)
        options: Any = {"autoping": False, "max_msg_size": BODY_LIMIT, "proxy": self.net.proxy(url)}
        try:
            upstream = await self.net.session.ws_connect(
                url, headers=headers, protocols=[p for p in asked if p], **options
            )
        except aiohttp.WSServerHandshakeError as error:
            return web.Response(status=error.status, text=error.message)
        except NET_ERRORS as error:
            raise ProxyError(502, f"ampcode.com cannot be reached: {why(error)}") from error
        chosen = [upstream.protocol] if upstream.protocol else []
        client = web.WebSocketResponse(protocols=chosen, autoping=False, max_msg_size=BODY_LIMIT)
        self.sockets.add(client)
        try:
            await client.prepare(request)
            await asyncio.gather(frames(client, upstream), frames(upstream, client))
        finally:
            self.sockets.discard(client)
            await upstream.close()
        return client


async def frames(source: Any, sink: Any) -> None:
    """Pass frames on until the source closes, then close the sink with the same code and reason."""
    send = {
        aiohttp.WSMsgType.TEXT: sink.send_str,
        aiohttp.WSMsgType.BINARY: sink.send_bytes,
        aiohttp.WSMsgType.PING: sink.ping,
        aiohttp.WSMsgType.PONG: sink.pong,
    }
    with suppress(ConnectionError, RuntimeError):
        while (message := await source.receive()).type in send:
            await send[message.type](message.data)
        if message.type == aiohttp.WSMsgType.CLOSE:
            await sink.close(code=message.data or 1000, message=(message.extra or "").encode())
        else:  # cut off: there is no code to repeat
            await sink.close(code=aiohttp.WSCloseCode.INTERNAL_ERROR)


async def opened(upstream: Upstream, headers: Headers, edits: bool) -> bytes:
    """An answer's first bytes, b"" as a rule; all of it, changed, where it must be opened: gzip that no
    header announces, and getUserInfo with its flag.  No whole gzip, or a very large one, passes as it is."""
    streams = upstream.content_type == "text/event-stream" or "Content-Encoding" in headers
    raw = bytearray()
    while edits or not streams:
        try:
            chunk = await upstream.content.readany()
        except NET_ERRORS as error:
            raise ProxyError(502, f"ampcode.com broke off: {why(error)}") from error
        raw += chunk
        packed = raw.startswith((b"\x1f\x8b", b"\x1f") if len(raw) < 2 else b"\x1f\x8b")
        if not chunk or len(raw) > 8 * MIB or not (edits or packed):
            break
    plain = inflate(bytes(raw)) if raw[:2] == b"\x1f\x8b" and upstream.content.at_eof() else None
    body = without_flag(plain or bytes(raw)) if edits else plain or bytes(raw)
    if body != raw:
        headers.popall("Content-Encoding", None)
        headers["Content-Length"] = str(len(body))
    return body


def without_flag(body: bytes) -> bytes:
    """getUserInfo's answer without the flag; untouched when it has none."""
    with suppress(ValueError):
        answer = read_object(body)
        match answer:
            case {"result": {"features": [*features]}}:
                kept = [f for f in features if not (isinstance(f, dict) and f.get("name") == FLAG)]
                answer["result"]["features"] = kept
                return body if kept == features else compact(answer)
    return body


# == Forwarding ====================================================================================
#
# The story of one model call: read it, find who serves the model, ask their accounts in turn, relay the
# first good answer.  Same dialect on both sides: bytes pass untouched, but for the model's name.

ENDINGS = {
    "anthropic": (b"message_stop", b"event: error")
}  # one of them is near a whole stream's end
EVENT = re.compile(rb"(?:\A|\n)data: ?([^\r\n]+)\r?\n\r?\n")
USAGE = re.compile(
    rb'"((?:cache_read_|cache_creation_)?input_tokens|output_tokens)"\s*:\s*(\d{1,15})'
)
STREAM_ERRORS = {kinds[0]: status for status, kinds in KINDS.items()}


class Forwarder:
    def __init__(self, live: Live, net: Net, pool: Pool, amp: Ampcode) -> None:
        self.live, self.net, self.pool, self.amp = live, net, pool, amp

    async def answer(self, call: Call) -> Answer:
        """From the accounts in their order, else from ampcode.com, else a ProxyError."""
        await read_call(call)
        rows = [row for row in self.live.rows() if serves(row, call.model) and self.pool.of(row)]
        rows = [row for row in rows if row["dialect"] == call.dialect]
        error = ProxyError(404, f"no account here serves the model {call.model[:100]!r}")
        for row in rows:
            call.route, call.provider, call.served_model = "local", row["name"], call.model
            error = self.pool.nobody(row)
            headers, body = worded(call, row)
            for account in self.pool.ready(row):
                try:
                    return await self.attempt(call, row, account, headers, body)
                except ProxyError as failed:
                    error = failed
                    if not self.pool.rest(account, failed):
                        raise
        fallback = self.live.config["ampcode"]["fallback"]
        if call.amp and (fallback == "always" or (fallback == "unserved" and not rows)):
            return await self.pay(call, error)
        raise error

    async def pay(self, call: Call, error: ProxyError) -> Answer:
        """The last resort: ampcode.com answers, and may charge for it."""
        hint = "a row of ampcode.model-mappings or another login would keep it here"
        log.warning(
            "AMP_CREDITS %s: %s; ampcode.com may charge; %s", call.model[:100], error.message, hint
        )
        call.route, call.provider, call.account, call.served_model = (
            "amp",
            "ampcode",
            "",
            call.model,
        )
        return await self.amp.forward(call.request, call.key, call)

    async def attempt(
        self, call: Call, row: Row, account: Account, headers: Headers, body: bytes
    ) -> Answer:
        """One account, as often as `request-retry` says; a token that is refused is renewed once."""
        left, refused = self.live.config["request-retry"], ""
        call.account = account.email
        account.in_flight += 1
        account.requests += 1
        try:
            while True:
                token = await self.pool.bearer(row, account, refused)
                headers["Authorization"] = f"Bearer {token}"
                try:
                    answer = await self.exchange(call, row, headers, body)
                    account.wakes, account.reason = 0.0, ""
                    return answer
                except ProxyError as error:
                    left -= error.status in RETRIED
                    if error.status == 401:
                        error.needs_login = bool(refused)
                        refused, token = token, refused
                    if (
                        error.needs_login
                        or (error.status != 401 and error.status not in RETRIED)
                        or not left
                    ):
                        raise
                    await self.pool.clock.sleep(0.5 if error.status in RETRIED else 0)
        finally:
            account.in_flight -= 1
            account.input_tokens += call.input_tokens
            account.output_tokens += call.output_tokens

    async def exchange(self, call: Call, row: Row, headers: Headers, body: bytes) -> Answer:
        """One request to the provider, its answer to the client; ProxyError before the first byte."""
        pairs = [(k, v) for k, v in call.request.query.items() if k not in KEY_PARAMETERS]
        query = f"?{urlencode(pairs)}" if pairs else ""
        url = URL(row["base-url"] + row["paths"][call.verb] + query, encoded=True)
        async with self.net.ask("POST", url, headers=headers, data=body) as upstream:
            if upstream.status != 200:
                raise await refusal(upstream, row["name"])
            if upstream.content_type == "text/event-stream":
                every = self.live.config["streaming"]["keepalive-seconds"]
                return await relay_stream(call, upstream, every)
            return await relay_whole(call, upstream)


def worded(call: Call, row: Row) -> tuple[Headers, bytes]:
    """What goes to the provider: its row's headers, those of the client's that may pass, its body."""
    headers, passes = CIMultiDict(row["headers"]), tuple(row["passes"])
    headers.update((n, v) for n, v in call.request.headers.items() if n.lower().startswith(passes))
    headers["Content-Type"] = "application/json"
    headers["Accept"] = "text/event-stream" if call.stream else "application/json"
    packed = not call.stream and accepts(
        call.request, "gzip"
    )  # comments have no place in a packed stream
    headers["Accept-Encoding"] = "gzip" if packed else "identity"
    if call.verb == "count_tokens":
        call.body = {k: v for k, v in call.body.items() if k not in ("max_tokens", "stream")}
    elif not call.body.get("max_tokens"):
        limits = (int(n) for pattern, n in row["limits"].items() if matches(call.model, [pattern]))
        call.body["max_tokens"] = next(limits, 1024)
    RULES[row["name"]](call.body, headers, row)
    return headers, compact(call.body)


def retry_after(headers: Any) -> float:
    """Seconds of Retry-After, in either of its forms; 0 when there is none."""
    value = headers.get("Retry-After", "")
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


async def refusal(upstream: Upstream, name: str) -> ProxyError:
    """A provider's answer that is no success: its own bytes, readable, and what it asks of retries."""
    raw, said = b"", ""
    with suppress(*NET_ERRORS):
        raw = await upstream.content.read(MIB)
        raw = inflate(raw) or raw
        said = error_text(read_object(raw))
    status = upstream.status if upstream.status >= 400 else 502
    kept = ("request-id", "content-type", "x-should-retry", "anthropic-")
    headers = CIMultiDict((k, v) for k, v in upstream.headers.items() if k.lower().startswith(kept))
    message = f"{name} answered {upstream.status}: {said or raw[:200].decode(errors='replace')}"
    error = ProxyError(status, message, retry_after(upstream.headers))
    error.body, error.headers = (
        (raw, headers) if said and status == upstream.status else (b"", Headers())
    )
    return error


def count_usage(call: Call, data: bytes) -> None:
    """Tokens in and out, from the usage in the first and the last events."""
    most: Counter[bytes] = Counter()
    for name, number in USAGE.findall(data) if call.verb != "count_tokens" else ():
        most[name] = max(most[name], int(number))
    call.output_tokens = most.pop(b"output_tokens", 0)
    call.input_tokens = sum(most.values())


def renamed(data: bytes, answer: Json, asked: str, whole: bool) -> bytes:
    """The answer with the model's name as the client gave it; the same bytes when it is that already."""
    inner = answer.get("message")
    holder = inner if isinstance(inner, dict) else answer
    name = holder.get("model")
    if not isinstance(name, str) or name == asked:
        return data
    pattern = rb'("model"\s*:\s*)' + re.escape(json.dumps(name).encode())
    if whole and len(re.findall(pattern, data)) != 1:  # a tool's input has such a key too
        holder["model"] = asked
        return compact(answer)
    return re.sub(pattern, lambda m: bytes(m[1]) + json.dumps(asked).encode(), data, count=1)


async def relay_whole(call: Call, upstream: Upstream) -> Answer:
    """An answer in one piece; packed as it came where the client takes that and nothing changed."""
    try:
        raw = await upstream.read()
        plain = (inflate(raw) or raw) if raw[:2] == b"\x1f\x8b" else raw
        answer = read_object(plain)
    except NET_ERRORS as error:
        raise ProxyError(
            502, f"{call.provider} answered with no JSON object: {why(error)}"
        ) from error
    count_usage(call, plain)
    body, coding = (
        renamed(plain, answer, call.model, True),
        upstream.headers.get("Content-Encoding", ""),
    )
    headers = passing(upstream.headers, OWN_HEADERS)
    if body is plain and coding and accepts(call.request, coding):
        body, headers["Content-Encoding"] = raw, coding
    headers.update(call.marks)
    response = web.Response(body=body, headers=headers)
    await response.prepare(call.request)
    await response.write_eof()
    return response


async def relay_stream(call: Call, upstream: Upstream, every: float) -> Answer:
    """Events as they come; what breaks after the first byte ends them with the dialect's error event."""
    source, headers, head = Source(upstream), passing(upstream.headers, OWN_HEADERS), b""
    headers.update(call.marks)
    packed = bool(source.coding) and accepts(call.request, source.coding)
    response = web.StreamResponse(headers=headers)
    reply = Reply(call.request, response, 0 if packed else every)
    try:
        raw, head, first = await read_head(call, source)
        named = renamed(head, first, call.model, False)
        packed = packed and named is head
        if packed:
            response.headers["Content-Encoding"] = source.coding
        await reply.write(raw if packed else named, named)
        call.trouble = await reply.copy(source, packed)
        if not call.trouble and not any(end in reply.tail for end in ENDINGS[call.dialect]):
            call.trouble = "the stream stopped before its end"
    except ProxyError as error:
        if not response.prepared:
            raise
        call.trouble = error.message
    finally:
        if reply.timer:
            reply.timer.cancel()
        count_usage(call, head + reply.tail)
    if call.trouble and packed:
        cut(call.request)
    if call.trouble:
        await reply.write(error_frame(call.dialect, f"{call.provider}: {call.trouble}"))
    await response.write_eof()
    return response


async def read_head(call: Call, source: Source) -> tuple[bytes, bytes, Json]:
    """A stream up to the end of its first event that is no ping, as it came and as it reads, and that
    event.  ProxyError when it is an error, or when none comes."""
    raw = plain = b""
    while True:
        try:
            more_raw, more = await source.read()
            raw, plain = raw + more_raw, plain + more
            events = [read_object(found) for found in EVENT.findall(plain)]
        except NET_ERRORS as error:
            raise ProxyError(502, f"{call.provider} sent a broken stream: {why(error)}") from error
        first = next((event for event in events if event.get("type") != "ping"), None)
        if first and first.get("type") == "error":
            inner = first.get("error")
            kind = inner.get("type") if isinstance(inner, dict) else ""
            raise ProxyError(
                STREAM_ERRORS.get(str(kind), 502), f"{call.provider}: {error_text(first)}"
            )
        if first:
            return raw, plain, first
        if not more_raw or len(plain) > MIB:
            raise ProxyError(502, f"{call.provider}'s stream stopped before it began")


# == The server ====================================================================================
#
# The one place that takes requests: checks, dispatch, and the one exit for errors.

ROUTE_WORDS = {
    "local": "LOCAL_PROVIDER",
    "mapped": "MODEL_MAPPING",
    "amp": "AMP_CREDITS",
    "none": "NO_PROVIDER",
}


class Connection(web.RequestHandler):
    """A client that ends its side in the middle of a body is still told what was wrong with it."""

    def eof_received(self) -> bool | None:  # type: ignore[override]
        request = self._current_request
        if request is None or request.content.is_eof():
            return None  # it left: the connection closes, the handler is cancelled
        request.content.set_exception(ConnectionResetError("cut short"))
        return True


class Listener(web.Server):
    def __call__(self) -> web.RequestHandler:
        return Connection(self, loop=self._loop, **self._kwargs)


def json_response(value: Json) -> web.Response:
    return web.Response(body=compact(value), content_type="application/json")


class Server:
    """Everything that one running proxy consists of."""

    def __init__(self, live: Live, net: Net, clock: Clock) -> None:
        self.live, self.net, self.clock = live, net, clock
        self.pool = Pool(live, net, clock)
        self.amp = Ampcode(live, net, clock)
        self.forwarder = Forwarder(live, net, self.pool, self.amp)
        self.began, self.server_side = clock.monotonic(), 0
        self.routes: Counter[str] = Counter(dict.fromkeys(ROUTE_WORDS, 0))
        self.requests: deque[Json] = deque(maxlen=100)

    async def handle(self, request: Request) -> Answer:
        """Any request; errors leave here, worded in the path's dialect."""
        call, began, status = find_call(request), self.clock.monotonic(), 499
        try:
            try:
                response = await self.dispatch(request, call)
            except ProxyError as error:
                response = self.refuse(request, call, error)
            except (ConnectionError, asyncio.CancelledError):
                raise  # the client is gone, or was cut off on purpose
            except Exception as error:  # a fault of this program: said in a line, survived
                log.error("internal error: %s", why(error), exc_info=self.live.config["debug"])
                response = self.refuse(
                    request, call, ProxyError(500, "internal error of ampproxy, see its log")
                )
            status = response.status
            return response
        finally:
            if call and call.raw:
                self.note(call, status, self.clock.monotonic() - began)

    def refuse(self, request: Request, call: Call | None, error: ProxyError) -> Answer:
        if call:
            error.headers.update(call.marks)
        response = error_response(call.dialect if call else "", error)
        if not request.content.is_eof():
            response.force_close()
        return response

    def note(self, call: Call, status: int, took: float) -> None:
        """One finished model call: a row of the status, a line of the log."""
        self.routes[call.route] += 1
        names = (
            "dialect",
            "model",
            "route",
            "provider",
            "account",
            "served_model",
            "input_tokens",
            "output_tokens",
        )
        row = {name: getattr(call, name) for name in names}
        row |= {"time": rfc3339(self.clock.time()), "status": status, "seconds": round(took, 3)}
        self.requests.append(row | {n: row[n][:200] for n in ("model", "served_model")})
        level = logging.WARNING if call.trouble or status >= 400 else logging.INFO
        who = f"{call.provider or '-'} {mask(call.account) if call.account else ''}"
        told = (ROUTE_WORDS[call.route], call.model[:100] or "-", who, status, took, call.trouble)
        log.log(level, "%s %s %s %d %.1f s %s", *told)

    async def dispatch(self, request: Request, call: Call | None) -> Answer:
        """Checks first, then whoever the path belongs to."""
        config, path, method = self.live.config, request.rel_url.raw_path, request.method
        if not request.raw_path.startswith("/"):
            raise ProxyError(400, "only targets that begin with / are served")
        refuse_strangers(request, config)
        if method in ("GET", "HEAD") and path == "/healthz":
            return json_response({"status": "ok"})
        if method == "HEAD" and path in ("/", "/api/hello"):
            return web.Response(status=200 if path == "/" else 404)
        if is_browser_path(request):
            return web.Response(status=302, headers={"Location": self.amp.address(request)})
        key = client_key(request, config["api-keys"]) if config["api-keys"] else ""
        if call and (call.verb == "models" or method == "POST" or not call.amp):
            return await self.model_call(call, key)
        if config["ampcode"]["restrict-management-to-localhost"] and not path.startswith(
            "/api/provider/"
        ):
            check_local(request)
        if method == "GET" and path in ("/", "/status"):
            return json_response(self.report())
        if path == "/api/thread-actors" and method == "POST":
            self.server_side += 1
            log.warning(
                "AMP_CREDITS this client's model runs on Amp's servers: Amp bills it, no login of yours answers"
            )
        return await (self.amp.tunnel if is_upgrade(request) else self.amp.forward)(request, key)

    async def model_call(self, call: Call, key: str) -> Answer:
        call.key = key
        if is_upgrade(call.request):
            raise ProxyError(426, "model calls are not served over WebSockets here: use POST")
        if call.verb == "models":
            return json_response(self.models())
        if call.request.method != "POST":
            raise ProxyError(405, f"{call.request.method} is not served here: use POST")
        if call.request.headers.get("Expect", "").lower() == "100-continue":
            await call.request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return await self.forwarder.answer(call)

    def models(self) -> Json:
        """What the present accounts can serve."""
        rows = [row for row in self.live.rows() if self.pool.of(row)]
        ids = [(name, row["name"]) for row in rows for name in row["known"] if serves(row, name)]
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": owner} for name, owner in ids
        ]
        return {"object": "list", "data": data}

    def report(self) -> Json:
        """GET /status: names, counts and times; never a secret, never a prompt."""
        return {
            "version": __version__,
            "uptime_seconds": round(self.clock.monotonic() - self.began),
            "routes": dict(self.routes),
            "server_side_threads": self.server_side,
            "accounts": [self.report_account(account) for account in self.pool.accounts.values()],
            "requests": list(self.requests),
        }

    def report_account(self, account: Account) -> Json:
        now, ends = self.clock.monotonic(), expiry(account.token)
        state = account.state(now)
        names = ("in_flight", "requests", "errors", "input_tokens", "output_tokens")
        return {
            "provider": account.provider, "account": account.email, "state": state,
            "reason": account.reason if state != "ready" else "", "plan": account.token.get("plan", ""),
            "wakes_in_seconds": round(account.wakes - now) if state == "resting" else None,
            "expires_in_seconds": None if ends == float("inf") else round(ends - self.clock.time()),
            "threads": 0, "quota": [], **{name: getattr(account, name) for name in names},
        }  # fmt: skip

    async def watch(self) -> None:
        """Look, once a second, at the config file, the auth directory and the tokens that end soon."""
        while True:
            await self.clock.sleep(1)
            try:
                self.tick()
            except OSError as error:
                log.error("watching the files failed: %s", why(error))

    def tick(self) -> None:
        if self.live.reload():
            set_up_log(self.live)
        self.pool.scan()
        self.pool.refresh_ahead()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        """The open port; on the way out running answers get ten seconds, a running refresh all it needs."""
        self.pool.scan()
        options: Any = {"auto_decompress": False, "max_line_size": 65536, "max_field_size": 65536}
        server = Listener(self.handle, handler_cancellation=True, access_log=None, **options)
        hint = "is ampproxy running already? --port takes another one"
        try:
            async with listen(
                server, self.live.config["host"], self.live.config["port"], hint, 10
            ) as port:
                yield port
                for socket in list(self.amp.sockets):
                    await socket.close(code=aiohttp.WSCloseCode.GOING_AWAY)
            if running := [a.refreshing for a in self.pool.accounts.values() if a.refreshing]:
                await asyncio.wait(running, timeout=REFRESH_WAIT)
        finally:
            await self.net.session.close()

    async def run(self) -> None:
        """Serve until SIGINT or SIGTERM."""
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            with suppress(NotImplementedError):  # Windows: there Ctrl-C ends the program at once
                loop.add_signal_handler(name, stop.set)
        async with self.serving() as port:
            log.info(
                "ampproxy %s answers on http://%s:%d", __version__, self.live.config["host"], port
            )
            watcher = asyncio.create_task(self.watch())
            await stop.wait()
            watcher.cancel()
            log.info("stopping: running answers get 10 seconds")


def set_up_log(live: Live) -> None:
    """Standard error, and a rotating file where that is asked for; every line is masked on its way."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if live.config["logging-to-file"]:
        path = live.auth_dir / "logs" / "ampproxy.log"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        handlers.append(logging.handlers.RotatingFileHandler(path, maxBytes=5 * MIB, backupCount=3))
    for handler in handlers:
        handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
        )
        handler.addFilter(Redact())
    log.handlers, log.propagate = handlers, False
    log.setLevel(logging.DEBUG if live.config["debug"] else logging.INFO)
    for name in ("aiohttp", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for line in live.warnings:
        log.warning("%s", line)


# == Command line ==================================================================================
#
# One function a command.  What cannot be done raises Failure, which main says in one sentence.

NAMES = {alias: name for name, row in DEFAULTS["providers"].items() if row["dialect"]
         for alias in (name, *row["aliases"])}  # fmt: skip


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """The event loop: uvloop's where it is installed."""
    factory = uvloop.new_event_loop if "uvloop" in globals() else None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work)


def command_serve(live: Live, args: argparse.Namespace) -> None:
    async def serve() -> None:
        await Server(live, Net(live), Clock()).run()

    set_up_log(live)
    run(serve())


def command_login(live: Live, args: argparse.Namespace) -> None:
    if not args.provider:
        raise Failure(
            f"say which provider: ampproxy.py login {'|'.join(sorted(set(NAMES.values())))}"
        )
    row = live.row(NAMES[args.provider])

    async def login() -> tuple[str, Path]:
        return await Login(live, row, Clock()).run(has_browser() and not args.no_browser)

    email, path = run(login())
    say(f"Signed in to {row['name']} as {email}; the login is kept in {path}")


def accounts_of(live: Live) -> list[Account]:
    pool = Pool(live)
    pool.scan()
    return sorted(pool.accounts.values(), key=lambda account: (account.provider, account.path))


def command_logout(live: Live, args: argparse.Namespace) -> None:
    name = NAMES[args.provider]
    there = [a for a in accounts_of(live) if a.provider == name]
    wanted = [a for a in there if args.account in (None, a.email, a.path.name, a.path.stem)]
    listed = ", ".join(a.email for a in there) or "none"
    if len(wanted) != 1:
        problem = "several accounts: say which one" if wanted else "no such account"
        raise Failure(f"{name}: {problem} (in {live.auth_dir}: {listed})")
    wanted[0].path.unlink()
    say(f"Logged out of {name} as {wanted[0].email}: {wanted[0].path} is deleted")


def command_accounts(live: Live, args: argparse.Namespace) -> None:
    rows = [("PROVIDER", "ACCOUNT", "PLAN", "EXPIRES", "STATE", "FILE")]
    for a in accounts_of(live):
        left = (expiry(a.token) - time.time()) / HOUR
        ends = (
            "never" if left == float("inf") else f"in {left:.1f} h" if left > 0 else "refresh due"
        )
        rows.append(
            (a.provider, a.email, str(a.token.get("plan", "-")), ends, a.state(0), str(a.path))
        )
    if len(rows) == 1:
        return say(f"No accounts in {live.auth_dir} yet. Next: ampproxy.py login claude")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return None


def command_check(live: Live, args: argparse.Namespace) -> None:
    """What is in effect; the file was checked when it was read."""
    for line in live.warnings:
        say(f"warning: {line}")
    say(f"# In effect, from {live.path or 'the defaults (no config.yaml was found)'}:")
    say(yaml.safe_dump(masked(live.config), sort_keys=False, allow_unicode=True).rstrip())


def masked(value: Any, key: str = "") -> Any:
    """A copy with every secret cut to its first letters, at any depth."""
    if isinstance(value, dict):
        return {k: masked(v, f"{key} {k}".lower()) for k, v in value.items()}
    if isinstance(value, list):
        return [masked(v, key) for v in value]
    secret = re.search(
        r"api-keys?$|secret$|proxy-url$|authorization$|cookie$|[-_](key|token)$", key
    )
    return mask(value) if secret and value and isinstance(value, str) else value


COMMANDS: dict[str, tuple[Callable[[Live, argparse.Namespace], None], str]] = {
    "serve": (command_serve, "run the proxy; also without a command"),
    "login": (command_login, "sign in to a provider; several logins are several accounts"),
    "logout": (command_logout, "delete a login"),
    "accounts": (command_accounts, "list the accounts"),
    "check": (command_check, "check the configuration, print what is in effect"),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; argparse ends the program with status 2 for one that makes no sense."""
    options: Any = {"add_help": False, "allow_abbrev": False, "argument_default": argparse.SUPPRESS}
    common, serve = argparse.ArgumentParser(**options), argparse.ArgumentParser(**options)
    common.add_argument("--config", metavar="FILE", help="the configuration file")
    serve.add_argument("--host", metavar="H", help="listen on this address")
    serve.add_argument("--port", metavar="N", type=int, help="listen on this port")
    serve.add_argument("--debug", action="store_true", help="say more in the log")
    parser = argparse.ArgumentParser(
        prog="ampproxy.py", allow_abbrev=False, parents=[common, serve],
        description="The model calls of AI coding clients, answered by your own subscriptions.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"ampproxy {__version__}")
    parser.set_defaults(command="serve")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    made = {
        name: commands.add_parser(
            name, help=about, description=about, allow_abbrev=False,
            parents=[common, serve] if name == "serve" else [common],
        )
        for name, (_, about) in COMMANDS.items()
    }  # fmt: skip
    made["login"].add_argument("provider", nargs="?", choices=NAMES)
    made["login"].add_argument(
        "--no-browser", action="store_true", help="print the address, open nothing"
    )
    made["logout"].add_argument("provider", choices=NAMES)
    made["logout"].add_argument("account", nargs="?", help="the e-mail address or the file's name")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0 done, 1 failed (one sentence on standard error says what to do), 2 wrong usage."""
    args = parse(argv)
    given = {name: getattr(args, name) for name in ("host", "port", "debug") if hasattr(args, name)}
    try:
        COMMANDS[args.command or "serve"][0](
            Live(find_config(getattr(args, "config", None)), **given), args
        )
        return 0
    except Failure as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename or 'the system'}: {error.strerror or error}"
    except KeyboardInterrupt:
        problem = "stopped"
    print(f"ampproxy: {problem}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
