"""The Hugging Face Hub on this machine: repositories in memory, behind the HTTP interface of huggingface_hub 2.4.

Tests run the real client against it, so that pushing, pulling and what can go wrong between the two is proven without
the network. Two sockets are served. One is the Hub; the other is its storage of large files, another origin as on the
Hub: uploads and downloads of LFS objects carry a signature in the address and no token.

Statuses, headers and messages are the Hub's, as its client reads them. Ids of blobs, trees and commits are git's. Left
out is what no test needs: Xet, likes, discussions that are no pull requests.
"""

import asyncio
import base64
import dataclasses
import hashlib
import json
import re
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import uvicorn
from fastapi import Request
from hub_repository import ATTRIBUTES, KINDS, File, HubError, Repository, is_lfs, now
from hub_routes import build_app


class LoggedRequest(NamedTuple):
    """One request as it arrived: `path` is decoded and without its query, header names are lower case."""

    method: str
    path: str
    headers: dict[str, str]


@dataclasses.dataclass
class Fault:
    """Something that goes wrong with the next `times` requests whose "METHOD path" contains `pattern`."""

    action: str
    pattern: re.Pattern
    times: float
    status: int = 0
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""
    after_bytes: int = 0
    part: str = ""
    seconds: float = 0.0
    call: Callable[[], Any] | None = None


class HubServer:
    """The server, and what a test does to it behind the client's back. All methods may be called from any thread.

    `with HubServer(sockets) as hub:` serves the Hub on the first socket and its storage on the second. Repositories
    are named `user/name`, `datasets/user/name` and `spaces/user/name`.
    """

    def __init__(self, sockets: tuple[socket.socket, socket.socket]):
        self.endpoint, self.storage = (f"http://127.0.0.1:{each.getsockname()[1]}" for each in sockets)
        self.page_size = 1000  # entries of a list, before the client has to ask for the next page
        self.part_size: int | None = None  # LFS objects above this size are uploaded in parts of it
        self.log: list[LoggedRequest] = []
        self.parts: dict[tuple[str, int], bytes] = {}  # of uploads that are not complete
        self.lock = threading.RLock()
        self._sockets = list(sockets)
        self._faults: list[Fault] = []
        self._corrupted: dict[tuple[str, str], list] = {}
        self._orgs: dict[str, set[str]] = {}
        self._tokens: dict[str, tuple[str, str]] = {}
        self._repositories: dict[str, Repository] = {}
        self._renamed: dict[str, str] = {}
        self._app = build_app(self)

    # Running

    def __enter__(self) -> "HubServer":
        options = {"interface": "asgi3", "http": "h11", "lifespan": "off", "proxy_headers": False}
        logging = {"log_config": None, "log_level": "critical", "access_log": False}
        # Closing an idle connection just as the client takes it up again would be a fault that nobody asked for.
        limits = {"timeout_keep_alive": 3600, "timeout_graceful_shutdown": 1}
        self._server = uvicorn.Server(uvicorn.Config(self.serve, **options, **logging, **limits))
        self._thread = threading.Thread(target=self._server.run, args=(self._sockets,), daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the Hub of the tests did not start")
            time.sleep(0.01)
        return self

    def __exit__(self, *_) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)

    async def serve(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Logs a request, lets its faults happen, and hands it to the application."""
        # Routing by the address as it was sent keeps `refs%2Fpr%2F1`, one revision, apart from a path of three parts.
        scope = {**scope, "path": scope["raw_path"].decode("ascii")}
        path = unquote(scope["path"])
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        with self.lock:
            self.log.append(LoggedRequest(scope["method"], path, headers))
        request = f"{scope['method']} {path}"
        try:
            await self._answer(request, scope, receive, send)
        except Exception:
            traceback.print_exc()  # a mistake in these files or in a test's `before`; the client sees a 500
            raise

    async def _answer(self, request: str, scope: dict, receive: Callable, send: Callable) -> None:
        if fault := self._take(request, "before"):
            await asyncio.to_thread(fault.call)
        if fault := self._take(request, "delay"):
            await asyncio.sleep(fault.seconds)
        fault = self._take(request, "fail", "cut")
        if fault and fault.action == "fail":
            await read_body(receive)
            headers = [(name.lower().encode(), value.encode()) for name, value in fault.headers.items()]
            headers.append((b"content-length", str(len(fault.body)).encode()))
            await send({"type": "http.response.start", "status": fault.status, "headers": headers})
            await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else fault.body})
            return

        transport = receive.__self__.transport  # of uvicorn: nothing in ASGI breaks a connection
        if fault and fault.part == "request":
            await read_body(receive, limit=fault.after_bytes)
            transport.abort()
            await asyncio.sleep(0)
            return
        if fault:
            send = cut_response(send, transport, fault.after_bytes)
        await self._app(scope, receive, send)

    def _take(self, request: str, *actions: str) -> Fault | None:
        """The first fault, in the order in which they were asked for, that a request meets."""
        with self.lock:
            for fault in self._faults:
                if fault.action in actions and fault.times > 0 and fault.pattern.search(request):
                    fault.times -= 1
                    return fault
        return None

    # Faults and the log

    def fail(
        self,
        match: str,
        status: int,
        times: float = 1,
        headers: dict[str, str] | None = None,
        body: bytes | str | dict | None = None,
    ) -> None:
        """Answers the next `times` requests that match with an error: `hub.fail(r"POST .*/commit/", 500)`.

        `match` is a regular expression, searched in "METHOD path" (decoded, without the query). A string as `body` is
        the Hub's message. The client waits a second at least before it tries again, also where `Retry-After` is 0.
        Of several faults that match, the one that was asked for first happens first.
        """
        if body is None or isinstance(body, str):
            body = {"error": body or f"the tests asked for {status}"}
        body = json.dumps(body).encode() if isinstance(body, dict) else body
        headers = {"Content-Type": "application/json", **(headers or {})}
        self._add_fault(Fault("fail", re.compile(match), times, status=status, headers=headers, body=body))

    def cut(self, match: str, after_bytes: int = 0, times: float = 1, part: str | None = None) -> None:
        """Breaks the connection after `after_bytes` of a body.

        `part` is "request" or "response"; by default what carries the data: the request of a PUT or POST, else the
        response. A cut request never reaches the Hub; with a cut response, what was asked for has been done.
        """
        part = part or ("request" if re.match(r"\^?(PUT|POST)\b", match) else "response")
        if part not in ("request", "response"):
            raise ValueError(f"`part` must be 'request' or 'response', got {part!r}.")
        self._add_fault(Fault("cut", re.compile(match), times, after_bytes=after_bytes, part=part))

    def delay(self, match: str, seconds: float, times: float = 1) -> None:
        """Lets the next `times` requests that match wait."""
        self._add_fault(Fault("delay", re.compile(match), times, seconds=seconds))

    def before(self, match: str, call: Callable[[], Any]) -> None:
        """Calls `call` once, just before the next request that matches: somebody else is faster."""
        self._add_fault(Fault("before", re.compile(match), 1, call=call))

    def corrupt(self, repo_id: str, name: str, content: bytes, times: float = float("inf")) -> None:
        """Serves `content` in place of a file, while sizes and hashes stay those of the true one."""
        with self.lock:
            self._corrupted[self.repository(repo_id).path, name] = [content, times]

    def reset_faults(self) -> None:
        """From here on everything works, and `log` is empty."""
        with self.lock:
            self._faults.clear()
            self._corrupted.clear()
            self.page_size, self.part_size = 1000, None
            self.clear_log()

    def clear_log(self) -> None:
        with self.lock:
            self.log.clear()

    def _add_fault(self, fault: Fault) -> None:
        with self.lock:
            self._faults.append(fault)

    def served(self, repository: Repository, name: str, file: File) -> bytes:
        """What a download of a file receives."""
        with self.lock:
            corrupted = self._corrupted.get((repository.path, name))
            if corrupted is None or corrupted[1] <= 0:
                return file.content
            corrupted[1] -= 1
            return corrupted[0]

    # People

    def add_user(self, name: str) -> str:
        """A user; returns a token that may write."""
        return self.add_token(name, "write")

    def add_token(self, user: str, role: str = "read") -> str:
        """A token of `user`, who may be new. The same arguments give the same token."""
        if role not in ("read", "write"):
            raise ValueError(f"`role` must be 'read' or 'write', got {role!r}.")
        token = "hf_" + base64.b32encode(hashlib.sha256(f"{user} {role}".encode()).digest()).decode()[:34]
        with self.lock:
            self._tokens[token] = user, role
        return token

    def add_org(self, name: str, users: Iterable[str]) -> None:
        """An organisation whose members may write."""
        with self.lock:
            self._orgs[name] = set(users)

    # Repositories

    def repository(self, repo_id: str) -> Repository:
        """The repository of that name, which a test has to have created."""
        with self.lock:
            if repo_id not in self._repositories:
                raise KeyError(f"no repository {repo_id!r}; there are {sorted(self._repositories)}")
            return self._repositories[repo_id]

    def create(self, repo_id: str, private: bool = False, gated: bool = False) -> None:
        """An empty repository, that is one with `.gitattributes` alone."""
        kind, name = repo_id.split("/", 1)
        kind, name = (kind, name) if kind in KINDS else ("models", repo_id)
        repository = Repository(kind, name, private, gated, now())
        first = repository.add(None, {".gitattributes": File(ATTRIBUTES, False)}, "initial commit", "", "system")
        repository.refs["refs/heads/main"] = first.sha
        with self.lock:
            if repository.path in self._repositories:
                raise ValueError(f"the repository {repo_id!r} exists already")
            self._repositories[repository.path] = repository
            self._renamed.pop(repository.path, None)

    def write(
        self, repo_id: str, files: dict[str, bytes | None], revision: str = "main", message: str = "Change files"
    ) -> str:
        """Commits files, whatever their names, behind the client's back; None removes one. Returns the commit's id."""
        with self.lock:
            repository = self.repository(repo_id)
            ref = repository.branch(revision)
            tree = dict(repository.commits[repository.refs[ref]].files)
            for name, content in files.items():
                if content is None:
                    del tree[name]
                else:
                    tree[name] = file = File(content, is_lfs(name, len(content), content[:512]))
                    repository.objects |= {file.sha256: content} if file.lfs else {}
            author = repository.name.split("/")[0]
            repository.refs[ref] = repository.add(repository.refs[ref], tree, message, "", author).sha
            return repository.refs[ref]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Contents by name."""
        repository = self.repository(repo_id)
        files = repository.commits[repository.resolve(revision)].files
        return {name: files[name].content for name in sorted(files)}

    def commits(self, repo_id: str, revision: str = "main") -> list[str]:
        """Commit ids, the newest first."""
        return [commit.sha for commit in self.repository(repo_id).history(revision)]

    def branches(self, repo_id: str) -> list[str]:
        """Names of the branches."""
        refs = self.repository(repo_id).refs
        return sorted(ref.removeprefix("refs/heads/") for ref in refs if ref.startswith("refs/heads/"))

    def pull_requests(self, repo_id: str) -> list[dict[str, Any]]:
        """Pull requests with `num`, `title`, `description`, `status`, `author` and `revision` (`refs/pr/1`)."""
        return [dict(request) for request in self.repository(repo_id).discussions]

    def exists(self, repo_id: str) -> bool:
        return repo_id in self._repositories

    def rename(self, old: str, new: str) -> None:
        """Gives a repository another name; the old one leads to it."""
        with self.lock:
            if new in self._repositories:
                raise ValueError(f"the repository {new!r} exists already")
            repository = self._repositories.pop(old)
            repository.name = new if repository.kind == "models" else new.split("/", 1)[1]
            self._repositories[new] = repository
            self._renamed.pop(new, None)
            self._renamed[old] = new

    def delete(self, repo_id: str) -> None:
        with self.lock:
            del self._repositories[self.repository(repo_id).path]

    # What the application asks

    def user(self, request: Request) -> tuple[str | None, str | None]:
        """Who asks, and the role of the token: (None, None) without one."""
        header = request.headers.get("authorization")
        if header is None:
            return None, None
        try:
            return self._tokens[header.removeprefix("Bearer ")]
        except KeyError:
            raise HubError(401, "Invalid credentials in Authorization header") from None

    def organisations(self, user: str) -> list[str]:
        return sorted(name for name, members in self._orgs.items() if user in members)

    def check_namespace(self, request: Request, namespace: str, action: str) -> None:
        """Raises unless the user may create or delete repositories there."""
        user, role = self.user(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if role != "write" or namespace not in (user, *self.organisations(user)):
            raise HubError(403, f'You don\'t have the rights to {action} under the namespace "{namespace}"')

    def find(
        self, request: Request, kind: str, name: str, write: bool = False, pull_request: bool = False
    ) -> Repository:
        """The repository that a request names, if whoever asks may read or change it.

        Raises HubError as the Hub does: anonymous users learn nothing (401), others see what they may not read as
        absent (404); renamed repositories redirect (307).
        """
        user, role = self.user(request)
        path = name if kind == "models" else f"{kind}/{name}"
        if path in self._renamed:
            new = self._renamed[path]
            while new in self._renamed:
                new = self._renamed[new]
            address = request.scope["raw_path"].decode("ascii").replace(path, new, 1)
            query = f"?{request.url.query}" if request.url.query else ""
            raise HubError(307, f"Temporary Redirect. Redirecting to {address}", headers={"Location": address + query})

        repository = self._repositories.get(path)
        namespace = name.split("/")[0]
        member = user is not None and namespace in (user, *self.organisations(user))
        if repository is None or repository.private and not member:
            if user is None:
                # The client takes any 401 of the Hub for this error, but only at an https address.
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if write and role != "write":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if write and not member and not pull_request:
            raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repository

    def check_gate(self, request: Request, repository: Repository) -> None:
        """Raises where the files of a gated repository are asked for by somebody who was not let in."""
        user, _ = self.user(request)
        if repository.gated and repository.name.split("/")[0] not in (user, *self.organisations(user or "")):
            message = f"Access to model {repository.name} is restricted"
            if user is None:
                message += ". You must have access to it and be authenticated to access it. Please log in."
                raise HubError(401, message, "GatedRepo")
            message += (
                f" and you are not in the authorized list. Visit {self.endpoint}/{repository.path} to ask for access."
            )
            raise HubError(403, message, "GatedRepo")

    def signature(self, path: str) -> str:
        """What an address of the storage carries in place of a token."""
        return hashlib.sha256(f"{id(self)} {path}".encode()).hexdigest()[:32]

    def signed(self, path: str) -> str:
        return f"{self.storage}{quote(path)}?signature={self.signature(path)}"


async def read_body(receive: Callable, limit: float = float("inf")) -> None:
    """Receives a request's body, at most until more than `limit` bytes have come."""
    received, more = 0, True
    while more and received <= limit:
        message = await receive()
        received += len(message.get("body", b""))
        more = message.get("more_body", False)


def cut_response(send: Callable, transport: asyncio.Transport, after_bytes: int) -> Callable:
    """A `send` that closes the connection after `after_bytes` of the body."""
    left, closed = after_bytes, False

    async def cutting(message: dict) -> None:
        nonlocal left, closed
        if closed:
            return
        if message["type"] != "http.response.body":
            await send(message)
            return
        chunk = message.get("body", b"")[:left]
        left -= len(chunk)
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
        if left == 0 or not message.get("more_body", False):
            closed = True
            transport.close()

    return cutting
