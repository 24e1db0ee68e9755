"""The step: microbatches, frozen parameters, randomness, bad gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from mmgen import errors
from mmgen.objectives import common
from mmgen.training import optimizer
from mmgen.training import step as step_lib

ROWS, LENGTH = 8, 4


class Toy(nn.Module):
  """Two layers; predicts a number at each position."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(1, name='b')(nn.tanh(nn.Dense(6, name='a')(x)))[..., 0]


class Objective:
  """Weighted squares of two kinds, with noise keyed by row if asked."""
  names = ('square', 'size')
  coefficients = {'square': 1.0, 'size': 0.1}
  coupled = False

  def __init__(self, noise=0.0):
    self.noise = noise

  def weights(self, batch):
    total = jnp.sum(batch['s']['weights'])
    return {'square': total, 'size': total}

  def __call__(self, params, frozen, state, batch, rng, step):
    x, weights = batch['s']['x'], batch['s']['weights']
    out = Toy().apply({'params': {**params, **frozen}}, x)
    if self.noise:
      keys = jax.vmap(jax.random.fold_in, (None, 0))(
          common.purpose_key(rng, 'noise'), batch['s']['row'])
      out += self.noise * jax.vmap(
          lambda key: jax.random.normal(key, (LENGTH,)))(keys)
    weight = jnp.sum(weights)
    sums = {'square': (jnp.sum(weights * (out - batch['s']['y']) ** 2), weight),
            'size': (jnp.sum(weights * out ** 2), weight)}
    return sums, ({'seen': state['seen'] + jnp.sum(weights)},
                  {'aux/mean': jnp.mean(out)})


def _config(accumulate=1, seed=0, **fields):
  return ml_collections.ConfigDict(dict(
      seed=seed, steps=10, optimizer={**dict(
          name='adamw', peak_lr=0.01, schedule='constant', warmup=0,
          min_ratio=0.0, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0,
          groups={}, accumulate=accumulate), **fields}))


def _batch(seed=0, weights=None):
  rng = np.random.default_rng(seed)
  if weights is None:  # very uneven over rows, with rows that have none
    weights = rng.integers(0, 2, (ROWS, LENGTH)) * np.arange(ROWS)[:, None]
  return {'s': dict(
      x=jnp.asarray(rng.normal(size=(ROWS, LENGTH, 3)), jnp.float32),
      y=jnp.asarray(rng.normal(size=(ROWS, LENGTH)), jnp.float32),
      weights=jnp.asarray(weights, jnp.float32),
      segments=jnp.ones((ROWS, LENGTH), jnp.int32),
      image_index=jnp.full((ROWS, LENGTH), -1, jnp.int32))}


def _setup(config, objective, frozen_part=None):
  params = Toy().init(jax.random.key(1), jnp.zeros((1, LENGTH, 3)))['params']
  groups = {}
  if frozen_part:
    groups = {'f': dict(pattern=f'^{frozen_part}/', freeze=True)}
  trained, frozen = optimizer.split(params, groups)
  made = optimizer.make_optimizer(config.optimizer, config.steps, trained)
  state = step_lib.init_state(trained, made, {'seen': jnp.zeros(())})
  return step_lib.make_train_step(objective, made, config), state, frozen


def _run(config, objective, steps=3, batches=None, frozen_part=None):
  step, state, frozen = _setup(config, objective, frozen_part)
  history = []
  for i in range(steps):
    state, metrics = step(state, frozen, batches[i] if batches else _batch(i))
    history.append(jax.device_get(metrics))
  return jax.device_get(state), history


@pytest.mark.parametrize('noise', [0.0, 0.3])
@pytest.mark.parametrize('accumulate', [2, 4])
def test_microbatches_equal_the_whole_batch(accumulate, noise):
  """Uneven weights: a mean of means would be far off."""
  whole, history = _run(_config(), Objective(noise))
  parts, other = _run(_config(accumulate), Objective(noise))
  for a, b in zip(history, other):
    for name in ('loss', 'loss/square', 'loss/size', 'grad_norm'):
      np.testing.assert_allclose(a[name], b[name], rtol=1e-6, err_msg=name)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4,
                                                       atol=1e-6),
               whole['params'], parts['params'])
  np.testing.assert_allclose(whole['state']['seen'], parts['state']['seen'])


def test_denominators_of_microbatches_give_a_mean_of_means():
  batch = _batch()
  batch['s']['weights'] = batch['s']['weights'].at[::4].set(0)  # a whole one
  step, state, frozen = _setup(
      _config(accumulate=4, denominators='microbatch'), Objective())

  def loss(params):
    total = 0.0
    for i in range(4):
      part = {'s': {name: x[i::4] for name, x in batch['s'].items()}}
      sums, _ = Objective()(params, frozen, {'seen': 0.0}, part, None, 0)
      weight = jnp.maximum(jnp.sum(part['s']['weights']), 1)
      total += (sums['square'][0] + 0.1 * sums['size'][0]) / weight / 4
    return total
  wanted, grads = jax.value_and_grad(loss)(state['params'])
  _, metrics = step(state, frozen, batch)
  np.testing.assert_allclose(metrics['loss'], wanted, rtol=1e-6)
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
  np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-5)
  np.testing.assert_allclose(
      metrics['loss'], metrics['loss/square'] + 0.1 * metrics['loss/size'],
      rtol=1e-6)
  _, whole = _run(_config(accumulate=4), Objective(), 1, [batch])
  assert abs(wanted / whole[0]['loss'] - 1) > 0.02


def test_denominators_of_one_microbatch_are_those_of_the_batch():
  for found, whole in zip(
      _run(_config(denominators='microbatch'), Objective(), 1)[1],
      _run(_config(), Objective(), 1)[1]):
    assert found == whole


def test_wrong_denominators_are_refused():
  with pytest.raises(errors.UserError, match='denominators is .row.; allowed'):
    _setup(_config(denominators='row'), Objective())

  class Coupled(Objective):
    coupled = True
  with pytest.raises(errors.UserError, match='denominators.*couples all'):
    _setup(_config(denominators='microbatch'), Coupled())


def test_total_is_the_sum_of_coefficients_times_means():
  _, history = _run(_config(), Objective(), steps=1)
  m = history[0]
  np.testing.assert_allclose(
      m['loss'], m['loss/square'] + 0.1 * m['loss/size'], rtol=1e-6)
  assert m['text_tokens'] == ROWS * LENGTH and m['samples'] == ROWS
  assert m['lr'] == np.float32(0.01) and 'aux/mean' in m
  assert m['update_norm'] > 0 and m['param_norm'] > 0


def test_gradient_norm_is_that_of_the_loss():
  config = _config()
  step, state, frozen = _setup(config, Objective())
  batch = _batch()

  def loss(params):
    sums, _ = Objective()(params, frozen, {'seen': 0.0}, batch, None, 0)
    weights = jnp.sum(batch['s']['weights'])
    return sums['square'][0] / weights + 0.1 * sums['size'][0] / weights
  grads = jax.grad(loss)(state['params'])
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
  _, metrics = step(state, frozen, batch)
  np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-5)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_non_finite_step_leaves_everything_and_stays_marked(accumulate):
  bad = _batch(1)
  bad['s']['x'] = bad['s']['x'].at[5, 0, 0].set(jnp.nan)
  config = _config(accumulate)
  good, _ = _run(config, Objective(), steps=1, batches=[_batch(0)])
  after, history = _run(config, Objective(), steps=3,
                        batches=[_batch(0), bad, _batch(2)])
  assert [int(m['bad']) for m in history] == [0, 1, 1]
  assert after['step'] == 1 and after['bad'] == 1
  for part in ('params', 'opt', 'state'):
    jax.tree.map(np.testing.assert_array_equal, after[part], good[part])


def test_infinite_gradient_of_a_finite_loss_is_caught():
  """sqrt at 0 has loss 0 and slope infinity."""
  class Root(Objective):
    def __call__(self, params, frozen, state, batch, rng, step):
      sums, rest = super().__call__(params, frozen, state, batch, rng, step)
      bias = params['b']['bias'][0]
      sums['square'] = (sums['square'][0] + jnp.sqrt(jnp.abs(bias)), 1.0)
      return sums, rest
  _, history = _run(_config(), Root(), steps=1)
  assert np.isfinite(history[0]['loss']) and history[0]['bad'] == 1


def test_frozen_parameters_move_nothing_and_take_part():
  state, history = _run(_config(), Objective(), steps=2, frozen_part='a')
  assert list(state['params']) == ['b']
  _, free = _run(_config(), Objective(), steps=2)
  assert history[0]['loss'] == free[0]['loss']
  assert history[0]['grad_norm'] < free[0]['grad_norm']


def test_batch_without_targets_is_a_loss_of_zero():
  nothing = _batch(0, weights=np.zeros((ROWS, LENGTH)))
  state, history = _run(_config(), Objective(), steps=1, batches=[nothing])
  assert history[0]['loss'] == 0 and history[0]['bad'] == 0
  assert state['step'] == 1


def test_randomness_is_keyed_by_seed_step_and_purpose():
  same = [_run(_config(seed=3), Objective(1.0), steps=2,
               batches=[_batch()] * 2)[1] for _ in range(2)]
  assert same[0] == same[1]
  other = _run(_config(seed=4), Objective(1.0), steps=2,
               batches=[_batch()] * 2)[1]
  assert same[0][0]['loss'] != other[0]['loss']
  a, b = (common.purpose_key(step_lib.step_key(0, 0), p) for p in 'ab')
  assert (jax.random.key_data(a) != jax.random.key_data(b)).any()
  a, b = (step_lib.step_key(0, s) for s in (1, 2))
  assert (jax.random.key_data(a) != jax.random.key_data(b)).any()


def test_coupled_objectives_refuse_microbatches():
  class Coupled(Objective):
    coupled = True
  with pytest.raises(errors.UserError, match='accumulate is 2.*couples'):
    _setup(_config(2), Coupled())


def test_projection_follows_the_update():
  class Bounded(Objective):
    def project(self, params):
      return jax.tree.map(lambda x: jnp.clip(x, -0.1, 0.1), params)
  state, _ = _run(_config(), Bounded(), steps=1)
  assert max(np.abs(x).max() for x in jax.tree.leaves(state['params'])) <= (
      np.float32(0.1))
