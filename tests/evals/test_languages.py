"""Prompts and captions in several languages, as CLIP_benchmark has them."""

import json

import numpy as np
import pytest
from dataset_samples import write_json

from mtv_jax.evals.classification.zero_shot import ZeroShot
from mtv_jax.evals.core.examples import ClassificationSet, open_items
from mtv_jax.evals.core.prompts import read_language_prompts
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.retrieval import Retrieval
from mtv_jax.utils.errors import InputError, MissingFileError

TEXTS = {"red": "rosso", "green": "verde", "blue": "blu"}


@pytest.fixture
def prompts(tmp_path):
  folder = tmp_path / "prompts"
  classes = {"imagenet1k": ["a", "b"], "rgb": ["red", "green", "blue"]}
  write_json(folder / "it_classnames.json", classes)
  templates = {"imagenet1k": ["una foto di {c}.", "{c}"], "b": ["{c}!"]}
  file = folder / "it_zeroshot_classification_templates.json"
  write_json(file, templates)
  babel = {"DE": [[7, 2, 40], ["red", "blue", "green"]]}
  write_json(folder / "babel_imagenet.json", babel)
  write_json(folder / "nllb_dist13b_prompts.json", {"DE": [" {} Foto"]})
  return folder


def test_prompts(prompts):
  given = read_language_prompts(prompts, "it")
  assert given.classes == ("a", "b") and given.labels is None
  # A data set without templates has ImageNet's.
  given = read_language_prompts(prompts, "it", prompt_set="rgb")
  assert given.templates == ("una foto di {}.", "{}")
  assert given.name == "it_classnames.json, rgb"
  with pytest.raises(InputError, match="it_classnames.json.*rgb"):
    read_language_prompts(prompts, "it", prompt_set="rgg")
  with pytest.raises(MissingFileError, match="fr_classnames.json"):
    read_language_prompts(prompts, "fr")
  with pytest.raises(InputError, match="needs prompts="):
    ZeroShot(language="it").prepare()


def test_zero_shot(colours, prompts, tmp_path, write_classes):
  write_classes(tmp_path / "set", 2)
  options = dict(data=str(tmp_path / "set"), prompts=str(prompts))
  result = ZeroShot(language="it", prompt_set="rgb", **options).run(colours)
  assert result.metrics["top1"] == 1
  with pytest.raises(InputError, match="3 of ImageNet's 1000 classes"):
    ZeroShot(language="de", prompt_set="babel_imagenet", **options).prepare()


def test_babel_imagenet(colours, prompts, monkeypatch):
  """Images of other labels are left out, and labels are in the file's order."""
  labels = np.asarray([7, 0, 40, 2, 2, 999], np.int32)
  pixels = {7: (255, 0, 0), 40: (0, 255, 0), 2: (0, 0, 255)}
  images = [np.full((2, 2, 3), pixels.get(i, 9), np.uint8) for i in labels]
  data = ClassificationSet(
    **dict(name="imagenet", digest="0", classes=None, ids=None, labels=labels),
    images=open_items(images, lambda image: image),
  )
  monkeypatch.setattr(registry, "open_classification", lambda *_, **__: data)
  options = dict(language="de", prompt_set="babel_imagenet")
  result = ZeroShot(prompts=str(prompts), **options).run(colours)
  assert result.protocol["images"] == 4 and result.protocol["classes"] == 3
  assert result.metrics["top1"] == 1
  assert result.protocol["templates"] == [" {} Foto"]


def write_xtd(root, folder):
  names = "\n".join(f"{c}.png" for c in TEXTS)
  (root / "XTD10").mkdir(parents=True)
  (root / "XTD10" / "test_image_names.txt").write_text(names)
  (root / folder).mkdir(exist_ok=True)
  text = "\n".join(TEXTS.values())
  (root / folder / "test_1kcaptions_it.txt").write_text(text)
  return root / "images"


def write_crossmodal(root, _):
  lines = [
    json.dumps({"image/key": c, "it": {"caption": [text, f"un {text}"]}})
    for c, text in TEXTS.items()
  ]
  root.mkdir()
  (root / "captions.jsonl").write_text("\n".join(lines))
  return root / "images"


def write_clip_benchmark(root, name):
  # Paths of another machine.
  paths = [f"/data/root/xtd10/images/{c}.png" for c in TEXTS]
  content = {"image_paths": paths, "annotations": [*TEXTS.values()]}
  write_json(root / name, content | {"indices": [0, 1, 2]})
  return root / "xtd10" / "images"


@pytest.mark.parametrize(
  ("write", "argument", "suffix"),
  [
    (write_xtd, "XTD10", "png"),
    (write_xtd, "MIC", "png"),
    (write_crossmodal, "", "jpg"),
    (write_clip_benchmark, "xtd10-it.json", "png"),
  ],
)
def test_captions(tmp_path, write_image, write, argument, suffix):
  folder = write(tmp_path / "set", argument)
  for colour in TEXTS:
    write_image(folder / f"{colour}.png", colour)
    (folder / f"{colour}.png").rename(folder / f"{colour}.{suffix}")
  options = dict(data=str(tmp_path / "set"), language="it", max_captions=1)
  data = Retrieval(**options)._set
  assert data.captions == tuple(TEXTS.values()) and data.language == "it"
  assert list(data.owner) == [0, 1, 2]
  assert data.images[2][0, 0].tolist() == [0, 0, 255]
  with pytest.raises((InputError, ValueError)):
    Retrieval(**{**options, "language": "de"}).prepare()


def test_captions_without_languages(tmp_path):
  with pytest.raises(InputError, match="a language that it does not name"):
    Retrieval(data="scenes", language="de", count=4).prepare()
  write_crossmodal(tmp_path / "set", "")
  with pytest.raises(InputError, match="set language="):
    Retrieval(data=str(tmp_path / "set" / "captions.jsonl")).prepare()
