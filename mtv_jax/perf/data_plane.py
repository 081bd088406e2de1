"""Requests, bytes and memory of a run's data, computed from tables of blocks.

Opens a config's sources, which reads their tables and manifests but no records.
`data.lanes` defines the blocks of each host's first windows.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from mtv_jax.data import pipeline
from mtv_jax.data.lanes import LaneOrder
from mtv_jax.data.pipeline import DataConfig
from mtv_jax.data.registry import build_source
from mtv_jax.data.sources.base import Source
from mtv_jax.utils import buckets
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.ranges import ByteRange, RangeReader
from mtv_jax.utils.text import format_bytes

# Reads per second that a bucket serves before it has scaled up, see
# cloud.google.com/storage/docs/request-rate.
INITIAL_READS = 5000
_SAMPLES = 256  # Records to sample, in orders of single records.


class _RecordingReader(RangeReader):
  """Records the ranges that would be read ahead, without reading."""

  def __init__(self):
    super().__init__(0)
    self.spans: dict[ByteRange, bool] = {}

  def prefetch(self, spans: Iterable[ByteRange]) -> None:
    """Records ranges of bucket files."""
    self.spans |= {s: False for s in spans if path_lib.is_remote(s.path)}

  def allows_copies(self, spans: Sequence[ByteRange]) -> bool:
    """Records shards that would be copied to the disk."""
    self.spans |= dict.fromkeys(spans, True)
    return False

  def take(self) -> dict[ByteRange, bool]:
    """Returns the ranges since the last call, and whether each is copied."""
    spans, self.spans = self.spans, {}
    return spans


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataPlane:
  """A run's load on buckets and on its hosts, at a given throughput."""

  hosts: int
  examples_per_second: float  # Over all hosts.
  requests_per_example: float
  bytes_per_example: float
  block_memory: int  # Bytes.
  start_requests: int  # Per host.
  copied_bytes: int  # In the folder for copies of bucket files.
  # Defaults for orders of single records, which lack windows.
  shard_bytes: int = 0  # Whole shards copied for a window's blocks.
  largest_share: float = 1.0  # Largest host's bytes over the mean.
  window_bytes: int = 0  # Blocks of a step's rows on the largest host.
  ahead_bytes: int = 0  # With the blocks that are read ahead.

  @property
  def requests_per_second(self) -> float:
    """Requests of all hosts."""
    return self.examples_per_second * self.requests_per_example

  @property
  def bytes_per_second(self) -> float:
    """Bytes of all hosts."""
    return self.examples_per_second * self.bytes_per_example

  @property
  def warnings(self) -> list[str]:
    """Describes loads that a bucket or a host can't be expected to sustain."""
    warnings = []
    if self.requests_per_second > INITIAL_READS:
      warnings.append(
        f"A bucket serves about {INITIAL_READS:,} reads/s at first and doubles"
        " that in 20 minutes. Use data.shuffle='lanes' with `mtv-jax index`,"
        " larger blocks, or expect a slow start."
      )
    if self.window_bytes > self.block_memory:
      warnings.append(
        f"Windows of {format_bytes(self.window_bytes)} exceed data.block_memory"
        ", so blocks are read again. Raise it, or lower data.window."
      )
    return warnings

  def to_dict(self) -> dict[str, Any]:
    """The figures as plain values."""
    return dataclasses.asdict(self) | {
      "requests_per_second": self.requests_per_second,
      "bytes_per_second": self.bytes_per_second,
      "warnings": self.warnings,
    }

  def __str__(self) -> str:
    requests, size = self.requests_per_second, self.bytes_per_second
    lines = [
      f"data from buckets, {self.hosts} hosts at"
      f" {self.examples_per_second:,.0f} examples/s:",
      f"  {requests:,.0f} requests/s, {requests / self.hosts:,.1f} per host"
      f" ({self.requests_per_example:.4f} per example)",
      f"  {size / 1e6:,.0f} MB/s, {size / self.hosts / 1e6:,.1f} per host"
      f" ({self.bytes_per_example / 1e3:,.1f} kB per example); in its first"
      f" windows, a host has at most {self.largest_share:.3f} times its share",
      f"  memory of the windows {format_bytes(self.window_bytes)} per host,"
      f" {format_bytes(self.ahead_bytes)} with the next ones, of"
      f" {format_bytes(self.block_memory)} (data.block_memory)",
      f"  at a start {self.start_requests:,} requests per host,"
      f" {self.start_requests * self.hosts:,} in all; local copies"
      f" {format_bytes(self.copied_bytes)} in {path_lib.cache_folder()}",
    ]
    if self.shard_bytes:
      lines.append(
        f"  disk for copied shards {format_bytes(self.shard_bytes)} per host,"
        " plus four more shards"
      )
    return "\n".join(lines + [f"  WARNING: {w}" for w in self.warnings])


def compute(
  config: DataConfig,
  *,
  batch_size: int,
  hosts: int,
  examples_per_second: float,
) -> DataPlane:
  """Opens the sources of a config, and computes the load of reading them."""
  old_count = buckets.count_requests()
  sources = [build_source(entry) for entry in config.train]
  start_requests = buckets.count_requests() - old_count
  order = pipeline.build_order(
    config, sources, batch_size=batch_size, hosts=hosts, seed=0
  )
  recorder = _RecordingReader()
  for source in sources:
    source.use_reader(recorder)
  if isinstance(order, LaneOrder):
    figures = _measure_windows(order, sources, recorder, batch_size, hosts)
  else:
    figures = _measure_records(order, sources, recorder, batch_size, hosts)
  copies = path_lib.cache_folder().rglob("*")
  return DataPlane(
    hosts=hosts,
    examples_per_second=examples_per_second,
    block_memory=config.block_memory << 20,
    start_requests=start_requests,
    # Not the size: lazy copies have no content.
    copied_bytes=sum(512 * f.stat().st_blocks for f in copies if f.is_file()),
    **figures,
  )


def _measure_windows(
  order: LaneOrder,
  sources: Sequence[Source],
  recorder: _RecordingReader,
  batch_size: int,
  hosts: int,
) -> dict[str, float]:
  """Sums the ranges of each host's first windows."""
  rows = batch_size // hosts
  examples, requests, totals = 0, 0, []
  current, ahead, shards = 0, 0, 0  # Bytes, of the host with the most.

  def collect(host: int, windows: int) -> tuple[int, dict[ByteRange, bool]]:
    """Returns the records of a host's windows, and their ranges."""
    positions, records = range(host * rows, (host + 1) * rows), 0
    for number, window in order.upcoming(positions, windows=windows):
      records += len(window.records)
      for first, count in zip(window.starts, window.sizes, strict=True):
        sources[number].prefetch(int(first), int(count))
    return records, recorder.take()

  for host in range(hosts):
    _, spans = collect(host, 1)
    block_bytes = sum(s.size for s, is_copied in spans.items() if not is_copied)
    current = max(current, block_bytes)
    records, spans = collect(host, 2)
    examples, requests = examples + records, requests + len(spans)
    copied = sum(s.size for s, is_copied in spans.items() if is_copied)
    totals.append(sum(span.size for span in spans))
    ahead, shards = max(ahead, totals[-1] - copied), max(shards, copied)
  return dict(
    requests_per_example=requests / examples,
    bytes_per_example=sum(totals) / examples,
    window_bytes=current,
    ahead_bytes=ahead,
    shard_bytes=shards,
    largest_share=max(totals) * hosts / max(sum(totals), 1),
  )


def _measure_records(
  order: Any,
  sources: Sequence[Source],
  recorder: _RecordingReader,
  batch_size: int,
  hosts: int,
) -> dict[str, float]:
  """Sums the ranges of a host's first records, each range once."""
  rows = batch_size // hosts
  for sample in range(_SAMPLES):
    step, row = divmod(sample, rows)
    number, record = order[step * batch_size + row]
    sources[number].prefetch(record, 1)
  spans = recorder.take()
  return dict(
    requests_per_example=len(spans) / _SAMPLES,
    bytes_per_example=sum(span.size for span in spans) / _SAMPLES,
  )
