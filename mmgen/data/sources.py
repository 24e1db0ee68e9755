"""A source: a shuffled, endless stream of documents, cut into groups.

Everything is random access over grain's `MapDataset`:

  record i of the split -> place in the stream -> document -> group of n

Place p of the stream belongs to epoch p // N. grain orders each epoch by a
permutation keyed by (seed, epoch); whatever else is drawn for a document is
keyed by (seed, epoch, id of the record). Nothing runs along, so any group can
be computed alone. The seed of a source comes from the run's seed and the
source's name: other sources of the mixture cannot disturb it.
"""

from collections.abc import Callable
from collections.abc import Sequence
import hashlib
from typing import Any

import grain
import numpy as np

from mmgen import errors
from mmgen.data import corpora
from mmgen.data import document as document_lib
from mmgen.data import mixture
from mmgen.data import prompts


def _hash(*parts: Any, size: int) -> int:
  text = '/'.join(map(str, parts))
  digest = hashlib.blake2b(text.encode(), digest_size=size).digest()
  return int.from_bytes(digest, 'little')


def _generator(*key: Any) -> np.random.Generator:
  return np.random.default_rng(_hash(*key, size=8))


def seed_of(seed: int, name: str) -> int:
  """The seed of a source, below 2**32.

  Hashing matters: grain orders epoch e by seed + e, so that neighbouring run
  seeds would repeat each other's orders one epoch late.
  """
  return _hash('source', seed, name, size=4)


def document(
    records: Sequence[dict[str, Any]],
    source: mixture.Source,
    seed: int,
    epoch: int,
    index: int,
) -> document_lib.Document:
  """One document of one epoch.

  Args:
    records: The split.
    source: What to make of a record.
    seed: From `seed_of`.
    epoch: Number of the pass over the split.
    index: Index of the record in the split.

  Returns:
    The document, or an empty one in its place if the record cannot be read.
  """
  try:
    record = records[index]
    key = seed, epoch, record['id']
    if source.shuffle_pairs:
      # Any picture but its own; a key of its own leaves the text as it was.
      distance = _generator('picture', *key).integers(1, len(records))
      other = records[int(index + distance) % len(records)]
      record = dict(record, image=other['image'])
    return prompts.VIEWS[source.view](record, source, _generator('view', *key))
  except corpora.BadRecord as error:
    return document_lib.bad(error.id, error.why)


def groups(
    records: Sequence[dict[str, Any]],
    source: mixture.Source,
    seed: int,
    size: int,
    pack: Callable[[list[document_lib.Document]], Any],
) -> grain.MapDataset:
  """The packing groups of a source, without end.

  Args:
    records: The split; random access, not empty.
    source: What to make of a record.
    seed: From `seed_of`.
    size: Documents a group.
    pack: Makes a group of its documents.

  Raises:
    UserError: the split is too small to be a source.
  """
  found = len(records)
  if found < 1 + source.shuffle_pairs:
    raise errors.UserError(
        f'split {source.split!r} of corpus {source.corpus!r} has {found} '
        f'records; at least {1 + source.shuffle_pairs} needed')

  def read(place, index):
    return document(records, source, seed, place // found, index)

  # Before the shuffle, a place is record + epoch * N: both are known to `read`.
  stream = grain.MapDataset.range(found).seed(seed).map_with_index(read)
  return stream.shuffle().repeat(None).batch(size, batch_fn=pack)
