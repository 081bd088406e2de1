"""LeJEPA loss: view prediction with SIGReg (Balestriero and LeCun 2025).

The projections of all views of an image predict the mean of its global views.
SIGReg, a test of their normality, prevents collapse (arXiv 2511.08544). The
loss needs neither a teacher nor a stop-gradient.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mtv_jax.config import options
from mtv_jax.models.heads.projection import Adaptor
from mtv_jax.objectives import base
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import pytree_dataclass

_MAX_T = 3.0  # Largest argument t of the characteristic function.


def random_directions(
  key: jax.Array, channels: int, count: int
) -> Float[Array, "{channels} {count}"]:
  """Uniformly distributed unit vectors, one per column."""
  x = jax.random.normal(key, (channels, count))
  return x / jnp.linalg.norm(x, axis=0)


def sigreg(
  x: Float[Array, "n v d"], directions: Float[Array, "d m"], *, knots: int = 17
) -> Float[Array, ""]:
  """SIGReg: mean Epps-Pulley statistic over v views and m directions.

      T = n int |c(t) - g(t)|^2 g(t) dt,  g(t) = exp(-t^2 / 2)

  c(t) is the mean over the n rows of exp(i t y), where y is its component in a
  direction (Epps and Pulley 1983). The trapezoidal rule on [0, 3], doubled as
  the integrand is even, follows the authors' code. For normal vectors the
  expected value is 1.05 for any n.
  """
  y = jnp.einsum("nvd,dm->nvm", x, directions, precision="highest")
  t = np.linspace(0, _MAX_T, knots, dtype=np.float32)
  normal = np.exp(-np.square(t) / 2)

  # One knot at a time, recomputed in the backward pass: holds n v m values.
  @jax.checkpoint
  def squared_gap(knot):
    t, normal = knot
    real = jnp.mean(jnp.cos(t * y), axis=0) - normal  # [v, m]
    imaginary = jnp.mean(jnp.sin(t * y), axis=0)
    return jnp.mean(jnp.square(real) + jnp.square(imaginary))

  gaps = jax.lax.map(squared_gap, (t, normal))  # [knots]
  return 2 * len(x) * jnp.trapezoid(gaps * normal, t)


@pytree_dataclass
class LossInputs:
  """Per example, for v views."""

  projections: Float[Array, "b v d"]
  # Mean squared distances from the mean projection of the global views.
  errors: Float[Array, " b"]


@dataclasses.dataclass(frozen=True)
class LeJEPA(base.Objective):
  """LeJEPA loss on the projected pooled vectors z of an image's views.

      L = (1 - lambda) mean |z - mean of the global z|^2 / d + lambda SIGReg(z)

  The first mean is over images and views. SIGReg sees the global batch, in new
  directions at each step. The student sees a view's masked crops, as in DINO.

  Defaults are from the authors' minimal example, whose projector has batch
  norms; this one has layer norms.
  """

  group = "ssl"

  view_global: str = "global"
  view_local: str | None = "local"
  sigreg_weight: Annotated[float, options.Range(min=0, max=1)] = 0.02  # lambda
  directions: options.PositiveInt = 256
  knots: Annotated[int, options.Range(min=2)] = 17
  hidden: options.PositiveInt = 2048  # Width of the projector.
  channels: options.PositiveInt = 128  # Channels of z (d).

  def resolve(self, spec, views, teachers=base.NO_TEACHERS) -> LeJEPA:
    counts = [views[e.view].count for e in self._encodings if e.view in views]
    if len(counts) == len(self._encodings) and sum(counts) < 2:
      raise ConfigError(
        "lejepa: a single view has no other view to predict; set "
        f"config.views.{self.view_global}.count=2, or name a view_local."
      )
    return self

  @property
  def _encodings(self) -> list[base.Encoding]:
    views = (self.view_global, self.view_local)
    return [base.Encoding("image", view) for view in views if view is not None]

  def needs(self) -> base.Needs:
    return base.Needs(encodings=dict.fromkeys(self._encodings, ()))

  def heads(self) -> dict[str, base.Head]:
    module = Adaptor(self.channels, self.hidden, layers=3)

    def example(spec):
      return (jax.ShapeDtypeStruct((1, spec.image.embed_dim), "float32"),)

    return {"lejepa": base.Head(module, example)}

  def loss_inputs(self, encodings, heads, batch) -> LossInputs:
    pooled = [encodings[e].pooled for e in self._encodings]  # [b, g | l, E]
    z = heads["lejepa"](jnp.concatenate(pooled, axis=1))  # [b, v, d]
    target = jnp.mean(z[:, : pooled[0].shape[1]], axis=1, keepdims=True)
    return LossInputs(z, jnp.mean(jnp.square(z - target), axis=(1, 2)))

  def loss(self, loss_inputs, heads, context) -> base.Terms:
    z = loss_inputs.projections  # [B, v, d]
    directions = random_directions(context.key, z.shape[-1], self.directions)
    statistic = sigreg(z, directions, knots=self.knots)
    error = jnp.mean(loss_inputs.errors)
    weight, count = self.sigreg_weight, jnp.ones(()) * len(z)
    total = (1 - weight) * error + weight * statistic
    report = {"prediction": error, "sigreg": statistic, "labelled": 1.0}
    return base.Terms(
      loss=base.WeightedMean(total * count, count),
      report={
        name: base.WeightedMean(jax.lax.stop_gradient(x * count), count)
        for name, x in report.items()
      },
    )
