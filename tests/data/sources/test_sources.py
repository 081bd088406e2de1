"""Reading records from tars and ArrayRecord files."""

import json
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent import futures

import numpy as np
import pytest
from hostile.samples import write_tar

from mtv_jax.data.records import BadRecord
from mtv_jax.data.registry import build_source, open_files
from mtv_jax.data.sources import array_record, webdataset
from mtv_jax.data.sources.array_record import ArrayRecordSource
from mtv_jax.data.sources.base import Source
from mtv_jax.data.sources.tar_scan import TarError
from mtv_jax.data.sources.webdataset import WebDatasetSource


def members_of(shard, count):
  members = []
  for i in range(count):
    key = f"{shard:05d}{i:04d}"
    sidecar = json.dumps({"caption": f"caption of {key}", "width": 8})
    members += [
      (f"{key}.jpg", f"image {key}".encode()),
      (f"{key}.json", sidecar.encode()),
      (f"{key}.txt", f"caption of {key}".encode()),
    ]
  return members


COUNTS = (5, 1, 0, 7)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tars")
  for shard, count in enumerate(COUNTS):
    write_tar(folder / f"{shard:05d}.tar", members_of(shard, count))
  return folder


@pytest.fixture(scope="module")
def source(tars):
  return WebDatasetSource(f"{tars}/{{00000..00003}}.tar")


def keys():
  return [f"{s:05d}{i:04d}" for s, n in enumerate(COUNTS) for i in range(n)]


def test_every_record_by_its_number(source):
  assert isinstance(source, Source)
  assert len(source) == 13
  assert source.shards.tolist() == [5, 6, 6, 13]
  assert source.shards.dtype == np.int64
  assert source.fields == {"key", "image", "captions"}
  assert source.name == "00000.tar..00003.tar (4 files)"
  assert repr(source) == (
    "WebDatasetSource(00000.tar..00003.tar (4 files), 13 records)"
  )
  for i, key in enumerate(keys()):
    assert source[i] == {
      "key": key,
      "image": f"image {key}".encode(),
      "captions": [f"caption of {key}"],
    }
  assert source[np.int64(5)]["key"] == "000010000"


@pytest.mark.parametrize("i", [-1, 13, 1 << 40])
def test_index_out_of_range(source, i):
  with pytest.raises(IndexError, match=rf"Record {i} of .*13 records"):
    source[i]


def test_records_do_not_share_state(source):
  source[0]["captions"].append("more")
  assert len(source[0]["captions"]) == 1


def one(tmp_path, members, **options):
  write_tar(tmp_path / "x.tar", members)
  return WebDatasetSource(tmp_path / "x.tar", **options)


def captioned(tmp_path, text, sidecar):
  members = {"a/k7.jpg": b"i", "a/k7.txt": text, "a/k7.json": sidecar}
  return one(tmp_path, {k: v for k, v in members.items() if v is not None})


@pytest.mark.parametrize(
  ("text", "sidecar", "captions"),
  [
    (b"t", None, ["t"]),
    (b"\xef\xbb\xbfa mark before it\r\n", None, ["a mark before it"]),
    (b"two\nlines", None, ["two\nlines"]),
    (b"t", b'{"caption": "j"}', ["t"]),
    (None, b'{"caption": "j"}', ["j"]),
    (b"t", b'{"caption": "j", "captions": ["a", "b"]}', ["a", "b"]),
    (b"t", b'{"captions": [" a ", "", "  ", "b"]}', ["a", "b"]),
    (b"t", b'{"captions": []}', ["t"]),
    (None, b'{"captions": "only one"}', ["only one"]),
    (b"t", b"not JSON", ["t"]),
    ("schön".encode(), None, ["schön"]),
  ],
)
def test_parse_captions(tmp_path, text, sidecar, captions):
  assert captioned(tmp_path, text, sidecar)[0]["captions"] == captions


@pytest.mark.parametrize(
  ("text", "sidecar", "message"),
  [
    (b"", None, "caption is empty"),
    (b" \n\t", None, "caption is empty"),
    (b"x", b'{"captions": ["", " "]}', "caption is empty"),
    (b"\xff\xfe", None, "not UTF-8"),
    (None, b"{broken", "can't be parsed"),
    (None, b"[1]", "not an object"),
    (None, b'{"url": "u", "title": "t"}', "only title, url"),
    (None, b"{}", "only nothing"),
    (b"x", b'{"captions": [1, "a"]}', "is 1, not a string"),
  ],
)
def test_captions_that_cannot_be_used(tmp_path, text, sidecar, message):
  source = captioned(tmp_path, text, sidecar)
  with pytest.raises(BadRecord, match=message) as error:
    source[0]
  assert error.value.key == "a/k7"


def test_an_image_without_bytes(tmp_path):
  source = one(tmp_path, [("k.jpg", b""), ("k.txt", b"t")])
  with pytest.raises(BadRecord, match="'k': its image in x.tar has no bytes"):
    source[0]


def test_a_record_spread_over_the_tar(tmp_path):
  hole = [("video.mp4", os.urandom(200_000))]
  source = one(tmp_path, [("k.jpg", b"i"), *hole, ("k.txt", b"t")])
  assert source[0] == {"key": "k", "image": b"i", "captions": ["t"]}


def test_incomplete_groups_are_left_out_and_counted(tmp_path, caplog):
  members = members_of(0, 4)
  members += [("bare.jpg", b"i"), ("lost.txt", b"t"), ("gone.json", b"{}")]
  source = one(tmp_path, members)
  assert len(source) == 4
  assert "left out 2 records without an image and 1 without a" in caplog.text
  # Also if the index existed already.
  caplog.clear()
  WebDatasetSource(tmp_path / "x.tar")
  assert "left out 2 records" in caplog.text
  images = WebDatasetSource(tmp_path / "x.tar", captions="ignored")
  assert images.fields == {"key", "image"}
  assert len(images) == 5
  assert images[4] == {"key": "bare", "image": b"i"}


def test_captions_that_are_optional(tmp_path):
  members = [
    ("a.jpg", b"i"), ("a.txt", b"a text"), ("a.json", b'{"tags": ["t"]}'),
    ("b.jpg", b"i"), ("b.txt", b" "),
    ("c.jpg", b"i"), ("c.json", b"{"),
    ("d.jpg", b"i"), ("d.json", b'{"url": "u", "key": "other"}'),
    ("e.jpg", b""), ("e.txt", b"a text"),
    ("f.jpg", b"i"),
  ]  # fmt: skip
  one(tmp_path, members)
  source = WebDatasetSource(tmp_path / "x.tar", captions="optional")
  assert source.fields == {"key", "image", "captions"}
  records = [source[i] for i in (0, 1, 2, 3, 5)]
  assert [r["key"] for r in records] == list("abcdf")
  assert [r["captions"] for r in records] == [["a text"], [], [], [], []]
  meta = [source.read_with_metadata(i) for i in (0, 1, 2, 3, 5)]
  assert [r.pop("meta") for r in meta] == [
    {"tags": ["t"], "key": "a"}, {"key": "b"}, {"key": "c"},
    {"url": "u", "key": "d"}, {"key": "f"},
  ]  # fmt: skip
  assert meta == records
  # Unusable records have keys, too.
  with pytest.raises(BadRecord) as error:
    source.read_with_metadata(4)
  assert error.value.key == "e"
  ignored = WebDatasetSource(tmp_path / "x.tar", captions="ignored")
  assert len(ignored) == len(source)
  assert [ignored.read_metadata(i) for i in range(6)] == [
    source.read_metadata(i) for i in range(6)
  ]


@pytest.mark.parametrize(
  ("members", "message"),
  [
    ([], "0 groups of members without an image, 0 without a caption, 0 other"),
    ([("a.mp4", b"v"), ("a.txt", b"t")], "1 groups .* 1 other"),
    ([("a.jpg", b"i")], "1 without a caption.*captions='ignored'"),
    ([("a.b.jpg", b"i"), ("a.b.txt", b"t")], "2 other.*ends at the first dot"),
  ],
)
def test_no_record_at_all(tmp_path, members, message):
  with pytest.raises(ValueError, match=message):
    one(tmp_path, members)


def test_a_key_in_two_tars(tmp_path):
  write_tar(tmp_path / "0.tar", members_of(0, 5))
  write_tar(tmp_path / "1.tar", members_of(1, 5))
  write_tar(tmp_path / "2.tar", members_of(0, 7)[9:12])
  with pytest.raises(TarError, match="'000000003' is in") as error:
    WebDatasetSource(f"{tmp_path}/*.tar")
  assert "0.tar" in str(error.value) and "2.tar" in str(error.value)
  assert "own entry in data.train" in str(error.value)
  assert len(WebDatasetSource(f"{tmp_path}/{{0,1}}.tar")) == 10


def test_overlapping_ranges_of_distinct_keys_are_accepted(tmp_path):
  for t in range(3):
    members = [m for i in range(t, 30, 3) for m in members_of(i, 1)]
    write_tar(tmp_path / f"{t}.tar", members)
  assert len(WebDatasetSource(f"{tmp_path}/*.tar")) == 30


def test_too_many_overlapping_keys_are_logged_and_not_compared(
  tmp_path, caplog, monkeypatch
):
  monkeypatch.setattr(webdataset, "_MAX_COMPARED", 9)
  for t in range(2):
    write_tar(tmp_path / f"{t}.tar", members_of(0, 5))
  WebDatasetSource(f"{tmp_path}/*.tar")
  assert "not compared, as there are 10" in caplog.text


def test_few_files_are_open_at_a_time(tmp_path):
  for t in range(40):
    write_tar(tmp_path / f"{t:02d}.tar", members_of(t, 2))
  source = WebDatasetSource(f"{tmp_path}/*.tar")
  source._open_tars.limit = 4
  before = len(os.listdir("/proc/self/fd"))
  order = np.random.default_rng(0).permutation(len(source))
  records = [source[i]["key"] for i in order]
  assert records == [f"{i // 2:05d}{i % 2:04d}" for i in order]
  assert len(os.listdir("/proc/self/fd")) <= before + 2 * 4
  del source
  assert len(os.listdir("/proc/self/fd")) <= before


def test_threads_share_a_source(tmp_path):
  for t in range(12):
    write_tar(tmp_path / f"{t:02d}.tar", members_of(t, 9))
  source = WebDatasetSource(f"{tmp_path}/*.tar")
  source._open_tars.limit = 2  # files are closed while still being read
  order = np.random.default_rng(1).integers(0, len(source), 3000)
  with futures.ThreadPoolExecutor(8) as pool:
    records = list(pool.map(lambda i: source[i], order, chunksize=16))
  for i, record in zip(order, records, strict=True):
    key = f"{i // 9:05d}{i % 9:04d}"
    assert record["key"] == key
    assert record["image"] == f"image {key}".encode()


def read_all(source):
  return [source[i]["image"] for i in range(len(source))]


def test_a_source_in_another_process(source):
  expected = read_all(source)
  assert read_all(pickle.loads(pickle.dumps(source))) == expected
  context = multiprocessing.get_context("spawn")
  with futures.ProcessPoolExecutor(1, mp_context=context) as pool:
    assert pool.submit(read_all, source).result() == expected


def test_a_source_after_a_fork(source):
  # In a process without JAX's threads, which make forking unsafe.
  code = (
    "import os, pickle, sys; source = pickle.load(sys.stdin.buffer);"
    "expected = [source[i] for i in range(len(source))];"
    "source._open_tars._lock.acquire(); pid = os.fork();"
    "same = [source[i] for i in range(len(source))] == expected if not pid"
    " else True;"
    "os._exit(not same) if not pid else sys.exit(os.waitpid(pid, 0)[1] >> 8)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    input=pickle.dumps(source),
    timeout=60,
    env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)),
  )
  assert done.returncode == 0


def test_sources_import_no_framework(tars):
  code = (
    "import sys; from mtv_jax.data.registry import build_source;"
    f"s = build_source(dict(type='webdataset', path={str(tars)!r} + '/*.tar'));"
    "s[0]; bad = {'jax', 'flax', 'tensorflow', 'torch'} & set(sys.modules);"
    "sys.exit(str(bad) if bad else 0)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    timeout=60,
    env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)),
  )
  assert done.returncode == 0, done.stderr


# --- ArrayRecord -------------------------------------------------------------


def record(i):
  return {
    "key": f"{i:09d}",
    "image": os.urandom(100 + i),
    "captions": [f"caption {i} {j}" for j in range(1 + i % 3)],
  }


@pytest.fixture(scope="module")
def array_files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("array_records")
  examples = [record(i) for i in range(13)]
  for shard, (a, b) in enumerate(((0, 5), (5, 5), (5, 13))):
    path = folder / f"{shard:05d}.array_record"
    array_record.write(path, examples[a:b])
    assert array_record.count_records(path) == b - a
  return folder, examples


def test_array_records_by_number(array_files):
  folder, examples = array_files
  source = ArrayRecordSource(f"{folder}/*.array_record")
  assert isinstance(source, Source)
  assert source.shards.tolist() == [5, 5, 13]
  assert source.fields == {"key", "image", "captions"}
  assert "3 files), 13 records" in repr(source)
  assert [source[i] for i in range(13)] == examples
  copy = pickle.loads(pickle.dumps(source))
  assert [copy[i] for i in (12, 0)] == [examples[12], examples[0]]
  with futures.ThreadPoolExecutor(8) as pool:
    order = np.random.default_rng(0).integers(0, 13, 500)
    records = list(pool.map(source.__getitem__, order))
  assert records == [examples[i] for i in order]
  for i in (-1, 13):
    with pytest.raises(IndexError, match="expected 0 to 12"):
      source[i]


def test_array_records_of_others_and_blank_captions(tmp_path):
  path = tmp_path / "x.array_record"
  array_record.write_bytes(path, [b"\n\x0b\n\t\n\x05image"])
  with pytest.raises(BadRecord, match=r"x\.array_record:0.*type='tfds'"):
    ArrayRecordSource(path)[0]
  array_record.write(path, [{"key": "k", "image": b"i", "captions": [" "]}])
  with pytest.raises(BadRecord, match="'k': its caption .* is empty"):
    ArrayRecordSource(path)[0]


def test_damaged_bytes_of_an_array_record(tmp_path):
  path = tmp_path / "x.array_record"
  array_record.write(path, [record(i) for i in range(9)])
  data = bytearray(path.read_bytes())
  # The first record's bytes are random and so stored as they are.
  at = data.index(b"MTV1") + 60
  data[at] ^= 0xFF
  path.write_bytes(data)
  source = ArrayRecordSource(path)
  with pytest.raises(BadRecord, match=r"x\.array_record:0"):
    source[0]
  assert source[8]["key"] == "000000008"


def test_an_interrupted_writer_leaves_no_file(tmp_path):
  def examples():
    yield record(0)
    raise RuntimeError("stop")

  with pytest.raises(RuntimeError, match="stop"):
    array_record.write(tmp_path / "x.array_record", examples())
  assert not list(tmp_path.iterdir())


# --- build_source ------------------------------------------------------------


def test_build_source_in_an_index_dir(tmp_path):
  write_tar(tmp_path / "x.tar", members_of(0, 2))
  config = {
    "type": "webdataset",
    "path": f"{tmp_path}/x.tar",
    "index_dir": str(tmp_path / "index"),
    "weight": 2.0,
  }
  assert len(build_source(config)) == 2
  assert not (tmp_path / "x.tar.index").exists()
  assert len(list((tmp_path / "index").iterdir())) == 1


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"type": "webdatset"}, "Did you mean 'webdataset'"),
    ({"paths": "x"}, "no option 'paths'.*'path'"),
    ({"path": ...}, "path is missing; expected"),
    ({"path": 7}, "path is 7, expected a string or"),
    ({"captions": "option"}, "is 'option'. Did you mean 'optional'"),
    ({"type": "tfds"}, "no option 'path'"),
    ({"limit": 14}, "limit=14, expected 1 to 13 records"),
    ({"limit": 0}, "data.train.limit is 0, expected"),
    ({"limit": 2.5}, "data.train.limit is 2.5, expected"),
    ({"limit": "4"}, "data.train.limit is '4', expected"),
  ],
)
def test_build_source_explains(tars, config, message):
  config = {"type": "webdataset", "path": f"{tars}/*.tar"} | config
  with pytest.raises(ValueError, match=message):
    build_source({k: v for k, v in config.items() if v is not ...})


@pytest.fixture(autouse=True)
def _log_everything(caplog):
  caplog.set_level(logging.INFO)


def test_files_of_any_type_are_opened_by_their_suffix(tars, array_files):
  path = f"{tars}/*.tar"
  source = open_files([path], captions="ignored", index_dir=None)
  assert isinstance(source, WebDatasetSource)
  assert source.fields == {"key", "image"}
  array_path = f"{array_files[0]}/*.array_record"
  source = open_files(array_path, captions="ignored")
  assert isinstance(source, ArrayRecordSource) and len(source) == 13
  with pytest.raises(ValueError, match="one type, got array_record and webd"):
    open_files([path, array_path])


@pytest.mark.parametrize("limit", [1, 4, 12, 13])
def test_a_limit_takes_records_evenly_from_all_files(tars, limit):
  config = dict(type="webdataset", path=f"{tars}/*.tar", index_dir=None)
  whole = build_source(config)
  part = build_source({**config, "limit": limit})
  chosen = np.arange(limit) * 13 // limit
  assert [r["key"] for r in part] == [whole[i]["key"] for i in chosen]
  assert part.read_metadata(limit - 1) == whole.read_metadata(chosen[-1])
  before = [(chosen < end).sum() for end in whole.shards]
  np.testing.assert_array_equal(part.shards, before)
  with pytest.raises(IndexError):
    part[limit]
