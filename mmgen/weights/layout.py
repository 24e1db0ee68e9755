"""The correspondence between a published layout and our parameters.

A layout is a list of rules. A rule says which of their tensors hold which of
our leaves, and how the arrays of the one become those of the other, both ways.
Import reads each shard of each leaf straight from the mapped files into the
memory of its device; export goes through the same rules backwards. Before that
`check` compares all names and shapes, so that no model is half loaded.

Leaves of a stack carry a layer axis, and published layouts have one tensor a
layer: there a rule's `theirs` contain '{layer}', and its functions see arrays
of one layer.
"""

from collections.abc import Callable
import dataclasses
import difflib
import os.path
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmgen import errors
from mmgen.models import positions


@dataclasses.dataclass(frozen=True)
class Rule:
  """One correspondence.

  Attributes:
    ours: names of our leaves, such as 'vision/stack/blocks/mlp/up/kernel'.
    theirs: names of their tensors.
    to_ours: function of the arrays of `theirs`; returns those of `ours`, as
      views wherever they can be.
    to_theirs: its exact inverse.
  """
  ours: tuple[str, ...]
  theirs: tuple[str, ...]
  to_ours: Callable[..., tuple]
  to_theirs: Callable[..., tuple]

  @property
  def layered(self):
    return any('{layer}' in name for name in self.theirs)


@dataclasses.dataclass(frozen=True)
class Layout:
  """A published layout of a family of models.

  Attributes:
    recognise: (tensors, {name: content of a JSON file beside}, said) -> config
      of the model, or None if the tensors are of another layout. `said` are
      fields of the config that a user states.
    build: config -> (module, {our name: ShapeDtypeStruct}).
    rules: config -> list of `Rule`.
    image: (config, beside) -> how a picture becomes the model's pixels.
    ignored: patterns of whole names of tensors that follow from the rest, or
      that the model never reads.
    style: of the prompts it was trained on, a name of `data.prompts.STYLES`, or
      a function of the config that returns one.
    family: of the tokenizer that goes with it, a name of
      `data.published_text.FAMILIES`, a function of the config that returns
      one, or None: the tokenizer's file tells.
    resize: how its reference resizes positions of the image tower to another
      grid, a method of `positions.resize_positions`; None if it has none.
    fresh: patterns of leaves within a part, such as 'stack/final_norm/.*', that
      this layout lacks and that published models which start from it add.
  """
  recognise: Callable[..., Any]
  build: Callable[..., Any]
  rules: Callable[..., list]
  image: Callable[..., dict]
  ignored: tuple[str, ...] = ()
  style: str | Callable[..., str] = 'own'
  family: str | Callable[..., str] | None = None
  resize: str | None = None
  fresh: tuple[str, ...] = ()

  def of(self, field, config):
    """The style, or the family, of a model with that config."""
    value = getattr(self, field)
    return value(config) if callable(value) else value


# ---------------------------------------------------------------------------
# Common rules. Prefixes: ours without '/kernel', theirs without '.weight'.


def same(ours, theirs, lead=0):
  """One leaf as it is, but for `lead` axes of length 1 before it there."""
  return Rule((ours,), (theirs,), lambda x: (x.reshape(x.shape[lead:]),),
              lambda x: (x.reshape((1,) * lead + x.shape),))


def norm(ours, theirs, bias=True):
  """Scale and bias of a norm."""
  return [same(f'{ours}/scale', f'{theirs}.weight'),
          *_bias(ours, theirs, bias)]


def linear(ours, theirs, bias=True):
  """A matrix [out, in] there, [in, out] here."""
  swap = lambda x: (x.T,)
  return [Rule((f'{ours}/kernel',), (f'{theirs}.weight',), swap, swap),
          *_bias(ours, theirs, bias)]


def fused(ours, weight, bias=None):
  """Several matrices of one size in one, [len(ours) * out, in] there.

  Args:
    ours: prefixes of the matrices, such as query, key and value.
    weight: name of their matrix.
    bias: name of [len(ours) * out], or None.
  """
  rules = [Rule(
      tuple(f'{name}/kernel' for name in ours), (weight,),
      lambda x: tuple(x.reshape(len(ours), -1, x.shape[1]).swapaxes(1, 2)),
      lambda *xs: (np.concatenate([x.T for x in xs]),))]
  if bias:
    rules.append(Rule(
        tuple(f'{name}/bias' for name in ours), (bias,),
        lambda x: tuple(x.reshape(len(ours), -1)),
        lambda *xs: (np.concatenate(xs),)))
  return rules


def patches(ours, theirs, patch, bias=True):
  """A convolution [W, C, P, P] there; [P * P * C, W], see `patchify`, here."""
  return [Rule((f'{ours}/kernel',), (f'{theirs}.weight',),
               lambda x: (x.transpose(2, 3, 1, 0).reshape(-1, len(x)),),
               lambda x: (x.reshape(patch, patch, -1, x.shape[-1]).transpose(
                   3, 2, 0, 1),)),
          *_bias(ours, theirs, bias)]


def _bias(ours, theirs, there):
  return [same(f'{ours}/bias', f'{theirs}.bias')] if there else []


def modules(pairs, ours, theirs, bias=True):
  """The rules of several modules, whose kind the end of our name tells.

  Args:
    pairs: {our name: their name}, such as {'mlp/up': 'mlp.fc1'}.
    ours, theirs: prefixes of all of them.
    bias: whether all of them have one.
  """
  rules = []
  for our, their in pairs.items():
    make = norm if our.endswith('norm') else linear
    rules += make(ours + our, theirs + their, bias=bias)
  return rules


# ---------------------------------------------------------------------------
# Their names and shapes


_MOST_KINDS = 4
# Names that are missing or extra of which the nearest is told.
_COMPARED = 50


def of_layer(name, layer):
  """Their name of a tensor in one layer; it is no template of Python's."""
  return name.replace('{layer}', str(layer))


def expected(rules, ours):
  """Returns {their name: shape}, as it follows from our leaves."""
  shapes = {}
  for rule in rules:
    leaves = [ours[name].shape for name in rule.ours]
    layers = range(leaves[0][0]) if rule.layered else (0,)
    arrays = rule.to_theirs(*(
        np.broadcast_to(np.int8(0), shape[rule.layered:]) for shape in leaves))
    for name, array in zip(rule.theirs, arrays):
      shapes |= {of_layer(name, i): array.shape for i in layers}
  return shapes


def agree(found, said):
  """Compares sizes before anything is made of them.

  Args:
    found: {name: size} by shapes; 1 where there is no tensor, which `check`
      says later.
    said: likewise, by a config; more may be said.

  Raises:
    UserError: they differ.
  """
  differ = [name for name in found if name in said and said[name] != found[name]
            and (found[name] > 1 or name.endswith('layers'))]
  if differ:
    raise errors.UserError('the config beside the tensors says ' + ', '.join(
        f'{name} {said[name]!r} (they have {found[name]})' for name in differ)
                           + '.')


def check(rules, tensors, ours, ignored=(), what='the file'):
  """Compares what a file has with what a model needs.

  Args:
    rules: of the layout.
    tensors: {their name: what has a shape and a dtype}.
    ours: {our name: what has a shape}, of the whole model.
    ignored: patterns of names in the file that may be left.
    what: named in the error.

  Returns:
    Names in the file that are left.

  Raises:
    UserError: lists all tensors that are missing, extra, of another shape, or
      of whole numbers (of a quantised model).
  """
  uncovered = ours.keys() - {name for rule in rules for name in rule.ours}
  if uncovered:
    raise ValueError(f'no rule fills {sorted(uncovered)}')
  wanted = expected(rules, ours)
  missing = sorted(wanted.keys() - tensors.keys())
  others = sorted(tensors.keys() - wanted.keys())
  extra = [name for name in others
           if not any(re.fullmatch(p, name) for p in ignored)]
  lines = [f'{name} is missing{_nearest(i, name, extra or tensors, "there")}'
           for i, name in enumerate(missing)]
  lines += [f'{name} is extra{_nearest(i, name, missing or wanted, "expected")}'
            for i, name in enumerate(extra)]
  for name in sorted(wanted.keys() & tensors.keys()):
    shape, dtype = tuple(tensors[name].shape), tensors[name].dtype
    if shape != wanted[name]:
      lines.append(f'{name} is {list(shape)}, not {list(wanted[name])}')
    if not jnp.issubdtype(dtype, jnp.floating):
      lines.append(f'{name} holds {dtype}, no floating numbers')
  if lines:
    raise errors.UserError(
        f'{what} does not fit the model, nothing of it is loaded: '
        f'{"; ".join(lines)}.')
  return others


def shown(names, patterns):
  """Names of tensors in a line: those of a kind, or of a part, as one.

  Args:
    names: all of them fit a pattern.
    patterns: of whole names.
  """
  said = []
  for pattern in patterns:
    kinds = sorted({re.sub(r'(?<=\.)\d+(?=\.)', '*', name) for name in names
                    if re.fullmatch(pattern, name)})
    said += kinds if len(kinds) <= _MOST_KINDS else [
        f'{os.path.commonprefix(kinds)}*']
  return ', '.join(said)


def _nearest(i, name, names, where):
  """The nearest of names, for as many as one looks at: it takes its time."""
  close = difflib.get_close_matches(name, names, 1) if i < _COMPARED else []
  return f' (nearest {where}: {close[0]})' if close else ''


# ---------------------------------------------------------------------------
# Import and export


def load(rules, tensors, target):
  """Reads parameters from files straight to where they shall live.

  Of each shard one layer is read at a time, and only what the shard needs of
  it, so that the host never holds more than its shards and a source tensor.

  Args:
    rules: of the layout.
    tensors: of `files.open`, checked.
    target: {our name: ShapeDtypeStruct}, all of the model or a part; without a
      sharding it goes to the first device.

  Returns:
    {our name: jax.Array}.
  """
  places = _places(rules)
  return {name: _load_leaf(*places[name], tensors, leaf)
          for name, leaf in target.items()}


def resized(rules, name, method, old, new):
  """The rules of a model whose positions in `name` are on another grid.

  What is imported by them is resized, in float32; what they export, and expect
  to find, is not. References that resize half precision round the result to it.

  Args:
    rules: of the layout.
    name: of our leaf, [T, D].
    method: of `positions.resize_positions`.
    old, new: rows and columns of the file's grid and of the model's.
  """
  def change(rule):
    if name not in rule.ours:
      return rule
    return dataclasses.replace(rule, to_ours=lambda *arrays: tuple(
        positions.resize_positions(
            array.astype(np.float32), old, new, method)
        for array in rule.to_ours(*arrays)))
  return [change(rule) for rule in rules]


def _places(rules):
  """{our name: (rule, which of its results)}."""
  return {name: (rule, which) for rule in rules
          for which, name in enumerate(rule.ours)}


def _load_leaf(rule, which, tensors, target):
  def read(layer, index):
    views = (tensors[of_layer(name, layer)].array() for name in rule.theirs)
    return rule.to_ours(*views)[which][index]

  def shard(index):
    index = tuple(slice(*part.indices(size))
                  for part, size in zip(index, target.shape))
    out = _aligned([part.stop - part.start for part in index], target.dtype)
    if not rule.layered:
      out[...] = read(None, index)
      return out
    for i, layer in enumerate(range(index[0].start, index[0].stop)):
      out[i] = read(layer, index[1:])
    return out

  return jax.make_array_from_callback(
      target.shape, target.sharding or jax.sharding.SingleDeviceSharding(
          jax.devices()[0]), shard)


def _aligned(shape, dtype):
  """An empty array on a border of 64 bytes: a CPU device takes it uncopied."""
  size = int(np.prod(shape)) * np.dtype(dtype).itemsize
  memory = np.empty(size + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start:start + size].view(dtype).reshape(shape)


def export(rules, params, dtypes):
  """Yields (their name, array) of all parameters, in the order of the rules.

  Args:
    rules: of the layout.
    params: {our name: array}.
    dtypes: {their name: dtype}, or one for all.
  """
  for rule in rules:
    leaves = [np.asarray(params[name]) for name in rule.ours]
    for layer in range(len(leaves[0])) if rule.layered else (None,):
      arrays = rule.to_theirs(*(
          leaf if layer is None else leaf[layer] for leaf in leaves))
      for name, array in zip(rule.theirs, arrays):
        name = of_layer(name, layer)
        dtype = dtypes[name] if isinstance(dtypes, dict) else dtypes
        yield name, array.astype(dtype, copy=False)


def renamed(dtypes, old, new, ours):
  """Gives the tensors of another layout the dtypes that a file has.

  Args:
    dtypes: {their name: dtype} of the file.
    old: rules of its layout.
    new: rules of the other.
    ours: {our name: what has a shape}, all that the other holds.

  Returns:
    {their name: dtype}; float32 for what the file does not have. All layers
    have that of the first.
  """
  first = {name: of_layer(rule.theirs[0], 0) for rule in old
           for name in rule.ours}
  named = {}
  for rule in new:
    dtype = dtypes.get(first.get(rule.ours[0]), np.dtype(np.float32))
    layers = ours[rule.ours[0]].shape[0] if rule.layered else 1
    named |= {of_layer(name, i): dtype for name in rule.theirs
              for i in range(layers)}
  return named


def report(rules, tensors, target):
  """Returns [(our name, their names, our shape, their dtypes)]."""
  rows = []
  for name, (rule, _) in _places(rules).items():
    if name in target:
      found = {str(tensors[of_layer(theirs, 0)].dtype)
               for theirs in rule.theirs}
      rows.append((name, rule.theirs, target[name].shape,
                   ', '.join(sorted(found))))
  return rows
