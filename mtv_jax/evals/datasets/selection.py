"""Images with captions to choose from: SugarCrepe and Winoground.

SugarCrepe (Hsieh et al. 2023)
    {add,replace,swap}_{att,obj,rel}.json   one file, or all in FOLDER or
                        FOLDER/data: {"0": {filename, caption,
                        negative_caption}, ...}, beside COCO's val2017/
    *swap_att/test/0.tar                    CLIP_benchmark's export of a file:
                        KEY.webp with KEY.txt, the caption and its negative
Winoground (Thrush et al. 2022)
    examples.jsonl      in FOLDER or FOLDER/data: id, caption_0, caption_1,
                        image_0, image_1 (names without .png), beside images/
"""

from __future__ import annotations

import itertools
import logging
import pathlib
from typing import Any

import numpy as np

from mtv_jax.config import foreign
from mtv_jax.evals.core import examples
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.datasets import class_folders, coco, files
from mtv_jax.utils.errors import InputError

log = logging.getLogger(__name__)

EXPECTED = (
  "Compositionality reads SugarCrepe's JSON files (add_att.json, ...) "
  "beside val2017/, CLIP_benchmark's tars of one of them, or Winoground's "
  "examples.jsonl beside images/."
)
# Kinds of hard negatives, in the paper's order.
SUGAR_CREPE = ("replace_obj", "replace_att", "replace_rel", "swap_obj")
SUGAR_CREPE += ("swap_att", "add_obj", "add_att")
_WINOGROUND = "examples.jsonl"


def matches(path: pathlib.Path) -> bool:
  """Whether a path is SugarCrepe or Winoground."""
  return bool(_list_files(path)) or _find_tar_kind(path) is not None


def _list_files(path: pathlib.Path) -> list[pathlib.Path]:
  """Annotation files: `path` itself, or the files in a folder."""
  names = [f"{kind}.json" for kind in SUGAR_CREPE]
  if path.is_file():
    return [path] if path.name in (*names, _WINOGROUND) else []
  for folder in (path, path / "data"):
    if found := files.find_list(folder, [_WINOGROUND]):
      return [found]
    if found := [folder / n for n in names if (folder / n).is_file()]:
      return found
  return []


def _find_tar_kind(path: pathlib.Path) -> str | None:
  """Kind of the negatives in CLIP_benchmark's tars, by the folder's name."""
  is_export = path.is_dir() and class_folders.is_retrieval(path)
  kinds = [kind for kind in SUGAR_CREPE if path.name.endswith(kind)]
  return kinds[0] if is_export and kinds else None


def open_selection(
  path: pathlib.Path, *, images: pathlib.Path | None, count: int | None
) -> examples.SelectionSet:
  """Opens SugarCrepe or Winoground, see `registry.open_selection`."""
  paths = _list_files(path)
  if not paths:
    return _open_tars(path, count=count)
  rows = examples.subsample(
    [row for p in paths for row in _read_rows(p)], count
  )
  if not rows:
    raise InputError(f"{path} has no items")
  kinds, item_images, item_captions = zip(*rows, strict=True)
  is_winoground = paths[0].name == _WINOGROUND
  num_present, num_kinds = len({*kinds}), len(SUGAR_CREPE)
  if path.is_dir() and not is_winoground and num_present < num_kinds:
    log.warning(
      "%s has %d of SugarCrepe's %d kinds: `accuracy` is the mean over them",
      *(path, num_present, num_kinds),
    )
  names = list(dict.fromkeys(itertools.chain(*item_images)))
  index = {name: i for i, name in enumerate(names)}
  folder = "images" if is_winoground else "val2017"
  image_paths = coco.find_images(paths[0], images, folder, names)
  return examples.SelectionSet.from_records(
    [*zip(names, image_paths, files.file_sizes(image_paths), strict=True)],
    read=lambda record: examples.read_image(record[1]),
    hash_key=lambda record: (record[0], record[2]),
    prefix=[*kinds, *itertools.chain(*item_images, *item_captions)],
    name=str(path),
    image_index=np.asarray([[index[x] for x in item] for item in item_images]),
    captions=tuple(itertools.chain(*item_captions)),
    categories=kinds,
  )


def _read_rows(path: pathlib.Path) -> list[tuple[str, Any, Any]]:
  """Kind, image names and captions of each item of a file."""
  if path.name == _WINOGROUND:
    content, suffix = foreign.read_json_or_lines(path), ".png"
    content = content if isinstance(content, list) else [content]
    images, captions = ("image_0", "image_1"), ("caption_0", "caption_1")
  else:
    # Ids have gaps: items that the authors removed.
    content, suffix = [*coco.read_annotations(path).values()], ""
    images, captions = ("filename",), ("caption", "negative_caption")
  fields = dict.fromkeys((*images, *captions), str)
  return [
    (
      path.stem,
      tuple(row[key].removesuffix(suffix) + suffix for key in images),
      tuple(row[key] for key in captions),
    )
    for row in foreign.read_rows(path, {"items": content}, "items", fields)
  ]


def _open_tars(
  path: pathlib.Path, *, count: int | None
) -> examples.SelectionSet:
  data = class_folders.open_captioned_tars(
    path, split="test", count=count, max_captions=None
  )
  if np.bincount(data.owner).tolist() != [2] * len(data.images):
    raise NotApplicable(
      f"{data.name}: expected two captions per image, the correct one first"
    )
  return examples.SelectionSet(
    name=data.name,
    images=data.images,
    digest=data.digest,
    image_index=np.arange(len(data.images))[:, None],
    captions=data.captions,
    categories=(_find_tar_kind(path),) * len(data.images),
  )
