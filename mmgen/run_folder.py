"""A trained run, opened from its folder alone."""

import dataclasses
import json
from typing import Any

from etils import epath

from mmgen import config as config_lib
from mmgen import errors
from mmgen.data import text
from mmgen.training import checkpoint
from mmgen.training import sharding


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """A run's newest checkpoint, ready for use.

  Attributes:
    folder: of the run.
    config: its locked config.
    step: of the checkpoint.
    model: the module.
    params: its parameters, trained and frozen.
    tokenizer: that it was trained with.
    image_layout: how a picture becomes slots; None for text alone.
  """

  folder: epath.Path
  config: Any
  step: int
  model: Any
  params: Any
  tokenizer: text.Tokenizer
  image_layout: Any


def read_config(folder):
  """The config of a run.

  Raises:
    UserError: the folder is no run folder, or its `config.json` is broken.
  """
  path = epath.Path(folder) / 'config.json'
  try:
    return config_lib.unflatten(json.loads(path.read_text()))
  except (FileNotFoundError, NotADirectoryError) as error:
    raise errors.UserError(
        f'--run={folder} is no run folder: it has no config.json. Give the '
        'folder that python -m mmgen.train has printed.'
    ) from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise errors.UserError(
        f'{path} is broken ({error!r}); train the run again'
    ) from error


def _compare(folder, wanted, params):
  """Raises a UserError unless a model can read the parameters of its folder.

  Parts that the model does not have belonged to the objective.
  """
  here = {part: params[part] for part in params if part in wanted}
  checkpoint.compare(
      sharding.named_leaves(wanted), sharding.named_leaves(here),
      f'the checkpoint in {folder}')


def open_run(folder) -> Run:
  """Opens a run: config, model, newest parameters, tokenizer.

  Args:
    folder: a path, local or on an object store.

  Raises:
    UserError: no run folder, no complete checkpoint in it, one of another
      model than its config's, or no tokenizer.
  """
  config = read_config(folder)
  stored = checkpoint.tokenizer_bytes(folder)
  if not stored:
    raise errors.UserError(
        f'--run={folder} has no tokenizer, for its weights came without one; '
        'convert them again with --tokenizer=PATH'
    )
  tokenizer = text.Tokenizer.from_bytes(stored)
  model = config_lib.build_model(config, tokenizer.vocab_size)
  params = checkpoint.load_params(folder)
  _compare(folder, config_lib.parameter_shapes(config, model), params)
  return Run(
      folder=epath.Path(folder),
      config=config,
      step=checkpoint.load_extras(folder)['step'],
      model=model,
      params=params,
      tokenizer=tokenizer,
      image_layout=config_lib.image_layout(config),
  )
