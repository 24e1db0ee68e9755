"""Answers to questions about pictures: accuracy over all and by type.

An answer is right if it equals the true one after `common.parse_answer`.
Yields `accuracy`, `what`, `colour`, `count`, `where`, `exists` (the types that
occur) and the siblings of each. The blind guess is the answer that the
training split gives most often to the same question; see
`common.blind_answer`.
"""

import dataclasses

from mmgen.data import prompts
from mmgen.evaluators import answering
from mmgen.evaluators import common

MODEL = 'multimodal'  # kind of model, `config.model.name`
TYPES = ('what', 'colour', 'count', 'where', 'exists')


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings; `examples` limits the questions, None asks all of the split.

  `style` names the templates, see `prompts.STYLES`.
  """

  corpus: str
  split: str = 'validation'
  examples: int | None = None
  batch_size: int = 64
  style: str = 'own'


class Evaluator:
  """See the module."""

  def __init__(self, config, context):
    self.config, self.context = config, context
    self.pairs = common.questions(
        common.examples(config, context), config.examples
    )
    self.counts = common.training_counts(context.data_dir, config.corpus)
    self.max_tokens = answering.longest(
        self.counts['answers'], context.tokenizer
    )
    self.fingerprint = common.fingerprint(
        evaluator='vqa', template=prompts.template(config.style, 'question'),
        parser=common.PARSER, decoding='greedy', max_tokens=self.max_tokens,
        **common.settings(config, context, len(self.pairs)),
    )
    self.predictions = []

  def _answers(self, params, condition):
    if condition == 'blind':
      return [common.blind_answer(self.counts, q) for _, q in self.pairs]
    records = common.under(condition, [record for record, _ in self.pairs])
    documents = [
        prompts.question_document(
            record['image'], [(asked['question'], '')], record['id'],
            self.config.style,
        )
        for record, (_, asked) in zip(records, self.pairs)
    ]
    return answering.answer(
        self.context, params, documents, self.max_tokens,
        self.config.batch_size,
    )

  def _predict(self, condition, answers):
    for (record, asked), answer in zip(self.pairs, answers):
      self.predictions.append({
          'id': record['id'], 'split': self.config.split,
          'condition': condition, **asked, 'prediction': answer,
          'correct': (
              common.parse_answer(answer)
              == common.parse_answer(asked['answer'])
          ),
      })

  def run(self, params):
    """Yields (name, value); `predictions` are complete after that."""
    self.predictions = []
    for condition in (*common.CONDITIONS, 'blind'):
      self._predict(condition, self._answers(params, condition))
    yield from common.tally('accuracy', self.predictions)
    for kind in TYPES:
      yield from common.tally(
          kind, [p for p in self.predictions if p['type'] == kind]
      )
