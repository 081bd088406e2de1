"""Tables of blocks: hosts share the shards, and none is read twice."""

import dataclasses
import functools
import multiprocessing
import os
import shutil
import signal
import time

import label_samples
import numpy as np
import pytest

from mtv_jax.data.sources import block_table, indexing, webdataset
from mtv_jax.utils.errors import InputError, MissingFileError, WorkerError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """Tars of 4 records, but for the last one's 2, with their table."""
  return label_samples.make_base(tmp_path_factory.mktemp("tars"), count=18)


@pytest.fixture
def tars(tmp_path, base):
  for file in base.glob("*.tar"):
    (tmp_path / file.name).write_bytes(file.read_bytes())
  return sorted(tmp_path.glob("*.tar"))


def scan(path, *, records=2, wait=0.0):
  """Scans a tar, slowly, and notes that in a file."""
  with open(path.parent / "reads", "a", encoding="utf-8") as log:
    log.write(f"{path.name}\n")
  time.sleep(wait)
  return webdataset.scan(path, records=records)


def build(tars, *, folder=None, **options):
  scan_slowly = functools.partial(scan, **options)
  indexing.build(tars, scan_slowly, per_block=2, folder=folder, processes=2)


def reads(folder):
  log = folder / "reads"
  names = log.read_text().split() if log.exists() else []
  log.unlink(missing_ok=True)
  return sorted(names)


def names(tars):
  return [tar.name for tar in tars]


def test_an_interrupted_build_reads_no_shard_twice(tars):
  folder, content = tars[0].parent, tars[2].read_bytes()
  tars[2].write_bytes(content[:700])
  with pytest.raises(InputError, match=r"00002.tar is truncated"):
    build(tars)
  first = reads(folder)
  assert "00002.tar" in first and not (folder / block_table.NAME).exists()
  tars[2].write_bytes(content)
  build(tars)
  second = reads(folder)
  assert sorted({*first} | {*second}) == names(tars)
  assert {*first} & {*second} == {"00002.tar"}
  table = block_table.read(folder / block_table.NAME)
  assert table.records.tolist() == [2, 2] * 4 + [2]
  assert not (folder / indexing.PARTS).exists()
  # Only a changed shard and a new one are read.
  build(tars)
  assert not reads(folder)
  tars[1].write_bytes(content)
  new = folder / "x.tar"
  new.write_bytes(content)
  build([*tars, new])
  assert reads(folder) == ["00001.tar", "x.tar"]
  assert len(block_table.read(folder / block_table.NAME)) == 11


def test_a_table_of_some_shards_does_not_replace_one_of_all(tars, tmp_path):
  build(tars)
  with pytest.raises(InputError, match="1 other shards .* 00004.tar. Index"):
    build(tars[:-1])
  build(tars[:-1], folder=tmp_path / "part")
  tars[-1].unlink()
  build(tars[:-1])


def test_hosts_share_the_shards(tars):
  folder = tars[0].parent
  context = multiprocessing.get_context("spawn")
  hosts = [
    context.Process(target=build, args=[tars], kwargs=dict(wait=0.3))
    for _ in range(2)
  ]
  for host in hosts:
    host.start()
  for host in hosts:
    host.join()
  assert [host.exitcode for host in hosts] == [0, 0]
  assert reads(folder) == names(tars)
  assert len(block_table.read(folder / block_table.NAME)) == 9
  assert not (folder / indexing.PARTS).exists()


def test_shards_are_written_with_their_table(base, tars):
  table = block_table.read(base / block_table.NAME)
  assert table.records.tolist() == [4] * 4 + [2]
  # Sizes are compared in a copy, which has other times.
  shutil.copy(base / block_table.NAME, tars[0].parent / block_table.NAME)
  found = block_table.find(tars, tars[0].parent / block_table.NAME)
  np.testing.assert_array_equal(found.offset, table.offset)
  # `index` adds the copies' versions, and reads none.
  found = indexing.build(tars, scan, per_block=64, processes=1)
  assert reads(tars[0].parent) == [] and all(found.versions)
  np.testing.assert_array_equal(found.offset, table.offset)
  tars[3].write_bytes(b"\0" * 10)
  with pytest.raises(InputError, match=r"1 of 5 shards .* 00003.tar"):
    block_table.find(tars, tars[0].parent / block_table.NAME)


def test_a_shard_without_records_has_an_empty_table(tmp_path):
  tar = tmp_path / "0.tar"
  tar.write_bytes(b"\0" * 10240)
  table = indexing.build([tar], scan, per_block=2, processes=1)
  assert len(table) == 0 and reads(tmp_path) == ["0.tar"]


@pytest.mark.parametrize(
  ("column", "value", "problem"),
  [
    ("offset", -512, "outside of its file"),
    ("size", 1 << 62, "outside of its file"),
    ("records", (1 << 32) - 1, "more records than bytes"),
    ("captioned", 5, "more captioned records"),
  ],
)
def test_absurd_blocks_are_rejected(base, tmp_path, column, value, problem):
  table = block_table.read(base / block_table.NAME)
  values = getattr(table, column).copy()
  values[0] = value
  file = tmp_path / block_table.NAME
  dataclasses.replace(table, **{column: values}).write(file)
  with pytest.raises(InputError, match=problem):
    block_table.read(file)


def kill(path):
  del path
  os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_explained(tars):
  with pytest.raises(WorkerError, match="killed or crashed"):
    indexing.build(tars, kill, per_block=2, processes=1)


def test_a_missing_table_is_named(tmp_path):
  with pytest.raises(MissingFileError, match=r"no table of blocks .*t\.npz"):
    block_table.read(tmp_path / "t.npz")
