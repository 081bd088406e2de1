"""Encoders of a command line: names, weights and checkpoints."""

import pytest

from mtv_jax.evals.encoder_requests import parse_requests
from mtv_jax.utils.errors import ConfigError

SIGLIP = "google/siglip-base-patch16-224"


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "siglip").mkdir()
  return "siglip"


@pytest.mark.parametrize(
  ("given", "want"),
  [
    ("siglip", ("siglip", "ema", "siglip", "")),
    ("my run=siglip", ("siglip", "ema", "my run", "")),
    (f"siglip@{SIGLIP}", ("siglip", "ema", "siglip", SIGLIP)),
    (f"a=siglip@teacher@{SIGLIP}", ("siglip", "teacher", "a", SIGLIP)),
    ("a=random:mu/8@16", ("random:mu/8@16", "student", "a", "")),
    (f"hf:{SIGLIP}", (f"hf:{SIGLIP}", "ema", SIGLIP[7:], SIGLIP)),
    # Another revision may have different weights.
    (f"a={SIGLIP}@v1", (f"{SIGLIP}@v1", "ema", "a", "")),
    (f"a={SIGLIP}@v1@{SIGLIP}", (f"{SIGLIP}@v1", "ema", "a", SIGLIP)),
    # The name of a folder proves nothing, and so does one of another's hub.
    ("a=hf:me/siglip-base-patch16-224", None),
  ],
)
def test_parts_of_a_request(folder, given, want):
  (request,) = parse_requests([given], weights="ema")
  if want is None:
    assert request.checkpoint == ""
  else:
    assert request == want


def test_a_path_with_an_equals_sign_is_a_path(folder, tmp_path):
  (tmp_path / "a=b").mkdir()
  (request,) = parse_requests(["a=b"], weights="ema")
  assert request.path == "a=b"


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ("siglip@emma", "'emma' is neither weights .*Did you mean 'ema'"),
    (
      "siglip@google/siglip-base-patch16-244",
      "Did you mean 'google/siglip-base-patch16-224'",
    ),
  ],
)
def test_unknown_suffixes_raise(folder, given, message):
  with pytest.raises(ConfigError, match=message):
    parse_requests([given], weights="ema")
