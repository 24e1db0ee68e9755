"""Meshes, layouts by name, births in place, batches, equality over meshes."""

import logging

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from mmgen import errors
from mmgen.training import sharding


def _mesh(**ways):
  return sharding.make_mesh(
      {**dict(data=1, fsdp=1, tensor=1, sequence=1), **ways})


def test_minus_one_is_the_rest():
  mesh = _mesh(data=-1, fsdp=4)
  assert dict(mesh.shape) == dict(data=2, fsdp=4, tensor=1, sequence=1)
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize('ways, message', [
    (dict(data=3), 'takes 3 devices; this run has 8'),
    (dict(data=-1, fsdp=3), 'takes a multiple of 3 devices; this run has 8'),
    (dict(data=-1, fsdp=16), 'takes a multiple of 16 devices'),
    (dict(data=-1, fsdp=-1), 'at most one is -1'),
    (dict(data=8, fsdp=0), 'each axis is at least 1'),
])
def test_impossible_mesh_is_a_user_error(ways, message):
  with pytest.raises(errors.UserError, match=message):
    _mesh(**ways)


@pytest.mark.parametrize('name, shape, want', [
    ('decoder/stack/blocks/attention/query/kernel', (3, 8, 64),
     P(None, 'fsdp', 'tensor')),
    ('decoder/stack/blocks/attention/query/bias', (3, 64), P(None, 'tensor')),
    ('decoder/stack/blocks/attention/out/kernel', (3, 64, 8),
     P(None, 'tensor', 'fsdp')),
    ('attention/out/kernel', (64, 8), P('tensor', 'fsdp')),
    ('opt/1/mu/decoder/stack/blocks/mlp/down/kernel', (3, 32, 8),
     P(None, 'tensor', 'fsdp')),
    ('decoder/embedding', (64, 8), P('tensor', 'fsdp')),
    ('decoder/head/kernel', (8, 64), P('fsdp', 'tensor')),
    ('vision/projection/kernel', (27, 8), P(None, 'fsdp')),
    ('blocks/mlp_norm/scale', (3, 8), P(None, None)),
    ('step', (), P()),
])
def test_rules_are_right_aligned(name, shape, want):
  axes = dict(data=1, fsdp=4, tensor=2, sequence=1)
  layout, note = sharding.spec(name, shape, axes)
  assert layout == want and note is None


def test_small_leaves_that_do_not_divide_are_replicated_and_listed(caplog):
  tree = {'a': {'up': {'kernel': jax.ShapeDtypeStruct((8, 9), jnp.float32)}},
          'odd': jax.ShapeDtypeStruct((8, 8), jnp.float32)}
  with caplog.at_level(logging.INFO):
    layouts = sharding.shardings(_mesh(fsdp=4, tensor=2), tree)
  assert layouts['a']['up']['kernel'].spec == P('fsdp', None)
  assert layouts['odd'].spec == P()
  assert 'a/up/kernel: axis 1 of [8, 9] is not a multiple of tensor=2' in (
      caplog.text)
  assert 'odd: no rule' in caplog.text


@pytest.mark.parametrize('name, shape, message', [
    ('a/up/kernel', (1024, 1025), 'axis 1 of .* multiple of tensor=2'),
    ('strange', (1024, 1025), 'no rule lays out the parameter strange'),
])
def test_large_leaves_never_fall_back(name, shape, message):
  axes = dict(data=1, fsdp=4, tensor=2, sequence=1)
  with pytest.raises(errors.UserError, match=message):
    sharding.spec(name, shape, axes)


def test_parameters_are_born_sharded_and_equal_on_every_mesh():
  def init(key):
    return {'up': {'kernel': jax.random.normal(key, (3, 16, 32))}}
  born = [sharding.init_sharded(mesh, init, jax.random.key(0))['up']['kernel']
          for mesh in (_mesh(data=8), _mesh(fsdp=8), _mesh(fsdp=4, tensor=2))]
  assert [x.addressable_shards[0].data.shape for x in born] == [
      (3, 16, 32), (3, 2, 32), (3, 4, 16)]
  for x in born[1:]:
    np.testing.assert_array_equal(x, born[0])


def test_batches_lie_over_rows():
  batch = {'s': {'tokens': np.arange(32).reshape(16, 2)}}
  x = sharding.shard_batch(_mesh(data=2, fsdp=4), batch)['s']['tokens']
  np.testing.assert_array_equal(x, batch['s']['tokens'])
  assert x.addressable_shards[0].data.shape == (2, 2)


def test_rows_that_do_not_divide_are_a_user_error():
  batch = {'captions': {'tokens': np.zeros((12, 2))}}
  with pytest.raises(errors.UserError) as caught:
    sharding.shard_batch(_mesh(data=2, fsdp=4), batch)
  for text in ("'captions' has 12 rows", '8 devices', 'such as 16'):
    assert text in str(caught.value)
  with pytest.raises(errors.UserError, match='multiple of 32'):
    sharding.check_rows(_mesh(data=8), batch, accumulate=4)
