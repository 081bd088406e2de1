"""big_vision's archives against its model, restated in Flax.

Flax names the layers as in the archives.
"""

import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tower_parity as parity
from flax import linen as nn

from mtv_jax.convert import big_vision
from mtv_jax.convert.tables import ConversionError
from mtv_jax.utils.tree import flatten_with_names

PATCH, GRID, WIDTH, HEADS, MLP = 4, 3, 12, 3, 20
TEXT_WIDTH, TEXT_HEADS, TEXT_MLP, LENGTH, VOCAB = 8, 2, 16, 5, 30
NORMAL = nn.initializers.normal(1.0)


class MlpBlock(nn.Module):
  hidden: int

  @nn.compact
  def __call__(self, x):
    y = nn.gelu(nn.Dense(self.hidden)(x))
    return nn.Dense(x.shape[-1])(y)


class Block(nn.Module):
  heads: int
  hidden: int

  @nn.compact
  def __call__(self, x):
    y = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(self.heads)(y, y)
    return x + MlpBlock(self.hidden)(nn.LayerNorm()(x))


class Encoder(nn.Module):
  heads: int
  hidden: int

  @nn.compact
  def __call__(self, x):
    for i in range(2):
      block = Block(self.heads, self.hidden, name=f"encoderblock_{i}")
      x = block(x)
    return nn.LayerNorm(name="encoder_norm")(x)


class MAPHead(nn.Module):
  @nn.compact
  def __call__(self, x):
    probe = self.param("probe", NORMAL, (1, 1, WIDTH))
    probe = jnp.tile(probe, (len(x), 1, 1))
    x = nn.MultiHeadDotProductAttention(HEADS)(probe, x)
    return (x + MlpBlock(MLP)(nn.LayerNorm()(x)))[:, 0]


class Image(nn.Module):
  @nn.compact
  def __call__(self, images):
    patch = (PATCH, PATCH)
    x = nn.Conv(WIDTH, patch, patch, "VALID", name="embedding")(images)
    x = x.reshape(len(x), GRID**2, WIDTH)
    x = x + self.param("pos_embedding", NORMAL, (1, *x.shape[1:]))
    x = Encoder(HEADS, MLP, name="Transformer")(x)
    return x, MAPHead()(x)


class Text(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(VOCAB, TEXT_WIDTH)(tokens)
    x = x + self.param("pos_embedding", NORMAL, (1, *x.shape[1:]))
    x = Encoder(TEXT_HEADS, TEXT_MLP)(x)
    return x, nn.Dense(WIDTH, name="head")(x[:, -1])


RNG = np.random.default_rng(1)
IMAGES = RNG.normal(size=(2, 12, 12, 3)).astype(np.float32)
TOKENS = RNG.integers(0, VOCAB, (3, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def checkpoint():
  """Parameters of which none is zero or one."""
  rng, key = np.random.default_rng(0), jax.random.key(0)
  image, text = jax.jit(Image().init)(key, IMAGES), Text().init(key, TOKENS)
  tree = {"img": image["params"], "txt": text["params"]}
  tree = jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape), tree)
  tree |= {"t": np.ones(1) * 2.3, "b": -np.ones(1)}
  return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


def _scanned(tree):
  """The checkpoint of a model that scans over its blocks."""

  def stack(encoder):
    blocks = [encoder[f"encoderblock_{i}"] for i in range(2)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *blocks)
    return {"encoderblock": stacked, "encoder_norm": encoder["encoder_norm"]}

  image = {**tree["img"], "Transformer": stack(tree["img"]["Transformer"])}
  text = {**tree["txt"], "Encoder_0": stack(tree["txt"]["Encoder_0"])}
  return {**tree, "img": image, "txt": text}


def _save(path, tree, *, prefix="params/", drop=(), **more):
  leaves = dict(flatten_with_names(tree))
  arrays = {prefix + n: leaf for n, leaf in leaves.items() if n not in drop}
  np.savez(path, **arrays, **more)
  return path


@pytest.mark.parametrize("form", ["scanned", "bare", "optimizer"])
def test_every_form_has_equal_parameters(checkpoint, form, tmp_path):
  path = tmp_path / "siglip.npz"
  if form == "scanned":
    # The archive has an optimizer's state beside the parameters.
    more = {"opt/0/mu/img/pos_embedding": np.ones((1, 9, 12), np.float32)}
    _save(path, _scanned(checkpoint), **more)
  else:
    prefix = "" if form == "bare" else "opt/target/"
    _save(path, checkpoint, prefix=prefix)
  ours = big_vision.read(path)
  want = big_vision.read(_save(tmp_path / "unrolled.npz", checkpoint))
  assert ours.spec == want.spec
  assert jax.tree.all(jax.tree.map(np.array_equal, ours.params, want.params))


def test_features_equal_the_forward_pass(checkpoint, tmp_path):
  ours = big_vision.read(_save(tmp_path / "siglip.npz", checkpoint))
  image, text = ours.spec.image, ours.spec.text
  assert (image.image_size, image.patch_size) == (12, 4)
  assert (image.depth, image.heads, image.mlp_dim) == (2, HEADS, MLP)
  assert (text.depth, text.heads, text.length) == (2, TEXT_HEADS, LENGTH)
  head = {k: float(v) for k, v in ours.params["heads"]["contrastive"].items()}
  assert head == {"logit_scale": pytest.approx(2.3), "logit_bias": -1}
  got = parity.run_image(ours, IMAGES)
  want = Image().apply({"params": checkpoint["img"]}, IMAGES)
  np.testing.assert_allclose(got.patches, want[0], atol=1e-4)
  np.testing.assert_allclose(got.pooled, want[1], atol=1e-4)
  got = parity.run_text(ours, TOKENS)
  want = Text().apply({"params": checkpoint["txt"]}, TOKENS)
  np.testing.assert_allclose(got.tokens, want[0], atol=1e-4)
  np.testing.assert_allclose(got.pooled, want[1], atol=1e-4)


def test_bfloat16_and_absent_parts(checkpoint, tmp_path):
  half = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), checkpoint)
  # np.savez stores bfloat16 as two raw bytes.
  raw = jax.tree.map(lambda x: x.view("V2"), half)
  ours = big_vision.read(_save(tmp_path / "half.npz", raw))
  want = half["txt"]["Embed_0"]["embedding"].astype(np.float32)
  np.testing.assert_array_equal(ours.params["text"]["token_embedding"], want)
  no_bias = {k: v for k, v in checkpoint.items() if k != "b"}
  ours = big_vision.read(_save(tmp_path / "a.npz", no_bias))
  assert ours.params["heads"]["contrastive"]["logit_bias"] == 0
  image = {"img": checkpoint["img"]}
  ours = big_vision.read(_save(tmp_path / "b.npz", image))
  assert ours.spec.text is None
  assert set(ours.params) == {"image"}


def test_errors_name_the_arrays(checkpoint, tmp_path):
  flat = {**checkpoint["img"]["embedding"]}
  flat["kernel"] = flat["kernel"].reshape(-1, WIDTH)
  naflex = {**checkpoint, "img": {**checkpoint["img"], "embedding": flat}}
  gone = "img/Transformer/encoderblock_1/MlpBlock_0/Dense_1/bias"
  for tree, drop, message in (
    (checkpoint, [gone], gone),
    (naflex, [], "NaFlex"),
    ({"other": np.ones(3)}, [], "img/embedding/kernel"),
  ):
    path = _save(tmp_path / "a.npz", tree, drop=drop)
    with pytest.raises(ConversionError, match=message):
      big_vision.read(path)


def test_no_pickle_is_loaded(tmp_path):
  path = tmp_path / "pickle.npz"
  np.savez(path, **{"params/img/x": np.array([{"a": 1}], dtype=object)})
  with pytest.raises(ConversionError, match="pickles are not read"):
    big_vision.read(path)
  (tmp_path / "text.npz").write_text("not an archive")
  np.save(tmp_path / "one.npy", np.ones(3))
  with (tmp_path / "pickle.pkl").open("wb") as file:
    pickle.dump({"a": 1}, file)
  for name in ("text.npz", "one.npy", "pickle.pkl"):
    with pytest.raises(ConversionError, match="not an .npz archive") as error:
      big_vision.read(tmp_path / name)
    # NumPy would advise to load the file as a pickle.
    assert "allow_pickle" not in str(error.value)
  with pytest.raises(FileNotFoundError, match="no file"):
    big_vision.read(tmp_path / "nothing.npz")
