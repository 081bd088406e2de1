"""Fixtures of `test_compat.py`: runs, exports, label sets, a results file.

`fixtures.tar.xz` was written with commit b0a4762 (and the names that modules
had there), through its command lines:

  cd CHECKOUT && python TESTS/compat/make_fixtures.py FOLDER
  tar -C FOLDER --sort=name -cJf TESTS/compat/fixtures.tar.xz .

Two runs of a very small model, each with its checkpoint of step 2 only:

  all      the six objectives on the built-in scenes, AdamW, EMA
  variant  softmax contrast, centering, a shared prototype head, a locator, a
           CLS token and registers, Adafactor, gradient accumulation, rules, a
           tokenizer.json, tars with label sets
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import cv2
import numpy as np
import tensorstore as ts
import tokenizers
from tokenizers import models, pre_tokenizers

STEPS, SAVED = 6, 2
SIZE, RECORDS, PER_SHARD = 32, 8, 5

_TOWER = dict(width=8, heads=2, mlp_dim=16)
_COLOURS = "flip|jitter(0.8)|grey(0.2)"
_PROTOTYPES = dict(
  prototypes=12, hidden=16, bottleneck=8, teacher_temp=0.04, chunk=None
)
ALL = dict(
  seed=3,
  batch_size=8,
  total_steps=STEPS,
  data=dict(
    train=[dict(type="scenes", size=SIZE, length=100)],
    ops="decode|canvas(32)|caption(16)|depth(16)|regions(2, phrase_length=16)",
  ),
  views={
    "image": dict(count=1, ops="resize(16)"),
    "global": dict(
      count=1, ops=f"crop(16, 0.4, 1.0)|{_COLOURS}|blocks(0.2, 0.5, patch=4)"
    ),
    "local": dict(count=2, ops=f"crop(8, 0.1, 0.4)|{_COLOURS}"),
    "mae": dict(count=1, ops="crop(16, 0.4, 1.0)|flip|keep(0.25, patch=4)"),
  },
  model=dict(
    variant="mu/4",
    image_size=16,
    depth=2,
    dtype="float32",
    **_TOWER,
    text=dict(variant="mu", depth=1, length=16, vocab_size=258, **_TOWER),
  ),
  objectives=dict(
    contrastive=dict(init_bias=-4.0),
    distillation=dict(weight=0.5, **_PROTOTYPES),
    masked_latent=dict(weight=0.5, **_PROTOTYPES),
    masked_pixels=dict(
      weight=0.5, decoder_width=8, decoder_depth=1, decoder_heads=2
    ),
    depth=dict(weight=0.5, features=4, channels=(4, 4, 4, 4)),
    grounding=dict(regions=2, init_bias=-4.0),
  ),
  ema=dict(decay=0.9),
  teacher=dict(momentum=0.9),
  optim=dict(name="adamw", lr=3e-4, weight_decay=0.1, b2=0.95),
  schedule=dict(name="cosine", warmup_steps=2),
  evals=dict(
    zero_shot=dict(type="zero_shot", count=16),
    retrieval=dict(type="retrieval", count=16),
    relative_depth=dict(type="relative_depth", count=8),
  ),
  checkpoint=dict(every_steps=SAVED, keep=STEPS),
  log=dict(every_steps=1),
)
VARIANT = dict(
  ALL,
  seed=4,
  accumulate=2,
  data=dict(
    train=[
      dict(
        type="webdataset",
        path="shards/*.tar",
        labels=dict(
          depth="labels/depth", boxes=dict(path="labels/boxes", join="key")
        ),
      ),
      dict(type="scenes", size=SIZE, length=30, first=500, weight=0.5),
    ],
    ops=ALL["data"]["ops"].replace("caption(16)", "caption(16, pick='first')"),
  ),
  views={
    **ALL["views"],
    "global": dict(ALL["views"]["global"], count=2),
  },
  model=dict(
    ALL["model"],
    pool="cls",
    registers=1,
    layer_scale=0.1,
    mlp="swiglu",
    text=dict(ALL["model"]["text"], tokenizer="tokenizer.json", clean="none"),
  ),
  objectives=dict(
    contrastive=dict(loss_type="softmax"),
    distillation=dict(
      weight=0.5, target="centering", koleo_weight=0.1, **_PROTOTYPES
    ),
    masked_latent=dict(
      weight=0.5, head="dino", target="centering", patches="all", **_PROTOTYPES
    ),
    masked_pixels=dict(
      weight=0.5,
      norm_pixels=False,
      decoder_width=8,
      decoder_depth=1,
      decoder_heads=2,
    ),
    depth=dict(
      weight=0.5, taps=(0, 0, 1, 1), features=4, channels=(4, 4, 4, 4), size=8,
      tap_norm="none",
    ),
    grounding=dict(
      regions=2, pick="score", regression=0.5, attention_heads=2, chunk=4,
      stop_text_gradient=True, init_bias=-4.0,
    ),
  ),
  ema=None,
  optim=dict(
    name="adafactor", lr=3e-4, weight_decay=0.1,
    rules=[
      ("text/", dict(lr=0.5)),
      ("image/position_embedding", dict(lr=0.0)),
    ],
  ),
  schedule=dict(
    name="rsqrt", warmup_steps=2, cooldown_steps=1, timescale_steps=10
  ),
  evals=dict(
    knn=dict(type="knn", count=16, k=(1, 5), train_count=16),
    grounding=dict(type="grounding", count=8),
  ),
)  # fmt: skip


def run(*arguments: str) -> None:
  """Runs a command line of the checkout in the current folder."""
  env = {**os.environ, "JAX_PLATFORMS": "cpu"}
  env.pop("XLA_FLAGS", None)
  subprocess.run([sys.executable, *arguments], check=True, env=env)


def write_tokenizer(path: pathlib.Path) -> None:
  """A byte-level BPE without merges, with two special tokens."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  ids = {token: i for i, token in enumerate(["<pad>", "</s>", *alphabet])}
  model = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=[]))
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.add_special_tokens(["<pad>", "</s>"])
  path.write_text(model.to_str())


def write_annotated_images(folder: pathlib.Path) -> None:
  """Scenes as image files with captions, depth images and COCO instances."""
  from mtv_jax.data import registry as sources

  scenes = sources.build_source(
    dict(type="scenes", size=SIZE, length=RECORDS, first=700)
  )
  for name in ("images", "depth"):
    (folder / name).mkdir(parents=True)
  images, annotations, categories = [], [], {}
  for i in range(RECORDS):
    record = scenes[i]
    name = f"scene{i}"
    cv2.imwrite(f"{folder}/images/{name}.png", record["image"][..., ::-1])
    (folder / "images" / f"{name}.txt").write_text(record["captions"][0])
    # Record 3 has no depth, record 5 no entry among the boxes, and record 6
    # an entry without a box.
    if i != 3:
      metres = np.divide(
        1, record["depth"], where=record["depth"] > 0,
        out=np.zeros_like(record["depth"]),
      )  # fmt: skip
      millimetres = np.clip(np.rint(1000 * metres), 0, 65535)
      cv2.imwrite(f"{folder}/depth/{name}.png", millimetres.astype(np.uint16))
    if i == 5:
      continue
    images.append(dict(id=i, file_name=f"{name}.png", height=SIZE, width=SIZE))
    for box, phrase in zip(record["boxes"], record["phrases"], strict=True):
      if i == 6:
        continue
      y0, x0, y1, x1 = (float(v) * SIZE for v in box)
      category = categories.setdefault(phrase, len(categories) + 1)
      annotations.append(
        dict(
          id=len(annotations), image_id=i, category_id=category,
          bbox=[x0, y0, x1 - x0, y1 - y0], iscrowd=0,
        )
      )  # fmt: skip
  content = dict(
    images=images,
    annotations=annotations,
    categories=[dict(id=i, name=name) for name, i in categories.items()],
  )
  (folder / "instances.json").write_text(json.dumps(content))


def write_labels(tools: pathlib.Path, scratch: pathlib.Path) -> None:
  """Tars, and a label set of each kind."""
  write_annotated_images(scratch)
  run(
    f"{tools}/make_shards.py", f"{scratch}/images", "--output=shards",
    f"--records_per_shard={PER_SHARD}",
  )  # fmt: skip
  run(
    f"{tools}/make_labels.py", "depth", "--base=shards/*.tar",
    "--output=labels/depth", f"--depth_dir={scratch}/depth", "--metric",
    "--scale=1000", "--side=16",
  )  # fmt: skip
  run(
    f"{tools}/make_labels.py", "boxes", "--base=shards/*.tar",
    "--output=labels/boxes", f"--instances={scratch}/instances.json",
  )  # fmt: skip


def train(name: str, config: dict, scratch: pathlib.Path) -> dict:
  """Trains a run; leaves it as if killed after `SAVED`, returns its rows."""
  (scratch / f"{name}.json").write_text(json.dumps(config))
  run(
    "-m", "mtv_jax.main", f"--config=recipe.py:{scratch}/{name}.json",
    f"--workdir={name}",
  )  # fmt: skip
  folder = pathlib.Path(name)
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  early = [line for line in lines if json.loads(line)["step"] <= SAVED]
  (folder / "metrics.jsonl").write_text("".join(f"{x}\n" for x in early))
  for path in (folder / "checkpoints").iterdir():
    if path.name != str(SAVED):
      shutil.rmtree(path)
  for path in [*folder.glob("events.*"), folder / ".lock"]:
    path.unlink()
  remove_unreferenced(folder / "checkpoints" / str(SAVED) / "state")
  return {
    "metrics": [
      {k: v for k, v in row.items() if not k.startswith(("speed/", "goodput/"))}
      for row in rows
      if row["step"] > SAVED
    ]
  }


def read_all(store: pathlib.Path) -> dict[bytes, bytes] | None:
  """Every key and value of an OCDBT store; None if it is damaged."""
  spec = {"driver": "ocdbt", "base": f"file://{store.absolute()}/"}
  try:
    opened = ts.KvStore.open(spec).result()
    return {key: opened[key] for key in opened.list().result()}
  except (ValueError, OSError):
    return None


def remove_unreferenced(store: pathlib.Path) -> None:
  """Removes superseded nodes of the tree, more than half of a small store."""
  values = read_all(store)
  for path in sorted(store.glob("**/d/*")):
    content = path.read_bytes()
    path.unlink()
    if read_all(store) != values:
      path.write_bytes(content)


def main(out: pathlib.Path) -> None:
  """Writes everything into a new folder."""
  checkout = pathlib.Path.cwd()
  tools = checkout / "tools"
  os.environ["PYTHONPATH"] = str(checkout)
  sys.path.insert(0, str(checkout))
  here = pathlib.Path(__file__).resolve().parent
  out.mkdir(parents=True)
  os.chdir(out)
  scratch = pathlib.Path(tempfile.mkdtemp())
  shutil.copy(here / "recipe.py", "recipe.py")
  write_labels(tools, scratch)
  write_tokenizer(pathlib.Path("tokenizer.json"))
  reference = {
    name: train(name, config, scratch)
    for name, config in (("all", ALL), ("variant", VARIANT))
  }
  run(f"{tools}/convert.py", "to_hf", "all", "exported", "--weights=ema")
  run(f"{tools}/convert.py", "from_hf", "exported", "native")
  run(
    f"{tools}/evaluate.py", "--encoder=all", "--encoder=variant",
    "--evals=zero_shot,knn,retrieval", "--count=24", "--json=results.json",
  )  # fmt: skip
  for path in pathlib.Path("shards").glob("*.index"):
    path.unlink()
  pathlib.Path("metrics.json").write_text(json.dumps(reference, indent=1))
  run(f"{here}/reference.py")


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]).resolve())
