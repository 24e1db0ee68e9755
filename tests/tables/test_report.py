"""The page, the Markdown and the terminal: all figures, nothing foreign."""

import html.parser
import io
import json
import re

import ml_collections
import numpy as np
import pytest
import rich.console

from mmgen.tables import claims
from mmgen.tables import frozen
from mmgen.tables import plots
from mmgen.tables import report
from mmgen.tables import summary
from mmgen.tables import text_table

EVIL = 'a <script>alert("&")</script> claim | with bars'
ENTRY = ml_collections.ConfigDict(dict(corpus='c', split='compositions'))
CONFIG = ml_collections.ConfigDict(dict(evaluators=dict(vqa=ENTRY)))


AS_FROZEN = frozen.Departures()


def said(seeds=8, since=AS_FROZEN, **fields):
  rows = ('clip', 'patches')
  table = claims.parse(dict(
      title='Encoders', metrics={
          'vqa': 'vqa/accuracy',
          'loss': dict(score='loss/loss', unit='raw', better='lower')},
      seeds=tuple(range(8)), published={'clip': {'vqa': 78.5}},
      claims={'gap': dict(kind='greater', a='clip', b='patches', metric='vqa',
                          d=0.03, text=EVIL)},
      controls={'aa': dict(kind='aa', row='patches')},
      not_run={'hd': 'too large'}, **fields), rows)
  outcomes = [summary.Outcome(
      row, seed, dict(scores={
          'vqa/accuracy': score + 0.01 * (seed % 2),
          'vqa/accuracy/blind': 0.07, 'loss/loss': 2 - score},
                      fingerprints={}, device='cpu'),
      account={'samples': 25600, 'flops': 3e12},
      own={'samples': 5600, 'flops': 3e12}, loss_fall=0.0,
      revisions=('abc',), date='2026-01-01')
              for row, score in (('clip', 0.61), ('patches', 0.5))
              for seed in range(seeds)]
  return {**summary.summarise('toy', table, rows, outcomes, since,
                              'mini'),
          'other_scale': {}, 'tuning': None}


@pytest.fixture
def runs(tmp_path, monkeypatch):
  """Two run folders with curves and answers, and their pictures."""
  pictures = [dict(id=f'r{i}', image=np.full((4, 4, 3), 8 * i, np.uint8))
              for i in range(30)]
  monkeypatch.setattr(report.corpora, 'open_split', lambda *_: pictures,
                      raising=False)
  found = {}
  for row in ('clip', 'patches'):
    folder = tmp_path / row
    (folder / 'predictions').mkdir(parents=True)
    lines = [dict(id=f'r{i}', split='compositions', condition=condition,
                  question=f'what {i}?', answer='cat',
                  prediction=f'{row} says {condition} {i}<b>',
                  correct=row == 'clip')
             for condition in ('picture', 'grey') for i in range(5, 25)]
    (folder / 'predictions' / 'vqa.jsonl').write_text(
        '\n'.join(map(json.dumps, lines)))
    (folder / 'metrics.jsonl').write_text('\n'.join(
        json.dumps(dict(step=i, loss=1 / i)) for i in range(1, 1001)))
    found[row] = folder, CONFIG
  return found


class Page(html.parser.HTMLParser):
  """Collects tags and links; void elements need no end."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.links, self.text = [], [], [], ''
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.links += [v for k, v in attrs if k in ('src', 'href')]
    if tag not in ('meta', 'img', 'br', 'line', 'rect', 'circle'):
      self.open.append(tag)

  def handle_endtag(self, tag):
    if tag not in ('rect', 'line', 'circle'):
      assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


def test_the_page_is_whole_and_needs_nothing_else(tmp_path, runs):
  report.write(tmp_path / 'out', said(), runs, 'data')
  page = Page((tmp_path / 'out' / 'report.html').read_text())
  assert page.open == []
  assert 'script' not in page.tags and 'link' not in page.tags
  assert page.links and all(link.startswith('data:') for link in page.links)
  for text in ('Scores', 'Claims', 'Controls', 'Learning curves', 'Accounts',
               'Held-out pictures: vqa', 'Origin', EVIL, 'not run: too large',
               'reproduced at mini scale', '61.5 ± 0.5', 'published 78.5',
               'blind 7.0', '25.6 k (20 k in warm starts)', 'abc'):
    assert text in page.text.replace(report.NO_BREAK, ' '), text


def test_pictures_stand_beside_the_answers_of_every_row(runs):
  folders = {row: folder for row, (folder, _) in runs.items()}
  page = Page(report.gallery(folders, 'vqa', 'c', 'data'))
  assert page.tags.count('img') == report.PICTURES
  assert 'clip: clip says picture 5<b>' in page.text
  assert 'patches: patches says picture 16<b>' in page.text
  assert 'grey' not in page.text and 'picture 17' not in page.text
  shown = report._pictures('data', 'c', 'compositions', ['r7'])
  assert shown['r7'].max() == 56


def test_without_answers_or_curves_there_is_no_empty_section(tmp_path, runs):
  folders = {row: folder for row, (folder, _) in runs.items()}
  (folders['clip'] / 'predictions' / 'loss.jsonl').write_text(json.dumps(
      dict(id='r1', condition='picture', type='loss', loss=0.5)))
  assert report.gallery(folders, 'loss', 'c', 'data') == ''
  assert plots.curves({'clip': tmp_path / 'nowhere'}) == ''
  page = report.page(said(), '', {'loss': ''})
  assert 'Learning curves' not in page and 'Held-out' not in page


def test_curves_are_the_same_each_time_and_name_each_row(runs):
  folders = {row: folder for row, (folder, _) in runs.items()}
  first = plots.curves(folders)
  assert first == plots.curves(folders)
  assert first != plots.curves({'clip': folders['clip']})


def test_a_curve_is_averaged_over_equal_bins():
  steps, values = list(range(1, 601)), [float(i) for i in range(600)]
  thin_steps, thin = plots._thin(steps, values)
  assert (len(thin), thin[0], thin[-1]) == (300, 0.5, 598.5)
  assert (thin_steps[0], thin_steps[-1]) == (2, 600)


def test_the_best_row_depends_on_the_column():
  about = said()
  assert report._best_rows(about, 'vqa') == ['clip']
  about['rows'][1]['cells']['loss']['mean'] = 0.1
  assert report._best_rows(about, 'loss') == ['patches']


def test_markdown_holds_every_figure():
  text = text_table.markdown(said())
  grid = [line for line in text.splitlines() if line.startswith('|')]
  assert all(len(re.findall(r'(?<!\\)\|', line)) ==
             len(re.findall(r'(?<!\\)\|', grid[0])) for line in grid[:5])
  for part in ('61.5 ± 0.5<br>[61.1, 61.9]<br>blind 7.0', '| 78.5 |',
               'claim \\| with bars', '| reproduced at mini scale | not run |',
               '- hd: not run: too large', '- git revision: abc'):
    assert part in text, part


def test_columns_of_published_figures_stand_where_something_is_published():
  head = next(line for line in text_table.markdown(said()).splitlines()
              if line.startswith('|'))
  assert head == '| row | vqa | loss | vqa, published |'


def test_one_seed_shows_no_spread():
  text = text_table.markdown(said(seeds=1))
  assert '±' not in text.split('Mean')[0]
  assert 'one seed: no verdict' in text
  assert 'nan' not in text and 'None' not in text


def test_the_terminal_shows_verdicts_and_warnings():
  about = said(account='flops')
  about['warnings'] = ['runs of different git revisions are mixed']
  console = rich.console.Console(file=io.StringIO(), width=200)
  console.print(text_table.terminal(about))
  text = console.file.getvalue()
  for part in ('reproduced at mini scale', 'too few seeds', 'hd: not run',
               'training FLOPs', '(matched)', '3 T',
               'warning: runs of different git revisions'):
    assert part in text, part


def test_what_undecided_would_have_taken():
  claim = said()['claims'][0]
  claim.update(word='undecided', detectable=0.042, n=8)
  columns = said()['columns']
  assert text_table.remarks(claim, columns)[0] == (
      'an effect of 4.2 would have been found with power 0.8 by these 8 seeds')
  claim.update(word='reproduced', p_holm=0.08)
  assert text_table.remarks(claim, columns)[-1].startswith('does not survive')


@pytest.mark.parametrize('value, text', [
    (None, '–'), (0, '0'), (950, '950'), (25600, '25.6 k'),
    (1.25e6, '1.25 M'), (3e12, '3 T'), (5.21e18, '5.21 E')])
def test_amounts(value, text):
  assert text_table.amount(value) == text
