"""The UNet of Ho et al.: what it alone has. `test_models.py` asks it what every model is asked."""

import pytest
import torch

from diffusers import UNet2DModel

from diffusers_ext import DDPMUNet2DModel
from diffusers_ext.models.unet_ddpm import PRESETS, DDPMAttention


TINY = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_resolutions": (8,),
    "norm_num_groups": 8,
}
CONDITIONAL = TINY | {"num_class_embeds": 5, "null_class": True}
DIFFUSERS = {
    "one_head": TINY,
    "heads": TINY | {"attention_head_dim": 16, "layers_per_block": 2, "attention_resolutions": (16, 8)},
    "middle_only": TINY | {"attention_resolutions": (), "block_out_channels": (32, 64, 64), "dropout": 0.1},
    "classes": TINY | {"num_class_embeds": 5, "out_channels": 6},
    "null_class": CONDITIONAL | {"in_channels": 1, "out_channels": 1},
}


def build(config: dict) -> DDPMUNet2DModel:
    """A model in evaluation mode of which no layer is silent."""
    torch.manual_seed(0)
    model = DDPMUNet2DModel(**config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def inputs_of(config: dict) -> dict[str, torch.Tensor]:
    sample = torch.randn(2, config.get("in_channels", 3), 16, 24, generator=torch.Generator().manual_seed(0))
    inputs = {"sample": sample, "timestep": torch.tensor([20.0, 700.5])}
    if "num_class_embeds" in config:
        inputs["class_labels"] = torch.tensor([3, 1])
    return inputs


@torch.no_grad()
def predict(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    return model(**inputs).sample


@pytest.mark.parametrize(
    "preset, parameters",
    [
        ("cifar10", 35_746_307),
        ("celeba-64", 78_700_803),
        ("lsun-256", 113_673_219),
        ("celebahq-256", 113_673_219),
        ("mnist-32", 2_073_889),
    ],
)
def test_presets(preset, parameters):
    with torch.device("meta"):
        assert DDPMUNet2DModel(**PRESETS[preset]).num_parameters() == parameters


def test_heads():
    def heads(**options) -> set[int]:
        modules = DDPMUNet2DModel(**TINY | options).modules()
        return {module.heads for module in modules if isinstance(module, DDPMAttention)}

    assert heads() == {1} and heads(attention_head_dim=16) == {4}


def test_no_label_is_the_null_class():
    model, inputs = build(CONDITIONAL), inputs_of(CONDITIONAL)
    null = predict(model, inputs | {"class_labels": torch.tensor([5])})
    assert torch.equal(predict(model, inputs | {"class_labels": None}), null)
    assert not torch.allclose(predict(model, inputs), null, atol=1e-3)


def test_pooling_has_no_parameters():
    names = DDPMUNet2DModel(**TINY | {"resample_type": "pool"}).state_dict()
    assert not any("sampler" in name for name in names)
    assert {name.split(".", 2)[2] for name in DDPMUNet2DModel(**TINY).state_dict() if "sampler" in name} == {
        f"{way}samplers.0.conv.{kind}" for way in ("down", "up") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers_unet_is_equal_and_comes_back(name):
    config = DIFFUSERS[name]
    model, inputs = build(config), inputs_of(config)
    exported = model.to_diffusers()
    assert type(exported) is UNet2DModel and not exported.training
    torch.testing.assert_close(predict(exported, inputs), predict(model, inputs), rtol=0, atol=1e-5)
    assert exported.state_dict().keys() == model.state_dict().keys()
    back = DDPMUNet2DModel.from_diffusers(exported)
    assert torch.equal(predict(back, inputs), predict(model, inputs)) and not back.training
    expected = {option: model.config[option] for option in model.config if not option.startswith("_")}
    if name == "null_class":  # which has no word there, and is one more class
        expected |= {"num_class_embeds": 6, "null_class": False}
    assert {option: back.config[option] for option in expected} == expected


def test_diffusers_unet_has_weights_of_its_own_in_the_same_dtype_and_mode():
    model = build(TINY).to(torch.bfloat16).train()
    exported = model.to_diffusers()
    assert exported.dtype == torch.bfloat16 and exported.training
    with torch.no_grad():
        exported.conv_in.weight.zero_()
    assert model.conv_in.weight.any()
    assert all(parameter.requires_grad for parameter in exported.parameters())


@pytest.mark.parametrize(
    "options, reasons",
    [
        ({"resample_type": "pool"}, ["no resampling without parameters"]),
        ({"model_channels": 64}, [r"as wide as the first level \(32\), not 64"]),
        ({"model_channels": 64, "resample_type": "pool"}, ["first level", "without parameters"]),
    ],
)
def test_model_that_diffusers_cannot_express(options, reasons):
    model = DDPMUNet2DModel(**TINY | options)
    for reason in reasons:
        with pytest.raises(ValueError, match=f"`diffusers.UNet2DModel` cannot express this model: .*{reason}"):
            model.to_diffusers()


@pytest.mark.parametrize(
    "options, difference",
    [
        ({"sample_size": None}, "`sample_size`"),
        ({"flip_sin_to_cos": True}, "`flip_sin_to_cos`"),
        ({"freq_shift": 0}, "`freq_shift`"),
        ({"downsample_padding": 1}, "`downsample_padding`"),
        ({"add_attention": False}, "`add_attention`"),
        ({"resnet_time_scale_shift": "scale_shift"}, "`resnet_time_scale_shift`"),
        ({"up_block_types": ("UpBlock2D", "UpBlock2D")}, "`up_block_types`"),
        ({"attn_norm_num_groups": 4}, "`attn_norm_num_groups`"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_diffusers_unet_that_is_no_ddpm(options, difference):
    config = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
    }
    with torch.device("meta"):
        DDPMUNet2DModel.from_diffusers(UNet2DModel(**config))
        with pytest.raises(ValueError, match=f"is not a DDPM UNet: .*{difference}"):
            DDPMUNet2DModel.from_diffusers(UNet2DModel(**config | options))


@pytest.mark.parametrize(
    "config, changes, message",
    [
        (TINY, {"sample": torch.zeros(2, 3, 17, 16)}, "17x16 pixels; .* multiples of 2"),
        (TINY, {"sample": torch.zeros(2, 4, 16, 16)}, r"`sample` has shape \(2, 4, 16, 16\), expected .*3"),
        (TINY, {"timestep": torch.zeros(3)}, "`timestep` has 3 entries for 2 images"),
        (TINY, {"class_labels": torch.tensor([1, 2])}, "`class_labels` were given to an unconditional"),
        (CONDITIONAL, {"class_labels": torch.tensor([1, 2, 3])}, "`class_labels` has 3 entries for 2 images"),
        (CONDITIONAL, {"class_labels": torch.tensor([1, 6])}, "`class_labels` has 6; labels .* are 0 to 5"),
        (CONDITIONAL | {"null_class": False}, {"class_labels": None}, "`class_labels` are needed"),
        (CONDITIONAL | {"null_class": False}, {"class_labels": torch.tensor([-1])}, "`class_labels` has -1"),
    ],
)
def test_wrong_inputs_are_named(config, changes, message):
    with pytest.raises(ValueError, match=message):
        DDPMUNet2DModel(**config)(**inputs_of(config) | changes)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"resample_type": "resnet"}, '`resample_type` is \'resnet\'; it must be "conv" or "pool"'),
        ({"block_out_channels": (36, 64)}, r"`block_out_channels` \(36, 64\) must be multiples .* \(8\)"),
        ({"model_channels": 36}, "`model_channels` 36 must be multiples"),
        ({"attention_resolutions": (4,)}, "`attention_resolutions` .* 4 is not the size .*: 16, 8"),
        ({"attention_head_dim": 48}, r"`attention_head_dim` \(48\) must divide 64"),
        ({"null_class": True}, "`null_class` needs classes"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DDPMUNet2DModel(**TINY | options)
