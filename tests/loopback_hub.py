# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A Hub on the loop-back interface: enough of its HTTP interface for `from_pretrained("user/repo")`."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


_SHA = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_hub(repositories: dict[str, Path]) -> Iterator[str]:
    """Serve folders as model repositories, {"user/repo": folder}; yields the endpoint for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            pass

        def do_HEAD(self) -> None:
            self.respond(with_body=False)

        def do_GET(self) -> None:
            self.respond(with_body=True)

        def respond(self, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            for name, folder in repositories.items():
                if path.startswith(f"/api/models/{name}"):
                    rest = path.removeprefix(f"/api/models/{name}")
                    listing = tree_of(folder) if rest.startswith("/tree/") else model_info(name, folder)
                    return self.send(
                        200, json.dumps(listing).encode(), {"Content-Type": "application/json"}, with_body
                    )
                if path.startswith(f"/{name}/resolve/"):
                    file = folder / path.removeprefix(f"/{name}/resolve/").split("/", 1)[1]
                    if file.is_file():
                        content = file.read_bytes()
                        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": _SHA}
                        return self.send(200, content, headers, with_body)
                    return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _SHA}, with_body)
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, with_body)

        def send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def model_info(name: str, folder: Path) -> dict:
    siblings = [{"rfilename": file} for file in files_of(folder)]
    return {
        "id": name,
        "modelId": name,
        "sha": _SHA,
        "private": False,
        "tags": [],
        "downloads": 0,
        "siblings": siblings,
    }


def tree_of(folder: Path) -> list[dict]:
    return [
        {
            "type": "file",
            "path": file,
            "size": (folder / file).stat().st_size,
            "oid": hashlib.sha1(file.encode()).hexdigest(),
        }
        for file in files_of(folder)
    ]
