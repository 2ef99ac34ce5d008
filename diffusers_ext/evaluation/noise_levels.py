"""How good a noise-aware classifier is, by noise level, and whether its probabilities can be believed.

Classifier guidance follows the gradient of log p(class | noisy image) at every noise level, so that one number does
not tell whether a classifier will guide. Shapes: B batch, C image channels, H and W pixels, K classes, T timesteps.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_ext.evaluation.estimates import bootstrap, proportion
from diffusers_ext.training.process import ForwardProcess


CALIBRATION_BINS = 15  # as in Guo et al. (2017)
TABLE_HEADING = (
    "| timesteps | mean abar | top-1 (95% interval) | top-{k} | cross entropy | calibration error |",
    "|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class NoiseLevel:
    """Results on one range of timesteps."""

    first_timestep: int
    last_timestep: int
    """the range, both ends in it; 0 is the cleanest"""
    mean_alpha_bar: float
    """share of the signal in the variance of a noisy image, mean over the range"""
    top1: float
    """share of images whose class has the highest logit"""
    top1_low: float
    top1_high: float
    """bootstrap interval of 95%"""
    top5: float
    """share of images whose class is among the five highest logits, or fewer where there are fewer classes"""
    cross_entropy: float
    """in nats; that of guessing is log K"""
    calibration_error: float
    """expected calibration error: mean distance of confidence and accuracy over bins of confidence"""
    bin_confidence: tuple[float, ...]
    bin_accuracy: tuple[float, ...]
    bin_count: tuple[int, ...]
    """the reliability diagram: means over the images in each of 15 equal bins of confidence in [0, 1]"""


@dataclass(frozen=True)
class NoiseLevelReport:
    """Results at every level, cleanest first."""

    levels: tuple[NoiseLevel, ...]
    num_images: int
    """held-out images at each level"""
    num_classes: int
    seed: int
    """of the choice of images, noise and timesteps"""

    @property
    def top_k(self) -> int:
        """The five of `top5`, or the number of classes where it is smaller."""
        return min(5, self.num_classes)

    def metrics(self) -> dict[str, float]:
        """One number per level and kind: `accuracy_level1` is that of the cleanest; `accuracy` is the mean."""
        metrics = {"accuracy": float(np.mean([level.top1 for level in self.levels]))}
        for number, level in enumerate(self.levels, start=1):
            metrics[f"accuracy_level{number}"] = level.top1
            metrics[f"accuracy_top{self.top_k}_level{number}"] = level.top5
            metrics[f"cross_entropy_level{number}"] = level.cross_entropy
            metrics[f"calibration_error_level{number}"] = level.calibration_error
        return metrics

    def table(self) -> str:
        """Markdown, one row per level."""
        rows = [line.format(k=self.top_k) for line in TABLE_HEADING]
        for level in self.levels:
            rows.append(
                f"| {level.first_timestep}-{level.last_timestep} | {level.mean_alpha_bar:.3f} | {level.top1:.1%} "
                f"({level.top1_low:.1%} to {level.top1_high:.1%}) | {level.top5:.1%} | {level.cross_entropy:.3f} | "
                f"{level.calibration_error:.3f} |"
            )
        return "\n".join(rows)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "NoiseLevelReport":
        def level(kept: dict[str, Any]) -> NoiseLevel:
            return NoiseLevel(**{key: tuple(x) if isinstance(x, list) else x for key, x in kept.items()})

        return cls(**values | {"levels": tuple(level(kept) for kept in values["levels"])})

    def figure(self) -> Any:
        """A `matplotlib.figure.Figure`: accuracy by level, and a reliability diagram of each level."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('Plots need matplotlib: pip install "diffusers_ext[eval]"') from error
        columns = 4
        rows = -(-len(self.levels) // columns)
        figure = Figure(figsize=(10, 3 + 2.6 * rows), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=[3, 2.6 * rows])
        self._draw_accuracy(above.subplots())
        grid = below.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for number, axes in enumerate(grid.flat):
            if number >= len(self.levels):
                axes.set_axis_off()
                continue
            level = self.levels[number]
            axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
            filled = np.array(level.bin_count) > 0
            accuracy, confidence = np.array(level.bin_accuracy)[filled], np.array(level.bin_confidence)[filled]
            sizes = 4 + 100 * np.array(level.bin_count)[filled] / self.num_images
            axes.plot(confidence, accuracy, linewidth=1)
            axes.scatter(confidence, accuracy, s=sizes)
            title = f"t = {level.first_timestep}-{level.last_timestep}, error {level.calibration_error:.3f}"
            axes.set(xlim=(0, 1), ylim=(0, 1.02), title=title)
            axes.title.set_size(9)
        below.supxlabel("confidence", fontsize=9)
        below.supylabel("accuracy", fontsize=9)
        return figure

    def _draw_accuracy(self, axes: Any) -> None:
        positions = [(level.first_timestep + level.last_timestep) / 2 for level in self.levels]
        top1 = np.array([level.top1 for level in self.levels])
        bounds = np.array([[level.top1_low for level in self.levels], [level.top1_high for level in self.levels]])
        axes.errorbar(positions, top1, yerr=np.abs(bounds - top1), marker="o", capsize=3, label="top-1")
        if self.top_k < self.num_classes:
            axes.plot(positions, [level.top5 for level in self.levels], marker="s", label=f"top-{self.top_k}")
        axes.axhline(1 / self.num_classes, color="grey", linestyle=":", label="guessing")
        title = f"{self.num_images} held-out images per level, seed {self.seed}"
        axes.set(xlabel="timestep", ylabel="accuracy", ylim=(0, 1.02), title=title)
        axes.legend()

    def save(self, folder: str | Path) -> None:
        """Write `noise_levels.json`, `noise_levels.md` and `noise_levels.png` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("noise_levels.json", json.dumps(self.to_dict(), indent=2)),
            ("noise_levels.md", self.table()),
        ):
            path = folder / f".{name}.tmp"
            path.write_text(text + "\n", encoding="utf-8")
            os.replace(path, folder / name)
        path = folder / ".noise_levels.png.tmp"
        self.figure().savefig(path, dpi=100, format="png")
        os.replace(path, folder / "noise_levels.png")


@torch.no_grad()
def accuracy_by_noise_level(
    classifier: nn.Module,
    process: Any,
    data: Any,
    *,
    levels: int = 8,
    num_images: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> NoiseLevelReport:
    """Measure a classifier on held-out images, each once in every level.

    Noise and timestep of image number n depend on (seed, n) only, neither on the batch size nor on the classifier.

    Args:
        classifier: called with noisy images `(B, C, H, W)` and timesteps `(B,)`; returns logits `(B, K)`, or an output
            that has them.
        process: a scheduler of diffusers with `betas`, or a [`ForwardProcess`].
        data: held-out labelled images, as `open_data` gives them.
        levels: ranges of timesteps of equal length; guided-diffusion reports four.
        num_images: so many, drawn by chance with the seed, the same for every classifier; None takes all in order.
        batch_size: images at a time.
        seed: of the choice of images, noise and timesteps.
        device: where the classifier is.

    Raises:
        ValueError: for a process without betas, for data without labels, and for more levels than timesteps.
    """
    if not hasattr(process, "signal_share"):
        if getattr(process, "betas", None) is None:
            raise ValueError(
                f"`process` is a {type(process).__name__}, which has no `betas`; noise levels are those of a "
                "variance-preserving process such as DDPMScheduler's."
            )
        process = ForwardProcess(process.betas, device)
    total = process.num_timesteps
    if not 1 <= levels <= total:
        raise ValueError(f"`levels` ({levels}) must lie between 1 and {total}, the number of timesteps.")
    edges = [total * index // levels for index in range(levels + 1)]
    starts, widths = torch.tensor(edges[:-1]), torch.tensor(edges).diff()

    dtype, training, number = getattr(classifier, "dtype", torch.float32), classifier.training, 0
    logits, labels = [[] for _ in range(levels)], []
    classifier.eval()
    try:
        for batch in _batches(data, some_rows(len(data), num_images, seed), batch_size):
            x_start = batch.images.to(device).float() / 127.5 - 1
            noise, shares = _random(seed, range(number, number + len(x_start)), levels, x_start.shape[1:])
            number += len(x_start)
            labels.append(batch.labels)
            for level in range(levels):
                timesteps = (starts[level] + (shares[:, level] * widths[level]).long()).to(device)
                x_t = process.add_noise(x_start, noise[:, level].to(device), timesteps)
                output = classifier(x_t.to(dtype), timesteps)
                logits[level].append(getattr(output, "logits", output).float().cpu())
    finally:
        classifier.train(training)
    labels = torch.cat(labels)
    signal = process.signal_share(torch.arange(total, device=device)).double().cpu()
    results = []
    for first, end, seen in zip(edges, edges[1:], logits):
        results.append(_level(torch.cat(seen), labels, (first, end - 1), signal[first:end].mean().item()))
    return NoiseLevelReport(tuple(results), len(labels), logits[0][0].shape[1], seed)


def some_rows(length: int, limit: int | None, seed: int) -> list[int]:
    """`limit` of `length` rows, in order; drawn by chance, since a split may be sorted by class. No limit: all."""
    if limit is None or limit >= length:
        return list(range(length))
    return sorted(np.random.default_rng(seed).choice(length, limit, replace=False).tolist())


def _batches(data: Any, rows: list[int], batch_size: int) -> Iterator[Any]:
    for start in range(0, len(rows), batch_size):
        batch = data.rows(rows[start : start + batch_size])
        if batch.labels is None:
            raise ValueError("`data` has no labels: name its column with `label_column`.")
        yield batch


def _random(seed: int, numbers: range, levels: int, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise `(B, levels, C, H, W)` and places within each level `(B, levels)` in [0, 1) of images `numbers`."""
    noise, shares = [], []
    for number in numbers:
        state = np.random.SeedSequence((seed, number)).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(state))
        noise.append(torch.randn(levels, *shape, generator=generator))
        shares.append(torch.rand(levels, generator=generator))
    return torch.stack(noise), torch.stack(shares)


def _level(logits: torch.Tensor, labels: torch.Tensor, timesteps: tuple[int, int], alpha_bar: float) -> NoiseLevel:
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    right = (predicted == labels).double()
    highest = logits.topk(min(5, logits.shape[1]), dim=1).indices
    accuracy = proportion(right.numpy(), len(labels))
    low, high = bootstrap(accuracy)
    bins = calibration(confidence.numpy(), right.numpy())
    counts = bins["count"]
    return NoiseLevel(
        first_timestep=timesteps[0],
        last_timestep=timesteps[1],
        mean_alpha_bar=alpha_bar,
        top1=accuracy.value,
        top1_low=low,
        top1_high=high,
        top5=(highest == labels[:, None]).any(dim=1).double().mean().item(),
        cross_entropy=F.cross_entropy(logits.double(), labels).item(),
        calibration_error=float((counts * np.abs(bins["accuracy"] - bins["confidence"])).sum() / len(labels)),
        bin_confidence=tuple(bins["confidence"].tolist()),
        bin_accuracy=tuple(bins["accuracy"].tolist()),
        bin_count=tuple(counts.tolist()),
    )


def calibration(confidence: np.ndarray, right: np.ndarray, bins: int = CALIBRATION_BINS) -> dict[str, np.ndarray]:
    """The reliability diagram of Guo et al. (2017), https://arxiv.org/abs/1706.04599, Sec. 2.

    Args:
        confidence: probability of the predicted class, `(N,)`.
        right: 1 where the prediction is right, else 0, `(N,)`.
        bins: of equal width over [0, 1]; a value on the border belongs to the lower one.

    Returns:
        `confidence`, `accuracy` (means, 0 in an empty bin) and `count`, each `(bins,)`.
    """
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    sums = [np.bincount(index, weights=values, minlength=bins) for values in (confidence, right)]
    means = [total / np.maximum(count, 1) for total in sums]
    return {"confidence": means[0], "accuracy": means[1], "count": count}
