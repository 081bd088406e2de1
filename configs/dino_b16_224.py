"""After DINOv2 (Oquab et al. 2023), ViT-B/16 at 224 pixels: images alone.

Command, on every host:

  python -m mtv_jax.main --config=configs/dino_b16_224.py \
    --config.data.train[0].path='/data/images/{00000..01023}.tar' \
    --workdir=/data/runs/dino_b16 --distributed

Hardware and time: batch 1,024 is sized for 16 chips. Not trained to completion
here; no time given.

Deviations from DINOv2: a constant weight decay (theirs rises from 0.04 to 0.4),
no drop path, no layer-wise learning-rate decay, Sinkhorn, and a separate iBOT
head (as its large models have).

Expected: no direct comparison: the released DINOv2 ViT-B/14 (82.1 % k-NN on
ImageNet) is distilled from a giant model trained on 142 million images.

`:tiny` shrinks the recipe to a minute on a laptop CPU, on the built-in scenes.
"""

from ml_collections import ConfigDict

from mtv_jax.config.schema import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, tiny=False, batch=0, res=224, variant="B")

  config = ConfigDict()
  config.seed = 0
  config.batch_size = arg.batch or (16 if arg.tiny else 1024)
  config.total_steps = 125_000

  config.data = dict(
    train=[
      dict(
        type="webdataset",
        path="/data/images/{00000..01023}.tar",
        captions="ignored",
      )
    ],
    ops="decode|canvas(384)",
  )
  config.views = views(arg.res, local=96, patch=16)
  config.model = dict(
    variant=f"{arg.variant}/16",
    image_size=arg.res,
    pool="cls",
    layer_scale=1e-5,
    dtype="bfloat16",
    remat="none",
  )

  config.objectives = dict(
    distillation=dict(weight=1.0, koleo_weight=0.1, prototypes=65_536),
    masked_latent=dict(weight=1.0, prototypes=65_536),
  )
  config.teacher = dict(momentum=0.992, end=1.0)
  config.weights = "teacher"  # DINOv2 evaluates and releases it.

  config.optim = dict(
    name="adamw",
    lr=4e-3,
    lr_per_examples=1024,
    lr_scaling="sqrt",
    weight_decay=0.04,
    clip_norm=3.0,
    # DINOv2's multiplier of the patch embedding.
    rules=[("patch_embed", dict(lr=0.2))],
  )
  config.schedule = dict(name="cosine", warmup_percent=10)
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.checkpoint = dict(every_steps=1000, keep=2, keep_every=25_000)
  config.log = dict(every_steps=100)

  if arg.tiny:
    head = dict(prototypes=64, hidden=64, bottleneck=32, chunk=None)
    config.update(
      total_steps=40,
      data=dict(train=[dict(type="scenes", size=40)], ops="decode|canvas(40)"),
      views=views(32, local=16, patch=8),
      model=dict(variant="mu/8", image_size=32, dtype="float32"),
      objectives=dict(distillation=head, masked_latent=head),
      log=dict(every_steps=10),
    )
  return config


def views(size, local, patch):
  """Two global crops, unequal in blur and solarisation; eight local.

  Blur with the probabilities that DINOv2 was trained with, see `blur`.
  """
  colours = "flip|jitter(0.8)|grey(0.2)"
  crop = f"crop({size}, 0.32, 1.0)|{colours}"
  blocks = f"blocks(0.1, 0.5, p=0.5, patch={patch})"
  return {
    "global": dict(
      count=2,
      ops=[
        f"{crop}|{blocks}",
        f"{crop}|blur(0.9)|solarize(0.2)|{blocks}",
      ],
    ),
    "local": dict(
      count=8, ops=f"crop({local}, 0.05, 0.32)|{colours}|blur(0.5)"
    ),
  }
