"""Feature extractors by name, the frozen networks inside them, and judges."""

import importlib.util

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn

from diffusers_ext import ADMClassifierModel
from diffusers_ext.evaluation.features import extract, load_features, unit_rows
from diffusers_ext.evaluation.judge import (
    ClassifierJudge,
    NeighbourJudge,
    judge_accuracy,
    load_judge,
    read_split,
)
from diffusers_ext.evaluation.metrics import frechet
from diffusers_ext.evaluation.networks import load_network


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def digits():
    return [read_split("digits", split, sample_size=8) for split in ("train", "test")]


def tiny_classifier(pool: str = "attention", in_channels: int = 1) -> ADMClassifierModel:
    torch.manual_seed(0)
    model = ADMClassifierModel(
        sample_size=8, in_channels=in_channels, num_classes=10, block_out_channels=(8, 16), layers_per_block=1,
        attention_resolutions=(4,), attention_head_dim=8, norm_num_groups=8, pool=pool,
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


# Principal components


def test_principal_components_are_those_of_scikit_learn(digits):
    train, test = (batch.images for batch in digits)
    extractor = load_features("pca64", reference=train)
    assert (extractor.name, extractor.num_features, extractor.frechet_name) == ("pca64", 64, "FD-pca64")
    pca = PCA(64, random_state=0).fit(unit_rows(train))
    features = extract(extractor, test, batch_size=100)
    assert features.dtype == torch.float32 and features.shape == (297, 64)
    assert features.numpy() == pytest.approx(pca.transform(unit_rows(test)), abs=1e-4)
    closer = frechet(extract(extractor, train), features).value
    assert closer < frechet(extract(extractor, random_images(297, 1, 8, 8)), features).value / 10


def test_principal_components_need_reference_images_enough():
    with pytest.raises(ValueError, match="`reference` must be given for pca64"):
        load_features("pca64")
    with pytest.raises(ValueError, match="between 1 and 20"):
        load_features("pca21", reference=random_images(20, 1, 8, 8))
    extractor = load_features("pca8", reference=random_images(20, 1, 8, 8))
    with pytest.raises(ValueError, match="fitted on images of 64"):
        extractor(random_images(2, 3, 8, 8))
    with pytest.raises(ValueError, match="torch.float32 .*must be uint8"):
        extractor(torch.zeros(2, 1, 8, 8))


# Our classifiers


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_features_of_a_classifier_are_what_its_last_layer_reads(pool, tmp_path):
    model = tiny_classifier(pool)
    model.save_pretrained(tmp_path / "my-classifier")
    extractor = load_features(str(tmp_path / "my-classifier"))
    last = [module for module in model.head.modules() if isinstance(module, nn.Linear)][-1]
    images = random_images(3, 1, 8, 8)
    features = extractor(images)
    assert features.shape == (3, extractor.num_features) and extractor.num_features == last.in_features
    assert extractor.frechet_name == "FD-my-classifier"
    with torch.no_grad():
        logits = model(images.float() / 127.5 - 1, 0).logits
        assert torch.allclose(last(features), logits, atol=1e-4)
    given = load_features(model)
    assert given.name == "ADMClassifierModel" and torch.allclose(given(images), features, atol=1e-5)
    assert model(torch.zeros(1, 1, 8, 8), 0).logits.shape == (1, 10)  # unchanged


def test_the_classifier_of_a_pipeline_is_found(root):
    extractor = load_features(root / "model_cards" / "adm-mnist")
    assert (extractor.name, extractor.num_features) == ("adm-mnist", 64)
    inside = load_features(root / "model_cards" / "adm-mnist" / "classifier")
    assert inside.frechet_name == "FD-adm-mnist-classifier"
    images = random_images(2, 1, 32, 32)
    assert torch.allclose(extractor(images), inside(images), atol=1e-5)
    assert inside(random_images(2, 1, 28, 28)).shape == (2, 64)  # resized
    with pytest.raises(ValueError, match="have 3 channels, but adm-mnist looks at 1"):
        extractor(random_images(2, 3, 32, 32))


def test_grey_images_are_repeated_for_a_classifier_of_colour():
    extractor = load_features(tiny_classifier(in_channels=3))
    grey = random_images(2, 1, 8, 8)
    assert torch.equal(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))


# Models of transformers


def transformers_folder(folder, kind: str, mean=None):
    import transformers

    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vision |= {"image_size": 16, "patch_size": 8}
    text = vision | {"vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    if kind == "vit":
        model = transformers.ViTModel(transformers.ViTConfig(**vision))
    elif kind == "vit-classifier":
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**vision, num_labels=3))
    elif kind == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(**vision))
    elif kind == "resnet":
        model = transformers.ResNetModel(
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
        )
    elif kind == "clip":
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    else:
        model = transformers.BertModel(transformers.BertConfig(**{k: text[k] for k in [*text][:4]}, vocab_size=9))
    model.save_pretrained(folder)
    if mean is not None:
        processor = transformers.ViTImageProcessorPil(
            size={"height": 16, "width": 16}, image_mean=mean, image_std=[0.2, 0.3, 0.4]
        )
        processor.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["vit", "dinov2", "resnet", "clip"])
def test_features_of_a_vision_model_are_its_pooled_output(kind, tmp_path):
    mean = [0.1, 0.5, 0.7]
    model = transformers_folder(tmp_path / kind, kind, mean)
    extractor = load_features(tmp_path / kind)
    assert extractor.frechet_name == f"FD-{kind}"
    images = random_images(2, 3, 16, 16)
    pixels = (images / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    with torch.no_grad():
        expected = getattr(model, "vision_model", model)(pixel_values=pixels).pooler_output.flatten(1)
    assert torch.allclose(extractor(images), expected, atol=1e-4)
    grey = random_images(2, 1, 8, 8)
    assert extractor(grey).shape == (2, 16)
    assert torch.equal(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))


def test_a_pooling_that_was_not_trained_is_left_out(tmp_path):
    model = transformers_folder(tmp_path / "vit", "vit-classifier")
    images = random_images(2, 3, 16, 16)
    extractor = load_features(str(tmp_path / "vit"))
    with torch.no_grad():  # without preprocessor_config.json: mean and standard deviation 0.5
        expected = model.vit(pixel_values=images / 127.5 - 1).last_hidden_state.mean(1)
    assert torch.allclose(extractor(images), expected, atol=1e-4)
    again = load_features(str(tmp_path / "vit"))
    assert torch.equal(extractor(images), again(images))
    given = load_features(model)
    assert given.name == "ViTForImageClassification" and torch.allclose(extractor(images), given(images), atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_no_vision_model_is_refused(tmp_path):
    transformers_folder(tmp_path / "bert", "bert")
    with pytest.raises(ValueError, match="is a BertModel, which is no vision model"):
        load_features(tmp_path / "bert")
    with pytest.raises(ValueError, match="holds no network that looks at images"):
        load_features(tmp_path)


# Any module


def test_any_module_on_uint8_images():
    class MeanColour(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert images.dtype == torch.uint8
            return images.double().mean(dim=(2, 3))

    extractor = load_features(MeanColour())
    images = random_images(5, 3, 4, 4)
    features = extractor(images)
    assert extractor.frechet_name == "FD-MeanColour" and extractor.num_features == 3
    assert features.dtype == torch.float32 and torch.allclose(features, images.float().mean(dim=(2, 3)))
    with pytest.raises(ValueError, match=r"`features` \(Sum\) returned"):
        load_features(type("Sum", (nn.Module,), {"forward": lambda self, x: x.sum()})())(images)


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_fid_needs_torch_fidelity():
    with pytest.raises(ImportError, match="pip install torch-fidelity.*called FD, not FID"):
        load_features("inception")


# Networks behind losses


@pytest.mark.parametrize("kind", ["vit", "resnet", "classifier"])
def test_gradients_reach_the_images_but_not_the_frozen_weights(kind, tmp_path):
    if kind == "classifier":
        tiny_classifier(in_channels=3).save_pretrained(tmp_path / kind)
    else:
        transformers_folder(tmp_path / kind, kind)
    network = load_network(tmp_path / kind)
    network.train()  # as part of a trained module
    assert not any(module.training for module in network.modules())
    images = torch.rand(2, 3, 12, 12, requires_grad=True) * 2 - 1
    images.retain_grad()
    pooled, layers = network(images), network.layers(images)
    assert pooled.shape == (2, network.num_features) and len(layers) >= 3
    sum(layer.square().mean() for layer in [pooled, *layers]).backward()
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in network.parameters())
    with pytest.raises(ValueError, match="`source` is a Linear"):
        load_network(nn.Linear(1, 1))


# Judges


def test_the_judge_reads_held_out_digits(digits):
    train, test = digits
    judge = load_judge("neighbours", train)
    estimate = judge_accuracy(judge, test.images, test.labels)
    assert estimate.value > 0.94 and estimate.num_samples == 297
    assert estimate.details["per_class"].keys() == {str(c) for c in range(10)}
    shares = [(test.labels == c).double().mean().item() * estimate.details["per_class"][str(c)] for c in range(10)]
    assert sum(shares) == pytest.approx(estimate.value)
    wrong = judge_accuracy(judge, test.images, (test.labels + 1) % 10)
    assert wrong.value < 0.05
    metric = estimate.metric("judge-accuracy", seed=0, extractor=judge.name)
    assert metric.low < metric.value < metric.high and metric.extractor == "3-nearest-neighbours"


def test_classifiers_judge(tmp_path):
    classifier = tiny_classifier()
    classifier.save_pretrained(tmp_path / "classifier")
    images = random_images(7, 1, 8, 8)
    judge = ClassifierJudge(tmp_path / "classifier", batch_size=3)
    with torch.no_grad():
        expected = classifier(images.float() / 127.5 - 1, 0).logits.argmax(1)
    assert np.array_equal(judge.predict(images), expected.numpy()) and judge.num_classes == 10
    mean = [0.5, 0.4, 0.3]
    vit = transformers_folder(tmp_path / "vit", "vit-classifier", mean)
    judge = load_judge(tmp_path / "vit")
    images = random_images(4, 3, 16, 16)
    pixels = (images / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    with torch.no_grad():
        expected = vit(pixel_values=pixels).logits.argmax(1)
    assert judge_accuracy(judge, images, expected).value == 1 and judge.num_classes == 3


def test_what_a_judge_cannot_read_is_refused(digits):
    train, test = digits
    judge = NeighbourJudge(train.images[:50], train.labels[:50])
    with pytest.raises(ValueError, match=r"`labels` has shape \(3,\) for 2 images"):
        judge_accuracy(judge, test.images[:2], [1, 2, 3])
    with pytest.raises(ValueError, match="`labels` reach from 1 to 10"):
        judge_accuracy(judge, test.images[:2], [1, 10])
    with pytest.raises(ValueError, match=r"knows images of \(1, 8, 8\)"):
        judge.predict(random_images(2, 1, 16, 16))
    with pytest.raises(ValueError, match="`train` must be given"):
        load_judge("neighbours")
