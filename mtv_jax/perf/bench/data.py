"""How fast the host prepares batches."""

import concurrent.futures
import dataclasses
import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mtv_jax.data import order, pipeline
from mtv_jax.data.registry import open_files
from mtv_jax.data.scenes.source import SceneSource
from mtv_jax.data.sources.base import Source
from mtv_jax.data.tokenizers import build_tokenizer


@dataclasses.dataclass(frozen=True)
class Rate:
  """How fast images went by.

  Attributes:
    images_per_second: over all threads.
    cpu_ms: milliseconds of this process's cores an image; what other programs
      take of the machine does not change it.
  """

  images_per_second: float
  cpu_ms: float


@dataclasses.dataclass(frozen=True)
class DataSpeed:
  """What `bench_data` measured.

  Attributes:
    pipeline: from files to batches, the medians of the rounds.
    decode: OpenCV decoding and resizing the same images, likewise.
    ratio: pipeline over decode in images a second, the median of the rounds'.
    ratios: of every round.
    threads: that did the work in both.
    workers: processes of the pipeline; 0 is none but this one.
    images: of a round.
    source: what was read.
    size: of the canvas.
  """

  pipeline: Rate
  decode: Rate
  ratio: float
  ratios: tuple[float, ...]
  threads: int
  workers: int
  images: int
  source: str
  size: int

  def to_json(self) -> str:
    """As one line of JSON."""
    return json.dumps(dataclasses.asdict(self))

  def __str__(self) -> str:
    lines = [f"{self.source}, canvas {self.size}, {self.threads} threads"]
    lines += [f"{'':26}{'images/s':>10}{'a thread':>10}{'CPU ms':>8}"]
    for name, rate in (
      ("full pipeline", self.pipeline),
      ("decode and resize alone", self.decode),
    ):
      each = rate.images_per_second / self.threads
      lines.append(
        f"{name:26}{rate.images_per_second:10.0f}{each:10.0f}{rate.cpu_ms:8.2f}"
      )
    low, high = min(self.ratios), max(self.ratios)
    lines.append(
      f"{'pipeline / decode':26}{self.ratio:10.1%}  ({low:.1%} to {high:.1%}"
      f" in {len(self.ratios)} rounds of {self.images} images)"
    )
    return "\n".join(lines)


def bench_data(
  path: str | None = None,
  *,
  size: int = 384,
  length: int = 64,
  tokenizer: str = "bytes",
  batch_size: int = 64,
  batches: int = 12,
  rounds: int = 5,
  threads: int | None = None,
  workers: int = 0,
) -> DataSpeed:
  """Times the input pipeline beside decoding and resizing alone.

  Both do the same images with as many threads, by turns, so that what else the
  machine does disturbs both alike. Decoding alone begins with the files' bytes
  in memory and keeps nothing; the pipeline reads tars, decodes, makes canvases
  and token ids and puts batches together.

  Args:
    path: of tars, as a config has it; None renders scenes to a temporary one.
    size: of the canvas.
    length: of the captions, in tokens.
    tokenizer: "bytes" or the path of one.
    batch_size: of the pipeline.
    batches: timed in a round, after one that is not.
    rounds: of both.
    threads: all together; None for a core each.
    workers: processes of the pipeline.
  """
  threads = threads or pipeline.cores()
  with tempfile.TemporaryDirectory() as folder:
    if path is None:
      path = _scenes_tar(Path(folder), size)
    source = open_files(path)
    config = {
      "ops": f"decode|canvas({size})|caption({length})",
      "workers": workers,
      "threads": max(threads // max(workers, 1), 1),
    }
    tokens = build_tokenizer(tokenizer)
    pipelined, decoded = [], []
    # The first round of both warms caches up and is not counted.
    for number in range(rounds + 1):
      start = number * (batches + 1)
      with pipeline.make_loader(
        config,
        batch_size=batch_size,
        seed=0,
        start_step=start,
        tokenizer=tokens,
        sources=[source],
      ) as loader:
        pipelined.append(_rate_of_batches(loader, batches, batch_size))
      files = _files(source, (start + 1) * batch_size, batches * batch_size)
      decoded.append(_rate_of_decoding(files, size, threads))
  pipelined, decoded = pipelined[1:], decoded[1:]
  ratios = [
    p.images_per_second / d.images_per_second
    for p, d in zip(pipelined, decoded, strict=True)
  ]
  return DataSpeed(
    pipeline=_median(pipelined),
    decode=_median(decoded),
    ratio=statistics.median(ratios),
    ratios=tuple(ratios),
    threads=threads,
    workers=workers,
    images=batches * batch_size,
    source=source.name,
    size=size,
  )


def decode_alone(
  size: int, *, images: int = 128, threads: int | None = None
) -> Rate:
  """Decoding and resizing scenes to canvases of a size, and nothing else."""
  files, threads = scene_files(size, images), threads or pipeline.cores()
  # The first pass warms caches up and is not counted.
  _rate_of_decoding(files, size, threads)
  return _rate_of_decoding(files, size, threads)


def scene_files(size: int, images: int) -> list[bytes]:
  """JPEGs of scenes a quarter larger than a size; some come again."""
  with tempfile.TemporaryDirectory() as folder:
    path = _scenes_tar(Path(folder), size)
    return _files(open_files(path), 0, images)


def _rate_of_batches(
  loader: Iterator[Any], batches: int, batch_size: int
) -> Rate:
  # From one batch to another in full run: as much is in the making at the end
  # as was at the start.
  next(loader)
  with _Clock(batches * batch_size) as clock:
    for _ in range(batches):
      next(loader)
  return clock.rate


def _files(source: Source, first: int, count: int) -> list[bytes]:
  """The bytes of the images that stand at these rows of the pipeline."""
  rows = order.addresses([source], weights=[1.0], shuffle="global", seed=0)
  images: dict[int, bytes] = {}
  numbers = [rows[first + i][1] for i in range(count)]
  for number in numbers:
    if number not in images:
      images[number] = source[number]["image"]
  return [images[number] for number in numbers]


def _rate_of_decoding(files: Sequence[bytes], size: int, threads: int) -> Rate:
  def work(data: bytes) -> None:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)

  cv2.setNumThreads(1)
  with (
    concurrent.futures.ThreadPoolExecutor(threads) as pool,
    _Clock(len(files)) as clock,
  ):
    for _ in pool.map(work, files):
      pass
  return clock.rate


class _Clock:
  """Wall and process time of a block that does `images` images."""

  rate: Rate

  def __init__(self, images: int):
    self._images = images

  def __enter__(self) -> "_Clock":
    self._start = time.perf_counter(), time.process_time()
    return self

  def __exit__(self, *exception: object) -> None:
    wall = time.perf_counter() - self._start[0]
    cpu = time.process_time() - self._start[1]
    self.rate = Rate(self._images / wall, 1e3 * cpu / self._images)


def _median(rates: Sequence[Rate]) -> Rate:
  return Rate(
    statistics.median(r.images_per_second for r in rates),
    statistics.median(r.cpu_ms for r in rates),
  )


def _scenes_tar(folder: Path, size: int, count: int = 64) -> str:
  """A tar of scenes as JPEGs with captions, as img2dataset writes them."""
  path = folder / "scenes.tar"
  scenes = SceneSource(size=size + size // 4, length=count)
  with tarfile.open(path, "w") as tar:
    for i in range(count):
      record = scenes[i]
      pixels = record["image"][..., ::-1]
      _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
      for name, content in (
        (f"{i:06d}.jpg", data.tobytes()),
        (f"{i:06d}.txt", record["captions"][0].encode()),
      ):
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
  return str(path)
