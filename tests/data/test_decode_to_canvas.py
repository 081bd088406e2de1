"""Canvases of JPEGs decoded at a reduced scale, compared with full decoding."""

import concurrent.futures
import io
import struct

import cv2
import numpy as np
import pytest
from PIL import Image

from mtv_jax.data import canvas, image_limits
from mtv_jax.data.ops import build_ops
from mtv_jax.data.records import BadRecord
from mtv_jax.data.tokenizers import build_tokenizer

# The documented tolerance, of 255: mean, 99.9th percentile and bias.
TOLERANCE = np.array([3, 40, 0.3])


def encoded(image: np.ndarray | Image.Image, **options) -> bytes:
  buffer = io.BytesIO()
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  image.save(buffer, **{"format": "JPEG", "quality": 90} | options)
  return buffer.getvalue()


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
  """Noise whose spectrum decreases with frequency like a photo's."""
  rng = np.random.default_rng(seed)
  total = np.zeros((height, width, 3), np.float32)
  for level in range(2, 10):
    shape = min(2**level, height), min(2**level, width)
    noise = rng.normal(size=(*shape, 3)).astype(np.float32)
    noise = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    total += noise * 0.6**level
  low, high = np.percentile(total, [1, 99])
  return np.clip(255 * (total - low) / (high - low), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
  return photo(901, 1203)


@pytest.fixture(scope="module")
def data(pixels) -> bytes:
  return encoded(pixels)


def differences(data: bytes, size: int) -> np.ndarray:
  full = canvas.decode(data)
  image, shape = canvas.decode_to_canvas(data, size)
  assert image.shape == (size, size, 3)
  assert image.dtype == np.uint8
  assert shape == full.shape[:2]
  return image - canvas.squash(full, size).astype(int)


def summary(errors: np.ndarray) -> np.ndarray:
  error = np.abs(errors)
  return np.array([error.mean(), np.quantile(error, 0.999), abs(errors.mean())])


@pytest.mark.parametrize(
  ("size", "divisor"), [(96, 8), (112, 8), (113, 4), (224, 4), (300, 2)]
)
def test_reduced_canvas_is_within_the_tolerance(data, size, divisor):
  assert canvas.choose_divisor(901, 1203, size) == divisor
  errors = differences(data, size)
  assert errors.any()
  assert (summary(errors) < TOLERANCE).all(), summary(errors)


@pytest.mark.parametrize("size", [100, 224])
def test_reduced_photos_are_within_the_tolerance(shared_data, size):
  files = sorted((shared_data / "coco" / "val2017").glob("*.jpg"))[:16]
  errors = [differences(f.read_bytes(), size).ravel() for f in files]
  assert sum(e.any() for e in errors) > 8
  found = summary(np.concatenate(errors))
  assert (found < TOLERANCE).all(), found


def test_below_twice_the_canvas_nothing_changes(data):
  assert canvas.choose_divisor(901, 1203, 451) == 1
  assert not differences(data, 451).any()
  assert not differences(data, 1203).any()


def test_other_formats_are_not_reduced(pixels):
  pixels = pixels[:200, :300]
  values = pixels[..., 0].astype(np.uint16) * 200
  for image, format in ((pixels, "PNG"), (pixels, "WEBP"), (values, "PNG")):
    assert not differences(encoded(image, format=format), 64).any()
  cmyk = Image.fromarray(pixels).convert("CMYK")
  assert not differences(encoded(cmyk), 64).any()


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_grey_and_progressive_files(pixels, options):
  grey = encoded(Image.fromarray(pixels).convert("L"), **options)
  image, _ = canvas.decode_to_canvas(grey, 100)
  assert (image == image[..., :1]).all()
  for file in (grey, encoded(pixels, **options)):
    errors = differences(file, 100)
    assert errors.any()
    assert (summary(errors) < TOLERANCE).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(pixels, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  errors = differences(encoded(pixels, exif=exif), 100)
  assert errors.any()
  assert (summary(errors) < TOLERANCE).all(), summary(errors)


@pytest.mark.parametrize(
  "tags", [b"", b"\0\0", b"MM\0*\0\0\0\x08\xff\xff", b"II*\0\xff\xff\xff\xff"]
)
def test_damaged_exif_is_judged_by_full_decoding(data, tags):
  segment = b"Exif\0\0" + tags
  length = (len(segment) + 2).to_bytes(2, "big")
  file = data[:2] + b"\xff\xe1" + length + segment + data[2:]
  errors = differences(file, 100)
  assert (summary(errors) < TOLERANCE).all()


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_partial_last_block_does_not_shift_the_image(orientation):
  # 100 periods across 8 n + 1 pixels; a reduced pixel covers 8.
  x = np.arange(8 * 400 + 1)
  wave = 127 + 100 * np.sin(2 * np.pi * 100 * (x + 0.5) / len(x))
  image = np.broadcast_to(wave[None, :, None], (3210, len(x), 3))
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = encoded(image.astype(np.uint8), exif=exif)
  assert canvas.choose_divisor(3210, len(x), 400) == 8
  # A shift of one pixel of the canvas would be 140.
  assert np.abs(differences(data, 400)).max() < 20


@pytest.mark.parametrize(
  ("height", "width", "divisor"),
  [(128, 128, 8), (128, 131, 4), (131, 131, 4), (130, 140, 8), (65, 65, 2)],
)
def test_reduced_images_of_nearly_the_canvas_are_resized(
  height, width, divisor
):
  """OpenCV copies them if its rounded size equals the reduced image's."""
  y, x = np.mgrid[:height, :width]
  ramps = np.stack([255 * y / height, 255 * x / width, 0 * x], axis=-1)
  data = encoded(ramps.astype(np.uint8), quality=98, subsampling=0)
  assert canvas.choose_divisor(height, width, 16) == divisor
  # The last column would be a quarter of a pixel off, or by 4 of 255.
  assert np.abs(differences(data, 16)).max() < 3


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
  ("kind", "count"), [(3, 1), (3, 2), (3, 0), (4, 1), (4, 2), (9, 1)]
)
def test_orientations_of_other_types_are_judged_by_full_decoding(
  data, order, kind, count
):
  """The standard's is one SHORT (3); OpenCV and Pillow differ on the rest."""
  value = (
    struct.pack(f"{order}HH", 5, 0)
    if kind == 3
    else struct.pack(f"{order}I", 5)
  )
  entry = struct.pack(f"{order}HHI", 0x0112, kind, count) + value
  magic = b"II*\0" if order == "<" else b"MM\0*"
  tiff = magic + struct.pack(f"{order}IH", 8, 1) + entry + bytes(4)
  segment = b"\xff\xe1" + struct.pack(">H", len(tiff) + 8) + b"Exif\0\0" + tiff
  errors = differences(data[:2] + segment + data[2:], 100)
  assert (summary(errors) < TOLERANCE).all(), summary(errors)


def test_the_limits_are_those_of_decode(data, monkeypatch):
  monkeypatch.setattr(canvas.cv2, "imdecode", None)  # never reached
  with pytest.raises(BadRecord, match="1203x901"):
    canvas.decode_to_canvas(data, 20, max_pixels=901 * 1203 - 1)
  monkeypatch.setattr(image_limits, "MAX_BYTES", len(data) - 1)
  with pytest.raises(BadRecord, match="bytes"):
    canvas.decode_to_canvas(data, 20)


def test_threads_do_not_change_the_canvas(data):
  expected, _ = canvas.decode_to_canvas(data, 100)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for image, _ in pool.map(canvas.decode_to_canvas, 16 * [data], 16 * [100]):
      np.testing.assert_array_equal(image, expected)


def test_ops_reduce_unless_they_are_exact(data):
  def row(ops: str) -> dict:
    rng = np.random.default_rng(0)
    built = build_ops(ops, tokenizer=build_tokenizer("bytes"))
    return built({"key": "k", "image": data}, rng)

  reduced, exact, apart = (
    row("decode|canvas(100)"),
    row("decode(exact=True)|canvas(100)"),
    # Not followed by `canvas`, it keeps every pixel.
    row("decode|caption(4)|canvas(100)"),
  )
  for fields in (reduced, exact):
    assert fields["image_size"].tolist() == [901, 1203]
    assert fields["image_size"].dtype == np.int32
  full = canvas.squash(canvas.decode(data), 100)
  np.testing.assert_array_equal(exact["image"], full)
  np.testing.assert_array_equal(apart["image"], full)
  expected, _ = canvas.decode_to_canvas(data, 100)
  np.testing.assert_array_equal(reduced["image"], expected)
  assert (reduced["image"] != full).any()
  rejected = build_ops("decode(max_pixels=1000)|canvas(100)")
  with pytest.raises(BadRecord, match="1203x901"):
    rejected({"key": "k", "image": data}, np.random.default_rng(0))
