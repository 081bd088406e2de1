"""OWLv2 model (Minderer et al. 2023): CLIP towers with one box per patch.

Each patch token, multiplied by the CLS token, predicts a box, an embedding to
compare with phrases, and objectness.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Float32, Int

from mtv_jax.models import layers
from mtv_jax.models.text import TextTower
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViT
from mtv_jax.utils.tree import pytree_dataclass

_EPS = 1e-4  # Bounds the logits of coordinates at the border.
_NORM_EPS = 1e-6  # Added to the norm of embeddings.


@pytree_dataclass
class Proposals:
  """Predictions for the p patches of images, independent of phrases."""

  embeddings: Float32[Array, "b p e"]  # Unit length.
  shift: Float32[Array, "b p"]  # Added to the cosines with phrases.
  scale: Float32[Array, "b p"]  # Multiplies the sum.
  # (y0, x0, y1, x1) in the padded image's unit square; may exceed it.
  boxes: Float32[Array, "b p 4"]
  objectness: Float32[Array, "b p"]  # Logits.

  def logits(
    self, queries: Float32[Array, "b q e"], valid: Bool[Array, "b q"]
  ) -> Float32[Array, "b p q"]:
    """Computes logits of each patch for each query of `Owlv2.queries`.

    A single row of queries is broadcast over images. For queries that are
    not `valid` (padding), returns the smallest float32.
    """
    queries = jnp.broadcast_to(
      queries, (len(self.embeddings), *queries.shape[1:])
    )
    # High precision: small differences of cosines are scaled up.
    cosines = jnp.einsum(
      "bpe,bqe->bpq",
      self.embeddings,
      queries,
      precision=jax.lax.Precision.HIGHEST,
    )
    logits = (cosines + self.shift[..., None]) * self.scale[..., None]
    return jnp.where(valid[:, None], logits, jnp.finfo(jnp.float32).min)


class Owlv2(nn.Module):
  """OWLv2 detector; patch tokens are not projected.

  Towers and hidden layers of the heads compute in `dtype`, last layers in
  float32. `scan` runs blocks in a loop, see `stack.run_stack`.
  """

  spec: ModelSpec
  dtype: Any = jnp.float32
  scan: bool = True

  def setup(self):
    spec = self.spec
    width = spec.image.width
    self.image = ViT(spec.image, dtype=self.dtype, scan=self.scan)
    self.text = TextTower(spec.text, dtype=self.dtype, scan=self.scan)
    self.merge_norm = nn.LayerNorm(
      spec.image.norm_eps, dtype=self.dtype, use_fast_variance=False
    )
    self.boxes = _Head(width, 4, self.dtype)
    self.objectness = _Head(width, 1, self.dtype)
    self.classes = _Classes(spec.text.projection)

  def __call__(
    self, images: Float[Array, "b s s 3"], tokens: Int[Array, "b q t"]
  ) -> tuple[Proposals, Float32[Array, "b p q"]]:
    """Runs both towers; returns patches and their logits.

    A query whose first id is 0 is padding, as in `transformers`.
    """
    b, q, t = tokens.shape
    queries = self.queries(tokens.reshape(b * q, 1, t)).reshape(b, q, -1)
    patches = self.detect(images)
    return patches, patches.logits(queries, tokens[..., 0] > 0)

  def detect(self, images: Float[Array, "b s s 3"]) -> Proposals:
    """Predicts proposals for normalised, padded images."""
    out = self.image(images)
    merged = self.merge_norm(out.patches * out.prefix[:, :1])
    grid = self.spec.image.grid_of(*images.shape[1:3])
    # (x, y, width, height), reversed to (height, width, y, x).
    raw = self.boxes(merged) + box_bias(grid)
    sizes, centre = jnp.split(jax.nn.sigmoid(raw)[..., ::-1], 2, axis=-1)
    half = sizes / 2
    embeddings, shift, scale = self.classes(merged)
    return Proposals(
      embeddings=embeddings,
      shift=shift,
      scale=scale,
      boxes=jnp.concatenate([centre - half, centre + half], axis=-1),
      objectness=self.objectness(merged)[..., 0],
    )

  def queries(self, tokens: Int[Array, "n k t"]) -> Float32[Array, "n e"]:
    """Embeds phrases; each embedding is the mean over its k prompts.

    The mean is not normalised again: OWL-ViT averages logits over prompts
    (Minderer et al. 2022), and logits are linear in the embedding.
    """
    n, k, t = tokens.shape
    pooled = self.text(tokens.reshape(n * k, t)).pooled
    units = _normalize(_normalize(pooled, eps=0.0))
    return units.reshape(n, k, -1).mean(axis=1)


class _Head(nn.Module):
  """Three dense layers with exact GELU; float32 output."""

  width: int
  out: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    x = layers.Mlp(self.width, "exact", dtype=self.dtype, name="mlp")(x)
    x = layers.gelu(x, "exact")
    return nn.Dense(self.out, dtype=jnp.float32, name="last")(x)


class _Classes(nn.Module):
  """Patch embeddings, with the shift and scale of their similarities."""

  features: int

  @nn.compact
  def __call__(self, x):
    def dense(features, name):
      return nn.Dense(features, dtype=jnp.float32, name=name)(x)

    shift, scale = dense(1, "shift"), dense(1, "scale")
    embeddings = _normalize(dense(self.features, "projection"))
    return embeddings, shift[..., 0], jax.nn.elu(scale[..., 0]) + 1


def _normalize(x, eps=_NORM_EPS):
  return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + eps)


def box_bias(grid: tuple[int, int]) -> Float32[np.ndarray, "p 4"]:
  """Bias of the boxes of a grid's patches, as logits of (x, y, width, height).

  The bias is a patch-sized box at the patch's lower right corner.
  """
  rows, columns = grid
  y, x = np.mgrid[1 : rows + 1, 1 : columns + 1].astype(np.float32)
  sizes = np.ones_like(x)
  fractions = np.stack(
    [x / columns, y / rows, sizes / columns, sizes / rows], axis=-1
  ).reshape(-1, 4)
  return np.log(fractions + _EPS) - np.log1p(-fractions + _EPS)
