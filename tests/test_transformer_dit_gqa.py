"""The diffusion transformer: equal to DiT where it is DiT, and what each of its options does."""

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.models.embeddings import apply_rotary_emb, get_2d_sincos_pos_embed

from diffusers_ext.conversion import dit, load_original, original_state_dict, save_original
from diffusers_ext.models import transformer_dit_gqa
from diffusers_ext.models.transformer_dit_gqa import PRESETS, GQAAttention, GQADiTBlock, GQADiTTransformer2DModel


TINY = {
    "sample_size": 8,
    "patch_size": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_key_value_heads": 2,
    "num_class_embeds": 5,
    "null_class": True,
}
WIDTH = 64
LAYOUTS = ["DiT-XL-2-256x256", "DiT-XL-2-512x512", "DiT-B-4-256x256", "DiT-S-2-256x256"]


def build(**options) -> GQADiTTransformer2DModel:
    """A model in evaluation mode of which no layer is silent; the same at every call."""
    torch.manual_seed(0)
    model = GQADiTTransformer2DModel(**{**TINY, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def inputs(batch: int = 2, height: int = 8, width: int = 8, channels: int = 3) -> dict[str, torch.Tensor]:
    sample = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(0))
    return {
        "sample": sample,
        "timestep": torch.tensor([20.0, 700.0, 131.5])[:batch],
        "class_labels": torch.tensor([3, 1, 5])[:batch],
    }


@torch.no_grad()
def predict(model: nn.Module, **changes) -> torch.Tensor:
    return model(**{**inputs(), **changes}).sample


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, in units of the largest expected value."""
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# --- Equal to DiT ----------------------------------------------------------------------------------------------------


def recorded(folder: Path, name: str) -> tuple[GQADiTTransformer2DModel, dict, dict]:
    """Our model with the weights of a recorded DiT; these weights; its inputs and outputs."""
    flags = json.loads((folder / f"{name}.json").read_text())["config"]
    weights = {key: tensor.float() for key, tensor in load_file(folder / f"{name}.weights.safetensors").items()}
    return load_original(weights, "dit", config=flags), weights, load_file(folder / f"{name}.io.safetensors")


@pytest.mark.parametrize("name", ["dit_a", "dit_b"])
def test_agrees_with_the_original(name, shared):
    model, _, tensors = recorded(shared / "fixtures", name)
    for case in ("int_t", "frac_t"):
        sample, timestep, labels = (tensors[f"{case}.{key}"] for key in "xty")
        output = predict(model, sample=sample, timestep=timestep, class_labels=labels)
        torch.testing.assert_close(output, tensors[f"{case}.out"], rtol=0, atol=2e-5)
    sample = tensors["int_t.x"].requires_grad_()
    output = model(sample, tensors["int_t.t"], tensors["int_t.y"]).sample
    (gradient,) = torch.autograd.grad((output * tensors["grad.weight"]).sum(), sample)
    expected = tensors["grad.dx"]
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_classifier_free_guidance_agrees_with_the_original(scale, shared):
    model, _, tensors = recorded(shared / "fixtures", "dit_a")
    sample, timestep, labels = (tensors[f"cfg.{key}"] for key in "xty")
    images = sample[: len(sample) // 2]
    # Labels of the second half are null; both halves denoise the same images.
    output = predict(model, sample=images.repeat(2, 1, 1, 1), timestep=timestep, class_labels=labels)
    conditional, unconditional = output.chunk(2)
    torch.testing.assert_close(
        predict(model, sample=images, timestep=timestep[:2], class_labels=None), unconditional, rtol=0, atol=2e-5
    )
    guided = unconditional[:, :3] + scale * (conditional[:, :3] - unconditional[:, :3])
    expected = torch.cat([torch.cat([guided, half[:, 3:]], dim=1) for half in (conditional, unconditional)])
    torch.testing.assert_close(expected, tensors[f"cfg{scale}.out"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", ["dit_a", "dit_b"])
def test_positions_are_those_of_the_original(name, shared):
    model, weights, tensors = recorded(shared / "fixtures", name)
    fresh = GQADiTTransformer2DModel.from_config(model.config)
    assert torch.equal(fresh.pos_embed, weights["pos_embed"])
    table = GQADiTTransformer2DModel(
        sample_size=16, patch_size=1, num_attention_heads=2, attention_head_dim=16, num_layers=1
    ).pos_embed
    assert torch.equal(table[0], tensors["pos_embed_16x16_dim32"])


@pytest.mark.parametrize("name", ["dit_a", "dit_b"])
def test_weights_return_to_the_original_exactly(name, shared, tmp_path):
    model, weights, tensors = recorded(shared / "fixtures", name)
    flags = save_original(model, tmp_path / "dit.pt")
    assert flags["builder"] == "DiT"
    back = torch.load(tmp_path / "dit.pt")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)
    again = GQADiTTransformer2DModel.from_single_file(tmp_path / "dit.pt", config=flags)
    assert not again.pos_embed.requires_grad
    sample, timestep, labels = (tensors[f"int_t.{key}"] for key in "xty")
    changes = {"sample": sample, "timestep": timestep, "class_labels": labels}
    assert torch.equal(predict(again, **changes), predict(model, **changes))


@pytest.mark.parametrize("kv_heads", [None, 4])
def test_model_that_was_never_an_original_becomes_one(kv_heads):
    model = build(num_key_value_heads=kv_heads)
    state_dict, flags = original_state_dict(model)
    assert (flags["hidden_size"], flags["num_heads"], flags["learn_sigma"]) == (WIDTH, 4, False)
    assert error(predict(load_original(state_dict, "dit", config=flags)), predict(model)) < 1e-6


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads=2 instead of 4"),
        ({"conditioning": "additive"}, "conditioning='additive' instead of 'ada_norm_zero'"),
        ({"position_embedding": "rotary"}, "position_embedding='rotary' instead of 'sincos'"),
        ({"qk_norm": "rms_norm"}, "qk_norm='rms_norm' instead of None"),
        ({"out_channels": 4}, "out_channels=4 instead of 3"),
        ({"num_class_embeds": None, "null_class": False}, "`model` is unconditional"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_model_that_is_no_dit(options, message):
    model = GQADiTTransformer2DModel(**{**TINY, "num_key_value_heads": None, **options})
    with pytest.raises(ValueError, match=message):
        original_state_dict(model)


def test_positions_of_a_checkpoint_are_kept(shared):
    model, weights, tensors = recorded(shared / "fixtures", "dit_a")
    changed = weights | {"pos_embed": weights["pos_embed"].flip(1)}
    other = load_original(changed, "dit", config=original_state_dict(model)[1])
    assert torch.equal(original_state_dict(other)[0]["pos_embed"], changed["pos_embed"])
    sample, timestep, labels = (tensors[f"int_t.{key}"] for key in "xty")
    outputs = [predict(m, sample=sample, timestep=timestep, class_labels=labels) for m in (model, other)]
    assert error(*outputs) > 1e-2


@pytest.mark.parametrize("name", LAYOUTS)
def test_released_layout_converts_on_meta_and_back(name, shared):
    layout = json.loads(gzip.decompress((shared / "fixtures" / "layouts" / f"dit.{name}.json.gz").read_bytes()))
    state_dict = {key: torch.empty(shape, device="meta") for key, shape in layout["state_dict"].items()}
    flags = layout["flags"] | {"builder": layout["builder"]}
    model = load_original(state_dict, "dit", config=flags)
    assert model.num_parameters() == layout["n_params"]
    back, _ = original_state_dict(model)
    assert {key: list(tensor.shape) for key, tensor in back.items()} == layout["state_dict"]
    assert dit.complete_flags("dit", dit.PRESETS[name].flags) == dit.complete_flags("dit", flags)
    size, patch_size = name.split("-")[1:3]
    preset = {**PRESETS[f"{size}-{patch_size}"], "sample_size": model.config.sample_size}
    assert preset.items() <= dict(model.config).items()


def test_released_checkpoints_are_described():
    released = {name: preset for name, preset in dit.PRESETS.items() if preset.url}
    assert list(released) == LAYOUTS[:2]
    for name, preset in released.items():
        assert preset.url == f"https://dl.fbaipublicfiles.com/DiT/models/{name}.pt"
        assert (preset.architecture, preset.licence) == ("dit", "cc-by-nc-4.0")
        assert (preset.num_inference_steps, preset.guidance_scale) == (250, 4.0)
    assert len(dit.PRESETS) == 13  # four sizes and three patches, XL/2 for two image sizes


def test_process_of_the_original():
    for learn_sigma, variance in ((True, "learned_range"), (False, "fixed_large")):
        flags = dit.complete_flags("dit", {"builder": "DiT-S/8", "learn_sigma": learn_sigma})
        scheduler = dit.to_scheduler_config("dit", flags, None)
        assert (scheduler["variance_type"], scheduler["clip_sample"]) == (variance, False)
        assert (scheduler["beta_start"], scheduler["beta_end"]) == (1e-4, 0.02)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"builder": "DiT-M/2"}, "`builder` .'DiT-M/2'. does not build 'dit'. Valid: DiT, DiT-XL/2"),
        ({"builder": "DiT-S/2", "depth": 3}, "'DiT-S/2' of 'dit' does not know: depth. Valid: .*input_size"),
        ({"image_size": 256}, "'DiT' of 'dit' does not know: image_size"),
        ({"learn_sigma": "no"}, "learn_sigma='no', which must be True or False"),
        ({"num_heads": 7}, r"`hidden_size` \(1152\) must be a multiple of `num_heads` \(7\)"),
    ],
)
def test_wrong_flags_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        dit.to_config("dit", dit.complete_flags("dit", flags))


# --- Presets ---------------------------------------------------------------------------------------------------------


def test_presets():
    for size in "S", "B", "L", "XL":
        for patch_size in 2, 4, 8:
            assert PRESETS[f"{size}-{patch_size}"]["patch_size"] == patch_size
    with torch.device("meta"):
        names = ("XL-2", "L-4", "32px", "32px-additive")
        models = {name: GQADiTTransformer2DModel(**PRESETS[name]) for name in names}
    assert models["XL-2"].num_parameters() == 675_129_632
    assert models["L-4"].config.out_channels == 8
    for name in "32px", "32px-additive":
        model = models[name]
        assert model.pos_embed.shape == (1, 64, 768)
        assert [block.attn.heads for block in model.transformer_blocks] == [8, 8]
        assert [block.attn.kv_heads for block in model.transformer_blocks] == [2, 2]
        assert model.class_embedding.weight.shape == (11, 768)
    # What adaLN-Zero costs: six modulations per block and two at the end, less the weights of five norms.
    modulations = (2 * 6 + 2) * 768 * 769 - 5 * 2 * 768
    assert models["32px"].num_parameters() - models["32px-additive"].num_parameters() == modulations


# --- Grouped queries -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"qk_norm": "rms_norm", "position_embedding": "rotary"}], ids=["", "rotary"])
def test_grouped_queries_are_full_attention_with_repeated_keys_and_values(kv_heads, options):
    grouped = build(num_key_value_heads=kv_heads, **options)
    full = build(num_key_value_heads=None, **options)
    state_dict = grouped.state_dict()
    for name, tensor in state_dict.items():
        if "to_k" in name or "to_v" in name:
            heads = tensor.unflatten(0, (kv_heads, 16))
            state_dict[name] = heads.repeat_interleave(4 // kv_heads, dim=0).flatten(0, 1)
    full.load_state_dict(state_dict)
    assert error(predict(grouped), predict(full)) < 1e-5
    saved = full.num_parameters() - grouped.num_parameters()
    assert saved == 2 * 2 * (4 - kv_heads) * 16 * (WIDTH + 1)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_projections_predict_the_same(kv_heads, bias):
    model = build(num_key_value_heads=kv_heads, attention_bias=bias)
    expected = predict(model)
    model.fuse_qkv_projections()
    for block in model.transformer_blocks:
        assert block.attn.to_qkv.out_features == WIDTH + 2 * kv_heads * 16
        assert (block.attn.to_qkv.bias is not None) == bias
    assert error(predict(model), expected) < 1e-5
    model.unfuse_qkv_projections()
    assert torch.equal(predict(model), expected)


# --- Options ---------------------------------------------------------------------------------------------------------


def test_swiglu_is_its_formula_with_as_many_weights():
    feed_forward = build(activation_fn="swiglu", num_attention_heads=6).transformer_blocks[0].ff
    tokens = torch.randn(2, 3, 96)
    value, gate = feed_forward.net[0].proj(tokens).chunk(2, dim=-1)
    assert gate.shape[-1] == 256  # two thirds of 4 * 96
    assert error(feed_forward(tokens), feed_forward.net[2](value * gate * gate.sigmoid())) < 1e-6

    def count(activation_fn: str) -> int:
        with torch.device("meta"):
            model = GQADiTTransformer2DModel(**{**PRESETS["32px"], "activation_fn": activation_fn})
        return sum(x.numel() for x in model.transformer_blocks[0].ff.parameters() if x.ndim == 2)

    assert count("swiglu") == count("gelu") == 2 * 4 * 768**2


@pytest.mark.parametrize("activation_fn, approximate", [("gelu", "none"), ("gelu-approximate", "tanh")])
def test_gelu(activation_fn, approximate):
    feed_forward = build(activation_fn=activation_fn, mlp_ratio=1.5).transformer_blocks[0].ff
    tokens = torch.randn(2, 3, WIDTH)
    hidden_states = feed_forward.net[0].proj(tokens)
    assert hidden_states.shape[-1] == 96
    expected = feed_forward.net[2](F.gelu(hidden_states, approximate=approximate))
    assert error(feed_forward(tokens), expected) < 1e-6


def test_block_of_ada_norm_zero_starts_as_the_identity():
    torch.manual_seed(0)
    model = GQADiTTransformer2DModel(**TINY)
    tokens, temb = torch.randn(2, 16, WIDTH), torch.randn(2, WIDTH)
    assert torch.equal(model.transformer_blocks[0](tokens, temb), tokens)
    assert not predict(model).any()
    assert {name for name, _ in model.named_parameters() if "norm" in name} == set()


def test_ada_norm_zero_is_its_formula():
    block = build().transformer_blocks[0]
    tokens, temb = torch.randn(2, 16, WIDTH), torch.randn(2, WIDTH)
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(temb).view(2, 6, 1, WIDTH).unbind(1)
    expected = tokens + gate1 * block.attn(F.layer_norm(tokens, (WIDTH,), eps=1e-6) * (1 + scale1) + shift1)
    expected = expected + gate2 * block.ff(F.layer_norm(expected, (WIDTH,), eps=1e-6) * (1 + scale2) + shift2)
    assert error(block(tokens, temb), expected) < 1e-5


def test_additive_condition_is_added_to_every_token_once():
    model = build(conditioning="additive", position_embedding="learned")
    expected = predict(model)
    assert error(predict(model, timestep=torch.tensor([300.0, 10.0])), expected) > 1e-3
    assert error(predict(model, class_labels=torch.tensor([0, 2])), expected) > 1e-3
    # Moved from the labels to the positions, the same vector has the same effect.
    vector = torch.randn(WIDTH)
    with torch.no_grad():
        model.class_embedding.weight += vector
        model.pos_embed -= vector
    assert error(predict(model), expected) < 1e-4
    assert not any("modulation" in name for name, _ in model.named_parameters())
    block = model.transformer_blocks[0]
    tokens = torch.randn(2, 16, WIDTH)
    hidden_states = tokens + block.attn(block.norm1(tokens))
    assert error(block(tokens), hidden_states + block.ff(block.norm2(hidden_states))) < 1e-6


@pytest.mark.parametrize("qk_norm", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("position_embedding", ["sincos", "rotary"])
def test_qk_norm_makes_the_size_of_queries_and_keys_immaterial(qk_norm, position_embedding):
    model = build(qk_norm=qk_norm, position_embedding=position_embedding)
    expected = predict(model)
    for block in model.transformer_blocks:
        for layer in (block.attn.to_q, block.attn.to_k):
            layer.weight.data *= 100
            layer.bias.data *= 100
    assert error(predict(model), expected) < 1e-3
    plain = build(position_embedding=position_embedding)
    assert plain.transformer_blocks[0].attn.norm_q is None
    with torch.no_grad():
        model.transformer_blocks[0].attn.norm_q.weight *= 3
    assert error(predict(model), expected) > 1e-4


def test_learned_time_is_a_table_with_straight_lines_between_its_rows():
    model = build(time_embedding_type="learned", num_train_timesteps=10)
    table = model.time_embedding.weight
    assert table.shape == (10, WIDTH)
    actual = model._embed_condition(torch.tensor([0.0, 3.0, 3.25, 8.5, 9.0, 12.5]), None, torch.float32)
    rows = [table[0], table[3], 0.75 * table[3] + 0.25 * table[4], (table[8] + table[9]) / 2, table[9], table[9]]
    assert error(actual, torch.stack(rows)) < 1e-6


def test_sinusoidal_classes():
    model = build(class_embedding_type="sinusoidal")
    image = inputs()["sample"][:1]
    outputs = predict(model, sample=image.expand(6, -1, -1, -1), timestep=5, class_labels=torch.arange(6))
    assert torch.pdist(outputs.flatten(1)).min() > 1e-3
    assert torch.equal(predict(model, class_labels=None), predict(model, class_labels=torch.tensor([5])))
    assert not any(isinstance(module, nn.Embedding) for module in model.modules())


def test_no_label_is_the_null_label():
    model = build()
    assert torch.equal(predict(model, class_labels=None), predict(model, class_labels=torch.tensor([5, 5])))
    assert error(predict(model, class_labels=None), predict(model)) > 1e-3


@pytest.mark.parametrize("time_embedding_type", ["sinusoidal", "learned"])
def test_forms_of_the_timestep_agree(time_embedding_type):
    model = build(time_embedding_type=time_embedding_type)
    expected = predict(model, timestep=250)
    for timestep in (250.0, torch.tensor(250), torch.tensor([250.0]), torch.tensor([250, 250])):
        assert error(predict(model, timestep=timestep), expected) < 1e-5
    assert error(predict(model, timestep=250.5), expected) > 1e-5
    assert error(predict(model, timestep=torch.tensor([250, 900]))[1:], expected[1:]) > 1e-3


# --- Positions and sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position_embedding", ["sincos", "learned", "rotary"])
def test_any_size_that_the_patch_divides(position_embedding):
    model = build(position_embedding=position_embedding, out_channels=6)
    for height, width in ((8, 8), (8, 12), (16, 6), (2, 2)):
        output = predict(model, **inputs(3, height, width))
        assert output.shape == (3, 6, height, width) and output.isfinite().all()
    for height, width in ((9, 8), (8, 7)):
        with pytest.raises(ValueError, match=f"`sample` is {height}x{width} pixels; .* multiples of 2"):
            predict(model, **inputs(2, height, width))


def test_patches_come_out_where_they_went_in():
    model = build(sample_size=8, in_channels=2, num_layers=1, attention_head_dim=16)
    with torch.no_grad():  # only one channel of the tokens carries the image, and nothing else is written into it
        for parameter in model.transformer_blocks.parameters():
            parameter.zero_()
        model.pos_embed.zero_()
        model.modulation_out.weight.zero_()
        model.modulation_out.bias.zero_()
        model.patch_embed.weight.zero_()
        model.patch_embed.bias.zero_()
        for index in range(8):
            model.patch_embed.weight.view(WIDTH, -1)[index, index] = 1.0
    image = torch.arange(2 * 6 * 8.0).view(1, 2, 6, 8)
    tokens = model.patch_embed(image).flatten(2).transpose(1, 2)[..., :8]  # (1, 12, C P P)
    output = model._unpatchify(tokens.unflatten(2, (2, 4)).transpose(2, 3).flatten(2), 3, 4)
    assert torch.equal(output, image)


def test_learned_positions_are_interpolated():
    model = build(position_embedding="learned")
    assert model._positions(4, 4) is model.pos_embed and model.pos_embed.requires_grad
    with torch.no_grad():
        model.pos_embed.copy_(torch.arange(4.0).repeat(4)[None, :, None])  # grows from column to column
    grid = model._positions(4, 8).view(4, 8, WIDTH)
    assert grid.diff(dim=0).abs().max() < 1e-5
    torch.testing.assert_close(grid[0, 2:-2, 0], torch.tensor([0.75, 1.25, 1.75, 2.25]), rtol=0, atol=0.1)


def test_fixed_positions_are_interpolated_and_stay_fixed(tmp_path):
    model = build(sample_size=32)
    table = get_2d_sincos_pos_embed(WIDTH, 16, base_size=16).float()
    assert torch.equal(model._positions(16, 16)[0], table)
    doubled = model._positions(32, 32)[0].unflatten(0, (32, 32))
    average = F.avg_pool2d(doubled.permute(2, 0, 1), 2).flatten(1).T
    assert (average - table).abs().max() < 0.12  # the fastest sine turns by one radian per patch
    assert (average - table).abs().mean() < 0.01
    model.save_pretrained(tmp_path)
    for other in (model, GQADiTTransformer2DModel.from_pretrained(tmp_path)):
        assert not other.pos_embed.requires_grad
        assert torch.equal(other.pos_embed[0], table)


def test_rotary_positions_turn_by_the_offset_only():
    model = build(position_embedding="rotary")
    assert model.pos_embed is None
    height, width = 5, 7
    query, key = torch.randn(2, 1, 1, 1, 16).expand(2, 1, height * width, 1, 16)
    cos, sin = model._rotary_embedding(height, width, torch.device("cpu"))
    query, key = (apply_rotary_emb(x, (cos, sin), sequence_dim=1)[0, :, 0] for x in (query, key))
    logits = (query @ key.T).view(height, width, height, width)
    for row, column in ((0, 0), (0, 1), (1, 0), (2, 3), (-1, 2)):
        along = [
            logits[y, x, y + row, x + column]
            for y in range(max(0, -row), height - max(0, row))
            for x in range(width - column)
        ]
        torch.testing.assert_close(torch.stack(along), along[0].expand(len(along)), rtol=0, atol=1e-4)
    assert (logits[0, 0, 1, 0] - logits[0, 0, 0, 1]).abs() > 1e-3  # rows and columns are told apart
    # Without any table of positions, the model still sees where things are.
    rolled = inputs()["sample"].roll(2, dims=3)
    assert error(predict(model, sample=rolled).roll(-2, dims=3), predict(model)) > 1e-3


# --- Training --------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    output = model(**inputs()).sample
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conditioning": "additive", "position_embedding": "learned", "activation_fn": "swiglu"},
        {"position_embedding": "rotary", "qk_norm": "rms_norm", "time_embedding_type": "learned"},
        {"class_embedding_type": "sinusoidal", "qk_norm": "layer_norm", "attention_bias": False},
    ],
    ids=["dit", "additive", "rotary", "sinusoidal"],
)
def test_training(options):
    """Every parameter learns, and checkpointing leaves gradients equal."""
    model = build(**options).train()
    expected = gradients(model)
    for name, gradient in expected.items():
        # A bias of the keys moves all logits of a query alike, unless they are normalised or turned.
        if not (name.endswith("to_k.bias") and not options.get("qk_norm")):
            assert gradient is not None and gradient.abs().max() > 0, name
    calls = []

    def checkpoint(module, *args):
        calls.append(module)
        return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=False)

    model.enable_gradient_checkpointing(checkpoint)
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=5e-5)
    assert calls == list(model.transformer_blocks)


def test_dropout_is_for_training():
    model = build(dropout=0.2)
    assert torch.equal(predict(model), predict(model))
    assert error(predict(model), predict(build())) < 1e-6
    model.train()
    assert not torch.equal(predict(model), predict(model))


# --- What diffusers does with transformers ---------------------------------------------------------------------------


def steps(model: GQADiTTransformer2DModel, count: int = 6) -> tuple[list[torch.Tensor], list[int]]:
    """Outputs of a few steps of sampling, and how many attentions and feed-forward networks each computed."""
    computed, outputs, counts = [], [], []
    handles = [
        layer.register_forward_hook(lambda *_: computed.append(1))
        for block in model.transformer_blocks
        for layer in (block.attn.to_q, block.ff.net[2])
    ]
    with model.cache_context("conditional"):
        for timestep in torch.linspace(700, 699, count):
            outputs.append(predict(model, timestep=timestep))
            counts.append(len(computed))
            computed.clear()
    for handle in handles:
        handle.remove()
    return outputs, counts


@pytest.mark.parametrize(
    "config, expected",
    [
        (
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
            ),
            [6, 3, 6, 3, 6, 3],
        ),
        (TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, max_order=1), None),
        (FirstBlockCacheConfig(threshold=0.3), [6, 2, 2, 2, 2, 2]),
    ],
    ids=["pyramid", "taylorseer", "first_block"],
)
@pytest.mark.parametrize("options", [{}, {"position_embedding": "rotary"}], ids=["sincos", "rotary"])
def test_caches(config, expected, options):
    model = build(num_layers=3, **options)
    outputs, counts = steps(model)
    assert counts == [6] * 6
    model.enable_cache(config)
    assert model.is_cache_enabled
    cached, counts = steps(model)
    assert torch.equal(cached[0], outputs[0])
    if expected is not None:
        assert counts == expected
    else:
        assert min(counts) == 3 and sum(counts) < 36  # the attention of every block is predicted
    assert any(not torch.equal(*pair) for pair in zip(cached, outputs))
    assert max(error(*pair) for pair in zip(cached, outputs)) < 0.2
    model.disable_cache()
    again, counts = steps(model)
    assert counts == [6] * 6 and all(torch.equal(*pair) for pair in zip(again, outputs))


def test_layers_are_skipped_for_guidance():
    model = build()
    expected = predict(model)
    scores = LayerSkipConfig(indices=[1], skip_attention=False, skip_attention_scores=True, skip_ff=False)
    apply_layer_skip(model, scores)
    values = []
    layer = model.transformer_blocks[1].attn.to_out[0]
    handle = layer.register_forward_hook(lambda _, args, __: values.append(args[0]))
    assert error(predict(model), expected) > 1e-4
    handle.remove()
    heads = values[0].unflatten(-1, (2, 2, 16))  # perturbed attention: each query head has its own value
    assert torch.equal(heads[..., 0, :], heads[..., 1, :])
    model = build()
    apply_layer_skip(model, LayerSkipConfig(indices=[0]))
    assert error(predict(model), expected) > 1e-3


def test_module_does_without_the_private_registries(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.hooks._helpers", None)
    spec = importlib.util.spec_from_file_location("a_copy_of_it", transformer_dit_gqa.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.GQADiTTransformer2DModel(**TINY).num_parameters() == build().num_parameters()


def test_attention_is_where_diffusers_looks_for_it():
    model = build()
    names = {name for name, module in model.named_modules() if isinstance(module, GQAAttention)}
    assert names == {"transformer_blocks.0.attn", "transformer_blocks.1.attn"}
    assert model._no_split_modules == model._repeated_blocks == [GQADiTBlock.__name__]
    assert len(model.attn_processors) == 2


def test_compiles_without_graph_breaks_once_for_all_timesteps():
    model = build(position_embedding="rotary", time_embedding_type="learned", num_layers=1)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for timestep in (3.0, 999.5, 1000.0):
        timestep = torch.tensor([timestep, 20.0])
        assert error(predict(compiled, timestep=timestep), predict(model, timestep=timestep)) < 1e-5
    assert len(graphs) == 1


def test_adapters_of_every_layer():
    model = build()
    expected = predict(model)
    targets = ["patch_embed", "proj_out", "to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "modulation"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2 + 2 * 7
    assert error(predict(model), expected) > 1e-3
    model.disable_adapters()
    assert torch.equal(predict(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layerwise_casting_keeps_the_ends(dtype):
    expected = predict(build())
    model = build().to(dtype)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype == dtype}
    ends = {f"{layer}.{kind}" for layer in ("patch_embed", "proj_out") for kind in ("weight", "bias")}
    assert kept == {"pos_embed", *ends}
    actual = predict(model, sample=inputs()["sample"].bfloat16())
    assert actual.dtype == torch.bfloat16 and error(actual.float(), expected) < 0.05


def test_exports():
    model = build(qk_norm="rms_norm", position_embedding="rotary", num_layers=1)
    exported = torch.export.export(model, (), kwargs=inputs()).module()
    assert error(exported(**inputs()).sample, predict(model)) < 1e-5


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_key_value_heads": 3}, r"`num_key_value_heads` \(3\) must divide `num_attention_heads` \(4\)"),
        ({"num_key_value_heads": 8}, r"`num_key_value_heads` \(8\) must divide `num_attention_heads` \(4\)"),
        ({"num_key_value_heads": 0}, r"`num_key_value_heads` \(0\) must divide `num_attention_heads` \(4\)"),
        (
            {"activation_fn": "relu"},
            "`activation_fn` is 'relu'; it must be one of 'gelu-approximate', 'gelu'",
        ),
        ({"conditioning": "film"}, "`conditioning` is 'film'; .*'ada_norm_zero', 'additive'"),
        ({"time_embedding_type": "fourier"}, "`time_embedding_type` is 'fourier'; .*'sinusoidal', 'learned'"),
        ({"class_embedding_type": "hash"}, "`class_embedding_type` is 'hash'; .*'learned', 'sinusoidal'"),
        ({"qk_norm": "batch"}, "`qk_norm` is 'batch'; .*None, 'rms_norm', 'layer_norm'"),
        ({"position_embedding": "alibi"}, "`position_embedding` is 'alibi'; .*'sincos', 'learned', 'rotary'"),
        ({"patch_size": 3}, r"`patch_size` \(3\) must divide `sample_size` \(8\)"),
        ({"attention_head_dim": 5, "num_attention_heads": 2}, '"sincos" needs a hidden size .* multiple of 4, not 10'),
        (
            {"attention_head_dim": 6, "position_embedding": "rotary"},
            r"`attention_head_dim` \(6\) to be a multiple of 4",
        ),
        ({"num_class_embeds": None}, "`null_class` needs `num_class_embeds`"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GQADiTTransformer2DModel(**{**TINY, **options})


@pytest.mark.parametrize(
    "options, changes, message",
    [
        ({}, {"sample": torch.zeros(2, 4, 8, 8)}, r"`sample` has shape \(2, 4, 8, 8\), expected .*3"),
        ({}, {"sample": torch.zeros(3, 8, 8)}, r"`sample` has shape \(3, 8, 8\)"),
        ({}, {"timestep": torch.zeros(3)}, "`timestep` has 3 entries for 2 images"),
        ({}, {"class_labels": torch.tensor([1, 2, 3])}, "`class_labels` has 3 entries for 2 images"),
        ({}, {"class_labels": torch.tensor([1, 6])}, "`class_labels` has 6, outside .* from 0 to 5"),
        ({}, {"class_labels": torch.tensor([-1, 3])}, "`class_labels` has -1, outside .* from 0 to 5"),
        (
            {"null_class": False},
            {"class_labels": torch.tensor([5, 3])},
            "`class_labels` has 5, outside .* from 0 to 4",
        ),
        ({"null_class": False}, {"class_labels": None}, "`class_labels` are needed"),
        ({"null_class": False, "num_class_embeds": None}, {}, "`class_labels` were given to an unconditional"),
    ],
)
def test_wrong_inputs_are_named(options, changes, message):
    with pytest.raises(ValueError, match=message):
        predict(build(**options), **changes)
