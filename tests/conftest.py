"""Settings and fixtures that every test shares."""

import os

# Before JAX starts: eight CPU devices, so that meshes can be tested anywhere,
# and LLVM's cheapest code, since tests compile far longer than they compute.
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
  ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repo_root() -> pathlib.Path:
  """The folder that holds `mtv_jax/`, `configs/` and `tools/`."""
  return ROOT


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
  """Real photos and annotations beside the checkout; skips where absent."""
  path = ROOT.parent / "shared" / "data"
  if not path.is_dir():
    pytest.skip("no real data beside this checkout (../shared/data)")
  return path


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
