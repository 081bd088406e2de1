"""Compositionality: SugarCrepe and Winoground in their official layouts."""

import json

import numpy as np
import pytest
from dataset_samples import image_bytes, write_json, write_tar

from mtv_jax.evals import retrieval as compositionality
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.core.examples import LazySequence, SelectionSet
from mtv_jax.evals.retrieval import Compositionality
from mtv_jax.utils.errors import InputError, MissingFileError

# The last item ties: no word is a colour, so that both captions are equal.
ITEMS = {
  "swap_att": [("red", "red", "blue"), ("green", "blue", "green")],
  "add_obj": [("red", "red", "green"), ("red", "a cat", "a dog")],
}


@pytest.fixture
def sugar_crepe(tmp_path, write_image):
  for colour in ("red", "green", "blue"):
    write_image(tmp_path / "val2017" / f"{colour}.png", colour)
  names = ("filename", "caption", "negative_caption")
  for kind, items in ITEMS.items():
    rows = [
      dict(zip(names, (f"{c}.png", *texts), strict=True)) for c, *texts in items
    ]
    # Ids have gaps.
    content = {str(3 * i): row for i, row in enumerate(rows)}
    write_json(tmp_path / "data" / f"{kind}.json", content)
  return tmp_path


def test_sugar_crepe(colours, sugar_crepe, caplog):
  result = Compositionality(data=str(sugar_crepe)).run(colours)
  want = {"accuracy": 0.5, "swap_att": 0.5, "add_obj": 0.5}
  assert result.metrics == want and result.chance == want
  assert "has 2 of SugarCrepe's 7 kinds" in caplog.text
  assert result.errors.keys() == want.keys()
  protocol = json.loads(json.dumps(result.protocol))
  # Each image is encoded once.
  assert (protocol["images"], protocol["items"]) == (2, 4)
  one = Compositionality(data=sugar_crepe / "data" / "swap_att.json")
  assert [*one.run(colours).metrics] == ["accuracy", "swap_att"]
  (sugar_crepe / "val2017" / "red.png").unlink()
  with pytest.raises(MissingFileError, match=r"red\.png"):
    Compositionality(data=str(sugar_crepe)).prepare()
  file = sugar_crepe / "data" / "add_obj.json"
  write_json(file, {"0": {"filename": "red.png", "caption": "red"}})
  with pytest.raises(InputError, match="no 'negative_caption'"):
    Compositionality(data=str(file)).prepare()


def test_tars_of_sugar_crepe(colours, tmp_path):
  root = tmp_path / "wds_sugar_crepe_swap_att"
  records = {
    str(i): {"webp": image_bytes(c), "txt": "\n".join(texts).encode()}
    for i, (c, *texts) in enumerate(ITEMS["swap_att"])
  }
  write_tar(root / "test" / "0.tar", records)
  (root / "dataset_type.txt").write_text("retrieval\n")
  result = Compositionality(data=str(root)).run(colours)
  assert result.metrics == {"accuracy": 0.5, "swap_att": 0.5}
  records["0"]["txt"] = b"one"
  write_tar(root / "test" / "0.tar", records)
  with pytest.raises(NotApplicable, match="expected two captions"):
    Compositionality(data=str(root)).prepare()


def test_winoground(colours, tmp_path, write_image):
  folder = tmp_path / "data"
  rows = [("red", "blue", "red", "blue"), ("red", "blue", "blue", "red")]
  lines = []
  for i, (*images, first, second) in enumerate(rows):
    row = {"id": i, "caption_0": first, "caption_1": second}
    for k, colour in enumerate(images):
      write_image(folder / "images" / f"ex_{i}_img_{k}.png", colour)
      row[f"image_{k}"] = f"ex_{i}_img_{k}"
    # A line separator of Unicode doesn't end a line of JSON.
    lines.append(json.dumps(row | {"tag": "\u2028"}, ensure_ascii=False))
  (folder / "examples.jsonl").write_text("\n".join(lines), encoding="utf-8")
  result = Compositionality(data=str(tmp_path)).run(colours)
  assert result.metrics == dict.fromkeys(compositionality.SCORES, 0.5)
  (folder / "examples.jsonl").write_text("[]\n{")
  with pytest.raises(InputError, match="nor one object per line"):
    Compositionality(data=str(tmp_path)).prepare()


def test_scores_equal_winogrounds_rules():
  """The authors' comparisons of c0_i0, c0_i1, c1_i0 and c1_i1."""
  rng = np.random.default_rng(0)
  data = SelectionSet(
    **dict(name="x", digest="0", images=LazySequence(str, 1), captions=("a",)),
    **dict(image_index=np.zeros((1, 2), int), categories=("winoground",)),
  )
  scores = rng.integers(0, 3, (500, 2, 2)).astype(np.float32)  # With ties.
  estimate, chance = compositionality.score_items(scores, data)
  want = dict.fromkeys(compositionality.SCORES, 0)
  for (c0_i0, c1_i0), (c0_i1, c1_i1) in scores:
    text = c0_i0 > c1_i0 and c1_i1 > c0_i1
    image = c0_i0 > c0_i1 and c1_i1 > c1_i0
    for name, right in zip(want, (text, image, text and image), strict=True):
      want[name] += right / 500
  assert estimate.metrics == pytest.approx(want)
  random, _ = compositionality.score_items(
    rng.uniform(size=(20_000, 2, 2)), data
  )
  assert random.metrics == pytest.approx(chance, abs=0.02)
