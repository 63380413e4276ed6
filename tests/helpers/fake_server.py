"""A rollout server that answers like vLLM's, with weights it does not use, and misbehaves on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from megatron_oisd.rl.rollout.weight_stream import receive_weights

EOS = 2


class FakeServer:
    """``faults`` are taken one by one by the requests for completions: each changes an answer, or does harm itself."""

    def __init__(self) -> None:
        self.version = ""
        self.weights: list[str] = []
        self.faults: list[Callable[[BaseHTTPRequestHandler, dict[str, Any]], dict[str, Any] | None]] = []
        self.completions = self.resets = 0
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"fake": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def next_fault(self) -> Any:
        with self._lock:
            self.completions += 1
            return self.faults.pop(0) if self.faults else None


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null")
        if self.path == "/collective_rpc":
            if body["method"] == "oisd_receive_weights":
                self.fake.weights = [name for name, _ in receive_weights(body["kwargs"]["address"])]
                self.fake.version = body["kwargs"]["version"]
            self.answer({"results": [self.fake.version]})
        elif self.path == "/reset_prefix_cache":
            self.fake.resets += 1
            self.answer(None)
        elif self.path == "/v1/completions":
            fault = self.fake.next_fault()
            answer = completion(body)
            changed = answer if fault is None else fault(self, answer)
            if changed is not None:
                self.answer(changed)
        else:
            self.answer(None, status=404)

    def answer(self, content: Any, status: int = 200) -> None:
        data = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def completion(body: dict[str, Any]) -> dict[str, Any]:
    """Sample k of a prompt is its first token, k and the end."""
    choices = []
    for index in range(body["n"]):
        tokens = [body["prompt"][0], 3 + index, EOS]
        choices.append(
            {
                "index": index, "token_ids": tokens, "finish_reason": "stop",
                "logprobs": {"token_logprobs": [-0.5, -1.0, -0.25]},
            }
        )  # fmt: skip
    return {"choices": choices}


def http_500(handler: Any, answer: dict[str, Any]) -> None:
    del answer
    handler.answer({"error": "out of memory"}, status=500)


def hang_up(handler: Any, answer: dict[str, Any]) -> None:
    del answer
    handler.connection.close()


def stall(handler: Any, answer: dict[str, Any]) -> None:
    del answer
    time.sleep(1.5)
    handler.close_connection = True


def no_json(handler: Any, answer: dict[str, Any]) -> None:
    del answer
    handler.send_response(200)
    handler.send_header("Content-Length", "5")
    handler.end_headers()
    handler.wfile.write(b"<html")


def change(**fields: Any) -> Any:
    """Put something else into the first response."""

    def fault(handler: Any, answer: dict[str, Any]) -> dict[str, Any]:
        del handler
        answer["choices"][0].update(fields)
        return answer

    return fault


def drop_one(handler: Any, answer: dict[str, Any]) -> dict[str, Any]:
    del handler
    return {"choices": answer["choices"][1:]}
