"""Whether published weights give here what they give in their own library.

  python -m mmgen.convert --check=clip-vit-base-patch32
  python -m mmgen.convert --check=EVE-7B --stages=ours.npz
  python -m mmgen.convert --check=EVE-7B --against=theirs.npz

The same pictures and token ids go through this model and through that of
transformers, open_clip or timm (`mmgen/references.py`), preprocessing included,
and each stage (`mmgen/stages.py`) is compared. All is computed in float32.

What is on no package index can be run where it lives: `--stages` writes our
inputs ('input/...') and stages, whoever runs the reference on these inputs
writes its stages under the same names, and `--against` compares.

One model is in memory at a time, and the stages of both: some hundred slots by
width and layers. Weights stored in 16 bits stay so, and each block is widened
while it runs: a LLaMA of 1.9 GB took 3.6 GB in all. open_clip's take 32 bits.
"""

import dataclasses
import functools
import gc
import re
import zipfile

import numpy as np
from rich import table as rich_table

from mmgen import errors
from mmgen import references
from mmgen import stages as stages_lib
from mmgen import weights

# What a stage may differ by, of its largest number.
TOLERANCE = 1e-4
# What models return; the first that there is.
_LAST = ('logits', 'vision/embedding')


def check(path, console, *, said=None, attached=(), tolerance=TOLERANCE,
          stages=None, against=None):
  """Prints how far the stages of a model are from those of its reference.

  Args:
    path: as for `weights.load`.
    console: of rich, to print to.
    said: as for `weights.load`, of all files.
    attached: paths of what belongs to the weights and lies elsewhere.
    tolerance: the largest relative error that passes.
    stages: path of an npz file to write; then nothing is compared unless
      `against` is given.
    against: path of an npz file with the stages of the reference.

  Returns:
    Exit code: 1 if a stage is worse than the tolerance, or the last of ours is
    not compared.

  Raises:
    UserError: the reference is not installed or cannot be run here.
  """
  said = dict(said or {})
  others = [(other, weights.answers(other, said)) for other in attached]
  layout, _ = weights.recognise(path, said)
  live = not (stages or against)
  if live:
    references.require(layout)
  theirs = _read(against) if against else None
  loaded = stages_lib.load(path, said, others)
  if live and 'lora' in loaded.params:
    raise errors.UserError(
        'adapters beside weights have no reference here: merge them (--merge) '
        'and check the result, or compare with --stages and --against.')
  inputs = stages_lib.inputs(loaded)
  ours = stages_lib.compute(loaded, inputs)
  if stages:
    np.savez(stages, **{f'input/{k}': v for k, v in inputs.items()}, **ours)
    console.print(f'{stages}: {len(inputs)} inputs, {len(ours)} stages',
                  markup=False, highlight=False)
    if not against:
      return 0
  if live:
    # Of ours only what describes it is needed from here on.
    loaded = dataclasses.replace(loaded, params=None)
    gc.collect()
    theirs = references.REFERENCES[loaded.layout].run(
        path, loaded, inputs, *attached)
  # The norm of these follows an average of patches, which is not computed here.
  last = [name for name in ours if re.fullmatch(r'vision/\d+', name)][-1] if (
      layout == 'timm_eva_avg') else None
  return report(f'{path} ({loaded.layout})', ours, theirs, tolerance, console,
                last)


def report(title, ours, theirs, tolerance, console, last=None):
  """Prints a table of the stages that both have; returns the exit code.

  Args:
    title: printed above.
    ours, theirs: {stage: array}.
    tolerance: the largest relative error that passes.
    console: of rich, to print to.
    last: the stage that has to be among them; by default the logits, or the
      embedding of a tower alone.
  """
  show = functools.partial(console.print, markup=False, highlight=False)
  grid = rich_table.Table()
  grid.add_column('stage', no_wrap=True)
  for column in 'shape', 'largest', 'relative error', '':
    grid.add_column(column, justify='right', no_wrap=True)
  first, worst = None, 0.0
  both = {name: mine for name, mine in ours.items() if name in theirs}
  for name, mine in both.items():
    error = relative_error(mine, theirs[name])
    worst = max(worst, error)
    mark = '' if error <= tolerance else 'worse'
    if mark and first is None:
      first, mark = name, 'first worse'
    if mine.shape != theirs[name].shape:
      mark = f'there {_sizes(theirs[name])}'
    largest = np.abs(theirs[name]).max(initial=0)
    grid.add_row(name, _sizes(mine), f'{largest:.3g}', f'{error:.1e}', mark)
  if not both:
    raise errors.UserError(
        f'there is no stage that both have; here: {", ".join(ours)}; there: '
        f'{", ".join(theirs)}')
  show(title)
  console.print(grid)
  for where, names in (('here', ours), ('there', theirs)):
    if alone := [name for name in names if name not in both]:
      show(f'only {where}: {", ".join(alone)}')
  if first:
    show(f'{first} is the first of {len(both)} stages that is worse than '
         f'{tolerance:g}')
    return 1
  show(f'{len(both)} stages are equal within {worst:.1e}')
  last = last or next((name for name in _LAST if name in ours), [*ours][-1])
  if last not in both:
    show(f'{last} is not among them: of what the model returns nothing is said')
    return 1
  return 0


def _sizes(x):
  return ' x '.join(map(str, x.shape))


def relative_error(ours, theirs):
  """The largest difference over the largest number that is wanted."""
  if ours.shape != theirs.shape:
    return float('inf')
  if not ours.size:
    return 0.0
  theirs = theirs.astype(np.float64)
  error = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30)
  return float(error) if np.isfinite(error) else float('inf')


def _read(path):
  """The stages of an npz file."""
  try:
    with np.load(path) as file:
      return {name: file[name] for name in file
              if not name.startswith('input/')}
  except (OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
    raise errors.UserError(f'--against={path} cannot be read: {error}; it must '
                           'be an npz file of arrays') from error
