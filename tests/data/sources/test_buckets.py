"""Sources and labels in a bucket give the records of local files.

In the emulator of one store; `tests/utils/test_buckets.py` has the contract of
both.
"""

import pickle

import emulators
import label_samples
import numpy as np
import pytest

from mtv_jax.data import order
from mtv_jax.data.pipeline import make_loader
from mtv_jax.data.registry import build_source, open_files
from mtv_jax.data.sources import webdataset
from mtv_jax.data.sources.tars.scan import TarError
from mtv_jax.data.tokenizers import build_tokenizer
from mtv_jax.utils import path
from mtv_jax.utils.errors import InputError, UserError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
  """Tars with labels, and equal data as ArrayRecord and Parquet."""
  folder = tmp_path_factory.mktemp("local")
  base = label_samples.open_base(label_samples.make_base(folder))
  for kind in ("depth", "boxes"):
    label_samples.make_set(folder / kind, base, kind)
  label_samples.make_base(folder / "records", format="array_record")
  # The copy in a bucket has a separate index, and no table of blocks.
  for file in (*(folder / "base").glob("*.index"), folder / "base/blocks.npz"):
    file.unlink()
  return folder


@pytest.fixture(scope="module")
def remote(gs, local):
  """A copy of these files in a bucket."""
  url = f"{gs}/sources"
  for name in ("base", "depth", "boxes", "records/base"):
    path.upload_folder(local / name, path.as_path(url) / name)
  return url


def records(source):
  return [source[i] for i in range(len(source))]


def test_tars_and_labels(remote, local, cache):
  entries = [
    dict(
      type="webdataset",
      path=f"{root}/base/*.tar",
      labels=dict(
        depth=f"{root}/depth", boxes=dict(path=f"{root}/boxes", join=join)
      ),
    )
    for root, join in (
      (str(local), "aligned"),
      (remote, "aligned"),
      (remote, "key"),
    )
  ]
  batches = []
  for entry in entries:
    data = dict(train=[entry], ops="decode|canvas(8)|depth(8)|regions(4)")
    tokenizer = build_tokenizer("bytes")
    with make_loader(data, batch_size=4, seed=0, tokenizer=tokenizer) as loader:
      batches.append([next(loader) for _ in range(3)])
  for wanted, *others in zip(*batches, strict=True):
    for name, values in wanted.items():
      for actual in others:
        np.testing.assert_array_equal(actual[name], values, err_msg=name)
  # Beside the tars, for other hosts.
  assert "00000.tar.index" in path.list_folder(f"{remote}/base")


def test_a_block_is_read_in_one_request(remote):
  source = build_source(dict(type="webdataset", path=f"{remote}/base/*.tar"))
  source.read_in_blocks(order.BLOCK * order.WINDOW)
  source = pickle.loads(pickle.dumps(source))
  with emulators.count_requests() as requests:
    images = [record["image"] for record in records(source)]
  assert images == [label_samples.png(i) for i in range(len(source))]
  # One of each of the three tars.
  assert len(requests) == len(source.files) == 3


def test_records_across_blocks(remote, local, monkeypatch):
  monkeypatch.setattr(webdataset, "_BLOCK", 700)
  source = open_files(f"{remote}/base/*.tar")
  source.read_in_blocks(1)
  assert records(source) == records(open_files(f"{local}/base/*.tar"))


def test_whole_tars_are_cached(remote, local, tmp_path):
  entry = dict(type="webdataset", cache=str(tmp_path / "tars"))
  source = build_source(entry | dict(path=f"{remote}/base/*.tar"))
  expected = records(open_files(f"{local}/base/*.tar"))
  assert records(source) == expected
  with emulators.count_requests() as requests:
    assert records(source) == expected
  assert not requests
  assert len(list((tmp_path / "tars").rglob("*.tar"))) == 3


@pytest.mark.parametrize("table", [False, True])
def test_array_record(remote, local, cache, table):
  options = dict(blocks=f"{remote}/records/base/blocks.npz") if table else {}
  if not table:
    # A cache means whole copies.
    options = dict(cache=cache / "whole")
  actual = open_files(f"{remote}/records/base/*.array_record", **options)
  assert len(list(cache.rglob("*.array_record"))) == (0 if table else 3)
  expected = open_files(f"{local}/records/base/*.array_record")
  assert records(actual) == records(expected)
  assert actual.read_metadata(5) == expected.read_metadata(5)


def test_parquet(gs, tmp_path):
  pa = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  table = pa.table(
    {
      "image": pa.array([label_samples.png(i) for i in range(10)], pa.binary()),
      "caption": [f"c{i}" for i in range(10)],
    }
  )
  parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
  url = f"{gs}/parquet/a.parquet"
  path.upload(tmp_path / "a.parquet", path.as_path(url))
  expected = records(open_files(tmp_path / "a.parquet"))
  assert records(open_files(url)) == expected and len(expected) == 10


def test_a_tar_that_changes_is_named(gs, local):
  url = f"{gs}/changed/00001.tar"
  data = (local / "base" / "00001.tar").read_bytes()
  path.write_bytes(path.as_path(url), data)
  source = open_files(url)
  path.write_bytes(path.as_path(url), data[:600])
  with pytest.raises(InputError, match=rf"{url} (ends before|was replaced)"):
    records(source)
  with pytest.raises(TarError, match=rf"{url} is truncated"):
    open_files(url)


@pytest.mark.parametrize("pattern", ["*.tar", "*.array_record"])
def test_an_object_replaced_by_one_of_equal_size_is_named(
  bucket, local, cache, pattern
):
  """Tars are read in a request per record, the others copied whole."""
  names = {"*.tar": "base", "*.array_record": "records/base"}
  folder = path.as_path(f"{bucket}/replaced/{names[pattern]}")
  path.upload_folder(local / names[pattern], folder)
  source = open_files(f"{folder}/{pattern}")
  assert source[0]["captions"] == ["c0"]
  for file in path.list_folder(folder):
    if file.endswith(pattern[1:]):
      data = path.read_bytes(folder / file)
      path.write_bytes(folder / file, data[::-1])
  with pytest.raises(InputError, match=rf"{folder}/.* was replaced while"):
    records(source)


@pytest.mark.long
@pytest.mark.parametrize("read", ["blocks", "ranges", "copies"])
def test_a_store_that_fails_now_and_then(gs, local, tmp_path, read):
  """Requests are repeated; a copy that was cut is named."""
  url = f"{gs}/{read}/00000.tar"
  path.upload(local / "base" / "00000.tar", path.as_path(url))
  is_copied = read == "copies"
  options = dict(cache=tmp_path / "1") if is_copied else {}
  with emulators.fail_requests("cut", "429", "500", path=r"00000\.tar"):
    source = open_files(url, **options)
  if read == "blocks":
    source.read_in_blocks(order.BLOCK * order.WINDOW)
  faults = ("500", "429", "short", "slow")
  with emulators.fail_requests(*faults, path=r"00000\.tar\?alt=media"):
    found = records(source)
  assert found == records(open_files(local / "base" / "00000.tar"))
  source = open_files(url, **dict(cache=tmp_path / "2") if is_copied else {})
  with emulators.fail_requests("cut", path=r"00000\.tar\?alt=media"):
    if is_copied:
      with pytest.raises(UserError, match=rf"{url} has .* bytes"):
        records(source)
    else:
      assert records(source) == found


def test_what_works_on_folders_only(gs):
  with pytest.raises(InputError, match="Pass a folder of this machine"):
    scenes = dict(type="scenes", size=16, length=2, cache=f"{gs}/scenes")
    records(build_source(scenes))


def test_tokenizer(gs, tmp_path):
  import tokenizers

  model = tokenizers.models.WordLevel(
    {"<pad>": 0, "a": 1, "</s>": 2, "?": 3}, "?"
  )
  file = tmp_path / "tokenizer.json"
  tokenizers.Tokenizer(model).save(str(file))
  for name, text in (
    ("tokenizer.json", file.read_text()),
    ("tokenizer_config.json", '{"pad_token": "<pad>", "eos_token": "</s>"}'),
  ):
    path.write_bytes(path.as_path(f"{gs}/tok/{name}"), text.encode())
  (tmp_path / "tokenizer_config.json").write_text(
    '{"pad_token": "<pad>", "eos_token": "</s>"}'
  )
  expected = build_tokenizer(file)
  actual = build_tokenizer(f"{gs}/tok/tokenizer.json")
  assert (actual.pad_id, actual.eos_id) == (expected.pad_id, expected.eos_id)
  assert actual.vocab_size == expected.vocab_size
