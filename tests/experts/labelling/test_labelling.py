"""Labelling a data set: order, groups, bad records, several runs, checks."""

import hashlib
import json
import logging
import random
import re
import threading
import time

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

from mtv_jax.data import canvas
from mtv_jax.data.labels import label_values
from mtv_jax.data.labels.label_sets import LabelSet, hash_bytes
from mtv_jax.data.labels.label_values import LabelOutcome
from mtv_jax.data.records import BadRecord
from mtv_jax.data.sources.base import Source
from mtv_jax.experts.base import Expert, PreparedInput
from mtv_jax.experts.labelling import run as labelling


def run(base, out, expert=None, *, threads=2, **options):
  base = open_base(base)
  expert = expert or FakeDepth()
  return labelling.run(expert, base, out, threads=threads, **options)


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
    run(base, folder / kind, expert, threads=3)
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


def test_bad_records_are_counted_by_reason(finished, tmp_path):
  manifest = json.loads((finished / "depth" / "manifest.json").read_text())
  assert (manifest["records"], manifest["labelled"]) == (21, 18)
  assert manifest["reasons"] == {
    "record: N bytes that start with ... are not an image; known: JPEG, PNG,"
    " WEBP, GIF, BMP, TIFF, PPM": 1,
    "record: its image in N.tar has no bytes": 1,
    "record: the image can't be decoded (OSError: image file is truncated)": 1,
  }
  assert [s["labelled"] for s in manifest["shards"]] == [4, 7, 7]
  # The expert rejects the last one.
  base = make_tars(tmp_path / "base", shards=1, records=9, broken=False)
  summary = run(base, tmp_path / "out")
  assert summary.labelled == 8
  assert summary.reasons == {"record: the number N (...) of (N, N, N)": 1}


def test_a_defect_of_the_expert_stops_and_names_the_record(base, tmp_path):
  class Broken(FakeDepth):
    def prepare(self, image, record):
      return super().prepare(image, record) if image.size else 1 / 0

    def finish(self, outputs, meta):
      raise ArithmeticError("a defect")

  with pytest.raises(ArithmeticError) as error:
    run(base, tmp_path / "out", Broken())
  assert re.search(r"record '0000\d000", "".join(error.value.__notes__))
  left = sorted(file.name for file in (tmp_path / "out").iterdir())
  assert left == ["settings.json"]


def test_the_manifest_identifies_the_base(finished, base, tmp_path):
  source, manifest = open_base(base), finished / "depth" / "manifest.json"
  manifest = json.loads(manifest.read_text())
  assert manifest["settings"] == {"of": "the test", "scale": 2.0, "side": 16}
  digest = hashlib.blake2b(digest_size=16)
  for number in range(14, 21):
    record = source[number]
    digest.update(f"{record['key']}\0{hash_bytes(record['image'])}\n".encode())
  assert manifest["shards"][2]["base_hash"] == digest.hexdigest()
  boxes = json.loads((finished / "boxes" / "manifest.json").read_text())
  assert boxes["base_hash"] == manifest["base_hash"]
  # Different images with equal keys.
  run(make_tars(tmp_path / "base", broken=False), tmp_path / "out")
  other = json.loads((tmp_path / "out" / "manifest.json").read_text())
  shards = zip(other["shards"], manifest["shards"], strict=True)
  same = [a["base_hash"] == b["base_hash"] for a, b in shards]
  assert same == [False, True, True]
  assert other["base_hash"] != manifest["base_hash"]


# --- Batches -----------------------------------------------------------------


def prepared(group, size=1):
  return PreparedInput(group, {"x": np.full(size, ord(group[0]), np.uint8)})


def group_batches(groups, rows=3, size=1, **limits):
  grouper = labelling.make_grouper(rows, **limits)
  batches = []
  for position, group in enumerate(groups):
    if group != " ":
      batches += grouper.add(position, group, prepared(group, size))
  before = len(batches)
  batches += grouper.flush()
  return [[position for position, _ in batch] for batch in batches], before


def test_records_of_a_group_share_a_batch():
  assert group_batches("aababbca") == ([[0, 1, 3], [2, 4, 5], [6], [7]], 2)
  limits = dict(rows=9, size=10, max_bytes=25)
  # The third record exceeds the limit; its group is not the oldest.
  assert group_batches("abbcc", **limits) == ([[0], [1, 2], [3, 4]], 2)
  # A single group never exceeds the limit.
  assert group_batches("aaaa", **limits) == ([[0, 1, 2, 3]], 0)
  # Waiting is bounded; unusable records count towards the waiting time.
  batches, before = group_batches("abbbbbbbbb", rows=2, max_age=5)
  assert [0] in batches[:before]
  assert group_batches("a      b", rows=2, max_age=5) == ([[0], [7]], 1)
  batch = [(4, prepared("a")), (6, prepared("b"))]
  stacked = labelling.stack_arrays(batch, 5)["x"]
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
    entries = list(
      labelling.label_records(expert, base, range(100), threads=threads)
    )
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


@pytest.mark.parametrize("text", ["", '{"base": "00001', "[1, 2]", "7"])
def test_a_shard_with_damaged_statistics_is_labelled_again(
  finished, base, experts, tmp_path, text
):
  folder = copy(finished, tmp_path, "depth")
  (folder / "manifest.json").unlink()
  (folder / "00001_stats.json").write_text(text)
  run(base, folder, experts["depth"])
  assert contents(folder) == contents(finished / "depth")


def test_threads_are_at_least_one(base, tmp_path):
  with pytest.raises(ValueError, match="threads=0; expected at least 1"):
    run(base, tmp_path / "out", threads=0)
  assert not (tmp_path / "out").exists()


# --- Several runs ------------------------------------------------------------


def test_a_dead_hosts_part_is_taken_over(tmp_path):
  base = make_tars(tmp_path / "base", shards=4, records=2, broken=False)
  order = []

  class Observed(FakeDepth):
    def prepare(self, image, record):
      order.append(record["key"][:5])
      if len(set(order)) == 3 and not timer.is_alive():
        timer.start()
      return super().prepare(image, record)

  # Another host leases the last shard, and dies while this one waits.
  out = tmp_path / "out"
  out.mkdir()
  claim(out, "00003.0-2.part", ELSEWHERE)
  timer = threading.Timer(
    0.5, lambda: claim(out, "00003.0-2.part", ELSEWHERE, age=999)
  )
  run(base, out, Observed(), threads=1)
  assert sorted(order) == [f"{i:05d}" for i in range(4) for _ in range(2)]
  assert order[-1] == "00003"
  run(base, tmp_path / "alone", threads=1)
  assert contents(out) == contents(tmp_path / "alone")


def test_waiting_is_logged(tmp_path, caplog):
  base = make_tars(tmp_path / "base", shards=1, records=2, broken=False)
  out = tmp_path / "out"
  out.mkdir()
  threading.Timer(0.3, claim(out, "00000.0-2.part", ELSEWHERE).unlink).start()
  with caplog.at_level(logging.INFO, "mtv_jax.utils.leases"):
    run(base, out, threads=1)
  expected = "waiting for 1 parts of other hosts: 00000.0-2.part (process 1 on"
  assert expected in caplog.text


def test_a_finished_set_is_not_modified(finished, base, experts):
  def times():
    files = (finished / "boxes").iterdir()
    return {file.name: file.stat().st_mtime_ns for file in files}

  before = times()
  summary = run(base, finished / "boxes", experts["boxes"])
  assert (summary.records, summary.labelled) == (21, 18)
  assert len(before) > 3 and before == times()


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
  run(base, tmp_path / "whole")
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
@pytest.mark.parametrize(
  ("kind", "distributed"), [("depth", True), ("boxes", False)]
)
def test_two_processes_at_once(tmp_path, base, finished, kind, distributed):
  """Joined by jax.distributed, or started by hand."""
  port, running = f"localhost:{free_port()}", []
  for i in range(2):
    options = dict(join=[port, str(i)]) if distributed else {}
    process = launch(kind, base, tmp_path, delay=0.05, devices=1 + i, **options)
    running.append(process)
  for process in running:
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
  assert contents(tmp_path) == contents(finished / kind)


def copy(finished, tmp_path, kind):
  folder = tmp_path / kind
  folder.mkdir()
  for name, data in contents(finished / kind).items():
    (folder / name).write_bytes(data)
  return folder
