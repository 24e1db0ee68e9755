"""Captions: exact match, and whether the true name is said.

`exact` is the share of scenes whose caption equals the corpus's caption (one
column) after `common.parse_answer`. `name_recall` is the share of true object
names that occur as whole words in the generated caption, in the singular or in
the plural of `captions.plural` ("two foxes"), averaged over scenes: with single
objects, the share of scenes whose object is named. Two blind
guesses stand beside them: the most frequent training caption for `exact`, the
most frequent object name of the training split for `name_recall`.
"""

import dataclasses
import re

from mmgen.data import captions as captions_lib
from mmgen.data import prompts
from mmgen.evaluators import answering
from mmgen.evaluators import common

MODEL = 'multimodal'  # kind of model, `config.model.name`
# Rule of `names_said`: change the number with it, or with the plurals.
NAMES = 'whole words, singular or plural: 2'


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings; `examples` limits the scenes, `column` names the caption.

  `style` names the templates, see `prompts.STYLES`.
  """

  corpus: str
  split: str = 'validation'
  examples: int | None = None
  column: str = 'fused'
  batch_size: int = 64
  style: str = 'own'


def names_said(text, names):
  """The share of `names` that occur in `text` as whole words.

  Args:
    text: a caption.
    names: English names in the singular; their plurals count as well.

  Returns:
    float in 0..1.
  """
  text = common.parse_answer(text)
  said = []
  for name in names:
    forms = '|'.join(
        re.escape(common.parse_answer(form))
        for form in (name, captions_lib.plural(name))
    )
    said.append(re.search(rf'(?<!\w)(?:{forms})(?!\w)', text) is not None)
  return common.mean(said)


class Evaluator:
  """See the module."""

  def __init__(self, config, context):
    common.check_column(config.column)
    self.config, self.context = config, context
    self.records = common.examples(config, context)
    self.counts = common.training_counts(context.data_dir, config.corpus)
    self.captions = self.counts['captions'][config.column]
    self.max_tokens = answering.longest(self.captions, context.tokenizer)
    self.fingerprint = common.fingerprint(
        evaluator='caption',
        template=prompts.template(config.style, 'caption_before'),
        column=config.column, parser=common.PARSER, names=NAMES,
        decoding='greedy', max_tokens=self.max_tokens,
        **common.settings(config, context, len(self.records)),
    )
    self.predictions = []

  def _captions(self, params, condition):
    documents = [
        prompts.caption_document(
            record['image'], '', record_id=record['id'],
            style=self.config.style,
        )
        for record in common.under(condition, self.records)
    ]
    return answering.answer(
        self.context, params, documents, self.max_tokens,
        self.config.batch_size,
    )

  def _predict(self, condition, captions, said):
    """Appends a prediction per scene; names are looked for in `said`."""
    for record, caption, words in zip(self.records, captions, said):
      truth = common.caption_of(record, self.config.column)
      names = sorted({thing['concept'] for thing in record['objects']})
      self.predictions.append({
          'id': record['id'], 'split': self.config.split,
          'condition': condition, 'type': 'caption', 'question': '',
          'answer': truth, 'prediction': caption,
          'correct': (
              common.parse_answer(caption) == common.parse_answer(truth)
          ),
          'names': names, 'name_recall': names_said(words, names),
      })

  def run(self, params):
    """Yields (name, value); `predictions` are complete after that."""
    self.predictions = []
    for condition in common.CONDITIONS:
      captions = self._captions(params, condition)
      self._predict(condition, captions, captions)
    count = len(self.records)
    caption = common.most_common(self.captions)
    name = common.most_common(self.counts['names'])
    self._predict('blind', [caption] * count, [name] * count)
    yield from common.tally('exact', self.predictions)
    yield from common.tally('name_recall', self.predictions, 'name_recall')
