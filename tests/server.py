"""A small web server for the tests of prepare.py: files from a dict, Range, and the faults that real servers have.

with Server({"/a.zip": content}) as server:
    server.faults["/a.zip"] = ["truncate", 503]     # the first two requests; the third is answered well
    urlopen(server.url + "/a.zip")
    server.requests                                 # [("/a.zip", None)]: path and Range header of each request
"""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        owner = self.server.owner
        owner.requests.append((self.path, self.headers.get("Range")))
        fault, content = owner.next_fault(self.path), owner.files.get(self.path)
        self.close_connection = True
        if fault == "redirect":
            return self.begin(302, Location=f"/moved{self.path}")
        if content is None and self.path.startswith("/moved/"):
            content = owner.files.get(self.path.removeprefix("/moved"))
        if isinstance(fault, int) or content is None:
            return self.begin(fault or 404)
        self.send(b"<html>sorry</html>" if fault == "wrong" else content, fault)

    def send(self, content, fault):
        """The file, or what the Range asks of it; "truncate" stops half way, "stall" too but keeps the line open."""
        begin = int((self.headers.get("Range") or "bytes=0-")[6:].rstrip("-")) if fault != "no-range" else 0
        if begin and begin >= len(content):
            return self.begin(416, **{"Content-Range": f"bytes */{len(content)}"})
        rest = content[begin:]
        where = {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"} if begin else {}
        self.begin(206 if begin else 200, len(rest), **where)
        self.wfile.write(rest[: len(rest) // 2] if fault in ("truncate", "stall") else rest)
        self.wfile.flush()
        if fault == "stall":
            self.server.owner.closing.wait()

    def begin(self, status, length=0, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(length), "Connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_):
        pass


class Listener(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128  # five by default: a sixth connection at once would wait a second


class Server:
    """`files` {path: bytes}; `faults` {path: [fault, …]}, one per request, "…" as the last repeats the one before it.

    A fault: "truncate", "stall", "wrong" (an HTML page), "redirect" (to /moved/…), "no-range", an HTTP status, None.
    """

    def __init__(self, files=None):
        self.files, self.faults, self.requests = dict(files or {}), {}, []
        self.closing, self.lock = threading.Event(), threading.Lock()

    def next_fault(self, path):
        with self.lock:
            queue = self.faults.get(path, [])
            if queue[1:] == ["…"]:
                return queue[0]
            return queue.pop(0) if queue else None

    def __enter__(self):
        self.http = Listener(("127.0.0.1", 0), Handler)
        self.http.owner = self
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()
