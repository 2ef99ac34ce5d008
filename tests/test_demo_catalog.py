"""The models of the demo: what is said of them, which schedulers work, who is let in, and who stays in memory."""

import gc
import json
import os
import shutil
import socket
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from catalog import LOADING, Catalog, Stopped, new_pipeline
from huggingface_hub import constants
from schedulers import scheduler_classes
from settings import SettingsError
from test_pipeline_class_conditional import build
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

import diffusers
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConfigMixin,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LDMPipeline,
    ModelMixin,
    PNDMPipeline,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import AdaptiveProjectedGuidance
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

from diffusers_ext import (
    ADMUNet2DModel,
    ClassConditionalPipeline,
    ClassifierGuidedPipeline,
    ComposableUNet2DModel,
)
from diffusers_ext.hub import export, push
from diffusers_ext.hub.remote import upload


SHIPPED = ["film-mnist", "dit-gqa-mnist", "adm-mnist", "dilated-mnist"]
SIZE = {"sample_size": 8, "in_channels": 3, "out_channels": 3}
UNET = {**SIZE, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
ATTENTION = {"attention_resolutions": (4,), "attention_head_dim": 16}
BLOCKS = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
CLASSES = {"num_class_embeds": 4, "null_class": True}
# The table of the README, for networks of a variance-preserving process. UnCLIP knows one schedule only.
DIFFUSION_SCHEDULERS = {
    "CogVideoXDDIM", "CogVideoXDPM", "DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep",
    "DPMSolverMultistep", "DPMSolverSDE", "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete",
    "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LMSDiscrete", "PNDM", "SASolver", "TCD",
    "UniPCMultistep",
}  # fmt: skip
FLOW_SCHEDULERS = {
    "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete",
    "SASolver", "UniPCMultistep",
}  # fmt: skip


def composable(**changes):
    return build(ComposableUNet2DModel, **{**UNET, **ATTENTION, **CLASSES, **changes})


def class_conditional(scheduler=None, **components):
    components = {"unet": composable(), **components}
    return ClassConditionalPipeline(scheduler=scheduler or DDPMScheduler(), **components)


def unet_of_diffusers(**changes):
    return build(UNet2DModel, **{**UNET, **BLOCKS, **changes})


def decoder(model_class=AutoencoderKL, **changes):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return build(model_class, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **blocks, **changes)


def safety_checker():
    vision = {**TEXT, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    return StableDiffusionSafetyChecker(
        CLIPConfig(text_config={**TEXT}, vision_config=vision, projection_dim=16)
    ).eval()


LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def clip_tokenizer():
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in LETTERS), *LETTERS]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)


def clip(model_class=CLIPTextModel):
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "projection_dim": 16}
    torch.manual_seed(0)
    return model_class(CLIPTextConfig(vocab_size=54, max_position_embeddings=16, **TEXT, **ends)).eval()


def t5_tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=16)


def t5():
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()


def stable_diffusion(pipeline_class=StableDiffusionPipeline, safety_checker=None, feature_extractor=None):
    unet = build(
        UNet2DConditionModel,
        **{**UNET, "in_channels": 4, "out_channels": 4},
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    schedule = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
    }
    options = {"steps_offset": 1, "skip_prk_steps": True, "set_alpha_to_one": False, "prediction_type": "epsilon"}
    return pipeline_class(
        vae=decoder(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=PNDMScheduler(**schedule, **options),
        safety_checker=safety_checker,
        feature_extractor=feature_extractor,
        requires_safety_checker=safety_checker is not None,
    )


def stable_diffusion_3():
    transformer = build(
        SD3Transformer2DModel,
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
    )
    t5_of_32 = T5Config(vocab_size=30, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=decoder(shift_factor=0.1),
        text_encoder=clip(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=T5EncoderModel(t5_of_32).eval(),
        tokenizer_3=t5_tokenizer(),
    )


def flux(guidance_embeds=True):
    transformer = build(
        FluxTransformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=guidance_embeds,
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=decoder(shift_factor=0.1),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )


def dit():
    transformer = build(
        DiTTransformer2DModel,
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    )
    return DiTPipeline(transformer, decoder(), DDIMScheduler())


@pytest.fixture(scope="module")
def shipped():
    """The catalog as the demo has it on a CPU."""
    return Catalog.shipped()


@pytest.fixture
def saved(tmp_path):
    """Saves a pipeline and gives a catalog of it under the name "mine"."""

    def save(pipe, **options):
        pipe.save_pretrained(tmp_path / "mine")
        return Catalog({"mine": tmp_path / "mine"}, **options)

    return save


def draw(catalog, model, scheduler, num_inference_steps=2, dtype="float32", **call):
    """Images `(B, H, W, C)` of a model with another scheduler, as the demo draws them."""
    description = catalog.describe(model)
    if description.takes_prompt:
        call = {"prompt": ["a cat", "a dog"], "height": 16, "width": 16, **call}
    elif description.labels:
        call = {"class_labels": [1, 2], **call}
    else:
        call = {"batch_size": 2, **call}
    with catalog.borrow(model, dtype) as pipe:
        options = description.scheduler_options.get(scheduler, {})
        own = new_pipeline(pipe, getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **options))
        sources = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        return own(num_inference_steps=num_inference_steps, generator=sources, output_type="np", **call).images


# What is said of models


def test_shipped_models_are_described(shipped, root):
    assert shipped.names[:4] == SHIPPED
    descriptions = {name: shipped.describe(name) for name in SHIPPED}
    for name, description in descriptions.items():
        assert description.name == name and not description.wrapped and not description.latent
        assert description.source == f"model_cards/{name}" and (root / description.source).is_dir()
        assert description.channels == 1 and not description.takes_prompt
        assert description.dtypes == ("float32", "bfloat16")
        assert description.default_scheduler == "DPMSolverMultistepScheduler"
    assert [(d.height, d.width) for d in descriptions.values()] == [(32, 32), (32, 32), (32, 32), (28, 28)]
    assert [d.parameters for d in descriptions.values()] == [2_154_305, 2_058_512, 1_673_106, 308_417]  # the README's
    assert descriptions["adm-mnist"].pipeline == "ClassifierGuidedPipeline"
    digits = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    assert [d.labels for d in descriptions.values()] == [digits] * 3 + [()]
    assert [set(d.guidance) for d in descriptions.values()] == [
        {"none", "classifier-free", "adaptive-projected"},
        {"none", "classifier-free", "adaptive-projected"},
        {"none", "classifier", "classifier-mean", "adaptive-projected"},
        {"none"},
    ]
    assert [d.resizable for d in descriptions.values()] == [True, False, False, True]


def test_describing_loads_no_weights(shipped, saved):
    catalog = saved(class_conditional())
    assert catalog.describe("mine").parameters == sum(p.numel() for p in composable().parameters())
    assert catalog.loaded == []


@pytest.mark.parametrize("model", SHIPPED)
def test_shipped_models_draw_with_every_scheduler_offered(shipped, model):
    description = shipped.describe(model)
    assert {name.removesuffix("Scheduler") for name in description.schedulers} == DIFFUSION_SCHEDULERS
    for scheduler in description.schedulers:
        images = draw(shipped, model, scheduler)
        assert images.shape == (2, description.height, description.width, 1)
        assert np.isfinite(images).all() and images.std() > 0.01, scheduler
        if model == "film-mnist":
            assert np.array_equal(images, draw(shipped, model, scheduler)), scheduler
    with shipped.borrow(model, "float32") as pipe:
        for name, scheduler_class in scheduler_classes().items():
            options = description.scheduler_options.get(name, {})
            has_eta = name in description.schedulers and "eta" in scheduler_class.step.__code__.co_varnames
            assert has_eta == (name in description.eta_schedulers)
            assert not options or name in description.schedulers
        assert type(pipe.scheduler) is DDPMScheduler  # the shared pipeline is as it was loaded


class ConstantDenoiser(ModelMixin, ConfigMixin):
    """The exact noise prediction for data whose images are `value` everywhere, by the schedule it was trained on: who
    shows it other noise than that of the timestep gets another image."""

    @register_to_config
    def __init__(self, value=0.25, beta_schedule="linear", sample_size=8, in_channels=1, out_channels=1):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.abar = DDPMScheduler(beta_schedule=beta_schedule).alphas_cumprod.double().numpy()

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        abar = float(np.interp(float(timestep[0]), np.arange(1000), self.abar))
        return ((sample - abar**0.5 * self.config.value) / (1 - abar) ** 0.5,)


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_schedulers_that_work_and_no_others_follow_the_training(beta_schedule, tmp_path):
    from schedulers import working_schedulers

    own = DDPMScheduler(beta_schedule=beta_schedule, variance_type="fixed_small_log")
    own.save_pretrained(tmp_path)
    own = DDPMScheduler.from_pretrained(tmp_path)  # a saved config states its defaults too
    pipe = ClassConditionalPipeline(unet=ConstantDenoiser(beta_schedule=beta_schedule), scheduler=own)
    pipe.set_progress_bar_config(disable=True)
    working = working_schedulers(pipe, scheduler_classes())
    expected = DIFFUSION_SCHEDULERS | ({"UnCLIP"} if beta_schedule != "linear" else set())
    assert {name.removesuffix("Scheduler") for name in working} == expected
    errors = {}
    for name in [*working, "DDPMWuerstchenScheduler"]:
        scheduler = scheduler_classes()[name].from_config(own.config, **working.get(name, {}))
        images = new_pipeline(pipe, scheduler)(
            num_inference_steps=20, generator=torch.Generator().manual_seed(0), output_type="pt"
        ).images
        errors[name] = float((images * 2 - 1 - 0.25).abs().max())
    assert max(errors[name] for name in working) < 0.05, errors  # some keep the noise of the last timestep, 0.01
    assert errors["DDPMWuerstchenScheduler"] > 0.1


def test_schedulers_of_other_models(saved):
    flow = saved(class_conditional(FlowMatchEulerDiscreteScheduler(shift=3.0))).describe("mine")
    assert {name.removesuffix("Scheduler") for name in flow.schedulers} >= FLOW_SCHEDULERS
    assert not {"DDIMScheduler", "EulerDiscreteScheduler"} & set(flow.schedulers)
    assert flow.scheduler_options["DPMSolverMultistepScheduler"]["flow_shift"] == 3.0

    edm = saved(class_conditional(EDMEulerScheduler(), unet=composable(**CLASSES))).describe
    with pytest.raises(SettingsError, match="EDM"):
        edm("mine")


def test_clipping_is_kept_in_pixels_and_not_in_latents(saved):
    def options(pipe):
        return saved(pipe).describe("mine").scheduler_options.get("DPMSolverMultistepScheduler", {})

    assert options(class_conditional(DDPMScheduler(clip_sample_range=0.5))) == {
        "thresholding": True,
        "sample_max_value": 0.5,
    }
    assert options(class_conditional(DDPMScheduler(clip_sample=False))) == {}
    latent = composable(in_channels=4, out_channels=4)
    assert options(class_conditional(unet=latent, vae=decoder())) == {}


def test_labels_are_names_that_mean_one_class(saved):
    names = {0: "tench, Tinca tinca", 1: "crane", 3: "crane"}
    assert saved(class_conditional(id2label=names)).describe("mine").labels == ("tench", "1", "2", "3")
    with_null = class_conditional(unet=composable(null_class=False), null_class_label=3)
    assert saved(with_null).describe("mine").labels == ("0", "1", "2")


def test_guidance_that_a_model_has(saved):
    def kinds(pipe):
        return set(saved(pipe).describe("mine").guidance)

    free = {"none", "classifier-free", "adaptive-projected"}
    assert kinds(class_conditional()) == free
    assert kinds(class_conditional(unet=composable(null_class=False))) == {"none"}
    assert kinds(class_conditional(unet=composable(null_class=False), null_class_label=3)) == free
    guided = class_conditional(guide_model=composable())
    assert kinds(guided) == {"none", "autoguidance", "adaptive-projected"}
    unet = build(ADMUNet2DModel, **UNET, **ATTENTION)
    assert kinds(ClassifierGuidedPipeline(unet=unet, scheduler=DDPMScheduler())) == {"none"}
    text = class_conditional(
        unet=composable(cross_attention_dim=16, num_class_embeds=None, null_class=False),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
    )
    assert kinds(text) == free
    assert saved(text).describe("mine").takes_prompt


# Pipelines of diffusers


@pytest.mark.parametrize(
    ("pipeline_class", "scheduler"),
    [
        (DDPMPipeline, DDPMScheduler()),
        (DDIMPipeline, DDIMScheduler(clip_sample=False)),
        (PNDMPipeline, PNDMScheduler()),
    ],
)
def test_unconditional_pipelines_are_drawn_by_ours(saved, pipeline_class, scheduler):
    theirs = pipeline_class(unet_of_diffusers(), scheduler)
    catalog = saved(theirs)
    description = catalog.describe("mine")
    assert description.wrapped and description.pipeline == "ClassConditionalPipeline"
    assert (description.network, description.channels, description.height) == ("UNet2DModel", 3, 8)
    assert {name.removesuffix("Scheduler") for name in description.schedulers} == DIFFUSION_SCHEDULERS
    if pipeline_class is DDIMPipeline:
        sources = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        expected = theirs(batch_size=2, num_inference_steps=3, generator=sources, output_type="np").images
        assert np.allclose(draw(catalog, "mine", "DDIMScheduler", 3), expected, atol=1e-5)


def test_a_network_beside_the_index(saved, tmp_path):
    """As in google/ddpm-cifar10-32 and other repositories of the first pipelines."""
    catalog = saved(DDPMPipeline(unet_of_diffusers(), DDPMScheduler()))
    for path in [*(tmp_path / "mine" / "unet").iterdir(), *(tmp_path / "mine" / "scheduler").iterdir()]:
        path.rename(tmp_path / "mine" / path.name)
    (tmp_path / "mine" / "unet").rmdir()
    (tmp_path / "mine" / "scheduler").rmdir()
    assert catalog.describe("mine").network == "UNet2DModel"
    assert draw(catalog, "mine", "DDIMScheduler").shape == (2, 8, 8, 3)


def test_dit_pipeline_is_drawn_by_ours(saved, tmp_path):
    catalog = saved(dit())
    index = tmp_path / "mine" / "model_index.json"  # of the published DiT, which `save_pretrained` does not write
    names = {"0": "tench, Tinca tinca", "134": "crane", "517": "crane"}
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": names}))
    description = catalog.describe("mine")
    assert description.wrapped and description.latent and description.channels == 3
    assert (description.height, description.width) == (8, 8)
    assert set(description.guidance) == {"none", "classifier-free", "adaptive-projected"}
    labels = description.labels
    assert len(labels) == 1000 and (labels[0], labels[1], labels[134], labels[517]) == ("tench", "1", "134", "517")
    for scheduler in description.schedulers:
        images = draw(catalog, "mine", scheduler, guidance_scale=2.0)
        assert images.shape == (2, 8, 8, 3) and np.isfinite(images).all()


@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (stable_diffusion, {"none", "classifier-free"}),
        (stable_diffusion_3, {"none", "classifier-free"}),
        (flux, {"none", "embedded"}),
        (lambda: flux(guidance_embeds=False), {"none"}),
    ],
    ids=["stable-diffusion", "stable-diffusion-3", "flux-dev", "flux-schnell"],
)
def test_text_to_image_pipelines_draw_themselves(saved, make, kinds):
    theirs = make()
    catalog = saved(theirs)
    description = catalog.describe("mine")
    assert description.pipeline == type(theirs).__name__ and not description.wrapped
    assert description.takes_prompt and description.latent and description.resizable and description.labels == ()
    assert set(description.guidance) == kinds
    assert description.parameters == sum(
        p.numel() for p in (theirs.components.get("unet") or theirs.transformer).parameters()
    )
    own = type(theirs.scheduler).__name__
    assert own in description.schedulers and description.default_scheduler in description.schedulers
    if make is stable_diffusion:
        assert {"DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"} <= set(
            description.schedulers
        )
        assert (description.height, description.width) == (16, 16)
    theirs.set_progress_bar_config(disable=True)
    sources = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    arguments = {"prompt": ["a cat", "a dog"], "height": 16, "width": 16, "num_inference_steps": 2}
    expected = theirs(**arguments, generator=sources, output_type="np").images
    assert np.allclose(draw(catalog, "mine", own), expected, atol=1e-5)
    for scheduler in description.schedulers:
        assert np.isfinite(draw(catalog, "mine", scheduler)).all(), scheduler


def test_a_safety_checker_stays(saved):
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    catalog = saved(stable_diffusion(safety_checker=safety_checker(), feature_extractor=CLIPImageProcessor(**size)))
    assert catalog.describe("mine").pipeline == "StableDiffusionPipeline"
    with catalog.borrow("mine", "float32") as pipe:
        assert pipe.safety_checker is not None
        assert next(pipe.safety_checker.parameters()).device.type == "cpu"
    assert draw(catalog, "mine", "DDIMScheduler").shape == (2, 16, 16, 3)


@pytest.mark.parametrize(
    ("make", "phrase"),
    [
        (lambda: stable_diffusion(StableDiffusionImg2ImgPipeline), "draws no images of a class or a text alone"),
        (
            lambda: LDMPipeline(decoder(VQModel), unet_of_diffusers(in_channels=4, out_channels=4), DDIMScheduler()),
            "LDM",
        ),
        (lambda: ConsistencyModelPipeline(unet_of_diffusers(), CMStochasticIterativeScheduler()), "distilled"),
        (lambda: class_conditional(unet=build(ADMUNet2DModel, **UNET, **ATTENTION, low_res_channels=3)), "enlarges"),
    ],
    ids=["image-to-image", "vq", "consistency", "enlarging"],
)
def test_other_pipelines_are_refused(saved, make, phrase):
    with pytest.raises(SettingsError, match=phrase):
        saved(make()).describe("mine")


# Precision


def bits(pipe):
    """Every parameter and buffer of every network, by its name."""
    networks = {name: x for name, x in pipe.components.items() if isinstance(x, torch.nn.Module)}
    return {
        f"{part}.{name}": values
        for part, network in networks.items()
        for name, values in [*network.named_parameters(), *network.named_buffers()]
    }


def assert_same_bits(actual, expected):
    actual, expected = bits(actual), bits(expected)
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        assert actual[name].dtype == values.dtype and torch.equal(actual[name], values), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", SHIPPED)
def test_networks_are_those_of_from_pretrained(shipped, root, model, dtype):
    expected = DiffusionPipeline.from_pretrained(root / "model_cards" / model, dtype=getattr(torch, dtype))
    with shipped.borrow(model, dtype) as pipe:
        assert_same_bits(pipe, expected)
    description = shipped.describe(model)
    images = draw(shipped, model, description.default_scheduler, 3, dtype)
    expected.set_progress_bar_config(disable=True)
    options = description.scheduler_options.get(description.default_scheduler, {})
    scheduler = getattr(diffusers, description.default_scheduler)
    expected.scheduler = scheduler.from_config(expected.scheduler.config, **options)
    call = {"class_labels": [1, 2]} if description.labels else {"batch_size": 2}
    sources = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    wanted = expected(num_inference_steps=3, generator=sources, output_type="np", **call).images
    assert np.array_equal(images, wanted)


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_3, flux, dit])
def test_networks_of_diffusers_are_those_of_from_pretrained(saved, tmp_path, make):
    catalog = saved(make())
    expected = DiffusionPipeline.from_pretrained(tmp_path / "mine", dtype=torch.bfloat16)
    with catalog.borrow("mine", "bfloat16") as pipe:
        assert_same_bits(pipe, expected)


def test_loading_leaves_the_default_dtype_of_torch_alone(shipped):
    """It is one for all threads, so that those who draw meanwhile would draw something else."""
    seen, done = set(), threading.Event()

    def watch():
        while not done.wait(0.0005):
            seen.add(torch.get_default_dtype())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        catalog = Catalog.shipped()
        for model in SHIPPED:
            with catalog.borrow(model, "bfloat16"):
                pass
    finally:
        done.set()
        watcher.join()
    assert seen == {torch.float32}


@pytest.mark.parametrize("dtype", ["float16", "float64", "", "__class__"])
def test_precisions_that_there_are_not_are_refused(shipped, dtype):
    with pytest.raises(SettingsError, match="must be one of float32, bfloat16"), shipped.borrow("film-mnist", dtype):
        pass


# One pipeline for many runs


def test_a_run_has_a_scheduler_a_guider_and_a_state_of_its_own(saved):
    catalog = saved(class_conditional(DDIMScheduler()))
    with catalog.borrow("mine", "float32") as pipe:
        before = dict(pipe.config), pipe.scheduler, pipe.guider
        guider, scheduler = AdaptiveProjectedGuidance(), EulerDiscreteScheduler()
        own = new_pipeline(pipe, scheduler, guider)
        assert own.unet is pipe.unet and own.scheduler is scheduler and own.guider is guider
        own(class_labels=1, num_inference_steps=2, guidance_interval=(0.0, 0.5))
        own._interrupt = True
        assert (dict(pipe.config), pipe.scheduler, pipe.guider) == before
        assert not hasattr(pipe, "_interrupt") or not pipe._interrupt
        other = new_pipeline(pipe, DDIMScheduler())
        assert other.guider is None
        call = {"class_labels": 1, "num_inference_steps": 2, "output_type": "np", "guidance_scale": 2.0}
        images = other(**call, generator=torch.Generator().manual_seed(0)).images
        assert np.array_equal(images, pipe(**call, generator=torch.Generator().manual_seed(0)).images)


# Memory


@pytest.fixture
def five(tmp_path):
    """Folders of five small models."""
    folders = {f"model-{i}": tmp_path / f"model-{i}" for i in range(5)}
    for folder in folders.values():
        class_conditional().save_pretrained(folder)
    return folders


def test_the_pipeline_used_longest_ago_leaves(five):
    catalog = Catalog(five, capacity=2)
    networks = {}
    for name in ("model-0", "model-1", "model-0", "model-2"):
        with catalog.borrow(name, "float32") as pipe:
            networks[name] = weakref.ref(pipe.unet)
        del pipe
    assert catalog.loaded == [("model-0", "float32"), ("model-2", "float32")]
    assert networks["model-1"]() is None and networks["model-0"]() is not None
    with catalog.borrow("model-0", "bfloat16") as pipe:  # another precision takes another place
        assert pipe.unet.dtype == torch.bfloat16
    assert catalog.loaded == [("model-2", "float32"), ("model-0", "bfloat16")]
    assert networks["model-0"]() is None


def test_no_more_than_capacity_are_in_memory_at_any_time(five):
    catalog = Catalog(five, capacity=2)
    for name in five:
        catalog.describe(name)
    networks, most, errors = weakref.WeakSet(), [], []
    lock = threading.Lock()

    def work(seed):
        try:
            for i in range(3):
                with catalog.borrow(f"model-{(seed + i * i) % 5}", "float32") as pipe:
                    with lock:
                        networks.add(pipe.unet)
                        most.append(len(networks))
                    new_pipeline(pipe, DDIMScheduler())(class_labels=1, num_inference_steps=1)
                del pipe
        except Exception as error:  # a thread would swallow it
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and not any(thread.is_alive() for thread in threads)
    gc.collect()
    assert len(most) == 15 and max(most) <= 2 and len(networks) == 2 and len(catalog.loaded) == 2


def test_those_who_share_a_model_load_it_once(five, caplog):
    catalog = Catalog(five, capacity=2)
    barrier, pipes = threading.Barrier(4), []

    def work():
        barrier.wait()
        with catalog.borrow("model-0", "float32") as pipe:
            pipes.append(id(pipe))
            barrier.wait()  # all four have it at once

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(pipes) == 4 and len(set(pipes)) == 1


def test_who_waits_is_served_in_turn_and_may_give_up(five):
    catalog = Catalog(five, capacity=1)
    for name in five:
        catalog.describe(name)
    order, stop = [], threading.Event()

    def work(name, stop=lambda: False):
        try:
            with catalog.borrow(name, "float32", stop):
                order.append(name)
        except Stopped:
            order.append(f"{name} gave up")

    with catalog.borrow("model-0", "float32"):
        # The last one asks for what is in memory. It waits all the same, or the others might wait for ever.
        work_of = {"model-1": (), "model-2": (stop.is_set,), "model-3": (), "model-0": ()}
        threads = []
        for waiting, (name, more) in enumerate(work_of.items(), 1):
            threads.append(threading.Thread(target=work, args=(name, *more)))
            threads[-1].start()
            deadline = time.monotonic() + 10
            while len(catalog._queue) < waiting and time.monotonic() < deadline:
                time.sleep(0.01)
        assert order == []
        stop.set()
        threads[1].join(5)
        assert order == ["model-2 gave up"]
    for thread in threads:
        thread.join(30)
    assert order == ["model-2 gave up", "model-1", "model-3", "model-0"]


def test_a_model_that_cannot_be_loaded_says_why_and_is_tried_anew(five, tmp_path):
    catalog = Catalog(five, capacity=1)
    weights = five["model-0"] / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    for _ in range(2):
        with pytest.raises(SettingsError, match="`model` 'model-0' cannot be used") as error:
            with catalog.borrow("model-0", "float32"):
                pass
        assert str(tmp_path) not in str(error.value)
    assert catalog.loaded == [] and catalog._queue == []
    weights.write_bytes(content)
    with catalog.borrow("model-0", "float32") as pipe:
        assert isinstance(pipe, ClassConditionalPipeline)


def test_errors_of_who_borrows_leave_the_place_in_order(five):
    catalog = Catalog(five, capacity=1)
    with pytest.raises(ZeroDivisionError), catalog.borrow("model-0", "float32"):
        raise ZeroDivisionError
    with catalog.borrow("model-1", "float32"):
        assert catalog.loaded == [("model-1", "float32")]


# Who is let in


HOSTILE = [
    "", " ", ".", "..", "/", "//", "~", "~root", "/etc", "/etc/passwd", "/proc/self", "C:\\Windows", "\\\\host\\share",
    "../../etc/passwd", "film-mnist/../adm-mnist", "model_cards/../model_cards/film-mnist", "a/../b", "a..b/c",
    "a/b/c", "a/b/c/d", "/a/b", "film-mnist\x00", "film-mnist\n", "fi\u202elm", "fılm-mnist", "film mnist",
    "a/b?x=1", "a/b#c", "a/b@main", "a/b:c", "a/%2e%2e", "https://huggingface.co/a/b", "http://127.0.0.1:80/a",
    "file:///etc/passwd", "hf://a/b", "git@a/b", "$HOME/x", "`id`/x", "a/b;id", "a|b/c", "<script>/x", "'/'", '"/"',
    "{a}/b", "-a/b", ".a/b", "a/-b", "a/.b", "a/b" * 100, "x" * 10**6, "a/" * 10**5,
    None, 1, True, b"film-mnist", ["film-mnist"], {"a": 1}, ("film-mnist",), 1.5, object(),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_names_are_refused_at_once(shipped, monkeypatch, number):
    name = HOSTILE[number]
    monkeypatch.setattr("catalog.pull", lambda *arguments, **options: pytest.fail("it reached for the Hub"))
    start = time.thread_time()
    with pytest.raises(SettingsError) as error:
        shipped.describe(name)
    assert time.thread_time() - start < 0.5
    assert len(str(error.value)) < 700
    assert str(error.value).isascii() and str(error.value).isprintable()


def test_folders_are_read_below_the_allowed_ones_only(tmp_path, monkeypatch, root):
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    for folder in (allowed / "mine", allowed / "deep" / "mine", outside / "secret", tmp_path / "allowed-not"):
        class_conditional().save_pretrained(folder)
    (allowed / "link-out").symlink_to(outside / "secret")
    (allowed / "link-in").symlink_to(allowed / "mine")
    (allowed / "empty").mkdir()
    shutil.copytree(allowed / "mine", allowed / "film-mnist")
    monkeypatch.setattr("catalog.pull", lambda *arguments, **options: pytest.fail("it reached for the Hub"))
    catalog = Catalog({"film-mnist": root / "model_cards" / "film-mnist"}, folders=[allowed], allow_hub=False)
    monkeypatch.chdir(tmp_path)
    names = {catalog.describe(name).name for name in ("mine", "link-in", "allowed/mine", str(allowed / "mine"))}
    assert names == {"mine"}  # one place in memory
    assert catalog.describe(str(allowed / "film-mnist")).name == str(allowed / "film-mnist")  # not the shipped one
    assert catalog.describe("deep/mine").source == str(allowed / "deep" / "mine")

    refusals = set()
    for path in (
        outside / "secret",
        outside / "nothing",
        allowed / "link-out",
        allowed / "empty",
        tmp_path / "allowed-not",
    ):
        with pytest.raises(SettingsError) as error:
            catalog.describe(str(path))
        refusals.add(str(error.value).replace(str(path), ""))
    assert len(refusals) == 1  # which folders there are is not told
    for name in ("secret", "outside/secret", "allowed-not", "link-out"):
        with pytest.raises(SettingsError, match="no model of this demo|switched off"):
            catalog.describe(name)


def test_files_of_an_allowed_folder_that_lead_out_are_refused(tmp_path):
    class_conditional().save_pretrained(tmp_path / "allowed" / "mine")
    secret = tmp_path / "secret.json"
    config = tmp_path / "allowed" / "mine" / "unet" / "config.json"
    shutil.move(config, secret)
    config.symlink_to(secret)
    with pytest.raises(SettingsError, match="cannot be used") as error:
        Catalog({}, folders=[tmp_path / "allowed"]).describe("mine")
    assert str(tmp_path / "secret") not in str(error.value)


def pipeline_with_code(folder, canary):
    """A pipeline whose class comes with it, and which leaves a file behind where its code is run."""
    DDPMPipeline(unet_of_diffusers(), DDPMScheduler()).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", "OwnPipeline"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "pipeline.py").write_text(
        f"import pathlib\nfrom diffusers import DDPMPipeline\npathlib.Path({str(canary)!r}).touch()\n"
        "class OwnPipeline(DDPMPipeline):\n    pass\n"
    )
    return folder


@pytest.fixture
def published(hub, hub_token, request):
    """Pushes a pipeline or a folder to a repository of its own, and gives its name."""
    count = iter(range(100))

    def publish(what, **options):
        name = f"me/{request.node.originalname.replace('_', '-')[:60]}-{next(count)}"
        (upload if isinstance(what, Path) else push)(what, name, **options)
        hub.clear_log()
        return name

    return publish


def test_models_of_the_hub(hub, published):
    name = published(DDPMPipeline(unet_of_diffusers(), DDPMScheduler()))
    catalog = Catalog({})
    description = catalog.describe(name)
    assert (description.name, description.source, description.wrapped) == (name, name, True)
    assert draw(catalog, name, "DDIMScheduler").shape == (2, 8, 8, 3)
    assert not any("authorization" in request.headers for request in hub.log)  # the operator's token stays here
    with pytest.raises(SettingsError, match="switched off"):
        Catalog({}, allow_hub=False).describe(name)


def test_private_models_are_the_operators(published):
    name = published(class_conditional(), private=True)
    with pytest.raises(SettingsError, match="cannot be used"):
        Catalog({}).describe(name)
    assert Catalog({"mine": name}).describe("mine").source == name


def test_a_model_that_is_not_on_the_hub(hub):
    with pytest.raises(SettingsError, match="'me/nothing-at-all' cannot be used") as error:
        Catalog({}).describe("me/nothing-at-all")
    assert len(str(error.value)) < 700


def test_large_models_are_refused_before_they_are_fetched(hub, published):
    name = published(class_conditional())
    with pytest.raises(SettingsError, match="`max_bytes` is 20000, but .* Nothing was downloaded"):
        Catalog({}, max_bytes=20_000).describe(name)
    assert not any("safetensors" in request.path for request in hub.log)
    assert Catalog({"mine": name}, max_bytes=20_000).describe("mine").parameters > 20_000  # the operator has named it


def test_pickles_are_not_read(hub, published, tmp_path):
    folder = tmp_path / "pickled"
    class_conditional().save_pretrained(folder, safe_serialization=False)
    with pytest.raises(SettingsError, match="safetensors"):
        Catalog({}, folders=[tmp_path]).describe("pickled")


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_code_runs_only_where_the_operator_trusts_it(hub, hub_token, tmp_path, monkeypatch, where):
    canary = tmp_path / f"canary-{where}"
    folder = pipeline_with_code(tmp_path / "folders" / "coded", canary)
    name = "coded"
    if where == "hub":
        name = f"me/coded-{tmp_path.parent.name}"
        hub.create(name)
        hub.write(name, {x.relative_to(folder).as_posix(): x.read_bytes() for x in folder.rglob("*") if x.is_file()})
    monkeypatch.setenv("DIFFUSERS_EXT_DEMO_FOLDERS", str(tmp_path / "folders"))
    for value in (None, "0"):
        if value is not None:
            monkeypatch.setenv("DIFFUSERS_EXT_DEMO_TRUST_REMOTE_CODE", value)
        with pytest.raises(SettingsError, match="DIFFUSERS_EXT_DEMO_TRUST_REMOTE_CODE=1"):
            Catalog.shipped().describe(name)
    assert not canary.exists()

    monkeypatch.setenv("DIFFUSERS_EXT_DEMO_TRUST_REMOTE_CODE", "1")
    catalog = Catalog.shipped()
    assert catalog.describe(name).wrapped
    assert draw(catalog, name, "DDIMScheduler").shape == (2, 8, 8, 3)
    assert canary.exists()


def test_code_that_an_export_of_ours_carries_is_not_run(hub, tmp_path):
    export(class_conditional(), tmp_path / "folders" / "exported", self_contained=True)
    source = tmp_path / "folders" / "exported" / "pipeline.py"
    canary = tmp_path / "canary"
    source.write_text(f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n" + source.read_text())
    catalog = Catalog({}, folders=[tmp_path / "folders"])
    assert draw(catalog, "exported", "DDIMScheduler").shape == (2, 8, 8, 3)
    assert not canary.exists()


# The operator's settings


def test_the_shipped_catalog_needs_no_network(tmp_path, monkeypatch):
    """With a socket that answers nobody, and huggingface_hub not told to stay offline."""

    def refuse(*arguments, **options):
        pytest.fail("it reached for the network")

    for name in ("create_connection", "getaddrinfo", "socket"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.chdir(tmp_path)
    assert not constants.is_offline_mode()
    catalog = Catalog.shipped()
    assert catalog.names[:4] == SHIPPED
    for name in SHIPPED:
        with catalog.borrow(name, "bfloat16") as pipe:
            pipe(num_inference_steps=1, batch_size=1)


def test_the_operator_adds_models_and_settings(tmp_path, monkeypatch):
    class_conditional().save_pretrained(tmp_path / "runs" / "film-mnist")
    class_conditional().save_pretrained(tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    for name, value in {"CAPACITY": "2", "DEVICE": "cpu", "HUB": "0", "MAX_BYTES": "1000"}.items():
        monkeypatch.setenv(f"DIFFUSERS_EXT_DEMO_{name}", value)
    catalog = Catalog.shipped(["runs/film-mnist", "runs/mine", "me/on-the-hub"])
    assert catalog.names[-3:] == ["runs/film-mnist", "mine", "me/on-the-hub"]  # a name that is taken is told in full
    assert (catalog.capacity, catalog.device, catalog.allow_hub, catalog.max_bytes) == (2, "cpu", False, 1000)
    assert catalog.describe("mine").source == "runs/mine" and catalog.describe("film-mnist").parameters == 2_154_305
    assert catalog.describe("runs/film-mnist").parameters < 1_000_000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CAPACITY", "0"),
        ("CAPACITY", "many"),
        ("HUB", "yes"),
        ("MAX_BYTES", "-1"),
        ("DEVICE", "toaster"),
        ("FOLDERS", "/no/such/folder"),
    ],
)
def test_settings_that_mean_nothing_are_told_to_the_operator(monkeypatch, name, value):
    monkeypatch.setenv(f"DIFFUSERS_EXT_DEMO_{name}", value)
    with pytest.raises(ValueError, match=f"DIFFUSERS_EXT_DEMO_{name}"):
        Catalog.shipped()


@pytest.mark.parametrize("source", ["/no/such/folder", "model_cards", "runs/mine/unet", "mine", ""])
def test_a_model_that_cannot_be_one_is_told_to_the_operator(root, monkeypatch, source):
    monkeypatch.chdir(root)
    with pytest.raises(ValueError, match="`models` holds .*Hub id"):
        Catalog.shipped([source])


def test_descriptions_that_are_remembered_are_bounded(five, tmp_path, monkeypatch):
    monkeypatch.setattr("catalog.MAX_DESCRIPTIONS", 3)
    catalog = Catalog({"mine": five["model-0"]}, folders=[tmp_path])
    for name in ("mine", *five):
        catalog.describe(name)
    remembered = [name for name in ("mine", *five, "../etc", "me/unknown") if catalog.described(name) is not None]
    # The operator's stay; model-0 is one of them by another name.
    assert remembered == ["mine", "model-0", *list(five)[-3:]]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_process_forked_while_a_model_loads_can_load_too():
    """As ZeroGPU forks one for every comparison."""
    holds = threading.Event()

    def load():
        with LOADING:
            holds.set()
            time.sleep(0.2)

    thread = threading.Thread(target=load)
    thread.start()
    holds.wait()
    child = os.fork()
    if child == 0:
        column = threading.Thread(target=lambda: os._exit(0 if LOADING.acquire(timeout=5) else 1))
        column.start()
        column.join()
    assert os.waitpid(child, 0)[1] == 0
    thread.join()
