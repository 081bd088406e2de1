"""Malformed data sets: each error is explained, without a traceback."""

import pytest
from dataset_samples import write_json

from mtv_jax.evals.core import prompts
from mtv_jax.evals.datasets import registry
from mtv_jax.utils.errors import InputError, UserError

IMAGE = {"id": 1, "file_name": "1.png", "height": 8, "width": 8}
URL = {"id": 1, "coco_url": "1.png"}
CAPTION = {"image_id": 1, "caption": "red"}
BOX = {"image_id": 1, "category_id": 3, "bbox": [1, 1, 4, 4]}
CATEGORY = {"id": 3, "name": "cat"}
KARPATHY = {"split": "test", "filename": "1.png", "sentences": [{"raw": "red"}]}


@pytest.fixture
def write(tmp_path, write_image):
  write_image(tmp_path / "images" / "1.png", "red")
  return lambda name, **content: write_json(tmp_path / name, content)


@pytest.mark.parametrize(
  "content, message",
  [
    ({"annotations": [CAPTION]}, "'images' is missing"),
    ({"images": {"1": IMAGE}, "annotations": [CAPTION]}, "of type dict"),
    ({"images": [1], "annotations": [CAPTION]}, "is of type int"),
    ({"images": [IMAGE], "annotations": [{"caption": "a"}]}, "no 'image_id'"),
    ({"images": [IMAGE], "annotations": {}}, "'annotations' is of type dict"),
    ({"images": [IMAGE], "annotations": [CAPTION, 1]}, "is of type int"),
    (
      {"images": [IMAGE], "annotations": [{**CAPTION, "caption": 1}]},
      "'caption' of .* is 1, of type int",
    ),
    (
      {
        "images": [IMAGE],
        "annotations": [{**CAPTION, "image_id": i} for i in (2, "a")],
      },
      "2 annotated image ids",
    ),
    ({"images": [{**KARPATHY, "sentences": None}]}, "'sentences' of .* None"),
    ({"images": [{**KARPATHY, "sentences": ["red"]}]}, "is of type str"),
    ({"images": [{**KARPATHY, "sentences": [{}]}]}, "no 'raw'"),
    ({"images": [KARPATHY, {**KARPATHY, "split": 1}]}, "'split' of"),
    ({"images": [{"sentences": []}]}, "no 'split'"),
    ({"images": [URL], "annotations": [CAPTION]}, "no 'file_name', only"),
    ({"images": [{**KARPATHY, "filepath": None}]}, None),
    ({"images": [{**KARPATHY, "sentences": []}, KARPATHY]}, None),
    ({"images": [IMAGE], "annotations": []}, "no image has a caption"),
    ({"images": [IMAGE], "annotations": [CAPTION]}, None),
  ],
)
def test_captions(write, content, message):
  path = write("captions_test.json", **content)
  if message is None:
    assert registry.open_captions(path).captions == ("red",)
    return
  with pytest.raises(InputError, match=message):
    registry.open_captions(path)


@pytest.mark.parametrize(
  "box, image, category, message",
  [
    ({"bbox": [1, 1, 4]}, {}, {}, r"bbox \[1, 1, 4\]"),
    ({"bbox": [1, 1, 4, None]}, {}, {}, "bbox .*None"),
    ({"bbox": [1, 1, 4, float("nan")]}, {}, {}, "bbox .*nan"),
    ({"bbox": "1 1 4 4"}, {}, {}, "'bbox' of .* of type str"),
    ({"category_id": 4}, {}, {}, "category_id 4"),
    ({"image_id": 9}, {}, {}, "such as 9"),
    ({}, {"height": 0}, {}, r"sides of \[0, 8\]"),
    ({}, {"height": ...}, {}, "has no 'height'"),
    ({}, {"width": "8"}, {}, "'width' of .* of type str"),
    ({}, {}, {"name": None}, "'name' of .* None"),
    ({}, {}, {}, None),
  ],
)
def test_boxes(write, box, image, category, message):
  path = write(
    "instances_test.json",
    images=[{k: v for k, v in (IMAGE | image).items() if v is not ...}],
    annotations=[BOX | box],
    categories=[CATEGORY | category],
  )
  if message is None:
    assert registry.open_boxes(path).phrases == (("cat",),)
    return
  with pytest.raises(InputError, match=message):
    registry.open_boxes(path)


LATIN = "café".encode("latin-1")


def test_texts_that_are_not_utf8(tmp_path):
  for name in ("results.csv", "prompts.json", "names.txt"):
    (tmp_path / name).write_bytes(b"image,caption\n1.jpg," + LATIN)
  with pytest.raises(InputError, match="results.csv is not UTF-8"):
    registry.open_captions(tmp_path / "results.csv")
  with pytest.raises(InputError, match="prompts.json is not JSON"):
    prompts.read_prompts(tmp_path / "prompts.json")
  with pytest.raises(InputError, match="names.txt is not UTF-8"):
    prompts.read_prompts(tmp_path / "names.txt")


OPENERS = {
  "classification": registry.open_classification,
  "splits": registry.open_splits,
  "captions": registry.open_captions,
  "boxes": registry.open_boxes,
  "videos": registry.open_videos,
  "segmentation": lambda data: registry.open_segmentation(data, split="test"),
  "depth": lambda data: registry.open_depth(data, split="test", size=8),
  "posed": lambda data: registry.open_posed(data, subset="wild_set", count=2),
  "key points": lambda data: registry.open_key_points(
    data, split="test", count=2
  ),
}


@pytest.mark.parametrize("kind", ["classification", "captions"])
def test_empty_paths_are_not_the_working_directory(kind):
  with pytest.raises(InputError, match="data is empty"):
    OPENERS[kind]("")


SKELETONS = (
  "", "images", "images/a", "mappings", "test", "test/a", "train/a", "val/a",
  "annotations", "ILSVRC2012_devkit_t12/data", "JPEGImages/480p/a",
  "Annotations/480p/a", "objectnet-1.0/mappings", "PairAnnotation/test",
  "images/training", "annotations/training", "nyu_images", "DAVIS",
  "training/image_2", "a/wild_set", "seq-01",
)  # fmt: skip


@pytest.mark.parametrize("kind", OPENERS)
def test_empty_folders(tmp_path, kind):
  for i, folders in enumerate([*zip(SKELETONS), SKELETONS]):
    for folder in folders:
      (tmp_path / str(i) / folder).mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError):
      OPENERS[kind](tmp_path / str(i))


@pytest.mark.parametrize("text", ["", "a.jpg\n", "1\n2.5\n", "café\n"])
def test_nyu_lists_of_no_numbers(tmp_path, write_image, text):
  for folder in ("nyu_images", "nyu_labels40"):
    write_image(tmp_path / folder / "1.png", "red")
  write_image(tmp_path / "nyu_images" / "1.jpg", "red")
  for name in ("train.txt", "test.txt"):
    (tmp_path / name).write_text(text, encoding="latin-1")
  with pytest.raises(InputError, match="test.txt"):
    registry.open_segmentation(tmp_path, split="test")


@pytest.mark.parametrize(
  "camera", [{"q": ["a", 0, 0, 1]}, {"focal_length": [1, 2]}, {"t": None}]
)
def test_cameras_of_wrong_types(tmp_path, write_image, camera):
  folder = tmp_path / "duck" / "wild_set"
  write_image(folder / "images" / "000.jpg", "red")
  write_image(folder / "depth" / "000.png", "red")
  camera = {"q": [1, 0, 0, 0], "t": [0, 0, 0], "focal_length": 9, **camera}
  row = {"filename": "000.jpg", "camera": camera}
  write_json(folder / "annotations.json", [row])
  with pytest.raises(InputError, match="annotations.json|translation"):
    registry.open_posed(tmp_path, subset="wild_set", count=2)
