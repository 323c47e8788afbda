"""The page that browsers run, and the small server of this machine that gives it jobs and takes its results.

The runtimes come from the npm packages of ``page/package-lock.json``, installed once by ``edgekd devices prepare``.
"""

from __future__ import annotations

import hashlib
import http.cookies
import json
import os
import secrets
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

from edgekd.errors import DeviceError
from edgekd.types import Json

__all__ = ["Job", "PageServer", "install", "installed", "library", "self_signed"]

# What is served, of all that npm installs: a file by its name here, to the folder it goes to.
SERVED = {
    "onnxruntime-web/dist/ort.wasm.min.mjs": "ort",
    "onnxruntime-web/dist/ort.webgpu.min.mjs": "ort",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs": "ort",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm": "ort",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.mjs": "ort",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm": "ort",
    "@litertjs/core/dist/index.js": "litert",
    "@litertjs/wasm-utils/dist/index.js": "wasm-utils",
    **{
        f"@litertjs/core/wasm/litert_wasm_{build}internal.{suffix}": "litert/wasm"
        for build in ("", "compat_", "threaded_", "jspi_")
        for suffix in ("js", "wasm")
    },
}
TYPES = {".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}
WAIT_S = 20.0  # a browser's question for a job is answered after this long, with none
LARGEST = 1 << 30  # of one posted body
NPM_S = 900


def _lock() -> str:
    return (files("edgekd.devices") / "page" / "package-lock.json").read_text(encoding="utf-8")


def library() -> Path:
    """Where the runtimes of this version's lock file lie; ``install`` makes it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "edgekd" / f"page-{hashlib.sha256(_lock().encode()).hexdigest()[:12]}"


def installed() -> bool:
    return library().is_dir()


def install() -> Path:
    """Install the packages of the lock file with npm, and keep what is served (about 90 MB).

    Raises:
        DeviceError: npm is missing or fails; nothing is left of the attempt.
    """
    target = library()
    npm = shutil.which("npm")
    if npm is None:
        raise DeviceError("npm is not installed: https://nodejs.org, or apt-get install npm")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="page-", dir=target.parent) as temporary:
        work = Path(temporary)
        for name in ("package.json", "package-lock.json"):
            (work / name).write_text((files("edgekd.devices") / "page" / name).read_text(encoding="utf-8"))
        # No script of a package is run; the lock file holds the hash of each.
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=NPM_S)
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if line.startswith(("npm error", "npm ERR!"))]
            raise DeviceError(f"npm ci failed: {(errors or ['it said nothing'])[0]}")
        ready = work / "served"
        for name, folder in SERVED.items():
            (ready / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(work / "node_modules" / name, ready / folder / Path(name).name)
        shutil.rmtree(target, ignore_errors=True)
        ready.rename(target)
    return target


def versions() -> dict[str, str]:
    """Versions of the packages, by the lock file."""
    packages: Json = json.loads(_lock())["packages"]
    return {key.removeprefix("node_modules/"): value["version"] for key, value in packages.items() if key}


def self_signed(folder: Path, address: str) -> tuple[Path, Path]:
    """A certificate of our own for one address, by openssl; browsers ask before they trust it.

    Raises:
        DeviceError: openssl is not installed.
    """
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=edgekd"]
    command += ["-addext", f"subjectAltName=IP:{address}", "-keyout", str(key), "-out", str(certificate)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise DeviceError("TLS needs openssl, or settings.certificate and settings.certificate_key") from None
    if done.returncode != 0:
        raise DeviceError(f"openssl made no certificate: {done.stderr.strip().splitlines()[-1]}")
    return certificate, key


@dataclass
class Job:
    """What one load of the page does, and what came back.

    Attributes:
        told: The job as the page reads it.
        models, samples: Of each side.
        outputs: By side and index, as they came.
        result: ``blocks``, one of each side, or ``error``; None until the page has answered.
    """

    told: Json
    models: tuple[bytes, ...]
    samples: tuple[bytes, ...]
    outputs: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    result: Json | None = None
    taken: bool = False


class PageServer:
    """Serves the page to one browser. Loopback only, unless an address and a certificate are given.

    The link holds a token that works once: the browser that opens it first gets a cookie, and only it is served.
    """

    def __init__(
        self,
        address: str = "127.0.0.1",
        port: int = 0,
        certificate: tuple[Path, Path] | None = None,
        isolated: bool = True,
    ) -> None:
        self._token: str | None = secrets.token_urlsafe(16)
        self._cookie = secrets.token_urlsafe(16)
        self._changed = threading.Condition()
        self._job: Job | None = None
        self._closed = False
        self._isolated = isolated
        self.facts: dict[str, str] = {}
        self.hellos = 0
        handler = type("Handler", (_Handler,), {"page": self})
        try:
            self._server = _Server((address, port), handler)
        except OSError as error:
            raise DeviceError(f"no page can be served at {address}:{port}: {error.strerror}") from None
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        name = "localhost" if address == "127.0.0.1" else address
        self.origin = f"{'https' if certificate else 'http'}://{name}:{self.port}"
        self.link = f"{self.origin}/?token={self._token}"
        self._hosts = {f"{name}:{self.port}", f"{address}:{self.port}", f"localhost:{self.port}"}
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    def wait_for_hello(self, seconds: float, after: int = 0) -> bool:
        """Whether a browser has opened the page (more often than ``after`` times)."""
        with self._changed:
            return self._changed.wait_for(lambda: self.hellos > after, seconds)

    def run(self, job: Job, seconds: float, is_alive: Callable[[], bool] = lambda: True) -> Json | None:
        """Give the page a job; its result, or None when none came in time or the browser is no longer alive."""
        end = time.monotonic() + seconds
        with self._changed:
            self._job = job
            self._changed.notify_all()
            while job.result is None and time.monotonic() < end and is_alive():
                self._changed.wait(0.5)
            self._job = None
        return job.result

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    # What the handler asks; each in a thread of its own.

    def admit(self, token: str) -> str | None:
        """The cookie, for the token; once."""
        with self._changed:
            if self._token is None or not secrets.compare_digest(token, self._token):
                return None
            self._token = None
            return self._cookie

    def knows(self, cookie: str) -> bool:
        return secrets.compare_digest(cookie, self._cookie)

    def is_ours(self, host: str) -> bool:
        """Whether a Host header names this server: a page of another site that resolves to us does not."""
        return host in self._hosts

    def hello(self, facts: dict[str, str]) -> None:
        with self._changed:
            self.facts, self.hellos = facts, self.hellos + 1
            if self._job is not None and self._job.taken and self._job.result is None:
                told = "the page was loaded anew before it had answered: closed by someone, or out of memory"
                self._job.result = {"error": told}
            self._changed.notify_all()

    def next_job(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._job is not None and not self._job.taken), WAIT_S)
            if self._closed or self._job is None or self._job.taken:
                return None
            self._job.taken = True
            return self._job

    @property
    def is_closed(self) -> bool:
        return self._closed

    @property
    def is_isolated(self) -> bool:
        return self._isolated

    def current(self) -> Job | None:
        return self._job

    def finish(self, result: Json) -> None:
        with self._changed:
            if self._job is not None and result.get("id") == self._job.told["id"]:
                self._job.result = result
                self._changed.notify_all()


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """A browser that is ended breaks its connections off; what matters is told by the job's end."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(*_)


class _Handler(BaseHTTPRequestHandler):
    page: PageServer
    protocol_version = "HTTP/1.1"
    timeout = 120

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if not self.page.is_ours(self.headers.get("Host", "")):
            return self._answer(421, b"not this server")
        if url.path == "/" and "token" in (query := parse_qs(url.query)):
            cookie = self.page.admit(query["token"][0])
            if cookie is None:
                return self._answer(410, b"This link was used before; each works once. Ask edgekd for a new one.")
            secure = "; Secure" if self.page.origin.startswith("https") else ""
            more = {"Location": "/", "Set-Cookie": f"edgekd={cookie}; HttpOnly; SameSite=Strict; Path=/{secure}"}
            return self._answer(303, b"", more=more)
        if not self._is_known():
            return self._answer(403, b"open the link that edgekd showed")
        if url.path == "/job":
            job = self.page.next_job()
            if job is None:
                return self._answer(410 if self.page.is_closed else 204, b"")
            return self._answer(200, json.dumps(job.told).encode(), "application/json")
        job = self.page.current()
        if url.path in ("/model", "/samples") and job is not None:
            side = parse_qs(url.query).get("side", [""])[0]
            contents = dict(enumerate(job.models if url.path == "/model" else job.samples))
            if side.isdecimal() and int(side) in contents:
                return self._answer(200, contents[int(side)], "application/octet-stream")
        content = _file(url.path)
        if content is None:
            return self._answer(404, b"no such file")
        return self._answer(200, content[0], content[1])

    def do_POST(self) -> None:
        url = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        if not self.page.is_ours(self.headers.get("Host", "")) or not self._is_known():
            self.close_connection = True
            return self._answer(403, b"open the link that edgekd showed")
        if length > LARGEST:
            self.close_connection = True
            return self._answer(413, b"too large")
        body = self.rfile.read(length)
        try:
            if url.path == "/hello":
                told = json.loads(body)
                self.page.hello({str(key): str(value)[:500] for key, value in told.items()})
            elif url.path == "/output" and (job := self.page.current()) is not None:
                query = {key: values[0] for key, values in parse_qs(url.query).items()}
                shape = tuple(int(size) for size in query["shape"].split(",") if size)
                array = np.frombuffer(body, np.dtype(query["dtype"])).reshape(-1, *shape[1:])
                job.outputs[int(query["side"]), int(query["index"])] = array
            elif url.path == "/result":
                self.page.finish(json.loads(body))
            else:
                return self._answer(404, b"nothing is taken here")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return self._answer(400, str(error).encode())
        return self._answer(204, b"")

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def _is_known(self) -> bool:
        cookies = http.cookies.SimpleCookie(self.headers.get("Cookie", ""))
        return "edgekd" in cookies and self.page.knows(cookies["edgekd"].value)

    def _answer(self, code: int, body: bytes, kind: str = "text/plain", more: dict[str, str] | None = None) -> None:
        headers = {
            "Content-Type": kind,
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            **(more or {}),
        }
        if self.page.is_isolated:  # without both, a page has one thread and a coarse clock
            headers |= {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
        try:
            self.send_response(code)
            for key, value in headers.items():
                self.send_header(key, value)
            if code != 204:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # the browser went away: the job's time limit tells it
            self.close_connection = True


def _file(path: str) -> tuple[bytes, str] | None:
    """A file of the page or of the library, by its whole name: nothing else is ever read."""
    own = {"/": "index.html", "/run.js": "run.js"}
    if path in own:
        name = own[path]
        return (files("edgekd.devices") / "page" / name).read_bytes(), TYPES[Path(name).suffix]
    for source, folder in SERVED.items():
        name = Path(source).name
        if path == f"/library/{folder}/{name}" and (file := library() / folder / name).is_file():
            return file.read_bytes(), TYPES[file.suffix]
    return None
