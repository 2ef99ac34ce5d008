"""Blocks of Modular Diffusers: the images of the standard pipelines, put together anew, saved, pushed and loaded."""

import inspect
import json
import time

import pytest
import test_captions as captions
import test_pipeline_class_conditional as conditional
import test_pipeline_classifier_guided as guided
import torch
from PIL import Image

import diffusers
from diffusers import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    InputParam,
    ModularPipeline,
    ModularPipelineBlocks,
    SkipLayerGuidance,
    UnCLIPScheduler,
)

from diffusers_ext import ClassConditionalBlocks, ClassConditionalPipeline, ClassifierGuidanceBlocks
from diffusers_ext.hub import pull, push
from diffusers_ext.hub.export import stage
from diffusers_ext.hub.safety import check_folder
from diffusers_ext.pipelines.modular_classifier_guided import LoopClassifierGuidance
from diffusers_ext.pipelines.modular_steps import outputs


SCHEDULERS = {
    "ddim": DDIMScheduler,
    "ddim-no-clip": lambda: DDIMScheduler(clip_sample=False),
    "ddpm": DDPMScheduler,
    "dpm": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "flow": FlowMatchEulerDiscreteScheduler,
    "cogvideox": CogVideoXDPMScheduler,
    "unclip": UnCLIPScheduler,
}
APG = {"guidance_scale": 3.0, "adaptive_projected_guidance_momentum": -0.5}
BLOCKS = {"ClassifierGuidedPipeline": ClassifierGuidanceBlocks, "ClassConditionalPipeline": ClassConditionalBlocks}


def modular(pipe, blocks=None):
    """A modular pipeline with the components and options of a standard one."""
    twin = (blocks or BLOCKS[type(pipe).__name__]()).init_pipeline()
    options = {name: pipe.config[name] for name in ("id2label", "classifier_schedule") if name in pipe.config}
    if isinstance(pipe, ClassConditionalPipeline):
        options["null_class_label"] = pipe.config.null_class_label
    twin.update_components(**pipe.components, **options)
    twin.set_progress_bar_config(disable=True)
    return twin


def draw(pipe, seed=0, **arguments):
    arguments = {"class_labels": [3, 0], "num_inference_steps": 3, "output_type": "latent", **arguments}
    arguments.setdefault("generator", torch.Generator().manual_seed(seed))
    if isinstance(pipe, ModularPipeline):
        return pipe(**arguments, output="images")
    return pipe(**arguments).images


def assert_same_images(pipe, **arguments):
    expected = draw(pipe, **arguments)
    assert torch.isfinite(expected).all() and expected.std() > 0.01
    assert torch.equal(draw(modular(pipe), **arguments), expected)


# The images of the standard pipelines


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("module", [guided, conditional], ids=lambda module: module.__name__)
def test_same_images_with_every_scheduler_and_guider(module, scheduler):
    pipe = module.tiny_pipe(scheduler=SCHEDULERS[scheduler]())
    assert_same_images(pipe)
    pipe.guider = AdaptiveProjectedGuidance(**APG)
    assert_same_images(pipe, guidance_interval=(0.3, 1.0))
    pipe.guider = ClassifierFreeGuidance(guidance_scale=3.0, start=0.3)
    assert_same_images(pipe)


LEARNED = {"scheduler": lambda: DDPMScheduler(variance_type="learned_range"), "unet": {"out_channels": 6}}
CLASSIFIER_GUIDED = {
    "learned-variance": (LEARNED, {"guidance_scale": 2.0}),
    "mean": (LEARNED, {"guidance_mode": "mean"}),
    "dropped-variance": ({"unet": {"out_channels": 6}}, {}),
    "no-labels": ({}, {"class_labels": None, "batch_size": 2}),
    "scale-0": ({}, {"guidance_scale": 0.0}),
    "name": ({}, {"class_labels": "seven", "batch_size": 2}),
    "eta": ({}, {"eta": 0.7}),
    "start": ({}, {"sample": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))}),
    "generators": ({}, {"generator": None}),
    "class-conditional-unet": ({"unet": {"num_class_embeds": 4}}, {}),
    "null-class": ({"unet": {"num_class_embeds": 4, "null_class": True}}, {"class_labels": None}),
    "no-classifier": ({"unet": {"num_class_embeds": 4}, "classifier": None}, {}),
    "schedule": ({"classifier_schedule": {"beta_schedule": "squaredcos_cap_v2"}}, {}),
    "low-res": ({"unet": {"in_channels": 6, "low_res_channels": 3}}, {"low_res": torch.ones(2, 3, 4, 4)}),
    "low-res-pil": ({"unet": {"in_channels": 6, "low_res_channels": 3}}, {"low_res": [Image.new("RGB", (4, 4))] * 2}),
}


@pytest.mark.parametrize("case", CLASSIFIER_GUIDED)
def test_classifier_guidance_with_every_argument(case):
    components, arguments = CLASSIFIER_GUIDED[case]
    options = {name: value for name, value in components.items() if name not in ("unet", "scheduler")}
    scheduler = components.get("scheduler", DDIMScheduler)()
    pipe = guided.tiny_pipe(guided.tiny_unet(**components.get("unet", {})), scheduler, **options)
    if case == "generators":
        arguments = {"generator": [torch.Generator().manual_seed(seed) for seed in (1, 2)]}
        expected = draw(pipe, **arguments)
        arguments = {"generator": [torch.Generator().manual_seed(seed) for seed in (1, 2)]}
        assert torch.equal(draw(modular(pipe), **arguments), expected)
    else:
        assert_same_images(pipe, **arguments)


@pytest.mark.parametrize("name", conditional.BACKBONES)
def test_class_conditional_with_every_backbone(name):
    pipe = conditional.tiny_pipe(name)
    assert_same_images(pipe)
    assert_same_images(pipe, class_labels=None, batch_size=2)
    assert_same_images(pipe, guidance_scale=1.5, guided_channels=2, guidance_interval=(0.0, 0.5))
    assert_same_images(pipe, guidance_scale=1.0, num_images_per_prompt=2)


def test_class_conditional_with_every_component():
    assert_same_images(conditional.tiny_pipe(vae=conditional.tiny_vae()), output_type="pt", height=32, width=16)
    assert_same_images(conditional.tiny_pipe(vae=conditional.tiny_vae()))
    assert_same_images(conditional.tiny_pipe(guide_model=conditional.backbone("dilated")))
    learned = DDPMScheduler(variance_type="learned_range")
    assert_same_images(conditional.tiny_pipe("DiTTransformer2DModel", learned))
    skipping = SkipLayerGuidance(guidance_scale=2.0, skip_layer_guidance_layers=[1])
    assert_same_images(conditional.tiny_pipe("gqa-dit", guider=skipping))
    pipe = captions.tiny_pipe("clip")
    words = {"prompt": ["a round digit", "two"], "negative_prompt": "blurred digit", "class_labels": None}
    assert_same_images(pipe, **words, num_images_per_prompt=2)


def test_images_as_the_standard_pipeline_returns_them():
    pipe = guided.tiny_pipe()
    for output_type in ("pil", "np", "pt"):
        expected = draw(pipe, output_type=output_type)
        images = draw(modular(pipe), output_type=output_type)
        assert type(images) is type(expected) and len(images) == 2
        assert all((a == b) if output_type == "pil" else (a == b).all() for a, b in zip(images, expected, strict=True))


def test_half_precision_and_inference_mode():
    pipe = guided.tiny_pipe()
    twin = modular(pipe)
    with torch.inference_mode():
        assert torch.equal(draw(twin), draw(pipe))
    twin.to(torch.bfloat16)
    assert twin.unet is pipe.unet and torch.equal(draw(twin), draw(pipe))


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": "eight"}, "`class_labels` holds 'eight', which is not a name of a class"),
        ({"class_labels": [4]}, r"`class_labels` holds \[4\]"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"guidance_interval": (0.7, 0.2)}, "`guidance_interval` is"),
        ({"output_type": "jpeg"}, "`output_type` is 'jpeg'"),
        ({"sample": torch.zeros(1, 3, 8, 8)}, "`sample` has shape"),
    ],
)
def test_errors_are_those_of_the_standard_pipelines(arguments, message):
    for module in (guided, conditional):
        pipe = module.tiny_pipe()
        with guided.CountCalls(pipe.unet) as counted:
            for each in (pipe, modular(pipe)):
                with pytest.raises(ValueError, match=message):
                    draw(each, **arguments)
            assert counted.calls == [0]


GUIDERS = [name for name in dir(diffusers.guiders) if name.endswith("Guidance") and name != "BaseGuidance"]
LAYERS = {
    "AutoGuidance": {"auto_guidance_layers": [0], "dropout": 0.5},
    "PerturbedAttentionGuidance": {"perturbed_guidance_layers": [0]},
    "SkipLayerGuidance": {"skip_layer_guidance_layers": [0]},
    "SmoothedEnergyGuidance": {"seg_guidance_layers": [0]},
}


@pytest.mark.parametrize("name", GUIDERS)
@pytest.mark.parametrize("kind", ["guided", "conditional", "text"])
def test_every_guider_draws_or_is_refused_by_name(kind, name):
    try:
        guider = getattr(diffusers.guiders, name)(**LAYERS.get(name, {}))
    except ImportError as error:
        pytest.skip(str(error))
    pipe = {"guided": guided.tiny_pipe, "conditional": conditional.tiny_pipe, "text": captions.tiny_pipe}[kind]()
    pipe.guider = guider
    words = {"prompt": "one", "class_labels": None} if kind == "text" else {}
    needs_layers = {"PerturbedAttentionGuidance", "SkipLayerGuidance", "LTX2Guidance", "AutoGuidance"}
    refused = {"MagnitudeAwareGuidance", "SmoothedEnergyGuidance"} | (needs_layers if kind == "guided" else set())
    if name not in refused:
        try:
            return assert_same_images(pipe, **words)
        except ValueError as error:  # where this network has no layer that can be weakened
            assert name in needs_layers and "finds nothing to weaken in `unet`" in str(error)
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    with guided.CountCalls(*networks) as counted:
        for each in (pipe, modular(pipe)):
            with pytest.raises(ValueError, match=f"`guider` {name} "):
                draw(each, **words)
    assert not any(counted.calls)


class LateGuidance(ClassifierFreeGuidance):
    """Fails towards the end of a run only, as guiders do whose parts have intervals of their own."""

    def forward(self, pred_cond, pred_uncond):
        if self._step > 1:
            raise IndexError("nothing left")
        return super().forward(pred_cond, pred_uncond)


@pytest.mark.parametrize("module", [guided, conditional], ids=lambda module: module.__name__)
def test_guiders_that_fail_late_are_refused_at_once(module):
    pipe = module.tiny_pipe(guider=LateGuidance(guidance_scale=2.0))
    assert_same_images(pipe, guidance_interval=(0.0, 0.6))
    with (
        guided.CountCalls(pipe.unet) as counted,
        pytest.raises(ValueError, match="`guider` LateGuidance cannot .*left"),
    ):
        draw(pipe)
    assert counted.calls == [0]


def test_missing_components_are_named():
    with pytest.raises(ValueError, match="the pipeline has no `classifier`"):
        draw(modular(guided.tiny_pipe(classifier=None)))
    with pytest.raises(ValueError, match="`unet` and `transformer` are both missing"):
        draw(ClassConditionalBlocks().init_pipeline())


# Blocks


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_documented_and_take_the_arguments_of_the_pipeline(name):
    blocks, pipeline = BLOCKS[name](), getattr(diffusers, name)
    assert getattr(diffusers, type(blocks).__name__) is type(blocks)
    arguments = inspect.signature(pipeline.__call__).parameters.items()
    others = ("self", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs")
    expected = {key: value.default for key, value in arguments if key not in others}
    assert {param.name: param.default for param in blocks.inputs} == expected
    constructor = set(inspect.signature(pipeline.__init__).parameters) - {"self"}
    assert set(blocks.component_names) - {"image_processor"} | {c.name for c in blocks.expected_configs} == constructor
    assert [param.name for param in blocks.outputs] == ["images"]
    assert "TODO" not in blocks.doc

    def check(block):
        assert block.description.endswith(".")
        for each in (*block.inputs, *block.intermediate_outputs, *block.expected_components, *block.expected_configs):
            assert each.description, (block, each)
        for part in block.sub_blocks.values():
            check(part)

    check(blocks)
    assert len(str(blocks).splitlines()) > 20


class FadeGuidance(ModularPipelineBlocks):
    """A block of somebody else: guidance for the first half of the steps only."""

    @property
    def description(self):
        return "Turns guidance off."

    @property
    def inputs(self):
        return [InputParam("guidance_scale", type_hint=float, description="Changed.")]

    def __call__(self, components, block_state, i, t):
        if i >= 2:
            block_state.guidance_scale = 0.0
        return components, block_state


class WhiteNoiseGuidance(ModularPipelineBlocks):
    """Another source of the conditional prediction."""

    @property
    def description(self):
        return "Outputs a `guide` that adds the scale."

    @property
    def intermediate_outputs(self):
        return outputs("guided_steps", guide=(object, "Guides one prediction."))

    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        block_state.guided_steps = range(100)
        block_state.guide = lambda i, t, sample, prediction, variance, scale: (prediction + scale, None)
        self.set_block_state(state, block_state)
        return components, state


def test_blocks_are_put_together_anew():
    pipe = guided.tiny_pipe()
    expected = draw(pipe, guidance_scale=2.0, guidance_interval=(0.0, 0.67))

    blocks = ClassifierGuidanceBlocks()
    blocks.sub_blocks["denoise"].sub_blocks.insert("fade", FadeGuidance(), 0)
    assert torch.equal(draw(modular(pipe, blocks), guidance_scale=2.0), expected)

    blocks = ClassifierGuidanceBlocks()
    blocks.sub_blocks["prepare_guidance"] = WhiteNoiseGuidance()
    images = draw(modular(pipe, blocks), guidance_scale=0.0)
    assert torch.equal(images, draw(pipe, guidance_scale=0.0))
    assert not torch.equal(draw(modular(pipe, blocks), guidance_scale=0.1), images)

    blocks = ClassifierGuidanceBlocks()
    del blocks.sub_blocks["denoise"].sub_blocks["guidance"], blocks.sub_blocks["prepare_guidance"]
    assert torch.equal(draw(modular(pipe, blocks)), draw(pipe, guidance_scale=0.0))

    anew = diffusers.SequentialPipelineBlocks.from_blocks_dict(ClassifierGuidanceBlocks().sub_blocks)
    assert torch.equal(draw(modular(pipe, anew), guidance_scale=2.0), draw(pipe, guidance_scale=2.0))
    assert isinstance(blocks.sub_blocks["denoise"].sub_blocks["scheduler_step"], ModularPipelineBlocks)
    assert LoopClassifierGuidance().description


def test_a_state_can_be_run_again():
    pipe = guided.tiny_pipe()
    twin, arguments = modular(pipe), {"class_labels": [3], "num_inference_steps": 4, "output_type": "latent"}
    state = twin(**arguments, sample=torch.ones(1, 3, 8, 8))
    again = twin(state=state, output_type="pt", output="images")
    assert torch.equal(again, (state.get("images") / 2 + 0.5).clamp(0, 1))
    assert state.get("class_ids").tolist() == [3] and state.get("sample").unique().tolist() == [1.0]


# Saved and loaded


def reloaded(pipe, folder):
    """The standard pipeline, saved and loaded."""
    pipe.save_pretrained(folder / "standard")
    loaded = type(pipe).from_pretrained(folder / "standard")
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_saved_loaded_and_moved(tmp_path):
    pipe = guided.tiny_pipe(scheduler=DPMSolverMultistepScheduler(), guider=AdaptiveProjectedGuidance(**APG))
    modular(pipe).save_pretrained(str(tmp_path / "saved"), overwrite_modular_index=True)
    check_folder(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "moved")  # the index still names the folder it was saved into
    # What is mapped from a file lies elsewhere in memory, and torch may round differently there.
    expected = draw(reloaded(pipe, tmp_path), class_labels="seven")
    for load in (ModularPipeline.from_pretrained, ClassifierGuidanceBlocks().init_pipeline):
        loaded = load(tmp_path / "moved")
        assert type(loaded.blocks) is ClassifierGuidanceBlocks
        assert loaded.null_component_names == ["unet", "scheduler", "classifier", "guider"]
        loaded.load_components()
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.unet) is type(pipe.unet) and loaded.guider.config.guidance_scale == 3.0
        assert torch.equal(draw(loaded, class_labels="seven"), expected)


HOSTILE = {
    "library": ({"unet": ["subprocess", "Popen", {}]}, "no library that models come from"),
    "type": ({"unet": ["diffusers", "UNet2DModel", {"type_hint": ["os", "system"]}]}, "no library that models come"),
    "path": (
        {"unet": [None, None, {"pretrained_model_name_or_path": "/etc"}]},
        "paths and addresses are not followed",
    ),
    "folder": ({"unet": ["diffusers", "UNet2DModel", {"subfolder": "../.."}]}, "from the folder '../..'"),
    "blocks": ({"_blocks_class_name": "logging"}, "no pipeline of diffusers or diffusers_ext"),
    "code": ({"auto_map": {"ModularPipelineBlocks": "os.system"}}, "no file of this repository"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_index_is_refused(case, tmp_path):
    entries, message = HOSTILE[case]
    index = {"_class_name": "ModularPipeline", "_blocks_class_name": "ClassifierGuidanceBlocks", **entries}
    (tmp_path / "modular_model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        ClassifierGuidanceBlocks().init_pipeline(tmp_path)


@pytest.mark.parametrize("module", [guided, conditional], ids=lambda module: module.__name__)
def test_built_from_a_standard_repository(module, tmp_path, caplog):
    pipe = module.tiny_pipe(scheduler=DPMSolverMultistepScheduler())
    pipe.save_pretrained(tmp_path)
    diffusers.utils.logging.enable_propagation()
    twin = BLOCKS[type(pipe).__name__]().init_pipeline(tmp_path)
    twin.load_components()
    diffusers.utils.logging.disable_propagation()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert twin.guider is None
    assert torch.equal(draw(twin, class_labels="seven"), draw(reloaded(pipe, tmp_path), class_labels="seven"))
    with pytest.raises(OSError, match="model_index.json"):
        ClassifierGuidanceBlocks().init_pipeline(tmp_path / "unet")


@pytest.mark.parametrize("module", [guided, conditional], ids=lambda module: module.__name__)
def test_code_travels_with_the_blocks_and_is_left_behind(module, tmp_path):
    pipe = module.tiny_pipe(scheduler=DPMSolverMultistepScheduler())
    for name, source, with_code in (("code", modular(pipe), True), ("plain", tmp_path / "code", False)):
        (tmp_path / name).mkdir()
        stage(source, tmp_path / name, self_contained=with_code)
        check_folder(tmp_path / name)
    assert len(list((tmp_path / "code").glob("modular_*_????????.py"))) == 1
    assert not list((tmp_path / "plain").rglob("*.py")) and not (tmp_path / "plain" / "modular_config.json").exists()
    assert "auto_map" not in (tmp_path / "plain" / "unet" / "config.json").read_text()

    expected = draw(reloaded(pipe, tmp_path), class_labels="seven")
    for name, trust in (("code", {"trust_remote_code": True}), ("plain", {})):
        loaded = ModularPipeline.from_pretrained(str(tmp_path / name), **trust)  # no Path: compared with the index
        loaded.load_components(**trust)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.blocks).__module__.startswith("diffusers_modules." if trust else "diffusers_ext.")
        assert torch.equal(draw(loaded, class_labels="seven"), expected)

    blocks = diffusers.SequentialPipelineBlocks.from_blocks_dict(BLOCKS[type(pipe).__name__]().sub_blocks)
    with pytest.raises(ValueError, match="are not blocks of diffusers_ext as they are"):
        stage(modular(pipe, blocks), tmp_path / "code", self_contained=True)


# On the Hub


def test_push_to_hub_of_diffusers_is_that_of_the_package(hub, hub_token, tmp_path):
    pipe = guided.tiny_pipe(guider=AdaptiveProjectedGuidance(**APG))
    push(modular(pipe), "me/m0")
    loaded = ModularPipeline.from_pretrained("me/m0")
    loaded.load_components()
    twin, saved = modular(pipe), modular(pipe)
    twin.push_to_hub("m1")
    saved.save_pretrained(str(tmp_path), push_to_hub=True, repo_id="me/m2", overwrite_modular_index=True)
    loaded.push_to_hub("me/m3")
    for name, numbers in (("modular_model_index.json", (1, 2, 3)), ("README.md", (1, 2))):
        expected = hub.files("me/m0")[name].decode()
        for number in numbers:
            assert hub.files(f"me/m{number}")[name].decode() == expected.replace("m0", f"m{number}")
    assert 'ModularPipeline.from_pretrained("me/m3")' in hub.files("me/m3")["README.md"].decode()
    assert {*hub.files("me/m0")} == {*hub.files("me/m1")} == {*hub.files("me/m2")} == {*hub.files("me/m3")}
    for number, each in enumerate((twin, saved, loaded), 1):
        origins = {each.config[name][2]["pretrained_model_name_or_path"] for name in each.pretrained_component_names}
        assert origins == {f"me/m{number}"}  # and not a folder that is gone
        again = ModularPipeline.from_pretrained(f"me/m{number}")
        again.load_components()
        again.set_progress_bar_config(disable=True)
        assert torch.equal(draw(again), draw(pipe))

    # What people wrote stays, and what is not of ours goes as diffusers has it.
    card = hub.files("me/m1")["README.md"].decode()
    hub.write("me/m1", {"README.md": f"{card}\n## Mine\n".encode()})
    twin.push_to_hub("me/m1", commit_message="Again")
    assert hub.files("me/m1")["README.md"].decode() == f"{card}\n## Mine\n"
    theirs = ModularPipeline(FadeGuidance())
    theirs.push_to_hub("me/theirs")
    assert b"This is the model card of a" in hub.files("me/theirs")["README.md"]


@pytest.mark.parametrize(("status", "said"), [(500, "500 Internal Server Error"), (403, "403")])
def test_a_failing_hub_is_not_a_missing_file(hub, hub_token, monkeypatch, status, said):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    push(modular(guided.tiny_pipe()), f"me/fails-{status}")
    hub.fail("modular_model_index", status, times=100)
    with pytest.raises(
        OSError, match=f"`pretrained_model_name_or_path` 'me/fails-{status}' could not be read.*{said}"
    ):
        ClassifierGuidanceBlocks().init_pipeline(f"me/fails-{status}")


FRESH = """
import sys
import torch
from diffusers import DiffusionPipeline, ModularPipeline

def draw(pipe, **output):
    pipe.set_progress_bar_config(disable=True)
    arguments = {"class_labels": ["seven"], "num_inference_steps": 3, "output_type": "latent", **output}
    return pipe(**arguments, generator=torch.Generator().manual_seed(0))

sys.modules["diffusers_ext"] = None  # not installed
try:
    ModularPipeline.from_pretrained("me/blocks-with-code")
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
images = []
for name in ("me/blocks-with-code", FOLDER + "-with-code"):
    pipe = ModularPipeline.from_pretrained(name, trust_remote_code=True)
    pipe.load_components(trust_remote_code=True)
    assert type(pipe.unet).__module__.startswith("diffusers_modules.")
    images.append(draw(pipe, output="images"))
del sys.modules["diffusers_ext"]

import diffusers_ext

expected = draw(DiffusionPipeline.from_pretrained("me/standard-for-blocks")).images
assert all(torch.equal(image, expected) for image in images)
pipes = [ModularPipeline.from_pretrained(name) for name in ("me/modular", "me/modular-by-diffusers", FOLDER)]
for name in ("me/standard-for-blocks", "me/carries-code-for-blocks", "me/blocks-with-code", FOLDER + "-with-code"):
    pipes.append(diffusers_ext.ClassifierGuidanceBlocks().init_pipeline(name))
for pipe in pipes:
    pipe.load_components()
    assert type(pipe.blocks) is diffusers_ext.ClassifierGuidanceBlocks
    assert type(pipe.unet) is diffusers_ext.ADMUNet2DModel
    assert pipe.guider.config.guidance_scale == 3.0
    assert torch.equal(draw(pipe, output="images"), expected)
"""


def test_pushed_pulled_and_loaded_in_a_fresh_process(hub, hub_token, tmp_path, fresh_python):
    pipe = guided.tiny_pipe(scheduler=DPMSolverMultistepScheduler(), guider=AdaptiveProjectedGuidance(**APG))
    twin = modular(pipe)
    pipe.save_pretrained(tmp_path / "standard")
    files = [path for path in (tmp_path / "standard").rglob("*") if path.is_file()]
    hub.create("me/standard-for-blocks")
    names = {path.relative_to(tmp_path / "standard").as_posix(): path.read_bytes() for path in files}
    hub.write("me/standard-for-blocks", names)
    push(pipe, "me/carries-code-for-blocks", self_contained=True)
    push(twin, "me/modular")
    push(twin, "me/blocks-with-code", self_contained=True)
    saved = str(tmp_path / "saved")
    twin.save_pretrained(saved, push_to_hub=True, repo_id="me/modular-by-diffusers", overwrite_modular_index=True)

    index = json.loads(hub.files("me/modular")["modular_model_index.json"])
    assert {index[name][2]["pretrained_model_name_or_path"] for name in twin.pretrained_component_names} == {
        "me/modular"
    }
    assert index["_blocks_class_name"] == "ClassifierGuidanceBlocks"
    assert str(tmp_path) not in str(hub.files("me/modular")) + str(hub.files("me/modular-by-diffusers"))
    card = hub.files("me/modular")["README.md"].decode()
    assert "modular-diffusers" in card and 'ModularPipeline.from_pretrained("me/modular")' in card

    pull("me/blocks-with-code", tmp_path / "pulled-with-code")
    folder = pull("me/modular", tmp_path / "pulled")
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    fresh_python(f"FOLDER = {str(folder)!r}{FRESH}", tmp_path, HF_HUB_OFFLINE="0")
