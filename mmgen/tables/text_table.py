"""A summary as text: figures, a table for the terminal, Markdown.

The input of every function is (a part of) what `summary.summarise` returns,
or `tuning.summarise` where it is called `tuned`.
"""

import rich.console
import rich.markup
import rich.table
import rich.text

from mmgen.tables import claims

NONE = '–'
STYLES = {'reproduced': 'bold green', 'reversed': 'bold red',
          'absent': 'bold blue', 'undecided': 'bold yellow'}
ACCOUNT_NAMES = {
    'samples': 'samples', 'text_tokens': 'text tokens',
    'visual_tokens': 'visual tokens', 'flops': 'training FLOPs',
    'parameters': 'parameters'}


# ---------------------------------------------------------------------------
# Figures


def figure(value: float | None, column: dict, sign: bool = False) -> str:
  """Returns a score as its column prints it: points, or the raw number."""
  if value is None:
    return NONE
  form = ('+' if sign else '') + (
      '.1f' if column['unit'] == 'percent' else '.3f')
  return format(value / claims.UNITS[column['unit']], form)


def mean_and_spread(cell: dict, column: dict) -> str:
  """Returns 'mean ± standard deviation over seeds'."""
  text = figure(cell['mean'], column)
  return text if cell['sd'] is None else (
      f'{text} ± {figure(cell["sd"], column)}')


def about_scores(said: dict) -> str:
  """Says in words what stands in a cell of scores."""
  seeds = max((cell['n'] for row in said['rows']
               for cell in row['cells'].values()), default=0)
  spread = ('One seed: figures without a spread, and no verdict' if seeds == 1
            else 'Mean ± standard deviation over seeds, with the 90 % t '
            'interval')
  return (f'{spread}; below, the best blind guess and the same model with grey '
          'and with shuffled pictures.')


def interval(estimate: dict, column: dict, sign: bool = False) -> str:
  """Returns '[low, high]' of the 90 % interval, or '' below two seeds."""
  if estimate['low'] is None:
    return ''
  return (f'[{figure(estimate["low"], column, sign)}, '
          f'{figure(estimate["high"], column, sign)}]')


def published(row: dict, name: str) -> str:
  value = row['cells'][name]['published']
  return NONE if value is None else f'{value:g}'


def siblings(cell: dict, column: dict) -> str:
  """Returns the scores without the right picture, in one line."""
  return ' · '.join(f'{name} {figure(cell[name], column)}'
                    for name in ('blind', 'grey', 'shuffled')
                    if cell[name] is not None)


def amount(value: float | None) -> str:
  """Returns a large number with three digits and a letter: 25.6 k."""
  if value is None:
    return NONE
  for letter, size in (('E', 1e18), ('P', 1e15), ('T', 1e12), ('G', 1e9),
                       ('M', 1e6), ('k', 1e3)):
    if value >= size:
      return f'{value / size:.3g} {letter}'
  return f'{value:.3g}'


def account(row: dict, name: str) -> str:
  """Returns what a row was charged, and how much of it by warm starts."""
  total, own = row['account'][name], row['own'][name]
  text = amount(total)
  if total is not None and total > own:
    text += f' ({amount(total - own)} in warm starts)'
  return text


def p_value(p: float | None) -> str:
  return NONE if p is None else '<0.001' if p < 0.001 else f'{p:.3f}'


def effect(claim: dict, columns: dict) -> str:
  """Returns the claim's mean over seeds with its 90 % interval."""
  column = columns[claim['metric']]
  return (f'{figure(claim["mean"], column, sign=True)} '
          f'{interval(claim, column, sign=True)}').strip()


def remarks(claim: dict, columns: dict) -> list[str]:
  """Returns what stands below a claim, one line each."""
  lines = [*claim['flags'], *claim['notes']]
  if claim['word'] == 'undecided':
    detectable = figure(claim['detectable'], columns[claim['metric']])
    lines.insert(0, f'an effect of {detectable} would have been found with '
                    f'power 0.8 by these {claim["n"]} seeds')
  if claim['word'] == 'reproduced' and claim['p_holm'] > 0.05:
    lines.append('does not survive the adjustment for the number of claims')
  return lines


def expectation(claim: dict) -> str:
  return {True: 'expected', False: 'not expected', None: 'open'}[
      claim['expected']]


def failures(row: dict) -> list[str]:
  """Returns a line for each failed run, or why the row is not run at all."""
  if row['not_run']:
    return [f'not run: {row["not_run"]}']
  return [f'seed {seed} failed, counted at chance: {error}'
          for seed, error in row['failed'].items()]


def rates(tuned: dict) -> list[list[str]]:
  """Returns the mean score of every row at every learning rate, as lines.

  The first line is the head; the last column is the rate that was chosen.
  """
  lines = [['row', *(f'{rate:g}' for rate in tuned['grid']), 'chosen']]
  for row, about in tuned['rows'].items():
    cells = []
    for trial in about['trials']:
      cells.append(figure(trial['mean'], tuned['column']))
      if trial['diverged']:
        cells[-1] += f' ({len(trial["diverged"])} diverged)'
    chosen = NONE if about['chosen'] is None else f'{about["chosen"]:g}'
    if about['edge']:
      chosen += f' ({about["edge"]} of the grid: no optimum)'
    lines.append([row, *cells, chosen])
  return lines


def about_rates(tuned: dict) -> str:
  """Says in a sentence or two what `rates` shows."""
  return (
      f'Mean of {tuned["metric"]} on the {tuned["split"]} split over the '
      f'tuning seeds {", ".join(map(str, tuned["seeds"]))}, by peak learning '
      f'rate of the {tuned["stage"] or "last"} stage, on {tuned["date"]}. The '
      'same trials for every row; a diverged one counts at chance.')


def other_scale(said: dict, claim: dict) -> str:
  return said['other_scale'].get(claim['name'], 'not run')


# ---------------------------------------------------------------------------
# Terminal


def _rich_table(title: str, *columns: str):
  table = rich.table.Table(title=title, title_justify='left', show_lines=True)
  for i, column in enumerate(columns):
    table.add_column(column, justify='right' if i else 'left')
  return table


def _scores(said):
  columns = said['columns']
  table = _rich_table(
      f'{said["title"]} ({said["scale"]} scale)', 'row', *columns)
  for row in said['rows']:
    cells = [rich.text.Text(row['name'], 'bold')]
    for name, column in columns.items():
      cell = row['cells'][name]
      text = rich.text.Text(mean_and_spread(cell, column))
      for extra in (interval(cell, column), siblings(cell, column)):
        text.append(f'\n{extra}' if extra else '', 'dim')
      if cell['published'] is not None:
        text.append(f'\npublished {published(row, name)}', 'cyan')
      cells.append(text)
    table.add_row(*cells)
  return table


def _accounts(said):
  table = _rich_table(
      'Accounts', 'row',
      *(f'{ACCOUNT_NAMES[a]}{" (matched)" if a == said["account"] else ""}'
        for a in claims.ACCOUNTS))
  for row in said['rows']:
    if not row['not_run']:
      table.add_row(row['name'], *(account(row, a) for a in claims.ACCOUNTS))
  return table


def _claims(said):
  table = _rich_table(
      'Claims', 'claim', 'on published figures', 'difference [90 %]', 'd',
      'p / Holm', f'{said["scale"]} scale')
  for claim in said['claims']:
    column = said['columns'][claim['metric']]
    text = rich.text.Text(claim['text'])
    for line in remarks(claim, said['columns']):
      text.append(f'\n{line}', 'dim')
    table.add_row(
        text, claim['published'], effect(claim, said['columns']),
        figure(claim['d'], column),
        f'{p_value(claim["p"])} / {p_value(claim["p_holm"])}',
        rich.text.Text(claim['verdict'], STYLES.get(claim['word'], '')))
  return table


def _controls(said):
  table = _rich_table('Controls', 'control', 'difference [90 %]', 'outcome')
  for control in said['controls']:
    table.add_row(
        '\n'.join([control['text'], *control['notes']]),
        effect(control, said['columns']),
        rich.text.Text(control['word'],
                       'bold red' if control['contradicted'] else ''))
  return table


def tuning(tuned: dict) -> rich.console.Group:
  """Returns what `mmgen.table --tune` prints of the learning rates."""
  head, *lines = rates(tuned)
  table = _rich_table('Learning rates', *head)
  for line in lines:
    table.add_row(*line)
  return rich.console.Group(
      table, rich.text.Text(about_rates(tuned), 'dim'))


def terminal(said: dict) -> rich.console.Group:
  """Returns what `mmgen.table` prints at the end."""
  parts = [_scores(said), rich.text.Text(about_scores(said), 'dim'),
           _accounts(said)]
  if said['claims']:
    parts.append(_claims(said))
  if said['controls']:
    parts.append(_controls(said))
  if said['tuning']:
    parts.append(tuning(said['tuning']))
  parts += [rich.text.Text(f'{row["name"]}: {line}', 'yellow')
            for row in said['rows'] for line in failures(row)]
  parts += [rich.text.Text(f'warning: {w}', 'yellow')
            for w in said['warnings']]
  return rich.console.Group(*parts)


# ---------------------------------------------------------------------------
# Markdown


def _grid(head, rows) -> str:
  clean = lambda text: str(text).replace('|', '\\|').replace('\n', '<br>')
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join(f'| {" | ".join(map(clean, line))} |' for line in lines)


def markdown(said: dict) -> str:
  """Returns `table.md`: the table, claims, controls, accounts, origin."""
  columns = said['columns']
  printed = [c for c in columns if any(
      row['cells'][c]['published'] is not None for row in said['rows'])]
  seeds = ', '.join(map(str, said['declared_seeds']))
  parts = [
      f'# {said["title"]}',
      f'`{said["experiment"]}` at {said["scale"]} scale. Source: '
      f'{said["source"] or "none"}. Matched account: {said["account"]}. '
      f'Budget: {said["budget"] or "not stated"}. Declared seeds: {seeds}.',
      _grid(['row', *columns, *(f'{c}, published' for c in printed)],
            [[row['name'],
              *('\n'.join(filter(None, (
                  mean_and_spread(row['cells'][c], columns[c]),
                  interval(row['cells'][c], columns[c]),
                  siblings(row['cells'][c], columns[c])))) for c in columns),
              *(published(row, c) for c in printed)] for row in said['rows']]),
      about_scores(said)]
  if said['claims']:
    other = 'paper' if said['scale'] == 'mini' else 'mini'
    parts += ['## Claims', _grid(
        ['claim', 'source', 'on published figures', 'difference [90 %]', 'd',
         'p', 'p (Holm)', f'{said["scale"]} scale', f'{other} scale'],
        [['\n'.join([c['text'], *remarks(c, columns)]), expectation(c),
          c['published'], effect(c, columns),
          figure(c['d'], columns[c['metric']]), p_value(c['p']),
          p_value(c['p_holm']), c['verdict'], other_scale(said, c)]
         for c in said['claims']])]
  if said['controls']:
    parts += ['## Controls', _grid(
        ['control', 'difference [90 %]', 'outcome'],
        [['\n'.join([c['text'], *c['notes']]), effect(c, columns), c['word']]
         for c in said['controls']])]
  if said['tuning']:
    head, *lines = rates(said['tuning'])
    parts += ['## Learning rates', _grid(head, lines),
              about_rates(said['tuning'])]
  parts += ['## Accounts', _grid(
      ['row', *(ACCOUNT_NAMES[a] for a in claims.ACCOUNTS)],
      [[row['name'], *(account(row, a) for a in claims.ACCOUNTS)]
       for row in said['rows']])]
  lines = [f'{row["name"]}: {line}'
           for row in said['rows'] for line in failures(row)]
  lines += [*said['exclusions'], *said['warnings']]
  if lines:
    parts += ['## Remarks', '\n'.join(f'- {line}' for line in lines)]
  parts += ['## Origin', '\n'.join(
      f'- {key.replace("_", " ")}: {", ".join(values) or NONE}'
      for key, values in said['provenance'].items())]
  return '\n\n'.join(parts) + '\n'
