"""Of every layout: whatever is wrong with a file is in one error, by name."""

import dataclasses
import types

import published_files
import pytest

from mmgen import errors
from mmgen import weights
from mmgen.models import alignment
from mmgen.models import causal_former
from mmgen.models import clip
from mmgen.models import connector
from mmgen.models import decoder
from mmgen.models import image_tower
from mmgen.models import lora as lora_lib
from mmgen.models import multimodal
from mmgen.models import patch_embedding
from mmgen.models import vision_encoder
from mmgen.models import visual_head
from mmgen.weights import eve
from mmgen.weights import layout as layout_lib
from mmgen.weights import llava
from mmgen.weights import lora

TEXT = decoder.sized('llama-7b', layers=2, width=32, heads=4, hidden=40,
                     vocab=50)
TOWER = vision_encoder.sized('clip-b32', layers=2)


def small(size):
  """The published CLIP of that name, of two layers."""
  c = clip.SIZES[size]
  return dataclasses.replace(
      c, vision=dataclasses.replace(c.vision, layers=2),
      text=dataclasses.replace(c.text, layers=2))


def seeing(vision, kind='mlp', text=TEXT, **more):
  return multimodal.MultimodalConfig(
      text, vision, connector.ConnectorConfig(kind, text.width), **more)


def tower(size, **more):
  return image_tower.ImageTowerConfig(vision_encoder.sized(size, layers=2),
                                      **more)


def emu(**more):
  vision = vision_encoder.sized('eva01-g14', layers=2, tap=-1, final_norm=False,
                                class_entry=True)
  return multimodal.MultimodalConfig(
      TEXT, vision, causal_former.CausalFormerConfig(
          TEXT.width, layers=2, border=True),
      visual_head.VisualHeadConfig('linear', 'connector'), **more)


EMU2 = multimodal.MultimodalConfig(
    TEXT, vision_encoder.sized(
        'eva02-e14-plus', layers=2, tap=-1, final_norm=False, pool=4),
    connector.ConnectorConfig('linear', TEXT.width, bias=False, border=True),
    visual_head.VisualHeadConfig('linear', 'vision'))
ADAPTERS = lora_lib.LoraConfig(3, 6.0, pattern='attention')
EVE = seeing(patch_embedding.EveConfig(16),
             text=dataclasses.replace(TEXT, layers=4))
TWO_SETS = dataclasses.replace(
    TEXT, qkv_bias=True, modality_weights=('norms', 'attention', 'mlp'))
PERSIMMON = decoder.sized('persimmon-8b', layers=2, width=32, heads=4,
                          hidden=40, vocab=50)
PROJECTOR = llava.ProjectorConfig(connector.ConnectorConfig('mlp', 20), 12)
CONFIGS = {
    **dict.fromkeys(('openai_clip', 'open_clip', 'hf_clip'), small('clip-b32')),
    **dict.fromkeys(('open_clip_siglip', 'hf_siglip', 'big_vision',
                     'big_vision_scanned'), small('siglip-b16')),
    **dict.fromkeys(('eva_clip', 'eva_clip_old', 'eva_clip_old_scale',
                     'eva_open_clip', 'eva_hf'), small('eva02-b16')),
    'timm_eva': tower('eva02-b16', embed=24),
    'timm_eva_avg': tower('eva02-b16'),
    'eva_tower': tower('eva02-ti14', predicted=20, mask=True),
    'timm_siglip': tower('siglip-b16'),
    'llama': multimodal.MultimodalConfig(TEXT),
    **dict.fromkeys(('llava', 'llava_tower', 'hf_llava', 'hf_llava_new',
                     'hf_llava_flat'), seeing(TOWER)),
    **dict.fromkeys(('llava_projector', 'llava_trainables'), PROJECTOR),
    'eve': EVE, 'eve_aligned': eve.AlignedConfig(
        **vars(EVE), aligner=alignment.PatchAlignerConfig(4, TEXT.width, 16)),
    'eve_v2': seeing(patch_embedding.ConvPatchesConfig(32, 12), 'identity',
                     TWO_SETS),
    **dict.fromkeys(('hf_fuyu', 'hf_fuyu_new'), seeing(
        patch_embedding.LinearPatchesConfig(32), 'identity', PERSIMMON)),
    'emu': emu(), 'emu_instruct': emu(lora=ADAPTERS),
    'emu_instruct_new': emu(lora=ADAPTERS),
    **dict.fromkeys(('emu2', 'emu2_gen', 'hf_emu2'), EMU2),
    'peft': lora.describe(multimodal.MultimodalConfig(TEXT, lora=ADAPTERS)),
}


def test_no_layout_is_forgotten():
  assert CONFIGS.keys() == weights.FAMILIES.keys()


@pytest.mark.parametrize('layout', CONFIGS)
def test_all_that_is_wrong_is_one_error(layout):
  """Each tensor of a layer is renamed, added to, lost and longer in turn."""
  family, config = weights.FAMILIES[layout], CONFIGS[layout]
  tensors, _ = published_files.shapes(layout, config)
  _, ours = family.build(config, 'float32')
  for turn in (0, 2):  # each is renamed or added to once
    check_named(family, config, dict(tensors), ours, turn)


def check_named(family, config, tensors, ours, turn):
  names = [layout_lib.of_layer(name, 1) for rule in family.rules(config)
           for name in rule.theirs]
  expected = []
  for i, name in enumerate(names, turn):
    shape = tensors[name].shape
    longer = types.SimpleNamespace(shape=(*shape, 2), dtype=tensors[name].dtype)
    if i % 4 == 0:
      tensors[f'{name}_'] = tensors.pop(name)
      expected += [f'{name} is missing', f'{name}_ is extra']
    elif i % 4 == 1:
      tensors[f'{name}_'] = tensors[name]
      expected += [f'{name}_ is extra']
    elif i % 4 == 2:
      del tensors[name]
      expected += [f'{name} is missing']
    else:
      tensors[name] = longer
      expected += [f'{name} is {[*longer.shape]}, not {[*shape]}']
  with pytest.raises(errors.UserError) as caught:
    layout_lib.check(family.rules(config), tensors, ours, family.ignored,
                     'a.pt')
  before, _, lines = str(caught.value).partition('loaded: ')
  found = [line.partition(' (nearest')[0] for line in lines[:-1].split('; ')]
  assert before == 'a.pt does not fit the model, nothing of it is '
  assert sorted(found) == sorted(expected)
