"""Open a dataset and find its columns: scikit-learn's digits, files and folders, or the Hub, by `datasets`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    import datasets

# Rows up to which all captions are checked when the dataset is opened, instead of with their batch.
CHECKED_CAPTIONS = 100_000


@dataclass(frozen=True)
class Source:
    """A split whose images are not decoded, and what is known of its columns."""

    table: "datasets.Dataset | datasets.IterableDataset"
    image_column: str
    label_column: str | None
    caption_column: str | None
    num_classes: int | None
    class_names: list[str] | None
    labels: np.ndarray | None
    """int64 `(N,)` of a dataset that is not streamed"""
    first: dict[str, Any]
    """row 0, its image as `datasets.Image(decode=False)` gives it"""

    def encoded_bytes(self) -> int:
        """Bytes of all images as they are stored; missing files count as nothing. Not for streams."""
        import pyarrow.compute as pc

        stored = self.table.select_columns(self.image_column).with_format("arrow")[:][self.image_column]
        inside = pc.sum(pc.binary_length(pc.struct_field(stored, "bytes"))).as_py() or 0
        paths = stored.filter(pc.is_null(pc.struct_field(stored, "bytes")))
        files = (Path(path) for path in pc.struct_field(paths, "path").to_pylist() if path is not None)
        return inside + sum(path.stat().st_size for path in files if path.is_file())


def open_source(
    dataset: str,
    split: str,
    *,
    config_name: str | None = None,
    streaming: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    need_labels: bool = False,
    need_captions: bool = False,
    num_classes: int | None = None,
    split_option: str = "dataset_split",
) -> Source:
    """Open one split of a dataset.

    Args:
        dataset: `digits`, a `.parquet` or `.arrow` file, a local folder (parquet, images in class folders or with a
            `metadata.csv`, or what `save_to_disk` wrote) or a Hub name.
        split: its name; of `digits`, the last 297 rows are `test`. A single file has the split `train`.
        config_name: configuration of a dataset that has several.
        streaming: read rows as they come, without a copy on disk.
        image_column, label_column, caption_column: None finds the only column of type `Image`, of type `ClassLabel`,
            and, with `need_captions`, of type string.
        need_labels, need_captions: fail where there are none. Labels that nobody needs or asks for are left out
            where they are not valid, and of a stream always.
        num_classes: labels must lie below it; None: classes of the dataset, or the largest integer label plus one.
        split_option: the option that `split` comes from, for error messages.

    Raises:
        ValueError: when the dataset, the split or a column does not exist, the split is empty, or a label or caption
            is not valid; the last two name the row.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError('Images are read with `datasets`: pip install "diffusers_ext[train]".') from error

    table = _open(dataset, split, split_option, config_name, streaming)
    features = table.features
    if features is None:
        table = table._resolve_features()  # of files that do not state their types: read from the first rows
        features = table.features
    image_column = _find_column(features, "image_column", image_column, _is_image, "Image", required=True)
    wanted = need_labels or label_column is not None
    if wanted or not streaming:
        label_column = _find_column(features, "label_column", label_column, _is_class_label, "ClassLabel", need_labels)
    if need_captions or caption_column is not None:
        caption_column = _find_column(features, "caption_column", caption_column, _is_text, "string", required=True)
    table = table.select_columns([c for c in (image_column, label_column, caption_column) if c is not None])
    try:
        table = table.cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`image_column` ({image_column!r}) holds {features[image_column]}, which is no image: {error}"
        ) from error
    first = next(iter(table), None)
    if first is None:
        raise ValueError(_empty(dataset, split, split_option))
    class_names = labels = None
    if label_column is None:
        num_classes = None
    elif _is_class_label(feature := features[label_column]):
        num_classes, class_names = num_classes or feature.num_classes, feature.names
    elif "int" not in getattr(feature, "dtype", ""):
        raise ValueError(
            f"`label_column` ({label_column!r}) holds {feature}; it must hold integers or the type ClassLabel, which "
            "`Dataset.class_encode_column` makes of text."
        )
    elif streaming and num_classes is None:
        raise ValueError(
            f"`label_column` ({label_column!r}) holds {feature}: of streamed integers the number of classes is not "
            "known. Give the column the type ClassLabel, or set `streaming=False`."
        )
    if label_column is not None and not streaming:
        try:
            labels, num_classes = _read_labels(table, label_column, num_classes)
        except ValueError:
            if wanted:
                raise
            table, label_column, num_classes, class_names = table.remove_columns(label_column), None, None, None
    if caption_column is not None and not streaming and len(table) <= CHECKED_CAPTIONS:
        for row, caption in enumerate(table[caption_column]):
            choose_caption(caption, 0.0, caption_column, row)
    return Source(table, image_column, label_column, caption_column, num_classes, class_names, labels, first)


def check_label(label: int | None, num_classes: int, column: str, row: int | str) -> int:
    """The class id of a row.

    Raises:
        ValueError: names the row of a label that is missing or outside `[0, num_classes)`.
    """
    if label is None:
        raise ValueError(f"The label of row {row} (`label_column` {column!r}) is missing. Remove or label such rows.")
    if not 0 <= label < num_classes:
        raise ValueError(
            f"The label of row {row} ({label}) is out of range: the dataset has {num_classes} classes, so labels lie "
            f"in [0, {num_classes - 1}]. Remove or relabel such rows."
        )
    return int(label)


def choose_caption(caption: str | list[str] | None, random: float, column: str, row: int | str) -> str:
    """The caption of a row, or one of its captions, chosen by a number in [0, 1).

    Raises:
        ValueError: names the row whose caption is neither a text nor a list of texts.
    """
    several = caption if isinstance(caption, list) else [caption]
    if not several or not all(isinstance(text, str) for text in several):
        raise ValueError(
            f"The caption of row {row} (`caption_column` {column!r}) is {caption!r}; it must be a text or a list of "
            "texts. Remove such rows, or give them an empty text."
        )
    return several[int(random * len(several))]


def _open(name: str, split: str, split_option: str, config_name: str | None, streaming: bool) -> Any:
    import datasets

    if name == "digits":
        table = _sklearn_digits(split, split_option)
        return table.to_iterable_dataset() if streaming else table
    path = Path(name).expanduser()
    if not path.exists() and (name.startswith((".", "/", "~")) or path.suffix in (".parquet", ".arrow")):
        raise ValueError(f"`dataset` ({name!r}) looks like a local file or folder, but there is none.")
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _open_saved(path, split, split_option, streaming)
    if path.is_file() and path.suffix not in (".parquet", ".arrow"):
        raise ValueError(f"`dataset` ({name!r}) is a file, so it must end in .parquet or .arrow; or give its folder.")
    arguments = {"path": str(path) if path.is_dir() else name, "name": config_name}
    if path.is_file():
        arguments = {"path": path.suffix.removeprefix("."), "data_files": {"train": str(path)}}
    try:
        return datasets.load_dataset(**arguments, split=split, streaming=streaming)
    except Exception as error:  # of many types: network, file system, formats, and `datasets`' own
        splits = _split_names(arguments)
        if splits and split.partition("[")[0] not in splits:
            raise ValueError(
                f"`{split_option}` ({split!r}) must be one of {splits}, the splits of {name!r}."
            ) from error
        if "corresponds to no data" in str(error):
            raise ValueError(_empty(name, split, split_option)) from error
        raise ValueError(f"`dataset` ({name!r}) cannot be opened: {error.__cause__ or error}") from error


def _empty(name: str, split: str, split_option: str) -> str:
    return f"`{split_option}` ({split!r}) of {name!r} is empty: there is no image in it."


def _split_names(arguments: dict[str, Any]) -> list[str]:
    import datasets

    arguments = {"config_name" if name == "name" else name: value for name, value in arguments.items()}
    try:
        return list(datasets.get_dataset_split_names(**arguments))
    except Exception:  # whatever is wrong, the first error says it
        return []


def _open_saved(path: Path, split: str, split_option: str, streaming: bool) -> Any:
    import datasets

    table = datasets.load_from_disk(str(path))
    if not isinstance(table, datasets.DatasetDict):
        table = datasets.DatasetDict({str(table.split or "train"): table})
    if split not in table:
        raise ValueError(f"`{split_option}` ({split!r}) must be one of {list(table)}, the splits in {str(path)!r}.")
    return table[split].to_iterable_dataset() if streaming else table[split]


def _sklearn_digits(split: str, split_option: str) -> "datasets.Dataset":
    import datasets
    from sklearn.datasets import load_digits

    splits = {"train": slice(0, 1500), "test": slice(1500, None)}
    if split not in splits:
        raise ValueError(f"`{split_option}` ({split!r}) must be one of {list(splits)} for the digits.")
    digits = load_digits()
    pixels = np.round(digits.images[splits[split]] * (255 / 16)).astype(np.uint8)  # sixteen grey levels
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    return datasets.Dataset.from_dict({"image": list(pixels), "label": digits.target[splits[split]]}, features)


def _is_image(feature: Any) -> bool:
    import datasets

    return isinstance(feature, datasets.Image)


def _is_class_label(feature: Any) -> bool:
    import datasets

    return isinstance(feature, datasets.ClassLabel)


def _is_text(feature: Any) -> bool:
    feature = getattr(feature, "feature", feature)  # of a list
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _find_column(features: Any, option: str, name: str | None, fits: Any, kind: str, required: bool) -> str | None:
    if name is not None:
        if name not in features:
            raise ValueError(f"`{option}` ({name!r}) must be a column of the dataset; it has {list(features)}.")
        if option == "caption_column" and not fits(features[name]):
            raise ValueError(f"`{option}` ({name!r}) holds {features[name]}; it must hold texts or lists of texts.")
        return name
    found = [column for column, feature in features.items() if fits(feature)]
    if len(found) == 1:
        return found[0]
    if required:
        raise ValueError(
            f"`{option}` must be given: of the columns {list(features)}, {len(found)} have the type {kind}, "
            "so the choice is not clear."
        )
    return None


def _read_labels(table: "datasets.Dataset", column: str, num_classes: int | None) -> tuple[np.ndarray, int]:
    """All labels, and the number of classes: of integers, the largest plus one."""
    values = table.select_columns(column).with_format("arrow")[:][column]
    missing = values.is_null().to_numpy()
    labels = values.fill_null(0).to_numpy().astype(np.int64)
    num_classes = max(int(labels.max()) + 1, 1) if num_classes is None else num_classes
    for row in np.flatnonzero(missing | (labels < 0) | (labels >= num_classes))[:1]:
        check_label(None if missing[row] else int(labels[row]), num_classes, column, int(row))
    return labels, num_classes
