"""The lock on a run's folder."""

import json
import subprocess
import sys

import pytest

from mtv_jax.train import workdir
from mtv_jax.utils.errors import ConfigError


def test_a_folder_is_created_and_released(tmp_path):
  folder = tmp_path / "runs" / "ü a"
  for _ in range(2):
    with workdir.lock_workdir(folder):
      assert "process" in (folder / workdir.OWNER).read_text()


def test_an_error_inside_is_raised_and_releases_the_lock(tmp_path):
  with pytest.raises(OSError, match="full"), workdir.lock_workdir(tmp_path):
    raise OSError("full")
  with workdir.lock_workdir(tmp_path):
    pass


def test_a_second_run_is_rejected_until_the_first_exits(tmp_path):
  code = (
    "import sys\nfrom mtv_jax.train import workdir\n"
    "with workdir.lock_workdir(sys.argv[1]):\n"
    "  print('locked', flush=True)\n  sys.stdin.read()"
  )
  other = subprocess.Popen(
    [sys.executable, "-c", code, tmp_path],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert other.stdout.readline() == "locked\n"
  match = f"locked by process {other.pid} on"
  with pytest.raises(ConfigError, match=match), workdir.lock_workdir(tmp_path):
    pass
  # As after a crash.
  other.kill()
  other.communicate()
  with workdir.lock_workdir(tmp_path):
    pass


def test_folders_of_other_content_are_rejected(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(ConfigError, match="file is a file; a folder"):  # noqa: SIM117
    with workdir.lock_workdir(tmp_path / "file"):
      pass
  model = tmp_path / "model"
  model.mkdir()
  text = json.dumps({"model_type": "siglip"})
  (model / "config.json").write_text(text)
  with (
    pytest.raises(ConfigError, match="that is not a run's"),
    workdir.lock_workdir(model),
  ):
    pass
  assert [p.name for p in model.iterdir()] == ["config.json"]
  # A file that a crash truncated is written again.
  (model / "config.json").write_text('{"batch')
  with workdir.lock_workdir(model):
    pass


def test_no_local_folder_is_created_for_a_bucket(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with workdir.lock_workdir("gs://bucket/run"):
    pass
  assert not list(tmp_path.iterdir())
