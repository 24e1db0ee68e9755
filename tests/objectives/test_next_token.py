import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgen.models import decoder
from mmgen.models import multimodal
from mmgen.objectives import next_token

MODEL = multimodal.MultimodalDecoder(multimodal.MultimodalConfig(
    decoder.DecoderConfig(vocab=11, layers=1, width=8, heads=2, hidden=12)))


class Given(nn.Module):
  """Looks the logits up in the batch; the parameter only scales them."""

  @nn.compact
  def __call__(self, batch, train=False):
    assert train
    return batch['logits'] * self.param('scale', nn.initializers.ones, ()), {}


def _batch(seed, rows, length):
  rng = np.random.default_rng(seed)
  positions = np.broadcast_to(np.arange(length), (rows, length))
  return dict(
      tokens=jnp.asarray(rng.integers(0, 11, (rows, length)), jnp.int32),
      targets=jnp.asarray(rng.integers(0, 11, (rows, length)), jnp.int32),
      weights=jnp.asarray(rng.choice([0, 0.5, 1], (rows, length)), jnp.float32),
      segments=jnp.ones((rows, length), jnp.int32),
      positions=jnp.asarray(positions, jnp.int32))


@functools.cache
def _params():
  return jax.jit(MODEL.init)(jax.random.key(0), _batch(0, 1, 1))['params']


@jax.jit
def _run(params, frozen, batch):
  return next_token.NextToken(MODEL)(params, frozen, {}, batch, None, 0)


def test_by_hand():
  # Odds 1 : 3 for the target, then 1 : 1, then a slot that does not count.
  logits = jnp.log(jnp.array([[[1.0, 3.0], [2.0, 2.0], [1.0, 9.0]]]))
  one = dict(logits=logits, targets=jnp.array([[1, 0, 0]]),
             weights=jnp.array([[1.0, 0.5, 0.0]]))
  # A second source: a wrong guess with odds 1 : 4.
  two = dict(logits=jnp.log(jnp.array([[[4.0, 1.0]]])),
             targets=jnp.array([[1]]), weights=jnp.array([[2.0]]))
  objective = next_token.NextToken(Given())
  sums, (state, aux) = objective(
      {'scale': jnp.ones(())}, {}, {'kept': 1}, {'one': one, 'two': two},
      None, 0)
  first = np.log(4 / 3) + 0.5 * np.log(2)
  second = 2 * np.log(5)
  np.testing.assert_allclose(sums['next_token'], (first + second, 3.5), 1e-6)
  np.testing.assert_allclose(aux['next_token/one'], (first, 1.5), 1e-6)
  np.testing.assert_allclose(aux['next_token/two'], (second, 2), 1e-6)
  # Right, a tie that goes to the lower id and is right, wrong.
  np.testing.assert_allclose(aux['accuracy'], (1.5, 3.5))
  assert state == {'kept': 1}
  assert sums.keys() == set(objective.names) == objective.coefficients.keys()


def test_weights_follow_from_the_batch_alone():
  batch = {'a': _batch(0, 2, 5), 'b': _batch(1, 3, 4)}
  objective = next_token.NextToken(MODEL)
  expected = sum(x['weights'].sum() for x in batch.values())
  np.testing.assert_allclose(
      objective.weights(batch)['next_token'], expected)
  sums, _ = _run(_params(), {}, batch)
  np.testing.assert_allclose(sums['next_token'][1], expected)
  assert not objective.coupled


def test_microbatches_add_up():
  params, batch = _params(), _batch(0, 4, 6)
  gradient = jax.jit(jax.grad(
      lambda p, b: _run(p, {}, {'a': b})[0]['next_token'][0]))
  whole = gradient(params, batch)
  halves = [gradient(params, jax.tree.map(lambda x, s=s: x[s], batch))
            for s in (slice(2), slice(2, 4))]
  for a, b, c in zip(*map(jax.tree.leaves, (whole, *halves))):
    np.testing.assert_allclose(a, b + c, atol=1e-5)


def test_slots_without_weight_teach_nothing():
  batch = _batch(0, 2, 6)
  loss = lambda b: _run(_params(), {}, {'a': b})[0]['next_token']
  ignored = batch['weights'] == 0
  assert ignored.any()
  other = jnp.where(ignored, (batch['targets'] + 1) % 11, batch['targets'])
  np.testing.assert_array_equal(loss(batch), loss({**batch, 'targets': other}))
  silent = {**batch, 'weights': jnp.zeros_like(batch['weights'])}
  assert loss(silent) == (0, 0)


def test_trained_and_frozen_parameters_join():
  batch = {'a': _batch(0, 2, 6)}
  whole, _ = _run(_params(), {}, batch)
  decoder_params = _params()['decoder']
  frozen = {'decoder': {'stack': decoder_params['stack']}}
  trained = {'decoder': {k: v for k, v in decoder_params.items()
                         if k != 'stack'}}
  parts, _ = _run(trained, frozen, batch)
  np.testing.assert_array_equal(whole['next_token'], parts['next_token'])


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_cross_entropy_is_float32_and_stable(dtype):
  logits = jnp.array([[[300.0, 0.0, -300.0]]], dtype)
  for target, expected in enumerate((0, 300, 600)):
    loss = next_token.cross_entropy(logits, jnp.array([[target]]))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, [[expected]])
  # In bfloat16 the logarithm of the sum itself would be off by 1e-3 or so.
  logits = jnp.array([[[1.0, 2.0, 3.0]]], dtype)
  np.testing.assert_allclose(
      next_token.cross_entropy(logits, jnp.array([[0]])),
      [[2 + np.log1p(np.exp(-1) + np.exp(-2))]], rtol=1e-6)
