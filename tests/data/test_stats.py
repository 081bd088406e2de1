"""Record counts: logging, checkpointing, and the limit of corrupt records."""

import json
import logging

import pytest

from mtv_jax.data.stats import CorruptDataError, Stats


def test_counts_survive_a_checkpoint():
  stats = Stats(read=10)
  stats.count_bad("tar", "k", "is cut")
  stats.count_dropped("boxes", "no phrase", 3)
  stats.count_texts({"captions": 2, "captions_cut": 1}, ops="", epoch=9)
  saved = json.loads(json.dumps(stats.to_dict()))
  assert Stats.from_dict(saved).to_dict() == stats.to_dict() == saved
  assert saved == {
    "read": 10,
    "corrupt": 1,
    "dropped": {"boxes: no phrase": 3},
    "texts": {"captions": 2, "captions_cut": 1},
  }
  # Written by an earlier version, without texts.
  old = Stats.from_dict({"read": 4, "corrupt": 1})
  assert (old.read, old.corrupt, old.fraction("cut")) == (4, 1, {})
  assert stats.fraction("cut") == {"captions": 0.5}
  assert stats.fraction("unknown") == {"captions": 0.0}


def test_a_snapshot_does_not_change():
  stats = Stats(read=1)
  stats.count_dropped("boxes", "no phrase", 1)
  stats.count_bad("tar", "k", "is cut")
  copy = stats.snapshot()
  stats.count_dropped("boxes", "no phrase", 5)
  stats.read += 1
  assert (copy.read, copy.corrupt, copy.reasons) == (1, 1, {})
  assert copy.dropped == {"boxes: no phrase": 1}


def test_some_bad_records_are_logged_and_a_thousand_kept(caplog):
  stats = Stats(read=2000)
  for i in range(1500):
    stats.count_bad("tar", f"k{i}", "is cut")
  assert stats.corrupt == 1500 and len(stats.reasons) == 1000
  assert stats.reasons["tar/k999"] == "is cut"
  # The first twenty, and then each hundredth.
  assert len(caplog.messages) == 20 + 15
  assert caplog.messages[0] == (
    "Bad record 1 of 2000 read: tar: record 'k0': is cut"
  )
  assert caplog.messages[-1].startswith("Bad record 1500 of 2000")


def test_a_key_that_is_not_unicode_can_be_printed(caplog):
  stats = Stats(read=1)
  stats.count_bad("tar", "k\udcff", "is cut")
  assert list(stats.reasons) == ["tar/k\\udcff"]
  caplog.text.encode()


def test_labels_left_out_are_logged_at_each_power_of_ten(caplog):
  stats = Stats(read=7)
  for count in (1, 5, 3, 1, 80, 9, 1):
    stats.count_dropped("boxes", "no phrase", count)
  assert stats.dropped["boxes: no phrase"] == 100
  assert caplog.messages == [
    f"Labels of boxes: no phrase ({n} in 7 records read)" for n in (1, 10, 100)
  ]


@pytest.mark.parametrize(
  ("cut", "count", "epoch", "warned"),
  [
    (0.5, 1000, 10_000, True),
    (0.5, 999, 10_000, False),  # Too few to tell.
    (0.5, 60, 60, True),  # A whole epoch.
    (0.1, 1000, 10_000, False),
  ],
)
def test_many_cut_texts_are_one_warning(caplog, cut, count, epoch, warned):
  stats = Stats()
  for i in range(count):
    texts = {"captions": 1, "captions_cut": i % 10 < 10 * cut}
    texts["captions_unknown"] = cut > 0.2 and i % 20 == 0
    stats.count_texts(texts, ops="caption(4)", epoch=epoch)
  assert len(caplog.messages) == 2 * warned
  if warned:
    texts = dict.fromkeys(("captions", "captions_cut", "captions_unknown"), 1)
    stats.count_texts(texts, ops="caption(4)", epoch=epoch)
    assert len(caplog.messages) == 2
    assert f"50 % of {count} captions have more tokens" in caplog.text
    assert "model.text.length" in caplog.text
    assert f"5 % of {count} captions have words that" in caplog.text


@pytest.mark.parametrize(
  ("read", "corrupt", "epoch", "fails"),
  [
    (999, 900, 5000, False),  # Too few to tell.
    (1000, 11, 5000, True),
    (1000, 10, 5000, False),  # Exactly the share that is allowed.
    (50, 1, 50, True),  # A whole epoch.
    (0, 0, 0, False),
  ],
)
def test_more_bad_records_than_allowed_end_a_run(
  caplog, read, corrupt, epoch, fails
):
  caplog.set_level(logging.ERROR)
  stats = Stats(read=read)
  for i in range(corrupt):
    stats.count_bad("tar", f"k{i}", "is cut")
  if not fails:
    stats.check_corrupt(0.01, epoch=epoch)
    return
  with pytest.raises(CorruptDataError) as error:
    stats.check_corrupt(0.01, epoch=epoch)
  text = str(error.value)
  assert f"{corrupt} of {read} records read" in text and "1.00%" in text
  assert text.count("is cut") == min(corrupt, 10) and "tar/k0: is cut" in text
