"""Readers of labelled and captioned images, in the layouts they come in.

Original images, not canvases: an evaluation chooses its own preprocessing.
Annotations are read when a data set is opened, images one by one when used.

What `data` may be:

  scenes              the built-in scenes, at numbers no training run reaches
  {type=..., ...}     any source of `mtv_jax.data`, as in `config.data.train`
  *.tar               WebDataset shards: brace ranges, globs
  captions.json       COCO's captions, with the folder of images beside it
  dataset_coco.json   Karpathy's splits of COCO or Flickr30k
  FOLDER              CLASS/*.jpg, or flat wnid_name.JPEG
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from mtv_jax.data import canvas

Data = str | os.PathLike | Mapping[str, Any]

# Scenes are rendered from their number; training counts up from zero.
HELD_OUT_SCENES = 1_000_000
_SCENES = 1000
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_FLAT = re.compile(r"(n\d{8})_(.+)\.\w+$")


class Images(Sequence):
  """Images that are read and decoded when indexed, from any thread."""

  def __init__(self, read: Callable[[int], Any], count: int):
    self._read = read
    self._count = count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
    if not 0 <= index < self._count:
      raise IndexError(f"image {index} of {self._count}")
    return self._read(index)


@dataclasses.dataclass(frozen=True)
class Labelled:
  """Images with one class each.

  Attributes:
    name: what it is, for the protocol.
    images: n of them.
    labels: `[n]`, indices into `classes` and `ids`.
    classes: readable names, or None if the data has none.
    ids: identifiers by which a prompt file may know the classes.
    digest: hash of names, file sizes and labels.
  """

  name: str
  images: Images
  labels: Int[np.ndarray, " n"]
  classes: tuple[str, ...] | None
  ids: tuple[str, ...] | None
  digest: str


@dataclasses.dataclass(frozen=True)
class Captioned:
  """Images with captions.

  Attributes:
    name: what it is, for the protocol.
    images: n of them, each with at least one caption.
    captions: m of them, in the order of their images.
    owner: `[m]`, the image of each caption.
    digest: hash of names, file sizes and captions.
    split: which of Karpathy's; None for other data, which has no choice.
  """

  name: str
  images: Images
  captions: tuple[str, ...]
  owner: Int[np.ndarray, " m"]
  digest: str
  split: str | None = None


def labelled(data: Data, *, count: int | None = None) -> Labelled:
  """Opens labelled images: scenes, a folder, or a source with labels.

  Args:
    data: see the top of the file.
    count: how many to use, evenly spaced; all of them by default (of the
      scenes, which never end, 1,000).

  Raises:
    FileNotFoundError: nothing there.
    ValueError: something there that has no labels.
  """
  kind = _kind(data, count)
  if kind.source is not None:
    return _labelled_source(kind, count)
  if kind.what != "folder":
    raise ValueError(
      f"{data} is a {kind.what} file, which gives captions and no classes. "
      "Classification reads scenes, CLASS/*.jpg, wnid_name.JPEG or a source "
      "with labels."
    )
  return _labelled_folder(kind.path, count)


def captioned(
  data: Data,
  *,
  images: str | os.PathLike | None = None,
  split: str = "test",
  count: int | None = None,
  max_captions: int | None = None,
) -> Captioned:
  """Opens captioned images: scenes, COCO, Karpathy, or tars.

  Args:
    data: see the top of the file.
    images: the folder of images, where it is not beside the JSON.
    split: of Karpathy's file.
    count: how many images to use, evenly spaced; all of them by default (of
      the scenes, which never end, 1,000).
    max_captions: the first captions of an image to use; all by default.

  Raises:
    FileNotFoundError: nothing there, or images missing.
    ValueError: something there that has no captions.
  """
  kind = _kind(data, count)
  if kind.source is not None:
    return _captioned_source(kind, count, max_captions)
  if kind.what == "COCO captions":
    rows, root = _coco_rows(kind.path, kind.content, images)
  elif kind.what == "Karpathy":
    rows, root = _karpathy_rows(kind.path, kind.content, images, split)
  else:
    raise ValueError(
      f"{data} is a folder, which gives no captions. Retrieval reads scenes, "
      "COCO's captions_*.json, Karpathy's dataset_*.json or tars."
    )
  rows = _spaced(rows, count)
  data = _captioned_files(kind, rows, root, max_captions)
  return dataclasses.replace(
    data, split=split if kind.what == "Karpathy" else None
  )


@dataclasses.dataclass(frozen=True)
class _Kind:
  """What a `data` argument turned out to be."""

  name: str
  what: str
  path: pathlib.Path | None = None
  content: Any = None
  source: Any = None


def _kind(data: Data, count: int | None) -> _Kind:
  if isinstance(data, Mapping):
    return _source_kind(str(data.get("path", data.get("type"))), dict(data))
  text = os.fspath(data)
  if text == "scenes":
    length = count or _SCENES
    return _source_kind(
      "scenes", {"type": "scenes", "first": HELD_OUT_SCENES, "length": length}
    )
  if ".tar" in text:
    return _source_kind(text, {"type": "webdataset", "path": text})
  path = pathlib.Path(text)
  if path.is_dir():
    return _Kind(text, "folder", path)
  if path.is_file() and path.suffix == ".json":
    try:
      content = json.loads(path.read_bytes())
    except ValueError as error:
      raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
      raise ValueError(f"{path} holds a {type(content).__name__}, no object")
    first = (content.get("images") or [{}])[0]
    if "sentences" in first:
      return _Kind(text, "Karpathy", path, content)
    if "annotations" in content:
      return _Kind(text, "COCO captions", path, content)
    raise ValueError(
      f"{path} has keys {sorted(content)}; expected COCO's captions (images, "
      "annotations) or Karpathy's splits (images with sentences)"
    )
  found = "nothing there" if not path.exists() else "a file of another kind"
  raise FileNotFoundError(
    f"data={text!r}: {found}. Expected 'scenes', a folder of classes, COCO's "
    "or Karpathy's JSON, or tars (shards/{00000..00009}.tar)"
  )


def _source_kind(name: str, config: dict[str, Any]) -> _Kind:
  from mtv_jax.data import sources

  return _Kind(name, config["type"], source=sources.build_source(config))


def _spaced(items: Sequence[Any], count: int | None) -> list[Any]:
  """`count` of the items, evenly spaced, so that every class has its part."""
  if count is None or count >= len(items):
    return list(items)
  if count < 1:
    raise ValueError(f"count={count}; expected at least 1, or None for all")
  return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def _source_images(source: Any, chosen: Sequence[int]) -> Images:
  def read(index: int) -> np.ndarray:
    record = source[chosen[index]]
    image = record["image"]
    if isinstance(image, np.ndarray):
      return image
    return canvas.decode(image, key=record["key"])

  return Images(read, len(chosen))


def _labelled_source(kind: _Kind, count: int | None) -> Labelled:
  _require_field(kind, "label")
  chosen = _spaced(range(len(kind.source)), count)
  digest, labels = Digest(), []
  for i in chosen:
    record = kind.source[i]
    labels.append(int(record["label"]))
    digest.add(record["key"], _size(record["image"]), labels[-1])
  classes = None
  if kind.what == "scenes":
    from mtv_jax.data import scenes

    classes = tuple(scenes.CLASS_NAMES)
  return Labelled(
    name=kind.name,
    images=_source_images(kind.source, chosen),
    labels=np.asarray(labels, np.int32),
    classes=classes,
    ids=None,
    digest=digest.hex(),
  )


def _captioned_source(
  kind: _Kind, count: int | None, max_captions: int | None
) -> Captioned:
  _require_field(kind, "captions")
  chosen, kept = _spaced(range(len(kind.source)), count), []
  digest, captions = Digest(), []
  for i in chosen:
    record = kind.source[i]
    own = tuple(record["captions"])[:max_captions]
    if own:
      digest.add(record["key"], _size(record["image"]), *own)
      kept.append(i)
      captions.append(own)
  images = _source_images(kind.source, kept)
  return _grouped(kind.name, images, captions, digest)


def _require_field(kind: _Kind, field: str) -> None:
  fields = kind.source.fields
  if field not in fields:
    raise ValueError(
      f"{kind.name}: its records have {sorted(fields)}, and this evaluation "
      f"needs {field!r}"
    )


def _size(image: Any) -> str:
  """Bytes of a file, or the shape of rendered pixels."""
  if isinstance(image, np.ndarray):
    return "x".join(map(str, image.shape))
  return str(len(image))


def _labelled_folder(root: pathlib.Path, count: int | None) -> Labelled:
  """`ROOT/CLASS/*.jpg`, or flat `wnid_name.JPEG`."""
  folders = sorted(p for p in root.iterdir() if p.is_dir())
  files = [(f.name, f.name, p) for f in folders for p in _images_in(f)]
  if not files:
    flat = [(p, _FLAT.match(p.name)) for p in _images_in(root)]
    files = [(m[1], m[2], p) for p, m in flat if m]
  if not files:
    found = sorted(p.name for p in root.iterdir())[:5]
    raise ValueError(
      f"{root}: expected CLASS/*.jpg or flat wnid_name.JPEG, with one of "
      f"{_SUFFIXES}; found {found or 'nothing'}"
    )
  names = {key: name.replace("_", " ") for key, name, _ in files}
  ids = tuple(sorted(names))
  index = {key: i for i, key in enumerate(ids)}
  files = _spaced(files, count)
  paths = [path for _, _, path in files]
  digest = Digest()
  for key, _, path in files:
    digest.add(path.name, path.stat().st_size, key)
  return Labelled(
    name=str(root),
    images=_files(paths),
    labels=np.asarray([index[key] for key, _, _ in files], np.int32),
    classes=tuple(names[key] for key in ids),
    ids=ids,
    digest=digest.hex(),
  )


def _images_in(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(
    p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES and p.is_file()
  )


def _files(paths: Sequence[pathlib.Path]) -> Images:
  return Images(
    lambda i: canvas.decode(paths[i].read_bytes(), key=str(paths[i])),
    len(paths),
  )


def _coco_rows(path, content, images):
  """(file name, captions) in the order of the file, and their folder."""
  files = {row["id"]: row["file_name"] for row in content["images"]}
  captions = collections.defaultdict(list)
  for row in content["annotations"]:
    if "caption" not in row:
      raise ValueError(
        f"{path}: annotations have {sorted(row)} and no 'caption'. Use the "
        "captions_*.json file, not the instances or key points."
      )
    captions[row["image_id"]].append(row["caption"])
  unknown = captions.keys() - files.keys()
  if unknown:
    raise ValueError(
      f"{path}: {len(unknown)} annotated image ids are not among its images, "
      f"such as {min(unknown)}"
    )
  # captions_val2017.json lies in annotations/, its images in val2017/.
  stem = path.stem.removeprefix("captions_")
  near = [path.parent.parent / stem, path.parent / stem, path.parent]
  rows = [(files[i], captions[i]) for i in files if captions[i]]
  return rows, _image_root(images, near, rows)


def _karpathy_rows(path, content, images, split):
  """(file name, captions) of a split, and the folder they are under."""
  chosen = [row for row in content["images"] if row["split"] == split]
  if not chosen:
    splits = sorted({row["split"] for row in content["images"]})
    raise ValueError(f"{path} has no split {split!r}; it has {splits}")
  rows = []
  for row in chosen:
    name = pathlib.PurePosixPath(row.get("filepath", ""), row["filename"])
    rows.append((str(name), [s["raw"] for s in row["sentences"]]))
  near = [path.parent, path.parent / "images"]
  return rows, _image_root(images, near, rows)


def _image_root(
  given: str | os.PathLike | None,
  near: Iterable[pathlib.Path],
  rows: Sequence[tuple[str, list[str]]],
) -> pathlib.Path:
  """The folder that was given, or the first near one with the first file."""
  if given is not None:
    return pathlib.Path(given)
  near = list(near)
  for folder in near:
    if rows and (folder / rows[0][0]).is_file():
      return folder
  raise FileNotFoundError(
    f"the images ({rows[0][0] if rows else 'none listed'}, ...) are in none of "
    f"{[str(p) for p in near]}; say where with images="
  )


def _captioned_files(
  kind: _Kind,
  rows: Sequence[tuple[str, list[str]]],
  root: pathlib.Path,
  max_captions: int | None,
) -> Captioned:
  paths = [root / name for name, _ in rows]
  missing = [p for p in paths if not p.is_file()]
  if missing:
    raise FileNotFoundError(
      f"{len(missing)} of {len(paths)} images of {kind.name} are missing, "
      f"such as {missing[0]}"
    )
  digest, captions = Digest(), []
  for (name, own), path in zip(rows, paths, strict=True):
    captions.append(tuple(own)[:max_captions])
    digest.add(name, path.stat().st_size, *captions[-1])
  return _grouped(kind.name, _files(paths), captions, digest)


def _grouped(
  name: str,
  images: Images,
  captions: Sequence[tuple[str, ...]],
  digest: Digest,
) -> Captioned:
  if not captions:
    raise ValueError(f"{name}: no image has a caption")
  owner = np.repeat(np.arange(len(captions)), [len(c) for c in captions])
  return Captioned(
    name=name,
    images=images,
    captions=tuple(c for own in captions for c in own),
    owner=owner.astype(np.int32),
    digest=digest.hex(),
  )


class Digest:
  """SHA-256 of rows, 16 hexadecimal digits: enough to tell two sets apart."""

  def __init__(self):
    self._hash = hashlib.sha256()

  def add(self, *row: Any) -> None:
    self._hash.update(json.dumps([str(v) for v in row]).encode() + b"\n")

  def hex(self) -> str:
    return self._hash.hexdigest()[:16]
