"""What a folder or a repository holds, and what of a former state a new one leaves over.

All of it follows from the names of files and from what indexes and configs say, so one rule serves a folder that is
exported to again and a repository that is pushed to again.
"""

import fnmatch
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from diffusers.utils import logging

from diffusers_ext.files import write_atomically
from diffusers_ext.hub.flattening import blocks_library, plain_config, plain_index
from diffusers_ext.hub.safety import (
    INDEX,
    MODULAR_INDEX,
    PICKLES,
    VOCABULARIES,
    UnsafeRepositoryError,
    code_files,
    parse_json,
    show,
)


CARD, CONFIG, BLOCKS_CONFIG = "README.md", "config.json", "modular_config.json"
INDEXES = (INDEX, MODULAR_INDEX)
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
KINDS = {
    "pipeline": "a pipeline",
    "modular": "a modular pipeline",
    "model": "a model",
    "adapter": "a LoRA adapter",
    "parts": "parts of a pipeline",
}

# What of a folder no repository holds: what only resuming a training needs, what tells about the machine, what is
# hidden or only cached. `config.json` is left out where it has the options of a training, not those of a model.
UNPUBLISHED = ["checkpoint-*", "abandoned-*", "unfinished-*", "latents/*", "posthoc_ema/*", "logs/*", "wandb/*"]
UNPUBLISHED += [".*", "*/.*", "__pycache__/*", "*/__pycache__/*"]

ORIGINS = ("_name_or_path", "name_or_path")  # where a config says what its model was loaded from
DTYPES = ("dtype", "torch_dtype")  # where a config of transformers says in which precision its weights are loaded
# What of a config says nothing about the shapes of the weights.
_UNTOLD = {"_diffusers_version", "transformers_version", "auto_map", *DTYPES, *ORIGINS}

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Contents:
    """A folder, or a commit of a repository.

    Args:
        names: of the files that a repository holds.
        read: the content of an index or config, by its name.
    """

    names: frozenset[str]
    read: Callable[[str], dict[str, Any]]

    @classmethod
    def of(cls, folder: Path) -> "Contents":
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        return cls(
            frozenset(name for name in files if not unpublished(folder, name)), lambda name: read_json(folder / name)
        )

    @cached_property
    def kind(self) -> str | None:
        """One of `KINDS`, or None of these."""
        if INDEX in self.names:
            return "pipeline"
        if MODULAR_INDEX in self.names:
            return "modular"
        if CONFIG in self.names and "_class_name" in self.read(CONFIG):
            return "model"
        if LORA_WEIGHTS in self.names:
            return "adapter"
        return "parts" if self._parts else None

    @cached_property
    def components(self) -> list[str]:
        """Folders with a component each, "" for a model by itself."""
        if self.kind in ("pipeline", "modular"):
            index = self.read(INDEX if self.kind == "pipeline" else MODULAR_INDEX)
            folders = {name.partition("/")[0] for name in self.names if "/" in name}
            return [name for name, value in index.items() if name in folders and _is_component(name, value)]
        return [""] if self.kind == "model" else self._parts if self.kind == "parts" else []

    @cached_property
    def _parts(self) -> list[str]:
        """Folders that hold a model each."""
        configs = sorted(name for name in self.names if re.fullmatch(rf"[^/]+/{re.escape(CONFIG)}", name))
        return [name.partition("/")[0] for name in configs if "_class_name" in self.read(name)]

    @cached_property
    def code(self) -> set[str]:
        """Files that we wrote for a self-contained repository, as its index and configs name them."""
        found = set()
        configs = [(name, plain_index) for name in INDEXES]
        configs += [(f"{part}/{CONFIG}".lstrip("/"), plain_config) for part in self.components]
        for name, plain in configs if any(name.endswith(".py") for name in self.names) else ():
            if name in self.names:
                folder, content = name.rpartition("/")[0], self.read(name)
                found |= code_files(content, self.names, folder) - code_files(plain(content), self.names, folder)
                if blocks_library(content) is not None:
                    found |= {BLOCKS_CONFIG} & self.names
        return found

    def shapes(self, part: str) -> dict[str, Any] | None:
        """What the config of a component says about the shapes of its weights; None without a config."""
        name = f"{part}/{CONFIG}".lstrip("/")
        if name not in self.names:
            return None
        return {key: value for key, value in self.read(name).items() if key not in _UNTOLD}


def settle(folder: Path, former: Contents, source: str) -> list[str]:
    """Fit a new state, which is in a folder, to the former one that it goes over.

    Where weights of another variant stay beside the new ones, the config that they share names no precision, so that
    each is loaded as it was stored.

    Args:
        folder: the new state.
        former: the state that it goes over.
        source: what the error calls that.

    Returns:
        Files of the former state that the new one replaces by none: our code, weights of the same variant, and those
        of other variants where the network is another one; and of a component that is gone its weights and configs.

    Raises:
        ValueError: when both are not of one kind.
    """
    new = Contents.of(folder)
    if former.kind not in (None, new.kind):
        raise ValueError(
            f"{source} holds {KINDS[former.kind]}, and `pipe` is {KINDS.get(new.kind, 'something else')}: a "
            "repository holds one of them. Choose another place, or delete the files there first."
        )
    weights = {name: key for name in former.names if (key := weights_key(name)) is not None}
    present = {weights_key(name) for name in new.names}
    gone = set(former.components) - set(new.components) if new.kind in ("pipeline", "modular") else set()
    others = {key[0] for key in weights.values() if key not in present} & set(new.components)
    changed = {part for part in others if former.shapes(part) not in (None, new.shapes(part))}

    def is_left_over(name: str) -> bool:
        part, _, file = name.rpartition("/")
        if name in weights:
            return weights[name] in present or part in gone | changed
        return name in former.code or (part in gone and (file.endswith(CONFIG) or file in VOCABULARIES))

    for part in others - changed:
        path = folder / part / CONFIG
        config = read_json(path) if path.is_file() else {}
        if not config.keys().isdisjoint(DTYPES):
            write_json(path, {key: value for key, value in config.items() if key not in DTYPES})
    return sorted(name for name in former.names - new.names if is_left_over(name))


def published_files(folder: Path) -> list[str]:
    """Files of a folder that a repository holds, by their path in it; what is left out is logged."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    published = [name for name in files if not unpublished(folder, name)]
    unsafe = [name for name in published if PurePosixPath(name).suffix.lower() in PICKLES]
    safe = {PurePosixPath(name).parent for name in published if name.endswith(".safetensors")}
    for name in unsafe:
        if weights_key(name) is not None and PurePosixPath(name).parent not in safe:
            raise ValueError(
                f"`pipe` ({str(folder)!r}) has weights in {name!r}, and none in safetensors beside them. Such files "
                "can run code when they are loaded, so none is published: load the model, and save it with "
                "`save_pretrained`."
            )
    left_out = [name for name in files if name not in published] + unsafe
    if left_out:
        logger.info(f"Not published from {folder}: {', '.join(left_out)}.")
    return [name for name in published if name not in unsafe]


def unpublished(folder: Path, name: str) -> bool:
    """Whether a file, given by its path in the folder, is left out of the folder's repository."""
    if name == CONFIG:
        return "_class_name" not in read_json(folder / name)
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in UNPUBLISHED)


def read_json(path: Path) -> dict[str, Any]:
    """Content of an index or config.

    Raises:
        UnsafeRepositoryError: unless it is a JSON object of a size that one has.
    """
    content = parse_json(path, path)
    if not isinstance(content, dict):
        raise UnsafeRepositoryError(f"{path} holds a {type(content).__name__}; a config is a JSON object.")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def weights_key(name: str) -> tuple[str, str, str | None] | None:
    """Component, stem and variant of a file of weights or of an index of shards; None for other files.

    Shards of one model have the same key, and so has `model.safetensors` with the pickle `pytorch_model.bin`.
    """
    part, _, file = name.rpartition("/")
    index = re.fullmatch(r"([^.]+)\.(?:safetensors|bin)\.index(?:\.([^.]+))?\.json", file)
    if index:
        return part, index[1].removeprefix("pytorch_"), index[2]
    shard = r"(?:-\d{5}-of-\d{5})?"
    weights = re.fullmatch(rf"([^.]+?){shard}(?:\.([^.]+?){shard})?\.(?:safetensors|bin|msgpack|h5)", file)
    return None if weights is None else (part, weights[1].removeprefix("pytorch_"), weights[2])


def check_variant(variant: str | None) -> None:
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"[A-Za-z0-9_-]+", variant)):
        raise ValueError(
            f"`variant` ({show(variant)}) must be a word of letters, digits, '_' and '-', such as 'fp16': it becomes "
            "part of the names of files."
        )


def _is_component(name: str, entry: Any) -> bool:
    return name.isidentifier() and isinstance(entry, list) and entry != [None, None]
