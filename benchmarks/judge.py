"""A judge of drawn images that is no network: it shares nothing with the models that it judges."""

from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from diffusers_ext.training.data import load_images


LOCAL_MNIST = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist"
MNIST = str(LOCAL_MNIST) if LOCAL_MNIST.is_dir() else "ylecun/mnist"


class Judge:
    """Reads images by their nearest neighbours among training images, and compares their distribution with held-out
    images.

    Args:
        dataset: as `load_images` takes it, with splits `train` and `test` and labels.
        sample_size: height and width in pixels of the images to judge.
        channels: 1 (greyscale) or 3 (colour).
        neighbours: how many are asked, weighted by distance.
    """

    components = 64  # principal components

    def __init__(self, dataset: str, sample_size: int, channels: int = 1, neighbours: int = 3):
        options = {"sample_size": sample_size, "channels": channels, "need_labels": True}
        train, self.held_out = (load_images(dataset, split, **options) for split in ("train", "test"))
        pixels = unit_rows(_images(train))
        self.classifier = KNeighborsClassifier(neighbours, weights="distance", algorithm="brute")
        self.classifier.fit(pixels, train.labels)
        self.features = PixelPCA(PCA(self.components, random_state=0).fit(pixels))

    def accuracy_on_held_out(self) -> float:
        """How often it is right about images of the dataset itself."""
        return self.accuracy(_images(self.held_out), self.held_out.labels)

    def accuracy(self, images: torch.Tensor, labels: np.ndarray) -> float:
        """Share of uint8 images `(N, C, H, W)` that it reads as `labels` `(N,)`."""
        return float((self.classifier.predict(unit_rows(images)) == labels).mean())

    def frechet_distance(self, images: torch.Tensor) -> float:
        """FD-PCA64: Frechet distance between uint8 images `(N, C, H, W)` and the held-out ones, in the space of the
        first 64 principal components of the training images' pixels in [0, 1]."""
        metric = FrechetInceptionDistance(feature=self.features)
        metric.update(_images(self.held_out), real=True)
        metric.update(images, real=False)
        return float(metric.compute())


class PixelPCA(nn.Module):
    """Principal components as a module, which torchmetrics asks for."""

    def __init__(self, pca: PCA):
        super().__init__()
        self.pca, self.num_features = pca, pca.n_components_

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 `(N, C, H, W)` -> `(N, num_features)`."""
        return torch.from_numpy(self.pca.transform(unit_rows(images)))


def unit_rows(images: torch.Tensor) -> np.ndarray:
    """uint8 `(N, C, H, W)` -> `(N, C * H * W)` in [0, 1]."""
    return images.flatten(1).numpy().astype(np.float32) / 255


def _images(data) -> torch.Tensor:
    return data.__getitems__(list(range(len(data))))[0]
