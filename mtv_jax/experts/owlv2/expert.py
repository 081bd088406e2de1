"""OWLv2 (Minderer et al. 2023): expert of boxes for phrases.

A phrase's tokens go with the image; on the devices they become queries, see
`owlv2_queries`. There, too, every patch's best phrase is found and the best
patches are chosen, so that a few kilobytes an image come back.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree, UInt8

from mtv_jax.data.labels.label_values import Outcome
from mtv_jax.data.records import Record
from mtv_jax.encoder import apply_fns
from mtv_jax.experts import local_mesh
from mtv_jax.experts.base import Prepared
from mtv_jax.experts.labelling import detections
from mtv_jax.experts.labelling import phrases as phrases_lib
from mtv_jax.experts.labelling.detections import Detections
from mtv_jax.experts.labelling.phrases import Phrases
from mtv_jax.experts.owlv2 import weights as owlv2_weights
from mtv_jax.experts.owlv2.model import Owlv2, Patches
from mtv_jax.experts.owlv2.preprocess import in_square
from mtv_jax.experts.owlv2.queries import Queries
from mtv_jax.experts.owlv2.weights import Owlv2Files
from mtv_jax.parallel.mesh import num_batch_shards
from mtv_jax.utils.errors import InputError

# Prompts that OWL-ViT's logits are averaged over: CLIP's best seven on
# ImageNet, in the letters that OWL-ViT leaves of them.
ENSEMBLE = (
  "itap of a {}",
  "a bad photo of the {}",
  "a origami {}",
  "a photo of the large {}",
  "a {} in a video game",
  "art of the {}",
  "a photo of the small {}",
)
# Boxes that come back from the devices, the best ones of an image.
CANDIDATES = 512


class Owlv2Boxes:
  """An expert of boxes.

  Args:
    files: the model.
    phrases: what it looks for.
    mesh: of this host.
    rows: of a batch.
    dtype: compute dtype.
    size: side of the square that images are brought to, in pixels.
    prompts: each with a `{}` that a phrase takes the place of.
    options: of `detections.check_options`.
  """

  kind = "boxes"

  def __init__(
    self,
    files: Owlv2Files,
    *,
    phrases: Phrases,
    mesh: Mesh,
    rows: int,
    dtype: str,
    size: int,
    prompts: Sequence[str],
    options: Mapping[str, Any],
  ):
    self._files, self._phrases, self._mesh = files, phrases, mesh
    self._dtype, self._size = jnp.dtype(dtype), size
    self._prompts, self._options = tuple(prompts), dict(options)
    self.rows = rows
    self.settings = {
      "expert": "owlv2",
      "batch_size": rows // mesh.size,
      "hash": local_mesh.fingerprint(files.params),
      "tokenizer_hash": files.tokenizer_hash,
      "dtype": dtype,
      "size": size,
      "mean": list(files.mean),
      "std": list(files.std),
      "prompts": list(prompts),
      "candidates": CANDIDATES,
      "phrases": dict(phrases.settings),
      **options,
    }
    programs = Programs(Owlv2(files.spec, dtype=self._dtype), dtype)
    self._params = local_mesh.replicate(files.params, mesh)
    self._detect = local_mesh.jit_per_device(programs.detect, mesh)
    self._score = local_mesh.jit_per_device(programs.score, mesh)
    self._queries = Queries(
      programs.queries,
      self._params,
      width=files.spec.text.projection,
      mesh=mesh,
    )
    self._slots = None
    if phrases.vocabulary is not None:
      tokens = self._tokens(phrases.vocabulary)
      slots = np.tile(self._queries.find(tokens), (rows, 1))
      self._slots = local_mesh.shard({"slots": slots}, mesh)["slots"]

  def prepare(
    self, image: UInt8[np.ndarray, "h w 3"], record: Record
  ) -> Prepared:
    """The image in its square, and its phrases' tokens unless always the same.

    Raises:
      BadRecord: the record has no phrases.
    """
    tokens, group = {}, "vocabulary"
    phrases = self._phrases.vocabulary
    if phrases is None:
      phrases = phrases_lib.require_phrases(self._phrases, record)
      found = self._tokens(phrases)
      group = phrases_lib.padded_count(len(phrases))
      tokens["tokens"] = np.zeros((group, *found.shape[1:]), np.int32)
      tokens["tokens"][: len(phrases)] = found
    pixels = in_square(image, self._size)
    pixels -= np.array(self._files.mean, np.float32)
    pixels /= np.array(self._files.std, np.float32)
    arrays = {"pixels": pixels.astype(self._dtype), **tokens}
    return Prepared(group, arrays, meta=(image.shape[:2], phrases))

  def _tokens(self, phrases: Sequence[str]) -> np.ndarray:
    """Ids [n, prompts, length] of phrases in every prompt."""
    texts = [
      p.replace("{}", phrase) for phrase in phrases for p in self._prompts
    ]
    length = self._files.spec.text.length
    ids = self._files.tokenizer.encode(texts, length)
    return ids.reshape(len(phrases), len(self._prompts), length)

  def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """The best `CANDIDATES` boxes, see `Programs.score`."""
    pixels = local_mesh.shard({"pixels": arrays["pixels"]}, self._mesh)
    patches = self._detect(self._params, pixels)
    slots = self._slots
    if slots is None:
      found = self._queries.find(arrays["tokens"])
      slots = local_mesh.shard({"slots": found}, self._mesh)["slots"]
    consts = {
      "table": self._queries.table,
      "threshold": np.float32(self._options["threshold"]),
    }
    return self._score(consts, {"patches": patches, "slots": slots})

  def finish(self, outputs: Mapping[str, np.ndarray], meta: Any) -> Outcome:
    """The label of one image."""
    (height, width), phrases = meta
    options = dict(self._options)
    kept = outputs["scores"] > np.float32(options.pop("threshold"))
    sides = np.array([height, width, height, width], np.float32)
    found = Detections(
      outputs["boxes"][kept] * (max(height, width) / sides),
      outputs["scores"][kept],
      tuple(phrases[i] for i in outputs["labels"][kept]),
    )
    outcome = detections.select(found, **options)
    beyond = int(outputs["above"]) - int(kept.sum())
    if not beyond:
      return outcome
    counts = {f"boxes: beyond the best {CANDIDATES}": beyond}
    return dataclasses.replace(outcome, counts={**outcome.counts, **counts})


@dataclasses.dataclass(frozen=True)
class Programs:
  """What runs on a device, of its rows.

  Attributes:
    model: the detector.
    dtype: its compute dtype.
  """

  model: Owlv2
  dtype: str

  def detect(self, params: PyTree, rows: Mapping[str, jax.Array]) -> Patches:
    """The image tower and the heads: of `pixels`, without objectness."""
    with apply_fns.precision(self.dtype):
      found = self.model.apply(
        {"params": params}, rows["pixels"], method=Owlv2.detect
      )
    # Nothing here asks for it, so that it is not computed either.
    return found.replace(objectness=None)

  def queries(self, params: PyTree, tokens: jax.Array) -> jax.Array:
    """The text tower."""
    with apply_fns.precision(self.dtype):
      return self.model.apply({"params": params}, tokens, method=Owlv2.queries)

  def score(
    self, consts: Mapping[str, jax.Array], rows: Mapping[str, Any]
  ) -> dict[str, jax.Array]:
    """Every patch's best phrase, and the best patches.

    Args:
      consts: `table` of queries and the `threshold`.
      rows: `patches`, and `slots` of the table, -1 for no phrase.

    Returns:
      Of the k best patches, the best first: `boxes` [b, k, 4] in the unit
      square of the padded image, `scores` [b, k] and `labels` [b, k], places
      in `slots`; and how many patches are `above` the threshold, [b].
    """
    patches, slots = rows["patches"], rows["slots"]
    # A slot of -1 reads some query, and is masked.
    logits = patches.logits(consts["table"][slots], slots >= 0)
    scores = jax.nn.sigmoid(logits.max(axis=-1))
    labels = logits.argmax(axis=-1).astype(jnp.int32)
    best, which = jax.lax.top_k(scores, min(CANDIDATES, scores.shape[1]))
    return {
      "boxes": jnp.take_along_axis(patches.boxes, which[..., None], axis=1),
      "scores": best,
      "labels": jnp.take_along_axis(labels, which, axis=1),
      "above": (scores > consts["threshold"]).sum(axis=1, dtype=jnp.int32),
    }


def load_expert(
  folder: str | os.PathLike,
  *,
  phrases: Phrases,
  mesh: Mesh | None = None,
  batch_size: int = 1,
  dtype: str = "float32",
  size: int | None = None,
  threshold: float = 0.1,
  nms: float = 0.5,
  max_boxes: int = 30,
  min_side: float = 0.015,
  max_area: float = 0.95,
  prompts: Sequence[str] | str = ("{}",),
) -> Owlv2Boxes:
  """Opens an OWLv2 of `transformers` as an expert of boxes.

  Args:
    folder: with `config.json`, `model.safetensors` and the processor's files.
    phrases: what to look for. Longer ones than the text tower's 16 tokens are
      cut.
    mesh: of this host's devices; all of them by default.
    batch_size: rows a device.
    dtype: "float32" or "bfloat16", what the model computes in.
    size: side of the square that images are brought to, in pixels; the
      model's own by default. The patch divides it.
    threshold: patches whose best phrase scores no higher are left out. The
      authors label with 0.3, and find five times as much above 0.1.
    nms: see `detections.select`.
    max_boxes: the same.
    min_side: the same.
    max_area: the same.
    prompts: texts with a `{}` that a phrase takes the place of, one or
      several whose logits are averaged, or "ensemble" for `ENSEMBLE`.

  Raises:
    FileNotFoundError: no such folder, or no tokenizer in it.
    ConversionError: it holds another model, or not all of it.
    InputError: an option is out of its range.
  """
  if dtype not in ("float32", "bfloat16"):
    raise InputError(
      f"dtype={dtype!r}: expected float32 or bfloat16; the numbers of float16 "
      "end before those of OWLv2's activations do."
    )
  if batch_size < 1:
    raise InputError(f"batch_size={batch_size}; expected at least 1.")
  options = detections.check_options(
    threshold=threshold,
    nms=nms,
    max_boxes=max_boxes,
    min_side=min_side,
    max_area=max_area,
  )
  templates = _templates(prompts)
  mesh = local_mesh.local_mesh() if mesh is None else mesh
  files = owlv2_weights.read(folder)
  size = files.spec.image.image_size if size is None else size
  files.spec.image.grid_of(size, size)
  return Owlv2Boxes(
    files,
    phrases=phrases,
    mesh=mesh,
    rows=batch_size * num_batch_shards(mesh),
    dtype=dtype,
    size=size,
    prompts=templates,
    options=options,
  )


def _templates(prompts: Sequence[str] | str) -> tuple[str, ...]:
  if isinstance(prompts, str):
    prompts = ENSEMBLE if prompts == "ensemble" else (prompts,)
  for prompt in prompts:
    if prompt.count("{}") != 1:
      raise InputError(
        f"prompts: {prompt!r} must hold exactly one '{{}}', the place of the "
        "phrase; or prompts='ensemble'."
      )
  if not prompts:
    raise InputError("prompts is empty; '{}' is the phrase alone.")
  return tuple(prompts)
