"""Cheap experts and tars for tests of labelling; run as subprocesses.

python tests/labelling_samples.py KIND BASE OUT DELAY [COORDINATOR PROCESS]
"""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from dataset_samples import write_members
from emulators import free_port as free_port
from xla_options import xla_flags

from mtv_jax.cli import errors
from mtv_jax.data import registry
from mtv_jax.data.labels.label_values import make_boxes, make_depth
from mtv_jax.data.records import BadRecord
from mtv_jax.experts import base
from mtv_jax.experts.base import PreparedInput
from mtv_jax.experts.labelling import run as labelling
from mtv_jax.parallel import distributed
from mtv_jax.parallel.mesh import make_mesh
from mtv_jax.utils import atomic, path

SHAPES = ((12, 18), (18, 12), (12, 12))
# Rows of a tar of seven: a source has those without any caption last.
ROWS = (1, 2, 3, 4, 5, 0, 6)


class FakeDepth:
  """A ramp from the top to the bottom, as bright as the image."""

  kind = "depth"

  def __init__(self, *, batch_size=2, delay=0.0, scale=2.0, side=16):
    self.settings = {"of": "the test", "scale": scale, "side": side}
    self._mesh, self._function = _compiled()
    self.rows = batch_size * self._mesh.size
    self._delay, self._side = delay, side
    self._scale = base.replicate(np.float32(scale), self._mesh)
    self.groups = []

  def prepare(self, image, record):
    time.sleep(self._delay)
    if record["key"].endswith("7"):
      reason = f"the number 7.5 ({b'x'!r}) of {image.shape}"
      raise BadRecord(record["key"], reason)
    pixels = image.astype(np.float32) / 255
    return PreparedInput(image.shape, {"image": pixels}, record["key"])

  def run(self, arrays):
    self.groups.append(arrays["image"].shape)
    return self._function(self._scale, base.shard(arrays, self._mesh))

  def finish(self, outputs, meta):
    del meta
    return make_depth(outputs["depth"], side=self._side)


@functools.cache
def _compiled():
  mesh = base.make_local_mesh()
  return mesh, base.jit_per_device(_ramps, mesh)


def _ramps(scale, arrays):
  brightness = arrays["image"].mean((1, 2, 3), keepdims=True)[..., 0]
  height, width = arrays["image"].shape[1:3]
  ramp = jnp.linspace(0, 1, height)[:, None] + jnp.linspace(0, 0.3, width)
  return {"depth": 1 + scale * jnp.sin(brightness) * ramp}


class FakeBoxes(FakeDepth):
  """One box per phrase, at a position that depends on the brightness."""

  kind = "boxes"

  def prepare(self, image, record):
    prepared = super().prepare(image, record)
    phrases = [*record["captions"], *record["meta"].get("tags", [])]
    return PreparedInput(prepared.group, prepared.arrays, phrases)

  def finish(self, outputs, meta):
    at = float(outputs["depth"][-1, -1]) % 0.5
    boxes = [[at, 0.1 * i, at + 0.2, 0.1 * i + 0.2] for i in range(len(meta))]
    scores = np.full(len(meta), at, np.float32)
    return make_boxes(np.array(boxes).reshape(-1, 4), meta, scores)


EXPERTS = {"depth": FakeDepth, "boxes": FakeBoxes}


def make_tars(folder, *, shards=3, records=7, broken=True):
  """Images of three shapes; in the first tar some that are broken."""
  folder.mkdir(parents=True)
  for shard in range(shards):
    members = []
    for row in range(records):
      number = shard * records + row
      draws = np.random.default_rng(number)
      size = SHAPES[number % 5 % 3]
      image = draws.integers(0, 255, (*size, 3), np.uint8)
      data = cv2.imencode(".png", image)[1].tobytes()
      if broken and shard == 0 and row in (1, 4, 5):
        data = {1: data[:100], 4: b"", 5: b"no image %d" % number}[row]
      key = f"{shard:05d}{row:04d}"
      members.append((f"{key}.png", data))
      if row % 3:
        members.append((f"{key}.txt", b"a thing" if row % 2 else b" "))
      if row % 2:
        meta = {"tags": [f"tag {row}"], "key": "other"}
        members.append((f"{key}.json", json.dumps(meta).encode()))
    write_members(folder / f"{shard:05d}.tar", members)
  return folder


def open_base(folder):
  return registry.open_files([f"{folder}/*.tar"], captions="optional")


def label_images(expert, images, records):
  """The outcome of each image; all are of one group and fit the rows."""
  prepared = [
    expert.prepare(image, {"key": "7", **record})
    for image, record in zip(images, records, strict=True)
  ]
  assert len({item.group for item in prepared}) == 1
  filled = [prepared[i % len(prepared)] for i in range(expert.rows)]
  arrays = jax.tree.map(lambda *x: np.stack(x), *[x.arrays for x in filled])
  out = jax.device_get(expert.run(arrays))
  return [
    expert.finish({k: v[i, ...] for k, v in out.items()}, item.meta)
    for i, item in enumerate(prepared)
  ]


def mesh_of(count):
  return make_mesh({"data": -1}, jax.devices()[:count])


def contents(folder):
  """Every file of a folder, also of a bucket, by name."""
  folder = path.as_path(folder)
  names = path.list_folder(folder)
  return {name: path.read_bytes(folder / name) for name in names}


def launch(kind, base, out, *, delay=0.0, devices=1, join=()):
  """Starts this file; it writes "ready" before it labels."""
  root = pathlib.Path(__file__).resolve().parents[1]
  env = dict(os.environ, XLA_FLAGS=xla_flags(devices), PYTHONPATH=str(root))
  return subprocess.Popen(
    [sys.executable, __file__, kind, base, out, str(delay), *join],
    env=env,
    cwd=root,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def claim(folder, name, owner, *, age=0.0):
  """The claim of a process that is not this one, so many seconds old."""
  file = folder / f".{name}.claim"
  file.write_text(json.dumps({"host": "there", "owner": str(owner)}))
  then = time.time() - age
  os.utime(file, (then, then))
  return file


ELSEWHERE = atomic.Owner("00000000", 1, "00000000")


def main(kind, base, out, delay, coordinator=None, process="0"):
  """Labels after it has printed `ready`."""
  distributed.initialize(
    coordinator=coordinator,
    processes=2 if coordinator else None,
    process=int(process) if coordinator else None,
  )
  expert = EXPERTS[kind](delay=float(delay))
  print("ready", flush=True)
  with errors.readable_errors("label"):
    labelling.run(expert, open_base(base), out, threads=2)


if __name__ == "__main__":
  # Tests that run in a background job inherit that interrupts are ignored.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  main(*sys.argv[1:])
