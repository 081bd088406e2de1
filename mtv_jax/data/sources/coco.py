"""COCO annotation files (Lin et al. 2014): captions and instances.

A file is JSON with the lists `images`, `annotations` and, for instances,
`categories`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtv_jax.config import foreign
from mtv_jax.utils.errors import InputError

ID = (int, str)
MAX_SIDE = 1_000_000  # Pixels per image side.

Fields = Mapping[str, type | tuple[type, ...]]


@dataclasses.dataclass(frozen=True)
class AnnotatedImage:
  """An entry of `images` and its entries of `annotations`, in file order."""

  info: Mapping[str, Any]
  annotations: list[Mapping[str, Any]]


def read_content(
  path: Path, fields: Mapping[str, Fields], *, hint: str
) -> dict[str, Any]:
  """Reads an annotation file.

  `fields` maps each required list to the keys of its entries and their types.
  `hint` ends the error about a missing key.
  """
  content = foreign.read_untrusted_json(path)
  present = sorted(content)[:8] if isinstance(content, dict) else type(content)
  if not isinstance(content, dict) or not fields.keys() <= content.keys():
    required = " and ".join(map(repr, fields))
    problem = f"it needs {required} but has {present}"
    raise InputError(f"{path} is not a COCO file: {problem}.")
  for key, types in fields.items():
    foreign.read_rows(path, content, key, types, hint=hint)
  return content


def group_images(
  path: Path,
  content: Mapping[str, Any],
  *,
  image: Fields,
  annotation: Fields,
  require_listed: bool = True,
) -> dict[int | str, AnnotatedImage]:
  """Groups annotations by image id, in file order.

  `image` and `annotation` are the types of required keys, besides the ids.
  """
  images = {}
  rows = foreign.read_rows(path, content, "images", {"id": ID, **image})
  for row in rows:
    sides = [row[side] for side in ("height", "width") if side in image]
    if any(not 1 <= side <= MAX_SIDE for side in sides):
      raise InputError(f"{path}: image {row['id']!r} has sides of {sides}.")
    images[row["id"]] = AnnotatedImage(row, [])
  fields = {"image_id": ID, **annotation}
  unknown_ids = set()
  for row in foreign.read_rows(path, content, "annotations", fields):
    if row["image_id"] in images:
      images[row["image_id"]].annotations.append(row)
    else:
      unknown_ids.add(row["image_id"])
  if unknown_ids and require_listed:
    raise InputError(
      f"{path}: {len(unknown_ids)} annotated image ids are not in its images,"
      f" such as {min(unknown_ids, key=str)}"
    )
  return images
