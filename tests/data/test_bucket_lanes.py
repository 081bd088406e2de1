"""Training data in a bucket: 64 hosts read every block once.

Processes are simulated by their indices; the emulator counts the requests.
"""

import collections
import itertools
import os
import re
import signal
import subprocess
import sys
import time
import urllib.parse

import emulators
import label_samples
import numpy as np
import pytest

from mtv_jax.cli.main import main
from mtv_jax.data.pipeline import make_loader
from mtv_jax.data.registry import open_files
from mtv_jax.data.tokenizers import build_tokenizer
from mtv_jax.utils import atomic, path
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.ranges import RangeReader

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]

RECORDS, BATCH, LANES = 2048, 128, 64
OPS = "decode|canvas(8)|depth(8)|regions(4)|caption(16)"


@pytest.fixture(scope="module")
def local(tmp_path_factory):
  """Tars and label sets for them, and two folders of Parquet files."""
  pyarrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  folder = tmp_path_factory.mktemp("local")
  tars = label_samples.make_base(folder, count=RECORDS, per_shard=256)
  base = label_samples.open_base(tars)
  for kind in ("depth", "boxes"):
    label_samples.make_set(folder / kind, base, kind)
  for file in tars.glob("*.index"):
    file.unlink()
  for first, name in enumerate(["parquet", "more"]):
    (folder / name).mkdir()
    for i in range(4):
      numbers = range(64 * (4 * first + i), 64 * (4 * first + i + 1))
      columns = dict(image=[*map(label_samples.png, numbers)],
                     text=[f"row {n}" for n in numbers])  # fmt: skip
      file = folder / name / f"{i}.parquet"
      parquet.write_table(pyarrow.table(columns), file, row_group_size=4)
  return folder


def upload(local, bucket):
  """Copies the files to a bucket, and writes the tables of blocks."""
  url = f"{bucket}/lanes"
  for folder in local.iterdir():
    if folder.name != "photos":
      path.upload_folder(folder, path.as_path(url) / folder.name)
  flags = ["--records=8", "--processes=2"]
  for pattern in ("base/*.tar", "parquet/*.parquet", "more/*.parquet"):
    assert main(["index", f"{url}/{pattern}", *flags]) == 0
  return url


@pytest.fixture(scope="module")
def remote(gs, local):
  with emulators.count_requests() as requests:
    url = upload(local, gs)
  assert sum(".tar?alt=media" in p for _, p, _ in requests) == 8
  return url


@pytest.fixture(scope="module")
def stores(remote, local):
  """The URL of the files in a store."""
  urls = {"gs": remote}

  def open_store(request, store):
    if store not in urls:
      urls[store] = upload(local, request.getfixturevalue(store))
    return urls[store]

  return open_store


def entry(remote, **options):
  labels = dict(depth=f"{remote}/depth", boxes=f"{remote}/boxes")
  options = dict(labels=labels) | options
  return dict(type="webdataset", path=f"{remote}/base/*.tar", **options)


def open_loader(entries, *, index=0, count=1, batch_size=BATCH, start_step=0,
                ops=OPS, lanes=LANES, window=16, **options):  # fmt: skip
  data = dict(train=entries, shuffle="lanes", ops=ops, lanes=lanes)
  return make_loader(
    data | dict(window=window) | options,
    batch_size=batch_size,
    seed=0,
    start_step=start_step,
    process_index=index,
    process_count=count,
    tokenizer=build_tokenizer("bytes"),
  )


def read(entries, steps, **options):
  with open_loader(entries, start_step=steps[0], **options) as loader:
    return [next(loader) for _ in steps]


def assert_part(batches, whole, index, count):
  """A host's batches are its rows of the whole ones."""
  for batch, expected in zip(batches, whole, strict=True):
    for name, values in expected.items():
      size = len(values) // count
      rows = slice(index * size, (index + 1) * size)
      np.testing.assert_array_equal(batch[name], values[rows], err_msg=name)


class _Spans(RangeReader):
  """Lists the ranges that would be read."""

  def __init__(self):
    super().__init__(0)
    self.spans = []

  def prefetch(self, spans):
    self.spans += spans


def count_reads(loader, index, steps):
  """Counts the reads of each range if no window's block is read twice."""
  order, rows = loader.batches.addresses, BATCH // 64
  records = collections.Counter(
    order[step * BATCH + index * rows + row]
    for step in range(steps)
    for row in range(rows)
  )
  reads = collections.Counter()
  for (source, record), count in records.items():
    spans = _Spans()
    loader.batches.sources[source].use_reader(spans)
    loader.batches.sources[source].prefetch(record, 1)
    for span in spans.spans:
      name = "/".join(span.path.parts[-2:])
      key = f"{name}#bytes={span.offset}-{span.offset + span.size - 1}"
      reads[key] = max(reads[key], count)
  return reads


def count_ranges(requests):
  """Counts the requests of each range of a file."""
  reads = collections.Counter()
  for method, url, _ in requests:
    name, _, part = url.partition("#")
    name = urllib.parse.unquote(name.partition("?")[0])
    if method == "GET" and re.search(r"\.(tar|blocks|parquet)$", name) and part:
      reads["/".join(name.split("/")[-2:]) + f"#{part}"] += 1
  return reads


@pytest.mark.parametrize(
  ("store", "kinds"),
  [
    ("gs", "base"),
    pytest.param("s3", "base", marks=pytest.mark.long),
    ("gs", "parquet"),
    ("gs", "base parquet more"),
  ],
)
def test_64_hosts_read_their_share(request, stores, cache, store, kinds):
  url, kinds = stores(request, store), kinds.split()
  entries = [
    entry(url, weight=2)
    if kind == "base"
    else dict(type="parquet", path=f"{url}/{kind}/*.parquet")
    for kind in kinds
  ]
  ops = OPS if "base" in kinds else "decode|canvas(8)|caption(16)"
  steps = 6
  whole = read(entries, range(steps), ops=ops)
  assert ops != OPS or (whole[0]["depth"].any() and whole[0]["boxes"].any())
  for index in (0, 42):
    with emulators.count_requests(store) as requests:
      loader = open_loader(entries, index=index, count=64, ops=ops)
      with loader:
        assert_part([next(loader) for _ in whole], whole, index, 64)
        for span in list(loader.reader._reads):
          loader.reader.get(span)  # No request is in progress any more.
    # Of the rows; then with Grain's batches ahead, and two windows.
    least, most = (count_reads(loader, index, n) for n in (steps, steps + 40))
    reads = count_ranges(requests)
    # The first one, with the schema, also at the start.
    footers = {n: reads[n] for n in set(reads) - set(most) if "parquet" in n}
    assert least <= reads - collections.Counter(footers) <= most
    assert all(count <= 1 + ("/0." in n) for n, count in footers.items())
    # A listing, a table, and a manifest or a schema; s3fs asks for sizes.
    starts = [m for m, *_ in requests if m != "HEAD"]
    limit = sum(8 if kind == "base" else 4 for kind in kinds)
    assert len(starts) - reads.total() <= limit
  assert not cache.exists() or not any(cache.rglob("*.*"))


@pytest.mark.parametrize(
  "count", [4, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 16))]
)
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
  reads = count_ranges(requests)
  assert reads and set(reads.values()) == {1}


@pytest.mark.parametrize(
  "workers", [2, pytest.param(0, marks=pytest.mark.long)]
)
def test_array_records_are_copied_shard_by_shard(
  gs, tmp_path, monkeypatch, workers
):
  local = label_samples.make_base(
    tmp_path, count=256, per_shard=16, format="array_record"
  )
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
  # What a killed process has left is removed at the next start.
  dead = atomic.current_process()._replace(token="00000000")
  copy = next(cache.rglob("*.array_record"))
  left = copy.with_name(f".{copy.name}.{dead}.0.tmp")
  left.touch()
  read(entries[1:], range(1), **options | dict(workers=0))
  assert not left.exists()
  # A shard a lane and 16 records, and those ahead; after the first epoch, some
  # are there already.
  last = 2 * (len(steps) // 8 + 3)
  assert 4 * len(hosts) <= copied <= last * len(hosts)


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
  path.remove(url / "00002.tar")
  removed = path.read_bytes(url / "00001.tar")
  path.remove(url / "00001.tar")
  with pytest.raises(InputError, match="1 of 2 shards .* no longer there"):
    open_files(f"{url}/*.tar")
  path.write_bytes(url / "00001.tar", removed)
  # Replaced after the start.
  expected = source[0]
  path.write_bytes(url / "00000.tar", b"\0" * 10_240)
  assert source[0] == expected  # Its block is in memory.
  with pytest.raises(InputError, match="has changed at|was replaced"):
    for i in itertools.count(64):
      source[i]


@pytest.mark.long
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
    deadline = time.monotonic() + 120
    while len(path.list_folder(url / "blocks.parts")) < 3:
      assert process.poll() is None and time.monotonic() < deadline
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
