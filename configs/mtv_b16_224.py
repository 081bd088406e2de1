"""MTV ViT-B/16 at 224 pixels: every objective in one step.

Command, on every host of a TPU pod, with label sets of `mtv-jax label` or
`mtv-jax make_labels`:

  python -m mtv_jax.main --workdir=/data/runs/mtv_b16 --distributed \
    --config=configs/mtv_b16_224.py:tokenizer=/data/c4_en.model,\
data=/data/web,depth=/data/web_depth,boxes=/data/web_boxes,\
imagenet=/data/imagenet,coco=/data/coco,nyu=/data/nyu,ade20k=/data/ade20k

Published values: the abstract, the repository Becomebright/MTV at 39af761 and
its model card; rows marked * come from readers' notes on the paper.

  hyper-parameter     published                    ours
  towers              "SigLIP architecture", B/16  SigLIP's: MAP, 64 tokens,
                      at 224; details not stated   32k SentencePiece
  data                100M images, not released    path of the user's
  contrast*           sigmoid, weight not stated   weight 1
  self-supervision*   self-distillation and        DINO and iBOT, weights 1
                      masked prediction
    heads, targets    not stated                   65,536 prototypes, Sinkhorn
    KoLeo             not stated                   0.1 in 64 rows, DINOv2's
    masks, crops      not stated                   half of the patches; 1 global
                                                   crop, 8 local, as SigLIP 2
    momentum          not stated                   0.994, constant as in SILC
  depth               of Depth Anything V2; DPT*   =, weight 1
    loss              not stated                   see objectives/depth.py
  grounding           of OWLv2; prompter of boxes  =, weight 1
                      and the sigmoid loss*
    names of boxes    tags of RAM++                the label set's: a field of
                                                   tags (--phrases=tags)
  weights*            constant, not stated         constant, 1
  optimizer, batch    not stated                   SigLIP's, 16,384; 1B images

Hardware and time: batch 16,384 fits 256 chips of v5e (margins in docs/pods.md;
set `accumulate` on fewer). On the topologies in `TOPOLOGIES`, blocks save most
of their arrays, otherwise none. Not trained to completion here; time unknown.

Expected: the released MTV B/16, trained on 100 million images (epochs are not
published), reaches 69.5 % zero-shot on ImageNet and an RMSE of 0.469 m on
NYUv2 (MTV, Table 5).

`:shared_crop` encodes the whole image once for all objectives, masking patches
of every second image: 79 % of the FLOPs (docs/results.md).

`:tiny` shrinks the recipe to a minute on a laptop CPU, on the built-in scenes;
configs/mtv_tiny.py is the recipe for a CPU.
"""

from mtv_jax.config.data_arguments import benchmarks
from mtv_jax.config.recipes import parse_arg, read_config

# 94 % of the products are useful, 82 % with "full".
_REMAT = "model.remat=full|image=qkv,attention_out,mlp_hidden"
_REMAT += "|local=attention_out,mlp_hidden|text=qkv,attention_out,mlp_hidden"
# Overrides of this recipe by topology, see `recipes.read_settings`.
TOPOLOGIES = {
  "v5e:16x16": ("mesh.fsdp=8", _REMAT),
  "v6e:16x16": (_REMAT,),
  "v5p:4x4x8": (_REMAT,),
}


def get_config(arg=None):
  arg = parse_arg(arg, tiny=False, batch=0, res=224, variant="B", tokenizer="",
                  shared_crop=False)  # fmt: skip
  # Towers, optimizer, evaluations, mesh and tokenizer of SigLIP.
  siglip = {k: v for k, v in arg.items() if k != "shared_crop"}
  config = read_config("siglip_b16_224", **siglip)
  config.batch_size = arg.batch or (16 if arg.tiny else 16_384)
  config.data.ops = ops = "decode|canvas(384)|caption(64)|depth(96)|regions(4)"
  config.data.train[0]["labels"] = dict(
    depth="/data/web_depth", boxes="/data/web_boxes"
  )
  config.views = views(arg.res, local=96, patch=16)

  head = dict(weight=1.0, prototypes=65_536)
  config.objectives = dict(
    # The prior of a pod's batch; see configs/siglip_b16_224.py.
    contrastive=dict(weight=1.0, loss_type="sigmoid", init_bias=-10.0),
    # The student's global crop is masked: it differs from the teacher's input.
    dino=dict(koleo_weight=0.1, same_crop="include", **head),
    ibot=head,
    depth=dict(weight=1.0),
    grounding=dict(weight=1.0, regions=4, init_bias=-10.0),
  )
  if arg.shared_crop:
    share_crop(config, f"resize({arg.res})", patch=16)
  config.teacher = dict(momentum=0.994)  # Constant (SILC).
  # 5,000 steps of the whole recipe.
  config.schedule = dict(name="cosine", warmup_percent=10 if arg.tiny else 8)
  config.checkpoint.keep_every = 20_000

  if arg.tiny:
    head = dict(prototypes=64, hidden=64, bottleneck=32, chunk=None)
    bias = dict(init_bias=-4.0)
    config.update(
      total_steps=40,
      data=dict(
        train=[dict(type="scenes", size=40)],
        ops=ops.replace("canvas(384)", "canvas(40)"),
      ),
      views=views(32, local=16, patch=8),
      objectives=dict(contrastive=bias, dino=head, ibot=head, grounding=bias),
      evals=dict(zero_shot=dict(count=100), retrieval=dict(count=100)),
    )
    if arg.shared_crop:
      share_crop(config, "resize(32)", patch=8)
    config.log.gradients_steps = None
  else:
    config.total_examples = 1_000_000_000
    config.log.gradients_steps = 2000
    names = ("imagenet", "coco", "nyu", "ade20k", "navi", "spair", "davis")
    config.evals = benchmarks(config, *names)
  return config


def earlier_settings(config):
  """Values of earlier versions, which their runs keep."""
  del config
  return ["balance=dict(every_steps=100)"]


def share_crop(config, ops, patch):
  """Makes all objectives read one global crop, computed by `ops`.

  Masks every second image, as DINOv2 does.
  """
  if "image" in config.views:
    del config.views["image"]
  masks = f"blocks(0.1, 0.5, p=0.5, patch={patch})"
  config.views["global"] = dict(count=1, ops=f"{ops}|{masks}")
  config.objectives.contrastive.view = "global"
  for name in ("depth", "grounding"):
    config.objectives[name].update(view="global", allow_masked=True)


def views(size, local, patch):
  """The whole image for text and dense labels, crops for self-supervision.

  One global crop, of which the student sees half of the patches, and eight
  local ones, as in SigLIP 2, with the colours of DINOv2's local crops.
  """
  colours = "flip|jitter(0.8)|grey(0.2)|blur(0.5)"
  blocks = f"blocks(0.5, 0.5, p=1.0, patch={patch})"
  return {
    "image": dict(count=1, ops=f"resize({size})"),
    "global": dict(count=1, ops=f"crop({size}, 0.32, 1.0)|{colours}|{blocks}"),
    "local": dict(count=8, ops=f"crop({local}, 0.05, 0.32)|{colours}"),
  }
