"""SigLIP ViT-L/16 at 256 pixels: configs/siglip_b16_224.py, larger.

Command, on every host of a TPU pod:

  python -m mtv_jax.main --workdir=/data/runs/siglip_l16 --distributed \
    --config=configs/siglip_l16_256.py:tokenizer=/data/c4_en.model \
    --config.data.train[0].path='/data/web/{00000..09999}.tar'

Hardware and time: batch 32,768 is sized for 128 or more chips. Not trained to
completion here; time unknown.

Expected: the published SigLIP L/16-256 reaches 80.5 % zero-shot on ImageNet
(Zhai et al. 2023, table 3).

`:antialias=False` resizes as in big_vision, in evals too.

`:tiny` shrinks the recipe to a minute on a laptop CPU, on the built-in scenes.
"""

from mtv_jax.config.recipes import parse_arg, read_config


def get_config(arg=None):
  arg = parse_arg(arg, tiny=False, batch=0, tokenizer="", antialias=True)
  config = read_config("siglip_b16_224", res=256, variant="L", **arg)
  if not arg.tiny:
    # L's parameters, optimizer state and activations exceed one chip.
    config.mesh.fsdp = 8
  return config
