"""Exact match and name recall worked out by hand."""

import pytest
import scripted

from mmgen import errors
from mmgen.data import scenes
from mmgen.data.corpora import shapes
from mmgen.evaluators import caption
from mmgen.evaluators import common
from mmgen.models import sampling


@pytest.mark.parametrize('text, names, share', [
    ('a Fox on blue.', ['fox'], 1),
    ('a foxglove on blue', ['fox'], 0),
    ('a firefox on blue', ['fox'], 0),
    ('red-fox', ['fox'], 1),
    ('a fox', ['fox', 'sun'], 0.5),
    ('the hot dog', ['hot dog'], 1),
    ('', ['fox'], 0),
    ('a c.p', ['c.p'], 1),
    ('a cup', ['c.p'], 0),
    ('Two FOXES on blue.', ['fox'], 1),
    ('two foxesque suns', ['fox', 'sun'], 0.5),
    ('three hot dogs', ['hot dog'], 1),
    ('two dogs', ['hot dog'], 0),
    ('two mice', ['mouse'], 1),
    ('two cherries and grapes', ['cherry', 'grapes'], 1),
])
def test_names_are_found_as_whole_words(text, names, share):
  assert caption.names_said(text, names) == share


@pytest.fixture(scope='module')
def specified():
  """300 scenes of every split, not drawn."""
  plan = scenes.plan(
      shapes.picture_set('tiny'), shapes.SIZES['tiny']['scenes'])
  return [scenes.specify(plan, split, 0, i)
          for split in scenes.SPLITS for i in range(300)]


@pytest.mark.parametrize('kind', scenes.KINDS)
def test_the_true_caption_names_every_object(specified, kind):
  found = [scene for scene in specified if scene.kind == kind]
  assert len(found) > 20
  for scene in found:
    names = sorted({thing.concept for thing in scene.objects})
    assert caption.names_said(scene.captions['fused'], names) == 1, scene


@pytest.fixture
def context(monkeypatch):
  context = scripted.install(
      monkeypatch,
      validation=[
          scripted.scene(1, ['fox'], 'a fox on blue'),
          scripted.scene(2, ['sun', 'cup'], 'a sun and a cup'),
          scripted.scene(3, ['cup'], 'a cup on red')],
      train=[
          scripted.scene(4, ['cup', 'sun', 'sun'], 'a sun and a cup'),
          scripted.scene(5, ['cup'], 'a cup on red'),
          scripted.scene(6, ['cup'], 'a red cup'),
          scripted.scene(7, ['fox'], 'a fox on blue'),
          scripted.scene(8, ['fox'], 'a fox on blue')])
  context.model = scripted.Reader({
      10: 'A fox on blue.', 20: 'a cup on red', 30: 'a fox on red',
      128: 'a cup on red'})
  monkeypatch.setattr(sampling.multimodal, 'init_cache', lambda *_: ())
  return context


def test_exact_match_and_name_recall(context):
  evaluator = caption.Evaluator(
      caption.Config('shapes', batch_size=2), context)
  scores = dict(evaluator.run({}))
  assert scores['exact'] == pytest.approx(1 / 3)
  # fox: 1; of sun and cup one: 0.5; cup: 0.
  assert scores['name_recall'] == pytest.approx(1.5 / 3)
  assert scores['exact/grey'] == pytest.approx(1 / 3)
  assert scores['name_recall/grey'] == pytest.approx((0 + 0.5 + 1) / 3)
  # The commonest caption, of a fox, is right once; the commonest name is cup.
  assert scores['exact/blind'] == pytest.approx(1 / 3)
  assert scores['name_recall/blind'] == pytest.approx((0 + 0.5 + 1) / 3)
  order = common.derangement(3).tolist()
  assert order in ([1, 2, 0], [2, 0, 1])
  # Said: fox, cup, fox by picture. True names: fox; sun, cup; cup.
  said = ['fox', 'cup', 'fox']
  recall = (said[order[0]] == 'fox') + 0.5 * (said[order[1]] == 'cup') + (
      said[order[2]] == 'cup')
  assert scores['name_recall/shuffled'] == pytest.approx(recall / 3)
  assert scores['exact/shuffled'] == pytest.approx(
      (order[2] == 1) / 3)
  assert len(scores) == 8


def test_the_rule_of_names_is_in_the_fingerprint(context, monkeypatch):
  make = lambda: caption.Evaluator(caption.Config('shapes'), context)
  before = make().fingerprint
  assert make().fingerprint == before
  monkeypatch.setattr(caption, 'NAMES', 'another rule')
  assert make().fingerprint != before


def test_an_unknown_column_is_named(context):
  with pytest.raises(errors.UserError, match="column is 'fussed'; allowed"):
    caption.Evaluator(caption.Config('shapes', column='fussed'), context)
