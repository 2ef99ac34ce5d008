"""Watches a run of a pipeline, and changes nothing that it draws: previews, probabilities, guidance, work done.

What the scheduler's `step` is given says everything: the sample x = a x_0 + b eps and a prediction hold the predicted
clean image x_0. So this works for every pipeline, with callbacks or without.

Shapes: B images, C channels, H and W pixels; of latents where the model draws those.
"""

import copy
import functools
import inspect
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from catalog import Stopped
from judge import Judge
from pictures import reduced
from PIL.Image import Image
from torch import nn

from diffusers import DDPMScheduler, DiffusionPipeline, SchedulerMixin

from diffusers_ext.guidance import (
    HALF_PRECISION_SCALE,
    clip_abar,
    noise_level_rule,
    noise_table,
    prediction_gain,
    prediction_type,
    timestep_of_abar,
    x0_gain,
)
from diffusers_ext.sampling import PipelineMixin


MAX_FRAMES = 12  # of the film strip
MAX_FRAME = 128  # pixels of its images, since a session keeps them all
MAX_POINTS = 50  # of the plot of probabilities: reading an image costs about as much as a step of a small model
logger = logging.getLogger(__name__)
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def clean_image(
    kind: str,
    sample: torch.Tensor,
    prediction: torch.Tensor,
    alpha: float,
    sigma: float,
    sigma_data: float | None = None,
) -> torch.Tensor:
    """The clean image x_0 that a network's prediction means, neither clipped nor rounded.

    Args:
        kind: `diffusers_ext.guidance.prediction_type` of the scheduler.
        sample: of the scheduler, x = alpha x_0 + sigma eps.
        prediction: of the network, of the same shape.
        alpha, sigma: noise level of `sample`.
        sigma_data: of networks with the preconditioning of EDM.
    """
    squared = alpha**2 + sigma**2
    at_zero = {  # what the network would predict for x_0 = 0; predictions are linear in x_0 at fixed x
        "sample": 0.0,
        "epsilon": 1 / sigma,
        "v_prediction": alpha / (sigma * math.sqrt(squared)),
        "flow_prediction": 1 / sigma,
        "reversed_flow_prediction": -1 / sigma,
    }
    gain = prediction_gain(kind, alpha, sigma, sigma_data)
    if kind.startswith("edm_"):  # x_0 = c_skip x + c_out F, Karras et al. (2022), Table 1
        return sigma_data**2 / (sigma**2 + sigma_data**2) * sample + prediction / gain
    return (prediction - at_zero[kind] * sample) / gain


def rms(x: torch.Tensor) -> torch.Tensor:
    """Root mean square of each image, `(B, ...)` -> `(B,)`."""
    return x.float().flatten(1).square().mean(dim=1).sqrt()


class Observation:
    """What is seen of one run. The thread that draws writes it, others may read it meanwhile.

    Args:
        pipe: pipeline of this run alone, as `catalog.new_pipeline` makes it. Its scheduler and networks are replaced
            by watched ones, which share all weights with those of other runs.
        num_images: B.
        guidance: kind of guidance, one of `settings.GUIDANCE`.
        class_ids: wanted classes `(B,)`. None: any, and no probabilities.
        size: height and width of the images.
        latent: whether the model draws latents.
        judge: reads predicted clean images. None: nobody does.
        stop: asked before every network call and every step.
        changed: called after every step.
        previews: False to count work and to stop only.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        num_images: int,
        guidance: str = "none",
        class_ids: Sequence[int] | None = None,
        size: tuple[int, int] = (0, 0),
        latent: bool = False,
        judge: Judge | None = None,
        stop: Callable[[], bool] = lambda: False,
        changed: Callable[[], None] = lambda: None,
        previews: bool = True,
    ):
        self.pipe, self._image_processor, self.num_images = pipe, getattr(pipe, "image_processor", None), num_images
        self.guidance = guidance
        self.class_ids = None if class_ids is None else torch.tensor(class_ids)
        self.size, self.latent = size, latent
        self.judge = judge if self.class_ids is not None and not latent else None
        self.stop, self.changed, self.previews = stop, changed, previews
        self.step = self.num_steps = 0
        self.frames: list[list[Image]] = []
        self.frame_steps: list[int] = []
        self.probability: dict[str, list[list[float]]] = {}
        self.probability_steps: list[int] = []
        self.guidance_norm: list[list[float]] = []
        self.norm_steps: list[int] = []
        self._rows = {"network": 0, "classifier": 0}
        self._started: float | None = None
        self._watching = self._seconds = 0.0
        self._level: Callable[[float, int], tuple[float, float]] | None = None  # None: nothing is looked at
        self._clean: torch.Tensor | None = None
        self._preview: tuple[int, list[Image]] = (0, [])
        self.lock = threading.Lock()
        self._outputs: list[torch.Tensor] = []  # of the denoising network, since the last step
        self._logits = self._gradient = None  # of the classifier, since the last step
        self._classifier = pipe.components.get("classifier")  # not watched
        for name, component in pipe.components.items():
            if isinstance(component, nn.Module):
                if name.startswith(("unet", "transformer")):
                    setattr(pipe, name, watched(component, self._before_network, self._after_network))
                elif name == "guide_model":
                    setattr(pipe, name, watched(component, self._before_network, self._after_guide_model))
                elif name == "classifier":
                    setattr(pipe, name, watched(component, self._before_classifier, self._after_classifier))
        self._watch_steps(pipe.scheduler)

    @property
    def network_evaluations(self) -> int:
        """Per image."""
        return self._rows["network"] // self.num_images

    @property
    def classifier_evaluations(self) -> int:
        """Per image, those that guided."""
        return self._rows["classifier"] // self.num_images

    @property
    def seconds(self) -> float:
        """Since the run began, or of it where it has ended; without what watching took."""
        started = self._started
        return self._seconds if started is None else time.perf_counter() - started - self._watching

    def begin(self) -> None:
        """The run begins: its time is taken from here."""
        self._started = time.perf_counter()

    def end(self) -> None:
        """The run has ended, well or not. Nothing here holds the networks from now on."""
        self._seconds, self._started = self.seconds, None
        self.pipe = self._classifier = None

    def images(self) -> list[Image]:
        """The latest predicted clean images; none before the first step."""
        with self.lock:
            step, clean = self.step, self._clean
            if clean is not None and self._preview[0] != step:
                self._preview = step, self._pictures(clean)
            return list(self._preview[1])

    def close_film(self, images: list[Image]) -> None:
        """Ends the film strip with these images."""
        if self.frame_steps and self.frame_steps[-1] == self.step:
            self.frames[-1] = images
        else:
            self.frames.append(images)
            self.frame_steps.append(self.step)

    def _watch_steps(self, scheduler: SchedulerMixin) -> None:
        # A subclass, since an attribute of the instance would lead back from the copies that pipelines make of it.
        base = type(scheduler)
        signature = inspect.signature(base.step)

        @functools.wraps(base.step)  # pipelines look at the signature
        def step(scheduler: SchedulerMixin, *args, **kwargs):
            self._check_stop()
            given = signature.bind(scheduler, *args, **kwargs).arguments
            self._watched(self._before_step, scheduler, given["model_output"], given["timestep"], given["sample"])
            result = base.step(scheduler, *args, **kwargs)
            self._count(self._watched(self._develop))
            return result

        scheduler.__class__ = type(base.__name__, (base,), {"step": step, "__module__": base.__module__})

    def _watched(self, look: Callable, *args) -> list[Image] | None:
        """Looks, and takes the time of that. A pipeline in which nothing is found where it should be draws unseen."""
        begin = time.perf_counter()
        try:
            return look(*args)
        except Exception:
            logger.warning("%s draws on unseen", type(self.pipe).__name__, exc_info=True)
            self._level = None
        finally:
            self._watching += time.perf_counter() - begin

    def _check_stop(self) -> None:
        if self.stop():
            raise Stopped

    def _before_network(self, network: nn.Module, args: tuple) -> None:
        self._check_stop()

    def _after_network(self, network: nn.Module, args: tuple, output) -> None:
        self._rows["network"] += len(output[0])
        self._outputs.append(output[0])

    def _after_guide_model(self, network: nn.Module, args: tuple, output) -> None:
        self._rows["network"] += len(output[0])

    def _before_classifier(self, classifier: nn.Module, args: tuple) -> None:
        self._check_stop()
        if args[0].requires_grad:
            args[0].register_hook(self._keep_gradient)

    def _keep_gradient(self, gradient: torch.Tensor) -> None:
        self._gradient = gradient.detach()

    def _after_classifier(self, classifier: nn.Module, args: tuple, output) -> None:
        self._rows["classifier"] += len(args[0])
        self._logits = getattr(output, "logits", output).detach()

    def _before_step(
        self, scheduler: SchedulerMixin, prediction: torch.Tensor, timestep: torch.Tensor | float, sample: torch.Tensor
    ) -> None:
        if self.num_steps == 0:
            self._prepare(scheduler)
        if self._level is None:
            return
        alpha, sigma = self._level(float(torch.as_tensor(timestep).reshape(-1)[0]), self.step)
        kind, sigma_data = prediction_type(scheduler), scheduler.config.get("sigma_data")
        sample = sample.float()
        prediction = prediction[:, : sample.shape[1]].float()  # a learned variance may follow it
        # Pure noise (alpha 0) and a predicted eps leave the clean image open.
        clean = clean_image(kind, sample, prediction, alpha, sigma, sigma_data).nan_to_num(0, 0, 0)
        abar = clip_abar(alpha**2 / (alpha**2 + sigma**2), self._table)
        norm, probabilities = None, {}
        if self.guidance not in ("none", "embedded"):
            gain = prediction_gain(kind, alpha, sigma, sigma_data)
            norm = self._norm(prediction, gain, abar).nan_to_num(0, 0, 0).tolist()
        if self.class_ids is not None and self.step in self._points:
            probabilities = self._read(sample / math.hypot(alpha, sigma), abar, clean)
        self._next_clean = clean
        with self.lock:
            if norm is not None:
                self.guidance_norm.append(norm)
                self.norm_steps.append(self.step + 1)
            for reader, wanted in probabilities.items():
                self.probability.setdefault(reader, []).append(wanted)
            if probabilities:
                self.probability_steps.append(self.step + 1)

    def _prepare(self, scheduler: SchedulerMixin) -> None:
        self.num_steps = getattr(self.pipe, "num_timesteps", len(scheduler.timesteps))
        self._film, self._points = (
            set(np.linspace(0, self.num_steps - 1, min(most, self.num_steps)).round().astype(int).tolist())
            for most in (MAX_FRAMES, MAX_POINTS)
        )
        self._level = noise_level_rule(scheduler) if self.previews else None
        schedule = self.pipe.config.get("classifier_schedule")
        if schedule is not None:
            scheduler = DDPMScheduler(**schedule)
        elif not hasattr(scheduler, "alphas_cumprod"):
            scheduler = DDPMScheduler()
        self._table = noise_table(scheduler)

    def _norm(self, prediction: torch.Tensor, gain: float, abar: float) -> torch.Tensor:
        """How far guidance moves the expected clean image of each image in this step, `(B,)`."""
        if self._classifier is not None and self.pipe.components.get("guider") is None:
            if self._gradient is None:
                return torch.zeros(len(prediction))
            # Of the gradient, since some runs move the result of the step and not the prediction.
            scale = HALF_PRECISION_SCALE if self._logits.dtype == torch.float16 else 1.0
            return abs(self.pipe.guidance_scale) * x0_gain(abar) * rms(self._gradient) / scale
        output, channels = self._outputs[0], prediction.shape[1]
        batches = output.split(len(prediction))
        # Ours puts the prediction for class and text first, diffusers last.
        conditional = batches[0 if isinstance(self.pipe, PipelineMixin) else -1][:, :channels]
        return rms((prediction - conditional) / gain)

    def _read(self, noisy: torch.Tensor, abar: float, clean: torch.Tensor) -> dict[str, list[float]]:
        """Probability of the wanted class of each image: the classifier reads noisy images as it knows them, the judge
        clean ones."""
        found = {}
        if self._classifier is not None:
            logits = self._logits
            if logits is None:  # this step was not guided
                timestep = torch.full((), timestep_of_abar(abar, self._table), device=noisy.device)
                output = self._classifier(noisy.to(self._classifier.dtype), timestep)
                logits = getattr(output, "logits", output)
            found["classifier"] = logits.float().softmax(dim=1).cpu()
        if self.judge is not None:
            found["judge"] = self.judge.probabilities(clean)
        rows = torch.arange(len(self.class_ids))
        return {kind: values[rows, self.class_ids].nan_to_num(0).tolist() for kind, values in found.items()}

    def _develop(self) -> list[Image] | None:
        """A frame of the film strip, in those steps that have one."""
        return self._pictures(self._next_clean) if self._level is not None and self.step in self._film else None

    def _count(self, frame: list[Image] | None) -> None:
        """One step is done."""
        self._outputs, self._logits, self._gradient = [], None, None
        with self.lock:
            self.step += 1
            if self._level is not None and not self.latent:
                self._clean = self._next_clean
            if frame is not None:
                self._preview = self.step, frame
                self.frames.append([reduced(image, MAX_FRAME) for image in frame])
                self.frame_steps.append(self.step)
        self.changed()

    def _pictures(self, clean: torch.Tensor) -> list[Image]:
        pipe = self.pipe
        if self.latent:
            if clean.ndim == 3:  # Flux and its like draw rows of 2x2 pixels
                clean = pipe._unpack_latents(clean, *self.size, pipe.vae_scale_factor)
            if isinstance(pipe, PipelineMixin):
                clean = pipe.decode(clean)
            else:
                config = pipe.vae.config
                clean = clean / config.scaling_factor + (config.get("shift_factor") or 0.0)
                clean = pipe.vae.decode(clean.to(pipe.vae.dtype), return_dict=False)[0]
        return self._image_processor.postprocess(clean.float(), output_type="pil")


def watched(network: nn.Module, before: Callable, after: Callable) -> nn.Module:
    """The network, sharing all weights and layers, with hooks of its own before and after every call."""
    network = copy.copy(network)
    for name in _HOOKS:
        setattr(network, name, OrderedDict(getattr(network, name)))
    network.register_forward_pre_hook(before)
    network.register_forward_hook(after)
    return network
