"""What a slot predicts of the picture: the entry that the next slot takes.

The slot before a picture (<image>, if there are borders) predicts its first
entry, each entry the one after it. Sources: Emu, arXiv 2307.05222, section 2.2,
regresses what its decoder reads; Emu2, arXiv 2312.13286, section 2.2, what its
vision module gives.
"""

import dataclasses

import flax.linen as nn

TARGETS = ('vision', 'connector')


@dataclasses.dataclass(frozen=True)
class VisualHeadConfig:
  """A head for visual slots.

  Attributes:
    name: a name in `VISUAL_HEADS`.
    target: whose table is predicted: 'vision', before the connector, or
      'connector', behind it: what the decoder reads.
    dtype: compute dtype.
  """
  name: str
  target: str
  dtype: str = 'float32'

  def __post_init__(self):
    for field, allowed in (('name', VISUAL_HEADS), ('target', TARGETS)):
      if getattr(self, field) not in allowed:
        raise ValueError(
            f'model.visual_head.{field}: {getattr(self, field)!r}; allowed: '
            f'{", ".join(allowed)}.')


class Linear(nn.Module):
  """Regression by one matrix without bias: hidden_BTD -> features_BTF.

  Attributes:
    config: of the head.
    width: width F of what is predicted.
  """
  config: VisualHeadConfig
  width: int

  @nn.compact
  def __call__(self, hidden_BTD):
    return nn.Dense(self.width, use_bias=False, dtype=self.config.dtype,
                    kernel_init=nn.initializers.normal(0.02),
                    name='out')(hidden_BTD)


def flops(config, inputs, width):
  """Forward FLOPs of one slot: `inputs` values of state, `width` predicted."""
  del config  # linear is all there is
  return 2 * inputs * width


VISUAL_HEADS = {'linear': Linear}
