import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

from mmgen import partition
from mmgen.models import attention
from mmgen.models import transformer

AXES = ('data', 'fsdp', 'tensor', 'sequence')


def _mesh(*shape, axes=AXES):
  return jax.set_mesh(jax.make_mesh(
      shape, axes, axis_types=(AxisType.Auto,) * len(axes)))


def test_without_a_mesh_nothing_happens():
  x = jnp.ones((4, 2))
  assert partition.constrain(x, 'no', 'such', 'names') is x


def _ways(x, *names):
  """In how many parts each axis is cut."""
  y = jax.jit(lambda x: partition.constrain(x, *names))(x)
  return tuple(whole // part for whole, part in zip(
      y.shape, y.sharding.shard_shape(y.shape)))


def test_axes_are_laid_out_by_the_rules():
  x = jnp.ones((4, 6, 8))
  with _mesh(1, 2, 2, 2):
    assert _ways(x, 'batch', 'length', 'width') == (2, 2, 1)
    assert _ways(x, 'batch', None, 'hidden') == (2, 1, 2)
  with _mesh(2, 2, 2, 1):
    assert _ways(x, 'batch', 'length', 'heads') == (4, 1, 2)


def test_an_axis_that_does_not_divide_is_left_alone():
  with _mesh(1, 1, 8, 1):
    assert _ways(jnp.ones((2, 8)), 'heads', 'hidden')[1] == 8


def test_errors():
  x = jnp.ones((4, 2))
  with _mesh(8, 1, 1, 1):
    with pytest.raises(ValueError, match="no rule for the logical axis 'bath'"):
      partition.constrain(x, 'bath', 'width')
    with pytest.raises(ValueError, match='1 names .* shape .4, 2.'):
      partition.constrain(x, 'batch')
  with _mesh(8, axes=('data',)):
    with pytest.raises(ValueError, match=r"'batch' is laid over \['fsdp'\]"):
      partition.constrain(x, 'batch', 'width')


def test_a_stack_is_the_same_on_a_mesh():
  config = transformer.StackConfig(
      layers=2, width=16, heads=4, kv_heads=2, hidden=24, rope_theta=100.0)
  x = jax.random.normal(jax.random.key(0), (4, 6, 16))
  positions = jnp.broadcast_to(jnp.arange(6)[None], (4, 6))
  mask = attention.Mask(causal=True)
  stack = transformer.Stack(config)
  params = stack.init(jax.random.key(1), x, mask, positions)
  def loss(params):
    y, _ = stack.apply(params, x, mask, positions)
    return jnp.sum(y * jnp.sin(y))
  expected = jax.jit(jax.value_and_grad(loss))(params)
  with _mesh(1, 2, 2, 2):
    got = jax.jit(jax.value_and_grad(loss))(params)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
