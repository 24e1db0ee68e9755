"""The numbers of an unchanged config: when they change, say so.

The first steps of a tiny run of each objective, and the arrays of batches of a
drawn corpus, are stored beside `config.RESULT_VERSION`. If a change to the
code moves them, finished runs on disk no longer stand for what the code would
compute: raise RESULT_VERSION, which gives every run a new key, then
MMGEN_UPDATE_GOLDEN=1 python -m pytest tests/test_golden_metrics.py.
"""

import json
import os
import pathlib
import zlib

import jax
import numpy as np
import pytest
import test_train
import tiny_run

from mmgen import config as config_lib
from mmgen import train as train_lib
from mmgen.data import pipeline as pipeline_lib
from mmgen.training import metrics as metrics_lib

FILE = pathlib.Path(__file__).parent / 'golden' / 'metrics.json'
NAMES = ('loss', 'grad_norm', 'param_norm', 'update_norm', 'lr')
EVE = dict(name='eve', patch=2, pool=2, width=16, heads=2)
TOWER = dict(layers=2, width=16, heads=2, hidden=32)
PAIRS = {
    'mix.fake.view': 'pair',
    'layout': dict(name='pair', length=12, rows=1, documents=8, images=1),
    'model': dict(name='clip', size='mini', embed=16,
                  vision=TOWER | dict(image_size=(8, 8), patch=4),
                  text=TOWER | dict(length=12))}
RUNS = {
    'patches': {'mesh.data': 1, 'mesh.fsdp': 8},
    'eve': {'mesh.data': 1, 'mesh.fsdp': 8, 'model.vision': EVE},
    'aligned': {
        'model.vision': EVE, 'optimizer.groups': {
            'teacher': dict(pattern='^teacher/', freeze=True)},
        'objective': dict(
            name='alignment', aligner=dict(interval=1, heads=2),
            teacher=dict(TOWER, size='mini', image_size=(8, 8), patch=4))},
    'softmax': PAIRS | {'objective': dict(name='contrastive', loss='softmax')},
    'sigmoid': PAIRS | {
        'model.logit_bias': -10.0, 'optimizer.accumulate': 2,
        'mesh.data': 4, 'mesh.tensor': 2,
        'objective': dict(name='contrastive', loss='sigmoid')},
}
# Layouts of the batches that are stored.
LAYOUTS = {
    'sequence': dict(name='sequence', length=64, rows=2, documents=8, images=3),
    'pair': dict(name='pair', length=24, rows=1, documents=8, images=1)}


HINT = ('moved: raise config.RESULT_VERSION if that is intended, see the head '
        'of this file')


def _stored(name, found):
  """Returns what is stored under a name; stores it first, when told to."""
  stored = json.loads(FILE.read_text()) if FILE.exists() else {}
  if os.environ.get('MMGEN_UPDATE_GOLDEN'):
    stored |= {'RESULT_VERSION': config_lib.RESULT_VERSION, name: found}
    FILE.write_text(json.dumps(stored, indent=1) + '\n')
  assert stored['RESULT_VERSION'] == config_lib.RESULT_VERSION, (
      'RESULT_VERSION was raised: store the new numbers, see the head of '
      'this file')
  return stored[name]


@pytest.mark.parametrize('name', RUNS)
def test_the_first_steps_are_the_stored_ones(name, tmp_path, monkeypatch):
  test_train._install(monkeypatch)
  monkeypatch.setattr(train_lib.evaluators_lib, 'build', lambda *_: {})
  config = test_train._config(steps=5, eval_every=0, **RUNS[name])
  with jax.default_matmul_precision('highest'):
    train_lib.train(config, tmp_path, '')
  rows = metrics_lib.read_rows(tmp_path)
  found = {k: [row[k] for row in rows if k in row] for k in NAMES}
  stored = _stored(name, found)
  for k in NAMES:
    np.testing.assert_allclose(found[k], stored[k], rtol=2e-4,
                               err_msg=f'{k} {HINT}')


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  return tiny_run.prepare(tmp_path_factory.mktemp('data'))


@pytest.mark.parametrize('layout', LAYOUTS)
def test_batches_of_drawn_scenes_are_the_stored_ones(layout, data_dir):
  """Order, words, resized pixels, packing: the crc of every array."""
  config = tiny_run.config()
  config.layout = LAYOUTS[layout]
  pair = layout == 'pair'
  source = dict(corpus=tiny_run.CORPUS, split='train', column='fused',
                language='en', image_place='before', shuffle_pairs=False,
                quota=2)
  config.mix = {view: dict(source, view=view)
                for view in (['pair'] if pair else ['caption', 'vqa'])}
  pipeline = pipeline_lib.open_pipeline(
      config, data_dir, config_lib.image_layout(config))
  found = {f'{source}/{name}': zlib.crc32(np.ascontiguousarray(x).tobytes())
           for source, arrays in pipeline.batch(3).items()
           for name, x in arrays.items()}
  assert found == _stored(f'batch of {layout}', found), HINT
