"""Decoding benchmark: canvases of photos beside DINOv2's own views of them.

DINOv2's reader decodes a photo with Pillow and makes two global and eight local
views of it on the host; ours makes the canvas, from which the device makes the
views. Both take the same files, one after the other, on one thread.
"""

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence

import cv2
import numpy as np

from mtv_jax.data import canvas
from mtv_jax.data.registry import open_files
from mtv_jax.perf.bench import data as data_bench
from mtv_jax.perf.bench import harness
from mtv_jax.utils.errors import InputError

# Of the photos that are written at another size.
_QUALITY = 90

Transform = Callable[[bytes], object]


def run(
  data: str | None = None,
  *,
  size: int = 384,
  megapixels: str = "0,1,4,12",
  images: int = 12,
  rounds: int = 5,
  threads: int = 1,
) -> harness.Result:
  """Times a canvas and DINOv2's views, in processor time per image.

  Processor time does not grow with what other programs take of the machine;
  images per second of a core are its inverse.

  Args:
    data: path of tars, as in a config; None renders scenes.
    size: side of the canvas.
    megapixels: sizes to which photos are enlarged (4:3, bicubic, quality 90),
      with commas; 0 takes the files as they are. Enlarged photos have less
      detail, and fewer bytes for each pixel, than those of a camera.
    images: files of each size, from the first on.
    rounds: rounds of all, in turn, after one that does not count.
    threads: of PyTorch and OpenCV.
  """
  numbers = _parse_megapixels(megapixels)
  oracle = harness.import_oracle("dinov2_views")
  result = harness.Result(size=size, images=images, threads=threads)
  files = _read_files(data, size, images)
  with _limit_threads(threads):
    methods: dict[str, Transform] = {
      "canvas": functools.partial(canvas.decode_to_canvas, size=size),
      "exact": lambda file: canvas.squash(canvas.decode(file), size),
      "views": oracle.make_dinov2_views(),
    }
    for number in numbers:
      photos = files if not number else _enlarge(files, number)
      times = _time_methods(methods, photos, rounds)
      _add_times(result, number, photos, times)
  return result


@contextlib.contextmanager
def _limit_threads(threads: int) -> Iterator[None]:
  import torch

  before = torch.get_num_threads(), cv2.getNumThreads()
  torch.set_num_threads(threads)
  cv2.setNumThreads(threads)
  try:
    yield
  finally:
    torch.set_num_threads(before[0])
    cv2.setNumThreads(before[1])


def _parse_megapixels(megapixels: str) -> list[float]:
  try:
    numbers = [float(part) for part in megapixels.split(",")]
  except ValueError:
    numbers = [-1.0]
  # Sides are rounded, and may have more pixels.
  least, most = 1e-4, canvas.MAX_PIXELS // 1_010_000
  if not all(n == 0 or least <= n <= most for n in numbers):
    example = "numbers with commas, such as '0,1,4'"
    limits = f"each 0, or from {least:g} to {most:g}"
    raise InputError(f"megapixels={megapixels!r}; expected {example}: {limits}")
  return numbers


def _read_files(data: str | None, size: int, images: int) -> list[bytes]:
  if data is None:
    return data_bench.scene_files(size, images)
  source = open_files(data, captions="ignored")
  return [source[i]["image"] for i in range(min(images, len(source)))]


def _enlarge(files: Sequence[bytes], megapixels: float) -> list[bytes]:
  """The photos as JPEGs of a number of pixels, 4:3."""
  height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
  shape = round(height * 4 / 3), height
  options = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
  photos = []
  for file in files:
    image = cv2.resize(
      canvas.decode(file), shape, interpolation=cv2.INTER_CUBIC
    )
    photos.append(cv2.imencode(".jpg", image[..., ::-1], options)[1].tobytes())
  return photos


def _time_methods(
  methods: dict[str, Transform], photos: Sequence[bytes], rounds: int
) -> dict[str, np.ndarray]:
  """Processor milliseconds per image of each round, by method."""
  times = {name: [] for name in methods}
  for _ in range(rounds + 1):
    for name, transform in methods.items():
      with harness.Stopwatch() as watch:
        for photo in photos:
          transform(photo)
      times[name].append(1e3 * watch.cpu / len(photos))
  return {name: np.array(values[1:]) for name, values in times.items()}


def _add_times(
  result: harness.Result,
  megapixels: float,
  photos: Sequence[bytes],
  times: dict[str, np.ndarray],
) -> None:
  title = f"{megapixels:g} megapixels" if megapixels else "as they are"
  kilobytes = statistics.mean(map(len, photos)) / 1e3
  labels = {
    "views": "DINOv2's views",
    "exact": "canvas, decoded fully",
    "canvas": "canvas",
  }
  medians = {name: float(np.median(times[name])) for name in labels}
  key = f"{megapixels:g}"
  result.add(key, {"kilobytes": kilobytes, "cpu_ms": medians})
  for name, label in labels.items():
    milliseconds = medians[name]
    text = f"{milliseconds:.2f} CPU ms, {1e3 / milliseconds:.0f} images/s/core"
    result.add(f"{key}_{name}", milliseconds, f"{title}: {label}", text)
  for name in ("exact", "canvas"):
    label = f"{title}, {kilobytes:.0f} kB: views / {labels[name]}"
    result.add_ratio(
      f"{key}_{name}_ratio", times["views"], times[name], label, ".1f"
    )
