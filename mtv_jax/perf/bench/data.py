"""Input pipeline benchmark: shards to batches against decoding alone."""

import dataclasses
import io
import multiprocessing
import os
import statistics
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from mtv_jax.data import canvas, order, pipeline
from mtv_jax.data.registry import complete_source, open_files, source_type
from mtv_jax.data.scenes.source import SceneSource
from mtv_jax.data.sources.base import Source
from mtv_jax.data.tokenizers import build_tokenizer
from mtv_jax.perf import data_plane
from mtv_jax.perf.bench import harness
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.threads import available_cores, map_threads


def run(
  data: str | None = None,
  *,
  size: int = 384,
  length: int = 64,
  tokenizer: str = "bytes",
  depth: str | None = None,
  boxes: str | None = None,
  shuffle: Literal["lanes", "global", "block", "none"] = "global",
  lanes: int | None = None,
  hosts: int = 1,
  batch_size: int = 64,
  batches: int = 12,
  rounds: int = 5,
  threads: int | None = None,
  workers: int = 0,
) -> harness.BenchResult:
  """Times the input pipeline against OpenCV decoding and resizing.

  Both process equal images with equally many threads, in alternating rounds.
  Decoding starts from bytes in memory. The pipeline reads tars, decodes,
  resizes to canvases, tokenizes and batches. For data in a bucket, also prints
  the requests, bytes and memory of hosts that each read at the measured speed.

  Args:
    data: path of tars, as in a config; None renders scenes to a temporary tar.
    size: side of the canvas, in pixels.
    length: length of the captions, in tokens.
    tokenizer: "bytes" or a file's path.
    depth: folder of a label set, read at a side of 128 pixels.
    boxes: folder of a label set, of which four regions are read.
    shuffle: order of the records, as in a config.
    lanes: for `shuffle=lanes`: lanes of a batch.
    hosts: hosts of the printed requests, which each read a batch.
    batch_size: the pipeline's batch size.
    batches: timed batches per round, after one warm-up batch.
    rounds: timed rounds, after one warm-up round.
    threads: total over all processes; None for one per core.
    workers: number of the pipeline's worker processes.
  """
  threads = threads or available_cores()
  images = batches * batch_size
  times = {"pipeline": [], "decode": []}
  with tempfile.TemporaryDirectory() as folder:
    path = data or _write_scenes_tar(Path(folder), size)
    source = open_files(path)
    entry = dict(type=source_type(path), path=path)
    ops = f"decode|canvas({size})|caption({length})"
    if labels := {k: v for k, v in (("depth", depth), ("boxes", boxes)) if v}:
      entry["labels"] = labels
      ops += "|depth(128)" * bool(depth) + "|regions(4)" * bool(boxes)
    config = pipeline.DataConfig(
      train=(entry,),
      ops=ops,
      shuffle=shuffle,
      lanes=lanes,
      workers=workers,
      threads=max(threads // max(workers, 1), 1),
    )
    labelled = complete_source(source, entry)
    tokens = build_tokenizer(tokenizer)
    for number in range(rounds + 1):
      start = number * (batches + 1)
      with pipeline.make_loader(
        config,
        batch_size=batch_size,
        seed=0,
        start_step=start,
        tokenizer=tokens,
        sources=[labelled],
      ) as loader:
        # The first batch fills the queues.
        next(loader)
        before = _workers_cpu()
        with harness.Stopwatch() as watch:
          for _ in range(batches):
            next(loader)
        watch.cpu += _workers_cpu() - before
      times["pipeline"].append(watch)
      files = _read_images(source, (start + 1) * batch_size, images)
      times["decode"].append(_time_decoding(files, size, threads))
  # The first round warms up the caches.
  times = {name: watches[1:] for name, watches in times.items()}
  result = harness.BenchResult(
    source=source.name,
    size=size,
    threads=threads,
    workers=workers,
    images=images,
  )
  labels = {"pipeline": "full pipeline", "decode": "decode and resize alone"}
  for name, label in labels.items():
    rate = statistics.median(images / w.wall for w in times[name])
    cpu = statistics.median(1e3 * w.cpu / images for w in times[name])
    text = f"{rate:.0f} images/s, {rate / threads:.0f} per thread"
    values = dict(images_per_second=rate, cpu_ms=cpu)
    result.add(name, values, label, f"{text}, {cpu:.2f} CPU ms per image")
  walls = ([watch.wall for watch in times[k]] for k in ("decode", "pipeline"))
  result.add_ratio("ratio", *walls, "pipeline / decode", ".1%")
  if path_lib.is_remote(path):
    plane = data_plane.compute(
      dataclasses.replace(config, lanes=lanes and lanes * hosts),
      batch_size=batch_size * hosts,
      hosts=hosts,
      examples_per_second=result["pipeline"]["images_per_second"] * hosts,
    )
    result.add("data_plane", plane.to_dict(), "data plane", str(plane))
  return result


def _workers_cpu() -> float:
  """CPU seconds of this process's children."""
  total = 0.0
  for process in multiprocessing.active_children():
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2]
    total += sum(map(int, fields.split()[11:13])) / os.sysconf("SC_CLK_TCK")
  return total


def decode_cpu_ms(
  size: int, *, images: int = 128, threads: int | None = None
) -> float:
  """CPU milliseconds to decode a scene and resize it to a canvas."""
  files, threads = scene_files(size, images), threads or available_cores()
  for _ in range(2):  # The first pass warms up the caches.
    watch = _time_decoding(files, size, threads)
  return 1e3 * watch.cpu / images


def scene_files(size: int, images: int) -> list[bytes]:
  """JPEGs of a few repeated scenes, each a quarter larger than `size`."""
  with tempfile.TemporaryDirectory() as folder:
    source = open_files(_write_scenes_tar(Path(folder), size))
    return _read_images(source, 0, images)


def _read_images(source: Source, first: int, count: int) -> list[bytes]:
  """Encoded images of `count` pipeline rows, starting at row `first`."""
  rows = order.addresses([source], weights=[1.0], shuffle="global", seed=0)
  records = [rows[first + i][1] for i in range(count)]
  images = {n: source[n]["image"] for n in set(records)}
  return [images[number] for number in records]


def _time_decoding(
  files: Sequence[bytes], size: int, threads: int
) -> harness.Stopwatch:
  flags = [_imread_flags(data, size) for data in files]

  def decode(data: bytes, flags: int) -> None:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)

  cv2.setNumThreads(1)
  with harness.Stopwatch() as watch:
    jobs = zip(files, flags, strict=True)
    map_threads(lambda job: decode(*job), jobs, threads=threads)
  return watch


def _imread_flags(data: bytes, size: int) -> int:
  """OpenCV flags that decode a file at the smallest size for the canvas."""
  with Image.open(io.BytesIO(data)) as image:
    is_jpeg, (width, height) = image.format == "JPEG", image.size
  divisor = canvas.choose_divisor(height, width, size) if is_jpeg else 1
  return canvas.imread_flags(divisor)


def _write_scenes_tar(folder: Path, size: int, count: int = 64) -> str:
  """Writes scenes as JPEGs with captions, in the layout of img2dataset."""
  scenes = SceneSource(size=size + size // 4, length=count)
  with tarfile.open(folder / "scenes.tar", "w") as tar:
    for i in range(count):
      image, text = (folder / f"{i:06d}.{suffix}" for suffix in ("jpg", "txt"))
      record = scenes[i]
      pixels = record["image"][..., ::-1]
      cv2.imwrite(str(image), pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
      text.write_text(record["captions"][0])
      for file in (image, text):
        tar.add(file, file.name)
  return tar.name
