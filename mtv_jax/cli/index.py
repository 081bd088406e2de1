"""Writes the table of blocks of shards in a bucket, which training reads.

  mtv-jax index gs://bucket/web/{00000..09999}.tar

Reads every tar once, and the footer of every Parquet file. Then train with
data.train = [dict(type="webdataset", path="gs://bucket/web/*.tar")]
and data.shuffle = "lanes".
"""

import functools
from collections.abc import Sequence

from mtv_jax.data.sources import block_table, parquet, tar_blocks
from mtv_jax.data.sources.parquet import ParquetSource
from mtv_jax.utils.path_patterns import expand_path
from mtv_jax.utils.progress import Progress


def run(
  data: Sequence[str], /, *, records: int = 64, processes: int | None = None
) -> None:
  """Writes the table next to the shards and prints a summary.

  Args:
    data: .tar or .parquet shards of one folder; ranges and globs are allowed.
    records: records per block of a tar, which one request reads; the blocks of
      Parquet are its row groups.
    processes: processes that read shards (default: one per core).
  """
  files = expand_path(list(data), suffix=".tar")
  scan = functools.partial(tar_blocks.scan, records=records)
  if files[0].suffix == ParquetSource.suffix:
    scan = parquet.scan
  table = block_table.build(
    files, scan, processes=processes, progress=Progress()
  )
  out = files[0].parent / block_table.NAME
  table.write(out)
  print(
    f"{int(table.records.sum()):,} records in {len(table):,} blocks of"
    f" {len(files):,} shards; {int(table.captioned.sum()):,} have captions."
    f" Wrote {out}."
  )
