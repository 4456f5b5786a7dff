"""A small web server to test downloads: files from a dict, Range, and the faults of real servers.

with Server({"/a.zip": content}) as server:
    server.faults["/a.zip"] = ["truncate", 503]  # of the first two requests; the third succeeds
    urlopen(server.url + "/a.zip")
    server.requests  # [("/a.zip", None)]: path and Range header of each request
"""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        owner = self.server.owner
        owner.requests.append((self.path, self.headers.get("Range")))
        fault = owner.next_fault(self.path)
        content = owner.files.get(self.path)
        self.close_connection = True
        if fault == "redirect":
            return self.begin(302, Location=f"/moved{self.path}")
        if content is None and self.path.startswith("/moved/"):
            content = owner.files.get(self.path.removeprefix("/moved"))
        if isinstance(fault, int) or content is None:
            return self.begin(fault or 404)
        self.send(b"<html>sorry</html>" if fault == "wrong" else content, fault)

    def send(self, content, fault):
        """The file, or what the Range header asks for.

        "truncate" stops half way; "stall" does too, but keeps the connection open.
        """
        begin = 0
        if fault != "no-range" and self.headers.get("Range"):
            begin = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        if begin and begin >= len(content):
            return self.begin(416, **{"Content-Range": f"bytes */{len(content)}"})
        rest = content[begin:]
        headers = {}
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self.begin(206 if begin else 200, len(rest), **headers)
        self.wfile.write(rest[: len(rest) // 2] if fault in ("truncate", "stall") else rest)
        self.wfile.flush()
        if fault == "stall":
            self.server.owner.closing.wait()

    def begin(self, status, length=0, **headers):
        self.send_response(status)
        headers = {"Content-Length": str(length), "Connection": "close", **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_):
        pass


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # 5 by default: a sixth connection at once would wait a second


class Server:
    """`files` {path: bytes}; `faults` {path: [fault, …]}, one fault a request.

    "…" as the last of a list repeats the one before it. A fault: "truncate", "stall", "wrong" (an
    HTML page), "redirect" (to /moved/…), "no-range", an HTTP status, None.
    """

    def __init__(self, files=None):
        self.files = dict(files or {})
        self.faults = {}
        self.requests = []
        self.closing = threading.Event()
        self.lock = threading.Lock()

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
        options = {"poll_interval": 0.01}
        threading.Thread(target=self.http.serve_forever, kwargs=options, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()
