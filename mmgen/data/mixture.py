"""Mixtures: a fixed number of packing groups per source and step.

A quota keeps shapes static and makes a batch a function of the step alone:
step s of a source with quota q holds its groups [s * q, (s + 1) * q), whatever
other sources there are. A process owns whole groups, in order, so that the
batches of all processes side by side are the same for every process count.
"""

import dataclasses

from mmgen import errors
from mmgen import fields
from mmgen.data import prompts


@dataclasses.dataclass(frozen=True)
class Source:
  """One source of a mixture; an entry of `config.mix`.

  Attributes:
    corpus: Name of a corpus below the data folder, such as 'emoji/tiny'.
    split: Split of the corpus, slices such as 'train[:50%]' included.
    view: What a document shows, a name of `prompts.VIEWS`.
    column: Caption to read, see `prompts.caption_text`.
    language: Language of the column 'names'.
    image_place: Picture 'before' or 'after' its caption, or 'random'.
    style: Templates, a name of `prompts.STYLES`.
    shuffle_pairs: A control: every text gets another record's picture.
    quota: Groups a step.
  """

  corpus: str
  split: str = 'train'
  view: str = 'caption'
  column: str = 'fused'
  language: str = 'en'
  image_place: str = 'before'
  style: str = 'own'
  shuffle_pairs: bool = False
  quota: int = 1


def read(mix, process_count=1):
  """The sources of a config, checked.

  Args:
    mix: `config.mix`, a mapping from the name of a source to its fields.
    process_count: Number of processes that share each step.

  Returns:
    dict from name to `Source`.

  Raises:
    UserError: an unknown field or choice, or groups that cannot be shared out.
  """
  if not mix:
    raise errors.UserError('mix is empty; name at least one source')
  sources = {}
  for name, entry in mix.items():
    source = fields.read(Source, f'mix.{name}', entry)
    prompts.check(f'mix.{name}', source)
    if source.quota % process_count:
      raise errors.UserError(
          f'mix.{name}.quota is {source.quota} groups a step; it must be a '
          f'positive multiple of the {process_count} processes, since a '
          'process owns whole groups')
    sources[name] = source
  return sources


def own_groups(step, quota, process_index=0, process_count=1):
  """The groups of one source that a process packs for a step, a range."""
  share = quota // process_count
  first = step * quota + process_index * share
  return range(first, first + share)
