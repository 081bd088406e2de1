"""Training data in a bucket: 64 hosts read every block once.

Processes are simulated by their indices; the emulator counts the requests.
"""

import itertools
import os
import signal
import subprocess
import sys

import emulators
import label_samples
import numpy as np
import pytest

from mtv_jax.cli.main import main
from mtv_jax.data.pipeline import make_loader
from mtv_jax.data.registry import open_files
from mtv_jax.data.tokenizers import build_tokenizer
from mtv_jax.utils import path
from mtv_jax.utils.errors import InputError

pytestmark = pytest.mark.slow

RECORDS, BATCH = 2048, 128


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv(path.CACHE_VARIABLE, str(tmp_path / "cache"))
  return tmp_path / "cache"


@pytest.fixture(scope="module")
def remote(gs, tmp_path_factory):
  """Tars with their table, Parquet files with theirs, and label sets."""
  folder = tmp_path_factory.mktemp("local")
  label_samples.PER_SHARD, per_shard = 256, label_samples.PER_SHARD
  tars = label_samples.make_base(folder, count=RECORDS)
  label_samples.PER_SHARD = per_shard
  base = label_samples.open_base(tars)
  for kind in ("depth", "boxes"):
    label_samples.make_set(folder / kind, base, kind)
  for file in tars.glob("*.index"):
    file.unlink()
  url = f"{gs}/lanes"
  for name in ("base", "depth", "boxes"):
    path.upload_folder(folder / name, path.as_path(url) / name)
  with emulators.count_requests() as requests:
    flags = ["--records=8", "--processes=2"]
    assert main(["index", f"{url}/base/*.tar", *flags]) == 0
  assert sum(".tar?alt=media" in p for _, p, _ in requests) == 8
  return url


def entry(remote, **options):
  labels = dict(depth=f"{remote}/depth", boxes=f"{remote}/boxes")
  options = dict(labels=labels) | options
  return dict(type="webdataset", path=f"{remote}/base/*.tar", **options)


def read(entries, steps, *, index=0, count=1, batch_size=BATCH, **options):
  data = dict(
    train=entries,
    ops="decode|canvas(8)|depth(8)|regions(4)|caption(16)",
    shuffle="lanes",
    lanes=64,
    window=16,
  )
  with make_loader(
    data | options,
    batch_size=batch_size,
    seed=0,
    start_step=steps[0],
    process_index=index,
    process_count=count,
    tokenizer=build_tokenizer("bytes"),
  ) as loader:
    return [next(loader) for _ in steps]


def assert_part(batches, whole, index, count):
  """A host's batches are its rows of the whole ones."""
  for batch, expected in zip(batches, whole, strict=True):
    for name, values in expected.items():
      size = len(values) // count
      rows = slice(index * size, (index + 1) * size)
      np.testing.assert_array_equal(batch[name], values[rows], err_msg=name)


def test_64_hosts_read_their_share(remote, cache):
  epochs = 2
  steps = range(epochs * RECORDS // BATCH)
  whole = read([entry(remote)], steps)
  assert whole[0]["depth"].any() and whole[0]["box_valid"].any()
  hosts = range(0, 64, 4)
  with emulators.count_requests() as requests:
    for index in hosts:
      batches = read([entry(remote)], steps, index=index, count=64)
      assert_part(batches, whole, index, 64)
  reads = [p for _, p, _ in requests if "alt=media" in p]
  # A request for each block of 8 records, also for those that are read ahead.
  blocks = [p for p in reads if ".tar" in p]
  share = epochs * RECORDS // 8 * len(hosts) / 64
  assert share <= len(blocks) <= share * (1 + 1 / epochs)
  blocks += [p for p in reads if ".blocks" in p]
  # At the start: listings, tables and manifests.
  assert len(requests) - len(blocks) <= 25 * len(hosts)
  assert not cache.exists() or not any(cache.rglob("*.*"))


@pytest.mark.parametrize("count", [1, 4, 16])
def test_a_resume_on_other_hosts(remote, count):
  whole = read([entry(remote)], range(7))
  index = count - 1
  part = read([entry(remote)], range(5, 7), index=index, count=count)
  assert_part(part, whole[5:], index, count)


def test_workers_share_a_hosts_blocks(remote):
  steps = range(6)
  whole = read([entry(remote)], steps)
  with emulators.count_requests() as requests:
    batches = read([entry(remote)], steps, index=3, count=4, workers=2)
  assert_part(batches, whole, 3, 4)
  reads = [p for _, p, _ in requests if ".tar" in p and "alt=media" in p]
  assert len(reads) == len(set(reads))


@pytest.mark.parametrize("workers", [0, 2])
def test_array_records_are_copied_shard_by_shard(
  gs, tmp_path, monkeypatch, workers
):
  monkeypatch.setattr(label_samples, "PER_SHARD", 16)
  local = label_samples.make_base(tmp_path, count=256, format="array_record")
  base = label_samples.open_base(local)
  label_samples.make_set(tmp_path / "depth", base, "depth")
  url = path.as_path(f"{gs}/records_{workers}")
  for name in ("base", "depth"):
    path.upload_folder(tmp_path / name, url / name)
  ops = "decode|canvas(8)|caption(16)|depth(8)"
  options = dict(ops=ops, lanes=8, batch_size=16, window=16)
  steps = range(20 if workers else 60)  # An epoch has 16.
  entries = [
    dict(
      type="array_record",
      path=f"{folder}/base/*.array_record",
      labels=dict(depth=f"{folder}/depth"),
    )
    for folder in (tmp_path, url)
  ]
  whole = read(entries[:1], steps, **options)
  copied, hosts = 0, [1] if workers else range(4)
  for index in hosts:
    cache = tmp_path / f"cache{index}"
    monkeypatch.setenv(path.CACHE_VARIABLE, str(cache))
    options |= dict(index=index, count=4, workers=workers)
    with emulators.count_requests() as requests:
      assert_part(read(entries[1:], steps, **options), whole, index, 4)
    copied += sum(
      ".array_record" in p and "alt=media" in p for _, p, _ in requests
    )
    # Two lanes' shards, the next ones (with workers, of two windows), and four
    # that threads copy.
    kept = len(list(cache.rglob("*.array_record")))
    assert kept <= (10 if workers else 8)
  # A shard a lane and 16 records, and those ahead; some are there already.
  last = 2 * (len(steps) // 8 + 3)
  assert 6 * len(hosts) <= copied <= last * len(hosts)


def test_a_changed_shard(remote, tmp_path):
  url = path.as_path(f"{remote}/changed")
  for name in ("00000.tar", "00001.tar", "blocks.npz"):
    data = path.read_bytes(path.as_path(f"{remote}/base/{name}"))
    path.write_bytes(url / name, data)
  with pytest.raises(InputError, match="2 of 2 shards in .* have changed"):
    open_files(f"{url}/*.tar")
  assert main(["index", f"{url}/*.tar"]) == 0
  source = open_files(f"{url}/*.tar")
  path.write_bytes(url / "00002.tar", b"")
  with pytest.raises(InputError, match="1 of 3 shards are not in the table"):
    open_files(f"{url}/*.tar")
  # Replaced after the start.
  expected = source[0]
  path.write_bytes(url / "00000.tar", b"\0" * 10_240)
  assert source[0] == expected  # Its block is in memory.
  with pytest.raises(InputError, match="other content|was replaced"):
    for i in itertools.count(64):
      source[i]


def test_a_killed_index_reads_no_tar_twice(remote):
  url = path.as_path(f"{remote}/killed")
  for name in path.list_folder(f"{remote}/base"):
    if name.endswith(".tar"):
      data = path.read_bytes(path.as_path(f"{remote}/base/{name}"))
      path.write_bytes(url / name, data)
  command = ["index", f"{url}/*.tar", "--processes=1"]
  program = "import sys; from mtv_jax.cli.main import main; main(sys.argv[1:])"
  with emulators.count_requests() as requests:
    process = subprocess.Popen(
      [sys.executable, "-c", program, *command], start_new_session=True
    )
    while len(parts := path.list_folder(url / "blocks.parts")) < 3:
      assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    parts = path.list_folder(url / "blocks.parts")
    assert main(command) == 0
  reads = sum(".tar?alt=media" in p for _, p, _ in requests)
  assert reads <= 9  # The tar of the kill is read again.
  assert 3 <= len(parts) < 8 and "blocks.parts" not in path.list_folder(url)
  assert len(open_files(f"{url}/*.tar")) == RECORDS


def test_labels_of_other_shards(remote, tmp_path):
  base = label_samples.make_base(tmp_path, first=10)
  base = label_samples.open_base(base)
  label_samples.make_set(tmp_path / "depth", base, "depth")
  wrong = entry(remote, labels=dict(depth=str(tmp_path / "depth")))
  with pytest.raises(InputError, match="no labels for 5 of 8 shards"):
    read([wrong], range(2))
