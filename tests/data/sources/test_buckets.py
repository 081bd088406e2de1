"""Sources and labels in a bucket give the records of local files.

In the emulator of one store; `tests/utils/test_buckets.py` has the contract of
both.
"""

import pickle

import emulators
import label_samples
import numpy as np
import pytest

from mtv_jax.data.pipeline import make_loader
from mtv_jax.data.registry import build_source, open_files
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
  for file in (folder / "base").glob("*.index"):
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


def test_a_block_is_read_in_one_request(remote):
  source = build_source(dict(type="webdataset", path=f"{remote}/base/*.tar"))
  source = pickle.loads(pickle.dumps(source))
  with emulators.count_requests() as requests:
    images = [record["image"] for record in records(source)]
  assert images == [label_samples.png(i) for i in range(len(source))]
  # One of each of the three tars.
  assert len(requests) == len(source.files) == 3


def test_array_record(remote, local, cache):
  actual = open_files(f"{remote}/records/base/*.array_record")
  assert not list(cache.rglob("*.array_record"))
  expected = open_files(f"{local}/records/base/*.array_record")
  assert records(actual) == records(expected)
  assert actual.read_metadata(5) == expected.read_metadata(5)


@pytest.mark.parametrize("suffix", ["tar", "array_record"])
def test_shards_without_a_table_name_the_command(gs, suffix):
  path.write_bytes(path.as_path(f"{gs}/bare/0.{suffix}"), b"")
  with pytest.raises(InputError, match=rf"mtv-jax index '{gs}/bare/\*"):
    open_files(f"{gs}/bare/0.{suffix}")


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
  folder = path.as_path(f"{gs}/changed")
  path.upload_folder(local / "base", folder)
  source = open_files(f"{folder}/00001.tar")
  data = path.read_bytes(folder / "00001.tar")
  path.write_bytes(folder / "00001.tar", data[:600])
  with pytest.raises(InputError, match="ends before|was replaced"):
    records(source)
  with pytest.raises(InputError, match="have changed since their table"):
    open_files(f"{folder}/00001.tar")


@pytest.mark.parametrize("pattern", ["*.tar", "*.array_record"])
def test_an_object_replaced_by_one_of_equal_size_is_named(
  bucket, local, cache, pattern
):
  """Tars are read in blocks, the others copied whole."""
  names = {"*.tar": "base", "*.array_record": "records/base"}
  folder = path.as_path(f"{bucket}/replaced/{names[pattern]}")
  path.upload_folder(local / names[pattern], folder)
  source = open_files(f"{folder}/{pattern}")
  assert source[0]["captions"] == ["c0"]
  for file in path.list_folder(folder):
    if file.endswith(pattern[1:]):
      data = path.read_bytes(folder / file)
      path.write_bytes(folder / file, data[::-1])
  with pytest.raises(
    InputError, match=rf"{folder}/.* (was replaced|has changed)"
  ):
    records(source)


@pytest.mark.long
@pytest.mark.parametrize("pattern", ["*.tar", "*.array_record"])
def test_a_store_that_fails_now_and_then(gs, local, cache, pattern):
  """Requests are repeated; a copy that was cut is named."""
  names = {"*.tar": "base", "*.array_record": "records/base"}
  folder = path.as_path(f"{gs}/failing/{names[pattern]}")
  path.upload_folder(local / names[pattern], folder)
  url, shard = f"{folder}/{pattern}", rf"\d\{pattern[1:]}\?alt=media"
  expected = records(open_files(f"{local}/{names[pattern]}/{pattern}"))
  with emulators.fail_requests("500", "429", "short", "slow", path=shard):
    assert records(open_files(url)) == expected
  for copy in cache.rglob(pattern):
    copy.unlink()
  with emulators.fail_requests("cut", path=shard):
    if pattern == "*.tar":
      assert records(open_files(url)) == expected
    else:
      with pytest.raises(UserError, match=r"has .* bytes"):
        records(open_files(url))


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
