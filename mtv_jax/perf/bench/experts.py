"""Expert benchmark: against `transformers`, or compiled ahead of time for TPU.

tools/transformers_experts.py writes the folders and runs `transformers`.
"""

import math
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from mtv_jax.convert import depth_anything as depth_weights
from mtv_jax.experts import base, depth_anything, owlv2, owlv2_model
from mtv_jax.experts.labelling.phrases import FixedPhrases
from mtv_jax.experts.owlv2_model import Owlv2
from mtv_jax.models import two_tower
from mtv_jax.models.heads import dpt
from mtv_jax.parallel.mesh import BATCH_SPEC, make_mesh, replicated_sharding
from mtv_jax.perf import flops, topologies
from mtv_jax.perf.bench import harness
from mtv_jax.perf.preflight.compile import Memory
from mtv_jax.utils.errors import InputError, check_choice

AGAINST = ("transformers", "none")
# Input size of Depth Anything V2.
SIZE = 518


def _make_tower(width: int, depth: int, heads: int, **options: int) -> dict:
  return dict(
    hidden_size=width,
    intermediate_size=4 * width,
    num_hidden_layers=depth,
    num_attention_heads=heads,
    **options,
  )


# Differences from the default config of OWLv2, B/16 at 768 pixels.
OWLV2_CONFIGS: Mapping[str, dict[str, Any]] = {
  "tiny": dict(
    projection_dim=64,
    text_config=_make_tower(64, 2, 4),
    vision_config=_make_tower(64, 2, 4, image_size=96),
  ),
  "B": dict(vision_config=dict(image_size=960)),
  "L": dict(
    projection_dim=768,
    text_config=_make_tower(768, 12, 12),
    vision_config=_make_tower(1024, 24, 16, image_size=1008, patch_size=14),
  ),
}
PHRASES = ("a dog", "person", "red car", "tree", "traffic light", "boat")
# Queries per image: about the n-grams of one caption.
_QUERIES = 64

RunFn = Callable[[], Any]  # Runs one batch; returns an array or a tensor.


class ExpertProgram(NamedTuple):
  """An expert's function and its abstract arguments, see `jit_per_device`."""

  function: Callable[[PyTree, PyTree], PyTree]
  params: PyTree  # Shapes and dtypes.
  rows: PyTree  # Shapes and dtypes of all devices' rows.


class DepthAnything:
  """Depth Anything V2, with a folder's weights or as a program per device."""

  @staticmethod
  def make_config(variant: str) -> dict[str, Any]:
    """The `config.json` of any variant in `two_tower.VARIANTS`."""
    shape = two_tower.VARIANTS[variant]
    width, depth = shape["width"], shape["depth"]
    return dict(
      backbone_config=dict(
        model_type="dinov2",
        image_size=SIZE,
        patch_size=14,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=shape["heads"],
        out_indices=[i + 1 for i in dpt.quarter_layers(depth)],
        reshape_hidden_states=False,
      ),
      reassemble_hidden_size=width,
      neck_hidden_sizes=list(dpt.default_shape(width)[1]),
      fusion_hidden_size=dpt.default_shape(width)[0],
      head_hidden_size=32,
    )

  def make_run_fn(self, variant, folder, batch_size):
    del variant
    options = dict(preprocess="square", size=SIZE, dtype="float32")
    expert = depth_anything.load_expert(
      folder, batch_size=batch_size, **options
    )
    arrays = {"images": make_random_pixels(expert.rows, SIZE)}
    return lambda: expert.run(arrays)["depth"]

  def make_program(self, variant, batch_size, mesh, dtype):
    names = ["backbone.embeddings.mask_token"]
    spec = depth_weights.read_spec(self.make_config(variant), names)
    shape = (batch_size * mesh.size, SIZE, SIZE, 3)
    return ExpertProgram(
      depth_anything.make_function(spec, dtype=dtype, mesh=mesh),
      depth_weights.abstract_params(spec),
      {"images": jax.ShapeDtypeStruct(shape, np.float32)},
    )


class OWLv2:
  """OWLv2: image tower and scores; its phrases are encoded once."""

  def make_run_fn(self, variant, folder, batch_size):
    options = dict(phrases=FixedPhrases(PHRASES), dtype="float32")
    expert = owlv2.load_expert(folder, batch_size=batch_size, **options)
    size = owlv2_model.read_spec(OWLV2_CONFIGS[variant]).image.image_size
    arrays = {"pixels": make_random_pixels(expert.rows, size)}
    return lambda: expert.run(arrays)["scores"]

  def make_program(self, variant, batch_size, mesh, dtype):
    spec = owlv2_model.read_spec(OWLV2_CONFIGS[variant])
    model = Owlv2(spec, dtype=jnp.dtype(dtype), scan=False)
    programs = owlv2.Programs(model, dtype)
    batch, size = batch_size * mesh.size, spec.image.image_size
    shape = jax.ShapeDtypeStruct

    def function(params, rows):
      patches = programs.detect(params["model"], rows)
      rows = {"patches": patches, "slots": rows["slots"]}
      return programs.score(params["consts"], rows)

    consts = {
      "table": shape((16_384, spec.text.projection), np.float32),
      "threshold": shape((), np.float32),
    }
    params = {"model": owlv2_model.abstract_params(spec), "consts": consts}
    rows = {
      "pixels": shape((batch, size, size, 3), jnp.dtype(dtype)),
      "slots": shape((batch, _QUERIES), np.int32),
    }
    return ExpertProgram(function, params, rows)


# By kind of label.
MODELS = {"depth": DepthAnything(), "boxes": OWLv2()}


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
    threads: PyTorch threads; for JAX, see `against_torch.pin`.
    topology: compile for this topology instead, see `compile_expert`.
  """
  check_choice("kind", kind, tuple(MODELS))
  check_choice("against", against, AGAINST)
  if topology:
    return compile_expert(
      kind, variant=variant, batch_size=batch_size, topology=topology
    )
  versions = {"jax": jax.__version__}
  if against == "none":
    fns = [_make_random_fn(kind, variant, batch_size)]
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
        MODELS[kind].make_run_fn(variant, path, batch_size),
        torch.inference_mode()(oracle.RUN[kind](model, batch_size)),
      ]
  # `np.asarray` waits for the results.
  fns = [lambda fn=fn: np.asarray(fn()) for fn in fns]
  with harness.Stopwatch() as compile_watch:
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
  add("compile_seconds", compile_watch.wall, label, "{:.1f} s")
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


def _make_random_fn(kind: str, variant: str, batch_size: int) -> RunFn:
  """Builds a function that runs the program on random parameters and rows."""
  mesh = base.make_local_mesh()
  program = MODELS[kind].make_program(variant, batch_size, mesh, "float32")
  rng = np.random.default_rng(0)

  def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    if not np.issubdtype(leaf.dtype, np.floating):
      return np.zeros(leaf.shape, leaf.dtype)
    fan_in = max(1, math.prod(leaf.shape[:-1]))
    noise = rng.standard_normal(leaf.shape, np.float32)
    return noise * np.float32(fan_in**-0.5)

  params, rows = jax.tree.map(draw, (program.params, program.rows))
  params = base.replicate(params, mesh)
  function = base.jit_per_device(program.function, mesh)

  def call() -> jax.Array:
    results = function(params, base.shard(rows, mesh))
    return jax.block_until_ready(jax.tree.leaves(results))[0]

  return call


def make_random_pixels(rows: int, size: int) -> np.ndarray:
  """Draws normalised pixels `[rows, size, size, 3]`, float32."""
  rng = np.random.default_rng(0)
  return rng.normal(size=(rows, size, size, 3)).astype(np.float32)


def compile_expert(
  kind: str, *, variant: str, batch_size: int, topology: str
) -> harness.BenchResult:
  """Compiles an expert in bfloat16 for one device of a topology."""
  parsed_topology = topologies.parse(topology)
  topologies.use_cpu(parsed_topology)
  chip = parsed_topology.chip
  mesh = make_mesh({"data": 1}, topologies.get_devices(parsed_topology)[:1])
  program = MODELS[kind].make_program(variant, batch_size, mesh, "bfloat16")

  def shard(tree, sharding):
    return jax.tree.map(lambda x: x.update(sharding=sharding), tree)

  params = shard(program.params, replicated_sharding(mesh))
  rows = shard(program.rows, NamedSharding(mesh, BATCH_SPEC))
  function = base.jit_per_device(program.function, mesh)
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
