"""Writes the table of blocks of a bucket's shards, for training.

  mtv-jax index gs://bucket/web/{00000..09999}.tar

Reads every tar once, and the footer of every Parquet file. Run it on several
hosts at once to divide the shards. Rerun it after it was stopped or shards were
added: finished shards are not read again. Then train with
data.train = [dict(type="webdataset", path="gs://bucket/web/*.tar")]
and data.shuffle = "lanes". For shards in folders that can't be written, such as
the hub's, pass --output=FOLDER, and blocks="FOLDER/blocks.npz" in data.train.
"""

import re
from collections.abc import Sequence

from mtv_jax.data.registry import source_type
from mtv_jax.data.sources import block_table, indexing, parquet
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.path_patterns import expand_path
from mtv_jax.utils.progress import Progress
from mtv_jax.utils.text import format_bytes
from mtv_jax.utils.threads import available_cores

_REQUEST_BYTES = 1 << 24  # Bytes per request.
_BYTE_RATE = 1e8  # Assumed, per process.
_TFDS_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
# Requests per shard besides reading it: for its size, part and lease.
_FIXED_REQUESTS = 10


def run(
  data: Sequence[str],
  /,
  *,
  output: str | None = None,
  records: int = 64,
  processes: int | None = None,
) -> None:
  """Writes the table and prints a summary.

  Args:
    data: .tar, .parquet or .array_record shards of one folder; ranges and globs
      are allowed.
    output: folder of the table; default: the shards' folder.
    records: records per block of a tar, which one request reads; in Parquet a
      block is a row group, in ArrayRecord a whole file.
    processes: processes that read shards (default: one per core).
  """
  files = expand_path(list(data), suffix=".tar")
  if _TFDS_SHARD.search(files[0].name):
    raise InputError(
      f"{files[0]} is a shard of a TFDS data set, whose metadata replace a"
      " table of blocks. Train with type='tfds', name= and data_dir=."
    )
  folder = path_lib.as_path(output) if output else files[0].parent
  kind = source_type(files)
  scan, records = indexing.choose_scan(kind, records)

  def announce(sizes: Sequence[int]) -> None:
    if kind == "parquet":
      sizes = [min(size, parquet.FOOTER) for size in sizes]
    requests = sum(_FIXED_REQUESTS - size // -_REQUEST_BYTES for size in sizes)
    readers = min(processes or available_cores(), max(len(sizes), 1))
    minutes = sum(sizes) / _BYTE_RATE / readers / 60
    print(
      f"Reading {len(sizes):,} of {len(files):,} shards:"
      f" {format_bytes(sum(sizes))}, in a bucket {requests:,} requests; with"
      f" {readers} processes at {_BYTE_RATE / 1e6:.0f} MB/s each {minutes:,.1f}"
      " minutes, less on several hosts.",
      flush=True,
    )

  table = indexing.build(
    files,
    scan,
    folder=folder,
    per_block=records,
    processes=processes,
    announce=announce,
    progress=Progress(unit="shards"),
  )
  print(
    f"{int(table.records.sum()):,} records in {len(table):,} blocks of"
    f" {len(files):,} shards; {int(table.captioned.sum()):,} have captions."
    f" Wrote {folder / block_table.NAME}."
  )
