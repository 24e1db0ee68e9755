"""EVE-7B and EVE-7B-HD as their authors write them (arXiv 2406.11832).

  eve           patch embedding layer, connector, Vicuna
  eve_aligned   the same, and the patch aligning layer of training, which
                becomes the part 'aligner' of `objectives/alignment.py`

Both models have the same tensors. Files of training hold the frozen CLIP as
well, twice; it is the published one and is not read: take a teacher from its
own file. Pictures are as a preprocessor_config.json beside the tensors says, or
as the name of one in config.json ends ('...-1344'), else those of EVE-7B, 24
cells on each side.
"""

import dataclasses
import functools
import re

import flax.traverse_util
import jax
import jax.numpy as jnp

from mmgen import errors
from mmgen.models import alignment
from mmgen.models import connector
from mmgen.models import multimodal
from mmgen.models import patch_embedding
from mmgen.weights import decoders
from mmgen.weights import layout
from mmgen.weights import llava

_TOWER = 'model.vision_tower.'
_PROJECTOR = ('model.mm_projector.0', 'model.mm_projector.2')
_ALIGNER = 'model.vision_tower_compressor.'
_CLIP = (r'model\.vision_clip\..*',
         r'model\.vision_tower_compressor\.clip_layer\..*')
# The reference has one number of heads and of layers between taps.
_HEADS, _INTERVAL = 8, 4


@dataclasses.dataclass(frozen=True)
class AlignedConfig(multimodal.MultimodalConfig):
  """Attributes:
    aligner: of the patch aligning layer.
  """
  aligner: alignment.PatchAlignerConfig | None = None


# ---------------------------------------------------------------------------
# Rules


def _rules(config):
  return [*_vision_rules(config.vision),
          *layout.linear('connector/up', _PROJECTOR[0]),
          *layout.linear('connector/down', _PROJECTOR[1]),
          *decoders.rules(config.decoder, decoders.PLAIN)]


def _vision_rules(config):
  N, H = config.heads, config.width // config.heads
  made = [
      *layout.patches('vision/patch_embedding', f'{_TOWER}patch_embedding',
                      config.patch, bias=False),
      layout.same('vision/class_embedding', f'{_TOWER}class_embedding'),
      layout.same('vision/split_embedding', f'{_TOWER}split_embedding')]
  for name in ('local_attention', 'global_attention'):
    ours, theirs = f'vision/{name}/', f'{_TOWER}{name}.'
    made += [
        *layout.norm(f'{ours}query_norm', f'{theirs}q.0'),
        *layout.norm(f'{ours}key_value_norm', f'{theirs}kv.0'),
        *layout.heads_in(f'{ours}query', f'{theirs}q.1', N, H, bias=False),
        *layout.fused([f'{ours}key', f'{ours}value'], f'{theirs}kv.1.weight',
                      None, N, H),
        *layout.heads_out(f'{ours}out', f'{theirs}proj', N, H)]
  return made


def _aligned_rules(config):
  made = _rules(config)
  for j in range(config.decoder.layers // _INTERVAL + 1):
    made += layout.norm(f'aligner/norm_{j}', f'{_ALIGNER}norm_layer.{j}.0')
    made += layout.linear(f'aligner/project_{j}',
                          f'{_ALIGNER}norm_layer.{j}.1', bias=False)
  for part in ('input', 'output'):
    made += layout.linear(f'aligner/{part}', f'{_ALIGNER}{part}_layer')
  return made


# ---------------------------------------------------------------------------
# Which model it is


def _recognise(tensors, beside, said, aligned):
  """The `MultimodalConfig` or `AlignedConfig`, or None."""
  if f'{_TOWER}local_attention.q.1.weight' not in tensors or aligned != any(
      name.startswith(f'{_ALIGNER}norm_layer.') for name in tensors):
    return None
  own = beside.get('config.json', {})
  own = own if own.get('model_type') else {}
  sizes = decoders.sizes(tensors, decoders.PLAIN, own)
  if sizes is None:
    return None
  if own.get('model_type') not in (None, 'eve'):
    raise errors.UserError(f'config.json has model_type {own["model_type"]!r}, '
                           "and the tensors have the names of an 'eve'.")
  decoders.refuse(own, mm_projector_type=('mlp2x_gelu',))
  known = decoders.settle(
      decoders.known(sizes, own, ('vicuna-7b',)), said, decoders.SAYABLE)
  text = decoders.config(sizes, known)
  width, _, patch, _ = decoders.shape(
      tensors, f'{_TOWER}patch_embedding.weight', 4)
  pictures = beside.get('preprocessor_config.json', {})
  vision = decoders.make(patch_embedding.EveConfig, dict(
      width=width, heads=_HEADS, patch=patch,
      pool=pictures.get('conv_stride', 2)) | llava.pixels(beside))
  parts = dict(decoder=text, vision=vision, connector=decoders.make(
      connector.ConnectorConfig, dict(name='mlp', width=text.width)))
  if not aligned:
    return decoders.make(multimodal.MultimodalConfig, parts)
  return decoders.make(AlignedConfig, parts | dict(aligner=decoders.make(
      alignment.PatchAlignerConfig, dict(
          layers=text.layers, decoder_width=text.width, heads=_HEADS,
          width=decoders.shape(tensors, f'{_ALIGNER}input_layer.weight')[0],
          interval=_INTERVAL))))


def _build(config, dtype):
  """As `Layout.build`, with the leaves of the aligning layer."""
  model, ours = decoders.build(config, dtype)
  c = config.aligner
  tree = jax.eval_shape(
      alignment.PatchAligner(c).init, jax.random.key(0),
      {l: jnp.zeros((1, c.decoder_width)) for l in c.taps})['params']
  flat = flax.traverse_util.flatten_dict({'aligner': tree}, sep='/')
  return model, ours | {name: jax.ShapeDtypeStruct(leaf.shape, dtype)
                        for name, leaf in flat.items()}


def _image(config, beside):
  """Padding is in whole cells of the teacher, which has 24 on each side."""
  own = beside.get('preprocessor_config.json', {})
  name = beside.get('config.json', {}).get('mm_vision_tower', '')
  number = re.search(r'-(672|1344)/*$', name)
  teacher = own.get('image_size_clip', 336) // own.get('patch_stride_clip', 14)
  cell = config.vision.patch * config.vision.pool
  size = own.get('image_size', int(number[1]) if number else teacher * cell)
  cells = size // cell
  if cells not in (teacher, 2 * teacher):
    raise errors.UserError(
        f'{cells} x {cells} cells of pictures of {size} pixels stand beside '
        f'{teacher} x {teacher} of the teacher; allowed: as many, or twice as '
        'many on each side.')
  return dict(size=(size, size), fit='pad' if cells == teacher else 'pad_pairs',
              kernel='bicubic', mean=config.vision.mean, std=config.vision.std)


LAYOUTS = {
    'eve': layout.Layout(
        recognise=functools.partial(_recognise, aligned=False),
        build=decoders.build, rules=_rules, image=_image,
        ignored=(*decoders.BUFFERS, *_CLIP)),
    'eve_aligned': layout.Layout(
        recognise=functools.partial(_recognise, aligned=True),
        build=_build, rules=_aligned_rules, image=_image,
        ignored=(*decoders.BUFFERS, *_CLIP)),
}
