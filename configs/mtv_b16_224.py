"""MTV ViT-B/16 at 224 pixels: every objective in one step.

Command, on every host of a TPU pod, with label sets of `tools/label.py` or
`tools/make_labels.py`:

  python -m mtv_jax.main --workdir=/data/runs/mtv_b16 --distributed \
    --config=configs/mtv_b16_224.py:tokenizer=/data/c4_en.model \
    --config.data.train[0].path='/data/web/{00000..09999}.tar' \
    --config.data.train[0].labels.depth=/data/web_depth \
    --config.data.train[0].labels.boxes=/data/web_boxes

Hardware and time: batch 16,384 fits 256 chips of v5e, 64 images per chip, with
full rematerialisation (margins in docs/pods.md; set `accumulate` on fewer
chips). Not trained to completion here; no time given.

Expected: the released MTV B/16, trained on 100 million images (epochs are not
published), reaches 69.5 % zero-shot on ImageNet and an RMSE of 0.469 m on
NYUv2 (MTV, Table 5). Weights, views, rates and schedule are not published:
values below that are not SigLIP's or DINOv2's are our choice.

`:tiny` shrinks the recipe to a minute on a laptop CPU, on the built-in scenes;
configs/mtv_tiny.py is the recipe for a CPU.
"""

from ml_collections import ConfigDict

from mtv_jax.config.schema import parse_arg


def get_config(arg=None):
  arg = parse_arg(
    arg, tiny=False, batch=0, res=224, variant="B", tokenizer="bytes"
  )

  config = ConfigDict()
  config.seed = 0
  config.batch_size = arg.batch or 16_384
  config.total_examples = 1_000_000_000

  config.data = dict(
    train=[
      dict(
        type="webdataset",
        path="/data/web/{00000..09999}.tar",
        labels=dict(depth="/data/web_depth", boxes="/data/web_boxes"),
      )
    ],
    ops="decode|canvas(384)|caption(64)|depth(128)|regions(4)",
  )
  config.views = views(arg.res, local=96, patch=16)
  config.model = dict(
    variant=f"{arg.variant}/16",
    image_size=arg.res,
    pool="map",
    dtype="bfloat16",
    remat="full",
    text=dict(
      variant=arg.variant,
      length=64,
      # The released model uses SigLIP's 32k SentencePiece model:
      # tokenizer=PATH.model.
      tokenizer=arg.tokenizer,
      clean="canonicalize",
      vocab_size=258 if arg.tokenizer == "bytes" else 32_000,
    ),
  )

  # Constant weights, as MTV describes; equal values are our choice.
  config.objectives = dict(
    # The prior of a pod's batch; see configs/siglip_b16_224.py.
    contrastive=dict(weight=1.0, loss_type="sigmoid", init_bias=-10.0),
    # The student's global crop is masked, so it is not the teacher's input.
    distillation=dict(weight=1.0, same_crop="include", prototypes=65_536),
    masked_latent=dict(weight=1.0, prototypes=65_536),
    depth=dict(weight=1.0),
    grounding=dict(weight=1.0, regions=4, init_bias=-10.0),
  )
  # Constant: beside text, a momentum annealed to 1 keeps the teacher from
  # learning what the text teaches (SILC).
  config.teacher = dict(momentum=0.994)

  config.optim = dict(
    name="adamw", lr=1e-3, weight_decay=0.1, b2=0.95, clip_norm=1.0
  )
  config.schedule = dict(name="cosine", warmup_percent=8)  # 5,000 steps.
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.evals = dict(
    zero_shot=dict(type="zero_shot", every_percent=10),
    retrieval=dict(type="retrieval", every_percent=10),
  )
  config.checkpoint = dict(every_steps=1000, keep=2, keep_every=20_000)
  config.log = dict(every_steps=100, gradients_steps=2000)

  if arg.tiny:
    head = dict(prototypes=64, hidden=64, bottleneck=32, chunk=None)
    config.update(
      batch_size=arg.batch or 16,
      total_examples=None,
      total_steps=40,
      data=dict(
        train=[dict(type="scenes", size=40)],
        ops="decode|canvas(40)|caption(64)|depth(128)|regions(4)",
      ),
      views=views(32, local=16, patch=8),
      model=dict(
        variant="mu/8",
        image_size=32,
        dtype="float32",
        remat="none",
        text=dict(variant="mu"),
      ),
      objectives=dict(
        contrastive=dict(init_bias=-4.0),
        distillation=head,
        masked_latent=head,
        grounding=dict(init_bias=-4.0),
      ),
      schedule=dict(warmup_percent=10),
      evals=dict(
        zero_shot=dict(count=100, every_percent=None),
        retrieval=dict(count=100, every_percent=None),
      ),
      log=dict(every_steps=10, gradients_steps=None),
    )
  return config


def views(size, local, patch):
  """The whole image for text and dense labels, crops for self-supervision.

  One global and eight local crops, as SigLIP 2; colours of DINOv2's local
  crops. The student sees the global crop with half of its patches masked
  (SigLIP 2); DINO and iBOT share that encoding.
  """
  colours = "flip|jitter(0.8)|grey(0.2)|blur(0.5)"
  blocks = f"blocks(0.5, 0.5, p=1.0, patch={patch})"
  return {
    "image": dict(count=1, ops=f"resize({size})"),
    "global": dict(count=1, ops=f"crop({size}, 0.32, 1.0)|{colours}|{blocks}"),
    "local": dict(count=8, ops=f"crop({local}, 0.05, 0.32)|{colours}"),
  }
