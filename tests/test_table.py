"""The command: what runs, what is written, what fails it."""

import pytest
import table_lab

from mmgen import addresses
from mmgen import errors
from mmgen import table
from mmgen.tables import run_graph
from mmgen.tables import text_table


@pytest.fixture
def lab(tmp_path, monkeypatch):
  addresses.experiment.cache_clear()
  return table_lab.Lab(tmp_path, monkeypatch)


def test_a_whole_table(lab, capsys):
  assert lab.run() == 0
  # 3 rows x 8 seeds, 8 for the A/A row, one warm start per seed.
  assert len(lab.started) == 8 * 5
  claim, = lab.said['claims']
  assert claim['verdict'] == 'reproduced at mini scale'
  assert claim['mean'] == pytest.approx(0.1)
  assert claim['published'] == 'holds'
  assert claim['flags'] == claim['notes'] == []
  assert [c['word'] for c in lab.said['controls']] == ['as expected'] * 2
  clip, patches, _, hd = lab.said['rows']
  assert clip['account'] == dict(samples=200, text_tokens=2000,
                                 visual_tokens=4000, flops=1e13,
                                 parameters=123456)
  assert clip['own']['samples'] == patches['account']['samples'] == 100
  assert patches['seeds'] == list(range(8))
  assert hd['not_run'] == 'needs 33M web pictures'
  assert {p.name for p in lab.folder.iterdir()} == {
      'report.html', 'table.md', 'table.json', 'table.frozen.json'}
  out = capsys.readouterr().out
  assert 'run 40 of 40' in out
  assert str(lab.folder / 'report.html') in out


def test_a_part_does_not_replace_the_whole_table(lab):
  lab.run()
  before = {p.name: p.read_text() for p in lab.folder.iterdir()}
  assert lab.said['warnings'] == []
  lab.run('--rows=patches,broken', '--seeds=7,1')
  assert lab.said['warnings'] == [
      'only a part of the table: rows patches, broken; seeds 7, 1']
  assert {p.name for p in (lab.folder / 'part').iterdir()} == {
      'report.html', 'table.md', 'table.json'}
  assert before == {
      p.name: p.read_text() for p in lab.folder.iterdir() if p.is_file()}
  lab.run('--seeds=7,6,5,4,3,2,1,0')
  assert lab.said['warnings'] == []


def test_a_second_call_runs_nothing(lab, capsys):
  lab.run('--seeds=0,1')
  before, said = len(lab.started), lab.said
  assert lab.run('--seeds=0,1') == 0
  assert len(lab.started) == before
  assert lab.said == said
  assert '10 of them finished' in capsys.readouterr().out


def test_one_seed_is_no_verdict(lab):
  assert lab.run('--seeds=3') == 0
  assert lab.said['claims'][0]['verdict'] == 'one seed: no verdict'
  assert text_table.about_scores(lab.said).startswith('One seed: ')
  assert lab.run('--seeds=3,4') == 0
  assert text_table.about_scores(lab.said).startswith('Mean ± ')


def test_rows_that_were_not_asked_for_leave_claims_open(lab):
  assert lab.run('--rows=patches', '--seeds=0') == 0
  assert lab.started == [('patches', 0), ('patches', 1000)]
  assert lab.said['claims'][0]['verdict'] == 'not run'


def test_a_row_that_is_declared_as_not_run_is_not_run(lab):
  lab.path.write_text(lab.path.read_text().replace("'hd':", "'clip':"))
  assert lab.run('--seeds=0') == 0
  assert {row for row, _ in lab.started} == {'patches', 'broken'}
  assert [row['name'] for row in lab.said['rows']] == [
      'patches', 'broken', 'clip']
  assert lab.said['claims'][0]['notes'] == [
      'clip is not run: needs 33M web pictures']


def test_a_dry_run_touches_nothing(lab, capsys):
  assert lab.run('--seeds=0', '--rows=clip', '--dry_run') == 0
  assert lab.started == []
  assert not (lab.root / 'runs').exists()
  out = capsys.readouterr().out.splitlines()
  assert [line.split()[:2] for line in out[1:]] == [['to', 'run']] * 2
  assert 'warm.py:text:train seed 0' in out[1]


def test_a_crash_fails_the_command_after_all_others_ran(lab, capsys):
  lab.crash = {('clip', 0)}
  assert lab.run('--seeds=0,1') == 1
  assert ('clip', 1) in lab.started and ('broken', 1) in lab.started
  assert lab.said['rows'][0]['failed'] == {'0': 'exit code 1'}
  assert lab.said['rows'][0]['cells']['vqa']['values']['0'] == 0.05
  assert 'crashed: exit code 1' in capsys.readouterr().out


def test_a_verdict_never_fails_the_command(lab):
  lab.scores['clip'] = 0.3
  assert lab.run() == 0
  assert lab.said['claims'][0]['verdict'] == 'reversed at mini scale'


@pytest.mark.parametrize('seeds, code', [
    ('0,1,2,3', 0), ('0,1,2,3,4', 1)])
def test_five_seeds_against_a_control_fail_it(lab, seeds, code, capsys):
  lab.scores['broken'] = 0.7
  assert lab.run(f'--seeds={seeds}') == code
  out = capsys.readouterr().out
  assert ('contradicts' in out) == bool(code) and 'by chance' not in out


def test_a_row_that_differs_from_itself_may_do_so_by_chance(
    lab, monkeypatch, capsys):
  launch = lab.launch
  def shifted(run, *rest):
    lab.scores['patches'] = 0.5 if run.seed < 1000 else 0.6
    return launch(run, *rest)
  monkeypatch.setattr(run_graph, 'launch', shifted)
  assert lab.run() == 1
  assert ("control 'aa' contradicts its expectation; about 1 of 10 healthy "
          'tables does so by chance: ') in capsys.readouterr().out


def test_a_claim_that_changes_afterwards_is_exploratory(lab):
  lab.run('--seeds=0')
  assert lab.said['claims'][0]['notes'] == []
  lab.path.write_text(lab.path.read_text().replace('d=0.03', 'd=0.01'))
  addresses.experiment.cache_clear()
  lab.run('--seeds=0')
  assert 'exploratory' in lab.said['claims'][0]['notes'][0]


@pytest.mark.parametrize('old, new, changed', [
    ("'patches': {}", "'patches': {'steps': 77}", True),
    ("{'steps': 3}", "{'steps': 4}", True),  # the warm start of clip
    ("'patches': {}", "'patches': {'evaluators.vqa.examples': 7}", True),
    ("'patches': {}", "'patches': {'log_every': 7}", False),
])
def test_a_row_that_changes_afterwards_makes_its_claim_exploratory(
    lab, old, new, changed):
  lab.run('--seeds=0', '--rows=broken')
  for path in (lab.path, lab.root / 'warm.py'):
    path.write_text(path.read_text().replace(old, new))
  addresses.experiment.cache_clear()
  lab.run('--seeds=0')
  notes = lab.said['claims'][0]['notes']
  assert notes == ['exploratory: it or its rows changed after the first run'
                  ] * changed


SECOND = """, 'late': dict(
    kind='greater', a='clip', b='broken', metric='vqa', d=0.03, text='Late.')},
    controls="""


def test_what_is_written_or_dropped_afterwards_is_said(lab):
  lab.run('--seeds=0')
  lab.write(("helps>.')},\n    controls=", f"helps>.'){SECOND}"),
            ("{'aa': dict(kind='aa', row='patches'),", '{'),
            ("than='patches')", "than='patches', d=0.5)"))
  lab.run('--seeds=0')
  gap, late = lab.said['claims']
  assert gap['notes'] == []
  assert late['notes'] == ['exploratory: it was declared after the first run']
  assert lab.said['controls'][0]['notes'] == [
      'it or its rows changed after the first run']
  assert "control 'aa', declared before the first run, is gone" in (
      lab.said['warnings'])


def test_a_claim_about_results_that_are_there_is_exploratory(lab):
  lab.run('--seeds=0', '--rows=patches')
  (lab.folder / 'table.frozen.json').unlink()
  lab.run('--seeds=0')
  assert lab.said['claims'][0]['notes'] == [
      'exploratory: results that it rests on were there before it was '
      'declared: patches seed 0']


@pytest.mark.parametrize('argument, message', [
    ('--rows=clp', "no row 'clp' to run. Did you mean 'clip'"),
    ('--rows=hd', "no row 'hd' to run"),
    ('--seeds=0;1', '--seeds=0;1: expected whole numbers'),
    ('--seeds=1000', 'from 0 to 999'),
])
def test_a_wrong_argument_is_named(lab, argument, message):
  with pytest.raises(errors.UserError, match=message):
    table.main([f'--experiment={lab.path}', argument])


def test_an_experiment_without_a_table(lab):
  with pytest.raises(errors.UserError, match='declares no TABLE'):
    table.main([f'--experiment={lab.root}/warm.py'])
  with pytest.raises(errors.UserError, match='--list shows them'):
    table.main([])


def test_tables_of_the_repository_are_well_formed(capsys):
  table.main(['--list'])
  assert 'quickstart: ' in capsys.readouterr().out


def test_fall_of_a_loss_by_hand():
  # The last tenth of 100 steps is a straight line from 2.09 down to 2.00.
  rows = [dict(step=i, loss=3.0) for i in range(90)]
  rows += [dict(step=90 + i, loss=2.09 - 0.01 * i) for i in range(10)]
  assert table.loss_fall(rows) == pytest.approx(0.09 / 2.09)
  assert table.loss_fall(rows[:20]) is None
  assert table.loss_fall([*rows, {'step': 100, 'scores/x': 1.0}]) == (
      pytest.approx(0.09 / 2.09))


@pytest.mark.parametrize('flag', ['--seeds=0', '--tune'])
@pytest.mark.parametrize('workdir, message', [
    ('file', 'is a file; give a folder'), ('file/below', 'cannot write below')])
def test_a_workdir_that_cannot_be_written_is_a_user_error(
    lab, workdir, message, flag):
  lab.path.write_text(lab.path.read_text().replace(
      'TABLE = dict(', f'TABLE = dict({table_lab.TUNING}'))
  (lab.root / 'file').write_text('')
  with pytest.raises(errors.UserError, match=message) as caught:
    table.main([f'--experiment={lab.path}', flag,
                f'--workdir={lab.root / workdir}'])
  assert '\n' not in str(caught.value)
  assert not lab.started
