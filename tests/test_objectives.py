"""Objectives of denoising: schedulers, losses, weightings and timesteps, against recorded numbers and definitions."""

import json
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file

from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_ext.conversion import load_original
from diffusers_ext.training.config import ClassifierTrainingConfig, UNetTrainingConfig
from diffusers_ext.training.objectives import (
    Objective,
    build_scheduler,
    denoising_losses,
    loss_weights,
)
from diffusers_ext.training.process import (
    FlowProcess,
    ForwardProcess,
    discretized_gaussian_log_likelihood,
    exact_betas,
)
from diffusers_ext.training.timesteps import LossSecondMomentSampler, build_timestep_sampler


FIXED = UNetTrainingConfig(learned_variance=False)
FLOW = replace(FIXED, prediction_type="flow_prediction")
GD_TYPES = {"EPSILON": "epsilon", "START_X": "sample"}
GD_LOSSES = {
    "MSE": {"vb_weight": 1.0},
    "RESCALED_MSE": {},
    "KL": {"loss_type": "vlb", "vb_weight": 1.0},
    "RESCALED_KL": {"loss_type": "vlb"},
}


@pytest.fixture(scope="module")
def process():
    return ForwardProcess(DDPMScheduler(1000).betas)


@pytest.fixture
def unit(shared):
    return load_file(shared / "fixtures" / "gd_unit.io.safetensors")


def images_and_noise(count=4, channels=1, size=8):
    generator = torch.Generator().manual_seed(0)
    x_start, noise = torch.randn(2, count, channels, size, size, generator=generator)
    return x_start.clamp(-1, 1), noise


# Against guided-diffusion and ddim


@pytest.mark.parametrize("variance", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE"])
@pytest.mark.parametrize("mean", GD_TYPES)
@pytest.mark.parametrize("loss", GD_LOSSES)
def test_losses_equal_the_recorded_ones(loss, mean, variance, unit, process):
    output = unit["model_output"] if "LEARNED" in variance else unit["model_output"][:, :3]
    losses = denoising_losses(
        process,
        output,
        unit["x_start"],
        unit["x_t"],
        unit["noise"],
        unit["t"],
        GD_TYPES[mean],
        variance_type=variance.lower(),
        **GD_LOSSES[loss],
    )
    names = [name.split(".")[-1] for name in unit if name.startswith(f"loss.{loss}.{mean}.{variance}.")]
    assert "loss" in names
    for name in names:
        torch.testing.assert_close(losses[name], unit[f"loss.{loss}.{mean}.{variance}.{name}"], rtol=1e-5, atol=1e-7)


def test_distributions_equal_the_recorded_ones(unit, process):
    x_start, x_t, timesteps, epsilon = unit["x_start"], unit["x_t"], unit["t"], unit["model_output"][:, :3]

    def equal(actual, name, rtol=1e-5):
        torch.testing.assert_close(actual.expand_as(unit[name]), unit[name], rtol=rtol, atol=1e-6, msg=name)

    equal(process.add_noise(x_start, unit["noise"], timesteps), "x_t")
    equal(process.signal[timesteps] * x_start, "q_mean_variance.mean")
    equal(process.log_noise_variance[timesteps], "q_mean_variance.log_variance")
    equal(process.posterior_mean(x_start, x_t, timesteps), "q_posterior.mean")
    equal(process.log_variance(timesteps, "fixed_small"), "q_posterior.log_variance_clipped")
    torch.testing.assert_close(process.prior_bound(x_start), unit["prior_bpd"], rtol=1e-5, atol=0)
    for mean, prediction_type in GD_TYPES.items():
        start = process.predict_start(x_t, epsilon, timesteps, prediction_type)
        equal(start, f"pmv.{mean}.FIXED_SMALL.clip0.pred_xstart")
        equal(process.posterior_mean(start, x_t, timesteps), f"pmv.{mean}.FIXED_SMALL.clip0.mean")
    for variance in ("FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE"):
        log_variance = process.log_variance(timesteps, variance.lower(), unit["model_output"][:, 3:])
        equal(log_variance, f"pmv.EPSILON.{variance}.clip0.log_variance")
        start = process.predict_start(x_t, epsilon, timesteps)
        for clip in (0, 1):
            clipped = start.clamp(-1, 1) if clip else start
            bits = process.variational_bound(clipped, log_variance, x_start, x_t, timesteps)
            torch.testing.assert_close(bits, unit[f"vb.{variance}.clip{clip}"], rtol=1e-5, atol=1e-7)


RUNS = {
    "hybrid_unscaled": {"vb_weight": 1.0},
    "hybrid_rescaled": {"loss_type": "hybrid"},
    "rescaled_kl": {"loss_type": "vlb"},
    "mse_fixed": {"loss_type": "mse"},
    "xstart_fixed": {"prediction_type": "sample"},
}


@pytest.mark.parametrize("run", RUNS)
def test_losses_and_gradients_of_a_network_equal_the_recorded_ones(run, shared, process):
    folder = shared / "fixtures"
    recorded = load_file(folder / "gd_losses.io.safetensors")
    name = json.loads((folder / "gd_losses.json").read_text())["runs"][run]["model"]
    flags = json.loads((folder / f"{name}.json").read_text())["config"]
    model = load_original(folder / f"{name}.weights.safetensors", "guided-diffusion/unet", config=flags).float()
    model.requires_grad_(True)
    x_start, noise, timesteps = recorded["x_start"], recorded[f"{run}.noise"].float(), recorded[f"{run}.t"]
    x_t = process.add_noise(x_start, noise, timesteps)
    losses = denoising_losses(process, model(x_t, timesteps).sample, x_start, x_t, noise, timesteps, **RUNS[run])
    for name in {"loss", "mse", "vb"} & {key.removeprefix(f"{run}.") for key in recorded}:
        torch.testing.assert_close(losses[name], recorded[f"{run}.{name}"], rtol=1e-5, atol=0)
    losses["loss"].mean().backward()
    for parameter, original in (
        (model.conv_in.weight, "input_blocks.0.0.weight"),
        (model.conv_out.bias, "out.2.bias"),
    ):
        gradient = recorded[f"{run}.grad.{original}"]
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-4 * gradient.abs().max().item())


def test_sum_over_pixels_equals_the_loss_of_ddim(shared):
    folder = shared / "fixtures"
    recorded = load_file(folder / "ddim_loss.io.safetensors")
    flags = json.loads((folder / "ddim_model_a.json").read_text())["config"]
    model = load_original(folder / "ddim_model_a.weights.safetensors", "ddim/unet", config=flags).float()
    model.requires_grad_(True)
    process = ForwardProcess(build_scheduler(replace(FIXED, loss_reduction="sum")).betas)
    x_start, noise, timesteps = recorded["x0"], recorded["e"].float(), recorded["t"]
    x_t = process.add_noise(x_start, noise, timesteps)
    output = model(x_t, timesteps).sample
    loss = denoising_losses(process, output, x_start, x_t, noise, timesteps, reduction="sum")["loss"]
    torch.testing.assert_close(loss, recorded["loss_keepdim"], rtol=1e-5, atol=0)
    loss.mean().backward()
    torch.testing.assert_close(loss.mean(), recorded["loss"].reshape(()), rtol=1e-5, atol=0)
    gradient = recorded["grad.conv_in.weight"]
    torch.testing.assert_close(model.conv_in.weight.grad, gradient, rtol=0, atol=1e-4 * gradient.abs().max().item())


# Losses


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_type_is_what_the_scheduler_takes_it_for(prediction_type, process):
    """A network that predicts the target without an error has no loss, and the scheduler finds the clean image."""
    x_start, noise = images_and_noise()
    timesteps = torch.tensor([0, 300, 700, 999])
    x_t = process.add_noise(x_start, noise, timesteps)
    target = process.target(x_start, noise, timesteps, prediction_type)
    losses = denoising_losses(process, target, x_start, x_t, noise, timesteps, prediction_type)
    assert losses["loss"].max() == 0
    found = process.predict_start(x_t, target, timesteps, prediction_type)
    torch.testing.assert_close(found, x_start, rtol=1e-3, atol=1e-3)
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(1000)
    for i, timestep in enumerate(timesteps):
        found = scheduler.step(target[i : i + 1], timestep, x_t[i : i + 1]).pred_original_sample
        torch.testing.assert_close(found, x_start[i : i + 1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_bound_of_a_perfect_network_with_the_posterior_variance_is_that_of_the_decoder(prediction_type, process):
    x_start, noise = images_and_noise()
    timesteps = torch.tensor([1, 300, 700, 999])
    x_t = process.add_noise(x_start, noise, timesteps)
    target = process.target(x_start, noise, timesteps, prediction_type)
    output = torch.cat([target, torch.full_like(target, -1.0)], dim=1)  # -1: the variance of the posterior
    losses = denoising_losses(process, output, x_start, x_t, noise, timesteps, prediction_type)
    assert losses["vb"].abs().max() < 1e-5


def test_flow_is_what_the_scheduler_takes_it_for():
    x_start, noise = images_and_noise()
    scheduler = build_scheduler(replace(FLOW, flow_shift=3.0))
    process = FlowProcess(1000, shift=3.0)
    scheduler.set_timesteps(10)
    timesteps = scheduler.timesteps[[0, 3, 6, 9]]
    x_t = process.add_noise(x_start, noise, timesteps)
    torch.testing.assert_close(x_t, scheduler.scale_noise(x_start, timesteps, noise))
    target = process.target(x_start, noise, timesteps)
    losses = denoising_losses(process, target, x_start, x_t, noise, timesteps, "flow_prediction")
    assert losses["loss"].max() == 0
    torch.testing.assert_close(process.predict_start(x_t, target, timesteps), x_start, atol=1e-5, rtol=1e-4)
    positions = torch.arange(1, 1001, dtype=torch.float64) / 1000
    fresh = FlowMatchEulerDiscreteScheduler(1000, shift=3.0)  # its own training timesteps, noisiest first
    torch.testing.assert_close(process.timesteps_at(positions)[:-1], fresh.timesteps.flip(0)[:-1])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_variational_bound_trains_only_the_variance(prediction_type, process):
    torch.manual_seed(0)
    output = torch.randn(2, 2, 4, 4, requires_grad=True)
    x_start, noise, timesteps = torch.rand(2, 1, 4, 4) * 2 - 1, torch.randn(2, 1, 4, 4), torch.tensor([0, 500])
    x_t = process.add_noise(x_start, noise, timesteps)
    denoising_losses(process, output, x_start, x_t, noise, timesteps, prediction_type)["vb"].sum().backward()
    assert output.grad[:, 0].abs().max() == 0
    assert output.grad[1, 1].abs().min() > 0
    whole = denoising_losses(process, output, x_start, x_t, noise, timesteps, prediction_type, loss_type="vlb")
    whole["loss"].sum().backward()
    assert output.grad[1, 0].abs().min() > 0


def test_pixel_losses_are_their_formulas(process):
    x_start, noise = images_and_noise()
    timesteps = torch.tensor([0, 300, 700, 999])
    x_t, prediction = process.add_noise(x_start, noise, timesteps), torch.zeros_like(noise)
    expected = {
        "mse": noise.square(),
        "l1": noise.abs(),
        "huber": 0.4 * ((noise.square() + 0.04).sqrt() - 0.2),
    }
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for loss_type, values in expected.items():
        arguments = (process, prediction, x_start, x_t, noise, timesteps)
        losses = denoising_losses(*arguments, loss_type=loss_type, huber_c=0.2, weights=weights)
        torch.testing.assert_close(losses[loss_type], values.flatten(1).mean(1))
        torch.testing.assert_close(losses["loss"], weights * losses[loss_type])
        summed = denoising_losses(*arguments, loss_type=loss_type, huber_c=0.2, reduction="sum")
        torch.testing.assert_close(summed["loss"], values.flatten(1).sum(1))


def test_weights_leave_the_bound_alone(process):
    x_start, noise = images_and_noise(2)
    timesteps, output = torch.tensor([0, 500]), torch.zeros(2, 2, 8, 8)
    x_t = process.add_noise(x_start, noise, timesteps)
    weights = torch.tensor([0.0, 2.0])
    losses = denoising_losses(process, output, x_start, x_t, noise, timesteps, loss_type="l1", weights=weights)
    torch.testing.assert_close(losses["loss"], weights * losses["l1"] + losses["vb"])


def test_the_probabilities_of_all_grey_levels_sum_to_one():
    levels = torch.arange(256) / 127.5 - 1
    log_likelihood = discretized_gaussian_log_likelihood(levels, torch.tensor(0.3), torch.tensor(-2.0))
    assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "prediction_type, weighting, expected",
    [  # as the papers and diffusers' training scripts write them
        ("epsilon", "min_snr", lambda snr: snr.clamp(max=5) / snr),
        ("v_prediction", "min_snr", lambda snr: snr.clamp(max=5) / (snr + 1)),
        ("sample", "min_snr", lambda snr: snr.clamp(max=5)),
        ("epsilon", "snr", lambda snr: torch.ones_like(snr)),
        ("v_prediction", "snr", lambda snr: snr / (snr + 1)),
        ("sample", "snr", lambda snr: snr),
        ("epsilon", "p2", lambda snr: 1 / (1 + snr) ** 0.5),
        ("sample", "p2", lambda snr: snr / (1 + snr) ** 0.5),
    ],
)
def test_weightings_are_their_formulas(prediction_type, weighting, expected):
    snr = torch.tensor([1e-4, 0.5, 4.0, 100.0])
    weights = loss_weights(snr, prediction_type, weighting, snr_gamma=5.0, p2_gamma=0.5)
    torch.testing.assert_close(weights, expected(snr))


@pytest.mark.parametrize("weighting", ["min_snr", "snr", "p2"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_a_weighted_error_is_the_same_for_every_kind_of_prediction(prediction_type, weighting, process):
    """One clean image that is off by 0.1 costs the same, whatever way the network said it."""
    flow = prediction_type == "flow_prediction"
    x_start, noise = images_and_noise()
    used = FlowProcess(1000) if flow else process
    timesteps = torch.tensor([100, 400, 700, 900])
    x_t = used.add_noise(x_start, noise, timesteps)
    prediction = used.target(x_start, noise, timesteps, prediction_type).requires_grad_()
    start = used.predict_start(x_t, prediction, timesteps, prediction_type)
    slope = torch.autograd.grad(start.sum(), prediction)[0]  # of the clean image by the prediction
    weights = loss_weights(used.snr(timesteps), prediction_type, weighting)
    losses = denoising_losses(
        used,
        prediction.detach() + 0.1 / slope,
        x_start,
        x_t,
        noise,
        timesteps,
        prediction_type,
        weights=weights,
    )
    expected = 0.01 * loss_weights(used.snr(timesteps), "sample", weighting)
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-2, atol=1e-6)


# Schedulers


def test_schedules_are_those_of_the_originals(shared):
    recorded = load_file(shared / "fixtures" / "gd_schedules.io.safetensors")
    for name, schedule in (("linear", "linear"), ("cosine", "squaredcos_cap_v2")):
        scheduler = build_scheduler(replace(FIXED, beta_schedule=schedule))
        torch.testing.assert_close(exact_betas(scheduler), recorded[f"{name}.1000.full.betas"], rtol=1e-12, atol=0)
        torch.testing.assert_close(exact_betas(scheduler).float(), scheduler.betas, rtol=1e-4, atol=1e-8)
    recorded = load_file(shared / "fixtures" / "ddim_schedules.io.safetensors")
    sigmoid = build_scheduler(replace(FIXED, beta_schedule="sigmoid"))
    torch.testing.assert_close(exact_betas(sigmoid), recorded["sigmoid.betas"], rtol=1e-5, atol=1e-9)
    assert torch.equal(DDIMScheduler.from_config(sigmoid.config).betas, sigmoid.betas)
    scaled = build_scheduler(replace(FIXED, beta_schedule="scaled_linear")).betas
    assert scaled[[0, -1]].tolist() == pytest.approx([0.00085, 0.012])
    for options in ({"beta_schedule": "scaled_linear"}, {"rescale_betas_zero_snr": True}):
        scheduler = build_scheduler(replace(FIXED, prediction_type="sample", **options))
        torch.testing.assert_close(exact_betas(scheduler).float(), scheduler.betas, rtol=1e-3, atol=1e-6)
    other = build_scheduler(replace(FIXED, beta_start=1e-3, beta_end=0.1)).betas
    assert other[[0, -1]].tolist() == pytest.approx([1e-3, 0.1])


def test_the_scheduler_says_what_was_trained():
    scheduler = build_scheduler(UNetTrainingConfig(prediction_type="v_prediction"))
    assert scheduler.config.variance_type == "learned_range" and scheduler.config.prediction_type == "v_prediction"
    assert build_scheduler(FIXED).config.variance_type == "fixed_small"
    assert build_scheduler(FIXED).config.clip_sample
    assert not build_scheduler(replace(FIXED, vae="folder")).config.clip_sample
    assert build_scheduler(FLOW).config.shift == 1.0
    assert build_scheduler(ClassifierTrainingConfig()).config.prediction_type == "epsilon"


@pytest.mark.parametrize("learned_variance", [True, False])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2", "sigmoid", "scaled_linear"])
def test_zero_terminal_snr_trains_and_samples_at_the_last_timestep(
    schedule, prediction_type, learned_variance, monkeypatch
):
    config = UNetTrainingConfig(
        beta_schedule=schedule,
        prediction_type=prediction_type,
        learned_variance=learned_variance,
        rescale_betas_zero_snr=True,
    )
    x_start, _ = images_and_noise()
    for options in ({}, {"loss_weighting": "min_snr"}, {"loss_weighting": "p2"}, {"loss_type": "vlb"}):
        objective = Objective(replace(config, **options))
        assert objective.process.signal[-1] == 0
        monkeypatch.setattr(objective.sampler, "positions", lambda size: torch.full((size,), 0.9999).double())
        output = torch.zeros(4, 2 if learned_variance else 1, 8, 8, requires_grad=True)
        step = objective.step(lambda x_t, timesteps: output, x_start)
        assert step.timesteps.tolist() == [999] * 4 and step.signal_share.tolist() == [0] * 4
        assert all(values.isfinite().all() for values in step.losses.values())
        step.losses["loss"].sum().backward()
        assert output.grad.isfinite().all()
    for scheduler in (objective.scheduler, DDIMScheduler.from_config(objective.scheduler.config)):
        scheduler.set_timesteps(4)
        assert scheduler.timesteps[0] == 999
        sample = torch.randn(1, 1, 8, 8)
        for timestep in scheduler.timesteps:
            output = torch.zeros(1, 2 if learned_variance and type(scheduler) is DDPMScheduler else 1, 8, 8)
            sample = scheduler.step(output, timestep, sample).prev_sample
        assert sample.isfinite().all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prediction_type": "noise"}, r"`prediction_type` \('noise'\) is unknown"),
        ({"loss_type": "l2"}, r"`loss_type` \('l2'\) is unknown. Valid: None, mse"),
        ({"loss_reduction": "none"}, "`loss_reduction`"),
        ({"loss_weighting": "max_snr"}, "`loss_weighting`"),
        ({"timestep_sampling": "cosine"}, r"`timestep_sampling` \('cosine'\) is unknown"),
        ({"beta_schedule": "quad"}, "`beta_schedule`"),
        ({"num_train_timesteps": 1}, "`num_train_timesteps`"),
        ({"loss_type": "hybrid"}, "'hybrid' needs `learned_variance`"),
        ({"loss_type": "vlb", "loss_weighting": "min_snr"}, "`loss_weighting` .* 'vlb'"),
        ({"rescale_betas_zero_snr": True}, "`rescale_betas_zero_snr` leaves no signal .* 'v_prediction'"),
        ({"beta_schedule": "squaredcos_cap_v2", "beta_end": 0.1}, r"`beta_end` \(0.1\) must be None"),
        ({"beta_start": 0.1}, r"`beta_start` \(0.1\) and `beta_end` \(0.02\)"),
        ({"flow_shift": 2.0}, r"`flow_shift` \(2.0\) must stay 1"),
        ({"huber_c": 0.0}, r"`huber_c` \(0.0\) must be positive"),
        ({"snr_gamma": -1.0}, "`snr_gamma`"),
        ({"p2_gamma": -1.0}, "`p2_gamma`"),
        ({"timestep_sampling": "gaussian", "timestep_std": 0.0}, "`timestep_std`"),
        ({"timestep_sampling": "logit_normal", "logit_std": 0.0}, "`logit_std`"),
        ({"prediction_type": "flow_prediction", "learned_variance": True}, "`learned_variance` must be False"),
        ({"prediction_type": "flow_prediction", "loss_type": "vlb"}, "no variational bound"),
        ({"prediction_type": "flow_prediction", "beta_schedule": "sigmoid"}, "`beta_schedule` .* `flow_shift`"),
        ({"prediction_type": "flow_prediction", "beta_start": 0.1}, r"`beta_start` \(0.1\) has no meaning"),
        ({"prediction_type": "flow_prediction", "rescale_betas_zero_snr": True}, "`rescale_betas_zero_snr`"),
        ({"prediction_type": "flow_prediction", "flow_shift": 0.0}, r"`flow_shift` \(0.0\) must be positive"),
    ],
)
def test_options_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Objective(replace(FIXED, **options))


# Timesteps


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_antithetic_timesteps_come_in_pairs(batch_size, process):
    torch.manual_seed(0)
    positions, weights = build_timestep_sampler(replace(FIXED, timestep_sampling="antithetic")).sample(batch_size)
    timesteps = process.timesteps_at(positions)
    pairs, half = batch_size // 2, (batch_size + 1) // 2
    assert len(timesteps) == batch_size and weights.tolist() == [1.0] * batch_size
    assert (timesteps[:pairs] + timesteps[half:]).tolist() == [999] * pairs


@pytest.mark.parametrize(
    "options, quantiles",
    [  # at 0.1, 0.5 and 0.9, by the distributions' definitions
        ({"timestep_sampling": "uniform"}, [0.1, 0.5, 0.9]),
        ({"timestep_sampling": "antithetic"}, [0.1, 0.5, 0.9]),
        ({"timestep_sampling": "gaussian", "timestep_std": 0.1}, [0.3718, 0.5, 0.6282]),
        ({"timestep_sampling": "gaussian", "timestep_std": 10.0}, [0.1, 0.5, 0.9]),
        ({"timestep_sampling": "logit_normal"}, [0.2173, 0.5, 0.7827]),
        ({"timestep_sampling": "logit_normal", "logit_mean": 1.0, "logit_std": 0.5}, [0.5889, 0.7311, 0.8376]),
        ({"timestep_sampling": "loss_second_moment"}, [0.1, 0.5, 0.9]),
    ],
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
def test_positions_have_the_distribution_asked_for(prediction_type, options, quantiles):
    torch.manual_seed(0)
    objective = Objective(replace(FIXED, prediction_type=prediction_type, **options))
    positions, weights = objective.sampler.sample(20_000)
    assert 0 < positions.min() and positions.max() < 1 and weights.unique().tolist() == [1.0]
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert positions.quantile(levels).tolist() == pytest.approx(quantiles, abs=0.015)
    timesteps = objective.process.timesteps_at(positions)
    assert timesteps.dtype == (torch.float32 if prediction_type == "flow_prediction" else torch.int64)
    assert 0 <= timesteps.min() and timesteps.max() < 1000


def test_importance_of_timesteps_equals_the_recorded_one(shared):
    recorded = load_file(shared / "fixtures" / "gd_ema_resampler.io.safetensors")
    sampler = LossSecondMomentSampler(6)

    def weights():
        return sampler.probabilities() / sampler.probabilities().max()

    def normalised(values):
        return values.double() / values.max().double()

    torch.testing.assert_close(weights(), normalised(recorded["resampler.weights_before"]), rtol=1e-6, atol=0)
    sampler.keep(list(zip(recorded["resampler.ts"].tolist(), recorded["resampler.losses"].tolist(), strict=True)))
    torch.testing.assert_close(sampler.history, recorded["resampler.history"].double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(weights(), normalised(recorded["resampler.weights_after"]), rtol=1e-6, atol=0)
    torch.testing.assert_close(sampler.probabilities().sum().item(), 1.0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
def test_importance_sampling_is_unbiased_and_resumes(prediction_type):
    config = replace(
        FIXED, prediction_type=prediction_type, timestep_sampling="loss_second_moment", num_train_timesteps=20
    )
    objective = Objective(config)
    sampler = objective.sampler
    loss_of = lambda positions: 1 + 9 * positions  # noqa: E731
    torch.manual_seed(0)
    for _ in range(40 if prediction_type == "epsilon" else 200):
        positions, _ = sampler.sample(16)
        sampler.update(positions, loss_of(positions).float())
    positions, weights = sampler.sample(20_000)
    assert positions.mean() > 0.6  # where losses are large
    assert (weights * loss_of(positions)).mean().item() == pytest.approx(5.5, rel=0.02)

    resumed = Objective(config)
    resumed.load_state_dict(objective.state_dict())
    assert torch.equal(resumed.sampler.probabilities(), sampler.probabilities())
    with pytest.raises(ValueError, match="another `num_train_timesteps`"):
        resumed.load_state_dict({"history": torch.zeros(3, 10), "counts": torch.zeros(3)})


def test_a_loss_that_is_not_finite_is_not_remembered():
    sampler = LossSecondMomentSampler(2, history_per_bin=1)
    sampler.update(torch.tensor([0.1, 0.9, 0.9]).double(), torch.tensor([1.0, float("nan"), 3.0]))
    assert sampler.history.tolist() == [[1.0], [3.0]]


def _update_in_a_group(rank: int, file: str, output: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    sampler = LossSecondMomentSampler(4, history_per_bin=2)
    positions, losses = [([0.1, 0.3, 0.6], [1.0, 2.0, 3.0]), ([0.1, 0.9], [4.0, 5.0])][rank]
    sampler.update(torch.tensor(positions, dtype=torch.float64), torch.tensor(losses))
    torch.save(sampler.state_dict(), f"{output}/{rank}")
    torch.distributed.destroy_process_group()


def test_processes_share_their_losses(tmp_path):
    arguments = (str(tmp_path / "group"), str(tmp_path))
    torch.multiprocessing.start_processes(_update_in_a_group, arguments, nprocs=2, start_method="fork")
    states = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    assert states[0]["history"].tolist() == [[1.0, 4.0], [2.0, 0.0], [3.0, 0.0], [5.0, 0.0]]
    assert torch.equal(states[0]["history"], states[1]["history"])


# The whole objective


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"learned_variance": True},
        {"learned_variance": True, "loss_type": "huber", "prediction_type": "sample", "loss_weighting": "min_snr"},
        {"learned_variance": True, "loss_type": "vlb", "prediction_type": "v_prediction"},
        {"loss_type": "vlb", "beta_schedule": "squaredcos_cap_v2"},
        {"loss_type": "l1", "timestep_sampling": "loss_second_moment", "loss_reduction": "sum"},
        {"prediction_type": "flow_prediction", "timestep_sampling": "logit_normal", "flow_shift": 3.0},
        {"prediction_type": "flow_prediction", "loss_weighting": "p2", "timestep_sampling": "antithetic"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
def test_steps_follow_the_seed_and_give_what_critics_need(options):
    config = replace(FIXED, **options)
    objective = Objective(config)
    x_start, _ = images_and_noise(6)
    seen = []

    def predict(x_t, timesteps):
        seen.append(timesteps)
        return torch.cat([0.5 * x_t] * (2 if config.learned_variance else 1), dim=1).requires_grad_()

    steps = []
    for _ in range(2):
        torch.manual_seed(3)
        steps.append(objective.step(predict, x_start))
    for name, values in steps[0].losses.items():
        assert values.shape == (6,) and values.dtype == torch.float32 and torch.equal(values, steps[1].losses[name])
    assert {"loss", "vb"} <= steps[0].losses.keys() or not (config.learned_variance or config.loss_type == "vlb")
    assert torch.equal(steps[0].timesteps, seen[0])
    assert steps[0].predicted_start.shape == x_start.shape and steps[0].predicted_start.requires_grad
    assert 0 < steps[0].signal_share.min() and steps[0].signal_share.max() < 1
    order = steps[0].timesteps.argsort()
    assert (steps[0].signal_share[order].diff() <= 0).all()
    torch.manual_seed(3)
    assert torch.equal(objective.step(predict, x_start).losses["loss"], steps[0].losses["loss"])


def test_a_network_of_other_channels_is_refused():
    objective = Objective(UNetTrainingConfig())
    with pytest.raises(ValueError, match="output has 1 channels instead of 2"):
        objective.step(lambda x_t, timesteps: x_t, torch.zeros(1, 1, 8, 8))
