#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.11.10,<4", "pyyaml>=6,<7", "msgspec>=0.19,<1", "uvloop>=0.21,<1; sys_platform != 'win32'",
#                 "backports.zstd>=1,<2; python_version < '3.14'", "pytest>=8", "anthropic>=0.70", "openai>=2", "google-genai>=3", "hypothesis>=6"]
# ///
"""Tests of ampproxy: `uv run test_ampproxy.py`, or `python test_ampproxy.py` where the packages are.

Real sockets on 127.0.0.1, real files, a clock that the test moves.  Fakes stand for the outside world
only: FakeUpstream for a provider, a login authority or ampcode.com, each answering from a script.
Any argument goes to pytest: `python test_ampproxy.py -k stream`; but `bench` measures (the last section).
Without any, and behind --halves, two processes share the tests.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import base64
import bisect
import dataclasses
import enum
import fcntl
import functools
import gc
import gzip
import hashlib
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import random
import re
import secrets
import select
import shutil
import signal
import socket
import ssl
import stat
import statistics
import struct
import subprocess
import symtable
import sys
import tempfile
import termios
import threading
import time
import weakref
import zlib
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

import aiohttp
import pytest
import yaml
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from multidict import CIMultiDict
from yarl import URL

import ampproxy

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "ampproxy.py"

# == The world =====================================================================================


def loop_runner():
    """uvloop's `run` where it is importable, else asyncio's: for the load, too."""
    return importlib.import_module(
        "uvloop" if importlib.util.find_spec("uvloop") else "asyncio"
    ).run


def in_loop(test):
    """Run an async test, on uvloop where it is; no plugin.  Twenty seconds are the most for any."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        async def bounded():
            async with asyncio.timeout(20):
                return await test(*args, **kwargs)

        return loop_runner()(bounded())

    return run


class HandClock:
    """Time that moves when a test says so; sleeping moves it."""

    def __init__(self):
        self.now = 0.0

    def time(self):
        return 1_800_000_000 + self.now

    def monotonic(self):
        return 5000 + self.now

    async def sleep(self, seconds):
        self.now += seconds
        await asyncio.sleep(0)


class FakeUpstream:
    """A server that answers from `script`, then from `usual`, and keeps what came in.

    An answer is (status, headers, parts); a part is bytes, an Event to wait for, "cut" (the connection
    is aborted), or a function of the request that makes the whole answer.
    """

    def __init__(self, usual):
        self.usual, self.script, self.requests = usual, [], []
        self.gone = asyncio.Event()  # a client left in the middle of an answer

    async def handle(self, request):
        request.bytes = await request.read()
        self.requests.append(request)
        answer = self.script.pop(0) if self.script else self.usual
        if callable(answer):
            return await answer(request)
        status, headers, parts = answer
        response = web.StreamResponse(status=status, headers=headers)
        if not any(name.lower() == "content-length" for name in headers):
            response.enable_chunked_encoding()
        try:
            await response.prepare(request)
            for part in parts:
                if isinstance(part, asyncio.Event):
                    await part.wait()
                elif part == "cut":
                    request.transport.abort()
                    return response
                else:
                    await response.write(part)
            await response.write_eof()
        except (asyncio.CancelledError, ConnectionError):
            self.gone.set()
            raise
        return response

    @asynccontextmanager
    async def open(self):
        server = web.Server(self.handle, auto_decompress=False, handler_cancellation=True)
        server.request_factory = functools.partial(self.factory, server.request_factory)
        runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    @staticmethod
    def factory(make, *args):
        request = make(*args)
        request._client_max_size = 1 << 30
        return request

    @property
    def last(self):
        return self.requests[-1]

    def body(self, index=-1):
        return json.loads(self.requests[index].bytes)


def answer_json(value, status=200, **headers):
    return status, {"Content-Type": "application/json", **headers}, [json.dumps(value).encode()]


def message(model="claude-opus-4-6", **more):
    return {
        "id": "msg_1", "type": "message", "role": "assistant", "model": model,
        "content": [{"type": "text", "text": "hi"}], "stop_reason": "end_turn",
        "usage": {"input_tokens": 11, "output_tokens": 7}, **more,
    }  # fmt: skip


def held(gate, answer):
    """The answer, its body behind the gate."""
    status, headers, parts = answer
    return status, headers, [gate, *parts]


def event(kind, **fields):
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def events(model="claude-opus-4-6"):
    """The events of one short stream."""
    start = {**message(model), "content": [], "usage": {"input_tokens": 11, "output_tokens": 1}}
    return [
        event("message_start", message=start),
        event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        event("content_block_delta", index=0, delta={"type": "text_delta", "text": "hé"}),
        event("content_block_stop", index=0),
        event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 7}),
        event("message_stop"),
    ]


SSE = {"Content-Type": "text/event-stream"}
ASK = {
    "model": "claude-opus-4-6",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "hi"}],
}
STREAM = {**ASK, "stream": True}
PATH = "/api/provider/anthropic/v1/messages"
NEW_TOKEN = {
    "access_token": "sk-ant-oat-new",
    "refresh_token": "sk-ant-ort-new",
    "expires_in": 28800,
}


def token_file(folder, name="fred@example.com", **changes):
    folder.mkdir(mode=0o700, exist_ok=True)
    token = {
        "type": "claude", "email": name, "access_token": f"sk-ant-oat-{name}", "refresh_token": f"sk-ant-ort-{name}",
        "expired": "2027-01-15T16:00:00Z", "last_refresh": "2027-01-15T07:00:00Z", "note": "kept", **changes,
    }  # fmt: skip
    path = folder / f"claude-{name}.json"
    path.write_text(json.dumps(token))
    return path


class World:
    """A proxy between a fake Claude, a fake token endpoint and a fake ampcode.com."""

    async def ask(self, path, body=None, method="POST", headers=(), **more):
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        url = URL(self.url + path, encoded=True)
        sent = {"Content-Type": "application/json", **dict(headers)}
        async with self.http.request(
            method, url, data=data, headers=sent, allow_redirects=False, **more
        ) as response:
            response.bytes = await response.read()
            return response

    async def ask_json(self, path, body=None, **more):
        response = await self.ask(path, body, **more)
        return response.status, json.loads(response.bytes), response.headers

    def reload(self, **config):
        self.write(**config)
        self.server.live.seen = None
        return self.server.live.reload()

    def write(self, **config):
        ampcode = {"upstream-url": self.amp.url, **config.pop("ampcode", {})}
        claude = {"base-url": self.claude.url, "token-url": self.authority.url + "/token",
                  "profile-url": self.authority.url + "/profile", **config.pop("claude", {})}  # fmt: skip
        config = {
            "auth-dir": str(self.auth),
            "port": 0,
            "ampcode": ampcode,
            "providers": {"claude": claude},
            **config,
        }
        self.file.write_text(yaml.safe_dump(config))


@asynccontextmanager
async def world(folder, tokens=("fred@example.com",), **config):
    w = World()
    w.clock, w.auth, w.file = HandClock(), folder / "auth", folder / "config.yaml"
    w.claude = FakeUpstream(answer_json(message()))
    w.authority = FakeUpstream(answer_json(NEW_TOKEN))
    w.amp = FakeUpstream(answer_json({"from": "ampcode"}))
    w.tokens = [token_file(w.auth, name) for name in tokens]
    async with w.claude.open(), w.authority.open(), w.amp.open():
        w.write(**config)
        live = ampproxy.Live(w.file)
        w.server = ampproxy.Server(live, ampproxy.Net(live), w.clock)
        async with w.server.serving() as port:
            w.port, w.url = port, f"http://127.0.0.1:{port}"
            async with aiohttp.ClientSession(
                auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
            ) as w.http:
                yield w


async def connect_and_send(port, data, half_close=False):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    if half_close:
        writer.write_eof()
    return reader, writer


async def raw_exchange(port, data, half_close=False):
    """Bytes to the proxy, and all that it says before it closes or falls silent for half a second."""
    reader, writer = await connect_and_send(port, data, half_close)
    got = b""
    with suppress(TimeoutError, ConnectionError):
        while chunk := await asyncio.wait_for(reader.read(65536), 5 if not got else 0.5):
            got += chunk
    writer.close()
    return got


@pytest.fixture(autouse=True)
def empty_home(tmp_path, monkeypatch):
    """No file and no key of the person who runs the tests may matter."""
    for name in (
        "AMP_API_KEY",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "http_proxy",
        "https_proxy",
        "ALL_PROXY",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    logging.getLogger("ampproxy").propagate = True
    yield
    logging.getLogger("ampproxy").handlers = []


# == Shape of the file =============================================================================


def globals_used(table):
    """The module's names that a function or class uses, in itself and in what it defines."""
    used = {
        symbol.get_name()
        for symbol in table.get_symbols()
        if symbol.is_global() and symbol.is_referenced()
    }
    return used.union(*(globals_used(child) for child in table.get_children()))


def sections(text):
    """[title, the names it defines, the names it uses] of each section, from the top."""
    lines = text.splitlines()
    marks = [i for i, line in enumerate(lines, 1) if line.startswith("# == ")]
    found = [[lines[mark - 1].strip("# ="), set(), set()] for mark in marks]
    tables = {
        (t.get_name(), t.get_lineno()): t
        for t in symtable.symtable(text, "ampproxy", "exec").get_children()
    }
    for node in ast.parse(text).body:
        section = next(
            (
                f
                for f, mark in zip(reversed(found), reversed(marks), strict=True)
                if mark <= node.lineno
            ),
            None,
        )
        if section is None:
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            section[1].add(node.name)
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            table = tables.get((node.name, node.lineno)) or tables[node.name, first]
            section[2] |= globals_used(table)
        else:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            section[1] |= {
                n.id for t in targets if t for n in ast.walk(t) if isinstance(n, ast.Name)
            }
            section[2] |= {
                n.id
                for n in ast.walk(node)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
            }
    return found


def used_too_early(text):
    """The names that a section uses although they stand below it."""
    found, known, late = sections(text), set(), []
    everything = set().union(*(defined for _, defined, _ in found))
    for title, defined, used in found:
        known |= defined
        late += [f"{title}: {name}" for name in used & everything - known]
    return late


def test_sections_read_downward():
    """Each section uses only what stands above it, or in it."""
    text = SCRIPT.read_text()
    assert len(sections(text)) > 16
    assert not used_too_early(text)
    listed = ampproxy.__doc__.partition("The sections")[2]
    places = [listed.find(f"\n{title}  ") for title, *_ in sections(text)]
    assert places == sorted(places), "the docstring lists them, in their order"
    assert min(places) > 0


@pytest.mark.parametrize("use", [
    "def f():\n    later()", "class C:\n    def f(self):\n        return [later() for _ in self]", "x = later",
    "class C:\n    class D:\n        async def f(self):\n            await later()", "class C:\n    y = later()",
])  # fmt: skip
def test_a_name_from_below_is_found_wherever_it_is_used(use):
    assert used_too_early(f"# == One ==\n{use}\n# == Two ==\ndef later():\n    pass\n") == [
        "One: later"
    ]


@pytest.mark.parametrize("path", [SCRIPT, Path(__file__)])
def test_no_name_hides_another_one(path):
    names = Counter()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] += 1
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = [leaf for target in targets for leaf in ast.walk(target)]
            names.update({leaf.id for leaf in found if isinstance(leaf, ast.Name)})
    twice = {name for name, count in names.items() if count > 1}
    assert twice <= {"log", "msgspec"}


def test_size_and_width():
    lines = SCRIPT.read_text().splitlines()
    functions = [
        n
        for n in ast.walk(ast.parse("\n".join(lines)))
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    assert not [f.name for f in functions if f.end_lineno - f.lineno > 45]


@pytest.mark.parametrize("path", [SCRIPT, HERE / "test_ampproxy.py"])
def test_scripts_run_by_themselves(path):
    head = path.read_text().splitlines()
    assert head[0] == "#!/usr/bin/env -S uv run --script"
    assert head[1:3] == ["# /// script", '# requires-python = ">=3.11"']
    assert path.stat().st_mode & stat.S_IXUSR


def leaves(table, prefix=""):
    for key, value in table.items():
        if (
            isinstance(value, dict)
            and value
            and key
            not in {
                "headers",
                "paths",
                "authorize-query",
                "thinking",
                "metadata",
                "onboard-metadata",
                "envelope",
            }
        ):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_config_yaml_shows_every_key_and_changes_nothing():
    shipped = ampproxy.Live(HERE / "config.yaml")
    assert not shipped.warnings
    assert shipped.config == ampproxy.Live(None).config
    text = (HERE / "config.yaml").read_text()
    wanted = {path.rpartition(".")[2] for path in leaves(ampproxy.default_of(ampproxy.KEYS))}
    internal = {"also", "paths", "passes", "callback-path", "authorize-query",
                "refresh-lead", "enabled", "token-form", "drops", "key-header", "key-host", "hosted",
                "only-streams", "own-headers", "wraps", "envelope", "warning", "login-wait", "load-path", "metadata",
                "onboard-path", "onboard-metadata", "tier-key", "tier", "onboard-tries", "onboard-pause"}  # fmt: skip
    assert not [key for key in wanted - internal if f"{key}:" not in text]


# == Configuration =================================================================================


def load(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return ampproxy.Live(path)


def at(config, dotted):
    return functools.reduce(
        lambda table, key: table[int(key) if key.isdigit() else key], dotted.split("."), config
    )


@pytest.mark.parametrize(("text", "key", "value"), [
    ("port: 9000", "port", 9000),
    ("port:", "port", 8317),
    ("max-cooldown: 12", "max-cooldown", 12),
    ("routing: {strategy: fill-first}", "routing.strategy", "fill-first"),
    ("routing: {session-affinity-ttl: 1h30m}", "routing.session-affinity-ttl", "1h30m"),
    ("api-keys: [' one ', '']", "api-keys", ["one"]),
    ("amp-upstream-url: http://x", "ampcode.upstream-url", "http://x"),
    ("amp-upstream-url: http://x\nampcode: {upstream-url: http://y}", "ampcode.upstream-url", "http://y"),
    ("amp-restrict-management-to-localhost: true", "ampcode.restrict-management-to-localhost", True),
    ("amp-model-mappings: [{from: a, to: b}]", "ampcode.model-mappings.0.to", ["b"]),
    ("ampcode: {model-mappings: [{from: a, to: [b, c]}]}", "ampcode.model-mappings.0.to", ["b", "c"]),
    ("providers: {claude: false}", "providers.claude.enabled", False),
    ("providers: {codex: true}", "providers.codex.enabled", True),
    ("providers: {claude: {headers: {X-A: b}}}", "providers.claude.headers.X-A", "b"),
    ("providers: {claude: {headers: {X-A: b}}}", "providers.claude.headers.anthropic-version", "2023-06-01"),
    ("claude-api-key: [{api-key: k, models: [a, {name: b, alias: c}]}]", "claude-api-key.0.models", ["a", {"name": "b", "alias": "c"}]),
    ("openai-compatibility: [{name: o, base-url: http://o, api-key-entries: [{api-key: k}]}]",
     "openai-compatibility.0.api-key-entries.0.api-key", "k"),
    ("ampcode: {upstream-api-key: '${FROM_ENV}-x'}", "ampcode.upstream-api-key", "value-x"),
    ("api-keys: ['${FROM_ENV}']", "api-keys.0", "value"),
])  # fmt: skip
def test_config_reads(tmp_path, monkeypatch, text, key, value):
    monkeypatch.setenv("FROM_ENV", "value")
    live = load(tmp_path, text)
    assert at(live.config, key) == value
    assert not live.warnings


@pytest.mark.parametrize(("text", "line", "words"), [
    ("\nport: nine", 2, "port: expected a whole number from 0 to 65535"),
    ("port: 70000", 1, "port: expected a whole number"),
    ("port: true", 1, "port: expected a whole number"),
    ("port: '8317'", 1, "port: expected a whole number"),
    ("request-retry: 0", 1, "request-retry: expected a whole number from 1"),
    ("max-cooldown: .nan", 1, "max-cooldown: expected a number"),
    ("max-retry-interval: -1", 1, "max-retry-interval: expected a number"),
    ("debug: 'yes'", 1, "debug: expected true or false"),
    ("host: [a]", 1, "host: expected a text"),
    ("api-keys: secret", 1, "api-keys: expected a list"),
    ("api-keys: [12345]", 1, "api-keys[0]: expected a text"),
    ("ampcode:\n  fallback: sometimes", 2, "ampcode.fallback: expected one of always, unserved, never"),
    ("ampcode: on", 1, "ampcode: expected a table"),
    ("routing: {session-affinity-ttl: soon}", 1, "routing.session-affinity-ttl: expected a length of time"),
    ("ampcode:\n  model-mappings:\n    - {from: a}", 3, "ampcode.model-mappings[0]: needs 'to'"),
    ("ampcode:\n  model-mappings:\n    - {to: a}", 3, "ampcode.model-mappings[0]: needs 'from'"),
    ("ampcode:\n  model-mappings:\n  - {from: a, to: b}\n  - {from: '(', to: b, regex: true}", 4,
     "ampcode.model-mappings[1].from: is no regular expression"),
    ("providers:\n  claude: 5", 2, "providers.claude: expected a table"),
    ("providers: {claude: {headers: {a: 1}}}", 1, "providers.claude.headers.a: expected a text"),
    ("ampcode:\n  upstream-api-key: ${NOT_SET_ANYWHERE}", 2,
     "ampcode.upstream-api-key: the environment variable NOT_SET_ANYWHERE is not set"),
    ("a: [1\nb: 2", 2, "cannot be read"), ("<<: 3", 1, "cannot be read"),
    ("ampcode: {upstream-url: ampcode.com}", 1, "ampcode.upstream-url: expected an address that begins with http"),
    ("proxy-url: socks5://a:1", 1, "proxy-url: expected an address"),
    ("- a list", 1, "the file: expected a table"),
])  # fmt: skip
def test_config_errors_name_file_line_and_key(tmp_path, text, line, words):
    with pytest.raises(ampproxy.Failure) as error:
        load(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path / 'config.yaml'}:{line}: ")
    assert words in str(error.value)


def test_unknown_keys_are_named_with_their_line_and_the_nearest(tmp_path):
    live = load(tmp_path, "port: 1\nampcode:\n  upstrem-url: x\nremote-management: {a: b}\n")
    assert len(live.warnings) == 2
    assert (
        f"{live.path}:3: unknown key 'upstrem-url'; the nearest is 'upstream-url'" in live.warnings
    )
    assert any(
        line.startswith(f"{live.path}:4: unknown key 'remote-management'") for line in live.warnings
    )


def test_config_not_utf8_and_missing(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"host: \xff")
    for path in (tmp_path / "config.yaml", tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ampproxy.Failure, match="cannot be read"):
            ampproxy.Live(path)


@pytest.mark.parametrize(("host", "keys", "fine"), [
    ("127.0.0.1", [], True), ("localhost", [], True), ("::1", [], True), ("127.9.9.9", [], True),
    ("0.0.0.0", [], False), ("", [], False), ("192.168.1.5", [], False), ("0.0.0.0", ["k"], True), ("", [""], False),
])  # fmt: skip
def test_a_wide_open_start_is_refused(tmp_path, host, keys, fine):
    text = yaml.safe_dump({"host": host, "api-keys": keys})
    if fine:
        load(tmp_path, text)
    else:
        with pytest.raises(ampproxy.Failure, match="set api-keys"):
            load(tmp_path, text)


def test_search_order(tmp_path, monkeypatch):
    own = Path("~/.config/ampproxy/config.yaml").expanduser()
    own.parent.mkdir(parents=True)
    own.write_text("port: 3")
    monkeypatch.setattr(ampproxy, "__file__", str(tmp_path / "script" / "ampproxy.py"))
    (tmp_path / "script").mkdir()
    assert ampproxy.find_config(None) == own
    (tmp_path / "script/config.yaml").write_text("port: 2")
    assert ampproxy.find_config(None) == tmp_path / "script/config.yaml"
    Path("config.yaml").write_text("port: 1")
    assert ampproxy.find_config(None) == Path.cwd() / "config.yaml"
    assert ampproxy.find_config("~/x.yaml") == Path.home() / "x.yaml"


def look(live):
    """What the running proxy does each second: is a changed file in effect now?"""
    try:
        return live.reload()
    except ampproxy.Failure as error:
        logging.getLogger("ampproxy").error(error)
        return False


def test_reload_takes_a_good_file_and_keeps_the_last_good_one(tmp_path, caplog):
    live = load(tmp_path, "port: 1000\nrequest-retry: 5")
    assert not look(live)
    for text in (
        "request-retry: none",
        "",
        "# nothing\n",
        "---\n",
        "{}",
        "host: 0.0.0.0",
        "port: !!int abc",
        "host: !foo 1",
        "a: ][",
    ):
        live.path.write_text(text)
        assert look(live) == (text == "host: 0.0.0.0"), (
            text
        )  # host and port never change while it runs
        assert not look(live), "reported once"
        assert live.config["port"] == 1000
    live.path.unlink()
    assert not look(live)
    draft = tmp_path / "draft"
    draft.write_text("request-retry: 7\nport: 2000")
    draft.rename(live.path)
    assert look(live)
    assert (live.config["request-retry"], live.config["port"]) == (7, 1000)
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 8


def test_reload_does_not_open_a_proxy_to_strangers(tmp_path):
    live = load(tmp_path, "host: 0.0.0.0\napi-keys: [one]")
    live.path.write_text("host: 127.0.0.1\nrequest-retry: 9")
    assert not look(live)
    assert live.config["api-keys"] == ["one"]
    live.path.write_text("api-keys: [two]")
    assert look(live)
    assert live.config["api-keys"] == ["two"]


# == Token files ===================================================================================


def test_token_is_private_whole_and_keeps_foreign_keys(tmp_path):
    path = tmp_path / "auth" / "claude-a@b.c.json"
    old = os.umask(0)
    try:
        ampproxy.save_token(path, {"type": "claude", "access_token": "one", "x-note": {"a": 1}})
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    first = path.stat().st_ino
    ampproxy.save_token(path, ampproxy.merge_token(path, {}, {"access_token": "two"}))
    assert json.loads(path.read_text()) == {
        "type": "claude",
        "access_token": "two",
        "x-note": {"a": 1},
    }
    assert path.stat().st_ino != first, "renamed into place, not written over"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_failed_write_leaves_the_old_token(tmp_path, monkeypatch):
    path = token_file(tmp_path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        ampproxy.save_token(path, {"access_token": "lost"})
    assert path.read_bytes() == before
    assert len(list(tmp_path.glob(".*tmp"))) == 0


@pytest.mark.parametrize(("token", "expires"), [
    ({"refresh_token": "r", "expired": "2027-01-15T08:00:00Z"}, 1_800_000_000),
    ({"refresh_token": "r", "expired": "2027-01-15T10:00:00.123456789+02:00"}, 1_800_000_000.123456),
    ({"refresh_token": "r", "expired": "soon"}, 0),
    ({"refresh_token": "r"}, 0),
    ({"refresh_token": "", "expired": "2020-01-15T08:00:00Z"}, float("inf")),
])  # fmt: skip
def test_expiry(token, expires):
    assert ampproxy.expiry(token) == pytest.approx(expires)


@in_loop
async def test_files_are_picked_up_while_running(tmp_path, caplog):
    async with world(tmp_path, tokens=()) as w:
        assert (await w.ask("/v1/messages", ASK)).status == 404
        path = token_file(w.auth)
        w.server.tick()
        assert (await w.ask("/v1/messages", ASK)).status == 200
        path.write_text("{torn")
        w.server.tick()
        w.server.tick()
        assert (await w.ask("/v1/messages", ASK)).status == 200, "what was known stays"
        assert [r for r in caplog.messages if str(path) in r], "named"
        assert len([r for r in caplog.messages if str(path) in r]) == 1, "once"
        assert path.read_text() == "{torn", "left alone"
        token_file(w.auth, disabled=True)
        w.server.tick()
        assert (await w.ask("/v1/messages", ASK)).status == 404
        path.unlink()
        w.server.tick()
        assert w.server.pool.accounts, "an editor may be at it"
        w.server.tick()
        status = json.loads((await w.ask("/status", method="GET")).bytes)
        assert status["accounts"] == []


# == Claude's rules ================================================================================

OAUTH = "oauth-2025-04-20"
SEALED, FOREIGN = "EqQBCgIYAhIM", "gAAAAABm"
EPHEMERAL = {"type": "ephemeral"}


def prepared(body, beta="", **over):
    provider = dataclasses.replace(ampproxy.LOGINS["claude"], **over)
    headers = ampproxy.Headers({"anthropic-beta": beta})
    before = json.loads(json.dumps(body))
    sent = ampproxy.claude_rules(body, headers, provider)
    assert body == before, "a rule changes nothing in place"
    return sent, headers["anthropic-beta"]


@pytest.mark.parametrize(("client", "betas", "sent"), [
    ("", None, OAUTH),
    ("a, b", None, f"a,b,{OAUTH}"),
    (f"{OAUTH},a", None, f"{OAUTH},a"),
    ("context-1m-2025-08-07,a", None, f"a,{OAUTH}"),
    ("a", ["b", "a", "context-1m-2025-08-07"], f"a,b,{OAUTH}"),
])  # fmt: skip
def test_beta_list(client, betas, sent):
    body = {"betas": betas} if betas else {}
    body, header = prepared(body, client)
    assert header == sent
    assert "betas" not in body


BLOCK = {"type": "text", "text": ampproxy.IDENTITY}
OWN = {"type": "text", "text": "be kind", "cache_control": EPHEMERAL}
BILLING = {"type": "text", "text": "x-anthropic-billing-header: a=b"}


@pytest.mark.parametrize(("system", "sent"), [
    (None, [BLOCK]), ("", [BLOCK]), ([], [BLOCK]),
    ("be kind", [BLOCK, {"type": "text", "text": "be kind"}]),
    ([OWN], [BLOCK, OWN]),
    ([BLOCK, OWN], [BLOCK, OWN]),
    ([BILLING, BLOCK, OWN], [BILLING, BLOCK, OWN]),
    ([BILLING, OWN], [BLOCK, BILLING, OWN]),
    ([{"type": "text", "text": ""}, OWN], [BLOCK, OWN]),
    (ampproxy.IDENTITY + " More.", [{"type": "text", "text": ampproxy.IDENTITY + " More."}]),
])  # fmt: skip
def test_identity(system, sent):
    body = {"system": system} if system is not None else {}
    assert prepared(dict(body))[0]["system"] == sent
    own = prepared(dict(body), identity=False)[0].get("system")
    assert own == (
        [block for block in system if block["text"]] if isinstance(system, list) else system
    )


ENABLED = {"type": "enabled", "budget_tokens": 4000}


@pytest.mark.parametrize(("body", "sent"), [
    ({"thinking": ENABLED, "tool_choice": {"type": "auto"}}, {"thinking": ENABLED, "tool_choice": {"type": "auto"}}),
    ({"thinking": {"type": "auto"}}, {"thinking": {"type": "adaptive"}}),
    ({"thinking": {"type": "auto", "display": "x"}}, {"thinking": {"type": "adaptive", "display": "x"}}),
    ({"thinking": ENABLED, "temperature": 0.7}, {"thinking": ENABLED}),
    ({"thinking": "very", "temperature": "hot"}, {"thinking": "very", "temperature": "hot"}),
])  # fmt: skip
def test_thinking_is_the_clients_own_but_for_auto(body, sent):
    assert prepared(json.loads(json.dumps(body)), identity=False)[0] == sent


CALL = {"type": "tool_use", "id": "toolu_1", "name": "glob", "input": {"signature": "mine"}}


@pytest.mark.parametrize(("role", "content", "sent"), [
    ("assistant", [{"type": "thinking", "thinking": "t", "signature": SEALED}],
     [{"type": "thinking", "thinking": "t", "signature": SEALED}]),
    ("assistant", [{"type": "thinking", "thinking": "t", "signature": FOREIGN}, CALL], [CALL]),
    ("assistant", [{"type": "thinking", "thinking": "t"}], None),
    ("assistant", [{"type": "thinking", "thinking": "t", "signature": " "}], None),
    ("assistant", [{"type": "redacted_thinking", "data": "x"}], [{"type": "redacted_thinking", "data": "x"}]),
    ("assistant", [{**CALL, "signature": "", "thoughtSignature": "x"}], [CALL]),
    ("assistant", [{**CALL, "id": "call:1.2"}], [{**CALL, "id": "call_1_2"}]),
    ("user", [{"type": "tool_result", "tool_use_id": "call:1.2", "content": [{"type": "text", "text": ""}]}],
     [{"type": "tool_result", "tool_use_id": "call_1_2", "content": []}]),
    ("user", [{"type": "text", "text": ""}, {"type": "text", "text": "a"}], [{"type": "text", "text": "a"}]),
    ("user", [], []), ("user", "plain", "plain"), ("user", None, None), ("user", [5, None], [5, None]),
])  # fmt: skip
def test_message_blocks(role, content, sent):
    body = {"messages": [{"role": role, "content": json.loads(json.dumps(content))}, "odd"]}
    kept = prepared(body, identity=False)[0]["messages"]
    gone = sent is None and content is not None
    assert kept == ["odd"] if gone else [{"role": role, "content": sent}, "odd"]


# == Signing in ====================================================================================


def test_pkce_is_s256():
    verifier, challenge = ampproxy.pkce()
    assert re.fullmatch(r"[\w-]{43,128}", verifier)
    assert challenge == base64.urlsafe_b64encode(
        hashlib.sha256(verifier.encode()).digest()
    ).decode().rstrip("=")
    assert ampproxy.pkce()[0] != verifier


@pytest.mark.parametrize("line", [
    "http://localhost:54545/callback?code=abc&state=xyz", "https://localhost:54545/callback?state=xyz&code=abc",
    "localhost:54545/callback?code=abc&state=xyz", "?code=abc&state=xyz", "code=abc&state=xyz",
    "http://localhost:54545/callback#code=abc&state=xyz", "#code=abc&state=xyz", "abc#xyz", "  'abc#xyz' \r",
    "https://platform.claude.com/oauth/code/callback?code=abc#xyz", "code=abc%23xyz", "code=abc#state=xyz",
])  # fmt: skip
def test_pasted_callbacks(line):
    found = ampproxy.read_callback(line)
    assert (found["code"], found["state"]) == ("abc", "xyz")


@pytest.mark.parametrize(
    "line", ["", "hello", "http://localhost:54545/callback", "state=xyz", "#", "a b#c", "?code="]
)
def test_lines_that_are_no_callback(line):
    assert ampproxy.read_callback(line) == {}


class Cli:
    """The program as a process of its own, in an empty home."""

    def __init__(self, tmp_path, *args, files=0, script=(str(SCRIPT),), **env):
        path = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(HERE),
            **env,
        }
        command = [sys.executable, *script, "--config", str(tmp_path / "config.yaml"), *args]
        if files:
            command = ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh", *command]
        self.process = subprocess.Popen(command, env=path, cwd=tmp_path, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.process.kill()
        self.process.communicate()

    async def until(self, words, stream="stdout"):
        """Everything up to the line that has `words`."""
        text = ""
        while words not in text:
            line = await asyncio.to_thread(getattr(self.process, stream).readline)
            assert line, f"it ended without {words!r}: {text}"
            text += line
        return text

    async def end(self, given=None):
        out, err = await asyncio.to_thread(self.process.communicate, given, 15)
        assert "Traceback" not in err
        return self.process.returncode, out, err


@asynccontextmanager
async def authority(tmp_path, usual=None, port=0):
    """A login authority, and a config.yaml that points to it."""
    account = {
        "account": {"uuid": "u", "email_address": "fred@example.com"},
        "organization": {"uuid": "o"},
    }
    fake = FakeUpstream(usual or answer_json({**NEW_TOKEN, **account}))
    async with fake.open():
        row = {"authorize-url": fake.url + "/authorize", "token-url": fake.url + "/token",
               "profile-url": fake.url + "/profile", "callback-port": port or free_port()}  # fmt: skip
        config = {"auth-dir": str(tmp_path / "auth"), "providers": {"claude": row}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        yield fake


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def query_of(text):
    url = re.search(r"http://\S+/authorize\?\S+", text)[0]
    return {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}


@pytest.mark.parametrize("way", ["callback", "paste"])
@in_loop
async def test_login_from_the_address_to_the_file(tmp_path, way):
    async with authority(tmp_path) as fake:
        with Cli(tmp_path, "login", "claude", "--no-browser") as cli:
            shown = await cli.until("paste the address")
            asked = query_of(shown)
            assert f"ssh -L {urlsplit(asked['redirect_uri']).port}:127.0.0.1" in shown
            done = f"{asked['redirect_uri']}?code=c0de&state={asked['state']}"
            if way == "callback":
                async with aiohttp.ClientSession() as http, http.get(done) as page:
                    assert "says how the login went" in await page.text()
            status, out, err = await cli.end(f"nonsense\n{done}\n" if way == "paste" else None)
        assert (status, err) == (0, "")
        assert ("Still waiting" in out) == (way == "paste")
        assert "Signed in to claude as fred@example.com" in out
        sent = fake.body(0)
        assert fake.requests[0].headers["Content-Type"] == "application/json"
        challenge = hashlib.sha256(sent["code_verifier"].encode()).digest()
        assert asked["code_challenge"] == base64.urlsafe_b64encode(challenge).decode().rstrip("=")
        assert (asked["code_challenge_method"], asked["code"]) == ("S256", "true")
        assert sent | {"code_verifier": ""} == {
            "grant_type": "authorization_code", "client_id": "9d1c250a-e61b-44d9-88ed-5944d1962f5e", "code": "c0de",
            "state": asked["state"], "redirect_uri": asked["redirect_uri"], "code_verifier": "",
        }  # fmt: skip
    path = tmp_path / "auth/claude-fred@example.com.json"
    token = json.loads(path.read_text())
    assert (token["type"], token["email"], token["access_token"]) == (
        "claude",
        "fred@example.com",
        "sk-ant-oat-new",
    )
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ampproxy.parse_time(token["expired"]) - time.time() == pytest.approx(28800, abs=30)


@in_loop
async def test_a_refused_callback_ends_the_login(tmp_path):
    async with authority(tmp_path) as fake:
        with Cli(tmp_path, "login", "claude", "--no-browser") as cli:
            asked = query_of(await cli.until("paste the address"))
            query = "error=access_denied&error_description=no%1b[2J%C2%9b&state={state}"
            url = URL(f"{asked['redirect_uri']}?{query.format(**asked)}", encoded=True)
            async with aiohttp.ClientSession() as http, http.get(url):
                pass
            status, out, err = await cli.end()
        assert status == 1
        assert "the login was refused: access_denied: no" in err
        assert (out + err).replace("\n", "").isprintable(), "nothing steers the terminal"
        assert len(err.splitlines()) == 1
        assert not fake.requests


@pytest.mark.parametrize("way", ["callback", "paste"])
@pytest.mark.parametrize(
    "query", ["code=c0de&state=wrong", "code=c0de", "error=access_denied", "error=x&state=wrong"]
)
@in_loop
async def test_a_callback_of_somebody_else_is_ignored(tmp_path, way, query):
    """Any web page can call it: the wait goes on, and the right one is taken."""
    async with authority(tmp_path) as fake:
        with Cli(tmp_path, "login", "claude", "--no-browser") as cli:
            asked = query_of(await cli.until("paste the address"))
            if way == "callback":
                async with (
                    aiohttp.ClientSession() as http,
                    http.get(f"{asked['redirect_uri']}?{query}") as page,
                ):
                    assert page.status == 404
                await cli.until("was ignored")
            lines = f"{asked['redirect_uri']}?{query}\n" if way == "paste" else ""
            status, out, err = await cli.end(f"{lines}?code=c0de&state={asked['state']}\n")
        assert (status, err) == (0, "")
        assert ("belongs to another login was ignored. Still waiting" in out) == (way == "paste")
        assert len(fake.requests) == 1


@in_loop
async def test_refused_exchange_says_what_the_provider_said(tmp_path):
    refused = answer_json({"error": "invalid_grant", "error_description": "Code expired"}, 400)
    async with authority(tmp_path, refused):
        with Cli(tmp_path, "login", "anthropic", "--no-browser") as cli:
            state = query_of(await cli.until("paste the address"))["state"]
            status, _, err = await cli.end(f"c0de#{state}\n")
    assert status == 1
    assert "answered 400: invalid_grant: Code expired" in err
    assert not (tmp_path / "auth").exists()


@in_loop
async def test_login_on_a_busy_port(tmp_path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        async with authority(tmp_path, port=holder.getsockname()[1]):
            with Cli(tmp_path, "login", "claude", "--no-browser") as cli:
                status, _, err = await cli.end()
    assert status == 1
    assert "callback-port" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("account", [None, [], "x", {}, {"email_address": None}])
@in_loop
async def test_a_login_that_names_nobody_is_kept_all_the_same(tmp_path, account):
    async with authority(tmp_path, answer_json({**NEW_TOKEN, "account": account})):
        with Cli(tmp_path, "login", "claude", "--no-browser") as cli:
            state = query_of(await cli.until("paste the address"))["state"]
            status, _, err = await cli.end(f"code=c&state={state}\n")
    assert (status, err) == (0, "")
    assert len(list((tmp_path / "auth").glob("claude-account-*.json"))) == 1


@in_loop
async def test_login_without_an_address_in_the_answer_asks_the_profile(tmp_path):
    async with authority(tmp_path, answer_json(NEW_TOKEN)) as fake:
        fake.script = [
            answer_json(NEW_TOKEN),
            answer_json({"account": {"email": "eve/../x@example.com"}}),
        ]
        with Cli(tmp_path, "login", "claude", "--no-browser") as cli:
            state = query_of(await cli.until("paste the address"))["state"]
            status, _, _ = await cli.end(f"code=c&state={state}\n")
        assert status == 0
        assert fake.last.headers["Authorization"] == "Bearer sk-ant-oat-new"
        assert (tmp_path / "auth/claude-eve_.._x@example.com.json").exists()


# == Accounts ======================================================================================


@in_loop
async def test_an_expired_token_is_refreshed_once_for_all_and_saved_before_use(tmp_path):
    async with world(tmp_path, tokens=()) as w:
        path = token_file(w.auth, expired="2020-01-01T00:00:00Z")
        w.server.tick()
        gate, seen = asyncio.Event(), []

        async def check(request):
            seen.append(json.loads(path.read_text())["access_token"])
            return web.json_response(message())

        w.authority.usual, w.claude.usual = held(gate, answer_json(NEW_TOKEN)), check
        asks = [asyncio.create_task(w.ask("/v1/messages", ASK)) for _ in range(50)]
        while sum(a.in_flight for a in w.server.pool.accounts.values()) < 50:
            await asyncio.sleep(0)
        gate.set()
        answers = await asyncio.gather(*asks)
        assert {a.status for a in answers} == {200}
        assert len(w.authority.requests) == 1
        assert set(seen) == {"sk-ant-oat-new"}
        assert w.authority.body() == {
            "client_id": "9d1c250a-e61b-44d9-88ed-5944d1962f5e", "grant_type": "refresh_token",
            "refresh_token": "sk-ant-ort-fred@example.com",
        }  # fmt: skip
        token = json.loads(path.read_text())
        assert (token["refresh_token"], token["note"]) == ("sk-ant-ort-new", "kept")


@in_loop
async def test_tokens_are_refreshed_ahead_of_time(tmp_path):
    async with world(tmp_path) as w:  # it ends in 8 hours: due 5 minutes before that
        w.server.tick()
        assert not w.server.pool.accounts[w.tokens[0]].refreshing
        w.clock.now = 8 * 3600 - 299
        w.server.tick()
        await w.server.pool.accounts[w.tokens[0]].refreshing
        assert len(w.authority.requests) == 1
        w.server.tick()
        assert not w.server.pool.accounts[w.tokens[0]].refreshing, "the new one is good for hours"


@in_loop
async def test_401_refreshes_once_then_needs_a_login(tmp_path, caplog):
    refused = answer_json(
        {"type": "error", "error": {"type": "authentication_error", "message": "bad"}}, 401
    )
    async with world(tmp_path) as w:
        w.claude.script = [refused]
        assert (await w.ask("/v1/messages", ASK)).status == 200
        assert [r.headers["Authorization"] for r in w.claude.requests] == [
            "Bearer sk-ant-oat-fred@example.com", "Bearer sk-ant-oat-new"]  # fmt: skip
        w.claude.usual = refused
        status, body, _ = await w.ask_json("/v1/messages", ASK)
        assert (status, body["error"]["type"]) == (401, "authentication_error")
        assert len(w.authority.requests) == 2
        assert len(w.claude.requests) == 4
        state = json.loads((await w.ask("/status", method="GET")).bytes)["accounts"][0]
        assert state["state"] == "needs-login"
        status, body, _ = await w.ask_json("/v1/messages", ASK)
        assert status == 401
        assert "ampproxy.py login claude" in body["error"]["message"]
        assert len(w.claude.requests) == 4, "it is left alone"
        token_file(w.auth, access_token="from-a-new-login")
        w.claude.usual = answer_json(message())
        w.server.tick()
        assert (await w.ask("/v1/messages", ASK)).status == 200, "a new login clears it"


@in_loop
async def test_invalid_grant_needs_a_login_and_deletes_nothing(tmp_path, caplog):
    async with world(tmp_path, tokens=()) as w:
        path = token_file(w.auth, expired="2020-01-01T00:00:00Z")
        w.server.tick()
        w.authority.usual = answer_json({"error": "invalid_grant"}, 400)
        assert (await w.ask("/v1/messages", ASK)).status == 401
        await w.ask("/v1/messages", ASK)
        w.server.tick()
        assert len(w.authority.requests) == 1
        assert json.loads(path.read_text())["refresh_token"] == "sk-ant-ort-fred@example.com"
        assert "ampproxy.py login claude" in caplog.text


@in_loop
async def test_a_newer_token_on_disk_is_adopted(tmp_path):
    async with world(tmp_path, tokens=()) as w:
        token_file(w.auth, expired="2020-01-01T00:00:00Z")
        w.server.pool.scan()
        token_file(w.auth, access_token="from-elsewhere")
        assert (await w.ask("/v1/messages", ASK)).status == 200
        assert not w.authority.requests
        assert w.claude.last.headers["Authorization"] == "Bearer from-elsewhere"

        async def lost_race(request):
            token_file(w.auth, access_token="winner", refresh_token="winner")
            return web.json_response({"error": "invalid_grant"}, status=400)

        token_file(w.auth, expired="2020-01-01T00:00:00Z")
        w.authority.script = [lost_race]
        w.server.pool.scan()
        assert (await w.ask("/v1/messages", ASK)).status == 200
        assert w.claude.last.headers["Authorization"] == "Bearer winner"


@in_loop
async def test_a_client_that_leaves_does_not_cancel_the_refresh(tmp_path):
    async with world(tmp_path, tokens=()) as w:
        path = token_file(w.auth, expired="2020-01-01T00:00:00Z")
        w.server.tick()
        gate = asyncio.Event()
        w.authority.usual = held(gate, answer_json(NEW_TOKEN))
        ask = asyncio.create_task(w.ask("/v1/messages", ASK))
        while not w.authority.requests:
            await asyncio.sleep(0)
        refreshing = w.server.pool.accounts[path].refreshing
        ask.cancel()
        while w.server.pool.accounts[path].in_flight:
            await asyncio.sleep(0)
        gate.set()
        await refreshing
        assert json.loads(path.read_text())["refresh_token"] == "sk-ant-ort-new"


@in_loop
async def test_a_token_that_cannot_be_saved_at_once_is_not_lost(tmp_path, monkeypatch, caplog):
    """The file is away when the answer comes, and the disk is full when it is back."""
    async with world(tmp_path, tokens=()) as w:
        path = token_file(w.auth, expired="2020-01-01T00:00:00Z")
        w.server.tick()
        fsync, full = os.fsync, [OSError(28, "No space left on device")]

        def sync(number):
            if full:
                raise full.pop()
            return fsync(number)

        async def away(request):
            path.rename(path.with_suffix(".bak"))
            monkeypatch.setattr(os, "fsync", sync)
            return web.json_response(NEW_TOKEN)

        w.authority.usual = away
        assert (await w.ask("/v1/messages", ASK)).status == 200
        path.with_suffix(".bak").rename(path)
        for _ in range(2):
            w.server.tick()
        assert not full
        assert caplog.text.count("cannot be saved") == 2
        token = json.loads(path.read_text())
        assert (token["refresh_token"], token["note"], token["type"]) == (
            "sk-ant-ort-new",
            "kept",
            "claude",
        )


@in_loop
async def test_a_file_that_is_torn_during_a_refresh_is_made_whole(tmp_path):
    async with world(tmp_path, tokens=()) as w:
        path = token_file(w.auth, expired="2020-01-01T00:00:00Z")
        w.server.tick()

        async def tear(request):
            path.write_text('{"type": "cla')
            return web.json_response(NEW_TOKEN)

        w.authority.usual = tear
        assert (await w.ask("/v1/messages", ASK)).status == 200
        token = json.loads(path.read_text())
        assert (token["type"], token["note"], token["refresh_token"]) == (
            "claude",
            "kept",
            "sk-ant-ort-new",
        )


@pytest.mark.parametrize(
    "odd",
    [{"priority": "high"}, {"priority": [1]}, {"email": 5}, {"expired": 7}, {"disabled": "yes"}],
)
@in_loop
async def test_odd_values_in_a_token_file_are_survived(tmp_path, odd):
    async with world(tmp_path) as w:
        token_file(w.auth, "odd@example.com", **odd)
        w.server.tick()
        assert (await w.ask("/v1/messages", ASK)).status == 200
        assert (await w.ask("/status", method="GET")).status == 200


@pytest.mark.parametrize("kind", ["kimi", "qwen"])
@in_loop
async def test_a_login_of_a_provider_that_is_not_served_goes_nowhere(tmp_path, kind):
    """CLIProxyAPI's directory may hold such files; their tokens are nobody's here."""
    async with world(tmp_path) as w:
        path = token_file(w.auth, "ann@example.com", type=kind, expired="2020-01-01T00:00:00Z")
        before = path.read_bytes()
        w.server.tick()
        assert (await w.ask("/v1/messages", ASK)).status == 200
        assert not any(account.refreshing for account in w.server.pool.accounts.values())
        assert not w.authority.requests
        assert path.read_bytes() == before


@in_loop
async def test_accounts_that_woke_meanwhile_are_no_reason_for_a_404(tmp_path):
    async with world(tmp_path, tokens=FRIENDS[:2]) as w:
        assert w.server.pool.nobody(w.server.live.rows, "claude-opus-4-6").status == 429


@in_loop
async def test_setup_tokens_are_never_refreshed(tmp_path):
    async with world(tmp_path, tokens=()) as w:
        token_file(w.auth, refresh_token="", expired="2020-01-01T00:00:00Z")
        w.server.tick()
        assert (await w.ask("/v1/messages", ASK)).status == 200
        assert not w.authority.requests


@in_loop
async def test_an_authority_that_quotes_the_token_is_not_quoted(tmp_path, caplog):
    async with world(tmp_path, tokens=()) as w:
        token_file(w.auth, refresh_token="verysecret", expired="2020-01-01T00:00:00Z")
        w.server.tick()
        w.authority.usual = answer_json(
            {"error": "server_error", "error_description": "bad verysecret"}, 500
        )
        response = await w.ask("/v1/messages", ASK)
        status = await w.ask("/status", method="GET")
        assert "verysecret" not in caplog.text + response.bytes.decode() + status.bytes.decode()
        assert "server_error" in caplog.text


@in_loop
async def test_an_authority_that_is_down_is_not_stormed(tmp_path):
    async with world(tmp_path, tokens=()) as w:
        token_file(w.auth, expired="2020-01-01T00:00:00Z")
        w.server.tick()
        w.authority.usual = answer_json({"error": "temporarily_unavailable"}, 503)
        for _ in range(3):
            assert (await w.ask("/v1/messages", ASK)).status in (429, 503)
            w.server.tick()
        assert len(w.authority.requests) <= 3, "each after a wait: see the pauses below"
        w.authority.usual = answer_json(NEW_TOKEN)
        w.clock.now += 60
        assert (await w.ask("/v1/messages", ASK)).status == 200


@in_loop
async def test_a_refresh_that_hangs_is_given_up(tmp_path, monkeypatch):
    assert ampproxy.REFRESH_WAIT == 30
    monkeypatch.setattr(ampproxy, "REFRESH_WAIT", 0.1)
    async with world(tmp_path, tokens=()) as w:
        token_file(w.auth, expired="2020-01-01T00:00:00Z")
        w.server.tick()
        gate = asyncio.Event()
        w.authority.usual = held(gate, answer_json(NEW_TOKEN))
        status, body, _ = await w.ask_json("/v1/messages", ASK)
        assert (status, "refresh failed" in body["error"]["message"]) == (503, True)
        assert len(w.authority.requests) == 1
        gate.set()


@in_loop
async def test_of_two_proxies_on_one_directory_the_late_one_adopts(tmp_path):
    """A refresh token is good once; who comes second finds the new login in the file."""

    async def rotate(request):
        good = json.loads(request.bytes)["refresh_token"] != "sk-ant-ort-new" and not used
        used.append(request)
        return web.json_response(
            NEW_TOKEN if good else {"error": "invalid_grant"}, status=200 if good else 400
        )

    used = []
    async with world(tmp_path, tokens=()) as w:
        token_file(w.auth, expired="2020-01-01T00:00:00Z")
        live = ampproxy.Live(w.file)
        other = ampproxy.Server(live, ampproxy.Net(live), w.clock)
        w.server.tick()
        w.authority.usual = rotate
        async with other.serving() as port:
            for at in (w.port, port):
                urls = [f"http://127.0.0.1:{at}/v1/messages"] * 25
                answers = await asyncio.gather(*(w.http.post(url, json=ASK) for url in urls))
                assert [answer.status for answer in answers] == [200] * 25
        assert len(w.authority.requests) == 1
        assert {r.headers["Authorization"] for r in w.claude.requests} == {"Bearer sk-ant-oat-new"}


async def outlives(nursery, delay):
    """Whether a child of the nursery has ended within the delay; else it is killed."""
    nursery.stdin.write("go\n")
    nursery.stdin.flush()
    child = int(await asyncio.to_thread(nursery.stdout.readline))
    ended = asyncio.create_task(asyncio.to_thread(nursery.stdout.readline))
    done, _ = await asyncio.wait([ended], timeout=delay)
    if not done:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(child, signal.SIGKILL)
    assert await ended == "ended\n"
    return bool(done)


# A process that forks for each line it reads; the child refreshes the token and ends.
NURSERY = """
import asyncio, os, sys
import ampproxy

async def refresh():
    live = ampproxy.Live(ampproxy.Path(sys.argv[1]))
    pool = ampproxy.Pool(live, ampproxy.Net(live))
    pool.scan()
    for account in pool.accounts.values():
        await pool.bearer(account, str(account.token["access_token"]))

for line in sys.stdin:
    if (child := os.fork()) == 0:
        try:
            asyncio.run(refresh())
        finally:
            os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@in_loop
async def test_a_kill_at_any_moment_of_a_refresh_leaves_a_good_file(tmp_path):
    """100 kills; the authority takes each refresh token once, and the file says what it said last."""
    issued = ["sk-ant-ort-fred@example.com"]
    kept = voided = 0

    async def rotate(request):
        await asyncio.sleep(0.005)  # kills fall on both sides of the rotation
        if json.loads(request.bytes)["refresh_token"] != issued[-1]:
            return web.json_response({"error": "invalid_grant"}, status=400)
        issued.append(f"sk-ant-ort-{len(issued)}")
        await asyncio.sleep(0.01)
        token = {"access_token": f"sk-ant-oat-{len(issued)}", "expires_in": 28800}
        return web.json_response({**token, "refresh_token": issued[-1]})

    async with world(tmp_path) as w:
        w.authority.usual = rotate
        path, live = w.tokens[0], ampproxy.Live(w.file)
        nursery = subprocess.Popen([sys.executable, "-c", NURSERY, str(w.file)], cwd=HERE, text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

        async def one(delay):
            return await outlives(nursery, delay)

        try:
            began = time.monotonic()
            assert await one(20), "the first one may end"
            whole = time.monotonic() - began
            for kill in range(100):
                await one(whole * kill / 80)
                token = json.loads(path.read_text())
                assert token["note"] == "kept"
                assert token["refresh_token"] in issued
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
                pool = ampproxy.Pool(live, w.server.net)
                pool.scan()
                [account] = pool.accounts.values()
                try:
                    await pool.bearer(account, str(token["access_token"]))
                    kept += 1
                except ampproxy.ProxyError as error:
                    voided += 1
                    assert error.problem.status == 401
                    assert "run `ampproxy.py login claude`" in error.problem.message
                    path = token_file(w.auth, refresh_token=issued[-1])
                    path.chmod(0o600)
        finally:
            nursery.stdin.close()
            nursery.wait(10)
        assert (kept + voided, kept > 50) == (100, True)
        assert len(issued) > 60


def limit(message="limit", **headers):
    """A 429 of Claude's."""
    body = {"type": "error", "error": {"type": "rate_limit_error", "message": message}}
    return answer_json(body, 429, **headers)


def said(status, message="no", kind="invalid_request_error", **headers):
    body = {"type": "error", "error": {"type": kind, "message": message}}
    return answer_json(body, status, **headers)


def window(name, status, reset, used="1.0"):
    """The headers of one quota window; `reset` in seconds from the clock's beginning."""
    start = f"anthropic-ratelimit-unified-{name}-"
    return {
        start + "status": status,
        start + "utilization": used,
        start + "reset": str(1_800_000_000 + reset),
    }


# One row for each row of RESTS, at least: the answer -> tries, what rests (the account, the model or
# nobody), for how many seconds, and who else is tried: the next account and ampcode.com, or nobody.
FULL_WINDOW = limit(**window("5h", "rejected", 900), **window("7d", "allowed", 9000, "0.5"))
ROWS = {
    "extra usage": (said(400, "You're out of extra usage"), 1, "", 0, "nobody"),
    "long context": (limit("Extra usage is required for long context"), 1, "", 0, "nobody"),
    "401": (said(401), 2, "account", float("inf"), "next"),
    "400 key": (said(400, "API key not valid"), 1, "account", float("inf"), "next"),
    "402": (said(402), 1, "account", 1800, "next"),
    "403": (said(403), 1, "account", 1800, "next"),
    "403 revoked": (said(403, "OAuth token has been revoked", "permission_error"), 2, "account", float("inf"), "next"),
    "403 expired": (said(403, "OAuth token has expired", "permission_error"), 2, "account", float("inf"), "next"),
    "404": (said(404, "model: claude-x", "not_found_error"), 1, "model", 1800, "next"),
    "400 model": (said(400, "the model claude-x is not supported"), 1, "model", 1800, "next"),
    "a model's week": (limit(**window("7d_oi", "rejected", 700)), 1, "model", 700, "next"),
    "429": (limit(), 1, "account", 60, "next"),
    "429 that may be tried again": (limit(**{"x-should-retry": "true"}), 2, "account", 5, "next"),
    "a spent plan under a 400": (
        answer_json({"error": {"type": "usage_limit_reached", "message": "x", "resets_in_seconds": 700}}, 400),
        1, "account", 700, "next"),
    "429 until": (limit(**{"Retry-After": "90"}), 1, "account", 90, "next"),
    "a spent window": (FULL_WINDOW, 1, "account", 900, "next"),
    "429 for days": (limit(**{"Retry-After": "400000"}), 1, "account", 1800, "next"),
    "408": (said(408), 3, "account", 5, "next"),
    "529": (said(529, "busy", "overloaded_error"), 3, "account", 5, "next"),
    "529 until": (said(529, **{"Retry-After": "40"}), 1, "account", 40, "next"),
    "500": (said(500), 3, "account", 5, "next"),
    "502": (said(502), 3, "account", 5, "next"),
    "503": (said(503), 3, "account", 5, "next"),
    "no capacity": (said(503, "No capacity available for this model"), 3, "model", 5, "next"),
    "504": (said(504), 3, "account", 5, "next"),
    "a dead connection": ((200, {}, ["cut"]), 3, "account", 5, "next"),
    "an empty stream": ((200, SSE, []), 3, "account", 5, "next"),
    "an error first": ((200, SSE, [event("error", error={"type": "overloaded_error"})]), 3, "account", 5, "next"),
    "520": (said(520), 1, "account", 5, "next"),
    "400": (said(400), 1, "", 0, "nobody"),
    "413": (said(413), 1, "", 0, "nobody"),
    "422": (said(422), 1, "", 0, "nobody"),
}  # fmt: skip


def resting(w, index=0):
    """{"" for the account, or the model: seconds that the rest still lasts}."""
    now = w.clock.monotonic()
    rests = w.server.pool.accounts[w.tokens[index]].rests
    return {key: pytest.approx(rest.wakes - now) for key, rest in rests.items()}


def test_each_row_of_the_table_is_a_case():
    met = set()
    for status, headers, parts in (row[0] for row in ROWS.values()):
        body = b"".join(part for part in parts if part != "cut").decode()
        full = [name.split("-")[3] for name, value in headers.items() if value == "rejected"]
        codes = {ampproxy.RETRIABLE} if "x-should-retry" in headers else set()
        codes |= {"usage_limit_reached"} if "usage_limit_reached" in body else set()
        problem = ampproxy.Problem(
            status if status != 200 else 502,
            "",
            text=body,
            windows=frozenset(full),
            codes=frozenset(codes),
        )
        met.add(ampproxy.verdict(problem)[-3:])
    met.add(ampproxy.verdict(ampproxy.Problem(502, "", codes=frozenset({ampproxy.LOCAL})))[-3:])
    met.add(ampproxy.verdict(ampproxy.Problem(403, "", codes=frozenset({ampproxy.FIREWALL})))[-3:])
    assert met >= {row[-3:] for row in ampproxy.RESTS}


@pytest.mark.parametrize("name", ROWS)
@in_loop
async def test_what_an_error_means(tmp_path, name):
    answer, tries, what, length, then = ROWS[name]
    async with world(tmp_path) as w:
        w.claude.usual = answer
        got, body, headers = await w.ask_json("/v1/messages", ASK)
        if answer[0] != 200:
            assert (got, body) == (answer[0], json.loads(answer[2][0])), "the provider's own words"
        assert len(w.claude.requests) == tries
        key = {"account": "", "model": ASK["model"]}.get(what)
        assert resting(w) == ({key: length} if what else {})
        asked = {**answer[1], **headers}.get("Retry-After")
        own = answer[1].get("x-should-retry")
        assert headers.get("x-should-retry") == ("false" if asked and int(asked) > 30 else own)
        w.clock.now += 100_000
        response = await w.ask(PATH, ASK)
        assert response.headers["x-ampproxy-route"] == ("local" if then == "nobody" else "amp")
        if then == "next":
            assert response.status == 200


FRIENDS = ("ann@example.com", "bob@example.com", "cyd@example.com")


def bearer_of(request):
    return request.headers["Authorization"].removeprefix("Bearer sk-ant-oat-")


def failing(who, answer):
    """A Claude that gives `answer` to one account, while `failing.now` is set, and serves the others."""

    async def handle(request):
        name = bearer_of(request)
        status, headers, parts = answer if name in who else answer_json(message())
        if parts == ["cut"]:
            request.transport.abort()
            return web.Response()
        return web.Response(status=status, headers=headers, body=b"".join(parts))

    return handle


WAYS = {str(row[1:]): name for name, row in ROWS.items() if row[4] == "next"}


@pytest.mark.parametrize("name", sorted({*WAYS.values(), "a dead connection", "529"}))
@in_loop
async def test_no_thread_notices_that_an_account_fails(tmp_path, name):
    """120 threads on 3 accounts, one of which begins to fail: nothing is lost, only its threads move."""
    config = {"ampcode": {"fallback": "never"}}
    async with world(tmp_path, tokens=FRIENDS, **config) as w:
        w.authority.usual = answer_json({"error": "invalid_grant"}, 400)
        w.http._connector._limit = 0

        async def turn(served):
            async def one(thread):
                headers = {"X-Amp-Thread-Id": f"T-{thread}"}
                response = await w.ask(
                    "/v1/messages", {**ASK, "max_tokens": thread + 1}, headers=headers
                )
                assert response.status == 200, response.bytes

            del w.claude.requests[:]
            await asyncio.gather(*(one(thread) for thread in range(120)))
            for request in w.claude.requests:
                served[json.loads(request.bytes)["max_tokens"]] = bearer_of(request)
            return Counter(served.values())

        before, after = {}, {}
        assert set((await turn(before)).values()) == {40}, "new threads are spread evenly"
        w.claude.usual = failing({"bob@example.com"}, ROWS[name][0])
        counts = await turn(after)
        assert counts.keys() == {"ann@example.com", "cyd@example.com"}
        assert abs(counts["ann@example.com"] - counts["cyd@example.com"]) < 10, "shared evenly"
        moved = {thread for thread in before if before[thread] != after[thread]}
        assert moved == {thread for thread in before if before[thread] == "bob@example.com"}


async def answered_by(w, headers=(), body=ASK, path="/v1/messages"):
    """Who served one request."""
    response = await w.ask(path, body, headers=headers)
    assert response.status == 200, response.bytes
    return bearer_of(w.claude.last)


@pytest.mark.parametrize(("headers", "extra"), [
    ({"X-Amp-Thread-Id": "T-N"}, {}), ({"X-Claude-Code-Session-Id": "N"}, {}), ({"session-id": "N"}, {}),
    ({"thread-id": "N"}, {}), ({"x-session-id": "N"}, {}), ({"x-session-affinity": "N"}, {}),
    ({}, {"metadata": {"user_id": '{"session_id": "N"}'}}), ({}, {"prompt_cache_key": "N"}),
    ({"X-Amp-Thread-Id": "T-N", "session-id": "other"}, {"prompt_cache_key": "x"}),
])  # fmt: skip
@in_loop
async def test_a_thread_stays_where_it_is(tmp_path, headers, extra):
    def of(thread):
        change = lambda value: json.loads(json.dumps(value).replace("N", thread))  # noqa: E731
        return change(headers), {**ASK, **change(extra)}

    async with world(tmp_path, tokens=FRIENDS) as w:
        first = [await answered_by(w, *of(thread)) for thread in "1234"]
        assert sorted(first[:3]) == list(FRIENDS)
        assert [await answered_by(w, *of(thread)) for thread in "4321"] == first[::-1]
        w.clock.now += 7000
        assert await answered_by(w, *of("1")) == first[0]
        w.clock.now += 7000
        assert await answered_by(w, *of("1")) == first[0], "each use counts anew"
        status = (await w.ask_json("/status", method="GET"))[1]
        assert sum(account["threads"] for account in status["accounts"]) == 1, "two hours are over"


@in_loop
async def test_without_a_thread_the_longest_unused_is_asked(tmp_path):
    odd = {**ASK, "metadata": {"user_id": 5}, "prompt_cache_key": ["x"]}
    async with world(tmp_path, tokens=FRIENDS) as w:
        assert [await answered_by(w, body=odd) for _ in range(6)] == [*FRIENDS, *FRIENDS]
        assert not w.server.pool.homes


@in_loop
async def test_the_table_of_threads_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(ampproxy, "THREADS", 50)
    async with world(tmp_path, tokens=FRIENDS) as w:
        for thread in range(60):
            await answered_by(w, {"session-id": str(thread)})
        assert len(w.server.pool.homes) == 50
        assert "claude9" not in w.server.pool.homes
        assert "claude59" in w.server.pool.homes


@pytest.mark.parametrize(("strategy", "served"), [
    ("round-robin", "ann bob cyd ann bob cyd"), ("fill-first", "ann ann ann ann ann ann"),
    ("least-connections", "ann bob cyd ann bob cyd"),
])  # fmt: skip
@in_loop
async def test_strategies_for_new_threads(tmp_path, strategy, served):
    async with world(tmp_path, tokens=FRIENDS, routing={"strategy": strategy}) as w:
        asked = [await answered_by(w, {"session-id": str(n)}) for n in range(6)]
        assert [name[:3] for name in asked] == served.split()


@in_loop
async def test_least_connections_counts_what_runs_and_recent_threads(tmp_path):
    gate = asyncio.Event()
    async with world(tmp_path, tokens=FRIENDS[:2]) as w:
        w.claude.script = [held(gate, answer_json(message()))] * 2
        running = [asyncio.create_task(w.ask("/v1/messages", ASK)) for _ in "12"]
        while len(w.claude.requests) < 2:
            await asyncio.sleep(0)
        assert sorted(map(bearer_of, w.claude.requests)) == list(FRIENDS[:2])
        one = await answered_by(w, {"session-id": "1"})
        other = await answered_by(w, {"session-id": "2"})
        assert {one, other} == set(FRIENDS[:2]), "the first now has a thread more"
        gate.set()
        await asyncio.gather(*running)


@in_loop
async def test_priority_and_disabled(tmp_path):
    async with world(tmp_path, tokens=FRIENDS) as w:
        token_file(w.auth, "bob@example.com", priority=5)
        token_file(w.auth, "ann@example.com", disabled=True)
        w.server.tick()
        for _ in range(3):
            assert await answered_by(w) == "bob@example.com"
        w.claude.script = [limit()]
        assert await answered_by(w) == "cyd@example.com"
        states = {
            a["account"][:3]: a["state"]
            for a in (await w.ask_json("/status", method="GET"))[1]["accounts"]
        }
        assert states == {"ann": "disabled", "bob": "resting", "cyd": "ready"}


@in_loop
async def test_no_new_thread_for_an_account_that_is_nearly_spent(tmp_path):
    def told(name, *windows):
        headers = {k: v for w in windows for k, v in window(*w).items()}
        return answer_json(message(), **headers)

    async with world(tmp_path, tokens=FRIENDS[:2]) as w:
        token_file(w.auth, "ann@example.com", priority=9)
        w.server.tick()
        w.claude.script = [
            told("ann", ("5h", "allowed_warning", 600, "0.97"), ("7d", "allowed", 9000, "0.5"))
        ]
        assert await answered_by(w, {"session-id": "1"}) == "ann@example.com"
        assert await answered_by(w, {"session-id": "1"}) == "ann@example.com", "its thread stays"
        assert await answered_by(w, {"session-id": "2"}) == "bob@example.com"
        account = (await w.ask_json("/status", method="GET"))[1]["accounts"][0]
        assert account["quota"] == [
            {"window": "5h", "used_percent": 97.0, "resets_in_seconds": 600},
            {"window": "7d", "used_percent": 50.0, "resets_in_seconds": 9000},
        ]
        w.claude.script = [limit()]
        assert await answered_by(w, {"session-id": "3"}) == "ann@example.com", "the other one rests"
        w.clock.now += 601
        assert await answered_by(w, {"session-id": "4"}) == "ann@example.com", "the window is over"


@pytest.mark.parametrize(("ttl", "seconds"), [(90, 90), ("90", 90), ("1h30m", 5400), ("10s", 10)])
@in_loop
async def test_how_long_an_idle_thread_is_remembered(tmp_path, ttl, seconds):
    async with world(tmp_path, tokens=FRIENDS, routing={"session-affinity-ttl": ttl}) as w:
        await answered_by(w, {"session-id": "1"})
        w.clock.now += seconds
        await answered_by(w, {"session-id": "2"})
        assert len(w.server.pool.homes) == 2
        w.clock.now += 1
        await answered_by(w, {"session-id": "3"})
        assert len(w.server.pool.homes) == 2, "the first one is forgotten"


@in_loop
async def test_a_full_window_of_one_class_of_models_is_not_the_accounts(tmp_path):
    async with world(tmp_path, tokens=FRIENDS[:2]) as w:
        w.claude.script = [
            answer_json(message(), **window("7d_oi", "allowed_warning", 700, "0.99"))
        ]
        assert await answered_by(w) == "ann@example.com"
        await answered_by(w)
        assert await answered_by(w) == "ann@example.com"


@in_loop
async def test_a_netrc_file_is_none_of_our_business(tmp_path):
    Path("~/.netrc").expanduser().write_text("default login joe password secret\n")
    async with world(tmp_path) as w:
        assert await answered_by(w) == "fred@example.com"


@in_loop
async def test_odd_quota_headers_are_survived(tmp_path):
    odd = {"anthropic-ratelimit-unified-5h-utilization": "x", "anthropic-ratelimit-unified-5h-reset": "2027-01-15T09:00:00Z",
           "anthropic-ratelimit-unified-overage-status": "rejected", "anthropic-ratelimit-unified-status": "rejected",
           "anthropic-ratelimit-unified-7d-reset": "nan"}  # fmt: skip
    async with world(tmp_path) as w:
        w.claude.usual = answer_json(message(), **odd)
        await answered_by(w)
        quota = (await w.ask_json("/status", method="GET"))[1]["accounts"][0]["quota"]
        assert quota == [
            {"window": "5h", "used_percent": 0, "resets_in_seconds": 3600},
            {"window": "7d", "used_percent": 0, "resets_in_seconds": 0},
        ]


@in_loop
async def test_a_probe_ends_a_rest_or_begins_it_again(tmp_path):
    async with world(tmp_path, ampcode={"fallback": "never"}, **{"max-retry-interval": 0}) as w:
        gate = asyncio.Event()
        w.claude.usual = held(gate, limit())
        asked = [asyncio.create_task(w.ask("/v1/messages", ASK)) for _ in range(20)]
        while len(w.claude.requests) < 20:
            await asyncio.sleep(0)
        w.clock.now += 1
        gate.set()
        await asyncio.gather(*asked)
        assert resting(w) == {"": 60}, "20 at once are one failure"
        for length in (120, 240, 480, 960, 1800, 1800):
            w.clock.now += 100_000
            await w.ask("/v1/messages", ASK)
            assert resting(w) == {"": length}
        w.clock.now += 1801
        gate.clear()
        asked = [asyncio.create_task(w.ask("/v1/messages", ASK)) for _ in range(20)]
        while sum(task.done() for task in asked) < 19 or len(w.claude.requests) < 27:
            await asyncio.sleep(0)
        assert len(w.claude.requests) == 27, "one probe, the others wait or are told"
        w.claude.usual = answer_json(message())
        gate.set()
        assert sorted([(await task).status for task in asked]) == [429] * 20
        w.clock.now += 1801
        assert (await w.ask("/v1/messages", ASK)).status == 200
        assert resting(w) == {}


@in_loop
async def test_a_success_from_before_the_rest_does_not_end_it(tmp_path):
    gate = asyncio.Event()
    async with world(tmp_path, ampcode={"fallback": "never"}, **{"max-retry-interval": 0}) as w:
        w.claude.script = [held(gate, answer_json(message())), limit()]
        early = asyncio.create_task(w.ask("/v1/messages", ASK))
        while not w.claude.requests:
            await asyncio.sleep(0)
        w.clock.now += 1
        assert (await w.ask("/v1/messages", ASK)).status == 429
        gate.set()
        assert (await early).status == 200
        assert resting(w) == {"": 60}


@in_loop
async def test_a_client_that_leaves_during_the_probe_lets_the_next_one_probe(tmp_path):
    async with world(tmp_path, ampcode={"fallback": "never"}) as w:
        w.claude.script = [limit(), (200, SSE, [asyncio.Event()])]
        await w.ask("/v1/messages", ASK)
        w.clock.now += 61
        probe = asyncio.create_task(w.ask("/v1/messages", STREAM))
        while len(w.claude.requests) < 2:
            await asyncio.sleep(0)
        probe.cancel()
        await w.claude.gone.wait()
        assert (await w.ask("/v1/messages", ASK)).status == 200


@in_loop
async def test_an_hour_on_the_clock(tmp_path):
    """A plan is spent for 40 minutes; a request a minute, and the other account answers meanwhile."""
    async with world(tmp_path, tokens=FRIENDS[:2]) as w:
        spent = 2400

        async def claude(request):
            if bearer_of(request) == "ann@example.com" and w.clock.now < spent:
                left = {"retry-after": str(int(spent + 3 * 86400 - w.clock.now))}
                return web.json_response(
                    {"error": {"type": "rate_limit_error"}}, status=429, headers=left
                )
            return web.json_response(message())

        w.claude.usual, asked = claude, []
        for minute in range(60):
            w.clock.now = minute * 60
            w.server.tick()
            before = len(w.claude.requests)
            assert (
                await w.ask("/v1/messages", ASK, headers={"session-id": f"{minute}"})
            ).status == 200
            asked += [(minute, bearer_of(r)[:3]) for r in w.claude.requests[before:]]
        assert [minute for minute, who in asked if who == "ann" and minute < 40] == [0, 30], (
            "one probe"
        )
        assert sum(who == "bob" for _, who in asked) == 60


@pytest.mark.parametrize(
    ("asked", "most", "stays"), [("7", 30, True), ("11", 30, False), ("7", 5, False)]
)
@in_loop
async def test_a_short_retry_after_is_waited_for_on_the_same_account(tmp_path, asked, most, stays):
    async with world(tmp_path, tokens=FRIENDS[:2], **{"max-retry-interval": most}) as w:
        w.claude.script = [limit(**{"Retry-After": asked})]
        began = w.clock.now
        served = await answered_by(w, {"session-id": "1"})
        assert served == ("ann@example.com" if stays else "bob@example.com")
        assert w.clock.now - began == (7 if stays else 0)
        assert resting(w) == ({} if stays else {"": int(asked)})


@in_loop
async def test_when_all_rest_the_shortest_rest_is_waited_for(tmp_path):
    async with world(tmp_path, tokens=FRIENDS[:2]) as w:
        w.claude.script = [limit(**{"Retry-After": "29"}), limit(**{"Retry-After": "25"})]
        began = w.clock.now
        assert await answered_by(w, path=PATH) == "bob@example.com"
        assert w.clock.now - began == 25
        assert not w.amp.requests


@in_loop
async def test_when_all_rest_for_long_each_account_is_named(tmp_path):
    async with world(tmp_path, tokens=FRIENDS) as w:
        token_file(w.auth, "cyd@example.com", expired="2020-01-01T00:00:00Z")
        w.server.tick()
        w.authority.usual = answer_json({"error": "invalid_grant"}, 400)
        w.claude.usual = failing({"ann@example.com"}, limit(**{"Retry-After": "300"}))
        assert await answered_by(w) == "bob@example.com"
        w.claude.usual = said(403)
        for path, answered in (("/v1/messages", 429), (PATH, 200)):
            status, body, headers = await w.ask_json(path, ASK)
            assert status == answered
        status, body, headers = await w.ask_json("/v1/messages", ASK)
        assert (headers["Retry-After"], headers["x-should-retry"]) == ("300", "false")
        told = body["error"]["message"]
        for words in ("ann@example.com: claude answered 429 rate_limit_error; wakes in 300 s",
                      "bob@example.com: claude answered 403 invalid_request_error; wakes in 1800 s",
                      "cyd@example.com: ", "invalid_grant; run `ampproxy.py login claude`"):  # fmt: skip
            assert words in told
        assert len(w.amp.requests) == 1
        states = (await w.ask_json("/status", method="GET"))[1]["accounts"]
        assert [(a["state"], a["wakes_in_seconds"]) for a in states] == [
            ("resting", 300), ("resting", 1800), ("needs-login", None)]  # fmt: skip
        assert states[0]["reason"] == "claude answered 429 rate_limit_error"


@in_loop
async def test_a_model_that_rests_leaves_the_others_awake(tmp_path):
    async with world(tmp_path) as w:
        w.claude.script = [limit(**window("7d_oi", "rejected", 700))]
        assert (await w.ask("/v1/messages", ASK)).status == 429
        assert await answered_by(w, body={**ASK, "model": "claude-haiku-4-5"}) == "fred@example.com"
        status, _, headers = await w.ask_json("/v1/messages", ASK)
        assert (status, headers["Retry-After"]) == (429, "700")
        account = (await w.ask_json("/status", method="GET"))[1]["accounts"][0]
        assert account["state"] == "ready"
        assert account["reason"] == "claude-opus-4-6: claude answered 429 rate_limit_error"


@pytest.mark.parametrize(
    "config", [{}, {"max-cooldown": 0}, {"max-retry-interval": 0}, {"max-retry-interval": 2}]
)
@in_loop
async def test_short_waits_come_to_an_end(tmp_path, config):
    """Accounts that ask for a second each, again and again, do not keep a client for ever."""
    for tokens, answer in ((FRIENDS, limit(**{"Retry-After": "1"})), (FRIENDS[:1], limit())):
        (tmp_path / str(len(tokens))).mkdir()
        async with world(tmp_path / str(len(tokens)), tokens=tokens, **config) as w:
            w.claude.usual = answer
            assert (await w.ask("/v1/messages", ASK)).status == 429
            assert w.clock.now < 60
            assert len(w.claude.requests) < 120


@in_loop
async def test_a_throttle_is_waited_for_at_any_number_of_tries(tmp_path):
    async with world(tmp_path, tokens=FRIENDS[:2], **{"request-retry": 1}) as w:
        w.claude.script = [limit(**{"Retry-After": "2"})]
        assert await answered_by(w) == "ann@example.com"
        assert w.clock.now == 2


@in_loop
async def test_a_window_that_is_full_is_no_reason_for_a_long_rest_after_a_529(tmp_path):
    async with world(tmp_path) as w:
        w.claude.usual = said(529, **window("7d_oi", "rejected", 400_000))
        assert (await w.ask("/v1/messages", ASK)).status == 529
        assert (len(w.claude.requests), resting(w)) == (3, {"": 5})


@in_loop
async def test_a_model_that_all_accounts_lack_is_404_and_soon_forgotten(tmp_path, caplog):
    async with world(tmp_path, tokens=FRIENDS[:2]) as w:
        w.claude.usual = said(404, "model: claude-typo", "not_found_error")
        for number in range(30):
            for _ in "12":
                answer = await w.ask(
                    "/v1/messages", {**ASK, "model": f"claude-{number}-" + "x" * 3000}
                )
                assert (answer.status, answer.headers.get("Retry-After")) == (404, None)
            w.clock.now += 1801
        account = w.server.pool.accounts[w.tokens[0]]
        assert len(account.rests) == 1
        assert max(map(len, caplog.messages)) < 600
        accounts = (await w.ask_json("/status", method="GET"))[1]["accounts"]
        assert len(json.dumps(accounts)) < 3000


@in_loop
async def test_one_account_rests_and_one_needs_a_login(tmp_path):
    async with world(tmp_path, tokens=FRIENDS[:2]) as w:
        w.authority.usual = answer_json({"error": "invalid_grant"}, 400)
        w.claude.script = [limit(**{"Retry-After": "600"}), said(401)]
        status, body, headers = await w.ask_json("/v1/messages", ASK)
        assert (status, headers["Retry-After"]) == (429, "600")
        assert "ann@example.com: claude answered 429" in body["error"]["message"]
        assert "bob@example.com: " in body["error"]["message"]


@in_loop
async def test_a_probe_whose_login_has_ended_says_so(tmp_path):
    async with world(tmp_path) as w:
        w.claude.script = [limit()]
        await w.ask("/v1/messages", ASK)
        w.clock.now += 9 * 3600
        w.authority.usual = answer_json({"error": "invalid_grant"}, 400)
        assert (await w.ask("/v1/messages", ASK)).status == 401


@in_loop
async def test_a_new_login_during_a_401_is_not_marked(tmp_path):
    async with world(tmp_path) as w:

        async def late(request):
            token_file(w.auth, access_token="from-a-new-login")
            w.server.tick()
            return web.json_response({"error": {"type": "authentication_error"}}, status=401)

        w.claude.script = [said(401), late]
        assert (await w.ask("/v1/messages", ASK)).status == 401
        assert resting(w) == {}
        assert await answered_by(w) == "Bearer from-a-new-login"


@in_loop
async def test_a_file_that_vanishes_for_a_moment_takes_nothing_along(tmp_path):
    async with world(tmp_path) as w:
        w.claude.script = [limit()]
        await w.ask("/v1/messages", ASK, headers={"session-id": "1"})
        kept = w.tokens[0].read_text()
        w.tokens[0].unlink()
        w.server.tick()
        w.tokens[0].write_text(kept)
        w.server.tick()
        assert resting(w) == {"": 60}


def full_disk(monkeypatch):
    """No file can be written until what this returns is empty."""
    full, real = ["disk"], os.fsync

    def sync(number):
        if full:
            raise OSError(28, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", sync)
    return full


@in_loop
async def test_a_token_that_could_not_be_saved_at_all_is_not_replaced_by_the_old_one(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(ampproxy, "REFRESH_WAIT", 1)
    full = full_disk(monkeypatch)
    async with world(tmp_path, tokens=()) as w:
        path = token_file(w.auth, expired="2020-01-01T00:00:00Z")
        w.server.tick()
        assert await answered_by(w) == "new"
        full.clear()
        assert json.loads(path.read_text())["access_token"] == "sk-ant-oat-fred@example.com"
        os.utime(path)
        w.server.tick()
        assert await answered_by(w) == "new", "a look at the old file changes nothing"
        w.clock.now += 8 * 3600
        w.authority.usual = answer_json({**NEW_TOKEN, "access_token": "sk-ant-oat-third"})
        assert await answered_by(w) == "third"
        assert w.authority.body()["refresh_token"] == "sk-ant-ort-new", (
            "not the one redeemed before"
        )
        assert json.loads(path.read_text())["access_token"] == "sk-ant-oat-third"


@in_loop
async def test_two_tokens_in_a_row_that_cannot_be_saved_are_not_lost(tmp_path, monkeypatch):
    """And a refresh token that the second answer does not name stays the first answer's."""
    full = full_disk(monkeypatch)
    async with world(tmp_path, tokens=()) as w:
        path = token_file(w.auth, expired="2020-01-01T00:00:00Z")
        w.server.tick()
        assert await answered_by(w) == "new"
        for name in ("second", "third"):
            w.server.tick()
            w.clock.now += 9 * 3600
            w.authority.usual = answer_json(
                {"access_token": f"sk-ant-oat-{name}", "expires_in": 28800}
            )
            assert await answered_by(w) == name
            assert w.authority.body()["refresh_token"] == "sk-ant-ort-new"
        w.server.tick()
        assert await answered_by(w) == "third"
        full.clear()
        w.server.tick()
        token = json.loads(path.read_text())
        assert (token["access_token"], token["refresh_token"]) == (
            "sk-ant-oat-third",
            "sk-ant-ort-new",
        )


@in_loop
async def test_a_token_file_that_is_nested_too_deeply_is_named_and_left_alone(tmp_path, caplog):
    async with world(tmp_path, tokens=()) as w:
        (w.auth / "claude-a.json").parent.mkdir(exist_ok=True)
        (w.auth / "claude-a.json").write_text("[" * 200_000)
        token_file(w.auth, "zoe@example.com")
        w.server.tick()
        assert await answered_by(w) == "zoe@example.com"
        assert "claude-a.json is no token file" in caplog.text


@pytest.mark.parametrize("answer", [
    answer_json([{"access_token": "sk-secret"}]), (200, {}, [b'{"access_token": "sk-secret'])])  # fmt: skip
@in_loop
async def test_nonsense_from_the_authority_is_not_quoted(tmp_path, caplog, answer):
    async with world(tmp_path, tokens=()) as w:
        token_file(w.auth, expired="2020-01-01T00:00:00Z")
        w.server.tick()
        w.authority.usual = answer
        _, body, _ = await w.ask_json("/v1/messages", ASK)
        status = (await w.ask_json("/status", method="GET"))[1]
        assert "secret" not in json.dumps([body, status]) + caplog.text


@pytest.mark.parametrize("odd", [5, ["x"], {"a": 1}])
@in_loop
async def test_an_odd_refresh_token_is_no_storm(tmp_path, odd):
    async with world(tmp_path, tokens=()) as w:
        token_file(w.auth, expired="2020-01-01T00:00:00Z", refresh_token=odd)
        w.server.tick()
        w.authority.usual = answer_json({"error": "bad"}, 500)
        for _ in range(3):
            assert (await w.ask("/v1/messages", ASK)).status >= 400
        assert len(w.authority.requests) <= 4, "one of the tick's, one a call"
        assert not w.claude.requests


@in_loop
async def test_what_counts_as_tokens(tmp_path):
    async with world(tmp_path) as w:
        w.claude.script = [answer_json({"input_tokens": 120_000})]
        await w.ask("/v1/messages/count_tokens", ASK)
        w.claude.script = [answer_json(message(usage={"input_tokens": 7, "output_tokens": 3}))]
        await w.ask("/v1/messages", ASK)
        w.claude.script = [
            (200, SSE, [events()[0].replace(b": 11", b": " + b"9" * 5000), *events()[1:]])
        ]
        assert (await w.ask("/v1/messages", STREAM)).status == 200
        rows = [
            (r["input_tokens"], r["output_tokens"], r["status"]) for r in w.server.ledger.requests
        ]
        assert rows[:2] == [(0, 0, 200), (7, 3, 200)]
        assert rows[2][2] == 200


@in_loop
async def test_the_commands_ask_with_a_key(tmp_path):
    keys = {"api-keys": ["sesame"]}
    async with world(tmp_path, **keys) as w:
        w.write(port=w.port, **keys)
        with Cli(tmp_path, "accounts") as cli:
            code, out, _ = await cli.end()
        assert (code, "ready" in out) == (0, True)
        with Cli(tmp_path, "status", "--json") as cli:
            code, out, _ = await cli.end()
        assert code == 0
        assert json.loads(out)["accounts"][0]["requests"] == 0
    for host, shown in (("127.0.0.1", "http://127.0.0.1:"), ("::1", "http://[::1]:")):
        w.write(port=w.port, host=host)
        with Cli(tmp_path, "status") as cli:
            code, out, err = await cli.end()
        assert (code, out) == (1, "")
        with Cli(tmp_path, "accounts") as cli:
            code, out, _ = await cli.end()
        assert (code, "ready" in out) == (0, True)
        assert "no proxy to ask at " + shown in err


# == Model calls to Claude =========================================================================

CLIENT = {
    "Authorization": "Bearer sgamp_client", "x-api-key": "sgamp_client", "x-goog-api-key": "placeholder",
    "Cookie": "session=1", "x-amp-thread-id": "T-1", "X-Forwarded-For": "1.2.3.4", "Forwarded": "for=1.2.3.4",
    "anthropic-beta": "context-1m-2025-08-07, fine-grained-tool-streaming-2025-05-14",
    "anthropic-version": "2026-10-21", "X-Stainless-Lang": "js", "User-Agent": "amp/1", "X-App-Token": "sgamp_odd", "Anthropic-Api-Key": "sgamp_odd",
}  # fmt: skip


@pytest.mark.parametrize(
    "path", [PATH, "/v1/messages", "/messages", "/v1/v1/messages", "/api/provider/x/messages"]
)
@in_loop
async def test_what_reaches_claude(tmp_path, path):
    async with world(tmp_path) as w:
        status, body, headers = await w.ask_json(
            path + "?beta=true&key=sgamp_client", ASK, headers=CLIENT
        )
        assert (status, body) == (200, message())
        assert headers["x-ampproxy-route"] == "local"
        assert headers["x-ampproxy-provider"] == "claude"
        assert headers["x-ampproxy-model"] == "claude-opus-4-6"
        sent = w.claude.last
        assert (sent.method, sent.raw_path) == ("POST", "/v1/messages?beta=true")
        assert w.claude.body() == {**ASK, "system": [BLOCK]}
        assert "sgamp_" not in str(sent.headers)
        assert sent.headers["Authorization"] == "Bearer sk-ant-oat-fred@example.com"
        assert sent.headers["anthropic-beta"] == f"fine-grained-tool-streaming-2025-05-14,{OAUTH}"
        assert sent.headers["anthropic-version"] == "2026-10-21"
        assert sent.headers["User-Agent"] == "amp/1"
        assert sent.headers["X-Stainless-Lang"] == "js"
        gone = {
            "x-api-key",
            "x-goog-api-key",
            "cookie",
            "x-amp-thread-id",
            "x-forwarded-for",
            "forwarded",
        }
        assert not gone & {name.lower() for name in sent.headers}


@in_loop
async def test_defaults_that_claude_needs(tmp_path):
    async with world(tmp_path, claude={"headers": {"X-Own": "1"}, "identity": False}) as w:
        body = {"model": "claude-opus-4-6", "messages": []}
        await w.ask("/v1/messages", body, headers={"Accept-Encoding": "identity"})
        assert w.claude.body() == {**body, "max_tokens": 128000}, "as many as the model writes"
        sent = w.claude.last.headers
        assert (sent["anthropic-version"], sent["anthropic-beta"], sent["X-Own"]) == (
            "2023-06-01",
            OAUTH,
            "1",
        )
        assert (sent["Accept"], sent["Accept-Encoding"]) == ("application/json", "identity")


@in_loop
async def test_count_tokens(tmp_path):
    async with world(tmp_path) as w:
        w.claude.usual = answer_json({"input_tokens": 42})
        status, body, _ = await w.ask_json("/v1/messages/count_tokens", STREAM)
        assert (status, body) == (200, {"input_tokens": 42})
        assert w.claude.last.raw_path == "/v1/messages/count_tokens"
        assert w.claude.body() == {
            "model": ASK["model"],
            "messages": ASK["messages"],
            "system": [BLOCK],
        }


@in_loop
async def test_a_model_call_whose_body_is_packed_is_unpacked(tmp_path):
    async with world(tmp_path) as w:
        packed = gzip.compress(json.dumps(ASK).encode())
        said = {"Content-Encoding": "gzip"}
        assert (await w.ask("/v1/messages", packed, headers=said)).status == 200
        assert w.claude.body()["messages"] == ASK["messages"]
        assert "Content-Encoding" not in w.claude.last.headers


@in_loop
async def test_base_url_means_the_same_with_and_without_version(tmp_path):
    async with world(tmp_path) as w:
        for ending in ("/", "/v1", "/v1/"):
            assert w.reload(claude={"base-url": w.claude.url + ending})
            assert (await w.ask("/v1/messages", ASK)).status == 200
            assert w.claude.last.raw_path == "/v1/messages"


@pytest.mark.parametrize("size", [1, 7, 100000])
@in_loop
async def test_a_stream_passes_untouched(tmp_path, size):
    whole = event("ping") + b": comment\r\n\r\n" + b"".join(events())
    async with world(tmp_path) as w:
        w.claude.usual = (200, SSE, [whole[i : i + size] for i in range(0, len(whole), size)])
        response = await w.ask(PATH, STREAM)
        assert response.bytes == whole
        assert response.headers["Content-Type"] == "text/event-stream"
        assert w.claude.last.headers["Accept"] == "text/event-stream"
        row = w.server.ledger.requests[0]
        assert (row["status"], row["route"]) == (200, "local")


@in_loop
async def test_first_byte_early_and_the_end_not_held_back(tmp_path):
    async with world(tmp_path) as w:
        first, *rest = events()
        gates = [asyncio.Event() for _ in rest]
        parts = [first, *(part for pair in zip(gates, rest, strict=True) for part in pair)]
        w.claude.usual = (200, SSE, parts)
        async with w.http.post(w.url + PATH, json=STREAM) as response:
            assert await response.content.readuntil(b"\n\n") == first
            for gate, expected in zip(gates, rest, strict=True):
                gate.set()
                assert await response.content.readuntil(b"\n\n") == expected
            assert await response.content.read() == b""


@pytest.mark.parametrize("streamed", [False, True])
@in_loop
async def test_the_model_is_named_as_it_was_asked_for(tmp_path, streamed):
    served = "claude-opus-4-6-20260101"
    async with world(tmp_path) as w:
        whole = (
            b"".join(events(served)) if streamed else json.dumps(message(served), indent=1).encode()
        )
        w.claude.usual = (200, SSE if streamed else {"Content-Type": "application/json"}, [whole])
        response = await w.ask(PATH, STREAM if streamed else ASK)
        assert response.bytes == whole.replace(served.encode(), b"claude-opus-4-6")


@in_loop
async def test_a_large_answer_in_one_piece(tmp_path):
    whole = message(content=[{"type": "text", "text": "x" * (20 << 20)}])
    async with world(tmp_path) as w:
        w.claude.usual = answer_json(whole)
        assert (await w.ask_json(PATH, ASK))[1] == whole
        assert (
            w.server.ledger.requests[0]["input_tokens"],
            w.server.ledger.requests[0]["output_tokens"],
        ) == (
            11,
            7,
        )


@in_loop
async def test_a_tool_input_that_looks_like_a_model_stays(tmp_path):
    content = [{"type": "tool_use", "id": "t", "name": "set", "input": {"model": "served"}}]
    async with world(tmp_path) as w:
        w.claude.usual = answer_json(message("served", content=content))
        _, body, _ = await w.ask_json(PATH, ASK)
        assert body["model"] == "claude-opus-4-6"
        assert body["content"] == content


@pytest.mark.parametrize("served", ["claude-opus-4-6", "other"])
@pytest.mark.parametrize("streamed", [False, True])
@in_loop
async def test_packed_answers_are_read_and_unpacked(tmp_path, streamed, served):
    whole = b"".join(events(served)) if streamed else json.dumps(message(served)).encode()
    packer = zlib.compressobj(wbits=31)
    parts = [
        packer.compress(whole[:90]) + packer.flush(zlib.Z_SYNC_FLUSH),
        packer.compress(whole[90:]) + packer.flush(),
    ]
    kind = {"Content-Type": "text/event-stream" if streamed else "application/json"}
    async with world(tmp_path) as w:
        w.claude.usual = (200, {**kind, "Content-Encoding": "gzip"}, parts)
        plain = {"Accept-Encoding": "identity"}
        response = await w.ask(PATH, STREAM if streamed else ASK, headers=plain)
        assert w.claude.last.headers["Accept-Encoding"] == "identity"
        assert "Content-Encoding" not in response.headers
        assert response.bytes == whole.replace(b'"other"', b'"claude-opus-4-6"')
        assert w.server.ledger.requests[0]["input_tokens"] == 11


@in_loop
async def test_a_client_that_leaves_closes_the_upstream_at_once(tmp_path):
    async with world(tmp_path) as w:
        w.claude.usual = (200, SSE, [events()[0], asyncio.Event()])
        async with w.http.post(w.url + PATH, json=STREAM) as response:
            await response.content.readuntil(b"\n\n")
            response.close()
        await w.claude.gone.wait()
        while not w.server.ledger.requests:
            await asyncio.sleep(0)
        account = w.server.pool.accounts[w.tokens[0]]
        assert (
            w.server.ledger.requests[0]["status"],
            account.in_flight,
            account.rests,
            account.counts["errors"],
        ) == (499, 0, {}, 0)


def error_in(stream):
    """The data of a stream's `event: error`, read as the SDKs read it."""
    assert b"event: error\n" in stream
    return json.loads(stream.rpartition(b"data: ")[2])["error"]


@pytest.mark.parametrize("parts", [
    [*events()[:3], "cut"], [*events()[:3], events()[3][:20], "cut"], events()[:3], [*events()[:2], events()[2][:-40]],
])  # fmt: skip
@in_loop
async def test_a_stream_that_dies_ends_in_an_error_event(tmp_path, parts):
    async with world(tmp_path) as w:
        w.claude.usual = (200, SSE, parts)
        response = await w.ask(PATH, STREAM)
        assert response.status == 200
        assert error_in(response.bytes)["type"] == "api_error"
        assert len(w.claude.requests) == 1, "nothing is retried after the first byte"
        assert (await w.ask("/healthz", method="GET")).status == 200


@pytest.mark.parametrize("first", [
    (200, SSE, [event("error", error={"type": "overloaded_error", "message": "busy"})]), (200, SSE, []),
    (200, SSE, ["cut"]), (200, SSE, [events()[0][:30], "cut"]), (200, SSE, [b"data: garbage\n\n"]),
    (200, {"Content-Type": "application/json"}, [b"<html>"]), (200, {"Content-Type": "text/html"}, [b"<html>"]),
    (200, {"Content-Type": "application/json", "Content-Length": "500"}, [b"{", "cut"]), (503, {}, [b"down"]),
])  # fmt: skip
@in_loop
async def test_what_fails_before_the_first_byte_is_tried_again_unseen(tmp_path, first):
    async with world(tmp_path) as w:
        w.claude.script = [first]
        w.claude.usual = (200, SSE, events())
        response = await w.ask(PATH, STREAM)
        assert (response.status, response.bytes) == (200, b"".join(events()))
        assert len(w.claude.requests) == 2


@in_loop
async def test_a_stream_that_was_whole_is_whole_however_the_connection_ends(tmp_path):
    async with world(tmp_path) as w:
        w.claude.usual = (200, SSE, [*events(), "cut"])
        assert (await w.ask(PATH, STREAM)).bytes == b"".join(events())


@in_loop
async def test_the_words_of_the_end_inside_a_text_are_no_end(tmp_path):
    said = event(
        "content_block_delta",
        index=0,
        delta={"type": "text_delta", "text": 'a "message_stop" \nevent: error'},
    )
    async with world(tmp_path) as w:
        w.claude.usual = (200, SSE, [*events()[:2], said])
        assert error_in((await w.ask(PATH, STREAM)).bytes)["type"] == "api_error"


@in_loop
async def test_no_comment_goes_out_behind_the_end():
    """Not even one that was due when the end met a client whose socket is full."""

    async def handle(request):
        call = ampproxy.Call(request, ampproxy.MODEL_PATH.fullmatch("/v1/messages"))
        with ampproxy.Delivery(call, 15, 300) as delivery:
            response = await delivery.start(200, None, CIMultiDict(SSE))
            delivery.settle(True)
            request.protocol.pause_writing()  # as a full socket does
            delivery.loop.call_later(0.1, request.protocol.resume_writing)
            delivery.comment = asyncio.create_task(delivery.write_comment())
            await delivery.write(response, WHOLE)
        return response

    server = await asyncio.get_running_loop().create_server(web.Server(handle), "127.0.0.1", 0)
    got = await raw_exchange(server.sockets[0].getsockname()[1], HEALTH)
    assert got.endswith(chunk(WHOLE) + b"0\r\n\r\n")
    server.close()


@in_loop
async def test_a_silent_stream_is_kept_alive_with_comments_between_events(tmp_path):
    first, *rest = events()
    gate, inside = asyncio.Event(), asyncio.Event()
    async with world(tmp_path, streaming={"keepalive-seconds": 0.05}) as w:
        w.claude.usual = (200, SSE, [gate, first, rest[0][:20], inside, rest[0][20:], *rest[1:]])
        async with w.http.post(w.url + PATH, json=STREAM) as response:
            assert await response.content.readuntil(b"\n\n") == b": keep-alive\n\n", (
                "before the first event"
            )
            gate.set()
            while (got := await response.content.readuntil(b"\n\n")) == b": keep-alive\n\n":
                pass
            assert got == first
            while await response.content.readuntil(b"\n\n") != b": keep-alive\n\n":
                pass  # half an event came meanwhile: a comment does not end up in it
            inside.set()
            left = (await response.content.read()).split(b"\n\n")
            assert [e + b"\n\n" for e in left if e not in (b"", b": keep-alive")] == rest


@pytest.mark.parametrize("paid", [False, True])
@in_loop
async def test_after_a_comment_a_failure_is_an_error_event(tmp_path, paid):
    """The comment fixes the status alone: others are asked, and what fails in the end is said."""
    gate, busy = asyncio.Event(), {"type": "overloaded_error", "message": "busy"}
    rule = {"fallback": "always" if paid else "never"}
    async with world(tmp_path, ampcode=rule, streaming={"keepalive-seconds": 0.05}) as w:
        w.claude.script = [(200, SSE, [gate, event("error", error=busy)])]
        w.claude.usual = (200, SSE, [event("error", error=busy)])
        async with w.http.post(w.url + PATH, json=STREAM) as response:
            assert await response.content.readuntil(b"\n\n") == b": keep-alive\n\n"
            gate.set()
            said = error_in(await response.content.read())
        if paid:
            assert "ampcode.com" in said["message"]
        else:
            assert said == busy, "the provider's own"
        assert (len(w.claude.requests), len(w.amp.requests)) == (3, int(paid))


@pytest.mark.parametrize("packed", [False, True])
@in_loop
async def test_no_comment_gets_into_what_is_no_stream(tmp_path, packed):
    gate, whole = (
        asyncio.Event(),
        gzip.compress(b"".join(events())) if packed else b'{"a": "' + b"x" * 90 + b'"}',
    )
    kind = {**SSE, "Content-Encoding": "gzip"} if packed else {"Content-Type": "application/json"}
    async with world(tmp_path, tokens=(), streaming={"keepalive-seconds": 0.25}) as w:
        w.amp.usual = (200, kind, [whole[:30], gate, whole[30:]])
        async with w.http.post(w.url + PATH, json=STREAM) as response:
            first = await response.content.readexactly(30)
            await asyncio.sleep(0.6)  # some beats long
            gate.set()
            assert first + await response.content.read() == whole


@in_loop
async def test_a_timer_that_has_nothing_to_do_rests(tmp_path, monkeypatch):
    """While an upstream thinks, it looks as often as its shortest time, and no more."""
    monkeypatch.setattr(ampproxy, "LOOK_EVERY", 0.1)
    looks, gate, look = [], asyncio.Event(), ampproxy.Delivery.look
    monkeypatch.setattr(ampproxy.Delivery, "look", lambda self: (looks.append(1), look(self)))
    async with world(tmp_path, streaming={"idle-timeout-seconds": 0.8}) as w:
        w.claude.usual = held(gate, (200, SSE, events()))
        asked = asyncio.create_task(w.ask("/v1/messages", STREAM))
        await asyncio.sleep(0.6)
        gate.set()
        assert (await asked).status == 200
        assert len(looks) < 9


@in_loop
async def test_of_several_accounts_that_do_not_rest_the_reason_is_told(tmp_path):
    async with world(tmp_path, tokens=FRIENDS, claude={"base-url": "http://claude.invalid"}) as w:
        status, body, _ = await w.ask_json("/v1/messages", ASK)
        assert (status, "its name is not known" in body["error"]["message"]) == (502, True)


@in_loop
async def test_after_a_comment_another_account_answers(tmp_path):
    gate = asyncio.Event()
    async with world(tmp_path, FRIENDS[:2], streaming={"keepalive-seconds": 0.05}) as w:
        w.claude.script = [held(gate, limit(**{"Retry-After": "600"}))]
        w.claude.usual = (200, SSE, events())
        async with w.http.post(w.url + PATH, json=STREAM) as response:
            assert await response.content.readuntil(b"\n\n") == b": keep-alive\n\n"
            gate.set()
            got = await response.content.read()
        assert got.replace(b": keep-alive\n\n", b"") == b"".join(events())
        assert len(w.claude.requests) == 2


@in_loop
async def test_silence_for_too_long_is_a_failure(tmp_path):
    async with world(tmp_path, streaming={"idle-timeout-seconds": 0.1}) as w:
        w.claude.usual = (200, SSE, [events()[0], asyncio.Event()])
        response = await w.ask(PATH, STREAM)
        assert error_in(response.bytes)["type"] == "api_error"


# == Who pays ======================================================================================


@pytest.mark.parametrize(("path", "model"), [
    ("/api/provider/openai/v1/responses", "gpt-5.2"), ("/api/provider/xai/v1/chat/completions", "grok-code-fast-1"),
    ("/api/provider/groq/chat/completions", "x"), ("/api/provider/anthropic/v1/messages", "other-model"),
    ("/api/provider/google/v1beta1/publishers/google/models/gemini-3-flash-preview:generateContent", None),
])  # fmt: skip
@in_loop
async def test_what_nobody_here_serves_goes_to_ampcode_as_it_came(tmp_path, caplog, path, model):
    async with world(tmp_path, ampcode={"upstream-api-key": "sgamp_up"}) as w:
        raw = json.dumps({"model": model} if model else {"contents": []}, indent=3).encode()
        response = await w.ask(path + "?alt=sse&a=%2f", raw, headers=CLIENT)
        assert json.loads(response.bytes) == {"from": "ampcode"}
        assert (w.amp.last.bytes, w.amp.last.raw_path) == (raw, path + "?alt=sse&a=%2f")
        assert w.amp.last.headers["Authorization"] == "Bearer sgamp_up"
        assert w.amp.last.headers["x-amp-thread-id"] == "T-1"
        assert "sgamp_client" not in str(w.amp.last.headers)
        assert response.headers["x-ampproxy-route"] == "amp"
        assert [
            r
            for r in caplog.records
            if r.levelno == logging.WARNING and "AMP_CREDITS" in r.getMessage()
        ]
        assert len([r for r in caplog.messages if "AMP_CREDITS" in r]) == 1, "one line a request"
        assert w.server.ledger.routes["amp"] == 1


FALLBACKS = [  # fallback, path, what happens -> who answers
    ("always", PATH, "served", "claude"), ("always", PATH, "failing", "amp"), ("always", PATH, "unserved", "amp"),
    ("unserved", PATH, "failing", 429), ("unserved", PATH, "unserved", "amp"),
    ("never", PATH, "failing", 429), ("never", PATH, "unserved", 404),
    ("always", "/v1/messages", "failing", 429), ("always", "/v1/messages", "unserved", 404),
]  # fmt: skip


@pytest.mark.parametrize(("fallback", "path", "case", "who"), FALLBACKS)
@in_loop
async def test_fallback(tmp_path, caplog, fallback, path, case, who):
    async with world(tmp_path, ampcode={"fallback": fallback}) as w:
        if case == "failing":
            w.claude.usual = answer_json(
                {"type": "error", "error": {"type": "rate_limit_error", "message": "x"}}, 429
            )
        model = "nobody-has-this" if case == "unserved" else ASK["model"]
        status, body, headers = await w.ask_json(path, {**ASK, "model": model})
        assert len(w.amp.requests) == (who == "amp")
        assert status == (200 if isinstance(who, str) else who)
        if who == "amp":
            assert body == {"from": "ampcode"}
        elif who == 404:
            assert model in body["error"]["message"]
            assert "NO_PROVIDER" in caplog.text
        route = {"claude": "local", "amp": "amp", 429: "local", 404: "none"}[who]
        assert headers["x-ampproxy-route"] == route


@in_loop
async def test_a_fallback_that_is_down_or_dies(tmp_path):
    async with world(tmp_path, tokens=()) as w:
        w.amp.usual = (200, SSE, [events()[0], "cut"])
        assert error_in((await w.ask(PATH, STREAM)).bytes)["type"] == "api_error"
        w.reload(ampcode={"upstream-url": f"http://127.0.0.1:{free_port()}"})
        status, body, headers = await w.ask_json(PATH, ASK)
        told = (status, body["type"], body["error"]["type"])
        assert told == (502, "error", "amp_upstream_proxy_error")
        assert headers["x-ampproxy-route"] == "amp"


# == ampcode.com ===================================================================================

TARGETS = ["/api/internal?getUserFreeTierStatus", "/api/threads/find?q=a%20b+c%2F&x=&&y", "/api/x%2Fy/../z//w", "/news.rss",
           "/threads.rss", "/api/telemetry", "/actors/metadata?namespace=default", "/threadsX", "/a;b=c?%C3%A9=%"]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@in_loop
async def test_paths_and_queries_pass_byte_for_byte(tmp_path, target):
    async with world(tmp_path) as w:
        head = f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()
        assert b'{"from": "ampcode"}' in await raw_exchange(w.port, head)
        assert w.amp.last.raw_path.encode(errors="surrogateescape") == target.encode()


@in_loop
async def test_headers_bodies_statuses_and_cookies_pass(tmp_path):
    async with world(tmp_path) as w:
        packed = gzip.compress(b"thread")
        sent = {
            "Content-Encoding": "gzip",
            "Cookie": "a=b",
            "X-Odd": "1",
            "Connection": "X-Hop",
            "X-Hop": "1",
        }
        headers = [("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"), ("Content-Type", "text/x")]
        w.amp.usual = (418, CIMultiDict(headers), [b"tea"])
        response = await w.ask("/api/internal?uploadThread", packed, headers=sent)
        assert w.amp.last.bytes == packed
        assert w.amp.last.headers["Content-Encoding"] == "gzip"
        assert w.amp.last.headers["Content-Length"] == str(len(packed))
        assert (w.amp.last.headers["Cookie"], w.amp.last.headers["X-Odd"]) == ("a=b", "1")
        assert "X-Hop" not in w.amp.last.headers
        assert (response.status, response.bytes) == (418, b"tea")
        assert response.headers.getall("Set-Cookie") == ["a=1", "b=2"]
        assert not [name for name in response.headers if name.lower().startswith("x-ampproxy")]


@pytest.mark.parametrize(("method", "answer"), [
    ("HEAD", (200, {"Content-Length": "5"}, [])), ("GET", (204, {}, [])), ("GET", (304, {"ETag": "x"}, [])),
    ("DELETE", (200, {}, [b"gone"])), ("GET", (302, {"Location": "https://elsewhere/?a=b"}, [])), ("OPTIONS", (200, {}, [])),
    ("GET", (200, {}, [])),
])  # fmt: skip
@in_loop
async def test_methods_and_empty_answers(tmp_path, method, answer):
    async with world(tmp_path) as w:
        status, headers, parts = answer
        w.amp.usual = (
            status,
            {**headers, "Content-Length": headers.get("Content-Length", str(len(b"".join(parts))))},
            parts,
        )
        response = await w.ask("/api/thing", method=method)
        assert (response.status, response.bytes) == (status, b"".join(parts))
        assert response.headers.get("Location") == headers.get("Location")
        assert w.amp.last.method == method
        assert "Access-Control-Allow-Origin" not in response.headers


@in_loop
async def test_large_bodies_stream_both_ways(tmp_path):
    piece, count = os.urandom(1 << 20), 80
    digest = hashlib.sha256(piece * count).hexdigest()
    seen = hashlib.sha256()
    first = asyncio.Event()

    async def swallow(request):
        return web.Response(text=hashlib.sha256(request.bytes).hexdigest())

    async with world(tmp_path) as w:
        w.amp.usual = swallow

        async def upload():
            for _ in range(count):
                yield piece

        assert (await w.ask("/api/attachments", upload())).bytes.decode() == digest
        w.amp.usual = (200, {"Content-Type": "video/mp4"}, [piece, first, *[piece] * (count - 1)])
        async with w.http.get(w.url + "/api/attachments/1") as response:
            seen.update(await response.content.readexactly(len(piece)))
            first.set()
            async for chunk in response.content.iter_any():
                seen.update(chunk)
        assert seen.hexdigest() == digest


PACKED = gzip.compress(b'{"a": 1}' * 1000)


@pytest.mark.parametrize(("headers", "sent", "got"), [
    ({}, PACKED, b'{"a": 1}' * 1000), ({}, PACKED[:-9], PACKED[:-9]), ({}, PACKED[:50] + b"x" + PACKED[51:], None),
    ({"Content-Encoding": "gzip"}, PACKED, PACKED), ({}, b"", b""), ({}, b"\x1f", b"\x1f"), ({}, b"\x1f\x8b", b"\x1f\x8b"),
    ({"Content-Type": "text/event-stream"}, PACKED, PACKED), ({"Content-Encoding": "br"}, b"\x1f\x8bx", b"\x1f\x8bx"),
])  # fmt: skip
@pytest.mark.parametrize("status", [200, 404])
@pytest.mark.parametrize("size", [1, 100000])
@in_loop
async def test_hidden_gzip_is_unpacked(tmp_path, headers, sent, got, status, size):
    async with world(tmp_path) as w:
        parts = [sent[i : i + size] for i in range(0, len(sent), size)]
        w.amp.usual = (status, {"Content-Type": "application/json", **headers}, parts)
        response = await w.ask("/api/threads", method="GET")
        assert (response.status, response.bytes) == (status, sent if got is None else got)
        assert response.headers.get("Content-Encoding") == headers.get("Content-Encoding")


HIS = '{"name": "thread-actors-tui", "enabled": true}'


@pytest.mark.parametrize(("sent", "got"), [
    (f'[{HIS}]', "[]"), (f'[ {HIS} , 1]', "[ 1]"), (f'[1 , {HIS}]', "[1 ]"), (f'[1,{HIS},2]', "[1,2]"), (f'[{{"a":"{{"}},{HIS}]', '[{"a":"{"}]'),
    (f'{{"x":{HIS},"y":1}}', None), (f'{{"y":1,"x": {HIS}}}', None), (f'[1,\n {HIS},\n 2]', "[1,\n 2]"),
])  # fmt: skip
def test_only_a_member_of_a_list_is_the_flag(sent, got):
    left = ampproxy.FLAG.sub(rb"\1", sent.encode()).decode()
    assert json.loads(left) == json.loads(sent if got is None else got)


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("hidden", [True, False])
@in_loop
async def test_the_server_side_flag_is_taken_out(tmp_path, inference, hidden):
    flags = [{"name": "a", "enabled": True}, {"name": "thread-actors-tui", "enabled": True}]
    user = {"ok": True, "result": {"id": "u", "features": flags, "team": None}}
    raw = json.dumps(user).encode()
    async with world(tmp_path, ampcode={"client-inference": inference}) as w:
        w.amp.usual = (
            200,
            {"Content-Type": "application/json"},
            [gzip.compress(raw) if hidden else raw],
        )
        body = json.loads(
            (await w.ask("/api/internal?getUserInfo", {"method": "getUserInfo"})).bytes
        )
        assert body["result"]["features"] == (flags[:1] if inference else flags)
        assert body["result"]["id"] == "u"
        other = json.loads((await w.ask("/api/internal?getThread", {})).bytes)
        assert other["result"]["features"] == flags
        user["result"]["features"] = flags[:1]
        raw = json.dumps(user, indent=2).encode()
        w.amp.usual = (200, {"Content-Type": "application/json"}, [raw])
        assert (await w.ask("/api/internal?getUserInfo", {})).bytes == raw, (
            "untouched without the flag"
        )


@in_loop
async def test_ampcode_down_and_dying(tmp_path):
    async with world(tmp_path) as w:
        w.amp.usual = (200, {"Content-Type": "text/plain"}, [b"half", "cut"])
        with pytest.raises(aiohttp.ClientPayloadError):
            await w.ask("/api/threads", method="GET")
        w.reload(ampcode={"upstream-url": f"http://127.0.0.1:{free_port()}"})
        status, body, _ = await w.ask_json("/api/threads", method="GET")
        assert status == 502
        assert body["error"] == "amp_upstream_proxy_error"
        assert body["message"]


@pytest.mark.parametrize(("path", "key"), [
    ("/api/provider/anthropic/v1/messages", "type"), ("/api/provider/openai/v1/responses", "code"),
    ("/api/provider/openai/v1/chat/completions", "code"),
    ("/api/provider/google/v1beta/models/other:generateContent", "status"),
])  # fmt: skip
@in_loop
async def test_ampcode_out_of_reach_is_named_in_every_dialect(tmp_path, path, key):
    async with world(tmp_path, ampcode={"upstream-url": f"http://127.0.0.1:{free_port()}"}) as w:
        status, body, headers = await w.ask_json(path, {"model": "other"})
        assert (status, headers["x-ampproxy-route"]) == (502, "amp")
        assert body["error"][key] == "amp_upstream_proxy_error"
        assert "cannot be reached" in body["error"]["message"]
        streamed = path.replace(":generate", ":streamGenerate")
        status, body, _ = await w.ask_json(streamed, {"model": "other", "stream": True})
        assert (status, body["error"][key]) == (502, "amp_upstream_proxy_error")


KEY_CASES = [  # config, AMP_API_KEY, secrets file, client's headers -> headers that arrive
    ({}, "", {}, {"x-api-key": "own"}, ("", "own")),
    ({}, "", {}, {"Authorization": "Bearer own"}, ("Bearer own", "")),
    (
        {"upstream-api-key": "cfg"},
        "env",
        {"apiKey@URL/": "file"},
        {"x-api-key": "own"},
        ("Bearer cfg", "cfg"),
    ),
    ({}, " env ", {"apiKey@URL/": "file"}, {}, ("Bearer env", "env")),
    ({}, " ", {"apiKey@URL/": " file "}, {"Authorization": "own"}, ("Bearer file", "file")),
    ({}, "", {"apiKey@URL": "file"}, {}, ("Bearer file", "file")),
    ({}, "", {"apiKey@http://other/": "file"}, {}, ("", "")),
]


@pytest.mark.parametrize(("config", "env", "file", "headers", "arrives"), KEY_CASES)
@in_loop
async def test_upstream_key(tmp_path, monkeypatch, config, env, file, headers, arrives):
    monkeypatch.setenv("AMP_API_KEY", env)
    async with world(tmp_path, ampcode=config) as w:
        secrets = Path("~/.local/share/amp/secrets.json").expanduser()
        secrets.parent.mkdir(parents=True)
        secrets.write_text(
            json.dumps({name.replace("URL", w.amp.url): value for name, value in file.items()})
        )
        await w.ask("/api/threads", method="GET", headers=headers)
        got = w.amp.last.headers
        assert (got.get("Authorization", ""), got.get("X-Api-Key", "")) == arrives


@in_loop
async def test_the_secrets_file_is_read_every_five_minutes(tmp_path):
    secrets = Path("~/.local/share/amp/secrets.json").expanduser()
    secrets.parent.mkdir(parents=True)
    async with world(tmp_path) as w:

        async def arrives():
            await w.ask("/api/threads", method="GET")
            return w.amp.last.headers.get("X-Api-Key")

        assert await arrives() is None
        secrets.write_text(json.dumps({f"apiKey@{w.amp.url}/": "one"}))
        w.clock.now += 299
        assert await arrives() is None, "its lack is kept as well"
        w.clock.now += 2
        assert await arrives() == "one"
        secrets.write_text("{broken")
        assert await arrives() == "one"
        w.clock.now += 301
        assert await arrives() is None
        two = json.dumps({f"apiKey@{w.amp.url}": "two"}).encode()
        secrets.write_bytes(b"\xef\xbb\xbf" + two)
        w.clock.now += 301
        assert await arrives() == "two", "as some editors on Windows save it"


@in_loop
async def test_upstream_key_per_client(tmp_path):
    ampcode = {
        "upstream-api-key": "all",
        "upstream-api-keys": [{"upstream-api-key": "special", "api-keys": ["two"]}],
    }
    async with world(tmp_path, ampcode=ampcode, **{"api-keys": ["one", "two"]}) as w:
        for key, arrives in (("one", "all"), ("two", "special")):
            await w.ask(f"/api/threads?a=1&key=other{key}&auth_token={key}", method="GET")
            assert w.amp.last.headers["X-Api-Key"] == arrives
            assert w.amp.last.raw_path == f"/api/threads?a=1&key=other{key}"


@in_loop
async def test_websockets_pass_whole(tmp_path):
    seen, codes, ended = {}, [], asyncio.Event()

    async def actor(request):
        seen["protocols"] = request.headers["Sec-WebSocket-Protocol"]
        seen["key"] = request.headers.get("Authorization")
        socket = web.WebSocketResponse(
            protocols=["rivet_x", "rivet"], autoping=False, max_msg_size=0
        )
        await socket.prepare(request)
        async for got in socket:
            if got.type == aiohttp.WSMsgType.PING:
                await socket.pong(got.data)
            elif got.data == "close":
                await socket.close(code=4001, message=b"enough")
            elif got.type == aiohttp.WSMsgType.TEXT:
                await socket.send_str(got.data + "!")
            else:
                await socket.send_bytes(got.data[::-1])
        codes.append(socket.close_code)
        ended.set()
        return socket

    async with world(tmp_path, ampcode={"upstream-api-key": "sgamp_up"}) as w:
        w.amp.usual = actor
        url = URL(w.url + "/actors/gateway/threadActor/websocket/?rvt-key=T%2F1", encoded=True)
        protocols = ["a", "rivet", "rivet_conn_params.%7B%22a%22%3A1%7D"]
        async with w.http.ws_connect(
            url, protocols=protocols, autoping=False, max_msg_size=0
        ) as ws:
            assert ws.protocol == "rivet"
            await ws.send_str("hé")
            assert await ws.receive_str() == "hé!"
            await ws.send_bytes(b"\x00\x01" * 3_000_000)
            assert await ws.receive_bytes() == b"\x01\x00" * 3_000_000
            await ws.ping(b"p")
            assert (await ws.receive()).data == b"p"
            await ws.send_str("close")
            end = await ws.receive()
            assert end.data == 4001
        await ended.wait()
        ended.clear()
        async with w.http.ws_connect(url, protocols=protocols) as ws:
            await ws.close(code=4002, message=b"bye")
            assert ws.close_code == 4002, "echoed"
        await ended.wait()
        assert codes[1] == 4002
        assert (seen["protocols"], seen["key"]) == (",".join(protocols), "Bearer sgamp_up")
        assert w.amp.last.raw_path.endswith("?rvt-key=T%2F1")
        assert w.server.ledger.server_side == 0


@pytest.mark.parametrize("side", ["client", "upstream"])
@in_loop
async def test_a_close_without_a_code_travels_too(tmp_path, side):
    closed, codes = asyncio.Event(), []

    async def actor(request):
        socket = web.WebSocketResponse(autoclose=False)
        await socket.prepare(request)
        if side == "upstream":
            await socket._writer.send_frame(b"", aiohttp.WSMsgType.CLOSE)
        await socket.receive()
        codes.append(socket.close_code)
        closed.set()
        return socket

    async with world(tmp_path) as w:
        w.amp.usual = actor
        async with w.http.ws_connect(w.url + "/actors/x", autoclose=False) as ws:
            if side == "client":
                await ws._writer.send_frame(b"", aiohttp.WSMsgType.CLOSE)
            assert (await ws.receive()).type == aiohttp.WSMsgType.CLOSE
        await closed.wait()
        assert codes == [1000]


@in_loop
async def test_tunnels_are_told_of_the_stop(tmp_path):
    async def actor(request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        return socket

    async with world(tmp_path) as w:
        w.amp.usual, live = actor, w.server.live
        server = ampproxy.Server(live, ampproxy.Net(live), w.clock)
        async with server.serving() as port:
            ws = await w.http.ws_connect(f"http://127.0.0.1:{port}/actors/x")
            told = asyncio.create_task(ws.receive())
            await asyncio.sleep(0)
        assert ((await told).type, ws.close_code) == (aiohttp.WSMsgType.CLOSE, 1001)


@in_loop
async def test_tunnels_that_broke_off_are_forgotten(tmp_path):
    gone = asyncio.Queue()

    async def actor(request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        gone.put_nowait(socket)
        return socket

    async with world(tmp_path) as w:
        w.amp.usual = actor
        for _ in range(5):
            ws = await w.http.ws_connect(w.url + "/actors/x")
            ws._response.connection.transport.abort()
            await gone.get()
        async with w.http.ws_connect(w.url + "/actors/x"):
            assert len(w.server.ampcode.tunnels) <= 2


@in_loop
async def test_a_broken_frame_ends_the_tunnel(tmp_path, caplog):
    async def actor(request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        request.transport.write(b"\x83\x00")  # a reserved kind of frame
        await socket.receive()
        return socket

    async with world(tmp_path) as w:
        w.amp.usual = actor
        async with w.http.ws_connect(w.url + "/actors/x") as ws:
            assert (await ws.receive()).type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
        assert "internal error" not in caplog.text


@in_loop
async def test_no_redirect_takes_the_upstream_key_along(tmp_path):
    elsewhere = FakeUpstream(answer_json({}))
    async with elsewhere.open(), world(tmp_path, ampcode={"upstream-api-key": "sgamp_up"}) as w:
        w.amp.usual = (307, {"Location": elsewhere.url + "/steal", "Content-Length": "0"}, [])
        with pytest.raises(aiohttp.WSServerHandshakeError) as error:
            await w.http.ws_connect(w.url + "/actors/x")
        assert error.value.status == 502
        assert (await w.ask("/api/threads", method="GET")).status == 307
        assert not elsewhere.requests


@in_loop
async def test_websockets_refused_or_cut(tmp_path):
    async def cut(request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        request.transport.abort()
        return socket

    async with world(tmp_path) as w:
        w.amp.usual = answer_json({"error": "no"}, 403)
        with pytest.raises(aiohttp.WSServerHandshakeError) as error:
            await w.http.ws_connect(w.url + "/actors/x")
        assert error.value.status == 403
        w.amp.usual = cut
        async with w.http.ws_connect(w.url + "/actors/x") as ws:
            end = await ws.receive()
            assert (end.type, end.data) == (aiohttp.WSMsgType.CLOSE, 1011)
        with pytest.raises(aiohttp.WSServerHandshakeError) as error:
            await w.http.ws_connect(w.url + "/v1/responses")
        assert error.value.status == 426


@in_loop
async def test_server_side_threads_are_said_plainly(tmp_path, caplog):
    async with world(tmp_path) as w:
        await w.ask("/api/thread-actors", {"executorType": "local-client"})
        assert "AMP_CREDITS" in caplog.text
        assert "Amp bills" in caplog.text
        _, status, _ = await w.ask_json("/status", method="GET")
        assert status["server_side_threads"] == 1


# == Security ======================================================================================


@pytest.mark.parametrize(
    "place",
    ["Authorization", "raw Authorization", "X-Api-Key", "X-Goog-Api-Key", "key", "auth_token"],
)
@pytest.mark.parametrize("path", ["/api/threads", "/status", PATH])
@in_loop
async def test_keys_in_five_places(tmp_path, place, path):
    async with world(tmp_path, **{"api-keys": ["first", "s3cret"]}) as w:

        async def ask(key, **headers):
            method = "POST" if path == PATH else "GET"
            query = f"?{place}={key}" if "uth" not in place.title() or place == "auth_token" else ""
            query = query if place in ("key", "auth_token") else ""
            if not query:
                headers |= {place.split()[-1]: f"Bearer {key}" if place == "Authorization" else key}
            return await w.ask_json(
                path + query, ASK if path == PATH else None, method=method, headers=headers
            )

        def words(body):
            return body["error"]["message"] if path == PATH else body["error"]

        assert (await ask("s3cret"))[0] == 200
        wrong = await ask("wr0ng")
        assert (wrong[0], words(wrong[1])) == (
            401,
            "Invalid API key",
        )
        if place not in ("X-Api-Key", "key"):
            assert (await ask("wr0ng", **{"X-Api-Key": "s3cret"}))[0] == 200, (
                "one right one is enough"
            )
        status, body, _ = await w.ask_json(
            path, ASK if path == PATH else None, method="POST" if path == PATH else "GET"
        )
        assert status == 401
        if path == PATH:
            assert body == {
                "type": "error",
                "error": {"type": "authentication_error", "message": "Missing API key"},
            }
        else:
            assert body == {"error": "Missing API key"}
        assert not [r for r in w.amp.requests if "s3cret" in str(r.headers) + r.raw_path]


SDK_ASKS = [  # path, headers -> the dialect of a refusal
    ("/v1/models", {}, "openai"), ("/models", {}, "openai"), ("/v1/models/gpt-5.5", {}, "openai"),
    ("/api/provider/openai/v1/models", {}, "openai"), ("/v1/embeddings", {}, "openai"),
    ("/v1/models", {"anthropic-version": "2023-06-01"}, "anthropic"), ("/v1/messages/batches", {}, "anthropic"),
    ("/v1beta/models", {}, "gemini"), ("/v1beta/models/x", {}, "gemini"), ("/v1/models", {"x-goog-api-key": ""}, "gemini"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "headers", "dialect"), SDK_ASKS)
@in_loop
async def test_sdks_are_refused_in_their_dialect(tmp_path, path, headers, dialect):
    """Also where they ask for no model call."""
    words = "Missing API key"
    errors = {
        "openai": {"type": "authentication_error", "code": "authentication_error"},
        "anthropic": {"type": "authentication_error"},
        "gemini": {"code": 401, "status": "UNAUTHENTICATED"},
    }
    async with world(tmp_path, **{"api-keys": ["s3cret"]}) as w:
        status, body, _ = await w.ask_json(path, method="GET", headers=headers)
        assert (status, body["error"]) == (401, {"message": words, **errors[dialect]})
        assert ("type" in body) == (dialect == "anthropic")
    async with world(tmp_path) as w:
        foreign = {**headers, "Host": "evil.example"}
        status, body, _ = await w.ask_json(path, method="GET", headers=foreign)
        assert (status, "not an address" in body["error"]["message"]) == (403, True)


HOSTS = [  # Host header -> fine without keys
    ("127.0.0.1", True), ("localhost:9", True), ("LOCALHOST", True), ("[::1]:80", True), ("127.1.2.3", True),
    ("evil.example", False), ("127.0.0.1.evil.example", False), ("192.168.0.9", False), ("", False), ("[::1", False),
    ("a@127.0.0.1:80:80", False), ("localhost.evil.example:80", False),
]  # fmt: skip


@pytest.mark.parametrize(("host", "fine"), HOSTS)
@in_loop
async def test_host_header(tmp_path, host, fine):
    async with world(tmp_path) as w:
        for path in ("/healthz", "/api/threads", "/status", "/auth/x"):
            response = await w.ask(path, method="GET", headers={"Host": host})
            assert (response.status != 403) == fine, path
        assert len(w.amp.requests) == fine
        w.reload(**{"api-keys": ["k"]})
        response = await w.ask(
            "/status", method="GET", headers={"Host": "name.example", "X-Api-Key": "k"}
        )
        assert response.status == 200


SITES = [  # headers -> refused
    ({"Origin": "http://evil.example"}, True), ({"Origin": "https://evil.example"}, True), ({"Origin": "null"}, True),
    ({"Origin": "OWN"}, False), ({"Origin": "vscode-webview://abc", "Sec-Fetch-Site": "cross-site"}, False), ({"Sec-Fetch-Site": "cross-site"}, True),
    ({"Sec-Fetch-Site": "same-site"}, True), ({"Sec-Fetch-Site": "same-origin"}, False), ({"Sec-Fetch-Site": "none"}, False),
    ({"Sec-Fetch-Mode": "cors"}, False), ({"Origin": "http://127.0.0.1:1"}, True),
    ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, True),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "refused"), SITES)
@in_loop
async def test_other_web_sites(tmp_path, headers, refused):
    async with world(tmp_path) as w:
        headers = {k: w.url if v == "OWN" else v for k, v in headers.items()}
        for path, method in ((PATH, "POST"), ("/api/threads", "GET"), ("/healthz", "GET")):
            response = await w.ask(
                path, ASK if method == "POST" else None, method=method, headers=headers
            )
            assert (response.status == 403) == refused, path
        if refused:
            assert not w.amp.requests + w.claude.requests
            with pytest.raises(aiohttp.WSServerHandshakeError) as error:
                await w.http.ws_connect(w.url + "/actors/x", headers=headers)
            assert error.value.status == 403


@in_loop
async def test_a_refusal_does_not_wait_for_the_body(tmp_path):
    async with world(tmp_path) as w:
        head = f"POST {PATH} HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 1000000\r\n\r\n".encode()
        assert (await raw_exchange(w.port, head)).startswith(b"HTTP/1.1 403 ")


@in_loop
async def test_browser_paths_go_to_ampcode_without_a_key(tmp_path):
    async with world(tmp_path, **{"api-keys": ["s3cret"]}) as w:
        for path in (
            "/auth",
            "/auth/cli-login?authToken=ab%2Fc",
            "/threads/T-1",
            "/docs",
            "/settings/x?a=b",
        ):
            for method in ("GET", "HEAD"):
                response = await w.ask(
                    path,
                    method=method,
                    headers={"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Site": "cross-site"},
                )
                assert (response.status, response.headers["Location"]) == (302, w.amp.url + path)
        response = await w.ask("/auth?key=s3cret&a=b&auth_token=s3cret", method="GET")
        assert response.headers["Location"] == w.amp.url + "/auth?a=b"
        assert (
            await w.ask("/auth", method="GET", headers={"Sec-Fetch-Site": "cross-site"})
        ).status == 403
        for query in ("k%65y=s3cret", "key=Bearer+s3cret", "auth_token=%733cret"):
            response = await w.ask(f"/auth?{query}", method="GET")
            assert response.headers["Location"] == w.amp.url + "/auth"
        for path in ("/threadsX", "/threads.rss"):
            assert (await w.ask(path, method="GET")).status == 401
        assert (await w.ask("/auth", method="POST")).status == 401


@in_loop
async def test_management_for_localhost_looks_at_the_socket(tmp_path, monkeypatch):
    async with world(tmp_path, ampcode={"restrict-management-to-localhost": True}) as w:
        spoofed = {"X-Forwarded-For": "9.9.9.9", "X-Real-IP": "9.9.9.9"}
        assert (await w.ask("/api/threads", method="GET", headers=spoofed)).status == 200
        monkeypatch.setattr(ampproxy, "is_loopback", lambda host: False)  # as if from elsewhere
        for path in (
            "/api/threads",
            "/status",
            "/api/provider/../internal?x",
            "/api/provider/%2e%2e/internal",
        ):
            head = f"GET {path} HTTP/1.1\r\nHost: a\r\nX-Api-Key: k\r\n\r\n".encode()
            w.server.live.config["api-keys"] = ["k"]
            assert b" 403 " in (await raw_exchange(w.port, head)).splitlines()[0]
        assert (await w.ask("/v1/messages", ASK, headers={"X-Api-Key": "k"})).status == 200
    monkeypatch.undo()
    for peer, local in (
        ("127.0.0.1", 1),
        ("127.8.8.8", 1),
        ("::1", 1),
        ("::ffff:127.0.0.1", 1),
        ("10.0.0.1", 0),
        ("fe80::1", 0),
    ):
        assert ampproxy.is_loopback(peer) == bool(local)


@in_loop
async def test_probes_need_no_key_and_stay_here(tmp_path):
    async with world(tmp_path, **{"api-keys": ["k"]}) as w:
        assert (await w.ask_json("/healthz", method="GET"))[:2] == (200, {"status": "ok"})
        assert (await w.ask("/", method="HEAD")).status == 200
        assert (await w.ask("/api/hello", method="HEAD")).status == 404
        assert (await w.ask("/", method="GET")).status == 401
        assert not w.amp.requests


@in_loop
async def test_nothing_secret_in_the_log(tmp_path, capfd):
    async with world(
        tmp_path, ampcode={"upstream-api-key": "sgamp_upstreamsecret"}, debug=True
    ) as w:
        ampproxy.set_up_log(True, ())
        secret = {"Authorization": "Bearer sgamp_clientsecret", "Cookie": "session=cookiesecret"}
        body = {**ASK, "messages": [{"role": "user", "content": "promptsecret"}]}
        echo = answer_json(
            {"error": {"message": "sk-ant-oat-abcdefgh of fred@example.com, Bearer xyzsecret"}}, 403
        )
        w.claude.script = [
            echo,
            answer_json({"error": "no"}, 401),
            answer_json({"error": "no"}, 401),
        ]
        w.authority.usual = answer_json(
            {"error": "invalid_grant", "error_description": "sk-ant-ort-fred@example.com"}, 400
        )
        for path in (PATH, "/api/threads?key=querysecret", "/auth?authToken=tokensecret"):
            await w.ask(path, body, headers=secret)
        w.clock.now += 4000
        await w.ask(PATH, {**body, "model": "claude\r\nFAKE LINE"}, headers=secret)
        log = capfd.readouterr().err
        assert "LOCAL_PROVIDER" in log or "AMP_CREDITS" in log
        for word in ("secret", "fred@example.com", "sk-ant-oat-f", "sk-ant-ort-f", "Traceback"):
            assert word not in log, word
        assert "\nFAKE LINE" not in log


HARMLESS = [
    "/srv/cart_service/config.yaml is taken up", "/home/me/task-management/config.yaml", "no space on disk-image-volume",
    "part_number_12345678", "flask-application: import_settings", "sort_order_by_name",
]  # fmt: skip
BEFORE_SECRETS = [
    "", "key ", "key=", "key:", '"', "'", "(", "/", "-", "_", ".", "9", "Z", "\t", "%3D", "%3d", "%253D", "%253d",
    "\\n", "\\t", "\\x3d", "\\u003d", "Bearer ",
]  # fmt: skip
WHOLE_SECRETS = [
    "sk-ant-oat01-topsecret", "rt_topsecret01", "sgamp_user_topsecret", "ya29.topsecret", "AIzatopsecret",
    "eyJtopsecret.eyJx.y", "1//0topsecret", "GOCSPX-topsecret",
]  # fmt: skip


def test_the_log_masks_secrets_and_leaves_words():
    for text in HARMLESS:
        assert ampproxy.redact(text) == text
    for before in BEFORE_SECRETS:
        for secret in WHOLE_SECRETS:
            text = ampproxy.redact(f"it said {before}{secret}, twice: {before}{secret}")
            assert "topsecret" not in text, (before, secret)


# == Bad input =====================================================================================

DEEP = b'{"model": "claude-opus-4-6", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BAD_BODIES = [b"", b"not json", b"[]", b"5", b'{"model": "x"', b'{"model": "\xff"}', b"{}", b'{"model": 5}', b'{"model": ""}', DEEP,
              b'\xef\xbb\xbf{"model": "x"}', b'{"model": "x", "a": ' + b"9" * 10_000 + b"}", b'{"model": null}']  # fmt: skip


@pytest.mark.parametrize("body", BAD_BODIES, ids=range(len(BAD_BODIES)))
@pytest.mark.parametrize(
    "path", [PATH, "/v1/chat/completions", "/v1/responses", "/v1beta/models/m:generateContent"]
)
@in_loop
async def test_bad_bodies(tmp_path, body, path):
    if "v1beta" in path and body in BAD_BODIES[6:9] + BAD_BODIES[12:]:
        return  # there the path names the model
    async with world(tmp_path) as w:
        status, said, _ = await w.ask_json(path, body)
        assert status == 400
        assert said["error"]["message"]
        assert (said.get("type") == "error") == (path == PATH)
        assert ("status" in said["error"]) == ("v1beta" in path)
        assert not w.claude.requests + w.amp.requests
        assert (await w.ask("/v1/messages", ASK)).status == 200, "still well"


def post(path, length, body, extra=""):
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n{extra}\r\n".encode()
        + body
    )


@pytest.mark.parametrize("request_bytes", [
    post("/v1/messages", 500, json.dumps(ASK).encode()), post("/v1/messages", 500, b'{"mod'),
    b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"mod\r\n",
])  # fmt: skip
@in_loop
async def test_a_body_cut_short_is_sent_to_nobody(tmp_path, request_bytes):
    async with world(tmp_path) as w:
        await raw_exchange(w.port, request_bytes, half_close=True)
        assert not w.claude.requests + w.amp.requests
        assert (await w.ask("/v1/messages", ASK)).status == 200


@in_loop
async def test_a_body_that_goes_on_behind_its_length(tmp_path):
    async with world(tmp_path) as w:
        body = json.dumps(ASK).encode()
        got = await raw_exchange(w.port, post("/v1/messages", len(body), body + b"garbage\r\n\r\n"))
        assert re.match(rb"HTTP/1\.[01] 400 ", got)
        assert (await w.ask("/v1/messages", ASK)).status == 200


@pytest.mark.parametrize("chunked", [False, True])
@in_loop
async def test_65_mib(tmp_path, chunked):
    async with world(tmp_path) as w:

        async def much():
            for _ in range(65):
                yield b" " * (1 << 20)

        status, said, _ = await w.ask_json("/v1/messages", much() if chunked else b" " * (65 << 20))
        assert (status, said["error"]["type"]) == (413, "request_too_large")
        bomb = gzip.compress(b" " * (65 << 20))
        assert (
            await w.ask("/v1/messages", bomb, headers={"Content-Encoding": "gzip"})
        ).status == 413, "counted unpacked"
        assert (await w.ask("/v1/messages", ASK)).status == 200
        assert not w.amp.requests


@in_loop
async def test_expect_100_continue(tmp_path):
    async with world(tmp_path) as w:
        reader, writer = await asyncio.open_connection("127.0.0.1", w.port)
        body = json.dumps(ASK).encode()
        writer.write(post("/v1/messages", len(body), b"", "Expect: 100-continue\r\n"))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()


@in_loop
async def test_a_kept_connection_of_http_1_0_knows_where_an_answer_ends(tmp_path):
    async with world(tmp_path) as w:
        reader, writer = await asyncio.open_connection("127.0.0.1", w.port)
        body = json.dumps(ASK).encode()
        head = post("/v1/messages", len(body), body, "Connection: keep-alive\r\n")
        writer.write(head.replace(b"HTTP/1.1", b"HTTP/1.0"))
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        assert json.loads(await reader.readexactly(int(length[1]))) == message()
        writer.close()


@pytest.mark.parametrize("path", ["/v1/messages", "/api/stream"])
@in_loop
async def test_a_stream_of_http_1_0_ends_with_its_connection(tmp_path, path):
    """Although the client would keep it: nothing else says where the end is."""
    async with world(tmp_path) as w:
        w.claude.usual = w.amp.usual = (200, SSE, events())
        body = json.dumps(STREAM).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", w.port)
        head = post(path, len(body), body, "Connection: keep-alive\r\n")
        writer.write(head.replace(b"HTTP/1.1", b"HTTP/1.0"))
        got = await asyncio.wait_for(reader.read(), 5)
        assert got.endswith(b"\r\n\r\n" + b"".join(events()))
        assert b"keep-alive" not in got
        writer.close()


@pytest.mark.parametrize("head", [
    b"GET http://evil.example/status HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"CONNECT evil.example:443 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01 nonsense\r\n\r\n",
])  # fmt: skip
@in_loop
async def test_odd_targets(tmp_path, head):
    async with world(tmp_path) as w:
        assert re.match(rb"HTTP/1\.[01] 4\d\d ", await raw_exchange(w.port, head, half_close=False))
        assert not w.amp.requests


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/v1/messages", 404), ("GET", PATH, 200), ("GET", "/api/provider/cerebras/v1/tcp_warming", 200),
])  # fmt: skip
@in_loop
async def test_other_methods(tmp_path, method, path, status):
    async with world(tmp_path) as w:
        assert (await w.ask(path, method=method)).status == status
        assert len(w.amp.requests) == (status == 200)


@pytest.mark.parametrize("answer", [
    b"", b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: nine\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 200_000 + b"\r\n\r\n", b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
])  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/messages", "/api/threads"])
@in_loop
async def test_upstreams_that_answer_nonsense(tmp_path, answer, path):
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with (
        server,
        world(tmp_path, claude={"base-url": url}, ampcode={"upstream-url": url}) as w,
    ):
        if b"302" in answer and path == "/api/threads":
            assert (await w.ask(path, ASK)).status == 302
        elif b"900" in answer and path == "/api/threads":
            with pytest.raises(
                aiohttp.ClientError
            ):  # its first bytes may have passed: the end must be visible
                assert (await w.ask(path, ASK)).status == 502
                raise aiohttp.ClientError
        else:
            status, body, _ = await w.ask_json(path, ASK)
            assert status == 502
            assert (
                body["error"] == "amp_upstream_proxy_error" or body["error"]["type"] == "api_error"
            )
        assert (await w.ask("/healthz", method="GET")).status == 200


# == Faults ========================================================================================


class RawUpstream:
    """A server below HTTP: for each request it plays a list of parts, the last list for ever.

    A part is bytes, an Event to wait for, "close" or "reset"; without these the connection stays.
    """

    def __init__(self, *plays):
        self.plays, self.requests, self.broken = list(plays), [], asyncio.Event()
        self.connections = 0
        self.after, self.played = None, asyncio.Event()  # set when the part `after` is reached

    async def serve(self, reader, writer):
        self.connections += 1
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
                body = await reader.readexactly(int(length[1]) if length else 0)
                self.requests.append((head, body))
                for part in self.plays.pop(0) if len(self.plays) > 1 else self.plays[0]:
                    if part is self.after:
                        self.played.set()
                    await self.play(writer, part)
        self.broken.set()
        writer.close()

    async def play(self, writer, part):
        if isinstance(part, asyncio.Event):
            await part.wait()
        elif part in ("close", "reset"):
            linger = struct.pack("ii", part == "reset", 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.close()
        else:
            writer.write(part)
            await writer.drain()

    @asynccontextmanager
    async def open(self):
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()


@asynccontextmanager
async def raw_world(folder, *plays, **config):
    """A world whose Claude and ampcode.com are one RawUpstream."""
    raw = RawUpstream(*plays)
    async with raw.open():
        given = {"claude": {"base-url": raw.url}, "ampcode": {"upstream-url": raw.url}}
        async with world(folder, **given, **config) as w:
            w.raw = raw
            yield w


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


def plain(body, extra=b""):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n%b"
    return head % (extra, len(body), body)


CHUNKED = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)
WHOLE = b"".join(events()).replace(rb"\u00e9", "é".encode())
FIRST = events()[0]
INSIDE = WHOLE.index("é".encode()) + 1 - len(FIRST)  # the middle of a character, behind FIRST
GOOD = [CHUNKED + chunk(WHOLE) + b"0\r\n\r\n"]
UNSEEN = {  # what an upstream does before it has said anything
    "reset": ["reset"],
    "closed": ["close"],
    "reset in the headers": [CHUNKED[:40], "reset"],
    "closed in the headers": [CHUNKED[:40], "close"],
    "reset after the headers": [CHUNKED, "reset"],
    "reset in a chunk": [CHUNKED + b"ff\r\n" + FIRST[:20], "reset"],
    "reset in an event": [CHUNKED + chunk(FIRST[:20]), "reset"],
    "closed in an event": [CHUNKED + chunk(FIRST[:20]), "close"],
    "chunks without a length": [CHUNKED + b"zz\r\n\r\n"],
    "garbage": [b"\x00\xff\x80 garbage\r\n\r\n"],
    "garbage for an event": [CHUNKED + chunk(b"data: {{{\n\n") + b"0\r\n\r\n"],
    "two lengths": [plain(b"{}", b"Content-Length: 5\r\n"), "close"],
    "a negative length": [b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}", "close"],
    "a length that is too long": [plain(b"{}").replace(b": 2", b": 90"), "close"],
    "a length that is too short": [plain(b'{"id"') + b': "msg_1"}', "close"],
    "a header of 1 MB": [plain(b"{}", b"X-A: " + b"a" * (1 << 20) + b"\r\n")],
    "a thousand headers": [plain(b"{}", b"".join(b"X-%d: a\r\n" % n for n in range(1000)))],
    "another protocol": [b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"],
}  # fmt: skip


@pytest.mark.parametrize("name", UNSEEN)
@in_loop
async def test_what_breaks_unseen_costs_no_call(tmp_path, name):
    """Lost: nothing, when the next try is good; else one call, with a sentence."""
    async with raw_world(tmp_path, UNSEEN[name], GOOD) as w:
        response = await w.ask("/v1/messages", STREAM)
        assert (response.status, response.bytes) == (200, WHOLE)
        assert len(w.raw.requests) == 2
        assert resting(w) == {}
        w.raw.plays = [UNSEEN[name]]
        status, body, _ = await w.ask_json("/v1/messages", STREAM)
        assert (status, body["error"]["type"]) == (502, "api_error")
        assert len(w.raw.requests) == 5
        assert resting(w) == {"": 5}
        w.clock.now += 5
        w.raw.plays = [GOOD]
        assert (await w.ask("/v1/messages", STREAM)).bytes == WHOLE


@pytest.mark.parametrize("parts", [
    [chunk(b"x")[:-3], "reset"], [b"ff\r\n" + WHOLE[len(FIRST) :][:70], "reset"], ["reset"], ["close"], [chunk(b"")[:1], "close"],
    [chunk(WHOLE[len(FIRST) :][:70]), "reset"], [chunk(WHOLE[len(FIRST) :][:INSIDE]), "reset"],
    [b"ff\r\n" + WHOLE[len(FIRST) :][:INSIDE], "close"], [chunk(WHOLE[len(FIRST) :][:70]) + b"0\r\n\r\n"],
])  # fmt: skip
@in_loop
async def test_what_breaks_in_sight_loses_nothing_that_came(tmp_path, parts):
    seen = asyncio.Event()
    async with raw_world(tmp_path, [CHUNKED + chunk(FIRST), seen, *parts]) as w:
        async with w.http.post(w.url + PATH, json=STREAM) as response:
            assert await response.content.readuntil(b"\n\n") == FIRST
            seen.set()
            rest = await response.content.read()
        came = re.sub(rb"^[0-9a-f]+\r\n|\r\n(0\r\n\r\n)?$", b"", parts[0]) if parts[1:] else b""
        whole = came[: came.rfind(b"\n\n") + 2] if b"\n\n" in came else b""
        assert rest.startswith(whole)
        assert error_in(rest)["type"] == "api_error"
        assert len(w.raw.requests) == 1


@pytest.mark.parametrize("kind", [b"text/event-stream", b"application/json"])
@in_loop
async def test_a_chunk_that_is_none_is_an_end(tmp_path, kind):
    """The HTTP library closes such a connection, and tells nobody who waits for the next bytes."""
    quota = b"\r\nanthropic-ratelimit-unified-5h-utilization: 0.1\r\nT"
    seen, head = asyncio.Event(), CHUNKED.replace(b"text/event-stream", kind)
    async with raw_world(tmp_path, [head.replace(b"\r\nT", quota) + chunk(FIRST), seen, b"zz\r\n\r\n"],
                         streaming={"keepalive-seconds": 0.1}) as w:  # fmt: skip
        ask = asyncio.create_task(w.ask("/v1/messages", STREAM))
        while not w.server.pool.accounts[w.tokens[0]].quota:  # the head has come
            await asyncio.sleep(0)
        seen.set()
        response = await ask
        assert error_in(response.bytes)["type"] == "api_error"


@in_loop
async def test_each_event_passes_with_its_last_byte(tmp_path):
    """However slowly its bytes come; no event waits for the next one, and nobody gets a half."""
    rest = WHOLE[len(FIRST) :]
    gates = [asyncio.Event() for _ in rest]
    parts = [part for n, gate in enumerate(gates) for part in (gate, chunk(rest[n : n + 1]))]
    async with (
        raw_world(tmp_path, [CHUNKED + chunk(FIRST), *parts, b"0\r\n\r\n"]) as w,
        w.http.post(w.url + PATH, json=STREAM) as response,
    ):
        assert await response.content.readexactly(len(FIRST)) == FIRST
        for n, gate in enumerate(gates):
            gate.set()
            if rest[: n + 1].endswith(b"\n\n"):
                start = rest[:n].rfind(b"\n\n") + 2 if b"\n\n" in rest[:n] else 0
                assert await response.content.readuntil(b"\n\n") == rest[start : n + 1]
        assert await response.content.read() == b""


@pytest.mark.parametrize("parts", [[], [CHUNKED[:40]], [CHUNKED], [CHUNKED + b"9"]])
@in_loop
async def test_silence_before_the_first_byte_is_given_up(tmp_path, parts):
    silent = asyncio.Event()
    async with raw_world(tmp_path, [*parts, silent], streaming={"idle-timeout-seconds": 0.1}) as w:
        status, body, _ = await w.ask_json("/v1/messages", STREAM)
        assert (status, body["error"]["type"]) == (502, "api_error")
        assert len(w.raw.requests) == 3
        silent.set()


@pytest.mark.parametrize("line", [b"X-A: " + b"a" * 65000, b"a" * 65000, b"X-A: a\r\n" * 8000])
@pytest.mark.parametrize("path", ["/v1/messages", "/api/threads"])
@in_loop
async def test_headers_without_an_end_are_cut(tmp_path, line, path):
    async with raw_world(tmp_path, [b"HTTP/1.1 200 OK\r\n", *[line] * 1000]) as w:
        status, *_ = await w.ask_json(path, STREAM)
        assert status == 502
        await w.raw.broken.wait()
        assert len(w.raw.requests) == (3 if path == "/v1/messages" else 1)


@pytest.mark.parametrize("packed", [False, True])
@in_loop
async def test_an_answer_without_an_end_is_cut(tmp_path, packed):
    """Memory stays bounded; 2 GB would come."""
    head = CHUNKED.replace(b"text/event-stream", b"application/json")
    if packed:
        head = head[:-2] + b"Content-Encoding: gzip\r\n\r\n" + chunk(GZIP)
    piece, begun = (bomb(), 16) if packed else (b" " * (1 << 20), 2000)
    async with raw_world(tmp_path, [head, *[chunk(piece)] * begun], **{"request-retry": 1}) as w:
        status, body, _ = await w.ask_json("/v1/messages", ASK)
        assert (status, "no whole answer" in body["error"]["message"]) == (413, True)
        await w.raw.broken.wait()
        assert not resting(w)


@in_loop
async def test_connections_that_close_after_each_answer_cost_nothing(tmp_path):
    """100 calls on connections that are closed just when they could be used again."""
    async with raw_world(tmp_path, [plain(json.dumps(message()).encode()), "close"]) as w:
        for path in ("/v1/messages", "/api/threads"):
            answers = [(await w.ask(path, ASK)).status for _ in range(50)]
            assert answers == [200] * 50
        assert len(w.raw.requests) == 100, "none was sent twice"


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("end", ["close", "reset"])
@in_loop
async def test_what_may_have_been_done_is_not_done_again(tmp_path, method, end):
    """A connection that is in use again dies with the request: only a GET has no more to lose."""
    good, body = [plain(b'{"n": 1}')], None if method == "GET" else b"x" * 1000
    async with raw_world(tmp_path, good, [end], good) as w:
        assert (await w.ask("/api/threads", body, method=method)).status == 200
        status, *_ = await w.ask_json("/api/threads", body, method=method)
        assert (status, len(w.raw.requests)) == ((200, 3) if method == "GET" else (502, 2))
        assert {body for _, body in w.raw.requests} == {body or b""}, "no body is cut"


# -- The lean way: model calls over the connector alone --


@pytest.mark.parametrize(
    "before",
    [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 3],
)
@in_loop
async def test_what_comes_before_the_answer_is_none(tmp_path, before):
    async with raw_world(tmp_path, [before + GOOD[0]]) as w:
        for _ in range(2):
            assert (await w.ask("/v1/messages", STREAM)).bytes == WHOLE
        assert (w.raw.connections, len(w.raw.requests)) == (1, 2)


@in_loop
async def test_a_connection_is_used_again(tmp_path):
    async with raw_world(tmp_path, [plain(json.dumps(message()).encode())]) as w:
        for _ in range(30):
            assert (await w.ask("/v1/messages", ASK)).status == 200
        assert (w.raw.connections, len(w.raw.requests)) == (1, 30)
        answers = await asyncio.gather(*(w.ask("/v1/messages", ASK) for _ in range(30)))
        assert {answer.status for answer in answers} == {200}
        assert w.raw.connections <= 30
        assert not w.server.net.connector._acquired


@in_loop
async def test_the_head_that_an_upstream_gets(tmp_path):
    """Each header once, the length of the body, and nothing of the hop."""
    async with raw_world(tmp_path, GOOD) as w:
        headers = {"Expect": "100-continue", "TE": "trailers", "Anthropic-Version": "2023-06-01"}
        assert (await w.ask("/v1/messages?beta=true", STREAM, headers=headers)).status == 200
        (head, body), lines = w.raw.requests[0], w.raw.requests[0][0].decode().split("\r\n")
        assert lines[:2] == ["POST /v1/messages?beta=true HTTP/1.1", f"Host: {w.raw.url[7:]}"]
        names = [line.partition(":")[0].lower() for line in lines[1:-2]]
        assert len(set(names)) == len(names)
        assert not {"expect", "te", "transfer-encoding", "connection"} & set(names)
        assert f"\r\ncontent-length: {len(body)}\r\n" in head.decode().lower()


@in_loop
async def test_a_header_of_ones_own_counts_in_any_case(tmp_path):
    """It takes the place of the row's, for clients of all dialects."""
    async with raw_world(tmp_path, GOOD) as w:
        own = {"Anthropic-Version": "2024-01-01", "X-Mine": "1", "x-mine": "2"}
        w.reload(claude={"base-url": w.raw.url, "headers": own})
        for path in ("/v1/messages", "/v1/chat/completions"):
            assert (await w.ask(path, STREAM)).status == 200
            head = w.raw.requests[-1][0].lower()
            assert re.findall(rb"\r\nanthropic-version: (.+)\r", head) == [b"2024-01-01"]
            assert re.findall(rb"\r\nx-mine: (.+)\r", head) == [b"2"]


@pytest.mark.parametrize("remainder", [b"HTTP/1.1 408 Request Timeout\r\nX-A: b", b"H", b"\r\n"])
@in_loop
async def test_half_a_head_on_a_kept_connection(tmp_path, remainder):
    """Is a remainder as a whole one is: the connection is not used again."""
    gate = asyncio.Event()
    async with raw_world(tmp_path, [*GOOD, gate, remainder], GOOD) as w:
        assert (await w.ask("/v1/messages", STREAM)).status == 200
        gate.set()
        await asyncio.sleep(0.05)
        assert (await w.ask("/v1/messages", STREAM)).bytes == WHOLE
        assert w.raw.connections == 2


@pytest.mark.parametrize(("retries", "status"), [(1, 502), (2, 502), (3, 200)])
@pytest.mark.parametrize("end", ["close", "reset"])
@in_loop
async def test_a_kept_connection_that_dies_under_a_call(tmp_path, end, retries, status):
    """What may have been sent is asked again as often as request-retry says, and no more."""
    async with raw_world(tmp_path, GOOD, [end], [end], GOOD, **{"request-retry": retries}) as w:
        assert (await w.ask("/v1/messages", STREAM)).status == 200
        assert (await w.ask("/v1/messages", STREAM)).status == status
        assert len(w.raw.requests) == 1 + retries


@pytest.mark.parametrize("end", ["close", "reset"])
@in_loop
async def test_a_port_forwarded_to_nobody(tmp_path, end):
    """It takes connections and ends them at once: each try is one, and many calls end alike."""
    seen = []

    def listen(listener):
        with suppress(OSError):
            while True:
                connection = listener.accept()[0]
                seen.append(connection.fileno())
                if end == "reset":
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                connection.close()

    with socket.create_server(("127.0.0.1", 0), backlog=500) as listener:
        thread = threading.Thread(target=listen, args=[listener], daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = {"request-retry": 1, "max-retry-interval": 0, "claude": {"base-url": url}}
        async with world(tmp_path, ampcode={"fallback": "never"}, **config) as w:
            calls = [w.ask("/v1/messages", ASK) for _ in range(50)]
            assert {response.status for response in await asyncio.gather(*calls)} <= {429, 502}
            assert 0 < len(seen) <= 50
            assert not w.server.net.connector._acquired
        listener.shutdown(socket.SHUT_RDWR)


class EarlyUpstream(asyncio.Protocol):
    """Says something after the head, and reads no more of the body for a while."""

    def __init__(self, seen, says):
        self.seen, self.says = seen, says

    def connection_made(self, transport):
        self.transport, self.size, self.paused = transport, 0, asyncio.Event()
        self.gone = asyncio.Event()
        self.seen.append(self)

    def data_received(self, data):
        self.size += len(data)
        if not self.paused.is_set():
            self.paused.set()
            self.transport.pause_reading()
            self.transport.write(self.says)

    def connection_lost(self, error):
        self.gone.set()


@asynccontextmanager
async def early_world(folder, says):
    seen, loop = [], asyncio.get_running_loop()
    server = await loop.create_server(lambda: EarlyUpstream(seen, says), "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with world(folder, claude={"base-url": url}) as w:
        yield w, seen
    server.close()


def open_files():
    return len(list(Path("/dev/fd").iterdir()))


LONG_PROMPT = {**STREAM, "messages": [{"role": "user", "content": "x" * 20_000_000}]}


@in_loop
async def test_an_answer_before_the_end_of_the_prompt(tmp_path):
    """It reaches the client; the connection, on which a part of the prompt is, no other call."""
    async with early_world(tmp_path, b"".join(GOOD)) as (w, seen):
        for count in (1, 2, 3):
            assert (await w.ask("/v1/messages", LONG_PROMPT)).bytes == WHOLE
            assert len(seen) == count
        assert not w.server.net.connector._acquired
        assert not w.server.net.connector._conns
        for upstream in seen:
            upstream.transport.resume_reading()
            await upstream.gone.wait()
            assert upstream.size < 20_000_000, "the rest is not sent"


@pytest.mark.parametrize("says", [b"", CHUNKED + chunk(FIRST)])
@in_loop
async def test_who_leaves_while_the_prompt_goes_up(tmp_path, says):
    """Nobody pays for the rest of it."""
    async with early_world(tmp_path, says) as (w, seen):
        asked = asyncio.create_task(w.ask("/v1/messages", LONG_PROMPT))
        while not seen:
            await asyncio.sleep(0)
        await seen[0].paused.wait()
        asked.cancel()
        while w.server.net.connector._acquired:
            await asyncio.sleep(0)
        seen[0].transport.resume_reading()
        await seen[0].gone.wait()
        assert seen[0].size < 20_000_000


@pytest.mark.parametrize("token", ["a\nX-Evil: 1", "a\r\n\r\nGET /", "a\0b"])
@in_loop
async def test_no_token_begins_another_header(tmp_path, token):
    async with world(tmp_path) as w:
        w.server.pool.accounts[w.tokens[0]].token["access_token"] = token
        status, body, _ = await w.ask_json("/v1/messages", ASK)
        assert (status, body["error"]["type"]) == (502, "api_error")
        assert "line break" in body["error"]["message"]
        assert token not in json.dumps(body)
        assert w.claude.requests == []


TEST_KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg8xTI39dFeg9/++h2
lxzJmcyV3DwRblsGlYCeeZ2kn3ehRANCAARA85TAggfanAoYZ1TXzlsFJa+5doG+
4oABm6rE4T4u4wdF1BP41ErtkJ7LdT1lJBmwWTqR/Pf3AObOqlCv5ckM
-----END PRIVATE KEY-----
"""
TEST_CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBmjCCAUGgAwIBAgIUZSlkcXAcjk8FIU/raONsK1yrplUwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyOTEwNTk1OFoYDzIxMjYxMTA1
MTA1OTU4WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARA85TAggfanAoYZ1TXzlsFJa+5doG+4oABm6rE4T4u4wdF1BP41Ert
kJ7LdT1lJBmwWTqR/Pf3AObOqlCv5ckMo28wbTAdBgNVHQ4EFgQU722MGEPOit0j
Ckp8BZ55QDOKUWEwHwYDVR0jBBgwFoAU722MGEPOit0jCkp8BZ55QDOKUWEwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDRwAwRAIgXxHB7/BSe//AY7tWFomRZc47ZDN5uE8NpyJI75sDiXwCIH4L
59PaSI/UQzTpBEWKhoZmPEhybtTg9uyvUNHAZ/ZJ
-----END CERTIFICATE-----
"""  # for localhost and 127.0.0.1, of this test alone


def server_tls(folder):
    for name, text in (("key", TEST_KEY), ("certificate", TEST_CERTIFICATE)):
        (folder / name).write_text(text)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "certificate", folder / "key")
    return context


@in_loop
async def test_a_client_that_leaves_a_prompt_over_tls(tmp_path):
    """Nobody waits for an upstream that takes none of it to say goodbye."""
    seen, loop = [], asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: EarlyUpstream(seen, b""), "127.0.0.1", 0, ssl=server_tls(tmp_path)
    )
    url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
    async with world(tmp_path, claude={"base-url": url}) as w:
        w.server.net.connector._ssl = ssl.create_default_context(cadata=TEST_CERTIFICATE)
        asking = asyncio.create_task(w.ask("/v1/messages", LONG_PROMPT))
        while not seen:
            await asyncio.sleep(0.02)
        await seen[0].paused.wait()
        files = open_files()
        asking.cancel()
        async with asyncio.timeout(3):
            while open_files() > files - 3:  # both ends of the client's connection, and ours
                await asyncio.sleep(0.05)
    server.close()


@in_loop
async def test_model_calls_over_tls(tmp_path):
    """A certificate that nobody vouches for is refused; one that is trusted serves, and is kept."""
    raw = RawUpstream(GOOD)
    server = await asyncio.start_server(raw.serve, "127.0.0.1", 0, ssl=server_tls(tmp_path))
    url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
    async with world(tmp_path, claude={"base-url": url}) as w:
        status, body, _ = await w.ask_json("/v1/messages", STREAM)
        assert (status, "certificate is not trusted" in body["error"]["message"]) == (502, True)
        assert raw.requests == []
        trusting = ssl.create_default_context(cadata=TEST_CERTIFICATE)
        w.server.net.connector._ssl = trusting
        w.server.net.origins.clear()
        w.clock.now += 1000
        for _ in range(3):
            assert (await w.ask("/v1/messages", STREAM)).bytes == WHOLE
        assert len(raw.requests) == 3
    server.close()


@in_loop
async def test_two_thousand_leavers_leave_no_connection_behind(tmp_path):
    """At every moment of a call: while it connects, asks, waits for the head, reads, and at its end."""
    steps = 0

    async def slow(request):
        response = web.StreamResponse(headers=SSE)
        await response.prepare(request)
        with suppress(ConnectionError):
            for part in events():
                await asyncio.sleep(0)
                await response.write(part)
        return response

    async with world(tmp_path) as w:
        w.claude.usual = slow
        while steps < 2000:
            asked = [asyncio.create_task(w.ask("/v1/messages", STREAM)) for _ in range(50)]
            for task in asked:
                for _ in range(steps % 37):
                    await asyncio.sleep(0)
                task.cancel()
                steps += 1
            await asyncio.gather(*asked, return_exceptions=True)
        account = w.server.pool.accounts[w.tokens[0]]
        while account.in_flight or w.server.net.connector._acquired:
            await asyncio.sleep(0)
        assert (account.rests, account.counts["errors"]) == ({}, 0)
        assert sum(map(len, w.server.net.connector._conns.values())) <= 50
        assert len(asyncio.all_tasks()) <= 101  # one a kept connection, of the two servers
        assert (await w.ask("/v1/messages", STREAM)).status == 200


@pytest.mark.parametrize(
    "end", [b"data: [DONE]\n\n", event("message_stop"), event("ping") + event("message_stop")]
)
@in_loop
async def test_the_end_of_one_try_is_not_that_of_the_next(tmp_path, end):
    """An answer that is nothing but its end is none; the next one goes on after its first event."""
    seen, rest = asyncio.Event(), chunk(WHOLE[len(FIRST) :]) + b"0\r\n\r\n"
    plays = (
        [CHUNKED + chunk(end) + b"0\r\n\r\n"],
        [CHUNKED + chunk(FIRST), seen, rest],
    )
    async with (
        raw_world(tmp_path, *plays) as w,
        w.http.post(w.url + PATH, json=STREAM) as response,
    ):
        assert await response.content.readexactly(len(FIRST)) == FIRST
        seen.set()
        assert FIRST + await response.content.read() == WHOLE


HOW_CALLS_END = {
    "in sight": [CHUNKED + chunk(FIRST) + b"ff\r\nabc", "reset"],
    "never": GOOD[:],
    **UNSEEN,
}


@pytest.mark.parametrize("name", HOW_CALLS_END)
@in_loop
async def test_a_call_that_is_over_waits_for_no_collection(tmp_path, name):
    """However it ended, its prompt goes with it."""
    async with raw_world(tmp_path, HOW_CALLS_END[name]) as w:
        await w.ask("/v1/messages", STREAM)
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                w.clock.now += 4000
                await w.ask("/v1/messages", STREAM)
            for _ in range(20):  # what has been told to the client comes to its end
                await asyncio.sleep(0)
            kinds = (ampproxy.Call, ampproxy.Delivery, ampproxy.Prepared)
            assert not [kept for kept in gc.get_objects() if isinstance(kept, kinds)]
        finally:
            gc.enable()


@in_loop
async def test_large_prompts_take_turns():
    """Others go on between two turns; who leaves, or fails, does not keep the turn."""
    turns, done = ampproxy.Turns(), []
    turns.calls = 3

    async def small():
        while done.count("large") < 3:
            done.append("small")
            await asyncio.sleep(0)

    others = asyncio.create_task(small())
    await asyncio.gather(*(turns.take(lambda: done.append("large")) for _ in range(3)))
    await others
    where = [index for index, word in enumerate(done) if word == "large"]
    assert all(later - earlier > 1 for earlier, later in itertools.pairwise(where))
    leaver = asyncio.create_task(turns.take(done.clear))
    await asyncio.sleep(0)
    leaver.cancel()
    with pytest.raises(ZeroDivisionError):
        await turns.take(lambda: 1 / 0)
    assert (await turns.take(lambda: 5), turns.lock.locked()) == (5, False)
    assert done, "the leaver's work is not done"


@in_loop
async def test_a_large_prompt_alone_waits_for_nobody(tmp_path):
    body = {**ASK, "messages": [{"role": "user", "content": "x" * 2_000_000}]}
    slept = []
    async with world(tmp_path) as w:
        real = asyncio.sleep
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio, "sleep", lambda *args: slept.append(args) or real(*args))
            assert (await w.ask("/v1/messages", body)).status == 200
        assert (slept, w.server.turns.calls) == ([], 0)
        assert (await w.ask("/v1/messages", b"{" + b" " * 2_000_000)).status == 400
        assert (w.server.turns.lock.locked(), w.server.turns.calls) == (False, 0)


class Leaving:
    """An upstream that begins an answer, or not, and notices that nobody waits for it any longer."""

    def __init__(self, *said):
        self.said, self.came, self.gone = said, asyncio.Event(), asyncio.Event()

    async def __call__(self, request):
        response = web.StreamResponse(headers=SSE)
        try:
            if self.said:
                await response.prepare(request)
                await response.write(b"".join(self.said))
            self.came.set()
            await asyncio.Event().wait()
        finally:
            self.gone.set()


@pytest.mark.parametrize("path", ["/v1/messages", "/api/threads"])
@pytest.mark.parametrize("said", [(), (FIRST,), (FIRST[:9],)])
@in_loop
async def test_a_client_that_leaves_frees_the_upstream(tmp_path, path, said):
    async with world(tmp_path) as w:
        w.claude.usual = w.amp.usual = upstream = Leaving(*said)
        ask = asyncio.create_task(w.ask(path, STREAM))
        await upstream.came.wait()
        ask.cancel()
        await upstream.gone.wait()
        account = w.server.pool.accounts[w.tokens[0]]
        while account.in_flight:
            await asyncio.sleep(0)
        assert (account.rests, account.counts["errors"]) == ({}, 0)
        w.claude.usual = answer_json(message())
        assert (await w.ask("/v1/messages", ASK)).status == 200


@pytest.mark.parametrize("path", ["/v1/messages", "/api/threads"])
@pytest.mark.parametrize("size", [0, 20, -20])
@in_loop
async def test_a_client_that_leaves_half_way_in_harms_nobody(tmp_path, path, size):
    """In the head, behind it and in the body; what comes next on the same upstream is whole."""
    body = json.dumps(STREAM).encode()
    sent = post(path, len(body), body)
    head = len(sent) - len(body)
    async with world(tmp_path) as w:
        for _ in range(20):
            _, writer = await asyncio.open_connection("127.0.0.1", w.port)
            writer.write(sent[: head if size == 0 else size])
            await writer.drain()
            writer.transport.abort()
            assert (await w.ask(path, ASK)).status == 200
        assert not w.claude.requests if path == "/api/threads" else not w.amp.requests
        got = [json.loads(r.bytes) for r in w.claude.requests + w.amp.requests]
        assert len(got) == 20
        assert {len(b["messages"]) for b in got} == {1}


@in_loop
async def test_half_a_body_may_wait(tmp_path):
    """50 clients stop in the middle: others are served meanwhile, and they are when they go on."""
    body = json.dumps(ASK).encode()
    async with world(tmp_path) as w:
        slow = [await asyncio.open_connection("127.0.0.1", w.port) for _ in range(50)]
        for _, writer in slow:
            writer.write(post("/v1/messages", len(body), body[:20]))
        assert (await w.ask("/v1/messages", ASK)).status == 200
        assert len(w.claude.requests) == 1
        for reader, writer in slow:
            writer.write(body[20:])
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            writer.close()
        assert len(w.claude.requests) == 51


class Fountain:
    """An answer without an end; `sent` tells how far it has come."""

    sent = 0

    async def __call__(self, request):
        response = web.StreamResponse(headers=SSE)
        await response.prepare(request)
        await response.write(FIRST)
        while True:
            self.sent += 1 << 16
            await response.write(event("ping", fill="x" * (1 << 16)))


@pytest.mark.parametrize("path", ["/v1/messages", "/api/threads"])
@in_loop
async def test_a_slow_reader_slows_its_upstream_and_nobody_else(tmp_path, path):
    async with world(tmp_path) as w:
        w.http._connector._limit = 0
        w.claude.usual = w.amp.usual = fountain = Fountain()
        reader, writer = await asyncio.open_connection("127.0.0.1", w.port, limit=1)
        body = json.dumps(STREAM).encode()
        writer.write(post(path, len(body), body))
        assert await reader.readexactly(1)
        w.claude.usual, rounds, before = (200, SSE, [WHOLE]), 0, -1
        while before != fountain.sent:
            before, rounds = fountain.sent, rounds + 1
            asks = [w.ask("/v1/messages", STREAM) for _ in range(200)]
            assert {a.bytes for a in await asyncio.gather(*asks)} == {WHOLE}
            assert await reader.readexactly(1), "a byte a round"
            assert fountain.sent < 64 << 20, "it is what the sockets hold, no more"
        writer.transport.abort()


@pytest.mark.parametrize("leaves", [False, True])
@in_loop
async def test_a_connection_that_has_ended_waits_for_no_collection(tmp_path, leaves):
    """It goes with all that it holds, whether its client had an answer or left in the middle."""
    async with world(tmp_path) as w:
        w.claude.usual = upstream = Leaving(FIRST) if leaves else answer_json(message())
        body = json.dumps(STREAM if leaves else ASK).encode()
        gc.collect()
        gc.disable()
        try:
            reader, writer = await connect_and_send(w.port, post("/v1/messages", len(body), body))
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            await reader.readuntil(FIRST if leaves else b'"hi"')
            known = [weakref.ref(o) for o in gc.get_objects() if type(o) is ampproxy.Connection]
            writer.transport.abort()
            if leaves:
                await upstream.gone.wait()
            assert len(known) == 1
            async with asyncio.timeout(2):
                while known[0]():
                    await asyncio.sleep(0.01)
        finally:
            gc.enable()


@pytest.fixture
def many_files():
    """Room for some thousand connections, if the machine allows them."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 6000:
        pytest.skip("fewer than 6,000 files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 6000), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@in_loop
async def test_two_thousand_idle_connections(tmp_path, many_files):
    async with world(tmp_path) as w:
        idle = []
        for _ in range(20):
            opened = [asyncio.open_connection("127.0.0.1", w.port) for _ in range(100)]
            idle += await asyncio.gather(*opened)
        assert (await w.ask("/v1/messages", ASK)).status == 200
        for reader, writer in idle[::100]:
            writer.write(HEALTH)
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        for _, writer in idle:
            writer.transport.abort()
        assert (await w.ask("/v1/messages", ASK)).status == 200


@asynccontextmanager
async def running(tmp_path, usual, files=0, script=(str(SCRIPT),), kinds=("claude",), **token):
    """The program as a process of its own, ready, with one account; its Claude and its address.

    `kinds`: those whose logins ask that Claude, too.
    """
    fake, port = FakeUpstream(usual), free_port()
    async with fake.open():
        times = {"expired": "2099-01-01T00:00:00Z", "last_refresh": "2026-01-01T00:00:00Z"}
        fake.token = token_file(tmp_path / "auth", **{**times, **token})
        urls = {"base-url": fake.url, "token-url": fake.url + "/token"}
        config = {"auth-dir": str(tmp_path / "auth"), "port": port, "providers": dict.fromkeys(kinds, urls),
                  "ampcode": {"upstream-url": fake.url}, "request-retry": 1,
                  "max-cooldown": 1, "max-retry-interval": 1}  # fmt: skip
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        with Cli(tmp_path, files=files, script=script) as cli:
            await cli.until(f"http://127.0.0.1:{port}", "stderr")
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as cli.http:
                cli.http.connector._limit, cli.port, cli.claude = 0, port, fake

                async def ask():
                    async with cli.http.post("/v1/messages", json=ASK) as answer:
                        await answer.read()
                        return answer.status, answer.headers["x-ampproxy-route"]

                cli.ask = ask
                yield cli


def test_all_commands_but_the_server_stay_scripts():
    assert {"serve", *ampproxy.SHORT_COMMANDS} == set(ampproxy.COMMANDS)


@pytest.mark.parametrize(
    "name", ["ampproxy.py", "my-proxy.py", "amp.proxy.py", "ampproxy", "time.py", ".py"]
)
@in_loop
async def test_a_server_goes_on_as_a_module_of_itself(tmp_path, name):
    """In the same process, with the same words; what lies in the folder it was started in is not
    taken for a library.  Under a name that no module has, or another one, it stays a script.
    """
    (tmp_path / "bin").mkdir()
    script = shutil.copy(SCRIPT, tmp_path / "bin" / name)
    for library in ("uuid", "aiohttp", "ampproxy", "importlib"):
        (tmp_path / f"{library}.py").write_text("raise SystemExit('the wrong one')")
    flags = ("-X", "faulthandler", str(script))
    async with running(tmp_path, answer_json(message()), script=flags) as cli:
        assert await cli.ask() == (200, "local")
        with suppress(OSError):  # not on a Mac
            words = Path(f"/proc/{cli.process.pid}/cmdline").read_text().split("\0")
            assert [word for word in words if word != "-P"][1:3] == ["-X", "faulthandler"]
            assert str(script) in words
            assert ("-c" in words) == (name in ("ampproxy.py", "my-proxy.py"))
        cli.process.send_signal(signal.SIGTERM)
        assert (await cli.end())[0] == 0


def test_a_program_that_runs_the_script_keeps_it(tmp_path):
    """It would be started anew with what is none of its own words."""
    (tmp_path / "config.yaml").write_text("port: x")
    runs = f"runpy.run_path({str(SCRIPT)!r}, None, '__main__')"
    command = [sys.executable, "-c", f"import runpy, sys; sys.argv = ['x']; {runs}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, "expected a whole number" in done.stderr) == (1, True)


WORD = "hé".encode()  # the only one
EARLY = WHOLE[: WHOLE.index(b"event: content_block_stop")]
LATE = WHOLE[len(EARLY) :]
CHAT_STREAM = {"model": ASK["model"], "messages": ASK["messages"], "stream": True}


def told_in_chat(raw):
    """The text of a Chat stream, and whether it has its end."""
    return "".join(text_of("chat", event) for event in data_of(raw)), raw.endswith(
        b"data: [DONE]\n\n"
    )


@in_loop
async def test_sigterm_lets_a_hundred_streams_end(tmp_path):
    """Half of them are translated."""
    gate = asyncio.Event()
    async with running(tmp_path, (200, SSE, [EARLY, gate, LATE])) as cli:
        asks = [cli.http.post("/v1/messages", json=STREAM) for _ in range(50)]
        asks += [cli.http.post("/v1/chat/completions", json=CHAT_STREAM) for _ in range(50)]
        streams = await asyncio.gather(*asks)
        heads = [await stream.content.readuntil(WORD) for stream in streams]
        cli.process.send_signal(signal.SIGTERM)
        await cli.until("stopping", "stderr")
        gate.set()
        rests = await asyncio.gather(*(stream.content.read() for stream in streams))
        whole = [head + rest for head, rest in zip(heads, rests, strict=True)]
        assert set(whole[:50]) == {WHOLE}, "none is lost"
        assert {told_in_chat(raw) for raw in whole[50:]} == {("hé", True)}
        status, *_ = await cli.end()
        assert status == 0


linux = pytest.mark.skipif(sys.platform != "linux", reason="limits of another process: Linux only")


@contextmanager
def limited(cli, kind, most):
    """Less of something for a process that runs."""
    resource = pytest.importorskip("resource")
    kind = getattr(resource, f"RLIMIT_{kind}")
    before = resource.prlimit(cli.process.pid, kind)
    resource.prlimit(cli.process.pid, kind, (most, before[1]))
    yield
    resource.prlimit(cli.process.pid, kind, before)


@linux
@in_loop
async def test_a_full_disk_during_a_refresh_loses_no_token(tmp_path):
    """No file may grow: the call is answered, the old file stays whole, the token follows later."""

    async def serve(request):
        token = request.path == "/token"
        return web.json_response(NEW_TOKEN if token else message())

    async with running(tmp_path, serve, expired="2020-01-01T00:00:00Z") as cli:
        old = json.loads(cli.claude.token.read_text())
        # the refresh ahead of time may come first: it fails in the same way
        with limited(cli, "FSIZE", 10):
            async with cli.http.post("/v1/messages", json=ASK) as answer:
                assert answer.status == 200
            await cli.until("cannot be saved", "stderr")
            assert json.loads(cli.claude.token.read_text()) == old
        while json.loads(cli.claude.token.read_text()) == old:
            await asyncio.sleep(0.01)
        new = json.loads(cli.claude.token.read_text())
        assert (new["refresh_token"], new["note"]) == ("sk-ant-ort-new", "kept")
        assert [r.path for r in cli.claude.requests].count("/token") == 1
        kept = [p.name for p in cli.claude.token.parent.iterdir() if p.suffix != ".lock"]
        assert kept == [cli.claude.token.name]


@linux
@in_loop
async def test_a_log_that_cannot_be_written_stops_nothing(tmp_path):
    """Standard error is a full disk, from the first line to the last."""
    async with running(tmp_path, answer_json(message())) as cli, aiohttp.ClientSession() as http:
        port = free_port()
        command = [
            "sh",
            "-c",
            'exec "$@" 2>/dev/full',
            "sh",
            *cli.process.args,
            "--port",
            str(port),
        ]
        silent = subprocess.Popen(command, env={**os.environ, "HOME": str(tmp_path)})
        try:
            while not await listens(port):
                assert silent.poll() is None
            for model in ("claude-opus-4-6", "unknown", "claude-opus-4-6"):
                body = {**ASK, "model": model}
                async with http.post(f"http://127.0.0.1:{port}/v1/messages", json=body) as answer:
                    assert answer.status == (404 if model == "unknown" else 200)
        finally:
            silent.kill()
            silent.wait()


async def listens(port):
    with suppress(OSError):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        return True
    return await asyncio.sleep(0.01)


@linux
@in_loop
async def test_no_file_left_is_an_error_with_words_and_passes(tmp_path):
    """All descriptors are taken: what needs none goes on, the rest hears why, and it passes."""
    async with running(tmp_path, answer_json(message())) as cli:
        assert await cli.ask() == (200, "local")
        used = len(list(Path(f"/proc/{cli.process.pid}/fd").iterdir()))
        with limited(cli, "NOFILE", used + 20):
            idle = [await asyncio.open_connection("127.0.0.1", cli.port) for _ in range(60)]
            said = await cli.until("Too many open files", "stderr")
            assert len(said.splitlines()) < 10, "once is enough"
            assert await cli.ask() == (200, "local"), "its connections are there"
            for _, writer in idle:
                writer.close()
            while await status_of(cli.port, HEALTH) != 200:  # until it has seen that they left
                await asyncio.sleep(0.01)


@in_loop
async def test_an_auth_directory_that_lost_its_write_bit_gets_it_back(tmp_path):
    async with world(tmp_path, tokens=()) as w:
        path = token_file(w.auth, expired="2020-01-01T00:00:00Z")
        w.auth.chmod(0o500)
        w.server.tick()
        assert (await w.ask("/v1/messages", ASK)).status == 200
        assert json.loads(path.read_text())["refresh_token"] == "sk-ant-ort-new"
        assert stat.S_IMODE(w.auth.stat().st_mode) == 0o700


@contextmanager
def as_nobody():
    """The rights of a user to whom nothing belongs."""
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="becomes another user")
@in_loop
async def test_a_directory_that_is_read_only_keeps_no_call_waiting(caplog):
    with tempfile.TemporaryDirectory() as folder:
        async with world(Path(folder), tokens=()) as w:
            path = token_file(w.auth, expired="2020-01-01T00:00:00Z")
            for place, mode in ((Path(folder), 0o755), (w.auth, 0o555), (path, 0o444)):
                place.chmod(mode)
            old = path.read_bytes()
            w.server.tick()
            with as_nobody():
                for _ in range(3):
                    assert (await w.ask("/v1/messages", ASK)).status == 200
                    w.server.tick()
            assert "cannot be saved" in caplog.text
            assert path.read_bytes() == old
            assert len(w.authority.requests) == 1, "the token is not asked for again"
            w.server.tick()
            assert json.loads(path.read_text())["refresh_token"] == "sk-ant-ort-new"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="becomes another user")
@in_loop
async def test_a_directory_that_cannot_be_read_for_a_while_takes_no_account_along(caplog):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        async with world(Path(folder)) as w:
            w.auth.chmod(0o700)
            with as_nobody():
                for _ in range(3):
                    w.server.tick()
                assert (await w.ask("/v1/messages", ASK)).status == 200
            assert caplog.text.count("Permission denied") == 1, "said once"


@in_loop
async def test_a_clock_that_steps_back_an_hour(tmp_path):
    """Rests, threads and tokens go on as they were; a refresh is neither stormed nor put off."""
    times = {"expired": "2027-01-15T09:00:00Z", "last_refresh": "2027-01-15T08:00:00Z"}
    async with world(tmp_path, tokens=()) as w:
        paths = [token_file(w.auth, name, **times) for name in FRIENDS[:2]]
        w.server.tick()
        headers = {"X-Amp-Thread-Id": "T-1"}
        w.claude.script = [limit(**{"Retry-After": "90"})]
        stayed = await answered_by(w, headers)
        w.clock.time = lambda: 1_800_000_000 - 3600 + w.clock.now
        assert await answered_by(w, headers) == stayed
        w.clock.now += 89
        assert {await answered_by(w) for _ in range(3)} == {stayed}, "one account still rests"
        w.clock.now += 2
        threads = [{"X-Amp-Thread-Id": f"T-{n}"} for n in range(2, 6)]
        assert {await answered_by(w, thread) for thread in threads} == {*FRIENDS[:2]}
        assert not w.authority.requests
        w.claude.script = [said(401)]  # by the authority's clock the token has ended
        assert (await w.ask("/v1/messages", ASK)).status == 200
        assert len(w.authority.requests) == 1
        w.clock.now += 2 * 3600  # the hour that was lost, and the token's own
        w.authority.usual = answer_json({**NEW_TOKEN, "access_token": "later"})
        w.server.tick()
        while any(a.refreshing for a in w.server.pool.accounts.values()):
            await asyncio.sleep(0)
        later = [json.loads(path.read_text())["access_token"] for path in paths]
        assert sorted(later) == ["later", "sk-ant-oat-new"]


# -- Faults of the rest: translated streams, Google's and ChatGPT's logins, `setup` --


@contextmanager
def nothing_written(how, monkeypatch, *paths):
    """No file can be written: the disk is full, or all is another user's."""
    if how == "a full disk":
        full = full_disk(monkeypatch)
        yield
        full.clear()
        return
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    with as_nobody():
        yield


FOUND = {"done": True, "response": {"cloudaicompanionProject": "proj-7"}}
ROTATED = {"access_token": "ya29.new", "refresh_token": "1//0new", "expires_in": 3599}


@pytest.mark.parametrize("how", ["a full disk", "no rights"])
@pytest.mark.parametrize(("form", "rotates"), [("flat", 1), ("nested", 1), ("flat", 0)])
@in_loop
async def test_what_google_gave_and_nobody_could_save(monkeypatch, caplog, form, rotates, how):
    """A rotated token, then a project: used at once, asked for once, saved when that can be."""
    if how == "no rights" and os.geteuid() != 0:
        pytest.skip("becomes another user")
    with tempfile.TemporaryDirectory() as folder:
        async with google_world(Path(folder)) as w:
            path = google_file(w.auth) if form == "flat" else cpa_file(w.auth)
            ends = {"expired": "2020-01-01T00:00:00Z"} if rotates else {}
            before = {**json.loads(path.read_text()), "project_id": "", **ends}
            path.write_text(json.dumps(before))
            Path(folder).chmod(0o755)
            w.authority.usual, fake = answer_json(ROTATED), w.gemini
            fake.setup = {
                "loadCodeAssist": [answer_json(TIERS)],
                "onboardUser": [answer_json(FOUND)],
            }
            with nothing_written(how, monkeypatch, w.auth, path):
                for _ in range(3):
                    w.server.tick()
                    assert (await w.ask(models_path(PRO), CONTENTS)).status == 200
                assert json.loads(path.read_text()) == before
            token = ROTATED if rotates else before
            sent = {
                (r.headers["Authorization"], json.loads(r.bytes)["project"]) for r in fake.requests
            }
            assert sent == {(f"Bearer {token['access_token']}", "proj-7")}
            asked = [w.authority.requests, *(fake.asked(verb) for verb in fake.setup)]
            assert [len(requests) for requests in asked] == [rotates, 1, 1]
            w.server.tick()
            saved = ampproxy.flat(json.loads(path.read_text()))
            names = ("access_token", "refresh_token")
            assert [saved[name] for name in names] == [token[name] for name in names]
            assert (saved["project_id"], saved["expired"] > "2027") == ("proj-7", True)
            assert [p.name for p in w.auth.iterdir() if p.suffix == ".tmp"] == []
    assert caplog.text.count("cannot be saved") == 1, "said once"


@pytest.mark.parametrize("how", ["a full disk", "no rights"])
@in_loop
async def test_a_chatgpt_token_that_nobody_could_save(monkeypatch, how):
    """Its refresh token is good once: the next one is asked for with the one that was not saved."""
    if how == "no rights" and os.geteuid() != 0:
        pytest.skip("becomes another user")
    with tempfile.TemporaryDirectory() as folder:
        async with codex_world(Path(folder), ()) as w:
            Path(folder).chmod(0o755)
            path = codex_file(w.auth, expired="2020-01-01T00:00:00Z", refresh_token="rt_0")
            w.server.tick()
            with nothing_written(how, monkeypatch, w.auth, path):
                for number in (1, 2):
                    given = {"access_token": f"tok_{number}", "refresh_token": f"rt_{number}"}
                    w.authority.usual = answer_json(
                        {**given, "expires_in": 3600, "id_token": id_token(plan="pro")}
                    )
                    assert (await w.ask(CODEX, QUESTION)).status == 200
                    w.server.tick()
                    assert w.codex.last.headers["Authorization"] == f"Bearer tok_{number}"
                    w.clock.now += 3600
                sent = [form_of(request)["refresh_token"] for request in w.authority.requests]
                assert sent == ["rt_0", "rt_1"]
            w.server.tick()
            saved = json.loads(path.read_text())
            assert (saved["access_token"], saved["refresh_token"]) == ("tok_2", "rt_2")
            assert saved["id_token"] == id_token(plan="pro")


@pytest.mark.parametrize("step", [-3600, 3600])
@pytest.mark.parametrize("kind", ["gemini", "antigravity"])
@in_loop
async def test_googles_rests_and_tokens_when_the_clock_steps(tmp_path, kind, step):
    """A rest goes on as it was told; a token that looks expired is refreshed once, and lives on."""
    times = {"expired": "2027-01-15T08:50:00Z", "last_refresh": "2027-01-15T08:00:00Z"}
    async with google_world(tmp_path, hosts=1) as w:
        path = google_file(
            w.auth, kind, **times, **({"timestamp": 1} if kind == "antigravity" else {})
        )
        w.server.tick()
        fake = w.gemini if kind == "gemini" else w.daily
        rests = w.server.pool.accounts[path].wait
        for model, told, length in (
            ("gemini-3-flash", {"retryDelay": "600s"}, 600),
            ("gemini-2.5-flash", {"quotaResetTimeStamp": "2027-01-15T08:15:00Z"}, 900),
        ):
            fake.script = [quota_error(**told)]
            assert (await w.ask(models_path(model), CONTENTS)).status == 429
            assert rests(model, w.clock.monotonic()) == pytest.approx(length)
        w.clock.time = lambda: 1_800_000_000 + step + w.clock.now
        asked = models_path("gemini-2.5-flash-lite")
        for _ in range(3):
            assert (await w.ask(asked, CONTENTS)).status == 200
            token = "new" if step > 0 else "fred@example.com"  # only forward it looks expired
            assert fake.last.headers["Authorization"] == f"Bearer ya29.{token}"
            w.server.tick()
        assert len(w.authority.requests) == (step > 0)
        for model, left in (("gemini-3-flash", 600), ("gemini-2.5-flash", 900)):
            assert rests(model, w.clock.monotonic()) == pytest.approx(left), (
                "whatever the clock says"
            )
        # a time of day is as good as the clock: past, or so far away that max-cooldown cuts it
        fake.script = [quota_error(quotaResetTimeStamp="2027-01-15T08:15:00Z")]
        assert (await w.ask(models_path("gemini-3-pro-preview"), CONTENTS)).status == 429
        length = 60 if step > 0 else 1800
        assert rests("gemini-3-pro-preview", w.clock.monotonic()) == pytest.approx(length)
        w.clock.now += 901
        for model in ("gemini-3-flash", "gemini-2.5-flash"):
            assert (await w.ask(models_path(model), CONTENTS)).status == 200
        # back at the right time: what was refreshed meanwhile says that it is good for too long
        w.clock.time = lambda: 1_800_000_000 + w.clock.now
        before = len(w.authority.requests)
        fake.script = [answer_json(NOBODY, 401)]
        w.authority.usual = answer_json({"access_token": "ya29.right", "expires_in": 3599})
        assert (await w.ask(asked, CONTENTS)).status == 200
        assert (await w.ask(asked, CONTENTS)).status == 200
        assert len(w.authority.requests) == before + 1
        token = json.loads(path.read_text())
        assert token["access_token"] == "ya29.right"
        assert ampproxy.parse_time(token["expired"]) == w.clock.time() + 3599


@linux
@in_loop
async def test_no_file_left_while_foreign_streams_run_and_a_project_is_looked_for(tmp_path):
    """The streams end whole, the login hears why and does not rest, and then its project is found."""
    gate = asyncio.Event()

    async def serve(request):
        if request.path.endswith(":loadCodeAssist"):
            return web.json_response({"cloudaicompanionProject": "proj-7"})
        if "/v1internal" in request.path:
            assert json.loads(request.bytes)["project"] == "proj-7"
            return web.json_response({"response": content()})
        response = web.StreamResponse(headers=SSE)
        await response.prepare(request)
        await response.write(EARLY)
        await gate.wait()
        await response.write(LATE)
        return response

    path = google_file(tmp_path / "auth", project_id="", expired="2099-01-01T00:00:00Z")
    async with running(tmp_path, serve, kinds=("claude", "gemini")) as cli:
        google = functools.partial(cli.http.post, models_path(PRO), json=CONTENTS)
        asks = [cli.http.post("/v1/chat/completions", json=CHAT_STREAM) for _ in range(10)]
        streams = await asyncio.gather(*asks)
        heads = [await stream.content.readuntil(WORD) for stream in streams]
        async with cli.http.get("/status"):  # a connection that is there
            pass
        taken = {int(path.name) for path in Path(f"/proc/{cli.process.pid}/fd").iterdir()}
        free = next(number for number in itertools.count() if number not in taken)
        with limited(cli, "NOFILE", free):
            idle = await asyncio.open_connection("127.0.0.1", cli.port)
            await cli.until("Too many open files", "stderr")
            async with google() as answer:
                assert (answer.status, "Too many open files" in await answer.text()) == (502, True)
            async with cli.http.get("/status") as answer:
                states = {row["state"] for row in (await answer.json())["accounts"]}
            assert states == {"ready"}, "it is this machine's fault"
            gate.set()
            for head, stream in zip(heads, streams, strict=True):
                assert told_in_chat(head + await stream.content.read()) == ("hé", True)
            idle[1].close()
        async with google() as answer:
            assert answer.status == 200
        assert json.loads(path.read_text())["project_id"] == "proj-7"


@pytest.mark.parametrize("leaves", [False, True])
@in_loop
async def test_sigterm_while_a_project_is_looked_for(tmp_path, leaves):
    """Who waits for it gets his answer, and it is kept; for nobody it is given up without a word."""
    gate, came = asyncio.Event(), asyncio.Event()

    async def serve(request):
        if request.path.endswith(":loadCodeAssist"):
            came.set()
            await gate.wait()
            return web.json_response({"cloudaicompanionProject": "proj-7"})
        return web.json_response({"response": content()})

    path = google_file(tmp_path / "auth", project_id="", expired="2099-01-01T00:00:00Z")
    async with running(tmp_path, serve, kinds=("gemini",)) as cli:
        ask = asyncio.create_task(cli.http.post(models_path(PRO), json=CONTENTS))
        await came.wait()
        if leaves:
            ask.cancel()
        cli.process.send_signal(signal.SIGTERM)
        await cli.until("stopping", "stderr")
        if not leaves:
            gate.set()
            async with await ask as answer:
                assert (answer.status, await answer.json()) == (200, content())
        status, _, err = await cli.end()
        assert (status, "Task" in err) == (0, False)
    assert json.loads(path.read_text())["project_id"] == ("" if leaves else "proj-7")


# A process that forks for each line it reads; the child sets a client up and kills itself when it is
# about to do something to a file for the so manieth time.
SETTER = """
import os, signal, sys
import ampproxy

def kill_at(count):
    def hook(event, args):
        nonlocal count
        writes = event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.chmod", "os.mkdir", "os.remove"):
            count -= 1
            if count < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

for line in sys.stdin:
    name, count = line.split()
    if (child := os.fork()) == 0:
        status = 9
        try:
            sys.stdout = open(os.devnull, "w")
            kill_at(int(count))
            status = ampproxy.main(["setup", name, "--config", sys.argv[1]])
        finally:
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_setup_that_is_killed_leaves_each_file_old_or_new(tmp_path, monkeypatch):
    """Before each thing it does to a file; set up again it is whole, and undone it is as it was."""
    home, run = client_home(tmp_path, monkeypatch, {})
    command = [sys.executable, "-c", SETTER, str(tmp_path / "config.yaml")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    env = {**os.environ, "HOME": str(home), "PYTHONPATH": str(HERE)}
    with subprocess.Popen(command, env=env, **pipes) as setter:
        for name, before in CLIENT_FILES.items():
            put_files(home, before)
            assert run("setup", name) == 0
            after = {path: text for path, text in tree(home).items() if path in before}
            assert all(after[path] != before[path] for path in before)
            for kill in itertools.count():
                put_files(home, before)
                setter.stdin.write(f"{name} {kill}\n")
                setter.stdin.flush()
                status = int(setter.stdout.readline())
                found = tree(home)
                for path, text in before.items():
                    assert found[path] in (text, after[path])
                    assert found.get(path + ampproxy.BACKUP, text) == text
                    assert found[path] == text or path + ampproxy.BACKUP in found
                modes = {stat.S_IMODE(p.stat().st_mode) for p in home.rglob("*") if p.is_file()}
                assert modes <= {0o600, 0o640}, "of drafts, too"
                if status == 0:
                    break
                assert status == -signal.SIGKILL
                assert run("setup", name) == 0
                assert {path: text for path, text in tree(home).items() if path in before} == after
                assert run("setup", name, "--undo") == 0
                assert {path: text for path, text in tree(home).items() if path in before} == before
            assert kill > 5
        setter.stdin.close()


def put_files(home, files):
    """These files there, and no other."""
    shutil.rmtree(home)
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
        (home / name).chmod(0o640)


# == Hostile input =================================================================================


HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def status_of(port, sent, half_close=False):
    """The status of the first answer; 0 when the connection ends without one."""
    reader, writer = await connect_and_send(port, sent, half_close)
    line = b""
    with suppress(ConnectionError):
        line = await reader.readline()
    writer.transport.abort()
    return int(line[9:12] or 0)


SMUGGLED = b"GET /api/smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
TWICE = b"POST /api/x HTTP/1.1\r\nHost: localhost\r\n%b\r\n\r\n%b"
FORMS = {  # a request that two servers could read differently: head, body
    "both lengths": (b"Content-Length: 4\r\nTransfer-Encoding: chunked", b"0\r\n\r\n" + SMUGGLED),
    "chunked behind a length": (b"Transfer-Encoding: chunked\r\nContent-Length: 4", b"0\r\n\r\n" + SMUGGLED),
    "two lengths": (b"Content-Length: 0\r\nContent-Length: 49", SMUGGLED),
    "a list of lengths": (b"Content-Length: 0, 49", SMUGGLED),
    "a signed length": (b"Content-Length: +49", SMUGGLED),
    "a negative length": (b"Content-Length: -1", SMUGGLED),
    "a length in hexadecimal": (b"Content-Length: 0x31", SMUGGLED),
    "a length with an underscore": (b"Content-Length: 4_9", SMUGGLED),
    "a length in other digits": ("Content-Length: \uff14\uff19".encode(), SMUGGLED),
    "a space before the colon": (b"Content-Length : 49", SMUGGLED),
    "a folded header": (b"X-A: b\r\n Content-Length: 49", SMUGGLED),
    "an unknown coding": (b"Transfer-Encoding: xchunked", b"0\r\n\r\n" + SMUGGLED),
    "chunked twice": (b"Transfer-Encoding: chunked, chunked", b"0\r\n\r\n" + SMUGGLED),
    "chunked first": (b"Transfer-Encoding: chunked, identity", b"0\r\n\r\n" + SMUGGLED),
    "chunked after a tab": (b"Transfer-Encoding:\x0bchunked", b"0\r\n\r\n" + SMUGGLED),
    "a signed chunk": (b"Transfer-Encoding: chunked", b"+0\r\n\r\n" + SMUGGLED),
    "a chunk in 0x": (b"Transfer-Encoding: chunked", b"0x0\r\n\r\n" + SMUGGLED),
    "a huge chunk": (b"Transfer-Encoding: chunked", b"1" + b"0" * 16 + b"\r\n" + SMUGGLED),
    "an extension with a line end": (b"Transfer-Encoding: chunked", b"0;a\nb\r\n\r\n" + SMUGGLED),
    "a bare line end": (b"X-A: b\nContent-Length: 49", SMUGGLED),
    "a bare return": (b"X-A: b\rContent-Length: 49", SMUGGLED),
    "a zero byte": (b"X-A: b\0c", SMUGGLED),
    "a name with a space": (b"X A: b", SMUGGLED),
    "an empty name": (b": b", SMUGGLED),
    "two hosts": (b"Host: evil.example", SMUGGLED),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
@in_loop
async def test_no_request_is_smuggled(tmp_path, name):
    """What is not refused reaches ampcode.com as this proxy read it: one request, with its body."""
    async with world(tmp_path) as w:
        got = await raw_exchange(w.port, TWICE % FORMS[name])
        assert re.match(rb"HTTP/1\.[01] 400 ", got)
        assert not [r.raw_path for r in w.amp.requests if r.raw_path != "/api/x"]
        assert not [r.bytes for r in w.amp.requests if b"smuggled" in r.bytes]
        assert (await w.ask("/api/y", b"body")).status == 200
        assert (w.amp.last.raw_path, w.amp.last.bytes) == ("/api/y", b"body")


@pytest.mark.parametrize("extra", [
    b"Connection: Content-Length", b"Connection: Transfer-Encoding", b"Connection: close, Host", b"Connection: Upgrade\r\nUpgrade: h2c",
    b"Connection: Upgrade\r\nUpgrade: websocket", b"Trailer: Content-Length", b"Expect: nothing", b"TE: trailers, chunked",
])  # fmt: skip
@in_loop
async def test_hop_headers_move_no_boundary(tmp_path, extra):
    async with world(tmp_path) as w:
        for _ in range(2):
            sent = TWICE % (b"Content-Length: 4\r\n" + extra, b"body")
            assert await status_of(w.port, sent) == 200
        assert {(r.raw_path, r.bytes) for r in w.amp.requests} <= {("/api/x", b"body")}
        assert (await w.ask("/api/y", b"more")).status == 200
        assert w.amp.last.bytes == b"more"


@pytest.mark.parametrize(("target", "status"), [
    (b"http://127.0.0.1/status", 400), (b"HTTP://localhost/v1/messages", 400), (b"https://ampcode.com/api/x", 400),
    (b"127.0.0.1:80", 400), (b"*", 400), (b"evil.example/x", 400), (b"?a", 400), (b"#", 400), (b"\\", 400), (b"@evil.example/", 400),
    (b"/healthz", 200), (b"/healthz?x", 200), (b"/api/internal?getUserInfo", 200),
])  # fmt: skip
@pytest.mark.parametrize("method", [b"GET", b"POST", b"CONNECT"])
@in_loop
async def test_targets_of_other_forms(tmp_path, target, status, method):
    async with world(tmp_path) as w:
        head = b"%b %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % (method, target)
        got = await raw_exchange(w.port, head)
        expected = 400 if method == b"CONNECT" else status
        assert re.match(rb"HTTP/1\.[01] %d " % expected, got)
        assert not w.claude.requests
        assert expected == 200 or not w.amp.requests


ESCAPES = ["/healthz/../status", "/auth/../status", "/auth/%2e%2e/status", "/auth/..%2fstatus", "/threads/..;/status", "//status",
           "/./status", "/%73tatus", "/status/", "/status%00", "/STATUS", "/status%3f", "/auth/../api/internal", "/healthz/"]  # fmt: skip


@pytest.mark.parametrize("target", ESCAPES)
@in_loop
async def test_no_spelling_escapes_a_check(tmp_path, target):
    """A path is one thing only, as it is spelt: it needs a key, or is a redirect without one."""
    async with world(tmp_path, **{"api-keys": ["k"]}) as w:
        head = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        got = await raw_exchange(w.port, f"{head}\r\n".encode())
        assert re.match(rb"HTTP/1\.[01] (302|40[01]) ", got)
        assert f"Location: {w.amp.url}{target}".encode() in got or b" 302 " not in got
        assert not w.amp.requests
        got = await raw_exchange(w.port, f"{head}X-Api-Key: k\r\n\r\n".encode())
        assert b'"accounts"' not in got
        assert {r.raw_path for r in w.amp.requests} <= {target}


@pytest.mark.parametrize("model", [
    "gemini-..%2f..%2fx", "gemini-%2e%2e%2fx", "gemini-%00", "gemini-x%3Fa=b", "gemini-%23", "gemini-%0d%0aX-Evil%3A%201",
    "gemini-%25%32%66", "gemini-%ff", "gemini-%ed%a0%80", "gemini-" + "x" * 7000,
])  # fmt: skip
@in_loop
async def test_a_model_in_a_path_stays_one_segment(tmp_path, model):
    async with world(tmp_path, tokens=()) as w:
        w.reload(**{"gemini-api-key": [{"api-key": "k", "base-url": w.claude.url}]})
        w.server.tick()
        w.claude.usual = answer_json(content())  # one without candidates would be no answer
        target = f"/v1beta/models/{model}:generateContent"
        body = b'{"contents": []}'
        got = await raw_exchange(w.port, post(target, len(body), body, "Connection: close\r\n"))
        assert re.match(rb"HTTP/1\.[01] 200 ", got)
        assert len(w.claude.requests) == 1
        assert b"\r\nX-Evil" not in got
        for request in w.claude.requests:
            assert re.fullmatch(r"/v1beta/models/[^/?#\r\n]+:generateContent", request.raw_path)
            assert "X-Evil" not in request.headers


@pytest.mark.parametrize("name", ["claude-\r\nX-Evil: 1", "claude-\n", "claude-\x00", "claude-é\u2028", "claude-" + "x" * (1 << 20),
                                  "claude-" + "(" * (1 << 20), "claude-" + "(a" * (1 << 19), "gpt-" + "-low" * (1 << 18),
                                  "claude-\ud800", "claude-" + "9" * 10_000, "claude-(" + "9" * 10_000 + ")"],
                         ids=range(11))  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/messages", PATH])
@in_loop
async def test_odd_names_of_models(tmp_path, name, path, caplog):
    """Served or refused at once; no header, no line of the log and no other call notices."""
    async with world(tmp_path) as w:
        w.claude.script = [said(404)]
        for _ in range(2):
            status, body, headers = await w.ask_json(path, {**ASK, "model": name})
            assert status in (200, 400, 404), body
            assert "X-Evil" not in headers
            assert max(map(len, headers.values())) <= 200
        assert max(len(record.getMessage()) for record in caplog.records) < 2000
        assert len(json.dumps((await w.ask_json("/status", method="GET"))[1])) < 10_000
        w.claude.script = []
        assert (await w.ask("/v1/messages", ASK)).status == 200


NUMBERS = [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"9" * 10_000, b"0." + b"9" * 10_000, b"1e-999", b"-0", b"1E400", b"01", b"0x1"]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS, ids=range(len(NUMBERS)))
@in_loop
async def test_a_number_is_sent_on_as_json_or_not_at_all(tmp_path, number):
    async with world(tmp_path) as w:
        body = b'{"model": "claude-opus-4-6", "messages": [], "temperature": %b}' % number
        status, *_ = await w.ask_json("/v1/messages", body)
        assert status in (200, 400)
        assert len(w.claude.requests) == (status == 200)
        for request in w.claude.requests:
            json.loads(request.bytes, parse_constant=pytest.fail)


@in_loop
async def test_of_two_equal_keys_one_is_read_and_sent(tmp_path):
    """No check sees another value than the provider does."""
    async with world(tmp_path) as w:
        body = b'{"model": "gpt-5", "model": "claude-opus-4-6", "messages": [], "messages": [{}]}'
        assert (await w.ask("/v1/messages", body)).status == 200
        assert (
            w.claude.last.bytes.count(b'"model"') == w.claude.last.bytes.count(b'"messages"') == 1
        )
        assert (w.claude.body()["model"], w.claude.body()["messages"]) == ("claude-opus-4-6", [{}])


@pytest.mark.parametrize("depth", [*range(470, 500, 2), *range(960, 1000, 2), 5000])
@pytest.mark.parametrize("shape", [("[", "]"), ('{"content": [', "]}"), ('{"a": ', "}")], ids="lcd")
@in_loop
async def test_nesting_at_the_brink(tmp_path, depth, shape):
    """Whatever depth the interpreter bears: it is served, or the client's fault."""
    start, end = shape
    nested = f'{{"model": "claude-opus-4-6", "messages": [{start * depth}1{end * depth}]}}'
    async with world(tmp_path) as w:
        status, *_ = await w.ask_json("/v1/messages", nested.encode())
        assert status in (200, 400)
        assert len(w.claude.requests) == (status == 200)


@functools.cache
def bomb():
    """64 MiB that are 64 KB: the middle of a gzip stream, which may be repeated."""
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(bytes(64 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)


GZIP = bytes.fromhex("1f8b08000000000000ff")


def peak(process):
    """The most memory that a process has had, in MiB."""
    return (
        int(re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) >> 10
    )


@linux
@in_loop
async def test_bombs_stay_small(tmp_path):
    """1 GiB in 1 MB: as a request, as an answer that hides it or says it, from either side."""
    packed = GZIP + bomb() * 16

    async def serve(request):
        kind = {"Content-Type": "application/json"}
        hidden = {} if request.path.startswith("/api") else {"Content-Encoding": "gzip"}
        status = 429 if "claude-haiku-4-5-20251001" in request.bytes.decode() else 200
        return web.Response(status=status, body=packed, headers={**kind, **hidden})

    async with running(tmp_path, serve) as cli:
        said = {"Content-Encoding": "gzip"}
        async with cli.http.post("/v1/messages", data=packed, headers=said) as answer:
            assert answer.status == 413
        async with cli.http.get("/api/threads") as answer:
            assert await answer.read() == packed, "what cannot be unpacked passes as it came"
        for model in ("claude-opus-4-6", "claude-haiku-4-5-20251001"):
            async with cli.http.post("/v1/messages", json={**ASK, "model": model}) as answer:
                assert answer.status in (413, 429)
        cli.claude.usual = answer_json(message())
        async with cli.http.get("/healthz") as answer:
            assert answer.status == 200
        assert peak(cli.process) < 600


@pytest.mark.parametrize("side", ["client", "upstream"])
@in_loop
async def test_a_frame_of_100_mb_ends_its_tunnel(tmp_path, side):
    """At its head, before its bytes are waited for; both sides hear it."""
    codes, head = asyncio.Queue(), b"\x7f" + (100 << 20).to_bytes(8, "big")

    async def actor(request):
        socket = web.WebSocketResponse(max_msg_size=0)
        await socket.prepare(request)
        if side == "upstream":
            request.transport.write(b"\x82" + head)
        await socket.receive()
        codes.put_nowait(socket.close_code)
        return socket

    async with world(tmp_path) as w:
        w.amp.usual = actor
        async with w.http.ws_connect(w.url + "/actors/x", max_msg_size=0) as ws:
            if side == "client":
                ws._writer.transport.write(b"\x82\xff" + head[1:] + bytes(4))
            assert (await ws.receive()).type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
            assert ws.close_code == 1009
        assert await codes.get() in (1009, 1001)
        assert (await w.ask("/v1/messages", ASK)).status == 200


# A fuzzer: odd requests made of the words that the proxy knows.
PIECES = ["/", "v1", "v1beta", "api", "provider", "anthropic", "messages", "chat/completions", "responses", "models", "claude-opus-4-6",
          ":generateContent", ":", "..", "%2f", "%2e", "%00", "%ff", "%", "\\", "é", "?", "key=k", "&", "#", "status", "auth", "threads",
          "healthz", "actors", "internal", "getUserInfo", "//", "(high)", "count_tokens", "compact", "\x7f", ";", "=", "+", "alt=sse"]  # fmt: skip
NAMES = ["Host", "Origin", "Content-Type", "Content-Encoding", "Content-Length", "Transfer-Encoding", "Connection", "Upgrade", "Expect",
         "Authorization", "X-Api-Key", "X-Amp-Thread-Id", "anthropic-beta", "anthropic-version", "Sec-Fetch-Site", "Sec-WebSocket-Key",
         "Sec-WebSocket-Protocol", "Sec-WebSocket-Version", "Accept", "User-Agent", "x-stainless-a", "session_id", "Trailer", "TE"]  # fmt: skip
VALUES = ["localhost", "127.0.0.1", "null", "http://evil.example", "gzip", "identity", "chunked", "0", "5", "websocket", "Upgrade", "close",
          "100-continue", "Bearer k", "cross-site", "application/json", "x", "dGhlIHNhbXBsZSBub25jZQ==", "13", "", "é", "\udcff", ",", " "]  # fmt: skip
KEYS = ["model", "messages", "stream", "system", "input", "contents", "role", "content", "type", "text", "thinking", "tools", "metadata",
        "user_id", "prompt_cache_key", "max_tokens", "betas", "id", "tool_use_id", "reasoning", "instructions", "call_id", "parts"]  # fmt: skip
WORDS = ["claude-opus-4-6", "gpt-5.2(high)", "gemini-x", "user", "system", "text", "tool_use", "tool_result", "thinking", "auto", "reasoning",
         "item_reference", "", "\x00", "é", "\ud800", "enabled"]  # fmt: skip


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUE = st.recursive(
    SCALARS | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=15)  # fmt: skip
ANY_BODY = st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=5)
MODEL_BODY = (
    st.builds(lambda table, model: {**table, "model": model}, ANY_BODY, st.sampled_from(WORDS))
    | VALUE
)
BODY = MODEL_BODY.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=50)
KNOWN = [PATH, "/v1/messages", "/v1/responses", "/v1/chat/completions", "/v1/messages/count_tokens", "/v1/models", "/status",
         "/v1beta/models/gemini-x:generateContent", "/v1beta/models/gemini-x:streamGenerateContent", "/api/internal?getUserInfo"]  # fmt: skip
TARGET = st.lists(st.sampled_from(PIECES), max_size=8).map(lambda parts: "/" + "".join(parts))
HEADER = st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES) | st.text(max_size=8))
METHODS = ["POST", "POST", "GET", "HEAD", "PUT", "OPTIONS", "DELETE", "CONNECT", "odd"]


@st.composite
def requests(draw):
    """The bytes of a request, and whether they are whole: then there must be an answer."""
    target = draw(st.sampled_from(KNOWN) | TARGET)
    body, headers = draw(BODY | BODY.map(gzip.compress)), draw(st.lists(HEADER, max_size=4))
    whole = draw(st.sampled_from([True, True, True, False]))
    own = [("Host", "localhost"), ("Content-Length", len(body))] if whole else []
    lines = [f"{name}: {value}" for name, value in headers + own]
    head = "\r\n".join([f"{draw(st.sampled_from(METHODS))} {target} HTTP/1.1", *lines, "", ""])
    return head.encode(errors="surrogateescape") + body, whole


def is_fault(record):
    """A traceback or an error of the program's own; aiohttp says in its way that a request is bad."""
    bad = record.exc_info and issubclass(record.exc_info[0], HttpProcessingError)
    return "internal error" in record.getMessage() or (record.exc_info and not bad)


def test_fuzz(tmp_path, caplog):
    """No 500, no traceback, no hang: for 3 seconds, or as many as AMPPROXY_FUZZ says."""
    until, faults = time.monotonic() + int(os.environ.get("AMPPROXY_FUZZ") or 3), []

    async def one(w, sent, whole):
        caplog.clear()
        w.clock.now += 10_000
        async with asyncio.timeout(10):
            status = await status_of(w.port, sent, half_close=not whole)
            assert await status_of(w.port, HEALTH) == 200
        assert status != 500
        assert status or not whole
        assert not [*faults, *filter(is_fault, caplog.records)]

    with asyncio.Runner() as runner:
        here = world(tmp_path, **{"request-retry": 1})
        w = runner.run(here.__aenter__())
        key = {"api-key": "k", "base-url": w.claude.url}
        w.reload(**{f"{kind}-api-key": [key] for kind in ("claude", "codex", "gemini")})
        w.server.tick()
        runner.get_loop().set_exception_handler(lambda _, context: faults.append(context))
        quick = settings(max_examples=50, deadline=None, database=None, suppress_health_check=[*HealthCheck])  # fmt: skip
        case = quick(given(requests())(lambda sent: runner.run(one(w, *sent))))
        for start in itertools.takewhile(lambda _: time.monotonic() < until, itertools.count()):
            seed(start)(case)()
        runner.run(here.__aexit__(None, None, None))


# == JSON, events, and bytes that stay ============================================================

JSON_CASES = [  # text -> the value, or None where it is refused
    (b'{"a": 1}', {"a": 1}), (b'{"a": "\xc3\xa9\\u2028/"}', {"a": "é\u2028/"}), (b'{"a": 1, "a": 2}', {"a": 2}),
    (b'{"a": 99999999999999999999999}', {"a": 99999999999999999999999}), (b'{"a": "\\ud800"}', {"a": "\ud800"}),
    (b'{"a": 0.1, "b": 1e16, "c": -0}', {"a": 0.1, "b": 1e16, "c": 0}), (b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}", ...),
    (b'{"a": NaN}', None), (b'{"a": 1e999}', None), (b'{"a": -Infinity}', None), (b'{"a": "\xff"}', None), (b"", None),
    (b'\xef\xbb\xbf{}', None), (b"[1]", None), (b"1", None), (b'{"a": 01}', None), (b'{"a": ' + b"9" * 5000 + b"}", None),
    (b'{"a": ' + b"[" * 100_000, None),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "value"), JSON_CASES, ids=range(len(JSON_CASES)))
def test_json_is_read_alike_with_and_without_the_fast_library(raw, value):
    if value is None:
        with pytest.raises(ValueError):
            ampproxy.parse_object(raw)
        return
    got = ampproxy.parse_object(raw)
    assert got == (json.loads(raw) if value is ... else value)
    assert ampproxy.parse_object(ampproxy.write_json(got)) == got
    assert b": " not in ampproxy.write_json(got)


SPELLINGS = {  # of the same events
    "lf": lambda raw: raw, "crlf": lambda raw: raw.replace(b"\n", b"\r\n"), "cr": lambda raw: raw.replace(b"\n", b"\r"),
    "no space": lambda raw: re.sub(rb"(?m)^(data|event): ", rb"\1:", raw),
    "event behind": lambda raw: re.sub(rb"(event: .*)\n(data: .*)\n", rb"\2\n\1\n", raw),
    "no event": lambda raw: re.sub(rb"event: .*\n", b"", raw), "id behind": lambda raw: re.sub(rb"(data: .*\n)", rb"\1id: 7\n", raw),
    "two data lines": lambda raw: re.sub(rb'(data: .*?,) ?(".*\n)', rb"\1\ndata: \2", raw),
    "comments": lambda raw: b": OPENROUTER PROCESSING\n\n" + raw.replace(b"\n\n", b"\n\n: still here\n\n", 2),
    "a byte order mark": lambda raw: b"\xef\xbb\xbf" + raw, "retry": lambda raw: b"retry: 10\n\n" + raw,
    "mixed": lambda raw: raw.replace(b"\n\n", b"\r\n\n", 1).replace(b"\n\n", b"\n\r\n", 2), "other fields": lambda raw: b"x: y\n" + raw,
    "blank lines": lambda raw: b"\n\n\n" + raw.replace(b"\n\n", b"\n\n\n"),
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 7, 100_000])
@pytest.mark.parametrize("name", SPELLINGS)
@in_loop
async def test_every_form_of_an_event_stream_passes_as_it_came(tmp_path, name, size):
    whole = SPELLINGS[name](b"".join(events()))
    async with world(tmp_path) as w:
        w.claude.usual = (200, SSE, [whole[i : i + size] for i in range(0, len(whole), size)])
        response = await w.ask("/v1/messages", STREAM)
        ends = whole.rindex(b"message_stop") + len(b'message_stop"}')
        assert response.bytes.startswith(whole[:ends])
        assert not response.bytes[ends:].strip(b"\r\n :abcdefghijklmnopqrstuvwxyz_7")
        assert len(w.claude.requests) == 1
        row = w.server.ledger.requests[0]
        assert (row["status"], row["input_tokens"], row["output_tokens"]) == (200, 11, 7)


@pytest.mark.parametrize("name", SPELLINGS)
@in_loop
async def test_names_are_put_right_in_every_form(tmp_path, name):
    async with world(tmp_path) as w:
        w.claude.usual = (200, SSE, [SPELLINGS[name](b"".join(events("claude-opus-4-6-20260101")))])
        response = await w.ask("/v1/messages", STREAM)
        assert response.status == 200
        assert b"20260101" not in response.bytes
        lines = re.split(rb"\r\n|\r|\n", response.bytes)
        start = next(
            i
            for i, line in enumerate(lines)
            if b"message_start" in line and line.startswith(b"data")
        )
        data = b"\n".join(x[5:] for x in lines[start : start + 2] if x.startswith(b"data"))
        assert json.loads(data)["message"]["model"] == "claude-opus-4-6"


@pytest.mark.parametrize(
    "label",
    [
        "text/plain",
        "application/json",
        "application/octet-stream",
        "",
        "text/event-stream; charset=utf-8",
    ],
)
@in_loop
async def test_a_stream_is_known_by_its_first_bytes(tmp_path, label):
    async with world(tmp_path) as w:
        w.claude.usual = (200, {"Content-Type": label} if label else {}, events())
        response = await w.ask("/v1/messages", STREAM)
        assert response.bytes == b"".join(events())
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert len(w.claude.requests) == 1


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_no_end_of_an_event_is_missed_between_two_pieces(cut):
    async def runs(parts):
        async def pieces():
            for part in parts:
                yield part

        return [run async for run in ampproxy.whole_events(pieces())]

    for end in (b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n", b"\r\n\n"):
        whole = b"data: a" + end + b"data: b" + end
        for at in range(1, len(whole), cut):
            parts = [whole[:at], whole[at : at + cut], whole[at + cut :]]
            got = asyncio.run(runs([part for part in parts if part]))
            assert b"".join(got) == whole
            assert not [run for run in got if ampproxy.event_end(run) != len(run) and run != b"\n"]


@in_loop
async def test_a_connection_is_kept_although_its_end_comes_late(tmp_path):
    """The last event has passed on, and the upstream's own end comes a moment later."""
    async with raw_world(tmp_path, [CHUNKED + chunk(WHOLE), b"0\r\n\r\n"]) as w:
        for _ in range(5):
            assert (await w.ask("/v1/messages", STREAM)).bytes == WHOLE
            while w.server.net.retired:
                await asyncio.sleep(0)
        assert len(w.raw.requests) == 5
        assert w.raw.connections == 1


ODD_SPACING = b'{ "model" : "claude-opus-4-6",\n "messages":[ {"role":"user","content":"h\\u00e9"} ],"max_tokens":100.0 }'


@in_loop
async def test_where_nothing_has_to_change_the_clients_bytes_go_out(tmp_path):
    async with key_world(tmp_path, "claude-api-key") as w:
        assert (await w.ask("/v1/messages", ODD_SPACING)).status == 200
        assert w.keyed.last.bytes == ODD_SPACING
        await w.ask("/v1/messages", ODD_SPACING.replace(b"4-6", b"4-6(low)"))
        assert w.keyed.body()["model"] == "claude-opus-4-6"
        await w.ask(
            "/v1/messages",
            ODD_SPACING.replace(b', "max', b"").replace(
                b'"max_tokens":100.0', b'"max_tokens":null'
            ),
        )
        assert w.keyed.body()["max_tokens"] == 128000


@pytest.mark.parametrize("spaced", [False, True])
def test_what_is_spliced_is_what_was_meant(spaced):
    old = {
        "model": "a",
        "messages": [{"x": "é\u2028", "n": [1, 2.5, None]}],
        "gone": 1,
        "é": {"y": "z"},
    }
    new = {
        "model": "b",
        **{k: v for k, v in old.items() if k not in ("model", "gone")},
        "system": [{"text": "t"}],
    }
    raw = json.dumps(old, indent=1 if spaced else None, ensure_ascii=spaced).encode()
    for form in (raw, bytearray(raw)):
        pieces = ampproxy.spliced(form, old, new)
        assert json.loads(b"".join(pieces)) == new
        if ampproxy.msgspec:
            assert raw[raw.index(b"[") : raw.rindex(b"]") + 1] in [bytes(p) for p in pieces], (
                "as it came"
            )


@settings(max_examples=200, deadline=None, database=None, suppress_health_check=[*HealthCheck])
@given(st.dictionaries(st.sampled_from(sorted({"model", "messages", "system", "input", "thinking", "betas", "instructions", "stop"})),
                       st.recursive(st.none() | st.sampled_from(["claude-opus-4-6", "text", "", "gAAAA", "EqQB", "x:y"]),
                                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(
                                        ["type", "text", "content", "role", "id", "signature", "summary", "call_id", "tool_use_id"]),
                                        inner | st.sampled_from(["system", "tool_use", "thinking", "reasoning", "tool_result"]), max_size=5),
                                    max_leaves=20), max_size=6))  # fmt: skip
def test_rules_change_nothing_in_place(body):
    before, rows = json.loads(json.dumps(body)), {**ampproxy.LOGINS, **ampproxy.API_KEYS}
    for name, rule in ampproxy.RULES.items():
        with suppress(ampproxy.ProxyError):
            sent = rule(body, ampproxy.Headers(), rows[name])
            again = rule(body, ampproxy.Headers(), rows[name])
            assert sent == again
        assert body == before


@linux
@in_loop
async def test_a_running_stream_holds_no_prompt(tmp_path):
    """20 prompts of 10 MB, each with an answer that has begun and goes on."""

    def rss():
        return (
            int(
                re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{cli.process.pid}/status").read_text())[1]
            )
            >> 10
        )

    gate = asyncio.Event()
    body = json.dumps(
        {**STREAM, "messages": [{"role": "user", "content": "x" * 10_000_000}]}
    ).encode()
    async with running(tmp_path, (200, SSE, [FIRST, gate, WHOLE[len(FIRST) :]])) as cli:
        before, streams = rss(), []
        for _ in range(20):
            streams.append(await cli.http.post("/v1/messages", data=body))
            assert await streams[-1].content.readuntil(b"\n\n") == FIRST
        assert rss() - before < 80
        gate.set()
        for stream in streams:
            assert FIRST + await stream.content.read() == WHOLE


# == Status and models =============================================================================


@in_loop
async def test_what_the_log_and_the_status_say_of_a_call_that_failed(tmp_path, caplog):
    async with world(tmp_path) as w:
        w.claude.script = [limit(**{"Retry-After": "90"})]
        await w.ask("/v1/messages", ASK)
        assert re.search(
            r"429 +0\.0s claude-\S+ +claude fre\.\.\. claude answered 429 rate_limit_error",
            caplog.text,
        )
        w.amp.usual = (
            200,
            {"Content-Type": "application/json", "Content-Length": "50"},
            [b"{", "cut"],
        )
        with pytest.raises(aiohttp.ClientError):
            await w.ask(PATH, ASK)
        while len(w.server.ledger.requests) < 2:
            await asyncio.sleep(0)
        assert [(r["route"], r["status"]) for r in w.server.ledger.requests] == [
            ("local", 429),
            ("amp", 502),
        ]


@in_loop
async def test_a_tools_input_before_the_models_name_stays(tmp_path):
    content = [{"type": "tool_use", "id": "t", "name": "n", "input": {"model": "claude-opus-4-6"}}]
    async with world(tmp_path) as w:
        w.claude.usual = answer_json(
            {"type": "message", "content": content, "model": "claude-opus-4-6"}
        )
        _, body, _ = await w.ask_json("/v1/messages", {**ASK, "model": "claude-opus"})
        assert (body["model"], body["content"]) == ("claude-opus", content)


@in_loop
async def test_an_upstream_that_closes_hears_its_own_code(tmp_path):
    codes, ended = [], asyncio.Event()

    async def actor(request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.close(code=4999)
        codes.append(socket.close_code)
        ended.set()
        return socket

    async with world(tmp_path) as w:
        w.amp.usual = actor
        async with w.http.ws_connect(w.url + "/actors/x") as ws:
            assert (await ws.receive()).data == 4999
        await ended.wait()
        assert codes == [4999]


@in_loop
async def test_a_reload_with_a_home_that_is_none_changes_nothing(tmp_path, caplog):
    async with world(tmp_path) as w:
        w.write(**{"max-cooldown": 77, "auth-dir": "~nobody-at-all/x"})
        w.server.tick()
        assert w.server.live.config["max-cooldown"] == 1800
        assert "stays in effect" in caplog.text


@in_loop
async def test_status(tmp_path):
    async with world(tmp_path) as w:
        w.claude.usual = (200, SSE, events())
        await w.ask(PATH, STREAM)
        await w.ask("/v1/messages", {**ASK, "model": "unknown"})
        for path in ("/status", "/"):
            _, status, _ = await w.ask_json(path, method="GET")
        assert status["version"] == ampproxy.__version__
        assert status["routes"] == {"local": 1, "mapped": 0, "amp": 0, "none": 1}
        assert status["accounts"] == [{
            "provider": "claude", "account": "fred@example.com", "state": "ready", "reason": "", "wakes_in_seconds": None,
            "expires_in_seconds": 28800, "plan": "", "in_flight": 0, "threads": 0, "requests": 1, "errors": 0,
            "input_tokens": 11, "output_tokens": 7, "quota": [],
        }]  # fmt: skip
        assert status["requests"][0] | {"seconds": 0} == {
            "time": "2027-01-15T08:00:00Z", "dialect": "anthropic", "model": "claude-opus-4-6", "route": "local",
            "provider": "claude", "account": "fred@example.com", "served_model": "claude-opus-4-6", "status": 200, "seconds": 0, "input_tokens": 11, "output_tokens": 7,
        }  # fmt: skip
        assert (status["requests"][1]["status"], status["requests"][1]["route"]) == (404, "none")
        assert "sk-ant" not in json.dumps(status)


@pytest.mark.parametrize("scheme", ["", "http://"])
@in_loop
async def test_the_environments_proxy_is_used_but_for_no_proxy(tmp_path, monkeypatch, scheme):
    outbound = FakeUpstream(answer_json(message()))
    async with outbound.open():
        monkeypatch.setenv("http_proxy", scheme + outbound.url.removeprefix("http://"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        async with world(tmp_path, claude={"base-url": "http://claude.invalid"}) as w:
            assert (await w.ask("/v1/messages", ASK)).status == 200
            assert outbound.last.raw_path == "http://claude.invalid/v1/messages"
            assert (await w.ask("/api/threads", method="GET")).status == 200
            assert (len(outbound.requests), len(w.amp.requests)) == (1, 1)


# == ChatGPT logins ================================================================================

CODEX = "/v1/responses"
QUESTION = {"model": "gpt-5.4", "input": [{"role": "user", "content": "hi"}], "stream": True}


def id_token(email="fred@example.com", plan="plus", account="acc-1"):
    """A JWT as ChatGPT's login gives it; nobody checks its signature."""
    auth = {"chatgpt_account_id": account, "chatgpt_plan_type": plan}
    told = json.dumps({"email": email, "https://api.openai.com/auth": auth}).encode()
    return f"eyJ.{base64.urlsafe_b64encode(told).decode().rstrip('=')}.x"


def codex_file(folder, name="fred@example.com", **changes):
    given = {"type": "codex", "id_token": id_token(name), "account_id": f"acc-{name}", **changes}
    path = token_file(folder, name, access_token=f"tok-{name}", **given)
    return path.rename(folder / f"codex-{name}.json")


def reply(model="gpt-5.4", **more):
    return {"id": "resp_1", "object": "response", "model": model, "status": "completed", "error": None,
            "output": [], "usage": {"input_tokens": 5, "output_tokens": 3}, **more}  # fmt: skip


TEXT_ITEM = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
             "content": [{"type": "output_text", "text": "hi", "annotations": []}]}  # fmt: skip


def codex_events(model="gpt-5.4", kind="response.completed", **more):
    status = kind.partition(".")[2]
    return [
        event("response.created", sequence_number=0, response=reply(model, status="in_progress")),
        event("response.in_progress", sequence_number=1, response=reply(model, status="in_progress")),
        event("response.output_text.delta", sequence_number=2, output_index=0, item_id="msg_1", content_index=0,
              delta="hé", logprobs=[]),
        event("response.output_item.done", sequence_number=3, output_index=0, item=TEXT_ITEM),
        event(kind, sequence_number=4, response=reply(model, status=status, **more)),
    ]  # fmt: skip


def data_of(raw):
    return [json.loads(text) for text in re.findall(rb"^data: (\{.*)$", raw, re.M)]


@asynccontextmanager
async def codex_world(folder, names=("fred@example.com",), suffix="/backend-api/codex", **config):
    """A world with ChatGPT logins and no other."""
    codex = FakeUpstream((200, SSE, codex_events()))
    async with codex.open():
        row = {"base-url": codex.url + suffix}
        async with world(folder, tokens=(), **config) as w:
            row["token-url"] = w.authority.url + "/token"
            claude = {"base-url": w.claude.url, "token-url": w.authority.url + "/token"}
            w.reload(providers={"codex": row, "claude": claude}, **config)
            w.codex, w.tokens = codex, [codex_file(w.auth, name) for name in names]
            w.server.tick()
            yield w


@asynccontextmanager
async def codex_authority(tmp_path, usual):
    fake = FakeUpstream(usual)
    async with fake.open():
        row = {"authorize-url": fake.url + "/authorize", "token-url": fake.url + "/token",
               "callback-port": free_port()}  # fmt: skip
        config = {"auth-dir": str(tmp_path / "auth"), "providers": {"codex": row}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        yield fake


@in_loop
async def test_a_chatgpt_login_from_the_address_to_the_file(tmp_path):
    given = {
        "access_token": "tok",
        "refresh_token": "rt_1",
        "id_token": id_token(),
        "expires_in": 864000,
    }
    async with codex_authority(tmp_path, answer_json(given)) as fake:
        with Cli(tmp_path, "login", "chatgpt", "--no-browser") as cli:
            asked = query_of(await cli.until("paste the address"))
            assert asked["redirect_uri"].endswith("/auth/callback")
            assert asked.items() >= {
                "client_id": "app_EMoamEEZ73f0CkXaXp7hrann", "scope": "openid email profile offline_access",
                "id_token_add_organizations": "true", "codex_cli_simplified_flow": "true",
            }.items()  # fmt: skip
            done = f"{asked['redirect_uri']}?code=c0de&state={asked['state']}"
            status, out, err = await cli.end(f"{done}\n")
        assert (status, err) == (0, "")
        assert "Signed in to codex as fred@example.com" in out
        assert fake.last.headers["Content-Type"] == "application/x-www-form-urlencoded"
        sent = {name: values[0] for name, values in parse_qs(fake.last.bytes.decode()).items()}
        assert sent.pop("code_verifier")
        assert sent == {"grant_type": "authorization_code", "client_id": asked["client_id"],
                        "code": "c0de", "redirect_uri": asked["redirect_uri"]}  # fmt: skip
        path = tmp_path / "auth/codex-fred@example.com.json"
        token = json.loads(path.read_text())
        assert token | {"expired": "", "last_refresh": ""} == {
            "type": "codex", "email": "fred@example.com", "account_id": "acc-1", "plan": "plus", "access_token": "tok",
            "refresh_token": "rt_1", "id_token": given["id_token"], "expired": "", "last_refresh": "",
        }  # fmt: skip
        with Cli(tmp_path, "accounts") as cli:
            _, out, _ = await cli.end()
        assert re.search(r"codex +fred@example.com +plus +in 240", out)


@pytest.mark.parametrize(("query", "usual", "words"), [
    ("error=access_denied&state={}", None, "the login was refused: access_denied"),
    ("code=x&state={}", answer_json({"error": {"code": "token_expired", "message": "too late"}}, 400), "too late"),
    ("code=x&state={}", answer_json({}), "token endpoint answered 200"),
])  # fmt: skip
@in_loop
async def test_a_chatgpt_login_that_fails(tmp_path, query, usual, words):
    async with codex_authority(tmp_path, usual or answer_json({})):
        with Cli(tmp_path, "login", "codex", "--no-browser") as cli:
            asked = query_of(await cli.until("paste the address"))
            callback = f"{asked['redirect_uri']}?{query.format(asked['state'])}\n"
            status, _, err = await cli.end(callback)
        assert status == 1
        assert words in err
        assert len(err.splitlines()) == 1
        assert not list(tmp_path.glob("auth/*"))


@in_loop
async def test_a_chatgpt_token_is_refreshed_by_a_form(tmp_path):
    async with codex_world(tmp_path, ()) as w:
        path = codex_file(w.auth, expired="2020-01-01T00:00:00Z", refresh_token="rt_old")
        w.server.tick()
        w.authority.usual = answer_json({"access_token": "new", "refresh_token": "rt_new", "expires_in": 99,
                                         "id_token": id_token(plan="pro")})  # fmt: skip
        assert (await w.ask(CODEX, QUESTION)).status == 200
        assert parse_qs(w.authority.last.bytes.decode()) == {
            "grant_type": ["refresh_token"], "client_id": ["app_EMoamEEZ73f0CkXaXp7hrann"], "refresh_token": ["rt_old"],
        }  # fmt: skip
        assert w.codex.last.headers["Authorization"] == "Bearer new"
        assert json.loads(path.read_text())["refresh_token"] == "rt_new"
        report = (await w.ask_json("/status", method="GET"))[1]["accounts"][0]
        assert (report["plan"], report["provider"]) == ("pro", "codex")


@in_loop
async def test_an_app_of_ones_own_signs_in_with_its_id_and_secret(tmp_path):
    own = {"client-id": "mine", "client-secret": "hush"}
    async with world(tmp_path, tokens=(), claude=own) as w:
        token_file(w.auth, expired="2020-01-01T00:00:00Z")
        w.server.tick()
        assert await answered_by(w) == "new"
        assert w.authority.body() == {"grant_type": "refresh_token", "client_id": "mine", "client_secret": "hush",
                                      "refresh_token": "sk-ant-ort-fred@example.com"}  # fmt: skip


@pytest.mark.parametrize(
    "code", ["refresh_token_reused", "refresh_token_expired", "refresh_token_invalidated"]
)
@in_loop
async def test_a_void_chatgpt_refresh_token_needs_a_login(tmp_path, code):
    async with codex_world(tmp_path, ()) as w:
        path = codex_file(w.auth, expired="2020-01-01T00:00:00Z")
        before = path.read_bytes()
        w.server.tick()
        w.authority.usual = answer_json({"error": {"code": code, "message": "no"}}, 401)
        status, body, _ = await w.ask_json(CODEX, QUESTION)
        assert (status, "ampproxy.py login codex" in body["error"]["message"]) == (401, True)
        await w.ask(CODEX, QUESTION)
        assert len(w.authority.requests) == 1
        assert path.read_bytes() == before


@pytest.mark.parametrize("suffix", ["", "/", "/backend-api/codex", "/backend-api/codex/"])
@in_loop
async def test_what_reaches_chatgpt(tmp_path, suffix):
    async with codex_world(tmp_path, suffix=suffix) as w:
        sent = {**CLIENT, "X-Amp-Thread-Id": "T-1", "session_id": "s"}
        assert (
            await w.ask("/api/provider/openai" + CODEX + "?key=k", QUESTION, headers=sent)
        ).status == 200
        got = w.codex.last
        assert got.raw_path == "/backend-api/codex/responses"
        assert got.headers["Authorization"] == "Bearer tok-fred@example.com"
        assert got.headers["Chatgpt-Account-Id"] == "acc-fred@example.com"
        assert (got.headers["Accept"], got.headers["originator"]) == (
            "text/event-stream",
            "codex_cli_rs",
        )
        assert got.headers["session_id"] == "s"
        assert not got.headers.keys() & {"X-Api-Key", "X-Goog-Api-Key", "Cookie", "X-Amp-Thread-Id"}
        assert w.codex.body() == {
            **QUESTION, "store": False, "include": ["reasoning.encrypted_content"], "parallel_tool_calls": True,
            "instructions": "",
        }  # fmt: skip


DROPPED = [
    "max_output_tokens", "max_completion_tokens", "max_tokens", "temperature", "top_p", "top_k",
    "truncation", "user", "context_management", "prompt_cache_retention", "prompt_cache_options",
    "safety_identifier", "stream_options", "frequency_penalty", "presence_penalty", "logprobs",
    "top_logprobs", "n", "seed", "stop", "logit_bias", "response_format", "reasoning_effort",
    "metadata",
]  # fmt: skip
LONG = "call_" + "x" * 100
CALLED = [{"type": "function_call", "call_id": LONG, "name": "f", "arguments": "{}", "id": "fc_1"},
          {"type": "function_call_output", "call_id": LONG, "output": "1"}]  # fmt: skip
SHORT = LONG[:47] + "_" + hashlib.sha256(LONG.encode()).hexdigest()[:16]
THOUGHT = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAAABm"}


@pytest.mark.parametrize(("given", "sent"), [
    *(({name: 1}, {name: None}) for name in DROPPED),
    ({"service_tier": "auto"}, {"service_tier": None}), ({"service_tier": "priority"}, {"service_tier": "priority"}),
    ({"parallel_tool_calls": False}, {"parallel_tool_calls": False}),
    ({"store": True, "include": ["x"]}, {"store": False, "include": ["reasoning.encrypted_content"]}),
    ({"prompt_cache_key": "k", "reasoning": {"effort": "low"}}, {"prompt_cache_key": "k", "reasoning": {"effort": "low"}}),
    ({"instructions": "be kind"}, {"instructions": "be kind"}),
    ({"instructions": None}, {"instructions": ""}),
    ({"input": "hi"}, {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]}),
    ({"input": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]},
     {"instructions": "be kind", "input": [{"role": "user", "content": "hi"}]}),
    ({"instructions": "be", "input": [{"role": "system", "content": [{"type": "input_text", "text": "kind"}]}]},
     {"instructions": "be\n\nkind", "input": []}),
    ({"input": [{"role": "developer", "content": "dev", "id": "msg_9"}]}, {"input": [{"role": "developer", "content": "dev"}]}),
    ({"input": CALLED}, {"input": [{**CALLED[0], "call_id": SHORT, "id": None}, {**CALLED[1], "call_id": SHORT}]}),
    ({"input": [THOUGHT, {"type": "item_reference", "id": "x"}]}, {"input": [THOUGHT]}),
    ({"input": [{**THOUGHT, "encrypted_content": "EqQB"}, {"type": "reasoning", "summary": []}]}, {"input": []}),
])  # fmt: skip
@in_loop
async def test_the_backends_body_rules(tmp_path, given, sent):
    def lean(value):
        if isinstance(value, dict):
            return {name: lean(inner) for name, inner in value.items() if inner is not None}
        return [lean(inner) for inner in value] if isinstance(value, list) else value

    async with codex_world(tmp_path) as w:
        assert (await w.ask(CODEX, {**QUESTION, **given})).status == 200
        body = w.codex.body()
        assert {name: body.get(name) for name in sent if body.get(name) is not None} == lean(sent)
        assert len(SHORT) == 64


@in_loop
async def test_previous_response_id_is_refused(tmp_path):
    async with codex_world(tmp_path) as w:
        status, body, _ = await w.ask_json(CODEX, {**QUESTION, "previous_response_id": "resp_0"})
        assert (status, body["error"]["type"]) == (400, "invalid_request_error")
        assert "previous_response_id" in body["error"]["message"]
        assert not w.codex.requests
        assert resting(w) == {}


@pytest.mark.parametrize("size", [1, 7, 100_000])
@in_loop
async def test_a_responses_stream_passes_and_its_lost_output_comes_back(tmp_path, size):
    async with codex_world(tmp_path) as w:
        for output in ([TEXT_ITEM], []):
            sent = b"".join(codex_events(output=output))
            w.codex.script = [(200, SSE, [sent[i : i + size] for i in range(0, len(sent), size)])]
            response = await w.ask(CODEX, QUESTION)
            got = data_of(response.bytes)
            assert got[-1]["response"]["output"] == [TEXT_ITEM]
            assert got[:-1] == data_of(sent)[:-1]
            if output:
                assert response.bytes == sent
        assert [row["output_tokens"] for row in w.server.ledger.requests] == [3, 3]


@pytest.mark.parametrize("size", [1, 7, 100_000])
@in_loop
async def test_a_responses_stream_with_long_line_ends(tmp_path, size):
    async with codex_world(tmp_path) as w:
        sent = b"".join(codex_events(output=[TEXT_ITEM])).replace(b"\n", b"\r\n")
        w.codex.script = [(200, SSE, [sent[i : i + size] for i in range(0, len(sent), size)])]
        assert (await w.ask(CODEX, QUESTION)).bytes == sent


@in_loop
async def test_an_event_of_many_megabytes_does_not_stop_the_rest(tmp_path):
    """Encrypted reasoning may be as large; a request beside it is answered meanwhile."""
    async with codex_world(tmp_path) as w:
        item = {**THOUGHT, "encrypted_content": "gAAAA" + "x" * 12_000_000}
        big = event("response.output_item.done", sequence_number=2, output_index=0, item=item)
        sent = b"".join([*codex_events()[:2], big, codex_events(output=[item])[4]])
        w.codex.script = [(200, SSE, [sent[i : i + 16_384] for i in range(0, len(sent), 16_384)])]
        asked, began, longest = asyncio.create_task(w.ask(CODEX, QUESTION)), time.monotonic(), 0
        while not asked.done():
            await asyncio.sleep(0)
            longest, began = max(longest, time.monotonic() - began), time.monotonic()
        assert (await asked).bytes == sent
        assert longest < 1


@pytest.mark.parametrize("kind", ["response.completed", "response.incomplete"])
@in_loop
async def test_a_stream_is_folded_for_who_asked_for_none(tmp_path, kind):
    async with codex_world(tmp_path) as w:
        w.codex.usual = (200, SSE, codex_events("gpt-5.4-2026", kind))
        asked = {key: value for key, value in QUESTION.items() if key != "stream"}
        status, body, headers = await w.ask_json(CODEX, asked)
        assert w.codex.body()["stream"] is True
        assert (status, headers["Content-Type"]) == (200, "application/json")
        assert body == reply("gpt-5.4", status=kind.partition(".")[2], output=[TEXT_ITEM])


@pytest.mark.parametrize(("asked", "served", "effort"), [
    ("gpt-5.4", "gpt-5.4", None), ("gpt-5.4-high", "gpt-5.4", "high"), ("gpt-5.4-xhigh", "gpt-5.4", "xhigh"),
    ("gpt-5.4(low)", "gpt-5.4", "low"), ("gpt-5.4-mini", "gpt-5.4-mini", None), ("gpt-5.4-mini-low", "gpt-5.4-mini", "low"),
    ("gpt-5.4(minimal)", "gpt-5.4", "minimal"), ("gpt-5.4(HIGH)", "gpt-5.4", "high"), ("gpt-5.4(auto)", "gpt-5.4", None),
    ("gpt-5.4(8192)", "gpt-5.4", "medium"), ("gpt-5.4(0)", "gpt-5.4", "none"), ("gpt-5.4(99999)", "gpt-5.4", "xhigh"), ("gpt-5.4()", "gpt-5.4", None), ("gpt-5.1-codex-max", "gpt-5.1-codex-max", None),
    ("gpt-5.4(low", "gpt-5.4(low", None),
])  # fmt: skip
@in_loop
async def test_effort_suffixes(tmp_path, asked, served, effort):
    async with codex_world(tmp_path) as w:
        w.codex.usual = (200, SSE, codex_events(served))
        response = await w.ask(
            CODEX, {**QUESTION, "model": asked, "reasoning": {"summary": "auto"}}
        )
        assert response.headers["x-ampproxy-model"] == served
        body = w.codex.body()
        assert (body["model"], body["reasoning"].get("effort"), body["reasoning"]["summary"]) == (
            served,
            effort,
            "auto",
        )
        named = [e["response"]["model"] for e in data_of(response.bytes) if "response" in e]
        assert named == [asked] * 3


SPENT = {"error": {"type": "usage_limit_reached", "message": "spent", "plan_type": "plus",
                   "resets_at": 1_800_003_600, "resets_in_seconds": 3600}}  # fmt: skip
CODEX_ROWS = {  # what ChatGPT says: which rests, for how long, requests made
    "a spent plan": (answer_json(SPENT, 429), "", 1800, 2),
    "a plan without Codex": (answer_json({"error": {"type": "usage_not_included", "message": "no"}}, 429), "", 1800, 2),
    "a throttle": (answer_json({"error": {"code": "rate_limit_exceeded"}}, 429, **{"Retry-After": "2"}), None, 0, 2),
    "a model that the plan lacks": (answer_json(
        {"detail": "The 'gpt-5.4' model is not supported when using Codex with a ChatGPT account."}, 400), "gpt-5.4", 1800, 2),
    "404": (answer_json({"detail": "Not Found"}, 404), "gpt-5.4", 1800, 2),
    "a full house": (answer_json({"error": {"message": "Selected model is at capacity"}}, 503), "gpt-5.4", 60, 2),
    "401": (answer_json({"detail": "Unauthorized"}, 401), "", float("inf"), 3),
    "a dead connection": ((200, {}, ["cut"]), "", 5, 4),
    "failed before a word": ((200, SSE, [codex_events()[0], event("response.failed", response=reply(
        status="failed", error={"code": "rate_limit_exceeded", "message": "wait"}))]), "", 60, 2),
    "an error before a word": ((200, SSE, [event("error", code="server_is_overloaded", message="x")]), "", 5, 4),
    "cut before a word": ((200, SSE, codex_events()[:2]), "", 5, 4),
    "garbage": ((200, SSE, [b"data: {x}\n\n"]), "", 5, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", CODEX_ROWS)
@in_loop
async def test_what_chatgpts_errors_mean(tmp_path, name):
    """The next account answers, and the client sees nothing of it."""
    answer, what, length, count = CODEX_ROWS[name]
    async with codex_world(tmp_path, ("ann@example.com", "bob@example.com")) as w:
        failing = "ann@example.com"

        async def play(request):
            given = (
                answer
                if failing in request.headers["Authorization"] or what is None
                else w.codex.usual_answer
            )
            if what is None:
                w.codex.usual = w.codex.usual_answer
            return await respond(request, given)

        w.codex.usual_answer, w.codex.usual = (200, SSE, codex_events()), play
        w.authority.usual = answer_json({"access_token": "tok-" + failing, "expires_in": 9999})
        response = await w.ask(CODEX, QUESTION)
        assert response.status == 200, response.bytes
        assert data_of(response.bytes)[-1]["type"] == "response.completed"
        assert len(w.codex.requests) == count
        assert resting(w) == ({} if what is None else {what: length})


async def respond(request, answer):
    status, headers, parts = answer
    if parts == ["cut"]:
        request.transport.abort()
        return web.Response()
    return web.Response(status=status, headers=headers, body=b"".join(parts))


@in_loop
async def test_a_spent_plan_is_told_as_codex_understands_it(tmp_path):
    async with codex_world(
        tmp_path, ("ann@example.com", "bob@example.com"), ampcode={"fallback": "never"}
    ) as w:
        w.codex.usual = answer_json(SPENT, 429)
        status, body, headers = await w.ask_json(CODEX, QUESTION)
        assert (status, body["error"]["type"], headers["x-should-retry"]) == (
            429,
            "usage_limit_reached",
            "false",
        )
        assert body["error"]["resets_in_seconds"] == int(headers["Retry-After"]) == 1800
        assert body["error"]["resets_at"] == 1_800_001_800


@pytest.mark.parametrize(
    ("wait", "kind"), [("3600", "usage_limit_reached"), ("20", "rate_limit_exceeded")]
)
@in_loop
async def test_a_long_throttle_is_told_likewise(tmp_path, wait, kind):
    """Codex would sit through any other 429 without a word (clients.md)."""
    async with codex_world(tmp_path, **{"max-retry-interval": 0}) as w:
        refused = {"error": {"type": "rate_limit_exceeded", "message": "slowly"}}
        w.codex.usual = answer_json(refused, 429, **{"Retry-After": wait})
        status, body, headers = await w.ask_json(CODEX, QUESTION)
        assert (status, body["error"]["type"], headers["Retry-After"]) == (429, kind, wait)
        assert body["error"].get("resets_in_seconds") == (3600 if wait == "3600" else None)


@in_loop
async def test_an_error_without_the_dialects_shape_is_given_it(tmp_path):
    async with codex_world(tmp_path) as w:
        w.codex.usual = answer_json({"detail": "Unsupported parameter: x"}, 400)
        status, body, _ = await w.ask_json(CODEX, QUESTION)
        assert (status, body["error"]["message"]) == (400, "Unsupported parameter: x")
        assert resting(w) == {}


@in_loop
async def test_reasoning_that_another_account_encrypted_is_left_out_once(tmp_path):
    refused = answer_json({"error": {"code": "invalid_encrypted_content", "message": "no"}}, 400)
    async with codex_world(tmp_path) as w:
        w.codex.script = [refused]
        asked = {**QUESTION, "input": [THOUGHT, {"role": "user", "content": "hi"}]}
        assert (await w.ask(CODEX, asked)).status == 200
        assert [len(w.codex.body(i)["input"]) for i in (0, 1)] == [2, 1]
        w.codex.usual = refused
        assert (await w.ask(CODEX, asked)).status == 400
        assert len(w.codex.requests) == 4


@in_loop
async def test_a_stream_that_breaks_ends_as_codex_understands_it(tmp_path):
    async with codex_world(tmp_path) as w:
        for parts in ([*codex_events()[:3], "cut"], codex_events()[:3]):
            w.codex.script = [(200, SSE, parts)]
            last = data_of((await w.ask(CODEX, QUESTION)).bytes)[-1]
            assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
            assert last["response"]["error"]["message"]
        assert [row["status"] for row in w.server.ledger.requests] == [200, 200]


@in_loop
async def test_an_account_without_an_id_is_not_sent_with_anothers(tmp_path):
    async with codex_world(tmp_path, ("ann@example.com",)) as w:
        codex_file(w.auth, "bob@example.com", account_id=None, id_token="")
        w.server.tick()
        w.codex.script = [answer_json(SPENT, 429)]
        assert (await w.ask(CODEX, QUESTION)).status == 200
        sent = {
            r.headers["Authorization"]: r.headers.get("Chatgpt-Account-Id")
            for r in w.codex.requests
        }
        assert sent == {
            "Bearer tok-ann@example.com": "acc-ann@example.com",
            "Bearer tok-bob@example.com": None,
        }


@pytest.mark.parametrize("stream", [True, False])
@in_loop
async def test_a_request_that_the_model_refuses_is_the_clients_fault(tmp_path, stream):
    failed = event(
        "response.failed",
        response=reply(status="failed", error={"code": "invalid_prompt", "message": "no"}),
    )
    async with codex_world(tmp_path) as w:
        w.codex.usual = (200, SSE, [codex_events()[0], failed])
        path = "/api/provider/openai/v1/responses"
        status, body, _ = await w.ask_json(path, {**QUESTION, "stream": stream})
        assert (status, "no" in body["error"]["message"]) == (400, True)
        assert (len(w.codex.requests), w.amp.requests, resting(w)) == (1, [], {})


@in_loop
async def test_a_failure_after_the_first_word_passes_with_its_words(tmp_path):
    failed = event("response.failed", sequence_number=9, response=reply(
        status="failed", error={"code": "context_length_exceeded", "message": "too much"}))  # fmt: skip
    async with codex_world(tmp_path) as w:
        for cut in (3, 2):  # in one piece with what came before, and behind it
            sent = codex_events()[:3]
            w.codex.script = [(200, SSE, [b"".join(sent[:cut]), b"".join([*sent[cut:], failed])])]
            response = await w.ask(CODEX, QUESTION)
            assert response.bytes == b"".join([*sent, failed])
        w.codex.script = [(200, SSE, [b"".join([*codex_events()[:4], failed])])] * 3
        status, body, _ = await w.ask_json(CODEX, {**QUESTION, "stream": False})
        assert (status, "too much" in body["error"]["message"]) == (400, True)


@in_loop
async def test_what_follows_the_end_or_looks_like_it_changes_nothing(tmp_path):
    tools = [{"type": "function", "name": "f", "parameters": {"enum": ["response.completed"]}}]
    quiet = event("codex.rate_limits", plan="plus")
    async with codex_world(tmp_path) as w:
        w.codex.script = [(200, SSE, [*codex_events(), quiet, b"data: {broken\n\n"])]
        status, body, _ = await w.ask_json(CODEX, {**QUESTION, "stream": False})
        assert (status, body["output"]) == (200, [TEXT_ITEM])
        start = event("response.created", response=reply(status="in_progress", tools=tools))
        w.codex.script = [(200, SSE, [start, codex_events()[2]])]
        got = data_of((await w.ask(CODEX, QUESTION)).bytes)
        assert [e["type"] for e in got] == [
            "response.created",
            "response.output_text.delta",
            "response.failed",
        ]
        two = [event("response.output_item.done", item={**TEXT_ITEM, "id": name}) for name in "ab"]
        w.codex.script = [(200, SSE, [*two, codex_events()[4]])]
        status, body, _ = await w.ask_json(CODEX, {**QUESTION, "stream": False})
        assert [item["id"] for item in body["output"]] == ["a", "b"]


@pytest.mark.parametrize(
    "body",
    [{"model": "gpt-5.4(high)", "reasoning": "x"}, {"input": [1, None, "x"]}, {"tools": None}],
)
@in_loop
async def test_odd_bodies_are_the_backends_to_judge(tmp_path, body):
    async with codex_world(tmp_path) as w:
        w.codex.usual = answer_json(
            {"error": {"code": "invalid_encrypted_content", "message": "odd"}}, 400
        )
        status, answer, _ = await w.ask_json(CODEX, {**QUESTION, **body})
        assert (status, answer["error"]["message"]) == (400, "odd")


@in_loop
async def test_an_id_token_without_an_address_still_tells_the_account(tmp_path):
    told = id_token(email=None)
    assert ampproxy.claims({"id_token": told}) == {"account_id": "acc-1", "plan": "plus"}
    given = {"access_token": "tok", "refresh_token": "rt_1", "id_token": told, "expires_in": 99}
    async with codex_authority(tmp_path, answer_json(given)):
        with Cli(tmp_path, "login", "codex", "--no-browser") as cli:
            asked = query_of(await cli.until("paste the address"))
            status, _, _ = await cli.end(f"{asked['redirect_uri']}?code=c&state={asked['state']}\n")
    assert status == 0
    (path,) = tmp_path.glob("auth/codex-account-*.json")
    assert json.loads(path.read_text())["account_id"] == "acc-1"


@pytest.mark.parametrize("looked", [True, False])
@in_loop
async def test_a_login_made_during_a_refresh_is_not_overwritten(tmp_path, looked):
    async with codex_world(tmp_path, ()) as w:
        path = codex_file(w.auth, expired="2020-01-01T00:00:00Z")
        w.server.tick()

        async def meanwhile(request):
            login = json.loads(path.read_text()) | {
                "access_token": "C",
                "refresh_token": "rt_C",
                "expired": "2030-01-01T00:00:00Z",
            }
            ampproxy.save_token(path, login)
            if looked:
                w.server.tick()
            return web.json_response(
                {"access_token": "B", "refresh_token": "rt_B", "expires_in": 9999}
            )

        w.authority.usual = meanwhile
        assert (await w.ask(CODEX, QUESTION)).status == 200
        assert w.codex.last.headers["Authorization"] == "Bearer C"
        assert json.loads(path.read_text())["refresh_token"] == "rt_C"


@in_loop
async def test_an_edit_over_an_older_token_keeps_both(tmp_path):
    async with codex_world(tmp_path, ()) as w:
        path = codex_file(w.auth, expired="2020-01-01T00:00:00Z")
        before = json.loads(path.read_text())
        w.server.tick()
        w.authority.usual = answer_json(
            {"access_token": "B", "refresh_token": "rt_B", "expires_in": 9999}
        )
        assert (await w.ask(CODEX, QUESTION)).status == 200
        path.write_text(json.dumps({**before, "priority": 9, "disabled": True}))
        w.server.tick()
        token = json.loads(path.read_text())
        assert (token["refresh_token"], token["priority"], token["disabled"]) == ("rt_B", 9, True)


@in_loop
async def test_chatgpts_quota(tmp_path):
    told = {"x-codex-primary-used-percent": "42.5", "x-codex-primary-window-minutes": "300",
            "x-codex-primary-reset-at": "1800003600", "x-codex-secondary-used-percent": "97"}  # fmt: skip
    async with codex_world(tmp_path) as w:
        w.codex.usual = (200, {**SSE, **told}, codex_events())
        await w.ask(CODEX, QUESTION)
        quota = (await w.ask_json("/status", method="GET"))[1]["accounts"][0]["quota"]
        assert quota == [{"window": "primary", "used_percent": 42.5, "resets_in_seconds": 3600},
                         {"window": "secondary", "used_percent": 97, "resets_in_seconds": 0}]  # fmt: skip


@in_loop
async def test_compaction_is_not_streamed(tmp_path):
    async with codex_world(tmp_path) as w:
        w.codex.usual = answer_json({"output": [{"type": "compaction"}]})
        status, body, _ = await w.ask_json("/v1/responses/compact", QUESTION)
        assert (status, body) == (200, {"output": [{"type": "compaction"}]})
        assert (w.codex.last.path, "stream" in w.codex.body()) == (
            "/backend-api/codex/responses/compact",
            False,
        )


@in_loop
async def test_each_model_has_its_provider(tmp_path):
    async with codex_world(tmp_path) as w:
        token_file(w.auth, "ann@example.com")
        w.server.tick()
        assert (await w.ask(CODEX, QUESTION)).headers["x-ampproxy-provider"] == "codex"
        assert (await w.ask("/v1/messages", ASK)).headers["x-ampproxy-provider"] == "claude"
        nothing = {"model": "gpt-5.4", "messages": []}
        assert (await w.ask("/v1/chat/completions", nothing)).status == 400
        assert (len(w.codex.requests), len(w.claude.requests)) == (1, 1)


@pytest.mark.parametrize("base", ["/v1", "/api/provider/openai/v1"])
@in_loop
async def test_the_openai_sdk(tmp_path, base):
    openai = pytest.importorskip("openai")
    call = {
        "type": "function_call",
        "id": "fc_1",
        "call_id": "call_1",
        "name": "f",
        "arguments": "{}",
        "status": "completed",
    }
    tool = {
        "type": "function",
        "name": "f",
        "parameters": {"type": "object", "properties": {}},
        "strict": False,
    }
    image = {"type": "input_image", "image_url": "data:image/png;base64,AA==", "detail": "auto"}
    async with codex_world(tmp_path) as w:
        client = openai.AsyncOpenAI(api_key="k", base_url=w.url + base, max_retries=0)
        asked = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}, image]}]
        answer = await client.responses.create(
            model="gpt-5.4-high", input=asked, max_output_tokens=9
        )
        assert (answer.output_text, answer.model, answer.usage.output_tokens) == (
            "hi",
            "gpt-5.4-high",
            3,
        )
        assert w.codex.body()["input"] == asked
        w.codex.usual = (200, SSE, [*codex_events()[:2], event("response.output_item.done", sequence_number=2,
                                    output_index=0, item=call), codex_events()[4]])  # fmt: skip
        answer = await client.responses.create(model="gpt-5.4", input="hi", tools=[tool])
        assert (answer.output[0].name, w.codex.body()["tools"]) == ("f", [tool])
        w.codex.usual = (200, SSE, codex_events())
        kinds = [
            e.type
            async for e in await client.responses.create(model="gpt-5.4", input="hi", stream=True)
        ]
        assert kinds == [e["type"] for e in data_of(b"".join(codex_events()))]
        w.codex.usual = answer_json(
            {"error": {"message": "no", "type": "invalid_request_error"}}, 400
        )
        with pytest.raises(openai.BadRequestError, match="no"):
            await client.responses.create(model="gpt-5.4", input="hi")
        await client.close()


# == API keys ======================================================================================

CHAT = {"model": "gpt-5.4", "messages": [{"role": "user", "content": "hi"}]}
CONTENTS = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}


def data(value):
    return f"data: {json.dumps(value)}\n\n".encode()


def completion(model="gpt-5.4"):
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "hé"},
        "finish_reason": "stop",
    }
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [choice],
        "usage": usage,
    }


def completion_chunks(model="gpt-5.4"):
    def chunk(delta, end=None):
        return data({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": model,
                     "choices": [{"index": 0, "delta": delta, "finish_reason": end}]})  # fmt: skip

    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    last = {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": model,
        "choices": [],
        "usage": usage,
    }
    return [chunk({"role": "assistant", "content": ""}), chunk({"content": "hé"}), chunk({}, "stop"),
            data(last), b"data: [DONE]\n\n"]  # fmt: skip


def content(model="gemini-2.5-pro", text="hé", end="STOP"):
    candidate = {"content": {"role": "model", "parts": [{"text": text}]}, "index": 0}
    usage = {"promptTokenCount": 5, "candidatesTokenCount": 3, "totalTokenCount": 8}
    return {"candidates": [candidate | ({"finishReason": end} if end else {})], "usageMetadata": usage,
            "modelVersion": model}  # fmt: skip


def content_chunks(model="gemini-2.5-pro"):
    return [data(content(model, "h", None)), data(content(model, "é"))]


def models_path(model, verb="generateContent", query=""):
    return f"/v1beta/models/{model}:{verb}{query}"


KINDS = {  # the list: model, path, body, its path upstream, the header with the key, an answer, a stream
    "claude-api-key": ("claude-opus-4-6", "/v1/messages", ASK, "/v1/messages", "Authorization", message, events),
    "codex-api-key": ("gpt-5.4", CODEX, QUESTION, "/v1/responses", "Authorization", reply, codex_events),
    "gemini-api-key": ("gemini-2.5-pro", models_path("{}"), CONTENTS, models_path("{}"), "x-goog-api-key",
                       content, content_chunks),
    "openai-compatibility": ("gpt-5.4", "/v1/chat/completions", CHAT, "/v1/chat/completions", "Authorization",
                             completion, completion_chunks),
}  # fmt: skip


def key_entry(kind, url, *keys, **more):
    if kind == "openai-compatibility":
        entry = {"name": "router", "api-key-entries": [{"api-key": key} for key in keys]}
        return [{**entry, "base-url": url, "models": ["gpt-*"], **more}]
    return [{"api-key": key, "base-url": url, **more} for key in keys]


@asynccontextmanager
async def key_world(folder, kind, keys=("k-one",), suffix="", tokens=(), config=None, **more):
    """A world with API keys of one kind."""
    keyed = FakeUpstream(None)
    async with keyed.open(), world(folder, tokens=tokens) as w:
        w.keyed, keyed.usual = keyed, answer_json(KINDS[kind][5]())
        w.reload(**{kind: key_entry(kind, keyed.url + suffix, *keys, **more)}, **(config or {}))
        w.server.tick()
        yield w


def asked_as(kind, model=None, stream=False):
    """Path and body of a request to the kind of provider."""
    given, path, body, *_ = KINDS[kind]
    if kind == "gemini-api-key":
        verb = "streamGenerateContent" if stream else "generateContent"
        return models_path(model or given, verb, "?alt=sse" if stream else ""), body
    return path, {**body, "model": model or given, "stream": stream}


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
@pytest.mark.parametrize("kind", KINDS)
@in_loop
async def test_what_reaches_a_provider_with_a_key(tmp_path, kind, suffix):
    suffix = suffix.replace("v1", "v1beta") if kind == "gemini-api-key" else suffix
    async with key_world(tmp_path, kind, suffix=suffix, headers={"X-Mine": "1"}) as w:
        model, _, _, there, header, answer, _ = KINDS[kind]
        path, body = asked_as(kind)
        status, got, headers = await w.ask_json(
            path, body, headers={**CLIENT, "X-Amp-Thread-Id": "T-1"}
        )
        assert (status, got) == (200, answer())
        sent = w.keyed.last
        assert "sgamp_" not in str(sent.headers)
        assert sent.raw_path == there.format(model)
        assert sent.headers[header] == ("Bearer k-one" if header == "Authorization" else "k-one")
        assert sent.headers["X-Mine"] == "1"
        assert [name for name in ("Authorization", "X-Api-Key", "X-Goog-Api-Key") if name in sent.headers] == [
            name for name in ("Authorization", "X-Goog-Api-Key") if name.lower() == header.lower()]  # fmt: skip
        assert not sent.headers.keys() & {
            "Cookie",
            "X-Amp-Thread-Id",
            "originator",
            "Chatgpt-Account-Id",
        }
        assert w.keyed.body() == body
        assert headers["x-ampproxy-route"] == "local"
        assert headers["x-ampproxy-provider"] == (
            "router" if kind == "openai-compatibility" else kind
        )


@in_loop
async def test_a_key_of_anthropic_itself_goes_where_its_sdk_puts_it(tmp_path):
    """To no other host; here the proxy's outbound proxy is the one that sees the request."""
    outside = FakeUpstream(answer_json(message()))
    async with outside.open(), key_world(tmp_path, "claude-api-key") as w:
        for host, header in (
            ("api.anthropic.com", "X-Api-Key"),
            ("elsewhere.example", "Authorization"),
        ):
            w.reload(
                **{
                    "claude-api-key": [{"api-key": "k-one", "base-url": f"http://{host}"}],
                    "proxy-url": outside.url,
                }
            )
            w.server.tick()
            assert (await w.ask("/v1/messages", ASK)).status == 200
            sent = outside.last
            assert (sent.headers["Host"], sent.path) == (host, "/v1/messages")
            assert sent.headers[header].removeprefix("Bearer ") == "k-one"
            assert len({"X-Api-Key", "Authorization"} & sent.headers.keys()) == 1


@pytest.mark.parametrize("size", [1, 7, 100_000])
@pytest.mark.parametrize("served", ["other", "mine"])
@pytest.mark.parametrize("kind", KINDS)
@in_loop
async def test_streams_of_keys_carry_the_asked_name(tmp_path, kind, served, size):
    models = [{"name": "other", "alias": "mine"}, "some-*"]
    async with key_world(tmp_path, kind, models=models) as w:
        stream = KINDS[kind][6]
        sent = b"".join(stream(served))
        w.keyed.usual = (200, SSE, [sent[i : i + size] for i in range(0, len(sent), size)])
        path, body = asked_as(kind, "mine", stream=True)
        response = await w.ask(path, body)
        wanted = b"".join(stream("mine"))
        if kind == "codex-api-key":  # its lost output comes back
            assert [e["type"] for e in data_of(response.bytes)] == [
                e["type"] for e in data_of(wanted)
            ]
            assert b'"other"' not in response.bytes
        else:
            assert response.bytes == wanted
        assert response.headers["x-ampproxy-model"] == "other"
        there = w.keyed.last.raw_path if kind == "gemini-api-key" else w.keyed.body()["model"]
        assert "other" in there
        assert w.server.ledger.requests[-1]["output_tokens"] in (3, 7)
        w.keyed.usual = answer_json(KINDS[kind][5](served))
        path, body = asked_as(kind, "mine")
        assert (await w.ask_json(path, body))[1] == KINDS[kind][5]("mine")


@pytest.mark.parametrize("kind", KINDS)
@in_loop
async def test_keys_of_one_list_rotate_and_stand_in_for_each_other(tmp_path, kind):
    async with key_world(tmp_path, kind, ("k-one", "k-two", "k-three")) as w:
        path, body = asked_as(kind)
        _, _, _, _, header, *_ = KINDS[kind]

        async def used():
            response = await w.ask(path, body)
            assert response.status == 200
            return w.keyed.last.headers[header].removeprefix("Bearer ")

        assert {await used() for _ in range(3)} == {"k-one", "k-two", "k-three"}

        async def refuse(request):
            good = "k-two" in request.headers[header]
            return web.json_response(
                KINDS[kind][5]() if good else {"error": {"message": "no"}},
                status=200 if good else 401,
            )

        w.keyed.usual = refuse
        assert [await used() for _ in range(3)] == ["k-two"] * 3
        report = (await w.ask_json("/status", method="GET"))[1]["accounts"]
        assert Counter(row["state"] for row in report) == {"resting": 2, "ready": 1}
        assert {row["wakes_in_seconds"] for row in report} == {1800, None}
        assert not re.search(rb"k-(one|two|three)", (await w.ask("/status", method="GET")).bytes)


@in_loop
async def test_plans_come_before_keys(tmp_path):
    async with key_world(tmp_path, "claude-api-key", tokens=("fred@example.com",)) as w:
        assert (await w.ask(PATH, ASK)).headers["x-ampproxy-provider"] == "claude"
        w.claude.usual = limit(**{"Retry-After": "900"})
        response = await w.ask(PATH, ASK)
        assert (response.status, response.headers["x-ampproxy-provider"]) == (200, "claude-api-key")
        assert not w.amp.requests


@in_loop
async def test_a_key_row_takes_only_its_models(tmp_path):
    async with key_world(tmp_path, "codex-api-key", **{"excluded-models": ["*-mini"]}) as w:
        assert (await w.ask(CODEX, QUESTION)).status == 200
        assert (await w.ask(CODEX, {**QUESTION, "model": "gpt-5.4-mini"})).status == 404
        assert (await w.ask(CODEX, {**QUESTION, "model": "claude-opus-4-6"})).status == 404
        assert len(w.keyed.requests) == 1


@in_loop
async def test_a_key_of_openai_is_no_chatgpt_login(tmp_path):
    """None of the plan backend's rules: what the client says is what is asked."""
    body = {
        "model": "gpt-5.4",
        "input": "hi",
        "previous_response_id": "resp_0",
        "max_output_tokens": 9,
        "temperature": 1,
    }
    async with key_world(tmp_path, "codex-api-key") as w:
        w.keyed.usual = answer_json(reply(output=[TEXT_ITEM]))
        assert (await w.ask_json(CODEX, body))[1] == reply(output=[TEXT_ITEM])
        assert w.keyed.body() == body
        w.keyed.usual = answer_json(completion())
        assert (await w.ask_json("/v1/chat/completions", CHAT))[1] == completion()
        assert w.keyed.last.path == "/v1/chat/completions"


@in_loop
async def test_an_effort_suffix_is_said_in_chat(tmp_path):
    async with key_world(tmp_path, "openai-compatibility") as w:
        response = await w.ask("/v1/chat/completions", {**CHAT, "model": "gpt-5.4(high)"})
        assert (w.keyed.body()["model"], w.keyed.body()["reasoning_effort"]) == ("gpt-5.4", "high")
        assert json.loads(response.bytes)["model"] == "gpt-5.4(high)"


@pytest.mark.parametrize("kind", KINDS)
@in_loop
async def test_a_key_that_leaves_the_config_is_used_no_more(tmp_path, kind):
    async with key_world(tmp_path, kind) as w:
        path, body = asked_as(kind)
        assert (await w.ask(path, body)).status == 200
        w.reload()
        w.server.tick()
        assert (await w.ask(path, body)).status == 404
        assert (await w.ask_json("/status", method="GET"))[1]["accounts"] == []


@pytest.mark.parametrize("kind", KINDS)
@in_loop
async def test_a_stream_that_dies_ends_as_its_dialect_ends(tmp_path, kind):
    async with key_world(tmp_path, kind) as w:
        start = KINDS[kind][6]()[: 3 if kind == "codex-api-key" else 1]
        w.keyed.usual = (200, SSE, [*start, "cut"])
        path, body = asked_as(kind, stream=True)
        if kind != "gemini-api-key":
            assert (await w.ask(path, body)).bytes.startswith(b"".join(start))
            last = data_of((await w.ask(path, body)).bytes)[-1]
            told = last["response"]["error"] if kind == "codex-api-key" else last["error"]
            assert "broke off" in told["message"]
            return
        request = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(json.dumps(body))}\r\n\r\n{json.dumps(body)}"
        got = await raw_exchange(w.port, request.encode())
        assert data_of(got)[-1]["error"]["status"] == "INTERNAL"
        assert not got.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("kind", ["openai-compatibility", "gemini-api-key"])
@in_loop
async def test_errors_of_key_providers(tmp_path, kind):
    shape = {"error": {"code": 429, "message": "slow down", "status": "RESOURCE_EXHAUSTED"}}
    async with key_world(tmp_path, kind, config={"max-retry-interval": 0}) as w:
        path, body = asked_as(kind)
        w.keyed.usual = answer_json(shape, 429)
        status, got, headers = await w.ask_json(path, body)
        assert (status, got) == (429, shape)
        (account,) = w.server.pool.accounts.values()
        assert (account.wait(KINDS[kind][0], w.clock.monotonic()), "Retry-After" in headers) == (
            60,
            False,
        )
        w.clock.now += 100
        w.keyed.usual = answer_json(
            {"error": {"code": 400, "message": "bad", "status": "INVALID_ARGUMENT"}}, 400
        )
        assert (await w.ask_json(path, body))[:2] == (
            400,
            {"error": {"code": 400, "message": "bad", "status": "INVALID_ARGUMENT"}},
        )
        w.clock.now += 100
        path, body = asked_as(kind, stream=True)
        w.keyed.usual = (
            200,
            SSE,
            [data({"error": {"code": 503, "message": "full", "status": "UNAVAILABLE"}})],
        )
        assert (await w.ask(path, body)).status == 503


@in_loop
async def test_one_models_quota_at_google_is_not_the_keys(tmp_path):
    gone = {"error": {"code": 429, "message": "Quota exceeded", "status": "RESOURCE_EXHAUSTED", "details": [
        {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "37.5s"}]}}  # fmt: skip
    async with key_world(tmp_path, "gemini-api-key", config={"max-retry-interval": 0}) as w:
        w.keyed.usual = answer_json([gone], 429)  # a list, as Google sometimes words it
        assert (await w.ask_json(models_path("gemini-2.5-pro"), CONTENTS))[0] == 429
        (account,) = w.server.pool.accounts.values()
        assert account.wait("gemini-2.5-pro", w.clock.monotonic()) == pytest.approx(37.5)
        w.keyed.usual = answer_json(content("gemini-2.5-flash"))
        assert (await w.ask(models_path("gemini-2.5-flash"), CONTENTS)).status == 200


@pytest.mark.parametrize(("kind", "status", "words"), [
    ("gemini-api-key", 400, "API key not valid. Please pass a valid API key."), ("claude-api-key", 401, "invalid x-api-key"),
    ("claude-api-key", 400, "Your credit balance is too low to access the Anthropic API."), ("codex-api-key", 429, "You exceeded your current quota"),
])  # fmt: skip
@in_loop
async def test_a_key_that_is_no_good_is_unseen_beside_a_good_one(tmp_path, kind, status, words):
    """And is asked again after max-cooldown, as no login could ever wake it."""
    async with key_world(tmp_path, kind, ("k-bad", "k-good")) as w:

        async def play(request):
            bad = "k-bad" in str(request.headers)
            return await respond(
                request,
                answer_json({"error": {"message": words}}, status)
                if bad
                else answer_json(KINDS[kind][5]()),
            )

        w.keyed.usual = play
        path, body = asked_as(kind)
        assert [(await w.ask(path, body)).status for _ in range(4)] == [200] * 4
        tried = len([r for r in w.keyed.requests if "k-bad" in str(r.headers)])
        assert tried in (1, 2)
        w.clock.now += 1801
        for _ in range(2):
            await w.ask(path, body)
        assert len([r for r in w.keyed.requests if "k-bad" in str(r.headers)]) > tried


@in_loop
async def test_much_may_follow_the_end_of_a_gemini_stream(tmp_path):
    last = content("gemini-2.5-pro", "é")
    last["candidates"][0]["groundingMetadata"] = {"text": "x" * 200_000}
    sent = [content_chunks()[0], data(last)]
    path = "/api/provider/google" + models_path(
        "gemini-2.5-pro", "streamGenerateContent", "?alt=sse"
    )
    async with key_world(tmp_path, "gemini-api-key") as w:
        for fake in (w.keyed, w.amp):
            fake.usual = (200, SSE, sent)
            assert (await w.ask(path, CONTENTS)).bytes == b"".join(sent)
            w.reload(**{"gemini-api-key": []})
            w.server.tick()


@pytest.mark.parametrize("served", ["gemini-2.5-pro", "another"])
@in_loop
async def test_googles_own_error_in_a_stream_ends_the_connection(tmp_path, served):
    """A clean end would be asked again at full speed (clients.md)."""
    async with key_world(tmp_path, "gemini-api-key") as w:
        gate, got = asyncio.Event(), b""
        gone = {"error": {"code": 503, "message": "overloaded", "status": "UNAVAILABLE"}}
        w.keyed.usual = (200, SSE, [content_chunks(served)[0], gate, data(gone)])
        url = w.url + models_path("gemini-2.5-pro", "streamGenerateContent", "?alt=sse")
        async with w.http.post(url, data=json.dumps(CONTENTS)) as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                while True:
                    got += await response.content.readany()
                    gate.set()
        assert "overloaded" in data_of(got)[-1]["error"]["message"]
        assert len(w.keyed.requests) == 1


@in_loop
async def test_a_cut_chat_stream_with_an_empty_error_field_is_not_whole(tmp_path):
    async with key_world(tmp_path, "openai-compatibility") as w:
        chunk = data(
            {
                "error": None,
                "model": "gpt-5.4",
                "choices": [{"index": 0, "delta": {"content": "x"}}],
            }
        )
        w.keyed.usual = (200, SSE, [chunk, chunk, "cut"])
        response = await w.ask("/v1/chat/completions", {**CHAT, "stream": True})
        assert "broke off" in data_of(response.bytes)[-1]["error"]["message"]


OPEN_ENDS = {  # a stream, and whether its last event ends it at once or after a moment
    "claude-api-key": (events, "at once"), "codex-api-key": (lambda: codex_events(output=[TEXT_ITEM]), "at once"),
    "openai-compatibility": (completion_chunks, "at once"), "gemini-api-key": (content_chunks, "a moment"),
    "chat without [DONE]": (lambda: completion_chunks()[:-1], "a moment"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPEN_ENDS)
@in_loop
async def test_an_answer_is_over_with_its_last_event(tmp_path, monkeypatch, name):
    """Although the provider keeps the connection open; and nothing behind it is passed on."""
    monkeypatch.setattr(ampproxy, "SETTLE_WAIT", 0.2)
    kind = name if name in KINDS else "openai-compatibility"
    stream, when = OPEN_ENDS[name][0](), OPEN_ENDS[name][1]
    async with key_world(tmp_path, kind) as w:
        never = asyncio.Event()
        late = [b'data: {"late": 1}\n\n'] if when == "at once" else []
        w.keyed.usual = (200, SSE, [b"".join([*stream, *late]), never])
        path, body = asked_as(kind, stream=True)
        began = time.monotonic()
        response = await w.ask(path, body)
        assert response.bytes == b"".join(stream)
        assert time.monotonic() - began < 5
        assert not [a for a in w.server.pool.accounts.values() if a.in_flight or a.rests]
        assert w.server.ledger.requests[0]["output_tokens"] in (3, 7)


async def piece_by_piece(request, pieces, pause):
    response = web.StreamResponse(headers=SSE)
    await response.prepare(request)
    for piece in pieces:
        await response.write(piece)
        await asyncio.sleep(pause)
    return response


@in_loop
async def test_an_end_without_an_answer_does_not_end_the_next_try(tmp_path):
    """Whose answer is whole, whatever the first one said of itself."""
    async with key_world(tmp_path, "openai-compatibility") as w:
        pieces = completion_chunks()
        w.keyed.script = [(200, SSE, [b"data: [DONE]\n\n"])]
        w.keyed.usual = lambda request: piece_by_piece(request, pieces, 0.02)
        path, body = asked_as("openai-compatibility", stream=True)
        assert (await w.ask(path, body)).bytes == b"".join(pieces)
        assert len(w.keyed.requests) == 2


@in_loop
async def test_the_next_try_may_think_as_long_as_the_first(tmp_path, monkeypatch):
    """Although that one had said why it ends, and then nothing."""
    monkeypatch.setattr(ampproxy, "SETTLE_WAIT", 0.1)
    async with key_world(tmp_path, "gemini-api-key") as w:
        silence = data(content("gemini-2.5-pro", "", "STOP"))
        w.keyed.script = [lambda request: piece_by_piece(request, [silence], 0.02)]
        w.keyed.usual = lambda request: piece_by_piece(request, content_chunks(), 0.4)
        response = await w.ask("/v1/messages", {**STREAM, "model": "gemini-2.5-pro"})
        assert (response.status, len(w.keyed.requests)) == (200, 2)
        assert b'{"type":"message_stop"}' in response.bytes


@pytest.mark.parametrize(("entry", "path"), [
    ({"base-url": "{}/v1beta/openai", "api-key-entries": [{"api-key": "k"}]}, "/v1beta/openai/chat/completions"),
    ({"base-url": "{}/v1beta/openai/", "api-key-entries": [{"api-key": "k"}]}, "/v1beta/openai/chat/completions"),
    ({"base-url": "{}/api/v1", "api-key-entries": [{"api-key": "k"}]}, "/api/v1/chat/completions"),
    ({"base-url": "{}"}, "/v1/chat/completions"),  # a server on this machine that wants no key
])  # fmt: skip
@in_loop
async def test_addresses_of_compatible_services(tmp_path, entry, path):
    async with key_world(tmp_path, "openai-compatibility") as w:
        entry = {**entry, "base-url": entry["base-url"].format(w.keyed.url)}
        w.reload(**{"openai-compatibility": [{"name": "o", "models": ["gpt-*"], **entry}]})
        w.server.tick()
        assert (await w.ask("/v1/chat/completions", CHAT)).status == 200
        assert w.keyed.last.path == path


@in_loop
async def test_an_empty_base_url_is_the_providers_own(tmp_path):
    live = load(tmp_path, "gemini-api-key: [{api-key: k, base-url: ''}]")
    assert [row.provider.base_url for row in live.rows][
        -1
    ] == "https://generativelanguage.googleapis.com"


@in_loop
async def test_a_key_that_goes_while_it_is_asked_leaves_the_providers_words(tmp_path):
    async with key_world(tmp_path, "claude-api-key") as w:

        async def replaced(request):
            w.reload(**{"claude-api-key": key_entry("claude-api-key", w.keyed.url, "k-new")})
            w.server.tick()
            return await respond(request, answer_json({"error": {"message": "not for you"}}, 403))

        w.keyed.usual = replaced
        status, body, _ = await w.ask_json("/v1/messages", ASK)
        assert (status, body["error"]["message"]) == (403, "not for you")


# == Google logins =================================================================================
#
# Gemini Code Assist and Antigravity, from the address to the file and from the call to the answer.
# One FakeCodeAssist stands for all of Google's hosts that a test needs: what sets up a project is
# answered from `setup`, what is a model call from the script.

GOOGLE = {  # login: its port's path, client id, extra scopes, what asks for a project and for an onboarding
    "gemini": (
        "/oauth2callback", "681255809395-oo8ft2oprdrnp9e3aqf6av3hmdib135j.apps.googleusercontent.com", 3,
        {"metadata": {"ideType": "IDE_UNSPECIFIED", "platform": "PLATFORM_UNSPECIFIED", "pluginType": "GEMINI"}},
        {"tierId": "standard-tier",
         "metadata": {"ideType": "IDE_UNSPECIFIED", "platform": "PLATFORM_UNSPECIFIED", "pluginType": "GEMINI"}},
    ),
    "antigravity": (
        "/oauth-callback", "1071006060591-tmhssin2h21lcre235vtolojh4g403ep.apps.googleusercontent.com", 5,
        {"metadata": {"ideType": "ANTIGRAVITY"}},
        {"tier_id": "standard-tier",
         "metadata": {"ide_type": "ANTIGRAVITY", "ide_version": "2.1.0", "ide_name": "antigravity"}},
    ),
}  # fmt: skip
TIERS = {"allowedTiers": [{"id": "free-tier"}, {"id": "standard-tier", "isDefault": True}]}
GOOGLE_TOKEN = {
    "access_token": "ya29.new",
    "refresh_token": "1//0new",
    "expires_in": 3599,
    "token_type": "Bearer",
}
NOBODY = {"error": {"code": 401, "message": "no", "status": "UNAUTHENTICATED"}}


class FakeCodeAssist(FakeUpstream):
    """`setup`: verb -> answers, of which the last one stays; `calls`: the model calls that came."""

    def __init__(self, usual=None):
        super().__init__(usual or answer_json({"response": content(), "traceId": "t"}))
        named = {"cloudaicompanionProject": "proj-1", "currentTier": {"id": "standard-tier"}}
        self.setup = {"loadCodeAssist": [answer_json(named)], "onboardUser": [answer_json({})]}
        self.setups = []

    async def handle(self, request):
        answers = self.setup.get(request.path.partition(":")[2])
        if answers is None:
            return await super().handle(request)
        request.bytes = await request.read()
        self.setups.append(request)
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if callable(answer):
            return await answer(request)
        return await respond(request, answer)

    def asked(self, verb):
        return [json.loads(r.bytes) for r in self.setups if r.path.endswith(f":{verb}")]


class FakeGoogle(FakeCodeAssist):
    """The login's end points, too, on the same host."""

    token, profile = answer_json(GOOGLE_TOKEN), answer_json({"email": "fred@example.com"})

    async def handle(self, request):
        given = {"/token": self.token, "/profile": self.profile}.get(request.path)
        if given is None:
            return await super().handle(request)
        request.bytes = await request.read()
        self.requests.append(request)
        return await respond(request, given)


@asynccontextmanager
async def google_authority(tmp_path, kind, **row):
    fake = FakeGoogle()
    async with fake.open():
        row = {"authorize-url": fake.url + "/authorize", "token-url": fake.url + "/token", "base-url": fake.url,
               "profile-url": fake.url + "/profile", "callback-port": free_port(), "onboard-pause": 0, **row}  # fmt: skip
        config = {"auth-dir": str(tmp_path / "auth"), "providers": {kind: row}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        yield fake


async def google_login(tmp_path, kind, callback="code=c0de&state={state}"):
    """Status, what was shown, errors, the query of the address."""
    with Cli(tmp_path, "login", kind, "--no-browser") as cli:
        shown = await cli.until("paste the address")
        asked = query_of(shown)
        line = f"{asked['redirect_uri']}?{callback.format(**asked)}\n"
        status, out, err = await cli.end(line)
        return status, shown + out, err, asked


def form_of(request):
    return {name: values[0] for name, values in parse_qs(request.bytes.decode()).items()}


@pytest.mark.parametrize("kind", GOOGLE)
@in_loop
async def test_a_google_login_from_the_address_to_the_file(tmp_path, kind):
    path, client, scopes, load, onboard = GOOGLE[kind]
    async with google_authority(tmp_path, kind) as fake:
        made = {"done": True, "response": {"cloudaicompanionProject": {"id": "proj-9"}}}
        fake.setup = {
            "loadCodeAssist": [answer_json(TIERS)],
            "onboardUser": [answer_json({"done": False}), answer_json({}), answer_json(made)],
        }
        status, out, err, asked = await google_login(tmp_path, kind)
        assert (status, err) == (0, "")
        warning = {"gemini": "in June 2026", "antigravity": "disabled accounts"}[kind]
        assert 0 < out.index(warning) < out.index("/authorize?"), "before the address"
        assert f"Signed in to {kind} as fred@example.com" in out
        assert urlsplit(asked["redirect_uri"]).path == path
        assert asked.items() >= {
            "client_id": client, "access_type": "offline", "prompt": "consent", "code_challenge_method": "S256",
        }.items()  # fmt: skip
        assert (len(asked["scope"].split()), len(asked["state"]) > 30) == (scopes, True)
        token, profile = fake.requests
        sent = form_of(token)
        challenge = hashlib.sha256(sent.pop("code_verifier").encode()).digest()
        assert asked["code_challenge"] == base64.urlsafe_b64encode(challenge).decode().rstrip("=")
        secret = ampproxy.LOGINS[kind].client_secret
        assert sent == {"grant_type": "authorization_code", "code": "c0de", "client_id": client,
                        "client_secret": secret, "redirect_uri": asked["redirect_uri"]}  # fmt: skip
        assert profile.headers["Authorization"] == "Bearer ya29.new"
        assert fake.asked("loadCodeAssist") == [load]
        assert fake.asked("onboardUser") == [onboard] * 3, "until it is done"
        assert {r.headers["Authorization"] for r in fake.setups} == {"Bearer ya29.new"}
        assert secret not in out
    file = tmp_path / f"auth/{kind}-fred@example.com.json"
    token = json.loads(file.read_text())
    assert token.items() >= {"type": kind, "email": "fred@example.com", "project_id": "proj-9",
                             "access_token": "ya29.new", "refresh_token": "1//0new"}.items()  # fmt: skip
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert ampproxy.parse_time(token["expired"]) - time.time() == pytest.approx(3599, abs=30)


@pytest.mark.parametrize(("loaded", "project"), [
    ({"cloudaicompanionProject": "a"}, "a"), ({"cloudaicompanionProject": {"id": "b"}}, "b"),
    ({"projectId": "c"}, "c"), ({"project": {"id": "d"}}, "d"),
])  # fmt: skip
@in_loop
async def test_a_project_that_is_there_needs_no_onboarding(tmp_path, loaded, project):
    async with google_authority(tmp_path, "gemini") as fake:
        fake.setup["loadCodeAssist"] = [answer_json(loaded)]
        assert (await google_login(tmp_path, "google"))[0] == 0
        assert not fake.asked("onboardUser")
    token = json.loads((tmp_path / "auth/gemini-fred@example.com.json").read_text())
    assert token["project_id"] == project


@pytest.mark.parametrize(("tiers", "own", "sent"), [
    ({}, "", {"tierId": "legacy-tier"}),
    ({"currentTier": {"id": "mine"}}, "", {"tierId": "mine"}),
    (TIERS, "own-1", {"tierId": "standard-tier", "cloudaicompanionProject": "own-1"}),
    ({"allowedTiers": [{"id": "free-tier", "isDefault": True}]}, "own-1", {"tierId": "free-tier"}),
])  # fmt: skip
@in_loop
async def test_what_an_onboarding_asks_for(tmp_path, tiers, own, sent):
    """The free tier is asked for without a project, and may have another one than one's own."""
    async with google_authority(tmp_path, "gemini", project=own) as fake:
        answer = {"done": True, "response": {} if own else {"cloudaicompanionProject": "given"}}
        fake.setup = {
            "loadCodeAssist": [answer_json(tiers)],
            "onboardUser": [answer_json(answer)],
        }
        assert (await google_login(tmp_path, "gemini-cli"))[0] == 0
        (asked,) = fake.asked("onboardUser")
        assert {name: value for name, value in asked.items() if name != "metadata"} == sent
        (loaded,) = fake.asked("loadCodeAssist")
        assert loaded.get("cloudaicompanionProject") == (own or None)
    token = json.loads((tmp_path / "auth/gemini-fred@example.com.json").read_text())
    assert token["project_id"] == (own or "given")


ENDED = "This client is no longer supported for Gemini Code Assist for individuals"
DENIED = answer_json(
    {"error": {"code": 403, "message": "denied", "status": "PERMISSION_DENIED"}}, 403
)
REFUSALS = {  # what changes at the fake, the callback, and what the person is told
    "by the person": ({}, "error=access_denied&state={state}", "the login was refused: access_denied"),
    "the code": ({"token": answer_json({"error": "invalid_grant", "error_description": "Bad Request"}, 400)}, "", "answered 400: invalid_grant"),
    "the client": ({"token": answer_json({"error": "invalid_client"}, 401)}, "", "answered 401: invalid_client"),
    "no token": ({"token": answer_json({"id_token": "x"})}, "", "token endpoint answered 200"),
    "the project": ({"setup": {"loadCodeAssist": [DENIED]}}, "", "it answered 403: PERMISSION_DENIED: denied"),
    "the tier": ({"setup": {"loadCodeAssist": [answer_json({"ineligibleTiers": [{"reasonMessage": ENDED}]})]}}, "", ENDED),
    "the onboarding": ({"setup": {"loadCodeAssist": [answer_json(TIERS)], "onboardUser": [DENIED]}}, "", "it answered 403"),
    "no project made": ({"setup": {"loadCodeAssist": [answer_json(TIERS)], "onboardUser": [answer_json({"done": True})]}}, "", "set providers.{}.project"),
    "never done": ({"setup": {"loadCodeAssist": [answer_json(TIERS)], "onboardUser": [answer_json({})]}}, "", "set providers.{}.project"),
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOGLE)
@pytest.mark.parametrize("name", REFUSALS)
@in_loop
async def test_a_google_login_that_is_refused_keeps_nothing(tmp_path, name, kind):
    changes, callback, words = REFUSALS[name]
    async with google_authority(tmp_path, kind) as fake:
        vars(fake).update(changes)
        status, out, err, _ = await google_login(
            tmp_path, kind, callback or "code=c0de&state={state}"
        )
        assert status == 1
        assert words.format(kind) in err
        assert len(err.splitlines()) == 1
        assert "GOCSPX" not in out + err
    assert not list(tmp_path.glob("auth/*"))


@in_loop
async def test_a_project_that_cannot_be_asked_for_now_is_asked_for_later(tmp_path):
    async with google_authority(tmp_path, "gemini") as fake:
        fake.setup["loadCodeAssist"] = [answer_json({"error": {"message": "later"}}, 503)]
        status, out, err, _ = await google_login(tmp_path, "gemini")
        assert (status, err) == (0, "")
        assert "It is looked for again with the first request" in out
    token = json.loads((tmp_path / "auth/gemini-fred@example.com.json").read_text())
    assert "project_id" not in token
    assert token["refresh_token"] == "1//0new"


@in_loop
async def test_a_second_login_without_a_refresh_token_keeps_the_first_ones(tmp_path):
    async with google_authority(tmp_path, "gemini") as fake:
        assert (await google_login(tmp_path, "gemini"))[0] == 0
        fake.token = answer_json({"access_token": "ya29.second", "expires_in": 3599})
        assert (await google_login(tmp_path, "gemini"))[0] == 0
    token = json.loads((tmp_path / "auth/gemini-fred@example.com.json").read_text())
    assert (token["access_token"], token["refresh_token"]) == ("ya29.second", "1//0new")


@in_loop
async def test_a_login_again_goes_into_the_file_that_is_there(tmp_path):
    """CLIProxyAPI's, whose name and shape differ; not into another address's."""
    async with google_authority(tmp_path, "gemini"):
        other = cpa_file(tmp_path / "auth", "ann@example.com").read_bytes()
        path = cpa_file(tmp_path / "auth")
        (tmp_path / "auth/gemini-broken.json").write_text("{")
        assert (await google_login(tmp_path, "gemini"))[0] == 0
        token = json.loads(path.read_text())
        assert (token["token"]["access_token"], token["token"]["refresh_token"]) == (
            "ya29.new",
            "1//0new",
        )
        assert (token["project_id"], token["auto"], "access_token" in token) == (
            "proj-1",
            True,
            False,
        )
    names = sorted(path.name for path in tmp_path.glob("auth/*"))
    assert names == [
        "gemini-ann@example.com-all.json",
        "gemini-broken.json",
        "gemini-fred@example.com-all.json",
    ]
    assert (tmp_path / "auth/gemini-ann@example.com-all.json").read_bytes() == other


# -- Calls --


def google_file(folder, kind="gemini", name="fred@example.com", **changes):
    given = {
        "access_token": f"ya29.{name}",
        "refresh_token": f"1//0{name}",
        "project_id": "proj-1",
        **changes,
    }
    path = token_file(folder, name, type=kind, **given)
    return path.rename(folder / f"{kind}-{name}.json")


def cpa_file(folder, name="fred@example.com", **changes):
    """CLIProxyAPI's file of a Gemini login (peers.md 1.12)."""
    folder.mkdir(mode=0o700, exist_ok=True)
    inner = {"access_token": "ya29.old", "refresh_token": "1//0old", "token_type": "Bearer",
             "expiry": "2020-01-01T00:00:00.123456789+01:00", "token_uri": "https://elsewhere.example/token",
             "client_id": "theirs", "client_secret": "hush", "scopes": ["a"], "universe_domain": "googleapis.com"}  # fmt: skip
    token = {"type": "gemini", "email": name, "project_id": "proj-1,proj-2", "auto": True, "checked": True,
             "token": {**inner, **changes}}  # fmt: skip
    path = folder / f"gemini-{name}-all.json"
    path.write_text(json.dumps(token))
    return path


@asynccontextmanager
async def google_world(folder, *kinds, names=("fred@example.com",), hosts=2, config=None, **more):
    """A world with Google logins and no other; Antigravity has two hosts."""
    gemini, daily, prod = FakeCodeAssist(), FakeCodeAssist(), FakeCodeAssist()
    async with gemini.open(), daily.open(), prod.open(), world(folder, tokens=()) as w:
        token_url = w.authority.url + "/token"
        others = {"more-hosts": [prod.url]} if hosts == 2 else {}
        rows = {
            "gemini": {"base-url": gemini.url, "token-url": token_url, **more},
            "antigravity": {"base-url": daily.url, "token-url": token_url, **others, **more},
            "claude": {"base-url": w.claude.url, "token-url": token_url},
        }
        w.reload(providers=rows, **(config or {}))
        w.gemini, w.daily, w.prod = gemini, daily, prod
        w.authority.usual = answer_json({"access_token": "ya29.new", "expires_in": 3599})
        w.tokens = [google_file(w.auth, kind, name) for kind in kinds for name in names]
        w.server.tick()
        yield w


def wrapped(*chunks):
    """A stream in the envelope."""
    return [data({"response": json.loads(chunk[6:]), "traceId": "t"}) for chunk in chunks]


PRO, THREE = "gemini-2.5-pro", "gemini-3.1-pro-preview"
GOOGLE_PATHS = (
    "/v1beta/models/{}:{}", "/v1/models/{}:{}", "/api/provider/google/v1beta/models/{}:{}",
    "/api/provider/google/v1beta1/publishers/google/models/{}:{}",
)  # fmt: skip


@pytest.mark.parametrize("path", GOOGLE_PATHS)
@in_loop
async def test_what_reaches_code_assist(tmp_path, path):
    async with google_world(tmp_path, "gemini") as w:
        status, got, headers = await w.ask_json(
            path.format(PRO, "generateContent"), CONTENTS, headers=CLIENT
        )
        assert (status, got) == (200, content())
        assert headers["x-ampproxy-provider"] == "gemini"
        sent = w.gemini.last
        assert sent.raw_path == "/v1internal:generateContent"
        assert sent.headers["Authorization"] == "Bearer ya29.fred@example.com"
        assert sent.headers["User-Agent"].startswith("GeminiCLI/")
        assert not sent.headers.keys() & {
            "X-Api-Key",
            "X-Goog-Api-Key",
            "Cookie",
            "X-Amp-Thread-Id",
        }
        assert w.gemini.body() == {"model": PRO, "project": "proj-1", "request": CONTENTS}
        w.gemini.usual = (200, SSE, wrapped(*content_chunks()))
        response = await w.ask(path.format(PRO, "streamGenerateContent") + "?alt=sse", CONTENTS)
        assert data_of(response.bytes) == data_of(b"".join(content_chunks()))
        assert w.gemini.last.raw_path == "/v1internal:streamGenerateContent?alt=sse"
        w.gemini.usual = answer_json({"response": {"totalTokens": 7}})
        asked = {**CONTENTS, "safetySettings": []}
        assert (await w.ask_json(path.format(PRO, "countTokens"), asked))[1] == {"totalTokens": 7}
        assert w.gemini.last.raw_path == "/v1internal:countTokens"
        assert w.gemini.body() == {"request": {"model": f"models/{PRO}", **CONTENTS}}


@pytest.mark.parametrize("size", [1, 7, 100_000])
@in_loop
async def test_each_event_comes_out_of_its_envelope(tmp_path, size):
    async with google_world(tmp_path, "gemini") as w:
        sent = b"".join(wrapped(*content_chunks("gemini-2.5-pro-001")))
        w.gemini.usual = (200, SSE, [sent[i : i + size] for i in range(0, len(sent), size)])
        response = await w.ask(models_path(PRO, "streamGenerateContent?alt=sse"), CONTENTS)
        assert data_of(response.bytes) == data_of(b"".join(content_chunks(PRO)))
        assert w.server.ledger.requests[-1]["output_tokens"] == 3


@in_loop
async def test_a_body_in_snake_case_and_a_count_in_a_request(tmp_path):
    async with google_world(tmp_path, "gemini") as w:
        call = {"function_call": {"name": "f", "args": {"a_b": 1}}, "thought_signature": "s"}
        snake = {
            "role": "model",
            "parts": [call, {"inline_data": {"mime_type": "x", "data": "AA=="}}],
        }
        await w.ask(
            models_path(THREE),
            {"contents": [snake, 5], "tool_config": {"function_calling_config": {"mode": "ANY"}}},
        )
        assert w.gemini.body()["request"] == {
            "contents": [{"role": "model", "parts": [
                {"functionCall": {"name": "f", "args": {"a_b": 1}}, "thoughtSignature": "s"},
                {"inlineData": {"mimeType": "x", "data": "AA=="}}]}, 5],
            "toolConfig": {"functionCallingConfig": {"mode": "ANY"}},
        }  # fmt: skip
        asked = {**CONTENTS, "system_instruction": {"parts": []}, "generation_config": {"topK": 1}}
        await w.ask(models_path(f"{PRO}%28128%29"), {**asked, "model": "models/other"})
        assert w.gemini.body()["request"] == {
            **CONTENTS, "systemInstruction": {"parts": []},
            "generationConfig": {"topK": 1, "thinkingConfig": {"includeThoughts": True, "thinkingBudget": 128}},
        }  # fmt: skip
        await w.ask(models_path(PRO, "countTokens"), {"generateContentRequest": CONTENTS})
        assert w.gemini.body() == {"request": {"model": f"models/{PRO}", **CONTENTS}}


@in_loop
async def test_ones_own_project_comes_before_the_files(tmp_path):
    async with google_world(tmp_path, "gemini", project="own-1") as w:
        await w.ask(models_path(PRO), CONTENTS)
        assert w.gemini.body()["project"] == "own-1"


@in_loop
async def test_what_reaches_antigravity(tmp_path):
    tools = [{"functionDeclarations": [{"name": "f", "parametersJsonSchema": {
        "$schema": "x", "type": "object", "additionalProperties": False, "$defs": {"n": {"type": ["integer", "null"]}},
        "properties": {"pattern": {"type": "string", "pattern": "a", "const": "b"}, "n": {"$ref": "#/$defs/n"},
                       "list": {"type": "array", "items": {"enum": [1, 2]}}}}}]}]  # fmt: skip
    asked = {
        **CONTENTS,
        "safetySettings": [],
        "tools": tools,
        "generationConfig": {"maxOutputTokens": 9, "topP": 1},
    }
    async with google_world(tmp_path, "antigravity") as w:
        assert (await w.ask(models_path("gemini-3-flash-preview"), asked)).status == 200
        sent = w.daily.body()
        assert re.fullmatch(r"agent-[0-9a-f-]{36}", sent.pop("requestId"))
        session = sent["request"].pop("sessionId")
        assert re.fullmatch(r"-\d{1,19}", session)
        schema = {"type": "object", "properties": {
            "pattern": {"type": "string", "enum": ["b"]}, "n": {"type": "integer", "nullable": True},
            "list": {"type": "array", "items": {"type": "string", "enum": ["1", "2"]}}}}  # fmt: skip
        assert sent == {
            "project": "proj-1", "model": "gemini-3-flash", "userAgent": "antigravity", "requestType": "agent",
            "request": {**CONTENTS, "generationConfig": {"topP": 1},
                        "tools": [{"functionDeclarations": [{"name": "f", "parameters": schema}]}]},
        }  # fmt: skip
        assert w.daily.last.headers["User-Agent"].startswith("antigravity/")
        more = {"contents": [*CONTENTS["contents"], {"role": "model", "parts": [{"text": "a"}]}]}
        await w.ask(models_path("gemini-3-flash-preview"), more)
        assert w.daily.body()["request"]["sessionId"] == session, (
            "the same in each call of a conversation"
        )
        await w.ask(models_path("gemini-3-flash"), {**CONTENTS, "tools": [{"googleSearch": {}}]})
        assert w.daily.body()["requestType"] == "web_search"
        w.daily.usual = (200, SSE, wrapped(*content_chunks()))
        await w.ask(models_path("gemini-3.1-flash-image"), CONTENTS)
        assert w.daily.body()["requestType"] == "image_gen"


ALIASES = {
    "gemini-3-pro-preview": "gemini-3-pro-high", "gemini-3-flash-preview": "gemini-3-flash",
    "gemini-3-pro-image-preview": "gemini-3-pro-image", "gemini-3.1-pro-preview": "gemini-3.1-pro-high",
    "gemini-2.5-computer-use-preview-10-2025": "rev19-uic3-1p", "gemini-claude-sonnet-4-5": "claude-sonnet-4-5",
    "gemini-claude-sonnet-4-5-thinking": "claude-sonnet-4-5-thinking",
    "gemini-claude-opus-4-5-thinking": "claude-opus-4-5-thinking",
    "gemini-claude-opus-4-6-thinking": "claude-opus-4-6-thinking", "gpt-oss-120b-medium": "gpt-oss-120b-medium",
}  # fmt: skip


@pytest.mark.parametrize("asked", ALIASES)
@in_loop
async def test_antigravitys_names_are_its_own(tmp_path, asked):
    """And the answer has the name that was asked for."""
    async with google_world(tmp_path, "gemini", "antigravity") as w:
        w.gemini.usual = answer_json({"error": {"code": 404, "message": "no"}}, 404)
        served = ALIASES[asked]
        streams = served.startswith(("claude-", "gemini-3-pro")) or "image" in served
        chunks = wrapped(*content_chunks(served))
        w.daily.usual = (
            (200, SSE, chunks) if streams else answer_json({"response": content(served)})
        )
        status, got, headers = await w.ask_json(models_path(asked), CONTENTS)
        assert (status, got, headers["x-ampproxy-model"]) == (200, content(asked), served)
        assert w.daily.body()["model"] == served
        assert ("streamGenerateContent?alt=sse" in w.daily.last.raw_path) == streams
        named_by_both = asked.startswith("gemini-") and "claude" not in asked
        assert len(w.gemini.requests) == named_by_both


@in_loop
async def test_a_stream_is_merged_for_who_asked_for_none(tmp_path):
    def chunk(*parts, **more):
        return data({"response": {"candidates": [{"content": {"role": "model", "parts": [*parts]}, **more}],
                                  "modelVersion": "gemini-3-pro-high", "usageMetadata": {"promptTokenCount": 5}}})  # fmt: skip

    call = {"functionCall": {"name": "f", "args": {}}, "thoughtSignature": "s2"}
    async with google_world(tmp_path, "antigravity") as w:
        w.daily.usual = (200, SSE, [
            chunk({"text": "I ", "thought": True}), chunk({"text": "think", "thought": True}),
            chunk({"text": "h"}), chunk({"text": "é"}, {"text": "", "thoughtSignature": "s1"}), chunk({"text": "!"}), chunk(call),
            data({"response": {"candidates": [{"finishReason": "STOP", "index": 0}], "modelVersion": "gemini-3-pro-high",
                               "usageMetadata": {"promptTokenCount": 5, "candidatesTokenCount": 9}}}),
        ])  # fmt: skip
        status, got, headers = await w.ask_json(models_path("gemini-3-pro-preview"), CONTENTS)
        assert (status, headers["Content-Type"]) == (200, "application/json")
        assert got == {
            "candidates": [{"content": {"role": "model", "parts": [
                {"text": "I think", "thought": True}, {"text": "hé"}, {"text": "", "thoughtSignature": "s1"},
                {"text": "!"}, call]}, "finishReason": "STOP", "index": 0}],
            "modelVersion": "gemini-3-pro-preview", "usageMetadata": {"promptTokenCount": 5, "candidatesTokenCount": 9},
        }  # fmt: skip
        assert w.server.ledger.requests[-1]["output_tokens"] == 9


# -- What is done to contents --

SENTINEL = "skip_thought_signature_validator"
USER, RESULT = (
    {"role": "user", "parts": [{"text": "go"}]},
    {"role": "user", "parts": [{"functionResponse": {"name": "f"}}]},
)


def calling(*signatures, before=()):
    """A turn of the model with calls; None: without a signature."""
    calls = [
        {"functionCall": {"name": "f"}, **({"thoughtSignature": s} if s else {})}
        for s in signatures
    ]
    return {"role": "model", "parts": [*before, *calls]}


@pytest.mark.parametrize(("model", "contents", "sent"), [
    (THREE, [USER, calling(None, None), RESULT], [USER, calling(SENTINEL, None), RESULT]),
    (THREE, [USER, calling("s", None), RESULT, calling(None), RESULT], [USER, calling("s", None), RESULT, calling(SENTINEL), RESULT]),
    (THREE, [USER, calling(None), RESULT, USER], [USER, calling(None), RESULT, USER]),
    (THREE, [USER, calling(None), RESULT, USER, calling(None), RESULT], [USER, calling(None), RESULT, USER, calling(SENTINEL), RESULT]),
    (THREE, [calling(None), RESULT], [calling(SENTINEL), RESULT]),
    (THREE, [USER, {"role": "model", "parts": [{"text": "a"}]}, None, 5], [USER, {"role": "model", "parts": [{"text": "a"}]}, None, 5]),
    (PRO, [USER, calling(None), RESULT], [USER, calling(None), RESULT]),
])  # fmt: skip
@in_loop
async def test_gemini_3_gets_a_signature_on_the_first_call_of_a_step(
    tmp_path, model, contents, sent
):
    async with google_world(tmp_path, "gemini") as w:
        assert (await w.ask(models_path(model), {"contents": contents})).status == 200
        assert w.gemini.body()["request"]["contents"] == sent


CLAUDES_SEAL = "EqQBCgIYAhIM"
OWN_THOUGHT = {"text": "t", "thought": True, "thoughtSignature": CLAUDES_SEAL}
ODD_THOUGHT = {"text": "t", "thought": True}
THINKS = {"includeThoughts": True, "thinkingBudget": 4000}
CLAUDES = [  # generationConfig, contents -> generationConfig, contents as Claude gets them
    ({}, [USER], {}, None),
    ({"thinkingConfig": THINKS}, [USER], {"thinkingConfig": THINKS, "maxOutputTokens": 64000}, None),
    ({"thinkingConfig": THINKS, "maxOutputTokens": 2000}, [USER], {"thinkingConfig": THINKS, "maxOutputTokens": 5024}, None),
    ({"thinkingConfig": {"thinkingBudget": 99999}}, [USER], {"thinkingConfig": {**THINKS, "thinkingBudget": 63999}, "maxOutputTokens": 64000}, None),
    ({"thinkingConfig": {"thinkingBudget": 5}}, [USER], {"thinkingConfig": {**THINKS, "thinkingBudget": 1024}, "maxOutputTokens": 64000}, None),
    ({"thinkingConfig": {"thinkingBudget": 0}}, [USER], {}, None),
    ({"thinkingConfig": {"thinkingBudget": -1}}, [USER], {"thinkingConfig": {**THINKS, "thinkingBudget": 8192}, "maxOutputTokens": 64000}, None),
    ({"thinkingConfig": {"thinkingLevel": "HIGH"}}, [USER], {"thinkingConfig": {**THINKS, "thinkingBudget": 24576}, "maxOutputTokens": 64000}, None),
    ({"maxOutputTokens": 999999}, [USER], {"maxOutputTokens": 64000}, None),
    ({"thinkingConfig": THINKS}, [USER, calling(None), RESULT], {}, None),
    ({"thinkingConfig": THINKS}, [USER, calling(None, before=[OWN_THOUGHT]), RESULT], {"thinkingConfig": THINKS, "maxOutputTokens": 64000}, None),
    ({"thinkingConfig": THINKS}, [USER, calling(SENTINEL, before=[ODD_THOUGHT]), RESULT], {}, [USER, calling(None), RESULT]),
    ({}, [USER, {"role": "model", "parts": [ODD_THOUGHT]}, USER], {}, [USER, USER]),
]  # fmt: skip


@pytest.mark.parametrize(("config", "contents", "wanted", "sent"), CLAUDES)
@in_loop
async def test_antigravitys_claude(tmp_path, config, contents, wanted, sent):
    async with google_world(tmp_path, "antigravity") as w:
        w.daily.usual = (200, SSE, wrapped(*content_chunks("claude-sonnet-4-6")))
        asked = {"contents": contents, "generationConfig": config, "safetySettings": []}
        assert (await w.ask(models_path("claude-sonnet-4-6"), asked)).status == 200
        request = w.daily.body()["request"]
        assert (request["generationConfig"], request["contents"]) == (wanted, sent or contents)
        assert not request.keys() & {"safetySettings", "toolConfig"}


@pytest.mark.parametrize(("mode", "sent"), [(None, "VALIDATED"), ("AUTO", "VALIDATED"), ("ANY", "VALIDATED"), ("NONE", "NONE")])  # fmt: skip
@in_loop
async def test_antigravitys_claude_validates_calls(tmp_path, mode, sent):
    async with google_world(tmp_path, "antigravity") as w:
        w.daily.usual = (200, SSE, wrapped(*content_chunks("claude-sonnet-4-6")))
        config = {"toolConfig": {"functionCallingConfig": {"mode": mode}}} if mode else {}
        asked = {**CONTENTS, "tools": [{"functionDeclarations": []}], **config}
        await w.ask(models_path("claude-sonnet-4-6", "streamGenerateContent?alt=sse"), asked)
        assert w.daily.body()["request"]["toolConfig"]["functionCallingConfig"]["mode"] == sent


@pytest.mark.parametrize(("asked", "thinking"), [
    ("claude-opus-4-6-thinking(high)", {**THINKS, "thinkingBudget": 24576}), ("claude-opus-4-6-thinking(none)", None),
    ("gemini-3-pro-high(low)", {"includeThoughts": True, "thinkingLevel": "low"}), ("gpt-oss-120b-medium(high)", None),
])  # fmt: skip
@in_loop
async def test_an_effort_as_antigravitys_models_take_it(tmp_path, asked, thinking):
    async with google_world(tmp_path, "antigravity") as w:
        await w.ask(models_path(asked.replace("(", "%28").replace(")", "%29")), CONTENTS)
        config = w.daily.body()["request"].get("generationConfig", {})
        assert config.get("thinkingConfig") == thinking


@settings(max_examples=200, deadline=None, database=None, suppress_health_check=[*HealthCheck])
@given(st.dictionaries(st.sampled_from(["contents", "generationConfig", "generation_config", "tools", "toolConfig", "model"]),
                       st.recursive(st.none() | st.integers() | st.sampled_from(["model", "text", "", "#/$defs/a", CLAUDES_SEAL]),
                                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(
                                        ["parts", "role", "text", "thought", "functionCall", "functionResponse", "thoughtSignature", "$ref", "items",
                                         "functionDeclarations", "parametersJsonSchema", "properties", "anyOf", "type", "enum", "thinkingConfig",
                                         "maxOutputTokens", "thinkingBudget", "functionCallingConfig"]), inner, max_size=5), max_leaves=25), max_size=6))  # fmt: skip
def test_googles_rules_survive_any_body_and_change_nothing_in_place(body):
    before = json.loads(json.dumps(body))
    for kind in GOOGLE:
        for model in ("claude-sonnet-4-6", THREE, PRO):
            for verb in ("generateContent", "countTokens"):
                row = ampproxy.LOGINS[kind]
                sent = ampproxy.code_assist_rules(body, model, row, verb)
                ampproxy.envelope_of(sent, model, row, verb)
                json.dumps(sent)
    assert body == before


def test_references_that_multiply_are_bounded():
    """Each definition names the next one five times, and the last one the first."""
    defs = {
        f"d{i}": {
            "type": "object",
            "properties": {name: {"$ref": f"#/$defs/d{(i + 1) % 15}"} for name in "abcde"},
        }
        for i in range(15)
    }
    declared = {"name": "f", "parametersJsonSchema": {"$ref": "#/$defs/d0", "$defs": defs}}
    body = {"contents": [], "tools": [{"functionDeclarations": [declared]}]}
    began = time.monotonic()
    sent = ampproxy.code_assist_rules(
        body, "gemini-3-flash", ampproxy.LOGINS["antigravity"], "generateContent"
    )
    assert time.monotonic() - began < 2
    assert len(json.dumps(sent)) < 2_000_000
    deep = schema = {"type": "object"}
    for _ in range(200):
        deep["properties"] = {"x": {"type": "object"}}
        deep = deep["properties"]["x"]
    word = ampproxy.google_schema(schema)
    assert word["properties"]["x"]["properties"]["x"]["type"] == "object"
    loop = {
        "type": "object",
        "properties": {
            "next": {"$ref": "#"},
            "list": {"type": "array", "items": {"$ref": "#/properties/next"}},
        },
    }
    word = ampproxy.google_schema(loop)
    assert word["properties"]["list"]["type"] == "array"


@in_loop
async def test_a_merged_stream_of_many_pieces_takes_no_long_time(tmp_path):
    pieces = [data({"response": ended(None, {"text": "x" * 50})})] * 20_000
    async with google_world(tmp_path, "antigravity") as w:
        w.daily.usual = (200, SSE, [b"".join(pieces), *wrapped(*content_chunks())])
        began = time.monotonic()
        _, got, _ = await w.ask_json(models_path("gemini-3-pro-preview"), CONTENTS)
        assert got["candidates"][0]["content"]["parts"] == [{"text": "x" * 1_000_000 + "hé"}]
        assert time.monotonic() - began < 8


# -- Projects and tokens of running logins --


@pytest.mark.parametrize("kind", GOOGLE)
@in_loop
async def test_a_project_is_looked_for_once_and_kept(tmp_path, kind):
    """Twenty first requests at once, of which one client leaves."""
    gate = asyncio.Event()
    async with google_world(tmp_path, kind, names=()) as w:
        path = google_file(w.auth, kind, project_id="")
        w.server.tick()
        made = {"done": True, "response": {"cloudaicompanionProject": "proj-7"}}
        fake = w.gemini if kind == "gemini" else w.daily
        loading = w.gemini if kind == "gemini" else w.prod

        async def load(request):
            await gate.wait()
            return web.json_response(TIERS)

        loading.setup["loadCodeAssist"] = [load]
        fake.setup["onboardUser"] = [answer_json({}), answer_json(made)]
        leaves = asyncio.create_task(w.ask(models_path("gemini-3.1-pro-low"), CONTENTS))
        model = "gemini-2.5-flash"
        asked = [asyncio.create_task(w.ask(models_path(model), CONTENTS)) for _ in range(20)]
        while not loading.setups:
            await asyncio.sleep(0)
        leaves.cancel()
        gate.set()
        assert [response.status for response in await asyncio.gather(*asked)] == [200] * 20
        assert len(loading.asked("loadCodeAssist")) == 1
        assert len(fake.asked("onboardUser")) == 2
        assert {json.loads(r.bytes)["project"] for r in fake.requests} == {"proj-7"}
        token = json.loads(path.read_text())
        assert (token["project_id"], token["note"]) == ("proj-7", "kept")
        await w.ask(models_path(model), CONTENTS)
        assert len(loading.asked("loadCodeAssist")) == 1


PROJECT_ROWS = {  # what loadCodeAssist says -> what rests, for how long, how often it was asked
    "403": (DENIED, "account", 1800, 1),
    "ended": (answer_json({"ineligibleTiers": [{"reasonMessage": ENDED}]}), "account", 1800, 1),
    "401": (answer_json(NOBODY, 401), "account", float("inf"), 2),
    "503": (answer_json({"error": {"message": "later"}}, 503), "account", 5, 3),
    "a dead connection": ((200, {}, ["cut"]), "account", 5, 3),
    "garbage": ((200, {}, [b"<html>"]), "account", 5, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", PROJECT_ROWS)
@in_loop
async def test_a_project_that_is_not_to_be_had(tmp_path, name):
    """The next account answers."""
    answer, _, length, times = PROJECT_ROWS[name]
    async with google_world(tmp_path, names=()) as w:
        w.tokens = [google_file(w.auth, name="ann@example.com", project_id="")]
        google_file(w.auth, name="bob@example.com")
        w.server.tick()
        w.gemini.setup["loadCodeAssist"] = [answer]
        for _ in range(3):
            response = await w.ask(models_path(PRO), CONTENTS)
            assert response.status == 200, response.bytes
        assert len(w.gemini.asked("loadCodeAssist")) == times
        assert resting(w) == {"": length}
        assert w.gemini.last.headers["Authorization"] == "Bearer ya29.bob@example.com"


@in_loop
async def test_a_nested_file_is_read_and_written_in_place(tmp_path):
    async with google_world(tmp_path) as w:
        path = cpa_file(w.auth)
        before = json.loads(path.read_text())
        w.server.tick()
        assert (await w.ask(models_path(PRO), CONTENTS)).status == 200
        assert form_of(w.authority.last) == {
            "grant_type": "refresh_token", "refresh_token": "1//0old", "client_id": "theirs", "client_secret": "hush",
        }  # fmt: skip
        assert w.authority.last.path == "/token", "the row's address, not the file's"
        assert w.gemini.last.headers["Authorization"] == "Bearer ya29.new"
        assert w.gemini.body()["project"] == "proj-1", "of several the first"
        token = json.loads(path.read_text())
        assert token.pop("last_refresh")
        expiry = token["token"].pop("expiry")
        assert ampproxy.parse_time(expiry) == w.clock.time() + 3599
        del before["token"]["expiry"]
        before["token"]["access_token"] = "ya29.new"
        assert token == before, "the refresh token stays, and all else"
        w.server.tick()
        await w.ask(models_path(PRO), CONTENTS)
        assert len(w.authority.requests) == 1


@in_loop
async def test_a_project_of_a_nested_file_and_a_switch_in_it(tmp_path):
    async with google_world(tmp_path) as w:
        path = cpa_file(w.auth, expiry="2030-01-01T00:00:00Z")
        path.write_text(path.read_text().replace('"proj-1,proj-2"', '""'))
        w.server.tick()
        assert (await w.ask(models_path(PRO), CONTENTS)).status == 200
        token = json.loads(path.read_text())
        assert (token["project_id"], token["token"]["access_token"]) == ("proj-1", "ya29.old")
        assert "access_token" not in token
        path.write_text(json.dumps({**token, "disabled": True}))
        w.server.tick()
        assert (await w.ask(models_path(PRO), CONTENTS)).status == 404


@in_loop
async def test_antigravitys_file_says_when_twice(tmp_path):
    async with google_world(tmp_path) as w:
        path = google_file(
            w.auth, "antigravity", expired="2020-01-01T00:00:00Z", expires_in=1, timestamp=2
        )
        w.server.tick()
        assert (await w.ask(models_path("gemini-3-flash"), CONTENTS)).status == 200
        token = json.loads(path.read_text())
        assert (token["expires_in"], token["timestamp"]) == (3599, int(w.clock.time() * 1000))
        assert (
            form_of(w.authority.last)["client_secret"]
            == ampproxy.LOGINS["antigravity"].client_secret
        )
        assert token["refresh_token"] == "1//0fred@example.com"


@pytest.mark.parametrize("kind", GOOGLE)
@in_loop
async def test_a_void_google_refresh_token_needs_a_login(tmp_path, kind):
    async with google_world(tmp_path) as w:
        path = google_file(w.auth, kind, expired="2020-01-01T00:00:00Z")
        before = path.read_bytes()
        w.server.tick()
        w.authority.usual = answer_json(
            {"error": "invalid_grant", "error_description": "Token has been expired or revoked."},
            400,
        )
        for _ in range(2):
            status, body, _ = await w.ask_json(models_path("gemini-3-flash"), CONTENTS)
            assert (status, f"ampproxy.py login {kind}" in body["error"]["message"]) == (401, True)
        assert len(w.authority.requests) == 1
        assert path.read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("kind", GOOGLE)
@in_loop
async def test_a_google_login_killed_while_it_refreshes_keeps_a_good_file(tmp_path, kind):
    """25 kills, Gemini's with a nested file: old or new, it is whole, and has its refresh token."""
    async with google_world(tmp_path) as w:
        if kind == "gemini":
            path = cpa_file(w.auth)
        else:
            path = google_file(w.auth, kind, access_token="ya29.old", refresh_token="1//0old")
        before, issued = json.loads(path.read_text()), ["ya29.old"]

        async def issue(request):
            assert form_of(request)["refresh_token"] == "1//0old"
            issued.append(f"ya29.{len(issued)}")
            return web.json_response({"access_token": issued[-1], "expires_in": 3599})

        w.authority.usual = issue
        nursery = subprocess.Popen([sys.executable, "-c", NURSERY, str(w.file)], cwd=HERE, text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

        async def one(delay):
            await outlives(nursery, delay)

        try:
            began = time.monotonic()
            await one(20)
            whole = time.monotonic() - began
            for kill in range(25):
                await one(whole * kill / 20)
                token = json.loads(path.read_text())
                assert token["project_id"] == before["project_id"]
                tokens = token.get("token", token)
                assert tokens["refresh_token"] == "1//0old"
                assert tokens["access_token"] in issued
                assert ("access_token" in token) == (kind == "antigravity")
        finally:
            nursery.stdin.close()
            nursery.wait(10)
        assert len(issued) > 5


# -- Hosts, quotas, errors --


def quota_error(
    message="You have exhausted your capacity on this model.", status=429, listed=False, **detail
):
    """Google's; `detail` becomes those of its details that say how long."""
    kind = {"retryDelay": "RetryInfo", "reason": "ErrorInfo"}
    details = []
    if "retryDelay" in detail:
        details.append(
            {
                "@type": f"type.googleapis.com/google.rpc.{kind['retryDelay']}",
                "retryDelay": detail.pop("retryDelay"),
            }
        )
    if detail:
        reason = detail.pop("reason", "QUOTA_EXHAUSTED")
        details.append({"@type": f"type.googleapis.com/google.rpc.{kind['reason']}", "reason": reason,
                        "domain": "cloudcode-pa.googleapis.com", "metadata": detail})  # fmt: skip
    error = {
        "error": {
            "code": status,
            "message": message,
            "status": "RESOURCE_EXHAUSTED",
            "details": details,
        }
    }
    return answer_json([error] if listed else error, status)


QUOTAS = {  # Google's 429 -> how long the model rests on the account
    "retryDelay": (quota_error(retryDelay="37.5s"), 37.5),
    "quotaResetDelay": (quota_error(quotaResetDelay="20m3.5s"), 1203.5),
    "in milliseconds": (quota_error(quotaResetDelay="61500ms"), 61.5),
    "retryDelay first": (quota_error(retryDelay="40s", quotaResetDelay="20m"), 40),
    "words": (quota_error("Your quota will reset after 21m2s."), 1262),
    "words of seconds": (quota_error("Resource has been exhausted, it resets after 20s"), 20),
    "words of Gemini's": (quota_error("Please retry in 59.9s."), 59.9),
    "words of hours": (quota_error("Your quota will reset after 1h2m3s."), 1800),
    "a time": (quota_error(quotaResetTimeStamp="2027-01-15T08:15:00Z"), 900),
    "a time that is over": (quota_error(quotaResetTimeStamp="2027-01-15T07:15:00Z"), 60),
    "a list": (quota_error(listed=True, retryDelay="37.5s"), 37.5),
    "a list of words": (quota_error("reset after 1m", listed=True), 60),
    "a header": ((429, {"Retry-After": "77"}, [b'{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED"}}']), 77),
    "nothing": (quota_error(), 60),
    "nonsense": (quota_error(retryDelay="soon", quotaResetDelay="-", quotaResetTimeStamp="later"), 60),
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOGLE)
@pytest.mark.parametrize("name", QUOTAS)
@in_loop
async def test_googles_429(tmp_path, name, kind):
    """One model's quota: the next account answers, and this one goes on with other models."""
    answer, length = QUOTAS[name]
    async with google_world(tmp_path, kind, names=FRIENDS[:2], hosts=1) as w:
        fake = w.gemini if kind == "gemini" else w.daily
        fake.script = [answer]
        response = await w.ask(models_path("gemini-3-flash"), CONTENTS)
        assert response.status == 200, response.bytes
        rests = [account.rests for account in w.server.pool.accounts.values() if account.rests]
        ((model, rest),) = rests[0].items()
        assert model == "gemini-3-flash"
        assert rest.wakes - w.clock.monotonic() == pytest.approx(length)


@in_loop
async def test_a_short_throttle_of_googles_is_waited_for(tmp_path):
    async with google_world(tmp_path, "gemini", names=FRIENDS[:2]) as w:
        w.gemini.script = [quota_error(reason="RATE_LIMIT_EXCEEDED", retryDelay="2.5s")]
        before = w.clock.now
        assert (await w.ask(models_path(PRO), CONTENTS)).status == 200
        assert w.clock.now - before == 2.5
        first, second = w.gemini.requests
        assert first.headers["Authorization"] == second.headers["Authorization"]


@in_loop
async def test_a_spent_quota_is_told_in_googles_words(tmp_path):
    async with google_world(tmp_path, "gemini") as w:
        w.gemini.usual = quota_error(quotaResetDelay="20m", listed=True)
        status, body, headers = await w.ask_json(models_path(PRO), CONTENTS)
        assert (status, body["error"]["status"]) == (429, "RESOURCE_EXHAUSTED")
        assert (headers["Retry-After"], headers["x-should-retry"]) == ("1200", "false")


GOOGLE_ROWS = {  # the answer -> requests of the account, what rests, how long
    "401": (answer_json(NOBODY, 401), 2, "", float("inf")),
    "403": (DENIED, 1, "", 1800),
    "404": (answer_json({"error": {"code": 404, "message": "no", "status": "NOT_FOUND"}}, 404), 1, "model", 1800),
    "500": (answer_json({"error": {"code": 500, "message": "no", "status": "INTERNAL"}}, 500), 3, "", 5),
    "503": (answer_json({"error": {"code": 503, "message": "no", "status": "UNAVAILABLE"}}, 503), 3, "", 5),
    "no capacity": (answer_json({"error": {"code": 503, "message": "No capacity available for model x"}}, 503), 3, "model", 5),
    "no room": (quota_error("x", 503, reason="MODEL_CAPACITY_EXHAUSTED"), 3, "model", 5),
    "a dead connection": ((200, {}, ["cut"]), 3, "", 5),
    "a page": ((200, {"Content-Type": "text/html"}, [b"<html>"]), 3, "", 5),
    "an empty stream": ((200, SSE, []), 3, "", 5),
    "an error in a stream": ((200, SSE, [data({"error": {"code": 503, "message": "full", "status": "UNAVAILABLE"}})]), 3, "", 5),
    "a quota in a stream": ((200, SSE, [data({"error": {"code": 429, "message": "reset after 5m", "status": "RESOURCE_EXHAUSTED"}})]), 1, "model", 300),
    "cut before a word": ((200, SSE, [b"data: {\"resp"]), 3, "", 5),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOGLE_ROWS)
@in_loop
async def test_what_googles_errors_mean(tmp_path, name):
    answer, times, what, length = GOOGLE_ROWS[name]
    async with google_world(tmp_path, "gemini", names=FRIENDS[:2]) as w:
        served = (200, SSE, wrapped(*content_chunks()))

        async def play(request):
            failed = "ann@" in request.headers["Authorization"]
            return await respond(request, answer if failed else served)

        w.authority.usual = answer_json({"access_token": "ya29.ann@again", "expires_in": 3599})
        w.gemini.usual = play
        for _ in range(4):
            response = await w.ask(models_path(PRO, "streamGenerateContent?alt=sse"), CONTENTS)
            assert response.status == 200, response.bytes
            assert data_of(response.bytes) == data_of(b"".join(content_chunks()))
        tried = [r for r in w.gemini.requests if "ann@" in r.headers["Authorization"]]
        assert len(tried) == times
        assert resting(w) == {PRO if what == "model" else "": length}


@in_loop
async def test_a_cut_stream_of_googles_is_an_error_and_a_broken_connection(tmp_path):
    async with google_world(tmp_path, "gemini") as w:
        w.gemini.usual = (200, SSE, [wrapped(*content_chunks())[0], "cut"])
        path, body = models_path(PRO, "streamGenerateContent?alt=sse"), json.dumps(CONTENTS)
        request = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        )
        got = await raw_exchange(w.port, request.encode())
        first, last = data_of(got)
        assert (first["candidates"][0]["content"]["parts"], last["error"]["status"]) == (
            [{"text": "h"}],
            "INTERNAL",
        )
        assert not got.endswith(b"0\r\n\r\n")
        assert len(w.gemini.requests) == 1


HOST_ROWS = {  # what the first host says -> whether the second one is asked
    "a dead connection": ((200, {}, ["cut"]), True),
    "404": (answer_json({"error": {"code": 404, "message": "no"}}, 404), True),
    "429": (quota_error(retryDelay="37s"), True),
    "500": (answer_json({"error": {"code": 500, "message": "no"}}, 500), True),
    "503": (answer_json({"error": {"code": 503, "message": "no capacity"}}, 503), True),
    "a failed stream": ((200, SSE, [data({"error": {"code": 503, "message": "x"}})]), True),
    "400": (answer_json({"error": {"code": 400, "message": "no"}}, 400), False),
    "403": (DENIED, False),
}  # fmt: skip


@pytest.mark.parametrize("name", HOST_ROWS)
@in_loop
async def test_the_next_host_is_asked_where_it_may_do_better(tmp_path, name):
    answer, goes_on = HOST_ROWS[name]
    async with google_world(tmp_path, "antigravity") as w:
        w.daily.usual = answer
        response = await w.ask(models_path("gemini-3-flash"), CONTENTS)
        assert (len(w.daily.requests), len(w.prod.requests)) == (1, int(goes_on))
        assert (response.status == 200) == goes_on
        if goes_on:
            one, other = w.daily.body(), w.prod.body()
            assert one.pop("requestId") != other.pop("requestId")
            assert one == other
            assert not any(account.rests for account in w.server.pool.accounts.values())


@in_loop
async def test_a_spent_quota_is_the_better_reason_of_two_hosts(tmp_path):
    async with google_world(tmp_path, "antigravity") as w:
        w.daily.usual = quota_error(quotaResetDelay="20m")
        w.prod.usual = answer_json({"error": {"code": 404, "message": "no"}}, 404)
        assert (await w.ask(models_path("gemini-3-flash"), CONTENTS)).status == 429
        assert resting(w) == {"gemini-3-flash": 1200}


@in_loop
async def test_a_base_url_replaces_all_hosts(tmp_path):
    async with google_world(tmp_path, "antigravity", hosts=1) as w:
        (row,) = [row for row in w.server.live.rows if row.kind == "antigravity"]
        assert row.provider.more_hosts == ()
        w.daily.usual = answer_json({"error": {"code": 404, "message": "no"}}, 404)
        assert (await w.ask(models_path("gemini-3-flash"), CONTENTS)).status == 404
    assert ampproxy.Live(None).rows[3].provider.more_hosts == (
        "https://cloudcode-pa.googleapis.com",
    )


@pytest.mark.parametrize("suffix", ["", "/", "/v1internal", "/v1internal/"])
@in_loop
async def test_googles_base_url_with_and_without_its_version(tmp_path, suffix):
    async with google_world(tmp_path, "gemini") as w:
        row = {"base-url": w.gemini.url + suffix, "token-url": w.authority.url}
        w.reload(providers={"gemini": row})
        w.server.tick()
        assert (await w.ask(models_path(PRO), CONTENTS)).status == 200
        assert w.gemini.last.raw_path == "/v1internal:generateContent"


@in_loop
async def test_gemini_then_antigravity_each_with_its_own_quota(tmp_path):
    async with google_world(tmp_path, "gemini", "antigravity", hosts=1) as w:
        asked = models_path("gemini-3-flash-preview")

        async def provider():
            response = await w.ask(asked, CONTENTS)
            return (
                response.headers.get("x-ampproxy-provider")
                if response.status == 200
                else response.status
            )

        assert await provider() == "gemini"
        w.gemini.usual = quota_error(quotaResetDelay="10m")
        assert await provider() == "antigravity"
        assert (w.daily.body()["model"], w.gemini.body()["model"]) == (
            "gemini-3-flash",
            "gemini-3-flash-preview",
        )
        assert await provider() == "antigravity"
        assert len(w.gemini.requests) == 2, "it rests"
        w.daily.usual = quota_error(quotaResetDelay="25m")
        status, body, headers = await w.ask_json(asked, CONTENTS)
        assert (status, headers["Retry-After"]) == (429, "600"), "the shorter of the two"
        assert "gemini fred@example.com" in body["error"]["message"]
        assert "antigravity fred@example.com" in body["error"]["message"]
        w.gemini.usual = answer_json({"response": content("gemini-3-flash-preview")})
        w.clock.now += 601
        assert await provider() == "gemini"
        assert resting(w, 1) == {"gemini-3-flash-preview": pytest.approx(1500 - 601)}
        assert (await w.ask(models_path(PRO), CONTENTS)).headers["x-ampproxy-provider"] == "gemini"


@in_loop
async def test_a_mapping_to_antigravitys_claude(tmp_path):
    """CLIProxyAPI's name for it; no login's own `claude-*` stands in its way."""
    rules = [{"from": "claude-opus-4-5-20251101", "to": "gemini-claude-opus-4-5-thinking"},
             {"from": "claude-haiku-4-5-20251001", "to": "gemini-2.5-flash"}]  # fmt: skip
    config = {"ampcode": {"model-mappings": rules}}
    async with google_world(tmp_path, "gemini", "antigravity", config=config) as w:
        w.daily.usual = (200, SSE, wrapped(*content_chunks("claude-opus-4-5-thinking")))
        status, got, headers = await w.ask_json(models_path("claude-opus-4-5-20251101"), CONTENTS)
        assert (status, got) == (200, content("claude-opus-4-5-20251101"))
        assert (headers["x-ampproxy-route"], headers["x-ampproxy-model"]) == (
            "mapped",
            "claude-opus-4-5-thinking",
        )
        response = await w.ask(models_path("claude-haiku-4-5-20251001"), CONTENTS)
        assert (response.headers["x-ampproxy-provider"], response.headers["x-ampproxy-model"]) == (
            "gemini",
            "gemini-2.5-flash",
        )


def ended(reason, *parts):
    return {
        **content(),
        "candidates": [{"content": {"role": "model", "parts": [*parts]}, "finishReason": reason}],
    }


THOUGHT_PART, SAID_PART = {"text": "hm", "thought": True}, {"text": "hi"}
SILENCES = {  # an answer -> whether it is one
    "a broken call": (ended("MALFORMED_FUNCTION_CALL"), False),
    "a broken call behind words": (ended("MALFORMED_FUNCTION_CALL", SAID_PART), False),
    "a call of no tool": (ended("UNEXPECTED_TOOL_CALL"), False),
    "no parts": (ended("STOP"), False), "an empty text": (ended("STOP", {"text": ""}), False),
    "a signature alone": (ended("STOP", {"text": "", "thoughtSignature": "s"}), False),
    "thoughts alone": (ended("STOP", THOUGHT_PART), False),
    "no candidates": ({"candidates": [], "usageMetadata": {"promptTokenCount": 5}}, False),
    "words": (ended("STOP", THOUGHT_PART, SAID_PART), True),
    "a call": (ended("STOP", {"functionCall": {"name": "f"}}), True),
    "a picture": (ended("STOP", {"inlineData": {"data": "AA=="}}), True),
    "a refusal": (ended("SAFETY"), True), "no room": (ended("MAX_TOKENS", THOUGHT_PART), True),
    "a refused prompt": ({"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}, True),
}  # fmt: skip


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("name", SILENCES)
@in_loop
async def test_silence_is_no_success(tmp_path, name, streams):
    """It is asked for again; in the end it is a 502, and nobody rests."""
    answer, good = SILENCES[name]
    path = models_path(PRO, "streamGenerateContent?alt=sse" if streams else "generateContent")
    async with google_world(tmp_path, "gemini") as w:
        parts = answer_json({"response": answer})[2]
        w.gemini.usual = (200, SSE, [data({"response": answer})]) if streams else (200, {}, parts)
        status, got = 0, None
        with suppress(aiohttp.ClientError):
            response = await w.ask(path, CONTENTS)
            status, got = response.status, response.bytes
        assert (status == 200) == good
        assert len(w.gemini.requests) == (1 if good else 3)
        if streams and name == "no candidates":
            return  # it has no end either
        assert not any(account.rests for account in w.server.pool.accounts.values())
        if not good:
            error = json.loads(got)["error"]
            assert (status, error["code"], error["status"]) == (502, 502, "INTERNAL")
            w.gemini.script = [w.gemini.usual]
            w.gemini.usual = answer_json({"response": content()})
            assert (await w.ask(path, CONTENTS)).status == 200, "a second try may do better"


@in_loop
async def test_an_end_without_an_answer_behind_thoughts_is_an_error(tmp_path):
    """Thoughts go out at once; then it is too late for another try."""
    async with google_world(tmp_path, "gemini") as w:
        thought = ended(None, THOUGHT_PART)
        del thought["candidates"][0]["finishReason"]
        for reason in ("STOP", "MALFORMED_FUNCTION_CALL"):
            w.gemini.usual = (
                200,
                SSE,
                [data({"response": thought}), data({"response": ended(reason)})],
            )
            body = json.dumps(CONTENTS)
            request = f"POST {models_path(PRO, 'streamGenerateContent?alt=sse')} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n{body}"
            first, last = data_of(await raw_exchange(w.port, request.encode()))
            assert first["candidates"] == thought["candidates"]
            assert last["error"]["code"] == 502


@in_loop
async def test_silence_of_a_key_is_no_success_either(tmp_path):
    async with key_world(tmp_path, "gemini-api-key") as w:
        w.keyed.script = [answer_json(ended("MALFORMED_FUNCTION_CALL"))]
        assert (await w.ask(models_path(PRO), CONTENTS)).status == 200
        assert len(w.keyed.requests) == 2


@pytest.mark.parametrize("kind", GOOGLE)
@in_loop
async def test_nothing_of_a_google_login_reaches_the_log(tmp_path, kind, caplog):
    async with google_world(tmp_path) as w:
        google_file(w.auth, kind, expired="2020-01-01T00:00:00Z")
        w.server.tick()
        quoted = {
            "error": "odd",
            "error_description": "1//0fred@example.com ya29.secretsecret GOCSPX-abcdefghijk",
        }
        w.authority.usual = answer_json(quoted, 400)
        await w.ask(models_path("gemini-3-flash"), CONTENTS)
        logged = "\n".join(map(ampproxy.redact, caplog.messages))
        assert not re.search("secretsecret|abcdefghijk|1//0fred|fred@", logged)


@pytest.mark.parametrize("kind", GOOGLE)
@in_loop
async def test_googles_models_are_listed(tmp_path, kind):
    async with google_world(tmp_path, kind) as w:
        _, got, _ = await w.ask_json("/v1beta/models", method="GET")
        names = {row["name"] for row in got["models"]}
        assert {"models/gemini-3-flash-preview", "models/gemini-3.1-pro-preview"} <= names
        assert ("models/claude-sonnet-4-6" in names) == (kind == "antigravity")
        assert ("models/gemini-claude-opus-4-5-thinking" in names) == (kind == "antigravity")


@pytest.mark.parametrize("kind", GOOGLE)
@in_loop
async def test_the_google_sdk_with_a_login(tmp_path, kind):
    """Text, pictures, tools, thoughts and streams, counting and errors, in Google's own library."""
    genai = pytest.importorskip("google.genai")
    model = "gemini-3-flash-preview"
    async with google_world(tmp_path, kind, hosts=1) as w:
        fake = w.gemini if kind == "gemini" else w.daily
        options = genai.types.HttpOptions(base_url=w.url)
        client = genai.Client(api_key="any", http_options=options).aio
        image = genai.types.Part.from_bytes(data=b"\0", mime_type="image/png")
        fake.usual = answer_json({"response": content("gemini-3-flash"), "traceId": "t"})
        answer = await client.models.generate_content(model=model, contents=["hi", image])
        assert (answer.text, answer.usage_metadata.candidates_token_count) == ("hé", 3)
        assert answer.model_version == (model if kind == "antigravity" else answer.model_version)
        assert fake.body()["request"]["contents"][0]["parts"][1]["inlineData"]["data"] == "AA=="
        thought = {"text": "I think", "thought": True}
        called = {"functionCall": {"name": "f", "args": {"a": 1}}, "thoughtSignature": "czE="}
        fake.usual = answer_json({"response": ended("STOP", thought, called)})
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        tool = genai.types.Tool(
            function_declarations=[{"name": "f", "parameters_json_schema": schema}]
        )
        thinks = genai.types.ThinkingConfig(include_thoughts=True)
        config = genai.types.GenerateContentConfig(
            tools=[tool], system_instruction="be kind", thinking_config=thinks
        )
        answer = await client.models.generate_content(model=model, contents="hi", config=config)
        assert (answer.function_calls[0].name, answer.function_calls[0].args) == ("f", {"a": 1})
        assert answer.candidates[0].content.parts[0].thought is True
        sent = fake.body()["request"]
        assert sent["systemInstruction"]["parts"][0]["text"] == "be kind"
        # The SDK words these in snake_case, and much else in camelCase.
        key = "parameters" if kind == "antigravity" else "parametersJsonSchema"
        assert sent["generationConfig"]["thinkingConfig"] == {"includeThoughts": True}
        assert (
            sent["tools"][0]["functionDeclarations"][0][key]["properties"] == schema["properties"]
        )
        turn = answer.candidates[0].content
        result = genai.types.Part.from_function_response(name="f", response={"result": "1"})
        history = ["hi", turn, genai.types.Content(role="user", parts=[result])]
        fake.usual = (200, SSE, wrapped(*content_chunks()))
        stream = await client.models.generate_content_stream(
            model=model, contents=history, config=config
        )
        assert "".join([chunk.text async for chunk in stream]) == "hé"
        parts = fake.body()["request"]["contents"][1]["parts"]
        assert [part.get("thoughtSignature") for part in parts if "functionCall" in part] == [
            "czE="
        ]
        fake.usual = answer_json({"totalTokens": 7})
        assert (await client.models.count_tokens(model=model, contents="hi")).total_tokens == 7
        fake.usual = answer_json(
            {"error": {"code": 400, "message": "bad", "status": "INVALID_ARGUMENT"}}, 400
        )
        with pytest.raises(genai.errors.ClientError, match="bad"):
            await client.models.generate_content(model=model, contents="hi")
        fake.usual = (200, SSE, [wrapped(*content_chunks())[0], "cut"])
        with pytest.raises(Exception, match="broke off"):
            async for _ in await client.models.generate_content_stream(model=model, contents="hi"):
                pass
        fake.usual = answer_json({"response": ended("MALFORMED_FUNCTION_CALL")})
        with pytest.raises(genai.errors.ServerError, match="MALFORMED_FUNCTION_CALL"):
            await client.models.generate_content(model=model, contents="hi")
        assert model in {
            row.name.removeprefix("models/") async for row in await client.models.list()
        }
        assert (await client.models.get(model=model)).name == f"models/{model}"


def test_no_scanner_takes_the_secrets_of_installed_apps_for_real_ones():
    assert not re.search(r"GOCSPX-[\w-]{10}", SCRIPT.read_text())
    for kind in GOOGLE:
        assert re.fullmatch(r"GOCSPX-[\w-]{28}", ampproxy.LOGINS[kind].client_secret)


# == ChatGPT, the last of it =======================================================================
#
# Device codes, Responses Lite, packed bodies, what belongs to one account, lists of models and the
# words for an effort.


class FakeDevices(FakeUpstream):
    """ChatGPT's login for devices: `polls` are its answers until somebody has typed the code in."""

    def __init__(self, usual):
        super().__init__(usual)
        self.code = answer_json(
            {"device_auth_id": "d-1", "user_code": "ABCD-12345", "interval": "0.1"}
        )
        given = {"authorization_code": "a-code", "code_verifier": "v", "code_challenge": "c"}
        self.polls = [answer_json({}, 403), answer_json({}, 404), answer_json(given)]

    async def handle(self, request):
        if request.path == "/device/usercode":
            self.asked = json.loads(await request.read())
            return await respond(request, self.code)
        if request.path == "/device/token":
            self.poll = json.loads(await request.read())
            return await respond(
                request, self.polls.pop(0) if len(self.polls) > 1 else self.polls[0]
            )
        return await super().handle(request)


@asynccontextmanager
async def device_authority(tmp_path, **row):
    tokens = {
        "access_token": "tok",
        "refresh_token": "rt_1",
        "id_token": id_token(),
        "expires_in": 9,
    }
    fake = FakeDevices(answer_json(tokens))
    async with fake.open():
        row = {"authorize-url": fake.url + "/authorize", "token-url": fake.url + "/token", "callback-port": free_port(),
               "device-url": fake.url + "/device", **row}  # fmt: skip
        config = {"auth-dir": str(tmp_path / "auth"), "providers": {"codex": row}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        yield fake


@pytest.mark.parametrize(("args", "env"), [(["--no-browser"], {}), ([], {"SSH_CONNECTION": "x"}), ([], {"SSH_TTY": "x"})])  # fmt: skip
@in_loop
async def test_a_device_code_stands_beside_the_callback(tmp_path, args, env):
    async with device_authority(tmp_path) as fake:
        with Cli(tmp_path, "login", "codex", *args, **env) as cli:
            status, out, err = await cli.end()
        assert (status, err) == (0, "")
        assert "open https://auth.openai.com/codex/device on any device" in out
        assert "type in the code ABCD-12345" in out
        assert "/authorize?" in out
        assert "paste the address" in out
        assert fake.asked == {"client_id": "app_EMoamEEZ73f0CkXaXp7hrann"}
        assert fake.poll == {"device_auth_id": "d-1", "user_code": "ABCD-12345"}
        (redeemed,) = fake.requests
        assert form_of(redeemed) == {
            "grant_type": "authorization_code", "client_id": "app_EMoamEEZ73f0CkXaXp7hrann", "code": "a-code",
            "redirect_uri": "https://auth.openai.com/deviceauth/callback", "code_verifier": "v",
        }  # fmt: skip
    token = json.loads((tmp_path / "auth/codex-fred@example.com.json").read_text())
    assert (token["access_token"], token["refresh_token"]) == ("tok", "rt_1")


@pytest.mark.parametrize("case", ["no codes", "another spelling", "refused", "garbage", "pending"])
@in_loop
async def test_the_callback_works_whatever_becomes_of_the_code(tmp_path, case):
    async with device_authority(tmp_path) as fake:
        words = "type in the code ABCD-12345"
        if case == "no codes":
            fake.code, words = (
                answer_json({"error": "not enabled"}, 404),
                "There is no code for another device (404: not enabled)",
            )
        if case == "garbage":
            fake.code, words = (200, {}, [b"<html>"]), "There is no code for another device"
        if case == "another spelling":
            fake.code = answer_json({"device_auth_id": "d", "usercode": "ABCD-12345"})
        if case == "refused":
            fake.polls, words = (
                [answer_json({"error": "declined"}, 400)],
                "has ended (400: declined)",
            )
        if case == "pending":
            fake.polls = [answer_json({}, 403)]
        with Cli(tmp_path, "login", "codex", "--no-browser") as cli:
            shown = await cli.until("paste the address")
            asked = query_of(shown)
            if words not in shown:
                await cli.until(words)
            status, _, err = await cli.end(f"code=c0de&state={asked['state']}\n")
        assert (status, err) == (0, "")
        assert form_of(fake.last)["code"] == "c0de"


@pytest.mark.parametrize("kind", ["claude", "codex"])
@in_loop
async def test_a_login_that_nobody_finishes_ends_by_itself(tmp_path, kind):
    assert ampproxy.LOGINS[kind].login_wait == 600
    async with device_authority(tmp_path) as fake:
        fake.polls = [answer_json({}, 403)]
        row = {
            "login-wait": 1,
            "callback-port": free_port(),
            "device-url": fake.url + "/device" if kind == "codex" else "",
        }
        config = {"auth-dir": str(tmp_path / "auth"), "providers": {kind: row}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        with Cli(tmp_path, "login", kind, "--no-browser") as cli:
            status, out, err = await cli.end()
        assert status == 1
        assert "paste the address" in out
        assert (
            err
            == "ampproxy: nobody has finished the login within 0.0166667 minutes: run it again\n"
        )
    assert not list(tmp_path.glob("auth/*"))


# -- What Codex sends --

LITE = {
    "x-openai-internal-codex-responses-lite": "true", "thread-id": "t-1", "x-client-request-id": "r-1",
    "session-id": "s-1", "version": "0.171.0", "x-codex-beta-features": "a",
}  # fmt: skip
LITE_INPUT = [
    {"type": "additional_tools", "role": "developer", "id": "at_1",
     "tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f", "parameters": {}}]}]},
    {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "be kind"}]},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
]  # fmt: skip


@in_loop
async def test_responses_lite_passes_whole(tmp_path):
    async with codex_world(tmp_path) as w:
        asked = {
            "model": "gpt-6.2-sol", "input": LITE_INPUT, "stream": True, "parallel_tool_calls": False, "store": False,
            "reasoning": {"effort": "ultra", "context": "all_turns"}, "text": {"verbosity": "low"},
            "service_tier": "priority", "include": ["reasoning.encrypted_content"], "client_metadata": {"a": "b"},
            "prompt_cache_key": "k",
        }  # fmt: skip
        sent = {**LITE, "x-codex-routing-hint": "h", "chatgpt-account-id": "theirs"}
        assert (await w.ask(CODEX, asked, headers=sent)).status == 200
        got = w.codex.last.headers
        assert {name: got.get(name) for name in LITE} == LITE
        assert "x-codex-routing-hint" not in got
        assert got["Chatgpt-Account-Id"] == "acc-fred@example.com"
        assert w.codex.body() == {**asked, "instructions": ""}, "no tools, no instructions made up"


COMPACTION = {"type": "compaction", "id": "cmp_1", "encrypted_content": "gAAAAblob", "summary": []}


@in_loop
async def test_compaction_goes_and_comes_as_it_is(tmp_path):
    async with codex_world(tmp_path) as w:
        done = event(
            "response.output_item.done", sequence_number=1, output_index=0, item=COMPACTION
        )
        w.codex.usual = (200, SSE, [codex_events()[0], done, codex_events()[4]])
        asked = {**QUESTION, "input": [*QUESTION["input"], {"type": "compaction_trigger"}]}
        got = data_of((await w.ask(CODEX, asked)).bytes)
        assert got[1]["item"] == COMPACTION
        assert got[-1]["response"]["output"] == [COMPACTION]
        assert w.codex.body()["input"] == asked["input"]
        await w.ask(CODEX, {**QUESTION, "input": [COMPACTION, *QUESTION["input"]]})
        assert w.codex.body()["input"] == [COMPACTION, *QUESTION["input"]]
        refused = answer_json(
            {"error": {"code": "invalid_encrypted_content", "message": "no"}}, 400
        )
        w.codex.usual = refused
        response = await w.ask(CODEX, {**QUESTION, "input": [COMPACTION, *QUESTION["input"]]})
        assert response.status == 400
        assert w.codex.body()["input"][0] == COMPACTION, "what was said before is in it alone"


def packed_as(kind, raw):
    if kind.startswith("two"):
        return gzip.compress(raw[:1000]) + gzip.compress(raw[1000:])
    if kind == "deflate":
        return zlib.compress(raw)
    if kind == "bare deflate":
        packer = zlib.compressobj(wbits=-15)
        return packer.compress(raw) + packer.flush()
    if kind == "zstd":
        return zstd_frame(raw)
    return gzip.compress(raw)


def zstd_frame(raw):
    """RFC 8878: magic, a header with the size in eight bytes, blocks as they are or of one byte."""
    frame = [b"\x28\xb5\x2f\xfd\xe0", len(raw).to_bytes(8, "little")]
    pieces = [raw[i : i + 100_000] for i in range(0, len(raw), 100_000)] or [b""]
    for index, piece in enumerate(pieces):
        repeats = len(piece) > 1 and piece.count(piece[:1]) == len(piece)
        head = len(piece) << 3 | repeats << 1 | (index == len(pieces) - 1)
        frame += [head.to_bytes(3, "little"), piece[:1] if repeats else piece]
    return b"".join(frame)


# For a machine without any of the three modules: a reader of such frames with the same surface.
ZSTD_STAND_IN = """
import io

class ZstdError(Exception):
    pass

def open(file, mode):
    if file.read(5) != b"\\x28\\xb5\\x2f\\xfd\\xe0":
        raise ZstdError("magic")
    size, plain, head = int.from_bytes(file.read(8), "little"), [], 0
    while not head & 1:
        raw = file.read(3)
        if len(raw) < 3:
            raise EOFError
        head = int.from_bytes(raw, "little")
        plain.append(file.read(1) * (head >> 3) if head & 2 else file.read(head >> 3))
    whole = b"".join(plain)
    if len(whole) < size:
        raise EOFError
    return io.BytesIO(whole)
"""


@pytest.fixture(params=[*ampproxy.ZSTD_MODULES, "stand-in"])
def zstd(request, tmp_path, monkeypatch):
    """Each of the modules that are there, alone; and a stand-in that always is."""
    name, place = request.param, tmp_path / "modules"
    if name == "stand-in":
        place.mkdir()
        (place / "zstd_stand_in.py").write_text(ZSTD_STAND_IN)
        monkeypatch.syspath_prepend(str(place))
        name = "zstd_stand_in"
    pytest.importorskip(name)
    monkeypatch.setattr(ampproxy, "ZSTD_MODULES", (name,))


@pytest.mark.parametrize(
    "kind", ["gzip", "x-gzip", "GZIP", "deflate", "bare deflate", "two members of gzip"]
)
@in_loop
async def test_packed_bodies_are_read(tmp_path, kind):
    await ask_packed(tmp_path, kind)


@in_loop
async def test_bodies_packed_with_zstd_are_read(tmp_path, zstd):
    await ask_packed(tmp_path, "zstd")


async def ask_packed(tmp_path, kind):
    said = {"Content-Encoding": kind.removeprefix("bare ").removeprefix("two members of ")}
    async with codex_world(tmp_path) as w:
        asked = {**QUESTION, "input": [{"role": "user", "content": "x" * 300_000}]}
        packed = packed_as(kind, json.dumps(asked).encode())
        assert (await w.ask(CODEX, packed, headers=said)).status == 200
        assert w.codex.body()["input"] == asked["input"]
        assert "Content-Encoding" not in w.codex.last.headers
        for broken in (packed[: len(packed) // 2], b"nonsense", b""):
            status, body, _ = await w.ask_json(CODEX, broken, headers=said)
            assert (status, body["error"]["type"]) == (400, "invalid_request_error")
        large = packed_as(kind, b" " * (65 << 20))
        assert len(large) < 1 << 20
        assert (await w.ask(CODEX, large, headers=said)).status == 413, "counted unpacked"
        # Nobody here has the model: what ampcode.com gets is whole, and says what it is.
        unserved = packed_as(kind, json.dumps({**asked, "model": "o9"}).encode())
        response = await w.ask("/api/provider/openai" + CODEX, unserved, headers=said)
        assert (response.status, w.amp.body()["model"]) == (200, "o9")
        assert "Content-Encoding" not in w.amp.last.headers
        assert len(w.codex.requests) == 1


@pytest.mark.parametrize(("kind", "words"), [
    ("zstd", "features.enable_request_compression = false"), ("br", "gzip, deflate, zstd"), ("gzip, gzip", "gzip, deflate, zstd"),
])  # fmt: skip
@in_loop
async def test_packing_that_cannot_be_read_is_a_415_that_says_what_to_do(
    tmp_path, monkeypatch, kind, words
):
    monkeypatch.setattr(ampproxy, "ZSTD_MODULES", ("no_module_of_that_name",))
    async with codex_world(tmp_path) as w:
        packed = zstd_frame(json.dumps(QUESTION).encode())
        for path in (CODEX, "/api/provider/openai" + CODEX):
            status, body, _ = await w.ask_json(path, packed, headers={"Content-Encoding": kind})
            assert (status, words in body["error"]["message"]) == (415, True)
        assert not w.codex.requests + w.amp.requests


@in_loop
async def test_what_is_no_model_call_stays_packed(tmp_path):
    async with codex_world(tmp_path) as w:
        packed = gzip.compress(b"{}")
        await w.ask("/api/telemetry", packed, headers={"Content-Encoding": "gzip"})
        assert (w.amp.last.bytes, w.amp.last.headers["Content-Encoding"]) == (packed, "gzip")


GONE = object()


@pytest.mark.parametrize("output", [[], None, GONE])
@pytest.mark.parametrize("kind", ["response.completed", "response.incomplete"])
@in_loop
async def test_a_lost_output_comes_back_however_it_was_lost(tmp_path, output, kind):
    async with codex_world(tmp_path) as w:
        sent = codex_events(kind=kind, output=output if output is not GONE else [])
        if output is GONE:
            last = json.loads(event_json(sent[4]))
            del last["response"]["output"]
            sent[4] = event(last.pop("type"), **last)
        for items in (True, False):
            w.codex.usual = (200, SSE, sent if items else [*sent[:3], sent[4]])
            wanted = [TEXT_ITEM] if items else []
            got = data_of((await w.ask(CODEX, QUESTION)).bytes)
            assert got[-1]["response"]["output"] == wanted
            whole = (await w.ask_json(CODEX, {**QUESTION, "stream": False}))[1]
            assert (whole["output"], whole["status"]) == (wanted, kind.partition(".")[2])


def event_json(raw):
    return re.search(rb"^data: (.*)$", raw, re.M)[1]


@in_loop
async def test_a_turns_state_goes_back_to_its_own_account_only(tmp_path):
    ann, bob = "ann@example.com", "bob@example.com"
    async with codex_world(tmp_path, (ann, bob)) as w:

        async def play(request):
            who = request.headers["Authorization"].removeprefix("Bearer tok-")
            state = {"x-codex-turn-state": f"state-of-{who}"}
            return web.Response(headers={**SSE, **state}, body=b"".join(codex_events()))

        async def ask(thread, state=None):
            given = {"session-id": thread, **({"X-Codex-Turn-State": state} if state else {})}
            response = await w.ask(CODEX, QUESTION, headers=given)
            assert response.status == 200
            return response.headers["x-codex-turn-state"], w.codex.last.headers.get(
                "x-codex-turn-state"
            )

        w.codex.usual = play
        first, _ = await ask("one")
        second, _ = await ask("two")
        assert {first, second} == {f"state-of-{ann}", f"state-of-{bob}"}
        assert await ask("one", first) == (first, first)
        assert await ask("two", first) == (second, None), "another account's"
        assert await ask("two", second) == (second, second)
        assert await ask("one", "of-nobody-here") == (first, None)
        w.codex.script = [answer_json(SPENT, 429)]
        assert await ask("one", first) == (second, None), "it moved to the other account"
        sent = [r.headers.get("x-codex-turn-state") for r in w.codex.requests[-2:]]
        assert sent == [first, None]


@in_loop
async def test_the_states_that_are_remembered_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(ampproxy, "THREADS", 3)
    async with codex_world(tmp_path) as w:
        for number in range(9):
            w.codex.usual = (200, {**SSE, "x-codex-turn-state": str(number)}, codex_events())
            await w.ask(CODEX, QUESTION)
        assert [*w.server.forwarder.givers] == ["6", "7", "8"]


@pytest.mark.parametrize(
    "suffix", ["/backend-api", "/backend-api/", "/proxy/backend-api", "/proxy/backend-api/codex"]
)
@in_loop
async def test_a_base_url_as_codex_itself_has_it(tmp_path, suffix):
    async with codex_world(tmp_path, suffix=suffix) as w:
        assert (await w.ask(CODEX, QUESTION)).status == 200
        before = "/proxy" if "proxy" in suffix else ""
        assert w.codex.last.raw_path == before + "/backend-api/codex/responses"


# -- Lists, one entry, efforts --


@pytest.mark.parametrize("path", ["/v1/models", "/models", "/api/provider/openai/v1/models"])
@in_loop
async def test_codex_gets_a_list_of_its_own_kind_beside_the_other(tmp_path, path):
    async with codex_world(tmp_path) as w:
        _, got, _ = await w.ask_json(path + "?client_version=0.171.0", method="GET")
        assert got["models"] == []
        assert {"gpt-6.2-sol", "gpt-5.6-luna"} <= {row["id"] for row in got["data"]}
        assert "models" not in (await w.ask_json(path, method="GET"))[1]


@pytest.mark.parametrize(("path", "headers", "dialect"), [
    ("/v1/models/{}", {}, "openai"), ("/models/{}", {}, "openai"), ("/v1/models/{}", {"anthropic-version": "x"}, "anthropic"),
    ("/api/provider/openai/v1/models/{}", {}, "openai"), ("/v1beta/models/{}", {}, "gemini"), ("/v1/models/{}", {"x-goog-api-key": "k"}, "gemini"),
    ("/api/provider/google/v1beta1/publishers/google/models/{}", {}, "gemini"),
])  # fmt: skip
@in_loop
async def test_one_model_or_a_404_in_the_dialect(tmp_path, path, headers, dialect):
    more = {"ampcode": {"model-mappings": [{"from": "quick", "to": "gpt-5.5"}]}}
    async with codex_world(tmp_path, **more) as w:
        for name in ("gpt-6.2-sol", "gpt-9-new", "quick", "gpt-5.5%28high%29"):
            status, got, _ = await w.ask_json(path.format(name), method="GET", headers=headers)
            plain = name.replace("%28", "(").replace("%29", ")")
            assert (
                status,
                got["name" if dialect == "gemini" else "id"].removeprefix("models/"),
            ) == (200, plain)
        status, got, _ = await w.ask_json(
            path.format("claude-opus-4-8"), method="GET", headers=headers
        )
        assert status == 404
        told = {
            "openai": got["error"].get("type"),
            "anthropic": got["error"].get("type"),
            "gemini": got["error"].get("status"),
        }
        assert told[dialect] == ("NOT_FOUND" if dialect == "gemini" else "not_found_error")
        assert (got.get("type") == "error") == (dialect == "anthropic")
        assert not w.amp.requests


@in_loop
async def test_todays_names_are_listed_for_who_has_them(tmp_path):
    """Of each login and key that is present, and of no other."""
    todays = {
        "claude": {"claude-opus-5", "claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5", "claude-fable-5-2", "claude-mythos-5"},
        "codex": {"gpt-5.5", "gpt-5.6-sol", "gpt-6-astra", "gpt-6.1-terra", "gpt-6.2-astra", "codex-auto-review"},
        "gemini": {"gemini-3.1-pro-preview", "gemini-3-flash-preview", "gemini-2.5-pro"},
    }  # fmt: skip

    async def names(w):
        return {row["id"] for row in (await w.ask_json("/v1/models", method="GET"))[1]["data"]}

    for place, kind in enumerate(todays):
        folder = tmp_path / str(place)
        folder.mkdir()
        async with world(folder, tokens=()) as w:
            assert await names(w) == set()
            token_file(w.auth, type=kind)
            w.server.tick()
            listed = await names(w)
            assert listed >= todays[kind]
            assert not any(listed & others for other, others in todays.items() if other != kind)
            w.reload(**{f"{kind}-api-key": [{"api-key": "k"}]}, providers={kind: False})
            w.server.tick()
            assert await names(w) >= todays[kind] - {"codex-auto-review"}


ADAPTIVE, OFF = {"type": "adaptive"}, {"type": "disabled"}
UNKNOWN = [  # list of keys, the name asked for, fields of the body -> fields that reach the provider
    ("claude-api-key", "claude-opus-9(high)", {}, {"thinking": ADAPTIVE, "output_config": {"effort": "high"}}),
    ("claude-api-key", "claude-haiku-5-5(medium)", {}, {"thinking": ADAPTIVE, "output_config": {"effort": "medium"}}),
    ("claude-api-key", "claude-fable-5-2(max)", {}, {"thinking": ADAPTIVE, "output_config": {"effort": "max"}}),
    ("claude-api-key", "claude-mythos-5(ultra)", {}, {"output_config": {"effort": "max"}}),
    ("claude-api-key", "claude-sonnet-5(minimal)", {}, {"output_config": {"effort": "low"}}),
    ("claude-api-key", "claude-new(8192)", {"temperature": 1}, {"output_config": {"effort": "medium"}, "temperature": None}),
    ("claude-api-key", "claude-opus-5(none)", {}, {"thinking": OFF, "output_config": None}),
    ("claude-api-key", "claude-new(none)", {"thinking": ADAPTIVE, "output_config": {"effort": "max"}}, {"thinking": OFF, "output_config": {}}),
    ("claude-api-key", "claude-opus-5-5(0)", {}, {"thinking": OFF}),
    ("claude-api-key", "claude-opus-5-5(high)", {"tool_choice": {"type": "any"}}, {"thinking": OFF, "output_config": None}),
    ("claude-api-key", "claude-opus-4-8(none)", {"thinking": ADAPTIVE}, {"thinking": None}),
    ("claude-api-key", "claude-haiku-4-5(none)", {}, {"thinking": None}),
    ("claude-api-key", "claude-sonnet-4-20250514(low)", {}, {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
    ("claude-api-key", "claude-opus-5(none)", {"context_management": {"edits": [{"type": "clear_thinking_20251015"}]}}, {"context_management": None}),
    ("claude-api-key", "claude-opus-5(none)", {"context_management": {"edits": [{"type": "clear_thinking_20251015"}, {"type": "other"}]}},
     {"context_management": {"edits": [{"type": "other"}]}}),
    ("claude-api-key", "claude-opus-5(high)", {"context_management": {"edits": [{"type": "clear_thinking_20251015"}]}},
     {"context_management": {"edits": [{"type": "clear_thinking_20251015"}]}}),
    ("codex-api-key", "gpt-9(high)", {}, {"reasoning": {"effort": "high"}}),
    ("codex-api-key", "gpt-6.2-sol(ultra)", {}, {"reasoning": {"effort": "ultra"}}),
    ("codex-api-key", "gpt-6-luna(ultra)", {}, {"reasoning": {"effort": "max"}}),
    ("codex-api-key", "gpt-5.6-sol(max)", {}, {"reasoning": {"effort": "max"}}),
    ("codex-api-key", "gpt-5.5(ultra)", {}, {"reasoning": {"effort": "xhigh"}}),
    ("codex-api-key", "gpt-6.2-sol(none)", {}, {"reasoning": {"effort": "low"}}),
    ("codex-api-key", "gpt-6.1-terra-xhigh", {}, {"reasoning": {"effort": "xhigh"}}),
    ("gemini-api-key", "gemini-9-pro(high)", {}, {"includeThoughts": True, "thinkingLevel": "high"}),
    ("gemini-api-key", "gemini-3.5-flash(ultra)", {}, {"includeThoughts": True, "thinkingLevel": "high"}),
    ("gemini-api-key", "gemini-9-flash(none)", {}, {"includeThoughts": False, "thinkingLevel": "minimal"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "asked", "given", "wanted"), UNKNOWN)
@in_loop
async def test_a_name_that_no_table_knows_is_one_of_the_newest(
    tmp_path, kind, asked, given, wanted
):
    async with key_world(tmp_path, kind) as w:
        path, body = asked_as(kind, asked.replace("(", "%28").replace(")", "%29"))
        if kind != "gemini-api-key":
            body |= {"model": asked, **given}
        assert (await w.ask(path, body)).status == 200
        got = w.keyed.body()
        if kind == "gemini-api-key":
            got, wanted = got.get("generationConfig", {}), {"thinkingConfig": wanted}
        assert {name: got.get(name) for name in wanted} == wanted


# == Nobody gets what is not his ===================================================================

A, B, STRAY = (
    {"id": name, "model": "claude-opus-4-6", "content": []} for name in ("a", "b", "stray")
)


def as_answer(value):
    return plain(json.dumps(value).encode())


@pytest.mark.parametrize("when", ["at once", "later", "garbage later"])
@pytest.mark.parametrize("path", ["/v1/messages", "/api/threads"])
@in_loop
async def test_a_second_answer_is_nobodys(tmp_path, path, when):
    """On a kept connection: not the next client's, and none is one behind from then on."""
    gate, out = asyncio.Event(), asyncio.Event()
    stray = b"garbage" if "garbage" in when else as_answer(STRAY)
    first = [as_answer(A) + stray] if when == "at once" else [as_answer(A), gate, stray, out]
    async with raw_world(tmp_path, first, [as_answer(B)]) as w:
        w.raw.after = out
        assert (await w.ask_json(path, ASK))[1] == A
        gate.set()
        if when != "at once":
            await w.raw.played.wait()
        for _ in range(3):
            assert (await w.ask_json(path, ASK))[1] == B
        out.set()
        assert w.raw.connections == 2
        assert len(w.raw.requests) == 4
        assert resting(w) == {}


NONSENSE = {  # what an upstream sends that is no answer, with something secret in it
    "garbage": b"bodysecret \x00\xff\r\n\r\n", "half a head": b"HTTP/1.1 200 OK\r\nSet-Cookie: a=cookiesecret\r\nX: ",
    "a bad header": b"HTTP/1.1 200 OK\r\nSet-Cookie: a=cookiesecret\r\nbad header\r\n\r\n",
    "a bad length": b"HTTP/1.1 200 OK\r\nSet-Cookie: a=cookiesecret\r\nContent-Length: bodysecret\r\n\r\n",
    "a bad chunk": b"HTTP/1.1 200 OK\r\nSet-Cookie: a=cookiesecret\r\nTransfer-Encoding: chunked\r\n\r\nbodysecret\r\n",
    "bad gzip": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nSet-Cookie: cookiesecret\r\nContent-Length: 10\r\n\r\nbodysecret",
    "another protocol": b"HTTP/1.1 101 Switching\r\nSet-Cookie: cookiesecret\r\nUpgrade: bodysecret\r\nConnection: upgrade\r\n\r\n",
    "status 000": b"HTTP/1.1 000 bodysecret\r\nContent-Length: 0\r\n\r\n", "status 099": b"HTTP/1.1 099 bodysecret\r\nContent-Length: 0\r\n\r\n",
    "status 999": b"HTTP/1.1 999 bodysecret\r\nContent-Length: 0\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("name", NONSENSE)
@pytest.mark.parametrize(
    "path",
    [
        "/v1/messages",
        "/api/threads",
        "/api/internal?getUserInfo",
        "/api/provider/anthropic/v1/messages",
    ],
)
@in_loop
async def test_what_went_wrong_is_said_in_our_words(tmp_path, monkeypatch, caplog, path, name):
    monkeypatch.setenv("AMP_API_KEY", "sgamp_keysecret")
    caplog.set_level(logging.DEBUG)
    async with raw_world(tmp_path, [NONSENSE[name], "close"]) as w:
        mark = "&" if "?" in path else "?"
        response = await w.ask(
            f"{path}{mark}key=querysecret", ASK, headers={"Cookie": "cookiesecret"}
        )
        passes = name == "bad gzip" and path != "/v1/messages"  # ampcode.com's own, as it came
        assert response.status == 502 or passes
        told = (
            caplog.text if passes else caplog.text + str(response.headers) + response.bytes.decode()
        )
        told += (await w.ask("/status", method="GET")).bytes.decode()
        for word in (
            "querysecret",
            "cookiesecret",
            "bodysecret",
            "keysecret",
            "sk-ant",
            "Traceback",
        ):
            assert word not in told, word


STEERING = "x\x1b[2J\x9b\u2028\u202e\u202a\ud800\r"


@in_loop
async def test_nothing_steers_the_terminal(tmp_path, capfd):
    async with world(tmp_path, tokens=()) as w:
        ampproxy.set_up_log(True, ())
        path = token_file(w.auth)
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "email": STEERING, "plan": STEERING})
        )
        w.server.tick()
        await w.ask("/v1/messages", {**ASK, "model": f"claude-{STEERING}"})
        w.claude.usual = said(403, STEERING)
        await w.ask("/v1/messages", ASK)
        with Cli(tmp_path, "accounts") as cli:
            code, listed, _ = await cli.end()
        assert code == 0
        w.write(port=w.port)
        with Cli(tmp_path, "status", "--json") as cli:
            code, out, err = await cli.end()
        assert (code, err) == (0, "")
        for line in [*listed.split("\n"), *capfd.readouterr().err.split("\n"), *out.split("\n")]:
            assert line.isprintable(), repr(line)
        assert "\\ud800" in listed


@pytest.mark.parametrize(
    "sent", [b"", b"GET", b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nX-A: "]
)
@in_loop
async def test_a_head_has_its_time(tmp_path, monkeypatch, sent):
    monkeypatch.setattr(ampproxy, "HEAD_WAIT", 0.2)
    async with world(tmp_path) as w:
        reader, writer = await connect_and_send(w.port, sent)
        assert await reader.read() == b"", "cut"
        reader, writer = await connect_and_send(w.port, HEALTH)
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        await reader.readuntil(b"}")
        await asyncio.sleep(0.3)  # a kept connection may wait
        writer.write(HEALTH[:20])
        with suppress(ConnectionError):
            assert await reader.read() == b"", "but half a head on it may not"
        writer.close()


@in_loop
async def test_a_tunnel_outlives_the_time_of_a_head(tmp_path, monkeypatch):
    monkeypatch.setattr(ampproxy, "ANSWER_HEAD_WAIT", 0.1)

    async def echo(request):
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        async for got in ws:
            await ws.send_str(got.data)
        return ws

    async with world(tmp_path) as w:
        w.amp.usual = echo
        async with w.http.ws_connect(w.url + "/actors/gateway") as ws:
            for words in ("one", "two"):
                await asyncio.sleep(0.2)
                await ws.send_str(words)
                assert (await ws.receive()).data == words


@pytest.mark.parametrize("drip", [b"HTTP/1.1 200 OK\r\nX-A: ", b"HTTP/1.1 103 Early Hints\r\n\r\n"])
@in_loop
async def test_the_head_of_an_answer_has_its_time(tmp_path, monkeypatch, drip):
    """From its first byte on; a provider may think for longer before that."""
    monkeypatch.setattr(ampproxy, "ANSWER_HEAD_WAIT", 0.3)
    gone = asyncio.Event()

    async def dripping(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(0.4)
        with suppress(ConnectionError):
            writer.write(drip)
            while not reader.at_eof():
                writer.write(drip if drip.endswith(b"\r\n\r\n") else b"a")
                await writer.drain()
                await asyncio.sleep(0.02)
        gone.set()
        writer.close()

    server = await asyncio.start_server(dripping, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    config = {"request-retry": 1, "ampcode": {"fallback": "never"}, "claude": {"base-url": url}}
    async with world(tmp_path, **config) as w:
        status, body, _ = await w.ask_json("/v1/messages", ASK)
        assert (status, "does not answer in time" in body["error"]["message"]) == (502, True)
        await gone.wait()
    server.close()


@in_loop
async def test_a_slow_body_is_no_slow_head(tmp_path, monkeypatch):
    monkeypatch.setattr(ampproxy, "HEAD_WAIT", 0.2)
    body = json.dumps(ASK).encode()
    async with world(tmp_path) as w:
        reader, writer = await connect_and_send(w.port, post("/v1/messages", len(body), body[:10]))
        await asyncio.sleep(0.4)
        writer.write(body[10:])
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()


@pytest.mark.parametrize(
    "line",
    [
        b"X-A: " + b"a" * 65000 + b"\r\n",
        b"X-%d: a\r\n",
        b"a" * 70000,
        b"X-A: " + b"a" * 8000 + b"\r\n",
    ],
)
@pytest.mark.parametrize("keys", [[], ["k"]])
@in_loop
async def test_a_head_has_its_size(tmp_path, line, keys):
    async with world(tmp_path, **{"api-keys": keys}) as w:
        reader, writer = await connect_and_send(
            w.port, b"GET /api/x HTTP/1.1\r\nHost: localhost\r\n"
        )
        with suppress(ConnectionError):
            for number in range(200_000 // len(line) * 10):
                writer.write(line % number if b"%d" in line else line)
                await writer.drain()
                if writer.is_closing():
                    break
        with suppress(ConnectionError):
            assert int((await reader.readline())[9:12] or 431) in (400, 431)
        writer.transport.abort()
        assert not w.amp.requests


@linux
@in_loop
async def test_half_heads_of_strangers_stop_nobody(tmp_path):
    """400 of them, where 256 files may be open."""
    async with running(tmp_path, answer_json(message()), files=256) as cli:
        assert await cli.ask() == (200, "local")
        idle = []
        for _ in range(400):
            idle.append(
                await connect_and_send(
                    cli.port, b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nX-A: "
                )
            )
        for _ in range(5):
            assert await cli.ask() == (200, "local")
            assert await status_of(cli.port, HEALTH) == 200
        async with cli.http.get("/status") as answer:
            account = (await answer.json())["accounts"][0]
        assert (account["state"], account["errors"]) == ("ready", 0)
        for _, writer in idle:
            writer.transport.abort()


@pytest.mark.parametrize("number", [24, 23, 12, 105, 28, 101, 113])
def test_a_shortage_of_this_machine_is_nobodys_fault(number):
    assert ampproxy.is_local(OSError(number, os.strerror(number)))
    assert not ampproxy.is_local(ConnectionRefusedError(111, "refused"))


@in_loop
async def test_a_name_that_is_not_known_rests_nobody(tmp_path):
    async with world(tmp_path, claude={"base-url": "http://claude.invalid"}) as w:
        status, body, _ = await w.ask_json("/v1/messages", ASK)
        assert (status, "its name is not known" in body["error"]["message"]) == (502, True)
        assert resting(w) == {}
        w.reload()
        assert (await w.ask("/v1/messages", ASK)).status == 200


@pytest.mark.parametrize("path", ["/v1/messages", "/api/threads", PATH])
@in_loop
async def test_a_client_that_takes_nothing_is_cut(tmp_path, path):
    async with world(tmp_path, streaming={"idle-timeout-seconds": 0.5}) as w:
        w.claude.usual = w.amp.usual = Fountain()
        body = json.dumps(
            {**STREAM, "model": "claude-opus-4-6" if path != PATH else "nobody"}
        ).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", w.port, limit=1)
        writer.write(post(path, len(body), body))
        await reader.readexactly(1)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            while True:
                await asyncio.sleep(0.6)  # it takes a little each time, and then nothing
                await reader.readexactly(1 << 30)
        assert not [a for a in w.server.pool.accounts.values() if a.in_flight]


@in_loop
async def test_an_error_that_drips_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(ampproxy, "ERROR_WAIT", 0.2)
    head = b"HTTP/1.1 400 Bad\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    never = asyncio.Event()
    async with raw_world(tmp_path, [head, never]) as w:
        assert (await w.ask("/v1/messages", ASK)).status == 400
        never.set()


def patterns_and_ways():
    """(pattern, how it is used) of each regular expression in the program."""
    tree, found, names = ast.parse(SCRIPT.read_text()), set(), {}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and ast.unparse(node.value.func) == "re.compile"
        ):
            with suppress(ValueError):
                names[node.targets[0].id] = eval(ast.unparse(node.value.args[0]), vars(ampproxy))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, way = ast.unparse(node.func.value), node.func.attr
            if owner == "re" and way != "compile" and isinstance(node.args[0], ast.Constant):
                found.add((node.args[0].value, way))
            elif owner in names:
                found.add((names[owner], way))
    assert {pattern for pattern, _ in found} >= set(names.values()), "each is used somewhere"
    return sorted(found, key=str)


HOSTILE = ["a", ".", "1", "(", "(a", " ", "@", "-low", "gpt-", "a@", "//", "\\", '{"name":"thread-actors-tui",', "[{", "\r", "\n\r", "data:", "x=",
           "sk-", "Bearer ", "/v1", "/v1beta", "1h2m", ":", "#", "?", "code=", "x-codex-a-", "\t", ",", "127.", "é", "\x00", "${a", "1.", "/api/provider/"]  # fmt: skip


PATTERNS = patterns_and_ways()


@pytest.mark.parametrize(("pattern", "way"), PATTERNS, ids=range(len(PATTERNS)))
def test_no_pattern_stands_still(pattern, way):
    """1 MB of whatever takes 50 ms, on a machine that adds up a million bytes in 2.5."""
    began = time.process_time()
    sum(b"x" * 1_000_000)
    most = 20 * max(0.005, time.process_time() - began)
    ways = {"sub": functools.partial(re.sub, pattern, lambda found: ""), "findall": functools.partial(re.findall, pattern),
            "finditer": functools.partial(re.findall, pattern)}  # fmt: skip
    use = ways.get(way) or getattr(re.compile(pattern), way)
    for piece in HOSTILE:
        text = (piece * (1_000_000 // len(piece)))[:1_000_000]
        text = text.encode() if isinstance(pattern, bytes) else text
        many = way in ("sub", "findall", "finditer", "split")  # each match takes its time
        for size in (1000, 10_000, 100_000 if many else 1_000_000):  # what is no line fails at once
            began = time.process_time()
            use(text[:size])
            took, bound = time.process_time() - began, max(most, 0.05) * max(size / 1_000_000, 0.05)
            assert took < bound * (20 if many else 1), (pattern, way, piece, size)


def test_fuzz_of_patterns():
    """Mixtures of what is hostile, for 3 seconds, or as many as AMPPROXY_FUZZ says."""
    until, dice = time.monotonic() + int(os.environ.get("AMPPROXY_FUZZ") or 3), random.Random(1)
    while time.monotonic() < until:
        pattern, way = dice.choice(PATTERNS)
        piece = "".join(dice.choices(HOSTILE, k=dice.randint(1, 6)))
        text = dice.choice(HOSTILE) + piece * (20_000 // len(piece)) + dice.choice(HOSTILE)
        text = text.encode() if isinstance(pattern, bytes) else text
        use = (
            re.compile(pattern).search
            if way in ("sub", "findall", "finditer")
            else getattr(re.compile(pattern), way)
        )
        began = time.process_time()
        use(text)
        assert time.process_time() - began < 0.05, (pattern, way, piece)


@pytest.mark.parametrize(
    "delay", ["." * 32_000, "1" * 32_000, "1h" * 16_000, "9" * 400 + "h", "1." * 16_000]
)
@in_loop
async def test_an_odd_delay_is_read_at_once(tmp_path, delay):
    error = {
        "error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "details": [{"retryDelay": delay}]}
    }
    async with key_world(tmp_path, "gemini-api-key", config={"max-retry-interval": 0}) as w:
        w.keyed.usual = answer_json(error, 429)
        began = time.monotonic()
        assert (await w.ask(models_path("gemini-2.5-pro"), CONTENTS)).status == 429
        assert time.monotonic() - began < 1
        assert (
            max(rest.wakes for a in w.server.pool.accounts.values() for rest in a.rests.values())
            <= 5000 + 1800
        )


@in_loop
async def test_the_flag_again_and_again(tmp_path):
    async with world(tmp_path) as w:
        w.amp.usual = (
            200,
            {"Content-Type": "application/json"},
            [b'[1,{"name":"thread-actors-tui",' * 8000],
        )
        began = time.monotonic()
        assert (await w.ask("/api/internal?getUserInfo", {})).status == 200
        assert time.monotonic() - began < 1


@linux
@pytest.mark.parametrize("status", [400, 404, 429])
@in_loop
async def test_refused_prompts_are_not_kept(tmp_path, status):
    """Prompts of 10 MB, with the collector switched off; after a 429 each waits out a second."""
    code = "import gc, sys; gc.disable(); import ampproxy; sys.exit(ampproxy.main(sys.argv[1:]))"
    body = json.dumps({**ASK, "messages": [{"role": "user", "content": "x" * 10_000_000}]}).encode()
    async with running(tmp_path, said(status, "model: x"), script=["-c", code]) as cli:
        before = None
        for number in range(8 if status == 429 else 31):
            model = f"claude-{number}" if status == 404 else "claude-opus-4-6"
            data = body.replace(b"claude-opus-4-6", model.encode())
            async with cli.http.post("/v1/messages", data=data) as answer:
                assert answer.status == status, await answer.text()
            rss = (
                int(
                    re.search(
                        r"VmRSS:\s*(\d+)", Path(f"/proc/{cli.process.pid}/status").read_text()
                    )[1]
                )
                >> 10
            )
            before = before or rss
        assert rss - before < 60


@pytest.mark.parametrize("beta", ["a\x00b", "a\x08b", "a\x7fb"])
@in_loop
async def test_what_no_header_can_hold_is_a_400(tmp_path, beta):
    async with world(tmp_path) as w:
        status, body, _ = await w.ask_json("/v1/messages", {**ASK, "betas": [beta]})
        assert (status, "cannot be sent in a header" in body["error"]["message"]) == (400, True)
        assert not w.claude.requests
        assert resting(w) == {}
        w.reload(claude={"headers": {"X-A": beta}})
        assert (await w.ask("/v1/messages", ASK)).status == 400
        assert resting(w) == {}


@in_loop
async def test_comments_before_the_first_event_keep_the_client_waiting_with_comments(tmp_path):
    beats = [asyncio.Event() for _ in range(8)]
    parts = [part for beat in beats for part in (beat, b": OPENROUTER PROCESSING\n\n")]
    async with key_world(
        tmp_path, "openai-compatibility", config={"streaming": {"keepalive-seconds": 0.1}}
    ) as w:
        w.keyed.usual = (200, SSE, [*parts, *completion_chunks()])
        path, body = asked_as("openai-compatibility", stream=True)
        asked = asyncio.create_task(w.http.post(w.url + path, json=body))
        for beat in beats[:5]:  # each comes before the proxy's own is due
            beat.set()
            await asyncio.sleep(0.05)
        response = await asked
        assert await response.content.readuntil(b"\n") == b": keep-alive\n"
        for beat in beats:
            beat.set()
        rest = await response.content.read()
        assert rest.endswith(b"".join(completion_chunks()))


@pytest.mark.parametrize("index", ["0", [1], None, 1.5, True, {"a": 1}])
@pytest.mark.parametrize("stream", [True, False])
@in_loop
async def test_an_item_at_an_odd_index(tmp_path, index, stream):
    odd = event("response.output_item.done", output_index=index, item=TEXT_ITEM)
    async with codex_world(tmp_path) as w:
        w.codex.usual = (200, SSE, [odd, codex_events()[4]])
        status, body, _ = await w.ask_json(CODEX, {**QUESTION, "stream": stream})
        assert (status, body["error"]["message"]) == (502, "codex sent no whole answer")
        w.codex.usual = (200, SSE, [*codex_events()[:3], odd])
        if stream:
            assert data_of((await w.ask(CODEX, QUESTION)).bytes)[-1]["type"] == "response.failed"


@in_loop
async def test_items_without_an_end_are_not_collected(tmp_path, monkeypatch):
    monkeypatch.setattr(ampproxy, "BODY_LIMIT", 100_000)
    item = event("response.output_item.done", item={**TEXT_ITEM, "x": "y" * 10_000})
    async with codex_world(tmp_path, **{"request-retry": 1}) as w:
        w.codex.usual = (200, SSE, [item] * 30)
        last = data_of((await w.ask(CODEX, QUESTION)).bytes)
        assert len(last) < 12
        assert last[-1]["type"] == "response.failed"


@pytest.mark.parametrize("kind", ["fifo", "directory", "large", "link to nothing"])
@in_loop
async def test_what_is_no_file_is_named_and_left_alone(tmp_path, caplog, kind):
    async with world(tmp_path) as w:
        odd = w.auth / "aaa.json"
        if kind == "fifo":
            os.mkfifo(odd)
        elif kind == "directory":
            odd.mkdir()
        elif kind == "large":
            odd.write_bytes(b" " * 20_000_000)
        else:
            odd.symlink_to(tmp_path / "nowhere")
        began = time.monotonic()
        w.server.tick()
        w.server.tick()
        assert time.monotonic() - began < 2
        assert caplog.text.count(str(odd)) == (kind != "link to nothing"), "once"
        assert (await w.ask("/v1/messages", ASK)).status == 200


@in_loop
async def test_a_link_is_followed_and_its_target_written(tmp_path):
    async with world(tmp_path, tokens=()) as w:
        real = token_file(tmp_path / "elsewhere", expired="2020-01-01T00:00:00Z")
        (w.auth).mkdir()
        link = w.auth / "claude-fred.json"
        link.symlink_to(real)
        w.server.tick()
        assert (await w.ask("/v1/messages", ASK)).status == 200
        assert link.is_symlink()
        assert json.loads(real.read_text())["refresh_token"] == "sk-ant-ort-new"


@in_loop
async def test_drafts_of_a_crash_are_swept(tmp_path):
    auth = tmp_path / "auth"
    auth.mkdir()
    (auth / ".claude-a@b.c.json.0a1b2c3d.tmp").write_text("{half")
    (auth / ".other").write_text("mine")
    async with world(tmp_path):
        assert sorted(path.name for path in auth.iterdir()) == [
            ".other",
            "claude-fred@example.com.json",
        ]


def test_a_config_of_20_mb_is_refused_with_a_sentence(tmp_path):
    (tmp_path / "config.yaml").write_text("#" * 20_000_000)
    with pytest.raises(ampproxy.Failure, match="larger than 4 MiB"):
        ampproxy.Live(tmp_path / "config.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ampproxy.Failure, match="no regular file"):
        ampproxy.Live(tmp_path / "pipe.yaml")


@pytest.mark.parametrize("piece", [b"[],", b"{},", b"1,", b'"",', b"[[1]],"])
@in_loop
async def test_too_many_values_keep_nobody_waiting(tmp_path, piece):
    raw = (
        b'{"model": "claude-opus-4-6", "messages": [' + piece * (30_000_000 // len(piece)) + b"1]}"
    )
    async with world(tmp_path) as w:
        asked, began, longest = (
            asyncio.create_task(w.ask_json("/v1/messages", raw)),
            time.monotonic(),
            0,
        )
        while not asked.done():
            await asyncio.sleep(0)
            longest, began = max(longest, time.monotonic() - began), time.monotonic()
        status, body, _ = await asked
        assert (status, "million values" in body["error"]["message"]) == (400, True)
        assert longest < 0.5
        raw = json.dumps(
            {**ASK, "messages": [{"role": "user", "content": "a, b [c] " * 300_000}]}
        ).encode()
        assert (await w.ask("/v1/messages", raw)).status == 200, "a text may have as many commas"


@pytest.mark.parametrize("headers", [
    b"Upgrade: \xff\r\nConnection: Upgrade", b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: \xff\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: \xff", b"Upgrade: websocket\r\nConnection: Upgrade",
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 99\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
])  # fmt: skip
@in_loop
async def test_handshakes_that_are_none(tmp_path, headers):
    async with world(tmp_path) as w:
        got = await raw_exchange(
            w.port, b"GET /actors/x HTTP/1.1\r\nHost: localhost\r\n" + headers + b"\r\n\r\n"
        )
        assert re.match(rb"HTTP/1\.[01] (400|200) ", got)
        assert b" 400 " in got.split(b"\r\n")[0] or b"\xff" in headers.split(b"\r\n")[0]


@in_loop
async def test_only_a_get_without_a_body_upgrades(tmp_path):
    shake = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    async with world(tmp_path) as w:
        assert await status_of(w.port, post("/api/x", 4, b"body", shake)) == 200
        assert (w.amp.last.method, w.amp.last.bytes, "Upgrade" in w.amp.last.headers) == (
            "POST",
            b"body",
            False,
        )
        sent = post("/api/y", 4, b"body", shake).replace(b"POST", b"GET")
        assert await status_of(w.port, sent) == 200
        assert (w.amp.last.method, w.amp.last.bytes) == ("GET", b"body")


@pytest.mark.parametrize(("line", "statuses"), [
    (b"TRACE /api/x HTTP/1.1", {405}), (b"GET /api/x", {400, 505}), (b"GET /api/x HTTP/0.9", {400, 505}),
    (b"GET /api/x HTTP/2.0", {400, 505}), (b"GET /api/x HTTP/1.2", {400, 505}), (b"GET /api/x HTTP/3.0", {400, 505}),
])  # fmt: skip
@in_loop
async def test_methods_and_versions_that_are_not_served(tmp_path, line, statuses):
    async with world(tmp_path, ampcode={"upstream-api-key": "sgamp_up"}) as w:
        got = await raw_exchange(w.port, line + b"\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert int(got[9:12]) in statuses
        assert not w.amp.requests


EVENT_PIECES = [b"data: ", b"data:", b"event: message_start\n", b"\n", b"\n\n", b"\r\n", b"\r", b": c", b"{", b"}", b'{"type":"ping"}', b"[DONE]", b"id: 1",
                b'{"type":"message_stop"}', b'{"type":"error","error":{"message":"x"}}', b'{"model":"m","choices":[{"finish_reason":"stop"}]}', b"\xef\xbb\xbf",
                b'{"type":"response.completed","response":{"output":null,"usage":null}}', b"\xff", b'{"candidates":[{"finishReason":5}]}', b"null", b"retry: x",
                b'{"type":"response.output_item.done","output_index":"x"}', b'{"usage":[1],"message":{"usage":{"input_tokens":"9"}}}', b'"error"']  # fmt: skip


def test_fuzz_of_event_streams(tmp_path):
    """Whatever comes in whatever pieces: an answer in the dialect, no 500, no hang; likewise."""
    seconds = int(os.environ.get("AMPPROXY_FUZZ") or 3)
    streams = st.lists(
        st.lists(st.sampled_from(EVENT_PIECES), max_size=6).map(b"".join), max_size=6
    )

    async def one(w, kind, parts):
        w.keyed.usual = (200, SSE, [part for part in parts if part])
        w.clock.now += 10_000
        path, body = asked_as(kind, stream=True)
        async with asyncio.timeout(10):
            with suppress(aiohttp.ClientPayloadError):  # a Gemini stream's error
                assert (await w.ask(path, body)).status in (200, 400, 404, 413, 429, 502, 503, 529)

    def fuzz(kind, until):
        with asyncio.Runner() as runner:
            here = key_world(
                tmp_path / kind, kind, config={"request-retry": 1, "max-retry-interval": 0}
            )
            w = runner.run(here.__aenter__())
            quick = settings(max_examples=25, deadline=None, database=None, suppress_health_check=[*HealthCheck])  # fmt: skip
            case = quick(given(streams)(lambda parts: runner.run(one(w, kind, parts))))
            for start in itertools.takewhile(lambda _: time.monotonic() < until, itertools.count()):
                seed(start)(case)()
            runner.run(here.__aexit__(None, None, None))

    for kind in KINDS:
        (tmp_path / kind).mkdir()
        fuzz(kind, time.monotonic() + seconds / len(KINDS))


# == Models ========================================================================================


@pytest.mark.parametrize(("path", "headers", "shape"), [
    ("/v1/models", {}, "openai"), ("/models", {}, "openai"), ("/v1/v1/models", {}, "openai"),
    ("/api/provider/openai/v1/models", {}, "openai"), ("/api/provider/xai/models", {}, "openai"),
    ("/v1/models", {"anthropic-version": "2023-06-01"}, "anthropic"), ("/api/provider/anthropic/v1/models", {}, "anthropic"),
    ("/v1beta/models", {}, "gemini"), ("/v1/models", {"x-goog-api-key": "k"}, "gemini"),
    ("/api/provider/google/v1beta/models", {}, "gemini"),
])  # fmt: skip
@in_loop
async def test_models_that_are_served_are_listed_in_each_shape(tmp_path, path, headers, shape):
    models = [{"name": "backend", "alias": "mine"}, "wild-*", "plain"]
    async with key_world(
        tmp_path, "openai-compatibility", tokens=("fred@example.com",), models=models
    ) as w:
        status, got, _ = await w.ask_json(path, method="GET", headers=headers)
        assert status == 200
        if shape == "gemini":
            names = [row["name"].removeprefix("models/") for row in got["models"]]
            assert all(
                "generateContent" in row["supportedGenerationMethods"] for row in got["models"]
            )
        else:
            names = [row["id"] for row in got["data"]]
            assert {row["type" if shape == "anthropic" else "object"] for row in got["data"]} == {
                "model"
            }
        if shape == "anthropic":
            assert (got["has_more"], got["first_id"], got["last_id"]) == (
                False,
                names[0],
                names[-1],
            )
            assert all(row["display_name"] and row["created_at"] for row in got["data"])
        if shape == "openai":
            assert got["object"] == "list"
            assert {row["owned_by"] for row in got["data"]} == {"claude", "router"}
        assert {"mine", "plain", "claude-opus-4-6"} <= set(names)
        assert not [
            name for name in names if "*" in name or name.startswith(("gpt", "backend", "gemini"))
        ]
        assert not w.amp.requests


@in_loop
async def test_models_follow_the_accounts_and_the_exclusions(tmp_path):
    async with world(tmp_path, tokens=(), claude={"excluded-models": ["*-haiku-*"]}) as w:
        assert (await w.ask_json("/v1/models", method="GET"))[1]["data"] == []
        _, got, _ = await w.ask_json("/v1/models", method="GET", headers={"anthropic-version": "x"})
        assert (got["data"], got["has_more"], got["first_id"], got["last_id"]) == (
            [],
            False,
            None,
            None,
        )
        token_file(w.auth)
        w.server.tick()
        names = [row["id"] for row in (await w.ask_json("/v1/models", method="GET"))[1]["data"]]
        assert any("opus" in name for name in names)
        assert not any("haiku" in name for name in names)


@pytest.mark.parametrize("version", ["v1beta", "v1"])
@in_loop
async def test_the_google_sdk(tmp_path, version):
    genai = pytest.importorskip("google.genai")
    async with key_world(tmp_path, "gemini-api-key") as w:
        options = genai.types.HttpOptions(base_url=w.url, api_version=version)
        client, model = genai.Client(api_key="any", http_options=options).aio, "gemini-2.5-flash"
        image = genai.types.Part.from_bytes(data=b"\0", mime_type="image/png")
        w.keyed.usual = answer_json(content(model))
        answer = await client.models.generate_content(model=model, contents=["hi", image])
        assert (
            answer.text,
            answer.model_version,
            answer.usage_metadata.candidates_token_count,
        ) == ("hé", model, 3)
        assert w.keyed.body()["contents"][0]["parts"][1]["inlineData"]["data"] == "AA=="
        w.keyed.usual = (200, SSE, content_chunks(model))
        stream = await client.models.generate_content_stream(model=model, contents="hi")
        assert "".join([chunk.text async for chunk in stream]) == "hé"
        call = {"functionCall": {"name": "f", "args": {"a": 1}}, "thoughtSignature": "czE="}
        candidate = {"content": {"role": "model", "parts": [call]}, "finishReason": "STOP"}
        w.keyed.usual = answer_json({**content(model), "candidates": [candidate]})
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        tool = genai.types.Tool(function_declarations=[{"name": "f", "parameters": schema}])
        asked = genai.types.GenerateContentConfig(tools=[tool], system_instruction="be kind")
        answer = await client.models.generate_content(model=model, contents="hi", config=asked)
        assert (answer.function_calls[0].name, answer.function_calls[0].args) == ("f", {"a": 1})
        assert w.keyed.body()["tools"][0]["functionDeclarations"][0]["name"] == "f"
        w.keyed.usual = answer_json({"totalTokens": 7})
        assert (await client.models.count_tokens(model=model, contents="hi")).total_tokens == 7
        w.keyed.usual = answer_json(
            {"error": {"code": 400, "message": "bad", "status": "INVALID_ARGUMENT"}}, 400
        )
        with pytest.raises(genai.errors.ClientError, match="bad"):
            await client.models.generate_content(model=model, contents="hi")
        w.keyed.usual = (200, SSE, [*content_chunks(model)[:1], "cut"])
        with pytest.raises(Exception, match="broke off"):
            async for _ in await client.models.generate_content_stream(model=model, contents="hi"):
                pass


@pytest.mark.parametrize("base", ["/v1", "/api/provider/openrouter/v1"])
@in_loop
async def test_the_openai_sdk_with_chat_completions(tmp_path, base):
    openai = pytest.importorskip("openai")
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
    }
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    async with key_world(tmp_path, "openai-compatibility") as w:
        client = openai.AsyncOpenAI(api_key="k", base_url=w.url + base, max_retries=0)
        asked = [{"role": "user", "content": [{"type": "text", "text": "hi"}, image]}]
        answer = await client.chat.completions.create(model="gpt-5.4(low)", messages=asked)
        assert (answer.choices[0].message.content, answer.model) == ("hé", "gpt-5.4(low)")
        assert (w.keyed.body()["messages"], w.keyed.body()["reasoning_effort"]) == (asked, "low")
        called = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        whole = completion()
        whole["choices"][0] |= {
            "message": {"role": "assistant", "tool_calls": [called]},
            "finish_reason": "tool_calls",
        }
        w.keyed.usual = answer_json(whole)
        answer = await client.chat.completions.create(model="gpt-5.4", messages=asked, tools=[tool])
        assert (answer.choices[0].message.tool_calls[0].function.name, w.keyed.body()["tools"]) == (
            "f",
            [tool],
        )
        w.keyed.usual = (200, SSE, completion_chunks())
        stream = await client.chat.completions.create(model="gpt-5.4", messages=asked, stream=True)
        assert (
            "".join(
                [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
            )
            == "hé"
        )
        assert "gpt-5.4" in [model.id async for model in client.models.list()]
        w.keyed.usual = answer_json(
            {"error": {"message": "no", "type": "invalid_request_error"}}, 400
        )
        with pytest.raises(openai.BadRequestError, match="no"):
            await client.chat.completions.create(model="gpt-5.4", messages=asked)
        w.keyed.usual = (200, SSE, [*completion_chunks()[:1], "cut"])
        with pytest.raises(openai.APIError, match="broke off"):
            async for _ in await client.chat.completions.create(
                model="gpt-5.4", messages=asked, stream=True
            ):
                pass
        await client.close()


# == Mappings ======================================================================================

EXACT = {"from": "Quick", "to": "gpt-5.4"}
REGEX = {"from": "^qu.*k$", "to": "gpt-5.5", "regex": True}
SUFFIXES = [  # rules, the name asked for -> served, effort
    ([EXACT], "quick", "gpt-5.4", None), ([EXACT], "QUICK", "gpt-5.4", None), ([EXACT], "quick(8192)", "gpt-5.4", "medium"),
    ([EXACT], "quick(high)", "gpt-5.4", "high"), ([EXACT], "quick(auto)", "gpt-5.4", None), ([EXACT], "quick(none)", "gpt-5.4", "none"),
    ([EXACT], "quick()", "gpt-5.4", None), ([EXACT], "quick(high", None, None), ([EXACT], "quicker", None, None),
    ([{"from": "quick", "to": "gpt-5.4(medium)"}], "quick(high)", "gpt-5.4", "medium"),
    ([{"from": "quick", "to": "gpt-5.4(medium)"}], "quick", "gpt-5.4", "medium"),
    ([{"from": "quick", "to": "gpt-5.4-low"}], "quick(high)", "gpt-5.4", "low"),
    ([REGEX], "quick(8192)", "gpt-5.5", "medium"), ([REGEX], "QUACK", "gpt-5.5", None), ([REGEX, EXACT], "quick", "gpt-5.4", None),
    ([{"from": "ick", "to": "gpt-5.5", "regex": True}], "quick", "gpt-5.5", None),
    ([{"from": "quick", "to": "nobody-has-it"}, REGEX], "quick", "gpt-5.5", None),
    ([{"from": "quick", "to": ["nobody-has-it", "gpt-5.4", "gpt-5.5"]}], "quick", "gpt-5.4", None),
    ([{"from": "quick", "to": "quick"}], "quick", None, None), ([{"from": "zed(high)", "to": "gpt-5.4"}], "zed(high)", "gpt-5.4", "high"),
    ([EXACT], "quick(²)", "gpt-5.4", None), ([EXACT], "quick(-1)", "gpt-5.4", None), ([EXACT], "quick(foo)", "gpt-5.4", None),
    ([EXACT], "quick(" + "9" * 5000 + ")", "gpt-5.4", None), ([EXACT], "quick(max)", "gpt-5.4", "xhigh"),
    ([{"from": "quick", "to": "slow"}, {"from": "slow", "to": "quick"}], "quick", None, None),
    ([{"from": "gpt-5.4", "to": "gpt-5.5"}], "gpt-5.4", "gpt-5.4", None),
    ([{"from": "gpt-5.9-mini", "to": "nobody-has-it"}], "gpt-5.9-mini-high", "gpt-5.9-mini", "high"),
]  # fmt: skip


@pytest.mark.parametrize(("rules", "asked", "served", "effort"), SUFFIXES)
@in_loop
async def test_mappings(tmp_path, rules, asked, served, effort):
    config = {"ampcode": {"model-mappings": rules, "fallback": "never"}}
    async with codex_world(tmp_path, **config) as w:
        w.codex.usual = (200, SSE, codex_events(served or "x"))
        response = await w.ask(CODEX, {**QUESTION, "model": asked})
        if served is None:
            assert (response.status, len(w.codex.requests)) == (404, 0)
            assert response.headers["x-ampproxy-route"] == "none"
            return
        body = w.codex.body()
        assert (body["model"], body.get("reasoning", {}).get("effort")) == (served, effort)
        assert [e["response"]["model"] for e in data_of(response.bytes) if "response" in e] == [
            asked
        ] * 3
        local = served in asked
        assert response.headers["x-ampproxy-route"] == ("local" if local else "mapped")
        assert (response.headers["x-ampproxy-model"], response.headers["x-ampproxy-provider"]) == (
            served,
            "codex",
        )
        assert w.server.ledger.routes["local" if local else "mapped"] == 1


@in_loop
async def test_forced_mappings_come_before_the_model_itself(tmp_path):
    rules = {
        "model-mappings": [{"from": "gpt-5.4", "to": ["nobody-has-it", "gpt-5.5"]}],
        "force-model-mappings": True,
    }
    async with codex_world(tmp_path, ampcode=rules) as w:
        response = await w.ask(CODEX, QUESTION)
        assert (w.codex.body()["model"], response.headers["x-ampproxy-route"]) == (
            "gpt-5.5",
            "mapped",
        )
        response = await w.ask(CODEX, {**QUESTION, "model": "gpt-5.5"})
        assert (w.codex.body()["model"], response.headers["x-ampproxy-route"]) == (
            "gpt-5.5",
            "local",
        )

        async def spent(request):
            gone = json.loads(request.bytes)["model"] == "gpt-5.5"
            return await respond(
                request,
                answer_json({"detail": "Not Found"}, 404) if gone else (200, SSE, codex_events()),
            )

        w.codex.usual = spent
        response = await w.ask(CODEX, QUESTION)
        assert (w.codex.body()["model"], response.headers["x-ampproxy-route"]) == (
            "gpt-5.4",
            "local",
        )
        assert not w.amp.requests


@in_loop
async def test_the_targets_of_a_list_are_tried_in_order(tmp_path):
    """And an answer's model is the name that was asked for, whoever answers in the end."""
    rules = {
        "model-mappings": [
            {"from": "quick", "to": ["gpt-5.4(high)", "claude-haiku-4-5", "gpt-5.5"]}
        ]
    }
    async with codex_world(tmp_path, ampcode=rules) as w:

        async def lacks(request):
            gone = json.loads(request.bytes)["model"] == "gpt-5.4"
            return await respond(
                request,
                answer_json({"detail": "Not Found"}, 404)
                if gone
                else (200, SSE, codex_events("gpt-5.5")),
            )

        w.codex.usual = lacks
        response = await w.ask("/api/provider/openai" + CODEX, {**QUESTION, "model": "quick"})
        assert (response.status, response.headers["x-ampproxy-model"]) == (200, "gpt-5.5")
        assert [w.codex.body(i)["model"] for i in range(2)] == ["gpt-5.4", "gpt-5.5"]
        assert (w.codex.body(0)["reasoning"], w.codex.body(1).get("reasoning")) == (
            {"effort": "high"},
            None,
        )
        assert {e["response"]["model"] for e in data_of(response.bytes) if "response" in e} == {
            "quick"
        }
        assert w.server.ledger.routes["mapped"] == 1
        assert not w.amp.requests


@pytest.mark.parametrize("path", [CODEX, "/api/provider/openai" + CODEX])
@in_loop
async def test_nobody_else_is_asked_once_an_answer_has_begun(tmp_path, path):
    rules = {"model-mappings": [{"from": "quick", "to": ["gpt-5.4", "gpt-5.5"]}]}
    async with codex_world(tmp_path, ampcode=rules) as w:
        w.codex.usual = (200, SSE, [*codex_events()[:3], "cut"])
        response = await w.ask(path, {**QUESTION, "model": "quick"})
        kinds = [row["type"] for row in data_of(response.bytes)]
        assert kinds == [
            "response.created",
            "response.in_progress",
            "response.output_text.delta",
            "response.failed",
        ]
        assert (len(w.codex.requests), len(w.amp.requests)) == (1, 0)
        assert (w.server.ledger.requests[-1]["route"], w.server.ledger.routes["amp"]) == (
            "mapped",
            0,
        )


@in_loop
async def test_a_mapped_call_that_falls_back_goes_as_it_came(tmp_path):
    rules = {"model-mappings": [{"from": "quick", "to": "gpt-5.4"}]}
    async with codex_world(tmp_path, ampcode=rules) as w:
        w.codex.usual = answer_json(SPENT, 429)
        sent = b'{ "model":"quick(high)", "input": [],"stream" :true}'
        response = await w.ask("/api/provider/openai" + CODEX, sent)
        assert (response.headers["x-ampproxy-route"], response.headers["x-ampproxy-model"]) == (
            "amp",
            "quick(high)",
        )
        assert w.amp.last.bytes == sent


@in_loop
async def test_gemini_paths_are_mapped_too(tmp_path):
    rules = {
        "ampcode": {
            "model-mappings": [{"from": "gemini-9(.*)", "to": "gemini-2.5-flash", "regex": True}]
        }
    }
    async with key_world(tmp_path, "gemini-api-key", models=["gemini-2*"], config=rules) as w:
        w.keyed.usual = answer_json(content("gemini-2.5-flash"))
        path = "/api/provider/google/v1beta1/publishers/google/models/gemini-9-pro:generateContent"
        status, got, headers = await w.ask_json(path, CONTENTS)
        assert (status, got, headers["x-ampproxy-route"]) == (
            200,
            content("gemini-9-pro"),
            "mapped",
        )
        assert w.keyed.last.raw_path == models_path("gemini-2.5-flash")


@in_loop
async def test_a_long_name_is_no_burden_for_a_pattern(tmp_path):
    """A pattern's time may grow with the square of the name's length."""
    rules = [{"from": "gpt.*-mini", "to": "gpt-5.4", "regex": True}]
    async with codex_world(tmp_path, ampcode={"model-mappings": rules, "fallback": "never"}) as w:
        began = time.monotonic()
        response = await w.ask(CODEX, {**QUESTION, "model": "gpt" * 200_000})
        assert (response.status, time.monotonic() - began < 2) == (404, True)


@in_loop
async def test_a_file_renamed_into_place_with_the_old_time_is_seen(tmp_path):
    async with world(tmp_path) as w:
        [path] = w.tokens
        kept, draft = path.stat(), path.with_name("draft")
        draft.write_text(path.read_text().replace("sk-ant-oat-fred", "sk-ant-oat-bert"))
        os.utime(draft, ns=(kept.st_atime_ns, kept.st_mtime_ns))
        draft.replace(path)
        w.server.tick()
        await w.ask("/v1/messages", ASK)
        assert w.claude.last.headers["Authorization"] == "Bearer sk-ant-oat-bert@example.com"


@in_loop
async def test_names_that_are_mapped_are_listed(tmp_path):
    rules = [
        {"from": "quick", "to": "gpt-5.4"},
        {"from": "lost", "to": "nobody-has-it"},
        {"from": "some", "to": ["gpt-5.2", "nobody-has-it"]},
        {"from": "^q", "to": "gpt-5.4", "regex": True},
    ]
    async with codex_world(tmp_path, ampcode={"model-mappings": rules}) as w:
        names = [row["id"] for row in (await w.ask_json("/v1/models", method="GET"))[1]["data"]]
        assert {"quick", "some"} <= set(names)
        assert not {"lost", "^q"} & set(names)


@in_loop
async def test_a_paid_call_says_which_mapping_would_have_helped(tmp_path, caplog):
    async with codex_world(tmp_path) as w:
        assert (
            await w.ask("/api/provider/openai" + CODEX, {**QUESTION, "model": "o9-new"})
        ).headers["x-ampproxy-route"] == "amp"
        assert re.search("AMP_CREDITS .* o9-new ", caplog.text)
        assert "model-mappings: [{from: o9-new, to: " in caplog.text
        w.reload(ampcode={"fallback": "never"})
        status, body, _ = await w.ask_json(
            "/api/provider/anthropic/v1/messages", {**ASK, "model": "claude-9"}
        )
        assert (status, "claude-9" in body["error"]["message"]) == (404, True)


BUDGET = {"type": "enabled", "budget_tokens": 2000}
EFFORTS = [  # list of keys, the name asked for, fields of the body -> fields that reach the provider
    ("claude-api-key", "claude-opus-4-7(max)", {}, {"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}),
    ("claude-api-key", "claude-opus-4-7(xhigh)", {}, {"output_config": {"effort": "xhigh"}}),
    ("claude-api-key", "claude-opus-4-6(xhigh)", {}, {"output_config": {"effort": "max"}}),
    ("claude-api-key", "claude-sonnet-4-6(max)", {}, {"output_config": {"effort": "high"}}),
    ("claude-api-key", "claude-sonnet-4-6(minimal)", {}, {"output_config": {"effort": "low"}}),
    ("claude-api-key", "claude-opus-4-6(8192)", {"output_config": {"format": {}}}, {"output_config": {"format": {}, "effort": "medium"}}),
    ("claude-api-key", "claude-haiku-4-5(8192)", {}, {"thinking": {"type": "enabled", "budget_tokens": 8192}, "max_tokens": 12288}),
    ("claude-api-key", "claude-haiku-4-5(high)", {"max_tokens": 64000}, {"thinking": {"type": "enabled", "budget_tokens": 24576}, "max_tokens": 64000}),
    ("claude-api-key", "claude-haiku-4-5(9)", {}, {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
    ("claude-api-key", "claude-haiku-4-5(999999999)", {}, {"thinking": {"type": "enabled", "budget_tokens": 59904}, "max_tokens": 64000}),
    ("claude-api-key", "claude-opus-4-1-20250805(max)", {}, {"max_tokens": 32000}),
    ("claude-api-key", "claude-haiku-4-5(none)", {"thinking": BUDGET, "top_k": 3}, {"thinking": None, "top_k": 3}),
    ("claude-api-key", "claude-haiku-4-5(high)", {"thinking": BUDGET, "temperature": 0.7, "top_k": 3}, {"temperature": None, "top_k": None}),
    ("claude-api-key", "claude-haiku-4-5(high)", {"thinking": BUDGET, "tool_choice": {"type": "any"}, "temperature": 0.7}, {"thinking": None, "temperature": 0.7}),
    ("claude-api-key", "claude-haiku-4-5(auto)", {"thinking": BUDGET, "max_tokens": 4000}, {"thinking": BUDGET}),
    ("claude-api-key", "claude-haiku-4-5(low)", {"output_config": {"effort": "high"}}, {"output_config": {}}),
    ("claude-api-key", "claude-opus-4-7(none)", {"thinking": BUDGET, "output_config": {"effort": "high"}}, {"thinking": None, "output_config": {}}),
    ("claude-api-key", "claude-3-5-haiku-20241022(high)", {}, {"thinking": None, "max_tokens": 100}),
    ("claude-api-key", "claude-haiku-4-5(foo)", {"thinking": BUDGET, "max_tokens": 4000}, {"thinking": BUDGET}),
    ("gemini-api-key", "gemini-2.5-pro(none)", {}, {"includeThoughts": False, "thinkingBudget": 128}),
    ("gemini-api-key", "gemini-2.5-flash(none)", {}, {"includeThoughts": False, "thinkingBudget": 0}),
    ("gemini-api-key", "gemini-2.5-flash(max)", {}, {"includeThoughts": True, "thinkingBudget": 24576}),
    ("gemini-api-key", "gemini-3-pro-preview(medium)", {}, {"includeThoughts": True, "thinkingLevel": "high"}),
    ("gemini-api-key", "gemini-3-flash-preview(512)", {}, {"includeThoughts": True, "thinkingLevel": "minimal"}),
    ("gemini-api-key", "gemini-3.1-pro-preview(medium)", {}, {"includeThoughts": True, "thinkingLevel": "medium"}),
    ("gemini-api-key", "gemma-3-27b-it(high)", {}, None),
    ("codex-api-key", "gpt-5.4(max)", {}, {"reasoning": {"effort": "xhigh"}}),
    ("openai-compatibility", "gpt-5.4(99999)", {}, {"reasoning_effort": "xhigh"}),
    ("openai-compatibility", "claude-haiku-4-5(8192)", {}, {"reasoning_effort": "medium"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "asked", "given", "wanted"), EFFORTS)
@in_loop
async def test_a_suffix_is_said_as_the_model_takes_it(tmp_path, kind, asked, given, wanted):
    models = {"models": ["*"]} if kind == "openai-compatibility" else {}
    async with key_world(tmp_path, kind, **models) as w:
        path, body = asked_as(kind, asked.replace("(", "%28").replace(")", "%29"))
        if kind != "gemini-api-key":
            body |= {"model": asked, **given}
        response = await w.ask(path, body)
        assert (response.status, response.headers["x-ampproxy-model"]) == (
            200,
            asked.partition("(")[0],
        )
        got = w.keyed.body()
        if kind == "gemini-api-key":
            got, wanted = got.get("generationConfig", {}), {"thinkingConfig": wanted}
        assert {name: got.get(name) for name in wanted} == wanted


@in_loop
async def test_what_a_model_takes_can_be_overridden(tmp_path):
    more = {"thinking": {"gemini-3-pro-new": "low medium"}}
    async with key_world(tmp_path, "gemini-api-key", **more) as w:
        for model, level in (("gemini-3-pro-new", "medium"), ("gemini-3-pro", "high")):
            await w.ask(models_path(f"{model}%28high%29"), CONTENTS)
            assert w.keyed.body()["generationConfig"]["thinkingConfig"]["thinkingLevel"] == level


@pytest.mark.parametrize("takes", ["", "foo", "1024-", "low high-er", "-"])
@in_loop
async def test_what_a_model_is_said_to_take_may_be_nonsense(tmp_path, takes):
    for rest in ("low high", takes, "1024-2048"):
        more = {"models": ["*"], "thinking": {"gemini-3-pro-new": takes, "*": rest}}
        async with key_world(tmp_path, "gemini-api-key", **more) as w:
            for model in ("gemini-3-pro-new", "gemini-2.5-pro", "other"):
                response = await w.ask(models_path(f"{model}%28high%29"), CONTENTS)
                assert response.status == 200
            assert w.server.ledger.requests[-1]["status"] == 200


@in_loop
async def test_tool_names_and_thinking_come_back_as_they_were(tmp_path):
    """No tool is renamed, so no casing can be lost: neither asked for, nor answered."""
    tools = [
        {"name": name, "input_schema": {"type": "object"}} for name in ("Bash", "glob", "mcp__X__y")
    ]
    block = {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {}}
    thought = {"type": "thinking", "thinking": "", "signature": ""}
    stream = [events("claude-haiku-4-5-20251001")[0], event("content_block_start", index=0, content_block=thought),
              event("content_block_stop", index=0), event("content_block_start", index=1, content_block=block),
              *events()[3:]]  # fmt: skip
    rules = {"model-mappings": [{"from": "claude-9", "to": "claude-haiku-4-5-20251001"}]}
    async with world(tmp_path, ampcode=rules) as w:
        w.claude.usual = (200, SSE, stream)
        response = await w.ask(PATH, {**STREAM, "model": "claude-9", "tools": tools})
        assert w.claude.body()["tools"] == tools
        assert response.bytes == b"".join(stream).replace(b"claude-haiku-4-5-20251001", b"claude-9")


@in_loop
async def test_paid_calls_are_counted_by_model(tmp_path):
    async with codex_world(tmp_path) as w:
        for model in ("o9", "o9", "o8", "gpt-5.4"):
            await w.ask("/api/provider/openai" + CODEX, {**QUESTION, "model": model})
        w.amp.usual = answer_json({"error": "no credits"}, 402)
        await w.ask("/api/provider/openai" + CODEX, {**QUESTION, "model": "o7"})
        assert (await w.ask_json("/status", method="GET"))[1]["paid"] == {"o9": 2, "o8": 1}


@in_loop
async def test_never_says_who_could_have_served(tmp_path):
    async with codex_world(tmp_path, ampcode={"fallback": "never"}) as w:
        status, body, _ = await w.ask_json(PATH, ASK)
        assert status == 404
        assert (
            "'claude-opus-4-6': claude after `ampproxy.py login claude` would"
            in body["error"]["message"]
        )
        status, body, _ = await w.ask_json(PATH, {**ASK, "model": "grok-4"})
        assert "'grok-4': map it" in body["error"]["message"]
        assert not w.amp.requests


def test_route_says_who_would_serve_and_why(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    rules = [{"from": "quick", "to": ["nobody-has-it", "gpt-5.5(high)"]}]
    file.write_text(
        yaml.safe_dump({"auth-dir": str(tmp_path), "ampcode": {"model-mappings": rules}})
    )
    codex_file(tmp_path)

    def lines(*args):
        assert ampproxy.main(["route", *args, "--config", str(file)]) == 0
        return capsys.readouterr().out.splitlines()

    assert lines("quick(low)") == [
        *(f"{name} does not have {model}" for model in ("quick", "nobody-has-it") for name in ampproxy.LOGINS),
        "claude does not have gpt-5.5", "codex serves gpt-5.5",
        "gemini does not have gpt-5.5", "antigravity does not have gpt-5.5",
        "So mapped: codex as gpt-5.5 high"]  # fmt: skip
    assert lines("gpt-5.4-low")[-1] == "So local: codex as gpt-5.4 low"
    assert "codex serves gpt-5.4" in lines("gpt-5.4", "--dialect", "anthropic")
    *_, first, _, _, _, decision = lines("claude-opus-4-7")
    assert first == "claude after `ampproxy.py login claude` would serve claude-opus-4-7"
    assert decision == "So nobody here; fallback: always"
    file.write_text(file.read_text().replace("ampcode:", "ampcode:\n  fallback: never"))
    assert lines("claude-opus-4-7")[-1] == "So nobody here; fallback: never"
    google_file(tmp_path, "antigravity")
    asked = lines("gemini-3-pro-preview")[-1]
    assert asked == "So local: antigravity as gemini-3-pro-high", "what is asked for there"


# == Translation: the neutral form =================================================================

DIALECTS = {
    dialect.name: dialect
    for dialect in (
        ampproxy.ANTHROPIC,
        ampproxy.CHAT_COMPLETIONS,
        ampproxy.RESPONSES,
        ampproxy.GEMINI,
    )
}
MODELS = {"anthropic": "claude-x", "chat": "qwen-x", "responses": "gpt-x", "gemini": "gemini-2.5-x"}
PAIRS = [(ours, theirs) for ours in DIALECTS for theirs in DIALECTS]
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
PNG = "iVBORw0KGgo="
PDF = "JVBERi0="

# One conversation, and how each dialect spells it.
CONVERSATION = ampproxy.Ask(
    turns=[
        ampproxy.Turn("system", [ampproxy.Text("be kind")]),
        ampproxy.Turn(
            "user",
            [
                ampproxy.Text("look"),
                ampproxy.Media("image", "image/png", PNG),
                ampproxy.Media("document", "application/pdf", PDF, name="a.pdf"),
            ],
        ),
        ampproxy.Turn(
            "assistant",
            [
                ampproxy.Text("I ask"),
                ampproxy.ToolCall("call_1", "weather", '{"city":"Rom"}'),
                ampproxy.ToolCall("call_2", "weather", '{"city":"Oslo"}'),
            ],
        ),
        ampproxy.Turn(
            "user",
            [
                ampproxy.ToolResult("call_1", [ampproxy.Text("sun")]),
                ampproxy.ToolResult("call_2", [ampproxy.Text("rain")]),
                ampproxy.Text("so?"),
            ],
        ),
    ],
    tools=[ampproxy.Tool("weather", "tells it", WEATHER)],
    choice="any",
    limit=500,
    sampling={"temperature": 0.5, "top_p": 0.9},
    stops=["END"],
)
TOOLS = {
    "anthropic": [{"name": "weather", "description": "tells it", "input_schema": WEATHER}],
    "chat": [
        {
            "type": "function",
            "function": {"name": "weather", "description": "tells it", "parameters": WEATHER},
        }
    ],
    "responses": [
        {
            "type": "function",
            "name": "weather",
            "description": "tells it",
            "parameters": WEATHER,
            "strict": False,
        }
    ],
    "gemini": [
        {
            "functionDeclarations": [
                {"name": "weather", "description": "tells it", "parameters": WEATHER}
            ]
        }
    ],
}


def tool_use(id, city):
    return {"type": "tool_use", "id": id, "name": "weather", "input": {"city": city}}


def chat_call(id, city):
    function = {"name": "weather", "arguments": json.dumps({"city": city}, separators=(",", ":"))}
    return {"id": id, "type": "function", "function": function}


SPELT = {
    "anthropic": {
        "model": "claude-x",
        "stream": True,
        "max_tokens": 500,
        "system": [{"type": "text", "text": "be kind"}],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "look"},
                    {
                        "type": "image",
                        "source": {"type": "base64", "media_type": "image/png", "data": PNG},
                    },
                    {
                        "type": "document",
                        "source": {"type": "base64", "media_type": "application/pdf", "data": PDF},
                        "title": "a.pdf",
                    },
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "I ask"},
                    tool_use("call_1", "Rom"),
                    tool_use("call_2", "Oslo"),
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "call_1",
                        "content": [{"type": "text", "text": "sun"}],
                    },
                    {
                        "type": "tool_result",
                        "tool_use_id": "call_2",
                        "content": [{"type": "text", "text": "rain"}],
                    },
                    {"type": "text", "text": "so?"},
                ],
            },
        ],
        "tools": TOOLS["anthropic"],
        "tool_choice": {"type": "any"},
        "stop_sequences": ["END"],
        "temperature": 0.5,
        "top_p": 0.9,
    },
    "chat": {
        "model": "qwen-x",
        "messages": [
            {"role": "system", "content": "be kind"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "look"},
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
                    {
                        "type": "file",
                        "file": {
                            "filename": "a.pdf",
                            "file_data": f"data:application/pdf;base64,{PDF}",
                        },
                    },
                ],
            },
            {
                "role": "assistant",
                "content": "I ask",
                "tool_calls": [chat_call("call_1", "Rom"), chat_call("call_2", "Oslo")],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
            {"role": "tool", "tool_call_id": "call_2", "content": "rain"},
            {"role": "user", "content": "so?"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 500,
        "stop": ["END"],
        "temperature": 0.5,
        "top_p": 0.9,
        "tools": TOOLS["chat"],
        "tool_choice": "required",
    },
    "responses": {
        "model": "gpt-x",
        "input": [
            {
                "type": "message",
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "look"},
                    {
                        "type": "input_image",
                        "image_url": f"data:image/png;base64,{PNG}",
                        "detail": "auto",
                    },
                    {
                        "type": "input_file",
                        "filename": "a.pdf",
                        "file_data": f"data:application/pdf;base64,{PDF}",
                    },
                ],
            },
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "I ask", "annotations": []}],
            },
            {
                "type": "function_call",
                "call_id": "call_1",
                "name": "weather",
                "arguments": '{"city":"Rom"}',
            },
            {
                "type": "function_call",
                "call_id": "call_2",
                "name": "weather",
                "arguments": '{"city":"Oslo"}',
            },
            {"type": "function_call_output", "call_id": "call_1", "output": "sun"},
            {"type": "function_call_output", "call_id": "call_2", "output": "rain"},
            {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "so?"}],
            },
        ],
        "stream": True,
        "store": False,
        "instructions": "be kind",
        "include": ["reasoning.encrypted_content"],
        "max_output_tokens": 500,
        "temperature": 0.5,
        "top_p": 0.9,
        "tools": TOOLS["responses"],
        "tool_choice": "required",
    },
    "gemini": {
        "contents": [
            {
                "role": "user",
                "parts": [
                    {"text": "look"},
                    {"inlineData": {"mimeType": "image/png", "data": PNG}},
                    {"inlineData": {"mimeType": "application/pdf", "data": PDF}},
                ],
            },
            {
                "role": "model",
                "parts": [
                    {"text": "I ask"},
                    {"functionCall": {"name": "weather", "args": {"city": "Rom"}}},
                    {"functionCall": {"name": "weather", "args": {"city": "Oslo"}}},
                ],
            },
            {
                "role": "user",
                "parts": [
                    {"functionResponse": {"name": "weather", "response": {"result": "sun"}}},
                    {"functionResponse": {"name": "weather", "response": {"result": "rain"}}},
                    {"text": "so?"},
                ],
            },
        ],
        "systemInstruction": {"parts": [{"text": "be kind"}]},
        "generationConfig": {
            "temperature": 0.5,
            "topP": 0.9,
            "maxOutputTokens": 500,
            "stopSequences": ["END"],
        },
        "tools": TOOLS["gemini"],
        "toolConfig": {"functionCallingConfig": {"mode": "ANY"}},
    },
}
LOST_STOPS = "responses"  # that dialect has no stop sequences: they are watched for here


def target_of(dialect, ask, model=""):
    model = model or MODELS[dialect]
    names = ampproxy.Names(ask, DIALECTS[dialect].name_rule)
    hosted = ("web_search", "code_interpreter")
    return ampproxy.Target(model, ampproxy.family_of(dialect, model), names, 32000, hosted)


def write(dialect, ask, model=""):
    return DIALECTS[dialect].write_request(ask, target_of(dialect, ask, model))


def read(dialect, body):
    return DIALECTS[dialect].read_request(body)


def told(turns):
    """A history as it will be written, without what tells no two histories apart."""
    system, rest = ampproxy.split_off_system(ampproxy.Ask(turns), "")
    calls = {}
    lines = [("system", "".join(part.text for part in system))]
    for turn in rest:
        for part in turn.parts:
            match part:
                case ampproxy.ToolCall():
                    calls[part.id] = len(calls)
                    what = (part.name, json.loads(part.text), calls[part.id])
                case ampproxy.ToolResult():
                    what = (calls[part.id], [inner.text for inner in part.parts])
                case ampproxy.Media():
                    what = (part.kind, part.mime, part.data)
                case _:
                    what = part.text
            lines.append((turn.role, type(part).__name__, what))
    return lines


@pytest.mark.parametrize("dialect", DIALECTS)
def test_one_conversation_in_four_spellings_is_read_alike(dialect):
    ask = read(dialect, SPELT[dialect])
    assert told(ask.turns) == told(CONVERSATION.turns)
    assert [dataclasses.replace(tool, strict=False) for tool in ask.tools] == CONVERSATION.tools
    assert (ask.choice, ask.limit, ask.sampling) == ("any", 500, CONVERSATION.sampling)
    assert ask.stops == ([] if dialect == LOST_STOPS else ["END"])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_one_conversation_is_written_in_four_spellings(dialect):
    body = write(dialect, CONVERSATION)
    if dialect == "anthropic":
        marks = json.dumps(body).count('"cache_control"')
        assert marks == 4
        body = json.loads(json.dumps(body).replace(', "cache_control": {"type": "ephemeral"}', ""))
    assert body == SPELT[dialect]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_every_client_reaches_every_provider_with_the_same_words(ours, theirs):
    there = write(theirs, read(ours, SPELT[ours]))
    assert told(read(theirs, there).turns) == told(CONVERSATION.turns)


def test_reading_and_writing_change_nothing_that_is_read():
    for dialect, body in SPELT.items():
        before = json.dumps(body)
        ask = read(dialect, body)
        again = json.dumps(write("anthropic", ask))
        assert json.dumps(write("anthropic", ask)) == again
        assert json.dumps(body) == before


# -- Streams: one list of events, sixteen pairs --


def play(reply):
    """An answer with everything that a stream can hold: interleaved calls, thoughts, a seal."""
    reply.name("abc")
    reply.think("let me")
    reply.think(" see")
    reply.seal("c2VhbA==")
    reply.say("Grüße, ")
    reply.say('"世界"\n\\')
    reply.call(1, "call_1", "weather")
    reply.arguments(1, '{"city":')
    reply.call(2, "call_2", "weather")
    reply.arguments(2, '{"city":"Os')
    reply.arguments(1, '"Rom"}')
    reply.call_done(1)
    reply.arguments(2, 'lo"}')
    reply.call_done(2)
    reply.usage.update(read=12, cached=5, written=9, thought=4)
    reply.stopped("end")
    reply.finish()


def new_reply(dialect, kind=None, maker="anthropic/claude", stops=(), tools=()):
    ask = ampproxy.Ask(tools=list(tools))
    names = ampproxy.Names(ask, ampproxy.WORD_NAME)
    reply = (kind or DIALECTS[dialect].writer)(list(stops), "asked-for", maker, names)
    reply.tells_usage = True
    return reply


def stream_of(dialect, story=play, **more):
    reply = new_reply(dialect, **more)
    story(reply)
    return b"".join(reply.out)


class FakeCall:
    """What the reading of a stream needs of a call."""

    provider = "fake"

    def __init__(self, dialect, streams=True):
        self.dialect, self.streams = DIALECTS[dialect], streams
        self.tokens = (0, 0)

    def count(self, read, written):
        self.tokens = (read, written)


async def in_chunks(raw, size):
    for start in range(0, len(raw), size):
        yield raw[start : start + size]


async def translate(raw, theirs, ours, size=0, kind=None, **more):
    """A stream of one dialect as a client of another one gets it, and the Reply behind it."""
    reply = new_reply(ours, kind, **more)
    reader = DIALECTS[theirs].reader(reply)
    pieces = in_chunks(raw, size or len(raw) or 1)
    got = ampproxy.translated(FakeCall(ours), reader, pieces, False, lambda is_over: None)
    return b"".join([data async for data in got]), reply


def blocks(reply):
    return [(type(b).__name__, b.text, getattr(b, "id", "")) for b in reply.blocks]


PLAYED = [
    ("Thought", "let me see", ""),
    ("Text", 'Grüße, "世界"\n\\', ""),
    ("ToolCall", '{"city":"Rom"}', "call_1"),
    ("ToolCall", '{"city":"Oslo"}', "call_2"),
]
UNTOLD = {  # (from, to): what Anthropic's usage has no place for
    "anthropic": {"thought": 0},
}


@pytest.mark.parametrize("size", [1, 7, 0])
@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
@in_loop
async def test_one_stream_in_sixteen_pairs(theirs, ours, size):
    raw = stream_of(theirs)
    out, reply = await translate(raw, theirs, ours, size)
    assert blocks(reply) == PLAYED
    assert reply.stop == "call"
    back = new_reply(ours, ampproxy.Reply)
    reader = DIALECTS[ours].reader(back)
    ampproxy.read_run(FakeCall(ours), reader, out)
    back.finish()
    assert blocks(back) == PLAYED
    usage = {"read": 12, "cached": 5, "cache_written": 0, "written": 9, "thought": 4}
    usage |= UNTOLD.get(theirs, {}) | UNTOLD.get(ours, {})
    assert vars(back.usage) == usage
    assert back.stop == "call"


@pytest.mark.parametrize("ours", DIALECTS)
@in_loop
async def test_an_answer_in_one_piece_is_the_folded_stream(ours):
    reply = new_reply(ours, ampproxy.Reply)
    play(reply)
    whole = json.loads(json.dumps(DIALECTS[ours].write_answer(reply)))
    back = new_reply(ours, ampproxy.Reply)
    DIALECTS[ours].reader(back).read_whole(whole)
    back.finish()
    assert blocks(back) == PLAYED


def frames(raw):
    """The events of a stream as JSON."""
    events = ampproxy.split_events(raw)
    return [json.loads(data) for e in events if (data := ampproxy.event_data(e)) != b"[DONE]"]


def test_the_grammar_of_anthropic():
    kinds = [(e["type"], e.get("index")) for e in frames(stream_of("anthropic"))]
    assert kinds[0] == ("message_start", None)
    assert kinds[-2:] == [("message_delta", None), ("message_stop", None)]
    opened = None
    for kind, index in kinds[1:-2]:
        if kind == "content_block_start":
            assert opened is None
            opened = index
        assert index == opened
        if kind == "content_block_stop":
            opened = None
    starts = [index for kind, index in kinds if kind == "content_block_start"]
    assert starts == [0, 1, 2, 3]


def test_the_grammar_of_chat():
    events = frames(stream_of("chat"))
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len({(e["id"], e["created"], e["model"], e["object"]) for e in events}) == 1
    deltas = [choice["delta"] for e in events for choice in e["choices"]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["index"] for call in calls if "id" in call] == [0, 1]
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]][-1] == "tool_calls"
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["total_tokens"] == 21
    assert stream_of("chat").endswith(b"data: [DONE]\n\n")


def test_the_grammar_of_responses():
    events = frames(stream_of("responses"))
    assert [e["sequence_number"] for e in events] == [*range(len(events))]
    assert [e["type"] for e in events][:2] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == "response.completed"
    added = [e for e in events if e["type"] == "response.output_item.added"]
    done = [e for e in events if e["type"] == "response.output_item.done"]
    assert [e["output_index"] for e in added] == [0, 1, 2, 3]
    assert [e["item"]["id"] for e in added] == [e["item"]["id"] for e in done]
    assert [e["item"] for e in done] == events[-1]["response"]["output"]
    ids = {e["output_index"]: e["item"]["id"] for e in added}
    for e in events:
        if "item_id" in e:
            assert e["item_id"] == ids[e["output_index"]]


def test_the_grammar_of_gemini():
    events = frames(stream_of("gemini"))
    parts = [part for e in events for part in e["candidates"][0]["content"]["parts"]]
    calls = [part["functionCall"] for part in parts if "functionCall" in part]
    assert [(call["id"], call["args"]) for call in calls] == [
        ("call_1", {"city": "Rom"}),
        ("call_2", {"city": "Oslo"}),
    ]
    assert [e["candidates"][0].get("finishReason") for e in events][-2:] == [None, "STOP"]
    assert events[-1]["usageMetadata"]["totalTokenCount"] == 21


@in_loop
async def test_what_comes_together_leaves_together_and_at_once():
    raw = stream_of("chat")
    reader = DIALECTS["chat"].reader(new_reply("anthropic"))
    gate = asyncio.Event()

    async def pieces():
        first, second, third, *_ = ampproxy.split_events(raw)
        yield first + second + third
        await gate.wait()
        yield raw[len(first + second + third) :]

    call = FakeCall("anthropic")
    got = ampproxy.translated(call, reader, pieces(), False, lambda is_over: None)
    assert b"let me" in await anext(got)
    gate.set()
    assert (await anext(got)).endswith(b"\n\n")


# -- Ends and errors of a stream --


@pytest.mark.parametrize("theirs", DIALECTS)
@pytest.mark.parametrize("ours", ["anthropic", "responses"])
@in_loop
async def test_a_cut_stream_is_an_error_and_what_came_is_sent(theirs, ours):
    raw = stream_of(theirs)
    for cut in range(0, len(raw) - 1, 97):
        reply = new_reply(ours)
        reader = DIALECTS[theirs].reader(reply)
        sent = b""
        try:
            pieces = in_chunks(raw[:cut], 64)
            async for data in ampproxy.translated(
                FakeCall(ours), reader, pieces, False, lambda is_over: None
            ):
                sent += data
        except ampproxy.ProxyError as error:
            assert error.problem.status == 502
            assert not sent or sent.endswith(b"\n\n")
        else:
            assert reply.stop  # its end had been told already
        assert b"message_stop" not in sent or reply.stop


FINISHES = [  # dialect, the last words of a provider -> how it ended
    ("anthropic", "end_turn", "end"),
    ("anthropic", "max_tokens", "length"),
    ("anthropic", "stop_sequence", "sequence"),
    ("anthropic", "pause_turn", "pause"),
    ("anthropic", "refusal", "refusal"),
    ("anthropic", "model_context_window_exceeded", "context"),
    ("anthropic", "a_word_of_tomorrow", "end"),
    ("chat", "stop", "end"),
    ("chat", "length", "length"),
    ("chat", "content_filter", "refusal"),
    ("chat", "a_word_of_tomorrow", "end"),
    ("gemini", "STOP", "end"),
    ("gemini", "MAX_TOKENS", "length"),
    ("gemini", "SAFETY", "refusal"),
    ("gemini", "PROHIBITED_CONTENT", "refusal"),
    ("gemini", "BLOCKLIST", "refusal"),
    ("gemini", "SPII", "refusal"),
    ("gemini", "RECITATION", "refusal"),
    ("gemini", "OTHER", "end"),
]
SAID = {  # how it ended -> the words of each dialect
    "end": ("end_turn", "stop", "completed", "STOP"),
    "length": ("max_tokens", "length", "incomplete", "MAX_TOKENS"),
    "sequence": ("stop_sequence", "stop", "completed", "STOP"),
    "pause": ("pause_turn", "stop", "completed", "STOP"),
    "refusal": ("refusal", "content_filter", "incomplete", "SAFETY"),
    "context": ("model_context_window_exceeded", "length", "incomplete", "MAX_TOKENS"),
}


def ended_with(dialect, word):
    """The events of an answer that says `hi` and ends so."""
    if dialect == "anthropic":
        return b"".join(events()).replace(b'"end_turn"', json.dumps(word).encode())
    if dialect == "chat":
        delta = {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": word}]}
        return b"data: " + json.dumps(delta).encode() + b"\n\ndata: [DONE]\n\n"
    candidate = {"content": {"parts": [{"text": "hi"}]}, "finishReason": word}
    return b"data: " + json.dumps({"candidates": [candidate]}).encode() + b"\n\n"


def end_word(dialect, reply):
    answer = DIALECTS[dialect].write_answer(reply)
    match dialect:
        case "anthropic":
            return answer["stop_reason"]
        case "chat":
            return answer["choices"][0]["finish_reason"]
        case "responses":
            return answer["status"]
    return answer["candidates"][0]["finishReason"]


@pytest.mark.parametrize(("theirs", "word", "end"), FINISHES)
@in_loop
async def test_why_an_answer_ended(theirs, word, end):
    for ours, expected in zip(DIALECTS, SAID[end], strict=True):
        _, reply = await translate(ended_with(theirs, word), theirs, ours)
        assert reply.stop == end
        assert end_word(ours, reply) == expected


@in_loop
async def test_a_stop_sequence_that_the_provider_does_not_know_is_watched_for():
    def story(reply):
        for words in ("one ", "two E", "N", "D three"):
            reply.say(words)
        reply.stopped("end")
        reply.finish()

    out, reply = await translate(
        stream_of("responses", story), "responses", "anthropic", stops=["END", "nie"]
    )
    assert [block.text for block in reply.blocks] == ["one two "]
    assert frames(out)[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "END"}
    _, reply = await translate(
        stream_of("responses", story), "responses", "anthropic", stops=["three four"]
    )
    assert [block.text for block in reply.blocks] == ["one two END three"]


# -- Any bytes, any history --

ANY_WORDS = st.text(max_size=12)
IDS = st.sampled_from(["", "a", "b", "call_1", "x" * 80, "ü/ö"])
TOOL_NAMES = st.sampled_from(["weather", "a.b", "mcp__x__y", "z" * 90, "ä", ""])
ARGUMENTS = st.sampled_from(["", "{}", "[1]", '{"a":1}', "no json", '{"a":'])
SEALS = st.one_of(
    st.none(),
    st.builds(
        ampproxy.Seal,
        st.sampled_from(["anthropic/claude", "responses/gpt", "gemini/gemini", "chat/qwen"]),
        st.sampled_from(["", "c2VhbA==", "gAAAAx"]),
        st.booleans(),
    ),
)
MEDIA = st.builds(
    ampproxy.Media,
    st.sampled_from(["image", "document"]),
    st.sampled_from(["", "image/png", "application/pdf"]),
    st.just(PNG),
)
TEXTS = st.builds(ampproxy.Text, ANY_WORDS)
PARTS = st.one_of(
    TEXTS,
    MEDIA,
    st.builds(ampproxy.Thought, ANY_WORDS, SEALS),
    st.builds(ampproxy.ToolCall, IDS, TOOL_NAMES, ARGUMENTS, free=st.booleans()),
    st.builds(ampproxy.ToolResult, IDS, st.lists(st.one_of(TEXTS, MEDIA), max_size=2)),
)
TURNS = st.builds(
    ampproxy.Turn,
    st.sampled_from(["user", "assistant", "system"]),
    st.lists(PARTS, max_size=4),
)
ASKS = st.builds(
    ampproxy.Ask,
    turns=st.lists(TURNS, max_size=6),
    tools=st.lists(st.builds(ampproxy.Tool, TOOL_NAMES, ANY_WORDS, st.just(WEATHER)), max_size=3),
    choice=st.sampled_from(["", "auto", "any", "none"]),
    parallel=st.sampled_from([None, True, False]),
)
ROUNDS = int(os.environ.get("AMPPROXY_ROUNDS", "200"))


def well_formed(ask):
    """Every call has its one result behind it, in order; no blank text; roles take turns."""
    turns = ampproxy.repaired(ask.turns)
    for turn, behind in itertools.zip_longest(turns, turns[1:]):
        calls = [part.id for part in turn.parts if isinstance(part, ampproxy.ToolCall)]
        results = (
            [p.id for p in behind.parts if isinstance(p, ampproxy.ToolResult)] if behind else []
        )
        assert results == calls
        assert behind is None or behind.role != turn.role
        assert not [p for p in turn.parts if isinstance(p, ampproxy.Text) and not p.text.strip()]


@settings(max_examples=ROUNDS, deadline=None, suppress_health_check=[*HealthCheck])
@given(ASKS)
def test_any_history_is_put_right_and_survives_every_pair(ask):
    well_formed(ask)
    for ours, theirs in PAIRS:
        try:
            body = json.loads(json.dumps(write(ours, ask)))
            there = json.loads(json.dumps(write(theirs, read(ours, body))))
            read(theirs, there)
        except ampproxy.ProxyError as error:
            assert error.problem.status == 400


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("say"), ANY_WORDS),
        st.tuples(st.just("think"), ANY_WORDS),
        st.tuples(st.just("seal"), st.sampled_from(["", "c2VhbA=="])),
        st.tuples(st.just("call"), st.integers(0, 3), IDS, TOOL_NAMES.filter(bool)),
        st.tuples(st.just("arguments"), st.integers(0, 3), ARGUMENTS),
        st.tuples(st.just("call_done"), st.integers(0, 3), ARGUMENTS),
        st.tuples(st.just("stopped"), st.sampled_from(["", "end", "length", "refusal"])),
    ),
    max_size=25,
)


@settings(max_examples=ROUNDS, deadline=None, suppress_health_check=[*HealthCheck])
@given(STEPS, st.sampled_from(PAIRS), st.integers(1, 99))
def test_any_stream_survives_every_pair(steps, pair, size):
    theirs, ours = pair

    def story(reply):
        for verb, *rest in steps:
            getattr(reply, verb)(*rest)
        reply.usage.update(read=1, written=1)
        reply.finish()

    raw = stream_of(theirs, story)
    spoken = new_reply(theirs, ampproxy.Reply)
    story(spoken)
    if theirs == "gemini" and not spoken.blocks and spoken.stop == "end":
        with pytest.raises(ampproxy.ProxyError, match="without a word"):
            asyncio.run(translate(raw, theirs, ours, size))
        return
    out, reply = asyncio.run(translate(raw, theirs, ours, size))
    words = "".join(b.text for b in spoken.blocks if isinstance(b, ampproxy.Text))
    assert "".join(b.text for b in reply.blocks if isinstance(b, ampproxy.Text)) == words
    calls = [b.id for b in reply.blocks if isinstance(b, ampproxy.ToolCall)]
    assert len(calls) == sum(isinstance(b, ampproxy.ToolCall) for b in spoken.blocks)
    frames(out)


@settings(max_examples=ROUNDS, deadline=None, suppress_health_check=[*HealthCheck])
@given(st.sampled_from(PAIRS), st.data())
def test_a_stream_that_is_damaged_is_an_error_or_an_answer(pair, data):
    theirs, ours = pair
    events = ampproxy.split_events(stream_of(theirs))
    index = data.draw(st.integers(0, len(events) - 1))
    junk = st.sampled_from(["null", "{}", "[]", "7", '"x"', '{"index":{}}', '{"a":[{}]}'])
    event = (
        json.loads(ampproxy.event_data(events[index]) or b"{}") if index < len(events) - 1 else {}
    )
    if isinstance(event, dict) and event:
        key = data.draw(st.sampled_from(sorted(event)))
        event[key] = json.loads(data.draw(junk))
    events[index] = ampproxy.data_event(event)
    with suppress(ampproxy.ProxyError):
        asyncio.run(translate(b"".join(events), theirs, ours))


# -- Histories of real clients, as a provider takes them --


def anthropic_turns(*turns):
    return {"model": "m", "max_tokens": 9, "messages": [*turns]}


def user(*content):
    return {"role": "user", "content": [*content]}


def assistant(*content):
    return {"role": "assistant", "content": [*content]}


def said_text(words):
    return {"type": "text", "text": words}


def result(id, words, **more):
    return {"type": "tool_result", "tool_use_id": id, "content": words, **more}


HI = user(said_text("hi"))
INTERRUPTED = "The call was interrupted: it has no result."
HISTORIES = {  # name: (Anthropic's messages, the messages that a Chat provider gets)
    "a call without a result": (
        [HI, assistant(tool_use("a", "Rom")), user(said_text("well?"))],
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": None, "tool_calls": [chat_call("a", "Rom")]},
            {"role": "tool", "tool_call_id": "a", "content": INTERRUPTED},
            {"role": "user", "content": "well?"},
        ],
    ),
    "a call at the very end": (
        [HI, assistant(tool_use("a", "Rom"))],
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": None, "tool_calls": [chat_call("a", "Rom")]},
            {"role": "tool", "tool_call_id": "a", "content": INTERRUPTED},
        ],
    ),
    "results without a call, and twice": (
        [
            HI,
            assistant(tool_use("a", "Rom")),
            user(result("a", "one"), result("b", "two"), result("a", "three")),
        ],
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": None, "tool_calls": [chat_call("a", "Rom")]},
            {"role": "tool", "tool_call_id": "a", "content": "one"},
        ],
    ),
    "results in another order, behind a text": (
        [
            HI,
            assistant(tool_use("a", "Rom"), tool_use("b", "Oslo")),
            user(said_text("here"), result("b", "rain"), result("a", "sun")),
        ],
        [
            {"role": "user", "content": "hi"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [chat_call("a", "Rom"), chat_call("b", "Oslo")],
            },
            {"role": "tool", "tool_call_id": "a", "content": "sun"},
            {"role": "tool", "tool_call_id": "b", "content": "rain"},
            {"role": "user", "content": "here"},
        ],
    ),
    "one id for two calls": (
        [
            HI,
            assistant(tool_use("a", "Rom")),
            user(result("a", "sun")),
            assistant(tool_use("a", "Oslo")),
            user(result("a", "rain")),
        ],
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": None, "tool_calls": [chat_call("a", "Rom")]},
            {"role": "tool", "tool_call_id": "a", "content": "sun"},
            {"role": "assistant", "content": None, "tool_calls": [chat_call("a_2", "Oslo")]},
            {"role": "tool", "tool_call_id": "a_2", "content": "rain"},
        ],
    ),
    "empty and blank texts": (
        [user(said_text(""), said_text("hi"), said_text(" \n")), assistant(said_text("")), HI],
        [{"role": "user", "content": "hi\n\nhi"}],
    ),
    "a system message in the middle": (
        [HI, {"role": "system", "content": "be brief"}, assistant(said_text("yes")), HI],
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "hi"},
        ],
    ),
    "thoughts of another provider": (
        [HI, assistant({"type": "thinking", "thinking": "hm", "signature": "EqQB"}), HI],
        [{"role": "user", "content": "hi\n\nhi"}],
    ),
    "a picture in a result": (
        [
            HI,
            assistant(tool_use("a", "Rom")),
            user(
                result(
                    "a",
                    [
                        said_text("see"),
                        {
                            "type": "image",
                            "source": {"type": "base64", "media_type": "image/png", "data": PNG},
                        },
                    ],
                )
            ),
        ],
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": None, "tool_calls": [chat_call("a", "Rom")]},
            {"role": "tool", "tool_call_id": "a", "content": "see"},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
                ],
            },
        ],
    ),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_histories_are_put_right(name):
    given, wanted = HISTORIES[name]
    body = write("chat", read("anthropic", anthropic_turns(*given)))
    assert body["messages"] == wanted


@pytest.mark.parametrize("dialect", ["anthropic", "gemini"])
def test_a_history_that_begins_with_the_model(dialect):
    turns = [ampproxy.Turn("assistant", [ampproxy.Text("yes?")])]
    body = write(dialect, ampproxy.Ask(turns))
    messages = body.get("messages") or body["contents"]
    assert messages[0]["role"] == "user"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_system_texts_alone_are_what_the_user_says(dialect):
    turns = [ampproxy.Turn("system", [ampproxy.Text("be kind")])]
    body = write(dialect, ampproxy.Ask(turns))
    assert told(read(dialect, body).turns) == [("system", ""), ("user", "Text", "be kind")]


def test_system_messages_stay_in_their_place_where_the_provider_has_one():
    given = anthropic_turns(HI, {"role": "system", "content": "be brief"})
    items = write("responses", read("anthropic", given))["input"]
    assert [item["role"] for item in items] == ["user", "developer"]


def test_the_billing_line_of_claude_code_stays_at_home():
    bodies = []
    for turn in ("cch=1", "cch=2"):
        system = [said_text(f"x-anthropic-billing-header: {turn};"), said_text("be kind")]
        body = {**anthropic_turns(HI), "system": system}
        bodies.append(write("responses", read("anthropic", body)))
    assert bodies[0] == bodies[1]
    assert bodies[0]["instructions"] == "be kind"


ODD_IDS = ["x" * 65, "call:1/2", "ü", "toolu_ok", "x" * 64 + "y"]


@pytest.mark.parametrize("dialect", ["anthropic", "chat", "responses"])
def test_odd_ids_fit_and_are_told_apart(dialect):
    calls = [ampproxy.ToolCall(id, "weather", '{"city":"Rom"}') for id in ODD_IDS]
    results = [ampproxy.ToolResult(id, [ampproxy.Text(id)]) for id in reversed(ODD_IDS)]
    ask = ampproxy.Ask([ampproxy.Turn("assistant", calls), ampproxy.Turn("user", results)])
    ids = re.findall(r'"(?:id|call_id)": "([^"]*)"', json.dumps(write(dialect, ask)))
    assert len(set(ids)) == len(ODD_IDS)
    assert all(re.fullmatch("[a-zA-Z0-9_-]{1,64}", id) for id in ids)
    back = ampproxy.repaired(read(dialect, write(dialect, ask)).turns)
    said = [part.parts[0].text for turn in back for part in turn.parts
            if isinstance(part, ampproxy.ToolResult)]  # fmt: skip
    assert said == ODD_IDS


def test_calls_of_a_gemini_client_get_the_same_ids_each_time_and_keep_their_own():
    call = {"functionCall": {"name": "weather", "args": {"city": "Rom"}}}
    own = {"functionCall": {"name": "weather", "args": {}, "id": "mine"}}
    answer = {"functionResponse": {"name": "weather", "response": {"output": "sun"}}}
    known = {"functionResponse": {"name": "weather", "id": "mine", "response": {"output": "x"}}}
    body = {
        "contents": [
            {"role": "user", "parts": [{"text": "hi"}]},
            {"role": "model", "parts": [call, call, own]},
            {"role": "user", "parts": [known, answer, answer]},
        ]
    }
    first, second = (write("chat", read("gemini", body)) for _ in range(2))
    assert first == second
    ids = [call["id"] for call in first["messages"][1]["tool_calls"]]
    assert len(set(ids)) == 3
    assert ids[2] == "mine"
    assert [m["content"] for m in first["messages"][2:]] == ["sun", "sun", "x"]


# -- Tools --

ODD_NAMES = ["get.weather", "get:weather", "get weather", "z" * 70, "z" * 69 + "y", "ok"]


@pytest.mark.parametrize("dialect", DIALECTS)
@in_loop
async def test_odd_names_of_tools_come_back_as_they_were(dialect):
    tools = [ampproxy.Tool(name, "", WEATHER) for name in ODD_NAMES]
    ask = ampproxy.Ask([ampproxy.Turn("user", [ampproxy.Text("hi")])], tools)
    target = target_of(dialect, ask)
    DIALECTS[dialect].write_request(ask, target)
    wire = [target.names.of(name) for name in ODD_NAMES]
    assert len(set(wire)) == len(ODD_NAMES)
    assert all(re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_.:-]{0,63}", name) for name in wire)
    assert [target.names.meant(name).name for name in wire] == ODD_NAMES


LITE_BODY = {  # Codex's Responses Lite: the tools are an item, some in namespaces (clients.md)
    "model": "gpt-x",
    "input": [
        {
            "type": "additional_tools",
            "role": "developer",
            "tools": [
                {
                    "type": "namespace",
                    "name": "mcp__files__",
                    "tools": [{"type": "function", "name": "read", "parameters": WEATHER}],
                },
                {
                    "type": "custom",
                    "name": "apply_patch",
                    "description": "edits",
                    "format": {"type": "grammar", "syntax": "lark", "definition": "start: x"},
                },
                {"type": "web_search", "external_web_access": True},
            ],
        },
        {"type": "message", "role": "developer", "content": "be kind"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
    ],
}


@pytest.mark.parametrize("theirs", ["anthropic", "chat", "gemini"])
@in_loop
async def test_namespaces_and_free_text_tools_come_back_as_what_they_were(theirs):
    ask = read("responses", LITE_BODY)
    target = target_of(theirs, ask)
    body = json.dumps(DIALECTS[theirs].write_request(ask, target))
    assert "mcp__files__read" in body
    assert "start: x" in body

    def story(reply):
        reply.call(1, "a", "mcp__files__read")
        reply.call_done(1, '{"city":"Rom"}')
        reply.call(2, "b", "apply_patch")
        reply.call_done(2, '{"input":"*** Begin\\n"}')
        reply.finish()

    reply = ampproxy.ResponsesWriter([], "m", target.maker, target.names)
    reader = DIALECTS[theirs].reader(reply)
    ampproxy.read_run(FakeCall("responses"), reader, stream_of(theirs, story))
    reply.finish()
    *_, last = frames(b"".join(reply.out))
    read_file, patch = last["response"]["output"]
    assert (read_file["name"], read_file["namespace"]) == ("read", "mcp__files__")
    assert (patch["type"], patch["name"], patch["input"]) == (
        "custom_tool_call",
        "apply_patch",
        "*** Begin\n",
    )
    # ... and the next turn finds its way there again.
    back = {**LITE_BODY, "input": [*LITE_BODY["input"], read_file, patch,
            {"type": "custom_tool_call_output", "call_id": "b", "output": "ok"},
            {"type": "function_call_output", "call_id": "a", "output": "text"}]}  # fmt: skip
    again = told(read(theirs, write(theirs, read("responses", back))).turns)
    calls = [what for _, kind, what in again[2:] if kind == "ToolCall"]
    assert [name for name, _, _ in calls] == ["mcp__files__read", "apply_patch"]
    assert calls[1][1] == {"input": "*** Begin\n"}


SEARCH = {
    "anthropic": [{"type": "web_search_20250305", "name": "web_search"}],
    "responses": [{"type": "web_search"}],
    "gemini": [{"googleSearch": {}}],
}


@pytest.mark.parametrize("theirs", SEARCH)
@pytest.mark.parametrize("ours", SEARCH)
def test_hosted_search_of_one_stands_for_that_of_another(ours, theirs):
    body = {**SPELT[ours], "tools": SEARCH[ours]}
    for gone in ("tool_choice", "toolConfig"):
        body.pop(gone, None)
    there = write(theirs, read(ours, body))
    assert there["tools"][0] | {"cache_control": 0} == SEARCH[theirs][0] | {"cache_control": 0}


@pytest.mark.parametrize("theirs", ["gemini", "chat"])
def test_hosted_search_is_left_out_beside_functions_where_it_would_be_refused(theirs, caplog):
    caplog.set_level("DEBUG", "ampproxy")
    body = {**SPELT["anthropic"], "tools": [*TOOLS["anthropic"], *SEARCH["anthropic"]]}
    assert write(theirs, read("anthropic", body))["tools"] == TOOLS[theirs]
    assert "web_search is left out" in caplog.text


@pytest.mark.parametrize("dialect", DIALECTS)
def test_settings_of_tools_go_without_tools_and_declarations_stand_once(dialect):
    ask = ampproxy.Ask([ampproxy.Turn("user", [ampproxy.Text("hi")])], choice="any", parallel=False)
    body = write(dialect, ask)
    assert not body.keys() & {"tools", "tool_choice", "toolConfig", "parallel_tool_calls"}
    ask.tools = [ampproxy.Tool("weather", "", WEATHER)] * 2
    assert json.dumps(write(dialect, ask)).count('"weather"') == 1


# -- Schemas --

SCHEMAS = {  # name: (JSON Schema, what Google gets)
    "a ref": (
        {"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "string"}}},
        {"type": "object", "properties": {"a": {"type": "string"}}},
    ),
    "a cycle": (
        {
            "type": "object",
            "properties": {"next": {"$ref": "#/$defs/N"}},
            "$defs": {
                "N": {"type": "object", "properties": {"next": {"$ref": "#/$defs/N"}}}
            },
        },
        {
            "type": "object",
            "properties": {
                "next": {"type": "object", "properties": {"next": {"type": "object"}}}
            },
        },
    ),
    "properties with the names of words": (
        {"type": "object", "properties": {"pattern": {"type": "string"}, "format": {}}},
        {"type": "object",
         "properties": {"pattern": {"type": "string"}, "format": {"type": "string"}}},
    ),
    "words that Google refuses": (
        {
            "type": "object",
            "additionalProperties": False,
            "$schema": "x",
            "properties": {
                "n": {"type": "integer", "exclusiveMinimum": 0, "default": 1},
                "u": {"type": "string", "format": "uri"},
                "t": {"type": "string", "format": "date-time"},
            },
            "required": ["n", "gone"],
        },
        {
            "type": "object",
            "properties": {
                "n": {"type": "integer"},
                "u": {"type": "string"},
                "t": {"type": "string", "format": "date-time"},
            },
            "required": ["n"],
        },
    ),
    "null": (
        {"properties": {"a": {"type": ["string", "null"]}, "b": {"anyOf": [
            {"type": "integer"}, {"type": "null"}]}}},
        {"type": "object", "properties": {"a": {"type": "string", "nullable": True},
                                          "b": {"type": "integer", "nullable": True}}},
    ),
    "enums": (
        {"properties": {"a": {"enum": ["", "x", 1]}, "b": {"const": "y"}}},
        {"type": "object", "properties": {"a": {"type": "string", "enum": ["x", "1"]},
                                          "b": {"type": "string", "enum": ["y"]}}},
    ),
    "allOf": (
        {"allOf": [{"properties": {"a": {"type": "string"}}, "required": ["a"]},
                   {"properties": {"b": {"type": "string"}}}]},
        {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}},
         "required": ["a"]},
    ),
    "a tuple": (
        {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}]},
        {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}},
    ),
    "an array of anything": (
        {"type": "object", "properties": {"a": {"type": "array"}}},
        {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "string"}}}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_in_google_s_words(name):
    given, wanted = SCHEMAS[name]
    before = json.dumps(given)
    assert ampproxy.google_schema(given) == wanted
    assert json.dumps(given) == before


JSON_VALUES = st.recursive(
    st.sampled_from([None, True, "object", "array", "null", "#", "#/$defs/a", 1, ""]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from([*sorted(ampproxy.GOOGLE_WORDS), "$ref", "$defs", "allOf", "oneOf",
                             "const", "prefixItems", "a"]), inner, max_size=4),
    ),
    max_leaves=20,
)  # fmt: skip


def words_of(schema):
    """The words of a schema, at every depth, but for the names of properties."""
    for name, value in schema.items():
        yield name
        inner = (
            value.values()
            if name == "properties"
            else value
            if isinstance(value, list)
            else [value]
        )
        for each in inner:
            if isinstance(each, dict):
                yield from words_of(each)


@settings(max_examples=ROUNDS, deadline=None, suppress_health_check=[*HealthCheck])
@given(st.dictionaries(st.sampled_from(["type", "properties", "$ref", "$defs", "anyOf", "items",
                                        "allOf", "enum", "required"]), JSON_VALUES))  # fmt: skip
def test_any_schema_gets_words_of_google_s_list(schema):
    assert set(words_of(ampproxy.google_schema(schema))) <= ampproxy.GOOGLE_WORDS
    root = ampproxy.object_schema(schema)
    assert root["type"] == "object"
    assert not root.keys() & {"anyOf", "oneOf", "allOf"}
    ampproxy.closed_schema(schema)


def test_claude_and_openai_get_no_union_at_the_root():
    union = {"anyOf": [{"properties": {"a": {}}, "required": ["a", "b"]},
                       {"properties": {"b": {}}, "required": ["b"]}]}  # fmt: skip
    for dialect, place in (("anthropic", "input_schema"), ("responses", "parameters")):
        ask = ampproxy.Ask(CONVERSATION.turns, [ampproxy.Tool("weather", "", union)])
        schema = write(dialect, ask)["tools"][0][place]
        assert schema == {
            "type": "object",
            "properties": {"a": {}, "b": {}},
            "required": ["b"],
        }


# -- Seals --

CLAUDE_SEAL = ampproxy.Seal("anthropic/claude", "EqQBsignature")


@pytest.mark.parametrize(("ours", "theirs"), [p for p in PAIRS if p[0] != p[1]])
@pytest.mark.parametrize("redacted", [False, True])
@in_loop
async def test_a_seal_travels_through_a_foreign_client_and_back_to_its_maker(
    ours, theirs, redacted
):
    """Provider -> client -> the same provider; another provider never sees it."""
    maker = ampproxy.family_of(theirs, MODELS[theirs])
    redacted = redacted and theirs == "anthropic"

    def story(reply):
        if theirs == "gemini":
            reply.think("")
            reply.seal("U0VBTA==")
        elif theirs != "chat":
            reply.think("" if redacted else "hm")
            reply.seal("U0VBTA==", redacted)
        else:
            reply.think("hm")
        reply.call(1, "call_1", "weather")
        reply.call_done(1, '{"city":"Rom"}')
        reply.finish()

    _, reply = await translate(stream_of(theirs, story, maker=maker), theirs, ours, maker=maker)
    answer = json.loads(json.dumps(DIALECTS[ours].write_answer(reply)))
    turn = history_with(ours, answer)
    back = json.dumps(write(theirs, read(ours, turn)))
    if theirs == "chat":
        assert '"reasoning_content": "hm"' in back
    else:
        assert "U0VBTA==" in back
        assert ("redacted_thinking" in back) == redacted
    for other in DIALECTS:
        if other not in (theirs, ours):
            elsewhere = json.dumps(write(other, read(ours, turn)))
            assert "U0VBTA==" not in elsewhere
            assert "ampproxy" not in elsewhere
            assert '"hm"' not in elsewhere


def history_with(dialect, answer):
    """The next request of a client that sends an answer back."""
    match dialect:
        case "anthropic":
            said = {"role": "assistant", "content": answer["content"]}
            return anthropic_turns(HI, said, user(result("call_1", "sun")))
        case "chat":
            said = answer["choices"][0]["message"]
            tool = {"role": "tool", "tool_call_id": "call_1", "content": "sun"}
            return {"model": "m", "messages": [{"role": "user", "content": "hi"}, said, tool]}
        case "responses":
            output = {"type": "function_call_output", "call_id": "call_1", "output": "sun"}
            return {"model": "m", "input": ["hi", *answer["output"], output][1:]}
    said = answer["candidates"][0]["content"]
    response = {"name": "weather", "id": "call_1", "response": {"output": "sun"}}
    return {
        "contents": [
            {"role": "user", "parts": [{"text": "hi"}]},
            said,
            {"role": "user", "parts": [{"functionResponse": response}]},
        ]
    }


def test_for_a_gemini_client_every_seal_is_base64():
    for seal in (
        CLAUDE_SEAL,
        ampproxy.Seal("responses/gpt", "gAAAA-_x"),
        ampproxy.Seal("chat/q", ""),
    ):
        text = ampproxy.seal_text(seal, "gemini")
        base64.b64decode(text, validate=True)
        assert ampproxy.read_seal(text, "gemini/gemini") == seal


@pytest.mark.parametrize("model", ["gemini-3-pro-preview", "gemini-2.5-pro"])
def test_gemini_3_gets_a_seal_on_the_first_call_of_a_turn(model):
    parts = write("gemini", CONVERSATION, model)["contents"][1]["parts"]
    seals = [part.get("thoughtSignature") for part in parts]
    wanted = "skip_thought_signature_validator" if "-3-" in model else None
    assert seals == [None, wanted, None]


# -- Content --

SOUND = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}


def test_sound_goes_where_the_provider_has_a_place_for_it():
    ask = read("chat", {"model": "m", "messages": [{"role": "user", "content": [SOUND]}]})
    data = write("gemini", ask)["contents"][0]["parts"][0]["inlineData"]
    assert data == {"mimeType": "audio/wav", "data": "AAAA"}
    assert write("responses", ask)["input"][0]["content"] == [SOUND]
    with pytest.raises(ampproxy.ProxyError, match="Sound cannot be translated") as error:
        write("anthropic", ask)
    assert error.value.problem.status == 400


UNTRANSLATABLE = [  # what has no words elsewhere
    ("chat", {"n": 2}),
    ("chat", {"logprobs": True}),
    ("chat", {"modalities": ["text", "audio"]}),
    ("responses", {"previous_response_id": "resp_1"}),
    ("responses", {"input": [{"type": "item_reference", "id": "x"}]}),
    ("responses", {"input": [{"type": "compaction_trigger"}]}),
    ("anthropic", {"mcp_servers": [{"url": "x"}]}),
    ("gemini", {"generationConfig": {"candidateCount": 2}}),
]


@pytest.mark.parametrize(("dialect", "more"), UNTRANSLATABLE)
def test_what_cannot_be_translated_is_a_400_that_says_so(dialect, more):
    with pytest.raises(ampproxy.ProxyError, match="cannot be translated") as error:
        read(dialect, {**SPELT[dialect], **more})
    assert error.value.problem.status == 400


ANSWER_SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}}


@pytest.mark.parametrize("ours", DIALECTS)
def test_json_answers_by_a_schema_in_all_pairs(ours):
    turns = [ampproxy.Turn("user", [ampproxy.Text("hi")])]
    ask = read(ours, write(ours, ampproxy.Ask(turns, schema=ANSWER_SCHEMA, schema_name="n")))
    wanted = write("anthropic", ask)["output_config"]["format"]["schema"]
    assert wanted["additionalProperties"] is False
    assert wanted["properties"] == {"n": {"type": "integer"}}
    formats = write("responses", ask)["text"]["format"]
    assert formats["schema"]["properties"]["n"]["type"] == "integer"
    assert write("chat", ask)["response_format"]["json_schema"]["schema"]["properties"]
    settings = write("gemini", ask)["generationConfig"]
    assert settings["responseMimeType"] == "application/json"
    assert settings["responseSchema"]["properties"]["n"]["type"] == "integer"


def test_cache_marks_of_a_chat_client_reach_claude_and_no_others_are_set():
    marked = {"type": "text", "text": "long", "cache_control": {"type": "ephemeral"}}
    body = {"model": "m", "messages": [{"role": "user", "content": [marked]},
                                       {"role": "user", "content": "short"}]}  # fmt: skip
    content = write("anthropic", read("chat", body))["messages"][0]["content"]
    assert ["cache_control" in block for block in content] == [True, False]


# -- Effort --

ASKED_EFFORTS = [  # client's words -> the provider's
    ("anthropic", {"thinking": {"type": "enabled", "budget_tokens": 8000}}, "8000"),
    ("anthropic", {"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, "max"),
    ("anthropic", {"thinking": {"type": "adaptive"}}, "auto"),
    ("anthropic", {"thinking": {"type": "disabled"}}, "none"),
    ("anthropic", {}, ""),
    ("chat", {"reasoning_effort": "high"}, "high"),
    ("chat", {"reasoning": {"max_tokens": 2000}}, "2000"),
    ("chat", {"reasoning": {"enabled": False}}, "none"),
    ("responses", {"reasoning": {"effort": "xhigh"}}, "xhigh"),
    ("gemini", {"generationConfig": {"thinkingConfig": {"thinkingBudget": -1}}}, "auto"),
    ("gemini", {"generationConfig": {"thinking_config": {"thinking_budget": 0}}}, "none"),
    ("gemini", {"generationConfig": {"thinkingConfig": {"thinkingLevel": "HIGH"}}}, "high"),
]


@pytest.mark.parametrize(("dialect", "more", "effort"), ASKED_EFFORTS)
def test_how_much_thought_a_client_asks_for(dialect, more, effort):
    assert ampproxy.effort_of({**SPELT[dialect], **more}, dialect) == effort


# -- What broke once --


def chat_chunk(**delta):
    return {"id": "x", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def piece(arguments="", **more):
    name = more.pop("name", None)
    function = {"arguments": arguments} | ({"name": name} if name else {})
    return {**more, "function": function}


CALL_PIECES = {  # name: (pieces of calls in a Chat stream, the calls that they are)
    "no index at all": (
        [
            piece('{"a"', id="a", name="f"),
            piece(":1}"),
            piece('{"b"', id="b", name="g"),
            piece(":2}"),
        ],
        [("a", "f", '{"a":1}'), ("b", "g", '{"b":2}')],
    ),
    "all counted as 0": (
        [piece('{"a":1}', index=0, id="a", name="f"), piece('{"b":2}', index=0, id="b", name="f")],
        [("a", "f", '{"a":1}'), ("b", "f", '{"b":2}')],
    ),
    "id and name said again with each piece": (
        [piece('{"a"', index=0, id="a", name="f"), piece(":1}", index=0, id="a", name="f")],
        [("a", "f", '{"a":1}')],
    ),
    "an empty name behind the first piece": (
        [piece('{"a"', index=0, id="a", name="f"), piece(":1}", index=0, id="", name="")],
        [("a", "f", '{"a":1}')],
    ),
    "arguments in front of the name": (
        [piece('{"a"', index=0, id="a"), piece(":1}", index=0, id="a", name="f")],
        [("a", "f", '{"a":1}')],
    ),
    "pieces of two calls in turn": (
        [
            piece('{"a"', index=0, id="a", name="f"),
            piece('{"b"', index=1, id="b", name="g"),
            piece(":1}", index=0),
            piece(":2}", index=1),
        ],
        [("a", "f", '{"a":1}'), ("b", "g", '{"b":2}')],
    ),
}


@pytest.mark.parametrize("name", CALL_PIECES)
def test_calls_of_a_chat_stream_however_they_are_cut(name):
    pieces, wanted = CALL_PIECES[name]
    reply = new_reply("chat", ampproxy.Reply)
    reader = ampproxy.ChatReader(reply)
    for each in pieces:
        reader.read(chat_chunk(tool_calls=[each]))
    reply.finish()
    assert [(b.id, b.name, b.text) for b in reply.blocks] == wanted


REUSED = {  # name: (ids of calls and results in turns, (id, result) at the provider)
    "called again after an interruption": (
        [("a",), (), ("a",), ("a=two",)],
        [("a", INTERRUPTED), ("a_2", "two")],
    ),
    "a name that is taken already": (
        [("a", "a", "a_2"), ("a=1", "a=2", "a_2=3")],
        [("a", "1"), ("a_2", "2"), ("a_2_2", "3")],
    ),
    "a second result, then the id once more": (
        [("a",), ("a=1", "a=again"), ("a",), ()],
        [("a", "1"), ("a_2", INTERRUPTED)],
    ),
    "a result in front of its call": ([(), ("a=1",), ("a",), ()], [("a", "1")]),
}


@pytest.mark.parametrize("name", REUSED)
def test_ids_that_are_used_again(name):
    turns, wanted = REUSED[name]
    read_turns = []
    for index, ids in enumerate(turns):
        role = "user" if index % 2 else "assistant"
        parts = [ampproxy.Text("so")]
        for id in ids:
            call, _, words = id.partition("=")
            if words:
                parts.append(ampproxy.ToolResult(call, [ampproxy.Text(words)]))
            else:
                parts.append(ampproxy.ToolCall(call, "f"))
        read_turns.append(ampproxy.Turn(role, parts))
    found = [part for turn in ampproxy.repaired(read_turns) for part in turn.parts]
    results = [part for part in found if isinstance(part, ampproxy.ToolResult)]
    assert [(part.id, part.parts[0].text) for part in results] == wanted
    calls = [part.id for part in found if isinstance(part, ampproxy.ToolCall)]
    assert calls == [id for id, _ in wanted]


def test_several_thoughts_through_a_chat_client_come_back_each_with_its_seal():
    reply = new_reply("chat")
    reply.seal("ONE", redacted=True)
    reply.think("two")
    reply.seal("TWO")
    reply.think("three")
    reply.seal("THREE")
    reply.call(1, "call_1", "f")
    reply.finish()
    answer = json.loads(json.dumps(ampproxy.write_chat_answer(reply)))
    details = [
        detail
        for e in frames(b"".join(reply.out))
        for choice in e["choices"]
        for detail in choice["delta"].get("reasoning_details", [])
    ]
    assert answer["choices"][0]["message"]["reasoning_details"] == details
    assert [detail["index"] for detail in details] == [0, 1, 2]
    body = write("anthropic", read("chat", history_with("chat", answer)))
    assert body["messages"][1]["content"][:3] == [
        {"type": "redacted_thinking", "data": "ONE"},
        {"type": "thinking", "thinking": "two", "signature": "TWO"},
        {"type": "thinking", "thinking": "three", "signature": "THREE"},
    ]


def test_text_that_waits_for_a_stop_sequence_stays_in_front_of_a_call():
    reply = new_reply("anthropic", ampproxy.Reply, stops=["\n\nHuman:"])
    reply.say("Let me look\n")
    reply.call(1, "a", "f")
    reply.finish()
    assert blocks(reply) == [("Text", "Let me look\n", ""), ("ToolCall", "", "a")]


def test_the_seal_behind_a_gemini_answer_comes_back():
    def story(reply):
        reply.say("hello")
        reply.seal("U0VBTA==")
        reply.finish()

    reply = new_reply("anthropic", ampproxy.Reply, maker="gemini/gemini")
    reader = ampproxy.GeminiReader(reply)
    ampproxy.read_run(
        FakeCall("anthropic"), reader, stream_of("gemini", story, maker="gemini/gemini")
    )
    reply.finish()
    said = ampproxy.write_anthropic_answer(reply)
    turn = anthropic_turns(HI, {"role": "assistant", "content": said["content"]}, HI)
    parts = write("gemini", read("anthropic", turn))["contents"][1]["parts"]
    assert parts == [{"text": "hello"}, {"text": "", "thoughtSignature": "U0VBTA=="}]


def test_a_forced_tool_hides_no_other_one():
    body = {**SPELT["chat"], "tools": [*TOOLS["chat"], chat_tool("other")]}
    body["tool_choice"] = {"type": "function", "function": {"name": "other"}}
    there = write("anthropic", read("chat", body))
    assert [tool["name"] for tool in there["tools"]] == ["weather", "other"]
    assert there["tool_choice"] == {"type": "tool", "name": "other"}
    config = write("gemini", read("chat", body))["toolConfig"]["functionCallingConfig"]
    assert config == {"mode": "ANY", "allowedFunctionNames": ["other"]}
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "other"}}]}
    body["tool_choice"] = {"type": "allowed_tools", "allowed_tools": allowed}
    there = write("anthropic", read("chat", body))
    assert [tool["name"] for tool in there["tools"]] == ["other"]
    assert there["tool_choice"] == {"type": "any"}


def chat_tool(name):
    return {"type": "function", "function": {"name": name, "parameters": WEATHER}}


def test_a_choice_that_nobody_knows_is_none():
    body = {**SPELT["anthropic"], "tool_choice": {"type": "required"}}
    for dialect in DIALECTS:
        assert (
            "tool_choice" not in write(dialect, read("anthropic", body)) or dialect == "anthropic"
        )


@pytest.mark.parametrize(("ours", "place"), [("anthropic", "messages"), ("responses", "input"),
                                             ("gemini", "contents"), ("chat", "messages")])  # fmt: skip
def test_our_seals_do_not_reach_another_provider_of_the_clients_dialect(ours, place):
    reply = new_reply(ours, ampproxy.Reply, maker="other/model")
    reply.think("hm")
    reply.seal("U0VBTA==")
    reply.call(1, "call_1", "weather")
    reply.finish()
    answer = json.loads(json.dumps(DIALECTS[ours].write_answer(reply)))
    body = history_with(ours, answer)
    assert ampproxy.SEAL_MARK in json.dumps(body) or ampproxy.SEAL_MARK_64 in json.dumps(body)
    clean = json.dumps(ampproxy.without_our_seals(body))
    assert ampproxy.SEAL_MARK not in clean
    assert ampproxy.SEAL_MARK_64 not in clean
    assert "weather" in clean


def test_schemas_that_name_each_other_in_circles_come_to_an_end():
    names = [f"n{i}" for i in range(12)]
    node = {"type": "object", "properties": {n: {"$ref": f"#/$defs/{n}"} for n in names}}
    began = time.monotonic()
    ampproxy.google_schema({**node, "$defs": dict.fromkeys(names, node)})
    assert time.monotonic() - began < 1


# -- Through the proxy --


@asynccontextmanager
async def four_providers(tmp_path):
    """A proxy with one key each, of four fakes that answer with a stream of their dialect."""
    fakes = {name: FakeUpstream((200, SSE, [stream_of(name)])) for name in DIALECTS}
    async with AsyncExitStack() as stack:
        for fake in fakes.values():
            await stack.enter_async_context(fake.open())
        urls = {name: fake.url for name, fake in fakes.items()}
        fakes["responses"].usual = openai_answers
        keys = {
            "claude-api-key": [{"api-key": "k1", "base-url": urls["anthropic"]}],
            "codex-api-key": [{"api-key": "k2", "base-url": urls["responses"]}],
            "gemini-api-key": [{"api-key": "k3", "base-url": urls["gemini"]}],
            "openai-compatibility": [
                {
                    "name": "qwen",
                    "base-url": urls["chat"] + "/v1",
                    "api-key-entries": [{"api-key": "k4"}],
                    "models": [{"name": "qwen-x"}],
                }
            ],
        }
        async with world(tmp_path, tokens=(), **keys) as w:
            w.fakes = fakes
            yield w


async def openai_answers(request):
    """A key of OpenAI's has both dialects."""
    dialect = "chat" if request.path.endswith("chat/completions") else "responses"
    response = web.Response(body=stream_of(dialect), headers=SSE)
    await response.prepare(request)
    await response.write_eof()
    return response


PATHS = {
    "anthropic": "/v1/messages",
    "chat": "/v1/chat/completions",
    "responses": "/v1/responses",
    "gemini": "/v1beta/models/{model}:{verb}",
}


def asked(dialect, model, stream=True, **more):
    """Path and body of a call in a dialect."""
    verb = "streamGenerateContent?alt=sse" if stream else "generateContent"
    body = {**SPELT[dialect], "model": model, "stream": stream, **more}
    if dialect == "gemini":
        body = {**SPELT[dialect], **more}
    return PATHS[dialect].format(model=model, verb=verb), body


@pytest.mark.parametrize("ours", DIALECTS)
@in_loop
async def test_any_client_with_any_provider_streamed_and_in_one_piece(tmp_path, ours):
    async with four_providers(tmp_path) as w:
        for theirs, model in MODELS.items():
            native = ours == theirs or (ours, theirs) == ("chat", "responses")
            for stream in (True,) if native else (True, False):
                response = await w.ask(*asked(ours, model, stream))
                assert response.status == 200, response.bytes
                route = [response.headers[f"x-ampproxy-{n}"] for n in ("route", "model")]
                assert route == ["local", model]
                kind = "text/event-stream" if stream else "application/json"
                assert response.headers["Content-Type"].startswith(kind)
                reply = new_reply(ours, ampproxy.Reply)
                reader = DIALECTS[ours].reader(reply)
                if stream:
                    ampproxy.read_run(FakeCall(ours), reader, response.bytes)
                else:
                    reader.read_whole(json.loads(response.bytes))
                reply.finish()
                assert blocks(reply) == PLAYED
                sent = w.fakes[theirs].last
                secrets_of = {name.lower(): value for name, value in sent.headers.items()}
                assert "x-amp-thread-id" not in secrets_of
        status = (await w.ask_json("/status", method="GET"))[1]
        assert {row["input_tokens"] for row in status["requests"]} == {12}
        assert {row["output_tokens"] for row in status["requests"]} == {9}


ERRORS = {
    "anthropic": {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}},
    "chat": {"error": {"message": "busy", "type": "server_error", "code": "x"}},
    "responses": {"error": {"message": "busy", "type": "server_error", "code": "x"}},
    "gemini": {"error": {"code": 503, "message": "busy", "status": "UNAVAILABLE"}},
}


@pytest.mark.parametrize("theirs", DIALECTS)
@pytest.mark.parametrize("ours", DIALECTS)
@in_loop
async def test_errors_of_a_foreign_provider_in_the_words_of_the_client(tmp_path, ours, theirs):
    async with four_providers(tmp_path) as w:
        w.fakes[theirs].usual = answer_json(ERRORS[theirs] | {"request_id": "r"}, 400)
        status, body, _ = await w.ask_json(*asked(ours, MODELS[theirs]))
        assert status == 400
        assert "busy" in body["error"]["message"]
        if ours != theirs and (ours, theirs) != ("chat", "responses"):
            wanted = DIALECTS[ours].error(400, body["error"]["message"])
            assert body == wanted


@pytest.mark.parametrize("theirs", DIALECTS)
@pytest.mark.parametrize("ours", ["anthropic", "chat", "responses"])
@in_loop
async def test_a_foreign_stream_that_breaks_ends_in_the_clients_own_error(tmp_path, ours, theirs):
    if ours == theirs or (ours, theirs) == ("chat", "responses"):
        return
    async with four_providers(tmp_path) as w:
        whole = stream_of(theirs)
        w.fakes[theirs].usual = (200, SSE, [whole[: len(whole) // 2], "cut"])
        response = await w.ask(*asked(ours, MODELS[theirs]))
        last = frames(response.bytes)[-1]
        if ours == "responses":
            numbers = [e["sequence_number"] for e in frames(response.bytes)]
            assert numbers == [*range(len(numbers))]
            last = last["response"]
        assert "broke off" in last["error"]["message"] or "stopped" in last["error"]["message"]


@pytest.mark.parametrize(("path", "body", "key"), [
    ("/v1/messages/count_tokens", {"model": "gpt-x", "messages": [{"role": "user", "content": "x" * 400}]},
     "input_tokens"),
    ("/v1beta/models/gpt-x:countTokens", {"contents": [{"parts": [{"text": "x" * 400}]}]}, "totalTokens"),
])  # fmt: skip
@in_loop
async def test_counting_for_a_model_of_another_dialect_is_an_estimate(tmp_path, path, body, key):
    async with four_providers(tmp_path) as w:
        status, counted, headers = await w.ask_json(path, body)
        assert (status, counted) == (200, {key: 100})
        assert headers["x-ampproxy-estimate"] == "true"
        assert headers["x-ampproxy-route"] == "local"
        assert not any(fake.requests for fake in w.fakes.values())


@in_loop
async def test_a_client_of_any_dialect_is_shown_all_models(tmp_path):
    async with four_providers(tmp_path) as w:
        for headers, key in (({}, "data"), ({"anthropic-version": "2023-06-01"}, "data")):
            _, body, _ = await w.ask_json("/v1/models", method="GET", headers=headers)
            assert "qwen-x" in {row["id"] for row in body[key]}
        _, body, _ = await w.ask_json("/v1beta/models", method="GET")
        assert "models/qwen-x" in {row["name"] for row in body["models"]}


@in_loop
async def test_no_header_of_the_client_goes_to_a_foreign_provider(tmp_path):
    async with four_providers(tmp_path) as w:
        own = {"anthropic-version": "2026-10-21", "anthropic-beta": "x", "x-stainless-os": "y",
               "user-agent": "claude-cli", "x-api-key": "secret"}  # fmt: skip
        await w.ask(*asked("anthropic", "gpt-x"), headers=own)
        sent = w.fakes["responses"].last.headers
        assert not {name.lower() for name in sent} & {"anthropic-version", "anthropic-beta",
                                                      "x-stainless-os", "x-api-key"}  # fmt: skip
        assert "secret" not in str(sent)


@in_loop
async def test_a_claude_thinks_no_more_in_a_tool_loop_whose_thoughts_are_gone(tmp_path):
    async with four_providers(tmp_path) as w:
        path, body = asked("chat", "claude-opus-4-6", reasoning_effort="high")
        await w.ask(path, body)
        assert b"adaptive" not in w.fakes["anthropic"].last.bytes
        body["messages"] = body["messages"][:2]
        await w.ask(path, {**body, "tool_choice": "auto"})
        assert b'"thinking":{"type":"adaptive"}' in w.fakes["anthropic"].last.bytes


# -- Where four lines of work met --

NOT_AMPS_PATHS = [
    ("POST", "/v1/embeddings", "chat"),
    ("POST", "/embeddings", "chat"),
    ("POST", "/v1/images/generations", "chat"),
    ("POST", "/audio/speech", "chat"),
    ("POST", "/v1/completions", "chat"),
    ("POST", "/v1//messages", "anthropic"),
    ("POST", "/v1/messages/", "anthropic"),
    ("POST", "/v1/messages/batches", "anthropic"),
    ("PUT", "/v1/messages", "anthropic"),
    ("POST", "/v1/%6dodels/x", "chat"),
    ("POST", "//v1/files", "chat"),
    ("POST", "/v1beta/files", "gemini"),
    ("POST", "/v1beta/cachedContents", "gemini"),
    ("GET", "/v1/foo", "chat"),
]


@pytest.mark.parametrize(("method", "path", "dialect"), NOT_AMPS_PATHS)
@in_loop
async def test_no_prompt_goes_to_ampcode_by_accident(tmp_path, method, path, dialect):
    async with world(tmp_path) as w:
        status, body, headers = await w.ask_json(path, {"input": "secret"}, method=method)
        assert (status, headers["x-ampproxy-route"]) == (404, "none")
        assert body == DIALECTS[dialect].error(404, f"there is no {method} {path} here")
        assert not w.amp.requests


@in_loop
async def test_a_page_instead_of_an_error_rests_two_minutes_at_most(tmp_path):
    async with world(tmp_path, ampcode={"fallback": "never"}) as w:
        for _ in range(3):
            page = (403, {"Content-Type": "text/html"}, [b"<html>blocked</html>"])
            w.claude.script = [page]
            assert (await w.ask("/v1/messages", ASK)).status == 403
            assert resting(w) == {"": 120}
            w.clock.now += 121


@pytest.mark.parametrize(("answer", "wait"), [
    (said(429, "spent", "rate_limit_error", **{"Retry-After": "5000"}), 5000),
    (said(429, "spent", "insufficient_quota"), 60),
])  # fmt: skip
@in_loop
async def test_a_quotas_end_is_said_as_codex_knows_it(tmp_path, answer, wait):
    async with world(tmp_path) as w:
        w.claude.usual = answer
        body = {"model": "claude-opus-4-6", "input": "hi"}
        status, told, _ = await w.ask_json("/v1/responses", body)
        assert (status, told["error"]["type"]) == (429, "usage_limit_reached")
        assert told["error"]["resets_in_seconds"] == wait
        assert told["error"]["resets_at"] == w.clock.time() + wait


@in_loop
async def test_googles_empty_answer_rests_nobody_whoever_asked(tmp_path):
    async with four_providers(tmp_path) as w:
        silent = {"candidates": [{"content": {"parts": [{"text": ""}]}, "finishReason": "STOP"}]}
        broken = {"candidates": [{"finishReason": "MALFORMED_FUNCTION_CALL"}]}
        for answer in (silent, broken):
            w.fakes["gemini"].usual = (200, SSE, [ampproxy.data_event(answer)])
            status, body, _ = await w.ask_json(*asked("anthropic", "gemini-2.5-x", False))
            assert (status, body["type"]) == (502, "error")
        accounts = (await w.ask_json("/status", method="GET"))[1]["accounts"]
        assert {account["state"] for account in accounts} == {"ready"}


@in_loop
async def test_a_count_in_googles_wrapper_is_estimated(tmp_path):
    async with four_providers(tmp_path) as w:
        inner = {"contents": [{"parts": [{"text": "x" * 400}]}]}
        path = "/v1beta/models/gpt-x:countTokens"
        _, counted, _ = await w.ask_json(path, {"generateContentRequest": inner})
        assert counted == {"totalTokens": 100}


# -- A fuzzer of the hub: any body to any provider, and any answer --

JUNK = [None, True, 0, -1, 1.5, 1e300, "", "x", "9" * 40, "é\U0001f600", [], {}, [[]], [{}], {"type": "x"}, ["a", 1, None],
        {"a": {"b": [1]}}, "data:image/png;base64,AA", {"$ref": "#"}, {"type": ["null"]}]  # fmt: skip
JUNK_KEYS = ["type", "role", "content", "text", "id", "name", "cache_control", "thinking", "tools", "input", "reasoning", "parts", "n",
             "thoughtSignature", "functionCall", "tool_calls", "image_url", "source", "response_format", "generationConfig", "stop"]  # fmt: skip


def spoilt(dice, value):
    """A copy with some of it gone, twice, in another place, or nonsense."""
    if dice.random() < 0.06:
        return dice.choice(JUNK)
    if isinstance(value, dict):
        kept = {name: spoilt(dice, inner) for name, inner in value.items() if dice.random() > 0.05}
        return kept | ({dice.choice(JUNK_KEYS): dice.choice(JUNK)} if dice.random() < 0.08 else {})
    if isinstance(value, list):
        items = [spoilt(dice, item) for item in value]
        if items and dice.random() < 0.1:
            items.append(dice.choice(items))
        return items
    return value


def spoilt_stream(dice, dialect):
    events = []
    for event in ampproxy.split_events(stream_of(dialect)):
        data = ampproxy.event_data(event)
        if dice.random() < 0.15 and data != b"[DONE]":
            event = b"data: " + json.dumps(spoilt(dice, json.loads(data))).encode() + b"\n\n"  # noqa: PLW2901
        events.append(event)
    raw = b"".join(events)
    return raw[: dice.randrange(len(raw))] if dice.random() < 0.2 else raw


def test_fuzz_of_translation(tmp_path):
    """For 3 seconds, or as many as AMPPROXY_FUZZ says."""
    loop_runner()(fuzz_translation(tmp_path, int(os.environ.get("AMPPROXY_FUZZ") or 3)))


async def fuzz_translation(tmp_path, seconds):
    """No 500, no traceback, no hang: whatever a client sends, and whatever a provider answers."""
    dice, ends = random.Random(seconds), time.monotonic() + seconds
    async with four_providers(tmp_path) as w:
        while time.monotonic() < ends:
            ours, theirs = dice.choice(PAIRS)
            path, body = asked(ours, MODELS[theirs], dice.random() < 0.5)
            body = spoilt(dice, body)
            if not isinstance(body, dict):
                continue
            if ours != "gemini":
                body["model"] = MODELS[theirs]
            w.fakes[theirs].usual = (200, SSE, [spoilt_stream(dice, theirs)])
            for account in w.server.pool.accounts.values():
                account.rests.clear()
            with suppress(aiohttp.ClientError):  # Gemini's streams break off with their error
                async with asyncio.timeout(15):
                    response = await w.ask(path, body)
                assert response.status != 500, body
                assert b"internal error" not in response.bytes, body


# == Translation: the official SDKs ================================================================
#
# Each SDK against a provider of each other dialect.  The fakes refuse what the real ones refuse, by
# the two tables below (SHAPES: the names that they know; NOES: what they say no to), so a test
# that fails shows the reason.  ANSWERS is what they say, in each dialect's own stream.

SHAPES = {  # of an object: its names, those with ! must be there, those behind : are objects again
    "anthropic": {
        "request": "model! messages!:message max_tokens! system:block tools:tool tool_choice:choice"
                   " stream thinking:thinking output_config:output stop_sequences temperature top_p"
                   " top_k metadata",
        "message": "role! content!:block",
        "block text": "type! text! cache_control:cache",
        "block image": "type! source!:source cache_control:cache",
        "block thinking": "type! thinking! signature!",
        "block tool_use": "type! id! name! input! cache_control:cache",
        "block tool_result": "type! tool_use_id! content:block is_error cache_control:cache",
        "source base64": "type! media_type! data!",
        "cache ephemeral": "type! ttl",
        "tool": "name! description input_schema! strict cache_control:cache",
        "choice auto": "type! disable_parallel_tool_use",
        "choice any": "type! disable_parallel_tool_use",
        "choice tool": "type! name! disable_parallel_tool_use",
        "choice none": "type!",
        "thinking adaptive": "type! display",
        "thinking enabled": "type! budget_tokens! display",
        "thinking disabled": "type!",
        "output": "effort format:format",
        "format json_schema": "type! schema!",
    },
    "responses": {
        "request": "model! input!:item instructions stream! store include tools:tool tool_choice"
                   " text:text parallel_tool_calls reasoning:reasoning max_output_tokens"
                   " temperature top_p prompt_cache_key",
        "item message": "type! role! content!:content",
        "item function_call": "type! call_id! name! arguments!",
        "item function_call_output": "type! call_id! output!:content",
        "item reasoning": "type! id summary!:content content encrypted_content",
        "content input_text": "type! text!",
        "content output_text": "type! text! annotations",
        "content summary_text": "type! text!",
        "content input_image": "type! image_url! detail!",
        "tool function": "type! name! description parameters! strict!",
        "text": "format:format verbosity",
        "format json_schema": "type! name! schema! strict description",
        "reasoning": "effort summary",
    },
    "chat": {
        "request": "model! messages!:message stream stream_options:options tools:tool tool_choice"
                   " stop max_tokens parallel_tool_calls response_format:format reasoning_effort"
                   " temperature top_p seed",
        "options": "include_usage",
        "message": "role! content:part tool_calls:call tool_call_id reasoning_content",
        "part text": "type! text!",
        "part image_url": "type! image_url!:image",
        "image": "url! detail",
        "call function": "id! type! function!:called",
        "called": "name! arguments!",
        "tool function": "type! function!:function",
        "function": "name! description parameters strict",
        "format json_schema": "type! json_schema!:wanted",
        "wanted": "name! schema! strict description",
    },
    "gemini": {
        "request": "contents!:content systemInstruction:content tools:tool toolConfig:toolConfig"
                   " generationConfig:settings safetySettings",
        "content": "role parts!:part",
        "part": "text thought thoughtSignature inlineData:blob functionCall:call"
                " functionResponse:result",
        "blob": "mimeType! data!",
        "call": "id name! args",
        "result": "id name! response!",
        "tool": "functionDeclarations:function googleSearch",
        "function": "name! description parameters:schema",
        "schema": "type format title description nullable enum items:schema minItems maxItems"
                  " minLength maxLength properties:properties required pattern anyOf:schema minimum"
                  " maximum propertyOrdering",
        "properties": "*:schema",
        "toolConfig": "functionCallingConfig:calling",
        "calling": "mode! allowedFunctionNames",
        "settings": "temperature topP topK seed maxOutputTokens stopSequences responseMimeType"
                    " thinkingConfig:thinking responseSchema:schema",
        "thinking": "includeThoughts thinkingBudget thinkingLevel",
    },
}  # fmt: skip


def misfits(shapes, name, value, place="body"):
    """What a provider that knows these shapes alone does not understand."""
    if isinstance(value, list):
        for index, inner in enumerate(value):
            yield from misfits(shapes, name, inner, f"{place}[{index}]")
    if not isinstance(value, dict):
        return
    told = shapes.get(name) or shapes.get(f"{name} {value.get('type')}")
    if told is None:
        yield f"{place}: no {name} of type {value.get('type')!r}"
        return
    fields = dict((field + ":").split(":")[:2] for field in told.split())
    yield from (
        f"{place}.{f[:-1]}: required" for f in fields if f[-1] == "!" and f[:-1] not in value
    )
    children = {field.rstrip("!"): child for field, child in fields.items()}
    for key, inner in value.items():
        child = children.get(key, children.get("*"))
        if child is None:
            yield f"{place}.{key}: unknown name"
        elif child:
            yield from misfits(shapes, child, inner, f"{place}.{key}")


def inside(value, key):
    """All that stands under the key, at any depth."""
    for inner in value if isinstance(value, list) else value.values():
        if isinstance(inner, (dict, list)):
            yield from inside(inner, key)
    if isinstance(value, dict) and key in value:
        yield value[key]


def is_open(schema):
    """Whether an object in it lets more in than it names, which strict ones may not."""
    objects = [value for value in [schema, *each_dict(schema)] if value.get("type") == "object"]
    return any(value.get("additionalProperties") is not False for value in objects)


def each_dict(value):
    for inner in value if isinstance(value, list) else value.values():
        if isinstance(inner, (dict, list)):
            yield from [inner] if isinstance(inner, dict) else []
            yield from each_dict(inner)


def blocks_in(message):
    content = message.get("content") or message.get("parts") or []
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def unpaired(turns, call, result):
    """Whether calls lack their results in the very next turn, in front, or the other way round."""
    calls = [[c for c in map(call, blocks_in(turn)) if c] for turn in turns]
    results = [[r for r in map(result, blocks_in(turn)) if r] for turn in turns]
    late = [
        not all(map(result, blocks_in(turn)[: len(r)]))
        for turn, r in zip(turns, results, strict=True)
    ]
    return any(late) or [[], *calls] != [*results, []]


def in_loop_step(turns, result):
    return bool(turns) and any(map(result, blocks_in(turns[-1])))


def tool_results(block):
    return block.get("tool_use_id")


NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
OWN_SEALS = {
    "anthropic": "EqQBCkYIBxgCKkDtb2x5",
    "responses": "gAAAAABpc2VhbGVk",
    "gemini": "CsYBAVKhc2VhbGVk",
}
LEVELS = ("none", "minimal", "low", "medium", "high", "xhigh")


def chat_unpaired(messages):
    """Answers of tools stand right behind the calls, one for each, and nowhere else."""
    waiting = []
    for message in [*messages, {"role": "end"}]:
        if message["role"] == "tool":
            if message.get("tool_call_id") not in waiting or not isinstance(
                message["content"], str
            ):
                return True
            waiting.remove(message["tool_call_id"])
        elif waiting:
            return True
        waiting += [call["id"] for call in message.get("tool_calls", [])]
    return False


def responses_unpaired(items):
    def ids(kind):
        return [item["call_id"] for item in items if item.get("type") == kind]

    return ids("function_call") != ids("function_call_output")


def lacks_signature(body):
    """Of the first call in each step since the user's last word (providers.md 5.3)."""
    asked = [
        i
        for i, c in enumerate(body["contents"])
        if any("text" in p for p in c["parts"]) and c["role"] == "user"
    ]
    steps = [[p for p in c["parts"] if "functionCall" in p] for c in body["contents"][max(asked) :]]
    return any(calls and not calls[0].get("thoughtSignature") for calls in steps)


NOES = {  # reason -> whether a body of the right shape is refused for it
    "anthropic": {
        "messages: at least one is required, the first the user's": lambda b: (
            not b["messages"] or b["messages"][0]["role"] != "user"
        ),
        "messages: roles are user and assistant": lambda b: (
            {m["role"] for m in b["messages"]} - {"user", "assistant"}
        ),
        "messages: text must not be blank": lambda b: any(
            not block.get("text", "x").strip()
            for message in [*b["messages"], {"content": b.get("system")}]
            for block in blocks_in(message)
        ),
        "messages: content must not be empty": lambda b: (
            not all(m["content"] for m in b["messages"])
        ),
        "tool_use without tool_result right behind it": lambda b: unpaired(
            b["messages"], lambda p: p.get("id"), tool_results
        ),
        "ids and names are of [a-zA-Z0-9_-]": lambda b: (
            not all(
                map(
                    NAME.fullmatch,
                    [*inside(b["messages"], "id"), *(t["name"] for t in b.get("tools", []))],
                )
            )
        ),
        "Invalid signature in thinking block": lambda b: (
            set(inside(b["messages"], "signature")) - {OWN_SEALS["anthropic"]}
        ),
        "thinking: temperature, top_p and top_k may not be set": lambda b: (
            thinks(b) and {"temperature", "top_k"} & {*b}
        ),
        "thinking: tool_choice forces tool use": lambda b: (
            (thinks(b) or b.get("output_config", {}).get("effort"))
            and b.get("tool_choice", {}).get("type") in ("any", "tool")
        ),
        "thinking: a final assistant turn must start with a thinking block": lambda b: (
            thinks(b)
            and in_loop_step(b["messages"], tool_results)
            and b["messages"][-2]["content"][0]["type"] != "thinking"
        ),
        "max_tokens must be greater than budget_tokens, which is 1024 at least": lambda b: any(
            not 1024 <= budget < b["max_tokens"] for budget in inside(b, "budget_tokens")
        ),
        "temperature and top_p: one of them": lambda b: {"temperature", "top_p"} <= {*b},
        "A maximum of 4 blocks with cache_control": lambda b: (
            len([*inside(b, "cache_control")]) > 4
        ),
        "input_schema: an object without a union at its root": lambda b: any(
            t["input_schema"].get("type") != "object"
            or {"anyOf", "oneOf", "allOf"} & {*t["input_schema"]}
            for t in b.get("tools", [])
        ),
        "tool_choice without tools": lambda b: "tool_choice" in b and not b.get("tools"),
        "output_config.format: additionalProperties must be false": lambda b: any(
            map(is_open, inside(b.get("output_config", {}), "schema"))
        ),
        "output_config.format: limits of figures are not supported": lambda b: any(
            next(inside(b.get("output_config", {}), word), None) is not None
            for word in ("minimum", "maximum", "maxLength", "pattern")
        ),
    },
    "responses": {
        "Stream must be true here": lambda b: b["stream"] is not True,
        "input: a list is wanted": lambda b: not isinstance(b["input"], list) or not b["input"],
        "input: user says input_*, the assistant output_text": lambda b: any(
            (item["role"] == "assistant") != (part["type"] == "output_text")
            for item in b["input"]
            if item["type"] == "message"
            for part in item["content"]
        ),
        "input: content must not be empty": lambda b: any(
            i.get("content") == [] or i.get("output") == [] for i in b["input"]
        ),
        "No tool output found for function call, or no call for it": lambda b: responses_unpaired(
            b["input"]
        ),
        "arguments and call_id: texts, at most 64 characters of call_id": lambda b: (
            any(len(i) > 64 for i in inside(b["input"], "call_id"))
            or any(not isinstance(json.loads(a), dict) for a in inside(b["input"], "arguments"))
        ),
        "The encrypted content could not be verified": lambda b: (
            set(inside(b["input"], "encrypted_content")) - {OWN_SEALS["responses"]}
        ),
        "reasoning was provided without its required following item": lambda b: any(
            i["type"] == "reasoning"
            and j.get("type") not in ("reasoning", "message", "function_call")
            for i, j in itertools.pairwise([*b["input"], {}])
        ),
        "Expected an id that begins with rs": lambda b: any(
            not i.get("id", "rs").startswith("rs") for i in b["input"]
        ),
        "tool names": lambda b: not all(NAME.fullmatch(t["name"]) for t in b.get("tools", [])),
        "parameters: an object is wanted": lambda b: any(
            "properties" not in t["parameters"] for t in b.get("tools", [])
        ),
        "strict: additionalProperties must be false": lambda b: any(
            t["strict"] and is_open(t["parameters"]) for t in b.get("tools", [])
        ),
        "text.format: additionalProperties must be false": lambda b: any(
            f["strict"] and is_open(f["schema"]) for f in inside(b.get("text", {}), "format")
        ),
        "tool settings without tools": lambda b: {"tool_choice"} & {*b} and not b.get("tools"),
        "reasoning.effort: unsupported value": lambda b: (
            b.get("reasoning", {}).get("effort", "low") not in LEVELS
        ),
        "include is needed for encrypted reasoning, as nothing is stored": lambda b: (
            b["store"] is not False or b["include"] != ["reasoning.encrypted_content"]
        ),
    },
    "chat": {
        "messages: unknown role": lambda b: (
            {m["role"] for m in b["messages"]} - {"system", "user", "assistant", "tool"}
        ),
        "messages: content may be null beside tool_calls only": lambda b: any(
            not m.get("content") and not m.get("tool_calls") for m in b["messages"]
        ),
        "an assistant message with tool_calls must be followed by tool messages": lambda b: (
            chat_unpaired(b["messages"])
        ),
        "messages: pictures come from the user": lambda b: any(
            p["type"] == "image_url"
            for m in b["messages"]
            if m["role"] != "user"
            for p in blocks_in(m)
        ),
        "arguments are JSON texts": lambda b: any(
            not isinstance(json.loads(a), dict) for a in inside(b["messages"], "arguments")
        ),
        "ids are at most 40 characters long": lambda b: any(
            len(i) > 40 for key in ("id", "tool_call_id") for i in inside(b["messages"], key)
        ),
        "stream_options without stream": lambda b: "stream_options" in b and not b.get("stream"),
        "tool settings without tools": lambda b: (
            {"tool_choice", "parallel_tool_calls"} & {*b} and not b.get("tools")
        ),
        "tool names": lambda b: (
            not all(NAME.fullmatch(t["function"]["name"]) for t in b.get("tools", []))
        ),
        "response_format: additionalProperties must be false": lambda b: any(
            f.get("strict") and is_open(f["schema"])
            for f in inside(b.get("response_format", {}), "json_schema")
        ),
        "reasoning_effort: unsupported value": lambda b: (
            b.get("reasoning_effort", "low") not in LEVELS
        ),
    },
    "gemini": {
        "contents: roles are user and model, the user begins": lambda b: (
            {c.get("role") for c in b["contents"]} - {"user", "model"}
            or b["contents"][0]["role"] != "user"
        ),
        "parts must not be empty": lambda b: not all(c["parts"] for c in b["contents"]),
        "required oneof field 'data' must have one initialized field": lambda b: any(
            not {*p} & {"inlineData", "functionCall", "functionResponse"}
            and not p.get("text")
            and "thoughtSignature" not in p
            for c in b["contents"]
            for p in c["parts"]
        ),
        "the number of function response parts must be that of the function calls": lambda b: (
            unpaired(
                b["contents"],
                lambda p: p.get("functionCall", {}).get("name"),
                lambda p: p.get("functionResponse", {}).get("name"),
            )
        ),
        "response: an object is wanted": lambda b: (
            not all(
                isinstance(r["response"], dict) for r in inside(b["contents"], "functionResponse")
            )
        ),
        "Function call is missing a thought_signature": lacks_signature,
        "Corrupted thought signature": lambda b: (
            set(inside(b["contents"], "thoughtSignature"))
            - {OWN_SEALS["gemini"], "skip_thought_signature_validator"}
        ),
        "thinking_budget and thinking_level together; or a level that the model lacks": lambda b: (
            any(
                {"thinkingBudget", "thinkingLevel"} <= {*t}
                or t.get("thinkingLevel", "low") not in ("low", "high")
                for t in inside(b, "thinkingConfig")
            )
        ),
        "properties: should be non-empty for OBJECT type": lambda b: any(
            not f["parameters"].get("properties")
            for t in b.get("tools", [])
            for f in t["functionDeclarations"]
            if "parameters" in f
        ),
        "enum: only allowed for STRING type, cannot be empty": lambda b: any(
            "" in s["enum"] or s.get("type") != "string" for s in each_dict(b) if "enum" in s
        ),
        "required: property is not defined": lambda b: any(
            set(s["required"]) - {*s.get("properties", {})} for s in each_dict(b) if "required" in s
        ),
        "items: missing field": lambda b: any(
            "items" not in s for s in each_dict(b) if s.get("type") == "array"
        ),
        "format: only 'enum' and 'date-time' are supported for STRING type": lambda b: any(
            s["format"] not in ("enum", "date-time") for s in each_dict(b) if "format" in s
        ),
        "toolConfig without tools": lambda b: "toolConfig" in b and not b.get("tools"),
    },
}
LOGIN_REFUSALS = {  # ChatGPT's own, beside those of the API (providers.md 2.3)
    "Unsupported parameter": lambda b: {"max_output_tokens", "temperature", "top_p"} & {*b},
    "Instructions are required": lambda b: not isinstance(b.get("instructions"), str),
}
HEADERS = {  # that a request must have, and whose value begins so
    "anthropic": {"Authorization": "Bearer k-one", "anthropic-version": "2023-06-01"},
    "responses": {"Authorization": "Bearer "},
    "chat": {"Authorization": "Bearer k-one"},
    "gemini": {"x-goog-api-key": "k-one"},
}


def thinks(body):
    return body.get("thinking", {}).get("type") in ("adaptive", "enabled")


def refusal(dialect, headers, body):
    """Why the provider says no; "" if it does not."""
    for name, start in HEADERS[dialect].items():
        if not headers.get(name, "").startswith(start):
            return f"header {name}: {headers.get(name)}"
    is_login = "Chatgpt-Account-Id" in headers
    reasons = [*misfits(SHAPES[dialect], "request", body)]
    if not reasons:
        table = NOES[dialect] | (LOGIN_REFUSALS if is_login else {})
        reasons = [reason for reason, is_refused in table.items() if is_refused(body)]
    return "; ".join(reasons)


OPEN = {"type": "object", "properties": {}}
CALL_ID = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
TOO_MUCH = [  # dialect, what a request says beside the least that it must, a word of the reason
    ("anthropic", {"max_tokens": None, "stop": "x"}, "stop: unknown name"),
    ("anthropic", {"messages": [{"role": "user", "content": " "}]}, "blank"),
    ("anthropic", {"messages": [{"role": "assistant", "content": "x"}]}, "the first the user's"),
    ("anthropic", {"tools": [{"name": "f", "input_schema": {"anyOf": [OPEN]}}]}, "union"),
    ("anthropic", {"thinking": {"type": "adaptive"}, "temperature": 1}, "may not be set"),
    ("anthropic", {"output_config": {"format": {"type": "json_schema", "schema": OPEN}}}, "false"),
    ("responses", {"input": [CALL_ID]}, "No tool output"),
    ("responses", {"input": [{**CALL_ID, "type": "function_call_output"}]}, "arguments: unknown"),
    ("responses", {"input": [{"type": "reasoning", "summary": []}]}, "required following item"),
    ("responses", {"include": []}, "include"),
    ("responses", {"tool_choice": "auto"}, "without tools"),
    ("chat", {"messages": [{"role": "tool", "tool_call_id": "c", "content": "x"}]}, "followed by"),
    ("chat", {"messages": [{"role": "assistant", "content": None}]}, "null"),
    ("chat", {"reasoning_effort": "max"}, "unsupported"),
    ("gemini", {"contents": [{"role": "user", "parts": [{"text": ""}]}]}, "oneof"),
    ("gemini", {"tools": [{"functionDeclarations": [{"name": "f", "parameters": {"const": 1}}]}]},
     "parameters.const: unknown name"),
    ("gemini", {"generationConfig": {"thinkingConfig": {"thinkingLevel": "max"}}}, "lacks"),
    ("gemini", {"systemInstruction": {"text": "x"}}, "text: unknown name"),
]  # fmt: skip
LEAST = {
    "anthropic": {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]},
    "responses": {
        "model": "m",
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}
        ],
        "stream": True,
        "store": False,
        "include": ["reasoning.encrypted_content"],
    },
    "chat": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    "gemini": {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]},
}


@pytest.mark.parametrize(("dialect", "more", "words"), TOO_MUCH)
def test_the_fakes_are_strict(dialect, more, words):
    assert not refusal(dialect, HEADERS[dialect], LEAST[dialect])
    assert words in refusal(dialect, HEADERS[dialect], {**LEAST[dialect], **more})


CITY = 'Zürich \U0001f3d4 "C:\\n"'
TWO_CALLS = [("weather", {"city": CITY, "days": 2}), ("clock", {"zone": "Europe/Zurich"})]
FORECAST = {"city": "Zürich", "degrees": 21, "kind": "day"}
ANSWERS = {  # scenario -> what the provider answers: thoughts, text, calls, and why it ends
    "text": ("", 'Grüezi, "Fred"\n', [], "end"),
    "thinking": ("They say hi.", "Hello", [], "end"),
    "tools": ("I need two tools.", "I look.", TWO_CALLS, "call"),
    "forced": ("", "", TWO_CALLS[:1], "call"),
    "image": ("", "A red dot", [], "end"),
    "json": ("", json.dumps(FORECAST), [], "end"),
    "length": ("", "Once upon a", [], "length"),
}
ENDS = {
    "anthropic": {"end": "end_turn", "call": "tool_use", "length": "max_tokens"},
    "responses": {"end": "completed", "call": "completed", "length": "incomplete"},
    "chat": {"end": "stop", "call": "tool_calls", "length": "length"},
    "gemini": {"end": "STOP", "call": "STOP", "length": "MAX_TOKENS"},
}
FIGURES = (100, 40, 20, 7)  # tokens: read, of these cached, written, of these thought


def halves(text):
    middle = len(text) // 2
    return [piece for piece in (text[:middle], text[middle:]) if piece]


def spoken_by_claude(turn, thought, text, calls, end):
    blocks = []
    if thought:
        deltas = [{"type": "thinking_delta", "thinking": piece} for piece in halves(thought)]
        deltas.append({"type": "signature_delta", "signature": OWN_SEALS["anthropic"]})
        blocks.append(({"type": "thinking", "thinking": "", "signature": ""}, deltas))
    if text:
        deltas = [{"type": "text_delta", "text": piece} for piece in halves(text)]
        blocks.append(({"type": "text", "text": ""}, deltas))
    for index, (name, args) in enumerate(calls):
        pieces = ["", *halves(json.dumps(args))]
        deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
        blocks.append(
            ({"type": "tool_use", "id": f"toolu_{turn}{index}", "name": name, "input": {}}, deltas)
        )
    read, cached, written, _ = FIGURES
    usage = {"input_tokens": read - cached, "cache_read_input_tokens": cached, "output_tokens": 1}
    yield event(
        "message_start", message={**message(), "content": [], "stop_reason": None, "usage": usage}
    )
    for index, (start, deltas) in enumerate(blocks):
        yield event("content_block_start", index=index, content_block=start)
        yield event("ping")
        yield from (event("content_block_delta", index=index, delta=delta) for delta in deltas)
        yield event("content_block_stop", index=index)
    stop = {"stop_reason": ENDS["anthropic"][end], "stop_sequence": None}
    yield event("message_delta", delta=stop, usage={"output_tokens": written})
    yield event("message_stop")


def spoken_in_responses(turn, thought, text, calls, end):
    """The pieces of the calls alternate; the last event has no output, as ChatGPT's has none."""
    told = []

    def put(kind, **fields):
        told.append(event("response." + kind, sequence_number=len(told), **fields))

    put("created", response=reply(status="in_progress"))
    items = []
    if thought:
        summary = [{"type": "summary_text", "text": thought}]
        items.append(
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": summary,
                "encrypted_content": OWN_SEALS["responses"],
            }
        )
        put(
            "output_item.added",
            output_index=0,
            item={"type": "reasoning", "id": "rs_1", "summary": []},
        )
        for piece in halves(thought):
            put(
                "reasoning_summary_text.delta",
                item_id="rs_1",
                output_index=0,
                summary_index=0,
                delta=piece,
            )
        put("output_item.done", output_index=0, item=items[0])
    index = len(items)
    if text:
        place = {"item_id": "msg_1", "output_index": index}
        said = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}
        part = {"type": "output_text", "text": text, "annotations": []}
        put("output_item.added", output_index=index, item={**said, "content": []})
        for piece in halves(text):
            put("output_text.delta", **place, content_index=0, delta=piece, logprobs=[])
        put("output_text.done", **place, content_index=0, text=text, logprobs=[])
        put("output_item.done", output_index=index, item={**said, "content": [part]})
        index += 1
    places = [{"item_id": f"fc_{i}", "output_index": index + i} for i, _ in enumerate(calls)]
    called = [
        {
            "type": "function_call",
            "id": f"fc_{i}",
            "call_id": f"call_{turn}{i}",
            "name": name,
            "arguments": "",
        }
        for i, (name, _) in enumerate(calls)
    ]
    for where, item in zip(places, called, strict=True):
        put("output_item.added", output_index=where["output_index"], item=item)
    for piece in range(2):
        for where, (_, args) in zip(places, calls, strict=True):
            put("function_call_arguments.delta", **where, delta=halves(json.dumps(args))[piece])
    for where, item, (_, args) in zip(places, called, calls, strict=True):
        put("function_call_arguments.done", **where, arguments=json.dumps(args))
        put(
            "output_item.done",
            output_index=where["output_index"],
            item={**item, "arguments": json.dumps(args)},
        )
    read, cached, written, thoughts = FIGURES
    usage = {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": thoughts},
        "total_tokens": read + written,
    }
    status = ENDS["responses"][end]
    why = {"reason": "max_output_tokens"} if end == "length" else None
    put(status, response=reply(status=status, usage=usage, incomplete_details=why))
    return told


def spoken_in_chat(turn, thought, text, calls, end):
    """The pieces of the calls alternate; usage comes last."""
    names = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "qwen3"}

    def chunk(end=None, **delta):
        return data({**names, "choices": [{"index": 0, "delta": delta, "finish_reason": end}]})

    yield chunk(role="assistant", content="")
    yield from (chunk(reasoning_content=piece) for piece in halves(thought))
    yield from (chunk(content=piece) for piece in halves(text))
    for index, (name, _) in enumerate(calls):
        function = {"name": name, "arguments": ""}
        yield chunk(
            tool_calls=[
                {
                    "index": index,
                    "id": f"call_{turn}{index}",
                    "type": "function",
                    "function": function,
                }
            ]
        )
    for piece in range(2):
        for index, (_, args) in enumerate(calls):
            words = {"arguments": halves(json.dumps(args))[piece]}
            yield chunk(tool_calls=[{"index": index, "function": words}])
    yield chunk(ENDS["chat"][end])
    read, cached, written, thoughts = FIGURES
    usage = {
        "prompt_tokens": read,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens": written,
        "completion_tokens_details": {"reasoning_tokens": thoughts},
        "total_tokens": read + written,
    }
    yield data({**names, "choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


def spoken_by_gemini(_, thought, text, calls, end):
    """Without ids; the signature on the first call, else behind the text."""
    parts = [{"text": piece, "thought": True} for piece in halves(thought)]
    parts += [{"text": piece} for piece in halves(text)]
    parts += [{"functionCall": {"name": name, "args": given}} for name, given in calls]
    if calls:
        parts[-len(calls)]["thoughtSignature"] = OWN_SEALS["gemini"]
    elif thought:
        parts.append({"text": "", "thoughtSignature": OWN_SEALS["gemini"]})
    read, cached, written, thoughts = FIGURES
    usage = {
        "promptTokenCount": read,
        "cachedContentTokenCount": cached,
        "candidatesTokenCount": written - thoughts,
        "thoughtsTokenCount": thoughts,
        "totalTokenCount": read + written,
    }
    for index, part in enumerate(parts):
        last = {"finishReason": ENDS["gemini"][end]} if index == len(parts) - 1 else {}
        candidate = {"content": {"role": "model", "parts": [part]}, "index": 0, **last}
        yield data(
            {
                "candidates": [candidate],
                "usageMetadata": usage,
                "modelVersion": "gemini-3-pro-preview",
            }
        )


SPOKEN = {
    "anthropic": spoken_by_claude,
    "responses": spoken_in_responses,
    "chat": spoken_in_chat,
    "gemini": spoken_by_gemini,
}
SERVED = {
    "anthropic": ("claude-api-key", "claude-opus-4-6"),
    "responses": ("codex-api-key", "gpt-5.4"),
    "chat": ("openai-compatibility", "gpt-oss"),
    "gemini": ("gemini-api-key", "gemini-3-pro-preview"),
}


@asynccontextmanager
async def strict_world(folder, client, provider):
    """A proxy before one strict provider; for Chat a login: OpenAI's keys serve that as it is."""
    is_login = (client, provider) == ("chat", "responses")
    async with codex_world(folder) if is_login else key_world(folder, SERVED[provider][0]) as w:
        w.strict = w.codex if is_login else w.keyed
        w.answers = []  # (turn, what is answered)

        async def answer(request):
            reason = refusal(provider, request.headers, json.loads(request.bytes))
            if reason:
                return web.json_response({"error": {"message": reason}}, status=400)
            return web.Response(body=b"".join(SPOKEN[provider](*w.answers.pop(0))), headers=SSE)

        w.strict.usual = answer
        yield w


DOT = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGP4z8DwHwAFAAH"
    "/q842iQAAAABJRU5ErkJggg=="
)
DOT_URL = f"data:image/png;base64,{DOT}"
STOP = "THE END"
SDK_TOOLS = {  # name -> schema, with words that one provider or the other refuses
    "weather": {
        "type": "object",
        "additionalProperties": False,
        "required": ["city"],
        "properties": {
            "city": {"$ref": "#/$defs/city"},
            "days": {"type": "integer", "exclusiveMinimum": 0, "default": 1},
            "unit": {"const": "C"},
            "link": {"type": ["string", "null"], "format": "uri"},
        },
        "$defs": {"city": {"type": "string", "minLength": 1}},
    },
    "clock": {
        "type": "object",
        "properties": {"zone": {"anyOf": [{"enum": ["Europe/Zurich", ""]}, {"type": "null"}]}},
    },
    "nothing": {"type": "object"},
}
RESULTS = ['{"degrees": 21}', "12:00"]


@functools.cache
def weather_model():
    """What a JSON answer is read into."""
    pydantic = pytest.importorskip("pydantic")
    degrees = (int, pydantic.Field(ge=-90, le=60))
    return pydantic.create_model("Weather", city=str, degrees=degrees, kind=(Kind, ...))


class Kind(enum.StrEnum):
    DAY, NIGHT = "day", "night"


@dataclass
class Seen:
    """An answer as an SDK read it."""

    text: str
    thought: str
    calls: list
    ids: list
    stop: str
    usage: tuple  # as FIGURES
    parsed: object = None


class AnthropicSdk:
    def __init__(self, url):
        sdk = pytest.importorskip("anthropic")
        self.client = sdk.AsyncAnthropic(base_url=url, api_key="any", max_retries=0)
        self.close = self.client.close

    def first(self, scenario, model):
        content = [{"type": "text", "text": "hi"}, *[self.picture] * (scenario == "image")]
        thinking = {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}
        tools = [{"name": n, "description": n, "input_schema": s} for n, s in SDK_TOOLS.items()]
        choice = {"type": "any", "disable_parallel_tool_use": True}
        more = {
            "text": {"stop_sequences": [STOP], "extra_body": {"temperature": 0.5}},
            "thinking": thinking,
            "tools": {"tools": tools, **thinking},
            "forced": {"tools": tools, "tool_choice": choice, "output_config": {"effort": "high"}},
            "json": {"output_format": weather_model()},
        }
        asked = {"model": model, "max_tokens": 2000, "system": "Be kind."}
        asked["messages"] = [{"role": "user", "content": content}]
        return asked | more.get(scenario, {})

    picture: ClassVar = {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": DOT},
    }

    async def ask(self, asked, streamed):
        messages = self.client.messages
        if not streamed:
            return await (messages.parse if "output_format" in asked else messages.create)(**asked)
        async with messages.stream(**asked) as stream:
            self.pieces = [event.text async for event in stream if event.type == "text"]
            return await stream.get_final_message()

    def seen(self, answer):
        def blocks(kind):
            return [block for block in answer.content if block.type == kind]

        calls, usage = blocks("tool_use"), answer.usage
        cached = usage.cache_read_input_tokens
        return Seen(
            "".join(block.text for block in blocks("text")),
            "".join(block.thinking for block in blocks("thinking")),
            [(call.name, call.input) for call in calls],
            [call.id for call in calls],
            answer.stop_reason,
            (usage.input_tokens + cached, cached, usage.output_tokens, 0),
            getattr(answer, "parsed_output", None),
        )

    def second(self, asked, answer, seen):
        said = []
        for id, result in zip(seen.ids, RESULTS, strict=False):
            told = [{"type": "text", "text": result}, self.picture]
            said.append({"type": "tool_result", "tool_use_id": id, "content": told})
        said = said or [{"type": "text", "text": "And now?"}]
        turns = [
            {"role": "assistant", "content": answer.content},
            {"role": "user", "content": said},
        ]
        return {**asked, "messages": [*asked["messages"], *turns]}


class OpenAiSdk:
    def __init__(self, url):
        self.sdk = pytest.importorskip("openai")
        self.client = self.sdk.AsyncOpenAI(base_url=url + "/v1", api_key="any", max_retries=0)
        self.close = self.client.close

    effort: ClassVar = {
        "reasoning": {"effort": "high", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
    }


class ChatSdk(OpenAiSdk):
    def first(self, scenario, model):
        picture = {"type": "image_url", "image_url": {"url": DOT_URL}}
        content = [{"type": "text", "text": "hi"}, *[picture] * (scenario == "image")]
        functions = [{"name": n, "description": n, "parameters": s} for n, s in SDK_TOOLS.items()]
        tools = [{"type": "function", "function": function} for function in functions]
        forced = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
        more = {
            "text": {"temperature": 0.5, "stop": STOP},
            "thinking": {"reasoning_effort": "high"},
            "tools": {"tools": tools, "reasoning_effort": "high"},
            "forced": {**forced, "reasoning_effort": "high"},
            "json": {"response_format": weather_model()},
        }
        system = {"role": "developer", "content": "Be kind."}
        asked = {"messages": [system, {"role": "user", "content": content}]}
        return {"model": model, "max_completion_tokens": 2000, **asked, **more.get(scenario, {})}

    async def ask(self, asked, streamed):
        chat = self.client.chat.completions
        if not streamed:
            return await (chat.parse if "response_format" in asked else chat.create)(**asked)
        async with chat.stream(**asked, stream_options={"include_usage": True}) as stream:
            told = [event.delta async for event in stream if event.type == "content.delta"]
            self.pieces = [piece for piece in told if piece]
            try:
                return await stream.get_final_completion()
            except self.sdk.LengthFinishReasonError as cut:  # what it does with every such stream
                return cut.completion

    def seen(self, answer):
        choice, usage = answer.choices[0], answer.usage
        calls = choice.message.tool_calls or []
        cached = usage.prompt_tokens_details.cached_tokens
        thoughts = usage.completion_tokens_details.reasoning_tokens
        return Seen(
            choice.message.content or "",
            getattr(choice.message, "reasoning_content", ""),
            [(call.function.name, json.loads(call.function.arguments)) for call in calls],
            [call.id for call in calls],
            choice.finish_reason,
            (usage.prompt_tokens, cached, usage.completion_tokens, thoughts),
            getattr(choice.message, "parsed", None),
        )

    def second(self, asked, answer, seen):
        said = []
        for id, result in zip(seen.ids, RESULTS, strict=False):
            said.append({"role": "tool", "tool_call_id": id, "content": result})
        said = said or [{"role": "user", "content": "And now?"}]
        return {**asked, "messages": [*asked["messages"], answer.choices[0].message, *said]}


class ResponsesSdk(OpenAiSdk):
    picture: ClassVar = {"type": "input_image", "image_url": DOT_URL, "detail": "auto"}

    def first(self, scenario, model):
        content = [{"type": "input_text", "text": "hi"}, *[self.picture] * (scenario == "image")]
        functions = [{"name": n, "description": n, "parameters": s} for n, s in SDK_TOOLS.items()]
        tools = [{"type": "function", "strict": False, **function} for function in functions]
        forced = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
        more = {
            "text": {"temperature": 0.5},
            "thinking": self.effort,
            "tools": {"tools": tools, **self.effort},
            "forced": {**forced, **self.effort},
            "json": {"text_format": weather_model()},
        }
        asked = {"model": model, "max_output_tokens": 2000, "instructions": "Be kind."}
        asked["input"] = [{"role": "user", "content": content}]
        return {**asked, "store": False, **more.get(scenario, {})}

    async def ask(self, asked, streamed):
        responses = self.client.responses
        if not streamed:
            call = responses.parse if "text_format" in asked else responses.create
            return await call(**asked)
        async with responses.stream(**asked) as stream:
            told = [event async for event in stream]
        assert [event.sequence_number for event in told] == [*range(len(told))]
        self.pieces = [event.delta for event in told if event.type == "response.output_text.delta"]
        return told[-1].response

    def seen(self, answer):
        def items(kind):
            return [item for item in answer.output if item.type == kind]

        calls, usage = items("function_call"), answer.usage
        cached = usage.input_tokens_details.cached_tokens
        thoughts = usage.output_tokens_details.reasoning_tokens
        return Seen(
            answer.output_text,
            "".join(part.text for item in items("reasoning") for part in item.summary),
            [(call.name, json.loads(call.arguments)) for call in calls],
            [call.call_id for call in calls],
            answer.status,
            (usage.input_tokens, cached, usage.output_tokens, thoughts),
            getattr(answer, "output_parsed", None),
        )

    def second(self, asked, answer, seen):
        said = []
        for id, result in zip(seen.ids, RESULTS, strict=False):
            told = [{"type": "input_text", "text": result}, self.picture]
            said.append({"type": "function_call_output", "call_id": id, "output": told})
        said = said or [{"role": "user", "content": "And now?"}]
        return {**asked, "input": [*asked["input"], *answer.output, *said]}


class GeminiSdk:
    def __init__(self, url):
        sdk = pytest.importorskip("google.genai")
        self.client = sdk.Client(api_key="any", http_options={"base_url": url}).aio
        self.close = self.client.aclose

    def first(self, scenario, model):
        picture = {"inline_data": {"mime_type": "image/png", "data": base64.b64decode(DOT)}}
        parts = [{"text": "hi"}, *[picture] * (scenario == "image")]
        named = [
            {"name": n, "description": n, "parameters_json_schema": s} for n, s in SDK_TOOLS.items()
        ]
        tools = {"tools": [{"function_declarations": named}]}
        thinking = {"thinking_config": {"thinking_level": "HIGH", "include_thoughts": True}}
        mode = {"function_calling_config": {"mode": "ANY"}}
        schema = {"response_schema": weather_model()}
        more = {
            "text": {"temperature": 0.5, "stop_sequences": [STOP]},
            "thinking": thinking,
            "tools": {**tools, **thinking},
            "forced": {**tools, **thinking, "tool_config": mode},
            "json": {"response_mime_type": "application/json", **schema},
        }
        config = {"max_output_tokens": 2000, "system_instruction": "Be kind."}
        config |= more.get(scenario, {})
        return {"model": model, "contents": [{"role": "user", "parts": parts}], "config": config}

    async def ask(self, asked, streamed):
        """A stream's chunks as one answer: the SDK leaves that to whoever calls."""
        models = self.client.models
        if not streamed:
            return await models.generate_content(**asked)
        chunks = [chunk async for chunk in await models.generate_content_stream(**asked)]
        contents = [chunk.candidates[0].content for chunk in chunks]
        parts = [part for content in contents if content for part in content.parts or []]
        self.pieces = [part.text for part in parts if part.text and not part.thought]
        chunks[-1].candidates[0].content.parts = parts
        return chunks[-1]

    def seen(self, answer):
        parts, usage = answer.candidates[0].content.parts, answer.usage_metadata
        calls = [part.function_call for part in parts if part.function_call]
        thoughts = usage.thoughts_token_count or 0
        written = usage.candidates_token_count + thoughts
        return Seen(
            "".join(part.text for part in parts if part.text and not part.thought),
            "".join(part.text for part in parts if part.text and part.thought),
            [(call.name, call.args) for call in calls],
            [call.id for call in calls],
            answer.candidates[0].finish_reason.name,
            (usage.prompt_token_count, usage.cached_content_token_count, written, thoughts),
            answer.parsed,
        )

    def second(self, asked, answer, seen):
        said = []
        for id, (name, _), result in zip(seen.ids, TWO_CALLS, RESULTS, strict=False):
            told = {"id": id, "name": name, "response": {"output": result}}
            said.append({"function_response": told})
        said = said or [{"text": "And now?"}]
        turns = [answer.candidates[0].content, {"role": "user", "parts": said}]
        return {**asked, "contents": [*asked["contents"], *turns]}


SDKS = {"anthropic": AnthropicSdk, "chat": ChatSdk, "responses": ResponsesSdk, "gemini": GeminiSdk}
SDK_PAIRS = [pair for pair in itertools.product(SDKS, SPOKEN) if pair[0] != pair[1]]
NAMES_ASKED = {  # where a provider's dialect has what the scenarios ask for
    "anthropic": ("system", "stop_sequences", "thinking", "tool_choice", "output_config"),
    "responses": ("instructions", "", "reasoning", "tool_choice", "format"),
    "chat": ("messages", "stop", "reasoning_effort", "tool_choice", "json_schema"),
    "gemini": ("systemInstruction", "stopSequences", "thinkingConfig", "mode", "responseSchema"),
}
THINKING_ASKED = {
    "anthropic": {"type": "adaptive"},
    "responses": {"effort": "high", "summary": "auto"},
    "chat": "high",
    "gemini": {"includeThoughts": True, "thinkingLevel": "high"},
}


def check_answer(seen, client, provider, scenario, turn):
    thought, text, calls, end = ANSWERS[scenario]
    assert (seen.text, seen.thought or "", seen.calls) == (text, thought, calls)
    assert seen.stop == ENDS[client][end]
    assert len(set(seen.ids)) == len(seen.ids) == len(calls)
    if provider != "gemini":  # which gives none
        start = "toolu" if provider == "anthropic" else "call"
        assert seen.ids == [f"{start}_{turn}{i}" for i, _ in enumerate(calls)]
    *figures, thoughts = FIGURES
    is_counted = "anthropic" not in (client, provider)  # it counts them with the answer
    assert seen.usage == (*figures, thoughts if is_counted else 0)


def check_asked(raw, client, provider, scenario, turn):
    """What reached the provider, as far as its strictness does not say it."""
    body = json.loads(raw)
    system, stops, effort, choice, schema = NAMES_ASKED[provider]
    assert "Be kind." in str(body[system])
    assert provider != "anthropic" or "cache_control" in str(body)
    if scenario == "text":
        is_login = (client, provider) == ("chat", "responses")
        assert [*inside(body, "temperature")] == (
            [] if is_login or provider == "responses" else [0.5]
        )
        told = [*inside(body, stops)]
        assert told in ([[STOP]], [STOP]) if stops and client != "responses" else told == []
    if scenario in ("thinking", "tools"):
        assert THINKING_ASKED[provider] in inside(body, effort)
        assert provider != "anthropic" or body["output_config"] == {"effort": "high"}
    if scenario in ("thinking", "tools") and provider in OWN_SEALS:
        assert raw.count(OWN_SEALS[provider].encode()) == turn - 1, "its own seals come back"
        assert b"skip_thought_signature_validator" not in raw, "to the calls that they stood on"
    if scenario == "forced":
        [told] = inside(body, choice)
        assert (told["type"] if provider == "anthropic" else told) in ("any", "required", "ANY")
        if client != "gemini" and provider != "gemini":  # which cannot say it
            settings = told if provider == "anthropic" else body
            assert (
                settings.get("disable_parallel_tool_use"),
                settings.get("parallel_tool_calls"),
            ) in ((True, None), (None, False))
    results = (turn - 1) * len(ANSWERS[scenario][2]) * (client in PICTURES_IN_RESULTS)
    assert raw.count(DOT.encode()) == (1 if scenario == "image" else results)
    if scenario == "json":
        [told] = inside(body, schema)
        assert [*next(inside(told, "properties"))] == [*FORECAST]
    if scenario == "tools" and turn > 1:
        written = re.sub(r"[\\ ]", "", raw.decode())
        assert all(result.replace(" ", "") in written for result in RESULTS)


PICTURES_IN_RESULTS = ("anthropic", "responses")
THEN = {  # what is answered in the turns behind the first; else a text
    "thinking": ("thinking", "text"),
    "tools": ("tools", "text"),
    "json": ("json",),
}


@pytest.fixture
def no_certificates(monkeypatch):
    """Each SDK's client loads them all, in 40 ms; here nobody needs any."""
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)


@pytest.mark.usefixtures("no_certificates")
@pytest.mark.parametrize("scenario", ANSWERS)
@pytest.mark.parametrize(("client", "provider"), SDK_PAIRS)
@in_loop
async def test_sdk_against_a_provider_of_another_dialect(tmp_path, client, provider, scenario):
    """A conversation, in one piece and streamed: both read alike."""
    async with strict_world(tmp_path, client, provider) as w:
        sdk = SDKS[client](w.url)
        for streamed in (False, True):
            asked = sdk.first(scenario, SERVED[provider][1])
            for turn, said in enumerate((scenario, *THEN.get(scenario, ("text",))), 1):
                w.answers.append((turn, *ANSWERS[said]))
                answer = await sdk.ask(asked, streamed)
                seen = sdk.seen(answer)
                check_answer(seen, client, provider, said, turn)
                check_asked(w.strict.last.bytes, client, provider, scenario, turn)
                if streamed:
                    assert sdk.pieces == halves(seen.text)
                if scenario == "json" and not (streamed and client == "gemini"):
                    assert seen.parsed.model_dump(mode="json") == FORECAST
                asked = sdk.second(asked, answer, seen)
        await sdk.close()


BUDGETS = {  # models that think by a budget, and where it stands
    "anthropic": ("claude-sonnet-4-5", "budget_tokens"),
    "gemini": ("gemini-2.5-pro", "thinkingBudget"),
}


@pytest.mark.parametrize(("client", "provider"), [pair for pair in SDK_PAIRS if pair[1] in BUDGETS])
@in_loop
async def test_sdk_with_a_model_that_thinks_by_a_budget(tmp_path, client, provider):
    model, name = BUDGETS[provider]
    async with strict_world(tmp_path, client, provider) as w:
        sdk = SDKS[client](w.url)
        asked = sdk.first("tools", model)
        for turn, said in enumerate(("tools", "tools", "text"), 1):
            w.answers.append((turn, *ANSWERS[said]))
            answer = await sdk.ask(asked, streamed=True)
            seen = sdk.seen(answer)
            check_answer(seen, client, provider, said, turn)
            assert [*inside(w.strict.body(), name)] == [1500], "within the limit of 2,000"
            assert w.strict.last.bytes.count(OWN_SEALS[provider].encode()) == turn - 1
            asked = sdk.second(asked, answer, seen)
        await sdk.close()


@pytest.mark.parametrize("provider", [dialect for dialect in SPOKEN if dialect != "gemini"])
@in_loop
async def test_googles_chat_keeps_a_stream_in_its_pieces(tmp_path, provider):
    """Each chunk is a turn of its own in its history; said again it is one answer."""
    async with strict_world(tmp_path, "gemini", provider) as w:
        sdk = GeminiSdk(w.url)
        asked = sdk.first("thinking", SERVED[provider][1])
        chat = sdk.client.chats.create(model=asked["model"], config=asked["config"])
        for words in ("hi", "And now?"):
            w.answers.append((1, *ANSWERS["thinking"]))
            told = [chunk.text or "" async for chunk in await chat.send_message_stream(words)]
            assert "".join(told) == "Hello"
        texts = {"anthropic": "text", "responses": "text", "chat": "content"}[provider]
        assert [*inside(w.strict.body(), texts)].count("Hello") == 1
        thoughts = [*inside(w.strict.body(), "thinking")]
        assert provider != "anthropic" or ANSWERS["thinking"][0] in thoughts
        await sdk.close()


@pytest.mark.usefixtures("no_certificates")
@pytest.mark.parametrize(("client", "provider"), SDK_PAIRS)
@in_loop
async def test_sdk_is_told_why_a_provider_refuses(tmp_path, client, provider):
    async with strict_world(tmp_path, client, provider) as w:
        sdk = SDKS[client](w.url)
        w.strict.usual = answer_json({"error": {"message": "the moon is full"}}, 400)
        for streamed in (False, True):
            with pytest.raises(Exception, match="the moon is full") as caught:
                await sdk.ask(sdk.first("text", SERVED[provider][1]), streamed)
            assert getattr(caught.value, "status_code", getattr(caught.value, "code", 0)) == 400
        await sdk.close()


# == What users of other proxies suffered ==========================================================


async def at_once(w, count, path="/v1/messages", body=ASK):
    """So many requests that the provider has before it answers any of them; their answers."""
    gate, asked = asyncio.Event(), len(w.claude.requests)
    w.claude.usual = held(gate, w.claude.usual)
    tasks = [asyncio.create_task(w.ask(path, body)) for _ in range(count)]
    while len(w.claude.requests) < asked + count:
        await asyncio.sleep(0)
    gate.set()
    status, headers, parts = w.claude.usual
    w.claude.usual = status, headers, parts[1:]
    return await asyncio.gather(*tasks)


NO_WAIT = {"max-retry-interval": 0, "request-retry": 1}


@in_loop
async def test_a_rest_grows_once_per_failure_window_and_shrinks_with_a_success(tmp_path):
    async with world(tmp_path, **NO_WAIT, **{"max-cooldown": 50}) as w:
        w.claude.usual = said(500)
        await at_once(w, 30)
        assert resting(w) == {"": 5}, "30 requests that ran side by side are one failure"
        for length in (10, 20, 40, 50, 50):
            w.clock.now += 100
            assert (await w.ask("/v1/messages", ASK)).status == 500
            assert resting(w) == {"": length}
        w.clock.now += 100
        w.claude.script = [answer_json(message())]
        assert (await w.ask("/v1/messages", ASK)).status == 200
        assert resting(w) == {}
        assert (await w.ask("/v1/messages", ASK)).status == 500
        assert resting(w) == {"": 5}


@in_loop
async def test_a_request_from_before_the_rest_was_over_does_not_grow_it(tmp_path):
    gate = asyncio.Event()
    async with world(tmp_path, **NO_WAIT) as w:
        w.claude.script = [held(gate, said(500)), said(500)]
        early = asyncio.create_task(w.ask("/v1/messages", ASK))
        while not w.claude.requests:
            await asyncio.sleep(0)
        w.clock.now += 1
        await w.ask("/v1/messages", ASK)
        w.clock.now += 6
        gate.set()
        await early
        assert resting(w) == {"": 5}


@in_loop
async def test_a_time_that_the_error_names_is_not_doubled(tmp_path):
    async with world(tmp_path, **NO_WAIT) as w:
        w.claude.usual = said(503, **{"Retry-After": "40"})
        for _ in range(3):
            await w.ask("/v1/messages", ASK)
            assert resting(w) == {"": 40}
            w.clock.now += 41


@in_loop
async def test_a_token_endpoint_that_fails_is_asked_again_ever_more_rarely(tmp_path):
    asked = []

    async def down(request):
        asked.append(w.clock.now)
        return web.json_response({"error": "temporarily_unavailable"}, status=503)

    async with world(tmp_path, tokens=(), **NO_WAIT) as w:
        token_file(w.auth, expired="2020-01-01T00:00:00Z")
        w.server.tick()
        w.authority.usual = down
        for _ in range(2 * 95):
            assert (await w.ask("/v1/messages", ASK)).status in (429, 503)
            w.clock.now += 0.5
        assert asked == [0, 1, 3, 7, 15, 31, 61, 91]
        w.authority.usual = answer_json(NEW_TOKEN)
        w.clock.now = 121
        assert (await w.ask("/v1/messages", ASK)).status == 200
        token_file(w.auth, expired="2020-01-01T00:00:00Z", access_token="sk-ant-oat-new")
        w.server.tick()
        w.authority.usual, now = down, w.clock.now
        for _ in range(4):
            await w.ask("/v1/messages", ASK)
            w.clock.now += 0.5
        assert asked[8:] == [now, now + 1], "from the beginning, after a success"


HELPERS = {  # verb -> how it is asked
    "count_tokens": ("claude-api-key", "/v1/messages/count_tokens", ASK),
    "compact": ("codex-api-key", "/v1/responses/compact", {"model": "gpt-5.4", "input": "x"}),
    "countTokens": ("gemini-api-key", "/v1beta/models/gemini-2.5-pro:countTokens", {"contents": []}),
}  # fmt: skip


@pytest.mark.parametrize("status", [404, 429])
@pytest.mark.parametrize("verb", HELPERS)
@in_loop
async def test_a_helper_that_is_refused_makes_nothing_rest(tmp_path, verb, status):
    """Claude Code's /context counts 35 times in a second, and some backends have no counting."""
    kind, path, body = HELPERS[verb]
    async with key_world(tmp_path, kind, keys=("one", "two")) as w:
        refused = answer_json({"error": {"message": "no"}}, status, **{"Retry-After": "60"})
        w.keyed.script = [refused] * 70
        answers = await asyncio.gather(*(w.ask(path, body) for _ in range(35)))
        assert {answer.status for answer in answers} == {status}
        assert len(w.keyed.requests) == 70, "each key once"
        assert not any(account.rests for account in w.server.pool.accounts.values())
        assert (await w.ask(*asked_as(kind))).status == 200


@pytest.mark.parametrize("answer", [said(401), said(500), said(403)])
@in_loop
async def test_a_helper_that_fails_otherwise_is_like_any_call(tmp_path, answer):
    async with world(tmp_path, **NO_WAIT) as w:
        w.claude.usual = answer
        await w.ask("/v1/messages/count_tokens", ASK)
        assert list(resting(w)) == [""]


@pytest.mark.parametrize("words", ["OAuth token has been revoked", "OAuth token has expired"])
@in_loop
async def test_a_403_for_a_token_that_ended_is_refreshed_once(tmp_path, words):
    async with world(tmp_path) as w:
        w.claude.script = [said(403, words, "permission_error")]
        assert (await w.ask("/v1/messages", ASK)).status == 200
        assert len(w.authority.requests) == 1
        assert [bearer_of(r) for r in w.claude.requests] == ["fred@example.com", "new"]
        w.claude.usual = said(403, words, "permission_error")
        w.authority.usual = answer_json({"error": "invalid_grant"}, 400)
        assert (await w.ask("/v1/messages", ASK)).status == 401
        accounts = (await w.ask_json("/status", method="GET"))[1]["accounts"]
        assert accounts[0]["state"] == "needs-login"


@pytest.mark.parametrize(("status", "answer", "final"), [
    (401, {"error": {"code": "app_session_expired", "message": "x"}}, True),
    (400, {"error": "app_session_terminated"}, True),
    (401, {"error": {"message": "Your session has ended. Please log in again."}}, True),
    (401, {"error": {"message": "Your refresh token was already used. Please try signing in again."}}, True),
    (400, {"error": "invalid_request", "error_description": "please sign in again"}, True),
    (403, {"error": {"code": "refresh_token_revoked"}}, True),
    (503, {"error": {"message": "please log in again later"}}, False),
    (500, {"error": "server_error"}, False), (429, {"error": "rate_limit_error"}, False),
    (401, {"error": {"message": "who are you"}}, False),
])  # fmt: skip
@in_loop
async def test_final_words_of_a_token_endpoint(tmp_path, status, answer, final):
    async with world(tmp_path, tokens=(), **NO_WAIT) as w:
        token_file(w.auth, expired="2020-01-01T00:00:00Z")
        w.server.tick()
        w.authority.usual = answer_json(answer, status)
        for _ in range(3):
            assert (await w.ask("/v1/messages", ASK)).status >= 400
            w.clock.now += 3600
        assert len(w.authority.requests) == (1 if final else 3)
        state = (await w.ask_json("/status", method="GET"))[1]["accounts"][0]["state"]
        assert (state == "needs-login") == final


@in_loop
async def test_a_429_that_may_be_tried_again_is(tmp_path):
    """It says so, and names no limit: one more try, then a short rest that grows."""
    again = limit("slowly", **{"x-should-retry": "true"})
    async with world(tmp_path, **NO_WAIT) as w:
        w.claude.script = [again]
        assert (await w.ask("/v1/messages", ASK)).status == 200
        assert (w.clock.now, resting(w)) == (ampproxy.RETRY_PAUSE, {})
        w.claude.usual = again
        for length in (5, 10, 20):
            status, body, headers = await w.ask_json("/v1/messages", ASK)
            assert (status, body["error"]["message"]) == (429, "slowly"), "the provider's words"
            assert headers["x-should-retry"] == "true"
            assert resting(w) == {"": length}
            w.clock.now += length
        assert len(w.claude.requests) == 8
    for more in (
        {"Retry-After": "50"},
        {"anthropic-ratelimit-unified-status": "rejected"},
        {"x-should-retry": "false"},
    ):
        (folder := tmp_path / str(len(str(more)))).mkdir()
        async with world(folder, **NO_WAIT) as w:
            w.claude.usual = limit("slowly", **{"x-should-retry": "true", **more})
            await w.ask("/v1/messages", ASK)
            assert len(w.claude.requests) == 1
            assert resting(w) in ({"": 50}, {"": 60})


@pytest.mark.parametrize("cooldown", [1, 1800])
@in_loop
async def test_an_answered_probe_ends_the_probe(tmp_path, cooldown):
    """Also when the answer is the request's own fault; one that fails rests as long as any."""
    async with world(tmp_path, **NO_WAIT, **{"max-cooldown": cooldown}) as w:
        w.claude.script = [said(500), said(400), answer_json(message())]
        assert (await w.ask("/v1/messages", ASK)).status == 500
        w.clock.now += min(cooldown, 5) + 0.1
        assert (await w.ask("/v1/messages", ASK)).status == 400
        assert resting(w) == {}
        w.clock.now += 0.1
        assert (await w.ask("/v1/messages", ASK)).status == 200
        w.claude.script = [said(500), said(500), said(500)]
        for length in (5, 10, 20):
            assert (await w.ask("/v1/messages", ASK)).status == 500
            assert resting(w) == {"": min(cooldown, length)}
            w.clock.now += min(cooldown, length)


@in_loop
async def test_a_probe_that_was_left_holds_nobody_up(tmp_path):
    async with world(tmp_path, **NO_WAIT) as w:
        w.claude.script = [said(500), (200, SSE, [asyncio.Event()])]
        await w.ask("/v1/messages", ASK)
        w.clock.now += 6
        probe = asyncio.create_task(w.ask("/v1/messages", STREAM))
        while len(w.claude.requests) < 2:
            await asyncio.sleep(0)
        assert (await w.ask("/v1/messages", ASK)).status == 429, "one probe at a time"
        probe.cancel()
        await w.claude.gone.wait()
        assert (await w.ask("/v1/messages", ASK)).status == 200


SPENT_400 = {"error": {"type": "usage_limit_reached", "message": "spent", "resets_in_seconds": 700}}


@in_loop
async def test_a_spent_plan_is_known_by_its_words_under_any_status(tmp_path):
    names = ("ann@example.com", "bob@example.com")
    async with codex_world(tmp_path, names, **NO_WAIT) as w:
        w.codex.script = [answer_json(SPENT_400, 400)]
        assert (await w.ask(CODEX, QUESTION)).status == 200
        assert resting(w) == {"": 700}
        w.codex.usual = answer_json(SPENT_400, 400)
        await w.ask(CODEX, QUESTION)
        status, body, headers = await w.ask_json(CODEX, QUESTION)
        assert (status, body["error"]["type"]) == (429, "usage_limit_reached")
        assert headers["Retry-After"] == "700"


@pytest.mark.parametrize(("named", "seconds"), [
    ({"resets_at": 1_800_000_700}, 700), ({"resets_at": 1_700_000_000}, 60), ({"resets_in_seconds": -5}, 60),
    ({"resets_at": 1_700_000_000, "resets_in_seconds": 90}, 90), ({"resets_at": "soon"}, 60), ({}, 60),
])  # fmt: skip
@in_loop
async def test_a_reset_time_in_the_past_is_none(tmp_path, named, seconds):
    async with codex_world(tmp_path, **NO_WAIT) as w:
        w.codex.usual = answer_json(
            {"error": {"type": "usage_limit_reached", "message": "x", **named}}, 429
        )
        await w.ask(CODEX, QUESTION)
        assert resting(w) == {"": seconds}


FIRST_ERRORS = {  # a provider's error in the first event of a stream
    "claude-api-key": event("error", error={"type": "api_error", "message": "its own words"}),
    "codex-api-key": event("error", error={"type": "server_error", "message": "its own words"}),
    "openai-compatibility": data({"error": {"code": "server_error", "message": "its own words"}}),
    "gemini-api-key": data({"error": {"code": 500, "status": "INTERNAL", "message": "its own words"}}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FIRST_ERRORS)
@in_loop
async def test_of_several_keys_that_fail_the_last_words_and_each_reason_are_told(
    tmp_path, kind, caplog
):
    async with key_world(tmp_path, kind, keys=("k-one", "k-two"), config=NO_WAIT) as w:
        w.keyed.usual = (200, SSE, [FIRST_ERRORS[kind]])
        path, body = asked_as(kind, stream=True)
        response = await w.ask(path, body)
        told = json.loads(response.bytes)["error"]["message"]
        assert response.status == 429
        assert "its own words" in told
        assert told.count("wakes in 5 s") == 2
        assert "its own words" not in caplog.text


# Another process that holds the lock of a token file, saves a token when told so, and ends.
HOLDER = """
import asyncio, pathlib, sys
import ampproxy

async def hold(path):
    async with ampproxy.alone_with(path):
        print("held", flush=True)
        token = sys.stdin.readline().strip()
        known = ampproxy.read_token(path)
        ampproxy.save_token(path, known | {"access_token": token, "expired": "2099-01-01T00:00:00Z"})

asyncio.run(hold(pathlib.Path(sys.argv[1])))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no flock")
@pytest.mark.parametrize("ends", ["with a token", "killed"])
@in_loop
async def test_of_two_processes_one_refreshes_and_the_late_one_adopts(tmp_path, ends):
    async with world(tmp_path, tokens=()) as w:
        path = token_file(w.auth, expired="2020-01-01T00:00:00Z")
        command = [sys.executable, "-c", HOLDER, str(path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": HERE}
        with subprocess.Popen(command, **pipes) as holder:
            assert await asyncio.to_thread(holder.stdout.readline) == "held\n"
            w.server.tick()
            asked = asyncio.create_task(w.ask("/v1/messages", ASK))
            while not (account := w.server.pool.accounts[path]).refreshing:
                await asyncio.sleep(0)
            await asyncio.sleep(3 * ampproxy.LOCK_LOOK)  # some looks long
            assert account.refreshing and not w.authority.requests, "it waits"
            if ends == "killed":
                holder.kill()
            else:
                holder.stdin.write("sk-ant-oat-theirs\n")
                holder.stdin.flush()
            assert (await asked).status == 200
        theirs = ends == "with a token"
        assert len(w.authority.requests) == (0 if theirs else 1)
        assert bearer_of(w.claude.last) == ("theirs" if theirs else "new")
        assert stat.S_IMODE((path.parent / f".{path.name}.lock").stat().st_mode) == 0o600
        assert len(w.server.pool.scan()) == 1, "the lock is no token file"


@pytest.mark.parametrize("kind", KINDS)
@in_loop
async def test_a_refused_key_is_sent_once(tmp_path, kind):
    async with key_world(tmp_path, kind, config=NO_WAIT) as w:
        w.keyed.usual = answer_json({"error": {"message": "no"}}, 401)
        assert (await w.ask(*asked_as(kind))).status == 401
        assert len(w.keyed.requests) == 1


@pytest.mark.parametrize(("given", "asked"), [
    ({"token-url": "{}/gone", "other-token-url": "{}/token"}, ["/gone", "/token"]),
    ({"token-url": "{}/gone"}, ["/gone"]),  # an address of one's own has no other
    ({"token-url": "{}/down", "other-token-url": "{}/token"}, ["/down"]),
])  # fmt: skip
@in_loop
async def test_the_other_token_address_is_asked_on_a_404(tmp_path, given, asked):
    async def play(request):
        status = {"/gone": 404, "/down": 503}.get(request.path, 200)
        return web.json_response(NEW_TOKEN if status == 200 else {}, status=status)

    async with world(tmp_path, tokens=(), **NO_WAIT) as w:
        token_file(w.auth, expired="2020-01-01T00:00:00Z")
        w.reload(claude={k: v.format(w.authority.url) for k, v in given.items()}, **NO_WAIT)
        w.authority.usual = play
        w.server.tick()
        status = (await w.ask("/v1/messages", ASK)).status
        assert ([r.path for r in w.authority.requests], status == 200) == (
            asked,
            asked[-1] == "/token",
        )


@in_loop
async def test_tables_by_model_names_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(ampproxy, "RESTING_MODELS", 50)
    async with world(tmp_path, ampcode={"fallback": "never"}) as w:
        w.claude.usual = said(404, "model: x", "not_found_error")
        for number in range(200):
            await w.ask("/v1/messages", {**ASK, "model": f"claude-{number}"})
        account = w.server.pool.accounts[w.tokens[0]]
        assert len(account.rests) == 50
        assert "claude-199" in account.rests
    (tmp_path / "other").mkdir()
    async with world(tmp_path / "other", tokens=()) as w:
        for number in range(ampproxy.COUNTED_MODELS + 50):
            await w.ask(PATH, {**ASK, "model": f"claude-{number}"})
        report = (await w.ask_json("/status", method="GET"))[1]
        assert len(report["paid"]) == ampproxy.COUNTED_MODELS
        assert report["routes"]["amp"] == ampproxy.COUNTED_MODELS + 50


def anthropic_counts(*usages):
    first, last = events()[0], usages[-1]
    start = {**message(), "content": [], "usage": usages[0]}
    return [event("message_start", message=start), *events()[1:4],
            event("message_delta", delta={"stop_reason": "end_turn"}, usage=last), first[:0], events()[5]]  # fmt: skip


def gemini_counts(*usages):
    return [
        data({**content(end="STOP" if usage is usages[-1] else None), "usageMetadata": usage})
        for usage in usages
    ]


def chat_counts(*usages):
    *chunks, last, done = completion_chunks()
    return [*chunks, *(data({**data_of(last)[0], "usage": usage}) for usage in usages), done]


COUNTS = {  # what a stream says of its tokens -> input and output in the status
    "claude, with its cache": ("claude-api-key", anthropic_counts(
        {"input_tokens": 5, "cache_read_input_tokens": 100, "cache_creation_input_tokens": 20, "output_tokens": 1},
        {"output_tokens": 30}), 125, 30),
    "claude, said twice": ("claude-api-key", anthropic_counts(
        {"input_tokens": 5, "cache_read_input_tokens": 100, "output_tokens": 1},
        {"input_tokens": 5, "cache_read_input_tokens": 100, "output_tokens": 30}), 105, 30),
    "claude, nothing": ("claude-api-key", anthropic_counts({"input_tokens": None}, {"output_tokens": None}), 0, 0),
    "chatgpt": ("codex-api-key", codex_events(output=[TEXT_ITEM], usage={
        "input_tokens": 50, "input_tokens_details": {"cached_tokens": 40},
        "output_tokens": 30, "output_tokens_details": {"reasoning_tokens": 20}}), 50, 30),
    "chat": ("openai-compatibility", chat_counts({
        "prompt_tokens": 50, "prompt_tokens_details": {"cached_tokens": 40},
        "completion_tokens": 30, "completion_tokens_details": {"reasoning_tokens": 20}}), 50, 30),
    "chat, growing": ("openai-compatibility", chat_counts(None, {"prompt_tokens": 50, "completion_tokens": 3},
        {"prompt_tokens": 50, "completion_tokens": 30}), 50, 30),
    "gemini, thoughts": ("gemini-api-key", gemini_counts(
        {"promptTokenCount": 7, "candidatesTokenCount": 100, "thoughtsTokenCount": 800}), 7, 900),
    "gemini, said twice": ("gemini-api-key", gemini_counts(
        {"promptTokenCount": 7, "thoughtsTokenCount": 800},
        {"promptTokenCount": 7, "candidatesTokenCount": 100, "thoughtsTokenCount": 800}), 7, 900),
    "gemini, tools": ("gemini-api-key", gemini_counts(
        {"promptTokenCount": 7, "toolUsePromptTokenCount": 40, "candidatesTokenCount": 1}), 47, 1),
    "gemini, cached": ("gemini-api-key", gemini_counts(  # which promptTokenCount has in it
        {"promptTokenCount": 70, "cachedContentTokenCount": 40, "candidatesTokenCount": 1}), 70, 1),
}  # fmt: skip


@pytest.mark.parametrize("size", [20, 100_000])
@pytest.mark.parametrize("name", COUNTS)
@in_loop
async def test_tokens_are_counted_alike_for_all(tmp_path, name, size):
    kind, stream, read, written = COUNTS[name]
    async with key_world(tmp_path, kind) as w:
        whole = b"".join(stream)
        w.keyed.usual = (200, SSE, [whole[i : i + size] for i in range(0, len(whole), size)])
        assert (await w.ask(*asked_as(kind, stream=True))).status == 200
        row = w.server.ledger.requests[0]
        assert (row["input_tokens"], row["output_tokens"]) == (read, written)


@pytest.mark.parametrize("paid", [False, True])
@pytest.mark.parametrize("size", [5000, 40_000])
@in_loop
async def test_input_is_counted_when_the_first_event_is_large(tmp_path, size, paid):
    start = {
        **message(),
        "content": [],
        "note": "x" * size,
        "usage": {"input_tokens": 11, "output_tokens": 1},
    }
    large = [event("message_start", message=start), *events()[1:]]
    async with world(tmp_path, tokens=() if paid else ("fred@example.com",)) as w:
        gate = asyncio.Event()
        (w.amp if paid else w.claude).usual = (200, SSE, [large[0], gate, b"".join(large[1:])])
        async with w.http.post(w.url + PATH, json=STREAM) as response:
            assert await response.content.readexactly(len(large[0])) == large[0]
            gate.set()
            assert await response.content.read() == b"".join(large[1:])
        row = w.server.ledger.requests[0]
        assert (row["input_tokens"], row["output_tokens"]) == (11, 7)


BEHIND_THE_END = {
    "claude-api-key": events, "codex-api-key": lambda: codex_events(output=[TEXT_ITEM]),
    "openai-compatibility": completion_chunks,
}  # fmt: skip


@pytest.mark.parametrize("piece", ["with it", "alone"])
@pytest.mark.parametrize("kind", BEHIND_THE_END)
@in_loop
async def test_nothing_behind_the_last_event_is_forwarded(tmp_path, kind, piece):
    stream, late = BEHIND_THE_END[kind](), data({"late": 1})
    async with key_world(tmp_path, kind) as w:
        parts = [b"".join([*stream, late])] if piece == "with it" else [*stream, late]
        w.keyed.usual = (200, SSE, parts)
        assert (await w.ask(*asked_as(kind, stream=True))).bytes == b"".join(stream)


@in_loop
async def test_a_folded_stream_is_over_with_its_last_event(tmp_path):
    async with codex_world(tmp_path) as w:
        w.codex.usual = (200, SSE, [*codex_events(), asyncio.Event()])
        assert (await w.ask(CODEX, {**QUESTION, "stream": False})).status == 200
        assert not [a for a in w.server.pool.accounts.values() if a.in_flight]


BREAKS = {  # where a stream breaks: the beginning of its next event
    "in a character": data({"x": "h\u00e9"}).replace(b"\\u00e9", b"\xc3"), "in a line": b'data: {"x": "a',
    "before its end": b'data: {"x": "a"}', "in its end": b'data: {"x": "a"}\n', "between": b"",
}  # fmt: skip
LIVE_PARTS = {  # the events that come before, which a client knows
    "claude-api-key": (events, 3), "codex-api-key": (codex_events, 3),
    "openai-compatibility": (completion_chunks, 2), "gemini-api-key": (content_chunks, 1),
}  # fmt: skip


@pytest.mark.parametrize("where", BREAKS)
@pytest.mark.parametrize("kind", LIVE_PARTS)
@in_loop
async def test_a_stream_that_breaks_in_an_event_ends_in_the_error_alone(tmp_path, kind, where):
    make, count = LIVE_PARTS[kind]
    whole = make()[:count]
    async with key_world(tmp_path, kind, config=NO_WAIT) as w:
        half = BREAKS[where].partition(b"\xc3")
        w.keyed.usual = (200, SSE, [*whole, half[0] + half[1], "cut"])
        path, body = asked_as(kind, stream=True)
        got = b""
        async with w.http.post(w.url + path, json=body) as response:
            with suppress(aiohttp.ClientError):  # Gemini's connection is broken, too
                async for piece in response.content.iter_any():
                    got += piece
        assert got.startswith(b"".join(whole))
        rest = got.removeprefix(b"".join(whole))
        frames = data_of(rest)
        assert len(frames) == rest.count(b"\n\n") == 1, rest
        error = frames[0].get("error") or frames[0]["response"]["error"]
        assert "broke off" in error["message"]


@pytest.mark.parametrize("where", BREAKS)
@in_loop
async def test_the_sdks_raise_for_a_stream_that_breaks(tmp_path, where):
    anthropic, openai = pytest.importorskip("anthropic"), pytest.importorskip("openai")
    parts = [BREAKS[where].partition(b"\xc3")[0], "cut"]
    asked = {"messages": [{"role": "user", "content": "hi"}], "stream": True}

    async def read(stream):
        return [event async for event in await stream]

    async with key_world(tmp_path, "claude-api-key", config=NO_WAIT) as w:
        w.keyed.usual = (200, SSE, [*events()[:3], *parts])
        client = anthropic.AsyncAnthropic(base_url=w.url, api_key="any", max_retries=0)
        with pytest.raises(anthropic.APIStatusError, match="broke off"):
            await read(client.messages.create(model=ASK["model"], max_tokens=9, **asked))
        await client.close()
    for name in ("chat", "responses"):
        (tmp_path / name).mkdir()
    async with key_world(tmp_path / "chat", "openai-compatibility", config=NO_WAIT) as w:
        w.keyed.usual = (200, SSE, [*completion_chunks()[:2], *parts])
        client = openai.AsyncOpenAI(api_key="k", base_url=w.url + "/v1", max_retries=0)
        with pytest.raises(openai.APIError, match="broke off"):
            await read(client.chat.completions.create(model="gpt-5.4", **asked))
        await client.close()
    async with key_world(tmp_path / "responses", "codex-api-key", config=NO_WAIT) as w:
        w.keyed.usual = (200, SSE, [*codex_events()[:3], *parts])
        client = openai.AsyncOpenAI(api_key="k", base_url=w.url + "/v1", max_retries=0)
        seen = await read(client.responses.create(model="gpt-5.4", input="hi", stream=True))
        assert (seen[-1].type, "broke off" in seen[-1].response.error.message) == (
            "response.failed",
            True,
        )
        await client.close()


def thinks_as(**thinking):
    return {"thinking": thinking}


FORCED, CLEAR = {"tool_choice": {"type": "any"}}, {"type": "clear_thinking_20251015", "keep": "all"}
CLEAR_TOOLS = {"type": "clear_tool_uses_20250919"}
TURNED_OFF = {"thinking": {"type": "disabled"}}
CLAUDE_RULES = [  # model, fields of a body -> those fields as Claude gets them
    # thinking yields to a forced tool, and what goes with it
    ("claude-haiku-4-5", {**thinks_as(type="enabled", budget_tokens=2000), **FORCED}, FORCED),
    ("claude-haiku-4-5", {**thinks_as(type="enabled", budget_tokens=2000), "tool_choice": {"type": "tool", "name": "f"}},
     {"tool_choice": {"type": "tool", "name": "f"}}),
    ("claude-opus-4-8", {**thinks_as(type="adaptive"), **FORCED, "output_config": {"effort": "high", "format": {}}},
     {**FORCED, "output_config": {"format": {}}}),
    ("claude-opus-5-5", {**thinks_as(type="adaptive"), **FORCED}, {**FORCED, **TURNED_OFF}),
    ("claude-opus-5-5", FORCED, {**FORCED, **TURNED_OFF}),  # it would think by itself
    ("claude-opus-4-8", FORCED, FORCED), ("claude-haiku-4-5", {**thinks_as(type="auto"), **FORCED}, FORCED),
    ("claude-opus-4-8", {**thinks_as(type="adaptive"), "tool_choice": {"type": "auto"}},
     {**thinks_as(type="adaptive"), "tool_choice": {"type": "auto"}}),
    ("claude-opus-4-8", {**FORCED, **thinks_as(type="adaptive"), "context_management": {"edits": [CLEAR]}}, FORCED),
    ("claude-opus-4-8", {**FORCED, **thinks_as(type="adaptive"), "context_management": {"edits": [CLEAR, CLEAR_TOOLS]}},
     {**FORCED, "context_management": {"edits": [CLEAR_TOOLS]}}),
    ("claude-opus-4-8", {**TURNED_OFF, "context_management": {"edits": [CLEAR]}}, TURNED_OFF),
    ("claude-opus-4-8", {"context_management": {"edits": [CLEAR]}}, {}),
    ("claude-opus-5", {"context_management": {"edits": [CLEAR]}}, {"context_management": {"edits": [CLEAR]}}),
    ("claude-opus-4-8", {**thinks_as(type="adaptive"), "context_management": {"edits": [CLEAR]}},
     {**thinks_as(type="adaptive"), "context_management": {"edits": [CLEAR]}}),
    # Amp's auto
    ("claude-opus-4-8", thinks_as(type="auto"), thinks_as(type="adaptive")),
    ("claude-haiku-4-5", {**thinks_as(type="auto"), "max_tokens": 32000},
     {**thinks_as(type="enabled", budget_tokens=8192), "max_tokens": 32000}),
    # sampling
    ("claude-haiku-4-5", {**thinks_as(type="enabled", budget_tokens=2000), "temperature": 0.5, "top_p": 0.9, "top_k": 3},
     thinks_as(type="enabled", budget_tokens=2000)),
    ("claude-haiku-4-5", {"temperature": 0.5, "top_k": 3}, {"temperature": 0.5, "top_k": 3}),
    ("claude-opus-4-6", {**TURNED_OFF, "temperature": 0.5}, {**TURNED_OFF, "temperature": 0.5}),
    ("claude-opus-4-6", {"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5}),
    ("claude-opus-4-7", {"temperature": 0.5, "top_p": 0.9, "top_k": 3}, {}),
    ("claude-opus-5-5", {**TURNED_OFF, "temperature": 0.5}, TURNED_OFF), ("claude-fable-5-2", {"temperature": 1}, {}),
    ("claude-new-9", {"top_k": 3}, {}), ("claude-haiku-4-5", {**thinks_as(type="enabled", budget_tokens=2000), **FORCED,
     "temperature": 0.5}, {**FORCED, "temperature": 0.5}),
    # budgets
    ("claude-haiku-4-5", {**thinks_as(type="enabled", budget_tokens=31999), "max_tokens": 8000},
     {**thinks_as(type="enabled", budget_tokens=6000), "max_tokens": 8000}),
    ("claude-haiku-4-5", {**thinks_as(type="enabled", budget_tokens=31999), "max_tokens": 31999},
     {**thinks_as(type="enabled", budget_tokens=23999), "max_tokens": 31999}),
    ("claude-haiku-4-5", {**thinks_as(type="enabled", budget_tokens=31999), "max_tokens": 32000},
     {**thinks_as(type="enabled", budget_tokens=31999), "max_tokens": 32000}),
    ("claude-haiku-4-5", {**thinks_as(type="enabled", budget_tokens=31999), "max_tokens": 1100},
     {**thinks_as(type="enabled", budget_tokens=1024), "max_tokens": 1100}),
    ("claude-haiku-4-5", {**thinks_as(type="enabled", budget_tokens=5000), "max_tokens": 1024}, {"max_tokens": 1024}),
    ("claude-haiku-4-5", {**thinks_as(type="enabled", budget_tokens=5), "max_tokens": 9000},
     {**thinks_as(type="enabled", budget_tokens=1024), "max_tokens": 9000}),
    ("claude-haiku-4-5", thinks_as(type="enabled", budget_tokens=True), thinks_as(type="enabled", budget_tokens=True)),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["claude", "claude-api-key"])
@pytest.mark.parametrize(("model", "given", "sent"), CLAUDE_RULES, ids=range(len(CLAUDE_RULES)))
def test_what_claude_refuses_is_put_right(kind, model, given, sent):
    row = {**ampproxy.LOGINS, **ampproxy.API_KEYS}[kind]
    row = dataclasses.replace(row, identity=False)
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **given}
    before = json.loads(json.dumps(body))
    got = ampproxy.RULES[kind](body, ampproxy.Headers(), row)
    assert body == before, "nothing is changed in place"
    assert got == {"model": model, "messages": body["messages"], **sent}


def test_a_model_of_somebody_elses_is_theirs_to_judge():
    row = ampproxy.API_KEYS["claude-api-key"]
    body = {"model": "kimi-k3", **thinks_as(type="enabled", budget_tokens=5), "temperature": 0.5, **FORCED,
            "messages": [{"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "x"}]}]}  # fmt: skip
    assert ampproxy.RULES["claude-api-key"](body, ampproxy.Headers(), row) is body


def marked(text, ttl="", **more):
    mark = {"type": "ephemeral", **({"ttl": ttl} if ttl else {})}
    return {"type": "text", "text": text, "cache_control": mark, **more}


def marks_of(body):
    """{text or name: its mark's ttl} of all marks, wherever they are."""
    found = {}

    def look(value):
        for item in (
            value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
        ):
            look(item)
        if isinstance(value, dict) and isinstance(value.get("cache_control"), dict):
            found[value.get("text") or value.get("name") or value.get("tool_use_id")] = value[
                "cache_control"
            ].get("ttl", "5m")

    look({name: value for name, value in body.items() if name != "cache_control"})
    return found


def users(*blocks):
    return [{"role": "user", "content": [block]} for block in blocks]


def tool(name, ttl=""):
    return {
        "name": name,
        "input_schema": {"type": "object"},
        "cache_control": marked("", ttl)["cache_control"],
    }


TOOL_ANSWER = {
    "type": "tool_result",
    "tool_use_id": "r",
    "content": [marked("in")],
    "cache_control": EPHEMERAL,
}
MARKS = [  # a body -> the marks that Claude gets
    ({"messages": users(*map(marked, "abcd"))}, "a b c d"), ({"messages": users(*map(marked, "abcdef"))}, "c d e f"),
    ({"messages": users(*map(marked, "abc")), "system": [marked("s")], "tools": [tool("t")]}, "b c s t"),
    ({"messages": users(*map(marked, "ab")), "system": [*map(marked, "stuv")]}, "s t u v"),
    ({"system": [*map(marked, "stuvw")], "messages": []}, "t u v w"),
    ({"system": [*map(marked, "stu")], "tools": [*map(tool, "wxyz")], "messages": []}, "w x y z"),
    ({"tools": [*map(tool, "vwxyz")], "messages": []}, "w x y z"),
    ({"messages": users(TOOL_ANSWER, *map(marked, "abcd"))}, "a b c d"),
    ({"messages": users(marked("a"), TOOL_ANSWER, marked("b"))}, "a in r b"),
    ({"cache_control": EPHEMERAL, "messages": users(*map(marked, "abcd"))}, "b c d"),
    ({"messages": users(marked("a", "1h"), marked("b"), marked("c", "1h"))}, "a:1h b c"),
    ({"tools": [tool("t")], "system": [marked("s", "1h")], "messages": users(marked("a", "1h"))}, "t s a"),
    ({"tools": [tool("t", "1h")], "system": [marked("s", "1h")], "messages": users(marked("a"))}, "t:1h s:1h a"),
    ({"messages": users(marked("a"), *(marked(name, "1h") for name in "bcde"))}, "b:1h c:1h d:1h e:1h"),
    ({"messages": users({"type": "text", "text": "x", "cache_control": None})}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("body", "left"), MARKS, ids=range(len(MARKS)))
def test_four_cache_marks_and_no_long_one_behind_a_short_one(body, left):
    wanted = dict(mark.partition(":")[::2] for mark in left.split())
    before = json.dumps(body)
    got = prepared({"model": "claude-opus-4-6", **body}, identity=False)[0]
    assert marks_of(got) == {name: ttl or "5m" for name, ttl in wanted.items()}
    assert json.dumps(body) == before
    bare = re.compile(r', "cache_control": \{[^}]*\}')
    assert bare.sub("", json.dumps(got["messages"])) == bare.sub("", json.dumps(body["messages"]))


@pytest.mark.parametrize("blank", ["", " ", "\n\t ", "\u00a0"])
def test_no_text_of_blanks_alone(blank):
    text = {"type": "text", "text": blank}
    said, fine = {"role": "user", "content": "hi"}, {"type": "text", "text": " x "}
    body = {"model": "claude-opus-4-6", "system": [text, fine], "messages": [
        {"role": "user", "content": blank}, {"role": "user", "content": [text]}, said, {"role": "user", "content": [text, fine]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [text, fine]}]}]}  # fmt: skip
    got = prepared(body, identity=False)[0]
    assert got["system"] == [fine]
    assert got["messages"] == [said, {"role": "user", "content": [fine]}, {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "a", "content": [fine]}]}]  # fmt: skip


@pytest.mark.parametrize(("model", "most"), [
    ("claude-haiku-4-5", 64000), ("claude-sonnet-4-5-20250929", 64000), ("claude-sonnet-4-6", 64000),
    ("claude-opus-4-5-20251101", 64000), ("claude-opus-4-1-20250805", 32000), ("claude-opus-4-20250514", 32000),
    ("claude-sonnet-4-20250514", 64000), ("claude-opus-4-8", 128000), ("claude-opus-5-5", 128000),
    ("claude-fable-5", 128000), ("claude-3-5-haiku-20241022", 8192), ("claude-3-haiku-20240307", 4096), ("kimi-k3", 32000),
])  # fmt: skip
@in_loop
async def test_max_tokens_is_the_models_where_the_client_names_none(tmp_path, model, most):
    async with key_world(tmp_path, "claude-api-key", models=["*"]) as w:
        await w.ask("/v1/messages", {"model": model, "messages": ASK["messages"]})
        assert w.keyed.body()["max_tokens"] == most
        await w.ask("/v1/messages", {**ASK, "model": model})
        assert w.keyed.body()["max_tokens"] == 100


# -- Thinking, effort and sampling, as the model that answers takes them --

ASKED = [  # dialect, fields of a body -> the effort that it asks for
    ("anthropic", {}, ""), ("anthropic", TURNED_OFF, "none"), ("anthropic", thinks_as(type="enabled", budget_tokens=4000), "4000"),
    ("anthropic", thinks_as(type="adaptive"), "auto"), ("anthropic", thinks_as(type="auto"), "auto"),
    ("anthropic", {**thinks_as(type="adaptive"), "output_config": {"effort": "max"}}, "max"),
    ("anthropic", {"output_config": {"effort": "low"}}, "low"), ("anthropic", {**TURNED_OFF, "output_config": {"effort": "low"}}, "none"),
    ("anthropic", {"thinking": "very"}, ""), ("anthropic", {"output_config": {"effort": "odd"}}, ""),
    ("anthropic", thinks_as(type="enabled"), ""),
    ("chat", {}, ""), ("chat", {"reasoning_effort": "high"}, "high"), ("chat", {"reasoning_effort": "none"}, "none"),
    ("chat", {"reasoning_effort": None}, ""), ("chat", {"reasoning": {"effort": "xhigh"}}, "xhigh"),
    ("chat", {"reasoning": {"max_tokens": 2000}}, "2000"), ("chat", {"reasoning_effort": 5.5}, ""),
    ("responses", {}, ""), ("responses", {"reasoning": None}, ""), ("responses", {"reasoning": {"effort": "ultra"}}, "ultra"),
    ("responses", {"reasoning": {"summary": "auto"}}, ""), ("responses", {"reasoning": {"effort": "None"}}, "none"),
    ("gemini", {}, ""), ("gemini", {"generationConfig": {"thinkingConfig": {"thinkingBudget": 0}}}, "none"),
    ("gemini", {"generationConfig": {"thinkingConfig": {"thinkingBudget": -1}}}, "auto"),
    ("gemini", {"generationConfig": {"thinkingConfig": {"thinkingBudget": 512}}}, "512"),
    ("gemini", {"generationConfig": {"thinkingConfig": {"thinkingLevel": "HIGH"}}}, "high"),
    ("gemini", {"generationConfig": {"thinkingConfig": {"includeThoughts": True}}}, ""), ("gemini", {"generationConfig": []}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "body", "effort"), ASKED, ids=range(len(ASKED)))
def test_the_effort_that_a_body_asks_for(dialect, body, effort):
    assert ampproxy.effort_of(body, dialect) == effort


ANSWERING = {  # who answers -> the dialect, and what it would refuse
    "claude-opus-4-8": "anthropic", "claude-opus-4-6": "anthropic", "claude-haiku-4-5": "anthropic",
    "claude-opus-5-5": "anthropic", "claude-3-5-haiku-20241022": "anthropic", "gpt-5.5": "chat", "gpt-4o": "chat",
    "gpt-6-astra": "responses", "gemini-2.5-pro": "gemini", "gemini-3-pro": "gemini", "gemma-3-27b": "gemini",
}  # fmt: skip


@pytest.mark.parametrize(
    "effort",
    [
        "",
        "auto",
        "none",
        "minimal",
        "low",
        "medium",
        "high",
        "xhigh",
        "max",
        "ultra",
        "9",
        "4000",
        "99999999",
    ],
)
@pytest.mark.parametrize("model", ANSWERING)
def test_an_effort_is_worded_for_who_answers(model, effort):
    dialect = ANSWERING[model]
    for _, asked, _ in [row for row in ASKED if row[0] == dialect]:
        before = json.dumps(asked)
        body = ampproxy.with_effort(asked, dialect, ampproxy.THINKING, effort, model)
        assert json.dumps(asked) == before
        said, takes = (
            ampproxy.effort_of(body, dialect),
            ampproxy.thinking_of(ampproxy.THINKING, model),
        )
        if not effort:
            assert body is asked
        elif not takes.levels and not takes.limits:
            assert said == ""
        elif takes.limits and said.isdigit():
            assert takes.limits[0] <= int(said) <= takes.limits[1]
        else:
            off = {"none"} if takes.by_itself or "none" in takes.levels or takes.limits else {""}
            auto = {"auto"} if dialect == "anthropic" or takes.limits else {""}
            lowest = {*off, takes.levels[0] if takes.levels else ""}
            assert said in {"none": lowest, "auto": auto}.get(effort, takes.levels)


def claude_refuses(body):
    """What a real Claude would say 400 to; an independent list of its rules."""
    model, thinking = body["model"], body.get("thinking", {})
    kind, effort = thinking.get("type"), body.get("output_config", {}).get("effort")
    only_budgets = "4-5" in model or "opus-4-1" in model
    only_levels = not only_budgets and "4-6" not in model
    by_itself = re.search("-5(-5)?$", model) and "4-5" not in model
    thinks = kind in ("enabled", "adaptive") or (by_itself and kind != "disabled")
    most = 32000 if "opus-4-1" in model else 64000 if only_budgets or "sonnet" in model else 128000
    rules = {
        "a budget": only_levels and kind == "enabled", "adaptive": only_budgets and kind == "adaptive",
        "an effort": only_budgets and effort, "a kind": kind not in (None, "enabled", "adaptive", "disabled"),
        "too small": kind == "enabled" and not 1024 <= thinking["budget_tokens"] < body["max_tokens"],
        "too much": body["max_tokens"] > most,
        "a forced tool": thinks and body.get("tool_choice", {}).get("type") in ("any", "tool"),
        "sampling": (thinks or only_levels) and body.keys() & {"temperature", "top_p", "top_k"},
        "both": {"temperature", "top_p"} <= body.keys(),
        "clearing": not thinks and "clear_thinking" in json.dumps(body.get("context_management")),
    }  # fmt: skip
    return [name for name, broken in rules.items() if broken]


THOUGHTS = [{}, TURNED_OFF, thinks_as(type="adaptive"), thinks_as(type="auto"), thinks_as(type="enabled", budget_tokens=31999),
            {**thinks_as(type="adaptive"), "output_config": {"effort": "xhigh"}}]  # fmt: skip
SAMPLED = [{}, {"temperature": 0.3}, {"top_k": 4, "top_p": 0.5, "temperature": 1}]
REST = [
    {"max_tokens": 32000},
    {"max_tokens": 128000, "context_management": {"edits": [CLEAR]}},
    {"max_tokens": 2000, **FORCED},
]
RAW_TARGETS = ["claude-opus-4-8", "claude-opus-4-6", "claude-sonnet-4-6", "claude-haiku-4-5-20251001",
           "claude-opus-4-1-20250805", "claude-opus-5-5", "claude-haiku-5-5", "claude-fable-5"]  # fmt: skip


@pytest.mark.parametrize("suffix", ["", "(none)", "(high)", "(8192)", "(auto)"])
@pytest.mark.parametrize("target", RAW_TARGETS)
@in_loop
async def test_a_mapped_call_is_never_refused_for_another_generations_words(
    tmp_path, target, suffix
):
    """README's own example among them: claude-opus-4-5-20251101 to claude-opus-4-8."""
    rule = {"from": "claude-opus-4-5-20251101", "to": target + suffix}
    asked = {**ASK, "model": rule["from"]}
    async with key_world(tmp_path, "claude-api-key", excluded_models=[]) as w:
        entry = key_entry("claude-api-key", w.keyed.url, "k", **{"excluded-models": [rule["from"]]})
        w.reload(
            **{"claude-api-key": entry}, ampcode={"model-mappings": [rule], "fallback": "never"}
        )
        w.server.tick()
        for parts in itertools.product(THOUGHTS, SAMPLED, REST):
            body = functools.reduce(dict.__or__, parts, asked)
            response = await w.ask("/v1/messages", body)
            assert (response.status, response.headers["x-ampproxy-route"]) == (200, "mapped")
            got = w.keyed.body()
            assert got["model"] == target
            assert not claude_refuses(got), (body, got)


@pytest.mark.parametrize("model", RAW_TARGETS)
@in_loop
async def test_a_call_of_any_client_keeps_claudes_rules(tmp_path, model):
    budgets = "4-5" in model or "4-1" in model
    own = {"adaptive", "auto"} if not budgets else {"enabled", "auto"}
    async with world(tmp_path) as w:
        for parts in itertools.product(
            THOUGHTS,
            SAMPLED,
            [
                {"max_tokens": 32000},
                REST[2],
                {"max_tokens": 1, "context_management": {"edits": [CLEAR]}},
            ],
        ):
            body = functools.reduce(dict.__or__, parts, {**ASK, "model": model})
            kind = body.get("thinking", TURNED_OFF["thinking"])["type"]
            if kind in own or (kind == "disabled" and "output_config" not in body):
                if budgets and "output_config" in body:
                    continue
                assert (await w.ask("/v1/messages", body)).status == 200
                assert not claude_refuses(w.claude.body()), (body, w.claude.body())


@pytest.mark.parametrize(("kind", "asked", "given", "wanted"), [
    ("openai-compatibility", "gpt-5.5", {"temperature": 0.5, "top_p": 1, "max_tokens": 50, "reasoning_effort": "minimal"},
     {"max_completion_tokens": 50, "reasoning_effort": "minimal"}),
    ("openai-compatibility", "gpt-4o", {"temperature": 0.5, "max_tokens": 50, "reasoning_effort": "high"},
     {"temperature": 0.5, "max_tokens": 50}),
    ("codex-api-key", "gpt-6-astra", {"temperature": 0.5, "reasoning": {"effort": "max", "summary": "auto"}},
     {"reasoning": {"effort": "max", "summary": "auto"}}),
    ("gemini-api-key", "gemini-2.5-pro", {"generationConfig": {"thinkingConfig": {"thinkingLevel": "LOW"}}},
     {"generationConfig": {"thinkingConfig": {"thinkingBudget": 1024, "includeThoughts": True}}}),
    ("gemini-api-key", "gemini-3-pro", {"generationConfig": {"topK": 3, "thinkingConfig": {"thinkingBudget": 2000}}},
     {"generationConfig": {"topK": 3, "thinkingConfig": {"thinkingLevel": "high", "includeThoughts": True}}}),
])  # fmt: skip
@in_loop
async def test_mapped_calls_of_the_other_dialects(tmp_path, kind, asked, given, wanted):
    rules = [{"from": "other", "to": asked}]
    config = {"ampcode": {"model-mappings": rules, "fallback": "never"}}
    async with key_world(tmp_path, kind, config=config) as w:
        path, body = asked_as(kind, "other")
        assert (await w.ask(path, {**body, **given})).status == 200
        got = {k: v for k, v in w.keyed.body().items() if k not in body or k in given}
        assert got == wanted


@pytest.mark.parametrize(("asked", "served", "effort"), [
    ("gpt-5-high", "real-high", None), ("GPT-5-High", "real-high", None), ("gpt-5-high(low)", "real-high", "low"),
    ("gpt-5-low", "gpt-5", "low"), ("Quick(HIGH)", "real-quick", None), ("quick(high)(low)", "real-quick", "low"),
    ("quick", "gpt-fast", None), ("QUICK", "gpt-fast", None), ("gpt-5.5-xhigh", "gpt-5.5-xhigh", None),
])  # fmt: skip
@in_loop
async def test_an_alias_is_a_name_as_it_is_written(tmp_path, asked, served, effort):
    models = [{"name": "real-high", "alias": "gpt-5-high"}, {"name": "real-quick", "alias": "quick(high)"},
              {"name": "gpt-fast", "alias": "Quick"}, "gpt-5.5-xhigh", "gpt-*"]  # fmt: skip
    async with key_world(tmp_path, "openai-compatibility", models=models) as w:
        status, body, headers = await w.ask_json("/v1/chat/completions", {**CHAT, "model": asked})
        assert (status, body["model"], headers["x-ampproxy-model"]) == (200, asked, served)
        assert (w.keyed.body()["model"], w.keyed.body().get("reasoning_effort")) == (served, effort)


CUT_BODIES = {
    "by length": post("{}", 500, json.dumps(ASK).encode()), "at its start": post("{}", 500, b""),
    "by chunks": b"POST {} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"mod\r\n",
    "in a chunk": b"POST {} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n50\r\n{\"mod",
}  # fmt: skip


@pytest.mark.parametrize(
    "path",
    ["/v1/messages", "/v1/chat/completions", "/v1beta/models/m:generateContent", "/api/threads"],
)
@pytest.mark.parametrize("name", CUT_BODIES)
@in_loop
async def test_a_body_that_is_cut_short_gets_its_400(tmp_path, name, path):
    async with world(tmp_path) as w:
        got = await raw_exchange(
            w.port, CUT_BODIES[name].replace(b"{}", path.encode(), 1), half_close=True
        )
        assert got.startswith(b"HTTP/1.1 400 "), got
        error = json.loads(got.partition(b"\r\n\r\n")[2])["error"]
        assert "it was cut short" in (error if isinstance(error, str) else error["message"])
        assert not w.claude.requests
        assert not [request for request in w.amp.requests if request.content.is_eof()], (
            "nothing whole"
        )
        assert (await w.ask("/v1/messages", ASK)).status == 200


@in_loop
async def test_a_client_that_half_closes_behind_its_body_is_gone(tmp_path):
    """Nobody can tell it from one that has left, and its upstream costs money."""
    async with world(tmp_path) as w:
        body = json.dumps(STREAM).encode()
        w.claude.usual = (200, SSE, [events()[0], asyncio.Event()])
        reader, writer = await connect_and_send(w.port, post("/v1/messages", len(body), body))
        await reader.readuntil(b"message_start")
        writer.write_eof()
        await w.claude.gone.wait()
        writer.close()


@in_loop
async def test_a_slow_upload_has_ten_minutes(tmp_path, monkeypatch):
    assert ampproxy.UPLOAD_WAIT == 600
    monkeypatch.setattr(ampproxy, "UPLOAD_WAIT", 0.3)
    async with world(tmp_path) as w:
        body = json.dumps(ASK).encode()
        reader, writer = await connect_and_send(w.port, post("/v1/messages", len(body), body[:9]))
        await asyncio.sleep(0.1)
        writer.write(body[9:])
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
        reader, writer = await connect_and_send(w.port, post("/v1/messages", len(body), body[:9]))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        writer.close()
        assert len(w.claude.requests) == 1


@in_loop
async def test_pings_pongs_codes_and_reasons_travel_from_end_to_end(tmp_path):
    up, ends = asyncio.Queue(), asyncio.Queue()

    async def actor(request):
        socket = web.WebSocketResponse(autoping=False, autoclose=False)
        await socket.prepare(request)
        up.put_nowait(socket)
        while True:
            got = await socket.receive()
            ends.put_nowait((got.type, got.data, got.extra))
            if got.type in (
                aiohttp.WSMsgType.CLOSE,
                aiohttp.WSMsgType.CLOSING,
                aiohttp.WSMsgType.CLOSED,
            ):
                return socket

    kinds = aiohttp.WSMsgType
    async with world(tmp_path) as w:
        w.amp.usual = actor
        options = {"autoping": False, "autoclose": False}
        async with w.http.ws_connect(w.url + "/actors/x", **options) as ws:
            socket = await up.get()
            for send, kind in ((ws.ping, kinds.PING), (ws.pong, kinds.PONG)):
                await send(b"one")
                assert await ends.get() == (kind, b"one", "")
            for send, kind in ((socket.ping, kinds.PING), (socket.pong, kinds.PONG)):
                await send(b"two")
                got = await ws.receive()
                assert (got.type, got.data) == (kind, b"two"), "and nobody answered it on the way"
            await ws.close(code=4005, message="tschüß".encode())
        assert await ends.get() == (kinds.CLOSE, 4005, "tschüß")
        async with w.http.ws_connect(w.url + "/actors/x", **options) as ws:
            socket = await up.get()
            await asyncio.gather(
                socket.close(code=4001, message=b"enough"), expect_close(ws, 4001, "enough")
            )


async def expect_close(ws, code, reason):
    got = await ws.receive()
    assert (got.type, got.data, got.extra) == (aiohttp.WSMsgType.CLOSE, code, reason)
    await ws.close(code=code)


@in_loop
async def test_both_ends_of_a_tunnel_hear_that_the_proxy_stops(tmp_path):
    """At once, also when one of them answers nothing."""
    heard = asyncio.get_running_loop().create_future()

    async def actor(request):
        socket = web.WebSocketResponse(autoclose=False)
        await socket.prepare(request)
        heard.set_result((await socket.receive()).data)
        await asyncio.sleep(3600)

    async with world(tmp_path) as w:
        w.amp.usual, live = actor, w.server.live
        server = ampproxy.Server(live, ampproxy.Net(live), w.clock)
        serving = server.serving()
        port = await serving.__aenter__()
        ws = await w.http.ws_connect(f"http://127.0.0.1:{port}/actors/x", autoclose=False)
        stopping = asyncio.create_task(serving.__aexit__(None, None, None))
        await expect_close(ws, 1001, "")
        assert await heard == 1001
        stopping.cancel()
        await asyncio.gather(stopping, return_exceptions=True)


def deflated(raw):
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(raw) + packer.flush()


PACKERS = {  # name -> its label, and how it is packed
    "gzip": ("gzip", gzip.compress), "x-gzip": ("X-GZip", gzip.compress), "zlib": ("deflate", zlib.compress),
    "bare deflate": ("deflate", deflated), "without a label": ("", gzip.compress),
    "several members": ("gzip", lambda raw: b"".join(gzip.compress(raw[i : i + 40]) for i in range(0, len(raw), 40))),
    "members and zeros": ("gzip", lambda raw: gzip.compress(raw[:9]) + b"\0" * 9 + gzip.compress(raw[9:]) + b"\0" * 512),
    "members without a label": ("", lambda raw: gzip.compress(raw[:50]) + gzip.compress(raw[50:])),
    "a label alone": ("gzip", bytes), "identity": ("identity", bytes),
}  # fmt: skip


def pieces_packed(name, raw, kind, size):
    label, pack = PACKERS[name]
    whole = pack(raw)
    labels = {"Content-Encoding": label} if label else {}
    return {"Content-Type": kind, **labels}, [
        whole[i : i + size] for i in range(0, len(whole), size)
    ]


@pytest.mark.parametrize("size", [1, 30, 100_000])
@pytest.mark.parametrize("name", PACKERS)
@in_loop
async def test_what_a_provider_packs_is_read(tmp_path, name, size):
    plain = {"Accept-Encoding": "identity"}
    async with world(tmp_path, ampcode={"fallback": "never"}) as w:
        whole = json.dumps(message()).encode()
        w.claude.usual = (200, *pieces_packed(name, whole, "application/json", size))
        assert (await w.ask("/v1/messages", ASK, headers=plain)).bytes == whole
        w.claude.usual = (200, *pieces_packed(name, b"".join(events()), "text/event-stream", size))
        response = await w.ask("/v1/messages", STREAM, headers=plain)
        assert response.bytes == b"".join(events())
        assert "Content-Encoding" not in response.headers
        refused = said(400, "its own words")[2][0]
        w.claude.usual = (400, *pieces_packed(name, refused, "application/json", size))
        response = await w.ask("/v1/messages", ASK, headers=plain)
        assert (response.status, response.bytes) == (400, refused)
        assert "Content-Encoding" not in response.headers
        assert len(w.claude.requests) == 3, "nobody is asked, and paid, twice"


@pytest.mark.parametrize(("label", "given", "model", "passes"), [
    ("gzip", "gzip, br", "claude-opus-4-6", True), ("gzip", "GZIP;q=0.5", "claude-opus-4-6", True), ("gzip", "*", "claude-opus-4-6", True),
    ("deflate", "deflate", "claude-opus-4-6", True), ("gzip", "gzip;q=0", "claude-opus-4-6", False), ("gzip", "br", "claude-opus-4-6", False),
    ("gzip", "gzip", "claude-opus-4-6-20260101", False),
])  # fmt: skip
@in_loop
async def test_an_answer_passes_packed_where_nothing_has_to_change(
    tmp_path, label, given, model, passes
):
    async with world(tmp_path) as w:
        whole = json.dumps(message(model)).encode()
        packed = (gzip.compress if label == "gzip" else zlib.compress)(whole)
        w.claude.usual = (
            200,
            {"Content-Type": "application/json", "Content-Encoding": label},
            [packed],
        )
        response = await w.ask("/v1/messages", ASK, headers={"Accept-Encoding": given})
        assert response.headers.get("Content-Encoding") == (label if passes else None)
        assert response.bytes == (packed if passes else json.dumps(message()).encode())
        assert w.server.ledger.requests[0]["output_tokens"] == 7


@in_loop
async def test_a_packed_answer_that_is_cut_is_not_whole(tmp_path):
    async with world(tmp_path, ampcode={"fallback": "never"}, **NO_WAIT) as w:
        packed = gzip.compress(json.dumps(message()).encode())
        for broken in (
            packed[:-9],
            packed[:20] + b"garbage" + packed[20:],
            gzip.compress(b"") + b"garbage",
        ):
            w.claude.script = [(200, {"Content-Encoding": "gzip"}, [broken])]
            assert (await w.ask("/v1/messages", ASK)).status == 502
            w.clock.now += 100
        w.claude.script = [(200, SSE, [gzip.compress(b"".join(events()))[:-30]])]
        assert "broke off" in error_in((await w.ask("/v1/messages", STREAM)).bytes)["message"]


@in_loop
async def test_a_coding_that_nobody_here_knows_is_named(tmp_path):
    async with world(tmp_path, ampcode={"fallback": "never"}, **NO_WAIT) as w:
        w.claude.usual = (429, {"Content-Encoding": "exi"}, [b"\x00\x01"])
        status, body, _ = await w.ask_json("/v1/messages", ASK)
        assert (status, body["error"]["message"]) == (
            429,
            "claude answered 429 in words packed as exi",
        )
        w.clock.now += 3600
        w.claude.usual = (200, {"Content-Encoding": "exi"}, [b"\x00\x01"])
        status, body, _ = await w.ask_json("/v1/messages", ASK)
        assert (status, body["error"]["message"]) == (502, "the upstream packed its answer as exi")


@pytest.mark.parametrize("coding", ["gzip", "exi"])
@in_loop
async def test_what_a_token_endpoint_packs_is_readable_or_named(tmp_path, coding, caplog):
    async with world(tmp_path, tokens=(), **NO_WAIT) as w:
        token_file(w.auth, expired="2020-01-01T00:00:00Z")
        w.server.tick()
        told = json.dumps({"error": "invalid_grant"}).encode()
        w.authority.usual = (
            400,
            {"Content-Encoding": coding},
            [gzip.compress(told) if coding == "gzip" else b"\x00"],
        )
        await w.ask("/v1/messages", ASK)
        assert ("invalid_grant" if coding == "gzip" else "an answer packed as exi") in caplog.text


def test_a_flood_of_tiny_members_is_no_body():
    began = time.process_time()
    assert ampproxy.unpack(gzip.compress(b"") * 400_000) is None
    assert time.process_time() - began < 2
    assert ampproxy.unpack(gzip.compress(b"x") * 2000) == b"x" * 2000


@pytest.mark.parametrize(("kind", "query", "sent"), [
    ("claude-api-key", "?beta=true", "beta=true"), ("claude-api-key", "?beta=true&x=%2f+&y", "beta=true&x=%2f+&y"),
    ("claude-api-key", "?key=sgamp_1&auth_token=2&access_token=3&a=1", "a=1"), ("claude-api-key", "?%6bey=sgamp_1", ""),
    ("claude-api-key", "?", ""), ("codex-api-key", "?api-version=2", "api-version=2"), ("openai-compatibility", "?a=1&&b=2", "a=1&b=2"),
    ("gemini-api-key", "?alt=json&$alt=json&fields=x", "fields=x"),
])  # fmt: skip
@in_loop
async def test_a_clients_query_travels_to_the_provider(tmp_path, kind, query, sent):
    async with key_world(tmp_path, kind) as w:
        path, body = asked_as(kind)
        assert (await w.ask(path + query, body)).status == 200
        assert w.keyed.last.rel_url.raw_query_string == sent
        if kind == "gemini-api-key":
            w.keyed.usual = (200, SSE, content_chunks())
            await w.ask(
                models_path("gemini-2.5-pro", "streamGenerateContent", "?alt=sse&a=1"), body
            )
            assert w.keyed.last.rel_url.raw_query_string == "alt=sse&a=1"


@pytest.mark.parametrize("query", ["", "?alt=json", "?alt="])
@pytest.mark.parametrize("size", [1, 100_000])
@in_loop
async def test_a_gemini_stream_without_alt_sse_is_a_list(tmp_path, size, query):
    path = models_path("gemini-2.5-pro", "streamGenerateContent", query)
    async with key_world(tmp_path, "gemini-api-key", config=NO_WAIT) as w:
        whole = b": hello\n\n" + b"".join([*content_chunks(), *content_chunks()])
        w.keyed.usual = (200, SSE, [whole[i : i + size] for i in range(0, len(whole), size)])
        response = await w.ask(path, CONTENTS)
        assert response.headers["Content-Type"].startswith("application/json")
        assert json.loads(response.bytes) == data_of(whole)
        assert w.keyed.last.query_string == "alt=sse"
        assert w.server.ledger.requests[0]["output_tokens"] == 3
        w.keyed.usual = (200, SSE, [content_chunks()[0], "cut"])
        got = b""
        async with w.http.post(w.url + path, json=CONTENTS) as response:
            with suppress(aiohttp.ClientError):
                async for piece in response.content.iter_any():
                    got += piece
        assert "broke off" in json.loads(got)[-1]["error"]["message"]
        w.clock.now += 1000
        w.keyed.usual = answer_json(content())
        assert json.loads((await w.ask(path, CONTENTS)).bytes) == [content()]
        w.keyed.usual = answer_json(
            {"error": {"code": 400, "message": "bad", "status": "INVALID_ARGUMENT"}}, 400
        )
        assert (await w.ask_json(path, CONTENTS))[0] == 400


@in_loop
async def test_the_first_element_of_a_list_is_early(tmp_path):
    gate, chunks = asyncio.Event(), content_chunks()
    async with key_world(tmp_path, "gemini-api-key") as w:
        w.keyed.usual = (200, SSE, [chunks[0], gate, chunks[1]])
        url = w.url + models_path("gemini-2.5-pro", "streamGenerateContent")
        async with w.http.post(url, json=CONTENTS) as response:
            first = await response.content.readany()
            assert json.loads(first + b"]") == data_of(chunks[0])
            gate.set()
            assert json.loads(first + await response.content.read()) == data_of(b"".join(chunks))


@pytest.mark.parametrize(("given", "seconds"), [
    ("Fri, 15 Jan 2027 08:15:00 GMT", 900), ("Fri, 15 Jan 2027 07:00:00 GMT", 0), ("900", 900), (" 900 ", 900),
    ("soon", 0), ("", 0), ("-5", 0), ("Fri, 99 Jan 2027 08:15:00 GMT", 0), ("nan", 0), ("1e300", 0),
])  # fmt: skip
@in_loop
async def test_retry_after_may_be_a_date(tmp_path, given, seconds):
    assert ampproxy.http_delay(given, 1_800_000_000) == seconds
    async with world(tmp_path, **NO_WAIT) as w:
        w.claude.usual = limit(**{"Retry-After": given})
        _, _, headers = await w.ask_json("/v1/messages", ASK)
        assert resting(w) == {"": seconds or 60}
        if seconds:
            assert headers["Retry-After"] == str(seconds)


@pytest.mark.parametrize("target", [
    b"/api/x?", b"/api/x#frag", b"/api/x?a=1#frag", b"/api/x?#", b"/api/x??", b"/api/%zz?%", b"/api//x/../y", b'/api/"<>|{}^`',
    b"/api/%C3%A9?q=%c3%a9", b"/?",
])  # fmt: skip
@in_loop
async def test_a_target_reaches_ampcode_as_it_came(tmp_path, target):
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    async with raw_world(tmp_path, [answer]) as w:
        head = b" HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        assert (await raw_exchange(w.port, b"PUT " + target + head)).startswith(b"HTTP/1.1 200")
        assert w.raw.requests[0][0].startswith(b"PUT " + target + b" HTTP/1.1\r\n")


@asynccontextmanager
async def outbound_proxies(count):
    """Fakes that stand for outbound proxies: they answer everything, and keep what was asked."""
    fakes = [FakeUpstream(answer_json({**message(), **NEW_TOKEN})) for _ in range(count)]
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(fake.open()) for fake in fakes]


@pytest.mark.parametrize("word", ["proxy_url", "proxy-url"])
@in_loop
async def test_a_token_files_own_proxy_is_used(tmp_path, word):
    """For its calls and for its refreshes; it beats the proxy of all, and `direct` is none."""
    async with outbound_proxies(2) as (own, common), world(tmp_path, tokens=()) as w:
        w.reload(**{"proxy-url": common.url})
        token_file(w.auth, expired="2020-01-01T00:00:00Z", **{word: own.url})
        w.server.tick()
        assert (await w.ask("/v1/messages", ASK)).status == 200
        assert [r.raw_path for r in own.requests] == [
            w.authority.url + "/token",
            w.claude.url + "/v1/messages",
        ]
        assert not common.requests + w.claude.requests + w.authority.requests
        token_file(w.auth, **{word: "direct"})
        w.server.tick()
        assert (await w.ask("/v1/messages", ASK)).status == 200
        token_file(w.auth, access_token="sk-ant-oat-other")
        w.server.tick()
        assert (await w.ask("/v1/messages", ASK)).status == 200
        assert (len(own.requests), len(common.requests), len(w.claude.requests)) == (2, 1, 1)


@pytest.mark.parametrize("place", ["entry", "row"])
@pytest.mark.parametrize("kind", KINDS)
@in_loop
async def test_a_keys_own_proxy_is_used(tmp_path, kind, place):
    async with outbound_proxies(1) as (own,), key_world(tmp_path, kind) as w:
        own.usual = answer_json(KINDS[kind][5]())
        entries = key_entry(kind, w.keyed.url, "k-one", "k-two")
        if kind == "openai-compatibility" and place == "entry":
            entries[0]["api-key-entries"][0]["proxy-url"] = own.url
        else:
            entries[0]["proxy-url"] = own.url
        for entry in entries[1:]:
            entry["proxy-url"] = "direct"
        w.reload(**{kind: entries})
        w.server.tick()
        for _ in range(2):
            assert (await w.ask(*asked_as(kind))).status == 200
        both = kind == "openai-compatibility" and place == "row"
        assert (len(own.requests), len(w.keyed.requests)) == ((2, 0) if both else (1, 1))


@pytest.mark.parametrize(("text", "words"), [
    ("proxy-url: socks5://a:1", "proxy-url: expected an address that begins with http:// or https:// (no SOCKS)"),
    ("claude-api-key: [{api-key: k, proxy-url: 'socks5h://a:1'}]", "no SOCKS"),
    ("openai-compatibility: [{name: x, base-url: 'http://x', api-key-entries: [{api-key: k, proxy-url: socks4://a}]}]", "no SOCKS"),
    ("providers: {claude: {proxy-url: 'socks5://a:1'}}", "no SOCKS"),
])  # fmt: skip
def test_a_socks_proxy_in_the_configuration_is_refused(tmp_path, capsys, text, words):
    (tmp_path / "config.yaml").write_text(text)
    assert ampproxy.main(["check", "--config", str(tmp_path / "config.yaml")]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "check"])
@pytest.mark.parametrize("name", ["ALL_PROXY", "https_proxy", "HTTP_PROXY"])
def test_a_socks_proxy_in_the_environment_is_refused(tmp_path, capsys, monkeypatch, command, name):
    (tmp_path / "config.yaml").write_text("port: 0")
    monkeypatch.setenv(name, "socks5://127.0.0.1:1")
    assert ampproxy.main([command, "--config", str(tmp_path / "config.yaml")]) == 1
    assert f"{name.upper()} in the environment is a SOCKS proxy" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("proxy-url: direct")
    assert ampproxy.main(["check", "--config", str(tmp_path / "config.yaml")]) == 0


@in_loop
async def test_a_socks_proxy_in_a_token_file_is_named(tmp_path, caplog):
    async with world(tmp_path, tokens=()) as w:
        path = token_file(w.auth, proxy_url="socks5://127.0.0.1:1")
        w.server.tick()
        assert f"{path} is no token file: its proxy-url: expected an address" in caplog.text
        assert (await w.ask("/v1/messages", ASK)).status == 404


@in_loop
async def test_without_any_account_it_is_said_that_amp_bills(tmp_path, caplog):
    def said_so():
        return len([line for line in caplog.messages if "NO LOGIN AND NO KEY" in line])

    async with world(tmp_path, tokens=()) as w:
        w.server.ledger.warn_of_no_account()
        assert said_so() == 1, "at the start"
        for _ in range(3 * 60):
            assert (await w.ask(PATH, ASK)).status == 200
            w.clock.now += 60
        assert said_so() == 3, "and once in an hour of paid calls"
        assert "bills it" in caplog.text
        token_file(w.auth)
        w.server.tick()
        w.clock.now += 7200
        await w.ask("/api/provider/openai/v1/chat/completions", CHAT)
        w.server.ledger.warn_of_no_account()
        assert said_so() == 3


@pytest.mark.parametrize("fallback", ["always", "never"])
@in_loop
async def test_a_start_without_any_account_says_so(tmp_path, fallback):
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(
            {
                "auth-dir": str(tmp_path / "auth"),
                "port": free_port(),
                "ampcode": {"fallback": fallback},
            }
        )
    )
    with Cli(tmp_path) as cli:
        told = await cli.until("ampproxy.py login claude", "stderr")
    assert ("bills it" in told) == (fallback == "always")


@in_loop
async def test_soonest_reset_spends_first_what_ends_first(tmp_path):
    """The account whose window ends first, while it has room; of one priority; threads stay."""
    async with world(tmp_path, FRIENDS, routing={"strategy": "soonest-reset"}) as w:
        ann, bob, cyd = (w.server.pool.accounts[path] for path in w.tokens)
        now = w.clock.time()
        ann.quota = [ampproxy.Window("5h", False, 10, now + 9000)]
        bob.quota = [
            ampproxy.Window("5h", False, 10, now + 4000),
            ampproxy.Window("7d", False, 10, now + 90_000),
        ]
        w.claude.usual = answer_json(message())
        assert [await answered_by(w) for _ in range(3)] == ["bob@example.com"] * 3
        assert await answered_by(w, {"session-id": "1"}) == "bob@example.com"
        bob.quota = [ampproxy.Window("5h", False, 97, now + 4000)]
        assert await answered_by(w) == "ann@example.com", "bob's has no room"
        assert await answered_by(w, {"session-id": "1"}) == "bob@example.com", "a thread stays"
        w.clock.now += 5000
        bob.quota = [ampproxy.Window("5h", False, 97, now + 4000)]
        ann.quota = [
            ampproxy.Window("5h", False, 99, now + 9000),
            ampproxy.Window("7d_oi", False, 9, now + 5100),
        ]
        cyd.quota = [ampproxy.Window("7d", False, 10, now + 500_000)]
        assert await answered_by(w) == "cyd@example.com", "what has ended says nothing"
        token_file(w.auth, "ann@example.com", priority=3)
        ann.quota = [ampproxy.Window("5h", False, 10, now + 600_000)]
        w.server.tick()
        assert await answered_by(w) == "ann@example.com"


@pytest.mark.parametrize(("drops", "sent"), [
    (None, f"a,{OAUTH}"), ([], f"context-1m-2025-08-07,a,{OAUTH}"), (["a"], f"context-1m-2025-08-07,{OAUTH}"), (["CONTEXT-*", "x"], f"a,{OAUTH}"),
])  # fmt: skip
@in_loop
async def test_the_betas_that_go_are_the_rows(tmp_path, drops, sent):
    more = {} if drops is None else {"claude": {"drop-betas": drops}}
    async with world(tmp_path, **more) as w:
        await w.ask(
            "/v1/messages",
            {**ASK, "betas": ["a"]},
            headers={"anthropic-beta": "context-1m-2025-08-07"},
        )
        assert w.claude.last.headers["anthropic-beta"] == sent
    (tmp_path / "key").mkdir()
    async with key_world(tmp_path / "key", "claude-api-key", **{"drop-betas": drops or []}) as w:
        await w.ask("/v1/messages", ASK, headers={"anthropic-beta": "context-1m-2025-08-07, a"})
        got = w.keyed.last.headers["anthropic-beta"]
        assert [b.strip() for b in got.split(",")] == [
            b
            for b in ("context-1m-2025-08-07", "a")
            if not drops or (b != "a" if drops == ["a"] else b == "a")
        ]


OWN_ERRORS = [  # the kind of key, a stream's first event -> the status and the error that the client gets
    ("claude-api-key", event("error", error={"type": "overloaded_error", "message": "Overloaded"}), 529,
     {"type": "overloaded_error", "message": "Overloaded"}),
    ("claude-api-key", event("error", error={"type": "new_kind_error", "message": "x: y"}), 502, {"type": "new_kind_error", "message": "x: y"}),
    ("claude-api-key", event("error", error={"type": "api_error"}), 500, {"type": "api_error", "message": "api_error"}),
    ("codex-api-key", event("error", code="server_is_overloaded", message="busy"), 529,
     {"type": "server_error", "code": "server_is_overloaded", "message": "busy"}),
    ("codex-api-key", event("response.failed", response=reply(status="failed", error={"code": "server_error", "message": "oh"})), 500,
     {"type": "server_error", "code": "server_error", "message": "oh"}),
    ("openai-compatibility", data({"error": {"message": "busy", "type": "overloaded", "code": 503}}), 503,
     {"type": "overloaded", "code": "server_error", "message": "busy"}),
    ("gemini-api-key", data({"error": {"code": 500, "status": "INTERNAL", "message": "An internal error"}}), 500,
     {"code": 500, "status": "INTERNAL", "message": "An internal error"}),
]  # fmt: skip


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("kind", "first", "status", "error"), OWN_ERRORS, ids=range(len(OWN_ERRORS))
)
@in_loop
async def test_an_error_at_a_streams_start_is_the_providers_own(
    tmp_path, kind, first, status, error, late
):
    """As an answer, and as the last event where a comment has gone out (which Gemini has none of)."""
    gate = asyncio.Event()
    config = {**NO_WAIT, "streaming": {"keepalive-seconds": 0.05 if late else 0}}
    async with key_world(tmp_path, kind, config=config) as w:
        w.keyed.usual = (200, SSE, [gate, first] if late else [first])
        path, body = asked_as(kind, stream=True)
        if not late or kind == "gemini-api-key":
            gate.set()
            got, told, _ = await w.ask_json(path, body)
            assert (got, told["error"]) == (status, error)
            return
        async with w.http.post(w.url + path, json=body) as response:
            assert await response.content.readline() == b": keep-alive\n"
            gate.set()
            last = data_of(await response.content.read())[-1]
        assert last.get("error", last.get("response", {}).get("error")) == error


@pytest.mark.parametrize(("kind", "comment"), [
    ("claude-api-key", b": keep-alive\n\n"), ("codex-api-key", b": keep-alive\n"), ("openai-compatibility", b": keep-alive\n"),
    ("gemini-api-key", b""),
])  # fmt: skip
@in_loop
async def test_comments_are_such_as_clients_bear(tmp_path, kind, comment):
    """Google's SDKs break on any; openai's on one with a blank line behind it, after an id."""
    gate = asyncio.Event()
    async with key_world(tmp_path, kind, config={"streaming": {"keepalive-seconds": 0.05}}) as w:
        stream = KINDS[kind][6]()
        cut = min(3, len(stream) - 1)
        w.keyed.usual = (200, SSE, [b"id: 7\n", *stream[:cut], gate, *stream[cut:]])
        path, body = asked_as(kind, stream=True)
        async with w.http.post(w.url + path, json=body) as response:
            got = await response.content.readuntil(b"\n\n")
            await asyncio.sleep(0.2)  # some comments long
            gate.set()
            got += await response.content.read()
        plain = got.replace(comment, b"") if comment else got
        assert data_of(plain)[-1] == data_of(b"".join(stream))[-1] or kind == "codex-api-key"
        assert (got.count(b"keep-alive") > 1) == bool(comment)
        assert (b": keep-alive\n\n" in got) == (kind == "claude-api-key")


@in_loop
async def test_a_client_that_waits_for_its_first_event_hears_comments(tmp_path):
    """Whatever keeps it waiting: a slow head, a second account; the status alone is fixed by them."""
    gates = [asyncio.Event(), asyncio.Event()]

    async def slow(request):
        number = len(w.claude.requests) - 1
        await gates[number].wait()
        return await respond(request, said(529) if number == 0 else (200, SSE, events()))

    async with world(tmp_path, FRIENDS[:2], streaming={"keepalive-seconds": 0.05}, **NO_WAIT) as w:
        w.claude.usual = slow
        async with w.http.post(w.url + PATH, json=STREAM) as response:
            for gate in gates:
                for _ in range(2):
                    assert await response.content.readuntil(b"\n\n") == b": keep-alive\n\n"
                gate.set()
            got = (await response.content.read()).replace(b": keep-alive\n\n", b"")
        assert (response.status, got) == (200, b"".join(events()))
        assert len(w.claude.requests) == 2


# == The official SDK ==============================================================================


@pytest.mark.parametrize("base", ["", "/api/provider/anthropic"])
@in_loop
async def test_anthropic_sdk(tmp_path, base):
    anthropic = pytest.importorskip("anthropic")
    async with world(tmp_path) as w:
        client = anthropic.AsyncAnthropic(base_url=w.url + base, api_key="any", max_retries=0)
        answer = await client.messages.create(**ASK)
        assert (answer.content[0].text, answer.model) == ("hi", "claude-opus-4-6")
        w.claude.usual = (200, SSE, events("claude-opus-4-6-20260101"))
        async with client.messages.stream(**ASK) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
        assert (text, final.model, final.usage.output_tokens) == ("hé", "claude-opus-4-6", 7)
        w.claude.usual = answer_json({"input_tokens": 42})
        assert (
            await client.messages.count_tokens(model=ASK["model"], messages=ASK["messages"])
        ).input_tokens == 42
        w.claude.usual = (200, SSE, [*events()[:3], events()[3][:20], "cut"])
        with pytest.raises(anthropic.APIStatusError):
            async with client.messages.stream(**ASK) as stream:
                await stream.get_final_message()
        w.reload(ampcode={"fallback": "never"})
        w.claude.usual = answer_json(
            {"type": "error", "error": {"type": "rate_limit_error", "message": "x"}}, 429
        )
        with pytest.raises(anthropic.RateLimitError):
            await client.messages.create(**ASK)
        await client.close()


# == Command line ==================================================================================


@pytest.mark.parametrize(("args", "status", "words"), [
    (["--version"], 0, ampproxy.__version__), (["--help"], 0, "login"), (["login", "--help"], 0, "--no-browser"),
    (["serv"], 2, "invalid choice"), (["--prot", "1"], 2, "usage"), (["login", "nobody"], 2, "invalid choice"),
    (["serve", "extra"], 2, "unrecognized"), (["logout"], 2, "PROVIDER"), (["--port", "x"], 2, "invalid"),
    (["login"], 2, "claude"), (["accounts"], 0, "login claude"), (["logout", "claude"], 1, "no such account"),
    (["--host", "0.0.0.0"], 1, "api-keys"), (["check"], 0, "In effect"), (["--port", "99999"], 2, "--port"),
    (["--config", "no.yaml"], 1, "no.yaml: cannot be read: No such file or directory\n"),
    (["logout", "codex"], 1, "there is no codex login in "), (["setup", "droid"], 0, "needs models first"),
    (["setup", "droid"], 0, "Next: ampproxy.py setup droid, once more."), (["check"], 0, "originator: codex_cli_rs"),
    (["login", "--help"], 0, "PROVIDER       claude, codex, gemini or antigravity"),
])  # fmt: skip
@in_loop
async def test_commands(tmp_path, args, status, words):
    (tmp_path / "config.yaml").write_text(f"auth-dir: {tmp_path / 'auth'}")
    with Cli(tmp_path, *args) as cli:
        got, out, err = await cli.end()
    assert got == status
    assert words in (out + err)
    if status == 1:
        assert len(err.splitlines()) == 1
        assert not out


def test_check_masks_secrets_and_names_warnings(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("api-keys: [topsecretkey]\nprot: 5\nampcode: {upstream-api-key: sgamp_topsecret}\n"
                    "proxy-url: http://user:topsecret@proxy:1\nclaude-api-key: [{api-key: sk-topsecret}]\n"
                    "providers: {claude: {headers: {Authorization: topsecret, X-Api-Key: topsecret}}}")  # fmt: skip
    assert ampproxy.main(["check", "--config", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "topsecret" not in out + err
    assert f"{path}:2: unknown key 'prot'; the nearest is 'port'" in err
    assert "fallback: always" in out
    path.write_text("port: x")
    assert ampproxy.main(["--config", str(path), "check"]) == 1
    assert capsys.readouterr().err.startswith(f"ampproxy: {path}:1: port: ")


def test_accounts_and_logout(tmp_path, capsys):
    auth = tmp_path / "auth"
    config = ["--config", str(tmp_path / "config.yaml")]
    (tmp_path / "config.yaml").write_text(f"auth-dir: {auth}")
    token_file(auth, "a@example.com")
    token_file(auth, "b@example.com", disabled=True, plan="max")
    (auth / "broken.json").write_text("{")
    assert ampproxy.main(["accounts", *config]) == 0
    shown = capsys.readouterr()
    head, first, second = shown.out.splitlines()
    assert head.split() == ["PROVIDER", "ACCOUNT", "PLAN", "EXPIRES", "STATE", "FILE"]
    assert "ready" in first
    assert ("disabled" in second, "max" in second) == (True, True)
    assert "broken.json" in shown.err
    assert ampproxy.main(["logout", "claude", *config]) == 1
    assert "a@example.com, b@example.com" in capsys.readouterr().err
    assert ampproxy.main(["check", *config]) == 0
    assert capsys.readouterr().err.count("broken.json") == 1, "said once"
    orders = (
        ["logout", "anthropic", *config, "nobody"],
        ["logout", *config, "claude", "nobody"],
        ["logout", "claude", "nobody", *config],
    )
    for args in orders:
        assert ampproxy.main(args) == 1
        assert "no such account among: a@example.com" in capsys.readouterr().err
    for args in (["a@example.com", "b@example.com"], [*config, "--to", "me"], ["a", *config, "b"]):
        with pytest.raises(SystemExit, match="2"):
            ampproxy.main(["logout", "claude", *args])
        assert "unrecognized arguments" in capsys.readouterr().err
    assert ampproxy.main(["logout", "anthropic", *config, "a@example.com"]) == 0
    assert [p.name for p in sorted(auth.iterdir())] == ["broken.json", "claude-b@example.com.json"]


def test_missing_packages_are_one_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, "-S", str(SCRIPT)], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 1
    assert "uv run ampproxy.py" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@in_loop
async def test_serve_and_stop(tmp_path):
    """A process of its own: starts, answers, refuses a second copy, lets a stream end, stops."""
    gate = asyncio.Event()
    fake, port = FakeUpstream((200, SSE, [*events()[:2], gate, *events()[2:]])), free_port()
    async with fake.open():
        token_file(
            tmp_path / "auth", expired="2099-01-01T00:00:00Z", last_refresh="2099-01-01T00:00:00Z"
        )
        row = {"claude": {"base-url": fake.url, "token-url": fake.url}}
        config = {
            "auth-dir": str(tmp_path / "auth"),
            "port": port,
            "logging-to-file": True,
            "providers": row,
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        with Cli(tmp_path) as cli:
            await cli.until(f"http://127.0.0.1:{port}", "stderr")
            with Cli(tmp_path, "serve") as second:
                status, _, err = await second.end()
            assert status == 1
            assert "running already" in err
            assert len(err.splitlines()) == 1
            async with aiohttp.ClientSession() as http:
                async with http.post(
                    f"http://127.0.0.1:{port}/v1/messages", json=STREAM
                ) as response:
                    await response.content.readuntil(b"\n\n")
                    cli.process.send_signal(signal.SIGTERM)
                    await cli.until("stopping", "stderr")
                    gate.set()
                    rest = await response.content.read()
                assert rest.endswith(events()[-1])
            status, _, _ = await cli.end()
    assert status == 0


# == For people ====================================================================================
# The start, the log, `status` and the page at /, `setup`, `import`, the list of logins, `check`.


def own_terminal():
    """In the new process: so that Ctrl-C and a change of size reach it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """The program on a pseudo-terminal of its own."""

    def __init__(self, home, *args, rows=24, columns=80, script=(str(SCRIPT),), **env):
        self.master, self.slave = os.openpty()
        self.resize(rows, columns)
        self.before = termios.tcgetattr(self.slave)
        env = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "TERM": "xterm-256color",
            "LANG": "C.UTF-8",
            "SSH_TTY": "x",
            **env,
        }
        command = [sys.executable, *script, *args]
        self.process = subprocess.Popen(command, env=env, cwd=home, stdin=self.slave, stdout=self.slave, stderr=self.slave,
                                        start_new_session=True, preexec_fn=own_terminal)  # noqa: PLW1509  # fmt: skip
        self.seen = ""  # all of it, as it came

    def __enter__(self):
        return self

    def __exit__(self, *args):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)

    def resize(self, rows, columns):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self, wait):
        if not select.select([self.master], [], [], wait)[0]:
            return False
        with suppress(OSError):
            self.seen += os.read(self.master, 65536).decode(errors="replace")
            return True
        return False

    def until(self, words, start=None):
        """Wait until `words` stand behind what had come when this was called, or behind `start`."""
        start, end = len(self.seen) if start is None else start, time.monotonic() + 15
        while words not in plain_text(self.seen[start:]):
            assert time.monotonic() < end, f"no {words!r} in {plain_text(self.seen[start:])!r}"
            self.read(0.2)
        return plain_text(self.seen[start:])

    def shows(self, words, keys=""):
        """Press keys, and wait until the whole screen has `words`, which may be a pattern."""
        os.write(self.master, keys.encode())
        end = time.monotonic() + 15
        while not re.search(words, screen := screen_of(self.seen)):
            assert time.monotonic() < end, f"no {words!r} in {screen}"
            self.read(0.2)
        return screen

    def end(self):
        """The exit status; the terminal must be as it was, and nothing of a screen left."""
        end = time.monotonic() + 15
        while self.process.poll() is None:
            assert time.monotonic() < end, plain_text(self.seen)
            self.read(0.1)
        while self.read(0):
            pass
        assert termios.tcgetattr(self.slave) == self.before
        assert self.seen.count("\x1b[?1049h") == self.seen.count("\x1b[?1049l")
        if "\x1b[?25l" in self.seen:  # the cursor was hidden
            assert self.seen.rfind("\x1b[?25h") > self.seen.rfind("\x1b[?25l")
        assert "Traceback" not in self.seen
        return self.process.returncode


def screen_of(text, rows=64, columns=220):
    """What a VT100 shows after these bytes: enough of one for curses."""
    grid, row, column = [[" "] * columns for _ in range(rows)], 0, 0
    top, bottom = 0, rows - 1  # what scrolls
    for found in re.finditer(r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b[()].|\x1b.|.", text, re.S):
        numbers = [int(n) for n in re.findall(r"\d+", found[1] or "")]
        count = (numbers or [1])[0]
        match f"[{found[2]}" if found[2] else found[0]:
            case "[H":
                row, column = ([n - 1 for n in numbers] + [0, 0])[:2]
            case "[A" | "[B" | "[C" | "[D" as way:
                row += {"[A": -count, "[B": count}.get(way, 0)
                column += {"[C": count, "[D": -count}.get(way, 0)
            case "[J":
                for line in grid[row + 1 :]:
                    line[:] = [" "] * columns
                grid[row][column:] = [" "] * (columns - column)
            case "[K" if numbers == [1]:
                grid[row][: column + 1] = [" "] * (column + 1)
            case "[K":
                grid[row][column:] = [" "] * (columns - column)
            case "\r":
                column = 0
            case "[r":
                top, bottom = numbers[0] - 1, numbers[1] - 1
            case "\n" if row == bottom:
                grid[top : bottom + 1] = [*grid[top + 1 : bottom + 1], [" "] * columns]
            case "\n":
                row += 1
            case "\x1bM" if row == top:
                grid[top : bottom + 1] = [[" "] * columns, *grid[top:bottom]]
            case "\x1bM":
                row -= 1
            case "\b":
                column -= 1
            case "\t":
                column += 8 - column % 8
            case letter if len(letter) == 1 and letter.isprintable():
                if column == columns:
                    row, column = min(row + 1, rows - 1), 0
                grid[row][column] = letter
                column += 1
    return "\n".join("".join(line).rstrip() for line in grid)


def plain_text(text):
    return re.sub(r"\x1b(?:\[[0-9;?]*[A-Za-z]|[()][A-Z0-9]|[=>])", "", text)


class FakeStream(io.StringIO):
    def __init__(self, terminal=True, encoding="utf-8"):
        super().__init__()
        self.terminal, self._encoding = terminal, encoding

    encoding = property(lambda self: self._encoding)

    def isatty(self):
        return self.terminal


# -- The start and the log --


@pytest.mark.parametrize(("env", "terminal", "wanted"), [
    ({}, True, True), ({}, False, False), ({"NO_COLOR": "1"}, True, False), ({"NO_COLOR": ""}, True, True), ({"TERM": "dumb"}, True, False),
])  # fmt: skip
def test_colours_are_for_terminals_whose_user_wants_them(monkeypatch, env, terminal, wanted):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    painted = ampproxy.paint_for(FakeStream(terminal))("text", "red")
    assert painted == ("\x1b[1;31mtext\x1b[0m" if wanted else "text")


@in_loop
async def test_lines_of_requests_stand_in_columns(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    rules = [{"from": "gpt-9", "to": "claude-opus-4-7"}]
    async with world(tmp_path, ampcode={"model-mappings": rules}) as w:
        await w.ask(PATH, ASK)
        await w.ask(PATH, {**ASK, "model": "gpt-9"})
        await w.ask(PATH, {**ASK, "model": "grok"})
        await w.ask("/v1/messages", {**ASK, "model": "grok"})
    lines = [r.getMessage() for r in caplog.records if hasattr(r, "colour")]
    words = ["LOCAL_PROVIDER", "MODEL_MAPPING", "AMP_CREDITS", "NO_PROVIDER"]
    assert [line.split()[0] for line in lines] == words
    assert [line[15:19] for line in lines] == ["200 ", "200 ", "200 ", "404 "]
    assert [line[27:].split()[0] for line in lines] == ["claude-opus-4-6", "gpt-9", "grok", "grok"]
    assert lines[1].endswith("claude fre... as claude-opus-4-7")
    assert len(lines[0]) < 80
    record = next(r for r in caplog.records if hasattr(r, "colour"))
    shown = ampproxy.LogFormatter("%X", ampproxy.coloured).format(record)
    assert "\x1b[32mLOCAL_PROVIDER\x1b[0m 200" in shown
    warning = logging.LogRecord("ampproxy", logging.WARNING, "", 0, "well\x1b[2J", (), None)
    assert (
        ampproxy.LogFormatter("%H", ampproxy.coloured).format(warning)[2:]
        == " \x1b[33mWARNING\x1b[0m well\\u001b[2J"
    )


def test_the_log_file_is_private_and_bounded(tmp_path):
    handler = ampproxy.LogFile(tmp_path / "x.log", maxBytes=300, backupCount=2)
    handler.setFormatter(ampproxy.LogFormatter("%Y-%m-%d %H:%M:%S", ampproxy.plain))
    for number in range(40):
        handler.handle(
            logging.LogRecord(
                "ampproxy", logging.INFO, "", 0, f"line {number} of fred@example.com", (), None
            )
        )
    handler.close()
    files = sorted(tmp_path.glob("x.log*"))
    assert [path.name for path in files] == ["x.log", "x.log.1", "x.log.2"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert max(path.stat().st_size for path in files) <= 300
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d line 39 of fre\.\.\.",
        files[0].read_text().splitlines()[-1],
    )


@in_loop
async def test_the_start_tells_what_is_in_effect_and_a_log_file_keeps_it(tmp_path):
    port, auth = free_port(), tmp_path / "auth"
    config = {"auth-dir": str(auth), "port": port, "logging-to-file": True,
              "openai-compatibility": [{"name": "router", "base-url": "http://127.0.0.1:9", "api-key-entries": [{"api-key": "sk-12345678"}]}],
              "ampcode": {"model-mappings": [{"from": "gpt-5", "to": ["claude-opus-4-7", "x"]}], "fallback": "unserved"}}  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("a@example.com", "b@example.com"):
        token_file(auth, name, expired="2099-01-01T00:00:00Z")
    with Cli(tmp_path) as cli:
        told = await cli.until('"amp.url"', "stderr")
        cli.process.send_signal(signal.SIGTERM)
        await cli.end()
    assert f": http://127.0.0.1:{port}\n" in told
    for words in (
        "config    /",
        "claude 2 logins, router 1 key",
        "gpt-5 > claude-opus-4-7 or x",
        "fallback: unserved",
    ):
        assert words in told
    assert f'"amp.url": "http://127.0.0.1:{port}"' in told
    assert "NO LOGIN" not in told
    file = auth / "logs/ampproxy.log"
    assert "claude 2 logins" in file.read_text()
    assert "stopping" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(("text", "there"), [
    (None, False), ("", False), ("{", False), ("[]", False), ('{"amp.url": 5}', False),
    ('{"amp.url": "http://127.0.0.1:8318"}', False), ('{"amp.url": "http://127.0.0.1:8317"}', True),
    ('{\n  // mine\n  "amp.url": "http://127.0.0.1:8317/",\n}', True),
])  # fmt: skip
def test_the_start_says_whether_amp_points_here(tmp_path, monkeypatch, text, there):
    monkeypatch.setenv("AMP_SETTINGS_FILE", str(tmp_path / "settings.json"))
    if text is not None:
        (tmp_path / "settings.json").write_text(text)
    told = ampproxy.amp_line("http://127.0.0.1:8317")
    assert '"amp.url": "http://127.0.0.1:8317"' in told
    assert ("setup amp" in told) != there
    told = ampproxy.amp_line("http://127.0.0.1:8317", by_hand=True)
    assert ("`ampproxy.py setup amp --url http://127.0.0.1:8317`" in told) != there


@pytest.mark.parametrize(
    ("fallback", "words"),
    [("always", "bills it"), ("never", "no model call can be answered")],
)
@in_loop
async def test_a_start_without_any_account_is_loud(tmp_path, fallback, words):
    config = {
        "auth-dir": str(tmp_path / "auth"),
        "port": free_port(),
        "ampcode": {"fallback": fallback},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with Cli(tmp_path) as cli:
        told = await cli.until("NO LOGIN AND NO KEY", "stderr")
    assert words in told
    assert "ampproxy.py login claude" in told


@in_loop
async def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "auth").mkdir()
    (tmp_path / "auth/logs").write_text("a file in the way")
    (tmp_path / "config.yaml").write_text(
        f"auth-dir: {tmp_path / 'auth'}\nlogging-to-file: true\nport: 0"
    )
    with Cli(tmp_path) as cli:
        code, _, err = await cli.end()
    assert code == 1
    assert re.fullmatch("ampproxy: the log cannot be written to .*logs/ampproxy.log: .*\n", err)


# -- status --


def busy_quota(five_hours="0.42", week="0.96"):
    kind, ends = "anthropic-ratelimit-unified", 1_800_000_000
    return {f"{kind}-5h-utilization": five_hours, f"{kind}-5h-reset": str(ends + 7900),
            f"{kind}-7d-utilization": week, f"{kind}-7d-reset": str(ends + 400_000)}  # fmt: skip


@asynccontextmanager
async def busy_world(tmp_path, **config):
    """Two accounts, one at rest; a local, a mapped, a paid and a refused call."""
    rules = {"model-mappings": [{"from": "gpt-9", "to": "claude-opus-4-7"}]}
    keys = {"X-Api-Key": config["api-keys"][0]} if "api-keys" in config else {}
    async with world(
        tmp_path, ("anna@example.com", "bert@example.com"), ampcode=rules, **config
    ) as w:
        w.write(port=w.port, ampcode=rules, **config)
        w.claude.script = [limit(**{"Retry-After": "900"}), answer_json(message(), **busy_quota())]
        for model in ("claude-opus-4-6", "gpt-9", "<b>grok</b>"):
            await w.ask(PATH, {**ASK, "model": model}, headers=keys)
        await w.ask("/v1/messages", {**ASK, "model": "nobody"}, headers=keys)
        yield w


@in_loop
async def test_the_report_counts_models_and_says_what_is_paid(tmp_path):
    async with busy_world(tmp_path) as w:
        _, report, _ = await w.ask_json("/status", method="GET")
    assert report["models"] == [
        {"provider": "ampcode", "model": "<b>grok</b>", "requests": 1, "errors": 0, "input_tokens": 0, "output_tokens": 0},
        {"provider": "claude", "model": "claude-opus-4-6", "requests": 1, "errors": 0, "input_tokens": 11, "output_tokens": 7},
        {"provider": "claude", "model": "claude-opus-4-7", "requests": 1, "errors": 0, "input_tokens": 11, "output_tokens": 7},
    ]  # fmt: skip
    assert report["notices"] == [
        "PAID: ampcode.com was asked 1 time and may charge for it: <b>grok</b> (1)"
    ]
    assert report["fallback"] == "always"


@in_loop
async def test_names_of_models_are_counted_up_to_a_bound(tmp_path):
    async with world(tmp_path) as w:
        for number in range(ampproxy.COUNTED_MODELS + 5):
            await w.ask(PATH, {**ASK, "model": f"grok-{number}"})
        assert len(w.server.ledger.models) == ampproxy.COUNTED_MODELS
        assert w.server.ledger.routes["amp"] == ampproxy.COUNTED_MODELS + 5


@pytest.mark.parametrize("width", [40, 80, 200])
@in_loop
async def test_the_table_fits_its_terminal_and_loses_no_state(tmp_path, width):
    async with busy_world(tmp_path) as w:
        _, report, _ = await w.ask_json("/status", method="GET")
    lines = ampproxy.status_lines(report, ampproxy.Sheet(ampproxy.plain, width, "#-"))
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for words in ("anna@example.com", "PAID", "429", "#" * 8 + "-"):
        assert words in text
    if width > 40:
        for words in (
            "calls: 1 local",
            "42 %",
            "resting, wakes in 15 min",
            "resets in 2 h 11 min",
            "1 mapped, 1 PAID, 1 refused",
            "claude answered 429",
        ):
            assert words in text
    coloured = ampproxy.status_lines(report, ampproxy.Sheet(ampproxy.coloured, width, "#-"))
    assert [plain_text(line) for line in coloured] == lines
    assert any(line.startswith("\x1b[1;31mPAID") for line in coloured)


@pytest.mark.parametrize(("seconds", "words"), [
    (0, "0 s"), (-5, "0 s"), (59.9, "59 s"), (60, "1 min"), (3599, "59 min"), (7900, "2 h 11 min"), (86400, "1 d 0 h"), (400_000, "4 d 15 h"),
])  # fmt: skip
def test_lengths_of_time_are_told_in_words(seconds, words):
    assert ampproxy.span(seconds) == words


@pytest.mark.parametrize(
    ("encoding", "signs"),
    [("utf-8", "█░"), ("ascii", "#-"), ("latin-1", "#-"), (None, "#-"), ("none", "#-")],
)
def test_bars_are_made_of_what_the_terminal_can_show(encoding, signs):
    assert ampproxy.sheet_for(FakeStream(encoding=encoding)).signs == signs


@in_loop
async def test_the_command_shows_a_table_and_ends_a_rest(tmp_path):
    async with busy_world(tmp_path, **{"api-keys": ["sesame"]}) as w:
        with Cli(tmp_path, "status") as cli:
            code, out, err = await cli.end()
        assert (code, err) == (0, "")
        assert "resting, wakes in 15 min" in out
        assert "\x1b" not in out
        with Cli(tmp_path, "status", "--wake", "Anna@example.com") as cli:
            assert await cli.end() == (0, "claude anna@example.com: may be asked again\n", "")
        assert [a.state(w.clock.monotonic()) for a in w.server.pool.accounts.values()] == [
            "ready"
        ] * 2
        with Cli(tmp_path, "status", "--wake", "nobody") as cli:
            code, out, err = await cli.end()
        assert (code, out) == (1, "")
        assert "no account 'nobody'; there are: anna@example.com, bert@example.com" in err
        w.write(port=w.port, **{"api-keys": ["wrong"]})
        with Cli(tmp_path, "status") as cli:
            code, _, err = await cli.end()
        assert code == 1
        assert "answered 401: Invalid API key" in err
        w.write(port=URL(w.amp.url).port)
        w.amp.usual = (200, {}, [b"<html>"])
        with Cli(tmp_path, "status") as cli:
            code, _, err = await cli.end()
        assert code == 1
        assert "is no ampproxy" in err


@in_loop
async def test_watching_goes_on_in_place_and_outlives_the_proxy(tmp_path):
    async with busy_world(tmp_path) as w:
        with await asyncio.to_thread(
            Terminal, tmp_path, "status", "--watch", "--config", str(w.file)
        ) as terminal:
            await asyncio.to_thread(terminal.until, "1 PAID", 0)
            start = len(terminal.seen)
            await w.ask(PATH, {**ASK, "model": "grok-2"})
            await asyncio.to_thread(terminal.until, "2 PAID", start)
            w.write(port=1)  # it reads its configuration once: it goes on asking here
            await asyncio.to_thread(os.write, terminal.master, b"\x03")
            assert await asyncio.to_thread(terminal.end) == 0
        with Cli(tmp_path, "status", "--watch") as cli:
            code, _, err = await cli.end()
        assert code == 1
        assert "no proxy to ask" in err
        w.write(port=w.port)
        with Cli(tmp_path, "status", "--watch", "--json") as cli:
            assert '"routes"' in await cli.until('"notices"')
            await cli.until('"notices"')
            cli.process.send_signal(signal.SIGTERM)
            code, _, err = await cli.end()
        assert (code, err) == (0, "")


@pytest.mark.parametrize(("headers", "body", "status", "words"), [
    ({}, {"account": "anna@example.com"}, 401, "Missing API key"),
    ({"X-Api-Key": "sesame", "Origin": "http://evil.example"}, {"account": "anna@example.com"}, 403, "another web site"),
    ({"X-Api-Key": "sesame", "Sec-Fetch-Site": "cross-site"}, {"account": "anna@example.com"}, 403, "another web site"),
    ({"X-Api-Key": "sesame", "Content-Type": "text/plain"}, {"account": "anna@example.com"}, 415, "application/json"),
    ({"X-Api-Key": "sesame"}, b"{", 400, "cannot be read"), ({"X-Api-Key": "sesame"}, b"[]", 400, "no JSON object"),
    ({"X-Api-Key": "sesame"}, {}, 404, "no account ''"), ({"X-Api-Key": "sesame"}, {"account": "anna@example.com", "provider": "codex"}, 404, "no account"),
    ({"X-Api-Key": "sesame"}, {"account": "anna@example.com", "provider": "claude"}, 200, "claude anna@example.com"),
])  # fmt: skip
@in_loop
async def test_only_who_may_manage_ends_a_rest(tmp_path, headers, body, status, words):
    async with busy_world(tmp_path, **{"api-keys": ["sesame"]}) as w:
        told = await w.ask("/status/wake", body, headers=headers)
        assert (told.status, words in told.bytes.decode()) == (status, True)
        resting = w.server.pool.accounts[w.tokens[0]].state(w.clock.monotonic()) == "resting"
        assert resting == (status != 200)
        assert not [r for r in w.amp.requests if "wake" in r.path]


@in_loop
async def test_a_wake_ends_the_wait_for_a_login_too(tmp_path):
    async with world(tmp_path) as w:
        w.authority.usual = answer_json({"error": "invalid_grant"}, 400)
        w.claude.script = [said(401)]
        assert (await w.ask("/v1/messages", ASK)).status == 401
        assert (await w.ask("/v1/messages", ASK)).status == 401
        assert (await w.ask("/status/wake", {"account": "fred@example.com"})).status == 200
        assert (await w.ask("/v1/messages", ASK)).status == 200


# -- The page --


def test_the_page_needs_nothing_from_outside():
    page = ampproxy.PAGE
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(|<img|<iframe| src=| on[a-z]+=|innerHTML|eval\(", page
    )
    assert re.findall(r'href="([^"]*)"', page) == ["data:,", "/status"]


@in_loop
async def test_a_browser_gets_the_page_and_others_the_report(tmp_path):
    browser = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    async with world(tmp_path, **{"api-keys": ["sesame"]}) as w:
        page = await w.ask("/", method="GET", headers=browser)
        assert (page.status, page.content_type, page.bytes.decode()) == (
            200,
            "text/html",
            ampproxy.PAGE,
        )
        policy = page.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        for tag in ("style", "script"):
            inside = re.search(f"<{tag}>(.*?)</{tag}>", ampproxy.PAGE, re.S)[1]
            digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy
        assert (page.headers["Cache-Control"], page.headers["X-Content-Type-Options"]) == (
            "no-store",
            "nosniff",
        )
        assert (await w.ask("/", method="GET", headers={"Accept": "*/*"})).status == 401
        assert (await w.ask("/status", method="GET", headers=browser)).status == 401
        told = await w.ask("/", method="GET", headers={"Accept": "*/*", "X-Api-Key": "sesame"})
        assert json.loads(told.bytes)["version"] == ampproxy.__version__
        evil = await w.ask("/", method="GET", headers={**browser, "Sec-Fetch-Site": "cross-site"})
        assert evil.status == 403
    (tmp_path / "b").mkdir()
    async with world(tmp_path / "b") as w:
        assert (
            await w.ask("/", method="GET", headers={**browser, "Host": "evil.example"})
        ).status == 403


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Browser:
    """A headless Chromium, driven over its DevTools socket."""

    def __init__(self, folder):
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                   "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]  # fmt: skip
        self.process = subprocess.Popen(command, env={**os.environ, "HOME": str(folder)}, text=True, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
        for line in self.process.stderr:
            if found := re.search(r"DevTools listening on ws://([^/]+)", line):
                self.address, self.number = found[1], 0
                threading.Thread(target=self.process.stderr.read, daemon=True).start()
                return
        raise RuntimeError("Chromium did not start")

    async def attach(self, http):
        async with http.get(f"http://{self.address}/json/list") as answer:
            pages = [one for one in await answer.json(content_type=None) if one["type"] == "page"]
        self.socket = await http.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)

    async def do(self, method, **parameters):
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": parameters})
        while True:
            told = await self.socket.receive_json()
            if told.get("id") == self.number:
                assert "error" not in told, told
                return told["result"]

    async def js(self, text):
        told = await self.do(
            "Runtime.evaluate", expression=text, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def until(self, condition):
        look = (
            f"() => {{ try {{ if ({condition}) {{ clearInterval(t); done(true); }} }} catch {{}} }}"
        )
        assert await self.js(f"new Promise(done => {{ const t = setInterval({look}, 20); }})")

    async def press(self, key, text=""):
        for kind in ("keyDown", "keyUp"):
            await self.do("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode={"Tab": 9, "Enter": 13}[key],
                          **({"text": text} if text and kind == "keyDown" else {}))  # fmt: skip

    def close(self):
        self.process.terminate()
        self.process.wait(10)


CONTRAST = """(() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const shine = ([r, g, b]) => { const [x, y, z] = [r, g, b].map(v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * x + 0.7152 * y + 0.0722 * z; };
  const ground = node => { for (; node; node = node.parentElement) { const c = rgb(getComputedStyle(node).backgroundColor); if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
  const bad = [];
  for (const node of document.querySelectorAll("main *")) {
    if (![...node.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const [a, b] = [shine(rgb(getComputedStyle(node).color)), shine(ground(node))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) bad.push(node.outerHTML.slice(0, 80));
  }
  return bad;
})()"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_the_page_in_a_browser(tmp_path, scheme, width):
    """With a key: it is asked for, kept, and everything is there, by keyboard and by role."""

    async def drive():
        async with asyncio.timeout(60), aiohttp.ClientSession() as http:
            await browser.attach(http)
            await look_around()
            await browser.until(
                "document.querySelector('#link').textContent.startsWith('out of reach')"
            )

    async def look_around():
        async with busy_world(tmp_path, **{"api-keys": ["sesame"]}) as w:
            await browser.do(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=900,
                deviceScaleFactor=1,
                mobile=width < 500,
            )
            await browser.do(
                "Emulation.setEmulatedMedia",
                features=[{"name": "prefers-color-scheme", "value": scheme}],
            )
            await browser.do("Page.navigate", url=w.url + "/")
            await browser.until("document.activeElement.id === 'key'")
            for key, then in (
                ("wrong", "!!document.querySelector('#wrong').textContent"),
                ("sesame", "document.querySelector('#requests table')"),
            ):
                await browser.do("Input.insertText", text=key)
                await browser.press("Enter", "\r")
                await browser.until(then)
            assert await browser.js(
                "[document.querySelector('#key').offsetParent, sessionStorage.getItem('ampproxy-key')]"
            ) == [None, "sesame"]
            assert await browser.js("document.documentElement.scrollWidth <= innerWidth"), (
                "nothing sticks out at the side"
            )
            assert await browser.js(CONTRAST) == []
            assert "ampcode.com was asked 1 time" in await browser.js(
                "document.querySelector('#paid').textContent"
            )
            assert await browser.js("[...document.querySelectorAll('[role=progressbar]')].map(b => [b.ariaLabel, b.ariaValueNow, b.ariaValueText])") == [
                ["claude bert@example.com: quota 5h", "42", "42 % used, resets in 2 h 11 min"],
                ["claude bert@example.com: quota 7d", "96", "96 % used, resets in 4 d 15 h"]]  # fmt: skip
            rows = await browser.js(
                "[...document.querySelectorAll('#requests tbody tr')].map(r => [r.className, r.querySelector('.mark').textContent, r.cells[2].textContent])"
            )
            assert rows == [
                ["", "refused", "nobody"],
                ["amp", "PAID", "<b>grok</b>"],
                ["", "mapped", "gpt-9"],
                ["", "local", "claude-opus-4-6"],
            ]
            tree = (await browser.do("Accessibility.getFullAXTree"))["nodes"]
            roles = Counter(node["role"]["value"] for node in tree if not node["ignored"])
            assert roles["progressbar"] == 2
            assert roles["columnheader"] == 14, "the tables are tables, on a phone, too"
            # The button, by keyboard alone.
            await browser.press("Tab")
            assert await browser.js(
                "[document.activeElement.tagName, document.activeElement.ariaLabel]"
            ) == ["BUTTON", "Try anna@example.com again now"]
            await browser.press("Enter", "\r")
            await browser.until(
                "document.querySelector('#said').textContent.includes('may be asked again')"
            )
            await browser.until(
                "document.querySelectorAll('.mark.ready').length === 2 && !document.querySelector('main button')"
            )
            # It is live, and says so when it is not.
            await w.ask(PATH, {**ASK, "model": "grok-2"}, headers={"X-Api-Key": "sesame"})
            await browser.until("document.querySelector('#paid').textContent.includes('2 times')")

    browser = Browser(tmp_path / "profile")
    try:
        loop_runner()(drive())
    finally:
        browser.close()


# -- setup --


def jsonc(text, keys, value):
    """The text with a value put there, or taken out; read again."""
    if value is ampproxy.GONE:
        return ampproxy.json_drop(text, keys)
    return ampproxy.json_put(text, keys, value)


@pytest.mark.parametrize(("before", "keys", "value", "after"), [
    ("", ("a",), 1, '{\n  "a": 1\n}\n'), ("{}", ("a",), 1, '{\n  "a": 1\n}'), ("{ }\n", ("a", "b"), 1, '{\n  "a": {\n    "b": 1\n  }\n}\n'),
    ('{"a": 1}', ("a",), "x", '{"a": "x"}'), ('{"a": 1}', ("b",), True, '{"a": 1, "b": true}'),
    ('{\n  "a": 1\n}', ("b",), 2, '{\n  "a": 1,\n  "b": 2\n}'), ('{\n\t"a": 1, // one\n}', ("b",), 2, '{\n\t"a": 1, // one\n\t"b": 2,\n}'),
    ('{\n  "a": 1 // one, two\n  // the end\n}', ("b",), 2, '{\n  "a": 1, // one, two\n  "b": 2\n  // the end\n}'),
    ('{\n  "a": 1 /* , */,\n  "c": 3\n}', ("a",), 2, '{\n  "a": 2 /* , */,\n  "c": 3\n}'),
    ('{\n    "l": [\n        {"x": 1}\n    ]\n}', ("l", 1), {"y": 2}, '{\n    "l": [\n        {"x": 1},\n        {\n          "y": 2\n        }\n    ]\n}'),
    ('{"l": []}', ("l", 0), 1, '{"l": [\n  1\n]}'), ('{"e": {"a": "}"}}', ("e", "b"), 2, '{"e": {"a": "}", "b": 2}}'),
    ("// all\n{\n  // none\n}\n", ("a",), 1, '// all\n{\n  "a": 1\n  // none\n}\n'),
    ('{"a": 1, "b": 2}', ("b",), ampproxy.GONE, '{"a": 1}'), ('{"a": 1, "b": 2}', ("a",), ampproxy.GONE, '{"b": 2}'),
    ('{\n  "a": 1, // one\n  "b": 2\n}', ("b",), ampproxy.GONE, '{\n  "a": 1 // one\n}'), ('{\n  "a": 1,\n  "b": 2, // two\n}', ("b",), ampproxy.GONE, '{\n  "a": 1,\n}'),
    ('{\n  "a": 1,\n  "b": {\n    "c": 1\n  }\n}', ("b",), ampproxy.GONE, '{\n  "a": 1\n}'), ('{"l": [1, 2, 3]}', ("l", 1), ampproxy.GONE, '{"l": [1, 3]}'),
])  # fmt: skip
def test_json_is_edited_as_text(before, keys, value, after):
    assert jsonc(before, keys, value) == after
    plain_value = ampproxy.with_step(ampproxy.read_json_text(before), keys, value)
    assert ampproxy.read_json_text(after) == plain_value


@pytest.mark.parametrize("text", [
    "{", "[]", '{"a"}', '{"a": }', '{"a": 1 "b": 2}', '{"a": 1} x', "{'a': 1}", '{"a": 1,,}', "{,}", '{1: 2}', '{"a": [1 2]}', "/* {}", "x", '{"a": ' * 5000,
])  # fmt: skip
def test_what_is_no_json_is_said_so(text):
    with pytest.raises(ValueError):
        ampproxy.read_json_text(text)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
COMMENTS = st.sampled_from(["", " ", "\n", " // x\n", "/* , } */", '\n  // "q\n', "\t"])


@st.composite
def commented(draw, value):
    """The JSON of a value with comments and blanks wherever they may stand, and trailing commas."""
    if isinstance(value, dict):
        parts = [
            f"{json.dumps(k)}{draw(COMMENTS)}:{draw(COMMENTS)}{draw(commented(v))}"
            for k, v in value.items()
        ]
    elif isinstance(value, list):
        parts = [draw(commented(v)) for v in value]
    else:
        return json.dumps(value)
    inside = ",".join(draw(COMMENTS) + part + draw(COMMENTS) for part in parts)
    if parts and draw(st.booleans()):
        inside += "," + draw(COMMENTS)
    return "{}"[0] + inside + "}" if isinstance(value, dict) else "[" + inside + "]"


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.data(),
    st.dictionaries(st.text(max_size=4), ANY_JSON, max_size=4),
    st.text(max_size=4),
    ANY_JSON,
)
def test_an_edit_changes_one_value_and_no_other(data, table, key, value):
    text = data.draw(commented(table))
    put = ampproxy.json_put(text, (key,), value)
    assert ampproxy.read_json_text(put) == {**table, key: value}
    comments = re.findall(r"// x\n|/\* , } \*/", text)
    if key not in table:
        assert len(re.findall(r"// x\n|/\* , } \*/", put)) >= len(comments), "no comment is lost"
        gone = ampproxy.json_drop(put, (key,))
        assert ampproxy.read_json_text(gone) == table


TOML_TABLE = {"name": "ampproxy", "base_url": "http://x/v1"}
TOML_LINES = '[model_providers.ampproxy]\nname = "ampproxy"\nbase_url = "http://x/v1"\n'


@pytest.mark.parametrize(("before", "keys", "value", "after"), [
    ("", ("model",), "m", 'model = "m"\n'), ('model = "o" # why\n[t]\nmodel = "t"\n', ("model",), "m", 'model = "m" # why\n[t]\nmodel = "t"\n'),
    ("# c\n[t]\nmodel = 'x'\n", ("model",), "m", "model = \"m\"\n# c\n[t]\nmodel = 'x'\n"),
    ("", ("model_providers", "ampproxy"), TOML_TABLE, TOML_LINES), ("a = 1\n", ("model_providers", "ampproxy"), TOML_TABLE, "a = 1\n\n" + TOML_LINES),
    ('[model_providers.ampproxy] # old\nname = "o"\n\n[z]\na = 1\n', ("model_providers", "ampproxy"), TOML_TABLE, TOML_LINES + "\n[z]\na = 1\n"),
    ("a = 1\n\n" + TOML_LINES, ("model_providers", "ampproxy"), ampproxy.GONE, "a = 1\n"), (TOML_LINES, ("model_providers", "ampproxy"), ampproxy.GONE, ""),
    ('a = 1\nmodel = "m"\nb = 2\n', ("model",), ampproxy.GONE, "a = 1\nb = 2\n"),
])  # fmt: skip
def test_toml_is_edited_as_text(before, keys, value, after):
    drop = value is ampproxy.GONE
    got = ampproxy.toml_drop(before, keys) if drop else ampproxy.toml_put(before, keys, value)
    assert got == after


CLIENT_FILES = {
    "amp": {".config/amp/settings.json": '{\n  // mine\n  "amp.notifications": true, // loud\n}\n', ".local/share/amp/secrets.json": '{"apiKey@https://ampcode.com/": "sgamp_user_secret"}'},
    "droid": {".factory/settings.json": '{\n    "customModels": [\n        // own\n        {"model": "own", "displayName": "Own"}\n    ]\n}\n'},
    "claude-code": {".claude/settings.json": '{\n  "env": {"FOO": "1"},\n  "model": "opus"\n}\n'},
    "codex": {".codex/config.toml": '# mine\nmodel = "o3-gone" # once good\n\n[projects."/x"] # p\ntrust_level = "trusted"\n'},
}  # fmt: skip


def client_home(tmp_path, monkeypatch, files, **config):
    """A home with these files, a config.yaml with a Claude and an OpenAI key, and no client on the PATH."""
    home = tmp_path / "user"
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(home))
    for name in (
        "XDG_CONFIG_HOME",
        "XDG_DATA_HOME",
        "AMP_SETTINGS_FILE",
        "CLAUDE_CONFIG_DIR",
        "CODEX_HOME",
        "SSH_CONNECTION",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    given = {"auth-dir": str(tmp_path / "auth"), "claude-api-key": [{"api-key": "sk-ant-secret"}],
             "codex-api-key": [{"api-key": "sk-secret", "models": ["gpt-5.5", "gpt-5.4"]}], **config}  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))

    def run(*args):
        return ampproxy.main([*args, "--config", str(tmp_path / "config.yaml")])

    return home, run


def tree(folder):
    return {
        str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.mark.parametrize("name", CLIENT_FILES)
def test_a_client_is_set_up_once_and_undone(tmp_path, monkeypatch, capsys, name):
    home, run = client_home(tmp_path, monkeypatch, CLIENT_FILES[name])
    before = tree(home)
    for path in home.rglob("*.*"):
        if path.is_file():
            path.chmod(0o640)
    assert run("setup", name) == 0
    told = capsys.readouterr()
    assert "Next: ampproxy.py" in told.out
    assert f"setup {name} --undo" in told.out
    assert not re.search("secret(?!s)|Traceback", told.out + told.err)
    first = tree(home)
    for path, text in before.items():
        assert first[path + ampproxy.BACKUP] == text
        for comment in re.findall(r"(?://|#) \w.*", text):
            assert comment in first[path], "comments stay"
        assert stat.S_IMODE((home / path).stat().st_mode) == 0o640
        assert stat.S_IMODE((home / (path + ampproxy.BACKUP)).stat().st_mode) == 0o600
    assert run("setup", name) == 0
    assert "set up already" in capsys.readouterr().out
    assert tree(home) == first
    assert run("setup", name, "--url", "http://box:9000/") == 0
    assert "http://box:9000" in "".join(tree(home).values())
    assert "127.0.0.1" not in "".join(
        text for path, text in tree(home).items() if "secrets" not in path
    )
    assert run("setup", name, "--undo") == 0
    capsys.readouterr()
    after = {path: read_any(path, text) for path, text in tree(home).items()}
    assert after == {path: read_any(path, text) for path, text in before.items()}
    assert run("setup", name, "--undo") == 0
    assert "nothing to undo" in capsys.readouterr().out


def read_any(path, text):
    return ampproxy.read_toml(text) if path.endswith(".toml") else ampproxy.read_json_text(text)


@pytest.mark.parametrize("name", CLIENT_FILES)
def test_undo_brings_back_every_byte(tmp_path, monkeypatch, name):
    home, run = client_home(tmp_path, monkeypatch, CLIENT_FILES[name])
    before = tree(home)
    assert (run("setup", name), run("setup", name, "--undo")) == (0, 0)
    assert tree(home) == before


@pytest.mark.parametrize("name", CLIENT_FILES)
def test_files_that_were_not_there_go_again(tmp_path, monkeypatch, name):
    home, run = client_home(tmp_path, monkeypatch, {})
    assert run("setup", name) == 0
    assert tree(home)
    assert {stat.S_IMODE(p.stat().st_mode) for p in home.rglob("*") if p.is_file()} == {0o600}
    assert run("setup", name, "--undo") == 0
    assert tree(home) == {}


@pytest.mark.parametrize("name", CLIENT_FILES)
def test_undo_keeps_what_others_changed_since(tmp_path, monkeypatch, name):
    home, run = client_home(tmp_path, monkeypatch, CLIENT_FILES[name])
    before = {path: read_any(path, text) for path, text in tree(home).items()}
    assert run("setup", name) == 0
    for path in before:
        file, form = (
            home / path,
            (ampproxy.toml_put if path.endswith(".toml") else ampproxy.json_put),
        )
        file.write_text(form(file.read_text(), ("later",), "kept"))
    assert run("setup", name, "--undo") == 0
    assert {path: read_any(path, text) for path, text in tree(home).items()} == {
        path: {**table, "later": "kept"} for path, table in before.items()
    }


def test_what_each_client_is_told(tmp_path, monkeypatch):
    files = {path: text for one in CLIENT_FILES.values() for path, text in one.items()}
    home, run = client_home(tmp_path, monkeypatch, files, **{"api-keys": ["sesame-open"]})
    for name in CLIENT_FILES:
        assert run("setup", name) == 0
    said = {
        path: read_any(path, text)
        for path, text in tree(home).items()
        if not path.endswith(ampproxy.BACKUP)
    }
    assert said[".config/amp/settings.json"] == {
        "amp.notifications": True,
        "amp.url": "http://127.0.0.1:8317",
    }
    assert said[".local/share/amp/secrets.json"]["apiKey@http://127.0.0.1:8317"] == "sesame-open", (
        "it is the proxy's key that is asked for"
    )
    assert (
        said[".local/share/amp/secrets.json"]["apiKey@https://ampcode.com/"] == "sgamp_user_secret"
    )
    assert said[".claude/settings.json"] == {"model": "opus", "env": {
        "FOO": "1", "ANTHROPIC_BASE_URL": "http://127.0.0.1:8317", "ANTHROPIC_AUTH_TOKEN": "sesame-open", "ENABLE_TOOL_SEARCH": "true"}}  # fmt: skip
    codex = said[".codex/config.toml"]
    assert (codex["model"], codex["model_provider"]) == ("gpt-5.5", "ampproxy")
    assert codex["model_providers"]["ampproxy"] == {
        "name": "ampproxy", "base_url": "http://127.0.0.1:8317/v1", "wire_api": "responses", "http_headers": {"X-Api-Key": "sesame-open"}}  # fmt: skip
    own, *models = said[".factory/settings.json"]["customModels"]
    assert own == {"model": "own", "displayName": "Own"}
    assert {(m["provider"], m["baseUrl"]) for m in models if m["model"].startswith("claude-")} == {
        ("anthropic", "http://127.0.0.1:8317")
    }
    assert {(m["provider"], m["baseUrl"]) for m in models if m["model"].startswith("gpt-")} == {
        ("openai", "http://127.0.0.1:8317/v1")
    }
    assert len(models) == 21
    assert next(m for m in models if m["model"] == "gpt-5.5") == {
        "model": "gpt-5.5",
        "displayName": "gpt-5.5 (ampproxy)",
        "provider": "openai",
        "baseUrl": "http://127.0.0.1:8317/v1",
        "apiKey": "sesame-open",
        "maxOutputTokens": 32000,
    }


def test_fields_that_droid_adds_are_no_change(tmp_path, monkeypatch, capsys):
    home, run = client_home(tmp_path, monkeypatch, {})
    assert run("setup", "droid") == 0
    file = home / ".factory/settings.json"
    told = json.loads(file.read_text())
    for index, model in enumerate(told["customModels"]):
        model |= {"id": f"custom:{index}", "index": index}
    file.write_text(json.dumps(told))
    capsys.readouterr()
    assert run("setup", "droid") == 0
    assert "set up already" in capsys.readouterr().out
    assert run("setup", "droid", "--undo") == 0
    assert tree(home) == {}


def test_a_model_that_is_served_stays(tmp_path, monkeypatch):
    home, run = client_home(tmp_path, monkeypatch, {".codex/config.toml": 'model = "gpt-5.4"\n'})
    assert run("setup", "codex") == 0
    assert read_any(".toml", (home / ".codex/config.toml").read_text())["model"] == "gpt-5.4"


def test_claude_code_is_given_a_model_where_nobody_serves_claudes(tmp_path, monkeypatch):
    row = {"base-url": "http://127.0.0.1:9", "api-key": "sk-ant-x", "models": ["kimi-k2"]}
    home, run = client_home(tmp_path, monkeypatch, {}, **{"claude-api-key": [row]})
    assert run("setup", "claude-code") == 0
    environment = json.loads((home / ".claude/settings.json").read_text())["env"]
    assert (environment["ANTHROPIC_MODEL"], environment["ANTHROPIC_DEFAULT_HAIKU_MODEL"]) == (
        "kimi-k2",
        "kimi-k2",
    )


BROKEN = {"amp": (".config/amp/settings.json", '"amp.url": "http://127.0.0.1:8317"'), "droid": (".factory/settings.json", '"customModels": [{"model": "gpt-5.5"'),
          "claude-code": (".claude/settings.json", '"env": {"ANTHROPIC_BASE_URL": "http://127.0.0.1:8317"}'), "codex": (".codex/config.toml", 'model_provider = "ampproxy"')}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_is_left_alone(tmp_path, monkeypatch, capsys, name):
    path, line = BROKEN[name]
    home, run = client_home(tmp_path, monkeypatch, {path: '{"a": '})
    assert run("setup", name) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    assert f"{home / path} is no " in told.err
    assert line in told.err
    assert tree(home) == {path: '{"a": '}


@pytest.mark.parametrize(
    "text",
    [
        'model_providers = { other = { name = "x" } }\n',
        'model_providers.other.name = "x"\n[model_providers]\n',
        'text = """\nmodel = "x"\n[model_providers.ampproxy]\n"""\n',
    ],
)
def test_an_unusual_layout_is_refused_not_damaged(tmp_path, monkeypatch, capsys, text):
    home, run = client_home(tmp_path, monkeypatch, {".codex/config.toml": text})
    with suppress(ValueError):
        ampproxy.read_toml(text)
    assert run("setup", "codex") == 1
    assert "stays as it is" in capsys.readouterr().err
    assert tree(home) == {".codex/config.toml": text}


@pytest.mark.parametrize("text", ['{"customModels": {"a": 1}}', '{"customModels": null}'])
def test_a_value_of_another_kind_is_not_overwritten(tmp_path, monkeypatch, capsys, text):
    home, run = client_home(tmp_path, monkeypatch, {".factory/settings.json": text})
    assert run("setup", "droid") == 1
    assert "of another kind" in capsys.readouterr().err
    assert tree(home) == {".factory/settings.json": text}


def test_a_home_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, capsys):
    home, run = client_home(tmp_path, monkeypatch, {".codex": "a file in the way"})
    assert run("setup", "codex") == 1
    assert re.fullmatch(
        r"ampproxy: \S+/.codex/config.toml cannot be (read|written): .*\n", capsys.readouterr().err
    )
    assert tree(home) == {".codex": "a file in the way"}


def test_a_link_stays_a_link(tmp_path, monkeypatch):
    home, run = client_home(tmp_path, monkeypatch, {"dotfiles/amp.json": "{}", ".config/amp/x": ""})
    (home / ".config/amp/settings.json").symlink_to(home / "dotfiles/amp.json")
    assert run("setup", "amp") == 0
    assert (home / ".config/amp/settings.json").is_symlink()
    assert json.loads((home / "dotfiles/amp.json").read_text()) == {
        "amp.url": "http://127.0.0.1:8317"
    }


def test_amps_other_places(tmp_path, monkeypatch, capsys):
    home, run = client_home(
        tmp_path, monkeypatch, {".config/amp/settings.jsonc": "{} // c\n", "own.json": "{}"}
    )
    assert run("setup", "amp") == 0
    assert "amp.url" in (home / ".config/amp/settings.jsonc").read_text()
    assert "No key of Amp was found" in capsys.readouterr().out
    monkeypatch.setenv("AMP_SETTINGS_FILE", str(home / "own.json"))
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "data"))
    (home / "data/amp").mkdir(parents=True)
    (home / "data/amp/secrets.json").write_text('{"apiKey@https://ampcode.com": "sgamp_x"}')
    assert run("setup", "amp") == 0
    assert "amp.url" in (home / "own.json").read_text()
    assert (
        json.loads((home / "data/amp/secrets.json").read_text())["apiKey@http://127.0.0.1:8317/"]
        == "sgamp_x"
    )


def test_setup_alone_says_what_it_would_do_and_does_nothing(tmp_path, monkeypatch, capsys):
    files = {**CLIENT_FILES["amp"], **CLIENT_FILES["codex"], ".claude/settings.json": "{"}
    home, run = client_home(tmp_path, monkeypatch, files)
    before = tree(home)
    assert run("setup") == 0
    out = capsys.readouterr().out
    for words in (
        'amp.url: nothing -> "http://127.0.0.1:8317"',
        'model: "o3-gone" -> "gpt-5.5"',
        "is no JSON",
        "droid: not found",
        "Next: ampproxy.py setup amp|codex",
    ):
        assert words in out
    assert "sgamp_user" not in out
    assert tree(home) == before
    assert run("setup", "--undo") == 2
    assert run("setup", "amp", "--url", "box") == 2
    assert "no address" in capsys.readouterr().err


# -- import --


def jwt(**fields):
    return f"h.{base64.urlsafe_b64encode(json.dumps(fields).encode()).decode().rstrip('=')}.s"


def foreign_files(now, **more):
    """The login files of four other programs."""
    auth = {"chatgpt_account_id": "acc-1", "chatgpt_plan_type": "plus"}
    codex = {"id_token": jwt(email="carl@example.com", **{"https://api.openai.com/auth": auth}),
             "access_token": jwt(exp=int(now + 9 * 86400)), "refresh_token": "rt_carl", "account_id": "acc-1"}  # fmt: skip
    claude = {
        "accessToken": "sk-ant-oat-cli",
        "refreshToken": "sk-ant-ort-cli",
        "expiresAt": int((now + 7200) * 1000),
        "subscriptionType": "max",
    }
    google = {
        "access_token": "ya29.g",
        "refresh_token": "1//g",
        "token_type": "Bearer",
        "id_token": jwt(email="gina@example.com"),
        "expiry_date": int((now - 7200) * 1000),
    }
    return {
        ".claude/.credentials.json": json.dumps({"claudeAiOauth": claude}), ".claude.json": json.dumps({"oauthAccount": {"emailAddress": "fred@example.com"}}),
        ".codex/auth.json": json.dumps({"OPENAI_API_KEY": None, "tokens": codex, "last_refresh": "2026-11-01T00:00:00Z"}),
        ".gemini/oauth_creds.json": json.dumps(google), ".cli-proxy-api/claude-zoe@example.com.json": json.dumps(
            {"type": "claude", "email": "zoe@example.com", "access_token": "sk-ant-oat-zoe", "refresh_token": "r", "expired": "2099-01-01T00:00:00Z", "note": "kept"}),
        ".cli-proxy-api/broken.json": "{", ".cli-proxy-api/other.json": '{"type": "qwen", "access_token": "x"}', **more,
    }  # fmt: skip


def test_import_copies_on_a_yes_and_writes_nothing_elsewhere(tmp_path, monkeypatch, capsys):
    home, run = client_home(tmp_path, monkeypatch, foreign_files(time.time()))
    before, auth = tree(home), tmp_path / "auth"
    assert run("import") == 1
    told = capsys.readouterr()
    assert told.err == "ampproxy: nothing was copied; `ampproxy.py import --yes` does it\n"
    for words in ("Claude Code: claude fred@example.com, good for 1 h 59 min", "Codex CLI: codex carl@example.com, good for 8 d", "expired 2 h 0 min ago", "CLIProxyAPI: claude zoe@example.com",
                  "cannot be read", "A refresh token of Claude or ChatGPT works once"):  # fmt: skip
        assert words in told.out
    assert not re.search("sk-ant|rt_carl|ya29", told.out)
    assert not auth.exists()
    assert run("import", "codex", "--yes") == 0
    assert [path.name for path in auth.iterdir()] == ["codex-carl@example.com.json"]
    assert run("import", "--yes") == 0
    assert tree(home) == before
    tokens = {path.name: json.loads(path.read_text()) for path in auth.iterdir()}
    assert {*tokens} == {
        "codex-carl@example.com.json",
        "claude-fred@example.com.json",
        "claude-zoe@example.com.json",
        "gemini-gina@example.com.json",
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in auth.iterdir()} == {0o600}
    claude, codex = tokens["claude-fred@example.com.json"], tokens["codex-carl@example.com.json"]
    assert (claude["access_token"], claude["refresh_token"], claude["plan"]) == (
        "sk-ant-oat-cli",
        "sk-ant-ort-cli",
        "max",
    )
    assert claude["source"] == {
        "program": "Claude Code",
        "file": str(home / ".claude/.credentials.json"),
    }
    assert (codex["account_id"], codex["refresh_token"], codex["last_refresh"]) == (
        "acc-1",
        "rt_carl",
        "2026-11-01T00:00:00Z",
    )
    assert ampproxy.parse_time(codex["expired"]) == pytest.approx(time.time() + 9 * 86400, abs=60)
    assert tokens["claude-zoe@example.com.json"]["note"] == "kept"
    assert tokens["gemini-gina@example.com.json"]["token"]["refresh_token"] == "1//g"
    capsys.readouterr()
    assert run("import") == 0
    assert "nothing to copy" in capsys.readouterr().out
    assert {path.name: json.loads(path.read_text()) for path in auth.iterdir()} == tokens


def test_import_takes_what_is_newer_and_leaves_logins_of_our_own(tmp_path, monkeypatch, capsys):
    now = time.time()
    home, run = client_home(tmp_path, monkeypatch, foreign_files(now))
    own = token_file(tmp_path / "auth", "zoe@example.com")
    before = own.read_text()
    assert run("import", "--yes") == 0
    assert "zoe@example.com, good for" in (told := capsys.readouterr().out)
    assert "signed in here already" in told
    assert own.read_text() == before
    newer = foreign_files(now + 3600)[".claude/.credentials.json"].replace("oat-cli", "oat-new")
    (home / ".claude/.credentials.json").write_text(newer)
    assert run("import", "--yes") == 0
    assert "newer than the copy here" in capsys.readouterr().out
    assert (
        json.loads((tmp_path / "auth/claude-fred@example.com.json").read_text())["access_token"]
        == "sk-ant-oat-new"
    )


def test_a_newer_token_of_gemini_cli_is_taken(tmp_path, monkeypatch, capsys):
    """Its tokens stand in a table of their own, in the copy as well."""
    now = time.time()
    home, run = client_home(tmp_path, monkeypatch, foreign_files(now))
    assert run("import", "gemini", "--yes") == 0
    path = tmp_path / "auth/gemini-gina@example.com.json"
    newer = foreign_files(now + 9000)[".gemini/oauth_creds.json"].replace("ya29.g", "ya29.new")
    (home / ".gemini/oauth_creds.json").write_text(newer)
    pool = ampproxy.Pool(ampproxy.Live(tmp_path / "config.yaml"))
    login = next(one for one in pool.scan() if isinstance(one, ampproxy.Login))
    assert login.access_token == "ya29.g"
    pool.adopt(login)
    assert (login.access_token, login.expires > now) == ("ya29.new", True)
    assert json.loads(path.read_text())["token"]["access_token"] == "ya29.new"
    capsys.readouterr()
    assert run("import", "gemini") == 0
    assert "copied already" in capsys.readouterr().out


@pytest.mark.parametrize(("files", "words"), [
    ({}, "no login of another program was found; looked at "), ({".codex/auth.json": '{"OPENAI_API_KEY": "sk-secret-key", "tokens": null}'}, "Codex CLI: no login is in it"),
    ({".claude/.credentials.json": '{"claudeAiOauth": {"accessToken": "t", "expiresAt": "x"}}'}, "claude from-claude, expiry unknown; can be copied"),
    ({".claude/.credentials.json": "[]"}, "cannot be read"), ({".codex/auth.json": '{"tokens": {"access_token": "a.b.c", "id_token": 5}}'}, "codex from-codex, expiry unknown"),
    ({".gemini/oauth_creds.json": '{"access_token": "ya29.x", "expiry_date": 1e300}', ".gemini/google_accounts.json": '{"active": "gina@example.com"}'}, "gemini gina@example.com"),
])  # fmt: skip
def test_odd_files_of_other_programs(tmp_path, monkeypatch, capsys, files, words):
    _, run = client_home(tmp_path, monkeypatch, files)
    run("import")
    told = capsys.readouterr()
    assert words in told.out + told.err
    assert "sk-secret" not in told.out + told.err


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_value_in_a_foreign_file_is_a_surprise(tmp_path, data):
    """Whatever stands in the places that are read: a login, or none, and a word about it."""
    files = foreign_files(0)
    names = (
        ".claude/.credentials.json",
        ".codex/auth.json",
        ".gemini/oauth_creds.json",
        ".cli-proxy-api/claude-zoe@example.com.json",
    )
    for source, name in zip(ampproxy.SOURCES, names, strict=True):
        told = json.loads(files[name])
        for table in [told, *(one for one in told.values() if isinstance(one, dict))]:
            for key in [*table]:
                if data.draw(st.booleans()):
                    table[key] = data.draw(ANY_JSON)
        path = tmp_path / "auth.json"
        path.write_text(json.dumps(told))
        words, token = ampproxy.judge_source(source, path)
        assert words
        if token:
            assert ampproxy.token_name(token["type"], token["email"])
            assert isinstance(ampproxy.newer_at_source(token | {"expired": ""}), dict)
            ampproxy.Login(path, token)


def test_import_asks_at_a_terminal(tmp_path):
    (tmp_path / ".claude").mkdir()
    (tmp_path / ".claude/.credentials.json").write_text(
        foreign_files(time.time())[".claude/.credentials.json"]
    )
    for answer, code in (("n\r", 1), ("\x03", 1), ("\x04", 1), ("y\r", 0)):
        with Terminal(tmp_path, "import") as terminal:
            terminal.until("[y/N]")
            assert not [*tmp_path.glob(".ampproxy/*")]
            os.write(terminal.master, answer.encode())
            assert terminal.end() == code
    assert [path.name for path in tmp_path.glob(".ampproxy/*")] == ["claude-from-claude.json"]


@in_loop
async def test_a_copied_login_takes_newer_tokens_from_its_source_first(tmp_path, caplog):
    source = tmp_path / "there/.credentials.json"
    source.parent.mkdir()

    def write(token, hours):
        oauth = {
            "accessToken": token,
            "refreshToken": f"{token}-refresh",
            "expiresAt": (1_800_000_000 + hours * 3600) * 1000,
        }
        source.write_text(json.dumps({"claudeAiOauth": oauth}))

    caplog.set_level(logging.INFO)
    origin = {"program": "Claude Code", "file": str(source)}
    async with world(tmp_path, ()) as w:
        path = token_file(w.auth, expired="2027-01-15T09:00:00Z", source=origin)
        w.server.tick()
        write("sk-ant-oat-theirs", 8)
        assert (await w.ask("/v1/messages", ASK)).status == 200
        assert bearer_of(w.claude.last) == "fred@example.com", "while ours is good it stays"
        w.clock.now = 3590
        assert (await w.ask("/v1/messages", ASK)).status == 200
        assert bearer_of(w.claude.last) == "theirs"
        assert "Claude Code has a newer token" in caplog.text
        token = json.loads(path.read_text())
        assert (token["refresh_token"], token["note"], token["source"]) == (
            "sk-ant-oat-theirs-refresh",
            "kept",
            origin,
        )
        assert not w.authority.requests
        w.clock.now = 8 * 3600 + 10
        assert (await w.ask("/v1/messages", ASK)).status == 200
        assert bearer_of(w.claude.last) == "new"
        assert w.authority.body()["refresh_token"] == "sk-ant-oat-theirs-refresh"
        assert "Claude Code may need a new login now" in caplog.text
        # The refresh token was used there: what they have now is taken, and the account is back.
        write("sk-ant-oat-again", 40)
        w.authority.usual = answer_json({"error": "invalid_grant"}, 400)
        w.claude.script = [said(401)]
        assert (await w.ask("/v1/messages", ASK)).status == 200
        assert bearer_of(w.claude.last) == "again"
        assert json.loads(source.read_text())["claudeAiOauth"]["accessToken"] == "sk-ant-oat-again"


@in_loop
async def test_a_login_of_somebody_else_at_the_source_is_not_taken(tmp_path):
    source = tmp_path / "there/.credentials.json"
    source.parent.mkdir()
    (source.parent / ".claude.json").write_text(
        json.dumps({"oauthAccount": {"emailAddress": "boss@example.com"}})
    )
    source.write_text(
        json.dumps(
            {"claudeAiOauth": {"accessToken": "sk-ant-oat-boss", "expiresAt": 1_900_000_000_000}}
        )
    )
    async with world(tmp_path, ()) as w:
        token_file(
            w.auth,
            expired="2027-01-15T07:00:00Z",
            source={"program": "Claude Code", "file": str(source)},
        )
        w.server.tick()
        assert (await w.ask("/v1/messages", ASK)).status == 200
        assert bearer_of(w.claude.last) == "new"


# -- The list of logins --


def login_home(tmp_path, **config):
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"auth-dir": str(tmp_path / "auth"), "port": 1, **config})
    )
    return token_file(tmp_path / "auth", expired="2099-01-01T00:00:00Z", plan="max")


def test_the_list_of_logins_moves_and_disconnects(tmp_path):
    path = login_home(tmp_path)
    with Terminal(tmp_path, "login", "--config", "config.yaml", TERM="vt100") as terminal:
        first = terminal.shows("q leaves")
        assert "proxy not running" in first
        assert re.search(r"claude\n > fred@example.com \(max\) +ready +token \d+ d", first)
        assert "   sign in with another account\n\ncodex\n   sign in with an account" in first
        assert max(map(len, first.splitlines())) < 80
        terminal.shows("Disconnect fred@example.com", "d")
        terminal.shows(r"q leaves\n*$", "n")
        assert path.exists()
        terminal.shows(" > sign in with another", "\x1bOB")
        terminal.shows("Choose an account", "d")
        terminal.shows(" > fred", "k")
        terminal.shows(
            r"Disconnect fred@example.com \(deletes claude-fred@example.com.json\)\?", "d"
        )
        screen = terminal.shows("fred@example.com is disconnected", "y")
        assert "claude\n > sign in with an account" in screen
        assert not path.exists()
        terminal.shows("codex\n > sign in", "\x1bOA\x1bOA\x1bOBx")
        os.write(terminal.master, b"q")
        assert terminal.end() == 0


@pytest.mark.parametrize("end", ["q", "\x03", signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_terminal_is_as_it_was_after_any_end(tmp_path, end):
    login_home(tmp_path)
    with Terminal(tmp_path, "login", "--config", "config.yaml") as terminal:
        terminal.until("q leaves", 0)
        assert "\x1b[?1049h" in terminal.seen
        assert termios.tcgetattr(terminal.slave) != terminal.before
        if isinstance(end, str):
            os.write(terminal.master, end.encode())
        else:
            terminal.process.send_signal(end)
        assert terminal.end() == 0


def test_the_terminal_is_as_it_was_after_a_crash(tmp_path):
    login_home(tmp_path)
    source = """
import ampproxy, sys
def take(menu, curses, key):
    raise ZeroDivisionError("a fault of the list")
ampproxy.Menu.take = take
sys.exit(ampproxy.main(["login", "--config", "config.yaml"]))"""
    with Terminal(tmp_path, script=("-c", source), PYTHONPATH=str(HERE)) as terminal:
        terminal.until("q leaves", 0)
        os.write(terminal.master, b"x")
        assert terminal.end() == 1
        assert plain_text(terminal.seen).endswith("ampproxy: a fault of the list\r\n")


def test_the_list_fits_any_size(tmp_path):
    login_home(tmp_path)
    with Terminal(
        tmp_path, "login", "--config", "config.yaml", rows=3, columns=12, TERM="vt100"
    ) as terminal:
        terminal.shows("ampproxy")
        for rows, columns, words in (
            (24, 80, "q leaves"),
            (1, 1, ""),
            (60, 30, "fred@example.com"),
            (2, 200, "q leaves"),
        ):
            terminal.resize(rows, columns)
            terminal.shows(words)
        terminal.shows("q leaves", "j")
        os.write(terminal.master, b"q")
        assert terminal.end() == 0


def test_a_terminal_that_cannot_show_it_is_told_the_words(tmp_path):
    login_home(tmp_path)
    with Terminal(
        tmp_path, "login", "--config", "config.yaml", TERM="no-such-terminal"
    ) as terminal:
        terminal.until("cannot show the list", 0)
        assert terminal.end() == 1
        assert "ampproxy.py login claude|codex" in terminal.seen


@in_loop
async def test_the_list_shows_what_the_proxy_knows_and_signs_in(tmp_path):
    async with authority(tmp_path) as fake, busy_world(tmp_path) as w:
        text = yaml.safe_load(w.file.read_text())
        text["providers"]["claude"] |= {
            "authorize-url": fake.url + "/authorize",
            "token-url": fake.url + "/token",
            "callback-port": free_port(),
        }
        w.file.write_text(yaml.safe_dump(text))
        with await asyncio.to_thread(
            functools.partial(Terminal, tmp_path, "login", "--config", str(w.file), TERM="vt100")
        ) as terminal:
            await asyncio.to_thread(terminal.shows, "resting, wakes in 15 min")
            shown = await asyncio.to_thread(terminal.shows, "96 %.*resets")
            assert "proxy running" in shown
            assert re.search(
                r"bert@example.com +ready[^\n]*\n +5h +█{8}░{12}  42 %  resets in", shown
            )
            assert re.search(r"7d +█{19}░  96 %", shown)
            start = len(terminal.seen)
            await asyncio.to_thread(os.write, terminal.master, b"\r")
            await asyncio.to_thread(terminal.until, "paste the address", start)
            await asyncio.to_thread(terminal.shows, "\n stopped\n", "\x03")
            start = len(terminal.seen)
            await asyncio.to_thread(os.write, terminal.master, b"\r")
            told = await asyncio.to_thread(terminal.until, "paste the address", start)
            asked = query_of(told)
            done = f"{asked['redirect_uri']}?code=c0de&state={asked['state']}"
            async with aiohttp.ClientSession() as http, http.get(done) as page:
                assert page.status == 200
            await asyncio.to_thread(terminal.shows, "Signed in to claude")
            await asyncio.to_thread(terminal.shows, "> bert", "j")
            await asyncio.to_thread(os.write, terminal.master, b"q")
            assert await asyncio.to_thread(terminal.end) == 0
    assert (tmp_path / "auth/claude-fred@example.com.json").exists()


# -- check --


def test_check_says_who_answers_amp_and_what_to_add(tmp_path, monkeypatch, capsys):
    auth = tmp_path / "auth"
    rows = {
        "claude": {
            "models": ["claude-opus-4-7", "claude-sonnet-4-6", "claude-3-5-haiku"],
            "excluded-models": ["claude-sonnet-*"],
        }
    }
    _, run = client_home(
        tmp_path, monkeypatch, {}, **{"claude-api-key": [], "codex-api-key": [], "providers": rows}
    )
    token_file(auth, expired="2099-01-01T00:00:00Z")
    assert run("check") == 0
    out = capsys.readouterr().out
    assert (
        "# claude fred@example.com: claude-opus-4-7, claude-sonnet-4-6, claude-3-5-haiku, but not claude-sonnet-*"
        in out
    )
    assert "# smart            claude-opus-4-7              local: claude" in out
    assert "# deep             gpt-5.4                      PAID: ampcode.com" in out
    assert "# gpt-5.4: ampproxy.py login codex" not in out, "a Claude can stand for it"
    assert "# gemini-3-pro-image-preview: " in out, "but paints nothing"
    for mode in (
        "rush",
        "large",
        "title",
        "oracle",
        "finder, look_at",
        "librarian",
        "review",
        "painter",
    ):
        assert f"\n# {mode:<17}" in out
    lines = yaml.safe_load(out[out.index("\nampcode:\n  model-mappings") :])["ampcode"][
        "model-mappings"
    ]
    assert {"from": "claude-haiku-4-5-20251001", "to": "claude-3-5-haiku"} in lines, (
        "a quick one for a quick one"
    )
    assert {"from": "claude-opus-4-6", "to": "claude-opus-4-7"} in lines
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({**config, "ampcode": {"model-mappings": lines}})
    )
    assert run("check") == 0
    out = capsys.readouterr().out
    assert (
        "# rush             claude-haiku-4-5-20251001    mapped: claude as claude-3-5-haiku" in out
    )
    assert len(re.findall("PAID", out)) == 1, "the painter"
    assert "- {from:" not in out
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({**config, "ampcode": {"fallback": "never"}})
    )
    assert run("check") == 0
    out = capsys.readouterr().out
    assert "refused: nobody" in out
    assert "PAID" not in out


def test_check_with_no_account_at_all(tmp_path, monkeypatch, capsys):
    _, run = client_home(tmp_path, monkeypatch, {}, **{"claude-api-key": [], "codex-api-key": []})
    assert run("check") == 0
    out = capsys.readouterr().out
    assert "# none: run `ampproxy.py login claude` (or codex)" in out
    assert "# claude-opus-4-7: ampproxy.py login claude or a key under claude-api-key" in out


@pytest.mark.parametrize(
    "args",
    [["check"], ["--help"], ["check", "--help"], ["route", "gpt-5.4"], ["accounts"], ["setup"]],
)
def test_a_pipe_that_closes_early_ends_quietly(tmp_path, args):
    command = [sys.executable, str(SCRIPT), *args]
    reading, writing = os.pipe()
    os.close(reading)  # nobody will read any of it
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=20,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


# == Benchmark =====================================================================================
# `python test_ampproxy.py bench [--quick] [--json] [--soak SECONDS]`: every figure is measured in
# turn, in interleaved rounds, straight at a fake provider, through a plain pass-through (the
# yardstick) and through ampproxy; the same bytes are asked for each time, and every byte that comes
# back is compared.  Times of a shared machine move: quote the ratios.


@dataclass(frozen=True)
class Plan:
    """What the fake is to answer; all of the answer's bytes follow from it, but for the times."""

    seed: int = 0
    events: int = 1
    size: int = 40  # of the padding in each event
    rate: int = 0  # events a second; 0 is as fast as they are taken
    # or json; or 429 or garbage: that once for this seed, then sse; or sse with something odd: stray
    # (a second answer behind it), drip (the head byte by byte), early (before the body is there),
    # cut (no end; of translated answers alone)
    kind: str = "sse"

    @classmethod
    def read(cls, text):
        seed, events, size, rate, kind = text.split(",")
        return cls(int(seed), int(events), int(size), int(rate), kind)

    def __str__(self):
        return f"{self.seed},{self.events},{self.size},{self.rate},{self.kind}"

    def frame(self):
        """The stream's beginning, and its end."""
        start = {**message(usage={"input_tokens": 11, "output_tokens": 1}), "content": []}
        block = event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        ends = event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 7})
        stop = event("content_block_stop", index=0) + ends + event("message_stop")
        return event("message_start", message=start) + block, stop

    def delta(self, index, at=0):
        """An event of a length that depends on the size alone; `at`: when it was sent, in ns."""
        text = f"{self.seed:08d} {index:08d} {at:020d} {'x' * self.size}"
        said = f'"index":0,"delta":{{"type":"text_delta","text":"{text}"}}'
        return f'event: content_block_delta\ndata: {{"type":"content_block_delta",{said}}}\n\n'.encode()

    def words(self):
        """The texts of an answer that is to be translated, one an event."""
        return [f"{self.seed:08d} {index:08d} {'x' * self.size} " for index in range(self.events)]

    def json(self):
        text = f"{self.seed:08d} {'x' * self.size}"
        return json.dumps(message(content=[{"type": "text", "text": text}])).encode()

    def times(self, body):
        """When each event was sent, as the answer tells."""
        each, first = len(self.delta(0)), len(self.frame()[0])
        found = self.delta(0).index(f"{0:020d}".encode())
        at = range(first + found, first + found + each * self.events, each)
        with suppress(ValueError):
            return [int(body[i : i + 20]) for i in at]
        return []

    def body(self, times):
        if self.kind == "json":
            return self.json()
        first, last = self.frame()
        return first + b"".join(self.delta(i, at) for i, at in enumerate(times)) + last


WORDED = 20_000  # small deltas in a stream that is translated
WORDED_PATHS = {
    b"/v1/messages ": "anthropic",
    b"/chat/completions ": "chat",
    b"/responses ": "responses",
    b":streamGenerateContent": "gemini",
}


@functools.lru_cache
def worded_stream(dialect):
    """An answer of so many small deltas, in chunks of 64 kB."""

    def story(reply):
        for index in range(WORDED):
            reply.say(f"word {index} ")
        reply.usage.update(read=10, written=WORDED)
        reply.finish()

    raw = stream_of(dialect, story)
    chunks = [http_chunk(raw[i : i + 65536]) for i in range(0, len(raw), 65536)]
    return [FakeProvider.HEAD, *chunks, b"0\r\n\r\n"]


def http_chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


# The other dialects, for the soak.  No header of a client reaches a foreign provider: the plan stands
# in what is asked, and all texts of the answer follow from it.


def worded_ask(dialect, model, plan, streams):
    """Path and body of a call that asks for a plan."""
    text = f"plan={plan}"
    turn = {"role": "user", "content": text}
    body = {
        "anthropic": {"messages": [turn], "max_tokens": 100},
        "chat": {"messages": [turn]},
        "responses": {"input": [turn]},
        "gemini": {"contents": [{"role": "user", "parts": [{"text": text}]}]},
    }[dialect]
    if dialect != "gemini":
        body |= {"model": model, "stream": streams}
    verb = "streamGenerateContent?alt=sse" if streams else "generateContent"
    return PATHS[dialect].format(model=model, verb=verb), body


def worded_answer(dialect, plan, streams, wraps):
    """The pieces of what a provider of the dialect sends; `wraps`: in Code Assist's envelope."""
    reply, pieces = new_reply(dialect, None if streams else ampproxy.Reply), []
    for words in plan.words():
        reply.say(words)
        pieces.append(b"".join(reply.out))
        reply.out.clear()
    reply.usage.update(read=11, written=7)
    reply.stopped("end")
    reply.finish()
    if not streams:
        whole = DIALECTS[dialect].write_answer(reply)
        return [json.dumps({"response": whole} if wraps else whole).encode()]
    pieces.append(b"".join(reply.out))
    return [b"".join(wrapped(*piece.splitlines()[::2])) for piece in pieces] if wraps else pieces


def text_of(dialect, event):
    """The text of one event, or of an answer in one piece, as a client of the dialect reads it."""
    match dialect, event:
        case "anthropic", {"type": "content_block_delta", "delta": {"text": text}}:
            return text
        case "anthropic", {"content": [{"text": text}]}:
            return text
        case "chat", {"choices": [{"delta": {"content": text}} | {"message": {"content": text}}]}:
            return text or ""
        case "responses", {"type": "response.output_text.delta", "delta": text}:
            return text
        case "responses", {"object": "response", "output": [{"content": [{"text": text}]}]}:
            return text
        case "gemini", {"candidates": [{"content": {"parts": parts}}]}:
            return "".join(part.get("text", "") for part in parts)
    return ""


WORDED_ENDS = {
    "anthropic": b'"type":"message_stop"',
    "chat": b"data: [DONE]",
    "responses": b'"type":"response.completed"',
    "gemini": b'"finishReason":"STOP"',
}


def wrong_words(plan, dialect, streams, raw):
    """What is wrong with a client's answer; "" for nothing: each text is there, and in its event."""
    wanted = plan.words()
    if streams:
        whole = raw.replace(b'": ', b'":').count(WORDED_ENDS[dialect]) == 1
        got = [text for event in data_of(raw) if (text := text_of(dialect, event))]
    else:
        whole, got, wanted = True, [text_of(dialect, json.loads(raw))], ["".join(wanted)]
    if plan.kind == "cut":
        return "its cut was not told" if whole or got != wanted[: len(got)] else ""
    if whole and got == wanted:
        return ""
    return f"its texts are not the right ones: {got[-1:]} is the last of {len(got)}, {raw[-200:]}"


class FakeProvider(asyncio.Protocol):
    """The provider: answers what the header asks for, each event a chunk and, if paced, a write."""

    connections, refused = set(), set()  # of all of them: who is there, whose 429 is out
    google: ClassVar = Counter()  # what Google logins were given: tokens, projects

    def connection_made(self, transport):
        self.transport, self.head, self.left, self.asked = transport, b"", 0, None
        self.body = b""  # of a request whose plan is in there
        self.pieces, self.timer, self.full = None, None, False
        self.connections.add(self)

    def connection_lost(self, error):
        self.connections.discard(self)
        self.pieces = self.timer = self.timer and self.timer.cancel()

    def data_received(self, data):
        if self.asked is None:
            self.head, mark, body = (self.head + data).partition(b"\r\n\r\n")
            if not mark:
                return
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", self.head)
            self.left = int(length[1]) if length else 0
            self.asked, self.head, self.body, data = self.head, b"", b"", body
            if b",early" in self.asked:
                self.answer(self.asked)
        if b"x-stainless-bench" not in self.asked:
            self.body += data
        self.left -= len(data)
        if self.left <= 0:
            asked, self.asked = self.asked, None
            if b",early" not in asked:
                self.answer(asked)
        if (
            self.left < 0
        ):  # behind an early answer the next request may come with the last of the body
            self.data_received(data[self.left :])

    def answer(self, asked):
        found = re.search(rb"(?i)\r\nx-stainless-bench: *(\S+)", asked)
        plan = Plan.read(found[1].decode()) if found else None
        if plan and plan.kind == "429" and plan.seed not in self.refused:
            self.refused.add(plan.seed)
            error = {"type": "rate_limit_error", "message": "slow down"}
            body = json.dumps({"type": "error", "error": error}).encode()
            return self.send(body, "429 Too Many Requests\r\nRetry-After: 1")
        if plan and plan.kind == "garbage" and plan.seed not in self.refused:
            self.refused.add(plan.seed)
            self.transport.write(b"HTTP/1.1 200 OK\r\nX: \x00garbage\r\n")
            return self.transport.close()
        line = asked.partition(b"\r\n")[0]
        dialect = next((name for path, name in WORDED_PATHS.items() if path in line), "")
        if plan is None and (found := re.search(rb"plan=([-\d,]+[a-z0-9]+)", self.body)):
            return self.answer_worded(line, dialect, Plan.read(found[1].decode()))
        if plan is None and dialect:
            self.pieces = iter(worded_stream(dialect))
            return self.pump()
        if plan is None and (given := self.given_to_google(line)):
            return self.send(json.dumps(given).encode())
        if plan is None or plan.kind == "json":
            return self.send(plan.json() if plan else json.dumps(self.state()).encode())
        kind = self.dripping if plan.kind == "drip" else self.paced if plan.rate else self.batches
        self.pieces = kind(plan)
        return self.pump()

    def state(self):
        streams = sum(c.pieces is not None for c in self.connections)
        others = len(self.connections) - 1
        return {"connections": others, "streams": streams, "google": self.google}

    def given_to_google(self, line):
        """A login's token and its project, which an onboarding makes."""
        if b"/token " in line:
            self.google["tokens"] += 1
            number = self.google["tokens"]
            fresh = {"access_token": f"ya29.{number}", "refresh_token": f"1//0{number}"}
            return {**fresh, "expires_in": 3599}
        if b":loadCodeAssist " in line:
            return TIERS
        if b":onboardUser " in line:
            self.google["projects"] += 1
            return {"done": True, "response": {"cloudaicompanionProject": {"id": "proj-1"}}}
        return None

    def answer_worded(self, line, dialect, plan):
        """The plan in the words of the path's dialect; a Google login's in its envelope."""
        body, wraps = json.loads(self.body), b"/v1internal:" in line
        if wraps and body.get("project") != "proj-1":
            return self.send(
                b'{"error": {"code": 400, "message": "no project"}}', "400 Bad Request"
            )
        if plan.kind == "429" and plan.seed not in self.refused:
            self.refused.add(plan.seed)
            wait = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "0.5s"}
            error = {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "slow down",
                     "details": [wait]}  # fmt: skip
            more = "" if wraps else "\r\nRetry-After: 1"
            return self.send(json.dumps({"error": error}).encode(), f"429 Too Many Requests{more}")
        streams = body.get("stream", dialect == "gemini")
        answer = worded_answer(dialect or "gemini", plan, streams, wraps)
        if not streams:
            return self.send(answer[0])
        self.pieces = self.worded(plan, answer)
        return self.pump()

    def worded(self, plan, answer):
        loop = asyncio.get_running_loop()
        began, head = loop.time(), self.HEAD
        for index, piece in enumerate(answer):
            if plan.kind == "cut" and index > plan.events / 2:
                return self.transport.close()
            yield head + http_chunk(piece)
            head = b""
            if plan.rate:
                self.timer = loop.call_at(began + (index + 1) / plan.rate, self.pump)
                yield b""
        yield b"0\r\n\r\n"

    def send(self, body, status="200 OK"):
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)

    HEAD = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )

    def batches(self, plan):
        first, last = plan.frame()
        piece = [self.HEAD, http_chunk(first)]
        step = max(1, 65536 // len(plan.delta(0)))
        for i in range(plan.events):
            piece.append(http_chunk(plan.delta(i)))
            if len(piece) >= step:
                yield b"".join(piece)
                piece = []
        stray = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}" if plan.kind == "stray" else b""
        yield b"".join([*piece, http_chunk(last), b"0\r\n\r\n", stray])

    def dripping(self, plan):
        for i in range(len(self.HEAD)):
            yield self.HEAD[i : i + 1]
            self.timer = asyncio.get_running_loop().call_later(0.002, self.pump)
            yield b""
        yield b"".join(self.batches(plan))[len(self.HEAD) :]

    def paced(self, plan):
        first, last = plan.frame()
        loop = asyncio.get_running_loop()
        began, head = loop.time(), self.HEAD + http_chunk(first)
        for i in range(plan.events):
            yield head + http_chunk(plan.delta(i, time.monotonic_ns()))
            head = b""
            self.timer = loop.call_at(began + (i + 1) / plan.rate, self.pump)
            yield b""
        yield http_chunk(last) + b"0\r\n\r\n"

    def pump(self):
        """Write until a pause: b"" is a wait for the timer."""
        while self.pieces and not self.full:
            if (piece := next(self.pieces, None)) is None:
                self.pieces = None
            elif piece:
                self.transport.write(piece)
            else:
                return

    def pause_writing(self):
        self.full = True

    def resume_writing(self):
        self.full = False
        self.pump()


async def bench_fake(port):
    server = await asyncio.get_running_loop().create_server(FakeProvider, "127.0.0.1", int(port))
    await server.serve_forever()


PLAIN_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host"}


class PlainProxy:
    """The yardstick: aiohttp's server and client, bytes as they come, the hop's headers left out."""

    def __init__(self, upstream):
        self.upstream = upstream

    @staticmethod
    def passing(headers):
        return CIMultiDict((k, v) for k, v in headers.items() if k.lower() not in PLAIN_HOP)

    async def handle(self, request):
        async with self.http.request(
            request.method, self.upstream + request.path_qs, headers=self.passing(request.headers),
            data=request.content if request.body_exists else None, allow_redirects=False,
        ) as answer:  # fmt: skip
            response = web.StreamResponse(
                status=answer.status, headers=self.passing(answer.headers)
            )
            await response.prepare(request)
            async for data in answer.content.iter_any():
                await response.write(data)
            await response.write_eof()
            return response

    async def serve(self, port):
        limits = {"connector": aiohttp.TCPConnector(limit=0), "timeout": aiohttp.ClientTimeout()}
        async with aiohttp.ClientSession(auto_decompress=False, **limits) as self.http:
            app = web.Application(client_max_size=1 << 30)
            app.router.add_route("*", "/{path:.*}", self.handle)
            runner = web.AppRunner(app)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", port).start()
            await asyncio.Event().wait()


async def watched_serve(live, args):
    """ampproxy's `serve`, which says on SIGUSR1 how many tasks there are (for the soak)."""

    def tell():
        Path(os.environ["BENCH_TASKS"]).write_text(str(len(asyncio.all_tasks())))

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, tell)
    await ampproxy.serve(live, args)


def plain_source(upstream, port):
    """A program of the yardstick alone: what else this file imports must not weigh it down."""
    imports = "import asyncio, importlib, importlib.util, aiohttp\nfrom aiohttp import web\n"
    imports += f"from multidict import CIMultiDict\nPLAIN_HOP = {PLAIN_HOP}\n"
    source = inspect.getsource(PlainProxy) + inspect.getsource(loop_runner)
    return f"{imports}{source}loop_runner()(PlainProxy({upstream!r}).serve({port}))"


def soak_source():
    imports = "import asyncio, os, signal, sys\nfrom pathlib import Path\nimport ampproxy\n"
    last = "ampproxy.COMMANDS['serve'] = watched_serve\nsys.exit(ampproxy.main(sys.argv[1:]))"
    return imports + inspect.getsource(watched_serve) + last


class Running:
    """A process of the benchmark on a port of its own; `took`: seconds to its first 200."""

    def __init__(self, folder, command, **env):
        self.port, self.errors = free_port(), folder / f"{secrets.token_hex(4)}.log"
        env = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(HERE), **env}
        words = [sys.executable, *command(self.port)]
        began = time.monotonic()
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(words, env=env, cwd=folder,
                                            stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)  # fmt: skip
        try:
            while not self.answers():
                if self.process.poll() is not None or time.monotonic() > began + 20:
                    raise RuntimeError(f"it did not start: {self.errors.read_text()[-500:]}")
                time.sleep(0.002)
        except BaseException:
            self.end()
            raise
        self.took = time.monotonic() - began

    def answers(self):
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return client.recv(12).endswith(b" 200")
        return False

    def end(self):
        self.process.kill()
        self.process.wait()

    def status(self, name):
        """A figure of /proc/PID/status in bytes; NaN where there is none."""
        with suppress(OSError, TypeError):
            text = Path(f"/proc/{self.process.pid}/status").read_text()
            return int(re.search(rf"{name}:\s*(\d+) kB", text)[1]) * 1024
        return math.nan

    @property
    def rss(self):
        return self.status("VmRSS")

    @property
    def cpu(self):
        """Seconds of CPU so far, in steps of 10 ms."""
        with suppress(OSError):
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return math.nan

    @property
    def files(self):
        with suppress(OSError):
            return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))
        return 0


class Wire(asyncio.Protocol):
    """One connection of the load.  It only keeps what arrives, and when; that is looked at later."""

    @classmethod
    async def open(cls, port):
        return (await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port))[1]

    def connection_made(self, transport):
        self.transport, self.done = transport, None

    def connection_lost(self, error):
        if self.done and not self.done.done():
            self.done.set_result(None)

    def data_received(self, data):
        self.arrivals.append((time.monotonic_ns(), data))
        self.have, self.tail = self.have + len(data), (self.tail + data[-7:])[-7:]
        if self.need is None:
            head, mark, _ = b"".join(part for _, part in self.arrivals).partition(b"\r\n\r\n")
            if not mark:
                return
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            self.need = len(head) + 4 + int(length[1]) if length else 0
        whole = self.have >= self.need if self.need else self.tail == b"\r\n0\r\n\r\n"
        if whole and not self.done.done():
            self.done.set_result(None)

    def ask(self, plan, body):
        """An answer to wait for; a connection that ends early ends it, too."""
        self.arrivals, self.need, self.have, self.tail = [], None, 0, b""
        self.done = asyncio.get_running_loop().create_future()
        answer = Answer(plan, time.monotonic_ns(), self.arrivals, self.done)
        self.transport.write(REQUEST % (str(plan).encode(), len(body)))
        self.transport.write(body)
        return answer


REQUEST = b"\r\n".join([
    b"POST /v1/messages HTTP/1.1", b"Host: 127.0.0.1", b"Connection: keep-alive", b"Accept: application/json",
    b"Content-Type: application/json", b"User-Agent: bench/1 (external, cli)", b"x-api-key: anything",
    b"anthropic-version: 2023-06-01", b"anthropic-beta: fine-grained-tool-streaming-2025-05-14",
    b"x-stainless-lang: js", b"x-stainless-runtime: node", b"x-stainless-retry-count: 0", b"x-app: cli",
    b"Accept-Encoding: identity", b"x-stainless-bench: %b", b"Content-Length: %d", b"", b"",
])  # fmt: skip


@dataclass
class Answer:
    plan: Plan
    sent: int  # in ns, as all times of arrivals
    arrivals: list
    done: object

    @property
    def took(self):
        return (self.arrivals[-1][0] - self.sent) / 1e6

    def unpack(self):
        """Status and body, and of each chunk where it ends in the body and when that was here."""
        raw, ends, at, marks = b"".join(data for _, data in self.arrivals), [], 0, []
        for _, data in self.arrivals:
            ends.append(at := at + len(data))
        head, _, rest = raw.partition(b"\r\n\r\n")
        if b"chunked" not in head.lower():
            return head[9:12], rest, [(len(rest), self.arrivals[-1][0])]
        at, body, have = len(head) + 4, [], 0
        while size := int(raw[at : (start := raw.index(b"\r\n", at) + 2) - 2], 16):
            body.append(raw[start : start + size])
            at, have = start + size + 2, have + size
            marks.append((have, self.arrivals[bisect.bisect_left(ends, start + size)][0]))
        return head[9:12], b"".join(body), marks

    def check(self):
        """What is wrong with it, "" for nothing; `lags` of its events in ms are kept."""
        try:
            status, body, marks = self.unpack()
        except (ValueError, IndexError) as error:
            return f"{self.plan}: cut short ({error})"
        if status != b"200":
            return f"{self.plan}: {status.decode()} {body[:200]!r}"
        times = [0] * self.plan.events if not self.plan.rate else self.plan.times(body)
        if body != self.plan.body(times) or times != sorted(times):
            return f"{self.plan}: {len(body)} bytes are not the right ones"
        each, first = len(self.plan.delta(0)), len(self.plan.frame()[0])
        ends = [end for end, _ in marks]
        self.lags = [(marks[bisect.bisect_left(ends, first + each * (i + 1))][1] - at) / 1e6
                     for i, at in enumerate(times) if at]  # fmt: skip
        return ""


@functools.cache
def prompt(size, stream=True):
    """A request body of about that many bytes: a conversation with tools, quotes, lines, accents."""
    code = 'def f(x):\n    return {"é": x, "tab": "\\t"}  # so it goes, line after line\n'
    text = (code * (max(40, min(size, 16000) - 400) // len(code) + 1))[
        : max(40, min(size, 16000) - 400)
    ]
    turns = []
    for i in range(max(1, size // 16000)):
        result = {"type": "tool_result", "tool_use_id": f"toolu_{i:08d}", "content": text}
        use = {
            "type": "tool_use",
            "id": f"toolu_{i:08d}",
            "name": "Read",
            "input": {"path": f"/src/{i}.py"},
        }
        turns += [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    turns = turns if size > 2000 else []
    body = {**ASK, "messages": [*ASK["messages"], *turns], "stream": stream}
    return json.dumps(body, ensure_ascii=False).encode()


def quantile(values, part):
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * part))] if values else math.nan


@dataclass
class Figure:
    """A row of the table; `ratio` is the median of the rounds' own ratios, or what the unit says."""

    name: str
    unit: str
    columns: dict
    ratio: float
    target: float
    at_least: bool = False

    @property
    def ok(self):
        if math.isnan(self.ratio):
            return "-"
        return (
            "ok"
            if (self.ratio >= self.target) == self.at_least or self.ratio == self.target
            else "MISS"
        )

    def line(self):
        shown = [
            ("-" if math.isnan(v) else f"{v:,.2f}" if v < 100 else f"{v:,.0f}")
            for v in self.columns.values()
        ]
        sign, mark = (
            (">=" if self.at_least else "<="),
            " x" if "over idle MB" not in self.unit else " MB",
        )
        ratio = "-" if math.isnan(self.ratio) else f"{self.ratio:.2f}{mark}"
        cells = (
            f"{self.name} [{self.unit}]",
            *shown,
            ratio,
            f"{sign} {self.target:g}{mark}",
            self.ok,
        )
        return "{:<62} {:>9} {:>9} {:>9} {:>9}  {:<9} {}".format(*cells)


COLUMNS = ("direct", "plain", "ampproxy")
OPEN_FILES = 256  # what a process of the benchmark may have; `bench` raises it


class Bench:
    def __init__(self, folder, quick):
        self.folder, self.quick, self.figures, self.wrong = folder, quick, [], []
        self.processes, self.seed, self.prompts = {}, 0, 32 if quick else 200
        most = (OPEN_FILES - 100) // 2  # two of a proxy's files are one stream
        self.many, self.lively = min(1000, most), min(500, most)

    # -- The processes --

    def launch(self, name):
        """A fresh process in place of the old one."""
        self.stop(name)
        made = {"direct": lambda port: [__file__, "bench-fake", str(port)],
                "plain": lambda port: ["-c", plain_source(self.fake, port)],
                "ampproxy": lambda port: [str(SCRIPT), "--config", str(self.config), "--port", str(port)]}  # fmt: skip
        self.processes[name] = Running(self.folder, made[name])
        if name == "direct":
            self.fake = f"http://127.0.0.1:{self.processes[name].port}"
            self.write_config()
        return self.processes[name]

    def stop(self, name):
        if process := self.processes.pop(name, None):
            process.end()

    def write_config(self, **more):
        self.config = self.folder / "config.yaml"
        ends = {"expired": "2099-01-01T00:00:00Z", "last_refresh": "2099-01-01T00:00:00Z"}
        self.tokens = [
            token_file(self.folder / "auth", f"{n}@example.com", **ends) for n in ("a", "b", "c")
        ]
        codex_file(self.folder / "auth", **ends)
        row = {"base-url": self.fake, "token-url": self.fake, "profile-url": self.fake}
        key = {"api-key": "k", "base-url": self.fake}
        chat = {"name": "qwen", "base-url": self.fake + "/v1", "models": [{"name": "qwen-x"}],
                "api-key-entries": [{"api-key": "k"}]}  # fmt: skip
        config = {"auth-dir": str(self.folder / "auth"), "providers": {"claude": row, "codex": row},
                  "gemini-api-key": [key], "openai-compatibility": [chat],
                  "ampcode": {"upstream-url": self.fake, "fallback": "never"}, **more}  # fmt: skip
        self.config.write_text(yaml.safe_dump(config))

    # -- Asking and checking --

    def plan(self, **fields):
        self.seed += 1
        return Plan(self.seed, **fields)

    async def wires(self, name, count):
        port = self.processes[name].port
        return [await Wire.open(port) for _ in range(count)]

    def check(self, answers):
        found = [wrong for answer in answers if (wrong := answer.check())]
        self.wrong += found
        return [answer for answer in answers if answer.arrivals]

    async def ask(self, wire, plan, body):
        answer = wire.ask(plan, body)
        async with asyncio.timeout(60):
            await answer.done
        return answer

    async def rounds(self, count, measure, names=COLUMNS):
        """`measure` of each in turn, in another order each round: the figures by name."""
        got = {name: [] for name in COLUMNS}
        for turn in range(count):
            for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
                wires = []
                try:
                    got[name].append(await measure(name, wires))
                finally:
                    for wire in wires:
                        wire.transport.abort()
                await asyncio.sleep(0.1)
        return got

    def add(self, name, unit, got, target, at_least=False, added=False, middle=statistics.median):
        """A row.  `added`: what the proxies take on top of the fake itself."""
        if added:
            got = {n: [v - d for v, d in zip(got[n], got["direct"], strict=True)] if n != "direct" else got[n]
                   for n in got}  # fmt: skip
        columns = {n: middle(values) if values else math.nan for n, values in got.items()}
        ratios = [
            a / p if p > 0 else math.nan for a, p in zip(got["ampproxy"], got["plain"], strict=True)
        ]
        ratio = middle(ratios) if ratios and not any(map(math.isnan, ratios)) else math.nan
        self.figures.append(Figure(name, unit, columns, ratio, target, at_least))

    # -- The figures --

    async def small(self, name, wires):
        wires += await self.wires(name, 1)
        body, plan = prompt(200), self.plan(events=3)
        answers = [await self.ask(wires[0], plan, body) for _ in range(120 if self.quick else 400)]
        return quantile([answer.took for answer in self.check(answers)][20:], 0.5)

    async def busy(self, name, wires):
        """Requests a second of 64 clients, and the CPU of each in microseconds."""
        wires += await self.wires(name, 64)
        body, plan, answers = prompt(20_000), self.plan(events=3), []
        began, before = time.monotonic(), self.processes[name].cpu
        ends = began + (0.8 if self.quick else 4)

        async def client(wire):
            while time.monotonic() < ends:
                answers.append(await self.ask(wire, plan, body))

        await asyncio.gather(*map(client, wires))
        took, cpu = time.monotonic() - began, self.processes[name].cpu - before
        return len(self.check(answers)) / took, cpu / len(answers) * 1e6

    async def streams(self, name, wires, count, ramp=0.0, **fields):
        """Answers of so many streams, begun evenly over the ramp, and how long they all took."""
        wires += await self.wires(name, count)

        async def one(index, wire):
            await asyncio.sleep(index * ramp / count)
            return await self.ask(wire, self.plan(**fields), prompt(200))

        began = time.monotonic()
        answers = await asyncio.gather(*(one(i, wire) for i, wire in enumerate(wires)))
        took = time.monotonic() - began
        return self.check(answers), took

    async def cost(self, name, wires):
        """CPU seconds of the process for a million events that come one by one."""
        seconds, before = 2 if self.quick else 4, self.processes[name].cpu
        await self.streams(name, wires, 32, rate=100, events=100 * seconds)
        return (self.processes[name].cpu - before) * 1e6 / (32 * 100 * seconds)

    async def bulk(self, name, wires):
        size, events = 4096, 500 if self.quick else 2000
        _, took = await self.streams(name, wires, 32, size=size, events=events)
        return 32 * events * len(Plan(size=size).delta(0)) / took / 1e6

    async def crowd(self, name, wires):
        """Event lag p99 and first byte p99 of many streams."""
        got, _ = await self.streams(
            name, wires, self.lively, ramp=1, rate=50, events=75 if self.quick else 300
        )
        firsts = [(answer.arrivals[0][0] - answer.sent) / 1e6 for answer in got]
        return quantile([lag for a in got for lag in getattr(a, "lags", [])], 0.99), quantile(
            firsts, 0.99
        )

    async def large(self, name, wires):
        wires += await self.wires(name, 1)
        answers = [await self.ask(wires[0], self.plan(), prompt(10_000_000)) for _ in range(6)]
        return quantile([answer.took for answer in self.check(answers)][1:], 0.5)

    async def mixed(self, name, wires):
        """p99 of small requests, one after another on two connections, beside four large ones."""
        wires += await self.wires(name, 6)
        answers, ends = ([], []), time.monotonic() + (1.5 if self.quick else 6)

        async def client(wire, body, kept):
            while time.monotonic() < ends:
                kept.append(await self.ask(wire, self.plan(), body))
                await asyncio.sleep(0.002)

        big = [client(wire, prompt(10_000_000), answers[1]) for wire in wires[2:]]
        await asyncio.gather(*big, *(client(wire, prompt(200), answers[0]) for wire in wires[:2]))
        self.check(answers[1])
        return quantile([answer.took for answer in self.check(answers[0])], 0.99)

    async def fresh(self, name, wires, count):
        """A process of its own with so many connections, and its RSS when it has answered once."""
        process = self.launch(name)
        wires += await self.wires(name, count)
        self.check([await self.ask(wires[0], self.plan(), prompt(200))])
        return process, process.rss

    async def held(self, name, wires):
        """MB of RSS: idle, and the most over that with many slow streams, all there for a while; and
        their first byte p99 in ms.
        """
        process, idle = await self.fresh(name, wires, 1)
        work, seen = self.streams(name, wires, self.many, ramp=1.5, rate=1, events=5), [idle]
        task = asyncio.create_task(work)
        while not task.done():
            seen.append(process.rss)
            await asyncio.sleep(0.2)
        got, _ = await task
        firsts = [(answer.arrivals[0][0] - answer.sent) / 1e6 for answer in got]
        return idle / 1e6, (max(seen) - idle) / 1e6, quantile(firsts, 0.99)

    async def prompted(self, name, wires):
        """MB of RSS over idle a second after many large prompts from four clients."""
        process, idle = await self.fresh(name, wires, 4)
        for _ in range(self.prompts // 4):
            asked = [self.ask(wire, self.plan(), prompt(10_000_000)) for wire in wires]
            self.check(await asyncio.gather(*asked))
        await asyncio.sleep(1)
        return (process.rss - idle) / 1e6

    async def start(self, name, wires):
        return self.launch(name).took * 1000

    async def translation(self, theirs, ours):
        """CPU of the process in microseconds for each event of a stream at full speed."""
        process = self.processes["ampproxy"]
        path, body = asked(ours, MODELS[theirs])
        url, costs = URL(f"http://127.0.0.1:{process.port}{path}", encoded=True), []
        async with aiohttp.ClientSession() as http:
            for _ in range(3):
                before = process.cpu
                async with http.post(url, json=body) as response:
                    raw = await response.read()
                costs.append((process.cpu - before) / WORDED * 1e6)
                if raw.count(b"word ") < WORDED:
                    self.wrong.append(f"translated {theirs} -> {ours}: {raw[:200]!r}")
        return min(costs)

    # -- All of it --

    async def measure(self):
        self.launch("direct")
        few, proxies = (3, 5)[not self.quick], COLUMNS[1:]

        started = await self.rounds(few + 1, self.start, proxies)
        self.add("start to the first 200", "ms", started, 1.3)
        got = await self.rounds(2 * few, self.small)
        self.add("added latency p50 of a small request", "ms", got, 1.15, added=True)
        got = await self.rounds(few, self.busy)
        for i, (name, unit, target) in enumerate((("requests at 64 at once, 20 KB request", "1/s", 0.8),
                                                  ("CPU of such a request", "us", 1.3))):  # fmt: skip
            one = {n: [pair[i] for pair in pairs] for n, pairs in got.items()}
            self.add(name, unit, one, target, at_least=i == 0)
        await self.measure_streams(few, proxies)
        for theirs, ours in PAIRS:
            if theirs != ours:
                cost = await self.translation(theirs, ours)
                columns = {"direct": math.nan, "plain": math.nan, "ampproxy": cost}
                name = f"CPU of a translated event, {theirs} -> {ours}"
                self.figures.append(Figure(name, "us", columns, cost, 30))
        await self.measure_memory(few, proxies)

    async def measure_streams(self, few, proxies):
        got = await self.rounds(few - 1, self.cost, proxies)
        self.add("CPU for a million events, one by one, 32 streams", "s", got, 0.95)
        self.add("32 streams at full speed", "MB/s", await self.rounds(few, self.bulk), 1.0, True)
        got = await self.rounds(few - 1, self.crowd)
        for i, (name, target) in enumerate((("event lag", 1.2), ("first byte", 1.2))):
            one = {n: [pair[i] for pair in pairs] for n, pairs in got.items()}
            self.add(f"{self.lively} streams at 50 events/s: {name} p99", "ms", one, target)

    async def measure_memory(self, few, proxies):
        self.add("prompt of 10 MB p50", "ms", await self.rounds(few, self.large), 0.8)
        got = await self.rounds(few - 1, self.mixed)
        self.add("small requests beside four clients with 10 MB p99", "ms", got, 2.5)
        got = await self.rounds(1 if self.quick else 3, self.held, proxies)
        idle, held, firsts = (
            {n: [row[i] for row in rows] for n, rows in got.items()} for i in range(3)
        )
        self.add("RSS idle", "MB", idle, 1.25)
        self.add(f"RSS over idle with {self.many:,} streams", "MB", held, 1.2)
        self.add(f"{self.many:,} streams at 1 event/s: first byte p99", "ms", firsts, 1.5)
        got = await self.rounds(1, self.prompted, proxies)
        columns = {n: v[0] if v else math.nan for n, v in got.items()}
        name = f"RSS after {self.prompts} prompts of 10 MB"
        self.figures.append(Figure(name, "over idle MB", columns, columns["ampproxy"], 40))


class Soak(Bench):
    """Mixed traffic of all dialects with all kinds of logins, leavers, 429s, cuts, reloads, an open page.

    What is left over when it ends is said in `wrong`, beside the answers that were.
    """

    # What its visitors of all dialects ask for; each reaches a provider of its own.
    MODELS = (*MODELS.values(), "gemini-key", "gpt-oss-120b-medium")

    def write_config(self, **more):
        """With Google logins, which need a new token and a project each time this is written."""
        self.turn = getattr(self, "turn", 0) + 1
        ended = {"expired": "2020-01-01T00:00:00Z", "project_id": ""}
        auth = self.folder / "auth"
        auth.mkdir(mode=0o700, exist_ok=True)
        for kind, name in itertools.product(GOOGLE, ("a", "b")):
            given = {"access_token": f"ya29.old{self.turn}", **ended}
            made = google_file(self.folder / "made", kind, f"{name}@example.com", **given)
            made.replace(auth / made.name)
        row = {"base-url": self.fake, "token-url": self.fake, "profile-url": self.fake}
        google = {"token-url": self.fake + "/token", "onboard-pause": 0}
        hosts = {"base-url": self.fake + "/daily", "more-hosts": [self.fake + "/prod"]}
        rows = {
            "claude": row,
            "codex": row,
            "gemini": {**google, "base-url": self.fake, "excluded-models": ["gemini-key"]},
            "antigravity": {**google, **hosts, "excluded-models": ["gemini-*"]},
        }
        super().write_config(**{"providers": rows, **more})

    def launch_watched(self):
        self.told = self.folder / "tasks"
        args = ["-c", soak_source(), "--config", str(self.config)]
        self.processes["ampproxy"] = Running(
            self.folder, lambda port: [*args, "--port", str(port)], BENCH_TASKS=str(self.told)
        )
        return self.processes["ampproxy"]

    async def left(self):
        """What the process holds: files but for idle upstream connections, tasks, streams, requests."""
        process = self.processes["ampproxy"]
        self.told.unlink(missing_ok=True)
        os.kill(process.process.pid, signal.SIGUSR1)
        while not (self.told.exists() and (tasks := self.told.read_text())):
            await asyncio.sleep(0.01)
        async with aiohttp.ClientSession() as http:
            async with http.get(self.fake) as answer:
                fake = await answer.json()
            self.given = fake["google"]
            async with http.get(f"http://127.0.0.1:{process.port}/status") as answer:
                accounts = (await answer.json())["accounts"]
        files = process.files - fake["connections"]
        running = sum(account["in_flight"] for account in accounts)
        kept = sorted(path.name for path in (self.folder / "auth").iterdir())
        return {
            "files": files,
            "tasks": int(tasks),
            "streams": fake["streams"],
            "in flight": running,
            "kept": kept,
        }

    async def visitor(self, seed, ends):
        """A client that asks for this and that, and leaves in the middle of one answer in ten."""
        dice = random.Random(seed)
        wire = await Wire.open(self.processes["ampproxy"].port)
        kinds = {"sse": 50, "slow": 10, "json": 10, "large": 8, "leave": 10, "429": 2, "garbage": 3, "stray": 6, "drip": 2, "early": 3}  # fmt: skip
        while time.monotonic() < ends:
            kind = dice.choices([*kinds], [*kinds.values()])[0]
            plan = {"sse": {"events": dice.randint(1, 200)}, "slow": {"events": 20, "rate": 50},
                    "leave": {"events": 500, "rate": 50}, "large": {"events": 20, "size": 4000}}.get(kind, {"kind": kind})  # fmt: skip
            large = kind in ("large", "early")
            if wire.transport.is_closing():
                self.wrong.append(f"a connection was closed before {kind}")
                wire = await Wire.open(self.processes["ampproxy"].port)
            answer = wire.ask(self.plan(**plan), prompt(200_000 if large else 200))
            if kind == "leave":
                await asyncio.sleep(dice.random() / 2)
            else:
                async with asyncio.timeout(60):
                    await answer.done
                self.check([answer])
                self.asked += 1
            if kind == "leave" or dice.random() < 0.1:
                wire.transport.abort()
                wire = await Wire.open(self.processes["ampproxy"].port)
            await asyncio.sleep(dice.random() * 0.1)
        wire.transport.abort()

    async def foreigner(self, seed, ends):
        """A client of any dialect with a model of any provider, streamed or in one piece."""
        dice = random.Random(f"foreign {seed}")
        kinds = {"sse": 50, "slow": 10, "json": 20, "leave": 12, "429": 3, "cut": 2}
        async with aiohttp.ClientSession() as http:
            while time.monotonic() < ends:
                kind = dice.choices([*kinds], [*kinds.values()])[0]
                ours, model = dice.choice([*DIALECTS]), dice.choice(self.MODELS)
                plan = {"slow": {"events": 20, "rate": 50}, "leave": {"events": 500, "rate": 50},
                        "json": {"events": 5}}.get(kind, {"events": dice.randint(1, 200), "kind": kind})  # fmt: skip
                await self.foreign_call(http, ours, model, self.plan(**plan), kind)
                if kind != "leave":
                    self.asked += 1
                await asyncio.sleep(dice.random() * 0.1)

    async def foreign_call(self, http, ours, model, plan, kind):
        path, body = worded_ask(ours, model, plan, kind != "json")
        url = URL(f"http://127.0.0.1:{self.processes['ampproxy'].port}{path}", encoded=True)
        about = f"{kind} of {model} for {ours}, {plan}"
        async with asyncio.timeout(60), http.post(url, json=body) as answer:
            if kind == "leave":
                await answer.content.readany()
                await asyncio.sleep(plan.seed % 10 / 20)
                answer.close()
                return
            raw = b""
            try:
                async for data in answer.content.iter_any():
                    raw += data
            except aiohttp.ClientError as error:
                if (ours, kind) != ("gemini", "cut"):  # whose clients hear of it so
                    self.wrong.append(f"{about}: {error!r}")
        if answer.status != 200:
            self.wrong.append(f"{about}: {answer.status} {raw[:300]}")
        elif wrong := wrong_words(plan, ours, kind != "json", raw):
            self.wrong.append(f"{about}: {wrong}")

    async def poller(self, ends):
        """A browser with the page open, whose person ends a rest now and then."""
        dice = random.Random(0)
        base = f"http://127.0.0.1:{self.processes['ampproxy'].port}"
        async with aiohttp.ClientSession(base) as http:
            for turn in itertools.count():
                if time.monotonic() > ends:
                    return
                async with http.get("/", headers={"Accept": "text/html"}) as answer:
                    page = await answer.text()
                async with http.get("/status") as answer:
                    accounts = (await answer.json())["accounts"]
                if not (page.rstrip().endswith("</html>") and accounts):
                    self.wrong.append(f"the page or the status: {page[-100:]!r}, {accounts}")
                if turn % 10 == 0:
                    named = {"account": dice.choice(accounts)["account"]}
                    async with http.post("/status/wake", json=named) as answer:
                        if answer.status != 200:
                            self.wrong.append(f"the wake of {named}: {answer.status}")
                await asyncio.sleep(0.3)

    async def reloads(self, ends):
        for turn in itertools.count():
            if (left := ends - time.monotonic()) <= 0:
                return
            await asyncio.sleep(min(3, left))
            self.write_config(**{"request-retry": 3 + turn % 2})

    async def watch(self, seconds):
        """RSS growth in MB after the first minute, or two thirds if the soak is short."""
        process, seen = self.processes["ampproxy"], []
        for _ in range(int(seconds)):
            await asyncio.sleep(1)
            seen.append(process.rss / 1e6)
        first = int(min(60, seconds * 2 / 3))
        return statistics.median(seen[-5:]) - statistics.median(seen[first - 5 : first])

    async def run(self, seconds):
        self.launch("direct")
        self.launch_watched()
        self.asked = 0
        async with asyncio.TaskGroup() as group:
            for work in (self.visitor, self.foreigner):
                group.create_task(work(-1, time.monotonic() + 2))
        await asyncio.sleep(1.5)  # what is over may take a second to end
        before = {**await self.left(), "streams": 0, "in flight": 0}
        ends = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            growth = group.create_task(self.watch(seconds))
            group.create_task(self.reloads(ends))
            group.create_task(self.poller(ends))
            for seed in range(10):
                group.create_task(self.visitor(seed, ends))
            for seed in range(6):
                group.create_task(self.foreigner(seed, ends))
        for _ in range(50):
            if (after := await self.left()) == before:
                break
            await asyncio.sleep(0.2)
        else:
            self.wrong.append(f"left over after the soak: {after}, before: {before}")
        if min(self.given.get(what, 0) for what in ("tokens", "projects")) < seconds / 10:
            self.wrong.append(f"Google logins were given too little: {self.given}")
        self.growth = growth.result()
        columns = {"direct": math.nan, "plain": math.nan, "ampproxy": self.growth}
        name = f"soak of {seconds:.0f} s, {self.asked:,} answers: RSS growth"
        self.figures.append(Figure(name, "over idle MB", columns, self.growth, 2))


def raise_open_files():
    """As many files as the system allows, for this process and those that it starts."""
    with suppress(ImportError, ValueError, OSError):
        resource = importlib.import_module("resource")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = min(hard, 65536) if hard != resource.RLIM_INFINITY else 65536
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
        return max(soft, most)
    return 256


def bench_report(benches, args, took):
    figures = [figure for bench in benches for figure in bench.figures]
    wrong = [line for bench in benches for line in bench.wrong]
    loop = "uvloop" if importlib.util.find_spec("uvloop") else "asyncio"
    about = f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, aiohttp {aiohttp.__version__}, {loop}"
    if args.json:
        rows = [{**vars(figure), "ok": figure.ok} for figure in figures]
        rows = [
            {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
            for row in rows
        ]
        say = {"about": about, "seconds": round(took), "figures": rows, "wrong": wrong}
        print(json.dumps(say, indent=1).replace("NaN", "null"))
        return
    print("{:<62} {:>9} {:>9} {:>9} {:>9}  {:<9}".format("figure", *COLUMNS, "ratio", "target"))
    for figure in figures:
        print(figure.line())
    print(f"\n{about}; {took:.0f} s. Absolute figures of a shared machine move: quote the ratios (ampproxy\n"
          "against the plain pass-through, the median of the rounds' own). Every answer's bytes were compared:",
          f"{len(wrong)} wrong or failed.")  # fmt: skip
    for line in wrong[:10]:
        print(f"WRONG {line}")


def bench(argv):
    """Exit status 0 whatever the figures are, 1 when an answer was wrong or something was left."""
    global OPEN_FILES  # noqa: PLW0603
    parser = argparse.ArgumentParser("test_ampproxy.py bench")
    parser.add_argument("--quick", action="store_true", help="under two minutes")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="0 for none")
    args, began = parser.parse_args(argv), time.monotonic()
    OPEN_FILES = raise_open_files()
    seconds = args.soak if args.soak is not None else 9 if args.quick else 90
    with tempfile.TemporaryDirectory() as folder:
        benches = [Bench(Path(folder), args.quick), Soak(Path(folder), args.quick)]
        for one, work in zip(
            benches, (Bench.measure, functools.partial(Soak.run, seconds=seconds)), strict=True
        ):
            try:
                if one is benches[0] or seconds:
                    loop_runner()(work(one))
            finally:
                for name in [*one.processes]:
                    one.stop(name)
    bench_report(benches, args, time.monotonic() - began)
    return 1 if any(one.wrong for one in benches) else 0


@pytest.mark.skipif(
    os.environ.get("AMPPROXY_SOAK") != "1", reason="90 seconds: AMPPROXY_SOAK=1 runs it"
)
def test_soak(tmp_path):
    soak = Soak(tmp_path, True)
    try:
        loop_runner()(soak.run(90))
    finally:
        for name in [*soak.processes]:
            soak.stop(name)
    assert not soak.wrong
    assert soak.growth < 2


class Half:
    """A plugin of pytest: every other test."""

    def __init__(self, first):
        self.first = first

    def pytest_collection_modifyitems(self, items):
        items[:] = items[self.first :: 2]


def in_halves(argv):
    """The suite in two processes, for two cores; the exit status of the one that fails."""
    with tempfile.TemporaryFile() as told:
        command = [sys.executable, __file__, "--half"]
        with subprocess.Popen([*command, "1", *argv], stdout=told, stderr=told) as other:
            status = subprocess.call([*command, "0", *argv])
        told.seek(0)
        print(told.read().decode(errors="replace"), flush=True)
    return status or other.returncode


def main(argv):
    match argv:
        case ["bench", *rest]:
            return bench(rest)
        case ["bench-fake", port]:
            return loop_runner()(bench_fake(port))
        case ["--half", first, *rest]:
            return pytest.main([__file__, "-p", "no:cacheprovider", *rest], [Half(int(first))])
        case [] | ["--halves", *_]:
            return in_halves(argv[1:])
    return pytest.main([__file__, *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
