"""A small S3 server of its own, on loopback, that lacks what one asks it to lack. It checks no signature's value."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

#: What it can lack: conditions on a PUT, on the end of an upload in parts, pre-signed URLs, parts of an object.
ABILITIES = frozenset({"conditional put", "conditional parts", "signed", "ranges", "private"})


@contextmanager
def serving(abilities: frozenset[str] = ABILITIES) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Its endpoint, and what is in it: path -> bytes."""
    objects: dict[str, bytes] = {}
    parts: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _ask(self) -> tuple[str, dict[str, list[str]], bytes]:
            url = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return url.path, parse_qs(url.query, keep_blank_values=True), body

        def _give(self, status: int, body: bytes = b"", **fields: str) -> None:
            self.send_response(status)
            for name, value in {"ETag": '"e"', **fields}.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _refused(self, path: str, ability: str) -> bool:
            conditional = ability in abilities and self.headers.get("If-None-Match") == "*"
            return conditional and path in objects

        def do_PUT(self) -> None:
            path, query, body = self._ask()
            if "uploadId" in query:
                source = self.headers.get("x-amz-copy-source")
                parts[query["uploadId"][0]] = objects["/" + source.lstrip("/")] if source else body
                copied = b'<CopyPartResult><ETag>"e"</ETag></CopyPartResult>' if source else b""
                self._give(200, copied)
            elif self._refused(path, "conditional put"):
                self._give(412)
            else:
                objects[path] = body
                self._give(200)

        def do_POST(self) -> None:
            path, query, body = self._ask()
            if "uploads" in query:
                upload = f"u{len(parts)}"
                parts[upload] = b""
                text = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
                self._give(200, text.encode())
            elif "uploadId" in query:
                if self._refused(path, "conditional parts"):
                    self._give(412)
                    return
                objects[path] = parts[query["uploadId"][0]]
                done = '<CompleteMultipartUploadResult><ETag>"e"</ETag></CompleteMultipartUploadResult>'
                self._give(200, done.encode())
            else:  # several objects deleted at once
                for key in re.findall(r"<Key>([^<]*)</Key>", body.decode()):
                    objects.pop(f"{path.rstrip('/')}/{key}", None)
                self._give(200, b"<DeleteResult></DeleteResult>")

        def do_GET(self) -> None:
            path, query, _ = self._ask()
            signed = "X-Amz-Signature" in query
            known = "signed" in abilities if signed else "Authorization" in self.headers
            if not known and (signed or "private" in abilities):
                self._give(403)
            elif "list-type" in query:
                self._give(200, b"<ListBucketResult></ListBucketResult>")
            elif path not in objects:
                self._give(404)
            else:
                self._object(objects[path])

        def _object(self, body: bytes) -> None:
            modified = "Tue, 24 Nov 2026 15:00:00 GMT"
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            if found and "ranges" in abilities:
                part = body[int(found[1]) : int(found[2]) + 1]
                content_range = f"bytes {found[1]}-{int(found[1]) + len(part) - 1}/{len(body)}"
                self._give(206, part, Content_Range=content_range, Last_Modified=modified)
            else:
                self._give(200, body, Last_Modified=modified)

        do_HEAD = do_GET

        def do_DELETE(self) -> None:
            path, query, _ = self._ask()
            if "uploadId" not in query:  # that one ends an upload in parts
                objects.pop(path, None)
            self._give(204)

        def log_message(self, *arguments: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", objects
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
