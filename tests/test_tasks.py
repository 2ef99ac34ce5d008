"""Tasks: what is built, refused before anything is trained, and saved."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers import AutoencoderKL, DiffusionPipeline

from diffusers_ext.training.config import CLASSIFIER_PRESETS, UNET_PRESETS
from diffusers_ext.training.data import Batch
from diffusers_ext.training.dry_run import describe
from diffusers_ext.training.tasks import ClassifierTask, UNetTask


TINY = {"block_out_channels": (8, 16), "attention_head_dim": 8, "train_batch_size": 4, "validation_images": 4}
TINY_UNET = replace(UNET_PRESETS["digits"], **TINY, validation_inference_steps=2)
TINY_CLASSIFIER = replace(CLASSIFIER_PRESETS["digits"], **TINY)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"log_steps": 0}, r"`log_steps` \(0\) must be at least 1"),
        ({"train_batch_size": 0}, r"`train_batch_size` \(0\) must be at least 1"),
        ({"resolutions": (8, 0)}, r"`resolutions` \(\(8, 0\)\) must be at least 1"),
        ({"seed": -1}, r"`seed` \(-1\) must be at least 0"),
        ({"checkpoints_total_limit": -1}, r"`checkpoints_total_limit` \(-1\) must be at least 0"),
        ({"learning_rate": 0.0}, r"`learning_rate` \(0.0\) must be more than 0"),
        ({"ema_decay": (0.9, 1.0)}, r"`ema_decay` .* must be at least 0 and less than 1"),
        ({"caption_dropout_prob": 2.0}, r"`caption_dropout_prob` \(2.0\) must be between 0 and 1"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_numbers_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY_UNET, **options)


@pytest.fixture
def unet_run(tmp_path):
    task = UNetTask(TINY_UNET)
    task.save(task.build_model(), tmp_path / "unet", steps=0, images_per_step=4)
    return str(tmp_path / "unet")


def test_a_classifier_and_the_network_it_guides_must_fit(unet_run, tmp_path):
    with pytest.raises(ValueError, match="has sample_size=8, but the classifier 16: give `sample_size` 8"):
        ClassifierTask(replace(TINY_CLASSIFIER, sample_size=16, unet=unet_run))
    with pytest.raises(ValueError, match="`unet` .*nowhere.* must be the folder or Hub name of a pipeline"):
        ClassifierTask(replace(TINY_CLASSIFIER, unet=str(tmp_path / "nowhere")))


def test_a_split_that_does_not_exist_is_named_by_its_own_option():
    with pytest.raises(ValueError, match=r"`validation_split` \('valid'\) must be one of"):
        ClassifierTask(replace(TINY_CLASSIFIER, validation_split="valid"))


@pytest.mark.parametrize("task, model", [(UNetTask, "adm-classifier/digits"), (ClassifierTask, "adm/digits")])
def test_a_network_of_the_other_kind_is_refused(task, model):
    config = UNET_PRESETS["digits"] if task is UNetTask else CLASSIFIER_PRESETS["digits"]
    with pytest.raises(ValueError, match=f"`model` .'{model}'. is of the class .*`train unet` trains what removes"):
        task(replace(config, model=model))


@pytest.mark.parametrize("options", [{"beta_schedule": "sigmoid"}, {"rescale_betas_zero_snr": True}])
def test_a_guided_pipeline_knows_the_noise_that_its_classifier_was_trained_on(options, unet_run, tmp_path):
    task = ClassifierTask(replace(TINY_CLASSIFIER, unet=unet_run, **options))
    task.save(task.build_model(), tmp_path / "guided", steps=0, images_per_step=4)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "guided")
    rebuilt = type(task.scheduler).from_config(pipe.config.classifier_schedule)
    torch.testing.assert_close(rebuilt.betas, task.scheduler.betas)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(class_labels=[3], num_inference_steps=2, output_type="pt").images.isfinite().all()


def test_training_goes_on_from_pretrained_weights(unet_run):
    config = replace(UNET_PRESETS["digits"], pretrained_model_name_or_path=unet_run)
    task = UNetTask(config)
    model = task.build_model()
    assert tuple(model.config.block_out_channels) == (8, 16)
    for name, value in DiffusionPipeline.from_pretrained(unet_run).unet.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
    with pytest.raises(ValueError, match="`sample_size` is given, but `pretrained_model_name_or_path`"):
        UNetTask(replace(config, sample_size=8))
    with pytest.raises(ValueError, match="has num_class_embeds=None, but this training needs 10"):
        UNetTask(replace(config, class_conditional=True)).build_model()
    with pytest.raises(ValueError, match="must be the folder or Hub name of a network"):
        UNetTask(replace(config, pretrained_model_name_or_path=unet_run + "/samples"))


def test_class_and_caption_are_dropped_together():
    task = UNetTask(replace(TINY_UNET, class_conditional=True, class_dropout_prob=0.5, caption_dropout_prob=0.5))
    seen = {}

    class Captions:
        def conditions(self, captions):
            seen["captions"] = captions
            return {}

    task.captions = Captions()
    model = task.build_model()
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    torch.manual_seed(0)
    images = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
    task.losses(model, Batch(images, torch.full((40,), 4), ["four"] * 40, list(range(40))))
    dropped = seen["class_labels"] == 10
    assert 5 < dropped.sum() < 35 and dropped.tolist() == [caption == "" for caption in seen["captions"]]


@pytest.fixture
def latent_config(tmp_path):
    """Colour images in class folders, and a tiny autoencoder."""
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pets" / "train" / name).mkdir(parents=True)
        for index in range(3):
            pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / "train" / name / f"{index}.png")
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        sample_size=16,
    )
    vae.save_pretrained(tmp_path / "vae")
    data = {"dataset": str(tmp_path / "pets"), "vae": str(tmp_path / "vae"), "output_dir": str(tmp_path / "run")}
    return replace(TINY_UNET, **data, in_channels=4, class_conditional=True, learned_variance=False)


def test_a_dry_run_makes_no_latents(latent_config, tmp_path):
    assert "# network: ADMUNet2DModel" in describe(latent_config)
    assert not (tmp_path / "run").exists()


def test_a_latent_run_becomes_a_pipeline_that_tells_nothing_about_the_machine(latent_config, tmp_path):
    task = UNetTask(latent_config)
    model = task.build_model()
    batch = next(task.data.batches(2, seed=0))
    assert batch.images.shape == (2, 4, 8, 8) and task.losses(model, batch)["loss"].isfinite()
    task.save(model, tmp_path / "run", steps=0, images_per_step=2)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(["dog"], num_inference_steps=1, output_type="pt").images.shape == (1, 3, 16, 16)
    for path in (tmp_path / "run").rglob("*.json"):
        if "latents" not in path.parts:
            assert str(tmp_path) not in json.dumps(json.loads(path.read_text())), path
    assert str(tmp_path) not in (tmp_path / "run" / "README.md").read_text()
