"""Study recipe on real photos: contrast, self-supervision and grounding.

The study's second data set, after the scenes of configs/study.py: 50,000 photos
of 100 classes at 32 pixels, each with a box, and captions made from class and
box. Depth is missing. `mtv-jax study` compares runs.

Command (docs/study/photos.md says what the photos are and how to get them):

  python tools/make_study_photos.py tiny-imagenet-200 --output=data/photos
  python -m mtv_jax.main --workdir=runs/photos/full \
    --config=configs/study_photos.py:path=data/photos

vl=RUN,dinov2=FOLDER,features=LABELS replaces all objectives by feature
distillation: from a run of this recipe, and from another encoder's features in
a label set, see docs/study/teachers.md.

Evaluates on the 5,000 photos of the validation split. Probes train on 10,000
training photos.

Hardware, time and result: one CPU core, see docs/study/photos.md.
"""

import pathlib

from ml_collections import ConfigDict

from mtv_jax.config.recipes import parse_arg
from mtv_jax.configs import _multi_task
from mtv_jax.configs.study import TERMS, VIEWS
from mtv_jax.utils.errors import ConfigError

SIZE, PATCH = 32, 4


def get_config(arg=None):
  arg = parse_arg(
    arg, tiny=False, path="", tokenizer="", steps=2000, batch=32,
    vl="", dinov2="", features="",
  )  # fmt: skip
  if arg.tiny:
    arg.update(steps=20, batch=16)
  if arg.features and not arg.dinov2:
    raise ConfigError("features= are DINOv2's: pass dinov2=FOLDER, too.")
  tokenizer = "bytes" if arg.tiny else ""
  if arg.path:
    tokenizer = f"{arg.path}/tokenizer.model"
  if arg.path and pathlib.Path(arg.path, "classes.json").is_file():
    raise ConfigError(
      f"path={arg.path} has the original photos: pass the output of"
      f" `python tools/make_study_photos.py {arg.path} --output=FOLDER`."
    )

  config = ConfigDict()
  config.seed = 0
  config.batch_size = arg.batch
  config.total_steps = arg.steps
  config.xla_flags = "quick" if arg.tiny else ""

  folder = arg.path or "data/photos"
  labels = dict(boxes=f"{folder}/boxes/train")
  train = dict(type="webdataset", path=f"{folder}/train/*.tar", labels=labels)
  if arg.tiny and not arg.path:
    train = dict(type="scenes", size=SIZE, length=100)
  ops = f"decode|canvas({SIZE})|caption(20)|regions(1, phrase_length=8)"
  config.data = dict(train=[train], ops=ops)
  tower = dict(width=96, heads=4, mlp_dim=384)
  config.model = dict(
    variant=f"mu/{PATCH}",
    image_size=SIZE,
    pool="map",
    dtype="float32",
    depth=1 if arg.tiny else 4,
    **tower,
    text=dict(
      variant="mu", length=20, tokenizer=arg.tokenizer or tokenizer,
      clean="lower", depth=1, **tower,
    ),
  )  # fmt: skip
  # The settings for scenes, without depth, which the photos lack.
  weights = {k: w for k, w in TERMS["weights"].items() if k != "depth"}
  sizes = dict(size=SIZE, patch=PATCH, crop=(24, 0.4))
  terms = TERMS | dict(weights=weights, regions=1, views=VIEWS | sizes)
  _multi_task.set_terms(config, **terms)
  config.interference = dict(every_steps=100)
  config.evals = evaluations(folder)
  config.checkpoint = dict(every_steps=2000, keep=1)
  config.log = dict(every_steps=200)
  if arg.tiny and not arg.path:
    config.evals = dict(zero_shot=dict(count=100), retrieval=dict(count=100))
  if arg.vl or arg.dinov2:
    distil(config, arg)
  return config


def distil(config, arg):
  """Sets distillation from a run and from features in a label set."""
  ops = f"resize({SIZE})|flip|jitter(0.4)"
  _multi_task.distil(config, dict(vl=arg.vl, dinov2=arg.dinov2), ops)
  if arg.features:
    config.teachers.dinov2.cached = "float8"
    config.data.train[0]["labels"] = dict(features=dict(dinov2=arg.features))
    config.data.ops = f"decode|canvas({SIZE})|features"


def evaluations(folder):
  """Evaluations on the validation split, `test` in the folder."""
  test = f"{folder}/test/*.tar"
  boxes = dict(path=test, labels=dict(boxes=f"{folder}/boxes/test"))
  probe = dict(view="encoder", train_count=10_000)
  evals = dict(
    zero_shot={},
    retrieval=dict(data=test, max_captions=1),  # The boxes' captions.
    knn=probe,
    linear_probe=dict(
      steps=400, rates=(0.01, 0.1, 1.0), blocks=(1,), augment="cached", **probe
    ),
    few_shot=dict(view="encoder"),
    feature_rank=dict(count=256, views=8),
    grounding=dict(data=boxes),
  )
  return {
    name: dict(type=name, data=folder) | entry for name, entry in evals.items()
  }
