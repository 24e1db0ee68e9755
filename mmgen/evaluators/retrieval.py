"""Retrieval with a contrastive model: recall at 1, 5 and 10, both ways.

N pictures and their captions are ranked against each other by the product of
their normalised embeddings (arXiv 2103.00020, section 3.1.4). Drawn scenes
repeat captions, and no model could tell equal ones apart:

  image_to_text  N pictures rank the D <= N *distinct* captions; an example
                 scores 1 at k if its own is among the first k
  text_to_image  N captions rank the N pictures; an example scores 1 at k if
                 one of the first k pictures has a caption that equals its own

Candidates of equal score keep their order in the split, which is no query's
advantage.

The blind guess ranks the same candidates: from picture to text, the k distinct
captions that the training split holds most often; from text to picture, k
pictures at random (the exact expectation).
"""

import dataclasses
import math

import numpy as np

from mmgen.evaluators import common
from mmgen.evaluators import contrastive

MODEL = 'clip'  # kind of model, `config.model.name`
RECALLS = (1, 5, 10)
# What is ranked: change the number with the rule.
CANDIDATES = 'distinct captions, all pictures; ties: order of the split: 2'


def first_hits(scores_QC, hits_QC):
  """Rank i64[Q] (from 0) of each query's best candidate that is a hit.

  Args:
    scores_QC: similarity of Q queries to C candidates.
    hits_QC: bool, which candidates count as right.
  """
  order_QC = np.argsort(-scores_QC, axis=1, kind='stable')
  return np.argmax(np.take_along_axis(hits_QC, order_QC, axis=1), axis=1)


def blind_text_ranks(captions, counts):
  """Rank of each caption among the distinct candidates, by training count."""
  order = sorted(set(captions), key=lambda text: (-counts[text], text))
  place = {caption: rank for rank, caption in enumerate(order)}
  return np.asarray([place[caption] for caption in captions])


def blind_image_recall(captions, k):
  """Chance f64[N] that k of the N pictures, drawn blindly, hold a hit."""
  count = len(captions)
  k = min(k, count)
  hits = [captions.count(caption) for caption in captions]
  return np.asarray(
      [1 - math.comb(count - h, k) / math.comb(count, k) for h in hits]
  )


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings; `examples` limits the scenes, `column` names the caption."""

  corpus: str
  split: str = 'validation'
  examples: int | None = None
  column: str = 'fused'
  batch_size: int = 64


class Evaluator:
  """Yields `image_to_text@1` ... `text_to_image@10` and their siblings."""

  def __init__(self, config, context):
    common.check_column(config.column)
    self.config, self.context = config, context
    self.records = common.examples(config, context)
    self.captions = [
        common.caption_of(r, config.column) for r in self.records
    ]
    self.fingerprint = common.fingerprint(
        evaluator='retrieval', column=config.column,
        candidates=CANDIDATES,
        **common.settings(config, context, len(self.records)),
    )
    self.predictions = []

  def _record(self, condition, direction, ranks, firsts=None):
    """Appends a prediction per query, `firsts` its first candidate's text."""
    for i, rank in enumerate(ranks):
      found = {} if firsts is None else {'prediction': str(firsts[i])}
      self.predictions.append({
          'id': self.records[i]['id'], 'split': self.config.split,
          'condition': condition, 'type': direction,
          'question': direction.replace('_', ' '),
          'answer': self.captions[i], 'rank': int(rank),
          'correct': bool(rank == 0), **found,
      })

  def run(self, params):
    """Yields (name, value); `predictions` are complete after that."""
    self.predictions = []
    captions_N = np.asarray(self.captions)
    captions_D = np.asarray(list(dict.fromkeys(self.captions)))
    hits_ND = captions_N[:, None] == captions_D[None, :]
    hits_NN = captions_N[:, None] == captions_N[None, :]
    text_DE = contrastive.encode_texts(
        self.context, params, captions_D.tolist(), self.config.batch_size
    )
    place_N = np.argmax(hits_ND, axis=1)  # of each caption among the D
    for condition in common.CONDITIONS:
      image_NE = contrastive.encode_pictures(
          self.context, params, common.under(condition, self.records),
          self.config.batch_size,
      )
      scores_ND = image_NE @ text_DE.T
      for direction, scores_QC, hits_QC, candidates_C in (
          ('image_to_text', scores_ND, hits_ND, captions_D),
          ('text_to_image', scores_ND.T[place_N], hits_NN, captions_N)):
        ranks = first_hits(scores_QC, hits_QC)
        firsts = candidates_C[np.argmax(scores_QC, axis=1)]
        self._record(condition, direction, ranks, firsts)
        for k in RECALLS:
          yield (
              common.name_value(f'{direction}@{k}', condition),
              common.mean(ranks < k),
          )
    counts = common.training_counts(
        self.context.data_dir, self.config.corpus
    )['captions'][self.config.column]
    ranks = blind_text_ranks(self.captions, counts)
    self._record('blind', 'image_to_text', ranks)
    for k in RECALLS:
      yield f'image_to_text@{k}/blind', common.mean(ranks < k)
      yield (
          f'text_to_image@{k}/blind',
          common.mean(blind_image_recall(self.captions, k)),
      )
