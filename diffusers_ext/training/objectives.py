"""What a denoiser is trained on: a forward process, a distribution of timesteps, a target, a loss and its weighting.

Ho et al., "Denoising Diffusion Probabilistic Models" (2020), https://arxiv.org/abs/2006.11239.
Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021), https://arxiv.org/abs/2102.09672.
Shapes: B batch, C image channels, H and W pixels, T training timesteps. Images lie in [-1, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_ext.training.process import FlowProcess, ForwardProcess, exact_betas
from diffusers_ext.training.timesteps import build_timestep_sampler


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
LOSS_TYPES = (None, "mse", "l1", "huber", "hybrid", "vlb")
WEIGHTINGS = ("uniform", "min_snr", "p2", "snr")
BETA_SCHEDULES = ("linear", "squaredcos_cap_v2", "sigmoid", "scaled_linear")


@dataclass(frozen=True)
class DenoisingStep:
    """One forward pass of a training: its losses, and what further losses on clean images need.

    Attributes:
        losses: per image `(B,)`, float32: `loss`, which is minimised, and its parts before weighting.
        predicted_start: clean images `(B, C, H, W)` that the prediction implies; not clipped, with gradient.
        signal_share: abar `(B,)` in [0, 1], 1 where almost no noise was added: how far `predicted_start` can be
            trusted.
        timesteps: `(B,)` as the network saw them.
    """

    losses: dict[str, torch.Tensor]
    predicted_start: torch.Tensor
    signal_share: torch.Tensor
    timesteps: torch.Tensor


class Objective:
    """Turns clean images and a network into losses, as the options say.

    Args:
        config: a `UNetTrainingConfig`.
        device: of the images.

    Raises:
        ValueError: for options that are unknown, out of range or without meaning together.
    """

    def __init__(self, config, device: torch.device | str = "cpu"):
        _check_loss(config)
        self.config = config
        self.scheduler = build_scheduler(config)
        if config.prediction_type == "flow_prediction":
            self.process = FlowProcess(config.num_train_timesteps, config.flow_shift, device)
        else:
            self.process = ForwardProcess(exact_betas(self.scheduler), device)
        self.sampler = build_timestep_sampler(config)

    def step(
        self, predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x_start: torch.Tensor
    ) -> DenoisingStep:
        """Add noise to clean images, let the network predict, and judge it.

        Noise and timesteps come from torch's global generators.

        Args:
            predict: maps noisy images `(B, C, H, W)` and timesteps `(B,)` (int64; float32 for a flow) to the output
                of the network, `(B, C, H, W)` or, with learned variance, `(B, 2C, H, W)`.
            x_start: clean images or latents `(B, C, H, W)`, float32.
        """
        config = self.config
        positions, importance = self.sampler.sample(len(x_start))
        timesteps = self.process.timesteps_at(positions)
        noise = torch.randn_like(x_start)
        x_t = self.process.add_noise(x_start, noise, timesteps)
        model_output = predict(x_t, timesteps).float()
        expected = x_start.shape[1] * (2 if config.learned_variance else 1)
        if model_output.shape[1] != expected:
            raise ValueError(
                f"The network's output has {model_output.shape[1]} channels instead of {expected}: twice those of the "
                f"images with `learned_variance`, which is {config.learned_variance}, else as many."
            )
        weights = loss_weights(
            self.process.snr(timesteps),
            config.prediction_type,
            config.loss_weighting,
            snr_gamma=config.snr_gamma,
            p2_k=config.p2_k,
            p2_gamma=config.p2_gamma,
        )
        losses = denoising_losses(
            self.process,
            model_output,
            x_start,
            x_t,
            noise,
            timesteps,
            config.prediction_type,
            loss_type=config.loss_type,
            huber_c=config.huber_c,
            reduction=config.loss_reduction,
            weights=weights,
        )
        self.sampler.update(positions, losses["loss"])
        losses["loss"] = losses["loss"] * importance.to(x_start.device)
        prediction = model_output[:, : x_start.shape[1]]
        predicted_start = self.process.predict_start(x_t, prediction, timesteps, config.prediction_type)
        return DenoisingStep(losses, predicted_start, self.process.signal_share(timesteps), timesteps)

    def state_dict(self) -> dict[str, Any]:
        """What importance sampling has learned about the timesteps; empty for the other samplers."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)


def denoising_losses(
    process: ForwardProcess | FlowProcess,
    model_output: torch.Tensor,
    x_start: torch.Tensor,
    x_t: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    prediction_type: str = "epsilon",
    *,
    loss_type: str | None = None,
    variance_type: str | None = None,
    vb_weight: float | None = None,
    huber_c: float = 0.1,
    reduction: str = "mean",
    weights: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Losses of a prediction, per image.

    A pixel loss trains the mean of the reverse process; with learned variance the variational bound is added, which
    then trains only the variances (hybrid loss, Nichol and Dhariwal, Eq. 16). "vlb" is the bound alone, training both.

    Args:
        process: the forward process.
        model_output: `(B, C, H, W)`, or `(B, 2C, H, W)` whose second half is the variance.
        x_start, x_t, noise: `(B, C, H, W)`.
        timesteps: `(B,)` in `[0, T)`.
        prediction_type: what is predicted: "epsilon" (the noise), "v_prediction", "sample" (the clean image) or, with
            a `FlowProcess`, "flow_prediction".
        loss_type: "mse"; "l1"; "huber", the pseudo-Huber loss 2 c (sqrt(d^2 + c^2) - c) of Song and Dhariwal (2023),
            https://arxiv.org/abs/2310.14189, Sec. 3.3, per value and scaled as in diffusers' training scripts;
            "hybrid", "mse" that insists on learned variance; "vlb"; or None, "mse".
        variance_type: of `ForwardProcess.log_variance`; None: "learned_range" for 2C channels, else "fixed_small".
        vb_weight: factor of the bound's term, which is in bits per dimension. None: T for "vlb", which makes it an
            estimate of the whole bound ("RESCALED_KL" in guided-diffusion's code), else T / 1000 ("RESCALED_MSE"). 1
            gives the variants that are not rescaled.
        huber_c: c of "huber".
        reduction: over the values of an image, "mean" or "sum"; the latter multiplies every part by C H W, which for
            "mse" is the loss of Ho et al. (2020), Eq. 14, as published with DDIM.
        weights: factors `(B,)` of the pixel loss.

    Returns:
        Per image `(B,)`, float32: `mse`, `l1` or `huber` without `weights`; `vb` with `vb_weight`; their weighted sum
        `loss`.

    Raises:
        ValueError: when "hybrid" gets no variance, and for loss types that do not exist.
    """
    channels = x_start.shape[1]
    prediction, *values = model_output.float().split(channels, dim=1)
    learned = bool(values)
    scale = x_start[0].numel() if reduction == "sum" else 1
    losses, total = {}, 0

    if loss_type == "hybrid" and not learned:
        raise ValueError(f'`loss_type` is "hybrid", but the output has {channels} channels: no variance is learned.')
    if loss_type != "vlb":
        name = "mse" if loss_type in (None, "hybrid") else loss_type
        error = prediction - process.target(x_start, noise, timesteps, prediction_type)
        losses[name] = scale * _pixel_loss(error, name, huber_c).flatten(1).mean(1)
        total = losses[name] if weights is None else weights * losses[name]
    if loss_type == "vlb" or learned:
        if vb_weight is None:
            vb_weight = process.num_timesteps / (1 if loss_type == "vlb" else 1000)
        mean_prediction = prediction if loss_type == "vlb" else prediction.detach()
        start = process.predict_start(x_t, mean_prediction, timesteps, prediction_type)
        variance_type = variance_type or ("learned_range" if learned else "fixed_small")
        log_variance = process.log_variance(timesteps, variance_type, *values)
        bits = process.variational_bound(start, log_variance, x_start, x_t, timesteps)
        losses["vb"] = scale * vb_weight * bits
        total = total + losses["vb"]
    return losses | {"loss": total}


def _pixel_loss(error: torch.Tensor, loss_type: str, huber_c: float) -> torch.Tensor:
    if loss_type == "mse":
        return error.square()
    if loss_type == "l1":
        return error.abs()
    if loss_type == "huber":
        return 2 * huber_c * ((error.square() + huber_c**2).sqrt() - huber_c)
    raise ValueError(f"`loss_type` ({loss_type!r}) is unknown. Valid: {', '.join(map(str, LOSS_TYPES))}.")


def loss_weights(
    snr: torch.Tensor,
    prediction_type: str = "epsilon",
    weighting: str = "uniform",
    *,
    snr_gamma: float = 5.0,
    p2_k: float = 1.0,
    p2_gamma: float = 1.0,
) -> torch.Tensor | None:
    """Factors of the squared error of a prediction.

    Weightings are defined on the error of the clean image and carried over: an error e of the prediction is one of
    e / sqrt(SNR) of the clean image for "epsilon", e / sqrt(1 + SNR) for "v_prediction", and sigma e =
    e / (1 + sqrt(SNR)) for "flow_prediction".

    - "uniform": None; every prediction counts as it is.
    - "min_snr": min(SNR, gamma), Hang et al. (2023), https://arxiv.org/abs/2303.09556, Sec. 3.4.
    - "snr": SNR, which is the error of the noise (Salimans and Ho, 2022, Eq. 9); the same as "uniform" for "epsilon".
    - "p2": SNR / (k + SNR)^gamma, Choi et al. (2022), https://arxiv.org/abs/2204.00227, Eq. 8; on the noise it is
      1 / (k + SNR)^gamma.

    All but "uniform" give no weight to a timestep without signal.

    Args:
        snr: `(B,)`, signal-to-noise ratio of the timesteps, a ratio of variances.

    Returns:
        `(B,)`, or None for "uniform".
    """
    if weighting == "uniform":
        return None
    clean = {
        "min_snr": snr.clamp(max=snr_gamma),
        "snr": snr,
        "p2": snr / (p2_k + snr) ** p2_gamma,
    }[weighting]
    return (
        clean
        / {"epsilon": snr, "v_prediction": 1 + snr, "sample": 1, "flow_prediction": (1 + snr.sqrt()) ** 2}[
            prediction_type
        ]
    )


def build_scheduler(config) -> DDPMScheduler | FlowMatchEulerDiscreteScheduler:
    """The scheduler that belongs to a training, to be saved with its network.

    Args:
        config: a `TrainingConfig`. Without `prediction_type` and `learned_variance`, as for a classifier, the
            scheduler is that of a network that predicts the noise.

    Raises:
        ValueError: for options that are unknown, out of range or without meaning together.
    """
    prediction_type = getattr(config, "prediction_type", "epsilon")
    timesteps, zero_snr = config.num_train_timesteps, config.rescale_betas_zero_snr
    _check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    _check_choice("beta_schedule", config.beta_schedule, BETA_SCHEDULES)
    if timesteps < 2:
        raise ValueError(f"`num_train_timesteps` ({timesteps}) must be at least 2.")
    betas = {
        name: value
        for name, value in (("beta_start", config.beta_start), ("beta_end", config.beta_end))
        if value is not None
    }
    if prediction_type == "flow_prediction":
        _check_flow(config, betas)
        return FlowMatchEulerDiscreteScheduler(timesteps, shift=config.flow_shift)

    if getattr(config, "flow_shift", 1.0) != 1.0:
        raise ValueError(
            f"`flow_shift` ({config.flow_shift}) must stay 1 unless `prediction_type` is 'flow_prediction', not "
            f"{prediction_type!r}: other processes have a `beta_schedule`."
        )
    if zero_snr and getattr(config, "prediction_type", None) == "epsilon":
        raise ValueError(
            "`rescale_betas_zero_snr` leaves no signal at the last timestep, where the noise says nothing about the "
            "image, but `prediction_type` is 'epsilon'. Use 'v_prediction' or 'sample'."
        )
    if config.beta_schedule == "squaredcos_cap_v2" and betas:
        raise ValueError(
            f"`{next(iter(betas))}` ({next(iter(betas.values()))}) must be None: the cosine schedule "
            "(`beta_schedule` 'squaredcos_cap_v2') has neither start nor end."
        )
    if config.beta_schedule == "scaled_linear":
        betas = {"beta_start": 0.00085, "beta_end": 0.012} | betas  # of Stable Diffusion
    start, end = betas.get("beta_start", 0.0001), betas.get("beta_end", 0.02)
    if not 0 < start <= end < 1:
        raise ValueError(f"`beta_start` ({start}) and `beta_end` ({end}) must satisfy 0 < start <= end < 1.")
    if config.beta_schedule == "sigmoid":  # known to DDPMScheduler only: the others read the betas themselves
        betas["trained_betas"] = DDPMScheduler(timesteps, beta_schedule="sigmoid", **betas).betas.tolist()
    return DDPMScheduler(
        timesteps,
        beta_schedule=config.beta_schedule,
        **betas,
        rescale_betas_zero_snr=zero_snr,
        # Samplers must start at the last timestep, the only one without signal (Lin et al., 2023, Sec. 3.3).
        timestep_spacing="trailing" if zero_snr else "leading",
        variance_type="learned_range" if getattr(config, "learned_variance", False) else "fixed_small",
        prediction_type=prediction_type,
        clip_sample=getattr(config, "vae", None) is None,  # latents are not confined to [-1, 1]
    )


def _check_choice(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` ({value!r}) is unknown. Valid: {', '.join(map(str, choices))}.")


def _check_flow(config, betas: dict[str, float]) -> None:
    if config.learned_variance:
        raise ValueError(
            "`learned_variance` must be False for `prediction_type` 'flow_prediction': a flow has no variance. Type "
            "`--no_learned_variance`, if a preset sets it."
        )
    if config.flow_shift <= 0:
        raise ValueError(f"`flow_shift` ({config.flow_shift}) must be positive; 1 leaves the timesteps as they are.")
    for name, value in {**betas, "rescale_betas_zero_snr": config.rescale_betas_zero_snr or None}.items():
        if value is not None:
            raise ValueError(
                f"`{name}` ({value}) has no meaning for `prediction_type` 'flow_prediction', which has no betas and "
                "no signal at its end anyway. Leave it out."
            )
    if config.beta_schedule != "linear":
        raise ValueError(
            f"`beta_schedule` ({config.beta_schedule!r}) does not fit `prediction_type` 'flow_prediction', whose path "
            "is straight. Leave it out, and use `flow_shift`."
        )


def _check_loss(config) -> None:
    _check_choice("prediction_type", config.prediction_type, PREDICTION_TYPES)
    _check_choice("loss_type", config.loss_type, LOSS_TYPES)
    _check_choice("loss_reduction", config.loss_reduction, ("mean", "sum"))
    _check_choice("loss_weighting", config.loss_weighting, WEIGHTINGS)
    if config.loss_type == "hybrid" and not config.learned_variance:
        raise ValueError(
            "`loss_type` 'hybrid' needs `learned_variance`: its second part trains the variance. Use 'mse'."
        )
    if config.loss_type in ("hybrid", "vlb") and config.prediction_type == "flow_prediction":
        raise ValueError(
            f"`loss_type` ({config.loss_type!r}) has no meaning for `prediction_type` 'flow_prediction', which has no "
            "variational bound. Use 'mse', 'l1' or 'huber'."
        )
    if config.loss_type == "vlb" and config.loss_weighting != "uniform":
        raise ValueError(
            f"`loss_weighting` ({config.loss_weighting!r}) must be 'uniform' for `loss_type` 'vlb': the bound comes "
            "with its weights."
        )
    for name in ("huber_c", "snr_gamma", "p2_k"):
        if getattr(config, name) <= 0:
            raise ValueError(f"`{name}` ({getattr(config, name)}) must be positive.")
    if config.p2_gamma < 0:
        raise ValueError(f"`p2_gamma` ({config.p2_gamma}) must not be negative; 0 is the weighting 'snr'.")
