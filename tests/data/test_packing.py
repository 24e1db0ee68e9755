"""Tests of mmgen.data.packing."""

import numpy as np

from mmgen.data import packing


def test_by_hand():
  # Two rows of 10. 7 -> row 0 (gap 3); 6 -> row 1 (gap 4); 4 fits row 1 alone
  # (gap 0); 3 -> row 0 (gap 0); 2 fits nowhere.
  lengths = [3, 7, 2, 6, 4]
  assert packing.best_fit(lengths, [0] * 5, 2, 10, 0) == [[1, 0], [3, 4]]


def test_best_fit_prefers_the_tightest_row():
  # 8 and 7 open two rows with gaps 2 and 3; 2 goes to the gap of 2.
  assert packing.best_fit([7, 8, 2], [0] * 3, 2, 10, 0) == [[1, 2], [0]]


def test_equal_lengths_keep_their_order():
  assert packing.best_fit([5, 5, 5, 5], [0] * 4, 2, 10, 0) == [[0, 1], [2, 3]]


def test_picture_slots_limit_a_row():
  lengths, images = [3, 3, 3, 3], [1, 1, 0, 1]
  # A row takes two pictures: the fourth document would be its third.
  assert packing.best_fit(lengths, images, 1, 12, 2) == [[0, 1, 2]]
  assert packing.best_fit(lengths, images, 2, 12, 2) == [[0, 1, 2], [3]]
  assert packing.best_fit(lengths, [3, 1, 1, 1], 1, 12, 2) == [[1, 2]]


def test_too_long_and_empty_take_no_place():
  assert packing.best_fit([11, 0, 10], [0] * 3, 1, 10, 0) == [[2]]


def test_limits_hold_for_random_groups():
  rng = np.random.default_rng(0)
  for _ in range(50):
    lengths, images = rng.integers(0, 40, 30), rng.integers(0, 3, 30)
    placed = packing.best_fit(lengths.tolist(), images.tolist(), 4, 100, 5)
    flat = [i for row in placed for i in row]
    assert len(flat) == len(set(flat))
    for row in placed:
      assert lengths[row].sum() <= 100 and images[row].sum() <= 5
    # What was left out fits into no row.
    for i in set(range(30)) - set(flat):
      assert lengths[i] == 0 or all(
          lengths[row].sum() + lengths[i] > 100
          or images[row].sum() + images[i] > 5 for row in placed)
