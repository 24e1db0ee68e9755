"""The scores of unchanged parameters: when they change, say so.

An untrained decoder and an untrained CLIP are evaluated on a corpus that is
drawn for it, and what comes out is stored beside `evaluators.common.VERSION`,
the crc of the predictions included. If a change to the code moves it, finished
runs are no longer scored as the code would score them: raise VERSION, which
gives every evaluation a new key, then
MMGEN_UPDATE_GOLDEN=1 python -m pytest tests/test_golden_scores.py.
"""

import json
import os
import pathlib
import zlib

import jax
import ml_collections
import numpy as np
import pytest
import tiny_run

from mmgen import config as config_lib
from mmgen import evaluators
from mmgen.data import corpora
from mmgen.evaluators import common

FILE = pathlib.Path(__file__).parent / 'golden' / 'scores.json'
TOWER = dict(layers=1, width=16, heads=2, hidden=32)


def _clip():
  config = tiny_run.config()
  config.layout = dict(name='pair', length=24, rows=1, documents=8, images=1)
  config.model = ml_collections.ConfigDict(dict(
      name='clip', size='mini', embed=16, text=TOWER | dict(length=24),
      vision=TOWER | dict(image_size=(16, 16), patch=8)))
  of = dict(corpus=tiny_run.CORPUS, batch_size=4)
  config.evaluators = dict(
      zero_shot=dict(of, name='zero_shot', templates=('a {}', 'one {}')),
      retrieval=dict(of, name='retrieval'))
  return config


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  return tiny_run.prepare(tmp_path_factory.mktemp('data'))


@pytest.mark.parametrize('config', [tiny_run.config(), _clip()],
                         ids=['decoder', 'clip'])
def test_the_scores_are_the_stored_ones(config, data_dir, tmp_path):
  tokenizer = corpora.load_tokenizer(data_dir, tiny_run.CORPUS)
  model = config_lib.build_model(config, tokenizer.vocab_size)
  module = tiny_run.MODULES[config.model.name]
  params = tiny_run.untrained(model, module, config)
  with jax.default_matmul_precision('highest'):
    found = evaluators.run_all(evaluators.build(
        config.evaluators, evaluators.Context(
            config, model, tokenizer, config_lib.image_layout(config),
            data_dir)), params, tmp_path)
  said = {}
  for file in sorted((tmp_path / 'predictions').iterdir()):
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    words = '\n'.join(f'{p["id"]} {p["condition"]} {p.get("prediction")}'
                      for p in lines)
    said[file.stem] = zlib.crc32(words.encode())
  name = config.model.name
  stored = json.loads(FILE.read_text()) if FILE.exists() else {}
  if os.environ.get('MMGEN_UPDATE_GOLDEN'):
    stored |= {'VERSION': common.VERSION,
               name: dict(scores=found['scores'], said=said)}
    FILE.write_text(json.dumps(stored, indent=1) + '\n')
  hint = ('moved: raise evaluators.common.VERSION if that is intended, see the '
          'head of this file')
  assert stored['VERSION'] == common.VERSION, 'store the new scores'
  assert said == stored[name]['said'], hint
  assert found['scores'].keys() == stored[name]['scores'].keys()
  for score, value in stored[name]['scores'].items():
    np.testing.assert_allclose(found['scores'][score], value, rtol=2e-4,
                               err_msg=f'{score} {hint}')
