"""Old names of objectives in configs, overrides, checkpoints and logs."""

import pytest
from ml_collections import ConfigDict

from mtv_jax.config import aliases, overrides


def test_a_config_gets_the_new_names_in_the_same_order():
  old = dict(
    seed=1,
    objectives=dict(
      depth={},
      distillation=dict(weight=2.0, type="distillation"),
      masked_pixels=None,
      mine=dict(type="masked_latent"),
      feature_distillation={},
    ),
  )
  new = aliases.rename_old_keys(old)
  assert list(new["objectives"]) == [
    "depth", "dino", "mae", "mine", "feature_distillation",
  ]  # fmt: skip
  assert new["objectives"]["dino"] == dict(weight=2.0, type="dino")
  assert new["objectives"]["mine"]["type"] == "ibot"
  assert aliases.rename_old_keys(new) == new
  with pytest.raises(ValueError, match="'dino' and 'distillation', its old"):
    aliases.rename_old_keys({"objectives": dict(dino={}, distillation={})})


@pytest.mark.parametrize("base", ["distillation", "dino"])
@pytest.mark.parametrize("given", ["distillation", "dino"])
def test_overrides_take_both_names(base, given):
  config = ConfigDict({"objectives": {base: dict(weight=1.0)}})
  changed = overrides.override(config, [f"objectives.{given}.weight=3"])
  assert changed.to_dict() == {"objectives": {"dino": dict(weight=3.0)}}
  dropped = overrides.override(config, [f"objectives.{given}=None"])
  assert dropped.objectives.dino is None


def test_names_in_checkpoints_and_logs():
  stored = {"statistics/distillation/center", "teacher/heads/dino/kernel"}
  find = aliases.find_stored_name
  assert find("statistics/dino/center", stored) in stored
  assert find("teacher/heads/dino/kernel", stored) in stored
  assert find("balance/mae", stored) == "balance/mae"
  assert aliases.rename_metric("masked_latent/loss") == "ibot/loss"
  assert aliases.rename_metric("feature_distillation/loss").startswith("feat")
  row = aliases.rename_interference({"objectives": ["masked_pixels", "depth"]})
  assert row["objectives"] == ["mae", "depth"]
  assert aliases.name_in_key("ibot") == "masked_latent"
