"""Linear probe of MAE (He et al. 2022, appendix A; MoCo v3's protocol).

Batch norm without scale and bias, then a linear layer, on one feature vector
per image. LARS (You et al. 2017) without weight decay: with m the momentum,

    m <- 0.9 m + t g,   w <- w - rate m,   t = 0.001 |w| / |g|

and t = 1 for biases. The learning rate, 0.1 batch / 256, has a 10-epoch linear
warmup and cosine decay to zero, both per step.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Annotated, Any

import jax
import numpy as np
import optax
from jaxtyping import Float32

from mtv_jax.config import options as options_lib
from mtv_jax.config.options import NonNegativeInt, PositiveFloat, PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.classification.probe_evaluators import (
  Evaluation,
  FeatureProbe,
  TrainedProbe,
  map_rows,
  score_accuracies,
)
from mtv_jax.evals.core import probe, probe_heads
from mtv_jax.evals.core.examples import Splits
from mtv_jax.evals.datasets.scenes import is_scenes
from mtv_jax.utils.errors import ConfigError, InputError

_PUBLISHED_BATCH_SIZE = 16_384

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MaeProbe(FeatureProbe, TrainedProbe):
  """MAE's linear probe: accuracy after the last step.

  Attributes:
    base_rate: learning rate at batch size 256.
    epochs: 90; MAE uses 50 for ViT-L and larger.
    warmup: warmup epochs, included in `epochs`.
    train_batch: images per step, at most the number of training images; 16,384
      by default, fewer if that would leave fewer than about 300 steps. The
      learning rate scales with the actual batch size.
  """

  title = "MAE probe"

  base_rate: PositiveFloat = 0.1
  epochs: PositiveInt = 90
  warmup: NonNegativeInt = 10
  train_batch: Annotated[int, options_lib.Range(min=2)] | None = None

  _redraw = False

  def __post_init__(self):
    super().__post_init__()
    if self.warmup >= (epochs := self.epochs):
      raise ConfigError(f"warmup={self.warmup}; expected less than {epochs=}")

  def _evaluate(self, encoder: Encoder, data: Splits) -> Evaluation:
    images = len(data.train.labels)
    if images < 2:
      raise InputError("mae_probe: batch norm needs at least 2 training images")
    size, is_reduced = self._resolve_batch_size(images)
    steps_per_epoch = images // size
    steps, rate = self.epochs * steps_per_epoch, self.base_rate * size / 256
    augment = self._resolve_augment(
      steps=steps, batch=size, images=images, is_capped=is_reduced
    )
    test = self._features(encoder, data.test)
    fitted = fit(
      self._batches(encoder, data.train, augment, size),
      width=test.shape[1],
      classes=data.classes,
      rate=rate,
      steps=steps,
      warmup=self.warmup * steps_per_epoch,
      seed=self.seed,
      mesh=getattr(encoder, "mesh", None),
    )
    return score_accuracies(scores(fitted, test), data), {
      "feature": self.feature,
      "head": "batch norm without affine (eps 1e-6), linear (N(0, 0.01))",
      "optimizer": "LARS, trust 0.001, momentum 0.9, none for the bias",
      "rate": rate,
      "schedule": "linear warm-up, cosine to 0, by the step",
      "epochs": self.epochs,
      "warmup_epochs": self.warmup,
      **self._training_protocol(fitted, augment=augment, batch_size=size),
      "train_batch_asked": self.train_batch or _PUBLISHED_BATCH_SIZE,
      "selection": "none, the last step",
      "ties": "the lowest class of equal ones",
    }

  def _resolve_batch_size(self, images: int) -> tuple[int, bool]:
    """Images per step, and whether it is less than the published number."""
    size = min(self.train_batch or _PUBLISHED_BATCH_SIZE, images)
    min_steps = probe.MIN_STEPS // self.epochs  # per epoch
    if images // size >= min_steps or self.train_batch or self.published:
      return size, False
    reduced = max(2, images // min_steps)
    if not is_scenes(self.data):
      log.warning(
        f"mae_probe: {images} images in batches of {size} are "
        f"{self.epochs * (images // size)} LARS steps, but the published probe "
        f"has 7,020; it trains {self.epochs * (images // reduced)} steps of "
        f"{reduced} images (train_batch= sets the batch size, published=True "
        "keeps the published one)"
      )
    return reduced, True


def lars(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
  """LARS with the learning rate applied after momentum, as in MAE.

  `optax.lars` applies it before, which differs if the rate changes.
  """
  scale = optax.scale_by_trust_ratio(trust_coefficient=0.001)
  return optax.chain(
    optax.masked(scale, lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)),
    optax.trace(0.9),
    optax.scale_by_learning_rate(rate),
  )


def fit(
  batches: probe.Batches,
  *,
  width: int,
  classes: int,
  rate: float,
  steps: int,
  warmup: int,
  seed: int = 0,
  mesh: Any = None,
) -> probe.FitResult:
  """Trains the batch norm and the linear layer."""
  head, normal = _head(classes), np.random.default_rng(seed).standard_normal
  params, state = probe_heads.init_head(head, width, normal)

  def loss(params, state, batch, rng):
    del rng
    variables, options = {"params": params, **state}, {"train": True}
    logits, state = head.apply(
      variables, batch["x"], **options, mutable=["batch_stats"]
    )
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return cross_entropy(logits, batch["label"]).mean(), state

  schedule = optax.schedules.warmup_cosine_decay_schedule(
    0.0, rate, warmup_steps=warmup, decay_steps=steps
  )
  options = {"optimizer": lars(schedule), "steps": steps, "mesh": mesh}
  return probe.fit(loss, params, batches, state=state, **options)


def _head(classes: int) -> probe_heads.ProbeHead:
  return probe_heads.ProbeHead(classes, affine=False, epsilon=1e-6)


def scores(
  fitted: probe.FitResult, x: Float32[np.ndarray, "n d"]
) -> Float32[np.ndarray, "n c"]:
  """Logits, with the running statistics of the batch norm."""
  params, state = jax.tree.map(np.asarray, (fitted.params, fitted.state))
  head = _head(params["logits"]["kernel"].shape[1])

  @jax.jit
  def compute_logits(x):
    with jax.default_matmul_precision("highest"):
      return head.apply({"params": params, **state}, x)

  return map_rows(compute_logits, x)
