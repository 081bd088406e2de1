"""tools/preflight.py: what fits, what does not, and what would."""

import json
import runpy
import subprocess
import sys

import pytest

from mtv_jax.config import schema
from mtv_jax.perf import topologies
from mtv_jax.perf.preflight import measure, pages, program, propose, report

CONFIG = "configs/siglip_b16_224.py:tiny"


def test_a_plan_needs_no_data_and_no_tokenizer(repo_root):
  config = schema.read_config(str(repo_root / CONFIG))
  config.data.train = [dict(type="webdataset", path="/nowhere/{0..9}.tar")]
  config.model.text.tokenizer = "/nowhere/spiece.model"
  plan = program.make_plan(config, topologies.parse("cpu:8"))
  batch = plan.batch()
  assert batch["image"].shape == (64, 32, 32, 3)
  assert batch["image"].sharding.shard_shape((64, 32, 32, 3))[0] == 8
  assert plan.mesh.size == 8


def test_what_is_tried_goes_from_cheap_to_dear(repo_root):
  config = schema.read_config(str(repo_root / CONFIG))
  found = list(propose.candidates(config, 4))
  tried = [candidate.changes for candidate in found]
  assert tried[0] == ("model.remat=full",)
  assert ("model.remat=full", "mesh.fsdp=4") in tried
  assert ("model.remat=full", "mesh.fsdp=8") not in tried
  assert ("model.remat=full", "accumulate=2") in tried
  assert tried[-1] == ("model.remat=full", "batch_size=4")
  assert found[-1].factor == 16


def test_trying_stops_at_what_fits_and_leaves_out_what_can_not(
  repo_root, monkeypatch
):
  """A machine whose memory holds 4 rows a chip, whatever the recipe."""
  compiled = []

  def measured(plan, largest):
    rows = plan.config.batch_size // plan.config.accumulate // plan.mesh.size
    compiled.append(rows)
    refusal = f"required for HLO temporaries ({4 * rows}.00G) exceeds"
    held = measure.Memory(0, 0, 0, 1, None) if rows <= 4 else None
    return measure.Measured(held, "" if held else refusal, (), 0.0, (), 1.0)

  monkeypatch.setattr(propose.measure_lib, "measure", measured)
  config = schema.read_config(
    str(repo_root / "configs/mae_b16_224.py") + ":tiny"
  )
  config.batch_size = 64
  config.model.remat = "full"
  monkeypatch.setitem(
    topologies.GPUS, "L4", topologies.Chip("L4", 16 * 2**30, None, None, 8)
  )
  tried = propose.propose(config, "gpu:1xL4")
  # 64 rows were not measured again, so that nothing is known to be too much.
  assert compiled == [32, 16, 8, 4]
  assert tried[-1].fits and tried[-1].changes == ("accumulate=16",)
  assert "--config.accumulate=16: fits" in str(tried[-1])
  assert tried[0].peak == 128 * 2**30


def test_a_refusal_says_how_much_was_needed():
  text = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, "
    "the total memory required for HLO temporaries (192.00G) exceeds available"
  )
  assert measure.required(text) == 192 * 2**30
  assert measure.required("no number") is None


def test_a_page_keeps_the_rows_that_were_not_compiled():
  rows = pages.ROWS
  old = f"| mtv_b16_224 | {rows[0].topology} | old |"
  text = f"# Pods\n\n{pages.BEGIN}\n{old}\n{pages.END}\nafter\n"
  lines = pages.merge(text, [(rows[1], "| new |")])
  assert lines[2:4] == [old, "| new |"]
  page = pages.replace(text, lines)
  assert page.startswith("# Pods") and page.endswith("after\n")
  assert pages.merge(page, [])[2:4] == [old, ""]
  with pytest.raises(ValueError, match="fits: begin"):
    pages.replace("nothing", lines)


def run(repo_root, *arguments):
  """The command in a process of its own, as it starts JAX its own way."""
  return subprocess.run(
    [sys.executable, "tools/preflight.py", *arguments],
    cwd=repo_root,
    env={"PYTHONPATH": str(repo_root), "PATH": "/usr/bin:/bin"},
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_norms_of_gradients_are_a_program_that_may_not_fit(repo_root):
  """Their memory is said, or that it was not looked at."""
  config = schema.read_config(str(repo_root / CONFIG))
  machine = topologies.parse("gpu:1xL4")
  without = program.make_plan(config, machine)
  config.log.gradients_steps = 10
  plan = program.make_plan(config, machine)
  assert (without.takes_norms, plan.takes_norms) == (False, True)
  held = measure.Memory(1, 1, 1, 2, 100)
  measured = measure.Measured(held, "", (), 0.0, (), 1.0)
  silent = report.Report(without, measured, 1e9)
  assert "norms" not in str(silent) and silent.fits
  skipped = report.Report(plan, measured, 1e9)
  assert "not compiled (--norms)" in str(skipped) and skipped.fits
  for memory in (None, measure.Memory(1, 200, 1, 202, 100)):
    norms = measure.Norms(memory, "" if memory else "out of memory", 1.0)
    made = report.Report(plan, measured, 1e9, norms=norms)
    assert not made.fits and not made.to_dict()["fits"]
    assert "norms: " in str(made) and "DOES NOT FIT" in str(made)
    assert "--config.log.gradients_steps=None" in str(made)


@pytest.mark.slow
def test_the_norms_are_compiled_where_a_config_asks_for_them(repo_root):
  config = schema.read_config(str(repo_root / CONFIG))
  made = report.preflight(config, "cpu:1", norms=True)
  assert made.norms is None
  config.log.gradients_steps = 10
  made = report.preflight(config, "cpu:1", norms=True)
  assert made.norms.memory.arguments > 0 and made.fits
  # The state is not donated, but nothing of its size is made either.
  assert made.norms.memory.output < 1000


def test_a_topology_that_is_none_ends_readably(repo_root, capsys):
  main = runpy.run_path(str(repo_root / "tools" / "preflight.py"))["main"]
  config = str(repo_root / CONFIG)
  with pytest.raises(SystemExit, match="preflight: topology 'v5:2x2'"):
    main([f"--config={config}", "--topology=v5:2x2"])
  with pytest.raises(SystemExit):
    main([f"--config={config}"])
  assert "--topology are needed" in capsys.readouterr().err


@pytest.mark.reference
def test_the_report_of_a_config_that_fits(repo_root, tmp_path):
  out = tmp_path / "report.json"
  done = run(
    repo_root, f"--config={CONFIG}", "--topology=v5e:2x2", f"--json={out}"
  )
  assert done.returncode == 0, done.stderr
  for words in (
    "4 chips, 1 host", "image          32x32x3", "parameters:", "memory a chip",
    "of 15.75 GiB: fits", "FLOPs:", "collectives", "MB/s of rows",
    "compiled in",
  ):  # fmt: skip
    assert words in done.stdout, done.stdout
  found = json.loads(out.read_text())
  assert found["fits"] and found["memory"]["peak"] < 2**30
  assert found["chips"] == 4 and found["parameters"] > 0
  # Nothing is recomputed and nothing is in chunks.
  assert 0.8 < found["useful"] <= 1.01


@pytest.mark.reference
def test_what_does_not_fit_ends_with_1_and_names_what_is_large(repo_root):
  done = run(
    repo_root,
    "--config=configs/mae_b16_224.py:tiny",
    "--topology=v5e:1x1",
    "--config.batch_size=131072",
  )
  assert done.returncode == 1, done.stderr
  assert "DOES NOT FIT" in done.stdout
  assert "exceeds available HBM (15.75G)" in done.stdout
  assert "the largest arrays of a chip, at a batch of" in done.stdout
  assert "masked_pixels" in done.stdout.split("the largest arrays")[1]
