"""The published depth probes: what each reads, its loss and its training.

linear  DINOv3's: last block after the final norm, batch norm, one linear map
lin1    DINOv2's: last block with the CLS token beside every patch
lin4    the same of four blocks
dpt     Probe3D's (El Banani et al. 2024): DPT over four blocks
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtv_jax.models.heads import dpt
from mtv_jax.utils.errors import did_you_mean

Step = int | jax.Array
Schedule = Callable[[Step], Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Recipe:
  """One probe as published, for NYUv2.

  Attributes:
    layers: `last` block, or at the end of each quarter: `quarters` as DINOv2
      counts them in 24 layers, `even_quarters` as Probe3D does.
    norm: whether the final norm is applied to what is read: `final` or `none`.
    cls: `concat` puts the CLS token, where there is one, beside every patch.
    head: `linear`, `upsampled` (four times, without batch norm) or `dpt`.
    resize: of the prediction to the image, a method of `resizing`.
    frame: `full` images or their central `square`.
    augment: a name of `depth_augment.AUGMENTS`.
    schedule: a name of `SCHEDULES`.
    lr, b1, b2, weight_decay: of AdamW.
    clip: largest global norm of the gradient; None for no limit.
    batch_size: images a step.
    steps: updates; where it is None, `epochs` over the training images.
    epochs: see `steps`.
    sig_weight, gradient_weight: of the two losses.
    ddof: of the variance in the first, see `depth_losses.sig_loss`.
    warm_steps: first updates, in which the variance does not count.
    tta: `flip` averages the prediction with that of the mirrored image.
    crop: of the evaluated pixels on NYUv2, see `depth_metrics.crop_mask`.
  """

  layers: str
  norm: str
  cls: str
  head: str
  resize: str
  frame: str
  augment: str
  schedule: str
  lr: float
  b1: float
  b2: float
  weight_decay: float
  clip: float | None
  batch_size: int
  steps: int | None
  epochs: int | None
  sig_weight: float
  gradient_weight: float
  ddof: int
  warm_steps: int
  tta: str
  crop: str

  def taps(self, depth: int) -> tuple[int, ...]:
    """The blocks it reads of an encoder with `depth` of them."""
    if self.layers == "last":
      return (depth - 1,)
    if self.layers == "quarters":
      return dpt.quarter_taps(depth)
    return tuple(math.ceil(depth * i / 4) - 1 for i in (1, 2, 3, 4))

  def optimizer(self, steps: int, lr: float) -> optax.GradientTransformation:
    """AdamW with the recipe's schedule over `steps`."""
    schedule = SCHEDULES[self.schedule](steps, lr)
    adamw = optax.adamw(
      schedule, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay
    )
    if self.clip is None:
      return adamw
    return optax.chain(optax.clip_by_global_norm(self.clip), adamw)


LINEAR = Recipe(
  layers="last",
  norm="final",
  cls="none",
  head="linear",
  resize="bilinear",
  frame="full",
  augment="toolbox",
  schedule="warm_cosine",
  lr=3e-4,
  # Upstream cycles b1 with the rate; it stays here.
  b1=0.9,
  b2=0.99,
  weight_decay=1e-4,
  clip=35.0,
  batch_size=16,
  steps=38_400,
  epochs=None,
  sig_weight=1.0,
  gradient_weight=0.0,
  ddof=1,
  warm_steps=100,
  tta="flip",
  crop="nyu_eigen",
)
LIN1 = dataclasses.replace(
  LINEAR,
  norm="none",
  cls="concat",
  head="upsampled",
  schedule="one_cycle",
  lr=1e-4,
  b1=0.95,
  weight_decay=0.01,
  sig_weight=10.0,
  gradient_weight=0.5,
)
LIN4 = dataclasses.replace(LIN1, layers="quarters")
DPT = Recipe(
  layers="even_quarters",
  norm="none",
  cls="concat",
  head="dpt",
  resize="bilinear_corners",
  frame="square",
  augment="probe3d",
  schedule="quarter_cosine",
  lr=5e-4,
  b1=0.9,
  b2=0.999,
  weight_decay=0.01,
  clip=None,
  batch_size=8,
  steps=None,
  epochs=10,
  sig_weight=10.0,
  gradient_weight=0.5,
  ddof=0,
  warm_steps=0,
  tta="none",
  crop="none",
)
RECIPES = {"linear": LINEAR, "lin1": LIN1, "lin4": LIN4, "dpt": DPT}


def recipe(name: str) -> Recipe:
  """By name, or a ValueError."""
  if name not in RECIPES:
    raise ValueError(
      f"depth_probe: protocol={name!r}. {did_you_mean(name, RECIPES)}"
    )
  return RECIPES[name]


def warm_cosine(
  step: Step, *, steps: int, lr: float, warmup: int | None = None
) -> Float[Array, ""]:
  """DINOv3's: a cosine that is ramped up over its first third.

  With T steps and W of warm-up: lr / 1000 + lr (1 + cos(pi s / T)) / 2 * s / W
  before W, then the cosine from lr to lr / 25000 at (s + 1) / T.

  Args:
    step: from 0.
    steps: T.
    lr: the peak, which the ramped cosine stays below.
    warmup: W, by default 12,800 of 38,400 steps.
  """
  warmup = max(1, steps // 3) if warmup is None else warmup
  s = jnp.asarray(step, jnp.float32)
  ramped = lr / 1000 + _cosine(lr, 0.0, s / steps) * s / warmup
  return jnp.where(
    s < warmup, ramped, _cosine(lr, lr / 25_000, (s + 1) / steps)
  )


def one_cycle(
  step: Step,
  *,
  steps: int,
  lr: float,
  warm_share: float = 0.3,
  div: float = 25.0,
  final_div: float = 100.0,
) -> Float[Array, ""]:
  """Smith and Topin 2018 as PyTorch's OneCycleLR: two half cosines.

  From lr / div up to lr at `warm_share` of the steps, down to
  lr / div / final_div at the last one.
  """
  s = jnp.asarray(step, jnp.float32)
  peak = max(warm_share * steps - 1, 1e-6)
  low, last = lr / div, lr / div / final_div
  up = _cosine(low, lr, s / peak)
  down = _cosine(lr, last, (s - peak) / max(steps - 1 - peak, 1e-6))
  return jnp.where(s <= peak, up, down)


def quarter_cosine(
  step: Step, *, steps: int, lr: float, warmup: int | None = None
) -> Float[Array, ""]:
  """Probe3D's: lr (0.01 + 0.99 f), f up to 1 in a line, then cos(pi / 2 r).

  Args:
    step: from 0.
    steps: T, where f reaches 0.
    lr: the peak.
    warmup: W, by default 1.5 of 10 epochs. r = (s - W) / (T - W).
  """
  warmup = max(1, round(0.15 * steps)) if warmup is None else warmup
  s = jnp.asarray(step, jnp.float32)
  rest = (s - warmup) / max(steps - warmup, 1)
  factor = jnp.where(s <= warmup, s / warmup, jnp.cos(jnp.pi / 2 * rest))
  return lr * (0.01 + 0.99 * factor)


def _cosine(start: float, end: float, share: jax.Array) -> jax.Array:
  return end + (start - end) * (1 + jnp.cos(jnp.pi * share)) / 2


def _schedule(rate: Callable[..., Float[Array, ""]]) -> Callable[..., Schedule]:
  return lambda steps, lr: functools.partial(rate, steps=steps, lr=lr)


SCHEDULES = {
  "warm_cosine": _schedule(warm_cosine),
  "one_cycle": _schedule(one_cycle),
  "quarter_cosine": _schedule(quarter_cosine),
}
