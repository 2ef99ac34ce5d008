"""What the folder or repository of a stranger may hold, and what of ours no text may tell.

Everything here reads: nothing is imported because a file names it, nothing is unpickled, nothing is written. A loader
of diffusers looks classes up in modules that the process has imported already, so names are checked the same way: an
entry is good when it names a class that is there and that is a model, scheduler, guider, text encoder, tokenizer or
processor. The refusals are `UnsafeRepositoryError`s and say what was found, where, and what to do.
"""

import importlib.util
import inspect
import json
import math
import os
import re
import stat
import sys
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any
from urllib.parse import quote

import transformers
from huggingface_hub import get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError, safe_open

import diffusers
from diffusers.guiders import BaseGuidance

from diffusers_ext.hub.flattening import plain_config, plain_index


LIBRARIES = ("diffusers", "transformers", "diffusers_ext")
INDEX, MODULAR_INDEX = "model_index.json", "modular_model_index.json"
MAX_FILES = 10_000
MAX_NAME, MAX_PATH = 255, 1024  # bytes, of a part and of a whole name
MAX_JSON = 4 << 20  # bytes; 21,000 class names take 1 MiB
MAX_VOCABULARY = 128 << 20  # of tokenizer.json and its like
MAX_DEPTH = 32
MAX_INTEGER = 2**53
# Counts that a constructor spends time or memory on before any weight is compared with its shape.
MAX_TIMESTEPS, MAX_LAYERS = 1_000_000, 10_000
VOCABULARIES = {"tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json", "merges.json"}

# What `pull` downloads: no format that holds objects (.bin, .pt, .ckpt, .pkl, .npy, .onnx ...) and no scripts.
DATA_SUFFIXES = {".safetensors", ".json", ".jsonl", ".txt", ".md", ".yaml", ".yml", ".csv", ".bib", ".cff", ".model"}
DATA_SUFFIXES |= {".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".mp4"}
DATA_NAMES = {"LICENSE", "LICENCE", "NOTICE", ".gitattributes"}
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".msgpack", ".h5", ".npy", ".npz", ".onnx"}

# Quantisers whose configs hold values alone and whose weights may lie in safetensors files.
QUANTISERS = {"torchao", "bitsandbytes"}
INFINITE_OPTIONS = {"lambda_min_clipped"}  # of DPM-Solver, minus infinity by default

TOKENS = [
    re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{16,}"),
    re.compile(r"(?<![A-Za-z0-9])hf_(?:oauth|jwt)_[\w.-]{16,}"),
    re.compile(r"(?<=://)[^\s/@:\"']*:[^\s/@\"']+(?=@)"),  # user:password@ of an address
]


class UnsafeRepositoryError(ValueError):
    """A folder or repository with something that no model needs and that could do harm; nothing of it is loaded."""

    def __init__(self, message: str):
        super().__init__(redact(message))


# Names of files


def check_file_names(names: Iterable[str], source: object) -> None:
    """Refuse names that lead out of a folder, that some systems read otherwise, or that hide what they are.

    Args:
        names: as the Hub lists them, with `/` between folders.
        source: repository or folder, for the error.

    Raises:
        UnsafeRepositoryError: for the first such name.
    """
    seen: dict[str, str] = {}
    for count, name in enumerate(names, 1):
        if count > MAX_FILES:
            raise UnsafeRepositoryError(f"{source} has more than {MAX_FILES} files, which no model needs.")
        reason = _fault_of_name(name)
        if reason is not None:
            raise UnsafeRepositoryError(
                f"{source} has a file named {show(name)}, which {reason}. Nothing is read; ask its author to rename "
                "the file."
            )
        parts = name.split("/")
        for path in ("/".join(parts[:depth]) for depth in range(1, len(parts) + 1)):
            other = seen.setdefault(unicodedata.normalize("NFC", path).casefold(), path)
            if other != path:
                raise UnsafeRepositoryError(
                    f"{source} has both {show(other)} and {show(path)}, which are one file where a system does not "
                    "tell capital letters apart. Nothing is read; ask its author to rename one."
                )


def _fault_of_name(name: object) -> str | None:
    if not isinstance(name, str) or not name:
        return "is no text"
    if any(unicodedata.category(letter)[0] == "C" for letter in name):
        return "holds control or invisible characters"
    if "\\" in name:
        return "holds a backslash, the separator of folders elsewhere"
    if name.startswith(("/", "~")) or ":" in name:
        return "is an absolute path or names a drive"
    parts = name.split("/")
    if not all(parts) or {".", ".."} & set(parts):
        return "leads out of the repository (path traversal)"
    if any(len(part.encode()) > MAX_NAME for part in parts) or len(name.encode()) > MAX_PATH:
        return f"is too long: a part may have {MAX_NAME} bytes, the whole {MAX_PATH}"
    return None


# JSON


def parse_json(content: os.PathLike | bytes, source: object, limit: int = MAX_JSON) -> Any:
    """Parsed JSON of a foreign file.

    Args:
        content: path, or the bytes themselves.
        source: what the error calls it.
        limit: largest size in bytes.

    Raises:
        UnsafeRepositoryError: when it is larger, nested deeper than 32, not UTF-8 or not JSON, repeats a key of an
            object, or holds a number that JSON does not have.
    """
    if not isinstance(content, bytes):
        size = os.stat(content).st_size
        with open(content, "rb") as file:
            content = file.read(limit + 1) if size <= limit else b" " * (limit + 1)
    if len(content) > limit:
        raise UnsafeRepositoryError(
            f"{source} is larger than {limit >> 20} MiB, oversized for a config. Nothing of it is read."
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UnsafeRepositoryError(f"{source} has the key {show(twice)} twice, so its meaning is not certain.")
        for key, value in pairs:
            if isinstance(value, float) and math.isinf(value) and key not in INFINITE_OPTIONS:
                raise UnsafeRepositoryError(f"{source} has {show(key)} {value}, which is no finite number.")
        return found

    def constant(word: str) -> float:
        if word == "NaN":
            raise UnsafeRepositoryError(f"{source} holds NaN, which is no number of JSON.")
        return float(word)

    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except UnsafeRepositoryError:
        raise
    except UnicodeDecodeError as error:
        raise UnsafeRepositoryError(f"{source} is not UTF-8 ({error.reason} at byte {error.start}).") from None
    except RecursionError:
        raise UnsafeRepositoryError(f"{source} is nested deeper than {MAX_DEPTH} levels.") from None
    except ValueError as error:
        raise UnsafeRepositoryError(f"{source} is not JSON ({error}).") from None
    level, depth = [parsed], 0
    while level:
        if depth >= MAX_DEPTH:
            raise UnsafeRepositoryError(f"{source} is nested deeper than {MAX_DEPTH} levels.")
        inside = (_values(value) for value in level)
        level = [value for values in inside for value in values if isinstance(value, (dict, list))]
        depth += 1
    return parsed


def _values(value: Any) -> Collection[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


# The index of a pipeline


def check_index(index: object, source: object, files: Collection[str] | None = None) -> None:
    """Refuse a `model_index.json` or `modular_model_index.json` that names what no pipeline is made of.

    A component is `[library, class]` of diffusers, transformers or this package, of a module that this process has
    imported, or of a file of the repository, which diffusers runs only where its user passes `trust_remote_code`.

    Args:
        index: as parsed.
        source: what the error calls it.
        files: names in the repository; None: unknown.

    Raises:
        UnsafeRepositoryError: for the first entry of another kind, with the reason.
    """
    if not isinstance(index, dict):
        raise UnsafeRepositoryError(f"{source} holds no object with components, but a {type(index).__name__}.")
    components = _components(_check_pipeline_name(index, source, files))
    for name, entry in index.items():
        if name in ("_class_name", "_blocks_class_name"):
            continue
        if not (name.isidentifier() and name.isascii() and len(name) <= MAX_NAME) or name.startswith("__"):
            raise UnsafeRepositoryError(
                f"{source} has a component {show(name)}; a component is a folder beside the index and is named by a "
                "plain word."
            )
        if name == "auto_map":
            _check_auto_map(entry, source, files)
        elif name == "_ignore_files":
            if not isinstance(entry, list) or not all(isinstance(file, str) for file in entry):
                raise UnsafeRepositoryError(
                    f"{source} has `_ignore_files` {show(entry)}; it must hold names of files."
                )
        elif name.startswith("_"):
            if entry is not None and not isinstance(entry, (str, bool)):
                raise UnsafeRepositoryError(f"{source} has `{name}` {show(entry)}; it must be a text.")
        elif isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], dict):
            _check_entry(name, entry[:2], source, files)
            _check_loading_spec(name, entry[2], source)
        elif name in components:
            _check_entry(name, entry, source, files)
        elif isinstance(entry, list) and entry and (entry[0] is None or isinstance(entry[0], (str, list, dict))):
            _check_entry(name, entry, source, files)
        else:
            _check_values(entry, source, name)


def _check_pipeline_name(index: Mapping[str, Any], source: object, files: Collection[str] | None) -> type | None:
    """The class of the pipeline; None where it comes with the repository."""
    name = index.get("_class_name", index.get("_blocks_class_name"))
    if isinstance(name, list) and len(name) == 2 and all(isinstance(word, str) for word in name):
        file, class_name = name
        _check_file(file, f"`_class_name` {show(name)}", source, f"{file}.py", files)
        if not _is_class_name(class_name):
            raise UnsafeRepositoryError(f"{source} has the pipeline {show(name)}, whose class has no plain name.")
        return _pipeline_class(class_name)
    if not isinstance(name, str):
        raise UnsafeRepositoryError(
            f"{source} has `_class_name` {show(name)}; it must be the name of a pipeline, or [file, name] where the "
            "repository carries its code."
        )
    blocks = index.get("_blocks_class_name")  # of a modular pipeline; they may come with another repository
    is_known = blocks is None or (
        _is_class_name(blocks) and (_pipeline_class(blocks) or not hasattr(diffusers, blocks))
    )
    found = _pipeline_class(name) if _is_class_name(name) else None
    if found is None or not is_known:
        raise UnsafeRepositoryError(
            f"{source} has the pipeline {show(name if found is None else blocks)}, which is no pipeline of diffusers "
            "or diffusers_ext. Where it is one of a newer release, upgrade; where it is yours, import it first."
        )
    return found


def _pipeline_class(name: str) -> type | None:
    """The pipeline, or the blocks of one, of that name: of diffusers, which knows ours, or of the user's own."""
    bases = (diffusers.DiffusionPipeline, diffusers.ModularPipeline, diffusers.ModularPipelineBlocks)
    found = getattr(diffusers, name, None)
    candidates = [found] if isinstance(found, type) else []
    for base in bases:
        candidates += [known for known in _subclasses(base) if known.__name__ == name]
    return next((known for known in candidates if issubclass(known, bases)), None)


def _subclasses(base: type) -> Iterator[type]:
    for known in base.__subclasses__():
        yield known
        yield from _subclasses(known)


def _components(pipeline_class: type | None) -> set[str]:
    """Names of a pipeline's components, as its constructor tells them."""
    if pipeline_class is None or not issubclass(pipeline_class, diffusers.DiffusionPipeline):
        return set()
    parameters = inspect.signature(pipeline_class.__init__).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = {p.name for p in parameters if p.default is p.empty and p.kind in named and p.name != "self"}
    return needed | set(pipeline_class._optional_components)


def _check_entry(name: str, entry: Any, source: object, files: Collection[str] | None) -> None:
    """A component's `[library, class]`, or `[None, None]`."""
    if entry == [None, None]:
        return
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(word, str) for word in entry):
        raise UnsafeRepositoryError(
            f"{source} has `{name}` {show(entry)}; a component must be [library, class], both of them texts, or null."
        )
    library, class_name = entry
    if not _is_class_name(class_name):
        raise UnsafeRepositoryError(
            f"{source} has `{name}` {show(entry)}, whose class has no plain name: functions, private and dotted "
            "names are not loaded."
        )
    own_file = f"{name}/{library}.py"
    if library in LIBRARIES and files is not None and own_file in files:
        raise UnsafeRepositoryError(
            f"{source} has `{name}` {show(entry)} and a file {own_file}, which would be run in place of the library "
            f"{library}. Ask its author to remove the file."
        )
    is_file = files is not None and own_file in files
    found = None if is_file else _find_class(library, class_name)
    if found is not None:
        return
    if library in LIBRARIES:
        raise UnsafeRepositoryError(
            f"{source} has `{name}` {show(entry)}, which is no model, scheduler, guider, text encoder, tokenizer or "
            f"processor of {library}. Nothing of it is called; where it is one of a newer release, upgrade."
        )
    if not is_file and (files is not None or _module(library) is not None or not _is_file_stem(library)):
        raise UnsafeRepositoryError(
            f"{source} has `{name}` {show(entry)}, and {show(library)} is no library that models come from "
            f"({', '.join(LIBRARIES)}). It is not imported and nothing of it is called; if it is a module of yours "
            "that defines a model, import it first."
        )
    _check_file(library, f"`{name}` {show(entry)}", source, own_file, files)


def _check_file(word: str, entry: str, source: object, file: str, files: Collection[str] | None) -> None:
    """A word of the index that stands for a file of code in the repository."""
    if not _is_file_stem(word):
        raise UnsafeRepositoryError(
            f"{source} has {entry}, and {show(word)} is no file of this repository, but a module or a path. It is "
            "not imported; a repository may only name its own files, flat and with plain names."
        )
    if files is not None and file not in files:
        raise UnsafeRepositoryError(f"{source} has {entry}, but the repository has no file {file}.")


def _is_file_stem(word: str) -> bool:
    plain = word.isidentifier() and word.isascii() and not word.startswith("__")
    return plain and word not in sys.stdlib_module_names and word not in LIBRARIES


def _is_class_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.isidentifier()
        and name.isascii()
        and not name.startswith("_")
        and len(name) <= MAX_NAME
    )


def _module(library: str) -> Any:
    """The module that diffusers would take a component from; it must be imported already, or be one of its own."""
    return sys.modules[library] if library in LIBRARIES else _folder_of_pipelines(library) or sys.modules.get(library)


def _folder_of_pipelines(library: str) -> Any:
    """What `["stable_diffusion", ...]` stands for in diffusers; None for any other word."""
    plain = library.isidentifier() and library.isascii() and not library.startswith("_")
    if not plain or importlib.util.find_spec(f"diffusers.pipelines.{library}") is None:
        return None
    return getattr(diffusers.pipelines, library, None)


def _component_bases() -> tuple[type, ...]:
    return (
        diffusers.ModelMixin,
        diffusers.SchedulerMixin,
        BaseGuidance,
        transformers.PreTrainedModel,
        transformers.PreTrainedTokenizerBase,
        transformers.FeatureExtractionMixin,
        transformers.ProcessorMixin,
        transformers.ImageProcessingMixin,
    )


def _find_class(library: str, class_name: str) -> type | None:
    """The class of that name if a component may be of it; None otherwise."""
    module = _module(library)
    if library in LIBRARIES or module is _folder_of_pipelines(library):
        found = getattr(module, class_name, None)
    else:  # of any other module, what it holds already: `getattr` can run its code
        found = vars(module).get(class_name) if isinstance(module, ModuleType) else None
    if found is None and library == "transformers" and class_name.endswith("FeatureExtractor"):
        # what image processors were called before transformers 4.26; diffusers reads such repositories as well
        found = getattr(module, class_name.removesuffix("FeatureExtractor") + "ImageProcessor", None)
    if not isinstance(found, type):
        return None
    if library in LIBRARIES and isinstance(getattr(found, "_backends", None), list):
        return found  # the stand-in for a class whose packages are missing, which says so when it is called
    bases = _component_bases()
    home = found.__module__.partition(".")[0]
    at_home = home in (library.partition(".")[0], "diffusers")
    return found if at_home and issubclass(found, bases) and found not in bases else None


def taken_from_beside(index: object, folder: Path) -> object:
    """A modular index without the paths of components that lie beside it.

    diffusers saves the folder it writes into as their origin, and takes what is beside the index from there.
    """
    if not isinstance(index, dict):
        return index
    found = dict(index)
    for name, entry in index.items():
        if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], dict)):
            continue
        origin = entry[2].get("pretrained_model_name_or_path")
        is_path = isinstance(origin, str) and Path(origin).is_absolute()
        if is_path and entry[2].get("subfolder") == name and _is_component_folder(folder / name):
            found[name] = [*entry[:2], entry[2] | {"pretrained_model_name_or_path": None}]
    return found


def _is_component_folder(folder: Path) -> bool:
    """Whether diffusers finds a component there: weights of a model, and of what has none any file."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return any(name.endswith(".safetensors") for name in names) or bool(names and "config.json" not in names)


def _check_loading_spec(name: str, spec: Mapping[str, Any], source: object) -> None:
    """The third part of a modular component: where it comes from."""
    for key, value in spec.items():
        if key == "type_hint":
            abstract = ([None, None], ["diffusers", "AutoModel"], ["diffusers", "BaseGuidance"])
            if isinstance(value, list) and value not in abstract:
                _check_entry(name, value, source, None)
            elif value is not None and not isinstance(value, list):
                raise UnsafeRepositoryError(f"{source} has `{name}` of the type {show(value)}; it must be a class.")
        elif value is None or isinstance(value, bool):
            continue
        elif not isinstance(value, str):
            raise UnsafeRepositoryError(f"{source} has `{name}` with `{key}` {show(value)}; it must be a text.")
        elif key in ("pretrained_model_name_or_path", "repo"):
            try:
                validate_repo_id(value)
            except HFValidationError:
                raise UnsafeRepositoryError(
                    f"{source} takes `{name}` from {show(value)}, which is no name of a repository; paths and "
                    "addresses are not followed."
                ) from None
        elif key == "subfolder":
            if value and _fault_of_name(value) is not None:
                raise UnsafeRepositoryError(f"{source} takes `{name}` from the folder {show(value)}, which is none.")
        elif not re.fullmatch(r"[\w./-]{0,255}", value) or ".." in value:
            raise UnsafeRepositoryError(f"{source} has `{name}` with `{key}` {show(value)}, which is no plain word.")


# Configs of components


def check_config(config: object, source: object, files: Collection[str] | None = None) -> None:
    """Refuse a config of a model, scheduler, guider, tokenizer or processor that names code or asks for too much.

    Args:
        config: as parsed.
        source: what the error calls it.
        files: names in its folder, for a model that carries its code; None: unknown.

    Raises:
        UnsafeRepositoryError: for the first entry of that kind.
    """
    if not isinstance(config, dict):
        raise UnsafeRepositoryError(f"{source} holds no object with options, but a {type(config).__name__}.")
    for key in ("_class_name", "model_type", "tokenizer_class", "processor_class", "image_processor_type"):
        value = config.get(key)
        plain = value is None or (isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w.-]{0,254}", value))
        if not plain or (key == "_class_name" and value is not None and not _is_class_name(value)):
            raise UnsafeRepositoryError(f"{source} has `{key}` {show(value)}; it must be the plain name of a class.")
    for key in ("_name_or_path", "_diffusers_version", "name_or_path"):
        if not isinstance(config.get(key, ""), (str, type(None))):
            raise UnsafeRepositoryError(f"{source} has `{key}` {show(config[key])}; it must be a text.")
    if "auto_map" in config:
        _check_auto_map(config["auto_map"], source, files)
    if config.get("quantization_config") is not None:
        _check_quantization(config["quantization_config"], source)
    _check_values({key: value for key, value in config.items() if key != "auto_map"}, source)


def _check_auto_map(auto_map: Any, source: object, files: Collection[str] | None) -> None:
    """Code that a single model or the blocks of a modular pipeline carry: files beside the config, flat."""
    pairs = list(auto_map.items()) if isinstance(auto_map, dict) else [(None, auto_map)]
    for kind, reference in pairs:
        file, dot, class_name = reference.partition(".") if isinstance(reference, str) else ("", "", "")
        if kind not in ("AutoModel", "ModularPipelineBlocks") or not dot or not _is_class_name(class_name):
            raise UnsafeRepositoryError(
                f"{source} has `auto_map` {show(auto_map)}, which asks for code that is not its own, or of a kind "
                "that is never run. Remove the entry, or load a copy of this model that needs no code."
            )
        _check_file(file, f"`auto_map` {show(reference)}", source, f"{file}.py", files)


def _check_quantization(options: Any, source: object) -> None:
    method = options.get("quant_method") if isinstance(options, dict) else None
    if method not in QUANTISERS:
        raise UnsafeRepositoryError(
            f"{source} has `quantization_config` {show(options)}; only weights of {' or '.join(sorted(QUANTISERS))} "
            "are loaded. Quantise the original weights while loading them."
        )
    waiting = [options]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            kind, data = value.get("_type"), value.get("_data")
            is_dtype = kind == "torch.dtype" and isinstance(data, str) and re.fullmatch(r"[a-z]+\d+\w*", data)
            is_class = isinstance(kind, str) and re.fullmatch(r"[A-Z][A-Za-z0-9_]{0,99}", kind)
            if kind is not None and not is_dtype and not is_class:
                raise UnsafeRepositoryError(
                    f"{source} has `quantization_config` of the type {show(kind)}, which is no config of torchao."
                )
        waiting.extend(_values(value))


def _check_values(value: Any, source: object, key: str = "") -> None:
    """Options that a constructor gets: keys that no import hook reads, numbers that no machine chokes on."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if re.fullmatch(r"_.*_|class_path|.*[\x00-\x1f].*", name, flags=re.DOTALL):
                raise UnsafeRepositoryError(
                    f"{source} has the key {show(name)}, by which some programs choose what to call. No option of a "
                    "model is named so."
                )
            if isinstance(inner, str) and name in ("vocab_file", "merges_file", "tokenizer_file", "spm_file"):
                if _fault_of_name(inner.removeprefix("./")) is not None:
                    raise UnsafeRepositoryError(
                        f"{source} has `{name}` {show(inner)}, a path outside of the repository. Remove the entry."
                    )
            _check_values(inner, source, name)
    elif isinstance(value, list):
        for inner in value:
            _check_values(inner, source, key)
    elif isinstance(value, float) and not math.isfinite(value) and key not in INFINITE_OPTIONS:
        raise UnsafeRepositoryError(f"{source} has {show(key)} {value}, which is no finite number.")
    elif isinstance(value, int) and not isinstance(value, bool) and key != "model_max_length":
        limit = MAX_INTEGER
        if key == "num_train_timesteps":
            limit = MAX_TIMESTEPS
        elif re.search(r"(^|_)(layers?|blocks?|depth)(_|$)", key) and "channels" not in key:
            limit = MAX_LAYERS
        if abs(value) > limit:
            raise UnsafeRepositoryError(f"{source} has `{key}` {show(value)}; it may be {limit} at most.")


# Folders


def check_folder(folder: str | os.PathLike, source: object = None) -> None:
    """Check what loading a folder would read: names, links, index, configs, headers and lists of weights.

    Of a pipeline that is its top and the folders of its components, of anything else its top. Checkpoints and data of
    a training run are neither read nor checked.

    Args:
        folder: of a pipeline, modular pipeline, model, scheduler or adapter.
        source: what errors call it; None: the folder.

    Raises:
        UnsafeRepositoryError: for the first thing that must not be there.
        NotADirectoryError: when there is no folder.
    """
    source = str(folder) if source is None else source
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise NotADirectoryError(f"{source} is no folder.")
    root = root.resolve()
    entries = _entries(root, source)
    top = [entry.name for entry in entries if not entry.is_dir()]
    indexes = {}
    for name in (INDEX, MODULAR_INDEX):
        if name in top:
            _check_kind(root / name, root, source)
            indexes[name] = parse_json(root / name, f"{source}: {name}")
    named = {key for index in indexes.values() if isinstance(index, dict) for key in index}
    below = [entry.name for entry in entries if entry.is_dir()]
    parts = [part for part in below if part in named or (root / part / "config.json").is_file()]
    files = top + [file for part in parts for file in _files_below(root, part, source)]
    check_file_names(files, source)
    for file in files:
        _check_kind(root / file, root, source)
    for name, index in indexes.items():
        if name == MODULAR_INDEX:
            index = taken_from_beside(index, root)
        if isinstance(index, dict):
            index = plain_index(index)  # our classes never fetch the code that an export of ours adds
        # A snapshot in the Hub's cache holds what was asked for, so it does not tell which code is in the repository.
        is_snapshot = any(above.name == "snapshots" for above in root.parents)
        check_index(index, f"{source}: {name}", None if is_snapshot else files)
    for part in ("", *parts):
        names = {file.removeprefix(f"{part}/") for file in files if file.startswith(f"{part}/")} if part else set(top)
        alone = not indexes and not part
        _check_part(root / part, part, names, source, needs_weights=part in named or alone, stands_alone=alone)


def _entries(folder: Path, source: object) -> list[os.DirEntry]:
    with os.scandir(folder) as found:
        entries = [entry for entry, _ in zip(found, range(MAX_FILES + 1))]
    if len(entries) > MAX_FILES:
        raise UnsafeRepositoryError(f"{source} has more than {MAX_FILES} files in one folder, which no model needs.")
    return sorted(entries, key=lambda entry: entry.name)


def _files_below(root: Path, part: str, source: object, depth: int = 0) -> list[str]:
    """Names of the files in a component's folder, links among them; folders behind links are refused."""
    folder = root / part
    if folder.is_symlink() or depth > MAX_DEPTH:
        raise UnsafeRepositoryError(
            f"{source}: {show(part)} is a link to a folder elsewhere. Put a copy in its place."
        )
    files = []
    for entry in _entries(folder, source):
        name = f"{part}/{entry.name}"
        files += _files_below(root, name, source, depth + 1) if entry.is_dir() else [name]
    return files


def _check_kind(path: Path, root: Path, source: object) -> None:
    """A regular file, or a link to one inside the folder, or inside the Hub's cache that it is a snapshot of."""
    name = path.relative_to(root).as_posix()
    if path.is_symlink():
        target = path.resolve()
        stores = [root] + [above.parent / "blobs" for above in (root, *root.parents) if above.name == "snapshots"]
        if not any(target.is_relative_to(store) for store in stores):
            raise UnsafeRepositoryError(
                f"{source}: {show(name)} is a symlink to {show(str(target))}, outside of the folder. It is not "
                "followed; put a copy of the file in its place."
            )
    try:
        mode = path.stat().st_mode
    except OSError:
        raise UnsafeRepositoryError(f"{source}: {show(name)} is a symlink to a file that is not there.") from None
    if not stat.S_ISREG(mode):
        raise UnsafeRepositoryError(f"{source}: {show(name)} is no regular file, but a device, pipe or socket.")


def _check_part(
    folder: Path, part: str, names: set[str], source: object, needs_weights: bool, stands_alone: bool
) -> None:
    """Configs and weights of one component, or of what lies at the top (`part` is empty).

    Args:
        folder: where it is.
        part: its name in the pipeline.
        names: of the files in it.
        source: for errors.
        needs_weights: refuse it where its weights are pickles alone.
        stands_alone: there is no index that names its class.
    """
    for name in sorted(names):
        path, title = folder / name, f"{source}: {PurePosixPath(part) / name}"
        if name.endswith(".index.json"):
            _check_shards(parse_json(path, title), title, names)
        elif PurePosixPath(name).name in VOCABULARIES:
            if path.stat().st_size > MAX_VOCABULARY:
                raise UnsafeRepositoryError(f"{title} is larger than {MAX_VOCABULARY >> 20} MiB, oversized.")
        elif name == "config.json" or name.endswith("_config.json"):
            config = parse_json(path, title)
            if isinstance(config, dict):
                config = plain_config(config)  # as with the index: such code is never fetched for classes of ours
            check_config(config, title, names)
            if name == "config.json" and stands_alone:
                _check_model_name(config, title)
        elif name.endswith(".safetensors"):
            check_safetensors(path, title)
    if needs_weights:
        _check_formats(part, names, source)


def _check_model_name(config: Mapping[str, Any], source: object) -> None:
    """The class that `AutoModel` would take; where there is an index, that one says it."""
    name = config.get("_class_name")
    if name is None or "auto_map" in config:
        return
    known = (
        getattr(diffusers, name, None),
        *(model for model in _subclasses(diffusers.ModelMixin) if model.__name__ == name),
    )
    if not any(isinstance(model, type) and issubclass(model, diffusers.ModelMixin) for model in known):
        raise UnsafeRepositoryError(
            f"{source} has `_class_name` {show(name)}, which is no model of diffusers or diffusers_ext. Where it is "
            "one of a newer release, upgrade; where it is yours, import it first."
        )


def _check_formats(part: str, names: Iterable[str], source: object) -> None:
    """Refuse a component whose weights come in other formats only."""
    names = [PurePosixPath(part) / PurePosixPath(name).name for name in sorted(names)]
    others = [name for name in names if name.suffix.lower() in PICKLES]
    if others and not any(name.suffix == ".safetensors" for name in names):
        raise UnsafeRepositoryError(
            f"{source}: {others[0]} may hold pickled objects or code, and there are no weights "
            "as safetensors beside it. Nothing is unpickled; ask its author for safetensors."
        )


def _check_shards(index: Any, source: object, names: Collection[str]) -> None:
    """The list that says which file of a large model holds which weight."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise UnsafeRepositoryError(f"{source} has no `weight_map` from weights to files.")
    if not isinstance(index.get("metadata", {}), dict):
        raise UnsafeRepositoryError(f"{source} has `metadata` {show(index['metadata'])}; it must be an object.")
    for shard in sorted(set(map(str, weight_map.values()))):
        if _fault_of_name(shard) is not None or "/" in shard:
            raise UnsafeRepositoryError(
                f"{source} says that weights are in {show(shard)}, which leads out of its folder (path traversal)."
            )
        if shard.endswith(".safetensors") and shard not in names:
            raise UnsafeRepositoryError(f"{source} says that weights are in {show(shard)}, which is not there.")


def check_safetensors(path: Path, source: object = None) -> None:
    """Refuse a file that is no safetensors file whatever its name: its header is read, no weight is.

    Raises:
        UnsafeRepositoryError: with what it is instead.
    """
    source = str(path) if source is None else source
    with open(path, "rb") as file:
        head = file.read(9)
    size, length = path.stat().st_size, int.from_bytes(head[:8], "little")
    is_long_enough = len(head) == 9 and length <= size - 8
    if not (is_long_enough and head[8:] == b"{") and head[:2] in (b"PK", *(bytes([0x80, kind]) for kind in range(6))):
        raise UnsafeRepositoryError(
            f"{source} is a pickle under the name of a safetensors file. Nothing is unpickled; trust nothing else of "
            "its author either."
        )
    if not is_long_enough:
        raise UnsafeRepositoryError(
            f"{source} is no safetensors file: it promises a header of {length} bytes and has {size} in all. It was "
            "cut off, or made to mislead; download it anew."
        )
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise UnsafeRepositoryError(f"{source} is no safetensors file: its header is wrong ({error}).") from None


# What is downloaded


def wanted_files(sizes: Mapping[str, int | None], index: Mapping[str, Any] | None, source: object) -> list[str]:
    """The files of a repository that a download fetches: weights as safetensors, configs, texts, pictures, and of code
    only what the index names.

    Args:
        sizes: bytes of every file of the repository, None where the Hub does not say.
        index: model_index.json, modular_model_index.json or, of a single model, config.json; None: there is none.
        source: repository, for errors.

    Returns:
        Their names in alphabetical order.

    Raises:
        UnsafeRepositoryError: for a name that must not be, and for an oversized config.
    """
    check_file_names(sizes, source)
    code = set() if index is None else code_files(index, sizes)
    if index is not None:
        parts = list(index) if {INDEX, MODULAR_INDEX} & set(sizes) else ["."]
        for part in parts:
            _check_formats(part, [name for name in sizes if str(PurePosixPath(name).parent) == part], source)
    wanted = []
    for name in sorted(sizes):
        path = PurePosixPath(name)
        if name not in code and path.suffix.lower() not in DATA_SUFFIXES and path.name not in DATA_NAMES:
            continue
        limit = MAX_VOCABULARY if path.name in VOCABULARIES else MAX_JSON
        if path.suffix == ".json" and (sizes[name] or 0) > limit:
            raise UnsafeRepositoryError(
                f"{source} has {show(name)} of {sizes[name] >> 20} MiB, oversized for a config: it may have "
                f"{limit >> 20} MiB. Nothing is downloaded."
            )
        wanted.append(name)
    return wanted


def code_files(index: Mapping[str, Any], files: Collection[str], folder: str = "") -> set[str]:
    """Python files that an index or config in `folder` names and that are there; they run only where a user trusts
    them."""
    named = set()
    if isinstance(index.get("_class_name"), list) and index["_class_name"]:
        named.add(f"{index['_class_name'][0]}.py")
    if isinstance(index.get("auto_map"), dict):
        named.update(f"{str(reference).partition('.')[0]}.py" for reference in index["auto_map"].values())
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) in (2, 3) and name[:1] != "_" and isinstance(entry[0], str):
            if entry[0] not in LIBRARIES:
                named.add(f"{name}/{entry[0]}.py")
    return {str(PurePosixPath(folder) / name) for name in named} & set(files)


# Access tokens


def find_tokens(text: str) -> list[str]:
    """Access tokens and passwords in a text: those of the Hub by their form, the one in use, and `user:password` of an
    address; each once."""
    found = [match.group() for pattern in TOKENS for match in pattern.finditer(text)]
    found += [form for form in _token_in_use() if form in text]
    return list(dict.fromkeys(found))


def redact(text: str, *secrets: str | None) -> str:
    """The text with every access token and password replaced by `***`.

    Args:
        text: of an error, log, card or config.
        secrets: further ones, such as a token that was passed by hand.
    """
    given = {form for secret in secrets if secret for form in (secret, quote(secret, safe=""))}
    for secret in sorted({*find_tokens(text), *given}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _token_in_use() -> list[str]:
    """The token that huggingface_hub would send, as it is and as it stands in an address."""
    token = get_token()
    return [token, quote(token, safe="")] if token and len(token) >= 8 else []


def show(value: Any) -> str:
    """A foreign value for an error: on one line, in ASCII, short, without tokens."""
    text = redact(ascii(value))
    return text if len(text) <= 120 else f"{text[:117]}..."
