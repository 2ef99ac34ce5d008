"""Code that travels: the sources of this package as files that need nothing but torch, diffusers and transformers.

A self-contained repository carries `pipeline.py`, in which guidance, sampling loop and pipeline are one file, and
beside each of our components the file of its family, under a name that holds a hash of its content. What diffusers
does with them, checked with 0.42:

- From a component's folder it fetches `<component>/<library>.py` alone, `library` being the first word of the
  component in `model_index.json`. So one file each, and no relative imports.
- It copies the code of all local folders and of all components into one package of modules, and runs a file of a known
  name again in the namespace of the earlier one. So a name must mean one content, and `pipeline.py`, whose name is
  given, must leave its namespace to itself.
"""

import ast
import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin, ModularPipelineBlocks

import diffusers_ext


PACKAGE = "diffusers_ext"
BLOCKS = "ModularPipelineBlocks"  # what diffusers calls the blocks among the classes that a repository carries
PIPELINE_FILE = "pipeline"  # diffusers looks for this name where it is told to run a repository's pipeline
LINE_LENGTH = 119
_LICENSE = "# SPDX-License-Identifier: Apache-2.0"
_RULE = f"# {'-' * (LINE_LENGTH - 2)}"

# How a component of ours is called in the index of a self-contained repository; with the longer name where it was
# saved again by code that had come from such a repository.
_FLAT_LIBRARY = re.compile(r"(?:diffusers_modules\.local\.)?(?P<name>[A-Za-z][A-Za-z0-9_]*)_[0-9a-f]{8}")

_COMPONENT_START = """

# diffusers runs this file again for every component and every repository that brings it, in one namespace. Its name
# holds a hash of its content, so what the first run defined is put back at the end: models that were made before stay
# instances of these classes.
_FIRST_RUN = {name: value for name, value in globals().items() if not name.startswith("__")}
"""
_COMPONENT_END = """
globals().update(_FIRST_RUN)
"""
_PIPELINE_END = """
# diffusers would run the `pipeline.py` of the next repository in this namespace, or instead of it, if it is as long as
# this one, what was compiled here. Both are put out of its way, so that no pipeline changes when another is loaded.
sys.modules.pop(__name__, None)
if __spec__.cached is not None:
    pathlib.Path(__spec__.cached).unlink(missing_ok=True)
"""


@dataclass(frozen=True)
class Code:
    """A file of code that travels.

    Args:
        library: name of the file without its suffix.
        text: its content.
    """

    library: str
    text: str

    @property
    def file_name(self) -> str:
        return f"{self.library}.py"


def our_class(name: object, base: type = ModelMixin) -> type | None:
    """The public class of this package of that name, if there is one and it inherits from `base`."""
    found = getattr(diffusers_ext, name) if isinstance(name, str) and name in diffusers_ext.__all__ else None
    return found if found is not None and issubclass(found, base) else None


def component_code(class_name: str, component: str = "") -> Code:
    """The file of one of our models, named after the component, its family and a hash of the content.

    Args:
        class_name: a public class of `diffusers_ext.models`.
        component: of a pipeline, so that no two files of a repository share a name; empty for a model by itself.
    """
    module = inspect.getmodule(getattr(diffusers_ext, class_name))
    text = _flatten([module], _COMPONENT_START, _COMPONENT_END)
    family = _family(class_name)
    name = family if not component or family.startswith(f"{component}_") else f"{component}_{family}"
    return Code(f"{name}_{_digest(text)}", text)


def pipeline_code(class_name: str) -> Code:
    """`pipeline.py` of one of our pipelines: its own file, and before it the files of this package that it imports.

    Args:
        class_name: a public class of `diffusers_ext.pipelines`.
    """
    module = inspect.getmodule(getattr(diffusers_ext, class_name))
    text = _flatten([*_own_imports(module), module], "", _PIPELINE_END, "import pathlib\nimport sys\n")
    return Code(PIPELINE_FILE, text)


def blocks_code(class_name: str) -> Code:
    """The file of blocks of ours for Modular Diffusers, and before them the files of this package that they import.

    Args:
        class_name: a public class of `diffusers_ext.pipelines`.
    """
    module = inspect.getmodule(getattr(diffusers_ext, class_name))
    text = _flatten([*_own_imports(module), module], _COMPONENT_START, _COMPONENT_END)
    return Code(f"{_family(class_name)}_{_digest(text)}", text)


def plain_index(index: dict[str, Any]) -> dict[str, Any]:
    """The index of a self-contained repository of ours as that of one without code; any other one as it is.

    Args:
        index: content of a `model_index.json` or `modular_model_index.json`.
    """
    plain = dict(index)
    pipeline = index.get("_class_name")
    if isinstance(pipeline, list) and len(pipeline) == 2 and pipeline[0] == PIPELINE_FILE:
        if our_class(pipeline[1], DiffusionPipeline) is not None:
            plain["_class_name"] = pipeline[1]
    for name, value in index.items():
        if not name.startswith("_") and isinstance(value, list) and len(value) in (2, 3) and is_flat(*value[:2]):
            # The third of a modular index says again of which class the component is.
            where = [{**spec, "type_hint": [PACKAGE, value[1]]} for spec in value[2:] if isinstance(spec, dict)]
            plain[name] = [PACKAGE, value[1], *where]
    if blocks_library(index) is not None:
        del plain["auto_map"]
    return plain


def blocks_library(index: dict[str, Any]) -> str | None:
    """Name of the file with the blocks of a self-contained modular repository of ours, without its suffix, or None."""
    reference = index["auto_map"].get(BLOCKS) if isinstance(index.get("auto_map"), dict) else None
    library, _, class_name = reference.partition(".") if isinstance(reference, str) else (None, "", "")
    return library if is_flat(library, class_name, ModularPipelineBlocks) else None


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a self-contained model of ours as that of one without code; any other one as it is.

    Args:
        config: content of a `config.json`.
    """
    auto_map = config.get("auto_map")
    reference = auto_map.get("AutoModel") if isinstance(auto_map, dict) else None
    if isinstance(reference, str) and is_flat(*reference.partition(".")[::2]):
        return {key: value for key, value in config.items() if key != "auto_map"}
    return config


def is_flat(library: object, class_name: object, base: type = ModelMixin) -> bool:
    """Whether an index names code that we wrote for a class of ours, of this version of the package or another."""
    match = _FLAT_LIBRARY.fullmatch(library) if isinstance(library, str) else None
    return (
        match is not None
        and our_class(class_name, base) is not None
        and f"_{match['name']}".endswith(f"_{_family(class_name)}")
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:8]


def _family(class_name: str) -> str:
    return getattr(diffusers_ext, class_name).__module__.rpartition(".")[2]


def _own_imports(module: ModuleType) -> list[ModuleType]:
    """Modules of this package that a module needs at its top, each after those that it needs itself."""
    found: list[ModuleType] = []
    for node in ast.parse(inspect.getsource(module)).body:
        if not _imports_us(node):
            continue
        if not isinstance(node, ast.ImportFrom) or any(alias.asname for alias in node.names):
            raise RuntimeError(
                f"{module.__name__} has the import `{ast.unparse(node)}`; files that travel inside a repository "
                f"import from {PACKAGE} as `from {PACKAGE}.module import name` only, since they become one namespace."
            )
        needed = importlib.import_module(node.module)
        found += [each for each in [*_own_imports(needed), needed] if each not in found]
    return found


def _imports_us(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").partition(".")[0] == PACKAGE
    return isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == PACKAGE for alias in node.names)


def _flatten(modules: list[ModuleType], start: str, end: str, end_imports: str = "") -> str:
    """One file out of several: docstring of the last, imports of all, and their code one after the other.

    Functions that import from this package in their bodies, such as `from_single_file`, stay at home.
    """
    imports = list(ast.parse(end_imports).body)
    bodies, meanings = [], {}
    for module in modules:
        source = inspect.getsource(module)
        tree = ast.parse(source)
        own = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        imports += [node for node in own if not _imports_us(node)]
        cut = [*own, *_functions_that_import_us(tree)]
        if ast.get_docstring(tree) is not None:
            cut.append(tree.body[0])
        for name, meaning in _names(tree, module.__name__):
            if meanings.setdefault(name, meaning) != meaning:
                raise RuntimeError(
                    f"`{name}` is {meanings[name]} and {meaning}, in files which become one of a self-contained "
                    "repository; rename one of them."
                )
        body = _without(source, cut).strip("\n")
        bodies.append(body if module is modules[-1] else f"{_heading(module)}\n\n{body}")
    if len(modules) > 1:
        bodies[-1] = f"{_RULE}\n\n{bodies[-1]}"
    origin = ", ".join(module.__name__.removeprefix(f"{PACKAGE}.").replace(".", "/") + ".py" for module in modules)
    header = f"# Written by {PACKAGE} {diffusers_ext.__version__} from its {origin}.\n{_LICENSE}\n"
    text = (
        header + f'"""{modules[-1].__doc__}"""\n\n{_merged(imports)}{start}\n\n' + "\n\n\n".join(bodies) + f"\n\n{end}"
    )
    compile(text, origin, "exec")
    return text


def _heading(module: ModuleType) -> str:
    return f'{_RULE}\n"""{module.__doc__}"""'


def _functions_that_import_us(tree: ast.Module) -> list[ast.AST]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [node for node in functions if any(map(_imports_us, ast.walk(node)))]


def _names(tree: ast.Module, home: str) -> Iterator[tuple[str, str]]:
    """What a file calls by which name at its top, imports of this package left out."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, f"defined in {home}"
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)):
                yield name.id, f"defined in {home}"
        elif isinstance(node, ast.Import) and not _imports_us(node):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                yield alias.asname or top, f"the module {alias.name if alias.asname else top}"
        elif isinstance(node, ast.ImportFrom) and not _imports_us(node):
            for alias in node.names:
                yield alias.asname or alias.name, f"{alias.name} of {node.module}"


def _without(source: str, nodes: list[ast.AST]) -> str:
    """The source without these statements, and without more than two empty lines where one was."""
    lines = source.splitlines()
    dropped = set()
    for node in nodes:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        dropped |= set(range(first - 1, node.end_lineno))
        following = node.end_lineno  # the empty lines behind a method that goes
        while isinstance(node, ast.FunctionDef) and following < len(lines) and not lines[following].strip():
            dropped.add(following)
            following += 1
    return "\n".join(line for index, line in enumerate(lines) if index not in dropped) + "\n"


def _merged(nodes: list[ast.Import | ast.ImportFrom]) -> str:
    """Imports of several files as one block: the standard library, others, diffusers; each name once."""
    modules: set[str] = set()
    names: dict[str, set[str]] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {ast.unparse(alias) for alias in node.names}
        else:
            names.setdefault(node.module, set()).update(ast.unparse(alias) for alias in node.names)
    groups: dict[int, list[str]] = {}
    for module in sorted(modules):
        groups.setdefault(_rank(module), []).append(f"import {module}")
    for module in sorted(names):
        groups.setdefault(_rank(module), []).append(_import_line(module, sorted(names[module], key=_import_order)))
    return "\n\n".join("\n".join(lines) for _, lines in sorted(groups.items())) + "\n"


def _rank(module: str) -> int:
    top = module.partition(".")[0].partition(" ")[0]
    return 0 if top in sys.stdlib_module_names else 2 if top == "diffusers" else 1


def _import_order(name: str) -> tuple[int, str]:
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2), name


def _import_line(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= LINE_LENGTH:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in names) + ")"
