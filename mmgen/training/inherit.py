"""Starting from other runs: whole parts of a model, by name, with a report."""

import logging
import re

import jax
import jax.numpy as jnp

from mmgen import errors
from mmgen.data import text
from mmgen.training import checkpoint
from mmgen.training import sharding

_log = logging.getLogger(__name__)

ALL = 'all'
# Arrays with an axis along the vocabulary, which may have grown since.
_VOCABULARY = re.compile(r'(^|/)(embedding|head/kernel)$')


def inherit(params, parents, mesh, sources=None):
  """Replaces parts of freshly initialised parameters.

  Args:
    params: {name: array}, trained and frozen, in place on the mesh.
    parents: {part: run folder}; a part is a top-level name of the model, or
      `ALL` for every part that the model and that run have in common. A part
      that is named itself wins over `ALL`.
    mesh: the mesh.
    sources: {part: its name in the other run}, where that is another one.

  Returns:
    ({name: array}, report). The report is {part: {'from', 'copied', 'grown',
    'fresh', 'unused'}}: names of arrays taken as they are, of those whose new
    rows keep their fresh values, of those that `ALL` did not find there, and of
    those that only the other run has.

  Raises:
    UserError: within a part that both have, a name or a shape differs in more
      than a grown vocabulary. All differences are listed.
  """
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
    found = sharding.named_leaves(checkpoint.load_params(
        folder, None if part == ALL else source, mesh))
    if part != ALL:
      found = {part + name.removeprefix(source): leaf
               for name, leaf in found.items()}
    shared = {_top(name) for name in wanted} & {_top(name) for name in found}
    lines = dict(copied=[], grown=[], fresh=[], unused=[])
    for name in sorted(wanted.keys() | found.keys()):
      if _top(name) not in shared:
        lines['fresh' if name in wanted else 'unused'].append(name)
      elif name not in found or name not in wanted:
        where = 'only here' if name in wanted else f'only in {folder}'
        wrong.append(f'{name} is {where}')
      elif found[name].shape == wanted[name].shape:
        new[name] = found[name]
        lines['copied'].append(name)
      elif _grown(name, found[name].shape, wanted[name].shape):
        new[name] = _graft(found[name], wanted[name])
        lines['grown'].append(name)
      else:
        wrong.append(f'{name} is {list(found[name].shape)} in {folder}, '
                     f'{list(wanted[name].shape)} here')
    report[part] = {'from': str(folder), 'part': source, **lines}
    _log.info('init.%s from %s: %s', part, folder, ', '.join(
        f'{len(names)} {kind}' for kind, names in lines.items() if names))
  if wrong:
    raise errors.UserError(
        f'config.init does not fit the model: {"; ".join(wrong)}. Give the '
        'part the sizes of its parent, or another parent.')
  return new, report


def check_vocabulary(params, parents, tokenizer):
  """Checks that what is learnt of a vocabulary keeps its meaning.

  Args:
    params: {name: array} of the new run.
    parents: as in `inherit`.
    tokenizer: of the new run.

  Raises:
    UserError: a part with rows of the vocabulary comes from a run whose
      tokenizer is neither this one nor the beginning of it.
  """
  for part, folder in parents.items():
    if not any(_VOCABULARY.search(name) and part in (ALL, _top(name))
               for name in params):
      continue
    stored = checkpoint.tokenizer_bytes(folder)
    if stored == tokenizer.bytes:
      continue
    old = text.Tokenizer.from_bytes(stored)
    ids = range(min(old.vocab_size, tokenizer.vocab_size))
    other = sum(a != b for a, b in zip(old.pieces(ids), tokenizer.pieces(ids)))
    if other or old.vocab_size > tokenizer.vocab_size:
      raise errors.UserError(
          f'config.init.{part}: {folder} was trained with another tokenizer: '
          f'{other} of {len(ids)} ids mean something else here. Train both on '
          'corpora with one tokenizer, or leave the part to start afresh.')


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
