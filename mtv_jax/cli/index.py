"""Writes the table of blocks of tars in a bucket, which training reads.

  mtv-jax index gs://bucket/web/{00000..09999}.tar

Reads every tar once. Then train with data.train = [dict(type="webdataset",
path="gs://bucket/web/{00000..09999}.tar")] and data.shuffle = "lanes".
"""

from collections.abc import Sequence

from mtv_jax.data.sources import block_table, tar_blocks
from mtv_jax.utils.path_patterns import expand_path
from mtv_jax.utils.progress import Progress


def run(
  data: Sequence[str], /, *, records: int = 64, processes: int | None = None
) -> None:
  """Writes the table next to the tars and prints a summary.

  Args:
    data: .tar shards of one folder; ranges and globs are allowed.
    records: records per block, which one request reads.
    processes: processes that read tars (default: one per core).
  """
  files = expand_path(list(data), suffix=".tar")
  progress = Progress()
  table = tar_blocks.build_table(
    files, records=records, processes=processes, progress=progress
  )
  out = files[0].parent / block_table.NAME
  table.write(out)
  print(
    f"{int(table.records.sum()):,} records in {len(table):,} blocks of"
    f" {len(files):,} tars, of which {int(table.captioned.sum()):,} have"
    f" captions; wrote {out}."
  )
