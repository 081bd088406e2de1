"""Language model on an encoder's features, as in LLaVA (Liu et al. 2023).

A connector, an MLP of two layers (LLaVA-1.5, Liu et al. 2024), maps patches, or
other features of the encoder, to token embeddings, which replace the image
token of a text.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mtv_jax.models import layers
from mtv_jax.models import stack as stack_lib
from mtv_jax.models.heads import base
from mtv_jax.models.language_model import (
  LanguageModel,
  LanguageModelSpec,
  TokenLogits,
)
from mtv_jax.utils.errors import ConfigError, InputError


class Connector(nn.Module):
  """Two-layer MLP from features to token embeddings."""

  width: int

  @nn.compact
  def __call__(self, x: Float[Array, "b n e"]) -> Float[Array, "b n d"]:
    def dense(name):
      return layers.Dense(self.width, dtype=x.dtype, name=name)

    return dense("fc2")(layers.gelu(dense("fc1")(x), "exact"))


class ConnectedLanguageModel(nn.Module):
  """Connector and language model; computes in the dtype of the patches.

  A negative token stands for the image; a text has at most one.
  """

  stacks = ("decoder/blocks",)  # See `objectives.base.Head`.

  spec: LanguageModelSpec
  remat: str = "none"  # remat, scan, mesh: see `stack.run_stack`.
  scan: bool = True
  mesh: Mesh | None = None

  def setup(self):
    self.connector = Connector(self.spec.width)
    self.decoder = LanguageModel(self.spec, self.remat, self.scan, self.mesh)

  def _embed(self, tokens, patches):
    """Embeds tokens, with the patches in place of the image token.

    Returns the embeddings `[b, t + n - 1, d]`, and each token's index `[b, t]`
    among them. Without an image token the patches are at the end, where no
    token attends to them.
    """
    t, n = tokens.shape[1], patches.shape[1]
    is_image = tokens < 0
    start = jnp.where(is_image.any(1), jnp.argmax(is_image, axis=1), t)[:, None]
    text = self.decoder.embed(jnp.maximum(tokens, 0)).astype(patches.dtype)
    image = self.connector(patches)
    index = jnp.arange(t + n - 1)[None]
    offset = index - start  # Negative before the image.
    text_index = jnp.where(offset < 0, index, index - n + 1)
    x = jnp.where(
      ((offset >= 0) & (offset < n))[..., None],
      _take(image, jnp.clip(offset, 0, n - 1)),
      _take(text, jnp.clip(text_index, 0, t - 1)),
    )
    index = jnp.arange(t)[None]
    return x, index + (n - 1) * (index > start)

  def __call__(
    self, tokens: Int[Array, "b t"], patches: Float[Array, "b n e"]
  ) -> TokenLogits:
    """Next-token logits `[b, 1, t - 1]`, of tokens 1 to t - 1.

    Padding follows the text, so no token attends to it.
    """
    x, index = self._embed(tokens, patches)
    vectors = _take(self.decoder(x), index[:, 1:] - 1)
    return self.decoder.logits(vectors[:, None])

  def generate(
    self,
    tokens: Int[Array, "b t"],
    length: Int[Array, " b"],
    patches: Float[Array, "b n e"],
    *,
    max_tokens: int,
    stop: int,
  ) -> Int[Array, "b {max_tokens}"]:
    """Greedy decoding after prompts of `length` tokens, padded on the right."""
    x, index = self._embed(tokens, patches)
    last_index = jnp.take_along_axis(index, length[:, None] - 1, axis=1)[:, 0]
    # If the prompt ends with the image token, it ends with the last patch.
    last_token = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)[:, 0]
    last_index += (patches.shape[1] - 1) * (last_token < 0)
    options = dict(max_tokens=max_tokens, stop=stop)
    return self.decoder.generate(x, last_index + 1, **options)


def _take(x: Float[Array, "b n d"], index: Int[Array, "b m"]) -> Array:
  return jnp.take_along_axis(x, index[..., None], axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageHead(LanguageModelSpec, base.PredictionHead):
  """Connector and language model; its options are the language model's."""

  params_key = "language_model"
  tokenizer = "conversation"

  # Blocks whose tokens the connector reads, without the final norm; several are
  # concatenated along channels. LLaVA reads the second to last. None: the
  # encoder's output.
  layer: int | tuple[int, ...] | None = -2
  # 'all' puts CLS and registers before the patches (LLaVA's `cls_patch`),
  # 'pooled' is only the pooled embedding; `layer` is then unused.
  select: Literal["patches", "all", "pooled"] = "patches"

  @property
  def taps(self) -> tuple[int, ...]:
    if self.layer is None or self.select == "pooled":
      return ()
    return (self.layer,) if isinstance(self.layer, int) else self.layer

  def resolve(self, spec: Any) -> LanguageHead:
    try:
      self.check()
    except InputError as error:
      raise ConfigError(f"next_token: {error}") from None
    depth = spec.image.depth
    taps = tuple(i + depth if i < 0 else i for i in self.taps)
    stack_lib.check_layers(taps, depth)
    if self.layer == () or len({*taps}) < len(taps):
      raise ConfigError(f"next_token.layer={self.layer}: needs unique blocks")
    layer = taps if len(taps) > 1 else taps[0] if taps else None
    return dataclasses.replace(self, layer=layer)

  @property
  def language_spec(self) -> LanguageModelSpec:
    names = [field.name for field in dataclasses.fields(LanguageModelSpec)]
    return LanguageModelSpec(**{name: getattr(self, name) for name in names})

  def module(self, **runtime: Any) -> ConnectedLanguageModel:
    """Builds the module; `runtime`: `remat` and `scan`."""
    return ConnectedLanguageModel(self.language_spec, **runtime)

  def num_channels(self, spec: Any) -> int:
    """Channels of the features that the connector reads."""
    if self.select == "pooled":
      return spec.image.embed_dim
    return spec.image.width * max(len(self.taps), 1)

  def example(self, spec: Any) -> tuple:
    return (
      jax.ShapeDtypeStruct((1, 2), "int32"),
      jax.ShapeDtypeStruct((1, 1, self.num_channels(spec)), "float32"),
    )

  def check_tokenizer(self, tokenizer: Any) -> None:
    if tokenizer is None or tokenizer.vocab_size > self.vocab_size:
      raise ConfigError(
        f"The language model has {self.vocab_size} token embeddings, but "
        f"op `conversation` has {tokenizer!r}. Set its tokenizer or vocab_size."
      )

  def select_features(self, image: Any) -> Float[Array, "*b n e"]:
    """The features that the connector reads from a `vit.ImageOutput`."""
    if self.select == "pooled":  # Float32 in any compute dtype.
      return image.pooled[..., None, :].astype(image.patches.dtype)
    if not self.taps:
      return self.join_features([image.prefix], [image.patches], jnp)
    taps, num_prefix = self.taps, image.prefix.shape[-2]
    prefixes = [image.intermediates[i][..., :num_prefix, :] for i in taps]
    patches = [image.intermediates[i][..., num_prefix:, :] for i in taps]
    return self.join_features(prefixes, patches, jnp)

  def join_features(self, prefixes: list, patches: list, numpy: Any) -> Any:
    """Joins the layers' prefixes `[*b, p, d]` and patches `[*b, n, d]`.

    `numpy` is the module of the arrays, `numpy` or `jax.numpy`.
    """
    if self.select == "all":
      pairs = zip(prefixes, patches, strict=True)
      patches = [numpy.concatenate(pair, axis=-2) for pair in pairs]
    return patches[0] if len(patches) == 1 else numpy.concatenate(patches, -1)

  def predict(self, head, image, grid, **inputs) -> dict[str, Array]:
    raise InputError(
      "A language model answers questions: use VisualLanguageModel.load(RUN)"
      ".answer from mtv_jax.encoder.visual_language."
    )
