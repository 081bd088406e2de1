"""Encoder: a loaded model, for evaluations and users.

    encoder = mtv_jax.load(DIR)
    features = encoder.image(images, layers=(3, -1))
    logits = encoder.similarity(features.pooled, encoder.text(captions))

An encoder maps pixels and strings to NumPy arrays. All encoders share functions
compiled once per architecture, mesh and request, with the parameters as
arguments. So the trainer can build an encoder from its live parameters before
every evaluation, without recompiling.
"""

from __future__ import annotations

import copy
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Float32, PyTree

from mtv_jax.data import tokenizers
from mtv_jax.encoder import apply_fns, batched
from mtv_jax.encoder.features import (
  OUTPUTS,
  Boxes,
  ImageFeatures,
  Regions,
  block_index,
  check_outputs,
  normalize,
)
from mtv_jax.encoder.preprocess import (
  Preprocess,
  as_image,
  as_pixels,
  check_images,
)
from mtv_jax.models import two_tower as models
from mtv_jax.models.heads import contrastive_head
from mtv_jax.models.heads.base import (
  TEXT,
  TOKENS,
  PredictionHead,
  UnloadedHead,
)
from mtv_jax.parallel.mesh import MESH_AXES, make_mesh
from mtv_jax.utils.errors import InputError, check_choice


class Encoder:
  """Image and text encoder: features, similarities and predictions.

  All hosts of a pod must make identical calls. Each host decodes and computes
  its own rows of a batch; all hosts receive all results. The last batch is
  padded and the padding dropped; up to rounding, results don't depend on the
  batch size or the number of devices.
  """

  prediction_heads: Mapping[str, PredictionHead] = {}

  def __init__(
    self,
    spec: models.ModelSpec,
    params: Mapping[str, PyTree],
    preprocess: Preprocess,
    tokenizer: Any | None = None,
    mesh: Mesh | None = None,
    *,
    dtype: str = "float32",
    weights: str = "student",
    source: str = "",
    prediction_heads: Mapping[str, PredictionHead] | None = None,
  ):
    """Wraps parameters without compiling.

    Args:
      params: `image`; with a text tower also `text` and `heads/contrastive`;
        optionally more heads. NumPy arrays are sharded over the mesh by
        `parallel.rules`.
      tokenizer: object with `encode(strings, length)`; only `text` needs it.
      mesh: `(data, fsdp, tensor)`; by default the parameters' mesh, else
        all devices on `data`.
      dtype: compute dtype. float32 uses the highest matmul precision.
      weights: name of the weights, such as `student`; results record it in
        their protocol.
      source: folder of the weights, recorded there too.
      prediction_heads: configurations of the heads for `predict`, by name;
        their parameters are in `params["heads"]`.
    """
    if "image" not in params:
      raise InputError(
        f"Encoder: params has no 'image', only {sorted(params)}; pass the tree "
        "{'image', 'text', 'heads'}, not one tower's"
      )
    self.spec, self.preprocess, self.tokenizer = spec, preprocess, tokenizer
    meshes = filter(None, map(batched.mesh_of, jax.tree.leaves(params)))
    meshes = (m for m in meshes if set(MESH_AXES) <= set(m.axis_names))
    self.mesh = mesh or next(meshes, None) or make_mesh({"data": -1})
    check_choice("Encoder: dtype", dtype, ("float32", "bfloat16", "float16"))
    if dtype == "float16" and self.mesh.devices.flat[0].platform == "cpu":
      raise InputError(
        "Encoder: XLA has no matrix products in dtype 'float16' on CPUs; use "
        "'bfloat16' or 'float32'"
      )
    self.dtype, self.weights, self.source = dtype, weights, source
    self.prediction_heads = dict(prediction_heads or {})
    self.params = batched.put_params(params, self.mesh)
    if spec.text is not None and tokenizer is not None:
      tokenizers.check_vocabulary(tokenizer, spec.text.vocab_size)

  def __repr__(self) -> str:
    image = self.spec.image
    weights = "no" if self.weights == "none" else self.weights
    return (
      f"Encoder({self.source or 'live'}, {weights} weights, "
      f"width {image.width}, depth {image.depth}, patch {image.patch_size}, "
      f"input {self.preprocess.size})"
    )

  def with_preprocess(self, preprocess: Preprocess) -> Encoder:
    """Returns a copy with other preprocessing that shares the parameters."""
    encoder = copy.copy(self)
    encoder.preprocess = preprocess
    return encoder

  def image(
    self,
    images: Sequence[Any] | np.ndarray,
    *,
    layers: Sequence[int] = (),
    outputs: Sequence[str] = OUTPUTS,
    batch_size: int = 64,
  ) -> ImageFeatures:
    """Features of images.

    Args:
      images: a sequence, possibly lazy, of images of any size: paths, encoded
        bytes, PIL images, uint8 or uint16 arrays `[H, W, 3]`, or PyTorch
        tensors, also `[3, H, W]`. Threads index it one item at a time.
      layers: indices of blocks whose tokens to return; -1 is the last.
      outputs: which of `pooled`, `patches` and `prefix` to return. Patches of
        50,000 images don't fit into memory.
      batch_size: images per step over the whole mesh, rounded up to a multiple
        of its data shards.

    Raises:
      TypeError: an item is not an image.
      InputError: a layer or an output is unknown.
    """
    check_images(images, "image")
    rows = self._make_row_fn(images, self.preprocess)
    return self._encode(rows, len(images), layers, outputs, batch_size)

  def dense(
    self,
    images: Sequence[np.ndarray] | np.ndarray,
    *,
    layers: Sequence[int] = (),
    outputs: Sequence[str] = ("patches",),
    batch_size: int = 16,
  ) -> ImageFeatures:
    """Features of images at their original size.

    Images are normalised but neither resized nor cropped; the position
    embedding is resampled to the grid. See `image` for the remaining arguments
    and errors.

    Args:
      images: a sequence, possibly lazy, of `[H, W, 3]` arrays of one size,
        uint8 or float32 in 0..255. H and W must be multiples of the patch size.
    """
    check_images(images, "dense")
    rows = self._make_row_fn(images, self.preprocess, resize=False)
    return self._encode(rows, len(images), layers, outputs, batch_size)

  def text(
    self,
    strings: Sequence[str],
    *,
    batch_size: int = 256,
    length: int | None = None,
  ) -> Float32[np.ndarray, "n e"]:
    """Embeddings `[n, E]` of strings, not normalised.

    Strings are cut or padded to `length` tokens, by default the model's.
    """
    if self.spec.text is None or "text" not in self.params:
      raise InputError(
        f"{self!r} has no text tower; SigLIP, CLIP and contrastive runs have "
        "one"
      )
    if isinstance(strings, str):
      raise TypeError("Encoder.text takes a list of strings: pass [string]")
    if not len(strings):
      raise InputError("Encoder.text got no strings")
    tokens = self._tokenize(strings, length)
    function = apply_fns.text_function(self.spec, self.dtype, self.mesh)
    run = functools.partial(function, self.params["text"])
    blank = np.zeros_like(tokens[0])
    out = self._run(run, tokens.__getitem__, blank, len(tokens), batch_size)
    return out["pooled"]

  @property
  def phrase_length(self) -> int | None:
    """Padded token length of grounding phrases in pretraining.

    None without a grounding head, or if unknown.
    """
    head = self.prediction_heads.get("grounding")
    return getattr(head, "phrase_length", None)

  def phrases(
    self, strings: Sequence[str], *, batch_size: int = 256
  ) -> Float32[np.ndarray, "n e"]:
    """Embeddings `[n, E]` of phrases, to compare with `ground`'s embeddings.

    Like `text`, but cut or padded to `phrase_length` tokens as in pretraining:
    in towers that attend to padding, the length changes the embedding.
    """
    return self.text(strings, batch_size=batch_size, length=self.phrase_length)

  def similarity(
    self,
    image: Float[np.ndarray, "n e"],
    text: Float[np.ndarray, "m e"],
  ) -> Float32[np.ndarray, "n m"]:
    """Logits `exp(logit_scale) cos(image, text) + logit_bias`.

    Normalises the embeddings. SigLIP (Zhai et al. 2023) applies a sigmoid to
    these logits, CLIP a softmax over either axis.
    """
    check_embeddings(image, text)
    heads = self.params.get("heads", {})
    try:
      head = heads[contrastive_head(heads)]
    except ValueError as error:
      raise InputError(
        f"{self!r}: {error} For cosine similarity use normalize(image) @ "
        "normalize(text).T"
      ) from None
    scale = np.exp(np.float32(head["logit_scale"]))
    bias = np.float32(head.get("logit_bias", 0.0))
    return scale * (normalize(image) @ normalize(text).T) + bias

  def can_predict(self, name: str) -> bool:
    """Whether the encoder has the prediction head `name`, such as "depth"."""
    head = self.prediction_heads.get(name)
    return head is not None and head.params_key in self.params.get("heads", {})

  def predict(
    self,
    name: str,
    images: Sequence[Any] | np.ndarray,
    *,
    batch_size: int = 16,
    resize: bool = True,
    **inputs: Sequence[Any] | np.ndarray,
  ) -> dict[str, np.ndarray]:
    """Predictions of a pretrained head.

    Args:
      name: name of the prediction, such as "depth" or "caption"; see
        `PredictionHead.predictions`.
      images, batch_size: as for `image`.
      resize: False encodes images of one size unresized, see `dense`.
      **inputs: the head's inputs besides images (`PredictionHead.inputs`), per
        image `[m, C]` numbers or m strings; m may vary and may be 0.

    Returns:
      Arrays `[n, ...]` by name. With inputs `[n, m, ...]`, zero in padded rows,
      and `valid` `[n, m]`.

    Raises:
      InputError: the encoder lacks the head, or inputs don't fit the images.
      TypeError: the head does not accept an input, or text is not a string.
    """
    function, head = self.head_function(name), self.prediction_heads[name]
    method, kinds = f"Encoder.predict({name!r})", head.inputs
    check_images(images, f"predict({name!r})")
    if set(inputs) != set(kinds):
      raise TypeError(
        f"{method} takes the inputs {sorted(kinds)}; got {sorted(inputs)}"
      )
    for key, values in inputs.items():
      if len(values) != len(images):
        counts = f"{len(images)} images, but {key} for {len(values)}"
        raise InputError(f"{method} got {counts}")
    if inputs and resize and self.preprocess.crop != "none":
      raise InputError(
        f"{method} needs an encoder that sees whole images, to which "
        f"{sorted(inputs)} refer; this one has crop={self.preprocess.crop!r}"
      )
    padded = {k: self._pad(k, kinds[k], rows) for k, rows in inputs.items()}
    preprocess = self.preprocess.squashed()
    pixels, blank_pixels = self._make_row_fn(images, preprocess, resize=resize)

    def prepare(i):
      return {
        "images": pixels(i),
        **{k: p.values[i] for k, p in padded.items()},
      }

    blank = {"images": blank_pixels}
    blank |= {k: np.zeros_like(p.values[0]) for k, p in padded.items()}
    heads = {head.params_key: self.params["heads"][head.params_key]}
    params = {"image": self.params["image"], "heads": heads}
    run = functools.partial(function, params)
    out = self._run(run, prepare, blank, len(images), batch_size)
    for _, valid in padded.values():
      for key, values in out.items():
        mask = valid.reshape(*valid.shape, *[1] * (values.ndim - 2))
        out[key] = values[:, : valid.shape[1]] * mask
      out["valid"] = valid
    return head.decode(out, self.tokenizer)

  def depth(
    self, images: Sequence[Any] | np.ndarray, **options: Any
  ) -> Float32[np.ndarray, "n h w"]:
    """Relative inverse depth `[n, h, w]`, see `dpt.DepthHead` and `predict`.

    The map covers the encoder's input: the whole image, if squashed.
    `options` are `predict`'s `batch_size` and `resize`.
    """
    return self.predict("depth", images, **options)["depth"]

  def ground(
    self,
    images: Sequence[Any] | np.ndarray,
    boxes: Sequence[Any] | np.ndarray,
    *,
    batch_size: int = 16,
  ) -> Regions:
    """Embeddings of boxes, to compare with `phrases`; see `predict`.

    `boxes` are `[m, 4]` per image, (y0, x0, y1, x1) in the unit square.
    """
    options = dict(boxes=boxes, batch_size=batch_size)
    return Regions(**self.predict("grounding", images, **options))

  def locate(
    self,
    images: Sequence[Any] | np.ndarray,
    phrases: Sequence[Sequence[str]],
    *,
    batch_size: int = 16,
  ) -> Boxes:
    """A box per phrase from the grounding regression head; see `predict`."""
    options = dict(phrases=phrases, batch_size=batch_size)
    return Boxes(**self.predict("locator", images, **options))

  def head_function(self, name: str) -> apply_fns.Function:
    """The jitted function of a head, see `apply_fns.head_function`."""
    if not self.can_predict(name):
      names = sorted(filter(self.can_predict, self.prediction_heads))
      hint = "load a run or an export that trained this head"
      heads = self.prediction_heads.values()
      unloaded = [h.plugin for h in heads if isinstance(h, UnloadedHead)]
      if unloaded:
        hint += f", or import the modules of its plug-ins {unloaded} first"
      raise InputError(
        f"{self!r} can't predict {name!r}, only {names} (it has parameters of "
        f"{sorted(self.params.get('heads', {}))}); {hint}"
      )
    return apply_fns.head_function(
      self.spec, self.prediction_heads[name], self.dtype, self.mesh
    )

  def protocol(self) -> dict[str, Any]:
    """Everything that the encoder's results depend on, for JSON."""
    text, tokenizer = self.spec.text, self.tokenizer
    protocol = {
      "encoder": self.source or "live parameters",
      "weights": self.weights,
      "dtype": self.dtype,
      "input_size": self.preprocess.size,
      "preprocess": self.preprocess.to_dict(),
      "image_pool": self.spec.image.pool,
    }
    if text is not None and tokenizer is not None:
      protocol["text_pool"] = text.pool
      protocol["text_length"] = text.length
      path = getattr(tokenizer, "path", None)
      protocol["tokenizer"] = {
        "kind": tokenizer.kind,
        "file": path and pathlib.PurePath(path).name,
        "vocab_size": tokenizer.vocab_size,
        "clean": tokenizer.clean,
      }
    return protocol

  def _image_function(self, layers, outputs) -> apply_fns.Function:
    args = self.spec, self.dtype, layers, outputs, self.mesh
    return apply_fns.image_function(*args)

  def _run(self, function, prepare, blank, count, batch_size):
    options = dict(batch_size=batch_size, mesh=self.mesh)
    return batched.in_batches(
      function, prepare, count=count, blank=blank, **options
    )

  def _tokenize(
    self, strings: Sequence[str], length: int | None = None
  ) -> np.ndarray:
    """Token ids `[n, T]`, of the model's length by default."""
    if self.tokenizer is None:
      raise InputError(
        f"{self!r} has no tokenizer; put its tokenizer file into the folder, "
        "or pass tokenizer=build_tokenizer(...)"
      )
    length = length or self.spec.text.length
    tokens = self.tokenizer.encode(list(strings), length)
    return np.asarray(tokens, np.int32)

  def _pad(self, key, kind, values) -> batched.Padded:
    """Pads a head input to `[n, k, C]`; tokenizes or embeds strings."""
    label = f"the {key} of image"
    if kind not in (TEXT, TOKENS):
      return batched.pad(values, channels=kind, what=label)
    for strings in [values, *values]:
      if not isinstance(strings, list | tuple):
        raise TypeError(
          f"Encoder.predict takes a list of {key} for each image, "
          f"[[string, ...], ...]; got {strings!r:.40}"
        )
    unique = list(dict.fromkeys(s for strings in values for s in strings))
    embed = self._tokenize if kind == TOKENS else self.phrases
    vectors = embed(unique)
    table = dict(zip(unique, vectors, strict=True))
    rows = [[table[s] for s in strings] for strings in values]
    return batched.pad(rows, channels=vectors.shape[1], what=label)

  def _make_row_fn(self, images, preprocess, *, resize=True):
    """Returns a function from index to preprocessed image, and a blank row."""
    if not resize:
      size = as_pixels(images[0], "image 0").shape[:2]
      self.spec.image.grid_of(*size)

      def read(i):
        return as_pixels(images[i], f"image {i}", size=size)

      blank = np.zeros((*size, 3), np.float32)
      return lambda i: preprocess.normalize(read(i)), blank
    apply = preprocess
    if preprocess.resize == "native":
      apply = preprocess.patches
      shape = preprocess.max_patches, 3 * self.spec.image.patch_size**2
      patches, grids = np.zeros(shape, np.float32), np.ones(2, np.int32)
      blank = {"patches": patches, "grids": grids}
    else:
      blank = np.zeros((preprocess.size, preprocess.size, 3), np.float32)
    return lambda i: apply(as_image(images[i], f"image {i}")), blank

  def _encode(self, rows, count, layers, outputs, batch_size):
    check_outputs(outputs)
    blocks = {i: block_index(i, self.spec.image.depth) for i in layers}
    function = self._image_function(
      tuple(sorted(set(blocks.values()))),
      tuple(o for o in OUTPUTS if o in outputs),
    )
    run = functools.partial(function, self.params["image"])
    out = self._run(run, *rows, count, batch_size)
    return ImageFeatures(
      **{name: out.get(name) for name in OUTPUTS},
      layers={i: out[f"layer{b}"] for i, b in blocks.items()},
      prefix_layers={i: out[f"prefix{b}"] for i, b in blocks.items()},
      grids=out.get("grids"),
    )


def check_embeddings(image: Any, text: Any) -> None:
  """Raises InputError for embeddings that can't be compared."""
  if np.ndim(image) != 2 or np.shape(image)[1:] != np.shape(text)[1:]:
    raise InputError(
      "Encoder.similarity takes embeddings [n, E] and [m, E], such as "
      ".image(images).pooled and .text(strings); got "
      f"{list(np.shape(image))} and {list(np.shape(text))}"
    )
