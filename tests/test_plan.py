"""What a step takes on a slice: stored plans, shapes, one real compilation.

The plans below tests/golden/plans were compiled at true size, each by the
command python -m mmgen.plan --config=<row> --scale=paper --json >
tests/golden/plans/<name>.json, Emu2's with --forward. A compilation takes 1 to
6 minutes, which is why it is not made here.
"""

import json
import math
import pathlib

import jax
from jax.sharding import AbstractMesh
import pytest
import test_golden_metrics as golden
import test_train

from mmgen import config as config_lib
from mmgen import errors
from mmgen import plan
from mmgen.data import pipeline as pipeline_lib
from mmgen.training import sharding

PLANS = sorted(
    (pathlib.Path(__file__).parent / 'golden' / 'plans').glob('*.json'))
SMALL = ['model.decoder.vocab=1280', 'mesh.data=1', 'mesh.fsdp=-1']


def test_an_empty_batch_has_the_shapes_of_a_batch():
  for address in ('quickstart:eve', 'warm_starts:clip', 'warm_starts:text'):
    config = config_lib.load(address)
    batch = pipeline_lib.empty_batch(config, config_lib.image_layout(config))
    assert set(batch) == set(config.mix)
    for name, arrays in batch.items():
      rows = {len(x) for x in arrays.values()}
      n = config.layout['rows' if config.layout.name == 'sequence' else
                        'documents']
      assert rows == {n * config.mix[name].quota}
      if 'images' in arrays:
        assert arrays['images'].shape[-3:] == (*config.image.size, 3)
        assert arrays['images'].strides[0] == 0  # takes no memory


@pytest.mark.parametrize('fields', [{'mix.fake.quota': 2}, golden.PAIRS])
def test_an_empty_batch_has_the_arrays_of_a_real_one(fields):
  config = test_train._config(**fields)
  real = test_train._open_pipeline(config, '').batch(0)
  empty = pipeline_lib.empty_batch(config, config_lib.image_layout(config))
  of = lambda batch: jax.tree.map(lambda x: (x.shape, x.dtype), batch)
  assert of(empty) == of(real)


def local_bytes(tree):
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
             for x in jax.tree.leaves(tree))


def stored_shapes(stored):
  config = config_lib.load(stored['config'], stored['scale'])
  return plan.shapes(config, AbstractMesh(
      tuple(stored['mesh'].values()), sharding.AXES))


@pytest.mark.parametrize('path', PLANS, ids=lambda path: path.stem)
def test_stored_plans_are_of_the_rows_as_they_are(path):
  """What is stored is of this model, and fits the chip."""
  stored = json.loads(path.read_text())
  _, _, state, _, _ = stored_shapes(stored)
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(state['params']))
  assert stored['trained_parameters'] == count
  assert stored['peak_bytes'] < stored['memory_bytes']


@pytest.mark.parametrize('path', PLANS, ids=lambda path: path.stem)
def test_arguments_are_the_sum_of_their_shapes(path):
  stored = json.loads(path.read_text())
  if stored['step'] == 'train':
    local = local_bytes(stored_shapes(stored)[2:])
    assert local == pytest.approx(stored['argument_bytes'], rel=0.02)
  assert stored['argument_bytes'] == pytest.approx(
      stored['formula_bytes'], rel=0.02)


def test_a_small_step_compiles_for_a_slice(capsys):
  plan.main(['--config=quickstart:patches', '--slice=v5e:2x2', '--json',
             *(f'--config.{field}' for field in SMALL)])
  found = json.loads(capsys.readouterr().out)
  assert found['chips'] == 4 and found['mesh']['fsdp'] == 4
  assert found['formula_bytes'] < found['argument_bytes']
  assert found['argument_bytes'] < found['peak_bytes'] < 2**26
  config = config_lib.load('quickstart:patches', overrides=SMALL)
  _, _, *arguments = plan.shapes(
      config, AbstractMesh((1, 4, 1, 1), sharding.AXES))
  assert local_bytes(arguments) == pytest.approx(
      found['argument_bytes'], rel=0.3)  # small arrays are padded to tiles


FOUND = dict(
    config='a:b:c', scale='paper', slice='v5e:2x2', chip='TPU v5 lite', chips=4,
    mesh=dict(data=1, fsdp=4, tensor=1, sequence=1), step='train',
    parameters=1000, trained_parameters=900, argument_bytes=2**31,
    formula_bytes=2**30, temporary_bytes=2**29, peak_bytes=2**34 + 2**32,
    memory_bytes=2**34, flops=197e12 * 8, least_seconds=2.0)


def test_a_plan_says_whether_it_fits():
  said = plan.text(FOUND)
  assert '4 x TPU v5 lite, fsdp 4' in said
  assert 'parameters   1,000, trained 900' in said
  assert '2.00 GiB a chip, +100.0% of the sum of their shapes' in said
  assert '20.00 GiB of 16 GiB, 125%: DOES NOT FIT' in said
  assert 'at least 2.00 s' in said
  assert 'FIT' not in plan.text(FOUND | {'peak_bytes': 2**33})


def test_what_is_wrong_is_named():
  with pytest.raises(errors.UserError, match='names no slice: give --slice'):
    plan.main(['--config=quickstart:patches'])
  with pytest.raises(errors.UserError, match="the slice 'v5e:2x9'"):
    plan.main(['--config=quickstart:patches', '--slice=v5e:2x9'])
  with pytest.raises(errors.UserError, match='cannot be shared out so'):
    plan.main(['--config=quickstart:patches', '--slice=v5p:4x4x8',
               '--config.mesh.fsdp=64', '--config.mesh.tensor=2'])
