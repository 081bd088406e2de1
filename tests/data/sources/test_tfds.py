"""TFDS: a small set is prepared, then read without TensorFlow."""

import ast
import importlib.util
import os
import pickle
import subprocess
import sys

import pytest

from mtv_jax.data.registry import build_source
from mtv_jax.data.sources import tfds as tfds_lib
from mtv_jax.data.sources.tfds import TFDSSource

_PREPARE = """
import io
import sys
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

def png(height, width, value):
  # TFDS stores encoded images as they are, and encodes arrays by TensorFlow.
  file = io.BytesIO()
  pixels = np.full((height, width, 3), value, np.uint8)
  Image.fromarray(pixels).save(file, "PNG")
  file.seek(0)
  return file

class TinyCaptions(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    text = tfds.features.Text()
    features = tfds.features.FeaturesDict({
      "image": tfds.features.Image(encoding_format="png"),
      "mask": tfds.features.Image(encoding_format="png"),
      "captions": tfds.features.Sequence({"id": np.int64, "text": text}),
      "label": tfds.features.ClassLabel(names=["cat", "dog"]),
    })
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, manager):
    return {"train": self._generate(7), "test": self._generate(2)}

  def _generate(self, count):
    for i in range(count):
      yield i, {
        "image": png(8, 9, i),
        "mask": png(8, 9, 1),
        "captions": [{"id": j, "text": f"{i} {j}"} for j in range(i)],
        "label": i % 2,
      }

  _generate_examples = _generate

builder = TinyCaptions(data_dir=sys.argv[1], file_format=sys.argv[2])
builder.download_and_prepare()
"""


def test_missing_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  with pytest.raises(ImportError, match=r"mtv_jax\[tfds\]"):
    TFDSSource("coco_captions")


def run(code, *arguments):
  done = subprocess.run(
    [sys.executable, "-c", code, *arguments],
    capture_output=True,
    text=True,
    timeout=300,
    env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)),
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  pytest.importorskip("tensorflow_datasets")
  folder = tmp_path_factory.mktemp("tfds")
  run(_PREPARE, str(folder / "array_record"), "array_record")
  if importlib.util.find_spec("tensorflow"):
    run(_PREPARE, str(folder / "tfrecord"), "tfrecord")
  return folder


@pytest.mark.slow
def test_records_without_tensorflow(prepared):
  code = """
import pickle, sys
from mtv_jax.data.registry import build_source
source = build_source(dict(
    type="tfds", name="tiny_captions", split="train", data_dir=sys.argv[1]))
records = []
for i in range(len(source)):
  try:
    records.append(source[i])
  except ValueError as error:
    records.append(str(error))
print(repr((records, sorted(source.fields), "tensorflow" in sys.modules)))
"""
  output = run(code, str(prepared / "array_record"))
  records, fields, tensorflow = ast.literal_eval(output)
  assert not tensorflow
  assert fields == ["captions", "image", "key", "label"]
  # One of the seven lacks a caption; the order is TFDS's own.
  bad = [r for r in records if isinstance(r, str)]
  assert len(bad) == 1 and "caption is empty" in bad[0]
  good = {r["captions"][0].split()[0]: r for r in records if r not in bad}
  assert set(good) == set("123456")
  for i, record in good.items():
    assert record["image"].startswith(b"\x89PNG")
    assert record["captions"] == [f"{i} {j}" for j in range(int(i))]
    assert record["label"] == int(i) % 2
  keys = [r["key"] for r in good.values()]
  assert len(set(keys)) == 6


@pytest.mark.slow
def test_parts_of_splits_and_pickling(prepared):
  folder = prepared / "array_record"
  whole = TFDSSource("tiny_captions", split="train", data_dir=folder)
  part = TFDSSource("tiny_captions", split="train[3:]", data_dir=folder)
  assert (len(whole), len(part)) == (7, 4)
  assert part.shards.tolist() == [4]
  assert repr(part) == "TFDSSource(tiny_captions/train[3:], 4 records)"
  again = pickle.loads(pickle.dumps(part))
  for i in range(4):
    try:
      expected = whole[i + 3]
    except ValueError:
      continue
    for source in (part, again):
      assert source[i]["image"] == expected["image"]
      assert source[i]["captions"] == expected["captions"]
  with pytest.raises(IndexError, match="4 records"):
    part[4]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("options", "error", "message"),
  [
    ({"name": "tiny_captons"}, FileNotFoundError, "tfds build tiny_captons"),
    ({"split": "trian"}, ValueError, "Did you mean 'train'"),
    (
      {"data_dir": "tfrecord"},
      FileNotFoundError,
      "not in a format that allows",
    ),
    ({"data_dir": "nowhere"}, FileNotFoundError, "--file_format=array_record"),
  ],
)
def test_missing_data_sets_splits_and_formats(
  prepared, options, error, message
):
  if options.get("data_dir") == "tfrecord":
    pytest.importorskip("tensorflow")  # which writes TFRecord files
  config = {"type": "tfds", "name": "tiny_captions"} | options
  config["data_dir"] = str(prepared / config.get("data_dir", "array_record"))
  with pytest.raises(error, match=message):
    build_source(config)


class _Dict(dict):
  """Stands for FeaturesDict, which also has `items`."""


class _Sequence:
  def __init__(self, feature):
    self.feature = feature


@pytest.mark.parametrize(
  ("features", "expected"),
  [
    ({"captions": _Sequence(_Dict(text=1, id=2))}, ("captions", "text")),
    ({"captions": _Sequence(1)}, ("captions",)),
    ({"caption": 1, "text": 2}, ("caption",)),
    ({"text": 1}, ("text",)),
    ({"objects": _Sequence(_Dict(text=1))}, ()),
    ({"captions": _Sequence(_Dict(raw=1)), "caption": 1}, ("caption",)),
  ],
)
def test_caption_path(features, expected):
  assert tfds_lib.caption_path(features) == expected
