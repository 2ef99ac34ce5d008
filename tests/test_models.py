"""What diffusers and its users may ask of every model, on tiny configurations of each architecture."""

from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from diffusers import AutoModel, ModelMixin, UNet2DModel
from diffusers.models.attention import AttentionModuleMixin

from diffusers_ext import ADMClassifierModel, ADMUNet2DModel
from diffusers_ext.models.unet_adm import ADMAttention, ADMAttnProcessor, ADMResnetBlock


TINY = {
    "sample_size": 16,
    "in_channels": 3,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_resolutions": (8,),
    "attention_head_dim": 16,
    "norm_num_groups": 8,  # several channels in a group, or the norm would hide an additive time embedding
}
ATTENTION_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv_in", "conv1", "conv2", "conv_shortcut", "conv"]


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
    "additive": unet(resnet_time_scale_shift="default", resample_type="conv"),
    "pooling": unet(resample_type="pool", layers_per_block=2, attention_resolutions=(16, 8)),
    "class_conditional": unet(num_class_embeds=5, out_channels=6),
    "super_resolution": unet(in_channels=6, low_res_channels=3, dropout=0.1),
    "heads_by_count": unet(num_attention_heads=2, num_attention_heads_upsample=4),
    "half_first_level": unet(model_channels=64, timestep_scale=0.25),
    "wide": unet(block_out_channels=(128, 128), norm_num_groups=32, sample_size=32, attention_resolutions=(16,)),
    "attention_pool": classifier("attention"),
    "adaptive_pool": classifier("adaptive", resample_type="conv"),
    "spatial_pool": classifier("spatial", num_attention_heads=2),
    "spatial_v2_pool": classifier("spatial_v2", resnet_time_scale_shift="default"),
}
DIFFUSERS_CASES = {  # those that `UNet2DModel` can express
    "scale_shift": CASES["scale_shift"],
    "additive": CASES["additive"],
    "class_conditional": CASES["class_conditional"],
    "deep": unet(layers_per_block=2, attention_resolutions=(16, 8), resnet_time_scale_shift="default"),
    "heads_by_count": unet(num_attention_heads=4),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request) -> Case:
    return request.param


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


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    return {name: x.to(dtype) if name in ("sample", "low_res") else x for name, x in inputs.items()}


def gradients(model: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    output = model(**inputs, return_dict=False)[0]
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def lora(rank: int, targets: list[str], **options) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False, **options)


# Outputs


def test_output_has_a_name_and_a_shape(case):
    model, inputs = case.build(), case.inputs()
    with torch.no_grad():
        output = model(**inputs)
    if case.model_class is ADMUNet2DModel:
        values, shape = output.sample, (2, case.config.get("out_channels", 3), *inputs["sample"].shape[2:])
    else:
        values, shape = output.logits, (2, 7)
    assert values.shape == shape and torch.equal(values, output[0])
    assert torch.equal(values, predict(model, inputs))


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


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 0.01), (torch.bfloat16, 0.08)], ids=str)
def test_half_precision(case, dtype, bound):
    inputs = case.inputs(2, 16, 16)
    expected = predict(case.build(), inputs)
    actual = predict(case.build().to(dtype), cast(inputs, dtype))
    assert actual.dtype == dtype and error(actual, expected) < bound


def test_images_of_a_batch_do_not_meet(case):
    model, inputs = case.build(), case.inputs(3)
    singles = [predict(model, {name: x[i : i + 1] for name, x in inputs.items()}) for i in range(3)]
    assert error(predict(model, inputs), torch.cat(singles)) < 1e-5


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


def test_conditions_matter():
    for name, changed in (("class_conditional", "class_labels"), ("super_resolution", "low_res")):
        model, inputs = CASES[name].build(), CASES[name].inputs()
        other = inputs | {changed: inputs[changed].flip(0)}
        assert error(predict(model, other), predict(model, inputs)) > 1e-2


def test_time_of_a_whole_schedule_is_embedded_at_once(case):
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


def test_dropout_is_for_training():
    case = CASES["super_resolution"]
    model, inputs = case.build(), case.inputs()
    assert torch.equal(predict(model, inputs), predict(model, inputs))
    model.train()
    assert not torch.equal(predict(model, inputs), predict(model, inputs))


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


# Training


def test_every_parameter_learns(case):
    for name, gradient in gradients(case.build().train(), case.inputs()).items():
        assert gradient is not None and gradient.abs().max() > 0, name


def test_checkpointing_leaves_gradients_equal(case):
    model, inputs = Case(case.model_class, case.config | {"dropout": 0.0}).build(), case.inputs()
    expected = gradients(model, inputs)
    model.zero_grad(set_to_none=True)
    calls = []

    def checkpoint(module, *args):
        calls.append(module)
        return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=False)

    model.enable_gradient_checkpointing(checkpoint)
    assert model.is_gradient_checkpointing
    torch.testing.assert_close(gradients(model, inputs), expected, rtol=0, atol=5e-5)
    blocks = {module for module in model.modules() if isinstance(module, (ADMResnetBlock, ADMAttention))}
    assert blocks <= set(calls)
    calls.clear()
    predict(model, inputs)
    model.disable_gradient_checkpointing()
    model(**inputs)
    assert not calls


def test_residual_branches_and_outputs_start_at_zero(case):
    model = case.model_class(**case.config)
    zeros = {name.removesuffix(".weight") for name, x in model.named_parameters() if "weight" in name and not x.any()}
    expected = {name for name, _ in model.named_modules() if name.endswith(("conv2", "to_out.0", "conv_out"))}
    if case.config.get("pool") == "adaptive":
        expected.add("head.3")
    assert zeros == expected


# Storage


def test_config_rebuilds_the_model(case):
    model = case.model_class(**case.config)
    assert {option: model.config[option] for option in case.config} == case.config
    other = case.model_class.from_config(model.config)
    assert {k: v.shape for k, v in other.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("options", [{}, {"variant": "fp16"}, {"max_shard_size": "100KB"}], ids=str)
def test_saved_model_is_the_same(case, options, tmp_path):
    model, inputs = case.build(), case.inputs()
    model.save_pretrained(tmp_path, **options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("max_shard_size" in options)
    variant = {name: options[name] for name in options if name == "variant"}
    for loader in (case.model_class, AutoModel):
        loaded = loader.from_pretrained(str(tmp_path), **variant)
        assert type(loaded) is case.model_class and not loaded.training
        assert torch.equal(predict(loaded, inputs), predict(model, inputs))
    half = case.model_class.from_pretrained(tmp_path, torch_dtype=torch.float16, **variant)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    if variant:
        with pytest.raises(OSError, match="no file named"):
            case.model_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["scale_shift", "super_resolution", "attention_pool", "spatial_v2_pool"])
def test_disk_stands_in_for_memory(name, tmp_path):
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    model.save_pretrained(tmp_path)
    loaded = case.model_class.from_pretrained(
        tmp_path,
        device_map="auto",
        max_memory={"cpu": model.get_memory_footprint() // 2},
        offload_folder=tmp_path / "offloaded",
    )
    assert "disk" in loaded.hf_device_map.values()
    assert error(predict(loaded, inputs), predict(model, inputs)) < 1e-5


@pytest.mark.parametrize(
    "options", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {}], ids=["block", "leaf"]
)
def test_group_offload(case, options):
    model, inputs = case.build(), case.inputs()
    expected = predict(model, inputs)
    model.enable_group_offload(torch.device("cpu"), **{"offload_type": "leaf_level", **options})
    assert error(predict(model, inputs), expected) < 1e-5


def test_layerwise_casting(case):
    model, inputs = case.build(), case.inputs()
    expected, footprint = predict(model, inputs), model.get_memory_footprint()
    kept = (
        {"norm", "positional_embedding", "head.1"}
        if case.config.get("pool") == "spatial_v2"
        else {"norm", "positional"}
    )
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    assert model.get_memory_footprint() < 0.6 * footprint
    for name, parameter in model.named_parameters():
        assert parameter.dtype in (torch.float16, torch.float32)
        if any(word in name for word in kept):
            assert parameter.dtype == torch.float32, name
    actual = predict(model, inputs)
    assert actual.dtype == torch.float32 and 0 < error(actual, expected) < 0.01

    model = case.build()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert predict(model, cast(inputs, torch.bfloat16)).isfinite().all()


# Attention and adapters


def test_attention_processors_can_be_replaced(case):
    class Zero:
        def __call__(self, attn, hidden_states):
            return torch.zeros_like(hidden_states)

    model, inputs = case.build(), case.inputs()
    expected, processors = predict(model, inputs), model.attn_processors
    assert len(processors) == sum(isinstance(module, ADMAttention) for module in model.modules()) > 1
    model.set_attn_processor(Zero())
    assert {type(processor) for processor in model.attn_processors.values()} == {Zero}
    assert error(predict(model, inputs), expected) > 1e-3
    model.set_attn_processor(dict.fromkeys(processors, ADMAttnProcessor()))
    assert torch.equal(predict(model, inputs), expected)
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor(dict(list(processors.items())[:1]))


def test_attention_backend_can_be_chosen(case):
    model, inputs = case.build(), case.inputs()
    expected = predict(model, inputs)
    model.set_attention_backend("_native_math")
    try:
        assert error(predict(model, inputs), expected) < 1e-5
    finally:
        model.reset_attention_backend()


def test_fused_projections_change_nothing(case):
    model, inputs = case.build(), case.inputs()
    expected = predict(model, inputs)
    attentions = [module for module in model.modules() if isinstance(module, AttentionModuleMixin)]
    model.fuse_qkv_projections()
    assert all(module.fused_projections and hasattr(module, "to_qkv") for module in attentions)
    assert error(predict(model, inputs), expected) < 1e-5
    model.unfuse_qkv_projections()
    assert not any(module.fused_projections or hasattr(module, "to_qkv") for module in attentions)
    assert torch.equal(predict(model, inputs), expected)


@pytest.mark.parametrize("targets", [ATTENTION_LAYERS, CONVOLUTIONS], ids=["attention", "convolutions"])
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


@pytest.mark.parametrize("name", ["scale_shift", "additive", "pooling", "attention_pool"])
def test_adapters_of_one_model_can_be_exchanged(name, tmp_path):
    case = CASES[name]
    inputs, expected = case.inputs(), []
    for rank in (4, 8):
        model = case.build()
        torch.manual_seed(rank)
        # To swap them, peft replaces convolutions by plain ones, which do not upsample.
        model.add_adapter(lora(rank, ATTENTION_LAYERS + CONVOLUTIONS, exclude_modules=".*upsamplers.*"))
        expected.append(predict(model, inputs))
        model.save_lora_adapter(tmp_path / str(rank))
    model = case.build()
    model.enable_lora_hotswap(target_rank=8)
    model.load_lora_adapter(tmp_path / "4", adapter_name="style", prefix=None, use_safetensors=True)
    assert error(predict(model, inputs), expected[0]) < 1e-5
    model.load_lora_adapter(tmp_path / "8", adapter_name="style", prefix=None, use_safetensors=True, hotswap=True)
    assert error(predict(model, inputs), expected[1]) < 1e-5


# Compilers


@pytest.mark.parametrize("name", ["class_conditional", "super_resolution", "attention_pool"])
def test_one_graph_serves_all_timesteps(name):
    model, inputs = CASES[name].build(), CASES[name].inputs()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for timestep in (inputs["timestep"], inputs["timestep"] + 1):
            expected = predict(model, inputs | {"timestep": timestep})
            assert error(predict(compiled, inputs | {"timestep": timestep}), expected) < 1e-5


def test_attention_compiles_once():
    model, inputs = CASES["scale_shift"].build(), CASES["scale_shift"].inputs()
    expected = predict(model, inputs)
    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        assert error(predict(model, inputs), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the compiler's, on a busy machine
@pytest.mark.parametrize("name", ["class_conditional", "attention_pool"])
def test_compiled_code_gives_the_same(name):
    model, inputs = CASES[name].build(), CASES[name].inputs()
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model, fullgraph=True)
        assert error(predict(compiled, inputs), predict(model, inputs)) < 1e-4
        predict(compiled, inputs)


@pytest.mark.parametrize("name", ["scale_shift", "attention_pool"])
def test_export(name):
    model, inputs = CASES[name].build(), CASES[name].inputs()
    exported = torch.export.export(model, (), inputs).module()
    assert error(exported(**inputs)[0], predict(model, inputs)) < 1e-5


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
        ("scale_shift", {"sample": torch.zeros(2, 3, 17, 16)}, "17x16 pixels; .* multiples of 2"),
        ("scale_shift", {"sample": torch.zeros(2, 3, 16, 15)}, "16x15 pixels; .* multiples of 2"),
        ("attention_pool", {"sample": torch.zeros(2, 3, 16, 15)}, "16x15 pixels; .* multiples of 2"),
        ("scale_shift", {"sample": torch.zeros(2, 4, 16, 16)}, r"`sample` has shape \(2, 4, 16, 16\), expected .*3"),
        ("scale_shift", {"sample": torch.zeros(3, 16, 16)}, r"`sample` has shape \(3, 16, 16\)"),
        ("super_resolution", {"sample": torch.zeros(2, 6, 16, 16)}, r"`sample` has shape .* expected \(batch, 3"),
        ("scale_shift", {"timestep": torch.zeros(3)}, "`timestep` has 3 entries for 2 images"),
        ("spatial_pool", {"timestep": torch.zeros(3)}, "`timestep` has 3 entries for 2 images"),
        ("class_conditional", {"class_labels": None}, "`class_labels` are needed"),
        ("class_conditional", {"class_labels": torch.tensor([1, 2, 3])}, "`class_labels` has 3 entries for 2 images"),
        ("scale_shift", {"class_labels": torch.tensor([1, 2])}, "`class_labels` were given to an unconditional"),
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
