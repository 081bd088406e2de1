"""Decoding benchmark: our canvas against DINOv2's host augmentation.

DINOv2's loader decodes a photo with Pillow and computes two global and eight
local views on the host. Ours resizes it to a canvas, and the device computes
the views. Both process equal files in turn, by default on one thread.
"""

import functools
import statistics
from collections.abc import Sequence

import cv2
import numpy as np

from mtv_jax.data import canvas
from mtv_jax.data.registry import open_files
from mtv_jax.perf.bench import data as data_bench
from mtv_jax.perf.bench import harness
from mtv_jax.utils.errors import InputError

# JPEG quality of resized photos.
_QUALITY = 90


def run(
  data: str | None = None,
  *,
  size: int = 384,
  megapixels: str = "0,1,4,12",
  images: int = 12,
  rounds: int = 5,
  threads: int = 1,
) -> harness.BenchResult:
  """Times the canvas and DINOv2's views in CPU time per image.

  CPU time does not depend on the machine's load. Its inverse is images per
  second and core.

  Args:
    data: path of tars, as in a config; None renders scenes.
    size: side of the canvas, in pixels.
    megapixels: comma-separated sizes to enlarge photos to (4:3, bicubic, JPEG
      quality 90); 0 uses the files unchanged. Enlarged photos have less detail
      and fewer bytes per pixel than camera photos.
    images: number of files, starting at the first.
    rounds: timed rounds, after one warm-up round; methods take turns.
    threads: PyTorch and OpenCV threads.
  """
  areas = _parse_megapixels(megapixels)
  oracle = harness.import_oracle("dinov2_views")
  result = harness.BenchResult(size=size, images=images, threads=threads)
  files = _read_files(data, size, images)
  oracle.torch.set_num_threads(threads)
  cv2.setNumThreads(threads)
  methods = {
    "views": ("DINOv2's views", oracle.make_dinov2_views()),
    "exact": (
      "canvas, decoded fully",
      lambda file: canvas.squash(canvas.decode(file), size),
    ),
    "canvas": (
      "canvas",
      functools.partial(canvas.decode_to_canvas, size=size),
    ),
  }
  for area in areas:
    photos = files if not area else _enlarge(files, area)
    calls = [
      lambda transform=transform, photos=photos: list(map(transform, photos))
      for _, transform in methods.values()
    ]
    times = harness.time_rounds(calls, rounds=rounds, clock="cpu")
    times = dict(zip(methods, 1e3 * times.T / len(photos), strict=True))
    medians = {name: float(np.median(times[name])) for name in methods}
    key, title = f"{area:g}", f"{area:g} megapixels"
    title = title if area else "unchanged"
    kilobytes = statistics.mean(map(len, photos)) / 1e3
    result.add(key, {"kilobytes": kilobytes, "cpu_ms": medians})
    for name, (label, _) in methods.items():
      ms = medians[name]
      text = f"{ms:.2f} CPU ms, {1e3 / ms:.0f} images/s/core"
      result.add(f"{key}_{name}", ms, f"{title}: {label}", text)
    for name in ("exact", "canvas"):
      label = f"{title}, {kilobytes:.0f} kB: views / {methods[name][0]}"
      result.add_ratio(
        f"{key}_{name}_ratio", times["views"], times[name], label, ".1f"
      )
  return result


def _parse_megapixels(megapixels: str) -> list[float]:
  try:
    numbers = [float(part) for part in megapixels.split(",")]
  except ValueError:
    numbers = [-1.0]
  # Rounded sides may exceed the number of pixels.
  low, high = 1e-4, canvas.MAX_PIXELS // 1_010_000
  if not all(n == 0 or low <= n <= high for n in numbers):
    example = "numbers separated by commas, such as '0,1,4'"
    limits = f"each 0, or from {low:g} to {high:g}"
    raise InputError(f"megapixels={megapixels!r}; expected {example}: {limits}")
  return numbers


def _read_files(data: str | None, size: int, images: int) -> list[bytes]:
  if data is None:
    return data_bench.make_scene_files(size, images)
  source = open_files(data, captions="ignored")
  return [source[i]["image"] for i in range(min(images, len(source)))]


def _enlarge(files: Sequence[bytes], megapixels: float) -> list[bytes]:
  """Resizes photos to 4:3 JPEGs with a given number of megapixels."""
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
