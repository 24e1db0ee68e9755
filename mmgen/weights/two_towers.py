"""Which CLIP it is: the config of a model of two towers, from its tensors.

Or of one of them: an image tower by itself.

Sizes are read off the shapes. What shapes cannot tell (heads, activation, rows
and columns of a grid) is taken from the JSON file beside the tensors, else from
the published tower of these sizes. Where these end the user is asked: a wrong
guess would load without an error and answer a little worse for ever.
"""

import collections
import dataclasses
import math
import re

import flax.traverse_util
import jax

from mmgen import errors
from mmgen import fields as fields_lib
from mmgen.models import clip
from mmgen.models import text_encoder
from mmgen.models import vision_encoder
from mmgen.weights import answers
from mmgen.weights import layout

# Sizes that have one reading of the shapes.
_TOLD_BY_SHAPES = ('.layers', '.width', '.hidden', '.patch', '.vocab',
                   '.length')
TOWERS = {'vision': vision_encoder.SIZES, 'text': text_encoder.SIZES}

# What a user may be asked.
_SAYABLE = {
    'mlp': "of both towers: 'quick_gelu' for OpenAI's own and for what names "
           "itself quickgelu, 'gelu' for LAION's and most others, 'gelu_tanh' "
           "for SigLIP but in open_clip and timm",
    'vision.mlp': 'as mlp', 'text.mlp': 'as mlp',
    'vision.heads': 'of 64 channels in most towers up to a width of 1024',
    'text.heads': 'as vision.heads',
    'vision.image_size': '[rows, columns] of pixels; positions that are stored '
                         'for another are resized',
}


def recognise(tensors, beside, said, *, rules, base, stated,
              told=lambda sizes: {}, sayable=_SAYABLE):
  """The config of tensors by one layout.

  Args:
    tensors: of the file.
    beside: {name: content} of JSON files.
    said: {'vision.heads': value, ...} by the user; goes before all else.
    rules: of the layout, of a config.
    base: config of the family, which has what nothing else tells: a
      `ClipConfig`, or another that has 'vision'.
    stated: function (tensors, beside, base) -> as `said`, by the JSON files;
      None stands for what has to be said.
    told: function from sizes, {'vision.width': size, ...}, to what a model of
      these sizes has beside; the JSON files go before it.
    sayable: {field: how to say it}. A field that is said to be 'none' is None.

  Returns:
    The config, of the kind of the base, or None if the tensors are of another
    layout. An image size that is said, of another grid than the file's, is one
    to resize to: that is left to the caller.

  Raises:
    UserError: a field is told by none of these, or they do not fit.
  """
  found = {}  # {our name: shapes of its tensors, in all layers}
  for rule in rules(base):
    name = re.escape(rule.theirs[0]).replace(r'\{layer\}', r'\d+')
    found |= dict.fromkeys(rule.ours, [
        tensor.shape for theirs, tensor in tensors.items()
        if re.fullmatch(name, theirs)])
  towers = _towers(base)
  parts = [f'{tower}/stack/blocks/' for tower in towers]
  parts += ['vision/head/'] * (base.vision.pooling == 'map')
  if not all(any(shapes for ours, shapes in found.items()
                 if ours.startswith(part)) for part in parts):
    return None
  known = _sizes(found, base, towers)
  said_beside = stated(tensors, beside, base)
  layout.agree({field: known[field] for field in known
                if field.endswith(_TOLD_BY_SHAPES)}, said_beside)
  facts = told(known) | said_beside
  known |= facts
  said = dict(said)
  if asks_to_resize(known, facts, said.get('vision.image_size')):
    del said['vision.image_size']
  what = 'CLIP' if len(towers) > 1 else 'an image tower'
  for field, value in answers.take(said, sayable, what).items():
    known |= {f'{tower}.mlp': value for tower in towers
              } if field == 'mlp' else {field: value}
  both = 'mlp' in sayable  # the towers are asked for as one
  answers.ask(('mlp' if both and field.endswith('.mlp') else field
              for field, value in known.items() if value is None), sayable)
  return _replace(base, {field: None if value == 'none' else value
                         for field, value in known.items()})


def _towers(config):
  """The towers that a model has, of `TOWERS`."""
  return [tower for tower in TOWERS if hasattr(config, tower)]


def _replace(base, known):
  """The base with {'embed': value, 'vision.heads': value, ...}."""
  fields = collections.defaultdict(dict)
  for name, value in known.items():
    part, _, field = name.rpartition('.')
    fields[part][field] = value
  try:
    towers = {}
    for tower in _towers(base):
      config = getattr(base, tower)
      towers[tower] = fields_lib.read(
          type(config), tower, vars(config) | fields[tower], ValueError)
    for tower in towers.values():
      _ = tower.stack  # which checks what a stack is made of
    return dataclasses.replace(base, **towers, **fields[''])
  except (TypeError, ValueError) as error:
    raise errors.UserError(f'no model has these sizes: {error}') from error


def _sizes(found, base, towers):
  """Reads sizes off shapes; most tensors decide, so as to tell a wrong one.

  Args:
    found: {our name: shapes of its tensors, in all layers}.
    base: config of the family.
    towers: of `TOWERS`, that it has.

  Returns:
    {'vision.width': size, ...}: 1 where there is no tensor, since then
    `layout.check` says so, and None for what shapes do not tell.
  """
  most = lambda values: collections.Counter(values or [1]).most_common(1)[0][0]
  shape = lambda ours: most(found[ours] or [(1, 1)])
  sizes = {}
  for tower in towers:
    blocks = f'{tower}/stack/blocks/'
    inner = {ours.removeprefix(blocks): shapes
             for ours, shapes in found.items() if ours.startswith(blocks)}
    norms = inner['attention_norm/scale'] + inner['mlp_norm/scale']
    width = most([shape[-1] for shape in norms])
    hidden = [size for leaf in ('up/bias', 'up/kernel', 'down/kernel')
              for shape in inner[f'mlp/{leaf}'] for size in shape[-2:]
              if size != width]
    # Either norms have an axis of layers, or there is a tensor for each.
    layers = most([shape[:-1] for shape in norms] or [()])
    sizes |= {
        f'{tower}.width': width, f'{tower}.hidden': most(hidden or [width]),
        f'{tower}.layers': layers[0] if layers else most(
            [len(shapes) for shapes in inner.values()])}
    query = shape(f'{blocks}attention/query/kernel')
    sizes[f'{tower}.heads'] = (
        query[-2] if len(query) > 2 else published_heads(sizes, tower))
  numbers = math.prod(shape('vision/patch_embedding/kernel'))
  sizes['vision.patch'] = max(
      1, math.isqrt(numbers // (3 * sizes['vision.width'])))
  sizes['vision.image_size'] = _image_size(
      sizes, shape('vision/position_embedding')[-2] - base.vision.class_token)
  if 'text' not in towers:
    return sizes
  sizes['text.vocab'] = shape('text/token_embedding/embedding')[-2]
  sizes['text.length'] = shape('text/position_embedding')[-2]
  sizes['embed'] = (math.prod(shape('text_projection/kernel'))
                    // sizes['text.width'])
  return sizes


def published_heads(sizes, tower):
  """Heads of the published towers of these sizes; None if there is none."""
  heads = {size.heads for size in TOWERS[tower].values() if all(
      getattr(size, field) == sizes[f'{tower}.{field}']
      for field in ('width', 'layers', 'hidden'))}
  return heads.pop() if len(heads) == 1 else None


def _image_size(sizes, patches):
  """(Y, X) of a square grid; None if it is none.

  What is left beyond the last whole patch, only published towers know.
  """
  side, patch = math.isqrt(patches), sizes['vision.patch']
  if side**2 != patches:
    return None
  for size in vision_encoder.SIZES.values():
    if (size.width, size.patch, size.grid) == (
        sizes['vision.width'], patch, (side, side)):
      return size.image_size
  return side * patch, side * patch


def asks_to_resize(known, facts, wanted):
  """Whether an image size that is said is not that of the file.

  Args:
    known: {'vision.image_size': (rows, columns), ...} of the file.
    facts: what of it is not read off shapes.
    wanted: that is said; None for nothing.

  Raises:
    UserError: it is no size of pictures.
  """
  stored, patch = known['vision.image_size'], known['vision.patch']
  if wanted is not None and not (
      isinstance(wanted, list | tuple) and len(wanted) == 2
      and all(isinstance(pixels, int) and pixels > 0 for pixels in wanted)):
    raise errors.UserError(f'vision.image_size is said to be {wanted!r}; '
                           f'allowed: {_SAYABLE["vision.image_size"]}.')
  if not wanted or not stored or not all(stored):  # no positions, no grid
    return False
  (a, b), (c, d) = ([pixels // patch for pixels in pair(size)]
                    for size in (wanted, stored))
  if a * b == c * d and 'vision.image_size' not in facts and not any(
      (size.width, size.patch, size.grid) == (
          known['vision.width'], patch, (c, d))
      for size in vision_encoder.SIZES.values()):
    return False  # the grid only seemed to be a square
  return (a, b) != (c, d)


def pair(size):
  """(rows, columns) of what a config gives as a number or a pair."""
  return tuple(size) if isinstance(size, list | tuple) else (size, size)


def open_clip_config(beside, **usual):
  """What open_clip's own config says of a model.

  Args:
    beside: {name: content} of JSON files, that config among them.
    **usual: values of further options that change nothing here.

  Returns:
    (the whole, of the image tower, of the text tower).

  Raises:
    UserError: it asks for what these towers cannot do.
  """
  own = beside['open_clip_config.json']['model_cfg']
  vision, text = own['vision_cfg'], own['text_cfg']
  odd = [f'{field}={tower[field]!r}' for tower in (vision, text)
         for field, values in (_OPEN_CLIP_USUAL | usual).items()
         if tower.get(field) not in (None, False, *values)]
  if odd:
    raise errors.UserError('open_clip_config.json asks for '
                           f'{", ".join(odd)}, which is not supported.')
  return own, vision, text


def restated(beside, size):
  """The JSON files beside resized weights, with another image size."""
  Y, X = size
  def visit(path, node):
    if isinstance(node, dict):
      return {key: visit((*path, key), value) for key, value in node.items()}
    place = path[-2:]
    if place in _EDGES:
      return Y if Y == X else [Y, X]
    if place[:-1] in (('size',), ('crop_size',)) and place[1] in _ROWS_COLUMNS:
      return size[_ROWS_COLUMNS.index(place[1])]
    return [node[0], Y, X] if place[1:] == ('input_size',) else node
  return {name: visit((name,), content) for name, content in beside.items()}


# Where JSON files have the pixels of an edge, or of both.
_EDGES = (
    ('vision_config', 'image_size'), ('vision_config_dict', 'image_size'),
    ('vision_cfg', 'image_size'), ('preprocess_cfg', 'size'),
    ('preprocessor_config.json', 'size'), ('size', 'shortest_edge'),
    ('preprocessor_config.json', 'crop_size'))
_ROWS_COLUMNS = ('height', 'width')

# open_clip's options that change results without changing a tensor, and which
# values of them these towers have.
_OPEN_CLIP_USUAL = {
    'pool_type': ('tok', 'argmax', 'eos'), 'final_ln_after_pool': (),
    'no_causal_mask': (), 'act_kwargs': (), 'norm_kwargs': (),
}


def build(config, dtype):
  """Returns (module, {our name: ShapeDtypeStruct}), computing in that dtype."""
  vision, text = (dataclasses.replace(tower, dtype=dtype)
                  for tower in (config.vision, config.text))
  model = clip.Clip(dataclasses.replace(config, vision=vision, text=text))
  batch = clip.example_batch(config, config.vision.image_size)
  tree = jax.eval_shape(model.init, jax.random.key(0), batch)['params']
  flat = flax.traverse_util.flatten_dict(tree, sep='/')
  return model, {name: jax.ShapeDtypeStruct(leaf.shape, dtype)
                 for name, leaf in flat.items()}
