"""Rows of experiments as configs: load, override, finalise, lock, hash, diff.

An experiment is a Python file below `experiments/`. It declares

  base(scale)   -> ConfigDict with every field a run needs
  ROWS          {row: {dotted field: value, ..., 'mini': {...}, 'paper': {...}}}
  STAGES        {stage: {dotted field: value, ...}}      (optional; may hold
                'mini' and 'paper' as rows do)
  TABLE         what `mmgen.table` prints                (optional)

A stage is a run and a row is a chain of runs. Without `STAGES` a row is one
run, named `train`. A row's nested dicts are conditional: 'mini' and 'paper'
apply at that scale, the name of a stage applies in that stage, and
`'stages': (...)` picks a row's own chain. Every stage after the first starts
from the parameters of the one before it (`init.all`); what else it starts from
stands in the row's dict of that stage. Other runs are named by
`init.<part>='run:<address>'`, whose part has the same name there, or that
behind a #, as in `init.teacher='run:warm_starts:clip#vision'`. Published
weights, and folders of runs, are named by their path from the current folder:
`init.teacher='file:weights/clip-vit-large-patch14-336#vision'`.

A run is addressed `<experiment>:<row>[:<stage>]`, for instance
`quickstart:patches` (the last stage, if none is named) or
`my_ablation.py:wide`. The order in which fields are set is

  base(scale) -> stage -> row -> row at this scale -> row in this stage
  -> command line -> finalise -> lock.

A run's key hashes what decides what it learns: its config with the model's
defaults, its seed, `RESULT_VERSION`, the keys of its parents and files, and the
manifests of its data. Two rows with an equal prefix of stages therefore share
those runs on disk. How a finished run is scored has a key of its own, so that
other or newer evaluators ask for another evaluation and not for another
training.
"""

import argparse
import dataclasses
import hashlib
import json
import os

from etils import epath
import jax
import ml_collections

from mmgen import addresses
from mmgen import errors
from mmgen import fields as fields_lib
from mmgen.data import corpora
from mmgen.data import mixture
from mmgen.evaluators import common as evaluation
from mmgen.models import clip
from mmgen.models import multimodal
from mmgen.training import optimizer as optimizer_lib
from mmgen.weights import files as files_lib

# Raised whenever a change to the code changes what an unchanged config learns;
# the test of the golden metrics demands it. For its scores there is
# `evaluators.common.VERSION`.
RESULT_VERSION = 1

SCALES = ('mini', 'paper')
# Below these, a row or the command line may add a field that `base` lacks:
# whoever reads them knows which fields there are.
_OPEN = ('mix', 'model', 'objective', 'init', 'optimizer.groups', 'evaluators')
# The entries of these have names of the user's choice: setting one field of an
# entry makes the entry.
_ENTRIES = ('mix', 'optimizer.groups', 'evaluators')
# Fields that each entry of these must have.
_REQUIRED = {'mix': ('corpus', 'quota'), 'evaluators': ('name', 'corpus')}
# The least value of whole numbers.
_LEAST = dict(steps=1, log_every=1, checkpoint_every=1, eval_every=0)
DTYPES = ('float32', 'bfloat16')
# Fields that cannot change a number: they stay out of a run's key. Neither can
# evaluators, unless the run is followed while it learns (`eval_every`).
_SILENT_FIELDS = ('name', 'log_every', 'checkpoint_every', 'mesh.slice')
# What evaluators read of a config, beside their entries and the model.
_EVALUATED = ('evaluators.', 'image.', 'layout.length', 'dtype')
# Bytes of each tensor of a file that its key looks at.
_GLANCE = 4096


# ---------------------------------------------------------------------------
# Loading


def load(address: str, scale: str = 'mini', overrides=(), seed=None):
  """Builds the locked config of one run.

  Args:
    address: `<experiment>:<row>[:<stage>]`.
    scale: 'mini' or 'paper'.
    overrides: {dotted field: value}, pairs of them, or strings
      'field=value' as on a command line.
    seed: replaces `config.seed`, when given.

  Returns:
    A locked, finalised `ml_collections.ConfigDict`.

  Raises:
    UserError: an unknown experiment, row, stage, scale or field, or a value
      of another type than the field's.
  """
  if scale not in SCALES:
    raise errors.UserError(
        f'--scale is {scale!r}; allowed: {", ".join(SCALES)}.')
  a = addresses.parse(address)
  module = addresses.experiment(a.experiment)
  row = addresses.row_of(a.experiment, a.row)
  with addresses.blamed(module.__file__):
    config = module.base(scale).unlock()
  chain = addresses.stage_names(a.experiment, a.row)
  stage_fields = getattr(module, 'STAGES', {}).get(a.stage, {})
  conditional = {*SCALES, *chain, 'stages'}
  in_stage = row.get(a.stage, {})
  def apply(*layers):
    for fields in layers:
      for field, value in fields.items():
        if field not in conditional:
          _set(config, field, value, origin=str(a))
  apply(stage_fields, stage_fields.get(scale, {}), row, row.get(scale, {}))
  before = chain[:chain.index(a.stage)]
  if before:  # what a row starts from is the business of its first stage
    config.init = ml_collections.ConfigDict(
        {'all': f'run:{dataclasses.replace(a, stage=before[-1])}'})
  apply(in_stage, in_stage.get(scale, {}))
  if isinstance(overrides, dict):
    overrides = overrides.items()
  for override in overrides:
    field, value = (override.split('=', 1) if isinstance(override, str)
                    else override)
    _set(config, field, value, origin='command line', typed=True)
  if seed is not None:
    config.seed = int(seed)
  return finalise(config, a, scale)


def _set(config, field: str, value, origin: str, typed: bool = False):
  """Sets a dotted field; new ones are only allowed below `_OPEN`."""
  *path, last = field.split('.')
  node = config
  for depth, part in enumerate(path):
    parent = '.'.join(path[:depth])
    if part not in node and parent not in _ENTRIES:
      raise errors.UserError(_unknown(field, parent, part, node, origin))
    if node.get(part) is None:
      node[part] = ml_collections.ConfigDict()
    node = node[part]
    if not isinstance(node, ml_collections.ConfigDict):
      raise errors.UserError(
          f'{origin}: {field}: {".".join(path[:depth + 1])} is a value, it has '
          f'no field {(path + [last])[depth + 1]!r}.')
  parents_of_field = ['.'.join(path[:i + 1]) for i in range(len(path))]
  if last not in node and not set(parents_of_field) & set(_OPEN):
    raise errors.UserError(_unknown(field, '.'.join(path), last, node, origin))
  if isinstance(value, dict):
    node[last] = ml_collections.ConfigDict(value)
    return
  if typed:
    value = _typed(field, value, node.get(last))
  elif last in node and not _same_type(node[last], value):
    raise errors.UserError(
        f'{origin}: {field} is {value!r} ({type(value).__name__}); the base '
        f'config has {_kind(node[last])}.')
  with node.ignore_type():
    node[last] = value


def _unknown(field, parent, part, node, origin):
  where = f'config.{parent}' if parent else 'config'
  return (f'{origin}: no field {field!r}: {where} has no {part!r}.'
          f'{errors.nearest(part, node)} It has: {", ".join(sorted(node))}.')


def _kind(old) -> str:
  """Says in one line what a field holds."""
  if isinstance(old, ml_collections.ConfigDict):
    return f'a group of fields: {", ".join(sorted(old)) or "none so far"}'
  name = type(old).__name__
  return f'{"an" if name == "int" else "a"} {name} such as {old!r}'


def _same_type(old, new) -> bool:
  if old is None or new is None:
    return True
  if isinstance(old, float) and isinstance(new, int):
    return not isinstance(new, bool)
  if isinstance(old, (tuple, list)):
    return isinstance(new, (tuple, list))
  return isinstance(new, type(old)) and isinstance(old, bool) == isinstance(
      new, bool)


def _typed(field: str, text, old):
  """Reads a command-line value as the type that the field already has."""
  if not isinstance(text, str):
    value = text
  elif isinstance(old, str):
    return text
  else:
    plain = {'True': 'true', 'False': 'false', 'None': 'null'}.get(text, text)
    if plain.startswith('(') and plain.endswith(')'):  # as errors show a tuple
      plain = f'[{plain[1:-1].rstrip(", ")}]'
    try:
      value = json.loads(plain)
    except json.JSONDecodeError:
      value = text
  if isinstance(value, list):
    value = tuple(value)
  if not _same_type(old, value):
    raise errors.UserError(
        f'--config.{field}={text}: expected {_kind(old)}.')
  return float(value) if isinstance(old, float) and value is not None else value


def finalise(config, address: addresses.Address, scale: str):
  """Adds derived fields, checks those that depend on each other, locks."""
  config.name = str(address)
  config.scale = scale
  if not config.mix:
    raise errors.UserError(f'{address}: config.mix names no source.')
  for group, fields in _REQUIRED.items():
    _check_entries(address, group, config[group], fields)
  try:
    mixture.read(config.mix)
    fields_lib.read(optimizer_lib.Options, 'optimizer', config.optimizer)
  except errors.UserError as error:
    raise errors.UserError(f'{address}: config.{error}') from error
  size = tuple(config.image.size)
  if len(size) != 2 or not all(type(x) is int and x > 0 for x in size):
    raise errors.UserError(
        f'{address}: config.image.size is {size}; expected rows and columns of '
        'pixels, such as (32, 32).')
  for part, origin in config.init.items():
    named = isinstance(origin, str)
    if not named or not origin.startswith(('run:', 'file:')):
      raise errors.UserError(
          f'{address}: config.init.{part} is '
          f'{repr(origin) if named else _kind(origin)}; allowed: '
          "'run:<experiment>:<row>[:<stage>][#part]' or 'file:<path>[#part]'.")
  for field, least in _LEAST.items():
    if not isinstance(config[field], int) or config[field] < least:
      raise errors.UserError(
          f'{address}: config.{field} is {config[field]}; allowed: {least} or '
          'more.')
  if config.dtype not in DTYPES:
    raise errors.UserError(
        f'{address}: config.dtype is {config.dtype!r}; allowed: '
        f'{", ".join(DTYPES)}.')
  image_layout(config)  # raises on a model that cannot be built
  return config.lock()


def _check_entries(address, group: str, entries, fields):
  """Raises a UserError if an entry of a group lacks one of some fields."""
  for name, entry in entries.items():
    for field in fields:
      if not isinstance(entry, ml_collections.ConfigDict) or (
          entry.get(field) is None):
        others = [other for other in entries if other != name]
        raise errors.UserError(
            f'{address}: config.{group}.{name}.{field} is missing.'
            f'{errors.nearest(name, others)}')


# ---------------------------------------------------------------------------
# Parents, keys, folders


def parents(config) -> dict[str, tuple[str, int]]:
  """Returns {part: (address, seed)} for every `init.<part>='run:...'`.

  The seed of a parent is the child's. So it is for warm starts: seeds that
  shared one would not be independent, and intervals over them too narrow.
  """
  found = {}
  for part, origin in config.init.items():
    if origin.startswith('run:'):
      a = addresses.parse(origin.removeprefix('run:').partition('#')[0])
      found[part] = (str(a), config.seed)
  return found


def files(config) -> dict[str, epath.Path]:
  """Returns {part: path} for every `init.<part>='file:...'`."""
  return {part: epath.Path(origin.removeprefix('file:').partition('#')[0])
          for part, origin in config.init.items()
          if origin.startswith('file:')}


def source_parts(config) -> dict[str, str]:
  """Returns {part: its name in the run or file that it starts from}."""
  return {part: origin.partition('#')[2] or part
          for part, origin in config.init.items()}


def flatten(config) -> dict[str, object]:
  """Returns {dotted field: value}, sorted, with tuples as lists."""
  flat = {}
  def visit(prefix, node):
    if isinstance(node, (ml_collections.ConfigDict, dict)):
      for key in node:
        visit(f'{prefix}.{key}' if prefix else key, node[key])
    else:
      flat[prefix] = list(node) if isinstance(node, tuple) else node
  visit('', config)
  return dict(sorted(flat.items()))


def unflatten(flat: dict[str, object]):
  """Inverts `flatten`; lists become tuples. The config is locked."""
  config = ml_collections.ConfigDict()
  for field, value in flat.items():
    node, (*path, last) = config, field.split('.')
    for part in path:
      if part not in node:
        node[part] = ml_collections.ConfigDict()
      node = node[part]
    node[last] = tuple(value) if isinstance(value, list) else value
  for part in ('init', 'evaluators'):  # an empty dict leaves no flat field
    if part not in config:
      config[part] = ml_collections.ConfigDict()
  return config.lock()


def diff(a, b) -> dict[str, tuple]:
  """Returns {field: (value in a, value in b)} where two configs differ."""
  a, b = flatten(a), flatten(b)
  return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys())
          if a.get(k) != b.get(k)}


def _digest(*content) -> str:
  """Returns 12 hex digits over plain values."""
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def _settings(config) -> dict[str, object]:
  """Returns the fields of a dataclass that are not at their default.

  An option that is added later changes no key.
  """
  found = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      found[field.name] = _settings(value)
    elif value != field.default:
      found[field.name] = value
  return found


def _manifests(entries, data_dir) -> dict[str, dict]:
  """Returns {corpus: manifest} of sources or evaluators."""
  return {entry.corpus: corpora.manifest(data_dir, entry.corpus)
          for entry in entries.values()}


def file_key(path) -> str:
  """Returns 12 hex digits that name what weights, or the folder of a run, hold.

  Of weights these are the names, dtypes and shapes of their tensors, the first
  bytes of each, and the sizes of their files; where they lie does not count. A
  change further into a tensor, or within one that is compressed in its archive,
  leaves no mark if the size stays: weights that were trained on change
  throughout, an edit by hand may not. Of a run it is its config, and the sizes
  of the files of its checkpoints.

  Raises:
    UserError: there are no weights that can be read.
  """
  path = epath.Path(path)
  if (path / 'checkpoints').exists():
    sizes = [(folder / name).stat().length for part in ('checkpoints', 'frozen')
             for folder, _, names in (path / part).walk() for name in names]
    config = path / 'config.json'
    return _digest(config.read_text() if config.exists() else '', sorted(sizes))
  tensors = files_lib.open(path)
  found = {}
  for name, tensor in tensors.items():
    glance = ''
    if tensor.member is None:
      with tensor.file.open('rb') as file:
        file.seek(tensor.offset)
        glance = file.read(min(tensor.nbytes, _GLANCE)).hex()
    found[name] = str(tensor.dtype), tensor.shape, glance
  sizes = {tensor.file: tensor.file.stat().st_size
           for tensor in tensors.values()}
  return _digest(found, sorted(sizes.values()))


def _file_keys(config) -> dict[str, str]:
  """Returns {part: key} of `files`."""
  found = {}
  for part, path in files(config).items():
    try:
      found[part] = file_key(path)
    except errors.UserError as error:
      raise errors.UserError(f'config.init.{part}: {error}') from error
  return found


def run_key(config, data_dir) -> str:
  """Returns 12 hex digits that name what a run will learn.

  Args:
    config: a locked config.
    data_dir: folder of the prepared corpora, whose manifests count.

  Raises:
    UserError: a corpus is not prepared, or a file cannot be read.
  """
  data = _manifests(config.mix, data_dir)  # first: without it, nothing helps
  flat = {k: v for k, v in flatten(config).items()
          if k not in _SILENT_FIELDS
          and not k.startswith(('init.', 'evaluators.'))}
  ancestors = {
      part: run_key(load(address, config.scale, seed=seed), data_dir)
      for part, (address, seed) in parents(config).items()}
  # What a published size stands for counts too: if it is mended, it is
  # another model.
  model = _settings(build_model(config, vocab=1).config)
  followed = evaluation_key(config, data_dir) if config.eval_every else ''
  return _digest(flat, model, ancestors, _file_keys(config),
                 source_parts(config), RESULT_VERSION, data, followed)


def evaluation_key(config, data_dir) -> str:
  """Returns 12 hex digits that name how a run's parameters are scored.

  Args:
    config: a locked config.
    data_dir: folder of the prepared corpora, whose manifests count.

  Raises:
    UserError: a corpus is not prepared.
  """
  flat = {k: v for k, v in flatten(config).items() if k.startswith(_EVALUATED)}
  return _digest(flat, evaluation.VERSION,
                 _manifests(config.evaluators, data_dir))


def run_folder(config, workdir, data_dir) -> epath.Path:
  """Returns the run's folder: the one with its key, or a new readable name.

  A row that learns the same as another one shares its folder, and its name.

  Raises:
    UserError: `workdir` is a file, or a corpus is not prepared.
  """
  key = run_key(config, data_dir)
  workdir = epath.Path(workdir)
  if workdir.exists():
    if not workdir.is_dir():
      raise errors.UserError(
          f'--workdir={workdir} is a file; give a folder, or the name of a new '
          'one.')
    try:
      there = list(workdir.iterdir())
    except OSError as error:
      raise errors.UserError(
          f'--workdir={workdir} cannot be read: {error.strerror}. Give another '
          'folder.') from error
    for path in there:
      if path.name.endswith(f'-{key}'):
        return path
  name = config.name.replace('/', '.').replace(':', '.').lstrip('.')
  return workdir / f'{name}.{config.scale}.s{config.seed}-{key}'


# ---------------------------------------------------------------------------
# Models


def build_model(config, vocab=None):
  """Makes the model that a config describes.

  Args:
    config: a config with `model` and `dtype`.
    vocab: rows of the text embedding; None if only its pictures matter.

  Raises:
    UserError: a wrong name or field, or sizes that do not fit each other.
  """
  if config.model.name not in BUILDERS:
    raise errors.UserError(
        f'config.model.name is {config.model.name!r}; allowed: '
        f'{", ".join(BUILDERS)}.')
  try:
    return BUILDERS[config.model.name](config, vocab)
  except ValueError as error:
    raise errors.UserError(f'{config.name}: config.{error}') from error


def image_layout(config):
  """Returns how the model turns a picture into slots; None for text alone."""
  model = build_model(config, vocab=1).config
  try:
    return model.vision and model.image_layout(tuple(config.image.size))
  except ValueError as error:
    raise errors.UserError(f'{config.name}: config.{error}') from error


def parameter_shapes(config, model):
  """Returns the tree of a model's parameters, as ShapeDtypeStructs.

  Args:
    config: with `model.name` and `image.size`.
    model: of `build_model`.
  """
  example = EXAMPLES[config.model.name](model.config, tuple(config.image.size))
  return jax.eval_shape(model.init, jax.random.key(0), example)['params']


BUILDERS = {'multimodal': multimodal.build, 'clip': clip.build}
# The smallest batch that creates all parameters.
EXAMPLES = {'multimodal': multimodal.example_batch, 'clip': clip.example_batch}


# ---------------------------------------------------------------------------
# Command line


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the arguments that every command with a config shares."""
  parser.add_argument(
      '--config', required=True, metavar='ROW',
      help='<experiment>:<row>[:<stage>], for instance quickstart:patches; '
      'any field is set with --config.<field>=<value>')
  parser.add_argument('--scale', default='mini', choices=SCALES,
                      help='size of the run (default: %(default)s)')
  parser.add_argument('--seed', type=int, default=None,
                      help='initialisation and order of the data')
  add_folders(parser)


def add_folders(parser: argparse.ArgumentParser):
  """Adds --workdir and --data_dir."""
  parser.add_argument('--workdir', default='runs',
                      help='folder of all runs (default: %(default)s)')
  parser.add_argument(
      '--data_dir', default=os.environ.get('MMGEN_DATA', 'data'),
      help='folder of prepared corpora (default: $MMGEN_DATA, else data)')


def from_arguments(args, unknown=()):
  """Returns the config that parsed arguments name.

  Args:
    args: namespace with `config`, `scale`, `seed`.
    unknown: what `parse_known_args` left over: `--config.field=value`.
  """
  overrides, rest = [], list(unknown)
  while rest:
    item = rest.pop(0)
    if not item.startswith('--config.'):
      raise errors.UserError(f'unknown argument {item!r}; see --help.')
    item = item.removeprefix('--config.')
    if '=' not in item:
      if not rest:
        raise errors.UserError(f'--config.{item} has no value.')
      item = f'{item}={rest.pop(0)}'
    overrides.append(item)
  return load(args.config, args.scale, overrides, args.seed)
