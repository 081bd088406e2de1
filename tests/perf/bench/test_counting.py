"""FLOPs by shape, against formulas and against XLA's own count."""

import jax
import jax.numpy as jnp
import pytest

from mtv_jax.models import kernels
from mtv_jax.models.two_tower import ModelSpec, image_tower
from mtv_jax.perf.bench import counting


def shape(*size):
  return jax.ShapeDtypeStruct(size, jnp.float32)


def test_a_loop_counts_as_often_as_it_runs():
  def loop(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]

  found = counting.trace(loop, shape(4, 8), shape(8, 8))
  assert found.flops == 7 * 2 * 4 * 8 * 8
  assert found.reads == [True, True]


def test_what_nobody_reads_is_free_and_repeats_count_once():
  def some(x, a, b):
    return x @ a, x @ b, (x @ a) + 1

  args = (shape(4, 8), shape(8, 2), shape(8, 3))
  assert counting.trace(some, *args).flops == 2 * 4 * 8 * (2 + 3)
  found = counting.trace(some, *args, keep=[True, False, True])
  assert found.flops == 2 * 4 * 8 * 2
  assert found.reads == [True, True, False]


def test_the_same_holds_for_a_gradient_written_by_hand():
  """`linear` has one, with a branch for each platform."""
  args = (shape(4, 8), shape(8, 8))
  once = 2 * 4 * 8 * 8

  def twice(x, w):
    return kernels.linear(x, w), kernels.linear(x, w) + 1

  assert counting.trace(twice, *args).flops == once
  slopes = jax.grad(lambda *a: kernels.linear(*a).sum(), argnums=(0, 1))
  # Linear in both: the value itself is not needed.
  assert counting.trace(slopes, *args).flops == 2 * once
  found = counting.trace(slopes, *args, keep=[False, True])
  assert found.flops == once
  assert found.reads == [True, False]


@pytest.mark.parametrize("scan", [True, False])
def test_a_tower_costs_what_its_formula_says(scan):
  """Patches in, per block 12 N D^2 and 2 N^2 D products, mean out."""
  width, depth, mlp, patch, side = 32, 3, 96, 8, 6
  spec = ModelSpec.from_config(
    dict(
      variant=f"mu/{patch}", width=width, depth=depth, heads=4, mlp_dim=mlp,
      image_size=side * patch, pool="mean",
    )
  )  # fmt: skip
  tower = image_tower(spec, scan=scan)
  images = shape(2, side * patch, side * patch, 3)
  params = jax.eval_shape(tower.init, jax.random.key(0), images)
  n = side**2
  block = 4 * n * width**2 + 2 * n * width * mlp + 2 * n**2 * width
  products = n * 3 * patch**2 * width + depth * block
  found = counting.trace(lambda p, x: tower.apply(p, x).patches, params, images)
  assert found.flops == 2 * 2 * products


@pytest.mark.parametrize(
  "options",
  [
    dict(window_strides=(1, 1), padding="SAME"),
    dict(window_strides=(2, 2), padding=((1, 1), (1, 1))),
    dict(window_strides=(1, 1), padding=((2, 2), (2, 2)), lhs_dilation=(2, 2)),
  ],
  ids=["same", "strided", "transposed"],
)
def test_convolutions_and_their_gradients_agree_with_xla(options):
  def conv(x, w):
    return jax.lax.conv_general_dilated(
      x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )

  def pull(x, w, y):
    return jax.vjp(conv, x, w)[1](y)

  args = (shape(2, 9, 9, 3), shape(3, 3, 3, 5))
  args = (*args, jax.eval_shape(conv, *args))
  for function, given in ((conv, args[:2]), (pull, args)):
    compiled = jax.jit(function).lower(*given).compile()
    ours = counting.trace(function, *given).flops
    assert ours == pytest.approx(compiled.cost_analysis()["flops"], rel=1e-3)
