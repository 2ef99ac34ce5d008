"""Push and pull: the real client of the Hub against the server of tests/hub_server.py, with all that goes wrong."""

import json
import logging
import shutil
import time
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, constants, snapshot_download

from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

from diffusers_ext import (
    ADMClassifierModel,
    ADMUNet2DModel,
    ClassConditionalPipeline,
    ClassifierGuidanceBlocks,
    ClassifierGuidedPipeline,
)
from diffusers_ext.hub import export, pull, push
from diffusers_ext.hub.client import HubError, PushConflictError
from diffusers_ext.hub.loading import load_pipeline
from diffusers_ext.hub.remote import create_repository, upload
from diffusers_ext.training.config import UNetTrainingConfig
from diffusers_ext.training.loop import train


TINY = {
    "sample_size": 8,
    "in_channels": 3,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "attention_resolutions": (4,),
    "attention_head_dim": 16,
    "norm_num_groups": 8,
}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CALL = "dict(class_labels=[1, 2], guidance_scale=2.0, num_inference_steps=3, output_type='np')"
SAMPLE = f"pipe(**{CALL}, generator=torch.Generator().manual_seed(0)).images"
FOREVER = float("inf")


def make_pipe(seed: int = 0) -> ClassifierGuidedPipeline:
    torch.manual_seed(seed)
    unet, classifier = ADMUNet2DModel(**TINY, out_channels=6), ADMClassifierModel(**TINY, num_classes=4)
    for parameter in [*unet.parameters(), *classifier.parameters()]:
        torch.nn.init.normal_(parameter, std=0.2)  # the zeros of a fresh output layer would hide everything
    pipe = ClassifierGuidedPipeline(unet=unet, classifier=classifier, scheduler=DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def changed(folder: Path, target: Path) -> Path:
    """A copy of a folder with another bias in its UNet."""
    unet = ADMUNet2DModel.from_pretrained(folder / "unet")
    unet.conv_in.bias.data += 1
    for name, content in contents(folder).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)
    unet.save_pretrained(target / "unet")
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def requests(hub, *methods: str) -> list[str]:
    return [f"{method} {path}" for method, path, _ in hub.log if method in methods]


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    """The pipeline as its repository would hold it."""
    return export(pipe, tmp_path_factory.mktemp("exported") / "tiny")


@pytest.fixture(scope="module")
def other_folder(folder, tmp_path_factory):
    return changed(folder, tmp_path_factory.mktemp("changed") / "tiny")


@pytest.fixture
def repo_id(hub, folder, request):
    """A repository of user `me` that holds the pipeline."""
    name = f"me/{request.node.name.split('[')[0][5:60]}"
    if hub.exists(name):
        hub.delete(name)
    hub.create(name)
    hub.write(name, contents(folder))
    return name


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own for the test."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were waited for between attempts; nobody waits."""
    seconds = []
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda wait: seconds.append(wait) if wait >= 1 else sleep(wait))
    return seconds


def error_of(call) -> str:
    with pytest.raises((HubError, ValueError)) as caught:
        call()
    return str(caught.value)


# From one machine to another


def test_a_colleague_loads_what_was_pushed(hub, hub_token, pipe, tmp_path, fresh_python):
    """From main, by variant, from a branch, a tag and a pull request, from a private repository, and then offline."""
    np.save(tmp_path / "images.npy", eval(SAMPLE, {"pipe": pipe, "torch": torch}))
    info = push(pipe, "colleague", commit_message="First weights")
    assert info.commit_url.startswith(f"{hub.endpoint}/me/colleague/commit/") and info.pr_url is None
    assert hub.commits("me/colleague")[0] == info.oid and len(hub.commits("me/colleague")) == 2
    HfApi().create_tag("me/colleague", tag="v1")

    half = make_pipe().to(torch.float16)
    push(half, "me/colleague", variant="fp16")
    names = set(hub.files("me/colleague"))
    assert {WEIGHTS, WEIGHTS.replace(".s", ".fp16.s"), "README.md", "model_index.json"} <= names
    assert len([name for name in names if name.startswith("classifier/")]) == 3
    unet = make_pipe(seed=1).unet
    assert push(unet, "me/unet", private=True, revision="wide").oid == hub.commits("me/unet", "wide")[0]
    assert "config.json" not in hub.files("me/unet") and "config.json" in hub.files("me/unet", "wide")
    proposal = push(make_pipe(seed=2), "me/colleague", create_pr=True)
    assert proposal.pr_revision == "refs/pr/1" and hub.commits("me/colleague", "refs/pr/1")[0] == proposal.oid
    push(make_pipe(seed=3), "me/colleague", revision="refs/pr/1", commit_message="Better")
    assert len(hub.commits("me/colleague", "refs/pr/1")) == 5 and len(hub.commits("me/colleague")) == 3

    code = f"""
import numpy as np
import torch
from diffusers import AutoModel, DiffusionPipeline
import diffusers_ext
from diffusers_ext.hub import pull

def same(pipe, seed):
    return torch.equal(pipe.unet.conv_in.weight, weights[seed])

weights = torch.load("weights.pt")
pipe = DiffusionPipeline.from_pretrained("me/colleague")
assert type(pipe) is diffusers_ext.ClassifierGuidedPipeline and same(pipe, 0)
np.testing.assert_allclose({SAMPLE}, np.load("images.npy"), atol=1e-4)
half = DiffusionPipeline.from_pretrained("me/colleague", variant="fp16", torch_dtype=torch.float16)
assert half.unet.dtype == torch.float16 and torch.equal(half.unet.conv_in.weight, weights[0].half())
assert same(DiffusionPipeline.from_pretrained("me/colleague", revision="v1"), 0)
assert same(DiffusionPipeline.from_pretrained("me/colleague", revision="refs/pr/1"), 3)
unet = AutoModel.from_pretrained("me/unet", revision="wide")
assert type(unet) is diffusers_ext.ADMUNet2DModel and torch.equal(unet.conv_in.weight, weights[1])
assert same(DiffusionPipeline.from_pretrained(pull("me/colleague")), 0)
assert same(DiffusionPipeline.from_pretrained(pull("me/colleague", revision="refs/pr/1")), 3)
half = DiffusionPipeline.from_pretrained(pull("me/colleague", variant="fp16"), variant="fp16")
assert torch.equal(half.unet.conv_in.weight, weights[0].half().float())
"""
    weights = {seed: make_pipe(seed).unet.conv_in.weight.data for seed in range(4)}
    torch.save(weights, tmp_path / "weights.pt")
    home = {"HF_HOME": str(tmp_path / "home")}
    fresh_python(code, tmp_path, HF_HUB_OFFLINE="0", **home)
    hub.clear_log()
    fresh_python(code, tmp_path, HF_HUB_OFFLINE="1", **home)
    assert not hub.log


def test_a_colleague_without_the_package(hub, hub_token, pipe, tmp_path, fresh_python):
    np.save(tmp_path / "images.npy", eval(SAMPLE, {"pipe": pipe, "torch": torch}))
    push(pipe, "me/alone", self_contained=True)
    code = f"""
import sys
sys.modules["diffusers_ext"] = None  # importing it fails
import numpy as np
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("me/alone", trust_remote_code=True)
np.testing.assert_allclose({SAMPLE}, np.load("images.npy"), atol=1e-4)
"""
    fresh_python(code, tmp_path, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "home"))


def test_images_are_those_of_the_pushed_pipeline_bit_for_bit(hub, hub_token, pipe, cache):
    images = eval(SAMPLE, {"pipe": pipe, "torch": torch})
    for kind in (False, True):
        push(pipe, "me/bits", self_contained=kind)
        for loaded in (
            ClassifierGuidedPipeline.from_pretrained("me/bits"),
            ClassifierGuidedPipeline.from_pretrained(pull("me/bits")),
            DiffusionPipeline.from_pretrained("me/bits", trust_remote_code=kind),
        ):
            loaded.set_progress_bar_config(disable=True)
            np.testing.assert_array_equal(eval(SAMPLE, {"pipe": loaded, "torch": torch}), images)


def test_classes_of_ours_load_what_carries_code_with_installed_code(hub, hub_token, pipe, tmp_path):
    """By name from the Hub, where a download of our classes leaves the code out, and after a pull, which has it."""
    push(pipe.unet, "me/coded-model", self_contained=True)
    push(make_pipe().unet.to(torch.float16), "me/coded-model", self_contained=True, variant="fp16")
    push(make_pipe(seed=1).unet, "me/coded-model", self_contained=True, revision="other")
    for number, arguments in enumerate(({}, {"variant": "fp16"}, {"revision": "other"})):
        unet = ADMUNet2DModel.from_pretrained("me/coded-model", cache_dir=tmp_path / str(number), **arguments)
        assert unet.config.block_out_channels == [16, 32] and "auto_map" not in unet.config
    assert torch.equal(unet.conv_in.weight, make_pipe(seed=1).unet.conv_in.weight)

    modular = ClassifierGuidanceBlocks().init_pipeline()
    modular.update_components(**pipe.components)
    push(modular, "me/coded-blocks", self_contained=True)
    unet = ADMUNet2DModel.from_pretrained("me/coded-blocks", subfolder="unet", cache_dir=tmp_path / "part")
    assert torch.equal(unet.conv_in.weight, pipe.unet.conv_in.weight)
    loaded = ClassifierGuidanceBlocks().init_pipeline("me/coded-blocks")
    loaded.load_components()
    assert type(loaded.classifier) is ADMClassifierModel

    pipe.classifier.save_pretrained(tmp_path / "run" / "classifier")
    pipe.scheduler.save_pretrained(tmp_path / "run" / "scheduler")
    push(tmp_path / "run", "me/coded-parts", self_contained=True)
    (code,) = (name for name in hub.files("me/coded-parts") if name.endswith(".py"))
    part = {"subfolder": "classifier", "cache_dir": tmp_path / "critic"}
    assert type(ADMClassifierModel.from_pretrained("me/coded-parts", **part)) is ADMClassifierModel
    pulled = pull("me/coded-parts")
    assert (pulled / code).is_file()
    push(pulled, "me/coded-parts-again")
    assert code in hub.files("me/coded-parts-again")


# What a commit holds


def test_nothing_is_committed_where_nothing_has_changed(hub, hub_token, repo_id, folder):
    push(folder, repo_id)
    before = hub.commits(repo_id)
    hub.clear_log()
    assert push(folder, repo_id).oid == before[0] and hub.commits(repo_id) == before
    assert not [request for request in requests(hub, "POST") if request.endswith("/commit/main")]


def test_what_an_earlier_push_left_over_is_deleted_in_the_same_commit(hub, hub_token, repo_id, pipe, folder, tmp_path):
    """Shards and their index, pickles, code, components that the pipeline has no more; what else is there stays."""
    push(pipe, repo_id, self_contained=True)
    assert "pipeline.py" in hub.files(repo_id) and any(name.startswith("unet/unet_adm") for name in hub.files(repo_id))
    pipe.unet.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    pipe.unet.save_pretrained(tmp_path / "shards", max_shard_size="200KB", variant="ema")
    left_over = {f"unet/{name}": content for name, content in contents(tmp_path / "shards").items()}
    assert len(left_over) > 6
    people = {"notes/unet.txt", "unet/notes.md", "unet/convert.py", "unet/unet_adm_0123abcd.py", "classifier/my.txt"}
    hub.write(repo_id, {**left_over, **dict.fromkeys(people, b"mine"), "unet/diffusion_pytorch_model.bin": b"pickle"})

    push(pipe, repo_id)
    kept = {name for name in left_over if ".ema" in name} | people | {".gitattributes"}
    assert set(hub.files(repo_id)) == {*contents(folder), *kept}
    assert len(hub.commits(repo_id)) == 5  # made, seeded, self-contained, left over, and one for all of it

    # Another network under the same name: weights of other variants would not fit it.
    hub.write(repo_id, {"pipeline.py": b"# by hand"})
    plain = ClassConditionalPipeline(unet=ADMUNet2DModel(**{**TINY, "layers_per_block": 2}), scheduler=DDPMScheduler())
    plain.register_modules(guide_model=plain.unet)
    push(plain, repo_id)
    assert "guide_model/config.json" in hub.files(repo_id)
    plain.register_modules(guide_model=None)
    push(plain, repo_id)
    names = set(hub.files(repo_id))
    assert "guide_model/config.json" not in names
    assert [name for name in names if name.startswith("classifier/") or ".ema" in name] == ["classifier/my.txt"]
    assert people | {WEIGHTS, "pipeline.py"} <= names
    loaded = DiffusionPipeline.from_pretrained(pull(repo_id))
    assert type(loaded) is ClassConditionalPipeline and loaded.unet.config.layers_per_block == 2


def test_text_that_people_wrote_on_the_hub_is_kept(hub, hub_token, repo_id, folder, other_folder):
    card = hub.files(repo_id)["README.md"].decode()
    hub.write(repo_id, {"README.md": card.replace("---\n\n#", "license: mit\n---\n\nDrawn for my cat.\n\n#").encode()})
    loaded = ClassifierGuidedPipeline.from_pretrained(other_folder)
    push(loaded, repo_id)
    card = hub.files(repo_id)["README.md"].decode()
    assert "Drawn for my cat." in card and "license: mit" in card
    assert f'DiffusionPipeline.from_pretrained("{repo_id}")' in card
    assert hub.files(repo_id)[WEIGHTS] == (other_folder / WEIGHTS).read_bytes()


def test_a_repository_holds_one_kind(hub, hub_token, pipe, tmp_path):
    push(pipe, "me/kinds")
    push(pipe.unet, "me/kinds-model")
    modular = ClassifierGuidanceBlocks().init_pipeline()
    modular.update_components(**pipe.components)
    for call, former, new in (
        (lambda: push(pipe.unet, "me/kinds"), "a pipeline", "a model"),
        (lambda: push(modular, "me/kinds"), "a pipeline", "a modular pipeline"),
        (lambda: push(pipe, "me/kinds-model", create_pr=True), "a model", "a pipeline"),
        (lambda: pipe.push_to_hub("me/kinds-model"), "a model", "a pipeline"),
    ):
        before = [hub.commits(name) for name in ("me/kinds", "me/kinds-model")]
        error = error_of(call)
        assert f"holds {former}, and `pipe` is {new}: a repository holds one of them. Choose another place" in error
        assert [hub.commits(name) for name in ("me/kinds", "me/kinds-model")] == before
    hub.create("me/kinds-card")
    hub.write("me/kinds-card", {"README.md": b"# Soon\n", "notes.txt": b"mine"})
    push(pipe.unet, "me/kinds-card")
    assert {"notes.txt", "config.json"} < hub.files("me/kinds-card").keys()


def test_a_card_that_cannot_be_read_is_told_in_one_sentence(hub, hub_token, repo_id, other_folder):
    hub.write(repo_id, {"README.md": b"---\nlicense: [mit\n---\nMine"})
    error = error_of(lambda: push(ClassifierGuidedPipeline.from_pretrained(other_folder), repo_id))
    assert "README.md that cannot be brought up to date, since its first lines are no YAML" in error
    assert "correct it there, or delete it, then push again" in error and "\n" not in error


def test_single_models_adapters_and_run_folders(hub, hub_token, cache, tmp_path):
    pytest.importorskip("peft")
    from peft import LoraConfig

    unet = make_pipe().unet
    push(unet, "me/single")
    assert set(hub.files("me/single")) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    assert torch.equal(ADMUNet2DModel.from_pretrained(pull("me/single")).conv_in.weight, unet.conv_in.weight)

    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
    unet.save_lora_adapter(tmp_path / "lora")
    push(tmp_path / "lora", "me/adapter")
    assert {"README.md", "pytorch_lora_weights.safetensors"} <= set(hub.files("me/adapter"))
    assert (pull("me/adapter") / "pytorch_lora_weights.safetensors").is_file()


def test_a_finished_run_is_published_without_its_checkpoints(hub, hub_token, tmp_path):
    config = UNetTrainingConfig(
        output_dir=str(tmp_path / "digits"),
        model="adm/digits",
        block_out_channels=(16, 32),
        attention_resolutions=(4,),
        norm_num_groups=8,
        max_train_steps=2,
        train_batch_size=4,
        validation_images=4,
        validation_inference_steps=2,
        use_ema=True,
        report_to="tensorboard",
        push_to_hub=True,
        hub_private_repo=True,
    )
    train(config)
    assert hub.repository("me/digits").private
    names = set(hub.files("me/digits"))
    assert {"README.md", "model_index.json", "unet/config.json", "samples/0000002.png", "metrics.jsonl"} <= names
    assert not [name for name in names if name.startswith(("checkpoint", "logs/")) or name == "config.json"]
    published = b"".join(hub.files("me/digits").values())
    assert str(tmp_path).encode() not in published and hub_token.encode() not in published

    run = tmp_path / "other"
    hub.before("POST .*/commit/", lambda: hub.write("me/other", {"a.txt": b"a"}))
    with pytest.raises(ValueError, match="The run is saved in .* `diffusers-ext push .*other other` uploads it"):
        train(replace(config, output_dir=str(run), report_to="none"))
    assert (run / "model_index.json").is_file()


# Who may do what


def test_private_repositories_need_the_right_token(hub, repo_id, pipe, folder, cache, monkeypatch):
    name = f"{repo_id}-private"
    right, reader, stranger = hub.add_user("me"), hub.add_token("me", "read"), hub.add_user("you")
    push(folder, name, private=True, token=right)
    assert hub.repository(name).private

    missing = error_of(lambda: pull(name))
    assert "does not exist, or is private: no token is in use" in missing and "hf auth login" in missing
    wrong = error_of(lambda: pull(name, token="hf_" + "w" * 34))
    assert "does not accept the token in use" in wrong and "w" * 34 not in wrong
    assert "the token in use has no access to it" in error_of(lambda: pull(name, token=stranger))
    with pytest.raises(OSError):
        DiffusionPipeline.from_pretrained(name)
    assert not cache.exists() or not list(cache.glob("*private/snapshots/*"))
    assert (pull(name, token=reader) / WEIGHTS).is_file()
    monkeypatch.setenv("HF_TOKEN", right)
    assert (pull(name) / WEIGHTS).is_file()
    # Whoever has no token gets nothing, though the files are in the cache.
    assert "no token" in error_of(lambda: pull(name, token=False))


@pytest.mark.parametrize(
    "who, phrase",
    [
        ("nobody", "cannot be pushed to without an access token: log in with `hf auth login`"),
        ("wrong", "does not accept the token in use (Invalid credentials in Authorization header)"),
        ("reader", "no right to do this (Forbidden: you must use a write token to upload to a repository)"),
        ("stranger", "`create_pr=True` proposes the change to its owner instead"),
        ("two lines", "`token` (22 characters) must be one word"),
    ],
)
def test_push_says_which_token_it_needs(hub, repo_id, other_folder, caplog, who, phrase):
    tokens = {"wrong": "hf_" + "w" * 34, "reader": hub.add_token("me", "read"), "stranger": hub.add_user("you")}
    token = {**tokens, "two lines": "hf_abcdefgh\nijklmnopqr"}.get(who)
    before = hub.commits(repo_id)
    with caplog.at_level(logging.DEBUG), pytest.raises((HubError, ValueError)) as caught:
        push(other_folder, repo_id, token=token)
    assert phrase in str(caught.value)
    assert hub.commits(repo_id) == before
    if token is not None:
        assert token not in caplog.text and token not in str(caught.getrepr(chain=True, showlocals=False))


def test_a_password_in_the_address_of_a_hub_is_not_told(hub, cache, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint.replace("//", "//me:opensesame@"))
    with pytest.raises(HubError, match="does not accept the token in use") as caught:
        pull("me/absent")
    assert "opensesame" not in "".join(traceback.format_exception(caught.value))


def test_others_may_propose(hub, repo_id, other_folder):
    before = hub.commits(repo_id)
    info = push(other_folder, repo_id, create_pr=True, token=hub.add_user("you"), commit_message="A better UNet")
    assert hub.commits(repo_id) == before
    assert [request["title"] for request in hub.pull_requests(repo_id)] == ["A better UNet"]
    assert hub.files(repo_id, info.pr_revision)[WEIGHTS] == (other_folder / WEIGHTS).read_bytes()


def test_a_pull_request_is_opened_once(hub, hub_token, repo_id, other_folder):
    hub.cut("POST .*/commit/", part="response")
    error = error_of(lambda: push(other_folder, repo_id, create_pr=True))
    assert "may be open or not" in error and f"{hub.endpoint}/{repo_id}/discussions" in error
    assert len(hub.pull_requests(repo_id)) == 1


def test_a_pull_request_is_asked_for_again_where_the_hub_was_too_busy(hub, hub_token, repo_id, other_folder, waits):
    hub.fail("POST .*/commit/", 429)
    hub.fail("POST .*/commit/", 503, headers={"Retry-After": "5"})
    assert push(other_folder, repo_id, create_pr=True).pr_url and 5 in waits
    assert len(hub.pull_requests(repo_id)) == 1


def test_files_that_the_repository_ignores_are_missed(hub, hub_token, repo_id, other_folder):
    hub.write(repo_id, {".gitignore": b"*.safetensors\n"})
    hub.write(repo_id, {"unet/config.json": b"{}"})
    HfApi().delete_file(WEIGHTS, repo_id)
    assert "without unet/diffusion_pytorch_model.safetensors: a .gitignore" in error_of(
        lambda: push(other_folder, repo_id)
    )


def test_a_public_repository_does_not_take_what_should_be_private(hub, hub_token, repo_id, other_folder):
    before = hub.commits(repo_id)
    assert "exists and is public" in error_of(lambda: push(other_folder, repo_id, private=True))
    assert "exists and is public" in error_of(lambda: create_repository(repo_id, private=True))
    assert hub.commits(repo_id) == before
    assert create_repository("me/new-private", private=True) == "me/new-private"
    assert hub.repository("me/new-private").private and create_repository("new-private") == "me/new-private"


# Names and arguments


def test_repositories_that_are_elsewhere_or_nowhere(hub, hub_token, repo_id, folder, other_folder, cache, caplog):
    before = hub.commits(repo_id)
    pull(repo_id)
    new = f"{repo_id}-renamed"
    hub.rename(repo_id, new)
    renamed = error_of(lambda: push(other_folder, repo_id))
    assert f"was renamed; the repository is {new!r} now" in renamed and hub.commits(new) == before
    pull(repo_id)
    assert f"{repo_id} was renamed; the repository is {new} now" in caplog.text
    hub.delete(new)
    assert "does not exist" in error_of(lambda: pull(repo_id))
    assert "does not exist, or the token in use has no access to it" in error_of(lambda: pull("me/nothing"))
    assert "no right to do this" in error_of(lambda: push(other_folder, "you/nothing"))

    hub.create("you/gated", gated=True)
    hub.write("you/gated", contents(folder))
    gated = error_of(lambda: pull("you/gated"))
    assert "is gated" in gated and f"{hub.endpoint}/you/gated" in gated
    assert "is no branch, tag or commit" in error_of(lambda: pull("you/gated", revision="v7"))


@pytest.mark.parametrize(
    "arguments, phrase",
    [
        ({"repo_id": "me/" + "a" * 97}, "the maximum length is 96"),
        ({"repo_id": "https://me:secret@huggingface.co/me/x"}, "is no name of a repository"),
        ({"repo_id": "me/a..b"}, "Cannot have -- or .."),
        ({"revision": "../main"}, "`revision` ('../main') is no name of a branch"),
        ({"revision": "a" * 40}, "is a commit; pushes go to a branch"),
        ({"revision": "dev", "create_pr": True}, "`create_pr` opens a pull request to main"),
        ({"revision": "refs/pr/77"}, "is no branch, tag or commit"),
        ({"repo_id": "me/hf_" + "secret" * 6}, "`repo_id` ('me/***') holds an access token"),
        ({"revision": "hf_" + "secret" * 6}, "`revision` ('***') holds an access token"),
        ({"commit_message": "hf_" + "secret" * 6}, "`commit_message` holds an access token"),
        ({"repo_id": None}, "`repo_id` (None) is no name of a repository"),
        ({"variant": "v1.0"}, "`variant` ('v1.0') must be a word of letters, digits, '_' and '-'"),
        ({"variant": "../x"}, "`variant` ('../x') must be a word"),
        ({"variant": ""}, "`variant` ('') must be a word"),
        ({"pipe_or_folder": "no-such-folder"}, "is no folder"),
        ({"pipe_or_folder": 3}, "must be a pipeline, a model"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_made(hub, hub_token, repo_id, folder, arguments, phrase):
    error = error_of(lambda: push(**{"pipe_or_folder": folder, "repo_id": repo_id, **arguments}))
    assert phrase in error and "secret" not in error
    assert not [request for request in requests(hub, "POST", "PUT") if "validate-yaml" not in request]


def test_what_must_not_be_published_stays_here(hub, hub_token, folder, tmp_path):
    copy = changed(folder, tmp_path / "copy")
    (copy / "notes.md").write_text(f"export HF_TOKEN={hub_token}")
    assert "notes.md holds an access token" in error_of(lambda: push(copy, "me/refused"))
    assert "notes.md holds an access token" in error_of(lambda: upload(copy, "me/refused"))
    (copy / "notes.md").unlink()
    (copy / WEIGHTS).rename(copy / WEIGHTS.replace(".safetensors", ".bin"))
    assert "diffusion_pytorch_model.bin" in error_of(lambda: push(copy, "me/refused"))
    assert "diffusion_pytorch_model.bin" in error_of(lambda: upload(copy, "me/refused"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    assert "no pipeline, model or LoRA adapter" in error_of(lambda: push(tmp_path / "texts", "me/refused"))
    assert "is no model" in error_of(lambda: upload(tmp_path / "texts", "me/refused"))
    assert not hub.exists("me/refused")


# Several at once


def test_the_second_of_two_pushes_is_told(hub, hub_token, repo_id, folder, other_folder):
    before = hub.commits(repo_id)
    hub.before("POST .*/commit/", lambda: push(other_folder, repo_id, commit_message="faster"))
    third = make_pipe(seed=3)
    with pytest.raises(PushConflictError, match="somebody pushed to 'main' meanwhile .* push again"):
        push(third, repo_id)
    assert len(hub.commits(repo_id)) == len(before) + 1
    assert hub.files(repo_id)[WEIGHTS] == (other_folder / WEIGHTS).read_bytes()
    push(third, repo_id)
    assert len(hub.commits(repo_id)) == len(before) + 2

    # Neither has found a repository.
    name = f"{repo_id}-new"
    hub.before("POST /api/repos/create", lambda: push(other_folder, name))
    with pytest.raises(PushConflictError, match="somebody made it meanwhile"):
        push(folder, name)
    assert hub.files(name)[WEIGHTS] == (other_folder / WEIGHTS).read_bytes()


def test_a_lost_answer_commits_once(hub, hub_token, repo_id, other_folder, waits):
    before = hub.commits(repo_id)
    hub.cut("POST .*/commit/", part="response")
    info = push(other_folder, repo_id)
    assert hub.commits(repo_id) == [info.oid, *before]

    # The answer is lost and somebody is faster with the next commit: that is a conflict.
    third = make_pipe(seed=3)
    hub.cut("POST .*/commit/")
    hub.before("POST .*/commit/", lambda: hub.write(repo_id, {"a.txt": b"a"}))
    with pytest.raises(PushConflictError):
        push(third, repo_id)

    # The answer is lost, and somebody commits on top of what it told.
    before = hub.commits(repo_id)
    hub.cut("POST .*/commit/", part="response")
    hub.before("POST .*/commit/", lambda: None)
    hub.before("POST .*/commit/", lambda: hub.write(repo_id, {"a.txt": b"b"}))
    info = push(third, repo_id)
    assert hub.commits(repo_id)[1:] == [info.oid, *before]


def test_a_hub_that_is_at_work_on_something_else_is_asked_again(hub, hub_token, repo_id, other_folder, waits):
    hub.fail("POST .*/commit/", 409, times=2)
    assert push(other_folder, repo_id).oid == hub.commits(repo_id)[0] and waits[-2:] == [1, 2]


# Servers and connections that fail


def test_requests_are_repeated_while_the_hub_is_busy(hub, hub_token, repo_id, other_folder, waits, caplog):
    hub.fail(f"GET /api/models/{repo_id}$", 500)
    hub.fail("POST .*/preupload/", 429, headers={"Retry-After": "1"})
    hub.fail("POST /api/validate-yaml", 502, body=b"<html>bad gateway</html>")
    hub.fail("POST .*/commit/", 503)
    hub.fail("POST .*/commit/", 429, headers={"Retry-After": "7"})
    info = push(other_folder, repo_id)
    assert hub.files(repo_id)[WEIGHTS] == (other_folder / WEIGHTS).read_bytes() and hub.commits(repo_id)[0] == info.oid
    assert 7 in waits and "Trying again in 7 s" in caplog.text
    assert len([request for request in requests(hub, "POST") if "/commit/" in request]) == 3


def test_a_hub_that_stays_down_is_not_asked_for_ever(hub, hub_token, repo_id, folder, other_folder, cache, waits):
    before = hub.commits(repo_id)
    hub.fail(f"GET /api/models/{repo_id}$", 503, times=FOREVER)
    for call in (lambda: push(other_folder, repo_id), lambda: pull(repo_id)):
        hub.clear_log()
        assert "fails with status 503" in error_of(call)
        assert len(hub.log) == 5 and waits[-4:] == [1, 2, 4, 8]
    hub.reset_faults()
    hub.fail("GET /api/models/", 429, times=FOREVER, headers={"Retry-After": "3600"})
    assert "Try again in 3600 seconds" in error_of(lambda: pull(repo_id)) and len(hub.log) == 1
    hub.reset_faults()
    hub.fail("POST .*/commit/", 500, times=FOREVER)
    assert "fails with status 500" in error_of(lambda: push(other_folder, repo_id))
    assert hub.commits(repo_id) == before


@pytest.mark.parametrize("request_of", ["PUT /upload/", "POST .*/commit/", "POST .*/objects/batch"])
def test_an_interrupted_upload(hub, hub_token, repo_id, other_folder, cache, waits, request_of):
    before, files = hub.commits(repo_id), hub.files(repo_id)
    hub.cut(request_of, after_bytes=100, times=FOREVER)
    assert "the connection to the Hub" in error_of(lambda: push(other_folder, repo_id))
    assert hub.commits(repo_id) == before and hub.files(repo_id) == files  # the previous revision stays as it was
    assert ClassifierGuidedPipeline.from_pretrained(pull(repo_id)) is not None
    hub.reset_faults()
    hub.cut(request_of, after_bytes=100)
    info = push(other_folder, repo_id)
    assert hub.commits(repo_id) == [info.oid, *before]
    assert hub.files(repo_id)[WEIGHTS] == (other_folder / WEIGHTS).read_bytes()


def test_an_interrupted_download(hub, repo_id, folder, other_folder, cache, waits, monkeypatch, tmp_path):
    first = pull(repo_id)
    hub.write(repo_id, contents(other_folder))
    hub.cut("GET .*/download/", after_bytes=1000, times=FOREVER)
    assert "the connection to the Hub" in error_of(lambda: pull(repo_id))
    assert "the connection to the Hub" in error_of(lambda: pull(repo_id, tmp_path / "target"))
    assert not (tmp_path / "target").exists()
    assert pull(repo_id, local_files_only=True) == first  # the branch means the last complete snapshot
    half = cache / f"models--{repo_id.replace('/', '--')}" / "snapshots" / hub.commits(repo_id)[0]
    assert not (half / WEIGHTS).exists()
    with pytest.raises((OSError, ValueError)):
        DiffusionPipeline.from_pretrained(half)

    hub.reset_faults()
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)  # 10 MiB, what is written at a time
    hub.cut("GET .*/download/", after_bytes=1000)
    again = pull(repo_id, tmp_path / "target")
    assert contents(again)[WEIGHTS] == (other_folder / WEIGHTS).read_bytes()
    ranges = [headers["range"] for method, path, headers in hub.log if "range" in headers and "/download/" in path]
    assert "bytes=1000-" in ranges  # it went on where it had stopped


def test_downloads_of_diffusers_itself(hub, repo_id, other_folder, cache, waits, monkeypatch):
    """What `from_pretrained` with a name does: it retries, and loads nothing half-written. What it does not do: check
    hashes, and keep the previous revision in reach when a download of the next one was interrupted."""
    DiffusionPipeline.from_pretrained(repo_id)
    hub.write(repo_id, contents(other_folder))
    hub.cut("GET .*/download/", after_bytes=1000, times=FOREVER)
    with pytest.raises(Exception, match="peer closed connection"):
        DiffusionPipeline.from_pretrained(repo_id)
    hub.reset_faults()
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(OSError, match="incomplete"):
            snapshot_download(repo_id, allow_patterns=["unet/*"])
    hub.cut("GET .*/download/", after_bytes=1000)
    loaded = DiffusionPipeline.from_pretrained(repo_id)
    assert torch.equal(loaded.unet.conv_in.bias, ADMUNet2DModel.from_pretrained(other_folder / "unet").conv_in.bias)

    damaged = bytearray(contents(other_folder)[WEIGHTS])
    damaged[-1] ^= 1
    shutil.rmtree(cache)
    hub.corrupt(repo_id, WEIGHTS, bytes(damaged), times=1)
    DiffusionPipeline.from_pretrained(repo_id)
    assert "another content than the hash" in error_of(lambda: pull(repo_id))
    assert contents(pull(repo_id))[WEIGHTS] == contents(other_folder)[WEIGHTS]


@pytest.mark.parametrize(
    "name, links", [(WEIGHTS, True), (WEIGHTS, False), ("unet/config.json", True), ("model_index.json", True)]
)
def test_a_file_that_is_not_what_the_hub_promised_leaves_the_cache(
    hub, repo_id, folder, cache, tmp_path, monkeypatch, name, links
):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", not links)
    content = bytearray(contents(folder)[name])
    content[-1] ^= 1
    hub.corrupt(repo_id, name, bytes(content), times=1)
    error = error_of(lambda: pull(repo_id, tmp_path / "target"))
    assert f"{name} of {repo_id!r} came with another content than the hash that the Hub states" in error
    assert not (tmp_path / "target").exists()
    assert bytes(content) not in contents(cache).values()
    snapshot = pull(repo_id)
    assert contents(snapshot)[name] == contents(folder)[name] and (snapshot / name).is_symlink() == links
    assert pull(repo_id, local_files_only=True) == snapshot

    shutil.rmtree(cache)
    hub.corrupt(repo_id, name, bytes(content[:-1]), times=1)  # shorter than promised
    error = error_of(lambda: pull(repo_id))
    assert "came with another size than the Hub states, and was not kept" in error and "http" not in error
    assert not list(cache.rglob("*.incomplete"))
    assert contents(pull(repo_id))[name] == contents(folder)[name]


# What is pulled


def test_pull_takes_what_a_pipeline_needs(hub, repo_id, folder, cache):
    hub.write(
        repo_id,
        {
            "unet/diffusion_pytorch_model.bin": b"a pickle",
            "unet/diffusion_pytorch_model.fp16.safetensors": contents(folder)[WEIGHTS],
            "unet/tool.py": b"raise SystemExit",
            "everything.safetensors": b"a checkpoint in one file",
            "[un]et.txt": b"a name that is a pattern",
        },
    )
    hub.clear_log()
    assert set(contents(pull(repo_id))) == {*contents(folder), ".gitattributes", "[un]et.txt"}
    assert not [path for _, path, _ in hub.log if path.endswith((".bin", ".py", "everything.safetensors"))]
    hub.clear_log()
    pull(repo_id)
    assert not [request for request in requests(hub, "GET") if "/download/" in request]

    names = set(contents(pull(repo_id, variant="fp16", cache_dir=cache / "other")))
    assert WEIGHTS not in names and "classifier/diffusion_pytorch_model.safetensors" in names
    assert "It has 'fp16'" in error_of(lambda: pull(repo_id, variant="ema"))
    assert "must be a word" in error_of(lambda: pull(repo_id, variant="a/b"))
    hub.create("me/texts")
    assert "holds no weights as safetensors" in error_of(lambda: pull("me/texts"))


def test_a_pipeline_with_its_network_beside_the_index(hub, cache, tmp_path):
    """As google/ddpm-cifar10-32 and its like have it."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, norm_num_groups=4, **blocks)
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path / "pipe")
    files = {name.rpartition("/")[2]: content for name, content in contents(tmp_path / "pipe").items()}
    assert {"model_index.json", "config.json", "scheduler_config.json"} < set(files)
    hub.create("me/first")
    hub.write("me/first", {**files, "other.safetensors": b"no part of it", "diffusion_pytorch_model.bin": b"pickle"})
    loaded = load_pipeline("me/first")
    assert all(torch.equal(value, unet.state_dict()[key]) for key, value in loaded.unet.state_dict().items())
    assert set(contents(pull("me/first"))) - {".gitattributes"} == set(files)


def test_offline_mode_takes_what_is_in_the_cache(hub, hub_token, repo_id, cache, other_folder, monkeypatch):
    online = pull(repo_id)
    commit = hub.commits(repo_id)[0]
    hub.clear_log()
    assert pull(repo_id, local_files_only=True) == pull(repo_id, revision=commit, local_files_only=True) == online
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull(repo_id) == online
    assert "is not in the cache" in error_of(lambda: pull(repo_id, revision="dev"))
    assert "is not in the cache" in error_of(lambda: pull("me/never-seen"))
    assert "HF_HUB_OFFLINE is set" in error_of(lambda: push(other_folder, repo_id))
    assert not hub.log
    (online / "unet" / "config.json").unlink()
    assert "is not in the cache, or not completely" in error_of(lambda: pull(repo_id))


def test_a_hub_out_of_reach_is_made_up_for_by_the_cache(hub, repo_id, cache, waits, caplog):
    online = pull(repo_id)
    hub.cut("GET ", times=FOREVER)
    assert pull(repo_id) == online and f"taking {repo_id} from the cache" in caplog.text
    assert "the connection to the Hub" in error_of(lambda: pull("me/never-seen"))
    hub.reset_faults()
    hub.fail("GET ", 503, times=FOREVER)
    assert pull(repo_id) == online
    (online / WEIGHTS).unlink()
    assert "fails with status 503" in error_of(lambda: pull(repo_id))
    hub.reset_faults()
    hub.fail("GET ", 200, times=FOREVER, body=b"<html>Log in to this network</html>")
    assert "something else than the Hub's JSON" in error_of(lambda: pull(repo_id))


def test_pull_writes_folders_as_a_whole(hub, repo_id, folder, other_folder, cache, tmp_path):
    target = tmp_path / "new" / "model"
    assert pull(repo_id, target) == target
    assert {name: contents(target)[name] for name in contents(folder)} == contents(folder)
    assert not [path for path in target.rglob("*") if path.is_symlink()]
    assert type(DiffusionPipeline.from_pretrained(target)) is ClassifierGuidedPipeline

    hub.write(repo_id, {"unet/notes.md": b"first"})
    assert (pull(repo_id, target) / "unet/notes.md").is_file()
    HfApi(token=hub.add_user("me")).delete_file("unet/notes.md", repo_id)
    hub.write(repo_id, contents(other_folder))
    pull(repo_id, target)
    assert not (target / "unet/notes.md").exists()
    assert contents(target)[WEIGHTS] == (other_folder / WEIGHTS).read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["model"]  # no leftovers beside it

    mine = json.loads((target / "model_index.json").read_text())
    (target / "model_index.json").write_text(json.dumps(mine))
    assert "model_index.json, which is not as the earlier pull left it" in error_of(lambda: pull(repo_id, target))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("mine")
    assert "was not written by `pull`" in error_of(lambda: pull(repo_id, tmp_path / "texts"))
    assert "is a file" in error_of(lambda: pull(repo_id, tmp_path / "texts" / "a.txt"))
    assert contents(tmp_path / "texts") == {"a.txt": b"mine"}
    (tmp_path / "empty").mkdir()
    assert (pull(repo_id, tmp_path / "empty") / WEIGHTS).is_file()
    for damage in ("{", "[]", "{}", '{"files": 3}'):
        (tmp_path / "empty" / ".pulled.json").write_text(damage)
        assert "was not written by `pull`" in error_of(lambda: pull(repo_id, tmp_path / "empty"))


def test_pull_does_not_take_the_current_folder_away(hub, repo_id, cache, tmp_path, monkeypatch):
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for folder in (".", "..", tmp_path / "here"):
        assert "is the current directory or above it" in error_of(lambda: pull(repo_id, folder))
    assert Path.cwd() == tmp_path / "here" / "below" and not hub.log
    assert (pull(repo_id, "model") / WEIGHTS).is_file()


def test_pull_with_a_token_that_is_not_there(hub, repo_id, cache):
    assert "`token` is True, but nobody is logged in: run `hf auth login`" in error_of(
        lambda: pull(repo_id, token=True)
    )
