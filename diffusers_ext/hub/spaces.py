"""Publish the demo as a Space: the app, this package and the models that it shows, as one commit.

A Space runs `app.py` in its root. Beside it lie the other files of `demo/`, the package as a wheel holds it, and
`model_cards/` with the weights, so that nothing but the requirements has to be fetched when it starts.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import CommitInfo
from huggingface_hub.hf_api import RepoFile

import diffusers_ext
from diffusers_ext.hub import safety
from diffusers_ext.hub.client import PushConflictError
from diffusers_ext.hub.contents import CARD, Contents
from diffusers_ext.hub.export import stage
from diffusers_ext.hub.remote import NEW, Target, check_no_tokens, commit_files, file_sha256, read_target
from diffusers_ext.hub.snapshots import is_as_promised


PUSHED = ".pushed.json"  # what `push_space` wrote into a Space: SHA-256 by name; a Space that has it is one of ours
PICTURES = (".png", ".jpg", ".webp", ".gif", ".svg")


def push_space(
    repo_id: str,
    models: Sequence[str | os.PathLike] = (),
    *,
    clone: str | os.PathLike | None = None,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> CommitInfo:
    """Publish the demo as a Gradio Space; makes the Space and the branch where they are missing.

    Files that an earlier push brought and this one does not are deleted in the same commit. Files that people added
    stay, and so do secrets, variables and hardware of the Space. The Space takes the place of nothing else: one that
    holds more than a new one does, and no `.pushed.json` of an earlier push, is refused.

    Args:
        repo_id: `"user/name"` of the Space, or `"name"` of the user whose token it is.
        models: folders of pipelines that stand in the Space beside the shipped ones, each under its own name.
        clone: the repository of diffusers_ext with `demo/` and `model_cards/`; None takes the one that the package is
            imported from, else the current directory.
        private, revision, commit_message, create_pr, token: as in `push`.

    Returns:
        The commit, with `pr_url` for a pull request; the present one where nothing has changed.

    Raises:
        ValueError: for wrong arguments, models that are no pipelines, files with access tokens, a Space of something
            else, and where there is no clone.
        PushConflictError: when somebody pushed meanwhile, or edited in the Space what this push would replace.
        HubError: when the Hub refuses, or does not answer after five attempts.
    """
    root = _find_clone(clone)
    target = read_target(
        repo_id, revision=revision, private=private, create_pr=create_pr, token=token, repo_type="space"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_space(folder, root, models)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        safety.check_file_names(names, "`models`")
        check_no_tokens(folder, names, "the Space")
        hashes = {name: file_sha256(folder / name) for name in names}
        left_over = _check_space(target, folder, hashes)
        (folder / PUSHED).write_text(json.dumps({"files": hashes}, indent=1) + "\n")
        return commit_files(folder, [*names, PUSHED], left_over, target, commit_message or "Push the demo")


def build_space(folder: Path, root: Path, models: Sequence[str | os.PathLike] = ()) -> None:
    """Write what a Space holds into an empty folder.

    Args:
        folder: to write to.
        root: clone of this repository.
        models: folders of further pipelines.
    """
    readme = (root / "demo" / CARD).read_text(encoding="utf-8")
    for name in _visible_files(root / "demo"):
        if not name.endswith(PICTURES) or name in readme:
            _copy(root / "demo" / name, folder / name)
    for source, place in (("diffusers_ext", "diffusers_ext"), ("pipelines", "diffusers_ext/pipelines")):
        for name in _visible_files(root / source):
            if name.endswith((".py", ".yaml", "py.typed")):
                _copy(root / source / name, folder / place / name)
    _copy(root / "LICENSE", folder / "LICENSE")

    shipped = {path.parent for path in sorted((root / "model_cards").glob("*/*.json"))}
    for source in sorted(shipped):
        _add_model(source, folder / "model_cards")
    for model in models:
        source = Path(model).expanduser().resolve()
        if source not in {path.resolve() for path in shipped}:
            _check_model(source, folder / "model_cards")
            _add_model(source, folder / "model_cards")


def _find_clone(clone: str | os.PathLike | None) -> Path:
    places = [Path(diffusers_ext.__file__).parents[1], Path.cwd()] if clone is None else [Path(clone)]
    needed = ("demo/app.py", f"demo/{CARD}", "diffusers_ext/__init__.py", "pipelines/__init__.py", "LICENSE")
    for place in places:
        if all((place / name).is_file() for name in needed) and (place / "model_cards").is_dir():
            return place
    raise ValueError(
        f"`clone` ({', '.join(str(place) for place in places)}) holds no demo/ with model_cards/ beside it: an "
        "installed package comes without them. Run this in a clone of the repository of diffusers_ext."
    )


def _visible_files(folder: Path) -> list[str]:
    """Files of a folder by their path in it, without those that are hidden, cached or links."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sorted(p.as_posix() for p in found if not any(part[0] == "." or part == "__pycache__" for part in p.parts))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _check_model(source: Path, place: Path) -> None:
    if not source.is_dir():
        raise ValueError(f"`models` has {safety.show(str(source))}, which is no folder; give folders of pipelines.")
    if Contents.of(source).kind != "pipeline":
        raise ValueError(
            f"`models` has {safety.show(str(source))}, which has no model_index.json: the demo draws with whole "
            "pipelines, as `save_pretrained`, `convert` and a training write them."
        )
    if not re.fullmatch(r"\w[\w.-]*", source.name, re.ASCII):
        raise ValueError(
            f"`models` has a folder named {safety.show(source.name)}, which becomes the model's name in the demo: "
            "letters, digits, '_', '-' and '.' only. Rename it."
        )
    if (place / source.name).exists():
        raise ValueError(f"`models` has two models named {source.name!r}, or one as a shipped one. Rename it.")


def _add_model(source: Path, place: Path) -> None:
    folder = place / source.name
    folder.mkdir(parents=True)
    stage(source, folder)


def _check_space(target: Target, folder: Path, hashes: dict[str, str]) -> list[str]:
    """Check that a push takes away nobody's work, and return the files of the last push that are gone now.

    Args:
        target: the Space as it is.
        folder: what is pushed.
        hashes: SHA-256 of each file of it.
    """
    former = _former_files(target)
    if former is None:
        foreign = sorted(set(target.files) - NEW)
        if foreign:
            raise ValueError(
                f"`repo_id` ({target.repo_id!r}) is a Space of something else: it holds {_some(foreign)}, but no "
                f"{PUSHED}, which every push of the demo leaves behind. Choose another name, or delete them first."
            )
        return []
    edited = []
    for name in sorted({*former, *hashes} & set(target.files)):
        file = target.files[name]
        if name in hashes and is_as_promised(folder / name, file):
            continue
        if _sha256_of(target, name, file) != former.get(name):
            edited.append(name)
    if edited:
        raise PushConflictError(
            f"{target.repo_id!r}: {_some(edited)} changed in the Space since the last push, and would be overwritten. "
            "Bring the change into your clone, or take it back there, then push again."
        )
    return sorted(name for name in former if name not in hashes and name in target.files)


def _former_files(target: Target) -> dict[str, str] | None:
    """What the last push wrote, as it noted; None where there was none."""
    if PUSHED not in target.files:
        return None
    try:
        files = safety.parse_json(target.read(PUSHED), PUSHED)["files"]
        if all(isinstance(value, str) for value in files.values()):
            return files
    except (safety.UnsafeRepositoryError, LookupError, TypeError, AttributeError):
        pass
    raise ValueError(
        f"`repo_id` ({target.repo_id!r}) has a {PUSHED} that cannot be read, so that it is not known which files an "
        "earlier push wrote. Bring back an earlier version of it there, then push again."
    )


def _sha256_of(target: Target, name: str, file: RepoFile) -> str:
    return file.lfs.sha256 if file.lfs is not None else hashlib.sha256(target.read(name)).hexdigest()


def _some(names: Iterable[str]) -> str:
    first, *rest = names
    return f"{safety.show(first)} and {len(rest)} more" if rest else safety.show(first)
