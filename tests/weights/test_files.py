"""Weight files: what is read, that nothing of it runs, and what is refused.

`golden/weights/strided.pt` and `script.pt` are written by torch 2.13.0's
`torch.save` and `torch.jit.save`; their values are made again here.
"""

import io
import json
import os
import pathlib
import pickle
import sys
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from mmgen import errors
from mmgen.weights import files
from mmgen.weights import pickles

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'weights'
DTYPES = [np.dtype(d) for d in (
    'float64', 'float32', 'float16', ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, 'int64', 'int32', 'int16',
    'int8', 'uint8', 'bool')]
# What numpy writes before an array.
SHAPED = "{'descr': '<f4', 'fortran_order': False, 'shape': %s, }"


def is_mapped(array):
  """Whether the memory of an array is that of a file."""
  while isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
    array = array.base
  return isinstance(array, np.memmap)


def refused(path, said):
  with pytest.raises(errors.UserError, match=said) as caught:
    files.open(path)
  assert '\n' not in str(caught.value)
  assert str(path.name) in str(caught.value)


# ---------------------------------------------------------------------------
# What can be read


def test_written_safetensors_come_back(tmp_path):
  arrays = {dtype.name: np.arange(6).reshape(2, 3).astype(dtype)
            for dtype in DTYPES}
  arrays |= {'swapped': np.arange(6.0).reshape(2, 3).T,
             'none': np.empty((0, 2)), 'one': np.float32(2.5).reshape(())}
  files.write(tmp_path / 'a.safetensors', arrays, {'format': 'pt'})
  found = files.open(tmp_path / 'a.safetensors')
  assert found.keys() == arrays.keys()
  for name, array in arrays.items():
    tensor, view = found[name], found[name].array()
    assert (tensor.shape, tensor.dtype, tensor.nbytes) == (
        array.shape, array.dtype, array.nbytes)
    np.testing.assert_array_equal(np.asarray(tensor), array)
    if array.size:
      assert is_mapped(view) and not view.flags.writeable and not (
          view.ctypes.data % array.itemsize)


def test_shards_and_their_index(tmp_path):
  arrays = {f'layer.{i}': np.full((4, 4), i, np.float32) for i in range(5)}
  files.write(tmp_path / 'out', iter(arrays.items()), max_shard_bytes=130)
  names = sorted(file.name for file in (tmp_path / 'out').iterdir())
  assert names == [*(f'model-0000{i}-of-00003.safetensors' for i in (1, 2, 3)),
                   'model.safetensors.index.json']
  for path in (tmp_path / 'out', tmp_path / 'out' / names[-1]):
    found = files.open(path)
    assert {name: t.array()[0, 0] for name, t in found.items()} == {
        name: array[0, 0] for name, array in arrays.items()}
  with pytest.raises(errors.UserError, match='has model-00001-of.* already'):
    files.write(tmp_path / 'out', arrays)


def test_pytorch_tensors_are_views(tmp_path):
  found = files.open(GOLDEN / 'strided.pt')
  a = np.arange(24, dtype=np.float32).reshape(4, 6)
  expected = dict(
      a=a, transposed=a.T, sliced=a[1:3, ::2], parameter=a + 1,
      expanded=np.ones((3, 2), np.float32), scalar=np.float32(3.5),
      empty=np.zeros((0, 3), np.float32),
      **{d.name: np.array([0, 1, 1, 0]).astype(d) for d in DTYPES[:1]
         + DTYPES[2:]})
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(found[name].array(), array)
    assert is_mapped(found[name].array()) == bool(array.size)
  assert found['transposed'].array().strides == (4, 24)


def test_pytorch_modules_become_names():
  found = files.open(GOLDEN / 'script.pt')
  assert sorted(found) == ['b', 'inner.0.bias', 'inner.0.weight',
                           'inner.1.bias', 'inner.1.weight', 'w']
  np.testing.assert_array_equal(
      found['inner.0.weight'].array(), np.arange(6).reshape(3, 2))
  assert found['b'].dtype == np.float16


def test_npz_is_mapped_unless_compressed(tmp_path):
  a = np.arange(6.0).reshape(2, 3)
  arrays = {'params/a': a, 'params/b': np.asfortranarray(a.astype('f4')),
            'c': np.arange(3).astype(ml_dtypes.bfloat16)}
  for save in np.savez, np.savez_compressed:
    save(tmp_path / 'a.npz', **arrays)
    found = files.open(tmp_path / 'a.npz')
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
      assert found[name].dtype == array.dtype
      np.testing.assert_array_equal(found[name].array(), array)
      assert is_mapped(found[name].array()) == (save is np.savez)


def test_folders(tmp_path):
  refused(tmp_path, 'it has none of')
  refused(tmp_path / 'absent.pt', 'No such file')
  (tmp_path / 'config.json').write_text('{}')
  (tmp_path / 'pytorch_model.bin').write_bytes(
      (GOLDEN / 'strided.pt').read_bytes())
  assert 'transposed' in files.open(tmp_path)
  files.write(tmp_path / 'model.safetensors', {'x': np.zeros(1)})
  assert list(files.open(tmp_path)) == ['x']  # before PyTorch's
  files.write(tmp_path / 'other.safetensors', {'y': np.zeros(1)})
  refused(tmp_path, 'several: model.safetensors, other.safetensors; give one')


def test_an_index_names_only_files_beside_it(tmp_path):
  files.write(tmp_path / 'a.safetensors', {'x': np.zeros(1)})
  files.write(tmp_path / 'b.safetensors', {'x': np.zeros(1)})
  (tmp_path / 'in').mkdir()
  path = tmp_path / 'in' / 'model.safetensors.index.json'
  for weight_map, said in (
      ({'x': '../a.safetensors'}, 'no name of a file beside it'),
      ({'x': str(tmp_path / 'a.safetensors')}, 'no name of a file beside it'),
      ({'x': '..'}, 'Is a directory'),
      ({'x': 'absent.safetensors'}, 'No such file')):
    path.write_text(json.dumps(dict(weight_map=weight_map)))
    with pytest.raises(errors.UserError, match=said):
      files.open(path)
  path = tmp_path / 'model.safetensors.index.json'
  for weight_map, said in (
      ({'x': 'a.safetensors', 'y': 'a.safetensors'}, 'its files lack y'),
      ({'x': 'a.safetensors', 'y': 'b.safetensors'}, 'x stand in several'),
      ([], 'damaged'), (3, 'damaged')):
    path.write_text(json.dumps(dict(weight_map=weight_map)))
    refused(path, said)
  path.write_text('{')
  refused(path, 'damaged')


def test_every_broken_shard_is_named(tmp_path):
  arrays = {f'layer.{i}': np.zeros(4, np.float32) for i in range(5)}
  files.write(tmp_path, arrays, max_shard_bytes=16)
  shard = lambda i: tmp_path / f'model-0000{i}-of-00005.safetensors'
  shard(2).unlink()
  shard(3).write_bytes(shard(3).read_bytes()[:-10])
  shard(5).write_text('version https://git-lfs.github.com/spec/v1')
  with pytest.raises(errors.UserError) as caught:
    files.open(tmp_path)
  said = str(caught.value).split('cannot read weights from ')
  assert [part.split(': ')[0] for part in said] == [
      '', *(str(shard(i)) for i in (2, 3, 5))]
  for part, why in zip(said[1:], ('No such file', 'take 16 bytes', 'lfs pull')):
    assert why in part and '\n' not in part


# ---------------------------------------------------------------------------
# PyTorch's pickles run nothing


def torch_zip(path, program, storages=None, **members):
  """An archive as `torch.save` makes it, around any pickle."""
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('archive/data.pkl', program)
    for key, data in (storages or {}).items():
      archive.writestr(f'archive/data/{key}', data)
    for name, data in members.items():
      archive.writestr(f'archive/{name}', data)
  return path


class Evil:
  """Pickles as a call of anything."""

  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


def evil_programs(mark):
  """Programs that would make the file `mark`, by every way a pickle has."""
  command = f'touch {mark}'
  text = command.encode()
  for protocol in range(6):
    yield f'reduce {protocol}', pickle.dumps(
        {'a': Evil(os.system, command)}, protocol)
  yield 'inst', b'(S' + repr(command).encode() + b'\nios\nsystem\n.'
  yield 'obj', b'(cos\nsystem\nS' + repr(command).encode() + b'\no.'
  yield 'newobj', (b'\x80\x02cos\nsystem\nX' + len(text).to_bytes(4, 'little')
                   + text + b'\x85\x81.')
  yield 'eval', pickle.dumps(Evil(eval, f'open({str(mark)!r}, "w")'))
  yield 'getattr', pickle.dumps(Evil(getattr, evil_programs, '__code__'))
  yield 'build', (  # __setstate__ of a function, of a class, of a dict
      b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__code__'
      b'K\x01sb.')
  yield 'build ordered', (
      b'\x80\x02ccollections\nOrderedDict\n)R}X\x09\x00\x00\x00__class__cos\n'
      b'system\nsb.')
  yield 'dotted', (
      b'\x80\x04\x8c\x0ctorch._utils\x8c\x1e_rebuild_tensor_v2.__globals__\x93.')
  yield 'storage from bytes', (
      b'\x80\x02ctorch.storage\n_load_from_bytes\nX\x01\x00\x00\x00a\x85R.')
  yield 'extension', b'\x80\x02\x82\x01.'
  yield 'persistent text', b'Pos.system\n.'
  yield 'persistent global', b'\x80\x02cos\nsystem\nQ.'


def test_no_pickle_runs(tmp_path, monkeypatch):
  mark = tmp_path / 'control'
  pickle.loads(dict(evil_programs(mark))['reduce 2'])
  assert mark.exists()  # what such a program does where it is run
  mark = tmp_path / 'ran'
  programs = dict(evil_programs(mark))
  for name in ('loads', 'load', 'Unpickler'):
    monkeypatch.setattr(pickle, name, None)
  before = set(sys.modules)
  for name, program in programs.items():
    path = torch_zip(tmp_path / f'{name}.pt', program)
    with pytest.raises(errors.UserError) as caught:
      files.open(path)
    assert not mark.exists(), name
    assert '\n' not in str(caught.value)
    bare = tmp_path / f'{name}.bin'
    bare.write_bytes(program)
    with pytest.raises(errors.UserError):
      files.open(bare)
  new = {name for name in set(sys.modules) - before
         if not name.startswith('encodings.')}  # of the texts themselves
  assert not new and not mark.exists()


@pytest.mark.parametrize('name, said', [
    ('reduce 0', "asks for '(posix|nt).system'"),
    ('reduce 2', "asks for '(posix|nt).system'"),
    ('reduce 4', "asks for '(posix|nt).system'"),
    ('inst', "asks for 'INST os system'"),
    ('eval', "asks for 'builtins.eval'"),
    ('dotted', 'torch._utils._rebuild_tensor_v2.__globals__'),
    ('storage from bytes', 'torch.storage._load_from_bytes'),
    ('extension', "asks for 'EXT1 1'"),
    ('build', 'pickle is cut off or garbled'),
])
def test_a_refusal_names_what_was_asked_for(tmp_path, name, said):
  program = dict(evil_programs(tmp_path / 'ran'))[name]
  refused(torch_zip(tmp_path / 'a.pt', program), said)


def test_the_machine_knows_only_its_table():
  # The one place where a name of a file turns into something of ours.
  assert all(isinstance(made, np.dtype) or made.__module__ == pickles.__name__
             for made in pickles.NAMES.values())


def test_pickles_cannot_take_for_ever(tmp_path):
  # Each tuple, then each dict, holds the one before twice: 2^60 if followed.
  twice = b'\x80\x02)' + b'q\x00h\x00\x86' * 60
  refused(torch_zip(tmp_path / 'key.pt', b'\x80\x02}' + twice[2:] + b'K\x01s.'),
          'garbled')
  dicts = b'\x80\x02}' + b'q\x00}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh' \
      b'\x00u' * 60
  refused(torch_zip(tmp_path / 'dict.pt', dicts + b'.'), 'holds no tensors')
  loop = b'\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.'
  refused(torch_zip(tmp_path / 'loop.pt', loop), 'holds no tensors')


def tensor_program(name=b'x', elements=4, start=0, shape=(2, 2),
                   strides=(2, 1), kind=b'FloatStorage', key=b'0', end=b'tR'):
  """The pickle of {name: one tensor}."""
  word = lambda text: b'X' + len(text).to_bytes(4, 'little') + text
  number = lambda n: b'\x8a\x09' + n.to_bytes(9, 'little', signed=True)
  group = lambda numbers: b'(' + b''.join(map(number, numbers)) + b't'
  return (b'\x80\x02}' + word(name) + b'ctorch._utils\n_rebuild_tensor_v2\n(('
          + word(b'storage') + b'ctorch\n' + kind + b'\n' + word(key)
          + word(b'cpu') + number(elements) + b'tQ' + number(start)
          + group(shape) + group(strides) + b'\x89}' + end + b's.')


@pytest.mark.parametrize('fields, said', [
    (dict(), None),
    (dict(start=1), 'reaches beyond its storage'),
    (dict(strides=(3, 1)), 'reaches beyond its storage'),
    (dict(shape=(2**20, 2**20)), 'reaches beyond its storage'),
    (dict(shape=(2**62, 2**62)), 'garbled'),
    (dict(shape=(0, 2**62)), 'garbled'),
    (dict(shape=(1,) * 33, strides=(1,) * 33), 'garbled'),
    (dict(shape=(2**20, 4), strides=(0, 1)), '16777216 bytes, and their stora'),
    (dict(shape=(2, 3)), 'reaches beyond its storage'),
    (dict(start=-1), 'garbled'),
    (dict(strides=(-2, 1)), 'garbled'),
    (dict(shape=(-2, 2)), 'garbled'),
    (dict(shape=(2,)), 'garbled'),
    (dict(elements=5), '16 bytes, and 5 of float32'),
    (dict(elements=2**62), '16 bytes, and 4611686018427387904 of float32'),
    (dict(key=b'1'), "storage '1' has 0 bytes"),
    (dict(key=b'../../data.pkl'), 'has 0 bytes'),
    (dict(kind=b'QInt8Storage'), "asks for 'torch.QInt8Storage'"),
    (dict(name=b'\x1b[31m'), 'none with proper names'),
])
def test_pytorch_sizes_are_checked(tmp_path, fields, said):
  path = torch_zip(tmp_path / 'a.pt', tensor_program(**fields),
                   {'0': np.arange(4, dtype=np.float32).tobytes()})
  if said is None:
    np.testing.assert_array_equal(
        files.open(path)['x'].array(), [[0, 1], [2, 3]])
  else:
    refused(path, said)


def test_tensors_without_elements_and_of_bytes(tmp_path):
  storages = {'0': np.arange(4, dtype=np.float32).tobytes()}
  program = tensor_program(elements=0, shape=(3, 0), strides=(1, 1))
  path = torch_zip(tmp_path / 'none.pt', program, storages)
  assert files.open(path)['x'].array().shape == (3, 0)
  for shape in (2, 2), (2, 3):  # of a storage without a dtype of its own
    program = tensor_program(
        elements=16, shape=shape, kind=b'UntypedStorage',
        end=b'ctorch\nfloat32\ntR').replace(b'tensor_v2', b'tensor_v3')
    program = program.replace(b'ctorch\nUntyped', b'ctorch.storage\nUntyped')
    path = torch_zip(tmp_path / 'bytes.pt', program, storages)
    if shape == (2, 2):
      assert files.open(path)['x'].array().tolist() == [[0, 1], [2, 3]]
    else:
      refused(path, 'reaches beyond its storage')


def pickled(items):
  """The pickle of a dict; keys and values are programs."""
  return b'\x80\x02}(' + b''.join(map(b''.join, items)) + b'u.'


def test_a_tensor_has_a_name_of_its_own(tmp_path):
  word = lambda text: b'X' + len(text).to_bytes(4, 'little') + text
  value = tensor_program().removeprefix(b'\x80\x02}' + word(b'x'))[:-2]
  within = b'}' + word(b'b') + value + b's'
  storages = {'0': bytes(16)}
  for items, name in (
      ([(word(b'a.b'), value), (word(b'a'), within)], 'a.b'),
      ([(word(b'1'), value), (b'K\x01', value)], '1')):
    path = torch_zip(tmp_path / 'a.pt', pickled(items), storages)
    refused(path, f"'{name}' is the name of several tensors")
  items = [(word(name), value) for name in (b'a', b'b')]  # tied matrices
  path = torch_zip(tmp_path / 'b.pt', pickled(items), storages)
  assert list(files.open(path)) == ['a', 'b']


def test_numbers_cannot_be_made_to_collide():
  """All multiples of 2^61 - 1 have one hash."""
  long = lambda n: b'\x8a\x09' + n.to_bytes(9, 'little', signed=True)
  for key in (2**61 - 1, 2**20, -1):
    with pytest.raises(pickles.Corrupt, match='garbled'):
      pickles.read(pickled([(long(key), b'N')]))
  assert pickles.read(pickled([(long(2**20 - 1), b'N')])) == {2**20 - 1: None}
  with pytest.raises(pickles.Corrupt, match='garbled'):
    pickles.read(b'\x80\x02}p9\n.')
  assert pickles.read(b'\x80\x02}q\x00}q\x01h\x00.') == {}


def test_small_files_stay_small(tmp_path):
  """A little of a zip file can be said to be much."""
  def refused_at_once(path, said):
    tracemalloc.start()
    refused(path, said)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()

  path = tmp_path / 'a.pt'
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('a/data.pkl', b'\x80\x02}.', zipfile.ZIP_STORED)
    archive.writestr('a/byteorder', bytes(2**23))
  refused_at_once(path, 'byte order is')
  path = tmp_path / 'a.npz'
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('x.npy', b'\x93NUMPY\x02\x00' + (2**23).to_bytes(
        4, 'little') + b' ' * 2**23)
  refused_at_once(path, 'x.npy has the header')
  # Two names of one place.
  torch_zip(path, tensor_program(), {'0': bytes(9999), '1': b''})
  content = bytearray(path.read_bytes())
  first, last = content.index(b'PK\1\2'), content.rindex(b'PK\1\2')
  entry = content.index(b'PK\1\2', first + 1)
  for field in slice(20, 28), slice(42, 46):  # sizes, and where
    content[last + field.start:last + field.stop] = content[
        entry + field.start:entry + field.stop]
  path.write_bytes(content)
  refused(path, 'directory is wrong')


def test_attributes_of_dicts_are_left():
  program = b'\x80\x02ccollections\nOrderedDict\n)R}X\x01\x00\x00\x00aK\x01sb.'
  assert pickles.read(program) == {}
  module = program.replace(b'collections\nOrdered', b'__torch__\nOrdered')
  assert pickles.read(module) == {'a': 1}


def test_pytorch_archives_are_checked(tmp_path):
  storages = {'0': bytes(16)}
  good = tensor_program()
  torch_zip(tmp_path / 'big.pt', good, storages, byteorder=b'big')
  refused(tmp_path / 'big.pt', "byte order is b'big'")
  torch_zip(tmp_path / 'little.pt', good, storages, byteorder=b'little')
  assert list(files.open(tmp_path / 'little.pt')) == ['x']
  twice = b'\x80\x02}' + b'X\x01\x00\x00\x00aK\x01s' * 2 + b'.'
  refused(torch_zip(tmp_path / 'twice.pt', twice), "'a' stands twice")
  path = tmp_path / 'squeezed.pt'
  for kind, said in ((zipfile.ZIP_STORED, "storage '0' has 16 bytes"),
                     (zipfile.ZIP_DEFLATED, 'its pickle is compressed')):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
      archive.writestr('a/data.pkl', good, kind)
      archive.writestr('a/data/0', bytes(16))
    refused(path, said)
  whole = (tmp_path / 'little.pt').read_bytes()
  for size in (3, 30, len(whole) // 2, len(whole) - 1):
    path.write_bytes(whole[:size])
    refused(path, 'cut off or damaged|none of safetensors')


def test_names_of_members_are_no_paths(tmp_path):
  inner = tmp_path / 'in'
  inner.mkdir()
  (tmp_path / 'secret').write_bytes(bytes(16))
  path = inner / 'a.pt'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('../a/data.pkl', tensor_program(key=b'../../../secret'))
    archive.writestr('/etc/passwd', b'')
  refused(path, 'has 0 bytes')
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('../../a/data.pkl', tensor_program(key=b'../up'))
    archive.writestr('../../a/data/../up', bytes(16))
  assert files.open(path)['x'].array().sum() == 0
  assert sorted(p.name for p in tmp_path.rglob('*')) == ['a.pt', 'in', 'secret']


def test_zip_directories_are_checked(tmp_path):
  path = torch_zip(tmp_path / 'a.pt', tensor_program(),
                   {'1': bytes(200), '0': bytes(16)})
  whole = path.read_bytes()
  entry = whole.rindex(b'PK\1\2')  # of storage 0, in the directory
  inside = whole.index(bytes(200))
  large = (2**31).to_bytes(4, 'little')
  for at, value, said in (
      (20, large, 'directory is wrong'),  # bytes in the archive
      (20, large + large, 'directory is wrong'),  # and when unpacked
      (42, inside.to_bytes(4, 'little'), 'directory is wrong'),  # its place
      (42, len(whole).to_bytes(4, 'little'), 'damaged')):
    broken = bytearray(whole)
    broken[entry + at:entry + at + len(value)] = value
    path.write_bytes(broken)
    refused(path, said)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('a/data.pkl', tensor_program())
    with pytest.warns(UserWarning, match='Duplicate'):
      archive.writestr('a/data/0', bytes(16))
      archive.writestr('a/data/0', bytes(16))
  refused(path, "directory is wrong about 'a/data/0'")


def test_npz_is_checked(tmp_path):
  path = tmp_path / 'a.npz'
  np.savez(path, x=np.array([{}], object))
  refused(path, "unknown dtype '|O'".replace('|', r'\|'))
  np.savez(path, x=np.arange(3, dtype='>f4'))
  refused(path, "unknown dtype '>f4'")
  memory = io.BytesIO()
  np.save(memory, np.zeros((2, 3)))
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('x.npy', memory.getvalue().replace(b'(2, 3)', b'(9, 9)'))
  refused(path, 'has 48 bytes')


@pytest.mark.parametrize('text, said', [
    (SHAPED % '(3,)', None),
    ("{'shape': (3,), 'descr': '<f4', 'fortran_order': True}", None),
    ('(' * 900, 'has the header'), ('-' * 9000 + '1', 'has the header'),
    ('[' * 150 + ']' * 150, 'has the header'), (' ' * 10_001, 'has the header'),
    ("{'descr': '<f4', 'fortran_order': False}", 'has the header'),
    ("{'descr': '<f4', 'fortran_order': 1, 'shape': (3,)}", 'the header'),
    ("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,)}",
     'has the header'),
    (SHAPED % '(-3,)', 'the header'), (SHAPED % '(True,)', 'header'),
    (SHAPED % f'(0, {10**30})', 'has the shape'),
    (SHAPED % f'({"9" * 5000},)', 'damaged'),
    (SHAPED % '(3 3,)', 'damaged'),
    (SHAPED % ('(' + '1,' * 33 + ')'), 'has the shape')])
def test_headers_of_npy_are_read_by_no_parser(tmp_path, text, said):
  text = text.encode() + b'\n'
  path = tmp_path / 'a.npz'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('x.npy', b'\x93NUMPY\x01\x00' + len(text).to_bytes(
        2, 'little') + text + np.arange(3, dtype='<f4').tobytes())
  if said is None:
    assert files.open(path)['x'].array().tolist() == [0, 1, 2]
  else:
    refused(path, said)


# ---------------------------------------------------------------------------
# safetensors that cannot be


def header(**tensors):
  text = json.dumps(tensors).encode()
  return len(text).to_bytes(8, 'little') + text


def entry(start, stop, shape=(2,), dtype='F32'):
  return dict(dtype=dtype, shape=shape, data_offsets=[start, stop])


@pytest.mark.parametrize('content, said', [
    (header(a=entry(0, 8), b=entry(8, 16)) + bytes(15), 'take 16 bytes'),
    (header(a=entry(0, 8), b=entry(8, 16)) + bytes(17), 'take 16 bytes'),
    (header(a=entry(0, 8), b=entry(4, 12)) + bytes(12), 'bytes 4 to 12'),
    (header(a=entry(0, 8), b=entry(12, 20)) + bytes(20), 'bytes 12 to 20'),
    (header(a=entry(0, 12)) + bytes(12), 'bytes 0 to 12'),
    (header(a=entry(8, 0)) + bytes(8), 'bytes 8 to 0'),
    (header(a=entry(-8, 0)) + bytes(8), 'has the shape'),
    (header(a=entry(0, 8, (-2,))) + bytes(8), 'has the shape'),
    (header(a=entry(0, 8, (2.0,))) + bytes(8), 'has the shape'),
    (header(a=entry(0, 8, (True, 2))) + bytes(8), 'has the shape'),
    (header(a=entry(0, 8, (2**20, 2**20))) + bytes(8), 'bytes 0 to 8'),
    (header(a=entry(0, 2**40, (2**40,), 'U8')) + bytes(8), 'take 10995'),
    (header(a=entry(0, 8, (2**40, 2**40))) + bytes(8), 'has the shape'),
    (header(a=entry(0, 8, (1,) * 10**6)) + bytes(8), r'a has the shape \[1, 1'),
    (header(a=entry(0, 0, (0, 10**30))), 'has the shape'),
    (header(a=entry(0, 8, dtype='F31')) + bytes(8), "unknown dtype 'F31'"),
    (header(a=entry(0, 8, dtype=[])) + bytes(8), 'damaged'),
    (header(a=dict(dtype='F32', shape=[2])) + bytes(8), 'damaged'),
    (header(a=[1]) + bytes(8), 'damaged'),
    (header(a=dict(entry(0, 8), data_offsets=[0, 4, 8])) + bytes(8), 'damaged'),
    (header(), 'no tensors'),
    ((100).to_bytes(8, 'little') + b'{}', 'said to have 100 bytes'),
    ((2**63).to_bytes(8, 'little') + b'{}', 'said to have 9223372036854775808'),
    ((2).to_bytes(8, 'little') + b'{', 'said to have 2 bytes'),
    ((2).to_bytes(8, 'little') + b'{]', 'damaged'),
    ((9).to_bytes(8, 'little') + b'{"\xff": 1}', 'damaged'),
    (b'', 'none of safetensors'),
    (b'ten bytes!', 'none of safetensors'),
    (b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
    (b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.', 'PyTorch before 1.6'),
])
def test_damaged_files_are_one_line(tmp_path, content, said):
  path = tmp_path / 'a.safetensors'
  path.write_bytes(content)
  refused(path, said)


def test_a_name_stands_once(tmp_path):
  one = json.dumps(entry(0, 8))
  text = f'{{"a": {one}, "a": {one}}}'.encode()
  path = tmp_path / 'a.safetensors'
  path.write_bytes(len(text).to_bytes(8, 'little') + text + bytes(8))
  refused(path, "has 'a' twice")
  text = b'{"a":' * 5000 + b'1' + b'}' * 5000
  path.write_bytes(len(text).to_bytes(8, 'little') + text)
  refused(path, 'damaged')


def test_damage_anywhere_is_an_error_or_harmless(tmp_path):
  """Random bytes: whatever is still opened, can be read."""
  rng = np.random.default_rng(0)
  np.savez_compressed(tmp_path / 'c.npz', a=np.arange(9.0))
  files.write(tmp_path / 'd.safetensors', {'a': np.arange(9.0)})
  sources = [GOLDEN / 'strided.pt', GOLDEN / 'script.pt', tmp_path / 'c.npz',
             tmp_path / 'd.safetensors']
  opened = 0
  for i in range(400):
    source = sources[i % len(sources)]
    content = bytearray(source.read_bytes())
    for at in rng.integers(0, len(content), rng.integers(1, 6)):
      content[at] = rng.integers(256)
    path = tmp_path / f'broken{source.suffix}'
    path.write_bytes(content[:len(content) - i % 5 * 7])
    try:
      found = files.open(path)
    except errors.UserError:
      continue
    opened += 1
    for tensor in found.values():
      if tensor.member is None and tensor.nbytes < 10**6:
        tensor.array().tobytes()
  assert 0 < opened < 300


def test_damaged_pickles_are_errors_or_harmless():
  program = zipfile.ZipFile(GOLDEN / 'strided.pt').read('strided/data.pkl')
  rng = np.random.default_rng(0)
  for _ in range(2000):
    broken = bytearray(program)
    for at in rng.integers(0, len(broken), 3):
      broken[at] = rng.integers(256)
    try:
      pickles.read(bytes(broken))
    except (pickles.Refused, pickles.Corrupt):
      pass
