"""The next-token model over text and pictures, assembled by config.

  pictures  -> vision -> connector -> table of P embeddings a picture
  tokens    -> text embedding      -> one embedding a slot
  splice: slot t takes table entry `visual[t]` where that is >= 0
  decoder: causal within each segment of the packed row -> logits
  visual head, if there is one: what the next slot takes from a table

How a picture becomes slots is decided in `data/layout.py`; this file only
follows the indices found in the batch. A decoder alone (no vision) is the same
model with `vision=None`; a batch without pictures is the same call.
"""

import dataclasses
from typing import Any
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmgen import fields as fields_lib
from mmgen.models import attention
from mmgen.models import causal_former
from mmgen.models import connector as connector_lib
from mmgen.models import decoder as decoder_lib
from mmgen.models import lora as lora_lib
from mmgen.models import patch_embedding
from mmgen.models import transformer
from mmgen.models import vision_encoder
from mmgen.models import visual_head as visual_head_lib


@dataclasses.dataclass(frozen=True)
class MultimodalConfig:
  """Attributes:
    decoder: the text decoder.
    vision: config of a module in `VISION`; None for text only.
    connector: config of a module in `connector.CONNECTORS`, from vision to
      decoder; None exactly if vision is.
    visual_head: what a slot predicts of a picture; None for nothing.
    lora: low-rank adapters of the decoder's blocks, or None.
  """
  decoder: decoder_lib.DecoderConfig
  vision: Any = None
  connector: Any = None
  visual_head: visual_head_lib.VisualHeadConfig | None = None
  lora: lora_lib.LoraConfig | None = None

  def __post_init__(self):
    if self.lora is not None:
      lora_lib.targets(self.lora, self.decoder.stack)  # raises if there is none
    if (self.vision is not None and self.connector.name == 'identity'
        and self.vision.width != self.decoder.width):
      raise ValueError(
          "model.connector.name is 'identity', but model.vision.width is "
          f'{self.vision.width} and model.decoder.width is '
          f"{self.decoder.width}; make them equal or choose 'linear' or 'mlp'.")
    if self.lora is not None and self.decoder.modality_weights:
      raise ValueError('model.lora is set beside '
                       'model.decoder.modality_weights: adapters of two sets '
                       'of weights are not known.')
    head = self.visual_head
    if head is not None:
      if self.vision is None:
        raise ValueError('model.visual_head is set, but model.vision is None: '
                         'there is nothing to predict.')
      if head.target == 'vision' and not self.connector.by_entry:
        raise ValueError(
            "model.visual_head.target is 'vision', but no entry of the table "
            f'stands for one slot behind {self.connector.name!r}; choose '
            "'connector'.")

  def image_layout(self, image_size):
    """How a picture of (rows, columns) pixels becomes slots."""
    return self.connector.image_layout(self.vision.image_layout(image_size))

  @property
  def feature_width(self):
    """Width F of what the visual head predicts."""
    return getattr(self, self.visual_head.target).width


class MultimodalDecoder(nn.Module):
  """Parameters {'vision', 'connector', 'decoder', 'visual_head', 'lora'}.

  Of these it has those that its config asks for, and the connector only if that
  has any.

  A batch holds the arrays of one source as `layout.sequence` makes them:
  tokens, segments, positions [B, T]; and, if the source has pictures, visual
  [B, T], images [B, I, Y, X, 3], image_box [B, I, 4].
  """
  config: MultimodalConfig

  def setup(self):
    c = self.config
    self.decoder = decoder_lib.Decoder(c.decoder)
    if c.vision is not None:
      self.vision = _part(c.vision).module(c.vision)
      self.connector = connector_lib.module(c.connector)
    if c.visual_head is not None:
      self.visual_head = visual_head_lib.VISUAL_HEADS[c.visual_head.name](
          c.visual_head, c.feature_width)
    if c.lora is not None:
      self.lora = self.param('lora', lora_lib.init, c.lora, c.decoder.stack)

  def __call__(self, batch, train=False, taps=()):
    """Predicts the token after every slot.

    Args:
      batch: arrays of one source.
      train: whether to drop out, if adapters do, by the key 'dropout' and
        batch['row'], the place of each row in the whole batch.
      taps: layers asked for in out['taps'], as in `transformer.Stack`.

    Returns:
      (logits_BTV float32, out) with out['input'] the spliced embeddings,
      out['hidden'] the normed output of the last block, out['taps'], and what
      vision and connector give besides as 'vision/...', 'connector/...'. With a
      visual head, out['regressed'] [B, T, F] is what each slot predicts the
      next one to take, and out['features'] [B, I * P, F] what `visual` points
      to in there; no gradient passes through it.
    """
    x_BTD, out = self._splice(batch)
    mask = attention.Mask(causal=True, segments_BT=batch['segments'])
    hidden_BTD, inner = self.decoder(
        x_BTD, mask, batch['positions'], taps=taps,
        adapters=self._adapters(batch if train else None),
        visual_BT=_visual(batch))
    out |= dict(input=x_BTD, hidden=hidden_BTD, taps=inner['taps'])
    if self.config.visual_head is not None:
      out['regressed'] = self.visual_head(hidden_BTD)
    return self.decoder.logits(hidden_BTD), out

  def embed(self, batch):
    """Returns the spliced embeddings of a batch, [B, T, D]."""
    return self._splice(batch)[0]

  def prefill(self, batch, lengths_B, cache):
    """Reads prompts, one right-padded row each, into an empty cache.

    Args:
      batch: arrays of one source; every row is one document.
      lengths_B: number of slots in use.
      cache: from `init_cache`, at least as long as the rows.

    Returns:
      (logits_BV after the last slot of each row, cache). What the padding
      left in the cache is hidden by causality until `extend` overwrites it.
    """
    hidden_B1D, cache = self._read(batch, lengths_B, cache)
    return self.decoder.logits(hidden_B1D)[:, 0], cache

  def extend(self, tokens_B1, positions_B, cache):
    """Reads one more token of each row, at its own position.

    Returns:
      (logits_BV, cache).
    """
    x_B1D = self.decoder.embed(tokens_B1)
    hidden_B1D, cache = self._cached(x_B1D, positions_B[:, None], cache)
    return self.decoder.logits(hidden_B1D)[:, 0], cache

  def prefill_visual(self, batch, lengths_B, cache):
    """As `prefill`; returns (features_BF of the next slot, cache)."""
    hidden_B1D, cache = self._read(batch, lengths_B, cache)
    return self.visual_head(hidden_B1D)[:, 0], cache

  def extend_visual(self, features_BF, positions_B, cache):
    """Reads one more entry of a picture, as it was predicted.

    Args:
      features_BF: of `prefill_visual` or of the call before.
      positions_B: as for `extend`.
      cache: likewise.

    Returns:
      (features_BF of the next slot, cache).
    """
    x_B1D = features_BF[:, None]
    if self.config.visual_head.target == 'vision':
      x_B1D, _ = self.connector(x_B1D)
    visual_B1 = jnp.ones(x_B1D.shape[:2], bool)
    hidden_B1D, cache = self._cached(x_B1D, positions_B[:, None], cache,
                                     visual_B1)
    return self.visual_head(hidden_B1D)[:, 0], cache

  def _read(self, batch, lengths_B, cache):
    x_BTD = self.embed(batch)
    B, T = x_BTD.shape[:2]
    slots_BT = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    hidden_BTD, cache = self._cached(x_BTD, slots_BT, cache, _visual(batch))
    last = (lengths_B - 1)[:, None, None]
    return jnp.take_along_axis(hidden_BTD, last, axis=1), cache

  def _cached(self, x_BTD, slots_BT, cache, visual_BT=None):
    mask = attention.Mask(causal=True, query_positions_BT=slots_BT)
    hidden_BTD, out = self.decoder(
        x_BTD, mask, slots_BT, cache=cache, adapters=self._adapters(),
        visual_BT=visual_BT)
    return hidden_BTD, out['cache']

  def _adapters(self, batch=None):
    """Adapters as the stack takes them; they drop out if there is a batch."""
    lora, keys_B = self.config.lora, None
    if batch and lora and lora.dropout:
      keys_B = jax.vmap(jax.random.fold_in, (None, 0))(
          self.make_rng('dropout'), batch['row'])
    return lora and lora_lib.adapters(lora, self.lora, keys_B)

  def _splice(self, batch):
    x_BTD = self.decoder.embed(batch['tokens'])
    if 'images' not in batch:
      return x_BTD, {}
    if self.config.vision is None:
      raise ValueError('model.vision is None, but the batch has images; choose '
                       f'a vision module ({", ".join(VISION)}) or a source '
                       'without pictures.')
    # One table for each row: `visual` counts through those of its pictures.
    by_row = lambda x: x.reshape(len(x), -1, x.shape[-1])
    seen_BIPD, seen = self.vision(batch['images'], batch['image_box'])
    table_BIPD, connected = self.connector(seen_BIPD)
    out = {f'vision/{name}': value for name, value in seen.items()}
    out |= {f'connector/{name}': value for name, value in connected.items()}
    table_BPD = by_row(table_BIPD)
    if self.config.visual_head is not None:
      target = self.config.visual_head.target
      out['features'] = jax.lax.stop_gradient(
          table_BPD if target == 'connector' else by_row(seen_BIPD))
    visual_BT1 = batch['visual'][:, :, None]
    picture_BTD = jnp.take_along_axis(
        table_BPD, jnp.maximum(visual_BT1, 0), axis=1)
    return jnp.where(visual_BT1 >= 0, picture_BTD, x_BTD), out


def _visual(batch):
  """bool [B, T], slots of pictures, their class and split slots included."""
  return batch['visual'] >= 0 if 'images' in batch else None


def init_cache(config, batch, length, dtype=None):
  """Empty cache for `batch` rows of up to `length` slots; see `transformer`."""
  return transformer.init_cache(
      config.decoder.stack, batch, length, dtype or config.decoder.dtype)


def example_batch(config, image_size):
  """The smallest batch that creates all parameters: one slot, one picture.

  Args:
    config: a `MultimodalConfig`.
    image_size: pixels (rows, columns); parameters of some vision modules
      depend on it.
  """
  slot = jnp.zeros((1, 1), jnp.int32)
  batch = dict(tokens=slot, segments=slot, positions=slot)
  if config.vision is not None:
    batch |= dict(visual=slot, images=jnp.zeros((1, 1, *image_size, 3),
                                                jnp.uint8),
                  image_box=jnp.zeros((1, 1, 4), jnp.int32))
  return batch


def flops(config, length, images, image_size):
  """Forward FLOPs of one row, 2 for each multiply-add; training takes 3x.

  Args:
    config: a `MultimodalConfig`.
    length: slots T of the row; each is counted as reading T keys.
    images: picture slots I; empty ones are computed too.
    image_size: pixels (rows, columns).
  """
  total = length * decoder_lib.flops_per_token(config.decoder, length)
  if config.lora is not None:
    total += length * lora_lib.flops_per_token(
        config.lora, config.decoder.stack)
  if config.vision is not None:
    entries = config.vision.image_layout(image_size).table_size
    total += images * (
        _part(config.vision).flops(config.vision, image_size)
        + connector_lib.flops(config.connector, config.vision.width, entries))
  if config.visual_head is not None:
    total += length * visual_head_lib.flops(
        config.visual_head, config.decoder.width, config.feature_width)
  return total


def build(config, vocab=None):
  """Makes the model of an experiment's config.

  Args:
    config: with `model.decoder`, `model.vision` (None or {} for text only),
      `model.connector`, `dtype`, and `model.visual_head` and `model.lora` if
      there are any.
      `model.decoder.size` may name a published size, whose fields the others
      override, and `model.vision.size` of the name 'vit' likewise.
    vocab: rows of the text embedding that a tokenizer needs;
      `model.decoder.vocab` may ask for more.

  Raises:
    ValueError: an unknown name or field, or widths that do not fit.
  """
  shared = dict(dtype=config.dtype)
  fields = dict(config.model.decoder.items()) | shared
  if vocab is not None:
    fields.setdefault('vocab', vocab)
  text = (decoder_lib.sized(fields.pop('size'), **fields) if 'size' in fields
          else _make(decoder_lib.DecoderConfig, fields, 'decoder'))
  if vocab is not None:
    text = dataclasses.replace(text, vocab=max(vocab, text.vocab))
  head = config.model.get('visual_head') or None
  if head is not None:
    head = _make(visual_head_lib.VisualHeadConfig,
                 dict(head.items()) | shared, 'visual_head')
  lora = config.model.get('lora') or None
  if lora is not None:
    lora = _make(lora_lib.LoraConfig, dict(lora.items()), 'lora')
  if not config.model.get('vision'):
    return MultimodalDecoder(MultimodalConfig(
        text, visual_head=head, lora=lora))
  fields = dict(config.model.vision.items()) | shared
  name = fields.pop('name', None)
  if name not in VISION:
    raise ValueError(f'model.vision.name: {name!r}; allowed: '
                     f'{", ".join(VISION)}.')
  vision = (vision_encoder.sized(fields.pop('size'), **fields)
            if name == 'vit' and 'size' in fields
            else _make(VISION[name].config, fields, 'vision'))
  fields = dict(config.model.get('connector', {}).items()) | shared
  name = fields.get('name')
  if name not in connector_lib.CONNECTORS:
    raise ValueError(f'model.connector.name: {name!r}; allowed: '
                     f'{", ".join(connector_lib.CONNECTORS)}.')
  connector = _make(connector_lib.CONNECTORS[name].config,
                    fields | dict(width=text.width), 'connector')
  return MultimodalDecoder(MultimodalConfig(
      text, vision, connector, head, lora))


def _make(kind, fields, where):
  return fields_lib.read(kind, f'model.{where}', fields, ValueError)


class Vision(NamedTuple):
  """A way of seeing: its config class, module, and FLOPs of one picture."""
  config: type
  module: type
  flops: Any


def name(config):
  """The name in `VISION` of how a `MultimodalConfig` sees."""
  return next(name for name, part in VISION.items()
              if isinstance(config.vision, part.config))


def _part(config):
  return next(v for v in VISION.values() if isinstance(config, v.config))


VISION = {
    'linear_patches': Vision(
        patch_embedding.LinearPatchesConfig, patch_embedding.LinearPatches,
        patch_embedding.linear_flops),
    'eve': Vision(patch_embedding.EveConfig, patch_embedding.Eve,
                  patch_embedding.eve_flops),
    'conv_patches': Vision(
        patch_embedding.ConvPatchesConfig, patch_embedding.ConvPatches,
        patch_embedding.conv_flops),
    'vit': Vision(
        vision_encoder.VisionEncoderConfig, vision_encoder.VisionEncoder,
        lambda config, _: vision_encoder.flops(config, pooled=False)),
}


def _emu(vocab):
  text = decoder_lib.sized('llama-13b', vocab=vocab)
  return MultimodalConfig(
      text, vision_encoder.sized('eva01-g14', tap=-1, final_norm=False,
                                 class_entry=True),
      causal_former.CausalFormerConfig(text.width, border=True),
      visual_head_lib.VisualHeadConfig('linear', 'connector'))


def _emu2(vocab, pool):
  text = decoder_lib.sized('llama-33b', vocab=vocab)
  return MultimodalConfig(
      text, vision_encoder.sized('eva02-e14-plus', image_size=(448, 448),
                                 tap=-1, final_norm=False, pool=pool),
      connector_lib.ConnectorConfig('linear', text.width, bias=False,
                                    border=True),
      visual_head_lib.VisualHeadConfig('linear', 'vision'))


def _llava(size):
  text = decoder_lib.sized(size)
  return MultimodalConfig(text, vision_encoder.sized('clip-l14-336'),
                          connector_lib.ConnectorConfig('mlp', text.width))


def _fuyu():
  text = decoder_lib.sized('persimmon-8b')
  return MultimodalConfig(
      text, patch_embedding.LinearPatchesConfig(text.width, bos='after_image'),
      connector_lib.ConnectorConfig('identity', text.width))


def _eve():
  text = decoder_lib.sized('vicuna-7b')
  return MultimodalConfig(text, patch_embedding.EveConfig(),
                          connector_lib.ConnectorConfig('mlp', text.width))


def _eve_v2():
  text = decoder_lib.sized(
      'qwen2.5-7b', modality_weights=('norms', 'attention', 'mlp'))
  return MultimodalConfig(
      text, patch_embedding.ConvPatchesConfig(text.width),
      connector_lib.ConnectorConfig('identity', text.width))


# LLaVA-1.5: arXiv 2310.03744. EVE: arXiv 2406.11832; 7B and HD are one model,
# at 24 and 48 cells on the longer side. EVEv2: arXiv 2502.06788. Released
# configs, as that of Fuyu-8B.
#
# Emu: arXiv 2307.05222; Emu2: arXiv 2312.13286; released code. Emu-I and
# Emu2-Chat have two words more, [USER] and [ASSISTANT]; Emu-I is adapters on
# top of Emu. Emu2-Chat makes cells of 2 x 2 patches of a picture, but of 4 x 4
# of a video's, which is not here.
SIZES = {
    'llava-1.5-7b': _llava('vicuna-7b'),
    'llava-1.5-13b': _llava('vicuna-13b'),
    'fuyu-8b': _fuyu(),
    'eve-7b': _eve(),
    'eve-7b-hd': _eve(),
    'eve-7b-hd-v2.0': _eve_v2(),
    'emu': _emu(32004),
    'emu-i': dataclasses.replace(_emu(32006), lora=lora_lib.LoraConfig(
        rank=16, alpha=16, dropout=0.05, pattern='^attention/')),
    'emu2': _emu2(32272, pool=4),
    'emu2-chat': _emu2(32274, pool=2),
    'emu2-gen': _emu2(32272, pool=4),
}
