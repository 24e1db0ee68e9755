import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgen.models import attention


def _qkv(B=2, T=7, S=7, N=6, K=2, H=4, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H))
  return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes)]


def _reference(q, k, v, seen, scale, bias):
  """Loops over heads and rows, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  B, T, N, _ = q.shape
  out = np.zeros(q.shape)
  group = N // k.shape[2]
  for b, n, t in np.ndindex(B, N, T):
    logits = k[b, :, n // group] @ q[b, t, n] * scale + bias[b, n, t]
    logits = np.where(seen[b, t], logits, -np.inf)
    weights = np.exp(logits - logits.max())
    out[b, t, n] = weights / weights.sum() @ v[b, :, n // group]
  return out


def _packed():
  """Two packed rows of seven slots, the second with padding."""
  segments = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 2, 0, 0]])
  seen = (segments[:, :, None] == segments[:, None, :]) & np.tri(7, dtype=bool)
  return attention.Mask(causal=True, segments_BT=jnp.asarray(segments)), seen


@pytest.mark.parametrize('backend', attention.BACKENDS)
def test_equals_a_loop_in_float64(backend):
  q, k, v = _qkv()
  mask, seen = _packed()
  bias = jax.random.normal(jax.random.key(1), (2, 6, 7, 7))
  with jax.default_matmul_precision('highest'):
    out = attention.attend(q, k, v, mask, scale=0.7, bias=bias,
                           backend=backend)
  expected = _reference(q, k, v, seen, 0.7, np.asarray(bias))
  np.testing.assert_allclose(out, expected, atol=1e-5)


def test_the_default_scale_is_that_of_a_head():
  q, k, v = _qkv()
  np.testing.assert_array_equal(
      attention.attend(q, k, v, attention.Mask()),
      attention.attend(q, k, v, attention.Mask(), scale=0.5))


def test_a_bias_of_the_mask_adds_to_that_of_the_layer():
  q, k, v = _qkv()
  one, two = jax.random.normal(jax.random.key(1), (2, 1, 1, 7, 7))
  np.testing.assert_allclose(
      attention.attend(q, k, v, attention.Mask(bias_BNTS=one), bias=two),
      attention.attend(q, k, v, attention.Mask(), bias=one + two), atol=1e-6)


MASKS = {
    'causal, packed': _packed()[0],
    'window': attention.Mask(window=3),
    'prefix': attention.Mask(
        causal=True, prefix_BT=jnp.arange(7)[None] < jnp.array([[3], [0]])),
    'images': attention.Mask(causal=True, image_index_BT=jnp.array(
        [[-1, 0, 0, -1, 1, 1, -1], [0, 0, 0, -1, -1, -1, -1]])),
    'valid': attention.Mask(
        valid_BS=jnp.arange(7)[None] < jnp.array([[7], [4]])),
    'decoding': attention.Mask(
        causal=True, query_positions_BT=jnp.array([[4], [2]])),
}


@pytest.mark.parametrize('name', MASKS)
def test_fast_backends_equal_the_plain_one(name):
  mask = MASKS[name]
  q, k, v = _qkv(T=1 if name == 'decoding' else 7)
  def loss(qkv, backend):
    out = attention.attend(*qkv, mask, backend=backend)
    return jnp.sum(jnp.sin(out * jnp.arange(4.0)[None, None, None])), out
  value = jax.grad(loss, has_aux=True)
  expected = value((q, k, v), 'plain')
  for backend in attention.BACKENDS:
    for got, want in zip(jax.tree.leaves(value((q, k, v), backend)),
                         jax.tree.leaves(expected)):
      np.testing.assert_allclose(got, want, atol=2e-6)


def test_rows_of_each_mask():
  def rows(T, S, **fields):
    seen = attention.Mask(**fields).materialise(T, S)
    return [''.join(str(int(x)) for x in row) for row in seen[0, 0]]
  vector = lambda *x: jnp.array([x])
  assert rows(4, 4, causal=True, segments_BT=vector(1, 1, 2, 2)) == [
      '1000', '1100', '0010', '0011']
  assert rows(4, 4, causal=True, prefix_BT=vector(1, 1, 0, 0) == 1) == [
      '1100', '1100', '1110', '1111']
  assert rows(4, 4, causal=True, image_index_BT=vector(-1, 0, 0, -1)) == [
      '1000', '1110', '1110', '1111']
  assert rows(4, 4, window=2) == ['1100', '1110', '0111', '0011']
  assert rows(4, 4, causal=True, window=2) == ['1000', '1100', '0110', '0011']
  assert rows(2, 3, valid_BS=vector(1, 0, 1) == 1) == ['101', '101']
  # Neither a prefix nor a picture reaches into another document.
  assert rows(4, 4, causal=True, segments_BT=vector(1, 1, 2, 2),
              prefix_BT=vector(0, 0, 1, 1) == 1) == [
                  '1000', '1100', '0011', '0011']
  assert rows(2, 4, causal=True, query_positions_BT=vector(2, 0)) == [
      '1110', '1000']
  assert rows(1, 3, causal=True, query_positions_BT=vector(5),
              key_positions_BS=vector(4, 5, 6)) == ['110']


@pytest.mark.parametrize('backend', attention.BACKENDS)
def test_a_query_that_sees_nothing_stays_finite(backend):
  q, k, v = _qkv()
  mask = attention.Mask(valid_BS=jnp.zeros((2, 7), bool))
  value, pull = jax.vjp(
      lambda q: attention.attend(q, k, v, mask, backend=backend), q)
  assert np.isfinite(value).all()
  assert np.isfinite(pull(value)[0]).all()


@pytest.mark.parametrize('backend', attention.BACKENDS)
def test_softmax_is_float32_in_bfloat16(backend):
  qkv = _qkv(dtype=jnp.bfloat16)
  function = lambda q, k, v: attention.attend(q, k, v, _packed()[0],
                                              backend=backend)
  jaxpr = jax.make_jaxpr(function)(*qkv)
  exponentials = [e.outvars[0].aval.dtype for e in _equations(jaxpr.jaxpr)
                  if e.primitive.name == 'exp']
  assert exponentials and set(exponentials) == {jnp.dtype('float32')}
  assert function(*qkv).dtype == jnp.bfloat16


def _equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'jaxpr')):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from _equations(inner)


def test_rotary_turns_pairs_by_the_relative_distance():
  x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
  positions = jnp.array([[0, 3, 1000]])
  turned = attention.rotary(x, positions, 100.0)
  # As complex numbers, the halves being real and imaginary parts.
  angles = np.asarray(positions)[0, :, None] * 100.0 ** (-np.arange(4) / 4)
  z = np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])
  z = z * np.exp(1j * angles)[None, :, None]
  np.testing.assert_allclose(
      turned, np.concatenate([z.real, z.imag], -1), atol=1e-4)
  shifted = attention.rotary(x, positions + 17, 100.0)
  dots = lambda y: jnp.einsum('BTNH,BSNH->BNTS', y, y)
  np.testing.assert_allclose(dots(turned), dots(shifted), atol=1e-3)


@pytest.mark.parametrize('rope', attention.ROTARY)
def test_a_part_of_a_head_turns_as_a_smaller_head(rope):
  x = jax.random.normal(jax.random.key(0), (2, 3, 2, 12))
  positions = jax.random.uniform(
      jax.random.key(1), (2, 3, 2) if rope == 'grid' else (2, 3)) * 9
  part = attention.turn(x, positions, 100.0, rope, 8)
  np.testing.assert_array_equal(
      part[..., :8], attention.ROTARY[rope](x[..., :8], positions, 100.0))
  np.testing.assert_array_equal(part[..., 8:], x[..., 8:])
  np.testing.assert_array_equal(
      attention.turn(x, positions, 100.0, rope, 12),
      attention.ROTARY[rope](x, positions, 100.0))


def test_errors_name_what_is_wrong():
  q, k, v = _qkv()
  with pytest.raises(ValueError, match="'flash'; allowed: plain, xla"):
    attention.attend(q, k, v, attention.Mask(), backend='flash')
  with pytest.raises(ValueError, match='6 query heads cannot share 4'):
    attention.attend(q, *_qkv(K=4)[1:], attention.Mask())
  with pytest.raises(ValueError, match='segments_BT .* 7 queries and 9 keys'):
    attention.attend(q, *_qkv(S=9)[1:], _packed()[0])
