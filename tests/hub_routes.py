"""The HTTP interface of the Hub, as huggingface_hub 2.4 uses it, over `hub_server.HubServer`.

Parts of an address arrive encoded (see `HubServer.serve`), so that `refs%2Fpr%2F1` is one of them.
"""

import base64
import hashlib
import json
import re
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import parse_qs, unquote

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from hub_repository import (
    KINDS,
    SDKS,
    File,
    HubError,
    Repository,
    check_card,
    folders,
    git_id,
    is_lfs,
    now,
    tree_id,
    yaml_of,
)


if TYPE_CHECKING:
    from hub_server import HubServer


REPOSITORY = "/api/{kind}/{namespace}/{name}"
LFS = "{namespace}/{name}.git/info/lfs/objects"
STORED = "/upload/{kind}/{namespace}/{name}/{oid}"
RESOLVE = "{namespace}/{name}/resolve/{revision}/{path:path}"


async def body_of(request: Request) -> bytes:
    return await request.body()


async def json_of(request: Request) -> Any:
    try:
        return json.loads(await request.body() or b"{}")
    except ValueError as error:
        raise HubError(400, f"Invalid JSON: {error}") from error


async def named(request: Request) -> tuple[str, str]:
    """Kind and name of the repository that an address is about."""
    parts = request.path_params
    return parts.get("kind", "models"), f"{parts['namespace']}/{parts['name']}"


Name = Annotated[tuple[str, str], Depends(named)]


async def readable(request: Request, name: Name) -> Repository:
    """The repository, for whoever may read it."""
    return request.app.state.hub.find(request, *name)


async def writable(request: Request, name: Name) -> Repository:
    """The repository, for whoever may change it, or asks for a pull request."""
    return request.app.state.hub.find(request, *name, write=True, pull_request=is_true(request, "create_pr"))


async def proposable(request: Request, name: Name) -> Repository:
    """The repository, for whoever may open pull requests: objects are uploaded before there is one."""
    return request.app.state.hub.find(request, *name, write=True, pull_request=True)


async def signed(request: Request) -> None:
    """Refuses addresses of the storage that the Hub has not given out."""
    path = unquote(request.scope["path"])
    if request.query_params.get("signature") != request.app.state.hub.signature(path):
        raise HubError(403, "SignatureDoesNotMatch")


async def stored(request: Request, kind_and_name: Name, _: Annotated[None, Depends(signed)]) -> dict[str, bytes]:
    """The LFS objects of a repository."""
    kind, name = kind_and_name
    return request.app.state.hub.repository(name if kind == "models" else f"{kind}/{name}").objects


Body = Annotated[bytes, Depends(body_of)]
Json = Annotated[Any, Depends(json_of)]
Readable = Annotated[Repository, Depends(readable)]
Writable = Annotated[Repository, Depends(writable)]
Proposable = Annotated[Repository, Depends(proposable)]
Stored = Annotated[dict[str, bytes], Depends(stored)]


def build_app(hub: "HubServer") -> FastAPI:
    """The HTTP interface of a Hub."""
    app = FastAPI(openapi_url=None)
    app.state.hub = hub

    @app.exception_handler(HubError)
    async def answer(request: Request, error: HubError) -> Response:
        headers = {"X-Error-Message": error.message.encode("latin-1", "replace").decode("latin-1"), **error.headers}
        headers |= {"X-Error-Code": error.code} if error.code else {}
        headers["X-Request-Id"] = f"Root=1-{request.headers.get('x-amzn-trace-id', 'none')}"
        return JSONResponse({"error": error.message}, error.status, headers)

    add_account_routes(app, hub)
    add_repository_routes(app, hub)
    add_discussion_routes(app, hub)
    add_upload_routes(app, hub)
    add_download_routes(app, hub)

    @app.api_route("/{path:path}", methods=["GET", "HEAD", "POST", "PUT", "DELETE"])
    def absent(request: Request, path: str):
        # Ids without a namespace belong to the first models of the Hub, of which there are none here.
        if re.match(r"api/(models|datasets|spaces)/[^/]+(/|$)", path) or "/resolve/" in path:
            user, _ = hub.user(request)
            words = "Invalid username or password." if user is None else "Repository not found"
            raise HubError(401 if user is None else 404, words, "RepoNotFound")
        raise HubError(404, f"Sorry, we can't find the page you are looking for: {path}")

    return app


def add_account_routes(app: FastAPI, hub: "HubServer") -> None:
    """Users, and the creation, removal and renaming of repositories."""

    @app.get("/api/whoami-v2")
    def whoami(request: Request):
        user, role = hub.user(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in hub.organisations(user)]
        token = {"displayName": "test", "role": role, "createdAt": now()}
        about = {"type": "user", "id": git_id("user", user.encode())[:24], "name": user, "fullname": user}
        about |= {"isPro": False, "canPay": False, "email": f"{user}@example.org", "emailVerified": True}
        return {**about, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}

    @app.post("/api/validate-yaml")
    def validate(data: Json):
        errors, warnings = check_card(data["content"], data.get("repoType", "model"))
        messages = {"errors": [{"message": each} for each in errors], "warnings": [{"message": w} for w in warnings]}
        return JSONResponse(messages, 400 if errors else 200)

    def kind_of(data: dict) -> str:
        return {value: key for key, value in KINDS.items()}[data.get("type") or "model"]

    def full_name(request: Request, data: dict) -> tuple[str, str]:
        kind = kind_of(data)
        namespace = data.get("organization") or hub.user(request)[0]
        return kind, f"{namespace}/{data['name']}"

    @app.post("/api/repos/create")
    def create(request: Request, data: Json):
        kind, name = full_name(request, data)
        namespace, short = name.split("/")
        hub.check_namespace(request, namespace, f"create a {KINDS[kind]}")
        if not re.fullmatch(r"[\w.-]{1,96}", short) or re.search(r"^[.-]|[.-]$|--|\.\.|\.git$", short):
            raise HubError(400, f"Invalid repo name: {name} - {short!r}")
        path = name if kind == "models" else f"{kind}/{name}"
        url = f"{hub.endpoint}/{path}"
        if kind == "spaces" and data.get("sdk") not in SDKS:
            raise HubError(400, f'"sdk" must be one of [{", ".join(SDKS)}]')
        with hub.lock:
            if hub.exists(path):
                message = f"You already created this {KINDS[kind]} repo"
                return JSONResponse({"error": message, "url": url}, 409, {"X-Error-Message": message})
            hub.create(path, private=data.get("visibility") == "private" or bool(data.get("private")))
        return {"url": url, "name": name, "id": git_id("repo", name.encode())[:24]}

    @app.delete("/api/repos/delete")
    def delete(request: Request, data: Json):
        kind, name = full_name(request, data)
        repository = hub.find(request, kind, name)
        hub.check_namespace(request, name.split("/")[0], f"delete a {KINDS[kind]}")
        hub.delete(repository.path)
        return {}

    @app.post("/api/repos/move")
    def move(request: Request, data: Json):
        kind = kind_of(data)
        repository = hub.find(request, kind, data["fromRepo"], write=True)
        hub.check_namespace(request, data["toRepo"].split("/")[0], f"create a {KINDS[kind]}")
        new = data["toRepo"] if kind == "models" else f"{kind}/{data['toRepo']}"
        with hub.lock:
            if hub.exists(new):
                raise HubError(409, f"The repository {data['toRepo']} exists already")
            hub.rename(repository.path, new)
        return {}

    @app.put(REPOSITORY + "/settings")
    def settings(request: Request, repository: Writable, data: Json):
        if "visibility" in data:
            repository.private = data["visibility"] == "private"
        if "gated" in data:
            repository.gated = bool(data["gated"])
        return {"private": repository.private, "gated": repository.gated}

    @app.get(REPOSITORY + "/auth-check")
    def may_read(request: Request, repository: Readable):
        hub.check_gate(request, repository)
        return {}

    @app.get(REPOSITORY + "/auth-check/write")
    def may_write(repository: Writable):
        return {}


def paged(request: Request, entries: list, size: int) -> JSONResponse:
    """One page of a list; the header `Link` leads to the next one."""
    start = int(request.query_params.get("cursor", 0))
    headers = {}
    if start + size < len(entries):
        following = request.url.include_query_params(cursor=start + size)
        headers["Link"] = f'<{following}>; rel="next"'
    return JSONResponse(entries[start : start + size], headers=headers)


def is_true(request: Request, name: str) -> bool:
    return request.query_params.get(name, "").lower() in ("true", "1")


def add_repository_routes(app: FastAPI, hub: "HubServer") -> None:
    """What is in a repository: facts, files, commits, branches and tags."""

    def describe(repository: Repository, sha: str, name: str, expand: bool) -> dict | None:
        """The entry of a file or folder, None where there is neither."""
        files = repository.commits[sha].files
        inside = {each.removeprefix(f"{name}/"): files[each] for each in files if each.startswith(f"{name}/")}
        if name in files:
            file = files[name]
            entry = {"type": "file", "oid": file.blob_id, "size": len(file.content), "path": name}
            if file.lfs:
                entry["lfs"] = {"oid": file.sha256, **file.lfs_facts}
            if expand:
                entry["securityFileStatus"] = {"status": "safe", "avScan": None, "pickleImportScan": None}
        elif inside:
            entry = {"type": "directory", "oid": tree_id(inside), "size": 0, "path": name}
        else:
            return None
        if expand:
            history = repository.history(sha)
            trees = [describe(repository, commit.sha, name, expand=False) for commit in history] + [None]
            last = next(i for i in range(len(history)) if trees[i] != trees[i + 1])
            entry["lastCommit"] = {"id": history[last].sha, "title": history[last].title, "date": history[last].date}
        return entry

    @app.get(REPOSITORY)
    @app.get(REPOSITORY + "/revision/{revision}")
    def info(request: Request, repository: Readable, revision: str = "main"):
        commit = repository.commits[repository.resolve(unquote(revision))]
        card = yaml_of(commit.files["README.md"].content) if "README.md" in commit.files else {}
        siblings = []
        for path, file in sorted(commit.files.items()):
            sibling = {"rfilename": path}
            if is_true(request, "blobs"):
                sibling |= {"size": len(file.content), "blobId": file.blob_id}
                sibling |= {"lfs": {"sha256": file.sha256, **file.lfs_facts}} if file.lfs else {}
            siblings.append(sibling)
        facts = {
            "_id": git_id("repo", repository.path.encode())[:24],
            "id": repository.name,
            "modelId": repository.name,
            "author": repository.name.split("/")[0],
            "sha": commit.sha,
            "createdAt": repository.created,
            "lastModified": commit.date,
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags") or [],
            "cardData": card,
            "siblings": siblings,
        }
        facts |= {key: card[key] for key in ("library_name", "pipeline_tag", "model-index", "sdk") if key in card}
        if is_true(request, "securityStatus"):
            facts["securityRepoStatus"] = {"scansDone": True, "filesWithIssues": []}
        wanted = request.query_params.getlist("expand")
        return {key: facts[key] for key in facts if not wanted or key in ("_id", "id", "sha", *wanted)}

    @app.get(REPOSITORY + "/tree/{revision}")
    @app.get(REPOSITORY + "/tree/{revision}/{path:path}")
    def tree(request: Request, repository: Readable, revision: str, path: str = ""):
        sha = repository.resolve(unquote(revision))
        prefix = f"{unquote(path)}/" if path else ""
        names = [*folders(repository.commits[sha].files), *repository.commits[sha].files]
        names = [each for each in names if each.startswith(prefix)]
        if path and not names:
            raise HubError(404, f'{unquote(path)} does not exist on "{unquote(revision)}"', "EntryNotFound")
        if not is_true(request, "recursive"):
            names = [each for each in names if "/" not in each.removeprefix(prefix)]
        expand = is_true(request, "expand")
        size = min(hub.page_size, 50) if expand else hub.page_size
        return paged(request, [describe(repository, sha, each, expand) for each in names], size)

    @app.post(REPOSITORY + "/paths-info/{revision}")
    def paths_info(request: Request, repository: Readable, revision: str, body: Body):
        sha = repository.resolve(unquote(revision))
        form = parse_qs(body.decode())
        expand = form.get("expand", [""])[0].lower() in ("true", "1")
        entries = [describe(repository, sha, path.strip("/"), expand) for path in form.get("paths", [])]
        return [entry for entry in entries if entry is not None]

    @app.get(REPOSITORY + "/commits/{revision}")
    def commits(request: Request, repository: Readable, revision: str):
        entries = []
        for commit in repository.history(unquote(revision)):
            facts = {"id": commit.sha, "title": commit.title, "message": commit.message, "date": commit.date}
            entries.append({**facts, "authors": [{"user": commit.author}]})
        return paged(request, entries, min(hub.page_size, 50))

    @app.get(REPOSITORY + "/refs")
    def refs(request: Request, repository: Readable):

        def starting_with(prefix: str) -> list[dict]:
            found = [ref for ref in sorted(repository.refs) if ref.startswith(prefix)]
            return [{"name": r.removeprefix(prefix), "ref": r, "targetCommit": repository.refs[r]} for r in found]

        lists = {"branches": starting_with("refs/heads/"), "tags": starting_with("refs/tags/"), "converts": []}
        return lists | ({"pullRequests": starting_with("refs/pr/")} if is_true(request, "include_prs") else {})

    def add_ref(repository: Repository, ref: str, revision: str) -> dict:
        short = ref.split("/", 2)[2]
        if re.match(r"refs/", short) or re.search(r"\.\.|[\x00-\x20~^:?*\[\\]|/$|^/|\.lock$", short):
            raise HubError(400, f"Invalid reference name: {short}")
        with hub.lock:
            if ref in repository.refs:
                raise HubError(409, f"Reference already exists: {ref}")
            repository.refs[ref] = repository.resolve(revision)
        return {}

    def remove_ref(repository: Repository, ref: str) -> dict:
        if ref not in repository.refs:
            raise HubError(404, f"Invalid rev id: {ref}", "RevisionNotFound")
        if ref == "refs/heads/main":
            raise HubError(403, "Cannot delete the default branch: main")
        del repository.refs[ref]
        return {}

    @app.post(REPOSITORY + "/branch/{branch}")
    def create_branch(repository: Writable, branch: str, data: Json):
        return add_ref(repository, f"refs/heads/{unquote(branch)}", data.get("startingPoint", "main"))

    @app.delete(REPOSITORY + "/branch/{branch}")
    def delete_branch(repository: Writable, branch: str):
        return remove_ref(repository, f"refs/heads/{unquote(branch)}")

    @app.post(REPOSITORY + "/tag/{revision}")
    def create_tag(repository: Writable, revision: str, data: Json):
        return add_ref(repository, f"refs/tags/{data['tag']}", unquote(revision))

    @app.delete(REPOSITORY + "/tag/{tag}")
    def delete_tag(repository: Writable, tag: str):
        return remove_ref(repository, f"refs/tags/{unquote(tag)}")


def add_discussion_routes(app: FastAPI, hub: "HubServer") -> None:
    """Pull requests."""

    def describe(repository: Repository, request: dict) -> dict:
        author = {"name": request["author"], "type": "user"}
        facts = {key: request[key] for key in ("num", "title", "status", "createdAt")}
        about = {"name": repository.name, "type": KINDS[repository.kind]}
        return {**facts, "author": author, "repo": about, "isPullRequest": True}

    def find(repository: Repository, number: int) -> dict:
        if not 1 <= number <= len(repository.discussions):
            raise HubError(404, f"Discussion {number} not found")
        return repository.discussions[number - 1]

    @app.get(REPOSITORY + "/discussions")
    def discussions(request: Request, repository: Readable):
        found = [describe(repository, each) for each in reversed(repository.discussions)]
        return {"discussions": found, "count": len(found), "start": 0}

    @app.get(REPOSITORY + "/discussions/{number}")
    def details(request: Request, repository: Readable, number: int):
        pull_request = find(repository, number)
        author = {"name": pull_request["author"]}
        text = {"edited": False, "hidden": False, "latest": {"raw": pull_request["description"]}}
        comment = {"id": str(number), "type": "comment", "createdAt": pull_request["createdAt"], "author": author}
        changes = {"base": "refs/heads/main", "mergeCommitId": pull_request.get("merged")}
        more = {"events": [{**comment, "data": text}], "filesWithConflicts": [], "diff": None, "changes": changes}
        return {**describe(repository, pull_request), **more}

    @app.post(REPOSITORY + "/discussions")
    def create(request: Request, repository: Proposable, data: Json):
        if not data.get("pullRequest"):
            raise HubError(501, "The Hub of the tests has pull requests, and no other discussions")
        with hub.lock:
            created = repository.pull_request("main", data["title"], data["description"], hub.user(request)[0])
        return describe(repository, created)

    @app.post(REPOSITORY + "/discussions/{number}/merge")
    def merge(request: Request, repository: Writable, number: int):
        with hub.lock:
            pull_request = find(repository, number)
            head, main = repository.refs[pull_request["revision"]], repository.refs["refs/heads/main"]
            if main not in [commit.sha for commit in repository.history(head)]:
                raise HubError(409, "This pull request has conflicts with main")
            repository.refs["refs/heads/main"] = head
            pull_request |= {"status": "merged", "merged": head}
        return {}


def check_path(path: str) -> str:
    """A path that the Hub takes in a commit."""
    if not path or path.startswith("/") or {"", ".", "..", ".git"} & set(path.split("/")) or "\0" in path:
        raise HubError(400, f"Invalid file path: {path!r}")
    return path


def add_upload_routes(app: FastAPI, hub: "HubServer") -> None:
    """How files come in: `preupload` says which are LFS, the batch where to put those, `commit` does the rest."""

    @app.post(REPOSITORY + "/preupload/{revision}")
    def preupload(repository: Writable, revision: str, data: Json):
        present = repository.commits[repository.resolve(unquote(revision))].files
        ignored = present[".gitignore"].content.decode().split() if ".gitignore" in present else []
        entries = []
        for file in data["files"]:
            path = file["path"]
            ignore = any(fnmatch(path.rpartition("/")[2], pattern) for pattern in ignored)
            mode = "lfs" if is_lfs(path, file["size"], base64.b64decode(file["sample"])) else "regular"
            oid = present[path].etag if path in present else None
            entries.append({"path": path, "uploadMode": mode, "shouldIgnore": ignore, "oid": oid})
        return {"files": entries}

    @app.post(f"/{LFS}/batch")
    @app.post(f"/{{kind}}/{LFS}/batch")
    def batch(repository: Proposable, data: Json):
        objects, transfer = [], "basic"
        for each in data["objects"]:
            oid, size = each["oid"], each["size"]
            entry = {"oid": oid, "size": size, "authenticated": True}
            if oid not in repository.objects:
                verify = {"href": f"{hub.endpoint}/{repository.path}.git/info/lfs/objects/verify"}
                path = f"/upload/{repository.kind}/{repository.name}/{oid}"
                upload: dict[str, Any] = {"href": hub.signed(path)}
                if hub.part_size is not None and size > hub.part_size and "multipart" in data["transfers"]:
                    transfer, count = "multipart", -(-size // hub.part_size)
                    parts = {f"{i:05}": hub.signed(f"{path}/{i}") for i in range(1, count + 1)}
                    header = {"chunk_size": str(hub.part_size), **parts}
                    upload = {"href": hub.signed(f"{path}/complete"), "header": header}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        return {"transfer": transfer, "objects": objects}

    @app.put(STORED)
    def upload(objects: Stored, oid: str, body: Body):
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, "BadDigest: the content does not match the SHA-256 that was announced")
        objects[oid] = body
        return Response(headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    @app.put(STORED + "/{part}", dependencies=[Depends(stored)])
    def upload_part(oid: str, part: int, body: Body):
        hub.parts[oid, part] = body
        return Response(headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    @app.post(STORED + "/complete")
    def complete(objects: Stored, oid: str, data: Json):
        parts = [hub.parts.pop((oid, part["partNumber"]), b"") for part in data["parts"]]
        etags = [f'"{hashlib.md5(part).hexdigest()}"' for part in parts]
        content = b"".join(parts)
        if etags != [part["etag"] for part in data["parts"]] or hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, "InvalidPart: the parts do not make up the content that was announced")
        objects[oid] = content
        return {"success": True}

    @app.post(f"/{LFS}/verify")
    @app.post(f"/{{kind}}/{LFS}/verify")
    def verify(repository: Proposable, data: Json):
        if len(repository.objects.get(data["oid"], b"")) != data["size"]:
            raise HubError(404, f"LFS object {data['oid']} was not uploaded")
        return {}

    def apply(repository: Repository, files: dict[str, File], key: str, value: dict) -> None:
        """One line of a commit."""
        path = check_path(value["path"].rstrip("/"))
        if key == "file":
            content = value["content"]
            content = base64.b64decode(content) if value.get("encoding") == "base64" else content.encode()
            files[path] = File(content, lfs=False)
        elif key == "lfsFile":
            content = repository.objects.get(value["oid"])
            if content is None:
                raise HubError(400, f"LFS object {value['oid']} of {path} was not uploaded")
            files[path] = File(content, lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [path] if key == "deletedFile" else [name for name in files if name.startswith(f"{path}/")]
            if not gone or not set(gone) <= set(files):
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise HubError(400, f"Unknown operation in a commit: {key}")

    @app.post(REPOSITORY + "/commit/{revision}")
    def commit(request: Request, repository: Writable, revision: str, body: Body):
        create_pr = is_true(request, "create_pr")
        header, *operations = (json.loads(line) for line in body.splitlines() if line.strip())
        title, message = header["value"]["summary"], header["value"].get("description", "")
        parent, author = header["value"].get("parentCommit"), hub.user(request)[0]
        with hub.lock:
            base = repository.refs[repository.branch(unquote(revision))]
            if parent is not None and create_pr:
                base = repository.resolve(parent)
            elif parent is not None and repository.resolve(parent) != base:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repository.commits[base].files)
            for operation in operations:
                apply(repository, files, operation["key"], operation["value"])
            made = repository.add(base, files, title, message, author)
            answer = {"success": True, "commitOid": made.sha, "hookOutput": ""}
            answer["commitUrl"] = f"{hub.endpoint}/{repository.path}/commit/{made.sha}"
            if create_pr:
                pull_request = repository.pull_request(base, title, message, author)
                repository.refs[pull_request["revision"]] = made.sha
                answer["pullRequestUrl"] = f"{hub.endpoint}/{repository.path}/discussions/{pull_request['num']}"
            else:
                repository.refs[repository.branch(unquote(revision))] = made.sha
        return answer


def send_range(request: Request, content: bytes, headers: dict[str, str]) -> Response:
    """A file, or the part of it that the header `Range` names."""
    headers = {**headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if match is None or match[0] == "bytes=-":
        return Response(content, headers=headers)
    first, last = match.groups()
    start = int(first) if first else max(len(content) - int(last), 0)
    end = min(int(last), len(content) - 1) if first and last else len(content) - 1
    if start > end:
        return Response(status_code=416, headers={**headers, "Content-Range": f"bytes */{len(content)}"})
    headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
    return Response(content[start : end + 1], status_code=206, headers=headers)


def add_download_routes(app: FastAPI, hub: "HubServer") -> None:
    """How files go out: regular ones from the Hub, LFS ones by a redirect to the storage."""

    @app.api_route(f"/{RESOLVE}", methods=["GET", "HEAD"])
    @app.api_route(f"/{{kind}}/{RESOLVE}", methods=["GET", "HEAD"])
    def resolve(request: Request, repository: Readable, revision: str, path: str):
        hub.check_gate(request, repository)
        sha, path = repository.resolve(unquote(revision)), unquote(path)
        headers = {"X-Repo-Commit": sha}
        if path not in repository.commits[sha].files:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        file = repository.commits[sha].files[path]
        if not file.lfs:
            headers["ETag"] = f'"{file.etag}"'
            # Only what is sent counts as served: a HEAD speaks of the true file.
            content = file.content if request.method == "HEAD" else hub.served(repository, path, file)
            return send_range(request, content, headers)
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
        location = hub.signed(f"/download/{repository.path}/{sha}/{path}")
        return RedirectResponse(location, status_code=302, headers=headers)

    @app.get("/download/{path:path}", dependencies=[Depends(signed)])
    def download(request: Request, path: str):
        repo_id, sha, name = re.fullmatch(r"(.+?)/([0-9a-f]{40})/(.+)", unquote(path), re.DOTALL).groups()
        repository = hub.repository(repo_id)
        file = repository.commits[sha].files[name]
        return send_range(request, hub.served(repository, name, file), {"ETag": f'"{file.etag}"'})
