"""Linear probe of DINOv2 (Oquab et al. 2024).

One head per learning rate (13), number of last blocks (1 or 4) and choice of
the mean patch (off or on): 52 heads, trained jointly on shared batches; the
best is reported. Each is x W + b with W ~ N(0, 0.01^2) and b = 0, trained by
SGD with momentum 0.9, no weight decay, and learning rate times batch / 256 with
cosine decay to zero.

Heads with equal features are one array with an axis of learning rates, so that
a step costs one wide matmul per choice of features.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float, Float32, Int, PyTree

from mtv_jax.config.options import PositiveFloat, PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.classification.probe_evaluators import (
  Evaluation,
  Select,
  TrainedProbe,
  map_rows,
  score_accuracies,
  split_for_selection,
)
from mtv_jax.evals.core import global_features, probe
from mtv_jax.evals.core.examples import ClassificationSet, Splits
from mtv_jax.evals.core.global_features import LastBlocks
from mtv_jax.evals.datasets.scenes import is_scenes

_ROWS = 1024  # images scored at a time
_PUBLISHED = (12_500, 1024)  # steps, images per step
RATES = tuple(m * 10.0**e for e in range(-5, -1) for m in (1, 2, 5)) + (0.1,)


@dataclasses.dataclass(frozen=True)
class LinearProbe(TrainedProbe):
  """DINOv2's linear probe: accuracy of the best head.

  Attributes:
    rates: learning rates at batch size 256; 13 from 1e-5 to 0.1 by default.
    blocks: numbers of last blocks whose tokens a head reads, capped at the
      encoder's depth.
    average: `off`, `on` or both: heads without or with the mean patch.
    steps: SGD steps; 12,500 by default, fewer for fewer than 128,000 training
      images, 300 on scenes.
    train_batch: images per step; 1,024 by default, 256 on scenes.
    select: images for selecting the best head, see `split_for_selection`.
  """

  rates: tuple[PositiveFloat, ...] = RATES
  blocks: tuple[PositiveInt, ...] = (1, 4)
  average: tuple[Literal["off", "on"], ...] = ("off", "on")
  steps: PositiveInt | None = None
  train_batch: PositiveInt | None = None
  select: Select = "val"

  def _evaluate(self, encoder: Encoder, data: Splits) -> Evaluation:
    train, held_out, selection = split_for_selection(data, self.select)
    schedule = self._schedule(len(train))
    schedule.warn("linear_probe")
    size = schedule.batch_size
    augment = self._resolve_augment(
      steps=schedule.steps,
      batch=size,
      images=len(train),
      is_capped=schedule.is_capped,
    )
    batches = self._batches(encoder, data.train.select(train), augment, size)
    test = self._linear_input(encoder, data.test)
    fitted = train_heads(
      batches,
      columns=test.columns,
      rates=self.rates,
      classes=data.classes,
      steps=schedule.steps,
      batch_size=size,
      seed=self.seed,
      mesh=getattr(encoder, "mesh", None),
    )
    if held_out is not None:
      subset = data.train.select(held_out)
      validation = self._linear_input(encoder, subset)
      accuracies = top1(fitted.params, validation, subset.labels)
    else:
      params = {
        head_name: {**head, "bias": head["bias"] + data.penalty}
        for head_name, head in fitted.params.items()
      }
      accuracies = top1(params, test, data.test.labels)
    head_name = max(accuracies, key=lambda head: accuracies[head].max())
    rate_index = int(np.argmax(accuracies[head_name]))
    logits = scores(fitted.params, test, name=head_name, rate=rate_index)
    return score_accuracies(logits, data), {
      "tokens": global_features.describe_tokens(encoder),
      "head": "linear, kernel N(0, 0.01), bias 0",
      "heads": list(accuracies),
      "rates": list(self.rates),
      "optimizer": "SGD, momentum 0.9, rate x batch / 256, cosine to 0",
      **self._training_protocol(fitted, augment=augment, batch_size=size),
      "schedule_length": schedule.why,
      "trained_on": len(train),
      "selection": selection,
      "selected": {"head": head_name, "rate": self.rates[rate_index]},
      "top1_where_selected": {k: v.tolist() for k, v in accuracies.items()},
      "ties": "the lowest class, rate and number of blocks of equal ones",
    }

  def needed_features(self, encoder: Encoder) -> list[tuple]:
    """Tokens of the last blocks, of training images only if cached."""
    train, *_ = split_for_selection(self._set, self.select)
    steps, size, _, is_capped = self._schedule(len(train))
    is_cached = self._is_cached(steps * size, len(train), is_capped=is_capped)
    blocks = min(max(self.blocks), encoder.spec.image.depth)
    names = global_features.block_names(encoder, blocks)
    return self._list_features(encoder, names, train=is_cached)

  def _schedule(self, images: int) -> probe.ProbeSchedule:
    """Steps and batch size for a number of training images."""
    return probe.resolve_schedule(
      _PUBLISHED,
      images=images,
      steps=self.steps,
      batch_size=self.train_batch,
      uncapped=self.published,
      scenes=(300, 256) if is_scenes(self.data) else None,
    )

  def _linear_input(
    self, encoder: Encoder, data: ClassificationSet, *, pixels: str = "images"
  ) -> LinearInput:
    depth = encoder.spec.image.depth
    blocks = sorted({min(b, depth) for b in self.blocks})
    options = {"batch_size": self.batch_size, "pixels": pixels}
    features = global_features.last_blocks(
      encoder, data, blocks=blocks[-1], **options
    )
    return make_linear_input(features, blocks, self.average)

  def _features(
    self, encoder: Encoder, data: ClassificationSet, *, pixels: str = "images"
  ) -> Float32[np.ndarray, "n f"]:
    return self._linear_input(encoder, data, pixels=pixels).x


class LinearInput(NamedTuple):
  """Concatenated features of all heads.

  `x` has the mean patch, then the tokens of the last blocks, last block first.
  `columns` are each head's slice: `1 block`, `1 block + mean`, ...
  """

  x: Float32[np.ndarray, "n f"]
  columns: dict[str, slice]


def make_linear_input(
  features: LastBlocks, blocks: Sequence[int], average: Sequence[str]
) -> LinearInput:
  """Concatenates features for heads of `blocks` x `average`."""
  widths = [token.shape[1] for token in features.tokens]
  mean_width = features.mean.shape[1]
  columns = {}
  for count in blocks:
    stop = mean_width + sum(widths[:count])
    name = f"{count} block" + "s" * (count > 1)
    if "off" in average:
      columns[name] = slice(mean_width, stop)
    if "on" in average:
      columns[f"{name} + mean"] = slice(0, stop)
  tokens = features.tokens[: max(blocks)]
  return LinearInput(np.concatenate([features.mean, *tokens], axis=1), columns)


def init_heads(
  columns: Mapping[str, slice], *, rates: int, classes: int, seed: int = 0
) -> dict[str, dict[str, Float32[np.ndarray, "..."]]]:
  """Kernels `[d, rates, classes]` ~ N(0, 0.01^2), biases zero.

  All rates share an initialisation.
  """
  rng = np.random.default_rng(seed)
  params = {}
  for name, span in columns.items():
    kernel = rng.normal(0, 0.01, (span.stop - span.start, 1, classes))
    kernel = np.repeat(kernel.astype(np.float32), rates, axis=1)
    bias = np.zeros((rates, classes), np.float32)
    params[name] = {"kernel": kernel, "bias": bias}
  return params


def train_heads(
  batches: probe.Batches,
  *,
  columns: Mapping[str, slice],
  rates: Sequence[float],
  classes: int,
  steps: int,
  batch_size: int,
  seed: int = 0,
  mesh: Mesh | None = None,
) -> probe.FitResult:
  """Trains all heads; the reported loss is the mean cross-entropy."""
  scale = np.asarray(rates, np.float32)[:, None] * (batch_size / 256)
  optimizer = optax.chain(
    optax.trace(0.9),
    optax.scale_by_learning_rate(optax.cosine_decay_schedule(1.0, steps)),
    # Rates are the second to last axis of kernels and biases.
    optax.stateless_with_tree_map(lambda update, _: update * scale),
  )

  @functools.partial(jax.vmap, in_axes=(1, 0, None, None))
  def head_losses(kernel, bias, x, label):
    logits = x @ kernel + bias
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

  def loss(params, state, batch, rng):
    del rng
    total = 0.0
    for name, span in columns.items():
      x, label = batch["x"][:, span], batch["label"]
      head = params[name]
      total += head_losses(head["kernel"], head["bias"], x, label).sum()
    # A sum, so that each head gets the gradient of its own loss.
    return total, state

  heads = init_heads(columns, rates=len(rates), classes=classes, seed=seed)
  options = {"optimizer": optimizer, "steps": steps, "mesh": mesh}
  fitted = probe.fit(loss, heads, batches, **options)
  count = len(columns) * len(rates)
  return dataclasses.replace(fitted, losses=fitted.losses / count)


def top1(
  params: PyTree, data: LinearInput, labels: Int[np.ndarray, " n"]
) -> dict[str, Float[np.ndarray, " rates"]]:
  """Top-1 accuracy per learning rate, by choice of features."""
  # Ties go to the lowest class.
  predict = jax.jit(lambda head, x: jnp.argmax(_logits(head, x), axis=-1))
  accuracies = {}
  for name, columns in data.columns.items():
    head = jax.tree.map(np.asarray, params[name])
    apply = functools.partial(predict, head)
    predicted = map_rows(apply, data.x[:, columns], rows=_ROWS)  # [n, rates]
    accuracies[name] = np.mean(predicted == labels[:, None], axis=0)
  return accuracies


def scores(
  params: PyTree, data: LinearInput, *, name: str, rate: int
) -> Float32[np.ndarray, "n c"]:
  """Logits of the head `name` at learning rate index `rate`."""
  # [d, 1, c] and [1, c]: rates are the second to last axis.
  rate_slice = np.s_[..., rate : rate + 1, :]
  head = jax.tree.map(lambda p: np.asarray(p)[rate_slice], params[name])
  x = data.x[:, data.columns[name]]
  return map_rows(functools.partial(_logits, head), x, rows=_ROWS)[:, 0]


@jax.jit
def _logits(head, x):
  """Logits `[n, rates, classes]`."""
  kernel, bias = head["kernel"], head["bias"]
  return jnp.einsum("nd,drc->nrc", x, kernel, precision="highest") + bias
