"""Statistics of verdicts: arrays of paired differences in, words out.

A claim compares rows of a table that share their seeds. Each seed gives one
number: a difference of two rows, a slope over several rows, a difference of
two differences, or by how many doublings one kind of row stays stable above
another. This module reduces rows to that number, puts a t interval
around its mean, and finds the word for it. It knows no files and no rows.

A small run shows that a mechanism works, fails or reverses in a controlled
setting. It neither confirms nor refutes a published figure, so the words are
`reproduced`, `reversed`, `absent`, `undecided` and `not measurable`, each of
them followed by the scale of the runs.

All intervals are t intervals over seeds: resampling fewer than about twenty
seeds gives intervals that are too narrow. The ends of a 90 % interval are the
bounds of the two one-sided 95 % intervals.
"""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np
from scipy import optimize
from scipy import stats

CONFIDENCE = 0.95  # of a one-sided bound; the two-sided interval has 0.90
POWER = 0.8
FEWEST_SEEDS = 5  # below it there is no verdict
# Below it a verdict is provisional. Eight pairs find an effect of one paired
# standard deviation with power 0.81; to show equality takes more.
SETTLED_SEEDS = {'greater': 8, 'trend': 8, 'interaction': 8, 'margin': 8,
                 'equal': 10}
FEWEST_TREND_VALUES = 4

REPRODUCED = 'reproduced'
REVERSED = 'reversed'
ABSENT = 'absent'
UNDECIDED = 'undecided'
NOT_MEASURABLE = 'not measurable'
NOT_RUN = 'not run'
_WITH_SCALE = (REPRODUCED, REVERSED, ABSENT, NOT_MEASURABLE)

# Published figures are decimal fractions: 78.5 - 75.5 must count as 3.
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean over seeds. Without two seeds, spread and interval are None.

  Attributes:
    n: number of seeds.
    mean: mean over seeds; None without a seed.
    sd: standard deviation over seeds (n - 1 in the denominator).
    low: lower end of the 90 % t interval.
    high: upper end of the 90 % t interval.
  """
  n: int
  mean: float | None = None
  sd: float | None = None
  low: float | None = None
  high: float | None = None


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a table says about one claim.

  Attributes:
    word: one of the module's words, or why there is none.
    provisional: whether more seeds are needed before the word settles.
    estimate: of the claim's number, over paired seeds.
    p: one-sided p value against the claim's null hypothesis; None below two
      seeds.
    detectable: the smallest true effect that a one-sided 5 % t test finds
      with power 0.8, at these seeds and this spread.
    flags: preconditions that are not met.
  """
  word: str
  provisional: bool
  estimate: Estimate
  p: float | None
  detectable: float | None
  flags: tuple[str, ...] = ()

  def phrase(self, scale: str) -> str:
    """Returns the verdict as a table prints it, for runs of a scale."""
    if self.word not in _WITH_SCALE:
      return self.word
    head = 'provisional: ' if self.provisional else ''
    return f'{head}{self.word} at {scale} scale'


# ---------------------------------------------------------------------------
# From rows to one number a seed


def common_seeds(rows: Sequence[dict[int, float]]) -> list[int]:
  """Returns the seeds that every row has, sorted."""
  return sorted(set.intersection(*(set(row) for row in rows)))


def slope(scores_RS, x_R) -> np.ndarray:
  """Least-squares slope per doubling of x, for each seed.

  Args:
    scores_RS: scores of R rows at S seeds.
    x_R: what the rows vary (samples, parameters ...), positive.

  Returns:
    f64[S], in units of the score per doubling of x.
  """
  octaves_R = np.log2(np.asarray(x_R, np.float64))
  octaves_R = octaves_R - octaves_R.mean()
  return octaves_R @ np.asarray(scores_RS, np.float64) / (octaves_R**2).sum()


def stable_octaves(collapsed_RS, x_R) -> np.ndarray:
  """Log2 of the highest x up to which no run collapsed, for each seed.

  A run that holds above a value that collapsed does not count. If the lowest
  value collapsed already, the result is one octave below it.

  Args:
    collapsed_RS: 1 for a collapsed run, 0 for a stable one, by x and seed.
    x_R: what the rows vary (such as the learning rate), each value twice the
      one before.

  Returns:
    f64[S].
  """
  stable_RS = np.asarray(collapsed_RS, np.float64) < 0.5
  held_S = np.cumprod(stable_RS, axis=0).sum(axis=0)
  return math.log2(x_R[0]) - 1 + held_S


# ---------------------------------------------------------------------------
# Intervals, tests, power


def estimate(values) -> Estimate:
  """Returns mean, spread and 90 % t interval of values, one per seed."""
  values = np.asarray(values, np.float64)
  n = len(values)
  if n == 0:
    return Estimate(0)
  mean = float(values.mean())
  if n == 1:
    return Estimate(1, mean)
  sd = float(values.std(ddof=1))
  half = float(stats.t.ppf(CONFIDENCE, n - 1)) * sd / math.sqrt(n)
  return Estimate(n, mean, sd, mean - half, mean + half)


def p_above(e: Estimate, margin: float = 0.0) -> float:
  """One-sided t test of a mean above a margin: small p, mean above it."""
  if e.sd == 0:
    return 0.0 if e.mean > margin else 1.0
  return float(stats.t.sf((e.mean - margin) * math.sqrt(e.n) / e.sd, e.n - 1))


def p_equal(e: Estimate, d: float) -> float:
  """Two one-sided tests of a mean inside (-d, d): the larger p."""
  below = dataclasses.replace(e, mean=-e.mean)
  return max(p_above(e, -d), p_above(below, -d))


def power(effect: float, n: int) -> float:
  """Power of the one-sided 5 % paired t test.

  Args:
    effect: true mean difference, in standard deviations of a difference.
    n: number of pairs, at least 2.
  """
  return float(stats.nct.sf(
      stats.t.ppf(CONFIDENCE, n - 1), n - 1, effect * math.sqrt(n)))


def detectable_effect(sd: float, n: int) -> float:
  """The true mean difference that n pairs find with power 0.8."""
  # Two pairs need 5.8 standard deviations, and no number needs more.
  return sd * optimize.brentq(lambda e: power(e, n) - POWER, 1e-3, 20.0)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
  """Adjusts the p values of one table for their number (Holm, 1979).

  Args:
    p_values: raw p values; None (not tested) stays None and is not counted.

  Returns:
    Adjusted p values in the order given: of the k-th smallest of m, the
    largest (m - j + 1) p_j over j <= k, at most 1.
  """
  tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
  adjusted, running = [None] * len(p_values), 0.0
  for rank, (p, i) in enumerate(tested):
    running = max(running, min(1.0, (len(tested) - rank) * p))
    adjusted[i] = running
  return adjusted


# ---------------------------------------------------------------------------
# Words


def _word_greater(e: Estimate, d: float) -> str:
  if e.low > 0 and e.mean >= d:
    return REPRODUCED
  if e.high < 0:
    return REVERSED
  if -d < e.low and e.high < d:
    return ABSENT
  return UNDECIDED


def _word_equal(e: Estimate, d: float) -> str:
  if -d < e.low and e.high < d:
    return REPRODUCED
  if e.low >= d or e.high <= -d:
    return REVERSED
  return UNDECIDED


def decide(kind: str, differences, d: float, flags=()) -> Verdict:
  """Finds the word for a claim.

  greater, trend, interaction, margin: *reproduced* if the lower one-sided 95 %
  bound is above 0 and the mean is at least d; *reversed* if the upper bound is
  below 0; *absent* if the 90 % interval lies inside (-d, d). equal:
  *reproduced* if the 90 % interval lies inside (-d, d), *reversed* if it lies
  outside. Else *undecided*. "Not significant" is never "equal".

  Args:
    kind: one of `SETTLED_SEEDS`.
    differences: one number per seed; what the claim says is that it is
      positive (for 'equal', that it is near 0).
    d: smallest effect that matters, in units of `differences`; 0 asks of a
      trend or an interaction only that its interval excludes 0.
    flags: preconditions that are not met; any makes it *not measurable*.
  """
  e = estimate(differences)
  p = detectable = None
  if e.n >= 2:
    p = p_equal(e, d) if kind == 'equal' else p_above(e)
    detectable = detectable_effect(e.sd, e.n)
  if e.n == 0:
    word = NOT_RUN
  elif e.n == 1:
    word = 'one seed: no verdict'
  elif e.n < FEWEST_SEEDS:
    word = f'{e.n} seeds: no verdict'
  elif flags:
    word = NOT_MEASURABLE
  else:
    word = (_word_equal if kind == 'equal' else _word_greater)(e, d)
  provisional = FEWEST_SEEDS <= e.n < SETTLED_SEEDS[kind]
  return Verdict(word, provisional, e, p, detectable, tuple(flags))


def holds(kind: str, difference: float, d: float) -> bool:
  """Whether a claim holds on figures themselves, without any spread."""
  if kind == 'equal':
    return abs(difference) < d
  return difference > 0 and difference >= d - _ROUNDING


# ---------------------------------------------------------------------------
# Controls


def control_same(differences, d: float) -> tuple[str, bool]:
  """A row against itself at other seeds: must be absent or undecided.

  Returns:
    The word, and whether 5 or more seeds contradict the expectation.
  """
  e = estimate(differences)
  if e.n < 2:
    return 'too few seeds', False
  differs = (e.low > 0 or e.high < 0) and abs(e.mean) >= d
  same = -d < e.low and e.high < d
  word = 'differs' if differs else 'as expected' if same else UNDECIDED
  return word, differs and e.n >= FEWEST_SEEDS


def control_worse(differences, d: float) -> tuple[str, bool]:
  """A whole row minus a broken one: must come out above 0.

  Returns:
    The word, and whether 5 or more seeds contradict the expectation: the
    interval lies below 0, or so near 0 that breaking the row cost nothing.
  """
  e = estimate(differences)
  if e.n < 2:
    return 'too few seeds', False
  word = {REPRODUCED: 'as expected', ABSENT: 'not worse',
          REVERSED: 'better'}.get(_word_greater(e, d), UNDECIDED)
  return word, word in ('not worse', 'better') and e.n >= FEWEST_SEEDS
