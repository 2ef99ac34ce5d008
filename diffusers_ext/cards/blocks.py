"""What the blocks of a card say: introduction, licence, usage, architecture, limits, citation."""

import ast
import functools
import inspect
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from PIL import Image

import diffusers
from diffusers.utils import logging

import diffusers_ext
from diffusers_ext.cards.citations import citations
from diffusers_ext.cards.document import dated
from diffusers_ext.cards.folder import LORA_FILE, Contents, Part


logger = logging.get_logger(__name__)
STEPS = 50  # of the snippet; fewer where the process has fewer
HERE = "."
PICTURE = "samples.png"
WEIGHTS_OF_PICTURE = "diffusers_ext weights"  # entry of the file
NO_PICTURE = "No samples have been drawn; `diffusers-ext card FOLDER --samples True` draws some."
WITHOUT_PACKAGE = (
    "Without `diffusers_ext`, by the code that lies beside the weights, which you should read before you trust it:"
)


def about(contents: Contents) -> str:
    """A sentence: what it is."""
    if contents.kind == "lora":
        adapter = contents.index
        ranks = " and ".join(map(str, adapter["ranks"]))
        return (
            f"A LoRA adapter of rank {ranks} for the `{contents.class_name}` of a pipeline: {adapter['layers']} "
            f"layers, {adapter['parameters']:,} parameters."
        )
    told = " and ".join(_told(part) for part in contents.networks.values())
    if contents.kind in ("pipeline", "modular"):
        what = _with_article(contents.class_name) + (f" with {told}" if told else "")
    elif set(contents.parts) == {"classifier"} and told:
        what = f"a classifier of noisy images, {told}"
    else:
        what = told or _with_article(contents.class_name)
    return (
        f"{what[0].upper()}{what[1:]}, for [diffusers](https://github.com/huggingface/diffusers) with `diffusers_ext`."
    )


def _told(part: Part) -> str:
    return f"{_with_article(part.class_name)} of {part.stored.parameters:,} parameters"


def _with_article(class_name: str) -> str:
    """`UNet` and `Unified...` are spoken with a "you" at the beginning."""
    article = "an" if re.match(r"[AEIO]|U(?![A-Z]|ni)", class_name) else "a"
    return f"{article} `{class_name}`"


def licence(name: Any) -> str:
    """What may be done with the weights, as far as somebody said."""
    if not name:
        return (
            "> **No licence of the weights is stated**, so nobody but their owner may use or share them. Whoever owns "
            "them chooses one with `diffusers-ext card FOLDER --license NAME`, such as `apache-2.0`."
        )
    names = name if isinstance(name, list) else [name]
    told = ", ".join(f"`{entry}`" for entry in names)
    note = " It forbids commercial use." if any("-nc" in str(entry) for entry in names) else ""
    return f"Licence of the weights: {told}.{note} The code of `diffusers_ext` has one of its own, Apache-2.0."


# Usage


def usage(contents: Contents, name: str, call: str | None = None, base_model: str | None = None) -> str:
    """Snippets that load and run what the folder holds.

    Args:
        contents: of the folder.
        name: repository, or ".".
        call: arguments of the pipeline's call, as Python; None chooses some.
        base_model: pipeline that an adapter belongs to.
    """
    where = "  # this folder, or the name of its repository" if name == HERE else ""
    variant = f', variant="{contents.variant}"' if contents.variant else ""
    if contents.kind == "lora":
        return _fenced(_lora_lines(contents, name, where, call or f"num_inference_steps={STEPS}", base_model))
    if contents.kind in ("model", "component"):
        return _model_usage(contents, name, where, variant)
    if contents.kind == "modular":
        lines = ["pipe.load_components()", *_call_lines(contents, call, 'output="images"')]
        if not contents.self_contained:
            head = ["import diffusers_ext", "from diffusers import ModularPipeline", ""]
            return _fenced([*head, f'pipe = ModularPipeline.from_pretrained("{name}"){where}', *lines])
        own = ["import diffusers_ext", ""]
        own.append(f'pipe = diffusers_ext.{contents.class_name}().init_pipeline("{name}"){where}')
        foreign = ["from diffusers import ModularPipeline", ""]
        foreign.append(f'pipe = ModularPipeline.from_pretrained("{name}", trust_remote_code=True){where}')
        foreign += ["pipe.load_components(trust_remote_code=True)", *lines[1:]]
        return f"{_fenced([*own, *lines])}\n\n{WITHOUT_PACKAGE}\n\n{_fenced(foreign)}"
    lines = _call_lines(contents, call)
    if not contents.self_contained:
        head = ["import diffusers_ext", "from diffusers import DiffusionPipeline", ""]
        return _fenced([*head, f'pipe = DiffusionPipeline.from_pretrained("{name}"{variant}){where}', *lines])
    if is_ours(contents.class_name):
        load = f'pipe = diffusers_ext.{contents.class_name}.from_pretrained("{name}"{variant}){where}'
        own = ["import diffusers_ext", "", load]
    else:
        own = _assembled(contents, name, variant, where)
    foreign = ["from diffusers import DiffusionPipeline", ""]
    foreign.append(f'pipe = DiffusionPipeline.from_pretrained("{name}"{variant}, trust_remote_code=True){where}')
    return f"{_fenced([*own, *lines])}\n\n{WITHOUT_PACKAGE}\n\n{_fenced([*foreign, *lines])}"


def _assembled(contents: Contents, name: str, variant: str, where: str) -> list[str]:
    """A pipeline of diffusers put together from its parts, since it would run their code if it loaded them."""
    theirs = {contents.class_name, *(part.class_name for part in contents.parts.values())} - {*diffusers_ext.__all__}
    lines = ["import diffusers_ext"]
    for library in ("diffusers", "transformers"):
        names = sorted(name for name in theirs if hasattr(diffusers, name) is (library == "diffusers"))
        lines += [f"from {library} import {', '.join(names)}"] if names else []
    lines.append("")
    for part in contents.parts.values():
        found = f"diffusers_ext.{part.class_name}" if is_ours(part.class_name) else part.class_name
        of_weights = variant if part.weights else ""
        lines.append(f'{part.name} = {found}.from_pretrained("{name}", subfolder="{part.name}"{of_weights}){where}')
        where = ""
    return [*lines, f"pipe = {contents.class_name}({', '.join(f'{part}={part}' for part in contents.parts)})"]


def _call_lines(contents: Contents, call: str | None, more: str = "") -> list[str]:
    lines = []
    call = call or default_call(contents)
    needed = [word for word in _needed(contents) if f"{word}=" not in call]
    if needed:
        given = ", ".join([*(f"{word}={word}" for word in needed), call])
        return [f"# images = pipe({given}).images  # {' and '.join(needed)}: yours"]
    if "low_res=low_res" in call:
        lines += ["", "from PIL import Image", "", 'low_res = Image.open("small.png")']
    if _draws_latents(contents) and not more:
        return [*lines, f'latents = pipe({call}, output_type="latent").images']
    if more:
        return [*lines, f"images = pipe({call}, {more})", 'images[0].save("sample.png")']
    return [*lines, f"images = pipe({call}).images", 'images[0].save("sample.png")']


def _draws_latents(contents: Contents) -> bool:
    if contents.denoiser is None or "vae" in contents.parts:
        return False
    config = contents.denoiser.config
    return config.get("in_channels", 3) - (config.get("low_res_channels") or 0) not in (1, 3)


def default_call(contents: Contents) -> str:
    """Arguments of a first call of the pipeline."""
    denoiser, arguments = contents.denoiser, []
    if contents.reads_text:
        arguments.append('prompt="..."')
    if num_classes(contents):
        arguments.append("class_labels=[0]")
    if contents.class_name == "DiTPipeline" and not is_guided(contents):
        arguments.append("guidance_scale=1.0")  # of itself it would guide
    elif num_classes(contents) and is_guided(contents):
        arguments.append("guidance_scale=2.0")
    if denoiser and denoiser.config.get("low_res_channels"):
        arguments.append("low_res=low_res")
    if not arguments and "batch_size" in _parameters(contents, ["batch_size"]):
        arguments.append("batch_size=4")
    if denoiser and "sample_size" in denoiser.config and denoiser.config["sample_size"] is None:
        arguments += ["height=64", "width=64"] if "height" in _parameters(contents, ["height"]) else []
    scheduler = contents.parts.get("scheduler")
    known = scheduler.config.get("num_train_timesteps") if scheduler else None
    return ", ".join([*arguments, f"num_inference_steps={min(STEPS, known or STEPS)}"])


def is_guided(contents: Contents) -> bool:
    """Whether the call has a scale of guidance, and there is something to guide with."""
    parts, denoiser = contents.parts, contents.denoiser
    if "guider" in parts or "guidance_scale" not in _parameters(contents, ["guidance_scale"]):
        return False  # a guider has a scale of its own
    if contents.class_name.startswith("ClassifierGuid"):
        return "classifier" in parts
    if contents.class_name == "DiTPipeline" and num_classes(contents) != 1000:
        return False  # it says 1000 for no class, whatever the network
    has_null = denoiser is not None and (
        denoiser.config.get("null_class") or denoiser.class_name == "DiTTransformer2DModel"
    )
    return bool(has_null) or "guide_model" in parts or contents.index.get("null_class_label") is not None


def num_classes(contents: Contents) -> int | None:
    """Classes that images can be asked of."""
    if "class_labels" not in _parameters(contents, ["class_labels"]):
        return None
    parts = [contents.parts[name] for name in ("classifier", "unet", "transformer") if name in contents.parts]
    for part in parts:
        for word in ("num_classes", "num_class_embeds", "num_embeds_ada_norm"):
            if part.config.get(word):
                return part.config[word]
    return None


def _parameters(contents: Contents, otherwise: Collection[str]) -> Collection[str]:
    """What the call of a pipeline takes; `otherwise` where its class is not known."""
    found = getattr(diffusers, contents.class_name, None)
    if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
        return otherwise
    return inspect.signature(found.__call__).parameters


def _needed(contents: Contents) -> list[str]:
    """Inputs that the call of a pipeline of diffusers cannot do without, such as an image to paint over."""
    parameters = _parameters(contents, {})
    told = ("self", "class_labels", "prompt")
    return [
        name
        for name in parameters
        if name not in told
        and parameters[name].default is inspect.Parameter.empty
        and parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]


def kept_call(text: str, contents: Contents) -> str | None:
    """Arguments that a snippet calls the pipeline with, where they still fit what the folder holds."""
    found = re.search(r"^\w+ = (pipe\(.*\))(?:\.images)?$", text, re.MULTILINE)
    if found is None:
        return None
    try:
        call = ast.parse(found[1], mode="eval").body
    except SyntaxError:
        return None
    if not isinstance(call, ast.Call) or call.args:
        return None
    given = {word.arg: ast.get_source_segment(found[1], word.value) for word in call.keywords}
    given = {word: value for word, value in given.items() if word not in ("output", "output_type")}
    arguments = ", ".join(f"{word}={value}" for word, value in given.items())
    if contents.kind == "lora":  # what its pipeline takes is not known here
        return arguments
    known = _parameters(contents, given)
    if "guidance_scale" in given and "guider" in contents.parts:
        return None
    inputs = {"prompt", "class_labels", "low_res"}
    needed = {word.partition("=")[0] for word in default_call(contents).split(", ")}
    if None in given or not given.keys() <= {*known} or given.keys() & inputs != needed & inputs:
        return None
    return arguments


def _model_usage(contents: Contents, name: str, where: str, variant: str) -> str:
    part = next(iter(contents.parts.values()))
    subfolder = f', subfolder="{part.name}"' if contents.kind == "component" else ""
    run = _forward_lines(part)

    if contents.self_contained:  # `AutoModel` wants to run its code
        head = ["import diffusers_ext", *(["import torch"] if run else []), ""]
        load = f'{part.name} = diffusers_ext.{part.class_name}.from_pretrained("{name}"{variant}){where}'
        foreign = [*head[1:-1], "from diffusers import AutoModel", ""]
        foreign += [f'{part.name} = AutoModel.from_pretrained("{name}"{variant}, trust_remote_code=True){where}', *run]
        return f"{_fenced([*head, load, *run])}\n\n{WITHOUT_PACKAGE}\n\n{_fenced(foreign)}"
    head = ["import diffusers_ext", *(["import torch"] if run else []), "from diffusers import AutoModel", ""]
    return _fenced([*head, f'{part.name} = AutoModel.from_pretrained("{name}"{subfolder}{variant}){where}', *run])


def _forward_lines(part: Part) -> list[str]:
    """A forward pass on noise."""
    config = part.config
    channels, size = config.get("in_channels"), config.get("sample_size")
    if part.name == "vae" or not isinstance(channels, int) or not isinstance(size, int):
        return []
    shape = f"torch.randn(1, {channels - (config.get('low_res_channels') or 0)}, {size}, {size})"
    noisy = f"noisy = {shape}  # an image in [-1, 1] with the noise of its timestep"
    if part.name == "classifier":
        return [noisy, "logits = classifier(noisy, torch.tensor([500])).logits"]
    more = ""
    if config.get("num_class_embeds") or config.get("num_embeds_ada_norm"):
        more += ", class_labels=torch.tensor([0])"
    if config.get("low_res_channels"):
        more += f", low_res=torch.randn(1, {config['low_res_channels']}, {size}, {size})"
    if config.get("cross_attention_dim") and "DiT" not in part.class_name:
        more += f", encoder_hidden_states=torch.randn(1, 8, {config['cross_attention_dim']})"
    return [noisy, f"prediction = {part.name}(noisy, torch.tensor([500]){more}).sample"]


def _lora_lines(contents: Contents, name: str, where: str, call: str, base_model: str | None) -> list[str]:
    network = contents.class_name
    prefix = contents.index["prefix"]
    lines = ["import diffusers_ext", "from diffusers import DiffusionPipeline", ""]
    lines.append(f'pipe = DiffusionPipeline.from_pretrained("{base_model or "BASE_MODEL"}")')
    lines.append(
        f'pipe.{network}.load_lora_adapter("{name}", prefix={json.dumps(prefix) if prefix else None}, '
        f'weight_name="{LORA_FILE}"){where}'
    )
    return [*lines, f"images = pipe({call}).images", 'images[0].save("sample.png")']


def _fenced(lines: list[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


# Architecture


def architecture(contents: Contents) -> str | None:
    """A table of the networks, as `inspect` finds them, and the process; None where there are no networks."""
    parts = [part for part in contents.networks.values() if _is_model(part)]
    columns = [_facts(contents, part) for part in parts]
    sections = []
    if columns:
        names = list(dict.fromkeys(name for column in columns for name in column))
        rows = [["", *(part.name for part in parts)], ["---"] * (len(parts) + 1)]
        rows += [[name, *(column.get(name, "–") for column in columns)] for name in names]
        sections.append("\n".join("| " + " | ".join(row) + " |" for row in rows).replace("|  |", "| |"))
    others = [part for part in contents.networks.values() if not _is_model(part)]
    if others:
        sections.append("Beside them: " + ", ".join(f"`{part.class_name}` ({part.name})" for part in others) + ".")
    process = _process(contents)
    if process:
        sections.append(process)
    labels = contents.index.get("id2label")
    if isinstance(labels, dict) and labels:
        names = [_inline(label) for label in labels.values()]
        shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        sections.append(f"Classes: {len(names)} ({shown}).")
    if columns:
        sections.append(
            "FLOPs: one image through the network once, a multiply-add counts 2. Weights are loaded as float32 unless "
            "another dtype is asked for."
        )
    return "\n\n".join(sections) or None


def is_ours(class_name: str) -> bool:
    """Whether it is a public class of this package."""
    return class_name in diffusers_ext.__all__


def is_our_network(name: Any) -> bool:
    """Whether it is the name of a network of this package."""
    found = getattr(diffusers_ext, name) if isinstance(name, str) and is_ours(name) else None
    return isinstance(found, type) and issubclass(found, diffusers.ModelMixin)


def _is_model(part: Part) -> bool:
    """Whether it is a network of diffusers or of this package."""
    found = getattr(diffusers, part.class_name, None)
    return isinstance(found, type) and issubclass(found, diffusers.ModelMixin) and "_class_name" in part.config


def _facts(contents: Contents, part: Part) -> dict[str, str]:
    stored = [
        f"{weights.dtype}, {_bytes(weights.size)}" + (f' (variant "{variant}")' if variant else "")
        for variant, weights in sorted(part.weights.items())
    ]
    facts = {"class": f"`{part.class_name}`", "parameters": f"{part.stored.parameters:,}"}
    options = json.dumps({key: value for key, value in part.config.items() if key != "_name_or_path"}, sort_keys=True)
    facts |= dict(_inspected(part.class_name, options, part.stored.dtype))
    return facts | {"weights as stored": "; ".join(stored)}


@functools.lru_cache(maxsize=64)
def _inspected(class_name: str, options: str, dtype: str) -> tuple[tuple[str, str], ...]:
    """Facts that a pass on the meta device shows; none for a network that cannot be run there."""
    from diffusers_ext.inspection.passes import DTYPES, inspect_source
    from diffusers_ext.inspection.report import field
    from diffusers_ext.inspection.sources import Source
    from diffusers_ext.inspection.words import count, size

    source = Source(class_name, getattr(diffusers, class_name), json.loads(options))
    try:
        network = inspect_source(
            source, dtype=dtype if dtype in DTYPES else "float32", effective="never", memory=False
        )
    except Exception as error:  # of any network that was handed to a pipeline; the card does without
        logger.warning("The card does not say more about %s, which could not be inspected: %s", class_name, error)
        return ()
    return (
        ("input", size(network.input_shape[1:])),
        ("output", size(network.output_shape[1:])),
        ("FLOPs", count(network.flops)),
        ("receptive field", field(network)),
        ("attention at", _attention(network)),
    )


def _attention(network: Any) -> str:
    from diffusers_ext.inspection.words import attention

    layers = [layer for block in network.blocks for layer in block.attention]
    return attention(layers) or "none"


def _process(contents: Contents) -> str | None:
    scheduler = contents.parts.get("scheduler")
    if scheduler is None:
        return None
    config = scheduler.config
    told = [f"{config['num_train_timesteps']} timesteps"] if config.get("num_train_timesteps") else []
    told += [f"`{_inline(config['beta_schedule'])}` betas"] if config.get("beta_schedule") else []
    told += [f"the network predicts `{_inline(config['prediction_type'])}`"] if config.get("prediction_type") else []
    told += [f"variance `{_inline(config['variance_type'])}`"] if config.get("variance_type") else []
    return f"Process: `{scheduler.class_name}`" + (f", {', '.join(told)}." if told else ".")


def _inline(value: Any) -> str:
    """Text of a config within a line, where it ends neither the line nor the block."""
    text = re.sub(r"\s+", " ", str(value)).replace("`", "'")
    return text.replace("<!--", "&lt;!--").replace("-->", "--&gt;")


def _bytes(number: int) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number} B"


# The rest


def limits(evaluated: bool, draws: bool = True) -> str:
    """What the card cannot vouch for."""
    if evaluated:
        judged = (
            "The results above say what was measured, on the data and with the settings that they name, and no more."
        )
    elif not draws:
        judged = "Accuracy on the held-out images of its data says little about images of another kind."
    else:
        judged = (
            "Nobody has judged the images yet: this card was filled from the files. `diffusers-ext evaluate` adds "
            "measured results."
        )
    return f"{judged} The model knows its training data only, with their biases."


def citation(contents: Contents) -> str | None:
    """BibTeX of what the model is made of."""
    entries = citations(contents)
    return "```bibtex\n" + "\n\n".join(entries) + "\n```" if entries else None


def picture(contents: Contents) -> str | None:
    """The samples that the folder shows: those drawn for the card, or the last of its training."""
    if (contents.folder / PICTURE).is_file():
        return dated(f"![Samples]({PICTURE})", drawn_with(contents.folder), contents.digest)
    pictures = sorted((contents.folder / "samples").glob("*.png"))
    return f"![Samples at the end of the training](samples/{pictures[-1].name})" if pictures else None


def drawn_with(folder: Path) -> str | None:
    """Digest of the weights that the picture of a folder was drawn with; None where it is not one of ours."""
    try:
        with Image.open(folder / PICTURE) as image:
            digest = str(image.info.get(WEIGHTS_OF_PICTURE))
    except (OSError, ValueError, SyntaxError):  # none, or no picture
        return None
    return digest if re.fullmatch("[0-9a-f]+", digest) else None
