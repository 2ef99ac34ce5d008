"""The dilated denoiser: what it alone has. `test_models.py` asks it what every model is asked."""

import pytest
import torch
from peft import LoraConfig

from diffusers_ext import DilatedConvDenoiserModel
from diffusers_ext.models.denoiser_dilated import PRESETS


TINY = {"sample_size": 16, "hidden_channels": (16, 16, 16, 16)}
CONDITIONAL = TINY | {"num_class_embeds": 5, "null_class": True}


class Sum(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        return hidden_states + update


def test_preset():
    with torch.device("meta"):
        assert DilatedConvDenoiserModel(**PRESETS["mnist"]).num_parameters() == 4_870_913


@pytest.mark.parametrize(
    "options, dilations",
    [
        ({"hidden_channels": (16,) * 8}, [1, 1, 1, 3, 3, 9, 9, 27]),
        ({"hidden_channels": (16,)}, [1]),
        ({"dilations": (1, 2, 4, 8)}, [1, 2, 4, 8]),
    ],
)
def test_dilations(options, dilations):
    blocks = DilatedConvDenoiserModel(**TINY | options).blocks
    assert [block.conv.dilation[0] for block in blocks] == dilations
    assert [hasattr(block, "norm") for block in blocks] == [False] + [True] * (len(blocks) - 1)


def test_every_layer_widens_what_a_pixel_sees_by_its_dilation():
    torch.manual_seed(0)
    model = DilatedConvDenoiserModel(**TINY | {"dilations": (1, 2, 4, 8)})
    for block in model.blocks[1:]:  # whose statistics are of the whole image
        block.norm = Sum()
    sample = torch.zeros(1, 1, 65, 65, requires_grad=True)
    model(sample, 10).sample[0, 0, 32, 32].backward()
    seen = sample.grad[0, 0].nonzero()
    reach = 3 + 1 + 2 + 4 + 8 + 1
    assert seen.min(dim=0).values.tolist() == [32 - reach] * 2 and seen.max(dim=0).values.tolist() == [32 + reach] * 2


@pytest.mark.parametrize("height, width", [(1, 1), (7, 30)])
def test_every_size_fits(height, width):
    assert DilatedConvDenoiserModel(**TINY)(torch.randn(2, 1, height, width), 10).sample.shape[2:] == (height, width)


def test_no_label_is_the_null_class():
    torch.manual_seed(0)
    model, sample = DilatedConvDenoiserModel(**CONDITIONAL).eval(), torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        null = model(sample, 10, torch.tensor([5, 5])).sample
        assert torch.equal(model(sample, 10).sample, null)
        assert not torch.allclose(model(sample, 10, torch.tensor([1])).sample, null, atol=1e-3)


@pytest.mark.parametrize(
    "config, changes, message",
    [
        (TINY, {"sample": torch.zeros(2, 3, 16, 16)}, r"`sample` has shape \(2, 3, 16, 16\), expected \(batch, 1"),
        (TINY, {"timestep": torch.zeros(3)}, "`timestep` has 3 entries for 2 images"),
        (TINY, {"class_labels": torch.tensor([1, 2])}, "`class_labels` were given to an unconditional"),
        (CONDITIONAL, {"class_labels": torch.tensor([1, 2, 3])}, "`class_labels` has 3 entries for 2 images"),
        (CONDITIONAL, {"class_labels": torch.tensor([1, 6])}, "`class_labels` has 6; labels .* are 0 to 5"),
        (CONDITIONAL | {"null_class": False}, {}, "`class_labels` are needed"),
    ],
)
def test_wrong_inputs_are_named(config, changes, message):
    inputs = {"sample": torch.zeros(2, 1, 16, 16), "timestep": 10} | changes
    with pytest.raises(ValueError, match=message):
        DilatedConvDenoiserModel(**config)(**inputs)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_channels": (16, 32)}, r"`hidden_channels` \(16, 32\) must be one or more equal widths"),
        ({"hidden_channels": ()}, r"`hidden_channels` \(\) must be"),
        ({"hidden_channels": (12, 12)}, r"`hidden_channels` \(12, 12\) must be multiples of `norm_num_groups` \(8\)"),
        ({"dilations": (1, 3)}, r"`dilations` \(1, 3\) must be 4 numbers"),
        ({"dilations": (1, 0, 1, 1)}, "`dilations` .* from 1"),
        ({"time_embedding_dim": 31}, r"`time_embedding_dim` \(31\) must be even"),
        ({"null_class": True}, "`null_class` needs classes"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DilatedConvDenoiserModel(**TINY | options)


def test_low_rank_adapters_are_as_dilated_as_what_they_adapt():
    torch.manual_seed(0)
    model, sample = DilatedConvDenoiserModel(**TINY | {"dilations": (1, 2, 4, 8)}).eval(), torch.randn(2, 1, 16, 16)
    model.add_adapter(LoraConfig(r=4, target_modules=["conv", "conv_in", "conv_out"], init_lora_weights=False))
    with torch.no_grad():
        adapted = model(sample, 10).sample
        model.fuse_lora()
        torch.testing.assert_close(model(sample, 10).sample, adapted, rtol=0, atol=1e-4)
        model.unfuse_lora()
        model.unload_lora()
        assert not torch.allclose(model(sample, 10).sample, adapted, atol=1e-3)
