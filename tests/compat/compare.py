"""Two checkouts on the same runs, exports and labels, bit by bit.

  python compare.py --old OLD --new NEW --data FOLDER --work SCRATCH \\
      [--python PYTHON] [--only features,labels] [--runs all,variant]

Each checkout runs in processes of its own, in one Python environment and in a
copy of FOLDER. Whatever they write or return is then compared: equal to the
bit, or the largest differences by name. The exit code is 1 if anything
differs.

FOLDER holds any of: runs (config.json and checkpoints/), exports
(model.safetensors or params.safetensors), shards/*.tar, labels/NAME (label
sets of these shards, KIND read from the manifest), results*.json. Runs that
read files need paths relative to FOLDER.

Checks (--only):
  features   image features of every layer, pooled, text, dense, similarity,
             predictions of heads; every run (student, teacher, ema) and export
  labels     decoded labels, joined by position and by key
  results    results files, read and written into a table again
  evaluate   figures and protocols of tools/evaluate.py on the scenes
  resume     a run resumed from --step (the first checkpoint by default) to
             its end: every logged figure, its evaluations, its last checkpoint
  export     tools/convert.py to_hf and from_hf: tensors and JSON
  label      tools/label.py with a run as the expert: the label set's bytes,
             and --verify of the sets labels/NAME with labels/NAME.args.json,
             the arguments (a JSON list) that made them
  inspect    tools/inspect_labels.py: statistics.json
  scenes     the built-in scenes, every field
"""

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

CHECKS = (
  "features", "labels", "results", "scenes", "export", "evaluate", "label",
  "inspect", "resume",
)  # fmt: skip
EVALS = "zero_shot,knn,retrieval,relative_depth,grounding,patch_pca"
PHRASES = ["a red ball", "two blue boxes on grass", ""]
BOXES = [[(0.1, 0.2, 0.6, 0.9), (0, 0, 1, 1)], [], [(0.5, 0.25, 0.75, 0.5)]]
# Keys of JSON files that hold times, or that name this run of the comparison.
IGNORED = ("seconds", "speed", "goodput", "timing", "hosts", "time")

# ---------------------------------------------------------------------------
# Names that may move. The new ones first.

OPENERS = (
  ("mtv_jax.data.registry", "build_source"),
  ("mtv_jax.data.sources", "build_source"),
  ("mtv_jax.data.sources.registry", "build_source"),
  ("mtv_jax.data.sources.base", "build_source"),
  ("mtv_jax.data.sources.build", "build_source"),
  ("mtv_jax.data", "build_source"),
)
# Name and field of `Encoder.predict`, the method, names of its inputs.
PREDICTIONS = {
  "depth": ("depth", "depth", "depth", ()),
  "regions": ("grounding", "embeddings", "ground", ("boxes",)),
  "boxes": ("locator", "boxes", "locate", ("phrases",)),
}
SPELLINGS = {"--output": ("--output", "--out"), "--data": ("--data", "--base")}


def import_first(candidates: Sequence[tuple[str, str]]) -> Any:
  """The first of several (module, name) that there is."""
  errors = []
  for module, name in candidates:
    try:
      return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
      errors.append(f"{module}.{name}: {error}")
  raise ImportError("\n".join(errors))


def predict(encoder: Any, what: str, *args: Any) -> dict[str, Any]:
  """A head's predictions, by the encoder's method or by `predict`.

  Where the checkout has both ways, they must agree.
  """
  name, field, method, inputs = PREDICTIONS[what]
  found, why = {}, None
  try:
    if hasattr(encoder, method):
      found = dict(leaves(getattr(encoder, method)(*args), what))
    if hasattr(encoder, "predict"):
      given = dict(zip(inputs, args[1:], strict=True))
      other = encoder.predict(name, args[0], **given)
      if not found:
        found = {what: other[field]}
      elif not any(np.array_equal(other[field], v) for v in found.values()):
        raise RuntimeError(f"predict({name!r}) differs from {method}()")
  except (ValueError, KeyError) as error:
    why = error
  if not found:
    print(f"    {what} refused: {why!r}"[:200])
    return {what: np.array("refused")}
  return found


def leaves(value: Any, name: str) -> Iterator[tuple[str, np.ndarray]]:
  """Names and arrays of nested dataclasses, mappings, lists."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
  if isinstance(value, dict):
    for key, item in value.items():
      if str(key) not in IGNORED and str(key).split("/")[0] not in IGNORED:
        yield from leaves(item, f"{name}/{key}")
  elif isinstance(value, list | tuple):
    for i, item in enumerate(value):
      yield from leaves(item, f"{name}/{i}")
  elif isinstance(value, bytes):
    yield name, np.frombuffer(value, np.uint8)
  elif value is None:
    yield name, np.array("None")
  else:
    array = np.asarray(value)
    if array.dtype.name == "bfloat16":
      array = array.view(np.uint16)
    if array.dtype == object:
      array = np.array(repr(value))
    yield name, array


# ---------------------------------------------------------------------------
# One checkout, in its own process: cwd is the copy of the data.


class Side:
  """What one checkout makes of the data."""

  def __init__(self, options: argparse.Namespace):
    self.options = options
    self.checkout = pathlib.Path(options.checkout)
    self.figures: dict[str, np.ndarray] = {}
    chosen = options.runs.split(",") if options.runs else None
    configs = sorted(pathlib.Path().glob("**/config.json"))
    runs = [c.parent for c in configs if (c.parent / "checkpoints").is_dir()]
    self.runs = [r for r in runs if chosen is None or r.name in chosen]
    weights = [
      *pathlib.Path().glob("**/model.safetensors"),
      *pathlib.Path().glob("**/params.safetensors"),
    ]
    self.exports = sorted(path.parent for path in weights)
    self.results_files = sorted(pathlib.Path().glob("*results*.json"))
    self.sets = sorted(
      p.parent for p in pathlib.Path().glob("**/manifest.json")
    )
    self.out = pathlib.Path("out")
    self.out.mkdir(exist_ok=True)

  def add(self, name: str, value: Any) -> None:
    """Notes what is to be compared."""
    self.figures |= dict(leaves(value, name))

  def run(self, check: str) -> None:
    """Runs a check; an error is a figure like others, but never equal."""
    start = time.monotonic()
    try:
      getattr(self, check)()
    except Exception as error:
      traceback.print_exc()
      self.add(f"{check}/ERROR", f"{self.checkout}: {error!r}"[:300])
    print(f"  {check}: {time.monotonic() - start:.0f} s", flush=True)

  def command(self, *arguments: str, codes: Sequence[int] = (0,)) -> str:
    """Runs a command line, flags in the first spelling that is known."""
    spelled = [0] * len(arguments)
    while True:
      line = []
      for n, argument in zip(spelled, arguments, strict=True):
        flag, equals, value = argument.partition("=")
        spellings = SPELLINGS.get(flag, (flag,))
        line.append(spellings[n] + equals + value)
      done = subprocess.run(
        [sys.executable, *line], capture_output=True, text=True
      )
      text = done.stdout + done.stderr
      if done.returncode in codes:
        return text
      for i, argument in enumerate(arguments):
        flag = argument.partition("=")[0]
        more = SPELLINGS.get(flag, ())[spelled[i] + 1 :]
        unknown = f"unrecognized arguments: {line[i]}" in text or (
          "required" in text and any(other in text for other in more)
        )
        if more and unknown:
          spelled[i] += 1
          break
      else:
        raise RuntimeError(f"{line}: exit {done.returncode}\n{text[-3000:]}")

  def tool(self, name: str, *arguments: str, **options: Any) -> str:
    """Runs a script of tools/."""
    return self.command(
      f"{self.checkout}/tools/{name}.py", *arguments, **options
    )

  def source(self, **entry: Any) -> Any:
    """Opens an entry of `data.train`."""
    return import_first(OPENERS)(entry)

  def images(self, count: int = 3) -> list[Any]:
    """Images as bytes (of the tars, if any), or as pixels."""
    if list(pathlib.Path("shards").glob("*.tar")):
      source = self.source(type="webdataset", path="shards/*.tar")
    else:
      source = self.source(type="scenes", size=64, length=10)
    return [source[i]["image"] for i in range(min(count, len(source)))]

  # The checks.

  def features(self) -> None:
    """Encoders: features, texts, predictions."""
    import mtv_jax

    asked = [(e, "student", "float32") for e in self.exports]
    for run in self.runs:
      asked += [(run, w, "float32") for w in ("student", "teacher", "ema")]
      asked.append((run, "student", "bfloat16"))
    images = self.images()
    for path, weights, dtype in asked:
      name = f"features/{path}/{weights}/{dtype}"
      try:
        encoder = mtv_jax.load(path, weights=weights, dtype=dtype)
      except Exception as error:
        print(f"    {name} refused: {error!r}"[:200])
        self.add(f"{name}/refused", "refused")
        continue
      depth = encoder.spec.image.depth
      found = encoder.image(images, layers=range(depth))
      self.add(f"{name}/image", found)
      self.add(f"{name}/protocol", encoder.protocol())
      if dtype == "float32":
        self.add(f"{name}/dense", self._dense(encoder))
      if encoder.spec.text is not None:
        text = encoder.text(PHRASES)
        self.add(f"{name}/text", text)
        self.add(f"{name}/similarity", encoder.similarity(found.pooled, text))
      self.add(name, predict(encoder, "depth", images))
      self.add(name, predict(encoder, "regions", images, BOXES))
      phrases = [PHRASES[:2], [], PHRASES[:1]]
      self.add(name, predict(encoder, "boxes", images, phrases))

  def _dense(self, encoder: Any) -> Any:
    patch = encoder.spec.image.patch_size
    rows, columns = np.mgrid[: 5 * patch, : 3 * patch]
    pixels = np.stack([rows * 3, columns * 5, rows * columns], -1) % 256
    return encoder.dense([pixels.astype(np.uint8)], layers=(0, -1))

  def labels(self) -> None:
    """Decoded labels, joined in both ways."""
    for folder in self.sets:
      kind = json.loads((folder / "manifest.json").read_text())["kind"]
      for join in ("aligned", "key"):
        labels = {kind: {"path": str(folder), "join": join}}
        if join == "key":
          labels[kind]["index_dir"] = "out/indices"
        source = self.source(
          type="webdataset", path="shards/*.tar", labels=labels
        )
        for i in range(len(source)):
          self.add(f"labels/{folder}/{join}/{i}", dict(source[i]))

  def scenes(self) -> None:
    """The built-in scenes."""
    source = self.source(type="scenes", size=48, length=40, first=123)
    for i in range(0, 40, 3):
      self.add(f"scenes/{i}", dict(source[i]))

  def export(self) -> None:
    """Conversion of every run and export."""
    for path in [*self.runs, *self.exports]:
      name = str(path).replace("/", "_")
      for command in ("to_hf", "from_hf"):
        if command == "from_hf" and path in self.runs:
          continue
        out = self.out / f"{command}_{name}"
        said = self.tool("convert", command, str(path), str(out), codes=(0, 1))
        if out.is_dir():
          self.folder(f"export/{command}/{path}", out)
        else:
          self.add(f"export/{command}/{path}", "refused")
          print(f"    {command} {path}: {said.strip().splitlines()[-1][:150]}")

  def evaluate(self) -> None:
    """Figures on the scenes; what an encoder lacks is skipped."""
    names = "all" if self.options.all_evals else EVALS
    for path in [*self.runs, *self.exports]:
      out = self.out / f"evaluated_{str(path).replace('/', '_')}.json"
      self.tool(
        "evaluate", f"--encoder={path}", f"--evals={names}", "--data=scenes",
        f"--count={self.options.count}", f"--json={out}", codes=(0, 1),
      )  # fmt: skip
      found = json.loads(out.read_text())
      self.add(f"evaluate/{path}/evals", found["evals"])
      self.add(f"evaluate/{path}/protocol", found["protocol"])
      lacking = {k: sorted(found[k]) for k in ("skipped", "failed")}
      self.add(f"evaluate/{path}", lacking)

  def results(self) -> None:
    """Results files, read beside a floor; the table's numbers."""
    for path in self.results_files:
      out = self.out / f"table_{path.stem}"
      self.tool(
        "evaluate", "--encoder=pixels:16", "--evals=knn,retrieval",
        "--data=scenes", "--count=24", f"--compare={path}",
        "--set=knn.k=[1]", f"--output={out}", codes=(0, 1),
      )  # fmt: skip
      self.add(f"results/{path}", json.loads(path.read_text()))
      # Rows of the table that name a figure of the file, whatever its layout.
      content = json.loads(path.read_text())
      found = [e["evals"].values() for e in content.get("encoders", [content])]
      metrics = {m for evals in found for e in evals for m in e["metrics"]}
      for line in (out / "results.md").read_text().splitlines():
        words = line.replace("|", " ").replace("*", " ").split()
        if line.startswith("|") and metrics & set(words):
          numbers = [w for w in words if w.replace(".", "").isdigit()]
          name = "/".join(w for w in words if w in metrics)
          self.add(f"results/{path}/{words[0]}/{name}", numbers)

  def label(self) -> None:
    """Label sets of runs as experts, and sets that were made so before."""
    if not list(pathlib.Path("shards").glob("*.tar")):
      return
    for run in self.runs:
      for kind in ("depth", "boxes"):
        out = self.out / f"labels_{run.name}_{kind}"
        more = ["--phrases=ngrams", "--threshold=0.001"]
        said = self.tool(
          "label", f"--expert={kind}", f"--weights={run}",
          "--data=shards/*.tar", f"--output={out}",
          *(more if kind == "boxes" else ["--side=32"]), codes=(0, 1),
        )  # fmt: skip
        if (out / "manifest.json").exists():
          self.folder(f"label/{run}/{kind}", out)
        else:
          self.add(f"label/{run}/{kind}", "refused")
          print(
            f"    label {run} {kind}: {said.strip().splitlines()[-1][:150]}"
          )
    for file in sorted(pathlib.Path().glob("labels/*.args.json")):
      folder = file.with_name(file.name.removesuffix(".args.json"))
      arguments = json.loads(file.read_text())
      said = self.tool("label", *arguments, f"--output={folder}", "--verify=5")
      self.add(f"label/verify/{folder}", said.strip().splitlines()[-1])

  def inspect(self) -> None:
    """Statistics of the label sets."""
    for folder in self.sets:
      kind = json.loads((folder / "manifest.json").read_text())["kind"]
      out = self.out / f"inspected_{folder.name}"
      self.tool(
        "inspect_labels", "--data=shards/*.tar", f"--{kind}={folder}",
        f"--output={out}", "--count=4",
      )  # fmt: skip
      found = json.loads((out / "statistics.json").read_text())
      for note in found.get("look_at", []):
        note.pop("text", None)  # Prose.
      self.add(f"inspect/{folder}", found)

  def resume(self) -> None:
    """Runs resumed with their own resolved config."""
    recipe = self.out / "resolved.py"
    recipe.write_text(
      "import json, pathlib\nfrom ml_collections import ConfigDict\n\n\n"
      "def get_config(arg):\n"
      "  return ConfigDict(json.loads(pathlib.Path(arg).read_text()))\n"
    )
    for run in self.runs:
      out = self.out / f"resumed_{run.name}"
      shutil.copytree(run, out)
      folder = out / "checkpoints"
      steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
      first = self.options.step or steps[0]
      for step in steps:
        if step > first:
          shutil.rmtree(folder / str(step))
      for path in (out / "evals").glob("*.json"):
        path.unlink()
      said = self.command(
        "-m", "mtv_jax.main", f"--config={recipe}:{out}/config.json",
        f"--workdir={out}", *[f"--set={s}" for s in self.options.set],
      )  # fmt: skip
      if "Resumed" not in said:
        raise RuntimeError(f"{run} was not resumed:\n{said[-2000:]}")
      lines = (out / "metrics.jsonl").read_text().splitlines()
      for row in map(json.loads, lines):
        if row["step"] > first:
          kind = "train" if "loss" in row else sorted(row)[0].split("/")[0]
          self.add(f"resume/{run}/step{row['step']}/{kind}", row)
      for path in sorted((out / "evals").glob("*.json")):
        found = json.loads(path.read_text())
        self.add(f"resume/{run}/evals/{path.stem}", found)
      last = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
      self.add(f"resume/{run}/state{last}", read_state(folder / str(last)))
      config = json.loads((out / "config.json").read_text())
      self.add(f"resume/{run}/config", config)

  def folder(self, name: str, folder: pathlib.Path) -> None:
    """Every file of a folder."""
    for path in sorted(folder.rglob("*")):
      if path.is_dir():
        continue
      file = f"{name}/{path.relative_to(folder)}"
      if path.suffix == ".json":
        self.add(file, json.loads(path.read_text()))
      elif path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        self.add(file, load_file(path))
      elif path.suffix in (".npy", ".npz"):
        self.add(file, dict(enumerate([np.load(path)])))
      elif path.name != "README.md":
        self.add(file, path.read_bytes())


def read_state(step: pathlib.Path) -> dict[str, np.ndarray]:
  """Every array of a checkpoint, read without the package."""
  import jax
  import orbax.checkpoint as ocp

  handler = ocp.PyTreeCheckpointHandler()
  item = (step / "state").absolute()
  tree = handler.metadata(item).tree
  restored = handler.restore(
    item,
    args=ocp.args.PyTreeRestore(
      jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), tree),
      restore_args=jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
      ),
    ),
  )
  named = jax.tree_util.tree_flatten_with_path(restored)[0]
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in named}


def run_side(options: argparse.Namespace) -> None:
  """All checks of one checkout, in its process."""
  import mtv_jax

  where = pathlib.Path(mtv_jax.__file__).resolve()
  if options.checkout not in map(str, where.parents):
    raise SystemExit(f"mtv_jax is imported from {where}")
  side = Side(options)
  for check in options.only.split(","):
    side.run(check)
  np.savez(options.figures, **side.figures)


# ---------------------------------------------------------------------------
# Both.


def compare(
  old: dict[str, np.ndarray], new: dict[str, np.ndarray], *, shown: int
) -> bool:
  """Prints what differs, by check; whether all is equal."""
  groups: dict[str, list[str]] = {}
  for name in [*old, *(n for n in new if n not in old)]:
    groups.setdefault(name.split("/")[0], []).append(name)
  same = True
  for check, names in groups.items():
    lines, numbers = [], 0
    for name in names:
      line = difference(old.get(name), new.get(name))
      if name in old:
        numbers += old[name].size
      if line or name.endswith("/ERROR"):
        lines.append((line, name))
    verdict = "EQUAL" if not lines else f"{len(lines)} DIFFER"
    print(f"{check}: {len(names)} arrays, {numbers:,} values: {verdict}")
    for line, name in lines[:shown]:
      print(f"  {name}: {line}")
    if len(lines) > shown:
      print(f"  ... and {len(lines) - shown} more")
    same &= not lines
  return same


def difference(old: np.ndarray | None, new: np.ndarray | None) -> str:
  """How two arrays differ, "" if they don't."""
  if old is None or new is None:
    return f"only in {'new' if old is None else 'old'}"
  if old.shape != new.shape or old.dtype.kind != new.dtype.kind:
    return f"{old.dtype}{list(old.shape)} -> {new.dtype}{list(new.shape)}"
  if old.dtype == new.dtype and old.tobytes() == new.tobytes():
    return ""
  if old.dtype.kind in "US":
    return "" if (old == new).all() else f"{str(old)!r:.90} -> {str(new)!r:.90}"
  if old.dtype != new.dtype:
    return f"{old.dtype} -> {new.dtype}"
  a, b = old.astype(np.float64), new.astype(np.float64)
  equal = (a == b) | (np.isnan(a) & np.isnan(b))
  if equal.all():
    return ""
  gap = np.where(equal, 0, np.abs(a - b))
  scale = max(np.nanmax(np.abs(a)), 1e-30)
  return (
    f"{(~equal).sum()} of {a.size} differ, by {np.nanmax(gap):.3g} at most"
    f" ({np.nanmax(gap) / scale:.2g} of the largest)"
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--old", required=True, help="checkout")
  add("--new", required=True, help="checkout")
  add("--python", default=sys.executable, help="of both")
  add("--data", help="folder of runs, exports, labels; copied")
  add("--work", help="scratch folder, emptied")
  add("--only", default=",".join(CHECKS), help="checks, with commas")
  add("--runs", help="names of runs, with commas; all by default")
  add("--step", type=int, help="checkpoint to resume from")
  add("--set", action="append", default=[], help="override of resumed runs")
  add("--devices", type=int, default=1, help="forced CPU devices")
  add("--count", type=int, default=48, help="images of an evaluation")
  add("--all_evals", action="store_true", help="all evaluations, not six")
  add("--shown", type=int, default=12, help="differences shown of a check")
  add("--parallel", action="store_true", help="both checkouts at once")
  add("--keep", action="store_true", help="reuse the old side's figures")
  add("--checkout", help=argparse.SUPPRESS)
  add("--figures", help=argparse.SUPPRESS)
  options = parser.parse_args(argv)
  if unknown := set(options.only.split(",")) - set(CHECKS):
    parser.error(f"--only: {sorted(unknown)}; there are {', '.join(CHECKS)}")
  if options.checkout:
    run_side(options)
    return 0
  work = pathlib.Path(options.work).resolve()
  sides = {"old": options.old, "new": options.new}
  running = {}
  for side, checkout in sides.items():
    figures = work / f"{side}.npz"
    if side == "old" and options.keep and figures.exists():
      continue
    # The same relative paths in both, as protocols name them.
    copy = work / side
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(options.data, copy)
    checkout = str(pathlib.Path(checkout).resolve())
    flags = f"--xla_force_host_platform_device_count={options.devices}"
    env = {
      **os.environ,
      "PYTHONPATH": checkout,
      "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
      "XLA_FLAGS": flags,
    }
    given = {
      k: v for k, v in vars(options).items()
      if k in ("only", "runs", "step", "devices", "count") and v is not None
    }  # fmt: skip
    arguments = [f"--{k}={v}" for k, v in given.items()]
    arguments += [f"--set={s}" for s in options.set]
    arguments += ["--all_evals"] * options.all_evals
    print(f"{side}: {checkout}", flush=True)
    running[side] = subprocess.Popen(
      [
        options.python, str(pathlib.Path(__file__).resolve()), *arguments,
        f"--checkout={checkout}", f"--figures={figures}",
      ],
      cwd=copy, env=env,
    )  # fmt: skip
    if not options.parallel and running[side].wait():
      return 2
  if any(process.wait() for process in running.values()):
    return 2
  old, new = (dict(np.load(work / f"{side}.npz")) for side in sides)
  same = compare(old, new, shown=options.shown)
  print("All equal to the bit." if same else "They differ.")
  return 0 if same else 1


if __name__ == "__main__":
  sys.exit(main())
