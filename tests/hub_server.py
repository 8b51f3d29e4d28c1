"""A server on loopback that speaks the HTTP API of the Hub, so that tests use the real clients: repos of models and data sets with
commits, branches, tags and pull requests; private ones; LFS uploads; downloads in ranges. No Xet."""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import RLock, Thread
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_right"
USER = "me"
IS_LFS = re.compile(r".*\.(safetensors|parquet|arrow|tar|png|jpg|mp4|bin|pt)")
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass
class Repo:
    """The files of every commit, and the commits that names point to."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # main, branches, tags, refs/pr/N
    num_discussions: int = 0

    def sha(self, revision: str) -> str:
        """Raises KeyError for a revision that does not exist."""
        if revision in self.refs:
            return self.refs[revision]
        found = [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
        if not found:
            raise KeyError(revision)
        return found[0]

    def commit(self, revision: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{id(self)} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.refs[revision] = files, sha
        return sha


class HubServer:
    """Args: dropped: regular expressions of "METHOD path", each of which loses its connection half way once."""

    def __init__(self, port: int = 0):
        self.repos: dict[str, Repo] = {}  # "models/me/name" -> repo
        self.blobs: dict[str, bytes] = {}  # SHA-256 -> contents
        self.requests: list[str] = []
        self.dropped: list[str] = []
        self.lock = RLock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def clear(self) -> None:
        for contents in (self.repos, self.blobs, self.requests, self.dropped):
            contents.clear()

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The files of "models/OWNER/NAME" or "datasets/OWNER/NAME"."""
        repo = self.repos[name]
        return repo.commits[repo.sha(revision)]

    @contextmanager
    def recording(self):
        """Yields the list of the requests that are made inside."""
        start, seen = len(self.requests), []
        yield seen
        seen += self.requests[start:]


class RefusedError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message or code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *args) -> None:
        pass

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.parts = [unquote(part) for part in url.path.strip("/").split("/")]  # a revision may be refs%2Fpr%2F1
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        name = f"{self.command} {unquote(url.path)}"
        self.hub.requests.append(name)
        self.is_dropped = False
        for pattern in self.hub.dropped:
            if re.search(pattern, name):
                self.hub.dropped.remove(pattern)
                self.is_dropped = True
                break
        if self.is_dropped and self.command in ("POST", "PUT"):
            self.close_connection = True
            self.connection.close()
            return
        body = self.read_body()
        try:
            with self.hub.lock:
                self.check_token()
                self.route(body)
        except RefusedError as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self.send(refused.status, {"error": refused.message}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request  # noqa: N815

    def read_body(self) -> bytes:
        if (length := self.headers.get("Content-Length")) is not None:
            return self.rfile.read(int(length))
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return b""
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, status: int, body=b"", headers: dict | None = None) -> None:
        headers = dict(headers or {})
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.is_dropped else body)
        if self.is_dropped:
            self.close_connection = True
            self.connection.close()

    # Who may see and write what

    def check_token(self) -> None:
        self.is_owner = False
        if (authorization := self.headers.get("Authorization")) is not None:
            if authorization != f"Bearer {TOKEN}":
                raise RefusedError(401, message="Invalid credentials in Authorization header")
            self.is_owner = True

    def check_owner(self) -> None:
        if not self.is_owner:
            raise RefusedError(401, message="Invalid username or password.")

    def find(self, kind: str, owner: str, name: str) -> Repo:
        repo = self.hub.repos.get(f"{kind}/{owner}/{name}")
        if repo is None or (repo.private and not self.is_owner):
            raise RefusedError(404 if self.is_owner else 401, "RepoNotFound", "Repository not found")
        return repo

    @staticmethod
    def sha_of(repo: Repo, revision: str) -> str:
        try:
            return repo.sha(revision)
        except KeyError:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}") from None

    # Routes

    def route(self, body: bytes) -> None:
        match self.parts:
            case ["api", "validate-yaml"]:
                self.send(200, {"errors": [], "warnings": []})
            case ["api", "whoami-v2"]:
                self.check_owner()
                access = {"accessToken": {"role": "write", "displayName": "test"}, "type": "access_token"}
                self.send(200, {"type": "user", "id": "1", "name": USER, "orgs": [], "auth": access})
            case ["api", "repos", "create" | "delete" as verb]:
                self.check_owner()
                self.create_or_delete(verb, json.loads(body))
            case ["lfs", oid]:
                if hashlib.sha256(body).hexdigest() != oid:
                    raise RefusedError(400, message="the contents are not those of the SHA-256")
                self.hub.blobs[oid] = body
                self.send(200)
            case [*kind, owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                self.check_owner()
                self.find(kind[0] if kind else "models", owner, name.removesuffix(".git"))
                self.offer_uploads(json.loads(body))
            case ["api", "models" | "datasets" | "spaces" as kind, owner, name, *rest]:
                self.repo_api(self.find(kind, owner, name), kind, f"{owner}/{name}", rest, body)
            case ["datasets" | "spaces" as kind, owner, name, "resolve", revision, *path]:
                self.send_file(self.find(kind, owner, name), revision, "/".join(path))
            case [owner, name, "resolve", revision, *path]:
                self.send_file(self.find("models", owner, name), revision, "/".join(path))
            case _:
                raise RefusedError(404, "EntryNotFound", f"no such route: {self.path}")

    def create_or_delete(self, verb: str, fields: dict) -> None:
        kind, repo_id = f"{fields.get('type') or 'model'}s", f"{fields.get('organization') or USER}/{fields['name']}"
        key = f"{kind}/{repo_id}"
        if verb == "delete":
            if self.hub.repos.pop(key, None) is None:
                raise RefusedError(404, "RepoNotFound", "Repository not found")
            self.send(200, {})
            return
        is_new = key not in self.hub.repos
        if is_new:
            is_private = fields.get("private") or fields.get("visibility") == "private"
            self.hub.repos[key] = Repo(private=bool(is_private))
            self.hub.repos[key].commit("main", {".gitattributes": ATTRIBUTES})
        prefix = "" if kind == "models" else f"{kind}/"
        url = f"{self.hub.endpoint}/{prefix}{repo_id}"
        self.send(200 if is_new else 409, {"url": url, "name": repo_id, "id": repo_id})

    def offer_uploads(self, fields: dict) -> None:
        objects = []
        for wanted in fields["objects"]:
            href = f"{self.hub.endpoint}/lfs/{wanted['oid']}"
            actions = {} if wanted["oid"] in self.hub.blobs else {"actions": {"upload": {"href": href}}}
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **actions})
        headers = {"Content-Type": "application/vnd.git-lfs+json"}
        self.send(200, {"transfer": "basic", "objects": objects}, headers)

    def repo_api(self, repo: Repo, kind: str, repo_id: str, rest: list[str], body: bytes) -> None:
        is_write = self.command != "GET" and rest[:1] not in (["paths-info"], ["preupload"])
        if is_write:
            self.check_owner()
        match rest:
            case [] | ["revision", _]:
                self.send(200, describe(repo, repo_id, self.sha_of(repo, rest[1] if rest else "main")))
            case ["refs"]:
                named = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": s} for n, s in repo.refs.items()]
                pulls = [ref for ref in named if ref["name"].startswith("refs/pr/")]
                branches = [ref for ref in named if ref not in pulls]
                pulls = [{**ref, "ref": ref["name"]} for ref in pulls]
                self.send(200, {"branches": branches, "converts": [], "tags": [], "pullRequests": pulls})
            case ["tree", revision, *path]:
                self.send(200, self.list_folder(repo.commits[self.sha_of(repo, revision)], "/".join(path)))
            case ["paths-info", revision]:
                files = repo.commits[self.sha_of(repo, revision)]
                paths = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
                self.send(200, [entry(path, files[path]) for path in paths if path in files])
            case ["preupload", revision]:
                self.check_owner()
                self.sha_of(repo, revision)
                files = [
                    {"path": f["path"], "uploadMode": "lfs" if IS_LFS.fullmatch(f["path"]) else "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]  # fmt: skip
                self.send(200, {"files": files})
            case ["commit", revision]:
                self.commit(repo, repo_id, revision, body)
            case ["branch" | "tag" as what, name]:
                self.change_ref(repo, what, name, body)
            case ["discussions", number, "merge"]:
                repo.refs["main"] = repo.refs[f"refs/pr/{number}"]
                self.send(200, {})
            case ["settings"]:
                fields = json.loads(body)
                repo.private = fields.get("private", fields.get("visibility") == "private")
                self.send(200, {})
            case _:
                raise RefusedError(404, "EntryNotFound", f"no such route: {self.path}")

    def change_ref(self, repo: Repo, what: str, name: str, body: bytes) -> None:
        if self.command == "DELETE":
            del repo.refs[name]
        elif what == "tag":  # POST tag/REVISION {"tag": name}
            repo.refs[json.loads(body)["tag"]] = self.sha_of(repo, name)
        elif name in repo.refs:
            raise RefusedError(409, message=f"{name} exists")
        else:
            repo.refs[name] = self.sha_of(repo, (json.loads(body or b"{}")).get("startingPoint", "main"))
        self.send(200, {})

    def commit(self, repo: Repo, repo_id: str, revision: str, body: bytes) -> None:
        files = dict(repo.commits[self.sha_of(repo, revision)])
        for line in body.splitlines():
            change = json.loads(line)
            value = change["value"]
            match change["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.blobs[value["oid"]]
                case "deletedFile":
                    files.pop(value["path"], None)
                case "deletedFolder":
                    files = {p: b for p, b in files.items() if not p.startswith(value["path"].rstrip("/") + "/")}
        answer = {"success": True}
        if self.query.get("create_pr") == "1":
            repo.num_discussions += 1
            revision = f"refs/pr/{repo.num_discussions}"
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo_id}/discussions/{repo.num_discussions}"
        sha = repo.commit(revision, files)
        self.send(200, {**answer, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{sha}"})

    def list_folder(self, files: dict[str, bytes], folder: str) -> list[dict]:
        prefix = f"{folder}/" if folder else ""
        inside = {path: contents for path, contents in files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise RefusedError(404, "EntryNotFound", f"{folder} does not exist")
        parents = {"/".join(path.split("/")[:depth]) for path in inside for depth in range(1, path.count("/") + 1)}
        folders = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(parents)]
        found = [x for x in folders if x["path"].startswith(prefix)] + [entry(*item) for item in inside.items()]
        if self.query.get("recursive", "false").lower() in ("true", "1"):
            return found
        return [x for x in found if "/" not in x["path"].removeprefix(prefix)]

    def send_file(self, repo: Repo, revision: str, path: str) -> None:
        sha = self.sha_of(repo, revision)
        if path not in repo.commits[sha]:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        contents = repo.commits[sha][path]
        tag = etag(path, contents)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        if IS_LFS.fullmatch(path):
            headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": len(contents)}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(asked[1]), min(int(asked[2] or len(contents) - 1), len(contents) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(contents)}"
            self.send(206, contents[start : end + 1], headers)
        else:
            self.send(200, contents, headers)


def describe(repo: Repo, repo_id: str, sha: str) -> dict:
    siblings = [{"rfilename": path} for path in repo.commits[sha]]
    return {
        "_id": "0", "id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private, "disabled": False, "gated": False,
        "tags": [], "downloads": 0, "likes": 0, "createdAt": "2026-01-01T00:00:00.000Z",
        "lastModified": "2026-01-01T00:00:00.000Z", "siblings": siblings,
    }  # fmt: skip


def entry(path: str, contents: bytes) -> dict:
    found = {"type": "file", "path": path, "size": len(contents), "oid": etag(path, contents)}
    if IS_LFS.fullmatch(path):
        found["lfs"] = {"oid": found["oid"], "size": len(contents), "pointerSize": 130}
    return found


def etag(path: str, contents: bytes) -> str:
    if IS_LFS.fullmatch(path):
        return hashlib.sha256(contents).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(contents) + contents).hexdigest()


HUB = HubServer()
