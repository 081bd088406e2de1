"""Published depth probes: inputs, head, loss weights and optimizer.

linear  DINOv3's: last block after the final norm, batch norm, linear layer
lin1    DINOv2's: last block, CLS token concatenated to every patch
lin4    DINOv2's: as lin1, over four blocks
dpt     Probe3D's (El Banani et al. 2024): DPT over four blocks
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtv_jax.models.heads import dpt


@dataclasses.dataclass(frozen=True)
class ProbeProtocol:
  """A published NYUv2 probe; the defaults are DINOv3's linear probe."""

  # The `last` block, or the end of each quarter: `quarters` as in DINOv2 for 24
  # blocks, `even_quarters` as in Probe3D.
  layers: str = "last"
  norm: str = "final"  # `final` applies the final norm to the features
  # `concat` appends the CLS token, if any, to every patch; `dino_concat` only
  # for the DINO family.
  cls: str = "off"
  head: str = "linear"  # `upsampled` (x4, without batch norm) or `dpt`
  resize: str = "bilinear"  # resizing of predictions, see `resizing`
  frame: str = "full"  # whole images, or their central `square`
  augment: str = "toolbox"  # see `augment.AUGMENTS`
  schedule: str = "warm_cosine"  # see `SCHEDULES`
  lr: float = 3e-4
  b1: float = 0.9  # constant; upstream cycles it with the learning rate
  b2: float = 0.99
  weight_decay: float = 1e-4
  clip: float | None = 35.0  # maximum global norm of the gradient
  batch_size: int = 16
  steps: int | None = 38_400  # updates; if None, `epochs` over the images
  epochs: int | None = None
  sig_weight: float = 1.0
  gradient_weight: float = 0.0
  ddof: int = 1  # of the variance in the SIG loss, see `training.sig_loss`
  warm_steps: int = 100  # first updates, SIG loss without variance
  tta: str = "flip"  # averages with the prediction of the mirrored image
  crop: str = "nyu_eigen"  # evaluated pixels, see `metrics.crop_mask`

  def out_indices(self, depth: int) -> tuple[int, ...]:
    """Indices of the blocks to read, for an encoder with `depth` blocks."""
    if self.layers == "last":
      return (depth - 1,)
    if self.layers == "quarters":
      return dpt.quarter_taps(depth)
    return tuple(math.ceil(depth * i / 4) - 1 for i in (1, 2, 3, 4))

  def optimizer(self) -> optax.GradientTransformation:
    """AdamW with the schedule over `steps`."""
    rate = functools.partial(
      SCHEDULES[self.schedule], steps=self.steps, lr=self.lr
    )
    adamw = optax.adamw(
      rate, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay
    )
    if self.clip is None:
      return adamw
    return optax.chain(optax.clip_by_global_norm(self.clip), adamw)


_LIN1 = ProbeProtocol(
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
PROTOCOLS = {
  "linear": ProbeProtocol(),
  "lin1": _LIN1,
  "lin4": dataclasses.replace(_LIN1, layers="quarters"),
  "dpt": ProbeProtocol(
    layers="even_quarters",
    norm="none",
    cls="dino_concat",
    head="dpt",
    resize="bilinear_corners",
    frame="square",
    augment="probe3d",
    schedule="quarter_cosine",
    lr=5e-4,
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
  ),
}


def warm_cosine(
  step: int | jax.Array, *, steps: int, lr: float
) -> Float[Array, ""]:
  """DINOv3's schedule: cosine with linear warmup over the first third.

  With T steps and W = T / 3: lr / 1000 + lr (1 + cos(pi s / T)) / 2 * s / W
  before W, then a cosine from lr to lr / 25000 at (s + 1) / T.
  """
  warmup = max(1, steps // 3)  # 12,800 of 38,400
  s = jnp.asarray(step, jnp.float32)
  ramp = lr / 1000 + _cosine(lr, 0.0, s / steps) * s / warmup
  return jnp.where(s < warmup, ramp, _cosine(lr, lr / 25_000, (s + 1) / steps))


def one_cycle(
  step: int | jax.Array, *, steps: int, lr: float
) -> Float[Array, ""]:
  """PyTorch's OneCycleLR (Smith and Topin 2018): two half cosines.

  From lr / 25 up to lr at 0.3 of the steps, down to lr / 2500 at the last step.
  """
  s = jnp.asarray(step, jnp.float32)
  peak = max(0.3 * steps - 1, 1e-6)
  up = _cosine(lr / 25, lr, s / peak)
  down = _cosine(lr, lr / 25 / 100, (s - peak) / max(steps - 1 - peak, 1e-6))
  return jnp.where(s <= peak, up, down)


def quarter_cosine(
  step: int | jax.Array, *, steps: int, lr: float
) -> Float[Array, ""]:
  """Probe3D's schedule: lr (0.01 + 0.99 f), f linear to 1, then cos(pi / 2 r).

  r = (s - W) / (T - W), with T steps and W = 0.15 T warmup steps (1.5 of 10
  epochs).
  """
  warmup = max(1, round(0.15 * steps))
  s = jnp.asarray(step, jnp.float32)
  rest = (s - warmup) / max(steps - warmup, 1)
  factor = jnp.where(s <= warmup, s / warmup, jnp.cos(jnp.pi / 2 * rest))
  return lr * (0.01 + 0.99 * factor)


def _cosine(start: float, end: float, share: jax.Array) -> jax.Array:
  return end + (start - end) * (1 + jnp.cos(jnp.pi * share)) / 2


SCHEDULES = {
  "warm_cosine": warm_cosine,
  "one_cycle": one_cycle,
  "quarter_cosine": quarter_cosine,
}
