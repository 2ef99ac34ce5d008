"""The demo draws: what is observed is true and changes nothing; columns at once, stopped, failing; sweep, pictures."""

import gc
import itertools
import math
import pickle
import threading
import time
import weakref
from dataclasses import replace

import comparison as comparison_module
import numpy as np
import pytest
import torch
from catalog import Catalog, Stopped, new_pipeline
from comparison import compare, message, sweep
from judge import DIGITS, Judge
from observation import MAX_FRAMES, MAX_POINTS, Observation, clean_image
from pictures import contact_sheet, difference, enlarge, sweep_picture
from PIL import Image
from plan import generators, initial_noise, plan
from settings import Column, Comparison, SettingsError
from test_demo_catalog import (
    ATTENTION,
    UNET,
    composable,
    decoder,
    flux,
    stable_diffusion,
    stable_diffusion_3,
    unet_of_diffusers,
)
from test_pipeline_class_conditional import build

import diffusers
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from diffusers_ext import (
    ADMClassifierModel,
    ADMUNet2DModel,
    ClassConditionalPipeline,
    ClassifierGuidedPipeline,
)
from diffusers_ext.guidance import noise_level_rule, prediction_type


pytestmark = pytest.mark.usefixtures("one_thread")
WANTED = [1, 2, 3]


def class_conditional(**components):
    components = {"unet": composable(), "scheduler": DDIMScheduler(clip_sample=False), **components}
    return quiet(ClassConditionalPipeline(**components))


def small_classifier():
    config = {name: value for name, value in {**UNET, **ATTENTION}.items() if name != "out_channels"}
    return build(ADMClassifierModel, **config, num_classes=4)


def classifier_guided(out_channels=6, **components):
    unet = build(ADMUNet2DModel, **{**UNET, **ATTENTION, "out_channels": out_channels})
    classifier = small_classifier()
    components = {"scheduler": DDIMScheduler(clip_sample=False), **components}
    return quiet(ClassifierGuidedPipeline(unet=unet, classifier=classifier, **components))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sources(count=3):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def with_scheduler(pipe, scheduler, guider=None):
    return quiet(new_pipeline(pipe, scheduler.from_config(pipe.scheduler.config), guider))


def observe(pipe, call, **options):
    """Draws with all that can be watched; the pipeline that is given stays as it is."""
    own = quiet(new_pipeline(pipe, type(pipe.scheduler).from_config(pipe.scheduler.config), call.pop("guider", None)))
    observation = Observation(own, **{"num_images": 3, **options})
    observation.begin()
    images = own(**call, generator=sources()).images
    observation.end()
    return observation, images


class Calls(list):
    """Rows that a network is given in each call, whoever calls it."""

    def __init__(self, network):
        super().__init__()
        self.inputs = []
        self.handle = network.register_forward_pre_hook(self._count)

    def _count(self, network, args):
        self.append(len(args[0]))
        self.inputs.append(args[0].detach().clone())


# What a prediction means


VARIANCE_PRESERVING = ("DDPMScheduler", "DDIMScheduler", "CogVideoXDDIMScheduler")
WITH_CLEAN_IMAGES = (
    *VARIANCE_PRESERVING,
    "EulerDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverMultistepScheduler",
)
WITHOUT_SAMPLE = ("EulerAncestralDiscreteScheduler", "EDMEulerScheduler")  # do not know networks that predict x_0


@pytest.mark.parametrize(
    "name, kind",
    [
        *itertools.product(WITH_CLEAN_IMAGES, ["epsilon", "v_prediction", "sample"]),
        *itertools.product(WITHOUT_SAMPLE, ["epsilon", "v_prediction"]),
    ],
)
def test_clean_images_are_those_of_the_scheduler(name, kind):
    scheduler_class = getattr(diffusers, name)
    clip = {"clip_sample": False} if name in VARIANCE_PRESERVING else {}
    scheduler = scheduler_class(prediction_type=kind, **clip)
    scheduler.set_timesteps(6)
    level = noise_level_rule(scheduler)
    random = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 3, 4, 4, generator=random) * float(scheduler.init_noise_sigma)
    for i, timestep in enumerate(scheduler.timesteps):
        prediction = torch.randn(sample.shape, generator=random)
        scheduler.scale_model_input(sample, timestep)
        sigma_data = scheduler.config.get("sigma_data")
        ours = clean_image(prediction_type(scheduler), sample, prediction, *level(float(timestep), i), sigma_data)
        if name == "DPMSolverMultistepScheduler":
            if scheduler.step_index is None:
                scheduler._init_step_index(timestep)
            theirs = scheduler.convert_model_output(prediction, sample=sample)
            sample = scheduler.step(prediction, timestep, sample).prev_sample
        else:
            output = scheduler.step(prediction, timestep, sample)
            sample, theirs = output.prev_sample, output.pred_original_sample
        scale = theirs.abs().max()
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=2e-4)


def test_clean_images_of_flows():
    clean, noise = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    level = noise_level_rule(scheduler)
    for i, timestep in enumerate(scheduler.timesteps):
        alpha, sigma = level(float(timestep), i)
        found = clean_image("flow_prediction", alpha * clean + sigma * noise, noise - clean, alpha, sigma)
        torch.testing.assert_close(found, clean, rtol=0, atol=1e-5)
        found = clean_image("reversed_flow_prediction", alpha * clean + sigma * noise, clean - noise, alpha, sigma)
        torch.testing.assert_close(found, clean, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler]
)
def test_the_last_predicted_clean_image_is_the_image(scheduler):
    pipe = class_conditional(scheduler=scheduler())
    observation, images = observe(pipe, {"class_labels": WANTED, "guidance_scale": 1.5, "num_inference_steps": 4})
    for preview, image in zip(observation.images(), images, strict=True):
        assert np.abs(np.asarray(preview, dtype=int) - np.asarray(image)).max() <= 1


# Nothing changes


CONDITIONAL = {"class_labels": WANTED, "guidance_scale": 2.0}
GUIDED = {"class_labels": WANTED, "guidance_scale": 3.0}
EVERY_KIND = {
    "none": (class_conditional, {"class_labels": WANTED, "guidance_scale": 1.0}, "none"),
    "classifier-free": (class_conditional, CONDITIONAL, "classifier-free"),
    "interval": (class_conditional, {**CONDITIONAL, "guidance_interval": (0.25, 0.75)}, "classifier-free"),
    "adaptive-projected": (
        class_conditional,
        {"class_labels": WANTED, "guider": diffusers.AdaptiveProjectedGuidance(guidance_scale=2.0)},
        "adaptive-projected",
    ),
    "classifier": (classifier_guided, GUIDED, "classifier"),
}
SCHEDULERS = {
    "CogVideoXDDIMScheduler": {},
    "CogVideoXDPMScheduler": {},
    "DDIMParallelScheduler": {},
    "DDIMScheduler": {},
    "DDPMParallelScheduler": {},
    "DDPMScheduler": {},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {"thresholding": True},
    "DPMSolverSDEScheduler": {"noise_sampler_seed": 0},
    "DPMSolverSinglestepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "SASolverScheduler": {},
    "TCDScheduler": {},
    "UniPCMultistepScheduler": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
}


FEW = ("DDPMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler")


@pytest.mark.parametrize(
    "kind, scheduler",
    [
        *itertools.product(["classifier-free"], SCHEDULERS),
        *itertools.product(["none", "interval", "adaptive-projected", "classifier"], FEW),
    ],
)
def test_watching_changes_no_bit(kind, scheduler):
    make, call, guidance = EVERY_KIND[kind]
    check_unchanged(make(scheduler=getattr(diffusers, scheduler)(**SCHEDULERS[scheduler])), call, guidance)


def test_watching_changes_no_bit_in_half_precision():
    check_unchanged(classifier_guided().to(torch.bfloat16), GUIDED, "classifier")


def check_unchanged(pipe, call, guidance):
    call = {**call, "num_inference_steps": 4, "output_type": "np"}
    plain = new_pipeline(pipe, type(pipe.scheduler).from_config(pipe.scheduler.config), call.get("guider"))
    arguments = {name: value for name, value in call.items() if name != "guider"}
    expected = plain(**arguments, generator=sources()).images
    assert expected.std() > 0.01
    observation, images = observe(pipe, call, guidance=guidance, class_ids=WANTED)
    np.testing.assert_array_equal(images, expected)
    assert observation.step == observation.num_steps == len(observation.frames) > 0
    assert len(observation.guidance_norm) == (0 if guidance == "none" else observation.step)
    assert np.any(observation.guidance_norm) == (guidance != "none")


@pytest.mark.parametrize("variance_type", ["learned_range", "fixed_small"])
def test_watching_changes_no_bit_of_ancestral_sampling(variance_type):
    pipe = classifier_guided(scheduler=DDPMScheduler(variance_type=variance_type))
    call = {**GUIDED, "guidance_mode": "mean", "num_inference_steps": 5, "output_type": "np"}
    expected = pipe(**call, generator=sources()).images
    observation, images = observe(pipe, dict(call), guidance="classifier-mean", class_ids=WANTED)
    np.testing.assert_array_equal(images, expected)
    assert len(observation.guidance_norm) == 5 and np.all(observation.guidance_norm)


def test_watching_leaves_the_shared_networks_alone():
    pipe = classifier_guided()
    unet, scheduler = pipe.unet, type(pipe.scheduler)
    observe(pipe, {**GUIDED, "num_inference_steps": 2}, class_ids=WANTED)
    assert pipe.unet is unet and type(pipe.scheduler) is scheduler
    assert not unet._forward_hooks and not unet._forward_pre_hooks and not pipe.classifier._forward_hooks


# Work


@pytest.mark.parametrize(
    "make, scheduler, call, network, classifier, steps",
    [
        (class_conditional, DDIMScheduler, {"class_labels": WANTED, "guidance_scale": 1.0}, 8, 0, 8),
        (class_conditional, DDIMScheduler, CONDITIONAL, 16, 0, 8),
        (class_conditional, DDIMScheduler, {**CONDITIONAL, "guidance_interval": (0.0, 0.5)}, 12, 0, 8),
        (class_conditional, HeunDiscreteScheduler, CONDITIONAL, 30, 0, 15),
        (
            lambda: class_conditional(guide_model=composable(block_out_channels=(8, 16))),
            DDIMScheduler,
            CONDITIONAL,
            16,
            0,
            8,
        ),
        (classifier_guided, DDIMScheduler, {**GUIDED, "guidance_scale": 0.0}, 8, 0, 8),
        (classifier_guided, DDIMScheduler, GUIDED, 8, 8, 8),
        (classifier_guided, DDIMScheduler, {**GUIDED, "guidance_interval": (0.25, 0.5)}, 8, 2, 8),
        (classifier_guided, HeunDiscreteScheduler, GUIDED, 15, 15, 15),
    ],
    ids=["plain", "CFG", "CFG in half", "CFG, Heun", "autoguidance", "scale 0", "classifier", "in a quarter", "Heun"],
)
def test_evaluations_are_counted(make, scheduler, call, network, classifier, steps):
    pipe = with_scheduler(make(), scheduler)
    networks = [pipe.components[name] for name in ("unet", "guide_model") if pipe.components.get(name) is not None]
    counts = [Calls(network) for network in networks]
    observation, _ = observe(pipe, {**call, "num_inference_steps": 8})
    assert observation.network_evaluations == network == sum(map(sum, counts)) / 3
    assert observation.classifier_evaluations == classifier
    assert observation.step == observation.num_steps == steps
    assert 0 < observation.seconds < 60


# Guidance and probabilities


def first_noise(pipe):
    noise = torch.cat([torch.randn(1, 3, 8, 8, generator=source) for source in sources()])
    return noise * float(getattr(pipe.scheduler, "init_noise_sigma", 1.0))


def root_mean_square(x):
    return x.square().mean(dim=(1, 2, 3)).sqrt().tolist()


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler])
def test_norm_of_classifier_free_guidance(scheduler):
    pipe = class_conditional(scheduler=scheduler())
    call = {**CONDITIONAL, "guidance_scale": 3.0, "guidance_interval": (0.0, 0.5), "num_inference_steps": 4}
    observation, _ = observe(pipe, call, guidance="classifier-free")
    assert observation.norm_steps == [1, 2, 3, 4]
    assert observation.guidance_norm[2:] == [[0.0] * 3] * 2

    pipe.scheduler.set_timesteps(4)
    timestep, x = pipe.scheduler.timesteps[0], first_noise(pipe)
    seen = x if scheduler is FlowMatchEulerDiscreteScheduler else pipe.scheduler.scale_model_input(x, timestep)
    with torch.no_grad():
        cond, uncond = (
            pipe.unet(seen, timestep.expand(3), class_labels=torch.tensor(labels)).sample
            for labels in (WANTED, [4] * 3)
        )
    # d x_0 of what was added to the prediction: x_0 = (x - sigma eps) / alpha, and x - sigma v for a flow.
    if scheduler is DDIMScheduler:
        abar = pipe.scheduler.alphas_cumprod[timestep].item()
        factor = math.sqrt(1 - abar) / math.sqrt(abar)
    else:
        factor = pipe.scheduler.sigmas[0].item()
    expected = root_mean_square(factor * 2 * (cond - uncond))
    np.testing.assert_allclose(observation.guidance_norm[0], expected, rtol=1e-3)


@pytest.mark.parametrize("mode", ["score", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_classifier_guidance(mode, dtype):
    pipe = with_scheduler(classifier_guided(), DDPMScheduler).to(dtype)
    call = {**GUIDED, "guidance_mode": mode, "guidance_interval": (0.0, 0.5), "num_inference_steps": 4}
    observation, _ = observe(pipe, call, guidance="classifier-mean" if mode == "mean" else "classifier")
    assert observation.guidance_norm[2:] == [[0.0] * 3] * 2

    pipe.scheduler.set_timesteps(4)
    timestep, noise = pipe.scheduler.timesteps[0], first_noise(pipe).requires_grad_()
    logits = pipe.classifier(noise.to(dtype), timestep).logits.float()
    logits.log_softmax(dim=1)[range(3), WANTED].sum().backward()
    abar = pipe.scheduler.alphas_cumprod[timestep].item()
    expected = root_mean_square(3.0 * (1 - abar) / math.sqrt(abar) * noise.grad)
    np.testing.assert_allclose(observation.guidance_norm[0], expected, rtol=1e-3)


def test_norm_of_classifier_guidance_is_what_the_step_sees():
    """The formula against the difference that the guided prediction makes."""
    pipe = classifier_guided(out_channels=3)
    given = []

    class Recorded(DDIMScheduler):
        def step(self, model_output, timestep, sample, *args, **kwargs):
            given.append((model_output, timestep))
            return super().step(model_output, timestep, sample, *args, **kwargs)

    pipe = quiet(new_pipeline(pipe, Recorded(clip_sample=False)))
    predicted = []
    pipe.unet.register_forward_hook(lambda network, args, output: predicted.append(output[0]))
    observation, _ = observe(pipe, {**GUIDED, "num_inference_steps": 4}, guidance="classifier")
    for norm, (guided, timestep), plain in zip(observation.guidance_norm, given, predicted, strict=True):
        abar = pipe.scheduler.alphas_cumprod[timestep].item()
        expected = root_mean_square((guided - plain) * math.sqrt(1 - abar) / math.sqrt(abar))
        np.testing.assert_allclose(norm, expected, rtol=1e-3)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.4), (0.0, 0.0)], ids=["guided", "in part", "never"])
def test_probability_is_what_the_classifier_says(interval):
    pipe = classifier_guided()
    samples, timesteps = [first_noise(pipe)], []

    def keep(pipe, step, timestep, tensors):
        samples.append(tensors["latents"])
        timesteps.append(timestep)
        return tensors

    call = {**GUIDED, "guidance_interval": interval, "num_inference_steps": 5}
    pipe(**call, generator=sources(), callback_on_step_end=keep)
    observation, _ = observe(pipe, call, class_ids=WANTED)
    assert observation.probability_steps == [1, 2, 3, 4, 5]
    assert list(observation.probability) == ["classifier"]
    for row, sample, timestep in zip(observation.probability["classifier"], samples, timesteps, strict=False):
        with torch.no_grad():
            wanted = pipe.classifier(sample, timestep).logits.softmax(dim=1)[range(3), WANTED]
        np.testing.assert_allclose(row, wanted.tolist(), rtol=1e-3)
    assert observation.classifier_evaluations == round(5 * interval[1])  # those for the plot are not counted


def test_probabilities_of_long_runs_are_read_at_some_steps():
    observation, _ = observe(
        classifier_guided(), {**GUIDED, "guidance_scale": 0.0, "num_inference_steps": 120}, class_ids=WANTED
    )
    steps = observation.probability_steps
    assert len(steps) == MAX_POINTS and steps[0] == 1 and steps[-1] == 120
    assert {b - a for a, b in itertools.pairwise(steps)} <= {2, 3}
    assert len(observation.probability["classifier"]) == len(steps)


@pytest.mark.parametrize("steps", [1, 2, 5, 12, 13, 100])
def test_film_is_spread_over_the_run(steps):
    call = {"class_labels": WANTED, "guidance_scale": 1.0, "num_inference_steps": steps}
    observation, images = observe(class_conditional(), call)
    observation.close_film(images)
    assert len(observation.frames) == len(observation.frame_steps) == min(steps, MAX_FRAMES)
    assert observation.frame_steps[-1] == steps and observation.frames[-1] is images
    if steps > 1:
        gaps = np.diff(observation.frame_steps)
        assert observation.frame_steps[0] == 1 and gaps.max() - gaps.min() <= 1


def test_what_is_seen_is_finite():
    """At the first timestep of a schedule without any signal, the noise says nothing of the clean image."""
    pipe = class_conditional(scheduler=DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"))
    observation, _ = observe(pipe, {**CONDITIONAL, "num_inference_steps": 3}, guidance="classifier-free")
    assert len(observation.frames) == len(observation.guidance_norm) == 3
    assert np.isfinite(observation.guidance_norm).all()


# Pipelines of diffusers


def test_norm_of_guidance_in_stable_diffusion():
    """Its unconditional prediction comes first."""
    pipe = stable_diffusion()
    pipe = with_scheduler(pipe, DDIMScheduler)
    predicted = []
    pipe.unet.register_forward_hook(lambda network, args, output: predicted.append(output[0]))
    call = {"prompt": "a", "num_images_per_prompt": 3, "guidance_scale": 3.0, "num_inference_steps": 5}
    observation, _ = observe(pipe, call, guidance="classifier-free", latent=True, size=(16, 16))
    uncond, cond = predicted[0].chunk(2)
    abar = pipe.scheduler.alphas_cumprod[801].item()
    expected = root_mean_square(2 * (cond - uncond) * math.sqrt(1 - abar) / math.sqrt(abar))
    np.testing.assert_allclose(observation.guidance_norm[0], expected, rtol=1e-3)


@pytest.mark.parametrize(
    "make, guidance, evaluations",
    [
        (stable_diffusion, "classifier-free", 8),
        (stable_diffusion, "none", 4),
        (stable_diffusion_3, "classifier-free", 8),
        (flux, "embedded", 4),
    ],
)
def test_text_to_image_through_the_catalog(make, guidance, evaluations, tmp_path):
    make().save_pretrained(tmp_path / "theirs")
    catalog = Catalog({"theirs": tmp_path / "theirs"})
    column = Column("theirs", None, 4, guidance, 3.0)
    size = {"height": 16, "width": 16} if make is flux else {}
    comparison = ask(column, class_labels=(), prompt="a digit", **size)
    (state,) = final(comparison, catalog)
    assert pixels(state) == drawn_alone(comparison, 0, catalog)
    assert state.network_evaluations == evaluations and state.step == state.num_steps == 4
    assert state.frame_steps == [1, 2, 3, 4] and state.probability == {} and state.verdicts is None
    assert {image.size for frame in state.frames for image in frame} == {(16, 16)}
    assert len(state.guidance_norm) == (4 if guidance == "classifier-free" else 0)


def test_the_film_strip_of_large_images_is_small():
    call = {"class_labels": WANTED, "guidance_scale": 1.0, "num_inference_steps": 2, "height": 160, "width": 320}
    observation, images = observe(class_conditional(), call, class_ids=WANTED, size=(160, 320))
    assert {image.size for frame in observation.frames for image in frame} == {(128, 64)}
    assert {image.size for image in observation.images()} == {(320, 160)}


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_3, flux])
def test_the_last_preview_of_latents_is_the_image(make):
    pipe = make()
    if make is stable_diffusion:
        pipe = with_scheduler(pipe, EulerDiscreteScheduler)
    call = {"prompt": "a digit", "num_images_per_prompt": 3, "num_inference_steps": 4, "height": 16, "width": 16}
    observation, images = observe(pipe, call, latent=True, size=(16, 16))
    for preview, image in zip(observation.images(), images, strict=True):
        assert np.abs(np.asarray(preview, dtype=int) - np.asarray(image)).max() <= 1


def test_latents_that_cannot_be_decoded_have_no_previews(caplog):
    pipe = class_conditional(unet=composable(in_channels=4, out_channels=4), vae=decoder())
    call = {"class_labels": WANTED, "guidance_scale": 1.0, "num_inference_steps": 3, "output_type": "latent"}
    own = quiet(new_pipeline(pipe, DDIMScheduler(clip_sample=False)))
    own.decode = lambda latents: pipe.vae.encoder(latents)  # wrong number of channels
    observation = Observation(own, num_images=3, latent=True)
    assert len(own(**call, generator=sources()).images) == 3
    assert observation.step == 3 and observation.images() == [] and observation.frames == []
    assert "draws on unseen" in caplog.text


# Comparisons


@pytest.fixture(scope="module")
def catalog():
    return Catalog.shipped()


@pytest.fixture(scope="module")
def judge(root):
    return Judge(root / "model_cards" / "judge-mnist")


FILM = Column("film-mnist", "DDIMScheduler", 4, "classifier-free", 2.0)
DIT = Column("dit-gqa-mnist", "DDIMScheduler", 4, "classifier-free", 2.0)
ADM = Column("adm-mnist", "DDIMScheduler", 4, "classifier", 6.0)
DILATED = Column("dilated-mnist", "DDIMScheduler", 4)


def ask(*columns, **settings):
    return Comparison(columns=columns, **{"class_labels": ("three", "five"), "num_images": 2, "seed": 7, **settings})


def final(comparison, catalog, **options):
    for states in compare(comparison, catalog, **options):
        pass
    return states


def pixels(state):
    assert state.status == "done", state.error
    return [np.asarray(image).tolist() for image in state.images]


def drawn_alone(comparison, index, catalog):
    """The images by the pipeline's own call, without anything of the demo around it."""
    column = comparison.columns[index]
    description = catalog.describe(column.model)
    steps = plan(comparison, index, description)
    with catalog.borrow(column.model, column.dtype) as shared:
        scheduler = getattr(diffusers, steps.scheduler).from_config(shared.scheduler.config, **steps.scheduler_options)
        guider = steps.guider and getattr(diffusers, steps.guider[0])(**steps.guider[1])
        pipe = quiet(new_pipeline(shared, scheduler, guider))
        random = generators(comparison)
        noise = initial_noise(comparison, description, random)
        start = {} if noise is None else {"sample": noise}
        return [np.asarray(image).tolist() for image in pipe(**steps.call, **start, generator=random).images]


def test_columns_are_drawn_as_by_their_pipelines(catalog, judge):
    comparison = ask(FILM, DIT, ADM, DILATED)
    states = final(comparison, catalog, judge=judge)
    for index, state in enumerate(states):
        assert pixels(state) == drawn_alone(comparison, index, catalog)
        assert state.step == state.num_steps == 4 and state.frame_steps == [1, 2, 3, 4]
        assert state.frames[-1] == state.images and state.error is None
        assert state.images_per_second == pytest.approx(2 / state.seconds)
        assert [image.size for image in state.images] == [(28, 28) if index == 3 else (32, 32)] * 2
        assert len(state.verdicts) == 2
    film, dit, adm, dilated = states
    assert [state.network_evaluations for state in states] == [8, 8, 4, 4]
    assert [state.classifier_evaluations for state in states] == [0, 0, 4, 0]
    assert film.labels == adm.labels == ["three", "five"] and dilated.labels == [None, None]
    assert list(film.probability) == ["judge"] and set(adm.probability) == {"classifier", "judge"}
    assert dilated.probability == {} and dilated.guidance_norm == [] and len(film.guidance_norm) == 4
    assert film.probability["judge"][-1] == pytest.approx(
        [judge.probabilities(tensor(film.images))[i, digit].item() for i, digit in enumerate((3, 5))], abs=0.02
    )
    assert pickle.loads(pickle.dumps(states)) == states


def tensor(images):
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))[:, None] / 127.5 - 1


def test_equal_columns_draw_equal_images(catalog):
    first, second, other = final(ask(FILM, FILM, replace(FILM, guidance_scale=5.0)), catalog)
    assert pixels(first) == pixels(second) != pixels(other)
    assert first.guidance_norm == second.guidance_norm


def test_all_columns_start_from_the_same_noise(catalog):
    columns = [replace(column, scheduler="DDPMScheduler") for column in (FILM, DIT, ADM, DILATED)]
    seen = []
    for column in columns:
        with catalog.borrow(column.model, "float32") as pipe:
            network = pipe.components["unet"] if pipe.components.get("unet") is not None else pipe.transformer
            seen.append(Calls(network))
    final(ask(*columns), catalog)
    for calls in seen:
        calls.handle.remove()
    film, dit, adm, dilated = (calls.inputs[0][:2] for calls in seen)
    assert film.shape == (2, 1, 32, 32) and film.std() > 0.9
    assert torch.equal(film, dit) and torch.equal(film, adm)
    assert torch.equal(film[:, :, 2:-2, 2:-2], dilated)


def test_first_preview_comes_after_the_first_step(catalog):
    moments = []
    for states in compare(ask(replace(FILM, num_inference_steps=60), DILATED, num_images=3), catalog):
        moments.append((time.monotonic(), states))
    assert [state.status for state in moments[0][1]] != ["done", "done"]
    assert all(state.images for _, states in moments for state in states if state.step)
    assert all(len(state.images) in (0, 3) for _, states in moments for state in states)
    steps = [states[0].step for _, states in moments]
    assert steps == sorted(steps) and len(set(steps)) > 4
    while_drawing = [now for now, states in moments if 0 < states[0].step < 60]
    assert min(b - a for a, b in itertools.pairwise(while_drawing)) > 0.1
    assert [state.status for state in moments[-1][1]] == ["done", "done"]


class Broken(torch.nn.Module):
    """Fails in its second call, as a network in trouble would."""

    def __init__(self, network):
        super().__init__()
        self.network, self.config, self.calls = network, network.config, 0
        self.dtype, self.device = network.dtype, network.device

    def forward(self, *args, **kwargs):
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("cannot read /home/operator/secret models/weights.bin and /srv/a-b/c.d/e.pt!")
        return self.network(*args, **kwargs)


@pytest.fixture
def own_catalog(tmp_path, root):
    """Models that a test may spoil."""
    return Catalog(
        {"film-mnist": root / "model_cards" / "film-mnist", "dit-gqa-mnist": root / "model_cards" / "dit-gqa-mnist"}
    )


def test_a_failing_column_leaves_the_others_alone(own_catalog, caplog):
    expected = pixels(final(ask(DIT), own_catalog)[0])
    with own_catalog.borrow("film-mnist", "float32") as pipe:
        pipe.unet = Broken(pipe.unet)
        failed, drawn, unknown, impossible = final(
            ask(FILM, DIT, replace(FILM, model="nobody-has-this"), replace(DIT, guidance="classifier")), own_catalog
        )
    assert pixels(drawn) == expected
    assert failed.status == "failed" and failed.step == 1 and len(failed.images) == 2
    assert failed.error.startswith("RuntimeError: cannot read") and "secret" not in failed.error.replace(
        "secret models", ""
    )
    assert "/home" not in failed.error and "/srv" not in failed.error and "e.pt" in failed.error
    assert "Traceback" in caplog.text and "/home/operator" in caplog.text  # the operator sees it all
    assert unknown.status == "failed" and "nobody-has-this" in unknown.error and not unknown.images
    assert impossible.status == "failed" and impossible.error.startswith("Column D: ")


@pytest.mark.parametrize(
    "column", [FILM, ADM, replace(FILM, scheduler="HeunDiscreteScheduler")], ids=lambda c: c.model
)
def test_stop_ends_within_a_step(column, catalog):
    with catalog.borrow(column.model, "float32") as pipe:
        calls = Calls(pipe.unet)
    states = final(ask(replace(column, num_inference_steps=100)), catalog, stop=lambda: len(calls) >= 5)
    calls.handle.remove()
    (state,) = states
    assert len(calls) == 5  # not one more
    assert state.status == "stopped" and state.error is None and state.step == 4
    assert len(state.images) == 2 and state.frames[-1] == state.images and state.frame_steps[-1] == 4
    assert 0 < state.seconds < 30 and state.images_per_second is None


def test_stop_after_a_step_runs_no_network_again():
    pipe, steps, ran = classifier_guided(), [], []
    for network in (pipe.unet, pipe.classifier):
        network.register_forward_hook(lambda network, args, output: ran.append(type(network).__name__))
    own = quiet(new_pipeline(pipe, DDIMScheduler(clip_sample=False)))
    Observation(own, num_images=3, stop=lambda: len(steps) == 3, changed=lambda: steps.append(1))
    with pytest.raises(Stopped):
        own(**GUIDED, num_inference_steps=8, generator=sources())
    assert ran == ["ADMUNet2DModel", "ADMClassifierModel"] * 3


def test_closing_the_comparison_stops_it(catalog):
    with catalog.borrow("film-mnist", "float32") as pipe:
        calls = Calls(pipe.unet)
    states = compare(ask(replace(FILM, num_inference_steps=200)), catalog)
    while not calls:
        next(states)
    states.close()
    wait_for_columns()
    assert len(calls) < 100
    calls.handle.remove()


def wait_for_columns():
    for thread in threading.enumerate():
        if thread.name.startswith("column"):
            thread.join(timeout=30)
            assert not thread.is_alive()


def test_stop_ends_those_who_wait(catalog, monkeypatch):
    slots = {"cpu": threading.BoundedSemaphore(1)}
    slots["cpu"].acquire()
    monkeypatch.setattr(comparison_module, "_slots", slots)
    begin = time.monotonic()
    stop = threading.Event()
    states = compare(ask(FILM, DIT), catalog, stop=stop.is_set)
    while {state.status for state in next(states)} != {"waiting"} or time.monotonic() - begin < 0.5:
        assert time.monotonic() - begin < 30
    stop.set()
    begin = time.monotonic()
    *_, last = states
    assert time.monotonic() - begin < 3
    assert [state.status for state in last] == ["stopped"] * 2 and not any(state.images for state in last)
    wait_for_columns()
    slots["cpu"].release()
    monkeypatch.undo()
    pixels(final(ask(FILM), catalog)[0])  # nobody holds a slot


def test_comparisons_at_once_do_not_mix(catalog, judge):
    wanted = [
        ask(*columns, seed=seed, class_labels=labels, num_images=1 + seed % 3)
        for seed, (columns, labels) in enumerate(
            [
                ((FILM, DIT), ("one",)),
                ((ADM, FILM), ("two", "four")),
                ((DILATED, ADM), ("seven",)),
                ((replace(FILM, guidance_scale=4.0), replace(FILM, eta=1.0)), ("nine", "zero", "8")),
                ((replace(DIT, guidance="none"), replace(DIT, scheduler="EulerAncestralDiscreteScheduler")), ("six",)),
                ((replace(ADM, scheduler="DDPMScheduler", guidance="classifier-mean"), FILM), ("five",)),
            ]
        )
    ]
    alone = [final(comparison, catalog, judge=judge) for comparison in wanted]
    found = [None] * len(wanted)

    def draw(i):
        found[i] = final(wanted[i], catalog, judge=judge)

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = {"seconds": 0.0, "images_per_second": None}
    for together, single in zip(found, alone, strict=True):
        assert all(state.status == "done" for state in single)
        assert [replace(state, **times) for state in together] == [replace(state, **times) for state in single]
    assert len({str(pixels(states[0])) for states in found}) == len(wanted)


def test_a_run_that_has_ended_holds_no_network(own_catalog):
    with own_catalog.borrow("film-mnist", "float32") as pipe:
        network = weakref.ref(next(pipe.unet.parameters()))
    del pipe
    gc.collect()
    gc.disable()  # cycles would hold it until there is time to look for them
    try:
        states = compare(ask(FILM, replace(FILM, num_inference_steps=100)), own_catalog)
        while next(states)[0].status != "done":
            pass
        states.close()
        wait_for_columns()
        assert network() is not None
        own_catalog.__init__({})
        assert network() is None
    finally:
        gc.enable()


def test_latents_through_the_catalog(tmp_path):
    unet = composable(in_channels=4, out_channels=4)
    scheduler = DDIMScheduler(clip_sample=False)
    ClassConditionalPipeline(unet=unet, vae=decoder(), scheduler=scheduler).save_pretrained(tmp_path / "latents")
    catalog = Catalog({"latents": tmp_path / "latents"})
    column = Column("latents", "DDIMScheduler", 5, "classifier-free", 2.0)
    comparison = ask(column, class_labels=("1", "2"))
    (state,) = final(comparison, catalog)
    assert pixels(state) == drawn_alone(comparison, 0, catalog)
    assert {image.size for frame in state.frames for image in frame} == {(16, 16)}
    assert len(state.frames) == 5 and state.labels == ["1", "2"]


def test_pipelines_of_diffusers_through_the_catalog(tmp_path):
    DDPMPipeline(unet_of_diffusers(), DDPMScheduler()).save_pretrained(tmp_path / "theirs")
    catalog = Catalog({"theirs": tmp_path / "theirs"})
    comparison = ask(Column("theirs", "DPMSolverMultistepScheduler", 5), Column("theirs", "DDPMScheduler", 5))
    for index, state in enumerate(final(comparison, catalog)):
        assert pixels(state) == drawn_alone(comparison, index, catalog)
        assert state.network_evaluations == 5 and len(state.frames) == 5 and state.labels == [None, None]


@pytest.mark.parametrize(
    "error, expected",
    [
        (SettingsError("`model` is a/b."), "`model` is a/b."),
        (OSError("no file:///usr/lib/python3.11/x.py"), "OSError: no x.py"),
        (OSError("'/srv/models/a-b/c.d/' is gone"), "OSError: 'c.d' is gone"),
        (OSError("https://example.com/a/b, me/model, 3/4"), "OSError: https://example.com/a/b, me/model, 3/4"),
        (ValueError("token hf_" + "a" * 34), "ValueError: token ***"),
        (ValueError("x" * 10_000), "ValueError: " + "x" * 585 + "..."),
    ],
)
def test_messages_hide_the_machine(error, expected):
    assert message(error) == expected


# Sweeps


def test_sweep_draws_what_comparisons_draw(catalog):
    comparison = ask(DILATED, FILM)
    *progress, (share, picture) = sweep(comparison, 1, catalog, [1.0, 4.0], [2, 3])
    assert share == 1.0 and all(image is None for _, image in progress)
    assert [round(share, 3) for share, _ in progress] == [0.0, 0.2, 0.5, 0.7]
    array = np.asarray(picture)
    for scale, steps in itertools.product([1.0, 4.0], [2, 3]):
        cell = replace(comparison, columns=(replace(FILM, guidance_scale=scale, num_inference_steps=steps),))
        (state,) = final(cell, catalog)
        assert occurs(np.asarray(contact_sheet(state.images, 80)), array)


def occurs(small, large):
    windows = np.lib.stride_tricks.sliding_window_view(large[..., 0], (small.shape[0], 3))
    candidates = np.argwhere((windows == small[:, :3, 0]).all(axis=(2, 3)))
    return any((large[y : y + small.shape[0], x : x + small.shape[1]] == small).all() for y, x in candidates)


@pytest.mark.parametrize(
    "index, scales, steps, found",
    [
        (2, [1.0], [2], "`column` is 2"),
        (-1, [1.0], [2], "`column` is -1"),
        (True, [1.0], [2], "`column`"),
        (0, [1.0], [2], "not guided"),
        (1, [], [2], "guidance_scales"),
        (1, "1", [2], "guidance_scales"),
        (1, [1.0] * 7, [2] * 6, "42 cells"),
        (1, [1.0] * 10**6, [2], "guidance_scales"),
        (1, [float("nan")], [2], "guidance_scale"),
        (1, [21], [2], "guidance_scale"),
        (1, [1.0], [2.5], "num_inference_steps"),
        (1, [1.0], ["2"], "num_inference_steps"),
        (1, [1.0], [10**9], "num_inference_steps"),
        (1, [1.0, 2.0, 3.0], [250] * 12, "image steps"),
    ],
)
def test_sweeps_are_bounded(index, scales, steps, found, catalog):
    with pytest.raises(SettingsError, match=found) as error:
        next(sweep(ask(DILATED, FILM), index, catalog, scales, steps))
    assert len(str(error.value)) < 400


def test_sweep_stops_within_a_step(catalog):
    with catalog.borrow("film-mnist", "float32") as pipe:
        calls = Calls(pipe.unet)
    with pytest.raises(Stopped):
        list(sweep(ask(FILM), 0, catalog, [1.0, 2.0], [3, 3], stop=lambda: len(calls) >= 4))
    calls.handle.remove()
    assert len(calls) == 4


def test_sweep_stops_while_it_waits_for_a_place(root):
    catalog = Catalog({name: root / "model_cards" / name for name in ("film-mnist", "dilated-mnist")}, capacity=1)
    asked = []
    with catalog.borrow("dilated-mnist", "float32"), pytest.raises(Stopped):
        list(sweep(ask(FILM), 0, catalog, [1.0], [2], stop=lambda: asked.append(1) or len(asked) > 3))


# Pictures


def grey(*rows):
    return Image.fromarray(np.array(rows, dtype=np.uint8))


def test_sweep_of_large_images_stays_of_a_size_to_be_sent():
    large = Image.new("RGB", (1024, 1024), "#123456")
    picture = sweep_picture([[[large] * 12] * 6] * 6, [1.0] * 6, [10] * 6)
    assert max(picture.size) < 3000 and len(picture.getcolors(10**6)) > 1


def test_enlarged_images_are_crisp():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8))
    large = enlarge(image, 320)
    assert large.size == (308, 308)
    assert np.array_equal(np.asarray(large), np.asarray(image).repeat(11, axis=0).repeat(11, axis=1))
    assert enlarge(image, 10).size == (28, 28)


def test_difference():
    picture, roots = difference([grey([0, 255], [100, 0])], [grey([255, 0], [100, 51])])
    assert roots == [pytest.approx(math.sqrt((1 + 1 + 0 + 0.04) / 4))]
    array = np.asarray(picture)
    assert array.shape == (2, 2, 3)
    assert array[0, 0].tolist() == [255, 150, 50] and array[0, 1].tolist() == [80, 170, 255]
    assert array[1, 0].tolist() == [0, 0, 0] and array[1, 1].tolist() == [102, 60, 20]


def test_difference_of_a_margin():
    small, large = Image.new("L", (28, 28), 255), Image.new("L", (32, 32), 255)
    picture, roots = difference([small], [large])
    assert picture.size == (32, 32) and roots == [pytest.approx(math.sqrt((32**2 - 28**2) / 32**2))]
    inner = np.asarray(picture)[2:-2, 2:-2]
    assert not inner.any()


@pytest.mark.parametrize(
    "first, second, found",
    [
        ([], [], "0 images"),
        ([Image.new("L", (8, 8))], [], "1 images in one column and 0"),
        ([Image.new("L", (8, 8))], [Image.new("RGB", (16, 16))], "8x8 and 16x16"),
        ([Image.new("L", (32, 28))], [Image.new("L", (28, 64))], "32x28 and 28x64"),
    ],
)
def test_what_cannot_be_compared(first, second, found):
    with pytest.raises(SettingsError, match=found):
        difference(first, second)


# The judge


def test_judge_reads_digits_that_were_drawn(catalog, judge):
    column = replace(FILM, num_inference_steps=20)
    (state,) = final(ask(column, class_labels=DIGITS, num_images=10), catalog, judge=judge)
    right = [verdict[0] == label for verdict, label in zip(state.verdicts, state.labels, strict=True)]
    assert sum(right) >= 8
    assert all(0.2 < probability <= 1 for _, probability in state.verdicts)


def test_judge_gives_small_images_a_margin(judge):
    images = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 3 - 1.5
    padded = torch.full((2, 1, 32, 32), -1.0)
    padded[:, :, 2:-2, 2:-2] = images.clamp(-1, 1)
    with torch.no_grad():
        expected = judge.network(padded, torch.zeros(2)).logits.softmax(dim=1)
    torch.testing.assert_close(judge.probabilities(images), expected)


@pytest.mark.parametrize(
    "changes, reads",
    [
        ({}, True),
        ({"labels": tuple("0123456789")}, True),
        ({"labels": tuple("abcdefghij")}, False),
        ({"labels": ()}, True),
        ({"labels": (), "name": "me/fashion-mnist"}, False),
        ({"labels": (), "name": "me/emnist"}, False),
        ({"labels": (), "name": "faces"}, False),
        ({"channels": 3}, False),
        ({"height": 64}, False),
    ],
)
def test_judge_reads_digits_only(changes, reads, catalog, judge):
    assert judge.reads(replace(catalog.describe("film-mnist"), **changes)) is reads


def test_judge_of_something_else_is_refused(tmp_path):
    small_classifier().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="4 classes and 3 channels"):
        Judge(tmp_path)
