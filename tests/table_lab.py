"""An experiment whose runs are written at once instead of trained."""

import functools
import json
import math

import numpy as np
import pytest

from mmgen import addresses
from mmgen import config
from mmgen import table
from mmgen.tables import run_graph

WARM = '''
from experiments import quickstart
base = quickstart.base
ROWS = {"text": {'steps': 3}}
'''
TOY = '''
from experiments import quickstart
base = quickstart.base
ROWS = {'clip': {'init': {'decoder': 'run:WARM:text'}},
        'patches': {}, 'broken': {'mix.captions.shuffle_pairs': True}}
TABLE = dict(
    title='Encoders & patches', source='arXiv:0000.00000, Table 1',
    metrics={'vqa': 'vqa/accuracy'}, seeds=tuple(range(8)),
    published={'clip': {'vqa': 78.5}, 'patches': {'vqa': 74.2}},
    claims={'gap': dict(kind='greater', a='clip', b='patches', metric='vqa',
                        d=0.03, text='A trained encoder <helps>.')},
    controls={'aa': dict(kind='aa', row='patches'),
              'broken': dict(kind='worse', row='broken', than='patches')},
    not_run={'hd': 'needs 33M web pictures'}, budget='5 steps')
'''
SCORES = {'clip': 0.6, 'patches': 0.5, 'broken': 0.1, 'text': 0.3}
PICTURES = [dict(id=f'r{i}', image=np.full((4, 4, 3), 10 * i, np.uint8))
            for i in range(20)]


@functools.cache
def predictions(right, examples):
  """Lines of a prediction file; every fourth question is of another type."""
  return ''.join(json.dumps(dict(
      id=f'r{i % 20}', split='compositions', condition=condition,
      type='exists' if i % 4 == 3 else 'what', question='what <is> it?',
      answer='a cat', prediction='cat' if i < right else 'dog & co',
      correct=i < right)) + '\n'
          for condition in ('picture', 'grey') for i in range(examples))


def result(run, score, examples=2000):
  return dict(
      evaluation=run.evaluation, date='2026-01-01', unplaced=0,
      examples={'vqa/accuracy': examples},
      scores={'vqa/accuracy': score, **{f'vqa/accuracy/{c}': 0.05 for c in (
          'blind', 'grey', 'shuffled')}},
      fingerprints={'vqa': 'f'}, samples=100, text_tokens=1000,
      visual_tokens=2000, flops=5e12, parameters=123456, seconds=60.0,
      evaluation_seconds=1.0, device='cpu', git_revision='abc')


def write_run(run, score, examples=2000):
  """Leaves behind what `mmgen.train` does."""
  (run.folder / 'predictions').mkdir(parents=True)
  (run.folder / 'predictions' / 'vqa.jsonl').write_text(
      predictions(round(score * examples), examples))
  (run.folder / 'metrics.jsonl').write_text(''.join(
      json.dumps(dict(step=i, loss=3 * math.exp(-i / 9) + 1)) + '\n'
      for i in range(1, 101)))
  (run.folder / 'result.json').write_text(
      json.dumps(result(run, score, examples)))


TUNING = """
    tuning=dict(grid=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3), metric='vqa'),
    tuning_seeds=(100, 101), """
# Score of each row by learning rate; one of clip's runs at 4e-3 diverges.
BY_RATE = {
    'clip': {5e-4: 0.3, 1e-3: 0.4, 2e-3: 0.5, 4e-3: 0.6, 8e-3: 0.1},
    'patches': {5e-4: 0.3, 1e-3: 0.5, 2e-3: 0.4, 4e-3: 0.3, 8e-3: 0.2},
    'broken': {5e-4: 0.06, 1e-3: 0.07, 2e-3: 0.08, 4e-3: 0.09, 8e-3: 0.1}}


class Lab:
  """An experiment, and a launch that counts and writes at once."""

  def __init__(self, tmp_path, monkeypatch):
    self.started, self.scores, self.crash = [], dict(SCORES), ()
    self.configs, self.diverging = [], ()
    self.path, self.root = tmp_path / 'toy.py', tmp_path
    warm = tmp_path / 'warm.py'
    warm.write_text(WARM)
    self.path.write_text(TOY.replace('WARM', str(warm)))
    monkeypatch.setattr(run_graph, 'launch', self.launch)
    monkeypatch.setattr(config.corpora, 'manifest', lambda *_: {},
                        raising=False)
    monkeypatch.setattr(config.corpora, 'open_split', lambda *_: PICTURES,
                        raising=False)

  def launch(self, run, workdir, data_dir):
    row = addresses.parse(run.address).row
    self.started.append((row, run.seed))
    self.configs.append(run.config)
    if (row, run.seed) in self.crash:
      return 'exit code 1'
    rate = run.config.optimizer.peak_lr
    if (row, run.seed, rate) in self.diverging:
      run.folder.mkdir(parents=True)
      (run.folder / 'not_finite.json').write_text('{"step": 17}')
      return 'exit code 2'
    if run.seed in (100, 101) and row in BY_RATE:
      return write_run(run, BY_RATE[row][rate] + 0.01 * (run.seed - 100))
    wobble = 0.01 * (-1) ** (run.seed // 2)
    return write_run(run, self.scores[row] + wobble)

  def write(self, *changes):
    """Changes the experiment's file."""
    text = self.path.read_text()
    for old, new in changes:
      assert old in text
      text = text.replace(old, new)
    self.path.write_text(text)
    addresses.experiment.cache_clear()

  def run(self, *arguments):
    with pytest.raises(SystemExit) as ended:
      table.main([f'--experiment={self.path}', f'--workdir={self.root}/runs',
                  *arguments])
    return ended.value.code

  @property
  def folder(self):
    name = str(self.path).removesuffix('.py').replace('/', '.').lstrip('.')
    return self.root / 'runs' / 'tables' / f'{name}.mini'

  @property
  def said(self):
    """What the last run wrote, a whole table or a part."""
    paths = self.folder.glob('**/table.json')
    newest = max(paths, key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text())
