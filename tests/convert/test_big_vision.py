"""big_vision's archives against a NumPy forward pass of its model."""

import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mtv_jax.convert import big_vision
from mtv_jax.convert.tables import ConversionError
from mtv_jax.models import two_tower as models

PATCH, GRID, WIDTH, HEADS, MLP = 4, 3, 12, 3, 20
TEXT_WIDTH, TEXT_HEADS, TEXT_MLP, LENGTH, VOCAB = 8, 2, 16, 5, 30


def _dense(rng, *shape, outputs=1):
  """A Flax dense layer's kernel and bias; the last axes are the outputs."""
  return {
    "kernel": rng.normal(size=shape) * 0.3,
    "bias": rng.normal(size=shape[-outputs:]) * 0.3,
  }


def _norm(rng, width):
  return {
    "scale": 1 + 0.2 * rng.normal(size=width),
    "bias": 0.2 * rng.normal(size=width),
  }


def _attention(rng, width, heads):
  dim = width // heads
  split = {
    name: _dense(rng, width, heads, dim, outputs=2)
    for name in ("query", "key", "value")
  }
  return {**split, "out": _dense(rng, heads, dim, width)}


def _mlp(rng, width, hidden):
  return {
    "Dense_0": _dense(rng, width, hidden),
    "Dense_1": _dense(rng, hidden, width),
  }


def _block(rng, width, heads, hidden):
  return {
    "LayerNorm_0": _norm(rng, width),
    "MultiHeadDotProductAttention_0": _attention(rng, width, heads),
    "LayerNorm_1": _norm(rng, width),
    "MlpBlock_0": _mlp(rng, width, hidden),
  }


def _encoder(rng, depth, width, heads, hidden):
  blocks = {
    f"encoderblock_{i}": _block(rng, width, heads, hidden) for i in range(depth)
  }
  return {**blocks, "encoder_norm": _norm(rng, width)}


def _checkpoint():
  rng = np.random.default_rng(0)
  image = {
    "embedding": _dense(rng, PATCH, PATCH, 3, WIDTH),
    "pos_embedding": rng.normal(size=(1, GRID**2, WIDTH)),
    "Transformer": _encoder(rng, 2, WIDTH, HEADS, MLP),
    "MAPHead_0": {
      "probe": rng.normal(size=(1, 1, WIDTH)),
      "MultiHeadDotProductAttention_0": _attention(rng, WIDTH, HEADS),
      "LayerNorm_0": _norm(rng, WIDTH),
      "MlpBlock_0": _mlp(rng, WIDTH, MLP),
    },
  }
  text = {
    "Embed_0": {"embedding": rng.normal(size=(VOCAB, TEXT_WIDTH))},
    "pos_embedding": rng.normal(size=(1, LENGTH, TEXT_WIDTH)),
    "Encoder_0": _encoder(rng, 2, TEXT_WIDTH, TEXT_HEADS, TEXT_MLP),
    "head": _dense(rng, TEXT_WIDTH, WIDTH),
  }
  tree = {"img": image, "txt": text, "t": np.ones(1) * 2.3, "b": -np.ones(1)}
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
  leaves = {}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = "/".join(key.key for key in keys)
    if name not in drop:
      leaves[prefix + name] = leaf
  np.savez(path, **leaves, **more)
  return path


# ---------------------------------------------------------------------------
# A forward pass with an axis of heads, in NumPy.


def _ln(p, x):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  return x * p["scale"] + p["bias"]


def _attend(p, x, y):
  q, k, v = (
    np.einsum("...nd,dhe->...nhe", z, p[name]["kernel"]) + p[name]["bias"]
    for name, z in (("query", x), ("key", y), ("value", y))
  )
  logits = np.einsum("...qhe,...khe->...hqk", q, k) / np.sqrt(q.shape[-1])
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights = weights / weights.sum(-1, keepdims=True)
  out = np.einsum("...hqk,...khe->...qhe", weights, v)
  return (
    np.einsum("...qhe,hed->...qd", out, p["out"]["kernel"]) + (p["out"]["bias"])
  )


def _feed(p, x):
  x = x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
  inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
  x = 0.5 * x * (1 + np.tanh(inner))
  return x @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]


def _encode(p, x):
  for i in range(2):
    block = p[f"encoderblock_{i}"]
    y = _ln(block["LayerNorm_0"], x)
    x = x + _attend(block["MultiHeadDotProductAttention_0"], y, y)
    x = x + _feed(block["MlpBlock_0"], _ln(block["LayerNorm_1"], x))
  return _ln(p["encoder_norm"], x)


def _image(p, images):
  b = len(images)
  x = images.reshape(b, GRID, PATCH, GRID, PATCH, 3)
  x = np.einsum("bypxqc,pqcd->byxd", x, p["embedding"]["kernel"])
  x = (x + p["embedding"]["bias"]).reshape(b, GRID**2, WIDTH)
  patches = _encode(p["Transformer"], x + p["pos_embedding"])
  head = p["MAPHead_0"]
  probe = np.tile(head["probe"], (b, 1, 1))
  x = _attend(head["MultiHeadDotProductAttention_0"], probe, patches)
  x = x + _feed(head["MlpBlock_0"], _ln(head["LayerNorm_0"], x))
  return patches, x[:, 0]


def _text(p, tokens):
  x = p["Embed_0"]["embedding"][tokens] + p["pos_embedding"]
  x = _encode(p["Encoder_0"], x)
  return x, x[:, -1] @ p["head"]["kernel"] + p["head"]["bias"]


# ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint():
  return _checkpoint()


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
  assert ours.params["heads"]["contrastive"] == {
    "logit_scale": np.float32(2.3),
    "logit_bias": np.float32(-1),
  }

  rng = np.random.default_rng(1)
  images = rng.normal(size=(2, 12, 12, 3)).astype(np.float32)
  tokens = rng.integers(0, VOCAB, (3, LENGTH)).astype(np.int32)
  params = jax.tree.map(jnp.asarray, ours.params)
  got = jax.jit(models.image_tower(ours.spec).apply)(
    {"params": params["image"]}, jnp.asarray(images)
  )
  patches, pooled = _image(checkpoint["img"], images)
  np.testing.assert_allclose(got.patches, patches, atol=1e-4)
  np.testing.assert_allclose(got.pooled, pooled, atol=1e-4)
  got = jax.jit(models.text_tower(ours.spec).apply)(
    {"params": params["text"]}, jnp.asarray(tokens)
  )
  states, pooled = _text(checkpoint["txt"], tokens)
  np.testing.assert_allclose(got.tokens, states, atol=1e-4)
  np.testing.assert_allclose(got.pooled, pooled, atol=1e-4)


def test_bfloat16_is_read_from_raw_bytes(checkpoint, tmp_path):
  half = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), checkpoint)
  # np.savez stores bfloat16 as two raw bytes.
  raw = jax.tree.map(lambda x: x.view("V2"), half)
  ours = big_vision.read(_save(tmp_path / "half.npz", raw))
  want = half["txt"]["Embed_0"]["embedding"].astype(np.float32)
  np.testing.assert_array_equal(ours.params["text"]["token_embedding"], want)


def test_without_bias_or_text(checkpoint, tmp_path):
  no_bias = {k: v for k, v in checkpoint.items() if k != "b"}
  ours = big_vision.read(_save(tmp_path / "a.npz", no_bias))
  assert ours.params["heads"]["contrastive"]["logit_bias"] == 0
  image = {"img": checkpoint["img"]}
  ours = big_vision.read(_save(tmp_path / "b.npz", image))
  assert ours.spec.text is None
  assert set(ours.params) == {"image"}


def test_errors_name_the_arrays(checkpoint, tmp_path):
  gone = "img/Transformer/encoderblock_1/MlpBlock_0/Dense_1/bias"
  path = _save(tmp_path / "a.npz", checkpoint, drop=[gone])
  with pytest.raises(ConversionError, match=gone):
    big_vision.read(path)

  flat = {**checkpoint["img"]["embedding"]}
  flat["kernel"] = flat["kernel"].reshape(-1, WIDTH)
  naflex = {**checkpoint, "img": {**checkpoint["img"], "embedding": flat}}
  with pytest.raises(ConversionError, match="NaFlex"):
    big_vision.read(_save(tmp_path / "b.npz", naflex))

  with pytest.raises(ConversionError, match="img/embedding/kernel"):
    big_vision.read(_save(tmp_path / "c.npz", {"other": np.ones(3)}))


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
