"""Held-out loss worked out by hand, for a model of known probabilities."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import scripted

from mmgen import errors
from mmgen import evaluators
from mmgen.evaluators import loss


class Unigram:
  """Says 'a' with probability 1/2 under bright pictures, 1/4 under dark.

  All other tokens share the rest.
  """

  def apply(self, variables, batch):
    del variables
    bright_B = batch['images'][:, 0, 0, 0, 0] > 100
    vocab = scripted.Letters.vocab_size
    a = scripted.Letters().encode('a')[0]
    p_B = jnp.where(bright_B, 0.5, 0.25)
    p_BV = jnp.where(
        jnp.arange(vocab)[None] == a, p_B[:, None],
        (1 - p_B[:, None]) / (vocab - 1))
    B, T = batch['tokens'].shape
    logits_BTV = jnp.broadcast_to(jnp.log(p_BV)[:, None], (B, T, vocab))
    return logits_BTV, {}


@pytest.fixture
def context(monkeypatch):
  context = scripted.install(
      monkeypatch,
      validation=[scripted.scene(12, ['a'], 'aaa'),
                  scripted.scene(13, ['a'], 'a'),
                  scripted.scene(1, ['a'], 'aa')],
      train=[scripted.scene(5, ['a'], 'aab')])
  context.model = Unigram()
  return context


def test_loss_per_token(context):
  rest = scripted.Letters.vocab_size - 1
  bright = lambda n: n * math.log(2) + math.log(2 * rest)
  dark = lambda n: n * math.log(4) + math.log(4 / 3 * rest)
  evaluator = loss.Evaluator(loss.Config('shapes', batch_size=2), context)
  scores = dict(evaluator.run({}))
  # Every caption ends in a learnt <eos>: 4 + 2 + 3 tokens.
  assert scores['loss'] == pytest.approx(
      (bright(3) + bright(1) + dark(2)) / 9, rel=1e-5)
  assert scores['loss/grey'] == pytest.approx(
      (bright(3) + bright(1) + bright(2)) / 9, rel=1e-5)
  # One of the two bright scenes gets the dark picture.
  assert scores['loss/shuffled'] in (
      pytest.approx((dark(3) + bright(1) + bright(2)) / 9, rel=1e-5),
      pytest.approx((bright(3) + dark(1) + bright(2)) / 9, rel=1e-5))
  # Training tokens: a a b <eos>; with one added to each, a has 3 of V + 4.
  total = rest + 1 + 4
  assert scores['loss/blind'] == pytest.approx(
      (6 * math.log(total / 3) + 3 * math.log(total / 2)) / 9)
  assert [p['tokens'] for p in evaluator.predictions[:3]] == [4, 2, 3]
  assert evaluator.predictions[2]['loss'] == pytest.approx(
      dark(2) / 3, rel=1e-5)


def test_a_token_counts_as_much_as_its_weight(context):
  a = scripted.Letters().encode('a')[0]
  batch = dict(
      tokens=np.zeros((1, 3), np.int32), targets=np.int32([[a, a, 0]]),
      weights=np.float32([[1, 0.5, 0]]),
      images=np.full((1, 1, 4, 4, 3), 200, np.uint8))
  sum_B, weight_B = loss._losses(context.model, {}, batch)
  assert float(sum_B[0]) == pytest.approx(1.5 * math.log(2))
  assert float(weight_B[0]) == 1.5


def test_build_names_what_is_wrong(context):
  build = lambda **entry: evaluators.build({'held_out': entry}, context)
  assert set(build(name='loss', corpus='shapes')) == {'held_out'}
  with pytest.raises(errors.UserError, match=r"name is 'los'; allowed: loss"):
    build(name='los', corpus='shapes')
  with pytest.raises(errors.UserError, match='held_out.corpus is missing'):
    build(name='loss')
  with pytest.raises(errors.UserError, match="no field 'colum'. Did you mean"):
    build(name='loss', corpus='shapes', colum='raw')
  for wrong, message in (
      (dict(batch_size=0), 'held_out.batch_size is 0; allowed: 1 or more'),
      (dict(batch_size='abc'), "batch_size is 'abc'; expected int"),
      (dict(batch_size=None), 'batch_size is None; expected int'),
      (dict(examples=0), 'held_out.examples is 0; allowed: 1 or more'),
      (dict(examples=1), 'need at least 2 scenes, found 1'),
      (dict(language='fr', column='names'), "language is 'fr'; shapes has"),
      (dict(examples=True), r'examples is True; expected int \| None'),
      (dict(split=3), 'held_out.split is 3; expected str'),
      (dict(image_place='random'), "'random'; allowed: 'before', 'after'")):
    with pytest.raises(errors.UserError, match=message):
      build(name='loss', corpus='shapes', **wrong)
  assert build(name='loss', corpus='shapes', examples=None)
  assert build(name='loss', corpus='shapes', examples=1, view='text')
  for name in ('vqa', 'caption'):
    with pytest.raises(errors.UserError, match='need at least 2 scenes'):
      build(name=name, corpus='shapes', examples=1)
  with pytest.raises(errors.UserError, match="models of the kind 'clip'"):
    build(name='retrieval', corpus='shapes')
  context.image_layout = None
  with pytest.raises(errors.UserError, match='reads text alone'):
    build(name='vqa', corpus='shapes')
