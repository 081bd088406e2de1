"""Writes the photos of configs/study_photos.py from Tiny ImageNet or from tars.

  python tools/make_study_photos.py tiny-imagenet-200 --output=data/photos

Of Tiny ImageNet's 200 classes, every second one is used, at 32 x 32 pixels.
Another input folder has train-*.tar and val-*.tar with KEY.jpg and KEY.json, an
object with

  names      names of the class, the first of which is its prompt
  wnid       id of the class
  captions   the second one describes the box: "a small bikini at the left"
  box        y0, x0, y1, x1 in the unit square

and classes.json, the names of each class by id. The output has the layout of
CLIP_benchmark (train/, test/, classnames.txt, templates), with all captions in
KEY.json, the caption of the box first; label sets of the boxes, with the name
of the class as phrase (boxes/train, boxes/test); and tokenizer.model, 256
pieces from the training captions. test/ has the photos of val-*.tar.
"""

import argparse
import io
import itertools
import json
import pathlib
import sys
import tarfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import PIL.Image

from mtv_jax.cli.errors import readable_errors
from mtv_jax.data.labels import annotations, label_values
from mtv_jax.data.labels.label_writer import LabelWriter
from mtv_jax.data.sources.webdataset import WebDatasetSource
from mtv_jax.data.tokenizers.sentencepiece import train_sentencepiece
from mtv_jax.evals.core.prompts import CLASS_NAMES, TEMPLATES
from mtv_jax.utils import atomic
from mtv_jax.utils.errors import InputError

_SPLITS = {"train": "train", "val": "test"}
_TEMPLATES = ("a photo of a {c}", "a {c}", "a {c} in the middle")
_PIECES = 256
Photo = tuple[str, bytes, dict[str, Any]]  # Key, JPEG file, fields.


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("input", type=pathlib.Path)
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--pieces", type=int, default=_PIECES)
  args = parser.parse_args(argv)
  is_tiny = (args.input / "wnids.txt").is_file()
  if is_tiny:
    classes = read_tiny_classes(args.input)
  elif (file := args.input / "classes.json").is_file():
    classes = json.loads(file.read_bytes())
  else:
    raise InputError(
      f"{args.input} has neither wnids.txt (Tiny ImageNet) nor classes.json."
    )
  args.output.mkdir(parents=True, exist_ok=True)
  names = "\n".join(names[0] for names in classes.values())
  atomic.write_text(args.output / CLASS_NAMES, names + "\n")
  atomic.write_text(args.output / TEMPLATES, "\n".join(_TEMPLATES) + "\n")
  for prefix, split in _SPLITS.items():
    if is_tiny:
      tars = read_tiny_imagenet(args.input, prefix, classes)
    else:
      files = sorted(args.input.glob(f"{prefix}-*.tar"))
      tars = (read_tar(file, [*classes]) for file in files)
    records = write_split(tars, args.output / split)
    write_boxes(args.output, split, records)
    print(f"{split}: {len(records):,} photos", flush=True)
    if split == "train":
      texts = (
        text for record in records.values() for text in record["captions"]
      )
      model = train_sentencepiece(texts, args.pieces, "lower")
      atomic.write(args.output / "tokenizer.model", model)
  return 0


def write_split(
  tars: Iterable[Iterable[Photo]], folder: pathlib.Path
) -> dict[str, dict[str, Any]]:
  """Writes the tars of a split; returns the fields of its photos by key."""
  folder.mkdir(exist_ok=True)
  records = {}
  for number, photos in enumerate(tars):
    with (
      atomic.replace_file(folder / f"{number}.tar") as temporary,
      tarfile.open(temporary, "w") as out,
    ):
      for key, image, fields in photos:
        records[key] = fields
        members = {
          "jpg": image,
          "cls": str(fields["label"]).encode(),
          "json": json.dumps({"captions": fields["captions"]}).encode(),
        }
        for suffix, data in members.items():
          member = tarfile.TarInfo(f"{key}.{suffix}")
          member.size = len(data)
          out.addfile(member, io.BytesIO(data))
  return records


def read_tar(path: pathlib.Path, ids: list[str]) -> Iterator[Photo]:
  """Key, image and fields of each photo; KEY.json follows KEY.jpg."""
  with tarfile.open(path) as tar:
    members = [member for member in tar if member.isfile()]
    for pair in itertools.zip_longest(members[::2], members[1::2]):
      names = [member.name for member in pair if member]
      key = names[0].rpartition(".")[0]
      if names != [f"{key}.jpg", f"{key}.json"]:
        raise InputError(
          f"{path} has {' and '.join(names)}; expected KEY.jpg and KEY.json of "
          "each photo, one after the other."
        )
      image, data = (tar.extractfile(member).read() for member in pair)
      try:
        fields = read_fields(json.loads(data), ids)
      except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path}: {names[1]} is invalid: {error!r}.") from None
      yield key, image, fields


def read_tiny_classes(folder: pathlib.Path) -> dict[str, list[str]]:
  """Names by id of every second class."""
  ids = sorted((folder / "wnids.txt").read_text("utf8").split())[::2]
  lines = (folder / "words.txt").read_text("utf8").splitlines()
  words = dict(line.split("\t") for line in lines)
  return {wnid: words[wnid].split(", ") for wnid in ids}


def read_tiny_imagenet(
  folder: pathlib.Path, split: str, classes: dict[str, list[str]]
) -> Iterator[Iterator[Photo]]:
  """Photos of "train" or "val" in a fixed random order, for tars of 2,500."""
  rows = []  # File, class, and the box's first and last columns and rows.
  if split == "val":
    lines = (folder / "val" / "val_annotations.txt").read_text().splitlines()
    for name, wnid, *box in map(str.split, lines):
      rows.append((folder / "val" / "images" / name, wnid, box))
  else:
    for wnid in classes:
      lines = (folder / "train" / wnid / f"{wnid}_boxes.txt").read_text()
      for name, *box in map(str.split, lines.splitlines()):
        rows.append((folder / "train" / wnid / "images" / name, wnid, box))
  rows = [row for row in rows if row[1] in classes]
  np.random.default_rng(0).shuffle(rows)
  for start in range(0, len(rows), 2500):
    yield (read_tiny_photo(*row, classes) for row in rows[start : start + 2500])


def read_tiny_photo(
  file: pathlib.Path, wnid: str, box: list[str], classes: dict[str, list[str]]
) -> Photo:
  """Reads a photo of 64 x 64 pixels, and shrinks it to half."""
  x0, y0, x1, y1 = map(int, box)
  unit = [side / 64 for side in (y0, x0, y1 + 1, x1 + 1)]
  names, pixels = classes[wnid], io.BytesIO()
  with PIL.Image.open(file) as image:
    small = image.convert("RGB").resize((32, 32), PIL.Image.Resampling.BOX)
  small.save(pixels, "JPEG", quality=95)
  fields = dict(names=names, wnid=wnid, captions=make_captions(names, unit))
  photo = read_fields(fields | dict(box=unit), [*classes])
  return file.stem, pixels.getvalue(), photo


def make_captions(names: list[str], box: list[float]) -> list[str]:
  """Captions from the names of a class and the box `y0, x0, y1, x1`."""
  first, *others = [
    f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}" for name in names
  ]
  y0, x0, y1, x1 = box
  y, x, area = (y0 + y1) / 2, (x0 + x1) / 2, (y1 - y0) * (x1 - x0)
  place = "in the middle"
  for side, value in (("left", "right"), x), (("top", "bottom"), y):
    if not 0.4 <= value <= 0.6:
      place = f"at the {side[value > 0.5]}"
      break
  size = "small " if area < 0.15 else "large " if area > 0.5 else ""
  described = f"a {size}{names[0]}" if size else first
  return [f"a photo of {first}", f"{described} {place}", *others[:2]]


def read_fields(fields: dict[str, Any], ids: list[str]) -> dict[str, Any]:
  """Fields of a photo that the output needs, the caption of the box first."""
  name, box_caption, *others = fields["captions"]
  box = np.asarray(fields["box"], np.float32)
  y0, x0, y1, x1 = box
  if not (0 <= y0 < y1 <= 1 and 0 <= x0 < x1 <= 1):
    raise ValueError(f"box {fields['box']}")
  return {
    "captions": [box_caption, name, *others],
    "label": ids.index(fields["wnid"]),
    "name": fields["names"][0],
    "box": box,
  }


def write_boxes(
  folder: pathlib.Path, split: str, records: dict[str, dict[str, Any]]
) -> None:
  """Writes a split's label set."""

  def annotate(item: annotations.Item) -> label_values.LabelOutcome:
    fields = records[item.key]
    return label_values.make_boxes(fields["box"][None], [fields["name"]])

  writer = LabelWriter(
    folder / "boxes" / split,
    kind="boxes",
    base=WebDatasetSource(f"{folder / split}/*.tar"),
    settings={"from": "make_study_photos"},
  )
  annotations.write(writer, annotate)


if __name__ == "__main__":
  with readable_errors("make_study_photos"):
    sys.exit(main())
