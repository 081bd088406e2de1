"""Linear layers x W + b of the blocks: plain, or quantized to 8 bits by Qwix.

`layers.Dense` uses `linear` by default. Its value and gradient match the plain
formula. Accelerators run the formula; CPUs run a variant that XLA compiles to
faster code.

With `config.model.quantization` both operands of a product are rounded to 8
bits, with dynamic scales: one per token and one per kernel column, from their
largest magnitudes in the step. So quantization adds no state, and parameters,
checkpoints and exports don't depend on it.

The forward product and the gradient of its input are quantized. The gradient of
a kernel, a sum over the tokens of all examples, uses the compute dtype, as in
AQT training (`config_v4`, Lew et al. 2022), but without stochastic rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtv_jax.utils.errors import check_choice, import_extra

Bias = Float[Array, " e"] | None
# Dtypes of operands and of gradients. float8: Micikevicius et al. 2022.
DTYPES = {
  "int8": ("int8", "int8"),
  "fp8": ("float8_e4m3fn", "float8_e5m2"),
}


def plain_linear(
  x: Float[Array, "*b d"], kernel: Float[Array, "d e"], bias: Bias = None
) -> Float[Array, "*b e"]:
  """x kernel + bias."""
  y = x @ kernel
  return y if bias is None else y + bias


# `plain_linear` with gradients that are also fast on CPUs. XLA for CPUs copies
# an operand of a product of 3-D arrays, and sums bias gradients value by value;
# a product with a row of ones is three times faster. Forward-mode
# differentiation is not supported.
linear = jax.custom_vjp(plain_linear)


def _linear_forward(x, kernel, bias=None):
  return plain_linear(x, kernel, bias), (x, kernel, bias)


def _linear_backward(residuals, cotangent):
  def cpu(x, kernel, bias, cotangent):
    rows = cotangent.reshape(-1, cotangent.shape[-1])  # [B, e]
    if bias is not None:
      bias = (jnp.ones((1, len(rows)), rows.dtype) @ rows)[0]
    return (
      (rows @ kernel.T).reshape(x.shape),
      x.reshape(-1, x.shape[-1]).T @ rows,
      bias,
    )

  def default(x, kernel, bias, cotangent):
    return jax.vjp(plain_linear, x, kernel, bias)[1](cotangent)

  return jax.lax.platform_dependent(
    *residuals, cotangent, cpu=cpu, default=default
  )


linear.defvjp(_linear_forward, _linear_backward)


@functools.cache
def build_linear_fn(quantization: str) -> Callable[..., Array]:
  """Returns the `linear_fn` of `layers.Dense` for a quantization."""
  check_choice("config.model.quantization", quantization, ("none", *DTYPES))
  if quantization == "none":
    return linear
  qwix = import_extra("qwix", "quantization")
  dtype, grad_dtype = DTYPES[quantization]
  rule = qwix.QtRule(
    weight_qtype=dtype,
    act_qtype=dtype,
    bwd_qtype=grad_dtype,
    additional_qt_config=dict(
      use_original_residuals=True,
      dlhs_residual_qtype=dtype,
      drhs_grad_qtype=None,
    ),
  )
  provider = qwix.QtProvider([rule])

  def quantized_linear(x, kernel, bias=None):
    y = provider.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
    return y if bias is None else y + bias

  return quantized_linear
