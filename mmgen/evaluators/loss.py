"""Held-out loss: nats per learnt token, also with wrong pictures.

One document a row, nothing packed and nothing dropped. Yields `loss` and its
siblings. The blind guess predicts each token by its share of the learnt tokens
of the training split (one added to every count). Documents without pictures
have the blind sibling only.
"""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from mmgen import errors
from mmgen.data import corpora
from mmgen.data import layout
from mmgen.data import mixture
from mmgen.data import prompts
from mmgen.evaluators import answering
from mmgen.evaluators import common

MODEL = 'multimodal'  # kind of model, `config.model.name`


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings; `view`, `column` ... as in a source of the mixture."""

  corpus: str
  split: str = 'validation'
  examples: int | None = None
  view: str = 'caption'
  column: str = 'fused'
  language: str = 'en'
  image_place: str = 'before'
  batch_size: int = 64
  style: str = 'own'


@functools.partial(jax.jit, static_argnames='model')
def _losses(model, params, batch):
  """Sum f32[B] of the losses of learnt tokens, and of their weights."""
  logits_BTV, _ = model.apply({'params': params}, batch)
  log_p_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)
  nats_BT = -jnp.take_along_axis(
      log_p_BTV, batch['targets'][..., None], axis=-1
  )[..., 0]
  weights_BT = batch['weights']
  # Where nothing is learnt the loss may be anything, infinity included.
  nats_BT = jnp.where(weights_BT > 0, nats_BT * weights_BT, 0.0)
  return nats_BT.sum(axis=1), weights_BT.sum(axis=1)


class Evaluator:
  """See the module."""

  def __init__(self, config, context):
    self.config, self.context = config, context
    fields = dataclasses.asdict(config)
    self.source = mixture.Source(**{
        f.name: fields[f.name]
        for f in dataclasses.fields(mixture.Source) if f.name in fields
    })
    prompts.check('of an evaluator', self.source)
    if config.image_place == 'random':
      raise errors.UserError(
          "image_place of the evaluator 'loss' is 'random'; allowed: 'before', "
          "'after'"
      )
    corpora.check_language('of an evaluator', context.data_dir, config.corpus,
                           config.language)
    self.records = common.examples(
        config, context, config.view not in prompts.WITHOUT_PICTURES
    )
    template = (
        f'caption_{config.image_place}' if config.view == 'caption'
        else prompts.NEEDS[config.view][0]
    )
    self.fingerprint = common.fingerprint(
        evaluator='loss', template=prompts.template(config.style, template),
        view=config.view, column=config.column, language=config.language,
        **common.settings(config, context, len(self.records)),
    )
    self.predictions = []

  def _documents(self, records):
    """One document a record, choices drawn by the record's id."""
    view = prompts.VIEWS[self.config.view]
    return [
        view(record, self.source, np.random.default_rng(
            zlib.crc32(record['id'].encode('utf-8'))
        ))
        for record in records
    ]

  def _batches(self, records):
    """Yields (arrays, valid) of a list of records."""
    documents = self._documents(records)
    for indices, valid in answering.chunks(
        len(documents), self.config.batch_size
    ):
      arrays = answering.lay_out(
          layout.unpacked, [documents[i] for i in indices], self.context
      )
      length = (arrays['segments'] > 0).sum(axis=1).max()
      yield answering.trim(arrays, length), valid

  def _model_losses(self, params, condition):
    """(sums f64[N], weights f64[N]) of the model."""
    sums, weights = [], []
    for arrays, valid in self._batches(common.under(condition, self.records)):
      sum_B, weight_B = _losses(self.context.model, params, arrays)
      sums.append(np.asarray(sum_B, np.float64)[valid])
      weights.append(np.asarray(weight_B, np.float64)[valid])
    return np.concatenate(sums), np.concatenate(weights)

  @functools.cached_property
  def _blind_losses(self):
    """(sums f64[N], weights f64[N]) of the training split's token counts."""
    counts_V = np.ones(self.context.tokenizer.vocab_size)
    training = common.training_scenes(
        self.context.data_dir, self.config.corpus
    )
    for arrays, valid in self._batches(training):
      np.add.at(counts_V, arrays['targets'][valid], arrays['weights'][valid])
    nats_V = -np.log(counts_V / counts_V.sum())
    sums, weights = [], []
    for arrays, valid in self._batches(self.records):
      weights_BT = arrays['weights'][valid]
      sums.append((nats_V[arrays['targets'][valid]] * weights_BT).sum(axis=1))
      weights.append(weights_BT.sum(axis=1, dtype=np.float64))
    return np.concatenate(sums), np.concatenate(weights)

  def run(self, params):
    """Yields (name, value); `predictions` are complete after that."""
    self.predictions = []
    blind = self.config.view in prompts.WITHOUT_PICTURES
    conditions = ('picture',) if blind else common.CONDITIONS
    for condition in (*conditions, 'blind'):
      sums, weights = (
          self._blind_losses if condition == 'blind'
          else self._model_losses(params, condition)
      )
      for record, nats, weight in zip(self.records, sums, weights):
        self.predictions.append({
            'id': record['id'], 'split': self.config.split,
            'condition': condition, 'type': 'loss',
            'loss': float(nats / weight), 'tokens': float(weight),
        })
      per_token = float(sums.sum() / weights.sum())
      yield common.name_value('loss', condition), per_token
