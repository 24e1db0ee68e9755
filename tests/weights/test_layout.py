"""Rules both ways, what is wrong with a file, loading into any sharding."""

import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from mmgen import errors
from mmgen.weights import files
from mmgen.weights import layout

N, H, D, F, L, P, V = 3, 4, 8, 16, 6, 2, 24
QKV = [f'stack/blocks/attention/{name}' for name in ('query', 'key', 'value')]
RULES = [
    layout.same('embedding', 'wte', lead=1),
    layout.same('scale', 'scale', lead=1),
    *layout.patches('stem', 'conv', P),
    *layout.fused(QKV, 'h.{layer}.qkv', 'h.{layer}.qkv_bias'),
    *layout.linear('stack/blocks/attention/out', 'h.{layer}.out'),
    *layout.modules({'norm': 'ln', 'mlp/up': 'fc'}, 'stack/blocks/',
                    'h.{layer}.'),
    *layout.fused(['probe'], 'probe.weight'),
    *layout.linear('head', 'head', bias=False)]
OURS = {
    'embedding': (V, D), 'scale': (), 'stem/kernel': (P * P * 3, D),
    'stem/bias': (D,),
    **{f'{name}/kernel': (L, D, N * H) for name in QKV},
    **{f'{name}/bias': (L, N * H) for name in QKV},
    'stack/blocks/attention/out/kernel': (L, N * H, D),
    'stack/blocks/attention/out/bias': (L, D),
    'stack/blocks/norm/scale': (L, D), 'stack/blocks/norm/bias': (L, D),
    'stack/blocks/mlp/up/kernel': (L, D, F), 'stack/blocks/mlp/up/bias': (L, F),
    'probe/kernel': (D, N * H), 'head/kernel': (D, V)}
THEIRS = {
    'wte': (1, V, D), 'scale': (1,), 'conv.weight': (D, 3, P, P),
    'conv.bias': (D,), 'probe.weight': (N * H, D), 'head.weight': (V, D)}
for i in range(L):
  THEIRS |= {
      f'h.{i}.qkv': (3 * N * H, D), f'h.{i}.qkv_bias': (3 * N * H,),
      f'h.{i}.out.weight': (D, N * H), f'h.{i}.out.bias': (D,),
      f'h.{i}.ln.weight': (D,), f'h.{i}.ln.bias': (D,),
      f'h.{i}.fc.weight': (F, D), f'h.{i}.fc.bias': (F,)}
ABSTRACT = {name: jax.ShapeDtypeStruct(shape, 'float32')
            for name, shape in OURS.items()}


def random_arrays(dtype='float32'):
  rng = np.random.default_rng(0)
  return {name: rng.standard_normal(shape).astype(dtype)
          for name, shape in THEIRS.items()}


def test_expected_names_and_shapes():
  assert layout.expected(RULES, ABSTRACT) == THEIRS


def test_a_name_is_no_template():
  assert layout.of_layer('{0}{.{layer:>9}.{layer}', 3) == '{0}{.{layer:>9}.3'


def test_rules_do_the_arithmetic_of_their_modules():
  rng = np.random.default_rng(0)
  arrays = random_arrays()
  ours = {name: array for rule in RULES if not rule.layered
          for name, array in zip(rule.ours, rule.to_ours(
              *(arrays[name] for name in rule.theirs)))}
  ours |= {name: array for rule in RULES if rule.layered
           for name, array in zip(rule.ours, rule.to_ours(
               *(arrays[name.format(layer=1)] for name in rule.theirs)))}
  x = rng.standard_normal((7, D)).astype(np.float32)
  q, k, v = np.split(x @ arrays['h.1.qkv'].T + arrays['h.1.qkv_bias'], 3, 1)
  for name, expected in zip(QKV, (q, k, v)):
    np.testing.assert_allclose(
        x @ ours[f'{name}/kernel'] + ours[f'{name}/bias'], expected, rtol=1e-5,
        atol=1e-6)
  np.testing.assert_allclose(
      v @ ours['stack/blocks/attention/out/kernel'],
      v @ arrays['h.1.out.weight'].T, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(x @ ours['head/kernel'],
                             x @ arrays['head.weight'].T, rtol=1e-5, atol=1e-6)
  picture = rng.standard_normal((P, P, 3)).astype(np.float32)  # rows, columns
  np.testing.assert_allclose(
      picture.reshape(-1) @ ours['stem/kernel'],
      np.einsum('yxc,wcyx->w', picture, arrays['conv.weight']), rtol=1e-5,
      atol=1e-6)


def test_rules_return_views_and_invert():
  arrays = random_arrays()
  for rule in RULES:
    theirs = [arrays[name.format(layer=2)] for name in rule.theirs]
    ours = rule.to_ours(*theirs)
    for array in ours if rule.theirs != ('conv.weight',) else ():
      assert any(np.shares_memory(array, other) for other in theirs), rule.ours
    for back, other in zip(rule.to_theirs(*ours), theirs):
      np.testing.assert_array_equal(back, other)
      assert back.shape == other.shape


# ---------------------------------------------------------------------------


def complaint(tensors, ignored=()):
  with pytest.raises(errors.UserError) as caught:
    layout.check(RULES, tensors, ABSTRACT, ignored, 'a.pt')
  return str(caught.value)


def test_check_lists_everything_at_once():
  arrays = random_arrays()
  layout.check(RULES, arrays, ABSTRACT)
  arrays['h.3.mlp.fc.weight'] = arrays.pop('h.3.fc.weight')  # renamed
  del arrays['wte']  # missing
  arrays['rope.freqs'] = np.zeros(3)  # extra
  arrays['h.0.ln.bias'] = np.zeros(D + 1)  # wrongly shaped
  arrays['h.1.qkv'] = arrays['h.1.qkv'].T
  arrays['h.2.out.weight'] = arrays['h.2.out.weight'].astype(np.int8)
  said = complaint(arrays)
  assert said.startswith('a.pt does not fit the model, nothing of it is loaded')
  for part in (
      'h.3.fc.weight is missing (nearest there: h.3.mlp.fc.weight)',
      'h.3.mlp.fc.weight is extra (nearest expected: h.3.fc.weight)',
      'wte is missing', 'rope.freqs is extra', 'h.0.ln.bias is [9], not [8]',
      'h.1.qkv is [8, 36], not [36, 8]',
      'h.2.out.weight holds int8, no floating numbers'):
    assert part in said
  assert said.count(';') == 6 and '\n' not in said
  assert 'rope' not in complaint(arrays, ignored=(r'rope\..*',))
  assert 'rope' in complaint(arrays, ignored=(r'rope',))  # whole names only


def test_the_nearest_name_is_told_of_as_many_as_one_reads():
  """Each takes a comparison with all the others."""
  arrays = random_arrays() | {f'h.0.lm.{i:02}': np.zeros(3) for i in range(60)}
  del arrays['h.0.ln.bias'], arrays['wte']
  said = complaint(arrays)
  assert said.count(' is extra') == 60
  assert 'h.0.ln.bias is missing (nearest there: h.0.lm.' in said
  assert said.count(' is extra (nearest expected: h.0.ln.bias)') == 50


def test_check_refuses_rules_with_holes():
  ours = ABSTRACT | {'forgotten': jax.ShapeDtypeStruct((1,), 'float32')}
  with pytest.raises(ValueError, match='forgotten'):
    layout.check(RULES, random_arrays(), ours)


# ---------------------------------------------------------------------------


def test_one_device_gets_the_rules_results(tmp_path):
  arrays = random_arrays()
  files.write(tmp_path / 'a.safetensors', arrays)
  params = layout.load(RULES, files.open(tmp_path / 'a.safetensors'), ABSTRACT)
  assert {name: x.shape for name, x in params.items()} == OURS
  np.testing.assert_array_equal(
      params[f'{QKV[1]}/kernel'][2],
      arrays['h.2.qkv'][N * H:2 * N * H].T)
  back = dict(layout.export(RULES, params, 'float32'))
  assert back.keys() == arrays.keys()
  for name, array in back.items():
    assert array.tobytes() == arrays[name].tobytes()


@pytest.mark.parametrize('dtype', ['float16', ml_dtypes.bfloat16])
def test_eight_devices_get_their_shards(tmp_path, dtype):
  arrays = random_arrays(dtype)
  files.write(tmp_path, arrays, max_shard_bytes=1000)
  mesh = jax.make_mesh((2, 4), ('a', 'b'))
  def sharding(name, shape):
    axes = [None] * len(shape)
    for axis, ways in (('b', 4), ('a', 2)):  # any axis that divides
      fits = [i for i, n in enumerate(shape) if not n % ways and not axes[i]]
      if fits:
        axes[fits[-1]] = axis
    return jax.NamedSharding(mesh, jax.P(*axes))
  target = {name: jax.ShapeDtypeStruct(shape, 'float32',
                                       sharding=sharding(name, shape))
            for name, shape in OURS.items()}
  tensors = files.open(tmp_path)
  params = layout.load(RULES, tensors, target)
  whole = layout.load(RULES, tensors, ABSTRACT)
  split = 0
  for name, array in params.items():
    assert array.dtype == np.float32
    assert array.sharding == target[name].sharding
    split += not array.is_fully_replicated
    np.testing.assert_array_equal(np.asarray(array), np.asarray(whole[name]))
  assert split > 12
  part = layout.load(RULES, tensors, {'head/kernel': target['head/kernel']})
  assert list(part) == ['head/kernel']
  dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
  for name, array in layout.export(RULES, params, dtypes):
    assert array.dtype == dtype
    assert array.tobytes() == arrays[name].tobytes()


def test_report_says_where_each_leaf_comes_from():
  rows = layout.report(RULES, random_arrays('float16'), ABSTRACT)
  assert [row[0] for row in rows] == [
      name for rule in RULES for name in rule.ours]
  assert (f'{QKV[0]}/kernel', ('h.{layer}.qkv',), (L, D, N * H),
          'float16') in rows


_PEAK = '''
import sys
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', int(sys.argv[2]))
import numpy as np
from mmgen.weights import files, layout

rules = [*layout.fused(['blocks/q', 'blocks/k', 'blocks/v'], 'h.{layer}.qkv'),
         *layout.linear('blocks/up', 'h.{layer}.up', bias=False),
         layout.same('embedding', 'embedding')]
shapes = {f'blocks/{name}/kernel': (8, 1024, 1024) for name in 'qkv'}
shapes |= {'blocks/up/kernel': (8, 1024, 3072), 'embedding': (8192, 1024)}
if sys.argv[3] == 'write':
  ours = {name: jax.ShapeDtypeStruct(shape, 'bfloat16')
          for name, shape in shapes.items()}
  rng = np.random.default_rng(0)
  files.write(sys.argv[1], (
      (name, rng.integers(0, 2**14, shape, np.uint16).view('bfloat16'))
      for name, shape in layout.expected(rules, ours).items()),
              max_shard_bytes=20_000_000)
  sys.exit()

mesh = jax.make_mesh((jax.device_count(),), ('fsdp',))
tensors = files.open(sys.argv[1])
target = {
    name: jax.ShapeDtypeStruct(shape, 'bfloat16', sharding=jax.NamedSharding(
        mesh, jax.P(None, 'fsdp') if len(shape) > 2 else jax.P('fsdp')))
    for name, shape in shapes.items()}

def kilobytes(field):
  with open('/proc/self/status') as file:
    return next(int(line.split()[1]) for line in file if field in line)

with open('/proc/self/clear_refs', 'w') as file:
  file.write('5')  # the peak starts anew
before = kilobytes('VmRSS')
params = jax.block_until_ready(layout.load(rules, tensors, target))
grown = (kilobytes('VmHWM') - before) * 1024
print(grown, sum(x.nbytes for x in params.values()),
      max(t.nbytes for t in tensors.values()))
'''


@pytest.fixture(scope='module')
def large(tmp_path_factory):
  folder = tmp_path_factory.mktemp('large')
  _run_peak(folder, 1, 'write')
  return folder


def _run_peak(folder, devices, what):
  return subprocess.run(
      [sys.executable, '-c', _PEAK, str(folder), str(devices), what],
      capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('devices', [1, 8])
def test_peak_memory_is_the_share_and_one_tensor(large, devices):
  """117 MB of bfloat16; the bound holds at any size."""
  grown, share, largest = map(int, _run_peak(large, devices, 'load').split())
  assert share == 2 * (8 * 1024 * (3 * 1024 + 3072) + 8192 * 1024)
  assert grown >= share  # else this would measure nothing
  assert grown <= share + largest + 8 * 2**20
