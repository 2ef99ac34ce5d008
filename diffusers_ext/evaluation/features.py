"""What images are compared by: named feature extractors.

The name of an extractor is part of the name of every metric that uses it: distances in different features cannot be
compared. Shapes: B batch, C image channels, H and W pixels, F features.
"""

import re
from pathlib import Path

import numpy as np
import torch
from torch import nn

from diffusers_ext.evaluation.networks import VisionNetwork, is_known, load_network


class FeatureExtractor(nn.Module):
    """Features of uint8 images, without gradients.

    Attributes:
        name: the last part of a metric's name, as in `FD-pca64`.
        num_features: F.
        source: what was loaded: a word, a folder, a Hub id or the name of a class.
    """

    def __init__(self, name: str, num_features: int, source: str):
        super().__init__()
        self.name, self.num_features, self.source = name, num_features, source

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images `(B, C, H, W)` -> float32 features `(B, F)`."""
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"`images` is {images.dtype} of shape {tuple(images.shape)}; it must be uint8 of shape (batch, "
                "channels, height, width), with values from 0 to 255."
            )
        return self._features(images).float()

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    @property
    def frechet_name(self) -> str:
        """Of the Frechet distance: `FID` for Inception, `FD-` and the extractor's name for all others."""
        return "FID" if self.name == "inception" else f"FD-{self.name}"

    @property
    def kernel_name(self) -> str:
        """Of the kernel distance: `KID` for Inception, `KD-` and the extractor's name for all others."""
        return "KID" if self.name == "inception" else f"KD-{self.name}"


class PixelPCA(FeatureExtractor):
    """The first principal components of the pixels of reference images, in [0, 1].

    Args:
        reference: uint8 images `(N, C, H, W)` that the components are fitted on.
        components: how many.
    """

    def __init__(self, reference: torch.Tensor, components: int = 64):
        from sklearn.decomposition import PCA

        rows = unit_rows(reference)
        if not 1 <= components <= min(rows.shape):
            raise ValueError(
                f"`features` pca{components}: {rows.shape[0]} reference images of {rows.shape[1]} values have between "
                f"1 and {min(rows.shape)} principal components. Take fewer, as in "
                f"pca{max(1, min(rows.shape) // 2)}, or more images."
            )
        super().__init__(f"pca{components}", components, f"pca{components}")
        pca = PCA(components, random_state=0).fit(rows)
        self.register_buffer("mean", torch.from_numpy(pca.mean_).float())
        self.register_buffer("components", torch.from_numpy(pca.components_).float())

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        rows = images.flatten(1)
        if rows.shape[1] != len(self.mean):
            raise ValueError(
                f"`images` of shape {tuple(images.shape)} have {rows.shape[1]} values each; {self.name} was fitted on "
                f"images of {len(self.mean)}. Resize them to the reference's size and channels."
            )
        return (rows / 255 - self.mean) @ self.components.T


class Inception(FeatureExtractor):
    """Inception v3 with the weights of the original FID, pool3, as torch-fidelity ports it.

    Args:
        weights: file; None looks where torch-fidelity itself keeps it.
    """

    def __init__(self, weights: str | Path | None = None):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError(
                f'`features` "inception" needs torch-fidelity ({error}): pip install torch-fidelity. Any other '
                "extractor works without, and its distance is then called FD, not FID."
            ) from error
        weights = Path(weights or Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name))
        if not weights.is_file():
            raise ValueError(
                f'`features` "inception": {weights} does not exist. Download {URL_INCEPTION_V3} to there, or take '
                "another extractor; only Inception's distance is called FID."
            )
        super().__init__("inception", 2048, "inception")
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights))

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images.expand(-1, 3, -1, -1))[0]


class NetworkFeatures(FeatureExtractor):
    """Pooled features of a [`VisionNetwork`]."""

    def __init__(self, network: VisionNetwork, source: str):
        super().__init__(network.name, network.num_features, source)
        self.network = network

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images.float() / 127.5 - 1)


class ModuleFeatures(FeatureExtractor):
    """Any module that maps uint8 images `(B, C, H, W)` to features, as torchmetrics takes it; whatever it returns is
    flattened to `(B, F)`."""

    def __init__(self, module: nn.Module):
        name = type(module).__name__
        super().__init__(name, getattr(module, "num_features", 0), name)
        self.module = module.eval()

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        features = self.module(images)
        if not isinstance(features, torch.Tensor) or features.shape[:1] != images.shape[:1]:
            shape = tuple(getattr(features, "shape", ())) or type(features).__name__
            raise ValueError(
                f"`features` ({self.name}) returned {shape} for {len(images)} images; it must return a tensor "
                "(batch, features)."
            )
        self.num_features = features.flatten(1).shape[1]
        return features.flatten(1)


def load_features(
    source: str | Path | nn.Module,
    *,
    reference: torch.Tensor | None = None,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> FeatureExtractor:
    """Open a feature extractor.

    Args:
        source: `pca64`, or another number of components: principal components of the pixels of `reference`;
            `inception`: the network of FID, needs torch-fidelity and its weights; a folder or Hub id of an
            [`ADMClassifierModel`], of a pipeline that holds one as `classifier`, or of any vision model of
            transformers; such a model itself; or any `torch.nn.Module` that maps uint8 images to features, whose
            class gives the name.
        reference: uint8 images `(N, C, H, W)` for `pca64`: training images, not the ones compared with.
        weights: file of Inception's weights, if they are not where torch-fidelity keeps them.
        device: where features are computed.

    Raises:
        ValueError: for a source that cannot be opened, or `pca64` without `reference`.
        ImportError: when the package behind `source` is missing.
    """
    if isinstance(source, FeatureExtractor):
        return source.to(device)
    if isinstance(source, str) and (match := re.fullmatch(r"pca(\d+)", source)):
        if reference is None:
            raise ValueError(f"`reference` must be given for {source}: images to find the principal components of.")
        extractor = PixelPCA(reference, int(match[1]))
    elif source == "inception":
        extractor = Inception(weights)
    elif isinstance(source, nn.Module) and not is_known(source):
        extractor = ModuleFeatures(source)
    else:
        label = type(source).__name__ if isinstance(source, nn.Module) else str(source)
        extractor = NetworkFeatures(load_network(source), label)
    return extractor.to(device).eval()


def extract(
    extractor: nn.Module, images: torch.Tensor, batch_size: int = 256, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Features `(N, F)`, float32 on the CPU, of uint8 images `(N, C, H, W)`."""
    batches = [extractor(batch.to(device)).cpu() for batch in images.split(batch_size)]
    return torch.cat(batches)


def unit_rows(images: torch.Tensor) -> np.ndarray:
    """uint8 `(N, C, H, W)` -> float32 `(N, C * H * W)` in [0, 1]."""
    return images.flatten(1).numpy().astype(np.float32) / 255
