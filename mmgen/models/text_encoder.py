"""Text tower of contrastive models: a transformer, pooled at one position.

CLIP's (arXiv 2103.00020, section 2.4) is causal and read at the end of the
text; SigLIP's (arXiv 2303.15343, released code) sees both ways, padding
included, and is read at the last position whatever stands there.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from mmgen import partition
from mmgen.models import attention
from mmgen.models import transformer


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
  """A text tower; the defaults are OpenAI's CLIP.

  Attributes:
    vocab: ids of the tokenizer.
    length: positions that are learned, the longest text.
    layers, width, heads, hidden: as in `transformer.StackConfig`.
    mlp: as in `vision_encoder.VisionEncoderConfig`.
    norm_eps: of every layer norm.
    causal: a token sees those before it only.
    pooling: a name in `POOLINGS`.
    remat, unroll, backend, dtype: as in `transformer.StackConfig`.
  """
  vocab: int
  length: int
  layers: int
  width: int
  heads: int
  hidden: int
  mlp: str = 'quick_gelu'
  norm_eps: float = dataclasses.field(
      default=1e-5, metadata=dict(above=0, below=1))
  causal: bool = True
  pooling: str = 'eot'
  remat: bool = False
  unroll: bool = False
  backend: str = 'plain'
  dtype: str = 'float32'

  def __post_init__(self):
    if self.pooling not in POOLINGS:
      raise ValueError(f'text.pooling is {self.pooling!r}; allowed: '
                       f'{", ".join(POOLINGS)}.')

  @property
  def stack(self):
    return transformer.StackConfig(
        layers=self.layers, width=self.width, heads=self.heads,
        hidden=self.hidden, norm='layer', norm_eps=self.norm_eps, mlp=self.mlp,
        qkv_bias=True, out_bias=True, mlp_bias=True, init='clip',
        remat=self.remat, unroll=self.unroll, backend=self.backend,
        dtype=self.dtype)


class TextEncoder(nn.Module):
  """Tokens to one embedding."""
  config: TextEncoderConfig

  @nn.compact
  def __call__(self, tokens_BT, valid_BT, taps=()):
    """Embeds each text as one vector, without a projection.

    Args:
      tokens_BT: ids.
      valid_BT: False for padding, which stands at the end. Padding is not
        hidden from attention: the references do not either.
      taps: blocks whose output is wanted in out['taps']; 0 is the input.

    Returns:
      (pooled_BD, out); out['hidden'] are all tokens after the final norm.

    Raises:
      ValueError: the texts are longer than the positions.
    """
    c = self.config
    T = tokens_BT.shape[1]
    if T > c.length:
      raise ValueError(f'texts have {T} tokens, but text.length, the number of '
                       f'positions, is {c.length}; raise it or lower '
                       'layout.length.')
    x_BTD = nn.Embed(
        c.vocab, c.width, dtype=c.dtype, name='token_embedding',
        embedding_init=nn.initializers.normal(0.02))(tokens_BT)
    positions = self.param('position_embedding', nn.initializers.normal(0.01),
                           (c.length, c.width))
    x_BTD += positions[None, :T].astype(c.dtype)
    x_BTD = partition.constrain(x_BTD, 'batch', 'length', 'width')
    x_BTD, out = transformer.Stack(c.stack, name='stack')(
        x_BTD, attention.Mask(causal=c.causal), taps=taps)
    out['hidden'] = x_BTD
    return POOLINGS[c.pooling](x_BTD, valid_BT), out


def flops(config, length=None):
  """Forward FLOPs of one text of `length` tokens (default: all positions)."""
  T = config.length if length is None else length
  keys = (T + 1) / 2 if config.causal else T
  return config.layers * T * transformer.block_flops(config.stack, keys)


def _pool_end(x_BTD, valid_BT):
  """The last token that is not padding: the end of the text."""
  end_B = jnp.maximum(jnp.sum(valid_BT, axis=1) - 1, 0)
  return jnp.take_along_axis(x_BTD, end_B[:, None, None], axis=1)[:, 0]


def _pool_last(x_BTD, valid_BT):
  """The last position, padding or not."""
  del valid_BT
  return x_BTD[:, -1]


POOLINGS = {'eot': _pool_end, 'last': _pool_last}


def _clip(layers, width, heads, mlp='quick_gelu'):
  return TextEncoderConfig(vocab=49408, length=77, layers=layers, width=width,
                           heads=heads, hidden=4 * width, mlp=mlp)


def _siglip(length, layers, width, heads, hidden):
  return TextEncoderConfig(
      vocab=32000, length=length, layers=layers, width=width, heads=heads,
      hidden=hidden, mlp='gelu_tanh', norm_eps=1e-6, causal=False,
      pooling='last')


SIZES = {
    'mini': TextEncoderConfig(
        vocab=1024, length=32, layers=2, width=128, heads=2, hidden=512,
        mlp='gelu', unroll=True),
    'clip-b': _clip(12, 512, 8),
    'clip-l': _clip(12, 768, 12),
    # Of OpenCLIP and EVA-CLIP; 'clip-b' and 'clip-l' but for the exact GELU.
    'openclip-b': _clip(12, 512, 8, 'gelu'),
    'openclip-l': _clip(12, 768, 12, 'gelu'),
    'openclip-h': _clip(24, 1024, 16, 'gelu'),
    'openclip-bigg': _clip(32, 1280, 20, 'gelu'),
    'siglip-b': _siglip(64, 12, 768, 12, 3072),
    'siglip-l': _siglip(64, 24, 1024, 16, 4096),
    'siglip-so400m': _siglip(16, 27, 1152, 16, 4304),
    'siglip-so400m-384': _siglip(64, 27, 1152, 16, 4304),
}
