"""Models that a user names by a folder or by their name on the Hub, checked before anything of them is loaded."""

import os
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from diffusers_ext.hub.flattening import our_class
from diffusers_ext.hub.safety import INDEX, UnsafeRepositoryError, check_folder, parse_json, redact


def open_folder(
    name_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    argument: str = "model",
) -> Path:
    """The local folder of a model, from the Hub where there is no folder of that name; its contents were checked.

    Args:
        name_or_path: folder, or name of a repository such as `"user/name"`.
        revision: branch, tag or commit of a repository.
        token: for a private one; None takes the one that `hf auth login` stored.
        argument: what the caller calls `name_or_path`, for errors.

    Raises:
        UnsafeRepositoryError: for contents that no model needs and that could do harm; the message says which.
        ValueError: when there is neither such a folder nor such a repository, or the Hub does not give it.
    """
    name = os.fspath(name_or_path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_folder(folder, name)
        return folder
    shown = redact(repr(name))
    if folder.exists():
        raise ValueError(f"`{argument}` ({shown}) is a file; give the folder that it is in.")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name:
        raise ValueError(f"`{argument}` ({shown}) looks like a local folder, but there is none.")
    from diffusers_ext.hub.remote import pull

    try:
        return pull(name, revision=revision, token=token)
    except UnsafeRepositoryError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"`{argument}` ({shown}) must be a folder or a name on the Hub: {error}") from error


def load_pipeline(
    name_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    argument: str = "model",
    **options: Any,
) -> DiffusionPipeline:
    """The pipeline in a folder or a repository, from safetensors. One that carries code of this package gets the
    installed code instead; the code of anything else is not run.

    Args:
        name_or_path, revision, token, argument: as in [`open_folder`].
        options: of `DiffusionPipeline.from_pretrained`.

    Raises:
        ValueError: as [`open_folder`], and when there is no pipeline in it.
    """
    folder = open_folder(name_or_path, revision=revision, token=token, argument=argument)
    if not (folder / INDEX).is_file():
        shown = redact(repr(os.fspath(name_or_path)))
        raise ValueError(f"`{argument}` ({shown}) holds no pipeline: it has no {INDEX}.")
    class_name = parse_json(folder / INDEX, f"{folder}: {INDEX}")["_class_name"]
    pipeline_class = our_class(class_name[1], DiffusionPipeline) if isinstance(class_name, list) else None
    pipeline_class = pipeline_class or DiffusionPipeline
    pipe = pipeline_class.from_pretrained(str(folder), use_safetensors=True, **options)
    pipe.register_to_config(_name_or_path=os.fspath(name_or_path))  # rather than a folder of the cache
    return pipe
