"""Built-in scenes as data for every evaluation.

`data` is `scenes`, or the config of a source of `mtv_jax.data`:
`{type="scenes", first=..., length=..., size=..., seed=..., difficulty=...}`.
`first` defaults to `HELD_OUT_SCENES`; training scenes of probes start at
`PROBE_SCENES` + `first`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mtv_jax.data import registry as sources
from mtv_jax.data.scenes import render as render_lib
from mtv_jax.data.scenes.source import SceneSource
from mtv_jax.evals.core import examples
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.datasets import normals
from mtv_jax.evals.datasets.posed import Frame, PosedFrames
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.threads import map_ahead

# Scenes are rendered from their number; pretraining counts up from zero.
HELD_OUT_SCENES = 1_000_000
# Training scenes of probes, disjoint from pretraining and held-out scenes.
PROBE_SCENES = 2_000_000
# Upper bound of the backdrop's depth in metres.
MAX_DEPTH = 20.0

_STUFF = render_lib.STUFF_COUNT  # smaller ids are background and ground
_VIDEO_FRAMES = 8
_VIDEO_SIZE = 96
_VIDEO_SCENES = 16
_MIN_OBJECT_AREA = 0.02  # minimum fraction of the first frame
_MAX_POSED_SIZE = 384  # maximum side of rendered posed views, in pixels
_KEY_POINT_SIZE = 192  # default image size for keypoints
# Keypoints (x, y) as fractions of the main object's bounding box.
_KEY_POINTS = ((0.5, 0.5), (0.5, 0.15), (0.5, 0.85))


def is_scenes(data: examples.Data) -> bool:
  """Whether `data` is the built-in scenes, which have small defaults."""
  if isinstance(data, Mapping):
    return data.get("type") == "scenes"
  return os.fspath(data) == "scenes"


def split_config(config: Mapping[str, Any], split: str) -> dict[str, Any]:
  """Scene config with `first` set to the split's first scene."""
  config = dict(config)
  if split == "train":
    config["first"] = PROBE_SCENES + config.get("first", 0)
  config.setdefault("first", HELD_OUT_SCENES)
  return config


@dataclasses.dataclass(frozen=True)
class SceneRange:
  """Scenes of one seed, by number."""

  numbers: tuple[int, ...]
  seed: int = 0
  size: int | None = None  # pixels per side, if data or evaluation sets it
  difficulty: str = "hard"

  def __len__(self) -> int:
    return len(self.numbers)

  def render(self, i: int) -> render_lib.Scene:
    """Renders scene i of the range."""
    return render_lib.render(self.numbers[i], **self.options)

  @property
  def options(self) -> dict[str, Any]:
    """Arguments of `render`, except the number."""
    names = ("size", "seed", "difficulty")
    return {name: getattr(self, name) for name in names}

  def digest(self) -> str:
    first, count = self.numbers[0], len(self)
    rows = [("scenes", first, count, self.size, self.seed)]
    if self.difficulty != "hard":
      rows.append((self.difficulty,))
    if self.numbers != tuple(range(first, first + count)):
      rows.append(self.numbers)
    return examples.hash_rows(rows)

  def protocol(self) -> dict[str, Any]:
    first = self.numbers[0]
    return {"dataset": "scenes", "scenes": {"first": first, **self.options}}

  @property
  def non_defaults(self) -> tuple[int | str | None, ...]:
    """Non-default seed, size and difficulty, for the digest of pairs."""
    values = (self.seed, self.size) if self.seed or self.size else ()
    return values if self.difficulty == "hard" else (*values, self.difficulty)


def open_range(
  data: examples.Data,
  needs: str,
  default: int,
  *,
  split: str = "test",
  count: int | None,
  size: int | None = None,
) -> SceneRange:
  """Scenes of a split; without `count` or a length in `data`, `default` scenes.

  `needs` names what the evaluation reads, for the error.
  """
  source_config = dict(data) if isinstance(data, Mapping) else {"type": data}
  if not is_scenes(source_config):
    raise NotApplicable(
      f"data={source_config}: this evaluation reads {needs}, which only the "
      'source {type: "scenes"} has'
    )
  if size is not None:
    source_config.setdefault("size", size)
  config = split_config({"length": count or default, **source_config}, split)
  source = sources.build_source(config)
  numbers = range(source.first, source.first + source.length)
  return SceneRange(
    tuple(examples.subsample(numbers, count)),
    source.seed,
    source_config.get("size"),
    source.difficulty,
  )


def open_depth(
  data: examples.Data, *, split: str, count: int | None, size: int
) -> examples.DepthSet:
  """Scenes with exact depth; by default 192 for training, 64 for testing."""
  scenes = _open_depth_range(data, split, count, size)
  return _open_maps(
    examples.DepthSet, scenes, lambda scene: scene.depth, source="exact"
  )


def _open_depth_range(data, split, count, size) -> SceneRange:
  options = {"split": split, "count": count, "size": size}
  default = {"train": 192, "test": 64}[split]
  return open_range(data, "metric depth", default, **options)


def open_normals(
  data: examples.Data, *, split: str, count: int | None, size: int
) -> examples.NormalSet:
  """Scenes with normals computed from exact depth, see `open_depth`."""

  def read(scene: render_lib.Scene) -> np.ndarray:
    side = len(scene.depth)
    focal, centre = side * scene.camera.focal, (side - 1) / 2
    camera = focal, focal, centre, centre
    return normals.from_depth(scene.depth, camera, window=3)

  scenes = _open_depth_range(data, split, count, size)
  source = "planes of 3 x 3 pixels of exact depth"
  return _open_maps(examples.NormalSet, scenes, read, source=source)


def open_segmentation(
  data: examples.Data, *, split: str, count: int | None
) -> examples.SegmentationSet:
  """Scenes with class maps; by default 256 for training, 100 for testing."""
  options = {"split": split, "count": count, "size": 96}
  default = {"train": 256, "test": 100}[split]
  scenes = open_range(data, "classes of pixels", default, **options)
  return _open_maps(
    examples.SegmentationSet,
    scenes,
    lambda scene: scene.segmentation,
    classes=render_lib.SEGMENT_NAMES,
    class_count=len(render_lib.SEGMENT_NAMES),
  )


def _open_maps(
  cls: type[examples.DenseSet],
  scenes: SceneRange,
  read: Callable[[render_lib.Scene], np.ndarray],
  **fields: Any,
) -> Any:
  """Opens the scenes' images, each with the map that `read` returns."""
  # Cached, since image and map of a scene are read in turn.
  render = functools.lru_cache(maxsize=64)(scenes.render)
  indices = range(len(scenes))
  return cls(
    kind="scenes",
    name="scenes",
    images=examples.open_items(indices, lambda i: render(i).image),
    maps=examples.open_items(indices, lambda i: read(render(i))),
    digest=scenes.digest(),
    **fields,
  )


def ignore_stuff(data: examples.SegmentationSet) -> examples.SegmentationSet:
  """Scenes with object classes; background and ground are ignored."""

  def read(labels: np.ndarray) -> np.ndarray:
    things = np.where(labels < _STUFF, examples.IGNORE, labels - _STUFF)
    return things.astype(np.uint8)

  return dataclasses.replace(
    data,
    name=f"{data.name}, things only",
    maps=examples.open_items(data.maps, read),
    classes=render_lib.CLASS_NAMES,
    class_count=len(render_lib.CLASS_NAMES),
  )


def open_boxes(
  name: str, source: SceneSource, indices: Sequence[int]
) -> examples.BoxSet:
  """Scenes with boxes, their phrases and object classes."""
  numbers = tuple(source.first + i for i in indices)
  scenes = SceneRange(numbers, source.seed, source.size, source.difficulty)
  rows = []
  rendered_scenes = map_ahead(scenes.render, range(len(scenes)))
  for i, scene in enumerate(rendered_scenes):
    if len(scene.boxes):
      names = [scene.objects[j].name for j in scene.box_objects]
      labels = [render_lib.CLASS_NAMES.index(name) for name in names]
      labels = np.asarray(labels, np.int32)
      rows.append((i, scene.boxes, scene.phrases, labels))
  _, boxes, phrases, labels = zip(*rows, strict=True) if rows else [()] * 4
  return examples.BoxSet.from_records(
    rows,
    read=lambda row: scenes.render(row[0]).image,
    hash_key=lambda row: (
      f"{source.key(indices[row[0]])}-{source.size}",
      *row[1].ravel().tolist(),
      *row[2],
    ),
    name=name,
    boxes=boxes,
    phrases=phrases,
    labels=labels,
    classes=render_lib.CLASS_NAMES,
  )


def open_posed(data: examples.Data, *, count: int) -> PosedFrames:
  """Scenes from two cameras; each scene is a group."""
  scenes = open_range(data, "posed views", count, count=count)

  # Cached, since both frames of a pair are read in turn.
  @functools.lru_cache(maxsize=32)
  def render(number: int, size: int) -> render_lib.ScenePair:
    return render_lib.render_pair(number, **{**scenes.options, "size": size})

  def read(index: int, size: int) -> Frame:
    size = scenes.size or min(2 * size, _MAX_POSED_SIZE)
    pair = render(scenes.numbers[index // 2], size)
    scene = pair.second if index % 2 else pair.first
    depth = np.where(scene.instances >= _STUFF, scene.depth, 0)
    return Frame(
      image=scene.image,
      depth=depth.astype(np.float32),
      focal=scene.camera.focal * size,
      pose=_world_to_camera(scene.camera),
    )

  cameras = []
  for number in scenes.numbers:
    # The camera doesn't depend on the size.
    pair = render.__wrapped__(number, render_lib.MIN_SIZE)
    cameras += [pair.first.camera, pair.second.camera]
  return PosedFrames(
    name="scenes",
    layout="scenes",
    names=tuple(f"scene-{n}/{view}" for n in scenes.numbers for view in "01"),
    groups=tuple((2 * i, 2 * i + 1) for i in range(len(scenes))),
    poses=np.stack([_world_to_camera(camera) for camera in cameras]),
    read=read,
    fingerprint=lambda i: (
      *np.round(cameras[i].position, 6).tolist(),
      *scenes.non_defaults,
    ),
    stored=None,
    overlaps=None,
    metadata={
      "mask": "things, without ground and backdrop",
      **scenes.protocol(),
    },
  )


def open_videos(data: examples.Data, *, count: int | None) -> examples.VideoSet:
  """Scenes from a camera that moves around the main object; 16 by default.

  Objects under 2 % of the first frame count as background (our choice).
  """
  options = {"count": count, "size": _VIDEO_SIZE}
  scenes = open_range(data, "videos", _VIDEO_SCENES, **options)
  digest = examples.hash_rows([("videos", scenes.digest(), _VIDEO_FRAMES)])
  videos = tuple(_open_video(scenes, i) for i in range(len(scenes)))
  return examples.VideoSet(
    kind="scenes", name="scenes", videos=videos, digest=digest
  )


def _open_video(scenes: SceneRange, index: int) -> examples.Video:
  number, options = scenes.numbers[index], scenes.options
  instances = scenes.render(index).instances
  pixel_counts = np.bincount(instances.ravel(), minlength=256)
  large_ids = np.flatnonzero(pixel_counts >= _MIN_OBJECT_AREA * instances.size)
  object_ids = large_ids[large_ids >= _STUFF]
  table = np.zeros(256, np.uint8)
  table[object_ids] = 1 + np.arange(len(object_ids))

  # Cached, since frames and masks are read in turn.
  @functools.cache
  def render() -> tuple[render_lib.Scene, ...]:
    return render_lib.render_video(number, frames=_VIDEO_FRAMES, **options)

  indices = range(_VIDEO_FRAMES)
  return examples.Video(
    name=f"scene-{number}",
    frames=examples.open_items(indices, lambda i: render()[i].image),
    masks=examples.open_items(indices, lambda i: table[render()[i].instances]),
    objects=len(object_ids),
  )


def _world_to_camera(camera: render_lib.Camera) -> np.ndarray:
  pose = np.eye(4)
  pose[:3, :3] = camera.rotation
  pose[:3, 3] = -camera.rotation @ camera.position
  return pose


def open_key_points(
  data: examples.Data, *, count: int
) -> examples.KeyPointPairs:
  """Main objects of scenes, paired within classes.

  Each scene is paired with the next scene whose main object has the same class,
  cyclically. Keypoints are the centre of the main object's bounding box, and
  the points at 15 and 85 % of its height.
  """
  scenes = open_range(data, "keypoints", count, count=count)
  numbers, side = scenes.numbers, scenes.size or _KEY_POINT_SIZE
  sized_scenes = dataclasses.replace(scenes, size=side)
  rendered_scenes = [sized_scenes.render(i) for i in range(len(scenes))]
  by_class = collections.defaultdict(list)
  for i, scene in enumerate(rendered_scenes):
    if 0 in scene.box_objects:
      by_class[scene.label].append(i)
  hash_keys, pairs = [], []
  for label, members in sorted(by_class.items()):
    if len(members) < 2:
      continue
    for i, j in zip(members, members[1:] + members[:1], strict=True):
      hash_keys.append((numbers[i], numbers[j], *scenes.non_defaults))
      boxes = _main_box(rendered_scenes[i]), _main_box(rendered_scenes[j])
      pairs.append(
        examples.KeyPointPair(
          category=render_lib.CLASS_NAMES[label],
          viewpoint=None,
          first=i,
          second=j,
          first_points=_key_points(boxes[0]),
          second_points=_key_points(boxes[1]),
          second_box=boxes[1],
          first_side=side,
          second_side=side,
        )
      )
  if not pairs:
    min_count = len(render_lib.CLASS_NAMES) + 1
    raise InputError(
      f"scenes: no two of {len(scenes)} (from number {numbers[0]}) share one "
      f"of {min_count - 1} main-object classes; set count={min_count} or more"
    )
  return examples.KeyPointPairs(
    name="scenes",
    layout="scenes",
    images=examples.open_items(rendered_scenes, lambda scene: scene.image),
    pairs=tuple(pairs),
    digest=examples.hash_rows(hash_keys),
    metadata={
      "key_points": "in the main thing's bounding box: its middle, and 15 and "
      "85 % of its height",
      **scenes.protocol(),
    },
  )


def _main_box(scene: render_lib.Scene) -> np.ndarray:
  """The main object's (x0, y0, x1, y1) in pixels."""
  box = scene.boxes[scene.box_objects.index(0)] * scene.image.shape[0]
  return box[[1, 0, 3, 2]].astype(np.float64)


def _key_points(box: np.ndarray) -> np.ndarray:
  return box[:2] + np.array(_KEY_POINTS) * (box[2:] - box[:2])
