"""Labelling a data set: order, groups, bad records, several runs, checks."""

import hashlib
import json
import logging
import random
import threading
import time
import types

import cv2
import numpy as np
import pytest
from labelling_samples import (
  ELSEWHERE,
  ROWS,
  FakeBoxes,
  FakeDepth,
  claim,
  contents,
  free_port,
  launch,
  make_tars,
  open_base,
)

from mtv_jax.cli import errors
from mtv_jax.data import canvas
from mtv_jax.data.labels import label_values
from mtv_jax.data.labels.label_sets import LabelSet, hash_bytes
from mtv_jax.data.labels.label_values import LabelOutcome
from mtv_jax.data.records import BadRecord
from mtv_jax.data.registry import build_source
from mtv_jax.data.sources import array_record
from mtv_jax.data.sources.array_record import ArrayRecordSource
from mtv_jax.data.sources.base import Source
from mtv_jax.experts.base import Expert, PreparedInput
from mtv_jax.experts.labelling import batching
from mtv_jax.experts.labelling import run as labelling
from mtv_jax.experts.labelling.verify import verify
from mtv_jax.parallel.mesh import HostRows


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  return make_tars(tmp_path_factory.mktemp("tars") / "base")


@pytest.fixture(scope="module")
def experts():
  return {"depth": FakeDepth(), "boxes": FakeBoxes()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base, experts):
  folder = tmp_path_factory.mktemp("finished")
  for kind, expert in experts.items():
    labelling.run(expert, open_base(base), folder / kind, threads=3)
  return folder


# --- Labels ------------------------------------------------------------------


def test_labels_match_the_expert(finished, base, experts):
  assert isinstance(experts["depth"], Expert)
  source = open_base(base)
  depth = LabelSet(finished / "depth", kind="depth")
  for number in range(len(source)):
    stored = depth.read(number // 7, number % 7)
    assert stored.key == f"{number // 7:05d}{ROWS[number % 7]:04d}"
    if number in (0, 3, 4):
      assert stored.label is None
      continue
    pixels = canvas.decode(source[number]["image"]) / np.float32(255)
    height, width = pixels.shape[:2]
    ramp = np.linspace(0, 1, height)[:, None] + np.linspace(0, 0.3, width)
    expected = 1 + 2 * np.sin(pixels.mean()) * ramp
    label = label_values.make_depth(expected, side=16).label
    apart = stored.label.values.astype(int) - label.values.astype(int)
    assert abs(apart).max() <= 2
  boxes = LabelSet(finished / "boxes", kind="boxes")
  # Row 3 has only a .json; 2 and 4 a blank .txt; 0 and 6 nothing.
  phrases = [boxes.read(1, at).label.phrases for at in range(7)]
  assert phrases == [
    ("a thing", "tag 1"), (), ("tag 3",), (), ("a thing", "tag 5"), (), (),
  ]  # fmt: skip


def test_bad_records_are_counted_by_reason(finished):
  manifest = json.loads((finished / "depth" / "manifest.json").read_text())
  assert (manifest["records"], manifest["labelled"]) == (21, 18)
  assert manifest["reasons"] == {
    "record: N bytes that start with ... are no image; known: JPEG, PNG, WEBP,"
    " GIF, BMP, TIFF, PPM": 1,
    "record: its image in N.tar has no bytes": 1,
    "record: the image can't be decoded (OSError: image file is truncated)": 1,
  }
  assert [s["labelled"] for s in manifest["shards"]] == [4, 7, 7]


def test_a_record_that_the_expert_rejects(tmp_path):
  make_tars(tmp_path / "base", shards=1, records=9, broken=False)
  summary = labelling.run(
    FakeDepth(), open_base(tmp_path / "base"), tmp_path / "out", threads=2
  )
  assert summary.labelled == 8
  assert summary.reasons == {"record: the number N (...) of (N, N, N)": 1}


def test_a_defect_of_the_expert_stops_and_names_the_record(base, tmp_path):
  class Broken(FakeDepth):
    def prepare(self, image, record):
      return super().prepare(image, record) if image.size else 1 / 0

    def finish(self, outputs, meta):
      raise ArithmeticError("a defect")

  with pytest.raises(ArithmeticError) as error:
    labelling.run(Broken(), open_base(base), tmp_path / "out", threads=2)
  assert "record '00000000" in "".join(error.value.__notes__)
  left = sorted(file.name for file in (tmp_path / "out").iterdir())
  assert left == ["settings.json"]


def test_the_manifest_identifies_the_base(finished, base, tmp_path):
  source, manifest = open_base(base), finished / "depth" / "manifest.json"
  manifest = json.loads(manifest.read_text())
  assert manifest["settings"] == {"of": "the test", "scale": 2.0, "side": 16}
  lines = []
  for number in range(14, 21):
    record = source[number]
    lines.append(f"{record['key']}\0{hash_bytes(record['image'])}\n")
  expected = hashlib.blake2b(
    "".join(lines).encode(), digest_size=16
  ).hexdigest()
  assert manifest["shards"][2]["base_hash"] == expected
  boxes = json.loads((finished / "boxes" / "manifest.json").read_text())
  assert boxes["base_hash"] == manifest["base_hash"]
  # Different images with equal keys.
  make_tars(tmp_path / "base", broken=False)
  labelling.run(
    FakeDepth(), open_base(tmp_path / "base"), tmp_path / "out", threads=2
  )
  other = json.loads((tmp_path / "out" / "manifest.json").read_text())
  same = [
    a["base_hash"] == b["base_hash"]
    for a, b in zip(other["shards"], manifest["shards"], strict=True)
  ]
  assert same == [False, True, True]
  assert other["base_hash"] != manifest["base_hash"]


def test_labels_join_sources_with_and_without_captions(finished, base):
  for captions, count, expected in (
    ("required", 15, 4),
    ("ignored", 21, 18),
    ("optional", 21, 18),
  ):
    source = build_source(
      {
        "type": "webdataset",
        "path": f"{base}/*.tar",
        "captions": captions,
        "labels": {"depth": str(finished / "depth")},
      }
    )
    assert len(source) == count
    labelled = 0
    for number in range(count):
      try:
        labelled += "depth" in source[number]
      except BadRecord:
        # Without image bytes, or with a blank caption.
        continue
    assert labelled == expected


# --- Batches -----------------------------------------------------------------


def prepared(group, size=1):
  return PreparedInput(group, {"x": np.full(size, ord(group[0]), np.uint8)})


def group_batches(groups, rows=3, size=1, **limits):
  grouper = batching.make_grouper(rows, **limits)
  batches = []
  for position, group in enumerate(groups):
    if group != " ":
      batches += grouper.add(position, group, prepared(group, size))
  before = len(batches)
  batches += grouper.flush()
  return [[position for position, _ in batch] for batch in batches], before


def test_records_of_a_group_share_a_batch():
  assert group_batches("aababbca") == ([[0, 1, 3], [2, 4, 5], [6], [7]], 2)


def test_the_oldest_batch_is_released_incomplete():
  # The third record exceeds the limit; its group is not the oldest.
  assert group_batches("abbcc", rows=9, size=10, max_bytes=25) == (
    [[0], [1, 2], [3, 4]],
    2,
  )
  # A single group never exceeds the limit.
  assert group_batches("aaaa", rows=9, size=10, max_bytes=25) == (
    [[0, 1, 2, 3]],
    0,
  )


def test_waiting_is_bounded():
  batches, before = group_batches("abbbbbbbbb", rows=2, max_age=5)
  assert [0] in batches[:before]
  # Unusable records count towards the waiting time.
  batches, before = group_batches("a      b", rows=2, max_age=5)
  assert (batches, before) == ([[0], [7]], 1)


def test_a_batch_is_padded():
  batch = [(4, prepared("a")), (6, prepared("b"))]
  stacked = batching.stack_arrays(batch, 5)["x"]
  assert stacked.tolist() == [[97], [98], [97], [98], [97]]


class Slow:
  """Counts records between reading and writing, with random delays."""

  kind, settings, rows = "depth", {}, 4

  def __init__(self):
    self.pending = self.max_pending = 0
    self.lock = threading.Lock()
    self.shapes = []

  def prepare(self, image, record):
    with self.lock:
      self.pending += 1
      self.max_pending = max(self.max_pending, self.pending)
    number = int(record["key"])
    time.sleep(0.001 * (number * 7 % 5))
    return PreparedInput(number % 3, {"x": np.array(number)}, number)

  def run(self, arrays):
    self.shapes.append(arrays["x"].tolist())
    return {"x": arrays["x"]}

  def finish(self, outputs, meta):
    with self.lock:
      self.pending -= 1
    assert outputs["x"] == meta
    time.sleep(0.001 * (meta * 3 % 4))
    return LabelOutcome(None, {f"{meta}": 1})


class BlackImages(Source):
  shards = np.array([100])

  def __getitem__(self, i):
    if i % 10 == 3:
      raise BadRecord(f"{i}", "x")
    png = cv2.imencode(".png", np.zeros((2, 2, 3), np.uint8))[1].tobytes()
    return {"key": f"{i}", "image": png}


def test_labels_come_in_order():
  base = BlackImages()
  shapes = []
  for threads in (1, 5):
    expert = Slow()
    entries = list(batching.label(expert, base, range(100), threads=threads))
    assert [entry.key for entry in entries] == [f"{i}" for i in range(100)]
    for i, entry in enumerate(entries):
      expected = "record: x" if i % 10 == 3 else f"{i}"
      assert entry.outcome.counts == {expected: 1}
    assert all(len(rows) == 4 for rows in expert.shapes)
    # Records prefetched, in three waiting groups, and on the device.
    assert expert.max_pending <= 4 + 2 * threads + 3 * 3 + 3 * 4
    shapes.append(expert.shapes)
  assert shapes[0] == shapes[1]


# --- Damaged files -----------------------------------------------------------


def test_a_full_disk_is_reported_as_a_message(base, tmp_path, monkeypatch):
  writer = array_record._module().ArrayRecordWriter

  class Full:
    def __init__(self, *args):
      self.inner = writer(*args)

    def write(self, item):
      raise RuntimeError("write() failed: No space left on device")

    def close(self):
      self.inner.close()

  monkeypatch.setattr(
    array_record,
    "_module",
    lambda: types.SimpleNamespace(ArrayRecordWriter=Full),
  )
  out = tmp_path / "out"
  with (
    pytest.raises(SystemExit, match="label: .*00000.array_record can't be wr"),
    errors.readable_errors("label"),
  ):
    labelling.run(FakeDepth(), open_base(base), out, threads=2)
  assert [file.name for file in out.iterdir()] == ["settings.json"]


@pytest.mark.parametrize("text", ["", '{"base": "00001', "[1, 2]", "7"])
def test_a_shard_with_damaged_statistics_is_labelled_again(
  finished, base, experts, tmp_path, text
):
  folder = copy(finished, tmp_path, "depth")
  (folder / "00001_stats.json").write_text(text)
  labelling.run(experts["depth"], open_base(base), folder, threads=2)
  assert contents(folder) == contents(finished / "depth")


def make_array_records(folder, shards):
  png = cv2.imencode(".png", np.arange(432, dtype=np.uint8).reshape(12, 12, 3))
  folder.mkdir()
  for shard in range(shards):
    array_record.write(
      folder / f"{shard:05d}.array_record",
      [
        {"key": f"{shard}.{i}", "image": png[1].tobytes(), "captions": ["a"]}
        for i in range(4)
      ],
    )
  return ArrayRecordSource(f"{folder}/*.array_record")


def test_verify_caches_metadata_of_few_shards(tmp_path):
  source = make_array_records(tmp_path / "base", 12)
  labelling.run(FakeDepth(), source, tmp_path / "out", threads=1)
  report = verify(FakeDepth(), source, tmp_path / "out", count=24, threads=1)
  assert (report.compared, report.different) == (24, {})
  assert 0 < len(source._sidecars) <= 8


def test_threads_are_at_least_one(base, finished, tmp_path):
  with pytest.raises(ValueError, match="threads=0; expected at least 1"):
    labelling.run(FakeDepth(), open_base(base), tmp_path / "out", threads=0)
  assert not (tmp_path / "out").exists()
  with pytest.raises(ValueError, match="threads=-1; expected at least 1"):
    verify(
      FakeDepth(), open_base(base), finished / "depth", count=1, threads=-1
    )


# --- Several runs ------------------------------------------------------------


def test_hosts_begin_with_different_shards(tmp_path):
  base = make_tars(tmp_path / "base", shards=4, records=2, broken=False)
  order = []

  class Observed(FakeDepth):
    def prepare(self, image, record):
      order.append(record["key"][:5])
      if order.count("00001") == 1:
        timer.start()
      return super().prepare(image, record)

  # Another host leases the last shard, and dies while this one waits.
  out = tmp_path / "out"
  out.mkdir()
  claim(out, "00003", ELSEWHERE)
  timer = threading.Timer(0.5, lambda: claim(out, "00003", ELSEWHERE, age=999))
  labelling.run(
    Observed(), open_base(base), out, host=HostRows(1, 2), threads=1
  )
  assert list(dict.fromkeys(order)) == ["00002", "00000", "00001", "00003"]
  alone = tmp_path / "alone"
  labelling.run(FakeDepth(), open_base(base), alone, threads=1)
  assert contents(out) == contents(alone)


def test_waiting_is_logged(tmp_path, caplog):
  base = make_tars(tmp_path / "base", shards=1, records=2, broken=False)
  out = tmp_path / "out"
  out.mkdir()
  file = claim(out, "00000", ELSEWHERE)
  timer = threading.Timer(0.3, file.unlink)
  timer.start()
  with caplog.at_level(logging.INFO, "mtv_jax.experts.labelling.run"):
    labelling.run(FakeDepth(), open_base(base), out, threads=1)
  assert (
    "waiting for 1 shards of other hosts: 00000 (process 1 on there)."
    in caplog.text
  )


def test_a_finished_set_is_not_modified(finished, base, tmp_path, experts):
  before = {
    f.name: f.stat().st_mtime_ns for f in (finished / "boxes").iterdir()
  }
  summary = labelling.run(experts["boxes"], open_base(base), finished / "boxes")
  assert (summary.records, summary.labelled) == (21, 18)
  after = {f.name: f.stat().st_mtime_ns for f in (finished / "boxes").iterdir()}
  del before["manifest.json"], after["manifest.json"]
  assert before == after


def test_other_settings_are_rejected_with_the_difference(
  base, tmp_path, finished
):
  class Stops(FakeDepth):
    def run(self, arrays):
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    labelling.run(Stops(), open_base(base), tmp_path, threads=1)
  for folder, what in (
    (tmp_path, "an unfinished"),
    (finished / "depth", "a fini"),
  ):
    with pytest.raises(FileExistsError, match=f"{what}.*other settings") as e:
      labelling.run(FakeDepth(scale=3.0), open_base(base), folder)
    assert "\n  settings.scale: 2.0 -> 3.0\n" in str(e.value)


@pytest.mark.parametrize(
  "count",
  [
    pytest.param(2, marks=pytest.mark.slow),
    pytest.param(10, marks=pytest.mark.long),
  ],
)
def test_killed_at_random_moments(tmp_path, count):
  """After several SIGKILLs, every file equals an undisturbed run's."""
  base = make_tars(tmp_path / "base", shards=20, records=6)
  labelling.run(FakeDepth(), open_base(base), tmp_path / "whole", threads=2)
  draws, kills = random.Random(0), 0
  out = tmp_path / "out"
  done = []
  for i in range(count):
    process = launch("depth", base, out, delay=0.06)
    assert process.stdout.readline() == "ready\n"
    # One run completes a shard, however slow the machine is.
    while i == count // 2 and process.poll() is None:
      if [*out.glob("*_stats.json")]:
        break
      time.sleep(0.05)
    time.sleep(draws.uniform(0, 0.7))
    kills += process.poll() is None
    process.kill()
    process.communicate()
    done.append(len(list(out.glob("*_stats.json"))))
  # Each run was killed while labelling.
  assert kills == count and 0 < done[-1] < 20
  process = launch("depth", base, out)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 0, errors
  assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["distributed", "by hand"])
def test_two_processes_at_once(tmp_path, how):
  base = make_tars(tmp_path / "base", shards=9, records=5)
  for kind, expert in (("depth", FakeDepth()), ("boxes", FakeBoxes())):
    labelling.run(expert, open_base(base), tmp_path / kind, threads=2)
    port = f"localhost:{free_port()}"
    out = tmp_path / f"{kind} of two"
    running = [
      launch(
        kind, base, out, delay=0.02, devices=1 + i,
        join=[port, str(i)] if how == "distributed" else [],
      )
      for i in range(2)
    ]  # fmt: skip
    for process in running:
      _, errors = process.communicate(timeout=60)
      assert process.returncode == 0, errors
    assert contents(out) == contents(tmp_path / kind)


# --- Verifying ---------------------------------------------------------------


def alter(folder, kind, at, change):
  """Changes a stored label of the second shard."""
  stored = [LabelSet(folder, kind=kind).read(1, i) for i in range(7)]
  labels = [s.label for s in stored]
  labels[at] = change(labels[at])
  array_record.write_bytes(
    folder / "00001.array_record",
    [
      label_values.encode(s.key, label)
      for s, label in zip(stored, labels, strict=True)
    ],
  )


def copy(finished, tmp_path, kind):
  folder = tmp_path / kind
  folder.mkdir()
  for name, data in contents(finished / kind).items():
    (folder / name).write_bytes(data)
  return folder


@pytest.mark.parametrize("kind", ["depth", "boxes"])
def test_unchanged_labels(finished, base, experts, kind):
  report = verify(experts[kind], open_base(base), finished / kind, count=50)
  assert (report.compared, report.labelled) == (21, 18)
  assert not report.different and report.max_difference == 0
  assert "21 records labelled again, 18 with a label: 0 differ" in str(report)
  report = verify(experts[kind], open_base(base), finished / kind, count=5)
  assert report.compared == 5


def test_changed_depth(finished, base, experts, tmp_path):
  folder = copy(finished, tmp_path, "depth")

  def darken(label):
    values = label.values.copy()
    values[3, 4] -= 100
    values[5, 5] -= 28
    return label_values.DepthLabel(values, label.low, label.high)

  alter(folder, "depth", ROWS.index(2), darken)
  report = verify(experts["depth"], open_base(base), folder, count=21)
  assert report.different == {
    "000010002": "the map differs by at most 100, 0.5 on average"
  }
  assert (report.max_difference, report.total_difference) == (100, 128)
  alter(folder, "depth", ROWS.index(2), lambda label: None)
  report = verify(experts["depth"], open_base(base), folder, count=21)
  assert report.different == {"000010002": "no label, now one"}


def test_changed_boxes(finished, base, experts, tmp_path):
  folder = copy(finished, tmp_path, "boxes")

  def fewer(label):
    return label_values.BoxLabel(
      label.boxes[:1], label.phrases[:1], label.scores[:1]
    )

  alter(folder, "boxes", ROWS.index(1), fewer)
  alter(
    folder,
    "boxes",
    ROWS.index(5),
    lambda label: label_values.BoxLabel(
      label.boxes, ("a thing", "another"), label.scores - 0.125
    ),
  )
  report = verify(experts["boxes"], open_base(base), folder, count=21)
  assert report.different == {
    "000010001": "1 boxes, now 2",
    "000010005": "2 boxes: 1 with another phrase, corners up to 0 and scores"
    " up to 0.125 apart",
  }
  assert report.new_boxes == report.boxes + 1


def test_a_set_of_another_expert_is_not_compared(finished, base):
  with pytest.raises(FileExistsError, match=r"settings.scale: 2.0 -> 3.0"):
    verify(FakeDepth(scale=3.0), open_base(base), finished / "depth", count=1)
  with pytest.raises(ValueError, match="0 records to verify"):
    verify(FakeDepth(), open_base(base), finished / "depth", count=0)
