"""The models of the demo: what is said of them, which schedulers work, who is let in, and who stays in memory."""

import gc
import json
import os
import shutil
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from catalog import MAX_DESCRIPTIONS, Catalog, GaveUp, new_pipeline
from schedulers import scheduler_classes
from settings import SettingsError
from transformers import (
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

from diffusers_ext import (
    ADMClassifierModel,
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
# The table of the README, for networks of a variance-preserving process. UnCLIP follows no other schedule than its own.
DIFFUSION_SCHEDULERS = {
    "CogVideoXDDIM", "CogVideoXDPM", "DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep",
    "DPMSolverMultistep", "DPMSolverSDE", "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete",
    "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LMSDiscrete", "PNDM", "SASolver", "TCD", "UniPCMultistep",
}  # fmt: skip
FLOW_SCHEDULERS = {
    "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete",
    "SASolver", "UniPCMultistep",
}  # fmt: skip


def build(model_class, **config):
    """A network of which no layer is silent; the same at every call."""
    torch.manual_seed(0)
    model = model_class(**config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


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


def stable_diffusion(pipeline_class=StableDiffusionPipeline):
    unet = build(
        UNet2DConditionModel,
        **{**UNET, "in_channels": 4, "out_channels": 4},
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    options = {"steps_offset": 1, "skip_prk_steps": True, "set_alpha_to_one": False, "prediction_type": "epsilon"}
    return pipeline_class(
        vae=decoder(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=PNDMScheduler(**schedule, **options),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
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
    return DiTPipeline(transformer, decoder(), DDIMScheduler(), id2label={0: "tench, Tinca tinca", 134: "crane", 517: "crane"})


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
        assert np.array_equal(images, draw(shipped, model, scheduler)), scheduler
    with shipped.borrow(model, "float32") as pipe:
        for name, scheduler_class in scheduler_classes().items():
            options = description.scheduler_options.get(name, {})
            has_eta = name in description.schedulers and "eta" in scheduler_class.step.__code__.co_varnames
            assert has_eta == (name in description.eta_schedulers)
            assert not options or name in description.schedulers
        assert type(pipe.scheduler) is DDPMScheduler  # the shared pipeline is as it was loaded


class ConstantDenoiser(ModelMixin, ConfigMixin):
    """The exact noise prediction for data of which every image is `value` everywhere, by the schedule it was trained on:
    whoever shows it other noise than that of the timestep gets another image."""

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

    own = DDPMScheduler(beta_schedule=beta_schedule)
    own.save_pretrained(tmp_path)
    own = DDPMScheduler.from_pretrained(tmp_path)  # a saved config states its defaults too
    pipe = ClassConditionalPipeline(unet=ConstantDenoiser(beta_schedule=beta_schedule), scheduler=own)
    pipe.set_progress_bar_config(disable=True)
    working = working_schedulers(pipe, scheduler_classes())
    expected = DIFFUSION_SCHEDULERS | ({"UnCLIP"} if beta_schedule != "linear" else set())
    assert {name.removesuffix("Scheduler") for name in working} == expected
    errors = {}
    for name in [*working, "UnCLIPScheduler", "DDPMWuerstchenScheduler"]:
        scheduler = scheduler_classes()[name].from_config(own.config, **working.get(name, {}))
        images = new_pipeline(pipe, scheduler)(
            num_inference_steps=20, generator=torch.Generator().manual_seed(0), output_type="pt"
        ).images
        errors[name] = float((images * 2 - 1 - 0.25).abs().max())
    assert max(errors[name] for name in working) < 0.02, errors
    assert min([1.0, *(error for name, error in errors.items() if name not in working)]) > 0.04, errors


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
    [(DDPMPipeline, DDPMScheduler()), (DDIMPipeline, DDIMScheduler()), (PNDMPipeline, PNDMScheduler())],
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


def test_dit_pipeline_is_drawn_by_ours(saved):
    catalog = saved(dit())
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
    assert description.parameters == sum(p.numel() for p in (theirs.components.get("unet") or theirs.transformer).parameters())
    own = type(theirs.scheduler).__name__
    assert own in description.schedulers and description.default_scheduler in description.schedulers
    if make is stable_diffusion:
        assert {"DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"} <= set(description.schedulers)
        assert (description.height, description.width) == (16, 16)
    theirs.set_progress_bar_config(disable=True)
    sources = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    arguments = {"prompt": ["a cat", "a dog"], "height": 16, "width": 16, "num_inference_steps": 2}
    expected = theirs(**arguments, generator=sources, output_type="np").images
    assert np.allclose(draw(catalog, "mine", own), expected, atol=1e-5)
    for scheduler in description.schedulers:
        assert np.isfinite(draw(catalog, "mine", scheduler)).all(), scheduler


@pytest.mark.parametrize(
    ("make", "phrase"),
    [
        (lambda: stable_diffusion(StableDiffusionImg2ImgPipeline), "draws no images of a class or a text alone"),
        (lambda: LDMPipeline(decoder(VQModel), unet_of_diffusers(in_channels=4, out_channels=4), DDIMScheduler()), "LDM"),
        (lambda: ConsistencyModelPipeline(unet_of_diffusers(), CMStochasticIterativeScheduler()), "distilled"),
        (lambda: class_conditional(unet=build(ADMUNet2DModel, **UNET, **ATTENTION, low_res_channels=3)), "enlarges"),
    ],
    ids=["image-to-image", "vq", "consistency", "enlarging"],
)
def test_other_pipelines_are_refused(saved, make, phrase):
    with pytest.raises(SettingsError, match=phrase):
        saved(make()).describe("mine")
