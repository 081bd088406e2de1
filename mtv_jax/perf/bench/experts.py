"""Expert benchmark: against `transformers`, or compiled ahead of time for TPU.

Each module in `MODELS` defines

  ours(variant, folder, batch_size)            a `RunFn` with a folder's weights
  program(variant, batch_size, mesh, dtype)    a `ExpertProgram`

tools/transformers_experts.py writes the folders and runs `transformers`.
"""

import importlib
import math
import pathlib
import statistics
import tempfile
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from mtv_jax.experts import local_mesh
from mtv_jax.parallel.mesh import BATCH_SPEC, make_mesh, replicated_sharding
from mtv_jax.perf import flops, topologies
from mtv_jax.perf.bench import harness
from mtv_jax.perf.preflight.compile import Memory
from mtv_jax.utils.errors import InputError, check_choice

# Module by kind of label.
MODELS = {
  "depth": "mtv_jax.perf.bench.depth_anything",
  "boxes": "mtv_jax.perf.bench.owlv2",
}
AGAINST = ("transformers", "none")

RunFn = Callable[[], Any]  # Runs one batch; returns an array or a tensor.


class ExpertProgram(NamedTuple):
  """An expert's function and its abstract arguments, see `jit_per_device`."""

  function: Callable[[PyTree, PyTree], PyTree]
  params: PyTree  # Shapes and dtypes.
  rows: PyTree  # Shapes and dtypes of all devices' rows.


def run(
  kind: str,
  *,
  variant: str = "S",
  batch_size: int = 1,
  rounds: int = 5,
  against: str = "transformers",
  threads: int = 2,
  topology: str | None = None,
) -> harness.BenchResult:
  """Times an expert in float32, from pixels to model outputs.

  Args:
    kind: a key of `MODELS`.
    variant: size of the expert; its weights are random.
    batch_size: images per device.
    rounds: timed rounds of one batch, after one warm-up round.
    against: "transformers" with equal weights and pixels, in alternating
      rounds, or "none".
    threads: PyTorch threads; JAX uses the process's, see `against_torch.pin`.
    topology: compile for this topology instead, see `compile_expert`.
  """
  model_lib = _import_model(kind)
  check_choice("against", against, AGAINST)
  if topology:
    return compile_expert(
      kind, variant=variant, batch_size=batch_size, topology=topology
    )
  versions = {"jax": jax.__version__}
  if against == "none":
    fns = [_random_fn(model_lib, variant, batch_size)]
  else:
    if jax.local_device_count() > 1:
      raise InputError(
        f"Compare on one device: JAX has {jax.local_device_count()}."
      )
    oracle = harness.import_oracle("transformers_experts")
    torch = oracle.torch
    torch.set_num_threads(threads)
    versions |= oracle.VERSIONS
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder)
      model = oracle.WRITE[kind](variant, path)
      fns = [
        model_lib.ours(variant, path, batch_size),
        torch.inference_mode()(oracle.RUN[kind](model, batch_size)),
      ]
  # `np.asarray` waits for the results.
  fns = [lambda fn=fn: np.asarray(fn()) for fn in fns]
  with harness.Stopwatch() as compiling:
    results = [fns[0]()]
  results += [fn() for fn in fns[1:]]
  times = harness.time_rounds(fns, rounds=rounds, warmup=0)
  images = len(results[0])
  medians = [1e3 * statistics.median(t) / images for t in times.T]
  result = harness.BenchResult(
    kind=kind,
    variant=variant,
    dtype="float32",
    batch_size=images,
    threads=threads,
    versions=versions,
  )
  add = result.add
  texts = [f"{{:.1f}} ms per image, {1e3 / ms:.2f} images/s" for ms in medians]
  add("ours", medians[0], "ours", texts[0])
  label = "  first batch, with compilation"
  add("compile_seconds", compiling.wall, label, "{:.1f} s")
  if against == "none":
    result.values.update(theirs=None, speed=None, speeds=(), difference=None)
    return result
  add("theirs", medians[1], "transformers", texts[1])
  label = "our speed over theirs"
  result.add_ratio("speed", times[:, 1], times[:, 0], label, ".2f")
  difference = np.abs(results[0] - results[1]).max() / np.abs(results[1]).max()
  label = "largest difference over largest value"
  add("difference", float(difference), label, "{:.1e}")
  return result


def _import_model(kind: str) -> ModuleType:
  check_choice("kind", kind, tuple(MODELS))
  return importlib.import_module(MODELS[kind])


def _random_fn(model_lib: ModuleType, variant: str, batch_size: int) -> RunFn:
  """A function that runs the program on random parameters and rows."""
  mesh = local_mesh.local_mesh()
  program = model_lib.program(variant, batch_size, mesh, "float32")
  rng = np.random.default_rng(0)

  def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    if not np.issubdtype(leaf.dtype, np.floating):
      return np.zeros(leaf.shape, leaf.dtype)
    fan_in = max(1, math.prod(leaf.shape[:-1]))
    noise = rng.standard_normal(leaf.shape, np.float32)
    return noise * np.float32(fan_in**-0.5)

  params, rows = jax.tree.map(draw, (program.params, program.rows))
  params = local_mesh.replicate(params, mesh)
  function = local_mesh.jit_per_device(program.function, mesh)

  def call() -> jax.Array:
    results = function(params, local_mesh.shard(rows, mesh))
    return jax.block_until_ready(jax.tree.leaves(results))[0]

  return call


def random_pixels(rows: int, size: int) -> np.ndarray:
  """Random normalised pixels `[rows, size, size, 3]`, float32."""
  rng = np.random.default_rng(0)
  return rng.normal(size=(rows, size, size, 3)).astype(np.float32)


def compile_expert(
  kind: str, *, variant: str, batch_size: int, topology: str
) -> harness.BenchResult:
  """Compiles an expert in bfloat16 for one device of a topology.

  All devices run one program, so the topology's size does not matter.
  """
  parsed = topologies.parse(topology)
  topologies.use_cpu(parsed)
  chip = parsed.chip
  mesh = make_mesh({"data": 1}, topologies.devices(parsed)[:1])
  program = _import_model(kind).program(variant, batch_size, mesh, "bfloat16")

  def shard(tree, to):
    return jax.tree.map(lambda x: x.update(sharding=to), tree)

  params = shard(program.params, replicated_sharding(mesh))
  rows = shard(program.rows, NamedSharding(mesh, BATCH_SPEC))
  function = local_mesh.jit_per_device(program.function, mesh)
  memory = Memory.of(function.lower(params, rows).compile(), chip.hbm_bytes)
  cost = flops.count(program.function, params, rows).flops / batch_size
  result = harness.BenchResult(
    kind=kind,
    variant=variant,
    dtype="bfloat16",
    topology=topology,
    batch_size=batch_size,
    parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(params)),
  )
  limit, peak = chip.hbm_bytes, chip.peak_bf16_flops
  rate = f"{peak / cost:.0f} images/s" if peak else "unknown"
  add, gigabytes = result.add, "{:.3f} GB"
  add("arguments", memory.arguments, "parameters and a batch", gigabytes, 1e9)
  add("temporaries", memory.temporaries, "temporaries", gigabytes, 1e9)
  add("outputs", memory.output, "results", gigabytes, 1e9)
  text = gigabytes if limit else "unknown"
  add("memory", limit, "memory of the chip", text, 1e9)
  add("flops", cost, "FLOPs per image", "{:.1f} GFLOP", 1e9)
  add("peak", peak, "at the chip's peak", rate)
  return result
