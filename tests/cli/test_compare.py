"""The command `compare`, and the resume of `compare` and `evaluate`."""

import functools
import itertools
import json
import os
import random
import time
from unittest import mock

import jax
import numpy as np
import pytest
import trainings

from mtv_jax.cli import evaluate
from mtv_jax.cli.main import run_command
from mtv_jax.convert import huggingface
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.encoder import baselines
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.evals.classification.knn import KNN
from mtv_jax.evals.core import results
from mtv_jax.models import two_tower
from mtv_jax.utils import atomic

ENCODERS = ["coarse=pixels:8/8", "fine=pixels:16/8"]


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
  """Noisy images of two colours in a folder of splits, some mislabelled."""
  from PIL import Image

  root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
  for split, count in (("train", 6), ("val", 10)):
    for label, level in (("dark", 90), ("light", 150)):
      folder = root / split / label
      folder.mkdir(parents=True)
      for i in range(count):
        image = np.clip(rng.normal(level, 60, (12, 12, 3)), 0, 255)
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{i}.png")
  return root


def options(data, output):
  return [
    "--evals=knn",
    f"--data={data}",
    "--set=knn.k=(2,)",
    "--set=knn.view=encoder",
    f"--output={output}",
  ]


def run(*arguments, data, output):
  run_command("compare", [*arguments, *options(data, output)])


@pytest.fixture(scope="module")
def compared(splits, tmp_path_factory):
  output = tmp_path_factory.mktemp("compared")
  run(*ENCODERS, data=splits, output=output)
  return output


def test_report_has_columns_and_paired_differences(compared):
  text = (compared / "report.md").read_text()
  assert "| evaluation | metric | coarse | fine | chance |" in text
  assert "Differences from coarse" in text
  assert "All are paired" in text
  outcomes = results.read(compared / "results.json")
  assert [o.name for o in outcomes] == ["coarse", "fine"]
  assert [o.encoder for o in outcomes] == ["pixels:8/8", "pixels:16/8"]
  folder = compared / "encoders" / "fine"
  assert sorted(p.name for p in folder.iterdir()) == ["knn.json", "knn.npz"]
  settings = json.loads((folder / "knn.json").read_text())["settings"]
  assert settings["encoder"] == "pixels:16/8"
  assert settings["evaluation"]["k"] == [2]


def test_a_new_column_evaluates_only_itself(
  compared, splits, tmp_path, monkeypatch
):
  loaded = []

  def load(path, **options):
    loaded.append(path)
    return baselines.load(path)

  monkeypatch.setattr(evaluate.mtv_jax, "load", load)
  run(*ENCODERS, "pixels:8/4", data=splits, output=compared)
  assert loaded == ["pixels:8/4"]
  header = "| evaluation | metric | coarse | fine | pixels:8/4 | chance |"
  assert header in (compared / "report.md").read_text()


def test_evaluate_repeats_only_what_changed(tmp_path, write_image, monkeypatch):
  for split, colour in itertools.product(("train", "val"), ("red", "blue")):
    write_image(tmp_path / "set" / split / colour / "0.png", colour)
  main = functools.partial(run_command, "evaluate")
  out, ran = tmp_path / "out", []
  argv = ["--encoder=pixels:8/8", "--evals=knn", f"--data={tmp_path}/set"]
  argv += [f"--output={out}", "--set=knn.view=encoder"]

  def count_runs(self, encoder, evaluate=KNN.run):
    ran.append(encoder.source)
    return evaluate(self, encoder)

  monkeypatch.setattr(KNN, "run", count_runs)
  main(argv)
  first = (out / "results.json").read_bytes()
  with monkeypatch.context() as without:
    without.setattr(evaluate.mtv_jax, "load", mock.Mock(side_effect=1))
    main(argv)
  assert (out / "results.json").read_bytes() == first and len(ran) == 1
  # Another option, other pixels in a file below the data's first level, others
  # in the training images alone.
  main([*argv, "--set=knn.temperature=0.5"])
  write_image(tmp_path / "set" / "val" / "red" / "0.png", "white")
  main(argv)
  write_image(tmp_path / "set" / "train" / "red" / "0.png", "white")
  main([*argv, "--features=none"])
  assert len(ran) == 4
  for flag, message in (
    ("--features=gs://a/b", "gs://a/b is in a bucket. Name a folder on a disk"),
    (f"--features={out}/results.json", "results.json is a file"),
  ):
    with pytest.raises(SystemExit, match=message):
      main([*argv, flag])


@pytest.mark.long
def test_ten_kills_change_no_figure_and_repeat_no_evaluation(tmp_path):
  names = ["knn", "few_shot", "logistic", "linear_probe"]
  argv = ["--encoder=random:mu/8@32", "--encoder=pixels:16/8", "--count=40"]
  argv += [f"--evals={','.join(names)}", "--set=linear_probe.steps=40"]
  argv += [f"--set={name}.train_count=120" for name in names]
  code = "from mtv_jax.cli.main import main; main()"

  def start(output):
    arguments = ["-c", code, "evaluate", *argv, f"--output={output}"]
    return trainings.spawn(output, *arguments)

  def files(output):
    found = [*output.glob("encoders/*/*.json"), *output.glob("features/*/*")]
    return {f: f.stat().st_ino for f in found if not atomic.is_temporary(f)}

  whole, killed = tmp_path / "whole", tmp_path / "killed"
  trainings.finish(start(whole), whole)
  seed = int(os.environ.get("MTV_JAX_SEED", time.time_ns()))
  rng = random.Random(seed)
  total, kept = len(files(whole)), {}
  for kill in range(10):
    at = kill * total // 10
    print(f"MTV_JAX_SEED={seed}: kill {kill} after {at} of {total} files")
    process = start(killed)
    with trainings.killing([process]):
      while len(files(killed)) < at and process.poll() is None:
        time.sleep(0.002)
      time.sleep(rng.uniform(0, 0.3 if at else 5))
    # What was complete is neither evaluated nor encoded again.
    assert kept.items() <= files(killed).items()
    kept = files(killed)
  trainings.finish(start(killed), killed)
  assert kept.items() <= files(killed).items() and len(files(killed)) == total
  got, want = (results.read(f / "results.json") for f in (killed, whole))
  for ours, theirs in zip(got, want, strict=True):
    assert list(ours.results) == names
    for name, result in ours.results.items():
      for protocol in (result.protocol, theirs.results[name].protocol):
        del protocol["seconds"]
    assert ours == theirs


def test_earlier_results_of_another_protocol_have_their_own_row(
  compared, splits, tmp_path
):
  earlier = tmp_path / "earlier.json"
  (outcome, *_) = results.read(compared / "results.json")
  outcome.results["knn"].protocol["options"] = {"k": [2], "temperature": 9}
  results.write(earlier, [outcome])
  output = tmp_path / "out"
  run(ENCODERS[0], f"old={earlier}", data=splits, output=output)
  text = (output / "report.md").read_text()
  rows = [line for line in text.splitlines() if "| top1_k2 (" in line]
  value = f"{100 * outcome.results['knn'].metrics['top1_k2']:.2f} ±"
  first, second = ([c.strip() for c in row.split("|")[3:5]] for row in rows)
  assert first[0].strip("*").startswith(value) and first[1] == "-"
  assert second[0] == "-" and second[1].strip("*").startswith(value)
  assert "and rows of their own:" in text
  assert "temperature 9" in text
  # Earlier results alone need no data.
  columns = [f"old={earlier}", f"new={earlier}"]
  run(*columns, data=tmp_path / "none", output=output)
  text = (output / "report.md").read_text()
  assert "| evaluation | metric | old | new | chance |" in text


def test_an_encoder_that_can_not_be_loaded_stops_no_other(splits, tmp_path):
  broken = tmp_path / "broken"
  broken.mkdir()
  (broken / "config.json").write_text('{"model_type": "siglip"}')
  (broken / "model.safetensors").write_bytes(b"cut")
  output = tmp_path / "out"
  with pytest.raises(SystemExit, match=r"knn \(broken\) failed: .*not a comp"):
    run(str(broken), *ENCODERS, data=splits, output=output)
  outcomes = results.read(output / "results.json")
  assert [o.name for o in outcomes] == ["broken", "coarse", "fine"]
  assert [list(o.results) for o in outcomes] == [[], ["knn"], ["knn"]]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["a=pixels:8/8", "a=pixels:16/8"], "two encoders have the name 'a'"),
    (["pixels:8/8", "x=pixels:8/8"], "pixels:8/8 is given twice"),
    (["no/such/folder"], "does not exist"),
    (["pixels:8/8", "no.json"], "no.json"),
    (["pixels:8/8", "--baseline=b"], "--baseline=b: no encoder has this name"),
    (["pixels:8/8", "--evals=knnn"], "Did you mean 'knn'"),
    (["pixels:8/8", "--data=no/data"], "no/data"),
  ],
)
def test_mistakes_are_found_before_anything_runs(
  arguments, message, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "no").mkdir()
  monkeypatch.setattr(KNN, "run", None)
  with pytest.raises(SystemExit, match=f"compare: .*{message}"):
    run_command("compare", ["--evals=knn", *arguments, "--output=out"])
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("command", "file", "output"),
  [
    ("compare", "file", "file/out"),
    ("evaluate", "file", "file/out"),
    ("compare", "out/encoders", "out"),
    ("compare", "out/encoders/coarse", "out"),
  ],
)
def test_an_output_that_is_a_file_is_found_before_anything_runs(
  command, file, output, tmp_path, monkeypatch
):
  path = tmp_path / file
  path.parent.mkdir(exist_ok=True, parents=True)
  path.touch()
  monkeypatch.setattr(KNN, "run", None)
  argv = ["--encoder", ENCODERS[0]] if command == "evaluate" else ENCODERS
  argv = [*argv, "--evals=knn"]
  with pytest.raises(SystemExit, match=f"--output=.*{file} is a file"):
    run_command(
      command, [*argv, "--evals=knn", f"--output={tmp_path}/{output}"]
    )


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_give_the_figures_of_one(splits, tmp_path):
  spec = two_tower.ModelSpec.from_config(
    dict(patch_size=8, image_size=16, width=32, depth=1, heads=2, mlp_dim=32)
  )
  params = jax.device_get(two_tower.init_params(spec, jax.random.key(0)))
  export = huggingface.write(
    tmp_path / "export",
    ConvertedModel(spec, params, Preprocess(size=16).to_dict()),
  )
  encoders = [str(export), ENCODERS[0]]
  one, two = tmp_path / "one", tmp_path / "two"
  run(*encoders, data=splits, output=one)

  def start(output, *arguments):
    code = "from mtv_jax.cli.main import main; main()"
    return trainings.spawn(output, "-c", code, "compare", *arguments)

  # The second run reuses the first run's stored results.
  for _ in range(2):
    with trainings.together(
      two, 2, *encoders, *options(splits, two), start=start
    ) as running:
      for process in running:
        trainings.finish(process, two)
    got, want = (results.read(f / "results.json") for f in (two, one))
    assert [o.name for o in got] == ["export", "coarse"]
    for ours, theirs in zip(got, want, strict=True):
      assert ours.results["knn"].metrics == theirs.results["knn"].metrics
    pages = [(f / "report.md").read_text().splitlines() for f in (two, one)]
    got, want = (
      [line for line in page if not line.startswith("| seconds |")]
      for page in pages
    )
    assert got == want
  assert trainings.log(two).count("reuses the stored result") == 4
