"""What every evaluator needs: examples, conditions, answers, fingerprints.

A score stands beside three siblings over the same examples:

  <name>           the model sees each example's own picture
  <name>/blind     the best guess without any model or picture, from counts of
                   the training split
  <name>/grey      the same model, every picture a uniform grey
  <name>/shuffled  the same model, every scene with another scene's picture
"""

import collections
import functools
import hashlib
import json
import zlib

import numpy as np

from mmgen import errors
from mmgen import fields
from mmgen.data import corpora
from mmgen.data import prompts

# Raised whenever a change to the code changes the scores of unchanged
# parameters; the test of the golden scores demands it.
VERSION = 1

CONDITIONS = ('picture', 'grey', 'shuffled')
GREY = 128
SHUFFLE_SEED = 0
# Rules of `parse_answer` and `blind_answer`: change the number with the rule.
PARSER = 'strip, casefold, drop one trailing period: 1'
BLIND = 'same question, its type, the alphabet: 1'
# Scenes of the training split that the blind guesses are counted over.
BLIND_SCENES = 4096


def parse_answer(text):
  """Strips white space, folds case, drops one trailing period."""
  return text.strip().casefold().removesuffix('.').strip()


def name_value(name, condition):
  """`accuracy` for the true pictures, else `accuracy/<condition>`."""
  return name if condition == 'picture' else f'{name}/{condition}'


def fingerprint(**settings):
  """12 hex digits over all that can shift a score, but the parameters."""
  text = json.dumps(settings | {'version': VERSION}, sort_keys=True)
  return hashlib.sha256(text.encode('utf-8')).hexdigest()[:12]


def derangement(count, seed=SHUFFLE_SEED):
  """A permutation i64[count] that leaves nothing in its place.

  Sattolo's algorithm (Information Processing Letters 22, 1986): one cycle.
  """
  if count < 2:
    raise errors.UserError(
        f'shuffled pictures need at least 2 scenes, found {count}: raise '
        '`examples` of the evaluator, or take a larger split'
    )
  generator = np.random.default_rng(seed)
  order = np.arange(count)
  for last in range(count - 1, 0, -1):
    other = generator.integers(last)
    order[[last, other]] = order[[other, last]]
  return order


def under(condition, records):
  """The records with the pictures that a condition shows.

  Args:
    condition: one of `CONDITIONS`.
    records: one per example. Examples of one scene, told by its id, all get
      the picture of one other scene.

  Returns:
    A list of records, equal but for `image`.
  """
  if condition == 'picture':
    return list(records)
  if condition == 'grey':
    return [
        dict(r, image=np.full_like(r['image'], GREY)) for r in records
    ]
  own = {r['id']: r['image'] for r in records}
  names = list(own)
  other = {names[i]: names[j] for i, j in enumerate(derangement(len(names)))}
  return [dict(r, image=own[other[r['id']]]) for r in records]


def image_settings(context):
  """The arguments of `image.fit_document` for a run."""
  image, cells = context.config.image, context.image_layout
  return dict(
      size=tuple(image.size), fit=image.fit, kernel=image.kernel,
      grid=cells and cells.grid,  # cells is None for text alone
  )


def settings(config, context, count):
  """What enters every evaluator's fingerprint."""
  image = image_settings(context)
  return dict(
      corpus=config.corpus, split=config.split, examples=count,
      data=corpora.manifest(context.data_dir, config.corpus),
      image={k: image[k] for k in ('size', 'fit', 'kernel')},
      grey=GREY, shuffle=SHUFFLE_SEED, blind=BLIND, blind_scenes=BLIND_SCENES,
  )


def make_config(kind, name, entry):
  """An evaluator's config from its entry in `config.evaluators`.

  Args:
    kind: the frozen dataclass of its settings.
    name: the entry's name, for errors.
    entry: a mapping with `name` and the dataclass's fields.

  Raises:
    UserError: an unknown field, one that is missing, or a value of another
      type than the field's or below 1.
  """
  values = {key: entry[key] for key in entry if key != 'name'}
  return fields.read(kind, f'evaluators.{name}', values)


def caption_of(record, column):
  """A record's caption in one column, `names` being its English names."""
  return prompts.caption_text(
      record, column, 'en', np.random.default_rng(0)
  )


def check_column(column):
  """Raises UserError unless `column` is a single column of captions."""
  if column not in prompts.COLUMNS:
    raise errors.UserError(
        f'evaluators: column is {column!r}; allowed: '
        f'{", ".join(prompts.COLUMNS)}'
    )


def scenes(data_dir, corpus, split, limit=None):
  """The first `limit` records of a split, in its order.

  Raises:
    UserError: if the split is empty, or a record is damaged.
  """
  source = corpora.open_split(data_dir, corpus, split)
  count = len(source) if limit is None else min(limit, len(source))
  if count < 1:
    raise errors.UserError(
        f'nothing to evaluate: split {split!r} of {corpus!r} has '
        f'{len(source)} records and `examples` is {limit}'
    )
  try:
    return [source[i] for i in range(count)]
  except corpora.BadRecord as error:
    raise errors.UserError(
        f'split {split!r} of {corpus!r} is damaged, and evaluation drops '
        f'nothing: {error}. To repair it, run: python -m mmgen.prepare '
        f'--corpus={corpus} --data_dir={data_dir}'
    ) from error


def examples(config, context, shuffled=True):
  """The scenes that an evaluator reads.

  Args:
    config: its settings.
    context: of `evaluators.Context`.
    shuffled: whether it will show them with each other's pictures.

  Raises:
    UserError: see `scenes`; or too few to shuffle, which is found before any
      training.
  """
  records = scenes(
      context.data_dir, config.corpus, config.split, config.examples
  )
  if shuffled:
    derangement(len(records))
  return records


def questions(records, limit=None):
  """(record, question) pairs, spread over as many scenes as possible.

  Round k asks one question of every scene, the one at place (crc32(id) + k):
  a rule that is tied neither to the order of scenes nor to that of questions.

  Args:
    records: list of records.
    limit: how many pairs; None asks every question of every scene.
  """
  pairs = []
  rounds = max((len(r['questions']) for r in records), default=0)
  for k in range(rounds):
    for record in records:
      asked = record['questions']
      if k < len(asked):
        start = zlib.crc32(record['id'].encode('utf-8'))
        pairs.append((record, asked[(start + k) % len(asked)]))
  return pairs[:limit]


@functools.lru_cache(maxsize=2)
def training_scenes(data_dir, corpus):
  """What the first `BLIND_SCENES` training records say: one black pixel each.

  Their pictures are of no use to a blind guess, and would fill the memory.
  """
  blank = np.zeros((1, 1, 3), np.uint8)
  return [
      dict(record, image=blank, mask=blank[..., 0])
      for record in scenes(data_dir, corpus, 'train', BLIND_SCENES)
  ]


@functools.lru_cache(maxsize=2)
def training_counts(data_dir, corpus):
  """Counts over `training_scenes`.

  Returns:
    dict: 'questions' {(type, question): Counter of answers}, 'types'
    {type: Counter of answers}, 'answers' Counter of all answers, 'names'
    Counter of the scenes that hold an object, by its English name, 'captions'
    {column: Counter of captions}.
  """
  counts = dict(
      questions=collections.defaultdict(collections.Counter),
      types=collections.defaultdict(collections.Counter),
      answers=collections.Counter(),
      names=collections.Counter(),
      captions=collections.defaultdict(collections.Counter),
  )
  for record in training_scenes(data_dir, corpus):
    for asked in record['questions']:
      key = asked['type'], asked['question']
      counts['questions'][key][asked['answer']] += 1
      counts['types'][asked['type']][asked['answer']] += 1
      counts['answers'][asked['answer']] += 1
    counts['names'].update({o['concept'] for o in record['objects']})
    for column in prompts.COLUMNS:
      counts['captions'][column][caption_of(record, column)] += 1
  return counts


def most_common(counter):
  """The most frequent entry; of equals, the first of the alphabet."""
  return min(counter, key=lambda entry: (-counter[entry], entry))


def blind_answer(counts, asked):
  """The best guess at a question's answer, without its picture.

  The answer given most often to the same question, of equals the one given
  most often to its type, of equals the first of the alphabet. A question never
  asked in training takes the most frequent answer of its type.
  """
  of_type = counts['types'].get(asked['type'], {})
  counter = (
      counts['questions'].get((asked['type'], asked['question'])) or of_type
  )
  return min(
      counter, key=lambda a: (-counter[a], -of_type[a], a), default=''
  )


def mean(values):
  """The plain mean of a list that is not empty, as a float."""
  return float(np.mean(np.asarray(values, np.float64)))


def tally(name, predictions, field='correct'):
  """Yields (name, mean of `field`) for each condition that occurs."""
  for condition in (*CONDITIONS, 'blind'):
    values = [p[field] for p in predictions if p['condition'] == condition]
    if values:
      yield name_value(name, condition), mean(values)
