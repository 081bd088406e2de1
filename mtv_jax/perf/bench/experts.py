"""How fast an expert labels, beside `transformers`, and what it is on a TPU.

An expert of `SUBJECTS` is a module here with

  VARIANTS                              names of its shapes
  write(variant, folder)                a folder by `transformers` with random
                                        weights; returns the model
  ours(variant, folder, batch_size)     a `Side`; of random weights of its own
                                        where the folder is None
  theirs(model, batch_size)             a `Side` that gives the same numbers
  program(variant, batch_size, mesh)    a `Program`, in bfloat16
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from mtv_jax.experts import local_mesh as placing
from mtv_jax.parallel.mesh import BATCH_SPEC, make_mesh, replicated_sharding
from mtv_jax.perf import topologies
from mtv_jax.perf.bench import counting
from mtv_jax.utils.errors import check_choice

# By the kind of labels, the module that knows the expert.
SUBJECTS = {
  "depth": "mtv_jax.perf.bench.depth_anything",
  "boxes": "mtv_jax.perf.bench.owlv2",
}
AGAINST = ("transformers", "none")

# Runs one batch and gives its results.
Side = Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Program:
  """What is compiled for devices that are not there.

  Attributes:
    function: of parameters and rows, as `placing.by_device` takes it.
    params: shapes of the parameters.
    rows: shapes of the rows of all devices.
  """

  function: Callable[[PyTree, PyTree], PyTree]
  params: PyTree
  rows: PyTree


@dataclasses.dataclass(frozen=True)
class ExpertSpeed:
  """What `bench_expert` measured.

  Attributes:
    kind: of the labels.
    variant: of the expert.
    ours: milliseconds an image, the median of the rounds'.
    theirs: the same of `transformers`; None where it was not timed.
    speed: theirs over ours, the median of the rounds' ratios.
    speeds: of every round.
    difference: largest between the results of the two, over the largest value.
    compile_seconds: of our first batch, compilation included.
    batch_size: images a batch.
    threads: that `transformers` had; JAX's are those of the process.
    versions: of the libraries.
  """

  kind: str
  variant: str
  ours: float
  theirs: float | None
  speed: float | None
  speeds: tuple[float, ...]
  difference: float | None
  compile_seconds: float
  batch_size: int
  threads: int
  versions: dict[str, str]

  def to_json(self) -> str:
    """As one line of JSON."""
    return json.dumps(dataclasses.asdict(self))

  def __str__(self) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in self.versions.items())
    lines = [
      f"{self.kind}, {self.variant}, float32, batch {self.batch_size}, "
      f"{self.threads} threads ({versions})",
      f"{'':14}{'ms an image':>12}{'images/s':>10}",
    ]
    for name, value in (("ours", self.ours), ("transformers", self.theirs)):
      if value is not None:
        lines.append(f"{name:14}{value:12.1f}{1e3 / value:10.2f}")
    lines.append(f"first batch, with compilation: {self.compile_seconds:.1f} s")
    if self.speed is not None:
      low, high = min(self.speeds), max(self.speeds)
      lines += [
        f"our speed over theirs: {self.speed:.2f}  ({low:.2f} to {high:.2f} in "
        f"{len(self.speeds)} rounds)",
        f"largest difference over largest value: {self.difference:.1e}",
      ]
    return "\n".join(lines)


def bench_expert(
  kind: str,
  *,
  variant: str = "S",
  batch_size: int = 1,
  rounds: int = 5,
  against: str = "transformers",
  threads: int = 2,
) -> ExpertSpeed:
  """Times an expert with random weights, from pixels to the model's results.

  The two sides alternate, so that what else the machine does disturbs both
  alike; they have the same weights and the same pixels.

  Args:
    kind: of `SUBJECTS`.
    variant: of the expert.
    batch_size: images a batch.
    rounds: of one batch each, after one that is not counted.
    against: "transformers" or "none".
    threads: of PyTorch; JAX's are those of the process, see
      `against_torch.pin`.

  Raises:
    ValueError: for a choice that there is not, or several devices to divide
      the batch against one of PyTorch's.
  """
  subject = _subject(kind)
  check_choice("against", against, AGAINST)
  if against == "none":
    sides = [subject.ours(variant, None, batch_size)]
    versions = {"jax": jax.__version__}
  else:
    if jax.local_device_count() > 1:
      raise ValueError(
        f"{jax.local_device_count()} devices would run {batch_size} images "
        "each, and PyTorch has one: compare on one device."
      )
    import torch
    import transformers

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder)
      model = subject.write(variant, path)
      sides = [
        subject.ours(variant, path, batch_size),
        subject.theirs(model, batch_size),
      ]
    versions = {
      "jax": jax.__version__,
      "torch": torch.__version__,
      "transformers": transformers.__version__,
    }
  begin = time.perf_counter()
  results = [sides[0]()]
  compile_seconds = time.perf_counter() - begin
  results += [side() for side in sides[1:]]
  times = np.array([[_timed(side) for side in sides] for _ in range(rounds)])
  rows = len(results[0])
  medians = [1e3 * statistics.median(column) / rows for column in times.T]
  found: dict[str, Any] = dict(theirs=None, speed=None, difference=None)
  speeds: tuple[float, ...] = ()
  if against != "none":
    speeds = tuple((times[:, 1] / times[:, 0]).tolist())
    mine, others = results
    found = dict(
      theirs=medians[1],
      speed=statistics.median(speeds),
      difference=float(np.abs(mine - others).max() / np.abs(others).max()),
    )
  return ExpertSpeed(
    kind=kind,
    variant=variant,
    ours=medians[0],
    speeds=speeds,
    compile_seconds=compile_seconds,
    batch_size=rows,
    threads=threads,
    versions=versions,
    **found,
  )


def _subject(kind: str) -> ModuleType:
  check_choice("kind", kind, tuple(SUBJECTS))
  return importlib.import_module(SUBJECTS[kind])


def _timed(side: Side) -> float:
  begin = time.perf_counter()
  side()
  return time.perf_counter() - begin


@dataclasses.dataclass(frozen=True)
class ExpertProgram:
  """What `compile_expert` found, of one device.

  Attributes:
    kind: of the labels.
    variant: of the expert.
    topology: that it was compiled for.
    batch_size: images a device.
    parameters: how many.
    arguments: bytes of the parameters and a batch.
    temporaries: bytes besides, at most at a time.
    outputs: bytes of a batch's results.
    memory: bytes of the device.
    flops: an image, of matrix products and convolutions, by their shapes.
    peak: FLOPs a second of the device in bfloat16.
  """

  kind: str
  variant: str
  topology: str
  batch_size: int
  parameters: int
  arguments: int
  temporaries: int
  outputs: int
  memory: int | None
  flops: float
  peak: float | None

  def to_json(self) -> str:
    """As one line of JSON."""
    return json.dumps(dataclasses.asdict(self))

  def __str__(self) -> str:
    used = self.arguments + self.temporaries + self.outputs
    lines = [
      f"{self.kind}, {self.variant}, bfloat16, {self.batch_size} images a chip "
      f"of {self.topology}, {self.parameters / 1e6:.1f} M parameters"
    ]
    rows = [
      ("parameters and a batch", self.arguments),
      ("temporaries", self.temporaries),
      ("results", self.outputs),
      ("together", used),
    ]
    if self.memory:
      rows.append(("of the chip's", self.memory))
    lines += [f"{name:26}{size / 1e9:9.3f} GB" for name, size in rows]
    lines.append(f"{'GFLOP an image':26}{self.flops / 1e9:9.1f}")
    if self.peak:
      bound = self.peak / self.flops
      lines.append(f"{'images/s at the peak':26}{bound:9.0f}")
    return "\n".join(lines)


def compile_expert(
  kind: str,
  *,
  variant: str = "S",
  batch_size: int = 8,
  topology: str = "v5e:2x2",
) -> ExpertProgram:
  """Compiles an expert for devices that need not be there.

  Memory is that of the program as it runs, its layers in loops, whose bodies
  XLA would count once: so FLOPs are counted from the shapes, see `counting`.

  Args:
    kind: of `SUBJECTS`.
    variant: of the expert.
    batch_size: images a device.
    topology: of one host, see `topologies.parse`; every device runs the same
      program, so that its size makes no difference.

  Raises:
    ConfigError: for a topology that there is not, or a missing compiler.
  """
  subject = _subject(kind)
  mesh = make_mesh({"data": 1}, topologies.devices(topology)[:1])
  program = subject.program(variant, batch_size, mesh)
  params = _placed(program.params, replicated_sharding(mesh))
  rows = _placed(program.rows, NamedSharding(mesh, BATCH_SPEC))
  function = placing.by_device(program.function, mesh)
  executable = function.lower(params, rows).compile()
  memory = executable.memory_analysis()
  chip = topologies.chip(topology)
  return ExpertProgram(
    kind=kind,
    variant=variant,
    topology=topology,
    batch_size=batch_size,
    parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(params)),
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    outputs=memory.output_size_in_bytes,
    memory=chip.hbm_bytes,
    flops=counting.trace(program.function, params, rows).flops / batch_size,
    peak=chip.peak_bf16_flops,
  )


def _placed(shapes: PyTree, placing: NamedSharding) -> PyTree:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placing), shapes
  )
