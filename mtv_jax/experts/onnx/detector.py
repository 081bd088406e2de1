"""ONNX detectors as box experts, with onnxruntime (extra `onnx`).

`decoders.py` interprets the outputs. Images run on the CPU, one per thread:
labels do not depend on the number of threads, rows or devices.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from mtv_jax.config.options import Fraction, PositiveInt
from mtv_jax.data.labels.label_values import LabelOutcome
from mtv_jax.data.records import Record
from mtv_jax.experts import local_mesh
from mtv_jax.experts.base import PreparedInput, check_options
from mtv_jax.experts.labelling import detections
from mtv_jax.experts.labelling.phrases import hash_phrases
from mtv_jax.experts.onnx.decoders import get_decoder
from mtv_jax.utils.errors import InputError, MissingFileError
from mtv_jax.utils.threads import available_cores, map_threads

_MAX_SIDE = 1 << 13  # Pixels of an input.


class OnnxDetector:
  """Labels boxes with the detector in an ONNX file.

  The defaults retain all boxes that the detector's own code reports: fixed
  classes, unlike vague phrases, rarely match the whole image.

  Args:
    file: the `.onnx` file.
    names: text file of class names, one per line, in the model's order.
    mesh: this host's mesh; sets only the batch, the model runs on the CPU.
    batch_size: images per device.
    dtype: unused; the file determines the dtype.
    decoder: see `decoders.py`.
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
      self._session = _open_session(data, file)
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
    mesh = local_mesh.local_mesh() if mesh is None else mesh
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

  def prepare(
    self, image: UInt8[np.ndarray, "h w 3"], record: Record
  ) -> PreparedInput:
    """Preprocesses an image with the decoder."""
    del record
    pixels = self._decoder.prepare(image, *self._size)
    return PreparedInput("image", {"image": pixels}, meta=image.shape[:2])

  def run(
    self, arrays: Mapping[str, np.ndarray]
  ) -> dict[str, Float[np.ndarray, " rows *_"]]:
    """Computes the model's outputs by name; blocks."""
    images = arrays["image"]

    def run_chunk(chunk: np.ndarray) -> list[np.ndarray]:
      return self._session.run(self._outputs, {self._input: chunk})

    chunks = np.split(images, len(images) // self._chunk)
    results = map_threads(run_chunk, chunks, threads=available_cores())
    outputs = zip(*results, strict=True)
    return dict(zip(self._outputs, map(np.concatenate, outputs), strict=True))

  def finish(
    self, outputs: Mapping[str, np.ndarray], meta: tuple[int, int]
  ) -> LabelOutcome:
    """The label of one image."""
    boxes = self._decoder.decode(
      outputs, self._names, threshold=self._threshold, image_size=meta
    )
    return detections.select(boxes, **self._options)


load_expert = check_options(OnnxDetector)


def _read_input(
  session: Any, size: int | tuple[int, int] | None
) -> tuple[str, int | None, tuple[int, int]]:
  """Name, batch size (None if dynamic) and (height, width) of the input."""
  inputs = session.get_inputs()
  listed = ", ".join(f"{x.name}: {x.type} {list(x.shape)}" for x in inputs)
  is_image = len(inputs) == 1 and len(inputs[0].shape) == 4
  if not is_image or inputs[0].type != "tensor(float)":
    raise InputError(
      "expected one input, float32 [n, 3, height, width]; the file has"
      f" {listed}"
    )
  batch, channels, *sides = inputs[0].shape
  if isinstance(channels, int) and channels != 3:
    raise InputError(f"expected 3 channels in the input; the file has {listed}")
  known = [n for n in (batch, *sides) if isinstance(n, int)]
  if min(known, default=1) < 1 or max(known, default=1) > _MAX_SIDE:
    raise InputError(
      f"expected an input of 1 to {_MAX_SIDE} images and pixels a side; the "
      f"file has {listed}"
    )
  given = (size, size) if isinstance(size, int) else size
  is_fixed = [isinstance(side, int) for side in sides]
  if given is None and not all(is_fixed):
    raise InputError(
      f"the file takes images of any size ({listed}): set one with size="
    )
  height, width = (
    side if fixed else other
    for side, fixed, other in zip(sides, is_fixed, given or sides, strict=True)
  )
  if not 1 <= min(height, width) <= max(height, width) <= _MAX_SIDE:
    raise InputError(f"size={size}; expected 1 to {_MAX_SIDE} pixels.")
  if given and (height, width) != tuple(given):
    raise InputError(
      f"size={size}, and the file takes {(height, width)} only ({listed})"
    )
  batch = batch if isinstance(batch, int) else None
  return inputs[0].name, batch, (height, width)


def _open_session(data: bytes, file: Any) -> Any:
  try:
    import onnxruntime
  except ImportError as error:
    raise ImportError(
      f"{file} needs onnxruntime, which is not installed: pip install"
      " 'mtv_jax[onnx]'"
    ) from error
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


def _read_file(file: str | os.PathLike, what: str) -> bytes:
  path = Path(file).expanduser()
  if not path.is_file():
    raise MissingFileError(f"there is no {what} {file}")
  return path.read_bytes()


def _read_names(file: str | os.PathLike) -> tuple[str, ...]:
  try:
    # Some editors write a byte order mark.
    text = _read_file(file, "file of class names").decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise InputError(
      f"{file} is not UTF-8 text ({error}); expected a class name per line."
    ) from error
  names = tuple(line.strip() for line in text.rstrip().splitlines())
  if "" in names:
    index = names.index("")
    raise InputError(
      f"{file}: line {index + 1} is blank; class {index} needs a name."
    )
  return names
