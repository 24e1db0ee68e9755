"""Evaluators: what a run's parameters are worth on held-out scenes.

An evaluator is built from its entry in `config.evaluators` and a context. It
reads its examples when it is built, so that a wrong entry or a missing corpus
is found before any training. Then

  run(params)   yields (name, value); see `common` for the siblings of a score
  predictions   list of dicts after that: id, split, condition, type, question,
                answer, prediction, correct
  fingerprint   12 hex digits over all that can shift a score
"""

import collections
import dataclasses
import json
from typing import Any

from etils import epath

from mmgen import errors
from mmgen.evaluators import caption
from mmgen.evaluators import common
from mmgen.evaluators import loss
from mmgen.evaluators import retrieval
from mmgen.evaluators import vqa
from mmgen.evaluators import zero_shot


@dataclasses.dataclass(frozen=True)
class Context:
  """What evaluators share.

  Attributes:
    config: the run's config.
    model: the module whose parameters are evaluated.
    tokenizer: of the run.
    image_layout: how a picture becomes slots.
    data_dir: folder of the prepared corpora.
  """

  config: Any
  model: Any
  tokenizer: Any
  image_layout: Any
  data_dir: Any


def build(config, context):
  """The evaluators of a run.

  Args:
    config: a mapping of names to entries, such as `config.evaluators`.
    context: a `Context`.

  Returns:
    A dict of names to evaluators.

  Raises:
    UserError: an unknown evaluator or field, or a corpus that is missing.
  """
  found = {}
  for name, entry in config.items():
    if entry['name'] not in EVALUATORS:
      raise errors.UserError(
          f'evaluators.{name}.name is {entry["name"]!r}; allowed: '
          f'{", ".join(EVALUATORS)}'
      )
    module = EVALUATORS[entry['name']]
    kind = context.config.model.name
    if kind != module.MODEL:
      raise errors.UserError(
          f'evaluators.{name}: {entry["name"]!r} is for models of the kind '
          f'{module.MODEL!r}; this one is {kind!r}'
      )
    if context.image_layout is None and entry['name'] != 'loss':
      raise errors.UserError(
          f'evaluators.{name}: {entry["name"]!r} shows pictures; this model '
          'reads text alone (model.vision is empty)'
      )
    settings = common.make_config(module.Config, name, entry)
    found[name] = module.Evaluator(settings, context)
  return found


def run_all(evaluators, params, folder, progress=lambda name: None):
  """Runs evaluators and stores what they predicted.

  Args:
    evaluators: a dict of `build`.
    params: parameters of the model.
    folder: of the run; predictions go to `predictions/<name>.jsonl` in it,
      one JSON object a line.
    progress: called with each evaluator's name before it runs.

  Returns:
    dict: 'scores' {'<name>/<score>': value}, 'examples' {'<name>/<score>':
    held-out examples behind it}, 'fingerprints' {name: fingerprint}.

  Raises:
    UserError: the folder cannot be written.
  """
  scores, examples = {}, {}
  folder = epath.Path(folder) / 'predictions'
  for name, evaluator in evaluators.items():
    progress(name)
    for score, value in evaluator.run(params):
      scores[f'{name}/{score}'] = value
    types = collections.Counter(
        p['type'] for p in evaluator.predictions
        if p['condition'] == 'picture'
    )
    for score in scores:
      if score.startswith(f'{name}/'):  # of one type ('vqa/what'), or of all
        kind = score.split('/')[1].split('@')[0]
        examples[score] = types.get(kind) or types.total()
    lines = [
        json.dumps(p, ensure_ascii=False) for p in evaluator.predictions
    ]
    with errors.writing(folder.parent):
      folder.mkdir(parents=True, exist_ok=True)
      (folder / f'{name}.jsonl').write_text('\n'.join(lines) + '\n')
  return dict(
      scores=scores, examples=examples,
      fingerprints={n: e.fingerprint for n, e in evaluators.items()},
  )


EVALUATORS = {
    'loss': loss,
    'vqa': vqa,
    'caption': caption,
    'zero_shot': zero_shot,
    'retrieval': retrieval,
}
