"""The static page of a table: figures, verdicts, curves, pictures, origin.

`report.html` needs no network and no other file: styles, plots and pictures
are inside. Beside it stand `table.md`, for people, and `table.json`, for
programs, with the same figures.
"""

import base64
import html
import io
import json

from etils import epath
from PIL import Image

from mmgen import errors
from mmgen.data import corpora
from mmgen.tables import claims
from mmgen.tables import plots
from mmgen.tables import text_table

PICTURES = 12  # of each evaluator
NO_BREAK = '\N{NO-BREAK SPACE}'

STYLE = '''
:root { --ink:#1d2433; --soft:#667085; --line:#e4e7ec; --paper:#fff;
  --back:#f7f8fa; --accent:#0072b2; }
* { box-sizing:border-box }
body { margin:0; background:var(--back); color:var(--ink);
  font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif; }
main { max-width:1120px; margin:0 auto; padding:40px 24px 80px; }
h1 { font-size:28px; line-height:1.25; margin:0 0 8px; letter-spacing:-.01em }
h2 { font-size:18px; margin:40px 0 12px }
p.lead, .soft { color:var(--soft) } .soft { font-size:12.5px }
section.card, .card { background:var(--paper); border:1px solid var(--line);
  border-radius:12px; padding:18px 20px; margin:12px 0;
  box-shadow:0 1px 2px rgba(16,24,40,.04); overflow-x:auto }
table { border-collapse:collapse; width:100%;
  font-variant-numeric:tabular-nums }
th { font-weight:600; font-size:12.5px; color:var(--soft); text-align:right;
  padding:6px 12px; border-bottom:1px solid var(--line); white-space:nowrap }
td { text-align:right; padding:10px 12px; border-bottom:1px solid #f0f2f5;
  vertical-align:top }
tr:last-child td { border-bottom:0 }
th:first-child, td:first-child { text-align:left; padding-left:0 }
td.best b { color:var(--accent) } td .soft { display:block }
.chip { display:inline-block; border-radius:999px; padding:2px 10px;
  font-size:12.5px; font-weight:600; background:#eef1f5; color:#475467 }
.reproduced { background:#dff5e9; color:#05603a }
.reversed { background:#fde4e1; color:#912018 }
.absent { background:#dfeefc; color:#0b4a8f }
.undecided { background:#fdf1d3; color:#7a4d05 }
.claim { display:grid; grid-template-columns:1fr 330px; gap:8px 28px }
.claim h3 { margin:0 0 6px; font-size:15.5px; font-weight:600 }
.facts { display:flex; flex-wrap:wrap; gap:4px 22px; margin:8px 0 0;
  font-size:13px } .facts span { color:var(--soft) }
.note { border-left:3px solid #fdb022; background:#fffaeb; padding:8px 12px;
  margin:8px 0; border-radius:0 8px 8px 0; font-size:13.5px }
.gallery { display:grid; gap:14px;
  grid-template-columns:repeat(auto-fill,minmax(240px,1fr)) }
.gallery div.card { margin:0; display:flex; gap:12px; padding:12px;
  font-size:13px; line-height:1.4; overflow:hidden }
.card > img { max-width:100% }
.gallery img { width:88px; height:88px; border-radius:8px; flex:none;
  object-fit:cover; image-rendering:pixelated }
.yes { color:#05603a } .no { color:#912018 }
.key { display:inline-block; width:14px; height:4px; border-radius:2px;
  margin:0 6px 3px 14px }
@media (max-width:760px) { .claim { grid-template-columns:1fr } }
'''


def predictions(folder, evaluator: str) -> list[dict]:
  """Returns the predictions that a run stored for an evaluator, or []."""
  path = epath.Path(folder) / 'predictions' / f'{evaluator}.jsonl'
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------
# Pieces of HTML


def _tag(name: str, content: str, css: str = '') -> str:
  return f'<{name}{f" class={chr(34)}{css}{chr(34)}" if css else ""}>' \
         f'{content}</{name}>'


def _grid(head, rows) -> str:
  """A table of ready-made cells; a cell is HTML or (HTML, class)."""
  cell = lambda c: _tag('td', *((c,) if isinstance(c, str) else c))
  lines = [_tag('tr', ''.join(_tag('th', h) for h in head))]
  lines += [_tag('tr', ''.join(map(cell, row))) for row in rows]
  return _tag('section', _tag('table', '\n'.join(lines)), 'card')


def _soft(text: str) -> str:
  return _tag('span', html.escape(text), 'soft') if text else ''


def _unbroken(text: str) -> str:
  """Lets a line break at its middle dots only."""
  return text.replace(' ', NO_BREAK).replace(f'{NO_BREAK}·{NO_BREAK}', ' · ')


def _chip(text: str, css: str = '') -> str:
  return _tag('span', html.escape(text), f'chip {css}'.strip())


def _best_rows(said: dict, name: str) -> list[str]:
  means = {row['name']: row['cells'][name]['mean'] for row in said['rows']
           if row['cells'][name]['mean'] is not None}
  if not means:
    return []
  choose = max if said['columns'][name]['better'] == 'higher' else min
  best = choose(means.values())
  return [row for row, mean in means.items() if mean == best]


def _main_table(said: dict) -> str:
  columns, lines = said['columns'], []
  best = {name: _best_rows(said, name) for name in columns}
  for row in said['rows']:
    line = [_tag('b', html.escape(row['name']))
            + ''.join(_soft(text) for text in text_table.failures(row))]
    for name, column in columns.items():
      cell = row['cells'][name]
      text = _tag('b', text_table.mean_and_spread(cell, column))
      for below in (text_table.interval(cell, column),
                    text_table.siblings(cell, column)):
        text += _soft(_unbroken(below))
      if cell['published'] is not None:
        text += _soft(f'published {text_table.published(row, name)}')
      line.append((text, 'best' if row['name'] in best[name] else ''))
    lines.append([*line, text_table.account(row, said['account'])])
  matched = text_table.ACCOUNT_NAMES[said['account']]
  return _grid(['row', *map(html.escape, columns), f'{matched} (matched)'],
               lines)


def _forest(claim: dict, column: dict) -> str:
  """Differences of single seeds, their interval, and the band (-d, d)."""
  if claim['mean'] is None:
    return ''
  points = [*claim['differences'], claim['d'], -claim['d'],
            claim['low'] or 0, claim['high'] or 0]
  width, mid = 330, 34
  reach = 1.15 * max(map(abs, points)) or 1.0
  x = lambda value: width / 2 * (1 + value / reach)
  parts = [
      f'<rect x="{x(-claim["d"]):.1f}" y="8" rx="3" height="52" '
      f'width="{x(claim["d"]) - x(-claim["d"]):.1f}" fill="#f0f2f5"/>',
      f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="4" y2="64" '
      'stroke="#98a2b3" stroke-dasharray="3 3"/>']
  if claim['low'] is not None:
    parts.append(
        f'<line x1="{x(claim["low"]):.1f}" x2="{x(claim["high"]):.1f}" '
        f'y1="{mid}" y2="{mid}" stroke="#0072b2" stroke-width="3" '
        'stroke-linecap="round"/>')
  parts += [f'<circle cx="{x(value):.1f}" cy="{mid + 14}" r="3" '
            'fill="#0072b2" fill-opacity=".35"/>'
            for value in claim['differences']]
  parts.append(f'<circle cx="{x(claim["mean"]):.1f}" cy="{mid}" r="6" '
               'fill="#0072b2" stroke="#fff" stroke-width="2"/>')
  for value, anchor in ((-claim['d'], 'end'), (claim['d'], 'start')):
    parts.append(
        f'<text x="{x(value):.1f}" y="78" font-size="11" fill="#667085" '
        f'text-anchor="{anchor}">'
        f'{text_table.figure(value, column, sign=True)}</text>')
  return (f'<svg viewBox="0 0 {width} 82" width="{width}" role="img" '
          'aria-label="difference per seed, mean and interval">'
          f'{"".join(parts)}</svg>')


def _claim_cards(said: dict) -> str:
  cards = []
  other = 'paper' if said['scale'] == 'mini' else 'mini'
  for claim in said['claims']:
    column = said['columns'][claim['metric']]
    facts = {
        'on published figures': claim['published'],
        'source': text_table.expectation(claim),
        'difference [90 %]': text_table.effect(claim, said['columns']) or '–',
        'd': text_table.figure(claim['d'], column),
        'p': text_table.p_value(claim['p']),
        'p (Holm)': text_table.p_value(claim['p_holm']),
        'seeds': str(claim['n']),
        f'{other} scale': text_table.other_scale(said, claim)}
    body = _tag('h3', html.escape(claim['text']))
    body += _chip(claim['verdict'], claim['word'])
    body += _tag('div', ''.join(
        f'<div><span>{k}</span> {html.escape(v)}</div>'
        for k, v in facts.items()), 'facts')
    body += ''.join(_tag('div', html.escape(line), 'note')
                    for line in text_table.remarks(claim, said['columns']))
    cards.append(_tag('section', _tag('div', body)
                      + _tag('div', _forest(claim, column)), 'card claim'))
  return '\n'.join(cards)


def _controls(said: dict) -> str:
  return _grid(['control', 'difference [90 %]', 'd', 'outcome'], [
      [html.escape(c['text']) + ''.join(map(_soft, c['notes'])),
       text_table.effect(c, said['columns']),
       text_table.figure(c['d'], said['columns'][c['metric']]),
       _chip(c['word'], 'reversed' if c['contradicted'] else '')]
      for c in said['controls']])


def _accounts(said: dict) -> str:
  return _grid(
      ['row', *text_table.ACCOUNT_NAMES.values()],
      [[html.escape(row['name']),
        *(text_table.account(row, a) for a in claims.ACCOUNTS)]
       for row in said['rows']])


# ---------------------------------------------------------------------------
# Learning rates, pictures


def _rates(tuned: dict) -> str:
  """The score of every row at every learning rate: drawn, and as figures."""
  head, *lines = text_table.rates(tuned)
  text = (f'{text_table.about_rates(tuned)} Dots are single seeds, a star is '
          'the chosen rate.')
  return (_tag('section', plots.rates(tuned), 'card')
          + _grid(map(html.escape, head),
                  [map(html.escape, line) for line in lines])
          + _tag('p', html.escape(text), 'soft'))


def _png(picture) -> str:
  stream = io.BytesIO()
  Image.fromarray(picture).save(stream, format='PNG')
  return base64.b64encode(stream.getvalue()).decode()


def _pictures(data_dir, corpus: str, split: str, ids) -> dict:
  """Finds the pictures of some records; evaluators take the first ones."""
  source, wanted, found = corpora.open_split(data_dir, corpus, split), set(
      ids), {}
  for i in range(len(source)):
    if len(found) == len(wanted):
      break
    record = source[i]
    if record['id'] in wanted:
      found[record['id']] = record['image']
  return found


def gallery(runs, evaluator: str, corpus: str, data_dir) -> str:
  """Shows held-out pictures with the answer of every row.

  Args:
    runs: {row: folder}.
    evaluator: its name in the configs.
    corpus: that it reads.
    data_dir: folder of the prepared corpora.

  Returns:
    HTML; '' if no row has answers: a loss has none.
  """
  said = {row: {(p['id'], p['question']): p
                for p in predictions(folder, evaluator)
                if p['condition'] == 'picture' and 'prediction' in p}
          for row, folder in runs.items()}
  asked, split = {}, None  # one question of each picture
  for answers in said.values():
    for key, p in answers.items():
      asked.setdefault(p['id'], key)
      split = p['split']
  asked = dict(list(asked.items())[:PICTURES])
  if not asked:
    return ''
  pictures = _pictures(data_dir, corpus, split, asked)
  cards = []
  for name, key in asked.items():
    replies = {row: answers[key] for row, answers in said.items()
               if key in answers}
    first = next(iter(replies.values()))
    text = ''.join(
        f'<br>{html.escape(row)}: <b class="{"yes" if p["correct"] else "no"}">'
        f'{html.escape(p["prediction"]) or "(nothing)"}</b>'
        for row, p in replies.items())
    truth = f'{_soft(first["question"])} {html.escape(first["answer"])}'
    cards.append(_tag('div', f'<img alt="" src="data:image/png;base64,'
                      f'{_png(pictures[name])}"><div>{truth}{text}</div>',
                      'card'))
  return _tag('div', '\n'.join(cards), 'gallery')


# ---------------------------------------------------------------------------
# The page


def page(said: dict, drawn: str, galleries: dict[str, str]) -> str:
  """Returns `report.html`.

  Args:
    said: of `summary.summarise`, with 'other_scale' and 'tuning'.
    drawn: of `plots.curves`.
    galleries: {evaluator: of `gallery`}.
  """
  lead = [f'{said["experiment"]} at {said["scale"]} scale']
  lead += [said[key] for key in ('source', 'budget') if said[key]]
  notes = [f'Excluded: {line}' for line in said['exclusions']]
  notes += said['warnings']
  sections = {
      'Scores': _main_table(said) + _tag(
          'p', text_table.about_scores(said), 'soft'),
      'Claims': _claim_cards(said),
      'Controls': _controls(said) if said['controls'] else '',
      'Learning curves': drawn and _tag('section', drawn, 'card'),
      'Learning rates': said['tuning'] and _rates(said['tuning']),
      **{f'Held-out pictures: {name}': g for name, g in galleries.items()},
      'Accounts': _accounts(said),
      'Origin': _grid(['', ''], [
          [key.replace('_', ' '), html.escape(', '.join(values))]
          for key, values in said['provenance'].items()])}
  return _document(said['title'], lead, notes, sections)


def _document(title: str, lead, notes, sections) -> str:
  body = _tag('h1', html.escape(title))
  body += _tag('p', html.escape(' · '.join(lead)), 'lead')
  body += ''.join(_tag('div', html.escape(note), 'note') for note in notes)
  body += ''.join(_tag('h2', html.escape(head)) + content
                  for head, content in sections.items() if content)
  return (f'<!doctype html><html lang="en"><meta charset="utf-8">'
          '<meta name="viewport" content="width=device-width">'
          f'<title>{html.escape(title)}</title>'
          f'<style>{STYLE}</style><main>{body}</main></html>\n')


def tuning_page(tuned: dict, warnings) -> str:
  """Returns `tuning.html`: the learning rates alone, before the table runs.

  Args:
    tuned: of `tuning.summarise`.
    warnings: lines of text.
  """
  lead = [f'{tuned["experiment"]} at {tuned["scale"]} scale']
  return _document(tuned['title'], lead, warnings,
                   {'Learning rates': _rates(tuned)})


def write(folder, said: dict, runs, data_dir):
  """Writes `table.json`, `table.md` and `report.html`.

  Args:
    folder: where to.
    said: of `summary.summarise`, with 'other_scale' and 'tuning'.
    runs: {row: (folder, config)} of one run per row that finished.
    data_dir: folder of the prepared corpora.

  Raises:
    UserError: the folder cannot be written.
  """
  folder = epath.Path(folder)
  folders = {row: run[0] for row, run in runs.items()}
  read = {}
  for column in said['columns'].values():
    evaluator = column['score'].split('/')[0]
    for _, config in runs.values():
      if evaluator in config.evaluators:
        read.setdefault(evaluator, config.evaluators[evaluator].corpus)
  galleries = {name: gallery(folders, name, corpus, data_dir)
               for name, corpus in read.items()}
  texts = {'table.json': json.dumps(said, indent=1) + '\n',
           'table.md': text_table.markdown(said),
           'report.html': page(said, plots.curves(folders), galleries)}
  with errors.writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
      (folder / name).write_text(text)
