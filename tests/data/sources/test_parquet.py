"""Parquet files as `datasets` writes them, read by row group."""

import io
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from mtv_jax.data.records import BadRecord
from mtv_jax.data.registry import build_source, open_files
from mtv_jax.data.sources import parquet
from mtv_jax.data.sources.parquet import ParquetSource
from mtv_jax.utils.errors import InputError


def test_missing_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(ImportError, match=r"mtv_jax\[parquet\]"):
    ParquetSource("x.parquet")


def png(value: int) -> bytes:
  file = io.BytesIO()
  pixels = np.full((2, 2, 3), value, np.uint8)
  Image.fromarray(pixels).save(file, "PNG")
  return file.getvalue()


def images(values):
  return [{"bytes": png(v), "path": f"{v}.png"} for v in values]


def write(file, columns, *, rows=4, image="struct"):
  """A file in groups of `rows` rows, its image column of the type `image`."""
  pa = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
  types = {"struct": struct, "binary": pa.binary(), "string": pa.string()}
  arrays = {
    name: pa.array(values, types[image] if name == "image" else None)
    for name, values in columns.items()
  }
  parquet.write_table(pa.table(arrays), file, row_group_size=rows)
  return file


@pytest.fixture
def folder(tmp_path):
  """Two files of 10 and 7 rows."""
  for n, values in enumerate([range(10), range(10, 17)]):
    write(
      tmp_path / f"train-{n:05d}-of-00002.parquet",
      {"image": images(values), "text": [f"image {v}" for v in values]},
    )
  return tmp_path


def test_records_of_two_files(folder):
  source = build_source({"type": "parquet", "path": f"{folder}/*.parquet"})
  assert source.shards.tolist() == [10, 17]
  assert source.blocks.tolist() == [4, 8, 10, 14, 17]
  assert source.fields == {"key", "image", "captions"}
  records = [source[i] for i in range(17)]
  assert [r["image"] for r in records] == [png(v) for v in range(17)]
  assert [r["captions"] for r in records] == [[f"image {v}"] for v in range(17)]
  assert records[12]["key"] == "train-00001-of-00002/000000002"
  assert len({r["key"] for r in records}) == 17
  meta = {"key": records[12]["key"], "file_name": "12.png"}
  assert source.read_metadata(12) == meta
  with pytest.raises(IndexError):
    source[17]
  copy = pickle.loads(pickle.dumps(source))
  assert [copy[i] for i in range(17)] == records
  opened = open_files(f"{folder}/train-0000{{0..1}}-of-00002.parquet")
  assert isinstance(opened, ParquetSource)


def test_binary_images_and_lists_of_captions(tmp_path):
  captions = [["a", " ", "b"], [None], None, []]
  columns = {"image": [png(v) for v in range(4)], "captions": captions}
  file = write(tmp_path / "x.parquet", columns, image="binary")
  source = ParquetSource(file)
  assert source[0]["captions"] == ["a", "b"]
  for i in (1, 2, 3):
    with pytest.raises(BadRecord, match="its caption in column 'captions'"):
      source[i]
  optional = ParquetSource(file, captions="optional")
  assert [optional[i]["captions"] for i in range(4)] == [["a", "b"], [], [], []]
  ignored = ParquetSource(file, captions="ignored")
  assert set(ignored[1]) == ignored.fields == {"key", "image"}


def test_captions_may_be_optional_without_a_column(tmp_path):
  file = write(tmp_path / "x.parquet", {"image": images([3])})
  assert ParquetSource(file, captions="optional")[0]["captions"] == []
  with pytest.raises(InputError, match=r"no column of captions.*\(struct"):
    ParquetSource(file)


def test_images_without_bytes_are_bad_records(tmp_path):
  rows = [{"bytes": None, "path": "http://a/b.jpg"}, None, *images([2])]
  columns = {"image": rows, "text": ["a", "b", "c"]}
  source = ParquetSource(write(tmp_path / "x.parquet", columns))
  with pytest.raises(BadRecord, match=r"no image bytes, only .*b\.jpg"):
    source[0]
  with pytest.raises(BadRecord, match="'image' has no image bytes"):
    source[1]
  assert source.read_metadata(1) == {"key": "x/000000001"}
  assert source[2]["image"] == png(2)


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"image": "picture"}, "no column 'picture'"),
    ({"image": "url"}, "'url' is string; .*make_shards .* their paths"),
    ({"caption": "size"}, "'size' is int64; the caption must be"),
    ({}, "caption and text of captions"),
  ],
)
def test_unsuitable_columns(tmp_path, options, match):
  columns = {
    "image": images([0]),
    "url": ["http://a"],
    "size": [1],
    "caption": ["a"],
    "text": ["b"],
  }
  file = write(tmp_path / "x.parquet", columns)
  with pytest.raises(InputError, match=match):
    ParquetSource(file, **({"caption": "text"} | options if options else {}))


def test_every_file_has_the_columns(folder):
  write(folder / "z.parquet", {"image": images([1]), "label": [1]})
  with pytest.raises(InputError, match=r"z\.parquet has no column 'text'"):
    ParquetSource(f"{folder}/*.parquet")


def test_damaged_files(folder):
  first, second = sorted(folder.glob("*.parquet"))
  data = second.read_bytes()
  second.write_bytes(data[:-9])
  with pytest.raises(InputError, match=f"{second.name} is not a Parquet file"):
    ParquetSource([first, second])
  # Damage in the first row group leaves the footer and later groups intact.
  second.write_bytes(data[:4] + bytes(120) + data[124:])
  source = ParquetSource([first, second])
  with pytest.raises(BadRecord, match="row group can't be decoded"):
    source[10]
  assert source[14]["image"] == png(14)


@pytest.mark.parametrize("columns", [None, ["image", "text"], ["img", "text"]])
def test_a_file_replaced_while_it_is_read(folder, columns):
  source = ParquetSource(f"{folder}/*.parquet")
  file = source.files[1]
  assert source[16]["image"] == png(16)
  if columns:
    values = [images(range(7)), [str(i) for i in range(7)]]
    write(file, dict(zip(columns, values, strict=True)))
  else:
    file.unlink()
  copy = pickle.loads(pickle.dumps(source))
  for _ in range(2):
    with pytest.raises(InputError, match="has changed since it was opened"):
      copy[16]
  assert copy[3]["image"] == png(3)


def test_memory_is_bounded(tmp_path, monkeypatch):
  pa = pytest.importorskip("pyarrow")
  monkeypatch.setattr(parquet, "_MAX_CACHED", 4 << 20)
  monkeypatch.setattr(parquet, "_LARGE_GROUP", 3 << 20)
  monkeypatch.setattr(parquet, "_MAX_BYTES", 8 << 20)
  zeros = {"image": [bytes(1 << 20)] * 12, "text": ["a"] * 12}
  groups = write(tmp_path / "a.parquet", zeros, rows=1, image="binary")
  source = ParquetSource(groups)
  before = pa.total_allocated_bytes()
  assert all(len(source[i]["image"]) == 1 << 20 for i in range(12))
  assert pa.total_allocated_bytes() - before <= 5 << 20
  # A group of more bytes than its footer says, as a dictionary has them.
  for rows, file in ((7, tmp_path / "b.parquet"), (12, tmp_path / "c.parquet")):
    write(file, zeros, rows=rows, image="binary")
    assert file.stat().st_size < 1 << 17
  assert len(ParquetSource(tmp_path / "b.parquet")[0]["image"]) == 1 << 20
  with pytest.raises(InputError, match="more than .* or 8,388,608 bytes"):
    ParquetSource(tmp_path / "c.parquet")[0]
  values = [bytes([i]) * (1 << 20) for i in range(12)]
  write(groups, zeros | {"image": values}, rows=12, image="binary")
  with pytest.raises(InputError, match="more than .* or 8,388,608 bytes"):
    ParquetSource(groups)
