"""Low-rank adapters of a stack of blocks (LoRA, arXiv 2106.09685).

Beside a matrix W that stays as it is stand a narrow A and B: y = x W becomes
y = x W + alpha / rank * x A B. B starts at zero, and so the model as it was.
Adapters are parameters of their own, with the layer axis first,

  lora/blocks/<projection>/a  [L, inputs, rank]
  lora/blocks/<projection>/b  [L, rank, outputs]

and the blocks are given them beside their own. Heads are flat in `inputs` and
`outputs`, so that all are matrices and every rank and mesh will do. A model is
one tree without them after `merge`.

The layers compute x A B rather than x (W + A B). Dropout acts on what an
adapter reads, which no sum of matrices can do; W needs no gradient; and no W is
made twice. Of a decoder as wide as Vicuna-7B (4 layers, 2048 tokens, bfloat16,
recomputed blocks, rank 128 everywhere; 2.0 GiB of parameters), compiled for a
TPU v5p, a gradient takes 1.2 GiB of temporaries and 12.0 TFLOPs; 4.3 GiB and
15.3 with all sums made before the first block, 1.7 GiB and 15.5 with those of a
layer made within its block.
"""

import dataclasses
import functools
import re
import zlib

import flax.traverse_util
import jax
import jax.numpy as jnp

from mmgen import partition


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Attributes:
    rank: columns of A and rows of B.
    alpha: numerator of the factor of x A B, whose denominator is the rank.
    dropout: chance of each number that an adapter reads in training to be 0
      (PEFT's lora_dropout; others are larger by 1 / (1 - dropout)).
    pattern: regex found in names of `projections` that have an adapter; all of
      them by default.
  """
  rank: int
  alpha: float
  dropout: float = 0.0
  pattern: str = ''

  def __post_init__(self):
    for field, fine, allowed in (
        ('rank', self.rank >= 1, 'at least 1'),
        ('dropout', 0 <= self.dropout < 1, 'from 0 up to, but not, 1')):
      if not fine:
        raise ValueError(f'model.lora.{field}: {getattr(self, field)}; '
                         f'allowed: {allowed}.')
    try:
      re.compile(self.pattern)
    except re.error as error:
      raise ValueError(f'model.lora.pattern: {self.pattern!r} is no regular '
                       f'expression: {error}.') from None


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=['blocks', 'keys_LB'],
    meta_fields=['scale', 'dropout'])
@dataclasses.dataclass(frozen=True)
class Adapters:
  """What blocks are given; in a block, of that layer.

  Attributes:
    blocks: {'attention': {'query': {'a', 'b'}, ...}, 'mlp': ...}.
    keys_LB: random keys for dropout, of each layer and row; None for none.
    scale: of x A B.
    dropout: as in `LoraConfig`.
  """
  blocks: dict
  keys_LB: jax.Array | None
  scale: float
  dropout: float


def projections(stack):
  """Returns {name: (inputs, outputs)} of the matrices in a block.

  Args:
    stack: a `transformer.StackConfig`.
  """
  queries, keys = stack.heads * stack.H, stack.K * stack.H
  found = {
      'attention/query': (stack.width, queries),
      'attention/key': (stack.width, keys),
      'attention/value': (stack.width, keys),
      'attention/out': (queries, stack.width),
      'mlp/gate': (stack.width, stack.hidden),
      'mlp/up': (stack.width, stack.hidden),
      'mlp/down': (stack.hidden, stack.width)}
  if stack.mlp != 'swiglu':
    del found['mlp/gate']
  return found


def targets(config, stack):
  """Those of `projections` that have an adapter.

  Raises:
    ValueError: none has.
  """
  every = projections(stack)
  found = {name: sizes for name, sizes in every.items()
           if re.search(config.pattern, name)}
  if not found:
    raise ValueError(f'model.lora.pattern: {config.pattern!r} is found in none '
                     f'of {", ".join(every)}.')
  return found


def init(rng, config, stack):
  """Initial adapters: A uniform up to inputs ** -0.5, B zero, as PEFT's.

  Returns:
    {'blocks': ...}, what stands below 'lora'.
  """
  flat = {}
  for name, (inputs, outputs) in targets(config, stack).items():
    bound = inputs ** -0.5
    flat[f'blocks/{name}/a'] = jax.random.uniform(
        _own_key(rng, name), (stack.layers, inputs, config.rank),
        minval=-bound, maxval=bound)
    flat[f'blocks/{name}/b'] = jnp.zeros((stack.layers, config.rank, outputs))
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def adapters(config, params, keys_B=None):
  """Prepares adapters for a stack.

  Args:
    config: a `LoraConfig`.
    params: as `init` returns them.
    keys_B: a random key for each row of the batch, to drop out by, or None.
  """
  keys_LB = None
  if keys_B is not None:
    layers = len(jax.tree.leaves(params)[0])
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
    keys_LB = fold(keys_B, jnp.arange(layers))
  return Adapters(params['blocks'], keys_LB, config.alpha / config.rank,
                  config.dropout)


def add(y, x, adapters, name):
  """Adds to y = x W what the adapter of W, if it has one, makes of x.

  Args:
    y: [B, T, ...], the outputs.
    x: [B, T, ...], the inputs.
    adapters: an `Adapters` of one layer, or None.
    name: in `projections`.
  """
  part, _, which = name.partition('/')
  pair = adapters and adapters.blocks.get(part, {}).get(which)
  if not pair:
    return y
  x_BTC = x.reshape(*x.shape[:2], -1).astype(y.dtype)
  if adapters.keys_LB is not None:
    x_BTC = _drop(x_BTC, adapters.keys_LB, adapters.dropout, name)
  a, b = (pair[side].astype(y.dtype) for side in 'ab')
  narrow = partition.constrain(x_BTC @ a, 'batch', 'length', None)
  return y + adapters.scale * (narrow @ b).reshape(y.shape)


def _drop(x_BTC, keys_B, rate, name):
  """Each adapter of a layer drops on its own, also where inputs are shared."""
  kept_BTC = jax.vmap(lambda key: jax.random.bernoulli(
      _own_key(key, name), 1 - rate, x_BTC.shape[1:]))(keys_B)
  return jnp.where(kept_BTC, x_BTC / (1 - rate), 0)


def _own_key(key, name):
  return jax.random.fold_in(key, zlib.crc32(name.encode()))


def matrix(name):
  """The matrix beside which 'lora/blocks/<projection>/a' or '.../b' stands."""
  return f'decoder/stack/{name.removeprefix("lora/").rpartition("/")[0]}/kernel'


def merge(params, config):
  """Folds adapters into the matrices that they stand beside.

  Args:
    params: nested dict with 'lora' and 'decoder'.
    config: a `LoraConfig`.

  Returns:
    A nested dict without 'lora', for the same model without adapters; sums are
    made in float32, dtypes stay.
  """
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  for name in [name for name in flat if name.startswith('lora/')]:
    if not name.endswith('/a'):
      continue
    b = flat.pop(f'{name[:-1]}b').astype(jnp.float32)
    a = flat.pop(name).astype(jnp.float32)
    target = matrix(name)
    kernel = flat[target]
    change = jnp.matmul(a, b, precision='highest').reshape(kernel.shape)
    flat[target] = (kernel.astype(jnp.float32) + config.alpha / config.rank
                    * change).astype(kernel.dtype)
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def flops_per_token(config, stack):
  """Forward FLOPs that adapters add for one token, in all layers."""
  return 2 * stack.layers * config.rank * sum(
      map(sum, targets(config, stack).values()))

