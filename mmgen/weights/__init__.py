"""Published weights in and out: `load` opens what others have trained.

  loaded = weights.load('clip-vit-base-patch32')
  image_BE, _ = loaded.model.apply(
      {'params': loaded.params}, images_BYXC, method='encode_image')
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import json
import pathlib
from typing import Any

import flax.traverse_util
import jax

from mmgen import errors
from mmgen.data import text
from mmgen.weights import assembly
from mmgen.weights import files
from mmgen.weights import layout as layout_lib
from mmgen.weights import lora
from mmgen.weights import two_towers

FAMILIES = assembly.FAMILIES
attach, merge, dtypes_in = assembly.attach, assembly.merge, assembly.dtypes_in

# The one leaf that belongs to a grid of patches.
POSITIONS = 'vision/position_embedding'

BESIDE = ('config.json', 'open_clip_config.json', 'preprocessor_config.json',
          lora.CONFIG)
# In this order they are looked for beside weights.
TOKENIZERS = ('tokenizer.json', 'tokenizer.model', 'spiece.model')


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
  """A published model, ready for use.

  Attributes:
    model: the module; its config is `model.config`.
    params: nested dict of its parameters.
    image: how a picture becomes pixels: size, fit, kernel, mean, std. The
      model itself applies mean and std.
    layout: a name of `FAMILIES`.
    dtypes: {their name: dtype} of the file, in which export writes; float32
      for float64, which parameters are rounded from.
    beside: {name: content} of the JSON files that lay beside it.
    report: [(our name, their names, our shape, their dtypes)].
    left: names of tensors in the file that were not taken.
    read_tokenizer: function that returns `tokenizer`.
  """
  model: Any
  params: Any
  image: dict
  layout: str
  dtypes: dict
  beside: dict
  report: list
  left: list = dataclasses.field(default_factory=list)
  read_tokenizer: Callable[[], Any] = lambda: None

  @functools.cached_property
  def tokenizer(self):
    """That beside the weights, or None; a UserError if it is not theirs."""
    return self.read_tokenizer()


def recognise(path, said=None):
  """Tells from contents what a file or folder of weights is.

  Args:
    path: as for `files.open`.
    said: {field: value} of what contents cannot tell, such as {'mlp': 'gelu'}
      for CLIP without a config; an error names what is needed. An image size
      of another grid than the file's does not count here.

  Returns:
    (a name of `FAMILIES`, config of the model that is stored).

  Raises:
    UserError: it is no known layout, or something has to be said.
  """
  return _recognise(path, files.open(path), _beside(path), said or {})


def load(path, *, place=None, dtype='float32', said=None):
  """Loads a published model.

  Args:
    path: of a file, an index of shards, or a folder.
    place: function from {our name: ShapeDtypeStruct} to {our name: Sharding},
      such as `functools.partial(training.sharding.shardings, mesh)`; by default
      all goes to the first device.
    dtype: of the parameters and of the computation.
    said: as for `recognise`; the positions of an image tower are resized to
      a 'vision.image_size' that is not the file's, as its reference does it.

  Returns:
    A `Loaded`.

  Raises:
    UserError: the file is damaged, of no known layout, or does not fit its
      model; nothing is loaded then.
  """
  tensors, beside = files.open(path), _beside(path)
  name, config = _recognise(path, tensors, beside, said or {})
  layout = FAMILIES[name]
  model, ours = layout.build(config, dtype)
  rules = layout.rules(config)
  left = layout_lib.check(rules, tensors, ours, layout.ignored, str(path))
  wanted = _resized(config, said or {})
  if wanted != config:
    rules = layout_lib.resized(rules, POSITIONS, layout.resize,
                               config.vision.grid, wanted.vision.grid)
    beside = two_towers.restated(beside, wanted.vision.image_size)
    config = wanted
    model, ours = layout.build(config, dtype)
  if place is not None:
    where = place(ours)
    ours = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype,
                                       sharding=where[name])
            for name, leaf in ours.items()}
  params = layout_lib.load(rules, tensors, ours)
  folder = _folder(path)
  file = next((folder / file for file in TOKENIZERS
               if (folder / file).exists()), None)
  return Loaded(
      model=model, params=flax.traverse_util.unflatten_dict(params, sep='/'),
      image=_image(path, name, config, beside),
      read_tokenizer=lambda: file and open_tokenizer(file, name, config),
      layout=name, dtypes={name: jax.dtypes.canonicalize_dtype(t.dtype)
                           for name, t in tensors.items()},
      beside=beside, report=layout_lib.report(rules, tensors, ours), left=left)


def recognise_shapes(layout, config, params, beside):
  """The config that a layout reads off a model and JSON files beside it."""
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  rules = FAMILIES[layout].rules(config)
  _check_names(layout, rules, flat)
  tensors = {name: jax.ShapeDtypeStruct(shape, 'float32') for name, shape in
             layout_lib.expected(rules, flat).items()}
  return FAMILIES[layout].recognise(tensors, beside, {})


def open_tokenizer(path, layout, config):
  """Opens the tokenizer of a published model.

  Args:
    path: of its file.
    layout: a name of `FAMILIES`, which tells its special pieces; None for a
      file that tells them itself.
    config: of the model.

  Raises:
    UserError: the file cannot be read, or is that of another model.
  """
  family = FAMILIES[layout].of('family', config) if layout else None
  try:
    found = text.load(path, family)
  except (OSError, ValueError) as error:
    raise errors.UserError(
        f'the tokenizer {path} cannot be read: {error}. Give another with '
        '--tokenizer=PATH, or none: --tokenizer=') from error
  rows = (config.text if hasattr(config, 'text') else config.decoder).vocab
  if found.vocab_size > rows:
    raise errors.UserError(
        f'the tokenizer {path} has {found.vocab_size} ids, and the model '
        f'{rows} embeddings: it is that of another model. Give the right one '
        'with --tokenizer=PATH, or none: --tokenizer=')
  return found


def answers(path, said):
  """Takes from `said` what weights do not tell themselves: {field: value}.

  So one dict serves for a model of several files.
  """
  try:
    recognise(path)
  except errors.Unsaid as error:
    return {field: said.pop(field) for field in error.fields if field in said}
  return {}


def export(layout, config, params, dtypes):
  """Yields (their name, array), for `files.write`.

  Args:
    layout: a name of `FAMILIES`.
    config: of the model.
    params: nested dict of its parameters.
    dtypes: {their name: dtype}, or one for all.

  Raises:
    UserError: the model has parameters for which that layout has no names.
  """
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  rules = FAMILIES[layout].rules(config)
  _check_names(layout, rules, flat)
  return layout_lib.export(rules, flat, dtypes)


def _check_names(layout, rules, flat):
  """Raises UserError unless a layout has names for all parameters."""
  differ = flat.keys() ^ {name for rule in rules for name in rule.ours}
  if differ:
    own = any(name.startswith('lora/') for name in differ & flat.keys())
    raise errors.UserError(
        f'the layout {layout} cannot hold this model: '
        f'{", ".join(sorted(differ))}.' + own * (
            ' Merge its adapters (--merge), or write them alone '
            '(--layout=peft).'))


def _recognise(path, tensors, beside, said):
  for name, layout in FAMILIES.items():
    with _reading(path, name, beside):
      config = layout.recognise(tensors, beside, said)
    if config is not None:
      return name, config
  some = ', '.join(sorted(tensors)[:4])
  raise errors.UserError(
      f'{path} is of no layout known here ({", ".join(FAMILIES)}): it has '
      f'{some} and {len(tensors)} tensors in all.')


def _image(path, name, config, beside):
  """How a picture becomes pixels, as the JSON files say it."""
  with _reading(path, name, beside):
    image = FAMILIES[name].image(config, beside)
    if not all(type(pixels) is int and 0 < pixels < 2**14
               for pixels in image.get('size', ())):
      raise ValueError(f'pictures of {image["size"]} pixels')
    return image


@contextlib.contextmanager
def _reading(path, name, beside):
  """Turns what JSON files of another kind cause into a UserError."""
  try:
    yield
  except (ArithmeticError, LookupError, TypeError, ValueError,
          AttributeError) as error:
    if not beside:
      raise
    raise errors.UserError(
        f'{" or ".join(beside)} beside {path} is not as {name} has it: '
        f'{error!r}.') from error


def _resized(config, said):
  """The config with the image size that is said."""
  size = said.get('vision.image_size')
  if size is None or tuple(size) == tuple(config.vision.image_size):
    return config
  try:
    return dataclasses.replace(config, vision=dataclasses.replace(
        config.vision, image_size=tuple(size)))
  except ValueError as error:
    raise errors.UserError(str(error)) from error


def _folder(path):
  path = pathlib.Path(path)
  return path if path.is_dir() else path.parent


def _beside(path):
  """{name: content} of the JSON files that lie beside weights."""
  found = {}
  for name in BESIDE:
    file = _folder(path) / name
    if file.exists():
      try:
        found[name] = json.loads(file.read_text())
      except (ValueError, RecursionError) as error:
        raise errors.UserError(f'{file} is broken: {error}.') from error
  return found
