"""The standard library's HTTP server used as its documentation shows it: a thread to each connection."""
from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import peer_store


class Handler(BaseHTTPRequestHandler):
    """One connection, which is one request: HTTP/1.0."""

    def do_POST(self) -> None:
        """Accepts a message."""
        try:
            document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            good = peer_store.valid(document["PhoneNumber"], document["Content"])
        except (ValueError, KeyError, TypeError):
            good = False
        if good:
            self.answer(202, {"ID": peer_store.accept()})
        else:
            self.answer(400, {"Error": "not a message"})

    def do_GET(self) -> None:
        """Tells a status."""
        message_id = self.path.rpartition("/")[2]
        self.answer(200, {"Status": peer_store.statuses.get(message_id, "NOT_FOUND")})

    def answer(self, status: int, document: dict[str, str]) -> None:
        """Sends a JSON document."""
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
