"""Original checkpoints of ddim, DDRM, DiT and the dilated denoiser: equal outputs, exact round trips, pipelines."""

import functools
import gzip
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers import AutoencoderKL, DiffusionPipeline

from diffusers_ext import (
    ADMUNet2DModel,
    ClassConditionalPipeline,
    DDPMUNet2DModel,
    DilatedConvDenoiserModel,
    GQADiTTransformer2DModel,
)
from diffusers_ext.cli import main
from diffusers_ext.conversion import (
    ddim,
    dit,
    load_original,
    mnist_dilated,
    original_state_dict,
    presets,
    save_original,
)
from diffusers_ext.conversion.checkpoint import read_checkpoint
from diffusers_ext.conversion.convert import convert_checkpoint
from diffusers_ext.conversion.original import complete_flags, to_scheduler_config


FIXTURES = {
    **{f"ddim_model_{letter}": ("ddim/unet", 2e-5) for letter in "abc"},
    **{f"mnist_dilated_{letter}": ("mnist-dilated", 5e-5) for letter in "ab"},
    **{f"dit_{letter}": ("dit", 2e-5) for letter in "ab"},
}
LAYOUTS = {
    **{f"ddim.{name}": ("ddim/unet", name) for name in ("bedroom", "celeba", "church", "cifar10")},
    **{f"ddrm.{name}": ("ddim/unet", name) for name in ("cat", "celeba_hq")},
    **{
        f"dit.{name}": ("dit", name)
        for name in ("DiT-XL-2-256x256", "DiT-XL-2-512x512", "DiT-B-4-256x256", "DiT-S-2-256x256")
    },
    "mnist_dilated.28x28_256x8": ("mnist-dilated", "mnist_dilated"),
}
DDIM = {"image_size": 8, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4]}
DIT = {"input_size": 8, "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 3}
DILATED = {"image_resolution": [8, 8, 1], "hidden_dims": [16, 16, 16], "diffusion_time_embedding_dim": 16}
TINY = {
    "ddim/unet": (DDPMUNet2DModel, DDIM),
    "dit": (GQADiTTransformer2DModel, DIT),
    "mnist-dilated": (DilatedConvDenoiserModel, DILATED),
}
FAMILIES = {"ddim/unet": ddim, "dit": dit, "mnist-dilated": mnist_dilated}


@functools.lru_cache(maxsize=1)
def recorded(folder: Path, name: str) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Flags, weights and recorded inputs and outputs of a network of the original."""
    flags = json.loads((folder / f"{name}.json").read_text())["config"]
    weights = {key: tensor.float() for key, tensor in load_file(folder / f"{name}.weights.safetensors").items()}
    return flags, weights, load_file(folder / f"{name}.io.safetensors")


def released(shared: Path, name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """What is known of a released checkpoint, and its weights without values."""
    layout = json.loads(gzip.decompress((shared / "fixtures" / "layouts" / f"{name}.json.gz").read_bytes()))
    return layout, {key: torch.empty(shape, device="meta") for key, shape in layout["state_dict"].items()}


def tiny_weights(architecture: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of a tiny network with the original's names."""
    model_class, flags = TINY[architecture]
    _, config = FAMILIES[architecture].to_config(architecture, complete_flags(architecture, None, flags))
    with torch.device("meta"):
        layout, _ = original_state_dict(model_class(**config), architecture, config=flags)
    random = torch.Generator().manual_seed(seed)
    return {key: 0.2 * torch.randn(tensor.shape, generator=random) for key, tensor in layout.items()}


# --- Equal outputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXTURES)
def test_model_agrees_with_the_original(name, shared):
    flags, weights, tensors = recorded(shared / "fixtures", name)
    architecture, tolerance = FIXTURES[name]
    model = load_original(weights, architecture, config=flags)
    cases = [key.removesuffix(".x") for key in tensors if key.endswith("_t.x") or key == "small_x.x"]
    assert len(cases) >= 2
    for case in cases:
        with torch.no_grad():
            output = model(tensors[f"{case}.x"], tensors[f"{case}.t"], tensors.get(f"{case}.y")).sample
        torch.testing.assert_close(output, tensors[f"{case}.out"], rtol=0, atol=tolerance)


# --- There and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", FIXTURES)
def test_saving_gives_the_file_back(name, suffix, shared, tmp_path):
    flags, weights, _ = recorded(shared / "fixtures", name)
    architecture, _ = FIXTURES[name]
    model = load_original(weights, architecture, config=flags)
    model.save_pretrained(tmp_path / "ours")
    path = tmp_path / f"model{suffix}"
    written = save_original(type(model).from_pretrained(tmp_path / "ours"), path)
    saved = read_checkpoint(path)
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[key], weights[key]) for key in weights)
    again = type(model).from_single_file(path, config=written)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in again.state_dict().items())


@pytest.mark.parametrize("name", LAYOUTS)
def test_released_layout_converts_on_meta_and_back(name, shared):
    architecture, preset = LAYOUTS[name]
    layout, state_dict = released(shared, name)
    model = load_original(state_dict, architecture, preset=preset)
    assert model.num_parameters() == layout["n_params"]
    back, flags = original_state_dict(model)
    assert {key: list(tensor.shape) for key, tensor in back.items()} == layout["state_dict"]
    for config in (layout["flags"] | {"builder": layout["builder"]}, flags):
        assert load_original(back, architecture, config=config).config == model.config


@pytest.mark.parametrize(
    "model_class, options, reason",
    [
        (DDPMUNet2DModel, {"num_class_embeds": 10}, "num_class_embeds=10 instead of None"),
        (DDPMUNet2DModel, {"attention_head_dim": 32}, "attention_head_dim=32"),
        (DDPMUNet2DModel, {"block_out_channels": (64, 96)}, r"\(64, 96\), but .* multiples of .* \(64\)"),
        (DilatedConvDenoiserModel, {"dilations": (1,) * 8}, "dilations="),
        (DilatedConvDenoiserModel, {"out_channels": 2}, "out_channels=2 instead of 1"),
    ],
)
def test_model_that_no_original_can_be_is_refused(model_class, options, reason):
    with torch.device("meta"):
        model = model_class(**options)
    with pytest.raises(ValueError, match=reason):
        original_state_dict(model)


# --- Training checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [True, False])
def test_moving_average_of_a_training_checkpoint(ema, tmp_path):
    weights, average = tiny_weights("ddim/unet"), tiny_weights("ddim/unet", seed=1)
    optimizer = {"state": {0: {"step": 5, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]}
    states = [{f"module.{key}": tensor for key, tensor in weights.items()}, optimizer, 3, 500, average]
    torch.save(states, tmp_path / "ckpt.pth")
    for source in (tmp_path / "ckpt.pth", states):
        model = load_original(source, "ddim/unet", config=DDIM | {"ema": ema})
        assert torch.equal(model.conv_in.weight, (average if ema else weights)["conv_in.weight"])


def test_moving_average_of_a_dit_checkpoint(tmp_path):
    weights, average = tiny_weights("dit"), tiny_weights("dit", seed=1)
    torch.save({"model": weights, "ema": average, "opt": {"state": {}, "param_groups": []}}, tmp_path / "0050000.pt")
    model = load_original(tmp_path / "0050000.pt", "dit", config=DIT)
    saved, _ = original_state_dict(model)
    assert all(torch.equal(saved[key], average[key]) for key in saved)


# --- What does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout, architecture, preset, resemblance",
    [
        ("dit.DiT-XL-2-256x256", "ddim/unet", "celeba", r"`dit` checkpoint \(DiT-XL-2-256x256\)"),
        ("ddim.celeba", "dit", "DiT-XL-2-256x256", r"`ddim/unet` checkpoint \(celeba\)"),
        ("ddrm.cat", "ddim/unet", "cifar10", r"`ddim/unet` checkpoint \(bedroom or church or cat or celeba_hq\)"),
        ("mnist_dilated.28x28_256x8", "dit", "DiT-S-2-256x256", r"`mnist-dilated` checkpoint \(mnist_dilated\)"),
        (
            "guided_diffusion.64x64_classifier",
            "ddim/unet",
            "celeba",
            r"`guided-diffusion/classifier` checkpoint \(64x64_classifier\)",
        ),
        (
            "improved_diffusion.upsample_cond_500K",
            "dit",
            "DiT-S-2-256x256",
            r"`improved-diffusion/unet` checkpoint \(upsample_cond_500K\)",
        ),
        (
            "consistency_models.edm_imagenet64_ema",
            "guided-diffusion/unet",
            "64x64_diffusion",
            r"`consistency-models/unet` checkpoint \(edm_imagenet64_ema or ",
        ),
    ],
)
def test_checkpoint_of_another_network_is_recognised(layout, architecture, preset, resemblance, shared):
    _, state_dict = released(shared, layout)
    with pytest.raises(ValueError, match=rf"does not fit {architecture!r}(?s:.*)\nIt looks like a {resemblance}"):
        load_original(state_dict, architecture, preset=preset)


@pytest.mark.parametrize("name", ["gd_unet_d", "gd_cls_spatial", "ddim_model_c", "dit_b", "mnist_dilated_b"])
def test_unreleased_checkpoint_of_another_network_is_recognised(name, shared):
    _, weights, _ = recorded(shared / "fixtures", name)
    family = {"gd_unet_d": "guided-diffusion/unet", "gd_cls_spatial": "guided-diffusion/classifier"}
    own = family.get(name) or FIXTURES[name][0]
    for architecture, (_, flags) in TINY.items():
        if architecture != own:
            with pytest.raises(ValueError, match=rf"\nIt looks like a `({own}|improved-diffusion/unet)` checkpoint\."):
                load_original(weights, architecture, config=flags)


def test_nothing_is_said_of_what_looks_like_nothing():
    own = tiny_weights("ddim/unet") | {"extra": torch.zeros(1)}
    for weights in ({"weight": torch.zeros(1)}, own):
        with pytest.raises(ValueError, match="in [0-9]+ keys") as error:
            load_original(weights, "ddim/unet", config=DDIM)
        assert "looks like" not in str(error.value)


@pytest.mark.parametrize(
    "architecture, config, message",
    [
        ("ddim/unet", DDIM | {"heads": 4}, "does not know: heads. Valid: attn_resolutions"),
        ("ddim/unet", {"ch": 32}, "lacks flags .*: image_size, ch_mult"),
        ("ddim/unet", DDIM | {"type": "bayesian"}, "type='bayesian'"),
        ("ddim/unet", DDIM | {"resamp_with_conv": 1}, "must be True or False"),
        ("ddim/unet", DDIM | {"builder": "DiT"}, "`builder` .* Valid: Model"),
        ("ddim/unet", {"model": DDIM}, "lacks `data.image_size`"),
        ("mnist-dilated", DILATED | {"image_resolution": [8, 9, 1]}, "`image_resolution` .* an equal width"),
        ("mnist-dilated", DILATED | {"hidden_dims": [16, 32]}, "equal widths"),
    ],
)
def test_flags_that_mean_nothing_are_refused(architecture, config, message):
    with pytest.raises(ValueError, match=message):
        load_original({"weight": torch.zeros(1)}, architecture, config=config)


def test_single_file_of_another_class_is_named(tmp_path):
    torch.save(tiny_weights("ddim/unet"), tmp_path / "cifar10.pt")
    with pytest.raises(ValueError, match="does not fit 'ddim/unet' with preset 'cifar10'"):
        DDPMUNet2DModel.from_single_file(tmp_path / "cifar10.pt")
    with pytest.raises(ValueError, match="is a DDPMUNet2DModel, not a ADMUNet2DModel"):
        ADMUNet2DModel.from_single_file(tmp_path / "cifar10.pt", config=DDIM, architecture="ddim/unet")


# --- Pipelines -------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    """Writes weights and flags of a tiny network; returns the arguments that convert them."""

    def write(architecture: str, **flags) -> dict:
        torch.save(tiny_weights(architecture), tmp_path / "weights.pt")
        flags = TINY[architecture][1] | {"architecture": architecture} | flags
        (tmp_path / "flags.json").write_text(json.dumps(flags))
        return {
            "source": str(tmp_path / "weights.pt"),
            "preset": str(tmp_path / "flags.json"),
            "output": tmp_path / "out",
        }

    return write


@pytest.fixture
def vae(tmp_path) -> Path:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.5)
    model.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.mark.parametrize("architecture", TINY)
def test_command_writes_a_pipeline_whose_card_runs(architecture, checkpoint, vae, tmp_path, monkeypatch):
    arguments = checkpoint(architecture)
    source = arguments.pop("source")
    options = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    if architecture == "dit":
        (tmp_path / "labels.txt").write_text("cat\ndog\nnewt\n")
        options += ["--labels", str(tmp_path / "labels.txt"), "--vae", str(vae)]
    main(["convert", source, *options])

    component = "transformer" if architecture == "dit" else "unet"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "model_index.json", "scheduler", component, *(["vae"] if architecture == "dit" else [])
    }  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`weights.pt`, a" in card and str(tmp_path) not in card
    code = card.partition("```python\n")[2].partition("```")[0].replace("steps=1000", "steps=2")
    monkeypatch.chdir(tmp_path / "out")
    namespace = {}
    exec(code, namespace)
    pipe, images = namespace["pipe"], namespace["images"]
    assert type(pipe) is ClassConditionalPipeline
    assert images[0].size == ((16, 16) if architecture == "dit" else (8, 8))
    if architecture == "dit":
        assert pipe.labels == {"cat": 0, "dog": 1, "newt": 2} and pipe.vae.config.scaling_factor == 0.5
        assert pipe.scheduler.config.variance_type == "learned_range" and not pipe.scheduler.config.clip_sample
    saved, _ = original_state_dict(getattr(pipe, component))
    expected = tiny_weights(architecture)
    assert all(torch.equal(saved[key], expected[key]) for key in expected)


def test_card_of_a_released_checkpoint(checkpoint, tmp_path, monkeypatch):
    """That of DiT names the licence and the sampling of its authors, with weights of another size here."""
    arguments = checkpoint("dit")
    run = presets["DiT-XL-2-256x256"]
    monkeypatch.setitem(presets, "DiT-XL-2-256x256", type(run)(**vars(run) | {"flags": DIT}))
    os.rename(arguments["source"], tmp_path / "DiT-XL-2-256x256.pt")
    convert_checkpoint(tmp_path / "DiT-XL-2-256x256.pt", preset="DiT-XL-2-256x256", output=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: cc-by-nc-4.0\n" in card and "https://github.com/facebookresearch/DiT" in card
    assert "[`DiT-XL-2-256x256.pt`](https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt)" in card
    assert "(class_labels=[0], guidance_scale=4.0, guided_channels=3, num_inference_steps=250, output_type=" in card
    assert "| latents | 8 px |" in card
    assert DiffusionPipeline.from_pretrained(tmp_path / "out").vae is None


@pytest.mark.parametrize(
    "architecture, changes, message",
    [
        ("ddim/unet", {"classifier": "c.pt", "classifier_preset": "64x64_classifier"}, "`classifier` .* guides UNets"),
        ("ddim/unet", {"vae": "vae"}, "latents of 4 channels, the denoiser knows 3"),
        ("ddim/unet", {"labels": "labels.txt"}, "`labels` .* names 1 classes, but the networks know 0"),
        ("dit", {"preset": "celeba"}, "It looks like a `dit` checkpoint"),
    ],
)
def test_what_does_not_belong_together_is_refused(architecture, changes, message, checkpoint, vae, tmp_path):
    arguments = checkpoint(architecture)
    (tmp_path / "labels.txt").write_text("cat\n")
    for name, value in changes.items():
        arguments[name] = tmp_path / value if (tmp_path / value).exists() else value
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(**arguments)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "preset, expected",
    [
        ("cifar10", {"variance_type": "fixed_large", "clip_sample": True}),
        ("celeba_hq", {"variance_type": "fixed_small", "clip_sample": True}),
        ("DiT-XL-2-256x256", {"variance_type": "learned_range", "clip_sample": False}),
        ("mnist_dilated", {"variance_type": "fixed_large", "clip_sample": True}),
    ],
)
def test_scheduler_is_the_process_of_the_original(preset, expected):
    architecture = presets[preset].architecture
    flags = complete_flags(architecture, preset, None)
    config = to_scheduler_config(architecture, flags, None)
    process = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}
    assert (process | expected | {"prediction_type": "epsilon"}).items() <= config.items()


def test_other_processes_of_ddim():
    def scheduler(**flags) -> dict:
        return to_scheduler_config("ddim/unet", complete_flags("ddim/unet", None, DDIM | flags), None)

    quadratic = scheduler(beta_schedule="quad", beta_start=1e-3, num_diffusion_timesteps=500, var_type="fixedsmall")
    assert quadratic["beta_schedule"] == "scaled_linear" and quadratic["beta_start"] == 1e-3
    assert quadratic["num_train_timesteps"] == 500 and quadratic["variance_type"] == "fixed_small"
    for flag in ("beta_schedule", "var_type"):
        with pytest.raises(ValueError, match=f"`{flag}` is 'other'; it must be one of"):
            scheduler(**{flag: "other"})
