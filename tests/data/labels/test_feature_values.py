"""Features in 8 bits: rounding, serialization, the host op, bad bytes."""

import ml_dtypes
import msgpack
import numpy as np
import pytest

from mtv_jax.config.feature_layout import FeatureLayout, field_name
from mtv_jax.data import ops
from mtv_jax.data.labels import label_values
from mtv_jax.data.labels.label_values import FeatureLabel, Quantized
from mtv_jax.data.records import BadRecord
from mtv_jax.utils.errors import InputError

FORMATS = ["float8", "int8"]


def features(rows=5, width=12):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(rows, width)) * np.geomspace(1e-3, 1e3, rows)[:, None]
  x[:, 0] *= 50  # As the few large channels of DINOv2.
  x[2:3] = 0
  return x.astype(np.float32)


@pytest.mark.parametrize("format", FORMATS)
def test_rounding(format):
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
def test_serialization(format):
  label = make_label(format)
  data = label_values.encode("k", label)
  stored = label_values.decode(data, kind="features", where="here")
  assert stored.key == "k" and stored.label.format == format
  for name, array in label.arrays.items():
    other = stored.label.arrays[name]
    np.testing.assert_array_equal(other.codes, array.codes)
    np.testing.assert_array_equal(other.scale, array.scale)
  none = label_values.decode(
    label_values.encode("k", None), kind="features", where="here"
  )
  assert none.label is None


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
def test_bad_bytes_are_bad_records(changes, message):
  packed = msgpack.unpackb(label_values.encode("k", make_label("float8")))
  data = msgpack.packb({**packed, **changes})
  with pytest.raises(BadRecord, match=message):
    label_values.decode(data, kind="features", where="here")


def test_host_op():
  layout = FeatureLayout("int8", {"pooled": (1, 4), "patches": (4, 6)})
  built = ops.build_ops(
    "decode|canvas(8)|features",
    wanted=["image"],
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
  assert not ops.build_ops("decode|canvas(8)|features", wanted=[]).labels

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
