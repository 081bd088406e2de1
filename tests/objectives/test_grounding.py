"""Losses of grounding against NumPy in float64, and their edge cases."""

import functools

import grounding_samples as samples
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.models.heads import prompter
from mtv_jax.objectives import base, grounding, pairwise
from mtv_jax.parallel import ring


def regions(n=7, seed=0, **changes):
  rng = np.random.default_rng(seed)
  # Exact in float32, so that both sides compute with equal values.
  region, text = np.float64(
    np.float32(samples.unit(rng.normal(size=(2, n, 5))))
  )
  sample = dict(
    region=region,
    text=text,
    scale=np.float64(4.0),
    bias=np.float64(-1.5),
    phrase_id=rng.integers(0, 4, n).astype(np.uint32),
    valid=rng.uniform(size=n) < 0.7,
  )
  return sample | changes


CASES = {
  "random": regions(),
  "all valid": regions(valid=np.ones(7, bool)),
  "all phrases equal": regions(phrase_id=np.full(7, 9, np.uint32)),
  "none valid": regions(valid=np.zeros(7, bool)),
  "one region": regions(valid=np.arange(7) == 3),
  "one in the batch": regions(n=1, valid=np.ones(1, bool)),
  "equal regions and texts": regions(
    region=np.tile([1.0, 0, 0, 0, 0], (7, 1)),
    text=np.tile([0.0, 1, 0, 0, 0], (7, 1)),
  ),
  "huge logits": regions(scale=np.float64(2.0**14), bias=np.float64(-500.0)),
}


def ids_of(sample):
  index = jnp.arange(len(sample["valid"]))
  return grounding.RegionIds(index, sample["phrase_id"], sample["valid"])


@functools.partial(jax.jit, static_argnames="chunk")
def value_and_gradients(sample, chunk=None):
  ids = ids_of(sample)

  def loss(region, text, scale, bias):
    total, matches = pairwise.sum_losses(
      ring.EmbeddingBatch(region, ids),
      ring.EmbeddingBatch(text, ids),
      pairwise.Affine(scale, bias),
      pair_loss_fn=grounding.region_losses,
      merge_fn=grounding.merge_matches,
      method="gathered",
      mesh=None,
      chunk=chunk,
    )
    return base.WeightedMean(total, sample["valid"].sum()).value(), matches

  floats = [
    jnp.asarray(sample[k], jnp.float32)
    for k in ("region", "text", "scale", "bias")
  ]
  return jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*floats)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_numpy(case):
  sample = CASES[case]
  (value, _), gradients = value_and_gradients(sample)
  reference = functools.partial(
    samples.region_loss, phrase_id=sample["phrase_id"], valid=sample["valid"]
  )
  floats = [sample[k] for k in ("region", "text", "scale", "bias")]
  np.testing.assert_allclose(value, reference(*floats), rtol=1e-5)
  for got, expected in zip(
    gradients, samples.gradients_of(reference, *floats), strict=True
  ):
    assert np.isfinite(got).all()
    error = np.linalg.norm(got - expected)
    assert error <= 1e-5 * np.linalg.norm(expected) + 1e-7


@pytest.mark.parametrize("chunk", [1, 3, 7])
@pytest.mark.parametrize("case", ["random", "huge logits", "none valid"])
def test_chunks_give_the_same(case, chunk):
  sample = CASES[case]
  whole = value_and_gradients(sample)
  parts = value_and_gradients(sample, chunk=chunk)
  # Zeros fill the last chunk and must not count as phrases.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    parts,
    whole,
  )


def test_chunks_bound_the_logits_in_memory():
  """2048 regions and 16 texts at a time, forward and backward."""
  n = 2048
  sample = regions(n=n, valid=np.ones(n, bool))
  sizes = {}
  for chunk in (None, 16):
    compiled = value_and_gradients.lower(sample, chunk=chunk).compile()
    sizes[chunk] = compiled.memory_analysis().temp_size_in_bytes
  assert sizes[None] > 4 * n * n
  assert sizes[16] < 0.1 * sizes[None]


def test_box_losses_and_gradients_equal_numpy():
  boxes = samples.some_boxes(20)
  located = np.random.default_rng(1).uniform(0.2, 0.8, size=(20, 4))
  located = np.float64(np.float32(located))

  def loss(located, boxes):
    return grounding.box_losses(located, boxes).sum()

  value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
    jnp.asarray(located, jnp.float32), jnp.asarray(boxes, jnp.float32)
  )
  np.testing.assert_allclose(value, samples.box_loss(located, boxes), rtol=1e-5)
  for got, expected in zip(
    gradients,
    samples.gradients_of(samples.box_loss, located, boxes),
    strict=True,
  ):
    error = np.linalg.norm(got - expected)
    assert error <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.reference
def test_overlap_equals_torchvision():
  torch = pytest.importorskip("torch")
  ops = pytest.importorskip("torchvision.ops")
  a, b = samples.some_boxes(50), samples.some_boxes(50, seed=1)
  a[:3], b[:3] = [0, 0, 0.2, 0.2], [0.5, 0.6, 1, 1]  # apart
  b[3:6] = a[3:6]  # equal
  b[6:9, 2:] = b[6:9, :2]  # a point
  results = grounding.overlap(jnp.asarray(a), jnp.asarray(b))
  # torchvision reads (x0, y0, x1, y1); the axes are symmetric.
  a, b = torch.tensor(a), torch.tensor(b)
  for result, function in zip(
    results, (ops.box_iou, ops.generalized_box_iou), strict=True
  ):
    expected = torch.diagonal(function(a, b)).numpy()
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("a", "b", "giou"),
  [
    ([0.1, 0.1, 0.3, 0.3], [0.1, 0.1, 0.3, 0.3], 1.0),
    ([0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], -0.5),
    ([0.2, 0.2, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2], 0.0),
    ([0, 0, 0, 0], [1, 1, 1, 1], -1.0),
    ([0, 0, 0, 1], [0, 0, 0, 0.5], 0.0),
  ],
  ids=["equal", "touching", "one point", "two points", "lines"],
)
def test_boxes_at_the_edge_have_finite_gradients(a, b, giou):
  a, b = jnp.asarray([a], jnp.float32), jnp.asarray([b], jnp.float32)
  np.testing.assert_allclose(grounding.overlap(a, b)[1], [giou], atol=1e-6)
  gradients = jax.grad(
    lambda a, b: grounding.box_losses(grounding.centres(a), b).sum(), (0, 1)
  )(a, b)
  assert np.isfinite(gradients).all()


def test_corners_and_centres_are_inverse():
  boxes = jnp.asarray(samples.some_boxes(5), jnp.float32)
  np.testing.assert_allclose(
    prompter.corners(grounding.centres(boxes)), boxes, atol=1e-6
  )
