"""From the width of a vision module to the width of the decoder."""

import dataclasses

import flax.linen as nn
import jax

from mmgen.models import patch_embedding


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
  """Attributes:
    name: a name in `CONNECTORS`.
    width: width D of the results.
    hidden: width F between the two layers of 'mlp'; default `width`.
    dtype: compute dtype.
  """
  name: str
  width: int
  hidden: int | None = None
  dtype: str = 'float32'

  def __post_init__(self):
    if self.name not in CONNECTORS:
      raise ValueError(f'model.connector.name: {self.name!r}; allowed: '
                       f'{", ".join(CONNECTORS)}.')
    if self.hidden is not None and self.name != 'mlp':
      raise ValueError(f'model.connector.hidden is {self.hidden}, but '
                       f"{self.name!r} has no hidden layer; only 'mlp' has.")


class Identity(nn.Module):
  """Nothing; the widths must agree already."""
  config: ConnectorConfig

  def __call__(self, x):
    return x


class Linear(nn.Module):
  """One linear map with bias."""
  config: ConnectorConfig

  @nn.compact
  def __call__(self, x):
    return _dense(self.config.width, x, self.config, 'out')


class Mlp(nn.Module):
  """Linear, exact GELU, linear (LLaVA-1.5, arXiv 2310.03744, section 3.3)."""
  config: ConnectorConfig

  @nn.compact
  def __call__(self, x):
    c = self.config
    x = _dense(c.hidden or c.width, x, c, 'up')
    return _dense(c.width, jax.nn.gelu(x, approximate=False), c, 'down')


def flops(config, inputs):
  """Forward FLOPs of one embedding of `inputs` values, 2 per multiply-add."""
  if config.name == 'identity':
    return 0
  if config.name == 'linear':
    return 2 * inputs * config.width
  return 2 * (config.hidden or config.width) * (inputs + config.width)


def _dense(width, x, config, name):
  # LLaVA and EVE leave their projectors at PyTorch's defaults.
  return nn.Dense(
      width, dtype=config.dtype, kernel_init=patch_embedding.torch_kernel,
      bias_init=patch_embedding.torch_bias(x.shape[-1]), name=name)(x)


CONNECTORS = {'identity': Identity, 'linear': Linear, 'mlp': Mlp}
