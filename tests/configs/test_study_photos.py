"""The study's photos: their folder, the recipe's batch and evaluations."""

import io
import json
import runpy
import tarfile

import jax
import numpy as np
import PIL.Image
import pytest
from dataset_samples import write_json, write_tar

from mtv_jax.config import recipes
from mtv_jax.data import registry
from mtv_jax.data.pipeline import make_loader
from mtv_jax.data.tokenizers import build_tokenizer
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import preprocess_from_config
from mtv_jax.hooks.evaluation import build_evaluators
from mtv_jax.models import two_tower
from mtv_jax.train.config import resolve
from mtv_jax.utils.errors import ConfigError, InputError

CLASSES = {"n01": ["goldfish", "carp"], "n02": ["beach wagon", "wagon"]}
EVALS = {"zero_shot", "retrieval", "knn", "linear_probe", "few_shot"}
EVALS |= {"grounding", "feature_rank"}


def write_photos(folder):
  """Two tars of training photos and one of validation photos, in miniature."""
  rng = np.random.default_rng(0)
  write_json(folder / "classes.json", CLASSES)
  for name, count in (("train-000", 8), ("train-001", 8), ("val-000", 6)):
    records = {}
    for i in range(count):
      wnid, names = [*CLASSES.items()][i % 2]
      side = "left" if i % 3 else "right"
      pixels = io.BytesIO()
      image = PIL.Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
      image.save(pixels, "JPEG")
      first, second = (
        f"a photo of a {names[0]}",
        f"a {names[0]} at the {side}",
      )
      captions = [first, second, f"a {names[1]}"]
      fields = dict(captions=captions, wnid=wnid, names=names)
      fields["box"] = [0.125, 0.25, 0.5 + i / 32, 0.75]
      content = dict(jpg=pixels.getvalue(), json=json.dumps(fields).encode())
      records[f"{name}{i:03d}"] = content
    write_tar(folder / f"{name}.tar", records)


@pytest.fixture(scope="module")
def photos(tmp_path_factory, repo_root):
  """The recipe's folder."""
  source, output = (tmp_path_factory.mktemp(n) / "data" for n in ("raw", "out"))
  write_photos(source)
  make(repo_root, source, output, "--pieces=24")
  with pytest.raises(ConfigError, match=r"output of `python tools/make_study"):
    recipes.read_config(f"study_photos:path={source}")
  return output


def make(root, source, output, *options):
  tool = runpy.run_path(str(root / "tools" / "make_study_photos.py"))
  assert tool["main"]([str(source), f"--output={output}", *options]) == 0


def test_the_tool_refuses_a_photo_without_its_fields(repo_root, tmp_path):
  tool = runpy.run_path(str(repo_root / "tools" / "make_study_photos.py"))
  fields = dict(names=["cat"], wnid="n1", captions=["cat", "cat at left"])
  inverted = json.dumps(fields | dict(box=[0.5, 0.0, 0.2, 1.0])).encode()
  for photo, error in (
    (dict(json=inverted, jpg=b""), "has a.json and a.jpg"),
    (dict(jpg=b"", json=inverted), "a.json is invalid"),
  ):
    write_tar(tmp_path / "0.tar", {"a": photo})
    with pytest.raises(InputError, match=error):
      list(tool["read_tar"](tmp_path / "0.tar", ["n1"]))


def test_the_tool_reads_tiny_imagenet(repo_root, tmp_path):
  source, output = tmp_path / "raw", tmp_path / "out"
  names = {"n1": "goldfish, carp", "n2": "left out", "n3": "orange"}
  lines = dict(words="".join(f"{k}\t{v}\n" for k, v in names.items()), val="")
  for number, wnid in enumerate(["n3", "n2", "n1"] * 4):
    photo = f"{wnid}_{number}.JPEG"
    for images in (source / "val/images", source / f"train/{wnid}/images"):
      images.mkdir(parents=True, exist_ok=True)
      pixels = np.full((64, 64), 20 * number, np.uint8)
      PIL.Image.fromarray(pixels).save(images / photo)
    with (images.parent / f"{wnid}_boxes.txt").open("a") as boxes:
      boxes.write(f"{photo}\t0\t16\t31\t63\n")
    lines["val"] += f"{photo}\t{wnid}\t0\t0\t63\t63\n"
  (source / "wnids.txt").write_text("n3\nn2\nn1\n")
  (source / "words.txt").write_text(lines["words"])
  (source / "val/val_annotations.txt").write_text(lines["val"])
  make(repo_root, source, output, "--pieces=24")
  entry = recipes.read_config(f"study_photos:path={output}").data.train[0]
  train = registry.build_source(entry)
  assert len(train) == 8
  photos = {
    record["key"]: record for record in map(train.__getitem__, range(8))
  }
  carp = photos["n1_5"]
  np.testing.assert_allclose(carp["boxes"], [[0.25, 0, 1, 0.5]], atol=1e-4)
  assert carp["phrases"] == ["goldfish"]
  assert carp["captions"] == [
    "a goldfish at the left", "a photo of a goldfish", "a carp",
  ]  # fmt: skip
  with PIL.Image.open(io.BytesIO(carp["image"])) as image:
    assert np.asarray(image).shape == (32, 32, 3)
    np.testing.assert_allclose(np.asarray(image), 100, atol=1)
  data, candidates = build_evaluators(
    resolve(recipes.read_config(f"study_photos:path={output}")).evals
  )["zero_shot"]._set
  assert candidates.prompts.classes == ("goldfish", "orange")
  assert sorted(data.labels.tolist()) == [0] * 4 + [1] * 4


def test_the_recipe_reads_boxes_and_captions(photos):
  config = recipes.read_config(f"study_photos:path={photos}")
  tokenizer = build_tokenizer(photos / "tokenizer.model")
  phrases = [
    tokenizer.encode_text(n, 8)[0] for n in ("goldfish", "beach wagon")
  ]
  options = dict(batch_size=16, seed=0, tokenizer=tokenizer)
  with make_loader(config.data.to_dict(), **options) as loader:
    batch = next(loader)
  assert batch["box_valid"].all() and batch["caption_valid"].all()
  # Stored with 16 bits.
  boxes = batch["boxes"][:, 0]
  np.testing.assert_allclose(boxes[:, :2], [[0.125, 0.25]] * 16, atol=1e-4)
  wanted = np.repeat(0.5 + np.arange(8) / 32, 2)
  np.testing.assert_allclose(np.sort(boxes[:, 2]), wanted, atol=1e-4)
  odd = np.rint(boxes[:, 2] * 32).astype(int) % 2
  np.testing.assert_array_equal(
    batch["box_phrase"][:, 0], np.stack(phrases)[odd]
  )


def test_controls_read_labels_that_no_op_reads(photos):
  entry = recipes.read_config(f"study_photos:path={photos}").data.train[0]
  photos_alone = registry.build_source({**entry, **registry.WHOLE})

  def first_record(*fields, **control):
    source = registry.complete_source(
      photos_alone, entry | control, fields=fields
    )
    return source[0]

  plain, unlabelled = first_record("boxes"), first_record()
  assert "phrases" not in unlabelled
  whole = first_record("boxes", whole_image_boxes=True)
  assert whole["phrases"] == plain["phrases"]
  np.testing.assert_array_equal(whole["boxes"], [[0, 0, 1, 1]])
  shuffled = first_record("boxes", shuffled_labels=("boxes",))
  assert shuffled["key"] == plain["key"]
  assert (shuffled["boxes"] != plain["boxes"]).any()
  captions = first_record(phrases_as_captions=True)["captions"]
  assert captions == [*unlabelled["captions"], *plain["phrases"]]


def test_evaluations_read_the_validation_split(photos):
  config = resolve(recipes.read_config(f"study_photos:path={photos}"))
  evaluators = build_evaluators(config.evals)
  assert {*evaluators} == EVALS
  data, candidates = evaluators["zero_shot"]._set
  assert candidates.prompts.classes == ("goldfish", "beach wagon")
  assert data.labels.tolist() == [0, 1] * 3
  captions = evaluators["retrieval"]._set.captions
  assert captions[0] == "a goldfish at the right" and len(captions) == 6
  boxes, _ = evaluators["grounding"]._set
  assert boxes.phrases == (("goldfish",), ("beach wagon",)) * 3
  assert len(evaluators["knn"]._set.train.labels) == 16


@pytest.mark.slow
def test_every_evaluation_runs(photos):
  config = resolve(recipes.read_config(f"study_photos:tiny,path={photos}"))
  spec = config.parts.model
  encoder = Encoder(
    spec,
    two_tower.init_params(spec, jax.random.key(0)),
    preprocess_from_config(config.model, config.views),
    build_tokenizer(photos / "tokenizer.model"),
  )
  for name, evaluator in build_evaluators(config.evals).items():
    metrics = evaluator.run(encoder).metrics
    assert np.isfinite([*metrics.values()]).all(), name


@pytest.mark.slow
def test_the_shared_photos_make_the_folder(shared_data, repo_root, tmp_path):
  source, output = tmp_path / "raw", tmp_path / "out"
  source.mkdir()
  for name in ("classes.json", "train-003.tar", "val-001.tar"):
    if not (file := shared_data / "photos32" / name).is_file():
      pytest.skip("no photos32 in ../shared/data")
    (source / name).symlink_to(file)
  make(repo_root, source, output)
  config = resolve(recipes.read_config(f"study_photos:path={output}"))
  assert config.parts.model.text.vocab_size == 256
  data, candidates = build_evaluators(config.evals)["zero_shot"]._set
  assert len(data.labels) == 2500 and len(candidates.prompts.classes) == 100
  counts = np.bincount(data.labels, minlength=100)
  assert counts.min() > 10
  tool = runpy.run_path(str(repo_root / "tools" / "make_study_photos.py"))
  with tarfile.open(source / "val-001.tar") as tar:
    for member in tar:
      if member.name.endswith(".json"):
        photo = json.load(tar.extractfile(member))
        captions = tool["make_captions"](photo["names"], photo["box"])
        assert captions == photo["captions"]
