"""The graph of runs: order, sharing, resuming, crashes."""

import argparse
import json
import os
import subprocess
import sys
import time

import pytest

from mmgen import addresses
from mmgen import config
from mmgen import errors
from mmgen.tables import run_graph
from mmgen.training import run as run_lib

real = subprocess.Popen
WARM = '''
from experiments import quickstart
base = quickstart.base
ROWS = {'text': {}}
'''
TOY = WARM.replace("ROWS = {'text': {}}", '''
STAGES = {'one': {'init': {'decoder': 'run:WARM:text'}},
          'two': {'steps': 7}}
ROWS = {'a': {}, 'b': {'two': {'steps': 8}}, 'c': {'layout.images': 3}}
''')


@pytest.fixture
def toy(tmp_path, monkeypatch):
  """The address of an experiment whose rows a and b share their first stage."""
  monkeypatch.setattr(config.corpora, 'manifest', lambda *_: {'v': 1},
                      raising=False)
  warm, path = tmp_path / 'warm.py', tmp_path / 'toy.py'
  warm.write_text(WARM)
  path.write_text(TOY.replace('WARM', str(warm)))
  return str(path)


def planned(toy, tmp_path, targets):
  return run_graph.plan(
      [(addresses.stages(f'{toy}:{row}')[-1], seed) for row, seed in targets],
      'mini', tmp_path / 'runs', tmp_path)


def short(run):
  parsed = addresses.parse(run.address)
  return f'{parsed.row}.{parsed.stage}.{run.seed}'


def finish(run, seconds=60.0):
  run.folder.mkdir(parents=True, exist_ok=True)
  (run.folder / 'result.json').write_text(json.dumps(
      {'seconds': seconds / 2, 'evaluation_seconds': seconds / 2,
       'evaluation': run.evaluation}))


def test_parents_come_first_and_shared_runs_once(toy, tmp_path):
  runs, keys = planned(toy, tmp_path, [('a', 0), ('b', 0), ('c', 0)])
  order = [short(run) for run in runs.values()]
  # The warm start is one run for all rows, the first stage one for a and b.
  assert order == ['text.train.0', 'a.one.0', 'a.two.0', 'b.two.0',
                   'c.one.0', 'c.two.0']
  last = keys[run_graph.Target(f'{toy}:b:two', 0)]
  assert {short(runs[k]) for k in run_graph.ancestors(last, runs)} == {
      'a.one.0', 'text.train.0', 'b.two.0'}
  assert run_graph.ancestors(last, runs)[0] == last


def test_seeds_share_nothing(toy, tmp_path):
  runs, _ = planned(toy, tmp_path, [('a', 0), ('a', 1)])
  assert len(runs) == 6


def test_overrides_are_of_one_run_and_not_of_its_parents(toy, tmp_path):
  field = 'optimizer.peak_lr'
  runs, keys = run_graph.plan(
      [run_graph.Target(f'{toy}:a:two', 0, ((field, rate),))
       for rate in (0.001, 0.004, 0.001)], 'mini', tmp_path / 'r', tmp_path)
  assert [short(run) for run in runs.values()] == [
      'text.train.0', 'a.one.0', 'a.two.0', 'a.two.0']
  assert [run.config.optimizer.peak_lr for run in runs.values()] == [
      0.002, 0.002, 0.001, 0.004]
  assert len({run.folder for run in runs.values()}) == 4
  assert keys[f'{toy}:a:two', 0, ((field, 0.004),)] == list(runs)[-1]
  assert str(runs[list(runs)[-1]]).endswith('a:two seed 0 '
                                            'optimizer.peak_lr=0.004')


@pytest.mark.parametrize('rate', [0.0016, 1e-05, 1.25e-4])
def test_the_command_of_a_run_names_that_very_run(
    toy, tmp_path, monkeypatch, rate):
  overrides = (('optimizer.peak_lr', rate),
               ('evaluators.vqa.split', 'validation'))
  runs, _ = run_graph.plan([run_graph.Target(f'{toy}:a', 3, overrides)],
                           'mini', tmp_path / 'runs', tmp_path)
  key, run = list(runs.items())[-1]
  commands = []
  monkeypatch.setattr(subprocess, 'Popen', lambda command, env: (
      commands.append(command), real([sys.executable, '-c', '']))[1])
  run_graph.launch(run, tmp_path / 'runs', tmp_path)
  parser = argparse.ArgumentParser()
  config.add_arguments(parser)
  there = config.from_arguments(*parser.parse_known_args(commands[0][3:]))
  assert config.run_folder(there, tmp_path / 'runs', tmp_path) == run.folder
  assert key == (f'{config.run_key(there, tmp_path)}.'
                 f'{config.evaluation_key(there, tmp_path)}')
  assert there.optimizer.peak_lr == rate


def test_a_circle_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(config.corpora, 'manifest', lambda *_: {},
                      raising=False)
  path = tmp_path / 'circle.py'
  path.write_text(WARM + '''
ROWS = {'x': {'init': {'decoder': 'run:HERE:y'}},
        'y': {'init': {'decoder': 'run:HERE:x'}}}'''.replace('HERE', str(path)))
  with pytest.raises(errors.UserError, match='start from each other'):
    planned(str(path), tmp_path, [('x', 0)])


def test_what_is_finished_is_not_run_again(toy, tmp_path):
  runs, _ = planned(toy, tmp_path, [('a', 0), ('b', 0)])
  assert {run.state for run in runs.values()} == {run_graph.MISSING}
  started, said = [], []

  def start(run):
    started.append(short(run))
    finish(run)

  assert run_graph.execute(runs, start, said.append) == {}
  assert len(started) == 4
  assert said[0].startswith('run 1 of 4: ')
  # The same plan, made anew, finds all folders by their keys.
  runs, _ = planned(toy, tmp_path, [('b', 0), ('a', 0)])
  assert run_graph.execute(runs, start, said.append) == {}
  assert len(started) == 4


def test_what_is_scored_otherwise_is_scored_anew_and_not_trained(
    toy, tmp_path):
  examples = (('evaluators.vqa.examples', 99),)
  first, _ = planned(toy, tmp_path, [('a', 0)])
  run_graph.execute(first, finish, lambda line: None)
  runs, _ = run_graph.plan(
      [run_graph.Target(f'{toy}:a:two', 0, more) for more in ((), examples)],
      'mini', tmp_path / 'runs', tmp_path)
  *_, old, new = runs.values()
  assert new.folder == old.folder and len(runs) == 4
  assert [old.state, new.state] == [run_graph.DONE, run_graph.TRAINED]
  said = []

  def score(run):
    run_lib.write_result(run.folder, {
        'seconds': 1, 'evaluation_seconds': 1, 'evaluation': run.evaluation})

  run_graph.execute(runs, score, said.append)
  assert said == [f'run 1 of 1: {new}, scored anew, about 60 s left']
  assert [old.state, new.state] == [run_graph.DONE] * 2
  assert old.result['seconds'] == 30 and new.result['seconds'] == 1


def test_what_was_cut_off_is_resumed_with_an_estimate(toy, tmp_path):
  runs, keys = planned(toy, tmp_path, [('a', 0), ('b', 0)])
  *others, last = runs.values()
  for run in others:
    finish(run, seconds=120.0)
  (last.folder / 'checkpoints').mkdir(parents=True)
  assert last.state == run_graph.MISSING  # nothing to go on from
  (last.folder / 'checkpoints' / '7').mkdir()
  assert last.state == run_graph.CUT_OFF
  said = []
  run_graph.execute(runs, finish, said.append)
  assert said == [f'run 1 of 1: {last}, resumed, about 2 min left']


def test_a_crash_takes_its_children_along_and_no_other(toy, tmp_path):
  runs, keys = planned(toy, tmp_path, [('a', 0), ('b', 0), ('c', 0)])
  started, said = [], []

  def start(run):
    started.append(short(run))
    if short(run) == 'a.one.0':
      return 'exit code 1'
    return finish(run)

  failed = run_graph.execute(runs, start, said.append)
  assert {short(runs[key]): f.why for key, f in failed.items()} == {
      'a.one.0': 'exit code 1',
      'a.two.0': f'starts from {toy}:a:one seed 0, which failed',
      'b.two.0': f'starts from {toy}:a:one seed 0, which failed'}
  assert all(f.crashed for f in failed.values())
  assert set(started) == {'text.train.0', 'a.one.0', 'c.one.0', 'c.two.0'}


def test_a_divergence_is_a_finding_and_is_not_repeated(toy, tmp_path):
  runs, _ = planned(toy, tmp_path, [('c', 0)])
  started = []

  def start(run):
    started.append(short(run))
    if short(run) != 'c.one.0':
      return finish(run)
    run.folder.mkdir(parents=True)
    (run.folder / 'not_finite.json').write_text('{"step": 17}')
    return 'exit code 2'

  for _ in range(2):
    failed = run_graph.execute(runs, start, lambda line: None)
    assert [f.crashed for f in failed.values()] == [False, False]
    one, two = failed.values()
    assert one.why.startswith('diverged at step 17')
    assert two.why == f'starts from {toy}:c:one seed 0, which failed'
    assert started == ['text.train.0', 'c.one.0']


@pytest.mark.parametrize('script, why', [
    ('raise SystemExit(3)', 'exit code 3'),
    ('import os; os.kill(os.getpid(), 9)', 'killed by SIGKILL'),
    ('pass', 'it wrote no result.json'),
])
def test_why_a_process_gave_no_result(toy, tmp_path, monkeypatch, script, why):
  runs, _ = planned(toy, tmp_path, [('a', 3)])
  *_, run = runs.values()
  commands = []

  def fake(command, env):
    assert env['JAX_COMPILATION_CACHE_DIR']
    commands.append(command)
    return real([sys.executable, '-c', script])

  monkeypatch.setattr(subprocess, 'Popen', fake)
  error = run_graph.launch(run, tmp_path / 'runs', 'pictures')
  assert error.startswith(f'{why}; repeat it with: python -m mmgen.train ')
  assert commands[0][1:] == [
      '-m', 'mmgen.train', f'--config={toy}:a:two', '--scale=mini',
      '--seed=3', f'--workdir={tmp_path}/runs', '--data_dir=pictures']


@pytest.mark.parametrize('level, passed_on', [
    (None, '3'),  # what importing jax makes of it must not count as a wish
    ('0', '0'),
])
def test_a_run_is_quiet_unless_the_user_wants_to_hear(
    tmp_path, level, passed_on):
  script = ('from mmgen.tables import run_graph\n'
            f'found = run_graph._environment({str(tmp_path)!r})\n'
            'print(found["TF_CPP_MIN_LOG_LEVEL"])')
  environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
  environment.pop('TF_CPP_MIN_LOG_LEVEL', None)
  if level:
    environment['TF_CPP_MIN_LOG_LEVEL'] = level
  done = subprocess.run([sys.executable, '-c', script], env=environment,
                        capture_output=True, text=True, check=True)
  assert done.stdout.strip() == passed_on


def test_who_is_stopped_lets_the_child_save(toy, tmp_path, monkeypatch):
  runs, _ = planned(toy, tmp_path, [('a', 0)])
  *_, run = runs.values()
  saved, ready = tmp_path / 'saved', tmp_path / 'ready'
  script = f"""
import pathlib, signal, time
def end(*_):
  pathlib.Path({str(saved)!r}).touch()
  raise SystemExit(143)
signal.signal(signal.SIGTERM, end)
pathlib.Path({str(ready)!r}).touch()
time.sleep(60)
"""
  class Interrupted(real):
    """Is interrupted at the first wait, as by Ctrl-C."""
    waited = False

    def __init__(self, command, env):
      super().__init__([sys.executable, '-c', script])

    def wait(self, timeout=None):
      if not self.waited:
        self.waited = True
        while not ready.exists():
          time.sleep(0.01)
        raise KeyboardInterrupt
      return super().wait(timeout)

  monkeypatch.setattr(subprocess, 'Popen', Interrupted)
  with pytest.raises(KeyboardInterrupt):
    run_graph.launch(run, tmp_path, tmp_path)
  assert saved.exists()


def test_durations():
  assert [run_graph.duration(s) for s in (40, 180, 7500)] == [
      '40 s', '3 min', '2 h 05 min']
