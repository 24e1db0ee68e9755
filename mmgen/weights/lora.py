"""Low-rank adapters as PEFT stores them: apart from the model they adapt.

  peft   adapter_model.safetensors or .bin, with adapter_config.json beside it

`assembly.py` gives them to a model. The format is that of PEFT 0.21 and before;
fields of its config that change what a model computes and are not known here
are refused.
"""

import collections
import dataclasses
import json
import pathlib
import re

import flax.traverse_util
import jax
import numpy as np

from mmgen import errors
from mmgen.models import lora
from mmgen.weights import decoders
from mmgen.weights import files
from mmgen.weights import layout

CONFIG = 'adapter_config.json'
# Beside the adapters of LLaVA's authors: the connector.
TRAINABLES = 'non_lora_trainables.bin'

# Of our projections, as they are called within a block.
_MODULES = {
    'attention/query': 'self_attn.q_proj', 'attention/key': 'self_attn.k_proj',
    'attention/value': 'self_attn.v_proj', 'attention/out': 'self_attn.o_proj',
    'mlp/gate': 'mlp.gate_proj', 'mlp/up': 'mlp.up_proj',
    'mlp/down': 'mlp.down_proj'}
_OURS = {theirs: ours for ours, theirs in _MODULES.items()}
# PEFT puts 'base_model.model.' before names, and the name of a set of adapters
# into those of a model in memory.
_BEFORE = 'base_model.model.'
_NAME = re.compile(r'(?P<before>(?:[\w.]*\.)?layers\.)\d+\.(?P<module>'
                   + '|'.join(map(re.escape, _OURS))
                   + r')\.lora_[AB](?P<infix>\.\w+)?\.weight')
# Names of decoders, by the layout of the model that is adapted; None: it was
# trained here. Within Emu-I a LLaMA is adapted.
_DECODERS = {
    None: decoders.PLAIN, 'llama': decoders.PLAIN, 'llava': decoders.PLAIN,
    'llava_tower': decoders.PLAIN, 'hf_llava': decoders.WITHIN,
    'hf_llava_new': decoders.WITHIN_NEW, 'hf_llava_flat': decoders.WITHIN_NEW,
    'emu_instruct': decoders.PLAIN, 'emu_instruct_new': decoders.PLAIN}
SAYABLE = {'lora.alpha': "numerator of the adapters' factor; the rank is its "
                          'denominator',
            'lora.dropout': "of what adapters read in training, often 0.05"}
# Fields of PEFT's config with which outputs stay what they are; of others only
# such values as say 'no'.
_HARMLESS = ('task_type', 'r', 'lora_alpha', 'lora_dropout', 'target_modules',
             'base_model_name_or_path', 'inference_mode', 'revision',
             'auto_mapping', 'exclude_modules', 'megatron_core',
             'qalora_group_size', 'peft_version', 'ensure_weight_tying',
             'loftq_config', 'eva_config', 'corda_config', 'lora_ga_config')
# Other ways to begin change the model itself, which is not in the file.
_INITS = (True, 'gaussian', 'orthogonal', 'eva')
_NO = (None, False, 'none', [], {})


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
  """Attributes:
    lora: a `models.lora.LoraConfig`.
    layers: L.
    sizes: (projection, inputs, outputs) of each that has an adapter.
    block: before their names of a block's parts, with '{layer}'.
    infix: name of the set of adapters, '.default', or ''.
  """
  lora: lora.LoraConfig
  layers: int
  sizes: tuple[tuple[str, int, int], ...]
  block: str
  infix: str = ''

  @property
  def of_decoder(self):
    """Whether they are of a decoder, and not of the tower beside it."""
    return self.block in {_BEFORE + names.block for names in _DECODERS.values()}


@dataclasses.dataclass(frozen=True)
class Alone:
  """Stands for the module that adapters alone do not have."""
  config: AdapterConfig


# ---------------------------------------------------------------------------
# The layout


def rules(names, block, infix=''):
  """Rules of adapters.

  Args:
    names: of `models.lora.projections`.
    block: before their names of a block's parts, with '{layer}'.
    infix: as in `AdapterConfig`.
  """
  swap = lambda x: (x.T,)
  return [
      layout.Rule((f'lora/blocks/{name}/{side}',),
                  (f'{block}{_MODULES[name]}.lora_{side.upper()}{infix}.weight',
                   ), swap, swap)
      for name in names for side in 'ab']


def _rules(config):
  return rules([name for name, _, _ in config.sizes], config.block,
               config.infix)


def _build(config, dtype):
  """As `Layout.build`."""
  shapes, rank = {}, config.lora.rank
  for name, inputs, outputs in config.sizes:
    for side, shape in (('a', (inputs, rank)), ('b', (rank, outputs))):
      shapes[f'lora/blocks/{name}/{side}'] = jax.ShapeDtypeStruct(
          (config.layers, *shape), dtype)
  return Alone(config), shapes


def _recognise(tensors, beside, said):
  """The `AdapterConfig`, or None."""
  found = [match for match in map(_NAME.fullmatch, tensors) if match]
  if 2 * len(found) <= len(tensors):
    return None
  own = beside.get(CONFIG, {})
  _refuse(own)
  known = decoders.settle(
      {'lora.alpha': own.get('lora_alpha'),
       'lora.dropout': own.get('lora_dropout', 0.0)}, said, SAYABLE)
  most = lambda group: collections.Counter(
      match[group] or '' for match in found).most_common(1)[0][0]
  block, infix = most('before') + '{layer}.', most('infix')
  asked = own.get('target_modules') or ()
  asked = () if isinstance(asked, str) else asked
  names = [ours for theirs, ours in _OURS.items()
           if any(match['module'] == theirs for match in found)
           or any(theirs.endswith(target) for target in asked)]
  of = lambda name, side: decoders.shape(
      tensors, f'{block}{_MODULES[name]}.lora_{side}{infix}.weight')
  rank = collections.Counter(
      of(name, 'A')[0] for name in names).most_common(1)[0][0]
  if own.get('r') not in (None, rank):
    raise errors.UserError(f'{CONFIG} says r={own["r"]!r}, and the adapters '
                           f'beside it have the rank {rank}.')
  return AdapterConfig(
      lora=decoders.make(lora.LoraConfig, dict(
          rank=rank, pattern='|'.join(names),
          **decoders.within(known, 'lora'))),
      layers=decoders.layers(tensors, block), block=block, infix=infix,
      sizes=tuple((name, of(name, 'A')[1], of(name, 'B')[0])
                  for name in names))


def _refuse(own):
  """Raises UserError where PEFT's config asks for another computation."""
  fine = lambda field, value: (
      field in _HARMLESS or value in _NO
      or field == 'peft_type' and value == 'LORA'
      or field == 'init_lora_weights' and value in _INITS)
  odd = [f'{field}={value!r}' for field, value in own.items()
         if not fine(field, value)]
  if odd:
    raise errors.UserError(
        f'{CONFIG} asks for {", ".join(odd)}, which is not supported.')


def describe(config, family=None, names=()):
  """Says how the adapters of a model are stored by themselves.

  Args:
    config: a `MultimodalConfig` with adapters.
    family: layout of the model that they adapt, in `weights.FAMILIES`; None for
      the names that LLaMA and LLaVA's authors have.
    names: of their tensors, where they came from files.

  Returns:
    An `AdapterConfig`.

  Raises:
    UserError: the model has none, or PEFT's adapters of such a model are not
      known here.
  """
  if config.lora is None:
    raise errors.UserError('the model has no adapters.')
  if family not in _DECODERS:
    known = ', '.join(filter(None, _DECODERS))
    raise errors.UserError(f'adapters of the layout {family!r} are not known; '
                           f'known: {known}.')
  found = [match for match in map(_NAME.fullmatch, names)
           if match and match['before'].startswith(_BEFORE)]
  block, infix = (f'{found[0]["before"]}{{layer}}.', found[0]['infix'] or ''
                  ) if found else (_BEFORE + _DECODERS[family].block, '')
  stack = config.decoder.stack
  return AdapterConfig(
      config.lora, stack.layers, block=block, infix=infix,
      sizes=tuple((name, *sizes) for name, sizes in
                  lora.targets(config.lora, stack).items()))


# ---------------------------------------------------------------------------
# Files


def export(folder, config, params, dtypes='float32', own=None):
  """Writes a folder that PEFT reads.

  Args:
    folder: new or empty.
    config: an `AdapterConfig`, of `describe` or as it was loaded.
    params: nested dict with 'lora'.
    dtypes: {their name: dtype}, or one for all.
    own: content of adapter_config.json, if they came with one.
  """
  folder = pathlib.Path(folder)
  if folder.is_dir() and any(folder.iterdir()):
    raise errors.UserError(f'{folder} has files already; give another folder.')
  files.write(folder / 'adapter_model.safetensors', layout.export(
      _rules(config), {'lora/' + name: np.asarray(leaf) for name, leaf in
                       _flat(params['lora']).items()}, dtypes),
      metadata={'format': 'pt'})
  (folder / CONFIG).write_text(
      json.dumps(own or _peft_config(config), indent=2) + '\n')


def _peft_config(config):
  """PEFT's own description; other fields have its defaults."""
  modules = [_MODULES[name] for name, _, _ in config.sizes]
  before = config.block.removeprefix(_BEFORE).replace('{layer}.', '')
  if before == 'model.layers.':
    targets = sorted(name.rpartition('.')[2] for name in modules)
  else:  # a tower has projections of the same names
    targets = (re.escape(before) + r'\d+\.('
               + '|'.join(map(re.escape, modules)) + ')')
  return dict(
      peft_type='LORA', task_type='CAUSAL_LM', r=config.lora.rank,
      lora_alpha=config.lora.alpha, lora_dropout=config.lora.dropout,
      target_modules=targets, bias='none', fan_in_fan_out=False,
      inference_mode=True, init_lora_weights=True, modules_to_save=None,
      base_model_name_or_path=None)


def _flat(tree):
  return flax.traverse_util.flatten_dict(tree, sep='/')


LAYOUTS = {'peft': layout.Layout(
    recognise=_recognise, build=_build, rules=_rules,
    image=lambda config, beside: {})}
