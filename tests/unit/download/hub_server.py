"""A model hub in a thread, with the faults of real networks on request."""

import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field

COMMIT = "c0ffee" * 6 + "c0ff"
PAGE_BYTES = 1 << 14


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    sent: int = 0


@dataclass
class Hub:
    """What the server holds and how it behaves; `requests` is what it was asked."""

    files: dict[str, bytes]
    url: str = ""
    gated: bool = False
    needs_token: str | None = None
    known_revisions: tuple[str, ...] = ("main", COMMIT)
    cuts: dict[str, list[int]] = field(
        default_factory=dict
    )  # path -> after how many bytes to hang up, request by request
    corrupt: dict[str, int] = field(default_factory=dict)  # path -> in how many answers one bit is wrong
    statuses: dict[str, list[int]] = field(default_factory=dict)  # path -> statuses to answer first
    ranges: bool = True
    seconds_per_page: float = 0.0
    page_bytes: int = PAGE_BYTES
    drips_lists: bool = False  # what the API answers comes in such pages too
    redirect_to: str | None = None
    retry_after: str | None = None  # beside each of the statuses
    endless: bool = False  # files go on after their end, and so does what the API answers
    answer: bytes | None = None  # what the API answers instead
    entries: list[object] | None = None  # what it lists instead
    page_size: int = 1000  # files that it lists at a time
    next_page: str | None = None  # where it says that the list goes on, instead
    requests: list[Request] = field(default_factory=list)

    def digest(self, path: str) -> str:
        body = self.files[path]
        if self.is_lfs(path):
            return hashlib.sha256(body).hexdigest()
        return hashlib.sha1(f"blob {len(body)}\0".encode() + body).hexdigest()

    @staticmethod
    def is_lfs(path: str) -> bool:
        return path.endswith((".safetensors", ".bin", ".pth"))

    def bodies(self, path: str) -> list[Request]:
        """The requests for the content of a file."""
        return [request for request in self.requests if request.path.endswith(f"/resolve/{COMMIT}/{path}")]

    def sent(self, path: str) -> int:
        return sum(request.sent for request in self.bodies(path))


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def do_GET(self) -> None:
        hub, path = self.server.hub, urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        request = Request(path, {name.lower(): value for name, value in self.headers.items()})
        hub.requests.append(request)
        if "missing" in path:
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and hub.needs_token and token != hub.needs_token:
            message = {"X-Error-Message": "Invalid credentials in Authorization header"}
            return self._json({"error": "Invalid credentials in Authorization header"}, 401, message)
        if path.startswith("/api/") and hub.statuses.get("api"):
            return self._status(hub.statuses["api"].pop(0))
        if path.startswith("/api/") and hub.drips_lists:
            return self._head(200, {"Connection": "close"}) or self._write(b" " * 10_000, request)
        if path.startswith("/api/") and hub.answer is not None:
            return self._head(200, {"Connection": "close"}) or self._endless(request, hub.answer)
        if match := re.fullmatch(r"/api/models/[^/]+/[^/]+(?:/revision/([^/]+))?", path):
            if (match[1] or "main") not in hub.known_revisions:
                return self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return self._json({"_id": "1", "id": "o/m", "sha": COMMIT, "private": False, "tags": [], "siblings": []})
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/tree/[^/]+", path):
            return self._list()
        match = re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", path)
        if not match or match[1] not in hub.files:
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        if hub.gated and (not token or token != hub.needs_token):
            return self._json({"error": "gated"}, 403 if token else 401, {"X-Error-Code": "GatedRepo"})
        if hub.statuses.get(match[1]):
            return self._status(hub.statuses[match[1]].pop(0))
        if hub.redirect_to:
            return self._head(302, {"Location": hub.redirect_to + self.path, "Content-Length": "0"})
        if hub.endless:
            return self._head(200, {"Connection": "close"}) or self._endless(request, hub.files[match[1]])
        return self._body(match[1], request)

    def _list(self) -> None:
        hub, start = (
            self.server.hub,
            int((urllib.parse.urlparse(self.path).query + "&at=0").split("at=")[1].split("&")[0]),
        )
        entries = [self._entry(name) for name in hub.files] if hub.entries is None else hub.entries
        end = start + hub.page_size
        following = hub.next_page or (f"{self.path.split('&')[0]}&at={end}" if end < len(entries) else None)
        self._json(entries[start:end], headers={"Link": f'<{following}>; rel="next"'} if following else None)

    def _entry(self, name: str) -> dict[str, object]:
        hub = self.server.hub
        entry = {"type": "file", "path": name, "size": len(hub.files[name]), "oid": "0" * 40}
        if hub.is_lfs(name):
            return {**entry, "lfs": {"oid": hub.digest(name), "size": len(hub.files[name]), "pointerSize": 130}}
        return {**entry, "oid": hub.digest(name)}

    def _body(self, name: str, request: Request) -> None:
        hub, body, start = self.server.hub, self.server.hub.files[name], 0
        if hub.corrupt.get(name):
            hub.corrupt[name] -= 1
            body = body[:-1] + bytes([body[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", "")) if hub.ranges else None
        start = int(asked[1]) if asked else 0
        headers = {"ETag": f'"{hub.digest(name)}"', "Content-Length": str(len(body) - start)}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self._head(206 if asked else 200, headers)
        cut = hub.cuts[name].pop(0) if hub.cuts.get(name) else None
        body = body[start:][:cut]
        self._write(body, request)
        self.close_connection = cut is not None

    def _write(self, body: bytes, request: Request) -> None:
        hub = self.server.hub
        for at in range(0, len(body), hub.page_bytes):
            self.wfile.write(body[at : at + hub.page_bytes])
            request.sent += len(body[at : at + hub.page_bytes])
            time.sleep(hub.seconds_per_page)

    def _endless(self, request: Request, body: bytes) -> None:
        """The body, again and again for 400 MB if the hub is endless: more than anyone should take."""
        self.close_connection = True
        while body and request.sent < 400_000_000:
            self.wfile.write(body)
            request.sent += len(body)
            body = body * max(1, PAGE_BYTES // len(body)) if self.server.hub.endless else b""

    def _status(self, status: int) -> None:
        wait = self.server.hub.retry_after
        self._json({"error": "busy"}, status, {"Retry-After": wait} if wait else None)

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        length = {"Content-Length": str(len(body)), "Content-Type": "application/json"}
        self._head(status, {**length, **(headers or {})})
        self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub, host: str = "127.0.0.1") -> None:
        super().__init__((host, 0), _Handler)
        self.hub = hub
        hub.url = f"http://{host}:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that hangs up is part of the tests


def serve(hub: Hub, host: str = "127.0.0.1") -> Iterator[Hub]:
    server = _Server(hub, host)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()
