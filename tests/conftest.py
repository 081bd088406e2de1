"""Settings and fixtures that every test shares."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys

import filelock
import pytest
import selection
from xla_options import xla_flags

# Before JAX starts: eight CPU devices, to test meshes anywhere.
given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{given} {xla_flags(devices=8)}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

ROOT = pathlib.Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
  text = "a case of each test whose subject imports JAX, see `selection`"
  parser.addoption("--jax", action="store_true", help=text)


def pytest_ignore_collect(collection_path, config):
  """Files without a selected test are not imported."""
  if not collection_path.match("test_*.py"):
    return None
  expression = config.option.markexpr
  needed = not expression or selection.may_have(collection_path, expression)
  if config.option.jax:
    needed &= selection.depends_on_jax(collection_path)
  return None if needed else True


@pytest.hookimpl(trylast=True)  # After the selection by markers.
def pytest_collection_modifyitems(config, items):
  """Longest first: files whose tests start processes."""
  if config.option.jax:
    cases, items[:] = items[:], selection.first_cases(items)
    config.hook.pytest_deselected(items=[*{*cases} - {*items}])
  trainings = selection.TESTS / "trainings.py"
  items.sort(key=lambda item: trainings not in selection.imported(item.path))


@pytest.fixture(scope="module", autouse=True)
def limit_memory():
  """Frees compiled programs after a file if the process has more than 4 GiB."""
  yield
  statm = pathlib.Path("/proc/self/statm")
  if "jax" in sys.modules and statm.exists():
    pages = int(statm.read_text().split()[1])
    if pages * os.sysconf("SC_PAGE_SIZE") > 4 * 2**30:
      sys.modules["jax"].clear_caches()


@pytest.fixture(scope="session")
def repo_root() -> pathlib.Path:
  """The folder that holds `mtv_jax/`, `configs/` and `tools/`."""
  return ROOT


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
  """Real photos and annotations beside the checkout; skips if absent."""
  path = ROOT.parent / "shared" / "data"
  if not path.is_dir():
    pytest.skip("no real data beside this checkout (../shared/data)")
  return path


@pytest.fixture
def mount_disk(tmp_path):
  """Mounts one file system of a size such as "64k"; returns its folder."""
  with contextlib.ExitStack() as stack:

    def mount(size):
      folder = tmp_path / "disk"
      folder.mkdir()
      command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
      if shutil.which("mount") is None or subprocess.run(command).returncode:
        pytest.skip("file systems can be mounted by root alone")
      # Writes that Orbax has abandoned can still have files open.
      unmount = ["umount", "--lazy", folder]
      stack.callback(subprocess.run, unmount, check=True)
      return folder

    yield mount


@pytest.fixture(scope="session")
def smallest_run(tmp_path_factory, worker_id) -> pathlib.Path:
  """The folder of a run of the smallest config, one for all workers.

  Do not change it.
  """
  import trainings

  root = tmp_path_factory.getbasetemp()
  if worker_id != "master":
    root = root.parent
  folder = root / "smallest" / "run"
  with filelock.FileLock(root / "smallest.lock"):
    if not (folder / "report.html").exists():
      trainings.train(folder)
  return folder


@pytest.fixture(scope="session")
def gs():
  """The URL of a bucket in an emulator of Google's store."""
  import emulators

  with emulators.google_storage() as url:
    yield url


@pytest.fixture(scope="session")
def s3():
  """The URL of a bucket in an emulator of Amazon's store."""
  import emulators

  with emulators.amazon_s3() as url:
    yield url


@pytest.fixture(scope="session", params=["gs", "s3"])
def bucket(request):
  """The URL of a bucket, of each store in turn."""
  return request.getfixturevalue(request.param)


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty folder for copies of bucket files."""
  monkeypatch.setenv("MTV_JAX_CACHE_DIR", str(tmp_path / "cache"))
  return tmp_path / "cache"


@pytest.fixture(scope="session")
def browser():
  """A headless Chromium; skips if it is not installed."""
  import chromium

  path = next(filter(None, map(shutil.which, chromium.NAMES)), None)
  if path is None:
    pytest.skip(f"needs one of {', '.join(chromium.NAMES)}")
  with chromium.launch(path) as browser:
    yield browser


@pytest.fixture
def colours():
  from colour_encoder import ColourEncoder

  return ColourEncoder()


@pytest.fixture
def write_image():
  import PIL.Image
  from colour_encoder import COLOURS

  def write(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (12, 8), COLOURS[colour]).save(path)

  return write


@pytest.fixture
def write_classes(write_image):
  def write(root, count, colours=("red", "green", "blue")):
    for colour in colours:
      for i in range(count):
        write_image(root / colour / f"{i}.png", colour)

  return write
