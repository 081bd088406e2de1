"""Label sets from existing annotations: COCO instances, depth images.

A base record is identified by its original image file: `file_name`, else the
last part of `url` in its .json (see `shard_writer`), else its key. Annotations
are dropped if the image's aspect ratio differs.
"""

import dataclasses
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from mtv_jax.config import foreign
from mtv_jax.config.options import Range, shorten_repr
from mtv_jax.data.labels import label_sets, label_values, label_writer
from mtv_jax.data.labels.label_sets import LabelCounts, LabelError
from mtv_jax.data.labels.label_values import LabelOutcome, no_label
from mtv_jax.data.labels.label_writer import Entry, LabelWriter
from mtv_jax.data.records import BadRecord
from mtv_jax.data.sources import coco
from mtv_jax.data.sources.base import Source
from mtv_jax.utils.errors import InputError, MissingFileError, check_choice
from mtv_jax.utils.threads import map_ahead

MATCHES = ("name", "image_id", "key")
_AHEAD = 256  # Records annotated ahead by threads.
# Tolerance on |log(aspect1 / aspect2)|, plus rounding of the sides.
_ASPECT_TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class Item:
  """The fields of a base record that annotations are matched by."""

  key: str
  name: str  # Original file name, with parent folders if known.
  image_id: str  # The data set's image id; "" if unknown.
  height: int  # Height of the stored image; 0 if unreadable.
  width: int

  @property
  def stem(self) -> str:
    """File name without folders and suffix."""
    return Path(self.name).stem

  def has_shape(self, height: int, width: int) -> bool:
    """Whether an image of this size has the record's aspect ratio."""
    sides = (self.height, self.width, height, width)
    if min(sides) < 1:
      return False
    ratio = math.log(self.height * width / (self.width * height))
    return abs(ratio) <= _ASPECT_TOLERANCE + 1 / min(sides)


def write(
  writer: LabelWriter,
  annotate: Callable[[Item], LabelOutcome],
  *,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> LabelCounts:
  """Writes the labels of all records; `annotate` runs in threads."""
  first_item = None

  def make_entries(numbers: range) -> Iterator[Entry]:
    nonlocal first_item
    items = _read_items(writer.base, numbers)
    outcomes = map_ahead(lambda i: (i, annotate(i)), items, ahead=_AHEAD)
    for item, outcome in outcomes:
      first_item = first_item or item
      yield Entry(item.key, outcome)

  try:
    return label_writer.write_all(writer, make_entries, progress=progress)
  except LabelError as error:
    if first_item is not None:
      error.add_note(f"The first record was looked up as {first_item}.")
    raise


def _read_items(base: Source, numbers: range) -> Iterator[Item]:
  for number in numbers:
    meta = base.read_metadata(number)
    key = str(meta["key"])
    name = str(meta.get("file_name") or meta.get("url") or key)
    if "://" in name:
      name = urlsplit(name).path.lstrip("/")
    height, width = meta.get("height"), meta.get("width")
    if not isinstance(height, int) or not isinstance(width, int):
      height, width = _read_size(base, number)
    yield Item(key, name, str(meta.get("image_id", "")), height, width)


def _read_size(base: Source, number: int) -> tuple[int, int]:
  """Reads (height, width) from the image header, after EXIF rotation."""
  try:
    with Image.open(io.BytesIO(base[number]["image"])) as image:
      width, height = image.size
      is_transposed = image.getexif().get(0x112, 1) >= 5
  except (BadRecord, OSError, SyntaxError, ValueError):
    return 0, 0
  return (width, height) if is_transposed else (height, width)


def _check_unique(names_by_stem: dict[str, str], item: Item) -> None:
  """Rejects a second file with the stem; `setdefault` is thread-safe."""
  other = names_by_stem.setdefault(item.stem, item.name)
  if other != item.name:
    raise InputError(
      f"The annotations can't distinguish {other!r} and {item.name!r} by name:"
      " match by image_id or key, or write a label set for each folder."
    )


class Instances:
  """Boxes of COCO instance annotations, with category names as phrases.

  Crowds are dropped. A listed image without boxes counts as labelled. Records
  are matched by "name" (file name without folder and suffix), "image_id" or
  "key" (equal to that name).
  """

  def __init__(
    self, paths: Sequence[str | os.PathLike], *, match: str = "name"
  ):
    check_choice("match", match, MATCHES)
    self._match = match
    self._images: dict[str, _ImageBoxes] = {}
    self._names_by_stem: dict[str, str] = {}
    for path in (files := [Path(path) for path in paths]):
      self._read(path)
    self.settings = {
      "from": "coco instances",
      "files": [path.name for path in files],
      "hashes": [label_sets.hash_bytes(path.read_bytes()) for path in files],
      "match": match,
    }

  def _read(self, path: Path) -> None:
    image_key = "id" if self._match == "image_id" else "file_name"
    sides = {"height": int, "width": int}
    content = coco.read_content(
      path,
      {
        "images": {"id": coco.ID, **sides, image_key: coco.ID},
        "annotations": {"bbox": list, "category_id": coco.ID},
        "categories": {"id": coco.ID, "name": str},
      },
      hint="pass instances_*.json",
    )
    names = {c["id"]: c["name"] for c in content["categories"]}
    images = coco.group_images(path, content, image=sides, annotation={})
    if len(images) < len(content["images"]):
      raise InputError(f"{path} lists an image id twice.")
    for image in images.values():
      key = str(image.info[image_key])
      key = key if self._match == "image_id" else Path(key).stem
      if key in self._images:
        problem = f"{path}: the image {key!r} is listed twice"
        raise InputError(
          f"{problem}. Pass each file once, or match by image_id."
        )
      self._images[key] = _read_boxes(path, image, names)

  def __call__(self, item: Item) -> LabelOutcome:
    """Returns the boxes of a record."""
    by_match = dict(name=item.stem, image_id=item.image_id, key=item.key)
    image = self._images.get(by_match[self._match])
    if image is None:
      return no_label("boxes: the image is not in the annotations")
    if self._match == "name":
      _check_unique(self._names_by_stem, item)
    if not item.has_shape(image.height, image.width):
      return no_label("boxes: annotations of an image of another shape")
    x, y, width, height = np.array(image.boxes, np.float64).reshape(-1, 4).T
    boxes = np.stack([y, x, y + height, x + width], 1)
    boxes /= [image.height, image.width, image.height, image.width]
    outcome = label_values.make_boxes(boxes, image.phrases)
    crowds = {"boxes: a crowd, left out": image.crowds} if image.crowds else {}
    return LabelOutcome(outcome.label, {**outcome.counts, **crowds})


def _read_boxes(
  path: Path, image: coco.AnnotatedImage, names: Mapping[int | str, str]
) -> "_ImageBoxes":
  """Collects the boxes of an image, with their category names."""
  image_boxes = _ImageBoxes(image.info["height"], image.info["width"])
  for annotation in image.annotations:
    if annotation.get("iscrowd"):
      image_boxes.crowds += 1
      continue
    box, category = annotation["bbox"], annotation["category_id"]
    # NaN and boxes outside the image are counted later, by `make_boxes`.
    numbers = [v for v in box if type(v) in (int, float)]
    if category not in names or not len(numbers) == len(box) == 4:
      raise InputError(
        f"{path}: annotation {annotation.get('id')} has category_id"
        f" {category!r} and bbox {shorten_repr(box)}; expected the id of a"
        " category and [x, y, width, height]."
      )
    image_boxes.boxes.append([_to_float(number) for number in box])
    image_boxes.phrases.append(names[category])
  return image_boxes


def _to_float(number: float | int) -> float:
  try:
    return float(number)
  except OverflowError:  # An integer too large for a float.
    return math.inf


@dataclasses.dataclass
class _ImageBoxes:
  """An image of a COCO file; boxes are (x, y, width, height) in pixels."""

  height: int
  width: int
  boxes: list[Sequence[float]] = dataclasses.field(default_factory=list)
  phrases: list[str] = dataclasses.field(default_factory=list)
  crowds: int = 0


@dataclasses.dataclass
class DepthImages:
  """Depth from single-channel image files with 8 or 16 bits.

  `pattern` is a file path in the folder, with {key}, {stem} (of the original
  file), {name} (its path without suffix) or {image_id}.
  """

  folder: str | os.PathLike
  _: dataclasses.KW_ONLY
  pattern: str = "{stem}.png"
  # "metric" values grow with distance, "inverse" ones with nearness.
  values: Literal["metric", "inverse"] = "metric"
  # Divisor: 1000 for millimetres, 256 for KITTI.
  scale: Annotated[float | int, Range(above=0)] = 1.0
  invalid: Sequence[int] = (0,)  # Values that mark a missing measurement.
  # Side of the label in pixels, and bits of a pixel.
  side: Annotated[int, Range(min=2)] = label_values.SIDE
  bits: label_values.Bits = label_values.BITS
  min_valid: Annotated[int, Range(min=2)] = label_values.MIN_VALID

  def __post_init__(self):
    self.folder = Path(self.folder).expanduser()
    if not self.folder.is_dir():
      raise MissingFileError(f"There is no depth folder {self.folder}.")
    self._names_by_stem: dict[str, str] = {}
    self._resolve_path(Item("key", "name.jpg", "1", 1, 1))

  @property
  def settings(self) -> dict[str, Any]:
    """Settings that the manifest stores."""
    extra = {"folder": Path(self.folder).name, "invalid": list(self.invalid)}
    options = label_values.depth_settings(dataclasses.asdict(self))
    return {"from": "depth images", **options, **extra}

  def _resolve_path(self, item: Item) -> Path:
    name = str(Path(item.name).with_suffix(""))
    fields = {"key": item.key, "stem": item.stem, "name": name}
    fields["image_id"] = item.image_id
    try:
      name = self.pattern.format(**fields)
      if name == self.pattern:
        raise ValueError("it is the same file for every image")
    except (LookupError, AttributeError, ValueError) as error:
      problem = f"pattern={self.pattern!r} can't be filled in ({error!r})"
      placeholders = ", ".join(f"{{{field}}}" for field in fields)
      raise InputError(f"{problem}; it needs one of {placeholders}.") from error
    return foreign.resolve_name(self.folder, name, where="pattern")

  def __call__(self, item: Item) -> LabelOutcome:
    """Returns the depth of a record."""
    try:
      file = self._resolve_path(item)
    except InputError:
      return no_label("depth: a name that leaves the folder")
    if not file.exists():
      return no_label("depth: no file for the image")
    if "{stem}" in self.pattern and "{key}" not in self.pattern:
      _check_unique(self._names_by_stem, item)
    try:
      with Image.open(file) as image:
        if image.mode not in ("L", "I", "I;16", "I;16B"):
          return no_label(f"depth: a file of mode {image.mode}, not grey")
        raw = np.asarray(image)
    # Pillow raises many types of errors for damaged files.
    except Exception:
      return no_label("depth: a file that is no image, or damaged")
    if not item.has_shape(*raw.shape):
      return no_label("depth: a file of another shape than the image")
    valid = ~np.isin(raw, self.invalid)
    if self.values == "metric":
      # A distance of 0 can't be inverted.
      valid &= raw > 0
      inverse = self.scale / np.where(valid, raw, 1)
    else:
      inverse = raw / self.scale
    return label_values.make_depth(
      inverse,
      side=self.side,
      bits=self.bits,
      valid=valid,
      min_valid=self.min_valid,
    )
