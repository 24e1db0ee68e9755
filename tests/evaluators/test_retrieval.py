"""Recalls worked out by hand, with captions that occur twice."""

import collections

import numpy as np

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
