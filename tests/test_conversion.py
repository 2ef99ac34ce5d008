"""Original checkpoints of the guided-diffusion family: equal outputs, exact round trips, refused files."""

import functools
import gzip
import http.server
import json
import os
import pickle
import threading
import traceback
import zipfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from diffusers_ext import ADMClassifierModel, ADMUNet2DModel
from diffusers_ext.conversion import (
    architectures,
    load_original,
    original,
    original_state_dict,
    presets,
    save_original,
)
from diffusers_ext.conversion.checkpoint import read_checkpoint
from diffusers_ext.conversion.guided_diffusion import complete_flags, to_config


UNETS = [*(f"gd_unet_{letter}" for letter in "abcdefgh"), "gd_sr_a", "cm_unet"]
CLASSIFIERS = [f"gd_cls_{pool}" for pool in ("adaptive", "attention", "spatial", "spatial_v2")]
LAYOUTS = {
    "guided_diffusion": [name for name in presets if presets[name].architecture.startswith("guided-diffusion")],
    "improved_diffusion": [
        "cifar10_uncond_50M_500K",
        "imagenet64_uncond_100M_1500K",
        "lsun_uncond_100M_1200K_bs128",
        "upsample_cond_500K",
    ],
    "consistency_models": ["cd_imagenet64_lpips", "edm_bedroom256_ema", "edm_imagenet64_ema"],
    "ddrm": [
        "imagenet_256",
        "imagenet_256_cc",
        "imagenet_256_cc.classifier",
        "imagenet_512_cc",
        "imagenet_512_cc.classifier",
    ],
}
TINY_FLAGS = {
    "builder": "UNetModel",
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_heads": 4,
    "use_scale_shift_norm": True,
}


def architecture_of(name: str) -> str:
    if "cls" in name or "classifier" in name:
        return "guided-diffusion/classifier"
    codebase = {"cm_unet": "consistency_models"}.get(name, name.partition(".")[0]).replace("_", "-")
    return f"{codebase}/unet" if f"{codebase}/unet" in architectures else "guided-diffusion/unet"


@functools.lru_cache(maxsize=1)
def recorded(folder: Path, name: str) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Flags, weights and recorded inputs and outputs of a network of the original."""
    flags = json.loads((folder / f"{name}.json").read_text())["config"]
    weights = {key: tensor.float() for key, tensor in load_file(folder / f"{name}.weights.safetensors").items()}
    return flags, weights, load_file(folder / f"{name}.io.safetensors")


def cases_of(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    names = sorted({key.partition(".")[0] for key in tensors if key.endswith(".x")})
    return [{k.partition(".")[2]: tensors[k] for k in tensors if k.startswith(f"{name}.")} for name in names]


def meta_state_dict(**flags) -> dict[str, torch.Tensor]:
    """Names and shapes of the weights of a tiny network of the original."""
    architecture = "guided-diffusion/unet"
    _, config = to_config(architecture, complete_flags(architecture, TINY_FLAGS | flags))
    with torch.device("meta"):
        return original_state_dict(ADMUNet2DModel(**config))[0]


def tiny_state_dict(**flags) -> dict[str, torch.Tensor]:
    """Random weights of a tiny network with the original's names."""
    torch.manual_seed(0)
    return {key: torch.randn(tensor.shape) for key, tensor in meta_state_dict(**flags).items()}


# --- Equal outputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNETS)
def test_unet_agrees_with_the_original(name, shared):
    flags, weights, tensors = recorded(shared / "fixtures", name)
    model = load_original(weights, architecture_of(name), config=flags)
    for case in cases_of(tensors):
        with torch.no_grad():
            output = model(case["x"], case["t"], case.get("y"), low_res=case.get("low_res")).sample
        torch.testing.assert_close(output, case["out"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", UNETS[:8])
def test_unet_gradient_agrees_with_the_original(name, shared):
    flags, weights, tensors = recorded(shared / "fixtures", name)
    model = load_original(weights, architecture_of(name), config=flags)
    sample = tensors["int_t.x"].requires_grad_()
    output = model(sample, tensors["int_t.t"], tensors.get("int_t.y")).sample
    (gradient,) = torch.autograd.grad((output * tensors["grad.weight"]).sum(), sample)
    expected = tensors["grad.dx"]
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_agrees_with_the_original(name, shared):
    flags, weights, tensors = recorded(shared / "fixtures", name)
    model = load_original(weights, architecture_of(name), config=flags)
    for case in cases_of(tensors):
        sample = case["x"].requires_grad_()
        logits = model(sample, case["t"]).logits
        torch.testing.assert_close(logits, case["logits"], rtol=0, atol=2e-5)
        log_prob = logits.log_softmax(dim=1)[range(len(logits)), case["y"]].sum()
        (gradient,) = torch.autograd.grad(log_prob, sample)
        torch.testing.assert_close(gradient, case["grad"], rtol=0, atol=1e-4 * case["grad"].abs().max().item())


@pytest.mark.parametrize("name", ["gd_unet_a", "gd_unet_c", "gd_unet_f", "cm_unet", *CLASSIFIERS])
def test_half_precision_storage_agrees_with_the_original(name, shared):
    flags, weights, tensors = recorded(shared / "fixtures", name)
    weights = {key: tensor.half() for key, tensor in weights.items()}
    model = load_original(weights, architecture_of(name), config=flags)
    assert model.dtype == torch.float16
    labels = {} if name in CLASSIFIERS else {"class_labels": tensors.get("int_t.y")}
    with torch.no_grad():
        (output,) = model(tensors["int_t.x"].half(), tensors["int_t.t"], **labels, return_dict=False)
    expected = tensors["int_t.logits" if name in CLASSIFIERS else "int_t.out"]
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=1e-2)


# --- There and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", [*UNETS, *CLASSIFIERS])
def test_saving_gives_the_file_back(name, suffix, shared, tmp_path):
    flags, weights, _ = recorded(shared / "fixtures", name)
    model = load_original(weights, architecture_of(name), config=flags)
    written = save_original(model, tmp_path / f"model{suffix}")
    saved = read_checkpoint(tmp_path / f"model{suffix}")
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[key], weights[key]) for key in weights)
    again = load_original(tmp_path / f"model{suffix}", architecture_of(name), config=written)
    assert again.config == model.config
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in again.state_dict().items())


@pytest.mark.parametrize("name", [f"{family}.{name}" for family, names in LAYOUTS.items() for name in names])
def test_released_layout_converts_on_meta_and_back(name, shared):
    layout = json.loads(gzip.decompress((shared / "fixtures" / "layouts" / f"{name}.json.gz").read_bytes()))
    state_dict = {key: torch.empty(shape, device="meta") for key, shape in layout["state_dict"].items()}
    architecture = architecture_of(name)
    model = load_original(state_dict, architecture, config=layout["flags"] | {"builder": layout["builder"]})
    assert model.num_parameters() == layout["n_params"]
    back, flags = original_state_dict(model)
    assert {key: list(tensor.shape) for key, tensor in back.items()} == layout["state_dict"]

    assert load_original(back, architecture, config=flags).config == model.config
    preset = name.partition(".")[2]
    if preset in presets:
        assert load_original(state_dict, architecture, preset=preset).config == model.config


def test_presets_without_a_layout():
    def build(name: str) -> ADMUNet2DModel:
        architecture = presets[name].architecture
        model_class, config = to_config(architecture, complete_flags(architecture, presets[name].flags))
        with torch.device("meta"):
            return model_class(**config)

    openai = {name: preset.url for name, preset in presets.items() if "openaipublic" in str(preset.url)}
    assert len(openai) == 35 and all(url.endswith(f"/{name}.pt") for name, url in openai.items())
    assert round(build("imagenet64_cond_270M_250K").num_parameters() / 1e6) == 273
    for name, twin in [
        ("imagenet64_uncond_vlb_100M_1500K", "imagenet64_uncond_100M_1500K"),
        ("cifar10_uncond_vlb_50M_500K", "cifar10_uncond_50M_500K"),
        ("lsun_uncond_100M_2400K_bs64", "lsun_uncond_100M_1200K_bs128"),
        ("cd_imagenet64_l2", "cd_imagenet64_lpips"),
        ("ct_imagenet64", "cd_imagenet64_lpips"),
        ("edm_cat256_ema", "edm_bedroom256_ema"),
        ("cd_cat256_l2", "cd_cat256_lpips"),
        ("ct_cat256", "cd_bedroom256_lpips"),
        ("ct_bedroom256", "cd_bedroom256_l2"),
    ]:
        assert build(name).config == build(twin).config


def test_order_of_qkv_is_remembered_by_a_saved_model(tmp_path):
    weights = tiny_state_dict(use_new_attention_order=True)
    config = TINY_FLAGS | {"use_new_attention_order": True}
    load_original(weights, "guided-diffusion/unet", config=config).save_pretrained(tmp_path)
    saved, flags = original_state_dict(ADMUNet2DModel.from_pretrained(tmp_path))
    assert flags["use_new_attention_order"]
    assert all(torch.equal(saved[key], weights[key]) for key in weights)


def test_one_network_can_be_written_for_every_codebase(tmp_path):
    """The same network in another order of q, k and v, and with other dimensions."""
    weights = tiny_state_dict()
    model = load_original(weights, "guided-diffusion/unet", config=TINY_FLAGS)
    sample, timestep = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    expected = model(sample, timestep).sample
    for architecture in ("consistency-models/unet", "improved-diffusion/unet", "guided-diffusion/unet"):
        flags = save_original(model, tmp_path / "model.pt", architecture)
        model = load_original(tmp_path / "model.pt", architecture, config=flags)
        torch.testing.assert_close(model(sample, timestep).sample, expected, rtol=0, atol=0)
    saved = read_checkpoint(tmp_path / "model.pt")
    assert all(torch.equal(saved[key], weights[key]) for key in weights)

    other_order = TINY_FLAGS | {"use_new_attention_order": True}
    save_original(model, tmp_path / "model.pt", config=other_order)
    model = load_original(tmp_path / "model.pt", "guided-diffusion/unet", config=other_order)
    torch.testing.assert_close(model(sample, timestep).sample, expected, rtol=0, atol=0)
    key = "middle_block.1.qkv.weight"
    assert not torch.equal(read_checkpoint(tmp_path / "model.pt")[key], weights[key])


def test_model_trained_here_becomes_an_original(tmp_path):
    torch.manual_seed(0)
    config = {"sample_size": 8, "in_channels": 1, "block_out_channels": (32, 64), "layers_per_block": 1}
    config |= {"attention_resolutions": (4,), "attention_head_dim": 32}
    unet = ADMUNet2DModel(**config, out_channels=2, timestep_scale=0.25, num_class_embeds=10)
    classifier = ADMClassifierModel(**config, num_classes=10, pool="spatial")
    for model, architecture in [(unet, "guided-diffusion/unet"), (classifier, "guided-diffusion/classifier")]:
        flags = save_original(model, tmp_path / "model.safetensors")
        again = load_original(tmp_path / "model.safetensors", architecture, config=flags)
        assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in again.state_dict().items())
        assert again.config.timestep_scale == model.config.timestep_scale


def test_converted_model_does_not_write_to_its_source(tmp_path):
    weights = tiny_state_dict()
    copies = {key: tensor.clone() for key, tensor in weights.items()}
    torch.save(weights, tmp_path / "model.pt")
    for source in (weights, tmp_path / "model.pt"):
        model = load_original(source, "guided-diffusion/unet", config=TINY_FLAGS)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    saved = read_checkpoint(tmp_path / "model.pt")
    assert all(torch.equal(weights[key], copies[key]) and torch.equal(saved[key], copies[key]) for key in copies)


def test_converted_model_can_be_saved_from_a_mapped_file(tmp_path):
    torch.save(tiny_state_dict(use_new_attention_order=True), tmp_path / "model.pt")
    config = TINY_FLAGS | {"use_new_attention_order": True}
    model = load_original(tmp_path / "model.pt", "guided-diffusion/unet", config=config)
    model.save_pretrained(tmp_path / "ours")
    again = ADMUNet2DModel.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in again.state_dict().items())


# --- What does not fit -----------------------------------------------------------------------------------------------


def test_every_key_that_does_not_fit_is_listed():
    weights = tiny_state_dict()
    del weights["time_embed.0.bias"], weights["middle_block.1.qkv.weight"]
    weights |= {"extra.weight": torch.zeros(5, 7), "out.2.bias": torch.zeros(4)}
    with pytest.raises(ValueError) as error:
        load_original(weights, "guided-diffusion/unet", config=TINY_FLAGS)
    for line in (
        "missing: time_embed.0.bias (128,)",
        "missing: middle_block.1.qkv.weight (192, 64, 1)",
        "unknown: extra.weight (5, 7)",
        "shape: out.2.bias (4,), expected (6,)",
    ):
        assert line in str(error.value)
    assert "in 4 keys" in str(error.value)


@pytest.mark.parametrize(
    "architecture, arguments, message",
    [
        ("guided-diffusion", {"preset": "64x64_diffusion"}, "`architecture` .* Valid: guided-diffusion/unet"),
        ("guided-diffusion/unet", {"preset": "64x64"}, "`preset` .* Valid: 64x64_diffusion"),
        ("guided-diffusion/unet", {"preset": "64x64_classifier"}, "`preset` .* is not one of 'guided-diffusion/unet'"),
        ("guided-diffusion/unet", {}, "Give either `preset`"),
        ("guided-diffusion/unet", {"preset": "64x64_diffusion", "config": TINY_FLAGS}, "Give either `preset`"),
        ("guided-diffusion/unet", {"config": TINY_FLAGS | {"heads": 4}}, "does not know: heads. Valid: attention_res"),
        ("guided-diffusion/unet", {"config": {"model_channels": 32}}, "lacks flags .*: image_size, in_channels"),
        ("guided-diffusion/unet", {"config": TINY_FLAGS | {"builder": "DiT"}}, "`builder` .* Valid: UNetModel"),
        ("guided-diffusion/unet", {"config": TINY_FLAGS | {"dims": 3}}, "`dims` is 3"),
        ("guided-diffusion/unet", {"config": TINY_FLAGS | {"resblock_updown": "True"}}, "must be True or False"),
        ("guided-diffusion/unet", {"config": {"image_size": 96}}, r"`image_size` \(96\) .* 64, 128, 256, 512"),
        ("improved-diffusion/unet", {"config": {"image_size": 128}}, r"`image_size` \(128\) .* 32, 64, 256"),
        ("improved-diffusion/unet", {"config": {"resblock_updown": True}}, "can only be built with False"),
        ("consistency-models/unet", {"config": {"large_size": 256}}, "`builder` .*sr_create"),
        (
            "guided-diffusion/classifier",
            {"config": {k: v for k, v in TINY_FLAGS.items() if k != "builder"} | {"pool": "attention"}},
            "needs `num_head_channels`",
        ),
    ],
)
def test_flags_that_mean_nothing_are_refused(architecture, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_original({"weight": torch.zeros(1)}, architecture, **arguments)


@pytest.mark.parametrize(
    "config, architecture, message",
    [
        ({"norm_num_groups": 16}, None, "has 32 groups"),
        ({"norm_eps": 1e-6}, None, "norm_eps"),
        ({"timestep_scale": 0.3}, None, "timestep_scale=0.3"),
        ({}, "improved-diffusion/unet", "num_head_channels=32"),
        ({"low_res_channels": 1, "in_channels": 4}, None, "in_channels=4 instead of 6"),
        ({"low_res_channels": 3, "in_channels": 6}, "consistency-models/unet", "`builder`"),
        ({}, "guided-diffusion/classifier", "`model` is a ADMUNet2DModel"),
    ],
)
def test_model_that_no_original_can_be_is_refused(config, architecture, message, tmp_path):
    model = ADMUNet2DModel(
        **({"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1} | config),
        attention_resolutions=(4,),
        attention_head_dim=32,
    )
    with pytest.raises(ValueError, match=message):
        save_original(model, tmp_path / "model.pt", architecture)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, key",
    [
        (lambda model: model.fuse_qkv_projections(), "to_qkv.weight"),
        (lambda model: model.add_adapter(LoraConfig(target_modules=["to_q"])), "to_q.lora_A.default.weight"),
    ],
)
def test_changed_weights_are_refused(change, key, tmp_path):
    model = load_original(tiny_state_dict(), "guided-diffusion/unet", config=TINY_FLAGS)
    change(model)
    with pytest.raises(ValueError, match=f"unload adapters and unfuse projections first(?s:.*){key}"):
        save_original(model, tmp_path / "model.pt")


# --- Files -----------------------------------------------------------------------------------------------------------


class Payload:
    """A pickle of this creates a file when it is executed."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_zip(path: Path, tensors: dict) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights.txt", "none")


def write_torch(path: Path, tensors: dict, end: int | None = None, legacy: bool = False) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[:end])


def write_safetensors(path: Path, tensors: dict, end: int | None = None) -> None:
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:end])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize(
    "name, write, message",
    [
        ("cut.pt", functools.partial(write_torch, end=-1000), "truncated"),
        ("cut.ckpt", functools.partial(write_torch, end=-1000, legacy=True), "truncated"),
        ("cut.safetensors", functools.partial(write_safetensors, end=-1000), "truncated"),
        ("headless.safetensors", functools.partial(write_safetensors, end=50), "truncated"),
        ("renamed.pt", write_safetensors, "is a safetensors file. Rename it to `.safetensors`"),
        ("renamed.safetensors", write_torch, "is a torch file. Rename it to `.pt`"),
        ("page.pt", lambda path, _: path.write_bytes(b"\n<!DOCTYPE html><html></html>"), "is a web page"),
        ("lfs.pt", lambda path, _: path.write_bytes(b"version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
        ("archive.pt", write_zip, "a zip archive that torch did not write"),
        ("empty.pt", lambda path, _: path.touch(), "is empty"),
        ("noise.bin", lambda path, _: path.write_bytes(bytes(range(100))), "in no known format"),
        ("noise.safetensors", lambda path, _: path.write_bytes(bytes(range(100))), "in no known format"),
        ("weights.npz", lambda path, _: path.touch(), "must end in one of .pt, .pth, .ckpt, .bin, .safetensors"),
        ("other.pt", lambda path, tensors: torch.save({"step": 5}, path), "holds no mapping of names to tensors"),
        ("two.pt", lambda path, tensors: torch.save([tensors, {"ema": tensors}], path), r"at \[0\], \[1\]\['ema'\]"),
        ("script.pt", lambda path, _: torch.jit.script(torch.nn.ReLU()).save(path), "TorchScript"),
    ],
)  # fmt: skip
def test_file_that_is_no_checkpoint_is_refused(name, write, message, tmp_path):
    write(tmp_path / name, {"weight": torch.randn(100, 100)})
    with pytest.raises(ValueError, match=message) as error:
        load_original(tmp_path / name, "guided-diffusion/unet", config=TINY_FLAGS)
    assert str(tmp_path / name) in str(error.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`source` \(.*nothing.pt\)"):
        load_original(tmp_path / "nothing.pt", "guided-diffusion/unet", config=TINY_FLAGS)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda payload, path: torch.save({"a": torch.ones(1), "b": payload}, path), id="torch"),
        pytest.param(lambda payload, path: write_torch(path, {"b": payload}, legacy=True), id="legacy"),
        *(
            pytest.param(lambda payload, path, p=p: path.write_bytes(pickle.dumps(payload, p)), id=f"pickle{p}")
            for p in range(pickle.HIGHEST_PROTOCOL + 1)
        ),
    ],
)
def test_code_in_a_file_is_refused_and_never_runs(write, tmp_path):
    write(Payload(tmp_path / "executed"), tmp_path / "model.pt")
    with pytest.raises(ValueError) as error:
        load_original(tmp_path / "model.pt", "guided-diffusion/unet", config=TINY_FLAGS)
    assert not (tmp_path / "executed").exists()
    assert str(tmp_path / "model.pt") in str(error.value)
    assert "execution" not in "".join(traceback.format_exception(error.value)), "torch's advice to execute it anyway"


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda weights: weights, id="plain"),
        pytest.param(lambda weights: {"state_dict": weights, "epoch": 3, "args": {"lr": 1e-4}}, id="state_dict"),
        pytest.param(lambda weights: {f"module.{key}": value for key, value in weights.items()}, id="distributed"),
        pytest.param(
            lambda weights: [
                {f"_orig_mod.module.{key}": value for key, value in weights.items()},
                {"state": {0: {"step": torch.ones(1), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]},
            ],
            id="optimizer",
        ),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_state_dict_in_a_training_checkpoint_is_found(wrap, legacy, tmp_path):
    weights = tiny_state_dict()
    torch.save(wrap(weights), tmp_path / "model.ckpt", _use_new_zipfile_serialization=not legacy)
    for source in (tmp_path / "model.ckpt", *([wrap(weights)] if isinstance(wrap(weights), dict) else [])):
        model = load_original(source, "guided-diffusion/unet", config=TINY_FLAGS)
        assert all(torch.equal(tensor, weights[key]) for key, tensor in original_state_dict(model)[0].items())


def test_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "model.pt").write_text("old")
    model = load_original(meta_state_dict(), "guided-diffusion/unet", config=TINY_FLAGS)
    with pytest.raises(ValueError, match="meta device"):
        save_original(model, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="must end in one of"):
        save_original(model, tmp_path / "model.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    assert (tmp_path / "model.pt").read_text() == "old"


# --- from_single_file ------------------------------------------------------------------------------------------------


def test_from_single_file(tmp_path):
    weights = tiny_state_dict()
    torch.save(weights, tmp_path / "model.pt")
    model = ADMUNet2DModel.from_single_file(tmp_path / "model.pt", config=TINY_FLAGS, torch_dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    assert torch.equal(model.conv_in.weight, weights["input_blocks.0.0.weight"].bfloat16())

    with pytest.raises(ValueError, match="is not named like a released checkpoint"):
        ADMUNet2DModel.from_single_file(tmp_path / "model.pt")
    os.rename(tmp_path / "model.pt", tmp_path / "64x64_diffusion.pt")
    with pytest.raises(ValueError, match="'guided-diffusion/unet' with preset '64x64_diffusion'"):
        ADMUNet2DModel.from_single_file(tmp_path / "64x64_diffusion.pt")
    with pytest.raises(ValueError, match="is a ADMUNet2DModel, not a ADMClassifierModel"):
        ADMClassifierModel.from_single_file(
            tmp_path / "64x64_diffusion.pt", config=TINY_FLAGS, architecture="guided-diffusion/unet"
        )


def test_from_single_file_knows_links_to_the_hub(tmp_path, monkeypatch):
    torch.save(tiny_state_dict(), tmp_path / "model.pt")
    requests = []

    def download(*request: str, **options: str) -> str:
        requests.append((*request, *options.values()))
        return str(tmp_path / "model.pt")

    monkeypatch.setattr(original, "hf_hub_download", download)
    for kind in ("resolve", "blob"):
        url = f"https://huggingface.co/some/repository/{kind}/main/folder/model.pt?download=true"
        ADMUNet2DModel.from_single_file(url, config=TINY_FLAGS)
    assert requests == [("some/repository", "folder/model.pt", "main")] * 2


def test_from_single_file_downloads_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    weights = tiny_state_dict()
    torch.save(weights, tmp_path / "model.pt")

    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args) -> None:
            requests.append(args)

    handler = functools.partial(Handler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/model.pt"
        for _ in range(2):
            model = ADMUNet2DModel.from_single_file(url, config=TINY_FLAGS)
            assert torch.equal(model.conv_in.weight, weights["input_blocks.0.0.weight"])
        server.shutdown()
    assert len(requests) == 1
