"""Export: folders that are repositories, code that travels, and uploads of diffusers that go the same way."""

import ast
import copy
import importlib
import inspect
import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import test_captions as captions
import test_pipeline_class_conditional as conditional
import test_pipeline_classifier_guided as guided
import torch
from peft import LoraConfig

import diffusers
from diffusers import (
    AdaptiveProjectedGuidance,
    AutoModel,
    ClassifierFreeGuidance,
    ConfigMixin,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    ModelMixin,
    ModularPipeline,
)
from diffusers.utils import PushToHubMixin

import diffusers_ext
from diffusers_ext import ClassConditionalPipeline, ClassifierGuidedPipeline, registration
from diffusers_ext.hub import export, flattening
from diffusers_ext.hub.export import stage
from diffusers_ext.hub.flattening import component_code, pipeline_code, plain_config, plain_index
from diffusers_ext.training.tasks import load_network


PIPELINES = {
    "guided": lambda: guided.tiny_pipe(
        guided.tiny_unet(out_channels=6), scheduler=DDPMScheduler(variance_type="learned_range")
    ),
    "guided-unconditional": lambda: guided.tiny_pipe(classifier=None),
    "guided-with-guider": lambda: guided.tiny_pipe(guider=AdaptiveProjectedGuidance(guidance_scale=3.0)),
    **{name: lambda name=name: conditional.tiny_pipe(name) for name in conditional.BACKBONES},
    "latents": lambda: conditional.tiny_pipe("gqa-dit", vae=conditional.tiny_vae()),
    "autoguidance": lambda: conditional.tiny_pipe("composable", guide_model=conditional.backbone("dilated")),
    "guider": lambda: conditional.tiny_pipe("ddpm", guider=ClassifierFreeGuidance(guidance_scale=3.0)),
    "text": captions.tiny_pipe,
    "theirs": lambda: DDPMPipeline(guided.tiny_unet(), DDPMScheduler()),
}
# One of every backbone and of every kind of component, for a process in which nothing is imported yet.
ELSEWHERE = ["guided", "composable", "dilated", "guider", "latents", "UNet2DModel", "text", "theirs"]
# What a process without this package cannot import, and how it knows.
WITHOUT_PACKAGE = """
import sys
sys.modules["diffusers_ext"] = None
"""
# A single image: with several, fewer of the kernels sum in an order that depends on where weights lie in memory.
DRAW = """
import torch

def draw(pipe):
    arguments = {"num_inference_steps": 3, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    pipe.set_progress_bar_config(disable=True)
    if type(pipe).__name__ == "DDPMPipeline":
        return pipe(**arguments).images
    if pipe.components.get("text_encoder") is not None:
        return pipe(prompt="one", **arguments).images
    labels = pipe.config.id2label and pipe.components.get("classifier", True) is not None
    return pipe(class_labels=[3] if labels else None, **arguments).images
"""
exec(DRAW)
draw = globals()["draw"]


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def diffusers_log():
    diffusers.utils.logging.enable_propagation()
    yield
    diffusers.utils.logging.disable_propagation()


@pytest.fixture(scope="module")
def staged(tmp_path_factory) -> Path:
    """Every pipeline as "NAME/plain" and "NAME/code", with the images that it draws."""
    root = tmp_path_factory.mktemp("staged")
    for name, build in PIPELINES.items():
        pipe = build()
        for kind in ("plain", "code"):
            (root / name / kind).mkdir(parents=True)
            stage(pipe, root / name / kind, self_contained=kind == "code")
        np.save(root / name / "images.npy", draw(pipe))
    return root


@pytest.mark.parametrize("name", PIPELINES)
def test_both_kinds_draw_what_was_exported(staged, name, caplog, diffusers_log):
    plain, code = staged / name / "plain", staged / name / "code"
    expected = np.load(staged / name / "images.npy")

    pipe = DiffusionPipeline.from_pretrained(plain)
    assert np.array_equal(draw(pipe), expected)
    caplog.clear()
    trusted = DiffusionPipeline.from_pretrained(code, trust_remote_code=True)
    assert type(trusted).__name__ == type(pipe).__name__
    assert np.array_equal(draw(trusted), expected)
    if name == "theirs":  # its class is none of ours, and asks
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            DDPMPipeline.from_pretrained(code)
    else:
        assert type(trusted) is not type(pipe) and "Expected types" not in caplog.text
        loaded = type(pipe).from_pretrained(code)
        assert [type(part) for part in loaded.components.values()] == [type(part) for part in pipe.components.values()]
        assert np.array_equal(draw(loaded), expected)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(code)

    index = read(plain / "model_index.json")
    ours = {part for part, value in index.items() if isinstance(value, list) and value[0] == "diffusers_ext"}
    carried = {path for path in files(code) if path.endswith(".py")}
    assert {path.partition("/")[0] for path in carried} == ours | (set() if name == "theirs" else {"pipeline.py"})
    assert files(code) - carried == files(plain) and not any(path.endswith(".bin") for path in files(code))
    assert len({path.rpartition("/")[2] for path in carried}) == len(carried)  # no two files share a name
    for part in ours:
        (own,) = (code / part).glob("*.py")
        assert re.fullmatch(r"[a-z_]+_[0-9a-f]{8}", own.stem)
        assert read(code / "model_index.json")[part] == [own.stem, type(getattr(pipe, part)).__name__]


def test_without_the_package(staged, tmp_path, fresh_python):
    model = conditional.backbone("composable")
    (tmp_path / "model").mkdir()
    stage(model, tmp_path / "model", self_contained=True)
    code = f"""{WITHOUT_PACKAGE}{DRAW}
from pathlib import Path
import numpy as np
from diffusers import AutoModel, DiffusionPipeline, logging

warnings = []
logging.get_logger("diffusers").handlers[0].emit = lambda record: warnings.append(record.getMessage())
staged = Path({str(staged)!r})
for name in {ELSEWHERE}:
    pipe = DiffusionPipeline.from_pretrained(staged / name / "code", trust_remote_code=True)
    np.testing.assert_allclose(draw(pipe), np.load(staged / name / "images.npy"), atol=1e-4, err_msg=name)
model = AutoModel.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
assert type(model).__name__ == "ComposableUNet2DModel" and type(model).__module__.startswith("diffusers_modules.")
assert not [name for name in sys.modules if name.startswith("diffusers_ext.")]
surprises = [text for text in warnings if "Expected types" in text or "packages that were not found" in text]
assert len(surprises) == 1 and "UNet2DModel'>,), got" in surprises[0], surprises  # DDPMPipeline expects its own
"""
    fresh_python(code, tmp_path, PYTHONPATH="")


def test_code_that_travels_is_plain():
    for name in diffusers_ext.models.__all__:
        code = component_code(name)
        assert code == component_code(name)
        assert code.file_name == f"{code.library}.py"
        check_code(code.text, inspect.getmodule(getattr(diffusers_ext, name)))
    adm, critic = component_code("ADMUNet2DModel", "unet"), component_code("ADMClassifierModel", "classifier")
    assert (adm.text, f"classifier_{adm.library}") == (critic.text, critic.library)
    assert adm == component_code("ADMUNet2DModel")
    assert len({component_code(name).library for name in diffusers_ext.models.__all__}) == 5
    for name in ("ClassConditionalPipeline", "ClassifierGuidedPipeline"):
        code = pipeline_code(name)
        module = inspect.getmodule(getattr(diffusers_ext, name))
        check_code(code.text, module, diffusers_ext.guidance, diffusers_ext.sampling)
        assert code.file_name == "pipeline.py"


def test_code_of_clashing_files_is_not_written(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "clash_one.py").write_text("import logging\n\n\ndef step():\n    pass\n")
    (tmp_path / "clash_two.py").write_text("from diffusers.utils import logging\n")
    (tmp_path / "clash_three.py").write_text("step = 1\n")
    (tmp_path / "clash_four.py").write_text("import diffusers_ext.guidance as guidance\n")
    one, two, three, four = (importlib.import_module(f"clash_{name}") for name in ("one", "two", "three", "four"))
    with pytest.raises(RuntimeError, match="`logging` is the module logging and logging of diffusers.utils"):
        flattening._flatten([one, two], "", "")
    with pytest.raises(RuntimeError, match="`step` is defined in clash_one and defined in clash_three"):
        flattening._flatten([one, three], "", "")
    with pytest.raises(RuntimeError, match="clash_four has the import `import diffusers_ext.guidance as guidance`"):
        flattening._own_imports(four)


def test_models_load_alike():
    """Every file of models travels alone, so what they have in common is repeated."""
    models = [getattr(diffusers_ext, name) for name in diffusers_ext.models.__all__]
    for name in ("from_pretrained", "load_lora_adapter"):
        sources = {inspect.getsource(getattr(model, name)) for model in models}
        assert len(sources) == 1 and not any(getattr(model, name) is getattr(ModelMixin, name, 0) for model in models)


def check_code(text, *modules):
    """One file, imports first and once, nothing of this package, and whatever the originals say."""
    tree = ast.parse(text)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    known = {"torch", "diffusers", "transformers", *sys.stdlib_module_names}
    assert {name.partition(".")[0] for name in names} <= known and not any(
        getattr(node, "level", 0) for node in imports
    )
    assert len(set(map(ast.unparse, imports))) == len(imports)
    # what diffusers takes for imports, in texts too
    found = re.findall(r"^\s*(?:import\s+(\S+)\s*$|from\s+(\S+)\s+import)", text, flags=re.MULTILINE)
    assert {(one or other).partition(".")[0] for one, other in found} <= known
    assert "import diffusers_ext" not in text and "from diffusers_ext" not in text
    assert f"diffusers_ext {diffusers_ext.__version__}" in text.partition("\n")[0] and "Apache-2.0" in text
    assert "\n\n\n\n" not in text
    for module in modules:
        assert module.__doc__ in text
        for name, value in vars(module).items():
            if inspect.isclass(value) and value.__module__ == module.__name__:
                assert re.search(rf"^class {name}\b", text, flags=re.MULTILINE)
                assert (value.__doc__ or "") in text


def test_assigned_components_travel(hub, hub_token):
    pipe = guided.tiny_pipe(classifier=None)
    pipe.classifier = guided.tiny_classifier()
    latents = conditional.tiny_pipe("gqa-dit")
    latents.vae = conditional.tiny_vae()
    text = captions.tiny_pipe()
    text_encoder, text.text_encoder = text.text_encoder, None
    text.text_encoder = text_encoder
    for number, pipe in enumerate((pipe, latents, text)):
        pipe.guider = AdaptiveProjectedGuidance(guidance_scale=3.0)
        diffusers_ext.hub.push(pipe, f"me/assigned-{number}", self_contained=True)
        installed = type(pipe).from_pretrained(f"me/assigned-{number}")
        trusted = DiffusionPipeline.from_pretrained(f"me/assigned-{number}", trust_remote_code=True)
        assert type(trusted).__module__.startswith("diffusers_modules.")
        parts = {part for part, value in pipe.components.items() if value is not None}
        for each in (installed, trusted):
            assert {part for part, value in each.components.items() if value is not None} == parts
            assert np.array_equal(draw(each), draw(pipe))
    # out of code that travelled, and without it
    trusted.guider = None
    trusted.guider = ClassifierFreeGuidance(guidance_scale=2.0)
    diffusers_ext.hub.push(trusted, "me/assigned-2")
    assert np.array_equal(draw(DiffusionPipeline.from_pretrained("me/assigned-2")), draw(trusted))


def test_training_starts_from_a_self_contained_folder(staged):
    for name, kind in (("latents", "code"), ("guided", "code"), ("guided", "plain")):
        network = load_network(str(staged / name / kind), ("unet", "transformer"))
        assert type(network).__module__.startswith("diffusers_ext.models.")


def test_one_repository_does_not_change_another(staged, tmp_path, monkeypatch):
    # the same pipeline of another version, in a file of equal length, most often read within the same second
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    other = tmp_path / "other"
    shutil.copytree(staged / "composable" / "code", other)
    text = (other / "pipeline.py").read_text()
    changed = text.replace("DEFAULT_GUIDANCE_SCALE = 4.0", "DEFAULT_GUIDANCE_SCALE = 9.0")
    assert changed != text
    (other / "pipeline.py").write_text(changed)
    first = DiffusionPipeline.from_pretrained(staged / "composable" / "code", trust_remote_code=True)
    second = DiffusionPipeline.from_pretrained(other, trust_remote_code=True)
    expected = draw(first)
    assert np.array_equal(expected, np.load(staged / "composable" / "images.npy"))
    assert not np.array_equal(draw(second), expected)
    assert type(second.unet) is type(first.unet)
    # and another pipeline, two of whose components are of one family
    third = DiffusionPipeline.from_pretrained(staged / "guided" / "code", trust_remote_code=True)
    assert type(third).__name__ == "ClassifierGuidedPipeline"
    again = DiffusionPipeline.from_pretrained(staged / "guided" / "code", trust_remote_code=True)
    assert type(again.unet) is type(third.unet)

    assert np.array_equal(draw(first), expected)
    third.unet.enable_gradient_checkpointing()
    assert torch.isfinite(torch.tensor(draw(third))).all()


def test_saved_again_by_code_that_travelled(staged, tmp_path):
    trusted = DiffusionPipeline.from_pretrained(staged / "guided" / "code", trust_remote_code=True)
    trusted.save_pretrained(tmp_path / "again")  # which drops the code
    loaded = ClassifierGuidedPipeline.from_pretrained(tmp_path / "again")
    assert type(loaded.unet) is diffusers_ext.ADMUNet2DModel
    (tmp_path / "exported").mkdir()
    stage(trusted, tmp_path / "exported", self_contained=True)
    assert read(tmp_path / "exported" / "model_index.json") == read(
        staged / "guided" / "code" / "model_index.json"
    ) | {"_name_or_path": "code"}


def test_model_by_itself(tmp_path):
    model = conditional.backbone("gqa-dit")
    export(model, tmp_path / "plain")
    export(model, tmp_path / "code", self_contained=True)
    (own,) = (tmp_path / "code").glob("*.py")
    assert read(tmp_path / "code" / "config.json")["auto_map"] == {"AutoModel": f"{own.stem}.GQADiTTransformer2DModel"}
    assert files(tmp_path / "code") - {own.name} == files(tmp_path / "plain")

    trusted = AutoModel.from_pretrained(str(tmp_path / "code"), trust_remote_code=True)
    installed = diffusers_ext.GQADiTTransformer2DModel.from_pretrained(tmp_path / "code")
    assert type(trusted) is not type(model) and "auto_map" not in installed.config
    noise, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 3])
    for loaded in (trusted, installed, AutoModel.from_pretrained(str(tmp_path / "plain"))):
        assert torch.equal(
            loaded.eval()(noise, 5, class_labels=labels).sample, model(noise, 5, class_labels=labels).sample
        )
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModel.from_pretrained(str(tmp_path / "code"))


# A folder that is brought up to date


def test_second_variant_beside_the_first(tmp_path):
    pipe, target = captions.tiny_pipe(), tmp_path / "model"
    assert export(pipe, str(target)) == target
    first = {name: (target / name).read_bytes() for name in files(target)}
    weights = {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    halves = {name.replace(".safe", ".fp16.safe") for name in weights}
    export(pipe.to(torch.float16), target, variant="fp16")

    assert files(target) == first.keys() | halves and weights < first.keys()
    for name in weights:
        assert (target / name).read_bytes() == first[name]
    half = DiffusionPipeline.from_pretrained(target, variant="fp16", dtype=torch.float16)
    whole = DiffusionPipeline.from_pretrained(target)
    assert whole.text_encoder.dtype == torch.float32 and half.text_encoder.dtype == torch.float16
    assert read(target / "text_encoder" / "config.json").keys().isdisjoint({"dtype", "torch_dtype"})
    for part in ("unet", "text_encoder"):
        expected, in_half, in_whole = (getattr(each, part).state_dict() for each in (pipe, half, whole))
        for name, value in expected.items():
            assert torch.equal(in_half[name], value) and torch.equal(in_whole[name].to(value.dtype), value)

    # with code, and again without
    export(pipe, target, variant="fp16", self_contained=True)
    code = {"pipeline.py", f"unet/{component_code('ComposableUNet2DModel', 'unet').file_name}"}
    assert files(target) == first.keys() | halves | code
    trusted = DiffusionPipeline.from_pretrained(target, variant="fp16", dtype=torch.float16, trust_remote_code=True)
    assert torch.equal(trusted.unet.conv_in.weight, pipe.unet.conv_in.weight)
    export(pipe, target, variant="fp16")
    assert files(target) == first.keys() | halves

    # of a folder, the variant alone; of another network, no variant stays
    export(target, tmp_path / "half", variant="fp16")
    assert files(tmp_path / "half") == first.keys() - weights | halves
    with pytest.raises(ValueError, match="`variant` is 'ema', but .* has weights of fp16 only"):
        export(target, tmp_path / "none", variant="ema")
    export(captions.tiny_pipe(network=captions.tiny_network(layers_per_block=2)), target)
    assert files(target) == first.keys() | {"text_encoder/model.fp16.safetensors"}


def test_stale_files_go_and_texts_stay(tmp_path):
    pipe, target = captions.tiny_pipe(guide_model=conditional.backbone("dilated")), tmp_path / "model"
    export(pipe, target, self_contained=True)
    (target / "guide_model" / "notes.md").write_text("mine")
    pipe.unet.save_pretrained(target / "unet", max_shard_size="20KB")
    shards = {name for name in files(target / "unet") if "-of-" in name}
    assert len(shards) > 2 and "diffusion_pytorch_model.safetensors.index.json" in files(target / "unet")
    card = target / "README.md"
    card.write_text(card.read_text().replace("license: other", "license: mit") + "\n## Mine\n\nWritten by hand.\n")
    (target / "notes.txt").write_text("mine")

    export(captions.tiny_pipe(), target)

    assert files(target / "unet") == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert files(target / "guide_model") == {"notes.md"} and not any(name.endswith(".py") for name in files(target))
    assert read(target / "model_index.json")["guide_model"] == [None, None]
    assert (target / "notes.txt").read_text() == "mine" and "## Mine\n\nWritten by hand.\n" in card.read_text()
    assert draw(DiffusionPipeline.from_pretrained(target)).shape == (1, 8, 8, 3)

    # a model by itself: code and weights of an earlier one
    model = tmp_path / "alone"
    export(conditional.backbone("composable"), model, self_contained=True)
    (old,) = model.glob("*.py")
    export(conditional.backbone("dilated"), model, self_contained=True)
    (new,) = model.glob("*.py")
    assert new.name.startswith("denoiser_dilated_") and not old.exists()


def test_export_refuses_what_is_something_else(tmp_path):
    pipe = guided.tiny_pipe()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match=r"`folder` .*own'\) is not empty, and holds no pipeline .*\(thesis.tex\)"):
        export(pipe, tmp_path / "own")
    assert files(tmp_path) == {"own/thesis.tex"}
    with pytest.raises(ValueError, match="`folder` .* is a file"):
        export(pipe, tmp_path / "own" / "thesis.tex")
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    export(pipe.unet, tmp_path / "clone")
    assert (tmp_path / "clone" / ".gitattributes").is_file()
    with pytest.raises(ValueError, match="holds a model, and `pipe` is a pipeline"):
        export(pipe, tmp_path / "clone")
    with pytest.raises(ValueError, match=r"`pipe` is Linear; it must be a pipeline, a model"):
        export(torch.nn.Linear(1, 1), tmp_path / "linear")
    with pytest.raises(ValueError, match=r"`pipe` \('.*absent'\) is no folder"):
        export(tmp_path / "absent", tmp_path / "copy")
    with pytest.raises(ValueError, match="holds no pipeline, model or LoRA adapter"):
        export(tmp_path / "own", tmp_path / "copy")
    with pytest.raises(ValueError, match="lies inside `pipe`"):
        export(tmp_path / "clone", tmp_path / "clone" / "copy")
    assert {path.name for path in tmp_path.iterdir()} == {"own", "clone"}


def test_export_that_fails_changes_nothing(tmp_path, monkeypatch):
    target = tmp_path / "model"
    export(guided.tiny_pipe(), target, self_contained=True)
    before = {name: (target / name).read_bytes() for name in files(target)}
    replace, moves = Path.replace, []

    def fail_late(path: Path, destination: Path) -> Path:
        if str(path).endswith("classifier/config.json") and destination.is_relative_to(target) and not moves:
            moves.append(path)
            raise OSError(28, "No space left on device")
        return replace(path, destination)

    monkeypatch.setattr(Path, "replace", fail_late)
    with pytest.raises(OSError, match="No space left"):
        export(guided.tiny_pipe(guided.tiny_unet(layers_per_block=2)), target)
    assert before == {name: (target / name).read_bytes() for name in files(target)} and moves
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    export(guided.tiny_pipe(guided.tiny_unet(layers_per_block=2)), target)
    assert DiffusionPipeline.from_pretrained(target).unet.config.layers_per_block == 2
    monkeypatch.chdir(target)
    export(guided.tiny_pipe(), ".")
    assert Path.cwd() == target and DiffusionPipeline.from_pretrained(".").unet.config.layers_per_block == 1


def test_exports_of_several_threads(tmp_path):
    pipes = [guided.tiny_pipe() for _ in range(4)]
    with ThreadPoolExecutor(len(pipes)) as threads:
        list(threads.map(lambda number: export(pipes[number], tmp_path / str(number)), range(len(pipes))))
    assert all((tmp_path / str(number) / "samples.png").is_file() for number in range(len(pipes)))
    linear = torch.nn.Linear(2, 2)
    assert linear.weight.device.type == "cpu" and linear.weight.abs().sum() > 0


@pytest.mark.parametrize("variant", ["v1.0", "", "../x", "a/b", "a b", 3])
def test_variants_are_words(tmp_path, variant):
    with pytest.raises(ValueError, match="`variant` .* must be a word of letters, digits, '_' and '-'"):
        export(guided.tiny_pipe(), tmp_path / "model", variant=variant)
    assert not list(tmp_path.iterdir())


class MyPipeline(ClassifierGuidedPipeline):
    """A pipeline of somebody's own module."""


def test_pipelines_that_only_their_author_can_load(tmp_path, caplog, diffusers_log):
    pipe = MyPipeline(**guided.tiny_pipe().components)
    export(pipe, tmp_path / "model")
    assert "MyPipeline is a class of neither diffusers nor diffusers_ext: only who has it can load" in caplog.text
    with pytest.raises(ValueError, match="its code cannot be written"):
        export(pipe, tmp_path / "code", self_contained=True)


class Foreign(diffusers_ext.DilatedConvDenoiserModel):
    """A model of somebody's own module."""


def test_export_refuses_what_nobody_could_load(tmp_path):
    pipe = guided.tiny_pipe(guided.tiny_unet(in_channels=6, low_res_channels=3))
    export(pipe, tmp_path / "model")
    before = {name: (tmp_path / "model" / name).read_bytes() for name in files(tmp_path / "model")}

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="style")
    with pytest.raises(ValueError, match=r"`unet` was saved with a LoRA adapter inside .* `fuse_lora\(\)`"):
        export(pipe, tmp_path / "model")
    pipe.unet.unload_lora()
    pipe.unet = conditional.build(Foreign, **conditional.BACKBONES["dilated"][1])
    with pytest.raises(ValueError, match="`unet` is a Foreign of 'test_export', which nobody could load"):
        export(pipe, tmp_path / "model")
    mine = type("MyPipeline", (ClassifierGuidedPipeline,), {})(guided.tiny_unet(), DDPMScheduler())
    with pytest.raises(ValueError, match="`pipe` is a MyPipeline, .* code cannot be written"):
        export(mine, tmp_path / "mine", self_contained=True)
    assert before == {name: (tmp_path / "model" / name).read_bytes() for name in files(tmp_path / "model")}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_notes_and_paths_of_the_machine_are_left_out(tmp_path):
    text = captions.tiny_pipe()
    text.save_pretrained(tmp_path / "secret" / "text")
    text = ClassConditionalPipeline.from_pretrained(tmp_path / "secret" / "text")
    text.unet.register_to_config(_name_or_path="/home/me/.cache/hub/models--me--mine/snapshots/0123abcd/unet")
    guided_pipe = ClassifierGuidedPipeline.from_pipe(
        conditional.tiny_pipe("adm", guider=ClassifierFreeGuidance()), classifier=guided.tiny_classifier()
    )
    again = ClassConditionalPipeline.from_pipe(guided_pipe)
    again.register_to_config(_classifier=("diffusers_ext", "ADMClassifierModel"), _null_class_label=4)
    for name, pipe in (("text", text), ("again", again)):
        (tmp_path / name).mkdir()
        stage(pipe, tmp_path / name, self_contained=True)
        for file in files(tmp_path / name):
            assert str(tmp_path).encode() not in (tmp_path / name / file).read_bytes(), file
        index = read(tmp_path / name / "model_index.json")
        assert {key for key in index if key[0] == "_"} <= {"_class_name", "_diffusers_version", "_name_or_path"}
    assert read(tmp_path / "text" / "unet" / "config.json")["_name_or_path"] == "me/mine"
    assert (
        read(tmp_path / "text" / "text_encoder" / "config.json").get("_name_or_path", "text_encoder") == "text_encoder"
    )
    assert text.unet.config._name_or_path.startswith("/home/me")  # the pipeline itself is not changed


# Folders as sources


def test_folder_of_a_training(tmp_path):
    run, target = tmp_path / "run", tmp_path / "repository"
    pipe = conditional.tiny_pipe("adm")
    pipe.save_pretrained(run)
    (run / "config.json").write_text(json.dumps({"output_dir": str(run)}))
    kept = {"metrics.jsonl": b"{}\n", "samples/000010.png": b"\x89PNG", "evaluation.json": b"{}"}
    left = [
        "checkpoint-10/optimizer.bin",
        "logs/events",
        ".git/config",
        "latents/0.safetensors",
        "wandb/run/x",
        "loss.npz",
    ]
    for name, content in {**kept, **dict.fromkeys(left, b"local")}.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)
    target.mkdir()
    stage(run, target)
    saved = {f"{part}/{name}" for part in ("unet", "scheduler") for name in files(run / part)} | {"model_index.json"}
    assert files(target) == saved | kept.keys()
    for name in files(target):
        assert (target / name).read_bytes() == (run / name).read_bytes(), name
    assert not (run / "pipeline.py").exists()


def test_folder_with_parts_alone(tmp_path):
    """What `train classifier` leaves without a denoiser: a network and its scheduler."""
    classifier = guided.tiny_classifier()
    classifier.save_pretrained(tmp_path / "run" / "classifier")
    DDPMScheduler().save_pretrained(tmp_path / "run" / "scheduler")
    (tmp_path / "out").mkdir()
    stage(tmp_path / "run", tmp_path / "out", self_contained=True)
    trusted = AutoModel.from_pretrained(str(tmp_path / "out"), subfolder="classifier", trust_remote_code=True)
    noise = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(trusted.eval()(noise, 3).logits, classifier(noise, 3).logits)
    installed = diffusers_ext.ADMClassifierModel.from_pretrained(tmp_path / "out", subfolder="classifier")
    assert torch.equal(installed(noise, 3).logits, classifier(noise, 3).logits)


def test_folder_of_an_adapter(tmp_path):
    unet = guided.tiny_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    unet.save_lora_adapter(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(ValueError, match="`self_contained` is set, but a LoRA adapter"):
        export(tmp_path / "adapter", tmp_path / "coded", self_contained=True)
    assert files(tmp_path / "out") == {"README.md", "pytorch_lora_weights.safetensors"}


def test_pickles_are_not_published(tmp_path):
    guided.tiny_unet().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(ValueError, match="no weights as safetensors|none in safetensors"):
        export(tmp_path / "pickled", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_change_between_the_kinds(staged, tmp_path):
    for source, kind in (("plain", "code"), ("code", "plain"), ("code", "code")):
        target = tmp_path / f"{source}-{kind}"
        target.mkdir()
        stage(staged / "guided" / source, target, self_contained=kind == "code")
        expected = staged / "guided" / kind
        assert files(target) == files(expected)
        for name in files(target):
            assert (target / name).read_bytes() == (expected / name).read_bytes(), name


def test_modular_pipeline(tmp_path):
    pipe = diffusers_ext.ClassifierGuidanceBlocks().init_pipeline()
    pipe.update_components(**guided.tiny_pipe().components)
    before = copy.deepcopy(dict(pipe.config)) | {
        "_class_name": "ModularPipeline",
        "_diffusers_version": diffusers.__version__,
    }
    export(pipe, tmp_path / "model", repo_id="me/modular")
    assert dict(pipe.config) == before
    index = read(tmp_path / "model" / "modular_model_index.json")
    assert (
        index["unet"][2]["pretrained_model_name_or_path"] == "me/modular" and index["unet"][2]["subfolder"] == "unet"
    )
    export(tmp_path / "model", tmp_path / "copy")
    assert str(tmp_path) not in (tmp_path / "copy" / "modular_model_index.json").read_text()
    loaded = ModularPipeline.from_pretrained(tmp_path / "copy")
    loaded.load_components()
    assert type(loaded.unet) is diffusers_ext.ADMUNet2DModel


# What diffusers calls


def test_names_of_diffusers_are_where_registration_looks():
    for name, hook in (
        ("_upload_folder", registration._upload_folder),
        ("_dict_from_json_file", registration._read_config),
    ):
        base = PushToHubMixin if name == "_upload_folder" else ConfigMixin
        theirs, own = (
            inspect.signature(vars(base)[name] if base is PushToHubMixin else vars(base)[name].__func__),
            inspect.signature(hook),
        )
        assert list(theirs.parameters)[1:] == list(own.parameters)[1:]
        for own_class in (diffusers_ext.ADMUNet2DModel, ClassConditionalPipeline):
            assert getattr(own_class, name) is not getattr(DDPMPipeline, name)
    folder, repo_id, *options = list(inspect.signature(registration._upload_folder).parameters)[1:]
    for hook in (registration._upload_pipeline_folder, registration._upload_modular_folder):
        inspect.signature(hook).bind(None, folder, repo_id, **dict.fromkeys(options))  # as diffusers calls it
    assert "_upload_folder(" in inspect.getsource(ModularPipeline.save_pretrained)
    assert "_dict_from_json_file(" in inspect.getsource(ConfigMixin.load_config)
    assert "_upload_folder(" in inspect.getsource(PushToHubMixin.push_to_hub)
    assert "_upload_folder(" in inspect.getsource(DiffusionPipeline.save_pretrained)


def test_only_indexes_of_ours_are_translated():
    plain = {
        "_class_name": "ClassifierGuidedPipeline",
        "unet": ["diffusers_ext", "ADMUNet2DModel"],
        "guider": [None, None],
    }
    assert plain_index(plain) == plain
    for library in ("unet_adm_0123abcd", "critic_unet_adm_0123abcd", "diffusers_modules.local.unet_adm_0123abcd"):
        assert plain_index({**plain, "unet": [library, "ADMUNet2DModel"]}) == plain
    for value in (
        ["unet_adm_0123abcd", "DDPMUNet2DModel"],
        ["unet_adm", "ADMUNet2DModel"],
        ["myunet_adm_0123abcd", "ADMUNet2DModel"],
        ["os_0123abcd", "ADMUNet2DModel"],
        ["unet_adm_0123abcd", "system"],
        ["unet_adm_0123abcd", ["ADMUNet2DModel"]],
        [["unet_adm_0123abcd"], "ADMUNet2DModel"],
        ["../unet_adm_0123abcd", "ADMUNet2DModel"],
        ["unet_adm_0123abcd", "ADMUNet2DModel", {}, None],
    ):
        assert plain_index({**plain, "unet": value})["unet"] == value
    for name in (["pipeline", "StableDiffusionPipeline"], ["other", "ClassifierGuidedPipeline"], ["pipeline"], 3):
        assert plain_index({**plain, "_class_name": name})["_class_name"] == name
    for auto_map in (
        {"AutoModel": "unet_adm_0123abcd.os"},
        {"AutoModel": "me/other--unet_adm.ADMUNet2DModel"},
        "x",
        [1],
    ):
        assert plain_config({"auto_map": auto_map}) == {"auto_map": auto_map}


def test_push_to_hub_of_a_pipeline(hub, hub_token):
    pipe = guided.tiny_pipe()
    info = pipe.push_to_hub("hooked-pipe")
    content = hub.files("me/hooked-pipe")
    assert info.oid == hub.commits("me/hooked-pipe")[0] and len(hub.commits("me/hooked-pipe")) == 2
    card = content["README.md"].decode()
    assert 'DiffusionPipeline.from_pretrained("me/hooked-pipe")' in card and "import diffusers_ext" in card
    assert "This is the model card of a" not in card and "library_name: diffusers" in card
    loaded = DiffusionPipeline.from_pretrained("me/hooked-pipe")
    assert np.array_equal(draw(loaded), draw(pipe))

    # a second time: what people wrote stays
    hub.write("me/hooked-pipe", {"README.md": (card + "\n## Mine\n\nBy hand.\n").encode()})
    pipe.push_to_hub("me/hooked-pipe", commit_message="Again")
    assert "## Mine\n\nBy hand.\n" in hub.files("me/hooked-pipe")["README.md"].decode()


def test_push_to_hub_of_models_and_saving(hub, hub_token, tmp_path):
    unet = guided.tiny_unet()
    unet.push_to_hub("hooked-model", create_pr=False)
    card = hub.files("me/hooked-model")["README.md"].decode()
    assert "ADMUNet2DModel" in card and "import diffusers_ext" in card
    assert torch.equal(AutoModel.from_pretrained("me/hooked-model").conv_in.weight, unet.conv_in.weight)
    unet.push_to_hub("hooked-model", subfolder="ema")  # goes as diffusers would have it
    assert "ema/config.json" in hub.files("me/hooked-model") and "ema/README.md" not in hub.files("me/hooked-model")
    assert hub.files("me/hooked-model")["README.md"].decode() == card

    guided.tiny_pipe().save_pretrained(str(tmp_path / "saved"), push_to_hub=True, repo_id="me/hooked-saved")
    assert hub.files("me/hooked-saved")["README.md"] == (tmp_path / "saved" / "README.md").read_bytes()
    assert b"ClassifierGuidedPipeline" in hub.files("me/hooked-saved")["README.md"]


def test_self_contained_from_the_hub(hub, hub_token):
    pipe = guided.tiny_pipe()
    diffusers_ext.hub.push(pipe, "me/carries-code", self_contained=True)
    assert {"pipeline.py", "model_index.json"} < hub.files("me/carries-code").keys()
    installed = ClassifierGuidedPipeline.from_pretrained("me/carries-code")
    assert type(installed.unet) is diffusers_ext.ADMUNet2DModel
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained("me/carries-code")
    trusted = DiffusionPipeline.from_pretrained("me/carries-code", trust_remote_code=True)
    assert type(trusted).__module__ == "diffusers_modules.local.pipeline"
    model = guided.tiny_unet()
    diffusers_ext.hub.push(model, "me/model-with-code", self_contained=True)
    alone = AutoModel.from_pretrained("me/model-with-code", trust_remote_code=True)
    for images in (draw(installed), draw(trusted)):
        assert np.array_equal(images, draw(pipe))
    torch.testing.assert_close(alone.eval()(torch.ones(1, 3, 8, 8), 3), model(torch.ones(1, 3, 8, 8), 3))
