"""Trajectories of the original samplers, replayed by the pipelines with diffusers' own schedulers.

Recorded are the start, the noise of every step and the result of every step (of some, for 1000 steps), so a step that
differs is named. `gd_traj_ddim_reverse10` is left out: it inverts DDIM, evaluating the network at the end of each step
that is nearer the image, whereas diffusers' `DDIMInverseScheduler` evaluates it at the other end.
"""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from diffusers import DDIMScheduler, DDPMScheduler

from diffusers_ext.conversion import load_original
from diffusers_ext.pipelines import ClassConditionalPipeline, ClassifierGuidedPipeline


TRAJECTORIES = {
    "gd_traj_p_cosine10_cond": {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"},
    "gd_traj_p_fixedlarge10": {"variance_type": "fixed_large"},
    "gd_traj_p_fixedsmall10": {"variance_type": "fixed_small"},
    "gd_traj_p_full1000": {},
    "gd_traj_p_full40_cosine": {"num_train_timesteps": 40, "beta_schedule": "squaredcos_cap_v2"},
    "gd_traj_p_linear10": {},
    "gd_traj_p_linear10_guided1": {},
    "gd_traj_p_linear10_guided4": {},
    "gd_traj_p_linear10_uncond_guided10": {},
    "gd_traj_p_linear10_y": {},
    "gd_traj_p_noclip10": {"clip_sample": False},
    "gd_traj_p_predict_xstart10": {"variance_type": "fixed_small", "prediction_type": "sample"},
    "gd_traj_p_rescaled4000": {"num_train_timesteps": 4000, "beta_schedule": "squaredcos_cap_v2"},
    "gd_traj_p_superres5": {},
    "gd_traj_ddim10_cosine_eta05": {"beta_schedule": "squaredcos_cap_v2"},
    "gd_traj_ddim10_linear": {},
    "gd_traj_ddim10_linear_guided1": {},
    "gd_traj_ddim10_linear_guided4": {},
}


DIT_TRAJECTORIES = {
    "dit_traj_p": DDPMScheduler(timestep_spacing="linspace", variance_type="learned_range", clip_sample=False),
    "dit_traj_ddim": DDIMScheduler(timestep_spacing="leading", clip_sample=False),
}


def load_model(fixtures: Path, name: str, architecture: str, **flags):
    config = json.loads((fixtures / f"{name}.json").read_text())["config"]
    weights = load_file(fixtures / f"{name}.weights.safetensors")
    return load_original({k: v.float() for k, v in weights.items()}, architecture, config=config | flags).eval()


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_every_step_is_that_of_the_original(shared, name):
    fixtures = shared / "fixtures"
    info = json.loads((fixtures / f"{name}.json").read_text())
    recorded = load_file(fixtures / f"{name}.io.safetensors")
    diffusion = info["diffusion"]

    rescaled = {"rescale_timesteps": True, "diffusion_steps": diffusion["steps"]}
    flags = rescaled if diffusion.get("rescale_timesteps") else {}
    unet = load_model(fixtures, info["model"], "guided-diffusion/unet", **flags)
    classifier = info["classifier"] and load_model(fixtures, info["classifier"], "guided-diffusion/classifier")
    if "ddim" in name:
        scheduler = DDIMScheduler(timestep_spacing="leading", **TRAJECTORIES[name])
    else:
        options = {"timestep_spacing": "linspace", "variance_type": "learned_range"} | TRAJECTORIES[name]
        scheduler = DDPMScheduler(**options)
    pipe = ClassifierGuidedPipeline(unet=unet, scheduler=scheduler, classifier=classifier)
    check_steps(
        pipe,
        recorded,
        info["timestep_map"],
        info["stored_steps"],
        class_labels=recorded.get("y"),
        guidance_scale=info["classifier_scale"] or 0.0,
        guidance_mode="score" if "ddim" in name else "mean",
        low_res=recorded.get("low_res"),
        eta=info["eta"] or 0.0,
    )


@pytest.mark.parametrize("name", DIT_TRAJECTORIES)
def test_every_step_is_that_of_dit(shared, name):
    fixtures = shared / "fixtures"
    info = json.loads((fixtures / f"{name}.json").read_text())
    recorded = load_file(fixtures / f"{name}.io.safetensors")
    count = len(recorded["y"]) // 2  # the other half is for the null class; of its noise nothing is seen
    labels = recorded.pop("y")[:count]
    recorded = {key: value[..., :count, :, :, :] for key, value in recorded.items()}
    transformer = load_model(fixtures, info["model"], "dit")
    pipe = ClassConditionalPipeline(transformer=transformer, scheduler=DIT_TRAJECTORIES[name])
    check_steps(
        pipe,
        recorded,
        info["timestep_map"],
        range(len(recorded["samples"])),
        class_labels=labels,
        guidance_scale=info["cfg_scale"],
        guided_channels=3,
    )


def check_steps(pipe, recorded, timestep_map, stored_steps, **arguments):
    """Replays a recorded run, and compares the result of every recorded step."""
    pipe.set_progress_bar_config(disable=True)
    steps = {}

    def record(pipe, i, t, tensors):
        steps[i] = (t.item(), tensors["latents"])
        return tensors

    noise = iter(recorded.get("noise", torch.empty(0)).float())
    with mock.patch(f"{type(pipe.scheduler).__module__}.randn_tensor", lambda *args, **kwargs: next(noise)):
        images = pipe(
            num_inference_steps=len(timestep_map),
            sample=recorded["x_T"],
            output_type="latent",
            callback_on_step_end=record,
            **arguments,
        ).images

    assert [t for t, _ in steps.values()] == timestep_map[::-1]
    for i, expected in zip(stored_steps, recorded["samples"], strict=True):
        deviation = (steps[i][1] - expected).abs().max() / expected.abs().max()
        assert deviation < 1e-4, f"step {i}"
    assert torch.equal(images, steps[len(timestep_map) - 1][1])
