"""The text encoder: sizes, who sees whom, where it is read.

Equality with reference outputs is tested in test_clip.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgen.models import text_encoder
from mmgen.models import transformer

CONFIG = text_encoder.TextEncoderConfig(
    vocab=11, length=6, layers=2, width=12, heads=3, hidden=20, mlp='gelu',
    unroll=True)
TOKENS = np.array([[1, 4, 7, 2, 0, 0], [1, 5, 3, 6, 8, 2]], np.int32)
VALID = np.array([[1, 1, 1, 1, 0, 0], [1] * 6], bool)


@pytest.fixture(scope='module')
def params():
  tree = jax.jit(text_encoder.TextEncoder(CONFIG).init)(
      jax.random.key(0), TOKENS, VALID)['params']
  rng = np.random.default_rng(1)
  return jax.tree.map(
      lambda p: np.asarray(p + 0.3 * rng.normal(size=p.shape), np.float32),
      tree)


@functools.partial(jax.jit, static_argnames='config')
def apply(config, params, tokens, valid):
  return text_encoder.TextEncoder(config).apply(
      {'params': params}, tokens, valid)


def encode(params, tokens=TOKENS, valid=VALID, **change):
  config = dataclasses.replace(CONFIG, **change)
  pooled, out = apply(config, params, tokens, valid)
  return np.asarray(pooled), np.asarray(out['hidden'])


def changed(params, place, **options):
  """Positions of the first text that feel another token at `place`."""
  tokens = TOKENS.copy()
  tokens[0, place] = 9
  difference = encode(params, tokens, **options)[1] - encode(
      params, **options)[1]
  return np.flatnonzero(np.abs(difference[0]).max(-1) > 1e-5).tolist()


def test_causal_or_both_ways(params):
  assert changed(params, 2) == [2, 3, 4, 5]
  assert changed(params, 2, causal=False) == [0, 1, 2, 3, 4, 5]


def test_read_at_the_end_of_the_text(params):
  pooled, hidden = encode(params)
  np.testing.assert_array_equal(pooled, hidden[[0, 1], [3, 5]])
  # What stands in the padding is without effect.
  tokens = TOKENS.copy()
  tokens[0, 4:] = 9
  np.testing.assert_array_equal(encode(params, tokens)[0], pooled)


def test_read_at_the_last_position(params):
  pooled, hidden = encode(params, pooling='last')
  np.testing.assert_array_equal(pooled, hidden[:, 5])


def test_a_record_without_text_stays_finite(params):
  pooled, hidden = encode(params, valid=np.zeros_like(VALID))
  np.testing.assert_array_equal(pooled, hidden[:, 0])


def test_shorter_rows_use_the_first_positions(params):
  short, _ = encode(params, TOKENS[:1, :4], VALID[:1, :4])
  np.testing.assert_allclose(short, encode(params)[0][:1], rtol=1e-5, atol=1e-6)


def test_longer_rows_are_refused(params):
  with pytest.raises(ValueError, match='8 tokens.*text.length.*is 6'):
    encode(params, np.zeros((1, 8), np.int32), np.ones((1, 8), bool))


def test_unknown_pooling():
  with pytest.raises(ValueError, match="'argmax'; allowed: eot, last"):
    dataclasses.replace(CONFIG, pooling='argmax')


@pytest.mark.parametrize('size, expected', [
    # Without the projection behind the tower, which belongs to the pair.
    ('clip-b', 63_428_096 - 512 * 512),
    ('clip-l', 123_650_304 - 768 * 768),
    ('openclip-b', 63_428_096 - 512 * 512),
    ('openclip-l', 123_650_304 - 768 * 768),
    ('openclip-h', 354_032_640 - 1024 * 1024),
    ('openclip-bigg', 694_332_160 - 1280 * 1024),
    ('siglip-b', 110_271_744 - 768 * 769),
    ('siglip-l', 336_194_560 - 1024 * 1025),
    ('siglip-so400m', 449_679_600 - 1152 * 1153),
    ('siglip-so400m-384', 449_734_896 - 1152 * 1153),
])
def test_published_parameter_counts(size, expected):
  config = text_encoder.SIZES[size]
  model = text_encoder.TextEncoder(config)
  shapes = jax.eval_shape(lambda: model.init(
      jax.random.key(0), jnp.zeros((1, config.length), jnp.int32),
      jnp.ones((1, config.length), bool)))['params']
  assert sum(p.size for p in jax.tree.leaves(shapes)) == expected


def test_flops_by_hand():
  projections, mlp = 4 * 12 * 12, 2 * 12 * 20
  both = 2 * 6 * 2 * (projections + mlp + 2 * 6 * 12)
  assert text_encoder.flops(
      dataclasses.replace(CONFIG, causal=False)) == both
  # A causal token reads 3.5 of 6 keys on average.
  assert text_encoder.flops(CONFIG) == 2 * 6 * 2 * (
      projections + mlp + 2 * 3.5 * 12)
  assert text_encoder.flops(CONFIG, 4) == 2 * 4 * transformer.block_flops(
      CONFIG.stack, 2.5)
