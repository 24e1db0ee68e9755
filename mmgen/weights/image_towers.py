"""Image towers by themselves, as they are published.

  eva_tower     EVA's own, before it became an EVA-CLIP: pretrained to predict a
                teacher's features of hidden patches (arXiv 2211.07636,
                2303.11331, 2402.04252)
  timm_eva      timm's: the image tower of an EVA-CLIP
  timm_eva_avg  timm's of the former; there the norm follows an average of
                patches, which is not computed here: take hidden states
  timm_siglip   timm's SigLIP

The part 'vision' of such a file can start that of another model. One
of EVA's lacks the norm within the attention that EVA-CLIP has from B to L: that
starts afresh, as in the authors' code.
"""

import dataclasses
import functools
import re

import flax.traverse_util
import jax

from mmgen import errors
from mmgen.models import image_tower
from mmgen.models import vision_encoder
from mmgen.weights import clip as clip_layouts
from mmgen.weights import eva_clip
from mmgen.weights import layout
from mmgen.weights import two_towers

_SIGLIP = image_tower.ImageTowerConfig(vision_encoder.SIZES['siglip-b16'])
_PUBLISHED = [image_tower.ImageTowerConfig(size) for size in
              vision_encoder.SIZES.values()]


# ---------------------------------------------------------------------------
# Rules


def _eva_rules(config, names):
  rules = eva_clip.vision_rules(config.vision, names)
  if config.embed is not None:
    rules += layout.linear('vision_projection', names.projection,
                           config.embed_bias)
  if config.predicted is not None:
    rules += layout.linear('prediction', 'lm_head')
  if config.mask:
    rules.append(layout.same('mask_token', 'mask_token', lead=2))
  return rules


def _siglip_rules(config):
  return clip_layouts.timm_siglip_rules(config.vision)


# ---------------------------------------------------------------------------
# Which tower it is


def _recognise_eva(tensors, beside, said, *, names, belongs):
  """The `ImageTowerConfig`, or None.

  Raises:
    UserError: something has to be said, or cannot be as it is said.
  """
  blocks = [name for name in tensors if re.match(r'blocks\.\d+\.attn\.', name)]
  if (not blocks or 'blocks.0.attn.qkv.bias' in tensors  # of other families
      or not belongs(tensors, beside)):
    return None
  if {'fc_norm.weight', 'head.weight'} <= tensors.keys():
    raise errors.UserError(
        'these are the weights of a classifier, which averages patches; only '
        'those without a classifying head can be loaded.')
  eva_clip.check_said(said)
  base = image_tower.ImageTowerConfig(eva_clip.style(tensors, names))
  config = two_towers.recognise(
      tensors, beside, said, rules=functools.partial(_eva_rules, names=names),
      base=base, stated=lambda *_: _timm_stated(beside), sayable={
          field: how for field, how in eva_clip.SAYABLE.items()
          if field.startswith('vision.')},
      told=functools.partial(_told, tensors, base, names))
  if config is None:
    return None
  width = lambda name: (tensors[name].shape[0] if name in tensors else None)
  return dataclasses.replace(
      config, embed=width(f'{names.projection}.weight'),
      embed_bias=(f'{names.projection}.bias' in tensors
                  or f'{names.projection}.weight' not in tensors),
      predicted=width('lm_head.weight'), mask='mask_token' in tensors,
      vision=dataclasses.replace(config.vision, **_pixels(beside)))


def _told(tensors, base, names, sizes):
  """As `eva_clip.told`, of a tower at any patch size.

  One that has not become an EVA-CLIP has no norm within its attention yet.
  """
  packed = names.swiglu_is_packed(base.vision)
  sizes = sizes | {'vision.hidden': sizes['vision.hidden'] // (1 + packed)}
  alike = [field for field in eva_clip.STYLE
           if field != 'vision.inner_attention_norm'
           or base.vision.inner_attention_norm]
  shape = {field: size for field, size in sizes.items()
           if field != 'vision.patch'}
  found = eva_clip.told(tensors, base, shape, alike, _PUBLISHED)
  published = two_towers.published_heads(sizes, 'vision')
  return {'vision.hidden': sizes['vision.hidden'],
          'vision.heads': published} | found


def _recognise_siglip(tensors, beside, said):
  """The `ImageTowerConfig`, or None."""
  if 'attn_pool.latent' not in tensors:
    return None
  own = beside.get('config.json', {})
  name = own.get('architecture')
  mlp = clip_layouts.timm_activation(name) if name else None
  config = two_towers.recognise(
      tensors, beside, said, rules=_siglip_rules, base=_SIGLIP,
      stated=lambda *_: {'vision.mlp': mlp} | _timm_stated(beside), sayable={
          'vision.mlp': "'gelu', or 'gelu_tanh' as in some of SigLIP 2",
          'vision.heads': 'of 64 in towers up to a width of 1024',
          'vision.image_size': '[rows, columns] of pixels'})
  return config and dataclasses.replace(config, vision=dataclasses.replace(
      config.vision, **_pixels(beside)))


# ---------------------------------------------------------------------------
# timm's config


def _timm(beside):
  """What timm's config.json says of pictures, {} if it is none."""
  own = beside.get('config.json', {})
  return own.get('pretrained_cfg', {}) if 'architecture' in own else {}


def _timm_stated(beside):
  """Fields that it states; what a model was made with goes first."""
  args = beside.get('config.json', {}).get('model_args', {})
  size = args.get('img_size') or _timm(beside).get('input_size', ())[1:]
  stated = {'vision.image_size': two_towers.pair(size)} if size else {}
  return stated | ({'vision.heads': args['num_heads']}
                   if 'num_heads' in args else {})


def _pixels(beside):
  """Mean and std, as far as they are said."""
  own = _timm(beside)
  return {field: tuple(own[field]) for field in ('mean', 'std') if field in own}


def _image(config, beside, fit):
  """How a picture becomes pixels; what timm would crop away is kept."""
  own = _timm(beside)
  c = config.vision
  return dict(
      size=c.image_size, mean=c.mean, std=c.std,
      fit='square' if own.get('crop_mode') == 'squash' else fit,
      kernel=own.get('interpolation', 'bicubic'))


def _is_timm(tensors, beside):
  return bool(_timm(beside)) or any(name in tensors for name in (
      'head.weight', 'blocks.0.attn.q_proj.bias', 'blocks.0.mlp.fc1_g.weight'))


def _build(config, dtype):
  """Returns (module, {our name: ShapeDtypeStruct}), computing in that dtype."""
  model = image_tower.ImageTower(dataclasses.replace(
      config, vision=dataclasses.replace(config.vision, dtype=dtype)))
  tree = jax.eval_shape(model.init, jax.random.key(0),
                        image_tower.example(config))['params']
  flat = flax.traverse_util.flatten_dict(tree, sep='/')
  return model, {name: jax.ShapeDtypeStruct(leaf.shape, dtype)
                 for name, leaf in flat.items()}


# ---------------------------------------------------------------------------
# Names


_INNER_NORM = (r'stack/blocks/attention/norm/(scale|bias)',)
_AUTHORS = dataclasses.replace(eva_clip.AUTHORS, packed='mlp.w12')
_TIMM = dataclasses.replace(eva_clip.TIMM, packed='mlp.fc1')


def _layout(names, belongs, resize):
  return layout.Layout(
      recognise=functools.partial(_recognise_eva, names=names, belongs=belongs),
      build=_build, rules=functools.partial(_eva_rules, names=names),
      image=functools.partial(_image, fit='open_clip'),
      ignored=(r'(.*\.)?freqs_(cos|sin)',), resize=resize, fresh=_INNER_NORM)


LAYOUTS = {
    'timm_eva_avg': _layout(
        dataclasses.replace(_TIMM, final_norm='fc_norm'),
        lambda tensors, beside: 'fc_norm.weight' in tensors, 'antialias'),
    'timm_eva': _layout(_TIMM, _is_timm, 'antialias'),
    'eva_tower': _layout(_AUTHORS, lambda tensors, beside: True, 'plain'),
    'timm_siglip': layout.Layout(
        recognise=_recognise_siglip, build=_build, rules=_siglip_rules,
        image=functools.partial(_image, fit='square'), resize='antialias'),
}
