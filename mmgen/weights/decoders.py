"""LLaMA, Vicuna and Qwen2 as they are published, and what decoders share.

  llama   transformers' LlamaForCausalLM and Qwen2ForCausalLM

Sizes are read off shapes. Heads, the epsilon of norms and the base of rotary
positions change no shape: there the config beside the tensors decides, else the
published decoders of these sizes, if they agree, else the user. LLaMA-7B and
Vicuna-7B do not: they differ in the epsilon alone.
"""

import collections
import dataclasses
import functools
import re

import flax.traverse_util
import jax

from mmgen import errors
from mmgen import fields as fields_lib
from mmgen.models import decoder
from mmgen.models import multimodal
from mmgen.weights import answers
from mmgen.weights import layout

SAYABLE = {
    'decoder.heads': 'query heads',
    'decoder.norm_eps': 'of all norms: 1e-6 for LLaMA and Qwen2.5, 1e-5 for '
                        'Llama 2 and what is made of it, as Vicuna v1.5',
    'decoder.rope_theta': 'base of rotary positions, often 10000',
}


@dataclasses.dataclass(frozen=True)
class Names:
  """What stands before the names of a decoder's parts.

  Attributes:
    model: before those of 'embed_tokens', 'layers' and the norm.
    head: name of the head, without '.weight'.
  """
  model: str
  head: str

  @property
  def block(self):
    return f'{self.model}layers.{{layer}}.'


PLAIN = Names('model.', 'lm_head')
# Decoders within a model that sees, before transformers 4.52 and in files
# still, and since.
WITHIN = Names('language_model.model.', 'language_model.lm_head')
WITHIN_NEW = Names('model.language_model.', 'lm_head')


# ---------------------------------------------------------------------------
# Rules


def rules(config, names):
  """Rules of LLaMA and Qwen2; config is a `DecoderConfig`."""
  ours, theirs = 'decoder/stack/blocks/', names.block
  made = ends(names, f'{names.model}norm', bias=False)
  for part in ('query', 'key', 'value', 'out'):
    made += layout.linear(
        f'{ours}attention/{part}', f'{theirs}self_attn.{part[0]}_proj',
        bias=config.out_bias if part == 'out' else config.qkv_bias)
  made += layout.modules({part: part.replace('/', '.') + '_proj' for part in (
      'mlp/gate', 'mlp/up', 'mlp/down')}, ours, theirs, bias=config.mlp_bias)
  return made + layout.modules(NORMS, ours, theirs, bias=False)


def ends(names, final_norm, bias):
  """Rules of what comes before and after the blocks of a decoder."""
  return [
      layout.same('decoder/embedding', f'{names.model}embed_tokens.weight'),
      *layout.norm('decoder/stack/final_norm', final_norm, bias=bias),
      *layout.linear('decoder/head', names.head, bias=False)]


NORMS = {'attention_norm': 'input_layernorm',
         'mlp_norm': 'post_attention_layernorm'}


# ---------------------------------------------------------------------------
# Which decoder it is


def sizes(tensors, names, own):
  """Fields of a `DecoderConfig` by shapes and, before them, by a config.

  Args:
    tensors: of the file.
    names: of its layout.
    own: {field: value} of transformers, {} for none.

  Returns:
    {field: value}, and 'queries' and 'keys', the rows of their matrices; or
    None if the tensors are of another layout.
  """
  block = names.block
  if not all(any_of(tensors, block + part) for part in (
      'self_attn.q_proj.weight', 'mlp.gate_proj.weight')):
    return None
  found = dict(
      vocab=shape(tensors, f'{names.model}embed_tokens.weight')[0],
      layers=layers(tensors, block),
      width=shape(tensors, f'{block}input_layernorm.weight', 1)[0],
      hidden=shape(tensors, f'{block}mlp.gate_proj.weight')[0],
      qkv_bias=any_of(tensors, f'{block}self_attn.q_proj.bias'),
      out_bias=any_of(tensors, f'{block}self_attn.o_proj.bias'),
      mlp_bias=any_of(tensors, f'{block}mlp.gate_proj.bias'),
      queries=shape(tensors, f'{block}self_attn.q_proj.weight')[0],
      keys=shape(tensors, f'{block}self_attn.k_proj.weight')[0])
  return stated(found, own, SIZES)


def stated(found, own, names):
  """Sizes by shapes and, before them, by a config; UserError if they differ.

  Args:
    found: {our field: size}.
    own: {their field: size}.
    names: {their field: our field}.
  """
  layout.agree({theirs: found[ours] for theirs, ours in names.items()}, own)
  return found | {ours: own[theirs] for theirs, ours in names.items()
                  if theirs in own}


def known(sizes, own, among=decoder.SIZES):
  """What shapes do not tell; None for what has to be said.

  Args:
    sizes: of `sizes`.
    own: {field: value} of transformers, {} for none.
    among: sizes of `decoder.SIZES` that it may be.

  Returns:
    {a name of `SAYABLE`: value}.

  Raises:
    UserError: the config asks for what these decoders cannot do.
  """
  if not own:
    return published(sizes | dict(norm='rms', mlp='swiglu'), among, SAYABLE)
  refuse(own, hidden_act=('silu',), use_sliding_window=(False,))
  return {'decoder.heads': own.get('num_attention_heads', 32),
          'decoder.norm_eps': own.get('rms_norm_eps', 1e-6),
          'decoder.rope_theta': rope_theta(own, 1e4)}


def config(sizes, known):
  """The `DecoderConfig`."""
  fields = dict(sizes)
  queries, keys = fields.pop('queries'), fields.pop('keys')
  fields |= within(known, 'decoder')
  heads, width = fields['heads'], fields['width']
  H = max(queries // max(heads, 1), 1)
  return make(decoder.DecoderConfig, fields | dict(
      kv_heads=None if keys == queries else max(keys // H, 1),
      head_dim=None if H * heads == width else H))


def refuse(own, **usual):
  """Raises UserError where a config has an unusual value of a field."""
  odd = [f'{field}={own[field]!r}' for field, values in usual.items()
         if own.get(field) is not None and own[field] not in values]
  if odd:
    raise errors.UserError(
        f'config.json asks for {", ".join(odd)}, which is not supported.')


def rope_theta(own, default):
  """The base of rotary positions; UserError if these are stretched."""
  rope = own.get('rope_parameters') or own.get('rope_scaling') or {}
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind != 'default':
    raise errors.UserError(f'config.json asks for rotary positions of the type '
                           f'{kind!r}, which is not supported.')
  return rope.get('rope_theta', own.get('rope_theta', default))


def _recognise(tensors, beside, said):
  own = beside.get('config.json', {})
  found = sizes(tensors, PLAIN, own if own.get('model_type') else {})
  if found is None:
    return None
  if own.get('model_type') not in (None, 'llama', 'qwen2'):
    raise errors.UserError(
        f'config.json has model_type {own["model_type"]!r}, whose tensors have '
        "the names of a 'llama'; known: llama, qwen2.")
  fields = settle(known(found, own if own.get('model_type') else {}), said,
                  SAYABLE)
  return multimodal.MultimodalConfig(config(found, fields))


# ---------------------------------------------------------------------------
# For all layouts with a decoder


def any_of(tensors, name):
  """Whether some layer has a tensor of that name."""
  return any(True for _ in _layers_of(tensors, name))


def shape(tensors, name, axes=2):
  """The shape of a tensor in most layers; ones where there is none.

  Then, and where a layer differs, `layout.check` says so.
  """
  shapes = [tuple(tensor.shape) for _, tensor in _layers_of(tensors, name)
            if len(tensor.shape) == axes]
  return (collections.Counter(shapes).most_common(1)[0][0] if shapes
          else (1,) * axes)


def layers(tensors, block):
  """The number of layers that most parts of a block have."""
  parts = collections.Counter(
      re.sub(r'\.\d+\.', '.', name, count=1) for name, _ in _layers_of(
          tensors, block, r'(?!.*inv_freq).*'))
  return collections.Counter(parts.values()).most_common(1)[0][0]


def _layers_of(tensors, name, rest=''):
  pattern = re.compile(re.escape(name).replace(r'\{layer\}', r'\d+') + rest)
  return ((name, tensor) for name, tensor in tensors.items()
          if pattern.fullmatch(name))


def published(sizes, among, fields):
  """What published decoders of these sizes have.

  Args:
    sizes: {field of `DecoderConfig`: value}, and 'queries' and 'keys'.
    among: names in `decoder.SIZES`.
    fields: 'decoder.norm_eps', ...

  Returns:
    {field: value}, None where there is no such decoder or they differ.
  """
  values = collections.defaultdict(set)
  for c in map(decoder.sized, among):
    rows = dict(queries=c.heads * c.stack.H, keys=c.stack.K * c.stack.H)
    if all(rows[name] == size if name in rows else getattr(c, name) == size
           for name, size in sizes.items()):
      for field in fields:
        values[field].add(getattr(c, field.removeprefix('decoder.')))
  return {field: values[field].pop() if len(values[field]) == 1 else None
          for field in fields}


def settle(known, said, sayable):
  """Puts what a user says before all else.

  Args:
    known: {'decoder.heads': value, ...}, None for what has to be said.
    said: likewise.
    sayable: {field: what it is}.

  Raises:
    UserError: something is not known, or cannot be said.
  """
  known = known | answers.take(said, sayable, 'this model')
  answers.ask((field for field, value in known.items() if value is None),
             sayable)
  return known


def within(known, part):
  """{'heads': 8} of {'decoder.heads': 8, 'vision.tap': -2} and 'decoder'."""
  return {name.removeprefix(f'{part}.'): value for name, value in known.items()
          if name.startswith(f'{part}.')}


def make(kind, fields):
  """An instance of a class of configs, which checks what it is given."""
  try:
    if not dataclasses.is_dataclass(kind):
      return kind(**fields)
    made = fields_lib.read(kind, kind.__name__, fields, ValueError)
    _ = getattr(made, 'stack', None)  # which checks what a stack is made of
    return made
  except (TypeError, ValueError) as error:
    raise errors.UserError(f'no such model exists: {error}') from error


def build(config, dtype,
          parts=('vision', 'connector', 'decoder', 'visual_head', 'lora')):
  """As `Layout.build`, of a `MultimodalConfig`.

  Args:
    config: of the model.
    dtype: of the computation.
    parts: of the model that the layout has; the module has all of them.
  """
  model = multimodal.MultimodalDecoder(dataclasses.replace(config, **{
      name: dataclasses.replace(part, dtype=dtype)
      for name, part in vars(config).items() if hasattr(part, 'dtype')}))
  vision = config.vision
  # Without positions of its own a module takes pictures of one cell.
  batch = multimodal.example_batch(config, vision and getattr(
      vision, 'image_size', (vision.patch * getattr(vision, 'pool', 1),) * 2))
  tree = jax.eval_shape(model.init, jax.random.key(0), batch)['params']
  return model, {
      name: jax.ShapeDtypeStruct(leaf.shape, dtype) for name, leaf in
      flax.traverse_util.flatten_dict(tree, sep='/').items()
      if name.partition('/')[0] in parts}


# What follows from a config, and older versions stored.
BUFFERS = (r'.*\.rotary_emb\.inv_freq',)
# Of the embedding the file decides: files have been padded to more rows.
SIZES = {'num_hidden_layers': 'layers', 'hidden_size': 'width',
         'intermediate_size': 'hidden'}
LAYOUTS = {
    'llama': layout.Layout(
        recognise=_recognise,
        build=functools.partial(build, parts=('decoder',)),
        rules=lambda config: rules(config.decoder, PLAIN),
        image=lambda config, beside: {}, ignored=BUFFERS),
}
