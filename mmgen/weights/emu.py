"""Emu (arXiv 2307.05222) and Emu2 (arXiv 2312.13286) as they are published.

  emu               Emu, pretrained
  emu_instruct      Emu-I, whose decoder has low-rank adapters
  emu_instruct_new  the same, as PEFT writes it since 0.6
  emu2              Emu2 and Emu2-Chat
  emu2_gen          Emu2-Gen, with its U-Net beside it, which is left
  hf_emu2           all three as their code for transformers has them

Emu-I's adapters stay apart; `weights.merge` makes an 'emu' of it. What the
models never read is left: Emu's final norm and head of the image tower, and the
word embedding of the former.

Emu2-Chat makes cells of 2 x 2 patches of a picture, the others of 4 x 4; their
vocabularies tell them apart.
"""

import dataclasses
import functools
import math

from mmgen import errors
from mmgen.models import causal_former
from mmgen.models import clip
from mmgen.models import connector
from mmgen.models import lora
from mmgen.models import multimodal
from mmgen.models import vision_encoder
from mmgen.models import visual_head
from mmgen.weights import decoders
from mmgen.weights import eva_clip
from mmgen.weights import layout
from mmgen.weights import lora as lora_layouts

_SAYABLE = decoders.SAYABLE | lora_layouts.SAYABLE | {
    'vision.heads': 'of the image tower',
    'vision.image_size': '[rows, columns] of pixels',
    'vision.pool': 'patches along each edge of a cell: 4 in Emu2 and Emu2-Gen, '
                   '2 for pictures in Emu2-Chat',
    'connector.max_distance': 'of the biases by distance, 128 in Emu',
}


@dataclasses.dataclass(frozen=True)
class _Names:
  """Of the parts of a layout.

  Attributes:
    decoder: a `decoders.Names`.
    tower: before 'visual.'.
    head: of the visual head.
    up: of the connector; None for a causal former.
    base: of a matrix with an adapter, before '.weight': what stands behind its
      name; None without adapters.
  """
  decoder: decoders.Names
  tower: str
  head: str
  up: str | None = None
  base: str | None = None


# ---------------------------------------------------------------------------
# Rules


def _rules(config, names):
  text = decoders.rules(config.decoder, names.decoder)
  if names.base is not None:
    if config.lora is None:
      raise errors.UserError('Emu-I has adapters, and this model has none: its '
                             "layout is 'emu'.")
    text = [_wrapped(rule, names.base) for rule in text]
    text += lora_layouts.rules(
        lora.targets(config.lora, config.decoder.stack), names.decoder.block,
        _INFIX)
  link = (_former_rules(config.connector) if names.up is None
          else layout.linear('connector/out', names.up, bias=False))
  return [*_tower_rules(config.vision, names.tower), *link,
          *layout.linear('visual_head/out', names.head, bias=False), *text]


def _tower_rules(config, prefix):
  """Those of EVA-CLIP's image tower, but for its final norm."""
  whole = dataclasses.replace(clip.SIZES['eva01-g14'], vision=config)
  return [
      dataclasses.replace(rule, theirs=tuple(
          prefix + name for name in rule.theirs))
      for rule in eva_clip.LAYOUTS['eva_clip'].rules(whole)
      if rule.ours[0].startswith('vision/')
      and not rule.ours[0].startswith('vision/stack/final_norm')]


def _former_rules(config):
  return [
      *layout.norm('connector/norm', 'ln_visual'),
      layout.same('connector/queries', 'cformer.causal_tokens', lead=1),
      layout.same('connector/relative_bias', _BIAS),
      *layout.modules(_FORMER, 'connector/blocks/', _BLOCK, bias=False),
      *layout.norm('connector/final_norm', 'cformer.cformer.final_layer_norm',
                   bias=False),
      *layout.linear('connector/out', 'cformer.projection')]


def _wrapped(rule, base):
  """The rule of a matrix with an adapter; others as they are."""
  name = rule.theirs[0].removesuffix('.weight')
  if not name.endswith(tuple(f'self_attn.{part}_proj' for part in 'qkvo')):
    return rule
  return dataclasses.replace(rule, theirs=(f'{name}{base}.weight',))


# ---------------------------------------------------------------------------
# Which model it is


def _recognise(tensors, beside, said, names):
  """The `MultimodalConfig`, or None."""
  link = 'cformer.causal_tokens' if names.up is None else f'{names.up}.weight'
  tower = f'{names.tower}visual.'
  query = f'{names.decoder.block}self_attn.q_proj{names.base or ""}.weight'
  if not all(name in tensors for name in (link, f'{tower}cls_token')) or (
      not decoders.any_of(tensors, query)):
    return None
  own = beside.get('config.json', {})
  own = own if 'num_attention_heads' in own else {}
  sizes = decoders.sizes(_unwrapped(tensors, names), names.decoder, own)
  vision = _tower_sizes(tensors, tower)
  known = _known_decoder(sizes, own, names) | _known_tower(
      vision, own.get('vision_config') or {}, names)
  if names.up is None:
    former = _former_sizes(tensors)
    usual = all(getattr(causal_former.CausalFormerConfig, field) == size
                for field, size in former.items() if field != 'width')
    known['connector.max_distance'] = 128 if usual else None
  else:
    known.setdefault('vision.pool', _POOLS.get(sizes['vocab']))
  if names.base is not None:
    known |= _known_adapters(tensors, names)
  known = decoders.settle(
      known, said, {name: _SAYABLE[name] for name in known})
  vision = decoders.make(vision_encoder.VisionEncoderConfig, vision | dict(
      class_entry=names.up is None,
      placement='pre' if names.up is None else 'post',
      **decoders.within(known, 'vision')))
  width = sizes['width']
  link = (decoders.make(causal_former.CausalFormerConfig, former | dict(
      border=True, **decoders.within(known, 'connector')))
          if names.up is None else connector.ConnectorConfig(
              'linear', width, bias=False, border=True))
  head = visual_head.VisualHeadConfig(
      'linear', 'connector' if names.up is None else 'vision')
  adapters = None if names.base is None else decoders.make(
      lora.LoraConfig, dict(
          rank=_rank(tensors, names), pattern=_ADAPTERS.pattern,
          **decoders.within(known, 'lora')))
  return decoders.make(multimodal.MultimodalConfig, dict(
      decoder=decoders.config(sizes, known), vision=vision, connector=link,
      visual_head=head, lora=adapters))


def _unwrapped(tensors, names):
  """The tensors under the names that they have without adapters."""
  if not names.base:
    return tensors
  return {name.replace(f'_proj{names.base}.', '_proj.'): tensor
          for name, tensor in tensors.items()}


def _rank(tensors, names):
  return decoders.shape(tensors, f'{names.decoder.block}self_attn.q_proj.lora_A'
                        f'{_INFIX}.weight')[0]


def _known_adapters(tensors, names):
  """What shapes do not tell; those of another rank are not Emu-I's."""
  published = _rank(tensors, names) == _ADAPTERS.rank
  return {f'lora.{field}': getattr(_ADAPTERS, field) if published else None
          for field in ('alpha', 'dropout')}


def _known_decoder(sizes, own, names):
  """As `decoders.known`; rows have been added to the embedding of a LLaMA."""
  if own:
    return decoders.known(sizes, own)
  sizes = {field: size for field, size in sizes.items() if field != 'vocab'}
  return decoders.known(
      sizes, {}, ('llama-13b',) if names.up is None else ('llama-33b',))


def _tower_sizes(tensors, prefix):
  """Fields of the tower that shapes tell, and those that all of them have."""
  shape = functools.partial(decoders.shape, tensors)
  block = f'{prefix}blocks.{{layer}}.'
  patch = shape(f'{prefix}patch_embed.proj.weight', 4)[-1]
  side = math.isqrt(max(shape(f'{prefix}pos_embed', 3)[1] - 1, 1)) * patch
  return dict(
      _TOWER, image_size=(side, side), patch=patch,
      layers=decoders.layers(tensors, block),
      width=shape(f'{prefix}cls_token', 3)[-1],
      hidden=shape(f'{block}mlp.fc1.weight')[0])


def _known_tower(sizes, own, names):
  """What shapes do not tell; None for what has to be said."""
  usual = vision_encoder.sized(
      'eva01-g14' if names.up is None else 'eva02-e14-plus')
  published = all(getattr(usual, field) == sizes[field] for field in (
      'width', 'layers', 'hidden', 'patch'))
  known = {'vision.heads': usual.heads if published else None,
           'vision.image_size': sizes['image_size']}
  if 'head_width' in own:
    known['vision.heads'] = max(sizes['width'] // own['head_width'], 1)
  if 'image_size' in own:
    known['vision.image_size'] = (own['image_size'],) * 2
  if 'n_query' in own:
    cells = known['vision.image_size'][0] // sizes['patch']
    known['vision.pool'] = cells // max(math.isqrt(own['n_query']), 1)
  return known


def _former_sizes(tensors):
  """Fields of the causal former that shapes tell."""
  shape = functools.partial(decoders.shape, tensors)
  buckets, heads = shape(_BIAS)
  rows = shape(f'{_BLOCK}0.SelfAttention.q.weight')[0]
  queries, inner = shape('cformer.causal_tokens', 3)[1:]
  return dict(
      queries=queries, inner_width=inner, buckets=buckets, heads=heads,
      head_dim=max(rows // heads, 1), layers=decoders.layers(tensors, _BLOCK),
      hidden=shape(f'{_BLOCK}2.DenseReluDense.wi.weight')[0],
      width=shape('cformer.projection.weight')[0])


def _image(config, beside):
  """Stretched to the square of the positions."""
  del beside
  c = config.vision
  return dict(size=c.image_size, fit='square', kernel='bicubic', mean=c.mean,
              std=c.std)


# ---------------------------------------------------------------------------
# Names


_TOWER = dict(norm_eps=1e-6, init='eva', stem_bias=True, pre_norm=False,
              mlp='gelu', qkv_bias='qv', tap=-1, final_norm=False)
_BLOCK = 'cformer.cformer.block.{layer}.layer.'
_BIAS = ('cformer.cformer.block.0.layer.0.SelfAttention.'
         'relative_attention_bias.weight')
_FORMER = {
    'attention_norm': '0.layer_norm', 'cross_attention_norm': '1.layer_norm',
    'mlp_norm': '2.layer_norm', 'mlp/up': '2.DenseReluDense.wi',
    'mlp/down': '2.DenseReluDense.wo'} | {
        f'{ours}/{part}': f'{theirs}.{part[0]}'
        for ours, theirs in (('attention', '0.SelfAttention'),
                             ('cross_attention', '1.EncDecAttention'))
        for part in ('query', 'key', 'value', 'out')}
_POOLS = {32272: 4, 32274: 2}
# By words: (style of prompts, family of the tokenizer).
_SPOKEN = {32004: ('emu', 'emu'), 32006: ('emu_instruct', 'emu_instruct'),
           32272: ('emu', 'emu2'), 32274: ('emu2_chat', 'emu2_chat')}
_ADAPTERS = multimodal.SIZES['emu-i'].lora
_INFIX = '.default'


def _layout(names, usual):
  spoken = lambda config: _SPOKEN.get(config.decoder.vocab, usual)
  return layout.Layout(
      recognise=functools.partial(_recognise, names=names),
      build=decoders.build, rules=functools.partial(_rules, names=names),
      image=_image, ignored=(
          *decoders.BUFFERS, r'visual\.(norm|head)\.(weight|bias)',
          r'cformer\.cformer\.embed_tokens\.weight',
          r'(unet|vae|safety_checker)\..*'),
      style=lambda config: spoken(config)[0],
      family=lambda config: spoken(config)[1])


def _emu(lm, base=None, words=32006):
  return _layout(_Names(decoders.Names(f'{lm}model.', f'{lm}lm_head'), '',
                        f'{lm}stu_regress_head', base=base), _SPOKEN[words])


def _emu2(tower, root):
  lm = f'{tower}decoder.lm.'
  return _layout(_Names(decoders.Names(f'{lm}model.', f'{lm}lm_head'), tower,
                        f'{root}project_down', up=f'{root}project_up'),
                 _SPOKEN[32272])


_PEFT = 'decoder.lm.base_model.model.'
LAYOUTS = {
    'emu': _emu('decoder.lm.', words=32004),
    'emu_instruct': _emu(_PEFT, ''),
    'emu_instruct_new': _emu(_PEFT, '.base_layer'),
    'emu2': _emu2('', ''),
    'emu2_gen': _emu2('multimodal_encoder.', 'multimodal_encoder.'),
    'hf_emu2': _emu2('model.', ''),
}
