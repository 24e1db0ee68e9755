"""Attention: one function, one mask, several backends.

Who sees whom is a `Mask`: a few vectors along the sequence rather than a
[T, S] matrix, so that a backend which works block by block never needs the
matrix. `Mask.materialise` turns it into the matrix; worked rows (1 = seen):

  causal, segments 1 1 2 2      causal, prefix 1 1 0 0     image_index - 0 0 -
      1 0 0 0                       1 1 0 0                    1 0 0 0
      1 1 0 0                       1 1 0 0                    1 1 1 0
      0 0 1 0                       1 1 1 0                    1 1 1 0
      0 0 1 1                       1 1 1 1                    1 1 1 1

Padding has segment 0 and sees only padding, so no row is ever empty and no
softmax divides by zero. A query whose keys are all hidden (possible only
through `valid_BS`) gets the mean of all values; nothing may read it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=['valid_BS', 'segments_BT', 'prefix_BT', 'image_index_BT',
                 'bias_BNTS', 'query_positions_BT', 'key_positions_BS'],
    meta_fields=['causal', 'window'])
@dataclasses.dataclass(frozen=True)
class Mask:
  """Who sees whom, as vectors.

  Attributes:
    valid_BS: bool, keys that may be seen at all.
    segments_BT: int, a query sees keys of its own segment only.
    causal: a query sees no key at a later row position.
    prefix_BT: bool, keys every query of the segment sees in spite of `causal`
      (prefix language model, PaliGemma, arXiv 2407.07726, section 3).
    image_index_BT: int, positions of the same picture (>= 0) see each other in
      spite of `causal`; -1 is text.
    window: a query sees only keys less than `window` positions away.
    bias_BNTS: additive logits, the same for every layer; any of B, N may be 1.
    query_positions_BT: row position of each query; default 0, 1, ... T-1.
    key_positions_BS: row position of each key; default 0, 1, ... S-1.
  """
  valid_BS: jax.Array | None = None
  segments_BT: jax.Array | None = None
  causal: bool = False
  prefix_BT: jax.Array | None = None
  image_index_BT: jax.Array | None = None
  window: int | None = None
  bias_BNTS: jax.Array | None = None
  query_positions_BT: jax.Array | None = None
  key_positions_BS: jax.Array | None = None

  def materialise(self, T, S):
    """Returns bool [B, 1, T, S] (B is 1 where no vector needs more)."""
    for name in ('segments_BT', 'prefix_BT', 'image_index_BT'):
      vector = getattr(self, name)
      if vector is not None and not T == S == vector.shape[1]:
        raise ValueError(
            f'Mask.{name} describes queries and keys at once: it has length '
            f'{vector.shape[1]}, but there are {T} queries and {S} keys; they '
            'must be equal.')
    query = _positions(self.query_positions_BT, T)[:, :, None]
    key = _positions(self.key_positions_BS, S)[:, None, :]
    seen = jnp.ones((1, T, S), bool)
    if self.causal:
      seen = key <= query
      if self.prefix_BT is not None:
        seen |= self.prefix_BT[:, None, :]
      if self.image_index_BT is not None:
        image = self.image_index_BT
        same = image[:, :, None] == image[:, None, :]
        seen |= same & (image >= 0)[:, :, None]
    if self.window is not None:
      seen &= jnp.abs(query - key) < self.window
    if self.segments_BT is not None:
      seen &= self.segments_BT[:, :, None] == self.segments_BT[:, None, :]
    if self.valid_BS is not None:
      seen &= self.valid_BS[:, None, :]
    return seen[:, None]


def _positions(positions, length):
  return jnp.arange(length)[None] if positions is None else positions


def heads(x_BTD, H):
  """[B, T, N * H] -> [B, T, N, H].

  Matrices to and from heads have both axes in one, [D, N * H]: with heads of 64
  as an axis of their own, a TPU would store them padded to 128.
  """
  return x_BTD.reshape(*x_BTD.shape[:2], -1, H)


def rotary(x_BTNH, positions_BT, theta):
  """Rotates pairs (i, i + H/2) by position * theta^(-2i/H), angles in fp32.

  Half-split pairing, as in the LLaMA checkpoints of Hugging Face; RoFormer
  (arXiv 2104.09864, equation 34) pairs neighbours, which is the same up to a
  permutation of the rows of the query and key kernels.
  """
  half = x_BTNH.shape[-1] // 2
  inverse = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = jnp.einsum('BT,H->BTH', positions_BT.astype(jnp.float32), inverse,
                      precision='highest')[:, :, None, :]
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate(
      _turn(first, second, angles), axis=-1).astype(x_BTNH.dtype)


def grid_rotary(x_BTNH, positions_BT2, theta):
  """Rotates neighbours (2i, 2i + 1): half of the pairs by row, half by column.

  Pair i of each half turns by position * theta^(-4i/H) (EVA-02, arXiv
  2303.11331, section 2.1, released code).

  Args:
    x_BTNH: queries or keys; H is a multiple of 4.
    positions_BT2: (row, column), any real numbers; B may be 1. (0, 0) leaves a
      token as it is, exactly.
    theta: base of the frequencies.
  """
  quarter = x_BTNH.shape[-1] // 4
  inverse = theta ** (-jnp.arange(quarter, dtype=jnp.float32) / quarter)
  angles = jnp.einsum('BTA,H->BTAH', positions_BT2.astype(jnp.float32), inverse,
                      precision='highest')
  angles = angles.reshape(*angles.shape[:2], 1, 2 * quarter)
  pairs = x_BTNH.astype(jnp.float32).reshape(*x_BTNH.shape[:-1], -1, 2)
  turned = jnp.stack(_turn(pairs[..., 0], pairs[..., 1], angles), axis=-1)
  return turned.reshape(x_BTNH.shape).astype(x_BTNH.dtype)


def turn(x_BTNH, positions, theta, rope, size):
  """Turns the first `size` channels of each head, and leaves the others.

  Args:
    x_BTNH: queries or keys.
    positions: as the rotary needs them.
    theta: base of the frequencies, which are those of a head of `size`.
    rope: a name in `ROTARY`.
    size: channels to turn, up to H (GPT-NeoX, arXiv 2204.06745, section 2.1).
  """
  if size == x_BTNH.shape[-1]:
    return ROTARY[rope](x_BTNH, positions, theta)
  turned = ROTARY[rope](x_BTNH[..., :size], positions, theta)
  return jnp.concatenate([turned, x_BTNH[..., size:]], axis=-1)


def _turn(first, second, angles):
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  return first * cos - second * sin, second * cos + first * sin


def attend(q_BTNH, k_BSKH, v_BSKH, mask, *, scale=None, bias=None,
           backend='plain'):
  """Softmax attention with grouped queries.

  Args:
    q_BTNH: queries; N is a multiple of K, query head n reads key head
      n // (N / K).
    k_BSKH: keys.
    v_BSKH: values.
    mask: a `Mask`.
    scale: factor on the logits; default 1/sqrt(H).
    bias: additive logits of this layer, broadcastable to [B, N, T, S]; added to
      those of the mask.
    backend: a name in `BACKENDS`.

  Returns:
    [B, T, N, H] in the dtype of the values. Logits and softmax are fp32.

  Raises:
    ValueError: unknown backend, or heads that cannot be grouped.
  """
  N, H = q_BTNH.shape[2:]
  K = k_BSKH.shape[2]
  if N % K:
    raise ValueError(f'attend: {N} query heads cannot share {K} key heads; '
                     'the first must be a multiple of the second.')
  if backend not in BACKENDS:
    raise ValueError(f'attend: unknown backend {backend!r}; '
                     f'allowed: {", ".join(BACKENDS)}.')
  if mask.bias_BNTS is not None:
    bias = mask.bias_BNTS if bias is None else mask.bias_BNTS + bias
  scale = H ** -0.5 if scale is None else scale
  return BACKENDS[backend](q_BTNH, k_BSKH, v_BSKH, mask, scale, bias)


def _plain(q_BTNH, k_BSKH, v_BSKH, mask, scale, bias):
  """The reference: materialises mask and logits."""
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  G = N // K
  logits = jnp.einsum(
      'BTKGH,BSKH->BKGTS', q_BTNH.reshape(B, T, K, G, H), k_BSKH,
      preferred_element_type=jnp.float32) * scale
  logits = logits.reshape(B, N, T, S)
  if bias is not None:
    logits += bias
  # The lowest finite number, not -inf: a row with nothing to see stays finite.
  logits = jnp.where(mask.materialise(T, S), logits,
                     jnp.finfo(logits.dtype).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(v_BSKH.dtype)
  out = jnp.einsum('BKGTS,BSKH->BTKGH', weights.reshape(B, K, G, T, S), v_BSKH)
  return out.reshape(B, T, N, H)


def _xla(q_BTNH, k_BSKH, v_BSKH, mask, scale, bias):
  """jax.nn's own attention, for compilers that recognise its pattern."""
  T, S = q_BTNH.shape[1], k_BSKH.shape[1]
  return jax.nn.dot_product_attention(
      q_BTNH, k_BSKH, v_BSKH, bias=bias, mask=mask.materialise(T, S),
      scale=scale, implementation='xla')


BACKENDS = {'plain': _plain, 'xla': _xla}
ROTARY = {'line': rotary, 'grid': grid_rotary}
