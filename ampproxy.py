#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.11.10,<4", "pyyaml>=6,<7"]
# ///
"""The model calls of AI coding clients, answered by the subscriptions you already pay for.

provider   who answers model calls: claude, codex or who an API key is of; each is a row of a table
dialect    how bytes are worded: anthropic, chat, responses or gemini
account    one signed-in subscription, kept as one token file, or one API key of the config
rest       the time during which an account is left alone after an error
ampcode    ampcode.com: gets what is no model call, and the model calls that nobody here serves

Start at Server.handle; model calls go on to Forwarder.answer, the rest to Ampcode.forward.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import difflib
import fnmatch
import functools
import hashlib
import importlib.util
import json
import logging
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
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from urllib.parse import parse_qsl, quote, unquote, unquote_plus, urlencode

try:
    import aiohttp
    import yaml
    from aiohttp import web
    from multidict import CIMultiDict
    from yarl import URL
except ImportError as error:
    sys.exit(f"ampproxy needs {error.name}: `uv run ampproxy.py`, or pip install aiohttp pyyaml")

__version__ = "0.1.0"

# == Common ground =================================================================================
# A Failure is a sentence for the person at the terminal, a ProxyError one for the client.
Json = dict[str, Any]
Headers = CIMultiDict[str]
Answer = web.StreamResponse
Upstream = aiohttp.ClientResponse
MINUTE, HOUR, DAY, BODY_LIMIT, PACKED = 60, 3600, 86400, 64 << 20, "Content-Encoding"
FINITE: Json = {"parse_float": lambda n: float(n) if abs(float(n)) < float("inf") else int(n)}
ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)
CLOCK = SimpleNamespace(time=time.time, monotonic=time.monotonic, sleep=asyncio.sleep)
log = logging.getLogger("ampproxy")


class Failure(Exception): ...


class ProxyError(Exception):  # `said`, `body` and `headers` are the provider's, if any
    def __init__(
        self, status: int, message: str, retry_after: float = 0, said: str = "", body: bytes = b""
    ) -> None:
        self.status, self.message, self.retry_after = status, message, retry_after
        self.said, self.body, self.headers = said, body, Headers()


def compact(value: Any) -> bytes:
    return ENCODER.encode(value).encode(errors="backslashreplace")


def read_object(raw: bytes) -> Json:
    try:
        return {**json.loads(raw.decode(), parse_constant=int, **FINITE)}  # int refuses NaN, 1e999
    except (TypeError, RecursionError) as error:  # of the line above, and of deep nesting
        raise ValueError("no JSON object, or nested too deeply") from error


def table(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float:
    with suppress(ValueError):
        value = float(value) if isinstance(value, str) else value
    return value if isinstance(value, (int, float)) and abs(value) < 1e11 else 0


def seconds(text: str | int) -> float:
    parts = re.findall(r"([\d.]*\d)(ms|[smh]?)", str(text))
    return sum(number(n) * {"ms": 0.001, "m": MINUTE, "h": HOUR}.get(u, 1) for n, u in parts)


def inflate(raw: bytes) -> bytes | None:
    with suppress(zlib.error):
        unpacker = zlib.decompressobj(31)
        plain = unpacker.decompress(raw, BODY_LIMIT + 1)
        return plain if unpacker.eof and not unpacker.unused_data.strip(b"\0") else None
    return None


def why(error: BaseException) -> str:
    text = error.message if isinstance(error, ProxyError) else str(error) or type(error).__name__
    return re.sub(r"//[^/\s]+@", "//", text)  # a proxy's password


def same(one: str, other: str) -> bool:
    return secrets.compare_digest(one.encode(errors="replace"), other.encode(errors="replace"))


def mask(secret: str) -> str:
    return f"{secret[:3]}..." if len(secret) > 6 else "..."


SECRET = re.compile(r"(?P<kind>(claude|codex|gemini|antigravity)-)?(?P<mail>[\w.+%-]{1,64}@[\w.-]+)"
                    r"|(sk-|sgamp_|ya29|AIza|eyJ|rt_)[\w.~+/=-]{8,}|(?<=Bearer )\S+")  # fmt: skip


def redact(record: logging.LogRecord) -> bool:
    line = SECRET.sub(lambda m: (m["kind"] or "") + mask(m["mail"] or m[0]), record.getMessage())
    record.msg, record.args = re.sub(r"[\x00-\x1f\x7f]", "?", line), None
    return True


KINDS = {  # what SDKs look for: Anthropic's type, OpenAI's, Google's status; and other words for it
    400: ("invalid_request_error", "invalid_request_error", "INVALID_ARGUMENT", "invalid_prompt",
          "context_length_exceeded", "invalid_encrypted_content"),
    401: ("authentication_error", "authentication_error", "UNAUTHENTICATED"),
    403: ("permission_error", "permission_error", "PERMISSION_DENIED"),
    404: ("not_found_error", "not_found_error", "NOT_FOUND"),
    413: ("request_too_large", "invalid_request_error", "INVALID_ARGUMENT"),
    429: ("rate_limit_error", "rate_limit_error", "RESOURCE_EXHAUSTED", "rate_limit_exceeded",
          "usage_limit_reached", "insufficient_quota"),
    500: ("api_error", "server_error", "INTERNAL"),
    529: ("overloaded_error", "server_error", "UNAVAILABLE", "server_is_overloaded")}  # fmt: skip
STATUSES = {str(code): code for code in range(400, 600)}
STATUSES |= {kind: code for code in reversed(KINDS) for kind in KINDS[code]}


def error_body(dialect: str, status: int, message: str) -> Json:
    anthropic, openai, google, *_ = KINDS.get(status, KINDS[400 if status < 500 else 500])
    if dialect == "anthropic":
        return {"type": "error", "error": {"type": anthropic, "message": message}}
    if dialect == "gemini":
        return {"error": {"code": status, "message": message, "status": google}}
    return {"error": {"message": message, "type": openai, "code": openai} if dialect else message}


def error_frame(dialect: str, status: int, message: str) -> bytes:
    """The event that ends a broken stream; its first newline closes a line that was cut short."""
    body, kind = error_body(dialect, status, message), {"anthropic": b"event: error\n"}
    if dialect == "responses":  # Codex takes notice of no other (clients.md)
        body = {"type": "response.failed", "response": {"status": "failed", **body, "output": []}}
    return b"\n%bdata: %b\n\n" % (kind.get(dialect, b""), compact(body))


# == Configuration and provider table ==============================================================
# One YAML file with CLIProxyAPI's names, read over these defaults, whose types are rules: a|b is
# a choice, "!" what a table needs, a list with "" or a table in it shows a member and is empty.
# `providers` is the provider table (providers.md).  To add one, add a row and a rule in RULES.
DEFAULTS: Json = yaml.safe_load(r"""
{host: 127.0.0.1, port: 8317, auth-dir: ~/.ampproxy, api-keys: [''], debug: false, proxy-url: '',
 logging-to-file: false, request-retry: 3, max-retry-interval: 30.0, max-cooldown: 1800.0,
 routing: {strategy: least-connections|round-robin|fill-first, session-affinity-ttl: 2h},
 ampcode: {upstream-url: https://ampcode.com, upstream-api-key: '', fallback: always|unserved|never,
  upstream-api-keys: [{upstream-api-key!: '', api-keys!: ['']}], force-model-mappings: false,
  model-mappings: [{from!: '', to!: [''], regex: false}], restrict-management-to-localhost: false,
  client-inference: true}, streaming: {keepalive-seconds: 15.0, idle-timeout-seconds: 300.0},
 claude-api-key: [{api-key!: '', base-url: https://api.anthropic.com, <<: &key {headers: {},
   models: [&model {name!: '', alias: ''}, claude-*], excluded-models: [''], max-tokens: 32000,
   passes: [anthropic-version, anthropic-beta, anthropic-dangerous-*, openai-beta, user-agent,
            x-goog-api-client, x-app, x-stainless-*, x-claude-code-*],  # of a client's headers
   thinking: {claude-*: 1024-59904, 'claude-opus-4-[012]*': 1024-27904, claude-fable-*: &five low
     medium high xhigh max, 'claude-opus-4-[78]*': *five, claude-opus-4-6*: low medium high max,
     claude-sonnet-4-6*: &three low medium high, gemini-3.1-pro*: *three, gemini-3-pro*: low high,
     gemini-*: minimal low medium high, gemini-2*: 0-24576, gemini-2.5-pro*: 128-32768, gemma-*: '',
     claude-3-5-*: '', '*': none minimal low medium high xhigh},  # levels, or a range of budgets
   key-header: Authorization, key-host: ''}, headers: &version {anthropic-version: '2023-06-01'},
  key-header: x-api-key, key-host: api.anthropic.com,  # to other hosts it is a bearer token
  paths: &messages {messages: /v1/messages, count_tokens: /v1/messages/count_tokens}}],
 codex-api-key: [{<<: *key, api-key!: '', base-url: https://api.openai.com,
  models: [*model, gpt-*, chatgpt-*, codex-*, 'o[1-9]*'], paths: {responses: /v1/responses,
   compact: /v1/responses/compact, completions: &chat /v1/chat/completions}}],
 gemini-api-key: [{<<: *key, api-key!: '', base-url: https://generativelanguage.googleapis.com,
  models: [*model, gemini-*, gemma-*], key-header: x-goog-api-key, paths: {generateContent: &verb
   '/v1beta/models/{model}:{verb}', streamGenerateContent: *verb, countTokens: *verb}}],
 openai-compatibility: [{<<: *key, name!: '', base-url!: '', models: [*model],
  api-key-entries: [{api-key!: ''}], paths: {completions: *chat}}],
 providers: {claude: &claude {<<: *key, enabled: true, aliases: [anthropic], paths: *messages,
   base-url: https://api.anthropic.com, headers: {<<: *version, anthropic-beta: oauth-2025-04-20},
   models: [*model, claude-opus-4-8, claude-opus-4-7, claude-opus-4-6, claude-opus-4-5-20251101,
            claude-sonnet-4-6, claude-sonnet-4-5-20250929, claude-haiku-4-5-20251001, claude-*],
   authorize-url: https://claude.ai/oauth/authorize, authorize-query: {code: 'true'},
   token-url: https://api.anthropic.com/v1/oauth/token, client-secret: '', callback-port: 54545,
   profile-url: https://api.anthropic.com/api/oauth/profile, token-form: false, refresh-lead: 300,
   client-id: 9d1c250a-e61b-44d9-88ed-5944d1962f5e, callback-path: /callback, identity: true,
   scope: user:profile user:inference user:sessions:claude_code user:mcp_servers user:file_upload},
  codex: {<<: *claude, aliases: [openai, chatgpt], base-url: https://chatgpt.com/backend-api/codex,
   paths: {responses: /backend-api/codex/responses, compact: /backend-api/codex/responses/compact},
   passes: [originator, user-agent, version, openai-beta, session-id, session_id, x-codex-*],
   models: [*model, gpt-5.5, gpt-5.4, gpt-5.4-mini, gpt-5.3-codex-spark, gpt-*, codex-*],
   headers: {originator: codex_cli_rs, User-Agent: codex_cli_rs/0.101.0}, token-form: true,
   drops: [max_*, top_*, '*_penalty', 'prompt_cache_[ro]*', temperature, user, truncation, n, seed,
           stop, context_*, metadata, safety_*, stream_o*, log*, '*_format', reasoning_e*],
   authorize-url: https://auth.openai.com/oauth/authorize, profile-url: '',
   authorize-query: {id_token_add_organizations: 'true', codex_cli_simplified_flow: 'true'},
   token-url: https://auth.openai.com/oauth/token, client-id: app_EMoamEEZ73f0CkXaXp7hrann,
   callback-port: 1455, callback-path: /auth/callback, scope: openid email profile offline_access},
  gemini: &later {enabled: true, paths: {}}, antigravity: *later}}
""")
any_of = functools.cache(lambda globs: re.compile("(?i)" + "|".join(map(fnmatch.translate, globs))))
KEY_LISTS = ("claude-api-key", "codex-api-key", "gemini-api-key", "openai-compatibility")
RANGES = {"port": (0, 65535), "callback-port": (0, 65535), "request-retry": (1, 100)}
WORDS = {bool: "true or false", int: "a whole number", float: "a number", list: "a list",
         dict: "a table", str: "a text (in quotes, if it looks like something else)"}  # fmt: skip


def default(example: Any) -> Any:
    if isinstance(example, dict):
        return {name.rstrip("!"): default(inner) for name, inner in example.items()}
    if isinstance(example, list):
        return [m for m in (example[1:] if isinstance(example[0], dict) else example) if m]
    return example.split("|")[0] if isinstance(example, str) else example


class ConfigFile:
    def __init__(self, path: Path, running: bool) -> None:
        self.path, self.warnings = path, list[str]()
        try:
            self.loader: Any = yaml.SafeLoader(path.read_text(encoding="utf-8"))
            node = self.loader.get_single_node()
            if running and (node is None or not node.value or node.tag.endswith(":null")):
                raise ValueError("it is empty")
            self.config: Json = self.read(node, DEFAULTS, "")
        except (yaml.YAMLError, OSError, ValueError, TypeError, RecursionError) as error:
            mark, problem = (getattr(error, name, None) for name in ("problem_mark", "problem"))
            place = f"{path}:{mark.line + 1}" if mark else f"{path}"
            raise Failure(f"{place}: cannot be read: {problem or why(error)}") from error

    def fail(self, node: yaml.Node, key: str, reason: str) -> NoReturn:
        raise Failure(f"{self.path}:{node.start_mark.line + 1}: {key[1:] or 'the file'}: {reason}")

    def read(self, node: yaml.Node | None, example: Any, key: str) -> Any:
        if node is None or node.tag.endswith(":null") or (node.value == "" and "base-url" in key):
            return default(example)
        if isinstance(node, yaml.MappingNode) and isinstance(example, dict):
            return self.read_table(node, example, key)
        if isinstance(node, yaml.SequenceNode) and isinstance(example, list):
            return [self.read(n, example[0], f"{key}[{i}]") for i, n in enumerate(node.value)]
        value, name = self.loader.construct_object(node, deep=True), key.rpartition(".")[2]
        for variable in re.findall(r"\$\{(\w+)\}", value) if isinstance(value, str) else ():
            if variable not in os.environ:
                self.fail(node, key, f"the environment variable {variable} is not set")
            value = value.replace(f"${{{variable}}}", os.environ[variable])
        match example, value:  # short forms: a switch for a row, a text for a list or a model
            case {"enabled": _}, bool():
                return {**default(example), "enabled": value}
            case [""], str() if name == "to" and value:
                return [value]
            case {"alias": _}, str() if value:
                return value
        if expected := self.misfit(example, value, name):
            self.fail(node, key, f"expected {expected}")
        return value.strip() if isinstance(value, str) else value

    def misfit(self, example: Any, value: Any, name: str) -> str:
        kind, words, (low, high) = type(example), WORDS[type(example)], RANGES.get(name, (0, 1e9))
        fits: Any = type(value) is kind or (kind, type(value)) == (float, int)
        if kind in (int, float):
            fits, words = fits and low <= value <= high, f"{words} from {low} to {high:g}"
        elif kind is str and "|" in example:
            fits, words = value in example.split("|"), f"one of {example.replace('|', ', ')}"
        elif name.endswith("-url"):
            words, fits = "an address that begins with http:// or https://", fits and value == ""
            with suppress(ValueError, TypeError):
                fits = fits or (URL(value).scheme in ("http", "https") and URL(value).host)
        elif re.fullmatch(r"(\d+[smh])+", str(example)):
            fits = re.fullmatch(r"\d+|(\d+[smh])+", str(value))
            words = "a length of time such as 2h, 30m or 90"
        return "" if fits else words

    def read_table(self, node: yaml.MappingNode, example: Json, key: str) -> Json:
        self.loader.flatten_mapping(node)
        names = {name.rstrip("!"): inner for name, inner in example.items()}
        given = {str(name.value): value for name, value in node.value}
        if key.rpartition(".")[2] in ("headers", "paths", "authorize-query", "thinking"):
            names |= dict.fromkeys(given, "")
        values = {name: self.read(given.get(name), names[name], f"{key}.{name}") for name in names}
        for name, inner in example.get("ampcode", {}).items():  # CLIProxyAPI's older names
            old = given.pop(f"amp-{name}", None)
            if old and values["ampcode"][name] == default(inner):
                values["ampcode"][name] = self.read(old, inner, f".amp-{name}")
        for node_name in (n for n, _ in node.value if n.value in given.keys() - names):
            near = difflib.get_close_matches(node_name.value, names, 1, 0)[0]
            told = f"unknown key {node_name.value!r}; the nearest is {near!r}"
            self.warnings.append(f"{self.path}:{node_name.start_mark.line + 1}: {told}")
        if missing := [n[:-1] for n in example if n.endswith("!") and not values[n[:-1]]]:
            self.fail(node, key, f"needs {missing[0]!r}")
        try:
            re.compile(values["from"] if values.get("regex") else "")
        except re.error as error:
            self.fail(given["from"], f"{key}.from", f"is no regular expression: {error}")
        return values


def find_config(given: str | None) -> Path | None:
    folders = (Path.cwd(), Path(__file__).resolve().parent, Path("~/.config/ampproxy").expanduser())
    found = (d / "config.yaml" for d in folders if (d / "config.yaml").is_file())
    return Path(given).expanduser() if given else next(found, None)


def is_loopback(host: str) -> bool:
    return bool(re.fullmatch(r"(::ffff:)?127(\.\d+){3}|::1|localhost", host.lower()))


def stamp(path: Path) -> tuple[int, ...] | None:
    with suppress(OSError):
        return (found := path.stat()).st_mtime_ns, found.st_size, found.st_ino
    return None


class Live:
    def __init__(self, path: Path | None, **given: Any) -> None:
        self.path, self.given, self.seen = path, given, path and stamp(path)
        self.load()
        self.given |= {"host": self.config["host"], "port": self.config["port"]}

    def load(self, running: bool = False) -> None:
        file = ConfigFile(self.path, running) if self.path else None
        config: Json = {**(file.config if file else default(DEFAULTS)), **self.given}
        config["api-keys"] = [key for key in config["api-keys"] if key]
        if not is_loopback(config["host"]) and not config["api-keys"]:
            raise Failure(f"host {config['host']!r} is open to other machines: set api-keys")
        self.auth_dir = Path(config["auth-dir"]).expanduser()
        self.config, self.warnings = config, file.warnings if file else []
        keys = [(kind, entry | key) for kind in KEY_LISTS for entry in config[kind]
                for key in entry.get("api-key-entries", [{}]) or [{"api-key": "-"}]]  # fmt: skip
        pairs = [*config["providers"].items(), *keys]
        self.rows = [as_row(k, e) for k, e in pairs if e.get("enabled", True) and e["paths"]]

    def reload(self) -> bool:
        """Whether the file has changed and is in effect; raises for a broken one, once."""
        seen, self.seen = self.seen, (self.path and stamp(self.path)) or self.seen
        if self.seen != seen:
            self.load(running=True)
            log.info("%s is taken up", self.path)
        return self.seen != seen


def as_row(kind: str, entry: Json) -> Json:
    """`models` by the names for clients; `id`: the type of its logins, or a path for its key."""
    models = [m if isinstance(m, dict) else {"name": m, "alias": ""} for m in entry["models"]]
    row = {"name": kind, "kind": kind, "id": kind, **entry}
    row["models"] = {m["alias"] or m["name"]: m["name"] for m in models}
    if "api-key" in row:
        name = hashlib.sha256(f"{row['base-url']} {row['api-key']}".encode()).hexdigest()[:8]
        token = {"type": kind, "email": f"{name} {row['name']}", "access_token": row["api-key"]}
        row |= {"id": Path(row["name"], name), "token": token}
    return row


def matches(name: str, patterns: Collection[str]) -> bool:
    return bool(patterns and any_of(tuple(patterns)).match(name))


# == Provider rules ================================================================================
# What a login's backend asks of a request (providers.md 1.3, 2.3), changed in place.
IDENTITY = "You are Claude Code, Anthropic's official CLI for Claude."
SIGNATURE = re.compile(r"E[g-v]|R[WX]")  # base64 of a first byte 0x12, once or twice encoded (12)
TOOL_USE_KEYS = {"type", "id", "name", "input", "cache_control", "caller"}


def prepare_claude(body: Json, headers: Headers, row: Json) -> None:
    """The beta list, then the body.  context-1m would be billed beside the plan: it is dropped."""
    listed, own = body.pop("betas", None), row["headers"]["anthropic-beta"]
    asked = [headers.get("anthropic-beta", ""), *(listed if isinstance(listed, list) else ()), own]
    betas = dict.fromkeys(re.findall(r"[^\s,]+", ",".join(map(str, asked))))
    headers["anthropic-beta"] = ",".join(b for b in betas if not b.startswith("context-1m"))
    if table(body.get("thinking")).get("type") == "auto":  # a word of Amp's only
        body["thinking"]["type"] = "adaptive"
    if isinstance(body.get("messages"), list):
        body["messages"] = [message for message in body["messages"] if is_clean(message)]
    if row["identity"]:
        body["system"] = with_identity(body.get("system"))


def is_clean(block: Any, depth: int = 9) -> bool:
    """Whether a block, or a message, may be sent on; what it holds is cleaned in place."""
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
    if depth and isinstance(content := table(block).get("content"), list) and content:
        block["content"] = [inner for inner in content if is_clean(inner, depth - 1)]
        return bool(block["content"]) or "role" not in block
    return True


def with_identity(system: Any) -> list[Any]:
    blocks = system if isinstance(system, list) else [{"type": "text", "text": system or ""}]
    blocks = [block for block in blocks if is_clean(block)]
    start = "\n".join(str(block.get("text")) for block in blocks[:2] if isinstance(block, dict))
    there = re.match(f"(x-anthropic-billing-header.*\n+)?{IDENTITY}", start)
    return blocks if there else [{"type": "text", "text": IDENTITY}, *blocks]


def prepare_codex(body: Json, headers: Headers, row: Json) -> None:
    if body.get("previous_response_id"):
        raise ProxyError(400, "previous_response_id: no answer is kept here, send the whole input")
    tier = [] if body.get("service_tier") == "priority" else ["service_tier"]
    for name in [name for name in body if matches(name, row["drops"] + tier)]:
        del body[name]
    given, told = body.get("input"), [body.get("instructions")]
    asked = {"role": "user", "content": [{"type": "input_text", "text": str(given or "")}]}
    body["input"] = list[Any]()
    for item in given if isinstance(given, list) else [asked]:
        if isinstance(item, dict) and item.get("role") == "system":
            content = item.get("content")
            parts = content if isinstance(content, list) else [{"text": content}]
            told += [part.get("text") for part in parts if isinstance(part, dict)]
        elif not isinstance(item, dict) or is_readable(item):
            body["input"].append(item)
    text = "\n\n".join(text for text in told if text and isinstance(text, str))
    body |= {"instructions": text or "You are a helpful assistant.", "store": False, "stream": True}
    body["include"] = ["reasoning.encrypted_content"]
    body.setdefault("parallel_tool_calls", True)


def is_readable(item: Json) -> bool:
    item.pop("id", None)
    if len(call_id := str(item.get("call_id") or "")) > 64:
        item["call_id"] = f"{call_id[:47]}_{hashlib.sha256(call_id.encode()).hexdigest()[:16]}"
    kind, secret = item.get("type"), str(item.get("encrypted_content"))
    return kind != "item_reference" and (kind != "reasoning" or secret.startswith("gAAAA"))


RULES = {"claude": prepare_claude, "codex": prepare_codex}


# == Token files ===================================================================================
# One JSON file an account, in CLIProxyAPI's format; fields of others, and their edits, survive.
def save_token(path: Path, token: Json) -> None:
    """All of it or nothing: private from the first byte, synced, renamed over the old file."""
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
    token = read_object(path.read_bytes())
    if not isinstance(token.get("type"), str):
        raise ValueError("it has no 'type'")
    return token


def merge_token(path: Path, known: Json, changes: Json) -> Json:
    with suppress(OSError, ValueError):
        known = read_token(path)
    return known | changes


def rfc3339(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def moment(value: Any) -> float:
    with suppress(ValueError, TypeError, OverflowError):
        return datetime.fromisoformat(value).astimezone(UTC).timestamp()
    return 0.0


def expiry(token: Json) -> float:
    return moment(token.get("expired")) if token.get("refresh_token") else float("inf")


def claims(token: Json) -> Json:
    """E-mail, account_id and plan, as far as ChatGPT's id token tells (providers.md 2.1)."""
    with suppress(ValueError, LookupError, AttributeError):
        told = read_object(base64.urlsafe_b64decode(str(token["id_token"]).split(".")[1] + "=="))
        auth = told.get("https://api.openai.com/auth") or {}
        names = {"account_id": "chatgpt_account_id", "plan": "chatgpt_plan_type", "email": "email"}
        return {k: found for k, v in names.items() if (found := auth.get(v) or told.get(v))}
    return {}


# == The network ===================================================================================
# No cookie is kept, no redirect followed, nothing unpacked, no header added.
NET_ERRORS = (aiohttp.ClientError, OSError, LookupError, ValueError, zlib.error)


async def stay(*_: object) -> None:  # for WebSockets: aiohttp would follow, keys and all
    raise ValueError("it redirects")


class Net:
    def __init__(self, live: Live) -> None:
        self.live, trace = live, aiohttp.TraceConfig()
        trace.on_request_redirect.append(stay)
        self.proxies = urllib.request.getproxies()  # aiohttp's look-up is slow, and reads ~/.netrc
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=20),
            cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False, trace_configs=[trace],
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            max_line_size=65536, max_field_size=65536)  # fmt: skip

    def proxy(self, url: str) -> str | None:
        given = re.sub("^(?=[^/]+/?$)", "http://", self.proxies.get(url.partition(":")[0], ""))
        around = given and urllib.request.proxy_bypass(URL(url).host or "")
        return self.live.config["proxy-url"] or (None if around else given or None)

    @asynccontextmanager
    async def ask(self, method: str, url: str, **more: Any) -> AsyncIterator[Upstream]:
        """The answer, its headers read; closed on the way out.  ProxyError 502 when none comes."""
        idle = more.pop("idle", self.live.config["streaming"]["idle-timeout-seconds"])
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=idle or None)
        more |= {"timeout": timeout, "proxy": self.proxy(url), "allow_redirects": False}
        try:
            response = await self.session.request(method, URL(url, encoded=True), **more)
        except NET_ERRORS as error:
            host = URL(url).host or "an empty upstream-url"
            raise ProxyError(502, f"{host} cannot be reached: {why(error)}") from error
        with closing(response):  # what was read to its end has given its connection back already
            yield response

    async def ask_json(self, method: str, url: str, headers: Json, data: Any) -> tuple[int, Json]:
        headers = {"Accept": "application/json", "User-Agent": f"ampproxy/{__version__}", **headers}
        async with self.ask(method, url, idle=30, headers=headers, data=data) as response:
            raw = await response.read()
        with suppress(ValueError):
            return response.status, read_object(inflate(raw) or raw)
        said = raw[:300].decode(errors="replace") if response.status != 200 else "no JSON"
        return response.status, {"error": said}


def error_text(answer: Json, *keys: str) -> str:
    parts = table(answer.get("error")) or answer
    keys = keys or ("type", "code", "status", "error", "message", "error_description", "detail")
    said = [str(parts[key]) for key in keys if parts.get(key) and parts[key] != "error"]
    return ": ".join(dict.fromkeys(said))[:300]


@asynccontextmanager
async def listen(server: web.Server, host: str, port: int, hint: str) -> AsyncIterator[int]:
    runner = web.ServerRunner(server, shutdown_timeout=5)  # aiohttp waits twice as long
    await runner.setup()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(runner.cleanup)
        try:
            await web.TCPSite(runner, host or None, port).start()
        except OSError as error:
            raise Failure(f"cannot listen on {host}:{port} ({error.strerror}): {hint}") from error
        yield runner.addresses[0][1]


# == Signing in ====================================================================================
# OAuth with PKCE (RFC 7636); the callback comes to this machine, or is pasted, whichever is first.
FATAL = "invalid_grant|refresh_token_(reused|expired|invalidated)|unauthorized_client"
say = functools.partial(print, flush=True)


def pkce() -> tuple[str, str]:
    verifier = secrets.token_urlsafe(64)
    digest = hashlib.sha256(verifier.encode()).digest()
    return verifier, base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def read_callback(line: str) -> dict[str, str]:
    """code, state, error of a URL, its query or fragment, or `code#state`; {} for no sense."""
    line = line.strip().strip("'\"<>")
    found = dict(parse_qsl(re.sub("[?#]", "&", line)))
    pair = re.fullmatch(r"(?:\S*code=)?([^\s#=&?/]+)#([^\s#=&?/]+)", unquote_plus(line))
    found |= {"code": pair[1], "state": pair[2]} if pair else {}
    return found if found.get("code") or "error" in found else {}


def read_lines(loop: asyncio.AbstractEventLoop, use: Callable[[str], object]) -> None:
    with suppress(OSError, AttributeError, RuntimeError):  # no input at all, or the login is over
        for line in os.fdopen(sys.stdin.fileno(), "rb", 0, closefd=False):
            loop.call_soon_threadsafe(use, line.decode(errors="replace"))


async def sign_in(live: Live, row: Json, browser: bool) -> tuple[str, Path]:
    (verifier, challenge), state = pkce(), secrets.token_urlsafe(24)
    query = {name: row[name.replace("_", "-")] for name in ("client_id", "scope")}
    query |= {**row["authorize-query"], "response_type": "code", "state": state}
    query |= {"code_challenge": challenge, "code_challenge_method": "S256"}
    found, redirect = await await_callback(row, query, browser)
    if "error" in found:
        raise Failure(f"the login was refused: {error_text(found)}")
    if not same(found.get("state", ""), state):
        raise Failure("the state of that callback belongs to another login: start again")
    form = {"grant_type": "authorization_code", "code": found["code"], "redirect_uri": redirect}
    form |= {"code_verifier": verifier} | ({} if row["token-form"] else {"state": state})
    net, token = Net(live), {"type": row["name"], "refresh_token": "", "id_token": ""}
    async with net.session:
        answer = await ask_token(net, row, form)
        token |= await identity_of(net, row, answer) | token_fields(answer, time.time())
    name = f"{row['name']}-{re.sub(r'[^A-Za-z0-9.@+_-]', '_', token['email'])}.json"
    save_token(live.auth_dir / name, merge_token(live.auth_dir / name, {}, token))
    return token["email"], live.auth_dir / name


async def await_callback(row: Json, query: Json, browser: bool) -> tuple[dict[str, str], str]:
    callback = asyncio.Future[dict[str, str]]()

    def take(text: str) -> bool:
        if (found := read_callback(text)) and not callback.done():
            callback.set_result(found)
        return bool(found)

    async def handle(request: web.BaseRequest) -> Answer:
        if request.path != row["callback-path"] or not take(request.raw_path):
            return web.Response(status=404, text="This is not the callback.\n")
        return web.Response(text="The terminal says how the login went; you can close this page.\n")

    def paste(line: str) -> None:
        if line.strip() and not take(line):
            say("That is no callback: it has neither a code nor an error. Still waiting.")

    hint = f"end what holds it, or set providers.{row['name']}.callback-port"
    async with listen(web.Server(handle), "127.0.0.1", row["callback-port"], hint) as port:
        redirect = f"http://localhost:{port}{row['callback-path']}"
        url = f"{row['authorize-url']}?{urlencode(query | {'redirect_uri': redirect})}"
        say(f"Open this address in a browser to sign in to {row['name']}:\n\n{url}\n")
        if browser:
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        say(f"A browser elsewhere needs: ssh -L {port}:127.0.0.1:{port} USER@THIS-MACHINE\n")
        say(f"Or paste the address that the browser ends at ({redirect}?code=...) here:")
        threading.Thread(target=read_lines, args=(callback.get_loop(), paste), daemon=True).start()
        return await callback, redirect


async def ask_token(net: Net, row: Json, form: Json) -> Json:
    """The token endpoint's answer; ProxyError with its words, 401 when they are final, else 503."""
    own = {"client_id": row["client-id"], "client_secret": row["client-secret"]}
    form = {"grant_type": "refresh_token"} | {k: v for k, v in own.items() if v} | form
    kind, data = ("x-www-form-urlencoded", form) if row["token-form"] else ("json", compact(form))
    headers = {"Content-Type": f"application/{kind}"}
    status, answer = await net.ask_json("POST", row["token-url"], headers, data)
    if status == 200 and answer.get("access_token") and isinstance(answer["access_token"], str):
        return answer
    said = error_text(answer).replace(str(form.get("refresh_token") or form["code"]), "...")
    message = f"{row['name']}'s token endpoint answered {status}: {said}"
    raise ProxyError(401 if re.search(FATAL, message) else 503, message)


def token_fields(answer: Json, now: float) -> Json:
    given = {k: answer[k] for k in ("access_token", "refresh_token", "id_token") if answer.get(k)}
    ends = now + max(5 * MINUTE, number(answer.get("expires_in")) or HOUR)
    return given | {"last_refresh": rfc3339(now), "expired": rfc3339(ends)}


async def identity_of(net: Net, row: Json, answer: Json) -> Json:
    told = {"email": f"account-{secrets.token_hex(4)}", **claims(answer)}
    headers = {"Authorization": f"Bearer {answer['access_token']}"}
    with suppress(ProxyError, AttributeError, TypeError, *NET_ERRORS):
        if row["profile-url"] and not (answer.get("account") or {}).get("email_address"):
            _, answer = await net.ask_json("GET", row["profile-url"], headers, None)
        account = answer.get("account", answer)
        told["email"] = str(account.get("email_address") or account["email"])
    return told


# == Who asks, and what? ===========================================================================
# A request before its body is read: may it (design.md, "Security"), and is it a model call?
BROWSER_PATHS = re.compile(r"/(auth|threads|docs|settings)(/|$)")
KEY_HEADERS = ("authorization", "x-api-key", "x-goog-api-key")
KEY_PARAMETERS = ("key", "auth_token")
MODEL_PATH = re.compile(r"(?P<amp>/api/provider/[^/]+)?(?:/v1(?:beta1?(?:/publishers/google)?)?)*/"
                        r"(?P<end>messages(/count_tokens)?|chat/completions|responses(/compact)?"
                        r"|models/(?P<model>[^/:]+):(?P<verb>\w+))")  # fmt: skip
LISTING = re.compile(r"(/api/provider/[^/]+)?(/v1(beta1?)?)*/models")
SUFFIX = re.compile(r"(.+)\(([\w-]*)\)|(gpt-(?!oss).+)-(low|medium|x?high)", re.I)
DIALECTS = {"messages": "anthropic", "chat": "chat", "responses": "responses", "models": "gemini"}
USAGE = re.compile(rb'"(?:(input_tokens|prompt_tokens|promptTokenCount)|output_tokens|'
                   rb'completion_tokens|candidatesTokenCount)"\s*:\s*(\d{1,12})')  # fmt: skip
BUDGETS = {"none": 0, "minimal": 512, "low": 1024, "medium": 8192, "high": 24576, "xhigh": 32768,
           "max": 128000}  # fmt: skip
SESSION_HEADERS = ("x-amp-thread-id", "x-claude-code-session-id", "session-id", "session_id",
                   "thread-id", "x-session-id", "x-session-affinity")  # fmt: skip


def bare(value: str) -> str:
    return re.sub(r"(?i)^bearer\s+", "", value.strip())


def without_suffix(model: str) -> tuple[str, str]:
    """A model's name, and its thinking suffix: a level, a budget, or "" for unknown words."""
    found = SUFFIX.fullmatch(model)
    name, word = (found[1] or found[3], found[2] or found[4] or "") if found else (model, "")
    known = word.lower() in (*BUDGETS, "auto") or re.fullmatch("[0-9]{1,9}", word)
    return name, word.lower() if known else ""


class Request(web.BaseRequest):
    begun: Any = None  # the Relay whose first bytes have gone out

    def refuse_strangers(self, config: Json, browses: bool) -> None:
        host, origin = (self.headers.get(name, "").lower() for name in ("Host", "Origin"))
        name = re.sub(r":\d+$", "", host).strip("[]")
        if not (config["api-keys"] or is_loopback(name) or name == config["host"].lower()):
            raise ProxyError(403, f"Host {host[:100]!r} is not an address of this proxy")
        foreign = re.match("https?://|null", origin) and origin.partition("://")[2] != host
        site = self.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site")
        foreign = foreign or (site and not origin.startswith("vscode-webview://"))
        if foreign and not (browses and self.headers.get("Sec-Fetch-Mode") == "navigate"):
            raise ProxyError(403, "requests on behalf of another web site are refused")

    def key(self, keys: list[str]) -> str:
        given = (*map(self.headers.get, KEY_HEADERS), *map(self.query.get, KEY_PARAMETERS))
        shown = [bare(value) for value in given if value and value.strip()]
        right = [key for key in keys for value in shown if same(key, value)]
        if keys and not right:
            raise ProxyError(401, "Invalid API key" if shown else "Missing API key")
        return right[0] if right else ""

    def target(self, keys: list[str]) -> str:
        path, mark, query = self.raw_path.partition("?")
        pairs = ((pair, *map(unquote_plus, pair.partition("=")[::2])) for pair in query.split("&"))
        kept = [pair for pair, name, value in pairs
                if name not in KEY_PARAMETERS or bare(value) not in keys]  # fmt: skip
        return path + (mark + "&".join(kept) if kept else "")


class Call:
    def __init__(self, request: Request, found: re.Match[str]) -> None:
        first, _, last = found["end"].partition("/")
        self.request, self.dialect, self.amp = request, DIALECTS[first], bool(found["amp"])
        self.verb, self.model = found["verb"] or last or first, unquote(found["model"] or "")
        self.raw, self.body, self.worded, self.headers = b"", Json(), b"", Headers()
        self.row, self.folds, self.trouble, self.silence = Json(), False, "", 0.0
        self.tokens = Counter(input_tokens=0, output_tokens=0)
        self.route, self.provider, self.account, self.served_model = "none", "", "", ""

    @property
    def thread(self) -> str:
        headers, user = self.request.headers, table(self.body.get("metadata")).get("user_id")
        shown = [*map(headers.get, SESSION_HEADERS), user, self.body.get("prompt_cache_key")]
        return next((text[:1000] for text in shown if text and isinstance(text, str)), "")

    @property
    def marks(self) -> dict[str, str]:
        marks = {"route": self.route, "provider": self.provider, "model": self.served_model}
        return {f"x-ampproxy-{k}": re.sub(r"[^ -~]", "?", v)[:200] for k, v in marks.items() if v}

    def count(self, data: bytes) -> None:
        for sent, figure in USAGE.findall(data) if self.verb != "count_tokens" else ():
            name = "input_tokens" if sent else "output_tokens"
            self.tokens[name] = max(self.tokens[name], int(figure))

    async def read(self) -> None:
        try:
            self.raw = await self.request.read()
            self.body = read_object(self.raw)
        except web.HTTPRequestEntityTooLarge as error:
            raise ProxyError(413, "The request body is larger than 64 MiB") from error
        except (web.RequestPayloadError, *NET_ERRORS) as error:
            raise ProxyError(400, f"The request body cannot be read: {why(error)}") from error
        model = self.model or self.body.get("model")
        if not isinstance(model, str) or not model:
            raise ProxyError(400, "The request names no model")
        self.model, (self.wanted, self.effort) = model, without_suffix(model)

    def forget_reasoning(self) -> bool:
        items = self.body.get("input", [])
        self.body["input"] = [i for i in items if not (isinstance(i, dict) and "summary" in i)]
        self.worded = compact(self.body)
        return len(self.body["input"]) < len(items) and not self.request.begun


# == Accounts ======================================================================================
# Who may answer, and with which token.  Knows no dialect, and no time but its clock's.
NEVER = float("inf")
RESTS = (  # what an error means: the first row that fits.  To add a rule, add a row.
    # status and words of the error                    what rests seconds*     and then
    (r"4.. .*(extra usage|long context)",              "",        0,           "stop"),
    (r"401|400 .*api.key (not valid|expired)",         "account", NEVER,       "next"),
    (r"402|... .*(credit balance|usage_not_included)", "account", 30 * MINUTE, "next"),
    (r"403",                                           "account", DAY,         "next"),
    (r"404|400 .*model.* not supported",               "model",   30 * MINUTE, "next"),
    (r"429 .*(7d_oi\]|_EXHAUSTED)|... .* at capacity", "model",   MINUTE,      "wait"),
    (r"429",                                           "account", MINUTE,      "wait"),
    (r"408|50[0234]|529",                              "account", 5,           "again"),
    (r"5",                                             "account", 5,           "next"),
    (r"",                                              "",        0,           "stop"))  # fmt: skip
# * where the error names no time.  again: as often as request-retry says; wait: if that is short
SHORT_WAIT, RETRY_PAUSE, PROBE, REFRESH_WAIT, REFRESH_PAUSE = 10, 0.3, 2, 30, 30
NEARLY_SPENT, THREADS = 95, 10_000  # per cent of a quota window; the threads that are remembered


def verdict(error: ProxyError) -> tuple[str, float, str]:
    said = f"{error.status} {error.said}"
    return next(row[1:] for row in RESTS if re.match(row[0], said, re.I | re.S))


class Account:
    def __init__(self, path: Path, token: Json) -> None:
        self.path, self.token, self.type = path, token, str(token["type"])
        self.email = str(token.get("email") or path.stem)
        self.name = f"{self.type} {mask(self.email)}"
        self.hint, self.row = f"run `ampproxy.py login {self.type}`", Json()
        self.rests = dict[str, Any]()  # by model, "" for all: error; began, wakes (monotonic)
        self.retry, self.trouble = 0.0, ""  # no refresh before then, and why
        self.replaced = "-"  # the access token in the file that the present one came for
        self.in_flight, self.turn, self.quota = 0, 0, list[Json]()
        self.counts = Counter(requests=0, errors=0, input_tokens=0, output_tokens=0)
        self.refreshing: asyncio.Task[None] | None = None

    def resting(self, model: str) -> list[Any]:
        return [self.rests[key] for key in {"", model} if key in self.rests]

    def wait(self, model: str, now: float) -> float:
        return max(0.0, *(float(rest.wakes) - now for rest in self.resting(model)), 0.0)

    def state(self, now: float) -> str:
        wait = self.wait("", now)
        awake = "needs-login" if wait == NEVER else "resting" if wait else "ready"
        return "disabled" if self.token.get("disabled") is True else awake

    @property
    def plan(self) -> str:
        return str(claims(self.token).get("plan") or self.token.get("plan") or "")

    def stale(self, refused: str, moment: float) -> bool:
        return refused == self.token.get("access_token") or expiry(self.token) < moment

    def spent(self, moment: float) -> bool:
        windows = (w for w in self.quota if w["resets_at"] > moment and "_" not in w["window"])
        return any(w["full"] or w["used_percent"] >= NEARLY_SPENT for w in windows)


class Pool:
    def __init__(self, live: Live, net: Any = None, clock: Any = CLOCK) -> None:
        self.live, self.net, self.clock = live, net, clock
        self.accounts, self.stamps, self.turn = dict[Path, Account](), dict[Path, Any](), 0
        self.homes = dict[str, tuple[Account, float]]()  # of threads, the longest unused first

    def scan(self) -> list[Account]:
        files = self.live.auth_dir.iterdir() if self.live.auth_dir.is_dir() else ()
        stamps = {path: stamp(path) for path in sorted(files) if path.match("[!.]*.json")}
        keys = {r["id"]: Account(r["id"], r["token"]) for r in self.live.rows if "token" in r}
        known = {*stamps, *self.stamps, *keys}  # what is gone for two looks is gone
        self.accounts = keys | {path: a for path, a in self.accounts.items() if path in known}
        seen, self.stamps = self.stamps, stamps
        for path in [path for path, now in stamps.items() if now != seen.get(path)]:
            self.read(path)
        return list(self.accounts.values())

    def read(self, path: Path) -> None:
        try:
            token = read_token(path)
        except (OSError, ValueError) as error:
            log.error("%s is no token file: %s", path, why(error))
            return
        account = self.accounts.setdefault(path, Account(path, token))
        if token.get("access_token") == account.replaced != account.token.get("access_token"):
            kept = {k: v for k, v in token.items() if k in ("disabled", "priority")}
            self.save(account, account.token | kept)  # what could not be saved is newer
            return
        if token.get("access_token") != account.token.get("access_token"):
            account.rests, account.retry = {}, 0.0
        account.token = token

    def of(self, rows: list[Json]) -> list[Account]:
        mine = [(row, account) for row in rows for account in self.accounts.values()
                if row["id"] in (account.type, account.path)]  # fmt: skip
        for row, account in mine:
            account.row = row
        return [account for _, account in mine if account.token.get("disabled") is not True]

    def lacks(self, row: Json, model: str, verb: str) -> str:
        """Why a row does not serve a model; "" if it does."""
        if not matches(model, row["models"]) or matches(model, row["excluded-models"]):
            return "does not have"
        if verb not in ("", *row["paths"]):
            return "in another dialect could serve"
        return "" if self.of([row]) else f"after `ampproxy.py login {row['name']}` would serve"

    async def choose(self, rows: list[Json], call: Call, spent: set[Account], until: float) -> Any:
        while True:
            now, left = self.clock.monotonic(), [a for a in self.of(rows) if a not in spent]
            if free := [account for account in left if not account.wait(call.wanted, now)]:
                name = free[0].row["name"]
                first = [account for account in free if account.row["name"] == name]
                account = self.home(call.thread and name + call.thread, first, now)
                for rest in account.resting(call.wanted):  # it is over: this is the probe
                    rest.wakes = now + PROBE
                return account
            pause = min((account.wait(call.wanted, now) for account in left), default=NEVER)
            if now + pause > until:
                return None
            await self.clock.sleep(pause)

    def home(self, thread: str, free: list[Account], now: float) -> Account:
        ttl, homes = seconds(self.live.config["routing"]["session-affinity-ttl"]), self.homes
        while homes and (len(homes) >= THREADS or next(iter(homes.values()))[1] < now - ttl):
            del homes[next(iter(homes))]
        account, _ = homes.pop(thread, (None, 0.0))
        if account not in free:
            account = min(free, key=functools.partial(self.order, self.threads()))
        if thread:
            homes[thread] = account, now
        self.turn = account.turn = self.turn + 1
        return account

    def threads(self) -> Counter[Account]:
        return Counter(account for account, _ in self.homes.values())

    def order(self, threads: Counter[Account], account: Account) -> tuple[Any, ...]:
        strategy, full = self.live.config["routing"]["strategy"], account.spent(self.clock.time())
        busy = account.in_flight + threads[account] if strategy == "least-connections" else 0
        turn = 0 if strategy == "fill-first" else account.turn
        return full, -number(account.token.get("priority")), busy, turn, account.path

    def answered(self, account: Account, model: str, began: float) -> None:
        ended = [k for k, r in account.rests.items() if k in ("", model) and r.began < began]
        account.rests = {k: r for k, r in account.rests.items() if k not in ended}

    def rest(self, account: Account, error: ProxyError, model: str) -> None:
        what, length, _ = verdict(error)
        account.counts["errors"] += 1
        if what:
            now, key = self.clock.monotonic(), model if what == "model" else ""
            kept = {k: r for k, r in account.rests.items() if k in ("", key) or r.wakes > now}
            if length != NEVER or not account.path.suffix:  # a key may be good again
                length = max(1, min(error.retry_after or length, self.live.config["max-cooldown"]))
            wakes = max(now + length, kept[key].wakes if key in kept else 0)
            account.rests = kept | {key: SimpleNamespace(error=error, began=now, wakes=wakes)}
            then = f"rests for {length:.0f} s" if length < NEVER else account.hint
            log.warning("%s: %s; %s", f"{account.name} {key[:100]}".strip(), error.message, then)

    def nobody(self, rows: list[Json], model: str) -> ProxyError:
        now, told, waits, lacks = self.clock.monotonic(), [], [NEVER], True
        for account in self.of(rows):
            waits.append(wait := account.wait(model, now))
            then = account.hint if wait == NEVER else f"wakes in {wait:.0f} s"
            errors = [rest.error for rest in account.resting(model)]
            lacks = lacks and bool(errors) and all(error.status in (400, 404) for error in errors)
            reasons = ", ".join(error.message for error in errors)
            told.append(f"{account.type} {account.email}: {reasons}; {then}")
        first, message = max(1, min(waits)), "no account can answer; " + ". ".join(told)
        status = 401 if first == NEVER else 404 if lacks else 429
        return ProxyError(status, message, first if status == 429 else 0)

    async def bearer(self, account: Account, refused: str = "") -> str:
        soon = self.clock.time() + MINUTE
        if account.stale(refused, soon) and "token" not in account.row:
            task = account.refreshing or asyncio.create_task(self.refresh(account, refused, soon))
            account.refreshing = task
            await asyncio.wait([task])
        if account.wait("", 0) == NEVER or not account.token.get("access_token"):
            raise ProxyError(401, f"the login has ended ({account.trouble}): {account.hint}")
        if account.stale(refused, soon - MINUTE) and account.retry > self.clock.monotonic():
            raise ProxyError(503, account.trouble)
        return str(account.token["access_token"])

    async def refresh(self, account: Account, refused: str, soon: float) -> None:
        """Adopt a newer token from the file, else ask, save, and only then use it."""
        try:
            self.read(account.path)
            if not account.stale(refused, soon) or account.retry > self.clock.monotonic():
                return
            form = {"refresh_token": account.token.get("refresh_token")}
            if not form["refresh_token"]:
                raise ProxyError(401, "refused, and there is no refresh token")
            async with asyncio.timeout(REFRESH_WAIT):
                answer = await ask_token(self.net, account.row, form)
            self.read(account.path)
            if account.token.get("refresh_token") != form["refresh_token"]:
                return  # a new login came meanwhile
            account.replaced = str(merge_token(account.path, account.token, {}).get("access_token"))
            self.save(account, account.token | token_fields(answer, self.clock.time()))
            log.info("%s: token refreshed", account.name)
        except (ProxyError, *NET_ERRORS) as error:
            self.refresh_failed(account, ProxyError(getattr(error, "status", 503), why(error)))
        finally:
            account.refreshing = None

    def save(self, account: Account, changes: Json) -> None:
        """On disk before it is used; where that fails it is used, and tried again each second."""
        account.token = merge_token(account.path, account.token, changes)
        try:
            account.path.stat()  # gone: the person logged out, or an editor is at it
            save_token(account.path, account.token)
        except OSError as error:
            self.stamps[account.path] = None
            log.error("%s: the new token cannot be saved: %s", account.name, why(error))

    def refresh_failed(self, account: Account, error: ProxyError) -> None:
        account.retry = self.clock.monotonic() + REFRESH_PAUSE
        self.read(account.path)
        if account.retry:  # else a newer token was there
            account.trouble = f"refresh failed: {error.message}"
            log.error("%s: %s", account.name, account.trouble)
            if error.status == 401 or account.stale("", self.clock.time()):
                self.rest(account, error, "")

    def refresh_ahead(self) -> None:
        now = self.clock.time()
        for account in self.of(self.live.rows):
            soon = now + account.row.get("refresh-lead", 0)
            done = moment(account.token.get("last_refresh")) + MINUTE > now
            busy = account.refreshing or account.retry > self.clock.monotonic()
            if account.stale("", soon) and not (done or busy) and account.wait("", 0) < NEVER:
                account.refreshing = asyncio.create_task(self.refresh(account, "", soon))


# == Passing answers on ============================================================================
# Until a first byte has gone out a ProxyError can become something better; then it ends the answer.
TAIL, MAGIC = 4096, (b"", b"\x1f", b"\x1f\x8b")  # how gzip begins
ENDING = re.compile(rb'"message_stop"|\nevent: error|\ndata: ?(\[DONE\]|\{"error": ?[{"])|'
                    rb'"finish_?[rR]eason": ?"|"blockReason"')  # fmt: skip
HOP_HEADERS = re.compile(  # RFC 9110, 7.6.1, CORS, and what the HTTP library writes itself
    r"(access-control|sec-websocket)-.*|proxy-(authenticate|authorization|connection)|connection|"
    r"keep-alive|te|trailer|transfer-encoding|upgrade|host|expect", re.I)  # fmt: skip


def passing(headers: Any, *without: str) -> Headers:
    """Headers that travel on: not the hop's own, what Connection names, CORS, nor `without`."""
    named = {n.strip().lower() for v in headers.getall("Connection", ()) for n in v.split(",")}
    gone = named | set(without)
    pairs = ((name, value) for name, value in headers.items() if name.lower() not in gone)
    return CIMultiDict(pair for pair in pairs if not HOP_HEADERS.fullmatch(pair[0]))


class Relay:  # one answer on its way; only a plain event stream of a `call` takes comments
    def __init__(self, request: Request, upstream: Upstream, headers: Headers, call: Any) -> None:
        self.request, self.content = request, upstream.content
        headers.update(call.marks if call else {})
        self.response = Answer(status=upstream.status, reason=upstream.reason, headers=headers)
        self.events = upstream.content_type == "text/event-stream"
        plain = call and self.events and PACKED not in headers and not call.folds
        self.dialect = call.dialect if plain else ""
        self.silence, self.comments = (call and call.silence) or MINUTE, call and call.silence
        self.first, self.tail = b"", b"\n\n"

    async def read(self) -> bytes:
        """The next bytes, b"" at the end; comments go out while none come."""
        while not self.content.at_eof():
            try:
                async with asyncio.timeout(self.silence) as silence:
                    return await self.content.readany()
            except (RuntimeError, *NET_ERRORS) as error:  # the first: it had closed without a word
                if not silence.expired():
                    if self.dialect and ENDING.search(self.tail):
                        break  # it was whole
                    raise ProxyError(502, f"the upstream broke off: {why(error)}") from error
                if self.dialect and self.comments and self.tail.endswith((b"\n\n", b"\r\n\r\n")):
                    await self.write(b": keep-alive\n\n")
        return b""

    async def write(self, data: bytes) -> None:
        self.tail = data[-TAIL:] if len(data) >= TAIL else (self.tail + data)[-TAIL:]
        if not self.response.prepared:
            self.first, self.request.begun = data[:TAIL], self
            await self.response.prepare(self.request)
        await self.response.write(data)

    async def send(self, first: bytes) -> Answer:
        await self.write(first)
        while data := await self.read():
            await self.write(data)
        if self.dialect in ("anthropic", "chat") and not ENDING.search(self.tail):
            raise ProxyError(502, "the stream stopped before its end")
        return self.response

    async def edited(self, edit: Any) -> Answer:
        """What `edit` makes of each event, or of the whole; nothing goes out before it has told."""
        rest, held = bytearray(), b""
        try:
            while (data := await self.read()) and len(rest) + len(held) < BODY_LIMIT:
                rest += data
                if self.events and b"\n" in data:
                    whole, end, rest = rest.rpartition(b"\n\n" if b"\n\n" in rest else b"\r\n\r\n")
                    held += b"".join(edit(bytes(one + end)) for one in whole.split(end or None))
                if self.dialect and edit.told:
                    await self.write(held)
                    held = b""
                    if edit.done:
                        return await self.send(bytes(rest))
            held += edit(bytes(rest))
        except (ValueError, ProxyError) as error:  # of garbage, or a break
            if isinstance(error, ProxyError) and not edit.ended:
                raise
        if not edit.told or (self.events and not edit.ended):
            status = 502 if len(rest) + len(held) < BODY_LIMIT else 413
            raise ProxyError(status, f"{edit.call.provider} sent no whole answer")
        if self.events and edit.call.folds:
            held = compact(edit.whole)
        self.response.content_length = None if self.dialect else len(held)
        await self.write(held)
        return self.response

    async def end(self, error: ProxyError) -> Answer:
        """Of an answer that broke off: as the dialect says it, or as a broken connection does."""
        if self.dialect:
            await self.write(error_frame(self.dialect, error.status, error.said or error.message))
        if self.dialect in ("", "gemini") and self.request.transport:  # no other is seen
            self.request.transport.abort()
            return web.Response(status=502)  # for the log: nobody gets it
        return self.response


# == ampcode.com ===================================================================================
# It gets what is no model call, and, for credits, the calls that nobody here answers; as they came.
SECRETS_FILE = Path("~/.local/share/amp/secrets.json")
# The feature that takes clients of April and May 2026 off the proxy, and a comma (amp-client.md 3).
FLAG = re.compile(rb'(?:,|(\[))\s*\{[^{}]*"name"\s*:\s*"thread-actors-tui"[^{}]*\}(?(1)\s*,?)')


class Ampcode:
    def __init__(self, pool: Pool) -> None:
        self.live, self.net, self.pool, self.clock = pool.live, pool.net, pool, pool.clock
        self.sockets = dict[Any, web.WebSocketResponse]()  # by their other ends
        self.secrets, self.secrets_until = Json(), 0.0  # what the secrets file said, until then

    def base(self) -> str:
        return str(self.live.config["ampcode"]["upstream-url"]).rstrip("/")

    def address(self, request: Request) -> str:
        return self.base() + request.target(self.live.config["api-keys"])

    def file_key(self) -> str:
        base, now = self.base(), self.clock.monotonic()
        if self.secrets_until <= now:
            self.secrets, self.secrets_until = Json(), now + 5 * MINUTE
            with suppress(OSError, ValueError):
                self.secrets = read_object(SECRETS_FILE.expanduser().read_bytes())
        return str(self.secrets.get(f"apiKey@{base}/") or self.secrets.get(f"apiKey@{base}") or "")

    def upstream_key(self, key: str) -> str:
        amp = self.live.config["ampcode"]
        own = [r["upstream-api-key"] for r in amp["upstream-api-keys"] if key in r["api-keys"]]
        own += [amp["upstream-api-key"], os.environ.get("AMP_API_KEY", "").strip()]
        return str(next(filter(None, own), "") or self.file_key().strip())

    def outgoing(self, request: Request, key: str) -> Headers:
        own = self.upstream_key(key)
        headers = passing(request.headers, *(KEY_HEADERS if own or key else ()))
        headers.update({"Authorization": f"Bearer {own}", "X-Api-Key": own} if own else {})
        return headers

    async def forward(self, request: Request, key: str, call: Call | None = None) -> Answer:
        headers, url = self.outgoing(request, key), self.address(request)
        data: Any = call.raw if call else request.content if request.body_exists else None
        asked = re.match(r"/api/internal\?getUserInfo(?![\w-])", request.raw_path)
        if edits := bool(asked and self.live.config["ampcode"]["client-inference"]):
            headers["Accept-Encoding"] = "identity"
        more: Any = {"headers": headers, "data": data} | ({} if call else {"idle": 0})
        async with self.net.ask(request.method, url, **more) as upstream:
            relay = Relay(request, upstream, passing(upstream.headers), call)
            return await relay.send(await opened(relay, edits))

    async def tunnel(self, request: Request, key: str) -> Answer:
        asked = re.findall(r"[^\s,]+", request.headers.get("Sec-WebSocket-Protocol", ""))
        url = URL(self.address(request), encoded=True)
        own: Any = {"headers": self.outgoing(request, key), "proxy": self.net.proxy(self.base())}
        both: Any = {"max_msg_size": BODY_LIMIT, "autoclose": False}
        try:
            upstream = await self.net.session.ws_connect(url, protocols=asked, **own, **both)
        except aiohttp.WSServerHandshakeError as error:
            return web.Response(status=max(error.status, 400), text=f"{error.message}\n")
        except NET_ERRORS as error:
            raise ProxyError(502, f"ampcode.com cannot be reached: {why(error)}") from error
        client = web.WebSocketResponse(protocols=[upstream.protocol or ""], **both)
        self.sockets = {u: c for u, c in self.sockets.items() if not u.closed} | {upstream: client}
        try:
            await client.prepare(request)
            await asyncio.gather(frames(client, upstream), frames(upstream, client))
        finally:
            await upstream.close(code=aiohttp.WSCloseCode.GOING_AWAY)
        return client


async def frames(source: Any, sink: Any) -> None:
    with suppress(ConnectionError, RuntimeError, TypeError):  # a broken frame has no data
        async for frame in source:
            await (sink.send_str if isinstance(frame.data, str) else sink.send_bytes)(frame.data)
    code = {0: 1000, 1006: 1011}.get(source.close_code, source.close_code)
    for end in (sink, source) if code and sink.close_code is None else ():  # else it is under way
        await end.close(code=code)


async def opened(relay: Relay, edits: bool) -> bytes:
    headers, raw = relay.response.headers, b""
    if not edits and (PACKED in headers or relay.events or "zip" in relay.response.content_type):
        return raw
    while (edits or raw[:2] in MAGIC) and len(raw) <= BODY_LIMIT and not relay.content.at_eof():
        raw += await relay.read()
    body = inflate(raw) or raw
    body = FLAG.sub(rb"\1", body) if edits else body
    if body != raw:
        headers.popall(PACKED, None)
        headers["Content-Length"] = str(len(body))
    return body


# == Forwarding ====================================================================================
# One model call, answered by the first account that can.
QUOTA = re.compile(r"(?:anthropic-ratelimit-unified|x-codex)-(?P<window>(?!overage)\w+)-(?P<field>"
                   r"status|utilization|used-percent|reset(?:-at)?)")  # fmt: skip
HINT = "ampcode.com may charge for it; to avoid that: fallback: never"
ENDS = ("response.completed", "response.incomplete", "response.failed")
UNASKED = {"count_tokens": ("max_tokens", "stream"), "compact": ("stream",)}  # of such calls
MATTERS = re.compile(rb'"(response|error|response\.output_item\.done|model|modelVersion)"')
DELAY = re.compile(r'"(?:resets_in_seconds|retryDelay|quotaResetDelay)":"?([\d.hms]+)')
QUIET = {"ping", "response.created", "response.in_progress", "response.queued", "codex.rate_limits"}


class Forwarder(Ampcode):
    async def answer(self, call: Call, key: str) -> Answer:
        """By the first way that works, else from ampcode.com, else a ProxyError."""
        await call.read()
        config, (ways, told) = self.live.config, self.ways(call.wanted, call.effort, call.verb)
        call.silence = config["streaming"]["keepalive-seconds"]  # until a comment goes out
        until = self.clock.monotonic() + config["max-retry-interval"]
        near = "; ".join(line for line in told if "does not have" not in line)
        error = ProxyError(404, f"no account here serves {call.model[:100]!r}: {near or 'map it'}")
        for number, (call.route, call.wanted, call.effort, rows) in enumerate(ways, 1):
            try:
                return await self.from_accounts(call, rows, until if number == len(ways) else 0)
            except ProxyError as failed:
                if verdict(error := failed)[2] == "stop" or call.request.begun:
                    raise
        if call.amp and config["ampcode"]["fallback"] in ("always", "" if ways else "unserved"):
            call.route, call.provider, call.served_model = "amp", "ampcode", call.model
            to = next(iter([] if ways else self.listed(call.verb)), "")
            mapping = f", model-mappings: [{{from: {call.wanted[:100]}, to: {to}}}]" if to else ""
            call.account, call.trouble = "", f"{error.message}; {HINT}{mapping}"
            return await self.forward(call.request, key, call)
        raise error

    def listed(self, verb: str = "") -> dict[str, str]:
        """The names that the present accounts serve, and who does; patterns are no names."""
        pairs = [(n, n) for row in self.live.rows for n in row["models"] if not {*"*?["} & {*n}]
        rules = [r for r in self.live.config["ampcode"]["model-mappings"] if not r["regex"]]
        pairs += [(rule["from"], without_suffix(to)[0]) for rule in rules for to in rule["to"]]
        return {name: row["name"] for name, model in pairs for row in reversed(self.live.rows)
                if not self.pool.lacks(row, model, verb)}  # fmt: skip

    def ways(self, model: str, effort: str, verb: str) -> tuple[list[Any], list[str]]:
        """Route, model, effort and rows, in the order to try; and what was found on the way."""
        config, ways, told = self.live.config["ampcode"], list[Any](), list[str]()
        rules = sorted(config["model-mappings"], key=lambda rule: rule["regex"])  # the exact first
        fits = [rule for rule in rules if without_suffix(rule["from"])[0].lower() == model.lower()
                or (rule["regex"] and re.search(rule["from"], model[:200], re.I))]  # fmt: skip
        targets = [without_suffix(target) for rule in fits for target in rule["to"]]
        mapped = [("mapped", target, level or effort) for target, level in targets]
        own, forced = [("local", model, effort)], config["force-model-mappings"]
        for route, name, level in mapped + own if forced else own + mapped:
            lacks = [(row, self.pool.lacks(row, name, verb)) for row in self.live.rows]
            told += [f"{row['name']} {lack or 'serves'} {name[:100]}" for row, lack in lacks]
            if rows := [row for row, lack in lacks if not lack]:
                ways.append((route, name, level, rows))
        return [way for way in ways if forced or way[0] == ways[0][0]], told

    async def from_accounts(self, call: Call, rows: list[Json], until: float) -> Answer:
        error, spent = None, set[Account]()
        call.row, call.provider, call.served_model = Json(), rows[0]["name"], call.wanted
        while account := await self.pool.choose(rows, call, spent, until):
            if call.row is not account.row:
                word(call, account.row)
            try:
                return await self.attempt(call, account)
            except ProxyError as failed:
                *_, then = verdict(error := failed)
                if then == "stop" or call.request.begun:
                    raise
                if then != "wait" or self.clock.monotonic() >= until:
                    spent.add(account)
        raise (len(self.pool.of(rows)) <= 1 and error) or self.pool.nobody(rows, call.wanted)

    async def attempt(self, call: Call, account: Account) -> Answer:
        tried, refused, call.account = 0, "", account.email
        most = {"again": (tries := self.live.config["request-retry"]), "wait": tries + 1}
        short = max(RETRY_PAUSE, min(SHORT_WAIT, self.live.config["max-retry-interval"]))
        account.in_flight += 1
        account.counts["requests"] += 1
        try:
            while True:
                began, token = self.clock.monotonic(), await self.pool.bearer(account, refused)
                try:
                    return await self.exchange(call, account, token, began)
                except ProxyError as error:
                    *_, then = verdict(error)
                    pause = error.retry_after or (RETRY_PAUSE if then == "again" else NEVER)
                    tried += 1
                    if error.status == 401 and not (refused or call.request.begun):
                        refused = token
                    elif "invalid_encrypted_content" in error.said and call.forget_reasoning():
                        log.info("%s: reasoning of another account is left out", account.name)
                    elif tried < most.get(then, 0) and pause <= short and not call.request.begun:
                        await self.clock.sleep(pause)
                    else:
                        if error.status != 401 or token == account.token.get("access_token"):
                            self.pool.rest(account, error, call.wanted)
                        raise
        finally:
            account.in_flight -= 1

    async def exchange(self, call: Call, account: Account, token: str, began: float) -> Answer:
        url, now = addressed(call, account, token), self.clock.time()
        sent: Any = {"headers": call.headers, "data": call.worded, "auto_decompress": True}
        async with self.net.ask("POST", url, **sent) as upstream:
            account.quota = (windows := quota_of(upstream.headers)) or account.quota
            reading = Reading(call, lambda: self.pool.answered(account, call.wanted, began))
            if upstream.status != 200:
                raise await reading.refusal(upstream, windows, now)
            headers = passing(upstream.headers, "content-length", "content-encoding", "set-cookie")
            headers.update({"Content-Type": "application/json"} if call.folds else {})
            relay = Relay(call.request, upstream, headers, call)
            try:
                return await relay.edited(reading)
            finally:
                call.count(relay.first + relay.tail)
                account.counts.update(call.tokens)


def word(call: Call, row: Json) -> None:
    if call.worded:  # the body has been changed for another row
        call.body = read_object(call.raw)
    call.row, call.provider = row, row["name"]
    call.served_model = row["models"].get(call.wanted, call.wanted)
    call.headers, given = CIMultiDict(row["headers"]), passing(call.request.headers)
    call.headers.update({n: ",".join(given.getall(n)) for n in given if matches(n, row["passes"])})
    call.headers.update({"Accept-Encoding": "identity", "Content-Type": "application/json"})
    streams = call.body.get("stream") or call.verb == "streamGenerateContent"
    only = row["kind"] == "codex" and call.verb == "responses"  # which its backend only streams
    if call.dialect != "gemini":
        call.folds, call.body["model"] = only and not streams, call.served_model
    if call.verb == "messages" and not call.body.get("max_tokens"):
        call.body["max_tokens"] = row["max-tokens"]
    if call.effort not in ("", "auto") and call.verb not in ("count_tokens", "countTokens"):
        set_effort(call.body, call)
    if row["kind"] in RULES:
        RULES[row["kind"]](call.body, call.headers, row)
    for name in UNASKED.get(call.verb, ()):
        call.body.pop(name, None)
    call.headers["Accept"] = "text/event-stream" if streams or only else "application/json"
    call.worded = compact(call.body)


def set_effort(body: Json, call: Call) -> None:
    """The suffix's level or budget, as near to it as the model goes, beats the body's own."""
    takes, asked = call.row["thinking"], BUDGETS.get(call.effort, -1)
    said = takes[max((p for p in takes if matches(call.served_model, [p])), key=len)]
    levels, limits = [word for word in said.split() if word in BUDGETS], re.findall(r"\d+", said)
    asked = int(call.effort) if asked < 0 else asked
    if not levels and len(limits) != 2:
        return  # it does not think
    tokens = max(int(limits[0]), min(asked, int(limits[1]))) if limits else asked
    levels = levels or [word for word in takes["*"].split() if word in BUDGETS] or [*BUDGETS]
    level = next((word for word in levels if BUDGETS[word] >= asked), levels[-1])
    if call.dialect == "chat":
        body["reasoning_effort"] = level
    elif call.dialect == "responses":
        body["reasoning"] = {**table(body.get("reasoning")), "effort": level}
    elif call.dialect == "gemini":
        how = {"thinkingBudget": tokens} if limits else {"thinkingLevel": level}
        how = {"thinkingConfig": {"includeThoughts": asked > 0, **how}}
        body["generationConfig"] = table(body.get("generationConfig")) | how
    else:
        on = asked > 0 and table(body.get("tool_choice")).get("type") not in ("any", "tool")
        for name in ("thinking", *(("temperature", "top_p", "top_k") if on else ())):
            body.pop(name, None)
        table(body.get("output_config")).pop("effort", None)
        if on and limits:
            body["thinking"] = {"type": "enabled", "budget_tokens": tokens}
            body["max_tokens"] = max(number(body["max_tokens"]), tokens + 4096)
        elif on:
            body["thinking"] = {"type": "adaptive"}
            body["output_config"] = {**table(body.get("output_config")), "effort": level}


def addressed(call: Call, account: Account, token: str) -> str:
    row, base = call.row, call.row["base-url"].rstrip("/")
    header = row["key-header"] if row["key-host"] in ("", URL(base).host) else "Authorization"
    call.headers[header] = f"Bearer {token}" if header == "Authorization" else token
    call.headers.popall("Chatgpt-Account-Id", None)
    if number := account.token.get("account_id") or claims(account.token).get("account_id"):
        call.headers["Chatgpt-Account-Id"] = str(number)
    path = row["paths"][call.verb].replace("{model}", quote(call.served_model, "", None, "replace"))
    if re.search(r"/(v\d\w*(/openai)?|backend-api/codex)$", base):
        path = re.sub(r"^/(v\d\w*|backend-api/codex)", "", path)
    query = "?alt=sse" if call.verb == "streamGenerateContent" else ""
    return f"{base}{path}{query}".replace("{verb}", call.verb)


def quota_of(headers: Any) -> list[Json]:
    """The windows an answer tells of; `resets_at` in seconds since 1970 (providers.md 1.6, 2.6)."""
    told: dict[str, Json] = {}
    for name, value in headers.items():
        if found := QUOTA.fullmatch(name.lower()):
            told.setdefault(found["window"], {})[found["field"]] = value
    return [{"window": name, "full": of.get("status") == "rejected", "used_percent": round(
             number(of.get("used-percent")) or 100 * number(of.get("utilization")), 1),
             "resets_at": number(at := of.get("reset", of.get("reset-at"))) or moment(at)}
            for name, of in told.items()]  # fmt: skip


class Reading:
    """One answer: Codex's lost output comes back, the model has the name that the client gave."""

    def __init__(self, call: Call, answered: Callable[[], None]) -> None:
        self.call, self.answered, self.items = call, answered, dict[int, Any]()
        self.told, self.ended, self.done, self.whole = False, False, False, Json()

    async def refusal(self, upstream: Upstream, windows: list[Json], now: float) -> ProxyError:
        raw, answer, headers = b"", Json(), upstream.headers
        with suppress(*NET_ERRORS):
            while len(raw) < BODY_LIMIT and (data := await upstream.content.readany()):
                raw += data
            raw = (inflate(raw) or raw).strip().removeprefix(b"[").removesuffix(b"]")
            answer = read_object(raw)
        error = self.failure(answer, upstream.status)
        full = {w["window"]: w["resets_at"] - now for w in windows if w["full"]}
        waits = number(headers.get("Retry-After")), *(full.values() if error.status == 429 else ())
        error.retry_after = max(error.retry_after, *waits)
        error.said += f" [{','.join(full)}]"
        kept = ("request-id", "content-type", "x-should-retry", "retry-after", "anthropic-*")
        error.headers.extend((k, v) for k, v in headers.items() if answer and matches(k, kept))
        error.body = raw if isinstance(answer.get("error"), dict) else error.body
        return error

    def failure(self, answer: Json, status: int = 0) -> ProxyError:
        told = table(answer.get("error")) or answer
        words = (str(told.get(name)) for name in ("code", "type", "status"))
        how = f"answered {status}" if status else "answered with an error:"
        message = f"{self.call.provider} {how} {error_text(answer, 'type', 'status')}"
        known = (STATUSES[word] for word in words if word in STATUSES and not status)
        status, said = status if status >= 400 else next(known, 502), error_text(answer)
        body = compact(error_body(self.call.dialect, status, said)) if answer else b""
        delay = DELAY.search(compact(told).decode())
        return ProxyError(status, message, seconds(delay[1]) if delay else 0, said, body)

    def __call__(self, data: bytes) -> bytes:
        at = data.find(b"{")
        if self.done or at < 0 or (self.told and not MATTERS.search(data)):
            return data
        event = read_object(data[at:])
        holder = table(event.get("message")) or table(event.get("response")) or event
        kind, change = str(event.get("type")), False
        late = self.told and kind == "response.failed" and not self.call.folds
        if kind == "error" or (isinstance(holder.get("error"), dict) and not late):
            raise self.failure(holder)
        self.ended = self.ended or kind in ENDS or bool(ENDING.search(data))
        if kind == "response.output_item.done":
            self.items[event.get("output_index", len(self.items))] = event.get("item")
        elif change := holder.get("output") == [] and bool(self.items):
            holder["output"] = [item for _, item in sorted(self.items.items())]
        key = "modelVersion" if self.call.dialect == "gemini" else "model"
        if isinstance(name := holder.get(key), str) and name != self.call.model:
            holder[key], given, asked = self.call.model, compact(name), compact(self.call.model)
            change = change or data.count(given) != 1  # a tool's input may have it, too
            data = data.replace(given, asked)
        if not self.told and kind not in QUIET:
            self.told = True
            self.answered()
        once = name == self.call.model and self.call.dialect == "chat"
        self.done = self.told and (once or self.call.dialect == "anthropic")
        self.whole = self.whole if holder is event else holder
        return data[:at] + compact(event) + b"\n\n" * (at > 0) if change else data


# == The server ====================================================================================
# The one place that takes requests: checks, dispatch, and the one exit for errors.
ROUTE_WORDS = {"local": "LOCAL_PROVIDER", "mapped": "MODEL_MAPPING", "amp": "AMP_CREDITS",
               "none": "NO_PROVIDER"}  # fmt: skip
AMP_BILLS = "AMP_CREDITS this client's model runs on Amp's servers: Amp bills it, not your logins"
PROBES = {"GET /healthz": 200, "HEAD /healthz": 200, "HEAD /": 200, "HEAD /api/hello": 404}


class Server(Forwarder):
    def __init__(self, live: Live, net: Net, clock: Any) -> None:
        super().__init__(Pool(live, net, clock))
        self.began, self.server_side, self.requests = clock.monotonic(), 0, deque[Json](maxlen=100)
        self.routes, self.paid = Counter(dict.fromkeys(ROUTE_WORDS, 0)), Counter[str]()

    async def handle(self, request: Any) -> Answer:
        found, began = MODEL_PATH.fullmatch(request.rel_url.raw_path), self.clock.monotonic()
        call = Call(request, found) if found else None
        response: Answer | None = None
        try:
            response = await self.dispatch(request, call)
        except ConnectionError:
            raise  # the client is gone
        except Exception as error:  # a ProxyError, or a fault of this program, which survives it
            if not isinstance(error, ProxyError):
                log.error("internal error: %s: %s", type(error).__name__, why(error))
                error = ProxyError(500, "internal error of ampproxy, see its log")
            if call:
                call.trouble = f"{call.trouble}; {error.message}".removeprefix("; ")
            begun = request.begun
            response = await begun.end(error) if begun else self.refuse(request, call, error)
        finally:
            request.begun = None  # else both wait for the garbage collector, with the body
            if call and call.raw:
                status = response.status if response is not None else 499  # the client left
                self.note(call, status, self.clock.monotonic() - began)
        return response

    def refuse(self, request: Request, call: Call | None, error: ProxyError) -> Answer:
        error.headers.update(call.marks if call else {})
        error.headers.setdefault("Content-Type", "application/json")
        wait = max(1, round(error.retry_after)) if error.retry_after else 0
        error.headers.update({"Retry-After": str(wait)} if wait else {})
        error.headers.update({"x-should-retry": "false"} if wait > 30 else {})
        said = error_body(call.dialect if call else "", error.status, error.message)
        if error.status == 502 and not call:
            said = {"error": "amp_upstream_proxy_error", "message": error.message}
        spent = error.status == 429 and wait > 30 and b'"usage_limit_reached"' not in error.body
        if call and call.dialect == "responses" and spent:  # Codex waits out any other in silence
            ends = {"resets_in_seconds": wait, "resets_at": round(self.clock.time()) + wait}
            said["error"] |= {"type": "usage_limit_reached", "code": "usage_limit_reached", **ends}
            error.body = b""
        body = error.body or compact(said)
        return web.Response(status=error.status, body=body, headers=error.headers)

    def note(self, call: Call, status: int, took: float) -> None:
        self.routes[call.route] += 1
        self.paid.update([call.model[:200]] if call.route == "amp" and status in (200, 499) else [])
        names = ("dialect", "model", "route", "provider", "account", "served_model")
        row = {name: getattr(call, name)[:200] for name in names} | call.tokens
        row |= {"time": rfc3339(self.clock.time()), "status": status, "seconds": round(took, 3)}
        self.requests.append(row)
        level = logging.WARNING if call.trouble or status >= 400 else logging.INFO
        who = f"{call.provider or '-'} {mask(call.account) if call.account else ''}"
        word, model = ROUTE_WORDS[call.route], call.model[:100] or "-"
        log.log(level, "%s %s %s %d %.1fs %s", word, model, who, status, took, call.trouble)

    async def dispatch(self, request: Request, call: Call | None) -> Answer:
        config, path, method = self.live.config, request.rel_url.raw_path, request.method
        if not request.raw_path.startswith("/") or method == "CONNECT":
            raise ProxyError(400, "only targets that begin with / are served, and no tunnels")
        browses = method in ("GET", "HEAD") and bool(BROWSER_PATHS.match(path))
        request.refuse_strangers(config, browses)
        if found := PROBES.get(f"{method} {path}"):
            return web.json_response({"status": "ok"}, status=found)
        if browses:
            return web.Response(status=302, headers={"Location": self.address(request)})
        key = request.key(config["api-keys"])
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        upgrade = "Upgrade" in request.headers and web.WebSocketResponse().can_prepare(request).ok
        if call and upgrade:
            raise ProxyError(426, "model calls are not served over WebSockets here: use POST")
        if call and method == "POST":
            return await self.answer(call, key)
        local = config["ampcode"]["restrict-management-to-localhost"] and not call
        if local and not is_loopback(request.remote or ""):  # forwarding headers prove nothing
            raise ProxyError(403, "Access denied: management routes restricted to localhost")
        if method == "GET" and LISTING.fullmatch(path) and not upgrade:
            return web.json_response(self.models(request))
        if method == "GET" and path in ("/", "/status"):
            return web.json_response(self.report())
        if (method == "POST" or upgrade) and path.startswith(("/api/thread-actors", "/actors/")):
            self.server_side += path == "/api/thread-actors"
            log.warning(AMP_BILLS)
        return await (self.tunnel if upgrade else self.forward)(request, key)

    def models(self, request: Request) -> Json:
        """What the present accounts serve; Anthropic's and OpenAI's clients find theirs in one."""
        owners = dict(sorted(self.listed().items()))
        if "x-goog-api-key" in request.headers or re.search("/v1beta|/google/", request.path):
            more: Json = {"supportedGenerationMethods": [*DEFAULTS["gemini-api-key"][0]["paths"]]}
            return {"models": [{"name": f"models/{n}", "displayName": n, **more} for n in owners]}
        more = {"type": "model", "object": "model", "created": 0, "created_at": rfc3339(0)}
        rows = [{"id": n, "display_name": n, "owned_by": owners[n], **more} for n in owners]
        ends = {"first_id": min(owners, default=None), "last_id": max(owners, default=None)}
        return {"object": "list", "data": rows, "has_more": False, **ends}

    def report(self) -> Json:
        return {"version": __version__, "uptime_seconds": int(self.clock.monotonic() - self.began),
                "routes": dict(self.routes), "paid": dict(self.paid.most_common(100)),
                "accounts": [self.report_account(a) for a in self.pool.accounts.values()],
                "server_side_threads": self.server_side, "requests": [*self.requests]}  # fmt: skip

    def report_account(self, account: Account) -> Json:
        now, time, ends = self.clock.monotonic(), self.clock.time(), expiry(account.token)
        state, wait = account.state(now), account.wait("", now)
        rests = sorted(account.rests.items())
        reasons = (f"{m[:100]}: {rest.error.message}".removeprefix(": ") for m, rest in rests[:20])
        quota = [{"window": w["window"], "used_percent": w["used_percent"], "resets_in_seconds":
                  max(0, round(w["resets_at"] - time))} for w in account.quota]  # fmt: skip
        return {"provider": account.type, "account": account.email, "state": state,
                "reason": "; ".join(reasons), "quota": quota, "plan": account.plan,
                "in_flight": account.in_flight, "threads": self.pool.threads()[account],
                "wakes_in_seconds": round(wait) if state == "resting" else None, **account.counts,
                "expires_in_seconds": round(ends - time) if ends < 1e12 else None}  # fmt: skip

    def tick(self) -> None:
        try:
            if self.live.reload():
                set_up_log(self.live)
            self.pool.scan()
            self.pool.refresh_ahead()
        except Exception as error:  # whatever is in the files: the next look comes
            log.error("%s; what was read before stays in effect", why(error))

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        self.pool.scan()
        loop = asyncio.get_running_loop()
        made = functools.partial(Request, loop=loop, client_max_size=BODY_LIMIT)
        server = web.Server(
            self.handle, handler_cancellation=True, auto_decompress=False, access_log=None,
            max_line_size=65536, max_field_size=65536, request_factory=made)  # fmt: skip
        hint, config = "is ampproxy running already? --port takes another one", self.live.config
        try:
            async with listen(server, config["host"], config["port"], hint) as bound:
                yield bound
                await asyncio.gather(*(s.close(code=1001) for s in self.sockets.values()))
        finally:
            if running := [a.refreshing for a in self.pool.accounts.values() if a.refreshing]:
                await asyncio.wait(running, timeout=REFRESH_WAIT)
            await self.net.session.close()


def set_up_log(live: Live) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%X"))
    handler.addFilter(redact)
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.DEBUG if live.config["debug"] else logging.INFO)
    logging.basicConfig(handlers=[logging.NullHandler()])  # the libraries' own logs stay silent
    for line in live.warnings:
        log.warning("%s", line)


# == Command line ==================================================================================
# One coroutine a command, its help the docstring.  Failure is what main says in one sentence.
VERBS = {"anthropic": "messages", "chat": "completions", "responses": "responses",
         "gemini": "generateContent"}  # fmt: skip
NAMES = {name: row for row in RULES for name in (row, *DEFAULTS["providers"][row]["aliases"])}


async def serve(live: Live, args: Json) -> None:
    """Run the proxy; also without a command."""
    server, stop = Server(live, Net(live), CLOCK), asyncio.get_running_loop().create_future()
    for name in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError):  # Windows: there Ctrl-C ends the program at once
            stop.get_loop().add_signal_handler(name, stop.cancel)
    async with server.serving() as port:
        log.info("ampproxy %s: http://%s:%d", __version__, live.config["host"], port)
        while not (await asyncio.wait([stop], timeout=1))[0]:
            server.tick()
        log.info("stopping: running answers get 10 seconds")


async def login(live: Live, args: Json) -> None:
    """Sign in to a provider; several logins are several accounts."""
    if not args["provider"]:
        raise Failure(f"say which provider: ampproxy.py login {'|'.join(RULES)}")
    remote = os.environ.keys() & {"SSH_CONNECTION", "SSH_TTY"}
    name, browser = NAMES[args["provider"]], not ("no_browser" in args or remote)
    email, path = await sign_in(live, as_row(name, live.config["providers"][name]), browser)
    say(f"Signed in to {name} as {email}; the login is kept in {path}")


async def logout(live: Live, args: Json) -> None:
    """Delete a login."""
    there = [a for a in Pool(live).scan() if a.type == NAMES[args["provider"]]]
    wanted = [a for a in there if args["account"] in (None, a.email, a.path.name, a.path.stem)]
    if len(wanted) != 1:
        problem = "several accounts, say which one of" if wanted else "no such account among"
        raise Failure(f"{problem}: {', '.join(a.email for a in there) or 'none'} ({live.auth_dir})")
    wanted[0].path.unlink()
    say(f"Logged out as {wanted[0].email}: {wanted[0].path} is deleted")


async def accounts(live: Live, args: Json) -> None:
    """List the accounts."""
    line = "{:<20}  {:<30}  {:<6}  {:<12}  {:<11}  {}"
    say(line.format("PROVIDER", "ACCOUNT", "PLAN", "EXPIRES", "STATE", "FILE"))
    for a in (found := Pool(live).scan()):
        left = (expiry(a.token) - time.time()) / HOUR
        ends = "refresh due" if left < 0 else f"in {left:.1f} h" if left < 1e9 else "never"
        say(line.format(a.type, a.email, a.plan or "-", ends, a.state(0), a.path))
    if not found:
        say(f"No accounts in {live.auth_dir} yet. Next: ampproxy.py login claude")


async def status(live: Live, args: Json) -> None:
    """Ask the running proxy how it stands, as JSON."""
    host, keys = live.config["host"] or "localhost", [*live.config["api-keys"], ""]
    url = URL.build(scheme="http", host=host, port=live.config["port"], path="/status")
    more: Any = {"headers": {"X-Api-Key": keys[0]}, "timeout": aiohttp.ClientTimeout(total=10)}
    try:
        async with aiohttp.request("GET", url, raise_for_status=True, **more) as answer:
            told = read_object(await answer.read())
    except NET_ERRORS as error:
        raise Failure(f"no proxy to ask at {url} ({why(error)}): start it, see --config") from error
    say(json.dumps(told, indent=2, ensure_ascii=False))


async def route(live: Live, args: Json) -> None:
    """Say who would serve a model, and why; nothing is sent."""
    chooser, verb = Forwarder(Pool(live)), VERBS.get(args["dialect"], "")
    chooser.pool.scan()
    ways, told = chooser.ways(*without_suffix(args["model"]), verb)
    rule = live.config["ampcode"]["fallback"]
    chosen = [f"{way}: {rows[0]['name']} as {name} {level}" for way, name, level, rows in ways]
    say("\n".join([*told, f"So {', then '.join(chosen) or f'nobody here; fallback: {rule}'}"]))


async def check(live: Live, args: Json) -> None:
    """Check the configuration and print what is in effect."""
    say(f"# In effect, from {live.path or 'the defaults (no config.yaml was found)'}:")
    say(yaml.safe_dump(masked(live.config), sort_keys=False, allow_unicode=True).rstrip())


def masked(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: masked(v, f"{key} {k}".lower()) for k, v in value.items()}
    if isinstance(value, list):
        return [masked(v, key) for v in value]
    secret = re.search(r"api-keys?$|secret$|proxy-url$|headers (?!anthropic-)", key)
    text = re.sub(r"//[^/@\s]+@", "//...@", value) if isinstance(value, str) else value
    return mask(text) if secret and text else text


COMMANDS = {c.__name__: c for c in (serve, login, logout, accounts, status, route, check)}
ARGUMENTS: dict[str, Json] = {  # "": of every command; those of `serve` need not name it
    "": {"--config": {"metavar": "FILE", "help": "the configuration file"}},
    "serve": {"--host": {"metavar": "H", "help": "listen on this address"},
              "--port": {"metavar": "N", "type": int, "help": "listen on this port"},
              "--debug": {"action": "store_true", "help": "say more in the log"}},
    "login": {"provider": {"nargs": "?", "choices": NAMES, "default": None},
              "--no-browser": {"action": "store_true", "help": "print the address only"}},
    "logout": {"provider": {"choices": NAMES}, "account": {"nargs": "?", "default": None}},
    "route": {"model": {}, "--dialect": {"choices": VERBS, "default": ""}},
    "status": {"--json": {"action": "store_true"}}}  # fmt: skip


def parse(argv: list[str] | None) -> Json:
    bare: Any = {"allow_abbrev": False, "argument_default": argparse.SUPPRESS}
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser("ampproxy.py", description=about, **bare)
    parser.add_argument("--version", action="version", version=f"ampproxy {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.__doc__, description=command.__doc__, **bare)
    for name, made in [("serve", parser), *commands.choices.items()]:
        for argument, more in (ARGUMENTS[""] | ARGUMENTS.get(name, {})).items():
            made.add_argument(argument, **more)
    args = vars(parser.parse_args(argv))
    if not 0 <= args.get("port", 0) <= 65535:
        parser.error("argument --port: a port is a number from 0 to 65535")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    given = {name: args[name] for name in ("host", "port", "debug") if name in args}
    try:
        live = Live(find_config(args.get("config")), **given)
        set_up_log(live)
        loop = "uvloop" if importlib.util.find_spec("uvloop") else "asyncio"
        importlib.import_module(loop).run(COMMANDS[args.get("command") or "serve"](live, args))
    except (Exception, KeyboardInterrupt) as error:  # a fault of this program: one sentence, too
        problem = why(error) if isinstance(error, Exception) else "stopped"
        print(f"ampproxy: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
