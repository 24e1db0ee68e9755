"""LLaVA-1.5 as it is published (arXiv 2310.03744).

  llava            the authors' own, without the image tower: a CLIP as it was
  llava_tower      the same, with it
  llava_projector  the authors' mm_projector.bin of stage 1: the connector alone
  llava_trainables  their non_lora_trainables.bin: the same, trained beside
                    low-rank adapters (see `lora`)
  hf_llava         transformers' files
  hf_llava_new     the same, as transformers has them in memory since 4.52
  hf_llava_flat    transformers' files since version 5

The authors' config names the CLIP and does not describe it; of the tower inside
it are the shapes that tell which published one it is.
"""

import dataclasses
import functools
import math

import flax.traverse_util
import jax
import jax.numpy as jnp

from mmgen import errors
from mmgen.models import clip
from mmgen.models import connector
from mmgen.models import multimodal
from mmgen.models import vision_encoder
from mmgen.weights import clip as clip_layouts
from mmgen.weights import decoders
from mmgen.weights import layout
from mmgen.weights import two_towers


@dataclasses.dataclass(frozen=True)
class _Names:
  """Of the parts of a layout.

  Attributes:
    decoder: a `decoders.Names`.
    up, down: of the connector.
    tower: before the names of its parts; None where the file has no tower.
    own: whether config.json is as the authors write it.
  """
  decoder: decoders.Names
  up: str
  down: str
  tower: str | None
  own: bool = False


# ---------------------------------------------------------------------------
# Rules


def _rules(config, names):
  tower = [] if names.tower is None else _tower_rules(config.vision,
                                                      names.tower)
  return [*tower, *_connector_rules(names),
          *decoders.rules(config.decoder, names.decoder)]


def _connector_rules(names):
  return [*layout.linear('connector/up', names.up),
          *layout.linear('connector/down', names.down)]


def _tower_rules(config, prefix):
  """Those of CLIP's image tower, within another model."""
  whole = dataclasses.replace(clip.SIZES['clip-b32'], vision=config)
  return [
      dataclasses.replace(rule, theirs=tuple(
          name.replace('vision_model.', prefix, 1) for name in rule.theirs))
      for rule in clip_layouts.LAYOUTS['hf_clip'].rules(whole)
      if rule.ours[0].startswith('vision/')]


# ---------------------------------------------------------------------------
# Which model it is


def _recognise(tensors, beside, said, names):
  """The `MultimodalConfig`, or None."""
  has_tower = any('vision_tower.' in name for name in tensors)
  if (f'{names.up}.weight' not in tensors
      or has_tower != (names.tower is not None)):
    return None
  own = beside.get('config.json', {})
  kind = own.get('model_type')
  own = own if kind else {}
  text = own if names.own else own.get('text_config') or {}
  sizes = decoders.sizes(tensors, names.decoder, text)
  shapes = _tower_sizes(tensors, names.tower, own) if has_tower else {}
  if sizes is None or shapes is None:
    return None
  if kind not in (None, 'llava', 'llava_llama'):
    raise errors.UserError(f'config.json has model_type {kind!r}, and the '
                           "tensors have the names of a 'llava'.")
  inputs = decoders.shape(tensors, f'{names.up}.weight')[1]
  tower = (_known_tower(shapes, own) if has_tower
           else {'vision.size': _tower_name(own, inputs, sizes['width'])})
  tower['vision.tap'] = _tap(own)
  if has_tower and two_towers.asks_to_resize(
      tower | {'vision.patch': shapes['patch']}, tower,
      said.get('vision.image_size')):
    said = {name: x for name, x in said.items() if name != 'vision.image_size'}
  known = decoders.settle(
      _known_decoder(sizes, text, own, names) | tower, said,
      decoders.SAYABLE | {name: _SAYABLE[name] for name in tower})
  vision = decoders.make(
      vision_encoder.VisionEncoderConfig if has_tower else vision_encoder.sized,
      shapes | pixels(beside) | decoders.within(known, 'vision'))
  return decoders.make(multimodal.MultimodalConfig, dict(
      decoder=decoders.config(sizes, known), vision=vision,
      connector=_connector(tensors, names)))


def _known_decoder(sizes, text, own, names):
  """As `decoders.known`; LLaVA-1.5 is made of Vicuna."""
  if not own:
    sizes = {field: size for field, size in sizes.items() if field != 'vocab'}
    return decoders.known(sizes, {}, ('vicuna-7b', 'vicuna-13b'))
  if not names.own:
    decoders.refuse(text, model_type=('llama', 'qwen2'))
  # Without a text_config it is what LlamaConfig is by default.
  return decoders.known(sizes, text or {'model_type': 'llama'})


def _tower_sizes(tensors, prefix, own):
  """Fields of the tower by shapes and, before them, a config; or None."""
  block = f'{prefix}encoder.layers.{{layer}}.'
  if not decoders.any_of(tensors, f'{block}mlp.fc1.weight'):
    return None
  shape = functools.partial(decoders.shape, tensors)
  sizes = dict(
      layers=decoders.layers(tensors, block),
      width=shape(f'{block}layer_norm1.weight', 1)[0],
      hidden=shape(f'{block}mlp.fc1.weight')[0],
      patch=shape(f'{prefix}embeddings.patch_embedding.weight', 4)[-1])
  cells = shape(f'{prefix}embeddings.position_embedding.weight')[0] - 1
  side = max(math.isqrt(cells), 1) * sizes['patch']
  vision = own.get('vision_config') or {}
  return decoders.stated(sizes, vision, decoders.SIZES | {
      'patch_size': 'patch'}) | dict(image_size=(side, side))


def _known_tower(shapes, own):
  """What shapes do not tell of the tower; None for what has to be said."""
  vision = own.get('vision_config')
  if vision is not None:
    decoders.refuse(vision, model_type=('clip_vision_model',),
                    hidden_act=('quick_gelu', 'gelu'))
    return {'vision.heads': vision.get('num_attention_heads', 12),
            'vision.mlp': vision.get('hidden_act', 'quick_gelu'),
            'vision.norm_eps': vision.get('layer_norm_eps', 1e-5),
            'vision.image_size': two_towers.pair(
                vision.get('image_size', 224))}
  c = next((c for c in map(vision_encoder.sized, _TOWERS.values()) if all(
      getattr(c, field) == size for field, size in shapes.items())), None)
  return {'vision.heads': c and c.heads, 'vision.mlp': c and c.mlp,
          'vision.norm_eps': 1e-5, 'vision.image_size': shapes['image_size']}


def _tower_name(own, inputs, width):
  """The published tower that a config names, or that LLaVA-1.5 has.

  Args:
    own: config.json, {} for none.
    inputs: width of what the connector reads.
    width: of the decoder.
  """
  if own:
    return _TOWERS.get(str(own.get('mm_vision_tower')).rpartition('/')[2])
  return 'clip-l14-336' if (inputs, width) in (
      (1024, 4096), (1024, 5120)) else None


def _tap(own):
  """Which hidden state is read; UserError for what the module cannot do."""
  decoders.refuse(
      own, mm_projector_type=('mlp2x_gelu',), projector_hidden_act=('gelu',),
      mm_vision_select_feature=('patch',), mm_use_im_start_end=(False,),
      vision_feature_select_strategy=('default',))
  tap = own.get('vision_feature_layer', own.get('mm_vision_select_layer', -2))
  if not isinstance(tap, int):
    raise errors.UserError(f'config.json takes the layers {tap} of the image '
                           'tower; only one can be taken.')
  return tap


def pixels(beside):
  """Mean and std, as far as a JSON file says them."""
  own = beside.get('preprocessor_config.json', {})
  return {field: tuple(own[f'image_{field}']) for field in ('mean', 'std')
          if own.get(f'image_{field}')}


def _connector(tensors, names):
  hidden = decoders.shape(tensors, f'{names.up}.weight')[0]
  width = decoders.shape(tensors, f'{names.down}.weight')[0]
  return connector.ConnectorConfig(
      'mlp', width, hidden=None if hidden == width else hidden)


def _image(config, beside):
  """Pads to a square, as in stage 2 and evaluation, unless a config does not.

  Transformers' own processor crops; the model was not trained on that.
  """
  aspect = beside.get('config.json', {}).get('image_aspect_ratio', 'pad')
  said = clip_layouts.pixels_beside(beside)
  return dict(size=config.vision.image_size,
              fit='expand' if aspect == 'pad' else said.get('fit', 'clip'),
              kernel=said.get('kernel', 'bicubic'), mean=config.vision.mean,
              std=config.vision.std)


def seeing(decoder, link, inputs, beside):
  """The model of a decoder and a connector that come in files of their own.

  Args:
    decoder: its config.
    link: config of the connector.
    inputs: width of what it reads.
    beside: {name: content} of the JSON files beside it; the authors'
      config.json names the image tower.

  Returns:
    A `MultimodalConfig`.

  Raises:
    UserError: nothing tells the tower, or it is not known here.
  """
  own = beside.get('config.json', {})
  own = own if own.get('model_type') else {}
  name = _tower_name(own, inputs, decoder.width)
  if name is None:
    raise errors.UserError(
        f'the connector reads {inputs} numbers of an image tower that the '
        f"authors' config.json beside it calls {own.get('mm_vision_tower')!r}; "
        f'known: {", ".join(_TOWERS)}.')
  return decoders.make(multimodal.MultimodalConfig, dict(
      decoder=decoder,
      connector=dataclasses.replace(link, width=decoder.width),
      vision=decoders.make(
          vision_encoder.sized, dict(size=name, tap=_tap(own)))))


# ---------------------------------------------------------------------------
# The connector alone


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
  """Attributes:
    connector: its config.
    inputs: width of the features that it reads.
  """
  connector: connector.ConnectorConfig
  inputs: int


def _recognise_projector(tensors, beside, said, names):
  """The `ProjectorConfig`, or None; shapes tell all of it."""
  del beside
  if f'{names.up}.weight' not in tensors or any(
      not name.startswith(names.up.removesuffix('0')) for name in tensors):
    return None
  decoders.settle({}, said, {})
  return ProjectorConfig(_connector(tensors, names), decoders.shape(
      tensors, f'{names.up}.weight')[1])


def _build_projector(config, dtype):
  """As `Layout.build`: the module alone, its leaves below 'connector/'."""
  model = connector.Mlp(dataclasses.replace(config.connector, dtype=dtype))
  tree = jax.eval_shape(model.init, jax.random.key(0),
                        jnp.zeros((1, config.inputs)))['params']
  flat = flax.traverse_util.flatten_dict({'connector': tree}, sep='/')
  return model, {name: jax.ShapeDtypeStruct(leaf.shape, dtype)
                 for name, leaf in flat.items()}


# ---------------------------------------------------------------------------
# Names


_TOWERS = {'clip-vit-large-patch14-336': 'clip-l14-336',
           'clip-vit-large-patch14': 'clip-l14',
           'clip-vit-base-patch32': 'clip-b32',
           'clip-vit-base-patch16': 'clip-b16'}
_SAYABLE = {
    'vision.size': 'published image tower that the connector was trained on: '
                   + ', '.join(_TOWERS.values()),
    'vision.heads': 'of the image tower',
    'vision.mlp': "'quick_gelu' for OpenAI's CLIP, 'gelu' for most others",
    'vision.norm_eps': 'of the norms of the image tower',
    'vision.image_size': '[rows, columns] of pixels',
    'vision.tap': 'which hidden state of the tower the connector reads',
}
_OWN = _Names(decoders.PLAIN, 'model.mm_projector.0', 'model.mm_projector.2',
              None, own=True)
_TRAINABLES = dataclasses.replace(
    _OWN, up=f'base_model.model.{_OWN.up}',
    down=f'base_model.model.{_OWN.down}')
_PROJECTOR = 'multi_modal_projector.linear_'


def _layout(names):
  parts = ('vision',) * (names.tower is not None) + ('connector', 'decoder')
  return layout.Layout(
      recognise=functools.partial(_recognise, names=names),
      build=functools.partial(decoders.build, parts=parts),
      rules=functools.partial(_rules, names=names), image=_image,
      ignored=(*decoders.BUFFERS, r'.*\.position_ids'), style='vicuna_v1',
      resize='plain')


def _projector_layout(names):
  return layout.Layout(
      recognise=functools.partial(_recognise_projector, names=names),
      build=_build_projector, rules=lambda config: _connector_rules(names),
      image=lambda config, beside: {})


LAYOUTS = {
    'llava': _layout(_OWN),
    'llava_tower': _layout(dataclasses.replace(
        _OWN, tower='model.vision_tower.vision_tower.vision_model.')),
    'llava_projector': _projector_layout(_OWN),
    'llava_trainables': _projector_layout(_TRAINABLES),
    'hf_llava': _layout(_Names(
        decoders.WITHIN, f'{_PROJECTOR}1', f'{_PROJECTOR}2',
        'vision_tower.vision_model.')),
    'hf_llava_new': _layout(_Names(
        decoders.WITHIN_NEW, f'model.{_PROJECTOR}1', f'model.{_PROJECTOR}2',
        'model.vision_tower.vision_model.')),
    'hf_llava_flat': _layout(_Names(
        decoders.WITHIN, f'{_PROJECTOR}1', f'{_PROJECTOR}2', 'vision_tower.')),
}
