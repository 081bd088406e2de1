"""Dense features of blocks, their batches, and the work shared by hosts."""

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest
import trainings

from mtv_jax.encoder import baselines
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import ImageFeatures
from mtv_jax.evals.core import dense, examples
from mtv_jax.evals.correspondence.geometric import GeometricCorrespondence
from mtv_jax.evals.correspondence.semantic import SemanticCorrespondence
from mtv_jax.evals.datasets import posed
from mtv_jax.evals.depth.depth_probe import DepthProbe
from mtv_jax.evals.segmentation.segmentation_probe import Segmentation
from mtv_jax.parallel.distributed import shared_map
from mtv_jax.parallel.mesh import make_mesh
from mtv_jax.utils.errors import InputError

IMAGES = [np.zeros((16, 24, 3), np.float32)] * 5


class TokenEncoder(Encoder):
  """Random tokens of blocks, and normalised ones of the last block."""

  def __init__(self):
    rng = np.random.default_rng(0)
    spec = baselines.load("pixels:32/8").spec
    fields = dict(width=3, depth=4, cls_token=True, final_norm=True)
    image = dataclasses.replace(spec.image, **fields)
    self.spec = dataclasses.replace(spec, image=image)
    norm = {
      name: rng.normal(size=3).astype(np.float32) for name in ("scale", "bias")
    }
    self.params = {"image": {"norm": norm}}
    self.blocks = rng.normal(size=(5, 5, 2, 3, 3)).astype(np.float32)
    self.cls = rng.normal(size=(5, 5, 4, 3)).astype(np.float32)

  def dense(self, images, *, layers=(), outputs=("patches",), batch_size=16):
    return ImageFeatures(
      pooled=None,
      patches=self.blocks[-1] if "patches" in outputs else None,
      prefix=self.cls[-1] if "prefix" in outputs else None,
      layers={i: self.blocks[i] for i in layers},
      prefix_layers={i: self.cls[i] for i in layers},
    )


def normalised(encoder, x):
  norm, x = encoder.params["image"]["norm"], x.astype(np.float64)
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  return x * norm["scale"] + norm["bias"]


def test_blocks_are_normalised_and_concatenated():
  encoder = TokenEncoder()
  blocks = encoder.blocks
  inner = [normalised(encoder, x) for x in blocks[:3]]
  for kwargs, parts in (
    ({"blocks": (0, 1, 2, 3), "norm": "final"}, [*inner, blocks[-1]]),
    ({"blocks": (0, 1, 2, 3), "norm": "none"}, blocks[:4]),
    ({"blocks": (3,), "norm": "final"}, blocks[-1:]),
    ({"blocks": (2,), "norm": "none"}, blocks[2:3]),
  ):
    got = dense.features(encoder, IMAGES, batch_size=2, **kwargs)
    np.testing.assert_allclose(got, np.concatenate(parts, -1), atol=1e-5)


@pytest.mark.parametrize("norm", ["none", "final"])
def test_the_cls_token_is_beside_every_patch(norm):
  encoder = TokenEncoder()
  got = dense.features(
    encoder, IMAGES, (2, 3), norm=norm, cls=True, batch_size=2
  )
  cls = np.broadcast_to(encoder.cls[:, :, None, None, 0], encoder.blocks.shape)
  parts = [tokens[2] for tokens in (encoder.blocks, cls)]
  if norm == "final":
    parts = [normalised(encoder, x) for x in parts]
  last = 3 if norm == "none" else 4
  parts += [encoder.blocks[last], cls[last]]
  np.testing.assert_allclose(got, np.concatenate(parts, -1), atol=1e-5)


def test_map_by_group_fills_batches_and_has_the_order_of_map():
  rng, read, batches = np.random.default_rng(0), [], []

  def items():
    for i, side in enumerate(rng.integers(1, 4, 200)):
      read.append(i)
      yield np.full((side, 2), i)

  def double(batch):
    assert len({x.shape for x in batch}) == 1
    batches.append(len(batch))
    return [2 * x for x in batch]

  results = dense.map_by_group(double, items(), np.shape, batch_size=8)
  for i, result in enumerate(results):
    assert (result == 2 * i).all()
    # Items are read as they are needed, and at most eight batches wait.
    assert len(read) <= i + 8 * 8 + 1
  assert i == 199
  # Only the last batch of each of the three shapes may be smaller.
  assert sum(batches) == 200 and sum(b < 8 for b in batches) <= 3


def test_map_by_group_bounds_the_wait_of_a_rare_group():
  batches = []
  groups = [0, *[1] * 80, 0, *[1] * 80]
  results = dense.map_by_group(
    lambda batch: batches.append(batch) or batch,
    groups,
    lambda item: item,
    batch_size=8,
  )
  assert list(results) == groups
  assert [b for b in batches if 0 in b] == [[0], [0]]
  assert list(dense.map_by_group(list, [], len, batch_size=8)) == []


def test_examples_depend_only_on_seed_step_and_row():
  def read(i, rng):
    return np.full((2, 2), i), rng.random((2, 2))

  def batches(seed, batch_size=3):
    return list(
      dense.training_batches(
        np.stack, read, 5, batch_size=batch_size, steps=4, seed=seed
      )
    )

  first, again, other = batches(0), batches(0), batches(1)
  for a, b in zip(first, again, strict=True):
    for name in ("features", "targets"):
      np.testing.assert_array_equal(a[name], b[name])
  assert any(
    (a["targets"] != b["targets"]).any()
    for a, b in zip(first, other, strict=True)
  )
  for step, row in ((0, 2), (3, 1)):
    want = np.random.default_rng((0, step, row)).random((2, 2))
    np.testing.assert_array_equal(first[step]["targets"][row], want)
  # Each epoch has every example once.
  order = np.concatenate([batch["features"][:, 0, 0] for batch in first])
  assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))


def test_cached_batches_have_the_order_of_training():
  examples = [(np.full((1, 1), i), np.full((1, 1), -i)) for i in range(5)]
  encoded = dense.encode_batches(np.stack, examples, batch_size=2)
  cached = dense.cached_batches(encoded, batch_size=3, seed=0)
  options = {"batch_size": 3, "steps": 4, "seed": 0}
  for step, batch in enumerate(
    dense.training_batches(np.stack, lambda i, _: examples[i], 5, **options)
  ):
    got = cached(step)
    np.testing.assert_array_equal(got["features"], batch["features"])
    np.testing.assert_array_equal(got["targets"], -got["features"])


# Steps train on images that are read once.
_SMALL = {"steps": 2, "train_count": 40, "count": 40}
EVALUATORS = {
  "depth": DepthProbe(augment="flip", batch_size=20, **_SMALL),
  "segmentation": Segmentation(**_SMALL),
  "geometric": GeometricCorrespondence(count=40),
  "semantic": SemanticCorrespondence(count=40),
}


def evaluate(devices):
  """Metrics, errors and numbers of decoded images of the evaluations."""
  reads: list[str] = []  # Threads append to it.
  encoder = baselines.load(
    "pixels:32/8", mesh=make_mesh({"data": len(devices)}, devices)
  )
  output = {}

  def counted(read):
    def read_item(*args, **options):
      reads.append(read.__name__)
      return read(*args, **options)

    return read_item

  with pytest.MonkeyPatch.context() as patch:
    for owner, name in (
      (examples.LazySequence, "__getitem__"),
      (posed, "make_view"),
    ):
      patch.setattr(owner, name, counted(getattr(owner, name)))
    for name, evaluator in EVALUATORS.items():
      reads.clear()
      result = evaluator.run(encoder)
      count = max(collections.Counter(reads).values())
      output[name] = [result.metrics, result.errors, count]
  return output


def write_shared(path):
  """Stores one process's evaluation, and the second process's error."""
  output = evaluate(jax.devices())

  def read(i):
    if i == 21:
      raise ValueError("no item 21")
    return i

  with pytest.raises((InputError, ValueError)) as raised:
    list(shared_map(read, range(40)))
  output["error"] = f"{raised.typename}: {raised.value}"
  with open(path, "w") as file:
    json.dump(output, file)


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_decode_their_shares(tmp_path):
  """Each half of the images; both get the result of one process."""
  code = """
import sys
sys.path.insert(0, sys.argv[2])
import test_dense
test_dense.write_shared(f"{sys.argv[1]}/{process}.json")
"""
  folder = str(trainings.ROOT / "tests" / "evals" / "core")
  trainings.run_pair(code, str(tmp_path), folder, devices=1)
  shared = [json.loads((tmp_path / f"{i}.json").read_text()) for i in (0, 1)]
  assert [s.pop("error") for s in shared] == [
    "InputError: process 1 failed: ValueError: no item 21",
    "ValueError: no item 21",
  ]
  alone = evaluate(jax.devices()[:2])
  for name, (metrics, errors, reads) in alone.items():
    for got in shared:
      assert got[name][0] == pytest.approx(metrics, rel=1e-5), name
      assert got[name][1] == pytest.approx(errors, rel=1e-4), name
      # All read a few images, such as the first one for its size.
      assert got[name][2] <= reads / 2 + 6, name
