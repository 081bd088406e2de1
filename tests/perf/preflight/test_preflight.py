"""`mtv-jax preflight`: reports, proposals and the table of docs/pods.md."""

import json
import pathlib
import subprocess
import sys

import pytest

from mtv_jax.cli.main import run_command
from mtv_jax.config import recipes
from mtv_jax.perf import topologies
from mtv_jax.perf.preflight import compile as compile_lib
from mtv_jax.perf.preflight import report, search
from mtv_jax.train.config import resolve

CONFIG = "configs/siglip_b16_224.py:tiny"


def test_plan_opens_no_data_and_no_tokenizer(repo_root):
  config = recipes.read_config(str(repo_root / CONFIG))
  config.data.train = [dict(type="webdataset", path="/nowhere/{0..9}.tar")]
  config.model.text.tokenizer = "/nowhere/spiece.model"
  plan = compile_lib.make_plan(config, topologies.parse("cpu:8"))
  batch = plan.abstract_batch()
  assert batch["image"].shape == (64, 32, 32, 3)
  assert batch["image"].sharding.shard_shape((64, 32, 32, 3))[0] == 8
  assert plan.mesh.size == 8


def test_candidates_go_from_cheap_to_expensive(repo_root):
  config = recipes.read_config(str(repo_root / CONFIG))
  tried, factors = zip(*search.list_candidates(resolve(config), 4), strict=True)
  assert tried[0] == ("model.remat=full",)
  assert ("model.remat=full", "mesh.fsdp=4") in tried
  assert ("model.remat=full", "mesh.fsdp=8") not in tried
  assert ("model.remat=full", "accumulate=2") in tried
  assert tried[-1] == ("model.remat=full", "batch_size=4")
  assert factors[-1] == 16


def test_propose_stops_at_the_first_fit_and_skips_small_changes(monkeypatch):
  """On a chip whose memory fits 4 rows of any recipe."""
  compiled = []

  def compile_step(plan, explain):
    rows = plan.config.batch_size // plan.config.accumulate // plan.mesh.size
    compiled.append(rows)
    refusal = f"required for HLO temporaries ({4 * rows}.00G) exceeds"
    memory = compile_lib.Memory(0, 0, 0, 1, None) if rows <= 4 else None
    return compile_lib.CompileResult(memory, "" if memory else refusal)

  monkeypatch.setattr(search.compile_lib, "compile_step", compile_step)
  config = recipes.read_config("mae_b16_224:tiny")
  config.batch_size = 64
  config.model.remat = "full"
  chip = topologies.Chip("L4", 16 * 2**30, None)
  monkeypatch.setitem(topologies.GPUS, "L4", chip)
  tried = list(search.propose(config, topologies.parse("gpu:1xL4")))
  # 64 rows were not compiled: no candidate is known to be too small.
  assert compiled == [32, 16, 8, 4]
  assert tried[-1].fits and tried[-1].changes == ("accumulate=16",)
  assert "--config.accumulate=16: fits" in str(tried[-1])
  assert tried[0].peak == 128 * 2**30


@pytest.mark.slow
def test_refused_step_of_a_long_run_is_lowered_for_fewer_rows(monkeypatch):
  """40B examples are 2.5e9 steps of 16 rows, beyond int32."""
  lowered = []

  def compile(lower, plan, what):
    text = lower().as_text()
    rows = [n for n in (256, 16, 1) if f"tensor<{n}x2xi32>" in text]
    lowered.append(rows)
    return compile_lib.CompileResult(None, "refused"), None

  monkeypatch.setattr(compile_lib, "_compile", compile)
  config = recipes.read_config("mae_b16_224:tiny")
  del config["total_steps"]
  config.update(batch_size=256, total_examples=40_000_000_000)
  plan = compile_lib.make_plan(config, topologies.parse("gpu:1xL4"))
  result = compile_lib.compile_step(plan)
  assert not result.fits and result.largest_batch == 0
  assert lowered == [[256], [16], [1]]


def test_required_bytes_of_a_refusal():
  text = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, "
    "the total memory required for HLO temporaries (192.00G) exceeds available"
  )
  for refusal, expected in ((text, 192 * 2**30), ("no number", None)):
    result = compile_lib.CompileResult(None, refusal)
    assert result.required_bytes == expected


def test_update_table_leaves_other_rows():
  old = "| mtv_b16_224 | v5e:16x16 | old |"
  new = "| mtv_l16_256 | v5e:16x16 | new |"
  begin = f"# Pods\n\n{report.BEGIN}\n| config | machine | batch |\n| --- |\n"
  end = f"\nA note.\n{report.END}\nafter\n"
  page = report.update_table(f"{begin}{old}\n{end}", new)
  assert page == f"{begin}{old}\n{new}\n{end}"
  assert report.update_table(page, new) == page
  newer = old.replace("old", "newer")
  page = report.update_table(page, newer)
  assert page == f"{begin}{newer}\n{new}\n{end}"
  bars = "| mtv_b16_224 model.remat=full\\|image=qkv | v5e:16x16 | {} |"
  page = report.update_table(page, bars.format("old"))
  page = report.update_table(page, bars.format("new"))
  assert page == f"{begin}{newer}\n{new}\n{bars.format('new')}\n{end}"
  *names, last = report.read_table(page)
  assert names == [(f"mtv_{n}", "v5e:16x16") for n in ("b16_224", "l16_256")]
  assert last == ("mtv_b16_224", "v5e:16x16", "model.remat=full|image=qkv")
  for invalid in ("nothing", f"{report.BEGIN}\nno table\n{report.END}"):
    with pytest.raises(ValueError, match="fits: begin"):
      report.update_table(invalid, new)


MAIN = """
import sys
from mtv_jax.cli.main import run_command
sys.exit(run_command("preflight"))
"""


def run(repo_root, *arguments):
  """Runs the command in a process, since it configures JAX's backends."""
  return subprocess.run(
    [sys.executable, "-c", MAIN, *arguments], cwd=repo_root,
    env={"PYTHONPATH": str(repo_root), "PATH": "/usr/bin:/bin"},
    capture_output=True, text=True, check=False,
  )  # fmt: skip


def test_gradient_norms_decide_whether_the_config_fits(repo_root):
  config = recipes.read_config(str(repo_root / CONFIG))
  machine = topologies.parse("gpu:1xL4")
  without = compile_lib.make_plan(config, machine)
  config.log.gradients_steps = 10
  plan = compile_lib.make_plan(config, machine)
  assert (without.measures_norms, plan.measures_norms) == (False, True)
  fitting = compile_lib.CompileResult(compile_lib.Memory(1, 1, 1, 2, 100))
  silent = report.Report(without, fitting, 1e9)
  assert "norms" not in str(silent) and silent.fits
  skipped = report.Report(plan, fitting, 1e9)
  assert "not compiled (--norms)" in str(skipped) and skipped.fits
  for memory in (None, compile_lib.Memory(1, 200, 1, 202, 100)):
    norms = compile_lib.CompileResult(memory, "" if memory else "out of memory")
    result = report.Report(plan, fitting, 1e9, norms=norms)
    assert not result.fits and not result.to_dict()["fits"]
    assert "norms: " in str(result) and "DOES NOT FIT" in str(result)
    assert "--config.log.gradients_steps=None" in str(result)


def test_a_report_ends_in_hours_price_and_evaluations(monkeypatch):
  """1.8e15 FLOPs of a 1e14 FLOP/s chip are 36 s at 50 %; HBM takes 27 s."""
  rates = dict(hbm_bandwidth=1e12, link_bandwidth=1e12, host_bandwidth=1e12)
  chip = topologies.Chip("L4", 2**34, 1e14, **rates, peak_int8_flops=1e14)
  monkeypatch.setitem(topologies.GPUS, "L4", chip)
  config = recipes.read_config("siglip_b16_224:tiny")
  config.update(total_steps=1000, batch_size=3600)
  config.evals.zero_shot.update(data="/data/imagenet", every_percent=30)
  plan = compile_lib.make_plan(config, topologies.parse("gpu:1xL4"))
  compiled = compile_lib.CompileResult(None, flops=1.8e15, hbm_bytes=2.7e13)
  result = report.Report(plan, compiled, 1.8e15, mfu=0.5, chip_hour=1.2)
  assert str(result).endswith("""
the run: 1,000 steps of 3,600 images, 3,600,000
  at 50 % MFU 10 h, 10 chip-hours, $12; the hosts must deliver 100 images/s, \
100 each (0 MB/s of rows)
  at the roofline 7.5 h, 7.5 chip-hours, $9; the hosts must deliver 133 \
images/s, 133 each (0 MB/s of rows)
  evaluated on retrieval on scenes (after the last step); zero_shot on \
/data/imagenet (every 300 steps)
  not counted: compiling, evaluations, checkpoints, restarts""")
  assert result.to_dict()["costs"][1]["dollars"] == pytest.approx(9)
  timed = report.Report(plan, compiled, 1.8e15, step_seconds=72.0)
  assert "  at 72 s a step 20 h, 20 chip-hours; the hosts" in str(timed)
  assert "MFU" not in str(timed) and "$" not in str(timed)


@pytest.mark.slow
def test_gradient_norms_are_compiled_if_the_config_measures_them(
  repo_root, monkeypatch
):
  """The step is compiled elsewhere."""
  step = compile_lib.CompileResult(compile_lib.Memory(1, 1, 1, 2, 100))
  monkeypatch.setattr(compile_lib, "compile_step", lambda *_, **__: step)
  config = recipes.read_config(str(repo_root / CONFIG))
  result = report.preflight(config, topologies.parse("cpu:1"), norms=True)
  assert result.norms is None
  config.balance = dict(every_steps=10)  # Needs them: no option.
  result = report.preflight(config, topologies.parse("cpu:1"))
  assert result.norms.memory.arguments > 0 and result.fits
  # The state is not donated; the output is only the norms.
  assert result.norms.memory.output < 1000


TINY = ["--config=siglip_b16_224:tiny", "--topology=v5e:2x2"]
PODS = pathlib.Path(__file__).parents[3] / "docs" / "pods.md"
LACKS_REMAT = ["--config=continue_from:tiny", "--topology=cpu:1"]
AUTO = [*LACKS_REMAT, "--config.model.remat=auto"]


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ([TINY[0], "--topology=v5:2x2"], "topology 'v5:2x2'"),
    (TINY[:1], "--topology are needed"),
    ([*TINY, "--budget=9"], "--budget is 9: .*not 'none'"),
    ([*LACKS_REMAT, "--budget=9"], "--budget is 9: .*not 'none'"),
    ([*AUTO, "--budget=nan"], "--budget is nan: expected"),
    ([*AUTO, "--budget=inf"], "--budget is inf: expected"),
    ([*AUTO, "--budget=0"], "--budget is 0: expected"),
    (["--scaling=loss", "--budget=9"], "--budget is read with one --config"),
    ([*TINY, "--mfu=nan"], "--mfu is nan: expected a fraction"),
    ([*TINY, "--chip_hour=-1"], "--chip_hour is -1: expected > 0"),
    ([*TINY, "--mfu=40"], "--mfu is 40: expected a fraction"),
    ([f"--table={PODS}", "--rows", "mtv", "v9"], "no row.*mtv_b16"),
  ],
)
def test_user_errors_are_one_message(flags, message):
  with pytest.raises(SystemExit, match=f"preflight: .*{message}"):
    run_command("preflight", flags)


@pytest.mark.reference
def test_report_of_a_config_that_fits(repo_root, tmp_path):
  out = tmp_path / "report.json"
  completed = run(
    repo_root, f"--config={CONFIG}", "--topology=v5e:2x2", f"--json={out}"
  )
  assert completed.returncode == 0, completed.stderr
  for words in (
    "4 chips, 1 host", "image          32x32x3", "parameters:",
    "memory per chip", "of 15.75 GiB: fits", "model FLOPs", "MB/s of rows",
    "collectives", "compiled in",
  ):  # fmt: skip
    assert words in completed.stdout, completed.stdout
  values = json.loads(out.read_text())
  assert values["fits"] and values["memory"]["peak"] < 2**30
  assert values["chips"] == 4 and values["parameters"] > 0
  # No rematerialisation, and prototypes in one chunk.
  assert 0.8 < values["useful"] <= 1.01


REFUSED = "exceeds available HBM (15.75G)"


def check_refusal(printed):
  assert "DOES NOT FIT" in printed and REFUSED in printed
  assert "the largest arrays of a chip, at a batch of" in printed
  assert "mae" in printed.split("the largest arrays")[1]


@pytest.mark.slow
def test_a_config_that_does_not_fit_exits_with_1_and_lists_large_arrays(
  monkeypatch, capsys
):
  """On CPUs that refuse the whole batch."""
  compile_rows = compile_lib._compile

  def compile(lower, plan, what):
    if "rows" in what:
      return compile_rows(lower, plan, what)
    return compile_lib.CompileResult(None, REFUSED), None

  monkeypatch.setattr(compile_lib, "_compile", compile)
  # The tests' JAX has eight CPU devices already.
  monkeypatch.setattr(topologies, "use_cpu", lambda topology: None)
  arguments = ["--config=mae_b16_224:tiny", "--topology=cpu:8"]
  assert run_command("preflight", arguments) == 1
  check_refusal(capsys.readouterr().out)


@pytest.mark.long
def test_a_config_that_does_not_fit_a_tpu(repo_root):
  completed = run(
    repo_root, "--config=configs/mae_b16_224.py:tiny", "--topology=v5e:1x1",
    "--config.batch_size=131072",
  )  # fmt: skip
  assert completed.returncode == 1, completed.stderr
  check_refusal(completed.stdout)


@pytest.mark.long
def test_arrays_on_the_host_leave_the_chips_memory(repo_root, tmp_path):
  reports = []
  for choice in ("mlp_hidden", "mlp_hidden:host"):
    out = tmp_path / f"{len(reports)}.json"
    completed = run(
      repo_root, f"--config={CONFIG}", "--topology=v5e:1x1",
      "--config.batch_size=4096", f"--config.model.remat={choice}",
      f"--json={out}",
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    reports.append(json.loads(out.read_text()))
  chip, host = reports
  # In float32, of two layers: 16 patches, 64 text tokens, 256 hidden units.
  size = 4 * 2 * 4096 * (16 + 64) * 256
  assert host["memory"]["host"] >= size and chip["memory"]["host"] == 0
  assert chip["memory"]["peak"] - host["memory"]["peak"] > 0.9 * size
  # There and back.
  assert host["host_bytes_per_chip"] == 2 * size
  assert chip["host_bytes_per_chip"] == 0
  assert host["roofline_seconds"]["host"] == 2 * size / 16e9
