"""Checkpoints: other meshes, other models, partial reads, full disks."""

import json
import os
import subprocess
import sys
import textwrap

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmgen import errors
from mmgen.training import checkpoint
from mmgen.training import sharding


def _mesh(**ways):
  return sharding.make_mesh(
      {**dict(data=1, fsdp=1, tensor=1, sequence=1), **ways})


def _state(mesh, width=8, extra='connector'):
  def init(key):
    params = {
        'decoder': {'mlp': {'up': {
            'kernel': jax.random.normal(key, (3, 8, width))}}},
        extra: {'bias': jnp.ones(5)}}
    return dict(params=params, opt=optax.adam(0.1).init(params), state={},
                step=jnp.int32(7), bad=jnp.int32(0))
  return sharding.init_sharded(mesh, init, jax.random.key(0))


def _abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run folder with one checkpoint from a mesh of 2 x 4."""
  folder = tmp_path_factory.mktemp('run')
  state = _state(_mesh(data=2, fsdp=4))
  checkpointer = checkpoint.Checkpointer(folder)
  assert checkpointer.latest() is None
  checkpointer.save(7, state, {'config': {'a': [1, 2]}, 'tokens': 9}, b'\0\xff')
  checkpointer.close()
  checkpoint.save_frozen(folder, {'decoder': {'head': {
      'kernel': jnp.full((8, 2), 1 / 3)}}, 'teacher': {'scale': jnp.ones(2)}})
  return folder, state


def test_restores_onto_another_mesh_exactly(run):
  folder, state = run
  other = _abstract(_state(_mesh(fsdp=8)))
  restored, extras = checkpoint.Checkpointer(folder).restore(other)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  kernel = restored['params']['decoder']['mlp']['up']['kernel']
  assert kernel.sharding.mesh.shape['fsdp'] == 8
  assert extras['tokens'] == 9 and extras['config'] == {'a': [1, 2]}
  assert extras['step'] == 7 and extras['git_revision']


def test_reads_parameters_without_the_optimizer(run):
  folder, state = run
  params = checkpoint.load_params(folder)
  flat = traverse_util.flatten_dict(params, sep='/')
  assert sorted(flat) == ['connector/bias', 'decoder/head/kernel',
                          'decoder/mlp/up/kernel', 'teacher/scale']
  np.testing.assert_array_equal(
      flat['decoder/mlp/up/kernel'],
      state['params']['decoder']['mlp']['up']['kernel'])
  np.testing.assert_array_equal(
      flat['decoder/head/kernel'], np.full((8, 2), 1 / 3, np.float32))


def test_reads_one_part_onto_a_mesh(run):
  folder, _ = run
  params = checkpoint.load_params(folder, 'decoder', _mesh(fsdp=8))
  assert list(params) == ['decoder'] and 'head' in params['decoder']
  kernel = params['decoder']['mlp']['up']['kernel']
  assert kernel.sharding.spec[1] == 'fsdp'
  with pytest.raises(errors.UserError, match="no part 'vision'.*connector"):
    checkpoint.load_params(folder, 'vision')


def test_tokenizer_and_extras_come_back(run):
  folder, _ = run
  assert checkpoint.tokenizer_bytes(folder) == b'\0\xff'
  assert checkpoint.load_extras(folder)['config'] == {'a': [1, 2]}


def test_checkpoint_of_another_model_names_the_differences(run):
  folder, _ = run
  other = _abstract(_state(_mesh(data=8), width=16, extra='conector'))
  with pytest.raises(errors.UserError) as caught:
    checkpoint.Checkpointer(folder).restore(other)
  text = str(caught.value)
  assert 'params/decoder/mlp/up/kernel is [3, 8, 8] float32 there' in text
  assert ('params/conector/bias [5] float32 is missing there (nearest: '
          'params/connector/bias') in text
  assert '\n' not in text


def test_no_checkpoint_is_a_user_error(tmp_path):
  with pytest.raises(errors.UserError, match='no run folder'):
    checkpoint.load_params(tmp_path)
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(errors.UserError, match='no complete checkpoint'):
    checkpoint.load_params(tmp_path)


def test_unwritable_folder_is_a_user_error(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.UserError, match='cannot write below .*workdir'):
    checkpoint.Checkpointer(tmp_path / 'file' / 'run')


@pytest.mark.parametrize('error, refused', [
    (OSError(28, 'No space left on device'), True),
    (ValueError('UNAVAILABLE: Error writing "/x/d": No space left'), True),
    (RuntimeError('RESOURCE_EXHAUSTED: the quota of the bucket'), True),
    (RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.'),
     False),
    (ValueError('shapes differ'), False),
])
def test_what_counts_as_a_folder_that_cannot_be_written(error, refused):
  wanted = errors.UserError if refused else type(error)
  with pytest.raises(wanted) as caught, errors.writing('runs/x'):
    raise error
  assert ('cannot write below runs/x' in str(caught.value)) == refused


def test_full_disk_keeps_the_last_checkpoint(tmp_path):
  """A limit on the size of files stands for a full disk.

  The state has the leaves of a whole train state: the writes of many are on
  their way when the first one fails.
  """
  program = textwrap.dedent('''
      import resource, sys, time
      import numpy as np
      from mmgen import errors
      from mmgen.training import checkpoint
      checkpointer = checkpoint.Checkpointer(sys.argv[1])
      def state(values):
        tree = {f'w{i}': np.array(values) for i in range(60)}
        return dict(params=tree, opt=dict(mu=tree, nu=tree), step=np.zeros(()))
      checkpointer.save(1, state(np.arange(10.)), {}, b'')
      checkpointer.wait()
      resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
      def main():
        noise = np.random.default_rng(0).normal(size=30_000)
        for step in (2, 3):  # the second one is told of the first one's end
          checkpointer.save(step, state(noise), {}, b'')
          time.sleep(1)
        checkpointer.wait()
      errors.run(main)
  ''')
  done = subprocess.run([sys.executable, '-c', program, str(tmp_path)],
                        capture_output=True, text=True, env=dict(os.environ))
  assert done.returncode == 2, done.stderr
  assert 'cannot write below' in done.stderr and 'too large' in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1, done.stderr
  params = checkpoint.load_params(tmp_path)
  np.testing.assert_array_equal(params['w0'], np.arange(10.0))


def test_extras_are_plain_json(run):
  folder, _ = run
  path = folder / 'checkpoints' / '7' / 'extras' / 'metadata'
  assert json.loads(path.read_text())['tokens'] == 9
