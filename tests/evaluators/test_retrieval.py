"""Recalls worked out by hand, with captions that occur twice."""

import collections

import numpy as np
import scripted

from mmgen.evaluators import contrastive
from mmgen.evaluators import retrieval

CAPTIONS = ['fox', 'sun', 'fox', 'cup']


def hits():
  captions = np.asarray(CAPTIONS)
  return captions[:, None] == captions[None, :]


def test_equal_captions_are_hits():
  scores_NN = np.asarray([
      [0.1, 0.2, 0.9, 0.3],   # best is 'fox' of another scene: rank 0
      [0.9, 0.8, 0.7, 0.6],   # 'sun' comes second: rank 1
      [0.2, 0.9, 0.1, 0.8],   # the first 'fox' comes third: rank 2
      [0.9, 0.8, 0.7, 0.6],   # 'cup' is last: rank 3
  ])
  ranks = retrieval.first_hits(scores_NN, hits())
  assert ranks.tolist() == [0, 1, 2, 3]


def test_ties_keep_the_order_of_the_split_and_favour_nobody():
  ranks = retrieval.first_hits(np.zeros((4, 4)), hits())
  assert ranks.tolist() == [0, 1, 0, 3]


def test_scores_that_are_not_numbers_come_last():
  scores_NN = np.asarray([[0.0, 1.0, np.nan, 0.5]] * 4)
  ranks = retrieval.first_hits(scores_NN, hits())
  assert ranks.tolist() == [2, 0, 2, 1]


def test_blind_guesses():
  counts = collections.Counter(cup=5, fox=3, sun=3)
  # Order of guesses: cup, then fox before sun (equal counts, alphabet).
  assert retrieval.blind_text_ranks(CAPTIONS, counts).tolist() == [1, 2, 1, 0]
  # One picture of four holds 'sun' with chance 1/4, 'fox' with 2/4; of two
  # pictures drawn, at least one 'fox': 1 - (2/4)(1/3) = 5/6.
  np.testing.assert_allclose(
      retrieval.blind_image_recall(CAPTIONS, 1), [0.5, 0.25, 0.5, 0.25])
  np.testing.assert_allclose(
      retrieval.blind_image_recall(CAPTIONS, 2), [5 / 6, 0.5, 5 / 6, 0.5])
  np.testing.assert_allclose(retrieval.blind_image_recall(CAPTIONS, 10), 1.0)


def _crowd(monkeypatch):
  """Seven scenes, five of one caption; 'b' looks like 'a', 'c' like 'b'."""
  texts = ['a', 'a', 'a', 'a', 'a', 'b', 'c']
  context = scripted.install(
      monkeypatch, 'clip',
      validation=[scripted.scene(i, ['x'], t) for i, t in enumerate(texts)],
      train=[scripted.scene(8, ['x'], 'a'), scripted.scene(9, ['x'], 'a'),
             scripted.scene(10, ['x'], 'b')])
  text = {'a': [1, 0, 0], 'b': [0, 1, 0], 'c': [0, 0, 1]}
  image = {'a': [1, 0, 0], 'b': [.8, .6, 0], 'c': [0, .55, .5]}
  monkeypatch.setattr(
      contrastive, 'encode_texts',
      lambda _, params, said, size: np.asarray([text[t] for t in said]))
  monkeypatch.setattr(
      contrastive, 'encode_pictures',
      lambda _, params, records, size: np.asarray(
          [image[texts[r['image'][0, 0, 0] // scripted.STEP % 7]]
           for r in records]))
  return retrieval.Evaluator(retrieval.Config('shapes'), context)


def test_model_and_blind_guess_rank_the_same_distinct_captions(monkeypatch):
  evaluator = _crowd(monkeypatch)
  scores = dict(evaluator.run({}))
  # Candidates a, b, c: the picture of b ranks its own second, not behind five
  # copies of 'a'.
  assert scores['image_to_text@1'] == 5 / 7
  assert scores['image_to_text@5'] == 1
  # Blind: a, b, c by training count. It is no better than the model.
  assert scores['image_to_text@1/blind'] == 5 / 7
  assert scores['image_to_text@5/blind'] == 1
  # From text, every picture is a candidate and every caption a query.
  assert scores['text_to_image@1'] == 1
  rows = [p for p in evaluator.predictions if p['condition'] == 'picture']
  to_text, to_image = rows[:7], rows[7:]
  assert [p['rank'] for p in to_text] == [0] * 5 + [1, 1]
  assert [p['prediction'] for p in to_text] == [*'aaaaaab']
  assert [p['prediction'] for p in to_image] == [*'aaaaabc']
  assert [p['answer'] for p in to_image] == [*'aaaaabc']


def test_the_rule_of_candidates_is_in_the_fingerprint(monkeypatch):
  before = _crowd(monkeypatch).fingerprint
  assert _crowd(monkeypatch).fingerprint == before
  monkeypatch.setattr(retrieval, 'CANDIDATES', 'another rule')
  assert _crowd(monkeypatch).fingerprint != before
