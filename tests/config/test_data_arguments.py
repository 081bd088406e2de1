"""Arguments that name the data of any recipe."""

import pytest

from mtv_jax.config.recipes import read_config
from mtv_jax.utils.errors import ConfigError

VAL = ["val_knn", "val_retrieval", "val_zero_shot"]


def evaluated(config):
  """Data by evaluation, in alphabetical order."""
  return {name: entry.get("data") for name, entry in config.evals.items()}


def test_a_path_alone_replaces_data_and_labels(caplog):
  config = read_config("mtv_b16_224:tiny,data=photos")
  assert config.data.train == [dict(path="photos")]
  assert config.data.ops == "decode|canvas(40)|caption(64)"
  assert [*config.objectives] == ["contrastive", "dino", "ibot"]
  assert "lack labels for depth and grounding" in caplog.text
  assert "Pass depth=LABELS and boxes=LABELS" in caplog.text
  assert not config.evals
  assert "without data are removed: retrieval, zero_shot." in caplog.text


def test_labels_and_benchmarks():
  config = read_config(
    "mtv_b16_224:data={a,b}/*.tar,depth=d,boxes=b,coco=c,nyu=n"
  )
  labels = dict(depth="d", boxes="b")
  assert config.data.train == [dict(path="{a,b}/*.tar", labels=labels)]
  assert {"depth", "grounding"} < {*config.objectives}
  assert evaluated(config) == dict(
    depth_probe="n", grounding="c", relative_depth="n", retrieval="c"
  )
  assert config.evals.retrieval.every_percent == 10
  assert config.evals.depth_probe.every_percent == 50


def test_labels_alone_are_those_of_the_recipes_data():
  config = read_config("mtv_l16_256:depth=d")
  (entry,) = config.data.train
  assert entry["path"] == "/data/web/{00000..09999}.tar"
  assert entry["labels"] == dict(depth="d", boxes="/data/web_boxes")
  assert evaluated(config)["zero_shot"] == "/data/imagenet"


@pytest.mark.parametrize(
  ("recipe", "expected"),
  [
    ("siglip_b16_224:tiny,val=x.json", VAL),
    ("dinov2_l16:data=x,val=y", ["val_knn"]),
    ("mae_b16_224:imagenet=i",
     ["feature_rank", "knn", "linear_probe", "mae_probe"]),
    ("mtv_tiny:val=y", ["val_grounding", *VAL[:1], "val_relative_depth"]
     + VAL[1:]),
    # Not the recipe's, which are on its training images.
    ("coco_photos:val=y", VAL),
    ("mtv_tiny:data=scenes",
     ["grounding", "relative_depth", "retrieval", "zero_shot"]),
  ],
)  # fmt: skip
def test_evaluations_for_what_a_recipe_trains(recipe, expected):
  config = read_config(recipe)
  assert sorted(config.evals) == sorted(expected)
  for name, entry in config.evals.items():
    if name.startswith("val_"):
      assert entry.optional and entry.type == name.removeprefix("val_")


def test_labels_of_held_out_shards(caplog):
  config = read_config("mtv_b16_224:data=x,boxes=b,val=v,val_boxes=w")
  held_out = dict(path="v", labels=dict(boxes="w"))
  assert evaluated(config)["val_grounding"].to_dict() == held_out
  assert evaluated(config)["val_retrieval"] == "v"
  assert "zero_shot. Name benchmarks (imagenet=PATH" in caplog.text
  caplog.clear()
  read_config("siglip_b16_224:tiny,val=v")  # Instead of scenes.
  assert not caplog.messages


def test_images_without_captions_stay_so():
  config = read_config("dinov2_l16:data=x.csv,images=photos")
  entry = dict(path="x.csv", images="photos", captions="ignored")
  assert config.data.train == [entry]
  tiny = read_config("mae_b16_224:tiny,data=x")
  assert tiny.data.train == [dict(path="x", captions="ignored")]
  with pytest.raises(ConfigError, match="images= belongs to data=: pass both"):
    read_config("dinov2_l16:images=photos")


def test_an_unknown_argument_is_compared_with_them():
  with pytest.raises(ConfigError, match=r"argument 'imagnet'.*imagenet"):
    read_config("siglip_b16_224:imagnet=x")
  with pytest.raises(ConfigError, match="depth=d: no objective reads it"):
    read_config("siglip_b16_224:depth=d")
  with pytest.raises(ConfigError, match="'val' is passed twice"):
    read_config("siglip_b16_224:val=a,val=b")
  with pytest.raises(
    ConfigError, match="coco=c: no evaluation on coco applies"
  ):
    read_config("mae_b16_224:coco=c")
  with pytest.raises(ConfigError, match="val_boxes=b: no objective reads it"):
    read_config("siglip_b16_224:val=v,val_boxes=b")
  with pytest.raises(ConfigError, match="'2024'.*path with a comma can't be"):
    read_config("siglip_b16_224:data=photos, 2024")
  with pytest.raises(ConfigError, match="a colon: --config=mtv_tiny:data=x"):
    read_config("mtv_tiny,data=x")
  for empty in ("data=", "val"):
    with pytest.raises(ConfigError, match="needs a value: .*=PATH"):
      read_config(f"siglip_b16_224:{empty}")
