"""Sources that a path alone names."""

import pytest

from mtv_jax.data.registry import build_source, find_source, open_files
from mtv_jax.utils.errors import InputError, MissingFileError


@pytest.fixture
def files(tmp_path):
  names = [
    "web/0.tar", "web/1.tar", "web/0.txt", "web/0.parquet",
    "hub/data/train-0.parquet", "hub/data/test-0.parquet",
    "splits/train/0.array_record", "splits/val/0.array_record",
    "photos/restrained/a.tif", "photos/a.txt", "photos/old/0.tar",
  ]  # fmt: skip
  for name in names:
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
  return tmp_path


def test_held_out_shards_are_not_those_of_training(files):
  for name, file in (("hub", "data/test-0.parquet"), ("splits", "val/0.")):
    (found,) = find_source(files / name, split="test")["path"]
    assert file in found
  (files / "hub/data/test-0.parquet").unlink()
  with pytest.raises(InputError, match="are those of a training split"):
    find_source(files / "hub", split="test")
  assert len(find_source(files / "web", split="test")["path"]) == 2


@pytest.mark.parametrize(
  ("path", "kind", "expected"),
  [
    ("web", "webdataset", ["web/0.tar", "web/1.tar"]),
    ("web/{0..1}.tar", "webdataset", ["web/{0..1}.tar"]),
    ("hub", "parquet", ["hub/data/train-0.parquet"]),
    ("splits", "array_record", ["splits/train/0.array_record"]),
    ("splits/val", "array_record", ["splits/val/0.array_record"]),
    ("photos", "folder", "photos"),
    ("captions.JSON", "folder", "captions.JSON"),
    ("pairs.tsv", "folder", "pairs.tsv"),
    ("gs://bucket/*.parquet", "parquet", ["gs://bucket/*.parquet"]),
  ],
)
def test_a_path_gives_type_and_files(files, monkeypatch, path, kind, expected):
  monkeypatch.chdir(files)
  assert find_source(path) == {"type": kind, "path": expected}


def test_it_is_a_source(tmp_path, write_image):
  for suffix, colour in (("jpg", "red"), ("tif", "green"), ("gif", "blue")):
    write_image(tmp_path / f"{suffix}.{suffix}", colour)
    (tmp_path / f"{suffix}.txt").write_text(colour)
  for source in (build_source({"path": tmp_path}), open_files(tmp_path)):
    assert [r["captions"] for r in source] == [["blue"], ["red"], ["green"]]
  assert len(build_source({"path": "scenes"})) > 1000
  assert len(build_source({"path": tmp_path, "limit": 2})) == 2
  with pytest.raises(InputError, match="files of one type"):
    find_source("a.tar,b.parquet")
  (tmp_path / "notes.txt").touch()
  with pytest.raises(InputError, match="another kind. Expected a folder"):
    find_source(f"{tmp_path}/notes.txt")
  with pytest.raises(MissingFileError, match="x is no data: missing"):
    find_source(f"{tmp_path}/x")
