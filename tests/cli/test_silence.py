"""Real commands write a line at least every 15 s, in a terminal and a file."""

import os
import subprocess
import sys
import time

import doc_commands
import pytest

LIMIT = 15.0  # Seconds without output.
CONFIG = "--config=siglip_b16_224:tiny,batch=16"
# In this order: the later ones read the first one's run.
COMMANDS = {
  "train": f"{CONFIG} --workdir=run --compile_cache=none",
  "evaluate": "--encoder=run --evals=retrieval,segmentation --data=scenes"
  " --count=64",
  "linear_probe": "--encoder=run",
  "knn": "--encoder=run",
  "study": f"scaling {CONFIG} --config.total_steps=4 --images 64 128"
  " --output=study",
  "preflight": f"{CONFIG} --topology=cpu:1",
}


def longest_silence(command: list[str], *, tty: bool, **options) -> float:
  """Runs a command; returns its longest time without output, in seconds."""
  reader, writer = os.openpty() if tty else os.pipe()
  start, gaps = time.monotonic(), []
  with subprocess.Popen(
    command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, **options
  ) as process:
    os.close(writer)
    output, read = b"", b"first"
    while read:
      try:
        read = os.read(reader, 2**16)
      except OSError:  # The terminal's other side is closed.
        read = b""
      output += read
      now = time.monotonic()
      gaps.append(now - start)
      start = now
    os.close(reader)
  gaps.append(time.monotonic() - start)
  assert process.returncode == 0, output.decode()[-4000:]
  return max(gaps)


@pytest.mark.long
@pytest.mark.parametrize("tty", [False, True])
def test_a_command_is_never_silent_for_long(tty, tmp_path):
  env = doc_commands.write_program(tmp_path / "bin")
  options = dict(tty=tty, cwd=tmp_path, env=env)
  silences = {
    name: longest_silence(["mtv-jax", name, *words.split()], **options)
    for name, words in COMMANDS.items()
  }
  assert max(silences.values()) <= LIMIT, silences


def test_a_silence_is_measured():
  code = "import time; print(1, flush=True); time.sleep(0.5); print(2)"
  for tty in (False, True):
    silence = longest_silence([sys.executable, "-c", code], tty=tty)
    assert 0.4 < silence < LIMIT
