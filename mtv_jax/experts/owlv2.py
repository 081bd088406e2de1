"""OWLv2 (Minderer et al. 2023): open-vocabulary box expert.

The devices embed an image's phrases as queries, choose the best phrase of each
patch and the best patches, and return only a few kilobytes per image.
"""

import collections
import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int32, PyTree, UInt8

from mtv_jax.config.options import Fraction, PositiveInt
from mtv_jax.data.labels.label_values import LabelOutcome
from mtv_jax.data.records import Record
from mtv_jax.encoder import apply_fns
from mtv_jax.experts import base, owlv2_model
from mtv_jax.experts.base import Arrays, Image, PreparedInput, check_options
from mtv_jax.experts.labelling import detections
from mtv_jax.experts.labelling import phrases as phrases_lib
from mtv_jax.experts.labelling.detections import Detections
from mtv_jax.experts.labelling.phrases import Phrases
from mtv_jax.experts.owlv2_model import Owlv2, Proposals
from mtv_jax.parallel.mesh import replicated_sharding
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.tree import fingerprint

# Phrases per device and run of the text tower: with 16 tokens each, enough that
# reading weights is not the bottleneck of a TPU.
_BATCH_SIZE = 16
# Number of cached phrases: 32 MB per device at 512 channels.
_CAPACITY = 16_384


class QueryCache:
  """A table of queries on every device of a mesh; not thread-safe.

  Many n-grams of captions recur, and a fixed vocabulary never changes. The text
  tower always runs on a fixed number of independent rows, so that a query does
  not depend on earlier requests.

  `embed` maps `params` (on the devices) and tokens `[n, k, t]` to queries
  `[n, width]`, row by row. Requests for more than `capacity` phrases grow it.
  """

  def __init__(
    self,
    embed: Callable[[PyTree, Array], Array],
    params: Any,
    *,
    width: int,
    mesh: Mesh,
    capacity: int = _CAPACITY,
  ):
    self._params, self._mesh = params, mesh
    self._embed = base.jit_per_device(
      lambda params, rows: embed(params, rows["tokens"]), mesh
    )
    self._write = jax.jit(
      lambda table, slots, values: table.at[slots].set(values, mode="drop"),
      out_shardings=replicated_sharding(mesh),
    )
    # [capacity, e]; slots of `look_up` are valid until its next call.
    self.table: Float32[Array, "capacity e"] = base.replicate(
      np.zeros((capacity, width), np.float32), mesh
    )
    # Slots by the tokens' bytes, most recently used last.
    self._slots: collections.OrderedDict[bytes, int] = collections.OrderedDict()
    self.encoded = 0

  def look_up(
    self, tokens: Int32[np.ndarray, "*n k t"]
  ) -> Int32[np.ndarray, "*n"]:
    """Returns each phrase's slot in `table`; -1 for padding (all ids are 0).

    A phrase has t token ids in each of k prompts.
    """
    leading_shape = tokens.shape[:-2]
    rows = tokens.reshape(-1, *tokens.shape[-2:])
    keys = [row.tobytes() if row.any() else None for row in rows]
    # First row of each phrase, in order.
    row_by_key = {key: i for i, key in reversed([*enumerate(keys)]) if key}
    missing = []
    for key, i in sorted(row_by_key.items(), key=lambda item: item[1]):
      if key in self._slots:
        self._slots.move_to_end(key)
      else:
        missing.append((key, i))
    if len(row_by_key) > len(self.table):
      capacity = 1 << (len(row_by_key) - 1).bit_length()
      widths = ((0, capacity - len(self.table)), (0, 0))
      self.table = base.replicate(jnp.pad(self.table, widths), self._mesh)
    batch_size = self._mesh.size * _BATCH_SIZE
    for start in range(0, len(missing), batch_size):
      self._encode(rows, missing[start : start + batch_size], batch_size)
    slots = [self._slots[key] if key else -1 for key in keys]
    return np.array(slots, np.int32).reshape(leading_shape)

  def _encode(
    self, rows: np.ndarray, missing: list[tuple[bytes, int]], batch_size: int
  ) -> None:
    """Encodes phrases into free or least recently used slots."""
    capacity = len(self.table)
    tokens = np.zeros((batch_size, *rows.shape[1:]), np.int32)
    slots = np.full(batch_size, capacity, np.int32)  # Out of range: skipped.
    for row, (key, i) in enumerate(missing):
      slot = len(self._slots)
      if slot == capacity:
        _, slot = self._slots.popitem(last=False)
      self._slots[key] = slot
      tokens[row], slots[row] = rows[i], slot
    sharded = base.shard({"tokens": tokens}, self._mesh)
    queries = self._embed(self._params, sharded)
    self.table = self._write(self.table, slots, queries)
    self.encoded += len(missing)


# OWL-ViT averages logits over these prompts: CLIP's best seven on ImageNet, in
# OWL-ViT's normalised spelling.
ENSEMBLE = (
  "itap of a {}",
  "a bad photo of the {}",
  "a origami {}",
  "a photo of the large {}",
  "a {} in a video game",
  "art of the {}",
  "a photo of the small {}",
)
# Number of boxes that the devices return per image, the best by score.
CANDIDATES = 512
_GREY = 0.5
# Radius of a Gaussian in standard deviations, as in SciPy.
_TRUNCATE = 4.0


class Owlv2Expert:
  """Labels boxes with an OWLv2 folder of `transformers`.

  Args:
    folder: with `config.json`, `model.safetensors` and the processor's files.
    phrases: queries, truncated to the text tower's 16 tokens.
    mesh, batch_size, dtype: see `base.fill_defaults`. On accelerators,
      phrases are padded to the largest number, so that one program is compiled.
    size: side in pixels of the padded square input, a multiple of the patch;
      default: the model's.
    threshold: minimum score of a patch's best phrase, exclusive. The authors
      use 0.3; 0.1 yields five times as many boxes.
    nms, max_boxes, min_side, max_area: see `detections.select`.
    prompts: texts with a `{}` for the phrase, whose logits are averaged, or
      "ensemble" for `ENSEMBLE`.

  Raises:
    MissingFileError: the folder or its tokenizer is missing.
    ConversionError: the folder contains a different or an incomplete model.
    InputError: `prompts` or `size` is invalid.
  """

  kind = "boxes"

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    phrases: Phrases,
    mesh: Mesh | None = None,
    batch_size: PositiveInt | None = None,
    # float16 overflows in OWLv2's activations.
    dtype: Literal["float32", "bfloat16"] | None = None,
    size: int | None = None,
    threshold: Fraction = 0.1,
    nms: Fraction = 0.5,
    max_boxes: PositiveInt = 30,
    min_side: Fraction = 0.015,
    max_area: Fraction = 0.95,
    prompts: Sequence[str] | str = ("{}",),
  ):
    if isinstance(prompts, str):
      prompts = ENSEMBLE if prompts == "ensemble" else (prompts,)
    if not prompts or any(prompt.count("{}") != 1 for prompt in prompts):
      raise InputError(
        f"prompts={prompts!r}: expected 'ensemble' or texts with exactly one "
        "'{}', which stands for the phrase."
      )
    files = owlv2_model.read(folder)
    size = files.spec.image.image_size if size is None else size
    files.spec.image.grid_of(size, size)
    mesh, dtype, batch_size = base.fill_defaults(mesh, dtype, batch_size)
    self._max_phrases = 1
    if base.is_accelerator(mesh):
      self._max_phrases = phrases.max_phrases
    options = dict(
      nms=nms, max_boxes=max_boxes, min_side=min_side, max_area=max_area
    )
    self._files, self._phrases, self._mesh = files, phrases, mesh
    self._dtype, self._size = jnp.dtype(dtype), size
    self._prompts, self._options = tuple(prompts), options
    self._threshold = np.float32(threshold)
    self.rows = batch_size * mesh.size
    self.settings = {
      "expert": "owlv2",
      "batch_size": batch_size,
      "hash": fingerprint(files.params),
      "tokenizer_hash": files.tokenizer_hash,
      "dtype": dtype,
      "size": size,
      "mean": list(files.mean),
      "std": list(files.std),
      "prompts": list(prompts),
      "candidates": CANDIDATES,
      "phrases": dict(phrases.settings),
      "threshold": threshold,
      **options,
    }
    programs = Programs(Owlv2(files.spec, dtype=self._dtype), dtype)
    self._params = base.replicate(files.params, mesh)
    self._detect = base.jit_per_device(programs.detect, mesh)
    self._score = base.jit_per_device(programs.score, mesh)
    width = files.spec.text.projection
    self._queries = QueryCache(
      programs.queries, self._params, width=width, mesh=mesh
    )
    self._slots = None
    if phrases.vocabulary is not None:
      tokens = self._tokenize(phrases.vocabulary)
      slots = np.tile(self._queries.look_up(tokens), (self.rows, 1))
      self._slots = base.shard({"slots": slots}, mesh)["slots"]

  def prepare(self, image: Image, record: Record) -> PreparedInput:
    """Pads the image; tokenizes its phrases unless the vocabulary is fixed."""
    pixels = pad_to_square(image, self._size)
    pixels -= np.array(self._files.mean, np.float32)
    pixels /= np.array(self._files.std, np.float32)
    arrays = {"pixels": pixels.astype(self._dtype)}
    group, phrases = "vocabulary", self._phrases.vocabulary
    if phrases is None:
      phrases = phrases_lib.require_phrases(self._phrases, record)
      tokens = self._tokenize(phrases)
      count = max(len(phrases), self._max_phrases)
      group = phrases_lib.pad_count(count)
      arrays["tokens"] = np.zeros((group, *tokens.shape[1:]), np.int32)
      arrays["tokens"][: len(phrases)] = tokens
    return PreparedInput(group, arrays, meta=(image.shape[:2], phrases))

  def _tokenize(self, phrases: Sequence[str]) -> np.ndarray:
    """Encodes phrases in every prompt to ids `[n, prompts, length]`."""
    texts = [
      p.replace("{}", phrase) for phrase in phrases for p in self._prompts
    ]
    length = self._files.spec.text.length
    ids = self._files.tokenizer.encode(texts, length)
    return ids.reshape(len(phrases), len(self._prompts), length)

  def run(self, arrays: Arrays) -> dict[str, jax.Array]:
    """Predicts the best `CANDIDATES` boxes, see `Programs.score`."""
    pixels = base.shard({"pixels": arrays["pixels"]}, self._mesh)
    patches = self._detect(self._params, pixels)
    slots = self._slots
    if slots is None:
      slots = self._queries.look_up(arrays["tokens"])
      slots = base.shard({"slots": slots}, self._mesh)["slots"]
    consts = {"table": self._queries.table, "threshold": self._threshold}
    return self._score(consts, {"patches": patches, "slots": slots})

  def finish(self, outputs: Arrays, meta: Any) -> LabelOutcome:
    """Selects the boxes of one image that score above the threshold."""
    (height, width), phrases = meta
    is_above = outputs["scores"] > self._threshold
    sides = np.array([height, width, height, width], np.float32)
    boxes = Detections(
      outputs["boxes"][is_above] * (max(height, width) / sides),
      outputs["scores"][is_above],
      tuple(phrases[i] for i in outputs["labels"][is_above]),
    )
    outcome = detections.select(boxes, **self._options)
    beyond = int(outputs["above"]) - int(is_above.sum())
    counts = {f"boxes: beyond the best {CANDIDATES}": beyond} if beyond else {}
    return dataclasses.replace(outcome, counts={**outcome.counts, **counts})


@dataclasses.dataclass(frozen=True)
class Programs:
  """Detector functions for one device's rows, computed in `dtype`."""

  model: Owlv2
  dtype: str

  def detect(self, params: PyTree, rows: Mapping[str, jax.Array]) -> Proposals:
    """Predicts proposals for the patches of `pixels`, without objectness."""
    with apply_fns.precision(self.dtype):
      patches = self.model.apply(
        {"params": params}, rows["pixels"], method=Owlv2.detect
      )
    # Dropping it lets the compiler remove its head.
    return patches.replace(objectness=None)

  def queries(self, params: PyTree, tokens: jax.Array) -> jax.Array:
    """Runs the text tower, see `Owlv2.queries`."""
    with apply_fns.precision(self.dtype):
      return self.model.apply({"params": params}, tokens, method=Owlv2.queries)

  def score(
    self, consts: Mapping[str, jax.Array], rows: Mapping[str, Any]
  ) -> dict[str, jax.Array]:
    """Selects the best phrase of each patch, and the best patches.

    `slots` index the `table` of queries; -1 is padding. Returns, for the k best
    patches, best first: `boxes` `[b, k, 4]` in the padded image's unit square,
    `scores` `[b, k]` and `labels` `[b, k]`, indices into `slots`; and the
    number of patches `above` the threshold, `[b]`.
    """
    patches, slots = rows["patches"], rows["slots"]
    # Slots of -1 read an arbitrary query, which is masked.
    logits = patches.logits(consts["table"][slots], slots >= 0)
    scores = jax.nn.sigmoid(logits.max(axis=-1))
    labels = logits.argmax(axis=-1).astype(jnp.int32)
    best, indices = jax.lax.top_k(scores, min(CANDIDATES, scores.shape[1]))
    return {
      "boxes": jnp.take_along_axis(patches.boxes, indices[..., None], axis=1),
      "scores": best,
      "labels": jnp.take_along_axis(labels, indices, axis=1),
      "above": (scores > consts["threshold"]).sum(axis=1, dtype=jnp.int32),
    }


def pad_to_square(
  image: UInt8[np.ndarray, "h w 3"], size: int
) -> Float32[np.ndarray, "size size 3"]:
  """Pads an image with grey below or to the right, and resizes it to `size`.

  Follows the authors' `skimage.transform.resize` with antialiasing: a Gaussian
  of (s - 1) / 2 pixels for shrinking by s, then linear interpolation. Enlarged
  images differ beyond the centres of the outermost pixels: edges are repeated
  (as in PyTorch), not mirrored.
  Returns values from 0 to 1.
  """
  side = max(image.shape[:2])
  shrink = side / size
  sigma = max(shrink - 1, 0) / 2
  radius = int(_TRUNCATE * sigma + 0.5)
  # The difference from grey is 0 in the padding. Allocates only the part that
  # the blurred image reaches: padding an elongated image to a square may be
  # large.
  margin = 2 * radius + math.ceil(shrink) + 2
  pad = [min(margin, side - n) for n in image.shape[:2]]
  pixels = np.zeros(
    (image.shape[0] + pad[0], image.shape[1] + pad[1], 3), np.float32
  )
  inside = pixels[: image.shape[0], : image.shape[1]]
  np.multiply(image, np.float32(1 / 255), out=inside)
  inside -= _GREY
  if radius:
    pixels = cv2.GaussianBlur(
      pixels, (2 * radius + 1,) * 2, sigma, borderType=cv2.BORDER_REFLECT_101
    )
  square = np.full((size, size, 3), _GREY, np.float32)
  if shrink != 1:
    pixels = cv2.resize(
      pixels, None, fx=1 / shrink, fy=1 / shrink, interpolation=cv2.INTER_LINEAR
    )
  pixels = pixels[:size, :size]
  square[: pixels.shape[0], : pixels.shape[1]] += pixels
  return square


load_expert = check_options(Owlv2Expert)
