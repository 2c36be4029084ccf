"""A chat server that answers what it is told to: pieces of text, an error, half an answer."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PIECE_SECONDS = 0.02


class StubServer(ThreadingHTTPServer):
    """Answers every chat request after `behaviour`, and remembers the requests and how many were under way at once."""

    daemon_threads = True

    def __init__(self, behaviour: str = "answers", metrics: str = "", port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.behaviour, self.metrics = behaviour, metrics
        self.requests: list[dict] = []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> StubServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: StubServer

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        known = {"/health": "{}", "/metrics": self.server.metrics}
        if self.server.behaviour != "nameless":
            known["/v1/models"] = json.dumps({"data": [{"id": "stub"}]})
        text = known.get(self.path)
        self._send(404 if text is None else 200, (text or "").encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.under_way += 1
            self.server.most_under_way = max(self.server.most_under_way, self.server.under_way)
        try:
            getattr(self, self.server.behaviour)(body["max_tokens"])
        finally:
            with self.server.lock:
                self.server.under_way -= 1

    def answers(self, count: int) -> None:
        self._begin()
        self._event(delta={"role": "assistant"})
        for _ in range(count):
            time.sleep(PIECE_SECONDS)
            self._event(delta={"content": "word "})
        self._event(delta={}, finish_reason="length")
        self._event(usage={"prompt_tokens": 600, "completion_tokens": count, "total_tokens": 600 + count})
        self.wfile.write(b"data: [DONE]\n\n")

    nameless = answers

    def refuses(self, count: int) -> None:
        self._send(500, json.dumps({"error": {"message": "out of memory on device 3"}}).encode())

    def fails_in_the_stream(self, count: int) -> None:
        self._begin()
        self._event(delta={"content": "word "})
        self.wfile.write(b'data: {"error": "the cache is full"}\n\n')

    def breaks_off(self, count: int) -> None:
        self._begin()
        self._event(delta={"content": "word "})

    def says_nothing(self, count: int) -> None:
        self._begin()
        self._event(delta={}, finish_reason="stop")
        self.wfile.write(b"data: [DONE]\n\n")

    def speaks_gibberish(self, count: int) -> None:
        self._begin()
        self.wfile.write(b"data: {nonsense\n\n")

    def sleeps(self, count: int) -> None:
        time.sleep(3)

    def _begin(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()

    def _event(self, delta: dict | None = None, finish_reason: str | None = None, usage: dict | None = None) -> None:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
        made = {
            "id": "1",
            "created": 0,
            "model": "stub",
            "object": "chat.completion.chunk",
            "choices": choices,
            "usage": usage,
        }
        self.wfile.write(f"data: {json.dumps(made)}\n\n".encode())
        self.wfile.flush()

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


if __name__ == "__main__":
    import sys

    StubServer(sys.argv[1], port=int(sys.argv[2])).serve_forever()
