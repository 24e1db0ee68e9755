"""What the finished runs of a table say: figures, verdicts, controls, accounts.

`summarise` joins a declared table (`mmgen.tables.claims`) with the outcomes of
its runs into one plain dict. Every figure of the printed table, of `table.md`,
of `table.json` and of `report.html` comes from that dict and from nowhere else.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses

import numpy as np

from mmgen.tables import claims
from mmgen.tables import frozen
from mmgen.tables import verdicts

FEWEST_EXAMPLES = 2000
BLIND_MARGIN = 0.02
CHANCE_FACTOR = 3.0
CEILING_SHARE = 0.9
FLAT_LOSS = 0.01
# Accounts of matched rows may differ by the last, partly filled batch.
ACCOUNT_TOLERANCE = 0.01
# The share of documents left out, above which a table warns.
UNPLACED = 0.01
CONDITIONS = ('blind', 'grey', 'shuffled')


@dataclasses.dataclass(frozen=True)
class Outcome:
  """One run of one row.

  Attributes:
    row: name of the row.
    seed: its seed.
    result: content of `result.json`; None if the run failed.
    error: why it failed, in one line; None if it did not.
    account: {account: charged total}, warm starts and stages included.
    own: the same without the runs of other experiments.
    examples: {score: held-out examples that it averages}.
    loss_fall: relative fall of the training loss over the last tenth.
    unplaced: share of the documents drawn that had no place in a row or could
      not be read; the largest of all runs that were charged.
    revisions: of the code, of all runs that were charged.
    date: when it finished.
  """
  row: str
  seed: int
  result: Mapping | None
  error: str | None = None
  account: Mapping[str, float] = dataclasses.field(default_factory=dict)
  own: Mapping[str, float] = dataclasses.field(default_factory=dict)
  examples: Mapping[str, int] = dataclasses.field(default_factory=dict)
  loss_fall: float | None = None
  unplaced: float = 0.0
  revisions: tuple[str, ...] = ()
  date: str = ''


def score_of(outcome: Outcome, name: str) -> float | None:
  """Returns a score of a run; None if it failed or has no such score."""
  return outcome.result['scores'].get(name) if outcome.result else None


def _mean(values) -> float | None:
  values = [v for v in values if v is not None]
  return float(np.mean(values)) if values else None


def chance_level(column: claims.Column, outcomes) -> float | None:
  """Returns the declared chance of a column, else the mean blind guess."""
  if column.chance is not None:
    return column.chance
  return _mean(score_of(o, f'{column.score}/blind') for o in outcomes)


def scores(column: claims.Column, outcomes: Sequence[Outcome]):
  """Returns {row: {seed: score}}; a failed run scores at chance.

  A failed run without a known chance level is left out: nothing else of its
  column has run. So is a finished run that does not take this score.
  """
  chance, table = chance_level(column, outcomes), {}
  for o in outcomes:
    value = score_of(o, column.score) if o.result else chance
    if value is not None:
      table.setdefault(o.row, {})[o.seed] = value
  return table


def _reduce(claim: claims.Claim, values: Mapping) -> np.ndarray:
  """One number per seed from {role: [rows, seeds]}; positive is the claim."""
  if claim.kind == 'trend':
    gaps = values['rows'] - (values['minus'] if claim.minus else 0)
    sign = 1 if claim.direction == 'up' else -1
    return sign * verdicts.slope(gaps, claim.x)
  if claim.kind == 'margin':
    rows, minus = (verdicts.stable_octaves(values[role], claim.x)
                   for role in ('rows', 'minus'))
    return rows - minus
  first = values['a'][0] - values['b'][0]
  if claim.kind != 'interaction':
    return first
  return first - (values['a0'][0] - values['b0'][0])


def on_published_figures(claim: claims.Claim, table: claims.Table) -> str:
  """Evaluates a claim on the source: 'holds', 'fails', 'not published'."""
  unit = claims.UNITS[table.metrics[claim.metric].unit]
  figures = claim.published
  if figures is None:
    figures = {role: [table.published.get(row, {}).get(claim.metric)
                      for row in rows] for role, rows in claim.roles.items()}
  elif claim.kind == 'trend':
    figures = {'rows': figures, 'minus': [0.0] * len(claim.minus)}
  else:
    figures = {role: [figures.get(role)] for role in claim.roles}
  if any(f is None for column in figures.values() for f in column):
    return 'not published'
  values = {role: np.asarray(column, np.float64)[:, None] * unit
            for role, column in figures.items()}
  held = verdicts.holds(claim.kind, float(_reduce(claim, values)[0]), claim.d)
  return 'holds' if held else 'fails'


def off_the_grid(claim: claims.Claim, values: Mapping) -> list[str]:
  """Says at how many seeds a margin cannot tell its two kinds of rows apart.

  Where only one of them is stable (or collapses) at every value, the margin is
  at least what was found, and keeps its sign.

  Args:
    claim: of kind 'margin'.
    values: {role: [rows, seeds]}.
  """
  stable_2RS = [np.asarray(values[role]) < 0.5 for role in claim.roles]
  flags = []
  for end, what, off_2S in (
      ('highest', 'are stable at every x', [s.all(axis=0) for s in stable_2RS]),
      ('lowest', 'collapse at the lowest x', [~s[0] for s in stable_2RS])):
    both_S = np.logical_and(*off_2S)
    if both_S.any():
      flags.append(f'both sides {what} at {both_S.sum()} of {len(both_S)} '
                   f'seeds: the grid has to go on beyond its {end} value')
  return flags


def _not_converged(claim: claims.Claim, outcomes) -> list[str]:
  """Names the rows whose loss is not shown to have come to rest.

  The loss of a step is noisy and its fall over a tenth of a short run more so:
  that it may be 0 shows nothing, that it is below 1 % has to be shown.
  """
  flags = []
  for row in dict.fromkeys(claim.all_rows):
    falls = [o.loss_fall for o in outcomes if o.row == row]
    e = verdicts.estimate([fall for fall in falls if fall is not None])
    high = e.mean if e.high is None else e.high
    if falls and (high is None or high >= FLAT_LOSS):
      why = 'its runs are too short to tell' if high is None else (
          f'its loss may still fall by {high:.1%} over the last tenth of the '
          f'steps (mean {e.mean:.1%})')
      flags.append(f'{row} is not shown to have converged: {why}')
  return flags


def preconditions(
    claim: claims.Claim, table: claims.Table, outcomes) -> list[str]:
  """Names what keeps a claim from being measurable; empty if nothing does.

  Grey and shuffled pictures at most 2 points above the best blind guess: one
  side only, for a model misled by a wrong picture may well score below a blind
  guess, and that is no leak of the answer. At least 2,000 examples; the best
  row between 3 times chance and 90 % of the ceiling; the training loss shown to
  fall by less than 1 % over the last tenth, by the upper bound over seeds,
  except of a margin, whose runs need not converge. Points, chance and ceiling
  are asked of columns in percent only.
  """
  column = table.metrics[claim.metric]
  here = [o for o in outcomes if o.row in claim.all_rows and o.result]
  flags = []
  examples = min((o.examples[column.score] for o in here
                  if column.score in o.examples), default=FEWEST_EXAMPLES)
  if examples < FEWEST_EXAMPLES:
    flags.append(f'{examples} held-out examples, {FEWEST_EXAMPLES} needed')
  if claim.kind != 'margin':
    flags += _not_converged(claim, here)
  chance = chance_level(column, here)
  if column.unit != 'percent' or chance is None:
    return flags
  for condition in ('grey', 'shuffled'):
    for row in dict.fromkeys(claim.all_rows):
      blind = _mean(score_of(o, f'{column.score}/{condition}')
                    for o in here if o.row == row)
      if blind is not None and blind > chance + BLIND_MARGIN:
        flags.append(f'{row} reaches {blind:.1%} with {condition} pictures, '
                     f'more than {100 * BLIND_MARGIN:.0f} points above a blind '
                     f'guess, {chance:.1%}')
  best = max((_mean(by_seed.values())
              for by_seed in scores(column, here).values()), default=None)
  if best is not None and best < CHANCE_FACTOR * chance:
    flags.append(f'the best row reaches {best:.1%}, 3 x chance is '
                 f'{CHANCE_FACTOR * chance:.1%}')
  if best is not None and best > CEILING_SHARE * column.ceiling:
    flags.append(f'the best row reaches {best:.1%}, 90 % of the ceiling is '
                 f'{CEILING_SHARE * column.ceiling:.1%}')
  return flags


def _judge_claim(name, claim, table, outcomes, since, scale) -> dict:
  by_row = scores(table.metrics[claim.metric], outcomes)
  seeds = verdicts.common_seeds([by_row.get(r, {}) for r in claim.all_rows])
  values = {role: np.array([[by_row[row][s] for s in seeds] for row in names])
            for role, names in claim.roles.items()} if seeds else {}
  differences = _reduce(claim, values) if seeds else []
  flags = preconditions(claim, table, outcomes)
  if claim.kind == 'margin' and seeds:
    flags += off_the_grid(claim, values)
  verdict = verdicts.decide(claim.kind, differences, claim.d, flags)
  notes = [f'{row} is not run: {table.not_run[row]}'
           for row in claim.all_rows if row in table.not_run]
  failed = sum(o.result is None for o in outcomes
               if o.row in claim.all_rows and o.seed in seeds)
  if failed:
    notes.append(f'failed runs counted at chance: {failed}')
  notes += since.claims.get(name, ())
  outside = sorted(set(seeds) - set(table.seeds))
  if outside:
    notes.append(f'exploratory: undeclared seeds {outside}')
  return dict(
      name=name, text=claim.text, kind=claim.kind, metric=claim.metric,
      d=claim.d, expected=claim.expected, word=verdict.word,
      verdict=verdict.phrase(scale), provisional=verdict.provisional,
      published=on_published_figures(claim, table), seeds=seeds,
      differences=[float(x) for x in differences], p=verdict.p,
      detectable=verdict.detectable, notes=notes,
      flags=[f'precondition not met: {f}' for f in flags],
      **dataclasses.asdict(verdict.estimate))


def _judge_control(name, control, table, outcomes, since) -> dict:
  metric = control.metric or next(iter(table.metrics))
  by_row = scores(table.metrics[metric], outcomes)
  row = by_row.get(control.row, {})
  if control.kind == 'aa':
    text = f'{control.row} against itself at other seeds: no difference'
    differences = [row[s] - row[s + claims.OTHER_SEEDS] for s in sorted(row)
                   if s + claims.OTHER_SEEDS in row]
    word, contradicted = verdicts.control_same(differences, control.d)
  else:
    text = f'{control.row} is worse than {control.than}'
    whole = by_row.get(control.than, {})
    sign = 1 if table.metrics[metric].better == 'higher' else -1
    differences = [sign * (whole[s] - row[s])
                   for s in verdicts.common_seeds([row, whole])]
    word, contradicted = verdicts.control_worse(differences, control.d)
  return dict(name=name, kind=control.kind, text=text, metric=metric,
              d=control.d, word=word, contradicted=contradicted,
              notes=list(since.controls.get(name, ())),
              **dataclasses.asdict(verdicts.estimate(differences)))


# ---------------------------------------------------------------------------
# The summary


def _cell(row: str, name: str, table: claims.Table, outcomes) -> dict:
  column = table.metrics[name]
  here = [o for o in outcomes if o.row == row]
  by_seed = scores(column, outcomes).get(row, {})
  siblings = {c: _mean(score_of(o, f'{column.score}/{c}') for o in here)
              for c in CONDITIONS}
  return dict(values={str(s): by_seed[s] for s in sorted(by_seed)},
              published=table.published.get(row, {}).get(name), **siblings,
              **dataclasses.asdict(verdicts.estimate(list(by_seed.values()))))


def _row(row: str, table: claims.Table, outcomes) -> dict:
  here = [o for o in outcomes if o.row == row]
  accounts = {
      kind: {account: _mean(getattr(o, kind).get(account) for o in here)
             for account in claims.ACCOUNTS} for kind in ('account', 'own')}
  return dict(
      name=row, not_run=table.not_run.get(row), **accounts,
      seeds=sorted(o.seed for o in here),
      failed={str(o.seed): o.error for o in here if o.result is None},
      cells={name: _cell(row, name, table, outcomes)
             for name in table.metrics})


def _apart(amounts: Mapping[str, float], rows: Sequence[str]) -> bool:
  held = [amounts[row] for row in rows]
  return bool(held) and min(held) < (1 - ACCOUNT_TOLERANCE) * max(held)


def _warnings(table: claims.Table, rows, outcomes, revisions) -> list[str]:
  """What makes the rows of a table less comparable than they look."""
  found = []
  results = [o.result for o in outcomes if o.result]
  for row in dict.fromkeys(o.row for o in outcomes):
    worst = max(o.unplaced for o in outcomes if o.row == row)
    if worst > UNPLACED:
      found.append(f'{row} left out up to {worst:.1%} of its documents: they '
                   'did not fit into the rows or could not be read (python -m '
                   'mmgen.look shows which)')
  amounts = {row['name']: row['own'][table.account] for row in rows
             if row['own'][table.account] is not None}
  pairs = [pair for claim in table.claims.values() for pair in claim.pairs]
  pairs += [(c.row, c.than) for c in table.controls.values() if c.than]
  unequal = {row for pair in pairs or [tuple(amounts)]
             if amounts.keys() >= set(pair) and _apart(amounts, pair)
             for row in pair}
  if unequal:
    found.append(f'rows differ in {table.account}, the account that the table '
                 'declares as matched (warm starts apart): ' + ', '.join(
                     f'{row} {amount:,.0f}' for row, amount in amounts.items()
                     if row in unequal))
  if len(revisions) > 1:
    found.append('runs of different git revisions are mixed: '
                 + ', '.join(revisions))
  for name, column in table.metrics.items():
    evaluator = column.score.split('/')[0]
    prints = {r['fingerprints'].get(evaluator) for r in results
              if column.score in r['scores']}
    if len(prints) > 1:
      found.append(f'column {name!r} mixes figures that were evaluated in '
                   'different ways (fingerprints differ): do not compare them')
    if results and not any(column.score in r['scores'] for r in results):
      found.append(f'no run has the score {column.score!r} of column {name!r}; '
                   f'scores: {", ".join(sorted(results[0]["scores"]))}')
  return found


def summarise(experiment: str, table: claims.Table, rows: Sequence[str],
              outcomes: Sequence[Outcome], since: frozen.Departures,
              scale: str) -> dict:
  """Joins a table with its outcomes.

  Args:
    experiment: its name.
    table: the declared table.
    rows: rows to show, in their order.
    outcomes: of the rows' last stages; those of the second half of an A/A
      control have seeds from `claims.OTHER_SEEDS` on.
    since: where the table departs from what was frozen.
    scale: of the runs.

  Returns:
    A dict of plain values, as stored in `table.json`.
  """
  first = [o for o in outcomes if o.seed < claims.OTHER_SEEDS]
  shown = [_row(row, table, first) for row in (*rows, *(
      r for r in table.not_run if r not in rows))]
  results = [o.result for o in outcomes if o.result]
  revisions = sorted({revision for o in outcomes for revision in o.revisions})
  judged = [_judge_claim(name, claim, table, first, since, scale)
            for name, claim in table.claims.items()]
  for claim, p in zip(judged, verdicts.holm([c['p'] for c in judged])):
    claim['p_holm'] = p
  return dict(
      experiment=experiment, scale=scale, title=table.title,
      source=table.source, published_source=table.published_source,
      account=table.account, budget=table.budget,
      exclusions=list(table.exclusions), declared_seeds=list(table.seeds),
      columns={name: dataclasses.asdict(column)
               for name, column in table.metrics.items()},
      rows=shown, claims=judged,
      controls=[_judge_control(name, control, table, outcomes, since)
                for name, control in table.controls.items()],
      warnings=[*since.warnings,
                *_warnings(table, shown, outcomes, revisions)],
      failed=sum(o.result is None for o in outcomes),
      provenance=dict(
          git_revision=revisions, device=sorted({r['device'] for r in results}),
          date=sorted({o.date for o in outcomes if o.date})))
