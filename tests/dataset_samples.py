"""Files of data sets in miniature."""

import io
import json
import tarfile

import numpy as np
import PIL.Image


def write_pixels(path, values):
  """An image of an array: uint8 `[h, w, 3]`, or one channel of 8 or 16 bits."""
  path.parent.mkdir(parents=True, exist_ok=True)
  PIL.Image.fromarray(np.asarray(values)).save(path)


def write_json(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content))
  return path


def write_jpeg(write_image, path, colour):
  """A colour's PNG under a name that may end in .jpg or .JPEG."""
  write_image(path.with_suffix(".png"), colour)
  path.with_suffix(".png").rename(path)


def write_tar(path, records):
  """Members of records, as webdataset's ShardWriter names them."""
  path.parent.mkdir(parents=True, exist_ok=True)
  write_members(
    path,
    {
      f"{key}.{suffix}": content
      for key, members in records.items()
      for suffix, content in members.items()
    },
  )


def write_members(path, members, format=None):
  """A tar of names and bytes."""
  with tarfile.open(path, "w", format=format) as tar:
    for name, data in dict(members).items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return path


def image_bytes(colour, kind="webp"):
  out, options = io.BytesIO(), {"lossless": True} if kind == "webp" else {}
  PIL.Image.new("RGB", (8, 8), colour).save(out, kind, **options)
  return out.getvalue()


def write_colours(folder, noise=0):
  """CLIP_benchmark's layout: two colours, `noise` test images mislabelled."""
  for split, count in (("train", 40), ("test", 20)):
    records = {
      f"s{i:04d}": {
        "webp": image_bytes(((255, 0, 0), (0, 0, 255))[i % 2]),
        "cls": str((i + (split == "test" and i < noise)) % 2).encode(),
      }
      for i in range(count)
    }
    write_tar(folder / split / "0.tar", records)
  (folder / "classnames.txt").write_text("red\nblue\n")
  (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n")
