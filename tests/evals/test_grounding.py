"""Grounding: metrics of perfect and random encoders, region features, COCO."""

import json

import jax
import numpy as np
import PIL.Image
import pytest
from grounding_samples import COLOURS, Painter
from random_trees import random_leaves, random_params

from mtv_jax.data import tokenizers
from mtv_jax.data.scenes import render as scenes
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import Regions, normalize
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.evals import grounding
from mtv_jax.evals.core.average_precision import average_precision
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.core.examples import BoxSet, LazySequence
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.grounding import GroundingEvaluator
from mtv_jax.models import heads as heads_lib
from mtv_jax.models import two_tower as models
from mtv_jax.objectives import build_objective
from mtv_jax.parallel.mesh import make_mesh


def rows(*paintings):
  """COCO's instances of images, each [(colour, x, y, width, height), ...]."""
  # Ids are not positions, as in COCO.
  ids = {name: 7 + 3 * i for i, name in enumerate(sorted(COLOURS))}
  content = {"categories": [{"id": i, "name": n} for n, i in ids.items()]}
  content |= {"images": [], "annotations": []}
  for i, painting in enumerate(paintings):
    image = {"id": 40 - i, "file_name": f"{i}.png", "height": 20, "width": 40}
    content["images"].append(image)
    content["annotations"] += [
      {
        "image_id": 40 - i,
        "category_id": ids[colour],
        "bbox": box,
        "iscrowd": 0,
      }
      for colour, *box in painting
    ]
  return content


PAINTINGS = (
  [("red", 0, 0, 10, 10), ("green", 20, 4, 16, 12)],
  [],  # Unlabelled.
  [("blue", 4, 4, 8, 16), ("red", 20, 0, 4, 4), ("red", 30, 10, 6, 6)],
)


@pytest.fixture
def coco(tmp_path):
  """COCO's layout in miniature."""
  (tmp_path / "annotations").mkdir()
  (tmp_path / "val2017").mkdir()
  for i, painting in enumerate(PAINTINGS):
    image = np.full((20, 40, 3), 90, np.uint8)
    for colour, x, y, width, height in painting:
      image[y : y + height, x : x + width] = COLOURS[colour]
    PIL.Image.fromarray(image).save(tmp_path / "val2017" / f"{i}.png")
  content = rows(*PAINTINGS)
  crowd = dict(content["annotations"][0], iscrowd=1)
  thin = dict(content["annotations"][0], bbox=[3, 3, 0.5, 9])
  content["annotations"] += [crowd, thin]
  file = tmp_path / "annotations" / "instances_val2017.json"
  file.write_text(json.dumps(content))
  return tmp_path


def test_coco_layout(coco):
  data = registry.open_boxes(coco)
  again = registry.open_boxes(coco / "annotations" / "instances_val2017.json")
  assert data.digest == again.digest
  assert len(data.images) == 2
  assert data.classes == ("blue", "green", "red")
  assert data.phrases == (("red", "green"), ("blue", "red", "red"))
  np.testing.assert_array_equal(data.labels[1], [0, 2, 2])
  np.testing.assert_allclose(
    data.boxes[0], [[0, 0, 0.5, 0.25], [0.2, 0.5, 0.8, 0.9]], atol=1e-6
  )
  assert data.left_out == {"crowds": 1, "thinner than a pixel": 1}
  assert data.dropped == (("red", "red"), ())
  one = registry.open_boxes(coco, count=1)
  assert len(one.images) == 1
  assert one.digest != data.digest


def test_a_perfect_encoder(coco):
  result = GroundingEvaluator(data=str(coco), pictures=2).run(Painter())
  assert result.errors.keys() == result.metrics.keys()
  # Red has three boxes; in the second image the union of two is predicted.
  expected = {
    "region_to_phrase_r1": 1.0,
    "phrase_to_region_r1": 1.0,
    "box_top1": 1.0,
    "box_mean_per_class": 1.0,
    "located_iou50": 3 / 4,
    "located_mean_iou": (3 + 6 * 6 / (16 * 16)) / 4,
  }
  for name, value in expected.items():
    assert result.metrics[name] == pytest.approx(value, abs=1e-6), name
  assert result.chance["region_to_phrase_r1"] == pytest.approx(1 / 3)
  assert result.chance["box_top1"] == pytest.approx(1 / 3)
  # Three of the five regions are red, one is green and one blue.
  assert result.chance["phrase_to_region_r1"] == pytest.approx(
    (3 / 5 + 1 / 5 + 1 / 5) / 3
  )
  protocol = json.loads(json.dumps(result.protocol))
  assert protocol["regions"] == "prompter"
  assert (protocol["boxes"], protocol["phrases_distinct"]) == (5, 3)
  assert result.sheets["regions"].shape[2] == 3


class Guesser(Painter):
  """Random vectors of few values, so that there are ties."""

  predicts = ("grounding",)

  def text(self, strings, *, batch_size=256, length=None):
    rng = np.random.default_rng(5)
    table = {p: rng.integers(-1, 2, 3) for p in sorted(PHRASES)}
    return np.asarray([table[s] for s in strings], np.float32) + 0.1

  def ground(self, images, boxes, *, batch_size=16):
    # Depends only on the box.
    keys = np.asarray(boxes)[..., 0] * 1000
    vectors = [
      [np.random.default_rng(int(k)).integers(-1, 2, 3) + 0.1 for k in row]
      for row in keys
    ]
    out = normalize(np.asarray(vectors, np.float32))
    return Regions(out, np.ones(out.shape[:2], bool))


PHRASES = ("a cup", "a cat", "a kite", "a tie", "a bus")


def test_retrieval_equals_a_loop(monkeypatch):
  rng = np.random.default_rng(6)
  phrases = [tuple(rng.choice(PHRASES, 4)) for _ in range(9)]
  boxes = rng.uniform(0, 0.4, (9, 4, 4)).astype(np.float32)
  data = BoxSet(
    **dict(name="random", digest="0", labels=None, classes=None, left_out={}),
    images=LazySequence(lambda i: np.zeros((8, 8, 3), np.uint8), 9),
    boxes=tuple(boxes),
    phrases=tuple(phrases),
  )
  monkeypatch.setattr(registry, "open_boxes", lambda *args, **kwargs: data)
  result = GroundingEvaluator().run(Guesser())
  assert result.errors.keys() == result.metrics.keys()
  assert not [name for name in result.metrics if name.startswith("box")]

  region = Guesser().ground(None, boxes).embeddings.reshape(36, 3)
  names = [p for each in phrases for p in each]
  distinct = list(dict.fromkeys(names))
  text = normalize(Guesser().text(distinct))
  scores = np.round(region @ text.T, 5)
  assert len(np.unique(scores)) < scores.size / 2, "no ties to decide"
  for k in (1, 5, 10):
    hits = [
      names[a] in [distinct[j] for j in np.argsort(-row, kind="stable")[:k]]
      for a, row in enumerate(scores)
    ]
    assert result.metrics[f"region_to_phrase_r{k}"] == np.mean(hits)
    hits = [
      p in [names[a] for a in np.argsort(-scores[:, j], kind="stable")[:k]]
      for j, p in enumerate(distinct)
    ]
    assert result.metrics[f"phrase_to_region_r{k}"] == np.mean(hits)


def counted(a, b, side=40):
  """IoU by counting cells."""

  def cells(box):
    mask = np.zeros((side, side), bool)
    y0, x0, y1, x1 = np.round(np.asarray(box) * side).astype(int)
    mask[y0:y1, x0:x1] = True
    return mask

  both, either = cells(a) & cells(b), cells(a) | cells(b)
  return both.sum() / max(either.sum(), 1)


def test_ious_equal_counts_of_cells():
  rng = np.random.default_rng(7)
  corners = np.sort(rng.integers(0, 41, (12, 2, 2)), axis=1) / 40
  boxes = corners.reshape(12, 4)
  boxes[3] = boxes[4]
  got = grounding.ious(boxes[:7], boxes[3:])
  want = [[counted(a, b) for b in boxes[3:]] for a in boxes[:7]]
  np.testing.assert_allclose(got, want, atol=1e-12)
  assert grounding.ious(np.zeros((1, 4)), np.zeros((1, 4))) == 0


def test_chance_is_the_best_constant_answer(coco):
  data = registry.open_boxes(coco)
  queries = [tuple(dict.fromkeys(own)) for own in data.phrases]
  answers = grounding.make_constant_answers(data)
  floor = grounding.best_overlaps([answers[:, None]] * 2, queries, data)
  assert floor.shape == (5 + 64, 4)
  for answer, got in zip(answers[::9], floor[::9], strict=True):
    constant = [np.tile(answer, (len(own), 1)) for own in queries]
    want = grounding.best_overlaps(constant, queries, data)
    np.testing.assert_allclose(got, want, atol=1e-12)
  # Each of the set's boxes is the answer to at least its own phrase.
  assert (floor[:5] >= 0.999).any(axis=1).all()


def test_invalid_data_are_rejected(coco, tmp_path):
  with pytest.raises(NotApplicable, match="Grounding reads"):
    registry.open_boxes(str(coco / "val2017"))
  captions = tmp_path / "captions_val2017.json"
  captions.write_text('{"images": [], "annotations": [{"caption": "a"}]}')
  with pytest.raises(NotApplicable, match="instances_"):
    registry.open_boxes(str(captions))
  names = tmp_path / "names.json"
  names.write_text('{"classes": ["a", "b"]}')
  with pytest.raises(ValueError, match="names 2 classes, but the data has 3"):
    GroundingEvaluator(data=str(coco), prompts=str(names)).prepare()


def test_images_of_another_size_are_rejected(coco):
  other = coco / "val2017" / "2.png"
  PIL.Image.new("RGB", (40, 40)).save(other)
  data = registry.open_boxes(coco)
  with pytest.raises(ValueError, match="2.png is 40x40, .* for 20x40"):
    data.images[1]
  other.unlink()
  with pytest.raises(FileNotFoundError, match="1 of 2 files are missing"):
    registry.open_boxes(coco)
  (coco / "val2017" / "0.png").unlink()
  with pytest.raises(FileNotFoundError, match="set images="):
    registry.open_boxes(coco)
  (coco / "annotations" / "instances_val2017.json").unlink()
  with pytest.raises(FileNotFoundError, match="missing  annotations/inst"):
    registry.open_boxes(coco)


def test_real_coco(shared_data):
  data = registry.open_boxes(shared_data / "coco")
  assert len(data.images) == 104
  assert sum(map(len, data.boxes)) == 872
  assert data.left_out["crowds"] == 8
  assert len(data.classes) == 80
  options = dict(data=str(shared_data / "coco"), count=6, locate="none")
  result = GroundingEvaluator(**options).run(Painter())
  assert result.protocol["images"] == 6
  assert result.chance["box_top1"] == 1 / 80
  assert 0 <= result.metrics["box_top1"] < 0.5


def tower(**image):
  shape = {"width": 32, "depth": 1, "heads": 2, "mlp_dim": 64}
  text = {"length": 12, "vocab_size": 258, **shape}
  sizes = {"image_size": 32, "patch_size": 8}
  return models.ModelSpec.from_config(shape | sizes | image | {"text": text})


def build(spec, preprocess=None, params=None, heads=None):
  params, preprocess = params or random_params(spec), preprocess or SQUASH
  tokenizer = tokenizers.build_tokenizer("bytes", clean="lower")
  mesh = make_mesh({"data": -1})
  return Encoder(
    spec, params, preprocess, tokenizer, mesh, prediction_heads=heads
  )


MEAN, SQUASH = tower(pool="mean", projection=16), Preprocess(size=32)


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(9)
  return list(rng.integers(0, 256, (3, 40, 48, 3), np.uint8))


WHOLE = [np.float32([[0, 0, 1, 1]])] * 3


@pytest.mark.parametrize("method", ["pool", "crop"])
def test_a_box_of_the_whole_image_equals_the_image(method, images):
  encoder = build(MEAN)
  got = grounding.embed_regions(encoder, images, WHOLE, method=method)
  want = encoder.image(images, outputs=("pooled",)).pooled
  np.testing.assert_allclose(got, normalize(want), atol=1e-5)


def test_pooled_patches_are_weighted_by_area(images):
  encoder = build(MEAN)
  # Rows 0..1.5 of 4, columns 1..2.
  boxes = [np.float32([[0, 0.25, 0.375, 0.5]])] * 3
  got = grounding.embed_regions(encoder, images, boxes, method="pool")
  patches = encoder.image(images, outputs=("patches",)).patches
  want = (patches[:, 0, 1] + 0.5 * patches[:, 1, 1]) / 1.5
  want = want @ random_params(MEAN)["image"]["projection"]["kernel"]
  np.testing.assert_allclose(got, normalize(want), atol=1e-5)


def test_crops_are_warped_for_every_preprocessing(images):
  boxes = [np.float32([[0.1, 0.5, 0.9, 0.625], [0, 0, 0.01, 0.01]])] * 3
  centred = Preprocess(size=32, resize="shortest", crop="center")
  got = grounding.embed_regions(
    build(MEAN, centred), images, boxes, method="crop"
  )
  encoder = build(MEAN)
  cuts = [images[0][4:36, 24:30], images[0][:1, :1]]
  want = normalize(encoder.image(cuts, outputs=("pooled",)).pooled)
  np.testing.assert_allclose(got[:2], want, atol=1e-5)


def test_native_images_are_squashed(images):
  options = dict(projection=16, position_resize="bilinear_antialiased")
  mean = tower(pool="mean", **options)
  native = Preprocess(32, "native", patch_size=8, max_patches=16)
  boxes = [np.float32([[0.1, 0.5, 0.9, 0.625]])] * 3
  encoders = [build(mean, preprocess) for preprocess in (native, SQUASH)]
  for method in ("pool", "crop"):
    got, want = (
      grounding.embed_regions(encoder, images, boxes, method=method)
      for encoder in encoders
    )
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_protocol_of_the_preprocessing():
  """For an encoder that crops, only mean and standard deviation apply."""
  whole = dict(resize="shortest", crop="center", resize_size=36)
  cropping = Preprocess(size=32, mean=(0.4, 0.5, 0.6), **whole)
  encoder = build(MEAN, cropping)
  evaluator = GroundingEvaluator(count=2, locate="none", regions="pool")
  pooled = evaluator.run(encoder).protocol["preprocess"]
  cropped = grounding.regions_preprocess(encoder, "crop")["preprocess"]
  squashed = {"resize": "squash", "crop": "none", "resize_size": None}
  assert pooled == {**cropping.to_dict(), **squashed, "of": "the whole image"}
  assert cropped == {**cropping.to_dict(), **squashed, "of": "the box's pixels"}
  # The prompter and the encoder read equal inputs.
  prompted = grounding.regions_preprocess(build(MEAN), "prompter")["preprocess"]
  assert prompted == {**SQUASH.to_dict(), "of": "the whole image"}


def test_covered():
  got = grounding.coverage(
    np.float32([0, 0.3, 0.5, 1.0]), np.float32([1, 0.6, 0.5, 1.0]), 4
  )
  np.testing.assert_array_equal(got[0], [1, 1, 1, 1])
  np.testing.assert_allclose(got[1], [0, 0.8, 0.4, 0], atol=1e-5)
  assert (got.sum(axis=1) > 0).all()
  assert got[2].argmax() == 2
  assert got[3].argmax() == 3


def test_resolve(with_heads):
  plain = build(tower())
  assert grounding.resolve_regions(plain, "auto") == "crop"
  assert grounding.resolve_regions(with_heads, "auto") == "prompter"
  with pytest.raises(NotApplicable, match="no prompter.*regions='crop'"):
    grounding.resolve_regions(plain, "prompter")
  with pytest.raises(NotApplicable, match="pools by 'map'"):
    grounding.resolve_regions(plain, "pool")
  with pytest.raises(NotApplicable, match="'mean', then a norm"):
    normed = build(tower(pool="mean", pool_norm=True))
    grounding.resolve_regions(normed, "pool")
  assert grounding.resolve_regions(build(MEAN), "pool") == "pool"


@pytest.fixture(scope="module")
def with_heads():
  """An encoder with prompter and locator."""
  spec = tower()
  entry = {"regression": 1.0}
  objective = build_objective("grounding", entry).resolve(spec, {})
  shapes = {
    name: jax.eval_shape(lambda h=head: h.init(jax.random.key(0), spec))
    for name, head in objective.heads().items()
  }
  params = {**random_params(spec), "heads": random_leaves(shapes, seed=10)}
  heads = heads_lib.heads_of_config({"grounding": entry}, spec)
  return build(spec, params=params, heads=heads)


@pytest.mark.slow
def test_scenes(with_heads):
  result = GroundingEvaluator(count=6, detect=True).run(with_heads)
  assert {"located_iou50", "box_top1", "ap", "ar100"} <= result.metrics.keys()
  assert result.chance["box_top1"] == pytest.approx(1 / len(scenes.CLASS_NAMES))
  assert result.protocol["images"] == 6
  # The boxes belong to scenes beyond any training run.
  want = scenes.render(1_000_000)
  data = registry.open_boxes("scenes", count=6)
  np.testing.assert_array_equal(data.boxes[0], want.boxes)
  assert data.phrases[0] == want.phrases
  for phrase, label in zip(data.phrases[0], data.labels[0], strict=True):
    assert data.classes[label] in phrase


@pytest.mark.reference
def test_average_precision_equals_pycocotools():
  coco = pytest.importorskip("pycocotools.coco")
  cocoeval = pytest.importorskip("pycocotools.cocoeval")
  rng = np.random.default_rng(0)
  images = range(12)

  def draw(count):
    # A coarse grid, so that overlaps and scores tie.
    low = rng.integers(0, 4, (count, 2))
    boxes = np.concatenate([low, low + rng.integers(1, 4, (count, 2))], axis=1)
    return np.float64(boxes), rng.integers(0, 4, count)

  truth = [draw(int(n)) for n in rng.integers(0, 9, len(images))]
  found = [draw(int(n)) for n in rng.integers(0, 20, len(images))]
  scores = [np.round(rng.uniform(size=len(b)), 1) for b, _ in found]

  def rows(i, boxes, labels):
    sides = [[x0, y0, x1 - x0, y1 - y0] for y0, x0, y1, x1 in boxes.tolist()]
    pairs = zip(sides, labels.tolist(), strict=True)
    return [{"image_id": i, "category_id": k, "bbox": b} for b, k in pairs]

  reference = coco.COCO()
  annotations = [row for i in images for row in rows(i, *truth[i])]
  for number, row in enumerate(annotations, start=1):
    area = row["bbox"][2] * row["bbox"][3]
    row |= {"id": number, "area": area, "iscrowd": 0}
  categories = [{"id": k} for k in range(4)]
  reference.dataset = {"images": [{"id": i} for i in images]}
  reference.dataset |= {"annotations": annotations, "categories": categories}
  reference.createIndex()
  results = [row for i in images for row in rows(i, *found[i])]
  for row, score in zip(results, np.concatenate(scores), strict=True):
    row["score"] = float(score)
  run = cocoeval.COCOeval(reference, reference.loadRes(results), "bbox")
  run.evaluate()
  run.accumulate()
  run.summarize()
  pairs = zip(found, truth, strict=True)
  got = average_precision(
    [grounding.ious(d, g) for (d, _), (g, _) in pairs],
    scores,
    [labels for _, labels in found],
    [labels for _, labels in truth],
  )
  want = dict(
    zip(("ap", "ap50", "ap75", "ar100"), run.stats[[0, 1, 2, 8]], strict=True)
  )
  assert got == pytest.approx(want, abs=1e-9) and 0 < got["ap"] < got["ap50"]


def test_detection(coco):
  result = GroundingEvaluator(data=str(coco), detect=True).run(Painter())
  # Of three red boxes one is found, at the first 34 of 101 recalls.
  want = (1 + 1 + 34 / 101) / 3
  assert result.metrics["ap50"] == pytest.approx(want)
  assert result.metrics["ar100"] == pytest.approx((1 + 1 + 1 / 3) / 3)
  with pytest.raises(NotApplicable, match="needs the locator"):
    GroundingEvaluator(data=str(coco), detect=True).run(Guesser())
