"""Published files of decoders, made of golden arrays, for tests of weights."""

import json
import shutil
import types

import jax
import ml_dtypes
import numpy as np

from mmgen import weights
from mmgen.training import checkpoint
from mmgen.weights import files

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def save(folder, tensors, config=None):
  files.write(folder, tensors, max_shard_bytes=30_000)
  if config is not None:
    (folder / 'config.json').write_text(json.dumps(config))
  return folder


def go_on(run, to):
  """Makes of a run another, as a step of training leaves one."""
  params = jax.tree.map(lambda x: 1.01 * x, checkpoint.load_params(run))
  checkpointer = checkpoint.Checkpointer(to)
  checkpointer.save(1, {'params': params}, {}, checkpoint.tokenizer_bytes(run))
  checkpointer.close()
  shutil.copy(run / 'config.json', to)
  return params


def round_trip(tensors, folder, config, layout, dtype, said=None):
  """Imports and exports tensors of a dtype; all bits must be the same."""
  tensors = {name: x.astype(dtype) for name, x in tensors.items()}
  loaded = weights.load(save(folder / 'in', tensors, config), said=said)
  assert loaded.layout == layout
  files.write(folder / 'out.safetensors', weights.export(
      layout, loaded.model.config, loaded.params, loaded.dtypes))
  after = files.open(folder / 'out.safetensors')
  assert after.keys() == tensors.keys()
  for name, x in tensors.items():
    assert (after[name].dtype, after[name].shape) == (x.dtype, x.shape)
    assert after[name].array().tobytes() == x.tobytes(), name


def shapes(layout, config):
  """{their name: what has a shape} of a model, and the number of numbers."""
  family = weights.FAMILIES[layout]
  _, ours = family.build(config, 'bfloat16')
  made = weights.layout_lib.expected(family.rules(config), ours)
  tensors = {name: types.SimpleNamespace(shape=shape, dtype=np.dtype('f4'))
             for name, shape in made.items()}
  weights.layout_lib.check(family.rules(config), tensors, ours)
  return tensors, sum(int(np.prod(shape)) for shape in made.values())


def recognised(tensors, beside=None, said=None):
  return next((name, config) for name, family in weights.FAMILIES.items() if (
      config := family.recognise(tensors, beside or {}, said or {})))
