"""Sources that a path alone names."""

import os
import pickle

import numpy as np
import pytest

from mtv_jax.data.pipeline import make_loader
from mtv_jax.data.registry import (
  build_source,
  find_source,
  list_shared,
  open_files,
)
from mtv_jax.data.tokenizers import build_tokenizer
from mtv_jax.utils.errors import ConfigError, InputError, MissingFileError


@pytest.fixture
def files(tmp_path):
  names = [
    "web/0.tar", "web/1.tar", "web/0.txt", "web/0.parquet",
    "hub/data/train-0.parquet", "hub/data/test-0.parquet",
    "splits/train/0.array_record", "splits/val/0.array_record",
    "photos/restrained/a.tif", "photos/a.txt", "photos/old/0.tar",
    "halves/train/a.jpg", "halves/val/b/c.jpg", "halves/test/d.jpg",
    "halves/docs/notes.txt", "halves/lost+found/", "classes/train/a/b.jpg",
    "classes/val/b.jpg", "classes/car/c/d.jpg", "trips/train-a/a.jpg",
    "trips/val/b.jpg", "tests/train.tar", "tests/test.tar", "tests/val.tar",
    "a, b/0.tar", "a, b/1.tar",
  ]  # fmt: skip
  for name in names:
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.mkdir(0) if name.endswith("/") else file.touch()
  return tmp_path


def test_held_out_shards_are_not_those_of_training(files):
  for name, file in (
    ("hub", "data/test-0.parquet"),
    ("splits", "val/0."),
    ("tests", "val.tar"),
  ):
    (found,) = find_source(files / name, split="test")["path"]
    assert file in found
  for name, part in (("halves", "/val"), ("classes", ""), ("photos", "")):
    found = find_source(files / name, split="test")
    assert found == {"type": "folder", "path": f"{files}/{name}{part}"}
  (files / "hub/data/test-0.parquet").unlink()
  with pytest.raises(InputError, match="are in a training split"):
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
    ("halves", "folder", "halves/train"),
    ("classes", "folder", "classes"),  # One of them is called train.
    ("trips", "folder", "trips"),
    ("a, b", "webdataset", ["a, b/0.tar", "a, b/1.tar"]),
    ("captions.JSON", "folder", "captions.JSON"),
    ("pairs.tsv", "folder", "pairs.tsv"),
    ("gs://bucket/*.parquet", "parquet", ["gs://bucket/*.parquet"]),
  ],
)
def test_a_path_gives_type_and_files(
  files, monkeypatch, caplog, path, kind, expected
):
  monkeypatch.chdir(files)
  assert find_source(path) == {"type": kind, "path": expected}
  names = dict(classes=["including train, val,"], trips=["including val,"]).get(
    path, []
  )
  assert [name for name in names if name in caplog.text] == names
  assert len(caplog.records) == len(names)


def test_data_in_training_and_evaluation(files):
  def shared(held_out, *train):
    entries = [{"path": files / name} for name in train]
    entries.append({"type": "scenes"})
    found = list_shared(entries, [{"path": files / held_out}])
    return [os.path.relpath(file, files) for file in found]

  assert not shared("halves", "halves") and not shared("splits", "splits")
  assert shared("halves/val", "halves/val", "web") == ["halves/val"]
  assert shared("photos/old/0.tar", "photos") == ["photos/old/0.tar"]
  assert shared("web/1.tar", "hub", "web") == ["web/1.tar"]
  assert not shared("photos/a.txt", "photos")  # Not data by its name.


@pytest.mark.parametrize(
  ("path", "error", "message"),
  [
    ("notes.txt", InputError, "another kind. Expected a folder"),
    ("halvs", MissingFileError, "halvs is missing. Did you mean 'halves'"),
    ("halves/*/*.jpg", InputError, "a pattern of images: pass their folder"),
    ("a.tar,b.parquet", InputError, "files of one type"),
  ],
)
def test_paths_that_are_no_data(files, monkeypatch, path, error, message):
  monkeypatch.chdir(files)
  (files / "notes.txt").touch()
  with pytest.raises(error, match=message):
    find_source(path)


def test_parquet_of_paths_is_a_listing(tmp_path, write_image):
  pyarrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  write_image(tmp_path / "a.png", "red")
  rows = pyarrow.table({"image": ["a.png"], "caption": ["a red one"]})
  file = tmp_path / "pairs.parquet"
  parquet.write_table(rows, file)
  (record,) = build_source({"path": file})
  assert record["captions"] == ["a red one"]
  with pytest.raises(InputError, match="has no column of images .*make_shards"):
    build_source({"path": file.with_name("*.parquet")})
  with pytest.raises(InputError, match="images=x: .* Leave out `images`"):
    build_source({"path": "a.tar", "images": "x"})


def test_it_is_a_source(tmp_path, write_image):
  for suffix, colour in (("jpg", "red"), ("tif", "green"), ("gif", "blue")):
    write_image(tmp_path / f"{suffix}.{suffix}", colour)
    (tmp_path / f"{suffix}.txt").write_text(colour)
  for source in (build_source({"path": tmp_path}), open_files(tmp_path)):
    assert [r["captions"] for r in source] == [["blue"], ["red"], ["green"]]
  assert len(build_source({"path": "scenes"})) > 1000
  assert len(build_source({"path": tmp_path, "limit": 2})) == 2


def test_shuffled_labels_are_those_of_other_records():
  scenes = dict(type="scenes", size=16, length=12, limit=8)
  plain = list(build_source(scenes))
  for kind, fields in (("depth", {"depth"}), ("boxes", {"boxes", "phrases"})):
    source = build_source(scenes | dict(shuffled_labels=(kind,)))
    copy = pickle.loads(pickle.dumps(source))
    owners = []
    for i, (own, record) in enumerate(zip(plain, source, strict=True)):
      for name in own.keys() - fields - {"box_scores"}:
        np.testing.assert_array_equal(record[name], own[name])
      same = [
        k
        for k, other in enumerate(plain)
        if all(np.array_equal(record[f], other[f]) for f in fields)
      ]
      owners.append(same[0])
      assert i != same[0] and len(same) == 1
      # A function of the record alone: the same in every process and order.
      for name in fields:
        np.testing.assert_array_equal(copy[i][name], record[name])
    assert sorted(owners) == [*range(8)]
  for change in (dict(shuffled_labels=("features",)), dict(limit=1)):
    with pytest.raises(InputError, match="shuffled_labels"):
      build_source(scenes | dict(shuffled_labels=("depth",)) | change)


def test_boxes_of_the_whole_image():
  scenes = dict(type="scenes", size=16, length=3)
  source = build_source(scenes | dict(whole_image_boxes=True))
  for own, record in zip(build_source(scenes), source, strict=True):
    assert record["phrases"] == own["phrases"] != []
    expected = [[0, 0, 1, 1]] * len(own["boxes"])
    np.testing.assert_array_equal(record["boxes"], expected)


def test_phrases_as_captions():
  scenes = dict(type="scenes", size=16, length=3)
  plain = list(build_source(scenes))
  control = scenes | dict(phrases_as_captions=True)
  for own, record in zip(plain, build_source(control), strict=True):
    assert record["captions"] == own["captions"] + own["phrases"]
  # The contrast's captions are drawn from both.
  options = dict(tokenizer=build_tokenizer("words"), batch_size=3, seed=0)
  config = dict(train=[control], ops="decode|canvas(16)|caption(20)")
  with make_loader(config, **options) as loader:
    rows = [row for _ in range(20) for row in next(loader)["caption"].tolist()]
  shown = {*options["tokenizer"].decode(rows)}
  assert {text for own in plain for text in own["phrases"]} <= shown


def test_controls_explain_what_they_lack(tmp_path, write_image):
  write_image(tmp_path / "a.jpg", "red")
  config = dict(path=tmp_path, captions="optional")
  with pytest.raises(InputError, match=r"has no boxes .* labels=dict\(boxes"):
    build_source(config | dict(whole_image_boxes=True))
  with pytest.raises(InputError, match=r"has no boxes .* labels=dict\(boxes"):
    build_source(config | dict(phrases_as_captions=True))
  with pytest.raises(ConfigError, match="shuffled_labels"):
    build_source(config | dict(shuffled_labels=("box",)))
