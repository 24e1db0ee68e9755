"""Scenes, a tokenizer and models whose every answer is known beforehand."""

import types

import jax.numpy as jnp
import numpy as np

from mmgen.data import layout
from mmgen.data import text
from mmgen.evaluators import common

FIRST = len(text.RESERVED)
STEP = 10  # grey level between the pictures of neighbouring scenes


class Letters:
  """One id a character."""

  reserved = text.RESERVED
  vocab_size = FIRST + 128

  def id(self, name):
    return text.RESERVED.index(name)

  def encode(self, words):
    return [FIRST + ord(c) for c in words]

  def decode(self, ids):
    return ''.join(chr(i - FIRST) for i in ids if i >= FIRST)


def scene(level, concepts, caption='', questions=()):
  """A record whose picture is filled with grey level `STEP * level`."""
  columns = ('raw', 'synthetic', 'fused')
  return dict(
      id=f'scene {level}',
      image=np.full((6, 6, 3), STEP * level, np.uint8),
      objects=[dict(concept=c) for c in concepts],
      names={'en': list(concepts)},
      captions=dict.fromkeys(columns, caption),
      questions=[
          dict(type=t, question=q, answer=a) for t, q, a in questions],
  )


def install(monkeypatch, kind='multimodal', **splits):
  """Makes the splits the only ones there are, and gives their context."""
  monkeypatch.setattr(
      common.corpora, 'open_split', lambda _, corpus, split: splits[split])
  names = {o['concept'] for s in splits.values() for r in s
           for o in r['objects']}
  monkeypatch.setattr(
      common.corpora, 'manifest',
      lambda *_: dict(concepts=sorted(names),
                      names={name: {'en': name} for name in names}))
  common.training_scenes.cache_clear()
  common.training_counts.cache_clear()
  return types.SimpleNamespace(
      config=types.SimpleNamespace(
          image=types.SimpleNamespace(
              size=(4, 4), fit='square', kernel='bicubic'),
          layout=types.SimpleNamespace(length=64),
          model=types.SimpleNamespace(name=kind)),
      tokenizer=Letters(), image_layout=layout.ImageLayout(2, 2),
      data_dir='none', model=None)


class Reader:
  """Looks at the picture's grey level and recites the answer for it."""

  config = None

  def __init__(self, answers):
    self.vocab = Letters.vocab_size
    ids = {level: [*Letters().encode(words), text.RESERVED.index('<eos>')]
           for level, words in answers.items()}
    self.script = np.zeros((256, max(map(len, ids.values()))), np.int32)
    for level, row in ids.items():
      self.script[level, :len(row)] = row

  def apply(self, variables, *inputs, method):
    del variables
    return getattr(self, method)(*inputs)

  def prefill(self, batch, lengths_B, cache):
    # The prompt must be there, and the answer must not.
    del lengths_B
    level_B = batch['images'][:, 0, 0, 0, 0].astype(jnp.int32)
    return self._say(level_B, 0), dict(level=level_B, step=0 * level_B[0])

  def extend(self, tokens_B1, positions_B, cache):
    step = cache['step'] + 1
    return self._say(cache['level'], step), dict(cache, step=step)

  def _say(self, level_B, step):
    token_B = jnp.asarray(self.script)[level_B, step]
    return jnp.where(
        jnp.arange(self.vocab)[None] == token_B[:, None], 1.0, 0.0)
