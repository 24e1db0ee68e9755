"""Patch aligning layer: a decoder's hidden states to a teacher's features.

EVE, arXiv 2406.11832, section 3.3 and its released code. It exists in training
only; `objectives/alignment.py` compares its output with the teacher's.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from mmgen.models import attention
from mmgen.models import transformer


@dataclasses.dataclass(frozen=True)
class PatchAlignerConfig:
  """A patch aligning layer.

  Attributes:
    layers, decoder_width: of the decoder whose hidden states are read.
    width: of the teacher's features.
    interval: a tap every so many blocks, counted back from the last.
    heads: of the attention over taps.
    norm_eps: of the layer norms.
    dtype: compute dtype.
  """
  layers: int
  decoder_width: int
  width: int
  interval: int = 4
  heads: int = 8
  norm_eps: float = 1e-5
  dtype: str = 'float32'

  def __post_init__(self):
    if not 1 <= self.interval <= self.layers:
      raise ValueError(f'aligner.interval is {self.interval}; allowed: 1 to '
                       f'the number of layers, {self.layers}.')
    if self.width % self.heads:
      raise ValueError(f'aligner.heads: {self.heads} does not divide the width '
                       f'of the teacher, {self.width}.')

  @property
  def taps(self):
    """Hidden states that are read: the last block's first, 0 is the input."""
    return tuple(range(self.layers, -1, -self.interval))


class PatchAligner(nn.Module):
  """Reads one feature a position from several depths of a decoder.

  Each tap has its own norm and matrix. The last layer's vector then attends to
  those of the other taps; keys and values are the same vectors, there is no
  further projection, and the scale is 1/sqrt(width), not of a head.
  """
  config: PatchAlignerConfig

  @nn.compact
  def __call__(self, hidden):
    """Predicts the teacher's features.

    Args:
      hidden: {l: [..., D] for l in `config.taps`}: the output of block l, the
        input for 0, and for the last block the state after the final norm.

    Returns:
      ([..., width], out).
    """
    c = self.config
    norm = transformer.NORMS['layer']
    taps = [
        nn.Dense(c.width, use_bias=False, dtype=c.dtype, name=f'project_{j}')(
            norm(c.norm_eps, c.dtype, name=f'norm_{j}')(hidden[l]))
        for j, l in enumerate(c.taps)]
    shape = taps[0].shape
    split = lambda x: x.reshape(-1, 1, c.heads, c.width // c.heads)
    query, *keys = [split(x) for x in taps]
    keys = jnp.concatenate(keys, axis=1)
    fused = attention.attend(query, keys, keys, attention.Mask(),
                             scale=c.width ** -0.5).reshape(shape)
    direct = nn.Dense(c.width, dtype=c.dtype, name='input')(hidden[c.layers])
    return direct + nn.Dense(c.width, dtype=c.dtype, name='output')(fused), {}


def flops(config):
  """Forward FLOPs of one position; 2 for each multiply-add."""
  c = config
  taps = len(c.taps)
  return 2 * c.width * ((taps + 1) * c.decoder_width + c.width + 2 * (taps - 1))


SIZES = {
    'eve-7b': PatchAlignerConfig(layers=32, decoder_width=4096, width=1024),
}
