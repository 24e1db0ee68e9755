"""Models of several files: adapters, connectors and towers are attached."""

import flax.traverse_util
import jax
import numpy as np
import pytest
import reference
import tiny_lora

from mmgen import errors
from mmgen import weights
from mmgen.weights import files
from mmgen.weights import lora

FOLDER = reference.GOLDEN / 'weights'


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
  return tiny_lora.base(tmp_path_factory.mktemp('base'))


@pytest.fixture(scope='module')
def llava(tmp_path_factory):
  """{file: what it holds}, of a LLaVA as its authors publish it."""
  with pytest.MonkeyPatch.context() as patch:
    vicuna, adapters, tower = tiny_lora.llava_files(
        tmp_path_factory.mktemp('llava'), patch)
    yield dict(vicuna=weights.load(vicuna), adapters=weights.load(adapters),
               connector=weights.load(adapters / lora.TRAINABLES),
               tower=weights.load(tower))


def test_a_llava_of_four_files(llava):
  both = weights.attach(llava['vicuna'], llava['tower'], llava['adapters'],
                        llava['connector'])
  assert both.layout == 'llava_tower' and both.image['fit'] == 'expand'
  c = both.model.config
  assert (c.vision.tap, c.vision.heads, c.connector.name, c.lora.rank) == (
      -2, 5, 'mlp', 5)
  for part in ('vision', 'connector', 'lora', 'decoder'):
    source = {'vision': 'tower', 'lora': 'adapters', 'decoder': 'vicuna'}.get(
        part, part)
    jax.tree.map(np.testing.assert_array_equal, both.params[part],
                 llava[source].params[part])
  # Each tensor goes out in the dtype of its own file.
  merged = weights.merge(both)
  found = {str(x.dtype): name for name, x in weights.export(
      'llava_tower', merged.model.config, merged.params, merged.dtypes)}
  assert 'vision_tower' in found.pop('float16')
  assert found.keys() == {'bfloat16'}
  assert {row[0] for row in merged.report} == set(
      flax.traverse_util.flatten_dict(merged.params, sep='/'))
  assert [theirs for name, theirs, _, _ in merged.report
          if name == 'decoder/stack/blocks/mlp/up/kernel'] == [(
              'model.layers.{layer}.mlp.up_proj.weight', *(
                  f'base_model.model.model.layers.{{layer}}.mlp.up_proj.lora_'
                  f'{side}.weight' for side in 'AB'))]
  assert lora.CONFIG in both.beside and lora.CONFIG not in merged.beside
  # Without the tower it is what the authors call a LLaVA.
  assert weights.attach(llava['vicuna'], llava['connector']).layout == 'llava'


def test_what_cannot_be_attached(llava, llama, tmp_path):
  clip = weights.load(FOLDER / 'hf_clip_square')
  both = weights.attach(llava['vicuna'], llava['connector'], llava['adapters'])
  for base, others, message in (
      (clip, ['adapters'], "layout 'hf_clip' has no decoder"),
      (llama, [llama], "'llama' cannot be attached; what can: adapters"),
      (llama, ['adapters', 'adapters'], "of 'lora' there are two"),
      (llama, ['tower'], 'the model has no connector that would read it'),
      (both, ['adapters'], 'has adapters already: merge them first'),
      (both, [clip], r'not the one .*image_size is \(15, 15\), not \(8, 8\);'
       ' heads is 3, not 5'),
      (weights.attach(both, llava['tower']), ['tower'], 'the model has one')):
    with pytest.raises(errors.UserError, match=message):
      weights.attach(base, *(
          llava[x] if isinstance(x, str) else x for x in others))
  with pytest.raises(errors.UserError, match='there are no adapters to merge'):
    weights.merge(llama)
  with pytest.raises(errors.UserError, match='there are no adapters to merge'):
    weights.merge(llava['adapters'])
  # Only a config beside it tells the tower that a connector was trained on.
  with pytest.raises(errors.UserError, match='reads 20 numbers .*calls None'):
    weights.attach(llava['vicuna'], weights.load(
        FOLDER / 'peft_llava' / lora.TRAINABLES))
  # And those of a larger one are told apart by their shapes.
  with pytest.raises(errors.UserError) as caught:
    weights.attach(llama, llava['connector'], llava['adapters'])
  for part in ('connector/up/kernel is [20, 24], not [20, 36]',
               'connector/down/kernel is [24, 24], not [36, 36]',
               'lora/blocks/attention/query/a is [3, 24, 5], not [3, 36, 5]'):
    assert part in str(caught.value)
  # A tower has projections of the same names.
  files.write(tmp_path / 'adapter_model.safetensors', {
      name.replace('model.layers', 'vision_tower.layers'): x
      for name, x in files.open(FOLDER / 'peft_all').items()})
  (tmp_path / lora.CONFIG).write_bytes(
      (FOLDER / 'peft_all' / lora.CONFIG).read_bytes())
  with pytest.raises(errors.UserError, match='vision_tower.*is no decoder'):
    weights.attach(llama, weights.load(tmp_path))


def test_all_that_does_not_fit_a_model_is_one_error(llama, tmp_path):
  model = tiny_lora.build(tiny_lora.options('all'), hidden=50, kv_heads=1)
  lora.export(tmp_path / 'other', lora.describe(model.config, 'llama'),
              tiny_lora.params(model), own=dict(
                  tiny_lora.LLAVA, lora_alpha=7))
  other = weights.load(tmp_path / 'other')
  with pytest.raises(errors.UserError) as caught:
    weights.attach(llama, other)
  for part in ('attention/key/b is [3, 5, 4], not [3, 5, 12]',
               'attention/value/b is [3, 5, 4], not [3, 5, 12]',
               'mlp/down/a is [3, 50, 5], not [3, 52, 5]',
               'mlp/gate/b is [3, 5, 50], not [3, 5, 52]', 'mlp/up/b is',
               'The adapters were trained on lmsys/vicuna-7b-v1.5.'):
    assert part in str(caught.value), part
  assert str(caught.value).count(';') == 4
