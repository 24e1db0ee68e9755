"""A tokenizer and records to test with, that need no files."""

import numpy as np

from mmgen.data import corpora
from mmgen.data import text

FIRST = len(text.RESERVED)


class Letters:
  """One id a letter: 'abc' is 16 17 18."""

  reserved = text.RESERVED
  vocab_size = FIRST + 128

  def id(self, name):
    return text.RESERVED.index(name)

  def encode(self, words):
    return [FIRST + (ord(c) - ord('a')) % 128 for c in words]

  def pieces(self, ids):
    return [text.RESERVED[i] if i < FIRST else chr(ord('a') + i - FIRST)
            for i in ids]


class Records:
  """N records; picture i is filled with the value i, captions differ."""

  def __init__(self, count, prefix='r', bad=()):
    self.count, self.prefix, self.bad = count, prefix, bad
    self.reads = []

  def __len__(self):
    return self.count

  def __getitem__(self, i):
    i = int(i)
    self.reads.append(i)
    if i in self.bad:
      raise corpora.BadRecord(f'{self.prefix}{i}', 'cannot be decoded')
    name = chr(ord('a') + i % 26)
    return dict(
        id=f'{self.prefix}{i}',
        image=np.full((8, 12, 3), i, np.uint8),
        captions=dict(raw=name * 2, synthetic=name * 3,
                      fused=name * (4 + i % 5)),
        names={'en': [name], 'ja': [name.upper(), 'x']},
        questions=[dict(question='q' * (j + 1), answer=name * (j + 1),
                        type='what') for j in range(3)],
    )


def opener(**splits):
  """An `open_split` over {corpus: records}; the split is not looked at."""
  return lambda data_dir, corpus, split: splits[corpus]
