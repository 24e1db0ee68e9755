"""State dicts out of PyTorch's archives, by a machine that runs nothing.

An archive is a zip file: a pickle, and a member of raw bytes for each storage
(torch/csrc/jit/docs/serialization.md). A pickle is a program, which may import
any function and call it. This machine knows the instructions with which
`torch.save` spells nested dicts of tensors, and the few names in `NAMES`. A
name is looked up in that table and nowhere else, nothing is imported, and every
other name or instruction is refused before anything comes of it.

`torch.jit.save` writes modules in place of dicts: objects of classes below
`__torch__`, whose attributes are tensors and other modules. They become dicts.
"""

import dataclasses
import math
import pickletools
import struct
from typing import Any

import ml_dtypes
import numpy as np

# Bytes of the longest pickle that is read; state dicts take a few hundred each
# tensor.
_LONGEST = 100_000_000
# Axes and elements of the largest tensor.
_AXES, _ELEMENTS = 32, 2**48
# Times that a storage may be in a state dict: as matrices that are tied, and in
# training files as parts that stand twice.
_USES = 4
# Numbers in a pickle that are keys of a dict; each has a place of its own then.
_KEYS = 2**20
# What training scripts put a state dict into.
_WRAPPERS = ('state_dict', 'module', 'model')


class Refused(Exception):
  """A pickle asks for more than tensors; says for what."""


class Corrupt(Exception):
  """A file is not what it says it is; says why."""


@dataclasses.dataclass(frozen=True)
class _Storage:
  key: str
  dtype: np.dtype
  elements: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """A view of a storage; start and strides are in elements."""
  storage: _Storage
  start: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Name:
  """A function of `NAMES`, which a pickle may call."""
  make: Any


class _Module(dict):
  """A module of `torch.jit.save`, by attribute."""


def state_dict(archive, members):
  """Reads where the tensors of an archive are.

  Args:
    archive: a `zipfile.ZipFile`.
    members: {name: (first byte in the archive, or None if compressed, bytes)}.

  Returns:
    {name: (first byte in the archive, shape, strides in bytes, dtype)} of the
    state dict within 'state_dict', 'module' or 'model', without a leading
    'module.' of names.

  Raises:
    Refused: the pickle names something that is not in `NAMES`.
    Corrupt: the pickle is garbled, or does not fit the storages.
  """
  found = [name for name in members if name.rpartition('/')[2] == 'data.pkl']
  if len(found) != 1 or members[found[0]][1] > _LONGEST:
    raise Corrupt('it is a zip file, but neither of PyTorch nor npz')
  if members[found[0]][0] is None:
    raise Corrupt('its pickle is compressed, as PyTorch leaves none')
  prefix = found[0].removesuffix('data.pkl')
  if f'{prefix}byteorder' in members:
    with archive.open(f'{prefix}byteorder') as file:
      order = file.read(9)
    if order != b'little':
      raise Corrupt(f'its byte order is {order}, not little; save it anew '
                    'on a machine like this one')
  tree = read(archive.read(found[0]))
  for _ in _WRAPPERS:  # one may stand in another
    if type(tree) is dict:  # not a module
      tree = next((tree[name] for name in _WRAPPERS
                   if isinstance(tree.get(name), dict)), tree)
  places, storages, total = {}, {}, 0
  for name, tensor in _leaves(tree, '', set()):
    if name in places:
      raise Corrupt(f'{name!r} is the name of several tensors')
    storage, size = tensor.storage, tensor.storage.dtype.itemsize
    start, there = members.get(f'{prefix}data/{storage.key}', (None, 0))
    if start is None or there < storage.elements * size:
      raise Corrupt(f'storage {storage.key!r} has {there} bytes, and '
                    f'{storage.elements} of {storage.dtype} in its pickle')
    places[name] = (start + tensor.start * size, tensor.shape,
                    tuple(n * size for n in tensor.strides), storage.dtype)
    storages[storage.key] = there
    total += math.prod(tensor.shape) * size
  if total > _USES * sum(storages.values()) + 2**20:  # small ones are expanded
    raise Corrupt(f'its tensors have {total} bytes, and their storages '
                  f'{sum(storages.values())}')
  if all(name.startswith('module.') for name in places):
    return {name.removeprefix('module.'): x for name, x in places.items()}
  return places


def _leaves(tree, prefix, seen):
  """Yields ('a.b.c', tensor) of nested dicts, and looks into each dict once."""
  if not isinstance(tree, dict) or id(tree) in seen:
    return
  seen.add(id(tree))
  for key, value in tree.items():
    if isinstance(value, _Tensor):
      yield f'{prefix}{key}', value
    else:
      yield from _leaves(value, f'{prefix}{key}.', seen)


def is_shape(shape):
  """Whether numbers of a file are a shape that an array can have."""
  return len(shape) <= _AXES and all(
      type(n) is int and n >= 0 for n in shape) and math.prod(
          max(n, 1) for n in shape) <= _ELEMENTS


def spell(tensors):
  """Returns the pickle of a state dict, as `torch.save` would spell it.

  Args:
    tensors: {name: what has a shape and a dtype}. The storage '0' is that of
      the first, '1' that of the second, ...; each holds its tensor in C order.
  """
  kinds = {np.dtype(dtype): kind for kind, dtype in _STORAGES.items()}
  number = lambda n: b'\x8a\x08' + struct.pack('<q', n)  # LONG1
  group = lambda *items: b'(' + b''.join(items) + b't'  # MARK, TUPLE
  name = lambda module, word: f'c{module}\n{word}\n'.encode()  # GLOBAL
  def text(word):  # BINUNICODE
    return b'X' + struct.pack('<I', len(word.encode())) + word.encode()

  def tensor(key, x):
    strides = [math.prod(x.shape[i + 1:]) for i in range(len(x.shape))]
    storage = group(
        text('storage'), name('torch', f'{kinds[np.dtype(x.dtype)]}Storage'),
        text(str(key)), text('cpu'), number(math.prod(x.shape)))
    return name('torch._utils', '_rebuild_tensor_v2') + group(
        storage + b'Q', number(0), group(*map(number, x.shape)),
        group(*map(number, strides)), b'\x89',
        name('collections', 'OrderedDict') + b')R') + b'R'

  items = [text(key) + tensor(i, x) for i, (key, x) in enumerate(
      tensors.items())]
  return b'\x80\x02}(' + b''.join(items) + b'u.'


# ---------------------------------------------------------------------------
# The machine


def read(data: bytes):
  """Returns the object of a pickle: dicts, lists, texts, numbers, tensors."""
  machine = _Machine()
  try:
    for operation, argument, _ in pickletools.genops(data):
      machine.step(operation.name, argument)
    return machine.stack.pop()
  except (LookupError, TypeError, ValueError) as error:
    raise Corrupt('its pickle is cut off or garbled') from error


class _Machine:
  """A stack, marks on it, and a memory."""

  def __init__(self):
    self.stack, self.marks, self.memory = [], [], {}

  def step(self, name, argument):
    """Follows one instruction."""
    stack = self.stack
    match name:
      case _ if name in _LITERALS:
        stack.append(argument)
      case _ if name in _FRESH:
        stack.append(_FRESH[name]())
      case 'PROTO' | 'FRAME' | 'STOP':
        pass
      case 'MARK':
        self.marks.append(stack)
        self.stack = []
      case 'TUPLE' | 'LIST' | 'DICT':
        items = self.unmark()
        self.stack.append(_GROUPS[name](items))
      case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
        items = [stack.pop() for _ in range(int(name[-1]))]
        stack.append(tuple(reversed(items)))
      case 'APPEND':
        item = stack.pop()
        _of(stack[-1], list).append(item)
      case 'APPENDS':
        items = self.unmark()
        _of(self.stack[-1], list).extend(items)
      case 'SETITEM':
        value, key = stack.pop(), stack.pop()
        _put([key, value], stack[-1])
      case 'SETITEMS':
        items = self.unmark()
        _put(items, self.stack[-1])
      case 'PUT' | 'BINPUT' | 'LONG_BINPUT':
        if argument > len(self.memory):  # one after the other
          raise ValueError
        self.memory[argument] = stack[-1]
      case 'MEMOIZE':
        self.memory[len(self.memory)] = stack[-1]
      case 'GET' | 'BINGET' | 'LONG_BINGET':
        stack.append(self.memory[argument])
      case 'GLOBAL':
        stack.append(_lookup(*argument.split(' ', 1)))
      case 'STACK_GLOBAL':
        word, module = _of(stack.pop(), str), _of(stack.pop(), str)
        stack.append(_lookup(module, word))
      case 'BINPERSID':
        stack.append(_storage(stack.pop()))
      case 'REDUCE' | 'NEWOBJ':
        arguments, name = _of(stack.pop(), tuple), _of(stack.pop(), _Name)
        stack.append(name.make(*arguments))
      case 'BUILD':
        state, target = stack.pop(), _of(stack[-1], dict)
        if isinstance(target, _Module):  # else notes on an OrderedDict
          target.update(_of(state, dict))
      case _:
        raise Refused(f'{name} {argument or ""}'.rstrip())

  def unmark(self):
    """Returns what stands above the last mark, and goes back to below it."""
    items, self.stack = self.stack, self.marks.pop()
    return items


def _of(value, kind):
  if not isinstance(value, kind):
    raise TypeError
  return value


def _put(items, target):
  """Puts alternating keys and values into a dict.

  Keys are texts and small numbers: a nested tuple could take for ever to hash,
  and of large numbers all may have the same hash.
  """
  if len(items) % 2:
    raise ValueError
  for key, value in zip(items[::2], items[1::2]):
    if isinstance(_of(key, str | int), int) and not 0 <= key < _KEYS:
      raise ValueError
    if key in _of(target, dict):
      raise Corrupt(f'{key!r} stands twice in a dict of its pickle')
    target[key] = value
  return target


def _lookup(module, word):
  """What a pickle means by a name: an entry of `NAMES`, or a module."""
  name = f'{module}.{word}'
  if module.partition('.')[0] == '__torch__':
    return _Name(lambda: _Module())
  if name not in NAMES:
    raise Refused(name)
  found = NAMES[name]
  return _Name(found) if callable(found) else found


def _sizes(*numbers):
  if any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
    raise ValueError
  return numbers


def _storage(persistent):
  """('storage', kind, key, device, elements), PyTorch's one persistent id."""
  word, dtype, key, _, elements = _of(persistent, tuple)
  if word != 'storage':
    raise ValueError
  return _Storage(_of(key, str), _of(dtype, np.dtype), *_sizes(elements))


def _tensor(storage, start, shape, strides, *_):
  """torch._utils._rebuild_tensor_v2; drops gradients, hooks and metadata."""
  if not is_shape(shape) or len(shape) != len(strides):
    raise ValueError
  tensor = _Tensor(_of(storage, _Storage), *_sizes(start), tuple(shape),
                   _sizes(*strides))
  last = start + sum((n - 1) * stride for n, stride in zip(shape, strides))
  if 0 not in shape and last >= storage.elements:
    raise Corrupt(f'a tensor {list(shape)} reaches beyond its storage')
  return tensor


def _tensor_of(storage, start, shape, strides, gradient, hooks, dtype, *_):
  """torch._utils._rebuild_tensor_v3: its storage is one of bytes."""
  del gradient, hooks
  elements = _of(storage, _Storage).elements // _of(dtype, np.dtype).itemsize
  return _tensor(_Storage(storage.key, dtype, elements), start, shape, strides)


_LITERALS = frozenset(
    'INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE '
    'BINUNICODE SHORT_BINUNICODE BINUNICODE8 STRING BINSTRING '
    'SHORT_BINSTRING'.split())
_FRESH = {'NONE': lambda: None, 'NEWTRUE': lambda: True,
          'NEWFALSE': lambda: False, 'EMPTY_TUPLE': tuple, 'EMPTY_LIST': list,
          'EMPTY_DICT': dict}
_GROUPS = {'TUPLE': tuple, 'LIST': list, 'DICT': lambda items: _put(items, {})}
_STORAGES = {
    'Double': 'float64', 'Float': 'float32', 'Half': 'float16',
    'Long': 'int64', 'Int': 'int32', 'Short': 'int16', 'Char': 'int8',
    'Byte': 'uint8', 'Bool': 'bool', 'BFloat16': ml_dtypes.bfloat16,
}
# All that a pickle may name, and what becomes of it.
NAMES = {
    'collections.OrderedDict': lambda: {},
    'torch.Size': lambda sizes: tuple(sizes),
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_tensor_v3': _tensor_of,
    'torch._utils._rebuild_parameter': lambda tensor, *_: tensor,
    'torch.storage.UntypedStorage': np.dtype('uint8'),
    **{f'torch.{kind}Storage': np.dtype(dtype)
       for kind, dtype in _STORAGES.items()},
    **{f'torch.{np.dtype(dtype).name}': np.dtype(dtype)
       for dtype in (*_STORAGES.values(), ml_dtypes.float8_e4m3fn,
                     ml_dtypes.float8_e5m2)},
}
