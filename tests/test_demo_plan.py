"""From settings of the demo to the call of a pipeline: every guidance, the noise, and what does not fit a model."""

from dataclasses import replace

import pytest
import torch
from catalog import Description
from plan import Plan, complete, generators, initial_noise, plan, wanted_labels
from settings import Column, Comparison, SettingsError


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FREE = Description(
    name="free",
    source="model_cards/free",
    pipeline="ClassConditionalPipeline",
    wrapped=False,
    network="ComposableUNet2DModel",
    parameters=1,
    channels=1,
    height=32,
    width=32,
    latent=False,
    labels=DIGITS,
    takes_prompt=False,
    resizable=False,
    guidance={"none": 1.0, "classifier-free": 2.0, "adaptive-projected": 2.0},
    schedulers=("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"),
    default_scheduler="DPMSolverMultistepScheduler",
    eta_schedulers=("DDIMScheduler",),
    dtypes=("float32",),
    scheduler_options={"DPMSolverMultistepScheduler": {"thresholding": True}},
)
CLASSIFIER = replace(
    FREE, pipeline="ClassifierGuidedPipeline", guidance={"none": 0.0, "classifier": 6.0, "classifier-mean": 6.0}
)
UNCONDITIONAL = replace(FREE, height=28, width=28, labels=(), guidance={"none": 1.0})
TEXT = replace(
    FREE,
    pipeline="StableDiffusionPipeline",
    channels=3,
    height=512,
    width=512,
    latent=True,
    labels=(),
    takes_prompt=True,
    resizable=True,
    guidance={"none": 1.0, "classifier-free": 7.5},
)


def planned(description: Description, column: Column | None = None, **shared: object) -> Plan:
    return plan(Comparison(columns=(column or Column(),), **shared), 0, description)


CALLS = {
    "any class": (FREE, Column(), {}, {"guidance_scale": 1.0}),
    "one class": (FREE, Column(), {"class_labels": ("3",)}, {"class_labels": [3, 3], "guidance_scale": 1.0}),
    "classes in turn": (
        FREE,
        Column(guidance="classifier-free", guidance_scale=2),
        {"class_labels": ("nine", "0", "one")},
        {"class_labels": [9, 0], "guidance_scale": 2.0},
    ),
    "interval": (
        FREE,
        Column(guidance="classifier-free", guidance_interval=(0, 0.5)),
        {"class_labels": ("one",)},
        {"class_labels": [1, 1], "guidance_scale": 1.0, "guidance_interval": (0.0, 0.5)},
    ),
    "no guidance in an interval": (FREE, Column(guidance_interval=(0, 0.5)), {}, {"guidance_scale": 1.0}),
    "guider": (
        FREE,
        Column(guidance="adaptive-projected", guidance_scale=3.0),
        {"class_labels": ("one",)},
        {"class_labels": [1, 1]},
    ),
    "eta": (FREE, Column(scheduler="DDIMScheduler", eta=1), {}, {"guidance_scale": 1.0, "eta": 1.0}),
    "classifier off": (
        CLASSIFIER,
        Column(),
        {"class_labels": ("two",)},
        {"class_labels": [2, 2], "guidance_scale": 0.0},
    ),
    "classifier": (
        CLASSIFIER,
        Column(guidance="classifier", guidance_scale=6.0),
        {"class_labels": ("two",)},
        {"class_labels": [2, 2], "guidance_scale": 6.0},
    ),
    "mean shift": (
        CLASSIFIER,
        Column(scheduler="DDPMScheduler", guidance="classifier-mean", guidance_scale=6.0),
        {"class_labels": ("two",)},
        {"class_labels": [2, 2], "guidance_scale": 6.0, "guidance_mode": "mean"},
    ),
    "classes and prompts pass by": (UNCONDITIONAL, Column(), {"class_labels": ("cat",), "prompt": "a cat"}, {}),
    "own size asked for": (FREE, Column(), {"height": 32, "width": 32}, {"guidance_scale": 1.0}),
    "text": (
        TEXT,
        Column(guidance="classifier-free", guidance_scale=7.5),
        {"prompt": "a cat", "negative_prompt": "a dog", "height": 256, "width": 512, "class_labels": ("three",)},
        {
            "prompt": "a cat",
            "negative_prompt": "a dog",
            "num_images_per_prompt": 2,
            "height": 256,
            "width": 512,
            "guidance_scale": 7.5,
        },
    ),
    "no text": (TEXT, Column(), {}, {"prompt": "", "num_images_per_prompt": 2, "guidance_scale": 1.0}),
}


@pytest.mark.parametrize(("description", "column", "shared", "call"), CALLS.values(), ids=CALLS)
def test_calls(description, column, shared, call):
    assert planned(description, column, num_images=2, **shared).call == {"num_inference_steps": 20, **call}


def test_schedulers_bring_their_options():
    assert planned(FREE) == Plan("DPMSolverMultistepScheduler", {"thresholding": True}, None, planned(FREE).call)
    assert planned(FREE, Column(scheduler="DDIMScheduler")).scheduler_options == {}


def test_guider_has_the_scale():
    column = Column(guidance="adaptive-projected", guidance_scale=3.0)
    name, options = planned(FREE, column, class_labels=("one",)).guider
    assert name == "AdaptiveProjectedGuidance" and options["guidance_scale"] == 3.0


MISFITS = {
    "scheduler": (FREE, Column(scheduler="FlowMatchEulerDiscreteScheduler"), {}, "`scheduler`.*DDIMScheduler"),
    "precision": (FREE, Column(dtype="float16"), {}, "`dtype` float16.*float32"),
    "guidance": (FREE, Column(guidance="classifier"), {"class_labels": ("one",)}, "`guidance` classifier.*adaptive"),
    "guided to nothing": (FREE, Column(guidance="classifier-free"), {}, "needs a class.*Choose classes"),
    "mean of an ODE solver": (
        CLASSIFIER,
        Column(guidance="classifier-mean"),
        {"class_labels": ("one",)},
        "classifier-mean.*DPMSolverMultistepScheduler.*DDPMScheduler",
    ),
    "eta": (FREE, Column(eta=0.5), {}, "`eta` is 0.5.*DPMSolverMultistepScheduler.*DDIMScheduler has.*to 0"),
    "unknown class": (FREE, Column(), {"class_labels": ("cat",)}, "`class_labels` holds 'cat'.*three.*0 to 9"),
    "unknown id": (FREE, Column(), {"class_labels": ("10",)}, "`class_labels` holds '10'.*0 to 9"),
    "negative id": (FREE, Column(), {"class_labels": ("-1",)}, "`class_labels` holds '-1'"),
    "unicode digit": (FREE, Column(), {"class_labels": ("\uff13",)}, "`class_labels` holds '.uff13'"),
    "size": (FREE, Column(), {"height": 64, "width": 64}, "64 and 64.*32 x 32 pixels only"),
    "much larger than the model's own": (
        replace(FREE, resizable=True),
        Column(),
        {"height": 32, "width": 136},
        "32 and 136.*32 x 32 pixels by itself.*4 times",
    ),
    "large, and many": (
        replace(FREE, resizable=True),
        Column(num_inference_steps=250),
        {"height": 128, "width": 128},
        "4 images of 128 x 128.*16000 image steps.*at most 12000",
    ),
    "interval": (
        TEXT,
        Column(guidance="classifier-free", guidance_interval=(0.0, 0.5)),
        {},
        "`guidance_interval`.*StableDiffusionPipeline does not have",
    ),
    "negative prompt": (
        replace(TEXT, pipeline="LatentConsistencyModelPipeline"),
        Column(),
        {"negative_prompt": "a dog"},
        "LatentConsistencyModelPipeline has no `negative_prompt`",
    ),
}


@pytest.mark.parametrize(("description", "column", "shared", "message"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_the_model_is_refused_with_the_column_s_letter(description, column, shared, message):
    comparison = Comparison(columns=(Column(), Column(), column), **shared)
    with pytest.raises(SettingsError, match=f"^Column C: .*{message}"):
        plan(comparison, 2, description)


def test_names_of_classes_with_several_words():
    birds = replace(FREE, labels=("crane, bird", "crane, machine", "owl"))
    comparison = Comparison(columns=(Column(),), class_labels=("bird", "crane, machine", "2"), num_images=4)
    assert wanted_labels(comparison, birds) == ["crane, bird", "crane, machine", "owl", "crane, bird"]
    with pytest.raises(SettingsError, match="'crane'"):  # which one?
        planned(birds, class_labels=("crane",))
    assert wanted_labels(comparison, UNCONDITIONAL) == [None] * 4


def test_complete_names_the_schedulers():
    comparison = Comparison(columns=(Column(), Column(scheduler="DDPMScheduler")))
    schedulers = [column.scheduler for column in complete(comparison, [FREE, FREE]).columns]
    assert schedulers == ["DPMSolverMultistepScheduler", "DDPMScheduler"]


def test_every_image_has_a_seed_of_its_own():
    comparison, later = (Comparison(columns=(Column(),), num_images=3, seed=seed) for seed in (5, 6))
    draws, later_draws = ([torch.randn(4, generator=g) for g in generators(x)] for x in (comparison, later))
    assert all(torch.equal(a, b) for a, b in zip(draws[1:], later_draws[:2], strict=True))
    assert not torch.equal(draws[0], draws[1])


def test_smaller_models_see_the_middle_of_the_same_noise():
    comparison = Comparison(columns=(Column(),), num_images=2)
    full = torch.cat([torch.randn(1, 1, 32, 32, generator=generator) for generator in generators(comparison)])
    noise = initial_noise(comparison, UNCONDITIONAL, generators(comparison))
    assert noise.shape == (2, 1, 28, 28) and torch.equal(noise, full[:, :, 2:30, 2:30])
    tall = replace(comparison, height=40, width=64)
    noise = initial_noise(tall, replace(FREE, resizable=True), generators(tall))
    full = torch.cat([torch.randn(1, 1, 64, 64, generator=generator) for generator in generators(tall)])
    assert torch.equal(noise, full[:, :, 12:52])


@pytest.mark.parametrize(
    "description", [FREE, TEXT, replace(UNCONDITIONAL, latent=True)], ids=["32", "text", "latent"]
)
def test_other_models_draw_their_noise_themselves(description):
    comparison = Comparison(columns=(Column(),))
    assert initial_noise(comparison, description, generators(comparison)) is None
