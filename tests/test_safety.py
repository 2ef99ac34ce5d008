"""Repositories of strangers that want more than to be loaded, and texts that tell more than they should.

Every hostile repository goes through three doors: those of this package (`check_folder`, `pull`, `load_pipeline`),
`from_pretrained` of a pipeline of this package, and `DiffusionPipeline.from_pretrained`. Whatever a door answers,
nothing of the repository may run, be imported, or reach a file outside; canaries would tell.
"""

import ast
import json
import os
import pickle
import re
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from diffusers import AutoModel, ConfigMixin, DDPMScheduler, DiffusionPipeline, ModelMixin, ModularPipeline
from diffusers.configuration_utils import register_to_config

import diffusers_ext
from diffusers_ext import ClassConditionalPipeline, DilatedConvDenoiserModel
from diffusers_ext.evaluation.drawing import DrawingOptions, open_pipeline
from diffusers_ext.evaluation.networks import load_network as load_vision_network
from diffusers_ext.hub import export, pull, push
from diffusers_ext.hub.loading import load_pipeline, open_folder
from diffusers_ext.hub.remote import create_repository
from diffusers_ext.hub.safety import (
    UnsafeRepositoryError,
    check_file_names,
    check_folder,
    check_index,
    check_safetensors,
    find_tokens,
    parse_json,
    redact,
    wanted_files,
)
from diffusers_ext.inspection.sources import find_sources as inspection_sources
from diffusers_ext.training.captions import CaptionEncoder
from diffusers_ext.training.config import CLASSIFIER_PRESETS, UNET_PRESETS
from diffusers_ext.training.loop import train
from diffusers_ext.training.tasks import ClassifierTask, UNetTask, load_network


Files = dict[str, "bytes | Link"]
INDEX = "model_index.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Link:
    """A symlink; `{outside}` in the target is a folder that no door may look into."""

    target: str


@dataclass(frozen=True)
class Case:
    """A hostile repository.

    Attributes:
        change: what is wrong with it, done to the files of a good one.
        reason: regular expression that every refusal of ours must match.
        theirs: what `DiffusionPipeline.from_pretrained` answers where that is not ours to give: a regular expression
            for its error, or "loads", which it does without doing what the repository wants.
    """

    change: Callable[[Files], None]
    reason: str
    theirs: str | None = None


def index(**entries) -> Callable[[Files], None]:
    """Other entries of model_index.json."""
    return edit(INDEX, **entries)


def edit(name: str, **entries) -> Callable[[Files], None]:
    """Other entries of a JSON file."""

    def change(files: Files) -> None:
        files[name] = json.dumps({**json.loads(files.get(name, b"{}")), **entries}).encode()

    return change


def add(name: str, content: "bytes | Link", **entries) -> Callable[[Files], None]:
    """Another file, and other entries of model_index.json."""

    def change(files: Files) -> None:
        files[name] = content
        if entries:
            index(**entries)(files)

    return change


def move(old: str, new: str, content: bytes | None = None) -> Callable[[Files], None]:
    """A file under another name."""

    def change(files: Files) -> None:
        moved = files.pop(old)
        files[new] = moved if content is None else content

    return change


def both(*changes: Callable[[Files], None]) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        for each in changes:
            each(files)

    return change


class Payload:
    """Unpickling it writes a file into the working folder."""

    def __reduce__(self):
        return open, ("canary", "w")


PICKLE = pickle.dumps(Payload())
CODE = b"open('canary', 'w')\nclass Evil: pass\n"
NO_LIBRARY = "is no library that models come from"
NO_COMPONENT = "is no model, scheduler, guider, text encoder, tokenizer or processor"
NO_PIPELINE = "is no pipeline of diffusers or diffusers_ext"
NO_NAME = "has no plain name"
NO_LIST = r"must be \[library, class\]"


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def shards(file: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": file}}).encode()


def header(length: int) -> bytes:
    return length.to_bytes(8, "little") + b'{"a":' + bytes(40)


CASES = {
    # libraries
    "library os": Case(index(unet=["os", "system"]), NO_LIBRARY),
    "library subprocess": Case(index(unet=["subprocess", "Popen"]), NO_LIBRARY),
    "library builtins": Case(index(unet=["builtins", "exec"]), NO_LIBRARY),
    "library posixpath": Case(index(scheduler=["posixpath", "join"]), NO_LIBRARY),
    "library torch.hub": Case(index(unet=["torch.hub", "load"]), NO_LIBRARY),
    "library of a model class": Case(index(unet=["torch.nn", "Linear"]), NO_LIBRARY),
    "library that is installed": Case(
        index(unet=["canary_module", "Evil"]), NO_LIBRARY, theirs="has not been imported"
    ),
    "library relative": Case(index(unet=[".unet", "Evil"]), NO_LIBRARY),
    "library in a parent folder": Case(index(unet=["../../canary_module", "Evil"]), NO_LIBRARY),
    "library dotted": Case(index(unet=["diffusers_ext.hub.safety", "os"]), NO_LIBRARY),
    "library inside diffusers": Case(index(unet=["pipeline_utils", "DiffusionPipeline"]), NO_LIBRARY),
    "library with a look-alike letter": Case(index(unet=["d\u0456ffusers", "UNet2DModel"]), NO_LIBRARY),
    "library with a null byte": Case(index(unet=["diffusers\0", "UNet2DModel"]), NO_LIBRARY),
    "library empty": Case(index(unet=["", "UNet2DModel"]), NO_LIBRARY),
    # classes
    "class that is a function": Case(index(unet=["diffusers_ext", "register"]), NO_COMPONENT),
    "class that is a module": Case(index(unet=["diffusers", "utils"]), NO_COMPONENT),
    "class of the system": Case(index(unet=["transformers", "system"]), NO_COMPONENT),
    "class with dunders": Case(index(unet=["diffusers", "__class__"]), NO_NAME),
    "class with a path": Case(index(unet=["diffusers", "utils.os.system"]), NO_NAME),
    "class of any model": Case(index(unet=["transformers", "AutoModel"]), NO_COMPONENT),
    "class that is a base": Case(index(unet=["diffusers", "ModelMixin"]), NO_COMPONENT),
    "class that is a pipeline": Case(index(unet=["diffusers", "DiffusionPipeline"]), NO_COMPONENT),
    "class with a look-alike letter": Case(index(unet=["diffusers_ext", "D\u0456latedConvDenoiserModel"]), NO_NAME),
    # entries
    "entry that is an object": Case(index(unet={"library": "os", "class": "system"}), NO_LIST),
    "entry that is a text": Case(index(unet="os.system"), NO_LIST),
    "entry with nested lists": Case(index(unet=[["os"], ["system"]]), NO_LIST),
    "entry with an object inside": Case(index(unet=["diffusers_ext", {"name": "DilatedConvDenoiserModel"}]), NO_LIST),
    "entry too short": Case(index(unet=["diffusers_ext"]), NO_LIST),
    "entry too long": Case(index(unet=["diffusers_ext", "DilatedConvDenoiserModel", "os", "system"]), NO_LIST),
    "entry empty": Case(index(unet=[]), NO_LIST),
    "entry half null": Case(index(unet=[None, "system"]), NO_LIST),
    "entry that is a number": Case(index(unet=10**400), "is not JSON|must be .library, class|may be"),
    "option that is a component": Case(index(id2label=["os", "system"]), NO_LIBRARY),
    "option of huge size": Case(index(null_class_label=10**30), "may be 9007199254740992 at most"),
    "option that names a target": Case(index(id2label={"0": {"_target_": "os.system"}}), "choose what to call"),
    "component in a parent folder": Case(index(**{"../unet": ["diffusers", "UNet2DModel"]}), "named by a plain word"),
    "component of dunders": Case(index(__class__=["diffusers", "UNet2DModel"]), "named by a plain word"),
    # the pipeline
    "pipeline that is a list of modules": Case(
        index(_class_name=["os", "system"]), "but a module or a path", theirs="attribute name must be string"
    ),
    "pipeline in a parent folder": Case(
        index(_class_name=["../pipeline", "Evil"]), "but a module or a path", theirs="attribute name must be string"
    ),
    "pipeline without its file": Case(
        index(_class_name=["pipeline", "Evil"]), "has no file pipeline.py", theirs="attribute name must be string"
    ),
    "pipeline that is an object": Case(
        index(_class_name={"a": 1}), "must be the name of a pipeline", theirs="attribute name must be string"
    ),
    "pipeline that is a dunder": Case(index(_class_name="__loader__"), NO_PIPELINE, theirs="has no attribute"),
    "pipeline that is a function": Case(index(_class_name="utils"), NO_PIPELINE, theirs="has no attribute"),
    "pipeline that is a model": Case(index(_class_name="UNet2DModel"), NO_PIPELINE, theirs="has no attribute"),
    "pipeline that does not exist": Case(index(_class_name="EvilPipeline"), NO_PIPELINE, theirs="has no attribute"),
    "name of origin that is a list": Case(index(_name_or_path=["/etc/passwd"]), "must be a text"),
    "files to ignore that are objects": Case(
        index(_ignore_files=[{"a": 1}]), "must hold names of files", theirs="loads"
    ),
    # the JSON itself
    "index nested deeply": Case(add(INDEX, nested(100)), "nested deeper than 32", theirs="KeyError: '_class_name'"),
    "index nested very deeply": Case(add(INDEX, nested(100_000)), "nested deeper than 32", theirs="RecursionError"),
    "index with a key twice": Case(
        add(INDEX, b'{"unet": [null, null], "unet": ["os", "system"]}'),
        "has the key 'unet' twice",
        theirs="KeyError: '_class_name'",
    ),
    "index with NaN": Case(index(null_class_label=float("nan")), "holds NaN|no finite number"),
    "index with infinity": Case(index(null_class_label=float("inf")), "no finite number"),
    "index that is a list": Case(add(INDEX, b'["os", "system"]'), "holds no object", theirs="Error"),
    "index that is no JSON": Case(add(INDEX, b"import os"), "is not JSON", theirs="is not a valid JSON file"),
    "index that is no UTF-8": Case(add(INDEX, b'{"\xff": 1}'), "is not UTF-8", theirs="is not a valid JSON file"),
    "index of 50 MB": Case(add(INDEX, b" " * 50_000_000 + b"{}"), "oversized", theirs="KeyError: '_class_name'"),
    # configs of components
    "config of 5 MB": Case(edit("unet/config.json", note="x" * 5_000_000), "oversized"),
    "config nested deeply": Case(edit("unet/config.json", note=json.loads(nested(50))), "nested deeper than 32"),
    "config that is a list": Case(add("unet/config.json", b"[]"), "holds no object"),
    "config that names a target": Case(edit("unet/config.json", _target_="os.system"), "choose what to call"),
    "config with code elsewhere": Case(
        edit("unet/config.json", auto_map={"AutoModel": "evil/repo--unet.Evil"}),
        "code that is not its own|a module or a path",
    ),
    "config with code of a module": Case(
        edit("unet/config.json", auto_map={"AutoModel": "os.system"}), "but a module or a path"
    ),
    "config with code that is not there": Case(
        edit("unet/config.json", auto_map={"AutoModel": "evil.Evil"}), "has no file evil.py"
    ),
    "config with a quantiser of others": Case(
        edit("unet/config.json", quantization_config={"quant_method": "modelopt", "quant_type": "x"}),
        "only weights of bitsandbytes or torchao",
    ),
    "config with a quantiser's call": Case(
        edit(
            "unet/config.json",
            quantization_config={
                "quant_method": "torchao",
                "quant_type": {"default": {"_type": "os.system", "_data": {}}},
            },
        ),
        "no config of torchao",
    ),
    "config of a class with dunders": Case(
        edit("unet/config.json", _class_name="__import__"), "plain name of a class"
    ),
    "config of a class that is a list": Case(
        edit("unet/config.json", _class_name=["os", "system"]), "plain name of a class"
    ),
    "scheduler of a trillion steps": Case(
        edit("scheduler/scheduler_config.json", num_train_timesteps=10**12), "1000000 at most", theirs="allocate"
    ),
    "scheduler with a target": Case(
        edit("scheduler/scheduler_config.json", _target_="os.system"), "choose what to call", theirs="loads"
    ),
    "tokenizer with code": Case(
        both(
            index(tokenizer=["transformers", "CLIPTokenizer"]),
            edit("tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}),
            add("tokenizer/evil.py", CODE),
        ),
        "code that is not its own",
        theirs=".",
    ),
    "tokenizer with a file elsewhere": Case(
        both(
            index(tokenizer=["transformers", "CLIPTokenizer"]),
            edit("tokenizer/tokenizer_config.json", vocab_file="/etc/passwd"),
        ),
        "a path outside of the repository",
        theirs=".",
    ),
    # weights
    "weights that are a link elsewhere": Case(
        add(WEIGHTS, Link("{outside}/secret.safetensors")), "is a symlink to .*, outside of the folder"
    ),
    "weights that are a link to passwd": Case(
        add(WEIGHTS, Link("/etc/passwd")), "is a symlink to '/etc/passwd', outside"
    ),
    "weights that are a link to nothing": Case(
        add(WEIGHTS, Link("nothing.safetensors")), "symlink to a file that is not there"
    ),
    "config that is a link elsewhere": Case(
        add("scheduler/scheduler_config.json", Link("{outside}/scheduler_config.json")),
        "is a symlink to .*, outside of the folder",
        theirs="loads",
    ),
    "component that is a link elsewhere": Case(
        both(move(WEIGHTS, "README.md"), move("unet/config.json", "NOTICE"), add("unet", Link("{outside}/unet"))),
        "is a link to a folder elsewhere",
        theirs="loads",
    ),
    "weights that are a pipe": Case(add(WEIGHTS, Link("pipe")), "is no regular file"),
    "weights that are a pickle": Case(
        move(WEIGHTS, "unet/diffusion_pytorch_model.bin", PICKLE), "may hold pickled objects"
    ),
    "weights that pose as safetensors": Case(add(WEIGHTS, PICKLE), "is a pickle under the name"),
    "weights that pose as safetensors in a zip": Case(
        add(WEIGHTS, b"PK\x03\x04" + bytes(60)), "is a pickle under the name"
    ),
    "weights with a header of 10 GB": Case(add(WEIGHTS, header(10 << 30)), "promises a header of 10737418240 bytes"),
    "weights with a header of no JSON": Case(add(WEIGHTS, header(45)), "its header is wrong"),
    "weights that are cut off": Case(add(WEIGHTS, b"\x10"), "is no safetensors file"),
    "shards in a parent folder": Case(
        both(move(WEIGHTS, "unet/a.safetensors"), add(f"{WEIGHTS}.index.json", shards("../../secret.safetensors"))),
        "leads out of its folder",
    ),
    "shards at an absolute path": Case(
        both(move(WEIGHTS, "unet/a.safetensors"), add(f"{WEIGHTS}.index.json", shards("/etc/passwd"))),
        "leads out of its folder",
    ),
    "shards that are not there": Case(
        both(move(WEIGHTS, "unet/a.safetensors"), add(f"{WEIGHTS}.index.json", shards("b.safetensors"))),
        "is not there",
    ),
    "shards without a list": Case(
        both(move(WEIGHTS, "unet/a.safetensors"), add(f"{WEIGHTS}.index.json", b'{"weight_map": "/etc/passwd"}')),
        "has no .weight_map.",
    ),
    # code
    "code in place of a library": Case(
        add("unet/diffusers_ext.py", CODE), "would be run in place of the library", theirs="contains custom code"
    ),
    "code named like a module of Python": Case(
        add("unet/subprocess.py", CODE, unet=["subprocess", "Evil"]),
        "but a module or a path",
        theirs=NO_LIBRARY,
    ),
}

# Names that a folder cannot have, or that a system may read as another; such repositories are on the Hub only.
NAMES = {
    "name that leads out": ("../evil.txt", "leads out of the repository"),
    "name that leads out from below": ("unet/../../evil.txt", "leads out of the repository"),
    "name that is absolute": ("/tmp/evil.txt", "is an absolute path"),
    "name of a home": ("~/.ssh/evil.txt", "is an absolute path"),
    "name with a drive": ("C:/evil.txt", "names a drive"),
    "name with backslashes": ("unet\\..\\..\\evil.txt", "holds a backslash"),
    "name with an empty part": ("unet//evil.txt", "leads out of the repository"),
    "name with a line break": ("evil\n.txt", "control or invisible"),
    "name with a null byte": ("evil\0.txt", "control or invisible"),
    "name written backwards": ("evil\u202etxt.exe", "control or invisible"),
    "name that differs by a capital": ("unet/Config.json", "are one file"),
    "name of a folder that differs by a capital": ("UNet/evil.txt", "are one file"),
    "name of 300 letters": ("e" * 300 + ".txt", "is too long"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Files:
    """A tiny pipeline that every door opens."""
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    unet = DilatedConvDenoiserModel(sample_size=8, hidden_channels=(8, 8), time_embedding_dim=8)
    ClassConditionalPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def outside(tmp_path_factory, good) -> Path:
    """A folder that no door may look into, with what a link would need to succeed."""
    folder = tmp_path_factory.mktemp("outside")
    write(folder, {**good, "secret.safetensors": good[WEIGHTS]}, folder)
    write(folder, {"scheduler_config.json": good["scheduler/scheduler_config.json"]}, folder)
    return folder


@pytest.fixture
def canaries(tmp_path, outside, monkeypatch):
    """Fails a test in which something of a repository ran, was imported, or looked or wrote where it must not.

    The working folder is one that payloads write into; a module that the repositories name can be imported.
    """
    cage = tmp_path / "cage"
    cage.mkdir()
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "canary_module.py").write_bytes(CODE)
    monkeypatch.syspath_prepend(modules)
    monkeypatch.chdir(cage)
    before, below = set(sys.modules), sorted(outside.rglob("*"))
    AUDIT.update(outside=str(outside), seen=[])
    yield AUDIT
    AUDIT["outside"] = None
    assert not list(cage.iterdir()), "something wrote into the working folder"
    assert sorted(outside.rglob("*")) == below, "something was written outside"
    strange = [name for name in set(sys.modules) - before if name.startswith(("canary", "diffusers_modules"))]
    assert not strange, f"imported: {strange}"
    commands = [event for event in AUDIT["seen"] if event[0] != "open"]
    assert not commands, f"a command was run: {commands}"


AUDIT: dict = {"outside": None, "seen": []}


def _audit(event: str, arguments: tuple) -> None:
    if AUDIT["outside"] is None or threading.current_thread() is not threading.main_thread():
        return
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"):
        AUDIT["seen"].append((event, arguments))
    elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if path.startswith(AUDIT["outside"]) or path == "/etc/passwd":
            AUDIT["seen"].append((event, path))


sys.addaudithook(_audit)


def write(folder: Path, files: Files, outside: Path) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content.target == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(content.target.format(outside=outside))
    return folder


def answer(door: Callable[[], object]) -> str:
    """What a door did: "loads", or its error."""
    try:
        door()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loads"


def test_the_good_one_passes_every_door(good, outside, canaries, tmp_path, hub, hub_token):
    folder = write(tmp_path / "good", good, outside)
    check_folder(folder)
    hub.create("me/good")
    hub.write("me/good", {**good, "evil.py": CODE, "evil.bin": PICKLE, "evil.npz": b"PK", "README.md": b"# Good"})
    pulled = pull("me/good")
    assert {str(path.relative_to(pulled)) for path in pulled.rglob("*") if path.is_file()} == {
        ".gitattributes", "README.md", *good,
    }  # fmt: skip
    for pipe in (
        ClassConditionalPipeline.from_pretrained(folder),
        DiffusionPipeline.from_pretrained(folder),
        load_pipeline("me/good"),
    ):
        assert type(pipe) is ClassConditionalPipeline
    assert not canaries["seen"]


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_repository_loads_nothing_and_says_why(name, good, outside, canaries, tmp_path, hub, hub_token):
    case, files = CASES[name], dict(good)
    case.change(files)
    folder = write(tmp_path / "repository", files, outside)
    for door in (check_folder, open_folder, load_pipeline, ClassConditionalPipeline.from_pretrained):
        said = answer(lambda: door(str(folder)))
        assert said.startswith("UnsafeRepositoryError: ") and re.search(case.reason, said), f"{door.__name__}: {said}"
        assert len(said) < 700 and said.isascii() and "\n" not in said
    assert not canaries["seen"]

    if not any(isinstance(content, Link) for content in files.values()):
        repository = f"me/hostile-{list(CASES).index(name)}"
        hub.create(repository)
        hub.write(repository, files)
        said = answer(lambda: pull(repository))
        assert said.startswith("UnsafeRepositoryError: ") and re.search(case.reason, said), said
        assert not canaries["seen"]

    said = answer(lambda: DiffusionPipeline.from_pretrained(folder))
    if case.theirs is None:
        assert said.startswith("UnsafeRepositoryError: ") and re.search(case.reason, said), said
        assert not canaries["seen"]
    else:
        assert said == "loads" if case.theirs == "loads" else re.search(case.theirs, said), said


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_name_of_a_file_is_not_downloaded(name, good, canaries, tmp_path, hub, hub_token):
    file, reason = NAMES[name]
    repository = f"me/hostile-name-{list(NAMES).index(name)}"
    hub.create(repository)
    hub.write(repository, {**good, file: b"evil"})
    hub.clear_log()
    with pytest.raises(UnsafeRepositoryError, match=reason):
        pull(repository, tmp_path / "pulled")
    assert not [request for request in hub.log if "/resolve/" in request.path], "something was downloaded"
    with pytest.raises(UnsafeRepositoryError, match=reason):
        check_file_names([*good, file], "x")
    for door in (ClassConditionalPipeline, DiffusionPipeline):  # they fetch files of components only
        assert type(door.from_pretrained(repository)) is ClassConditionalPipeline
    assert not list(tmp_path.rglob("*evil*")) and not canaries["seen"]


def modular(unet: list | None = None, **entries) -> Callable[[Files], None]:
    """A modular index in place of the standard one."""
    spec = {"type_hint": ["diffusers_ext", "DilatedConvDenoiserModel"], "subfolder": "unet"}
    index = {
        "_class_name": "ModularPipeline",
        "_blocks_class_name": "ClassConditionalBlocks",
        "unet": unet or ["diffusers_ext", "DilatedConvDenoiserModel", spec],
    }

    def change(files: Files) -> None:
        del files[INDEX]
        files["modular_model_index.json"] = json.dumps({**index, **entries}).encode()

    return change


def unet_from(**spec) -> list:
    hint = {"type_hint": ["diffusers_ext", "DilatedConvDenoiserModel"], "subfolder": "unet"}
    return ["diffusers_ext", "DilatedConvDenoiserModel", {**hint, **spec}]


MODULAR = {
    "modular library": (modular(["subprocess", "Popen", {"type_hint": ["subprocess", "Popen"]}]), NO_LIBRARY),
    "modular type": (modular(unet_from(type_hint=["os", "system"])), NO_LIBRARY),
    "modular type that is a text": (modular(unet_from(type_hint="os.system")), "must be a class"),
    "modular origin that is a path": (
        modular(unet_from(pretrained_model_name_or_path="/etc", subfolder="ssl")),
        "paths and addresses are not followed",
    ),
    "modular origin in a parent folder": (modular(unet_from(pretrained_model_name_or_path="../..")), "not followed"),
    "modular origin that is an address": (
        modular(unet_from(pretrained_model_name_or_path="https://evil.example/pytorch.ckpt")),
        "not followed",
    ),
    "modular origin that is an object": (modular(unet_from(pretrained_model_name_or_path={"a": 1})), "must be a text"),
    "modular folder in a parent folder": (modular(unet_from(subfolder="../..")), "from the folder"),
    "modular revision of another branch": (modular(unet_from(revision="main/../../x")), "no plain word"),
    "modular blocks that are a module": (modular(_blocks_class_name="utils"), NO_PIPELINE),
    "modular blocks that are a list": (modular(_blocks_class_name=["os", "system"]), NO_PIPELINE),
    "modular code of a module": (modular(auto_map={"ModularPipelineBlocks": "os.system"}), "a module or a path"),
    "modular code elsewhere": (modular(auto_map={"ModularPipelineBlocks": "evil/x--a.B"}), "a module or a path"),
}


@pytest.mark.parametrize("name", MODULAR)
def test_a_hostile_modular_repository_loads_nothing_and_says_why(
    name, good, outside, canaries, tmp_path, hub, hub_token
):
    change, reason = MODULAR[name]
    files = dict(good)
    change(files)
    folder = write(tmp_path / "repository", files, outside)
    repository = f"me/hostile-modular-{list(MODULAR).index(name)}"
    hub.create(repository)
    hub.write(repository, files)
    blocks = diffusers_ext.ClassConditionalBlocks
    for door in (
        lambda: check_folder(folder),
        lambda: pull(repository),
        lambda: blocks().init_pipeline(str(folder)),
        lambda: blocks().init_pipeline(repository),
    ):
        said = answer(door)
        assert said.startswith("UnsafeRepositoryError: ") and re.search(reason, said), said
    answer(lambda: ModularPipeline.from_pretrained(folder).load_components())  # whatever it says, nothing runs
    assert not canaries["seen"]


SINGLE = {
    "single model of a class that is a pipeline": (
        {"_class_name": "DDPMPipeline"},
        "is no model|only models of diffusers",
    ),
    "single model of a class that is a function": ({"_class_name": "utils"}, "is no model|only models of diffusers"),
    "single model of no class": ({"_class_name": "EvilModel"}, "is no model|only models of diffusers"),
    "single model with code elsewhere": ({"auto_map": {"AutoModel": "evil/x--a.B"}}, "a module or a path"),
    "single model with code for transformers": ({"auto_map": {"AutoConfig": "evil.Evil"}}, "code that is not its own"),
    "single model with a target": ({"_target_": "os.system"}, "choose what to call"),
}


@pytest.mark.parametrize("name", SINGLE)
def test_a_hostile_single_model_loads_nothing_and_says_why(name, good, outside, canaries, tmp_path, hub, hub_token):
    change, reason = SINGLE[name]
    files = {file.removeprefix("unet/"): content for file, content in good.items() if file.startswith("unet/")}
    edit("config.json", **change)(files)
    folder = write(tmp_path / "repository", files, outside)
    repository = f"me/hostile-single-{list(SINGLE).index(name)}"
    hub.create(repository)
    hub.write(repository, files)
    for door in (
        check_folder,
        DilatedConvDenoiserModel.from_pretrained,
        lambda path: pull(repository),
        lambda path: load_network(str(path), ("unet",)),
        lambda path: inspection_sources(str(path)),
    ):
        said = answer(lambda: door(folder))
        assert "Error: " in said and re.search(reason, said), said
    answer(lambda: AutoModel.from_pretrained(str(folder)))
    assert not canaries["seen"]


def test_code_of_a_repository_runs_only_where_its_user_says_so(good, outside, canaries, tmp_path, hub, hub_token):
    files = {**good, "pipeline.py": CODE, "unet/my_unet.py": CODE, "unet/other.py": CODE}
    index(_class_name=["pipeline", "Evil"], unet=["my_unet", "Evil"])(files)
    folder = write(tmp_path / "repository", files, outside)
    check_folder(folder)
    hub.create("me/with-code")
    hub.write("me/with-code", files)
    pulled = pull("me/with-code")
    assert (pulled / "pipeline.py").is_file() and (pulled / "unet/my_unet.py").is_file()
    assert not (pulled / "unet/other.py").exists()
    for name in (folder, "me/with-code"):
        with pytest.raises(ValueError, match="trust_remote_code"):
            DiffusionPipeline.from_pretrained(name)
        with pytest.raises(ValueError, match="trust_remote_code"):
            load_pipeline(name)
        with pytest.raises(ValueError):
            ClassConditionalPipeline.from_pretrained(name)


def test_our_class_fetches_no_pipeline_of_the_community(good, canaries, hub, hub_token):
    """`DiffusionPipeline` takes a file that an index names and the repository lacks from a repository of diffusers."""
    files = dict(good)
    index(_class_name=["lpw_stable_diffusion", "Evil"])(files)
    hub.create("me/community")
    hub.write("me/community", files)
    assert type(ClassConditionalPipeline.from_pretrained("me/community")) is ClassConditionalPipeline
    for door in (pull, load_pipeline):
        with pytest.raises(UnsafeRepositoryError, match="has no file lpw_stable_diffusion.py"):
            door("me/community")
    assert not [request for request in hub.log if "community-pipelines" in request.path]


def test_code_of_ours_in_a_repository_is_left_for_the_installed_one(good, outside, canaries, tmp_path):
    export(str(write(tmp_path / "good", good, outside)), tmp_path / "with-code", self_contained=True)
    assert json.loads((tmp_path / "with-code" / INDEX).read_text())["_class_name"][0] == "pipeline"
    (tmp_path / "with-code" / "pipeline.py").write_bytes(CODE)
    pipe = load_pipeline(tmp_path / "with-code")
    assert type(pipe) is ClassConditionalPipeline and type(pipe.unet) is DilatedConvDenoiserModel


@pytest.mark.parametrize(
    "argument", ["model", "pretrained_model_name_or_path", "unet", "vae", "source", "text_encoder"]
)
def test_every_loader_of_ours_refuses(argument, good, outside, canaries, tmp_path):
    files = {**good, WEIGHTS: Link("{outside}/secret.safetensors")}
    pipeline = str(write(tmp_path / "pipeline", files, outside))
    single = str(tmp_path / "pipeline" / "unet")
    encoder = {"config.json": b'{"model_type": "bert", "auto_map": {"AutoModel": "evil.Evil"}}', "evil.py": CODE}
    text = str(write(tmp_path / "text", encoder, outside))
    images = {"dataset": "digits", "output_dir": str(tmp_path / "run")}
    door = {
        "model": lambda: open_pipeline(DrawingOptions(model=pipeline)),
        "pretrained_model_name_or_path": lambda: load_network(pipeline, ("unet",)),
        "unet": lambda: ClassifierTask(replace(CLASSIFIER_PRESETS["digits"], unet=pipeline, **images)),
        "vae": lambda: UNetTask(replace(UNET_PRESETS["digits"], vae=single, learned_variance=False, **images)),
        "source": lambda: load_vision_network(single),
        "text_encoder": lambda: CaptionEncoder.from_pretrained(text),
    }[argument]
    reason = "code that is not its own|no file|evil" if argument == "text_encoder" else "is a symlink to"
    with pytest.raises(ValueError, match=reason):
        door()
    assert not canaries["seen"]


def test_a_snapshot_in_the_cache_of_the_hub_is_a_folder_like_any_other(good, hub, hub_token, tmp_path, monkeypatch):
    hub.create("me/cached")
    hub.write("me/cached", good)
    snapshot = pull("me/cached", cache_dir=tmp_path / "cache")
    assert (snapshot / WEIGHTS).is_symlink()
    for folder in (snapshot, snapshot / "unet"):
        assert open_folder(folder) == folder
    (tmp_path / "link").symlink_to(snapshot)
    check_folder(tmp_path / "link")
    (snapshot / "unet" / "config.json").unlink()
    (snapshot / "unet" / "config.json").symlink_to(tmp_path / "cache" / "elsewhere.json")
    (tmp_path / "cache" / "elsewhere.json").write_bytes(good["unet/config.json"])
    with pytest.raises(UnsafeRepositoryError, match="outside of the folder"):
        open_folder(snapshot)


class OwnModel(ModelMixin, ConfigMixin):
    """A model of a user, in a module that the process has imported."""

    @register_to_config
    def __init__(self, in_channels: int = 1):
        super().__init__()
        self.conv = torch.nn.Conv2d(in_channels, in_channels, 1)


def test_a_users_own_classes_are_not_refused(tmp_path):
    class OwnPipeline(ClassConditionalPipeline):
        pass

    unet = DilatedConvDenoiserModel(sample_size=8, hidden_channels=(8, 8), time_embedding_dim=8)
    pipe = OwnPipeline(unet=unet, scheduler=DDPMScheduler())
    pipe.register_modules(vae=OwnModel())
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / INDEX).read_text())["vae"] == [__name__, "OwnModel"]
    check_folder(tmp_path)
    with pytest.raises(UnsafeRepositoryError, match="import it first"):
        check_index({"_class_name": "OwnPipeline", "vae": ["another_module", "OwnModel"]}, "x", [])


def test_parsing_leaves_what_loaders_need():
    assert parse_json(b'{"lambda_min_clipped": -Infinity, "a": [1, 2.5, null, "\\u00e9"]}', "x") == {
        "lambda_min_clipped": -float("inf"),
        "a": [1, 2.5, None, "é"],
    }
    assert parse_json(nested(32), "x")
    for content in (
        nested(33),
        b'{"a": {"b": 1, "b": 2}}',
        b'{"a": 1e999}',
        b"[NaN]",
        b"{",
        b"\xff",
        b" " * 50_000_000,
    ):
        with pytest.raises(UnsafeRepositoryError):
            parse_json(content, "x")


def test_what_is_downloaded():
    sizes = dict.fromkeys(
        [
            "README.md",
            "LICENSE",
            "model_index.json",
            "unet/config.json",
            WEIGHTS,
            "unet/unet_a.py",
            "unet/b.py",
            "setup.py",
        ]
        + ["pipeline.py", "samples/1.png", "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/spiece.model"]
        + [f"unet/a{suffix}" for suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5", ".npy", ".npz")]
        + ["model.onnx", "run.sh", "a.exe", "a.so", "a.ipynb", "checkpoint/optimizer.bin", "a.html"],
        10,
    )
    index = {"_class_name": ["pipeline", "A"], "unet": ["unet_a", "B"], "scheduler": ["diffusers", "DDPMScheduler"]}
    code = {"pipeline.py", "unet/unet_a.py"}
    data = {"README.md", "LICENSE", "model_index.json", "unet/config.json", WEIGHTS, "samples/1.png"}
    data |= {"tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/spiece.model"}
    assert set(wanted_files(sizes, index, "x")) == data | code
    assert set(wanted_files(sizes, None, "x")) == data
    with pytest.raises(UnsafeRepositoryError, match="oversized"):
        wanted_files({"unet/config.json": 5 << 20}, None, "x")
    with pytest.raises(UnsafeRepositoryError, match="more than 10000 files"):
        wanted_files({f"{number}.json": 1 for number in range(10_001)}, None, "x")


@pytest.mark.parametrize("length", [0x0580, 0x0280, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_is_none(length, tmp_path):
    """The first bytes of a safetensors file are a number: it may read as those of a pickle or a zip."""
    content = b'{"__metadata__":{"a":"' + b"x" * (length - 25) + b'"}}'
    (tmp_path / "a.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)
    assert len(content) == length
    check_safetensors(tmp_path / "a.safetensors")


TOKEN = "hf_" + "abcdefghij" * 3 + "WXYZ"


def test_tokens_are_found_and_left_out(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token/of another form")
    text = f"GET https://me:secret@host/x?a={TOKEN} Bearer api_org_{'k' * 34}, "
    text += "a-token/of another form: a-token%2Fof%20another%20form"
    assert find_tokens(text) == [
        TOKEN, f"api_org_{'k' * 34}", "me:secret", "a-token/of another form", "a-token%2Fof%20another%20form",
    ]  # fmt: skip
    assert redact(text) == "GET https://***@host/x?a=*** Bearer ***, ***: ***"
    assert redact("a word given by hand", "word", None) == "a *** given by hand"
    plain = "from huggingface_hub import hf_hub_download  # HF_TOKEN, https://hf.co/me/x:y@main, git@host:me/x"
    assert not find_tokens(plain) and redact(plain) == plain


def test_tokens_do_not_get_out(hub, hub_token, good, outside, tmp_path, caplog, capfd, monkeypatch):
    """A training that publishes, a push and pulls that fail: logs, output, errors, files and what the Hub was sent."""
    from diffusers.utils import logging as diffusers_logging

    caplog.set_level("DEBUG")
    diffusers_logging.enable_propagation()
    wrong, errors = "hf_" + "w" * 34, []
    config = replace(
        UNET_PRESETS["digits"],
        output_dir=str(tmp_path / "token-run"),
        block_out_channels=(8, 16),
        attention_head_dim=8,
        max_train_steps=1,
        train_batch_size=4,
        validation_images=4,
        validation_inference_steps=1,
        push_to_hub=True,
        report_to="none",
    )
    try:
        train(config)
        folder = write(tmp_path / "good", good, outside)
        push(folder, "me/tokens", token=hub_token)
        for attempt in (
            lambda: push(folder, "me/tokens", token=wrong),
            lambda: pull("me/tokens", token=wrong),
            lambda: push(folder, f"me/{hub_token}"),
            lambda: pull(f"https://me:{hub_token}@huggingface.co/me/tokens"),
            lambda: pull(f"me/{wrong}"),
            lambda: open_folder(f"./{hub_token}"),
            lambda: load_pipeline(f"me/{hub_token}"),
            lambda: create_repository(f"other/{hub_token}"),
            lambda: check_folder(write(tmp_path / hub_token, {INDEX: b"[]"}, outside)),
            lambda: check_index({"_class_name": hub_token}, "x"),
            lambda: train(replace(config, output_dir=str(tmp_path / "second"), hub_model_id=f"other/{wrong}")),
        ):
            with pytest.raises((ValueError, OSError)) as caught:
                attempt()
            errors.append("".join(traceback.format_exception(caught.value)))
    finally:
        diffusers_logging.disable_propagation()
    output = capfd.readouterr()
    told = {"log": caplog.text, "output": output.out, "errors": output.err, "exceptions": "\n".join(errors)}
    for path in [*tmp_path.rglob("*")]:
        if path.is_file():
            told[str(path.relative_to(tmp_path))] = path.read_bytes().decode("latin-1")
    for repository in ("me/token-run", "me/tokens"):
        told |= {name: content.decode("latin-1") for name, content in hub.files(repository).items()}
    assert len(errors) == 11 and "token-run" in told["log"] + told["output"]
    for place, text in told.items():
        for token in (hub_token, wrong):
            start = text.find(token)
            assert start < 0, f"a token in {place}: ...{text[max(start - 300, 0) : start]}"


def test_nothing_of_ours_unpickles_or_trusts(root):
    """Calls in the sources, whatever they are called through."""
    calls = 0
    for path in [*(root / "diffusers_ext").rglob("*.py"), *(root / "pipelines").rglob("*.py")]:
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                imported |= {getattr(node, "module", None), *(alias.name for alias in node.names)}
            if not isinstance(node, ast.Call):
                continue
            calls += 1
            place = f"{path.relative_to(root)}:{node.lineno}"
            name = ast.unparse(node.func)
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            assert options.get("trust_remote_code", "False") == "False", place
            assert name not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec"), place
            if name == "torch.load":
                assert options.get("weights_only") == "True", place
            if name in ("np.load", "numpy.load"):
                assert options.get("allow_pickle", "False") == "False", place
        assert not imported & {"dill", "cloudpickle", "joblib", "marshal", "shelve"}, path
    assert calls > 1000


def test_the_canaries_sing(outside, canaries, tmp_path, monkeypatch):
    """What the other tests would see, had something run."""
    loose = tmp_path / "loose"
    loose.mkdir()
    monkeypatch.chdir(loose)
    pickle.loads(PICKLE).close()
    assert (loose / "canary").is_file()
    (outside / "secret.safetensors").read_bytes()
    assert canaries["seen"].pop() == ("open", str(outside / "secret.safetensors"))
    os.system("true")
    assert canaries["seen"].pop()[0] == "os.system" and not canaries["seen"]
    (loose / "canary").unlink()
    __import__("canary_module")
    assert (loose / "canary").is_file() and sys.modules.pop("canary_module")
