"""CLIP: an image tower and a text tower into one space.

The softmax form is arXiv 2103.00020, figure 3; the sigmoid form, with a bias
on its logits, arXiv 2303.15343, section 3.2. The losses themselves couple the
examples of a batch and stand in `objectives/contrastive.py`.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmgen import fields as fields_lib
from mmgen.models import text_encoder
from mmgen.models import vision_encoder


@dataclasses.dataclass(frozen=True)
class ClipConfig:
  """Two towers; the defaults are OpenAI's CLIP.

  Attributes:
    vision, text: the towers.
    embed: width E of the common space.
    vision_projection: a matrix behind the image tower. Without it E is the
      width of that tower (SigLIP).
    vision_projection_bias: its bias (EVA-CLIP up to 5B).
    text_projection_bias: bias of the matrix behind the text tower.
    logit_scale: initial factor of the cosines; its logarithm is trained.
    logit_scale_max: bound of that logarithm, for `Contrastive.project`; None
      for no bound.
    logit_bias: initial bias of the logits; None for no such parameter.
  """
  vision: vision_encoder.VisionEncoderConfig
  text: text_encoder.TextEncoderConfig
  embed: int
  vision_projection: bool = True
  vision_projection_bias: bool = False
  text_projection_bias: bool = False
  logit_scale: float = 1 / 0.07
  logit_scale_max: float | None = math.log(100)
  logit_bias: float | None = None

  def __post_init__(self):
    if not self.vision_projection and self.embed != self.vision.width:
      raise ValueError(f'clip.embed is {self.embed}; without vision_projection '
                       f'it must be vision.width, {self.vision.width}.')

  def image_layout(self, image_size):
    """The cells of the image tower, into which pictures are fitted."""
    return self.vision.image_layout(image_size)


class Clip(nn.Module):
  """Parameters: 'vision', 'text', '{vision,text}_projection', 'logit_scale'."""
  config: ClipConfig

  def setup(self):
    c = self.config
    self.vision = vision_encoder.VisionEncoder(c.vision)
    self.text = text_encoder.TextEncoder(c.text)
    if c.vision_projection:
      # EVA-CLIP starts with embeddings near zero, 0.02 * 0.001.
      std = 2e-5 if c.vision.init == 'eva' else c.vision.width ** -0.5
      self.vision_projection = nn.Dense(
          c.embed, use_bias=c.vision_projection_bias, dtype=c.vision.dtype,
          kernel_init=nn.initializers.normal(std))
    self.text_projection = nn.Dense(
        c.embed, use_bias=c.text_projection_bias, dtype=c.text.dtype,
        kernel_init=nn.initializers.normal(c.text.width ** -0.5))
    self.logit_scale = self.param(
        'logit_scale', nn.initializers.constant(math.log(c.logit_scale)), ())
    if c.logit_bias is not None:
      self.logit_bias = self.param(
          'logit_bias', nn.initializers.constant(c.logit_bias), ())

  def __call__(self, batch):
    """Embeds the pairs of one source.

    Args:
      batch: images uint8 [B, Y, X, 3], tokens [B, T], valid [B, T], as
        `layout.pair` makes them; in training with patch dropout also kept
        [B, P], see `vision_encoder.draw_patches`, and with drop path factors
        [B, L, 2], see `transformer.draw_branches`.

    Returns:
      ((image_BE, text_BE), out): normalised float32 embeddings; out has the
      towers' own `out`, prefixed 'vision/' and 'text/'.
    """
    image_BE, image_out = self.encode_image(
        batch['images'], kept_BP=batch.get('kept'),
        factors_BL2=batch.get('factors'))
    text_BE, text_out = self.encode_text(batch['tokens'], batch['valid'])
    out = {f'vision/{k}': v for k, v in image_out.items()}
    out |= {f'text/{k}': v for k, v in text_out.items()}
    return (image_BE, text_BE), out

  def encode_image(self, images_BYXC, taps=(), kept_BP=None, factors_BL2=None):
    """Returns (image_BE, out): normalised float32 embeddings of images."""
    pooled_BD, out = self.vision.encode(
        images_BYXC, taps, kept_BP, factors_BL2)
    out['pooled'] = pooled_BD
    if self.config.vision_projection:
      pooled_BD = self.vision_projection(pooled_BD)
    return normalise(pooled_BD), out

  def encode_text(self, tokens_BT, valid_BT, taps=()):
    """Returns (text_BE, out): normalised float32 embeddings of texts."""
    pooled_BD, out = self.text(tokens_BT, valid_BT, taps)
    out['pooled'] = pooled_BD
    return normalise(self.text_projection(pooled_BD)), out

  def temperature(self):
    """Returns (scale, bias) of the logits: scale * cosine + bias."""
    bias = 0.0 if self.config.logit_bias is None else self.logit_bias
    return jnp.exp(self.logit_scale), bias


def normalise(x_BE):
  """Divides by the l2 norm, in float32; zero stays zero, also its gradient."""
  x_BE = x_BE.astype(jnp.float32)
  square_B1 = jnp.sum(x_BE * x_BE, axis=-1, keepdims=True)
  return x_BE * jax.lax.rsqrt(jnp.maximum(square_B1, 1e-24))


def build(config, vocab=None):
  """Makes the model of an experiment's config.

  Args:
    config: with `model` and `dtype`. `model.size` names an entry of `SIZES`;
      all other fields of `model`, `model.vision` and `model.text` override it.
    vocab: rows of the text embedding that a tokenizer needs;
      `model.text.vocab` may ask for more.

  Raises:
    ValueError: an unknown name or field, or values that do not fit.
  """
  fields = {k: v for k, v in config.model.items() if k != 'name'}
  size = fields.pop('size', None)
  if size not in SIZES:
    raise ValueError(
        f'model.size: {size!r}; allowed: {", ".join(SIZES)}.')
  base = SIZES[size]
  text = dict(fields.pop('text', {}), dtype=config.dtype)
  text = _replace(base.text, 'model.text', **text)
  if vocab is not None:
    asked = config.model.get('text', {}).get('vocab', 0)
    text = dataclasses.replace(text, vocab=max(vocab, asked))
  vision = dict(fields.pop('vision', {}), dtype=config.dtype)
  return Clip(_replace(base, 'model', **fields,
                       vision=_replace(base.vision, 'model.vision', **vision),
                       text=text))


def _replace(config, where, **fields):
  return fields_lib.read(type(config), where, {**vars(config), **fields},
                         ValueError)


def example_batch(config, image_size):
  """The smallest batch that creates all parameters: one pair.

  Args:
    config: a `ClipConfig`.
    image_size: pixels (rows, columns).
  """
  return dict(images=jnp.zeros((1, *image_size, 3), jnp.uint8),
              tokens=jnp.zeros((1, config.text.length), jnp.int32),
              valid=jnp.ones((1, config.text.length), bool))


def flops(config, length=None, train=False):
  """Forward FLOPs of one pair; 2 for each multiply-add.

  The product of all embeddings of a batch B adds 2 * B * E a pair. `train`
  counts the patches that training keeps only.
  """
  c = config
  total = vision_encoder.flops(c.vision, train=train)
  total += text_encoder.flops(c.text, length)
  total += 2 * c.text.width * c.embed
  return total + (2 * c.vision.width * c.embed if c.vision_projection else 0)


def _openai(size, text, embed):
  return ClipConfig(vision_encoder.SIZES[size], text_encoder.SIZES[text], embed)


def _siglip(vision, text):
  vision = vision_encoder.SIZES[vision]
  return ClipConfig(
      vision, text_encoder.SIZES[text], embed=vision.width,
      vision_projection=False, text_projection_bias=True, logit_scale=10.0,
      logit_scale_max=None, logit_bias=-10.0)


def _eva(vision, text, embed, **fields):
  return ClipConfig(vision_encoder.SIZES[vision], text_encoder.SIZES[text],
                    embed, **{'vision_projection_bias': True, **fields})


# Above 5B the temperature is constant (arXiv 2402.04252, tables 12 and 13).
_EVA_LARGE = dict(vision_projection_bias=False, logit_scale=100.0)

SIZES = {
    'mini': _openai('mini', 'mini', 128),
    'clip-b32': _openai('clip-b32', 'clip-b', 512),
    'clip-b16': _openai('clip-b16', 'clip-b', 512),
    'clip-l14': _openai('clip-l14', 'clip-l', 768),
    'clip-l14-336': _openai('clip-l14-336', 'clip-l', 768),
    'siglip-b16': _siglip('siglip-b16', 'siglip-b'),
    'siglip-l16-256': _siglip('siglip-l16-256', 'siglip-l'),
    'siglip-so400m': _siglip('siglip-so400m', 'siglip-so400m'),
    'siglip-so400m-384': _siglip('siglip-so400m-384', 'siglip-so400m-384'),
    'eva01-g14': _eva('eva01-g14', 'openclip-l', 1024),
    'eva01-g14-plus': _eva('eva01-g14-plus', 'openclip-h', 1024),
    'eva02-b16': _eva('eva02-b16', 'openclip-b', 512),
    'eva02-l14': _eva('eva02-l14', 'openclip-l', 768),
    'eva02-l14-336': _eva('eva02-l14-336', 'openclip-l', 768),
    'eva02-e14': _eva('eva02-e14', 'openclip-h', 1024),
    'eva02-e14-plus': _eva('eva02-e14-plus', 'openclip-bigg', 1024),
    'eva-8b': _eva('eva-8b', 'openclip-bigg', 1280, **_EVA_LARGE),
    'eva-8b-448': _eva('eva-8b-448', 'openclip-bigg', 1280, **_EVA_LARGE),
    'eva-18b': _eva('eva-18b', 'openclip-bigg', 1536, **_EVA_LARGE),
}
