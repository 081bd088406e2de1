"""ImageNet's official files, its test sets, and CLIP_benchmark's folders."""

import json
import tarfile

import numpy as np
import pytest
import scipy.io
from dataset_samples import (
  image_bytes,
  write_jpeg,
  write_json,
  write_pixels,
  write_tar,
)

from mtv_jax import load
from mtv_jax.evals.classification.zero_shot import ZeroShot, match_candidates
from mtv_jax.evals.core import base, prompts
from mtv_jax.evals.core.prompts import Prompts
from mtv_jax.evals.datasets import class_folders, imagenet, registry
from mtv_jax.utils.errors import InputError, MissingFileError

# By ILSVRC2012_ID, whose order differs from the WordNet ids'.
SYNSETS = [
  (1, "n02000000", "green, verdant", 0),
  (2, "n03000000", "blue", 0),
  (3, "n01000000", "red", 0),
  (4, "n00000001", "colour", 3),  # with children, so no class
]
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
COLOURS = ["red", "green", "blue", "red"]
# 1000 names in the order of their ids; the first three are colours.
NAMES = ("red", "green", "blue", *(f"class {i}" for i in range(997)))
IDS = ("n01000000", "n02000000", "n03000000") + tuple(
  f"n{4000000 + i:08}" for i in range(997)
)
IMAGENET = Prompts(NAMES, ("{}",), ids=IDS, name="imagenet")


@pytest.fixture
def devkit(tmp_path):
  """The devkit's folder, in the layout of ILSVRC2012_devkit_t12."""
  data = tmp_path / "ILSVRC2012_devkit_t12" / "data"
  data.mkdir(parents=True)
  write_synsets(data, SYNSETS)
  write_truth(data, "3\n1\n2\n3\n")
  return data


def write_truth(devkit, text):
  (devkit / TRUTH).write_text(text)


def write_synsets(data, rows):
  names = ("ILSVRC2012_ID", "WNID", "words", "num_children")
  rows = np.array(rows, [(name, "O") for name in names])
  scipy.io.savemat(data / "meta.mat", {"synsets": rows[:, None]})


def write_flat(root, write_image):
  for i, colour in enumerate(COLOURS):
    path = root / f"ILSVRC2012_val_{i + 1:08}.JPEG"
    write_jpeg(write_image, path, colour)


def test_flat_validation_set(tmp_path, devkit, write_image, colours):
  write_flat(tmp_path / "val", write_image)
  data = registry.open_classification(tmp_path)
  # Positions in the sorted WordNet ids, and not ILSVRC2012_ID.
  assert data.ids == ("n01000000", "n02000000", "n03000000")
  assert data.classes == ("red", "green", "blue")
  assert list(data.labels) == [0, 1, 2, 0]
  assert data.images[2][0, 0].tolist() == [0, 0, 255]
  assert registry.open_classification(tmp_path / "val").digest == data.digest
  assert len(registry.open_classification(tmp_path, count=2).images) == 2
  result = ZeroShot(data=str(tmp_path)).run(colours)
  assert result.metrics["top1"] == 1.0
  # A missing image is an error, not a smaller set.
  (tmp_path / "val" / "ILSVRC2012_val_00000003.JPEG").unlink()
  with pytest.raises(MissingFileError, match="1 of 4 .*_00000003.JPEG"):
    registry.open_classification(tmp_path)


def test_validation_tar_and_devkit_archive(tmp_path, devkit, write_image):
  write_flat(tmp_path / "images", write_image)
  folder = tmp_path / "official"
  folder.mkdir()
  tar = folder / "ILSVRC2012_img_val.tar"
  with tarfile.open(tar, "w") as file:
    file.add(tmp_path / "images", ".")
  with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as file:
    file.add(devkit.parent, devkit.parent.name)
  for path in (folder, tar, str(tar)):
    data = registry.open_classification(path)
    assert list(data.labels) == [0, 1, 2, 0]
    assert data.images[1][0, 0].tolist() == [0, 255, 0]
  # With the training images, a set for probes.
  for key, colour in zip(data.ids, COLOURS, strict=False):
    write_image(folder / "train" / key / "1.png", colour)
  splits = registry.open_splits(folder)
  assert list(splits.test.labels) == [0, 1, 2, 0]
  assert list(splits.train.labels) == [0, 1, 2]


TAR_GZ = "ILSVRC2012_devkit_t12.tar.gz"


@pytest.mark.parametrize(
  "change, error",
  [
    (lambda d: write_truth(d, "1\n4\n"), "4 is not an ILSVRC2012_ID"),
    (lambda d: write_truth(d, "1\nred\n"), "not an ILSVRC2012_ID"),
    (lambda d: write_truth(d, ""), "0 numbers"),
    (lambda d: write_synsets(d, SYNSETS[3:]), "has 0 classes"),
    (lambda d: (d / "meta.mat").write_bytes(b""), "meta.mat is not Image"),
    (lambda d: (d / TRUTH).unlink(), "missing .*ground_truth.txt"),
    (lambda d: d.parent.rename("moved"), "no devkit .*image-net.org"),
    (
      lambda d: [d.parent.rename("moved"), open(TAR_GZ, "w").close()],
      "can't be read as ImageNet's devkit",
    ),
  ],
)
def test_devkit_is_checked(
  tmp_path, monkeypatch, devkit, write_image, change, error
):
  monkeypatch.chdir(tmp_path)
  write_flat(tmp_path, write_image)
  change(devkit)
  with pytest.raises((InputError, MissingFileError), match=error):
    registry.open_classification(tmp_path)


def write_folders(root, names, write_image):
  """One red image per class, linked."""
  write_image(root / "red.png", "red")
  for name in names:
    (root / "set" / name).mkdir(parents=True)
    (root / "set" / name / "1.png").hardlink_to(root / "red.png")
  return root / "set"


def test_imagenet_v2_folders_are_numbers(tmp_path, write_image):
  names = [str(i) for i in range(1000)]
  root = write_folders(tmp_path, names, write_image)
  data = registry.open_classification(root)
  assert data.ids == tuple(names)  # and not 0, 1, 10, 100, 101
  assert list(data.labels) == sorted(data.labels, key=lambda i: str(i))
  # By position, also in a file that knows WordNet ids, and with folders left
  # out.
  for given in (IMAGENET, Prompts(NAMES)):
    got = match_candidates(data, given, keep=None)
    np.testing.assert_array_equal(got.labels, data.labels)
  (root / "17" / "1.png").unlink()
  data = registry.open_classification(root)
  labels = match_candidates(data, IMAGENET, keep=None).labels
  assert sorted(labels.tolist()) == [i for i in range(1000) if i != 17]
  with pytest.raises(InputError, match="up to 999, but short has 3"):
    match_candidates(data, Prompts(NAMES[:3], name="short"), keep=None)
  with pytest.raises(InputError, match="WordNet ids or numbers"):
    match_candidates(data, None, keep=None)


def test_the_tar_of_training_images_is_explained(tmp_path, write_image):
  write_image(tmp_path / "val" / IDS[0] / "1.png", "red")
  tar = tmp_path / "ILSVRC2012_img_train.tar"
  write_tar(tar, {})
  for data, options in (
    (tmp_path / "val", {"train": tar}),
    (tmp_path, {"train": None}),
  ):
    with pytest.raises(InputError, match="a tar for each class.*mkdir train"):
      registry.open_splits(data, **options)
  shards = {"type": "webdataset", "path": "0.tar"}
  with pytest.raises(base.NotApplicable, match="no training images"):
    registry.open_splits(shards)


def test_imagenet_v2_as_test_set_of_a_probe(tmp_path, write_image):
  train = write_folders(tmp_path / "train", IDS, write_image)
  for number, colour in (("10", "red"), ("2", "blue")):
    write_image(tmp_path / "v2" / number / "1.png", colour)
  data = registry.open_splits(tmp_path / "v2", train=train)
  assert list(data.test.labels) == [10, 2]
  assert data.test.ids == IDS


def test_ten_numbers_are_digits(tmp_path, write_image):
  for digit in range(10):
    write_image(tmp_path / str(digit) / "1.png", "red")
  data = registry.open_classification(tmp_path)
  assert match_candidates(data, None, keep=None).prompts.classes[3] == "3"
  words = Prompts(("zero", "one", "two", "three"))
  with pytest.raises(InputError, match="labels up to 9"):
    match_candidates(data, words, keep=None)


def test_200_wordnet_ids_are_scored_alone(tmp_path, write_image, colours):
  """ImageNet-A and -R."""
  chosen = [IDS[0], *IDS[3::5]]
  assert len(chosen) == 201
  root = write_folders(tmp_path, chosen[:200], write_image)
  path = tmp_path / "imagenet.json"
  prompts.write_prompts(path, IMAGENET)
  options = {"data": str(root), "prompts": str(path), "count": 7}
  result = ZeroShot(**options).run(colours)
  # All classes of the folder, not only the drawn ones.
  assert result.protocol["classes"] == 200
  assert result.protocol["classes_scored"] == "dataset"
  assert result.chance["top1"] == 1 / 200
  every = ZeroShot(**options, classes="all").run(colours)
  assert every.protocol["classes"] == 1000
  present = ZeroShot(**options, classes="present").run(colours)
  assert present.protocol["classes"] == 7
  (root / chosen[1] / "1.png").unlink()
  other = ZeroShot(**options).run(colours)
  assert other.protocol["classes_scored"] == "all"


@pytest.mark.parametrize(
  "kind, options",
  [
    ("knn", {"k": (12,)}),
    ("few_shot", {"shots": (1,)}),
    ("logistic", {"select": "val", "strengths": (1.0,), "max_iter": 20}),
    pytest.param(
      "linear_probe", {"rates": (0.1,), "steps": 9}, marks=pytest.mark.slow
    ),
    pytest.param("mae_probe", {"base_rate": 50.0}, marks=pytest.mark.slow),
  ],
)
def test_probes_score_200_wordnet_ids_alone(
  kind, options, tmp_path, write_image, monkeypatch
):
  """Training images of 1,000 classes, ImageNet-A and -R as test images."""
  monkeypatch.setattr(class_folders, "_SUBSET_COUNT", 2)
  for name, key in zip(NAMES, IDS[:3], strict=False):
    for i in range(4):
      write_image(tmp_path / "train" / key / f"{i}.png", name)
  image = np.full((8, 8, 3), (255, 90, 0), np.uint8)  # Red, then green.
  write_pixels(tmp_path / "a" / IDS[1] / "1.png", image)
  write_image(tmp_path / "a" / IDS[2] / "1.png", "blue")
  options = {"data": str(tmp_path / "a"), "view": "encoder", **options}
  options["train"] = str(tmp_path / "train")
  encoder = load("pixels:8/4")
  for classes, correct, count in ((None, 1.0, 2), ("all", 0.5, 3)):
    evaluator = base.build_evaluator(kind, options | {"classes": classes})
    result = evaluator.run(encoder)
    metric = next(iter(result.metrics))
    assert result.metrics[metric] == correct
    assert result.chance[metric] == pytest.approx(1 / count)
    assert result.protocol.get("classes_scored", 3) == count


def test_an_archive_with_one_folder_in_it(tmp_path, write_image):
  """ImageNet-Sketch's archive has the folder `sketch`."""
  for key in IDS[:3]:
    write_image(tmp_path / "sketch" / key / "1.png", "red")
  (tmp_path / "README.txt").write_text("")
  data = registry.open_classification(tmp_path)
  assert data.ids == IDS[:3]


def test_real_labels(tmp_path, devkit, write_image, colours):
  """An image is right by any of its labels, and left out without one."""
  write_flat(tmp_path / "val", write_image)
  # Red as green or red; green as blue; no label; red as class 5.
  real = tmp_path / "real.json"
  real.write_text(json.dumps([[1, 0], [2], [], [7, 0, 7]]))
  path = tmp_path / "imagenet.json"
  # The file's order differs from the sorted ids'.
  order = np.random.default_rng(0).permutation(1000)
  shuffled = Prompts(
    tuple(NAMES[i] for i in order), ("{}",), tuple(IDS[i] for i in order)
  )
  prompts.write_prompts(path, shuffled)
  options = {"data": str(tmp_path), "real": str(real)}
  result = ZeroShot(**options, prompts=str(path)).run(colours)
  assert result.metrics["top1"] == 1.0
  assert result.metrics["real_top1"] == pytest.approx(2 / 3)
  assert result.protocol["real_images"] == 3
  # Two labels, one and two of 1000.
  assert result.chance["real_top1"] == pytest.approx(5 / 3 / 1000)
  only = dict(options, prompts=str(path), count=1)  # the third image
  with pytest.raises(InputError, match="none of the 1 images"):
    ZeroShot(**only).prepare()
  with pytest.raises(InputError, match="are ImageNet's 1000 classes"):
    ZeroShot(**options).prepare()
  with pytest.raises(InputError, match="relabels the files of ImageNet"):
    ZeroShot(real=str(real)).prepare()
  # Equal images in folders of classes.
  jpeg = tmp_path / "f" / IDS[0] / "ILSVRC2012_val_00000001.JPEG"
  write_jpeg(write_image, jpeg, "red")
  data = registry.open_classification(tmp_path / "f", real=real)
  assert data.accepted == ((1, 0),)
  jpeg.rename(jpeg.with_name("other.JPEG"))
  with pytest.raises(InputError, match="other.JPEG is not one of the 4"):
    registry.open_classification(tmp_path / "f", real=real)
  real.write_text('[[1], "2"]')
  with pytest.raises(InputError, match="list of labels"):
    registry.open_classification(tmp_path, real=real)
  with pytest.raises(MissingFileError, match="reassessed-imagenet"):
    registry.open_classification(tmp_path, real=tmp_path / "none.json")


@pytest.fixture
def objectnet(tmp_path):
  """Three folders, two of them overlapping; a red border of two pixels."""
  root = tmp_path / "objectnet-1.0"
  inner = {"a_tie": (0, 0, 255), "b_chair": (0, 255, 0), "c_other": (9, 9, 9)}
  for folder, colour in inner.items():
    pixels = np.full((10, 14, 3), (255, 0, 0), np.uint8)
    pixels[2:-2, 2:-2] = colour
    write_pixels(root / "images" / folder / "1.png", pixels)
  mappings = root / "mappings"
  write_json(
    mappings / "folder_to_objectnet_label.json",
    {"a_tie": "Tie", "b_chair": "Chair", "c_other": "Other"},
  )
  write_json(
    mappings / "objectnet_to_imagenet_1k.json",
    {"Tie": "bow tie, bowtie; Windsor tie", "Chair": "chair"},
  )
  # Lines are in the order of ILSVRC2012_ID, labels are not.
  lines = ["chair", "Windsor tie", "bow tie, bowtie"]
  lines += [f"other {i}" for i in range(997)]
  (mappings / "imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")
  lines = {"0": 1, "1": 0, "2": 2} | {str(i): i for i in range(3, 1000)}
  write_json(mappings / "pytorch_to_imagenet_2012_id.json", lines)
  return root


def test_objectnet(objectnet, colours, tmp_path):
  data = registry.open_classification(objectnet.parent)
  assert data.ids == ("a_tie", "b_chair")
  assert data.classes == ("tie", "chair")
  assert list(data.labels) == [0, 1]
  assert data.groups == ((2, 0), (1,))
  # Without the border.
  assert data.images[0].shape == (6, 10, 3)
  assert (data.images[0] == (0, 0, 255)).all()
  # ObjectNet's own names.
  own = Prompts(("chair", "tie"), name="own")
  assert list(match_candidates(data, own, keep=None).labels) == [1, 0]
  # ImageNet's: red, blue stand for a tie, green for a chair.
  path = tmp_path / "imagenet.json"
  names = ("red", "green", "blue", *NAMES[3:])
  prompts.write_prompts(path, Prompts(names, ("{}",), IDS))
  options = {"data": str(objectnet), "prompts": str(path)}
  result = ZeroShot(**options).run(colours)
  assert result.protocol["classes"] == 3
  assert result.metrics["top1"] == 1.0
  # Two of three candidates are right for the tie, one for the chair.
  assert result.chance["top1"] == pytest.approx((2 / 3 + 1 / 3) / 2)
  assert result.chance["top5"] == 1.0
  every = ZeroShot(**options, classes="all").run(colours)
  assert every.protocol["classes"] == 1000
  assert every.chance["top1"] == pytest.approx(3 / 2 / 1000)
  got = every.chance["top5"]
  miss = (998 * 997 * 996 * 995 * 994) / (1000 * 999 * 998 * 997 * 996)
  assert got == pytest.approx((1 - miss + 5 / 1000) / 2)
  write_pixels(objectnet / "images/a_tie/1.png", np.zeros((4, 9, 3), np.uint8))
  with pytest.raises(InputError, match="a_tie/1.png is 4x9 pixels"):
    _ = registry.open_classification(objectnet).images[0]


LATE = json.dumps({str(i + 1): i for i in range(1000)})


@pytest.mark.parametrize(
  "name, content, message",
  [
    (imagenet._FOLDERS, "[]", "expected an object of str"),
    (imagenet._FOLDERS, "{", "is not JSON"),
    (imagenet._FOLDERS, '{"a": 1}', "expected an object of str"),
    (imagenet._FOLDERS, '{"a": "b"}', "no folder of that name"),
    (imagenet._OVERLAP, '{"Tie": "cap"}', "'cap' is not in"),
    (imagenet._OVERLAP, '{"Tie": null}', "an object of str"),
    (imagenet._ORDER, '{"0": 5}', "each label once"),
    (imagenet._ORDER, '{"0": "5"}', "an object of int"),
    (imagenet._ORDER, LATE, "each label once"),
    (imagenet._NAMES, "chair", "1000 labels and .* 1 lines"),
    (imagenet._NAMES, None, "missing .*2012_v2"),
  ],
)
def test_malformed_mappings_are_explained(objectnet, name, content, message):
  path = objectnet / "mappings" / name
  path.unlink()
  if content is not None:
    path.write_text(content)
  with pytest.raises((InputError, MissingFileError), match=message):
    registry.open_classification(objectnet)


@pytest.fixture
def clip_benchmark(tmp_path):
  colours = ["blue", "red", "green"]
  for split, numbers in (("train", [0, 1, 2]), ("test", [2, 1, 1])):
    for shard, number in enumerate(numbers):
      kind = ("webp", "png", "jpg")[shard]
      image = image_bytes(colours[number], kind.replace("jpg", "jpeg"))
      label = {kind: image, "cls": str(number).encode()}
      write_tar(tmp_path / split / f"{shard}.tar", {f"s{shard:07}": label})
    (tmp_path / split / "nshards.txt").write_text("3\n")
  (tmp_path / "classnames.txt").write_text("blue\nred\nblue\n")
  (tmp_path / "zeroshot_classification_templates.txt").write_text(
    "a photo of a {c}.\n{c}\n"
  )
  return tmp_path


def test_clip_benchmark_classification(clip_benchmark, colours):
  data = registry.open_classification(clip_benchmark)
  assert list(data.labels) == [2, 1, 1]
  assert data.classes == ("blue", "red", "blue")
  assert data.templates == ("a photo of a {}.", "{}")
  assert data.images[1][0, 0].tolist() == [255, 0, 0]
  result = ZeroShot(data=str(clip_benchmark)).run(colours)
  assert result.protocol["templates"] == ["a photo of a {}.", "{}"]
  # Green is equally far from all names, so the first wins. Equal names raise no
  # error, as labels are line numbers.
  assert result.metrics["top1"] == pytest.approx(2 / 3)
  splits = registry.open_splits(clip_benchmark)
  assert list(splits.train.labels) == [0, 1, 2]
  assert splits.classes == 3


def test_prompt_files_of_the_users(clip_benchmark, colours, tmp_path):
  names = tmp_path / "mine.txt"
  names.write_text("blue\n\nred\ngreen\n")
  templates = tmp_path / "templates.txt"
  templates.write_text("{c} and {}\n")
  options = {"data": str(clip_benchmark), "prompts": str(names)}
  result = ZeroShot(**options).run(colours)
  # By position, as the folder's own list.
  assert result.metrics["top1"] == 1.0
  assert result.protocol["templates"] == list(prompts.DEFAULT_TEMPLATES)
  with pytest.raises(InputError, match="exactly once"):
    ZeroShot(**options, templates=str(templates)).prepare()
  templates.write_text("my {c}\n")
  result = ZeroShot(**options, templates=str(templates)).run(colours)
  assert result.protocol["templates"] == ["my {}"]
  assert result.protocol["prompts"] == "mine.txt, templates.txt"
  own = ZeroShot(data=str(clip_benchmark), templates=str(templates))
  assert own.run(colours).protocol["templates"] == ["my {}"]
  # A folder of another data set is a prompt file too.
  read = prompts.read_prompts(clip_benchmark)
  assert (read.classes[1], read.templates[1]) == ("red", "{}")


RED = {"png": image_bytes("red", "png")}


@pytest.mark.parametrize(
  "name, content, error",
  [
    ("test/1.tar", RED | {"cls": b"3"}, "a.cls is '3'.*0 to 2"),
    ("test/1.tar", RED | {"cls": b"\xff1"}, "a.cls is not UTF-8"),
    ("test/1.tar", None, "nshards.txt is 3.*1.tar"),
    ("test/nshards.txt", "x", "the number of tars"),
    ("test/nshards.txt", "0", "with KEY.cls"),
    ("dataset_type.txt", "retrieval\n", "captions but no classes"),
    ("classnames.txt", None, "classnames.txt"),
  ],
)
def test_clip_benchmark_is_checked(clip_benchmark, name, content, error):
  path = clip_benchmark / name
  if content is None:
    path.unlink()
  elif path.suffix == ".tar":
    write_tar(path, {"a": content})
  else:
    path.write_text(content)
  with pytest.raises((InputError, MissingFileError), match=error):
    registry.open_classification(clip_benchmark)
