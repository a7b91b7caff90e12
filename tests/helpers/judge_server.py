"""A local endpoint of chat completions that does what endpoints do: waits, refuses, breaks off, babbles."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[[str, int], str | None]
"""From the sha256 of a request's body and how often it has come (from 1) to what goes wrong, None for nothing."""


def no_fault(body: str, times: int) -> str | None:
    return None


def share_of(body: str) -> float:
    """A number in [0, 1) that a request's body always has."""
    return int(body[:8], 16) / 2**32


@dataclass
class JudgeServer:
    """What a server has seen and what it answers.

    ``rate`` gives the probability of each answer for a request; of ``draws`` one is drawn by the request's own hash.
    """

    rate: Callable[[Mapping[str, Any]], Mapping[str, float]]
    fault: Fault = no_fault
    key: str | None = None
    delay: float = 0.0
    url: str = ""
    served: str = "judge-1"
    seen: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    most_at_once: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers["Content-Length"]))
        body, name = json.loads(raw), hashlib.sha256(raw).hexdigest()
        with self._lock:
            self.seen[name] += 1
            times = self.seen[name]
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        if self.delay:
            threading.Event().wait(self.delay)
        with self._lock:
            self._now -= 1
        if self.key is not None and handler.headers.get("Authorization") != f"Bearer {self.key}":
            said = handler.headers.get("Authorization", "no key")
            return self._send(handler, 401, {"error": {"message": f"wrong key: {said}"}})
        fault = self.fault(name, times)
        if fault is not None and fault.isdigit():
            headers = {"Retry-After": "0.2"} if fault == "429" else {}
            return self._send(handler, int(fault), {"error": {"message": f"for {self.key}"}}, headers)
        text = json.dumps({"model": self.served, "choices": [self._choice(body, name, fault)]})
        if fault == "truncated":
            return self._send_text(handler, 200, text[: len(text) // 2])
        with self._lock:
            self.answered[name] += 1
        return self._send_text(handler, 200, text)

    def _choice(self, body: Mapping[str, Any], name: str, fault: str | None) -> dict[str, Any]:
        if fault == "unreadable":
            answers: Mapping[str, float] = {"Well": 1.0}
        else:
            answers = self.rate(body)
        if body.get("logprobs"):
            top = [{"token": t, "logprob": math.log(p)} for t, p in answers.items() if p > 0]
            return {
                "message": {"content": max(answers, key=answers.__getitem__)},
                "logprobs": {
                    "content": [{"token": top[0]["token"], "logprob": top[0]["logprob"], "top_logprobs": top}]
                },
            }
        reached = itertools.accumulate(answers.values())
        below = share_of(name[8:]) * sum(answers.values())
        drawn = next(answer for answer, total in zip(answers, reached, strict=True) if below < total)
        return {"message": {"content": drawn}}

    def _send(
        self, handler: BaseHTTPRequestHandler, status: int, value: Any, headers: Mapping[str, str] | None = None
    ) -> None:
        self._send_text(handler, status, json.dumps(value), headers)

    def _send_text(
        self, handler: BaseHTTPRequestHandler, status: int, text: str, headers: Mapping[str, str] | None = None
    ) -> None:
        data = text.encode()
        try:
            handler.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):  # who asked was killed
            pass


@contextmanager
def serving(server: JudgeServer) -> Iterator[JudgeServer]:
    """Serve at a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            server.handle(self)

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: object) -> None:
            pass

    listener = Quiet(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listener.server_address[1]}/v1"
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
