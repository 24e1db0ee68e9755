"""The check of weights, without references: these are in tests/parity/."""

import pathlib
import sys

import ml_dtypes
import numpy as np
import published_files
import pytest
from rich import console as rich_console

from mmgen import convert
from mmgen import errors
from mmgen import parity
from mmgen import stages

GOLDEN = pathlib.Path(__file__).parent / 'golden'
SIGLIP = GOLDEN / 'weights' / 'hf_siglip'
LLAVA = dict(
    model_type='llava', image_token_index=41, text_config=dict(
        model_type='llama', num_attention_heads=7, rms_norm_eps=1e-5),
    vision_config=dict(model_type='clip_vision_model', image_size=17,
                       patch_size=5, num_attention_heads=3))


def run(*args):
  return convert.main([str(arg) for arg in args])


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """Our inputs and stages of a SigLIP, as the command writes them."""
  path = tmp_path_factory.mktemp('written') / 'ours.npz'
  assert run(f'--check={SIGLIP}', f'--stages={path}') == 0
  return path


def test_stages_compare_with_those_of_a_file(written, tmp_path, capsys):
  with np.load(written) as file:
    found = dict(file)
  assert found['input/picture/1'].shape[:2] != found['input/images'].shape[1:3]
  lengths = found['input/valid'].sum(1)
  assert len(set(lengths)) == 3
  inputs = {name for name in found if name.startswith('input/')}
  found['text/1'][0, 0, 0] *= 1.1
  found['text/3'] = found.pop('text/2')[:, 1:]
  np.savez(tmp_path / 'theirs.npz', **found)
  against = f'--against={tmp_path / "theirs.npz"}'
  assert run(f'--check={SIGLIP}', against) == 1
  said = capsys.readouterr().out
  assert 'text/1 is the first of' in said and 'only here: text/2' in said
  assert run(f'--check={SIGLIP}', against, '--tolerance=1') == 0
  said = capsys.readouterr().out
  assert f'{len(found) - len(inputs) - 1} stages are equal within' in said


def test_what_cannot_be_compared(tmp_path, capsys):
  console, two = rich_console.Console(), np.ones((2, 3))
  assert parity.report('', {'a': two, 'b': two}, {'a': two, 'b': two[1:]}, 9,
                       console) == 1
  said = capsys.readouterr().out
  assert 'there 1 x 3' in said and 'b is the first of 2 stages' in said
  nothing = np.full((2, 3), np.nan)
  assert parity.report('', {'a': nothing}, {'a': two}, 9, console) == 1
  with pytest.raises(errors.UserError, match='no stage that both .*: a'):
    parity.report('', {'a': two}, {'b': two}, 9, console)


def test_what_the_model_returns_must_be_compared(capsys):
  console, two = rich_console.Console(), np.ones((2, 3))
  ours = {'vision/pixels': two, 'vision/1': two, 'logits': two, 'other': two}
  for theirs, code in ((['vision/pixels'], 1), (['vision/pixels', 'other'], 1),
                       (['logits'], 0)):
    assert parity.report('', ours, dict.fromkeys(theirs, two), 9,
                         console) == code
    said = capsys.readouterr().out
    assert ('logits is not among them' in said) == bool(code)
  assert parity.report('', ours, {'vision/1': two}, 9, console,
                       last='vision/1') == 0
  tower = {'vision/1': two, 'vision/embedding': two, 'predicted': two}
  assert parity.report('', tower, {'vision/1': two}, 9, console) == 1
  assert parity.report('', tower, {'vision/embedding': two}, 9, console) == 0


def test_stages_of_nothing_are_equal():
  console, none = rich_console.Console(), np.ones((0, 3))
  assert parity.relative_error(none, none) == 0
  assert parity.report('', {'a': none}, {'a': none}, 9, console) == 0
  assert parity.report('', {'a': none}, {'a': none[:, 1:]}, 9, console) == 1


def test_a_file_that_cannot_be_read(tmp_path):
  for content in (b'junk', b'PK\x03\x04junk', b'\x93NUMPY'):
    (tmp_path / 'a.npz').write_bytes(content)
    with pytest.raises(errors.UserError, match='--against=.*cannot be read'):
      run(f'--check={SIGLIP}', f'--against={tmp_path / "a.npz"}')


@pytest.fixture(scope='module')
def llava(tmp_path_factory):
  """A LLaVA in bfloat16, and the same numbers in float32."""
  with np.load(GOLDEN / 'llava_square.npz') as file:
    narrow = {name.removeprefix('weights/'): file[name].astype(
        ml_dtypes.bfloat16) for name in file if name.startswith('weights/')}
  base = tmp_path_factory.mktemp('llava')
  published_files.save(base / 'narrow', narrow, LLAVA)
  published_files.save(base / 'wide', {
      name: x.astype(np.float32) for name, x in narrow.items()}, LLAVA)
  return base


def test_narrow_weights_are_computed_with_in_float32(llava):
  found = []
  for name in ('narrow', 'wide'):
    loaded = stages.load(llava / name, None)
    inputs = stages.inputs(loaded)
    kernel = loaded.params['decoder']['stack']['blocks']['mlp']['up']['kernel']
    assert kernel.dtype == ('bfloat16' if name == 'narrow' else 'float32')
    found.append(stages.compute(loaded, inputs))
  slots = inputs['segments'] > 0
  assert len(set(slots.sum(1))) == 3 and not slots.all()
  assert (inputs['tokens'] == 41).sum() == (inputs['visual'] >= 0).sum() == 27
  assert list(found[0]) == [
      'vision/pixels', *(f'vision/{i}' for i in range(4)), 'connector',
      *(f'decoder/{i}' for i in range(3)), 'decoder/hidden', 'logits']
  assert found[0]['connector'].shape == (27, 28)
  assert found[0]['logits'].shape == (slots.sum(), 43)
  for name in found[0]:
    np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-6,
                               atol=1e-6)


def test_what_is_missing_is_said(monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(errors.UserError, match=r'torch cannot be imported .*'
                     r"pip install 'mmgen\[parity\]'"):
    run(f'--check={SIGLIP}')
  said = ['vision.placement=pre', 'text.mlp=gelu', 'text.heads=2']
  with pytest.raises(errors.UserError, match='eva_clip_old no package index '
                     'has a reference.*--stages=FILE.npz'):
    run(f'--check={GOLDEN / "weights" / "eva_wrapped.pt"}',
        *(f'--say={field}' for field in said))
  with pytest.raises(errors.UserError, match='projector, which is not a whole'):
    run(f'--check={GOLDEN / "weights" / "mm_projector.bin"}', '--stages=a.npz')


@pytest.mark.parametrize('args', [
    (), ('--from=a',), ('--to=a',), ('--check=a', '--from=b', '--to=c'),
    ('--check=a', '--to=c')])
def test_a_command_does_one_thing(args, capsys):
  with pytest.raises(SystemExit):
    run(*args)
  assert 'give --from and --to, or --check' in capsys.readouterr().err


def test_torch_is_no_need_of_any_module():
  """Only functions of mmgen/references.py may import it."""
  wanted = {'torch', 'torchvision', 'transformers', 'timm', 'open_clip'}
  for path in sorted(pathlib.Path(convert.__file__).parent.rglob('*.py')):
    for line in path.read_text().splitlines():
      words = line.split()
      if words[:1] in (['import'], ['from']) and (
          words[1].partition('.')[0] in wanted):
        assert path.name == 'references.py' and line[0] == ' ', (path, line)
