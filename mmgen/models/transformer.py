"""Norms, MLPs, the block, and the stack of blocks.

Parameters of a stack live in one tree whose leaves carry the layer axis first,
[L, ...], whether the stack is scanned (compiles in time independent of depth)
or unrolled (faster steps on CPU): `unroll` is an option, never another tree.
The stack is cut into segments at the requested taps; each segment is one scan.
"""

import dataclasses
import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmgen import partition
from mmgen.models import attention
from mmgen.models import lora
from mmgen.models import modality


@dataclasses.dataclass(frozen=True)
class StackConfig:
  """A stack of equal blocks.

  Attributes:
    layers, width, heads: depth, model width D, query heads N.
    hidden: width F inside the MLP.
    kv_heads: key-value heads K (default: N); heads must be a multiple.
    head_dim: H (default: D / N).
    norm, norm_eps: 'rms' or 'layer'.
    mlp: 'swiglu' (three matrices), or an activation between two matrices:
      'gelu' (exact), 'gelu_tanh', 'quick_gelu', 'relu', 'relu2'.
    placement: of a block's norms: 'pre', x += f(norm(x)), or 'post',
      x += norm(f(x)) (Swin v2, arXiv 2111.09883, section 3.2).
    qkv_bias: True, False, or 'qv': of query and value alone, as a bias of all
      keys changes no softmax (BEiT, arXiv 2106.08254, released code).
    out_bias, mlp_bias: biases of the other projections.
    inner_attention_norm, inner_mlp_norm: one more norm before the last matrix
      of the attention, of the MLP (sub-LN; Magneto, arXiv 2210.06423).
    query_key_norm: norms over the channels of a head, one of all queries, one
      of all keys, before positions turn them (arXiv 2302.05442, section 2).
    layer_scale: initial factor of each branch, by channel; None for none
      (CaiT, arXiv 2103.17239).
    drop_path: share of the examples in which training leaves out a branch of
      the last block; falls evenly to 0 at the first; see `draw_branches`
      (stochastic depth, arXiv 1603.09382).
    rope: a name in `attention.ROTARY`: how positions turn queries and keys.
    rope_theta: base of rotary positions; None for none.
    rope_share: of the channels of a head, part that turns: the first ones.
    final_norm: a norm after the last block.
    modality_weights: parts of a block, names in `modality.PARTS`, that have a
      second set of weights, for the slots of pictures; its leaves are below
      'visual' and start as copies of the first.
    init: a name in `INITS`.
    remat: recompute each block in the backward pass.
    unroll: a Python loop over layers in place of a scan.
    backend: attention backend, a name in `attention.BACKENDS`.
    dtype: compute dtype; parameters are float32 always.
  """
  layers: int
  width: int
  heads: int
  hidden: int
  kv_heads: int | None = None
  head_dim: int | None = None
  norm: str = 'rms'
  norm_eps: float = 1e-5
  mlp: str = 'swiglu'
  placement: str = 'pre'
  qkv_bias: bool | str = False
  out_bias: bool = False
  mlp_bias: bool = False
  inner_attention_norm: bool = False
  inner_mlp_norm: bool = False
  query_key_norm: bool = False
  layer_scale: float | None = None
  drop_path: float = 0.0
  rope: str = 'line'
  rope_theta: float | None = None
  rope_share: float = 1.0
  final_norm: bool = True
  modality_weights: tuple[str, ...] = ()
  init: str = 'llama'
  remat: bool = False
  unroll: bool = False
  backend: str = 'plain'
  dtype: str = 'float32'

  def __post_init__(self):
    for field, table in (('norm', NORMS), ('mlp', ('swiglu', *ACTIVATIONS)),
                         ('placement', ('pre', 'post')),
                         ('qkv_bias', (True, False, 'qv')),
                         ('rope', attention.ROTARY), ('init', INITS),
                         ('backend', attention.BACKENDS)):
      if getattr(self, field) not in table:
        raise ValueError(f'{field}: {getattr(self, field)!r}; '
                         f'allowed: {", ".join(map(str, table))}.')
    unknown = set(self.modality_weights) - set(modality.PARTS)
    if unknown:
      raise ValueError(f'modality_weights: {sorted(unknown)}; allowed: '
                       f'{", ".join(modality.PARTS)}.')
    if self.modality_weights and (
        self.inner_mlp_norm or self.qkv_bias == 'qv'):
      raise ValueError('modality_weights: not with inner_mlp_norm or with '
                       "qkv_bias 'qv'.")
    if self.head_dim is None and self.width % self.heads:
      raise ValueError(f'heads: {self.heads} does not divide width '
                       f'{self.width}; choose a divisor or give head_dim.')
    if self.heads % self.K:
      raise ValueError(f'kv_heads: {self.K}; allowed: divisors of heads, '
                       f'{self.heads}.')
    if not 0 <= self.drop_path < 1:
      raise ValueError(f'drop_path: {self.drop_path}; allowed: from 0 (keep '
                       'all) to below 1.')
    # A pair turns at once; on a grid, one for each of two axes.
    pairs = {'line': 2, 'grid': 4}[self.rope]
    if self.rope_theta is not None and (
        self.rope_size % pairs or not 0 < self.rope_size <= self.H):
      raise ValueError(
          f'head_dim: {self.H} with rope_share {self.rope_share} turns '
          f'{self.rope_size} channels; allowed with rope {self.rope!r}: '
          f'multiples of {pairs}, up to head_dim.')

  @property
  def K(self):
    return self.heads if self.kv_heads is None else self.kv_heads

  @property
  def H(self):
    return self.head_dim or self.width // self.heads

  @property
  def rope_size(self):
    return int(self.H * self.rope_share)


class RMSNorm(nn.Module):
  """x / rms(x) in fp32, cast back, then times the scale (LLaMA's order)."""
  epsilon: float
  dtype: str

  @nn.compact
  def __call__(self, x, pair=None):
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    x = x.astype(jnp.float32)
    x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
    scale = _spread(scale.astype(self.dtype), x, 'scale', pair)
    return x.astype(self.dtype) * scale


class LayerNorm(nn.Module):
  """LayerNorm in fp32 with scale and bias."""
  epsilon: float
  dtype: str

  @nn.compact
  def __call__(self, x, pair=None):
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
    x = x.astype(jnp.float32)
    x -= jnp.mean(x, axis=-1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
    x = x * _spread(scale, x, 'scale', pair) + _spread(bias, x, 'bias', pair)
    return x.astype(self.dtype)


def _spread(vector, x, name=None, pair=None):
  """Lets a vector broadcast along the last axis of `x`, explicitly.

  Args:
    vector: of the last axis.
    x: [B, T, ...] or, without a pair, of any axes.
    name: of the vector in the pair's parameters.
    pair: (a norm's second parameters, routes of `modality.route`): each slot
      has the vector of its modality.
  """
  if pair is None:
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))
  second, routes = pair
  return modality.choose(vector, second[name].astype(vector.dtype),
                         routes['visual'])


def quick_gelu(x):
  """CLIP's x * sigmoid(1.702 x)."""
  return x * jax.nn.sigmoid(1.702 * x)


def relu2(x):
  """Squared ReLU (Primer, arXiv 2109.08668)."""
  return jnp.square(jax.nn.relu(x))


def _llama_init(config):
  """Every matrix at 0.02, as LLaMA's released code initialises."""
  del config
  return dict(attention=0.02, attention_out=0.02, mlp=0.02, mlp_out=0.02)


def _clip_init(config):
  """By width, outputs also by depth (CLIP, arXiv 2103.00020, released code)."""
  attention_std = config.width ** -0.5
  out_std = attention_std * (2 * config.layers) ** -0.5
  return dict(attention=attention_std, attention_out=out_std,
              mlp=(2 * config.width) ** -0.5, mlp_out=out_std)


def _fan_in_init(config):
  """1 / sqrt(inputs) of every matrix (T5, arXiv 1910.10683, released code)."""
  return dict(attention=config.width ** -0.5,
              attention_out=(config.heads * config.H) ** -0.5,
              mlp=config.width ** -0.5, mlp_out=config.hidden ** -0.5)


def _dispatch(module, pair, names, function, x_BT):
  """`modality.apply` with maps of a module and those of a second set."""
  second, routes = pair
  both = jax.tree.map(
      lambda leaf: leaf.astype(module.config.dtype),
      [{name: tree[name] for name in names}
       for tree in (module.variables['params'], second)])
  return modality.apply(function, x_BT, *both, routes)


class SelfAttention(nn.Module):
  """Grouped-query self-attention, with rotary positions where configured."""
  config: StackConfig

  @nn.compact
  def __call__(self, x_BTD, mask, positions_BT, cache, adapters=None,
               pair=None):
    c = self.config
    std = INITS[c.init](c)
    project = functools.partial(
        nn.Dense, dtype=c.dtype, use_bias=bool(c.qkv_bias),
        kernel_init=nn.initializers.normal(std['attention']))
    if pair is None:
      q = project(c.heads * c.H, name='query')(x_BTD)
      k = project(c.K * c.H, use_bias=c.qkv_bias is True, name='key')(x_BTD)
      v = project(c.K * c.H, name='value')(x_BTD)
      q, k, v = (lora.add(y, x_BTD, adapters, f'attention/{name}')
                 for y, name in ((q, 'query'), (k, 'key'), (v, 'value')))
    else:
      names = 'query', 'key', 'value'
      q, k, v = _dispatch(self, pair, names, lambda linear, x: tuple(
          linear(name, x) for name in names), x_BTD)
    q, k, v = (attention.heads(y, c.H) for y in (q, k, v))
    if c.query_key_norm:
      norm = functools.partial(NORMS[c.norm], c.norm_eps, c.dtype)
      q, k = norm(name='query_norm')(q), norm(name='key_norm')(k)
    if c.rope_theta is not None:
      q, k = (attention.turn(x, positions_BT, c.rope_theta, c.rope, c.rope_size)
              for x in (q, k))
    q = partition.constrain(q, 'batch', 'length', 'heads', 'head_dim')
    if cache is not None:
      rows = jnp.arange(x_BTD.shape[0])[:, None]
      slots = mask.query_positions_BT
      k = cache['key'].at[rows, slots].set(k.astype(cache['key'].dtype))
      v = cache['value'].at[rows, slots].set(v.astype(cache['value'].dtype))
      cache = {'key': k, 'value': v}
    out = attention.attend(q, k, v, mask, backend=c.backend)
    out = out.reshape(*out.shape[:2], -1)
    if c.inner_attention_norm:
      out = NORMS[c.norm](c.norm_eps, c.dtype, name='norm')(out)
    if pair is not None:
      return _dispatch(self, pair, ('out',), lambda linear, x: linear(
          'out', x), out), cache
    change = nn.Dense(
        c.width, dtype=c.dtype, use_bias=c.out_bias,
        kernel_init=nn.initializers.normal(std['attention_out']),
        name='out')(out)
    return lora.add(change, out, adapters, 'attention/out'), cache


class Mlp(nn.Module):
  """SwiGLU, down(silu(gate) * up), or down(activation(up))."""
  config: StackConfig

  @nn.compact
  def __call__(self, x_BTD, adapters=None, pair=None):
    c = self.config
    std = INITS[c.init](c)

    def compute(linear, x):
      up = linear('up', x)
      if c.mlp == 'swiglu':
        h = jax.nn.silu(linear('gate', x)) * up
      else:
        h = ACTIVATIONS[c.mlp](up)
      if pair is None:
        h = partition.constrain(h, 'batch', 'length', 'hidden')
      if c.inner_mlp_norm:
        h = NORMS[c.norm](c.norm_eps, c.dtype, name='norm')(h)
      return linear('down', h)

    def linear(name, x):
      width, scale = ((c.width, std['mlp_out']) if name == 'down'
                      else (c.hidden, std['mlp']))
      y = nn.Dense(width, dtype=c.dtype, use_bias=c.mlp_bias,
                   kernel_init=nn.initializers.normal(scale), name=name)(x)
      return lora.add(y, x, adapters, f'mlp/{name}')

    if pair is None:
      return compute(linear, x_BTD)
    names = ('up', 'down', *('gate',) * (c.mlp == 'swiglu'))
    return _dispatch(self, pair, names, compute, x_BTD)


class Block(nn.Module):
  """x += attention(x); x += mlp(x), with norms where they are placed."""
  config: StackConfig

  @nn.compact
  def __call__(self, x_BTD, mask, positions_BT, cache, adapters=None,
               factors_B2=None, routes=None):
    c = self.config
    # Without slots of pictures the first set serves all.
    second = self.get_variable('params', 'visual') if routes else {}
    pair = lambda name: (second[name], routes) if name in second else None
    norm = lambda name, x: NORMS[c.norm](
        c.norm_eps, c.dtype, name=f'{name}_norm')(x, pair(f'{name}_norm'))
    before = lambda name, x: norm(name, x) if c.placement == 'pre' else x
    def after(name, change):
      if c.placement == 'post':
        change = norm(name, change)
      if c.layer_scale is not None:
        init = nn.initializers.constant(c.layer_scale)
        scale = self.param(f'{name}_scale', init, (c.width,))
        change *= _spread(scale.astype(c.dtype), change)
      if factors_B2 is not None:
        branch = ('attention', 'mlp').index(name)
        change *= factors_B2[:, branch, None, None].astype(c.dtype)
      return change
    change, cache = SelfAttention(c, name='attention')(
        before('attention', x_BTD), mask, positions_BT, cache, adapters,
        pair('attention'))
    x_BTD = x_BTD + after('attention', change)
    change = Mlp(c, name='mlp')(before('mlp', x_BTD), adapters, pair('mlp'))
    x_BTD = x_BTD + after('mlp', change)
    return partition.constrain(x_BTD, 'batch', 'length', 'width'), cache


class Stack(nn.Module):
  """A stack of blocks; parameters {'blocks': leaves [L, ...], 'final_norm'}."""
  config: StackConfig

  @nn.compact
  def __call__(self, x_BTD, mask, positions_BT=None, cache=None, taps=(),
               adapters=None, factors_BL2=None, visual_BT=None, stop=None):
    """Runs all blocks, then the final norm.

    Args:
      x_BTD: input embeddings.
      mask: `attention.Mask`; with a cache, its `query_positions_BT` are also
        the cache slots that this call writes.
      positions_BT: rotary positions, [B, T] or, for the rotary 'grid',
        [B, T, 2]; required exactly if `rope_theta` is set.
      cache: from `init_cache`, or from the `out` of an earlier call.
      taps: layers whose output is asked for: 0 is the input, 1 the output of
        the first block, ... (before the final norm).
      adapters: `lora.Adapters` of all layers, if the blocks have any; not
        beside `modality_weights`.
      factors_BL2: by which both branches of each block are multiplied, from
        `draw_branches` in training; None for 1.
      visual_BT: bool, slots of pictures; None for none. Read only if the
        config has `modality_weights`.
      stop: blocks to run, from the first; default all. Not beside a cache.

    Returns:
      ([B, T, D], out) with out['taps'] = {tap: [B, T, D]}, out['cache'] if a
      cache was given.
    """
    c = self.config
    if (positions_BT is None) != (c.rope_theta is None):
      found = 'missing' if positions_BT is None else 'given'
      raise ValueError('Stack: positions_BT must be given exactly if '
                       f'rope_theta is set: it is {c.rope_theta}, positions '
                       f'are {found}.')
    if cache is not None and mask.query_positions_BT is None:
      raise ValueError('Stack: with a cache, Mask.query_positions_BT must say '
                       'which slots are written; it is missing.')
    last = c.layers if stop is None else stop
    if not all(0 <= tap <= last for tap in taps):
      raise ValueError(f'Stack: taps {taps}; allowed: 0 to {last}.')

    # What differs from layer to layer, along the first axis of every leaf.
    blocks = (self.param('blocks', _init_blocks, c), adapters,
              None if factors_BL2 is None else factors_BL2.swapaxes(0, 1))
    if last < c.layers:
      blocks = jax.tree.map(lambda leaf: leaf[:last], blocks)
    routes = (modality.route(visual_BT)
              if c.modality_weights and visual_BT is not None else None)
    x_BTD = x_BTD.astype(c.dtype)
    tapped = {0: x_BTD} if 0 in taps else {}
    run = _run_unrolled if c.unroll else _run_scanned
    x_BTD, written, found = run(c, blocks, x_BTD, mask, positions_BT, cache,
                                routes, sorted({*taps} - {0}))
    if c.final_norm:
      x_BTD = NORMS[c.norm](c.norm_eps, c.dtype, name='final_norm')(x_BTD)
    out = {'taps': tapped | found}
    if cache is not None:
      out['cache'] = written
    return x_BTD, out


def draw_branches(config, keys_B):
  """Draws which branches training leaves out of each example.

  What is kept is divided by the share that is kept, as in the references; a
  branch of the first block is never left out.

  Args:
    config: a `StackConfig`.
    keys_B: a random key for each example.

  Returns:
    float32 [B, L, 2], of attention and MLP, for `Stack`.
  """
  share = 1 - np.linspace(0, config.drop_path, config.layers)
  kept_1L1 = jnp.asarray(share, jnp.float32)[None, :, None]
  draws_BL2 = jax.vmap(
      lambda key: jax.random.uniform(key, (config.layers, 2)))(keys_B)
  return jnp.where(draws_BL2 < kept_1L1, 1 / kept_1L1, 0)


def init_cache(config, batch, length, dtype):
  """Empty key-value cache of `length` slots for each of `batch` rows.

  Returns:
    Unrolled: a tuple with {'key', 'value'}: [B, S, K, H] for each layer, which
    XLA updates in place. Scanned: one such dict of [L, B, S, K, H].
  """
  shape = (batch, length, config.K, config.H)
  if config.unroll:
    return tuple({name: jnp.zeros(shape, dtype) for name in ('key', 'value')}
                 for _ in range(config.layers))
  return {name: jnp.zeros((config.layers, *shape), dtype)
          for name in ('key', 'value')}


def block_flops(config, keys):
  """Forward FLOPs of one token in one block; 2 for each multiply-add.

  Args:
    config: a `StackConfig`.
    keys: keys that the token's attention reads, on average.
  """
  c = config
  projections = c.width * c.H * (2 * c.heads + 2 * c.K)
  mixing = 2 * keys * c.heads * c.H
  mlp = (3 if c.mlp == 'swiglu' else 2) * c.width * c.hidden
  return 2 * (projections + mixing + mlp)


def _init_blocks(rng, config):
  """Independent initial parameters for each layer, stacked."""
  x = jnp.zeros((1, 1, config.width), config.dtype)
  positions = jnp.zeros((1, 1, 2) if config.rope == 'grid' else (1, 1))
  def init(key):
    return Block(config, parent=None).init(
        key, x, attention.Mask(), positions, None)['params']
  blocks = jax.vmap(init)(jax.random.split(rng, config.layers))
  if config.init == 'eva':
    # Outputs of block i = 1, 2, ... over sqrt(2 i) (BEiT's and EVA's code).
    root_L = jnp.sqrt(2 * jnp.arange(1.0, config.layers + 1))
    for part in (blocks['attention']['out'], blocks['mlp']['down']):
      part['kernel'] /= root_L[:, None, None]
  if config.modality_weights:
    blocks['visual'] = modality.copied(blocks, config.modality_weights)
  return blocks


def _block_function(config):
  def apply(block, x_BTD, mask, positions_BT, cache, routes):
    params, adapters, factors_B2 = block
    return Block(config, parent=None).apply(
        {'params': params}, x_BTD, mask, positions_BT, cache, adapters,
        factors_B2, routes)
  if config.remat:
    # Inside a scan XLA cannot merge the two passes, so it need not be fenced.
    apply = jax.checkpoint(apply, prevent_cse=config.unroll)
  return apply


def _run_unrolled(config, blocks, x_BTD, mask, positions_BT, caches, routes,
                  taps):
  apply = _block_function(config)
  written, tapped = [], {}
  for layer in range(len(jax.tree.leaves(blocks)[0])):
    block = jax.tree.map(operator.itemgetter(layer), blocks)
    x_BTD, cache = apply(block, x_BTD, mask, positions_BT,
                         caches[layer] if caches else None, routes)
    written.append(cache)
    if layer + 1 in taps:
      tapped[layer + 1] = x_BTD
  return x_BTD, tuple(written), tapped


def _run_scanned(config, blocks, x_BTD, mask, positions_BT, cache, routes,
                 taps):
  """One scan: cache and taps travel in the carry, updated in place.

  A scan from tap to tap would be compiled as often as there are taps, and
  would copy the parameters of each (EVE-7B has nine).
  """
  apply = _block_function(config)
  layers = len(jax.tree.leaves(blocks)[0])
  # Where each layer's output goes: what nobody asked for, behind the taps.
  slots = [taps.index(layer) if layer in taps else len(taps)
           for layer in range(1, layers + 1)]
  kept = jnp.zeros((len(taps) + 1, *x_BTD.shape), x_BTD.dtype) if taps else None

  def body(carry, scanned):
    x_BTD, stacked, kept = carry
    block, layer, slot = scanned
    cache = jax.tree.map(lambda leaf: leaf[layer], stacked)
    x_BTD, cache = apply(block, x_BTD, mask, positions_BT, cache, routes)
    stacked = jax.tree.map(
        lambda leaf, new: leaf.at[layer].set(new), stacked, cache)
    if taps:
      kept = jax.lax.dynamic_update_index_in_dim(kept, x_BTD, slot, 0)
      kept = partition.constrain(kept, None, 'batch', 'length', 'width')
    return (x_BTD, stacked, kept), None

  (x_BTD, cache, kept), _ = jax.lax.scan(
      body, (x_BTD, cache, kept),
      (blocks, jnp.arange(layers), jnp.array(slots, jnp.int32)))
  return x_BTD, cache, {tap: kept[i] for i, tap in enumerate(taps)}


NORMS = {'rms': RMSNorm, 'layer': LayerNorm}
ACTIVATIONS = {
    'gelu': functools.partial(jax.nn.gelu, approximate=False),
    'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
    'quick_gelu': quick_gelu,
    'relu': jax.nn.relu,
    'relu2': relu2,
}
# 'eva' as 'llama', but outputs are smaller by depth: see `_init_blocks`.
INITS = {'llama': _llama_init, 'clip': _clip_init, 'eva': _llama_init,
         'fan_in': _fan_in_init}
