"""What a person chooses: the settings of a comparison, their bounds, as JSON and as a link, and the presets.

Everything here is checked without a model: a comparison that exists is small enough to be drawn and to be sent. What
fits a model is checked by `plan.plan`. All of it may come from strangers, by the API or a link, so sizes are bounded
before anything is looped over, and messages repeat little of what they refuse.
"""

import base64
import json
import os
import re
import unicodedata
from dataclasses import dataclass, fields, replace


ENVIRONMENT = "DIFFUSERS_EXT_DEMO_"  # what names of environment variables begin with
MIN_COLUMNS, MAX_COLUMNS = 1, 4
MAX_IMAGES = 12
MAX_STEPS = 250
MAX_SCALE = 20.0
MAX_SEED = 2**31 - 1
MAX_PROMPT = 1000  # characters
MAX_NAME = 200  # characters of a model's or a class's name
MAX_LABELS = MAX_IMAGES  # further ones would stand on no image
MAX_SIZE = 1024  # pixels
SIZE_UNIT = 8  # pixels
MAX_LINK = 6000  # characters of the query; browsers and proxies bear this much
MAX_ENLARGEMENT = 4  # times the model's own size, per side

LETTERS = "ABCD"  # names of the columns
DTYPES = ("float32", "bfloat16", "float16")
GUIDANCE = (
    "none",
    "classifier",  # by a classifier's gradient
    "classifier-mean",  # the same, moving each step's mean
    "classifier-free",  # away from the prediction without a class or prompt
    "autoguidance",  # away from a weaker model
    "adaptive-projected",  # away from the unconditional prediction, without oversaturation
    "embedded",  # a scale that the network was told in training
)

# Invisible, and yet part of what is written: ends of lines, tabs, joiners in Persian, Hindi and emoji.
_WRITTEN = "\n\t\u200c\u200d"
_SHOWN = 40  # characters of a refused value in a message


def operators_number(name: str, default: int) -> int:
    """What the operator has set by the environment variable of this name, behind `ENVIRONMENT`.

    Raises:
        ValueError: when it holds something else than a whole number of at least 1.
    """
    text = os.environ.get(f"{ENVIRONMENT}{name}") or str(default)
    if not re.fullmatch("[0-9]{1,18}", text) or int(text) < 1:
        raise ValueError(f"`{ENVIRONMENT}{name}` is {text!r}; it must be a whole number of at least 1.")
    return int(text)


def max_work() -> int:
    """Most images times steps of a comparison."""
    return operators_number("MAX_WORK", MAX_IMAGES * MAX_COLUMNS * MAX_STEPS)


MAX_WORK = max_work()


class SettingsError(ValueError):
    """What a visitor can mend. Its text is shown as it is."""


@dataclass(frozen=True)
class Column:
    """One column: a model and how it draws. Names are those of diffusers.

    Args:
        model: name in the catalog, a folder that the operator allows, or a Hub id.
        scheduler: class name in diffusers. None: the model's default.
        num_inference_steps: steps of the scheduler, 1 to `MAX_STEPS`.
        guidance: a kind, one of `GUIDANCE`.
        guidance_scale: 0 to `MAX_SCALE`; 1 is no guidance for the kinds without a classifier, 0 for those with one.
        guidance_interval: guided part of the steps, as fractions from the noise (0) to the image (1).
        eta: noise of DDIM and its like, 0 to 1.
        dtype: of the networks.

    Raises:
        SettingsError: for a value of another type or out of bounds.
    """

    model: str = "film-mnist"
    scheduler: str | None = None
    num_inference_steps: int = 20
    guidance: str = "none"
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    eta: float = 0.0
    dtype: str = "float32"

    def __post_init__(self):
        _check_name("model", self.model)
        if ".." in re.split(r"[/\\]", self.model):
            raise SettingsError(f"`model` is {shown(self.model)}; `..` may not be part of it. Choose one of the list.")
        if self.scheduler is not None:
            _check_name("scheduler", self.scheduler)
            if not (self.scheduler.isascii() and self.scheduler.isidentifier()):
                raise SettingsError(
                    f"`scheduler` is {shown(self.scheduler)}; it must be the name of a class of diffusers, such as "
                    "DDIMScheduler."
                )
        _check_integer("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        _check_choice("guidance", self.guidance, GUIDANCE)
        _check_number("guidance_scale", self.guidance_scale, 0, MAX_SCALE)
        interval = self.guidance_interval
        if not isinstance(interval, tuple) or len(interval) != 2:
            raise SettingsError(
                f"`guidance_interval` is {shown(interval)}; it must be two numbers, the start and the end of the "
                "guided part of the steps."
            )
        for end in interval:
            _check_number("guidance_interval", end, 0, 1)
        if interval[0] > interval[1]:
            raise SettingsError(
                f"`guidance_interval` goes from {interval[0]} to {interval[1]}; the start may not lie after the end."
            )
        _check_number("eta", self.eta, 0, 1)
        _check_choice("dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class Comparison:
    """Columns that draw the same classes from the same noise.

    Args:
        columns: `MIN_COLUMNS` to `MAX_COLUMNS` of them.
        class_labels: names of classes, or their ids as text; image i has `class_labels[i % len(class_labels)]`.
            Empty: any class.
        num_images: per column, 1 to `MAX_IMAGES`.
        seed: image i starts from the noise of `seed + i`; 0 to `MAX_SEED`.
        prompt, negative_prompt: for models that take text; up to `MAX_PROMPT` characters each.
        height, width: pixels, multiples of 8 up to `MAX_SIZE`, both or neither. None: the model's own.

    Raises:
        SettingsError: for a value of another type or out of bounds, for more than `MAX_WORK` images times steps over
            all columns, and for texts that are too long for a link.
    """

    columns: tuple[Column, ...]
    class_labels: tuple[str, ...] = ()
    num_images: int = 4
    seed: int = 0
    prompt: str = ""
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None

    def __post_init__(self):
        columns = self.columns
        if not isinstance(columns, tuple) or not MIN_COLUMNS <= len(columns) <= MAX_COLUMNS:
            raise SettingsError(
                f"`columns` is {shown(columns)}; it must be a list of {MIN_COLUMNS} to {MAX_COLUMNS} columns."
            )
        if not all(isinstance(column, Column) for column in columns):
            raise SettingsError("`columns` holds something else than columns, which are JSON objects with a `model`.")
        labels = self.class_labels
        if not isinstance(labels, tuple) or len(labels) > MAX_LABELS:
            raise SettingsError(
                f"`class_labels` is {shown(labels)}; it must be a list of at most {MAX_LABELS} names of classes."
            )
        for label in labels:
            _check_name("class_labels", label)
        _check_integer("num_images", self.num_images, 1, MAX_IMAGES)
        _check_integer("seed", self.seed, 0, MAX_SEED)
        for name in ("prompt", "negative_prompt"):
            _check_text(name, getattr(self, name), MAX_PROMPT)
        if (self.height is None) != (self.width is None):
            raise SettingsError("Only one of `height` and `width` is given; give both, or neither.")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None:
                _check_integer(name, value, SIZE_UNIT, MAX_SIZE)
                if value % SIZE_UNIT:
                    raise SettingsError(f"`{name}` is {value}; it must be a multiple of {SIZE_UNIT} pixels.")
        check_work(self.num_images, sum(column.num_inference_steps for column in columns), "columns")
        length = len(to_link(self))
        if length > MAX_LINK:
            raise SettingsError(
                f"The texts are too long for a link: {length} characters, and at most {MAX_LINK} fit. Shorten the "
                "prompts."
            )

    @classmethod
    def from_json(cls, data: object) -> "Comparison":
        """The comparison of parsed JSON, as `to_json` writes it; keys that are missing have their defaults.

        Raises:
            SettingsError: for unknown keys, and as above.
        """
        data = _known_keys("settings", data, cls)
        columns = data.get("columns")
        if isinstance(columns, list) and len(columns) <= MAX_COLUMNS:
            columns = tuple(_column(letter, column) for letter, column in zip(LETTERS, columns, strict=False))
        labels = data.get("class_labels", [])
        return cls(**{**data, "columns": columns, "class_labels": _tuple(labels, MAX_LABELS)})

    def to_json(self) -> dict:
        """Plain dicts, lists, text and numbers, complete."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        data["columns"] = [
            {field.name: getattr(column, field.name) for field in fields(column)} for column in self.columns
        ]
        for column in data["columns"]:
            column["guidance_interval"] = list(column["guidance_interval"])
        data["class_labels"] = list(self.class_labels)
        return data


def check_work(num_images: int, steps: int, fewer: str) -> None:
    """Raises a SettingsError for more than `MAX_WORK` images times steps.

    Args:
        num_images: drawn in every step.
        steps: in all.
        fewer: what there may be fewer of, besides images and steps.
    """
    work = num_images * steps
    if work > MAX_WORK:
        raise SettingsError(
            f"{num_images} images in all these steps are {work} image steps; at most {MAX_WORK} are drawn at once "
            f"here. Choose fewer images, steps or {fewer}."
        )


def to_link(comparison: Comparison) -> str:
    """The query of an address, `?s=...`, that restores the comparison: base64 of its JSON without defaults."""
    data = _without_defaults(comparison)
    data["columns"] = [_without_defaults(column) for column in comparison.columns]
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return "?s=" + base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def from_link(text: str) -> Comparison:
    """The comparison of a link: of a whole address, its query, or the bare value of `s`."""
    if not isinstance(text, str) or len(text) > MAX_LINK + 2000:
        raise SettingsError(f"This link is {shown(text)}; links of this page have at most {MAX_LINK} characters.")
    value = text.strip()
    if "?" in value or value.startswith("s="):
        parameters = (value.partition("?")[2] or value).partition("#")[0].split("&")
        value = next((parameter[2:] for parameter in parameters if parameter.startswith("s=")), "")
    if not re.fullmatch(r"[A-Za-z0-9_-]+={0,2}", value):
        raise SettingsError("This is no link of this page: it holds no settings, or was cut or changed on its way.")
    try:
        data = json.loads(base64.urlsafe_b64decode(value.rstrip("=") + "==").decode())
    except (ValueError, RecursionError) as error:
        raise SettingsError("The settings in this link cannot be read: it was cut or changed on its way.") from error
    return Comparison.from_json(data)


def _without_defaults(settings: Column | Comparison) -> dict:
    values = {field.name: (getattr(settings, field.name), field.default) for field in fields(settings)}
    return {name: value for name, (value, default) in values.items() if value != default}


def _column(letter: str, data: object) -> Column:
    try:
        data = _known_keys("a column", data, Column)
        if "guidance_interval" in data:
            data = {**data, "guidance_interval": _tuple(data["guidance_interval"], 2)}
        return Column(**data)
    except SettingsError as error:
        raise SettingsError(f"Column {letter}: {error}") from error


def _known_keys(what: str, data: object, cls: type) -> dict:
    names = [field.name for field in fields(cls)]
    if not isinstance(data, dict):
        raise SettingsError(f"{what} is {shown(data)}; it must be a JSON object with {', '.join(names)}.")
    if len(data) > len(names) or not all(key in names for key in data):
        unknown = next(key for key in data if key not in names)
        raise SettingsError(f"{shown(unknown)} is no setting; {what} has {', '.join(names)}.")
    return data


def _tuple(value: object, limit: int) -> object:
    """A short list as a tuple; anything else stays, and is refused where the value is checked."""
    return tuple(value) if isinstance(value, list) and len(value) <= limit else value


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise SettingsError(f"`{name}` is {shown(value)}; it must be a whole number from {low} to {high}.")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise SettingsError(f"`{name}` is {shown(value)}; it must be a number from {low:g} to {high:g}.")


def _check_choice(name: str, value: object, choices) -> None:
    if not isinstance(value, str) or value not in choices:
        raise SettingsError(f"`{name}` is {shown(value)}; it must be one of {', '.join(choices)}.")


def _check_text(name: str, value: object, limit: int) -> None:
    if not isinstance(value, str) or len(value) > limit:
        raise SettingsError(f"`{name}` is {shown(value)}; it must be text of at most {limit} characters.")
    for character in value:
        # Control and format characters, such as those that turn the direction of writing, halves of surrogate pairs.
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _WRITTEN:
            raise SettingsError(
                f"`{name}` holds the invisible character U+{ord(character):04X}; only what can be read is taken."
            )


def _check_name(name: str, value: object) -> None:
    _check_text(name, value, MAX_NAME)
    if not value.strip() or value != value.strip() or set(value) & {"\n", "\t"}:
        raise SettingsError(f"`{name}` holds {shown(value)}; a name is one line, without space around it.")


def shown(value: object) -> str:
    """A value from outside for a message: short, and without anything invisible."""
    if value is None:
        return "missing"
    if isinstance(value, str):
        text = ascii(value[:_SHOWN])[: _SHOWN + 2]
        return text if len(value) <= _SHOWN else f"{text}... ({len(value)} characters)"
    if isinstance(value, bool) or (isinstance(value, int) and abs(value) < 10**18) or isinstance(value, float):
        return repr(value)
    if isinstance(value, int):
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, list | tuple | dict):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _preset(first: Column, second: Column, num_images: int = 8) -> Comparison:
    labels = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
    return Comparison(columns=(first, second), class_labels=labels[:num_images], num_images=num_images)


_UNET = Column(model="film-mnist", guidance="classifier-free", guidance_scale=2.0)
_CLASSIFIER = Column(model="adm-mnist", guidance="classifier", guidance_scale=6.0)

# All at the first seed, not at one that looks best.
PRESETS: dict[str, Comparison] = {
    # A network that has never seen a label draws any digit; the classifier alone makes it the wanted one.
    "Guidance off against on": _preset(replace(_CLASSIFIER, guidance="none"), _CLASSIFIER),
    "DDPM 250 against DPM-Solver++ 20": _preset(
        replace(_UNET, scheduler="DDPMScheduler", num_inference_steps=250),
        replace(_UNET, scheduler="DPMSolverMultistepScheduler"),
        num_images=4,
    ),
    "UNet against DiT": _preset(_UNET, replace(_UNET, model="dit-gqa-mnist")),
    "Classifier against classifier-free": _preset(_CLASSIFIER, _UNET),
}
