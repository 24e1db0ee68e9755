"""EVE and EVEv2 as their authors write them (arXiv 2406.11832, 2502.06788).

  eve           EVE-7B, EVE-7B-HD: patch embedding layer, connector, Vicuna
  eve_aligned   the same, and the patch aligning layer of training, which
                becomes the part 'aligner' of `objectives/alignment.py`
  eve_v2        EVE-7B-HD-v2.0: Qwen2 with a second set of weights in each block

EVE-7B and HD have the same tensors. Files of training hold the frozen CLIP as
well, twice; it is the published one and is not read: take a teacher from its
own file. Pictures are as a preprocessor_config.json beside the tensors says.
Without one they are as the name of it in config.json ends ('...-1344'), else
those of EVE-7B, 24 cells on each side; EVEv2's then have the area of 50 x 50.
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
from mmgen.models import modality
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
# EVEv2: names that a mark begins, and one of each part that may be doubled.
_MARKED = (r'(\.)((?:[qkvo]_proj|mlp|input_layernorm|post_attention_layernorm)'
           r'\.)')
_PARTS = {'norms': 'moe_input_layernorm', 'attention': 'self_attn.moe_q_proj',
          'mlp': 'moe_mlp.up_proj'}
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
        *layout.linear(f'{ours}query', f'{theirs}q.1', bias=False),
        *layout.fused([f'{ours}key', f'{ours}value'], f'{theirs}kv.1.weight'),
        *layout.linear(f'{ours}out', f'{theirs}proj')]
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


def _v2_rules(config):
  ours, c = 'decoder/stack/blocks/', config.vision
  made = [
      *layout.patches('vision/patch_embedding', f'{_TOWER}patch_embedding.0',
                      c.patch),
      *layout.patches('vision/cell_embedding', f'{_TOWER}patch_embedding.2',
                      c.pool),
      layout.same('vision/class_embedding', f'{_TOWER}class_embedding'),
      layout.same('vision/split_embedding', f'{_TOWER}split_embedding')]
  first = decoders.rules(config.decoder, decoders.PLAIN)
  # The second set has the names of the first, each with a mark.
  second = [dataclasses.replace(
      rule, ours=tuple(name.replace(ours, f'{ours}visual/') for name in
                       rule.ours),
      theirs=tuple(re.sub(_MARKED, r'\1moe_\2', name) for name in rule.theirs))
            for rule in first if rule.ours[0].startswith(_doubled(config))]
  return made + first + second


def _doubled(config):
  """Beginnings of our names that have a second set."""
  return tuple(
      f'decoder/stack/blocks/{name}/' for part in
      config.decoder.modality_weights for name in modality.PARTS[part])


# ---------------------------------------------------------------------------
# Which model it is


def _decoder(tensors, beside, said, kind, published, **usual):
  """The `DecoderConfig`, or None.

  Args:
    tensors, beside, said: as for `Layout.recognise`.
    kind: the model_type of config.json.
    published: of `decoder.SIZES`, that it is made of.
    **usual: as for `decoders.refuse`.
  """
  own = beside.get('config.json', {})
  own = own if own.get('model_type') else {}
  sizes = decoders.sizes(tensors, decoders.PLAIN, own)
  if sizes is None:
    return None
  if own.get('model_type') not in (None, kind):
    raise errors.UserError(f'config.json has model_type {own["model_type"]!r}, '
                           f'and the tensors have the names of an {kind!r}.')
  decoders.refuse(own, **usual)
  return decoders.config(sizes, decoders.settle(
      decoders.known(sizes, own, (published,)), said, decoders.SAYABLE))


def _recognise(tensors, beside, said, aligned):
  """The `MultimodalConfig` or `AlignedConfig`, or None."""
  if f'{_TOWER}local_attention.q.1.weight' not in tensors or aligned != any(
      name.startswith(f'{_ALIGNER}norm_layer.') for name in tensors):
    return None
  text = _decoder(tensors, beside, said, 'eve', 'vicuna-7b',
                  mm_projector_type=('mlp2x_gelu',))
  if text is None:
    return None
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


def _recognise_v2(tensors, beside, said):
  """The `MultimodalConfig`, or None."""
  if f'{_TOWER}patch_embedding.2.weight' not in tensors:
    return None
  text = _decoder(tensors, beside, said, 'eve-qwen2', 'qwen2.5-7b')
  if text is None:
    return None
  block = decoders.PLAIN.block
  parts = tuple(part for part, name in _PARTS.items() if decoders.any_of(
      tensors, f'{block}{name}.weight'))
  text = dataclasses.replace(text, modality_weights=parts)
  shape = functools.partial(decoders.shape, tensors, axes=4)
  hidden, _, patch, _ = shape(f'{_TOWER}patch_embedding.0.weight')
  return decoders.make(multimodal.MultimodalConfig, dict(
      decoder=text, connector=connector.ConnectorConfig('identity', text.width),
      vision=decoders.make(patch_embedding.ConvPatchesConfig, dict(
          width=text.width, hidden=hidden, patch=patch,
          pool=shape(f'{_TOWER}patch_embedding.2.weight')[-1])
                           | llava.pixels(beside))))


def _image_v2(config, beside):
  """As in evaluation; the canvas holds shapes of up to 4 to 1."""
  own = beside.get('preprocessor_config.json', {})
  cell = config.vision.patch * config.vision.pool
  side = 2 * own.get('max_size', 50 * cell)
  if side % cell:
    raise errors.UserError(f'preprocessor_config.json has max_size {side // 2};'
                           f' twice of it must be a multiple of {cell}.')
  return dict(size=(side, side), fit='area_up', kernel='bicubic',
              mean=config.vision.mean, std=config.vision.std)


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
        ignored=(*decoders.BUFFERS, *_CLIP), style='vicuna_v1', family='llama'),
    'eve_aligned': layout.Layout(
        recognise=functools.partial(_recognise, aligned=True),
        build=_build, rules=_aligned_rules, image=_image,
        ignored=(*decoders.BUFFERS, *_CLIP), style='vicuna_v1', family='llama'),
    'eve_v2': layout.Layout(
        recognise=_recognise_v2, build=decoders.build, rules=_v2_rules,
        image=_image_v2, ignored=decoders.BUFFERS, style='eve2',
        family='qwen2'),
}
