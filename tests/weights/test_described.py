"""What is written beside exported weights, of true sizes; by shapes alone.

That others read it, and get the same numbers, is seen in tests/parity.
"""

import dataclasses

import pytest

from mmgen import weights
from mmgen.models import clip
from mmgen.models import decoder
from mmgen.models import multimodal
from mmgen.weights import described

LLAMA = {size: multimodal.MultimodalConfig(decoder.sized(size))
         for size in ('vicuna-13b', 'qwen2.5-7b')}
CASES = [('llama', config, None) for config in LLAMA.values()] + [
    ('hf_llava_new', multimodal.SIZES['llava-1.5-7b'], 'expand'),
    ('hf_siglip', clip.SIZES['siglip-so400m-384'], 'square'),
    ('open_clip', clip.SIZES['clip-l14-336'], 'open_clip')]


def described_and_read(layout, config, fit):
  """(files, config that is read off them and the shapes)."""
  image = fit and dict(size=config.vision.image_size, fit=fit, kernel='bicubic',
                       mean=config.vision.mean, std=config.vision.std)
  made = described.files(layout, config, image or {}, None)
  _, ours = weights.FAMILIES[layout].build(config, 'float32')
  found = weights.recognise_shapes(layout, config, ours, made)
  if image:
    assert weights.FAMILIES[layout].image(found, made) == image
  return made, found


@pytest.mark.parametrize('layout, config, fit', CASES)
def test_a_description_is_read_back(layout, config, fit):
  _, found = described_and_read(layout, config, fit)
  assert found == config
  assert described.differences(config, found) == []


def test_kinds_of_decoders():
  kinds = {size: described_and_read('llama', config, None)[0]['config.json']
           for size, config in LLAMA.items()}
  assert {size: own['model_type'] for size, own in kinds.items()} == {
      'vicuna-13b': 'llama', 'qwen2.5-7b': 'qwen2'}
  assert kinds['qwen2.5-7b']['num_key_value_heads'] == 4


def test_differences_are_named_but_for_those_of_training():
  config = multimodal.SIZES['llava-1.5-7b']
  text = dataclasses.replace(config.decoder, norm_eps=0.5, remat=True,
                             kv_heads=32, dtype='bfloat16')
  other = dataclasses.replace(config, decoder=text)
  assert described.differences(other, config) == ['decoder.norm_eps is 0.5']
  assert described.differences(config, None)
  vision = dataclasses.replace(config.vision, tap=-1)
  assert described.differences(dataclasses.replace(
      config, vision=vision), config) == ['vision.tap is -1']
