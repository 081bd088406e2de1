"""Label sets, joined to the records of a source."""

import functools
import json
import logging
import pickle
import tarfile

import numpy as np
import pytest
from dataset_samples import write_members
from label_samples import (
  COUNT,
  entry,
  keyed,
  make_base,
  make_set,
  open_base,
  outcome,
  png,
)

from mtv_jax.data.labels import join, label_sets, label_writer
from mtv_jax.data.labels.label_sets import LabelError, LabelSet
from mtv_jax.data.labels.label_values import no_label
from mtv_jax.data.labels.label_writer import Entry, LabelWriter
from mtv_jax.data.records import BadRecord
from mtv_jax.data.registry import build_source
from mtv_jax.data.sources import array_record, block_table, indexing, webdataset
from mtv_jax.data.sources import base as sources_base
from mtv_jax.data.sources.webdataset import WebDatasetSource
from mtv_jax.utils import atomic
from mtv_jax.utils.errors import InputError


def check_record(record, i):
  assert "dropped" not in record
  if i == 3:
    assert not {"depth", "boxes", "phrases", "box_scores"} & record.keys()
    return
  np.testing.assert_array_equal(
    record["depth"], outcome("depth", i).label.values
  )
  expected = outcome("boxes", i).label
  assert record["boxes"].shape == expected.boxes.shape
  assert abs(record["boxes"] - expected.boxes).max(initial=0) <= 1 / 65535
  assert record["phrases"] == list(expected.phrases)
  assert record["box_scores"].dtype == np.float32


def by_position(base, labels, kinds=("depth", "boxes")):
  """The tars of `base` with the label sets in `labels`."""
  return build_source(entry(base, **{k: f"{labels}/{k}" for k in kinds}))


def depth_of(base, labels):
  return by_position(base, labels, ["depth"])


# --- By position -------------------------------------------------------------


def test_aligned_labels_of_tars(labelled):
  source = by_position(labelled, labelled)
  assert len(source) == COUNT and source.shards.tolist() == [4, 8, 10]
  assert source.name == "00000.tar..00002.tar (3 files)"
  assert source.fields == {
    "key", "image", "captions", "depth", "boxes", "phrases", "box_scores",
  }  # fmt: skip
  assert "with depth, boxes" in repr(source)
  for i in range(COUNT):
    check_record(source[i], i)
  check_record(pickle.loads(pickle.dumps(source))[7], 7)


def test_what_hosts_compare(labelled, tmp_path):
  """Files in their order, record counts, label sets, or the table of blocks."""

  def describe(*shards, **options):
    paths = [f"{labelled}/base/{name}.tar" for name in shards]
    return build_source(
      entry("", **labels) | options | {"path": paths}
    ).describe()

  labels = {k: f"{labelled}/{k}" for k in ("depth", "boxes")}
  names = "00000", "00001"
  described = describe(*names)
  assert describe(*names) == described
  assert json.loads(json.dumps(described)) == described
  assert described["records"] == 8
  assert described["labels"] == {
    k: LabelSet(path, kind=k).digest for k, path in labels.items()
  }
  assert describe(*names, limit=4) == described | {"limit": 4}
  files = [labelled / f"base/{name}.tar" for name in names]
  scan = functools.partial(webdataset.scan, records=4)
  indexing.build(files, scan, per_block=4, folder=tmp_path, processes=1)
  digests = [
    described["digest"],
    describe(*names[::-1])["digest"],
    describe(names[0], "00002")["digest"],
    describe(*names, blocks=f"{tmp_path}/blocks.npz")["digest"],
  ]
  assert len(set(digests)) == 4


def test_some_shards_of_the_base_in_another_order(labelled):
  paths = [f"{labelled}/base/00002.tar", f"{labelled}/base/00000.tar"]
  labels = {k: f"{labelled}/{k}" for k in ("depth", "boxes")}
  source = build_source(entry(labelled, **labels) | {"path": paths})
  for i, number in enumerate([8, 9, 0, 1, 2, 3]):
    record = source[i]
    assert record["key"] == f"{number // 4:05d}{number % 4}"
    check_record(record, number)


def test_labels_of_tars_align_with_array_records(labelled, tmp_path):
  base = make_base(tmp_path, format="array_record")
  config = {"type": "array_record", "path": f"{base}/*.array_record"}
  labels = {k: str(labelled / k) for k in ("depth", "boxes")}
  source = build_source(config | {"labels": labels})
  for i in range(COUNT):
    check_record(source[i], i)


def test_manifest_counts(labelled):
  manifest = json.loads((labelled / "boxes" / "manifest.json").read_text())
  assert manifest["version"] == 2 and manifest["kind"] == "boxes"
  assert manifest["settings"] == {"of": "the test"}
  assert (manifest["records"], manifest["labelled"]) == (10, 9)
  assert manifest["boxes"] == sum(i % 5 for i in range(10) if i != 3)
  assert manifest["reasons"] == {"boxes: none": 1}
  assert [s["base"] for s in manifest["shards"]] == [
    f"0000{i}.tar" for i in range(3)
  ]
  assert [s["records"] for s in manifest["shards"]] == [4, 4, 2]
  assert [s[:2] for s in manifest["shards"][0]["samples"]] == [
    [0, "000000"], [2, "000002"], [3, "000003"],
  ]  # fmt: skip


def remove_captions(tar):
  """The third record of the first tar loses its texts."""
  with tarfile.open(tar) as opened:
    members = [(m.name, opened.extractfile(m).read()) for m in opened]
  dropped = {"000002.json", "000002.txt"}
  write_members(tar, [m for m in members if m[0] not in dropped])


def test_records_without_captions_are_dropped(tmp_path):
  base = make_base(tmp_path)
  remove_captions(base / "00000.tar")
  everything = WebDatasetSource(f"{base}/*.tar", captions="ignored")
  keys = [everything[i]["key"] for i in range(len(everything))]
  make_set(tmp_path / "depth", everything, "depth")
  source = build_source(entry(tmp_path, depth=f"{tmp_path}/depth"))
  assert len(source) == 9
  for i in range(9):
    record = source[i]
    of = keys.index(record["key"])
    if "depth" in record:
      np.testing.assert_array_equal(
        record["depth"], outcome("depth", of).label.values
      )


def two_orders(tmp_path, *, records):
  """Tars by their index and by a table, and the table.

  An index orders records without captions last, a table doesn't.
  """
  base = make_base(tmp_path)
  remove_captions(base / "00000.tar")
  tables = [
    block_table.of_file(
      file,
      (file.stat().st_size, ""),
      webdataset.scan(file, records=records),
      per_block=records,
    )
    for file in sorted(base.glob("*.tar"))
  ]
  table = tmp_path / "blocks.npz"
  block_table.join(tables).write(table)
  orders = [
    WebDatasetSource(f"{base}/*.tar", captions="ignored", blocks=blocks)
    for blocks in (None, table)
  ]
  return orders, table


@pytest.mark.parametrize("in_blocks", [False, True])
def test_labels_of_records_in_another_order(tmp_path, in_blocks):
  orders, table = two_orders(tmp_path, records=2)
  captioned = WebDatasetSource(f"{tmp_path}/base/*.tar", blocks=table)
  orders_of_keys = [[order[i]["key"] for i in range(COUNT)] for order in orders]
  assert orders_of_keys[0] != orders_of_keys[1]
  for n, keys in enumerate(orders_of_keys):
    out = make_set(tmp_path / str(n), orders[n], "depth")
    for source in (orders[1 - n], captioned):
      source = join.join_labels(source, {"depth": str(out)})
      source._labels[0]._is_remote = in_blocks
      for i in range(len(source)):
        record = source[i]
        if (number := keys.index(record["key"])) == 3:
          assert "depth" not in record
        else:
          expected = outcome("depth", number).label.values
          np.testing.assert_array_equal(record["depth"], expected)


def test_parts_of_two_orders(tmp_path, monkeypatch):
  monkeypatch.setattr(sources_base, "LANE_BLOCK", 1)
  monkeypatch.setattr(label_writer, "PART_RECORDS", 1)
  orders, _ = two_orders(tmp_path, records=1)
  for base, parts in zip(orders, (slice(3), slice(3, None)), strict=True):
    writer = LabelWriter(tmp_path / "x", kind="depth", base=base, settings={})
    for part in writer.todo()[0]:
      if part.numbers.start in range(4)[parts]:
        keys = (base[i]["key"] for i in part.numbers)
        writer.write(part, (Entry(key, no_label("none")) for key in keys))
  with pytest.raises(LabelError, match="repeat a record: its table of blocks"):
    writer.join(0)


@pytest.mark.parametrize(
  ("labels", "error", "message"),
  [
    ("x", ValueError, "expected a dict of folders"),
    ({}, ValueError, "expected a dict of folders"),
    ({"dept": "x"}, ValueError, "labels is 'dept'. Did you mean 'depth'"),
    ({"depth": "nowhere"}, FileNotFoundError, "no folder of labels nowhere"),
    ({"depth": "{}/base"}, FileNotFoundError, "no manifest.json: .*unfinished"),
    ({"depth": "{}/boxes"}, LabelError, r"'boxes', not 'depth'.*\(box"),
    ({"depth": {"join": "key"}}, ValueError, "labels.depth.path is missing"),
    ({"depth": {"path": "x", "join": "keys"}}, ValueError, "mean 'key'"),
    ({"depth": {"paht": "x"}}, ValueError, "'paht'. Did you mean 'path'"),
  ],
)
def test_invalid_labels_of_a_config(labelled, labels, error, message):
  labels = json.loads(json.dumps(labels).replace("{}/", f"{labelled}/"))
  with pytest.raises(error, match=message):
    build_source(entry(labelled) | {"labels": labels})


def test_a_source_with_the_same_field(labelled):
  config = {"type": "scenes", "length": 3}
  with pytest.raises(LabelError, match="has depth already"):
    build_source(config | {"labels": {"depth": f"{labelled}/depth"}})


@pytest.mark.parametrize(
  ("count", "message"),
  [
    (9, "labels of 1 records of 00002.tar, which has 2"),
    (8, r"no labels for 1 of 3 shards \(00002\); it has 00000"),
  ],
)
def test_a_set_for_fewer_records_or_shards(labelled, tmp_path, count, message):
  base = open_base(make_base(tmp_path, count=count))
  make_set(tmp_path / "depth", base, "depth")
  with pytest.raises(LabelError, match=message):
    depth_of(labelled, tmp_path)


def test_a_set_for_other_records(labelled, tmp_path):
  make_set(tmp_path / "depth", open_base(labelled / "base"), "depth")
  manifest = tmp_path / "depth" / "manifest.json"
  text = manifest.read_text().replace('"000012"', '"990012"')
  manifest.write_text(text)
  message = "other shards: record 6 .* key '000012', expected '990012'"
  with pytest.raises(LabelError, match=message):
    depth_of(labelled, tmp_path)
  # Other images of the same keys.
  other = tmp_path / "other"
  make_base(other, first=100)
  with pytest.raises(LabelError, match="other images: .* the same key but"):
    depth_of(other, labelled)
  # A join by key compares no images.
  labels = {"path": f"{labelled}/depth", "join": "key"}
  record = build_source(entry(other, depth=labels))[1]
  expected = outcome("depth", 1).label.values
  np.testing.assert_array_equal(record["depth"], expected)


def test_reading_compares_keys(labelled, tmp_path):
  make_set(
    tmp_path / "depth", open_base(labelled / "base"), "depth",
    key=lambda key: {"000011": "other"}.get(key, key),
  )  # fmt: skip
  source = depth_of(labelled, tmp_path)
  source[4]
  message = (
    "label 1 of 00001 is for the record 'other', but record 1 of"
    r" .*00001.tar is '000011'.*join='key'"
  )
  with pytest.raises(LabelError, match=message):
    source[5]


def test_files_that_contradict_the_manifest(labelled, tmp_path):
  out = tmp_path / "depth"
  make_set(out, open_base(labelled / "base"), "depth")
  labels, manifest = out / "00001.blocks", out / "manifest.json"
  data = bytearray(labels.read_bytes())
  data[-1] ^= 1
  labels.write_bytes(data)
  source = depth_of(labelled, tmp_path)
  source[4]
  with pytest.raises(BadRecord, match="label 3 of .* has a wrong checksum"):
    source[7]
  data[12] ^= 1
  labels.write_bytes(data)
  with pytest.raises(BadRecord, match="is not a block of 4 labels"):
    depth_of(labelled, tmp_path)[4]
  content = json.loads(manifest.read_text())
  for change, error, message in (
    (
      lambda: labels.write_bytes(data[:-1]),
      InputError,
      "1 of 3 shards in .* have changed.*00001.blocks",
    ),
    (labels.unlink, FileNotFoundError, "There is no .*00001.blocks"),
    (
      lambda: manifest.write_text(json.dumps(content | {"version": 3})),
      LabelError,
      "version 3, but this code reads 1 to 2",
    ),
    (
      lambda: manifest.write_text("{}"),
      LabelError,
      "not a manifest of a label set",
    ),
  ):
    change()
    with pytest.raises(error, match=message):
      LabelSet(out, kind="depth")


# --- By key ------------------------------------------------------------------


def test_a_join_by_key(labelled, copy, caplog):
  with caplog.at_level(logging.INFO, "mtv_jax.data.labels.join"):
    source = build_source(entry(labelled, **keyed(copy)))
  assert "60.0 % of the records" in caplog.text
  assert "(6 of 10 checked)" in caplog.text
  for i in range(COUNT):
    record = source[i]
    if i in (9, 3, 0, 7, 1, 5):
      check_record(record, i)
    else:
      assert record["dropped"] == {
        f"{kind}: no entry with the key in the label set": 1
        for kind in ("depth", "boxes")
      }
      assert not {"depth", "boxes"} & record.keys()
  pickled = pickle.dumps(source)
  # A worker maps the table again: pickling would copy all of its bytes.
  assert label_sets.hash_key("000003").to_bytes(8, "little") not in pickled
  check_record(pickle.loads(pickled)[7], 7)


def test_the_table_of_keys_is_written_once(labelled, copy):
  build_source(entry(labelled, **keyed(copy)))
  (file,) = (copy / "depth").glob("keys-*.npy")
  before = file.stat().st_mtime_ns
  build_source(entry(labelled, **keyed(copy)))
  assert file.stat().st_mtime_ns == before
  table = np.load(file)
  assert table.shape == (2, 6) and table.dtype == np.uint64
  assert (np.diff(table[0].astype(float)) > 0).all()
  build_source(
    entry(labelled, **keyed(copy, index_dir=str(copy / "elsewhere")))
  )
  assert len(list((copy / "elsewhere").iterdir())) == 2


def test_an_unwritable_table(labelled, copy, monkeypatch):
  def reject(file):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(atomic, "temporary_path", reject)
  with pytest.raises(OSError, match="can't be written.*index_dir"):
    build_source(entry(labelled, **keyed(copy)))


def test_keys_whose_hashes_collide(labelled, copy, monkeypatch):
  monkeypatch.setattr(label_sets, "hash_key", lambda key: 7)
  base = open_base(labelled / "base")
  make_set(copy / "same" / "depth", base, "depth")
  make_set(copy / "same" / "boxes", base, "boxes")
  source = build_source(entry(labelled, **keyed(copy / "same")))
  for i in range(COUNT):
    check_record(source[i], i)


def test_a_set_without_matching_keys(labelled, tmp_path):
  folder = tmp_path / "copy"
  folder.mkdir()
  records = [
    {"key": f"other {i}", "image": png(i), "captions": ["c"]} for i in range(2)
  ]
  array_record.write(folder / "x.array_record", records)
  make_set(tmp_path / "depth", open_base(folder), "depth")
  labels = {"path": str(tmp_path / "depth"), "join": "key"}
  with pytest.raises(
    LabelError, match="No key of .* first keys are '000000' and 'other 0'"
  ):
    build_source(entry(labelled, depth=labels))


def test_missing_or_foreign_key_hashes(labelled, copy):
  file = copy / "depth" / "x-1.keys.npy"
  np.save(file, np.zeros(3, np.uint64))
  with pytest.raises(LabelError, match=r"has shape \(3,\), expected \(1,\)"):
    build_source(entry(labelled, **keyed(copy)))
  file.unlink()
  with pytest.raises(FileNotFoundError, match="no x-1.keys.npy"):
    build_source(entry(labelled, **keyed(copy)))
