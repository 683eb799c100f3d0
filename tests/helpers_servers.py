"""A server that answers chats and fails as asked, and one that takes models as the hub does."""

import base64
import collections
import email.utils
import hashlib
import http.server
import json
import random
import socket
import struct
import threading
import time

import pytest

from retmask_jax.training.pairs import Question

NORMAL, MASKED = (0, "normal"), (0, "retmask")
QUESTIONS = [
    Question(variant, f"p{i}", [{"role": "user", "content": f"what of {i}"}], [], draw=1000 * len(variant[1]) + i)
    for variant in (NORMAL, MASKED)
    for i in range(40)
]


FAILURES = ("500", "429", "503 date", "reset", "hang", "not JSON", "no choices", "no text", "aborted", "cut short")


class Server(http.server.ThreadingHTTPServer):
    """Answers with a hash of its name and all that matters in the question; fails as `plan` says, call by call."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, name, plan=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.plan, self.seen, self.lock = name, collections.deque(plan), [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, body):
        asked = [body[key] for key in ("model", "messages", "temperature", "top_p", "max_tokens", "seed")]
        text = hashlib.sha256(json.dumps([self.name, *asked]).encode()).hexdigest()
        finish = "length" if text[0] in "01234" else "stop"
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
        return {"choices": [choice], "usage": {"completion_tokens": 7}}

    def handle_error(self, request, client_address):
        pass  # clients that have gone


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((time.monotonic(), self.path, dict(self.headers), body))
            failure = self.server.plan.popleft() if self.server.plan else None
        answer = self.server.answer(body)
        match failure:
            case None:
                self.reply(200, json.dumps(answer))
            case "500" | "429":
                self.reply(int(failure), "too much", {"Retry-After": "0.05"} if failure == "429" else {})
            case "503 date":
                self.reply(503, "restarting", {"Retry-After": email.utils.formatdate(time.time() - 5, usegmt=True)})
            case "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            case "hang":
                time.sleep(1.0)
            case "trickle":
                self.reply(200, " " * 10, {"Content-Length": str(10**6)})
                for _ in range(15):
                    time.sleep(0.1)
                    self.wfile.write(b" ")
            case "not JSON":
                self.reply(200, "<html>gateway</html>")
            case "no choices":
                self.reply(200, json.dumps(answer | {"choices": []}))
            case "no text":
                self.reply(200, json.dumps({"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}))
            case "aborted":
                answer["choices"][0]["finish_reason"] = "abort"
                self.reply(200, json.dumps(answer))
            case "cut short":
                self.reply(200, json.dumps(answer), {"Content-Length": "10000"})
            case (status, text):
                self.reply(status, text)
            case (status, text, headers):
                self.reply(status, text, headers)
            case dict():
                self.reply(200, json.dumps(failure))

    def reply(self, status, text, headers=None):
        headers = {"Content-Length": str(len(text))} | (headers or {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    servers = []

    def start(name="normal", plan=()):
        servers.append(Server(name, plan))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class HubServer(http.server.ThreadingHTTPServer):
    """Speaks the part of the hub's API that uploads.

    models: {name: {file: bytes}}. requests: (path, authorization, body). refusal: a status for every request.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.models, self.requests, self.refusal = {}, [], None
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class HubHandler(Handler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.requests.append((self.path.partition("?")[0], self.headers["Authorization"], body))
        if self.server.refusal:
            return self.reply(self.server.refusal, "no")
        match self.path.partition("?")[0].strip("/").split("/"):
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                self.server.models.setdefault(name, {})
                found = {"url": f"{self.server.url}/{name}"}
            case ["api", "validate-yaml"]:
                found = {"errors": [], "warnings": []}
            case ["api", "models", _, _, "preupload", "main"]:
                files = [file["path"] for file in json.loads(body)["files"]]
                found = {"files": [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]}
            case ["api", "models", owner, name, "commit", "main"]:
                lines = [json.loads(line) for line in body.splitlines()]
                for line in lines:
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        self.server.models[f"{owner}/{name}"][line["value"]["path"]] = content
                found = {"commitUrl": f"{self.server.url}/{owner}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}
            case _:
                return self.reply(404, "{}")
        self.reply(200, json.dumps(found), {"Content-Type": "application/json"})

    def do_GET(self):
        self.server.requests.append((self.path, self.headers["Authorization"], b""))
        self.reply(self.server.refusal or 404, "{}")


@pytest.fixture
def upload_hub(monkeypatch, tmp_path):
    """The hub of this process, with nobody logged in and no waiting between retries."""
    from huggingface_hub import constants

    server = HubServer()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    yield server
    server.shutdown()
    server.server_close()


def plan(n, share, seed=0):
    rng = random.Random(seed)
    return [rng.choice(FAILURES) if rng.random() < share else None for _ in range(n)]
