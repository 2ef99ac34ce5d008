"""What diffusers and its users may ask of every model, on tiny configurations of all architecture families."""

import re
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from diffusers import AutoModel, ModelMixin
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils import BaseOutput

from diffusers_ext import (
    ADMClassifierModel,
    ADMUNet2DModel,
    ComposableUNet2DModel,
    DDPMUNet2DModel,
    DilatedConvDenoiserModel,
    GQADiTTransformer2DModel,
)
from diffusers_ext.models.denoiser_dilated import DilatedConv
from diffusers_ext.models.transformer_dit_gqa import GQADiTBlock
from diffusers_ext.models.unet_adm import ADMAttention, ADMClassifierOutput, ADMResnetBlock
from diffusers_ext.models.unet_composable import ASPP, ComposableAttentionBlock, ComposableResnetBlock
from diffusers_ext.models.unet_ddpm import DDPMAttention, DDPMResnetBlock


CLASSES, IMAGE_CHANNELS, TOKENS = 5, 3, 6
ATTENTION_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv_in", "conv1", "conv2", "conv_shortcut", "conv"]
UNET = {
    "sample_size": 16,
    "in_channels": IMAGE_CHANNELS,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_resolutions": (8,),
    "norm_num_groups": 8,  # several channels in a group, or the norm would hide an additive time embedding
}


class Family(NamedTuple):
    """An architecture, in the words of this suite."""

    model_class: type[ModelMixin]
    tiny: dict[str, Any]
    blocks: tuple[type[nn.Module], ...]  # what gradient checkpointing computes anew
    layers: list[str]  # what else than attention LoRA may change
    output_class: type[BaseOutput] = UNet2DOutput


ADM = Family(ADMUNet2DModel, UNET | {"attention_head_dim": 16}, (ADMResnetBlock, ADMAttention), CONVOLUTIONS)
ADM_CLASSIFIER = ADM._replace(
    model_class=ADMClassifierModel, tiny=ADM.tiny | {"num_classes": 7}, output_class=ADMClassifierOutput
)
DDPM = Family(DDPMUNet2DModel, UNET, (DDPMResnetBlock, DDPMAttention), CONVOLUTIONS)
DILATED = Family(
    DilatedConvDenoiserModel,
    {"sample_size": 16, "in_channels": 3, "out_channels": 3, "hidden_channels": (32,) * 5, "time_embedding_dim": 32},
    (DilatedConv,),
    ["conv_in", "conv", "conv_out"],
)
COMPOSABLE = Family(
    ComposableUNet2DModel,
    UNET | {"attention_head_dim": 16},
    (ComposableResnetBlock, ComposableAttentionBlock, ASPP),
    CONVOLUTIONS,
)
DIT = Family(
    GQADiTTransformer2DModel,
    {"sample_size": 16, "patch_size": 4, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8},
    (GQADiTBlock,),
    ["patch_embed", "linear_1", "linear_2", "modulation", "ff.net.0.proj", "ff.net.2", "proj_out"],
    Transformer2DModelOutput,
)


class Case(NamedTuple):
    family: Family
    options: dict[str, Any]
    zeros: str = r"$^"  # names of the layers that are zero before training

    @property
    def config(self) -> dict[str, Any]:
        return self.family.tiny | self.options

    @property
    def null_class(self) -> bool:
        return self.config.get("null_class", False)

    @property
    def factor(self) -> int:
        """What must divide height and width."""
        return self.config.get("patch_size") or 2 ** (len(self.config.get("block_out_channels", "1")) - 1)

    @property
    def layers(self) -> list[str]:
        """What LoRA may change besides attention; peft knows no depthwise convolutions of just any width."""
        separable = self.config.get("conv_type") == "separable"
        return ["conv_in", "pointwise", "conv_shortcut"] if separable else self.family.layers

    def build(self, **options) -> ModelMixin:
        """A model in evaluation mode of which no layer is silent; the same at every call."""
        torch.manual_seed(0)
        model = self.family.model_class(**self.config | options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        return model.eval()

    def inputs(self, batch: int = 2, height: int = 16, width: int = 16) -> dict[str, torch.Tensor]:
        """Arguments of `forward`, another timestep and condition for each image; the same at every call."""
        random = torch.Generator().manual_seed(0)
        inputs = {
            "sample": torch.randn(batch, IMAGE_CHANNELS, height, width, generator=random),
            "timestep": torch.tensor([20.0, 700.0, 131.5, 999.0])[:batch],
        }
        if self.config.get("num_class_embeds"):
            inputs["class_labels"] = torch.tensor([3, 1, 0, 4])[:batch]
        if self.config.get("low_res_channels"):
            inputs["low_res"] = torch.randn(batch, IMAGE_CHANNELS, height // 2, width // 2, generator=random)
        if self.config.get("cross_attention_dim"):
            shape = (batch, TOKENS, self.config["cross_attention_dim"])
            inputs["encoder_hidden_states"] = torch.randn(shape, generator=random)
        return inputs


GUIDED = {"num_class_embeds": CLASSES, "null_class": True}
ZEROS_UNET = r"(conv2|to_out\.0|conv_out)$"
CASES = {
    "adm": Case(ADM, GUIDED | {"out_channels": 6}, ZEROS_UNET),
    "adm-additive": Case(
        ADM, {"resnet_time_scale_shift": "default", "resample_type": "conv", "num_attention_heads": 2}, ZEROS_UNET
    ),
    "adm-super-resolution": Case(
        ADM, {"in_channels": 6, "low_res_channels": 3, "dropout": 0.1, "resample_type": "pool"}, ZEROS_UNET
    ),
    "adm-classifier": Case(ADM_CLASSIFIER, {"pool": "attention"}, ZEROS_UNET),
    "adm-classifier-spatial": Case(ADM_CLASSIFIER, {"pool": "spatial_v2"}, ZEROS_UNET),
    "ddpm": Case(DDPM, GUIDED, ZEROS_UNET),
    "ddpm-pool": Case(
        DDPM, {"resample_type": "pool", "model_channels": 48, "attention_head_dim": 16, "dropout": 0.1}, ZEROS_UNET
    ),
    "dilated": Case(DILATED, GUIDED | {"out_channels": 6}),
    "dilated-unconditional": Case(DILATED, {"dilations": (1, 2, 4, 2, 1)}),
    "composable": Case(COMPOSABLE, GUIDED, ZEROS_UNET),
    "composable-text": Case(
        COMPOSABLE,
        GUIDED
        | {
            "time_embedding_type": "hybrid",
            "class_conditioning": "cross_attention",
            "cross_attention_dim": 12,
            "channel_attention": True,
            "dilations": (1, 2),
            "attention_position_embedding": "relative",
            "bottleneck_context": "aspp",
        },
        r"(conv2|to_out\.0|conv_out|positions\.linear_2|context\.proj_out)$",
    ),
    "composable-post": Case(
        COMPOSABLE,
        {
            "num_class_embeds": CLASSES,
            "resnet_order": "post",
            "norm_type": "layer",
            "conv_type": "separable",
            "time_embedding_type": "learned",
            "time_conditioning": "adain",
            "class_conditioning": "concat",
            "attention_position_embedding": "learned_fourier",
        },
        r"(resnets\.\d+\.norm2|to_out\.0|conv_out)$",
    ),
    "composable-batch": Case(
        COMPOSABLE,
        {
            "norm_type": "batch",
            "time_conditioning": "cross_attention",
            "attention_position_embedding": "sincos2d",
            "dropout": 0.1,
        },
        ZEROS_UNET,
    ),
    "composable-additive": Case(
        COMPOSABLE,
        GUIDED | {"time_conditioning": "concat", "class_conditioning": "add", "conv_type": "separable"},
        r"(conv2\.pointwise|to_out\.0|conv_out)$",
    ),
    "dit": Case(DIT, GUIDED | {"num_key_value_heads": 2}, r"(modulation|modulation_out|proj_out)$"),
    "dit-additive": Case(
        DIT,
        {
            "num_class_embeds": CLASSES,
            "num_key_value_heads": 1,
            "conditioning": "additive",
            "time_embedding_type": "learned",
            "class_embedding_type": "sinusoidal",
            "qk_norm": "rms_norm",
            "position_embedding": "rotary",
            "activation_fn": "swiglu",
            "attention_bias": False,
        },
        r"proj_out$",
    ),
    "dit-unconditional": Case(
        DIT,
        {"out_channels": 6, "qk_norm": "layer_norm", "position_embedding": "learned", "dropout": 0.1},
        r"(modulation|modulation_out|proj_out)$",
    ),
}


def cases(*names: str):
    """Parametrises a test over the cases of these names."""
    return pytest.mark.parametrize("case", [pytest.param(CASES[name], id=name) for name in names])


every_case = cases(*CASES)
# One or two of each family, for what is slow and hardly depends on options.
some_cases = cases("adm", "adm-classifier", "ddpm", "dilated", "composable", "composable-text", "dit", "dit-additive")
denoisers = cases(*(name for name in CASES if "classifier" not in name))
with_attention = cases(*(name for name in CASES if "dilated" not in name))
with_dropout = cases(*(name for name in CASES if "dropout" in CASES[name].config))
with_classes = cases(*(name for name in CASES if "num_class_embeds" in CASES[name].config))
unconditional = cases(*(name for name in CASES if not {"num_class_embeds", "num_classes"} & CASES[name].config.keys()))
one_per_family = cases("adm", "adm-classifier", "ddpm", "dilated", "composable", "dit")


@torch.no_grad()
def predict(model: nn.Module, inputs: dict) -> torch.Tensor:
    return model(**inputs, return_dict=False)[0]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, in units of the largest expected value."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max()).item()


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    kept = ("timestep", "class_labels")
    return {name: x if name in kept else x.to(dtype) for name, x in inputs.items()}


def gradients(model: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    output = model(**inputs, return_dict=False)[0]
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def lora(rank: int, targets: list[str], **options) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False, **options)


# Outputs


@every_case
def test_output_has_a_name_and_a_shape(case):
    model, inputs = case.build(), case.inputs()
    with torch.no_grad():
        output = model(**inputs)
    assert isinstance(output, case.family.output_class)
    if case.family is ADM_CLASSIFIER:
        values, shape = output.logits, (2, 7)
    else:
        values, shape = output.sample, (2, case.config.get("out_channels", IMAGE_CHANNELS), 16, 16)
    assert values.shape == shape and torch.equal(values, output[0])
    assert torch.equal(values, predict(model, inputs))


@every_case
@pytest.mark.parametrize("height, width, scale", [(16, 24, 1.0), (32, 32, 0.01)], ids=["rectangle", "tiny values"])
def test_output_is_right_in_every_mode_and_layout(case, height, width, scale):
    model, inputs = case.build(), case.inputs(2, height, width)
    inputs["sample"] *= scale  # where small, the norms must not lose them
    expected = predict(case.build().double(), cast(inputs, torch.float64))
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout)
        inputs["sample"] = inputs["sample"].contiguous(memory_format=layout)
        assert error(predict(model, inputs), expected) < 1e-5
        assert error(model(**inputs)[0], expected) < 1e-5
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert error(predict(model, inputs), expected) < 0.08
            assert error(model(**inputs)[0], expected) < 0.08


@every_case
@pytest.mark.parametrize("dtype, bound", [(torch.float16, 0.01), (torch.bfloat16, 0.08)], ids=str)
def test_half_precision(case, dtype, bound):
    inputs = case.inputs()
    expected = predict(case.build(), inputs)
    actual = predict(case.build().to(dtype), cast(inputs, dtype))
    assert actual.dtype == dtype and error(actual, expected) < bound


@every_case
def test_images_of_a_batch_do_not_meet(case):
    model, inputs = case.build(), case.inputs(3)
    singles = [predict(model, {name: x[i : i + 1] for name, x in inputs.items()}) for i in range(3)]
    assert error(predict(model, inputs), torch.cat(singles)) < 1e-5


@every_case
def test_forms_of_the_timestep_agree_and_timesteps_matter(case):
    model, inputs = case.build(), case.inputs()
    expected = predict(model, inputs | {"timestep": 250})
    for timestep in (
        250.0,
        torch.tensor(250),
        torch.tensor([250.0]),
        torch.tensor([250, 250]),
        torch.full((2,), 250.0),
    ):
        assert error(predict(model, inputs | {"timestep": timestep}), expected) < 1e-5
    assert error(predict(model, inputs | {"timestep": 250.5}), expected) > 1e-4
    assert error(predict(model, inputs | {"timestep": torch.tensor([250, 900])})[1:], expected[1:]) > 1e-3


@denoisers
def test_one_call_for_all(case):
    model, inputs = case.build(), case.inputs()
    expected = predict(model, inputs)
    sample, timestep, class_labels = (inputs.pop(name, None) for name in ("sample", "timestep", "class_labels"))
    with torch.no_grad():
        assert torch.equal(model(sample, timestep, class_labels, **inputs).sample, expected)
        assert torch.equal(model(sample, timestep, class_labels, **inputs, return_dict=False)[0], expected)


@every_case
def test_conditions_matter(case):
    model, inputs = case.build(), case.inputs()
    expected = predict(model, inputs)
    for name in inputs.keys() - {"sample", "timestep"}:
        assert error(predict(model, inputs | {name: inputs[name].flip(0)}), expected) > 1e-3, name


@with_dropout
def test_dropout_is_for_training(case):
    model, inputs = case.build(), case.inputs()
    assert torch.equal(predict(model, inputs), predict(model, inputs))
    model.train()
    assert not torch.equal(predict(model, inputs), predict(model, inputs))


# Class labels


@with_classes
def test_one_label_serves_all_images(case):
    model, inputs = case.build(), case.inputs()
    one, each = (inputs | {"class_labels": torch.tensor(labels)} for labels in ([3], [3, 3]))
    assert error(predict(model, one), predict(model, each)) < 1e-6


@with_classes
def test_no_label_is_the_null_label(case):
    model, inputs = case.build(), case.inputs()
    without = inputs | {"class_labels": None}
    if not case.null_class:
        with pytest.raises(ValueError, match="`class_labels` are needed"):
            model(**without)
        return
    null = predict(model, inputs | {"class_labels": torch.tensor([CLASSES, CLASSES])})
    assert error(predict(model, without), null) < 1e-6
    assert error(predict(model, inputs), null) > 1e-3


@with_classes
def test_wrong_labels_are_named(case):
    model, inputs = case.build(), case.inputs()
    rows = CLASSES + case.null_class
    for value in (-1, rows):
        with pytest.raises(ValueError, match=rf"`class_labels` \w+ {value}\b.*\b({rows - 1}|{rows})\b"):
            model(**inputs | {"class_labels": torch.tensor([1, value])})
    with pytest.raises(ValueError, match="`class_labels` has 3 entries for 2 images"):
        model(**inputs | {"class_labels": torch.tensor([1, 2, 3])})


@unconditional
def test_labels_are_no_input_of_an_unconditional_model(case):
    with pytest.raises(ValueError, match="`class_labels` were given to an unconditional"):
        case.build()(**case.inputs(), class_labels=torch.tensor([1, 2]))


@cases("adm", "ddpm", "dilated", "composable", "dit")
def test_null_class_needs_classes(case):
    with pytest.raises(ValueError, match="`null_class`.*`num_class_embeds`"):
        case.build(num_class_embeds=None)


# Other wrong inputs


@every_case
def test_wrong_inputs_are_named(case):
    model, inputs = case.build(), case.inputs()
    for shape in ((2, 4, 16, 16), (3, 16, 16)):
        with pytest.raises(ValueError, match=re.escape(f"`sample` has shape {shape}, expected (batch, 3")):
            model(**inputs | {"sample": torch.zeros(shape)})
    with pytest.raises(ValueError, match="`timestep` has 3 entries for 2 images"):
        model(**inputs | {"timestep": torch.zeros(3)})


@cases(*(name for name in CASES if CASES[name].factor > 1))
def test_sizes_that_do_not_divide_are_named(case):
    model, inputs = case.build(), case.inputs()
    for height, width in ((17, 16), (16, 16 - case.factor // 2)):
        with pytest.raises(ValueError, match=f"`sample` is {height}x{width} pixels; .* multiples of {case.factor}"):
            model(**inputs | {"sample": torch.zeros(2, IMAGE_CHANNELS, height, width)})


# Training


@every_case
def test_every_parameter_learns(case):
    for name, gradient in gradients(case.build().train(), case.inputs()).items():
        assert gradient is not None and gradient.abs().max() > 0, name


@every_case
def test_checkpointing_leaves_gradients_equal(case):
    model, inputs = case.build(**({"dropout": 0.0} if "dropout" in case.config else {})).train(), case.inputs()
    expected = gradients(model, inputs)
    model.zero_grad(set_to_none=True)
    calls = []

    def checkpoint(module, *args):
        calls.append(module)
        return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=False)

    model.enable_gradient_checkpointing(checkpoint)
    assert model.is_gradient_checkpointing
    torch.testing.assert_close(gradients(model, inputs), expected, rtol=0, atol=5e-5)
    assert {module for module in model.modules() if isinstance(module, case.family.blocks)} <= set(calls)
    calls.clear()
    predict(model, inputs)
    model.disable_gradient_checkpointing()
    model(**inputs)
    assert not calls


@every_case
def test_residual_branches_and_outputs_start_at_zero(case):
    model = case.family.model_class(**case.config)
    weights = {name.removesuffix(".weight"): x for name, x in model.named_parameters() if name.endswith(".weight")}
    assert {name for name, x in weights.items() if not x.any()} == {x for x in weights if re.search(case.zeros, x)}


# Storage


@every_case
def test_config_rebuilds_the_model(case):
    model = case.family.model_class(**case.config)
    assert {option: model.config[option] for option in case.config} == case.config
    other = case.family.model_class.from_config(model.config)
    assert {k: v.shape for k, v in other.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@every_case
def test_saved_model_is_the_same(case, tmp_path):
    model, inputs = case.build(), case.inputs()
    model.save_pretrained(tmp_path)
    for loader in (case.family.model_class, AutoModel):
        loaded = loader.from_pretrained(str(tmp_path))
        assert type(loaded) is case.family.model_class and not loaded.training
        assert torch.equal(predict(loaded, inputs), predict(model, inputs))


@some_cases
@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"max_shard_size": "50KB"}], ids=str)
def test_variants_and_shards(case, options, tmp_path):
    model, inputs = case.build(), case.inputs()
    model.save_pretrained(tmp_path, **options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("max_shard_size" in options)
    variant = {name: options[name] for name in options if name == "variant"}
    loaded = case.family.model_class.from_pretrained(tmp_path, **variant)
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))
    half = case.family.model_class.from_pretrained(tmp_path, torch_dtype=torch.float16, **variant)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    if variant:
        with pytest.raises(OSError, match="no file named"):
            case.family.model_class.from_pretrained(tmp_path)


@cases(
    "adm", "adm-super-resolution", "adm-classifier", "adm-classifier-spatial", "ddpm", "dilated", "composable", "dit"
)
def test_disk_stands_in_for_memory(case, tmp_path):
    model, inputs = case.build(), case.inputs()
    model.save_pretrained(tmp_path)
    loaded = case.family.model_class.from_pretrained(
        tmp_path,
        device_map="auto",
        max_memory={"cpu": model.get_memory_footprint() // 2},
        offload_folder=tmp_path / "offloaded",
    )
    assert "disk" in loaded.hf_device_map.values()
    assert error(predict(loaded, inputs), predict(model, inputs)) < 1e-5


@every_case
@pytest.mark.parametrize(
    "options", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {}], ids=["block", "leaf"]
)
def test_group_offload(case, options):
    model, inputs = case.build(), case.inputs()
    expected = predict(model, inputs)
    model.enable_group_offload(torch.device("cpu"), **{"offload_type": "leaf_level", **options})
    assert error(predict(model, inputs), expected) < 1e-5


@every_case
def test_layerwise_casting(case):
    model, inputs = case.build(), case.inputs()
    expected, footprint = predict(model, inputs), model.get_memory_footprint()
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    assert model.get_memory_footprint() < 0.65 * footprint
    norms = [module for module in model.modules() if isinstance(module, (nn.GroupNorm, nn.BatchNorm2d, nn.LayerNorm))]
    kept = {id(parameter) for module in norms for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.dtype in (torch.float16, torch.float32)
        if id(parameter) in kept or "positional_embedding" in name:
            assert parameter.dtype == torch.float32, name
    actual = predict(model, inputs)
    assert actual.dtype == torch.float32 and 0 < error(actual, expected) < 0.01

    model = case.build()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert predict(model, cast(inputs, torch.bfloat16)).isfinite().all()


# Attention and adapters


def attentions(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, AttentionModuleMixin)]


@with_attention
def test_attention_processors_can_be_replaced(case):
    class Zero:
        def __call__(self, attn, hidden_states, *args):
            return torch.zeros_like(hidden_states)

    model, inputs = case.build(), case.inputs()
    expected, processors = predict(model, inputs), model.attn_processors
    assert len(processors) == len(attentions(model)) > 1
    model.set_attn_processor(Zero())
    assert {type(processor) for processor in model.attn_processors.values()} == {Zero}
    assert error(predict(model, inputs), expected) > 1e-3
    default = attentions(model)[0]._default_processor_cls
    assert {type(processor) for processor in processors.values()} == {default}
    model.set_attn_processor(dict.fromkeys(processors, default()))
    assert torch.equal(predict(model, inputs), expected)
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor(dict(list(processors.items())[:1]))


@with_attention
def test_attention_backend_can_be_chosen(case):
    model, inputs = case.build(), case.inputs()
    expected = predict(model, inputs)
    model.set_attention_backend("_native_math")
    try:
        assert error(predict(model, inputs), expected) < 1e-5
    finally:
        model.reset_attention_backend()


@with_attention
def test_fused_projections_change_nothing(case):
    model, inputs = case.build(), case.inputs()
    expected = predict(model, inputs)
    model.fuse_qkv_projections()
    for module in attentions(model):
        assert module.fused_projections and hasattr(module, "to_kv" if module.is_cross_attention else "to_qkv")
    assert error(predict(model, inputs), expected) < 1e-5
    model.unfuse_qkv_projections()
    for module in attentions(model):
        assert not module.fused_projections and not hasattr(module, "to_kv") and not hasattr(module, "to_qkv")
    assert torch.equal(predict(model, inputs), expected)


@pytest.mark.parametrize(
    "case, targets",
    [
        pytest.param(case, ATTENTION_LAYERS, id=f"{name}-attention")
        for name, case in CASES.items()
        if "dilated" not in name
    ]
    + [pytest.param(case, case.layers, id=f"{name}-other layers") for name, case in CASES.items()],
)
def test_lora(case, targets, tmp_path):
    model, inputs = case.build(), case.inputs()
    plain = predict(model, inputs)
    model.add_adapter(lora(4, targets))
    expected = predict(model, inputs)
    assert error(expected, plain) > 1e-3
    model.save_lora_adapter(tmp_path)
    model.fuse_lora()
    assert error(predict(model, inputs), expected) < 1e-4
    model.unfuse_lora()
    assert error(predict(model, inputs), expected) < 1e-4
    model.unload_lora()
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert error(predict(model, inputs), plain) < 1e-4
    loaded = case.build()
    loaded.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert error(predict(loaded, inputs), expected) < 1e-5
    trained = {name for name, x in gradients(loaded, inputs).items() if "lora" in name and x.abs().max() > 0}
    assert trained == {name for name, _ in loaded.named_parameters() if "lora" in name}


@cases("adm", "adm-additive", "adm-classifier", "ddpm", "composable", "dit")
def test_adapters_of_one_model_can_be_exchanged(case, tmp_path):
    inputs, expected = case.inputs(), []
    for rank in (4, 8):
        model = case.build()
        torch.manual_seed(rank)
        # To swap them, peft replaces convolutions by plain ones, which neither upsample nor are dilated.
        targets = ATTENTION_LAYERS + case.family.layers
        model.add_adapter(lora(rank, targets, exclude_modules=".*upsamplers.*"))
        expected.append(predict(model, inputs))
        model.save_lora_adapter(tmp_path / str(rank))
    model = case.build()
    model.enable_lora_hotswap(target_rank=8)
    model.load_lora_adapter(tmp_path / "4", adapter_name="style", prefix=None, use_safetensors=True)
    assert error(predict(model, inputs), expected[0]) < 1e-5
    model.load_lora_adapter(tmp_path / "8", adapter_name="style", prefix=None, use_safetensors=True, hotswap=True)
    assert error(predict(model, inputs), expected[1]) < 1e-5


# Compilers


@some_cases
def test_one_graph_serves_all_timesteps(case):
    model, inputs = case.build(), case.inputs()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for timestep in (inputs["timestep"], inputs["timestep"] - 1.5):
            expected = predict(model, inputs | {"timestep": timestep})
            assert error(predict(compiled, inputs | {"timestep": timestep}), expected) < 1e-5


@one_per_family
def test_repeated_blocks_compile_once(case):
    model, inputs = case.build(), case.inputs()
    expected = predict(model, inputs)
    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        assert error(predict(model, inputs), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the compiler's, on a busy machine
@one_per_family
def test_compiled_code_gives_the_same(case):
    model, inputs = case.build(), case.inputs()
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model, fullgraph=True)
        assert error(predict(compiled, inputs), predict(model, inputs)) < 1e-4
        predict(compiled, inputs)


@some_cases
def test_export(case):
    model, inputs = case.build(), case.inputs()
    if case.null_class:
        del inputs["class_labels"]
    exported = torch.export.export(model, (), inputs).module()
    assert error(exported(**inputs)[0], predict(model, inputs)) < 1e-5
