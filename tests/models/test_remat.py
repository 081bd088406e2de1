"""Rematerialisation by name: choices, saved and recomputed arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.models import layers, remat
from mtv_jax.models import stack as stack_lib
from mtv_jax.perf import flops
from mtv_jax.utils.errors import ConfigError

ROWS, TOKENS, WIDTH, HIDDEN, DEPTH, HEADS = 4, 6, 16, 40, 3, 2


@functools.cache
def saved_and_flops(choice, mlp="plain", layer_scale=None):
  """Elements saved beside the weights, and FLOPs of value and gradient."""
  block = layers.Block(
    HEADS, HIDDEN, mlp=mlp, layer_scale=layer_scale, parent=None
  )
  init = stack_lib.stacked_init(block, DEPTH, WIDTH)
  stack = jax.eval_shape(init, jax.random.key(0))
  x = jax.ShapeDtypeStruct((ROWS, TOKENS, WIDTH), jnp.float32)

  def loss(stack, x):
    return stack_lib.run_stack(block, stack, x, remat=choice)[0].sum()

  _, pull = jax.eval_shape(functools.partial(jax.vjp, loss), stack, x)
  weights = sum(leaf.size for leaf in jax.tree.leaves(stack))
  saved = sum(leaf.size for leaf in jax.tree.leaves(pull)) - weights
  return saved, flops.count(jax.value_and_grad(loss), stack, x).flops


@pytest.mark.parametrize("mlp, layer_scale", [("plain", None), ("swiglu", 0.1)])
def test_a_name_saves_its_array_and_the_product_that_computes_it(
  mlp, layer_scale
):
  """By the shapes of a block; unread arrays are neither saved nor computed.

  Only layer scale reads the output of the MLP.
  """
  halves = 2 if mlp == "swiglu" else 1
  tokens = ROWS * TOKENS * DEPTH
  arrays = {
    "qkv": (3 * WIDTH, 2 * WIDTH * 3 * WIDTH),
    "attention": (WIDTH, 2 * TOKENS * WIDTH),
    "attention_out": (WIDTH, 2 * WIDTH * WIDTH),
    "mlp_hidden": (halves * HIDDEN, halves * 2 * WIDTH * HIDDEN),
    "mlp_out": (WIDTH, 2 * HIDDEN * WIDTH),
  }
  assert tuple(arrays) == remat.NAMES
  if layer_scale is None:
    arrays["mlp_out"] = (0, 0)
  measure = functools.partial(saved_and_flops, mlp=mlp, layer_scale=layer_scale)
  saved, cost = measure("full")
  for name, (channels, saving) in arrays.items():
    more, less = measure(name)
    assert more - saved == tokens * channels, name
    assert cost - less == tokens * saving, name
  # All of them recompute only the attention's weights.
  everything = measure(",".join(remat.NAMES))
  assert everything[0] - saved == tokens * sum(c for c, _ in arrays.values())
  assert everything[1] - measure("none")[1] == tokens * 2 * TOKENS * WIDTH


def test_policies_save_less_in_the_documented_order():
  order = ("full", "dots_no_batch", "dots", "none")
  sizes = [saved_and_flops(choice)[0] for choice in order]
  assert sizes == sorted(sizes) and len(set(sizes)) == 4


@functools.cache
def values_and_gradients(choice):
  block = layers.Block(
    HEADS, HIDDEN, mlp="swiglu", layer_scale=0.1, parent=None
  )
  stack = stack_lib.stacked_init(block, DEPTH, WIDTH)(jax.random.key(0))
  x = jax.random.normal(jax.random.key(1), (ROWS, TOKENS, WIDTH))

  def loss(stack, x):
    y, _ = stack_lib.run_stack(block, stack, x, remat=choice)
    return jnp.square(y).sum()

  function = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  return jax.device_get(function(stack, x))


@pytest.mark.parametrize(
  "choice",
  [
    *(name for name in remat.POLICIES if name != "none"),
    ",".join(remat.NAMES),
    "mlp_hidden:host,qkv",
  ],
)
def test_gradients_do_not_depend_on_the_choice(choice):
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    values_and_gradients(choice),
    values_and_gradients("none"),
  )


@pytest.mark.parametrize(
  "text, message",
  [
    ("qkvs", r"unknown 'qkvs'. Did you mean 'qkv'.*mlp_hidden"),
    ("qkv,full", "'full' can only be a whole choice"),
    ("full|image=auto", "'auto' can only be all of config.model.remat"),
    ("full|image", "'image' is not NAME=CHOICE of caption, image, local"),
    ("full|locals=qkv", "'locals=qkv' is not NAME=CHOICE"),
    ("full|local=mlp", "unknown 'mlp'"),
    ("", "unknown ''"),
    ("full|local=none|local=full", "two entries for 'local'"),
  ],
)
def test_unknown_names_are_errors_that_list_the_others(text, message):
  with pytest.raises(ConfigError, match=message):
    remat.Remat.parse(text, {"image", "local", "caption"})


def test_choices_of_encodings():
  """A view's entry precedes its tower's, and that the default."""
  text = "full|image=qkv,mlp_hidden|local=none|text=dots"
  parsed = remat.Remat.parse(text)
  assert str(parsed) == text
  assert parsed.choose("image", "local") == "none"
  assert parsed.choose("image", "global") == "qkv,mlp_hidden"
  assert parsed.choose("text", "caption") == "dots"
  assert remat.Remat.parse("local=qkv").choose("text", "caption") == "full"
  spaced = " full | image = qkv, mlp_hidden |local=none| text=dots "
  assert remat.Remat.parse(spaced).choose("image", "local") == "none"
  assert remat.Remat.parse(spaced).choose("text", "caption") == "dots"
