"""Evaluation data in buckets."""

import numpy as np
import pytest

from mtv_jax.evals.datasets import registry
from mtv_jax.utils import path

pytestmark = pytest.mark.slow


def test_a_folder_of_classes(bucket, tmp_path, write_classes, monkeypatch):
  monkeypatch.setenv(path.CACHE_VARIABLE, str(tmp_path / "cache"))
  for split in ("train", "val"):
    write_classes(tmp_path / "classes" / split, 2)
  url = f"{bucket}/classes"
  path.upload_folder(tmp_path / "classes", path.as_path(url))
  for split in ("train", "test"):
    expected = registry.open_classification(tmp_path / "classes", split=split)
    actual = registry.open_classification(url, split=split)
    assert actual.digest == expected.digest
    np.testing.assert_array_equal(actual.labels, expected.labels)
    np.testing.assert_array_equal(actual.images[3], expected.images[3])
  with pytest.raises(FileNotFoundError, match=f"nothing at {bucket}/absent"):
    registry.open_classification(f"{bucket}/absent")
