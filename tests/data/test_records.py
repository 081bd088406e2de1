"""The encoding of records in ArrayRecord files."""

import pickle

import numpy as np
import pytest

from mtv_jax.data import records
from mtv_jax.data.records import BadRecord

RECORD = {
  "key": "000000017/ü",
  "image": bytes(range(256)),
  "captions": ["A first one.", "", "Eine zweite – länger\nals die erste."],
}


def test_round_trip():
  assert records.decode(records.encode(RECORD)) == RECORD
  bare = {"key": "", "image": b"", "captions": []}
  assert records.decode(records.encode(bare)) == bare


def test_truncated_and_oversized_bytes_are_bad_records():
  data = records.encode(RECORD)
  for end in range(len(data)):
    with pytest.raises(BadRecord, match="x.array_record:3"):
      records.decode(data[:end], where="x.array_record:3")
  with pytest.raises(BadRecord, match="damaged"):
    records.decode(data + b"\0")


def test_absurd_counts_are_rejected_before_anything_is_read():
  data = bytearray(records.encode(RECORD))
  data[4:8] = b"\xff\xff\xff\xff"
  with pytest.raises(BadRecord, match="4294967295 captions don't fit"):
    records.decode(bytes(data))


def test_other_formats_are_named():
  with pytest.raises(BadRecord, match="type='tfds'"):
    records.decode(b"\n\x0b\n\t\n\x05image")


def test_pixels_are_not_encoded():
  with pytest.raises(TypeError, match="'image' must be the bytes .* ndarray"):
    records.encode({**RECORD, "image": np.zeros((2, 2, 3), np.uint8)})


def test_bad_record_crosses_processes():
  error = pickle.loads(pickle.dumps(BadRecord("a7", "is cut short")))
  assert str(error) == "record 'a7': is cut short"
  assert (error.key, error.reason) == ("a7", "is cut short")
