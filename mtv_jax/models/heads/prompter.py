"""CLOC prompter and locator (Chen et al. 2025), and the grounding heads.

The prompter maps a box to an embedding to compare with text embeddings; the
locator maps a text embedding to a box.

Both are one transformer layer over [prompt tokens; patch tokens] that outputs
only the prompt tokens. A single layer's prompt outputs don't depend on the
patches' queries, so only the patches' keys and values are computed, once for
all prompts of an image. For ViT-B/16 at 224 and four boxes that costs 0.6 GFLOP
per image, 1.7 % of the tower; the whole layer per box would cost 33 %.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from mtv_jax.config import options
from mtv_jax.models import layers
from mtv_jax.models.heads import base
from mtv_jax.models.heads.projection import unit
from mtv_jax.utils.errors import InputError

NORM_EPS = 1e-6
# Periods per unit length: a quarter distinguishes the two ends of an image; 16
# is one period per patch and resolves fractions of a patch.
FREQUENCIES = (0.25, 16.0)


def sinusoids(
  coordinates: Float[Array, "*b c"], features: int
) -> Float[Array, "*b {features}"]:
  """Sines and cosines of each coordinate, at geometrically spaced frequencies.

  Channels are float32, ordered (coordinate, sine | cosine, frequency).
  """
  *lead, count = coordinates.shape
  if features % (2 * count):
    raise InputError(f"{features} channels are not a multiple of {2 * count}.")
  frequencies = np.geomspace(*FREQUENCIES, features // (2 * count))
  angles = 2 * np.pi * coordinates[..., None].astype(jnp.float32) * frequencies
  waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
  return waves.astype(jnp.float32).reshape(*lead, features)


class PromptLayer(nn.Module):
  """Pre-norm block that updates the prompts, which attend to [prompt; patches].

  Equivalent to running the whole layer per prompt, see the module docstring.
  Computes in the dtype of `patches`, the image tower's normalised output.
  """

  heads: int

  @nn.compact
  def __call__(
    self, prompts: Float[Array, "b m k d"], patches: Float[Array, "b n d"]
  ) -> Float[Array, "b m k d"]:
    b, m, k, width = prompts.shape
    dtype = patches.dtype
    if width % self.heads:
      raise InputError(
        f"The patches' width {width} is not divisible by {self.heads} heads."
      )
    # One call for all prompts of an image, masked from one another, to read the
    # patches' keys and values once.
    prompt_index = np.arange(m * k) // k
    is_same_prompt = prompt_index[:, None] == prompt_index
    padding = ((0, 0), (0, patches.shape[1]))
    mask = np.pad(is_same_prompt, padding, constant_values=True)[None, None]

    def attend(q, keys, values):
      y = jax.nn.dot_product_attention(q, keys, values, mask=jnp.asarray(mask))
      return y.reshape(b, m, k, *y.shape[2:])

    norm = layers.norm(NORM_EPS, dtype, "norm1")
    attention = layers.CrossAttention(
      self.heads, dtype, attend, name="attention"
    )
    x = prompts.astype(dtype)  # [B, M, K, D]
    y = norm(x).reshape(b, m * k, width)  # [B, M K, D]
    x = x + attention(y, jnp.concatenate([y, norm(patches)], axis=1))
    y = layers.norm(NORM_EPS, dtype, "norm2")(x)
    return x + layers.Mlp(4 * width, dtype=dtype, name="mlp")(y)


class Prompter(nn.Module):
  """Prompter: embeddings of boxes, not normalised.

  Boxes are `(y0, x0, y1, x1)` in 0..1 of the tower's input. `features` is the
  number of channels of the text embeddings.
  """

  heads: int

  @nn.compact
  def __call__(
    self,
    patches: Float[Array, "b n d"],
    boxes: Float[Array, "b m 4"],
    features: int,
  ) -> Float[Array, "b m {features}"]:
    b, m, _ = boxes.shape
    width, dtype = patches.shape[-1], patches.dtype
    # Two tokens per box, as in CLOC, which encodes one corner in each. Ours
    # encode both: in a single layer a query needs both to attend to the box.
    encoding = sinusoids(boxes, 2 * width).astype(dtype)
    x = nn.Dense(2 * width, dtype=dtype, name="embed")(encoding)
    x = x.reshape(b, m, 2, width)
    x = PromptLayer(self.heads, name="layer")(x, patches)
    # The mean excludes the patches' outputs, see the module docstring.
    x = layers.norm(NORM_EPS, dtype, "norm")(x)
    pooled = x.mean(axis=2, dtype=jnp.float32).reshape(b * m, width)
    return layers.project(pooled, features).reshape(b, m, features)


class Locator(nn.Module):
  """Locator: predicts a box per text embedding, `m` per image.

  `(centre y, centre x, height, width)` in (0, 1), float32. Boxes may extend
  beyond the image.
  """

  heads: int

  @nn.compact
  def __call__(
    self, patches: Float[Array, "b n d"], texts: Float[Array, "b m e"]
  ) -> Float[Array, "b m 4"]:
    width, dtype = patches.shape[-1], patches.dtype
    x = nn.Dense(width, dtype=dtype, name="embed")(texts.astype(dtype))
    x = PromptLayer(self.heads, name="layer")(x[:, :, None], patches)[:, :, 0]
    x = layers.norm(NORM_EPS, dtype, "norm")(x)
    x = layers.gelu(nn.Dense(width, dtype=dtype, name="fc1")(x), "tanh")
    # Float32, initialised to zero as in OWL-ViT: boxes start in the centre.
    fc2 = nn.Dense(4, kernel_init=nn.initializers.zeros, name="fc2")
    return jax.nn.sigmoid(fc2(x.astype(jnp.float32)))


def corners(boxes: Float[Array, "*b 4"]) -> Float[Array, "*b 4"]:
  """Converts (centre y, centre x, height, width) to (y0, x0, y1, x1)."""
  centre, half = boxes[..., :2], boxes[..., 2:] / 2
  return jnp.concatenate([centre - half, centre + half], axis=-1)


@dataclasses.dataclass(frozen=True)
class GroundingHead(base.PredictionHead):
  """Grounding head: region embeddings from a prompter."""

  params_key = "prompter"
  inputs = {"boxes": 4}

  attention_heads: options.PositiveInt = 1  # CLOC has one.
  # Tokens of a training phrase, padding included. A run takes this from the op
  # `regions` in `config.data.ops`; None: the text tower's.
  phrase_length: options.PositiveInt | None = None

  def predictions(self) -> dict[str, base.PredictionHead]:
    return {"grounding": self, "locator": self.locator}

  @property
  def locator(self) -> LocatorHead:
    """The head for box regression, with the same options."""
    return LocatorHead(**dataclasses.asdict(self))

  def module(self) -> nn.Module:
    return Prompter(self.attention_heads)

  def example(self, spec: Any) -> tuple:
    return (*_example_rows(spec.image.width, 4), spec.embed_dim)

  def predict(self, head, image, grid, *, boxes) -> dict[str, Array]:
    """Predicts unit `embeddings` `[B, m, E]` for boxes `(y0, x0, y1, x1)`."""
    del grid
    features = image.pooled.shape[-1]
    return {"embeddings": unit(head(image.patches, boxes, features))}


@dataclasses.dataclass(frozen=True)
class LocatorHead(GroundingHead):
  """Locator head: a box per phrase, trained by grounding with regression."""

  params_key = "locator"
  inputs = {"phrases": base.TEXT}

  def module(self) -> nn.Module:
    return Locator(self.attention_heads)

  def example(self, spec: Any) -> tuple:
    return _example_rows(spec.image.width, spec.embed_dim)

  def predict(self, head, image, grid, *, phrases) -> dict[str, Array]:
    """Predicts `boxes` `[B, m, 4]`, `(y0, x0, y1, x1)`."""
    del grid
    return {"boxes": corners(head(image.patches, unit(phrases)))}


def _example_rows(*channels: int) -> tuple[jax.ShapeDtypeStruct, ...]:
  return tuple(jax.ShapeDtypeStruct((1, 1, c), "float32") for c in channels)
