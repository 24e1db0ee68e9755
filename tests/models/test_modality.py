"""Two sets of weights, dispatched: against both computed and one selected."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from mmgen.models import attention
from mmgen.models import modality
from mmgen.models import transformer


def draw(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def test_a_product_at_every_cut():
  x, first, second, dy = draw(0, 19, 5), draw(1, 5, 7), draw(2, 5, 7), draw(
      3, 19, 7)
  words = lambda x: (jnp.arange(19) < x)[:, None]
  run = lambda product: jax.jit(jax.value_and_grad(
      lambda arrays, count: jnp.sum(dy * product(*arrays, count)), (0,)))
  ours = run(modality.pair_dot)
  theirs = run(lambda x, first, second, count: jnp.where(
      words(count), x @ first, x @ second))
  for count in range(20):
    got, want = (f((x, first, second), count) for f in (ours, theirs))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      np.testing.assert_allclose(a, b, atol=1e-5)


CONFIG = transformer.StackConfig(
    layers=2, width=12, heads=3, kv_heads=1, hidden=10, rope_theta=1e4,
    qkv_bias=True, mlp_bias=True, out_bias=True, norm='layer',
    modality_weights=('norms', 'attention', 'mlp'))
B, T = 8, 6


@pytest.fixture(scope='module')
def setting():
  """(parameters, inputs, slots of pictures)."""
  x, visual = draw(0, B, T, 12), jax.random.bernoulli(
      jax.random.key(1), 0.4, (B, T))
  # Rows, and so chips, of words or of pictures alone.
  visual = visual.at[0].set(True).at[1].set(False)
  stack = transformer.Stack(CONFIG)
  params = jax.jit(lambda: stack.init(
      jax.random.key(2), x, attention.Mask(), positions()))()['params']
  blocks = params['blocks']
  for part, leaf in blocks['visual'].items():  # the published start
    jax.tree.map(np.testing.assert_array_equal, leaf, blocks[part])
  rng = np.random.default_rng(3)
  params = jax.tree.map(lambda p: jnp.asarray(
      p + 0.3 * rng.normal(size=p.shape), jnp.float32), params)
  return params, x, visual


def positions():
  return jnp.tile(jnp.arange(T)[None], (B, 1))


def dispatched(config):
  def run(params, x, visual):
    y, _ = transformer.Stack(config).apply(
        {'params': params}, x, attention.Mask(causal=True), positions(),
        visual_BT=visual)
    return jnp.sum(y * jnp.sin(jnp.arange(y.size).reshape(y.shape)))
  return jax.jit(jax.value_and_grad(run, (0, 1)))


def selected(params, x, visual):
  """The released way: every part of a block twice, and one is selected."""
  c = CONFIG
  def norm(p, x):
    x -= x.mean(-1, keepdims=True)
    x /= jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + c.norm_eps)
    return x * p['scale'][None, None] + p['bias'][None, None]
  def linear(p, x):
    return x @ p['kernel'] + p['bias'][None, None]
  blocks = params['blocks']
  for i in range(c.layers):
    sets = [jax.tree.map(lambda leaf, i=i: leaf[i], tree)
            for tree in (blocks, blocks['visual'])]
    def pick(part, function, sets=sets):
      words, pictures = (function(tree[part]) for tree in sets)
      return jnp.where(visual[:, :, None], pictures, words)
    h = pick('attention_norm', lambda p: norm(p, x))
    q, k, v = (attention.heads(
        pick('attention', lambda p: linear(p[name], h)), c.H)
               for name in ('query', 'key', 'value'))
    q, k = (attention.rotary(y, positions(), c.rope_theta) for y in (q, k))
    mixed = attention.attend(q, k, v, attention.Mask(causal=True))
    x += pick('attention', lambda p: linear(
        p['out'], mixed.reshape(B, T, -1)))
    h = pick('mlp_norm', lambda p: norm(p, x))
    x += pick('mlp', lambda p: linear(p['down'], jax.nn.silu(
        linear(p['gate'], h)) * linear(p['up'], h)))
  y = norm(params['final_norm'], x)
  return jnp.sum(y * jnp.sin(jnp.arange(y.size).reshape(y.shape)))


def close(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.abs(a - b).max() < 2e-5 * (np.abs(b).max() + 1)


@pytest.fixture(scope='module')
def wanted(setting):
  return jax.jit(jax.value_and_grad(selected, (0, 1)))(*setting)


# Rows over all chips; rows, columns of slots and the hidden width.
@pytest.mark.parametrize('shape', [(2, 4, 1, 1), (1, 2, 2, 2)])
def test_a_stack_equals_selection_on_any_mesh(setting, wanted, shape,
                                              monkeypatch):
  monkeypatch.setattr(modality, 'CUTS', 3)  # compiles in less time
  mesh = jax.make_mesh(shape, ('data', 'fsdp', 'tensor', 'sequence'),
                       axis_types=(AxisType.Auto,) * 4)
  with jax.set_mesh(mesh):
    params, *slots = setting
    slots = jax.device_put(slots, NamedSharding(
        mesh, PartitionSpec(('data', 'fsdp'))))
    close(dispatched(dataclasses.replace(CONFIG, remat=True))(params, *slots),
          wanted)


def test_a_product_costs_one_set_of_weights():
  x, weights = draw(0, 4, 64, 32), [
      {'up': {'kernel': draw(seed, 32, 48)}} for seed in (1, 2)]
  visual = jax.random.bernoulli(jax.random.key(3), 0.3, (4, 64))
  def run(x, weights):
    return jnp.sum(jnp.square(modality.apply(
        lambda linear, x: linear('up', x), x, *weights,
        modality.route(visual))))
  def plain(x, weights):
    return jnp.sum(jnp.square(x @ weights[0]['up']['kernel']))
  count = lambda f: jax.jit(f).lower(x, weights).compile().cost_analysis()[
      'flops']
  assert count(run) < 1.2 * count(plain)
  assert count(jax.grad(run, (0, 1))) < 1.2 * count(jax.grad(plain, (0, 1)))


def test_errors_name_the_field():
  for fields, said in (
      (dict(modality_weights=('head',)), r"\['head'\]; allowed: norms, att"),
      (dict(inner_mlp_norm=True), 'modality_weights: not with inner_mlp_norm')):
    with pytest.raises(ValueError, match=said):
      dataclasses.replace(CONFIG, **fields)
