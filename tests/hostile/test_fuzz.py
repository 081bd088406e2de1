"""Fuzzing of data readers: each input is used, a named error or a skip.

FUZZ_EXAMPLES=100000 runs more examples than the suite, with new seeds.
"""

import functools
import json
import os
import tempfile
from pathlib import Path

import hypothesis
import msgpack
import numpy as np
from hostile.samples import END, JPEG, header, image_file, member
from hypothesis import strategies as st
from PIL import Image

from mtv_jax.data import canvas, records
from mtv_jax.data.labels import label_values
from mtv_jax.data.labels.label_values import BoxLabel, DepthLabel
from mtv_jax.data.ops import build_ops
from mtv_jax.data.records import BadRecord
from mtv_jax.data.sources import tar_scan
from mtv_jax.data.sources.tar_scan import TarError
from mtv_jax.data.sources.webdataset import parse_captions
from mtv_jax.data.tokenizers import build_tokenizer

_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))


def _fuzz(examples: int):
  """Settings: `examples` of fixed seeds in the suite."""
  return hypothesis.settings(
    max_examples=_EXAMPLES or examples,
    derandomize=not _EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )


@st.composite
def _damaged(draw, data: bytes):
  """The bytes with a few of them replaced, removed, repeated or cut."""
  changed = bytearray(data)
  for _ in range(draw(st.integers(1, 8))):
    at = draw(st.integers(0, len(changed)))
    stop = at + draw(st.integers(0, 8))
    changed[at:stop] = draw(st.binary(max_size=8))
  return bytes(changed[: draw(st.integers(0, len(changed) + 1000))])


_TAR = (
  member(b"a.jpg", JPEG[:600])
  + member(b"a.txt", b"a dog")
  + member(b"pax", b"20 path=../../a.jpg\n16 size=9999999\n", kind=b"x")
  + member(b"long", b"k" * 300, kind=b"L")
  + member(b"b.jpg", b"x")
  + END
)


@st.composite
def _headers(draw):
  """Tars of headers with any sizes, kinds and names, whose checksums hold."""
  blocks = []
  for _ in range(draw(st.integers(1, 5))):
    size = draw(
      st.integers(0, 2000)
      | st.binary(max_size=12)
      | st.sampled_from([b"-1", b"-1000", b"\xff" * 12, b"77777777777"])
    )
    kind = draw(st.sampled_from([b"0", b"\0", b"x", b"L", b"g", b"5", b"S"]))
    data = draw(st.binary(max_size=600) | st.sampled_from(_PAX))
    if draw(st.booleans()):
      size = len(data)
    name = draw(st.binary(max_size=100))
    blocks.append(header(name, size=size, kind=kind))
    blocks.append(data.ljust(-(-len(data) // 512) * 512, b"\0"))
  return b"".join(blocks) + draw(st.sampled_from([b"", END]))


_PAX = [b"12 path=a.j\n", b"11 size=-1\n", b"9 size=5\n", b"0 a=b\n", b"5 a=\n"]


@_fuzz(150)
@hypothesis.given(_damaged(_TAR) | _headers())
def test_tars(data):
  with tempfile.TemporaryDirectory() as folder:
    file = Path(folder, "x.tar")
    file.write_bytes(data)
    try:
      scan = tar_scan.scan(file)
    except TarError as error:
      assert str(file) in str(error)
      return
    for record in scan.records:
      for offset, size in record.spans:
        assert offset >= 0 and size >= 0 and offset + size <= len(data)


def _labels() -> dict[str, bytes]:
  values = np.arange(256, dtype=np.uint16).reshape(16, 16)
  boxes = np.array([[0, 0, 0.5, 1], [0.1, 0.2, 0.3, 0.4]], np.float32)
  box_label = BoxLabel(boxes, ("a", "b c"), np.ones(2, np.float32))
  return {
    "depth": label_values.encode("k", DepthLabel(values, 0.0, 1.0)),
    "boxes": label_values.encode("k", box_label),
  }


# Not drawn in a strategy, since imports may use random numbers.
_LABELS = _labels()


def _nested(scalars, names):
  """Scalars, and lists and dicts of them."""
  return st.recursive(
    st.none() | st.booleans() | st.floats() | scalars,
    lambda inner: (
      st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4)
    ),
    max_leaves=8,
  )


_NUMBERS = st.integers(-(2**63), 2**64 - 1)
_SCALARS = _NUMBERS | st.text(max_size=8) | st.binary(max_size=16)
_ANY = _nested(_SCALARS, st.text(max_size=4))


@st.composite
def _label_bytes(draw, kind: str):
  """A label with damaged bytes, or with values of any type."""
  if draw(st.booleans()):
    return draw(_damaged(_LABELS[kind]))
  packed = msgpack.unpackb(_LABELS[kind])
  for name in draw(st.lists(st.sampled_from(sorted(packed)), max_size=2)):
    packed[name] = draw(_ANY)
  return msgpack.packb(packed)


@_fuzz(150)
@hypothesis.given(st.data(), st.sampled_from(["depth", "boxes"]))
def test_label_values(data, kind):
  try:
    packed = data.draw(_label_bytes(kind))
    stored = label_values.decode(packed, kind=kind, where="x:1")
  except BadRecord as error:
    assert error.key == "x:1"
    return
  assert isinstance(stored.key, str)
  if isinstance(stored.label, BoxLabel):
    label = stored.label
    assert label.boxes.shape == (len(label.phrases), 4)
    label_values.make_boxes(label.boxes, label.phrases, label.scores)
  elif stored.label is not None:
    assert stored.label.values.dtype == np.uint16
    assert np.isfinite([stored.label.low, stored.label.high]).all()


_IMAGES = {
  name: image_file(name, (24, 16))
  for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
}


@_fuzz(300)
@hypothesis.given(st.data(), st.sampled_from(sorted(_IMAGES)))
def test_images(data, format):
  _compare_decoders(data.draw(_damaged(_IMAGES[format])))


def _orientation(value: int) -> bytes:
  exif = Image.Exif()
  exif[0x0112] = value
  return exif.tobytes()


_EXIF = [_orientation(value) for value in (1, 3, 6, 99)]


@_fuzz(300)
@hypothesis.given(
  st.sampled_from(_EXIF).flatmap(_damaged) | st.binary(max_size=80)
)
def test_exif(exif):
  """Both decoders read the EXIF, with separate libraries."""
  segment = b"Exif\0\0" + exif.removeprefix(b"Exif\0\0")
  length = (len(segment) + 2).to_bytes(2, "big")
  jpeg = _IMAGES["JPEG"]
  _compare_decoders(jpeg[:2] + b"\xff\xe1" + length + segment + jpeg[2:])


def _compare_decoders(file: bytes) -> None:
  """Both decoders use a file, or skip it for one reason."""
  outcomes = []
  for decode in (
    lambda: canvas.decode(file, key="k"),
    lambda: canvas.decode_to_canvas(file, 8, key="k"),
  ):
    try:
      outcomes.append(decode())
    except BadRecord as error:
      assert error.key == "k"
      outcomes.append(error.reason)
  image, reduced = outcomes
  if isinstance(image, str) or isinstance(reduced, str):
    assert image == reduced
    return
  assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
  assert canvas.squash(image, 8).shape == reduced[0].shape == (8, 8, 3)
  assert reduced[0].dtype == np.uint8 and reduced[1] == image.shape[:2]


_TEXTS = st.text(st.characters() | st.sampled_from("\ud800\udfff\0\ufeff"))
_JSON = _nested(st.integers() | _TEXTS, _TEXTS)
_SIDECARS = (
  st.binary(max_size=200)
  | _JSON.map(lambda value: json.dumps(value).encode())
  | st.dictionaries(
    st.sampled_from(["caption", "captions", "url", "\ud800"]), _JSON
  ).map(lambda value: json.dumps(value).encode())
)


@functools.cache
def _ops():
  tokenizer = build_tokenizer("bytes", clean="canonicalize")
  return build_ops("decode|canvas(4)|caption(8)", tokenizer=tokenizer)


@_fuzz(300)
@hypothesis.given(st.none() | st.binary(max_size=60), st.none() | _SIDECARS)
def test_captions(text, sidecar):
  try:
    captions = parse_captions("k", text, sidecar)
    record = {"key": "k", "image": JPEG, "captions": captions}
    row = _ops()(record, np.random.default_rng(0))
  except BadRecord as error:
    assert error.key == "k"
    str(error).encode()
    return
  assert all(isinstance(c, str) and c.strip() for c in captions)
  assert row["caption"].shape == (8,)


_RECORD = records.encode({"key": "k", "image": b"abc", "captions": ["a", "b"]})


@_fuzz(150)
@hypothesis.given(_damaged(_RECORD) | st.binary(max_size=80))
def test_encoded_records(data):
  try:
    record = records.decode(data, where="x:1")
  except BadRecord as error:
    assert error.key == "x:1"
    return
  assert records.encode(record) == data
