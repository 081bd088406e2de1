"""Fine-tuning of a classifier: the whole image tower and a linear head.

mae     He et al. 2022, appendix A.1: AdamW with layer-wise learning-rate decay,
        drop path, mixup, CutMix, label smoothing, RandAugment
simclr  SGD on random crops, as in lightly's benchmarks (Chen et al. 2020)

Learning rates are scaled by batch / 256, with linear warmup and cosine decay to
zero, both per step.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key, PyTree

from mtv_jax.config.options import (
  NonNegativeFloat,
  PositiveFloat,
  PositiveFraction,
  PositiveInt,
)
from mtv_jax.encoder import apply_fns, batched
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.classification.probe_evaluators import (
  CROP_PROTOCOL,
  ClassificationProbe,
  Evaluation,
  random_crop,
  score_accuracies,
)
from mtv_jax.evals.core import dense, probe
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.core.examples import ClassificationSet
from mtv_jax.evals.datasets.registry import Splits
from mtv_jax.evals.datasets.scenes import is_scenes
from mtv_jax.models import two_tower
from mtv_jax.parallel import mesh as mesh_lib
from mtv_jax.utils.tree import map_with_names

_EMBEDDINGS = re.compile(
  r"image/(patch_embed|position_embedding|cls_token|registers|mask_token|"
  r"pre_norm)\b"
)


@dataclasses.dataclass(frozen=True)
class FinetuneProtocol:
  """A published recipe; the defaults are MAE's for ViT-B."""

  optimizer: str = "adamw"  # or `sgd`, with momentum 0.9
  rate: float = 1e-3  # at batch size 256
  weight_decay: float = 0.05  # of kernels
  layer_decay: float = 0.75
  epochs: int = 100  # MAE: 50 for ViT-L and larger
  warmup: int = 5  # epochs
  train_batch: int = 1024
  drop_path: float = 0.1  # of the last block, MAE: 0.2 for ViT-H
  smoothing: float = 0.1  # of labels
  mixup: float = 0.8  # parameters of Beta distributions; 0 for neither
  cutmix: float = 1.0
  feature: str = "mean"  # with a layer norm before the head; `cls`, `pooled`


PROTOCOLS = {
  "mae": FinetuneProtocol(),
  "simclr": FinetuneProtocol(
    optimizer="sgd",
    rate=0.05,
    weight_decay=0.0,
    layer_decay=1.0,
    epochs=30,
    warmup=0,
    train_batch=256,
    drop_path=0.0,
    smoothing=0.0,
    mixup=0.0,
    cutmix=0.0,
    feature="pooled",
  ),
}


@dataclasses.dataclass(frozen=True)
class Finetune(ClassificationProbe):
  """Fine-tunes the image tower; accuracy after the last step.

  None means the protocol's value. Training needs memory for the tower, its
  gradient and two moments on every device.

  Attributes:
    protocol: see the module docstring.
    train_batch: images per step; by default the protocol's, and less if it
      would have fewer than 300 steps.
    feature: what the head reads: `mean` of the last block's patch tokens
      through a new layer norm, `cls` token after the final norm, or `pooled`.
    mixup, cutmix: parameters of the Beta distributions of the mixing weight.
    seed: seed of batches, crops, mixing, drop path and head.
  """

  protocol: Literal["mae", "simclr"] = "mae"
  feature: Literal["mean", "cls", "pooled"] | None = None
  rate: PositiveFloat | None = None
  weight_decay: NonNegativeFloat | None = None
  layer_decay: PositiveFraction | None = None
  epochs: PositiveInt | None = None
  train_batch: PositiveInt | None = None
  drop_path: NonNegativeFloat | None = None
  smoothing: NonNegativeFloat | None = None
  mixup: NonNegativeFloat | None = None
  cutmix: NonNegativeFloat | None = None
  seed: int = 0

  title = "fine-tuning"

  def _evaluate(self, encoder: Encoder, data: Splits) -> Evaluation:
    if not encoder.params.get("image"):
      raise NotApplicable(f"{encoder!r} has no parameters to fine-tune")
    recipe = self._resolve(len(data.train.labels))
    model = _Classifier(encoder, recipe, data.classes)
    fitted = model.fit(data.train, self.seed)
    scores = model.scores(fitted.params, data.test, self.batch_size)
    return score_accuracies(scores, data.test.labels), {
      **dataclasses.asdict(recipe),
      "protocol": self.protocol,
      "steps": len(fitted.losses),
      "last_loss": float(fitted.losses[-1]),
      "augment": CROP_PROTOCOL,
      "schedule": "linear warmup, cosine to 0, by the step",
      "seed": self.seed,
      "selection": "none, the last step",
      "ties": "the lowest class of equal ones",
    }

  def _resolve(self, images: int) -> FinetuneProtocol:
    names = {field.name for field in dataclasses.fields(FinetuneProtocol)}
    given = {k: v for k, v in vars(self).items() if k in names}
    given = {k: v for k, v in given.items() if v is not None}
    if is_scenes(self.data):
      given = {"epochs": 5} | given
    recipe = dataclasses.replace(PROTOCOLS[self.protocol], **given)
    if "train_batch" not in given:
      size = max(1, recipe.epochs * images // probe.MIN_STEPS)
      size = min(size, recipe.train_batch, images)
      recipe = dataclasses.replace(recipe, train_batch=size)
    return recipe


@dataclasses.dataclass(frozen=True)
class _Classifier:
  """An encoder's tower with a linear head."""

  encoder: Encoder
  recipe: FinetuneProtocol
  classes: int

  @property
  def head(self) -> nn.Sequential:
    normal = nn.initializers.truncated_normal(2e-5)
    norm = [nn.LayerNorm(epsilon=1e-6)] * (self.recipe.feature == "mean")
    return nn.Sequential([*norm, nn.Dense(self.classes, kernel_init=normal)])

  def logits(
    self,
    params: PyTree,
    images: Float[Array, "b s s 3"],
    keys: Key[Array, " b"] | None = None,
  ) -> Float[Array, "b k"]:
    """Logits of normalised images; `keys` turn drop path on."""
    spec, feature = self.encoder.spec, self.recipe.feature
    tower = two_tower.image_tower(
      spec,
      dtype=jnp.dtype(self.encoder.dtype),
      drop_path=self.recipe.drop_path,
      drop_path_uniform=False,
    )
    last = spec.image.depth - 1
    out = tower.apply(
      {"params": params["image"]},
      images,
      layers=(last,) if feature == "mean" else (),
      drop_path_keys=keys,
    )
    if feature == "mean":
      x = out.intermediates[last][:, spec.image.prefix :].mean(axis=1)
    else:
      x = out.prefix[:, 0] if feature == "cls" else out.pooled
    return self.head.apply({"params": params["head"]}, x.astype(jnp.float32))

  def fit(self, train: ClassificationSet, seed: int) -> probe.FitResult:
    """Trains on random crops."""
    recipe, preprocess = self.recipe, self.encoder.preprocess
    epoch_steps = max(1, len(train.labels) // recipe.train_batch)
    steps = recipe.epochs * epoch_steps

    def read(i: int, rng: np.random.Generator):
      crop = random_crop(train.images[i], size=preprocess.size, rng=rng)
      return crop, np.asarray(train.labels[i])

    def loss(params, state, batch, rng):
      mix_key, path_key = jax.random.split(rng)
      mean, std = (jnp.asarray(getattr(preprocess, k)) for k in ("mean", "std"))
      x = (batch["features"] / jnp.float32(255) - mean) / std
      y = smooth_labels(batch["targets"], self.classes, recipe.smoothing)
      x, y = mix(mix_key, x, y, mixup=recipe.mixup, cutmix=recipe.cutmix)
      logits = self.logits(params, x, jax.random.split(path_key, len(x)))
      return optax.softmax_cross_entropy(logits, y).mean(), state

    image = self.encoder.params["image"]
    width = self.encoder.spec.image.width
    if recipe.feature == "pooled":
      width = self.encoder.spec.embed_dim
    head = self.head.init(jax.random.key(seed), jnp.zeros((1, width)))["params"]
    params = jax.tree.map(np.asarray, {"image": image, "head": head})
    return probe.fit(
      loss,
      jax.tree.map(lambda x: x.astype(np.float32), params),
      dense.training_batches(
        np.stack,
        read,
        len(train.labels),
        batch_size=recipe.train_batch,
        steps=steps,
        seed=seed,
      ),
      optimizer=build_optimizer(
        recipe, params, steps=steps, warmup=recipe.warmup * epoch_steps
      ),
      steps=steps,
      seed=seed,
      mesh=self.encoder.mesh,
    )

  def scores(
    self, params: PyTree, data: ClassificationSet, batch_size: int
  ) -> Float[np.ndarray, "n k"]:
    """Logits of images in the encoder's view."""
    mesh, preprocess = self.encoder.mesh, self.encoder.preprocess
    sharding = mesh_lib.replicated_sharding(mesh)

    @functools.partial(jax.jit, out_shardings=sharding)
    def run(params, images):
      with apply_fns.precision(self.encoder.dtype):
        return {"logits": self.logits(params, images)}

    return batched.in_batches(
      functools.partial(run, params),
      lambda i: preprocess(data.images[i]),
      count=len(data.images),
      blank=np.zeros((preprocess.size, preprocess.size, 3), np.float32),
      batch_size=batch_size,
      mesh=mesh,
    )["logits"]


def build_optimizer(
  recipe: FinetuneProtocol, params: PyTree, *, steps: int, warmup: int
) -> optax.GradientTransformation:
  """AdamW or SGD; the rate of a layer also multiplies its weight decay."""
  rate = recipe.rate * recipe.train_batch / 256
  schedule = optax.schedules.warmup_cosine_decay_schedule(
    0.0 if warmup else rate, rate, min(warmup, steps - 1), steps
  )
  factors = layer_factors(params, recipe.layer_decay)
  is_kernel = map_with_names(lambda name, _: name.endswith("kernel"), params)
  scale = optax.scale_by_adam() if recipe.optimizer == "adamw" else None
  return optax.chain(
    scale or optax.trace(0.9),
    optax.add_decayed_weights(recipe.weight_decay, is_kernel),
    optax.stateless(
      lambda updates, _: jax.tree.map(jnp.multiply, updates, factors)
    ),
    optax.scale_by_learning_rate(schedule),
  )


def layer_factors(params: PyTree, decay: float) -> PyTree:
  """Learning-rate factors: decay^(depth - i) of block i (Clark et al. 2020).

  decay^(depth + 1) of the embeddings, 1 after the blocks.
  """

  def factor(name: str, x: np.ndarray) -> Any:
    if name.startswith("image/blocks/"):
      factors = decay ** np.arange(len(x), 0, -1)
      return np.float32(factors).reshape(-1, *[1] * (x.ndim - 1))
    return np.float32(decay ** (depth + 1) if _EMBEDDINGS.match(name) else 1)

  depth = len(jax.tree.leaves(params["image"]["blocks"])[0])
  return map_with_names(factor, params)


def smooth_labels(
  labels: Int[Array, " b"], classes: int, smoothing: float
) -> Float[Array, "b k"]:
  """One-hot labels with `smoothing` spread over all classes."""
  return optax.smooth_labels(jax.nn.one_hot(labels, classes), smoothing)


def mix(
  key: Key[Array, ""],
  x: Float[Array, "b h w c"],
  y: Float[Array, "b k"],
  *,
  mixup: float,
  cutmix: float,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b k"]]:
  """Mixes a batch with its reverse, as timm: one weight a batch.

  Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), with probability one
  half each if both are on. CutMix pastes a box of the share 1 - weight about a
  uniform centre, cut at the border; labels get the share that remains.
  """
  if not mixup and not cutmix:
    return x, y
  choose, beta, *centres = jax.random.split(key, 4)
  height, width = x.shape[1:3]
  boxes, weights = [], []
  if cutmix:
    weight = jax.random.beta(beta, cutmix, cutmix)
    inside = []
    for side, centre in zip((height, width), centres, strict=True):
      half = jnp.floor(side * jnp.sqrt(1 - weight)).astype(int) // 2
      at = jnp.arange(side) - jax.random.randint(centre, (), 0, side)
      inside.append((at >= -half) & (at < half))
    box = inside[0][:, None] & inside[1]
    boxes.append(1.0 - box)
    weights.append(1 - box.mean())
  if mixup:
    weight = jax.random.beta(beta, mixup, mixup)
    boxes.append(jnp.full((height, width), weight))
    weights.append(weight)
  chosen = jax.random.bernoulli(choose).astype(int) if len(boxes) > 1 else 0
  share, weight = jnp.stack(boxes)[chosen], jnp.stack(weights)[chosen]
  share = share[..., None]
  x = share * x + (1 - share) * x[::-1]
  return x, weight * y + (1 - weight) * y[::-1]
