"""Metrics of images on features: known answers, and the values of torchmetrics."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import BertConfig, BertModel, BertTokenizer

from diffusers import DDPMScheduler

from diffusers_ext import ComposableUNet2DModel
from diffusers_ext.evaluation.clip_score import clip_score
from diffusers_ext.evaluation.estimates import Estimate, bootstrap, proportion
from diffusers_ext.evaluation.evaluate import evaluate
from diffusers_ext.evaluation.metrics import (
    density_coverage,
    frechet,
    frechet_distance,
    kernel_distance,
    pairwise_distance,
    precision_recall,
)
from diffusers_ext.evaluation.options import EvaluateConfig
from diffusers_ext.pipelines import ClassConditionalPipeline


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def covariance(seed: int, size: int) -> np.ndarray:
    factor = normal(seed, size, size)
    return factor @ factor.T / size


# Frechet distance


def test_frechet_distance_of_gaussians_with_known_answers():
    eye = np.eye(3)
    assert frechet_distance([1, 2, 3], eye, [1, 2, 3], eye) == pytest.approx(0, abs=1e-12)
    assert frechet_distance([0, 0, 0], eye, [3, 0, 4], eye) == pytest.approx(25)
    assert frechet_distance([0, 0, 0], 4 * eye, [1, 0, 0], 9 * eye) == pytest.approx(1 + 3 * (2 - 3) ** 2)
    commuting = np.diag([1.0, 4.0, 0.0]), np.diag([9.0, 0.0, 25.0])
    assert frechet_distance(np.zeros(3), commuting[0], np.zeros(3), commuting[1]) == pytest.approx(4 + 4 + 25)
    assert frechet_distance([1.0], [[4.0]], [3.0], [[1.0]]) == pytest.approx(4 + 1)
    one, other = covariance(0, 6), covariance(1, 6)
    root = scipy.linalg.sqrtm(one @ other).real
    expected = np.trace(one + other - 2 * root) + 6 * 0.25
    assert frechet_distance(np.zeros(6), one, np.full(6, 0.5), other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(torch.zeros(6), torch.tensor(one), torch.zeros(6), torch.tensor(one)) < 1e-9


def test_frechet_distance_of_singular_covariances_is_finite_and_symmetric():
    factor = normal(0, 50, 3)
    one, other = factor @ factor.T, np.zeros((50, 50))
    zero = np.zeros(50)
    assert frechet_distance(zero, one, zero, other) == pytest.approx(np.trace(one))
    assert frechet_distance(zero, one, zero, one) == pytest.approx(0, abs=1e-6)
    third = covariance(2, 50)
    assert frechet_distance(zero, one, zero, third) == pytest.approx(frechet_distance(zero, third, zero, one))


def test_wrong_moments_are_refused():
    with pytest.raises(ValueError, match=r"`cov2` has shape \(2, 2\)"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(3), np.eye(2))
    with pytest.raises(ValueError, match="`mean2` .*is not finite"):
        frechet_distance(np.zeros(3), np.eye(3), np.full(3, np.nan), np.eye(3))


def test_frechet_distance_of_features_is_that_of_their_moments():
    samples, reference = normal(0, 300, 8) * 1.3 + 0.2, normal(1, 400, 8)
    moments = samples.mean(0), np.cov(samples.T), reference.mean(0), np.cov(reference.T)
    estimate = frechet(samples, reference)
    assert estimate.value == pytest.approx(frechet_distance(*moments)) and estimate.note is None
    assert (estimate.num_samples, estimate.num_reference) == (300, 400)
    few = frechet(normal(0, 20, 30), normal(1, 100, 30))
    assert np.isfinite(few.value) and "20 images are too few for 30 features" in few.note
    assert all(np.isfinite(influence).all() for influence in few.influences)
    assert frechet(samples, samples).value == pytest.approx(0, abs=1e-9)


class Rows(nn.Module):
    """Pixels as features, for torchmetrics."""

    num_features = 12

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).double() / 255


@pytest.fixture(scope="module")
def images():
    """Two sets of images (M, 3, 2, 2) and (N, 3, 2, 2), uint8, of different brightness."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(low, 256, (n, 3, 2, 2), dtype=torch.uint8, generator=generator)
        for n, low in ((80, 40), (120, 0))
    ]


def test_frechet_distance_equals_torchmetrics(images):
    metric = FrechetInceptionDistance(feature=Rows()).set_dtype(torch.float64)
    metric.update(images[0], real=False)
    metric.update(images[1], real=True)
    features = [Rows()(x) for x in images]
    assert frechet(*features).value == pytest.approx(metric.compute().item(), rel=1e-8)


# Kernel distance


def test_kernel_distance_equals_torchmetrics(images):
    metric = KernelInceptionDistance(feature=Rows(), subsets=7, subset_size=50)
    metric.update(images[0], real=False)
    metric.update(images[1], real=True)
    torch.manual_seed(3)
    mean, std = metric.compute()
    estimate = kernel_distance(*[Rows()(x) for x in images], subsets=7, subset_size=50, seed=3)
    assert estimate.value == pytest.approx(mean.item(), rel=1e-5)
    assert estimate.details == {"std": pytest.approx(std.item(), rel=1e-4), "subsets": 7, "subset_size": 50}


def test_kernel_distance_is_unbiased():
    values = []
    for seed in range(200):
        samples, reference = normal(seed, 2, 20, 4)
        values.append(kernel_distance(samples, reference, subsets=1).value)
    values = np.array(values)
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(200)
    assert (values < 0).any() and (values > 0).any()
    shifted = kernel_distance(normal(0, 200, 4) + 1, normal(1, 200, 4)).value
    assert shifted > 10 * values.std()


# Precision, recall, density, coverage


def test_the_same_images_and_distant_ones():
    points = normal(0, 60, 5)
    near = [*precision_recall(points, points.copy()), *density_coverage(points, points.copy())]
    assert [estimate.value for estimate in near] == [1, 1, 1, 1]
    far = [*precision_recall(points, points + 100), *density_coverage(points, points + 100)]
    assert [estimate.value for estimate in far] == [0, 0, 0, 0]


def test_precision_and_recall_by_hand():
    reference = np.array([[0.0], [1.0], [3.0]])  # k = 1: radii 1, 1, 2, so the manifold is [-1, 5]
    samples = np.array([[5.0], [5.5], [9.0], [-1.1]])  # radii 0.5, 0.5, 3.5, 6.1: [4.5, 6], [5.5, 12.5], [-7.2, 5]
    precision, recall = precision_recall(samples, reference, k=1)
    assert precision.value == 1 / 4 and recall.value == 1
    # Balls without their surface: (-1, 1), (0, 2), (1, 5). The first sample lies on none.
    samples = np.array([[5.0], [0.5], [4.0], [8.0]])
    density, coverage = density_coverage(samples, reference, k=1)
    assert density.value == (0 + 2 + 1 + 0) / 4 and coverage.value == 1
    density, coverage = density_coverage(samples[[0, 2, 3]], reference, k=1)
    assert density.value == pytest.approx(1 / 3) and coverage.value == pytest.approx(1 / 3)


def test_distances_do_not_depend_on_the_chunks(monkeypatch):
    samples, reference = normal(0, 90, 6), normal(1, 70, 6) * 1.2
    whole = [e.value for e in (*precision_recall(samples, reference), *density_coverage(samples, reference))]
    spread = pairwise_distance(samples).value
    monkeypatch.setattr("diffusers_ext.evaluation.metrics.MAX_ENTRIES", 500)
    parts = [e.value for e in (*precision_recall(samples, reference), *density_coverage(samples, reference))]
    assert parts == whole and 0 < whole[0] < 1
    assert pairwise_distance(samples).value == pytest.approx(spread)


def test_repeated_images_are_equal_whatever_the_rounding():
    points = np.repeat(normal(0, 10, 300) * 1e3, 5, axis=0)  # all radii are 0
    precision, recall = precision_recall(points[::-1].copy(), points)
    assert precision.value == recall.value == 1


# Variety


def test_pairwise_distance():
    points = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    assert pairwise_distance(points).value == pytest.approx(10 / 3)
    estimate = pairwise_distance(points, labels=[0, 1, 0])
    assert estimate.details == {"per_class": {"0": 0.0}, "within_class": 0.0}
    grid = normal(0, 30, 4)
    expected = torch.pdist(torch.from_numpy(grid)).mean().item()
    assert pairwise_distance(grid).value == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"`labels` has shape \(2,\)"):
        pairwise_distance(points, labels=[0, 1])


# Intervals


def spread_of(metric, draw, times: int = 60) -> tuple[float, float]:
    """Standard deviation of a metric over fresh data, and what the interval of one data set implies."""
    estimates = [metric(*draw(np.random.default_rng(seed))) for seed in range(times)]
    widths = [np.subtract(*bootstrap(estimate, 200)[::-1]) / (2 * 1.96) for estimate in estimates[:10]]
    return float(np.std([estimate.value for estimate in estimates])), float(np.mean(widths))


@pytest.mark.parametrize(
    "metric",
    [
        frechet,
        lambda samples, reference: kernel_distance(samples, reference, subsets=20, subset_size=150),
        lambda samples, reference: pairwise_distance(samples),
    ],
    ids=["frechet", "kernel", "pairwise"],
)
def test_intervals_are_as_wide_as_the_metric_varies(metric):
    def draw(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return 1.4 * generator.standard_normal((200, 4)) + 0.5, generator.standard_normal((250, 4))

    actual, estimated = spread_of(metric, draw)
    assert estimated == pytest.approx(actual, rel=0.35)


def test_the_interval_of_a_share_is_binomial_and_depends_on_the_seed():
    estimate = proportion(np.arange(400) < 100, 400)
    low, high = bootstrap(estimate, 2000, seed=1)
    assert (low + high) / 2 == pytest.approx(0.25, abs=0.005)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.25 * 0.75 / 400), rel=0.1)
    assert bootstrap(estimate, 2000, seed=1) == (low, high) != bootstrap(estimate, 2000, seed=2)
    narrow = bootstrap(estimate, 2000, seed=1, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap(Estimate(1.0, 1)) == (None, None)


def test_the_interval_of_a_share_stays_between_none_and_all():
    for number in range(2, 60):
        few = bootstrap(proportion(np.arange(number) < 1, number), 100)
        most = bootstrap(proportion(np.arange(number) > 0, number), 100)
        assert f"{few[0]:.1%}" == "0.0%" and 0 <= few[0] and most[1] <= 1


def test_features_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"\[\(4, 3\), \(4, 2\)\]"):
        frechet(normal(0, 4, 3), normal(0, 4, 2))
    with pytest.raises(ValueError, match="at least 4 images"):
        precision_recall(normal(0, 3, 2), normal(0, 9, 2))
    broken = normal(0, 9, 2)
    broken[6, 1] = np.inf
    with pytest.raises(ValueError, match="features of image 6 are not finite"):
        frechet(normal(0, 9, 2), broken)
    with pytest.raises(ValueError, match=r"`subsets` \(0\)"):
        kernel_distance(normal(0, 9, 2), normal(1, 9, 2), subsets=0)


# CLIP score


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    words = ["<pad>", "<end>", "<unknown>", "a", "red", "blue", "square", "circle"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    ).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = CLIPConfig(
        text_config=sizes
        | {"vocab_size": 8, "max_position_embeddings": 6, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
        vision_config=sizes | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False).save_pretrained(folder)
    return folder


CAPTIONS = ["a red square", "blue circle", "a blue circle square red a blue"]


def test_clip_score_is_the_cosine_of_image_and_caption(clip_folder):
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    pixels = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    estimate = clip_score(pixels, CAPTIONS, clip_folder, batch_size=2)
    model = CLIPModel.from_pretrained(clip_folder)
    tokens = AutoTokenizer.from_pretrained(clip_folder)(
        CAPTIONS, padding=True, truncation=True, max_length=6, return_tensors="pt"
    )
    seen = CLIPImageProcessorPil.from_pretrained(clip_folder)(pixels, return_tensors="pt")
    with torch.no_grad():
        output = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, **seen)
    cosine = (output.image_embeds * output.text_embeds).sum(1)
    expected = 100 * cosine.clamp(min=0)
    assert estimate.num_samples == 3 and expected.max() > 0
    assert estimate.value == pytest.approx(expected.mean().item(), rel=1e-4)
    assert estimate.influences[0] + estimate.value == pytest.approx(expected.numpy(), rel=1e-3, abs=1e-4)


def test_clip_score_needs_a_caption_per_image_and_a_model_of_both(clip_folder, root):
    with pytest.raises(ValueError, match="`captions` holds 3 for 2 images"):
        clip_score(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), CAPTIONS, clip_folder)


def test_samples_of_a_sweep_are_compared_with_their_own_prompts(clip_folder, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "square", "circle"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    width = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = BertModel(BertConfig(vocab_size=len(words), **width))
    text = {"text_encoder": encoder, "tokenizer": BertTokenizer(str(tmp_path / "vocab.txt"))}
    network = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "norm_num_groups": 4}
    network |= {"layers_per_block": 1, "attention_resolutions": (8,), "attention_head_dim": 8}
    unet = ComposableUNet2DModel(cross_attention_dim=16, **network)
    ClassConditionalPipeline(unet=unet, scheduler=DDPMScheduler(), **text).save_pretrained(tmp_path / "text")
    files = [tmp_path / "red.txt", tmp_path / "blue.txt"]
    for file, prompt in zip(files, ("red square", "blue circle")):
        file.write_text(prompt)
    sweep = (f"prompts={files[0]},{files[1]}",)
    options = {"metrics": ("clip_score",), "clip_model": str(clip_folder), "num_bootstrap": 10, "device": "cpu"}
    options |= {"num_samples": 3, "num_inference_steps": 2, "output": str(tmp_path / "sweep")}
    config = EvaluateConfig(str(tmp_path / "text"), reference="digits", **options)
    points = evaluate(replace(config, sweep=sweep))["points"]
    assert [point["swept"] for point in points] == [{"prompts": "red.txt"}, {"prompts": "blue.txt"}]
    assert str(tmp_path) not in (tmp_path / "text" / "README.md").read_text()
    for file, point in zip(files, points):
        alone = evaluate(replace(config, prompts=str(file), output=str(tmp_path / file.stem)))["points"][0]
        assert alone["settings"] == point["settings"] and alone["metrics"] == point["metrics"]
