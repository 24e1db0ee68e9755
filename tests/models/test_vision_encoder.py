"""The vision encoder: sizes, the table for decoders, and what it refuses.

Equality with reference outputs is tested in test_clip.py.
"""

import dataclasses
import functools

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgen.models import transformer
from mmgen.models import vision_encoder
from mmgen.training import metrics

# 11 x 7 pixels in patches of 3: 3 x 2 cells, and 2 and 1 pixels cut off.
CONFIG = vision_encoder.VisionEncoderConfig(
    image_size=(11, 7), patch=3, layers=3, width=12, heads=3, hidden=20,
    mlp='gelu', unroll=True)
IMAGES = np.random.default_rng(0).integers(
    0, 256, (2, 2, 11, 7, 3)).astype(np.uint8)


@functools.cache
def init(config, method='__call__'):
  model = vision_encoder.VisionEncoder(config)
  inputs = (IMAGES, None) if method == '__call__' else (IMAGES[0],)
  params = jax.jit(functools.partial(model.init, method=method))(
      jax.random.key(0), *inputs)['params']
  # Norms of 1 and biases of 0 would hide mistakes.
  rng = np.random.default_rng(1)
  params = jax.tree.map(
      lambda p: np.asarray(p + 0.3 * rng.normal(size=p.shape), np.float32),
      params)
  return model, params


@functools.partial(jax.jit, static_argnames=('config', 'method'))
def apply(config, params, *inputs, method='__call__'):
  return vision_encoder.VisionEncoder(config).apply(
      {'params': params}, *inputs, method=method)


def count(config):
  model = vision_encoder.VisionEncoder(config)
  shape = (1, *config.image_size, 3)
  params = jax.eval_shape(
      lambda: model.init(jax.random.key(0), jnp.zeros(shape, jnp.uint8),
                         method='encode'))['params']
  return sum(p.size for p in jax.tree.leaves(params))


@pytest.mark.parametrize('size, expected', [
    # Without the projection behind the tower, which belongs to the pair.
    ('clip-b32', 87_849_216 - 768 * 512),
    ('clip-b16', 86_192_640 - 768 * 512),
    ('clip-l14', 303_966_208 - 1024 * 768),
    ('clip-l14-336', 303_507_456),
    ('siglip-b16', 92_884_224),
    ('siglip-l16-256', 315_956_224),
    ('siglip-so400m', 427_680_704),
    ('siglip-so400m-384', 428_225_600),
])
def test_published_parameter_counts(size, expected):
  assert count(vision_encoder.SIZES[size]) == expected


def test_patches_are_read_row_by_row_and_the_rest_is_cut_off():
  Y, X = np.mgrid[:11, :7]
  images = np.stack([Y, X, np.zeros_like(X)], -1)[None]
  patches = np.asarray(vision_encoder.patchify(jnp.asarray(images), 3))
  assert patches.shape == (1, 6, 27)
  fourth = patches[0, 3].reshape(3, 3, 3)  # second row, second column
  np.testing.assert_array_equal(fourth[..., 0], [[3] * 3, [4] * 3, [5] * 3])
  np.testing.assert_array_equal(fourth[..., 1], [[3, 4, 5]] * 3)
  by_channel = patches.reshape(6, 9, 3).max((0, 1))
  np.testing.assert_array_equal(by_channel, [8, 5, 0])


@pytest.mark.parametrize('tap', [-2, -1, -4, None])
def test_table_is_the_hidden_state_without_class_token(tap):
  config = dataclasses.replace(CONFIG, tap=tap)
  _, params = init(CONFIG)
  table, _ = apply(config, params, IMAGES, None)
  model = vision_encoder.VisionEncoder(CONFIG)
  _, out = jax.jit(lambda params: model.apply(
      {'params': params}, IMAGES[1], (0, 1, 2, 3), method='encode'))(params)
  state = out['hidden'] if tap is None else out['taps'][4 + tap]
  assert table.shape == (2, 2, 6, 12)
  np.testing.assert_allclose(table[1], state[:, 1:], rtol=1e-5, atol=1e-5)
  assert config.image_layout((11, 7)).table_size == 6


def test_encoding_and_table_share_parameters():
  names = lambda tree: {
      k: v.shape for k, v in traverse_util.flatten_dict(tree, sep='/').items()}
  assert names(init(CONFIG)[1]) == names(init(CONFIG, 'encode')[1])


def test_table_of_an_early_tap_ignores_what_lies_above():
  model, params = init(CONFIG)
  def norm(params):
    return jnp.sum(model.apply({'params': params}, IMAGES, None)[0] ** 2)
  gradients = jax.jit(jax.grad(norm))(params)['stack']
  by_block = np.asarray([
      np.abs(leaf).reshape(3, -1).max(1)
      for leaf in jax.tree.leaves(gradients['blocks'])])
  assert (by_block[:, 2] == 0).all() and by_block[:, 1].max() > 0
  assert all((leaf == 0).all()
             for leaf in jax.tree.leaves(gradients['final_norm']))


def test_pooling_by_mean_and_by_class_token():
  _, params = init(CONFIG)
  pooled, out = apply(CONFIG, params, IMAGES[0], method='encode')
  np.testing.assert_array_equal(pooled, out['hidden'][:, 0])
  config = dataclasses.replace(CONFIG, pooling='mean')
  pooled, out = apply(config, params, IMAGES[0], method='encode')
  np.testing.assert_allclose(pooled, np.asarray(out['hidden']).mean(1),
                             rtol=1e-5, atol=1e-5)


def test_positions_tell_patches_apart():
  # The same patch everywhere: only positions make outputs differ.
  _, params = init(CONFIG)
  table = np.asarray(apply(CONFIG, params, np.full_like(IMAGES, 90), None)[0])
  assert min(np.abs(table[0, 0, i] - table[0, 0, j]).max()
             for i in range(6) for j in range(i)) > 1e-3


def test_scanned_and_recomputed_equal_unrolled():
  _, params = init(CONFIG)
  table, _ = apply(CONFIG, params, IMAGES, None)
  for change in (dict(unroll=False), dict(remat=True)):
    other, _ = apply(
        dataclasses.replace(CONFIG, **change), params, IMAGES, None)
    np.testing.assert_allclose(other, table, rtol=1e-4, atol=1e-5)


def test_half_precision_stays_close_and_norms_are_float32():
  _, params = init(CONFIG)
  table, _ = apply(CONFIG, params, IMAGES, None)
  low, _ = apply(
      dataclasses.replace(CONFIG, dtype='bfloat16'), params, IMAGES, None)
  assert low.dtype == jnp.bfloat16
  np.testing.assert_allclose(low.astype(np.float32), table, rtol=0.1, atol=0.3)


@pytest.mark.parametrize('tap', [-3, -1, None])
def test_blocks_above_the_tap_are_not_run(tap):
  config = dataclasses.replace(CONFIG, tap=tap)
  model, params = init(config)
  run = jax.jit(lambda params: model.apply({'params': params}, IMAGES, None)[0])
  pictures = IMAGES.shape[0] * IMAGES.shape[1]
  assert metrics.count_flops(run.trace(params).jaxpr) == (
      pictures * vision_encoder.flops(config, pooled=False))


def test_flops_by_hand():
  c = CONFIG
  block = 7 * transformer.block_flops(c.stack, 7)
  assert block == 7 * 2 * (4 * 12 * 12 + 2 * 7 * 12 + 2 * 12 * 20)
  stem = 2 * 6 * 27 * 12
  assert vision_encoder.flops(c) == stem + 3 * block
  assert vision_encoder.flops(c, pooled=False) == stem + 2 * block
  # ViT-B/16 at 224 is commonly quoted as 17.6 G multiply-adds (35 GFLOPs).
  assert 34e9 < vision_encoder.flops(vision_encoder.SIZES['clip-b16']) < 36e9


@pytest.mark.parametrize('change, said', [
    (dict(pooling='max'), "vision.pooling is 'max'; allowed: cls, mean, map"),
    (dict(class_token=False), "'cls', but vision.class_token is False"),
    (dict(patch=8), r'vision.image_size is \(11, 7\), smaller than'),
    (dict(tap=-5), 'vision.tap is -5; allowed: None, or -4'),
    (dict(tap=0), 'vision.tap is 0'),
    (dict(heads=5), 'does not divide width'),
])
def test_impossible_configs(change, said):
  with pytest.raises(ValueError, match=said):
    _ = dataclasses.replace(CONFIG, **change).stack


def test_images_of_another_size_are_refused():
  model, params = init(CONFIG)
  with pytest.raises(ValueError, match=r'\(7, 11\) pixels.*\(11, 7\)'):
    model.apply({'params': params}, IMAGES.swapaxes(2, 3), None)
  with pytest.raises(ValueError, match='make the two equal'):
    CONFIG.image_layout((32, 32))
