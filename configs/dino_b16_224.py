"""DINOv2 on a ViT-B/16: configs/dinov2_l16.py, smaller.

Command, on every host:

  python -m mtv_jax.main --config=configs/dino_b16_224.py \
    --config.data.train[0].path='/data/images/{00000..01023}.tar' \
    --workdir=/data/runs/dino_b16 --distributed

Hardware and time: batch 1,024 is sized for 16 chips. Not trained to completion
here; time unknown.

DINOv2 does not publish a recipe of this size. Values follow the table in
configs/dinov2_l16.py (vitl16_short.yaml) except

  hyper-parameter          vitl16_short    ours
  batch                    2048            1024
  heads of DINO and iBOT   one             two, as in the large models
  targets                  centering       Sinkhorn, as in the large models

Expected: not comparable with the released DINOv2 ViT-B/14 (82.1 % k-NN on
ImageNet), which is distilled from a giant model trained on 142 million images.

`:tiny` shrinks the recipe to a minute on a laptop CPU, on the built-in scenes.
"""

from mtv_jax.config.recipes import parse_arg, read_config


def get_config(arg=None):
  arg = parse_arg(arg, tiny=False, batch=0, res=224, variant="B")
  config = read_config("dinov2_l16", **arg)
  config.objectives.ibot.head = "ibot"
  for objective in config.objectives.values():
    objective.target = "sinkhorn"
  if not arg.tiny:
    config.batch_size = arg.batch or 1024
    config.data.train[0]["path"] = "/data/images/{00000..01023}.tar"
    config.model.remat = "none"
  return config
