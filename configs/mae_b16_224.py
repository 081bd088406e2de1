"""MAE (He et al. 2022), ViT-B/16 at 224 pixels: images alone.

Command, on every host:

  python -m mtv_jax.main --config=configs/mae_b16_224.py \
    --config.data.train[0].path='/data/imagenet/{0000..1023}.tar' \
    --workdir=/data/runs/mae_b16 --distributed

Published values: facebookresearch/mae at efb2a80: PRETRAIN.md,
main_pretrain.py, models_mae.py.

  hyper-parameter         published                      ours
  data                    ImageNet-1k                    user-supplied path
  batch                   4096                           =
  epochs, warm-up         800 or 1,600; 40               =
  rate at batch 256       1.5e-4, linear                 =
  end of the cosine       0                              =
  weight decay            0.05, except biases and norms  =
  Adam, clipping          0.9, 0.95, 1e-8; none          =
  crops                   0.2 to 1.0, bicubic, flips     =
    images                cropped from the file          from a canvas of 448 x
                                                         448 (antialiased)
  pixels                  ImageNet's mean, deviation     =
  visible patches         25 %                           =
  target                  pixels normalised by patch     =
  decoder                 8 blocks of 512, 16 heads      =
  GELU                    exact                          =
  positions               fixed sines                    =
  initialisation          Xavier, tokens 0.02            =
    decoder's q, k, v     as one matrix                  one by one
  precision               float16                        bfloat16

Hardware and time: batch 4,096 is sized for 64 v5e chips. Not trained to
completion here; time unknown.

Expected: the paper's ViT-B, after 1,600 epochs of ImageNet (`:epochs=1600`),
reaches 68.0 % with a linear probe and 83.6 % fine-tuned.

`:tiny` shrinks the recipe to a minute on a laptop CPU, on the built-in scenes.
"""

from ml_collections import ConfigDict

from mtv_jax.config.data_arguments import benchmarks
from mtv_jax.config.recipes import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, tiny=False, batch=0, res=224, variant="B", epochs=800)

  config = ConfigDict()
  config.seed = 0
  config.batch_size = arg.batch or (64 if arg.tiny else 4096)
  config.total_epochs = arg.epochs

  config.data = dict(
    train=[
      dict(
        type="webdataset",
        path="/data/imagenet/{0000..1023}.tar",
        captions="ignored",
      )
    ],
    ops="decode|canvas(448)",
  )
  # The encoder sees only the visible quarter of the patches.
  config.views = dict(mae=dict(count=1, ops=make_ops(arg.res, 16)))
  config.model = dict(
    variant=f"{arg.variant}/16",
    image_size=arg.res,
    pool="cls",
    gelu="exact",
    positions="sincos",
    init="mae",
    image_mean=(0.485, 0.456, 0.406),
    image_std=(0.229, 0.224, 0.225),
    dtype="bfloat16",
    remat="none",
  )
  config.objectives = dict(
    mae=dict(
      weight=1.0,
      norm_pixels=True,
      decoder_width=512,
      decoder_depth=8,
      decoder_heads=16,
    )
  )

  config.optim = dict(
    name="adamw",
    lr=1.5e-4,
    lr_per_examples=256,
    weight_decay=0.05,
    b2=0.95,
    clip_norm=0.0,
    rules=[("(cls|mask)_token$", dict(weight_decay=1.0))],
  )
  config.schedule = dict(name="cosine", warmup_epochs=40)
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.checkpoint = dict(every_steps=1000, keep=2)
  config.log = dict(every_steps=100)

  if arg.tiny:
    config.update(
      total_epochs=None,
      total_steps=100,
      xla_flags="quick",
      data=dict(train=[dict(type="scenes", size=40)], ops="decode|canvas(40)"),
      views=dict(mae=dict(ops=make_ops(32, 8))),
      model=dict(variant="mu/8", image_size=32, dtype="float32"),
      objectives=dict(
        mae=dict(decoder_width=64, decoder_depth=2, decoder_heads=4)
      ),
      schedule=dict(warmup_epochs=None, warmup_percent=5),
      log=dict(every_steps=10),
    )
    return config
  config.evals = benchmarks(config, "imagenet", "ade20k", "nyu")
  # The paper's linear probe of 90 epochs.
  config.evals["mae_probe"] = dict(data="/data/imagenet")
  return config


def make_ops(size, patch):
  return (
    f"crop({size}, 0.2, 1.0, method='bicubic')|flip|keep(0.25, patch={patch})"
  )
