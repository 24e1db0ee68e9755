"""An image tower by itself, as it is pretrained and published.

It has what stands behind the tower in such files: a projection of the pooled
token, or what learns to predict a teacher's features of patches that are hidden
(EVA, arXiv 2211.07636, section 2.1; EVA-02, arXiv 2303.11331).
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from mmgen.models import vision_encoder


@dataclasses.dataclass(frozen=True)
class ImageTowerConfig:
  """A tower and what stands behind it.

  Attributes:
    vision: the tower.
    embed: width of a projection of the pooled token; None for none.
    embed_bias: its bias.
    predicted: width of the features that are predicted of patches; None for
      none.
    mask: a learned token in place of hidden patches.
  """
  vision: vision_encoder.VisionEncoderConfig
  embed: int | None = None
  embed_bias: bool = True
  predicted: int | None = None
  mask: bool = False


class ImageTower(nn.Module):
  """Parameters: 'vision', 'vision_projection', 'prediction', 'mask_token'."""
  config: ImageTowerConfig

  def setup(self):
    c = self.config
    self.vision = vision_encoder.VisionEncoder(c.vision)
    if c.embed is not None:
      self.vision_projection = nn.Dense(
          c.embed, use_bias=c.embed_bias, dtype=c.vision.dtype)
    if c.predicted is not None:
      self.prediction = nn.Dense(c.predicted, dtype=c.vision.dtype)
    if c.mask:
      self.mask_token = self.param(
          'mask_token', nn.initializers.normal(0.02), (c.vision.width,))

  def __call__(self, images_BYXC):
    """Returns (embedding_BE, out) of uint8 images.

    `out` has the 'hidden' tokens and, if features are predicted, what is
    'predicted' of each patch: [B, P, predicted].
    """
    embedding_BE, out = self.encode_image(images_BYXC)
    if self.config.predicted is not None:
      patches_BPD = out['hidden'][:, int(self.config.vision.class_token):]
      out['predicted'] = self.prediction(patches_BPD)
    return embedding_BE, out

  def encode_image(self, images_BYXC, taps=()):
    """Returns (embedding_BE, out); as they come, not normalised."""
    pooled_BD, out = self.vision.encode(images_BYXC, taps)
    if self.config.embed is not None:
      pooled_BD = self.vision_projection(pooled_BD)
    return pooled_BD, out


def example(config):
  """The smallest batch that creates all parameters."""
  return jnp.zeros((1, *config.vision.image_size, 3), jnp.uint8)
