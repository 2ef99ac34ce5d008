"""Perceptual and adversarial losses: they train, only what they should, and go on exactly where they stopped."""

import copy
import os
import socket
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState
from sklearn.datasets import load_digits
from transformers import ConvNextConfig, ConvNextModel, ViTConfig, ViTModel

from diffusers_ext import ADMClassifierModel
from diffusers_ext.training.config import UNetTrainingConfig
from diffusers_ext.training.critics import MAX_LAYERS, AdversarialLoss, Critics, PerceptualLoss, feature_maps
from diffusers_ext.training.objectives import DenoisingStep, Objective


def _classifier() -> ADMClassifierModel:
    options = {"block_out_channels": (16, 32), "layers_per_block": 1, "attention_resolutions": (4,)}
    model = ADMClassifierModel(8, 1, 10, **options, attention_head_dim=16, norm_num_groups=8)
    for parameter in model.parameters():  # its output layers start at zero
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def _vit() -> ViTModel:
    return ViTModel(
        ViTConfig(
            image_size=16,
            patch_size=4,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
        )
    )


def _convnext() -> ConvNextModel:
    return ConvNextModel(ConvNextConfig(image_size=16, num_stages=2, hidden_sizes=[16, 32], depths=[1, 1]))


@pytest.fixture(scope="module", params=[_classifier, _vit, _convnext], ids=["classifier", "vit", "convnext"])
def features(request, tmp_path_factory) -> str:
    """Folder of a vision network."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("features")
    request.param().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    _classifier().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    """`(256, 1, 8, 8)` in [-1, 1]."""
    return torch.from_numpy(load_digits().images[:256]).float()[:, None] / 8 - 1


def test_the_perceptual_loss_trains_images_towards_real_ones(features, digits):
    torch.manual_seed(0)
    loss = PerceptualLoss(features, 1.0)
    real = digits[:8]
    images = (real + 0.5 * torch.randn_like(real)).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.05)
    assert loss(real, real).max() < 1e-6
    before = loss(images, real)
    assert before.shape == (8,) and before.min() > 0
    for _ in range(30):
        optimizer.zero_grad()
        loss(images, real).mean().backward()
        optimizer.step()
    assert loss(images, real).mean() < 0.5 * before.mean()
    assert all(parameter.grad is None for parameter in loss.network.parameters())


def test_the_discriminator_tells_real_digits_from_blurred_ones_and_trains_images(features, digits):
    torch.manual_seed(0)
    blurred = F.avg_pool2d(F.pad(digits, (1, 1, 1, 1), value=-1.0), 3, stride=1)
    loss = AdversarialLoss(features, 1.0, learning_rate=1e-2, channels=1, sample_size=8)
    weights = torch.ones(64)
    history = []
    for step in range(40):
        rows = torch.arange(64) + 64 * (step % 3)
        history.append(loss(blurred[rows], digits[rows], weights)[1].mean().item())
    assert history[0] == pytest.approx(2, abs=0.5)  # undecided
    assert history[-1] < 1.2
    held_out = slice(192, 256)
    frozen = copy.deepcopy(loss.discriminator)

    def fakeness(images):
        return -torch.stack([v.mean(dim=1) for v in frozen(feature_maps(loss.network, images))]).mean(dim=0)

    with torch.no_grad():
        assert (fakeness(blurred[held_out]) > fakeness(digits[held_out])).float().mean() > 0.9
    images = blurred[held_out].clone().requires_grad_()
    verdict, _ = loss(images, digits[held_out], weights)
    verdict.sum().backward()
    assert all(p.grad is not None for p in loss.discriminator.parameters())  # of its own step
    with torch.no_grad():
        assert fakeness(images - 0.05 * images.grad.sign()).mean() < fakeness(images).mean()


def test_the_verdict_leaves_no_gradients_in_the_discriminator(classifier, digits):
    loss = AdversarialLoss(classifier, 1.0, channels=1, sample_size=8)
    images = digits[:4].clone().requires_grad_()
    verdict, discriminator_loss = loss(images, digits[4:8], torch.ones(4))
    assert not discriminator_loss.requires_grad
    before = [parameter.grad.clone() for parameter in loss.discriminator.parameters()]
    verdict.mean().backward()
    assert all(torch.equal(p.grad, old) for p, old in zip(loss.discriminator.parameters(), before, strict=True))
    assert images.grad.abs().sum() > 0


def test_a_step_that_is_not_finite_is_left_out(classifier, digits):
    loss = AdversarialLoss(classifier, 1.0, channels=1, sample_size=8)
    before = copy.deepcopy(loss.discriminator.state_dict())
    loss(digits[:2] * float("nan"), digits[2:4], torch.ones(2))
    assert all(torch.equal(value, before[name]) for name, value in loss.discriminator.state_dict().items())
    loss(digits[:2], digits[2:4], torch.ones(2))
    assert any(not torch.equal(value, before[name]) for name, value in loss.discriminator.state_dict().items())


def test_grey_images_of_any_size_pass_through_at_most_four_layers(features):
    loss = PerceptualLoss(features, 1.0)
    for size in (8, 12, 16):
        maps = feature_maps(loss.network, torch.zeros(2, 1, size, size))
        assert 1 < len(maps) <= MAX_LAYERS and all(values.ndim == 3 and len(values) == 2 for values in maps)


def critics_of(features: str, **options) -> tuple[UNetTrainingConfig, Critics]:
    config = UNetTrainingConfig(
        learned_variance=False, perceptual_model=features, adversarial_model=features, **options
    )
    return config, Critics(config, channels=1, sample_size=8)


def test_critics_add_to_the_loss_by_weight_and_signal(classifier, digits):
    config, critics = critics_of(classifier, perceptual_weight=0.5, adversarial_weight=0.25)
    x_start, share = digits[:3], torch.tensor([0.0, 0.5, 1.0])
    predicted = (x_start + 0.3 * torch.randn(3, 1, 8, 8)).requires_grad_()
    step = DenoisingStep({"loss": torch.ones(3), "mse": torch.ones(3)}, predicted, share, torch.arange(3))
    losses = critics.losses(step, x_start)
    assert set(losses) == {"loss", "mse", "perceptual", "adversarial", "discriminator"}
    expected = 1 + share * (0.5 * losses["perceptual"] + 0.25 * losses["adversarial"])
    torch.testing.assert_close(losses["loss"], expected)
    losses["loss"].mean().backward()
    assert predicted.grad[0].abs().max() == 0 and predicted.grad[1:].abs().sum() > 0
    assert set(step.losses) == {"loss", "mse"}
    config, none = replace(config, perceptual_model=None, adversarial_model=None), None
    none = Critics(config, channels=1, sample_size=8)
    assert none.losses(step, x_start) == step.losses and none.state_dict() == {}


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
def test_a_denoiser_trains_with_critics_and_resumes_exactly(prediction_type, classifier, digits):
    """Six steps at once, and three, then three more from the saved states."""

    def run(steps, network, optimizer, critics):
        for number in steps:
            torch.manual_seed(number)
            rows = torch.randint(256, (16,))
            step = objective.step(lambda x_t, timesteps: network(x_t), digits[rows])
            losses = critics.losses(step, digits[rows])
            optimizer.zero_grad()
            losses["loss"].mean().backward()
            optimizer.step()
        return losses

    def start():
        torch.manual_seed(0)
        network = torch.nn.Conv2d(1, 1, 3, padding=1)
        return network, torch.optim.SGD(network.parameters(), lr=1e-2), critics_of(classifier)[1]

    objective = Objective(UNetTrainingConfig(learned_variance=False, prediction_type=prediction_type))
    once = start()
    expected = run(range(6), *once)
    half = start()
    run(range(3), *half)
    again = start()
    again[0].load_state_dict(half[0].state_dict())
    again[2].load_state_dict(copy.deepcopy(half[2].state_dict()))
    losses = run(range(3, 6), *again)
    for name, values in expected.items():
        assert torch.equal(losses[name], values), name
    torch.testing.assert_close(again[2].state_dict(), once[2].state_dict(), rtol=0, atol=0)


def _step_in_a_group(rank: int, port: int, features: str, images: torch.Tensor, output: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    PartialState(cpu=True)
    torch.manual_seed(rank)  # the discriminators start alike all the same
    loss = AdversarialLoss(features, 1.0, channels=1, sample_size=8)
    mine = slice(4 * rank, 4 * rank + 4)
    for _ in range(2):
        loss(images[8:][mine], images[:8][mine], torch.ones(4))
    torch.save(loss.discriminator.state_dict(), f"{output}/{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_take_the_steps_of_one(classifier, digits, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_step_in_a_group, (port, classifier, digits[:16], str(tmp_path)), nprocs=2)
    loss = AdversarialLoss(classifier, 1.0, channels=1, sample_size=8)
    for _ in range(2):
        loss(digits[8:16], digits[:8], torch.ones(8))
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    for name, expected in loss.discriminator.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], expected, rtol=0, atol=1e-5)  # steps are 1e-4 long


@pytest.mark.parametrize(
    "options, message",
    [
        ({"perceptual_weight": 0.0}, r"`perceptual_weight` \(0.0\) must be positive"),
        ({"adversarial_weight": -1.0}, "`adversarial_weight`"),
        ({"adversarial_learning_rate": 0.0}, "`adversarial_learning_rate`"),
        ({"vae": "folder"}, "`perceptual_model` .* `vae`"),
    ],
)
def test_options_without_meaning_are_refused(options, message, classifier):
    with pytest.raises(ValueError, match=message):
        critics_of(classifier, **options)
