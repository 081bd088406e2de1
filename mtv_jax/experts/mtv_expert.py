"""Runs and exports of this package as experts.

The depth head labels depth. The locator predicts a box for a phrase; the
prompter embeds the box, and the grounding head scores it:

    score = sigmoid(scale cos(region, text) + bias)

The score is a pair's probability within a training batch, in which almost all
pairs are negative. Thresholds of typical detectors do not apply.
"""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from mtv_jax.config.options import Fraction, PositiveInt, Range
from mtv_jax.data.labels import label_values
from mtv_jax.data.labels.label_values import LabelOutcome
from mtv_jax.data.records import Record
from mtv_jax.encoder import apply_fns, loading
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.experts import base
from mtv_jax.experts.base import (
  Arrays,
  Expert,
  Image,
  PreparedInput,
  check_options,
)
from mtv_jax.experts.depth_anything import DepthExpert
from mtv_jax.experts.labelling import detections
from mtv_jax.experts.labelling import phrases as phrases_lib
from mtv_jax.experts.labelling.detections import Detections
from mtv_jax.experts.labelling.phrases import Phrases
from mtv_jax.models.heads.projection import unit
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.tree import fingerprint

# Options that apply to only one kind, by kind.
OPTIONS_BY_KIND = {
  "depth": ("side", "bits"),
  "boxes": ("phrases", "threshold", "nms", "max_boxes", "min_side", "max_area"),
}
# Settings of an encoder that determine labels.
_PROTOCOL_KEYS = ("weights", "dtype", "input_size", "preprocess", "tokenizer")


def make_depth_expert(
  encoder: Encoder, *, batch_size: int, side: int, bits: int
) -> DepthExpert:
  """Builds a depth expert from the depth head of an encoder on a local mesh."""
  params = _select_params(encoder, {"depth": "depth"}, ["depth"])
  return DepthExpert(
    inspect.unwrap(encoder.head_function("depth")),
    params,
    encoder.preprocess,
    mesh=encoder.mesh,
    batch_size=batch_size,
    side=side,
    bits=bits,
    settings=_describe_settings(encoder, params),
  )


class MtvBoxExpert:
  """Labels boxes with an encoder's locator and prompter.

  The encoder's mesh must be local to this host. `options` are passed to
  `detections.select`.
  """

  kind = "boxes"

  def __init__(
    self,
    encoder: Encoder,
    phrases: Phrases,
    *,
    batch_size: int,
    threshold: float,
    **options: Any,
  ):
    params = _select_params(
      encoder,
      {"grounding": "grounding", "locator": "grounding with regression=1.0"},
      ["locator", "prompter", "grounding"],
    )
    params["text"] = encoder.params["text"]
    self.rows = batch_size * encoder.mesh.size
    self._preprocess = encoder.preprocess
    self._phrases, self._threshold, self._options = phrases, threshold, options
    self.settings = {
      **_describe_settings(encoder, params),
      "batch_size": batch_size,
      "phrases": dict(phrases.settings),
      "threshold": threshold,
      **options,
    }
    self._tokenizer = encoder.tokenizer
    self._length = encoder.phrase_length or encoder.spec.text.length
    if self._length != encoder.spec.text.length:
      self.settings["phrase_length"] = self._length
    if phrases.vocabulary is not None:
      # One row per device: rounding may depend on the shapes of products.
      params["texts"] = encoder.phrases(
        list(phrases.vocabulary), batch_size=encoder.mesh.size
      )
    self._params = base.replicate(params, encoder.mesh)
    self._function = base.jit_per_device(_detector(encoder), encoder.mesh)
    self._mesh = encoder.mesh

  def prepare(self, image: Image, record: Record) -> PreparedInput:
    """Preprocesses image and phrases; raises BadRecord without phrases."""
    pixels = self._preprocess(image)
    vocabulary = self._phrases.vocabulary
    if vocabulary is not None:
      return PreparedInput("vocabulary", {"images": pixels}, meta=vocabulary)
    phrases = phrases_lib.require_phrases(self._phrases, record)
    count = phrases_lib.pad_count(len(phrases))
    tokens = np.zeros((count, self._length), np.int32)
    tokens[: len(phrases)] = self._tokenizer.encode(phrases, self._length)
    return PreparedInput(
      count, {"images": pixels, "tokens": tokens}, meta=phrases
    )

  def run(self, arrays: Arrays) -> dict[str, jax.Array]:
    """Predicts `boxes` `[rows, m, 4]` and `scores` `[rows, m]` of m phrases."""
    return self._function(self._params, base.shard(arrays, self._mesh))

  def finish(self, outputs: Arrays, meta: Sequence[str]) -> LabelOutcome:
    """Selects the boxes of one image that score above the threshold."""
    scores = outputs["scores"][: len(meta)]
    indices = np.flatnonzero(scores > self._threshold)
    boxes = Detections(
      boxes=outputs["boxes"][indices],
      scores=scores[indices],
      phrases=tuple(meta[i] for i in indices),
    )
    return detections.select(boxes, **self._options)


def _detector(encoder: Encoder) -> Callable[[PyTree, PyTree], PyTree]:
  """Builds a function from images and tokens to boxes and scores by phrase."""
  locate = inspect.unwrap(encoder.head_function("locator"))
  ground = inspect.unwrap(encoder.head_function("grounding"))
  encode_text = inspect.unwrap(
    apply_fns.text_function(encoder.spec, encoder.dtype, encoder.mesh)
  )

  def embed_phrases(params, batch):
    count = len(batch["images"])
    if "tokens" not in batch:
      texts = params["texts"]
      return jnp.broadcast_to(texts, (count, *texts.shape))
    tokens = batch["tokens"]
    out = encode_text(params["text"], tokens.reshape(-1, tokens.shape[-1]))
    return out["pooled"].reshape(*tokens.shape[:2], -1)

  def detect(params, batch):
    texts, images = embed_phrases(params, batch), batch["images"]
    boxes = locate(params, {"images": images, "phrases": texts})["boxes"]
    # The prompter was trained on boxes inside the image. The compiler merges
    # both runs of the image tower.
    clipped = jnp.clip(boxes, 0, 1)
    regions = ground(params, {"images": images, "boxes": clipped})
    cosine = (regions["embeddings"] * unit(texts)).sum(axis=-1)
    head = params["heads"]["grounding"]
    logits = jnp.exp(head["logit_scale"]) * cosine + head["logit_bias"]
    return {"boxes": boxes, "scores": jax.nn.sigmoid(logits)}

  return detect


def _select_params(
  encoder: Encoder, objectives: Mapping[str, str], heads: Sequence[str]
) -> dict[str, PyTree]:
  """Selects the parameters of the image tower and of `heads`.

  `objectives` maps each prediction head to the objective that trains it.
  """
  params = encoder.params.get("heads", {})
  for head, objective in objectives.items():
    if not encoder.can_predict(head):
      raise InputError(
        f"{encoder!r} can't predict {head!r}; it has the heads"
        f" {sorted(params)}. Load a run trained with the objective {objective},"
        " or an export that has the head."
      )
  if encoder.preprocess.crop != "none":
    raise InputError(
      f"{encoder!r} sees a crop of an image"
      f" (crop={encoder.preprocess.crop!r}), but labels cover the whole image."
    )
  if missing := [name for name in heads if name not in params]:
    raise InputError(
      f"{encoder!r} lacks the heads {missing}; it has {sorted(params)}."
      " An export without them can't label: use the run's folder."
    )
  head_params = {name: params[name] for name in heads}
  return {"image": encoder.params["image"], "heads": head_params}


def _describe_settings(encoder: Encoder, params: PyTree) -> dict[str, Any]:
  protocol = encoder.protocol()
  return {
    "expert": "own",
    "hash": fingerprint(params),
    **{name: protocol[name] for name in _PROTOCOL_KEYS if name in protocol},
  }


@check_options
def load_expert(
  folder: str | os.PathLike,
  *,
  kind: Literal["depth", "boxes"],
  phrases: Phrases | None = None,
  mesh: Mesh | None = None,
  batch_size: PositiveInt | None = None,
  dtype: str | None = None,
  side: Annotated[int, Range(min=label_values.MIN_SIDE)] = label_values.SIDE,
  bits: label_values.Bits = label_values.BITS,
  threshold: Fraction = 0.1,
  nms: Fraction = 0.5,
  max_boxes: PositiveInt = 30,
  min_side: Fraction = 0.015,
  max_area: Fraction = 0.95,
) -> Expert:
  """Opens a training run or its export as an expert.

  Args:
    folder: see `loading.load`; a run loads its latest student.
    kind: kind of labels, "depth" or "boxes".
    phrases: queries, for boxes.
    mesh, batch_size, dtype: see `base.fill_defaults`.
    side, bits: side of depth labels in pixels, and bits of a pixel.
    threshold: minimum score of a box, exclusive.
    nms, max_boxes, min_side, max_area: see `detections.select`.
  """
  if kind == "boxes" and phrases is None:
    raise InputError(
      "boxes need phrases: pass --phrases, such as ngrams or a vocabulary"
      " file (in Python, phrases=build_phrases(...))."
    )
  mesh, dtype, batch_size = base.fill_defaults(mesh, dtype, batch_size)
  encoder = loading.load(folder, dtype=dtype, mesh=mesh)
  if kind == "depth":
    sizes = dict(batch_size=batch_size, side=side, bits=bits)
    return make_depth_expert(encoder, **sizes)
  return MtvBoxExpert(
    encoder,
    phrases,
    batch_size=batch_size,
    threshold=threshold,
    nms=nms,
    max_boxes=max_boxes,
    min_side=min_side,
    max_area=max_area,
  )
