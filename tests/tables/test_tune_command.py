"""The command with --tune: trials, what is stored, what a table says of it."""

import json

import pytest
import table_lab

from mmgen import addresses
from mmgen import errors
from mmgen import table


@pytest.fixture
def tuned_lab(tmp_path, monkeypatch):
  addresses.experiment.cache_clear()
  lab = table_lab.Lab(tmp_path, monkeypatch)
  lab.write(('    not_run=', f'{table_lab.TUNING}not_run='))
  lab.diverging = [('clip', 100, 4e-3)]
  return lab


def stored(lab):
  return json.loads((lab.folder / 'tuning.json').read_text())


def warned(lab):
  """The warnings of the last table, which was asked for in part."""
  part, *others = lab.said['warnings']
  assert part.startswith('only a part of the table')
  return others


def test_every_row_gets_the_same_trials(tuned_lab):
  assert tuned_lab.run('--tune') == 0
  tried = {}
  for (row, seed), c in zip(tuned_lab.started, tuned_lab.configs):
    if row != 'text':
      tried.setdefault(row, []).append((c.optimizer.peak_lr, seed))
      assert {e.split for e in c.evaluators.values()} == {'validation'}
  grid = [(rate, seed) for rate in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
          for seed in (100, 101)]
  assert tried == {'clip': grid, 'patches': grid, 'broken': grid}
  # The warm start of clip is trained once per seed, at its own rate.
  assert tuned_lab.started.count(('text', 100)) == 1
  assert not (tuned_lab.folder / 'table.frozen.json').exists()


def test_the_best_mean_is_chosen_and_the_edge_is_said(tuned_lab, capsys):
  tuned_lab.run('--tune')
  rows = stored(tuned_lab)['rows']
  # clip at 4e-3: (blind 0.05 + 0.61) / 2 = 0.33, below 0.505 at 2e-3.
  assert rows['clip']['trials'][3]['scores'] == {
      '100': pytest.approx(0.05), '101': pytest.approx(0.61)}
  assert rows['clip']['trials'][3]['mean'] == pytest.approx(0.33)
  assert rows['clip']['trials'][3]['diverged'] == [100]
  assert {row: about['chosen'] for row, about in rows.items()} == {
      'clip': 2e-3, 'patches': 1e-3, 'broken': 8e-3}
  assert [about['edge'] for about in rows.values()] == [None, None, 'highest']
  out = capsys.readouterr().out
  assert 'the best rate of broken, 0.008, is the highest of the grid' in out
  assert "'patches': {..., 'mini': {'optimizer.peak_lr': 0.001}}," in out
  assert "'clip': {..., 'mini': {'optimizer.peak_lr': 0.002}},  # as" in out
  page = (tuned_lab.folder / 'tuning.html').read_text()
  assert 'the highest of the grid' in page and 'svg+xml' in page


def test_a_second_tuning_reuses_every_trial(tuned_lab):
  tuned_lab.run('--tune')
  before = {**stored(tuned_lab), 'date': 'of the first'}
  (tuned_lab.folder / 'tuning.json').write_text(json.dumps(before))
  count = len(tuned_lab.started)
  assert tuned_lab.run('--tune') == 0
  assert len(tuned_lab.started) == count
  assert stored(tuned_lab) == before


def test_a_crashed_trial_leaves_its_row_without_a_choice(tuned_lab, capsys):
  tuned_lab.crash = [('patches', 101)]
  assert tuned_lab.run('--tune') == 1
  rows = stored(tuned_lab)['rows']
  assert rows['patches']['chosen'] is None and rows['clip']['chosen'] == 2e-3
  out = capsys.readouterr().out
  assert 'no rate can be chosen for patches' in out
  assert 'crashed: exit code 1' in out
  tuned_lab.crash = ()
  assert tuned_lab.run('--tune') == 0
  assert stored(tuned_lab)['rows']['patches']['chosen'] == 1e-3


def test_a_table_names_rows_that_depart_from_their_tuning(tuned_lab):
  tuned_lab.run('--seeds=0')
  assert warned(tuned_lab) == [
      'no learning rates were tuned: run it with --tune']
  tuned_lab.run('--tune')
  tuned_lab.run('--seeds=0')
  edge, *departures = warned(tuned_lab)
  assert edge.startswith('the best rate of broken, 0.008, is the highest')
  assert departures == [
      'patches trains at 0.002, the rate chosen for it is 0.001',
      'broken trains at 0.002, the rate chosen for it is 0.008']
  assert tuned_lab.said['tuning'] == stored(tuned_lab)
  # With the printed line pasted, the row is at its rate: nothing is stale.
  tuned_lab.write(("'patches': {}",
                   "'patches': {'mini': {'optimizer.peak_lr': 0.001}}"))
  tuned_lab.run('--seeds=0')
  assert warned(tuned_lab)[1:] == departures[1:]
  assert tuned_lab.configs[-1].optimizer.peak_lr == 0.001
  page = (tuned_lab.folder / 'part' / 'report.html').read_text()
  assert 'Learning rates' in page and 'the highest of the grid' in page


def test_what_was_tuned_under_another_config_is_stale(tuned_lab):
  tuned_lab.run('--tune')
  tuned_lab.write(("'patches': {}", "'patches': {'steps': 700}"))
  tuned_lab.run('--seeds=0', '--rows=patches')
  assert [w for w in warned(tuned_lab) if 'under another' in w] == [
      'the rate of patches was tuned under another config, grid, split, '
      'metric, code version or seeds than now: repeat --tune']


def test_a_row_that_came_later_is_not_tuned(tuned_lab):
  tuned_lab.run('--tune')
  tuned_lab.write(("'patches': {},", "'patches': {}, 'new': {'steps': 7},"))
  tuned_lab.scores['new'] = 0.4
  tuned_lab.run('--seeds=0', '--rows=new')
  assert warned(tuned_lab) == [
      'the rate of new, 0.002, is not tuned: repeat --tune']


def test_a_dry_tuning_touches_nothing(tuned_lab, capsys):
  assert tuned_lab.run('--tune', '--dry_run') == 0
  assert tuned_lab.started == []
  out = capsys.readouterr().out
  assert 'tuning 3 rows at 5 rates, 2 seeds, 32 runs, 0 of them' in out
  assert not (tuned_lab.root / 'runs').exists()


@pytest.mark.parametrize('arguments, change, message', [
    (['--rows=clip'], (), 'the same trials: leave out --rows and --seeds'),
    (['--seeds=1'], (), 'leave out --rows and --seeds'),
    ([], [(table_lab.TUNING, '')], 'declares no TABLE.tuning'),
    ([], [("metric='vqa')", "metric='vqa', split='compositions')")],
     "'compositions', which config.evaluators.vqa of .*clip reads too"),
    ([], [("metric='vqa')", "metric='vqa', split='train[:5%]')")],
     'which config.mix.captions of .* reads too'),
    ([], [("metric='vqa')", "metric='vqa', stage='two')")],
     "has no stage 'two'"),
    ([], [("'vqa/accuracy'", "'zero/accuracy'")], "no such evaluator. It has"),
])
def test_a_wrong_tuning_is_named(tuned_lab, arguments, change, message):
  tuned_lab.write(*change)
  with pytest.raises(errors.UserError, match=message):
    table.main([f'--experiment={tuned_lab.path}', '--tune', *arguments])
  assert tuned_lab.started == []


def test_a_score_that_no_trial_has_is_named(tuned_lab):
  tuned_lab.write(("'vqa/accuracy'", "'vqa/acuracy'"))
  with pytest.raises(errors.UserError, match="has no score 'vqa/acuracy'"):
    table.main([f'--experiment={tuned_lab.path}', '--tune',
                f'--workdir={tuned_lab.root}/runs'])
