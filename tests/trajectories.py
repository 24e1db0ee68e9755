"""What the tests of whole trajectories share: training, and the comparison.

An array file holds 'init/<parameter>', 'final/<parameter>', 'loss' and
'grad_norm' of each step, 'rows' [step, batch] of a pool of examples, and what
the pool is made of.
"""

import pathlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from mmgen import config as config_lib
from mmgen import train as train_lib
from mmgen.training import optimizer as optimizer_lib
from mmgen.training import sharding
from mmgen.training import step as step_lib

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'trajectories'
TOLERANCE = 3e-4


def load(name):
  """The arrays of a file."""
  with np.load(GOLDEN / f'{name}.npz') as file:
    return dict(file)


def part(arrays, prefix):
  """{parameter: float32 array} of those that stand below a prefix."""
  return {name.removeprefix(prefix): np.float32(x)
          for name, x in arrays.items() if name.startswith(prefix)}


def train(config, vocab, arrays, pool):
  """Takes a step of each row of `rows`, as a run of this config does.

  Args:
    config: of the run.
    vocab: size of the vocabulary.
    arrays: of the file.
    pool: {source: {name: array of all examples}}.

  Returns:
    ({trained parameter: final value}, metrics [step] of all steps).
  """
  model = config_lib.build_model(config, vocab)
  objective = train_lib.build_objective(config, model)
  birth, optimizer = train_lib.plan_birth(config, model, objective, pool)
  # The model's own parameters, by name and shape, are those of the file.
  shapes = jax.eval_shape(birth, jax.random.key(0))
  params = flax.traverse_util.unflatten_dict(part(arrays, 'init/'), sep='/')
  trained, frozen = optimizer_lib.split(params, config.optimizer.groups)
  assert jax.tree.map(np.shape, (trained, frozen)) == jax.tree.map(
      lambda x: x.shape, (shapes[0]['params'], shapes[1]))
  state = step_lib.init_state(jax.tree.map(jnp.asarray, trained), optimizer)
  frozen = optimizer_lib.cast(frozen, config.dtype)
  step = step_lib.make_train_step(objective, optimizer, config)
  history = []
  with jax.default_matmul_precision('highest'):
    for rows in arrays['rows']:
      state, metrics = step(state, frozen, {
          source: {name: x[rows] for name, x in examples.items()}
          for source, examples in pool.items()})
      history.append(jax.device_get(metrics))
  return sharding.named_leaves(jax.device_get(state['params'])), history


def check(found, history, arrays, exempt=()):
  """Compares every step, and the end of every parameter.

  Args:
    found, history: of `train`.
    arrays: of the file.
    exempt: parameters whose gradient is zero but for rounding.
  """
  for metric in ('loss', 'grad_norm'):
    np.testing.assert_allclose(
        [m[metric] for m in history], arrays[metric], rtol=TOLERANCE,
        err_msg=metric)
  start, final = part(arrays, 'init/'), part(arrays, 'final/')
  assert found.keys() == final.keys()
  for parameter in sorted(final.keys() - set(exempt)):
    error, moved = (np.linalg.norm(final[parameter] - x[parameter])
                    for x in (found, start))
    size = np.linalg.norm(final[parameter])
    assert error < TOLERANCE * min(size, moved), parameter
