"""Metrics of generated images: how far their features lie from those of reference images, and how varied they are.

All take float features `(N, F)` of N images (see [`diffusers_ext.evaluation.features`]) and count in float64.
References: N reference images, M samples, F features.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from diffusers_ext.evaluation.estimates import Estimate, proportion


# Numbers in a matrix of distances that is held at a time: few enough to stay in the processor's cache.
MAX_ENTRIES = 2**20
# Distances that differ by this share are equal: matrix products round differently from row to row.
ROUNDING = 1e-9


def frechet_distance(mean1: Any, cov1: Any, mean2: Any, cov2: Any) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians, Dowson and Landau (1982).

    |mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), where the trace of the root is the sum of the roots of
    the eigenvalues of cov1^(1/2) cov2 cov1^(1/2): symmetric, so that singular covariances need no correction.

    Args:
        mean1, mean2: `(F,)`.
        cov1, cov2: symmetric `(F, F)` without negative eigenvalues.

    Raises:
        ValueError: for shapes that do not match, and for values that are not finite.
    """
    means = [np.atleast_1d(np.asarray(mean, dtype=np.float64)) for mean in (mean1, mean2)]
    covs = [np.atleast_2d(np.asarray(cov, dtype=np.float64)) for cov in (cov1, cov2)]
    size = len(means[0])
    for name, value, shape in zip(
        ("mean1", "mean2", "cov1", "cov2"), means + covs, [(size,)] * 2 + [(size, size)] * 2
    ):
        if value.shape != shape or not np.isfinite(value).all():
            raise ValueError(
                f"`{name}` has shape {value.shape}{'' if np.isfinite(value).all() else ' and is not finite'}; it must "
                f"be finite and of shape {shape}, as `mean1` has {size} values."
            )
    root = _root(covs[0])[0]
    roots = np.sqrt(np.linalg.eigvalsh(root @ covs[1] @ root).clip(0)).sum()
    distance = np.square(means[0] - means[1]).sum() + np.trace(covs[0]) + np.trace(covs[1]) - 2 * roots
    return max(float(distance), 0.0)


def frechet(samples: Any, reference: Any) -> Estimate:
    """Frechet distance of the Gaussians fitted to two sets of features, Heusel et al. (2017),
    https://arxiv.org/abs/1706.08500, Eq. 6. It is biased upwards: compare equal numbers of samples only.

    Args:
        samples: `(M, F)`; reference: `(N, F)`; both at least two.
    """
    sets = _features(samples, reference)
    means, covs, centred, roots = [], [], [], []
    for features in sets:
        mean = features.mean(axis=0)
        centred.append(features - mean)
        means.append(mean)
        covs.append(centred[-1].T @ centred[-1] / (len(features) - 1))
        roots.append(_root(covs[-1]))
    difference, influences = means[0] - means[1], []
    for one, other, sign in ((0, 1, 1), (1, 0, -1)):
        root, inverse = roots[one]
        values, vectors = np.linalg.eigh(root @ covs[other] @ root)
        values = np.sqrt(values.clip(0))
        transport = inverse @ (vectors * values) @ vectors.T @ inverse  # the linear map from one Gaussian to the other
        x = centred[one]
        influence = 2 * sign * x @ difference + np.square(x).sum(1) - np.einsum("nf,nf->n", x @ transport, x)
        influences.append(influence - influence.mean())
        if one == 0:
            distance = np.square(difference).sum() + np.trace(covs[0]) + np.trace(covs[1]) - 2 * values.sum()
    smallest, note = min(map(len, sets)), None
    if smallest <= sets[0].shape[1]:
        note = (
            f"{smallest} images are too few for {sets[0].shape[1]} features: the covariance is singular and the "
            "distance too large. Compare it with distances of as many images only."
        )
    return Estimate(max(float(distance), 0.0), len(sets[0]), len(sets[1]), tuple(influences), note=note)


def _root(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Root of a symmetric positive semidefinite matrix, and the pseudo-inverse of the root."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > values.max() * len(values) * np.finfo(values.dtype).eps
    root = np.sqrt(np.where(kept, values, 0))
    inverse = np.divide(1, root, out=np.zeros_like(root), where=kept)
    return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T


def _features(*sets: Any, least: int = 2) -> list[np.ndarray]:
    arrays = [np.asarray(x.detach().cpu() if isinstance(x, torch.Tensor) else x, dtype=np.float64) for x in sets]
    for array in arrays:
        if array.ndim != 2 or array.shape[1] != arrays[0].shape[1] or len(array) < least:
            raise ValueError(
                f"Features have shapes {[a.shape for a in arrays]}; each must be (images, features) with as many "
                f"features as the others, and at least {least} images."
            )
        if not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
            raise ValueError(f"The features of image {row} are not finite. Look at that image and at the extractor.")
    return arrays


def kernel_distance(
    samples: Any, reference: Any, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Estimate:
    """Kernel distance (KID, when the features are Inception's): unbiased squared maximum mean discrepancy with the
    kernel (x.y / F + 1)^3, Binkowski et al. (2018), https://arxiv.org/abs/1801.01401, Sec. 3. It may be negative.

    Args:
        samples: `(M, F)`; reference: `(N, F)`.
        subsets: how many random subsets of both are averaged.
        subset_size: images in each; no more than there are samples or references.
        seed: of the subsets.

    Returns:
        The mean over subsets; `details` hold `std`, the standard deviation between them, `subsets`, `subset_size`.
    """
    samples, reference = _features(samples, reference)
    size = min(subset_size, len(samples), len(reference))
    if subsets < 1 or size < 2:
        raise ValueError(f"`subsets` ({subsets}) must be at least 1 and `subset_size` ({subset_size}) at least 2.")

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        base = x @ y.T
        base /= x.shape[1]
        base += 1
        return base * base * base

    generator, values = torch.Generator().manual_seed(seed), []
    for _ in range(subsets):
        # Drawn as torchmetrics draws them, so that the same seed gives the same subsets.
        real = reference[torch.randperm(len(reference), generator=generator)[:size].numpy()]
        fake = samples[torch.randperm(len(samples), generator=generator)[:size].numpy()]
        same = [kernel(x, x) for x in (real, fake)]
        within = sum(k.sum() - np.trace(k) for k in same) / (size * (size - 1))
        values.append(within - 2 * kernel(real, fake).mean())

    influences = []
    for one, other in ((samples, reference), (reference, samples)):
        others = [x[np.random.default_rng(seed).permutation(len(x))[:2000]] for x in (one, other)]
        difference = [2 * (kernel(x, others[0]).mean(1) - kernel(x, others[1]).mean(1)) for x in _chunks(one)]
        influences.append(np.concatenate(difference) - np.concatenate(difference).mean())
    details = {"std": float(np.std(values)), "subsets": subsets, "subset_size": size}
    return Estimate(float(np.mean(values)), len(samples), len(reference), tuple(influences), details)


def precision_recall(samples: Any, reference: Any, k: int = 3) -> tuple[Estimate, Estimate]:
    """Improved precision and recall, Kynkaanniemi et al. (2019), https://arxiv.org/abs/1904.06991, Eq. 1 and 2.

    Precision is the share of samples that lie in the reference's manifold (realism), recall the share of references
    that lie in the samples' (variety). A manifold is the union of balls around its images that reach to their `k`-th
    nearest neighbour. Intervals hold the manifolds fixed.

    Args:
        samples: `(M, F)`; reference: `(N, F)`; each more than `k`.
        k: neighbours.
    """
    samples, reference = _features(samples, reference, least=k + 1)
    inside = []
    for points, manifold in ((samples, reference), (reference, samples)):
        radii = _radii(manifold, k)
        inside.append(
            np.concatenate([(d <= radii * (1 + ROUNDING)).any(axis=1) for d in _distances(points, manifold)])
        )
    sizes, details = (len(samples), len(reference)), {"k": k}
    return tuple(proportion(values, *sizes, details) for values in inside)


def density_coverage(samples: Any, reference: Any, k: int = 5) -> tuple[Estimate, Estimate]:
    """Density and coverage, Naeem et al. (2020), https://arxiv.org/abs/2002.09797, Eq. 3 and 4.

    Density counts in how many balls of the reference a sample lies, divided by `k`, and may exceed 1; coverage is the
    share of references whose ball holds a sample. Unlike precision and recall they resist outliers. A ball reaches to
    the `k`-th nearest neighbour, without its surface. Intervals hold the balls fixed, and for coverage the samples.

    Args:
        samples: `(M, F)`; reference: `(N, F)`; each more than `k`.
        k: neighbours.
    """
    samples, reference = _features(samples, reference, least=k + 1)
    radii = _radii(reference, k) * (1 - ROUNDING)
    counts, covered = [], np.zeros(len(reference), dtype=bool)
    for distances in _distances(samples, reference):
        inside = distances < radii
        counts.append(inside.sum(axis=1) / k)
        covered |= inside.any(axis=0)
    sizes, details = (len(samples), len(reference)), {"k": k}
    return proportion(np.concatenate(counts), *sizes, details), proportion(covered, *sizes, details)


def pairwise_distance(samples: Any, labels: Sequence[int] | None = None) -> Estimate:
    """Variety without a reference: mean Euclidean distance of two different samples.

    Args:
        samples: features, or pixels as rows, `(M, F)`.
        labels: classes `(M,)`: `details` then hold the mean within each class of two samples or more, `per_class`, and
            the mean of these, `within_class`.
    """
    (samples,) = _features(samples)

    def means(points: np.ndarray) -> np.ndarray:
        return np.concatenate([d.sum(axis=1) for d in _distances(points, points)]) / (len(points) - 1)

    distances, details = means(samples), {}
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (len(samples),):
            raise ValueError(
                f"`labels` has shape {labels.shape}; there must be one for each of {len(samples)} samples."
            )
        classes = [c for c, count in zip(*np.unique(labels, return_counts=True)) if count > 1]
        per_class = {str(c): float(means(samples[labels == c]).mean()) for c in classes}
        details = {
            "per_class": per_class,
            "within_class": float(np.mean(list(per_class.values()))) if classes else None,
        }
    value = float(distances.mean())
    return Estimate(value, len(samples), None, (2 * (distances - value),), details)


def _radii(points: np.ndarray, k: int) -> np.ndarray:
    """Distance of each point to its `k`-th nearest neighbour, itself not counted."""
    nearest = (torch.from_numpy(d).topk(k + 1, largest=False).values[:, k] for d in _distances(points, points))
    return torch.cat([*nearest]).numpy()


def _distances(points: np.ndarray, others: np.ndarray) -> Iterator[np.ndarray]:
    """Euclidean distances of a few points at a time to all others; equal points have exactly 0."""
    others_norm = np.square(others).sum(axis=1)
    for chunk in _chunks(points, len(others)):
        norms = np.square(chunk).sum(axis=1)[:, None] + others_norm
        squared = (-2 * chunk) @ others.T
        squared += norms
        norms *= 1e-13
        squared[squared < norms] = 0  # rounding
        yield np.sqrt(squared, out=squared)


def _chunks(points: np.ndarray, width: int = 2000) -> Iterator[np.ndarray]:
    """Rows in groups, such that a matrix of `width` columns with as many rows has `MAX_ENTRIES` at most."""
    rows = max(1, MAX_ENTRIES // width)
    for start in range(0, len(points), rows):
        yield points[start : start + rows]
