"""What an optimizer knows of a parameter, by its name.

Parameters are gathered into groups by regular expressions. The learning rate
and the weight decay of each follow from its name, its group and the layer to
which it belongs, and are plain numbers fixed before the first step.
"""

import dataclasses
import difflib
import re
from typing import NamedTuple

import numpy as np

from mmgen import errors
from mmgen import fields


@dataclasses.dataclass(frozen=True)
class Group:
  """Parameters that are trained in their own way, or not at all.

  Attributes:
    pattern: regex found anywhere in the name of a parameter.
    freeze: whether they stay as they are.
    lr_scale: factor of the learning rate.
    layer_decay: another factor from layer to layer, downwards from 1 above the
      stack of L blocks, which the group must then have exactly one of: block i
      (from 0) has layer_decay ** (L - i), embeddings below it the power L + 1
      (baaivision/EVA, training/optim.py).
    weight_decay: replaces the optimizer's, also where it decays nothing.
    fused: regex; leaves whose names differ only in what it finds are one
      tensor to a trust ratio. Where a reference keeps query, key and value in
      one matrix and one bias it is 'query|key|value'.
  """

  pattern: str
  freeze: bool = False
  lr_scale: float = dataclasses.field(default=1.0, metadata=dict(least=0))
  layer_decay: float = 1.0
  weight_decay: float | None = dataclasses.field(
      default=None, metadata=dict(least=0))
  fused: str | None = None


class Factors(NamedTuple):
  """Of one leaf.

  Attributes:
    decay: weight decay.
    rate: factor of the learning rate; [L, 1, ...] where layers differ.
    stacked: whether the leaf is L tensors, one a layer.
    tensor: name that it shares with the leaves it is fused with.
  """

  decay: float
  rate: float | np.ndarray
  stacked: bool
  tensor: str


# ---------------------------------------------------------------------------
# Reading


def read_groups(groups) -> dict[str, Group]:
  """Returns {group: Group} of `config.optimizer.groups`.

  Raises:
    UserError: see `fields.read`; or a `layer_decay` out of range.
  """
  found = {}
  for name, entry in groups.items():
    where = f'config.optimizer.groups.{name}'
    found[name] = group = fields.read(Group, where, entry)
    if not 0 < group.layer_decay <= 1:
      raise errors.UserError(
          f'{where}.layer_decay is {group.layer_decay}; allowed: above 0 up to '
          '1, which is the same rate for all layers.')
  return found


def assign(names, groups: dict[str, Group]) -> dict[str, str | None]:
  """Returns {parameter: name of its group, or None}.

  Args:
    names: names of parameters, such as 'decoder/blocks/mlp/up/kernel'.
    groups: of `read_groups`.

  Raises:
    UserError: a pattern that is no regex or finds nothing, or two patterns
      that find the same parameter.
  """
  names = list(names)
  found = dict.fromkeys(names)
  for group, options in groups.items():
    for name in matching(names, options.pattern,
                         f'config.optimizer.groups.{group}.pattern'):
      if found[name] is not None:
        raise errors.UserError(
            f'config.optimizer.groups: {name} is in {found[name]!r} and in '
            f'{group!r}; a parameter has at most one group.')
      found[name] = group
  return found


def matching(names, pattern: str, where: str) -> list[str]:
  """Returns those of `names` in which a regex is found.

  Raises:
    UserError: it is no regex, or is found nowhere.
  """
  names = list(names)
  try:
    hits = [name for name in names if re.search(pattern, name)]
  except re.error as error:
    raise errors.UserError(
        f'{where} is {pattern!r}, not a regular expression: {error}.'
    ) from None
  if not hits:
    near = difflib.get_close_matches(pattern, names, 3, 0.0)
    raise errors.UserError(
        f'{where} {pattern!r} matches none of {len(names)} parameters. '
        f'Nearest: {", ".join(near)}.')
  return hits


# ---------------------------------------------------------------------------
# Factors


def stacked(name: str) -> bool:
  """Says whether a leaf has a layer axis: all below 'blocks' have one."""
  return 'blocks' in name.split('/')


def decays(name: str, leaf) -> bool:
  """Says whether weight decay applies by default: to matrices only.

  Norms, biases and single vectors are spared, also where a stack gives them a
  leading layer axis: a norm's scale is [L, D] there, and the bias of a query
  [L, N, H].
  """
  axes = len(leaf.shape) - stacked(name)
  return axes >= 2 and name.split('/')[-1] not in ('scale', 'bias')


def find_factors(leaves, groups: dict[str, Group], weight_decay: float,
                 no_decay: str | None) -> dict[str, Factors]:
  """Returns {parameter: its factors}.

  Args:
    leaves: {parameter: array or ShapeDtypeStruct}, the trained ones.
    groups: of `read_groups`; frozen ones do not count.
    weight_decay: of those that `decays` names.
    no_decay: regex of parameters to spare beside; None for no others.

  Raises:
    UserError: see `assign`; or a `no_decay`, `layer_decay` or `fused` that
      finds nothing or does not fit.
  """
  groups = {name: group for name, group in groups.items() if not group.freeze}
  assigned = assign(leaves, groups)
  spared = []
  if no_decay is not None:
    spared = matching(leaves, no_decay, 'config.optimizer.no_decay')
  decayed = {name for name, leaf in leaves.items()
             if decays(name, leaf) and name not in spared}
  found = {name: Factors(weight_decay * (name in decayed), 1.0, stacked(name),
                         name) for name in leaves}
  for group, options in groups.items():
    where = f'config.optimizer.groups.{group}'
    members = {name: leaf for name, leaf in leaves.items()
               if assigned[name] == group}
    tensors = _fuse(members, options.fused, where)
    rates = _layer_rates(members, options.layer_decay, where)
    for name in members:
      decay = options.weight_decay
      found[name] = Factors(
          found[name].decay if decay is None else decay,
          options.lr_scale * rates[name], stacked(name), tensors[name])
  return found


def _fuse(leaves, fused, where):
  """Returns {parameter: name of the tensor that it is part of}."""
  if fused is None:
    return {name: name for name in leaves}
  hits = matching(leaves, fused, f'{where}.fused')
  found = {name: f'{where}:{re.sub(fused, "", name)}' if name in hits else name
           for name in leaves}
  layers = {}
  for name in hits:
    own = leaves[name].shape[:stacked(name)]
    if layers.setdefault(found[name], own) != own:
      raise errors.UserError(
          f'{where}.fused is {fused!r}, which makes one tensor of {name} and '
          'a leaf with another number of layers.')
  return found


def _layer_rates(leaves, decay, where):
  """Returns {parameter: decay to the power of the layers above it}."""
  if decay == 1:
    return dict.fromkeys(leaves, 1.0)
  stacks = {name.partition('blocks/')[0]: leaf.shape[0]
            for name, leaf in leaves.items() if stacked(name)}
  if len(stacks) != 1:
    raise errors.UserError(
        f'{where}.layer_decay counts from the top of one stack; its pattern '
        f'finds {", ".join(stacks) or "none"}. Make a group of each.')
  depth, = stacks.values()

  def above(name, leaf):
    if stacked(name):
      return np.arange(depth, 0, -1).reshape(-1, *[1] * (len(leaf.shape) - 1))
    return depth + 1 if re.search(_INPUTS, name) else 0

  return {name: decay ** above(name, leaf) for name, leaf in leaves.items()}


# What stands below the first block: embeddings of patches, tokens, positions
# and classes, and a norm of their sum.
_INPUTS = r'embedding(/|$)|(^|/)pre_norm/'
