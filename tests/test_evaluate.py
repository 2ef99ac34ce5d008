"""`evaluate`: samples, models and classifiers against digits, sweeps that go on, results in model cards."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from huggingface_hub import ModelCard
from PIL import Image
from sklearn.datasets import load_digits

from diffusers import DDPMScheduler

from diffusers_ext import ADMClassifierModel, ADMUNet2DModel
from diffusers_ext.evaluation.evaluate import evaluate
from diffusers_ext.evaluation.options import EvaluateConfig
from diffusers_ext.evaluation.report import write_results_to_card
from diffusers_ext.evaluation.sweep import sweep_points
from diffusers_ext.pipelines import ClassConditionalPipeline, ClassifierGuidedPipeline


NETWORK = {
    "sample_size": 8,
    "in_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_resolutions": (4,),
    "attention_head_dim": 8,
}
CARD = """---
license: mit
tags:
- digits
model-index:
- name: toy
  results:
  - task:
      type: unconditional-image-generation
    dataset:
      type: mnist
      name: MNIST
    metrics:
    - type: fid
      value: 3.5
      name: by hand
base_model: somebody/else
---

# A toy

Text that stays: `---` and <!-- a comment -->.
"""


def randomised(network):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.fixture
def model(tmp_path) -> Path:
    """Folder of a tiny pipeline of ten classes, with a card."""
    unet = randomised(ADMUNet2DModel(out_channels=1, num_class_embeds=10, null_class=True, **NETWORK))
    ClassConditionalPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(CARD)
    return tmp_path / "model"


@pytest.fixture
def config(model, tmp_path) -> EvaluateConfig:
    return EvaluateConfig(
        str(model),
        reference="digits",
        num_samples=12,
        batch_size=6,
        num_inference_steps=2,
        device="cpu",
        num_bootstrap=20,
        output=str(tmp_path / "out"),
    )


def measured(point) -> dict[str, float]:
    return {metric["name"]: metric["value"] for metric in point["metrics"]}


def real_digits(path: Path, first: int = 0, count: int = 100) -> Path:
    """Digits of the training split as an .npz file of samples."""
    digits = load_digits()
    images = np.round(digits.images[first : first + count] * (255 / 16)).astype(np.uint8)
    np.savez(path, arr_0=images[..., None].repeat(3, axis=3), arr_1=digits.target[first : first + count])
    return path


def test_a_sweep_is_measured_reported_and_taken_up_again(config, model, tmp_path):
    config = replace(config, sweep=("guidance_scale=1,2.5", "scheduler=ddim,dpmsolver++"))
    result = evaluate(config)
    assert [point["swept"] for point in result["points"]] == [
        {"guidance_scale": scale, "scheduler": scheduler}
        for scale in (1, 2.5)
        for scheduler in ("ddim", "dpmsolver++")
    ]
    for point in result["points"]:
        assert point["settings"]["num_inference_steps"] == 2 and point["num_samples"] == 12
        for metric in point["metrics"]:
            assert metric["num_samples"] == 12 and metric["seed"] == 0 and metric["low"] <= metric["high"]
            assert metric["extractor"] in ("pca64", "3-nearest-neighbours")
            assert metric["reference"] == (None if metric["name"].startswith("pairwise") else "digits test")
    assert list(measured(result["points"][0])) == [
        "FD-pca64",
        "KD-pca64",
        *(f"{word}-pca64" for word in ("precision", "recall", "density", "coverage")),
        "pairwise-distance-pca64",
        "accuracy",
    ]
    assert len({measured(point)["FD-pca64"] for point in result["points"]}) == 4
    out = tmp_path / "out"
    assert json.loads((out / "evaluation.json").read_text())["points"][3]["swept"]["scheduler"] == "dpmsolver++"
    assert "| ddim | 2 | 2.5 | 12 |" in (out / "evaluation.md").read_text()
    for picture in ("sweep.png", "sweep_samples.png", "precision_recall.png"):
        assert Image.open(out / picture).width > 50
    assert Image.open(out / "sweep_samples.png").size == (480, 192)  # 4 rows of 10 digits of 8 pixels, six times

    card = ModelCard.load(model / "README.md")
    titles = [entry.metric_name for entry in card.data.eval_results]
    title = "FD-pca64 (scheduler=ddim, num_inference_steps=2, guidance_scale=2.5)"
    assert "by hand" in titles and title in titles and len(titles) == len(set(titles))

    drawn = {file: file.stat().st_mtime_ns for file in out.rglob("samples/*/*.npz")}
    kept = {file: file.stat().st_mtime_ns for file in out.rglob("metrics.json")}
    more = evaluate(replace(config, sweep=("guidance_scale=1,2.5,4", "scheduler=ddim,dpmsolver++")))
    assert more["points"][:4] == json.loads(json.dumps(result["points"])) and len(more["points"]) == 6
    assert len(drawn) == len(kept) == 4 and all(file.stat().st_mtime_ns == when for file, when in drawn.items())
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())
    again = [entry.metric_name for entry in ModelCard.load(model / "README.md").data.eval_results]
    assert len(again) == len(set(again)) == len(titles) + 10


def test_real_digits_score_better_than_noise(config, tmp_path):
    config = replace(config, num_samples=1000, num_inference_steps=None, batch_size=50)
    real = evaluate(replace(config, model=str(real_digits(tmp_path / "real.npz"))))["points"][0]
    noise = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", arr_0=noise, arr_1=np.arange(100) % 10)
    drawn = evaluate(replace(config, model=str(tmp_path / "noise.npz"), output=str(tmp_path / "noise")))["points"][0]
    real, drawn = measured(real), measured(drawn)
    assert real["accuracy"] == 1.0 and drawn["accuracy"] < 0.3  # the judge has seen these very digits
    assert real["FD-pca64"] < 0.2 * drawn["FD-pca64"] and real["KD-pca64"] < drawn["KD-pca64"]
    assert real["precision-pca64"] > 0.6 > 0.1 > drawn["precision-pca64"]


def test_a_folder_of_pictures_is_measured_like_the_file(config, tmp_path):
    config = replace(config, num_samples=1000, num_inference_steps=None, batch_size=50, metrics=("fd", "accuracy"))
    path = real_digits(tmp_path / "real.npz", count=20)
    (tmp_path / "images").mkdir()
    with np.load(path) as file:
        for index, image in enumerate(file["arr_0"]):
            Image.fromarray(image).save(tmp_path / "images" / f"{index:02d}.png")
        labels = {f"{index:02d}.png": int(label) for index, label in enumerate(file["arr_1"])}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    results = [evaluate(replace(config, model=str(model))) for model in (path, tmp_path / "images")]
    assert measured(results[0]["points"][0]) == measured(results[1]["points"][0])
    assert not list(tmp_path.rglob("README.md")) or (tmp_path / "model" / "README.md").read_text() == CARD


def test_classifier_alone_and_in_a_pipeline(config, tmp_path):
    classifier = randomised(ADMClassifierModel(num_classes=10, **NETWORK))
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    unet = ADMUNet2DModel(out_channels=1, **NETWORK)
    ClassifierGuidedPipeline(unet, scheduler, classifier).save_pretrained(tmp_path / "guided")
    config = replace(config, num_samples=1000, num_inference_steps=None, reference_images=16)
    alone = evaluate(replace(config, model=str(tmp_path / "guided" / "classifier")))
    inside = evaluate(replace(config, model=str(tmp_path / "guided"), metrics=("noise_levels",)))
    assert alone["noise_levels"] == inside["noise_levels"] and len(alone["noise_levels"]["levels"]) == 8
    assert alone["noise_levels"]["num_images"] == 16 and not alone["points"]
    assert (tmp_path / "out" / "noise_levels.png").exists()
    card = ModelCard.load(tmp_path / "guided" / "README.md")  # of the whole pipeline, written once
    assert [entry.task_type for entry in card.data.eval_results] == ["image-classification"] * 8
    assert card.text.count("evaluation:start") == 1 and "| 875-999 |" in card.text


def test_bits_per_dim_of_the_network(config, tmp_path):
    config = replace(config, metrics=("bpd",), bpd_images=4, bpd_steps=3, batch_size=3)
    (metric,) = evaluate(config)["model_metrics"]
    assert metric["name"] == "bits-per-dim" and metric["num_samples"] == 4 and metric["details"]["num_steps"] == 3
    assert metric["value"] > 1 and not (tmp_path / "out" / "samples").exists()
    (other,) = evaluate(replace(config, batch_size=4))["model_metrics"]
    assert metric["value"] == pytest.approx(other["value"], rel=1e-5)


def test_bits_per_dim_in_half_precision_stand_beside_those_in_full(config, model):
    config = replace(config, metrics=("bpd",), bpd_images=3, bpd_steps=3)
    full, half = (evaluate(replace(config, dtype=dtype))["model_metrics"][0] for dtype in ("float32", "bfloat16"))
    assert half["value"] == pytest.approx(full["value"], rel=0.02) and half["value"] != full["value"]
    titles = [entry.metric_name for entry in ModelCard.load(model / "README.md").data.eval_results]
    assert titles == ["by hand", "bits-per-dim", "bits-per-dim (dtype=bfloat16)"]


def test_runs_that_differ_in_how_samples_are_drawn_stand_beside_each_other(config, model):
    config = replace(config, metrics=("fd",), scheduler="ddim")
    changes = (
        {},
        {"scheduler_options": ("timestep_spacing=trailing",)},
        {"call_options": ("eta=0.5",)},
        {"dtype": "bfloat16"},
    )
    for number, change in enumerate(changes):
        evaluate(replace(config, **change, output=f"{config.output}-{number}"))
    titles = [entry.metric_name for entry in ModelCard.load(model / "README.md").data.eval_results]
    told = "FD-pca64 (scheduler=ddim, {}num_inference_steps=2{})"
    assert titles[1:] == [
        told.format("", ""),
        told.format("scheduler_options=timestep_spacing=trailing, ", ""),
        told.format("", ", call_options=eta=0.5"),
        told.format("", ", dtype=bfloat16"),
    ]


def test_a_sweep_of_the_precision_loads_the_model_anew(config, tmp_path):
    evaluate(replace(config, sweep=("dtype=float32,bfloat16",), metrics=("fd",), write_card=False))
    weights = {
        json.loads(file.read_text())["options"]["dtype"]: json.loads(file.read_text())["options"]["model"]
        for file in tmp_path.rglob("manifest.json")
    }
    assert len(set(weights.values())) == 2 and weights.keys() == {"float32", "bfloat16"}


def test_samples_without_labels_are_not_judged(config):
    point = evaluate(replace(config, class_labels=None))["points"][0]
    assert "accuracy" not in measured(point) and "FD-pca64" in measured(point)
    with pytest.raises(ValueError, match="'accuracy', but the samples are drawn without class labels"):
        evaluate(replace(config, class_labels=None, metrics=("accuracy",)))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"sweep": ("guidance=1,2",)},
            "`sweep` holds 'guidance=1,2'; write name=value,value with a name out of",
        ),
        ({"sweep": ("model=a,b",)}, "`sweep` holds 'model=a,b'"),
        ({"sweep": ("guidance_scale",)}, "`sweep` holds 'guidance_scale'; write"),
        ({"sweep": ("guidance_scale=1,x",)}, "`sweep` gives guidance_scale the value 'x', which does not fit"),
        ({"sweep": ("guidance_scale=",)}, "`sweep` gives guidance_scale the value ''"),
        ({"sweep": ("num_inference_steps=1.5",)}, "`sweep` gives num_inference_steps the value '1.5'"),
        ({"sweep": ("guidance_interval=0.5",)}, "guidance_interval the value '0.5', which does not fit: it must be 2"),
        ({"sweep": ("dtype=int8",)}, "dtype the value 'int8', which does not fit: it must be one of float32"),
        ({"sweep": ("scheduler=ddim,dpm",)}, r"`scheduler` \('dpm'\) must be one of"),
        ({"sweep": ("eta=1",)}, "`eta` is 1.0, which `scheduler` DDPMScheduler does not have"),
        ({"sweep": ("guidance_mode=mean",)}, "`guidance_mode` is 'mean', but ClassConditionalPipeline does not"),
        ({"sweep": ("num_inference_steps=4,0",)}, "`num_inference_steps` is 0; it must be at least 1"),
        ({"sweep": ("eta=0", "eta=1")}, "`sweep` varies 'eta' twice"),
        ({"metrics": ("noise_levels",)}, "'noise_levels', but the pipeline has no `classifier`"),
        ({"metrics": ("clip_score",)}, "'clip_score', which needs `prompts`"),
        ({"reference": "/nowhere"}, "/nowhere"),
        ({"reference_split": "validation"}, r"`reference_split` \('validation'\) must be one of"),
        ({"train_split": "validation"}, r"`train_split` \('validation'\) must be one of"),
        ({"features": "/nowhere"}, "/nowhere"),
        ({"num_samples": 5}, "`num_samples` is 5; comparing features needs 6 or more"),
        ({"num_bootstrap": 0}, "`num_bootstrap` is 0"),
        ({"model": "nowhere.npz"}, r"`model` \('nowhere.npz'\) looks like"),
        ({"model": "/nowhere"}, r"`model` \('/nowhere'\) looks like a local file or folder"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_options_are_named_before_anything_is_drawn(change, message, config, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluate(replace(config, **change))
    assert not list(tmp_path.rglob("shards"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"guidance_scale": 2.0}, "`guidance_scale` is 2.0, but samples are not drawn anew"),
        ({"sweep": ("eta=0,1",)}, r"`sweep` is \('eta=0,1',\), but `model` is samples"),
        ({"metrics": ("bpd",)}, "`metrics` holds 'bpd'; of samples can be measured fd"),
    ],
)
def test_options_that_samples_ignore_are_refused(change, message, config, tmp_path):
    config = replace(config, num_samples=1000, num_inference_steps=None, model=str(real_digits(tmp_path / "a.npz")))
    with pytest.raises(ValueError, match=message):
        evaluate(replace(config, **change))


def test_values_of_a_sweep_are_read_by_their_type(config):
    points = sweep_points(config, ("guidance_interval=None,0.2:0.8", "class_labels=balanced,3:five", "seed=0,0"))
    assert [settings for settings, _ in points] == [
        {"guidance_interval": interval, "class_labels": labels, "seed": 0}
        for interval in (None, (0.2, 0.8))
        for labels in (("balanced",), ("3", "five"))
    ]
    assert points[3][1].class_labels == ("3", "five")


def test_command_line_takes_several_sweeps():
    words = ["model", "--reference", "digits", "--sweep", "guidance_scale=0,1", "--sweep", "scheduler=ddim"]
    words += ["--metrics", "fd", "kid", "--guidance_interval", "0", "0.5"]
    config = tyro.cli(EvaluateConfig, args=words, use_underscores=True)
    assert config.sweep == ("guidance_scale=0,1", "scheduler=ddim") and config.metrics == ("fd", "kid")
    assert config.guidance_interval == (0.0, 0.5) and config.class_labels == ("auto",)


# Model cards


@pytest.fixture
def result(config):
    return evaluate(replace(config, metrics=("fd",), write_card=False))


def test_card_keeps_its_text_and_metadata(model, result):
    assert (model / "README.md").read_text() == CARD
    write_results_to_card(model, result)
    first = (model / "README.md").read_text()
    head, text = first.split("\n---\n", 1)
    assert text.startswith(CARD.split("\n---\n", 1)[1].rstrip()) and text.count("evaluation:start") == 1
    card = ModelCard(first)
    assert card.data.license == "mit" and card.data.base_model == "somebody/else" and card.data.model_name == "toy"
    assert head.index("license") < head.index("tags") < head.index("base_model")
    by_hand, entry = card.data.eval_results
    assert (by_hand.metric_type, by_hand.metric_value, entry.metric_type) == ("fid", 3.5, "frechet_distance")
    assert entry.dataset_type == "digits" and entry.dataset_split == "test" and entry.metric_value > 0
    told = {"num_samples": 12, "seed": 0, "extractor": "pca64", "num_reference": 297, "num_inference_steps": 2}
    assert entry.metric_args.items() >= told.items()
    write_results_to_card(model / "README.md", result)
    assert (model / "README.md").read_text() == first


def test_table_of_a_card_stays_where_it_is(model, result):
    (model / "README.md").write_text(f"{CARD}\n<!-- evaluation:start -->\nold\n<!-- evaluation:end -->\n\n## Last\n")
    write_results_to_card(model, result)
    text = (model / "README.md").read_text()
    assert "old" not in text.split("# A toy")[1] and text.endswith("<!-- evaluation:end -->\n\n## Last\n")


def test_card_is_made_where_there_is_none(tmp_path, result):
    (tmp_path / "bare").mkdir()
    write_results_to_card(tmp_path / "bare", result)
    card = ModelCard.load(tmp_path / "bare" / "README.md")
    assert card.data.model_name == "bare" and card.text.startswith("\n# bare\n")
    assert sorted(path.name for path in (tmp_path / "bare").iterdir()) == ["README.md"]


def test_unreadable_metadata_are_left_alone(model, result):
    broken = CARD.replace("  - task:\n      type: unconditional-image-generation\n", "  - nothing: 1\n")
    (model / "README.md").write_text(broken)
    with pytest.raises(ValueError, match="metadata of .*README.md cannot be read"):
        write_results_to_card(model, result)
    assert (model / "README.md").read_text() == broken


def test_another_number_of_samples_is_drawn_beside_the_first(config, tmp_path):
    config = replace(config, metrics=("diversity",), write_card=False, output=str(tmp_path / "out"))
    for count in (6, 12):
        assert evaluate(replace(config, num_samples=count))["points"][0]["num_samples"] == count
    assert len(list((tmp_path / "out" / "samples").iterdir())) == 2
