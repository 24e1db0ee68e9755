"""Parts of other runs: what is taken, what grows, what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgen import errors
from mmgen.data import text
from mmgen.training import checkpoint
from mmgen.training import inherit
from mmgen.training import sharding


def _mesh():
  return sharding.make_mesh(dict(data=1, fsdp=8, tensor=1, sequence=1))


def _params(value, vocab=16, hidden=8, **more):
  """{name: array}, in place on the mesh."""
  flat = {
      'decoder/embedding': (vocab, 8), 'decoder/head/kernel': (8, vocab),
      'decoder/mlp/up/kernel': (2, 8, hidden), 'vision/scale': (3,), **more}
  mesh = _mesh()
  layouts = sharding.shardings(mesh, {
      name: jax.ShapeDtypeStruct(shape, jnp.float32)
      for name, shape in flat.items()})
  return {name: jax.device_put(jnp.full(shape, value), layouts[name])
          for name, shape in flat.items()}


@pytest.fixture(scope='module')
def parent(tmp_path_factory):
  folder = tmp_path_factory.mktemp('parent')
  checkpointer = checkpoint.Checkpointer(folder)
  checkpointer.save(3, {'params': _params(1.0, **{'head/bias': (2,)})}, {}, b'')
  checkpointer.close()
  return folder


def _values(params):
  return {name: sorted(set(np.ravel(x).tolist())) for name, x in params.items()}


def test_a_part_is_taken_and_the_rest_left_alone(parent):
  fresh = _params(0.0)
  params, report = inherit.inherit(fresh, {'decoder': parent}, _mesh())
  assert _values(params) == {
      'decoder/embedding': [1], 'decoder/head/kernel': [1],
      'decoder/mlp/up/kernel': [1], 'vision/scale': [0]}
  assert all(params[name].sharding == fresh[name].sharding for name in params)
  assert report == {'decoder': {
      'from': str(parent), 'part': 'decoder',
      'grown': [], 'fresh': [], 'unused': [],
      'copied': ['decoder/embedding', 'decoder/head/kernel',
                 'decoder/mlp/up/kernel']}}


def test_a_part_of_another_name(parent):
  fresh = {name.replace('vision/', 'teacher/'): leaf
           for name, leaf in _params(0.0).items()}
  params, report = inherit.inherit(
      fresh, {'teacher': parent}, _mesh(), {'teacher': 'vision'})
  assert _values(params)['teacher/scale'] == [1]
  assert _values(params)['decoder/embedding'] == [0]
  assert report['teacher']['copied'] == ['teacher/scale']
  assert report['teacher']['part'] == 'vision'


def test_all_takes_what_is_shared_and_lists_the_rest(parent):
  fresh = _params(0.0, **{'connector/bias': (4,)})
  params, report = inherit.inherit(fresh, {'all': parent}, _mesh())
  assert _values(params)['vision/scale'] == [1]
  assert _values(params)['connector/bias'] == [0]
  assert report['all']['fresh'] == ['connector/bias']
  assert report['all']['unused'] == ['head/bias']


def test_a_named_part_wins_over_all(parent, tmp_path):
  checkpointer = checkpoint.Checkpointer(tmp_path)
  checkpointer.save(1, {'params': _params(2.0)}, {}, b'')
  checkpointer.close()
  params, _ = inherit.inherit(
      _params(0.0), {'vision': tmp_path, 'all': parent}, _mesh())
  assert _values(params)['vision/scale'] == [2]
  assert _values(params)['decoder/embedding'] == [1]


def test_a_grown_vocabulary_keeps_fresh_rows(parent):
  params, report = inherit.inherit(
      _params(0.0, vocab=24), {'decoder': parent}, _mesh())
  embedding = np.asarray(params['decoder/embedding'])
  assert embedding[:16].min() == 1 and embedding[16:].max() == 0
  head = np.asarray(params['decoder/head/kernel'])
  assert head[:, :16].min() == 1 and head[:, 16:].max() == 0
  assert report['decoder']['grown'] == [
      'decoder/embedding', 'decoder/head/kernel']


def test_misfits_are_all_listed(parent):
  fresh = _params(0.0, vocab=8, hidden=16, **{'decoder/bias': (1,)})
  with pytest.raises(errors.UserError) as caught:
    inherit.inherit(fresh, {'decoder': parent}, _mesh())
  text = str(caught.value)
  assert f'decoder/mlp/up/kernel is [2, 8, 8] in {parent}, [2, 8, 16] here' in (
      text)
  assert 'decoder/embedding is [16, 8]' in text  # a smaller one is no growth
  assert 'decoder/bias is only here' in text and '\n' not in text


def test_a_part_that_nobody_has_is_a_user_error(parent):
  with pytest.raises(errors.UserError, match="no part 'decodr'; its parts: d"):
    inherit.inherit(_params(0.0), {'decodr': parent}, _mesh())
  with pytest.raises(errors.UserError, match="has no part 'connector'"):
    inherit.inherit(_params(0.0, **{'connector/bias': (4,)}),
                    {'connector': parent}, _mesh())


def test_a_vocabulary_of_other_meanings_is_refused(tmp_path):
  texts = ['a fox on a blue ground', 'two owls', 'is there a bus?'] * 20
  old, retrained, other = (text.Tokenizer.from_bytes(text.train(t, size))
                           for t, size in ((texts, 295), (texts, 305),
                                           ([t[::-1] for t in texts], 295)))
  checkpointer = checkpoint.Checkpointer(tmp_path)
  checkpointer.save(1, {'params': _params(1.0)}, {}, old.bytes)
  checkpointer.close()
  fresh = _params(0.0)
  inherit.check_vocabulary(fresh, {'all': tmp_path}, old)
  inherit.check_vocabulary(fresh, {'vision': tmp_path}, other)
  for part in ('decoder', 'all'):
    for tokenizer in (retrained, other):  # the letters come last, and moved
      with pytest.raises(errors.UserError, match='mean something else here'):
        inherit.check_vocabulary(fresh, {part: tmp_path}, tokenizer)
