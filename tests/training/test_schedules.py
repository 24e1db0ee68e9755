"""Schedules against arithmetic by hand and the references' formulas."""

import math

import ml_collections
import numpy as np
import pytest

from mmgen import errors
from mmgen.training import schedules


def _rates(steps, **fields):
  config = ml_collections.ConfigDict({**dict(
      peak_lr=1.0, warmup=0, min_ratio=0.0, warmup_from='one'), **fields})
  schedule = schedules.make_schedule(config, steps)
  return [float(schedule(step)) for step in range(steps + 1)]


def test_schedules_by_hand():
  assert _rates(8, schedule='constant', warmup=4)[:5] == [.25, .5, .75, 1, 1]
  np.testing.assert_allclose(
      _rates(8, schedule='linear', warmup=4, min_ratio=0.2),
      [.25, .5, .75, 1, 1, .8, .6, .4, .2], rtol=1e-6)
  cosine = _rates(8, schedule='cosine', min_ratio=0.5)
  np.testing.assert_allclose(
      [cosine[i] for i in (0, 2, 4, 8)],
      [1, 0.5 + 0.25 * (1 + math.cos(math.pi / 4)), 0.75, 0.5], rtol=1e-6)


def _open_clip(step, warmup, steps):
  """`cosine_lr` of open_clip_train/scheduler.py, and of EVA-CLIP's."""
  if step < warmup:
    return (step + 1) / warmup
  e, es = step - warmup, steps - warmup
  return 0.5 * (1 + math.cos(math.pi * e / es))


def _transformers(step, warmup, steps):
  """`get_cosine_schedule_with_warmup` of transformers/optimization.py."""
  if step < warmup:
    return step / max(1, warmup)
  progress = (step - warmup) / max(1, steps - warmup)
  return max(0.0, 0.5 * (1 + math.cos(math.pi * 0.5 * 2 * progress)))


@pytest.mark.parametrize('warmup', [0, 1, 7])
@pytest.mark.parametrize('name, reference', [
    ('one', _open_clip), ('zero', _transformers)])
def test_both_warm_ups_equal_their_references(name, reference, warmup):
  found = _rates(30, schedule='cosine', warmup=warmup, warmup_from=name)
  np.testing.assert_allclose(
      found[:30], [reference(step, warmup, 30) for step in range(30)],
      rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('fields, message', [
    (dict(schedule='cosin'), "schedule is 'cosin'; allowed: cosine"),
    (dict(schedule='cosine', warmup_from='two'),
     "warmup_from is 'two'; allowed: one, zero"),
    (dict(schedule='cosine', warmup=10), 'warmup is 10 steps; a run of 10'),
])
def test_bad_fields_are_user_errors(fields, message):
  with pytest.raises(errors.UserError, match=message):
    _rates(10, **fields)
