"""Byte ranges, shared with worker processes."""

from multiprocessing import util

import pytest

from mtv_jax.utils.errors import StorageError
from mtv_jax.utils.ranges import RangeServer


def test_a_temporary_folder_with_a_long_path(tmp_path, monkeypatch):
  monkeypatch.setattr(util, "get_temp_dir", lambda: str(tmp_path / ("x" * 99)))
  with pytest.raises(StorageError, match=r"Set TMPDIR to .* a short path"):
    RangeServer(0)
