"""Accuracies worked out by hand, for a model that recites by grey level."""

import pytest
import scripted

from mmgen import errors
from mmgen.evaluators import common
from mmgen.evaluators import vqa
from mmgen.models import sampling


@pytest.fixture
def evaluator(monkeypatch):
  ask = lambda answer: ('what', 'what is this?', answer)
  validation = [
      scripted.scene(1, ['fox'], questions=[ask('fox')]),
      scripted.scene(2, ['sun'], questions=[ask('sun')]),
      scripted.scene(3, ['cup'], questions=[ask('cup')]),
      scripted.scene(4, ['sun'], questions=[('count', 'how many?', '2')]),
      scripted.scene(5, ['cup'], questions=[('count', 'how many?', '3')]),
  ]
  train = [
      scripted.scene(6, ['sun'], questions=[ask('sun')]),
      scripted.scene(7, ['sun'], questions=[ask('sun')]),
      scripted.scene(8, ['fox'], questions=[ask('fox')]),
      scripted.scene(9, ['fox'], questions=[('count', 'how many?', '3')]),
  ]
  context = scripted.install(
      monkeypatch, validation=validation, train=train)
  context.model = scripted.Reader({
      10: 'Fox.', 20: 'cup', 30: 'cup', 40: '2', 50: '2', 128: 'sun'})
  monkeypatch.setattr(sampling.multimodal, 'init_cache', lambda *_: ())
  return vqa.Evaluator(vqa.Config('shapes', batch_size=2), context)


def test_accuracy_by_type_and_condition(evaluator):
  scores = dict(evaluator.run({}))
  # Right: 'Fox.' (parsed), cup; wrong: cup for sun. Counts: 2 right, 2 wrong.
  assert scores['what'] == pytest.approx(2 / 3)
  assert scores['count'] == pytest.approx(1 / 2)
  assert scores['accuracy'] == pytest.approx(3 / 5)
  # Grey: always 'sun', right for one 'what' of three.
  assert scores['what/grey'] == pytest.approx(1 / 3)
  assert scores['count/grey'] == 0
  assert scores['accuracy/grey'] == pytest.approx(1 / 5)
  # Blind: 'sun' is the commonest name asked for, '3' the commonest count.
  assert scores['what/blind'] == pytest.approx(1 / 3)
  assert scores['count/blind'] == pytest.approx(1 / 2)
  # Shuffled: the answer for another scene's picture.
  order = common.derangement(5)
  said = ['fox', 'cup', 'cup', '2', '2']
  truth = ['fox', 'sun', 'cup', '2', '3']
  expected = [said[j] == truth[i] for i, j in enumerate(order)]
  assert scores['accuracy/shuffled'] == pytest.approx(sum(expected) / 5)
  assert set(scores) == {
      f'{name}{sibling}' for name in ('accuracy', 'what', 'count')
      for sibling in ('', '/blind', '/grey', '/shuffled')}


def test_predictions_tell_each_example_in_order(evaluator):
  list(evaluator.run({}))
  assert len(evaluator.predictions) == 4 * 5
  first = evaluator.predictions[0]
  assert first == dict(
      id='scene 1', split='validation', condition='picture', type='what',
      question='what is this?', answer='fox', prediction='Fox.',
      correct=True)
  seen = [p['id'] for p in evaluator.predictions if p['condition'] == 'grey']
  assert seen == [f'scene {i}' for i in (1, 2, 3, 4, 5)]


def test_answers_may_be_as_long_as_the_longest_of_training(evaluator):
  # 'sun' and 'fox' have three letters, and <eos> follows.
  assert evaluator.max_tokens == 4


def test_fingerprints_follow_the_settings(evaluator):
  context = evaluator.context
  build = lambda **k: vqa.Evaluator(
      vqa.Config('shapes', **k), context).fingerprint
  assert build() == evaluator.fingerprint  # the batch size shifts nothing
  assert build(examples=4) != evaluator.fingerprint
  assert build(style='vicuna_v1') != evaluator.fingerprint
  with pytest.raises(errors.UserError, match="style 'latin'; there are: own"):
    build(style='latin')
  context.config.image.kernel = 'box'
  assert build() != evaluator.fingerprint


def test_questions_are_asked_in_the_style(evaluator, monkeypatch):
  asked = []
  monkeypatch.setattr(
      vqa.answering, 'answer',
      lambda context, params, documents, *_: asked.extend(documents) or [''] *
      len(documents))
  config = vqa.Config('shapes', style='vicuna_v1')
  list(vqa.Evaluator(config, evaluator.context).run({}))
  words = [span.data for span in asked[0].spans if span.kind == 'text']
  assert words[1:] == ['\nwhat is this? ASSISTANT:', '']
