"""A small server that speaks as much of the Hub's API as its own client needs to make a repository, commit to it and read it back.

Regular files come inside the commit, large ones by the LFS protocol (batch, PUT, verify). Tokens are `hf_write` and `hf_read`; a closed
repository is read with `hf_write` alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Use as a context manager. repos: name to {"private", "files": path to bytes, "messages"}; objects: LFS objects by sha256; closed: names of
    repositories to `private` or `gated`."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.closed: dict[str, str] = {}
        self.requests: list[str] = []
        self.fail_commits = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub._answer(self, "GET")

            do_HEAD = lambda self: hub._answer(self, "HEAD")  # noqa: E731
            do_POST = lambda self: hub._answer(self, "POST")  # noqa: E731
            do_PUT = lambda self: hub._answer(self, "PUT")  # noqa: E731

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler, method: str) -> None:
        body = request.rfile.read(int(request.headers["Content-Length"] or 0))
        path = request.path.partition("?")[0]
        self.requests.append(f"{method} {path}")
        status, reply, headers = self._route(method, path, body, request.headers["Authorization"] or "")
        content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        request.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if method != "HEAD":
            request.wfile.write(content)

    def _route(self, method: str, path: str, body: bytes, authorization: str) -> tuple[int, Any, dict[str, str]]:
        parts = path.strip("/").split("/")
        if parts[0] == "lfs-object":
            assert hashlib.sha256(body).hexdigest() == parts[1]
            self.objects[parts[1]] = body
            return 200, {}, {}
        token = authorization.removeprefix("Bearer ").removeprefix("Basic ")
        if token and token not in ("hf_write", "hf_read"):
            return 401, {"error": "Invalid credentials in Authorization header"}, {"X-Error-Message": "Invalid credentials in Authorization header"}
        if method != "GET" and method != "HEAD" and token not in ("hf_write",):
            return (403, {"error": "write access is missing"}, {"X-Error-Message": "write access is missing"}) if token == "hf_read" else (401, {"error": "Invalid token"}, {})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in self.repos:
                return 409, {"error": "You already created this model repo", "url": f"{self.address}/{name}"}, {}
            self.repos[name] = {"private": bool(asked.get("private") or asked.get("visibility") == "private"), "files": {}, "messages": []}
            return 200, {"url": f"{self.address}/{name}", "name": name, "id": name}, {}
        if path == "/api/whoami-v2":
            return (200, {"type": "user", "name": "me", "auth": {"type": "access_token", "accessToken": {"role": token.removeprefix("hf_")}}}, {}) if token else \
                (401, {"error": "Invalid username or password."}, {})
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [
                {"oid": item["oid"], "size": item["size"],
                 "actions": {"upload": {"href": f"{self.address}/lfs-object/{item['oid']}", "header": {}}}} for item in json.loads(body)["objects"]]}, {}
        name = "/".join(parts[2:4]) if parts[0] == "api" else "/".join(parts[:2])
        if name not in self.repos:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        repo = self.repos[name]
        if self.closed.get(name) == "private" and token != "hf_write":
            return 404 if token else 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if self.closed.get(name) == "gated" and token != "hf_write" and parts[2:3] == ["resolve"] or parts[4:5] == ["auth-check"] and name in self.closed and token != "hf_write":
            return 403 if token else 401, {"error": "Access to model is restricted"}, {"X-Error-Code": "GatedRepo"}
        if parts[4:5] == ["auth-check"]:
            return 200, {}, {}
        if parts[4:5] == ["revision"] and parts[5] not in ("main", COMMIT) or parts[2:3] == ["resolve"] and parts[3] not in ("main", COMMIT):
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        if parts[:2] == ["api", "models"] and len(parts) == 4 or parts[4:5] == ["revision"]:
            return 200, {"id": name, "modelId": name, "sha": COMMIT, "private": repo["private"], "siblings": [{"rfilename": path} for path in repo["files"]],
                         "tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False}, {}
        if parts[4:5] == ["tree"]:
            return 200, [{"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()} for path, content in repo["files"].items()], {}
        if parts[4:5] == ["preupload"]:
            return 200, {"files": [{"path": item["path"], "uploadMode": "lfs" if item["path"].endswith((".gguf", ".safetensors")) else "regular",
                                    "shouldIgnore": False, "oid": None} for item in json.loads(body)["files"]]}, {}
        if parts[4:5] == ["commit"]:
            return self._commit(repo, name, body)
        if parts[2:3] == ["resolve"]:
            content = repo["files"].get("/".join(parts[4:]))
            if content is None:
                return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
            return 200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return 404, {"error": path}, {}

    def _commit(self, repo: dict[str, Any], name: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if self.fail_commits:
            return 400, {"error": "commit refused"}, {"X-Error-Message": "commit refused"}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repo["messages"].append(value["summary"])
            elif entry["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repo["files"][value["path"]] = self.objects[value["oid"]]
        return 200, {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.address}/{name}/commit/{COMMIT}", "hookOutput": ""}, {}
