"""The text decoder: embedding, stack, head.

LLaMA (arXiv 2302.13971), Vicuna, and Qwen2.5 (arXiv 2412.15115; biases on
query, key and value) differ in numbers only. Persimmon, the decoder of Fuyu-8B,
whose released code is its specification, has layer norms, biases and a squared
ReLU, norms of queries and keys, and turns half of the channels of each head.
The published ones stand in `SIZES`.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from mmgen import fields as fields_lib
from mmgen import partition
from mmgen.models import transformer


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """A decoder; fields as in `transformer.StackConfig` unless noted.

  Attributes:
    vocab: rows V of the embedding and columns of the head.
  """
  vocab: int
  layers: int
  width: int
  heads: int
  hidden: int
  kv_heads: int | None = None
  head_dim: int | None = None
  norm: str = 'rms'
  norm_eps: float = dataclasses.field(
      default=1e-5, metadata=dict(above=0, below=1))
  mlp: str = 'swiglu'
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  query_key_norm: bool = False
  rope_theta: float = dataclasses.field(
      default=1e4, metadata=dict(above=1, most=1e12))
  rope_share: float = dataclasses.field(
      default=1.0, metadata=dict(above=0, most=1))
  modality_weights: tuple[str, ...] = ()
  remat: bool = False
  unroll: bool = False
  backend: str = 'plain'
  dtype: str = 'float32'

  def __post_init__(self):
    try:
      _ = self.stack
    except ValueError as error:
      raise ValueError(f'model.decoder.{error}') from error

  @property
  def stack(self):
    fields = dataclasses.asdict(self)
    del fields['vocab']
    return transformer.StackConfig(**fields)


class Decoder(nn.Module):
  """Parameters {'embedding': [V, D], 'stack', 'head': {'kernel': [D, V]}}.

  Every matrix starts at N(0, 0.02^2), the norms at 1, biases at 0, as in the
  released code of LLaMA and Persimmon. That suits small widths too: in pre-norm
  blocks only the ratio of each block's output to the stream matters, and both
  start at the same scale.
  """
  config: DecoderConfig

  def setup(self):
    c = self.config
    init = nn.initializers.normal(0.02)
    self.embedding = self.param('embedding', init, (c.vocab, c.width))
    self.stack = transformer.Stack(c.stack)
    self.head = nn.Dense(c.vocab, use_bias=False, dtype=c.dtype,
                         kernel_init=init)

  def embed(self, tokens_BT):
    """Returns the embeddings of tokens, [B, T, D] in compute dtype."""
    table_VD = partition.constrain(self.embedding, 'vocab', 'width')
    x_BTD = jnp.take(table_VD, tokens_BT, axis=0)
    return partition.constrain(
        x_BTD.astype(self.config.dtype), 'batch', 'length', 'width')

  def __call__(self, x_BTD, mask, positions_BT, cache=None, taps=(),
               adapters=None, visual_BT=None):
    """Runs the stack; see `transformer.Stack`. Returns (hidden, out)."""
    return self.stack(x_BTD, mask, positions_BT, cache, taps,
                      adapters=adapters, visual_BT=visual_BT)

  def logits(self, hidden_BTD):
    """Returns the logits of hidden states, [B, T, V] in float32."""
    logits_BTV = partition.constrain(
        self.head(hidden_BTD), 'batch', 'length', 'vocab')
    return logits_BTV.astype(jnp.float32)


def sized(size, **overrides):
  """Returns the `DecoderConfig` of a published size, fields overridden."""
  if size not in SIZES:
    raise ValueError(f'model.decoder.size: {size!r}; allowed: '
                     f'{", ".join(SIZES)}.')
  return fields_lib.read(DecoderConfig, 'model.decoder',
                         {**SIZES[size], **overrides}, ValueError)


def flops_per_token(config, keys):
  """Forward FLOPs of one token, 2 for each multiply-add; training takes 3x.

  Matrix products only, as in PaLM's account (arXiv 2204.02311, appendix B);
  the embedding is a look-up and costs nothing.

  Args:
    config: a `DecoderConfig`.
    keys: keys each token's attention reads; the row length T for a plain
      forward pass, which computes and then masks.
  """
  blocks = config.layers * transformer.block_flops(config.stack, keys)
  return blocks + 2 * config.width * config.vocab


# LLaMA: arXiv 2302.13971, table 2. Vicuna v1.5 has the shape of Llama 2
# (arXiv 2307.09288), whose norms use 1e-5; of 33B there is v1.3 alone, of the
# shape of LLaMA. Qwen2.5: arXiv 2412.15115, table 1. Persimmon: released code.
_LLAMA_33B = dict(vocab=32000, layers=60, width=6656, heads=52, hidden=17920,
                  norm_eps=1e-6)
SIZES = {
    'llama-7b': dict(vocab=32000, layers=32, width=4096, heads=32,
                     hidden=11008, norm_eps=1e-6),
    'llama-13b': dict(vocab=32000, layers=40, width=5120, heads=40,
                      hidden=13824, norm_eps=1e-6),
    'llama-33b': _LLAMA_33B,
    'vicuna-7b': dict(vocab=32000, layers=32, width=4096, heads=32,
                      hidden=11008, norm_eps=1e-5),
    'vicuna-13b': dict(vocab=32000, layers=40, width=5120, heads=40,
                       hidden=13824, norm_eps=1e-5),
    'vicuna-33b': _LLAMA_33B,
    'qwen2.5-7b': dict(vocab=152064, layers=28, width=3584, heads=28,
                       kv_heads=4, hidden=18944, norm_eps=1e-6, qkv_bias=True,
                       rope_theta=1e6),
    'persimmon-8b': dict(vocab=262144, layers=36, width=4096, heads=64,
                         hidden=16384, norm='layer', norm_eps=1e-5, mlp='relu2',
                         qkv_bias=True, out_bias=True, mlp_bias=True,
                         query_key_norm=True, rope_theta=25e3, rope_share=0.5),
    'mini': dict(vocab=1024, layers=3, width=128, heads=2, hidden=384),
}
