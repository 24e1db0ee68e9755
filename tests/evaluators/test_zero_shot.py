"""Zero-shot classification with embeddings written down by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
import scripted

from mmgen.evaluators import contrastive
from mmgen.evaluators import retrieval
from mmgen.evaluators import zero_shot


class Towers:
  """Text: counts of the letters f, s, c. Picture: a table by grey level."""

  def __init__(self, levels):
    self.levels = np.zeros((256, 3), np.float32)
    for level, embedding in levels.items():
      self.levels[level] = embedding

  def apply(self, variables, *inputs, method):
    del variables
    return getattr(self, method)(*inputs), {}

  def encode_image(self, images_BYXC):
    return jnp.asarray(self.levels)[images_BYXC[:, 0, 0, 0]]

  def encode_text(self, tokens_BT, valid_BT):
    ids = jnp.asarray([scripted.FIRST + ord(c) for c in 'fsc'])
    found = (tokens_BT[:, :, None] == ids[None, None]) & valid_BT[:, :, None]
    counts = found.sum(1).astype(jnp.float32)
    return counts / jnp.maximum(
        jnp.linalg.norm(counts, axis=-1, keepdims=True), 1e-9)


@pytest.fixture
def context(monkeypatch):
  context = scripted.install(
      monkeypatch,
      validation=[
          scripted.scene(1, ['f'], 'f'), scripted.scene(2, ['s'], 's'),
          scripted.scene(3, ['f', 'c'], 'f'), scripted.scene(4, ['s'], 'c')],
      train=[scripted.scene(5, ['s'], 's'), scripted.scene(6, ['s'], 'c'),
             scripted.scene(7, ['f'], 'c')])
  context.model = Towers({
      10: [1, 0.1, 0], 20: [0, 1, 0.1], 30: [0.1, 0, 1], 40: [1, 0, 0.9],
      128: [0, 0.5, 0.6]})
  return context


def test_embeddings_are_averaged_and_normalised():
  text_KME = np.asarray([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])
  np.testing.assert_allclose(
      zero_shot.ensemble(text_KME), [[0.5 ** 0.5] * 2, [0, 1]])


def test_accuracy(context):
  config = zero_shot.Config('shapes', batch_size=3, templates=('{}', 'a {}'))
  evaluator = zero_shot.Evaluator(config, context)
  assert evaluator.classes == ['c', 'f', 's']
  scores = dict(evaluator.run({}))
  # Taken: f, s, c (one of two objects), f where s is true.
  assert scores['accuracy'] == 3 / 4
  assert scores['accuracy/grey'] == 1 / 4   # always 'c'
  assert scores['accuracy/blind'] == 2 / 4  # always 's'
  assert [p['prediction'] for p in evaluator.predictions[:4]] == [*'fscf']
  assert 0 <= scores['accuracy/shuffled'] <= 1 and len(scores) == 4


def test_texts_and_pictures_keep_their_order_over_batches(context):
  z_NE = contrastive.encode_texts(context, {}, list('sfcfs'), batch_size=2)
  np.testing.assert_array_equal(
      z_NE, np.eye(3)[[1, 0, 2, 0, 1]])


def test_retrieval_end_to_end(context):
  evaluator = retrieval.Evaluator(
      retrieval.Config('shapes', batch_size=3), context)
  scores = dict(evaluator.run({}))
  # Captions f s f c. Nearest captions: f, s, c (wrong), f (wrong).
  assert scores['image_to_text@1'] == 2 / 4
  # Nearest pictures: of f the first (right); of s the second; of c the third,
  # whose caption is f (wrong).
  assert scores['text_to_image@1'] == 3 / 4
  assert scores['image_to_text@5'] == scores['text_to_image@10'] == 1
  # Grey: every picture is nearest to 'c'.
  assert scores['image_to_text@1/grey'] == 1 / 4
  # Grey pictures all tie: the first one's caption, f, is right twice.
  assert scores['text_to_image@1/grey'] == 2 / 4
  # Blind: 'c' is the commonest training caption; f, s, f, c by chance.
  assert scores['image_to_text@1/blind'] == 1 / 4
  assert scores['text_to_image@1/blind'] == pytest.approx(
      (0.5 + 0.25 + 0.5 + 0.25) / 4)
  assert len(scores) == 2 * 3 * 4
  assert len(evaluator.predictions) == 4 * (2 * 3 + 1)
