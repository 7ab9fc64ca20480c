"""A stand-in for the Hugging Face Hub on this machine: as much of its HTTP API as pushing and loading asks."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import yaml

TOKEN = "hf_of_a_test"


class Hub(ThreadingHTTPServer):
    """``repositories``: NAME → {path: content}; ``private``: their names; ``asked``: every request, as "GET /path"."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "llama2", "openrail", "other"}  # a few of the Hub's


def faults_of(card: str) -> list[str]:
    """What the Hub would say of a card's metadata, by its published description of them."""
    data = yaml.safe_load(card.split("---")[1])
    names = [data[key] for key in ("base_model",) if key in data] + data.get("datasets", [])
    faults = [f"{name!r} is no name of a repository" for name in names if not NAME.fullmatch(name)]
    faults += [f"license {data['license']!r} is not known"] if data.get("license", "mit") not in LICENCES else []
    for entry in data.get("model-index", []):
        if not entry.get("name"):
            faults.append("model-index: an entry has no name")
        for result in entry["results"]:
            asked = [result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]]
            asked += [text for metric in result["metrics"] for text in (metric["type"], str(float(metric["value"])))]
            faults += ["model-index: a result lacks a value"] * (not all(asked))
    return faults


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+)?", path):
            if (files := self.readable(match[1])) is not None:
                self.send(self.tree(files) if "/tree/" in path else self.about(match[1], files))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            files = self.readable(match[1])
            if files is not None and match[2] in files:
                content = files[match[2]]
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                self.send(content, headers={"X-Repo-Commit": commit_of(files), "ETag": etag})
            elif files is not None:
                self.send({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        else:
            self.send({"error": f"no such address {path}"}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/api/validate-yaml":
            faults = faults_of(json.loads(body)["content"])
            return self.send({"errors": [{"message": fault} for fault in faults], "warnings": []}, 400 if faults else 200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            return self.create(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", self.path):
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for each in json.loads(body)["files"]
            ]
            return self.send({"files": files})
        if self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.url}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self.send({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            return self.commit(match[1], [json.loads(line) for line in body.splitlines() if line])
        return self.send({"error": "no such address"}, 404)

    def do_PUT(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.large[self.path.rpartition("/")[2]] = content
        self.send({})

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        there = name in self.server.repositories
        self.server.repositories.setdefault(name, {})
        if asked.get("visibility") == "private" or asked.get("private"):
            self.server.private.add(name)
        self.send({"url": f"{self.server.url}/{name}", "name": name}, 409 if there else 200)

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        oid = commit_of(files)
        self.send({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})

    def readable(self, name: str) -> dict[str, bytes] | None:
        """A repository's files; answers itself where there is none, or it is not this reader's."""
        known = name in self.server.repositories
        if known and (name not in self.server.private or self.headers.get("Authorization") == f"Bearer {TOKEN}"):
            return self.server.repositories[name]
        self.send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        return None

    def about(self, name: str, files: dict[str, bytes]) -> dict[str, Any]:
        siblings = [{"rfilename": path} for path in files]
        return {"id": name, "modelId": name, "sha": commit_of(files), "private": False, "siblings": siblings}

    def tree(self, files: dict[str, bytes]) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
        ]

    def send(self, answer: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
