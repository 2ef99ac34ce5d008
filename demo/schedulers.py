"""Which schedulers of diffusers work with a model: tried without its network, not listed by hand.

A network was trained to see a certain noise at every timestep, and to predict one quantity. A scheduler works with it
if it shows the network that noise at that timestep, all along a run, and takes that quantity. Otherwise images come
out blurred or grainy, without any error: `DDPMWuerstchenScheduler` has its own noise, whatever it is configured from.
"""

import bisect
import functools
import inspect
import json
import math
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

import torch

import diffusers
from diffusers import DiffusionPipeline, SchedulerMixin

from diffusers_ext.evaluation.drawing import path_options
from diffusers_ext.guidance import check_scheduler, noise_level_rule, prediction_type
from diffusers_ext.sampling import check_channels, prepare_sample, prepare_timesteps, step_rule, takes_variance


TRIALS = (2, 20)  # steps
PATH_STEPS = 500  # of the run that tells which noise belongs to which timestep
TOLERANCE = 0.01  # of the range of timesteps; those that work stay below 0.001, the others come above 0.1

# Options without which a class does not follow what the model was trained on, draws no image a second time, or fails
# with few steps. A model's own scheduler may have set them.
NEUTRAL_OPTIONS = {
    "snr_shift_scale": 1.0,  # of CogVideoX, whose default is another noise schedule
    "skip_prk_steps": True,  # of PNDM, whose warm-up needs four steps and calls the network four times in each
    "noise_sampler_seed": 0,  # of DPM-Solver SDE, whose noise comes from no generator
}

Point = tuple[float, float]  # timestep, and the noise there as the angle atan2(sigma, alpha)


@functools.cache
def scheduler_classes() -> dict[str, type[SchedulerMixin]]:
    """All schedulers of diffusers whose packages are installed, by name."""
    found = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")}
    return {name: x for name, x in sorted(found.items()) if isinstance(x, type) and issubclass(x, SchedulerMixin)}


def working_schedulers(
    pipe: DiffusionPipeline, candidates: Mapping[str, type[SchedulerMixin]]
) -> dict[str, dict[str, Any]]:
    """Those that work with the network of a pipeline: by class name, the options that `from_config` is to have besides
    the config of the pipeline's own scheduler.

    Args:
        pipe: with its own scheduler. Of its networks the configs are read, nothing else.
        candidates: schedulers by class name.
    """
    components = pipe.components
    name = "transformer" if components.get("unet") is None else "unet"
    own_config = pipe.scheduler.to_json_string()
    working = {}
    for class_name, scheduler_class in candidates.items():
        try:
            options = _options(pipe.scheduler, scheduler_class, draws_latents=components.get("vae") is not None)
            scheduler = _tried(type(pipe.scheduler), own_config, scheduler_class, json.dumps(options))
            check_scheduler(scheduler, components[name].config.get("sigma_data"))
            check_channels(name, components[name], scheduler)
        except Exception:  # of any kind: a run of the model would meet it too
            continue
        working[class_name] = options
    return working


def takes_eta(scheduler_class: type[SchedulerMixin]) -> bool:
    """Whether `step` has the argument `eta`."""
    return "eta" in inspect.signature(scheduler_class.step).parameters


def _options(own: SchedulerMixin, wanted: type[SchedulerMixin], draws_latents: bool) -> dict[str, Any]:
    """Options of `from_config` for a scheduler class in place of a model's own.

    Raises:
        ValueError: where one follows a diffusion process and the other a flow.
    """
    known = inspect.signature(wanted.__init__).parameters
    options = {name: value for name, value in NEUTRAL_OPTIONS.items() if name in known and not own.config.get(name)}
    if own.config.get("clip_sample") and not draws_latents and "thresholding" in known and "clip_sample" not in known:
        # A threshold that may not exceed the range is clipping, without which the background stays grainy.
        options |= {"thresholding": True, "sample_max_value": own.config.get("clip_sample_range", 1.0)}
    return options | path_options(own, wanted, wanted.__name__)


@functools.lru_cache(maxsize=512)
def _tried(
    own_class: type[SchedulerMixin], own_config: str, wanted: type[SchedulerMixin], options: str
) -> SchedulerMixin:
    """A scheduler that follows the path of another. Config and options are JSON.

    Raises:
        ValueError: where it does not; and what else schedulers raise.
    """
    scheduler = wanted.from_config(json.loads(own_config), **json.loads(options))
    own = own_class.from_config(json.loads(own_config))
    if prediction_type(scheduler) != prediction_type(own):
        raise ValueError(f"{wanted.__name__} takes another prediction than {own_class.__name__}.")
    path = _path(own_class, own_config)
    for steps in TRIALS:
        if _deviation(_run(scheduler, steps), path) > TOLERANCE:
            raise ValueError(f"{wanted.__name__} shows the network other noise than {own_class.__name__}.")
    return scheduler


@functools.lru_cache(maxsize=64)
def _path(scheduler_class: type[SchedulerMixin], config: str) -> list[Point]:
    scheduler = scheduler_class.from_config(json.loads(config))
    return _trial(scheduler, min(PATH_STEPS, scheduler.config.get("num_train_timesteps", PATH_STEPS)))[0]


def _run(scheduler: SchedulerMixin, num_inference_steps: int) -> list[Point]:
    """What a network would see in a run, if it predicted zero.

    Raises:
        ValueError: where the images do not stay finite, and where another run with an equal generator differs.
    """
    points, image = _trial(scheduler, num_inference_steps)
    if not image.isfinite().all() or not torch.equal(image, _trial(scheduler, num_inference_steps)[1]):
        raise ValueError(f"`scheduler` {type(scheduler).__name__} draws no image that can be drawn again.")
    return points


def _trial(scheduler: SchedulerMixin, num_inference_steps: int) -> tuple[list[Point], torch.Tensor]:
    device, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    timesteps, values = prepare_timesteps(scheduler, num_inference_steps, 1, device)
    level, step = noise_level_rule(scheduler), step_rule(scheduler, values, generator, eta=0.0)
    image = prepare_sample(None, (1, 1, 2, 2), scheduler, generator, device)
    prediction = torch.zeros(1, 2 if takes_variance(scheduler) else 1, 2, 2)
    points = []
    for i, t in enumerate(timesteps):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(image, t)  # some find their place in the run by it
        alpha, sigma = level(values[i], i)
        points.append((values[i], math.atan2(sigma, alpha)))
        image = step(i, t, image, prediction)
    return points, image


def _deviation(points: list[Point], path: list[Point]) -> float:
    """Largest distance between a timestep and the one at which `path` has as much noise, relative to the range."""
    path = sorted(path, key=itemgetter(1))
    times, angles = zip(*path, strict=True)

    def time_of(angle: float) -> float:
        k = min(max(bisect.bisect_left(angles, angle), 1), len(path) - 1)
        share = (angle - angles[k - 1]) / ((angles[k] - angles[k - 1]) or 1.0)
        return times[k - 1] + min(max(share, 0.0), 1.0) * (times[k] - times[k - 1])

    return max(abs(t - time_of(angle)) for t, angle in points) / (max(times) - min(times))
