"""Readers of images with named boxes.

What `data` may be:

  scenes                 the built-in scenes, at numbers no training run reaches
  instances_*.json       COCO's boxes, with the folder of images beside it; or
                         COCO's folder, of which val2017 is read
  {type=..., ...}        a source of `mtv_jax.data` with labels of boxes
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from mtv_jax.data import canvas
from mtv_jax.data.scenes import scenes
from mtv_jax.evals.core import examples
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.core.examples import Digest, Images
from mtv_jax.evals.datasets import layout
from mtv_jax.evals.datasets import registry as datasets

_SCENES = 128
_OFFICIAL = "annotations/instances_val2017.json"
# Thinner than this, in pixels, a box holds nothing to look at.
_LEAST_SIDE = 1.0


@dataclasses.dataclass(frozen=True)
class NamedBoxes:
  """Images with named boxes, at least one each.

  Attributes:
    name: what it is, for the protocol.
    images: n of them.
    boxes: of each image, (y0, x0, y1, x1) in the unit square.
    phrases: of each image, what is in its boxes.
    labels: of each image, its boxes' places in `classes`; None without.
    classes: names, or None for data that has phrases only.
    digest: hash of names, file sizes, boxes and phrases.
    left_out: how many boxes were not used, by reason.
  """

  name: str
  images: Images
  boxes: tuple[Float32[np.ndarray, "_ 4"], ...]
  phrases: tuple[tuple[str, ...], ...]
  labels: tuple[Int[np.ndarray, " _"], ...] | None
  classes: tuple[str, ...] | None
  digest: str
  left_out: dict[str, int]


def read(
  data: datasets.Data,
  *,
  images: str | os.PathLike | None = None,
  count: int | None = None,
) -> NamedBoxes:
  """Opens images with named boxes.

  Args:
    data: see the top of the file.
    images: the folder of COCO's images, where it is not beside the JSON.
    count: how many images to use, evenly spaced; all of them by default (of
      the scenes, which never end, 128).

  Raises:
    FileNotFoundError: nothing there, or images missing.
    NotApplicable: something there that has no boxes.
    ValueError: annotations that don't fit their images.
  """
  if isinstance(data, Mapping):
    return _source(dict(data), count)
  text = os.fspath(data)
  if text == "scenes":
    first, length = datasets.HELD_OUT_SCENES, count or _SCENES
    return _scenes("scenes", scenes.SceneSource(first=first, length=length))
  path = pathlib.Path(text)
  if path.is_dir() and (path / "annotations").is_dir():
    layout.require(path, [_OFFICIAL], what="COCO 2017 with its instances")
    path = path / _OFFICIAL
  if not path.exists() and ".tar" not in text:
    raise FileNotFoundError(
      f"data={text!r}: nothing there. Expected 'scenes', COCO's folder or its "
      "annotations/instances_*.json, or a source with labels of boxes"
    )
  if not path.is_file() or path.suffix != ".json":
    raise NotApplicable(f"{text} has no named boxes; COCO's instances have")
  return _coco(path, images, count)


def _source(config: dict[str, Any], count: int | None) -> NamedBoxes:
  from mtv_jax.data.sources import registry as sources

  if datasets.is_scenes(config):
    # From 0 on there are those that the encoder was trained on.
    config = {"first": datasets.HELD_OUT_SCENES, **config}
  source = sources.build_source(config)
  name = str(config.get("path", config.get("type")))
  chosen = examples.spaced(range(len(source)), count)
  if isinstance(source, scenes.SceneSource):
    return _scenes(name, source, chosen)
  if not {"boxes", "phrases"} <= set(source.fields):
    raise NotApplicable(
      f"{name} has records of {sorted(source.fields)}; named boxes come with "
      "labels=dict(boxes=...)"
    )
  kept, boxes, phrases, digest = [], [], [], Digest()
  # Not all at once: a record holds the bytes of its image.
  for i in chosen:
    record = source[i]
    if len(record["phrases"]):
      kept.append(i)
      boxes.append(np.asarray(record["boxes"], np.float32).reshape(-1, 4))
      phrases.append(tuple(record["phrases"]))
      digest.add(record["key"], *boxes[-1].ravel().tolist(), *phrases[-1])

  def image(index: int) -> np.ndarray:
    record = source[kept[index]]
    found = record["image"]
    if isinstance(found, np.ndarray):
      return found
    return canvas.decode(found, key=record["key"])

  return _named(name, Images(image, len(kept)), boxes, phrases, digest)


def _scenes(
  name: str,
  source: scenes.SceneSource,
  chosen: Sequence[int] | None = None,
) -> NamedBoxes:
  """Scenes, whose boxes have phrases and the classes of things."""
  chosen = range(len(source)) if chosen is None else chosen

  def draw(i: int) -> scenes.Scene:
    number = source.first + i
    return scenes.render(number, size=source.size, seed=source.seed)

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    drawn = [
      (i, scene.boxes, scene.phrases, _classes(scene))
      for i, scene in zip(chosen, pool.map(draw, chosen), strict=True)
      if len(scene.boxes)
    ]
  digest = Digest()
  for i, boxes, phrases, _ in drawn:
    key = f"scene-{source.seed}-{source.first + i}-{source.size}"
    digest.add(key, *boxes.ravel().tolist(), *phrases)
  return _named(
    name,
    Images(lambda k: draw(drawn[k][0]).image, len(drawn)),
    [boxes for _, boxes, _, _ in drawn],
    [phrases for _, _, phrases, _ in drawn],
    digest,
    labels=[labels for _, _, _, labels in drawn],
    classes=tuple(scenes.CLASS_NAMES),
  )


def _classes(scene: scenes.Scene) -> np.ndarray:
  names = [scene.things[i].name for i in scene.box_things]
  return np.asarray([scenes.CLASS_NAMES.index(n) for n in names], np.int32)


def _coco(
  path: pathlib.Path, folder: str | os.PathLike | None, count: int | None
) -> NamedBoxes:
  """COCO's instances. An image without annotations is unlabelled, not empty."""
  content = _json(path)
  categories = content["categories"]
  place = {row["id"]: i for i, row in enumerate(categories)}
  infos = {row["id"]: row for row in content["images"]}
  left_out = {"crowds": 0, "thinner than a pixel": 0}
  found: dict[int, list[tuple[list[float], int]]] = {}
  for row in content["annotations"]:
    box = _corners(row["bbox"], infos[row["image_id"]])
    height, width = box[2] - box[0], box[3] - box[1]
    info = infos[row["image_id"]]
    if row.get("iscrowd"):
      left_out["crowds"] += 1
    elif min(height * info["height"], width * info["width"]) < _LEAST_SIDE:
      left_out["thinner than a pixel"] += 1
    else:
      own = found.setdefault(row["image_id"], [])
      own.append((box, place[row["category_id"]]))
  ids = examples.spaced([i for i in infos if i in found], count)
  stem = path.stem.removeprefix("instances_")
  names = [infos[i]["file_name"] for i in ids]
  root = _root(
    [folder]
    if folder is not None
    else [path.parent.parent / stem, path.parent / stem, path.parent],
    names,
  )
  classes = tuple(row["name"] for row in categories)
  boxes = [np.asarray([b for b, _ in found[i]], np.float32) for i in ids]
  labels = [np.asarray([c for _, c in found[i]], np.int32) for i in ids]
  digest = Digest()
  for name, own, label in zip(names, boxes, labels, strict=True):
    size = (root / name).stat().st_size
    digest.add(name, size, *own.ravel().tolist(), *label.tolist())
  return _named(
    str(path),
    _checked([root / name for name in names], [infos[i] for i in ids]),
    boxes,
    [tuple(classes[c] for c in label) for label in labels],
    digest,
    labels=labels,
    classes=classes,
    left_out=left_out,
  )


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from None
  first = {}
  if isinstance(content, dict):
    first = (content.get("annotations") or [{}])[0]
  if "bbox" not in first or "categories" not in content:
    raise NotApplicable(
      f"{path} has no named boxes; COCO's annotations/instances_*.json have"
    )
  known = {row["id"] for row in content["images"]}
  lost = {row["image_id"] for row in content["annotations"]} - known
  if lost:
    raise ValueError(
      f"{path}: {len(lost)} annotated image ids are not among its images, such "
      f"as {min(lost)}"
    )
  return content


def _corners(
  bbox: Sequence[float | int], info: Mapping[str, Any]
) -> list[float]:
  """(x, y, width, height) in pixels to corners in the unit square."""
  x, y, width, height = bbox
  rows, columns = info["height"], info["width"]
  corners = (y / rows, x / columns, (y + height) / rows, (x + width) / columns)
  return [min(max(v, 0.0), 1.0) for v in corners]


def _root(
  folders: Sequence[str | os.PathLike], names: Sequence[str]
) -> pathlib.Path:
  """The first of the folders that has the images."""
  for folder in map(pathlib.Path, folders):
    missing = [name for name in names if not (folder / name).is_file()]
    if len(missing) < len(names) and missing:
      raise FileNotFoundError(
        f"{len(missing)} of {len(names)} images are missing in {folder}, such "
        f"as {missing[0]}"
      )
    if names and not missing:
      return folder
  raise FileNotFoundError(
    f"the images ({names[0] if names else 'none listed'}, ...) are in none of "
    f"{[str(f) for f in folders]}; say where with images="
  )


def _checked(
  paths: Sequence[pathlib.Path], infos: Sequence[Mapping[str, Any]]
) -> Images:
  """Images whose size is what the annotations were made for."""
  found = examples.files(paths)

  def image(index: int) -> np.ndarray:
    pixels, info = found[index], infos[index]
    if pixels.shape[:2] != (info["height"], info["width"]):
      raise ValueError(
        f"{paths[index]} is {pixels.shape[0]}x{pixels.shape[1]} and its boxes "
        f"are for {info['height']}x{info['width']}: not the original image"
      )
    return pixels

  return Images(image, len(paths))


def _named(
  name: str,
  images: Images,
  boxes: Sequence[np.ndarray],
  phrases: Sequence[Sequence[str]],
  digest: Digest,
  *,
  labels: Sequence[np.ndarray] | None = None,
  classes: tuple[str, ...] | None = None,
  left_out: Mapping[str, int] | None = None,
) -> NamedBoxes:
  if not len(images):
    raise NotApplicable(f"{name} has no named boxes")
  return NamedBoxes(
    name=name,
    images=images,
    boxes=tuple(boxes),
    phrases=tuple(tuple(own) for own in phrases),
    labels=None if labels is None else tuple(labels),
    classes=classes,
    digest=digest.hex(),
    left_out=dict(left_out or {}),
  )
