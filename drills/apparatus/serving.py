"""A file server that fails on request, over real connections of the loopback interface."""

import io
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

STALL = 3.0  # seconds


class RangeHandler(SimpleHTTPRequestHandler):
    """Serves a folder; answers `Range: bytes=a-b`, as every real host of data sets does."""

    identifies_files = True

    def do_GET(self) -> None:
        """The headers and, unless only these are asked for, the file or a range of it."""
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        content, status = path.read_bytes(), 200
        total = len(content)
        headers = {"Accept-Ranges": "bytes"}
        if self.identifies_files:
            headers["ETag"] = f'"{path.stat().st_mtime_ns}"'
        if "Range" in self.headers:
            first, last = self._range(total)
            content, status = content[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{total}"
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815

    def _range(self, total: int) -> tuple[int, int]:
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        if not first:  # the last so many
            return total - int(last), total - 1
        return int(first), min(int(last or total - 1), total - 1)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


class FailingHandler(RangeHandler):
    """Fails as `next_fault` says: with a status, or with a method of this class that is called so."""

    def next_fault(self) -> str:
        """A status, the name of a method, or "none"."""
        return "none"

    def do_GET(self) -> None:
        """An answer, or a fault."""
        fault = self.next_fault()
        if fault.isdigit():
            self.send_error(int(fault))
        else:
            getattr(self, fault)()

    do_HEAD = do_GET  # noqa: N815

    def none(self) -> None:
        """All is well."""
        super().do_GET()

    def cut(self) -> None:
        """The headers and half of the body; then the connection is closed."""
        connection, self.wfile = self.wfile, io.BytesIO()
        super().do_GET()
        answer, self.wfile = self.wfile.getvalue(), connection
        self.wfile.write(answer[: (answer.index(b"\r\n\r\n") + len(answer)) // 2])

    def reset(self) -> None:
        """The connection is closed as by a machine that has crashed."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()

    def reset_in_the_body(self) -> None:
        """The same after half of the body."""
        self.cut()
        self.reset()

    def silence(self) -> None:
        """No answer, for longer than anybody here waits."""
        time.sleep(STALL)

    def stall_in_the_body(self) -> None:
        """Half of the body, and then silence."""
        self.cut()
        self.silence()

    def whole(self) -> None:
        """A server that does not know ranges."""
        del self.headers["Range"]
        super().do_GET()

    def page(self) -> None:
        """A proxy's word in the place of the data, with a status that says that all is well."""
        self.send_response(200)
        self.send_header("Content-Length", "11")
        self.end_headers()
        self.wfile.write(b"<html>Sorry")

    def other_range(self) -> None:
        """A well-formed answer, shorter than the range that was asked for."""
        first, last = self._range(total=2**62)
        self.headers.replace_header("Range", f"bytes={first}-{last - 1}")
        super().do_GET()


class QuietServer(ThreadingHTTPServer):
    """Clients that are gone are no news to it."""

    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: Any) -> None:
        """Says nothing."""


@contextmanager
def serve(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server in a thread of this process: its URL."""
    server = QuietServer(("127.0.0.1", 0), handler)
    threading.Thread(
        target=server.serve_forever, args=(0.01,), daemon=True
    ).start()  # how long its end takes, in seconds
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def serve_folder(folder: Path, handler: type[RangeHandler] = RangeHandler) -> AbstractContextManager[str]:
    """A server of a folder's files."""
    return serve(partial(handler, directory=str(folder)))
