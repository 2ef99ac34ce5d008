"""The whole life of a model on scikit-learn's digits: train, guide, evaluate, sample, load."""

import json

import numpy as np
import torch
from huggingface_hub import ModelCard

from diffusers import DiffusionPipeline

from diffusers_ext import ClassConditionalPipeline, ClassifierGuidedPipeline
from diffusers_ext.cli import main


TINY = "--block_out_channels 8 16 --attention_head_dim 8 --train_batch_size 16 --max_train_steps 4 --log_steps 2"


def test_from_training_to_a_measured_and_guided_pipeline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(f"train unet {TINY} --validation_images 4 --validation_inference_steps 2".split())
    main(f"train classifier {TINY} --validation_images 20 --unet runs/digits-unet".split())
    assert type(DiffusionPipeline.from_pretrained("runs/digits-unet")) is ClassConditionalPipeline

    drawing = "--num_samples 12 --num_inference_steps 2 --batch_size 6"
    sweep = "--sweep guidance_scale=0,2 --metrics fd accuracy noise_levels --train_images 200 --reference_images 100"
    main(f"evaluate runs/digits-classifier --reference digits {drawing} {sweep} --output runs/report".split())
    report = json.loads((tmp_path / "runs" / "report" / "evaluation.json").read_text())
    assert [point["settings"]["guidance_scale"] for point in report["points"]] == [0, 2]
    assert len(report["noise_levels"]["levels"]) == 8
    card = ModelCard.load(tmp_path / "runs" / "digits-classifier" / "README.md")
    metrics = {result.metric_name for result in card.data.eval_results}
    assert any("FD-pca64" in name for name in metrics) and "<!-- evaluation:start -->" in card.text
    assert "diffusers-ext train classifier" in card.text  # the text of the training stays

    main(f"sample runs/digits-classifier --output runs/samples {drawing} --scheduler ddim --guidance_scale 2".split())
    with np.load(tmp_path / "runs" / "samples" / "samples.npz") as samples:
        assert samples["arr_0"].shape == (12, 8, 8, 3) and samples["arr_1"].tolist() == [*range(10), 0, 1]

    pipe = DiffusionPipeline.from_pretrained("runs/digits-classifier")
    assert type(pipe) is ClassifierGuidedPipeline
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe([3, 7], guidance_scale=2.0, num_inference_steps=2, generator=generator, output_type="pt").images
    assert images.shape == (2, 1, 8, 8) and images.isfinite().all()
