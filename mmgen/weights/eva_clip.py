"""EVA-CLIP as it is published.

  eva_clip            the authors' own files (arXiv 2303.15389, 2402.04252)
  eva_clip_old        the same, older: the text tower's names at the top
  eva_clip_old_scale  the same, older: the temperature below 'text.'
  eva_open_clip       open_clip's; the image tower has the names of timm
  eva_hf              the code that came with 8B and 18B for transformers

Names tell the style of a tower: its norms, its MLP, which matrices have a bias
and how queries, keys and values are stored. Nothing tells where its norms stand
and, without tables of angles, whether it turns them by position: there the
published model of these shapes decides, else a JSON file or the user.
"""

import dataclasses
import functools
import math
import operator
import re

import numpy as np

from mmgen import errors
from mmgen.models import clip
from mmgen.models import vision_encoder
from mmgen.weights import clip as clip_layouts
from mmgen.weights import layout
from mmgen.weights import two_towers

_QKV = ('query', 'key', 'value')
_THETA = 10_000
# The published models are told apart by these and by their style.
_SHAPE = [f'vision.{field}' for field in ('width', 'layers', 'hidden', 'patch')]
_SHAPE += [f'text.{field}' for field in ('width', 'layers', 'hidden')]
STYLE = ['vision.norm', 'vision.mlp', 'vision.qkv_bias',
          'vision.inner_attention_norm', 'vision.inner_mlp_norm',
          'vision.layer_scale']

SAYABLE = {
    'vision.placement': "of the norms: 'pre', or 'post' as in E/14 and 18B",
    'vision.rope_grid': '[16, 16] for rotary positions that were trained on '
                        "16 x 16 patches, as in B/16 and L/14; 'none' for none",
    'vision.heads': 'they differ from model to model',
    'vision.image_size': '[rows, columns] of pixels',
    'text.heads': 'of 64 in towers up to a width of 1024, wider ones differ',
    'text.mlp': "'gelu' in all of the authors', 'quick_gelu' where a config "
                'names it',
}


# ---------------------------------------------------------------------------
# Names


@dataclasses.dataclass(frozen=True)
class Names:
  """How a layout calls the parts of the image tower, without '.weight'.

  Attributes:
    stem: {our leaf: (their name, axes of length 1 before it)}.
    patches, final_norm, projection: modules.
    blocks: prefix of a block, with '{layer}'.
    block: {our module in a block: theirs}, but for those of the MLP.
    gelu, swiglu: {our module of the MLP: theirs}.
    fused: queries, keys and values in one matrix; None if they never are.
    bias: that of 'q' and 'v' where they are fused, and where they are not.
    scale: gains of attention and MLP; () if there never are any.
    packed: gate and up in one matrix, where an MLP has no norm; None if they
      never are.
  """
  stem: dict
  patches: str
  final_norm: str
  projection: str
  blocks: str
  block: dict
  gelu: dict
  swiglu: dict
  fused: str | None
  bias: tuple[str, str]
  scale: tuple[str, ...] = ()
  packed: str | None = None

  def below(self, prefix):
    """The same with a prefix before all names."""
    stem = {leaf: (prefix + their, lead)
            for leaf, (their, lead) in self.stem.items()}
    return dataclasses.replace(self, stem=stem, **{
        field: prefix + getattr(self, field)
        for field in ('patches', 'final_norm', 'projection', 'blocks')})

  def swiglu_is_packed(self, config):
    """Whether gate and up of a `VisionEncoderConfig` are in one matrix."""
    return (self.packed is not None and config.mlp == 'swiglu'
            and not config.inner_mlp_norm)


def style(tensors, names):
  """An image tower in the style that names of tensors tell; sizes are any.

  Returns:
    `VisionEncoderConfig`.
  """
  found = {re.sub(r'\.\d+\.', '.{layer}.', name) for name in tensors}
  has = lambda *parts: any(names.blocks + part in found for part in parts)
  swiglu = has(*(f'{their}.weight' for our, their in names.swiglu.items()
                 if our != 'mlp/norm' and their not in names.gelu.values()))
  biases = [bias.format(letter) for bias in names.bias for letter in 'qv']
  norms = [f'{names.block[part]}.bias'
           for part in ('attention_norm', 'mlp_norm')]
  # A norm within an MLP of GELU has another epsilon, and no published model.
  inner = lambda part: has(f'{part}.weight', f'{part}.bias')
  return dataclasses.replace(
      vision_encoder.SIZES['eva02-b16'], rope_grid=None,
      mlp='swiglu' if swiglu or _is_packed(tensors, names) else 'gelu',
      norm='layer' if has(*norms) else 'rms',
      qkv_bias='qv' if has(*biases) else False,
      inner_attention_norm=inner(names.block['attention/norm']),
      inner_mlp_norm=swiglu and inner(names.swiglu['mlp/norm']),
      layer_scale=0.1 if has(*names.scale) else None)


def _is_packed(tensors, names):
  """Whether gate and up are in one matrix; timm's has the name of another."""
  block = layout.of_layer(names.blocks, 0)
  up, down = (tensors.get(f'{block}{name}.weight') for name in (
      names.packed, names.swiglu['mlp/down']))
  return bool(up and down and len(down.shape) == 2
              and up.shape[0] == 2 * down.shape[1])


def vision_rules(c, names):
  """Rules of an image tower without what stands behind it.

  Args:
    c: a `VisionEncoderConfig`.
    names: of the layout.
  """
  ours = 'vision/stack/blocks/'
  bias = c.norm == 'layer'
  modules = names.block | (names.swiglu if c.mlp == 'swiglu' else names.gelu)
  absent = ['attention/norm'] * (not c.inner_attention_norm)
  absent += ['mlp/norm'] * (not c.inner_mlp_norm)
  absent += ['mlp/gate', 'mlp/up'] * names.swiglu_is_packed(c)
  norms = {our: their for our, their in modules.items()
           if our.endswith('norm') and our not in absent}
  others = {our: their for our, their in modules.items()
            if not our.endswith(('norm', *_QKV)) and our not in absent}
  # They are fused in the models that have no norm before the last matrix.
  fused = names.fused is not None and not c.inner_mlp_norm
  rules = [
      *(layout.same(f'vision/{leaf}', their, lead)
        for leaf, (their, lead) in names.stem.items()),
      *layout.patches('vision/patch_embedding', names.patches, c.patch),
      *layout.modules(norms, ours, names.blocks, bias=bias),
      *layout.modules(others, ours, names.blocks),
      *layout.norm('vision/stack/final_norm', names.final_norm, bias)]
  if fused:
    rules += layout.fused([f'{ours}attention/{part}' for part in _QKV],
                          f'{names.blocks}{names.fused}.weight')
  else:
    rules += layout.modules(
        {f'attention/{part}': names.block[f'attention/{part}']
         for part in _QKV}, ours, names.blocks, bias=False)
  if names.swiglu_is_packed(c):
    packed = names.blocks + names.packed
    rules += layout.fused([f'{ours}mlp/gate', f'{ours}mlp/up'],
                          f'{packed}.weight', f'{packed}.bias')
  if c.qkv_bias:
    rules += [layout.same(f'{ours}attention/{part}/bias', names.blocks
                          + names.bias[not fused].format(part[0]))
              for part in ('query', 'value')]
  if c.layer_scale is not None:
    rules += [layout.same(f'{ours}{part}_scale', names.blocks + name)
              for part, name in zip(('attention', 'mlp'), names.scale)]
  return rules


def _tower_rules(config, names):
  """Rules of the image tower and of its projection."""
  return [*vision_rules(config.vision, names),
          *layout.linear('vision_projection', names.projection,
                         config.vision_projection_bias)]


def _rules(config, names, text, scale='logit_scale'):
  """All rules where the text tower has OpenAI's names, below `text`."""
  return [*_tower_rules(config, names),
          *clip_layouts.openai_text_rules(text),
          layout.same('logit_scale', scale)]


def _hf_rules(config, names):
  """All rules where the text tower is that of transformers' CLIP."""
  return [*_tower_rules(config, names),
          *(rule for rule in clip_layouts.LAYOUTS['hf_clip'].rules(config)
            if not rule.ours[0].startswith('vision'))]


# ---------------------------------------------------------------------------
# What names and shapes do not tell


def told(tensors, base, sizes, alike, models):
  """What the published model of these sizes has, and what tables tell.

  Args:
    tensors: of the file.
    base: its config but for sizes; of a tower alone, whatever is behind it.
    sizes: {'vision.width': size, ...}.
    alike: fields of the config in which models of one style are alike.
    models: configs of the published ones.

  Returns:
    {field: value}; None stands for what has to be said.
  """
  get = lambda config, field: operator.attrgetter(field)(config)
  found = {'vision.placement': None, 'vision.rope_grid': None}
  found |= {'text.mlp': None} if hasattr(base, 'text') else {}
  shape = [field for field in _SHAPE if field in sizes]
  for size in models:
    if all(get(size, field) == sizes[field] for field in shape) and all(
        get(size, field) == get(base, field) for field in alike):
      found = {field: get(size, field) or 'none' for field in found}
      if hasattr(base, 'logit_scale'):
        found['logit_scale'] = size.logit_scale
  for name, tensor in tensors.items():
    if name.endswith('freqs_sin'):
      found['vision.heads'] = max(1, sizes['vision.width'] // tensor.shape[-1])
      found['vision.rope_grid'] = _rope_grid(tensor)
      break
  return found


def _rope_grid(tensor):
  """The grid of pretraining, from a table of sines of angles.

  Args:
    tensor: [Y, X, H] or [Y * X, H], of a square grid; the first half of H
      turns by row, the second by column, each frequency twice, from 1 down.

  Returns:
    Rows and columns, or None if it is no such table.
  """
  H = tensor.shape[-1]
  sin = np.asarray(tensor.array(), np.float32).reshape(-1, H)
  side = math.isqrt(len(sin))
  if side**2 != len(sin) or side < 2 or H % 4 or H < 8:
    return None
  # The second row's slowest angle, which is far below half a turn.
  slowest = _THETA ** (4 / H - 1)
  step = np.arcsin(np.clip(sin[side, H // 2 - 1], -1, 1)) / slowest
  grid = round(float(step) * side)
  frequencies = np.repeat(_THETA ** (-np.arange(0, H // 2, 2) / (H // 2)), 2)
  angles = np.arange(side)[:, None] * grid / side * frequencies[None]
  expected = np.concatenate(
      [np.repeat(angles, side, 0), np.tile(angles, (side, 1))], axis=1)
  exact = np.abs(np.sin(expected) - sin).max() < 0.02  # also of bfloat16
  return (grid, grid) if exact and grid > 0 else None


def _open_clip_stated(beside):
  """What open_clip's config says.

  Raises:
    UserError: it asks for what these towers cannot do.
  """
  if 'open_clip_config.json' not in beside:
    return {}
  own, vision, text = two_towers.open_clip_config(
      beside, timm_pool=('token',), timm_proj=('',))
  stated = {'text.mlp': 'quick_gelu' if own.get('quick_gelu') else 'gelu'}
  if 'heads' in text:
    stated['text.heads'] = text['heads']
  if 'image_size' in vision:
    stated['vision.image_size'] = two_towers.pair(vision['image_size'])
  return stated


def _hf_stated(beside):
  """What the config says that came with the code, and what it leaves out.

  Raises:
    UserError: it asks for what these towers cannot do.
  """
  own = beside.get('config.json', {})
  if 'EvaCLIPModel' not in (own.get('architectures') or ()):
    return {}  # none, or another's
  vision, text = own['vision_config'], own['text_config']
  odd = [f'{field}={tower[field]!r}'
         for tower, field, usual in (
             (vision, 'hidden_act', ('gelu',)),
             (vision, 'rope_theta', (_THETA,)),
             (text, 'hidden_act', ('gelu', 'quick_gelu')))
         if tower.get(field, usual[0]) not in usual]
  if odd:
    raise errors.UserError(f'config.json asks for {", ".join(odd)}, which is '
                           'not supported.')
  grid = vision.get('pretrained_seq_len', 16)
  return {
      'vision.placement': 'post' if vision.get('post_layernorm') else 'pre',
      'vision.rope_grid': (grid, grid) if vision.get('use_rope') else 'none',
      'vision.heads': vision['num_attention_heads'],
      'vision.image_size': two_towers.pair(vision['image_size']),
      'vision.norm_eps': vision.get('layer_norm_eps', 1e-6),
      'text.heads': text['num_attention_heads'],
      'text.norm_eps': text.get('layer_norm_eps', 1e-5),
      'text.mlp': text.get('hidden_act', 'gelu')}


def check_said(said):
  """Raises UserError for a grid of rotary positions that is none."""
  grid = said.get('vision.rope_grid', 'none')
  if grid != 'none' and not (
      isinstance(grid, list | tuple) and len(grid) == 2
      and all(type(size) is int and size > 0 for size in grid)):
    raise errors.UserError(f'vision.rope_grid is said to be {grid!r}; allowed: '
                           f'{SAYABLE["vision.rope_grid"]}.')


def _recognise(tensors, beside, said, *, names, rules, stated, image,
               signature):
  """The config, or None; see `layout.Layout`.

  Raises:
    UserError: something has to be said, or cannot be as it is said.
  """
  if not all(name in tensors for name in signature) or any(
      '.attn_pool.' in name for name in tensors):  # SigLIP's
    return None
  check_said(said)
  base = clip.SIZES['eva02-b16']
  base = dataclasses.replace(
      base, vision=style(tensors, names),
      vision_projection_bias=f'{names.projection}.bias' in tensors)
  config = two_towers.recognise(
      tensors, beside, said, rules=rules, base=base, sayable=SAYABLE,
      stated=lambda *_: stated(beside),
      told=functools.partial(told, tensors, base, alike=STYLE,
                             models=clip.SIZES.values()))
  if config is None:
    return None
  pixels = image(config, beside)
  return dataclasses.replace(config, vision=dataclasses.replace(
      config.vision, mean=pixels['mean'], std=pixels['std']))


def _layout(names, rules=_rules, stated=_open_clip_stated, kind='open_clip',
            signature=(), resize='plain', **variant):
  rules = functools.partial(rules, names=names, **variant)
  image = clip_layouts.LAYOUTS[kind].image
  return layout.Layout(
      recognise=functools.partial(
          _recognise, names=names, rules=rules, stated=stated, image=image,
          signature=signature),
      build=two_towers.build, rules=rules, image=image,
      ignored=(r'(.*\.)?freqs_(cos|sin)', r'.*\.position_ids'),
      resize=resize, family='clip')


# ---------------------------------------------------------------------------
# Names and values


_GELU = {'mlp/up': 'mlp.fc1', 'mlp/down': 'mlp.fc2'}
# Of an image tower by itself.
AUTHORS = Names(
    stem={'class_embedding': ('cls_token', 2),
          'position_embedding': ('pos_embed', 1)},
    patches='patch_embed.proj', final_norm='norm', projection='head',
    blocks='blocks.{layer}.',
    block={
        'attention_norm': 'norm1', 'attention/query': 'attn.q_proj',
        'attention/key': 'attn.k_proj', 'attention/value': 'attn.v_proj',
        'attention/norm': 'attn.inner_attn_ln', 'attention/out': 'attn.proj',
        'mlp_norm': 'norm2'},
    gelu=_GELU,
    swiglu={'mlp/gate': 'mlp.w1', 'mlp/up': 'mlp.w2', 'mlp/norm': 'mlp.ffn_ln',
            'mlp/down': 'mlp.w3'},
    fused='attn.qkv', bias=('attn.{}_bias', 'attn.{}_bias'),
    scale=('gamma_1', 'gamma_2'))
TIMM = dataclasses.replace(
    AUTHORS, block=AUTHORS.block | {'attention/norm': 'attn.norm'},
    swiglu={'mlp/gate': 'mlp.fc1_g', 'mlp/up': 'mlp.fc1_x',
            'mlp/norm': 'mlp.norm', 'mlp/down': 'mlp.fc2'},
    bias=('attn.{}_bias', 'attn.{}_proj.bias'))
_VISUAL = AUTHORS.below('visual.')
_STEM = 'vision_model.embeddings.'
_HF = Names(
    stem={'class_embedding': (f'{_STEM}class_embedding', 0),
          'position_embedding': (f'{_STEM}position_embedding.weight', 0)},
    patches=f'{_STEM}patch_embedding',
    final_norm='vision_model.post_layernorm', projection='visual_projection',
    blocks='vision_model.encoder.layers.{layer}.',
    block={
        'attention_norm': 'layer_norm1', 'attention/query': 'self_attn.q_proj',
        'attention/key': 'self_attn.k_proj',
        'attention/value': 'self_attn.v_proj',
        'attention/norm': 'self_attn.inner_attn_ln',
        'attention/out': 'self_attn.out_proj', 'mlp_norm': 'layer_norm2'},
    gelu=_GELU,
    swiglu={'mlp/gate': 'mlp.fc1', 'mlp/up': 'mlp.fc2',
            'mlp/norm': 'mlp.ffn_ln', 'mlp/down': 'mlp.fc3'},
    fused=None, bias=('self_attn.{}_proj.bias', 'self_attn.{}_proj.bias'))

LAYOUTS = {
    'eva_clip_old_scale': _layout(
        _VISUAL, text='text.', scale='text.logit_scale',
        signature=['text.logit_scale']),
    'eva_clip': _layout(_VISUAL, text='text.'),
    'eva_clip_old': _layout(_VISUAL, text=''),
    'eva_open_clip': _layout(TIMM.below('visual.trunk.'), text='text.',
                             resize='antialias'),
    # CLIP's names, but for these two, of which CLIP and SigLIP have one each.
    'eva_hf': _layout(
        _HF, _hf_rules, _hf_stated, 'hf_clip',
        [f'{_STEM}class_embedding', f'{_STEM}patch_embedding.bias']),
}
