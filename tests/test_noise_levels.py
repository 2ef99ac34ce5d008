"""How good a noise-aware classifier is, by noise level."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.classification import MulticlassCalibrationError

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_ext import ADMClassifierModel
from diffusers_ext.evaluation.noise_levels import NoiseLevelReport, accuracy_by_noise_level, calibration
from diffusers_ext.training.config import ClassifierTrainingConfig
from diffusers_ext.training.data import Batch, open_data


SCHEDULER = DDPMScheduler(1000)


@pytest.fixture(scope="module")
def digits():
    return open_data(ClassifierTrainingConfig(), "test", sample_size=8, channels=1, need_labels=True)


class Blank:
    """Black images with labels: whoever is right about them knows the labels."""

    def __init__(self, num_classes: int, count: int = 40):
        self.labels = torch.arange(count) % num_classes
        self.images = torch.zeros(count, 1, 4, 4, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, indices: list[int]) -> Batch:
        return Batch(self.images[indices], self.labels[indices], None, indices)


class Oracle(nn.Module):
    """Knows the labels, in their order, and is as sure as `logit` says; remembers what it was shown."""

    def __init__(self, labels: torch.Tensor, num_classes: int, logit: float):
        super().__init__()
        self.labels, self.num_classes, self.logit, self.seen = labels, num_classes, logit, []

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.seen.append(timestep)
        return self.logit * nn.functional.one_hot(self.labels, self.num_classes).float()


def test_a_perfect_classifier_is_right_everywhere_and_calibrated():
    data = Blank(10)
    oracle = Oracle(data.labels, 10, logit=100.0)
    report = accuracy_by_noise_level(oracle, SCHEDULER, data, batch_size=len(data))
    assert len(report.levels) == 8 and report.num_images == 40
    for level in report.levels:
        assert level.top1 == level.top5 == level.top1_low == level.top1_high == 1
        assert level.calibration_error == pytest.approx(0, abs=1e-9)
        assert level.cross_entropy == pytest.approx(0, abs=1e-9)
    for number, (timesteps, level) in enumerate(zip(oracle.seen, report.levels)):
        assert (level.first_timestep, level.last_timestep) == (125 * number, 125 * number + 124)
        assert timesteps.min() >= level.first_timestep and timesteps.max() <= level.last_timestep
        assert timesteps.unique().numel() > 20
    alpha_bars = SCHEDULER.alphas_cumprod.double()
    assert report.levels[0].mean_alpha_bar == pytest.approx(alpha_bars[:125].mean().item(), rel=1e-5)
    assert report.levels[7].mean_alpha_bar == pytest.approx(alpha_bars[875:].mean().item(), rel=1e-3)


def test_an_indifferent_classifier_guesses(digits):
    torch.manual_seed(0)
    classifier = ADMClassifierModel(
        sample_size=8, in_channels=1, num_classes=10, block_out_channels=(8,), layers_per_block=1,
        attention_resolutions=(), attention_head_dim=8, norm_num_groups=8, pool="adaptive",
    )  # fmt: skip
    report = accuracy_by_noise_level(classifier.train(), SCHEDULER, digits, batch_size=100)
    assert classifier.training
    for level in report.levels:  # its last layer is zero
        assert level.cross_entropy == pytest.approx(math.log(10))
        assert level.top1 == pytest.approx(0.1, abs=0.05)
        assert level.calibration_error == pytest.approx(abs(level.top1 - 0.1), abs=1e-6)


class Pixels(nn.Module):
    """A small network whose answers depend on image and noise."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.SiLU(), nn.Linear(16, 10))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return 5 * self.layers(sample)


def test_results_depend_on_the_seed_only(digits):
    torch.manual_seed(0)
    classifier = Pixels()
    reports = [
        accuracy_by_noise_level(classifier, SCHEDULER, digits, num_images=60, batch_size=size, seed=seed)
        for size, seed in ((7, 0), (60, 0), (60, 1))
    ]
    entropies = [[level.cross_entropy for level in report.levels] for report in reports]
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-5)
    assert [level.top1 for level in reports[0].levels] == [level.top1 for level in reports[1].levels]
    assert entropies[0] != pytest.approx(entropies[2], rel=1e-3)
    state = torch.get_rng_state()
    accuracy_by_noise_level(classifier, SCHEDULER, digits, num_images=8)
    assert torch.equal(torch.get_rng_state(), state)


def test_some_images_of_a_sorted_split_are_drawn_by_chance():
    data, drawn = Blank(10, count=200), []
    data.labels = data.labels.sort().values
    rows = data.rows
    data.rows = lambda indices: drawn.append(indices) or rows(indices)
    for seed in (0, 0, 1):
        oracle = Oracle(torch.zeros(40, dtype=torch.long), 10, logit=1.0)
        accuracy_by_noise_level(oracle, SCHEDULER, data, num_images=40, seed=seed)
    assert data.labels[drawn[0]].unique().numel() == 10 and len(set(drawn[0])) == 40
    assert drawn[0] == drawn[1] != drawn[2]
    accuracy_by_noise_level(Oracle(data.labels, 10, logit=1.0), SCHEDULER, data, batch_size=200)
    assert drawn[3] == list(range(200))


def test_noise_hides_the_class_from_a_trained_classifier(digits):
    torch.manual_seed(0)
    classifier = Pixels()
    optimizer = torch.optim.Adam(classifier.parameters(), 1e-2)
    train = open_data(ClassifierTrainingConfig(), "train", sample_size=8, channels=1, need_labels=True)
    for batch in (train.rows(list(range(i * 100, i * 100 + 100))) for i in [*range(15)] * 10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(classifier(batch.images / 127.5 - 1, None), batch.labels).backward()
        optimizer.step()
    levels = accuracy_by_noise_level(classifier, SCHEDULER, digits, batch_size=100).levels
    assert levels[0].top1 > 0.8 and levels[0].top1_low < levels[0].top1 < levels[0].top1_high
    assert levels[7].top1 < 0.3 and levels[0].top5 > levels[7].top5
    assert levels[7].cross_entropy > levels[0].cross_entropy
    assert levels[7].calibration_error > 0.3  # it was never told of noise, and stays sure


def test_the_calibration_error_is_that_of_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(500, 10, generator=generator)
    labels = torch.randint(10, (500,), generator=generator)
    confidence, predicted = logits.softmax(1).max(1)
    bins = calibration(confidence.double().numpy(), (predicted == labels).double().numpy())
    error = (bins["count"] * np.abs(bins["accuracy"] - bins["confidence"])).sum() / 500
    assert bins["count"].sum() == 500
    assert error == pytest.approx(MulticlassCalibrationError(10, n_bins=15)(logits, labels).item(), abs=1e-6)


def test_a_report_is_a_table_numbers_and_a_plot(digits, tmp_path):
    torch.manual_seed(0)
    report = accuracy_by_noise_level(Pixels(), SCHEDULER, digits, num_images=50)
    report.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"noise_levels.{x}" for x in ("json", "md", "png")]
    lines = (tmp_path / "noise_levels.md").read_text().splitlines()
    assert len(lines) == 2 + 8 and lines[2].startswith("| 0-124 |") and lines[9].startswith("| 875-999 |")
    assert NoiseLevelReport.from_dict(json.loads((tmp_path / "noise_levels.json").read_text())) == report
    picture = np.asarray(Image.open(tmp_path / "noise_levels.png"))
    assert min(picture.shape[:2]) > 300 and picture.std() > 10
    metrics = report.metrics()
    assert metrics["accuracy_level3"] == report.levels[2].top1 and "accuracy_top5_level8" in metrics


def test_few_classes_and_other_numbers_of_levels():
    data = Blank(3, count=9)
    oracle = Oracle(data.labels, 3, logit=1.0)
    report = accuracy_by_noise_level(oracle, DDPMScheduler(10), data, levels=3, batch_size=9)
    assert [(level.first_timestep, level.last_timestep) for level in report.levels] == [(0, 2), (3, 5), (6, 9)]
    assert report.top_k == 3 and "top-3" in report.table()
    assert report.levels[0].calibration_error == pytest.approx(1 - math.e / (math.e + 2))


def test_what_cannot_be_measured_is_refused():
    data = Blank(10)
    oracle = Oracle(data.labels, 10, logit=1.0)
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler.*no `betas`"):
        accuracy_by_noise_level(oracle, FlowMatchEulerDiscreteScheduler(), data)
    with pytest.raises(ValueError, match=r"`levels` \(8\) must lie between 1 and 4"):
        accuracy_by_noise_level(oracle, DDPMScheduler(4), data)
    data.rows = lambda indices: Batch(data.images[indices], None, None, indices)
    with pytest.raises(ValueError, match="`data` has no labels"):
        accuracy_by_noise_level(oracle, SCHEDULER, data)
