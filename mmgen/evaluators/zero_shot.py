"""Zero-shot classification with a contrastive model.

Every class fills every template; the normalised embeddings of a class's texts
are averaged and normalised again (arXiv 2103.00020, section 3.1.4), and a
picture takes the class whose embedding is nearest. Classes are the concepts of
the training split, and those of the split in hand (held-out ones). A scene is
right if the class taken is one of its objects. Yields `accuracy` and its
siblings; the blind guess is the class that most training scenes hold.
"""

import dataclasses

import numpy as np

from mmgen.data import corpora
from mmgen.evaluators import common
from mmgen.evaluators import contrastive

MODEL = 'clip'  # kind of model, `config.model.name`
TEMPLATES = ('{}', 'a {}', 'a picture of a {}', 'a drawing of a {}')


def ensemble(text_KME):
  """Class embeddings f32[K, E] from those of M templates f32[K, M, E]."""
  class_KE = text_KME.mean(axis=1)
  return class_KE / np.linalg.norm(class_KE, axis=1, keepdims=True)


def classify(image_NE, class_KE):
  """The nearest class i64[N] of each picture."""
  return np.argmax(image_NE @ class_KE.T, axis=1)


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings; `examples` limits the scenes, `{}` in a template is a class."""

  corpus: str
  split: str = 'validation'
  examples: int | None = None
  templates: tuple[str, ...] = TEMPLATES
  batch_size: int = 64


class Evaluator:
  """See the module."""

  def __init__(self, config, context):
    self.config, self.context = config, context
    self.records = common.examples(config, context)
    about = corpora.manifest(context.data_dir, config.corpus)
    self.classes = sorted({*about['concepts'], *(
        thing['concept'] for r in self.records for thing in r['objects']
    )})
    self.templates = tuple(config.templates)
    self.fingerprint = common.fingerprint(
        evaluator='zero_shot', templates=self.templates,
        classes=self.classes,
        **common.settings(config, context, len(self.records)),
    )
    self.predictions = []

  def _predict(self, condition, names):
    for record, name in zip(self.records, names):
      concepts = [thing['concept'] for thing in record['objects']]
      self.predictions.append({
          'id': record['id'], 'split': self.config.split,
          'condition': condition, 'type': 'what',
          'question': f'one of {len(self.classes)} classes',
          'answer': ', '.join(concepts), 'prediction': name,
          'correct': name in concepts,
      })

  def run(self, params):
    """Yields (name, value); `predictions` are complete after that."""
    self.predictions = []
    texts = [t.format(name) for name in self.classes for t in self.templates]
    text_E = contrastive.encode_texts(
        self.context, params, texts, self.config.batch_size
    )
    class_KE = ensemble(
        text_E.reshape(len(self.classes), len(self.templates), -1)
    )
    for condition in common.CONDITIONS:
      image_NE = contrastive.encode_pictures(
          self.context, params, common.under(condition, self.records),
          self.config.batch_size,
      )
      taken = classify(image_NE, class_KE)
      self._predict(condition, [self.classes[k] for k in taken])
    counts = common.training_counts(self.context.data_dir, self.config.corpus)
    guess = common.most_common(counts['names'])
    self._predict('blind', [guess] * len(self.records))
    yield from common.tally('accuracy', self.predictions)
