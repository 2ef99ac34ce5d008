"""ClassConditionalPipeline: every backbone, what diffusers' own pipeline tests ask, guidance, latents, every error."""

import contextlib
import io
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import diffusers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LayerSkipConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    UNet2DModel,
)

from diffusers_ext import (
    ADMUNet2DModel,
    ComposableUNet2DModel,
    DDPMUNet2DModel,
    DilatedConvDenoiserModel,
    GQADiTTransformer2DModel,
)
from diffusers_ext.pipelines import ClassConditionalPipeline, ClassifierGuidedPipeline


TINY = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "num_class_embeds": 4}
UNET = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
HEADS = {"attention_resolutions": (4,), "attention_head_dim": 16}
BLOCKS = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
TRANSFORMER = {"patch_size": 2, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
BACKBONES = {
    "adm": (ADMUNet2DModel, {**TINY, **UNET, **HEADS}),
    "composable": (ComposableUNet2DModel, {**TINY, **UNET, **HEADS}),
    "ddpm": (DDPMUNet2DModel, {**TINY, **UNET, "attention_resolutions": (4,)}),
    "dilated": (
        DilatedConvDenoiserModel,
        {**TINY, "hidden_channels": (16,) * 3, "dilations": (1, 1, 3), "norm_num_groups": 8},
    ),
    "gqa-dit": (GQADiTTransformer2DModel, {**TINY, **TRANSFORMER, "num_key_value_heads": 1}),
    "UNet2DModel": (UNet2DModel, {**TINY, **UNET, **BLOCKS, "num_class_embeds": 5}),
    "DiTTransformer2DModel": (
        DiTTransformer2DModel,
        {"sample_size": 8, "in_channels": 3, "out_channels": 6, "num_embeds_ada_norm": 4, **TRANSFORMER},
    ),
}
OURS = [name for name in BACKBONES if name[0].islower()]
LABELS = {0: "tench, Tinca tinca", 1: "crane", 2: "crane", 3: "seven"}


def build(model_class, **config):
    """A network of which no layer is silent; the same at every call."""
    torch.manual_seed(0)
    model = model_class(**config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def backbone(name="adm", **changes):
    model_class, config = BACKBONES[name]
    if name in OURS:
        config = {"null_class": True, **config}
    return build(model_class, **{**config, **changes})


def tiny_pipe(model="adm", scheduler=None, **components):
    if model == "UNet2DModel":
        components = {"null_class_label": 4, **components}
    model = backbone(model) if isinstance(model, str) else model
    slot = "transformer" if "Transformer" in type(model).__name__ else "unet"
    components = {slot: model, "scheduler": scheduler or DDIMScheduler(), "id2label": LABELS, **components}
    pipe = ClassConditionalPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_vae(**config):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    channels = {"latent_channels": 3, "block_out_channels": (8, 8), "norm_num_groups": 4}
    return build(AutoencoderKL, **{**channels, **blocks, **config})


def draw(pipe, seed=0, **arguments):
    arguments = {"class_labels": [3], "num_inference_steps": 3, "output_type": "np", **arguments}
    arguments.setdefault("generator", torch.Generator().manual_seed(seed))
    return pipe(**arguments).images


@contextlib.contextmanager
def recorded_calls(*models):
    """The number of images and the labels of every call of a model while this is open."""
    calls = []

    def record(module, inputs, options):
        labels = options.get("class_labels")
        calls.append((len(inputs[0]), None if labels is None else labels.tolist()))

    handles = [model.register_forward_pre_hook(record, with_kwargs=True) for model in models]
    yield calls
    for handle in handles:
        handle.remove()


# Every backbone


@pytest.fixture(params=BACKBONES)
def name(request):
    return request.param


def test_backbones_draw_classes_with_and_without_guidance(name):
    pipe = tiny_pipe(name)
    images = draw(pipe, class_labels=[0, 3])
    assert images.shape == (2, 8, 8, 3) and np.isfinite(images).all()
    conditional, other = draw(pipe, guidance_scale=1.0), draw(pipe, class_labels=[0], guidance_scale=1.0)
    assert not np.array_equal(conditional, other)
    assert not np.array_equal(conditional, draw(pipe))
    np.testing.assert_array_equal(draw(pipe), draw(pipe, guidance_scale=4.0))


def test_backbones_draw_any_class(name):
    pipe = tiny_pipe(name)
    images = draw(pipe, class_labels=None, batch_size=2)
    assert images.shape == (2, 8, 8, 3)
    with recorded_calls(pipe.unet or pipe.transformer) as calls:
        np.testing.assert_array_equal(draw(pipe, class_labels=None, batch_size=2, guidance_scale=4.0), images)
    assert calls == [(2, [4, 4])] * 3
    np.testing.assert_allclose(draw(pipe, guidance_scale=0.0), draw(pipe, class_labels=None), atol=1e-5)


@pytest.mark.parametrize("name", [*OURS, "UNet2DModel"])
def test_backbones_without_classes(name):
    options = {"null_class": False} if name in OURS else {}
    pipe = tiny_pipe(backbone(name, num_class_embeds=None, **options))
    with recorded_calls(pipe.unet or pipe.transformer) as calls:
        assert draw(pipe, class_labels=None, batch_size=2).shape == (2, 8, 8, 3)
    assert calls == [(2, None)] * 3


def test_backbones_are_saved_and_loaded(name, tmp_path, caplog):
    pipe = tiny_pipe(name)
    pipe.save_pretrained(tmp_path)
    with caplog.at_level("WARNING"), contextlib.redirect_stderr(io.StringIO()) as stderr:
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert "WARNING" not in caplog.text and "xpected" not in stderr.getvalue() + caplog.text
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is ClassConditionalPipeline and loaded.config.null_class_label == pipe.config.null_class_label
    np.testing.assert_allclose(draw(loaded, class_labels="seven"), draw(pipe, class_labels="seven"), atol=1e-5)


def test_backbones_keep_their_batches_apart(name):
    pipe = tiny_pipe(name, scheduler=DDPMScheduler())
    labels = [[3], [0]]  # nested, as diffusers' tests pass them
    together = draw(pipe, class_labels=labels, generator=[torch.Generator().manual_seed(i) for i in range(2)])
    for i, label in enumerate(labels):
        np.testing.assert_allclose(together[i], draw(pipe, seed=i, class_labels=label)[0], atol=1e-4)


def test_transformer_under_either_name():
    transformer, scheduler = backbone("gqa-dit"), DDIMScheduler()
    as_unet = ClassConditionalPipeline(transformer, scheduler)
    as_unet.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(draw(as_unet), draw(tiny_pipe(transformer)))


# What diffusers' pipeline test mixin asks


def test_components_and_parameters():
    pipe = tiny_pipe()
    assert set(pipe.components) == {
        "unet",
        "scheduler",
        "transformer",
        "vae",
        "guide_model",
        "guider",
        "text_encoder",
        "tokenizer",
    }
    assert pipe.parameters == {"id2label": LABELS, "null_class_label": None}
    again = ClassConditionalPipeline(**pipe.components, **pipe.parameters)
    again.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(draw(again), draw(pipe))


def test_all_components_are_saved_and_loaded(tmp_path):
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=2.0)
    guide_model = backbone("dilated", num_class_embeds=None, null_class=False)
    pipe = tiny_pipe("gqa-dit", vae=tiny_vae(), guide_model=guide_model, guider=guider)
    pipe.save_pretrained(tmp_path)
    loaded = ClassConditionalPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.unet is None and loaded.guider.guidance_scale == 2.0
    np.testing.assert_allclose(draw(loaded), draw(pipe), atol=1e-5)


def test_from_pipe_both_ways(caplog):
    pipe = tiny_pipe()
    guided = ClassifierGuidedPipeline.from_pipe(pipe)
    assert guided.unet is pipe.unet and guided.config.id2label == LABELS
    again = ClassConditionalPipeline.from_pipe(guided, scheduler=DDPMScheduler())
    assert again.unet is pipe.unet and again.config.id2label == LABELS
    assert "not switched over" not in caplog.text
    pipe = tiny_pipe("gqa-dit")
    assert ClassifierGuidedPipeline.from_pipe(pipe).unet is pipe.transformer


def test_custom_pipeline_file_shows_one_pipeline(root, tmp_path):
    tiny_pipe().save_pretrained(tmp_path)
    file = str(root / "pipelines" / "pipeline_class_conditional.py")
    loaded = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=file, trust_remote_code=True)
    assert type(loaded).__name__ == "ClassConditionalPipeline"


def test_pipeline_files_import_little(root):
    """What an exported repository can carry inside one file."""
    for file in (root / "pipelines").glob("pipeline_*.py"):
        imported = set(re.findall(r"^(?:from|import) (\S+)", file.read_text(), flags=re.MULTILINE))
        ours = {module for module in imported if module.startswith("diffusers_ext")}
        assert ours <= {"diffusers_ext.guidance", "diffusers_ext.sampling"}
        others = {module.partition(".")[0] for module in imported - ours}
        assert others <= {"torch", "diffusers", "transformers", *sys.stdlib_module_names}


def test_tuple_equals_output():
    pipe = tiny_pipe()
    images = pipe([3], num_inference_steps=3, output_type="np", generator=torch.manual_seed(0), return_dict=False)
    assert isinstance(images, tuple) and len(images) == 1
    np.testing.assert_array_equal(images[0], draw(pipe))


@pytest.mark.parametrize("vae", [None, {}], ids=["pixels", "latents"])
def test_output_types(vae):
    pipe = tiny_pipe(vae=vae if vae is None else tiny_vae())
    raw = draw(pipe, output_type="latent")
    as_pt, as_np, as_pil = (draw(pipe, output_type=kind) for kind in ("pt", "np", "pil"))
    assert raw.shape == (1, 3, 8, 8) and raw.dtype == torch.float32
    size = 8 if vae is None else 16
    assert as_pt.shape == (1, 3, size, size) and 0 <= as_pt.min() and as_pt.max() <= 1
    np.testing.assert_array_equal(as_np, as_pt.permute(0, 2, 3, 1).numpy())
    assert isinstance(as_pil[0], Image.Image) and as_pil[0].size == (size, size)
    if vae is None:
        torch.testing.assert_close(as_pt, (raw / 2 + 0.5).clamp(0, 1))


def test_callback_sees_the_image_and_changes_the_scale():
    pipe = tiny_pipe()
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, timestep.item(), tensors["latents"].shape))
        pipe._guidance_scale = 1.0
        if step == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    with recorded_calls(pipe.unet) as calls:
        images = draw(pipe, output_type="latent", callback_on_step_end=callback)
    assert seen == [(0, 666, (1, 3, 8, 8)), (1, 333, (1, 3, 8, 8)), (2, 0, (1, 3, 8, 8))]
    assert calls == [(2, [3, 4]), (1, [3]), (1, [3])] and pipe.guidance_scale == 1.0
    assert not images.any()


def test_interrupt_ends_the_run():
    pipe = tiny_pipe()
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return tensors

    draw(pipe, num_inference_steps=10, callback_on_step_end=callback)
    assert steps == [0, 1] and pipe.interrupt
    draw(pipe)
    assert not pipe.interrupt


def test_progress_bar():
    pipe = tiny_pipe()
    for disable in (False, True):
        pipe.set_progress_bar_config(disable=disable)
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            draw(pipe)
        assert ("3/3" in stderr.getvalue()) != disable and (stderr.getvalue() == "") == disable


def test_offload_hooks_are_freed_last():
    pipe = tiny_pipe("gqa-dit", vae=tiny_vae(), guide_model=backbone("dilated"))
    expected = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    hooks = pipe._all_hooks
    np.testing.assert_array_equal(draw(pipe), expected)
    assert pipe._all_hooks is not hooks and len(pipe._all_hooks) == 3


@pytest.mark.parametrize("dtype, deviation", [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
@pytest.mark.parametrize("model", ["adm", "gqa-dit"])
def test_half_precision(model, dtype, deviation):
    pipe = tiny_pipe(model, scheduler=DPMSolverMultistepScheduler(), vae=tiny_vae())
    expected = draw(pipe)
    pipe.to(dtype)
    assert draw(pipe, output_type="latent").dtype == torch.float32
    assert np.abs(draw(pipe) - expected).mean() < deviation


def test_labels_by_name():
    pipe = tiny_pipe()
    assert pipe.labels == {"Tinca tinca": 0, "seven": 3, "tench": 0, "tench, Tinca tinca": 0}
    assert pipe.get_label_ids([3, "seven", [torch.tensor([2])]]) == [3, 3, 2]
    np.testing.assert_array_equal(draw(pipe, class_labels="seven"), draw(pipe))
    np.testing.assert_array_equal(draw(pipe, class_labels=3, batch_size=2), draw(pipe, class_labels=[3, 3]))


# Guidance


@pytest.mark.parametrize("scheduler", [DDIMScheduler(clip_sample=False), FlowMatchEulerDiscreteScheduler()])
def test_guidance_is_the_formula(scheduler):
    pipe = tiny_pipe(scheduler=scheduler)
    noise, step = torch.randn(1, 3, 8, 8), {"num_inference_steps": 1, "output_type": "latent"}

    def after_a_step(**arguments):
        return draw(pipe, sample=noise, **step, **arguments)

    null, conditional = after_a_step(class_labels=None), after_a_step(guidance_scale=1.0)
    guided = after_a_step(guidance_scale=3.0)  # one step is linear in what the network predicts
    torch.testing.assert_close(guided, null + 3 * (conditional - null), rtol=1e-4, atol=1e-4)
    first = after_a_step(guidance_scale=3.0, guided_channels=1)
    torch.testing.assert_close(first, torch.cat([guided[:, :1], conditional[:, 1:]], dim=1))


def test_both_predictions_are_one_batch():
    pipe = tiny_pipe(scheduler=HeunDiscreteScheduler())
    with recorded_calls(pipe.unet) as calls:
        draw(pipe, class_labels=[0, 3], guidance_scale=2.0)
    assert calls == [(4, [0, 3, 4, 4])] * 5 and pipe.num_timesteps == 5
    with recorded_calls(pipe.unet) as calls:
        draw(pipe, class_labels=[0, 3], guidance_scale=1.0)
    assert calls == [(2, [0, 3])] * 5


@pytest.mark.parametrize(
    "scheduler_class, interval, guided",
    [
        (DDIMScheduler, (0.2, 0.7), range(2, 7)),
        (DDIMScheduler, (0.5, 0.5), range(0)),
        (HeunDiscreteScheduler, (0.5, 1.0), range(10, 19)),  # both calls of a step, of which the last has one
    ],
)
def test_guidance_interval(scheduler_class, interval, guided):
    pipe = tiny_pipe("dilated", scheduler=scheduler_class())
    with recorded_calls(pipe.unet) as calls:
        draw(pipe, guidance_interval=interval, num_inference_steps=10)
    assert [i for i, (images, _) in enumerate(calls) if images == 2] == list(guided)


def test_learned_variance_is_dropped_where_the_scheduler_has_no_use_for_it():
    learned, plain = backbone(out_channels=6), backbone()
    weights = learned.state_dict()
    plain.load_state_dict(weights | {name: weights[name][:3] for name in weights if "conv_out" in name})
    for scheduler in (DDIMScheduler(), DDPMScheduler()):
        expected = draw(tiny_pipe(plain, scheduler))
        np.testing.assert_allclose(draw(tiny_pipe(learned, scheduler)), expected, atol=1e-5)
    assert not np.array_equal(draw(tiny_pipe(learned, DDPMScheduler(variance_type="learned_range"))), expected)


def test_autoguidance():
    model, guide_model = backbone(), backbone("dilated", out_channels=6)
    pipe = tiny_pipe(model, DDIMScheduler(clip_sample=False), guide_model=guide_model)
    alone = tiny_pipe(guide_model, pipe.scheduler)
    step = {"num_inference_steps": 1, "output_type": "latent", "class_labels": [1]}
    worse = draw(alone, **step, guidance_scale=1.0)
    prediction = draw(pipe, **step, guidance_scale=1.0)
    with recorded_calls(model, guide_model) as calls:
        guided = draw(pipe, **step)
    assert calls == [(1, [1]), (1, [1])]
    torch.testing.assert_close(guided, worse + 2 * (prediction - worse), rtol=1e-4, atol=1e-4)
    pipe.guider = diffusers.ClassifierFreeGuidance(guidance_scale=2.0)
    torch.testing.assert_close(draw(pipe, **step), guided)


def test_autoguidance_needs_no_null_class():
    pipe = tiny_pipe(backbone(null_class=False), guide_model=backbone("ddpm", null_class=False))
    assert not np.array_equal(draw(pipe, guidance_scale=3.0), draw(pipe, guidance_scale=1.0))
    # A guide without classes is the prediction for no class, from a network of its own.
    pipe.guide_model = backbone("ddpm", num_class_embeds=None, null_class=False)
    with recorded_calls(pipe.unet, pipe.guide_model) as calls:
        draw(pipe)
    assert calls == [(1, [3]), (1, None)] * 3
    # Without classes there is a better and a worse network too.
    pipe.unet = backbone(num_class_embeds=None, null_class=False)
    assert not np.array_equal(draw(pipe, class_labels=None), draw(pipe, class_labels=None, guidance_scale=1.0))


# Guiders of diffusers

SKIP = LayerSkipConfig(indices=[0], skip_attention=False, skip_attention_scores=True, skip_ff=False)
GUIDERS = {
    "cfg": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    "cfg-original": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=2.0, use_original_formulation=True),
    "cfg-interval": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=3.0, start=0.2, stop=0.8),
    "apg": lambda: diffusers.AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5),
    "apg-mix": lambda: diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2),
    "cfg-zero-star": lambda: diffusers.ClassifierFreeZeroStarGuidance(guidance_scale=3.0),
    "tangential": lambda: diffusers.TangentialClassifierFreeGuidance(guidance_scale=3.0),
    "auto": lambda: diffusers.AutoGuidance(auto_guidance_config=LayerSkipConfig(indices=[0])),
    "skip-layer": lambda: diffusers.SkipLayerGuidance(
        skip_layer_config=LayerSkipConfig(indices=[0]), skip_layer_guidance_stop=1.0
    ),
    "perturbed": lambda: diffusers.PerturbedAttentionGuidance(
        perturbed_guidance_config=SKIP, perturbed_guidance_stop=1.0
    ),
}


@pytest.mark.parametrize("guider", GUIDERS)
def test_guiders(guider):
    guider = GUIDERS[guider]()
    pipe = tiny_pipe("DiTTransformer2DModel", DPMSolverMultistepScheduler(), guider=guider)
    state = guider.get_state()
    images = draw(pipe, class_labels=[3, 0], num_inference_steps=5)
    assert np.isfinite(images).all() and guider.get_state() == state and guider.__dict__.get("momentum_buffer") is None
    np.testing.assert_array_equal(draw(pipe, class_labels=[3, 0], num_inference_steps=5), images)
    single = draw(pipe, sample=torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))[1:],
                  class_labels=[0], num_inference_steps=5)  # fmt: skip
    np.testing.assert_allclose(single[0], images[1], atol=1e-3)
    pipe.guider = None
    plain = draw(pipe, class_labels=[3, 0], num_inference_steps=5, guidance_scale=1.0)  # no hook is left
    assert not np.array_equal(plain, images)


def test_guider_of_classifier_free_guidance_is_the_formula():
    pipe = tiny_pipe(guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0))
    images, first = draw(pipe), draw(pipe, guided_channels=1)
    assert pipe.guidance_scale == 3.0
    with recorded_calls(pipe.unet) as calls:
        draw(pipe, guidance_interval=(0.5, 1.0), num_inference_steps=4)
        draw(pipe, class_labels=None, num_inference_steps=2)
    assert [len(labels) for _, labels in calls] == [1, 1, 2, 2, 1, 1]
    pipe.guider = None
    np.testing.assert_allclose(draw(pipe, guidance_scale=3.0), images, atol=1e-5)
    np.testing.assert_allclose(draw(pipe, guidance_scale=3.0, guided_channels=1), first, atol=1e-5)


@pytest.mark.parametrize("guider", ["auto", "skip-layer"])
def test_layers_are_skipped_without_a_null_class(guider):
    guider = GUIDERS[guider]()
    if isinstance(guider, diffusers.SkipLayerGuidance):
        guider.guidance_scale = 1.0  # or it would compare with no class too
    pipe = tiny_pipe(backbone("gqa-dit", null_class=False), guider=guider)
    with recorded_calls(pipe.transformer) as calls:
        guided = draw(pipe, num_inference_steps=4, guidance_interval=(0.5, 1.0))
    assert all(labels == [3] for _, labels in calls) and len(calls) > 4
    pipe.guider = None
    assert not np.array_equal(draw(pipe, num_inference_steps=4), guided)


# Latents and sizes


def test_dit_in_latents_is_that_of_diffusers():
    # A thousand classes, as their null label is written in the code; no clipping, after which they keep the old noise.
    transformer = backbone("DiTTransformer2DModel", in_channels=4, out_channels=8, num_embeds_ada_norm=1000)
    scheduler, vae = DDIMScheduler(clip_sample=False), tiny_vae(latent_channels=4)
    theirs = DiTPipeline(transformer, vae, scheduler)
    theirs.set_progress_bar_config(disable=True)
    ours = tiny_pipe(transformer, scheduler, vae=vae)
    arguments = {"class_labels": [207, 360], "num_inference_steps": 4, "output_type": "np"}
    for scale in (None, 1.0, 2.5):
        scales = {} if scale is None else {"guidance_scale": scale}
        expected = theirs(**arguments, **scales, generator=torch.Generator().manual_seed(0)).images
        np.testing.assert_allclose(draw(ours, **arguments, **scales), expected, atol=2e-4)


def test_latents_are_scaled_and_shifted():
    vae = tiny_vae(scaling_factor=0.5, shift_factor=0.1)
    pipe = tiny_pipe(vae=vae)
    latents = draw(pipe, output_type="latent")
    with torch.no_grad():
        expected = (vae.decode(latents / 0.5 + 0.1).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(draw(pipe, output_type="pt"), expected)


def test_height_and_width():
    pipe = tiny_pipe("gqa-dit")
    assert draw(pipe, height=12, width=16).shape == (1, 12, 16, 3)
    assert draw(pipe, sample=torch.randn(2, 3, 4, 8)).shape == (2, 4, 8, 3)
    pipe.vae = tiny_vae()
    assert draw(pipe, height=16, width=24).shape == (1, 16, 24, 3)
    assert draw(pipe, height=16, width=24, output_type="latent").shape == (1, 3, 8, 12)
    unsized = tiny_pipe(backbone("UNet2DModel", sample_size=None), null_class_label=4)
    assert (
        draw(unsized, height=8, width=8).shape == draw(unsized, sample=torch.zeros(1, 3, 8, 8)).shape == (1, 8, 8, 3)
    )
    with pytest.raises(ValueError, match="`unet` was made for no size"):
        draw(unsized)


# Errors, before any network runs

CFG = GUIDERS["cfg"]
NO_NULL = {"null_class": False}
UNCONDITIONAL = {"num_class_embeds": None, "null_class": False}
BAD_COMPONENTS = [
    ({"unet": None}, "`unet` and `transformer` are both missing"),
    ({"transformer": {}}, "`unet` and `transformer` are both given"),
    ({"scheduler": None}, "`scheduler` is missing"),
]
BAD_ARGUMENTS = [
    ({}, {"class_labels": "eight"}, "'eight', which is not a name of a class. Known: 'Tinca tinca', 'crane'"),
    ({}, {"class_labels": [0, 4]}, r"\[4\]; ids of classes go from 0 to 3"),
    ({}, {"class_labels": -1}, r"\[-1\]; ids of classes go from 0 to 3"),
    ({}, {"class_labels": []}, "`class_labels` is empty"),
    ({}, {"class_labels": [0, 1], "batch_size": 3}, "2 labels for 3 images"),
    ({}, {"num_inference_steps": 0}, "`num_inference_steps` is 0"),
    ({}, {"guidance_scale": float("nan")}, "`guidance_scale` is nan"),
    ({}, {"guidance_interval": (0.8, 0.2)}, r"`guidance_interval` is \(0.8, 0.2\)"),
    ({}, {"guided_channels": 0}, "`guided_channels` is 0; `unet` draws 3 channels"),
    ({}, {"guided_channels": 4}, "`guided_channels` is 4"),
    ({}, {"output_type": "jpg"}, "'jpg'; it must be one of pil, np, pt, latent"),
    ({}, {"eta": 0.5, "scheduler": DDPMScheduler()}, "`eta` is 0.5"),
    ({}, {"generator": [torch.Generator()] * 2, "batch_size": 3}, "a list of 2 for 3 images"),
    ({}, {"sample": torch.zeros(1, 4, 8, 8)}, r"\(1, 4, 8, 8\); it must be \(1, 3, height, width\)"),
    ({}, {"height": 8}, "`height` is 8 and `width` is None; give both"),
    ({}, {"height": 8, "width": 16, "sample": torch.zeros(1, 3, 8, 8)}, "`sample` has 8x8 pixels, but .* 8x16"),
    ({}, {"height": 15, "width": 16, "vae": {}}, "multiples of 2"),
    ({}, {"vae": {"latent_channels": 4}}, "`vae` decodes 4 channels, but `unet` draws 3"),
    ({"out_channels": 4}, {}, "4 output channels"),
    ({}, {"scheduler": DDPMScheduler(variance_type="learned_range")}, "would need 6 for a learned variance"),
    ({}, {"scheduler": diffusers.LCMScheduler()}, "LCMScheduler cannot sample from a denoising network: its networks"),
    ({}, {"scheduler": diffusers.EDMEulerScheduler()}, "needs a network with EDM's preconditioning"),
    ({"in_channels": 6, "low_res_channels": 3}, {}, "`unet` enlarges images"),
    (UNCONDITIONAL, {}, "`class_labels` were given, but `unet` knows no classes"),
    (UNCONDITIONAL, {"class_labels": None, "guidance_scale": 3.0}, "`unet` has no null class, .*`null_class=True`"),
    (NO_NULL, {"class_labels": None}, "class-conditional, without a null class"),
    (NO_NULL, {"guidance_scale": 3.0}, "`unet` has no null class, whose prediction `guidance_scale` 3.0 needs"),
    (NO_NULL, {"guidance_scale": 0.0}, "`guidance_scale` 0.0 needs"),
    (NO_NULL, {"guider": CFG}, "whose prediction `guider` ClassifierFreeGuidance needs"),
    (NO_NULL, {"null_class_label": 4}, "`null_class_label` of the pipeline is 4; labels of `unet` go from 0 to 3"),
    ({}, {"guider": CFG, "guidance_scale": 3.0}, "ClassifierFreeGuidance has a scale of its own"),
    ({}, {"guider": GUIDERS["skip-layer"]}, "SkipLayerGuidance finds nothing to weaken in `unet`"),
    ({}, {"guider": lambda: diffusers.SmoothedEnergyGuidance(seg_guidance_layers=[0])}, "asks for pred_cond_seg"),
    ({}, {"guide_model": {"in_channels": 1, "out_channels": 1}}, "`guide_model` draws 1 channels, but `unet` draws 3"),
    ({}, {"guide_model": {"num_class_embeds": 2}}, r"\[3\]; ids of classes go from 0 to 1"),
    (UNCONDITIONAL, {"class_labels": None, "guide_model": NO_NULL}, "`guide_model` is class-conditional"),
]  # fmt: skip


@pytest.mark.parametrize("components, message", BAD_COMPONENTS, ids=[message for _, message in BAD_COMPONENTS])
def test_constructor_errors(components, message):
    if components.get("transformer") is not None:
        components = {"transformer": backbone("gqa-dit")}
    with pytest.raises(ValueError, match=message):
        ClassConditionalPipeline(**{"unet": backbone(), "scheduler": DDIMScheduler(), **components})


@pytest.mark.parametrize(
    "config, arguments, message", BAD_ARGUMENTS, ids=[re.sub(r"\W+", " ", message) for *_, message in BAD_ARGUMENTS]
)
def test_errors(config, arguments, message):
    arguments = dict(arguments)
    builders = {
        "vae": lambda config: tiny_vae(**config),
        "guide_model": lambda config: backbone("dilated", **config),
        "guider": lambda make: make(),
        "scheduler": lambda scheduler: scheduler,
        "null_class_label": lambda label: label,
    }
    components = {name: make(arguments.pop(name)) for name, make in builders.items() if name in arguments}
    pipe = tiny_pipe(backbone(**config), **components)
    models = [model for model in (pipe.unet, pipe.guide_model) if model is not None]
    with recorded_calls(*models) as calls, pytest.raises(ValueError, match=message):
        draw(pipe, **arguments)
    assert not calls


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["first_block", "taylor", "pyramid"])
def test_caches_of_a_transformer_serve_a_run(kind, guidance_scale):
    torch.manual_seed(0)
    model = GQADiTTransformer2DModel(
        num_layers=3, num_attention_heads=2, attention_head_dim=16, num_class_embeds=4, null_class=True
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    pipe = ClassConditionalPipeline(transformer=model, scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        return pipe(
            [1, 2],
            guidance_scale=guidance_scale,
            num_inference_steps=12,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images

    expected = draw()
    config = {
        "first_block": FirstBlockCacheConfig(threshold=0.5),
        "taylor": TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=3),
        "pyramid": PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe.current_timestep
        ),
    }[kind]
    model.enable_cache(config)
    cached = draw()
    assert (cached - expected).abs().max() > 0 and (cached - expected).abs().mean() < 0.2
    again = draw()  # the state of one run is not left to the next
    torch.testing.assert_close(again, cached)
    model.disable_cache()
    torch.testing.assert_close(draw(), expected)
    assert pipe.current_timestep is None
