"""TFDS: a small set is prepared, then read without TensorFlow."""

import ast
import collections
import json
import os
import pickle
import struct
import subprocess
import sys

import emulators
import numpy as np
import pytest

from mtv_jax.cli import index
from mtv_jax.data.pipeline import make_loader
from mtv_jax.data.records import BadRecord
from mtv_jax.data.registry import build_source
from mtv_jax.data.sources import array_record
from mtv_jax.data.sources import tfds as tfds_lib
from mtv_jax.data.sources.tfds import TFDSSource
from mtv_jax.evals.datasets import registry as datasets
from mtv_jax.utils import path
from mtv_jax.utils.errors import InputError

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
  return folder


def write_tfrecord(file, examples):
  with open(file, "wb") as stream:
    for data in examples:
      stream.write(struct.pack("<QI", len(data), 0) + data + bytes(4))


def convert(prepared, folder, kind, *, shards, repeat):
  """Writes the training split in `shards` files of another format."""
  old, new = (f / "tiny_captions/1.0.0" for f in (prepared, folder))
  new.mkdir(parents=True)
  info = json.loads((old / "dataset_info.json").read_text())
  split = next(s for s in info["splits"] if s["name"] == "train")
  (file,) = old.glob("*train.array_record-*")
  reader = array_record.open_readers([file]).get(0)
  examples = reader.read(list(range(7))) * repeat
  parts = np.array_split(np.arange(len(examples)), shards)
  for i, part in enumerate(parts):
    write = array_record.write_bytes
    if kind == "tfrecord":
      write = write_tfrecord
    name = f"tiny_captions-train.{kind}-{i:05d}-of-{shards:05d}"
    write(new / name, [examples[k] for k in part])
  split["shardLengths"] = [str(len(part)) for part in parts]
  info |= {"splits": [split], "fileFormat": kind}
  (new / "dataset_info.json").write_text(json.dumps(info))
  for name in ("features.json", "label.labels.txt"):
    (new / name).write_bytes((old / name).read_bytes())


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
    ({"name": "./folder"}, InputError, "is not a TFDS set: .*Expected NAME"),
    ({"split": "trian"}, ValueError, "Did you mean 'train'"),
    ({"split": "train[:abc]"}, InputError, r"train\[:abc\]"),
    ({"split": "train[:0]"}, InputError, "has no records"),
    ({"data_dir": "parquet"}, FileNotFoundError, "is prepared as parquet"),
    ({"data_dir": "nowhere"}, FileNotFoundError, "--file_format=array_record"),
  ],
)
def test_missing_data_sets_splits_and_formats(
  prepared, options, error, message
):
  config = {"type": "tfds", "name": "tiny_captions"} | options
  config["data_dir"] = str(prepared / config.get("data_dir", "array_record"))
  if options.get("data_dir") == "parquet":
    (prepared / "parquet").mkdir()
    convert(
      prepared / "array_record",
      prepared / "parquet",
      "parquet",
      shards=1,
      repeat=1,
    )
  with pytest.raises(error, match=message):
    build_source(config)


def read(source):
  records = []
  for i in range(len(source)):
    try:
      records.append(source[i])
    except ValueError as error:
      records.append(str(error))
  return records


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["array_record", "tfrecord"])
def test_a_bucket(prepared, gs, tmp_path, monkeypatch, kind):
  monkeypatch.setenv(path.CACHE_VARIABLE, str(tmp_path / "cache"))
  convert(
    prepared / "array_record", tmp_path / "local", kind, shards=14, repeat=8
  )
  url = path.as_path(gs) / kind
  path.upload_folder(tmp_path / "local", url)
  config = dict(type="tfds", name="tiny_captions", split="train[:90%]")
  entries = [config | dict(data_dir=f) for f in (tmp_path / "local", str(url))]
  with emulators.count_requests() as requests:
    sources = [build_source(entry) for entry in entries]
    assert sources[0].describe() == sources[1].describe()
  # No shard at the start.
  assert not any(f".{kind}" in p and "media" in p for _, p, _ in requests)
  assert read(sources[0]) == read(pickle.loads(pickle.dumps(sources[1])))
  with pytest.raises(InputError, match="whose metadata replace a table"):
    index.run([f"{url}/tiny_captions/1.0.0/*train.{kind}-*"])

  def load(entry, steps, index=0, count=1):
    data = dict(train=[entry], ops="decode|canvas(8)", shuffle="lanes")
    data |= dict(lanes=4, window=4, max_corrupt=1.0, prefetch=1)
    with make_loader(
      data,
      batch_size=8,
      seed=0,
      start_step=steps[0],
      process_index=index,
      process_count=count,
    ) as loader:
      return [next(loader)["image"] for _ in steps]

  whole = load(entries[0], range(7))  # An epoch.
  for first, count in ((0, 2), (5, 1)):
    with emulators.count_requests() as requests:
      for index_ in range(count):
        cache = str(tmp_path / f"cache_{first}_{count}_{index_}")
        monkeypatch.setenv(path.CACHE_VARIABLE, cache)
        batches = load(entries[1], range(first, 7), index_, count)
        rows = slice(index_ * 8 // count, (index_ + 1) * 8 // count)
        for batch, expected in zip(batches, whole[first:], strict=True):
          np.testing.assert_array_equal(batch, expected[rows])
    copies = [p for _, p, _ in requests if f".{kind}-" in p and "media" in p]
    # Once an epoch, by one host; some are read ahead for the next epoch.
    assert first or len(set(copies)) == 13
    assert max(collections.Counter(copies).values()) <= 2


@pytest.mark.slow
def test_damaged_tfrecords(prepared, tmp_path):
  convert(prepared / "array_record", tmp_path, "tfrecord", shards=1, repeat=1)
  (file,) = tmp_path.rglob("*.tfrecord-*")
  data = file.read_bytes()
  for content in (data[:-1], data[:-20], data + data, b"\xff" * 99):
    file.write_bytes(content)
    source = TFDSSource("tiny_captions", data_dir=tmp_path)
    with pytest.raises(InputError, match="is damaged .* prepared set again"):
      source[0]
  # An example in a whole record; checksums are not compared.
  file.write_bytes(data[:12] + b"\xff" * 16 + data[28:])
  with pytest.raises(BadRecord, match="can't be parsed"):
    TFDSSource("tiny_captions", data_dir=tmp_path)[0]


@pytest.mark.slow
def test_by_name_on_the_command_line(prepared, monkeypatch):
  """`tfds:NAME[:SPLIT]` in TFDS's default folder, for probes and training."""
  import tensorflow_datasets as tfds

  folder = str(prepared / "array_record")
  monkeypatch.setattr(tfds.core.constants, "DATA_DIR", folder)
  data = datasets.open_splits("tfds:tiny_captions")
  sizes = [len(part.images) for part in (data.train, data.test)]
  assert sizes == [6, 1]  # without the images with an empty caption
  assert data.classes == 2
  name = "tfds:tiny_captions:1.0.0:train"
  data = datasets.open_splits(f"{name}[5:]", train=f"{name}[:5]")
  sizes = [len(part.images) for part in (data.train, data.test)]
  assert sizes == [4, 2]
  with pytest.raises(InputError, match="tested on its training images"):
    datasets.open_splits(f"{name}[5:]")
  assert len(build_source({"path": "tfds:tiny_captions"})) == 7
  assert datasets.depth_kind("tfds:nyu_depth_v2") == "nyu"
  for part in ("", ":"):
    with pytest.raises(InputError, match=r"expected tfds:NAME\[:SPLIT\]"):
      datasets.open_classification(f"tfds:{part}")


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
