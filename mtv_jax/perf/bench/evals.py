"""How fast images become features, and an evaluation a figure."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time

import jax
import numpy as np
from jax.sharding import NamedSharding

from mtv_jax.encoder import loading
from mtv_jax.encoder.batched import padded_batch
from mtv_jax.evals import run as evals_lib
from mtv_jax.parallel.mesh import BATCH_SPEC, num_batch_shards
from mtv_jax.perf.bench import data, floors


@dataclasses.dataclass(frozen=True)
class EvalSpeed:
  """What `bench_eval` measured, in images a second over all devices.

  Attributes:
    forward: the compiled tower on a batch that lies on the devices.
    encode: `Encoder.image` of encoded files.
    evaluation: a whole k-NN evaluation on the scenes, which it renders.
    accuracy: of that evaluation: a figure came out.
    images: encoded in a round.
    batch_size: of a step.
    encoder: what was loaded.
    devices: kind and number.
  """

  forward: float
  encode: float
  evaluation: float
  accuracy: float
  images: int
  batch_size: int
  encoder: str
  devices: str

  @property
  def share(self) -> float:
    """Of the forward pass's speed that `Encoder.image` reaches."""
    return self.encode / self.forward

  def to_json(self) -> str:
    """As one line of JSON."""
    return json.dumps({**dataclasses.asdict(self), "share": self.share})

  def __str__(self) -> str:
    rows = [
      ("forward alone", self.forward),
      ("Encoder.image, from files", self.encode),
      ("k-NN on scenes, end to end", self.evaluation),
    ]
    head = f"{self.encoder}, batch {self.batch_size}, {self.devices}"
    lines = [head, f"{'':28}{'images/s':>10}"]
    lines += [f"{name:28}{rate:10.1f}" for name, rate in rows]
    return "\n".join([*lines, f"Encoder.image / forward: {self.share:.1%}"])


def bench_eval(
  model: str = "random:S/16",
  *,
  images: int = 256,
  batch_size: int = 64,
  rounds: int = 3,
  dtype: str = "float32",
) -> EvalSpeed:
  """Times an encoder.

  Args:
    model: what `mtv_jax.load` opens.
    images: of a round; JPEGs of scenes, a quarter larger than the input.
    batch_size: images a step over all devices.
    rounds: of each; one more warms up.
    dtype: of the computation.
  """
  encoder = loading.load(model, dtype=dtype)
  size = encoder.preprocess.size
  files = data.scene_files(size, images)
  rows = padded_batch(images, batch_size, num_batch_shards(encoder.mesh))
  batch = jax.device_put(
    np.zeros((rows, size, size, 3), np.float32),
    NamedSharding(encoder.mesh, BATCH_SPEC),
  )
  function = encoder._image_function((), ("pooled",))
  steps = max(images // rows, 1)

  def forward():
    return [function(encoder.params["image"], batch) for _ in range(steps)]

  def encode():
    return encoder.image(files, outputs=("pooled",), batch_size=batch_size)

  forwards, encodes = [], []
  jax.block_until_ready(forward())
  encode()
  for _ in range(rounds):
    forwards.append(_seconds(lambda: jax.block_until_ready(forward())))
    encodes.append(_seconds(encode))
  counts = dict(count=images // 2, train_count=images // 2)
  evaluators = evals_lib.build({"knn": dict(type="knn", **counts)})
  results = {}
  whole = _seconds(
    lambda: results.update(evals_lib.evaluate(encoder, evaluators))
  )
  return EvalSpeed(
    forward=rows * steps / statistics.median(forwards),
    encode=images / statistics.median(encodes),
    evaluation=sum(counts.values()) / whole,
    accuracy=max(results["knn"].metrics.values()),
    images=images,
    batch_size=rows,
    encoder=repr(encoder),
    devices=floors.devices(),
  )


def _seconds(function) -> float:
  begin = time.perf_counter()
  function()
  return time.perf_counter() - begin
