"""Distils a released encoder into a smaller ViT, on images alone.

The teacher is a Hugging Face hub model, a folder or a run (docs/conversion.md),
the data are a folder of photos or shards:

  python -m mtv_jax.main --workdir=runs/small \
    --config=configs/distill.py:teacher=ORG/NAME,data=PHOTOS,student=S/16

The student learns the teacher's pooled vector and patches through adaptors
(AM-RADIO, with PHI-S); both see the same random crop. `mtv-jax convert to_hf`
exports the student for transformers' Dinov2Model. The evaluation `drift`
compares its nearest neighbours with the teacher's on 256 of the photos, without
labels; val=PATH or imagenet=PATH adds evaluations with labels.

`res` is the student's image size; the teacher sees its own. `epochs` or `steps`
set the length. The values are our choice.

Hardware: one 16 GB accelerator for S/16 and a B/14, untested.

`:tiny` distils an untrained ViT on the built-in scenes.
"""

from ml_collections import ConfigDict

from mtv_jax.config.recipes import parse_arg
from mtv_jax.utils.errors import ConfigError


def get_config(arg=None):
  defaults = dict(
    tiny=False, teacher="", data="", student="S/16", res=224, batch=128,
    epochs=100.0, steps=0, lr=1e-3, dtype="bfloat16",
  )  # fmt: skip
  text, arg = arg, parse_arg(arg, **defaults)
  if arg.tiny:
    defaults |= dict(teacher="random:mu/8@32", data="scenes", student="mu/8")
    defaults |= dict(res=32, batch=16, steps=20, dtype="float32")
    arg = parse_arg(text, **defaults)
  if not (arg.teacher and arg.data):
    raise ConfigError("distill: pass teacher=ORG/NAME and data=PHOTOS.")

  config = ConfigDict(dict(seed=0))
  config.batch_size = arg.batch
  if arg.steps:
    config.total_steps = arg.steps
  else:
    config.total_epochs = arg.epochs
  canvas = round(1.7 * arg.res)  # About the resolution of the smallest crops.
  source = dict(path=arg.data, captions="ignored")
  if arg.data == "scenes":
    source = dict(type="scenes", size=canvas)
  config.data = dict(train=[source], ops=f"decode|canvas({canvas})")
  crop = f"crop({arg.res}, 0.32, 1.0, method='bicubic')|flip|jitter(0.4)"
  config.views = dict(image=dict(ops=crop))
  config.model = dict(
    variant=arg.student,
    image_size=arg.res,
    pool="cls",
    gelu="exact",
    image_mean=(0.485, 0.456, 0.406),
    image_std=(0.229, 0.224, 0.225),
    dtype=arg.dtype,
  )
  config.teachers = dict(released=dict(path=arg.teacher))
  examples = 64 if arg.tiny else 2048
  config.objectives = dict(
    feature_distillation=dict(
      weight=1.0, statistics_examples=examples, adaptor_eps=1e-5
    )
  )
  config.optim = dict(
    name="adamw", lr=arg.lr, lr_per_examples=1024, lr_scaling="sqrt",
    weight_decay=0.05, clip_norm=3.0,
  )  # fmt: skip
  config.schedule = dict(name="cosine", warmup_percent=5)
  drift = dict(reference=arg.teacher, data=source, at_start=True)
  config.evals = dict(drift=dict(drift, every_percent=10))
  config.checkpoint = dict(every_percent=5, keep=2)
  return config
