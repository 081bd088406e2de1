"""Label sets from existing annotations: COCO instances, depth images.

A base record is found in the annotations by the name of the file that it was
made from: `file_name` or the last part of `url` of its .json (see `shards`),
or its key where it has neither. Annotations of pictures of another shape are
not used: their coordinates would be wrong.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from mtv_jax.data.labels import label_values
from mtv_jax.data.labels.label_sets import LabelError
from mtv_jax.data.labels.label_values import Outcome, no_label
from mtv_jax.data.labels.label_writer import Entry, LabelWriter, Summary
from mtv_jax.data.records import BadRecord
from mtv_jax.data.sources.base import Source
from mtv_jax.utils.errors import InputError, MissingFileError, did_you_mean

MATCHES = ("name", "image_id", "key")
# Records that are in the hands of threads at a time.
_CHUNK = 256
# Two shapes are the same if their ratios differ by less, and by the rounding
# of the smaller one's sides.
_SHAPE = 0.02


@dataclasses.dataclass(frozen=True)
class Item:
  """A record of the base, as far as annotations care.

  Attributes:
    key: of the record.
    name: of the original file, with the folders that the base knows of.
    image_id: of the data set, where the base knows it.
    height, width: of the stored picture; 0 if it can't be read.
  """

  key: str
  name: str
  image_id: str
  height: int
  width: int

  @property
  def stem(self) -> str:
    """The file's name without folders and suffix."""
    return Path(self.name).stem


def write(
  writer: LabelWriter,
  make: Callable[[Item], Outcome],
  *,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
  """Makes and writes the labels of all shards that are missing.

  Args:
    writer: for a base.
    make: the label of a record; is called by several threads.
    progress: is called with the records done and all of them, first before
      anything is.

  Raises:
    LabelError: no record has a label; says what was looked for.
  """
  done = len(writer.base)
  done -= sum(len(writer.numbers(shard)) for shard in writer.todo())
  total, first = len(writer.base), None
  progress(done, total)
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:

    def entries(shard: int) -> Iterator[Entry]:
      nonlocal done, first
      items = _items(writer.base, writer.numbers(shard))
      while chunk := list(itertools.islice(items, _CHUNK)):
        first = first or chunk[0]
        for item, outcome in zip(chunk, pool.map(make, chunk), strict=True):
          yield Entry(item.key, outcome)
        done += len(chunk)
        progress(done, total)

    for shard in writer.todo():
      writer.write(shard, entries(shard))
  try:
    return writer.finish()
  except LabelError as error:
    if first is not None:
      error.add_note(f"The first record was looked for as {first}.")
    raise


def _items(base: Source, numbers: range) -> Iterator[Item]:
  for number in numbers:
    meta = base.read_metadata(number)
    key = str(meta["key"])
    name = meta.get("file_name") or meta.get("url") or key
    if "://" in (name := str(name)):
      name = urlsplit(name).path.lstrip("/")
    height, width = meta.get("height"), meta.get("width")
    if not isinstance(height, int) or not isinstance(width, int):
      height, width = _size(base, number)
    image_id = str(meta.get("image_id", ""))
    yield Item(key, name, image_id, height, width)


def _size(base: Source, number: int) -> tuple[int, int]:
  """Height and width of a stored image by its header, as it is shown."""
  try:
    with Image.open(io.BytesIO(base[number]["image"])) as image:
      width, height = image.size
      # 5 to 8 lie on their side.
      turned = image.getexif().get(0x112, 1) >= 5
  except (BadRecord, OSError, SyntaxError, ValueError):
    return 0, 0
  return (width, height) if turned else (height, width)


def same_shape(item: Item, height: int, width: int) -> bool:
  """Whether a picture of this size can be the record's, but for its scale."""
  sides = (item.height, item.width, height, width)
  if min(sides) < 1:
    return False
  ratio = math.log(item.height * width / (item.width * height))
  return abs(ratio) <= _SHAPE + 1 / min(sides)


class Instances:
  """Boxes of COCO's instance annotations, their categories as phrases.

  Crowds are left out. An image that the files list without any box is
  labelled, with no box; one that they don't list is not labelled.

  Args:
    paths: instances_*.json files.
    match: what a record is found by: "name" (of its file, without folder and
      suffix), "image_id" or "key" (equal to the name).

  Attributes:
    settings: for the manifest.

  Raises:
    MissingFileError: a file is missing.
    InputError: a file is no such annotation, or two list the same image.
  """

  def __init__(
    self, paths: Sequence[str | os.PathLike], *, match: str = "name"
  ):
    if match not in MATCHES:
      raise InputError(f"match={match!r}. {did_you_mean(match, MATCHES)}")
    self._match = match
    self._images: dict[str, _Annotated] = {}
    self._names = _Names()
    hashes = []
    for path in map(Path, paths):
      data = path.read_bytes()
      hashes.append(hashlib.blake2b(data, digest_size=8).hexdigest())
      self._read(path, data)
    self.settings = {
      "from": "coco instances",
      "files": [Path(path).name for path in paths],
      "hashes": hashes,
      "match": match,
    }

  def _read(self, path: Path, data: bytes) -> None:
    try:
      content = json.loads(data)
    except ValueError as error:
      raise InputError(f"{path} is not JSON ({error}).") from error
    needed = {"images", "annotations", "categories"}
    if not isinstance(content, dict) or not needed <= content.keys():
      there = sorted(content) if isinstance(content, dict) else type(content)
      raise InputError(
        f"{path} is no COCO instance file: it needs {sorted(needed)}, it has"
        f" {there}."
      )
    names = {c["id"]: c["name"] for c in content["categories"]}
    images = {}
    for image in content["images"]:
      of = str(image["id"])
      if self._match != "image_id":
        of = Path(image["file_name"]).stem
      if of in self._images:
        raise InputError(
          f"{path}: the image {of!r} is listed twice, here or in a file before"
          " it. Give each file once, or match by image_id."
        )
      annotated = _Annotated(image["height"], image["width"])
      self._images[of] = images[image["id"]] = annotated
    for annotation in content["annotations"]:
      if "bbox" not in annotation or "category_id" not in annotation:
        raise InputError(
          f"{path} has annotations without 'bbox' or 'category_id'"
          f" ({sorted(annotation)}); give instances_*.json."
        )
      if (image := images.get(annotation["image_id"])) is None:
        raise InputError(
          f"{path}: annotation {annotation.get('id')} is of the image"
          f" {annotation['image_id']}, which the file does not list."
        )
      if annotation.get("iscrowd"):
        image.crowds += 1
        continue
      image.boxes.append(annotation["bbox"])
      image.phrases.append(names[annotation["category_id"]])

  def __call__(self, item: Item) -> Outcome:
    """The boxes of a record."""
    wanted = {
      "name": item.stem,
      "image_id": item.image_id,
      "key": item.key,
    }[self._match]
    found = self._images.get(wanted)
    if found is None:
      return no_label("boxes: the image is not in the annotations")
    if self._match == "name":
      self._names.refuse_second(item)
    if not same_shape(item, found.height, found.width):
      return no_label("boxes: annotations of an image of another shape")
    x, y, width, height = np.array(found.boxes, np.float64).reshape(-1, 4).T
    boxes = np.stack([y, x, y + height, x + width], 1)
    boxes /= [found.height, found.width, found.height, found.width]
    made = label_values.make_boxes(boxes, found.phrases)
    crowds = {"boxes: a crowd, left out": found.crowds} if found.crowds else {}
    return Outcome(made.label, {**made.counts, **crowds})


@dataclasses.dataclass
class _Annotated:
  """An image of a COCO file; boxes are (x, y, width, height) in pixels."""

  height: int
  width: int
  boxes: list[Sequence[float]] = dataclasses.field(default_factory=list)
  phrases: list[str] = dataclasses.field(default_factory=list)
  crowds: int = 0


class _Names:
  """The files seen of each stem; threads may ask at once."""

  def __init__(self) -> None:
    self._seen: dict[str, str] = {}

  def refuse_second(self, item: Item) -> None:
    """Two files of one name in different folders are two pictures."""
    # One call that no other thread can come between.
    other = self._seen.setdefault(item.stem, item.name)
    if other != item.name:
      raise InputError(
        f"The base has {other!r} and {item.name!r}, which the annotations "
        "can't tell apart by the file's name: match by image_id or key, or "
        "make a label set for each folder."
      )


class DepthImages:
  """Depth of image files of one channel, 8 or 16 bits.

  Args:
    folder: that the files are in.
    pattern: a file's name in it, with {key}, {stem} (the original file's name
      without folder and suffix), {name} (with its folder, without suffix) or
      {image_id}.
    values: "metric" if they grow with distance (they are inverted), "inverse"
      if they grow with nearness.
    scale: what a value is divided by: 1000 for millimetres, 256 for KITTI.
    invalid: values that mean that nothing was measured.
    side: pixels a side of the stored label.
    min_valid: a label with fewer labelled pixels is none.

  Attributes:
    settings: for the manifest.

  Raises:
    MissingFileError: there is no such folder.
    InputError: an option makes no sense.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    pattern: str = "{stem}.png",
    values: str = "metric",
    scale: float | int = 1.0,
    invalid: Sequence[int] = (0,),
    side: int = 128,
    min_valid: int = label_values.MIN_VALID,
  ):
    self._folder = Path(folder).expanduser()
    if not self._folder.is_dir():
      raise MissingFileError(f"There is no folder of depth {self._folder}.")
    if values not in ("metric", "inverse"):
      raise InputError(f"values={values!r}; they are 'metric' or 'inverse'.")
    if not 0 < scale < math.inf or side < 2 or min_valid < 2:
      raise InputError(
        f"scale={scale}, side={side} and min_valid={min_valid}: expected a"
        " positive scale, and at least 2 of the others."
      )
    self._pattern, self._values, self._scale = pattern, values, scale
    self._invalid, self._side, self._min_valid = invalid, side, min_valid
    self._names = _Names()
    self._file(Item("key", "name.jpg", "1", 1, 1))
    self.settings = {
      "from": "depth images",
      "folder": self._folder.name,
      "pattern": pattern,
      "values": values,
      "scale": scale,
      "invalid": list(invalid),
      "side": side,
      "min_valid": min_valid,
    }

  def _file(self, item: Item) -> Path:
    fields = {
      "key": item.key,
      "stem": item.stem,
      "name": str(Path(item.name).with_suffix("")),
      "image_id": item.image_id,
    }
    try:
      name = self._pattern.format(**fields)
    except (LookupError, AttributeError, ValueError) as error:
      raise InputError(
        f"pattern={self._pattern!r} can't be filled in ({error!r}); it may have"
        f" {', '.join('{' + field + '}' for field in fields)}."
      ) from error
    if name == self._pattern:
      raise InputError(
        f"pattern={self._pattern!r} is the same file for every image; it needs"
        f" one of {', '.join('{' + field + '}' for field in fields)}."
      )
    return self._folder / name

  def __call__(self, item: Item) -> Outcome:
    """The depth of a record."""
    file = self._file(item)
    if not file.exists():
      return no_label("depth: no file for the image")
    if "{stem}" in self._pattern and "{key}" not in self._pattern:
      self._names.refuse_second(item)
    try:
      with Image.open(file) as image:
        if image.mode not in ("L", "I", "I;16", "I;16B"):
          return no_label(f"depth: a file of mode {image.mode}, not grey")
        raw = np.asarray(image)
    except (OSError, SyntaxError, ValueError):
      return no_label("depth: a file that is no image, or damaged")
    if not same_shape(item, *raw.shape):
      return no_label("depth: a file of another shape than the image")
    valid = ~np.isin(raw, self._invalid)
    if self._values == "metric":
      # Nothing is nearer than 0, whatever else is said to be invalid.
      valid &= raw > 0
      inverse = self._scale / np.where(valid, raw, 1)
    else:
      inverse = raw / self._scale
    return label_values.make_depth(
      inverse, side=self._side, valid=valid, min_valid=self._min_valid
    )
