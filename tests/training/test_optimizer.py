"""Groups, decay rules, layer-wise rates; AdamW and LAMB by hand."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from mmgen import errors
from mmgen.training import groups as groups_lib
from mmgen.training import optimizer
from mmgen.training import sharding


def _config(**fields):
  return ml_collections.ConfigDict({**dict(
      name='adamw', peak_lr=0.1, schedule='constant', warmup=0, min_ratio=0.0,
      b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.5, clip=None, groups={},
      accumulate=1), **fields})


PARAMS = {
    'vision': {'projection': {'kernel': jnp.ones((4, 2)), 'bias': jnp.ones(2)},
               'class_embedding': jnp.ones(2)},
    'decoder': {
        'embedding': jnp.ones((5, 2)),
        'stack': {
            'blocks': {
                'attention': {'query': {'kernel': jnp.ones((3, 2, 1, 2)),
                                        'bias': jnp.ones((3, 1, 2))}},
                'mlp_norm': {'scale': jnp.ones((3, 2))},
                'gate': jnp.ones((3, 2))},
            'final_norm': {'scale': jnp.ones(2)}}},
}
FLAT = sharding.named_leaves(PARAMS)


def _step(config, grads, params=PARAMS, steps=10):
  transform, _ = optimizer.make_optimizer(config, steps, params)
  updates, _ = transform.update(grads, transform.init(params), params)
  return sharding.named_leaves(updates)


# ---------------------------------------------------------------------------
# AdamW, groups, freezing


def test_decay_spares_norms_biases_and_vectors_also_in_stacks():
  decayed = {name for name, leaf in FLAT.items()
             if groups_lib.decays(name, leaf)}
  assert decayed == {
      'vision/projection/kernel', 'decoder/embedding',
      'decoder/stack/blocks/attention/query/kernel'}


def test_adamw_equals_arithmetic_by_hand():
  """First step: the direction is g / (|g| + eps), plus decay, times -rate."""
  grads = jax.tree.map(lambda x: 2.0 * x, PARAMS)
  updates = _step(_config(no_decay='^decoder/embedding'), grads)
  np.testing.assert_allclose(
      updates['vision/projection/kernel'], -0.1 * (1 + 0.5), rtol=1e-6)
  for spared in ('decoder/stack/blocks/mlp_norm/scale', 'decoder/embedding'):
    np.testing.assert_allclose(updates[spared], -0.1, rtol=1e-6)


def test_groups_scale_rate_and_replace_decay():
  groups = {'eyes': dict(pattern='^vision/', lr_scale=0.1, weight_decay=2.0),
            'rest': dict(pattern='^decoder/')}
  updates = _step(_config(groups=groups), PARAMS)
  for name in updates:
    want = -0.01 * (1 + 2.0) if name.startswith('vision') else (
        -0.1 * (1.5 if groups_lib.decays(name, FLAT[name]) else 1))
    np.testing.assert_allclose(updates[name], want, rtol=1e-6, err_msg=name)


def test_clipping_is_by_the_global_norm():
  size = sum(leaf.size for leaf in FLAT.values())
  big = jax.tree.map(lambda x: 100.0 * x, PARAMS)
  transform, _ = optimizer.make_optimizer(_config(clip=1.0), 10, PARAMS)
  _, state = transform.update(big, transform.init(PARAMS), PARAMS)
  moment = [x for name, x in sharding.named_leaves(state).items()
            if name.endswith('mu/vision/projection/bias')][0]
  np.testing.assert_allclose(moment, 0.1 / np.sqrt(size), rtol=1e-5)


def test_split_keeps_frozen_parameters_out_of_the_optimizer():
  groups = {'eyes': dict(pattern='^vision/', freeze=True),
            'norms': dict(pattern='norm', lr_scale=0.5)}
  trained, frozen = optimizer.split(PARAMS, groups)
  assert list(frozen) == ['vision'] and list(trained) == ['decoder']
  transform, _ = optimizer.make_optimizer(_config(groups=groups), 10, trained)
  names = sharding.named_leaves(transform.init(trained))
  assert names and not any('vision' in name for name in names)


def test_cast_is_to_the_compute_dtype_but_for_single_numbers():
  """A fixed scale of 100 would be 98.9."""
  cast = optimizer.cast({'kernel': jnp.ones((2, 2)), 'ids': jnp.arange(2),
                         'logit_scale': jnp.log(100.0)}, jnp.bfloat16)
  assert cast['kernel'].dtype == jnp.bfloat16
  assert cast['ids'].dtype == jnp.int32
  np.testing.assert_allclose(jnp.exp(cast['logit_scale']), 100, rtol=1e-6)


# ---------------------------------------------------------------------------
# Layer-wise rates


def test_rates_fall_from_layer_to_layer():
  groups = {'all': dict(pattern='.', lr_scale=0.5, layer_decay=0.8)}
  updates = _step(_config(groups=groups, weight_decay=0.0), PARAMS)
  powers = {'embedding': 4, 'projection': 0, 'final_norm': 0}
  for name, update in updates.items():
    power = np.array([3, 2, 1]).reshape(3, *[1] * (update.ndim - 1)) if (
        'blocks' in name) else next(
            p for part, p in powers.items() if part in name)
    np.testing.assert_allclose(
        update, np.broadcast_to(-0.05 * 0.8 ** power, update.shape), rtol=1e-6,
        err_msg=name)


def test_layer_rates_are_those_of_the_reference():
  """decay ** (L + 1 - id), ids from 0 to L + 1, for a tower of L = 2 blocks.

  The ids are those of baaivision/EVA (training/optim.py): embeddings 0, block
  i i + 1, final norm and head L + 1.
  """
  ids = {'patch_embedding/kernel': 0, 'position_embedding': 0,
         'class_embedding': 0, 'token_embedding/embedding': 0,
         'pre_norm/scale': 0, 'stack/final_norm/scale': 3, 'head/kernel': 3}
  leaves = {f'tower/{name}': np.zeros((2, 2)) for name in ids}
  leaves['tower/stack/blocks/mlp/up/kernel'] = np.zeros((2, 3, 4))
  found = groups_lib.find_factors(
      leaves, {'t': groups_lib.Group('^tower', layer_decay=0.9)}, 0.0, None)
  for name, i in ids.items():
    np.testing.assert_allclose(found[f'tower/{name}'].rate, 0.9 ** (3 - i))
  rate = found['tower/stack/blocks/mlp/up/kernel'].rate
  np.testing.assert_allclose(rate, np.reshape([0.81, 0.9], (2, 1, 1)))


# ---------------------------------------------------------------------------
# LAMB

LAMB = dict(name='lamb', eps=1e-6, b2=0.99, weight_decay=0.5)


def _random(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32),
      PARAMS)


def test_a_step_of_lamb_is_as_long_as_the_tensor():
  """In each layer for itself; without weight decay it is a step of Adam."""
  params, grads = _random(0), _random(1)
  params['decoder']['stack']['blocks']['attention']['query'][
      'kernel'] *= np.reshape([0.1, 1.0, 10.0], (3, 1, 1, 1))
  updates = _step(_config(**LAMB), grads, params)
  flat = sharding.named_leaves(params)
  for name, update in updates.items():
    if not groups_lib.decays(name, FLAT[name]):
      np.testing.assert_allclose(np.abs(update), 0.1, rtol=1e-3)
      continue
    axes = tuple(range('blocks' in name, update.ndim))
    norm = lambda x, axes=axes: np.sqrt(np.sum(np.square(x), axes))
    np.testing.assert_allclose(
        norm(update), 0.1 * norm(flat[name]), rtol=1e-5, err_msg=name)


@pytest.mark.parametrize('low, high', [(0.0, 0.5), (2.0, 9.0)])
def test_trust_ratios_are_clipped(low, high):
  """With equal entries the ratio is size / (1 + decay * size)."""
  params = jax.tree.map(lambda x: 4.0 * x, PARAMS)  # ratio 4/3, or 4
  updates = _step(_config(**LAMB, trust_clip=(low, high), always_adapt=True),
                  PARAMS, params)
  for name, update in updates.items():
    direction = 3 if groups_lib.decays(name, FLAT[name]) else 1
    want = -0.1 * direction * np.clip(4 / direction, low, high)
    np.testing.assert_allclose(update, want, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize('clip', [None, (2.0, 3.0)])
def test_a_zero_tensor_has_a_trust_ratio_of_one(clip):
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  config = _config(**LAMB, always_adapt=True, trust_clip=clip)
  for params, grads, want in ((zeros, PARAMS, -0.1), (PARAMS, zeros, 0.0)):
    update = _step(config, grads, params)['vision/projection/bias']
    np.testing.assert_allclose(update, want, rtol=1e-5)


def test_correction_of_the_rate_is_not_seen_by_the_trust_ratio():
  """DeepSpeed: in the first step m is 0.1 and v 0.05, and steps are longer."""
  fields = LAMB | dict(b2=0.95, eps=0.1, bias_correction='rate')
  correction = np.sqrt(0.05) / 0.1
  adapted = _step(_config(**fields, always_adapt=True), PARAMS)
  for name, update in adapted.items():
    np.testing.assert_allclose(update, -0.1 * correction, rtol=1e-5,
                               err_msg=name)
  plain = _step(_config(**fields), PARAMS)['vision/projection/bias']
  np.testing.assert_allclose(
      plain, -0.1 * correction * 0.1 / (np.sqrt(0.05) + 0.1), rtol=1e-5)


def test_fused_leaves_share_a_trust_ratio_in_each_layer():
  rng = np.random.default_rng(0)
  draw = lambda: rng.normal(size=(2, 3, 1, 2)).astype(np.float32)
  parts = ('query', 'key', 'value')
  tree = lambda: {'blocks': {part: {'kernel': draw()} for part in parts}}
  params, grads = tree(), tree()
  config = _config(**LAMB, groups=dict(
      all=dict(pattern='.', fused='(query|key|value)/kernel')))
  found = _step(config, grads, params)
  join = lambda tree: {'blocks': {'matrix': {'kernel': np.stack(
      [tree['blocks'][part]['kernel'] for part in parts], -1)}}}
  one = _step(_config(**LAMB), join(grads), join(params))
  for i, part in enumerate(parts):
    np.testing.assert_allclose(
        found[f'blocks/{part}/kernel'],
        one['blocks/matrix/kernel'][..., i], rtol=1e-5)
  apart = _step(_config(**LAMB), grads, params)
  assert not np.allclose(apart['blocks/key/kernel'], found['blocks/key/kernel'],
                         rtol=1e-2)


# ---------------------------------------------------------------------------
# Stacks

LAYERS = 3
OPTIONS = {
    'adamw': {},
    'adamw, clipped, by layer': dict(clip=0.5, layer_decay=0.7),
    'adamw, no decay': dict(no_decay='mlp/up', clip=0.5),
    'lamb': LAMB,
    'lamb, clipped, by layer': LAMB | dict(
        clip=0.5, layer_decay=0.7, trust_clip=(0.2, 0.9)),
    'lamb, everywhere, deepspeed': LAMB | dict(
        always_adapt=True, bias_correction='rate', weight_decay=0.0,
        trust_clip=(0.01, 10.0)),
    'lamb, fused': LAMB | dict(fused='query|key', no_decay='mlp/up'),
}


def _tower(seed, scale):
  """A tower whose layers differ in size by 100."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: (rng.normal(size=shape) * scale).astype(np.float32)
  sizes = np.float32([0.1, 1.0, 10.0])
  layers = [{'attention': {part: {'kernel': size * draw(4, 2, 2),
                                  'bias': size * draw(2, 2)}
                           for part in ('query', 'key')},
             'norm': {'scale': size * draw(4)},
             'mlp': {'up': {'kernel': size * draw(4, 5)}}} for size in sizes]
  return layers, {'patch_embedding': {'kernel': draw(3, 4)},
                  'position_embedding': draw(2, 4),
                  'final_norm': {'bias': draw(4)}}


def _stack(tower):
  layers, rest = tower
  return rest | {'blocks': jax.tree.map(lambda *x: np.stack(x), *layers)}


def _unstack(tower):
  layers, rest = tower
  return rest | {f'layer{i}': layer for i, layer in enumerate(layers)}


def _three_steps(config, params, grads):
  transform, _ = optimizer.make_optimizer(config, 3, params)
  state = transform.init(params)
  for grad in grads:
    updates, state = transform.update(grad, state, params)
    params = jax.tree.map(jnp.add, params, updates)
  return params


@pytest.mark.parametrize('name', OPTIONS)
def test_stacked_equals_unstacked_after_three_steps(name):
  fields = dict(OPTIONS[name])
  decay, fused = fields.pop('layer_decay', 1.0), fields.pop('fused', None)
  # Unstacked, every layer is a group with a rate of its own.
  below = r'embedding'
  groups = {f'layer{i}': dict(pattern=f'layer{i}', fused=fused,
                              lr_scale=decay ** (LAYERS - i))
            for i in range(LAYERS)}
  groups['below'] = dict(pattern=below, lr_scale=decay ** (LAYERS + 1))
  towers = [_tower(seed, scale) for seed, scale in
            ((0, 1.0), (1, 0.3), (2, 1.0), (3, 0.01))]
  apart = _three_steps(_config(**fields, groups=groups),
                       *_first_rest([_unstack(t) for t in towers]))
  groups = dict(all=dict(pattern='.', layer_decay=decay, fused=fused))
  together = _three_steps(_config(**fields, groups=groups),
                          *_first_rest([_stack(t) for t in towers]))
  layers = [apart.pop(f'layer{i}') for i in range(LAYERS)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5,
                                                       atol=1e-7),
               _stack((layers, apart)), together)


def _first_rest(trees):
  return trees[0], trees[1:]


def test_lamb_on_a_mesh_equals_lamb_on_one_device():
  """A trust ratio is that of the whole tensor, wherever its parts lie."""
  mesh = sharding.make_mesh(dict(data=1, fsdp=2, tensor=2, sequence=1),
                            jax.devices()[:4])
  config = _config(**LAMB | dict(always_adapt=True, clip=0.5))
  towers = [_stack(_tower(seed, 1.0)) for seed in range(2)]
  plain = _three_steps(config, *_first_rest(towers))
  laid = [jax.device_put(tower, sharding.shardings(mesh, tower))
          for tower in towers]
  assert not laid[0]['blocks']['mlp']['up']['kernel'].is_fully_replicated
  with jax.set_mesh(mesh):
    found = jax.jit(lambda params, grads: _three_steps(
        config, params, grads))(*_first_rest(laid))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5,
                                                       atol=1e-7),
               plain, jax.device_get(found))


# ---------------------------------------------------------------------------
# Wrong options


@pytest.mark.parametrize('groups, message', [
    ({'a': dict(pattern='desoder/')}, 'matches none of 9.*decoder/'),
    ({'a': dict(pattern='(')}, 'not a regular expression'),
    ({'a': dict(pattern='vision'), 'b': dict(pattern='bias')},
     "vision/projection/bias is in 'a' and in 'b'"),
    ({'a': dict(pattern='.', freeze=True)}, 'nothing to train'),
    ({'a': dict(pattern='vision', freez=True)},
     "groups.a has no field 'freez'. Did you mean 'freeze'"),
    ({'a': dict(pattern='vision', lr_scal=0.1)}, "Did you mean 'lr_scale'"),
    ({'a': dict(freeze=True)}, 'groups.a.pattern is missing'),
    ({'a': dict(pattern='vision', freeze='yes')},
     "groups.a.freeze is 'yes'; expected bool"),
    ({'a': dict(pattern='vision', freeze=1)}, 'freeze is 1; expected bool'),
    ({'a': dict(pattern='vision', weight_decay='no')}, 'expected float | None'),
    ({'a': 'vision'}, "groups.a is 'vision', a value; it has the fields"),
    ({'a': dict(pattern='.', layer_decay=0)},
     'groups.a.layer_decay is 0; allowed: above 0 up to 1'),
    ({'a': dict(pattern='.', layer_decay=1.5)}, 'layer_decay is 1.5; allowed'),
])
def test_bad_groups_are_user_errors(groups, message):
  with pytest.raises(errors.UserError, match=message):
    optimizer.split(PARAMS, groups)


@pytest.mark.parametrize('group, message', [
    (dict(pattern='^vision', layer_decay=0.9),
     'a.layer_decay counts from the top of one stack; its pattern finds none'),
    (dict(pattern='.', layer_decay=0.9), 'finds decoder/stack/, text/'),
    (dict(pattern='.', fused='quary'), "a.fused 'quary' matches none of 10"),
    (dict(pattern='.', fused='decoder.*|vision.*'),
     'one tensor of .* another number of layers'),
])
def test_groups_that_do_not_fit_are_user_errors(group, message):
  params = PARAMS | {'text': {'blocks': {'kernel': jnp.ones((2, 2, 2))}}}
  with pytest.raises(errors.UserError, match=message):
    optimizer.make_optimizer(_config(groups=dict(a=group)), 10, params)


@pytest.mark.parametrize('fields, message', [
    (dict(name='adam'), "name is 'adam'; allowed: adamw, lamb"),
    (dict(schedule='cosin'), "schedule is 'cosin'; allowed: cosine"),
    (dict(trust_clp=None), "no field 'trust_clp'. Did you mean 'trust_clip'"),
    (dict(peak_lr='high'), "peak_lr is 'high'; expected float"),
    (dict(no_decay='positional'), "no_decay 'positional' matches none of 9"),
    (dict(LAMB, bias_correction='none'),
     "bias_correction is 'none'; allowed: moments, rate"),
    (dict(LAMB, trust_clip=(10.0, 0.01)),
     r'trust_clip is \(10.0, 0.01\); allowed: None, or the lowest'),
    (dict(LAMB, trust_clip=(-1.0, 10.0)), 'trust_clip is .*-1.0'),
    (dict(LAMB, trust_clip=(10.0,)), r'trust_clip is \(10.0,\)'),
    (dict(LAMB, trust_clip=('a', 'b')), 'trust_clip is'),
    (dict(LAMB, trust_clip=('a', 0.01, 10.0)), 'trust_clip is'),
])
def test_bad_fields_are_user_errors(fields, message):
  with pytest.raises(errors.UserError, match=message):
    optimizer.make_optimizer(_config(**fields), 10, PARAMS)


def test_a_missing_field_is_a_user_error():
  config = _config()
  del config['b2']
  with pytest.raises(errors.UserError, match='config.optimizer.b2 is missing'):
    optimizer.make_optimizer(config, 10, PARAMS)
