"""The forward process and the losses of denoising.

Ho et al., "Denoising Diffusion Probabilistic Models" (2020), https://arxiv.org/abs/2006.11239.
Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021), https://arxiv.org/abs/2102.09672.
Shapes: B batch, C image channels, H and W pixels, T training timesteps. Images lie in [-1, 1].
"""

import math

import torch
import torch.nn.functional as F


class ForwardProcess:
    """Closed forms of the Gaussian forward process (Ho et al., Sec. 2).

    Args:
        betas: variances of the steps `(T,)`. Tables are computed from them in float64 and rounded to float32 once.
        device: of the tables.
    """

    def __init__(self, betas: torch.Tensor, device: torch.device | str = "cpu"):
        betas = betas.double()
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        previous = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
        posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
        posterior_variance[0] = posterior_variance[1]  # zero at t = 0, where only its logarithm is needed

        def table(values: torch.Tensor) -> torch.Tensor:
            return values.float().to(device)[:, None, None, None]

        self.num_timesteps = len(betas)
        self.signal = table(alphas_cumprod.sqrt())
        self.noise = table((1 - alphas_cumprod).sqrt())
        self.sample_over_signal = table(alphas_cumprod.rsqrt())
        self.noise_over_signal = table((1 / alphas_cumprod - 1).sqrt())
        self.mean_of_start = table(betas * previous.sqrt() / (1 - alphas_cumprod))  # Eq. 7
        self.mean_of_sample = table((1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod))
        self.log_beta = table(betas.log())
        self.log_posterior_variance = table(posterior_variance.log())

    def add_noise(self, x_start: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Sample `(B, C, H, W)` of q(x_t | x_0) for timesteps `(B,)`, Eq. 4."""
        return self.signal[timesteps] * x_start + self.noise[timesteps] * noise

    def velocity(self, x_start: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """v `(B, C, H, W)` of Salimans and Ho (2022), https://arxiv.org/abs/2202.00512, App. D."""
        return self.signal[timesteps] * noise - self.noise[timesteps] * x_start

    def predict_start(self, x_t: torch.Tensor, epsilon: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The clean image `(B, C, H, W)` that `x_t` and a prediction of its noise imply; not clipped."""
        return self.sample_over_signal[timesteps] * x_t - self.noise_over_signal[timesteps] * epsilon

    def posterior_mean(self, x_start: torch.Tensor, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Mean of q(x_{t-1} | x_t, x_0), Eq. 7."""
        return self.mean_of_start[timesteps] * x_start + self.mean_of_sample[timesteps] * x_t


def denoising_losses(
    process: ForwardProcess,
    model_output: torch.Tensor,
    x_start: torch.Tensor,
    x_t: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    prediction_type: str = "epsilon",
) -> dict[str, torch.Tensor]:
    """Squared error of a prediction; with learned variance the hybrid loss (Nichol and Dhariwal, Eq. 16).

    The squared error trains the mean; the variational bound, with weight T / 1000, trains only the variances.

    Args:
        process: tables of the forward process.
        model_output: `(B, C, H, W)`, or `(B, 2C, H, W)` whose second half places the log variance between that of
            the posterior (-1) and beta (1).
        x_start, x_t, noise: `(B, C, H, W)`.
        timesteps: `(B,)` in `[0, T)`.
        prediction_type: what is predicted: "epsilon" (the noise), "v_prediction" or "sample" (the clean image). The
            variance is learned beside the noise only.

    Returns:
        Per image `(B,)`, float32: `mse`, the sum `loss`, and with learned variance `vb` as weighted, in bits per
        dimension.
    """
    prediction, *variance = model_output.float().split(x_start.shape[1], dim=1)
    target = x_start if prediction_type == "sample" else noise
    if prediction_type == "v_prediction":
        target = process.velocity(x_start, noise, timesteps)
    losses = {"mse": F.mse_loss(prediction, target, reduction="none").flatten(1).mean(1)}
    if variance:
        bits = variational_bound(process, prediction.detach(), variance[0], x_start, x_t, timesteps)
        losses["vb"] = bits * (process.num_timesteps / 1000)
    losses["loss"] = sum(losses.values())
    return losses


def variational_bound(
    process: ForwardProcess,
    epsilon: torch.Tensor,
    variance: torch.Tensor,
    x_start: torch.Tensor,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """One term of the variational bound per image `(B,)`, in bits per dimension (arguments as `denoising_losses`).

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, and the likelihood of the 256 grey levels at t = 0.
    """
    true_mean = process.posterior_mean(x_start, x_t, timesteps)
    true_log_variance = process.log_posterior_variance[timesteps]
    mean = process.posterior_mean(process.predict_start(x_t, epsilon, timesteps), x_t, timesteps)
    log_variance = torch.lerp(true_log_variance, process.log_beta[timesteps], (variance + 1) / 2)

    kl = 0.5 * (
        log_variance
        - true_log_variance
        + torch.exp(true_log_variance - log_variance)
        + (true_mean - mean).square() * torch.exp(-log_variance)
        - 1
    )
    decoder_nll = -discretized_gaussian_log_likelihood(x_start, mean, 0.5 * log_variance)
    first = (timesteps == 0)[:, None, None, None]
    return torch.where(first, decoder_nll, kl).flatten(1).mean(1) / math.log(2)


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
