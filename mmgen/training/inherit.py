"""Starting from others: whole parts of a model, by name, with a report.

A part comes from another run, or from published weights. These are of any
layout that `mmgen.weights` recognises, and are read straight to where the part
lives: nothing of the file but the tensors of that part is touched.
"""

import dataclasses
import difflib
import logging
import pathlib
import re

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from mmgen import errors
from mmgen import weights
from mmgen.data import published_text
from mmgen.data import text
from mmgen.models import positions
from mmgen.training import checkpoint
from mmgen.training import sharding
from mmgen.weights import files
from mmgen.weights import layout as layout_lib

_log = logging.getLogger(__name__)

ALL = 'all'
# Arrays with an axis along the vocabulary, which may have grown since.
_VOCABULARY = re.compile(r'(^|/)(embedding|head/kernel)$')
# A head that pools, above a tower: one that is read patch by patch has none.
_POOLING = re.compile(r'[^/]+/head/(probe|query|key|value|out|norm|mlp)(/|$)')
# Of blocks with `modality_weights`.
_SECOND = re.compile(r'/visual/')
# What no name and no shape shows of a tower, and changes all that it gives.
_UNSEEN = ('mlp', 'norm', 'norm_eps', 'placement', 'rope_grid', 'rope_theta',
           'causal', 'mean', 'std', 'alpha')
_POSITIONS = weights.POSITIONS.partition('/')[2]
# Activations of an MLP of two matrices.
_PLAIN = ('quick_gelu', 'gelu', 'gelu_tanh')
# Of a tower that is not taken.
_ANY = {'mlp': 'gelu', 'heads': 1, 'placement': 'pre', 'rope_grid': 'none'}
_ASK = (' --say is of python -m mmgen.convert; the folder that it makes can '
        'stand here.')


def inherit(params, parents, mesh, sources=None, configs=None):
  """Replaces parts of freshly initialised parameters.

  Args:
    params: {name: array}, trained and frozen, in place on the mesh.
    parents: {part: run folder, or path of published weights}; a part is a
      top-level name of the model, or `ALL` for every part that the model and
      that parent have in common. A part that is named itself wins over `ALL`.
    mesh: the mesh.
    sources: {part: its name in the parent}, where that is another one.
    configs: {part: config of its module}, for weights: it answers what their
      tensors do not tell, and what else they tell is compared with it.

  Returns:
    ({name: array}, report). The report is {part: {'from', 'part', 'copied',
    'grown', 'resized', 'fresh', 'unused'}}: names of arrays taken as they are,
    of those whose new rows keep their fresh values, of positions resized to
    another grid of patches, of those that `ALL` did not find there or that
    published models start afresh, and of those that only the parent has. Of
    weights it also has their
    'layout', what 'differs' in the configs, and 'tensors', {name: {'from':
    names of their tensors, 'shape': of ours there, 'dtype': theirs}}.

  Raises:
    UserError: within a part that both have, a name or a shape differs in more
      than a grown vocabulary or another grid; all differences are listed, and
      nothing is read of a part that does not fit. Or weights that cannot be
      read.
  """
  _check_adapters(params, parents, configs or {})
  new, report, wrong = dict(params), {}, []
  for part in sorted(parents, key=lambda part: part != ALL):
    folder = parents[part]
    wanted = {name: leaf for name, leaf in params.items()
              if part in (ALL, _top(name))}
    if not wanted:
      raise errors.UserError(
          f'config.init.{part}: the model has no part {part!r}; its parts: '
          f'{", ".join(sorted({_top(name) for name in params}))}.')
    source = (sources or {}).get(part, part)
    parent = (_open_run if _is_run(folder) else _open_weights)(
        folder, part, source, mesh, configs or {})
    parent = _with_second_set(parent, wanted)
    grids = {f'{name}/{_POSITIONS}': config.grid
             for name, config in (configs or {}).items()
             if hasattr(config, 'grid')}
    lines, misfits = _compare(wanted, parent, folder, grids)
    wrong += misfits
    taken = lines['copied'] + lines['grown'] + lines['resized']
    for name, leaf in (parent.read(taken) if not misfits else {}).items():
      if name in lines['grown']:
        leaf = _graft(leaf, wanted[name])
      elif name in lines['resized']:
        leaf = _resize(leaf, wanted[name], *parent.grids[name], grids[name])
      new[name] = leaf
    report[part] = {'from': str(folder), 'part': source, **lines,
                    **parent.notes}
    if parent.tensors:
      report[part]['tensors'] = {
          name: parent.tensors[name] for name in sorted(taken)}
    _log.info('init.%s from %s: %s', part, folder, ', '.join(
        f'{len(names)} {kind}' for kind, names in lines.items() if names))
  if wrong:
    raise errors.UserError(
        f'config.init does not fit the model: {"; ".join(wrong)}. Give the '
        'part the sizes of its parent, or another parent.')
  return new, report


def _compare(wanted, parent, folder, grids):
  """Sorts names into the kinds of the report, and misfits.

  Args:
    wanted: {name: what has a shape} of the model.
    parent: a `_Parent`.
    folder: of the parent.
    grids: {name: (rows, columns)} of the model's positions.
  """
  found, wrong = parent.found, []
  shared = {_top(name) for name in wanted} & {_top(name) for name in found}
  lines = dict(copied=[], grown=[], resized=[], fresh=[], unused=[])

  def theirs(name):
    tensors = parent.tensors.get(name, {}).get('from')
    return f' ({", ".join(tensors)})' if tensors else ''

  for name in sorted(wanted.keys() | found.keys()):
    if _top(name) not in shared:
      lines['fresh' if name in wanted else 'unused'].append(name)
    elif name not in found and any(
        re.fullmatch(pattern, name.partition('/')[2])
        for pattern in parent.fresh):
      lines['fresh'].append(name)
    elif name not in found:
      wrong.append(f'{name} is only here' + _nearest(
          name, found.keys() - wanted.keys(), 'there'))
    elif name not in wanted and _POOLING.match(name):
      lines['unused'].append(name)
    elif name not in wanted:
      wrong.append(f'{name}{theirs(name)} is only in {folder}' + _nearest(
          name, wanted.keys() - found.keys(), 'here'))
    elif name in grids and name in parent.grids and _resizable(
        found[name].shape, wanted[name].shape, parent.grids[name][1],
        grids[name]):
      lines['resized'].append(name)
    elif found[name].shape == wanted[name].shape:
      lines['copied'].append(name)
    elif _grown(name, found[name].shape, wanted[name].shape):
      lines['grown'].append(name)
    else:
      wrong.append(f'{name}{theirs(name)} is {list(found[name].shape)} in '
                   f'{folder}, {list(wanted[name].shape)} here')
  return lines, wrong


def _check_adapters(params, parents, configs):
  """Checks that no decoder comes without the adapters it was trained with.

  Raises:
    UserError: it does.
  """
  own = any(_top(name) == 'lora' for name in params)
  for part in {ALL, 'decoder'} & parents.keys():
    folder = parents[part]
    same = own and str(parents.get('lora', parents.get(ALL))) == str(folder)
    if not same and _has_adapters(folder, part, configs):
      raise errors.UserError(
          f'config.init.{part}: the decoder of {folder} was trained with '
          'adapters, which this run does not take. Give it the same '
          'config.model.lora and config.init.lora, or start it from a folder '
          'in which they are merged, as python -m mmgen.convert --merge makes '
          'it.')


def _has_adapters(folder, part, configs):
  """Whether a run, or a file of weights, has adapters beside its decoder."""
  if _is_run(folder):
    return 'lora' in checkpoint.parts(folder)
  try:
    _, config = _recognise(folder, configs if part == ALL else {
        part: configs.get(part)})
  except errors.UserError:
    return False  # which is told when it is opened
  return getattr(config, 'lora', None) is not None


def check_vocabulary(params, parents, tokenizer):
  """Checks that what is learnt of a vocabulary keeps its meaning.

  What has no tokenizer, or none that can be read, is taken at its word: that
  is logged.

  Args:
    params: {name: array} of the new run.
    parents: as in `inherit`.
    tokenizer: of the new run.

  Raises:
    UserError: a part with rows of the vocabulary comes from a run or a file
      whose tokenizer is neither this one nor the beginning of it.
  """
  for part, folder in parents.items():
    if not any(_VOCABULARY.search(name) and part in (ALL, _top(name))
               for name in params):
      continue
    if _is_run(folder):
      stored = checkpoint.tokenizer_bytes(folder)
      if stored == tokenizer.bytes:
        continue
      # Converted weights are stored without one.
      old = text.Tokenizer.from_bytes(stored) if stored else None
    else:
      old = _tokenizer_beside(folder)
    if old is None:
      _log.warning('init.%s: %s has no tokenizer to compare with that of this '
                   'run; rows of the vocabulary are taken in order', part,
                   folder)
      continue
    ids = range(min(old.vocab_size, tokenizer.vocab_size))
    other = sum(a != b for a, b in zip(old.pieces(ids), tokenizer.pieces(ids)))
    if other or old.vocab_size > tokenizer.vocab_size:
      raise errors.UserError(
          f'config.init.{part}: {folder} was trained with another tokenizer: '
          f'{other} of {len(ids)} ids mean something else here. Train both on '
          'corpora with one tokenizer, or leave the part to start afresh.')


def _tokenizer_beside(path):
  """The first tokenizer beside weights that can be read, or None."""
  path = pathlib.Path(path)
  folder = path if path.is_dir() else path.parent
  for file in (folder / name for name in weights.TOKENIZERS):
    try:
      if file.exists():
        return published_text.Tokenizer(file.read_bytes())
    except ValueError as error:
      _log.warning('%s cannot be read: %s', file, error)
  return None


# ---------------------------------------------------------------------------
# Where parts come from


@dataclasses.dataclass(frozen=True)
class _Parent:
  """What a run or a file has, under the names that it will have here.

  Attributes:
    found: {name: what has a shape}.
    read: function of names; returns {name: array} in place on the mesh.
    tensors: {name: what the report says of it}; {} of a run, whose arrays have
      the same names.
    notes: what else the report says.
    grids: {name: (method of `positions.resize_positions`, rows and columns)}
      of positions.
    fresh: as in `layout.Layout`.
  """
  found: dict
  read: object
  tensors: dict = dataclasses.field(default_factory=dict)
  notes: dict = dataclasses.field(default_factory=dict)
  grids: dict = dataclasses.field(default_factory=dict)
  fresh: tuple = ()


def _is_run(path):
  return (epath.Path(path) / 'checkpoints').exists()


def _open_run(folder, part, source, mesh, configs):
  found = sharding.named_leaves(checkpoint.load_params(
      folder, None if part == ALL else source, mesh))
  found = {_renamed(name, part, source): leaf for name, leaf in found.items()}
  # An old config's model may no longer be known, but it has these.
  extras = checkpoint.load_extras(folder)
  size = extras.get('config', {}).get('image.size')
  layout = extras.get('weights', {}).get('layout')
  method = weights.FAMILIES[layout].resize if layout else 'plain'
  grids = {
      f'{name}/{_POSITIONS}': (method, tuple(x // config.patch for x in size))
      for name, config in configs.items() if size and hasattr(config, 'patch')}
  return _Parent(found, lambda names: {name: found[name] for name in names},
                 grids=grids)


def _open_weights(path, part, source, mesh, configs):
  """Opens published weights; only headers are read.

  Raises:
    UserError: they cannot be read, are of no known layout, are not whole, or
      have no such part.
  """
  here = configs if part == ALL else {source: configs.get(part)}
  try:
    layout, config = _recognise(path, here)
    family, tensors = weights.FAMILIES[layout], files.open(path)
    _, ours = family.build(config, 'float32')
    rules = family.rules(config)
    layout_lib.check(rules, tensors, ours, family.ignored, str(path))
  except errors.UserError as error:
    raise errors.UserError(f'config.init.{part}: {error}{_ASK}' if '--say=' in
                           str(error) else f'config.init.{part}: {error}'
                           ) from error
  taken = {name: leaf for name, leaf in ours.items()
           if part == ALL or _top(name) == source}
  if not taken:
    raise errors.UserError(
        f'config.init.{part}: {path} has no part {source!r}; its parts: '
        f'{", ".join(sorted({_top(name) for name in ours}))}.')
  old = {_renamed(name, part, source): name for name in taken}

  def read(names):
    where = sharding.shardings(mesh, {name: taken[old[name]] for name in names})
    found = layout_lib.load(rules, tensors, {
        old[name]: jax.ShapeDtypeStruct(
            taken[old[name]].shape, jnp.float32, sharding=where[name])
        for name in names})
    return {name: found[old[name]] for name in names}

  tensors_of = {
      _renamed(name, part, source): {
          'from': list(theirs), 'shape': list(shape), 'dtype': dtype}
      for name, theirs, shape, dtype in layout_lib.report(
          rules, tensors, taken)}
  differs = _differences(config, here)
  if differs:
    _log.warning('init.%s: %s was trained otherwise than this model computes: '
                 '%s', part, path, '; '.join(differs))
  vision = getattr(config, 'vision', None)
  grids = {_renamed(weights.POSITIONS, part, source): (
      family.resize, vision.grid)} if hasattr(vision, 'grid') else {}
  return _Parent({ours: taken[theirs] for ours, theirs in old.items()}, read,
                 tensors_of, {'layout': layout, 'differs': differs}, grids,
                 family.fresh)


def _recognise(path, here):
  """Recognises weights, and answers what they do not tell.

  Nothing else is said, so that the model's own fields never stand before what
  the weights say themselves. Of a tower that is not taken any answer will do.

  Args:
    path: of the weights.
    here: {part there: config of the module that takes it, or None}.
  """
  said, first = {}, None
  while True:
    try:
      return weights.recognise(path, said)
    except errors.Unsaid as error:
      first = first or error
      answers = {}
      for field in error.fields:
        for tower in ('vision', 'text') if field == 'mlp' else ('',):
          name = f'{tower}.{field}'.lstrip('.')
          answers[name] = _answer(name, here)
      if None in answers.values() or answers.keys() <= said.keys():
        raise first from error
      said |= answers


def _answer(name, here):
  """What a field of weights is here, such as 'vision.heads', or None."""
  part, _, field = name.rpartition('.')
  value = getattr(here.get(part), field, _ANY.get(field))
  if field == 'mlp' and value not in _PLAIN:
    return 'gelu'
  return 'none' if field == 'rope_grid' and value is None else value


def _differences(config, here):
  """What the config of weights says otherwise than that of a part here.

  Args:
    config: of the weights' model.
    here: as for `_recognise`.
  """
  lines = []
  for part, ours in here.items():
    theirs = getattr(config, part, None)
    for field in _UNSEEN:
      if hasattr(ours, field) and hasattr(theirs, field):
        there, value = getattr(theirs, field), getattr(ours, field)
        if there != value:
          lines.append(f'{part}.{field} is {there!r} there, {value!r} here')
  return lines


def _with_second_set(parent, wanted):
  """A second set of weights that the parent lacks is a copy of its first.

  So EVEv2 starts from a decoder of words (arXiv 2502.06788, released code).
  """
  first = {name: re.sub(_SECOND, '/', name) for name in wanted
           if name not in parent.found}
  first = {name: old for name, old in first.items() if old in parent.found}
  def read(names):
    found = parent.read(sorted({first.get(name, name) for name in names}))
    # Copies of their own: a step gives its arrays away, each once.
    return {name: jnp.copy(found[first[name]]) if name in first
            else found[name] for name in names}
  more = lambda kept: kept | {name: kept[old] for name, old in first.items()
                              if old in kept}
  return dataclasses.replace(parent, found=more(parent.found), read=read,
                             tensors=more(parent.tensors))


# ---------------------------------------------------------------------------
# Names and arrays


def _renamed(name, part, source):
  """The name here of what a parent has as `name`."""
  return name if part == ALL else part + name.removeprefix(source)


def _nearest(name, names, where):
  close = difflib.get_close_matches(name, names, 1)
  return f' (nearest {where}: {close[0]})' if close else ''


def _top(name):
  return name.split('/')[0]


def _grown(name, old, new):
  """Whether two shapes differ by a larger vocabulary only."""
  differ = [i for i, (a, b) in enumerate(zip(old, new)) if a != b]
  return (bool(_VOCABULARY.search(name)) and len(old) == len(new)
          and len(differ) == 1 and old[differ[0]] < new[differ[0]])


def _graft(old, new):
  """Puts the old entries before the fresh ones of a larger array."""
  grafted = new.at[tuple(slice(size) for size in old.shape)].set(
      old.astype(jnp.float32))
  return jax.device_put(grafted, new.sharding)


def _resizable(old, new, old_grid, new_grid):
  """Whether two shapes are positions of these grids, which are not the same."""
  cells = [rows * cols for rows, cols in (old_grid, new_grid)]
  extra = old[0] - cells[0]
  return (old_grid != new_grid and extra in (0, 1) and old[1:] == new[1:]
          and new[0] - cells[1] == extra)


def _resize(old, new, method, old_grid, new_grid):
  """Positions on another grid, laid out as the fresh ones are."""
  whole = jax.jit(lambda x: x, out_shardings=jax.NamedSharding(
      new.sharding.mesh, jax.P()))(old)
  table = positions.resize_positions(
      np.asarray(whole.addressable_data(0)), old_grid, new_grid, method)
  return jax.make_array_from_callback(
      new.shape, new.sharding, lambda index: table[index])
