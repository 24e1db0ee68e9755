"""Conditions, counts and fingerprints that all evaluators share."""

import numpy as np
import pytest

from mmgen import errors
from mmgen.evaluators import answering
from mmgen.evaluators import common


def record(name, grey, questions=(), concepts=('fox',), caption='a fox'):
  return {
      'id': name,
      'image': np.full((2, 2, 3), grey, np.uint8),
      'questions': [
          dict(zip(('type', 'question', 'answer'), q)) for q in questions],
      'objects': [{'concept': c} for c in concepts],
      'names': {'en': list(concepts)},
      'captions': dict.fromkeys(('raw', 'synthetic', 'fused'), caption),
  }


def test_answers_are_compared_without_case_period_and_space():
  assert common.parse_answer(' Red Fox. ') == 'red fox'
  assert common.parse_answer('red. fox..') == 'red. fox.'
  assert common.parse_answer('STRASSE') == common.parse_answer('straße')


@pytest.mark.parametrize('count', [2, 3, 50])
def test_a_derangement_moves_everything_and_is_fixed(count):
  order = common.derangement(count)
  assert sorted(order.tolist()) == list(range(count))
  assert (order != np.arange(count)).all()
  np.testing.assert_array_equal(order, common.derangement(count))
  if count == 50:
    assert (order != common.derangement(count, seed=1)).any()


def test_one_scene_cannot_be_shuffled():
  with pytest.raises(errors.UserError, match='at least 2 scenes, found 1'):
    common.derangement(1)


def test_shuffled_examples_get_the_picture_of_another_scene():
  records = [record(*r) for r in (
      ('a', 10), ('b', 20), ('a', 10), ('c', 30), ('b', 20))]
  values = lambda condition: [
      int(r['image'][0, 0, 0]) for r in common.under(condition, records)]
  assert values('picture') == [10, 20, 10, 30, 20]
  assert values('grey') == [128] * 5
  shuffled = values('shuffled')
  assert all(a != b for a, b in zip(shuffled, values('picture')))
  assert shuffled[0] == shuffled[2] and shuffled[1] == shuffled[4]
  assert {shuffled[0], shuffled[1], shuffled[3]} == {10, 20, 30}
  assert [r['id'] for r in common.under('shuffled', records)] == [*'abacb']


def test_batches_hold_every_example_once_and_mark_what_is_added():
  found = list(answering.chunks(5, 2))
  assert [i.tolist() for i, _ in found] == [[0, 1], [2, 3], [4, 0]]
  assert [v.tolist() for _, v in found] == [[True] * 2, [True] * 2,
                                            [True, False]]
  assert [i.tolist() for i, _ in answering.chunks(2, 64)] == [[0, 1]]


def test_questions_are_spread_over_scenes_and_none_is_asked_twice():
  kinds = ('what', 'colour', 'count')
  records = [
      record(f'scene {i}', 0, [(k, f'{k}{i}', 'x') for k in kinds])
      for i in range(30)
  ] + [record('mute', 0), record('one', 0, [('what', 'what?', 'x')])]
  first = common.questions(records, 31)
  assert len({r['id'] for r, _ in first}) == 31
  assert {q['type'] for _, q in first} == set(kinds)
  everything = [(r['id'], q['question']) for r, q in common.questions(records)]
  assert len(everything) == len(set(everything)) == 91


@pytest.fixture
def training(monkeypatch):
  """A training split of five scenes; yields what was asked for."""
  splits = {'train': [
      record('0', 0, [('what', 'what?', 'fox'), ('exists', 'sun?', 'no'),
                      ('exists', 'star?', 'no'), ('exists', 'star?', 'yes')],
             ['fox', 'sun', 'fox'], 'a fox'),
      record('1', 0, [('what', 'what?', 'sun'), ('exists', 'sun?', 'no')],
             ['sun'], 'a sun'),
      record('2', 0, [('what', 'what?', 'sun'), ('exists', 'cup?', 'yes')],
             ['sun'], 'a sun'),
      record('3', 0, [('what', 'what?', 'fox'), ('exists', 'cup?', 'yes')],
             ['cup'], 'a fox'),
      record('4', 0, [('exists', 'fox?', 'yes')], ['cup'], 'a cup'),
  ], 'empty': []}
  monkeypatch.setattr(
      common.corpora, 'open_split', lambda _, corpus, split: splits[split])
  common.training_scenes.cache_clear()
  common.training_counts.cache_clear()
  yield
  common.training_scenes.cache_clear()
  common.training_counts.cache_clear()


def test_blind_guesses_come_from_the_training_split(training):
  counts = common.training_counts('data', 'shapes')
  ask = lambda kind, question: common.blind_answer(
      counts, {'type': kind, 'question': question})
  assert ask('what', 'what?') == 'fox'     # 2 : 2, the alphabet decides
  assert ask('exists', 'sun?') == 'no'     # 2 of 2 for this question
  assert ask('exists', 'moon?') == 'yes'   # never asked: 4 of 7 of its type
  assert ask('exists', 'star?') == 'yes'   # 1 : 1, its type decides
  assert ask('count', 'how many?') == ''   # nothing known
  assert counts['names'] == {'fox': 1, 'sun': 3, 'cup': 2}
  assert counts['captions']['names']['fox, sun, fox'] == 1
  assert counts['captions']['raw'] == {'a fox': 2, 'a sun': 2, 'a cup': 1}


def test_an_empty_split_is_an_error(training):
  with pytest.raises(errors.UserError, match="split 'empty' of 'shapes'"):
    common.scenes('data', 'shapes', 'empty')


def test_tally_names_the_conditions():
  predictions = [
      {'condition': c, 'correct': v} for c, v in
      [('picture', True), ('picture', False), ('grey', False),
       ('blind', True)]]
  assert dict(common.tally('what', predictions)) == {
      'what': 0.5, 'what/grey': 0.0, 'what/blind': 1.0}


def test_a_fingerprint_changes_with_any_setting():
  settings = dict(split='validation', size=(32, 32), kernel='bicubic')
  print_ = common.fingerprint(**settings)
  assert len(print_) == 12 and print_ == common.fingerprint(**settings)
  for key, value in dict(split='styles', size=(32, 33), kernel='box').items():
    assert common.fingerprint(**settings | {key: value}) != print_
