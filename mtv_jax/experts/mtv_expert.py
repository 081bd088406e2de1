"""Runs and exports of this package as experts.

Its depth head labels depth. Its locator and its prompter label boxes: the
locator says where a phrase would be, and the prompter's embedding of what is
there says whether it is, by the loss that both were trained with:

    score = sigmoid(scale cos(region, text) + bias)

A score is the probability of a pair among the pairs of a training batch, where
almost all are false: the same threshold means more than with another detector.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree, UInt8

from mtv_jax.data.labels import label_values
from mtv_jax.data.labels.label_values import Outcome
from mtv_jax.data.records import Record
from mtv_jax.encoder import apply_fns, loading
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.experts import local_mesh
from mtv_jax.experts.base import Prepared
from mtv_jax.experts.labelling import detections
from mtv_jax.experts.labelling import phrases as phrases_lib
from mtv_jax.experts.labelling.detections import Detections
from mtv_jax.experts.labelling.phrases import Phrases
from mtv_jax.models.heads.projection import unit
from mtv_jax.utils.errors import InputError, check_choice

# Options that only experts of this kind have.
OF_KIND = {
  "depth": ("side",),
  "boxes": ("phrases", "threshold", "nms", "max_boxes", "min_side", "max_area"),
}


class OwnDepth:
  """An expert of depth: the depth head of an encoder.

  Args:
    encoder: that has one; its mesh is of this host.
    rows: of a batch.
    side: of the labels, in pixels.

  Raises:
    InputError: the encoder has no such head.
  """

  kind = "depth"

  def __init__(self, encoder: Encoder, *, rows: int, side: int):
    if not encoder.can_predict("depth"):
      raise InputError(_lacks(encoder, "depth", "depth"))
    _require_whole(encoder)
    self.rows = rows
    self._preprocess = encoder.preprocess
    self._side = side
    self._params = _params(encoder, ["depth"])
    self._function = local_mesh.jit_per_device(
      inspect.unwrap(encoder.head_function("depth")), encoder.mesh
    )
    self._mesh = encoder.mesh
    self.settings = {
      **_settings(encoder, self._params),
      "batch_size": rows // encoder.mesh.size,
      "side": side,
    }

  def prepare(
    self, image: UInt8[np.ndarray, "h w 3"], record: Record
  ) -> Prepared:
    """The image as the encoder reads it."""
    del record
    return Prepared("image", {"images": self._preprocess(image)})

  def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """`depth` `[rows, h, w]`, inverse, each image's in its own scale."""
    return self._function(self._params, local_mesh.shard(arrays, self._mesh))

  def finish(self, outputs: Mapping[str, np.ndarray], meta: Any) -> Outcome:
    """The label of one image."""
    del meta
    return label_values.make_depth(outputs["depth"], side=self._side)


class OwnBoxes:
  """An expert of boxes: the locator and the prompter of an encoder.

  Args:
    encoder: that has both; its mesh is of this host.
    phrases: to look for.
    rows: of a batch.
    options: of `detections.check_options`.

  Raises:
    InputError: the encoder lacks a head.
  """

  kind = "boxes"

  def __init__(
    self,
    encoder: Encoder,
    phrases: Phrases,
    *,
    rows: int,
    options: Mapping[str, Any],
  ):
    if not encoder.can_predict("grounding"):
      raise InputError(_lacks(encoder, "prompter", "grounding"))
    if not encoder.can_predict("locator"):
      raise InputError(
        _lacks(encoder, "locator", "grounding with regression=1.0")
        + " A prompter says what is in a box, and has none to begin with."
      )
    _require_whole(encoder)
    self.rows = rows
    self._preprocess = encoder.preprocess
    self._phrases, self._options = phrases, dict(options)
    self._params = _params(encoder, ["locator", "prompter", "grounding"])
    self.settings = {
      **_settings(encoder, self._params),
      "batch_size": rows // encoder.mesh.size,
      "phrases": dict(phrases.settings),
      **options,
    }
    self._tokenizer, self._length = encoder.tokenizer, encoder.spec.text.length
    if phrases.vocabulary is not None:
      found = encoder.text(list(phrases.vocabulary))
      self._params["texts"] = local_mesh.replicate(found, encoder.mesh)
    self._function = local_mesh.jit_per_device(_detector(encoder), encoder.mesh)
    self._mesh = encoder.mesh

  def prepare(
    self, image: UInt8[np.ndarray, "h w 3"], record: Record
  ) -> Prepared:
    """The image as the encoder reads it, and the phrases' tokens.

    Raises:
      BadRecord: there is nothing to look for.
    """
    pixels = self._preprocess(image)
    vocabulary = self._phrases.vocabulary
    if vocabulary is not None:
      return Prepared("vocabulary", {"images": pixels}, meta=vocabulary)
    phrases = phrases_lib.require_phrases(self._phrases, record)
    count = phrases_lib.padded_count(len(phrases))
    tokens = np.zeros((count, self._length), np.int32)
    tokens[: len(phrases)] = self._tokenizer.encode(phrases, self._length)
    return Prepared(count, {"images": pixels, "tokens": tokens}, meta=phrases)

  def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """`boxes` `[rows, m, 4]` and `scores` `[rows, m]`, of m phrases."""
    return self._function(self._params, local_mesh.shard(arrays, self._mesh))

  def finish(
    self, outputs: Mapping[str, np.ndarray], meta: Sequence[str]
  ) -> Outcome:
    """The label of one image."""
    options = dict(self._options)
    scores = outputs["scores"][: len(meta)]
    sure = np.flatnonzero(scores > options.pop("threshold"))
    found = Detections(
      boxes=outputs["boxes"][sure],
      scores=scores[sure],
      phrases=tuple(meta[i] for i in sure),
    )
    return detections.select(found, **options)


def _detector(encoder: Encoder) -> Callable[[PyTree, PyTree], PyTree]:
  """From `images` (and `tokens`) to a box and a score for each phrase."""
  locate = inspect.unwrap(encoder.head_function("locator"))
  ground = inspect.unwrap(encoder.head_function("grounding"))
  read = inspect.unwrap(
    apply_fns.text_function(encoder.spec, encoder.dtype, encoder.mesh)
  )

  def texts_of(params, rows):
    count = len(rows["images"])
    if "tokens" not in rows:
      found = params["texts"]
      return jnp.broadcast_to(found, (count, *found.shape))
    tokens = rows["tokens"]
    pooled = read(params["text"], tokens.reshape(-1, tokens.shape[-1]))
    return pooled["pooled"].reshape(*tokens.shape[:2], -1)

  def detect(params, rows):
    texts, images = texts_of(params, rows), rows["images"]
    boxes = locate(params, {"images": images, "phrases": texts})["boxes"]
    # Training shows the prompter boxes inside the image only. It asks the
    # image tower again, which the compiler sees, and runs it once.
    inside = jnp.clip(boxes, 0, 1)
    regions = ground(params, {"images": images, "boxes": inside})
    cosine = (regions["embeddings"] * unit(texts)).sum(axis=-1)
    head = params["heads"]["grounding"]
    logits = jnp.exp(head["logit_scale"]) * cosine + head["logit_bias"]
    return {"boxes": boxes, "scores": jax.nn.sigmoid(logits)}

  return detect


def _params(encoder: Encoder, heads: Sequence[str]) -> dict[str, PyTree]:
  """The parameters that labels depend on, whole on each device."""
  found = dict(encoder.params["heads"])
  if missing := [name for name in heads if name not in found]:
    raise InputError(
      f"{encoder!r} lacks the heads {missing}; it has {sorted(found)}."
      " An export that leaves them out can't label: use the run's own folder."
    )
  kept = {
    "image": encoder.params["image"],
    "heads": {name: found[name] for name in heads},
  }
  if "grounding" in heads:
    kept["text"] = encoder.params["text"]
  return local_mesh.replicate(kept, encoder.mesh)


def _settings(encoder: Encoder, params: PyTree) -> dict[str, Any]:
  kept = ("weights", "dtype", "input_size", "preprocess", "tokenizer")
  protocol = encoder.protocol()
  return {
    "expert": "own",
    "hash": local_mesh.fingerprint(params),
    **{name: protocol[name] for name in kept if name in protocol},
  }


def _lacks(encoder: Encoder, head: str, objective: str) -> str:
  found = sorted(encoder.params.get("heads", {}))
  return (
    f"{encoder!r} has no {head} (its heads are {found}): it was trained without"
    f" the objective {objective}, or is an export without it. Load a run that"
    " has it."
  )


def _require_whole(encoder: Encoder) -> None:
  if encoder.preprocess.crop != "none":
    raise InputError(
      f"{encoder!r} sees a crop of an image"
      f" (crop={encoder.preprocess.crop!r}), and labels are of all of it"
    )


def load_expert(
  folder: str | os.PathLike,
  *,
  kind: str,
  phrases: Phrases | None = None,
  mesh: Mesh | None = None,
  batch_size: int = 1,
  dtype: str = "float32",
  side: int = 128,
  threshold: float | int = 0.1,
  nms: float | int = 0.5,
  max_boxes: int = 30,
  min_side: float | int = 0.015,
  max_area: float | int = 0.95,
) -> OwnDepth | OwnBoxes:
  """Opens a training run, or an export of ours, as an expert.

  Args:
    folder: see `loading.load`; of a run the latest checkpoint's student.
    kind: of the labels, "depth" or "boxes".
    phrases: what boxes are looked for.
    mesh: of this host; all its devices by default.
    batch_size: rows a device.
    dtype: of the computation.
    side: of depth labels, in pixels.
    threshold: boxes of no higher score are left out.
    nms: see `detections.select`.
    max_boxes: the same.
    min_side: the same.
    max_area: the same.

  Raises:
    FileNotFoundError: nothing that can be opened is there.
    InputError: the model lacks the heads, there are no phrases for boxes, or
      an option is out of its range.
  """
  check_choice("own: kind", kind, label_values.KINDS)
  if batch_size < 1 or side < label_values.MIN_SIDE:
    raise InputError(
      f"batch_size={batch_size} and side={side}; expected at least 1 and"
      f" {label_values.MIN_SIDE}"
    )
  options = detections.check_options(
    threshold=threshold,
    nms=nms,
    max_boxes=max_boxes,
    min_side=min_side,
    max_area=max_area,
  )
  if kind == "boxes" and phrases is None:
    raise InputError(
      "boxes are looked for by phrases: give --phrases, such as ngrams or a"
      " vocabulary's file (in Python, phrases=build_phrases(...))"
    )
  mesh = local_mesh.local_mesh() if mesh is None else mesh
  encoder = loading.load(folder, dtype=dtype, mesh=mesh)
  rows = batch_size * mesh.size
  if kind == "depth":
    return OwnDepth(encoder, rows=rows, side=side)
  return OwnBoxes(encoder, phrases, rows=rows, options=options)
