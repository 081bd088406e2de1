"""After DINOv2's recipe, ViT-B/16 at 224 pixels: images alone.

Command, on every host:

  python -m mtv_jax.main --config=configs/dino_b16_224.py \
    --config.data.train[0].path='/data/images/{00000..01023}.tar' \
    --workdir=/data/runs/dino_b16 --distributed

Hardware and time: batch 1,024 is meant for 16 chips. Not trained to the end
by us, so no time is given.

Ours and not DINOv2's: a constant weight decay (theirs rises from 0.04 to 0.4),
no drop path, no decay of the rate by layer, Sinkhorn and a head of iBOT's own
(as its large models have).

Expected: nothing to compare with directly: the released DINOv2 ViT-B/14 (82.1 %
k-NN on ImageNet) was distilled from a giant trained on 142 million images.

`:tiny` trains the same recipe, shrunk, on the built-in scenes in a minute on a
laptop's CPU.
"""

from ml_collections import ConfigDict

from mtv_jax.config.schema import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, tiny=False, batch=0, res=224, variant="B")
  size, local, canvas = (32, 16, 40) if arg.tiny else (arg.res, 96, 384)
  shape, patch = ("mu", 8) if arg.tiny else (arg.variant, 16)

  config = ConfigDict()
  config.seed = 0
  config.batch_size = arg.batch or (16 if arg.tiny else 1024)
  config.total_steps = 40 if arg.tiny else 125_000

  config.data = dict(
    train=[
      dict(type="scenes", size=canvas)
      if arg.tiny
      else dict(
        type="webdataset",
        path="/data/images/{00000..01023}.tar",
        captions="ignored",
      )
    ],
    ops=f"decode|canvas({canvas})",
  )

  # DINOv2's two global crops differ in blur and solarisation.
  colours = "flip|jitter(0.8)|grey(0.2)"
  crop = f"crop({size}, 0.32, 1.0)"
  blocks = f"blocks(0.1, 0.5, p=0.5, patch={patch})"
  config.views = {
    "global": dict(
      count=2,
      ops=[
        f"{crop}|{colours}|blur(1.0)|{blocks}",
        f"{crop}|{colours}|blur(0.1)|solarize(0.2)|{blocks}",
      ],
    ),
    "local": dict(
      count=8, ops=f"crop({local}, 0.05, 0.32)|{colours}|blur(0.5)"
    ),
  }
  config.model = dict(
    variant=f"{shape}/{patch}",
    image_size=size,
    pool="cls",
    layer_scale=1e-5,
    dtype="float32" if arg.tiny else "bfloat16",
    remat="none",
  )

  prototypes = (
    dict(prototypes=64, hidden=64, bottleneck=32, chunk=None)
    if arg.tiny
    else dict(prototypes=65_536)
  )
  config.objectives = dict(
    distillation=dict(weight=1.0, koleo_weight=0.1, **prototypes),
    masked_latent=dict(weight=1.0, **prototypes),
  )
  config.teacher = dict(momentum=0.992, end=1.0)

  # 4e-3 at batch 1,024, scaled by the root of the batch.
  config.optim = dict(
    name="adamw",
    lr=4e-3 * (config.batch_size / 1024) ** 0.5,
    weight_decay=0.04,
    clip_norm=3.0,
    # DINOv2 has the patch embedding learn at a fifth.
    rules=[("patch_embed", dict(lr=0.2))],
  )
  config.schedule = dict(name="cosine", warmup_percent=10)
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.checkpoint = dict(every_steps=1000, keep=2, keep_every=25_000)
  config.log = dict(every_steps=10 if arg.tiny else 100)
  return config
