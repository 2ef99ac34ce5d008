"""Makes the classes of this package loadable by name through diffusers, and their uploads what `hub.push` makes.

The only file that touches names which diffusers does not document. What it relies on, checked with diffusers 0.42:

- `diffusers.pipelines.pipeline_loading_utils.LOADABLE_CLASSES` lists the libraries that components may come from.
  `save_pretrained` writes the plain library name for those, and the Hub is refused any other.
- `DiffusionPipeline.from_pretrained` looks a pipeline up as an attribute of the module `diffusers`, and
  `AutoModel.from_pretrained` a model whose folder stands alone.
- `diffusers.pipelines.auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING` lists what `AutoPipelineForText2Image` loads.
- A class reads its index or config with its method `_dict_from_json_file`. `DiffusionPipeline.from_pretrained` reads
  the index of a pipeline itself, and then calls `extract_init_dict` of the class that it names.
- `push_to_hub`, like `save_pretrained` with `push_to_hub=True`, uploads what it has saved with `_upload_folder`, with
  a card that is a stub or that of the repository. The index of a modular pipeline names the folder, and so does its
  `config`.
"""

import functools
import importlib.abc
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
from diffusers.utils import PushToHubMixin

import diffusers_ext
from diffusers_ext.pipelines.modular_steps import ModularIndex


LIBRARY = "diffusers_ext"
AUTO_PIPELINE = "diffusers.pipelines.auto_pipeline"
LOADING_METHODS = {
    "ModelMixin": ["save_pretrained", "from_pretrained"],
    "SchedulerMixin": ["save_pretrained", "from_pretrained"],
}


def register() -> None:
    """Shows every class of `diffusers_ext.__all__` to diffusers; calling it again changes nothing.

    Runs on `import diffusers_ext`. When a release of diffusers has moved the table of libraries, this warns once and
    leaves `from_pretrained` of our own classes working from local folders.

    Raises:
        RuntimeError: when diffusers itself defines a class of the same name.
    """
    for name in diffusers_ext.__all__:
        own_class = getattr(diffusers_ext, name)
        present = getattr(diffusers, name, own_class)
        if present.__module__.partition(".")[0] == "diffusers":
            raise RuntimeError(
                f"diffusers {diffusers.__version__} defines `{name}` itself, so diffusers_ext "
                f"{diffusers_ext.__version__} cannot register its class of that name: a saved pipeline would load "
                "the wrong one. Upgrade diffusers_ext, or install an earlier diffusers."
            )
        setattr(diffusers, name, own_class)
        if issubclass(own_class, diffusers.ModelMixin | diffusers.DiffusionPipeline):
            own_class._dict_from_json_file = classmethod(_read_config)
            own_class._upload_folder = _upload_folder
        if issubclass(own_class, diffusers.DiffusionPipeline):
            own_class.extract_init_dict = classmethod(_read_index)
    ModularIndex._dict_from_json_file = classmethod(_read_config)
    diffusers.DiffusionPipeline._upload_folder = _upload_pipeline_folder
    diffusers.ModularPipeline._upload_folder = _upload_modular_folder

    try:
        from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
    except ImportError:
        _warn_once(
            f"diffusers {diffusers.__version__} has moved the table `LOADABLE_CLASSES`, in which diffusers_ext "
            f"{diffusers_ext.__version__} registers itself. `from_pretrained` still works on local folders, but not "
            "on the Hub, and what is saved now loads in this environment only. Upgrade diffusers_ext, or install the "
            "diffusers that its constraints.txt names."
        )
    else:
        LOADABLE_CLASSES[LIBRARY] = LOADING_METHODS

    if AUTO_PIPELINE in sys.modules:
        _register_with_auto_pipeline(sys.modules[AUTO_PIPELINE])
    elif not any(isinstance(finder, _AutoPipelineFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoPipelineFinder())


class _AutoPipelineFinder(importlib.abc.MetaPathFinder):
    """Registers with `AutoPipelineForText2Image` once somebody imports it: its module imports all of diffusers."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != AUTO_PIPELINE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register_with_auto_pipeline(module)

        spec.loader.exec_module = execute_and_register
        return spec


def _register_with_auto_pipeline(module: ModuleType) -> None:
    table = getattr(module, "AUTO_TEXT2IMAGE_PIPELINES_MAPPING", None)
    if table is None:
        _warn_once(
            f"diffusers {diffusers.__version__} has moved the table `AUTO_TEXT2IMAGE_PIPELINES_MAPPING`, so "
            "`AutoPipelineForText2Image` does not know `ClassConditionalPipeline`; `DiffusionPipeline` does."
        )
    else:
        table[LIBRARY] = diffusers_ext.ClassConditionalPipeline


def _read_config(own_class: type, json_file: str | os.PathLike) -> dict[str, Any]:
    """Reads the index or config of a repository, checked, and of a self-contained one as if it had no code.

    So our classes load such a repository with their installed code, and are not asked whether to trust another.

    Raises:
        UnsafeRepositoryError: for an index or config that names what no model is made of.
    """
    from diffusers_ext.hub.flattening import plain_config, plain_index
    from diffusers_ext.hub.safety import check_config, check_folder, check_index, parse_json, taken_from_beside

    path = Path(json_file)
    content = parse_json(path, path)
    if path.name == own_class.config_name:
        check_folder(path.parent)  # while a repository is being downloaded, what has come of it
    if issubclass(own_class, diffusers.ModelMixin):
        check_config(content, path)
        return plain_config(content)
    if own_class is ModularIndex:
        content = taken_from_beside(content, path.parent)
    check_index(content, path)
    plain = plain_index(content)
    if own_class is not ModularIndex and isinstance(plain["_class_name"], list):
        # Where the code is not in the repository, diffusers would run a community pipeline of that name, unasked.
        plain["_class_name"] = own_class.__name__
    return plain


def _read_index(own_class: type, config_dict: dict[str, Any], **options) -> Any:
    """Checks the index of a repository before a component is loaded: `DiffusionPipeline` reads it by itself, and hands
    it to the class that it names."""
    from diffusers_ext.hub.safety import check_index

    check_index(config_dict, f"The index of {own_class.__name__}")
    return diffusers.DiffusionPipeline.extract_init_dict.__func__(own_class, config_dict, **options)


def _upload_folder(
    model: diffusers.ModelMixin | diffusers.DiffusionPipeline,
    working_dir: str | os.PathLike,
    repo_id: str,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
) -> Any:
    """Uploads a folder that diffusers has saved as `hub.push` does: with a card that has contents, in one commit.

    Into a `subfolder` of a repository it goes as diffusers would have it, without a card.
    """
    if subfolder:
        return PushToHubMixin._upload_folder(
            model, working_dir, repo_id, token, commit_message, create_pr, subfolder=subfolder
        )
    from diffusers_ext.cards import inherit
    from diffusers_ext.hub.export import tidy
    from diffusers_ext.hub.remote import upload

    inherited = inherit(Path(working_dir))
    tidy(Path(working_dir), repo_id)
    # A stub, or the card of the repository, whose metadata diffusers has written in its own way: `upload` reads that.
    Path(working_dir, "README.md").unlink(missing_ok=True)
    return upload(
        working_dir,
        repo_id,
        commit_message=commit_message or f"Upload {type(model).__name__}",
        create_pr=create_pr,
        token=token,
        inherited=inherited,
    )


def _upload_pipeline_folder(pipe: diffusers.DiffusionPipeline, *arguments: Any, **options: Any) -> Any:
    """As `_upload_folder` where a network is ours, also one whose code came with a repository, and as diffusers has it
    for all other pipelines."""
    from diffusers_ext.hub.flattening import our_class

    is_ours = any(our_class(type(part).__name__) is not None for part in pipe.components.values())
    upload = _upload_folder if is_ours else PushToHubMixin._upload_folder
    return upload(pipe, *arguments, **options)


def _upload_modular_folder(
    pipe: diffusers.ModularPipeline, working_dir: str | os.PathLike, repo_id: str, **options: Any
) -> Any:
    """As `_upload_folder` where the blocks are ours, and as diffusers has it for all others."""
    from diffusers_ext.hub.flattening import our_class

    is_ours = our_class(type(pipe._blocks).__name__, diffusers.ModularPipelineBlocks) is not None
    if not is_ours or options.get("subfolder"):
        return PushToHubMixin._upload_folder(pipe, working_dir, repo_id, **options)
    info = _upload_folder(pipe, working_dir, repo_id, **options)
    for name in pipe.pretrained_component_names:
        library, class_name, spec = pipe.config[name]
        if spec["pretrained_model_name_or_path"] == str(working_dir):  # of `push_to_hub`, gone by now
            pipe.register_to_config(**{name: (library, class_name, spec | {"pretrained_model_name_or_path": repo_id})})
    return info


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)
