"""Declared tables: what is accepted, and what is refused with which words."""

import re

import pytest

from mmgen import errors
from mmgen.tables import claims

ROWS = ('clip', 'patches', 'broken', 's')
GAP = dict(kind='greater', a='clip', b='patches', metric='vqa', d=0.03,
           text='A trained encoder helps.')
TABLE = dict(
    title='Encoders', metrics={'vqa': 'vqa/accuracy'}, seeds=(0, 1),
    claims={'gap': GAP},
    controls={'broken': dict(kind='worse', row='broken', than='patches')})


TUNED = dict(tuning_seeds=(100, 101), tuning=dict(
    grid=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3), metric='vqa'))


def changed(**fields):
  return claims.parse({**TABLE, **fields}, ROWS)


def with_claim(**fields):
  return changed(claims={'gap': {**GAP, **fields}})


def test_a_score_alone_is_a_column_in_percent():
  table = claims.parse(TABLE, ROWS)
  assert table.metrics['vqa'] == claims.Column('vqa/accuracy', 'percent',
                                               'higher', None, 1.0)
  assert table.claims['gap'].all_rows == ('clip', 'patches')
  assert table.controls['broken'].d == 0.03


@pytest.mark.parametrize('fields, message', [
    (dict(metricks={}), "no key 'metricks'. Did you mean 'metrics'"),
    (dict(account='sample'), "account is 'sample'. Did you mean 'samples'"),
    (dict(seeds=()), 'at least one seed'),
    (dict(seeds=(1, 1)), 'each once'),
    (dict(seeds=(1000,)), 'from 0 to 999'),
    (dict(tuning_seeds=(1,)), 'share a seed'),
    (dict(metrics={}), 'names no score'),
    (dict(metrics={'vqa': dict(score='x', unit='points')}), "'points'"),
    (dict(metrics={'vqa': dict(unit='raw')}), "lacks 'score'"),
    (dict(published={'clips': {}}), "Did you mean 'clip'"),
    (dict(published={'clip': {'vqaa': 1}}), "Did you mean 'vqa'"),
    (dict(controls={'c': dict(kind='worse', row='broken')}), '.than is None'),
    (dict(controls={'c': dict(kind='bb', row='broken')}), 'Allowed: aa'),
    (dict(claims={'c': 'clip > patches'}), 'expected a dict'),
])
def test_a_mistake_is_named(fields, message):
  with pytest.raises(errors.UserError, match=message.replace('.', r'\.')):
    changed(**fields)


@pytest.mark.parametrize('fields, message', [
    (dict(kind='bigger'), 'Allowed: greater'),
    (dict(b='patch'), r"\.b is 'patch'. Did you mean 'patches'"),
    (dict(b=None), r'\.b is None'),
    (dict(metric='VQA'), r"\.metric is 'VQA'"),
    (dict(d=0.0), 'smallest effect that matters'),
    (dict(thresh=1), "no key 'thresh'"),
    (dict(kind='interaction', a0='s'), r'\.b0 is None'),
    (dict(kind='trend', rows=('s',) * 3, x=(1, 2, 4)), 'at least 4 rows'),
    (dict(kind='trend', rows=('s',) * 4, x=(0, 1, 2, 4)), 'positive x'),
    (dict(kind='trend', rows=('s',) * 4, x=(1, 2, 4)), 'positive x'),
    (dict(kind='trend', rows=('s',) * 4, x=(1, 2, 4, 8), minus=('s',)),
     '1 in minus'),
    (dict(kind='trend', rows=('s',) * 4, x=(1, 2, 4, 8), direction='left'),
     'direction'),
])
def test_a_claim_that_cannot_be_evaluated_is_refused(fields, message):
  with pytest.raises(errors.UserError, match=message):
    with_claim(**fields)


GRID = ('clip', 's', 'clip', 's', 'clip')
MARGIN = dict(kind='margin', rows=GRID, minus=GRID[::-1], x=(1, 2, 4, 8, 16),
              d=1.0, metric='collapsed', text='Holds longer.')
COLLAPSED = dict(score='stability/collapsed', unit='raw', chance=1.0)


def with_margin(column=None, **fields):
  return changed(metrics={'collapsed': {**COLLAPSED, **(column or {})}},
                 controls={}, claims={'m': {**MARGIN, **fields}})


def test_a_margin_is_declared():
  claim = with_margin().claims['m']
  assert claim.roles == {'rows': GRID, 'minus': GRID[::-1]}
  assert claim.pairs[:2] == [('clip', 'clip'), ('s', 's')]


@pytest.mark.parametrize('fields, message', [
    (dict(x=(1, 2, 4, 8, 15)), r'\.x is .* each twice the one before'),
    (dict(rows=GRID[:4], minus=GRID[:4], x=(1, 2, 4, 8)), '5 or more'),
    (dict(minus=()), '5 rows and 0 in minus for 5'),
    (dict(rows=GRID[:4]), '4 rows and 5 in minus for 5'),
    (dict(d=0.0), 'such as 1 for a factor of 2'),
    (dict(column=dict(chance=None)), 'chance None; a margin needs'),
    (dict(column=dict(unit='percent')), "unit is 'percent'"),
    (dict(published=(1, 2)), 'published'),
])
def test_a_margin_that_cannot_be_evaluated_is_refused(fields, message):
  with pytest.raises(errors.UserError, match=message):
    with_margin(**fields)


def test_rows_that_a_claim_compares():
  four = dict(zip(('a', 'b', 'a0', 'b0'), ROWS))
  assert with_claim(kind='interaction', **four).claims['gap'].pairs == [
      ('clip', 'patches'), ('broken', 's')]
  assert changed().claims['gap'].pairs == [('clip', 'patches')]
  trend = dict(kind='trend', rows=ROWS, x=(1, 2, 4, 8))
  assert with_claim(**trend).claims['gap'].pairs == []


def test_a_tuning_is_declared():
  assert changed(**TUNED).tuning == claims.Tuning(
      (5e-4, 1e-3, 2e-3, 4e-3, 8e-3), 'vqa', 'validation', None)
  assert changed().tuning is None


@pytest.mark.parametrize('tuning, fields, message', [
    (dict(grids=()), {}, "no key 'grids'. Did you mean 'grid'"),
    (dict(metric='vqaa'), {}, "tuning.metric is 'vqaa'. Did you mean 'vqa'"),
    (dict(grid=(1e-3, 2e-3, 4e-3, 8e-3)), {}, '5 or more'),
    (dict(grid=(1, 2, 4, 8, 17)), {}, 'each twice the one before'),
    (dict(grid=(1e-3, 3e-3, 9e-3, 27e-3, 81e-3)), {}, 'each twice'),
    (dict(grid=(0, 0, 0, 0, 0)), {}, 'positive'),
    (dict(grid=2e-3), {}, 'tuning.grid is 0.002'),
    ({}, dict(tuning_seeds=()), 'tuning_seeds is (); give at least 2 seeds'),
    ({}, dict(tuning_seeds=(100,)), 'at least 2 seeds'),
    ({}, dict(tuning_seeds=(100, 100)), 'each once'),
    ({}, dict(tuning_seeds=(100, 1000)), 'later ones serve A/A controls'),
    ({}, dict(tuning_seeds=(100, 1)), 'share a seed'),
])
def test_a_tuning_that_is_not_fair_is_refused(tuning, fields, message):
  raw = {**TUNED, 'tuning': {**TUNED['tuning'], **tuning}, **fields}
  with pytest.raises(errors.UserError, match=re.escape(message)):
    changed(**raw)


def test_a_claim_may_name_a_row_that_is_not_run():
  table = changed(not_run={'hd': 'too large'},
                  claims={'gap': {**GAP, 'b': 'hd'}})
  assert table.claims['gap'].b == 'hd'
