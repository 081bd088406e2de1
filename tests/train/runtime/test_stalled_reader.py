"""A reader that stops answering holds up neither signals nor the watchdog."""

import signal
import time

import pytest
import trainings

pytestmark = pytest.mark.slow

STALLING = trainings.CONFIGS / "unreliable.py"


@pytest.fixture
def launch(tmp_path, monkeypatch):
  """Starts a run whose reader stops before step 4."""
  monkeypatch.setenv("STALL_AT", "3")
  running = []

  def start(*args):
    running.append(
      trainings.launch(tmp_path / "run", *args, config=STALLING, arg="save=100")
    )
    return running[-1]

  yield start
  for process in running:
    process.kill()
    process.wait()


def saved_steps(workdir):
  return [int(p.name) for p in (workdir / "checkpoints").iterdir()]


@pytest.mark.parametrize(
  "number",
  [
    signal.SIGTERM,
    *(
      pytest.param(n, marks=pytest.mark.long)
      for n in (signal.SIGHUP, signal.SIGINT)
    ),
  ],
)
def test_a_signal_saves_and_exits(tmp_path, launch, number):
  workdir = tmp_path / "run"
  process = launch()
  # Step 3's batch was transferred when step 2's was taken.
  trainings.wait_for_step(workdir, 2, [process])
  time.sleep(1)
  start = time.monotonic()
  process.send_signal(number)
  code = process.wait(timeout=60)
  seconds = time.monotonic() - start
  log = trainings.log(workdir)
  assert code == 128 + number, log
  last = max(trainings.losses(workdir))
  assert last in saved_steps(workdir)
  assert f"received {number.name}; saved step {last} of 12" in log
  assert "exits without its threads" in log
  assert seconds < 30, seconds
  assert "Traceback" not in log


def test_the_watchdog_saves_and_exits_with_75(tmp_path, launch):
  workdir = tmp_path / "run"
  process = launch(
    "--config.watchdog.factor=2", "--config.watchdog.min_seconds=10"
  )
  assert process.wait(timeout=120) == 75, trainings.log(workdir)
  log, last = trainings.log(workdir), max(trainings.losses(workdir))
  assert f"saved step {last} of 12" in log
  assert last in saved_steps(workdir)
  assert "threading.py" in log  # The stacks of all threads.
