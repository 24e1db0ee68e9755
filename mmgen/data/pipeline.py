"""From a config to batches: `batch(step)` is a pure function of the step.

  config.mix -> sources -> groups of documents -> layout -> {source: arrays}

A batch is always a dict from the name of a source to its arrays, even for a
single source: sources keep their own pictures, and text alone has none. The
arrays of a source hold `quota` groups of R rows one after another, or this
process's share of them. There is no state to save but the number of the step.
"""

import collections
from collections.abc import Iterator
import dataclasses
import sys
from typing import Any

import grain
import numpy as np

from mmgen import errors
from mmgen.data import corpora
from mmgen.data import document as document_lib
from mmgen.data import image as image_lib
from mmgen.data import layout as layout_lib
from mmgen.data import mixture
from mmgen.data import prompts
from mmgen.data import sources as sources_lib
from mmgen.data import text

# Few threads: on small machines they take cores from the training step.
THREADS = 2
# Batches that are kept ready.
BUFFER = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
  """One packing group.

  Attributes:
    documents: All n documents, empty ones for bad records.
    rows: Per row of the arrays, the indices of its documents in order.
    arrays: What the layout made of them.
    stats: What fitted and what did not.
  """

  documents: list[document_lib.Document]
  rows: list[list[int]]
  arrays: dict[str, np.ndarray]
  stats: dict[str, float]


class Pipeline:
  """Batches of a run.

  Attributes:
    sources: dict from name to `mixture.Source`.
    tokenizer: Tokenizer of all sources.
    image_layout: How pictures become slots.
  """

  def __init__(
      self,
      config,
      data_dir,
      image_layout: layout_lib.ImageLayout | None,
      tokenizer: Any,
      process_index: int = 0,
      process_count: int = 1,
      open_split=corpora.open_split,
  ):
    """Opens the splits of all sources.

    Args:
      config: Of a run; reads `seed`, `mix`, `layout` and `image`.
      data_dir: Folder of prepared corpora.
      image_layout: How the model turns pictures into slots; None if it reads
        text alone.
      tokenizer: Has `encode(text)` and `id(reserved name)`.
      process_index: Which of the processes this is.
      process_count: Number of processes that share each batch.
      open_split: `(data_dir, corpus, split)` -> random-access records.

    Raises:
      UserError: a wrong field, or a split that is empty.
    """
    if config.layout.name not in LAYOUTS:
      raise errors.UserError(
          f'layout.name is {config.layout.name!r}; allowed: '
          f'{", ".join(LAYOUTS)}')
    for field in ('length', 'rows', 'documents'):
      if config.layout[field] < 1:
        raise errors.UserError(
            f'layout.{field} is {config.layout[field]}; at least 1 needed')
    self._fit = _fit(config, image_layout)
    if self._fit:
      image_lib.check(**self._fit)
    self._config = config.layout
    self._process = process_index, process_count
    self.image_layout = image_layout
    self.tokenizer = tokenizer
    self.sources = mixture.read(config.mix, process_count)
    self._groups = {}
    for name, source in self.sources.items():
      self._check_layout(name, source)
      records = open_split(data_dir, source.corpus, source.split)
      self._groups[name] = sources_lib.groups(
          records, source, sources_lib.seed_of(config.seed, name),
          config.layout.documents, _packer(
              config, source.view, tokenizer, image_layout))

  def _check_layout(self, name, source):
    pairs = self._config.name == 'pair'
    if pairs != (source.view == 'pair'):
      raise errors.UserError(
          f'mix.{name}.view is {source.view!r} and layout.name is '
          f"{self._config.name!r}; 'pair' goes with 'pair' alone")
    if source.view in prompts.WITHOUT_PICTURES:
      return
    if not self._fit:
      raise errors.UserError(
          f"mix.{name}.view is {source.view!r}; a model without vision reads "
          f"{', '.join(prompts.WITHOUT_PICTURES)} alone")
    if not pairs and self._config.images < 1:
      raise errors.UserError(
          f'layout.images is {self._config.images}, mix.{name} has pictures: '
          'at least 1 needed')

  def groups(self, step: int) -> dict[str, list[Group]]:
    """This process's groups of a step, with all that is known of them."""
    return {
        name: [self._groups[name][g] for g in mixture.own_groups(
            step, source.quota, *self._process)]
        for name, source in self.sources.items()
    }

  def batch(self, step: int) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of a step: {source: {name: array}}."""
    return {
        source: {key: np.concatenate([g.arrays[key] for g in groups])
                 for key in groups[0].arrays}
        for source, groups in self.groups(step).items()
    }

  def records(self, step: int) -> dict[str, list[str]]:
    """Ids of the records in a step, row by row in packing order."""
    return {
        source: [group.documents[i].id
                 for group in groups for row in group.rows for i in row]
        for source, groups in self.groups(step).items()
    }

  def stats(self, step: int) -> dict[str, dict[str, float]]:
    """Fill, documents, tokens, drops and bad records of a step, by source."""
    return {source: total_stats([g.stats for g in groups])
            for source, groups in self.groups(step).items()}

  def iterate(
      self, start: int = 0
  ) -> Iterator[dict[str, dict[str, np.ndarray]]]:
    """Batches from step `start` on, without end, prepared in threads."""
    steps = grain.MapDataset.range(start, sys.maxsize).map(self.batch)
    return iter(steps.to_iter_dataset(
        grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=BUFFER)))


def _fit(config, image_layout):
  """How pictures are fitted, as arguments of `image.fit_document`."""
  return image_layout and dict(
      size=tuple(config.image.size), fit=config.image.fit,
      kernel=config.image.kernel, grid=image_layout.grid)


def _packer(config, view, tokenizer, image_layout):
  """The function that makes a `Group` of the documents of a source."""
  layout, fit = LAYOUTS[config.layout.name], _fit(config, image_layout)
  if view in prompts.WITHOUT_PICTURES:
    images, size = 0, None
  else:
    images, size = config.layout.images, fit['size']

  def pack(documents):
    if size:
      documents = [image_lib.fit_document(d, **fit) for d in documents]
    return Group(documents, *layout(
        documents, tokenizer, image_layout, config.layout, images, size))

  return pack


def empty_batch(
    config, image_layout: layout_lib.ImageLayout | None
) -> dict[str, dict[str, np.ndarray]]:
  """A batch of padding alone, from a config and without any corpus.

  Its arrays have the shapes of `Pipeline.batch` and take no memory.
  """
  found = {}
  for name, source in config.mix.items():
    pack = _packer(config, source.view, None, image_layout)
    group = pack([document_lib.Document(())] * config.layout.documents)
    found[name] = {
        key: np.broadcast_to(x[:1], (source.quota * len(x), *x.shape[1:]))
        for key, x in group.arrays.items()}
  return found


def open_pipeline(
    config,
    data_dir,
    image_layout: layout_lib.ImageLayout | None,
    process_index: int = 0,
    process_count: int = 1,
) -> Pipeline:
  """The pipeline of a run, with the tokenizer of its corpora.

  Args:
    config: Of a run.
    data_dir: Folder of prepared corpora.
    image_layout: How the model turns pictures into slots; None for text alone.
    process_index: Which of the processes this is.
    process_count: Number of processes that share each batch.

  Raises:
    UserError: a corpus is not prepared or has no names in the language asked
      for, or a field is wrong.
  """
  names = [entry.corpus for entry in config.mix.values()]
  for name, entry in config.mix.items():
    corpora.check_language(
        f'mix.{name}', data_dir, entry.corpus, entry.get('language', 'en'))
  return Pipeline(config, data_dir, image_layout,
                  shared_tokenizer(data_dir, names), process_index,
                  process_count)


def shared_tokenizer(data_dir, names: list[str]) -> text.Tokenizer:
  """The tokenizer that all of the named corpora share.

  Raises:
    UserError: a corpus is not prepared, or tokenizers differ.
  """
  found = {name: corpora.load_tokenizer(data_dir, name) for name in names}
  if len({tokenizer.bytes for tokenizer in found.values()}) > 1:
    raise errors.UserError(
        f'mix reads the corpora {", ".join(found)}, whose tokenizers differ; '
        'a run has one tokenizer')
  return found[names[0]]


def total_stats(stats: list[dict[str, float]]) -> dict[str, float]:
  """Sums the stats of groups of equal size; `fill` is their mean."""
  total = collections.Counter()
  for one in stats:
    total.update(one)
  return dict(total, fill=total['fill'] / len(stats))


def _sequence(documents, tokenizer, image_layout, config, images, image_size):
  return layout_lib.packed(
      documents, tokenizer, image_layout, config.rows, config.length, images,
      image_size)


def _pair(documents, tokenizer, image_layout, config, images, image_size):
  del image_layout, images
  arrays = layout_lib.pair(documents, tokenizer, config.length, image_size)
  rows = [[i] if d.spans else [] for i, d in enumerate(documents)]
  return rows, arrays, layout_lib.pair_stats(documents, tokenizer, arrays)


LAYOUTS = {'sequence': _sequence, 'pair': _pair}
