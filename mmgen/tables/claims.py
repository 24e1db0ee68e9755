"""Tables as experiment files declare them: columns, claims, controls, tuning.

`parse` checks the dict `TABLE` of an experiment into the dataclasses below;
`mmgen.table` tells how to write one. What finished runs say of a table is in
`mmgen.tables.summary`, the statistics are in `mmgen.tables.verdicts`. That
a table keeps to what it declared is the matter of `mmgen.tables.frozen`.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math

from mmgen import errors
from mmgen.tables import verdicts

UNITS = {'percent': 0.01, 'raw': 1.0}  # of a figure, in scores
ACCOUNTS = ('samples', 'text_tokens', 'visual_tokens', 'flops', 'parameters')
CONTROLS = ('aa', 'worse')
# Seeds of the second half of an A/A control.
OTHER_SEEDS = 1000
SMALLEST_EFFECT = 0.03  # of a control: 3 points of accuracy
FEWEST_RATES = 5
FEWEST_TUNING_SEEDS = 2


# ---------------------------------------------------------------------------
# Declarations


@dataclasses.dataclass(frozen=True)
class Column:
  """One column of scores.

  Attributes:
    score: name of the score in `result.json`, such as 'vqa/accuracy'.
    unit: 'percent' (a fraction, printed and published times 100) or 'raw'.
    better: 'higher' or 'lower'.
    chance: score of a failed run; None takes the best blind guess.
    ceiling: the best that a row can reach.
  """
  score: str
  unit: str = 'percent'
  better: str = 'higher'
  chance: float | None = None
  ceiling: float = 1.0


@dataclasses.dataclass(frozen=True)
class Claim:
  """One predicate over rows.

  Attributes:
    kind: 'greater' (a - b), 'equal' (a - b), 'trend' (slope over log2 x),
      'interaction' ((a - b) - (a0 - b0)), or 'margin' (log2 of the largest x
      up to which no row of `rows` collapsed, minus the same of `minus`).
    metric: name of a column. Of a margin: 1 for a collapsed run, 0 for a
      stable one, as 'stability/collapsed'; a failed run has to count as
      collapsed (`chance` 1).
    text: the claim in one sentence.
    d: smallest effect that matters, as a score (0.03 is 3 points); of a margin
      in doublings of x. A trend and an interaction may leave it at 0.
    a, b, a0, b0: rows.
    rows: of a trend, at least four; of a margin, at least five.
    minus: rows to compare with `rows`, one each; a trend has some if it is one
      of gaps, a margin always.
    x: of a trend: what the rows vary, one positive number each. Of a margin
      each is twice the one before.
    direction: of a trend: 'up' or 'down'.
    expected: whether the source expects the predicate to hold; None is open.
    published: figures of the source in its own units, for a claim whose rows
      have none in the table: {'a': .., 'b': ..}, or a sequence for a trend.
  """
  kind: str
  metric: str
  text: str
  d: float = 0.0
  a: str | None = None
  b: str | None = None
  a0: str | None = None
  b0: str | None = None
  rows: tuple[str, ...] = ()
  minus: tuple[str, ...] = ()
  x: tuple[float, ...] = ()
  direction: str = 'up'
  expected: bool | None = True
  published: Mapping | tuple | None = None

  @property
  def roles(self) -> dict[str, tuple[str, ...]]:
    """Fields that name rows, with the rows they name."""
    if self.kind in ('trend', 'margin'):
      return {'rows': self.rows, 'minus': self.minus}
    names = ('a', 'b') if self.kind != 'interaction' else (
        'a', 'b', 'a0', 'b0')
    return {name: (getattr(self, name),) for name in names}

  @property
  def all_rows(self) -> tuple[str, ...]:
    return sum(self.roles.values(), ())

  @property
  def pairs(self) -> list[tuple[str, str]]:
    """Rows that are held against each other, at the same account."""
    by_role = list(self.roles.values())
    return [pair for i in range(0, len(by_role), 2)
            for pair in zip(*by_role[i:i + 2])]


@dataclasses.dataclass(frozen=True)
class Control:
  """A comparison whose outcome is known beforehand.

  Attributes:
    kind: 'aa' (a row against itself at other seeds) or 'worse' (a broken row
      against a whole one).
    row: the row.
    than: of 'worse': the whole row.
    metric: name of a column; None takes the first.
    d: smallest effect that matters, as a score.
  """
  kind: str
  row: str
  than: str | None = None
  metric: str | None = None
  d: float = SMALLEST_EFFECT


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How the learning rate of every row is chosen, by `TABLE.tuning_seeds`.

  Attributes:
    grid: peak learning rates, each twice the one before.
    metric: name of the column whose mean over the tuning seeds chooses.
    split: what the evaluators of the trials read; never one that judges.
    stage: whose rate is tuned, and whose scores choose; None is each row's
      last.
  """
  grid: tuple[float, ...]
  metric: str
  split: str = 'validation'
  stage: str | None = None


@dataclasses.dataclass(frozen=True)
class Table:
  """A checked `TABLE`; the fields are described in `mmgen.table`."""
  title: str
  metrics: Mapping[str, Column]
  seeds: tuple[int, ...] = (0,)
  source: str = ''
  published: Mapping[str, Mapping[str, float]] = dataclasses.field(
      default_factory=dict)
  published_source: str = ''
  claims: Mapping[str, Claim] = dataclasses.field(default_factory=dict)
  controls: Mapping[str, Control] = dataclasses.field(default_factory=dict)
  tuning_seeds: tuple[int, ...] = ()
  tuning: Tuning | None = None
  account: str = 'samples'
  budget: str = ''
  exclusions: tuple[str, ...] = ()
  not_run: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _build(kind, raw, where: str):
  """Makes a dataclass of a dict; unknown and missing keys are named."""
  if not isinstance(raw, Mapping):
    raise errors.UserError(f'{where} is {raw!r}; expected a dict.')
  fields = {f.name: f for f in dataclasses.fields(kind)}
  for key in raw:
    if key not in fields:
      raise errors.UserError(
          f'{where} has no key {key!r}.{errors.nearest(key, fields)} '
          f'Allowed: {", ".join(fields)}.')
  for name, field in fields.items():
    if name not in raw and field.default is dataclasses.MISSING and (
        field.default_factory is dataclasses.MISSING):
      raise errors.UserError(f'{where} lacks {name!r}.')
  return kind(**{k: tuple(v) if isinstance(v, list) else v
                 for k, v in raw.items()})


def _one_of(value, allowed, where: str):
  if value not in allowed:
    raise errors.UserError(
        f'{where} is {value!r}.{errors.nearest(value, allowed)} '
        f'Allowed: {", ".join(map(str, allowed))}.')


def parse(raw: Mapping, rows: Sequence[str]) -> Table:
  """Checks the `TABLE` of an experiment.

  Args:
    raw: the dict as written.
    rows: names of the experiment's rows.

  Raises:
    UserError: an unknown key, row, column or kind; a missing key; a claim
      that cannot be evaluated.
  """
  table = _build(Table, raw, 'TABLE')
  metrics = {}
  for name, column in table.metrics.items():
    where = f'TABLE.metrics[{name!r}]'
    column = {'score': column} if isinstance(column, str) else column
    metrics[name] = _build(Column, column, where)
    _one_of(metrics[name].unit, tuple(UNITS), f'{where}.unit')
    _one_of(metrics[name].better, ('higher', 'lower'), f'{where}.better')
  if not metrics:
    raise errors.UserError('TABLE.metrics names no score.')
  table = dataclasses.replace(
      table, metrics=metrics,
      claims={name: _build(Claim, claim, f'TABLE.claims[{name!r}]')
              for name, claim in table.claims.items()},
      controls={name: _build(Control, control, f'TABLE.controls[{name!r}]')
                for name, control in table.controls.items()},
      tuning=table.tuning and _build(Tuning, table.tuning, 'TABLE.tuning'))
  known = (*rows, *table.not_run)
  _one_of(table.account, ACCOUNTS, 'TABLE.account')
  for row, figures in table.published.items():
    _one_of(row, known, 'a row of TABLE.published')
    for column in figures:
      _one_of(column, tuple(metrics), f'a column of TABLE.published[{row!r}]')
  _check_seeds(table.seeds, 1, 'TABLE.seeds')
  _check_seeds(table.tuning_seeds, FEWEST_TUNING_SEEDS if table.tuning else 0,
               'TABLE.tuning_seeds')
  if set(table.seeds) & set(table.tuning_seeds):
    raise errors.UserError('TABLE.seeds and TABLE.tuning_seeds share a seed: '
                           'a rate may not be chosen on the seeds that judge.')
  if table.tuning:
    _one_of(table.tuning.metric, tuple(metrics), 'TABLE.tuning.metric')
    _check_grid(table.tuning.grid, 'TABLE.tuning.grid')
  for name, claim in table.claims.items():
    _check_claim(claim, known, metrics, f'TABLE.claims[{name!r}]')
  for name, control in table.controls.items():
    where = f'TABLE.controls[{name!r}]'
    _one_of(control.kind, CONTROLS, f'{where}.kind')
    _one_of(control.row, known, f'{where}.row')
    if control.kind == 'worse':
      _one_of(control.than, known, f'{where}.than')
    if control.metric is not None:
      _one_of(control.metric, tuple(metrics), f'{where}.metric')
  return table


def _check_seeds(seeds, fewest: int, where: str):
  if len(seeds) < fewest or len(set(seeds)) < len(seeds) or not all(
      0 <= seed < OTHER_SEEDS for seed in seeds):
    least = ('one seed' if fewest == 1 else f'{fewest} seeds')
    raise errors.UserError(
        f'{where} is {seeds}; give at least {least}, each once, from 0 to '
        f'{OTHER_SEEDS - 1} (later ones serve A/A controls).')


def _check_grid(grid, where: str):
  if not isinstance(grid, tuple) or len(grid) < FEWEST_RATES or (
      min(grid) <= 0) or not all(
      math.isclose(high, 2 * low, rel_tol=1e-6)
      for low, high in zip(grid, grid[1:])):
    raise errors.UserError(
        f'{where} is {grid}; give {FEWEST_RATES} or more positive '
        'values, each twice the one before, such as '
        '(5e-4, 1e-3, 2e-3, 4e-3, 8e-3).')


def _check_claim(claim: Claim, known, metrics, where: str):
  _one_of(claim.kind, tuple(verdicts.SETTLED_SEEDS), f'{where}.kind')
  _one_of(claim.metric, tuple(metrics), f'{where}.metric')
  _one_of(claim.direction, ('up', 'down'), f'{where}.direction')
  for role, names in claim.roles.items():
    for name in names:
      _one_of(name, known, f'{where}.{role}')
  if claim.d < 0 or (
      claim.d == 0 and claim.kind in ('greater', 'equal', 'margin')):
    example = ('1 for a factor of 2' if claim.kind == 'margin'
               else '0.03 for 3 points')
    raise errors.UserError(f'{where}.d is {claim.d}; give the smallest effect '
                           f'that matters, such as {example}.')
  if claim.kind == 'margin':
    _check_margin(claim, metrics[claim.metric], where)
  if claim.kind == 'trend':
    fewest = verdicts.FEWEST_TREND_VALUES
    if len(claim.rows) < fewest or len(claim.x) != len(claim.rows) or (
        len(claim.minus) not in (0, len(claim.rows))) or min(claim.x) <= 0:
      raise errors.UserError(
          f'{where}: a trend takes at least {fewest} rows, one positive x for '
          f'each, and one row of minus for each or none; found '
          f'{len(claim.rows)} rows, x={claim.x}, {len(claim.minus)} in minus.')


def _check_margin(claim: Claim, column: Column, where: str):
  _check_grid(claim.x, f'{where}.x')
  if not len(claim.rows) == len(claim.minus) == len(claim.x):
    raise errors.UserError(
        f'{where}: a margin takes one row and one row of minus for each x; '
        f'found {len(claim.rows)} rows and {len(claim.minus)} in minus for '
        f'{len(claim.x)} values of x.')
  if column.chance != 1 or column.unit != 'raw':
    raise errors.UserError(
        f"{where}.metric is {claim.metric!r}, whose unit is {column.unit!r} "
        f"and chance {column.chance}; a margin needs unit='raw' and chance=1, "
        'so that a failed run counts as collapsed.')
  if claim.published is not None:
    raise errors.UserError(
        f'{where}.published: a margin has no figures of its own to hold '
        'against a source; leave it out.')
