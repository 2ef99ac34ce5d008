"""Repositories as the Hub of the tests keeps them: files, commits and refs in memory, with git's ids, and what the Hub
says about the metadata of a card."""

import dataclasses
import hashlib
import re
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from fnmatch import fnmatch
from functools import cached_property
from typing import Any

import yaml


KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
SDKS = ("gradio", "docker", "static")
COLOURS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
LFS_PATTERNS = (
    "*.7z *.arrow *.avro *.bin *.bz2 *.ckpt *.ftz *.gguf *.gz *.h5 *.joblib *.lz4 *.mlmodel *.model *.msgpack *.npy"
    " *.npz *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors *.tar *.tflite *.tgz *.wasm *.xz"
    " *.zip *.zst *tfevents*"
).split()
LFS_SIZE = 10 * 2**20  # larger files are LFS whatever their name
ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
LICENSES = (
    "afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0"
    " bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5"
    " cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0"
    " cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0"
    " cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0"
    " etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 h-research"
    " intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit"
    " mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unknown"
    " unlicense wtfpl zlib"
).split()


class HubError(Exception):
    """An answer that is no success: `status`, the Hub's words, its `X-Error-Code`, and headers to send beside them."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


def git_id(kind: str, content: bytes) -> str:
    """The id that git gives an object: SHA-1 of its kind, length and content."""
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a commit. Where it is LFS, git holds a pointer of three lines in place of the content."""

    content: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def blob(self) -> bytes:
        if not self.lfs:
            return self.content
        version = "version https://git-lfs.github.com/spec/v1"
        return f"{version}\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @cached_property
    def blob_id(self) -> str:
        return git_id("blob", self.blob)

    @property
    def lfs_facts(self) -> dict[str, Any]:
        return {"size": len(self.content), "pointerSize": len(self.blob)}

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclasses.dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    files: dict[str, File]
    title: str
    message: str
    author: str
    date: str


@dataclasses.dataclass
class Repository:
    kind: str
    name: str
    private: bool
    gated: bool
    created: str
    commits: dict[str, Commit] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)  # `refs/heads/main` -> commit
    discussions: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    objects: dict[str, bytes] = dataclasses.field(default_factory=dict)  # LFS content by SHA-256

    @property
    def path(self) -> str:
        """Where its pages are: the name alone for a model."""
        return self.name if self.kind == "models" else f"{self.kind}/{self.name}"

    def resolve(self, revision: str) -> str:
        """The commit of a branch, a tag, a pull request (`refs/pr/1`) or a commit id of at least seven digits."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.refs[ref]
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            found = [sha for sha in self.commits if sha.startswith(revision)]
            if len(found) == 1:
                return found[0]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def branch(self, revision: str) -> str:
        """The ref that a commit to `revision` moves."""
        for ref in (revision, f"refs/heads/{revision}"):
            if ref in self.refs and not ref.startswith("refs/tags/"):
                return ref
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision: str) -> list[Commit]:
        """Commits from the newest to the first."""
        commits, sha = [], self.resolve(revision)
        while sha is not None:
            commits.append(self.commits[sha])
            sha = commits[-1].parent
        return commits

    def add(self, parent: str | None, files: dict[str, File], title: str, message: str, author: str) -> Commit:
        """A commit of exactly `files` on top of `parent`; no ref is moved."""
        lines = [f"tree {tree_id(files)}", f"author {author} {time.time_ns()} +0000", "", title, "", message]
        lines[1:1] = [f"parent {parent}"] if parent else []
        sha = git_id("commit", "\n".join(lines).encode())
        self.commits[sha] = Commit(sha, parent, files, title, message, author, now())
        return self.commits[sha]

    def pull_request(self, revision: str, title: str, message: str, author: str) -> dict[str, Any]:
        """A new, open pull request that starts at `revision`."""
        number = len(self.discussions) + 1
        self.refs[f"refs/pr/{number}"] = self.resolve(revision)
        request = {"num": number, "title": title, "description": message, "status": "open", "author": author}
        self.discussions.append({**request, "revision": f"refs/pr/{number}", "createdAt": now()})
        return self.discussions[-1]


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def folders(files: Iterable[str]) -> list[str]:
    """All folders of a tree, sorted."""
    parts = (name.split("/")[:-1] for name in files)
    return sorted({"/".join(part[: i + 1]) for part in parts for i in range(len(part))})


def tree_id(files: dict[str, File]) -> str:
    """git's id of the tree that holds `files` (paths with slashes)."""
    entries: dict[str, tuple[bytes, str]] = {}  # by the name that git sorts by: folders end in a slash
    subtrees: dict[str, dict[str, File]] = {}
    for name, file in files.items():
        head, slash, rest = name.partition("/")
        if slash:
            subtrees.setdefault(head, {})[rest] = file
        else:
            entries[name] = b"100644 " + name.encode(), file.blob_id
    for name, subtree in subtrees.items():
        entries[name + "/"] = b"40000 " + name.encode(), tree_id(subtree)
    ordered = (entries[name] for name in sorted(entries, key=str.encode))
    return git_id("tree", b"".join(entry + b"\0" + bytes.fromhex(oid) for entry, oid in ordered))


def is_lfs(name: str, size: int, sample: bytes) -> bool:
    """What the Hub stores beside git: large files, files of the known formats, and everything that is no text."""
    return size > LFS_SIZE or b"\0" in sample or any(fnmatch(name.split("/")[-1], p) for p in LFS_PATTERNS)


def yaml_of(card: bytes) -> dict:
    """The metadata of a card, empty where there are none that can be read."""
    match = re.match(rb"---[ \t]*\r?\n(.*?)\r?\n---", card, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        data = {}
    return data if isinstance(data, dict) else {}


def check_card(content: str, kind: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the metadata of a card, as the Hub words them."""
    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)(\r?\n)?---[ \t]*(\r?\n|$)", content, re.DOTALL)
    if match is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"YAML metadata is invalid: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["YAML metadata must be an object"], []

    errors = []
    for name in ("license", "base_model", "datasets", "tags", "language"):
        values = data.get(name, [])
        values = values if isinstance(values, list) else [values]
        if not all(isinstance(value, str) for value in values):
            errors.append(f'"{name}" must be a string or an array of strings')
        elif name == "license" and not set(values) <= set(LICENSES):
            errors.append(f'"license" must be one of [{", ".join(LICENSES)}]')
        elif name == "base_model" and not all(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value) for value in values):
            errors.append('"base_model" with value does not match the required pattern of a model id on the Hub')
    if not isinstance(data.get("tags", []), list):
        errors.append('"tags" must be an array')
    if not isinstance(data.get("pipeline_tag", ""), str):
        errors.append('"pipeline_tag" must be a string')
    if "model-index" in data:
        errors += check_results(data["model-index"])
    if kind == "space":
        errors += check_space(data)
    warnings = [] if "license" in data or kind == "space" else ["license is missing in the metadata of the repo card"]
    return errors, warnings


def check_space(data: dict[str, Any]) -> list[str]:
    """Errors of the metadata that only a Space has."""
    errors = [] if data.get("sdk") in SDKS else [f'"sdk" must be one of [{", ".join(SDKS)}]']
    for name in ("colorFrom", "colorTo"):
        if data.get(name, "red") not in COLOURS:
            errors.append(f'"{name}" must be one of [{", ".join(COLOURS)}]')
    for name in ("title", "emoji", "app_file", "sdk_version", "python_version", "short_description"):
        if not isinstance(data.get(name, ""), str):
            errors.append(f'"{name}" must be a string')
    if len(str(data.get("short_description", ""))) > 60:
        errors.append('"short_description" length must be less than or equal to 60 characters long')
    models = data.get("models", [])
    if not isinstance(models, list) or not all(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) for name in models):
        errors.append('"models" must be an array of model ids on the Hub')
    return errors


def check_results(index: Any) -> list[str]:
    """Errors of the evaluation results in a card's `model-index`."""
    try:
        for number, model in enumerate(index):
            if not isinstance(model["name"], str):
                return [f'"model-index[{number}].name" must be a string']
            for result in model["results"]:
                named = (result["task"]["type"], result["dataset"]["name"], result["dataset"]["type"])
                metrics = [(metric["type"], metric["value"]) for metric in result["metrics"]]
                if not all(isinstance(word, str) for word in (*named, *(kind for kind, _ in metrics))):
                    return [f'"model-index[{number}].results" must name tasks, datasets and metrics by strings']
    except (KeyError, TypeError) as error:
        return [f'"model-index" lacks a required part: {error}']
    return []
