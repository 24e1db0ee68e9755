"""Converts published weights into a run folder, and back.

  python -m mmgen.convert --from=clip-vit-base-patch32 --to=runs/clip
  python -m mmgen.convert --from=runs/clip --to=exported
  python -m mmgen.convert --from=b.pt --say=mlp=quick_gelu --to=b.safetensors
  python -m mmgen.convert --from=llava-1.5-7b-hf --to=runs/llava
  python -m mmgen.generate --run=runs/llava --image=fox.png --prompt="What?"
  python -m mmgen.convert --check=llava-1.5-7b-hf

What LLaVA's authors publish lacks its image tower, a CLIP:

  python -m mmgen.convert --from=llava-v1.5-7b \\
      --attach=clip-vit-large-patch14-336 --to=runs/llava
  python -m mmgen.convert --check=llava-v1.5-7b \\
      --attach=clip-vit-large-patch14-336

Published weights become the checkpoint and the config of a run folder, in
float32, with the tokenizer that lies beside them. A run folder, a --to that
ends in .safetensors, and whatever is given a --layout become safetensors in a
published layout, each tensor in the dtype that it came in, but for float64:
that is rounded to float32, and said so; in a folder, beside its tokenizer and
the JSON files by which others know it. --check compares with the library that
the weights are of, see mmgen/parity.py.

Low-rank adapters are kept beside the weights unless --merge folds them in:

  python -m mmgen.convert --from=vicuna-7b --attach=my-lora --to=runs/both
  python -m mmgen.convert --from=runs/both --layout=peft --to=my-lora-again
  python -m mmgen.convert --from=runs/both --merge --to=merged
  python -m mmgen.convert --from=vicuna-7b-v1.5 --attach=llava-v1.5-7b-lora \\
      --attach=clip-vit-large-patch14-336 --to=runs/llava-lora
"""

import argparse
import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
from rich import console as rich_console

from mmgen import config as config_lib
from mmgen import errors
from mmgen import parity
from mmgen import run_folder
from mmgen import stages
from mmgen import weights
from mmgen.data import text
from mmgen.models import clip
from mmgen.models import multimodal
from mmgen.training import checkpoint
from mmgen.weights import described
from mmgen.weights import files
from mmgen.weights import layout as layout_lib
from mmgen.weights import lora

_DTYPES = ('float32', 'bfloat16', 'float16')
# Of a converted decoder; its cache is only as long as a prompt and its answer.
_LENGTH = 4096


def to_run(loaded, folder, source):
  """Writes a published model as a run folder with one checkpoint, step 0.

  Args:
    loaded: a `weights.Loaded`.
    folder: that does not exist yet.
    source: path of the weights, for the record.

  Raises:
    UserError: the weights are not a whole model, or the tokenizer is none that
      is known, or of another model.
  """
  kind = next((kind for kind, module in KINDS.items()
               if isinstance(loaded.model, module)), None)
  config = loaded.model.config
  if kind is None or getattr(config, 'vision', None) and (
      'vision' not in loaded.params):
    raise errors.UserError(
        f'{source} has the layout {loaded.layout}, which is not a whole model. '
        + _what_lacks(loaded, source))
  tokenizer = loaded.tokenizer
  flat = config_lib.flatten(_run_config(loaded, kind))
  notes = dict(source=str(source), layout=loaded.layout, beside=loaded.beside,
               dtypes={name: dtype.name
                       for name, dtype in loaded.dtypes.items()})
  checkpointer = checkpoint.Checkpointer(folder)
  checkpointer.save(0, {'params': loaded.params},
                    dict(config=flat, weights=notes),
                    tokenizer.bytes if tokenizer else b'')
  checkpointer.close()
  with errors.writing(folder):
    path = pathlib.Path(folder)
    (path / 'config.json').write_text(json.dumps(flat, indent=1) + '\n')
    (path / 'weights.txt').write_text(''.join(
        f'{ours} {list(shape)} <- {" ".join(theirs)} ({dtypes})\n'
        for ours, theirs, shape, dtypes in loaded.report))


def _what_lacks(loaded, source):
  """What to do about weights that are not a whole model."""
  if 'lora' in loaded.params and 'decoder' not in loaded.params:
    own = loaded.beside.get(lora.CONFIG, {}).get('base_model_name_or_path')
    return ('They are adapters: give the weights that they were trained on'
            f'{f", {own}," if own else ""} with --from, and them with '
            f'--attach={source}.')
  if 'decoder' in loaded.params:
    return stages.NO_TOWER
  return ("Start a row's parts from it, init.<part>='file:...', load it with "
          'mmgen.weights.load, or write it anew with a --to that ends in '
          '.safetensors.')


def _run_config(loaded, kind):
  """A run's config: every field of the model and of its pictures."""
  config = loaded.model.config
  parts = dataclasses.asdict(config)
  if kind == 'clip':
    model = parts | dict(name=kind, size='clip-b32')  # overridden, every field
    layout = dict(name='pair', length=config.text.length)
  else:
    # The widths that connect parts, and the dtype, follow from the rest.
    model = dict(name=kind) | {
        part: {name: x for name, x in fields.items() if name != 'dtype' and
               (part, name) != ('connector', 'width')}
        for part, fields in parts.items() if fields is not None}
    if config.vision is not None:
      model['vision']['name'] = multimodal.name(config)
    layout = dict(name='sequence', length=_LENGTH, rows=1, documents=1,
                  images=1)
  seen = loaded.image or dict(size=(1, 1), fit='square', kernel='bicubic')
  image = {name: seen[name] for name in ('size', 'fit', 'kernel')}
  style = weights.FAMILIES[loaded.layout].of('style', config)
  return dict(
      name=f'weights/{loaded.layout}', model=model, layout=layout, image=image,
      dtype=(config.text if kind == 'clip' else config.decoder).dtype,
      mix=dict(published=dict(style=style)))


def from_run(folder):
  """Reads a run folder as `weights.load` reads files.

  Returns:
    A `weights.Loaded`; of a run that was trained here, its layout is None.
  """
  params = checkpoint.load_params(folder)
  config = run_folder.read_config(folder)
  vocab = len(params['text']['token_embedding']['embedding']
              if config.model.name == 'clip' else
              params['decoder']['embedding'])
  notes = checkpoint.load_extras(folder).get('weights', {})
  odd = sorted(notes.get('beside', {}).keys() - set(weights.BESIDE))
  if odd:  # paths, perhaps
    raise errors.UserError(f'{folder} has notes of {odd} beside its weights; '
                           f'allowed: {", ".join(weights.BESIDE)}.')
  stored = checkpoint.tokenizer_bytes(folder)
  model = config_lib.build_model(config, vocab)
  vision = model.config.vision
  image = vision and config.get('image') and dict(
      config.image.items(), mean=vision.mean, std=vision.std)
  return weights.Loaded(
      model=model, params=params, image=image or {},
      read_tokenizer=lambda: (text.Tokenizer.from_bytes(stored) if stored
                              else None),
      layout=notes.get('layout'), dtypes={
          name: np.dtype(x) for name, x in notes.get('dtypes', {}).items()},
      beside=notes.get('beside', {}), report=[])


def export(loaded, to, layout=None, dtype=None):
  """Writes a model in a published layout.

  Args:
    loaded: a `weights.Loaded`.
    to: path of a .safetensors file or of a folder.
    layout: a name of `weights.FAMILIES`, 'peft' for adapters alone; by default
      its own.
    dtype: of all tensors; by default that of each in the file that it came
      from.

  Returns:
    Parts of the model that were left out.
  """
  layout, to = layout or loaded.layout, pathlib.Path(to)
  if layout is None:
    raise errors.UserError('this run was trained here: say --layout, one of '
                           f'{", ".join(weights.FAMILIES)}')
  if layout == 'peft':
    return _export_adapters(loaded, to, dtype)
  beside = {} if to.suffix == '.safetensors' else _describe(loaded, layout)
  files.write(
      to, weights.export(layout, loaded.model.config, loaded.params,
                         dtype or weights.dtypes_in(loaded, layout)),
      metadata={'format': 'pt'})
  if to.is_dir():
    _write_beside(beside, to)
    for name, content in (loaded.tokenizer.files if loaded.tokenizer else {}
                          ).items():
      (to / name).write_bytes(content)
  return []


def _describe(loaded, layout):
  """{name: content} of the JSON files to lay beside a model in a layout.

  Those that it came with, else such that nothing has to be said of it again.

  Raises:
    UserError: the layout's files cannot say what this model is.
  """
  if layout == loaded.layout and loaded.beside:
    return loaded.beside
  config, family = loaded.model.config, weights.FAMILIES[layout]
  made = described.files(layout, config, loaded.image, loaded.tokenizer)
  if not made:
    print(f'the layout {layout} has no JSON files here: what its tensors do '
          'not tell must be said again')
    return {}
  wrong = described.differences(
      config, weights.recognise_shapes(layout, config, loaded.params, made))
  if wrong:
    raise errors.UserError(f'the layout {layout} cannot say that '
                           f'{"; ".join(wrong)}.')
  read = family.image(config, made)
  for field in ('fit', 'kernel'):
    if loaded.image and read[field] != loaded.image[field]:
      print(f'in the layout {layout} pictures have the {field} {read[field]!r}'
            f', not {loaded.image[field]!r}')
  return made


def _export_adapters(loaded, to, dtype):
  """As `export`, adapters as PEFT writes them.

  If the connector came beside them, or was trained here as theirs may be, it
  lies there as in the folders of LLaVA's authors.
  """
  config, params = loaded.model.config, loaded.params
  own = (config if isinstance(config, lora.AdapterConfig) else
         lora.describe(config, loaded.layout, loaded.dtypes))
  left = [part for part in params if part != 'lora']
  dtypes = dtype or weights.dtypes_in(loaded, 'peft', own)
  if to.suffix == '.safetensors':
    files.write(to, weights.export('peft', own, {'lora': params['lora']},
                                   dtypes), metadata={'format': 'pt'})
    return left
  lora.export(to, own, params, dtypes, loaded.beside.get(lora.CONFIG))
  dtypes = weights.dtypes_in(loaded, 'llava_trainables')
  if 'connector' in params and (
      dtypes.keys() <= loaded.dtypes.keys()
      or loaded.layout is None and config.connector.name == 'mlp'):
    files.write(to / lora.TRAINABLES, weights.export(
        'llava_trainables', config, {'connector': params['connector']},
        dtype or dtypes))
    left.remove('connector')
    _write_beside(loaded.beside, to)
  return left


def _write_beside(beside, folder):
  """The JSON files beside weights; PEFT's is written with adapters."""
  for name, content in beside.items():
    if name != lora.CONFIG:
      (folder / name).write_text(json.dumps(content, indent=2) + '\n')


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
  add('--from', dest='source', metavar='PATH',
      help='published weights (file, index or folder), or a run folder')
  add('--to', metavar='PATH', help='what to write; it must not exist yet')
  add('--attach', action='append', default=[], metavar='PATH',
      help='what belongs to the weights and lies elsewhere, once for each: '
      "adapters (a folder of PEFT or of LLaVA's authors), a connector "
      '(mm_projector.bin), the CLIP of an image tower')
  add('--merge', action='store_true',
      help='fold adapters into the weights that they stand beside')
  add('--say', action='append', default=[], metavar='FIELD=VALUE',
      help='what the weights cannot tell; an error says what is needed')
  add('--tokenizer', metavar='PATH',
      help='a tokenizer.json or tokenizer.model, or nothing (default: that '
      'beside the weights, or of the run)')
  add('--layout', choices=weights.FAMILIES, metavar='LAYOUT',
      help='write weights in this layout, not a run folder (default: what the '
      'weights came in). peft: adapters alone; else one of '
      + ', '.join(name for name in weights.FAMILIES if name != 'peft'))
  add('--dtype', choices=_DTYPES,
      help='of what is written (default: float32 in a run folder, else as in '
      'the file that the weights came from)')
  add = parser.add_argument_group('in place of --from and --to').add_argument
  add('--check', metavar='PATH',
      help='published weights, to compare stage by stage with the library they '
      "come from (pip install 'mmgen[parity]'); exit code 1 if they differ")
  add('--tolerance', type=float, default=parity.TOLERANCE,
      help='largest relative error that passes (default: %(default)s)')
  add('--stages', metavar='FILE.npz',
      help='write our inputs and stages, for a reference that runs elsewhere')
  add('--against', metavar='FILE.npz',
      help='compare with its stages, of the same names')
  return parser


def main(argv=None):
  """Runs the command; returns an exit code or None."""
  parser = _parser()
  args = parser.parse_args(argv)
  if (args.check is None) == (args.source is None and args.to is None) or (
      (args.source is None) != (args.to is None)):
    parser.error('give --from and --to, or --check')
  if args.check is not None:
    if args.merge:
      parser.error('--merge is for --from and --to')
    return parity.check(
        args.check, rich_console.Console(), said=_said(args.say),
        attached=args.attach, tolerance=args.tolerance, stages=args.stages,
        against=args.against)
  if pathlib.Path(args.to).exists():
    raise errors.UserError(f'--to={args.to} exists already; give another path')
  is_run = (pathlib.Path(args.source) / 'checkpoints').exists()
  out = is_run or args.layout or args.to.endswith('.safetensors')
  loaded = _open(args, is_run, (None if out else args.dtype) or 'float32')
  left = []
  if out:
    left = export(loaded, args.to, args.layout, args.dtype)
  else:
    to_run(loaded, args.to, args.source)
  wide = sum('float64' in dtypes for *_, dtypes in loaded.report)
  if wide:
    print(f'{args.source}: {wide} of {len(loaded.report)} arrays were of '
          f'float64 and are rounded to {args.dtype or "float32"}')
  kind = loaded.layout or 'trained here'
  size = sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
  print(f'{args.source}: {kind}, {size:,} parameters')
  if loaded.left:
    print(f'{args.source}: {len(loaded.left)} tensors are not taken, for the '
          'rest tells them or nothing reads them: ' + layout_lib.shown(
              loaded.left, weights.FAMILIES[loaded.layout].ignored))
  print(f'{args.to}: written'
        + (f', without {", ".join(left)}' if left else ''))
  return 0


def _open(args, is_run, dtype):
  """The model that a command speaks of: all its files, adapters as asked for.

  Args:
    args: of the command.
    is_run: whether --from is a run folder.
    dtype: of its parameters.

  Returns:
    A `weights.Loaded`.
  """
  said, others = _said(args.say), []
  for path in map(pathlib.Path, args.attach):
    beside = path / lora.TRAINABLES  # load opens one file of a folder
    for file in (path, beside) if (path / lora.CONFIG).exists() and (
        beside.exists()) else (path,):
      others.append(weights.load(
          file, said=weights.answers(file, said), dtype=dtype))
  loaded = (from_run(args.source) if is_run else
            weights.load(args.source, said=said, dtype=dtype))
  loaded = weights.attach(loaded, *others) if others else loaded
  if args.tokenizer is not None:
    layout, config = loaded.layout, loaded.model.config
    loaded = dataclasses.replace(
        loaded, read_tokenizer=lambda: weights.open_tokenizer(
            args.tokenizer, layout, config) if args.tokenizer else None)
  return weights.merge(loaded) if args.merge else loaded


# Of what a run folder can be made, by `config.model.name`.
KINDS = {'clip': clip.Clip, 'multimodal': multimodal.MultimodalDecoder}


if __name__ == '__main__':
  errors.run(lambda: main(sys.argv[1:]))
