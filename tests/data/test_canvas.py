"""Decoding compared with Pillow, squashing with NumPy averages."""

import concurrent.futures
import io
import struct

import cv2
import numpy as np
import pytest
from hostile.samples import chunk, ihdr, png
from PIL import Image, ImageOps

from mtv_jax.data import canvas, image_limits
from mtv_jax.data.ops import build_ops
from mtv_jax.data.records import BadRecord
from mtv_jax.data.tokenizers import build_tokenizer
from mtv_jax.utils.resampling import resize_matrix


def encoded(image, format: str = "JPEG", **options) -> bytes:
  """An image file of a Pillow image or an array."""
  buffer = io.BytesIO()
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  image.save(buffer, format, **({"quality": 90} | options))
  return buffer.getvalue()


def pillow(data: bytes) -> np.ndarray:
  with Image.open(io.BytesIO(data)) as image:
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
  error = np.mean((a.astype(np.float64) - b) ** 2)
  return 10 * np.log10(255**2 / error)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
  blocks = np.random.default_rng(0).integers(0, 256, (6, 8, 3))
  return np.kron(blocks, np.ones((8, 8, 1))).astype(np.uint8)


@pytest.fixture(scope="module")
def pil_image(pixels) -> Image.Image:
  return Image.fromarray(pixels)


def test_photos_are_what_pillow_decodes(shared_data):
  files = sorted((shared_data / "coco" / "val2017").glob("*.jpg"))[:60]
  files += sorted((shared_data / "coco" / "train2017").glob("*.jpg"))[:30]
  grey = 0
  for file in files:
    data = file.read_bytes()
    image = canvas.decode(data)
    np.testing.assert_array_equal(image, pillow(data), err_msg=file.name)
    grey += bool((image == image[..., :1]).all())
  assert len(files) == 90
  assert grey < len(files)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_the_pixels(format, pil_image, pixels):
  options = {"lossless": True} if format == "WEBP" else {}
  image = canvas.decode(encoded(pil_image, format, **options))
  np.testing.assert_array_equal(image, pixels)


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_grey_jpeg_has_three_equal_channels(options, pil_image):
  data = encoded(pil_image.convert("L"), "JPEG", quality=95, **options)
  image = canvas.decode(data)
  assert image.shape == (48, 64, 3)
  assert (image == image[..., :1]).all()
  np.testing.assert_array_equal(image, pillow(data))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation(format, orientation, pil_image, pixels):
  exif = Image.Exif()
  exif[0x0112] = orientation
  options = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "PNG": {},
    "WEBP": {"lossless": True},
  }[format]
  data = encoded(pil_image, format, exif=exif, **options)
  image = canvas.decode(data)
  np.testing.assert_array_equal(image, pillow(data))
  # Rotates the pixels in NumPy.
  flat = pixels.swapaxes(0, 1) if orientation > 4 else pixels
  flat = flat[::-1] if orientation in (3, 4, 7, 8) else flat
  flat = flat[:, ::-1] if orientation in (2, 3, 6, 7) else flat
  assert image.shape == flat.shape
  error = np.abs(image.astype(int) - flat).mean()
  assert error < 5 if format == "JPEG" else error == 0


def test_cmyk_as_adobe_writes_it_is_not_inverted(pil_image, pixels):
  data = encoded(pil_image.convert("CMYK"), "JPEG", quality=100)
  assert b"Adobe" in data[:200]
  image = canvas.decode(data)
  assert np.abs(image.astype(int) - pixels).mean() < 3


def test_palette(pil_image):
  paletted = pil_image.convert("P", palette=Image.Palette.ADAPTIVE)
  image = canvas.decode(encoded(paletted, "PNG"))
  np.testing.assert_array_equal(image, np.asarray(paletted.convert("RGB")))
  gif = canvas.decode(encoded(paletted, "GIF"))
  np.testing.assert_array_equal(gif, image)


def test_transparency_lies_on_white(pil_image, pixels):
  alpha = np.full((48, 64), 255, np.uint8)
  alpha[:24], alpha[24:32] = 0, 51
  data = encoded(np.dstack([pixels, alpha]), "PNG")
  image = canvas.decode(data).astype(float)
  assert (image[:24] == 255).all()
  np.testing.assert_array_equal(image[32:], pixels[32:])
  blended = 0.2 * pixels[24:32] + 0.8 * 255
  assert np.abs(image[24:32] - blended).max() <= 1


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_one_transparent_colour_lies_on_white(mode, pil_image):
  image = pil_image.convert(mode)
  corner = image.getpixel((0, 0))
  plain = np.asarray(image.convert("RGB"))
  result = canvas.decode(encoded(image, "PNG", transparency=corner))
  hidden = (np.atleast_3d(np.asarray(image)) == corner).all(-1)
  assert hidden.any()
  assert (result[hidden] == 255).all()
  np.testing.assert_array_equal(result[~hidden], plain[~hidden])


def test_16_bit_grey_is_scaled_not_clipped():
  values = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
  image = canvas.decode(encoded(values, "PNG"))
  expected = np.round(values / 257)
  assert np.abs(image - expected[..., None]).max() <= 0.5
  assert image[0, 0, 0] == 0
  assert image[-1, -1, 0] == 255


def test_pixels_of_unknown_range_are_rejected():
  floats = Image.fromarray(np.ones((4, 4), np.float32))
  with pytest.raises(BadRecord, match=r"'k'.*float"):
    canvas.decode(encoded(floats, "TIFF"), key="k")
  integers = Image.fromarray(np.full((4, 4), 100_000, np.int32))
  with pytest.raises(BadRecord, match="100000"):
    canvas.decode(encoded(integers, "TIFF"))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.99])
def test_truncated_jpeg(share, progressive, pil_image):
  data = encoded(pil_image, "JPEG", quality=95, progressive=progressive)
  with pytest.raises(BadRecord, match="'cut'"):
    canvas.decode(data[: int(len(data) * share)], key="cut")


def test_truncated_jpeg_with_a_thumbnail(pil_image):
  # The thumbnail's end marker must not pass for the image's.
  thumbnail = encoded(pil_image.resize((8, 8)), "JPEG")
  data = encoded(pil_image, "JPEG", quality=95)
  segment = b"\xff\xe1" + struct.pack(">H", 2 + len(thumbnail)) + thumbnail
  whole = data[:2] + segment + data[2:]
  np.testing.assert_array_equal(canvas.decode(whole), canvas.decode(data))
  with pytest.raises(BadRecord):
    canvas.decode(whole[: len(whole) - len(data) // 3])


def test_absurd_sizes_are_rejected_from_the_header(pil_image, monkeypatch):
  jpeg = bytearray(encoded(pil_image, "JPEG"))
  frame = jpeg.index(b"\xff\xc0")
  jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60000, 50000)
  monkeypatch.setattr(canvas.cv2, "imdecode", None)  # never reached
  with pytest.raises(BadRecord, match="50000x60000"):
    canvas.decode(bytes(jpeg))
  for side in (9_200, 12_000, 100_000):
    data = png(ihdr(side, side), chunk(b"IDAT"), chunk(b"IEND"))
    with pytest.raises(BadRecord, match=r"pixels"):
      canvas.decode(data)
  with pytest.raises(BadRecord, match="64x48"):
    canvas.decode(encoded(pil_image, "PNG"), max_pixels=64 * 48 - 1)


def areas(image: np.ndarray, size: int) -> np.ndarray:
  """The mean over the area of each new pixel, one dimension at a time."""

  def weights(length: int) -> np.ndarray:
    edges = np.linspace(0, length, size + 1)
    low = np.maximum(edges[:-1, None], np.arange(length))
    high = np.minimum(edges[1:, None], np.arange(length) + 1)
    return np.maximum(high - low, 0) / (length / size)

  rows, columns = weights(image.shape[0]), weights(image.shape[1])
  return np.einsum("yh,xw,hwc->yxc", rows, columns, image.astype(float))


@pytest.mark.parametrize("shape", [(48, 64), (33, 97), (24, 24), (24, 60)])
def test_squash_averages_areas(shape):
  image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
  expected = areas(image, 24)
  assert np.abs(canvas.squash(image, 24) - expected).max() <= 1


@pytest.mark.parametrize("shape", [(48, 64), (33, 97), (17, 300)])
def test_squash_bilinear_reads_four_pixels(shape):
  image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
  rows, columns = (resize_matrix(n, 24, "bilinear") for n in shape)
  exact = np.einsum("yh,xw,hwc->yxc", rows, columns, image.astype(float))
  got = canvas.squash_bilinear(image, 24)
  # Rounded down, as by `tf.cast`, after float32 arithmetic.
  cut = exact - got
  assert cut.min() > -1e-3 and cut.max() < 1 + 1e-3 and cut.mean() > 0.2


def test_squash_to_the_same_size_returns_the_image(pixels):
  square = np.ascontiguousarray(pixels[:, :48])
  assert canvas.squash(square, 48) is square


@pytest.mark.parametrize("axis", [0, 1])
def test_squash_does_not_alias_where_one_dimension_grows(axis):
  # The finest stripes across the dimension that shrinks become grey.
  stripes = np.zeros((200, 40, 3), np.uint8)
  stripes[::2] = 255
  image = stripes if axis == 0 else stripes.swapaxes(0, 1).copy()
  result = canvas.squash(image, 50).astype(int)
  assert result.shape == (50, 50, 3)
  assert np.abs(result - 127.5).max() < 3


def test_squash_of_photos_is_close_to_pillows_antialiasing(shared_data):
  files = sorted((shared_data / "coco" / "val2017").glob("*.jpg"))[:40]
  values = {"shrinks": [], "mixed": [], "grows": []}
  for file in files:
    image = canvas.decode(file.read_bytes())
    for kind, size in (("shrinks", 200), ("mixed", 500), ("grows", 700)):
      low, high = sorted(image.shape[:2])
      if {
        "shrinks": size <= low,
        "mixed": low < size < high,
        "grows": size >= high,
      }[kind]:
        theirs = Image.fromarray(image).resize((size, size), 2)
        values[kind].append(psnr(canvas.squash(image, size), theirs))
  assert {k: len(v) > 20 for k, v in values.items()} == dict.fromkeys(
    values, True
  )
  assert min(values["shrinks"]) > 29
  assert min(values["mixed"]) > 34
  assert min(values["grows"]) > 40


# --- JPEGs at a reduced scale, compared with full decoding -------------------

# The documented tolerance, of 255: mean, 99.9th percentile and bias.
TOLERANCE = np.array([3, 40, 0.3])


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
  """Noise whose spectrum decreases with frequency like a photo's."""
  rng = np.random.default_rng(seed)
  total = np.zeros((height, width, 3), np.float32)
  for level in range(2, 10):
    shape = min(2**level, height), min(2**level, width)
    wave = rng.normal(size=(*shape, 3)).astype(np.float32)
    wave = cv2.resize(wave, (width, height), interpolation=cv2.INTER_CUBIC)
    total += wave * 0.6**level
  low, high = np.percentile(total, [1, 99])
  return np.clip(255 * (total - low) / (high - low), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
  return photo(901, 1203)


@pytest.fixture(scope="module")
def data(noise) -> bytes:
  return encoded(noise)


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


def test_other_formats_are_not_reduced(noise):
  noise = noise[:200, :300]
  values = noise[..., 0].astype(np.uint16) * 200
  for image, format in ((noise, "PNG"), (noise, "WEBP"), (values, "PNG")):
    assert not differences(encoded(image, format=format), 64).any()
  cmyk = Image.fromarray(noise).convert("CMYK")
  assert not differences(encoded(cmyk), 64).any()


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_grey_and_progressive_files(noise, options):
  grey = encoded(Image.fromarray(noise).convert("L"), **options)
  image, _ = canvas.decode_to_canvas(grey, 100)
  assert (image == image[..., :1]).all()
  for file in (grey, encoded(noise, **options)):
    errors = differences(file, 100)
    assert errors.any()
    assert (summary(errors) < TOLERANCE).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_at_reduced_scale(noise, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  errors = differences(encoded(noise, exif=exif), 100)
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
  # 100 periods across 8 n + 1 noise; a reduced pixel covers 8.
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
  aliased = row("decode|canvas(100, antialias=False)")
  full_bilinear = canvas.squash_bilinear(canvas.decode(data), 100)
  np.testing.assert_array_equal(aliased["image"], full_bilinear)
  expected, _ = canvas.decode_to_canvas(data, 100)
  np.testing.assert_array_equal(reduced["image"], expected)
  assert (reduced["image"] != full).any()
  rejected = build_ops("decode(max_pixels=1000)|canvas(100)")
  with pytest.raises(BadRecord, match="1203x901"):
    rejected({"key": "k", "image": data}, np.random.default_rng(0))
