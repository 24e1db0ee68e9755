"""Tuned rates: trials, choices, edges, and the lines to paste."""

import pytest

from mmgen import addresses
from mmgen import config
from mmgen import errors
from mmgen import evaluators
from mmgen.tables import claims
from mmgen.tables import plots
from mmgen.tables import summary
from mmgen.tables import text_table
from mmgen.tables import tuning

GRID = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)
STAGED = '''
from experiments import quickstart
base = quickstart.base
STAGES = {'one': {}, 'two': {'steps': 7}}
ROWS = {'a': {}, 'b': {'stages': ('two',)}, 'c': {LINE}}
'''


def declared(stage=None, **column):
  return claims.parse(dict(
      title='t', metrics={'vqa': {'score': 'vqa/accuracy', **column}},
      seeds=(0, 1), tuning_seeds=(100, 101),
      tuning=dict(grid=GRID, metric='vqa', stage=stage)), ['a', 'b', 'c'])


def outcome(score):
  """A finished trial; None is a diverged one."""
  return summary.Outcome('a', 0, None if score is None else {
      'scores': {'vqa/accuracy': score, 'vqa/accuracy/blind': 0.1}})


def choose(scores, table=None):
  """Of one row, from a pair of scores for each rate."""
  outcomes = {('a', rate, seed): outcome(score)
              for rate, pair in zip(GRID, scores)
              for seed, score in zip((100, 101), pair) if score != 'crashed'}
  return tuning.choose(table or declared(), ['a'], outcomes)['a']


PEAK = [(0.2, 0.3), (0.5, 0.4), (0.3, 0.5), (0.2, 0.2), (0.2, 0.2)]


@pytest.mark.parametrize('scores, chosen, edge', [
    (PEAK, 2e-3, None),  # 0.45 against 0.4
    (PEAK[::-1], 8e-3, None),
    ([*PEAK[:4], (0.9, 0.9)], 16e-3, 'highest'),
    ([(0.9, 0.9), *PEAK[1:]], 1e-3, 'lowest'),
    ([PEAK[0], PEAK[1], PEAK[1], *PEAK[3:]], 2e-3, None),  # a tie
    # One of two diverged: (0.1 + 0.6) / 2 = 0.35, less than 0.4.
    ([PEAK[0], (None, 0.6), *PEAK[2:]], 4e-3, None),
    # (0.1 + 0.8) / 2 = 0.45 is more.
    ([PEAK[0], (None, 0.8), *PEAK[2:]], 2e-3, None),
    ([(0.2, 0.2), (0.3, 0.3), *[(None, None)] * 3], 2e-3, None),
    ([(None, None)] * 5, None, None),
    ([('crashed', 0.2), *PEAK[1:]], None, None),
])
def test_the_best_mean_over_the_tuning_seeds(scores, chosen, edge):
  found = choose(scores)
  assert (found['chosen'], found['edge']) == (chosen, edge)


def test_means_and_divergences_by_hand():
  trial = choose([PEAK[0], (None, 0.8), *PEAK[2:]])['trials'][1]
  assert trial == dict(rate=2e-3, scores={'100': 0.1, '101': 0.8},
                       mean=pytest.approx(0.45), diverged=[100])
  known = declared(chance=0.3)
  assert choose([(None, None), *PEAK[1:]], known)['trials'][0]['mean'] == (
      pytest.approx(0.3))
  # At a chance that is known, a row that always diverges has a score at every
  # rate, and still no best one.
  assert choose([(None, None)] * 5, known)['chosen'] is None


def test_of_a_loss_the_lowest_is_chosen():
  table = declared(unit='raw', better='lower')
  assert choose([(2., 2.), (1., 1.), (1.5, 1.5), (3., 3.), (3., 3.)], table)[
      'chosen'] == 2e-3


def test_splits_overlap_unless_both_are_slices():
  pair = lambda split, corpus='emoji/tiny': (corpus, split)
  overlap = lambda a, b: tuning._overlap(pair(a), pair(b))
  assert overlap('validation', 'validation')
  assert overlap('validation', 'validation[:50%]')
  assert overlap('validation[:50%]', 'validation')
  assert overlap('validation[:50%]', 'validation[:50%]')
  assert not overlap('validation[:50%]', 'validation[50%:]')
  assert not overlap('validation', 'compositions')
  assert not tuning._overlap(pair('validation'), pair('validation', 'shapes'))


@pytest.mark.parametrize('name', evaluators.EVALUATORS)
def test_an_evaluator_without_a_split_reads_the_one_that_is_assumed(name):
  assert evaluators.EVALUATORS[name].Config.split == tuning.DEFAULT_SPLIT


def test_a_default_split_judges_too(staged):
  name = staged("'evaluators': {'vqa': dict(name='vqa', corpus='emoji/tiny')}")
  with pytest.raises(errors.UserError, match='evaluators.vqa of .*:c reads'):
    tuning.trials(name, ['c'], 'mini', declared())


@pytest.fixture
def staged(tmp_path, monkeypatch):
  """Writes an experiment of two stages; `line` is what row c holds."""
  monkeypatch.setattr(config.corpora, 'manifest', lambda *_: {},
                      raising=False)

  def write(line=''):
    addresses.experiment.cache_clear()
    path = tmp_path / 'staged.py'
    path.write_text(STAGED.replace('LINE', line))
    return str(path)
  return write


@pytest.mark.parametrize('stage, addressed', [
    (None, 'two'), ('two', 'two'), ('one', 'one')])
def test_the_last_stage_is_tuned_unless_another_is_named(
    staged, stage, addressed):
  name = staged()
  found = tuning.trials(name, ['a', 'c'], 'mini', declared(stage))
  assert len(found) == 20
  assert {target.address for target in found.values()} == {
      f'{name}:a:{addressed}', f'{name}:c:{addressed}'}
  target = found['a', 4e-3, 101]
  assert target.seed == 101
  assert dict(target.overrides) == {
      'optimizer.peak_lr': 4e-3, **{f'evaluators.{e}.split': 'validation'
                                    for e in (
                                        'loss', 'vqa', 'caption', 'styles')}}


@pytest.mark.parametrize('stage', [None, 'one'])
def test_a_pasted_line_sets_the_tuned_stage_and_no_other(staged, stage):
  name, table = staged(), declared(stage)
  about = dict(trials=[], chosen=4e-3, edge=None)
  tuned = dict(experiment=name, scale='mini', rows={'c': about, 'b': about})
  if stage:
    tuned['rows'].pop('b')  # it lacks stage one
  line, *others = tuning.lines(tuned, table)
  head = "  'c': {..., "
  assert line.startswith(head) and line.endswith('},')
  assert others == ([] if stage else [
      "  'b': {..., 'mini': {'optimizer.peak_lr': 0.004}},"])
  name = staged(line.removeprefix(head).removesuffix('},'))
  rates = {s: config.load(f'{name}:c:{s}').optimizer.peak_lr
           for s in ('one', 'two')}
  tuned_stage = stage or 'two'
  assert rates.pop(tuned_stage) == 4e-3
  assert set(rates.values()) == {2e-3}
  assert tuning.lines(tuned, table)[0].endswith('# as it is')


def drawn():
  """What is stored, of two rows with hand-made scores."""
  rows = {'a': choose(PEAK), 'b <i>': choose(
      [(0.9, 0.9), (None, 0.4), *PEAK[2:]])}
  return dict(
      experiment='e', scale='mini', title='t', metric='vqa', stage=None,
      column=dict(unit='percent'), split='validation', grid=list(GRID),
      seeds=[100, 101], date='2026-01-01T00:00:00+00:00', rows=rows)


def test_rates_as_text():
  assert text_table.rates(drawn()) == [
      ['row', '0.001', '0.002', '0.004', '0.008', '0.016', 'chosen'],
      ['a', '25.0', '45.0', '40.0', '20.0', '20.0', '0.002'],
      ['b <i>', '90.0', '25.0 (1 diverged)', '40.0', '20.0', '20.0',
       '0.001 (lowest of the grid: no optimum)']]
  assert 'seeds 100, 101' in text_table.about_rates(drawn())


def test_the_plot_shows_every_row_and_is_the_same_each_time():
  assert plots.rates(drawn()) == plots.rates(drawn())
  one = drawn()
  one['rows'].pop('b <i>')
  assert plots.rates(one) != plots.rates(drawn())
  moved = drawn()
  moved['rows']['a']['chosen'] = 4e-3
  assert plots.rates(moved) != plots.rates(drawn())
