"""Forward processes of diffusion: how clean images become noise, what a network may predict, and the exact bound.

Ho et al., "Denoising Diffusion Probabilistic Models" (2020), https://arxiv.org/abs/2006.11239.
Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021), https://arxiv.org/abs/2102.09672.
Liu et al., "Flow Straight and Fast" (2023), https://arxiv.org/abs/2209.03003.
Shapes: B batch, C image channels, H and W pixels, T training timesteps. Images lie in [-1, 1].
"""

import math

import torch
import torch.nn.functional as F

from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr


class ForwardProcess:
    """Closed forms of the Gaussian forward process (Ho et al., Sec. 2).

    With zero terminal signal-to-noise ratio (Lin et al., 2023) the tables that divide by the signal are infinite at
    T - 1; only "epsilon" needs them.

    Args:
        betas: variances of the steps `(T,)`, T >= 2. Tables are computed from them in float64 and rounded to float32
            once.
        device: of the tables.
    """

    def __init__(self, betas: torch.Tensor, device: torch.device | str = "cpu"):
        betas = betas.double()
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        previous = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
        posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
        posterior_variance[0] = posterior_variance[1]  # zero at t = 0, where only its logarithm is needed
        fixed_large = torch.cat([posterior_variance[1:2], betas[1:]])

        def table(values: torch.Tensor) -> torch.Tensor:
            return values.float().to(device)[:, None, None, None]

        self.num_timesteps = len(betas)
        self.signal = table(alphas_cumprod.sqrt())
        self.noise = table((1 - alphas_cumprod).sqrt())
        self.sample_over_signal = table(alphas_cumprod.rsqrt())
        self.noise_over_signal = table((1 / alphas_cumprod - 1).sqrt())
        self.mean_of_start = table(betas * previous.sqrt() / (1 - alphas_cumprod))  # Eq. 7
        self.mean_of_sample = table((1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod))
        self.log_noise_variance = table((1 - alphas_cumprod).log())
        self.log_beta = table(betas.log())
        self.log_posterior_variance = table(posterior_variance.log())
        self.log_fixed_large = table(fixed_large.log())
        self._signal_share = alphas_cumprod.float().to(device)
        self._snr = (alphas_cumprod / (1 - alphas_cumprod)).float().to(device)

    def timesteps_at(self, positions: torch.Tensor) -> torch.Tensor:
        """Timesteps `(B,)`, int64, at shares `(B,)` in (0, 1) of the sequence; 0 is clean."""
        timesteps = (positions * self.num_timesteps).long().clamp(0, self.num_timesteps - 1)
        return timesteps.to(self.signal.device)

    def signal_share(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Variance of the signal as a share of that of x_t, abar, `(B,)` in [0, 1]."""
        return self._signal_share[timesteps]

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio abar / (1 - abar) `(B,)`."""
        return self._snr[timesteps]

    def add_noise(self, x_start: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Sample `(B, C, H, W)` of q(x_t | x_0) for timesteps `(B,)`, Eq. 4."""
        return self.signal[timesteps] * x_start + self.noise[timesteps] * noise

    def velocity(self, x_start: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """v `(B, C, H, W)` of Salimans and Ho (2022), https://arxiv.org/abs/2202.00512, App. D."""
        return self.signal[timesteps] * noise - self.noise[timesteps] * x_start

    def target(
        self, x_start: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, prediction_type: str = "epsilon"
    ) -> torch.Tensor:
        """What a network of this `prediction_type` should say: "epsilon", "sample" or "v_prediction"."""
        if prediction_type == "v_prediction":
            return self.velocity(x_start, noise, timesteps)
        return {"epsilon": noise, "sample": x_start}[prediction_type]

    def predict_start(
        self, x_t: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor, prediction_type: str = "epsilon"
    ) -> torch.Tensor:
        """The clean image `(B, C, H, W)` that `x_t` and a prediction imply; not clipped."""
        if prediction_type == "v_prediction":
            return self.signal[timesteps] * x_t - self.noise[timesteps] * prediction
        if prediction_type == "sample":
            return prediction
        return self.sample_over_signal[timesteps] * x_t - self.noise_over_signal[timesteps] * prediction

    def predict_noise(self, x_t: torch.Tensor, x_start: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The noise `(B, C, H, W)` that `x_t` and a clean image imply."""
        noise = (self.sample_over_signal[timesteps] * x_t - x_start) / self.noise_over_signal[timesteps]
        return torch.where(self.signal[timesteps] == 0, x_t, noise)

    def posterior_mean(self, x_start: torch.Tensor, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Mean of q(x_{t-1} | x_t, x_0), Eq. 7."""
        return self.mean_of_start[timesteps] * x_start + self.mean_of_sample[timesteps] * x_t

    def log_variance(
        self, timesteps: torch.Tensor, variance_type: str, values: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Log variance of p(x_{t-1} | x_t), broadcastable to `(B, C, H, W)`.

        Args:
            timesteps: `(B,)`.
            variance_type: "fixed_small" (that of the posterior), "fixed_large" (beta), "learned" or "learned_range".
            values: second half `(B, C, H, W)` of the network's output, when it is learned: the log variance itself,
                or its place between those of the posterior (-1) and beta (1), Nichol and Dhariwal, Eq. 15.
        """
        if variance_type == "learned":
            return values
        if variance_type == "learned_range":
            share = (values + 1) / 2
            return share * self.log_beta[timesteps] + (1 - share) * self.log_posterior_variance[timesteps]
        return {"fixed_small": self.log_posterior_variance, "fixed_large": self.log_fixed_large}[variance_type][
            timesteps
        ]

    def variational_bound(
        self,
        predicted_start: torch.Tensor,
        log_variance: torch.Tensor,
        x_start: torch.Tensor,
        x_t: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """One term of the variational bound per image `(B,)`, in bits per dimension.

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, and the likelihood of the 256 grey levels at t = 0.

        Args:
            predicted_start: clean image `(B, C, H, W)` that the network predicts.
            log_variance: of p, broadcastable to it.
            x_start, x_t: `(B, C, H, W)`.
            timesteps: `(B,)` in `[0, T)`.
        """
        true_mean = self.posterior_mean(x_start, x_t, timesteps)
        mean = self.posterior_mean(predicted_start, x_t, timesteps)
        kl = gaussian_kl(true_mean, self.log_posterior_variance[timesteps], mean, log_variance)
        decoder_nll = -discretized_gaussian_log_likelihood(x_start, mean, 0.5 * log_variance)
        first = (timesteps == 0)[:, None, None, None]
        return torch.where(first, decoder_nll, kl).flatten(1).mean(1) / math.log(2)

    def prior_bound(self, x_start: torch.Tensor) -> torch.Tensor:
        """KL(q(x_T | x_0) || N(0, 1)) per image `(B,)`, in bits per dimension; nothing trains it."""
        zero = torch.zeros_like(x_start)
        kl = gaussian_kl(self.signal[-1] * x_start, self.log_noise_variance[-1], zero, zero)
        return kl.flatten(1).mean(1) / math.log(2)


class FlowProcess:
    """Straight path from image to noise, x = (1 - sigma) x_0 + sigma eps (Liu et al., 2023).

    Timesteps are sigma T, as `FlowMatchEulerDiscreteScheduler` passes them to the network.

    Args:
        num_timesteps: T.
        shift: moves evenly spread positions u towards the noise, sigma = shift u / (1 + (shift - 1) u), as large
            images need (Esser et al., 2024, https://arxiv.org/abs/2403.03206, Eq. 23); 1 leaves them.
        device: of timesteps.
    """

    def __init__(self, num_timesteps: int = 1000, shift: float = 1.0, device: torch.device | str = "cpu"):
        self.num_timesteps = num_timesteps
        self.shift = shift
        self.device = device

    def timesteps_at(self, positions: torch.Tensor) -> torch.Tensor:
        """Timesteps `(B,)`, float32, at shares `(B,)` in (0, 1) of the sequence; 0 is clean."""
        sigma = self.shift * positions / (1 + (self.shift - 1) * positions)
        return (sigma.float().clamp(1e-6, 1 - 1e-6) * self.num_timesteps).to(self.device)

    def _sigma(self, timesteps: torch.Tensor) -> torch.Tensor:
        return timesteps.float()[:, None, None, None] / self.num_timesteps

    def signal_share(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Variance of the signal as a share of that of x_t, `(B,)` in (0, 1)."""
        snr = self.snr(timesteps)
        return snr / (1 + snr)

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio ((1 - sigma) / sigma)^2 `(B,)`."""
        return (self.num_timesteps / timesteps.float() - 1).square()

    def add_noise(self, x_start: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x `(B, C, H, W)` at timesteps `(B,)`."""
        return torch.lerp(x_start, noise, self._sigma(timesteps))

    def target(
        self,
        x_start: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        prediction_type: str = "flow_prediction",
    ) -> torch.Tensor:
        """The velocity eps - x_0 `(B, C, H, W)`, the same at every timestep."""
        return noise - x_start

    def predict_start(
        self,
        x_t: torch.Tensor,
        prediction: torch.Tensor,
        timesteps: torch.Tensor,
        prediction_type: str = "flow_prediction",
    ) -> torch.Tensor:
        """The clean image `(B, C, H, W)` that `x_t` and a predicted velocity imply; not clipped."""
        return x_t - self._sigma(timesteps) * prediction


def exact_betas(scheduler) -> torch.Tensor:
    """Betas `(T,)` of a scheduler in float64.

    diffusers computes them in float32, where the last steps of the cosine schedule lose four digits of 1 - beta. The
    schedules that have a formula are computed anew; others are taken as they are.
    """
    config, length = scheduler.config, len(scheduler.betas)
    start, end = config.get("beta_start"), config.get("beta_end")
    betas = scheduler.betas.double().cpu()
    if config.get("trained_betas") is not None:
        return betas
    if config.get("beta_schedule") == "linear":
        betas = torch.linspace(start, end, length, dtype=torch.float64)
    elif config.get("beta_schedule") == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, length, dtype=torch.float64).square()
    elif config.get("beta_schedule") == "squaredcos_cap_v2":  # Nichol and Dhariwal, Eq. 17
        angles = (torch.arange(length + 1, dtype=torch.float64) / length + 0.008) / 1.008 * math.pi / 2
        levels = angles.cos().square()
        betas = (1 - levels[1:] / levels[:-1]).clamp(max=0.999)
    else:
        return betas
    if config.get("rescale_betas_zero_snr", False):
        betas = rescale_zero_terminal_snr(betas)
    return betas


def gaussian_kl(
    mean: torch.Tensor, log_variance: torch.Tensor, other_mean: torch.Tensor, other_log_variance: torch.Tensor
) -> torch.Tensor:
    """KL divergence, in nats per value, of a Gaussian from another one."""
    return 0.5 * (
        other_log_variance
        - 1
        - log_variance
        + torch.exp(log_variance - other_log_variance)
        + (mean - other_mean).square() * torch.exp(-other_log_variance)
    )


def discretized_gaussian_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Log probability, in nats, of the grey level of each value under a Gaussian; the outer levels take the tails.

    Ho et al., Eq. 13. The normal distribution function is the tanh approximation of Page (1977), as in the
    original code, so that bits per dimension are comparable.

    Args:
        x: images of 256 grey levels in [-1, 1].
        mean, log_scale: of the Gaussian, broadcastable to `x`.
    """

    def cdf(z: torch.Tensor) -> torch.Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    scale = torch.exp(-log_scale)
    upper, lower = cdf((x - mean + 1 / 255) * scale), cdf((x - mean - 1 / 255) * scale)
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
