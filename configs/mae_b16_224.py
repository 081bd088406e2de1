"""MAE's recipe (He et al. 2022), ViT-B/16 at 224 pixels: images alone.

Command, on every host:

  python -m mtv_jax.main --config=configs/mae_b16_224.py \
    --config.data.train[0].path='/data/imagenet/{0000..1023}.tar' \
    --workdir=/data/runs/mae_b16 --distributed

Hardware and time: batch 4,096 is meant for 32 chips. Not trained to the end
by us, so no time is given.

Expected: the paper's ViT-B, after 1,600 epochs of ImageNet (`:epochs=1600`),
gives 68.0 % in a linear probe and 83.6 % fine-tuned.

`:tiny` trains the same recipe, shrunk, on the built-in scenes in a minute on a
laptop's CPU.
"""

from ml_collections import ConfigDict

from mtv_jax.config.schema import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, tiny=False, batch=0, res=224, variant="B", epochs=800)
  size, canvas = (32, 40) if arg.tiny else (arg.res, 448)
  shape, patch = ("mu", 8) if arg.tiny else (arg.variant, 16)

  config = ConfigDict()
  config.seed = 0
  config.batch_size = arg.batch or (64 if arg.tiny else 4096)
  if arg.tiny:
    config.total_steps = 100
  else:
    config.total_epochs = arg.epochs

  config.data = dict(
    train=[
      dict(type="scenes", size=canvas)
      if arg.tiny
      else dict(
        type="webdataset",
        path="/data/imagenet/{0000..1023}.tar",
        captions="ignored",
      )
    ],
    ops=f"decode|canvas({canvas})",
  )
  # The encoder sees the quarter that is kept, and nothing else is computed.
  config.views = dict(
    mae=dict(
      count=1,
      ops=f"crop({size}, 0.2, 1.0)|flip|keep(0.25, patch={patch})",
    )
  )
  # MAE's positions are fixed sines; ours are learnt.
  config.model = dict(
    variant=f"{shape}/{patch}",
    image_size=size,
    pool="cls",
    dtype="float32" if arg.tiny else "bfloat16",
    remat="none",
  )
  decoder = (
    dict(decoder_width=64, decoder_depth=2, decoder_heads=4)
    if arg.tiny
    else dict(decoder_width=512, decoder_depth=8, decoder_heads=16)
  )
  config.objectives = dict(
    masked_pixels=dict(weight=1.0, norm_pixels=True, **decoder)
  )

  config.optim = dict(
    name="adamw",
    lr=1.5e-4 * config.batch_size / 256,
    weight_decay=0.05,
    b2=0.95,
    clip_norm=0.0,
  )
  config.schedule = dict(name="cosine")
  if arg.tiny:
    config.schedule.warmup_percent = 5
  else:
    config.schedule.warmup_epochs = 40
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.checkpoint = dict(every_steps=1000, keep=2)
  config.log = dict(every_steps=10 if arg.tiny else 100)
  return config
