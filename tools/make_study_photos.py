"""Writes the photos of configs/study_photos.py, from tars of annotated photos.

  python tools/make_study_photos.py photos32 --output=data/photos

The input folder has train-*.tar and val-*.tar with KEY.jpg and KEY.json, an
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
from collections.abc import Iterator
from typing import Any

import numpy as np

from mtv_jax.cli.errors import readable_errors
from mtv_jax.data.labels import annotations, label_values
from mtv_jax.data.labels.label_writer import LabelWriter
from mtv_jax.data.sources.webdataset import WebDatasetSource
from mtv_jax.data.tokenizers.training import train_sentencepiece
from mtv_jax.evals.core.prompts import CLASS_NAMES, TEMPLATES
from mtv_jax.utils import atomic
from mtv_jax.utils.errors import InputError

_SPLITS = {"train": "train", "val": "test"}
_TEMPLATES = ("a photo of a {c}", "a {c}", "a {c} in the middle")
_PIECES = 256


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("input", type=pathlib.Path)
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--pieces", type=int, default=_PIECES)
  args = parser.parse_args(argv)
  classes = json.loads((args.input / "classes.json").read_bytes())
  args.output.mkdir(parents=True, exist_ok=True)
  names = "\n".join(names[0] for names in classes.values())
  atomic.write_text(args.output / CLASS_NAMES, names + "\n")
  atomic.write_text(args.output / TEMPLATES, "\n".join(_TEMPLATES) + "\n")
  for prefix, split in _SPLITS.items():
    records = write_split(args.input, prefix, args.output / split, [*classes])
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
  source: pathlib.Path, prefix: str, folder: pathlib.Path, ids: list[str]
) -> dict[str, dict[str, Any]]:
  """Writes the tars of a split; returns the fields of its photos by key."""
  folder.mkdir(exist_ok=True)
  records = {}
  for number, tar in enumerate(sorted(source.glob(f"{prefix}-*.tar"))):
    with (
      atomic.replace_file(folder / f"{number}.tar") as temporary,
      tarfile.open(temporary, "w") as out,
    ):
      for key, image, fields in read_tar(tar, ids):
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


def read_tar(
  path: pathlib.Path, ids: list[str]
) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
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
