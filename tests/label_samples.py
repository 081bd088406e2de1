"""Bases of a few images and label sets for them, for tests of labels."""

import cv2
import numpy as np

from mtv_jax.data.labels import label_writer
from mtv_jax.data.labels.label_values import make_boxes, make_depth, no_label
from mtv_jax.data.labels.label_writer import Entry, LabelWriter
from mtv_jax.data.sources import array_record, listings
from mtv_jax.data.sources import shard_writer as shards_lib
from mtv_jax.data.sources.array_record import ArrayRecordSource
from mtv_jax.data.sources.webdataset import WebDatasetSource

COUNT = 10


def ramp(height, width):
  rows, columns = np.mgrid[:height, :width]
  return (0.2 + rows * 0.03 + columns * 0.005).astype(np.float32)


def png(seed):
  image = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), np.uint8)
  return cv2.imencode(".png", image)[1].tobytes()


def make_base(
  folder, *, count=COUNT, per_shard=4, first=0, format="webdataset"
):
  """Shards of `count` images, the numbers of whose pixels begin at `first`."""
  photos = folder / "photos"
  photos.mkdir(parents=True)
  examples, base = [], folder / "base"
  for i in range(count):
    photo = photos / f"{i}.png"
    photo.write_bytes(png(first + i))
    examples.append(listings.Example(photo.name, photo, [f"c{i}"]))
  shards_lib.write(examples, base, format=format, records_per_shard=per_shard)
  return base


def open_base(folder):
  if list(folder.glob("*.tar")):
    return WebDatasetSource(f"{folder}/*.tar")
  return ArrayRecordSource(f"{folder}/*.array_record")


def outcome(kind, i):
  """Record 3 lacks a label, and record 5 has a label without boxes."""
  if i == 3:
    return no_label(f"{kind}: none")
  if kind == "depth":
    return make_depth(ramp(16, 16) * (1 + i), side=16)
  boxes = np.tile(np.array([0, 0, (i + 1) / 16, 0.5]), (i % 5, 1))
  return make_boxes(boxes, [f"thing {j}" for j in range(len(boxes))])


def make_set(out, base, kind, key=lambda key: key, of=outcome):
  writer = LabelWriter(out, kind=kind, base=base, settings={"of": "the test"})

  def make_entries(numbers):
    return (Entry(key(base[i]["key"]), of(kind, i)) for i in numbers)

  label_writer.write_all(writer, make_entries)
  return out


def write_shard(writer, shard, entries):
  """Writes the missing parts of a shard, given its entries by record."""
  for part in writer.todo(shard)[shard]:
    writer.write(part, entries(part.numbers))
  writer.join(shard)


def make_all(folder):
  """Tars of ten images, and a set of each kind for them."""
  base = open_base(make_base(folder))
  for kind in ("depth", "boxes"):
    make_set(folder / kind, base, kind)
  return folder


def entry(folder, **labels):
  return dict(type="webdataset", path=f"{folder}/base/*.tar", labels=labels)


def make_copy(folder):
  """Another copy of the images: shuffled, partial, in different shards."""
  numbers = [9, 3, 0, 7, 1, 5]
  keys = [f"{i // 4:05d}{i % 4}" for i in numbers]
  records = [
    dict(key=key, image=png(i) + b" ", captions=["c"], number=i)
    for key, i in zip(keys, numbers, strict=True)
  ]
  base = folder / "copy"
  base.mkdir()
  array_record.write(base / "x-0.array_record", records[:5])
  array_record.write(base / "x-1.array_record", records[5:])
  source = open_base(base)
  relabel = lambda kind, i: outcome(kind, numbers[i])  # noqa: E731
  for kind in ("depth", "boxes"):
    make_set(folder / kind, source, kind, of=relabel)
  return folder


def keyed(folder, **options):
  return {
    kind: {"path": str(folder / kind), "join": "key", **options}
    for kind in ("depth", "boxes")
  }
