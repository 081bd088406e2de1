"""Zero-shot segmentation by patch-text similarity.

TIPSv2's protocol for ADE20K's 150 classes (Cao et al. 2026): images of short
side 448, bicubic; windows of 448 with stride 336; cosines of patches and class
vectors, upsampled to the window; softmax averaged over overlaps and resized to
the image; mIoU over classes with a union. Nothing is trained. TIPSv2-L
reaches 25.1.

Contrastive models compare texts with the pooled image. A patch is embedded as
an image with a single token: by attention pooling of that token if the encoder
has such a pool (value, output projection and MLP: our choice for SigLIP), else
by the final norm, as in TIPSv2; then by the tower's projection, if any. With
`last_block="values"`, each token's own value replaces the last block's
attention (MaskCLIP, Zhou et al. 2022, in TIPSv2's form, with residual and MLP),
since attention mixes the whole image into each token.

On scenes, only objects are scored, since captions have no word for background
or ground that could be a prompt.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32

from mtv_jax.encoder import apply_fns, batched
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import normalize
from mtv_jax.evals.classification.zero_shot import text_classifier
from mtv_jax.evals.core import prompts
from mtv_jax.evals.core.base import Result, require_text
from mtv_jax.evals.core.examples import SegmentationSet
from mtv_jax.evals.datasets import registry, scenes
from mtv_jax.evals.segmentation import metrics as metrics_lib
from mtv_jax.evals.segmentation import sliding_window
from mtv_jax.evals.segmentation.metrics import (
  SegmentationEvaluator,
)
from mtv_jax.models import layers
from mtv_jax.models import stack as stack_lib
from mtv_jax.models import two_tower as models
from mtv_jax.models.vit import embed_pooled
from mtv_jax.parallel.mesh import replicated_sharding
from mtv_jax.utils.errors import InputError, check_choice

_SIZE, _STRIDE = 448, 336


@dataclasses.dataclass(frozen=True)
class ZeroShotSegmentation(SegmentationEvaluator):
  """Zero-shot segmentation by patch-text similarity: mIoU, mAcc and aAcc.

  The published `size` is 448 and the default `stride` three quarters of it.

  Attributes:
    prompts: a file of class names, in label order, and templates (see
      `prompts.py`); by default the data's names and `DEFAULT_TEMPLATES`.
    templates: a text file with one template per line, or `tcl`, TIPSv2's nine.
    clean: how prompts are cleaned, see `classification.zero_shot`.
    last_block: `attention` or `values`, see above; see `default_last_block`.
    average: averages the `softmax` of the cosines, or the cosines (`scores`),
      over overlapping windows.
  """

  title = "Zero-shot segmentation"
  requires = frozenset({"text"})

  prompts: str | None = None
  templates: str | None = None
  clean: Literal["tokenizer", "canonicalize"] = "tokenizer"
  last_block: Literal["attention", "values"] | None = None
  average: Literal["softmax", "scores"] = "softmax"

  @functools.cached_property
  def _set(self) -> tuple[SegmentationSet, prompts.Prompts]:
    data = registry.open_segmentation(self.data, split="test", count=self.count)
    if data.kind == "scenes":
      data = scenes.ignore_stuff(data)
    if self.prompts:
      prompt_set = prompts.read_prompts(self.prompts, classes=data.class_count)
    elif data.classes:
      prompt_set = prompts.Prompts(classes=data.classes)
    else:
      raise InputError(
        f"{data.name} lacks class names (objectInfo150.txt is missing); "
        "pass a prompt file (prompts=) with its classes in order"
      )
    if self.templates:
      prompt_set = prompts.replace_templates(prompt_set, self.templates)
    return data, prompt_set

  def run(self, encoder: Encoder) -> Result:
    """Returns metrics of predicting the class with the largest cosine."""
    require_text(encoder)
    data, prompt_set = self._set
    last_block = self.last_block or default_last_block(encoder)
    check_patch_text(encoder, last_block)
    slide = self._build_slide(encoder)
    classifier = text_classifier(encoder.text, prompt_set, clean=self.clean)

    def score(windows: list[np.ndarray]) -> np.ndarray:
      patches = embed_patches(
        encoder, windows, last_block=last_block, batch_size=self.encode_batch
      )
      return (normalize(patches) @ classifier.T)[..., None, :]

    predictions = self._predict(score, data, slide)
    sums = predictions.sums[:, 0]
    estimate = metrics_lib.estimate(sums)
    uses_pool = encoder.spec.image.pool in layers.ATTENTION_POOLS
    protocol = {
      **self._common_protocol(encoder, data, slide),
      **prompt_set.protocol(),
      "clean": self.clean,
      "tokens": "patches",
      "layer": "last",
      "last_block": last_block,
      "text_space": "attention pooling of the patch alone"
      if uses_pool
      else "final norm and projection of the patch",
      "similarity": "cosine, float32",
    }
    return Result.from_estimate(
      estimate,
      protocol,
      metrics_lib.chance(sums.sum(axis=0)),
      sheets=predictions.sheets("zero_shot_segmentation"),
    )

  def _build_slide(self, encoder: Encoder) -> sliding_window.Slide:
    size = self._window_size(encoder, _SIZE)
    return sliding_window.Slide(
      size=size,
      stride=self.stride or max(1, size * _STRIDE // _SIZE),
      short=size,
      rounding="down",
      interpolation="bicubic",
      average=self.average,
    )


def default_last_block(encoder: Encoder) -> str:
  """`attention` for attention pooling or a single block, else `values`."""
  image = encoder.spec.image
  uses_pool = image.pool in layers.ATTENTION_POOLS
  return "attention" if uses_pool or image.depth < 2 else "values"


def embed_patches(
  encoder: Encoder,
  images: Sequence[np.ndarray],
  *,
  last_block: str,
  batch_size: int,
) -> Float32[np.ndarray, "n h w e"]:
  """Patch embeddings in the space of `encoder.text`, not normalised.

  `last_block` is `attention`, as trained, or `values`; `images` are as for
  `Encoder.dense`.
  """
  check_patch_text(encoder, last_block)
  params, names = encoder.params["image"], ["pool", "pool_norm", "projection"]
  if last_block == "values":
    names += ["norm", "blocks"]
    layer = encoder.spec.image.depth - 2
    options = {"layers": (layer,), "outputs": (), "batch_size": batch_size}
    tokens = encoder.dense(images, **options).layers[layer]
  else:
    tokens = encoder.dense(images, batch_size=batch_size).patches
  embed_fn = _embed_fn(encoder.spec, encoder.dtype, last_block, encoder.mesh)
  outputs = batched.in_batches(
    functools.partial(embed_fn, {k: params[k] for k in names if k in params}),
    lambda i: tokens[i],
    count=len(tokens),
    blank=np.zeros_like(tokens[0]),
    batch_size=batch_size,
    mesh=encoder.mesh,
  )
  return outputs["patches"]


def check_patch_text(encoder: Encoder, last_block: str) -> None:
  """Raises InputError if an encoder's patches can't be embedded."""
  check_choice("last_block", last_block, ("attention", "values"))
  spec, params = encoder.spec.image, encoder.params["image"]
  required = ["pool"] if spec.pool in layers.ATTENTION_POOLS else []
  required += [n for n in ("pool_norm", "projection") if getattr(spec, n)]
  if last_block == "values":
    required += ["blocks", *(["norm"] if spec.final_norm else [])]
    if spec.depth < 2:
      raise InputError(
        "last_block='values' reads the output of the block before the last, "
        "but this encoder has one block; use last_block='attention'"
      )
  missing = [name for name in required if name not in params]
  if missing:
    raise InputError(
      f"{encoder!r} pools by {spec.pool!r}, but its image tower lacks "
      f"{', '.join(missing)}: its patches can't be embedded in the space of "
      f"its texts. The tower has {sorted(params)}."
    )


@functools.lru_cache(maxsize=16)
def _embed_fn(
  spec: models.ModelSpec, dtype: str, last_block: str, mesh: Mesh
) -> apply_fns.Function:
  module = _TokenTower(spec.image, jnp.dtype(dtype), last_block == "values")

  def run(params, tokens):
    if "blocks" in params:
      last = jax.tree.map(lambda p: p[-1], params["blocks"])
      params = {**params, "block": last}
    with apply_fns.precision(dtype):
      flat = module.apply(
        {"params": params}, tokens.reshape(-1, tokens.shape[-1])
      )
    return {"patches": flat.reshape(*tokens.shape[:-1], -1)}

  return jax.jit(run, out_shardings=replicated_sharding(mesh))


class _TokenTower(nn.Module):
  """Runs an image tower's last layers on single-token images.

  Parameters have the tower's names.
  """

  spec: Any
  dtype: Any
  run_block: bool  # runs the last block and the final norm first

  @nn.compact
  def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n e"]:
    spec = self.spec
    x = x[:, None].astype(self.dtype)  # [N, 1, D]
    if self.run_block:
      x = layers.Block(
        **stack_lib.block_options(spec), dtype=self.dtype, name="block"
      )(x)
      x = stack_lib.final_norm(spec, self.dtype)(x)
    if spec.pool in layers.ATTENTION_POOLS:
      x = layers.build_pool(spec, self.dtype)(x)  # [N, D]
    return embed_pooled(spec, x.reshape(-1, x.shape[-1]))
