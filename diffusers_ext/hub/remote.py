"""Push to the Hub and pull from it, each as a whole or not at all.

`huggingface_hub` speaks to the server. Added here is what a model needs beyond that: one commit for everything that
changed since a state that was read first, so that nobody's work is overwritten; names and contents checked before and
after a transfer; retries of the requests that the client sends once only; and errors of one sentence with a remedy.
"""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    hf_hub_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import SafetensorsFileMetadata

from diffusers.utils import logging

import diffusers_ext
from diffusers_ext.cards import merge_cards, write_card
from diffusers_ext.cards.blocks import PICTURE
from diffusers_ext.cards.card import decode
from diffusers_ext.cards.document import parse_metadata, plain, split
from diffusers_ext.cards.folder import Weights, sum_up
from diffusers_ext.hub import safety
from diffusers_ext.hub.client import (
    COMMIT,
    HubError,
    PushConflictError,
    check_repo_id,
    check_revision,
    check_token,
    has_token,
    is_transient,
    list_files,
    one_sentence,
    patiently,
    reason_of,
    was_refused,
)
from diffusers_ext.hub.contents import CARD, Contents, check_variant, published_files, settle, weights_key
from diffusers_ext.hub.export import stage
from diffusers_ext.hub.safety import show
from diffusers_ext.hub.snapshots import fetch_snapshot, is_as_promised


logger = logging.get_logger(__name__)

NEW = {".gitattributes", CARD}  # what the Hub puts into a new repository
PULLED = ".pulled.json"  # what `pull` wrote into a folder


def push(
    pipe_or_folder: Any,
    repo_id: str,
    *,
    self_contained: bool = False,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    variant: str | None = None,
    license: str | None = None,
    base_model: str | Sequence[str] | None = None,
) -> CommitInfo:
    """Publish a pipeline or model as one commit; makes the repository and the branch where they are missing.

    Weights, indexes and code that an earlier push of the same components and variant left behind are deleted in the
    same commit. Text that people wrote in the card on the Hub is kept, unless a folder is pushed in whose card people
    wrote as well: that card replaces it.

    Args:
        pipe_or_folder: pipeline, model, modular pipeline, or the folder of one, of a training, or of a LoRA adapter.
        repo_id: `"user/name"`, or `"name"` of the user whose token it is.
        self_contained: carry the code as well, for people without this package; see `export`. A folder that was
            exported with its code is pushed with it in any case.
        private: of a repository that is made now. An existing public one is refused instead of being published to.
        revision: branch; None means main.
        commit_message: first line of the commit.
        create_pr: open a pull request instead of committing to main.
        token: with the right to write; None takes the one that `hf auth login` stored.
        variant: name of these weights, as in `from_pretrained(..., variant="fp16")`; others in the repository stay.
        license: of the weights, for the card, by its Hub identifier such as `apache-2.0`; None: the one that is known.
        base_model: model that this one was made from, for the card; None: the one that is known.

    Returns:
        The commit, with `pr_url` for a pull request; the present one where nothing has changed.

    Raises:
        ValueError: for wrong arguments, for what must not be published: pickles, access tokens in text files, a
            folder that is no model; and where the repository holds another kind, such as a pipeline and not a model.
        PushConflictError: when somebody pushed meanwhile.
        HubError: when the Hub refuses, or does not answer after five attempts.
    """
    check_variant(variant)
    target = read_target(repo_id, revision=revision, private=private, create_pr=create_pr, token=token)
    is_folder = isinstance(pipe_or_folder, (str, os.PathLike))
    name = Path(pipe_or_folder).resolve().name if is_folder else type(pipe_or_folder).__name__
    self_contained = self_contained or (is_folder and bool(Contents.of(Path(pipe_or_folder)).code))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, target.repo_id.rpartition("/")[2])
        folder.mkdir()
        inherited = stage(
            pipe_or_folder, folder, self_contained=self_contained, variant=variant, repo_id=target.repo_id
        )
        _write_card(folder, target, inherited, license=license, base_model=base_model)
        return _upload(folder, target, commit_message or f"Push {name} with diffusers_ext")


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    inherited: dict[str, Any] | None = None,
) -> CommitInfo:
    """Upload a folder that is a repository already, as `export` or `save_pretrained` writes it.

    Arguments and errors are those of `push`; hidden files and what only resuming a training needs stay behind.

    Args:
        inherited: what a card is written with, as [`inherit`] returns it; None leaves the card as it is.
    """
    folder = Path(folder)
    target = read_target(repo_id, revision=revision, private=private, create_pr=create_pr, token=token)
    if inherited is not None:
        _write_card(folder, target, inherited)
    return _upload(folder, target, commit_message or f"Upload {folder.resolve().name} with diffusers_ext")


def create_repository(repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
    """Make a repository of models, if it is not there, and return its full name.

    Args:
        repo_id: `"user/name"`, or `"name"` of the user whose token it is.
        private: of a new one; None or False leave that to the settings of the owner, public unless told otherwise.
        token: with the right to write; None takes the one that `hf auth login` stored.

    Raises:
        ValueError: for a name that the Hub does not allow, and for `private` where the repository is public.
        HubError: when the Hub refuses.
    """
    target = read_target(repo_id, private=private, token=token)
    return target.repo_id if target.head is not None else target.create().repo_id


def pull(
    repo_id: str,
    folder: str | os.PathLike | None = None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    max_bytes: int | None = None,
) -> Path:
    """Download a model: checked before anything is fetched, and compared with the hashes that the Hub states.

    Fetched are configs, tokenizers, cards, safetensors of the variant, and the code files that the index names; never
    pickles. What is in the cache of huggingface_hub is not fetched again. A download that stops in the middle changes
    neither `folder` nor what the branch means in the cache, and continues where it stopped.

    Args:
        repo_id: `"user/name"`.
        folder: written as a whole; new, empty, or pulled earlier and unchanged since, and not the current one. None
            leaves the files in the cache.
        revision: branch, tag, commit or `refs/pr/1`; None means main.
        variant: weights to fetch; components without that variant come in their plain form.
        token: for private repositories; None takes the one that `hf auth login` stored.
        cache_dir: cache; None means huggingface_hub's.
        local_files_only: take what is in the cache, without a request. So does `HF_HUB_OFFLINE=1`.
        max_bytes: refuse a model that is larger, before its weights are fetched. None: take any.

    Returns:
        `folder`, or the snapshot in the cache, which is not to be written to.

    Raises:
        ValueError: for wrong arguments, and for a repository that is no model, or a larger one than `max_bytes`;
            UnsafeRepositoryError, one of them, for one whose names, index or configs are not to be trusted.
        HubError: when the Hub refuses or does not answer, and when a file has another hash than stated.
    """
    check_repo_id(repo_id)
    check_revision(revision)
    check_variant(variant)
    token = check_token(token)
    if folder is not None:
        folder = Path(folder)
        _check_replaceable(folder)
    source = safety.redact(f"{repo_id}@{revision}" if revision else repo_id)
    with one_sentence(repo_id, revision, token):
        snapshot, files = fetch_snapshot(
            repo_id, source, revision, variant, token, cache_dir, local_files_only, max_bytes
        )
    if folder is None:
        return snapshot
    _copy(snapshot, files, folder, repo_id)
    return folder


# Pushing


@dataclass(frozen=True)
class Target:
    """Where to push, and what was there when the push began."""

    repo_id: str  # full name
    branch: str
    head: str | None  # commit that the push builds on; None when there is no repository yet
    has_branch: bool
    files: dict[str, RepoFile]
    private: bool | None
    create_pr: bool
    token: str | bool | None
    repo_type: str = "model"  # or "space"

    @property
    def page(self) -> str:
        """Address on the Hub."""
        return f"{self.api.endpoint}/{'spaces/' if self.repo_type == 'space' else ''}{self.repo_id}"

    @property
    def api(self) -> HfApi:
        return HfApi(token=self.token, library_name="diffusers_ext", library_version=diffusers_ext.__version__)

    def read(self, name: str) -> bytes:
        """A file of the commit that the push builds on."""
        with one_sentence(self.repo_id, self.head, self.token):
            path = patiently(
                lambda: hf_hub_download(
                    self.repo_id, name, repo_type=self.repo_type, revision=self.head, token=self.token
                ),
                f"reading {name}",
            )
        return Path(path).read_bytes()

    def read_json(self, name: str) -> dict[str, Any]:
        """A config of that commit; empty when it is none, for then it only has to be replaced."""
        try:
            content = safety.parse_json(self.read(name), name)
        except safety.UnsafeRepositoryError:
            return {}
        return content if isinstance(content, dict) else {}

    def read_card(self) -> bytes:
        content = self.read(CARD)
        try:
            parse_metadata(split(plain(content.decode("utf-8")))[0])
        except ValueError as error:
            raise ValueError(
                f"`repo_id` ({self.repo_id!r}) has a {CARD} that cannot be brought up to date, since its first lines "
                f"are no YAML ({reason_of(error)}): correct it there, or delete it, then push again."
            ) from None
        return content

    @property
    def contents(self) -> Contents:
        return Contents(frozenset(self.files), self.read_json)

    def create(self) -> "Target":
        """The same with repository and branch made, where they were missing."""
        target = self
        with one_sentence(self.repo_id, self.branch, self.token):
            if self.head is None:
                made = patiently(
                    lambda: self.api.create_repo(
                        self.repo_id,
                        private=self.private or None,
                        repo_type=self.repo_type,
                        space_sdk="gradio" if self.repo_type == "space" else None,
                        exist_ok=True,
                    ),
                    f"creating {self.repo_id}",
                )
                target = read_target(
                    made.repo_id,
                    revision=self.branch,
                    private=self.private,
                    create_pr=self.create_pr,
                    token=self.token,
                    repo_type=self.repo_type,
                )
                if target.head is None or set(target.files) - NEW:
                    raise PushConflictError(
                        f"{self.repo_id!r} was not there when this push began; somebody made it meanwhile. Nothing "
                        "of yours was uploaded; look at what it holds, then push again."
                    )
            if not target.has_branch:
                patiently(
                    lambda: self.api.create_branch(
                        target.repo_id,
                        branch=target.branch,
                        revision=target.head,
                        repo_type=target.repo_type,
                        exist_ok=True,
                    ),
                    f"creating the branch {target.branch}",
                )
        return target


def read_target(
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    repo_type: str = "model",
) -> Target:
    """Check the arguments of a push, and read what the repository holds."""
    check_repo_id(repo_id)
    check_revision(revision)
    branch = revision or constants.DEFAULT_REVISION
    if COMMIT.fullmatch(branch):
        raise ValueError(f"`revision` ({revision!r}) is a commit; pushes go to a branch. Name one, or leave it out.")
    if create_pr and branch != constants.DEFAULT_REVISION:
        raise ValueError(
            f"`create_pr` opens a pull request to main, so `revision` ({revision!r}) must be left out; to add to an "
            "open pull request, push to its `revision`, such as 'refs/pr/1', without `create_pr`."
        )
    token = check_token(token)
    if not has_token(token):
        raise HubError(
            f"`repo_id` ({repo_id!r}) cannot be pushed to without an access token: log in with `hf auth login`, set "
            "HF_TOKEN, or pass `token`; it needs the right to write (https://huggingface.co/settings/tokens)."
        )
    api = HfApi(token=token)
    with one_sentence(repo_id, revision, token):
        if "/" not in repo_id:
            repo_id = f"{patiently(api.whoami, 'asking whose token it is')['name']}/{repo_id}"
            check_repo_id(repo_id)
        target = Target(repo_id, branch, None, False, {}, private, create_pr, token, repo_type)
        try:
            info = patiently(lambda: api.repo_info(repo_id, repo_type=repo_type, timeout=60), f"reading {repo_id}")
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return target
        if info.id != repo_id:
            raise HubError(
                f"`repo_id` ({show(repo_id)}) was renamed; the repository is {show(info.id)} now. Push to that "
                "name, if it is the one you mean."
            )
        if private and not info.private:
            raise ValueError(
                f"`private` is set, but {repo_id!r} exists and is public, so a push would publish the {repo_type}. "
                f"Make it private first ({target.page}/settings), or choose another name."
            )
        has_branch = True
        if branch != constants.DEFAULT_REVISION:
            try:
                info = patiently(
                    lambda: api.repo_info(repo_id, repo_type=repo_type, revision=branch, timeout=60),
                    f"reading {branch}",
                )
            except RevisionNotFoundError:
                if branch.startswith("refs/"):
                    raise
                has_branch = False
        files = list_files(api, repo_id, info.sha, repo_type)
        return replace(target, head=info.sha, has_branch=has_branch, files=files)


def _write_card(folder: Path, target: Target, inherited: dict[str, Any], **given: Any) -> None:
    """Write the card of what is pushed, on the ground of the one that the repository has.

    Args:
        given: metadata, as `write_card` takes it.
    """
    card = folder / CARD
    if CARD in target.files:
        local = decode(card.read_bytes(), CARD) if card.is_file() else ""
        card.write_bytes(merge_cards(local, target.read_card().decode("utf-8")).encode("utf-8"))
        if PICTURE in target.files and not (folder / PICTURE).exists():
            (folder / PICTURE).write_bytes(target.read(PICTURE))
    beside = _weights_beside(folder, target)
    write_card(folder, repo_id=target.repo_id, inherited=inherited, beside=beside, **given)
    if ModelCard.load(card).data.get("license") is None:
        logger.warning(
            f"The card of {target.repo_id} names no licence of the weights, so nobody may use them. Push with "
            "`license`, such as apache-2.0 or cc-by-nc-4.0, to say what people may do."
        )


def _weights_beside(folder: Path, target: Target) -> dict[str, dict[str, Weights]]:
    """Weights that a push leaves in the repository, by component and variant."""
    new, former = Contents.of(folder), target.contents
    stale = settle(folder, former, f"`repo_id` ({target.repo_id!r})")
    files: dict[tuple[str, str], list[str]] = {}
    for name in sorted(former.names - new.names - {*stale}):
        key = weights_key(name)
        if key is not None and name.endswith(".safetensors") and key[0] in new.components:
            files.setdefault((key[0], key[2] or ""), []).append(name)
    found: dict[str, dict[str, Weights]] = {}
    for (part, variant), names in files.items():
        tensors: list[tuple[list[int], str]] = []
        for name in names:
            with one_sentence(target.repo_id, target.head, target.token):
                told = patiently(partial(_read_header, target, name), f"reading {name}")
            tensors += [(tensor.shape, tensor.dtype) for tensor in told.tensors.values()]
        size = sum(target.files[name].size for name in names)
        found.setdefault(part, {})[variant] = sum_up(tensors, size)
    return found


def _read_header(target: Target, name: str) -> SafetensorsFileMetadata:
    return target.api.parse_safetensors_file_metadata(target.repo_id, name, revision=target.head)


def _upload(folder: Path, target: Target, message: str) -> CommitInfo:
    """Commit the model of a folder on top of the state that the push builds on."""
    names = _checked_files(folder)
    left_over = settle(folder, target.contents, f"`repo_id` ({target.repo_id!r})")
    return commit_files(folder, names, left_over, target, message)


def commit_files(folder: Path, names: list[str], left_over: list[str], target: Target, message: str) -> CommitInfo:
    """Make one commit on top of the state that the push builds on, in a repository that is made where it is missing.

    Args:
        folder: where the files are.
        names: of the files in it that are uploaded.
        left_over: files of the repository that are deleted.
    """
    if safety.find_tokens(message):
        raise ValueError("`commit_message` holds an access token, which everybody could read. Write another.")
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, folder / name) for name in names
    ]
    operations += [CommitOperationDelete(name, is_folder=False) for name in left_over]
    target = target.create()
    if left_over:
        logger.info("Deleting what an earlier push left in %s: %s.", target.repo_id, ", ".join(left_over))
    api = target.api
    with one_sentence(target.repo_id, target.branch, target.token):
        additions = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
        # Large files first, by themselves: the client tries each of these requests up to six times.
        api.preupload_lfs_files(
            target.repo_id,
            additions,
            repo_type=target.repo_type,
            revision=target.branch,
            create_pr=target.create_pr,
            free_memory=False,
        )
        info = _commit(api, target, operations, folder, names, message)
        missing = sorted(set(names) - list_files(api, target.repo_id, info.oid, target.repo_type).keys())
    if missing and not (target.create_pr and info.pr_url is None):
        raise HubError(
            f"{target.repo_id!r} took the push without {', '.join(missing)}: a .gitignore in the repository leaves "
            "such files out. Delete it there, and push again."
        )
    return info


def _commit(
    api: HfApi,
    target: Target,
    operations: list[CommitOperationAdd | CommitOperationDelete],
    folder: Path,
    names: list[str],
    message: str,
) -> CommitInfo:
    """One commit on top of the state that was read. A lost answer is no reason to commit twice."""
    attempts = 0

    def send() -> CommitInfo:
        nonlocal attempts
        attempts += 1
        try:
            with warnings.catch_warnings():
                # That a licence is missing, push has said by itself.
                warnings.filterwarnings("ignore", message="Warnings while validating metadata")
                return api.create_commit(
                    target.repo_id,
                    operations,
                    commit_message=message,
                    repo_type=target.repo_type,
                    revision=target.branch,
                    create_pr=target.create_pr,
                    parent_commit=target.head,
                )
        except HfHubHTTPError as error:
            if error.response.status_code not in (409, 412):
                raise
            history = patiently(
                lambda: api.list_repo_commits(target.repo_id, repo_type=target.repo_type, revision=target.branch),
                f"reading {target.repo_id}",
            )
            commits = [commit.commit_id for commit in history]
            if commits[0] == target.head:  # nobody pushed; the Hub was at work on something else
                raise
            if attempts > 1 and target.head in commits:  # an answer may have got lost: is the next commit this one?
                commit = commits[commits.index(target.head) - 1]
                tree = list_files(api, target.repo_id, commit, target.repo_type)
                deleted = {operation.path_in_repo for operation in operations} - set(names)
                if not deleted & tree.keys() and all(
                    name in tree and is_as_promised(folder / name, tree[name]) for name in names
                ):
                    return CommitInfo(f"{target.page}/commit/{commit}", message, "", commit)
            lost = attempts > 1 and target.head not in commits  # somebody has rewritten the history
            done = "It is not known whether yours was uploaded" if lost else "Nothing of yours was uploaded"
            raise PushConflictError(
                f"{target.repo_id!r} has changed since this push began: somebody pushed to {target.branch!r} "
                f"meanwhile ({target.head:.8} became {commits[0]:.8}). {done} to that branch; look at the change, "
                "then push again."
            ) from error

    try:
        # A request for a pull request that may have been carried out is not repeated: it might open a second one.
        again = was_refused if target.create_pr else lambda error: was_refused(error) or is_transient(error)
        return patiently(send, f"committing to {target.repo_id}", again)
    except HTTPError as error:
        if target.create_pr and is_transient(error) and not was_refused(error):
            raise HubError(
                f"{target.repo_id!r}: the answer of the Hub got lost ({reason_of(error)}), so the pull request may be "
                f"open or not. Look at {target.page}/discussions before you push again."
            ) from error
        raise


def _checked_files(folder: Path) -> list[str]:
    """Names of the files that an upload takes.

    Raises:
        ValueError: for a folder that is no model, for pickles, and for text with an access token.
    """
    names = published_files(folder)
    safety.check_file_names(names, folder)
    if not any(name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"`pipe_or_folder` ({str(folder)!r}) is no model: it must hold weights as safetensors, as "
            "`save_pretrained`, `export` and a training write them."
        )
    check_no_tokens(folder, names, "`pipe_or_folder`")
    return names


def check_no_tokens(folder: Path, names: Iterable[str], what: str) -> None:
    """Refuse files with an access token in them; the error says of what they are."""
    for name in names:
        if name.endswith(".safetensors"):
            continue
        if safety.find_tokens((folder / name).read_text(encoding="utf-8", errors="ignore")):
            raise ValueError(
                f"{what}: {name} holds an access token, which everybody who may read the repository could "
                "use. Remove it from the file; if the file was shared before, revoke the token "
                "(https://huggingface.co/settings/tokens)."
            )


# Folders of pull


def _check_replaceable(folder: Path) -> None:
    """A folder that `pull` may put another one in the place of: new, empty, or exactly what an earlier pull wrote."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"`folder` ({str(folder)!r}) is a file; name a folder that is new, empty, or pulled earlier.")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ValueError(
            f"`folder` ({str(folder)!r}) is the current directory or above it, and would be replaced by another one. "
            "Name a folder inside of it, or change to its parent first."
        )
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {PULLED}
    if not present and not (folder / PULLED).exists():
        return
    reason = "was not written by `pull`"
    written = _pulled_files(folder / PULLED)
    if written is not None:
        changed = [name for name in sorted(present) if file_sha256(folder / name) != written.get(name)]
        if not changed:
            return
        reason = f"holds {changed[0]}, which is not as the earlier pull left it"
    raise ValueError(
        f"`folder` ({str(folder)!r}) {reason}, and would be overwritten. Move it away, or pull into another folder."
    )


def _pulled_files(record: Path) -> dict[str, str] | None:
    """Files that an earlier pull wrote, with their hashes; None where it is not known."""
    try:
        written = json.loads(record.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return written if isinstance(written, dict) else None


def _copy(snapshot: Path, files: Iterable[str], folder: Path, repo_id: str) -> None:
    """Write a folder from a snapshot: beside it first, then in its place."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        new.mkdir()
        written = {}
        for name in files:
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(snapshot / name, path)
            written[name] = file_sha256(path)
        record = {"repo_id": repo_id, "commit": snapshot.name, "files": written}
        (new / PULLED).write_text(json.dumps(record, indent=2) + "\n")
        if folder.exists():
            folder.replace(old)
        try:
            new.replace(folder)
        except OSError:
            if old.exists():
                old.replace(folder)
            raise


def file_sha256(path: Path) -> str:
    """SHA-256 of a file of any size, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
