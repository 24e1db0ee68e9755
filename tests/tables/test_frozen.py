"""What was declared before the first results, and what is said of the rest."""

import dataclasses
import json

import pytest

from mmgen.tables import claims
from mmgen.tables import frozen

ROWS = ('clip', 'patches', 'broken', 's')
RUNS = {row: f'key of {row}' for row in ROWS}  # what each row trains
GAP = dict(kind='greater', a='clip', b='patches', metric='vqa', d=0.03,
           text='A trained encoder helps.')
TABLE = dict(
    title='Encoders', metrics={'vqa': 'vqa/accuracy'}, seeds=(0, 1),
    claims={'gap': GAP},
    controls={'broken': dict(kind='worse', row='broken', than='patches'),
              'aa': dict(kind='aa', row='patches')})


def changed(**fields):
  return claims.parse({**TABLE, **fields}, ROWS)


def declared(table=None, runs=None, seen=()):
  return frozen.declaration(table or changed(), runs or RUNS, seen)


def since(table, before=None, runs=None):
  return frozen.departures(table, before or declared(), declared(table, runs))


@pytest.mark.parametrize('other', [
    changed(claims={'gap': {**GAP, 'd': 0.02}}),
    changed(claims={'gap': {**GAP, 'b': 'broken'}}),
    changed(seeds=(0, 1, 2)),
    changed(budget='more'),
    changed(account='flops'),
    changed(exclusions=('all that failed',)),
    changed(metrics={'vqa': dict(score='vqa/accuracy', ceiling=0.5)}),
])
def test_what_decides_a_verdict_makes_its_claim_exploratory(other):
  assert since(other).claims == {
      'gap': ('exploratory: it or its rows changed after the first run',)}


@pytest.mark.parametrize('aa', [
    dict(kind='aa', row='clip'), dict(kind='aa', row='patches', d=0.5)])
def test_a_control_that_changed_is_named(aa):
  found = since(changed(controls={**TABLE['controls'], 'aa': aa}))
  assert found.controls == {
      'broken': (), 'aa': ('it or its rows changed after the first run',)}
  assert found.claims == {'gap': ()} and found.warnings == ()


def test_what_does_not_decide_it_does_not():
  table = dataclasses.replace(changed(), title='Other', published_source='blog')
  assert since(table) == since(changed())
  # A rate decides where it stands, in the runs of a row.
  tuned = changed(tuning_seeds=(100, 101), tuning=dict(
      grid=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3), metric='vqa'))
  assert since(tuned) == since(changed())


@pytest.mark.parametrize('row', ROWS)
def test_what_a_row_trains_counts_for_its_claims_and_controls(row):
  found = since(changed(), runs=RUNS | {row: 'other'})
  assert bool(found.claims['gap']) == (row in ('clip', 'patches'))
  assert bool(found.controls['broken']) == (row in ('broken', 'patches'))
  assert bool(found.controls['aa']) == (row == 'patches')


def test_what_was_added_or_dropped_is_named():
  found = since(changed(
      claims={'new': GAP}, controls={'late': dict(kind='aa', row='clip')}))
  assert found.claims == {
      'new': ('exploratory: it was declared after the first run',)}
  assert found.controls == {'late': ('it was declared after the first run',)}
  assert found.warnings == (
      "claim 'gap', declared before the first run, is gone",
      "control 'broken', declared before the first run, is gone",
      "control 'aa', declared before the first run, is gone")


@pytest.mark.parametrize('row, seed, rests', [
    ('clip', 0, True), ('patches', 1, True), ('s', 0, False),
    ('clip', 7, False),  # no seed of the table
])
def test_a_claim_that_rests_on_earlier_results_is_exploratory(row, seed, rests):
  found = since(changed(), declared(seen=[(row, seed)]))
  assert found.claims['gap'] == (
      'exploratory: results that it rests on were there before it was '
      f'declared: {row} seed {seed}',) * rests


def test_it_is_stored_and_read_again(tmp_path):
  path = tmp_path / 'new' / 'table.frozen.json'
  assert frozen.read(path) is None
  frozen.write(path, declared(seen=[('clip', 0)]))
  assert frozen.read(path) == declared(seen=[('clip', 0)])


def test_an_older_file_holds_hashes_of_claims_alone(tmp_path):
  path = tmp_path / 'table.frozen.json'
  path.write_text(json.dumps({**declared().claims, 'lost': 'abc'}))
  found = since(changed(), frozen.read(path))
  assert found.claims == {'gap': ()}
  assert found.controls == {'broken': (), 'aa': ()}
  assert found.warnings == (
      "claim 'lost', declared before the first run, is gone",)
