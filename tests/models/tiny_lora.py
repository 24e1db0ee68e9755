"""Adapters that PEFT stored, and the model they are for."""

import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import reference

from mmgen.models import multimodal

THEIRS = {'attention/query': 'self_attn.q_proj',
          'attention/key': 'self_attn.k_proj',
          'attention/value': 'self_attn.v_proj',
          'attention/out': 'self_attn.o_proj', 'mlp/gate': 'mlp.gate_proj',
          'mlp/up': 'mlp.up_proj', 'mlp/down': 'mlp.down_proj'}
PATTERNS = {'heads': '^attention/', 'all': ''}
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
