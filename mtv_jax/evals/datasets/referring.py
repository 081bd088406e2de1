"""RefCOCO, RefCOCO+ (Yu et al. 2016) and RefCOCOg (Mao et al. 2016).

FOLDER/refs(unc).p      pickled list of {image_id, ann_id, split, sentences:
                        [{sent}]}; RefCOCOg has refs(umd).p and refs(google).p
FOLDER/instances.json   COCO's annotations of all objects in the images

Images are in COCO's train2014/, beside FOLDER, in images/mscoco/images/ beside
it as in the authors' code, or passed as `images`.
"""

from __future__ import annotations

import collections
import io
import pathlib
import pickle

import numpy as np

from mtv_jax.config import foreign
from mtv_jax.data.sources import coco as coco_json
from mtv_jax.evals.core import examples
from mtv_jax.evals.datasets import coco, files
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError

EXPECTED = (
  "Referring expressions are read from scenes, a source with labels of boxes, "
  "or RefCOCO's folder: refs(unc).p (umd or google for RefCOCOg) and "
  "instances.json."
)
_REFS = ("refs(unc).p", "refs(umd).p", "refs(google).p")
_IMAGES = "images/mscoco/images/train2014"
_MAX_BYTES = 1 << 30
_FIELDS = {"image_id": coco_json.ID, "ann_id": coco_json.ID, "split": str}


def find_refs(path: pathlib.Path) -> pathlib.Path | None:
  """The pickle of expressions: `path` itself, or the first in a folder."""
  if path.is_dir():
    return files.find_list(path, _REFS)
  return path if path.is_file() and path.name in _REFS else None


class _PlainUnpickler(pickle.Unpickler):
  """Reads lists, dicts, strings and numbers; imports and calls nothing."""

  def find_class(self, module: str, name: str) -> None:
    raise pickle.UnpicklingError(f"it holds an object, {module}.{name}")


def _read_refs(path: pathlib.Path, split: str) -> list[dict]:
  """Expressions of a split; `test` is every test split."""
  data = path_lib.read_regular(path, limit=_MAX_BYTES)
  try:
    # Written by Python 2.
    content = _PlainUnpickler(io.BytesIO(data), encoding="utf-8").load()
  except Exception as error:  # A damaged pickle raises any error.
    raise InputError(
      f"{path} can't be read as a pickled list of expressions: {error}"
    ) from None
  fields = {**_FIELDS, "sentences": list}
  refs = foreign.read_rows(path, {"refs": content}, "refs", fields)
  splits = {ref["split"] for ref in refs}
  wanted = {s for s in splits if s == split or split == "test" and split in s}
  if not wanted:
    raise InputError(f"{path} has no split {split!r}; it has {sorted(splits)}")
  return [ref for ref in refs if ref["split"] in wanted]


def open_referring(
  path: pathlib.Path,
  *,
  images: pathlib.Path | None,
  split: str,
  count: int | None,
) -> examples.ReferringSet:
  """Opens a split, see `registry.open_referring`."""
  path = find_refs(path)
  file = path.parent / "instances.json"
  files.require_layout(path.parent, [file.name], what="RefCOCO's folder")
  by_image = coco_json.group_images(
    file,
    coco.read_annotations(file),
    image={"file_name": str, "height": int, "width": int},
    annotation={"id": coco_json.ID, "bbox": list},
  )
  expressions = collections.defaultdict(list)
  for ref in _read_refs(path, split):
    image = by_image.get(ref["image_id"])
    ids = [row["id"] for row in image.annotations] if image else []
    if ref["ann_id"] not in ids:
      raise InputError(
        f"{path}: an expression has image_id {ref['image_id']!r} and ann_id "
        f"{ref['ann_id']!r}, which {file} does not list"
      )
    sentences = foreign.read_rows(path, ref, "sentences", {"sent": str})
    target = ids.index(ref["ann_id"])
    expressions[ref["image_id"]] += [(s["sent"], target) for s in sentences]
  rows = []
  for key, own in examples.subsample([*expressions.items()], count):
    info = by_image[key].info
    boxes = [
      coco.corners(coco.check_box(file, row), info)
      for row in by_image[key].annotations
    ]
    rows.append((info, np.asarray(boxes, np.float32), own))
  names = [info["file_name"] for info, _, _ in rows]
  paths = coco.find_images(path, images, _IMAGES, names)
  records = [*zip(rows, paths, files.file_sizes(paths), strict=True)]
  return examples.ReferringSet.from_records(
    records,
    read=lambda record: coco.read_checked(record[1], record[0][0]),
    hashed=lambda record: (
      record[0][0]["file_name"],
      record[2],
      *record[0][1].ravel().tolist(),
      *record[0][2],
    ),
    name=str(path),
    boxes=tuple(boxes for _, boxes, _ in rows),
    expressions=tuple(tuple(text for text, _ in own) for *_, own in rows),
    targets=tuple(
      np.asarray([t for _, t in own], np.int32) for *_, own in rows
    ),
    split=split,
  )
