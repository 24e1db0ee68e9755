"""From the table of a vision module to the embeddings that a decoder reads."""

import dataclasses
from typing import Any
from typing import NamedTuple

import flax.linen as nn
import jax

from mmgen.models import causal_former
from mmgen.models import patch_embedding


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
  """One map for every entry of the table.

  Attributes:
    name: a name in `CONNECTORS` of this class.
    width: width D of the results.
    hidden: width F between the two layers of 'mlp'; default `width`.
    bias: of 'linear'.
    border: the tokens <image> and </image> stand around each picture.
    dtype: compute dtype.
  """
  name: str
  width: int
  hidden: int | None = None
  bias: bool = True
  border: bool = False
  dtype: str = 'float32'

  by_entry = True

  def __post_init__(self):
    allowed = [name for name, found in CONNECTORS.items()
               if found.config is ConnectorConfig]
    if self.name not in allowed:
      raise ValueError(f'model.connector.name: {self.name!r}; allowed: '
                       f'{", ".join(allowed)}.')
    if self.hidden is not None and self.name != 'mlp':
      raise ValueError(f'model.connector.hidden is {self.hidden}, but '
                       f"{self.name!r} has no hidden layer; only 'mlp' has.")
    if not self.bias and self.name != 'linear':
      raise ValueError("model.connector.bias is False; only 'linear' can do "
                       f'without, not {self.name!r}.')

  def image_layout(self, vision_layout):
    """The slots of the results, from those of the table."""
    return dataclasses.replace(vision_layout, border=self.border)


class Identity(nn.Module):
  """Nothing; the widths must agree already."""
  config: ConnectorConfig

  def __call__(self, x):
    return x, {}


class Linear(nn.Module):
  """One linear map."""
  config: ConnectorConfig

  @nn.compact
  def __call__(self, x):
    c = self.config
    return _dense(c.width, x, c, 'out', c.bias), {}


class Mlp(nn.Module):
  """Linear, exact GELU, linear (LLaVA-1.5, arXiv 2310.03744, section 3.3)."""
  config: ConnectorConfig

  @nn.compact
  def __call__(self, x):
    c = self.config
    x = _dense(c.hidden or c.width, x, c, 'up')
    return _dense(c.width, jax.nn.gelu(x, approximate=False), c, 'down'), {}


def module(config):
  """The module of a config: table_BIPD -> (table_BIPD, out)."""
  return CONNECTORS[config.name].module(config)


def flops(config, inputs, entries):
  """Forward FLOPs of one picture, 2 for each multiply-add.

  Args:
    config: of a connector.
    inputs: width of the table.
    entries: its length P.
  """
  return CONNECTORS[config.name].flops(config, inputs, entries)


def _dense(width, x, config, name, bias=True):
  # LLaVA and EVE leave their projectors at PyTorch's defaults.
  return nn.Dense(
      width, use_bias=bias, dtype=config.dtype,
      kernel_init=patch_embedding.torch_kernel,
      bias_init=patch_embedding.torch_bias(x.shape[-1]), name=name)(x)


def _linear_flops(config, inputs, entries):
  return 2 * entries * inputs * config.width


def _mlp_flops(config, inputs, entries):
  hidden = config.hidden or config.width
  return 2 * entries * hidden * (inputs + config.width)


class Connector(NamedTuple):
  """A way of connecting: its config class, module, and FLOPs."""
  config: type
  module: type
  flops: Any


CONNECTORS = {
    'identity': Connector(ConnectorConfig, Identity, lambda *_: 0),
    'linear': Connector(ConnectorConfig, Linear, _linear_flops),
    'mlp': Connector(ConnectorConfig, Mlp, _mlp_flops),
    'causal_former': Connector(
        causal_former.CausalFormerConfig, causal_former.CausalFormer,
        causal_former.flops),
}
