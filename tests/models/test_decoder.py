import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from mmgen.models import attention
from mmgen.models import decoder

# Arrays of transformers 4.46.3 with random weights, float32, eager attention:
# two rows, the second packed with two documents and padding.
CONFIGS = {
    'llama_tiny': decoder.DecoderConfig(
        vocab=53, layers=3, width=36, heads=9, kv_heads=3, hidden=52),
    'qwen2_tiny': decoder.DecoderConfig(
        vocab=47, layers=2, width=40, heads=5, kv_heads=1, hidden=56,
        norm_eps=1e-6, qkv_bias=True, rope_theta=1e6),
}


@pytest.mark.parametrize('unroll', [False, True])
@pytest.mark.parametrize('name', CONFIGS)
def test_equals_the_reference_at_every_layer(name, unroll):
  config = dataclasses.replace(CONFIGS[name], unroll=unroll)
  golden, weights = reference.load(name)
  params = reference.llama(weights, config)
  model = decoder.Decoder(config)
  shapes = jax.eval_shape(
      functools.partial(_everything, model), jax.random.key(0))['params']
  assert jax.tree.map(np.shape, params) == jax.tree.map(
      lambda x: x.shape, shapes)

  bound = model.bind({'params': jax.tree.map(jnp.asarray, params)})
  mask = attention.Mask(
      causal=True, segments_BT=jnp.asarray(golden['segments']))
  with jax.default_matmul_precision('highest'):
    hidden, out = bound(bound.embed(golden['tokens']), mask,
                        jnp.asarray(golden['positions']),
                        taps=tuple(range(config.layers)))
    logits = bound.logits(hidden)
  for layer, tap in out['taps'].items():
    assert reference.error(tap, golden[f'hidden/{layer}']) < 1e-5, layer
  assert reference.error(hidden, golden[f'hidden/{config.layers}']) < 1e-5
  assert reference.error(logits, golden['logits']) < 1e-5


def _everything(model, key):
  """Initial parameters of a decoder with its embedding and head."""
  def call(model):
    x = model.embed(jnp.zeros((1, 1), jnp.int32))
    hidden, _ = model(x, attention.Mask(), jnp.zeros((1, 1), jnp.int32))
    return model.logits(hidden)
  return model.init(key, method=call)


@pytest.mark.parametrize('size, count', [
    ('llama-7b', 6_738_415_616), ('vicuna-7b', 6_738_415_616),
    ('llama-13b', 13_015_864_320), ('vicuna-13b', 13_015_864_320),
    ('llama-33b', 32_528_943_616), ('vicuna-33b', 32_528_943_616),
    ('qwen2.5-7b', 7_615_616_512), ('persimmon-8b', 9_397_175_296)])
def test_published_sizes_have_their_parameters(size, count):
  model = decoder.Decoder(decoder.sized(size))
  shapes = jax.eval_shape(
      functools.partial(_everything, model), jax.random.key(0))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_published_sizes_have_their_constants():
  constants = lambda size: (
      decoder.sized(size).norm_eps, decoder.sized(size).rope_theta)
  assert constants('llama-7b') == (1e-6, 1e4)
  assert constants('llama-33b') == constants('vicuna-33b') == (1e-6, 1e4)
  assert constants('vicuna-7b') == constants('vicuna-13b') == (1e-5, 1e4)
  assert constants('qwen2.5-7b') == (1e-6, 1e6)
  assert decoder.sized('mini', vocab=99).vocab == 99
  with pytest.raises(ValueError, match="'llama-8b'; allowed: llama-7b"):
    decoder.sized('llama-8b')


def test_starts_near_uniform():
  config = decoder.sized('mini', vocab=64)
  params = jax.jit(functools.partial(_everything, decoder.Decoder(config)))(
      jax.random.key(0))['params']
  for kernel in (params['embedding'], params['head']['kernel']):
    np.testing.assert_allclose(np.std(kernel), 0.02, rtol=0.05)


def test_logits_are_float32_in_bfloat16():
  config = decoder.sized('mini', vocab=64, dtype='bfloat16')
  model = decoder.Decoder(config)
  params = jax.eval_shape(
      functools.partial(_everything, model), jax.random.key(0))['params']
  x = jax.ShapeDtypeStruct((1, 2, 128), jnp.bfloat16)
  logits = jax.eval_shape(
      lambda p, x: model.apply({'params': p}, x, method='logits'), params, x)
  assert logits.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {
      jnp.dtype('float32')}


def test_flops_by_hand():
  config = decoder.DecoderConfig(
      vocab=10, layers=2, width=6, heads=3, kv_heads=1, hidden=8)
  # Query 6x6, key and value 6x2, out 6x6; 2 x 5 keys x 6; three 6x8; head.
  block = 36 + 12 + 12 + 36 + 60 + 144
  assert decoder.flops_per_token(config, keys=5) == 2 * (2 * block + 60)
  # Twice the parameters that multiply: all but embedding and norms.
  size = decoder.sized('vicuna-7b')
  matrices = 6_738_415_616 - 32000 * 4096 - 65 * 4096
  assert decoder.flops_per_token(size, keys=0) == 2 * matrices
