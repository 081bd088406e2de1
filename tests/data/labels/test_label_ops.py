"""Labels as batch fields: ops, mixtures, counts."""

import logging
import pickle

import numpy as np
import pytest
from label_samples import entry, keyed, ramp

from mtv_jax.data.labels import label_values
from mtv_jax.data.labels.join import join_labels
from mtv_jax.data.labels.label_values import make_depth
from mtv_jax.data.ops import build_ops
from mtv_jax.data.pipeline import make_loader
from mtv_jax.data.records import BadRecord
from mtv_jax.data.scenes.source import SceneSource
from mtv_jax.data.tokenizers import build_tokenizer

# --- Ops ---------------------------------------------------------------------

TOKENIZER = build_tokenizer("bytes")


def apply(text, record, seed=0):
  ops = build_ops(text, tokenizer=TOKENIZER)
  out = ops({"key": "k"} | record, np.random.default_rng(seed))
  for name, field in ops.fields.items():
    assert out[name].shape == field.shape, name
    assert out[name].dtype == field.dtype, name
  return out


def test_depth_op():
  inverse = ramp(32, 32)
  label = make_depth(inverse, side=32).label
  same = apply("depth(32)", {"depth": label.values})
  np.testing.assert_array_equal(same["depth"], label.values)
  raw = apply("depth(32)", {"depth": inverse})
  np.testing.assert_array_equal(raw["depth"], label.values)
  # Resizing the stored label and the floats agree up to rounding.
  small = apply("depth(8)", {"depth": label.values})["depth"].astype(int)
  wanted = make_depth(inverse, side=8).label.values.astype(int)
  assert abs(small - wanted).max() <= 2
  assert (small.min(), small.max()) == (1, 65535)
  for record in ({}, {"depth": None}):
    none = apply("depth(8)", record)
    assert not none["depth"].any() and "dropped" not in none


def test_depth_op_keeps_holes_and_counts():
  label = make_depth(ramp(32, 32), side=32).label.values.copy()
  label[:16, :16] = 0
  small = apply("depth(16)", {"depth": label})["depth"]
  assert (small[:8, :8] == 0).all() and (small[8:] > 0).all()
  wrong = np.full((32, 32), np.nan, np.float32)
  out = apply("depth(16)", {"depth": wrong, "dropped": {"x": 2}})
  assert not out["depth"].any()
  assert out["dropped"] == {
    "x": 2,
    "depth: a map with NaN or infinite pixels, left without label": 1,
    "depth: a map with fewer than 16 labelled pixels": 1,
  }


def boxes_record(n):
  boxes = np.array([[0, 0, 0.5, (i + 1) / (n + 1)] for i in range(n)])
  return {
    "boxes": boxes.astype(np.float32).reshape(-1, 4),
    "phrases": [f"thing {i}" for i in range(n)],
    "box_scores": (np.arange(n) * 37 % n / max(n, 1)).astype(np.float32),
  }


def test_regions_pads_with_zeros():
  record = boxes_record(2)
  out = apply("regions(4, phrase_length=12)", dict(record))
  # The order is random.
  order = [0, 1] if out["boxes"][0, 3] < out["boxes"][1, 3] else [1, 0]
  np.testing.assert_array_equal(out["boxes"][order], record["boxes"])
  assert out["box_valid"].tolist() == [True, True, False, False]
  np.testing.assert_array_equal(
    out["box_phrase"][order], TOKENIZER.encode(["thing 0", "thing 1"], 12)
  )
  assert out["box_phrase_id"][order].tolist() == [
    label_values.phrase_id(f"thing {i}") for i in range(2)
  ]
  np.testing.assert_array_equal(out["box_score"][order], record["box_scores"])
  for name in ("boxes", "box_phrase", "box_phrase_id", "box_score"):
    assert not out[name][2:].any(), name
  none = apply("regions(4)", {})
  assert not any(none[n].any() for n in ("boxes", "box_phrase", "box_valid"))


def test_regions_picks_from_many():
  record = boxes_record(11)

  def pick(seed):
    return tuple(apply("regions(4)", dict(record), seed=seed)["box_phrase_id"])

  first = [pick(seed) for seed in range(200)]
  assert first[:3] == [pick(seed) for seed in range(3)]
  ids = np.array(first)
  assert all(len(set(row)) == 4 for row in first)
  # Every box is as likely: 4 of 11 in 200 draws, five deviations wide.
  for i in range(11):
    share = (ids == label_values.phrase_id(f"thing {i}")).any(1).mean()
    assert abs(share - 4 / 11) < 5 * np.sqrt(4 / 11 * 7 / 11 / 200)
  best = apply("regions(4, pick='score')", dict(record))
  assert best["box_score"].tolist() == sorted(record["box_scores"])[:-5:-1]


@pytest.mark.parametrize("pick", ["random", "score"])
def test_regions_leaves_out_low_scores(pick):
  record = boxes_record(11)
  scores = record["box_scores"]
  limit = sorted(scores)[-3]
  out = apply(f"regions(4, pick='{pick}', min_score={limit})", dict(record))
  assert sorted(out["box_score"]) == [0, *sorted(scores)[-3:]]
  assert out["box_valid"].tolist() == [True] * 3 + [False]
  out = apply(f"regions(4, pick='{pick}', min_score=1.0)", dict(record))
  assert not out["box_valid"].any() and not out["boxes"].any()


def test_ops_after_regions_do_not_depend_on_the_boxes():
  draws = set()
  for n in (0, 1, 9):
    for pick in ("random", "score"):
      rng = np.random.default_rng(3)
      ops = build_ops(f"regions(4, pick='{pick}')", tokenizer=TOKENIZER)
      ops({"key": "k"} | (boxes_record(n) if n else {}), rng)
      draws.add(rng.random())
  assert len(draws) == 1


def test_regions_drops_unusable_boxes():
  record = boxes_record(5)
  record["boxes"][1] = np.nan
  record["boxes"][2] = [0.5, 0.5, 0.2, 0.7]
  record["phrases"][3] = "?!"
  tokenizer = build_tokenizer("bytes", clean="canonicalize")
  ops = build_ops("regions(3)", tokenizer=tokenizer)
  out = ops({"key": "k"} | record, np.random.default_rng(0))
  assert out["box_valid"].tolist() == [True, True, False]
  assert set(out["box_phrase_id"][:2].tolist()) == {
    label_values.phrase_id(f"thing {i}") for i in (0, 4)
  }
  assert out["dropped"] == {
    "boxes: NaN or infinite": 1,
    "boxes: inverted": 1,
    "boxes: a phrase of no tokens": 1,
  }


def test_a_phrase_without_tokens_is_dropped():
  record = boxes_record(6)
  record["phrases"][:4] = ["!", "..", "-", "?"]
  tokenizer = build_tokenizer("bytes", clean="canonicalize")
  ops = build_ops("regions(2)", tokenizer=tokenizer)
  for seed in range(10):
    out = ops({"key": "k", **record}, np.random.default_rng(seed))
    assert out["box_valid"].all()


def test_regions_needs_matching_labels():
  record = boxes_record(3) | {"phrases": ["a"]}
  with pytest.raises(BadRecord, match="'k'.*3 boxes, 1 phrases and 3 scores"):
    apply("regions(4)", record)


# --- In a batch --------------------------------------------------------------

OPS = "decode|canvas(16)|caption(8)|depth(16)|regions(3, phrase_length=10)"


def batches(config, steps, **options):
  options = {"batch_size": 8, "seed": 1, "tokenizer": TOKENIZER} | options
  with make_loader({"ops": OPS, **config}, **options) as loader:
    return [next(loader) for _ in range(steps)], loader.stats


@pytest.mark.slow
def test_workers_and_hosts_read_the_same_labels(labelled, copy):
  config = {"train": [entry(labelled, **keyed(copy))]}
  here, stats = batches(config, 2)
  there, counted = batches(config | {"workers": 1}, 2)
  halves = [
    batches(config, 2, process_index=i, process_count=2)[0] for i in (0, 1)
  ]
  for step, batch in enumerate(here):
    for name, values in batch.items():
      np.testing.assert_array_equal(there[step][name], values)
      both = np.concatenate([half[step][name] for half in halves])
      np.testing.assert_array_equal(both, values)
  assert stats.dropped == counted.dropped and sum(stats.dropped.values()) > 0


def test_unread_ops_and_sets_are_dropped():
  tokenizer = build_tokenizer("bytes")
  text = "decode|canvas(8)|caption(4)|depth(4)|regions(2)"
  wanted = {"image", "image_size", "caption", "caption_valid"}
  ops = build_ops(text, tokenizer=tokenizer, batch_fields=wanted)
  assert set(ops.fields) == wanted and not ops.labels
  assert set(pickle.loads(pickle.dumps(ops)).fields) == wanted
  # Unwanted ops are not built: no tokenizer is needed.
  image_only = build_ops(text, batch_fields={"image", "depth"})
  assert set(image_only.fields) == {"image", "image_size", "depth"}
  source = SceneSource(size=16)
  sets = dict(depth="no/such/folder")
  assert join_labels(source, sets, fields=ops.labels) is source
  with pytest.raises(ValueError, match="kind of labels is 'dept'"):
    join_labels(source, dict(dept="x"), fields=ops.labels)


def test_labelled_and_unlabelled_sources_mix(labelled, tmp_path):
  """Sources with both, one or 0 kinds of labels, and scenes, in one batch."""
  config = {
    "train": [
      entry(labelled, depth=f"{labelled}/depth", boxes=f"{labelled}/boxes"),
      entry(labelled, depth=f"{labelled}/depth"),
      {"type": "webdataset", "path": f"{labelled}/base/*.tar"},
      {"type": "scenes", "size": 16, "length": 20},
    ]
  }
  rows, stats = batches(config, 5)
  assert rows[0]["depth"].shape == (8, 16, 16)
  assert rows[0]["depth"].dtype == np.uint16
  assert rows[0]["boxes"].shape == (8, 3, 4)
  assert rows[0]["box_phrase"].shape == (8, 3, 10)
  assert rows[0]["box_phrase"].dtype == np.int32
  assert rows[0]["box_phrase_id"].dtype == np.uint32
  assert rows[0]["box_valid"].dtype == np.bool_
  all_rows = {k: np.concatenate([r[k] for r in rows]) for k in rows[0]}
  has_depth = (all_rows["depth"] > 0).any((1, 2))
  has_boxes = all_rows["box_valid"].any(1)
  # Each of the four gives ten of the forty rows: an epoch of the tars.
  assert has_depth.sum() == 9 + 9 + 0 + 10
  with_boxes = sum(i % 5 > 0 and i != 3 for i in range(10))
  assert has_boxes.sum() == with_boxes + 10
  invalid = ~all_rows["box_valid"]
  assert not all_rows["boxes"][invalid].any()
  assert not all_rows["box_phrase"][invalid].any()
  assert stats.corrupt == 0 and not stats.dropped
  again, _ = batches(config, 2, start_step=3)
  for name in all_rows:
    np.testing.assert_array_equal(again[0][name], rows[3][name])
    np.testing.assert_array_equal(again[1][name], rows[4][name])


class Wrong(SceneSource):
  """Scenes with labels that can't be used."""

  def __getitem__(self, i):
    record = super().__getitem__(i)
    record["depth"] = np.full((16, 16), 3.0, np.float32)
    record["boxes"] = np.repeat(np.float32([[0.3, 0.1, 0.2, 0.9]]), 2, 0)
    record["phrases"], record["box_scores"] = ["a", "b"], np.ones(2, np.float32)
    return record


def test_drops_are_counted_and_logged(caplog):
  with caplog.at_level(logging.WARNING, "mtv_jax.data.pipeline"):
    rows, stats = batches({}, 7, sources=[Wrong(16, length=20)])
  assert not any(r["depth"].any() or r["box_valid"].any() for r in rows)
  assert stats.dropped == {
    "scenes: boxes: inverted": 112,
    "scenes: depth: a map that is the same everywhere": 56,
  }
  output = [r.getMessage() for r in caplog.records]
  # Warnings are logged at the first, tenth and hundredth drop.
  assert sum("boxes: inverted" in line for line in output) == 3
  assert "Labels of scenes: boxes: inverted (2 in 8 records read)" in output


def test_an_op_without_a_source_of_its_field(labelled):
  with pytest.raises(
    ValueError, match=r"needs the record fields \['boxes', 'phrases'\]"
  ):
    batches({"train": [entry(labelled, depth=f"{labelled}/depth")]}, 1)


def test_labels_of_scenes():
  source = SceneSource(32, length=4)
  scene = source[0]
  out = apply("depth(32)|regions(8)", dict(scene))
  inverse = make_depth(scene["depth"], side=32).label.inverse_depth
  low, high = np.nanmin(inverse), np.nanmax(inverse)
  assert abs(inverse - scene["depth"]).max() <= (high - low) / 65534
  assert (out["depth"] > 0).all()
  assert out["box_valid"].sum() == min(len(scene["boxes"]), 8)
