"""Export: a folder that is exactly what a repository on the Hub holds."""

import copy
import json
import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import safe_open

import diffusers
from diffusers import DiffusionPipeline, ModelMixin, ModularPipeline, ModularPipelineBlocks
from diffusers.utils import logging

from diffusers_ext.cards import inherit, write_card
from diffusers_ext.cards.blocks import PICTURE
from diffusers_ext.cards.folder import Weights, read_weights
from diffusers_ext.cards.inheritance import CACHED
from diffusers_ext.hub.contents import (
    BLOCKS_CONFIG,
    CARD,
    CONFIG,
    LORA_WEIGHTS,
    ORIGINS,
    Contents,
    check_variant,
    published_files,
    read_json,
    settle,
    unpublished,
    weights_key,
    write_json,
)
from diffusers_ext.hub.flattening import (
    BLOCKS,
    Code,
    blocks_code,
    component_code,
    our_class,
    pipeline_code,
    plain_config,
    plain_index,
)
from diffusers_ext.hub.safety import INDEX, LIBRARIES, MODULAR_INDEX, check_folder


# What an index says beside its components; other words that begin with "_" are notes of `from_pipe`.
_NOTES = ("_class_name", "_diffusers_version", "_name_or_path", "_ignore_files")

logger = logging.get_logger(__name__)


def export(
    pipe: Any,
    folder: str | os.PathLike,
    *,
    self_contained: bool = False,
    variant: str | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write a pipeline or model into a folder that is exactly what its repository on the Hub would hold.

    The weights are safetensors. A folder that an earlier export wrote is brought up to date: weights of other
    variants of the same model stay beside the new ones, and so does what people wrote in its README.md; shards,
    indexes and code that the new export does not have go. An export that fails changes nothing.

    Args:
        pipe: `DiffusionPipeline`, `ModularPipeline`, model of diffusers or of this package, or the folder of a
            pipeline, model, LoRA adapter or training, whose publishable files are copied, their weights byte for byte.
        folder: to write; made where it is missing.
        self_contained: adds `pipeline.py` and one file of code per component of this package, so that
            `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` works where it is not installed.
        variant: part of the names of the weights, such as "fp16" for weights saved in half precision. Of a folder,
            only weights of this variant are copied.
        repo_id: name of the repository on the Hub, which the card's examples then load from.

    Returns:
        `folder`.

    Raises:
        ValueError: for what cannot be saved so that others can load it, and for a folder that holds something else.
    """
    check_variant(variant)
    target = Path(folder).resolve()
    _check_target(target, pipe)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".unfinished") as name:
        staging = Path(name) / target.name
        staging.mkdir()
        inherited = stage(pipe, staging, self_contained=self_contained, variant=variant, repo_id=repo_id)
        stale = settle(staging, Contents.of(target), f"`folder` ({str(target)!r})") if target.is_dir() else []
        if (target / CARD).is_file() and not (staging / CARD).exists():
            for name in (CARD, PICTURE):
                if (target / name).is_file() and not (staging / name).exists():
                    shutil.copyfile(target / name, staging / name)
        write_card(staging, repo_id=repo_id, inherited=inherited, beside=_weights_beside(staging, target, stale))
        _install(staging, target, stale)
    return Path(folder)


def stage(
    pipe: Any, staging: Path, *, self_contained: bool = False, variant: str | None = None, repo_id: str | None = None
) -> dict[str, Any]:
    """Write the files of a repository, but for the card of one that is made anew, into an empty folder.

    Args:
        pipe, self_contained, variant, repo_id: as in `export`.
        staging: the folder.

    Returns:
        What `inherit` finds out about the model before the paths of this machine are taken away.
    """
    if isinstance(pipe, str | os.PathLike):
        _copy_folder(Path(pipe), staging, variant)
    elif isinstance(pipe, DiffusionPipeline | ModelMixin):
        pipe.save_pretrained(staging, safe_serialization=True, variant=variant)
    elif isinstance(pipe, ModularPipeline):
        before = copy.deepcopy(dict(pipe.config))
        pipe.save_pretrained(str(staging), safe_serialization=True, variant=variant, overwrite_modular_index=True)
        pipe.register_to_config(**before)  # which has this folder as the origin of the components now
    else:
        raise ValueError(
            f"`pipe` is {type(pipe).__name__}; it must be a pipeline, a model of diffusers or diffusers_ext, or the "
            "folder of one."
        )
    # The configs of a folder may be somebody else's, and name any folder of this machine.
    inherited = {} if isinstance(pipe, str | os.PathLike) else inherit(staging)
    tidy(staging, repo_id)
    if self_contained:
        _add_code(staging)
    return inherited


def _weights_beside(staging: Path, target: Path, stale: list[str]) -> dict[str, dict[str, Weights]]:
    """Weights that stay in the target, by component and variant."""
    gone = {(key[0], key[2] or "") for name in stale if (key := weights_key(name)) is not None}
    parts = [part for part in Contents.of(staging).components if (target / part).is_dir()]
    return {
        part: {variant: told for variant, told in read_weights(target / part).items() if (part, variant) not in gone}
        for part in parts
    }


def _copy_folder(source: Path, staging: Path, variant: str | None) -> None:
    if not source.is_dir():
        raise ValueError(f"`pipe` ({str(source)!r}) is no folder; give that of a pipeline or model, or the object.")
    check_folder(source)
    if Contents.of(source).kind is None:
        raise ValueError(
            f"`pipe` ({str(source)!r}) holds no pipeline, model or LoRA adapter: it has neither {INDEX} nor "
            f"{MODULAR_INDEX}, no {CONFIG} of a model, and no {LORA_WEIGHTS}."
        )
    names = published_files(source)
    if variant is not None:
        weights = {name: key[2] for name in names if (key := weights_key(name)) is not None}
        if variant not in weights.values():
            known = sorted({value for value in weights.values() if value is not None})
            raise ValueError(
                f"`variant` is {variant!r}, but `pipe` ({str(source)!r}) has "
                + (f"weights of {', '.join(known)} only." if known else "no weights of any variant.")
            )
        folders = {PurePosixPath(name).parent for name, value in weights.items() if value == variant}
        names = [
            name
            for name in names
            if weights.get(name, variant) == variant or PurePosixPath(name).parent not in folders
        ]
    for name in names:
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, staging / name)


def tidy(folder: Path, repo_id: str | None = None) -> None:
    """Make what diffusers saved fit to be published, without paths of this machine, notes of `from_pipe`, and code.

    Args:
        folder: of a pipeline, model, adapter or training.
        repo_id: where the components of a modular pipeline will be found. None: beside its index.

    Raises:
        ValueError: for components that nobody could load.
    """
    forget_folders(folder)
    contents = Contents.of(folder)
    for name in contents.code:
        (folder / name).unlink()
    if contents.kind == "pipeline":
        _tidy_index(folder)
    elif contents.kind == "modular":
        _tidy_modular_index(folder, contents.components, repo_id)
    for name in contents.components:
        _check_weights(folder / name)
        path = folder / name / CONFIG
        config = read_json(path) if path.is_file() else {}
        if plain_config(config) != config:
            write_json(path, plain_config(config))


def _tidy_index(folder: Path) -> None:
    index = read_json(folder / INDEX)
    plain = {name: value for name, value in plain_index(index).items() if name in _NOTES or not name.startswith("_")}
    if isinstance(plain["_class_name"], str) and not hasattr(diffusers, plain["_class_name"]):
        logger.warning(
            "%s is a class of neither diffusers nor diffusers_ext: only who has it can load this pipeline.",
            plain["_class_name"],
        )
    for name, value in plain.items():
        if name in _NOTES or not isinstance(value, list) or not isinstance(value[0], str):
            continue
        library, class_name = value
        code = folder / name / f"{library}.py"
        if library not in LIBRARIES and not hasattr(diffusers.pipelines, library) and not code.is_file():
            raise ValueError(
                f"`{name}` is a {class_name} of {library!r}, which nobody could load: the components of a repository "
                f"come from {', '.join(LIBRARIES)}."
            )
    if plain != index:
        write_json(folder / INDEX, plain)


def _tidy_modular_index(folder: Path, components: list[str], repo_id: str | None) -> None:
    """Let the index take from this repository what is in it; a folder of this machine is no place to take it from."""
    index = plain_index(read_json(folder / MODULAR_INDEX))
    for name in components:
        index[name][2] |= {"pretrained_model_name_or_path": repo_id, "subfolder": name, "revision": None}
    write_json(folder / MODULAR_INDEX, index)


def _check_weights(folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            inside = [name for name in weights.keys() if ".base_layer." in name]
        if inside:
            raise ValueError(
                f"`{folder.name}` was saved with a LoRA adapter inside ({inside[0]!r} in {path.name}), under names "
                "that nothing loads. Make the adapter part of the weights with `fuse_lora()` and `unload_lora()`, or "
                "save it by itself with `save_lora_adapter(folder)`, and publish that folder."
            )


def _add_code(folder: Path) -> None:
    contents = Contents.of(folder)
    if contents.kind == "adapter":
        raise ValueError(
            "`self_contained` is set, but a LoRA adapter is loaded into a network, and has no code to carry. Leave it "
            "out."
        )
    if contents.kind == "modular":
        _add_blocks(folder, contents.components)
    if contents.kind == "pipeline":
        index = read_json(folder / INDEX)
        name = index["_class_name"]
        if our_class(name, DiffusionPipeline) is not None:
            index["_class_name"] = [_write_code(folder, pipeline_code(name)), name]
        elif isinstance(name, str) and not hasattr(diffusers, name):
            raise ValueError(
                f"`pipe` is a {name}, which is in neither diffusers nor diffusers_ext, so its code cannot be written. "
                "Leave `self_contained` out, or use the class that it inherits from."
            )
        for component, value in index.items():
            if isinstance(value, list) and value[0] == "diffusers_ext":
                index[component] = [_write_code(folder / component, component_code(value[1], component)), value[1]]
        write_json(folder / INDEX, index)
        return
    for name in contents.components:
        path = folder / name / CONFIG
        config = read_json(path) if path.is_file() else {}
        class_name = config.get("_class_name")
        if our_class(class_name) is not None:
            library = _write_code(folder / name, component_code(class_name, name))
            write_json(path, config | {"auto_map": {"AutoModel": f"{library}.{class_name}"}})


def _add_blocks(folder: Path, components: list[str]) -> None:
    """The blocks of a modular repository, and whose file `AutoModel` finds beside each component of ours."""
    index = read_json(folder / MODULAR_INDEX)
    name = index.get("_blocks_class_name")
    if our_class(name, ModularPipelineBlocks) is None:
        raise ValueError(
            f"`pipe` is made of {name}, which are not blocks of diffusers_ext as they are, so their code cannot be "
            "written. Leave `self_contained` out, or save your blocks with their own `save_pretrained`."
        )
    index["auto_map"] = {BLOCKS: f"{_write_code(folder, blocks_code(name))}.{name}"}
    write_json(folder / BLOCKS_CONFIG, {"_class_name": name, "auto_map": index["auto_map"]})
    for component in components:
        library, class_name, spec = index[component]
        if library == "diffusers_ext":
            code = component_code(class_name, component)
            index[component] = [code.library, class_name, spec | {"type_hint": [None, None]}]
    write_json(folder / MODULAR_INDEX, index)


def _write_code(folder: Path, code: Code) -> str:
    (folder / code.file_name).write_text(code.text, encoding="utf-8")
    return code.library


def forget_folders(folder: Path) -> None:
    """Take the machine's paths from the configs of a saved pipeline or model.

    Of the folder that a component was loaded from its last name stays, or the name of the repository, where that
    folder is in the cache of the Hub.
    """
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        if unpublished(folder, path.relative_to(folder).as_posix()) or weights_key(path.name):
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            continue
        known = {key: content[key] for key in ORIGINS if isinstance(content.get(key), str)}
        shorter = {key: _without_machine(value) for key, value in known.items()}
        if shorter != known:
            write_json(path, content | shorter)


def _without_machine(origin: str) -> str:
    cached = CACHED.search(origin)
    if cached is not None:
        return cached["repository"].replace("--", "/")
    is_path = origin.startswith(("/", "~", ".")) or "\\" in origin or ":" in origin or origin.count("/") > 1
    return re.split(r"[/\\]", origin.rstrip("/\\"))[-1] if is_path or Path(origin).exists() else origin


def _check_target(target: Path, pipe: Any) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"`folder` ({str(target)!r}) is a file; give the name of a folder.")
    if isinstance(pipe, str | os.PathLike) and Path(pipe).resolve() in target.parents:
        raise ValueError(f"`folder` ({str(target)!r}) lies inside `pipe` ({str(pipe)!r}); choose one beside it.")
    if not target.is_dir() or Contents.of(target).kind is not None:
        return
    others = sorted(path.name for path in target.iterdir() if not path.name.startswith(".") and path.name != CARD)
    if others:
        raise ValueError(
            f"`folder` ({str(target)!r}) is not empty, and holds no pipeline or model that could be brought up to "
            f"date ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}). Choose another, or empty it."
        )


def _install(staging: Path, target: Path, stale: list[str]) -> None:
    """Put the staged files in the place of the former ones, all of them or none.

    Args:
        staging: folder beside the target.
        target: folder; made where it is missing.
        stale: files in it that go.
    """
    if not target.exists():
        staging.rename(target)
        return
    files = [path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()]
    # Indexes go first and come last: they name what the other files hold.
    files.sort(key=lambda name: (name.endswith(".json"), name), reverse=True)
    former = Path(tempfile.mkdtemp(dir=staging.parent))
    moves = [(target / name, former / name) for name in [*files, *stale] if (target / name).exists()]
    moves += [(staging / name, target / name) for name in reversed(files)]
    done, made = [], []
    try:
        for source, destination in moves:
            made += [folder for folder in reversed(destination.parents) if not folder.exists()]
            destination.parent.mkdir(parents=True, exist_ok=True)
            source.replace(destination)
            done.append((source, destination))
    except BaseException:
        for source, destination in reversed(done):
            destination.replace(source)
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()
        raise
    for folder in {(target / name).parent for name in stale}:
        if not any(folder.iterdir()):
            folder.rmdir()
