"""Networks by name: presets, folders and Hub ids, on the meta device."""

import contextlib
import difflib
import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import diffusers
from diffusers import ModelMixin

import diffusers_ext
from diffusers_ext.hub.safety import INDEX, MODULAR_INDEX, check_config, parse_json


INDEXES = (INDEX, MODULAR_INDEX)
LONE_NETWORK = "classifier"  # the folder in which `train classifier` leaves it, without a pipeline


@dataclass(frozen=True)
class Source:
    """Where a network comes from: its class and config, and a folder with weights if there is one."""

    name: str
    model_class: type[ModelMixin]
    config: dict[str, Any] = field(repr=False)
    folder: Path | None = None


def named_sources() -> dict[str, tuple[type[ModelMixin], dict[str, Any]] | None]:
    """All presets: class and config of named sizes; None for released checkpoints, whose config has to be derived.

    A named size goes by its name alone as well where that means one thing only: "film" for "composable/film".
    """
    from diffusers_ext.conversion import presets
    from diffusers_ext.models import PRESETS

    short = {name: name.partition("/")[2] for name in PRESETS}
    counts = Counter(short.values())
    unique = {short[name]: size for name, size in PRESETS.items() if counts[short[name]] == 1}
    return {**unique, **dict.fromkeys(presets), **PRESETS}


def find_sources(model: str) -> list[Source]:
    """Networks that a word of the command line names; see [`inspect_models`] for the words and errors."""
    sources = []
    for part in split(model):
        if part in named_sources():
            sources.append(_preset_source(part))
        elif os.path.exists(part):
            sources += _folder_sources(Path(part), part)
        else:
            sources += _hub_sources(part)
    return sources


def split(model: str) -> list[str]:
    """The names on both sides of a `+`."""
    if os.path.exists(model) or "+" not in model:
        return [model]
    parts = model.split("+")
    if not all(parts):
        raise ValueError(f"`models` has {model!r}: a `+` stands between the names of two networks.")
    return parts


def _preset_source(name: str) -> Source:
    from diffusers_ext.conversion.original import complete_flags, empty_model, presets

    known = named_sources()[name]
    if known is None:
        architecture = presets[name].architecture
        model = empty_model(architecture, complete_flags(architecture, name, None))
        return Source(name, type(model), {key: model.config[key] for key in model.config if key[0] != "_"})
    return Source(name, *known)


def _folder_sources(folder: Path, name: str) -> list[Source]:
    for index_name in INDEXES:
        if (folder / index_name).is_file():
            index = _read_json(folder / index_name)
            parts = [part for part in index if _is_network(index[part]) and (folder / part / "config.json").is_file()]
            if not parts:
                raise ValueError(f"`models` has {name!r}, a pipeline without networks of diffusers.")
            return _parts(folder, name, parts)
    if (folder / LONE_NETWORK / "config.json").is_file():
        return _parts(folder, name, [LONE_NETWORK])
    if (folder / "config.json").is_file():
        return [replace(_config_source(name, _read_json(folder / "config.json")), folder=folder)]
    raise ValueError(
        f"`models` has {name!r}, which holds neither a model (config.json) nor a pipeline ({' or '.join(INDEXES)})."
    )


def _parts(folder: Path, name: str, parts: list[str]) -> list[Source]:
    sources = [_config_source(f"{name}/{part}", _read_json(folder / part / "config.json")) for part in parts]
    return [replace(source, folder=folder / part) for source, part in zip(sources, parts)]


def _is_network(entry: Any) -> bool:
    """Whether an entry of model_index.json names a class of ours or of diffusers'."""
    return isinstance(entry, list) and len(entry) in (2, 3) and _model_class(entry[1]) is not None


def _model_class(name: Any) -> type[ModelMixin] | None:
    """A class of models by its name in diffusers or in this package; nothing else can be reached by it."""
    if not isinstance(name, str) or not name.isidentifier():
        return None
    for library in (diffusers_ext, diffusers):
        found = getattr(library, name, None)
        if isinstance(found, type) and issubclass(found, ModelMixin) and found is not ModelMixin:
            if found.__module__.partition(".")[0] in ("diffusers", "diffusers_ext"):
                return found
    return None


def _config_source(name: str, config: dict[str, Any]) -> Source:
    class_name = config.get("_class_name") if isinstance(config, dict) else None
    model_class = _model_class(class_name)
    if model_class is None:
        raise ValueError(
            f"`models` has {name!r}, whose config names {class_name!r}: only models of diffusers and of diffusers_ext "
            "are inspected, and no code of others is run."
        )
    check_config(config, f"`models` has {name!r}, whose config")
    return Source(name, model_class, config)


def _hub_sources(name: str) -> list[Source]:
    """A Hub id, `org/repo` or with the folder of a component behind it."""
    words = name.split("/")
    families = {preset.partition("/")[0] for preset in named_sources() if "/" in preset}
    is_id = len(words) >= 2 and all(re.fullmatch(r"[A-Za-z0-9][\w.-]*", word) for word in words)
    if not is_id or words[0] in families:
        raise ValueError(f"`models` has {name!r}, which is no preset and no folder{_suggestion(name)}")
    repository, subfolder = "/".join(words[:2]), "/".join(words[2:])
    for index_name in () if subfolder else INDEXES:
        index = _fetch_json(repository, index_name)
        if index is None:
            continue
        parts = [part for part in index if _is_network(index[part])]
        if not parts:
            raise ValueError(f"`models` has {name!r}, a pipeline without networks of diffusers.")
        return [
            _config_source(f"{name}/{part}", _fetch_json(repository, f"{part}/config.json") or {}) for part in parts
        ]
    config = _fetch_json(repository, f"{subfolder}/config.json" if subfolder else "config.json")
    if config is None and not subfolder:
        name = f"{repository}/{LONE_NETWORK}"
        config = _fetch_json(repository, f"{LONE_NETWORK}/config.json")
    if config is None:
        raise ValueError(
            f"`models` has {repository!r}, a repository that has neither an index of a pipeline nor `config.json` "
            "there; name the folder of a network behind it, such as `org/repo/unet`. Adapters (LoRA) are no networks: "
            "inspect the model that they are for."
        )
    return [_config_source(name, config)]


def _suggestion(name: str) -> str:
    names = list(named_sources())
    close = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    if not close:
        return f". Presets: {', '.join(names)}."
    return f". Did you mean {' or '.join(close)}?"


def _fetch_json(repository: str, file: str) -> dict[str, Any] | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = hf_hub_download(repository, file)
    except (HfHubHTTPError, OSError, EntryNotFoundError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None  # the repository is there, without this file
        raise ValueError(
            f"`models` has {repository!r}, which is no preset and no folder, and which the Hub does not give (wrong "
            f"name, private, or offline: {type(error).__name__}){_suggestion(repository)}"
        ) from error
    return _read_json(Path(path))


def _read_json(path: Path) -> dict[str, Any]:
    content = parse_json(path, f"`models`: {path}")
    if not isinstance(content, dict):
        raise ValueError(f"`models`: {path} holds no object with the options of a model.")
    return content


def build(source: Source, device: str = "meta") -> ModelMixin:
    """The network of a source, without its weights.

    Raises:
        ValueError: when its class does not take its config.
    """
    with quiet(), torch.device(device):
        try:
            if "_class_name" in source.config:
                return source.model_class.from_config(source.config).eval()
            return source.model_class(**source.config).eval()
        except (TypeError, AttributeError, KeyError, IndexError, RuntimeError, ZeroDivisionError) as error:
            raise ValueError(
                f"`models` has {source.name!r}, whose config {source.model_class.__name__} does not take: {error}"
            ) from error


def weights_dtype(folder: Path | None) -> str | None:
    """Name of the dtype that most weights in a folder have, read from the headers of its safetensors files."""
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder else ():
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 100e6:
                continue
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                word = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(entry["dtype"], "float32")
                counts[word] = counts.get(word, 0) + math.prod(entry["shape"])
    return max(counts, key=counts.get) if counts else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without remarks about configs that older versions wrote."""
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers.utils.logging.set_verbosity(level)
