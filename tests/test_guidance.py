"""The formulas of guidance: against their definitions, finite differences and single steps of the original."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import diffusers
from diffusers import DDIMScheduler, DDPMScheduler

from diffusers_ext.guidance import (
    ancestral_variance_rule,
    check_scheduler,
    classifier_log_prob_grad,
    clip_abar,
    ddim_step_gain,
    noise_level,
    noise_table,
    prediction_gain,
    prediction_type,
    timestep_of_abar,
    x0_gain,
)


class TinyClassifier(nn.Module):
    """Logits that depend on every pixel, smoothly and nonlinearly, and on the timestep."""

    def __init__(self, num_classes: int = 5):
        super().__init__()
        self.hidden = nn.Linear(12, 16)
        self.head = nn.Linear(16, num_classes)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.hidden(sample.flatten(1)) + timestep.to(sample.dtype).reshape(-1, 1) / 1000))


@pytest.fixture
def classifier() -> nn.Module:
    torch.manual_seed(0)
    return TinyClassifier().double()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "sample": torch.randn(3, 3, 2, 2, dtype=torch.float64),
        "timestep": torch.tensor(250.5, dtype=torch.float64),
        "class_labels": torch.tensor([0, 3, 3]),
    }


def log_prob(classifier, sample, timestep, class_labels):
    log_probs = classifier(sample, timestep).log_softmax(dim=-1)
    return sum(log_probs[i, label] for i, label in enumerate(class_labels))


def test_gradient_equals_finite_differences(classifier, batch):
    gradient = classifier_log_prob_grad(classifier, **batch)
    assert gradient.shape == batch["sample"].shape and gradient.dtype == torch.float64
    step = 1e-6
    for index in [(0, 0, 0, 0), (1, 2, 1, 0), (2, 1, 1, 1)]:
        offset = torch.zeros_like(batch["sample"])
        offset[index] = step
        with torch.no_grad():
            above = log_prob(classifier, batch["sample"] + offset, batch["timestep"], batch["class_labels"])
            below = log_prob(classifier, batch["sample"] - offset, batch["timestep"], batch["class_labels"])
        assert gradient[index].item() == pytest.approx(((above - below) / (2 * step)).item(), abs=1e-8)


def test_gradient_of_an_image_does_not_depend_on_its_batch(classifier, batch):
    together = classifier_log_prob_grad(classifier, **batch)
    for i in range(3):
        single = {"sample": batch["sample"][i : i + 1], "class_labels": batch["class_labels"][i : i + 1]}
        alone = classifier_log_prob_grad(classifier, timestep=batch["timestep"], **single)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_in_every_grad_mode(classifier, batch, context):
    expected = classifier_log_prob_grad(classifier, **batch)
    with context():
        inputs = {name: tensor * 1 for name, tensor in batch.items()}  # inference tensors in inference mode
        actual = classifier_log_prob_grad(classifier, **inputs)
    assert torch.equal(actual, expected)
    assert not actual.requires_grad
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_gradient_through_float16_keeps_what_is_small(classifier, batch):
    with torch.no_grad():
        classifier.head.weight *= 1e-6  # gradients below the smallest number of float16
    expected = classifier_log_prob_grad(classifier, **batch)
    batch["sample"] = batch["sample"].float()
    actual = classifier_log_prob_grad(classifier.half(), **batch, dtype=torch.float16)
    assert actual.dtype == torch.float32
    assert expected.abs().median() < 6e-8 * 10
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=0.2 * expected.abs().max().item())


def test_one_label_per_image(classifier, batch):
    with pytest.raises(ValueError, match=r"`class_labels` has shape \(2,\), expected \(3,\)"):
        classifier_log_prob_grad(classifier, batch["sample"], batch["timestep"], torch.tensor([0, 1]))


def predictions(x0: float, x: float, alpha: float, sigma: float, sigma_data: float) -> dict[str, float]:
    """What networks of each kind output for a clean image x0 and a noisy one x, by the definitions of the papers."""
    eps = (x - alpha * x0) / sigma
    norm = math.hypot(alpha, sigma)
    values = {
        "sample": x0,
        "epsilon": eps,
        "v_prediction": (alpha * eps - sigma * x0) / norm,
        "flow_prediction": eps - x0,
        "reversed_flow_prediction": x0 - eps,
    }
    if alpha == 1:
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = sigma * sigma_data / math.sqrt(sigma**2 + sigma_data**2)
        values["edm_epsilon"] = (x0 - c_skip * x) / c_out
        values["edm_v_prediction"] = -values["edm_epsilon"]
    return values


@pytest.mark.parametrize("alpha, sigma", [(0.8, 0.6), (1.0, 5.0), (0.3, 0.7), (1.0, 0.02)])
def test_prediction_gain_is_the_derivative(alpha, sigma):
    before, after = (predictions(x0, 0.4, alpha, sigma, 0.5) for x0 in (0.1, 0.35))
    for kind, value in before.items():
        expected = (after[kind] - value) / 0.25
        assert prediction_gain(kind, alpha, sigma, 0.5) == pytest.approx(expected, rel=1e-9)


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="'score'"):
        prediction_gain("score", 0.8, 0.6)


@pytest.mark.parametrize("alpha, sigma", [(0.8, 0.6), (1.0, 5.0)])
def test_epsilon_moves_by_the_familiar_formula(alpha, sigma):
    """Dhariwal and Nichol (2021), Alg. 2, in variance-preserving and in sigma space."""
    abar = alpha**2 / (alpha**2 + sigma**2)
    gain = prediction_gain("epsilon", alpha, sigma) * x0_gain(abar)
    assert gain == pytest.approx(-math.sqrt(1 - abar))


@pytest.mark.parametrize(
    "steps, schedule", [(1000, "linear"), (1000, "squaredcos_cap_v2"), (4000, "squaredcos_cap_v2")]
)
def test_timesteps_of_the_training_schedule_are_exact(steps, schedule):
    scheduler = DDPMScheduler(steps, beta_schedule=schedule)
    table = noise_table(scheduler)
    for timestep in [0, 1, 2, steps // 3, steps // 2, steps - 2, steps - 1]:
        alpha, sigma = noise_level(scheduler, timestep, 0)
        found = torch.tensor(timestep_of_abar(alpha**2 / (alpha**2 + sigma**2), table), dtype=torch.float32)
        assert found.item() == timestep


def test_timesteps_between_are_those_of_euler():
    scheduler = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, interpolation_type="log_linear")
    scheduler.set_timesteps(20)
    table = noise_table(scheduler)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        abar = 1 / (1 + sigma.item() ** 2)
        assert timestep_of_abar(abar, table) == pytest.approx(timestep.item(), abs=0.02)


def test_noise_beyond_the_training_schedule_is_that_of_its_ends():
    table = noise_table(DDPMScheduler())
    assert timestep_of_abar(1.0, table) == 0 and clip_abar(1.0, table) == table[0]
    assert timestep_of_abar(0.0, table) == 999 and clip_abar(0.0, table) == table[-1]
    assert clip_abar(0.5, table) == 0.5
    zero_terminal = noise_table(DDPMScheduler(rescale_betas_zero_snr=True))
    assert len(zero_terminal) == 999 and zero_terminal[-1] > 0


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_noise_level_of_sigma_schedulers(name):
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(7)
    for step_index, sigma in enumerate(scheduler.sigmas[:-1].tolist()):
        scheduler._step_index = step_index
        alpha, noise = noise_level(scheduler, scheduler.timesteps[step_index], step_index)
        assert noise / alpha == pytest.approx(sigma, rel=1e-3)  # 1 + sigma^2 is float32 in Euler's scaling
        assert (alpha == 1) == (name == "EulerDiscreteScheduler")


def test_noise_level_of_flow_matching():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    alpha, sigma = noise_level(scheduler, scheduler.timesteps[2].item(), 2)
    assert (alpha, sigma) == (1 - scheduler.sigmas[2].item(), scheduler.sigmas[2].item())


def test_noise_level_of_an_unknown_scheduler():
    class OtherScheduler(diffusers.SchedulerMixin):
        pass

    with pytest.raises(ValueError, match="OtherScheduler says in no known way"):
        noise_level(OtherScheduler(), 0, 0)


def test_prediction_types():
    assert prediction_type(DDPMScheduler(prediction_type="v_prediction")) == "v_prediction"
    assert prediction_type(diffusers.FlowMatchEulerDiscreteScheduler()) == "flow_prediction"
    assert prediction_type(diffusers.EDMEulerScheduler()) == "edm_epsilon"


def test_refused_schedulers_name_reason_and_alternative():
    with pytest.raises(ValueError, match=r"LCMScheduler .* distilled .* Use `DPMSolverMultistepScheduler`"):
        check_scheduler(diffusers.LCMScheduler())

    class OwnInverse(diffusers.DDIMInverseScheduler):
        pass

    with pytest.raises(ValueError, match="OwnInverse .* from images to noise"):
        check_scheduler(OwnInverse())
    with pytest.raises(ValueError, match="3 stages"):
        check_scheduler(diffusers.HeliosScheduler(stages=3))


def test_schedulers_of_edm_need_a_network_of_edm():
    scheduler = diffusers.EDMEulerScheduler()
    for sigma_data in (None, 1.0):
        with pytest.raises(ValueError, match=r"EDM's preconditioning .* `EulerDiscreteScheduler`"):
            check_scheduler(scheduler, sigma_data)
    check_scheduler(scheduler, 0.5)


def test_flow_schedulers_do_not_take_a_network_for_noise():
    trained = DDPMScheduler(prediction_type="epsilon")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(trained.config)
    with pytest.raises(ValueError, match="velocity of a flow, .* 'epsilon'"):
        check_scheduler(scheduler)
    check_scheduler(diffusers.FlowMatchEulerDiscreteScheduler())


@pytest.fixture(scope="module")
def unit(shared) -> dict[str, torch.Tensor]:
    """Single steps of the original at the timesteps 0, 1, 500 and 999 of the linear schedule."""
    return load_file(shared / "fixtures" / "gd_unit.io.safetensors")


@pytest.mark.parametrize("variance_type", ["learned_range", "fixed_small", "fixed_small_log", "fixed_large"])
def test_ancestral_variance_is_that_of_the_original(unit, variance_type):
    timesteps = list(range(999, -1, -1))
    scheduler = DDPMScheduler(variance_type=variance_type)
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), dim=0)
    variance = ancestral_variance_rule(scheduler, timesteps)
    expected = unit[f"pmv.EPSILON.{variance_type.removesuffix('_log').upper()}.clip1.variance"]
    for row, timestep in enumerate(unit["t"].tolist()):
        values = unit["model_output"][row : row + 1, 3:]
        actual = torch.as_tensor(variance(timesteps.index(timestep), values), dtype=torch.float32)
        torch.testing.assert_close(actual.expand(1, 3, 4, 4), expected[row : row + 1], rtol=1e-4, atol=1e-12)


def test_a_learned_variance_is_taken_as_the_scheduler_takes_it():
    values = torch.rand(1, 3, 4, 4)
    variance = ancestral_variance_rule(DDPMScheduler(variance_type="learned"), [500, 0])
    assert variance(0, values) is values


def test_guided_mean_is_that_of_the_original(unit):
    timesteps = list(range(999, -1, -1))
    variance = ancestral_variance_rule(DDPMScheduler(variance_type="learned_range"), timesteps)
    for row, timestep in enumerate(unit["t"].tolist()):
        mean = unit["pmv.EPSILON.LEARNED_RANGE.clip1.mean"][row]
        values = unit["model_output"][row, 3:]
        actual = mean + variance(timesteps.index(timestep), values) * unit["gradient"][row]
        torch.testing.assert_close(actual, unit["condition_mean"][row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_guided_ddim_step_is_that_of_the_original(unit, eta):
    """The step clips the prediction and takes eps anew from it; what guidance adds is not clipped."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(1000)
    for row, timestep in enumerate(unit["t"].tolist()):
        plain = scheduler.step(
            unit["model_output"][row : row + 1, :3],
            timestep,
            unit["x_t"][row : row + 1],
            eta=eta,
            use_clipped_model_output=True,
            variance_noise=unit["step_noise"][row : row + 1] * (timestep > 0),
        ).prev_sample
        abar = scheduler.alphas_cumprod[timestep].item()
        gain = x0_gain(abar) * ddim_step_gain(scheduler, timestep, eta)
        expected = unit[f"ddim_sample.guided.eta{eta}.sample"][row : row + 1]
        torch.testing.assert_close(plain + gain * unit["gradient"][row], expected, rtol=1e-4, atol=1e-4)
