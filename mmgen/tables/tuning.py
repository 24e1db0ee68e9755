"""Learning rates tuned alike: one grid and the same trials for every row.

A trial is a run of one row at one rate of `TABLE.tuning.grid` with one of
`TABLE.tuning_seeds`, scored on a split that judges nothing. The best mean over
the seeds chooses a row's rate. A diverged trial counts at chance, and a row
whose trials are not complete has no choice. A choice at the edge of the grid
is no optimum, and is said to be none.

The outcome, `tuning.json`, changes no run: the rates that count stand in the
experiment file, where a reader sees them and a run's key hashes them. `lines`
are to be pasted there, and `remarks` names each row that does not train at
the rate chosen for it, or whose config has changed since.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import datetime
import json

import numpy as np

from mmgen import addresses
from mmgen import config as config_lib
from mmgen import errors
from mmgen.tables import claims
from mmgen.tables import run_graph
from mmgen.tables import summary

FIELD = 'optimizer.peak_lr'
DEFAULT_SPLIT = 'validation'  # of an evaluator whose entry names none
# (row, rate, seed)
Trial = tuple[str, float, int]


# ---------------------------------------------------------------------------
# What is to be trained


def _address(name: str, row: str, table: claims.Table) -> str:
  """Returns the address of the stage whose rate is tuned."""
  stage = f':{table.tuning.stage}' if table.tuning.stage else ''
  return str(addresses.parse(f'{name}:{row}{stage}'))


def _overlap(one: tuple[str, str], other: tuple[str, str]) -> bool:
  """Whether two (corpus, split) share examples; slices are taken at their word.
  """
  whole = lambda split: split.partition('[')[0]
  return one[0] == other[0] and whole(one[1]) == whole(other[1]) and (
      one[1] == other[1] or whole(one[1]) in (one[1], other[1]))


def _check_split(name: str, row: str, scale: str, table: claims.Table):
  """Raises a UserError if a rate would be chosen on what trains or judges."""
  last = config_lib.load(f'{name}:{row}', scale)
  config = config_lib.load(_address(name, row, table), scale)
  evaluator = table.metrics[table.tuning.metric].score.split('/')[0]
  if evaluator not in config.evaluators:
    raise errors.UserError(
        f'TABLE.tuning.metric is {table.tuning.metric!r}, a score of '
        f'{evaluator!r}; {config.name} has no such evaluator. It has: '
        f'{", ".join(config.evaluators)}.')
  chosen_on = config.evaluators[evaluator].corpus, table.tuning.split
  used = {f'config.mix.{source}': (entry.corpus, entry.split)
          for source, entry in config.mix.items()}
  for column in table.metrics.values():
    judge = column.score.split('/')[0]
    if judge in last.evaluators:
      entry = last.evaluators[judge]
      used[f'config.evaluators.{judge}'] = (
          entry.corpus, entry.get('split', DEFAULT_SPLIT))
  for where, other in used.items():
    if _overlap(chosen_on, other):
      raise errors.UserError(
          f'TABLE.tuning.split is {table.tuning.split!r}, which {where} of '
          f'{name}:{row} reads too ({other[1]!r}): a rate may not be chosen '
          'on what trains or judges.')


def trials(name: str, rows: Sequence[str], scale: str,
           table: claims.Table) -> dict[Trial, run_graph.Target]:
  """Returns the runs that tune some rows: every row at every rate and seed.

  Raises:
    UserError: the split trains or judges, or a row lacks the tuned stage.
  """
  found = {}
  for row in rows:
    _check_split(name, row, scale, table)
    address = _address(name, row, table)
    # All evaluators move: a trial sees nothing of what judges.
    split = tuple((f'evaluators.{evaluator}.split', table.tuning.split)
                  for evaluator in config_lib.load(address, scale).evaluators)
    for rate in table.tuning.grid:
      for seed in table.tuning_seeds:
        found[row, rate, seed] = run_graph.Target(
            address, seed, ((FIELD, float(rate)), *split))
  return found


# ---------------------------------------------------------------------------
# What was found


def choose(table: claims.Table, rows: Sequence[str],
           outcomes: Mapping[Trial, summary.Outcome]) -> dict[str, dict]:
  """Scores all trials and chooses a rate for each row.

  Args:
    table: the declared table.
    rows: names of the tuned rows.
    outcomes: of the trials that finished or diverged (`result` None).

  Returns:
    {row: {'trials': [{'rate', 'scores': {seed: score or None}, 'mean',
    'diverged': [seed]}], 'chosen': rate or None, 'edge': 'lowest', 'highest'
    or None}}. Of equal means the smaller rate is chosen.
  """
  column = table.metrics[table.tuning.metric]
  chance = summary.chance_level(column, outcomes.values())
  sign = 1 if column.better == 'higher' else -1
  grid, found = table.tuning.grid, {}
  for row in rows:
    tried = []
    for rate in grid:
      scores, diverged = {}, []
      for seed in table.tuning_seeds:
        o = outcomes.get((row, rate, seed))
        scores[str(seed)] = o and (
            summary.score_of(o, column.score) if o.result else chance)
        diverged += [seed] if o and not o.result else []
      known = [s for s in scores.values() if s is not None]
      mean = float(np.mean(known)) if len(known) == len(scores) else None
      tried.append(dict(rate=rate, scores=scores, mean=mean,
                        diverged=diverged))
    learned = any(len(t['diverged']) < len(table.tuning_seeds) for t in tried)
    chosen = None
    if learned and all(t['mean'] is not None for t in tried):
      chosen = max(tried, key=lambda t: sign * t['mean'])['rate']
    edge = {grid[0]: 'lowest', grid[-1]: 'highest'}.get(chosen)
    found[row] = dict(trials=tried, chosen=chosen, edge=edge)
  return found


def _outcomes(table: claims.Table, keys: Mapping[Trial, str], runs, failed):
  """Reads the trials that finished or diverged; a crash has no outcome."""
  score = table.metrics[table.tuning.metric].score
  found = {}
  for (row, rate, seed), key in keys.items():
    if key not in failed:
      result = runs[key].result
      if score not in result['scores']:
        raise errors.UserError(
            f'TABLE.tuning.metric: {runs[key]} has no score {score!r}. '
            f'Scores: {", ".join(sorted(result["scores"]))}.')
      found[row, rate, seed] = summary.Outcome(row, seed, result)
    elif not failed[key].crashed:
      found[row, rate, seed] = summary.Outcome(
          row, seed, None, failed[key].why)
  return found


def summarise(name: str, scale: str, table: claims.Table, rows: Sequence[str],
              keys: Mapping[Trial, str], runs, failed) -> dict:
  """Joins a declared tuning with its runs.

  Args:
    name: of the experiment.
    scale: of the runs.
    table: the declared table.
    rows: names of the tuned rows.
    keys: of the trials' runs.
    runs: {key: run_graph.Run}.
    failed: {key: run_graph.Failure}.

  Returns:
    A dict of plain values, as stored in `tuning.json`: what was declared, the
    date (UTC), and per row what `choose` returns with the keys of its runs.

  Raises:
    UserError: a finished run lacks the score that chooses.
  """
  found = choose(table, rows, _outcomes(table, keys, runs, failed))
  for row, about in found.items():
    about['runs'] = sorted(k for (r, *_), k in keys.items() if r == row)
  tuning = table.tuning
  return dict(
      experiment=name, scale=scale, title=table.title, field=FIELD,
      metric=tuning.metric,
      column=dataclasses.asdict(table.metrics[tuning.metric]),
      split=tuning.split, stage=tuning.stage, grid=list(tuning.grid),
      seeds=list(table.tuning_seeds),
      date=datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      rows=found)


def store(path, tuned: dict) -> dict:
  """Writes `tuning.json`; what was found before keeps its date."""
  before = read(path)
  if before and {**before, 'date': tuned['date']} == tuned:
    return before
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(tuned, indent=1) + '\n')
  return tuned


def read(path) -> dict | None:
  """Returns what `store` wrote; None if no rates were tuned."""
  return json.loads(path.read_text()) if path.exists() else None


# ---------------------------------------------------------------------------
# What is said of it


def warnings(tuned: dict) -> list[str]:
  """Names the rows whose choice is none, or lies at the edge of the grid."""
  found = []
  for row, about in tuned['rows'].items():
    if about['chosen'] is None:
      found.append(
          f'no rate can be chosen for {row}: trials of it crashed, all of them '
          'diverged, or the column has no chance level for those that did')
    elif about['edge']:
      found.append(
          f'the best rate of {row}, {about["chosen"]:g}, is the '
          f'{about["edge"]} of the grid: the optimum may lie beyond it; extend '
          'TABLE.tuning.grid and tune again')
  return found


def _rate(name: str, row: str, scale: str, table: claims.Table) -> float:
  config = config_lib.load(_address(name, row, table), scale)
  return float(config.optimizer.peak_lr)


def lines(tuned: dict, table: claims.Table) -> list[str]:
  """Returns what to write into `ROWS`, a line for each row with a choice."""
  name, scale, found = tuned['experiment'], tuned['scale'], []
  for row, about in tuned['rows'].items():
    chosen = about['chosen']
    if chosen is None:
      continue
    text = f"'{scale}': {{'{FIELD}': {chosen!r}}}"
    stage = addresses.parse(_address(name, row, table)).stage
    if len(addresses.stage_names(name, row)) > 1:
      text = f'{stage!r}: {{{text}}}'
    there = _rate(name, row, scale, table) == chosen
    found.append(f'  {row!r}: {{..., {text}}},'
                 + ('  # as it is' if there else ''))
  return found


def remarks(tuned: dict | None, name: str, rows: Sequence[str], scale: str,
            table: claims.Table, keys: Mapping[Trial, str]) -> list[str]:
  """Says in which rows a table departs from its tuning.

  Args:
    tuned: of `read`.
    name: of the experiment.
    rows: names of the rows that the table shows.
    scale: of the table.
    table: the declared table, with a tuning.
    keys: of the runs that would tune the rows as they are now.
  """
  if tuned is None:
    return ['no learning rates were tuned: run it with --tune']
  found = warnings({'rows': {row: about for row, about in tuned['rows'].items()
                             if row in rows}})
  column = dataclasses.asdict(table.metrics[table.tuning.metric])
  for row in rows:
    about = tuned['rows'].get(row)
    now = sorted(k for (r, *_), k in keys.items() if r == row)
    rate = _rate(name, row, scale, table)
    if about is None:
      found.append(f'the rate of {row}, {rate:g}, is not tuned: repeat --tune')
      continue
    if about['chosen'] not in (None, rate):
      found.append(f'{row} trains at {rate:g}, the rate chosen for it is '
                   f'{about["chosen"]:g}')
    if about['runs'] != now or tuned['column'] != column:
      found.append(f'the rate of {row} was tuned under another config, grid, '
                   'split, metric, code version or seeds than now: repeat '
                   '--tune')
  return found
