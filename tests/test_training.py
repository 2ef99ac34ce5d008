"""The training loop: what a run leaves behind, how it is resumed, averages, precision, trackers."""

import importlib.util
import inspect
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from diffusers import AutoModel, DDPMScheduler, DiffusionPipeline

from diffusers_ext import ADMClassifierModel, ADMUNet2DModel, ClassConditionalPipeline
from diffusers_ext.models import PRESETS
from diffusers_ext.training.averaging import Averages, PosthocAverages, ema_variant, posthoc_variant
from diffusers_ext.training.checkpoints import checkpoints
from diffusers_ext.training.config import CLASSIFIER_PRESETS, UNET_PRESETS
from diffusers_ext.training.data import Batch, ImageData
from diffusers_ext.training.loop import train
from diffusers_ext.training.preparation import learning_rates, planned_steps
from diffusers_ext.training.tasks import UNetTask
from diffusers_ext.training.tracking import trackers


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


def untimed(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines(folder)]


def weights_of(component: Path, variant: str | None = None) -> dict[str, torch.Tensor]:
    return load_file(component / f"diffusion_pytorch_model.{variant + '.' if variant else ''}safetensors")


def assert_same_end(once: Path, twice: Path, step: int) -> None:
    """Two runs ended with the same state and metrics, bit for bit."""
    for file in ("model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl"):
        load = load_file if file.endswith("safetensors") else lambda path: torch.load(path, weights_only=False)
        expected, actual = (load(run / f"checkpoint-{step}" / file) for run in (once, twice))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    component = next(once.glob("*/diffusion_pytorch_model.safetensors")).parent.name
    torch.testing.assert_close(weights_of(twice / component), weights_of(once / component), rtol=0, atol=0)
    assert untimed(twice) == untimed(once)


@pytest.fixture(autouse=True)
def isolated():
    """A precision of its own for accelerate, which keeps one per process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# What a run leaves behind


def test_unet_run_leaves_a_component_that_loads(tmp_path, capsys):
    path = train(replace(TINY_UNET, output_dir=str(tmp_path / "run")))
    assert path == tmp_path / "run" / "unet"
    assert f"Saved {path}" in capsys.readouterr().out
    unet = AutoModel.from_pretrained(str(path))
    assert isinstance(unet, ADMUNet2DModel) and unet.config.out_channels == 2
    scheduler = DDPMScheduler.from_pretrained(tmp_path / "run", subfolder="scheduler")
    assert scheduler.config.variance_type == "learned_range" and scheduler.config.clip_sample
    assert {p.name for p in (tmp_path / "run" / "samples").iterdir()} == {"0000004.png", "0000006.png"}
    assert Image.open(tmp_path / "run" / "samples" / "0000006.png").size == (16, 16)  # four images of 8 px
    assert [line["step"] for line in lines(tmp_path / "run")] == [2, 4, 6]
    assert {"loss", "mse", "vb", "grad_norm", "learning_rate", "images_per_second"} < lines(tmp_path / "run")[0].keys()
    assert Image.open(tmp_path / "run" / "metrics.png").size[0] > 500
    assert json.loads((tmp_path / "run" / "config.json").read_text())["max_train_steps"] == 6


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
    model.register_forward_pre_hook(
        lambda module, args, options: seen.append(options["class_labels"]), with_kwargs=True
    )
    torch.manual_seed(0)
    images = torch.zeros(400, 1, 8, 8, dtype=torch.uint8)
    task.losses(model, Batch(images, torch.full((400,), 4), captions=None, rows=list(range(400))))
    assert set(seen[0].tolist()) == {4, 10} and 0.2 < (seen[0] == 10).float().mean() < 0.3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": "adm/film"}, r"`model` \('adm/film'\) is unknown. Valid: adm/digits"),
        ({"model": "dit/mnist", "block_out_channels": (8,)}, "`block_out_channels` is not an option of GQADiT"),
        ({"model_options": ("pool=attention",)}, "`pool` is not an option of ADMUNet2DModel"),
        ({"model_options": ("dropout",)}, "`model_options` holds 'dropout'; write name=value"),
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
    metrics = lines(tmp_path)
    assert metrics[0]["loss"] > metrics[1]["loss"] and metrics[1]["accuracy"] > 0.2  # 0.1 is chance


# Resuming


@pytest.fixture
def train_until(monkeypatch):
    """Trains until the process receives SIGTERM while a batch is made: `train_until(step, config)`."""

    def run(step: int, config) -> None:
        last_batch = step * config.gradient_accumulation_steps
        draw = ImageData.batches

        def batches(self, *args, **kwargs):
            for number, batch in enumerate(draw(self, *args, **kwargs), start=1):
                if number == last_batch + 1:
                    signal.raise_signal(signal.SIGTERM)
                yield batch

        with monkeypatch.context() as patch:
            patch.setattr(ImageData, "batches", batches)
            with pytest.raises(SystemExit) as stopped:
                train(config)
        assert stopped.value.code == 128 + signal.SIGTERM

    return run


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(TINY_UNET, id="unet"),
        pytest.param(
            replace(TINY_UNET, gradient_accumulation_steps=2, timestep_sampling="loss_second_moment"),
            id="unet, two forward passes, importance",
        ),
        pytest.param(replace(TINY_UNET, mixed_precision="bf16", ema_decay=(0.9, 0.5)), id="unet in bfloat16"),
        pytest.param(replace(TINY_CLASSIFIER, use_ema=False), id="classifier"),
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
    assert_same_end(tmp_path / "once", tmp_path / "twice", step=6)


def test_more_steps_and_another_rate_can_be_asked_for_on_resuming(tmp_path):
    config = replace(TINY_UNET, output_dir=str(tmp_path), max_train_steps=3, lr_scheduler="constant")
    train(config)
    more = replace(config, max_train_steps=6, learning_rate=1e-5)
    train(replace(more, resume_from_checkpoint=str(tmp_path / "checkpoint-3")))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-6"]
    assert [line["learning_rate"] for line in lines(tmp_path) if "learning_rate" in line] == [1e-3, 1e-3, 1e-5, 1e-5]
    assert torch.load(tmp_path / "checkpoint-6" / "optimizer.bin")["param_groups"][0]["lr"] == 1e-5
    before = weights_of(tmp_path / "unet")
    train(replace(more, resume_from_checkpoint="latest"))  # finished: only the component is written again
    torch.testing.assert_close(weights_of(tmp_path / "unet"), before, rtol=0, atol=0)


def test_going_back_leaves_the_newer_checkpoints_aside(tmp_path, capsys):
    config = replace(TINY_UNET, output_dir=str(tmp_path), checkpoints_total_limit=1, checkpointing_steps=2)
    train(replace(config, checkpoints_total_limit=0, max_train_steps=4))
    train(replace(config, max_train_steps=3, resume_from_checkpoint=str(tmp_path / "checkpoint-2")))
    assert "checkpoint-4 is renamed to abandoned-checkpoint-4" in capsys.readouterr().out
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3"]
    assert (tmp_path / "abandoned-checkpoint-4" / "model.safetensors").exists()


def test_checkpoints_beyond_the_limit_and_unfinished_ones_go(tmp_path):
    (tmp_path / "unfinished-checkpoint").mkdir()
    (tmp_path / "unfinished-checkpoint" / "model.safetensors").write_text("half")
    config = replace(TINY_UNET, checkpointing_steps=2, checkpoints_total_limit=2, output_dir=str(tmp_path))
    train(replace(config, resume_from_checkpoint="latest"))
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-6"]


def _shorten(checkpoint: Path) -> None:
    with (checkpoint / "optimizer.bin").open("r+b") as file:
        file.truncate(100)


def _flip(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    "break_it, told",
    [
        (_shorten, "optimizer.bin has 100 bytes, not"),
        (_flip, "model.safetensors has other content than was written"),
        (lambda checkpoint: (checkpoint / "custom_checkpoint_0.pkl").unlink(), "custom_checkpoint_0.pkl is missing"),
        (lambda checkpoint: (checkpoint / "manifest.json").write_text("{"), "it cannot be read"),
        (lambda checkpoint: [file.unlink() for file in checkpoint.iterdir()], "manifest.json is missing"),
    ],
    ids=["shortened", "changed", "file missing", "torn manifest", "empty"],
)
def test_a_damaged_checkpoint_is_passed_over(break_it, told, tmp_path, capsys):
    config = replace(TINY_UNET, output_dir=str(tmp_path), max_train_steps=2, checkpointing_steps=1)
    train(config)
    expected = weights_of(tmp_path / "unet")
    break_it(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="checkpoint-2.* is damaged"):
        train(replace(config, resume_from_checkpoint=str(tmp_path / "checkpoint-2")))
    train(replace(config, resume_from_checkpoint="latest"))
    printed = capsys.readouterr().out
    assert "checkpoint-2 is damaged" in printed and told in printed and "going on from checkpoint-1" in printed
    torch.testing.assert_close(weights_of(tmp_path / "unet"), expected, rtol=0, atol=0)
    for path in checkpoints(tmp_path):
        (path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="every checkpoint is damaged"):
        train(replace(config, resume_from_checkpoint="latest"))


def test_fewer_steps_than_are_done_cannot_be_asked_for(tmp_path):
    config = replace(TINY_CLASSIFIER, output_dir=str(tmp_path), resume_from_checkpoint="latest")
    train(config)
    with pytest.raises(ValueError, match=r"`max_train_steps` \(4\) is less than the 6 steps that checkpoint-6 has"):
        train(replace(config, max_train_steps=4))


def test_a_run_is_not_written_over(tmp_path):
    (tmp_path / "checkpoint-1000").mkdir()
    (tmp_path / "checkpoint-900").mkdir()
    with pytest.raises(ValueError, match="`output_dir` .* holds checkpoints up to checkpoint-1000"):
        train(replace(TINY_UNET, output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="`resume_from_checkpoint` .*checkpoint-7.* must be 'latest' or the folder"):
        train(replace(TINY_UNET, output_dir=str(tmp_path), resume_from_checkpoint=str(tmp_path / "checkpoint-7")))


def test_a_checkpoint_of_other_options_is_refused(tmp_path):
    config = replace(TINY_UNET, output_dir=str(tmp_path), max_train_steps=1)
    train(config)
    more = replace(config, resume_from_checkpoint="latest", max_train_steps=2)
    with pytest.raises(ValueError, match="checkpoint-1.* does not fit the options of this run"):
        train(replace(more, block_out_channels=(16, 16)))
    with pytest.raises(ValueError, match=r"`ema_decay` \(0.5\) is not in the checkpoint \(0.9999\)"):
        train(replace(more, ema_decay=(0.5,)))


# Averages


def test_moving_average_can_be_left_out(tmp_path):
    train(replace(TINY_UNET, use_ema=False, output_dir=str(tmp_path)))
    expected = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    torch.testing.assert_close(weights_of(tmp_path / "unet"), expected, rtol=0, atol=0)


def test_several_averages_are_saved_as_variants(tmp_path):
    path = train(replace(TINY_UNET, output_dir=str(tmp_path), ema_decay=(0.9, 0.25), max_train_steps=4))
    state = torch.load(tmp_path / "checkpoint-4" / "custom_checkpoint_0.pkl", weights_only=False)["averages"]
    for decay, variant in ((0.9, None), (0.25, ema_variant(0.25))):
        expected = {f"{i}": value for i, value in enumerate(state[str(decay)]["shadow_params"])}
        loaded = ADMUNet2DModel.from_pretrained(path, variant=variant)
        actual = {f"{i}": value.detach() for i, value in enumerate(loaded.parameters())}
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        pipeline = DiffusionPipeline.from_pretrained(tmp_path, variant=variant)
        torch.testing.assert_close(pipeline.unet.state_dict(), loaded.state_dict(), rtol=0, atol=0)
    assert not torch.equal(*(weights_of(path, variant)["conv_in.weight"] for variant in (None, ema_variant(0.25))))


def test_averages_have_the_decay_asked_for():
    weight = torch.nn.Parameter(torch.zeros(1))
    averages = Averages([weight], decays=(0.9, 0.5), power=100.0)  # no warm-up
    for value in (0.0, 1.0, 1.0):
        weight.data.fill_(value)
        averages.step()
    for decay, expected in ((0.9, 0.19), (0.5, 0.75)):
        with averages.applied(decay):
            assert weight.item() == pytest.approx(expected)
    assert weight.item() == 1.0
    with pytest.raises(ValueError, match=r"`ema_decay` \(1.0,\) must be different numbers between 0 and 1"):
        Averages([weight], decays=(1.0,), power=0.75)


def test_averages_of_any_width_are_made_afterwards(train_until, tmp_path):
    """The widths that were kept come out again; a resumed run has the same."""
    pytest.importorskip("ema_pytorch")
    config = replace(
        TINY_UNET, posthoc_ema_sigma_rels=(0.05, 0.075, 0.1), use_ema=False, resume_from_checkpoint="latest"
    )
    once, twice = (replace(config, output_dir=str(tmp_path / name)) for name in ("once", "twice"))
    path = train(once)
    train_until(4, twice)
    (tmp_path / "twice" / "posthoc_ema" / "0.6.pt").write_text("half")
    train(twice)
    for sigma_rel in config.posthoc_ema_sigma_rels:
        variant = posthoc_variant(sigma_rel)
        torch.testing.assert_close(weights_of(tmp_path / "twice" / "unet", variant), weights_of(path, variant))
    for index, sigma_rel in enumerate((0.05, 0.1)):
        kept = torch.load(tmp_path / "once" / "posthoc_ema" / f"{index}.6.pt", weights_only=True)
        expected = {k.removeprefix("ema_model."): v for k, v in kept.items() if k.startswith("ema_model.")}
        loaded = ADMUNet2DModel.from_pretrained(path, variant=posthoc_variant(sigma_rel))
        torch.testing.assert_close(dict(loaded.state_dict()), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("steps", [12, 100])
def test_averages_of_any_width_are_means(steps, tmp_path):
    """Of weights that drift, a wider average follows from further behind; of constant ones, every width is equal."""
    pytest.importorskip("ema_pytorch")
    sigma_rels = (0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.27)
    network = torch.nn.Linear(2, 2)
    averages = PosthocAverages(network, sigma_rels, tmp_path / "snapshots", Accelerator(cpu=True), steps)
    torch.nn.init.constant_(network.bias, 3.0)
    for step in range(1, steps + 1):
        torch.nn.init.constant_(network.weight, step / steps)
        averages.step()
        averages.snapshot(step)
    networks = [averages.synthesized(sigma_rel) for sigma_rel in sigma_rels]
    for synthesized in networks:
        torch.testing.assert_close(synthesized.bias, torch.full((2,), 3.0), rtol=1e-3, atol=0, check_stride=False)
    means = [synthesized.weight.mean().item() for synthesized in networks]
    assert means == sorted(means, reverse=True) and 1 > means[0] > means[-1] > 0.5


# Precision, memory, schedule


def test_bfloat16_run_keeps_float32_weights(tmp_path):
    path = train(replace(TINY_UNET, mixed_precision="bf16", max_train_steps=2, output_dir=str(tmp_path)))
    assert {value.dtype for value in weights_of(path).values()} == {torch.float32}


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    config = replace(TINY_UNET, max_train_steps=2, dropout=0.0)
    plain = train(replace(config, output_dir=str(tmp_path / "plain")))
    checkpointed = train(replace(config, output_dir=str(tmp_path / "checkpointed"), gradient_checkpointing=True))
    torch.testing.assert_close(weights_of(checkpointed), weights_of(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"mixed_precision": "fp16"}, ValueError, "`mixed_precision` is 'fp16', but float16 on a CPU .* use 'bf16'"),
        ({"use_8bit_adam": True}, (ImportError, ValueError), r"`use_8bit_adam` needs .*(diffusers_ext\[8bit\]|a GPU)"),
        ({"ema_decay": (0.5, 0.5)}, ValueError, r"`ema_decay` \(0.5, 0.5\) must be different numbers"),
        ({"posthoc_ema_sigma_rels": (0.5,)}, ValueError, r"`posthoc_ema_sigma_rels` \(0.5,\) must lie between"),
    ],
)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="about training on a CPU")
def test_what_cannot_work_is_refused(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        train(replace(TINY_UNET, output_dir=str(tmp_path), **options))


def test_length_can_be_given_in_epochs(tmp_path):
    config = replace(TINY_UNET, num_train_epochs=2, validation_epochs=1, gradient_accumulation_steps=2)
    data = UNetTask(config).data
    per_step = 8 * 2 * 3
    assert planned_steps(config, data, processes=3) == (-(-2 * len(data) // per_step), -(-len(data) // per_step))

    class Streamed:
        def __len__(self):
            raise TypeError

    with pytest.raises(ValueError, match=r"`num_train_epochs` \(2\) needs data of known length.*`max_train_steps`"):
        planned_steps(config, Streamed(), processes=1)
    with pytest.raises(ValueError, match=r"`validation_epochs` \(1\) needs data .*`validation_steps` instead"):
        planned_steps(replace(config, num_train_epochs=None), Streamed(), processes=1)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("constant", {0: 1.0, 5: 1.0, 10: 1.0}),
        ("constant_with_warmup", {0: 0.0, 1: 0.5, 2: 1.0, 10: 1.0}),
        ("linear", {1: 0.5, 2: 1.0, 6: 0.5, 10: 0.0}),
        ("cosine", {1: 0.5, 2: 1.0, 6: 0.5, 10: 0.0}),
        ("cosine_with_restarts", {1: 0.5, 2: 1.0, 6: 0.5, 10: 0.0}),
        ("polynomial", {1: 0.5, 2: 1.0, 6: 0.5, 10: 1e-7 / 1e-3}),
    ],
)
def test_learning_rates_follow_their_schedule(name, expected):
    config = replace(TINY_UNET, lr_scheduler=name)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    rate = learning_rates(optimizer, config, steps=10)
    for step, share in expected.items():
        assert rate(step) == pytest.approx(config.learning_rate * share, abs=1e-7)


# Trackers


def test_tensorboard_receives_numbers_and_pictures(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(replace(TINY_UNET, output_dir=str(tmp_path / "run"), report_to="tensorboard"))
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "logs" / "run"))
    events.Reload()
    recorded = {event.step: event.value for event in events.Scalars("loss")}
    assert recorded == pytest.approx({line["step"]: line["loss"] for line in lines(tmp_path / "run")})
    images = events.Images("samples")
    assert [(image.step, image.width, image.height) for image in images] == [(4, 16, 16), (6, 16, 16)]


def test_the_plot_of_a_validation_reaches_the_trackers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(replace(TINY_CLASSIFIER, output_dir=str(tmp_path / "run"), report_to="tensorboard"))
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "logs" / "run"))
    events.Reload()
    assert events.Tags()["images"] == ["noise_levels"]
    assert [image.step for image in events.Images("noise_levels")] == [4, 6]


def test_the_log_needs_nothing_that_windows_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    spec = importlib.util.spec_from_file_location("tracking_again", inspect.getfile(trackers))
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_trackio_stays_in_the_run_folder(tmp_path, fresh_python):
    """Numbers and pictures are in its database, no socket is opened, and nothing is written elsewhere."""
    pytest.importorskip("trackio")
    code = """
import socket
def refuse(*args):
    raise OSError("no network here")
socket.socket.connect = socket.socket.bind = refuse
from dataclasses import replace
from diffusers_ext.training.config import UNET_PRESETS
from diffusers_ext.training.loop import train
train(replace(UNET_PRESETS["digits"], block_out_channels=(8, 16), attention_head_dim=8, train_batch_size=4,
              max_train_steps=2, log_steps=1, validation_images=4, validation_inference_steps=1,
              report_to="trackio", output_dir="run"))
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("run")
rows = SQLiteStorage.get_logs("run", run if isinstance(run, str) else run["name"])
assert [row["step"] for row in rows if "loss" in row] == [1, 2], rows
assert any("samples" in row for row in rows), rows
"""
    home = tmp_path / "home"
    home.mkdir()
    fresh_python(code, tmp_path, HOME=str(home), HF_HOME=str(home / "hf"), XDG_CACHE_HOME=str(home / "cache"))
    assert list((tmp_path / "run" / "logs" / "trackio").glob("*.db"))
    assert not [path for path in home.rglob("*") if "trackio" in path.name]


def test_a_tracker_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"`report_to` \('wandb'\) needs a package .* pip install wandb"):
        train(replace(TINY_UNET, output_dir=str(tmp_path), report_to="wandb"))
    assert trackers("all") == trackers("none") == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name != "wandb" or None)
    assert trackers("all") == ["tensorboard", "trackio"]


# Sharing


def test_a_repository_that_cannot_be_made_is_told_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = replace(TINY_UNET, output_dir=str(tmp_path / "run"), push_to_hub=True, hub_model_id="me/digits")
    with pytest.raises(ValueError, match="`push_to_hub`: the repository 'me/digits' cannot be made .*hf auth login"):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
