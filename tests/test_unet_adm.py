"""What only the ADM UNet and its classifier have: options, embedding of time, the equal model of diffusers, errors."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from diffusers import ModelMixin, UNet2DModel

from diffusers_ext import ADMClassifierModel, ADMUNet2DModel
from diffusers_ext.conversion import save_original
from diffusers_ext.models import unet_adm
from diffusers_ext.models.unet_adm import ADMAttention


TINY = {
    "sample_size": 16,
    "in_channels": 3,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_resolutions": (8,),
    "attention_head_dim": 16,
    "norm_num_groups": 8,  # several channels in a group, or the norm would hide an additive time embedding
}


class Case(NamedTuple):
    model_class: type[ModelMixin]
    config: dict

    def build(self) -> ModelMixin:
        """A model in evaluation mode of which no layer is silent; the same at every call."""
        torch.manual_seed(0)
        model = self.model_class(**self.config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        return model.eval()

    def inputs(self, batch: int = 2, height: int | None = None, width: int | None = None) -> dict[str, torch.Tensor]:
        """Arguments of `forward`, another timestep and class for each image; the same at every call."""
        height, width = height or self.config["sample_size"], width or self.config["sample_size"]
        random = torch.Generator().manual_seed(0)
        inputs = {
            "sample": torch.randn(batch, 3, height, width, generator=random),
            "timestep": torch.tensor([20.0, 700.0, 131.5, 999.0])[:batch],
        }
        if self.config.get("num_class_embeds"):
            inputs["class_labels"] = torch.tensor([3, 1, 0, 4])[:batch]
        if self.config.get("low_res_channels"):
            inputs["low_res"] = torch.randn(batch, 3, height // 2, width // 2, generator=random)
        return inputs


def unet(**options) -> Case:
    return Case(ADMUNet2DModel, {**TINY, **options})


def classifier(pool: str, **options) -> Case:
    return Case(ADMClassifierModel, {**TINY, "pool": pool, "num_classes": 7, **options})


CASES = {
    "scale_shift": unet(),
    "class_conditional": unet(num_class_embeds=5, out_channels=6),
    "super_resolution": unet(in_channels=6, low_res_channels=3),
    "heads_by_count": unet(num_attention_heads=2, num_attention_heads_upsample=4),
    "half_first_level": unet(model_channels=64, timestep_scale=0.25),
    "deep": unet(layers_per_block=2, attention_resolutions=(16, 8)),
    "wide": unet(block_out_channels=(128, 128), norm_num_groups=32, sample_size=32, attention_resolutions=(16,)),
    "attention_pool": classifier("attention"),
    "adaptive_pool": classifier("adaptive", resample_type="conv"),
    "spatial_pool": classifier("spatial", num_attention_heads=2),
}
DIFFUSERS_CASES = {  # those that `UNet2DModel` can express
    "scale_shift": CASES["scale_shift"],
    "additive": unet(resnet_time_scale_shift="default", resample_type="conv"),
    "class_conditional": CASES["class_conditional"],
    "deep": unet(layers_per_block=2, attention_resolutions=(16, 8), resnet_time_scale_shift="default"),
    "heads_by_count": unet(num_attention_heads=4),
}


@pytest.fixture(params=DIFFUSERS_CASES.values(), ids=DIFFUSERS_CASES)
def diffusers_case(request) -> Case:
    return request.param


@torch.no_grad()
def predict(model: nn.Module, inputs: dict) -> torch.Tensor:
    return model(**inputs, return_dict=False)[0]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, in units of the largest expected value."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max()).item()


# Options beyond those that `test_models.py` looks at


@pytest.fixture(params=["heads_by_count", "half_first_level", "deep", "wide", "adaptive_pool", "spatial_pool"])
def option(request) -> Case:
    return CASES[request.param]


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_output_is_right_in_every_mode_and_layout(option, scale):
    size = option.config["sample_size"]
    model, inputs = option.build(), option.inputs(2, size, size + 8)
    inputs["sample"] *= scale
    expected = predict(option.build().double(), inputs | {"sample": inputs["sample"].double()})
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout)
        inputs["sample"] = inputs["sample"].contiguous(memory_format=layout)
        assert error(predict(model, inputs), expected) < 1e-5
        assert error(model(**inputs)[0], expected) < 1e-5
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert error(predict(model, inputs), expected) < 0.08


def test_every_parameter_learns(option):
    model = option.build().train()
    output = model(**option.inputs(), return_dict=False)[0]
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_adaptive_pool_starts_at_zero():
    assert not ADMClassifierModel(**CASES["adaptive_pool"].config).head[3].weight.any()


def test_timestep_scale_multiplies_timesteps():
    inputs = unet().inputs()
    expected = predict(unet().build(), inputs | {"timestep": 100})
    assert error(predict(unet(timestep_scale=0.25).build(), inputs | {"timestep": 400}), expected) < 1e-5


@pytest.mark.parametrize("name, up", [("scale_shift", 4), ("heads_by_count", 4)])
def test_number_of_heads(name, up):
    down = CASES[name].config.get("num_attention_heads", 64 // TINY["attention_head_dim"])
    modules = CASES[name].build().named_modules()
    heads = {name.split(".")[0]: module.heads for name, module in modules if isinstance(module, ADMAttention)}
    assert heads == {"down_blocks": down, "mid_block": down, "up_blocks": up}


@pytest.mark.parametrize("name", ["scale_shift", "class_conditional", "super_resolution", "attention_pool"])
def test_time_of_a_whole_schedule_is_embedded_at_once(name):
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    timesteps = torch.tensor([999, 500, 20, 0.5])
    labels = inputs.pop("class_labels", None)
    if labels is not None:
        labels = labels[:1]
    table = model.embed_time(timesteps, labels)
    for row, timestep in zip(table, timesteps):
        condition = {} if labels is None else {"class_labels": labels}
        expected = predict(model, inputs | condition | {"timestep": timestep})
        assert error(predict(model, inputs | {"timestep": None, "temb": row[None]}), expected) < 1e-5


def test_attention_pool_interpolates_its_positions():
    case = CASES["attention_pool"]
    model = case.build()
    assert predict(model, case.inputs(2, 24, 32)).shape == (2, 7)
    pool = model.head[1]
    with torch.no_grad():
        pool.positional_embedding[1:] = torch.arange(8.0).repeat(8)[:, None]  # grows from column to column
        positions = pool._positions(8, 16)
    assert torch.equal(positions[0], pool.positional_embedding[0])
    grid = positions[1:].view(8, 16, -1)
    assert grid.diff(dim=0).abs().max() < 1e-5 and grid.diff(dim=1)[:, 2:-2].min() > 0.1


# Classes


def test_labels_are_checked_where_time_is_embedded():
    model = CASES["class_conditional"].build()
    with pytest.raises(ValueError, match="`class_labels` has 5; labels of this UNet are 0 to 4"):
        model.embed_time(10, torch.tensor([5]))
    with pytest.raises(ValueError, match="`class_labels` are needed by this class-conditional UNet"):
        model.embed_time(10)
    with pytest.raises(ValueError, match="`class_labels` were given to an unconditional UNet"):
        CASES["scale_shift"].build().embed_time(10, torch.tensor([1]))


def test_null_label_is_embedded_by_default():
    model = unet(num_class_embeds=5, null_class=True).build()
    expected = model.embed_time(torch.tensor([10, 20]), torch.tensor([5, 5]))
    torch.testing.assert_close(model.embed_time(torch.tensor([10, 20])), expected)


def test_null_class_is_the_last_class_for_diffusers():
    model, inputs = unet(num_class_embeds=5, null_class=True).build(), unet().inputs()
    exported = model.to_diffusers()
    assert exported.config.num_class_embeds == 6
    labels = {"class_labels": torch.tensor([5, 5])}
    assert error(predict(exported, inputs | labels), predict(model, inputs)) < 1e-5
    back = ADMUNet2DModel.from_diffusers(exported)
    assert (back.config.num_class_embeds, back.config.null_class) == (6, False)
    assert error(predict(back, inputs | labels), predict(model, inputs)) < 1e-6


def test_original_has_no_null_class(tmp_path):
    model = unet(norm_num_groups=32, num_class_embeds=5, null_class=True).build()
    with pytest.raises(ValueError, match="null_class=True instead of False"):
        save_original(model, tmp_path / "model.pt", "guided-diffusion/unet")


@pytest.mark.parametrize("name", unet_adm.PRESETS)
def test_presets(name):
    options = unet_adm.PRESETS[name]
    with torch.device("meta"):
        model = ADMUNet2DModel(**options)
        size, channels = options["sample_size"], model.config.in_channels
        labels = {"class_labels": torch.tensor([1])} if "num_class_embeds" in options else {}
        output = model(torch.zeros(2, channels, size, size), torch.zeros(2), **labels).sample
    assert output.shape == (2, model.config.out_channels, size, size)
    if name in ("mnist-28", "mnist-32"):
        assert 1.8e6 < model.num_parameters() < 2.3e6
        assert (model.config.in_channels, model.config.num_class_embeds, model.config.null_class) == (1, 10, True)
    if name == "cifar-32":
        assert (model.config.out_channels, model.config.num_class_embeds) == (6, 10)


# The equal model of diffusers


def test_diffusers_unet_is_equal_and_comes_back(diffusers_case):
    model, inputs = diffusers_case.build(), diffusers_case.inputs()
    exported = model.to_diffusers()
    assert type(exported) is UNet2DModel and not exported.training
    assert error(predict(exported, inputs), predict(model, inputs)) < 1e-5
    back = ADMUNet2DModel.from_diffusers(exported)
    assert error(predict(back, inputs), predict(model, inputs)) < 1e-6
    assert not back.training
    torch.testing.assert_close(back.state_dict(), model.state_dict(), rtol=0, atol=0)
    options = dict(model.config)
    if options["num_attention_heads"]:  # in the words of diffusers
        options |= {"num_attention_heads": None, "attention_head_dim": 64 // options["num_attention_heads"]}
    hidden = {option for option in options if option.startswith("_")}
    assert {k: back.config[k] for k in options.keys() - hidden} == {k: options[k] for k in options.keys() - hidden}


def test_diffusers_unet_keeps_dtype_and_mode():
    model = CASES["scale_shift"].build().to(torch.bfloat16).train()
    assert model.to_diffusers().dtype == torch.bfloat16 and model.to_diffusers().training
    back = ADMUNet2DModel.from_diffusers(model.to_diffusers())
    assert back.dtype == torch.bfloat16 and back.training


@pytest.mark.parametrize(
    "options, reasons",
    [
        ({"num_attention_heads": 4, "attention_resolutions": (16, 8)}, ["one number of heads for all resolutions"]),
        ({"num_attention_heads": 2, "num_attention_heads_upsample": 4}, ["one number of heads for all resolutions"]),
        ({"model_channels": 64}, [r"as wide as the first level \(32\), not 64"]),
        ({"resample_type": "pool"}, ["resampling without parameters"]),
        ({"in_channels": 6, "low_res_channels": 3}, ["low-resolution image"]),
        ({"timestep_scale": 0.25}, [r"timesteps \(by 0.25\)"]),
        ({"timestep_scale": 0.25, "resample_type": "pool"}, ["0.25", "without parameters"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_model_that_diffusers_cannot_express(options, reasons):
    model = ADMUNet2DModel(**{**TINY, **options})
    for reason in reasons:
        with pytest.raises(ValueError, match=f"`diffusers.UNet2DModel` cannot express this model: .*{reason}"):
            model.to_diffusers()


@pytest.mark.parametrize(
    "options, difference",
    [
        ({"sample_size": None}, "`sample_size`"),
        ({"sample_size": (16, 16)}, "`sample_size`"),
        ({"flip_sin_to_cos": False}, "`flip_sin_to_cos`"),
        ({"freq_shift": 1}, "`freq_shift`"),
        ({"center_input_sample": True}, "`center_input_sample`"),
        ({"time_embedding_type": "fourier"}, "`time_embedding_type`"),
        ({"act_fn": "relu"}, "`act_fn`"),
        ({"downsample_padding": 0}, "`downsample_padding`"),
        ({"mid_block_scale_factor": 2.0}, "`mid_block_scale_factor`"),
        ({"add_attention": False}, "`add_attention`"),
        ({"attention_head_dim": None}, "`attention_head_dim`"),
        ({"upsample_type": "resnet"}, "`upsample_type`"),
        ({"up_block_types": ("UpBlock2D", "UpBlock2D")}, "`up_block_types`"),
        ({"down_block_types": ("DownBlock2D", "SkipDownBlock2D")}, "`down_block_types`"),
        ({"class_embed_type": "timestep"}, "`class_embed_type`"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_diffusers_unet_that_is_no_adm(options, difference):
    config = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "layers_per_block": 1,
    }
    ADMUNet2DModel.from_diffusers(UNet2DModel(**config))
    with pytest.raises(ValueError, match=f"is not an ADM: .*{difference}"):
        ADMUNet2DModel.from_diffusers(UNet2DModel(**{**config, **options}))


# Errors


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("attention_pool", {"sample": torch.zeros(2, 3, 16, 15)}, "16x15 pixels; .* multiples of 2"),
        ("super_resolution", {"sample": torch.zeros(2, 6, 16, 16)}, r"`sample` has shape .* expected \(batch, 3"),
        ("spatial_pool", {"timestep": torch.zeros(3)}, "`timestep` has 3 entries for 2 images"),
        ("super_resolution", {"low_res": None}, "`low_res` images are needed"),
        ("super_resolution", {"low_res": torch.zeros(2, 1, 8, 8)}, r"`low_res` has shape \(2, 1, 8, 8\)"),
        ("super_resolution", {"low_res": torch.zeros(1, 3, 8, 8)}, r"`low_res` has shape \(1, 3, 8, 8\)"),
        ("scale_shift", {"low_res": torch.zeros(2, 3, 8, 8)}, "`low_res` images were given to a UNet that has no"),
    ],
)
def test_wrong_inputs_are_named(name, changes, message):
    model, inputs = CASES[name].build(), CASES[name].inputs()
    with pytest.raises(ValueError, match=message):
        model(**{**inputs, **changes})


@pytest.mark.parametrize(
    "build", [unet, lambda **options: classifier("adaptive", **options)], ids=["unet", "classifier"]
)
@pytest.mark.parametrize(
    "options, message",
    [
        ({"resnet_time_scale_shift": "film"}, "`resnet_time_scale_shift` is 'film'"),
        ({"resample_type": "resblock"}, "`resample_type` is 'resblock'"),
        (
            {"block_out_channels": (36, 64)},
            r"`block_out_channels` \(36, 64\) must be multiples of `norm_num_groups` \(8\)",
        ),
        ({"attention_resolutions": (2, 7)}, "`attention_resolutions` .* 7 is not the size"),
        ({"attention_head_dim": 48}, r"`attention_head_dim` \(48\) must divide 64"),
        ({"attention_head_dim": None}, r"`attention_head_dim` \(None\) must divide 64"),
        ({"num_attention_heads": 5}, r"`num_attention_heads` \(5\) must divide 64"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_options_are_named(build, options, message):
    case = build(**options)
    with pytest.raises(ValueError, match=message):
        case.model_class(**case.config)


def test_wrong_pool_is_named():
    case = classifier("mean")
    with pytest.raises(ValueError, match="`pool` is 'mean'; it must be .*attention"):
        case.model_class(**case.config)
