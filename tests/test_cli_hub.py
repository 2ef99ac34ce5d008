"""`diffusers-ext push`, `pull`, `export` and `card`, as typed, against the loopback Hub."""

import filecmp
import shutil

import pytest
import torch
from huggingface_hub import ModelCard

from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline

from diffusers_ext import (
    ADMClassifierModel,
    ClassConditionalBlocks,
    ClassConditionalPipeline,
    DilatedConvDenoiserModel,
)
from diffusers_ext.cli import main
from diffusers_ext.hub import push


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a tiny pipeline."""
    torch.manual_seed(0)
    unet = DilatedConvDenoiserModel(sample_size=8, in_channels=1, hidden_channels=(8, 8), time_embedding_dim=8)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    ClassConditionalPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(folder)
    return folder


def test_push_card_and_pull(model, tmp_path, hub, hub_token, capsys):
    folder = tmp_path / "tiny"
    shutil.copytree(model, folder)
    main(["card", str(folder), "--license", "cc0-1.0", "--datasets", "ylecun/mnist"])
    card = (folder / "README.md").read_text()
    assert "license: cc0-1.0" in card and "- ylecun/mnist" in card
    main(["card", str(folder), "--check"])

    capsys.readouterr()
    main(["push", str(folder), "me/typed", "--private", "--commit_message", "First digits"])
    assert capsys.readouterr().out.strip() == f"{hub.endpoint}/me/typed"
    main(["pull", "me/typed", str(tmp_path / "pulled")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "pulled")
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert filecmp.cmp(folder / weights, tmp_path / "pulled" / weights, shallow=False)
    DiffusionPipeline.from_pretrained(tmp_path / "pulled")

    main(["push", str(folder), "me/typed", "--revision", "next"])
    assert capsys.readouterr().out.strip() == f"{hub.endpoint}/me/typed/tree/next"
    (folder / "README.md").write_text(card + "\nDrawn by a tiny network.\n")
    capsys.readouterr()
    main(["push", str(folder), "me/typed", "--create-pr"])
    assert capsys.readouterr().out.strip() == f"{hub.endpoint}/me/typed/discussions/1"
    assert "next" in hub.branches("me/typed")


def test_push_of_the_demo(model, hub, hub_token, capsys):
    main(["push", str(model), "--space", "me/shown", "--private", "--commit_message", "First page"])
    assert capsys.readouterr().out.strip() == f"{hub.endpoint}/spaces/me/shown"
    files = hub.files("spaces/me/shown")
    assert {"app.py", "diffusers_ext/cli.py", "model_cards/tiny/model_index.json"} <= set(files)
    assert {f"model_cards/{name}/model_index.json" for name in ("film-mnist", "adm-mnist")} <= set(files)
    main(["push", "--space", "me/shown", "--create-pr"])
    assert capsys.readouterr().out.strip() == f"{hub.endpoint}/spaces/me/shown/discussions/1"
    assert "model_cards/tiny/model_index.json" not in hub.files("spaces/me/shown", "refs/pr/1")


def test_export_of_a_hub_id_with_its_code(model, tmp_path, hub, hub_token, capsys):
    main(["push", str(model), "me/exported", "--license", "apache-2.0", "--base_model", "me/typed"])
    card = ModelCard(hub.files("me/exported")["README.md"].decode())
    assert card.data.license == "apache-2.0" and card.data.base_model == "me/typed"
    main(["export", "me/exported", str(tmp_path / "alone"), "--self_contained"])
    assert (tmp_path / "alone" / "pipeline.py").is_file()
    DiffusionPipeline.from_pretrained(tmp_path / "alone", trust_remote_code=True)
    main(["push", str(tmp_path / "alone"), "me/alone"])
    assert hub.files("me/alone")["pipeline.py"] == (tmp_path / "alone" / "pipeline.py").read_bytes()
    main(["card", "me/exported", "--output", str(tmp_path / "card.md")])
    assert 'from_pretrained("me/exported")' in (tmp_path / "card.md").read_text()


def test_models_on_the_hub_are_inspected_and_evaluated(model, tmp_path, hub, hub_token, capsys):
    run, blocks = tmp_path / "run", tmp_path / "blocks"
    size = {"sample_size": 8, "in_channels": 1, "block_out_channels": (8, 16), "attention_resolutions": ()}
    ADMClassifierModel(**size, attention_head_dim=8, norm_num_groups=4, num_classes=10).save_pretrained(
        run / "classifier"
    )
    DDPMScheduler().save_pretrained(run / "scheduler")
    pipe = ClassConditionalBlocks().init_pipeline(str(model))
    pipe.load_components()
    push(pipe, "me/seen-blocks")
    main(["push", str(run), "me/seen-classifier"])
    main(["pull", "me/seen-blocks", str(blocks)])
    capsys.readouterr()
    for name, shown in (
        ("me/seen-classifier", "ADMClassifierModel"),
        (str(run), "ADMClassifierModel"),
        ("me/seen-blocks", "DilatedConvDenoiserModel"),
        (str(blocks), "DilatedConvDenoiserModel"),
    ):
        main(["inspect", name, "--effective", "never"])
        assert shown in capsys.readouterr().out
    line = f"evaluate me/seen-classifier --reference digits --reference_images 16 --output {tmp_path / 'measured'}"
    main(line.split())
    assert "Accuracy of the classifier by noise level" in (tmp_path / "measured" / "evaluation.md").read_text()


@pytest.mark.parametrize(
    "line, told",
    [
        ("push nowhere me/x", "nowhere"),
        ("push {model} not/a/repo", "repo_id"),
        ("pull me/absent", "does not exist"),
        ("export nowhere {tmp}", "nowhere"),
        ("card {tmp}", "model"),
        ("card me/errors", "output"),
        ("pull me/errors --variant fp16", "fp16"),
    ],
)
def test_errors_are_one_line(line, told, model, tmp_path, hub, hub_token):
    if "me/errors" in line:
        main(["push", str(model), "me/errors"])
    with pytest.raises(SystemExit) as stopped:
        main(line.format(model=model, tmp=tmp_path).split())
    assert told in stopped.value.code and stopped.value.code.startswith(f"diffusers-ext {line.split()[0]}: ")
    assert len(stopped.value.code.splitlines()) == 1


def test_a_stale_card_fails_the_check_and_shows_the_difference(model, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(model, folder)
    main(["card", str(folder), "--samples", "False"])
    main(["card", str(folder), "--check"])
    path = folder / "README.md"
    path.write_text(path.read_text().replace("DiffusionPipeline.from_pretrained", "Pipeline.load"))
    before = path.read_text()
    with pytest.raises(SystemExit) as stopped:
        main(["card", str(folder), "--check"])
    assert "Pipeline.load" in stopped.value.code and path.read_text() == before
