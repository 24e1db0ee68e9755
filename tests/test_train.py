"""Whole runs: meshes, restarts, kills, warm starts, what ends up on disk.

The runs train the real decoder on fake records. As a program,
`python tests/test_train.py <folder>`, this file is one such run.
"""

import json
import logging
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from mmgen import config as config_lib
from mmgen import errors
from mmgen import train as train_lib
from mmgen.data import pipeline as pipeline_lib
from mmgen.models import multimodal
from mmgen.training import checkpoint
from mmgen.training import metrics as metrics_lib
from mmgen.training import run as run_lib

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import fakes

EXACT = ('loss', 'loss/next_token', 'grad_norm', 'param_norm', 'update_norm')


def _config(**fields):
  config = ml_collections.ConfigDict(dict(
      name='toy:row:train', scale='mini', seed=0, steps=24, log_every=5,
      eval_every=16, checkpoint_every=4, dtype='float32',
      mix=dict(fake=dict(corpus='fake', split='train', view='caption',
                         quota=1)),
      layout=dict(name='sequence', length=16, rows=8, documents=8, images=1),
      image=dict(size=(8, 8), fit='square', kernel='bicubic'),
      model=dict(
          name='multimodal', vision=dict(name='linear_patches', patch=4,
                                         width=16),
          connector=dict(name='identity'),
          decoder=dict(layers=2, width=16, heads=2, hidden=32)),
      objective=dict(name='next_token'), init={},
      optimizer=dict(
          name='adamw', peak_lr=1e-2, schedule='cosine', warmup=4,
          min_ratio=0.1, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0,
          groups={}, accumulate=1),
      mesh=dict(data=-1, fsdp=1, tensor=1, sequence=1), evaluators={}))
  with config.ignore_type():
    config.update_from_flattened_dict(fields)
  return config.lock()


class Letters(fakes.Letters):
  bytes = b'letters'


def _open_pipeline(config, data_dir, image_layout=None, process_index=0,
                   process_count=1):
  return pipeline_lib.Pipeline(
      config, data_dir, config_lib.image_layout(config), Letters(),
      process_index, process_count,
      open_split=fakes.opener(fake=fakes.Records(50)))


class Scorer:
  """Scores a run by the sum of its decoder's embedding."""
  fingerprint = 'abc'
  trouble = None  # raised in place of a score

  def __init__(self):
    self.predictions = []

  def run(self, params):
    if self.trouble:
      raise self.trouble
    self.predictions = [
        {'id': 'é', 'condition': 'picture', 'type': 'what'}]
    yield 'sum', float(jnp.sum(params['decoder']['embedding']))
    yield 'sum/blind', 0.5


def _install(patch):
  """Puts fake records and a fake evaluator in place."""
  patch.setattr(pipeline_lib, 'open_pipeline', _open_pipeline)
  patch.setattr(train_lib.evaluators_lib, 'build',
                lambda entries, context: {'toy': Scorer()})


@pytest.fixture(autouse=True)
def fakes_in_place(monkeypatch):
  _install(monkeypatch)


def _column(folder, name):
  return [row[name] for row in metrics_lib.read_rows(folder) if name in row]


def _columns(folder):
  return {name: _column(folder, name) for name in EXACT}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """An uninterrupted run, and its result."""
  folder = tmp_path_factory.mktemp('whole')
  with pytest.MonkeyPatch.context() as patch:
    _install(patch)
    result = train_lib.train(_config(), folder, '')
  return folder, result


# ---------------------------------------------------------------------------
# What a run leaves


def test_run_learns_and_leaves_a_self_sufficient_folder(whole):
  folder, result = whole
  loss = _column(folder, 'loss')
  assert len(loss) == 24 and np.mean(loss[-4:]) < 0.8 * loss[0]
  flat = json.loads((folder / 'config.json').read_text())
  assert config_lib.flatten(config_lib.unflatten(flat)) == flat
  assert checkpoint.tokenizer_bytes(folder) == b'letters'
  assert set(checkpoint.load_params(folder)) == {'decoder', 'vision'}
  assert json.loads((folder / 'result.json').read_text()) == result


def test_result_keeps_the_accounts(whole):
  folder, result = whole
  rows = metrics_lib.read_rows(folder)
  for name in metrics_lib.COUNTS:
    assert result[name] == sum(row.get(name, 0) for row in rows) > 0, name
  pipeline = _open_pipeline(_config(), '')
  documents = [pipeline.stats(step)['fake']['documents'] for step in range(24)]
  assert result['samples'] == sum(documents)
  assert result['unplaced'] == 24 * 8 - sum(documents)
  params = checkpoint.load_params(folder)
  assert result['parameters'] == sum(x.size for x in jax.tree.leaves(params))
  assert result['steps'] == 24 and result['seconds'] > 0
  assert result['stability']['grad_norm_max'] == max(
      _column(folder, 'grad_norm'))


def test_flops_agree_with_the_analytic_account(whole):
  """Training takes three times the forward pass, but for the pixels' part."""
  _, result = whole
  model = config_lib.build_model(_config(), Letters.vocab_size)
  forward = 8 * multimodal.flops(model.config, 16, 1, (8, 8))
  pixels = 8 * 4 * 2 * 48 * 16  # no gradient reaches the pictures
  assert result['flops'] == 24 * (3 * forward - pixels)


def test_scores_and_predictions_are_written(whole):
  folder, result = whole
  embedding = checkpoint.load_params(folder)['decoder']['embedding']
  np.testing.assert_allclose(result['scores']['toy/sum'], np.sum(embedding),
                             rtol=1e-5)
  assert result['scores']['toy/sum/blind'] == 0.5
  assert result['fingerprints'] == {'toy': 'abc'}
  rows = [row for row in metrics_lib.read_rows(folder)
          if 'scores/toy/sum' in row]
  assert [row['step'] for row in rows] == [16, 24]
  assert (folder / 'predictions' / 'toy.jsonl').read_text() == (
      '{"id": "é", "condition": "picture", "type": "what"}\n')


def test_finished_run_is_returned_at_once(whole, monkeypatch):
  folder, result = whole
  monkeypatch.setattr(pipeline_lib, 'open_pipeline', None)
  assert train_lib.train(_config(), folder, '') == result


def test_other_evaluators_score_a_finished_run_without_a_step(
    whole, tmp_path, monkeypatch):
  folder, first = shutil.copytree(whole[0], tmp_path / 'run'), whole[1]
  assert first['examples'] == {'toy/sum': 1, 'toy/sum/blind': 1}
  monkeypatch.setattr(config_lib.evaluation, 'VERSION', 10**6)
  rows = _columns(folder)
  second = train_lib.train(_config(), folder, '')
  assert second['evaluation'] != first['evaluation']
  assert second['scores'] == first['scores'] and _columns(folder) == rows
  for name in (*metrics_lib.COUNTS, 'flops', 'unplaced', 'stability'):
    assert second[name] == first[name], name
  assert run_lib.read_result(folder, second['evaluation']) == second
  assert run_lib.read_result(folder, first['evaluation']) == first
  assert run_lib.read_result(folder, 'other') is None


# ---------------------------------------------------------------------------
# Restarts


def _cut_off(folder, copy, step):
  """Copies a run as it was when it had only got beyond the given step."""
  shutil.copytree(folder, copy, dirs_exist_ok=True)
  (copy / 'result.json').unlink()
  for path in (copy / 'checkpoints').iterdir():
    if int(path.name) > step:
      shutil.rmtree(path)
  with (copy / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 25, "lo')
  return copy


def test_restart_repeats_the_uninterrupted_run(whole, tmp_path):
  folder = _cut_off(whole[0], tmp_path, 20)
  result = train_lib.train(_config(), folder, '')
  assert _columns(folder) == _columns(whole[0])
  for name in (*metrics_lib.COUNTS, 'flops', 'stability', 'scores'):
    assert result[name] == whole[1][name], name
  jax.tree.map(np.testing.assert_array_equal,
               checkpoint.load_params(folder),
               checkpoint.load_params(whole[0]))


def _program(folder):
  """Starts this file as a program; what it says goes to a file."""
  with open(f'{folder}.log', 'w') as log:  # a pipe that nobody reads fills up
    return subprocess.Popen(
        [sys.executable, __file__, str(folder)], stderr=log,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)))


def _wait_for_rows(process, folder, count):
  """Waits until a run has flushed `count` rows, or is over."""
  while process.poll() is None and len(_column(folder, 'loss')) < count:
    time.sleep(0.02)


def test_kills_at_random_moments_change_nothing(whole, tmp_path):
  """kill -9 twice, SIGTERM once; the columns come out bitwise equal."""
  draw = random.Random(os.getpid())
  for least in (4, 8):
    process = _program(tmp_path)
    _wait_for_rows(process, tmp_path, least)
    time.sleep(draw.uniform(0, 0.3))
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
  process = _program(tmp_path)
  _wait_for_rows(process, tmp_path, 16)
  process.terminate()
  process.wait()
  text = pathlib.Path(f'{tmp_path}.log').read_text()
  assert process.returncode == 128 + signal.SIGTERM, text
  step = checkpoint.load_extras(tmp_path)['step']
  assert f'stopped by SIGTERM after step {step}, which is saved' in text
  assert 'restored after step' in text and 'Traceback' not in text
  assert step < 24
  train_lib.train(_config(), tmp_path, '')
  assert _columns(tmp_path) == _columns(whole[0])


# ---------------------------------------------------------------------------
# Meshes


@pytest.fixture(scope='module')
def hundred(tmp_path_factory):
  """The losses of 100 steps on 8 devices that share out the rows."""
  folder = tmp_path_factory.mktemp('hundred')
  with pytest.MonkeyPatch.context() as patch:
    _install(patch)
    train_lib.train(_config(**HUNDRED), folder, '')
  return _column(folder, 'loss')


HUNDRED = dict(steps=100, eval_every=0, checkpoint_every=100)


@pytest.mark.parametrize('fields', [
    {'mesh.data': 1, 'mesh.fsdp': 8},
    {'mesh.data': 2, 'mesh.fsdp': 4},
    {'mesh.data': 2, 'mesh.tensor': 2, 'mesh.sequence': 2,
     'optimizer.accumulate': 4},
    'one device',
])
def test_meshes_and_microbatches_agree(
    hundred, tmp_path, monkeypatch, fields):
  if fields == 'one device':
    make = train_lib.sharding.make_mesh
    monkeypatch.setattr(train_lib.sharding, 'make_mesh',
                        lambda config: make(config, jax.devices()[:1]))
    fields = {}
  train_lib.train(_config(**HUNDRED, **fields), tmp_path, '')
  loss = _column(tmp_path, 'loss')
  assert len(loss) == len(hundred) == 100
  np.testing.assert_allclose(loss[0], hundred[0], rtol=1e-6)
  np.testing.assert_allclose(loss, hundred, rtol=1e-3)


# ---------------------------------------------------------------------------
# Trouble


def test_not_finite_stops_with_a_good_state_and_names_records(
    whole, tmp_path, monkeypatch):
  """The batch of step 11 is poisoned; step 10 is what is saved."""
  cross_entropy = train_lib.next_token.cross_entropy
  poisoned = _open_pipeline(_config(), '').batch(10)['fake']['targets'].sum()

  def poison(logits, targets):
    loss = cross_entropy(logits, targets)
    return jnp.where(jnp.sum(targets) == poisoned, jnp.nan, loss)
  monkeypatch.setattr(train_lib.next_token, 'cross_entropy', poison)
  with pytest.raises(errors.UserError) as caught:
    train_lib.train(_config(), tmp_path, '')
  text = str(caught.value)
  assert text.startswith('step 11 of toy:row:train is not finite: loss nan')
  ids = _open_pipeline(_config(), '').records(10)['fake']
  assert f'fake: {", ".join(ids[:8])}' in text and '--step=10' in text
  assert json.loads((tmp_path / 'not_finite.json').read_text())[
      'records'] == {'fake': ids}
  assert not (tmp_path / 'result.json').exists()
  assert checkpoint.load_extras(tmp_path)['step'] == 10
  monkeypatch.setattr(train_lib.next_token, 'cross_entropy', cross_entropy)
  train_lib.train(_config(), tmp_path, '')
  assert _columns(tmp_path) == _columns(whole[0])


def test_trouble_of_an_evaluator_is_no_full_disk(whole, tmp_path, monkeypatch):
  folder = _cut_off(whole[0], tmp_path, 24)
  monkeypatch.setattr(Scorer, 'trouble', FileNotFoundError(2, 'gone', 'x.png'))
  with pytest.raises(FileNotFoundError):
    train_lib.train(_config(), folder, '')


def test_predictions_that_cannot_be_written_are_a_user_error(whole, tmp_path):
  folder = _cut_off(whole[0], tmp_path, 24)
  shutil.rmtree(folder / 'predictions')
  (folder / 'predictions').write_text('')
  with pytest.raises(errors.UserError, match='cannot write below'):
    train_lib.train(_config(), folder, '')


@pytest.mark.parametrize('fields, message', [
    ({'mesh.data': 3}, 'takes 3 devices; this run has 8'),
    ({'layout.rows': 6}, "'fake' has 6 rows.*multiple of 8, such as 8"),
    ({'model.vision.patch': 2}, "'fake' has nothing to learn.*length=16"),
    ({'optimizer.accumulate': 2}, '2 microbatch.*multiple of 16'),
    ({'objective.name': 'next'}, "name is 'next'; allowed: next_token"),
    ({'objective.weight': 2}, "no field 'weight'.* 'next_token' has: coeff"),
    ({'objective': dict(name='alignment', teachr=3)},
     "no field 'teachr'. Did you mean 'teacher'"),
    ({'objective.name': 'contrastive'},
     "'contrastive' and config.layout.name is 'sequence'; .* with 'pair'"),
    ({'layout.name': 'pair', 'mix.fake.view': 'pair'},
     "'next_token' and config.layout.name is 'pair'; .* with 'sequence'"),
    ({'layout.name': 'pair', 'mix.fake.view': 'pair',
      'objective.name': 'contrastive'},
     "'contrastive' and config.model.name is 'multimodal'; .* with 'clip'"),
    ({'optimizer.groups': {'a': dict(pattern='decodr')}}, 'Nearest: decoder/'),
])
def test_wrong_configs_are_user_errors(tmp_path, fields, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    train_lib.train(_config(**fields), tmp_path / 'run', '')
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'run').exists()


def test_folder_of_another_model_is_a_user_error(whole, tmp_path):
  folder = _cut_off(whole[0], tmp_path, 24)
  with pytest.raises(errors.UserError, match='of another model.*up/kernel'):
    train_lib.train(_config(**{'model.decoder.hidden': 48}), folder, '')
  for name in ('config.json', 'metrics.jsonl'):
    assert (folder / name).read_text().startswith(
        (whole[0] / name).read_text()), name


# ---------------------------------------------------------------------------
# Warm starts and freezing


def test_frozen_parts_come_from_another_run_and_survive_restarts(
    whole, tmp_path):
  config = _config(**{
      'steps': 8, 'model.vision.patch': 8, 'optimizer.groups': {
          'text': dict(pattern='^decoder/', freeze=True)}})
  straight, cut = tmp_path / 'straight', tmp_path / 'cut'
  result = train_lib.train(config, straight, '', {'decoder': whole[0]})
  assert min(_column(straight, 'loss')) > 0
  ours, theirs = (checkpoint.load_params(f) for f in (straight, whole[0]))
  jax.tree.map(np.testing.assert_array_equal, ours['decoder'],
               theirs['decoder'])
  assert result['trained_parameters'] == sum(
      x.size for x in jax.tree.leaves(ours['vision']))
  report = json.loads((straight / 'init_report.json').read_text())['decoder']
  assert report['from'] == str(whole[0]) and not report['unused']
  stored = (straight / 'checkpoints' / '8' / 'state' / '_METADATA').read_text()
  assert 'vision' in stored and 'decoder' not in stored
  train_lib.train(config, _cut_off(straight, cut, 4), '', {'decoder': '/gone'})
  assert _columns(straight) == _columns(cut)


def test_bfloat16_follows_float32(whole, tmp_path, monkeypatch):
  """Trained parameters stay float32, frozen ones are stored as computed with.
  """
  fields = {'steps': 24, 'model.vision.patch': 8, 'optimizer.groups': {
      'text': dict(pattern='^decoder/', freeze=True)}}
  dtypes, loop = {}, train_lib._loop

  def spy(run, step, state, frozen, *rest):
    of = lambda tree: {x.dtype.name for x in jax.tree.leaves(tree)}
    dtypes[run.config.dtype] = of(state['params']), of(frozen)
    return loop(run, step, state, frozen, *rest)

  monkeypatch.setattr(train_lib, '_loop', spy)
  for dtype in ('float32', 'bfloat16'):
    train_lib.train(_config(dtype=dtype, **fields), tmp_path / dtype, '',
                    {'decoder': whole[0]})
  assert dtypes == {'float32': ({'float32'}, {'float32'}),
                    'bfloat16': ({'float32'}, {'bfloat16'})}
  half, full = (_column(tmp_path / d, 'loss') for d in ('bfloat16', 'float32'))
  np.testing.assert_allclose(half, full, rtol=0.03)
  assert half != full


# ---------------------------------------------------------------------------
# As a program


def _main(folder):
  logging.basicConfig(format='%(message)s')
  logging.getLogger('mmgen').setLevel(logging.INFO)
  _install(pytest.MonkeyPatch())
  record = train_lib.run_lib.Run.record
  def slowly(self, *args):
    time.sleep(0.1)  # leaves the test time to act between two steps
    record(self, *args)
  train_lib.run_lib.Run.record = slowly
  train_lib.train(_config(), folder, '')


if __name__ == '__main__':
  import conftest  # noqa: F401  eight devices, as in the tests
  errors.run(lambda: _main(sys.argv[1]))
