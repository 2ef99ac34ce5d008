"""What is trained: the forward process, the losses, and the two tasks (denoising UNet, classifier of noisy images).

A task builds its network and turns a batch into a loss; the loop knows nothing else about it.
Shapes: B batch, C image channels, H and W pixels, T training timesteps. Images lie in [-1, 1].
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from diffusers import DDIMScheduler, DDPMScheduler
from diffusers_ext.models.unet_adm import ADMClassifierModel, ADMUNet2DModel
from diffusers_ext.training.config import ClassifierTrainingConfig, TrainingConfig, UNetTrainingConfig
from diffusers_ext.training.data import ImageDataset, load_images


class ForwardProcess:
    """Closed forms of the Gaussian forward process of DDPM (Ho et al., 2020, https://arxiv.org/abs/2006.11239).

    Tables are computed in float64 from the scheduler's betas and rounded to float32 once.
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
) -> dict[str, torch.Tensor]:
    """Losses of a noise prediction; with learned variance the hybrid loss of Nichol and Dhariwal (2021).

    Hybrid loss (https://arxiv.org/abs/2102.09672, Sec. 3.1, Eq. 16): the squared error trains the mean, and the
    variational bound, seen by the variances only, is added with weight T / 1000.

    Args:
        process: tables of the forward process.
        model_output: `(B, C, H, W)`, or `(B, 2C, H, W)` whose second half places the log variance between that of
            the posterior (-1) and beta (1).
        x_start, x_t, noise: `(B, C, H, W)`.
        timesteps: `(B,)` in `[0, T)`.

    Returns:
        Per image `(B,)`, float32: `mse`, the sum `loss`, and with learned variance `vb` as weighted, in bits per
        dimension.
    """
    epsilon, *variance = model_output.float().split(x_start.shape[1], dim=1)
    losses = {"mse": F.mse_loss(epsilon, noise, reduction="none").flatten(1).mean(1)}
    if variance:
        bits = variational_bound(process, epsilon.detach(), variance[0], x_start, x_t, timesteps)
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

    Ho et al. (2020), Eq. 13. The normal distribution function is the tanh approximation of Page (1977), as in the
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


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 `(B, C, H, W)` to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


class Task:
    """A network to train, its data, and the loss of a batch.

    Args:
        config: options.
        device: where batches will be.
    """

    name: str  # of the component in a pipeline, and of its folder

    def __init__(self, config: TrainingConfig, device: torch.device | str = "cpu"):
        self.config = config
        self.device = device
        self.scheduler = DDPMScheduler(config.num_train_timesteps, beta_schedule=config.beta_schedule)
        self.process = ForwardProcess(self.scheduler.betas, device)

    def build_model(self) -> nn.Module:
        raise NotImplementedError

    def losses(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Means over a batch: `loss` is minimised, the others are logged. Noise comes from the global generator.

        Args:
            model: the network, possibly wrapped.
            images: uint8 `(B, C, H, W)` on the device.
            labels: class ids `(B,)` on the device, or None when the data have none.
        """
        raise NotImplementedError

    def validate(self, model: nn.Module, step: int, output_dir: Path) -> dict[str, float]:
        """Judge a network in evaluation mode, the same way at every step; may write files into `output_dir`."""
        raise NotImplementedError

    def _load_images(self, split: str, need_labels: bool) -> ImageDataset:
        config = self.config
        return load_images(
            config.dataset,
            split,
            sample_size=config.sample_size,
            channels=config.in_channels,
            image_column=config.image_column,
            label_column=config.label_column,
            need_labels=need_labels,
        )

    def _network_options(self) -> dict:
        names = (
            "sample_size in_channels block_out_channels layers_per_block attention_resolutions attention_head_dim "
            "norm_num_groups resample_type resnet_time_scale_shift dropout"
        )
        return {name: getattr(self.config, name) for name in names.split()}


class UNetTask(Task):
    """Predict the noise of an image, and with learned variance how certain each step is."""

    name = "unet"

    def __init__(self, config: UNetTrainingConfig, device: torch.device | str = "cpu"):
        super().__init__(config, device)
        self.scheduler.register_to_config(variance_type="learned_range" if config.learned_variance else "fixed_small")
        self.data = self._load_images(config.dataset_split, need_labels=config.class_conditional)

    def build_model(self) -> ADMUNet2DModel:
        config = self.config
        return ADMUNet2DModel(
            **self._network_options(),
            out_channels=config.in_channels * (2 if config.learned_variance else 1),
            num_class_embeds=self.data.num_classes if config.class_conditional else None,
        )

    def losses(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
        x_start = to_unit_range(images)
        noise = torch.randn_like(x_start)
        timesteps = torch.randint(self.process.num_timesteps, (len(images),), device=images.device)
        x_t = self.process.add_noise(x_start, noise, timesteps)
        labels = labels if self.config.class_conditional else None
        model_output = model(x_t, timesteps, labels).sample
        losses = denoising_losses(self.process, model_output, x_start, x_t, noise, timesteps)
        return {name: values.mean() for name, values in losses.items()}

    @torch.no_grad()
    def validate(self, model: nn.Module, step: int, output_dir: Path) -> dict[str, float]:
        """Draw images from fixed noise into `output_dir/samples/STEP.png`."""
        config = self.config
        count, channels = config.validation_images, config.in_channels
        generator = torch.Generator().manual_seed(config.seed)
        sample = torch.randn(count, channels, config.sample_size, config.sample_size, generator=generator)
        sample = sample.to(self.device)
        labels = None
        if config.class_conditional:
            labels = torch.arange(count, device=self.device) % self.data.num_classes
        scheduler = DDIMScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(config.validation_inference_steps)
        for timestep in scheduler.timesteps:
            epsilon = model(sample, timestep.to(self.device), labels).sample[:, :channels]
            sample = scheduler.step(epsilon, timestep, sample).prev_sample
        path = output_dir / "samples" / f"{step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image_grid(sample).save(path)
        return {}


class ClassifierTask(Task):
    """Recognise the class of an image under any amount of noise."""

    name = "classifier"

    def __init__(self, config: ClassifierTrainingConfig, device: torch.device | str = "cpu"):
        super().__init__(config, device)
        self.data = self._load_images(config.dataset_split, need_labels=True)
        self.validation_data = self._load_images(config.validation_split, need_labels=True)

    def build_model(self) -> ADMClassifierModel:
        return ADMClassifierModel(
            **self._network_options(), num_classes=self.data.num_classes, pool=self.config.pool
        )

    def losses(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
        timesteps = torch.randint(self.process.num_timesteps, (len(images),), device=images.device)
        logits = self._logits_of_noisy(model, images, timesteps)
        return {
            "loss": F.cross_entropy(logits, labels),
            "accuracy": (logits.argmax(dim=1) == labels).float().mean(),
        }

    @torch.no_grad()
    def validate(self, model: nn.Module, step: int, output_dir: Path) -> dict[str, float]:
        """Accuracy on held-out images in each quarter of the timesteps, from the cleanest to the noisiest."""
        config, quarter = self.config, self.process.num_timesteps // 4
        count = min(config.validation_images, len(self.validation_data))
        metrics = {}
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            for index in range(4):
                correct = 0
                for start in range(0, count, config.train_batch_size):
                    rows = list(range(start, min(start + config.train_batch_size, count)))
                    images, labels = (x.to(self.device) for x in self.validation_data.__getitems__(rows))
                    timesteps = torch.randint(quarter * index, quarter * (index + 1), (len(rows),), device=self.device)
                    logits = self._logits_of_noisy(model, images, timesteps)
                    correct += (logits.argmax(dim=1) == labels).sum().item()
                metrics[f"accuracy_quarter{index + 1}"] = correct / count
        return metrics

    def _logits_of_noisy(self, model: nn.Module, images: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        x_start = to_unit_range(images)
        x_t = self.process.add_noise(x_start, torch.randn_like(x_start), timesteps)
        return model(x_t, timesteps).logits.float()


def image_grid(images: torch.Tensor) -> Image.Image:
    """Images `(B, C, H, W)` in [-1, 1], C = 1 or 3, as one picture of about as many rows as columns."""
    columns = math.ceil(math.sqrt(len(images)))
    missing = -len(images) % columns
    pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, missing))
    pixels = pixels.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)  # rows, H, columns, W, C
    pixels = pixels.flatten(2, 3).flatten(0, 1).numpy()
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
