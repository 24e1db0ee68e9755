import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reach

from mmgen.models import attention
from mmgen.models import transformer

CONFIG = transformer.StackConfig(
    layers=4, width=24, heads=6, kv_heads=2, hidden=40, rope_theta=100.0,
    qkv_bias=True)
B, T = 2, 6
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
MASK = attention.Mask(causal=True, segments_BT=SEGMENTS)
POSITIONS = jnp.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])


def _inputs():
  return jax.random.normal(jax.random.key(0), (B, T, CONFIG.width))


@functools.cache
def _params():
  """Random everywhere: initial norms and biases would hide mistakes."""
  shapes = jax.eval_shape(
      transformer.Stack(CONFIG).init, jax.random.key(0), _inputs(), MASK,
      POSITIONS)['params']
  leaves, tree = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return tree.unflatten([0.4 * jax.random.normal(k, x.shape)
                         for k, x in zip(keys, leaves)])


def _run(config, taps=()):
  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(params):
    x, out = transformer.Stack(config).apply(
        {'params': params}, _inputs(), MASK, POSITIONS, taps=taps)
    taps_sum = sum(jnp.sum(jnp.cos(tap)) for tap in out['taps'].values())
    return jnp.sum(jnp.sin(x)) + taps_sum, (x, out['taps'])
  (_, result), gradients = loss(_params())
  return result, gradients


def _equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize('options', [
    dict(unroll=True), dict(remat=True), dict(remat=True, unroll=True)])
def test_scan_unroll_and_remat_are_equal(options):
  config = dataclasses.replace(CONFIG, **options)
  taps = (0, 3)
  _equal(_run(config, taps), _run(CONFIG, taps))
  x = _inputs()
  init = lambda c: jax.jit(transformer.Stack(c).init)(
      jax.random.key(0), x, MASK, POSITIONS)
  for a, b in zip(jax.tree.leaves(init(config)), jax.tree.leaves(init(CONFIG))):
    np.testing.assert_array_equal(a, b)


# Everything that EVA-CLIP and Fuyu do unlike CLIP; numbers are in
# test_eva_clip.py and test_fuyu.py.
EVA = transformer.StackConfig(
    layers=2, width=24, heads=3, hidden=20, norm='layer', placement='post',
    qkv_bias='qv', out_bias=True, mlp_bias=True, inner_attention_norm=True,
    inner_mlp_norm=True, query_key_norm=True, layer_scale=0.1, rope='grid',
    rope_theta=100.0, rope_share=0.5)
PLACES = jax.random.uniform(jax.random.key(2), (B, T, 2)) * 9


def _apply_eva(params, **options):
  return transformer.Stack(dataclasses.replace(EVA, **options)).apply(
      {'params': params}, _inputs(), attention.Mask(), PLACES)[0]


@functools.cache
def _eva_params():
  shapes = jax.eval_shape(
      transformer.Stack(EVA).init, jax.random.key(0), _inputs(),
      attention.Mask(), PLACES)['params']
  leaves, tree = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return tree.unflatten([0.4 * jax.random.normal(k, x.shape)
                         for k, x in zip(keys, leaves)])


def test_scan_unroll_and_remat_are_equal_with_all_options():
  def run(**options):
    return jax.jit(jax.value_and_grad(lambda params: jnp.sum(jnp.sin(
        _apply_eva(params, **options)))))(_eva_params())
  scanned = run()
  _equal(run(unroll=True), scanned)
  _equal(run(remat=True), scanned)


def test_each_branch_is_left_out_as_often_as_it_is_said():
  config = dataclasses.replace(CONFIG, layers=4, drop_path=0.6)
  keys = jax.random.split(jax.random.key(0), 2000)
  found = np.asarray(transformer.draw_branches(config, keys))
  assert found.shape == (2000, 4, 2) and found.dtype == np.float32
  kept = 1 - np.array([0, 0.2, 0.4, 0.6])
  for layer, share in enumerate(kept):
    np.testing.assert_allclose(
        np.unique(found[:, layer]), [1.0] if share == 1 else [0, 1 / share],
        rtol=1e-6)
    # 4.5 sigma.
    off = 4.5 * (share * (1 - share) / 2000) ** 0.5
    assert np.abs((found[:, layer] > 0).mean(0) - share).max() <= off
  # Attention and MLP, and examples, on their own.
  both = (found[:, 3] > 0).all(-1).mean()
  assert abs(both - 0.16) < 0.04
  assert len({x.tobytes() for x in found}) > 25
  np.testing.assert_array_equal(
      found[:5], transformer.draw_branches(config, keys[:5]))
  config = dataclasses.replace(config, layers=1)
  assert (np.asarray(transformer.draw_branches(config, keys)) == 1).all()


def test_parameters_of_the_options():
  names = lambda tree: {
      jax.tree_util.keystr(path, simple=True, separator='/')
      for path, _ in jax.tree_util.tree_leaves_with_path(tree['blocks'])}
  plain = dataclasses.replace(
      EVA, qkv_bias=True, inner_attention_norm=False, inner_mlp_norm=False,
      query_key_norm=False, layer_scale=None)
  plain = jax.eval_shape(
      transformer.Stack(plain).init, jax.random.key(0), _inputs(),
      attention.Mask(), PLACES)['params']
  assert names(plain) - names(_eva_params()) == {'attention/key/bias'}
  assert names(_eva_params()) - names(plain) == {
      'attention_scale', 'mlp_scale', 'attention/norm/scale',
      'attention/norm/bias', 'mlp/norm/scale', 'mlp/norm/bias',
      'attention/query_norm/scale', 'attention/query_norm/bias',
      'attention/key_norm/scale', 'attention/key_norm/bias'}
  # One for all heads.
  norm = _eva_params()['blocks']['attention']['query_norm']
  assert norm['scale'].shape == norm['bias'].shape == (2, 8)


def test_layer_scale_comes_after_the_norm():
  """There it is the same as a norm with larger scale and bias."""
  blocks = dict(_eva_params()['blocks'])
  for part in ('attention', 'mlp'):
    factor = blocks.pop(f'{part}_scale')
    blocks[f'{part}_norm'] = {
        k: v * factor for k, v in blocks[f'{part}_norm'].items()}
  got = _apply_eva({**_eva_params(), 'blocks': blocks}, layer_scale=None)
  _equal(got, _apply_eva(_eva_params()))


def test_first_outputs_get_smaller_by_depth():
  init = lambda name: jax.jit(transformer.Stack(dataclasses.replace(
      CONFIG, init=name)).init)(
          jax.random.key(0), _inputs(), MASK, POSITIONS)['params']['blocks']
  eva, plain = init('eva'), init('llama')
  root = np.sqrt(2 * np.arange(1, 5))
  np.testing.assert_allclose(
      eva['mlp']['down']['kernel'],
      plain['mlp']['down']['kernel'] / root[:, None, None], rtol=1e-6)
  np.testing.assert_allclose(
      eva['attention']['out']['kernel'],
      plain['attention']['out']['kernel'] / root[:, None, None], rtol=1e-6)
  np.testing.assert_array_equal(eva['mlp']['up']['kernel'],
                                plain['mlp']['up']['kernel'])


def test_grid_rotary_turns_neighbours_by_row_and_by_column():
  x = np.asarray(jax.random.normal(jax.random.key(0), (1, 3, 2, 12)))
  places = np.array([[[0, 0], [2, 0.5], [1, 7]]], np.float32)
  turned = np.asarray(attention.grid_rotary(
      jnp.asarray(x), jnp.asarray(places), 50.0))
  # As complex numbers: three frequencies by row, then three by column.
  plane = x[..., 0::2] + 1j * x[..., 1::2]
  frequencies = 50.0 ** (-np.arange(3) / 3)
  angles = (places[..., None] * frequencies).reshape(1, 3, 1, 6)
  expected = plane * np.exp(1j * angles)
  np.testing.assert_allclose(turned[..., 0::2], expected.real, atol=1e-5)
  np.testing.assert_allclose(turned[..., 1::2], expected.imag, atol=1e-5)
  np.testing.assert_array_equal(turned[:, 0], x[:, 0])


def test_options_do_what_they_say():
  def trace(**options):
    config = dataclasses.replace(CONFIG, **options)
    def loss(params):
      return transformer.Stack(config).apply(
          {'params': params}, _inputs(), MASK, POSITIONS)[0].sum()
    return str(jax.make_jaxpr(jax.grad(loss))(_params()))
  assert 'scan[' in trace() and 'scan[' not in trace(unroll=True)
  assert 'remat' in trace(remat=True) and 'remat' not in trace()


def test_taps_are_the_outputs_of_shorter_stacks():
  (_, taps), _ = _run(CONFIG, (0, 1, 4))
  assert sorted(taps) == [0, 1, 4]
  np.testing.assert_array_equal(taps[0], _inputs())
  for depth in (1, 4):
    config = dataclasses.replace(CONFIG, layers=depth, final_norm=False)
    blocks = jax.tree.map(lambda x, n=depth: x[:n], _params()['blocks'])
    expected, out = transformer.Stack(config).apply(
        {'params': {'blocks': blocks}}, _inputs(), MASK, POSITIONS)
    assert not out['taps']
    np.testing.assert_allclose(taps[depth], expected, atol=2e-5)


@pytest.mark.parametrize('unroll', [False, True])
def test_cached_decoding_equals_the_full_pass(unroll):
  config = dataclasses.replace(CONFIG, unroll=unroll)
  stack = transformer.Stack(config)
  lengths = jnp.array([2, 4])
  x = _inputs()
  slots = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
  full, _ = stack.apply(
      {'params': _params()}, x, attention.Mask(causal=True), slots)

  @jax.jit
  def step(x, slots, cache):
    # A tap travels beside the cache.
    x, out = stack.apply(
        {'params': _params()}, x,
        attention.Mask(causal=True, query_positions_BT=slots), slots, cache,
        taps=(2,))
    return x, out['cache']

  # Whatever a cache holds beyond the written slots must not be seen.
  cache = jax.tree.map(
      lambda leaf: leaf + 7, transformer.init_cache(config, B, 8, 'float32'))
  structure = jax.tree.map(jnp.shape, cache)
  got, cache = step(x[:, :4], slots[:, :4], cache)
  assert jax.tree.map(jnp.shape, cache) == structure
  np.testing.assert_allclose(got[0, :2], full[0, :2], atol=2e-5)
  np.testing.assert_allclose(got[1], full[1, :4], atol=2e-5)
  for extra in range(2):
    at = lengths + extra
    got, cache = step(x[jnp.arange(B), at][:, None], at[:, None], cache)
    np.testing.assert_allclose(got[:, 0], full[jnp.arange(B), at], atol=2e-5)


@pytest.mark.parametrize('mask', [
    MASK, attention.Mask(causal=True, window=2),
    attention.Mask(causal=True, segments_BT=SEGMENTS, image_index_BT=jnp.array(
        [[-1, 0, 0, -1, 1, 1], [-1, -1, 0, 0, 0, -1]])),
    attention.Mask(causal=True, prefix_BT=POSITIONS < 3)],
    ids=['packed', 'window', 'pictures', 'prefix'])
def test_gradients_reach_exactly_what_the_mask_composed_allows(mask):
  config = dataclasses.replace(CONFIG, layers=2)
  params = {**_params(),
            'blocks': jax.tree.map(lambda x: x[:2], _params()['blocks'])}
  def outputs(x):
    y, _ = transformer.Stack(config).apply(
        {'params': params}, x, mask, POSITIONS)
    return jnp.sum(jnp.sin(y + jnp.arange(24.0)[None, None]), axis=-1)
  step = np.broadcast_to(mask.materialise(T, T)[:, 0], (B, T, T))
  allowed = np.zeros((B, T, B, T), bool)
  for b in range(B):
    allowed[b, :, b] = np.linalg.matrix_power(step[b].astype(int), 2) > 0
  np.testing.assert_array_equal(reach.reached(outputs, _inputs()), allowed)


def test_rms_norm_casts_before_it_scales():
  x = jax.random.normal(jax.random.key(0), (3, 64)).astype(jnp.bfloat16)
  scale = 1 + jax.random.normal(jax.random.key(1), (64,))
  got = transformer.RMSNorm(1e-5, 'bfloat16').apply(
      {'params': {'scale': scale}}, x)
  wide = x.astype(jnp.float32)
  wide /= jnp.sqrt(jnp.mean(wide ** 2, -1, keepdims=True) + 1e-5)
  cast = wide.astype(jnp.bfloat16) * scale.astype(jnp.bfloat16)[None]
  np.testing.assert_array_equal(got.astype('float32'), cast.astype('float32'))
  late = (wide * scale[None]).astype(jnp.bfloat16)
  assert (late != cast).any()  # else the order could not be seen


@pytest.mark.parametrize('norm', transformer.NORMS)
def test_norms_compute_in_float32(norm):
  # A mean that bfloat16 cannot hold.
  x = (100.3 + jnp.linspace(-1, 1, 64)[None]).astype(jnp.bfloat16)
  module = transformer.NORMS[norm](1e-6, 'bfloat16')
  got = module.apply(module.init(jax.random.key(0), x), x).astype('float32')
  wide = np.asarray(x, np.float64)
  wide -= wide.mean() if norm == 'layer' else 0
  expected = wide / np.sqrt((wide ** 2).mean() + 1e-6)
  np.testing.assert_allclose(got, expected, rtol=1e-2, atol=1e-2)


def test_layer_norm_scales_and_shifts():
  x = jax.random.normal(jax.random.key(0), (2, 3, 8)) * 5 + 2
  scale, bias = jax.random.normal(jax.random.key(1), (2, 8))
  got = transformer.LayerNorm(1e-5, 'float32').apply(
      {'params': {'scale': scale, 'bias': bias}}, x)
  y = np.asarray(x)
  y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(got, y * np.asarray(scale) + np.asarray(bias),
                             atol=1e-5)


def test_activations():
  x = np.linspace(-3, 3, 13)
  expected = {
      'gelu': x * (1 + np.vectorize(math.erf)(x / 2 ** 0.5)) / 2,
      'gelu_tanh': x * (1 + np.tanh(
          (2 / np.pi) ** 0.5 * (x + 0.044715 * x ** 3))) / 2,
      'quick_gelu': x / (1 + np.exp(-1.702 * x)),
      'relu': np.maximum(x, 0),
      'relu2': np.where(x > 0, x * x, 0),
  }
  assert expected.keys() == transformer.ACTIVATIONS.keys()
  for name, function in transformer.ACTIVATIONS.items():
    np.testing.assert_allclose(function(jnp.asarray(x, jnp.float32)),
                               expected[name], atol=1e-5, err_msg=name)


def test_compute_dtype_leaves_parameters_in_float32():
  config = dataclasses.replace(CONFIG, dtype='bfloat16')
  (x, _), params = jax.eval_shape(
      transformer.Stack(config).init_with_output, jax.random.key(0), _inputs(),
      MASK, POSITIONS)
  assert x.dtype == jnp.bfloat16
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {'float32'}


@pytest.mark.parametrize('init, out_std', [
    ('llama', 0.02), ('clip', 24 ** -0.5 * 8 ** -0.5)])
def test_initial_layers_differ_and_have_their_spread(init, out_std):
  config = dataclasses.replace(CONFIG, init=init)
  blocks = jax.jit(transformer.Stack(config).init)(
      jax.random.key(0), _inputs(), MASK, POSITIONS)['params']['blocks']
  out = np.asarray(blocks['attention']['out']['kernel'])
  assert out.shape == (4, 24, 24)
  np.testing.assert_allclose(out.std(), out_std, rtol=0.1)
  assert all((out[0] != out[i]).all() for i in range(1, 4))


def test_block_flops_by_hand():
  # Projections 24 x (24 + 8 + 8 + 24), mixing 2 x 10 x 24, MLP 3 x 24 x 40.
  assert transformer.block_flops(CONFIG, 10) == 2 * (1536 + 480 + 2880)
  gelu = dataclasses.replace(CONFIG, mlp='gelu')
  assert transformer.block_flops(gelu, 10) == 2 * (1536 + 480 + 1920)


@pytest.mark.parametrize('fields, message', [
    (dict(norm='batch'), "norm: 'batch'; allowed: rms, layer"),
    (dict(mlp='silu'),
     'allowed: swiglu, gelu, gelu_tanh, quick_gelu, relu, relu2'),
    (dict(heads=5), 'heads: 5 does not divide width 24'),
    (dict(kv_heads=4), 'kv_heads: 4; allowed: divisors of heads, 6'),
    (dict(head_dim=3), "turns 3 channels; allowed with rope 'line': multiples"),
    (dict(rope='grid', head_dim=6), "6 channels; .*'grid': multiples of 4"),
    (dict(head_dim=6, rope_share=0.5), 'head_dim: 6 with rope_share 0.5 turns'),
    (dict(rope_share=1.5), 'turns 6 channels; .* up to head_dim'),
    (dict(rope_share=0.1), 'turns 0 channels'),
    (dict(rope='spiral'), "rope: 'spiral'; allowed: line, grid"),
    (dict(drop_path=1.0), 'drop_path: 1.0; allowed: from 0'),
    (dict(drop_path=-0.1), 'drop_path: -0.1; allowed: from 0'),
    (dict(placement='both'), "placement: 'both'; allowed: pre, post"),
    (dict(qkv_bias='k'), "qkv_bias: 'k'; allowed: True, False, qv")])
def test_config_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **fields)


def test_call_errors():
  def call(*args, **kwargs):
    transformer.Stack(CONFIG).apply(
        {'params': _params()}, _inputs(), *args, **kwargs)
  with pytest.raises(ValueError, match='positions are missing'):
    call(MASK)
  with pytest.raises(ValueError, match=r'taps \(5,\); allowed: 0 to 4'):
    call(MASK, POSITIONS, taps=(5,))
  with pytest.raises(ValueError, match='query_positions_BT .* missing'):
    call(attention.Mask(causal=True), POSITIONS,
         cache=transformer.init_cache(CONFIG, B, T, 'float32'))
