"""Files of published weights: opened without copying, and written.

`open` tells from its contents what a file is, and returns the place of every
tensor in it. Nothing but headers is read before a tensor's `array` is asked
for, which is a view of the mapped file, and nothing that a file holds is run.
What a file says of sizes and offsets is checked against the file itself.

  safetensors   one file, or shards and their index
  PyTorch       zip files of `torch.save` and `torch.jit.save`, likewise
  npz           numpy's archives, as big_vision writes them

Formats: safetensors' README ("Format"); torch/csrc/jit/docs/serialization.md;
numpy.lib.format.
"""

import builtins
import contextlib
import dataclasses
import json
import math
import pathlib
import re
import struct
import types
import zipfile
import zlib

import ml_dtypes
import numpy as np

from mmgen import errors
from mmgen.weights import pickles

# The largest header of safetensors, by its definition.
_MOST_HEADER = 100_000_000
# The largest header of npy, and one of the three entries that it has.
_MOST_NPY = 10_000
_NPY_ENTRY = r"'(\w+)': *('[^']*'|True|False|\([0-9, ]*\)),? *"
# In a folder, the first of these that it has is its weights.
_CHOICE = ('*.safetensors.index.json', '*.safetensors', '*.bin.index.json',
           'adapter_model.bin', '*.bin', '*.pt', '*.pth', '*.npz')
_DTYPES = {
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16,
    'BF16': ml_dtypes.bfloat16, 'F8_E4M3': ml_dtypes.float8_e4m3fn,
    'F8_E5M2': ml_dtypes.float8_e5m2, 'I64': np.int64, 'I32': np.int32,
    'I16': np.int16, 'I8': np.int8, 'U64': np.uint64, 'U32': np.uint32,
    'U16': np.uint16, 'U8': np.uint8, 'BOOL': np.bool_,
}
# What parsers of zip, npy, JSON and of the dicts in it raise on nonsense.
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError,
           TypeError, AttributeError, LookupError, RuntimeError)
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
# numpy stores bfloat16 as two bytes of nothing, '<V2' or '|V2'.
_NPY_DTYPES = {dtype.str: dtype for dtype in _NAMES if dtype.kind != 'V'} | {
    f'{order}V2': np.dtype(ml_dtypes.bfloat16) for order in '<|'}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """The place of a tensor in a file.

  Attributes:
    file: path of the file.
    offset: bytes before the tensor: of the file, or of `member`.
    shape, strides: of the tensor, strides in bytes.
    dtype: numpy dtype.
    member: of a zip file, if compressed there; else None.
  """
  file: pathlib.Path
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]
  dtype: np.dtype
  member: str | None = None

  @property
  def nbytes(self):
    return math.prod(self.shape) * self.dtype.itemsize

  def array(self):
    """Returns a read-only view of the file, mapped for as long as it lives."""
    if not self.nbytes:
      return np.empty(self.shape, self.dtype)
    reach = self.dtype.itemsize + sum(
        (n - 1) * stride for n, stride in zip(self.shape, self.strides))
    if self.member is None:
      data = np.memmap(self.file, np.uint8, 'r', self.offset, (reach,))
    else:
      with zipfile.ZipFile(self.file) as archive:
        data = np.frombuffer(archive.read(self.member), np.uint8)[self.offset:]
    return np.ndarray(self.shape, self.dtype, data, strides=self.strides)

  def __array__(self, dtype=None, copy=None):
    return np.array(self.array(), dtype, copy=copy)


def open(path):  # like gzip.open
  """Opens weights for reading.

  Args:
    path: of a file, an index of shards, or a folder that holds one of them.

  Returns:
    {name: Tensor}, read-only. Of PyTorch files it is the state dict within
    'state_dict', 'module' or 'model', without a leading 'module.' of names.

  Raises:
    UserError: no such file, or one of no known kind, or damaged, or one that
      asks for more than tensors.
  """
  path = pathlib.Path(path)
  with _reported(path):
    if path.is_dir():
      path = _choose(path)
    tensors = _index(path) if path.name.endswith('.index.json') else _file(path)
    if not tensors or not all(name.isprintable() for name in tensors):
      raise pickles.Corrupt('it holds no tensors, or none with proper names')
    return types.MappingProxyType(tensors)


@contextlib.contextmanager
def _reported(path):
  """Turns whatever a damaged file causes into a UserError of one line."""
  try:
    yield
  except pickles.Refused as error:
    raise errors.UserError(
        f'{path} is refused: it asks for {str(error)[:99]!r}, and weights '
        'are tensors in dicts, nothing else. Nothing of it was run. If you '
        'trust its source, save the state dict alone with PyTorch, best as '
        'safetensors.') from error
  except pickles.Corrupt as error:
    raise errors.UserError(f'cannot read weights from {path}: {error}.'
                           ) from error
  except OSError as error:
    raise errors.UserError(
        f'cannot read weights from {error.filename or path}: '
        f'{error.strerror or error}.') from error
  except _DAMAGE as error:
    why = str(error).splitlines() or ['it ends too early']
    raise errors.UserError(
        f'cannot read weights from {path}: it is cut off or damaged '
        f'({why[0]}). Fetch it again.') from error


def _choose(folder):
  """The weights of a folder."""
  for pattern in _CHOICE:
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
      names = ', '.join(file.name for file in found)
      raise pickles.Corrupt(f'it has several: {names}; give one of them')
    if found:
      return found[0]
  raise pickles.Corrupt(f'it has none of {", ".join(_CHOICE)}')


def _index(path):
  """Shards, by the index that says which tensor is in which file."""
  shards = json.loads(path.read_text())['weight_map']
  tensors, broken = {}, []
  for name in sorted(set(shards.values())):
    if pathlib.PurePath(name).name != name:
      raise pickles.Corrupt(f'{name!r} is no name of a file beside it')
    try:
      with _reported(path.parent / name):
        shard = _file(path.parent / name)
    except errors.UserError as error:
      broken.append(str(error))
      continue
    twice = sorted(tensors.keys() & shard.keys())
    if twice:
      raise pickles.Corrupt(f'{", ".join(twice)} stand in several of its files')
    tensors |= shard
  if broken:
    raise errors.UserError(' '.join(broken))
  wrong = [name for name, file in shards.items()
           if name not in tensors or tensors[name].file.name != file]
  if wrong:
    raise pickles.Corrupt(f'its files lack {", ".join(wrong)}')
  return tensors


def _file(path):
  """The tensors of one file, by its first bytes."""
  with path.open('rb') as file:
    head = file.read(9)
  if head.startswith(b'PK\3\4'):
    return _zip(path)
  if head[8:] == b'{':
    return _safetensors(path)
  if head.startswith(b'version h'):
    raise pickles.Corrupt('it is a pointer of Git LFS, not the file; run git '
                          'lfs pull in its repository')
  if head.startswith(b'\x80'):
    raise pickles.Corrupt('it is of PyTorch before 1.6, or another pickle; '
                          'save it anew with PyTorch: torch.save(torch.load('
                          'old, weights_only=True), new)')
  raise pickles.Corrupt('it is none of safetensors, PyTorch (zip) and npz')


# ---------------------------------------------------------------------------
# safetensors


def _once(pairs):
  """A dict of JSON pairs, each key once."""
  found = {}
  for key, value in pairs:
    if key in found:
      raise pickles.Corrupt(f'its header has {key!r} twice')
    found[key] = value
  return found


def _safetensors(path):
  size = path.stat().st_size
  with path.open('rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    if length > min(size - 8, _MOST_HEADER):
      raise pickles.Corrupt(f'its header is said to have {length} bytes, and '
                            f'it has {size} in all')
    header = json.loads(file.read(length), object_pairs_hook=_once)
  header.pop('__metadata__', None)
  tensors, end = {}, 0
  for start, stop, name, code, shape in sorted(
      (*info['data_offsets'], name, info['dtype'], info['shape'])
      for name, info in header.items()):
    if any(type(n) is not int or n < 0 for n in (start, stop)) or (
        not pickles.is_shape(shape)):
      raise pickles.Corrupt(f'{name} has the shape {str(shape)[:99]} at '
                            f'{[start, stop]}')
    if code not in _DTYPES:
      raise pickles.Corrupt(f'{name} is of the unknown dtype {code!r}')
    dtype = np.dtype(_DTYPES[code])
    if start != end or stop - start != math.prod(shape) * dtype.itemsize:
      raise pickles.Corrupt(f'{name}, {code} {shape}, is said to be bytes '
                            f'{start} to {stop}, after {end}')
    end = stop
    tensors[name] = Tensor(path, 8 + length + start, tuple(shape),
                           _strides(shape, dtype), dtype)
  if end != size - 8 - length:
    raise pickles.Corrupt(f'its tensors take {end} bytes, and it has '
                          f'{size - 8 - length}')
  return tensors


def _strides(shape, dtype):
  """Of an array in C order, in bytes."""
  return tuple(math.prod(shape[i + 1:]) * dtype.itemsize
               for i in range(len(shape)))


# ---------------------------------------------------------------------------
# Zip files: PyTorch and npz


def _zip(path):
  """The tensors of a zip file.

  Names of its members are keys and never paths. Members that are not compressed
  can be mapped: their place is behind a header of their own.
  """
  with zipfile.ZipFile(path) as archive, path.open('rb') as file:
    members, end, total = {}, path.stat().st_size, 0
    for info in archive.infolist():
      file.seek(info.header_offset)
      mark, name_size, extra_size = struct.unpack('<4s22x2H', file.read(30))
      start = info.header_offset + 30 + name_size + extra_size
      total += 30 + info.compress_size  # of a place that is no other's
      stored = info.compress_type == zipfile.ZIP_STORED
      if mark != b'PK\3\4' or info.filename in members or total > end or (
          stored and (info.file_size != info.compress_size
                      or start + info.file_size > end)):
        raise pickles.Corrupt(f'its directory is wrong about {info.filename!r}')
      members[info.filename] = start if stored else None, info.file_size
    if all(name.endswith('.npy') for name in members):
      return {name.removesuffix('.npy'): _npy(path, archive, name, *member)
              for name, member in members.items()}
    return {name: Tensor(path, *place) for name, place in
            pickles.state_dict(archive, members).items()}


def _npy(path, archive, name, start, size):
  """One array of an npz."""
  with archive.open(name) as file:
    shape, fortran, dtype = _npy_header(name, file)
    offset = file.tell()
  if offset + math.prod(shape) * dtype.itemsize != size:
    raise pickles.Corrupt(f'{name}, {dtype} {list(shape)}, has '
                          f'{size - offset} bytes')
  strides = _strides(shape, dtype)
  if fortran:
    strides = _strides(shape[::-1], dtype)[::-1]
  if start is None:
    return Tensor(path, offset, shape, strides, dtype, member=name)
  return Tensor(path, start + offset, shape, strides, dtype)


def _npy_header(name, file):
  """(shape, whether in Fortran's order, dtype) of an array that begins here.

  Python would read more than a header may be, at any cost.
  """
  mark, version = file.read(6), tuple(file.read(2))
  if mark != b'\x93NUMPY' or version not in ((1, 0), (2, 0)):
    raise pickles.Corrupt(f'{name} is of version {version} of npy')
  length = int.from_bytes(file.read(2 * version[0]), 'little')
  text = file.read(min(length, _MOST_NPY)).decode('latin1')
  match = re.fullmatch(r'\{' + 3 * _NPY_ENTRY + r'\}\s*', text)
  parts = match.groups() if match else ()
  entries = dict(zip(parts[::2], parts[1::2]))
  if len(text) != length or entries.keys() != {
      'descr', 'fortran_order', 'shape'} or entries['fortran_order'] not in (
          'True', 'False'):
    raise pickles.Corrupt(f'{name} has the header {text[:60]!r}')
  code, order, shape = (entries[key] for key in sorted(entries))
  if code[1:-1] not in _NPY_DTYPES:
    raise pickles.Corrupt(f'{name} is of the unknown dtype {code[:30]}')
  shape = tuple(int(n) for n in shape[1:-1].split(',') if n.strip())
  if not pickles.is_shape(shape):
    raise pickles.Corrupt(f'{name} has the shape {str(shape)[:99]}')
  return shape, order == 'True', _NPY_DTYPES[code[1:-1]]


# ---------------------------------------------------------------------------
# Writing


def write(path, tensors, metadata=None, max_shard_bytes=5 * 10**9):
  """Writes safetensors, or a file for PyTorch.

  Args:
    path: ends in .safetensors for one file, in .bin for one that `torch.load`
      reads, else a folder, which takes shards of safetensors and an index as
      Hugging Face names them.
    tensors: {name: array}, or an iterator of such pairs, of which no more than
      a shard is held at once.
    metadata: {str: str} for the header; transformers asks for {'format': 'pt'}.
    max_shard_bytes: of a folder's files; one tensor may be larger.

  Raises:
    UserError: the files cannot be written, or the folder has weights already.
  """
  path = pathlib.Path(path)
  pairs = tensors.items() if hasattr(tensors, 'items') else tensors
  try:
    if path.suffix in ('.safetensors', '.bin'):
      path.parent.mkdir(parents=True, exist_ok=True)
      if path.suffix == '.bin':
        _write_zip(path, dict(pairs))
      else:
        _write_file(path, dict(pairs), metadata)
    else:
      path.mkdir(parents=True, exist_ok=True)
      old = sorted(path.glob('*.safetensors*'))
      if old:
        raise errors.UserError(f'{path} has {old[0].name} already; give '
                               'another folder')
      _write_shards(path, pairs, metadata, max_shard_bytes)
  except OSError as error:
    raise errors.UserError(f'cannot write {error.filename or path}: '
                           f'{error.strerror or error}.') from error


def _write_shards(folder, pairs, metadata, most):
  shards, shard, size = [], {}, 0

  def flush():
    file = folder / f'{len(shards)}.draft'
    _write_file(file, shard, metadata)
    shards.append((file, list(shard)))

  total = 0
  for name, array in pairs:
    if shard and size + array.nbytes > most:
      flush()
      shard, size = {}, 0
    shard[name] = array
    size, total = size + array.nbytes, total + array.nbytes
  flush()
  if len(shards) == 1:
    shards[0][0].rename(folder / 'model.safetensors')
    return
  index = {}
  for i, (file, names) in enumerate(shards, 1):
    final = f'model-{i:05}-of-{len(shards):05}.safetensors'
    file.rename(folder / final)
    index |= dict.fromkeys(names, final)
  (folder / 'model.safetensors.index.json').write_text(json.dumps(
      dict(metadata=dict(total_size=total), weight_map=index), indent=1) + '\n')


def _write_file(path, tensors, metadata):
  """Writes one file whole or not at all; wide dtypes first, so all align."""
  names = sorted(tensors, key=lambda name: (
      -np.dtype(tensors[name].dtype).itemsize, name))
  header, end = {'__metadata__': metadata} if metadata else {}, 0
  for name in names:
    array = tensors[name]
    header[name] = dict(dtype=_NAMES[np.dtype(array.dtype)],
                        shape=list(array.shape),
                        data_offsets=[end, end := end + array.nbytes])
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  draft = path.with_name(f'{path.name}.draft')
  with builtins.open(draft, 'wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for name in names:
      array = np.ascontiguousarray(tensors[name])
      file.write(array.reshape(-1).view(np.uint8).data)
  draft.replace(path)


def _write_zip(path, tensors):
  """Writes one file of PyTorch whole or not at all."""
  draft = path.with_name(f'{path.name}.draft')
  with zipfile.ZipFile(draft, 'w') as archive:  # stored, not compressed
    archive.writestr('archive/data.pkl', pickles.spell(tensors))
    archive.writestr('archive/byteorder', 'little')
    for i, array in enumerate(tensors.values()):
      archive.writestr(f'archive/data/{i}', np.asarray(array).tobytes())
    archive.writestr('archive/version', '3\n')
  draft.replace(path)
