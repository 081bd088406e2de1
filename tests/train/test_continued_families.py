"""configs/continue_from.py on towers with the options of each family."""

import dataclasses

import family_specs
import pytest
import tower_parity as parity

from mtv_jax.config import recipes
from mtv_jax.convert import native
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.train.experiment import build_experiment


@pytest.mark.parametrize("kind", family_specs.SPECS)
def test_every_family_can_be_continued(kind, tmp_path):
  spec = ModelSpec.from_config(family_specs.SPECS[kind])
  model = ConvertedModel(
    spec, parity.random_params(spec), family_specs.preprocess_of(kind)
  )
  start = native.write(tmp_path / "start", model)
  config = recipes.read_config(
    f"continue_from:path={start},data=scenes,images_only,prototypes=16,batch=8"
  )
  experiment = build_experiment(config, tmp_path / "run")
  got = experiment.step_spec.model.image
  assert (
    dataclasses.replace(got, mask_token=spec.image.mask_token) == spec.image
  )
