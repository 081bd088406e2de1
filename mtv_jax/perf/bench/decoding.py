"""Decoding benchmark: canvases of photos beside DINOv2's own views of them.

DINOv2's reader decodes a photo with Pillow and makes two global and eight local
views of it on the host; ours makes the canvas, from which the device makes the
views. Both take the same files, one after the other, on one thread.
"""

import contextlib
import functools
import io
import statistics
from collections.abc import Callable, Iterator, Sequence

import cv2
import numpy as np
from PIL import Image

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
  result = harness.Result(size=size, images=images, threads=threads)
  files = _read_files(data, size, images)
  with _limit_threads(threads):
    methods: dict[str, Transform] = {
      "canvas": functools.partial(canvas.decode_to_canvas, size=size),
      "exact": lambda file: canvas.squash(canvas.decode(file), size),
      "views": make_dinov2_views(),
    }
    for number in numbers:
      photos = files if not number else _enlarge(files, number)
      times = _time_methods(methods, photos, rounds)
      _add_times(result, number, photos, times)
  return result


def make_dinov2_views() -> Transform:
  """A function from a file to DINOv2's views, by torchvision's transforms.

  The parameters are those of `DataAugmentationDINO` and of the default config
  of DINOv2 (Oquab et al. 2023).
  """
  import torch
  from torchvision import transforms as T

  torch.manual_seed(0)

  def crop(size: int, scale: tuple[float, float]) -> T.Compose:
    bicubic = T.InterpolationMode.BICUBIC
    resized = T.RandomResizedCrop(size, scale=scale, interpolation=bicubic)
    return T.Compose([resized, T.RandomHorizontalFlip(0.5)])

  def photometrics(blur: float, solarize: float) -> T.Compose:
    ops = [
      T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
      T.RandomGrayscale(0.2),
      T.RandomApply([T.GaussianBlur(9, (0.1, 2.0))], p=blur),
    ]
    if solarize:
      ops.append(T.RandomSolarize(128, p=solarize))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return T.Compose([*ops, T.ToTensor(), T.Normalize(mean, std)])

  large, small = crop(224, (0.32, 1.0)), crop(96, (0.05, 0.32))
  views = [
    T.Compose([large, photometrics(1.0, 0.0)]),
    T.Compose([large, photometrics(0.1, 0.2)]),
    *[T.Compose([small, photometrics(0.5, 0.0)])] * 8,
  ]

  def transform(file: bytes) -> list[torch.Tensor]:
    image = Image.open(io.BytesIO(file)).convert("RGB")
    return [view(image) for view in views]

  return transform


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
