"""Captions in the official layouts of COCO, Flickr30k and CLIP_benchmark."""

import pytest
from dataset_samples import image_bytes, write_jpeg, write_json, write_tar

from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.retrieval import Retrieval
from mtv_jax.utils.errors import InputError, MissingFileError

COLOURS = ("red", "green", "blue")
COCO_NAME = "COCO_val2014_{:012}.jpg"
CAPTIONS = [["red", "a red one"], ["green"], ["blue"]]


def write_coco(path, name, captions):
  """COCO's form of captions; `name` is a format of the file names."""
  rows = [(i, text) for i, texts in enumerate(captions) for text in texts]
  content = {
    "images": [
      {"id": i, "file_name": name.format(i)} for i in range(len(captions))
    ],
    "annotations": [
      {"id": n, "image_id": i, "caption": text}
      for n, (i, text) in enumerate(rows)
    ],
  }
  write_json(path, content)
  return content


def write_images(folder, name, write_image):
  for i, colour in enumerate(COLOURS):
    write_jpeg(write_image, folder / name.format(i), colour)


def check_captions(data):
  assert data.captions == ("red", "a red one", "green", "blue")
  assert list(data.owner) == [0, 0, 1, 2]
  assert data.images[2][0, 0].tolist() == [0, 0, 255]


def test_images_with_captions_beside_them(tmp_path, write_image, colours):
  write_images(tmp_path, "{}.tif", write_image)
  for i, (text, *_) in enumerate(CAPTIONS):
    (tmp_path / f"{i}.txt").write_text(text)
  data = registry.open_captions(str(tmp_path))
  assert data.captions == COLOURS and data.images[2].shape[2] == 3
  (tmp_path / "0.txt").write_text(" ")
  assert len(registry.open_captions({"path": tmp_path}).captions) == 2


def test_folders_of_shards_and_of_splits(tmp_path, write_image):
  """What `val=FOLDER` reads, and why not."""
  record = {"jpg": image_bytes("blue"), "txt": b"blue"}
  for split, texts in (("train", "xy"), ("val", "v"), ("test", "t")):
    records = {t: record | {"txt": t.encode()} for t in texts}
    write_tar(tmp_path / "tars" / split / "0.tar", records)
    for text in texts:
      path = tmp_path / "files" / split / f"{text}.jpg"
      write_jpeg(write_image, path, "blue")
      path.with_suffix(".txt").write_text(text)
  for name in ("tars", "files", "files/val"):
    assert registry.open_captions(tmp_path / name).captions == ("v",)
  (tmp_path / "files/more").mkdir()
  write_jpeg(write_image, tmp_path / "files/more/z.jpg", "blue")
  (tmp_path / "files/more/z.txt").write_text("z")
  assert len(registry.open_captions(tmp_path / "files").captions) == 5
  with pytest.raises(NotApplicable, match="expected classnames.txt"):
    registry.open_classification(tmp_path / "tars")
  # Named by the user, captions or not.
  assert len(registry.open_classification(tmp_path / "files").classes) == 4
  (tmp_path / "files/more/z.txt").unlink()
  (tmp_path / "files/more/z.jpg").unlink()
  with pytest.raises(NotApplicable, match="splits, not classes"):
    registry.open_classification(tmp_path / "files")
  del record["txt"]
  write_tar(tmp_path / "bare" / "0.tar", {"a": record})
  with pytest.raises(NotApplicable, match="1 without a caption.*Retrieval rea"):
    registry.open_captions(tmp_path / "bare")
  # A flaw is an error.
  (tmp_path / "files/val/v.png").touch()
  with pytest.raises(InputError, match="v.jpg and .*v.png are two files"):
    registry.open_captions(tmp_path / "files/val")


@pytest.mark.parametrize("folder", ["", "annotations"])
def test_coco_test_karpathy_beside_val2014(
  tmp_path, write_image, colours, folder
):
  write_images(tmp_path / "val2014", COCO_NAME, write_image)
  path = tmp_path / folder / "coco_test_karpathy.json"
  write_coco(path, COCO_NAME, CAPTIONS)
  # The folder's other captions are not the published test set.
  other = tmp_path / "annotations" / "captions_val2017.json"
  write_coco(other, "{}.jpg", [["x"]])
  for data in (path, tmp_path):
    check_captions(registry.open_captions(data))
  result = Retrieval(data=str(tmp_path)).run(colours)
  assert result.metrics["text_to_image_r1"] == 1.0


def test_a_plain_coco_folder(tmp_path, write_image):
  write_images(tmp_path / "val2017", "{:012}.jpg", write_image)
  path = tmp_path / "annotations" / "captions_val2017.json"
  write_coco(path, "{:012}.jpg", CAPTIONS)
  got = registry.open_captions(tmp_path)
  assert got.digest == registry.open_captions(path).digest
  path.rename(path.with_name("instances_val2017.json"))
  with pytest.raises(NotApplicable, match="COCO's folder or captions_"):
    registry.open_captions(tmp_path)


def write_karpathy(path, names, splits, **fields):
  rows = [
    {"filename": n, "split": s, "sentences": [{"raw": t} for t in c], **fields}
    for n, s, c in zip(names, splits, CAPTIONS, strict=True)
  ]
  write_json(path, {"images": rows, "dataset": "d"})


def test_karpathy_in_the_folder(tmp_path, write_image):
  write_images(tmp_path / "val2014", COCO_NAME, write_image)
  names = [COCO_NAME.format(i) for i in range(3)]
  path, splits = tmp_path / "dataset_coco.json", ["test", "restval", "test"]
  write_karpathy(path, names, splits, filepath="val2014")
  got = registry.open_captions(tmp_path)
  assert got.captions == ("red", "a red one", "blue")
  assert registry.open_captions(tmp_path, split="restval").split == "restval"
  with pytest.raises(InputError, match=r"'val'.*\['restval', 'test'\]"):
    registry.open_captions(tmp_path, split="val")


@pytest.mark.parametrize("folder", ["flickr30k-images", "flickr30k_images"])
def test_flickr30k_by_karpathy(tmp_path, write_image, folder):
  write_images(tmp_path / folder, "{}.jpg", write_image)
  names, path = (
    [f"{i}.jpg" for i in range(3)],
    tmp_path / "dataset_flickr30k.json",
  )
  write_karpathy(path, names, ["train", "test", "test"])
  # Beside it, the captions of all images.
  (tmp_path / "results.csv").write_text("image_name| comment_number| comment\n")
  for data in (path, tmp_path):
    got = registry.open_captions(data)
    assert (got.captions, got.split) == (("green", "blue"), "test")
    assert got.images[0][0, 0].tolist() == [0, 255, 0]


TOKEN = (
  "0.jpg#0\tRed , it is .\n0.jpg#1\ta | red one\n1.jpg#0\tgreen\n"
  '2.jpg#0\t"blue"\n'
)
KAGGLE = (
  "image_name| comment_number| comment\n"
  "0.jpg| 0| Red , it is .\n0.jpg| 1| a | red one\n"
  "1.jpg| 4   green\n"  # a malformed line, as in the real file
  '2.jpg| 0| "blue"\n'
)
KARPATHY = (
  'image,caption\n0.jpg,"Red , it is ."\n0.jpg,a | red one\n\n'
  '1.jpg,green\n2.jpg,"""blue"""\n'
)
NUMBERED = (
  "image_name,comment_number,comment\n0.jpg,0,Red , it is .\n"
  '0.jpg,1,a | red one\n1.jpg,0,green\n2.jpg,0,"""blue"""\n'
)


@pytest.mark.parametrize(
  "name, text, blue",
  [
    ("results_20130124.token", TOKEN, "blue"),
    ("results.csv", KAGGLE, "blue"),
    ("flickr30k_test_karpathy.txt", KARPATHY, '"blue"'),
    ("results.csv", NUMBERED, '"blue"'),
  ],
)
def test_flickr30k_results(tmp_path, write_image, name, text, blue):
  write_images(tmp_path / "flickr30k-images", "{}.jpg", write_image)
  (tmp_path / name).write_text(text)
  for data in (tmp_path / name, tmp_path):
    got = registry.open_captions(data)
    assert got.captions == ("Red , it is .", "a | red one", "green", blue)
    assert list(got.owner) == [0, 0, 1, 2]
    assert got.split is None
  (tmp_path / name).write_text(text + "not a line\n")
  number = 1 + text.count("\n")
  with pytest.raises(InputError, match=f"line {number}: 'not a line'"):
    registry.open_captions(tmp_path)


def test_missing_images_are_named(tmp_path, write_image):
  (tmp_path / "results.csv").write_text(KAGGLE)
  with pytest.raises(MissingFileError, match="images="):
    registry.open_captions(tmp_path)
  write_images(tmp_path / "elsewhere", "{}.jpg", write_image)
  got = registry.open_captions(tmp_path, images=tmp_path / "elsewhere")
  assert len(got.images) == 3
  (tmp_path / "results.csv").write_text("")
  with pytest.raises(InputError, match="no image has a caption"):
    registry.open_captions(tmp_path, images=tmp_path)


def test_clip_benchmark_retrieval(tmp_path):
  records = {
    f"s{i:07}": {"webp": image_bytes(c), "txt": "\n".join(texts).encode()}
    for i, (c, texts) in enumerate(zip(COLOURS, CAPTIONS, strict=True))
  }
  records["s0000001"]["webp"] = image_bytes((0, 255, 0))
  write_tar(tmp_path / "test" / "0.tar", records)
  # Otherwise they are shards, whose .txt is one caption.
  shards = registry.open_captions(tmp_path)
  assert shards.captions == ("red\na red one", "green", "blue")
  (tmp_path / "dataset_type.txt").write_text("retrieval")
  check_captions(registry.open_captions(tmp_path))
  one = registry.open_captions(tmp_path, max_captions=1)
  assert one.captions == ("red", "green", "blue")
  with pytest.raises(MissingFileError, match="missing .*train"):
    registry.open_captions(tmp_path, split="train")
