"""LiT: trains a text tower against a locked ViT-B/16 (Zhai et al. 2022).

Command, on every host of a TPU pod; `init` is a run, an export or a Hugging
Face folder whose image tower has this shape:

  python -m mtv_jax.main --workdir=/data/runs/lit_b16 --distributed \
    --config=configs/siglip_lit_b16_224.py:init=/data/runs/mtv_b16,\
tokenizer=/data/c4_en.model \
    --config.data.train[0].path='/data/web/{00000..09999}.tar'

Hardware and time: a step runs the image tower's forward pass and trains the
text tower, about half the cost of configs/siglip_b16_224.py, without optimizer
state or saved activations for the image tower; 16 chips suffice. Not trained to
completion here; time unknown.

Expected: with LiT's giant image tower and the sigmoid loss, the published
SigLiT reaches 84.5 % zero-shot on ImageNet after two days on four TPU v4 chips
(Zhai et al. 2023). The image features bound accuracy, so size B reaches less.

`:antialias=False` resizes as in big_vision, in evals too.

`:tiny` shrinks the recipe to a minute on a laptop CPU, on the built-in scenes;
its locked tower has random weights.
"""

from mtv_jax.config.recipes import parse_arg, read_config


def get_config(arg=None):
  arg = parse_arg(
    arg,
    tiny=False,
    batch=0,
    res=224,
    variant="B",
    init="/data/runs/mtv_b16",
    tokenizer="",
    antialias=True,
  )
  init = arg.init
  del arg["init"]
  config = read_config("siglip_b16_224", **arg)
  if not arg.tiny:
    config.batch_size = arg.batch or 16_384
    config.init = dict(path=init, include=("^image/",))
    # Our choice.
    config.total_examples = 1_000_000_000
    config.schedule = dict(name="cosine", warmup_percent=6.5)
  # Locks the image tower: no gradient, no optimizer state.
  config.optim.rules = [("^image/", dict(lr=0.0))]
  return config
