"""Input pipeline benchmark: shards to batches against decoding alone."""

import contextlib
import dataclasses
import functools
import io
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image

from mtv_jax.data import canvas, order, pipeline
from mtv_jax.data.labels.label_values import SIDE
from mtv_jax.data.registry import complete_source, open_files, source_type
from mtv_jax.data.scenes.source import SceneSource
from mtv_jax.data.sources.base import Source
from mtv_jax.data.tokenizers import build_tokenizer
from mtv_jax.perf import data_plane
from mtv_jax.perf.bench import harness
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError
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
  spy: int = 0,
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
    tokenizer: "bytes" or the path of a file.
    depth: folder of a label set, read at the default side.
    boxes: folder of a label set; four regions of each record are read.
    shuffle: order of the records, as in a config.
    lanes: lanes per batch, for `shuffle=lanes`.
    hosts: number of hosts of the printed load, each with its own batch.
    batch_size: the pipeline's batch size.
    batches: timed batches per round, after one warm-up batch.
    rounds: timed rounds, after one warm-up round.
    threads: total over all processes; None for one per core.
    workers: number of the pipeline's worker processes.
    spy: seconds, after the rounds, in which py-spy samples which of this
      process's running threads hold the GIL; 0 skips it.
  """
  threads = threads or available_cores()
  with tempfile.TemporaryDirectory() as folder:
    path = data or _write_scenes_tar(Path(folder), size)
    source = open_files(path)
    config = _make_config(
      path,
      f"decode|canvas({size})|caption({length})",
      {"depth": depth, "boxes": boxes},
      shuffle=shuffle,
      lanes=lanes,
      workers=workers,
      threads=max(threads // max(workers, 1), 1),
    )
    open_loader = functools.partial(
      pipeline.make_loader,
      config,
      batch_size=batch_size,
      seed=0,
      tokenizer=build_tokenizer(tokenizer),
      sources=[complete_source(source, config.train[0])],
    )
    times = []
    for start in range(0, (rounds + 1) * (batches + 1), batches + 1):
      with open_loader(start_step=start) as loader:
        watch, main_cpu = _time_batches(loader, batches)
      first = (start + 1) * batch_size
      files = _read_images(source, first, batches * batch_size)
      decoding = _time_decoding(files, size, threads)
      times.append(_Round(watch, decoding, main_cpu))
    share = None
    if spy:
      with open_loader() as loader:
        share = _sample_gil(loader, spy)
  context = dict(source=source.name, size=size, threads=threads)
  context |= dict(workers=workers, images=batches * batch_size)
  result = harness.BenchResult(**context)
  _add_times(result, times[1:], share)  # The first round warms up the caches.
  if path_lib.is_remote(path):
    plane = data_plane.compute(
      dataclasses.replace(config, lanes=lanes and lanes * hosts),
      batch_size=batch_size * hosts,
      hosts=hosts,
      examples_per_second=result["pipeline"]["images_per_second"] * hosts,
    )
    result.add("data_plane", plane.to_dict(), "data plane", str(plane))
  return result


def _make_config(
  path: str, ops: str, labels: Mapping[str, str | None], **options: Any
) -> pipeline.DataConfig:
  """Returns the `data` section, whose ops also read the label sets."""
  folders = {kind: folder for kind, folder in labels.items() if folder}
  readers = {"depth": f"depth({SIDE})", "boxes": "regions(4)"}
  entry = dict(type=source_type(path), path=path)
  return pipeline.DataConfig(
    train=(entry | ({"labels": folders} if folders else {}),),
    ops="|".join([ops, *(readers[kind] for kind in folders)]),
    **options,
  )


class _Round(NamedTuple):
  """Times of equally many images."""

  pipeline: harness.Stopwatch  # With worker processes.
  decode: harness.Stopwatch
  main_cpu: float  # Seconds of the pipeline's main process.


def _time_batches(
  loader: Iterator[Any], batches: int
) -> tuple[harness.Stopwatch, float]:
  """Times batches; also returns the CPU seconds of the main process."""
  next(loader)  # Fills the queues.
  before = _read_workers_cpu()
  with harness.Stopwatch() as watch:
    for _ in range(batches):
      next(loader)
  main_cpu = watch.cpu
  watch.cpu += _read_workers_cpu() - before
  return watch, main_cpu


def _add_times(
  result: harness.BenchResult, rounds: Sequence[_Round], gil_share: float | None
) -> None:
  """Adds medians of rounds, and the GIL's share of the main process."""
  images, threads = result["images"], result["threads"]
  labels = {"pipeline": "full pipeline", "decode": "decode and resize alone"}
  for name, label in labels.items():
    watches = [getattr(timing, name) for timing in rounds]
    rate = statistics.median(images / watch.wall for watch in watches)
    cpu = statistics.median(1e3 * watch.cpu / images for watch in watches)
    text = f"{rate:.0f} images/s, {rate / threads:.0f} per thread"
    values = dict(images_per_second=rate, cpu_ms=cpu)
    result.add(name, values, label, f"{text}, {cpu:.2f} CPU ms per image")
  main = statistics.median(1e3 * timing.main_cpu / images for timing in rounds)
  text = f"{main:.2f} CPU ms per image in the main process"
  if gil_share is not None:
    text += f", {gil_share * main:.2f} of them under the GIL ({gil_share:.0%})"
    result.add("gil_share", gil_share)
  result.add("main_cpu_ms", main, "main process", text)
  walls = (
    [getattr(timing, name).wall for timing in rounds]
    for name in ("decode", "pipeline")
  )
  result.add_ratio("ratio", *walls, "pipeline / decode", ".1%")


def _sample_gil(loader: Iterator[Any], seconds: int) -> float:
  """Share of running threads' samples in which a thread holds the GIL.

  Compares two simultaneous py-spy recordings, made while batches are read.
  """
  command = ["py-spy", "record", "--nonblocking", "--rate=50", "--format=raw"]
  command += [f"--duration={seconds}", f"--pid={os.getpid()}"]
  if not shutil.which("py-spy"):
    raise InputError("--spy needs py-spy: pip install py-spy.")
  counts = []
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    files = {Path(folder, "gil"): ["--gil"], Path(folder, "all"): []}
    spies = []
    for file, flags in files.items():
      spy = subprocess.Popen(
        [*command, *flags, f"--output={file}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
      )
      stack.callback(spy.wait)
      stack.callback(spy.kill)  # If reading fails.
      spies.append(spy)
    while any(process.poll() is None for process in spies):
      next(loader)
    for file, process in zip(files, spies, strict=True):
      if process.returncode or not file.exists():
        raise InputError(
          "py-spy can't read this process. Run as root, or allow it to trace"
          " (kernel.yama.ptrace_scope=0)."
        )
      lines = file.read_text().splitlines()
      counts.append(sum(int(line.rpartition(" ")[2]) for line in lines))
  return counts[0] / max(counts[1], 1)


def _read_workers_cpu() -> float:
  """CPU seconds of this process's children."""
  total = 0.0
  for process in multiprocessing.active_children():
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2]
    total += sum(map(int, fields.split()[11:13])) / os.sysconf("SC_CLK_TCK")
  return total


def measure_decode_cpu_ms(
  size: int, *, images: int = 128, threads: int | None = None
) -> float:
  """Measures CPU milliseconds to decode a scene and resize it to a canvas."""
  files, threads = make_scene_files(size, images), threads or available_cores()
  for _ in range(2):  # The first pass warms up the caches.
    watch = _time_decoding(files, size, threads)
  return 1e3 * watch.cpu / images


def make_scene_files(size: int, images: int) -> list[bytes]:
  """Renders a few repeated scenes as JPEGs, a quarter larger than `size`."""
  with tempfile.TemporaryDirectory() as folder:
    source = open_files(_write_scenes_tar(Path(folder), size))
    return _read_images(source, 0, images)


def _read_images(source: Source, first: int, count: int) -> list[bytes]:
  """Reads the encoded images of `count` pipeline rows from row `first` on."""
  rows = order.addresses([source], weights=[1.0], shuffle="global", seed=0)
  records = [rows[first + i][1] for i in range(count)]
  images = {n: source[n]["image"] for n in set(records)}
  return [images[number] for number in records]


def _time_decoding(
  files: Sequence[bytes], size: int, threads: int
) -> harness.Stopwatch:
  flags = [_choose_imread_flags(data, size) for data in files]

  def decode(data: bytes, flags: int) -> None:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)

  cv2.setNumThreads(1)
  with harness.Stopwatch() as watch:
    jobs = zip(files, flags, strict=True)
    map_threads(lambda job: decode(*job), jobs, threads=threads)
  return watch


def _choose_imread_flags(data: bytes, size: int) -> int:
  """Chooses flags that decode a file at the smallest size for the canvas."""
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
