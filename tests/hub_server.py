"""A Hugging Face Hub in memory, spoken to over HTTP: what huggingface_hub, transformers and datasets ask of one.

    with HubServer() as hub:
        hub.url     -> HF_ENDPOINT, together with HF_HUB_DISABLE_XET=1: this Hub takes big files by LFS alone
        hub.token   -> HF_TOKEN; who does not show it reads public repositories only

Or by itself: `python tests/hub_server.py 8080`.
"""

import base64
import hashlib
import json
import re
import secrets
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_BYTES = 10_000  # a bigger file goes by LFS
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".arrow", ".onnx")
USER = "tester"


@dataclass(frozen=True)
class Blob:
    """A file's content."""

    data: bytes
    lfs: bool

    @property
    def sha256(self):
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self):
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def lfs_info(self):
        if not self.lfs:
            return {}
        # The Hub calls the digest oid in a tree and sha256 among a model's files.
        names = {"oid": self.sha256, "sha256": self.sha256}
        return {"lfs": names | {"size": len(self.data), "pointerSize": 130}}


@dataclass(frozen=True)
class Commit:
    """All files of one revision, by path."""

    oid: str
    title: str
    files: dict
    parent: str | None = None


@dataclass
class Repo:
    """A repository: commits, and the branches and tags that name some of them."""

    kind: str
    name: str
    private: bool = False
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)

    def commit(self, branch, title, files):
        oid = secrets.token_hex(20)
        self.commits[oid] = Commit(oid, title, files, self.branches.get(branch))
        self.branches[branch] = oid
        return oid

    def at(self, revision):
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]

    def history(self, revision):
        commit = self.at(revision)
        while commit:
            yield commit
            commit = self.commits.get(commit.parent)


class HubError(Exception):
    """An answer that is not what was hoped for; huggingface_hub chooses its exception by the code."""

    def __init__(self, status, code, message, **more):
        super().__init__(message)
        self.status, self.code, self.more = status, code, more


class HubServer:
    """The Hub on a free port of the loopback device.

    `repos` holds the repositories by (kind, "owner/name") and `requests` what was asked, as "METHOD path".
    """

    def __init__(self, port=0):
        self.token, self.signature = f"hf_{secrets.token_hex(17)}", secrets.token_hex(16)
        self.repos, self.lfs, self.requests = {}, {}, []
        self.lock = threading.RLock()
        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.http.hub = self
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.http.shutdown()
        self.http.server_close()

    def files(self, name, revision="main", kind="model"):
        """Content of each file of a repository by path."""
        return {path: blob.data for path, blob in self.repos[kind, name].at(revision).files.items()}


KIND = r"(?P<kind>models|datasets|spaces)"
NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
GIT = r"/(?:(?P<kind>datasets|spaces)/)?(?P<name>[\w.-]+/[\w.-]+)"
ROUTES = []


def route(method, pattern, public=False):
    """Let a method of `Handler` answer requests to paths of this form; writing needs the token, if not public."""

    def keep(function):
        function.public = public or method == "GET"
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return keep


class Handler(BaseHTTPRequestHandler):
    """One connection. An answer is json, or (bytes, headers)."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self):
        return self.server.hub

    def log_message(self, *message):
        pass

    def handle_request(self):
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        # An upload's address is signed, as that of a bucket is.
        signed = self.query.get("signature") == self.hub.signature
        self.trusted = signed or self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        self.hub.requests.append(f"{self.command} {self.path}")
        self.body = self.read_body()
        try:
            with self.hub.lock:
                result = self.answer(*self.find(unquote(url.path)))
            self.reply(200, *result)
        except HubError as error:
            message = {"error": str(error)} | error.more
            self.reply(error.status, json.dumps(message).encode(), {"X-Error-Code": error.code} if error.code else {})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def find(self, path):
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, function in ROUTES:
            if wanted == method and (match := pattern.fullmatch(path)):
                return function, match.groupdict()
        raise HubError(404, None, f"No such page: {path}")

    def answer(self, function, parts):
        if not (function.public or self.trusted):
            raise HubError(401, None, "Invalid username or password.")
        if "name" in parts:
            kind = (parts.pop("kind", None) or "models").removesuffix("s")
            parts["repo"] = self.repo(kind, parts.pop("name"))
        result = function(self, **parts)
        if isinstance(result, tuple):
            return result
        return json.dumps(result).encode(), {"Content-Type": "application/json"}

    def reply(self, status, content, headers):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if status == 200 and wanted and content:
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers = headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
            status, content = 206, content[first : last + 1]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def repo(self, kind, name):
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and not self.trusted):
            raise HubError(404 if self.trusted else 401, "RepoNotFound", "Repository not found")
        return repo

    def json(self):
        return json.loads(self.body or "{}")

    # accounts and repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        if not self.trusted:
            raise HubError(401, None, "Invalid username or password.")
        return {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    @route("POST", "/api/repos/create")
    def create(self):
        wanted = self.json()
        kind, name = wanted.get("type") or "model", f"{wanted.get('organization') or USER}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}", "name": name}
        if (kind, name) in self.hub.repos:
            raise HubError(409, None, "You already created this repo", **url)
        repo = Repo(kind, name, bool(wanted.get("private")) or wanted.get("visibility") == "private")
        repo.commit("main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        self.hub.repos[kind, name] = repo
        return url

    @route("DELETE", "/api/repos/delete")
    def delete(self):
        wanted = self.json()
        repo = self.repo(wanted.get("type") or "model", f"{wanted.get('organization') or USER}/{wanted['name']}")
        del self.hub.repos[repo.kind, repo.name]
        return {}

    @route("POST", "/api/validate-yaml", public=True)
    def validate_yaml(self):
        return {"errors": [], "warnings": []}

    # reading

    @route("GET", f"/api/{KIND}/{NAME}(?:/revision/(?P<revision>.+))?")
    def info(self, repo, revision):
        commit = repo.at(revision or "main")
        moment = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        files = commit.files.items()
        return {
            "_id": commit.oid[:24],
            "id": repo.name,
            "sha": commit.oid,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "createdAt": moment,
            "lastModified": moment,
            "siblings": [{"rfilename": path, "size": len(b.data), "blobId": b.oid} | b.lfs_info for path, b in files],
        }

    @route("GET", f"/api/{KIND}/{NAME}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?")
    def tree(self, repo, revision, folder):
        files = repo.at(revision).files
        start = f"{folder.rstrip('/')}/" if folder else ""
        inside = {path: blob for path, blob in files.items() if path.startswith(start)}
        if start and not inside:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist")
        entries = {}
        for path, blob in inside.items():
            folders = path[len(start) :].split("/")[:-1]
            for depth in range(len(folders)):
                parent = start + "/".join(folders[: depth + 1])
                entries[parent] = {"type": "directory", "path": parent, "oid": "0" * 40, "size": 0}
            entries[path] = file_entry(path, blob)
        deep = self.query.get("recursive", "").lower() == "true"
        return [entry for path, entry in sorted(entries.items()) if deep or "/" not in path[len(start) :]]

    @route("POST", f"/api/{KIND}/{NAME}/paths-info/(?P<revision>.+)")
    def paths_info(self, repo, revision):
        files = repo.at(revision).files
        paths = (
            self.json()["paths"] if "json" in self.headers["Content-Type"] else parse_qs(self.body.decode())["paths"]
        )
        entries = [file_entry(path, files[path]) for path in paths if path in files]
        folders = [path for path in paths if any(file.startswith(f"{path}/") for file in files)]
        return entries + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]

    @route("GET", f"/api/{KIND}/{NAME}/refs")
    def refs(self, repo):
        def listed(names, prefix):
            return [{"name": n, "ref": f"refs/{prefix}/{n}", "targetCommit": oid} for n, oid in names.items()]

        return {"branches": listed(repo.branches, "heads"), "tags": listed(repo.tags, "tags"), "converts": []}

    @route("GET", f"/api/{KIND}/{NAME}/commits/(?P<revision>.+)")
    def commits(self, repo, revision):
        moment = "2026-01-01T00:00:00.000Z"
        return [
            {"id": commit.oid, "title": commit.title, "message": "", "date": moment, "authors": [{"user": USER}]}
            for commit in repo.history(revision)
        ]

    @route("GET", f"{GIT}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, repo, revision, path):
        commit = repo.at(revision)
        if path not in commit.files:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        return blob.data, headers

    # writing

    @route("POST", f"/api/{KIND}/{NAME}/branch/(?P<branch>.+)")
    def branch(self, repo, branch):
        if branch in repo.branches:
            raise HubError(409, None, "Reference already exists")
        repo.branches[branch] = repo.at(self.json().get("startingPoint") or "main").oid
        return {}

    @route("POST", f"/api/{KIND}/{NAME}/tag/(?P<revision>.+)")
    def tag(self, repo, revision):
        name = self.json()["tag"]
        if name in repo.tags:
            raise HubError(409, None, "Tag reference exists already")
        repo.tags[name] = repo.at(revision).oid
        return {}

    @route("POST", f"/api/{KIND}/{NAME}/preupload/(?P<revision>.+)")
    def preupload(self, repo, revision):
        repo.at(revision)
        lfs = [file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_BYTES for file in self.json()["files"]]
        modes = ["lfs" if big else "regular" for big in lfs]
        files = zip(self.json()["files"], modes, strict=True)
        return {"files": [{"path": f["path"], "uploadMode": m, "shouldIgnore": False, "oid": None} for f, m in files]}

    @route("POST", f"{GIT}\\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo):
        objects = []
        for wanted in self.json()["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{wanted['oid']}?signature={self.hub.signature}"}
            there = wanted["oid"] in self.hub.lfs
            objects.append(wanted | ({} if there else {"actions": {"upload": upload}}))
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, None, "The content is not what its digest says")
        self.hub.lfs[oid] = self.body
        return {}

    @route("POST", f"/api/{KIND}/{NAME}/commit/(?P<branch>.+)")
    def commit(self, repo, branch):
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header, *changes = [(line["key"], line["value"]) for line in lines]
        before = repo.at(branch)
        if header[1].get("parentCommit", before.oid) != before.oid:
            raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
        files = dict(before.files)
        for key, value in changes:
            path = value["path"]
            if key == "file":
                files[path] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise HubError(400, None, f"{path}: LFS object {value['oid']} is missing")
                files[path] = Blob(self.hub.lfs[value["oid"]], True)
            elif key == "deletedFile":
                files.pop(path, None)
            elif key == "deletedFolder":
                files = {name: blob for name, blob in files.items() if not name.startswith(f"{path.rstrip('/')}/")}
        oid = repo.commit(branch, header[1]["summary"], files)
        prefix = "" if repo.kind == "model" else f"{repo.kind}s/"
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{prefix}{repo.name}/commit/{oid}"}


def file_entry(path, blob):
    """A file as `tree` and `paths-info` tell of it."""
    return {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.data)} | blob.lfs_info


if __name__ == "__main__":
    with HubServer(int(sys.argv[1]) if len(sys.argv) > 1 else 0) as server:
        print(f"export HF_ENDPOINT={server.url} HF_HUB_DISABLE_XET=1 HF_TOKEN={server.token}", flush=True)
        threading.Event().wait()
