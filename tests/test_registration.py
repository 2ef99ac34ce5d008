"""Loading by name through diffusers; what users do is proven in processes that import everything anew."""

import copy
import json

import pytest
import torch

import diffusers
from diffusers import DDPMScheduler
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.pipelines import pipeline_loading_utils

import diffusers_ext
import diffusers_ext.models
import diffusers_ext.pipelines
from diffusers_ext import ADMClassifierModel, ADMUNet2DModel, ClassifierGuidedPipeline
from diffusers_ext.registration import LIBRARY, LOADING_METHODS, register


TINY = {
    "sample_size": 8,
    "in_channels": 3,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "attention_resolutions": (4,),
    "attention_head_dim": 16,
    "norm_num_groups": 8,
}
CALL = "dict(class_labels=[1, 2], guidance_scale=2.0, num_inference_steps=3, output_type='np')"
SAMPLE = f"pipe(**{CALL}, generator=torch.Generator().manual_seed(0)).images"
IMPORTS = """
import warnings
import numpy as np
import torch
from diffusers import AutoModel, DiffusionPipeline
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved pipeline, its fp16 variant beside it, and `images.pt`, which it drew in this process."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    unet, classifier = ADMUNet2DModel(**TINY, out_channels=6), ADMClassifierModel(**TINY, num_classes=4)
    for parameter in [*unet.parameters(), *classifier.parameters()]:
        torch.nn.init.normal_(parameter, std=0.2)  # the zeros of a fresh output layer would hide everything
    pipe = ClassifierGuidedPipeline(unet=unet, classifier=classifier, scheduler=DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    images = eval(SAMPLE, {"pipe": pipe, "torch": torch})
    torch.save(torch.from_numpy(images), folder / "images.pt")
    pipe.to(torch.float16).save_pretrained(folder, variant="fp16")
    return folder


def test_index_names_the_library_and_no_module(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "ClassifierGuidedPipeline"
    assert index["unet"] == ["diffusers_ext", "ADMUNet2DModel"]
    assert index["classifier"] == ["diffusers_ext", "ADMClassifierModel"]
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]


def test_pipeline_loads_and_saves_in_a_fresh_process(folder, tmp_path, fresh_python):
    code = f"""{IMPORTS}
import diffusers_ext
from diffusers_ext import ADMClassifierModel, ADMUNet2DModel, ClassifierGuidedPipeline

import sys
assert "diffusers.pipelines.auto_pipeline" not in sys.modules  # it imports every pipeline of diffusers
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
assert AUTO_TEXT2IMAGE_PIPELINES_MAPPING["diffusers_ext"] is diffusers_ext.ClassConditionalPipeline

folder, copy = {str(folder)!r}, {str(tmp_path)!r}
pipe = DiffusionPipeline.from_pretrained(folder)
assert type(pipe) is ClassifierGuidedPipeline, type(pipe)
assert type(pipe.unet) is ADMUNet2DModel and type(pipe.classifier) is ADMClassifierModel
images = {SAMPLE}
np.testing.assert_allclose(images, torch.load(folder + "/images.pt").numpy(), atol=1e-4)

pipe.save_pretrained(copy)
again = DiffusionPipeline.from_pretrained(copy)
for name in ("unet", "classifier"):
    saved, loaded = getattr(pipe, name).state_dict(), getattr(again, name).state_dict()
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[key], loaded[key]) for key in saved)
pipe = again
np.testing.assert_array_equal({SAMPLE}, images)

pipe = ClassifierGuidedPipeline.from_pipe(again)
assert type(pipe) is ClassifierGuidedPipeline and pipe.unet is again.unet and pipe.classifier is again.classifier

half = DiffusionPipeline.from_pretrained(folder, variant="fp16", torch_dtype=torch.float16)
assert half.unet.dtype == half.classifier.dtype == torch.float16
weight, half_weight = again.unet.conv_in.weight, half.unet.conv_in.weight
assert torch.equal(half_weight, weight.half())

for unet in (AutoModel.from_pretrained(folder, subfolder="unet"), AutoModel.from_pretrained(folder + "/unet")):
    assert type(unet) is ADMUNet2DModel and torch.equal(unet.conv_in.weight, weight)
assert type(AutoModel.from_pretrained(folder, subfolder="classifier")) is ADMClassifierModel
"""
    fresh_python(code, tmp_path)


WITHOUT_IMPORT = f"""{IMPORTS}
for load in (
    lambda: DiffusionPipeline.from_pretrained("."),
    lambda: DiffusionPipeline.from_pretrained("me/my-digits"),
    lambda: AutoModel.from_pretrained(".", subfolder="unet"),
):
    try:
        load()
    except Exception as error:
        print(f"{{type(error).__name__}}: {{error}}")
"""


def test_readme_quotes_the_errors_without_the_import(root, folder, hub, fresh_python):
    if not hub.exists("me/my-digits"):  # the name in the README, whose own test pushes to it
        hub.create("me/my-digits")
    hub.write("me/my-digits", {"model_index.json": (folder / "model_index.json").read_bytes()})
    errors = fresh_python(WITHOUT_IMPORT, folder, HF_HUB_OFFLINE="0").stdout.strip().splitlines()
    hub.delete("me/my-digits")
    assert len(errors) == 3
    readme = (root / "README.md").read_text()
    for error in errors:
        assert error in readme


def test_pipeline_loads_from_the_hub_and_then_offline(folder, hub, tmp_path, fresh_python):
    hub.create("org/repo")
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pt"]
    hub.write("org/repo", {path.relative_to(folder).as_posix(): path.read_bytes() for path in files})
    code = f"""{IMPORTS}
import diffusers_ext
pipe = DiffusionPipeline.from_pretrained("org/repo")
assert type(pipe) is diffusers_ext.ClassifierGuidedPipeline
assert type(AutoModel.from_pretrained("org/repo", subfolder="unet")) is diffusers_ext.ADMUNet2DModel
np.testing.assert_allclose({SAMPLE}, torch.load({str(folder / "images.pt")!r}).numpy(), atol=1e-4)
"""
    fresh_python(code, tmp_path, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0")
    assert any("/download/org/repo/" in path and path.endswith(".safetensors") for _, path, _ in hub.log)
    hub.clear_log()
    fresh_python(code, tmp_path, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert hub.log == []


def test_a_moved_table_leaves_local_loading_working(folder, tmp_path, fresh_python):
    code = f"""
# A diffusers in which the table bears another name.
from importlib.machinery import SourceFileLoader
from pathlib import Path

get_code = SourceFileLoader.get_code

def get_renamed_code(self, name):
    source = Path(self.path).read_text(encoding="utf-8")
    if name.startswith("diffusers.") and "LOADABLE_CLASSES" in source:
        return compile(source.replace("LOADABLE_CLASSES", "LOADABLE_TYPES"), self.path, "exec")
    return get_code(self, name)

SourceFileLoader.get_code = get_renamed_code
{IMPORTS}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import diffusers_ext
    diffusers_ext.registration.register()
messages = [str(warning.message) for warning in caught if "diffusers_ext" in str(warning.message)]
assert len(messages) == 1 and "Upgrade diffusers_ext" in messages[0], messages

pipe = diffusers_ext.ClassifierGuidedPipeline.from_pretrained({str(folder)!r})
np.testing.assert_allclose({SAMPLE}, torch.load({str(folder / "images.pt")!r}).numpy(), atol=1e-4)
pipe.save_pretrained(".")
diffusers_ext.ClassifierGuidedPipeline.from_pretrained(".")
"""
    fresh_python(code, tmp_path)


def test_private_names_are_where_registration_looks():
    assert isinstance(pipeline_loading_utils.LOADABLE_CLASSES, dict)
    assert pipeline_loading_utils.LOADABLE_CLASSES["diffusers"].items() >= LOADING_METHODS.items()
    assert pipeline_loading_utils._get_library_or_raise(LIBRARY) is diffusers_ext
    for base_class in LOADING_METHODS:
        assert getattr(diffusers_ext, base_class) is getattr(diffusers, base_class)


def test_every_public_class_is_registered_under_its_own_name():
    assert sorted(diffusers_ext.__all__) == sorted(diffusers_ext.models.__all__ + diffusers_ext.pipelines.__all__)
    for name in diffusers_ext.__all__:
        assert getattr(diffusers, name) is getattr(diffusers_ext, name)
        assert getattr(diffusers, name).__name__ == name


def test_registering_again_changes_nothing():
    before = dict(vars(diffusers)), copy.deepcopy(pipeline_loading_utils.LOADABLE_CLASSES)
    register()
    assert (dict(vars(diffusers)), pipeline_loading_utils.LOADABLE_CLASSES) == before


def test_a_name_that_diffusers_defines_is_refused(monkeypatch):
    monkeypatch.setattr(diffusers, "ADMUNet2DModel", diffusers.UNet2DModel)
    with pytest.raises(RuntimeError, match="defines `ADMUNet2DModel` itself"):
        register()
    assert diffusers.ADMUNet2DModel is diffusers.UNet2DModel


def test_single_file_table_of_diffusers_is_left_alone():
    assert not set(diffusers_ext.__all__) & set(SINGLE_FILE_LOADABLE_CLASSES)
