"""Fuyu-8B as transformers writes it; its decoder is Persimmon-8B.

  hf_fuyu       the published files, and transformers up to 4.51
  hf_fuyu_new   as transformers has it in memory since
"""

import dataclasses
import functools
import math

import numpy as np

from mmgen import errors
from mmgen.models import connector
from mmgen.models import decoder
from mmgen.models import multimodal
from mmgen.models import patch_embedding
from mmgen.weights import decoders
from mmgen.weights import layout

_QKV = ('query', 'key', 'value')
_SAYABLE = {
    'decoder.norm_eps': 'of all norms, 1e-5 in Fuyu-8B',
    'decoder.rope_theta': 'base of rotary positions, 25000 in Fuyu-8B',
    'decoder.rope_share': 'of the channels of a head, the part that turns, 0.5 '
                          'in Fuyu-8B',
}


@dataclasses.dataclass(frozen=True)
class _Names:
  """A `decoders.Names`, and the name of the map of patches."""
  decoder: decoders.Names
  patches: str


# ---------------------------------------------------------------------------
# Rules


def _rules(config, names):
  stack = config.decoder.stack
  ours, theirs = 'decoder/stack/blocks/', names.decoder.block
  N, H = stack.heads, stack.H
  return [
      # Pixels of a patch stand in the same order: row, column, channel.
      *layout.linear('vision/projection', names.patches),
      *decoders.ends(names.decoder, f'{names.decoder.model}final_layernorm',
                     bias=True),
      *_by_head(f'{ours}attention/', f'{theirs}self_attn.query_key_value', N,
                H),
      *layout.linear(f'{ours}attention/out', f'{theirs}self_attn.dense'),
      *layout.modules(_BLOCK, ours, theirs)]


def _by_head(ours, theirs, N, H):
  """Queries, keys and values in one tensor: head by head, its three parts."""
  return [
      layout.Rule(
          tuple(f'{ours}{part}/kernel' for part in _QKV), (f'{theirs}.weight',),
          lambda x: tuple(x.reshape(N, 3, H, -1).transpose(1, 3, 0, 2).reshape(
              3, -1, N * H)),
          lambda *xs: (np.stack([x.reshape(-1, N, H) for x in xs]).transpose(
              2, 0, 3, 1).reshape(N * 3 * H, -1),)),
      layout.Rule(
          tuple(f'{ours}{part}/bias' for part in _QKV), (f'{theirs}.bias',),
          lambda x: tuple(x.reshape(N, 3, H).swapaxes(0, 1).reshape(3, -1)),
          lambda *xs: (np.stack([x.reshape(N, H) for x in xs],
                                axis=1).reshape(-1),))]


# ---------------------------------------------------------------------------
# Which model it is


def _recognise(tensors, beside, said, names):
  """The `MultimodalConfig`, or None."""
  block = names.decoder.block
  if f'{names.patches}.weight' not in tensors or not decoders.any_of(
      tensors, f'{block}self_attn.query_key_value.weight'):
    return None
  own = beside.get('config.json', {})
  if own.get('model_type') not in (None, 'fuyu'):
    raise errors.UserError(f'config.json has model_type {own["model_type"]!r}, '
                           "and the tensors have the names of a 'fuyu'.")
  # Of old, all of the decoder's fields stood at the top.
  own = (own.get('text_config') or own) if 'model_type' in own else {}
  sizes = _sizes(tensors, names.decoder, own)
  known = decoders.settle(_known(sizes, own), said, _SAYABLE)
  text = decoders.make(decoder.DecoderConfig,
                       sizes | decoders.within(known, 'decoder'))
  inputs = decoders.shape(tensors, f'{names.patches}.weight')[1]
  return decoders.make(multimodal.MultimodalConfig, dict(
      decoder=text, connector=connector.ConnectorConfig('identity', text.width),
      vision=decoders.make(patch_embedding.LinearPatchesConfig, dict(
          width=text.width, patch=max(math.isqrt(inputs // 3), 1),
          bos='after_image'))))


def _sizes(tensors, names, own):
  """Fields of a `DecoderConfig`: heads are told by the norms of queries."""
  shape, block = functools.partial(decoders.shape, tensors), names.block
  fused = shape(f'{block}self_attn.query_key_value.weight')
  H = shape(f'{block}self_attn.q_layernorm.weight', 1)[0]
  sizes = dict(
      vocab=shape(f'{names.model}embed_tokens.weight')[0],
      layers=decoders.layers(tensors, block), width=fused[1],
      hidden=shape(f'{block}mlp.dense_h_to_4h.weight')[0],
      heads=max(fused[0] // (3 * H), 1))
  return _PERSIMMON | decoders.stated(
      sizes, own, decoders.SIZES | {'num_attention_heads': 'heads'})


def _known(sizes, own):
  """What shapes do not tell; None for what has to be said."""
  if not own:
    return decoders.published(sizes, ('persimmon-8b',), _SAYABLE)
  decoders.refuse(own, hidden_act=('relu2',), qk_layernorm=(True,))
  rope = own.get('rope_parameters') or {}
  share = own.get('partial_rotary_factor', 0.5)
  return {'decoder.norm_eps': own.get('layer_norm_eps', 1e-5),
          'decoder.rope_theta': decoders.rope_theta(own, 25e3),
          'decoder.rope_share': rope.get('partial_rotary_factor', share)}


def _image(config, beside):
  """How a picture becomes pixels: on a canvas, shrunk only if it must be."""
  size = beside.get('preprocessor_config.json', {}).get('size') or {}
  return dict(size=(size.get('height', 1080), size.get('width', 1920)),
              fit='fuyu', kernel='bilinear', mean=config.vision.mean,
              std=config.vision.std)


_PERSIMMON = dict(norm='layer', mlp='relu2', qkv_bias=True, out_bias=True,
                  mlp_bias=True, query_key_norm=True)
_BLOCK = decoders.NORMS | {
    'attention/query_norm': 'self_attn.q_layernorm',
    'attention/key_norm': 'self_attn.k_layernorm',
    'mlp/up': 'mlp.dense_h_to_4h', 'mlp/down': 'mlp.dense_4h_to_h'}


def _layout(names):
  return layout.Layout(
      recognise=functools.partial(_recognise, names=names),
      build=decoders.build, rules=functools.partial(_rules, names=names),
      image=_image, ignored=decoders.BUFFERS, style='fuyu',
      family='fuyu')


LAYOUTS = {
    'hf_fuyu': _layout(_Names(decoders.WITHIN, 'vision_embed_tokens')),
    'hf_fuyu_new': _layout(_Names(decoders.WITHIN_NEW,
                                  'model.vision_embed_tokens')),
}
