# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A Hub on the loop-back interface: enough of it for `from_pretrained("user/repo")` and for pushing."""

import base64
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote, urlsplit

import yaml
from interpreters import run_code


_SHA = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_loopback"


@dataclass
class Uploads:
    """Lets a Hub accept what the user "user" pushes, and keeps what it has seen.

    Args:
        folder: new repositories are made here, as folder/user/name.
        roles: by token, what it may do; only "write" may.
        visibility: by repository, as whoever made it asked for it; None if it was left open.
        commits: (repository, revision, summary, files) in order; those of a pull request change no file.
        branches: folders by (repository, branch), of those that were made beside main.
    """

    folder: Path
    roles: dict[str, str] = field(default_factory=lambda: {TOKEN: "write"})
    visibility: dict[str, str | None] = field(default_factory=dict)
    commits: list[tuple[str, str, str, list[str]]] = field(default_factory=list)
    branches: dict[tuple[str, str], Path] = field(default_factory=dict)

    def branch(self, name: str, revision: str | None) -> tuple[Path, str] | None:
        """Contents and SHA of a branch, by its name or that SHA; None if there is none."""
        for (repository, branch), folder in self.branches.items():
            sha = hashlib.sha1(b"".join((folder / file).read_bytes() for file in files_of(folder))).hexdigest()
            if repository == name and revision in (branch, sha):
                return folder, sha
        return None


@dataclass
class MovingBranch:
    """A repository whose branch moves to its next commit whenever somebody has asked for the branch by its name.

    Args:
        folders: contents of its commits, in order; the last one stays.
        num_asked: how often the branch was asked for by its name.
    """

    folders: list[Path]
    num_asked: int = 0

    def commit(self, revision: str | None) -> tuple[Path, str]:
        """Contents and SHA of a commit, by its SHA or by the name of the branch."""
        known = {f"{number:040x}": folder for number, folder in enumerate(self.folders, start=1)}
        if revision not in known:
            revision = list(known)[min(self.num_asked, len(known) - 1)]
            self.num_asked += 1
        return known[revision], revision


@contextmanager
def serve_hub(repositories: dict[str, Path | MovingBranch], uploads: Uploads | None = None) -> Iterator[str]:
    """Serve folders as model repositories, {"user/repo": folder}; yields the endpoint for HF_ENDPOINT.

    With `uploads` it also accepts new repositories and commits, and adds the repositories to the dictionary.
    """
    server = _server()
    assert server.repositories is None, "a process has one Hub at a time"
    server.repositories, server.uploads = repositories, uploads
    try:
        yield server.endpoint
    finally:
        server.repositories, server.uploads = None, None


@cache
def _server() -> ThreadingHTTPServer:
    """That of this process: with one endpoint for all its Hubs, what knows it can be used again."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.repositories, server.uploads = None, None
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    """Answers one request; what it serves stands in its server."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        path, uploads = unquote(urlsplit(self.path).path), self.server.uploads
        if uploads and path == "/api/whoami-v2":
            if self.role() is None:
                return self.send_json({"error": "Invalid username or password."}, 401)
            token = {"displayName": "loopback", "role": self.role()}
            return self.send_json({"type": "user", "name": "user", "orgs": [], "auth": {"accessToken": token}})
        name, folder, sha, rest = self.repository(path, "/api/models/")
        if uploads and rest == "/auth-check/write":
            refused = name is None or self.role() != "write"
            return self.send_json({"error": "Forbidden"} if refused else {}, 403 if refused else 200)
        if name is not None:
            private = uploads is not None and uploads.visibility.get(name) == "private"
            info = {"id": name, "modelId": name, "sha": sha, "private": private, "tags": [], "downloads": 0}
            info["siblings"] = [{"rfilename": file} for file in files_of(folder)]
            return self.send_json(tree_of(folder) if rest.startswith("/tree/") else info)
        name, folder, sha, rest = self.repository(path, "/")
        if name is None or not rest.startswith("/resolve/"):
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        file = folder / rest.removeprefix("/resolve/").split("/", 1)[1]
        if not file.is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        content = file.read_bytes()
        self.send(200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": sha})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlsplit(self.path).path)
        if self.server.uploads is None or self.role() is None:
            return self.send_json({"error": "Invalid username or password."}, 401)
        if path == "/api/validate-yaml":
            is_card = isinstance(yaml.safe_load(json.loads(body)["content"].split("---\n")[1]), dict)
            answer = {"errors": [] if is_card else [{"message": "no metadata"}], "warnings": []}
            return self.send_json(answer, 200 if is_card else 400)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        name, folder, _, rest = self.repository(path, "/api/models/")
        if name is None or self.role() != "write":
            return self.send_json({"error": "Forbidden"}, 403)
        if rest.startswith("/branch/"):
            return self.make_branch(name, folder, rest.removeprefix("/branch/"))
        if rest.startswith("/preupload/"):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
            return self.send_json({"files": modes})
        in_pull_request = "create_pr=1" in urlsplit(self.path).query
        self.commit(name, folder, "refs/pr/1" if in_pull_request else rest.removeprefix("/commit/"), body)

    def create(self, request: dict) -> None:
        name = f"{request['organization'] or 'user'}/{request['name']}"
        answer = {"url": f"{self.server.endpoint}/{name}"}
        if name in self.server.repositories:
            return self.send_json(answer | {"error": "You already created this model repo"}, 409)
        if not name.startswith("user/") or self.role() != "write":
            return self.send_json({"error": f"You don't have the rights to create a model under {name}"}, 403)
        folder = self.server.repositories[name] = self.server.uploads.folder / name
        folder.mkdir(parents=True)
        self.server.uploads.visibility[name] = request.get("visibility")
        self.send_json(answer)

    def make_branch(self, name: str, folder: Path, branch: str) -> None:
        if (name, branch) in self.server.uploads.branches:
            return self.send_json({"error": "Reference already exists"}, 409)
        copied = self.server.uploads.folder / "branches" / branch / name
        shutil.copytree(folder, copied)
        self.server.uploads.branches[name, branch] = copied
        self.send_json({})

    def commit(self, name: str, folder: Path, revision: str, body: bytes) -> None:
        header, *operations = (json.loads(line) for line in body.splitlines())
        assert header["key"] == "header" and {one["key"] for one in operations} <= {"file", "deletedFile"}
        added = [one["value"] for one in operations if one["key"] == "file"]
        files = {value["path"]: base64.b64decode(value["content"]) for value in added}
        self.server.uploads.commits.append((name, revision, header["value"]["summary"], sorted(files)))
        for file, content in files.items() if revision != "refs/pr/1" else []:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
        for one in operations:
            if one["key"] == "deletedFile":
                (folder / one["value"]["path"]).unlink()
        answer = {"commitUrl": f"{self.server.endpoint}/{name}/commit/{_SHA}", "commitOid": _SHA}
        if revision == "refs/pr/1":
            answer["pullRequestUrl"] = f"{self.server.endpoint}/{name}/discussions/1"
        self.send_json(answer)

    def role(self) -> str | None:
        return self.server.uploads.roles.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def repository(self, path: str, prefix: str) -> tuple[str | None, Path | None, str, str]:
        """Name, folder and commit of the repository that a path is about, and the rest of the path."""
        for name, folder in (self.server.repositories or {}).items():
            if f"{path}/".startswith(f"{prefix}{name}/"):
                rest = path.removeprefix(f"{prefix}{name}")
                revision = re.match(r"/(?:resolve|revision|tree|preupload|commit)/([^/]+)", rest)
                revision = revision and revision[1]
                if not isinstance(folder, Path):
                    return name, *folder.commit(revision), rest
                branch = self.server.uploads and self.server.uploads.branch(name, revision)
                return name, *(branch or (folder, _SHA)), rest
        return None, None, _SHA, ""

    def send_json(self, answer: dict | list, status: int = 200) -> None:
        self.send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def tree_of(folder: Path) -> list[dict]:
    sizes = {file: (folder / file).stat().st_size for file in files_of(folder)}
    oids = {file: hashlib.sha1(file.encode()).hexdigest() for file in sizes}
    return [{"type": "file", "path": file, "size": size, "oid": oids[file]} for file, size in sizes.items()]


def run_with_hub(code: str, endpoint: str, home: Path) -> str:
    """What a process prints, errors included, that sees this Hub and no other, and keeps its files in `home`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": _home(home), "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    result = run_code(code, environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def _home(folder: Path) -> str:
    """The folder by a path that is the same for all: where files are kept is known once, as the endpoint is."""
    folder.mkdir(parents=True, exist_ok=True)
    link = Path(_links().name, "home")
    link.unlink(missing_ok=True)
    link.symlink_to(folder)
    return str(link)


@cache
def _links() -> TemporaryDirectory:
    return TemporaryDirectory()
