"""A chat server on loopback that answers, or misbehaves, as a test says."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CANARY = "sk-canary-7f3a9e51c2d84b60"
YES = "{'pred': 'yes', 'score': 5}"

Reply = tuple[int, dict[str, str], bytes]
RESET: Reply = (0, {}, b"")
"""Not a reply: the connection is reset."""


def completion(text: Any, **message: Any) -> Reply:
    body = {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": "judge",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": text, **message},
            }
        ],
        "usage": {"prompt_tokens": 300, "completion_tokens": 12, "total_tokens": 312},
    }
    return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()


def failure(status: int, message: str = "no", **headers: str) -> Reply:
    body = json.dumps({"error": {"message": message, "code": None}}).encode()
    return status, {"Content-Type": "application/json", **headers}, body


class ChatServer(ThreadingHTTPServer):
    """Answers request n (from 0) with what `respond(n, payload)` returns."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.respond: Callable[[int, dict[str, Any]], Reply] = lambda n, payload: completion(YES)
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.pause = 0.0
        """Seconds after each byte of a reply."""
        self.active = 0
        self.most_active = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet about connections that the client gave up."""


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(
                {**payload, "key": self.headers["Authorization"], "path": self.path}
            )
            self.server.times.append(time.monotonic())
            self.server.active += 1
            self.server.most_active = max(self.server.most_active, self.server.active)
        status, headers, body = self.server.respond(number, payload)
        with self.server.lock:
            self.server.active -= 1
        if (status, headers, body) == RESET:
            linger = struct.pack("ii", 1, 0)  # closing resets the connection
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        size = 1 if self.server.pause else len(body) or 1
        for start in range(0, len(body), size):
            self.wfile.write(body[start : start + size])
            time.sleep(self.server.pause)

    def log_message(self, *arguments: Any) -> None:
        """Write no log."""
