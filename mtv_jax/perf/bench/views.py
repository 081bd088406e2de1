"""What views of a canvas cost on the devices, beside the step and the host."""

from __future__ import annotations

import dataclasses
import json
import statistics

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from mtv_jax.config import schema
from mtv_jax.parallel.mesh import BATCH_SPEC
from mtv_jax.perf.bench import data, floors
from mtv_jax.perf.bench.step import Alone
from mtv_jax.train import gradients


@dataclasses.dataclass(frozen=True)
class ViewSpeed:
  """What `bench_views` measured, all but the shares in ms an image.

  Attributes:
    views: each view alone, by name; with `resize` to the canvas's own size
      little is left to do.
    all_views: of the step in one program.
    step: the whole train step.
    decode: of one core, decoding and resizing a JPEG to a canvas.
    batch_size: global.
    canvas: its side in pixels.
    devices: kind and number.
  """

  views: dict[str, float]
  all_views: float
  step: float
  decode: float
  batch_size: int
  canvas: int
  devices: str

  @property
  def share(self) -> float:
    """Of the step that its views take, 0 to 1."""
    return self.all_views / self.step

  def to_json(self) -> str:
    """As one line of JSON."""
    return json.dumps({**dataclasses.asdict(self), "share": self.share})

  def __str__(self) -> str:
    rows = [(f"view {name}", ms) for name, ms in self.views.items()]
    rows += [
      ("all views, one program", self.all_views),
      ("train step", self.step),
      ("decode and resize, a core", self.decode),
    ]
    head = f"batch {self.batch_size}, canvas {self.canvas}, {self.devices}"
    lines = [head, f"{'':28}{'ms an image':>12}"]
    lines += [f"{name:28}{ms:12.3f}" for name, ms in rows]
    return "\n".join([*lines, f"views / step: {self.share:.1%}"])


def bench_views(config: schema.Config, *, steps: int = 5) -> ViewSpeed:
  """Times the views of a config alone, in one program, and in the step.

  Args:
    config: as `train.run` takes it.
    steps: to time, of each.
  """
  alone = Alone(config)
  recipe, mesh = alone.experiment.step_spec, alone.experiment.mesh
  rows, canvas = alone.batch["image"].shape[:2]
  place = NamedSharding(mesh, BATCH_SPEC)

  def views(names):
    def make(image, image_size):
      keys = gradients.view_keys(recipe, jnp.zeros((), jnp.int32), rows, mesh)
      return {
        name: recipe.views[name](image, image_size, keys[name], recipe.dtype)
        for name in names
      }

    made = jax.jit(make, in_shardings=(place, place), out_shardings=place)
    times = floors.timed(
      lambda: made(alone.batch["image"], alone.batch["image_size"]),
      rounds=steps,
    )
    return 1e3 * statistics.median(times) / rows

  names = sorted({e.view for e in recipe.plan if e.tower == "image"})
  step = statistics.median(alone.step() for _ in range(steps))
  return ViewSpeed(
    views={name: views([name]) for name in names},
    all_views=views(names),
    step=1e3 * step / rows,
    decode=data.decode_alone(canvas).cpu_ms,
    batch_size=rows,
    canvas=canvas,
    devices=floors.devices(),
  )
