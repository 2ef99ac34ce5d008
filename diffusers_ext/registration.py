"""Makes the classes of this package loadable by name through diffusers.

The only file that touches names which diffusers does not document. What it relies on, checked with diffusers 0.42:

- `diffusers.pipelines.pipeline_loading_utils.LOADABLE_CLASSES` lists the libraries that components may come from.
  `save_pretrained` writes the plain library name for those, and the Hub is refused any other.
- `DiffusionPipeline.from_pretrained` looks a pipeline up as an attribute of the module `diffusers`, and
  `AutoModel.from_pretrained` a model whose folder stands alone.
"""

import functools
import warnings

import diffusers

import diffusers_ext


LIBRARY = "diffusers_ext"
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


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)
