"""Stored arrays of references, and their parameters as ours."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from mmgen.data import layout

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'


def load(name):
  """(arrays, weights) of a golden file; weights under their own names."""
  with np.load(GOLDEN / f'{name}.npz') as file:
    arrays = dict(file)
  weights = {key.removeprefix('weights/'): arrays.pop(key)
             for key in list(arrays) if key.startswith('weights/')}
  return arrays, weights


def error(got, want):
  """The largest difference, over the largest number that is wanted."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape
  return np.abs(got - want).max() / np.abs(want).max()


def close(got, want, tolerance=1e-5):
  """Asserts that the `error` is smaller."""
  worst = error(got, want)
  assert worst < tolerance, worst


def dense(weights, name):
  """{'kernel': [inputs, outputs]}, and the bias if there is one."""
  tree = {'kernel': weights[f'{name}.weight'].T}
  if f'{name}.bias' in weights:
    tree['bias'] = weights[f'{name}.bias']
  return tree


def norm(weights, name):
  """Scale, and the bias if there is one."""
  tree = {'scale': weights[f'{name}.weight']}
  if f'{name}.bias' in weights:
    tree['bias'] = weights[f'{name}.bias']
  return tree


def stacked(blocks, final_norm):
  return {'blocks': jax.tree.map(lambda *x: np.stack(x), *blocks),
          'final_norm': final_norm}


def llama(weights, config, prefix=''):
  """Parameters of `Decoder` from those of LlamaForCausalLM or Qwen2's.

  Args:
    weights: {name: array}; gradients serve as well.
    config: a `DecoderConfig`.
    prefix: of all names.
  """
  blocks = []
  for i in range(config.layers):
    name = f'{prefix}model.layers.{i}'
    blocks.append({
        'attention': {ours: dense(weights, f'{name}.self_attn.{ours[0]}_proj')
                      for ours in ('query', 'key', 'value', 'out')},
        'attention_norm': norm(weights, f'{name}.input_layernorm'),
        'mlp': {part: dense(weights, f'{name}.mlp.{part}_proj')
                for part in ('gate', 'up', 'down')},
        'mlp_norm': norm(weights, f'{name}.post_attention_layernorm')})
  return {
      'embedding': weights[f'{prefix}model.embed_tokens.weight'],
      'stack': stacked(blocks, norm(weights, f'{prefix}model.norm')),
      'head': dense(weights, f'{prefix}lm_head')}


def clip_tower(weights, config, prefix):
  """Parameters of `VisionEncoder` from those of CLIPVisionModel."""
  blocks = []
  for i in range(config.layers):
    name = f'{prefix}encoder.layers.{i}'
    blocks.append({
        'attention': {ours: dense(weights, f'{name}.self_attn.{theirs}_proj')
                      for ours, theirs in dict(query='q', key='k', value='v',
                                               out='out').items()},
        'attention_norm': norm(weights, f'{name}.layer_norm1'),
        'mlp': {'up': dense(weights, f'{name}.mlp.fc1'),
                'down': dense(weights, f'{name}.mlp.fc2')},
        'mlp_norm': norm(weights, f'{name}.layer_norm2')})
  stem = weights[f'{prefix}embeddings.patch_embedding.weight']
  return {
      'patch_embedding': {'kernel': stem.transpose(2, 3, 1, 0).reshape(
          -1, config.width)},
      'class_embedding': weights[f'{prefix}embeddings.class_embedding'],
      'position_embedding': weights[
          f'{prefix}embeddings.position_embedding.weight'],
      'pre_norm': norm(weights, f'{prefix}pre_layrnorm'),
      'stack': stacked(blocks, norm(weights, f'{prefix}post_layernorm'))}


def eve(weights, config, prefix=''):
  """Parameters of `Eve` and of the connector 'mlp' from EVE's own names."""
  tower = f'{prefix}vision_tower.'
  vision = {'patch_embedding': {
      'kernel': weights[f'{tower}patch_embedding.weight'].transpose(
          2, 3, 1, 0).reshape(-1, config.width)}}
  for name in ('class_embedding', 'split_embedding'):
    vision[name] = weights[tower + name]
  for name in ('local_attention', 'global_attention'):
    key, value = np.split(weights[f'{tower}{name}.kv.1.weight'], 2)
    vision[name] = {
        'query_norm': norm(weights, f'{tower}{name}.q.0'),
        'key_value_norm': norm(weights, f'{tower}{name}.kv.0'),
        'out': dense(weights, f'{tower}{name}.proj')} | {
            part: {'kernel': kernel.T} for part, kernel in (
                ('query', weights[f'{tower}{name}.q.1.weight']), ('key', key),
                ('value', value))}
  return vision, {'up': dense(weights, f'{prefix}mm_projector.0'),
                  'down': dense(weights, f'{prefix}mm_projector.2')}


def patch_aligner(weights, prefix=''):
  """Parameters of `PatchAligner` from those of EVE's own layer."""
  taps = sum(name.startswith(f'{prefix}norm_layer') for name in weights) // 3
  tree = {part: dense(weights, f'{prefix}{part}_layer')
          for part in ('input', 'output')}
  for j in range(taps):
    tree[f'norm_{j}'] = norm(weights, f'{prefix}norm_layer.{j}.0')
    tree[f'project_{j}'] = dense(weights, f'{prefix}norm_layer.{j}.1')
  return tree


def persimmon(weights, config, prefix=''):
  """Parameters of `Decoder` from those of PersimmonForCausalLM."""
  blocks = []
  for i in range(config.layers):
    name = f'{prefix}model.layers.{i}'
    # Head by head: its query, its key, its value.
    fused = weights[f'{name}.self_attn.query_key_value.weight'].reshape(
        config.heads, 3, config.stack.H, config.width)
    bias = weights[f'{name}.self_attn.query_key_value.bias'].reshape(
        config.heads, 3, config.stack.H)
    projections = {
        part: {'kernel': fused[:, j].reshape(-1, config.width).T,
               'bias': bias[:, j].reshape(-1)}
        for j, part in enumerate(('query', 'key', 'value'))}
    blocks.append({
        'attention': projections | {
            'out': dense(weights, f'{name}.self_attn.dense')} | {
                f'{part}_norm': norm(
                    weights, f'{name}.self_attn.{part[0]}_layernorm')
                for part in ('query', 'key')},
        'attention_norm': norm(weights, f'{name}.input_layernorm'),
        'mlp': {'up': dense(weights, f'{name}.mlp.dense_h_to_4h'),
                'down': dense(weights, f'{name}.mlp.dense_4h_to_h')},
        'mlp_norm': norm(weights, f'{name}.post_attention_layernorm')})
  return {
      'embedding': weights[f'{prefix}model.embed_tokens.weight'],
      'stack': stacked(blocks, norm(weights, f'{prefix}model.final_layernorm')),
      'head': dense(weights, f'{prefix}lm_head')}


class Ids:
  """A tokenizer of letters; reserved names have the ids of the references."""
  names = {'<pad>': 0, '<bos>': 1, '<eos>': 2, '<answer>': 4, '<image>': 5,
           '</image>': 6, '<patch>': 9, '<newline>': 10, '<user>': 11,
           '<assistant>': 12, '<class>': 13}

  def id(self, name):
    return self.names[name]

  def encode(self, text):
    return [16 + ord(letter) - ord('a') for letter in text]


def arranged(documents, image_layout, arrangement, rooms, size=None):
  """A batch of documents.

  Args:
    documents: a list of them.
    image_layout: of their pictures.
    arrangement: 'packed', into two rows, or 'separate', one a row.
    rooms: {arrangement: (slots of a row, its pictures)}.
    size: pixels of an empty picture.

  Returns:
    (arrays, {document: (row, its slots)}).
  """
  if arrangement == 'packed':
    members, arrays, stats = layout.packed(
        documents, Ids(), image_layout, 2, *rooms['packed'], size)
    assert stats['dropped_documents'] == 0
    order = [i for row in members for i in row]
    assert max(map(len, members)) > 1
  else:
    arrays = layout.unpacked(documents, Ids(), image_layout,
                             *rooms['separate'], size)
    order = range(len(documents))
  return (jax.tree.map(jnp.asarray, arrays),
          dict(zip(order, spans(arrays), strict=True)))


def in_order(places, x):
  """Rows as references have them, one after the other, without padding.

  Args:
    places: {document: (row, its slots)}.
    x: [rows, slots, ...].
  """
  return np.concatenate([
      np.asarray(x[row])[slots] for _, (row, slots) in sorted(places.items())])


def outputs(file, name):
  """{what: array} that a file in golden/weights gave, as in file.npz there."""
  with np.load(GOLDEN / 'weights' / f'{file}.npz') as stored:
    return {key.partition('/')[2]: x for key, x in stored.items()
            if key.partition('/')[0] == name.partition('.')[0]}


def spans(arrays):
  """Yields (row, slots) of each document in packed rows."""
  for row, segments in enumerate(np.asarray(arrays['segments'])):
    for segment in range(1, segments.max() + 1):
      yield row, segments == segment
