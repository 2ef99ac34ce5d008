"""The Hub of the tests against the client that it was written for; nothing of this package is involved."""

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


WEIGHTS = bytes(range(256)) * 400  # 100 kB, no text


@pytest.fixture
def api(hub, hub_token):
    """The client as user `me`."""
    return HfApi()


@pytest.fixture
def repo_id(hub, request):
    """An empty repository of user `me` that goes with the test."""
    name = f"me/{request.node.name.split('[')[0][:60]}"
    hub.create(name)
    yield name
    if hub.exists(name):
        hub.delete(name)


@pytest.fixture
def folder(tmp_path):
    """What a model's folder looks like."""
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [diffusers]\n---\n# Model\n")
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "config.json").write_text('{"sample_size": 8}')
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(WEIGHTS)
    return folder


def read_tree(folder) -> dict[str, bytes]:
    folder = Path(folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def requests(hub, *methods: str) -> list[str]:
    return [f"{method} {path}" for method, path, _ in hub.log if method in methods]


def bearer() -> dict[str, str]:
    """For requests that the client would refuse to make."""
    return {"Authorization": f"Bearer {get_token()}"}


def test_the_client_knows_no_other_hub_and_no_cache_of_the_user(hub, tmp_path, fresh_python):
    assert constants.ENDPOINT == hub.endpoint
    assert get_token() is None
    home = Path(os.environ["HF_HOME"])
    assert home.name.startswith("hf_home_") and home not in Path.home().parents
    for path in (constants.HF_HUB_CACHE, constants.HF_TOKEN_PATH, constants.HF_ASSETS_CACHE):
        assert home in Path(path).parents
    token = hub.add_token("somebody")
    code = "from huggingface_hub import whoami, constants; print(whoami()['name'], constants.HF_HUB_CACHE)"
    output = fresh_python(code, tmp_path, HF_HUB_OFFLINE="0", HF_TOKEN=token).stdout.split()
    assert output == ["somebody", constants.HF_HUB_CACHE]


def test_repositories_come_and_go(hub, api):
    name = "me/comes-and-goes"
    assert not api.repo_exists(name)
    url = api.create_repo("comes-and-goes", private=True)
    assert url.repo_id == name and url == f"{hub.endpoint}/{name}"
    with pytest.raises(HfHubHTTPError, match="You already created this model repo") as error:
        api.create_repo(name)
    assert error.value.response.status_code == 409
    assert api.create_repo(name, exist_ok=True).repo_id == name
    assert api.model_info(name).private and hub.files(name).keys() == {".gitattributes"}
    api.update_repo_settings(name, private=False, gated="auto")
    assert not api.model_info(name).private and api.model_info(name).gated
    api.delete_repo(name)
    assert not hub.exists(name) and not api.repo_exists(name)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(name)
    response = httpx2.post(f"{hub.endpoint}/api/repos/create", json={"name": "a--b"}, headers=bearer())
    assert response.status_code == 400 and "Invalid repo name" in response.text


def test_who_may_do_what(hub, api):
    assert api.whoami()["name"] == "me" and api.get_full_repo_name("x") == "me/x"
    assert api.whoami()["auth"]["accessToken"]["role"] == "write"
    read = HfApi(token=hub.add_token("me", "read"))
    with pytest.raises(HfHubHTTPError, match="403 Forbidden: You don't have the rights to create a model"):
        read.create_repo("me/x")
    with pytest.raises(HfHubHTTPError, match='under the namespace "somebody"'):
        api.create_repo("somebody/x")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_wrong")
    hub.add_org("lab", ["me", "somebody"])
    assert [org["name"] for org in api.whoami()["orgs"]] == ["lab"]
    api.create_repo("lab/of-all")
    HfApi(token=hub.add_user("somebody")).upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="lab/of-all")
    assert hub.files("lab/of-all")["a"] == b"1"


# What the Hub says to reading and writing, by what the repository is and who asks: 200 or the error with its status.
NOT_FOUND, HTTP, GATED = RepositoryNotFoundError, HfHubHTTPError, GatedRepoError
ACCESS = [
    ("public", "owner", 200, 200),
    ("public", "owner's read token", 200, (HTTP, 403, "must use a write token")),
    ("public", "other", 200, (HTTP, 403, "create_pr=1")),
    ("public", "nobody", 200, (NOT_FOUND, 401, "Invalid username or password")),
    ("public", "wrong token", (HTTP, 401, "Invalid credentials"), (HTTP, 401, "Invalid credentials")),
    ("private", "owner", 200, 200),
    ("private", "owner's read token", 200, (HTTP, 403, "must use a write token")),
    ("private", "other", (NOT_FOUND, 404, "Repository Not Found"), (NOT_FOUND, 404, "Repository Not Found")),
    ("private", "nobody", (NOT_FOUND, 401, "Invalid username"), (NOT_FOUND, 401, "Invalid username")),
    ("private", "wrong token", (HTTP, 401, "Invalid credentials"), (HTTP, 401, "Invalid credentials")),
    ("gated", "owner", 200, 200),
    ("gated", "other", (GATED, 403, "not in the authorized list"), (HTTP, 403, "create_pr=1")),
    ("gated", "nobody", (GATED, 401, "must have access to it"), (NOT_FOUND, 401, "Invalid username")),
    ("absent", "owner", (NOT_FOUND, 404, "Repository Not Found"), (NOT_FOUND, 404, "Repository Not Found")),
    ("absent", "nobody", (NOT_FOUND, 401, "Invalid username"), (NOT_FOUND, 401, "Invalid username")),
]


@pytest.mark.parametrize("kind, who, reading, writing", ACCESS, ids=[f"{kind}, {who}" for kind, who, *_ in ACCESS])
def test_access(hub, tmp_path, kind, who, reading, writing):
    name = "me/access"
    if kind != "absent":
        hub.create(name, private=kind == "private", gated=kind == "gated")
        hub.write(name, {"a.txt": b"1"})
    tokens = {"nobody": False, "wrong token": "hf_wrong", "other": hub.add_user("other")}
    tokens |= {"owner": hub.add_token("me", "write"), "owner's read token": hub.add_token("me", "read")}
    read = {"filename": "a.txt", "cache_dir": tmp_path, "token": tokens[who]}
    write = {"path_or_fileobj": b"2", "path_in_repo": "b.txt", "token": tokens[who]}
    try:
        for call, expected in (
            (lambda: hf_hub_download(name, **read), reading),
            (lambda: HfApi().upload_file(repo_id=name, **write), writing),
        ):
            if expected == 200:
                call()
            else:
                error_class, status, words = expected
                with pytest.raises(HfHubHTTPError, match=words) as error:
                    call()
                assert type(error.value) is error_class and error.value.response.status_code == status
        if kind != "absent":
            assert ("b.txt" in hub.files(name)) == (writing == 200)
    finally:
        if kind != "absent":
            hub.delete(name)


def test_a_folder_goes_up_and_comes_down(hub, api, repo_id, folder):
    first = hub.commits(repo_id)
    commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="All of it")
    assert hub.commits(repo_id) == [commit.oid, *first]
    assert commit.commit_url == f"{hub.endpoint}/{repo_id}/commit/{commit.oid}"
    assert {name: data for name, data in hub.files(repo_id).items() if name != ".gitattributes"} == read_tree(folder)
    # The weights went to the storage, by a signed address.
    (upload,) = [request for request in hub.log if request.method == "PUT"]
    assert upload.path.startswith("/upload/models/me/") and "authorization" not in upload.headers

    hub.clear_log()
    snapshot = snapshot_download(repo_id)
    assert read_tree(snapshot) == hub.files(repo_id)
    assert Path(snapshot).name == commit.oid
    assert api.verify_repo_checksums(repo_id).mismatches == []
    (download,) = [request for request in hub.log if "/download/" in request.path]
    assert download.path.endswith("diffusion_pytorch_model.safetensors") and "authorization" not in download.headers

    hub.clear_log()
    assert api.upload_folder(repo_id=repo_id, folder_path=folder).oid == commit.oid
    assert not any("/commit/" in request or "PUT" in request for request in requests(hub, "POST", "PUT"))


def test_facts_about_files_are_true(hub, api, repo_id, folder):
    api.upload_folder(repo_id=repo_id, folder_path=folder)
    info = api.model_info(repo_id, files_metadata=True)
    assert info.sha == hub.commits(repo_id)[0] and info.card_data.license == "mit" and info.tags == ["diffusers"]
    files = {sibling.rfilename: sibling for sibling in info.siblings}
    assert files.keys() == hub.files(repo_id).keys()
    weights = files["unet/diffusion_pytorch_model.safetensors"]
    assert (weights.size, weights.lfs.size, files["model_index.json"].lfs) == (len(WEIGHTS), len(WEIGHTS), None)

    # git itself over the same files, with the pointer in place of the weights.
    if shutil.which("git") is None:
        pytest.skip("needs git to compare ids with")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{weights.lfs.sha256}\nsize {len(WEIGHTS)}\n"
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_text(pointer)
    (folder / ".gitattributes").write_bytes(hub.files(repo_id)[".gitattributes"])

    def git(*arguments):
        config = ["-c", "filter.lfs.clean=cat", "-c", "filter.lfs.process=", "-c", "filter.lfs.required=false"]
        command = ["git", *config, *arguments]
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout

    git("init", "--quiet")
    git("add", ".")
    listed = [line.split(maxsplit=3) for line in git("ls-files", "--stage").splitlines()]
    assert {path: oid for _, oid, _, path in listed} == {name: file.blob_id for name, file in files.items()}
    assert len(pointer) == weights.lfs.pointer_size
    (unet,) = [entry for entry in api.list_repo_tree(repo_id) if entry.path == "unet"]
    tree = git("write-tree").strip()
    assert unet.tree_id == git("rev-parse", f"{tree}:unet").strip()


@pytest.mark.parametrize(
    "name, content, lfs",
    [
        ("model.safetensors", b"{}", True),
        ("unet/model.bin", b"text", True),
        ("grid.png", b"\x89PNG\r\n\x1a\n\0\0", True),
        ("notes.txt", b"text", False),
        ("model_index.json", b"{}", False),
        ("empty.safetensors", b"", False),  # the client's own rule
        ("long.txt", b"a" * (10 * 2**20 + 1), True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_lfs(hub, api, repo_id, name, content, lfs):
    api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repo_id)
    (info,) = api.get_paths_info(repo_id, [name, "absent"])
    assert (info.lfs is not None) == lfs and info.size == len(content)
    assert hub.files(repo_id)[name] == content


def test_large_files_go_up_in_parts(hub, api, repo_id):
    hub.part_size = 30_000
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="model.safetensors", repo_id=repo_id)
    assert len(requests(hub, "PUT")) == 4
    assert hub.files(repo_id)["model.safetensors"] == WEIGHTS


def test_one_commit_adds_copies_and_removes(hub, api, repo_id):
    hub.write(repo_id, {"old/a.txt": b"a", "old/b.txt": b"b", "weights.bin": WEIGHTS, "text.txt": b"text"})
    operations = [
        CommitOperationAdd("new.txt", b"new"),
        CommitOperationCopy("weights.bin", "copy.bin"),
        CommitOperationCopy("text.txt", "copy.txt"),
        CommitOperationDelete("old/"),
        CommitOperationDelete("text.txt"),
    ]
    api.create_commit(repo_id, operations, commit_message="All at once")
    files = {"new.txt": b"new", "weights.bin": WEIGHTS, "copy.bin": WEIGHTS, "copy.txt": b"text"}
    assert {name: data for name, data in hub.files(repo_id).items() if name != ".gitattributes"} == files
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("absent.txt", repo_id)
    for line, problem in [
        ({"key": "file", "value": {"path": "../up.txt", "content": ""}}, "Invalid file path"),
        ({"key": "file", "value": {"path": "/root.txt", "content": ""}}, "Invalid file path"),
        ({"key": "lfsFile", "value": {"path": "a.bin", "oid": "0" * 64, "size": 1}}, "was not uploaded"),
    ]:
        body = "\n".join(json.dumps(each) for each in ({"key": "header", "value": {"summary": "Bad"}}, line))
        response = httpx2.post(f"{hub.endpoint}/api/models/{repo_id}/commit/main", content=body, headers=bearer())
        assert response.status_code == 400 and problem in response.json()["error"]
    assert len(hub.commits(repo_id)) == 3


def test_branches_tags_and_their_errors(hub, api, repo_id):
    first = hub.write(repo_id, {"a.txt": b"1"})
    api.create_branch(repo_id, branch="fp16/test")
    api.create_tag(repo_id, tag="v1", revision=first)
    api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id=repo_id, revision="fp16/test")
    assert hub.branches(repo_id) == ["fp16/test", "main"]
    refs = api.list_repo_refs(repo_id)
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", first)]
    read = {revision: Path(hf_hub_download(repo_id, "a.txt", revision=revision)).read_bytes()
            for revision in ("main", "fp16/test", "v1", first)}  # fmt: skip
    assert read == {"main": b"1", "fp16/test": b"2", "v1": b"1", first: b"1"}
    assert api.revision_exists(repo_id, "v1") and not api.revision_exists(repo_id, "v2")

    for status, call in [
        (409, lambda: api.create_branch(repo_id, branch="main")),
        (400, lambda: api.create_branch(repo_id, branch="refs/pr/5")),
        (404, lambda: api.create_branch(repo_id, branch="x", revision="absent")),
        (403, lambda: api.delete_branch(repo_id, branch="main")),
        (404, lambda: api.delete_branch(repo_id, branch="absent")),
        (409, lambda: api.create_tag(repo_id, tag="v1")),
        (404, lambda: api.delete_tag(repo_id, tag="v2")),
        (404, lambda: api.upload_file(path_or_fileobj=b"3", path_in_repo="a", repo_id=repo_id, revision="absent")),
        (404, lambda: api.upload_file(path_or_fileobj=b"3", path_in_repo="a", repo_id=repo_id, revision="v1")),
    ]:
        with pytest.raises(HfHubHTTPError) as error:
            call()
        assert error.value.response.status_code == status
    api.create_branch(repo_id, branch="main", exist_ok=True)
    api.delete_branch(repo_id, branch="fp16/test")
    api.delete_tag(repo_id, tag="v1")
    assert hub.branches(repo_id) == ["main"] and api.list_repo_refs(repo_id).tags == []


def test_pull_requests(hub, api, repo_id):
    head = hub.write(repo_id, {"a.txt": b"1"})
    guest = HfApi(token=hub.add_user("guest"))
    commit = guest.upload_file(
        path_or_fileobj=WEIGHTS, path_in_repo="b.bin", repo_id=repo_id, create_pr=True, commit_message="Weights"
    )
    assert commit.pr_revision == "refs/pr/1" and hub.commits(repo_id)[0] == head
    assert [(each["title"], each["author"]) for each in hub.pull_requests(repo_id)] == [("Weights", "guest")]
    assert Path(hf_hub_download(repo_id, "b.bin", revision="refs/pr/1")).read_bytes() == WEIGHTS
    assert hub.commits(repo_id, "refs/pr/1")[:2] == [commit.oid, head]
    refs = api.list_repo_refs(repo_id, include_pull_requests=True)
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1"]
    opened = api.create_pull_request(repo_id, title="By hand")
    assert [each.num for each in api.get_repo_discussions(repo_id)] == [2, 1] and opened.status == "open"
    api.merge_pull_request(repo_id, 1)
    assert hub.files(repo_id)["b.bin"] == WEIGHTS
    assert api.get_discussion_details(repo_id, 1).status == "merged"


def test_what_is_absent(hub, api, repo_id):
    with pytest.raises(RevisionNotFoundError, match="Invalid rev id: v9"):
        hf_hub_download(repo_id, "a.txt", revision="v9")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(repo_id, "a.txt")
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(repo_id, "absent"))
    assert not api.file_exists(repo_id, "a.txt")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("without-a-namespace")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("without-a-namespace", "a.txt")


def test_a_commit_on_a_stale_parent_is_refused(hub, api, repo_id):
    parent = hub.commits(repo_id)[0]
    add = {"path_or_fileobj": b"2", "repo_id": repo_id, "parent_commit": parent}
    # Somebody else is faster, after the client has looked and before it commits.
    hub.before(r"POST .*/commit/main", lambda: hub.write(repo_id, {"theirs.txt": b"1"}))
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        api.upload_file(**add, path_in_repo="ours.txt")
    assert error.value.response.status_code == 412 and "ours.txt" not in hub.files(repo_id)
    pull_request = api.upload_file(**add, path_in_repo="ours.txt", create_pr=True)  # starts at the parent
    assert hub.commits(repo_id, pull_request.pr_revision)[1] == parent

    parent = hub.commits(repo_id)[0]

    def push(number):
        try:
            add = {"path_or_fileobj": b"2", "repo_id": repo_id, "parent_commit": parent}
            return api.upload_file(**add, path_in_repo=f"{number}.txt").oid
        except HfHubHTTPError as error:
            return error.response.status_code

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(push, range(4)))
    assert outcomes.count(412) == 3 and hub.commits(repo_id)[:2] == [*(set(outcomes) - {412}), parent]


def test_a_renamed_repository_is_found_under_its_old_name(hub, api, repo_id):
    hub.write(repo_id, {"a.txt": b"1", "b.bin": WEIGHTS})
    hub.rename(repo_id, "me/second-name")
    try:
        assert api.model_info(repo_id).id == "me/second-name"
        assert Path(hf_hub_download(repo_id, "a.txt")).read_bytes() == b"1"
        assert Path(hf_hub_download(repo_id, "b.bin")).read_bytes() == WEIGHTS
        api.upload_file(path_or_fileobj=b"2", path_in_repo="c.bin", repo_id=repo_id)
        api.move_repo("me/second-name", "me/third-name")
        assert hub.files("me/third-name")["c.bin"] == b"2"
        assert [file.path for file in api.list_repo_tree(repo_id)] == [".gitattributes", "a.txt", "b.bin", "c.bin"]
    finally:
        hub.delete("me/third-name")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(repo_id)
    hub.create(repo_id)
    assert api.model_info(repo_id).id == repo_id


def test_ranges(hub, repo_id):
    hub.write(repo_id, {"a.txt": b"0123456789", "b.bin": WEIGHTS})
    for name, content in (("a.txt", b"0123456789"), ("b.bin", WEIGHTS)):
        url, size = f"{hub.endpoint}/{repo_id}/resolve/main/{name}", len(content)
        for asked, part, range_sent in [
            ("bytes=3-5", content[3:6], f"bytes 3-5/{size}"),
            ("bytes=4-", content[4:], f"bytes 4-{size - 1}/{size}"),
            ("bytes=-4", content[-4:], f"bytes {size - 4}-{size - 1}/{size}"),
            ("bytes=7-999999", content[7:], f"bytes 7-{size - 1}/{size}"),
        ]:
            response = httpx2.get(url, headers={"Range": asked}, follow_redirects=True)
            assert (response.status_code, response.content) == (206, part)
            assert response.headers["Content-Range"] == range_sent
        response = httpx2.get(url, headers={"Range": f"bytes={size}-"}, follow_redirects=True)
        assert (response.status_code, response.headers["Content-Range"]) == (416, f"bytes */{size}")


def test_storage_wants_its_signature(hub, repo_id):
    sha = hub.write(repo_id, {"b.bin": WEIGHTS})
    assert httpx2.get(f"{hub.storage}/download/{repo_id}/{sha}/b.bin").status_code == 403
    assert httpx2.put(f"{hub.storage}/upload/models/{repo_id}/{'0' * 64}", content=b"").status_code == 403


def test_a_cut_download_is_resumed(hub, repo_id, tmp_path, monkeypatch):
    # The client keeps what arrived in whole chunks, of 10 MB.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.write(repo_id, {"model.safetensors": WEIGHTS})
    hub.cut(r"GET /download/", after_bytes=60_000)
    path = hf_hub_download(repo_id, "model.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == WEIGHTS
    ranges = [headers.get("range") for _, request, headers in hub.log if request.startswith("/download/")]
    assert ranges == [None, "bytes=60000-"]


def test_a_download_that_fails_for_good_leaves_nothing(hub, repo_id, tmp_path):
    hub.write(repo_id, {"model.safetensors": WEIGHTS})
    hub.cut(r"GET /download/", after_bytes=60_000)
    hub.fail(r"GET /download/", 500)
    with pytest.raises(HfHubHTTPError, match="500"):
        hf_hub_download(repo_id, "model.safetensors", cache_dir=tmp_path)
    assert len(requests(hub, "GET")) == 2
    assert not [
        path for folder in ("blobs", "snapshots") for path in tmp_path.glob(f"*/{folder}/**/*") if path.is_file()
    ]
    assert Path(hf_hub_download(repo_id, "model.safetensors", cache_dir=tmp_path)).read_bytes() == WEIGHTS


def test_a_cut_upload_is_tried_again(hub, api, repo_id):
    content = WEIGHTS * 40  # more than what waits between two sockets
    hub.cut(r"PUT /upload/", after_bytes=60_000)
    api.upload_file(path_or_fileobj=content, path_in_repo="model.safetensors", repo_id=repo_id)
    assert len(requests(hub, "PUT")) == 2 and hub.files(repo_id)["model.safetensors"] == content


def test_a_commit_whose_answer_is_lost_has_happened(hub, api, repo_id):
    add = {"path_or_fileobj": b"1", "path_in_repo": "a.txt", "repo_id": repo_id}
    hub.cut(r"POST .*/commit/main", after_bytes=10)
    with pytest.raises(httpx2.TransportError):
        api.upload_file(**add)
    assert "a.txt" not in hub.files(repo_id)
    hub.cut(r"POST .*/commit/main", after_bytes=10, part="response")
    with pytest.raises(httpx2.TransportError):
        api.upload_file(**add)
    assert "a.txt" in hub.files(repo_id)


def test_errors_on_demand(hub, api, repo_id):
    hub.fail(r"POST .*/commit/", 500, body="out of order")
    with pytest.raises(HfHubHTTPError, match="out of order") as error:
        api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id=repo_id)
    assert error.value.response.status_code == 500
    hub.fail(r"POST .*/preupload/", 429, headers={"Retry-After": "0"})  # the client tries again by itself
    api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id=repo_id)
    assert len([request for request in requests(hub, "POST") if "/preupload/" in request]) == 3
    hub.delay(r"GET /api/models/", seconds=0.5)
    with pytest.raises(httpx2.TimeoutException):
        api.model_info(repo_id, timeout=0.1)
    hub.fail("HEAD", 503, times=float("inf"))
    hub.reset_faults()
    assert hub.log == [] and api.file_exists(repo_id, "a.txt")


def test_content_that_does_not_match_its_hash(hub, api, repo_id, tmp_path):
    content = {"config.json": b'{"a": 1}', "model.safetensors": WEIGHTS}
    false = {"config.json": b'{"a": 2}', "model.safetensors": WEIGHTS[::-1]}
    hub.write(repo_id, content)
    for name in false:
        hub.corrupt(repo_id, name, false[name], times=1)
    snapshot = Path(snapshot_download(repo_id, cache_dir=tmp_path))
    assert all((snapshot / name).read_bytes() == false[name] for name in false)  # the client compares sizes alone
    found = api.verify_repo_checksums(repo_id, cache_dir=tmp_path).mismatches
    assert {mismatch["path"] for mismatch in found} == set(false)
    snapshot = Path(snapshot_download(repo_id, cache_dir=tmp_path, force_download=True))
    assert all((snapshot / name).read_bytes() == content[name] for name in content)
    hub.corrupt(repo_id, "model.safetensors", WEIGHTS[:-1])
    with pytest.raises(OSError, match="Consistency check failed"):
        hf_hub_download(repo_id, "model.safetensors", cache_dir=tmp_path, force_download=True)


def test_long_lists_come_in_pages(hub, api, repo_id):
    names = [f"folder/{i:02}.txt" for i in range(7)]
    for name in names:
        hub.write(repo_id, {name: b"1"}, message=f"Add {name}")
    hub.page_size = 3
    assert [file.path for file in api.list_repo_tree(repo_id, "folder")] == names
    assert len(requests(hub, "GET")) == 3
    entries = list(api.list_repo_tree(repo_id, recursive=True, expand=True))
    assert [entry.path for entry in entries] == ["folder", ".gitattributes", *names]
    titles = [f"Add {name}" for name in names]
    assert [entry.last_commit.title for entry in entries] == [titles[-1], "initial commit", *titles]
    assert [commit.title for commit in api.list_repo_commits(repo_id)] == [*reversed(titles), "initial commit"]


def test_offline_from_the_cache(hub, api, repo_id, monkeypatch):
    hub.write(repo_id, {"a.txt": b"1", "b.bin": WEIGHTS})
    online = snapshot_download(repo_id)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.clear_log()
    assert snapshot_download(repo_id) == online
    assert Path(hf_hub_download(repo_id, "b.bin")).read_bytes() == WEIGHTS
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("me/never-seen", "a.txt")
    with pytest.raises(OfflineModeIsEnabled):
        api.model_info(repo_id)
    assert hub.log == []


@pytest.mark.parametrize(
    "metadata, problem",
    [
        ("license: mit\ntags: [a]\nbase_model: me/base\ndatasets: [mnist]", None),
        ("license: MIT", '"license" must be one of'),
        ("license: mit\nbase_model: not a model", '"base_model"'),
        ("license: mit\ntags: text", '"tags" must be an array'),
        ("license: [mit", "YAML metadata is invalid"),
        ("license: mit\nmodel-index: [{name: a}]", '"model-index" lacks'),
    ],
)
def test_metadata_of_cards_are_checked(hub, api, repo_id, metadata, problem):
    card = ModelCard(f"---\n{metadata}\n---\n", ignore_metadata_errors=True).content if problem is None else metadata
    card = f"---\n{metadata}\n---\n# Model\n" if problem else card
    upload = {"path_or_fileobj": card.encode(), "path_in_repo": "README.md", "repo_id": repo_id}
    if problem is None:
        api.upload_file(**upload)
    else:
        with pytest.raises(ValueError, match=problem):
            api.upload_file(**upload)
    assert ("README.md" in hub.files(repo_id)) == (problem is None)


def test_a_card_without_metadata_is_warned_of(api, repo_id):
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# Model", path_in_repo="README.md", repo_id=repo_id)


@pytest.mark.parametrize("kind, options", [("dataset", {}), ("space", {"space_sdk": "gradio"})])
def test_data_sets_and_spaces(hub, api, kind, options):
    url = api.create_repo("me/other-kind", repo_type=kind, **options)
    assert (url.repo_type, url.repo_id) == (kind, "me/other-kind")
    where = {"repo_id": "me/other-kind", "repo_type": kind}
    api.upload_file(**where, path_or_fileobj=WEIGHTS, path_in_repo="data.bin")
    api.upload_file(**where, path_or_fileobj=b"1", path_in_repo="a.txt")
    assert hub.files(f"{kind}s/me/other-kind").keys() == {".gitattributes", "a.txt", "data.bin"}
    assert read_tree(snapshot_download(**where)) == hub.files(f"{kind}s/me/other-kind")
    assert api.repo_info(**where).sha == hub.commits(f"{kind}s/me/other-kind")[0]
    assert not api.repo_exists("me/other-kind")
    api.delete_repo(**where)
