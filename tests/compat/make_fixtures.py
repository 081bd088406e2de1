"""Writes `fixtures.tar.xz`, which `test_compat.py` opens.

It was written with commit c3dc661, whose names of modules and tests it uses:

  cd CHECKOUT && python TESTS/compat/make_fixtures.py FOLDER
  tar -C FOLDER --sort=name -cf - . | xz -9e > TESTS/compat/fixtures.tar.xz

The runs are very small. Each has only the checkpoint of step 2, and what
the following twenty updates logged:

  all     nine objectives, frozen teachers, EMA, statistics, tars with label
          sets, gradient accumulation, evaluations
  METHOD  three objectives, balanced by each of the methods
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

HERE = pathlib.Path(__file__).resolve().parent
SAVED, STEPS = 2, 22
SIZE, RECORDS, PER_SHARD = 16, 8, 5
TIMES = ("speed/", "goodput/")  # Time-dependent metrics.
# Runs with a balancing method, and further settings. Only one run has Adam:
# moments can't be compressed.
_SGD = dict(name="sgd", lr=0.03, momentum=0.9)
METHODS = {
  "grad_norm_mean": dict(optim=dict(name="adamw", lr=3e-3, weight_decay=0.1)),
  "uncertainty": dict(optim=_SGD, ema=dict(decay=0.9)),
  "gradnorm": dict(optim=dict(name="adafactor", lr=3e-3)),
  "pcgrad": dict(optim=_SGD),
}

_TOWER = dict(width=4, heads=1, mlp_dim=8)
_COLOURS = "flip|jitter(0.8)|grey(0.2)"
_PROTOTYPES = dict(
  prototypes=8, hidden=8, bottleneck=4, teacher_temp=0.04, chunk=4,
  freeze_last_layer_percent=30.0,
)  # fmt: skip
_DECODER = dict(decoder_width=4, decoder_depth=1, decoder_heads=1)
_SCENES = dict(type="scenes", size=SIZE, length=100)
BALANCED = dict(
  seed=5,
  batch_size=4,
  total_steps=STEPS,
  data=dict(train=[_SCENES], ops="decode|canvas(16)|caption(12)"),
  views={
    "image": dict(count=1, ops="resize(16)"),
    "global": dict(count=2, ops=f"crop(16, 0.4, 1.0)|{_COLOURS}"),
    "mae": dict(count=1, ops="crop(16, 0.4, 1.0)|keep(0.5, patch=4)"),
  },
  model=dict(
    variant="mu/4", image_size=16, depth=1, dtype="float32", **_TOWER,
    text=dict(
      variant="mu", depth=1, length=12, tokenizer="words", vocab_size=144,
      **_TOWER,
    ),
  ),
  objectives=dict(
    contrastive=dict(init_bias=-2.0),
    distillation=dict(weight=0.5, view_local=None, **_PROTOTYPES),
    masked_pixels=dict(weight=0.5, **_DECODER),
  ),
  schedule=dict(name="cosine", warmup_steps=2),
  checkpoint=dict(every_steps=SAVED, keep=STEPS),
  log=dict(every_steps=1, trackers="jsonl"),
)  # fmt: skip
ALL = dict(
  BALANCED,
  seed=3,
  batch_size=8,
  accumulate=2,
  data=dict(
    train=[
      dict(
        type="webdataset",
        path="shards/*.tar",
        labels=dict(
          depth="labels/depth",
          boxes=dict(path="labels/boxes", join="key"),
          features=dict(cached="labels/features"),
        ),
      ),
      dict(_SCENES, first=500, weight=0.5),
    ],
    ops="decode|canvas(16)|caption(12)|depth(8)|"
    "regions(2, phrase_length=6)|features",
  ),
  views={
    "image": dict(count=1, ops="resize(16)"),
    "global": dict(
      count=2, ops=f"crop(16, 0.4, 1.0)|{_COLOURS}|blocks(0.2, 0.5, patch=4)"
    ),
    "local": dict(count=2, ops=f"crop(8, 0.1, 0.4)|{_COLOURS}"),
    "mae": dict(count=1, ops="crop(16, 0.4, 1.0)|flip|keep(0.5, patch=4)"),
  },
  model=dict(
    variant="mu/4", image_size=16, depth=2, dtype="float32", pool="cls",
    registers=1, layer_scale=0.1, drop_path=0.1, **_TOWER,
    text=dict(
      variant="mu", depth=1, length=12, tokenizer="exported/tokenizer.json",
      vocab_size=144, **_TOWER,
    ),
  ),
  teachers=dict(
    frozen=dict(path="exported"),
    cached=dict(path="exported", cached="int8"),
    gram=dict(update_every_steps=6),
  ),
  objectives=dict(
    contrastive=dict(loss_type="softmax"),
    distillation=dict(weight=0.5, target="centering", **_PROTOTYPES),
    masked_latent=dict(
      weight=dict(value=0.5, start_steps=1, ramp_steps=4),
      target="centering",
      **_PROTOTYPES,
    ),
    masked_pixels=dict(weight=0.5, **_DECODER),
    depth=dict(weight=0.5, features=4, channels=(4, 4, 4, 4), head_features=4),
    grounding=dict(
      regions=2, pick="score", regression=0.5, attention_heads=1, init_bias=-4.0
    ),
    gram=dict(weight=dict(value=0.5, start_steps=4)),
    captioning=dict(weight=0.5, bins=4, chunk=64, regions=2),
    feature_distillation=dict(weight=0.5, normalize="whiten", hidden=4),
  ),
  teacher=dict(momentum=0.9, end=1.0),
  interference=dict(every_steps=8),
  optim=dict(
    **_SGD, weight_decay=1e-3, weight_decay_end=2e-3, clip_by="module",
    rules=[
      ("text/", dict(lr=0.5)),
      ("image/position_embedding", dict(lr=0.0)),
    ],
  ),
  evals=dict(
    zero_shot=dict(type="zero_shot", count=16),
    knn=dict(type="knn", count=16, k=(1, 5), train_count=16),
    grounding=dict(type="grounding", count=8),
    relative_depth=dict(type="relative_depth", count=8, weights="teacher"),
  ),
)  # fmt: skip


def run(*arguments: str, **env: str) -> str:
  """Runs Python in the current folder; returns its output."""
  done = subprocess.run(
    [sys.executable, *arguments],
    env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
    capture_output=True,
    text=True,
  )
  if done.returncode:
    sys.exit(f"{arguments}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
  return done.stdout


def write_annotated_images(folder: pathlib.Path) -> None:
  """Scenes as image files with captions, depth images and COCO instances."""
  from mtv_jax.data import registry

  scenes = registry.build_source(
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
    # Record 3 lacks depth, record 5 an entry in the boxes, and record 6 has
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


def write_labels(tools: pathlib.Path) -> None:
  """Tars, and a label set of each kind."""
  with tempfile.TemporaryDirectory() as scratch:
    write_annotated_images(pathlib.Path(scratch))
    run(
      f"{tools}/make_shards.py", f"{scratch}/images", "--output=shards",
      f"--records_per_shard={PER_SHARD}",
    )  # fmt: skip
    run(
      f"{tools}/make_labels.py", "depth", "--data=shards/*.tar",
      "--output=labels/depth", f"--depth_dir={scratch}/depth", "--metric",
      "--scale=1000", "--side=8",
    )  # fmt: skip
    run(
      f"{tools}/make_labels.py", "boxes", "--data=shards/*.tar",
      "--output=labels/boxes", f"--instances={scratch}/instances.json",
    )  # fmt: skip
  run(
    f"{tools}/label.py", "--expert=features", "--weights=exported",
    "--data=shards/*.tar", "--output=labels/features", "--canvas=16",
    "--format=int8",
  )  # fmt: skip


def train(name: str, config: dict) -> dict[str, list[dict]]:
  """Trains a run; leaves it as if killed after `SAVED`.

  Returns later rows of its logs, by file.
  """
  folder = pathlib.Path("runs", name)
  with tempfile.TemporaryDirectory() as scratch:
    recipe = pathlib.Path(scratch, "recipe.py")
    recipe.write_text(
      "import ml_collections\n"
      f"def get_config(arg=None): return ml_collections.ConfigDict({config!r})"
    )
    run("-m", "mtv_jax.main", f"--config={recipe}", f"--workdir={folder}")
  logs = {}
  for path in sorted(folder.glob("*.jsonl")):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    early = [json.dumps(row) for row in rows if row["step"] <= SAVED]
    path.write_text("".join(f"{line}\n" for line in early))
    logs[path.name] = [
      {k: v for k, v in row.items() if not k.startswith(TIMES)}
      for row in rows
      if row["step"] > SAVED
    ]
  for path in (folder / "checkpoints").iterdir():
    if path.name != str(SAVED):
      shutil.rmtree(path)
  for path in [
    *folder.glob(".lock*"),
    *folder.glob("report*"),
    folder / "alive",
  ]:
    path.unlink(missing_ok=True)
  for name in ("evals", "charts"):
    shutil.rmtree(folder / name, ignore_errors=True)
  compact(folder / "checkpoints" / str(SAVED) / "state")
  return logs


def compact(item: pathlib.Path) -> None:
  """Rewrites the store of a checkpoint as one uncompressed file.

  It has many superseded nodes, and an archive of compressed nodes
  is larger.
  """

  def open_store(**config):
    spec = {"driver": "ocdbt", "base": f"file://{item.absolute()}/", **config}
    return ts.KvStore.open(spec).result()

  store = open_store()
  values = {key: store[key] for key in store.list().result()}
  for name in ("d", "ocdbt.process_0"):
    shutil.rmtree(item / name)
  (item / "manifest.ocdbt").unlink()
  config = dict(compression=None, max_inline_value_bytes=1 << 20)
  store = open_store(config=config)
  with ts.Transaction() as transaction:
    for key, value in values.items():
      store.with_transaction(transaction)[key] = value
  assert {key: store[key] for key in store.list().result()} == values


def main(out: pathlib.Path) -> None:
  """Writes everything into a new folder."""
  checkout = pathlib.Path.cwd()
  tools = checkout / "tools"
  sys.path[:0] = [str(checkout), str(HERE.parent)]
  from compat import test_compat
  from xla_options import xla_flags

  os.environ["PYTHONPATH"] = str(checkout)
  os.environ["XLA_FLAGS"] = xla_flags(devices=1, exact=True)
  out.mkdir(parents=True)
  os.chdir(out)
  logs = {}
  for method, settings in METHODS.items():
    balance = dict(method=method)
    if method.startswith("grad"):
      balance["every_steps"] = 5
    logs[method] = train(method, {**BALANCED, **settings, "balance": balance})
  run(f"{tools}/convert.py", "to_hf", "runs/pcgrad", "exported")
  write_labels(tools)
  logs["all"] = train("all", ALL)
  run(f"{tools}/evaluate.py", *test_compat.EVALUATE, "--json=results.json")
  for pattern in ("shards/*.index", "labels/*/keys-*.npy"):
    for path in pathlib.Path().glob(pattern):
      path.unlink()
  pathlib.Path("logs.json").write_text(json.dumps({"logs": logs}))
  run(str(HERE / "test_compat.py"), PYTHONPATH=os.pathsep.join(sys.path[:2]))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]).resolve())
