"""MTV ViT-L/16 at 256 pixels: configs/mtv_b16_224.py, larger.

Command, on every host of a TPU pod:

  python -m mtv_jax.main --workdir=/data/runs/mtv_l16 --distributed \
    --config=configs/mtv_l16_256.py:tokenizer=/data/c4_en.model \
    --config.data.train[0].path='/data/web/{00000..09999}.tar' \
    --config.data.train[0].labels.depth=/data/web_depth \
    --config.data.train[0].labels.boxes=/data/web_boxes

Hardware and time: batch 16,384 is sized for 256 or more chips. Not trained to
completion here; time unknown.

Expected: the released MTV L/16, trained on 100 million images (epochs are not
published), reaches 75.2 % zero-shot on ImageNet and an RMSE of 0.414 m on
NYUv2 (MTV, Table 5).

`:shared_crop` encodes the whole image once for all objectives. On the study's
scenes its means of five seeds are worse on every axis, which the masks cause
(docs/study/ladder.md).

`:tiny` shrinks the recipe to a minute on a laptop CPU, on the built-in scenes.
"""

from mtv_jax.config.recipes import parse_arg, read_config


def get_config(arg=None):
  arg = parse_arg(arg, tiny=False, batch=0, tokenizer="", shared_crop=False)
  config = read_config("mtv_b16_224", res=256, variant="L", **arg)
  if not arg.tiny:
    # L's parameters, optimizer state and activations exceed one chip.
    config.mesh.fsdp = 8
  return config
