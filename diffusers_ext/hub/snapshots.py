"""Snapshots: what of a repository a model needs, complete and checked, in the cache of huggingface_hub."""

import glob
import hashlib
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_cached_repo_tree, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from diffusers.utils import logging

from diffusers_ext.hub import safety
from diffusers_ext.hub.client import TRANSIENT, HubError, list_files, patiently, reason_of
from diffusers_ext.hub.contents import CONFIG, INDEXES, weights_key


logger = logging.get_logger(__name__)


def fetch_snapshot(
    repo_id: str,
    source: str,
    revision: str | None,
    variant: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike | None,
    local_files_only: bool,
    max_bytes: int | None,
) -> tuple[Path, list[str]]:
    """A complete snapshot in the cache, and the names of the files in it that were asked for.

    Arguments and errors are those of `pull`; `source` is what errors call the repository.
    """
    place = {"cache_dir": cache_dir, "token": token}
    if local_files_only or constants.is_offline_mode():
        return _cached_snapshot(repo_id, source, revision, variant, max_bytes, place)
    api = HfApi(token=token)
    try:
        info = patiently(lambda: api.model_info(repo_id, revision=revision, timeout=60), f"reading {source}")
    except HTTPError as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code not in TRANSIENT:
            raise
        try:
            found = _cached_snapshot(repo_id, source, revision, variant, max_bytes, place)
        except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
            raise error from None
        logger.warning("The Hub does not answer (%s); taking %s from the cache.", reason_of(error), source)
        return found
    if info.id != repo_id:
        logger.warning("%s was renamed; the repository is %s now.", repo_id, info.id)
    # By the commit, so that the branch means the earlier snapshot in the cache until this one is complete.
    tree, place["revision"] = list_files(api, repo_id, info.sha), info.sha
    snapshot, wanted = _checked_snapshot(repo_id, source, variant, max_bytes, tree, is_as_promised, place)
    _remember(snapshot, revision or constants.DEFAULT_REVISION, info.sha)
    return snapshot, wanted


def _cached_snapshot(
    repo_id: str,
    source: str,
    revision: str | None,
    variant: str | None,
    max_bytes: int | None,
    place: dict[str, Any],
) -> tuple[Path, list[str]]:
    files = get_cached_repo_tree(repo_id, revision=revision, cache_dir=place["cache_dir"])
    tree = {file.path: file for file in files}
    place = {**place, "revision": revision, "local_files_only": True}
    return _checked_snapshot(repo_id, source, variant, max_bytes, tree, _is_as_stored, place)


def _checked_snapshot(
    repo_id: str,
    source: str,
    variant: str | None,
    max_bytes: int | None,
    tree: dict[str, RepoFile],
    is_right: Callable[[Path, RepoFile], bool],
    place: dict[str, Any],
) -> tuple[Path, list[str]]:
    """Checks what can be checked before a download, downloads, and checks what came.

    Args:
        tree: files of the repository.
        is_right: whether a file has the content that belongs to its entry in `tree`.
        place: arguments of the client's downloads.
    """
    sizes = {name: file.size for name, file in tree.items()}
    safety.wanted_files(sizes, None, source)  # names and sizes are good, before anything is fetched

    def fetch(download: Callable[[], str], doing: str) -> Path:
        try:
            return Path(patiently(download, doing))
        except OSError as error:
            if "Consistency check failed" not in str(error):  # the client's words for a file of another size
                raise
            blobs = Path(
                place["cache_dir"] or constants.HF_HUB_CACHE, f"models--{repo_id.replace('/', '--')}", "blobs"
            )
            for unfinished in blobs.glob("*.incomplete"):
                unfinished.unlink()
            raise HubError(
                f"A file of {source!r} came with another size than the Hub states, and was not kept. Pull again; if "
                "it happens again, the file is damaged there, or something between you and the Hub changes it."
            ) from None

    def read(name: str) -> Any:
        path = fetch(lambda: hf_hub_download(repo_id, name, **place), f"reading {name}")
        _check_files(path.parents[name.count("/")], {name: tree[name]}, source, is_right)
        content = safety.parse_json(path, f"{source}: {name}")
        if name in INDEXES:
            safety.check_index(content, f"{source}: {name}", set(tree))
        else:
            safety.check_config(content, f"{source}: {name}", None if "/" in name else set(tree))
        return content

    index_name = next((name for name in (*INDEXES, CONFIG) if name in tree), None)
    index = None if index_name is None else read(index_name)
    wanted = safety.wanted_files(sizes, index, source)
    if index_name in INDEXES:
        wanted = [name for name in wanted if _is_of_pipeline(name, index)]
    if index_name is None:  # parts of a pipeline: each config names the code of its part
        for name in [name for name in wanted if re.fullmatch(rf"[^/]+/{re.escape(CONFIG)}", name)]:
            wanted += sorted(safety.code_files(read(name), tree, name.rpartition("/")[0]))
    wanted = _of_variant(wanted, variant, source)
    size = sum(sizes[name] or 0 for name in wanted)
    if max_bytes is not None and size > max_bytes:
        raise ValueError(
            f"`max_bytes` is {max_bytes}, but {source!r} has {size} bytes of what a model needs. Nothing was "
            "downloaded; allow more, or take a smaller model."
        )
    patterns = [glob.escape(name) for name in wanted]
    snapshot = fetch(lambda: snapshot_download(repo_id, allow_patterns=patterns, **place), f"downloading {source}")
    _check_files(snapshot, {name: tree[name] for name in wanted}, source, is_right)
    safety.check_folder(snapshot, source)
    return snapshot, wanted


def _is_of_pipeline(name: str, index: dict[str, Any]) -> bool:
    """Whether a file belongs to a pipeline or to an adapter for it. Checkpoints in one file lie beside many; the first
    pipelines of diffusers, such as google/ddpm-cifar10-32, have their only network beside the index."""
    key = weights_key(name)
    return key is None or key[0] in index or key[:2] in (("", "lora_weights"), ("", "diffusion_pytorch_model"))


def _of_variant(names: list[str], variant: str | None, source: str) -> list[str]:
    """Files without the weights of other variants; a component that lacks the variant keeps its plain weights."""
    keys = {name: weights_key(name) for name in names}
    variants = {key[2] for key in keys.values() if key is not None}
    if not variants:
        raise ValueError(f"`repo_id` ({source!r}) is no model: it holds no weights as safetensors.")
    if variant is not None and variant not in variants:
        known = ", ".join(sorted(repr(name) for name in variants - {None}))
        remedy = f"It has {known}." if known else "Leave it out: only plain weights are there."
        raise ValueError(f"`variant` ({variant!r}) is not in {source!r}. {remedy}")
    having = {key[:2] for key in keys.values() if key is not None and key[2] == variant}

    def is_wanted(key: tuple[str, str, str | None] | None) -> bool:
        return key is None or key[2] == (variant if key[:2] in having else None)

    wanted = [name for name, key in keys.items() if is_wanted(key)]
    found = {keys[name][0] for name in wanted if keys[name] is not None}
    lacking = sorted({key[0] for key in keys.values() if key is not None} - found)
    if lacking:
        known = ", ".join(sorted(repr(name) for name in variants - {None}))
        raise ValueError(
            f"`variant` ({variant!r}): {source!r} has weights of {lacking[0] or 'the model'} in the variants {known} "
            "only; name one of them."
        )
    return wanted


def _check_files(
    snapshot: Path, files: dict[str, RepoFile], source: str, is_right: Callable[[Path, RepoFile], bool]
) -> None:
    """Every file is there and is what the Hub promised; one that is not leaves the cache."""
    blobs = snapshot.parents[1] / "blobs"
    wrong = []
    for name, file in files.items():
        path = snapshot / name
        if not path.is_file():
            raise HubError(f"The download of {source!r} is incomplete: {name} is missing. Pull again.")
        if not is_right(path, file):
            blob = path.resolve()
            path.unlink()
            if blob.parent == blobs.resolve():
                blob.unlink(missing_ok=True)
            wrong.append(name)
    if wrong:
        raise HubError(
            f"{', '.join(wrong)} of {source!r} came with another content than the hash that the Hub states, and was "
            "deleted from the cache. Pull again; if it happens again, the file is damaged there, or something between "
            "you and the Hub changes it."
        )


def is_as_promised(path: Path, file: RepoFile) -> bool:
    """Whether a file has the size and hash that the Hub states: SHA-256 of large files, git's SHA-1 of small ones."""
    stated = file.blob_id if file.lfs is None else file.lfs.sha256
    return path.stat().st_size == file.size and _has_hash(path, stated)


def _is_as_stored(path: Path, file: RepoFile) -> bool:
    """The same for a list of files from the cache, which lacks hashes of large files; but those are their names."""
    stored = path.resolve().name
    known = path.is_symlink() and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", stored)
    return path.stat().st_size == file.size and (not known or _has_hash(path, stored))


def _has_hash(path: Path, stated: str) -> bool:
    size = path.stat().st_size
    digest = hashlib.sha256() if len(stated) == 64 else hashlib.sha1(b"blob %d\0" % size)
    with path.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == stated


def _remember(snapshot: Path, revision: str, commit: str) -> None:
    """Let the branch or tag mean this commit in the cache, as huggingface_hub's downloads do at their beginning."""
    if revision != commit:
        ref = snapshot.parents[1] / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        unfinished = ref.with_name(f".{ref.name}.{uuid.uuid4().hex}")
        unfinished.write_text(commit)
        unfinished.replace(ref)
