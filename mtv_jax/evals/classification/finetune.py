"""Fine-tuning of the whole image tower as a classifier (He et al. 2022, A.1).

AdamW with layer-wise learning-rate decay, drop path, mixup, CutMix and label
smoothing, on random crops; lightly's benchmark of ViTs has the same recipe.
The published recipe's RandAugment and random erasing are left out.
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
from jaxtyping import Array, Float, Key, PyTree

from mtv_jax.config.options import (
  Fraction,
  NonNegativeFloat,
  NonNegativeInt,
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
from mtv_jax.evals.core.examples import Splits
from mtv_jax.models import two_tower, vit
from mtv_jax.parallel.mesh import replicated_sharding
from mtv_jax.utils.tree import map_with_names

_EMBEDDINGS = re.compile(
  r"tower/(patch_embed|position_embedding|cls_token|registers|mask_token|"
  r"pre_norm)\b"
)


@dataclasses.dataclass(frozen=True)
class Finetune(ClassificationProbe):
  """Fine-tunes the image tower; accuracy after the last step.

  Defaults are MAE's for ViT-B. Every device holds the tower, its gradient and
  two moments.

  Attributes:
    feature: input of the head: `mean` of the last block's patch tokens through
      a new layer norm, `cls` token after the final norm, or `pooled`.
    rate: learning rate at batch size 256; linear warmup, cosine decay to zero.
    weight_decay: weight decay of kernels.
    layer_decay: factor of the learning rate from a layer to the one before.
    epochs: 100; MAE uses 50 for ViT-L and larger. On scenes 5, with 64 images
      per step.
    warmup: warmup epochs, at most half of the steps.
    train_batch: images per step; by default 1,024, or fewer for 300 steps.
    drop_path: rate of the last block, linear in depth; MAE uses 0.2 for ViT-H.
    mixup, cutmix: parameters of the Beta distributions; 0 disables either.
  """

  feature: Literal["mean", "cls", "pooled"] = "mean"
  rate: PositiveFloat = 1e-3
  weight_decay: NonNegativeFloat = 0.05
  layer_decay: PositiveFraction = 0.75
  epochs: PositiveInt | None = None
  warmup: NonNegativeInt = 5
  train_batch: PositiveInt | None = None
  drop_path: Fraction = 0.1
  smoothing: Fraction = 0.1
  mixup: NonNegativeFloat = 0.8
  cutmix: NonNegativeFloat = 1.0
  seed: int = 0

  title = "fine-tuning"

  def _evaluate(self, encoder: Encoder, data: Splits) -> Evaluation:
    if not encoder.params.get("image"):
      raise NotApplicable(f"{encoder!r} has no parameters to fine-tune")
    if self.feature == "cls" and not encoder.spec.image.cls_token:
      raise NotApplicable(f"feature='cls': {encoder!r} has no CLS token")
    images = len(data.train.labels)
    epochs = self._resolve(self.epochs, 100, 5)
    size = max(1, epochs * images // probe.MIN_STEPS)
    size = min(self._resolve(self.train_batch, min(1024, size), 64), images)
    steps = epochs * max(1, images // size)
    tower = two_tower.image_tower(
      encoder.spec,
      dtype=jnp.dtype(encoder.dtype),
      drop_path=self.drop_path,
      drop_path_uniform=False,
    )
    model = Classifier(tower, data.classes, self.feature)
    warmup = min(steps // 2, self.warmup * (images // size))
    options = dict(size=size, steps=steps, warmup=warmup)
    fitted = self._fit(model, encoder, data, **options)
    scores = self._predict(model, fitted.params, encoder, data.test.images)
    return score_accuracies(scores, data), {
      "epochs": epochs,
      "train_batch": size,
      "steps": steps,
      "last_loss": float(fitted.losses[-1]),
      "optimizer": (
        f"AdamW, {self.rate:g} x batch / 256, linear warmup of {warmup} "
        f"steps, cosine to 0, weight decay {self.weight_decay:g}, layer decay "
        f"{self.layer_decay:g}"
      ),
      "regularisation": (
        f"drop path {self.drop_path:g}, label smoothing {self.smoothing:g}, "
        f"mixup {self.mixup:g}, CutMix {self.cutmix:g}"
      ),
      "augment": CROP_PROTOCOL,
      "selection": "none, the last step",
      "ties": "the lowest class of equal ones",
    }

  def _fit(
    self,
    model: Classifier,
    encoder: Encoder,
    data: Splits,
    *,
    size,
    steps,
    warmup,
  ) -> probe.FitResult:
    train, preprocess = data.train, encoder.preprocess
    mean, std = np.float32(preprocess.mean), np.float32(preprocess.std)

    def read(i: int, rng: np.random.Generator):
      crop = random_crop(train.images[i], size=preprocess.size, rng=rng)
      return crop, np.asarray(train.labels[i])

    def loss(params, state, batch, rng):
      mix_key, key = jax.random.split(rng)
      x = (batch["features"] / jnp.float32(255) - mean) / std
      y = jax.nn.one_hot(batch["targets"], data.classes)
      y = optax.smooth_labels(y, self.smoothing)
      x, y = mix(mix_key, x, y, mixup=self.mixup, cutmix=self.cutmix)
      keys = jax.random.split(key, len(x))
      logits = model.apply({"params": params}, x, keys)
      return optax.softmax_cross_entropy(logits, y).mean(), state

    params = model.init_head(self.seed) | {"tower": encoder.params["image"]}
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    schedule = optax.schedules.warmup_cosine_decay_schedule(
      0.0,
      self.rate * size / 256,
      warmup_steps=warmup,
      decay_steps=steps,
    )
    tx = build_optimizer(params, schedule, self.weight_decay, self.layer_decay)
    options = dict(steps=steps, seed=self.seed)
    batches = dense.training_batches(
      np.stack, read, len(train.labels), batch_size=size, **options
    )
    return probe.fit(
      loss, params, batches, optimizer=tx, mesh=encoder.mesh, **options
    )

  def _predict(
    self, model: Classifier, params: PyTree, encoder: Encoder, images: Any
  ) -> Float[np.ndarray, "n k"]:
    preprocess, sharding = encoder.preprocess, replicated_sharding(encoder.mesh)

    @functools.partial(jax.jit, out_shardings=sharding)
    def apply(params, images):
      with apply_fns.precision(encoder.dtype):
        return {"logits": model.apply({"params": params}, images)}

    return batched.in_batches(
      functools.partial(apply, params),
      lambda i: preprocess(images[i]),
      count=len(images),
      blank=np.zeros((preprocess.size, preprocess.size, 3), np.float32),
      batch_size=self.batch_size,
      mesh=encoder.mesh,
    )["logits"]


class Classifier(nn.Module):
  """An image tower and a linear head, see `Finetune.feature`."""

  tower: vit.ViT
  classes: int
  feature: str

  @nn.compact
  def __call__(
    self, images: Float[Array, "b s s 3"], keys: Key[Array, " b"] | None = None
  ) -> Float[Array, "b k"]:
    """Logits of normalised images; `keys` enable drop path."""
    spec, is_mean = self.tower.spec, self.feature == "mean"
    last = spec.depth - 1
    layers = (last,) if is_mean else ()
    out = self.tower(images, layers=layers, drop_path_keys=keys)
    x = out.prefix[:, 0] if self.feature == "cls" else out.pooled
    if is_mean:
      x = out.intermediates[last][:, spec.prefix :].mean(axis=1)
      x = nn.LayerNorm(epsilon=1e-6, name="norm")(x)
    init = nn.initializers.truncated_normal(2e-5)
    return nn.Dense(self.classes, kernel_init=init, name="head")(x)

  def init_head(self, seed: int) -> dict[str, PyTree]:
    """Initial parameters, without the tower's."""
    patch = self.tower.spec.patch_size

    @jax.jit
    def init():
      params = self.init(jax.random.key(seed), jnp.zeros((1, patch, patch, 3)))
      return {k: v for k, v in params["params"].items() if k != "tower"}

    return init()


def build_optimizer(
  params: PyTree,
  schedule: optax.Schedule,
  weight_decay: float,
  layer_decay: float,
) -> optax.GradientTransformation:
  """AdamW; a layer's rate factor also scales its weight decay."""
  factors = layer_factors(params, layer_decay)
  is_kernel = map_with_names(lambda name, _: name.endswith("kernel"), params)
  return optax.chain(
    optax.scale_by_adam(),
    optax.add_decayed_weights(weight_decay, is_kernel),
    optax.stateless(lambda u, _: jax.tree.map(jnp.multiply, u, factors)),
    optax.scale_by_learning_rate(schedule),
  )


def layer_factors(params: PyTree, decay: float) -> PyTree:
  """Learning-rate factors: decay^(depth - i) of block i (Clark et al. 2020).

  decay^(depth + 1) of the embeddings, 1 after the blocks.
  """

  def compute_factor(name: str, x: np.ndarray) -> Any:
    if name.startswith("tower/blocks/"):
      factors = decay ** np.arange(len(x), 0, -1)
      return np.float32(factors).reshape(-1, *[1] * (x.ndim - 1))
    return np.float32(decay ** (depth + 1) if _EMBEDDINGS.match(name) else 1)

  depth = len(jax.tree.leaves(params["tower"]["blocks"])[0])
  return map_with_names(compute_factor, params)


def mix(
  key: Key[Array, ""],
  x: Float[Array, "b h w c"],
  y: Float[Array, "b k"],
  *,
  mixup: float,
  cutmix: float,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b k"]]:
  """Mixes a batch with its reverse, one weight w per batch, as in timm.

  Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), with probability one
  half each if both are on. CutMix pastes a box of area 1 - w about a uniform
  centre, clipped at the border; labels are weighted by the area that remains.
  """
  choice_key, beta_key, *centre_keys = jax.random.split(key, 4)
  masks = []  # [h, w] each: weights of the image itself
  if mixup:
    weight = jax.random.beta(beta_key, mixup, mixup)
    masks.append(jnp.full(x.shape[1:3], weight))
  if cutmix:
    cut_ratio = jnp.sqrt(1 - jax.random.beta(beta_key, cutmix, cutmix))
    in_box = []
    for side, centre_key in zip(x.shape[1:3], centre_keys, strict=True):
      offset = jnp.arange(side) - jax.random.randint(centre_key, (), 0, side)
      half = (side * cut_ratio).astype(int) // 2
      in_box.append((offset >= -half) & (offset < half))
    masks.append(1.0 - in_box[0][:, None] * in_box[1])
  if not masks:
    return x, y
  mask = jnp.stack(masks)[jax.random.randint(choice_key, (), 0, len(masks))]
  weight, mask = mask.mean(), mask[..., None]
  x = mask * x + (1 - mask) * x[::-1]
  return x, weight * y + (1 - weight) * y[::-1]
