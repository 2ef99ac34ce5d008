"""Training: data, losses, the loop, and resuming it exactly."""

import io
import json
import signal
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from diffusers import AutoModel, DDIMScheduler, DDPMScheduler, DiffusionPipeline

from diffusers_ext import ADMClassifierModel, ADMUNet2DModel, ClassConditionalPipeline
from diffusers_ext.conversion import load_original
from diffusers_ext.models import PRESETS
from diffusers_ext.training.config import CLASSIFIER_PRESETS, UNET_PRESETS
from diffusers_ext.training.data import BatchSampler, ImageDataset, fit_image, load_images
from diffusers_ext.training.loop import checkpoints, train
from diffusers_ext.training.objectives import ForwardProcess, denoising_losses, discretized_gaussian_log_likelihood
from diffusers_ext.training.tasks import UNetTask


TINY = {
    "block_out_channels": (8, 16),
    "attention_head_dim": 8,
    "train_batch_size": 8,
    "max_train_steps": 6,
    "checkpointing_steps": 3,
    "checkpoints_total_limit": 5,
    "validation_steps": 4,
    "validation_images": 4,
    "log_steps": 2,
    "lr_warmup_steps": 2,
    "dropout": 0.1,
}
TINY_UNET = replace(UNET_PRESETS["digits"], **TINY, validation_inference_steps=2)
TINY_CLASSIFIER = replace(CLASSIFIER_PRESETS["digits"], **TINY)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# Losses


@pytest.fixture(scope="module")
def process():
    return ForwardProcess(DDPMScheduler(1000).betas)


@pytest.mark.parametrize("variance", ["LEARNED_RANGE", "FIXED_LARGE"])
def test_losses_equal_the_recorded_ones(variance, shared, process):
    recorded = load_file(shared / "fixtures" / "gd_unit.io.safetensors")
    output = recorded["model_output"] if variance == "LEARNED_RANGE" else recorded["model_output"][:, :3]
    x_start, x_t, noise, timesteps = (recorded[name] for name in ("x_start", "x_t", "noise", "t"))
    torch.testing.assert_close(process.add_noise(x_start, noise, timesteps), x_t, rtol=1e-5, atol=1e-6)
    losses = denoising_losses(process, output, x_start, x_t, noise, timesteps)
    for name, values in losses.items():
        expected = recorded[f"loss.RESCALED_MSE.EPSILON.{variance}.{name}"]
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("run", ["hybrid_rescaled", "hybrid_unscaled"])  # the same for 1000 steps
def test_losses_and_gradients_of_a_network_equal_the_recorded_ones(run, shared, process):
    folder = shared / "fixtures"
    recorded = load_file(folder / "gd_losses.io.safetensors")
    flags = json.loads((folder / "gd_unet_b.json").read_text())["config"]
    model = load_original(folder / "gd_unet_b.weights.safetensors", "guided-diffusion/unet", config=flags).float()
    model.requires_grad_(True)
    x_start, noise, timesteps = recorded["x_start"], recorded[f"{run}.noise"].float(), recorded[f"{run}.t"]
    x_t = process.add_noise(x_start, noise, timesteps)
    losses = denoising_losses(process, model(x_t, timesteps).sample, x_start, x_t, noise, timesteps)
    for name, values in losses.items():
        torch.testing.assert_close(values, recorded[f"{run}.{name}"], rtol=1e-4, atol=1e-5)
    losses["loss"].mean().backward()
    gradient = recorded[f"{run}.grad.input_blocks.0.0.weight"]
    torch.testing.assert_close(model.conv_in.weight.grad, gradient, rtol=0, atol=1e-4 * gradient.abs().max().item())


def test_the_variational_bound_trains_only_the_variance(process):
    torch.manual_seed(0)
    output = torch.randn(2, 2, 4, 4, requires_grad=True)
    x_start, noise, timesteps = torch.rand(2, 1, 4, 4) * 2 - 1, torch.randn(2, 1, 4, 4), torch.tensor([0, 500])
    x_t = process.add_noise(x_start, noise, timesteps)
    denoising_losses(process, output, x_start, x_t, noise, timesteps)["vb"].sum().backward()
    assert output.grad[:, 0].abs().max() == 0
    assert output.grad[:, 1].abs().min() > 0


def test_the_probabilities_of_all_grey_levels_sum_to_one():
    levels = torch.arange(256) / 127.5 - 1
    log_likelihood = discretized_gaussian_log_likelihood(levels, torch.tensor(0.3), torch.tensor(-2.0))
    assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-5)


# Data


@pytest.mark.parametrize(
    "width, height, size, box",
    [
        (28, 28, 32, (2, 2, 30, 30)),  # padded
        (8, 8, 32, (0, 0, 32, 32)),  # four times as large
        (10, 5, 32, (1, 8, 31, 23)),  # three times, then padded
        (100, 50, 32, (0, 0, 32, 32)),  # the middle
    ],
)
def test_white_images_fill_the_expected_box(width, height, size, box):
    pixels = np.asarray(fit_image(Image.new("L", (width, height), 255), size))
    expected = np.zeros((size, size), dtype=np.uint8)
    expected[box[1] : box[3], box[0] : box[2]] = 255
    np.testing.assert_array_equal(pixels, expected)


def test_digits_are_embedded():
    train_split = load_images("digits", "train", sample_size=8, channels=1)
    images, labels = train_split.__getitems__([3, 0])
    assert len(train_split) + len(load_images("digits", "test", sample_size=8, channels=1)) == 1797
    assert images.shape == (2, 1, 8, 8) and images.dtype == torch.uint8
    assert labels.tolist() == [3, 0]
    colour = load_images("digits", sample_size=16, channels=3)
    assert colour.__getitems__([0])[0].shape == (1, 3, 16, 16)


@pytest.fixture
def folder(tmp_path):
    """Writes a data set of two 4x4 colour images as parquet; columns can be replaced."""

    def write(**columns) -> str:
        images = [Image.new("RGB", (4, 4), colour) for colour in ("white", "black")]
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["white", "black"])}
        )
        table = datasets.Dataset.from_dict({"image": images, "label": [0, 1]}, features=features)
        for name, values in columns.items():
            table = table.remove_columns(name) if name in table.column_names else table
            table = table if values is None else table.add_column(name, values)
        (tmp_path / "data").mkdir()
        table.to_parquet(tmp_path / "data" / "train-00000.parquet")
        return str(tmp_path / "data")

    return write


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """A cache of its own for `datasets`, and a precision of its own for accelerate, which keeps one per process."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("bytes_in_memory", [0, 2**20], ids=["decoded per batch", "decoded in memory"])
def test_columns_are_found_by_their_type(bytes_in_memory, folder, monkeypatch):
    monkeypatch.setattr("diffusers_ext.training.data.MAX_BYTES_IN_MEMORY", bytes_in_memory)
    data = load_images(folder(), sample_size=4, channels=1)
    images, labels = data.__getitems__([1, 0])
    assert (data.decoded is None) == (bytes_in_memory == 0)
    assert images.flatten(1).unique(dim=1).tolist() == [[0], [255]]
    assert labels.tolist() == [1, 0] and data.num_classes == 2


def test_labels_can_be_integers_or_missing(folder):
    path = folder(label=None, group=[3, 0])
    assert load_images(path, sample_size=4, channels=3).labels is None
    data = load_images(path, sample_size=4, channels=3, label_column="group")
    assert data.labels.tolist() == [3, 0] and data.num_classes == 4


def test_images_in_class_folders_are_read(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "pets" / name / "0.png")
    data = load_images(str(tmp_path / "pets"), sample_size=4, channels=1, need_labels=True)
    assert sorted(data.labels.tolist()) == [0, 1]


@pytest.mark.parametrize(
    "columns, options, message",
    [
        ({}, {"split": "test"}, r"`dataset_split` \('test'\) must be one of \['train'\]"),
        ({}, {"image_column": "picture"}, r"`image_column` \('picture'\) must be a column"),
        ({"label": None}, {"need_labels": True}, r"`label_column` must be given: .* 0 have the type ClassLabel"),
        ({"label": ["a", "b"]}, {"label_column": "label"}, r"`label_column` \('label'\) holds .*string"),
        ({"label": [0, -1]}, {"label_column": "label"}, r"label of row 1 \(-1\) is out of range: .* \[0, 0\]"),
        ({}, {"channels": 2}, r"`in_channels` \(2\) must be 1 .* or 3"),
    ],
)
def test_wrong_data_are_refused(columns, options, message, folder):
    with pytest.raises(ValueError, match=message):
        load_images(folder(**columns), **{"sample_size": 4, "channels": 1} | options)


def test_an_unreadable_image_is_named():
    png = io.BytesIO()
    Image.new("L", (4, 4)).save(png, "png")
    rows = [{"bytes": content, "path": None} for content in (png.getvalue(), png.getvalue()[:40])]
    with pytest.raises(ValueError, match="image of row 1 cannot be read"):
        ImageDataset(rows, None, sample_size=4, channels=1)


def test_every_epoch_holds_every_row_in_an_order_of_its_own():
    sampler = iter(BatchSampler(length=10, batch_size=4, seed=0))
    rows = sum((next(sampler) for _ in range(5)), [])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]


def test_processes_share_the_batches_of_one():
    one = iter(BatchSampler(length=10, batch_size=4, seed=0))
    two = [iter(BatchSampler(length=10, batch_size=4, seed=0, first=3 + rank, stride=2)) for rank in range(2)]
    expected = [next(one) for _ in range(7)][3:]
    assert [next(two[0]), next(two[1]), next(two[0]), next(two[1])] == expected


# The loop


def test_unet_run_leaves_a_component_that_loads(tmp_path):
    path = train(replace(TINY_UNET, output_dir=str(tmp_path / "run")))
    assert path == tmp_path / "run" / "unet"
    unet = AutoModel.from_pretrained(str(path))
    assert isinstance(unet, ADMUNet2DModel) and unet.config.out_channels == 2
    scheduler = DDPMScheduler.from_pretrained(tmp_path / "run", subfolder="scheduler")
    assert scheduler.config.variance_type == "learned_range" and scheduler.config.clip_sample
    assert {p.name for p in (tmp_path / "run" / "samples").iterdir()} == {"0000004.png", "0000006.png"}
    assert Image.open(tmp_path / "run" / "samples" / "0000006.png").size == (16, 16)  # four images of 8 px
    assert [line["step"] for line in lines(tmp_path / "run")] == [2, 4, 6]
    assert {"loss", "mse", "vb", "learning_rate", "images_per_second"} < lines(tmp_path / "run")[0].keys()


def test_class_conditional_unet_of_cosine_schedule_with_fixed_variance(tmp_path):
    config = replace(TINY_UNET, class_conditional=True, learned_variance=False, beta_schedule="squaredcos_cap_v2")
    unet = AutoModel.from_pretrained(str(train(replace(config, output_dir=str(tmp_path), channels_last=True))))
    assert unet.config.num_class_embeds == 10 and unet.config.out_channels == 1
    assert DDPMScheduler.from_pretrained(tmp_path / "scheduler").config.beta_schedule == "squaredcos_cap_v2"


@pytest.mark.parametrize(
    "model, options",
    [
        ("adm/mnist-32", ("block_out_channels=[16,32]",)),
        ("ddpm/mnist-32", ("block_out_channels=[16,32]", "attention_resolutions=[16]")),
        ("dilated/mnist-small", ("hidden_channels=[16,16]",)),
        ("composable/film-mnist", ("layers_per_block=1",)),
        ("dit/mnist", ("num_layers=2",)),
        ("dit/32px-additive", ("num_attention_heads=2", "attention_head_dim=16", "in_channels=1")),
    ],
)
def test_every_backbone_becomes_a_pipeline_with_a_null_class(model, options, tmp_path):
    config = replace(
        UNET_PRESETS["digits"],
        model=model,
        model_options=options,
        learned_variance=False,
        class_conditional=True,
        class_dropout_prob=0.5,
        train_batch_size=4,
        max_train_steps=2,
        validation_images=2,
        validation_inference_steps=2,
        output_dir=str(tmp_path),
    )
    path = train(config)
    assert path.name == ("transformer" if model.startswith("dit") else "unet")
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipe) is ClassConditionalPipeline
    pipe.set_progress_bar_config(disable=True)
    images = pipe([3, 7], num_inference_steps=1, guidance_scale=2.0, output_type="pt").images
    assert images.shape == (2, 1, *[PRESETS[model][1]["sample_size"]] * 2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_type_is_what_the_scheduler_takes_it_for(prediction_type, process):
    """A network that predicts the target without an error has no loss, and the scheduler finds the clean image."""
    random = torch.Generator().manual_seed(0)
    x_start, noise = (torch.randn(4, 1, 8, 8, generator=random).clamp(-1, 1) for _ in range(2))
    timesteps = torch.tensor([0, 300, 700, 999])
    x_t = process.add_noise(x_start, noise, timesteps)
    velocity = process.velocity(x_start, noise, timesteps)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": x_start}[prediction_type]
    losses = denoising_losses(process, target, x_start, x_t, noise, timesteps, prediction_type)
    assert losses["loss"].max() == 0
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(1000)
    for i, timestep in enumerate(timesteps):
        found = scheduler.step(target[i : i + 1], timestep, x_t[i : i + 1]).pred_original_sample
        torch.testing.assert_close(found, x_start[i : i + 1], rtol=1e-3, atol=1e-3)


def test_dropped_labels_become_the_null_class():
    config = replace(
        TINY_UNET,
        class_conditional=True,
        class_dropout_prob=0.25,
        model_options=("num_class_embeds=3", "norm_num_groups=4"),
    )
    task = UNetTask(config)
    model = task.build_model()
    assert model.config.num_class_embeds == 10 and model.config.null_class and model.config.norm_num_groups == 4
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    torch.manual_seed(0)
    task.losses(model, torch.zeros(400, 1, 8, 8, dtype=torch.uint8), torch.full((400,), 4))
    assert set(seen[0].tolist()) == {4, 10} and 0.2 < (seen[0] == 10).float().mean() < 0.3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": "adm/film"}, r"`model` \('adm/film'\) is unknown. Valid: adm/digits"),
        ({"model": "dit/mnist", "block_out_channels": (8,)}, "`block_out_channels` is not an option of GQADiT"),
        ({"model_options": ("pool=attention",)}, "`pool` is not an option of ADMUNet2DModel"),
        ({"model_options": ("dropout",)}, "`model_options` holds 'dropout'; write name=value"),
        ({"prediction_type": "sample"}, "`prediction_type` is 'sample', but the variance is learned"),
        ({"class_dropout_prob": 0.1}, r"`class_dropout_prob` \(0.1\) must .* be 0 unless `class_conditional`"),
        ({"class_dropout_prob": 1.0, "class_conditional": True}, r"`class_dropout_prob` \(1.0\) must lie in"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_options_of_the_network_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        UNetTask(replace(UNET_PRESETS["digits"], **options))


def test_classifier_learns_to_see_through_noise(tmp_path):
    config = replace(CLASSIFIER_PRESETS["digits"], max_train_steps=80, lr_warmup_steps=20, lr_scheduler="constant")
    path = train(replace(config, output_dir=str(tmp_path)))
    assert isinstance(AutoModel.from_pretrained(str(path)), ADMClassifierModel)
    accuracy = [lines(tmp_path)[-1][f"accuracy_quarter{quarter}"] for quarter in (1, 2, 3, 4)]
    assert accuracy[0] > 0.5 > 0.3 > accuracy[3]  # the noisiest images are noise


@pytest.fixture
def train_until(monkeypatch):
    """Trains until the process receives SIGTERM in the middle of a step: `train_until(step, config)`."""

    def run(step: int, config) -> None:
        last_batch = step * config.gradient_accumulation_steps
        draw = BatchSampler.__iter__

        def batches(self):
            for number, batch in enumerate(draw(self), start=1):
                if number == last_batch:
                    signal.raise_signal(signal.SIGTERM)
                yield batch

        with monkeypatch.context() as patch:
            patch.setattr(BatchSampler, "__iter__", batches)
            with pytest.raises(SystemExit) as stopped:
                train(config)
        assert stopped.value.code == 128 + signal.SIGTERM

    return run


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(TINY_UNET, id="unet"),
        pytest.param(replace(TINY_UNET, gradient_accumulation_steps=2), id="unet, two forward passes"),
        pytest.param(replace(TINY_UNET, mixed_precision="bf16"), id="unet in bfloat16"),
        pytest.param(TINY_CLASSIFIER, id="classifier"),
    ],
)
def test_resumed_run_ends_at_the_same_weights(config, train_until, tmp_path, capsys):
    config = replace(config, checkpointing_steps=4, resume_from_checkpoint="latest")
    once, twice = (replace(config, output_dir=str(tmp_path / name)) for name in ("once", "twice"))
    train(once)
    train_until(3, twice)
    assert "Stopped by SIGTERM after step 3" in capsys.readouterr().out
    assert [path.name for path in checkpoints(tmp_path / "twice")] == ["checkpoint-3"]
    train(twice)

    for file in ("model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl"):
        expected, actual = (tmp_path / run / "checkpoint-6" / file for run in ("once", "twice"))
        load = load_file if file.endswith("safetensors") else torch.load
        torch.testing.assert_close(load(actual), load(expected), rtol=0, atol=0)
    component = next((tmp_path / "once").glob("*/diffusion_pytorch_model.safetensors")).relative_to(tmp_path / "once")
    averaged = [load_file(tmp_path / run / component) for run in ("once", "twice")]
    torch.testing.assert_close(*averaged, rtol=0, atol=0)
    final = [{k: v for k, v in lines(tmp_path / run)[-1].items() if "second" not in k} for run in ("once", "twice")]
    assert final[0] == final[1]


def test_more_steps_and_another_rate_can_be_asked_for_on_resuming(tmp_path):
    config = replace(TINY_CLASSIFIER, output_dir=str(tmp_path), max_train_steps=3, lr_scheduler="constant")
    train(config)
    more = replace(config, max_train_steps=6, learning_rate=1e-5)
    train(replace(more, resume_from_checkpoint=str(tmp_path / "checkpoint-3")))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-6"]
    assert [line["learning_rate"] for line in lines(tmp_path) if "learning_rate" in line] == [1e-3, 1e-3, 1e-5, 1e-5]
    assert torch.load(tmp_path / "checkpoint-6" / "optimizer.bin")["param_groups"][0]["lr"] == 1e-5
    weights = load_file(tmp_path / "classifier" / "diffusion_pytorch_model.safetensors")
    train(replace(more, resume_from_checkpoint="latest"))  # finished: only the component is written again
    again = load_file(tmp_path / "classifier" / "diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(again, weights, rtol=0, atol=0)


def test_checkpoints_beyond_the_limit_and_unfinished_ones_go(tmp_path):
    (tmp_path / "unfinished-checkpoint").mkdir()
    (tmp_path / "unfinished-checkpoint" / "model.safetensors").write_text("half")
    config = replace(TINY_CLASSIFIER, checkpointing_steps=2, checkpoints_total_limit=2, output_dir=str(tmp_path))
    train(replace(config, resume_from_checkpoint="latest"))
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-6"]


def test_a_run_is_not_written_over(tmp_path):
    (tmp_path / "checkpoint-1000").mkdir()
    (tmp_path / "checkpoint-900").mkdir()
    with pytest.raises(ValueError, match="`output_dir` .* holds checkpoints up to checkpoint-1000"):
        train(replace(TINY_UNET, output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="`resume_from_checkpoint` .*checkpoint-7.* must be 'latest' or the folder"):
        train(replace(TINY_UNET, output_dir=str(tmp_path), resume_from_checkpoint=str(tmp_path / "checkpoint-7")))


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    config = replace(TINY_UNET, learning_rate=1e30, lr_warmup_steps=0, checkpointing_steps=1, output_dir=str(tmp_path))
    with pytest.raises(FloatingPointError, match="The loss is nan at step [23].*checkpoint-[12]"):
        train(config)


def test_moving_average_can_be_left_out(tmp_path):
    train(replace(TINY_CLASSIFIER, use_ema=False, output_dir=str(tmp_path)))
    expected = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    actual = load_file(tmp_path / "classifier" / "diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(actual, expected)


def test_bfloat16_run_keeps_float32_weights(tmp_path):
    path = train(replace(TINY_UNET, mixed_precision="bf16", max_train_steps=2, output_dir=str(tmp_path)))
    weights = load_file(path / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
