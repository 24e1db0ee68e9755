"""Groups, decay rules, schedules, and AdamW against arithmetic by hand."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from mmgen import errors
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


def test_decay_spares_norms_biases_and_vectors_also_in_stacks():
  decayed = {name for name, leaf in FLAT.items()
             if optimizer.decays(name, leaf)}
  assert decayed == {
      'vision/projection/kernel', 'decoder/embedding',
      'decoder/stack/blocks/attention/query/kernel'}


def test_adamw_equals_arithmetic_by_hand():
  """First step: the direction is g / (|g| + eps), plus decay, times -rate."""
  grads = jax.tree.map(lambda x: 2.0 * x, PARAMS)
  updates = _step(_config(), grads)
  np.testing.assert_allclose(
      updates['vision/projection/kernel'], -0.1 * (1 + 0.5), rtol=1e-6)
  np.testing.assert_allclose(
      updates['decoder/stack/blocks/mlp_norm/scale'], -0.1, rtol=1e-6)


def test_groups_scale_rate_and_replace_decay():
  groups = {'eyes': dict(pattern='^vision/', lr_scale=0.1, weight_decay=2.0),
            'rest': dict(pattern='^decoder/')}
  updates = _step(_config(groups=groups), PARAMS)
  for name in updates:
    want = -0.01 * (1 + 2.0) if name.startswith('vision') else (
        -0.1 * (1.5 if optimizer.decays(name, FLAT[name]) else 1))
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
  cast = optimizer.cast(frozen, jnp.bfloat16)
  assert cast['vision']['projection']['kernel'].dtype == jnp.bfloat16


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
])
def test_bad_groups_are_user_errors(groups, message):
  with pytest.raises(errors.UserError, match=message):
    optimizer.split(PARAMS, groups)


def test_schedules_by_hand():
  def rates(**fields):
    schedule = optimizer.make_schedule(_config(peak_lr=1.0, **fields), 8)
    return [round(float(schedule(step)), 6) for step in range(9)]
  assert rates(schedule='constant', warmup=4)[:5] == [.25, .5, .75, 1, 1]
  assert rates(schedule='linear', warmup=4, min_ratio=0.2) == [
      .25, .5, .75, 1, 1, .8, .6, .4, .2]
  cosine = rates(schedule='cosine', min_ratio=0.5)
  assert cosine[0] == 1 and cosine[4] == 0.75 and cosine[8] == 0.5
  assert cosine[2] == round(0.5 + 0.25 * (1 + np.cos(np.pi / 4)), 6)


@pytest.mark.parametrize('fields, message', [
    (dict(schedule='cosin'), "schedule is 'cosin'; allowed: cosine"),
    (dict(warmup=10), 'warmup is 10 steps; a run of 10'),
    (dict(name='adam'), "name is 'adam'; allowed: adamw"),
])
def test_bad_fields_are_user_errors(fields, message):
  with pytest.raises(errors.UserError, match=message):
    optimizer.make_optimizer(_config(**fields), 10, PARAMS)
