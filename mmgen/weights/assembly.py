"""A model of several files: adapters, and parts that were published apart.

  base = weights.load('vicuna-7b')
  adapters = weights.load('my-adapters')
  both = weights.attach(base, adapters)     # to use, or to train on
  one = weights.merge(both)                 # the same without adapters

LLaVA's authors publish a connector, and adapters with the connector that was
trained beside them (non_lora_trainables.bin), to be put on a Vicuna and on a
CLIP: all of these are attached likewise.
"""

import dataclasses

import flax.traverse_util

from mmgen import errors
from mmgen.models import lora
from mmgen.models import multimodal
from mmgen.weights import clip
from mmgen.weights import decoders
from mmgen.weights import emu
from mmgen.weights import eva_clip
from mmgen.weights import eve
from mmgen.weights import fuyu
from mmgen.weights import image_towers
from mmgen.weights import layout as layout_lib
from mmgen.weights import llava
from mmgen.weights import lora as lora_layouts

# The first that recognises a file has it.
FAMILIES = {**eva_clip.LAYOUTS, **clip.LAYOUTS, **eve.LAYOUTS,
            **llava.LAYOUTS, **fuyu.LAYOUTS, **emu.LAYOUTS, **decoders.LAYOUTS,
            **image_towers.LAYOUTS, **lora_layouts.LAYOUTS}

# What a model becomes with a connector, with an image tower, without adapters.
_CONNECTED = {'llama': 'llava'}
_WITH_TOWER = {'llava': 'llava_tower'}
_MERGED = {'emu_instruct': 'emu', 'emu_instruct_new': 'emu'}

# What an image tower must have as the connector expects it, beside its shapes.
_TOWER = ('image_size', 'patch', 'heads', 'mlp', 'norm_eps')


def attach(base, *others):
  """Gives a model adapters, or parts, that were loaded apart from it.

  Args:
    base: a `weights.Loaded` of a decoder.
    *others: such of adapters, of a connector, or of a CLIP, whose image tower
      is taken; one of each.

  Returns:
    A `weights.Loaded` like the base.

  Raises:
    UserError: lists all that does not fit the base.
  """
  config, layout, beside = base.model.config, base.layout, dict(base.beside)
  if not isinstance(config, multimodal.MultimodalConfig):
    raise errors.UserError(f'a model of the layout {layout!r} has no decoder '
                           'that anything could be attached to.')
  given = {}
  for other in others:
    part = _part(other)
    if part in given:
      raise errors.UserError(f'of {part!r} there are two to attach.')
    given[part] = other
  if 'connector' in given and config.vision is None:
    link = given['connector']
    config = llava.seeing(
        config.decoder, link.model.config,
        link.params['connector']['up']['kernel'].shape[0], link.beside)
    layout = _CONNECTED.get(layout, layout)
    beside |= {name: content for name, content in link.beside.items()
               if name != lora_layouts.CONFIG}
  if 'vision' in given:
    _check_tower(config.vision, given['vision'].model.config.vision,
                 'vision' in base.params)
    layout = _WITH_TOWER.get(layout, layout)
  if 'lora' in given:
    config, own = _adapted(config, given['lora'])
    beside |= own
  params = base.params | {part: other.params[part]
                          for part, other in given.items()}
  model, ours = decoders.build(config, config.decoder.dtype)
  _check_fit({name: leaf for name, leaf in _flat(params).items()
              if _top(name) in given},
             {name: leaf for name, leaf in ours.items() if _top(name) in given},
             given)
  return dataclasses.replace(
      base, model=model, params=params, layout=layout, beside=beside,
      dtypes=_dtypes(base, given, layout, config, params),
      image=FAMILIES[layout].image(config, beside) if layout else base.image,
      report=base.report + [row for part, other in given.items()
                            for row in other.report if _top(row[0]) == part])


def _part(loaded):
  """Which part of a model weights are to be."""
  part = next((part for part in ('lora', 'connector', 'vision')
               if part in loaded.params), None)
  if part is None or 'decoder' in loaded.params:
    raise errors.UserError(
        f'weights of the layout {loaded.layout!r} cannot be attached; what '
        "can: adapters in PEFT's layout, LLaVA's connector, a CLIP for its "
        'tower.')
  return part


def _check_tower(wanted, found, has):
  """Raises UserError unless a tower is the one that a model lacks."""
  if has or wanted is None:
    raise errors.UserError(
        'an image tower cannot be attached: the model '
        f'{"has one" if has else "has no connector that would read it"}.')
  differ = [f'{field} is {getattr(found, field)!r}, not '
            f'{getattr(wanted, field)!r}' for field in _TOWER
            if getattr(found, field) != getattr(wanted, field)]
  if differ:
    raise errors.UserError('the image tower is not the one that the connector '
                           f'was trained on: {"; ".join(differ)}.')


def _adapted(config, adapters):
  """(config of a model with adapters, the JSON file beside them)."""
  if config.lora is not None:
    raise errors.UserError('the model has adapters already: merge them first.')
  own = adapters.model.config
  if not own.of_decoder:
    raise errors.UserError(f'the adapters are of {own.block!r}, which is no '
                           'decoder that is known here.')
  return dataclasses.replace(config, lora=own.lora), {
      name: content for name, content in adapters.beside.items()
      if name == lora_layouts.CONFIG}


def _check_fit(found, fits, given):
  """Raises UserError that lists what is missing, extra or of another shape.

  Args:
    found: {our name: array} of what is attached.
    fits: {our name: what has a shape}, as the model has it.
    given: {part: `weights.Loaded`}.
  """
  lines = []
  for name in sorted(found.keys() | fits.keys()):
    if name not in found:
      lines.append(f'{name} is missing')
    elif name not in fits:
      lines.append(f'the model has no {name}')
    elif found[name].shape != fits[name].shape:
      lines.append(f'{name} is {list(found[name].shape)}, not '
                   f'{list(fits[name].shape)}')
  if lines:
    own = given['lora'].beside.get(lora_layouts.CONFIG, {}) if (
        'lora' in given) else {}
    base = own.get('base_model_name_or_path')
    raise errors.UserError(
        f'what is to be attached does not fit the model: {"; ".join(lines)}.'
        + (f' The adapters were trained on {base}.' if base else ''))


def _dtypes(base, given, layout, config, params):
  """{their name: dtype} in the layout of the whole and in those of adapters."""
  every, known = dict(base.dtypes), dict(base.dtypes)
  for part, other in given.items():
    every |= other.dtypes
    known |= other.dtypes if part != 'vision' else {}
  if not base.layout:
    return known
  old = [rule for loaded in (base, *given.values()) for rule in
         FAMILIES[loaded.layout].rules(loaded.model.config)]
  # Where names stay, each layer keeps its own.
  new = [rule for rule in FAMILIES[layout].rules(config)
         if layout != base.layout or _top(rule.ours[0]) in given]
  return known | layout_lib.renamed(every, old, new, _flat(params))


def merge(loaded):
  """Folds the adapters of a `weights.Loaded` into its matrices.

  Raises:
    UserError: it has none.
  """
  config = loaded.model.config
  if not isinstance(config, multimodal.MultimodalConfig) or not config.lora:
    raise errors.UserError('there are no adapters to merge.')
  plain = dataclasses.replace(config, lora=None)
  params = lora.merge(loaded.params, config.lora)
  layout = _MERGED.get(loaded.layout, loaded.layout)
  added = {}
  for name, theirs, _, _ in loaded.report:
    if _top(name) == 'lora':
      added[lora.matrix(name)] = added.get(lora.matrix(name), ()) + theirs
  return dataclasses.replace(
      loaded, model=loaded.model.clone(config=plain), params=params,
      layout=layout, dtypes=(loaded.dtypes if layout == loaded.layout else
                             dtypes_in(loaded, layout, plain)), beside={
          name: content for name, content in loaded.beside.items()
          if name != lora_layouts.CONFIG},
      report=[(name, theirs + added.get(name, ()), shape, dtype)
              for name, theirs, shape, dtype in loaded.report
              if _top(name) != 'lora'])


def dtypes_in(loaded, layout, config=None):
  """{their name: dtype} of what a layout takes of a model, by its own files.

  Args:
    loaded: a `weights.Loaded`.
    layout: a name of `FAMILIES`.
    config: as that layout takes it; by default that of the model.
  """
  own = loaded.model.config
  old = FAMILIES[loaded.layout].rules(own) if loaded.layout else []
  named = layout_lib.renamed(
      loaded.dtypes, old, FAMILIES[layout].rules(config or own),
      _flat(loaded.params))
  return {name: loaded.dtypes.get(name, dtype) for name, dtype in named.items()}


def _flat(tree):
  return flax.traverse_util.flatten_dict(tree, sep='/')


def _top(name):
  return name.partition('/')[0]
