"""A Hub on this machine: the endpoints that `huggingface_hub` and `transformers` talk to, over real HTTP.

    python tests/loopback_hub.py --port 8917 --token hf_loopback
    export HF_ENDPOINT=http://127.0.0.1:8917 HF_TOKEN=hf_loopback       # in another terminal

Model repositories with branches, commits and private ones; tokens that may write, may only read, or are unknown; and
failures on demand. Every file is taken as a regular one (no LFS, no Xet), and all of it is gone with the process.
"""

import argparse
import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

HANG_UP = 0  # as a status: the connection is closed without an answer
REPOSITORY_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Account:
    """Who a token belongs to: it may write to the repositories under `name`, or to none."""

    name: str
    may_write: bool = True


@dataclass
class Answer:
    """What goes back to the client: `body` is JSON unless it is bytes."""

    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An answer with an error, in the Hub's own terms."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer(status, {"error": message}, {**named, **headers})


@dataclass
class Repository:
    """Commits are whole trees, path to content; branches name the newest."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        self.messages.append(message)
        sha = hashlib.sha1(f"{len(self.messages)} {message}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha


@dataclass
class Fault:
    """A failure that is still due `times` times, for requests whose path contains `path_contains`."""

    answer: Answer
    times: int
    path_contains: str


@dataclass
class Request:
    """One request, as it was seen and answered."""

    method: str
    path: str
    status: int


def blob_id(content: bytes) -> str:
    """What git, and so the Hub, calls a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class LoopbackHub:
    """The server, from `with` to the end of it, in threads of its own.

    Args:
        accounts: access token to its owner.
        port: 0 = any that is free.
    """

    def __init__(self, accounts: Mapping[str, Account], port: int = 0):
        self.accounts = dict(accounts)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), type("BoundHandler", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(
            target=self._server.serve_forever, args=(0.01,), daemon=True
        ).start()  # how long its end takes, in seconds
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_repository(self, name: str, private: bool = False) -> Repository:
        """A repository with nothing but a `.gitattributes`, as a new one on the Hub."""
        repository = self.repositories[name] = Repository(private)
        repository.commit("main", {".gitattributes": b""}, "initial commit")
        return repository

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds, by path."""
        repository = self.repositories[name]
        return repository.commits[repository.resolve(revision)]

    def fail_next(self, status: int, times: int = 1, path_contains: str = "", **headers: str) -> None:
        """Let the next requests to such paths fail: with a page of HTML, as of a gateway, or by `HANG_UP`.

        Underscores in the names of `headers` stand for hyphens.
        """
        page = b"<html>" + (HTTPStatus(status).phrase if status else "").encode() + b"</html>"
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._faults.append(Fault(Answer(status, page, {"Content-Type": "text/html", **named}), times, path_contains))

    def heal(self) -> None:
        """No failure is due any more."""
        self._faults.clear()

    def answer(self, method: str, target: str, token: str | None, body: bytes) -> Answer:
        """The answer to one request; requests are handled one at a time."""
        path = urlsplit(target).path
        with self._lock:
            try:
                answer = self._fault_for(path) or self._route(method, path, self._account(token), body)
            except Refusal as refusal:
                answer = refusal.answer
            self.requests.append(Request(method, unquote(path), answer.status))
        return answer

    def _fault_for(self, path: str) -> Answer | None:
        fault = next((fault for fault in self._faults if fault.path_contains in path), None)
        if fault is None:
            return None
        fault.times -= 1
        if fault.times <= 0:
            self._faults.remove(fault)
        return fault.answer

    def _account(self, token: str | None) -> Account | None:
        if token is not None and token not in self.accounts:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.accounts.get(token) if token else None

    def _route(self, method: str, path: str, account: Account | None, body: bytes) -> Answer:
        for verb, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and verb == ("GET" if method == "HEAD" else method):
                return action(self, account, body, **{k: v and unquote(v) for k, v in match.groupdict().items()})
        raise Refusal(404, f"Sorry, we can't find the page: {method} {path}")

    def _readable(self, account: Account | None, repo: str) -> Repository:
        """The repository, if there is one that this account may see."""
        repository, owner = self.repositories.get(repo), repo.split("/")[0]
        if repository is None or (repository.private and (account is None or account.name != owner)):
            raise Refusal(404 if account else 401, "Repository not found", "RepoNotFound")
        return repository

    def _check_writer(self, account: Account | None, namespace: str, message: str) -> None:
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        if not account.may_write or account.name != namespace:
            raise Refusal(403, message)

    def _writable(self, account: Account | None, repo: str) -> Repository:
        repository = self._readable(account, repo)
        message = "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"
        self._check_writer(account, repo.split("/")[0], message)
        return repository

    def _whoami(self, account: Account | None, body: bytes) -> Answer:
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        role = "write" if account.may_write else "read"
        return Answer(200, {"type": "user", "name": account.name, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def _create(self, account: Account | None, body: bytes) -> Answer:
        wanted = json.loads(body)
        namespace = wanted.get("organization") or (account.name if account else "")
        message = f'You don\'t have the rights to create a model under the namespace "{namespace}"'
        self._check_writer(account, namespace, message)
        name = f"{namespace}/{wanted['name']}"
        found = {"name": name, "url": f"{self.endpoint}/{name}"}
        if name in self.repositories:
            return Answer(409, {"error": "You already created this model repo", **found})
        self.add_repository(name, private=wanted.get("visibility") == "private" or wanted.get("private") is True)
        return Answer(200, found)

    def _validate_card(self, account: Account | None, body: bytes) -> Answer:
        content = json.loads(body)["content"]
        errors = list(card_errors(content))
        return Answer(400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []})

    def _check_access(self, account: Account | None, body: bytes, repo: str, write: str | None) -> Answer:
        self._writable(account, repo) if write else self._readable(account, repo)
        return Answer(200, {})

    def _create_branch(self, account: Account | None, body: bytes, repo: str, branch: str) -> Answer:
        repository = self._writable(account, repo)
        if branch in repository.branches:
            raise Refusal(409, f"Reference already exists: refs/heads/{branch}")
        repository.branches[branch] = repository.resolve(json.loads(body or b"{}").get("startingPoint") or "main")
        return Answer(201, {})

    def _preupload(self, account: Account | None, body: bytes, repo: str, revision: str) -> Answer:
        repository = self._writable(account, repo)
        files = repository.commits[repository.resolve(revision)]
        return Answer(
            200,
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "regular",
                        "shouldIgnore": False,
                        "oid": blob_id(files[file["path"]]) if file["path"] in files else None,
                    }
                    for file in json.loads(body)["files"]
                ]
            },
        )

    def _commit(self, account: Account | None, body: bytes, repo: str, revision: str) -> Answer:
        repository = self._writable(account, repo)
        files = dict(repository.commits[repository.resolve(revision)])
        message = ""
        for line in body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"this Hub does not know {key}")
        sha = repository.commit(revision, files, message)
        url = f"{self.endpoint}/{repo}/commit/{sha}"
        return Answer(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _model(self, account: Account | None, body: bytes, repo: str, revision: str | None) -> Answer:
        repository = self._readable(account, repo)
        sha = repository.resolve(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(repository.commits[sha])]
        return Answer(
            200, {"_id": sha, "id": repo, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []}
        )

    def _tree(self, account: Account | None, body: bytes, repo: str, revision: str, folder: str | None) -> Answer:
        repository = self._readable(account, repo)
        inside = {
            path: content
            for path, content in repository.commits[repository.resolve(revision)].items()
            if path.startswith(f"{folder}/" if folder else "")
        }
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return Answer(
            200,
            [
                {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
                for path, content in sorted(inside.items())
            ],
        )

    def _file(self, account: Account | None, body: bytes, repo: str, revision: str, path: str) -> Answer:
        repository = self._readable(account, repo)
        sha = repository.resolve(revision)
        content = repository.commits[sha].get(path)
        if content is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        return Answer(200, content, {"X-Repo-Commit": sha, "ETag": f'"{blob_id(content)}"'})


REPO, REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", LoopbackHub._whoami),
    ("POST", "/api/repos/create", LoopbackHub._create),
    ("POST", "/api/validate-yaml", LoopbackHub._validate_card),
    ("GET", f"/api/models/{REPO}/auth-check(?P<write>/write)?", LoopbackHub._check_access),
    ("POST", f"/api/models/{REPO}/branch/(?P<branch>[^/]+)", LoopbackHub._create_branch),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", LoopbackHub._preupload),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", LoopbackHub._commit),
    ("GET", f"/api/models/{REPO}(?:/revision/{REVISION})?", LoopbackHub._model),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}(?:/(?P<folder>.+))?", LoopbackHub._tree),
    ("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", LoopbackHub._file),
]


def card_errors(content: str) -> Iterator[str]:
    """What the Hub would object to in a card's metadata."""
    match = re.match(r"---\n(.*?)\n---\n", content, flags=re.DOTALL)
    try:
        metadata = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        yield f"not YAML: {error}"
        return
    if not isinstance(metadata, dict):
        yield "no metadata between --- and ---"
        return
    for key in ("base_model", "datasets"):
        names = metadata.get(key, [])
        for name in [names] if isinstance(names, str) else names:
            if not REPOSITORY_NAME.fullmatch(name):
                yield f'"{key}" with value "{name}" is not valid'
    for model in metadata.get("model-index", []):
        if not model.get("name") or not model.get("results"):
            yield '"model-index" needs a name and results'
        for result in model.get("results") or []:
            is_whole = result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]
            if not is_whole or not all("type" in metric and "value" in metric for metric in result["metrics"]):
                yield f'"model-index" has a result that lacks something: {result}'


class Handler(BaseHTTPRequestHandler):
    """HTTP around `LoopbackHub.answer`."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        answer = self.hub.answer(self.command, self.path, token, body)
        if answer.status == HANG_UP:
            self.close_connection = True
            return
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        default = "application/octet-stream" if isinstance(answer.body, bytes) else "application/json"
        self.send_response(answer.status)
        for name, value in {"Content-Type": default, "Content-Length": str(len(content)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal: `LoopbackHub.requests` has it all."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0 = any that is free")
    parser.add_argument("--token", required=True, help="the access token that may write")
    parser.add_argument("--user", default="someone", help="whose repositories it may write to")
    args = parser.parse_args()
    with LoopbackHub({args.token: Account(args.user)}, args.port) as hub:
        print(f"a Hub of {args.user}'s own: export HF_ENDPOINT={hub.endpoint}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("closed")


if __name__ == "__main__":
    main()
