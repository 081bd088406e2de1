"""Encoder benchmark: features, a k-NN evaluation, dense features by shape."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mtv_jax.encoder import loading
from mtv_jax.encoder.batched import padded_batch_size
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals import run as evals_lib
from mtv_jax.evals.core import dense
from mtv_jax.parallel.mesh import BATCH_SPEC, num_batch_shards
from mtv_jax.perf.bench import data, harness


def run(
  encoder: str = "random:S/16",
  *,
  images: int = 256,
  batch_size: int = 64,
  rounds: int = 3,
  dtype: str = "float32",
) -> harness.BenchResult:
  """Times an encoder on JPEGs of scenes, a quarter larger than its input.

  Args:
    encoder: a run, an export, a Hugging Face folder or a baseline.
    images: images per round.
    batch_size: images per step, over all devices.
    rounds: timed rounds, after one warm-up round.
    dtype: computation dtype.
  """
  model = loading.load(encoder, dtype=dtype)
  size = model.preprocess.size
  files = data.make_scene_files(size, images)
  rows = padded_batch_size(images, batch_size, num_batch_shards(model.mesh))
  sharding = NamedSharding(model.mesh, BATCH_SPEC)
  batch = jnp.zeros((rows, size, size, 3), jnp.float32, device=sharding)
  function = model._image_function((), ("pooled",))
  steps = max(images // rows, 1)

  def forward():
    params = model.params["image"]
    jax.block_until_ready([function(params, batch) for _ in range(steps)])

  def encode():
    model.image(files, outputs=("pooled",), batch_size=batch_size)

  times = harness.time_rounds([forward, encode], rounds=rounds)
  forward_rate = rows * steps / statistics.median(times[:, 0])
  encode_rate = images / statistics.median(times[:, 1])
  count = images // 2
  evaluators = evals_lib.build(
    {"knn": dict(type="knn", count=count, train_count=count)}
  )
  with harness.Stopwatch() as evaluation:
    results = evals_lib.evaluate(model, evaluators)
  by_shape = _time_shapes(model, images, batch_size=batch_size, rounds=rounds)
  result = harness.BenchResult(
    encoder=repr(model),
    images=images,
    batch_size=rows,
    devices=harness.describe_devices(),
  )
  add, rate = result.add, "{:.1f} images/s"
  add("forward", forward_rate, "forward alone", rate)
  add("encode", encode_rate, "Encoder.image, from files", rate)
  evaluation_rate = 2 * count / evaluation.wall
  add("evaluation", evaluation_rate, "k-NN on scenes, end to end", rate)
  add("accuracy", max(results["knn"].metrics.values()))
  share = encode_rate / forward_rate
  add("share", share, "Encoder.image / forward", "{:.1%}")
  for name, times, label in zip(
    ("by_shape", "one_by_one"),
    by_shape.T,
    ("Encoder.dense, four shapes in batches", "Encoder.dense, image by image"),
    strict=True,
  ):
    add(name, images / statistics.median(times), label, rate)
  label = "batches / one image at a time"
  result.add_ratio("batching", by_shape[:, 1], by_shape[:, 0], label, ".2f")
  return result


def _time_shapes(
  encoder: Encoder, count: int, *, batch_size: int, rounds: int
) -> np.ndarray:
  """Seconds `[rounds, 2]` of `dense`: batched by random shape, one by one."""
  size, patch = encoder.preprocess.size, encoder.spec.image.patch_size
  rng = np.random.default_rng(0)
  images = [
    np.zeros((size, size + patch * extra, 3), np.uint8)
    for extra in rng.integers(0, 4, count)
  ]

  def encode(rows):
    def encode_batch(batch):
      return encoder.dense(batch, batch_size=rows).patches

    for _ in dense.map_by_group(
      encode_batch, images, np.shape, batch_size=rows
    ):
      pass

  return harness.time_rounds(
    [lambda: encode(batch_size), lambda: encode(1)], rounds=rounds
  )
