"""Damaged files of a label set are written again."""

import label_samples
import msgpack
import pytest

from mtv_jax.data.labels import label_writer
from mtv_jax.data.labels.label_sets import LabelSet
from mtv_jax.data.labels.label_writer import Entry, LabelWriter
from mtv_jax.data.sources import block_table


@pytest.fixture
def base(tmp_path):
  return label_samples.open_base(label_samples.make_base(tmp_path))


def open_writer(folder, base):
  return LabelWriter(folder, kind="depth", base=base, settings={})


def make_entries(base):
  return lambda numbers: (
    Entry(base[i]["key"], label_samples.outcome("depth", i)) for i in numbers
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
