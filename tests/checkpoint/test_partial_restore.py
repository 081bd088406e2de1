"""What partial loading takes, leaves and rejects."""

import jax
import numpy as np
import pytest

from mtv_jax.checkpoint.partial_restore import (
  CheckpointMismatchError,
  merge_params,
)
from mtv_jax.utils.tree import unflatten_names


def arrays(**shapes):
  flat = {n.replace("__", "/"): np.ones(s) for n, s in shapes.items()}
  return unflatten_names(flat)


TARGET = arrays(
  image__blocks__kernel=(4, 10), image__norm__scale=(10,), heads__bias=(50,)
)


def test_merge_loads_what_fits():
  source = arrays(
    encoder__blocks__kernel=(4, 10), encoder__norm__scale=(10,), extra=(3,)
  )
  source = jax.tree.map(lambda x: x * np.float64(2), source)
  target = jax.tree.map(lambda x: x.astype(np.float32), TARGET)
  params, report = merge_params(
    target, source, include=("^image/",), rename=[("^encoder/", "image/")]
  )
  assert report.loaded == ("image/blocks/kernel", "image/norm/scale")
  assert report.unexpected == ("extra",)
  assert report.missing == () and report.mismatched == {}
  assert report.coverage == 1.0
  assert params["image"]["blocks"]["kernel"].dtype == np.float32
  assert (params["image"]["blocks"]["kernel"] == 2).all()
  assert (params["heads"]["bias"] == 1).all()
  assert (target["image"]["norm"]["scale"] == 1).all()
  assert "loaded 2 arrays, 100.0 % of the wanted" in str(report)


def test_optional_groups_are_loaded_whole_or_left():
  """One of two heads has another shape in the source."""
  shapes = dict(heads__a__kernel=(4, 10), heads__a__bias=(10,))
  target = arrays(image__norm=(10,), heads__b__bias=(3,), **shapes)
  source = arrays(image__norm=(10,), heads__b__bias=(3,), **shapes)
  source = jax.tree.map(lambda x: 2 * x, source)
  source["heads"]["a"]["bias"] = np.ones(11)
  params, report = merge_params(target, source, optional="heads/[^/]+/")
  assert report.untouched == ("heads/a/",) and report.coverage == 1
  assert {*report.loaded} == {"heads/b/bias", "image/norm"}
  assert (params["heads"]["a"]["kernel"] == 1).all()
  assert (params["heads"]["b"]["bias"] == 2).all()
  assert "unchanged, as the source lacks them (1):" in str(report)
  # Parameters outside optional groups are required.
  del source["image"]
  with pytest.raises(CheckpointMismatchError, match="image/norm"):
    merge_params(target, source, optional="heads/[^/]+/")


def test_merge_fails_when_little_is_loaded():
  source = arrays(
    image__block__kernel=(4, 10), image__norm__scale=(11,), heads__bias=(50,)
  )
  with pytest.raises(CheckpointMismatchError) as e:
    merge_params(TARGET, source)
  message = str(e.value)
  assert "50.0 % of the wanted parameters loaded, at least 99 %" in message
  assert "missing from the source (1):\n  image/blocks/kernel" in message
  assert "unexpected in the source (1):\n  image/block/kernel" in message
  assert "image/norm/scale  (11,) -> (10,)" in message
  assert "For 'image/blocks/kernel': The closest of 1 names" in message
  _, report = merge_params(TARGET, source, min_coverage=0.5)
  assert report.coverage == 0.5
  assert report.mismatched == {"image/norm/scale": ((11,), (10,))}


def test_merge_errors():
  with pytest.raises(ValueError, match="init.include: 'imgae/' matches no"):
    merge_params(TARGET, TARGET, include=("imgae/",))
  with pytest.raises(ValueError, match="both become 'image/bias'"):
    merge_params(
      TARGET, arrays(a__bias=1, b__bias=1), rename=[("^./", "image/")]
    )


def test_report_is_short_for_many_names():
  source = arrays(**{f"x{i}": (1,) for i in range(30)})
  target = {"y": np.ones(1)}
  with pytest.raises(CheckpointMismatchError, match="and 20 more"):
    merge_params(target, source)
