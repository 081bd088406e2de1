"""ONNX detectors as experts of boxes, by onnxruntime (extra `onnx`).

What a file's numbers mean is up to one of `decoders.py`.

Images go through on the processor, one to a thread, as the detector's own
examples do it: the same label comes out whatever the number of threads, of
rows and of devices.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from mtv_jax.data.labels.label_values import Outcome
from mtv_jax.data.records import Record
from mtv_jax.experts import local_mesh
from mtv_jax.experts.base import Prepared
from mtv_jax.experts.labelling import detections
from mtv_jax.experts.labelling.phrases import hash_phrases
from mtv_jax.experts.onnx import decoders
from mtv_jax.utils.errors import InputError, MissingFileError


class OnnxDetector:
  """An expert of boxes: a session, a decoder, and names of classes.

  Args:
    session: of onnxruntime, or what has its `get_inputs`, `get_outputs` and
      `run`, which is called by several threads at a time.
    decoder: that knows the file.
    names: of its classes, in their order.
    size: height and width of its input, where the file leaves them open.
    rows: of a batch.
    options: of `detections.check_options`.
    source: what the file is, for the manifest.

  Raises:
    InputError: the file is not what the decoder or the names are for.
  """

  kind = "boxes"

  def __init__(
    self,
    session: Any,
    decoder: decoders.Decoder,
    names: Sequence[str],
    *,
    size: int | tuple[int, int] | None,
    rows: int,
    options: Mapping[str, Any],
    source: Mapping[str, Any],
  ):
    self._session, self._decoder = session, decoder
    self._names = tuple(names)
    self._input, batch, self._size = _input(session, size)
    # A file of a fixed batch takes no other. One that leaves it open gets its
    # images singly: a core works on each, and none depends on its neighbours.
    self._chunk = batch or 1
    self.rows = -(-rows // self._chunk) * self._chunk
    outputs = {x.name: x.shape for x in session.get_outputs()}
    decoder.check(outputs, len(self._names))
    self._outputs = list(outputs)
    self._options = dict(options)
    self.settings = {
      "expert": "onnx",
      **source,
      "decoder": decoder.name,
      "size": list(self._size),
      "names": len(self._names),
      "names_hash": hash_phrases(self._names),
      **options,
    }

  @functools.cached_property
  def _pool(self) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count())

  def prepare(
    self, image: UInt8[np.ndarray, "h w 3"], record: Record
  ) -> Prepared:
    """The image as the decoder has it; all are of one group."""
    del record
    pixels = self._decoder.prepare(image, *self._size)
    return Prepared("image", {"image": pixels}, meta=image.shape[:2])

  def run(
    self, arrays: Mapping[str, np.ndarray]
  ) -> dict[str, Float[np.ndarray, "rows *_"]]:
    """The file's outputs by name, once they are all there."""
    images = arrays["image"]
    chunks = np.split(images, len(images) // self._chunk)
    made = list(self._pool.map(self._run, chunks))
    return {
      name: np.concatenate([outputs[i] for outputs in made])
      for i, name in enumerate(self._outputs)
    }

  def _run(self, images: np.ndarray) -> list[np.ndarray]:
    return self._session.run(self._outputs, {self._input: images})

  def finish(
    self, outputs: Mapping[str, np.ndarray], meta: tuple[int, int]
  ) -> Outcome:
    """The label of one image."""
    options = self._options
    found = self._decoder.decode(
      outputs,
      self._names,
      threshold=options["threshold"],
      image_size=meta,
    )
    return detections.select(
      found, **{k: v for k, v in options.items() if k != "threshold"}
    )


def _input(
  session: Any, size: int | tuple[int, int] | None
) -> tuple[str, int | None, tuple[int, int]]:
  """Name, batch (None if it is open) and height and width of the input."""
  inputs = session.get_inputs()
  listed = ", ".join(f"{x.name}: {x.type} {list(x.shape)}" for x in inputs)
  known = len(inputs) == 1 and len(inputs[0].shape) == 4
  if not known or inputs[0].type != "tensor(float)":
    raise InputError(
      "expected a file with one input, float32 [n, 3, height, width]; this one"
      f" has {listed}"
    )
  batch, channels, *sides = inputs[0].shape
  if isinstance(channels, int) and channels != 3:
    raise InputError(f"expected 3 channels in the input; the file has {listed}")
  given = (size, size) if isinstance(size, int) else size
  fixed = [isinstance(side, int) for side in sides]
  if given is None and not all(fixed):
    raise InputError(
      f"the file takes images of any size ({listed}): say which with size="
    )
  found = tuple(
    side if known else own
    for side, known, own in zip(sides, fixed, given or sides, strict=True)
  )
  if given and found != tuple(given):
    raise InputError(f"size={size}, and the file takes {found} only ({listed})")
  return inputs[0].name, batch if isinstance(batch, int) else None, found


def load_expert(
  file: str | os.PathLike,
  *,
  names: str | os.PathLike,
  mesh: Mesh | None = None,
  batch_size: int = 1,
  dtype: str = "float32",
  decoder: str = "fastestdet",
  size: int | tuple[int, int] | None = None,
  threshold: float | int | None = None,
  nms: float | int | None = None,
  max_boxes: int = 100,
  min_side: float | int = 0.0,
  max_area: float | int = 1.0,
) -> OnnxDetector:
  """Opens an ONNX file as an expert of boxes.

  Boxes are all that the detector's own code would give: there is no list of
  phrases here whose vague ones would find the whole image.

  Args:
    file: the `.onnx` file.
    names: a file with its classes' names, one a line, in their order.
    mesh: of this host; the rows are `batch_size` a device of it. The file runs
      on the processor all the same, a row to a core.
    batch_size: rows a device.
    dtype: only "float32": what it is computed in is up to the file.
    decoder: see `decoders.py`.
    size: of the square (or height and width) that images are brought to, where
      the file takes any.
    threshold: boxes of no higher score are left out; the decoder's by default.
    nms: see `detections.select`; the decoder's by default.
    max_boxes: the same.
    min_side: the same.
    max_area: the same.

  Raises:
    ImportError: onnxruntime is not installed.
    MissingFileError: a file is missing.
    InputError: the file, the names and the decoder don't go together, or an
      option is out of its range.
  """
  if dtype != "float32":
    raise InputError(
      f"dtype={dtype!r}: an ONNX file says itself what it is computed in; leave"
      " dtype at float32"
    )
  chosen = decoders.find(decoder)
  options = detections.check_options(
    threshold=chosen.threshold if threshold is None else threshold,
    nms=chosen.nms if nms is None else nms,
    max_boxes=max_boxes,
    min_side=min_side,
    max_area=max_area,
  )
  if batch_size < 1:
    raise InputError(f"batch_size={batch_size}; expected at least 1")
  path = Path(file).expanduser()
  if not path.is_file():
    raise MissingFileError(f"there is no ONNX file {file}")
  data = path.read_bytes()
  mesh = local_mesh.local_mesh() if mesh is None else mesh
  try:
    return OnnxDetector(
      _session(data, file),
      chosen,
      _names(names),
      size=size,
      rows=batch_size * mesh.size,
      options=options,
      source={
        "file": path.name,
        "hash": hashlib.blake2b(data, digest_size=8).hexdigest(),
      },
    )
  except ValueError as error:
    raise InputError(f"{file}: {error}") from None


def _session(data: bytes, file: Any) -> Any:
  try:
    import onnxruntime
  except ImportError as error:
    raise ImportError(
      f"{file} needs onnxruntime, which is not installed: pip install"
      " 'mtv_jax[onnx]'"
    ) from error
  options = onnxruntime.SessionOptions()
  # Threads of ours each run an image. With one thread an image, sums are added
  # in one order.
  options.intra_op_num_threads = options.inter_op_num_threads = 1
  options.log_severity_level = 3
  try:
    return onnxruntime.InferenceSession(
      data, options, providers=["CPUExecutionProvider"]
    )
  except Exception as error:  # The library's own have no common base.
    raise InputError(
      f"onnxruntime can't open it ({type(error).__name__}: {error})"
    ) from error


def _names(file: str | os.PathLike) -> list[str]:
  path = Path(file).expanduser()
  if not path.is_file():
    raise MissingFileError(f"there is no file of class names {file}")
  try:
    # Editors of some systems begin a file with a mark that is no letter.
    text = path.read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as error:
    raise InputError(
      f"{file} is no text in UTF-8 ({error}); it has a class's name a line"
    ) from error
  lines = text.rstrip().splitlines()
  names = [line.strip() for line in lines]
  for number, name in enumerate(names, 1):
    if not name:
      raise InputError(
        f"{file}: line {number} is blank; class {number - 1} needs a name, as"
        " lines are counted"
      )
  return names
