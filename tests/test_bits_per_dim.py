"""Bits per dimension against guided-diffusion, and against a process whose likelihood is known."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_ext import ADMUNet2DModel
from diffusers_ext.conversion import load_original
from diffusers_ext.evaluation.bits_per_dim import bits_per_dim, respaced


SCHEDULERS = {
    "learned": DDPMScheduler(variance_type="learned_range"),
    "fixed_large": DDPMScheduler(variance_type="fixed_large", beta_schedule="squaredcos_cap_v2"),
}


@pytest.mark.parametrize("run", SCHEDULERS)
def test_bits_equal_the_recorded_ones(run, shared):
    folder = shared / "fixtures"
    recorded = load_file(folder / "gd_bpd.io.safetensors")
    name = json.loads((folder / "gd_bpd.json").read_text())["runs"][run]["model"]
    flags = json.loads((folder / f"{name}.json").read_text())["config"]
    model = load_original(folder / f"{name}.weights.safetensors", "guided-diffusion/unet", config=flags).float().eval()
    noise = recorded[f"{run}.noise"].float()
    bits = bits_per_dim(model, recorded["x_start"], SCHEDULERS[run], num_steps=10, noise=noise)
    for ours, theirs in (
        ("total", "total_bpd"),
        ("prior", "prior_bpd"),
        ("vb", "vb"),
        ("mse", "mse"),
        ("xstart_mse", "xstart_mse"),
    ):
        torch.testing.assert_close(bits[ours], recorded[f"{run}.{theirs}"], rtol=1e-5, atol=0)


class PerfectDenoiser(torch.nn.Module):
    """Knows every image: its prediction has no error, and its variance is that of the posterior."""

    def __init__(self, image: torch.Tensor):
        super().__init__()
        self.image, self.seen = image, []

    def forward(self, sample, timestep, class_labels=None):
        self.seen.append((timestep[0].item(), None if class_labels is None else class_labels.tolist()))
        image = self.image.expand_as(sample)
        return UNet2DOutput(sample=torch.cat([image, torch.full_like(image, -1.0)], dim=1))


def test_a_network_that_knows_the_image_pays_for_the_prior_and_the_last_rounding_only():
    image = (torch.randint(0, 256, (2, 1, 4, 4), generator=torch.Generator().manual_seed(0))).to(torch.uint8)
    scheduler = DDPMScheduler(prediction_type="sample", variance_type="learned_range")
    model = PerfectDenoiser(image / 127.5 - 1)
    generator = torch.Generator().manual_seed(0)
    bits = bits_per_dim(model, image, scheduler, num_steps=7, generator=generator, class_labels=torch.tensor([3, 4]))
    assert model.seen[0] == (999, [3, 4]) and model.seen[-1] == (0, [3, 4]) and len(model.seen) == 7
    assert bits["vb"].shape == bits["mse"].shape == bits["xstart_mse"].shape == (2, 7)
    assert bits["xstart_mse"].abs().max() == 0 and bits["mse"].max() < 1e-6
    assert bits["vb"][:, :-1].abs().max() < 1e-5
    torch.testing.assert_close(bits["total"], bits["prior"] + bits["vb"].sum(dim=1))
    assert 0 < bits["prior"].max() < 1e-3


def test_the_last_step_charges_the_probability_of_the_grey_level():
    """The mean is the image itself, so a grey level in the middle has the mass of its interval, 1 / 127.5 wide."""
    image = torch.zeros(1, 1, 1, 1) + 1 / 255
    bits = bits_per_dim(PerfectDenoiser(image), image, DDPMScheduler(prediction_type="sample"), num_steps=50)
    process_betas = respaced(DDPMScheduler().betas, 50)[1]
    alphas = (1 - process_betas).cumprod(0)
    std = (process_betas[1] * (1 - alphas[0]) / (1 - alphas[1])).sqrt().item()
    expected = -math.log2(math.erf(1 / 255 / std / math.sqrt(2)))
    assert bits["vb"][0, -1].item() == pytest.approx(expected, abs=1e-3)


def test_one_generator_per_image_makes_it_independent_of_its_batch():
    torch.manual_seed(0)
    model = ADMUNet2DModel(8, 1, 2, block_out_channels=(8,), layers_per_block=1, attention_resolutions=(),
                           attention_head_dim=8, norm_num_groups=4).eval()  # fmt: skip
    images = torch.rand(3, 1, 8, 8) * 2 - 1

    def bits(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return bits_per_dim(model, images[rows], DDIMScheduler(), num_steps=4, generator=generators)["total"]

    torch.testing.assert_close(bits([0, 1, 2])[1:], bits([1, 2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_of_half_precision_is_asked_in_it_about_images_of_full_precision(dtype):
    torch.manual_seed(0)
    model = ADMUNet2DModel(8, 1, 2, block_out_channels=(8,), layers_per_block=1, attention_resolutions=(),
                           attention_head_dim=8, norm_num_groups=4).eval()  # fmt: skip
    images = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)

    def bits():
        return bits_per_dim(model, images, DDIMScheduler(), num_steps=4, generator=torch.Generator().manual_seed(0))

    full = bits()
    model.to(dtype)
    half = bits()
    assert half["total"].dtype == torch.float32
    torch.testing.assert_close(half["total"], full["total"], rtol=0.02, atol=0)
    torch.testing.assert_close(half["prior"], full["prior"], rtol=0, atol=0)  # which the network has no part in


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_zero_terminal_snr_costs_nothing_at_the_prior(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    images = torch.rand(2, 1, 4, 4) * 2 - 1
    bits = bits_per_dim(PerfectDenoiser(images), images, scheduler, num_steps=5)
    assert bits["prior"].abs().max() == 0
    assert all(values.isfinite().all() for values in bits.values())


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"scheduler": FlowMatchEulerDiscreteScheduler()},
            "FlowMatchEuler.* has no variational bound",
        ),
        ({"scheduler": DDPMScheduler(rescale_betas_zero_snr=True)}, "leaves no signal"),
        ({"num_steps": 1}, r"`num_steps` \(1\) must lie between 2 and 1000"),
        ({"num_steps": 1001}, r"`num_steps` \(1001\)"),
        ({"images": torch.zeros(4, 4)}, r"`images` \(4, 4\)"),
        ({"noise": torch.zeros(3, 1, 1, 4, 4)}, r"`noise` \(3, 1, 1, 4, 4\) must have the shape \(2, 1, 1, 4, 4\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_has_no_bound_is_refused(options, message):
    arguments = {"images": torch.zeros(1, 1, 4, 4), "scheduler": DDPMScheduler(), "num_steps": 2} | options
    with pytest.raises(ValueError, match=message):
        bits_per_dim(PerfectDenoiser(torch.zeros(1)), **arguments)


def test_a_learned_variance_that_the_network_does_not_have_is_refused():
    model = torch.nn.Module()
    model.forward = lambda sample, timestep: UNet2DOutput(sample=sample)
    with pytest.raises(ValueError, match="no second half of channels"):
        bits_per_dim(model, torch.zeros(1, 1, 4, 4), DDPMScheduler(variance_type="learned_range"), num_steps=2)
