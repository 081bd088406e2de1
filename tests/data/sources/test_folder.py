"""Image files as a source: folders, listings, captions that are missing."""

import errno
import json
import os
import pathlib
import pickle

import pytest

from mtv_jax.data.records import BadRecord
from mtv_jax.data.registry import build_source
from mtv_jax.utils.errors import InputError, MissingFileError


@pytest.fixture
def folder(tmp_path, write_image):
  root = tmp_path / "photos"
  for name, colour in (("a", "red"), ("sub/b", "green"), ("c", "blue")):
    write_image(root / f"{name}.png", colour)
  (root / "a.txt").write_text("a red square\n")
  (root / "sub" / "b.json").write_text('{"captions": ["green", " ", "leaf"]}')
  return root


def opened(path, **options):
  return build_source({"type": "folder", "path": str(path), **options})


def captions(source):
  return {
    r["key"]: r["captions"] for r in map(source.__getitem__, range(len(source)))
  }


def test_captions_beside_the_images(folder, caplog):
  source = opened(folder)
  assert captions(source) == {
    "a.png": ["a red square"],
    "sub/b.png": ["green", "leaf"],
  }
  assert "left out 1 images (1 no caption); 2 remain" in caplog.text
  record = source[0]
  assert record["image"] == (folder / "a.png").read_bytes()
  assert pickle.loads(pickle.dumps(source))[1]["key"] == "sub/b.png"
  assert source.read_metadata(1)["file_name"] == "sub/b.png"
  with pytest.raises(IndexError):
    source[2]


def test_a_folder_has_no_folder_of_images(folder):
  for captions in ("required", "ignored"):
    with pytest.raises(InputError, match="leave out `images`"):
      opened(folder, captions=captions, images=str(folder))


def test_images_without_captions(folder):
  optional = opened(folder, captions="optional")
  assert captions(optional) == {
    "a.png": ["a red square"],
    "c.png": [],
    "sub/b.png": ["green", "leaf"],
  }
  (folder / "a.txt").write_bytes(b"\xff\xfe not UTF-8")
  ignored = opened(folder, captions="ignored")
  keys = [ignored[i]["key"] for i in range(3)]
  assert keys == ["a.png", "c.png", "sub/b.png"]
  assert "captions" not in ignored[0] and "captions" not in ignored.fields


def test_listings(folder, tmp_path):
  table = tmp_path / "pairs.csv"
  table.write_text("file,text\na.png,one\nsub/b.png,two\na.png,three\n")
  columns = dict(image_column="file", caption_column="text")
  source = opened(table, images=str(folder), **columns)
  assert captions(source) == {"a.png": ["one", "three"], "sub/b.png": ["two"]}
  coco = tmp_path / "captions.json"
  content = {
    "images": [{"id": 7, "file_name": "c.png"}],
    "annotations": [{"image_id": 7, "caption": "blue"}],
  }
  coco.write_text(json.dumps(content))
  source = opened(coco, images=str(folder))
  assert captions(source) == {"c.png": ["blue"]}
  assert source.read_metadata(0)["image_id"] == 7


def test_what_can_not_be_used(folder, tmp_path):
  table = tmp_path / "pairs.csv"
  table.write_text("image,caption\na.png,one\nmissing.png,two\n")
  with pytest.raises(MissingFileError, match="1 of 2 .*missing.png"):
    opened(table, images=str(folder))
  (tmp_path / "empty").mkdir()
  for captions_ in ("required", "ignored"):
    with pytest.raises(InputError, match="empty (has|lists) no"):
      opened(tmp_path / "empty", captions=captions_)
  with pytest.raises(InputError, match="is in a bucket"):
    opened("gs://bucket/photos")
  with pytest.raises(MissingFileError, match="nowhere"):
    opened(tmp_path / "nowhere")


@pytest.mark.parametrize(
  "code", [errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EIO]
)
def test_an_image_that_can_not_be_opened(folder, monkeypatch, code):
  """As if a file disappears after its size was read."""
  source = opened(folder, captions="ignored")
  read_bytes = pathlib.Path.read_bytes

  def read(path):
    if path.name == "c.png":
      raise OSError(code, os.strerror(code), str(path))
    return read_bytes(path)

  monkeypatch.setattr(pathlib.Path, "read_bytes", read)
  assert source[0]["image"] == (folder / "a.png").read_bytes()
  # A failing disk is not the record's fault.
  error = OSError if code == errno.EIO else BadRecord
  with pytest.raises(error, match=os.strerror(code)) as raised:
    source[1]
  assert isinstance(raised.value, BadRecord) == (code != errno.EIO)
