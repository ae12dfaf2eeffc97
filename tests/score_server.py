"""A server on loopback that scores as vLLM, TEI and Infinity do; run as a script it is a process that can be killed.

It gives raw scores only to who asks for them, in the order that each server gives them, and can be told to misbehave.
"""

import json
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np


def logit(query, document):
    """The score of a pair: any number between -5 and 5, the same for the same texts."""
    return zlib.crc32(f"{query}\n{document}".encode()) / 2**32 * 10 - 5


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, dict(self.headers), body, time.monotonic()))
            server.inside += 1
            server.most_inside = max(server.most_inside, server.inside)
            status, headers = server.troubles.pop(0) if server.troubles else (200, {})
        time.sleep(server.delay)
        answer = {"error": "trouble"}
        if status == 200:
            status, answer = self.answer(body)
        with server.lock:
            server.inside -= 1
        content = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def answer(self, body):
        if self.path == "/score":
            query, documents, raw = body["text_1"], body["text_2"], body.get("use_activation") is False
        elif "texts" in body:
            query, documents, raw = body["query"], body["texts"], body.get("raw_scores") is True
        else:
            query, documents, raw = body["query"], body["documents"], body.get("raw_scores") is True
        if any("unreadable" in document for document in documents):
            return 413, {"error": "too long"}
        scores = np.array([logit(query, document) for document in documents])
        scores = (scores if raw else 1 / (1 + np.exp(-scores))).tolist()
        usage = {"prompt_tokens": 7 * len(documents)}
        if self.path == "/score":
            return 200, {"data": [{"index": at, "score": score} for at, score in enumerate(scores)], "usage": usage}
        ranked = sorted(enumerate(scores), key=lambda one: -one[1])
        if "texts" in body:
            return 200, [{"index": at, "score": score} for at, score in ranked]
        return 200, {"results": [{"index": at, "relevance_score": score} for at, score in ranked], "usage": usage}

    def log_message(self, *_):
        pass


class ScoreServer(ThreadingHTTPServer):
    """With-block: the server listens at `url`."""

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock, self.requests, self.troubles = threading.Lock(), [], []
        self.inside = self.most_inside = 0
        self.delay = 0.0

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


if __name__ == "__main__":
    ScoreServer(int(sys.argv[1])).serve_forever()
