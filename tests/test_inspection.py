"""`diffusers-ext inspect`: every number against a closed form, a brute-force search or a measurement."""

import copy
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

import diffusers
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from diffusers_ext import ADMClassifierModel, ADMUNet2DModel, DilatedConvDenoiserModel
from diffusers_ext.cli import main
from diffusers_ext.inspection import Anatomy, Source, inspect_models, inspect_source
from diffusers_ext.inspection.drawing import text_width
from diffusers_ext.inspection.receptive_field import FootprintMode, effective_receptive_field
from diffusers_ext.inspection.report import render
from diffusers_ext.inspection.sources import find_sources


UNET = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_resolutions": (8,),
    "attention_head_dim": 32,
}


@pytest.fixture(scope="module")
def adm():
    return inspect_source(Source("tiny", ADMUNet2DModel, UNET), effective="never")


@pytest.fixture
def folder(tmp_path):
    """Writes the config of a network, or the network: `folder("name", model)`."""

    def write(name: str, model: ModelMixin, weights: bool = False) -> str:
        model.save_pretrained(tmp_path / name) if weights else model.save_config(tmp_path / name)
        return str(tmp_path / name)

    return write


# Counts


def test_parameters_and_blocks_add_up(adm):
    model = ADMUNet2DModel(**UNET)
    assert adm.parameters == sum(p.numel() for p in model.parameters())
    assert sum(block.parameters for block in adm.blocks) == adm.parameters
    assert sum(block.flops for block in adm.blocks) == adm.flops
    assert sum(block.activation_bytes for block in adm.blocks) == adm.memory.activations
    by_name = {block.name: block for block in adm.blocks}
    for name in ("down_blocks.0", "mid_block", "up_blocks.1", "conv_in", "time_embedding"):
        assert by_name[name].parameters == sum(p.numel() for p in model.get_submodule(name).parameters())
    assert [block.kind for block in adm.blocks if block.kind in ("down", "mid", "up")] == "down down mid up up".split()


def test_shapes_resolutions_and_attention(adm):
    blocks = {block.name: block for block in adm.blocks}
    assert blocks["down_blocks.0"].output_shape == (1, 32, 8, 8)
    assert blocks["down_blocks.0"].resolution == (16, 16) and blocks["down_blocks.0"].channels == 32
    assert blocks["up_blocks.0"].resolution == (8, 8) and blocks["up_blocks.0"].output_shape == (1, 64, 16, 16)
    assert blocks["time_embedding"].kind == "embedding" and blocks["time_embedding"].resolution is None
    assert not blocks["down_blocks.0"].attention
    (layer,) = blocks["down_blocks.1"].attention
    assert (layer.heads, layer.head_dim, layer.resolution, layer.kind) == (2, 32, (8, 8), "self")
    assert len(blocks["up_blocks.0"].attention) == 2  # one more layer on the way up


def test_skip_connections(adm):
    assert set(adm.skips) == {
        ("conv_in", "up_blocks.1", 1),
        ("down_blocks.0", "up_blocks.1", 1),
        ("down_blocks.0", "up_blocks.0", 1),
        ("down_blocks.1", "up_blocks.0", 1),
    }


class Toy(ModelMixin, ConfigMixin):
    """One convolution, one attention of 2 heads over 2 channels, one linear layer for time."""

    _keep_in_fp32_modules = ["time"]
    _skip_layerwise_casting_patterns = ["conv"]

    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 3, width: int = 4):
        super().__init__()
        self.time = nn.Linear(1, width)
        self.conv = nn.Conv2d(in_channels, width, 5, padding=2, stride=2, bias=False)

    def forward(self, sample, timestep, return_dict=True):
        hidden = self.conv(sample) + self.time(timestep.float()[:, None]).to(sample.dtype)[:, :, None, None]
        tokens = hidden.flatten(2).transpose(1, 2).unflatten(2, (2, -1)).transpose(1, 2)
        tokens = F.scaled_dot_product_attention(tokens, tokens, tokens)
        return (tokens.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, hidden.shape[2:]),)


def test_flops_and_activations_in_closed_form():
    network = inspect_source(Source("toy", Toy, {}), batch_size=2, effective="never")
    blocks = {block.name: block for block in network.blocks}
    pixels = 4 * 4
    assert blocks["conv"].flops == 2 * (2 * pixels * 4 * 3 * 5 * 5)
    assert blocks["time"].flops == 2 * (2 * 4)
    # Two products of (tokens x 2) and (2 x tokens) for each of 2 heads and 2 images.
    assert blocks[""].flops == 2 * 2 * (2 * 2 * pixels * pixels * 2)
    assert network.flops == sum(block.flops for block in network.blocks)
    assert blocks["conv"].activation_bytes == 2 * 3 * 8 * 8 * 4  # its input
    assert network.input_shape == (2, 3, 8, 8) and network.output_shape == (2, 4, 4, 4)
    assert blocks[""].attention[0].resolution == (4, 4)
    assert network.receptive_field.size is None and network.receptive_field.inside == (8, 8)


def test_precision():
    precision = inspect_source(Source("toy", Toy, {}), effective="never").precision
    assert precision.dtype == "float32"
    assert precision.kept_in_float32 == ("time",) and precision.kept_in_float32_parameters == 8
    assert precision.not_cast == ("conv",) and precision.not_cast_parameters == 4 * 3 * 25
    assert precision.computed_in_float32 == ("time",)
    half = inspect_source(Source("toy", Toy, {}), dtype="float16", effective="never")
    assert half.memory.weights == 4 * 8 + 2 * 4 * 3 * 25 and half.precision.dtype == "float16"


# Receptive field


class Slices(nn.Module):
    """Halves of the channels, shifted and written into an empty tensor."""

    def forward(self, x):
        output = torch.empty_like(x)
        output[:, ::2] = x[:, 1::2].roll(1, dims=2)
        output[:, 1::2] = x[:, ::2]
        return output


class Patches(nn.Module):
    """Patches of 4x4 pixels through a linear layer and back."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4 * 16, 4 * 16)

    def forward(self, x):
        height, width = x.shape[2] // 4, x.shape[3] // 4
        x = x.view(1, 4, height, 4, width, 4).permute(0, 2, 4, 3, 5, 1).reshape(1, height * width, -1)
        x = self.linear(x).view(1, height, width, 4, 4, 4)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(1, 4, 4 * height, 4 * width)


class Residual(nn.Sequential):
    def forward(self, x):
        branch = super().forward(x)
        return torch.cat([x[:, :2], branch[:, 2:] * 2], dim=1) + torch.stack([x, branch]).sum(0)


def conv(kernel=3, **options):
    return nn.Conv2d(4, 4, kernel, **options)


NETWORKS = {
    "dilated": [conv(padding=1), conv(padding=3, dilation=3), conv(5, padding=2)],
    "strided": [conv(stride=2, padding=1), conv(padding=1), nn.Upsample(scale_factor=2), conv(padding=1)],
    "transposed": [nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1), conv(stride=2, padding=1)],
    "depthwise": [conv(padding=1, groups=4), conv(1), conv(3, padding=2, dilation=2, groups=2)],
    "pools": [nn.AvgPool2d(2), conv(padding=1), nn.MaxPool2d(3, 2, 1), nn.Upsample(scale_factor=4, mode="bilinear")],
    "asymmetric": [nn.ZeroPad2d((0, 1, 0, 1)), conv(stride=2), nn.PixelShuffle(2), nn.Conv2d(1, 4, 3, padding=1)],
    "wide": [conv((1, 7), padding=(0, 3)), nn.ReflectionPad2d(1), conv()],
    "patches": [conv(padding=1), Patches(), conv(padding=1)],
    "slices": [conv(padding=1), Slices(), conv(padding=1)],
    "residual": [Residual(conv(padding=2, dilation=2), nn.SiLU()), conv(padding=1)],
}


@pytest.mark.parametrize("size", [(24, 24), (16, 32)])
@pytest.mark.parametrize("name", NETWORKS)
def test_theoretical_field_is_what_gradients_reach(name, size):
    """With positive weights and inputs no gradient vanishes or cancels, so that its support is the receptive field."""
    network = copy.deepcopy(nn.Sequential(*NETWORKS[name]))
    meta = torch.zeros(1, 4, *size, device="meta")
    with torch.no_grad(), FootprintMode(meta, size) as footprints:
        output = network.to("meta")(meta)
    rectangle = footprints.centre(output, tuple(output.shape[2:]))
    assert not footprints.whole

    torch.manual_seed(0)
    network = network.to_empty(device="cpu").double()
    for parameter in network.parameters():
        parameter.data.uniform_(0.5, 1)
    image = torch.rand(1, 4, *size, dtype=torch.float64).requires_grad_()
    output = network(image)
    output[..., output.shape[2] // 2, output.shape[3] // 2].sum().backward()
    rows, columns = image.grad[0].abs().sum(0).nonzero().T
    if "pools" in name:  # the maximum passes the gradient of one pixel only
        assert rectangle.top <= rows.min() and rectangle.bottom >= rows.max()
        assert rectangle.size[0] < 20
        return
    assert (rectangle.top, rectangle.left) == (rows.min(), columns.min())
    assert (rectangle.bottom, rectangle.right) == (rows.max(), columns.max())


def test_field_of_dilated_denoiser_is_known():
    found = inspect_source(Source("dilated", DilatedConvDenoiserModel, {}), effective="never").receptive_field
    # Taps of the first layer, of the dilated ones and of the last.
    assert found.size == (7 + 2 * (1 + 1 + 1 + 3 + 3 + 9 + 9 + 27) + 2,) * 2
    assert found.inside == (28, 28) and found.exact and not found.unknown_operations


def test_attention_sees_the_whole_image(adm):
    assert adm.receptive_field.size is None and adm.receptive_field.inside == (16, 16)
    fields = {block.name: block.receptive_field for block in adm.blocks}
    assert fields["conv_in"] == (3, 3) and fields["down_blocks.0"] < (16, 16)
    assert fields["down_blocks.1"] == (16, 16) and fields["time_embedding"] is None


def test_effective_field():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(1, 1, 3, padding=1)
    nn.init.ones_(layer.weight)
    size, share = effective_receptive_field(layer, (1, 9, 9), 2, generator)
    assert size == 3 and share[3:6, 3:6].min() == 1 and share.sum() == 9
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(ValueError, match="last layer may still be zero"):
        effective_receptive_field(layer, (1, 9, 9), 1, generator)


def test_effective_field_of_models(folder):
    torch.manual_seed(0)
    model = ADMUNet2DModel(**UNET)
    fresh = json.loads(inspect_models([folder("config", model)], format="json"))
    field = fresh["models"][0]["networks"][0]["receptive_field"]
    assert 3 < field["effective"] <= 16 and "random weights" in field["effective_of"]
    model.conv_out.weight.data[:, :, 1, 1] = 1.0
    trained = find_sources(folder("weights", model.half(), weights=True))[0]
    network = inspect_source(trained, effective="always")
    assert network.precision.dtype == "float16"  # from the header of the file
    assert "weights of the folder" in network.receptive_field.effective_of
    assert network.receptive_field.effective > 1


# Memory


def peak_of(run) -> int:
    """Largest sum of bytes that `run` has allocated at once, from the profiler's record of every allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = run()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del result
    return peak


def test_memory_is_what_is_allocated():
    torch.manual_seed(0)
    config = {"sample_size": 32, "block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 1}
    config |= {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    network = inspect_source(Source("unet", diffusers.UNet2DModel, config), batch_size=4, effective="never")
    model = diffusers.UNet2DModel(**config)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(torch.zeros(4, 3, 32, 32), torch.zeros(4)).sample.square().mean().backward()
        optimizer.step()

    step()
    optimizer.zero_grad(set_to_none=True)
    assert network.memory.weights == weights and network.memory.optimizer == 2 * weights
    assert network.memory.gradients == weights
    assert weights + 2 * weights + peak_of(step) == pytest.approx(network.memory.training_peak, rel=0.1)
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        forward = peak_of(lambda: model(torch.zeros(4, 3, 32, 32), torch.zeros(4)))
    assert weights + forward == pytest.approx(network.memory.forward_peak, rel=0.1)


def test_memory_grows_with_the_batch(adm):
    larger = inspect_source(Source("tiny", ADMUNet2DModel, UNET), batch_size=3, effective="never")
    # Weights of upsampling convolutions that are computed are kept as well, whatever the batch.
    assert larger.memory.activations > 2.5 * adm.memory.activations
    assert larger.memory.weights == adm.memory.weights and larger.flops > 2.5 * adm.flops


# Models of diffusers


def models():
    yield diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=5, num_attention_heads=2, attention_head_dim=8, num_embeds_ada_norm=3
    )
    yield diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=24, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    yield diffusers.AutoencoderKL(
        sample_size=16, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    yield diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def test_diffusers_models(folder):
    kinds = {}
    for model in models():
        name = type(model).__name__
        data = json.loads(inspect_models([folder(name, model)], size=16, format="json", effective="never"))
        (network,) = data["models"][0]["networks"]
        assert network["model_class"] == name
        assert network["parameters"] == sum(p.numel() for p in model.parameters())
        assert network["flops"] > 0 and network["memory"]["training_peak"] > network["memory"]["forward_peak"]
        assert not network["receptive_field"]["unknown_operations"]
        kinds[name] = network["blocks"]
    dit = [block for block in kinds["DiTTransformer2DModel"] if block["kind"] == "block"]
    assert len(dit) == 5 and {tuple(block["resolution"]) for block in dit} == {(8, 8)}
    text = [layer for block in kinds["UNet2DConditionModel"] for layer in block["attention"]]
    assert {layer["kind"] for layer in text} == {"self", "cross"} and {layer["keys"] for layer in text} == {64, 77}
    assert [block["kind"] for block in kinds["AutoencoderKL"]].count("up") == 2


# What is shown


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    """Arguments: a UNet, a UNet with its classifier, and a column of equal blocks; names that need care."""
    root = tmp_path_factory.mktemp("trio")
    ADMUNet2DModel(**UNET).save_config(root / "unet & <co>")
    ADMClassifierModel(**UNET, num_classes=3).save_config(root / "classifier")
    DilatedConvDenoiserModel(hidden_channels=(8,) * 8).save_config(root / "dilated")
    unet = str(root / "unet & <co>")
    return [unet, f"{unet}+{root / 'classifier'}", str(root / "dilated")]


@pytest.fixture(scope="module")
def anatomies(trio):
    found = []
    for title, model in zip(["one", "both", "column"], trio):
        networks = [inspect_source(source, effective="never") for source in find_sources(model)]
        found.append(Anatomy(title, tuple(networks)))
    return found


def test_json_has_everything(anatomies):
    data = json.loads(render(anatomies, "json"))
    assert data["schema"] == "diffusers_ext.anatomy/1"
    first, both, _ = data["models"]
    assert [network["model_class"] for network in both["networks"]] == ["ADMUNet2DModel", "ADMClassifierModel"]
    assert both["parameters"] == sum(network["parameters"] for network in both["networks"]) > first["parameters"]
    head = both["networks"][1]["blocks"][-2]
    assert head["attention"][0]["kind"] == "pool" and head["attention"][0]["resolution"] == [8, 8]


def test_table_fits_a_terminal_and_compares(anatomies):
    text = render(anatomies, "table")
    assert max(len(line) for line in text.splitlines()) <= 120
    comparison = text[text.index("\ncomparison\n") :]
    header, parameters = (next(line for line in comparison.splitlines() if word in line) for word in ("both", "param"))
    assert header.split() == ["one", "both", "column"]
    assert len(re.findall(r"[\d.]+ [kM]", parameters)) == 1 + 3 + 1  # both of them, and their sum
    assert "blocks.1 .. 7, each" in text and "total" in text
    alone = render(anatomies[:1], "table")
    assert "comparison" not in alone and "up_blocks.1" in alone


def boxes_of(svg):
    """Rectangles of texts, on the safe side, and of blocks: (left, top, right, bottom) and what it is."""
    names = {"svg": "http://www.w3.org/2000/svg"}
    texts, blocks = [], []

    def visit(element, dx, dy):
        moved = re.match(r"translate\(([-\d.]+) ([-\d.]+)\)", element.get("transform", ""))
        if moved:
            dx, dy = dx + float(moved[1]), dy + float(moved[2])
        if element.tag.endswith("}text"):
            x, y, size = (float(element.get(key)) for key in ("x", "y", "font-size"))
            width = text_width(element.text, size)
            left = x - {"start": 0, "middle": width / 2, "end": width}[element.get("text-anchor")]
            texts.append((left + dx, y + dy - 0.75 * size, left + dx + width, y + dy + 0.2 * size, element.text))
        if element.get("class") == "block":
            rectangle = element.find("svg:rect", names)
            x, y, width, height = (float(rectangle.get(key)) for key in ("x", "y", "width", "height"))
            blocks.append((x + dx, y + dy, x + dx + width, y + dy + height, element.find("svg:title", names).text))
        for child in element:
            visit(child, dx, dy)

    root = ElementTree.fromstring(svg)
    visit(root, 0, 0)
    return root, texts, blocks


def overlaps(boxes, margin):
    return [
        (a[4], b[4])
        for i, a in enumerate(boxes)
        for b in boxes[i + 1 :]
        if min(a[2], b[2]) - max(a[0], b[0]) > margin and min(a[3], b[3]) - max(a[1], b[1]) > margin
    ]


def test_drawing(anatomies):
    titles = ["<script>&\x00", 'a "title" that is longer than the drawing below it, much longer', "column"]
    svg = render([replace(anatomy, title=title) for anatomy, title in zip(anatomies, titles)], "svg")
    root, texts, blocks = boxes_of(svg)
    expected = [b for anatomy in anatomies for network in anatomy.networks for b in network.blocks if b.name]
    assert len(blocks) == len(expected)
    assert overlaps(texts, 1) == [] and overlaps(blocks, 1) == []
    width, height = float(root.get("width")), float(root.get("height"))
    assert all(0 <= box[0] and box[2] <= width and 0 <= box[1] and box[3] <= height for box in texts + blocks)
    words = [text for *_, text in texts]
    assert "16²" in words and "8²" in words and "2 h at 8²" in words and "7 blocks of" in words
    assert sum("skips" in word for word in words) == 4  # two levels of two UNets
    assert "<script>" not in svg and "&lt;script&gt;&amp;?" in svg
    background = root.find("{http://www.w3.org/2000/svg}rect")
    assert background.get("fill").startswith("#") and float(background.get("width")) == width


def test_page_is_self_contained(anatomies):
    page = render(anatomies[:2], "html")
    reader = Reader()
    reader.feed(page)
    assert reader.links == [] and "script" not in reader.tags and "@import" not in page and "url(http" not in page
    assert reader.tags.count("svg") == 1 and reader.tags.count("table") >= 6
    assert "unet &amp; &lt;co&gt;" in page


def test_command(trio, tmp_path, capsys):
    main(["inspect", trio[2], "--size", "20", "--effective", "never"])
    assert "1x1x20x20" in capsys.readouterr().out
    main(["inspect", trio[0], trio[2], "--output", str(tmp_path / "new" / "both.svg"), "--effective", "never"])
    assert capsys.readouterr().out == ""
    ElementTree.parse(tmp_path / "new" / "both.svg")
    with pytest.raises(SystemExit, match="multiples of 2"):
        main(["inspect", trio[0], "--size", "17", "--output", str(tmp_path / "new" / "both.svg")])
    ElementTree.parse(tmp_path / "new" / "both.svg")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["both.svg"]


def test_pipeline_folder_shows_its_networks(tmp_path):
    pipe = diffusers.DDPMPipeline(
        diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
        ),
        diffusers.DDPMScheduler(),
    )
    pipe.save_pretrained(tmp_path)
    assert [source.model_class for source in find_sources(str(tmp_path))] == [diffusers.UNet2DModel]
    assert find_sources(str(tmp_path / "unet"))[0].folder == tmp_path / "unet"


# Errors


@pytest.mark.parametrize(
    "model, message",
    [
        ("256x256_difusion_uncond", "Did you mean 256x256_diffusion_uncond"),
        ("composable/flim", "Did you mean composable/film"),
        ("256x256_classifier+", "between the names of two networks"),
        ("../nowhere", "no preset and no folder"),
        (".", "neither a model"),
    ],
)
def test_unknown_names(model, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        inspect_models([model])


@pytest.mark.parametrize(
    "name", ["os.system", "DiffusionPipeline", "AutoModel", "ModelMixin", "logging", None, ["a"], ""]
)
def test_config_reaches_nothing_but_models(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name, "_diffusers_version": "0.42.1"}))
    with pytest.raises(ValueError, match="no code of others is run"):
        inspect_models([str(tmp_path)])


def test_config_that_its_class_does_not_take(tmp_path):
    config = {"_class_name": "ADMUNet2DModel", "block_out_channels": "wide"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="ADMUNet2DModel does not take"):
        inspect_models([str(tmp_path)])


@pytest.mark.parametrize("text", ["[1]", "{", "\x00"])
def test_config_that_is_none(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="is not JSON|no object"):
        inspect_models([str(tmp_path)])


def test_wrong_arguments(folder):
    unet = folder("adm", ADMUNet2DModel(**UNET))
    plain = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    for models, options, message in (
        ([], {}, "`models` is empty"),
        ([unet], {"size": 9}, "multiples of 2"),
        ([folder("plain", plain)], {"size": 9}, "`size`.*UNet2DModel.*9x9"),
        ([unet], {"size": 0}, "`size` is 0"),
        ([unet], {"size": 10**9}, "at most"),
        ([unet], {"format": "pdf"}, "`format` is 'pdf'"),
        ([unet], {"titles": ["a", "b"]}, "`titles` has 2"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect_models(models, effective="never", **options)


# Full size

COUNTS = {"ddpm/celebahq-256": 113_673_219, "256x256_diffusion_uncond": 552_814_086, "256x256_classifier": 54_096_360}


def test_full_size_models_in_little_time_and_memory(tmp_path, fresh_python):
    code = f"""
import json, resource
from diffusers_ext.cli import main
main(["inspect", {", ".join(repr(name) for name in COUNTS)}, "--output", "all.json"])
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))
"""
    seconds, memory = json.loads(fresh_python(code, tmp_path).stdout.splitlines()[-1])
    data = json.loads((tmp_path / "all.json").read_text())
    assert {model["title"]: model["parameters"] for model in data["models"]} == COUNTS
    assert seconds < 20 and memory < 2e9  # all three of them, imports included
    adm = data["models"][1]["networks"][0]
    assert adm["flops"] == pytest.approx(2.13e12, rel=0.01)
    attended = {tuple(layer["resolution"]) for block in adm["blocks"] for layer in block["attention"]}
    assert attended == {(32, 32), (16, 16), (8, 8)}
