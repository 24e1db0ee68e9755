"""What finished runs say: scores, preconditions, claims, controls, accounts."""

import pytest

from mmgen.tables import claims
from mmgen.tables import frozen
from mmgen.tables import summary

GAP = dict(kind='greater', a='clip', b='patches', metric='vqa', d=0.03,
           text='A trained encoder helps.')
EIGHT = range(8)


def declared(**fields):
  raw = dict(title='Encoders', metrics={'vqa': 'vqa/accuracy'},
             seeds=tuple(EIGHT), claims={'gap': GAP}, **fields)
  rows = ('clip', 'patches', 'broken', 's0', 's1', 's2', 's3')
  return claims.parse(raw, rows)


def outcome(row, seed, score, blind=0.1, grey=0.1, shuffled=0.1, **fields):
  """A run that scores `score`, give or take a little that seeds share."""
  scores = {'vqa/accuracy': score, 'vqa/accuracy/blind': blind,
            'vqa/accuracy/grey': grey, 'vqa/accuracy/shuffled': shuffled}
  result = dict(scores=scores, device='cpu', fingerprints={'vqa': 'f'})
  result.update(fields.pop('result', {}))
  return summary.Outcome(
      row, seed, result, account=fields.pop('account', {'samples': 100}),
      own=fields.pop('own', {'samples': 100}),
      **{'examples': {'vqa/accuracy': 2000}, 'loss_fall': 0.0,
         'revisions': ('abc',), **fields})


def outcomes(row, score, seeds=EIGHT, **fields):
  return [outcome(row, seed, score + 0.01 * (-1) ** (seed // 2), **fields)
          for seed in seeds]


PATCHES = outcomes('patches', 0.4)
CLIP = [outcome('clip', s, 0.5 + 0.004 * s) for s in EIGHT]


AS_FROZEN = frozen.Departures()


def say(found, table=None, since=AS_FROZEN, scale='mini'):
  table = table or declared()
  return summary.summarise('e', table, ['clip', 'patches'], found, since,
                           scale)


def claim(found, **kwargs):
  return say(found, **kwargs)['claims'][0]


def test_differences_are_paired_by_seed():
  said = claim([*CLIP, *PATCHES[:6]])
  assert said['seeds'] == [0, 1, 2, 3, 4, 5]
  # clip 0.5, 0.504, 0.508 .. minus patches 0.41, 0.41, 0.39, 0.39 ..
  assert said['differences'][:3] == [
      pytest.approx(x) for x in (0.09, 0.094, 0.118)]
  assert said['verdict'] == 'provisional: reproduced at mini scale'
  assert said['notes'] == said['flags'] == []


def test_the_order_of_runs_does_not_matter():
  assert claim([*CLIP, *PATCHES]) == claim([*PATCHES[::-1], *CLIP[::-1]])


def test_at_paper_scale_the_words_say_so():
  assert claim([*CLIP, *PATCHES], scale='paper')['verdict'] == (
      'reproduced at paper scale')


def test_a_failed_run_stays_in_at_chance_and_is_counted():
  crashed = summary.Outcome('clip', 0, None, 'exit code 1')
  said = say([crashed, *CLIP[1:], *PATCHES])
  assert said['claims'][0]['differences'][0] == pytest.approx(0.1 - 0.41)
  assert said['claims'][0]['notes'] == ['failed runs counted at chance: 1']
  assert said['rows'][0]['failed'] == {'0': 'exit code 1'}
  assert said['failed'] == 1
  assert said['rows'][0]['cells']['vqa']['n'] == 8


@pytest.mark.parametrize('change, flag', [
    (dict(grey=0.13),
     'patches reaches 13.0% with grey pictures, more than 2 points above'),
    (dict(shuffled=0.13), 'patches reaches 13.0% with shuffled pictures'),
    (dict(examples={'vqa/accuracy': 1999}), '1999 held-out examples, 2000'),
    (dict(loss_fall=0.02), 'patches is not shown to have converged: its '
     'loss may still fall by 2.0% over the last tenth of the steps (mean 2.0%'),
    (dict(loss_fall=None), 'patches is not shown to have converged: its runs '
     'are too short to tell'),
])
def test_a_precondition_that_is_not_met(change, flag):
  assert claim([*CLIP, *outcomes('patches', 0.4)])['flags'] == []
  said = claim([*CLIP, *outcomes('patches', 0.4, **change)])
  assert said['verdict'].endswith('not measurable at mini scale')
  assert len(said['flags']) == 1
  assert said['flags'][0].startswith(f'precondition not met: {flag}')


def test_grey_pictures_may_be_worse_than_a_blind_guess():
  assert claim([*CLIP, *outcomes('patches', 0.4, grey=0.0)])['flags'] == []


@pytest.mark.parametrize('best, flag', [
    (0.29, 'the best row reaches 29.0%, 3 x chance is 30.0%'),
    (0.91, 'the best row reaches 91.0%, 90 % of the ceiling is 90.0%'),
])
def test_the_best_row_needs_room_on_both_sides(best, flag):
  said = claim([*outcomes('clip', best), *outcomes('patches', 0.2)])
  assert said['flags'] == [f'precondition not met: {flag}']


@pytest.mark.parametrize('noise, converged', [(0.01, True), (0.02, False)])
def test_convergence_has_to_be_shown_by_the_upper_bound(noise, converged):
  # Mean fall 0; of 8 seeds with +-noise, sd is 1.069 noise and the 90 %
  # interval +-1.895 sd / sqrt(8): 0.7 and 1.4 %.
  noisy = [outcome('patches', s, 0.4 + 0.01 * (-1) ** (s // 2),
                   loss_fall=noise * (-1) ** s) for s in EIGHT]
  flags = claim([*CLIP, *noisy])['flags']
  assert flags == [] if converged else flags[0].endswith(
      'may still fall by 1.4% over the last tenth of the steps (mean 0.0%)')


def test_published_figures_are_in_points():
  held = declared(published={'clip': {'vqa': 78.5}, 'patches': {'vqa': 75.4}})
  fails = declared(published={'clip': {'vqa': 78.5}, 'patches': {'vqa': 75.6}})
  half = declared(published={'clip': {'vqa': 78.5}})
  assert [claim([], table=t)['published'] for t in (held, fails, half)] == [
      'holds', 'fails', 'not published']


def test_figures_of_a_claim_itself_come_first():
  table = claims.parse(
      dict(title='t', metrics={'vqa': 'vqa/accuracy'}, claims={
          'gap': {**GAP, 'published': {'a': 70.0, 'b': 60.0}},
          'trend': dict(kind='trend', metric='vqa', text='Fades.',
                        rows=('s',) * 4, minus=('patches',) * 4,
                        x=(1, 2, 4, 8), direction='down',
                        published=(2.9, 3.0, 1.8, 0.5))},
           published={'clip': {'vqa': 1.0}, 'patches': {'vqa': 2.0}}),
      ('clip', 'patches', 's'))
  assert [c['published'] for c in say([], table=table)['claims']] == [
      'holds', 'holds']


def test_a_trend_of_gaps():
  # Gaps of 4, 2, 0, -2 points over four doublings: 2 points less each.
  table = claims.parse(
      dict(title='t', metrics={'vqa': 'vqa/accuracy'}, claims={'fades': dict(
          kind='trend', metric='vqa', text='The gap fades.', direction='down',
          rows=('s0', 's1', 's2', 's3'), minus=('m0', 'm1', 'm2', 'm3'),
          x=(10, 20, 40, 80))}),
      [f'{kind}{i}' for kind in 'sm' for i in range(4)])
  found = [o for i in range(4) for o in (*outcomes(f's{i}', 0.44 + 0.01 * i),
                                         *outcomes(f'm{i}', 0.4 + 0.03 * i))]
  said = claim(found, table=table)
  assert said['differences'] == [pytest.approx(0.02)] * 8


def test_an_interaction_is_a_difference_of_differences():
  table = claims.parse(
      dict(title='t', metrics={'vqa': 'vqa/accuracy'}, claims={'i': dict(
          kind='interaction', metric='vqa', text='More for a.', a='clip',
          b='patches', a0='s0', b0='broken')}),
      ('clip', 'patches', 's0', 'broken'))
  found = [outcome(row, 0, score) for row, score in (
      ('clip', 0.6), ('patches', 0.4), ('s0', 0.5), ('broken', 0.45))]
  assert claim(found, table=table)['differences'] == [pytest.approx(0.15)]


X = (1, 2, 4, 8, 16)


def grids(held_a, held_b, seeds=EIGHT):
  """Judges rows a0..a4 against b0..b4, stable up to so many values of x."""
  rows = {arm: [f'{arm}{i}' for i in range(5)] for arm in 'ab'}
  table = claims.parse(
      dict(title='t', seeds=tuple(EIGHT), metrics={'collapsed': dict(
          score='stability/collapsed', unit='raw', chance=1.0)},
           claims={'m': dict(kind='margin', metric='collapsed', d=1.0,
                             text='a holds longer.', rows=rows['a'],
                             minus=rows['b'], x=X)}),
      [*rows['a'], *rows['b']])
  found = []
  for arm, held in (('a', held_a), ('b', held_b)):
    for i, row in enumerate(rows[arm]):
      for seed in seeds:
        if i < held:
          value = {'stability/collapsed': 0.0}
        else:  # every other run that broke came to its end
          value = {'stability/collapsed': 1.0} if seed % 2 else None
        result = value and dict(scores=value, device='cpu', fingerprints={})
        found.append(summary.Outcome(row, seed, result, loss_fall=0.5))
  return claim(found, table=table)


def test_a_margin_counts_diverged_runs_as_collapsed():
  said = grids(4, 2)
  assert said['differences'] == [2.0] * 8 and said['flags'] == []
  # One rate of a and three of b, of eight seeds every other.
  assert said['notes'] == ['failed runs counted at chance: 16']
  assert said['verdict'] == 'reproduced at mini scale'
  assert said['published'] == 'not published'
  assert grids(2, 4)['verdict'] == 'reversed at mini scale'
  assert grids(3, 3)['verdict'] == 'absent at mini scale'


@pytest.mark.parametrize('held, differences, flag', [
    ((5, 5), 0, 'both sides are stable at every x at 8 of 8 seeds: the grid '
     'has to go on beyond its highest value'),
    ((0, 0), 0, 'both sides collapse at the lowest x at 8 of 8 seeds: the '
     'grid has to go on beyond its lowest value'),
    ((5, 3), 2, None),  # at least that
    ((3, 0), 3, None),
])
def test_a_margin_off_the_grid_is_not_measurable(held, differences, flag):
  said = grids(*held)
  assert said['differences'] == [differences] * 8
  assert said['flags'] == ([f'precondition not met: {flag}'] if flag else [])
  assert said['verdict'].startswith('not measurable') == bool(flag)


def test_p_values_of_a_table_are_adjusted_together():
  table = declared()
  table.claims['less'] = claims.Claim('greater', 'vqa', 'A little.', 0.01,
                                      's0', 'patches')
  # s0 is ahead at half of the seeds only.
  less = [outcome('s0', s, 0.4 + 0.01 * (s % 2)) for s in EIGHT]
  first, second = say([*CLIP, *PATCHES, *less], table=table)['claims']
  assert 0 < first['p'] < 0.05 < second['p'] < 0.5
  # Of two the smaller is doubled, the larger stays.
  assert first['p_holm'] == pytest.approx(2 * first['p'], abs=0)
  assert second['p_holm'] == second['p']


def test_what_departs_from_what_was_frozen_is_said():
  table = declared(controls={'aa': dict(kind='aa', row='patches')})
  said = say([*CLIP, *PATCHES], table, frozen.Departures(
      {'gap': ('exploratory: bent',), 'other': ('exploratory: new',)},
      {'aa': ('loosened',)}, ('one is gone',)))
  assert said['claims'][0]['notes'] == ['exploratory: bent']
  assert said['controls'][0]['notes'] == ['loosened']
  assert said['warnings'] == ['one is gone']


def test_undeclared_seeds_are_exploratory():
  undeclared = claim([*outcomes('clip', 0.5, [9]),
                      *outcomes('patches', 0.4, [9])])
  assert undeclared['notes'] == ['exploratory: undeclared seeds [9]']


def test_a_row_against_itself_takes_its_other_seeds():
  table = declared(controls={'aa': dict(kind='aa', row='patches')})
  other = outcomes('patches', 0.4, [1000 + s for s in EIGHT])
  said = say([*PATCHES, *other], table=table)
  assert said['controls'][0]['n'] == 8
  assert said['controls'][0]['word'] == 'as expected'
  assert said['rows'][1]['cells']['vqa']['n'] == 8
  wrong = [outcome('patches', 1000 + s, 0.6 + 0.01 * s) for s in EIGHT]
  said = say([*PATCHES, *wrong], table=table)
  assert said['controls'][0]['contradicted']


@pytest.mark.parametrize('better, word', [('higher', 'as expected'),
                                          ('lower', 'better')])
def test_a_broken_row_must_be_worse(better, word):
  table = claims.parse(
      dict(title='t', metrics={'vqa': dict(score='vqa/accuracy',
                                           better=better)},
           controls={'c': dict(kind='worse', row='broken', than='patches')}),
      ('patches', 'broken'))
  said = say([*PATCHES, *outcomes('broken', 0.1)], table=table)
  assert said['controls'][0]['word'] == word


def test_warnings():
  warned = say([*CLIP, *outcomes(
      'patches', 0.4, result={'fingerprints': {'vqa': 'g'}},
      own={'samples': 50}, revisions=('def',))])['warnings']
  assert [w.split(',')[0].split(':')[0] for w in warned] == [
      'rows differ in samples',
      'runs of different git revisions are mixed',
      "column 'vqa' mixes figures that were evaluated in different ways "
      '(fingerprints differ)']
  assert say([*CLIP, *PATCHES])['warnings'] == []


def test_only_rows_that_are_compared_need_equal_accounts():
  apart = [*CLIP, *PATCHES, *outcomes('s0', 0.4, own={'samples': 50})]
  summarised = lambda table: summary.summarise(
      'e', table, ['clip', 'patches', 's0'], apart, frozen.Departures(),
      'mini')['warnings']
  assert summarised(declared()) == []
  control = dict(c=dict(kind='worse', row='s0', than='clip'))
  warned, = summarised(declared(controls=control))
  assert warned.endswith('clip 100, s0 50')
  # A table without claims is read by eye, all rows against each other.
  warned, = summarised(claims.parse(
      dict(title='t', metrics={'vqa': 'vqa/accuracy'}),
      ('clip', 'patches', 's0')))
  assert warned.endswith('clip 100, patches 100, s0 50')


def test_a_row_without_a_score_has_no_cell_and_is_not_at_chance():
  other = dict(scores={'loss/loss': 2.0}, fingerprints={})
  said = say([*CLIP, *outcomes('patches', 0.4, result=other)])
  assert said['rows'][1]['cells']['vqa']['n'] == 0
  assert said['rows'][0]['cells']['vqa']['n'] == 8
  assert said['warnings'] == []
  assert claim([*CLIP, *outcomes('patches', 0.4, result=other)])['n'] == 0


def test_warm_starts_do_not_unmatch_an_account():
  warm = outcomes('patches', 0.4, account={'samples': 900})
  said = say([*CLIP, *warm])
  assert said['warnings'] == []
  assert said['rows'][1]['account']['samples'] == 900


def test_a_score_that_no_run_has_is_named():
  table = claims.parse(dict(title='t', metrics={'x': 'vqa/acuracy'}),
                       ('clip', 'patches'))
  assert "no run has the score 'vqa/acuracy'" in say(
      CLIP, table=table)['warnings'][0]


@pytest.mark.parametrize('unplaced, warned', [(0.009, False), (0.04, True)])
def test_documents_that_were_left_out_are_said(unplaced, warned):
  odd = [outcome('patches', 0, 0.4, unplaced=unplaced), *PATCHES[1:]]
  said = say([*CLIP, *odd])['warnings']
  assert any('patches left out up to 4.0%' in w for w in said) == warned
  assert not any('clip left out' in w for w in said)
