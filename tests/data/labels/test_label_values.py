"""Validation and serialization of label values."""

import ml_dtypes
import msgpack
import numpy as np
import pytest
from label_samples import ramp

from mtv_jax.config.feature_layout import FeatureLayout, field_name
from mtv_jax.data import ops
from mtv_jax.data.labels import label_values
from mtv_jax.data.labels.label_values import (
  UINT16_MAX,
  FeatureLabel,
  Quantized,
  make_boxes,
  make_depth,
  no_label,
)
from mtv_jax.data.records import BadRecord
from mtv_jax.utils.errors import InputError

# --- Depth -------------------------------------------------------------------


def test_depth_without_resizing_is_exact_to_half_a_step():
  inverse = ramp(32, 32)
  outcome = make_depth(inverse, side=32)
  assert outcome.counts == {}
  label = outcome.label
  assert label.values.dtype == np.uint16
  assert (label.values.min(), label.values.max()) == (1, 65535)
  assert (label.low, label.high) == (inverse.min(), inverse.max())
  step = (label.high - label.low) / 65534
  assert abs(label.inverse_depth - inverse).max() <= 0.5 * step + 1e-7
  # Larger is nearer, strictly.
  assert (np.diff(label.values.astype(int), axis=0) > 0).all()


@pytest.mark.parametrize("bits", [2, 10, 13])
def test_depth_of_fewer_bits(bits):
  """Exact to half a step, after 16 bits; unchanged when it is stored."""
  inverse = np.random.default_rng(0).random((32, 32), np.float32)
  inverse[3, 5] = np.nan
  label = make_depth(inverse, side=32, bits=bits).label
  step = (label.high - label.low) / (2**bits - 2)
  error = abs(label.inverse_depth - inverse)
  fine = (label.high - label.low) / 65534
  assert 0.4 * step < np.nanmax(error) <= 0.5 * (step + fine) + 1e-6
  assert label.values[3, 5] == 0 and len(np.unique(label.values)) <= 2**bits
  assert label.values.max() == UINT16_MAX
  assert label.values[label.values > 0].min() == 1
  data = label_values.encode("a", label)
  stored = label_values.decode(data, kind="depth", where="a").label
  np.testing.assert_array_equal(stored.values, label.values)
  assert (stored.low, stored.high, stored.bits) == (label.low, label.high, bits)
  whole = label_values.encode("a", make_depth(inverse, side=32).label)
  assert len(data) < len(whole)


def test_depth_is_averaged_over_labelled_area_only():
  inverse = ramp(64, 64)
  valid = np.ones((64, 64), bool)
  valid[:16] = False
  # Half of the area of a stored pixel, and a little more.
  valid[16:18, 0:2] = [[True, False], [False, True]]
  valid[16:18, 2:4] = [[True, True], [False, True]]
  holes = np.where(valid, inverse, 1e6).astype(np.float32)
  label = make_depth(holes, side=32, valid=valid).label
  assert (label.values[:8] == 0).all()
  assert (label.values[8, 0], label.values[8, 1] > 0) == (0, True)
  whole = inverse.reshape(32, 2, 32, 2).mean((1, 3))
  got, expected = label.inverse_depth[9:], whole[9:]
  assert abs(got - expected).max() <= (label.high - label.low) / 65534
  three = inverse[16:18, 2:4][[0, 0, 1], [0, 1, 1]].mean()
  error = abs(label.inverse_depth[8, 1] - three)
  assert error <= (label.high - label.low) / 65534


def test_depth_shrinks_one_side_and_enlarges_the_other():
  label = make_depth(ramp(100, 10), side=32).label
  assert label.values.shape == (32, 32) and label.values.min() == 1
  assert (np.diff(label.values.astype(int), axis=0) > 0).all()
  assert (np.diff(label.values.astype(int), axis=1) >= 0).all()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_non_finite_depth_has_no_label(wrong):
  inverse = ramp(32, 32)
  inverse[3, 5] = wrong
  outcome = make_depth(inverse, side=32)
  assert list(outcome.counts.values()) == [1]
  assert "NaN or infinite" in next(iter(outcome.counts))
  assert outcome.label.values[3, 5] == 0
  assert (outcome.label.values == 0).sum() == 1
  # Unused pixels are not counted.
  assert make_depth(inverse, side=32, valid=np.isfinite(inverse)).counts == {}


@pytest.mark.parametrize("size", [(32, 32), (57, 91), (20, 20)])
@pytest.mark.parametrize("value", [0.0, 0.3, 7e4])
def test_a_constant_map_has_no_label(size, value):
  outcome = make_depth(np.full(size, value, np.float32), side=32)
  assert outcome == no_label("depth: a map that is the same everywhere")


def test_too_few_pixels_have_no_label():
  inverse = ramp(8, 8)
  valid = np.zeros((8, 8), bool)
  valid[0] = valid[1] = True
  assert make_depth(inverse, side=8, valid=valid).label is not None
  valid[1, 7] = False
  outcome = make_depth(inverse, side=8, valid=valid)
  assert outcome == no_label("depth: a map with fewer than 16 labelled pixels")
  outcome = make_depth(
    inverse, side=8, valid=np.zeros((8, 8), bool), min_valid=1
  )
  assert outcome.label is None


# --- Boxes -------------------------------------------------------------------

GOOD = [0.1, 0.2, 0.5, 0.9]


@pytest.mark.parametrize(
  ("box", "reason"),
  [
    ([np.nan, 0, 1, 1], "boxes: NaN or infinite"),
    ([0, 0, np.inf, 1], "boxes: NaN or infinite"),
    ([0.5, 0.1, 0.2, 0.9], "boxes: inverted"),
    ([0.9, 0.9, 0.1, 0.1], "boxes: inverted"),
    ([0.2, 0.1, 0.2, 0.9], "boxes: empty"),
    ([0.2, 0.1, 0.2 + 1e-7, 0.9], "boxes: empty"),
    ([1.1, 0.1, 1.5, 0.9], "boxes: outside the image"),
    ([-0.5, 0.1, 0.0, 0.9], "boxes: outside the image"),
  ],
)
def test_unusable_boxes_are_dropped_and_counted(box, reason):
  boxes = np.array([GOOD, box], np.float64)
  outcome = make_boxes(boxes, ["a", "b"], np.array([0.5, 0.7]))
  assert outcome.counts == {reason: 1}
  np.testing.assert_allclose(outcome.label.boxes, [GOOD], rtol=1e-6)
  assert outcome.label.phrases == ("a",)
  assert outcome.label.scores.tolist() == [0.5]


def test_boxes_are_clipped_to_the_image():
  boxes = np.array([[-0.5, 0.5, 0.5, 2], [0.1, -1e-5, 0.2, 0.3]])
  outcome = make_boxes(boxes, ["a", "b"])
  np.testing.assert_allclose(
    outcome.label.boxes, [[0, 0.5, 0.5, 1], [0.1, 0, 0.2, 0.3]], rtol=1e-6
  )
  assert outcome.label.scores.tolist() == [1, 1]
  # The second value is only rounding.
  assert outcome.counts == {"boxes: reached outside the image, cut": 1}


def test_phrases_and_scores_of_boxes():
  boxes = np.array([GOOD] * 3)
  outcome = make_boxes(boxes, ["a", " \n", "c"], np.array([1, 1, np.nan]))
  assert outcome.label.phrases == ("a",)
  assert outcome.counts == {
    "boxes: without a phrase": 1,
    "boxes: NaN or infinite": 1,
  }
  none = make_boxes(np.zeros((0, 4)), [])
  assert none.label.boxes.shape == (0, 4) and none.counts == {}
  with pytest.raises(ValueError, match="3 boxes, 2 phrases and 3 scores"):
    make_boxes(boxes, ["a", "b"])


def test_equal_phrases_have_equal_ids():
  of = label_values.phrase_id
  assert (
    of("A traffic light!") == of("a  traffic_light") == of("a traffic light")
  )
  assert len({of(p) for p in ("a", "b", "?!", "!?", "a b", "ab")}) == 6
  assert of("person") == 2264697660  # stable: it is compared across hosts
  assert 0 <= of("é") < 2**32


# --- Serialization -----------------------------------------------------------


def test_boxes_survive_serialization_to_half_a_step():
  rng = np.random.default_rng(0)
  corners = np.sort(rng.random((200, 2, 2)), axis=1).reshape(200, 4)
  phrases = [f"thing {i} ü" for i in range(200)]
  label = make_boxes(corners, phrases, rng.random(200)).label
  stored = label_values.decode(
    label_values.encode("k", label), kind="boxes", where="x"
  )
  assert stored.key == "k"
  assert abs(stored.label.boxes - label.boxes).max() <= 0.5 / 65535 + 1e-7
  assert stored.label.phrases == label.phrases
  np.testing.assert_array_equal(stored.label.scores, label.scores)
  assert stored.label.boxes.dtype == np.float32


def test_depth_survives_serialization():
  label = make_depth(ramp(40, 50), side=24).label
  stored = label_values.decode(
    label_values.encode("ключ", label), kind="depth", where="x"
  )
  assert stored.key == "ключ"
  np.testing.assert_array_equal(stored.label.values, label.values)
  assert (stored.label.low, stored.label.high) == (label.low, label.high)


@pytest.mark.parametrize("kind", label_values.KINDS)
def test_no_label_survives_serialization(kind):
  data = label_values.encode("k", None)
  stored = label_values.decode(data, kind=kind, where="x")
  assert stored == label_values.StoredLabel("k", None)


# --- Features ----------------------------------------------------------------

FORMATS = ["float8", "int8"]


def features(rows=5, width=12):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(rows, width)) * np.geomspace(1e-3, 1e3, rows)[:, None]
  x[:, 0] *= 50  # As the few large channels of DINOv2.
  x[2:3] = 0
  return x.astype(np.float32)


@pytest.mark.parametrize("format", FORMATS)
def test_rounding_of_features(format):
  x = features()
  values = Quantized.of(x, format).values(format)
  largest = np.abs(x).max(1, keepdims=True)
  error = np.abs(values - x)
  if format == "int8":
    assert (error <= largest / 127 / 2 * 1.0001).all()
  else:
    # 3 bits of mantissa, and the smallest number that is not normal.
    assert (error <= np.abs(x) / 16 + largest / 448 / 2**10).all()
  np.testing.assert_array_equal(values[2], 0)
  rows = np.arange(5) != 2
  np.testing.assert_allclose(
    np.abs(values).max(1)[rows], largest[rows, 0], rtol=1e-6
  )


def make_label(format):
  arrays = {
    "pooled": Quantized.of(features(1, 4), format),
    "patches": Quantized.of(features(4, 6), format),
  }
  return FeatureLabel(arrays, format)


@pytest.mark.parametrize("format", FORMATS)
def test_features_survive_serialization(format):
  label = make_label(format)
  data = label_values.encode("k", label)
  stored = label_values.decode(data, kind="features", where="here")
  assert stored.key == "k" and stored.label.format == format
  for name, array in label.arrays.items():
    other = stored.label.arrays[name]
    np.testing.assert_array_equal(other.codes, array.codes)
    np.testing.assert_array_equal(other.scale, array.scale)


NAN = np.full(24, np.nan, ml_dtypes.float8_e4m3fn).tobytes()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"format": "int4"}, "format is 'int4'"),
    ({"patches": b"123"}, "patches"),
    ({"patches/width": 5}, "patches"),
    ({"patches/width": 0}, "patches/width is 0"),
    ({"patches/width": "6"}, "is a str, not int"),
    ({"patches/scale": b"\0" * 8}, "4 rows, 2 scales"),
    ({"patches/scale": b"\xff" * 16}, "not finite"),
    ({"patches": NAN}, "not finite"),
    ({"pooled": 3}, "is a int, not bytes"),
  ],
)
def test_bad_bytes_of_features(changes, message):
  packed = msgpack.unpackb(label_values.encode("k", make_label("float8")))
  data = msgpack.packb({**packed, **changes})
  with pytest.raises(BadRecord, match=message):
    label_values.decode(data, kind="features", where="here")


def test_host_op_of_features():
  layout = FeatureLayout("int8", {"pooled": (1, 4), "patches": (4, 6)})
  built = ops.build_ops(
    "decode|canvas(8)|features",
    batch_fields=["image"],
    features={"a": layout, "b": layout},
  )
  assert built.fields["features_a_patches"] == ops.Field(
    (4, 6), np.dtype(np.uint8)
  )
  assert built.labels == {"features"}
  label = make_label("int8")
  record = dict(
    key="k", image=np.zeros((8, 8, 3), np.uint8), features={"b": label}
  )
  row = built(record, np.random.default_rng(0))
  for name, field in built.fields.items():
    value = np.asarray(row[name])
    assert (value.shape, value.dtype) == (field.shape, field.dtype), name
  assert row["features_b_valid"] and not row["features_a_valid"]
  np.testing.assert_array_equal(
    row["features_b_patches"], label.arrays["patches"].codes
  )
  assert not row["features_a_patches"].any()
  # Omitted if features are not read.
  assert not ops.build_ops("decode|canvas(8)|features", batch_fields=[]).labels

  record["features"] = {"a": make_label("float8")}
  with pytest.raises(InputError, match="'a' in its label set are float8 of"):
    built(record, np.random.default_rng(0))


def test_batch_fields_of_a_layout():
  fields = FeatureLayout("int8", {"layer3": (4, 6)}).fields("dino")
  assert fields == {
    "features_dino_valid": ((), np.bool_),
    "features_dino_layer3": ((4, 6), np.uint8),
    "features_dino_layer3_scale": ((4,), np.float32),
  }
  assert field_name("t", "valid") == "features_t_valid"
