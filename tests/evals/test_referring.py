"""Referring expressions in RefCOCO's layout."""

import os
import pickle

import numpy as np
import PIL.Image
import pytest
from dataset_samples import write_json
from grounding_samples import COLOURS, Painter

from mtv_jax.evals.grounding import GroundingEvaluator
from mtv_jax.utils.errors import InputError

# Boxes (x, y, width, height) of 40 x 20 pixels.
OBJECTS = {"red": (0, 0, 10, 10), "green": (20, 4, 16, 12)}
OBJECTS |= {"blue": (12, 12, 4, 4)}


@pytest.fixture
def refcoco(tmp_path):
  folder = tmp_path / "refcoco"
  photos = tmp_path / "images" / "mscoco" / "images" / "train2014"
  photos.mkdir(parents=True)
  images, annotations = [], []
  for i in range(3):
    pixels = np.full((20, 40, 3), 90, np.uint8)
    for k, (colour, (x, y, width, height)) in enumerate(OBJECTS.items()):
      pixels[y : y + height, x : x + width] = COLOURS[colour]
      row = {"id": 10 * i + k, "image_id": i, "bbox": OBJECTS[colour]}
      annotations.append(row | {"category_id": 1})
    PIL.Image.fromarray(pixels).save(photos / f"{i}.png")
    images.append({"id": i, "file_name": f"{i}.png", "height": 20, "width": 40})
  content = {"images": images, "annotations": annotations}
  write_json(folder / "instances.json", {**content, "categories": []})

  def ref(image, box, split, *texts):
    sentences = [{"sent": text, "tokens": text.split()} for text in texts]
    row = {"image_id": image, "ann_id": 10 * image + box, "split": split}
    return row | {"ref_id": 0, "sentences": sentences}

  refs = [
    # Two annotators' equal words count twice, and words of the wrong box too.
    ref(0, 0, "val", "red", "red"),
    ref(0, 1, "val", "green"),
    ref(1, 2, "val", "green"),
    ref(1, 0, "testA", "red"),
    ref(2, 1, "testB", "green"),
  ]
  (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
  return folder


def test_accuracies(refcoco):
  result = GroundingEvaluator(data=str(refcoco)).run(Painter())
  metrics = result.metrics
  assert metrics["located_iou50"] == metrics["chosen_iou50"] == 3 / 4
  assert result.errors.keys() == metrics.keys() == result.chance.keys()
  assert result.chance["chosen_iou50"] == 1 / 3
  # The best constant box: of the four described ones, two are red.
  assert result.chance["located_iou50"] == 2 / 4
  protocol = result.protocol
  assert (protocol["boxes"], protocol["candidates"]) == (4, 6)
  assert protocol["data"].endswith("refs(unc).p, val")


def test_splits(refcoco):
  counts = {
    split: len(
      GroundingEvaluator(data=str(refcoco), split=split)._set[0].images
    )
    for split in ("val", "testA", "testB", "test")
  }
  assert counts == {"val": 2, "testA": 1, "testB": 1, "test": 2}
  with pytest.raises(InputError, match="no split 'testC'.*'testA'"):
    GroundingEvaluator(data=str(refcoco), split="testC").prepare()


class Exploit:
  def __reduce__(self):
    return os.mkdir, ("exploited",)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (pickle.dumps([Exploit()]), "holds (posix|nt).mkdir"),
    (b"\x80\x02]q\x00(", "expected a list of expressions"),
    (pickle.dumps({"refs": 1}), "expected a list of objects"),
    (pickle.dumps([{"split": "val"}]), "has no 'image_id'"),
  ],
)
def test_bad_pickles(refcoco, monkeypatch, content, message):
  monkeypatch.chdir(refcoco)
  file = refcoco / "refs(unc).p"
  file.write_bytes(content)
  with pytest.raises(InputError, match=message):
    GroundingEvaluator(data=str(file)).prepare()
  assert not (refcoco / "exploited").exists()


def test_images_without_sentences_are_left_out(refcoco):
  file = refcoco / "refs(unc).p"
  refs = pickle.loads(file.read_bytes())
  refs[2]["sentences"] = []
  file.write_bytes(pickle.dumps(refs))
  boxes = GroundingEvaluator(data=str(refcoco))._set[0]
  assert boxes.phrases == (("red", "red", "green"),)
