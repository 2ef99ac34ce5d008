"""Losses on the clean images that a denoiser predicts, in the features of a frozen vision network.

Both count in proportion to abar: where little of the image is left, the prediction is a blurred mean that no critic
should call wrong. Shapes: B batch, C image channels, H and W pixels, L positions of a feature map, D its channels.
"""

from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import nn

from diffusers_ext.evaluation.features import VisionNetwork, load_network
from diffusers_ext.training.objectives import DenoisingStep


MAX_LAYERS = 4  # feature maps that are compared, spread evenly over the network


def feature_maps(network: VisionNetwork, images: torch.Tensor) -> list[torch.Tensor]:
    """At most `MAX_LAYERS` feature maps `(B, L, D)` of images `(B, C, H, W)` in [-1, 1], the last one among them."""
    maps = network.layers(images)
    count = min(MAX_LAYERS, len(maps))
    chosen = [maps[round((index + 1) * len(maps) / count) - 1] for index in range(count)]
    return [values.flatten(2).transpose(1, 2) if values.ndim == 4 else values for values in chosen]


class PerceptualLoss:
    """Distance between features of predicted and real clean images.

    Squared distance of the feature vectors of each position, scaled to length one, summed over layers (LPIPS
    without trained weights; Zhang et al., 2018, https://arxiv.org/abs/1801.03924, Eq. 1). A noise-aware classifier
    looks at timestep 0.

    Args:
        features: a frozen network, or the folder or Hub name of one of our classifiers or of a vision model of
            transformers.
        weight: factor of the distance in the loss.
        device: of the images.
    """

    def __init__(self, features: VisionNetwork | str, weight: float, device: torch.device | str = "cpu"):
        _check_positive("perceptual_weight", weight)
        self.network = load_network(features, device)
        self.weight = weight

    def __call__(self, predicted: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Distance per image `(B,)`, not weighted, with gradients for `predicted` `(B, C, H, W)` only."""
        with torch.no_grad():
            expected = feature_maps(self.network, real)
        pairs = zip(feature_maps(self.network, predicted), expected, strict=True)
        distances = [
            (F.normalize(actual, dim=2) - F.normalize(wanted, dim=2)).square().sum(dim=2).mean(dim=1)
            for actual, wanted in pairs
        ]
        return sum(distances)


class FeatureDiscriminator(nn.Module):
    """A small network per feature map that says at each position whether the image is real.

    Frozen features with light heads on several layers follow Sauer et al. (2023), https://arxiv.org/abs/2311.17042,
    Sec. 3.2.

    Args:
        widths: D of each feature map.
        hidden_channels: width of the heads.
    """

    def __init__(self, widths: list[int], hidden_channels: int = 64):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width, elementwise_affine=False),  # features of any scale
                nn.Linear(width, hidden_channels),
                nn.LeakyReLU(0.2),
                nn.Linear(hidden_channels, 1),
            )
            for width in widths
        )

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Feature maps `(B, L, D)` -> verdicts `(B, L)` of each, positive for real images."""
        return [head(values).squeeze(2) for head, values in zip(self.heads, maps, strict=True)]


class AdversarialLoss:
    """The verdict of a discriminator that is trained, on the same batches, to tell predicted from real clean images.

    Hinge loss (Lim and Ye, 2017, https://arxiv.org/abs/1705.02894, Sec. 2.4; Miyato et al., 2018,
    https://arxiv.org/abs/1802.05957, Eq. 16 and 17), averaged over positions and layers. Every process starts from the
    same discriminator and takes the same steps, as its gradients are averaged over processes.

    Args:
        features: as for `PerceptualLoss`.
        weight: factor of the verdict in the loss.
        learning_rate: of the discriminator's AdamW.
        channels: of the images.
        sample_size: pixels of the images.
        seed: of the discriminator's initial weights.
        device: of the images.
    """

    def __init__(
        self,
        features: VisionNetwork | str,
        weight: float,
        *,
        learning_rate: float = 1e-4,
        channels: int = 3,
        sample_size: int = 32,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        _check_positive("adversarial_weight", weight)
        _check_positive("adversarial_learning_rate", learning_rate)
        self.network = load_network(features, device)
        self.weight = weight
        with torch.no_grad():
            maps = feature_maps(self.network, torch.zeros(1, channels, sample_size, sample_size, device=device))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.discriminator = FeatureDiscriminator([values.shape[2] for values in maps]).to(device)
        # No momentum: the discriminator's task changes with every step of the denoiser.
        self.optimizer = torch.optim.AdamW(self.discriminator.parameters(), lr=learning_rate, betas=(0.0, 0.99))

    def __call__(
        self, predicted: torch.Tensor, real: torch.Tensor, image_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of the discriminator, on every process, then its verdict.

        Args:
            predicted, real: `(B, C, H, W)`.
            image_weights: `(B,)`, how much each pair counts for the discriminator.

        Returns:
            How fake each predicted image looks `(B,)`, not weighted, with gradients for `predicted` only; and the
            discriminator's hinge loss `(B,)` before its step, without gradient.
        """
        fake_maps = feature_maps(self.network, predicted)
        with torch.no_grad():
            real_maps = feature_maps(self.network, real)
        with torch.enable_grad():
            discriminator_loss = self._update([values.detach() for values in fake_maps], real_maps, image_weights)
        self.discriminator.requires_grad_(False)
        fakeness = -_mean_of_images(self.discriminator(fake_maps))
        self.discriminator.requires_grad_(True)
        return fakeness, discriminator_loss

    def _update(
        self, fake_maps: list[torch.Tensor], real_maps: list[torch.Tensor], image_weights: torch.Tensor
    ) -> torch.Tensor:
        """A step of the optimizer; one whose gradients are not finite is left out, on all processes alike."""
        fake, real = (self.discriminator(maps) for maps in (fake_maps, real_maps))
        loss = _mean_of_images([F.relu(1 + verdict) for verdict in fake])
        loss = loss + _mean_of_images([F.relu(1 - verdict) for verdict in real])
        self.optimizer.zero_grad()
        (image_weights * loss).mean().backward()
        parameters = list(self.discriminator.parameters())
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for parameter, gradient in zip(parameters, reduce([p.grad for p in parameters], "mean"), strict=True):
                parameter.grad = gradient
        if torch.stack([parameter.grad.isfinite().all() for parameter in parameters]).all():
            self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.discriminator.load_state_dict(state["discriminator"])
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.param_groups[0]["lr"] = learning_rate  # the rate asked for now, not that of the checkpoint


class Critics:
    """The perceptual and adversarial losses that the options ask for, added to those of the denoising step.

    Args:
        config: a `UNetTrainingConfig`.
        channels: of the images.
        sample_size: pixels of the images.
        device: of the images.

    Raises:
        ValueError: for networks that cannot be loaded, weights that are not positive, and when training on latents.
    """

    def __init__(self, config, *, channels: int, sample_size: int, device: torch.device | str = "cpu"):
        for name in ("perceptual_model", "adversarial_model"):
            if getattr(config, name) and config.vae:
                raise ValueError(
                    f"`{name}` ({getattr(config, name)!r}) looks at images, but with `vae` ({config.vae!r}) the "
                    "network is trained on latents. Leave one of them out."
                )
        self.perceptual = self.adversarial = None
        if config.perceptual_model:
            self.perceptual = PerceptualLoss(config.perceptual_model, config.perceptual_weight, device)
        if config.adversarial_model:
            self.adversarial = AdversarialLoss(
                config.adversarial_model,
                config.adversarial_weight,
                learning_rate=config.adversarial_learning_rate,
                channels=channels,
                sample_size=sample_size,
                seed=config.seed,
                device=device,
            )

    def losses(self, step: DenoisingStep, x_start: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses per image `(B,)` of a denoising step on real images `(B, C, H, W)`, those of the critics included.

        `perceptual` and `adversarial` are reported as they are, `loss` gets them times their weight and abar. The
        discriminator takes one step; `discriminator` is its own loss.
        """
        losses = dict(step.losses)
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(step.predicted_start, x_start)
            losses["loss"] = losses["loss"] + self.perceptual.weight * step.signal_share * losses["perceptual"]
        if self.adversarial is not None:
            losses["adversarial"], losses["discriminator"] = self.adversarial(
                step.predicted_start, x_start, step.signal_share
            )
            losses["loss"] = losses["loss"] + self.adversarial.weight * step.signal_share * losses["adversarial"]
        return losses

    def state_dict(self) -> dict[str, Any]:
        """The discriminator and its optimizer; empty without one."""
        return self.adversarial.state_dict() if self.adversarial is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.adversarial is not None:
            if not state:
                raise ValueError("`adversarial_model` is given, but the checkpoint has no discriminator.")
            self.adversarial.load_state_dict(state)


def _mean_of_images(verdicts: list[torch.Tensor]) -> torch.Tensor:
    """Verdicts `(B, L)` of several layers -> their mean per image `(B,)`, every layer alike."""
    return torch.stack([verdict.mean(dim=1) for verdict in verdicts]).mean(dim=0)


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"`{name}` ({value}) must be positive. Leave the model out to train without it.")
