"""Export: a folder that is exactly what a repository on the Hub holds."""

import copy
import fnmatch
import json
import os
import re
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import safe_open

import diffusers
from diffusers import DiffusionPipeline, ModelMixin, ModularPipeline, ModularPipelineBlocks
from diffusers.utils import logging

from diffusers_ext.cards import write_card
from diffusers_ext.hub.flattening import (
    BLOCKS,
    PIPELINE_FILE,
    Code,
    blocks_code,
    blocks_library,
    component_code,
    our_class,
    pipeline_code,
    plain_config,
    plain_index,
)
from diffusers_ext.hub.safety import (
    INDEX,
    LIBRARIES,
    MODULAR_INDEX,
    PICKLES,
    UnsafeRepositoryError,
    check_folder,
    parse_json,
)
from diffusers_ext.hub.snapshots import weights_key


CONFIG = "config.json"
BLOCKS_CONFIG = "modular_config.json"
CARD = "README.md"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"

# What of a folder no repository holds: what only resuming a training needs, what tells about the machine, what is
# hidden or only cached. `config.json` is left out where it has the options of a training, not those of a model.
UNPUBLISHED = ["checkpoint-*", "abandoned-*", "unfinished-*", "latents/*", "posthoc_ema/*", "logs/*", "wandb/*"]
UNPUBLISHED += ["config.json", ".*", "*/.*", "__pycache__/*", "*/__pycache__/*"]

# What an index says beside its components; other words that begin with "_" are notes of `from_pipe`.
_NOTES = ("_class_name", "_diffusers_version", "_name_or_path", "_ignore_files")
# Where a config says what its model was loaded from.
_ORIGINS = ("_name_or_path", "name_or_path")
_CACHED = re.compile(r"models--(?P<repository>[^/\\]+)[/\\]snapshots[/\\]")

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
    target = Path(folder).resolve()
    _check_target(target, pipe)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".unfinished") as name:
        staging = Path(name) / target.name
        staging.mkdir()
        stage(pipe, staging, self_contained=self_contained, variant=variant, repo_id=repo_id)
        stale = _stale_files(staging, target, variant)
        if (target / CARD).is_file() and not (staging / CARD).exists():
            shutil.copyfile(target / CARD, staging / CARD)
        write_card(staging, repo_id=repo_id)
        _install(staging, target, stale)
    return Path(folder)


def stage(
    pipe: Any, staging: Path, *, self_contained: bool = False, variant: str | None = None, repo_id: str | None = None
) -> None:
    """Write the files of a repository, but for the card of one that is made anew, into an empty folder.

    Args:
        pipe, self_contained, variant, repo_id: as in `export`.
        staging: the folder.
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
    tidy(staging, repo_id)
    if self_contained:
        _add_code(staging)


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
    if name == "config.json":
        return "_class_name" not in read_json(folder / name)
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in UNPUBLISHED)


def carries_code(folder: Path) -> bool:
    """Whether a folder is self-contained, as an export with `self_contained` is."""
    for name, plain in ((INDEX, plain_index), (MODULAR_INDEX, plain_index), (CONFIG, plain_config)):
        if (folder / name).is_file() and not unpublished(folder, name):
            content = read_json(folder / name)
            return plain(content) != content
    return False


def kind_of(folder: Path) -> str | None:
    """What a folder holds: "pipeline", "modular", "model", "adapter", "parts" of a pipeline, or None of these."""
    if (folder / INDEX).is_file():
        return "pipeline"
    if (folder / MODULAR_INDEX).is_file():
        return "modular"
    if (folder / CONFIG).is_file() and "_class_name" in read_json(folder / CONFIG):
        return "model"
    if (folder / LORA_WEIGHTS).is_file():
        return "adapter"
    return "parts" if _parts(folder) else None


def read_json(path: Path) -> dict[str, Any]:
    """Content of an index or config.

    Raises:
        UnsafeRepositoryError: unless it is a JSON object of a size that one has.
    """
    content = parse_json(path, path)
    if not isinstance(content, dict):
        raise UnsafeRepositoryError(f"{path} holds a {type(content).__name__}; a config is a JSON object.")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _parts(folder: Path) -> list[str]:
    """Subfolders that each hold a model."""
    configs = sorted(folder.glob(f"*/{CONFIG}"))
    names = [path.parent.name for path in configs if "_class_name" in read_json(path)]
    return [name for name in names if not unpublished(folder, f"{name}/{CONFIG}")]


def _component_folders(folder: Path) -> list[str]:
    """Subfolders with a component each, "" for a model by itself."""
    kind = kind_of(folder)
    if kind in ("pipeline", "modular"):
        index = read_json(folder / (INDEX if kind == "pipeline" else MODULAR_INDEX))
        names = [name for name, value in index.items() if isinstance(value, list) and name.isidentifier()]
        return [name for name in names if (folder / name).is_dir() and not (folder / name).is_symlink()]
    return [""] if kind == "model" else _parts(folder) if kind == "parts" else []


def _copy_folder(source: Path, staging: Path, variant: str | None) -> None:
    if not source.is_dir():
        raise ValueError(f"`pipe` ({str(source)!r}) is no folder; give that of a pipeline or model, or the object.")
    check_folder(source)
    if kind_of(source) is None:
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
    if kind_of(folder) == "pipeline":
        _tidy_index(folder)
    elif kind_of(folder) == "modular":
        _tidy_modular_index(folder, repo_id)
    for name in _component_folders(folder):
        _check_weights(folder / name)
        path = folder / name / CONFIG
        config = read_json(path) if path.is_file() else {}
        if plain_config(config) != config:
            (folder / name / f"{_code_name(config)}.py").unlink(missing_ok=True)
            _write_json(path, plain_config(config))


def _tidy_index(folder: Path) -> None:
    index = read_json(folder / INDEX)
    plain = {name: value for name, value in plain_index(index).items() if name in _NOTES or not name.startswith("_")}
    if plain["_class_name"] != index["_class_name"]:
        (folder / f"{index['_class_name'][0]}.py").unlink(missing_ok=True)
    for name, value in plain.items():
        if name in _NOTES or not isinstance(value, list) or not isinstance(value[0], str):
            continue
        library, class_name = index[name]
        code = folder / name / f"{library}.py"
        if value != index[name]:
            code.unlink(missing_ok=True)
        elif library not in LIBRARIES and not hasattr(diffusers.pipelines, library) and not code.is_file():
            raise ValueError(
                f"`{name}` is a {class_name} of {library!r}, which nobody could load: the components of a repository "
                f"come from {', '.join(LIBRARIES)}."
            )
    if plain != index:
        _write_json(folder / INDEX, plain)


def _tidy_modular_index(folder: Path, repo_id: str | None) -> None:
    """Let the index take from this repository what is in it; a folder of this machine is no place to take it from."""
    index = read_json(folder / MODULAR_INDEX)
    plain = plain_index(index)
    if blocks_library(index) is not None:
        (folder / f"{blocks_library(index)}.py").unlink(missing_ok=True)
        (folder / BLOCKS_CONFIG).unlink(missing_ok=True)
    index = plain
    for name in _component_folders(folder):
        index[name][2] |= {"pretrained_model_name_or_path": repo_id, "subfolder": name, "revision": None}
    _write_json(folder / MODULAR_INDEX, index)


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


def _code_name(config: dict[str, Any]) -> str:
    return config["auto_map"]["AutoModel"].partition(".")[0]


def _add_code(folder: Path) -> None:
    kind = kind_of(folder)
    if kind == "modular":
        _add_blocks(folder)
    if kind == "pipeline":
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
                index[component] = [_write_code(folder / component, component_code(value[1])), value[1]]
        _write_json(folder / INDEX, index)
        return
    for name in _component_folders(folder):
        path = folder / name / CONFIG
        config = read_json(path) if path.is_file() else {}
        class_name = config.get("_class_name")
        if our_class(class_name) is not None:
            library = _write_code(folder / name, component_code(class_name))
            _write_json(path, config | {"auto_map": {"AutoModel": f"{library}.{class_name}"}})


def _add_blocks(folder: Path) -> None:
    """The blocks of a modular repository, and whose file `AutoModel` finds beside each component of ours."""
    index = read_json(folder / MODULAR_INDEX)
    name = index.get("_blocks_class_name")
    if our_class(name, ModularPipelineBlocks) is None:
        raise ValueError(
            f"`pipe` is made of {name}, which are not blocks of diffusers_ext as they are, so their code cannot be "
            "written. Leave `self_contained` out, or save your blocks with their own `save_pretrained`."
        )
    index["auto_map"] = {BLOCKS: f"{_write_code(folder, blocks_code(name))}.{name}"}
    _write_json(folder / BLOCKS_CONFIG, {"_class_name": name, "auto_map": index["auto_map"]})
    for component in _component_folders(folder):
        library, class_name, spec = index[component]
        if library == "diffusers_ext":
            index[component] = [component_code(class_name).library, class_name, spec | {"type_hint": [None, None]}]
    _write_json(folder / MODULAR_INDEX, index)


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
        known = {key: content[key] for key in _ORIGINS if isinstance(content.get(key), str)}
        shorter = {key: _without_machine(value) for key, value in known.items()}
        if shorter != known:
            _write_json(path, content | shorter)


def _without_machine(origin: str) -> str:
    cached = _CACHED.search(origin)
    if cached is not None:
        return cached["repository"].replace("--", "/")
    is_path = origin.startswith(("/", "~", ".")) or "\\" in origin or ":" in origin or origin.count("/") > 1
    return re.split(r"[/\\]", origin.rstrip("/\\"))[-1] if is_path or Path(origin).exists() else origin


def _check_target(target: Path, pipe: Any) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"`folder` ({str(target)!r}) is a file; give the name of a folder.")
    if isinstance(pipe, str | os.PathLike) and Path(pipe).resolve() in target.parents:
        raise ValueError(f"`folder` ({str(target)!r}) lies inside `pipe` ({str(pipe)!r}); choose one beside it.")
    if not target.is_dir() or kind_of(target) is not None:
        return
    others = sorted(path.name for path in target.iterdir() if not path.name.startswith(".") and path.name != CARD)
    if others:
        raise ValueError(
            f"`folder` ({str(target)!r}) is not empty, and holds no pipeline or model that could be brought up to "
            f"date ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}). Choose another, or empty it."
        )


def _stale_files(staging: Path, target: Path, variant: str | None) -> list[Path]:
    """Files of an earlier export that the new one replaces by none."""
    before, after = kind_of(target) if target.is_dir() else None, kind_of(staging)
    if before is None:
        return []
    if before != after:
        raise ValueError(
            f"`folder` ({str(target)!r}) holds a {before}, and `pipe` is a {after}: a repository holds one of them. "
            "Choose another folder, or empty it."
        )
    stale = _code_files(target)
    for name in {*_component_folders(target), *_component_folders(staging)}:
        same = _architecture(target / name) == _architecture(staging / name)
        for path in (target / name).glob("*"):
            key = weights_key(path.name)
            of_another_variant = key is not None and same and key[2] != variant and "safetensors" in path.name
            if path.is_file() and (key is not None or name) and not of_another_variant:
                stale.append(path)
    return [path for path in stale if not (staging / path.relative_to(target)).exists()]


def _code_files(folder: Path) -> list[Path]:
    """Code at the top of a self-contained repository of ours."""
    if kind_of(folder) == "pipeline":
        index = read_json(folder / INDEX)
        return [folder / f"{PIPELINE_FILE}.py"] if plain_index(index)["_class_name"] != index["_class_name"] else []
    if kind_of(folder) == "modular":
        library = blocks_library(read_json(folder / MODULAR_INDEX))
        return [folder / f"{library}.py", folder / BLOCKS_CONFIG] if library is not None else []
    config = read_json(folder / CONFIG) if kind_of(folder) == "model" else {}
    return [folder / f"{_code_name(config)}.py"] if plain_config(config) != config else []


def _architecture(folder: Path) -> dict[str, Any] | None:
    """What a component's config says about the shapes of its weights; None without a config."""
    if not (folder / CONFIG).is_file():
        return None
    config = plain_config(read_json(folder / CONFIG))
    untold = ("_diffusers_version", "transformers_version", "dtype", "torch_dtype", *_ORIGINS)
    return {key: value for key, value in config.items() if key not in untold}


def _install(staging: Path, target: Path, stale: list[Path]) -> None:
    if not target.exists():
        staging.rename(target)
        return
    # Indexes last: they name what the other files hold.
    files = [path for path in staging.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: (path.suffix == ".json", path)):
        destination = target / path.relative_to(staging)
        destination.parent.mkdir(parents=True, exist_ok=True)
        path.replace(destination)
    for path in stale:
        path.unlink()
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
