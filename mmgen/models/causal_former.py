"""Causal former: learned queries read a picture and follow one another.

A fixed number of embeddings for a picture of any size, in an order: query j
reads the whole picture and the queries before it, so that a decoder can be
asked for the next one (Emu, arXiv 2307.05222, section 2.1, released code; its
blocks are those of T5's decoder, arXiv 1910.10683, section 2.1).

  keys = norm(table)
  x = queries
  each block: x += attention(norm(x)), causal, with biases by distance
              x += attention(norm(x), keys)
              x += mlp(norm(x))
  result = out(norm(x))

Attention is not scaled; one table of biases serves all blocks.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmgen.data import layout
from mmgen.models import attention
from mmgen.models import patch_embedding
from mmgen.models import transformer


@dataclasses.dataclass(frozen=True)
class CausalFormerConfig:
  """A causal former; the defaults are Emu's.

  Attributes:
    width: width D of the results.
    queries: results Q of a picture.
    layers, heads, head_dim, hidden: of its blocks.
    inner_width: their width.
    buckets: learned biases by distance, one each up to half of them, then on a
      logarithmic scale.
    max_distance: from which on the last one serves.
    norm_eps: of all norms.
    border: as in `connector.ConnectorConfig`.
    remat: recompute each block in the backward pass.
    unroll: no loop over blocks in the program.
    dtype: compute dtype.
  """
  width: int
  queries: int = 32
  layers: int = 12
  inner_width: int = 768
  heads: int = 12
  head_dim: int = 64
  hidden: int = 3072
  buckets: int = 32
  max_distance: int = 128
  norm_eps: float = dataclasses.field(
      default=1e-6, metadata=dict(above=0, below=1))
  border: bool = False
  remat: bool = False
  unroll: bool = False
  dtype: str = 'float32'
  name: str = 'causal_former'

  # A result belongs to no entry of the table.
  by_entry = False

  def __post_init__(self):
    if not 2 <= self.buckets < 2 * self.max_distance:
      raise ValueError(
          f'model.connector.buckets is {self.buckets}; allowed: from 2 to less '
          f'than twice model.connector.max_distance, {2 * self.max_distance}.'
      )

  @property
  def block(self):
    """Sizes of a block."""
    return transformer.StackConfig(
        layers=self.layers, width=self.inner_width, heads=self.heads,
        head_dim=self.head_dim, hidden=self.hidden, norm='rms',
        norm_eps=self.norm_eps, mlp='relu', init='fan_in', dtype=self.dtype)

  def image_layout(self, vision_layout):
    """A line of queries, whatever the picture."""
    return layout.ImageLayout(1, self.queries, border=self.border,
                              bos=vision_layout.bos, whole=True)


class Attention(nn.Module):
  """Attention without a scale, of queries to themselves or to other keys."""
  config: transformer.StackConfig

  @nn.compact
  def __call__(self, x_BTD, keys_BSD, mask):
    c = self.config
    std = transformer.INITS[c.init](c)
    project = lambda name, x, std: attention.heads(nn.Dense(
        c.heads * c.H, use_bias=False, dtype=c.dtype, name=name,
        kernel_init=nn.initializers.normal(std))(x), c.H)
    # The small queries make up for the scale that is missing.
    mixed_BTNH = attention.attend(
        project('query', x_BTD, std['attention'] * c.H ** -0.5),
        project('key', keys_BSD, std['attention']),
        project('value', keys_BSD, std['attention']), mask, scale=1.0)
    return nn.Dense(
        c.width, use_bias=False, dtype=c.dtype, name='out',
        kernel_init=nn.initializers.normal(std['attention_out']))(
            mixed_BTNH.reshape(*x_BTD.shape[:2], -1))


class Block(nn.Module):
  """See the head of the file."""
  config: transformer.StackConfig

  @nn.compact
  def __call__(self, x_BTD, keys_BSD, mask):
    c = self.config
    norm = lambda name: transformer.RMSNorm(c.norm_eps, c.dtype, name=name)
    normed_BTD = norm('attention_norm')(x_BTD)
    x_BTD += Attention(c, name='attention')(normed_BTD, normed_BTD, mask)
    x_BTD += Attention(c, name='cross_attention')(
        norm('cross_attention_norm')(x_BTD), keys_BSD, attention.Mask())
    return x_BTD + transformer.Mlp(c, name='mlp')(norm('mlp_norm')(x_BTD))


class CausalFormer(nn.Module):
  """Tables of any length to tables of Q; leaves of 'blocks' are [L, ...]."""
  config: CausalFormerConfig

  @nn.compact
  def __call__(self, table_BIPD):
    """Reads each picture.

    Returns:
      (table_BIQD, out), of images [B * I] in `out`: 'keys', the norm of the
      table, and 'blocks' [L, B * I, Q, inner_width], what each block gives.
    """
    c = self.config
    block = c.block
    keys_BPD = transformer.LayerNorm(c.norm_eps, c.dtype, name='norm')(
        table_BIPD.reshape(-1, *table_BIPD.shape[2:]))
    queries_QD = self.param(
        'queries', nn.initializers.normal(0.02), (c.queries, c.inner_width))
    x_BQD = jnp.broadcast_to(queries_QD.astype(c.dtype)[None],
                             (len(keys_BPD), c.queries, c.inner_width))
    bias_KN = self.param(
        'relative_bias', nn.initializers.normal(c.inner_width ** -0.5),
        (c.buckets, c.heads))
    bias_QQN = bias_KN[buckets(c.queries, c.buckets, c.max_distance)]
    mask = attention.Mask(causal=True,
                          bias_BNTS=bias_QQN.transpose(2, 0, 1)[None])
    blocks = self.param('blocks', _init_blocks, block, keys_BPD.shape[-1])

    def run(x_BQD, params):
      x_BQD = Block(block, parent=None).apply(
          {'params': params}, x_BQD, keys_BPD, mask)
      return x_BQD, x_BQD
    if c.remat:
      run = jax.checkpoint(run, prevent_cse=c.unroll)
    x_BQD, blocks_LBQD = jax.lax.scan(run, x_BQD, blocks, unroll=c.unroll)
    x_BQD = transformer.RMSNorm(c.norm_eps, c.dtype, name='final_norm')(x_BQD)
    table = nn.Dense(
        c.width, dtype=c.dtype, kernel_init=patch_embedding.torch_kernel,
        bias_init=patch_embedding.torch_bias(c.inner_width), name='out')(x_BQD)
    return (table.reshape(*table_BIPD.shape[:2], *table.shape[1:]),
            {'keys': keys_BPD, 'blocks': blocks_LBQD})


def _init_blocks(rng, config, key_width):
  """Independent initial parameters for each block, stacked."""
  x = jnp.zeros((1, 1, config.width), config.dtype)
  keys = jnp.zeros((1, 1, key_width), config.dtype)
  init = lambda key: Block(config, parent=None).init(
      key, x, keys, attention.Mask())['params']
  return jax.vmap(init)(jax.random.split(rng, config.layers))


def buckets(length, count, max_distance):
  """The bias by distance: which of `count` serves query t and key s.

  Args:
    length: T, of queries and of keys.
    count: of biases.
    max_distance: from which on the last one serves.

  Returns:
    int32 [T, T]; 0 where the key is later than the query.
  """
  distance = np.maximum(np.arange(length)[:, None] - np.arange(length), 0)
  exact = count // 2
  share = (np.log(np.maximum(distance, exact) / exact)
           / np.log(max_distance / exact))
  far = exact + (share * (count - exact)).astype(np.int32)
  return np.where(distance < exact, distance,
                  np.minimum(far, count - 1)).astype(np.int32)


def flops(config, inputs, entries):
  """Forward FLOPs of one picture; 2 for each multiply-add.

  Args:
    config: a `CausalFormerConfig`.
    inputs: width of the table.
    entries: its length P.
  """
  c = config
  Q, inner = c.queries, c.heads * c.head_dim
  own = Q * inner * (4 * c.inner_width + 2 * Q)
  cross = 2 * inner * (Q * c.inner_width + entries * inputs + Q * entries)
  mlp = 2 * Q * c.inner_width * c.hidden
  return 2 * (c.layers * (own + cross + mlp) + Q * c.inner_width * c.width)
