"""Assignments and cross-entropies against NumPy in float64, and edge cases."""

import jax
import jax.numpy as jnp
import numpy as np
import prototype_samples as samples
import pytest

from mtv_jax.objectives import prototypes

TEACHER_TEMP, STUDENT_TEMP = 0.4, 0.5


def side(logits, temperature, dtype=jnp.float32):
  """A side whose logits [n, v, k] are exactly these: unit vectors pick them."""
  n, v, k = logits.shape
  return prototypes.PrototypeLogits(
    jnp.eye(n * v, dtype=dtype).reshape(n, v, n * v),
    jnp.asarray(logits.reshape(n * v, k), dtype),
    temperature,
  )


def sinkhorn_assignments(teacher, valid, **options):
  @jax.jit
  def compute(teacher, valid):
    scalings = prototypes.sinkhorn(teacher, valid, **options)
    logits = teacher.chunk(teacher.prototypes)
    return jnp.exp(logits + scalings.rows[..., None] + scalings.columns)

  return np.asarray(compute(teacher, jnp.asarray(valid)))


def masked_sinkhorn(logits, valid, iterations=3):
  """The reference on only the valid rows, scattered back."""
  q = np.full(logits.shape, np.nan)
  q[valid] = samples.sinkhorn(logits[valid] / TEACHER_TEMP, iterations)
  return q


@pytest.mark.parametrize(("iterations", "chunk"), [(1, None), (3, 4), (3, 1)])
def test_sinkhorn_equals_numpy_on_the_valid_rows(iterations, chunk):
  rng = np.random.default_rng(0)
  logits, valid = rng.normal(size=(5, 2, 8)), rng.random((5, 2)) < 0.7
  actual = sinkhorn_assignments(
    side(logits, TEACHER_TEMP), valid, iterations=iterations, chunk=chunk
  )
  expected = masked_sinkhorn(logits, valid, iterations)
  np.testing.assert_allclose(actual[valid], expected[valid], rtol=1e-5)
  # Invalid rows get an assignment too, in case something reads it.
  np.testing.assert_allclose(actual.sum(-1), 1.0, rtol=1e-5)


def test_sinkhorn_columns_have_equal_sums():
  logits = np.random.default_rng(1).normal(size=(6, 2, 4))
  valid = np.arange(12).reshape(6, 2) != 5
  q = sinkhorn_assignments(side(logits, TEACHER_TEMP), valid, iterations=40)
  np.testing.assert_allclose(q.sum(-1), 1.0, rtol=1e-5)
  np.testing.assert_allclose(q[valid].sum(0), 11 / 4, rtol=1e-4)


def test_sinkhorn_of_large_logits_does_not_overflow():
  logits = np.random.default_rng(2).uniform(-8, 8, size=(6, 1, 8))
  with np.errstate(over="ignore"):
    assert np.isinf(np.exp(np.float32(logits / 0.06)).sum())
  actual = sinkhorn_assignments(side(logits, 0.06), np.ones((6, 1), bool))
  expected = samples.sinkhorn(logits[:, 0] / 0.06)
  np.testing.assert_allclose(actual[:, 0], expected, rtol=2e-4, atol=1e-7)


EDGES = {
  "all equal": (np.full((4, 1, 6), 3.0), np.ones((4, 1), bool)),
  "one row": (np.arange(6.0).reshape(1, 1, 6), np.ones((1, 1), bool)),
  "huge": (
    np.random.default_rng(3).normal(size=(4, 2, 6)) * 1e4,
    np.ones((4, 2), bool),
  ),
  "all masked out": (
    np.random.default_rng(4).normal(size=(4, 2, 6)),
    np.zeros((4, 2), bool),
  ),
}


@pytest.mark.parametrize(
  ("target", "chunk"), [("sinkhorn", 3), ("centring", None)]
)
@pytest.mark.parametrize("case", EDGES)
def test_edges_are_finite_in_value_and_gradient(case, target, chunk):
  logits, valid = EDGES[case]
  valid, k = jnp.asarray(valid), logits.shape[-1]

  def losses(student_logits):
    teacher = side(logits, TEACHER_TEMP)
    student = side(student_logits, STUDENT_TEMP)
    if target == "sinkhorn":
      scalings = prototypes.sinkhorn(teacher, valid, chunk=chunk)
    else:
      scalings = prototypes.centered_softmax(teacher, jnp.ones(k), chunk=chunk)
    return prototypes.cross_entropies(
      teacher, scalings, student, valid, chunk=chunk
    )

  @jax.jit
  def compute(logits):
    result, pull = jax.vjp(losses, logits)
    ones = jax.tree.map(jnp.ones_like, result)
    return result, pull(ones)[0]

  result, gradient = compute(jnp.asarray(logits[::-1], jnp.float32))
  for x in [*jax.tree.leaves(result), gradient]:
    assert np.isfinite(x).all()
  if case == "all equal":
    np.testing.assert_allclose(result.cross_entropy, np.log(6), rtol=1e-5)
    np.testing.assert_allclose(result.entropy, np.log(6), rtol=1e-5)
    np.testing.assert_allclose(result.mean_entropy, np.log(6), rtol=1e-5)
  if case == "one row" and target == "sinkhorn":
    # A single row is assigned to all prototypes equally.
    np.testing.assert_allclose(result.entropy, np.log(6), rtol=1e-5)


def numpy_compare(q, logits):
  predictions = samples.log_softmax(logits / STUDENT_TEMP)
  return -np.einsum("ngk,nvk->ngv", q, predictions)


@pytest.mark.parametrize(
  ("target", "chunk"), [("sinkhorn", None), ("sinkhorn", 4), ("centring", 4)]
)
def test_cross_entropy_and_gradient_equal_numpy(target, chunk):
  rng = np.random.default_rng(5)
  vectors, matrix = rng.normal(size=(4, 3, 5)), rng.normal(size=(5, 8))
  logits, center = rng.normal(size=(4, 2, 8)), rng.normal(size=8)
  valid = np.ones((4, 2), bool)
  weights = rng.random((4, 2, 3))
  if target == "sinkhorn":
    q = masked_sinkhorn(logits, valid)
  else:
    q = np.exp(samples.log_softmax((logits - center) / TEACHER_TEMP))

  def reference(vectors, matrix):
    return (weights * numpy_compare(q, vectors @ matrix)).sum()

  def ours(vectors, matrix):
    teacher = side(logits, TEACHER_TEMP)
    student = prototypes.PrototypeLogits(vectors, matrix, STUDENT_TEMP)
    if target == "sinkhorn":
      scalings = prototypes.sinkhorn(teacher, jnp.asarray(valid), chunk=chunk)
    else:
      scalings = prototypes.centered_softmax(
        teacher, jnp.asarray(center, jnp.float32), chunk=chunk
      )
    actual = prototypes.cross_entropies(
      teacher, scalings, student, jnp.asarray(valid), chunk=chunk
    )
    return (weights * actual.cross_entropy).sum(), actual

  inputs = jnp.asarray(vectors, jnp.float32), jnp.asarray(matrix, jnp.float32)
  (value, actual), gradients = jax.jit(
    jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)
  )(*inputs)
  np.testing.assert_allclose(value, reference(vectors, matrix), rtol=1e-5)
  expected = (
    samples.numeric_gradient(lambda x: reference(x, matrix), vectors),
    samples.numeric_gradient(lambda x: reference(vectors, x), matrix),
  )
  for gradient, reference in zip(gradients, expected, strict=True):
    np.testing.assert_allclose(gradient, reference, rtol=1e-4, atol=1e-5)

  np.testing.assert_allclose(
    actual.entropy, -(q * np.log(q)).sum(-1), rtol=1e-5
  )
  mean = q.mean((0, 1))
  np.testing.assert_allclose(
    actual.mean_entropy, -(mean * np.log(mean)).sum(), rtol=1e-5
  )
  assert actual.share_used == len(np.unique(q.argmax(-1))) / 8


@pytest.mark.parametrize("chunk", [None, 4])
def test_diagnostics_are_of_the_valid_rows(chunk):
  # Valid rows prefer prototypes 5, 5 and 2; the invalid one 7.
  best = np.array([5, 7, 5, 2])
  logits = 10.0 * np.eye(8)[best][:, None]
  valid = jnp.asarray(best != 7)[:, None]

  @jax.jit
  def compute(teacher):
    scalings = prototypes.centered_softmax(teacher, jnp.zeros(8), chunk=chunk)
    return prototypes.cross_entropies(
      teacher, scalings, teacher, valid, chunk=chunk
    )

  actual = compute(side(logits, 1.0))
  np.testing.assert_allclose(actual.share_used, 2 / 3, rtol=1e-6)
  q = np.exp(samples.log_softmax(logits[:, 0]))[best != 7].mean(0)
  np.testing.assert_allclose(
    actual.mean_entropy, -(q * np.log(q)).sum(), rtol=1e-5
  )


def test_teacher_gets_no_gradient():
  logits = np.random.default_rng(6).normal(size=(3, 1, 4))
  valid = jnp.ones((3, 1), bool)

  def loss(matrix, center):
    teacher = side(logits, TEACHER_TEMP).replace(prototypes=matrix)
    scalings = prototypes.sinkhorn(teacher, valid)
    more = prototypes.centered_softmax(teacher, center)
    student = side(logits, STUDENT_TEMP)
    return sum(
      prototypes.cross_entropies(teacher, s, student, valid).cross_entropy.sum()
      for s in (scalings, more)
    )

  gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(
    jnp.asarray(logits[:, 0], jnp.float32), jnp.ones(4)
  )
  for gradient in gradients:
    np.testing.assert_array_equal(gradient, 0.0)


def test_center_is_updated_by_the_valid_rows():
  logits = np.random.default_rng(7).normal(size=(3, 2, 4))
  teacher = side(logits, TEACHER_TEMP)
  valid = np.array([[1, 0], [1, 1], [0, 0]], bool)
  center = jnp.arange(4.0)
  moved = prototypes.update_center(
    center, teacher, jnp.asarray(valid), momentum=0.9
  )
  expected = 0.9 * np.arange(4) + 0.1 * logits[valid].mean(0)
  np.testing.assert_allclose(moved, expected, rtol=1e-5)
  none = prototypes.update_center(
    center, teacher, jnp.zeros((3, 2), bool), momentum=0.9
  )
  np.testing.assert_array_equal(none, center)


def test_chunks_bound_the_logits_in_memory():
  n, k, d = 256, 4096, 8
  rng = np.random.default_rng(8)
  rows = jnp.asarray(rng.normal(size=(n, 1, d)), jnp.float32)
  matrix = jnp.asarray(rng.normal(size=(d, k)), jnp.float32)
  valid = jnp.ones((n, 1), bool)

  def compiled(chunk):
    def loss(rows, matrix):
      teacher = prototypes.PrototypeLogits(rows, matrix, TEACHER_TEMP)
      scalings = prototypes.sinkhorn(teacher, valid, chunk=chunk)
      student = prototypes.PrototypeLogits(rows, matrix, STUDENT_TEMP)
      return prototypes.cross_entropies(
        teacher, scalings, student, valid, chunk=chunk
      ).cross_entropy.mean()

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return step.lower(rows, matrix).compile()

  whole, chunked = compiled(None), compiled(256)
  sizes = [x.memory_analysis().temp_size_in_bytes for x in (whole, chunked)]
  assert sizes[1] < sizes[0] / 4
  (a, da), (b, db) = whole(rows, matrix), chunked(rows, matrix)
  np.testing.assert_allclose(a, b, rtol=1e-6)
  for x, y in zip(da, db, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7)
