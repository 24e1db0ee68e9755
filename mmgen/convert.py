"""Converts published weights into a run folder, and back.

  python -m mmgen.convert --from=clip-vit-base-patch32 --to=runs/clip
  python -m mmgen.convert --from=runs/clip --to=exported
  python -m mmgen.convert --from=b.pt --say=mlp=quick_gelu --to=b.safetensors

Published weights become the checkpoint and the config of a run folder, in
float32. A run folder, or a --to that ends in .safetensors, becomes safetensors
in the layout, and each tensor in the dtype, that the weights came in.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np

from mmgen import config as config_lib
from mmgen import errors
from mmgen import run_folder
from mmgen import weights
from mmgen.models import clip
from mmgen.training import checkpoint
from mmgen.weights import files

_DTYPES = ('float32', 'bfloat16', 'float16')


def to_run(loaded, folder, source):
  """Writes a published model as a run folder with one checkpoint, step 0.

  Args:
    loaded: a `weights.Loaded`.
    folder: that does not exist yet.
    source: path of the weights, for the record.

  Raises:
    UserError: the model is no CLIP.
  """
  if not isinstance(loaded.model, clip.Clip):
    raise errors.UserError(
        f'{source} has the layout {loaded.layout}, of which no run folder can '
        'be made yet, only of those of a CLIP. Load it with '
        'mmgen.weights.load, or write it anew with a --to that ends in '
        '.safetensors.')
  flat = _flat_config(loaded)
  notes = dict(source=str(source), layout=loaded.layout, beside=loaded.beside,
               dtypes={name: dtype.name
                       for name, dtype in loaded.dtypes.items()})
  checkpointer = checkpoint.Checkpointer(folder)
  checkpointer.save(0, {'params': loaded.params},
                    dict(config=flat, weights=notes), b'')
  checkpointer.close()
  with checkpoint.writing(folder):
    path = pathlib.Path(folder)
    (path / 'config.json').write_text(json.dumps(flat, indent=1) + '\n')
    (path / 'weights.txt').write_text(''.join(
        f'{ours} {list(shape)} <- {" ".join(theirs)} ({dtypes})\n'
        for ours, theirs, shape, dtypes in loaded.report))


def _flat_config(loaded):
  """A run's config: every field of the model and of its pictures."""
  model = dataclasses.asdict(loaded.model.config)
  model |= dict(name='clip', size='clip-b32')  # overridden field by field
  image = {name: loaded.image[name] for name in ('size', 'fit', 'kernel')}
  return config_lib.flatten(dict(
      name=f'weights/{loaded.layout}', dtype=model['vision']['dtype'],
      model=model, image=image,
      layout=dict(name='pair', length=model['text']['length'])))


def from_run(folder):
  """Reads a run folder.

  Returns:
    (model config, parameters, notes): notes of `to_run`, {} of a trained run.
  """
  params = checkpoint.load_params(folder)
  config = run_folder.read_config(folder)
  if config.model.name != 'clip':
    raise errors.UserError(
        f'--from={folder} is a model of the kind {config.model.name!r}; no '
        "published layout is known of it yet, only of 'clip'")
  vocab = len(params['text']['token_embedding']['embedding'])
  model = config_lib.build_model(config, vocab)
  return model.config, params, checkpoint.load_extras(folder).get('weights', {})


def export(config, params, notes, to, layout, dtype):
  """Writes parameters in a published layout.

  Args:
    config: of the model.
    params: its parameters.
    notes: layout, dtypes, and JSON files to lay beside, where they came from
      published weights.
    to: path of a .safetensors file or of a folder.
    layout: a name of `weights.FAMILIES`, or None for that of the notes.
    dtype: of all tensors, or None for those of the notes.
  """
  layout = layout or notes.get('layout')
  if layout is None:
    raise errors.UserError('this run was trained here: say --layout, one of '
                           f'{", ".join(weights.FAMILIES)}')
  same = layout == notes.get('layout')
  dtypes = dtype or ({name: np.dtype(x) for name, x in notes['dtypes'].items()}
                     if same else 'float32')
  files.write(to, weights.export(layout, config, params, dtypes),
              metadata={'format': 'pt'})
  if same and pathlib.Path(to).is_dir():
    for name, content in notes['beside'].items():
      (pathlib.Path(to) / name).write_text(json.dumps(content, indent=2) + '\n')


def _said(entries):
  """{'mlp': 'gelu', 'vision.heads': 12} of FIELD=VALUE, values as in JSON."""
  said = {}
  for entry in entries:
    field, equals, value = entry.partition('=')
    if not equals:
      raise errors.UserError(f'--say={entry}: it must be FIELD=VALUE')
    try:
      value = json.loads(value)
    except ValueError:
      pass  # a word
    said[field] = value
  return said


def _parser():
  parser = argparse.ArgumentParser(
      prog='python -m mmgen.convert', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
  add = parser.add_argument
  add('--from', dest='source', required=True, metavar='PATH',
      help='published weights (file, index or folder), or a run folder')
  add('--to', required=True, metavar='PATH',
      help='what to write; it must not exist yet')
  add('--say', action='append', default=[], metavar='FIELD=VALUE',
      help='what the weights cannot tell; an error says what is needed')
  add('--layout', choices=weights.FAMILIES,
      help='to export in (default: what the weights came in)')
  add('--dtype', choices=_DTYPES,
      help='of what is written (default: float32 in a run folder, else as in '
      'the file that the weights came from)')
  return parser


def main(argv=None):
  """Runs the command."""
  args = _parser().parse_args(argv)
  if pathlib.Path(args.to).exists():
    raise errors.UserError(f'--to={args.to} exists already; give another path')
  is_run = (pathlib.Path(args.source) / 'checkpoints').exists()
  single = args.to.endswith('.safetensors')
  if is_run:
    export(*from_run(args.source), args.to, args.layout, args.dtype)
  else:
    dtype = (None if single else args.dtype) or 'float32'
    loaded = weights.load(args.source, said=_said(args.say), dtype=dtype)
    if single:
      notes = dict(layout=loaded.layout, dtypes=loaded.dtypes)
      export(loaded.model.config, loaded.params, notes, args.to, args.layout,
             args.dtype)
    else:
      to_run(loaded, args.to, args.source)
    size = sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
    print(f'{args.source}: {loaded.layout}, {size:,} parameters')
  print(f'{args.to}: written')


if __name__ == '__main__':
  errors.run(lambda: main(sys.argv[1:]))
