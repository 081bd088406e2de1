"""RefCOCO, RefCOCO+ (Yu et al. 2016) and RefCOCOg (Mao et al. 2016).

FOLDER/refs(unc).p      pickled list of {image_id, ann_id, split, sentences:
                        [{sent}]}; RefCOCOg has refs(umd).p and refs(google).p
FOLDER/instances.json   COCO's annotations of all objects in the images

Images are COCO's train2014/: beside FOLDER, in images/mscoco/images/ beside it
(as in the authors' code), or passed as `images`.
"""

from __future__ import annotations

import collections
import pathlib

import numpy as np

from mtv_jax.config import foreign
from mtv_jax.data.sources import coco as coco_json
from mtv_jax.evals.core import examples
from mtv_jax.evals.datasets import coco, files
from mtv_jax.utils.errors import InputError

_REFS = ("refs(unc).p", "refs(umd).p", "refs(google).p")
_IMAGES = "images/mscoco/images/train2014"
_FIELDS = {"image_id": coco_json.ID, "ann_id": coco_json.ID, "split": str}
_FIELDS |= {"sentences": list}


def find_refs(path: pathlib.Path) -> pathlib.Path | None:
  """The pickle of expressions: `path` itself, or the first in a folder."""
  if path.is_dir():
    return files.find_list(path, _REFS)
  return path if path.is_file() and path.name in _REFS else None


def _read_refs(path: pathlib.Path, split: str) -> list[dict]:
  """Expressions of a split; `test` is every test split."""
  content = foreign.read_pickle(path, expected="a list of expressions")
  refs = foreign.read_rows(path, {"refs": content}, "refs", _FIELDS)
  splits = {ref["split"] for ref in refs}
  subset = {s for s in splits if s == split or split == "test" and split in s}
  if not subset:
    raise InputError(f"{path} has no split {split!r}; it has {sorted(splits)}")
  return [ref for ref in refs if ref["split"] in subset]


def open_boxes(
  path: pathlib.Path,
  *,
  images: pathlib.Path | None,
  split: str,
  count: int | None,
) -> examples.BoxSet:
  """Opens a split, see `registry.open_boxes`; one box per expression."""
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
  nonempty = [(key, pairs) for key, pairs in expressions.items() if pairs]
  sample = examples.subsample(nonempty, count)
  sample_images = [by_image[key] for key, _ in sample]
  infos, candidates = [image.info for image in sample_images], []
  for image in sample_images:
    boxes = [coco.read_box(file, r, image.info) for r in image.annotations]
    candidates.append(np.asarray(boxes, np.float32))
  names = [info["file_name"] for info in infos]
  paths = coco.find_images(path, images, _IMAGES, names)
  rows = [*zip(paths, infos, candidates, (e for _, e in sample), strict=True)]
  return examples.BoxSet.from_records(
    rows,
    read=lambda row: coco.read_checked(row[0], row[1]),
    hash_key=lambda row: (
      row[1]["file_name"],
      *row[2].ravel().tolist(),
      *row[3],
    ),
    prefix=files.file_sizes(paths),
    name=f"{path}, {split}",
    boxes=tuple(c[[t for _, t in pairs]] for _, _, c, pairs in rows),
    phrases=tuple(tuple(text for text, _ in pairs) for *_, pairs in rows),
    labels=None,
    classes=None,
    candidates=tuple(candidates),
  )
