"""ONNX detectors as box experts, with onnxruntime (extra `onnx`).

Images run on the CPU, one per thread: labels do not depend on the number of
threads, rows or devices. An ONNX file does not define the meaning of its
outputs; a `DetectionDecoder` does:

  fastestdet     FastestDet (Qiu 2022, github.com/dog-qiuqiu/FastestDet)
  MODULE:NAME    an object with the members of `DetectionDecoder`
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import cv2
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Float32, UInt8

from mtv_jax.config.options import (
  Fraction,
  PositiveInt,
  import_plugin,
  is_plugin,
)
from mtv_jax.data.labels.label_values import LabelOutcome
from mtv_jax.data.records import Record
from mtv_jax.experts import base
from mtv_jax.experts.base import (
  Arrays,
  Image,
  PreparedInput,
  check_options,
)
from mtv_jax.experts.labelling import detections
from mtv_jax.experts.labelling.detections import Detections
from mtv_jax.experts.labelling.phrases import hash_phrases
from mtv_jax.utils.errors import (
  InputError,
  MissingFileError,
  did_you_mean,
  import_extra,
)
from mtv_jax.utils.threads import available_cores, map_threads

_MAX_SIDE = 1 << 13  # Pixels of an input.


class OnnxDetector:
  """Labels boxes with the detector in an ONNX file.

  The defaults retain all boxes that the detector's own code reports: fixed
  classes, unlike vague phrases, rarely match a whole image.

  Args:
    file: the `.onnx` file.
    names: text file of class names, one per line, in the model's order.
    mesh: this host's mesh, which sets only the batch size.
    batch_size: images per device.
    dtype: unused; the file determines the dtype.
    decoder: a key of `DECODERS`, or MODULE:NAME of a `DetectionDecoder`.
    size: side or (height, width) of the input, if the file leaves it open.
    threshold: minimum score, exclusive; default: the decoder's.
    nms: see `detections.select`; default: the decoder's.
    max_boxes, min_side, max_area: see `detections.select`.

  Raises:
    ImportError: onnxruntime is not installed.
    MissingFileError: a file is missing.
    InputError: the file, the names and the decoder don't match.
  """

  kind = "boxes"

  def __init__(
    self,
    file: str | os.PathLike,
    *,
    names: str | os.PathLike,
    mesh: Mesh | None = None,
    batch_size: PositiveInt = 1,
    dtype: Literal["float32"] = "float32",
    decoder: str = "fastestdet",
    size: int | tuple[int, int] | None = None,
    threshold: Fraction | None = None,
    nms: Fraction | None = None,
    max_boxes: PositiveInt = 100,
    min_side: Fraction = 0.0,
    max_area: Fraction = 1.0,
  ):
    del dtype
    self._decoder = get_decoder(decoder)
    data = _read_file(file, "ONNX file")
    try:
      self._session = _open_session(data)
      self._names = _read_names(names)
      self._input, batch, self._size = _read_input(self._session, size)
      outputs = {x.name: x.shape for x in self._session.get_outputs()}
      self._decoder.check(outputs, len(self._names))
    except ValueError as error:
      raise InputError(f"{file}: {error}") from None
    self._outputs = list(outputs)
    # With a dynamic batch size, images run one by one, so that results do not
    # depend on batching.
    self._chunk = batch or 1
    mesh = base.make_local_mesh() if mesh is None else mesh
    self.rows = -(-batch_size * mesh.size // self._chunk) * self._chunk
    if threshold is None:
      threshold = self._decoder.threshold
    self._threshold = threshold
    self._options = dict(
      nms=self._decoder.nms if nms is None else nms,
      max_boxes=max_boxes,
      min_side=min_side,
      max_area=max_area,
    )
    self.settings = {
      "expert": "onnx",
      "file": Path(file).name,
      "hash": hashlib.blake2b(data, digest_size=8).hexdigest(),
      "decoder": self._decoder.name,
      "size": list(self._size),
      "names": len(self._names),
      "names_hash": hash_phrases(self._names),
      "threshold": threshold,
      **self._options,
    }

  def prepare(self, image: Image, record: Record) -> PreparedInput:
    """Preprocesses an image with the decoder."""
    del record
    pixels = self._decoder.prepare(image, *self._size)
    return PreparedInput("image", {"image": pixels}, meta=image.shape[:2])

  def run(self, arrays: Arrays) -> dict[str, Float[np.ndarray, " rows *_"]]:
    """Computes the model's outputs by name; blocks."""
    images = arrays["image"]

    def run_chunk(chunk: np.ndarray) -> list[np.ndarray]:
      return self._session.run(self._outputs, {self._input: chunk})

    chunks = np.split(images, len(images) // self._chunk)
    results = map_threads(run_chunk, chunks, threads=available_cores())
    outputs = zip(*results, strict=True)
    return dict(zip(self._outputs, map(np.concatenate, outputs), strict=True))

  def finish(self, outputs: Arrays, meta: tuple[int, int]) -> LabelOutcome:
    """Decodes and selects the boxes of one image."""
    boxes = self._decoder.decode(
      outputs, self._names, threshold=self._threshold, image_size=meta
    )
    return detections.select(boxes, **self._options)


load_expert = check_options(OnnxDetector)


def _read_input(
  session: Any, size: int | tuple[int, int] | None
) -> tuple[str, int | None, tuple[int, int]]:
  """Reads name, batch size (None if dynamic), (height, width) of the input."""
  inputs = session.get_inputs()
  has = ", ".join(f"{x.name}: {x.type} {list(x.shape)}" for x in inputs)
  is_image = len(inputs) == 1 and len(inputs[0].shape) == 4
  if not is_image or inputs[0].type != "tensor(float)":
    raise InputError(f"expected one input, float32 [n, 3, h, w]; it has {has}")
  batch, channels, *sides = inputs[0].shape
  if isinstance(channels, int) and channels != 3:
    raise InputError(f"expected 3 channels in the input; it has {has}")
  fixed = [n for n in (batch, *sides) if isinstance(n, int)]
  if not all(1 <= n <= _MAX_SIDE for n in fixed):
    raise InputError(
      f"expected images of 1 to {_MAX_SIDE} pixels; it has {has}"
    )
  requested = (size, size) if isinstance(size, int) else size
  if requested is None and not all(isinstance(n, int) for n in sides):
    raise InputError(f"the input takes any size ({has}): set size=")
  height, width = (
    side if isinstance(side, int) else other
    for side, other in zip(sides, requested or sides, strict=True)
  )
  if not 1 <= min(height, width) <= max(height, width) <= _MAX_SIDE:
    raise InputError(f"size={size}; expected 1 to {_MAX_SIDE} pixels.")
  if requested and (height, width) != tuple(requested):
    raise InputError(f"size={size}; the file takes {(height, width)} only")
  batch = batch if isinstance(batch, int) else None
  return inputs[0].name, batch, (height, width)


def _open_session(data: bytes) -> Any:
  onnxruntime = import_extra("onnxruntime", "onnx")
  options = onnxruntime.SessionOptions()
  # We run one image per thread. A single thread also fixes the order of sums.
  options.intra_op_num_threads = options.inter_op_num_threads = 1
  options.log_severity_level = 3
  try:
    return onnxruntime.InferenceSession(
      data, options, providers=["CPUExecutionProvider"]
    )
  except Exception as error:  # onnxruntime's errors lack a common base class.
    raise InputError(
      f"onnxruntime can't open it ({type(error).__name__}: {error})"
    ) from error


def _read_file(file: str | os.PathLike, description: str) -> bytes:
  path = Path(file).expanduser()
  if not path.is_file():
    raise MissingFileError(f"there is no {description} {file}")
  return path.read_bytes()


def _read_names(file: str | os.PathLike) -> tuple[str, ...]:
  try:
    # Some editors write a byte order mark.
    text = _read_file(file, "file of class names").decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise InputError(f"{file} is not UTF-8 text ({error}).") from error
  names = tuple(line.strip() for line in text.rstrip().splitlines())
  if "" in names:
    raise InputError(f"{file}: line {names.index('') + 1} is blank.")
  return names


@runtime_checkable
class DetectionDecoder(Protocol):
  """Preprocessing and output format of a kind of detector."""

  name: str  # For the manifest; changes when results change.
  threshold: float  # Minimum score, the authors' default.
  nms: float  # IoU of duplicates, the authors' default.

  def check(self, outputs: Mapping[str, Sequence[Any]], classes: int) -> None:
    """Raises ValueError if the model is not this kind of detector.

    Args:
      outputs: shapes by name, in order, with batch dimension; symbolic sizes
        are names or None.
      classes: number of class names.
    """
    ...

  def prepare(
    self, image: UInt8[np.ndarray, "h w 3"], height: int, width: int
  ) -> Float32[np.ndarray, "3 height width"]:
    """Converts an RGB image to the model's input."""
    ...

  def decode(
    self,
    outputs: Mapping[str, np.ndarray],
    names: Sequence[str],
    *,
    threshold: float | int,
    image_size: tuple[int, int],
  ) -> Detections:
    """Returns boxes with scores above a threshold, before suppression.

    `outputs` belong to one image, without batch dimension; `names` are class
    names; `image_size` is (height, width) before `prepare`.
    """
    ...


class FastestDet:
  """FastestDet decoder: one box per cell of a grid `[1, 5 + classes, h, w]`.

  For the cell of row i and column j, with channels o (0), r (1 to 4) and c (the
  rest), where o and c are in [0, 1]:

      score = o^0.6 (max c)^0.4,  class = argmax c
      centre x = (j + tanh r_0) / w,  width = sigmoid r_2
      centre y = (i + tanh r_1) / h,  height = sigmoid r_3

  Images are squashed with area interpolation, in BGR order, divided by 255.
  Unlike the published example, does not round boxes to pixels.
  """

  name = "fastestdet"
  threshold = 0.65
  nms = 0.45

  def check(self, outputs: Mapping[str, Sequence[Any]], classes: int) -> None:
    """Raises InputError unless the output is one `[n, 5 + classes, h, w]`."""
    shapes = list(outputs.values())
    if len(shapes) != 1 or len(shapes[0]) != 4:
      outputs_text = ", ".join(f"{k}: {list(v)}" for k, v in outputs.items())
      raise InputError(
        "FastestDet has one output [n, 5 + classes, h, w]; the file has"
        f" {outputs_text}. Set decoder=MODULE:NAME for another detector (see"
        " mtv_jax/experts/onnx_detector.py)."
      )
    channels = shapes[0][1]
    if classes < 1:
      raise InputError("the file of names is empty; write one name per line.")
    if isinstance(channels, int) and channels != 5 + classes:
      raise InputError(
        f"the output has {channels} channels: {channels - 5} classes after 5 of"
        f" objectness and box, but there are {classes} names. Pass the names"
        " that it was trained with, one per line, in order."
      )

  def prepare(
    self, image: UInt8[np.ndarray, "h w 3"], height: int, width: int
  ) -> Float32[np.ndarray, "3 height width"]:
    """Squashes an image; BGR, 0 to 1."""
    bgr = np.ascontiguousarray(image[..., ::-1])
    resized = cv2.resize(bgr, (width, height), interpolation=cv2.INTER_AREA)
    return (resized.transpose(2, 0, 1) / 255).astype(np.float32)

  def decode(
    self,
    outputs: Mapping[str, np.ndarray],
    names: Sequence[str],
    *,
    threshold: float | int,
    image_size: tuple[int, int],
  ) -> Detections:
    """Returns the boxes of cells with scores above the threshold."""
    del image_size  # Squashed images share the unit square.
    (grid,) = outputs.values()
    self.check({"output": (1, *grid.shape)}, len(names))
    classes = grid[5:]
    scores = grid[0] ** 0.6 * classes.max(axis=0) ** 0.4
    rows, columns = np.nonzero(scores > threshold)
    cells = grid[:, rows, columns]
    corners = np.stack([rows, columns]).astype(np.float32)
    sizes = np.array(scores.shape, np.float32)[:, None]
    centres = (corners + np.tanh(cells[[2, 1]])) / sizes
    with np.errstate(over="ignore"):  # 1 / (1 + inf) is the sigmoid's 0.
      halves = 0.5 / (1 + np.exp(-cells[[4, 3]]))
    return Detections(
      boxes=np.concatenate([centres - halves, centres + halves]).T,
      scores=scores[rows, columns],
      phrases=tuple(names[i] for i in cells[5:].argmax(axis=0)),
    )


DECODERS: dict[str, DetectionDecoder] = {"fastestdet": FastestDet()}


def get_decoder(name: str) -> DetectionDecoder:
  """Returns a decoder: a key of `DECODERS`, or MODULE:NAME."""
  if name in DECODERS:
    return DECODERS[name]
  if not is_plugin(name):
    raise InputError(
      f"decoder={name!r}. {did_you_mean(name, DECODERS)} MODULE:NAME imports "
      "a plug-in."
    )
  decoder = import_plugin(name, "decoder")
  if not isinstance(decoder, DetectionDecoder) or isinstance(decoder, type):
    raise InputError(
      f"decoder={name!r} is {decoder!r}; expected an object with the members of"
      " `DetectionDecoder` of mtv_jax/experts/onnx_detector.py."
    )
  return decoder
