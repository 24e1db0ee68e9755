"""Adapters that PEFT stored, and the model they are for."""

import dataclasses
import json
import shutil

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import ml_dtypes
import numpy as np
import published_files
import reference

from mmgen import weights
from mmgen.models import clip
from mmgen.models import multimodal
from mmgen.models import vision_encoder
from mmgen.weights import llava as llava_layouts
from mmgen.weights import lora
from mmgen.weights import two_towers

THEIRS = {'attention/query': 'self_attn.q_proj',
          'attention/key': 'self_attn.k_proj',
          'attention/value': 'self_attn.v_proj',
          'attention/out': 'self_attn.o_proj', 'mlp/gate': 'mlp.gate_proj',
          'mlp/up': 'mlp.up_proj', 'mlp/down': 'mlp.down_proj'}
LLAMA = dict(model_type='llama', num_attention_heads=9, rms_norm_eps=1e-5)
PATTERNS = {'heads': '^attention/', 'all': ''}
# As PEFT wrote it when LLaVA-1.5 was published.
LLAVA = dict(
    base_model_name_or_path='lmsys/vicuna-7b-v1.5', bias='none',
    fan_in_fan_out=False, inference_mode=True, init_lora_weights=True,
    layers_pattern=None, layers_to_transform=None, lora_alpha=10,
    lora_dropout=0.05, modules_to_save=None, peft_type='LORA', r=5,
    revision=None, task_type='CAUSAL_LM', target_modules=[
        'down_proj', 'o_proj', 'v_proj', 'q_proj', 'gate_proj', 'up_proj',
        'k_proj'])
DECODER = dict(vocab=53, layers=3, width=36, heads=9, kv_heads=3, hidden=52)


def build(options=None, **decoder):
  """The model of llama_tiny, with adapters if there are options."""
  config = ml_collections.ConfigDict(dict(
      dtype='float32', model=dict(vision={}, decoder=DECODER | decoder)))
  if options:
    config.model.lora = options
  return multimodal.build(config)


def options(name):
  own = json.loads((reference.GOLDEN / 'weights' / f'peft_{name}'
                    / 'adapter_config.json').read_text())
  return dict(rank=own['r'], alpha=own['lora_alpha'],
              dropout=own['lora_dropout'], pattern=PATTERNS[name])


def ours(tensors, names):
  """Adapters, or their gradients, as our parameters."""
  flat = {}
  for name in names:
    for side in 'ab':
      layers = [np.asarray(tensors[
          f'base_model.model.model.layers.{i}.{THEIRS[name]}.lora_'
          f'{side.upper()}.weight']).T for i in range(DECODER['layers'])]
      flat[f'blocks/{name}/{side}'] = np.stack(layers)
  return {'lora': flax.traverse_util.unflatten_dict(flat, sep='/')}


def batch(tokens):
  B, T = tokens.shape
  return jax.tree.map(jnp.asarray, dict(
      tokens=tokens, segments=np.ones((B, T), np.int32),
      positions=np.tile(np.arange(T), (B, 1)),
      targets=np.roll(tokens, -1, axis=1),
      weights=np.tile(np.arange(T) < T - 1, (B, 1)).astype(np.float32),
      row=np.arange(B)))


def params(model):
  """Some parameters of a model, without compiling its own first ones."""
  draw = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), batch(
      np.zeros((1, 1), np.int32)))['params']
  return jax.tree.map(
      lambda x: draw.normal(size=x.shape).astype(np.float32), shapes)


def base(folder):
  """The model of llama_tiny, loaded from a file."""
  return weights.load(published_files.save(
      folder, reference.load('llama_tiny')[1], LLAMA))


def llava(folder):
  """The authors' folder of adapters: those, and the connector."""
  shutil.copytree(reference.GOLDEN / 'weights' / 'peft_llava', folder)
  (folder / lora.CONFIG).write_text(json.dumps(LLAVA))
  return folder


def llava_files(folder, monkeypatch):
  """All that LLaVA's authors publish of one, as they publish it.

  The model is that of llava_pictures, whose tower becomes a published one.

  Returns:
    (path of the language model, of the adapters, of the CLIP).
  """
  _, tensors = reference.load('llava_pictures')
  text = dict(num_attention_heads=3, num_key_value_heads=1, rms_norm_eps=1e-3,
              rope_theta=100.0)
  begin = 'language_model.'
  vicuna = published_files.save(folder / 'vicuna', {
      name.removeprefix(begin): x.astype(ml_dtypes.bfloat16)
      for name, x in tensors.items() if name.startswith(begin)},
      dict(model_type='llama', **text))
  adapters = llava(folder / 'lora')
  (adapters / 'config.json').write_text(json.dumps(text | dict(
      model_type='llava_llama', mm_projector_type='mlp2x_gelu',
      mm_vision_select_layer=-2, mm_vision_select_feature='patch',
      mm_vision_tower='openai/clip-tiny', image_aspect_ratio='pad')))
  tower = vision_encoder.VisionEncoderConfig(
      image_size=(8, 8), patch=4, layers=4, width=20, heads=5, hidden=26,
      norm_eps=1e-3)
  monkeypatch.setitem(vision_encoder.SIZES, 'clip-tiny', tower)
  monkeypatch.setitem(llava_layouts._TOWERS, 'clip-tiny', 'clip-tiny')
  config = dataclasses.replace(
      clip.SIZES['mini'], vision=tower, embed=6, text=dataclasses.replace(
          clip.SIZES['mini'].text, layers=1, width=8, heads=2, hidden=9,
          vocab=11, length=5))
  _, shapes = two_towers.build(config, 'float32')
  params = flax.traverse_util.unflatten_dict(
      {name: np.zeros(x.shape, x.dtype) for name, x in shapes.items()}, sep='/')
  params['vision'] = reference.clip_tower(
      tensors, tower, 'vision_tower.vision_model.')
  seen = published_files.save(folder / 'clip', dict(weights.export(
      'hf_clip', config, params, 'float16')), dict(
          model_type='clip', text_config=dict(
              num_attention_heads=2, hidden_act='gelu'),
          vision_config=dict(num_attention_heads=5, image_size=8,
                             layer_norm_eps=1e-3)))
  return vicuna, adapters, seen


def emu_instruct(tensors, base='', whole=False):
  """The tensors of an Emu as those of an Emu-I, with some adapters.

  Args:
    tensors: {name: array} of an Emu.
    base: what stands behind the name of a matrix with an adapter.
    whole: whether the matrices are what they were together with their adapters,
      not without.
  """
  draw, made = np.random.default_rng(0), {}
  for name, x in tensors.items():
    theirs = name.replace('decoder.lm.', 'decoder.lm.base_model.model.')
    if name.endswith(tuple(f'self_attn.{part}_proj.weight' for part in 'qkvo')):
      theirs = theirs.removesuffix('.weight')
      a, b = (draw.normal(size=shape).astype(x.dtype) for shape in (
          (16, x.shape[1]), (len(x), 16)))
      made |= {f'{theirs}.lora_A.default.weight': a,
               f'{theirs}.lora_B.default.weight': b}
      theirs, x = f'{theirs}{base}.weight', x - b @ a if whole else x
    made[theirs] = x
  return made
