"""Runs the table of an experiment and prints what it says.

  python -m mmgen.table --list
  python -m mmgen.table --experiment=quickstart
  python -m mmgen.table --experiment=eve/encoder --seeds=0,1 --dry_run
  python -m mmgen.table --experiment=eve/encoder --tune

A row is a chain of runs and each run may start from others, so a table is a
graph. This command walks it: parents first, a run that rows share once, what
is finished not again, what was cut off from its last checkpoint. Then it
writes `report.html`, `table.md` and `table.json` and prints the table. A
verdict never fails the command. A crashed row does, after all others ran, and
so does a control that 5 or more seeds contradict (a row against itself does so
by chance in about 1 of 10 healthy tables). With --rows or --seeds, what is
written goes to `part/` beside the whole table.

How to write an ablation in one file: copy `experiments/quickstart.py`, keep
`base(scale)`, name each row in `ROWS` by the fields it changes, and declare

  TABLE = dict(
      title='...',
      source='arXiv:2406.11832v2, Table 3',
      metrics={'vqa': 'vqa/accuracy',          # column: score in result.json
               'loss': dict(score='loss/loss', unit='raw', better='lower')},
      published={'clip': {'vqa': 78.5}},       # row: column: figure as printed
      published_source='...',                  # if it is not `source`
      claims={'encoder_gap': dict(
          kind='greater', a='clip', b='patches', metric='vqa', d=0.03,
          text='A trained encoder beats linear patches.', expected=True)},
      controls={'aa': dict(kind='aa', row='patches'),
                'shuffled': dict(kind='worse', row='patches_shuffled',
                                 than='patches')},
      seeds=(0, 1, 2, 3, 4, 5, 6, 7),
      tuning=dict(grid=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3), metric='vqa',
                  split='validation'),         # see below
      tuning_seeds=(100, 101),                 # never those that judge
      account='samples',                       # what the rows have in common
      budget='800 steps of 32 pictures',
      exclusions=('...',),                     # declared beforehand
      not_run={'eve_7b_hd': 'needs 33M web pictures; substitute: ...'})

Only `title` and `metrics` are needed. The fields of a column, a claim (kinds
'greater', 'equal', 'trend', 'interaction', 'margin') and a control are
described in `mmgen.tables.claims`, the rules of a verdict in
`mmgen.tables.verdicts`. An 'aa' control trains its row at further seeds (1000
and up). Claims and controls are frozen when a table first runs, with their rows
(their configs, and those of all runs they start from), the seeds, budget,
account and exclusions. A claim that is changed or added afterwards, or rests on
results that were there before, is marked exploratory, and one that is dropped
is named; see `mmgen.tables.frozen`.

`--tune` trains every row at every peak learning rate of `tuning.grid` with the
tuning seeds, scores it on a split that judges nothing, and prints the best
rate of each row as lines for `ROWS`. It changes no run by itself: the rates
that count stand in the file. From then on the table names each row that trains
at another rate than the one chosen for it. In rows of several stages the last
one is tuned, or `tuning.stage`. See `mmgen.tables.tuning`.

A file of your own, outside the repository, is run by its path:
`--experiment=my_ablation.py`.
"""

import argparse
from collections.abc import Mapping
import json
import signal
import sys

from etils import epath
import numpy as np
import rich.console

from mmgen import addresses
from mmgen import config as config_lib
from mmgen import errors
from mmgen.tables import claims
from mmgen.tables import frozen
from mmgen.tables import report
from mmgen.tables import run_graph
from mmgen.tables import summary
from mmgen.tables import text_table
from mmgen.tables import tuning
from mmgen.training import metrics

# ---------------------------------------------------------------------------
# From runs to outcomes


def loss_fall(rows) -> float | None:
  """Relative fall of the training loss over the last tenth of a run.

  Args:
    rows: of `metrics.jsonl`.

  Returns:
    By a straight line through the last tenth of the steps; None if the run is
    shorter than 30 logged steps.
  """
  loss = [row['loss'] for row in rows if 'loss' in row]
  tail = loss[-(len(loss) // 10):]
  if len(loss) < 30:
    return None
  steps = np.arange(len(tail))
  slope, first = np.polyfit(steps, tail, 1)
  return float(-slope * steps[-1] / first)


def _account(keys, runs) -> dict[str, float]:
  """Sums what some runs consumed; parameters are those of the first."""
  results = [runs[key].result for key in keys]
  return {account: results[0][account] if account == 'parameters'
          else sum(result[account] for result in results)
          for account in claims.ACCOUNTS}


def outcome(
    row: str, seed: int, key: str, runs: Mapping[str, run_graph.Run],
    failed: Mapping[str, run_graph.Failure]) -> summary.Outcome:
  """Reads what the last run of a row left behind."""
  if key in failed:
    return summary.Outcome(row, seed, None, failed[key].why)
  run, chain = runs[key], run_graph.ancestors(key, runs)
  results = [runs[k].result for k in chain]
  here = addresses.parse(run.address).experiment
  own = [k for k in chain
         if addresses.parse(runs[k].address).experiment == here]
  return summary.Outcome(
      row, seed, run.result, account=_account(chain, runs),
      own=_account(own, runs), examples=run.result['examples'],
      loss_fall=loss_fall(metrics.read_rows(run.folder)),
      unplaced=max(r['unplaced'] / (r['unplaced'] + r['samples'])
                   for r in results),
      revisions=tuple(r['git_revision'] for r in results),
      date=run.result['date'])


def declared_runs(
    name: str, table: claims.Table, scale: str, data_dir) -> dict[str, str]:
  """Returns {row: what it trains and how it is scored} of all rows to run.

  The keys of the run that a row ends in, at the first seed: they cover its
  config, those of all runs it starts from, the pictures and RESULT_VERSION.
  """
  found = {}
  for row in addresses.rows(name):
    if row not in table.not_run:
      config = config_lib.load(f'{name}:{row}', scale, seed=table.seeds[0])
      found[row] = (f'{config_lib.run_key(config, data_dir)}.'
                    f'{config_lib.evaluation_key(config, data_dir)}')
  return found


def since_frozen(args, table: claims.Table) -> frozen.Departures:
  """Says where a table departs from what was declared before its first run.

  The first time it stores what is declared, and which results are there.
  """
  name = args.experiment
  path = _folder(args, args.scale) / 'table.frozen.json'
  runs = declared_runs(name, table, args.scale, args.data_dir)
  stored = frozen.read(path)
  if stored is None:
    targets = targets_of(
        name, _selected_rows(None, name, table), table.seeds, table)
    found, keys = run_graph.plan(
        targets.values(), args.scale, args.workdir, args.data_dir)
    stored = frozen.declaration(table, runs, [
        wanted for wanted, target in targets.items()
        if found[keys[target]].state not in (
            run_graph.MISSING, run_graph.CUT_OFF)])
    frozen.write(path, stored)
  return frozen.departures(table, stored, frozen.declaration(table, runs))


# ---------------------------------------------------------------------------
# The command


def declared(name: str) -> claims.Table:
  """Returns the checked table of an experiment."""
  module = addresses.experiment(name)
  if not hasattr(module, 'TABLE'):
    raise errors.UserError(f'experiment {name!r} declares no TABLE.')
  return claims.parse(module.TABLE, addresses.rows(name))


def _selected_rows(text: str | None, name: str, table: claims.Table):
  rows = [row for row in addresses.rows(name) if row not in table.not_run]
  for row in text.split(',') if text else ():
    if row not in rows:
      raise errors.UserError(
          f'--rows: {name!r} has no row {row!r} to run.'
          f'{errors.nearest(row, rows)} Rows: {", ".join(rows)}.')
  return [row for row in rows if not text or row in text.split(',')]


def _selected_seeds(text: str | None, table: claims.Table):
  if text is None:
    return list(table.seeds)
  try:
    seeds = [int(seed) for seed in text.split(',')]
  except ValueError:
    seeds = [-1]
  if not all(0 <= seed < claims.OTHER_SEEDS for seed in seeds):
    raise errors.UserError(
        f'--seeds={text}: expected whole numbers from 0 to '
        f'{claims.OTHER_SEEDS - 1}, separated by commas, such as 0,1,2.')
  return list(dict.fromkeys(seeds))


def targets_of(name: str, rows, seeds, table: claims.Table):
  """Returns {(row, seed): target}, the second halves of A/A rows included."""
  wanted = [(row, seed) for seed in seeds for row in rows]
  wanted += [(control.row, seed + claims.OTHER_SEEDS)
             for control in table.controls.values()
             if control.kind == 'aa' and control.row in rows
             for seed in seeds]
  return {(row, seed): run_graph.Target(
      addresses.stages(f'{name}:{row}')[-1], seed) for row, seed in wanted}


def _part(name: str, table: claims.Table, rows, seeds) -> str:
  """Says which part of a table was asked for; '' if it is the whole."""
  whole = (_selected_rows(None, name, table), sorted(table.seeds))
  if (rows, sorted(seeds)) == whole:
    return ''
  return (f'only a part of the table: rows {", ".join(rows)}; seeds '
          f'{", ".join(map(str, seeds))}')


def _list():
  for name in addresses.experiment_names():
    if hasattr(addresses.experiment(name), 'TABLE'):
      table = declared(name)
      print(f'{name}: {table.title}\n  rows {", ".join(addresses.rows(name))}'
            f'; {len(table.seeds)} seeds, {len(table.claims)} claims')


def _arguments(argv):
  parser = argparse.ArgumentParser(
      prog='python -m mmgen.table', allow_abbrev=False,
      description=__doc__.split('\n', 1)[0])
  parser.add_argument('--experiment', help='such as quickstart, or a .py file')
  parser.add_argument('--rows', help='only these rows, separated by commas')
  parser.add_argument('--seeds', help='only these seeds, such as 0,1')
  parser.add_argument('--scale', default='mini', choices=config_lib.SCALES)
  parser.add_argument('--list', action='store_true',
                      help='list the experiments that declare a table')
  parser.add_argument('--tune', action='store_true',
                      help='find the best learning rate of every row')
  parser.add_argument('--dry_run', action='store_true',
                      help='show what is there and what would run')
  config_lib.add_folders(parser)
  return parser.parse_args(argv)


def _folder(args, scale: str):
  name = args.experiment.removesuffix('.py').replace('/', '.').lstrip('.')
  return epath.Path(args.workdir) / 'tables' / f'{name}.{scale}'


def _other_scale(args) -> dict[str, str]:
  """Returns {claim: verdict} of this table at the other scale, if it ran."""
  other, = set(config_lib.SCALES) - {args.scale}
  path = _folder(args, other) / 'table.json'
  stored = json.loads(path.read_text()) if path.exists() else {'claims': []}
  return {claim['name']: claim['verdict'] for claim in stored['claims']}


def _plan(args, targets, title: str):
  """Plans some targets and says what is there, in full if only that is asked.
  """
  runs, keys = run_graph.plan(
      targets.values(), args.scale, args.workdir, args.data_dir)
  finished = sum(run.state == run_graph.DONE for run in runs.values())
  print(f'{title}, {len(runs)} runs, {finished} of them finished')
  if args.dry_run:
    for run in runs.values():
      print(f'  {run.state:8} {run}  {run.folder}')
  return runs, {wanted: keys[target] for wanted, target in targets.items()}


def _execute(args, runs) -> dict[str, run_graph.Failure]:
  return run_graph.execute(
      runs, lambda run: run_graph.launch(run, args.workdir, args.data_dir),
      print)


def _say_crashes(runs, failed) -> bool:
  """Repeats at the end what crashed; returns whether anything did."""
  crashed = {key: f.why for key, f in failed.items() if f.crashed}
  for key, why in crashed.items():
    print(f'{runs[key]} crashed: {why}')
  return bool(crashed)


def tune(args) -> int:
  """Tunes the learning rates of all rows; returns the exit code."""
  table = declared(args.experiment)
  if table.tuning is None:
    raise errors.UserError(
        f'experiment {args.experiment!r} declares no TABLE.tuning.')
  if args.rows or args.seeds:
    raise errors.UserError(
        '--tune gives every row the same trials: leave out --rows and --seeds.')
  rows = _selected_rows(None, args.experiment, table)
  runs, keys = _plan(
      args, tuning.trials(args.experiment, rows, args.scale, table),
      f'{table.title}: tuning {len(rows)} rows at {len(table.tuning.grid)} '
      f'rates, {len(table.tuning_seeds)} seeds')
  if args.dry_run:
    return 0
  folder = _folder(args, args.scale)
  with errors.writing(folder):  # before hours of training, not after
    folder.mkdir(parents=True, exist_ok=True)
  failed = _execute(args, runs)
  tuned = tuning.summarise(
      args.experiment, args.scale, table, rows, keys, runs, failed)
  warnings = tuning.warnings(tuned)
  with errors.writing(folder):
    tuned = tuning.store(folder / 'tuning.json', tuned)
    (folder / 'tuning.html').write_text(report.tuning_page(tuned, warnings))
  rich.console.Console().print(text_table.tuning(tuned))
  for warning in warnings:
    print(f'warning: {warning}')
  print('the lines for ROWS (join them with what a row holds already):')
  print('\n'.join(tuning.lines(tuned, table)))
  print(f'plot: {folder / "tuning.html"}')
  return int(_say_crashes(runs, failed))


def _tuned(args, rows, table: claims.Table):
  """Returns what was tuned, and lines that say where the rows depart from it.
  """
  if table.tuning is None:
    return None, []
  tuned = tuning.read(_folder(args, args.scale) / 'tuning.json')
  wanted = tuning.trials(args.experiment, rows, args.scale, table)
  _, keys = run_graph.plan(
      wanted.values(), args.scale, args.workdir, args.data_dir)
  return tuned, tuning.remarks(
      tuned, args.experiment, rows, args.scale, table,
      {trial: keys[target] for trial, target in wanted.items()})


def run_table(args) -> int:
  """Runs, writes and prints one table; returns the exit code."""
  table = declared(args.experiment)
  rows = _selected_rows(args.rows, args.experiment, table)
  seeds = _selected_seeds(args.seeds, table)
  runs, keys = _plan(
      args, targets_of(args.experiment, rows, seeds, table),
      f'{table.title}: {len(rows)} rows, {len(seeds)} seeds')
  if args.dry_run:
    return 0
  tuned, departures = _tuned(args, rows, table)
  folder = _folder(args, args.scale)
  since = since_frozen(args, table)
  failed = _execute(args, runs)
  outcomes = [outcome(*wanted, key, runs, failed)
              for wanted, key in keys.items()]
  said = summary.summarise(
      args.experiment, table, rows, outcomes, since, args.scale)
  said['other_scale'] = _other_scale(args)
  said['tuning'] = tuned
  said['warnings'] += departures
  part = _part(args.experiment, table, rows, seeds)
  if part:
    said['warnings'].insert(0, part)
    folder /= 'part'  # beside the whole table, which it does not replace
  shown = {row: keys[row, seeds[0]] for row in rows}
  report.write(folder, said, {
      row: (runs[key].folder, runs[key].config)
      for row, key in shown.items() if key not in failed}, args.data_dir)
  rich.console.Console().print(text_table.terminal(said))
  print(f'report: {folder / "report.html"}')
  contradicted = [c for c in said['controls'] if c['contradicted']]
  for control in contradicted:
    chance = ('; about 1 of 10 healthy tables does so by chance'
              if control['kind'] == 'aa' else '')
    print(f'control {control["name"]!r} contradicts its expectation{chance}: '
          'do not believe this table before you know why')
  crashed = _say_crashes(runs, failed)
  return 1 if crashed or contradicted else 0


def main(argv=None):
  """Parses the command line and runs; exits with the code of the table."""
  args = _arguments(argv)
  if args.list:
    _list()
    return
  if not args.experiment:
    raise errors.UserError('--experiment is missing; --list shows them.')
  # A termination becomes an exception, which ends the running child too.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  try:
    sys.exit(tune(args) if args.tune else run_table(args))
  except KeyboardInterrupt:
    print('stopped; the same command goes on from here')
    sys.exit(130)


if __name__ == '__main__':
  errors.run(main)
