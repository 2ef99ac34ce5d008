"""Images of a wanted class from a diffusion model and a noise-aware classifier, with any scheduler of diffusers.

Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021), https://arxiv.org/abs/2105.05233, Sec. 4.
The formulas are in `diffusers_ext.guidance`; here they meet a sampling loop.

Shapes: B batch, C image channels, H and W pixels.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral

import torch

import diffusers
from diffusers import DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.guiders import BaseGuidance
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from diffusers_ext.guidance import (
    ancestral_variance_rule,
    check_scheduler,
    classifier_log_prob_grad,
    clip_abar,
    ddim_step_gain,
    is_a,
    noise_level_rule,
    noise_table,
    prediction_gain,
    prediction_type,
    timestep_of_abar,
    x0_gain,
)


DEFAULT_GUIDANCE_SCALE = 4.0
GUIDANCE_MODES = ("score", "mean")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
ANCESTRAL_SCHEDULERS = ("DDPMScheduler", "DDPMParallelScheduler")

ClassLabels = int | str | Sequence["ClassLabels"] | torch.Tensor
GuidanceRule = Callable[
    [int, float, torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]
]


class ClassifierGuidedPipeline(DiffusionPipeline):
    """Samples images, and draws them towards a class by the gradient of a classifier that knows noisy images.

    Args:
        unet: denoising network, `ADMUNet2DModel` or another with the call of `UNet2DModel`. Twice the image channels
            at the output are a prediction and a learned variance. A network with EDM's preconditioning says so by
            `sigma_data` in its config.
        scheduler: every scheduler of diffusers that samples from such a network, see the table in the README.
        classifier: maps `(sample, timestep)` to logits, trained on the noisy images of a variance-preserving process
            (`ADMClassifierModel`). None: no guidance.
        guider: a guider of diffusers (`ClassifierFreeGuidance`, `AdaptiveProjectedGuidance`, ...) that combines the
            prediction with the one for the class in place of a plain weighted sum.
        id2label: names of the classes; several names of one class are separated by commas.
        classifier_schedule: config of the `DDPMScheduler` with whose noise the classifier was trained, for example
            `{"beta_schedule": "squaredcos_cap_v2"}`. None: that of `scheduler`, or `DDPMScheduler()` where that one
            has no `alphas_cumprod`, as for flow matching.
    """

    model_cpu_offload_seq = "unet"  # the classifier runs in every step too, and is not to take turns with it
    _optional_components = ["classifier", "guider"]
    _callback_tensor_inputs = ["latents"]

    # Annotated by way of `diffusers`, to which `import diffusers_ext` adds its models: this file loads without them.
    def __init__(
        self,
        unet: "diffusers.UNet2DModel | diffusers.ADMUNet2DModel",
        scheduler: SchedulerMixin,
        classifier: "diffusers.ADMClassifierModel | None" = None,
        guider: BaseGuidance | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        classifier_schedule: dict | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, classifier=classifier, guider=guider)
        if id2label is not None:
            id2label = {int(class_id): label for class_id, label in id2label.items()}  # JSON made strings of the ids
        self.register_to_config(id2label=id2label, classifier_schedule=classifier_schedule)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

        self._ids_of_label: dict[str, list[int]] = {}
        for class_id, label in (id2label or {}).items():
            for name in {label, *(part.strip() for part in label.split(","))}:
                self._ids_of_label.setdefault(name, []).append(class_id)

    @property
    def labels(self) -> dict[str, int]:
        """Class id of every name that means one class only, in alphabetical order."""
        return {name: ids[0] for name, ids in sorted(self._ids_of_label.items()) if len(ids) == 1}

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the running call; a callback may change `_guidance_scale`, which every step reads."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Network calls of the last run."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """A callback that sets `_interrupt` makes this step the last."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
        guidance_scale: float | None = None,
        guidance_mode: str = "score",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        sample: torch.Tensor | None = None,
        low_res: PipelineImageInput | None = None,
        batch_size: int | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Draws one image per label.

        Args:
            class_labels: class id, name out of `id2label`, or a list or tensor of them, nested or not. A single one is
                for all images of the batch. None: samples without guidance.
            guidance_scale: multiplies the gradient; 0 leaves the classifier alone, 1 is Bayes' rule, more trades
                diversity for certainty. None: 4, or 1 where a guider with a scale of its own follows, or 0 where
                labels are for a class-conditional UNet and there is no classifier.
            guidance_mode: "score" shifts what the network predicts (Dhariwal and Nichol, Alg. 2), for every scheduler;
                "mean" shifts the mean of each step by its variance times the gradient (Alg. 1), for
                `DDPMScheduler` and `DDPMParallelScheduler`.
            guidance_interval: part of the steps that is guided, as fractions of their number from the noise (0) to the
                image (1); elsewhere the classifier is not run (Kynkäänniemi et al., 2024,
                https://arxiv.org/abs/2404.07724).
            num_inference_steps: steps of the scheduler. Second-order ones call the networks twice per step.
            generator: source of all noise; with a list of one per image, no image depends on the rest of its batch.
            sample: standard normal noise `(B, C, H, W)` to start from. None: drawn with `generator`.
            low_res: images to enlarge, for a super-resolution UNet: `(B, C, h, w)` in [-1, 1], or PIL images.
            batch_size: number of images. None: as many as there are labels, or other arguments per image, or 1.
            eta: noise of `DDIMScheduler` and its like: 0 none, 1 as much as an ancestral sampler adds.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), both in [0, 1], or "latent": (B, C, H, W) as
                the scheduler left it, about [-1, 1].
            return_dict: False returns a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after every step; returns the
                dict `tensors`, changed or not.
            callback_on_step_end_tensor_inputs: what `tensors` holds. "latents", the name that callbacks of diffusers
                use, is the noisy image after the step, float32.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: for arguments that do not fit each other or the components, before any network is run.
        """
        # 1. Check
        class_ids = None if class_labels is None else self.get_label_ids(class_labels)
        if low_res is not None and not isinstance(low_res, torch.Tensor):
            low_res = self.image_processor.preprocess(low_res)
        if batch_size is None:
            per_image = [x for x in (class_ids, sample, low_res, generator) if isinstance(x, list | torch.Tensor)]
            batch_size = max(map(len, per_image), default=1)
        self._guidance_scale = self._default_guidance_scale if guidance_scale is None else guidance_scale
        self._interrupt = False
        self.check_inputs(
            class_ids,
            guidance_mode,
            guidance_interval,
            num_inference_steps,
            generator,
            sample,
            low_res,
            batch_size,
            eta,
            output_type,
            callback_on_step_end_tensor_inputs,
        )

        # 2. Prepare labels, timesteps and noise
        device = self._execution_device
        if class_ids is not None:
            class_ids = torch.tensor(class_ids, device=device).expand(batch_size)
        timesteps, timestep_values = self.prepare_timesteps(num_inference_steps, batch_size, device)
        self._num_timesteps = len(timesteps)
        sample = self.prepare_sample(sample, batch_size, generator, device)
        unet_inputs = {"class_labels": class_ids} if self._is_class_conditional else {}
        if low_res is not None:
            unet_inputs["low_res"] = low_res.to(device, self.unet.dtype)

        # 3. Choose what the steps have in common
        scheduler = _with_exact_variance(self.scheduler)
        takes_variance = self._scheduler_takes_variance
        guide = None
        if class_ids is not None and self.classifier is not None:
            guide = self.prepare_guidance(scheduler, class_ids, guidance_mode, timestep_values, eta)
        guided_steps = self._guided_steps(guidance_interval)
        step = _step_rule(scheduler, timestep_values, generator, eta)
        scale_model_input = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
        channels = sample.shape[1]
        dtype = self.unet.dtype

        # 4. Denoise, in float32 outside the networks
        for i, t in enumerate(self.progress_bar(timesteps)):
            if self._interrupt:
                break
            model_input = scale_model_input(sample, t)
            output = self.unet(model_input.to(dtype), t, **unet_inputs, return_dict=False)[0].to(sample.dtype)
            prediction, variance = (output, None) if output.shape[1] == channels else output.chunk(2, dim=1)

            shift = None
            if guide is not None and i in guided_steps and self._guidance_scale != 0:
                prediction, shift = guide(i, timestep_values[i], sample, prediction, variance)
            if takes_variance:
                prediction = torch.cat([prediction, variance], dim=1)
            sample = step(i, t, sample, prediction)
            if shift is not None:
                sample = sample + shift

            if callback_on_step_end is not None:
                tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, sample)
                sample = callback_on_step_end(self, i, t, tensors).pop("latents", sample)

        # 5. Post-process
        images = self.image_processor.postprocess(sample, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def get_label_ids(self, class_labels: ClassLabels) -> list[int]:
        """Class ids of ids and names, in order; lists and tensors are flattened.

        Raises:
            ValueError: for an unknown or ambiguous name, for what is neither id nor name, and when there is none.
        """
        class_ids = [self._label_id(label) for label in _flatten(class_labels)]
        if not class_ids:
            raise ValueError("`class_labels` is empty; give one label per image, or None for samples of any class.")
        return class_ids

    def _label_id(self, label: int | str) -> int:
        if isinstance(label, Integral) and not isinstance(label, bool):
            return int(label)
        if not isinstance(label, str):
            raise ValueError(f"`class_labels` holds {label!r}; a label is a class id (int) or a name (str).")
        ids = self._ids_of_label.get(label, [])
        if len(ids) == 1:
            return ids[0]
        if ids:
            raise ValueError(f"`class_labels` holds {label!r}, which names the classes {ids}; give the id of one.")
        if not self._ids_of_label:
            raise ValueError(
                f"`class_labels` holds {label!r}, but this pipeline has no names of classes; give ids, or construct "
                "it with `id2label`."
            )
        names = sorted(self._ids_of_label)
        known = ", ".join(map(repr, names)) if len(names) <= 20 else f"{len(names)} names, see `pipe.labels`"
        raise ValueError(f"`class_labels` holds {label!r}, which is not a name of a class. Known: {known}.")

    @property
    def _is_class_conditional(self) -> bool:
        return self.unet.config.get("num_class_embeds") is not None

    @property
    def _default_guidance_scale(self) -> float:
        if self.classifier is None and self._is_class_conditional:
            return 0.0
        return DEFAULT_GUIDANCE_SCALE if self.guider is None else 1.0

    @property
    def _image_channels(self) -> int:
        return self.unet.config.in_channels - self.unet.config.get("low_res_channels", 0)

    @property
    def _scheduler_takes_variance(self) -> bool:
        """Whether `step` wants the learned variance behind the prediction; other schedulers know none."""
        return self.scheduler.config.get("variance_type") in ("learned", "learned_range") and (
            is_a(self.scheduler, *ANCESTRAL_SCHEDULERS, "UnCLIPScheduler")
        )

    def check_inputs(
        self,
        class_ids: list[int] | None,
        guidance_mode: str,
        guidance_interval: tuple[float, float],
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        sample: torch.Tensor | None,
        low_res: torch.Tensor | None,
        batch_size: int,
        eta: float,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Raises a ValueError for what `__call__` cannot work with."""
        unet, scheduler, classifier = self.unet, self.scheduler, self.classifier
        channels, name = self._image_channels, type(scheduler).__name__

        check_scheduler(scheduler, unet.config.get("sigma_data"))
        if self._scheduler_takes_variance and unet.config.out_channels != 2 * channels:
            raise ValueError(
                f"`scheduler` {name} has `variance_type` {scheduler.config.variance_type!r}, but `unet` has "
                f"{unet.config.out_channels} output channels and would need {2 * channels} for a learned variance. "
                "Configure the scheduler with `variance_type='fixed_small'`."
            )
        if unet.config.out_channels not in (channels, 2 * channels):
            raise ValueError(
                f"`unet` has {unet.config.out_channels} output channels; for {channels} image channels it must have "
                f"{channels}, or {2 * channels} with a learned variance."
            )
        if not isinstance(num_inference_steps, Integral) or num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps!r}; it must be an integer of at least 1.")
        if eta != 0 and "eta" not in inspect.signature(scheduler.step).parameters:
            raise ValueError(
                f"`eta` is {eta}, which `scheduler` {name} does not have. Leave it 0, or use DDIMScheduler."
            )

        if guidance_mode not in GUIDANCE_MODES:
            raise ValueError(f"`guidance_mode` is {guidance_mode!r}; it must be one of {', '.join(GUIDANCE_MODES)}.")
        if guidance_mode == "mean" and not is_a(scheduler, *ANCESTRAL_SCHEDULERS):
            raise ValueError(
                f"`guidance_mode` 'mean' shifts the mean of an ancestral step, and `scheduler` {name} takes no such "
                "steps. Use `guidance_mode='score'`, or DDPMScheduler."
            )
        if guidance_mode == "mean" and self.guider is not None:
            raise ValueError(
                "`guidance_mode` 'mean' does not change the prediction, which is what `guider` works on. Use "
                "`guidance_mode='score'`, or set `pipe.guider = None`."
            )
        interval = tuple(guidance_interval)
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(
                f"`guidance_interval` is {guidance_interval}; it must be a pair with 0 <= start <= stop <= 1, the "
                "part of the steps, counted from the noise, that is guided."
            )
        if not math.isfinite(self._guidance_scale):
            raise ValueError(f"`guidance_scale` is {self._guidance_scale}; it must be finite.")

        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` is {output_type!r}; it must be one of {', '.join(OUTPUT_TYPES)}.")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown}; possible are {self._callback_tensor_inputs}."
            )
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)} for {batch_size} images; give one for all, or one each."
            )
        if sample is not None and (sample.ndim != 4 or sample.shape[:2] != (batch_size, channels)):
            raise ValueError(
                f"`sample` has shape {tuple(sample.shape)}; it must be ({batch_size}, {channels}, height, width)."
            )
        self._check_low_res(low_res, batch_size)

        if class_ids is None:
            if self._is_class_conditional:
                raise ValueError(
                    "`class_labels` is None, but `unet` is class-conditional and has to be told what to draw. Give "
                    f"ids from 0 to {unet.config.num_class_embeds - 1}."
                )
            return
        if len(class_ids) not in (1, batch_size):
            raise ValueError(
                f"`class_labels` has {len(class_ids)} labels for {batch_size} images; give one for all, or one each."
            )
        if self._guidance_scale != 0:
            self._check_guidance()
        num_classes = [unet.config.num_class_embeds] if self._is_class_conditional else []
        num_classes += [classifier.config.num_classes] if classifier is not None else []
        unknown = [class_id for class_id in class_ids if not 0 <= class_id < min(num_classes, default=math.inf)]
        if unknown:
            raise ValueError(f"`class_labels` holds {unknown}; ids of classes go from 0 to {min(num_classes) - 1}.")

    def _check_low_res(self, low_res: torch.Tensor | None, batch_size: int) -> None:
        channels = self.unet.config.get("low_res_channels", 0)
        if (low_res is None) != (channels == 0):
            raise ValueError(
                "`low_res` is missing: `unet` enlarges images, and has to be given them."
                if low_res is None
                else "`low_res` was given, but `unet` does not enlarge images (`low_res_channels` is 0)."
            )
        if low_res is not None and (low_res.ndim != 4 or low_res.shape[:2] != (batch_size, channels)):
            raise ValueError(
                f"`low_res` has shape {tuple(low_res.shape)}; it must be ({batch_size}, {channels}, height, width)."
            )

    def _check_guidance(self) -> None:
        unet, classifier, guider = self.unet, self.classifier, self.guider
        if classifier is None:
            raise ValueError(
                "`class_labels` ask for guidance, but the pipeline has no `classifier`. Construct it with one, set "
                "`pipe.classifier`, or leave `class_labels` None"
                + (" or `guidance_scale` 0." if self._is_class_conditional else ".")
            )
        if classifier.config.in_channels != self._image_channels:
            raise ValueError(
                f"`classifier` looks at {classifier.config.in_channels} channels, but `unet` draws "
                f"{self._image_channels}; the two must be trained on the same images."
            )
        if _height_width(classifier.config.sample_size) != _height_width(unet.config.sample_size):
            raise ValueError(
                f"`classifier` was trained on images of {classifier.config.sample_size} pixels, `unet` on "
                f"{unet.config.sample_size}; the two must be trained on the same images."
            )
        if any(parameter.is_inference() for parameter in classifier.parameters()):
            raise ValueError(
                "`classifier` was made inside `torch.inference_mode()`, so nothing can be differentiated through it. "
                "Load the pipeline outside; calling it inside is fine."
            )
        if guider is not None and (
            guider._input_predictions != ["pred_cond", "pred_uncond"]
            or type(guider).prepare_models is not BaseGuidance.prepare_models
        ):
            raise ValueError(
                f"`guider` {type(guider).__name__} compares the network with a weakened copy of it, not two "
                "predictions. Use one for classifier-free guidance, such as `ClassifierFreeGuidance`."
            )

    def prepare_timesteps(
        self, num_inference_steps: int, batch_size: int, device: torch.device
    ) -> tuple[torch.Tensor, list[float]]:
        """Timesteps of all network calls: one row each as scheduler and UNet want them, and as numbers."""
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        timesteps = self.scheduler.timesteps
        values = timesteps.tolist()
        if is_a(self.scheduler, "DDPMWuerstchenScheduler"):  # it lists the end too, and takes a timestep per image
            return timesteps[:-1, None].expand(-1, batch_size), values[:-1]
        return timesteps, values

    def prepare_sample(
        self,
        sample: torch.Tensor | None,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Noise `(B, C, H, W)` as strong as the scheduler starts with, float32."""
        if sample is None:
            shape = (batch_size, self._image_channels, *_height_width(self.unet.config.sample_size))
            sample = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return sample.to(device, torch.float32) * float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def _guided_steps(self, interval: tuple[float, float]) -> range:
        """Network calls inside `interval`; the calls of one step of a second-order scheduler are not parted."""
        order = getattr(self.scheduler, "order", 1)
        num_steps = math.ceil(self._num_timesteps / order)
        start, stop = (order * round(end * num_steps) for end in interval)
        return range(start, stop)

    def prepare_guidance(
        self,
        scheduler: SchedulerMixin,
        class_ids: torch.Tensor,
        guidance_mode: str,
        timestep_values: list[float],
        eta: float,
    ) -> GuidanceRule:
        """Chooses, once per run, how the steps of this scheduler are guided.

        Returns:
            A function of the index of the network call, its timestep, the noisy image and both halves of the network's
            output (the second None where it learned no variance). It returns the guided prediction, and what is to be
            added to the result of the scheduler's step, or None.
        """
        classifier, guider = self.classifier, self.guider
        level = noise_level_rule(scheduler)
        if self.config.classifier_schedule is not None:
            table = noise_table(DDPMScheduler(**self.config.classifier_schedule))
        else:
            table = noise_table(scheduler if hasattr(scheduler, "alphas_cumprod") else DDPMScheduler())
        kind, sigma_data = prediction_type(scheduler), scheduler.config.get("sigma_data")
        variance_of_step = ancestral_variance_rule(scheduler, timestep_values) if guidance_mode == "mean" else None
        # The original clips the prediction of DDIM before it is guided, and not again.
        clips_first = (
            guider is None
            and is_a(scheduler, "DDIMScheduler", "DDIMParallelScheduler")
            and (scheduler.config.clip_sample or scheduler.config.thresholding)
        )
        dtype = classifier.dtype

        def guide(
            i: int, timestep: float, sample: torch.Tensor, prediction: torch.Tensor, variance: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            alpha, sigma = level(timestep, i)
            norm = math.hypot(alpha, sigma)
            abar = clip_abar((alpha / norm) ** 2, table)
            classifier_timestep = torch.full((), timestep_of_abar(abar, table), device=sample.device)
            gradient = classifier_log_prob_grad(classifier, sample / norm, classifier_timestep, class_ids, dtype)
            if variance_of_step is not None:
                return prediction, self._guidance_scale * variance_of_step(i, variance) * gradient
            scale = self._guidance_scale * x0_gain(abar)
            if clips_first:
                return prediction, scale * ddim_step_gain(scheduler, timestep, eta) * gradient
            conditional = prediction + scale * prediction_gain(kind, alpha, sigma, sigma_data) * gradient
            if guider is None:
                return conditional, None
            guider.set_state(step=i, num_inference_steps=len(timestep_values), timestep=timestep)
            return guider(guider.prepare_inputs({"noise_pred": (conditional, prediction)})).pred, None

        return guide


def _flatten(labels: ClassLabels) -> Iterator[int | str]:
    if hasattr(labels, "tolist"):  # tensors and arrays
        labels = labels.tolist()
    if isinstance(labels, list | tuple | range):
        for label in labels:
            yield from _flatten(label)
    else:
        yield labels


def _height_width(sample_size: int | Sequence[int]) -> tuple[int, int]:
    return (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)


def _with_exact_variance(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler, or for a learned variance a copy with its schedule in float64, as the original code has it.

    In float32, 1 - abar of the first timesteps keeps three digits, and so does the lower bound of the variance, which
    networks leave by some powers. Other steps forgive that.
    """
    if scheduler.config.get("variance_type") != "learned_range" or not is_a(scheduler, *ANCESTRAL_SCHEDULERS):
        return scheduler
    scheduler = copy.copy(scheduler)
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), dim=0)
    return scheduler


def _step_rule(
    scheduler: SchedulerMixin,
    timestep_values: list[float],
    generator: torch.Generator | list[torch.Generator] | None,
    eta: float,
) -> Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """How to call this scheduler's `step`: a function of index, timestep, image and prediction to the next image.

    DDIM takes eps anew from the clipped image, as the original code does; without clipping that changes nothing.
    """
    known = inspect.signature(scheduler.step).parameters
    options = {"generator": generator, "eta": eta, "use_clipped_model_output": True, "return_dict": False}
    options = {name: value for name, value in options.items() if name in known}

    if "old_pred_original_sample" in known:  # CogVideoXDPMScheduler
        old_x0 = None

        def step(i: int, t: torch.Tensor, sample: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
            nonlocal old_x0
            back = timestep_values[i - 1] if i > 0 else None
            sample, old_x0 = scheduler.step(prediction, old_x0, t, back, sample, **options)
            return sample

    elif "prev_timestep" in known:  # UnCLIPScheduler
        following = [*timestep_values[1:], None]

        def step(i: int, t: torch.Tensor, sample: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
            return scheduler.step(prediction, t, sample, prev_timestep=following[i], **options)[0]

    else:

        def step(i: int, t: torch.Tensor, sample: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
            return scheduler.step(prediction, t, sample, **options)[0]

    return step
