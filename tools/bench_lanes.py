"""Measures orders in lanes: tables of blocks, start-up, requests and mixing.

  python tools/bench_lanes.py table
  python tools/bench_lanes.py mixing
  python tools/bench_lanes.py start --images='coco/*.jpg'
  python tools/bench_lanes.py hosts --images='coco/*.jpg'
  python tools/bench_lanes.py speed --images='coco/*.jpg'

`table` has 10,000 tars of 10,000 records; no tar exists. The others write small
tars with depth and boxes to an emulator of a bucket (extra `emulators`).
`speed` runs `mtv-jax bench data` for a host that owns four lanes, and samples
the GIL with py-spy (`pip install py-spy`).
"""

import contextlib
import functools
import glob
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal
from unittest import mock

import cv2
import numpy as np

from mtv_jax.cli.main import run_module
from mtv_jax.data import order, pipeline
from mtv_jax.data.labels import label_values
from mtv_jax.data.lanes import LaneOrder
from mtv_jax.data.sources import block_table, listings, shard_writer, webdataset
from mtv_jax.data.sources.base import LANE_BLOCK, FileSource, cut_blocks
from mtv_jax.data.tokenizers import build_tokenizer
from mtv_jax.perf.bench import data as bench_data
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.ranges import RangeReader
from mtv_jax.utils.threads import map_threads

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

# Tars, and records per tar.
SHAPES = dict(
  table=(10_000, 10_000),
  mixing=(10_000, 10_000),
  start=(1000, 16),
  hosts=(64, 256),
  speed=(4, 256),
)
RECORD = 89_150  # Bytes of a photo of 384 pixels, with its caption.
SEED = 0
OPS = "decode|canvas(32)|caption(16)|depth(32)|regions(4)"


def run(
  what: Literal["table", "mixing", "start", "hosts", "speed"],
  /,
  *,
  images: str = "",
  tars: int | None = None,
  records: int | None = None,
  latency: float = 0.03,
  block_memory: int = 6,
) -> None:
  """Prints one kind of figures.

  Args:
    what: which figures.
    images: photos for `start`, `hosts` and `speed`.
    tars: number of tars; default: see `SHAPES`.
    records: records per tar.
    latency: seconds of a request, for `start`.
    block_memory: MiB of blocks in memory, for `hosts`. As in a large data set,
      the default holds no blocks of earlier windows.
  """
  shape = tars or SHAPES[what][0], records or SHAPES[what][1]
  if what in ("start", "hosts", "speed"):
    if not (photos := sorted(glob.glob(images))):
      raise SystemExit(f"--images={images!r} has no file: name some photos.")
    measures = dict(
      start=measure_start,
      hosts=functools.partial(measure_hosts, block_memory=block_memory),
      speed=measure_speed,
    )
    latency = latency if what == "start" else 0.0
    side = 384 if what == "speed" else 64
    with tempfile.TemporaryDirectory() as folder:
      folder = pathlib.Path(folder)
      write_files(folder, photos, *shape, side=side)
      with open_bucket(folder, latency=latency) as url:
        measures[what](folder, url, *shape)
    return
  measure = measure_table if what == "table" else measure_mixing
  measure(*shape)


def show(label: str, value: str) -> None:
  """Prints a figure."""
  print(f"{label:56} {value}", flush=True)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
  """Returns a call's result and its seconds."""
  start = time.perf_counter()
  return function(), time.perf_counter() - start


def resident_memory() -> float:
  """Resident memory of this process, in MB."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def synthetic_table(tars: int, records: int) -> block_table.BlockTable:
  """The table of tars that don't exist, in blocks of 64 records."""
  rng = np.random.default_rng(SEED)
  ends, shard = cut_blocks(np.arange(1, tars + 1) * records, LANE_BLOCK)
  counts = np.diff(ends, prepend=0)
  size = (counts * RECORD * rng.uniform(0.8, 1.2, len(counts))).astype(np.int64)
  ends = np.cumsum(size)
  first = np.searchsorted(shard, shard)
  offset = ends - size - (ends - size)[first]
  files = tuple(path_lib.as_path(f"gs://none/{i:05d}.tar") for i in range(tars))
  sizes = np.bincount(shard, size).astype(np.int64).tolist()
  return block_table.BlockTable(
    files, tuple(sizes), ("1",) * tars, shard, offset, size, counts, counts
  )


def measure_table(tars: int, records: int) -> None:
  """Memory, seconds of a start and of a step's addresses."""
  hosts, batch = 64, 16_384
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / block_table.NAME
    table = synthetic_table(tars, records)
    states = list(zip(table.sizes, table.versions, strict=True))
    table.write(file)
    del table
    show(f"table of {tars:,} tars of {records:,}", f"{file.stat().st_size:,} B")
    before = resident_memory()
    table, seconds = timed(lambda: block_table.read(file))
    show("read it", f"{seconds:.2f} s")
    # The listing, of 10 pages for 10,000 tars, is left out.
    with mock.patch.object(block_table, "read_states", lambda *_: states):
      table, seconds = timed(lambda: table.select(table.files))
    show("compare sizes and versions", f"{seconds:.2f} s")
  reader = RangeReader(0)
  blocks, seconds = timed(
    lambda: webdataset.TarBlocks(table, reader, captioned=True).blocks
  )
  show("open the source", f"{seconds:.2f} s")
  lanes, seconds = timed(lambda: make_lanes([blocks.ends], batch))
  rows = batch // hosts
  positions = range(17 * rows, 18 * rows)

  def address(step: int) -> None:
    at = range(step * batch + positions.start, step * batch + positions.stop)
    list(lanes.upcoming(at, windows=2))
    for position in at:
      next(lanes.candidates(position)[1])

  _, first = timed(lambda: address(0))
  show("order, and the first step's addresses", f"{seconds + first:.2f} s")
  show("resident memory of all", f"{resident_memory() - before:,.0f} MB")
  times = [timed(lambda s=s: address(s))[1] for s in range(1, 41)]
  ms = statistics.median(times) * 1e3
  show(f"a step's {rows} addresses, a host of {hosts}", f"{ms:.2f} ms")
  last = 9 * tars * records // batch
  show(
    "the first step of the tenth epoch",
    f"{timed(lambda: address(last))[1]:.2f} s",
  )


def make_lanes(
  ends: Sequence[np.ndarray], batch: int, *, window: int = 1024
) -> LaneOrder:
  """The order of sources of equal weight."""
  return LaneOrder(
    ends,
    weights=[1.0] * len(ends),
    batch_size=batch,
    lanes=min(batch, 256),
    window=window,
    seeds=[order.source_seed(SEED, k) for k in range(len(ends))],
  )


class _Shards(FileSource):
  """Shards of equal length, without content."""

  def __init__(self, tars: int, records: int):
    super().__init__([pathlib.Path("none")] * tars, [records] * tars)

  def __getitem__(self, i):
    raise NotImplementedError


def measure_mixing(tars: int, records: int) -> None:
  """Distinct tars among the rows of a batch, by order."""
  source = _Shards(tars, records)
  for batch in (4096, 16_384):
    orders = {"lanes": make_lanes([source.lane_blocks.ends], batch)} | {
      name: order.addresses([source], [1.0], shuffle=name, seed=SEED)
      for name in ("global", "block")
    }
    for name, rows in orders.items():
      counts = []
      for step in (0, 1000, 2000, 3000, 4000):
        at = range(step * batch, (step + 1) * batch)
        numbers = [rows[i][1] // records for i in at]
        counts.append(len(set(numbers)))
      show(
        f"distinct tars of {tars:,} in a batch of {batch:,}, {name}",
        f"{statistics.median(counts):,.0f}",
      )


def write_files(
  folder: pathlib.Path,
  photos: Sequence[str],
  tars: int,
  records: int,
  *,
  side: int,
) -> None:
  """Writes tars of photos whose longer side is `side`, with two label sets."""
  import label_samples

  small = []
  for number, photo in enumerate(photos[:1024]):
    image = cv2.imread(photo)
    scale = side / max(image.shape)
    small.append(folder / f"{number}.jpg")
    cv2.imwrite(str(small[-1]), cv2.resize(image, None, fx=scale, fy=scale))
  examples = [
    listings.Example(f"{i}", small[i % len(small)], [f"photo {i}"])
    for i in range(tars * records)
  ]
  shard_writer.write(examples, folder / "base", records_per_shard=records)
  base = label_samples.open_base(folder / "base")

  def label(kind: str, i: int) -> label_values.Label:
    if kind == "boxes":
      corners = np.random.default_rng(i).uniform(0, 0.5, (4, 2))
      boxes = np.concatenate([corners, corners + 0.3], axis=1)
      phrases = [f"phrase number {i * 7 % 500 + k}" for k in range(4)]
      return label_values.make_boxes(boxes, phrases)
    side, bits = label_values.SIDE, label_values.BITS
    depth = cv2.resize(cv2.imread(str(small[i % len(small)]), 0), (side, side))
    depth = 1 + depth.astype(np.float32)
    return label_values.make_depth(depth, side=side, bits=bits)

  for kind in ("depth", "boxes"):
    label_samples.make_set(folder / kind, base, kind, of=label)


@contextlib.contextmanager
def open_bucket(folder: pathlib.Path, *, latency: float) -> Iterator[str]:
  """Yields the URL of the files of `write_files` in an emulator."""
  import emulators

  with emulators.google_storage(latency=latency) as bucket:
    url = f"{bucket}/web"
    files = [
      (file, path_lib.as_path(f"{url}/{name}/{file.name}"))
      for name in ("base", "depth", "boxes")
      for file in sorted((folder / name).iterdir())
      if file.suffix != ".index"
    ]
    map_threads(lambda pair: path_lib.upload(*pair), files)
    yield url


def data_config(url: str, **options: Any) -> pipeline.DataConfig:
  """The data of the tars and labels of a bucket."""
  labels = dict(depth=f"{url}/depth", boxes=f"{url}/boxes")
  entry = dict(type="webdataset", path=f"{url}/base/*.tar", labels=labels)
  options = dict(ops=OPS) | options
  return pipeline.DataConfig(train=(entry,), shuffle="lanes", **options)


def open_loader(
  url: str, index: int, *, batch_size: int = 1024, **options: Any
) -> pipeline.Loader:
  """The loader of a host of 64; `options` are of `config.data`."""
  return pipeline.make_loader(
    data_config(url, **options),
    batch_size=batch_size,
    process_index=index,
    process_count=64,
    seed=SEED,
    tokenizer=build_tokenizer("bytes"),
  )


_START = """
import sys, time
start = time.perf_counter()
sys.path.insert(0, {tools!r})
import bench_lanes
from mtv_jax.utils import buckets
imported = time.perf_counter()
with bench_lanes.open_loader({url!r}, 5) as loader:
  opened, requests = time.perf_counter(), buckets.count_requests()
  next(loader)
  first = time.perf_counter()
print(imported - start, opened - imported, first - opened, requests)
"""


def measure_start(
  folder: pathlib.Path, url: str, tars: int, records: int
) -> None:
  """Seconds and requests from a process's start to its first batch."""
  tools = str(pathlib.Path(__file__).parent)
  train_step = _START.format(tools=tools, url=url)
  runs = []
  for _ in range(3):
    output = subprocess.run(
      [sys.executable, "-c", train_step],
      check=True,
      capture_output=True,
      text=True,
    ).stdout
    runs.append([float(word) for word in output.split()])
  *times, counts = zip(*runs, strict=True)
  names = "imports", "open tars and two label sets", "first batch"
  for name, seconds in zip(names, times, strict=True):
    show(
      f"{tars:,} tars of {records}: {name}",
      f"{statistics.median(seconds):.1f} s",
    )
  # The emulator's listings have one page.
  show("requests to open them, in pages of 1,000", f"{counts[0]:,.0f}")
  show("of 64 hosts, a tar", f"{64 * counts[0] / tars:.2f}")


def measure_hosts(
  folder: pathlib.Path, url: str, tars: int, records: int, *, block_memory: int
) -> None:
  """Requests and bytes a record, of eight of 64 hosts with a lane each."""
  import emulators

  hosts, batch, epochs = range(0, 64, 8), 1024, 15
  rows = epochs * tars * records // 64
  ops = "caption(16)|depth(32)|regions(4)"
  # As in a large data set, a window is a small part of what a host reads.
  options = dict(
    ops=ops, lanes=64, window=LANE_BLOCK, block_memory=block_memory
  )
  shares = [
    path_lib.as_path(f"{url}/{name}/{block_table.NAME}")
    for name in ("base", "depth", "boxes")
  ]
  share = epochs / 64 * sum(block_table.read(f).size.sum() for f in shares)
  ranges, starts, sizes = [], [], []
  for host in hosts:
    with (
      emulators.count_requests() as requests,
      open_loader(url, host, batch_size=batch, **options) as loader,
    ):
      for _ in range(64 * rows // batch):
        next(loader)
    of_host = [
      size
      for _, path, size in requests
      if "#" in path and (".tar?" in path or ".blocks?" in path)
    ]
    ranges.append(len(of_host))
    sizes.append(sum(of_host))
    starts.append(len(requests) - len(of_host))
  show(f"records a host, {epochs} epochs", f"{rows:,}")
  show(
    "requests a record, tars and two label sets",
    f"{statistics.mean(ranges) / rows:.4f}",
  )
  for name, count in (("mean", statistics.mean(sizes)), ("most", max(sizes))):
    show(f"bytes of a host over its share, {name}", f"{count / share:.3f}")
  show("other requests of a host", f"{max(starts)}")


def measure_speed(
  folder: pathlib.Path, url: str, tars: int, records: int
) -> None:
  """Records a second and CPU time a record, beside decoding alone."""
  places = {"disk": folder, "bucket": url}
  variants = [
    (place, "lanes", workers) for place in places for workers in (0, 2)
  ]
  for place, shuffle, workers in [("disk", "global", 0), *variants]:
    name, where = f"{place}, {shuffle}, {workers} workers", places[place]
    result = bench_data.run(
      f"{where}/base/*.tar",
      depth=f"{where}/depth",
      boxes=f"{where}/boxes",
      batch_size=64,
      lanes=4,
      batches=8,
      shuffle=shuffle,
      workers=workers,
      spy=10,
    )
    pipeline, decode = result["pipeline"], result["decode"]
    show(
      name,
      f"{pipeline['images_per_second']:.0f} records/s, decoding alone"
      f" {decode['images_per_second']:.0f}; CPU {pipeline['cpu_ms']:.2f} ms,"
      f" {decode['cpu_ms']:.2f}; main process {result['main_cpu_ms']:.2f},"
      f" {result['gil_share']:.0%} under the GIL",
    )


if __name__ == "__main__":
  sys.exit(run_module("bench_lanes", sys.modules[__name__]))
