"""Label sets that are written: resumed, damaged, of other settings."""

import json

import msgpack
import pytest
from label_samples import make_base, make_set, open_base, outcome, write_shard
from labelling_samples import contents

from mtv_jax.data.labels import label_writer
from mtv_jax.data.labels.label_sets import LabelCounts, LabelError, LabelSet
from mtv_jax.data.labels.label_values import no_label
from mtv_jax.data.labels.label_writer import Entry, LabelWriter
from mtv_jax.data.registry import build_source
from mtv_jax.data.sources import base as sources_base
from mtv_jax.data.sources import block_table
from mtv_jax.data.sources.webdataset import WebDatasetSource


@pytest.fixture
def base(tmp_path):
  return open_base(make_base(tmp_path))


def open_writer(folder, base):
  return LabelWriter(folder, kind="depth", base=base, settings={})


def make_entries(base):
  return lambda numbers: (
    Entry(base[i]["key"], outcome("depth", i)) for i in numbers
  )


@pytest.mark.parametrize(
  "change", [lambda part: part.pop("blocks"), lambda part: part["keys"].pop()]
)
def test_a_damaged_part(tmp_path, base, change):
  out, entries = tmp_path / "out", make_entries(base)
  writer = open_writer(out, base)
  (part,) = writer.todo()[0]
  writer.write(part, entries(part.numbers))
  file = out / part.name
  content = msgpack.unpackb(file.read_bytes())
  change(content)
  file.write_bytes(msgpack.packb(content))
  label_writer.write_all(writer, entries)
  labels = LabelSet(out, kind="depth")
  keys = [labels.read(0, at).key for at in range(labels.counts[0])]
  assert keys == [base[i]["key"] for i in range(len(keys))]
  assert len(labels.key_hashes(0)) == len(keys)


def test_a_lost_table(tmp_path, base):
  out, entries = tmp_path / "out", make_entries(base)
  label_writer.write_all(open_writer(out, base), entries)
  table = out / block_table.NAME
  content = table.read_bytes()
  table.unlink()
  label_writer.write_all(open_writer(out, base), entries)
  assert table.read_bytes() == content


def test_writing_resumes(labelled, tmp_path, monkeypatch):
  """Parts are lost; the set is byte-identical to one of whole shards."""
  monkeypatch.setattr(sources_base, "LANE_BLOCK", 1)
  base = open_base(labelled / "base")
  whole = make_set(tmp_path / "whole", base, "depth")
  out, settings = tmp_path / "out", {"of": "the test"}
  monkeypatch.setattr(label_writer, "PART_RECORDS", 2)
  writer = LabelWriter(out, kind="depth", base=base, settings=settings)
  todo = writer.todo()
  parts = [part.name for part in todo[0]]
  assert parts == ["00000.0-2.part", "00000.2-4.part"]
  assert [len(todo[shard]) for shard in range(3)] == [2, 2, 1]

  def entries(numbers, stop=None):
    for i in numbers:
      if i == stop:
        raise KeyboardInterrupt
      yield Entry(base[i]["key"], outcome("depth", i))

  write_shard(writer, 1, entries)
  writer.write(todo[0][0], entries(todo[0][0].numbers))
  with pytest.raises(KeyboardInterrupt):
    writer.write(todo[0][1], entries(todo[0][1].numbers, stop=3))
  assert not list(out.glob("*.tmp")) + list(out.glob(".*"))
  assert writer.finish() is None
  with pytest.raises(LabelError, match="4 labels for 2 records"):
    writer.write(todo[2][0], entries(range(4)))
  again = LabelWriter(out, kind="depth", base=base, settings=settings)
  assert again.todo() == {0: todo[0][1:], 2: todo[2]}
  # A damaged or removed part is written again.
  again.write(todo[0][1], entries(todo[0][1].numbers))
  first = out / parts[0]
  for damage in (
    lambda: first.write_bytes(first.read_bytes()[:-9]),
    lambda: first.write_bytes(b""),
    first.unlink,
  ):
    damage()
    again.join(0)
    assert again.todo(0) == {0: todo[0][:1]}
    again.write(todo[0][0], entries(todo[0][0].numbers))
  summary = label_writer.write_all(again, entries)
  assert (summary.records, summary.labelled) == (10, 9)
  assert again.finish() == summary
  assert contents(out) == contents(whole)
  # So is a set's file. A set without one is unfinished.
  (out / "00001.blocks").unlink()
  again = LabelWriter(out, kind="depth", base=base, settings=settings)
  assert list(again.todo()) == [1] and not (out / "manifest.json").exists()
  label_writer.write_all(again, entries)
  assert contents(out) == contents(whole)


@pytest.mark.parametrize("finished", [True, False])
def test_labels_of_other_settings_are_not_mixed(labelled, tmp_path, finished):
  base = open_base(make_base(tmp_path, count=9))
  settings = {"model": {"name": "a", "layers": (1, 2)}, "threshold": 0.1}
  out = tmp_path / "out"
  writer = LabelWriter(out, kind="depth", base=base, settings=settings)
  for shard in range(3 if finished else 1):
    write_shard(
      writer,
      shard,
      lambda numbers: (
        Entry(base[i]["key"], outcome("depth", i)) for i in numbers
      ),
    )
  if finished:
    writer.finish()
    # Earlier versions wrote sets without a settings.json.
    (out / "settings.json").unlink()
  # Tuples are lists in the file, which does not count as a difference.
  LabelWriter(out, kind="depth", base=base, settings=settings)
  other = {"model": {"name": "b", "layers": [1, 2]}, "nms": 0.5}
  state = "a finished" if finished else "an unfinished"
  with pytest.raises(FileExistsError, match=f"{state} label set") as error:
    LabelWriter(out, kind="boxes", base=base, settings=other)
  assert str(error.value).splitlines()[1:-1] == [
    "  kind: 'depth' -> 'boxes'",
    "  settings.model.name: 'a' -> 'b'",
    "  settings.threshold: 0.1 -> absent",
    "  settings.nms: absent -> 0.5",
  ]
  # One shard has an additional record, and one shard is missing.
  more = WebDatasetSource([labelled / f"base/0000{i}.tar" for i in (0, 2)])
  with pytest.raises(FileExistsError) as error:
    LabelWriter(out, kind="depth", base=more, settings=settings)
  assert str(error.value).splitlines()[1:-1] == [
    "  base.00001.tar: 4 -> absent",
    "  base.00002.tar: 1 -> 2",
  ]
  # Equal keys and counts, but different images.
  photos = open_base(make_base(tmp_path / "other", first=100, count=9))
  with pytest.raises(FileExistsError, match="labels of 00000 .* other rec"):
    LabelWriter(out, kind="depth", base=photos, settings=settings)


def test_invalid_folders_kinds_and_sources(labelled, tmp_path):
  base = open_base(labelled / "base")
  scenes = build_source({"type": "scenes", "length": 2})
  (tmp_path / "settings.json").write_text("[]")
  for out, kind, source, error, message in (
    (labelled / "base", "depth", base, ValueError, "the shards themselves"),
    (tmp_path, "deep", base, ValueError, "'deep'. Did you mean 'depth'"),
    (tmp_path, "depth", scenes, ValueError, "SceneSource.* has no files"),
    (tmp_path, "depth", base, FileExistsError, r"can't be read \(a list\)"),
  ):
    with pytest.raises(error, match=message):
      LabelWriter(out, kind=kind, base=source, settings={})


def test_a_set_without_any_label_is_rejected(labelled, tmp_path):
  base = open_base(labelled / "base")
  message = "None of the 10 records has a label: 10 times 'no file'"
  with pytest.raises(LabelError, match=message):
    make_set(tmp_path, base, "depth", of=lambda kind, i: no_label("no file"))
  assert not (tmp_path / "manifest.json").exists()
  # The set is empty, so different settings are not rejected.
  writer = LabelWriter(tmp_path, kind="depth", base=base, settings={"b": 1})
  assert list(writer.todo()) == [0, 1, 2]


def test_order_of_reasons():
  summaries = [LabelCounts(), LabelCounts()]
  for summary, order in zip(summaries, ("cab", "bca"), strict=True):
    for reason in order + "c":
      summary.add(no_label(reason))
  assert list(summaries[0].to_dict()["reasons"]) == ["c", "a", "b"]
  assert json.dumps(summaries[0].to_dict()) == json.dumps(
    summaries[1].to_dict()
  )


def test_no_hash_of_a_base_with_an_unread_image(labelled, tmp_path):
  base = open_base(labelled / "base")
  writer = LabelWriter(tmp_path, kind="depth", base=base, settings={})
  label_writer.write_all(
    writer,
    lambda numbers: (
      Entry(base[i]["key"], outcome("depth", i), None if i == 5 else "")
      for i in numbers
    ),
  )
  manifest = json.loads((tmp_path / "manifest.json").read_text())
  assert "base_hash" not in manifest
  hashed = ["base_hash" in shard for shard in manifest["shards"]]
  assert hashed == [True, False, True]
