"""The statistics of verdicts, against figures calculated by hand."""

import math

import numpy as np
import pytest

from mmgen.tables import verdicts

# Five differences with mean 3, sd sqrt(10 / 4) = 1.5811, standard error
# 1.5811 / sqrt(5) = 0.70711. t(0.95; 4) = 2.13185, so that the 90 % interval
# is 3 -+ 1.50744.
FIVE = [1.0, 2.0, 3.0, 4.0, 5.0]


def spread(mean, sd, n=8):
  """n values (n even) with exactly this mean and standard deviation."""
  # n / 2 values at each of mean -+ s have sum of squares n s^2.
  s = sd * math.sqrt((n - 1) / n)
  return [mean - s] * (n // 2) + [mean + s] * (n // 2)


def test_estimate_by_hand():
  e = verdicts.estimate(FIVE)
  assert (e.n, e.mean) == (5, 3.0)
  assert e.sd == pytest.approx(1.58114, abs=1e-5)
  assert e.low == pytest.approx(3 - 1.50744, abs=1e-5)
  assert e.high == pytest.approx(3 + 1.50744, abs=1e-5)


def test_estimate_without_spread():
  assert verdicts.estimate([]) == verdicts.Estimate(0)
  assert verdicts.estimate([2.0]) == verdicts.Estimate(1, 2.0)


def test_p_values_by_hand():
  # Two pairs have one degree of freedom, where t is Cauchy: the differences 0
  # and 2 give t = 1 / (sqrt(2) / sqrt(2)) = 1, p = 1/2 - atan(1) / pi = 1/4.
  e = verdicts.estimate([0.0, 2.0])
  assert verdicts.p_above(e) == pytest.approx(0.25)
  # Against the margin -1, t = 2: p = 1/2 - atan(2) / pi = 0.147584.
  assert verdicts.p_above(e, -1.0) == pytest.approx(0.147584, abs=1e-6)
  # Equality within 4: the upper side has t = (4 - 1) / 1 = 3, the larger p.
  assert verdicts.p_equal(e, 4.0) == pytest.approx(
      0.5 - math.atan(3) / math.pi)


def test_p_value_without_any_spread():
  assert verdicts.p_above(verdicts.estimate([1.0, 1.0])) == 0.0
  assert verdicts.p_above(verdicts.estimate([0.0, 0.0])) == 1.0


@pytest.mark.parametrize('n, expected', [(8, 0.815), (5, 0.580), (3, 0.322)])
def test_power_at_one_standard_deviation(n, expected):
  assert verdicts.power(1.0, n) == pytest.approx(expected, abs=6e-4)


def test_detectable_effect_has_power_of_four_fifths():
  effect = verdicts.detectable_effect(2.0, 8)
  assert verdicts.power(effect / 2.0, 8) == pytest.approx(0.8, abs=1e-6)
  # One sd has power 0.815 with 8 pairs: 0.8 needs a little less than 2 x 1.
  assert 1.9 < effect < 2.0


def test_holm_textbook():
  # Sorted: 0.005 x 4 = 0.02, 0.01 x 3 = 0.03, 0.03 x 2 = 0.06, and
  # 0.04 x 1 = 0.04, which may not fall below its predecessor: 0.06.
  adjusted = verdicts.holm([0.01, 0.04, None, 0.03, 0.005])
  assert adjusted == [pytest.approx(0.03), pytest.approx(0.06), None,
                      pytest.approx(0.06), pytest.approx(0.02)]
  assert verdicts.holm([0.7, 0.8]) == [1.0, 1.0]


def test_slope_per_doubling_by_hand():
  # Over x = 1, 2, 4, 8 the logs are 0..3, centred -1.5, -.5, .5, 1.5, their
  # squares sum to 5. Scores 1, 3, 2, 6: (-1.5 - 1.5 + 1 + 9) / 5 = 1.4.
  scores_RS = np.array([[1, 0], [3, 2], [2, 4], [6, 6]], float)
  np.testing.assert_allclose(
      verdicts.slope(scores_RS, (1, 2, 4, 8)), [1.4, 2.0])


def test_the_largest_stable_value_by_hand():
  # By columns: all hold; 4 collapses; 2 collapses, and 8 does not count;
  # 1 collapses: an octave below it.
  collapsed_RS = [[0, 0, 0, 1],
                  [0, 0, 1, 0],
                  [0, 1, 0, 0],
                  [0, 1, 0, 0]]
  np.testing.assert_array_equal(
      verdicts.stable_octaves(collapsed_RS, (1, 2, 4, 8)), [3, 1, 0, -1])
  np.testing.assert_allclose(
      verdicts.stable_octaves(collapsed_RS, (1e-3, 2e-3, 4e-3, 8e-3)),
      math.log2(1e-3) + np.array([3, 1, 0, -1]))


@pytest.mark.parametrize('octaves, word', [
    ([1] * 8, 'reproduced'),            # a factor of 2 at every seed
    ([2] * 4 + [0] * 4, 'reproduced'),  # mean 1, low 1 - 1.8946 x 1.069 / 2.83
    ([1] * 6 + [0] * 2, 'undecided'),   # mean 0.75: above 0, below d
    ([0] * 8, 'absent'),
    ([-1] * 8, 'reversed'),
])
def test_a_margin_of_a_factor_of_two(octaves, word):
  assert verdicts.decide('margin', octaves, 1.0).word == word


def test_common_seeds():
  assert verdicts.common_seeds([{2: 0.1, 0: 0.2}, {0: 1.0, 1: 1.0, 2: 3.0}]
                               ) == [0, 2]


# For 8 values t(0.95; 7) = 1.894579: with sd 0.02 the half width of the
# interval is 1.894579 x 0.02 / sqrt(8) = 0.013397.
@pytest.mark.parametrize('kind, mean, d, word', [
    ('greater', 0.05, 0.03, 'reproduced'),   # low 0.037
    ('greater', 0.031, 0.03, 'reproduced'),  # low 0.018, mean above d
    ('greater', 0.029, 0.03, 'undecided'),   # low above 0, mean below d
    ('greater', 0.005, 0.03, 'absent'),      # [-0.008, 0.018]
    ('greater', 0.015, 0.03, 'absent'),      # [0.002, 0.028]: real, too small
    ('greater', -0.05, 0.03, 'reversed'),    # high -0.037
    ('greater', 0.012, 0.02, 'undecided'),   # [-0.001, 0.025]
    ('equal', 0.005, 0.03, 'reproduced'),
    ('equal', 0.02, 0.03, 'undecided'),      # [0.007, 0.033]
    ('equal', 0.05, 0.03, 'reversed'),       # [0.037, 0.063]
    ('equal', -0.05, 0.03, 'reversed'),
    ('trend', 0.014, 0.0, 'reproduced'),     # low 0.0006
    ('trend', 0.013, 0.0, 'undecided'),      # low -0.0004
    ('trend', -0.014, 0.0, 'reversed'),
    ('interaction', 0.014, 0.02, 'undecided'),
])
def test_words(kind, mean, d, word):
  verdict = verdicts.decide(kind, spread(mean, 0.02), d)
  assert verdict.word == word


def test_phrases_name_the_scale_and_never_the_paper():
  said = {verdicts.decide('greater', spread(mean, 0.02), 0.03).phrase('mini')
          for mean in (0.05, 0.005, -0.05, 0.028)}
  assert said == {'reproduced at mini scale', 'absent at mini scale',
                  'reversed at mini scale', 'undecided'}


@pytest.mark.parametrize('n, phrase', [
    (0, 'not run'),
    (1, 'one seed: no verdict'),
    (2, '2 seeds: no verdict'),
    (4, '4 seeds: no verdict'),
    (5, 'provisional: reproduced at mini scale'),
    (7, 'provisional: reproduced at mini scale'),
    (8, 'reproduced at mini scale'),
])
def test_seeds_decide_how_much_is_said(n, phrase):
  differences = [0.05 + 0.001 * (-1) ** i for i in range(n)]
  verdict = verdicts.decide('greater', differences, 0.03)
  assert verdict.phrase('mini') == phrase
  assert (verdict.estimate.mean is None) == (n == 0)


def test_equality_settles_with_ten_seeds():
  assert verdicts.decide('equal', spread(0, 0.01, 8), 0.03).provisional
  assert not verdicts.decide('equal', spread(0, 0.01, 10), 0.03).provisional


def test_a_flag_makes_it_not_measurable():
  verdict = verdicts.decide('greater', spread(0.05, 0.02), 0.03, ('range',))
  assert verdict.phrase('mini') == 'not measurable at mini scale'
  assert verdict.flags == ('range',)
  # With one seed there is no verdict that a flag could take away.
  assert verdicts.decide('greater', [0.05], 0.03, ('range',)
                         ).word == 'one seed: no verdict'


def test_published_figures_without_spread():
  # Binary: 60.0 * 0.01 - 57.0 * 0.01 is 0.0299999..., on paper 3 points.
  assert verdicts.holds('greater', 60.0 * 0.01 - 57.0 * 0.01, 0.03)
  assert not verdicts.holds('greater', 0.029, 0.03)
  assert not verdicts.holds('greater', 0.0, 0.0)
  assert verdicts.holds('equal', -0.01, 0.03)
  assert not verdicts.holds('equal', 0.03, 0.03)


@pytest.mark.parametrize('mean, n, word, contradicted', [
    (0.0, 8, 'as expected', False),
    (0.05, 8, 'differs', True),
    (-0.05, 8, 'differs', True),
    (0.05, 4, 'differs', False),   # too few seeds to fail a command
    (0.02, 8, 'undecided', False),
])
def test_control_of_equal_rows(mean, n, word, contradicted):
  assert verdicts.control_same(spread(mean, 0.02, n), 0.03) == (
      word, contradicted)


@pytest.mark.parametrize('mean, n, word, contradicted', [
    (0.1, 8, 'as expected', False),
    (0.0, 8, 'not worse', True),
    (-0.1, 8, 'better', True),
    (-0.1, 4, 'better', False),
    (0.028, 8, 'undecided', False),
])
def test_control_of_a_broken_row(mean, n, word, contradicted):
  assert verdicts.control_worse(spread(mean, 0.02, n), 0.03) == (
      word, contradicted)


def test_controls_with_one_seed_say_so():
  assert verdicts.control_same([0.5], 0.03) == ('too few seeds', False)
  assert verdicts.control_worse([-0.5], 0.03) == ('too few seeds', False)
