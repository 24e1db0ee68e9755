"""The command that takes adapters in, and gives them back alone or merged."""

import json
import shutil

import flax.traverse_util
import jax
import numpy as np
from PIL import Image
import published_files
import pytest
import reference
import test_convert
import tiny_lora

from mmgen import convert
from mmgen import errors
from mmgen import generate
from mmgen import references
from mmgen import run_folder
from mmgen import weights
from mmgen.weights import files
from mmgen.weights import lora

PEFT = reference.GOLDEN / 'weights' / 'peft_all'
run = test_convert.run


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
  folder = tmp_path_factory.mktemp('llama') / 'base'
  tiny_lora.base(folder)
  return folder


def test_in_beside_the_weights_and_out_alone(llama, tmp_path, capsys):
  both, alone = tmp_path / 'both', tmp_path / 'alone'
  run(f'--from={llama}', f'--attach={PEFT}', f'--to={both}')
  loaded = convert.from_run(both)
  assert loaded.model.config.lora.alpha == 7 and loaded.layout == 'llama'
  want = weights.attach(weights.load(llama), weights.load(PEFT))
  assert loaded.model.config == want.model.config
  jax.tree.map(np.testing.assert_array_equal, loaded.params, want.params)
  assert 'lora/blocks/mlp/up/a [3, 36, 5] <- ' in (
      both / 'weights.txt').read_text()
  capsys.readouterr()
  run(f'--from={both}', '--layout=peft', f'--to={alone}')
  assert 'alone: written, without decoder' in capsys.readouterr().out
  assert sorted(file.name for file in alone.iterdir()) == [
      lora.CONFIG, 'adapter_model.safetensors']
  assert (alone / 'adapter_model.safetensors').read_bytes() == (
      PEFT / 'adapter_model.safetensors').read_bytes()
  assert json.loads((alone / lora.CONFIG).read_text()) == json.loads(
      (PEFT / lora.CONFIG).read_text())
  # Also from file to file.
  run(f'--from={PEFT}', '--layout=peft', f'--to={tmp_path / "again"}')
  run(f'--from={PEFT}', f'--to={tmp_path / "one.safetensors"}')
  run(f'--from={both}', '--layout=peft', f'--to={tmp_path / "b.safetensors"}')
  for path in 'again', 'one.safetensors', 'b.safetensors':
    test_convert.assert_same_tensors(tmp_path / path, PEFT)
  with pytest.raises(errors.UserError, match='llama cannot hold this model: .*'
                     r'Merge its adapters \(--merge\), or .*--layout=peft'):
    run(f'--from={both}', f'--to={tmp_path / "plain"}')


def test_merged_at_any_time(llama, tmp_path):
  expected = weights.merge(
      weights.attach(weights.load(llama), weights.load(PEFT)))
  run(f'--from={llama}', f'--attach={PEFT}', f'--to={tmp_path / "both"}')
  run(f'--from={llama}', f'--attach={PEFT}', '--merge',
      f'--to={tmp_path / "merged"}')
  run(f'--from={tmp_path / "both"}', '--merge', f'--to={tmp_path / "a"}')
  run(f'--from={tmp_path / "merged"}', f'--to={tmp_path / "b"}')
  run(f'--from={llama}', f'--attach={PEFT}', '--merge', '--layout=llama',
      f'--to={tmp_path / "c"}')
  run(f'--from={llama}', f'--attach={PEFT}', '--merge',
      f'--to={tmp_path / "d.safetensors"}')
  assert (tmp_path / 'c' / 'config.json').exists()
  assert not (tmp_path / 'a' / lora.CONFIG).exists()
  for name in 'abc':
    found = weights.load(tmp_path / name)
    assert found.model.config == expected.model.config
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
  test_convert.assert_same_tensors(tmp_path / 'a', tmp_path / 'd.safetensors')
  with pytest.raises(errors.UserError, match='there are no adapters to merge'):
    run(f'--from={llama}', '--merge', f'--to={tmp_path / "e"}')


def test_all_files_of_llavas_authors(tmp_path, monkeypatch):
  """A language model, adapters with a connector, and a CLIP."""
  vicuna, adapters, tower = tiny_lora.llava_files(tmp_path, monkeypatch)
  # Of its config nothing is said here but what is asked for.
  (tower / 'config.json').unlink()
  to = tmp_path / 'run'
  args = [f'--from={vicuna}', f'--attach={adapters}']
  with pytest.raises(errors.UserError, match='Its image tower is a CLIP as it '
                     'was published: give that with --attach'):
    run(*args, f'--to={to}')
  args.append(f'--attach={tower}')
  with pytest.raises(errors.UserError, match='tell mlp .*--say=mlp'):
    run(*args, f'--to={to}')
  monkeypatch.undo()
  vicuna, adapters, tower = tiny_lora.llava_files(
      tmp_path / 'whole', monkeypatch)
  args = [f'--from={vicuna}', f'--attach={adapters}', f'--attach={tower}']
  run(*args, f'--to={to}')
  config = run_folder.read_config(to)
  assert config.mix.published.style == 'vicuna_v1'
  assert (config.image.size, config.image.fit) == ((8, 8), 'expand')
  loaded = convert.from_run(to)
  assert loaded.layout == 'llava_tower'
  assert loaded.params.keys() == {'vision', 'connector', 'lora', 'decoder'}
  # Alone they lie beside the connector again.
  run(f'--from={to}', '--layout=peft', f'--to={tmp_path / "alone"}')
  assert sorted(file.name for file in (tmp_path / 'alone').iterdir()) == [
      lora.CONFIG, 'adapter_model.safetensors', 'config.json',
      'non_lora_trainables.bin']
  for mine, theirs in (('adapter_model.safetensors', 'adapter_model.bin'),
                       ('non_lora_trainables.bin',) * 2):
    test_convert.assert_same_tensors(
        tmp_path / 'alone' / mine, adapters / theirs)
  for name in lora.CONFIG, 'config.json':
    assert json.loads((tmp_path / 'alone' / name).read_text()) == json.loads(
        (adapters / name).read_text())
  # And merged they are a LLaVA with its tower, each tensor in its dtype.
  run(f'--from={to}', '--merge', f'--to={tmp_path / "merged"}')
  merged = weights.load(tmp_path / 'merged', said={
      'vision.heads': 5, 'vision.mlp': 'quick_gelu', 'vision.norm_eps': 1e-3})
  assert merged.layout == 'llava_tower'
  assert {str(x) for x in merged.dtypes.values()} == {'bfloat16', 'float16'}
  # Without the tower they are what the authors' own script makes.
  run(*args[:2], '--merge', '--layout=llava', f'--to={tmp_path / "own"}')
  found = weights.files.open(tmp_path / 'own')
  assert 'model.mm_projector.2.bias' in found
  assert not any('lora' in name or 'tower' in name for name in found)


@pytest.fixture
def published_apart(tmp_path, monkeypatch):
  """(LLaVA as its authors publish it, its CLIP, all parameters)."""
  _, _, tower = tiny_lora.llava_files(tmp_path, monkeypatch)
  _, tensors = reference.load('llava_pictures')
  width = tensors['language_model.lm_head.weight'].shape[1]
  words = np.random.default_rng(0).normal(size=(520, width)).astype('f4')
  tensors |= {'language_model.model.embed_tokens.weight': words,
              'language_model.lm_head.weight': words[::-1].copy()}
  text = dict(num_attention_heads=3, num_key_value_heads=1, rms_norm_eps=1e-3,
              rope_theta=100.0)
  whole = weights.load(published_files.save(tmp_path / 'hf', tensors, dict(
      model_type='llava', text_config=text, vision_config=dict(
          model_type='clip_vision_model', image_size=8, num_attention_heads=5,
          layer_norm_eps=1e-3))))
  own = published_files.save(tmp_path / 'llava-own', dict(weights.export(
      'llava', whole.model.config, {
          part: whole.params[part] for part in ('connector', 'decoder')},
      'float32')), text | dict(
          model_type='llava_llama', mm_projector_type='mlp2x_gelu',
          mm_vision_tower='openai/clip-tiny', mm_vision_select_layer=-2,
          mm_vision_select_feature='patch', image_aspect_ratio='pad'))
  shutil.copy(reference.GOLDEN / 'tokenizers' / 'llama.model',
              own / 'tokenizer.model')
  vision = jax.tree.map(lambda x: x.astype('float16').astype('float32'),
                        whole.params['vision'])  # as the CLIP's file has it
  return own, tower, whole.params | {'vision': vision}


def test_llava_of_its_authors_answers_with_a_clip(
    published_apart, tmp_path, capsys):
  own, tower, params = published_apart
  with pytest.raises(errors.UserError, match='Its image tower is a CLIP as it '
                     'was published: give that with --attach'):
    run(f'--from={own}', f'--to={tmp_path / "run"}')
  run(f'--from={own}', f'--attach={tower}', f'--to={tmp_path / "run"}')
  opened = run_folder.open_run(tmp_path / 'run')
  jax.tree.map(np.testing.assert_array_equal, opened.params, params)
  assert opened.config.image.fit == 'expand'
  Image.new('RGB', (20, 10), 'red').save(tmp_path / 'red.png')
  capsys.readouterr()
  generate.main([f'--run={tmp_path / "run"}', '--prompt=what is this?',
                 f'--image={tmp_path / "red.png"}', '--max_tokens=4', '--json'])
  assert json.loads(capsys.readouterr().out)[0]['answers'][0]


def test_its_stages_are_those_of_both_files(
    published_apart, tmp_path):
  own, tower, _ = published_apart
  ours = f'--stages={tmp_path / "ours.npz"}'
  with pytest.raises(errors.UserError, match='which is not a whole model. Its '
                     'image tower is a CLIP'):
    run(f'--check={own}', ours)
  assert run(f'--check={own}', f'--attach={tower}', ours) == 0
  with np.load(tmp_path / 'ours.npz') as file:
    assert {'vision/3', 'connector', 'logits'} <= {*file}
    assert file['input/tokens'].max() == 519  # of pictures, within the words
  # What is said goes to the file that asks for it.
  (tower / 'config.json').unlink()
  with pytest.raises(errors.UserError, match='tell mlp .*--say=mlp'):
    run(f'--check={own}', f'--attach={tower}', ours)
  with pytest.raises(errors.UserError, match='norm_eps is 1e-05, not 0.001'):
    run(f'--check={own}', f'--attach={tower}', ours,
        '--say=mlp=quick_gelu', '--say=text.heads=2')


def test_adapters_are_merged_before_a_check(llama, monkeypatch):
  monkeypatch.setattr(references, 'require', lambda layout: None)
  with pytest.raises(errors.UserError, match='adapters .* no reference here: '
                     'merge them'):
    run(f'--check={llama}', f'--attach={PEFT}')


def test_adapters_that_were_trained_here(tmp_path):
  """They have the names that a LLaMA has; without a config they are float32."""
  model = tiny_lora.build(tiny_lora.options('heads'))
  params = tiny_lora.params(model)
  loaded = weights.Loaded(
      model=model, params=params, image={}, layout=None,
      dtypes={}, beside={}, report=[])
  left = convert.export(loaded, tmp_path / 'out', 'peft')
  assert left == ['decoder']
  found = weights.load(tmp_path / 'out')
  assert set(found.dtypes.values()) == {np.dtype('float32')}
  assert 'base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight' in (
      found.dtypes)
  jax.tree.map(np.testing.assert_array_equal, found.params,
               {'lora': params['lora']})


def test_emu_i_to_a_run_folder_and_back(tmp_path):
  said = {'vision.heads': 3, 'vision.image_size': [10, 15], 'decoder.heads': 5,
          'decoder.norm_eps': 1e-6, 'decoder.rope_theta': 1e4,
          'connector.max_distance': 8}
  unread = ('visual.norm', 'visual.head', 'cformer.cformer.embed_tokens')
  tensors = {name: x.astype(np.float16) for name, x in tiny_lora.emu_instruct(
      reference.load('emu_oblong')[1]).items() if not name.startswith(unread)}
  files.write(tmp_path / 'emu-i.bin', tensors)
  said = [f'--say={field}={json.dumps(x)}' for field, x in said.items()]
  run(f'--from={tmp_path / "emu-i.bin"}', f'--to={tmp_path / "run"}', *said)
  for to, more in (('back', ()), ('merged', ('--merge',)),
                   ('alone', ('--layout=peft',))):
    run(f'--from={tmp_path / "run"}', f'--to={tmp_path / to}', *more)
  test_convert.assert_same_tensors(tmp_path / 'back', tmp_path / 'emu-i.bin')
  merged, alone = files.open(tmp_path / 'merged'), weights.load(
      tmp_path / 'alone')
  assert 'decoder.lm.model.layers.1.self_attn.q_proj.weight' in merged
  assert set(alone.dtypes.values()) == {np.dtype('float16')}
  assert 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight' in (
      alone.dtypes)
  assert (alone.model.config.lora.rank, alone.model.config.lora.alpha,
          alone.model.config.lora.dropout) == (16, 16, 0.05)
  assert len(flax.traverse_util.flatten_dict(alone.params)) == 8


# ---------------------------------------------------------------------------


def test_what_does_not_fit_is_one_line(llama, tmp_path):
  to = tmp_path / 'run'
  with pytest.raises(errors.UserError) as caught:  # no weights to stand beside
    run(f'--from={PEFT}', f'--to={to}')
  assert f'--attach={PEFT}' in str(caught.value)
  own = json.loads((PEFT / lora.CONFIG).read_text())
  other = tmp_path / 'other'
  other.mkdir()
  for fields, message in (
      (dict(r=64), 'says r=64, and the adapters beside it have the rank 5'),
      (dict(lora_alpha=None), 'tell lora.alpha .*--say=lora.alpha=')):
    (other / lora.CONFIG).write_text(json.dumps(own | fields))
    (other / 'adapter_model.safetensors').write_bytes(
        (PEFT / 'adapter_model.safetensors').read_bytes())
    with pytest.raises(errors.UserError, match=message):
      run(f'--from={llama}', f'--attach={other}', f'--to={to}')
  run(f'--from={llama}', f'--attach={other}', f'--to={to}',
      '--say=lora.alpha=3')
  assert convert.from_run(to).model.config.lora.alpha == 3
  with pytest.raises(errors.UserError, match='No such file|cannot read'):
    run(f'--from={llama}', '--attach=/none', f'--to={tmp_path / "b"}')
  adapters = tiny_lora.llava(tmp_path / 'llava')
  (adapters / lora.TRAINABLES).unlink()
  with pytest.raises(errors.UserError, match='does not fit the model: '
                     'lora/blocks/attention/key/a .* on lmsys/vicuna-7b-v1.5'):
    run(f'--from={llama}', f'--to={tmp_path / "b"}', f'--attach={adapters}')
  assert not (tmp_path / 'b').exists()


def test_a_check_merges_nothing(capsys):
  with pytest.raises(SystemExit):
    run('--check=a', '--merge')
  assert '--merge is for --from and --to' in capsys.readouterr().err
