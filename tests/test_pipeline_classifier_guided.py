"""ClassifierGuidedPipeline: what diffusers' own pipeline tests ask, what guidance promises, and every error."""

import contextlib
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

import diffusers
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
)

from diffusers_ext.models.transformer_dit_gqa import GQADiTTransformer2DModel
from diffusers_ext.models.unet_adm import ADMClassifierModel, ADMUNet2DModel
from diffusers_ext.pipelines import ClassifierGuidedPipeline


TINY = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "attention_resolutions": (4,),
    "attention_head_dim": 16,
    "norm_num_groups": 8,
}
LABELS = {0: "tench, Tinca tinca", 1: "crane", 2: "crane", 3: "seven"}


def randomised(model):
    """The zeros of a fresh output layer would hide everything."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tiny_unet(**config):
    return randomised(ADMUNet2DModel(**{"in_channels": 3, "out_channels": 3, **TINY, **config}))


def tiny_classifier(**config):
    return randomised(ADMClassifierModel(**{"in_channels": 3, "num_classes": 4, **TINY, **config}))


def tiny_pipe(unet=None, scheduler=None, classifier=True, guider=None, **config):
    pipe = ClassifierGuidedPipeline(
        unet=unet or tiny_unet(),
        scheduler=scheduler or DDIMScheduler(),
        classifier=tiny_classifier() if classifier is True else classifier,
        guider=guider,
        id2label=LABELS,
        **config,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, seed=0, **arguments):
    arguments = {"class_labels": [3], "num_inference_steps": 3, "output_type": "np", **arguments}
    arguments.setdefault("generator", torch.Generator().manual_seed(seed))
    return pipe(**arguments).images


class CountCalls:
    """How often a model is run while this is open."""

    def __init__(self, *models):
        self.models, self.calls = models, [0] * len(models)

    def __enter__(self):
        def count(index):
            def hook(*_):
                self.calls[index] += 1

            return hook

        self.handles = [model.register_forward_hook(count(i)) for i, model in enumerate(self.models)]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


# What diffusers' pipeline test mixin asks


def test_components_and_parameters():
    pipe = tiny_pipe()
    assert set(pipe.components) == {"unet", "scheduler", "classifier", "guider"}
    assert pipe.parameters == {"id2label": LABELS, "classifier_schedule": None}
    again = ClassifierGuidedPipeline(**pipe.components, **pipe.parameters)
    np.testing.assert_array_equal(draw(again), draw(pipe))


def test_save_and_load(tmp_path):
    pipe = tiny_pipe(classifier_schedule={"beta_schedule": "squaredcos_cap_v2"})
    pipe.save_pretrained(tmp_path)
    loaded = ClassifierGuidedPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.id2label == LABELS
    assert loaded.config.classifier_schedule == {"beta_schedule": "squaredcos_cap_v2"}
    np.testing.assert_allclose(draw(loaded, class_labels="seven"), draw(pipe, class_labels="seven"), atol=1e-5)


@pytest.mark.parametrize("guider", [None, diffusers.ClassifierFreeGuidance(guidance_scale=2.0)])
def test_save_and_load_optional_components(tmp_path, guider):
    pipe = tiny_pipe(unet=tiny_unet(num_class_embeds=4), classifier=None, guider=guider)
    pipe.save_pretrained(tmp_path)
    loaded = ClassifierGuidedPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.classifier is None
    assert type(loaded.guider) is type(guider) and (guider is None or loaded.guider.guidance_scale == 2.0)
    np.testing.assert_allclose(draw(loaded), draw(pipe), atol=1e-5)


def test_loading_is_silent(tmp_path, caplog):
    tiny_pipe().save_pretrained(tmp_path)
    with caplog.at_level("WARNING"), contextlib.redirect_stderr(io.StringIO()) as stderr:
        ClassifierGuidedPipeline.from_pretrained(tmp_path)
    assert "WARNING" not in caplog.text and "xpected" not in stderr.getvalue() + caplog.text


def test_from_pipe():
    pipe = tiny_pipe()
    again = ClassifierGuidedPipeline.from_pipe(pipe, scheduler=DDPMScheduler())
    assert again.unet is pipe.unet and again.classifier is pipe.classifier
    assert again.config.id2label == LABELS


def test_custom_pipeline_file_shows_one_pipeline(root, tmp_path):
    tiny_pipe().save_pretrained(tmp_path)
    file = str(root / "pipelines" / "pipeline_classifier_guided.py")
    loaded = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=file, trust_remote_code=True)
    assert type(loaded).__name__ == "ClassifierGuidedPipeline"


def test_batch_equals_singles():
    pipe = tiny_pipe(scheduler=DDPMScheduler())
    labels = [[3], [0], [3]]  # nested, as the mixin passes them
    together = draw(pipe, class_labels=labels, generator=[torch.Generator().manual_seed(i) for i in range(3)])
    for i, label in enumerate(labels):
        np.testing.assert_allclose(together[i], draw(pipe, seed=i, class_labels=label)[0], atol=1e-5)
    listed = draw(pipe, generator=[torch.Generator().manual_seed(0)])
    np.testing.assert_array_equal(listed, draw(pipe))


def test_tuple_equals_output():
    pipe = tiny_pipe()
    arguments = {"class_labels": 3, "num_inference_steps": 3, "output_type": "np"}
    images = pipe(**arguments, generator=torch.Generator().manual_seed(0), return_dict=False)
    assert isinstance(images, tuple) and len(images) == 1
    np.testing.assert_array_equal(images[0], draw(pipe))


@pytest.mark.parametrize("channels", [1, 3])
def test_output_types(channels):
    pipe = tiny_pipe(
        tiny_unet(in_channels=channels, out_channels=channels), classifier=tiny_classifier(in_channels=channels)
    )
    raw = draw(pipe, output_type="latent")
    as_pt, as_np, as_pil = (draw(pipe, output_type=kind) for kind in ("pt", "np", "pil"))
    assert raw.shape == as_pt.shape == (1, channels, 8, 8) and raw.dtype == torch.float32
    assert 0 <= as_pt.min() and as_pt.max() <= 1
    torch.testing.assert_close(as_pt, (raw / 2 + 0.5).clamp(0, 1))
    np.testing.assert_array_equal(as_np, as_pt.permute(0, 2, 3, 1).numpy())
    assert isinstance(as_pil[0], Image.Image) and as_pil[0].mode == {1: "L", 3: "RGB"}[channels]
    pixels = np.asarray(as_pil[0]).reshape(8, 8, channels)
    np.testing.assert_array_equal(pixels, (as_np[0] * 255).round())


def test_progress_bar():
    pipe = tiny_pipe()
    for disable in (False, True):
        pipe.set_progress_bar_config(disable=disable)
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            draw(pipe)
        assert ("3/3" in stderr.getvalue()) != disable and (stderr.getvalue() == "") == disable


def test_callback_sees_and_replaces_the_image():
    pipe = tiny_pipe()
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, timestep.item(), tensors["latents"].shape))
        if step == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    images = draw(
        pipe,
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=pipe._callback_tensor_inputs,
    )
    assert seen == [(0, 666, (1, 3, 8, 8)), (1, 333, (1, 3, 8, 8)), (2, 0, (1, 3, 8, 8))]
    assert not images.any()


def test_callback_changes_the_guidance_scale():
    pipe = tiny_pipe()

    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    changed = draw(pipe, guidance_scale=2.0, callback_on_step_end=callback)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
    assert not np.array_equal(changed, draw(pipe, guidance_scale=2.0))


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


def test_offload_hooks_are_freed_last():
    pipe = tiny_pipe()
    expected = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    hooks = pipe._all_hooks
    np.testing.assert_array_equal(draw(pipe), expected)
    assert pipe._all_hooks is not hooks and len(pipe._all_hooks) == 2
    assert "classifier" not in pipe.model_cpu_offload_seq


@pytest.mark.parametrize("dtype, deviation", [(torch.bfloat16, 0.02), (torch.float16, 0.004)])
def test_half_precision(dtype, deviation):
    pipe = tiny_pipe(scheduler=DPMSolverMultistepScheduler())
    expected = draw(pipe)
    actual = draw(pipe.to(dtype))
    assert pipe.unet.dtype == pipe.classifier.dtype == dtype
    assert np.isfinite(actual).all()
    assert np.abs(actual - expected).mean() < deviation


def test_inside_inference_mode():
    pipe = tiny_pipe()
    expected = draw(pipe)
    with torch.inference_mode():
        actual = draw(pipe, class_labels=torch.tensor([3]))
    np.testing.assert_array_equal(actual, expected)


# Guidance


def test_guidance_raises_the_probability_of_the_class():
    pipe = tiny_pipe()
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def probability(scale):
        images = draw(pipe, sample=noise, guidance_scale=scale, num_inference_steps=10, output_type="latent")
        return pipe.classifier(images, 0).logits.softmax(dim=-1)[:, 3].mean()

    assert probability(-5.0) < probability(0.0) < probability(5.0)


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler, HeunDiscreteScheduler])
def test_without_guidance_the_classifier_is_not_run(scheduler_class):
    pipe = tiny_pipe(scheduler=scheduler_class())
    with CountCalls(pipe.classifier) as counter:
        unlabelled = draw(pipe, class_labels=None)
        unscaled = draw(pipe, guidance_scale=0)
        empty_interval = draw(pipe, guidance_interval=(0.5, 0.5))
    assert counter.calls == [0]
    np.testing.assert_array_equal(unscaled, unlabelled)
    np.testing.assert_array_equal(empty_interval, unlabelled)
    assert not np.array_equal(draw(pipe), unlabelled)


def test_unguided_ancestral_sampling_is_that_of_diffusers():
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet, scheduler = randomised(UNet2DModel((8, 8), 3, 3, block_out_channels=(32, 64), **blocks)), DDPMScheduler()
    theirs = DDPMPipeline(unet, scheduler)
    theirs.set_progress_bar_config(disable=True)
    ours = tiny_pipe(unet=unet, scheduler=scheduler, classifier=None)
    arguments = {"num_inference_steps": 5, "output_type": "np", "batch_size": 2}
    expected = theirs(**arguments, generator=torch.Generator().manual_seed(0)).images
    np.testing.assert_allclose(draw(ours, class_labels=None, **arguments), expected, atol=1e-6)
    ours.classifier = tiny_classifier()
    assert not np.array_equal(draw(ours, **arguments), expected)


@pytest.mark.parametrize(
    "scheduler_class, interval, calls",
    [
        (DDIMScheduler, (0.0, 1.0), 10),
        (DDIMScheduler, (0.2, 0.7), 5),
        (DDIMScheduler, (0.9, 1.0), 1),
        (HeunDiscreteScheduler, (0.0, 0.5), 10),  # both calls of five steps
        (HeunDiscreteScheduler, (0.5, 1.0), 9),  # the last step has one
    ],
)
def test_guidance_interval(scheduler_class, interval, calls):
    pipe = tiny_pipe(scheduler=scheduler_class())
    with CountCalls(pipe.classifier) as counter:
        draw(pipe, guidance_interval=interval, num_inference_steps=10)
    assert counter.calls == [calls]


def test_mean_mode_differs_from_score_mode_and_raises_the_probability():
    for variance_type, channels in [("learned_range", 6), ("fixed_small", 6), ("fixed_large", 3)]:
        pipe = tiny_pipe(tiny_unet(out_channels=channels), DDPMScheduler(variance_type=variance_type))
        mean, score = (draw(pipe, guidance_mode=mode, num_inference_steps=5) for mode in ("mean", "score"))
        assert np.isfinite(mean).all() and not np.array_equal(mean, score)
        np.testing.assert_array_equal(
            draw(pipe, guidance_mode="mean", guidance_scale=0), draw(pipe, guidance_mode="score", guidance_scale=0)
        )


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_learned_variance_is_dropped_where_the_scheduler_has_no_use_for_it(scheduler_class):
    learned, plain = tiny_unet(out_channels=6), tiny_unet()
    weights = learned.state_dict()
    plain.load_state_dict(weights | {name: weights[name][:3] for name in weights if "conv_out" in name})
    expected = draw(tiny_pipe(plain, scheduler_class()))
    np.testing.assert_allclose(draw(tiny_pipe(learned, scheduler_class())), expected, atol=1e-5)


def test_class_conditional_unet_gets_the_labels():
    pipe = tiny_pipe(tiny_unet(num_class_embeds=4), classifier=None)
    assert not np.array_equal(draw(pipe, class_labels=0), draw(pipe, class_labels=3))
    pipe.classifier = tiny_classifier()
    assert not np.array_equal(draw(pipe, guidance_scale=0), draw(pipe, guidance_scale=2.0))


@pytest.mark.parametrize("model_class", [GQADiTTransformer2DModel, DiTTransformer2DModel])
def test_transformers_in_place_of_the_unet(model_class):
    layers = {"patch_size": 2, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
    if model_class is DiTTransformer2DModel:  # its null class is not in its config
        classes = {"num_embeds_ada_norm": 4}
    else:
        classes = {"num_class_embeds": 4, "null_class": True}
    unet = randomised(model_class(sample_size=8, in_channels=3, out_channels=6, **layers, **classes))
    pipe = tiny_pipe(unet, DPMSolverMultistepScheduler())
    unguided = draw(pipe, class_labels=None)
    with CountCalls(pipe.classifier) as counter:
        conditional = draw(pipe, guidance_scale=0)
    assert counter.calls == [0] and not np.array_equal(conditional, unguided)
    assert not np.array_equal(draw(pipe), conditional)


def test_super_resolution():
    pipe = tiny_pipe(tiny_unet(in_channels=6, low_res_channels=3))
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)
    tensor = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None] / 127.5 - 1
    from_tensor = draw(pipe, low_res=tensor)
    assert from_tensor.shape == (1, 8, 8, 3)
    np.testing.assert_allclose(draw(pipe, low_res=image), from_tensor, atol=1e-5)
    assert not np.allclose(draw(pipe, low_res=-tensor), from_tensor, atol=1e-2)


def test_start_noise():
    pipe = tiny_pipe()
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = draw(pipe, class_labels=[3, 3])
    np.testing.assert_array_equal(draw(pipe, class_labels=3, sample=noise, generator=None), drawn)
    assert draw(pipe, sample=torch.randn(1, 3, 16, 8)).shape == (1, 16, 8, 3)


def test_eta_adds_noise():
    pipe = tiny_pipe()
    noise = torch.zeros(1, 3, 8, 8)
    assert not np.array_equal(draw(pipe, sample=noise, eta=1.0), draw(pipe, sample=noise, eta=1.0, seed=1))
    np.testing.assert_array_equal(draw(pipe, sample=noise), draw(pipe, sample=noise, seed=1))


def test_classifier_schedule_is_the_classifiers_own():
    timesteps = []

    def record(module, arguments):
        timesteps.append(float(arguments[1]))

    classifier = tiny_classifier()
    handle = classifier.register_forward_pre_hook(record)
    draw(tiny_pipe(classifier=classifier))
    assert timesteps == [666, 333, 0]
    timesteps.clear()
    draw(tiny_pipe(classifier=classifier, classifier_schedule={"beta_schedule": "squaredcos_cap_v2"}))
    handle.remove()
    cosine = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    linear = DDPMScheduler().alphas_cumprod
    for timestep, expected in zip(timesteps, (666, 333), strict=False):
        below, above = int(timestep), int(timestep) + 1
        assert cosine[above] <= linear[expected] <= cosine[below]


GUIDERS = [
    diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    diffusers.AdaptiveProjectedGuidance(guidance_scale=3.0, adaptive_projected_guidance_momentum=-0.5),
    diffusers.ClassifierFreeZeroStarGuidance(guidance_scale=3.0),
    diffusers.TangentialClassifierFreeGuidance(guidance_scale=3.0),
    diffusers.ClassifierFreeGuidance(guidance_scale=3.0, start=0.2, stop=0.8),
]


@pytest.mark.parametrize("guider", GUIDERS, ids=lambda guider: type(guider).__name__)
def test_guiders_of_diffusers(guider):
    pipe = tiny_pipe(scheduler=DPMSolverMultistepScheduler(), guider=guider)
    images = draw(pipe, num_inference_steps=5)
    assert np.isfinite(images).all()
    np.testing.assert_array_equal(draw(pipe, num_inference_steps=5), images)  # no state is left from the first run
    assert guider.get_state()["step"] is None
    pipe.guider = None
    assert not np.array_equal(draw(pipe, num_inference_steps=5, guidance_scale=1.0), images)
    if guider is GUIDERS[0]:
        np.testing.assert_allclose(draw(pipe, num_inference_steps=5, guidance_scale=3.0), images, atol=1e-5)


def test_guider_with_a_memory_inside_an_interval():
    momentum = {"guidance_scale": 3.0, "adaptive_projected_guidance_momentum": -0.5}
    inside = {"num_inference_steps": 5, "guidance_interval": (0.4, 1.0)}  # without the first step, where it begins
    pipe = tiny_pipe(guider=diffusers.AdaptiveProjectedGuidance(**momentum))
    images = draw(pipe, **inside)
    np.testing.assert_array_equal(draw(pipe, **inside), images)
    pipe.guider = diffusers.AdaptiveProjectedGuidance(guidance_scale=3.0)
    assert not np.array_equal(draw(pipe, **inside), images)


# Labels


def test_labels_by_name():
    pipe = tiny_pipe()
    assert pipe.labels == {"Tinca tinca": 0, "seven": 3, "tench": 0, "tench, Tinca tinca": 0}
    nested = [3, "seven", ["tench", [np.int64(1)]], torch.tensor([2, 0]), range(2)]
    assert pipe.get_label_ids(nested) == [3, 3, 0, 1, 2, 0, 0, 1]
    assert pipe.get_label_ids(torch.tensor(2)) == [2]


def test_one_label_is_for_the_whole_batch():
    pipe = tiny_pipe()
    np.testing.assert_array_equal(draw(pipe, batch_size=2), draw(pipe, class_labels=[3, 3]))


# Errors, before any network runs

EDM = diffusers.EDMEulerScheduler()
BAD_ARGUMENTS = [
    ({"class_labels": "eight"}, "'eight', which is not a name of a class. Known: 'Tinca tinca', 'crane'"),
    ({"class_labels": "crane"}, r"'crane', which names the classes \[1, 2\]"),
    ({"class_labels": [0, 4]}, r"\[4\]; ids of classes go from 0 to 3"),
    ({"class_labels": -1}, r"\[-1\]; ids of classes go from 0 to 3"),
    ({"class_labels": torch.tensor([1.0])}, "holds 1.0; a label is a class id"),
    ({"class_labels": [True]}, "holds True"),
    ({"class_labels": []}, "`class_labels` is empty"),
    ({"class_labels": [0, 1], "batch_size": 3}, "2 labels for 3 images"),
    ({"batch_size": 0}, "`batch_size` is 0"),
    ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
    ({"num_inference_steps": 2.5}, "`num_inference_steps` is 2.5"),
    ({"guidance_mode": "median"}, "'median'; it must be one of score, mean"),
    ({"guidance_mode": "mean"}, "DDIMScheduler takes no such steps"),
    ({"guidance_scale": float("nan")}, "`guidance_scale` is nan"),
    ({"guidance_interval": (0.8, 0.2)}, r"`guidance_interval` is \(0.8, 0.2\)"),
    ({"guidance_interval": (-0.1, 1.0)}, "0 <= start <= stop <= 1"),
    ({"guidance_interval": (0.0, 1.5)}, "0 <= start <= stop <= 1"),
    ({"guidance_interval": (0.5,)}, "must be a pair"),
    ({"output_type": "jpg"}, "'jpg'; it must be one of pil, np, pt, latent"),
    ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"\['noise'\]; possible are \['latents'\]"),
    ({"generator": [torch.Generator()] * 2, "batch_size": 3}, "a list of 2 for 3 images"),
    ({"sample": torch.zeros(1, 4, 8, 8)}, r"\(1, 4, 8, 8\); it must be \(1, 3, height, width\)"),
    ({"sample": torch.zeros(2, 3, 8, 8), "class_labels": [0, 1, 2]}, r"must be \(3, 3, height, width\)"),
    ({"low_res": torch.zeros(1, 3, 4, 4)}, "`unet` does not enlarge images"),
]
BAD_COMPONENTS = [
    ({"classifier": None}, {}, "has no `classifier`"),
    ({"classifier": None, "unet": {"num_class_embeds": 4}}, {"guidance_scale": 1.0}, "has no `classifier`"),
    ({"classifier": {"in_channels": 1}}, {}, "looks at 1 channels, but `unet` draws 3"),
    ({"classifier": {"sample_size": 16}}, {}, "images of 16 pixels, `unet` on 8"),
    ({"unet": {"num_class_embeds": 4}}, {"class_labels": None}, "`unet` is class-conditional"),
    ({"unet": {"num_class_embeds": 2}}, {}, r"\[3\]; ids of classes go from 0 to 1"),
    ({"unet": {"out_channels": 4}}, {}, "4 output channels"),
    ({"unet": {"in_channels": 6, "low_res_channels": 3}}, {}, "`low_res` is missing"),
    ({"unet": {"in_channels": 6, "low_res_channels": 3}}, {"low_res": torch.zeros(2, 3, 4, 4), "batch_size": 1},
     r"`low_res` has shape \(2, 3, 4, 4\)"),
    ({"scheduler": DDPMScheduler(variance_type="learned_range")}, {}, "would need 6 for a learned variance"),
    ({"scheduler": EDM}, {}, "EDMEulerScheduler needs a network with EDM's preconditioning"),
    ({"scheduler": diffusers.LCMScheduler()}, {"class_labels": None}, "LCMScheduler cannot be guided"),
    ({"scheduler": DDPMScheduler()}, {"eta": 0.5}, "`eta` is 0.5, which `scheduler` DDPMScheduler does not have"),
    ({"guider": diffusers.PerturbedAttentionGuidance(perturbed_guidance_layers=[0])}, {}, "a weakened copy of it"),
    ({"guider": diffusers.AutoGuidance(auto_guidance_layers=[0], dropout=0.5)}, {}, "a weakened copy of it"),
    ({"guider": GUIDERS[0], "scheduler": DDPMScheduler()}, {"guidance_mode": "mean"}, "what `guider` works on"),
]  # fmt: skip


def check_error(pipe, arguments, message):
    networks = [network for network in (pipe.unet, pipe.classifier) if network is not None]
    with CountCalls(*networks) as counter, pytest.raises(ValueError, match=message):
        draw(pipe, **arguments)
    assert not any(counter.calls)


@pytest.mark.parametrize("arguments, message", BAD_ARGUMENTS, ids=[re.sub(r"\W+", " ", m) for _, m in BAD_ARGUMENTS])
def test_argument_errors(arguments, message):
    check_error(tiny_pipe(), arguments, message)


@pytest.mark.parametrize(
    "components, arguments, message", BAD_COMPONENTS, ids=[re.sub(r"\W+", " ", m) for *_, m in BAD_COMPONENTS]
)
def test_component_errors(components, arguments, message):
    build = {"unet": tiny_unet, "classifier": tiny_classifier}
    components = {
        name: build[name](**value) if isinstance(value, dict) else value for name, value in components.items()
    }
    check_error(tiny_pipe(**components), arguments, message)


def test_label_without_names():
    pipe = ClassifierGuidedPipeline(tiny_unet(), DDIMScheduler(), tiny_classifier())
    check_error(pipe, {"class_labels": "seven"}, "has no names of classes")


def test_classifier_made_in_inference_mode():
    with torch.inference_mode():
        classifier = tiny_classifier()
    check_error(tiny_pipe(classifier=classifier), {}, r"made inside `torch.inference_mode\(\)`")
