"""MTV ViT-L/16 at 256 pixels: configs/mtv_b16_224.py, larger.

Command, on every host of a TPU pod:

  python -m mtv_jax.main --workdir=/data/runs/mtv_l16 --distributed \
    --config=configs/mtv_l16_256.py:tokenizer=/data/c4_en.model \
    --config.data.train[0].path='/data/web/{00000..09999}.tar' \
    --config.data.train[0].labels.depth=/data/web_depth \
    --config.data.train[0].labels.boxes=/data/web_boxes

Hardware and time: batch 16,384 is meant for a pod of 256 chips or more. Not
trained to the end by us, so no time is given.

Expected: the released MTV L/16, trained on 100 million images in an unknown
number of passes, reaches 75.2 % zero-shot on ImageNet and an RMSE of 0.414 m on
NYUv2 (MTV, Table 5).

`:tiny` trains the same recipe, shrunk, on the built-in scenes in a minute on a
laptop's CPU.
"""

import pathlib

from mtv_jax.config import schema as config_lib

BASE = pathlib.Path(__file__).with_name("mtv_b16_224.py")


def get_config(arg=None):
  arg = config_lib.parse_arg(arg, tiny=False, batch=0, tokenizer="bytes")
  config = config_lib.read(
    f"{BASE}:res=256,variant=L,tiny={arg.tiny},batch={arg.batch},"
    f"tokenizer={arg.tokenizer}"
  )
  # Parameters and moments of L don't fit a chip whole beside its activations.
  config.mesh.fsdp = 1 if arg.tiny else 8
  return config
