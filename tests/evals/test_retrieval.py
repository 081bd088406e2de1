"""Retrieval: the golden values, the readers, and chance."""

import json

import numpy as np
import pytest

from mtv_jax.data.records import BadRecord
from mtv_jax.evals import retrieval
from mtv_jax.evals.core.examples import CaptionSet, LazySequence
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.retrieval import Retrieval, chance, recalls
from mtv_jax.utils import plots

# big_vision's unit test: distances of 4 images to 8 texts, two for each image.
DISTANCES = np.array(
  [
    [0.8, 0.8, 0.1, 0.5, 0.1, 0.2, 0.5, 0.1],
    [0.5, 0.4, 0.0, 0.0, 0.4, 0.2, 0.6, 0.4],
    [0.5, 0.4, 0.1, 0.5, 0.0, 0.8, 0.8, 0.3],
    [0.5, 0.4, 0.1, 0.5, 0.4, 0.2, 0.3, 0.3],
  ]
)
OWNER = np.array([0, 0, 1, 1, 2, 2, 3, 3])


@pytest.mark.parametrize(
  ("direction", "change", "want"),
  [
    ("image_to_text", None, (0.5, 0.75, 1)),
    ("text_to_image", 0.1, (0.375, 1, 1)),
  ],
)
def test_golden(direction, change, want):
  """Images as unit vectors and texts as their negative distances."""
  distances = DISTANCES.astype(np.float32)
  if change:
    distances[0, 6] = change
  image = np.eye(4, dtype=np.float32)
  got = recalls(image, -distances.T, OWNER, block_bytes=64).metrics
  assert tuple(got[f"{direction}_r{k}"] for k in (1, 5, 10)) == want


def test_chance_golden_and_simulated():
  owner = np.array([0, 0, 0, 1, 2, 2, 3, 4, 4, 5, 5, 5])
  want = chance(owner)
  assert want["text_to_image_r5"] == pytest.approx(5 / 6)
  assert want["text_to_image_r10"] == 1.0
  # 10 of 12 captions are drawn, in 66 ways: 1 misses a pair and 11 miss
  # a single one.
  pair, single = 1 - 1 / 66, 1 - 11 / 66
  assert want["image_to_text_r10"] == pytest.approx(
    np.mean([1, single, pair, single, pair, 1])
  )
  rng = np.random.default_rng(1)
  sampled = owner[rng.integers(0, 12, (20_000, 6))] == np.arange(6)
  assert want["image_to_text_r1"] == pytest.approx(sampled.mean(), abs=0.01)


@pytest.fixture
def coco(tmp_path, write_image):
  names = {7: "red", 3: "green", 9: "blue", 5: "white"}
  for number, colour in names.items():
    write_image(tmp_path / "val2017" / f"{number:012}.png", colour)
  images = [{"id": i, "file_name": f"{i:012}.png"} for i in names]
  captions = [
    (3, "Green."),
    (7, "red"),
    (7, "a red one"),
    (9, "blue"),
    (3, "x"),
  ]
  rows = [{"image_id": i, "caption": c} for i, c in captions]
  rows = [{"id": n, **row} for n, row in enumerate(rows)]
  path = tmp_path / "annotations" / "captions_val2017.json"
  path.parent.mkdir()
  path.write_text(json.dumps({"images": images, "annotations": rows}))
  return path


def change_rows(path, change):
  content = json.loads(path.read_text())
  for row in content["annotations"]:
    change(row)
  path.write_text(json.dumps(content))


def test_coco_captions(coco, colours):
  data = registry.open_captions(coco)
  # Images in the file's order; the one without a caption is left out.
  assert data.captions == ("red", "a red one", "Green.", "x", "blue")
  assert list(data.owner) == [0, 0, 1, 1, 2]
  assert data.images[0][0, 0].tolist() == [255, 0, 0]
  result = Retrieval(data=str(coco)).run(colours)
  # "x" names no colour, is equally far from all, and the first image wins.
  assert result.metrics["text_to_image_r1"] == pytest.approx(4 / 5)
  assert result.metrics["image_to_text_r1"] == 1.0
  assert result.protocol["captions"] == 5
  assert result.protocol["data_hash"] == data.digest
  assert result.chance["text_to_image_r1"] == pytest.approx(1 / 3)


def test_sheets_of_captions_and_images(coco, colours):
  plain = Retrieval(data=str(coco)).run(colours)
  assert plain.sheets == {}
  result = Retrieval(data=str(coco), pictures=2).run(colours)
  assert result.metrics == plain.metrics
  assert result.protocol == plain.protocol
  assert set(result.sheets) == {"captions", "images"}
  for sheet in result.sheets.values():
    green = (sheet == retrieval.GREEN).all(axis=-1)
    # All colours match: each half marks the own caption or image.
    assert green[: len(green) // 2].any() and green[len(green) // 2 :].any()


def test_max_captions_and_count(coco):
  data = registry.open_captions(coco, max_captions=1)
  assert data.captions == ("red", "Green.", "blue")
  data = registry.open_captions(coco, count=1)
  assert data.captions == ("Green.", "x")


def test_equal_captions_are_embedded_once(coco, colours):
  change_rows(coco, lambda row: row.update(caption="red"))
  result = Retrieval(data=str(coco)).run(colours)
  assert colours.batches == [1]
  # All captions tie, so the first image's captions rank first.
  assert result.metrics["image_to_text_r1"] == pytest.approx(1 / 3)
  assert result.metrics["text_to_image_r1"] == pytest.approx(2 / 5)
  assert result.protocol["captions_distinct"] == 1


def test_missing_and_broken_files_are_named(coco):
  image = coco.parent.parent / "val2017" / f"{9:012}.png"
  data = registry.open_captions(coco)
  image.write_bytes(image.read_bytes()[:40])
  with pytest.raises(BadRecord, match="000000000009.png"):
    data.images[2]
  image.unlink()
  with pytest.raises(FileNotFoundError, match="1 of 3 files.*000000000009"):
    registry.open_captions(coco)
  with pytest.raises(FileNotFoundError, match="images="):
    coco.rename(coco.parent / "captions_train2017.json")
    registry.open_captions(coco.parent / "captions_train2017.json")


def test_data_without_captions_are_rejected(tmp_path, coco, write_image):
  write_image(tmp_path / "set" / "red" / "0.png", "red")
  with pytest.raises(ValueError, match="contains red/. .* no usable image"):
    registry.open_captions(tmp_path / "set")
  with pytest.raises(ValueError, match="captions but no classes"):
    registry.open_classification(coco)
  change_rows(coco, lambda row: row.update(category_id=row.pop("caption")))
  with pytest.raises(ValueError, match="no 'caption'"):
    registry.open_captions(coco)


def test_scenes(colours):
  result = Retrieval(count=6).run(colours)
  assert result.errors.keys() == result.metrics.keys()
  assert result.protocol["images"] == 6
  assert result.protocol["captions"] >= 6
  held_out = registry.open_captions("scenes", count=2)
  assert len(held_out.images) == 2


def test_real_images(shared_data):
  path = shared_data / "coco" / "annotations" / "captions_val2017.json"
  data = registry.open_captions(path)
  assert len(data.images) == 183
  assert len(data.captions) == 915
  assert data.images[5].dtype == np.uint8


def test_sheets_mark_correct_captions_and_images():
  grey = np.full((20, 30, 3), 128, np.uint8)
  data = CaptionSet(
    images=LazySequence(lambda i: grey, 6),
    name="grey",
    digest="",
    captions=tuple(f"{i} " + "two " * 80 for i in range(6)),
    owner=np.arange(6),
  )
  line = plots.SHEET_LINE
  sheet = retrieval.rank_captions(data, 0, np.arange(6.0))
  # Own caption: rank 6, below four others of two lines each.
  green = (sheet == retrieval.GREEN).all(axis=-1)
  assert not green[: 8 * line].any() and green[8 * line :].any()
  green = retrieval.rank_captions(data, 5, np.arange(6.0)) == retrieval.GREEN
  assert green.all(axis=-1)[:line].any()
  for own, is_framed in ((0, False), (4, True)):
    sheet = retrieval.rank_images(data, own, np.arange(6.0))
    assert (sheet == retrieval.GREEN).all(axis=-1).any() == is_framed
