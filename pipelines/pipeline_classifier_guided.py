"""Images of a wanted class from a diffusion model and a noise-aware classifier, with any scheduler of diffusers.

Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021), https://arxiv.org/abs/2105.05233, Sec. 4.
The formulas are in `diffusers_ext.guidance`; here they meet a sampling loop.

Shapes: B batch, C image channels, H and W pixels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.guiders import BaseGuidance
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor

from diffusers_ext.guidance import GUIDANCE_MODES, check_scheduler, classifier_guidance_rule, is_a, rehearse
from diffusers_ext.sampling import (
    ANCESTRAL_SCHEDULERS,
    DENOISER,
    ClassLabels,
    ClassNames,
    PipelineMixin,
    check_arguments,
    check_channels,
    check_class_ids,
    guided_calls,
    height_width,
    image_channels,
    models,
    null_label,
    num_classes,
    predict,
    prepare_sample,
    prepare_timesteps,
    step_rule,
    takes_variance,
    with_exact_variance,
)


DEFAULT_GUIDANCE_SCALE = 4.0


class ClassifierGuidedPipeline(PipelineMixin, DiffusionPipeline):
    """Samples images, and draws them towards a class by the gradient of a classifier that knows noisy images.

    Args:
        unet: denoising network: any of this package, transformers too, or `UNet2DModel` or `DiTTransformer2DModel`.
            Twice the image channels at the output are a prediction and a learned variance. A network with EDM's
            preconditioning says so by `sigma_data` in its config.
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

    def __init__(
        self,
        unet: DENOISER,
        scheduler: SchedulerMixin,
        classifier: "models.ADMClassifierModel | None" = None,
        guider: BaseGuidance | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        classifier_schedule: dict | None = None,
    ):
        super().__init__()
        if unet is None:
            raise ValueError("`unet` is missing; give the network that denoises, a transformer too.")
        self.register_modules(unet=unet, scheduler=scheduler, classifier=classifier, guider=guider)
        if id2label is not None:
            id2label = {int(class_id): label for class_id, label in id2label.items()}  # JSON made strings of the ids
        self.register_to_config(id2label=id2label, classifier_schedule=classifier_schedule)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._names = ClassNames(id2label)

    @property
    def labels(self) -> dict[str, int]:
        """Class id of every name that means one class only, in alphabetical order."""
        return self._names.unique

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
            batch_size = number_of_images(class_ids, sample, low_res, generator)
        self._guidance_scale = default_guidance_scale(self) if guidance_scale is None else guidance_scale
        self._interrupt = False
        check_arguments(
            self.scheduler,
            guidance_scale=self._guidance_scale,
            guidance_interval=guidance_interval,
            num_inference_steps=num_inference_steps,
            generator=generator,
            sample=sample,
            batch_size=batch_size,
            channels=image_channels(self.unet),
            class_ids=class_ids,
            eta=eta,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            callback_tensor_inputs=self._callback_tensor_inputs,
        )
        check_components(
            self,
            class_ids,
            self._guidance_scale,
            guidance_mode,
            guidance_interval,
            num_inference_steps,
            low_res,
            batch_size,
        )

        # 2. Prepare labels, timesteps and noise
        device = self._execution_device
        if class_ids is not None:
            class_ids = torch.tensor(class_ids, device=device).expand(batch_size)
        timesteps, timestep_values = prepare_timesteps(self.scheduler, num_inference_steps, batch_size, device)
        self._num_timesteps = len(timesteps)
        shape = (batch_size, image_channels(self.unet), *height_width(self.unet.config.sample_size))
        sample = prepare_sample(sample, shape, self.scheduler, generator, device)
        unet_inputs = network_inputs(self.unet, class_ids, low_res, batch_size, device)

        # 3. Choose what the steps have in common
        scheduler = with_exact_variance(self.scheduler)
        guide = None
        if class_ids is not None and self.classifier is not None:
            guide = classifier_guidance_rule(
                scheduler,
                self.classifier,
                class_ids,
                timestep_values,
                mode=guidance_mode,
                eta=eta,
                guider=self.guider,
                classifier_schedule=self.config.classifier_schedule,
            )
        guided_steps = guided_calls(scheduler, guidance_interval, len(timesteps))
        step = step_rule(scheduler, timestep_values, generator, eta)
        scale_model_input = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
        channels = sample.shape[1]

        # 4. Denoise, in float32 outside the networks
        for i, t in enumerate(self.progress_bar(timesteps)):
            if self._interrupt:
                break
            output = predict(self.unet, scale_model_input(sample, t), t, **unet_inputs)
            prediction, variance = (output, None) if output.shape[1] == channels else output.chunk(2, dim=1)

            shift = None
            if guide is not None and i in guided_steps and self._guidance_scale != 0:
                prediction, shift = guide(i, timestep_values[i], sample, prediction, variance, self._guidance_scale)
            if takes_variance(scheduler):
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
        return self._names.ids(class_labels)


# What follows serves the blocks of Modular Diffusers too. Their `components`, like a pipeline, have `unet`,
# `scheduler`, `classifier` and `guider` as attributes.


def number_of_images(class_ids: list[int] | None, *per_image: Any) -> int:
    """As many as there are labels, or tensors or lists with an entry per image, or 1."""
    return max((len(x) for x in (class_ids, *per_image) if isinstance(x, list | torch.Tensor)), default=1)


def default_guidance_scale(components: Any) -> float:
    """4, or 1 before a guider with a scale of its own, or 0 where labels are for the network alone."""
    if components.classifier is None and num_classes(components.unet) is not None:
        return 0.0
    return DEFAULT_GUIDANCE_SCALE if components.guider is None else 1.0


def network_inputs(
    unet: torch.nn.Module,
    class_ids: torch.Tensor | None,
    low_res: torch.Tensor | None,
    batch_size: int,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """What `predict` tells the network in every step: labels `(B,)` where it knows classes, and images to enlarge."""
    inputs = {}
    if num_classes(unet) is not None:
        if class_ids is None:
            class_ids = torch.full((batch_size,), null_label(unet), device=device)
        inputs["class_ids"] = class_ids
    if low_res is not None:
        inputs["low_res"] = low_res.to(device, unet.dtype)
    return inputs


def check_components(
    components: Any,
    class_ids: list[int] | None,
    guidance_scale: float,
    guidance_mode: str,
    guidance_interval: tuple[float, float],
    num_inference_steps: int,
    low_res: torch.Tensor | None,
    batch_size: int,
) -> None:
    """Raises a ValueError for what the components cannot do; `check_arguments` looks at the rest."""
    unet, scheduler, classifier = components.unet, components.scheduler, components.classifier

    check_scheduler(scheduler, unet.config.get("sigma_data"))
    check_channels("unet", unet, scheduler)
    if guidance_mode not in GUIDANCE_MODES:
        raise ValueError(f"`guidance_mode` is {guidance_mode!r}; it must be one of {', '.join(GUIDANCE_MODES)}.")
    if guidance_mode == "mean" and not is_a(scheduler, *ANCESTRAL_SCHEDULERS):
        raise ValueError(
            "`guidance_mode` 'mean' shifts the mean of an ancestral step, and `scheduler` "
            f"{type(scheduler).__name__} takes no such steps. Use `guidance_mode='score'`, or DDPMScheduler."
        )
    if guidance_mode == "mean" and components.guider is not None:
        raise ValueError(
            "`guidance_mode` 'mean' does not change the prediction, which is what `guider` works on. Use "
            "`guidance_mode='score'`, or set `pipe.guider = None`."
        )
    _check_low_res(unet, low_res, batch_size)

    classes = num_classes(unet)
    if class_ids is None:
        if classes is not None and null_label(unet) is None:
            raise ValueError(
                "`class_labels` is None, but `unet` is class-conditional and has to be told what to draw. Give "
                f"ids from 0 to {classes - 1}."
            )
        return
    if guidance_scale != 0:
        _check_guidance(unet, classifier)
        if components.guider is not None:
            _check_guider(components.guider, unet, scheduler, guidance_interval, num_inference_steps)
    limits = [limit for limit in (classes, classifier and classifier.config.num_classes) if limit is not None]
    if limits:
        check_class_ids(class_ids, min(limits))


def _check_low_res(unet: torch.nn.Module, low_res: torch.Tensor | None, batch_size: int) -> None:
    channels = unet.config.get("low_res_channels", 0)
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


def _check_guidance(unet: torch.nn.Module, classifier: torch.nn.Module | None) -> None:
    if classifier is None:
        raise ValueError(
            "`class_labels` ask for guidance, but the pipeline has no `classifier`. Construct it with one, set "
            "`pipe.classifier`, or leave `class_labels` None"
            + (" or `guidance_scale` 0." if num_classes(unet) is not None else ".")
        )
    if classifier.config.in_channels != image_channels(unet):
        raise ValueError(
            f"`classifier` looks at {classifier.config.in_channels} channels, but `unet` draws "
            f"{image_channels(unet)}; the two must be trained on the same images."
        )
    if height_width(classifier.config.sample_size) != height_width(unet.config.sample_size):
        raise ValueError(
            f"`classifier` was trained on images of {classifier.config.sample_size} pixels, `unet` on "
            f"{unet.config.sample_size}; the two must be trained on the same images."
        )
    if any(parameter.is_inference() for parameter in classifier.parameters()):
        raise ValueError(
            "`classifier` was made inside `torch.inference_mode()`, so nothing can be differentiated through it. "
            "Load the pipeline outside; calling it inside is fine."
        )


def _check_guider(
    guider: BaseGuidance,
    unet: torch.nn.Module,
    scheduler: SchedulerMixin,
    guidance_interval: tuple[float, float],
    num_inference_steps: int,
) -> None:
    if (
        guider._input_predictions != ["pred_cond", "pred_uncond"]
        or type(guider).prepare_models is not BaseGuidance.prepare_models
    ):
        raise ValueError(
            f"`guider` {type(guider).__name__} compares the network with a weakened copy of it, not two "
            "predictions. Use one for classifier-free guidance, such as `ClassifierFreeGuidance`."
        )
    _, timestep_values = prepare_timesteps(scheduler, num_inference_steps, 1, torch.device("cpu"))
    shape = (1, image_channels(unet), *height_width(unet.config.sample_size))
    guided_steps = guided_calls(scheduler, guidance_interval, len(timestep_values))
    for _ in rehearse(guider, shape, timestep_values, guided_steps):
        pass
