"""Host memory and time that loading a decoder of true size takes.

  python -m experiments.benchmarks.load_weights --size=vicuna-7b

Writes random bfloat16 weights of a published size (13.5 GB for 7B) in shards,
as transformers does, and loads them in fresh processes, onto one device and
onto eight. On a host whose devices are CPUs all shards are on that host, so the
least it can hold is the whole model; `above` is what it held at its peak beyond
that, and the bound is the largest tensor of the file. Linux only: it reads
/proc. Files that lie in the page cache are faster; nothing here empties it.
"""

import argparse
import functools
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from rich import console
from rich import table

from mmgen import weights
from mmgen.models import decoder
from mmgen.models import multimodal
from mmgen.training import sharding
from mmgen.weights import files

_GIB = 2**30


def write(folder, size):
  """Writes random weights of a decoder, and the config.json beside them."""
  config = multimodal.MultimodalConfig(decoder.sized(size))
  family, text = weights.FAMILIES['llama'], config.decoder
  _, ours = family.build(config, 'bfloat16')
  shapes = weights.layout_lib.expected(family.rules(config), ours)
  # Positive numbers below 1; one block of them again and again.
  block = np.random.default_rng(0).integers(
      0, 0x3F80, 2**20, np.uint16).view('bfloat16')
  folder.mkdir(parents=True)
  files.write(folder, ((name, np.resize(block, shape))
                       for name, shape in shapes.items()))
  (folder / 'config.json').write_text(json.dumps(dict(
      model_type='llama', num_attention_heads=text.heads,
      num_key_value_heads=text.stack.K, rms_norm_eps=text.norm_eps,
      rope_theta=text.rope_theta)))


def measure(folder, devices):
  """Loads the weights here; prints what it took as JSON."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', devices)
  mesh = sharding.make_mesh(dict(data=1, fsdp=-1, tensor=1, sequence=1))
  tensors = files.open(folder)
  jax.block_until_ready(jax.device_put(0.0))  # what jax itself holds
  before = _kilobytes('VmRSS')
  with open('/proc/self/clear_refs', 'w') as file:
    file.write('5')  # the peak starts anew
  start = time.perf_counter()
  loaded = weights.load(folder, dtype='bfloat16', place=functools.partial(
      sharding.shardings, mesh))
  leaves = jax.block_until_ready(jax.tree.leaves(loaded.params))
  seconds = time.perf_counter() - start
  print(json.dumps(dict(
      seconds=seconds, grown=1024 * (_kilobytes('VmHWM') - before),
      model=sum(leaf.nbytes for leaf in leaves),
      device=max(sum(s.data.nbytes for leaf in leaves
                     for s in leaf.addressable_shards if s.device == d)
                 for d in mesh.devices.flat),
      largest=max(t.nbytes for t in tensors.values()))))


def _kilobytes(field):
  with open('/proc/self/status') as file:
    return next(int(line.split()[1]) for line in file if field in line)


def main(argv=None):
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--size', default='vicuna-7b', choices=[
      size for size, fields in decoder.SIZES.items() if 'norm' not in fields])
  parser.add_argument('--folder', type=pathlib.Path,
                      help='keeps the weights there, or finds them there')
  parser.add_argument('--devices', type=int, nargs='+', default=[1, 8])
  parser.add_argument('--measure', type=int, help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.measure:
    measure(args.folder, args.measure)
    return
  with tempfile.TemporaryDirectory() as temporary:
    folder = args.folder or pathlib.Path(temporary) / args.size
    if not folder.exists():
      write(folder, args.size)
    out = table.Table('devices', 'model', 'a device holds', 'peak', 'above',
                      'largest tensor', 'seconds', title=args.size)
    for devices in args.devices:
      found = json.loads(subprocess.run(
          [sys.executable, '-m', 'experiments.benchmarks.load_weights',
           f'--folder={folder}', f'--measure={devices}'],
          check=True, stdout=subprocess.PIPE, text=True).stdout)
      size = lambda key, found=found: f'{found[key] / _GIB:.3f} GiB'
      above = (found['grown'] - found['model']) / _GIB
      out.add_row(str(devices), size('model'), size('device'), size('grown'),
                  f'{above:.3f} GiB', size('largest'),
                  f'{found["seconds"]:.0f}')
    console.Console().print(out)


if __name__ == '__main__':
  main()
