"""Bits per dimension: the variational bound on the negative log likelihood of images, term by term.

Ho et al. (2020), https://arxiv.org/abs/2006.11239, Eq. 5; respacing as Nichol and Dhariwal (2021),
https://arxiv.org/abs/2102.09672, Sec. 4. Shapes: B images, C channels, H and W pixels, S steps of the process.
"""

import numpy as np
import torch
from torch import nn

from diffusers.utils.torch_utils import randn_tensor

from diffusers_ext.training.process import ForwardProcess, exact_betas


@torch.no_grad()
def bits_per_dim(
    model: nn.Module,
    images: torch.Tensor,
    scheduler,
    *,
    num_steps: int | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    class_labels: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The variational bound of each image, in bits per dimension, and the errors of each step.

    Args:
        model: denoiser, called as `model(sample, timestep)` or `model(sample, timestep, class_labels=...)`, that
            predicts what `scheduler.config.prediction_type` says; a second half of channels is the learned variance.
            It sees images in its own `dtype`; all else is counted in float32.
        images: `(B, C, H, W)` of 256 grey levels, uint8 or float in [-1, 1], where the model is.
        scheduler: with betas, as saved with the model. Its `prediction_type`, `variance_type` and `clip_sample` are
            used; its state is not.
        num_steps: S, at least 2: timesteps that are kept, evenly spread from the first to the last. The bound is that
            of the shorter process, which is what sampling in as many steps draws from, and is larger. None: all.
        generator: of the noise; one for each image makes them independent of the batch.
        class_labels: `(B,)`, int64, for class-conditional models.
        noise: `(S, B, C, H, W)`, noisiest step first, in place of the generator's.

    Returns:
        Per image `(B,)`: `total`, and `prior`, its part that no model changes. Per step `(B, S)`, noisiest first:
        `vb`, terms of the bound, whose sum and `prior` are `total`; `xstart_mse`, squared error of the clean image;
        `mse`, that of the noise which this clean image implies. All float32.

    Raises:
        ValueError: for schedulers without such a process, wrong shapes, and `num_steps` out of range.
    """
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    if getattr(scheduler, "betas", None) is None or prediction_type not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(
            f"`scheduler` ({type(scheduler).__name__}, prediction_type {prediction_type!r}) has no variational bound: "
            "it must have betas, as DDPMScheduler or DDIMScheduler do, and a network for the noise, the clean image "
            "or v."
        )
    if images.dtype == torch.uint8:
        images = images.float() / 127.5 - 1
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"`images` {tuple(images.shape)} must be (batch, channels, height, width), uint8 or float.")
    images = images.float()
    timesteps, betas = respaced(exact_betas(scheduler), num_steps)
    process = ForwardProcess(betas, images.device)
    if prediction_type == "epsilon" and not torch.isfinite(process.noise_over_signal[-1]).item():
        raise ValueError(
            "`scheduler` leaves no signal at the last timestep (rescale_betas_zero_snr), where a prediction of the "
            "noise (prediction_type 'epsilon') says nothing about the image."
        )
    if noise is not None and noise.shape != (len(timesteps), *images.shape):
        raise ValueError(f"`noise` {tuple(noise.shape)} must have the shape {(len(timesteps), *images.shape)}.")

    labels = {} if class_labels is None else {"class_labels": class_labels}
    dtype = getattr(model, "dtype", images.dtype)
    columns = []
    for index in reversed(range(len(timesteps))):
        if noise is not None:
            eps = noise[len(timesteps) - 1 - index].to(images)
        else:
            eps = randn_tensor(images.shape, generator=generator, device=images.device)
        step = torch.full((len(images),), index, device=images.device)
        x_t = process.add_noise(images, eps, step)
        output = model(x_t.to(dtype), torch.full_like(step, timesteps[index]), **labels).sample.float()
        prediction, *values = output.split(images.shape[1], dim=1)
        x_start = process.predict_start(x_t, prediction, step, prediction_type)
        if scheduler.config.get("clip_sample", False):
            limit = scheduler.config.get("clip_sample_range", 1.0)
            x_start = x_start.clamp(-limit, limit)
        log_variance = process.log_variance(step, _variance_type(scheduler, bool(values)), *values)
        columns.append(
            {
                "vb": process.variational_bound(x_start, log_variance, images, x_t, step),
                "xstart_mse": (x_start - images).square().flatten(1).mean(1),
                "mse": (process.predict_noise(x_t, x_start, step) - eps).square().flatten(1).mean(1),
            }
        )
    steps = {name: torch.stack([column[name] for column in columns], dim=1) for name in columns[0]}
    prior = process.prior_bound(images)
    return {"total": steps["vb"].sum(dim=1) + prior, "prior": prior, **steps}


def respaced(betas: torch.Tensor, num_steps: int | None) -> tuple[list[int], torch.Tensor]:
    """A shorter process that passes through some of the noise levels of a longer one.

    Args:
        betas: `(T,)`.
        num_steps: S, 2 <= S <= T, evenly spread with both ends; None keeps all.

    Returns:
        The kept timesteps, ascending, and the betas `(S,)`, float64, between them.
    """
    if num_steps is not None and not 2 <= num_steps <= len(betas):
        raise ValueError(f"`num_steps` ({num_steps}) must lie between 2 and {len(betas)}, the scheduler's timesteps.")
    timesteps = np.linspace(0, len(betas) - 1, num_steps or len(betas)).round().astype(int).tolist()
    alphas_cumprod = torch.cumprod(1 - betas.double(), dim=0)[timesteps]
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    return timesteps, 1 - alphas_cumprod / previous


def _variance_type(scheduler, learned: bool) -> str:
    """Of `ForwardProcess.log_variance`; a scheduler of deterministic steps names none."""
    given = scheduler.config.get("variance_type") or ("learned_range" if learned else "fixed_small")
    given = given.removesuffix("_log")
    if given.startswith("learned") != learned:
        # A network that learns its variance knows it better than a scheduler that was exchanged for sampling.
        if learned:
            return "learned_range"
        raise ValueError(
            f"`scheduler` has variance_type {given!r}, but the model's output has no second half of channels for it."
        )
    return given
