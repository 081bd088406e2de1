"""Analytical FLOPs against formulas and against XLA's cost analysis."""

import jax
import jax.numpy as jnp
import pytest
from step_samples import make_spec

from mtv_jax.models import linear
from mtv_jax.models.two_tower import ModelSpec, image_tower
from mtv_jax.perf import flops


def shape(*size):
  return jax.ShapeDtypeStruct(size, jnp.float32)


def test_loops_are_multiplied():
  def loop(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]

  cost = flops.count(loop, shape(4, 8), shape(8, 8))
  assert cost.flops == 7 * 2 * 4 * 8 * 8
  assert cost.reads == [True, True]


def test_dead_code_is_free_and_repeated_code_counts_once():
  def function(x, a, b):
    return x @ a, x @ b, (x @ a) + 1

  args = (shape(4, 8), shape(8, 2), shape(8, 3))
  assert flops.count(function, *args).flops == 2 * 4 * 8 * (2 + 3)
  cost = flops.count(function, *args, keep=[True, False, True])
  assert cost.flops == 2 * 4 * 8 * 2
  assert cost.reads == [True, True, False]


def test_custom_gradients_count_like_derived_ones():
  """`linear` has a custom gradient with a branch for each platform."""
  args = (shape(4, 8), shape(8, 8))
  once = 2 * 4 * 8 * 8

  def twice(x, w):
    return linear.linear(x, w), linear.linear(x, w) + 1

  assert flops.count(twice, *args).flops == once
  grads = jax.grad(lambda *a: linear.linear(*a).sum(), argnums=(0, 1))
  # Linear in both: the value itself is not needed.
  assert flops.count(grads, *args).flops == 2 * once
  cost = flops.count(grads, *args, keep=[False, True])
  assert cost.flops == once
  assert cost.reads == [True, False]


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("positions", ["learned", "sincos", "rope"])
def test_tower_flops_equal_the_formula(positions, scan):
  """Patch embedding, and 12 N D^2 + 2 N^2 D products in each block.

  Positions and drop path multiply no matrices.
  """
  width, depth, mlp, patch, side = 32, 3, 96, 8, 6
  spec = ModelSpec.from_config(
    dict(
      variant=f"mu/{patch}", width=width, depth=depth, heads=4, mlp_dim=mlp,
      image_size=side * patch, pool="mean", positions=positions,
    )
  )  # fmt: skip
  tower = image_tower(spec, scan=scan, drop_path=0.3)
  images = shape(2, side * patch, side * patch, 3)
  params = jax.eval_shape(tower.init, jax.random.key(0), images)
  n = side**2
  block = 4 * n * width**2 + 2 * n * width * mlp + 2 * n**2 * width
  products = n * 3 * patch**2 * width + depth * block

  def apply(params, images):
    keys = jax.random.split(jax.random.key(0), len(images))
    draws = dict(drop_path_keys=keys, rope_key=jax.random.key(1))
    return tower.apply(params, images, **draws).patches

  cost = flops.count(apply, params, images)
  assert cost.flops == 2 * 2 * products


@pytest.mark.parametrize("side", [6, 24])
def test_attention_of_long_sequences_counts_without_recomputation(side):
  """Forward, and twice as many products backward, as with short ones.

  CPUs compute 576 tokens in blocks of queries, and each block again.
  """
  image_size = 8 * side
  text = dict(variant="mu", length=8, vocab_size=32)
  model = dict(variant="mu/8", image_size=image_size, text=text)
  spec = make_spec(model=ModelSpec.from_config(model))
  encoders = flops.without_recomputation(spec).towers
  (tower,) = (t for e, t in encoders.items() if e.tower == "image")
  images = shape(2, image_size, image_size, 3)
  params = jax.eval_shape(tower.init, jax.random.key(0), images)

  def loss(params, images):
    return (tower.apply(params, images).patches ** 2).sum()

  n, size = side**2, spec.model.image
  block = 4 * n * size.width**2 + 2 * n * size.width * size.mlp_dim
  block += 2 * n**2 * size.width
  # Pixels don't need a gradient.
  products = 2 * n * 3 * 8**2 * size.width + 3 * size.depth * block
  cost = flops.count(jax.value_and_grad(loss), params, images)
  # The gradients of biases are products of a row.
  assert cost.flops == pytest.approx(2 * 2 * products, rel=0.01)


@pytest.mark.parametrize(
  "options",
  [
    dict(window_strides=(1, 1), padding="SAME"),
    dict(window_strides=(2, 2), padding=((1, 1), (1, 1))),
    dict(window_strides=(1, 1), padding=((2, 2), (2, 2)), lhs_dilation=(2, 2)),
  ],
  ids=["same", "strided", "transposed"],
)
def test_convolutions_and_their_gradients_equal_xla(options):
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
    ours = flops.count(function, *given).flops
    assert ours == pytest.approx(compiled.cost_analysis()["flops"], rel=1e-3)
