"""`diffusers-ext convert`: whole pipeline folders from original checkpoints."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers import DDPMScheduler

from diffusers_ext import ADMClassifierModel, ADMUNet2DModel
from diffusers_ext.cli import main
from diffusers_ext.conversion import presets, save_original
from diffusers_ext.conversion.convert import convert_checkpoint
from diffusers_ext.conversion.guided_diffusion import complete_flags, to_config, to_scheduler_config


SIZES = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1}
SIZES |= {"attention_resolutions": (4,), "attention_head_dim": 32}


@pytest.fixture
def checkpoints(tmp_path):
    """Writes a UNet, a classifier and the flags of both; returns the arguments that convert them."""

    def write(classifier: bool = True, process: dict | None = None, **config) -> dict:
        torch.manual_seed(0)
        config = {"out_channels": 6} | config
        flags = save_original(ADMUNet2DModel(**SIZES, **config), tmp_path / "unet.pt")
        (tmp_path / "unet.json").write_text(json.dumps(flags | (process or {})))
        arguments = {"source": str(tmp_path / "unet.pt"), "preset": str(tmp_path / "unet.json")}
        if classifier:
            flags = save_original(ADMClassifierModel(**SIZES, num_classes=3), tmp_path / "classifier.safetensors")
            (tmp_path / "classifier.json").write_text(json.dumps(flags))
            arguments["classifier"] = str(tmp_path / "classifier.safetensors")
            arguments["classifier_preset"] = str(tmp_path / "classifier.json")
        return arguments | {"output": tmp_path / "out"}

    return write


def test_command_writes_a_pipeline_that_draws(checkpoints, tmp_path, monkeypatch):
    (tmp_path / "labels.txt").write_text("cat\ndog\nnewt\n")
    arguments = checkpoints(process={"noise_schedule": "cosine"})
    source = arguments.pop("source")
    options = [part for name, value in arguments.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    main(["convert", source, *options, "--labels", str(tmp_path / "labels.txt")])

    output = tmp_path / "out"
    assert {path.name for path in output.iterdir()} == {
        "README.md", "classifier", "model_index.json", "scheduler", "unet"
    }  # fmt: skip
    assert str(tmp_path) not in "".join(path.read_text() for path in output.rglob("*.json"))
    card = (output / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    assert code.startswith("import diffusers_ext")
    assert "`unet.pt`, a UNet of [guided-diffusion]" in card and "`classifier.safetensors`" in card
    assert "\nlicense:" not in card and "**No licence of the weights is stated**" in card

    monkeypatch.chdir(output)
    namespace = {}
    exec(code.replace("num_inference_steps=1000", "num_inference_steps=4"), namespace)
    pipe = namespace["pipe"]
    assert namespace["images"][0].size == (8, 8)
    assert pipe.labels == {"cat": 0, "dog": 1, "newt": 2}
    assert pipe.scheduler.config.variance_type == "learned_range"
    assert pipe.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert pipe.config.classifier_schedule["beta_schedule"] == "squaredcos_cap_v2"


@pytest.mark.parametrize(
    "config",
    [{"num_class_embeds": 5}, {"in_channels": 6, "low_res_channels": 3}, {"out_channels": 3, "num_class_embeds": 5}],
)
def test_card_of_every_kind_of_unet_runs(config, checkpoints, tmp_path, monkeypatch):
    arguments = checkpoints(classifier=False, process={"diffusion_steps": 40}, **config)
    convert_checkpoint(**arguments)
    code = (tmp_path / "out" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    Image.new("RGB", (4, 4)).save(tmp_path / "out" / "small.png")
    monkeypatch.chdir(tmp_path / "out")
    namespace = {}
    exec(code.replace("steps=40", "steps=2"), namespace)
    assert len(namespace["images"]) == 1


@pytest.mark.parametrize("labels", [["cat", "dog", "newt"], {"0": "cat", "2": "newt", "1": "dog"}])
def test_labels_can_be_json(labels, checkpoints, tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    convert_checkpoint(**checkpoints(), labels=tmp_path / "labels.json")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["id2label"] == {"0": "cat", "1": "dog", "2": "newt"}


def test_nothing_is_written_over_without_being_asked(checkpoints, tmp_path):
    arguments = checkpoints(classifier=False)
    (tmp_path / "out").mkdir()
    convert_checkpoint(**arguments)
    (tmp_path / "out" / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="`output`"):
        convert_checkpoint(**arguments)
    assert (tmp_path / "out" / "note.txt").exists()
    convert_checkpoint(**arguments, overwrite=True)
    assert not (tmp_path / "out" / "note.txt").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"preset": "256x256"}, "`preset` .* Valid: 64x64_diffusion"),
        ({"classifier_preset": None}, "give both of them, or neither"),
        ({"preset": "classifier_preset", "source": "classifier"}, "`preset` .* unknown|does not build"),
        ({"labels": "labels.txt"}, r"`labels` .* names 2 classes, but the networks know 3"),
        ({"source": "broken.pt"}, "in no known format"),
        ({"classifier": "broken.pt"}, "in no known format"),
    ],
)
def test_nothing_is_left_behind_by_a_failure(change, message, checkpoints, tmp_path):
    arguments = checkpoints()
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    (tmp_path / "broken.pt").write_bytes(bytes(range(100)))
    for name, value in change.items():
        path = tmp_path / str(value)
        arguments[name] = arguments.get(value, path if path.exists() else value)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(**arguments)
    assert sorted(tmp_path.iterdir()) == before


def test_networks_of_different_images_are_refused(checkpoints):
    with pytest.raises(
        ValueError, match="`classifier` is for 8 px images of 3 channels, the UNet for 8 px images of 1"
    ):
        convert_checkpoint(**checkpoints(in_channels=1, out_channels=2))


def test_consistency_models_are_refused(checkpoints, tmp_path):
    arguments = checkpoints(classifier=False)
    model = ADMUNet2DModel(**SIZES, out_channels=6)
    flags = save_original(model, tmp_path / "unet.pt", "consistency-models/unet")
    (tmp_path / "unet.json").write_text(json.dumps(flags | {"architecture": "consistency-models/unet"}))
    with pytest.raises(ValueError, match="preconditioned network and a continuous process"):
        convert_checkpoint(**arguments)


@pytest.mark.parametrize(
    "preset, steps, schedule",
    [
        ("64x64_diffusion", 10, "cosine.1000"),
        ("256x256_diffusion_uncond", 250, "linear.1000"),
        ("cifar10_uncond_50M_500K", 50, "cosine.4000"),
    ],
)
def test_scheduler_is_the_process_of_the_original(preset, steps, schedule, shared):
    architecture = presets[preset].architecture
    flags = complete_flags(architecture, presets[preset].flags)
    model_class, config = to_config(architecture, flags)
    with torch.device("meta"):
        model = model_class(**config)
    scheduler = DDPMScheduler(**to_scheduler_config(architecture, flags, model))
    assert scheduler.config.variance_type == "learned_range" and scheduler.config.clip_sample
    recorded = load_file(shared / "fixtures" / "gd_schedules.io.safetensors")
    scheduler.set_timesteps(steps)
    timestep_map = recorded[f"{schedule}.{steps}.timestep_map"]
    assert scheduler.timesteps.flip(0).tolist() == timestep_map.tolist()
    abar = recorded[f"{schedule}.{steps}.alphas_cumprod"]
    torch.testing.assert_close(scheduler.alphas_cumprod[timestep_map].double(), abar, rtol=1e-4, atol=1e-7)
