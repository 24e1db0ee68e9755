"""The command that takes weights in and gives them back."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
from PIL import Image
import published_files
import pytest

from mmgen import config as config_lib
from mmgen import convert
from mmgen import errors
from mmgen import generate
from mmgen import run_folder
from mmgen import weights
from mmgen.data import text
from mmgen.models import clip
from mmgen.training import checkpoint
from mmgen.weights import files

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'weights'
TOKENIZERS = GOLDEN.parent / 'tokenizers'


def run(*args):
  return convert.main([str(arg) for arg in args])


def assert_same_tensors(a, b):
  a, b = files.open(a), files.open(b)
  assert a.keys() == b.keys()
  for name, tensor in a.items():
    assert (tensor.shape, tensor.dtype) == (b[name].shape, b[name].dtype)
    assert tensor.array().tobytes() == b[name].array().tobytes()


@pytest.mark.parametrize('name', ['hf_siglip', 'hf_clip_gelu'])
def test_to_a_run_folder_and_back(name, tmp_path, capsys):
  run(f'--from={GOLDEN / name}', f'--to={tmp_path / "run"}')
  assert f'{name}: hf_' in capsys.readouterr().out
  run(f'--from={tmp_path / "run"}', f'--to={tmp_path / "back"}')
  assert_same_tensors(GOLDEN / name, tmp_path / 'back')
  config = json.loads((tmp_path / 'back' / 'config.json').read_text())
  assert config == json.loads((GOLDEN / name / 'config.json').read_text())
  run(f'--from={tmp_path / "run"}', f'--to={tmp_path / "one.safetensors"}',
      '--dtype=float16')
  assert {t.dtype.name for t in files.open(
      tmp_path / 'one.safetensors').values()} == {'float16'}


def test_a_run_folder_is_one(tmp_path):
  """What opens a run, or starts from one, opens this."""
  run(f'--from={GOLDEN / "hf_clip_square"}', f'--to={tmp_path / "run"}')
  loaded = weights.load(GOLDEN / 'hf_clip_square')
  vision = checkpoint.load_params(tmp_path / 'run', 'vision')
  for a, b in zip(jax.tree.leaves(vision),
                  jax.tree.leaves({'vision': loaded.params['vision']})):
    assert a.dtype == np.float32
    np.testing.assert_array_equal(a, b)
  config = run_folder.read_config(tmp_path / 'run')
  model = config_lib.build_model(config, 37)
  assert model.config == loaded.model.config
  assert (config.image.size, config.image.fit, config.layout.length) == (
      (15, 15), 'clip', 9)
  lines = (tmp_path / 'run' / 'weights.txt').read_text().splitlines()
  assert len(lines) == len(jax.tree.leaves(loaded.params))
  assert ('vision/stack/blocks/mlp/up/kernel [3, 18, 29] <- '
          'vision_model.encoder.layers.{layer}.mlp.fc1.weight (float32)'
          ) in lines


def test_to_safetensors_with_what_must_be_said(tmp_path):
  source, to = GOLDEN / 'open_clip_oblong.pt', tmp_path / 'a.safetensors'
  with pytest.raises(errors.UserError, match='--say=mlp='):
    run(f'--from={source}', f'--to={to}')
  assert not to.exists()
  said = ('--say=mlp=gelu', '--say=vision.image_size=[10, 20]',
          '--say=vision.heads=1', '--say=text.heads=3')
  run(f'--from={source}', f'--to={to}', *said)
  assert_same_tensors(source, to)
  with pytest.raises(errors.UserError, match='exists already'):
    run(f'--from={source}', f'--to={to}', *said)
  with pytest.raises(errors.UserError, match='--say=gelu: it must be FIELD='):
    run(f'--from={source}', f'--to={tmp_path / "b"}', '--say=gelu')


def test_to_another_layout(tmp_path):
  said = {'mlp': 'quick_gelu', 'vision.heads': 3, 'text.heads': 5,
          'vision.image_size': (15, 15)}
  to = tmp_path / 'a.safetensors'
  run(f'--from={GOLDEN / "open_clip_square.pt"}', f'--to={to}',
      '--layout=hf_clip', *(f'--say={field}={json.dumps(value)}'
                            for field, value in said.items()))
  ours = weights.load(GOLDEN / 'open_clip_square.pt', said=said)
  theirs = weights.load(to, said=said)
  assert (ours.layout, theirs.layout) == ('openai_clip', 'hf_clip')
  assert ours.model.config == theirs.model.config
  jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


CLIPS = {'hf_clip': 'clip', 'openai_clip': 'open_clip', 'open_clip':
         'open_clip', 'hf_siglip': 'square'}


@pytest.mark.parametrize('layout', CLIPS)
def test_a_clip_trained_here_comes_back_unasked(layout, tmp_path):
  """Heads, activations, pictures and our own tokenizer."""
  base = clip.SIZES['siglip-b16' if layout == 'hf_siglip' else 'clip-b32']
  words = text.train(['a red fox sees a dog'] * 20, 290)
  fields = dict(layers=2, heads=8, width=128, hidden=150)
  mlp = {} if layout == 'hf_siglip' else dict(mlp='gelu')
  config = dataclasses.replace(
      base, embed=128, vision=dataclasses.replace(
          base.vision, image_size=(35, 35), patch=16, **fields | mlp),
      text=dataclasses.replace(base.text, vocab=290, length=9, **fields | mlp))
  params = jax.jit(clip.Clip(config).init)(
      jax.random.key(0), clip.example_batch(config, (35, 35)))['params']
  own = config_lib.flatten(dict(
      name='a:b', dtype='float32', layout=dict(name='pair', length=9),
      image=dict(size=(35, 35), fit=CLIPS[layout], kernel='bilinear'),
      model=dataclasses.asdict(config) | dict(name='clip', size='clip-b32')))
  checkpointer = checkpoint.Checkpointer(tmp_path / 'run')
  checkpointer.save(3, {'params': params}, {}, words)
  checkpointer.close()
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(own))
  with pytest.raises(errors.UserError, match='trained here: say --layout'):
    run(f'--from={tmp_path / "run"}', f'--to={tmp_path / "out"}')
  run(f'--from={tmp_path / "run"}', f'--to={tmp_path / "out"}',
      f'--layout={layout}')
  back = weights.load(tmp_path / 'out')
  assert (back.layout, back.model.config) == (layout, config)
  assert back.image == dict(
      size=(35, 35), fit=CLIPS[layout], kernel='bilinear',
      mean=config.vision.mean, std=config.vision.std)
  assert back.tokenizer.bytes == words
  jax.tree.map(np.testing.assert_array_equal, params, back.params)


def test_what_a_layout_cannot_say_is_an_error(tmp_path):
  run(f'--from={GOLDEN / "hf_clip_gelu"}', f'--to={tmp_path / "run"}')
  file = tmp_path / 'run' / 'config.json'
  own = json.loads(file.read_text())
  name, = [name for name in own if name.endswith('text.norm_eps')]
  file.write_text(json.dumps(own | {name: 0.25}))
  with pytest.raises(errors.UserError, match=r'open_clip cannot say that .*'
                     r'text.norm_eps is 0.25\.'):
    run(f'--from={tmp_path / "run"}', f'--to={tmp_path / "out"}',
        '--layout=open_clip')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name', ['../escaped.txt', '/tmp/escaped.txt',
                                  'model.safetensors'])
def test_a_run_folder_writes_nothing_else(name, tmp_path):
  run(f'--from={GOLDEN / "hf_siglip"}', f'--to={tmp_path / "run"}')
  changed = 0
  for path in tmp_path.rglob('*'):
    if path.is_file() and b'"beside"' in (content := path.read_bytes()):
      path.write_bytes(content.replace(b'"config.json"', f'"{name}"'.encode()))
      changed += 1
  assert changed == 1
  before = set(tmp_path.rglob('*'))
  with pytest.raises(errors.UserError, match=f"notes of .'{name}'. beside"):
    run(f'--from={tmp_path / "run"}', f'--to={tmp_path / "in" / "out"}')
  assert set(tmp_path.rglob('*')) == before


def test_float64_is_rounded_and_said_to_be(tmp_path, capsys):
  tensors = {name: tensor.array().astype(np.float64) + 1e-12
             for name, tensor in files.open(GOLDEN / 'hf_siglip').items()}
  tensors['logit_bias'] = tensors['logit_bias'].astype(np.float32)
  files.write(tmp_path / 'in', tensors)
  shutil.copy(GOLDEN / 'hf_siglip' / 'config.json', tmp_path / 'in')
  run(f'--from={tmp_path / "in"}', f'--to={tmp_path / "a.safetensors"}')
  count = len(weights.load(tmp_path / 'in').report)
  assert (f'in: {count - 1} of {count} arrays were of float64 and are rounded '
          'to float32') in capsys.readouterr().out
  run(f'--from={tmp_path / "in"}', f'--to={tmp_path / "run"}')
  assert 'arrays were of float64' in capsys.readouterr().out
  run(f'--from={tmp_path / "run"}', f'--to={tmp_path / "b.safetensors"}')
  for path in tmp_path / 'a.safetensors', tmp_path / 'b.safetensors':
    found = files.open(path)
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
      assert tensor.array().tobytes() == tensors[name].astype(
          np.float32).tobytes()
  run(f'--from={GOLDEN / "hf_siglip"}', f'--to={tmp_path / "c.safetensors"}')
  assert 'arrays were of' not in capsys.readouterr().out


def test_eva_clip_to_a_run_folder_and_back(tmp_path):
  source = GOLDEN / 'eva_wrapped.pt'
  said = ['text.heads=2', 'text.mlp=gelu', 'vision.placement=pre']
  run(f'--from={source}', f'--to={tmp_path / "run"}',
      *(f'--say={field}' for field in said))
  run(f'--from={tmp_path / "run"}', f'--to={tmp_path / "back"}')
  a, b = files.open(source), files.open(tmp_path / 'back')
  assert {name for name in a.keys() - b.keys() if 'freqs' not in name} == set()
  for name, tensor in b.items():
    assert tensor.dtype == a[name].dtype
    assert tensor.array().tobytes() == a[name].array().tobytes()


def test_of_a_part_there_is_no_run_folder(tmp_path):
  source = GOLDEN / 'mm_projector.bin'
  with pytest.raises(errors.UserError, match='projector, which is not a whole'):
    run(f'--from={source}', f'--to={tmp_path / "run"}')
  assert not (tmp_path / 'run').exists()
  run(f'--from={source}', f'--to={tmp_path / "again.safetensors"}')
  assert_same_tensors(source, tmp_path / 'again.safetensors')


@pytest.fixture(scope='module')
def llava(tmp_path_factory):
  """A folder of a tiny LLaVA-1.5, as transformers writes it."""
  folder = tmp_path_factory.mktemp('llava') / 'llava-tiny'
  with np.load(GOLDEN.parent / 'llava_square.npz') as file:
    tensors = {name.removeprefix('weights/'): file[name]
               for name in file if name.startswith('weights/')}
  width = tensors['language_model.lm_head.weight'].shape[1]
  words = np.random.default_rng(0).normal(size=(528, width)).astype('f4')
  tensors['language_model.model.embed_tokens.weight'] = words
  tensors['language_model.lm_head.weight'] = words[::-1].copy()
  published_files.save(folder, tensors, dict(
      model_type='llava', projector_hidden_act='gelu', image_token_index=521,
      vision_feature_layer=-2, vision_feature_select_strategy='default',
      text_config=dict(model_type='llama', num_attention_heads=7,
                       rms_norm_eps=1e-5),
      vision_config=dict(model_type='clip_vision_model', image_size=17,
                         patch_size=5, num_attention_heads=3)))
  shutil.copy(TOKENIZERS / 'llava_hf.json', folder / 'tokenizer.json')
  return folder


def test_a_published_decoder_is_asked_and_given_back(llava, tmp_path, capsys):
  run(f'--from={llava}', f'--to={tmp_path / "run"}')
  opened = run_folder.open_run(tmp_path / 'run')
  assert opened.tokenizer.family == 'llava_hf'
  assert opened.model.config == weights.load(llava).model.config
  assert opened.image_layout.table_size == 9
  Image.new('RGB', (20, 10), 'red').save(tmp_path / 'red.png')
  capsys.readouterr()
  generate.main([f'--run={tmp_path / "run"}', '--prompt=what is this?',
                 f'--image={tmp_path / "red.png"}', '--max_tokens=4', '--json'])
  assert json.loads(capsys.readouterr().out)[0]['answers'][0]
  assert opened.config.mix.published.style == 'vicuna_v1'
  run(f'--from={tmp_path / "run"}', f'--to={tmp_path / "back"}')
  assert_same_tensors(llava, tmp_path / 'back')


@pytest.mark.parametrize('fit', ['expand', 'clip', 'square'])
@pytest.mark.parametrize('layout', ['hf_llava', 'hf_llava_flat'])
def test_a_decoder_that_went_on_comes_back_unasked(
    layout, fit, llava, tmp_path):
  run(f'--from={llava}', f'--to={tmp_path / "run"}')
  params = published_files.go_on(tmp_path / 'run', tmp_path / 'on')
  file = tmp_path / 'on' / 'config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | {'image.fit': fit}))
  run(f'--from={tmp_path / "on"}', f'--to={tmp_path / "out"}',
      f'--layout={layout}')
  before, after = weights.load(llava), weights.load(tmp_path / 'out')
  assert (after.layout, after.model.config) == (layout, before.model.config)
  assert after.image == before.image | dict(fit=fit)
  assert after.tokenizer.bytes == before.tokenizer.bytes
  jax.tree.map(np.testing.assert_array_equal, params, after.params)
  own = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert own['image_token_index'] == after.tokenizer.id('<patch>')


def test_a_tokenizer_must_be_the_models(llava, tmp_path):
  to = tmp_path / 'run'
  with pytest.raises(errors.UserError, match='820 ids, and the model 528'):
    run(f'--from={llava}', f'--to={to}',
        f'--tokenizer={TOKENIZERS / "clip.json"}')
  with pytest.raises(errors.UserError, match='cannot be read: not a sentence'):
    run(f'--from={llava}', f'--to={to}', f'--tokenizer={__file__}')
  assert not to.exists()
  run(f'--from={llava}', f'--to={to}', '--tokenizer=')
  with pytest.raises(errors.UserError, match='no tokenizer, for its weights'):
    run_folder.open_run(to)


def golden(folder, name, tokenizer, words, config=None):
  """A folder of a golden model with a whole vocabulary, and a tokenizer.

  Args:
    folder: to make.
    name: of the arrays.
    tokenizer: name of its file.
    words: rows of the vocabulary.
    config: to lay beside.
  """
  with np.load(GOLDEN.parent / f'{name}.npz') as file:
    tensors = {key.removeprefix('weights/'): file[key]
               for key in file if key.startswith('weights/')}
  for i, key in enumerate(sorted(
      key for key in tensors if 'embed_tokens' in key or 'lm_head' in key)):
    tensors[key] = np.random.default_rng(i).normal(
        size=(words, tensors[key].shape[1])).astype('f4')
  published_files.save(folder, tensors, config)
  shutil.copy(TOKENIZERS / tokenizer, folder / (
      'tokenizer' + pathlib.Path(tokenizer).suffix))
  return folder


def eve(folder):
  """EVE, with what a file of training holds besides."""
  golden(folder, 'eve_7b', 'llama.model', 520, dict(
      model_type='eve', num_attention_heads=3, rms_norm_eps=1e-5))
  (folder / 'preprocessor_config.json').write_text(json.dumps(dict(
      image_size=40, image_size_clip=40, patch_stride_clip=8)))
  whole = {name: tensor.array().copy()
           for name, tensor in files.open(folder).items()
           if 'compressor' not in name}
  for file in folder.glob('*.safetensors*'):
    file.unlink()
  return published_files.save(folder, whole | {
      'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(2)})


def eve_v2(folder):
  golden(folder, 'eve_v2', 'qwen2.json', 465, dict(
      model_type='eve-qwen2', num_attention_heads=3, rms_norm_eps=1e-6,
      rope_theta=1e6))
  (folder / 'preprocessor_config.json').write_text('{"max_size": 12}')
  return folder


EMU = {'vision.heads': 3, 'vision.image_size': [10, 15], 'decoder.heads': 5,
       'decoder.norm_eps': 1e-6, 'decoder.rope_theta': 1e4,
       'connector.max_distance': 8}


@pytest.mark.parametrize('make, said, begins, prompt, family', [
    (eve, {}, True, ' USER: ', 'llama'),
    (eve_v2, {}, False, "user's questions. USER: ", 'qwen2'),
    # The four words that its program adds are no part of the file.
    (lambda folder: golden(folder, 'emu_oblong', 'llama.model', 524), EMU, True,
     None, 'emu')], ids=['eve', 'eve_v2', 'emu'])
def test_a_converted_model_is_asked_in_its_own_words(
    make, said, begins, prompt, family, tmp_path, capsys, monkeypatch):
  """In its template, and with the ids of its own tokenizer."""
  make(tmp_path / 'in')
  run(f'--from={tmp_path / "in"}', f'--to={tmp_path / "run"}',
      *(f'--say={field}={json.dumps(value)}' for field, value in said.items()))
  tokenizer = weights.load(tmp_path / 'in', said=said).tokenizer
  assert tokenizer.family == family
  assert run_folder.open_run(tmp_path / 'run').tokenizer.bytes == (
      tokenizer.bytes)
  Image.new('RGB', (20, 10), 'red').save(tmp_path / 'red.png')
  asked, answer = [], generate.answering.answer
  monkeypatch.setattr(generate.answering, 'answer', lambda *args, **fields: (
      asked.extend(args[2]), answer(*args, **fields))[1])
  capsys.readouterr()
  question = ['--prompt=what is this?'] if prompt else []  # Emu captions
  ask = [f'--run={tmp_path / "run"}', f'--image={tmp_path / "red.png"}']
  generate.main([*ask, *question, '--max_tokens=4', '--json'])
  assert json.loads(capsys.readouterr().out)[0]['answers'][0]
  assert asked[0].begin == begins
  first = asked[0].spans[0]
  assert first.data.endswith(prompt) if prompt else first.kind == 'image'
  if family == 'llama':
    with pytest.raises(errors.UserError, match='has no id in a publ'):
      generate.main([*ask, *question, '--style=emu_instruct'])


def test_a_model_that_predicts_features_comes_back(tmp_path):
  """Every field of a causal former and of a visual head is kept."""
  said = EMU
  with np.load(GOLDEN.parent / 'emu_oblong.npz') as file:
    published_files.save(tmp_path / 'emu', {
        name.removeprefix('weights/'): file[name]
        for name in file if name.startswith('weights/')})
  run(f'--from={tmp_path / "emu"}', f'--to={tmp_path / "run"}',
      *(f'--say={field}={json.dumps(value)}' for field, value in said.items()))
  loaded = weights.load(tmp_path / 'emu', said=said)
  again = convert.from_run(tmp_path / 'run')
  assert again.model.config == loaded.model.config
  assert loaded.model.config.visual_head is not None
  jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
  assert run_folder.read_config(tmp_path / 'run').mix.published.style == 'emu'


def test_what_is_not_taken_is_said(tmp_path, capsys):
  run(f'--from={eve(tmp_path / "eve")}', f'--to={tmp_path / "a.safetensors"}')
  line, = [line for line in capsys.readouterr().out.splitlines()
           if 'not taken' in line]
  assert line.split('reads them: ')[1].split(', ') == [
      'model.layers.*.self_attn.rotary_emb.inv_freq',
      'model.vision_clip.backbone.vision_model.*']
  count = int(line.split(' tensors')[0].split()[-1])
  assert count == len(files.open(tmp_path / 'eve')) - len(
      files.open(tmp_path / 'a.safetensors')) > 20
