"""What one step of a run takes on a slice of TPUs, found out without a TPU.

  python -m mmgen.plan --config=eve/stage1:with_x1:pretrain --scale=paper
  python -m mmgen.plan --config=<row> --slice=v5e:2x2 --forward

From shapes only, the real step is compiled by libtpu (extra `plan`) for the
slice that the row names (`config.mesh.slice`), with the mesh and the layout of
parameters that training uses. Printed are the bytes a chip holds: arguments
(parameters, optimizer, batch), temporaries, and the peak, against its memory.

Three things it does not say: how fast a step is (only that it takes no less
than its matrix products at the chip's peak), whether the input keeps up, and
what evaluation takes.
"""

import argparse
import json
import math
import os
import sys
import warnings

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from mmgen import config as config_lib
from mmgen import errors
from mmgen import train as train_lib
from mmgen.data import pipeline as pipeline_lib
from mmgen.objectives import common
from mmgen.training import metrics as metrics_lib
from mmgen.training import optimizer as optimizer_lib
from mmgen.training import sharding
from mmgen.training import step as step_lib

# Memory of one chip in GiB, from the vendor's data sheets.
HBM_GIB = {'TPU v4': 32, 'TPU v5 lite': 16, 'TPU v5': 95, 'TPU v6 lite': 32}
# Trained parameters, and both moments of the optimizer, in float32.
TRAINED_BYTES = 12


def slice_devices(name: str):
  """Returns the devices of a TPU slice, such as 'v5e:16x16' or 'v5p:4x4x4'.

  Raises:
    UserError: no libtpu, or no such slice.
  """
  # What libtpu would otherwise ask of a cloud machine, one second at a time.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-16')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  try:
    return topologies.get_topology_desc(name, platform='tpu').devices
  except Exception as error:  # of the plugin, whose classes jax does not name
    raise errors.UserError(
        f'no devices for the slice {name!r}: '
        f'{" ".join(str(error).split())[:200]}. Give one such as v5e:16x16 or '
        "v5p:4x4x4, and install libtpu: pip install 'mmgen[plan]'.") from error


def _placed(tree, layout):
  """Gives shapes their place on the mesh."""
  return jax.tree.map(
      lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
      tree, layout)


def _bytes(tree) -> int:
  return sum(math.prod(x.shape) * x.dtype.itemsize
             for x in jax.tree.leaves(tree))


def shapes(config, mesh):
  """Returns all that a step is made of, as shapes on a mesh.

  Args:
    config: locked config.
    mesh: of `sharding.make_mesh`, of real devices or of a slice's.

  Returns:
    (model, step, state, frozen, batch): the jitted train step and the shapes
    of its arguments.

  Raises:
    UserError: a mistake in the config, or a mesh that does not fit it.
  """
  batch = pipeline_lib.empty_batch(config, config_lib.image_layout(config))
  sharding.check_rows(mesh, batch, config.optimizer.accumulate)
  model = config_lib.build_model(config)
  objective = train_lib.build_objective(config, model)
  birth, optimizer = train_lib.plan_birth(config, model, objective, batch)
  state, frozen = jax.eval_shape(birth, jax.random.key(0))
  frozen = jax.eval_shape(
      lambda x: optimizer_lib.cast(x, config.dtype), frozen)
  layout = sharding.shardings(mesh, (state, frozen))
  state, frozen = _placed((state, frozen), layout)
  rows = NamedSharding(mesh, PartitionSpec(sharding.ROWS))
  batch = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch)
  step = step_lib.make_train_step(objective, optimizer, config, layout[0])
  return model, step, state, frozen, batch


def plan(config, slice_name: str, forward: bool = False) -> dict:
  """Compiles one step for a slice and reads what it takes.

  Args:
    config: locked config.
    slice_name: such as 'v5e:16x16'.
    forward: the forward pass alone, with parameters in compute dtype.

  Returns:
    A dict of plain values, as `text` prints them; bytes are of one chip.

  Raises:
    UserError: see `shapes` and `slice_devices`; or the step does not fit.
  """
  devices = slice_devices(slice_name)
  mesh = sharding.make_mesh(config.mesh, devices)
  model, step, state, frozen, batch = shapes(config, mesh)
  trained = state['params']
  if forward:
    params = jax.eval_shape(lambda x: optimizer_lib.cast(x, config.dtype),
                            common.merge(trained, frozen))
    params = _placed(params, sharding.shardings(mesh, params))
    step = jax.jit(lambda params, batch: {
        source: model.apply({'params': params}, arrays)[0]
        for source, arrays in batch.items()})
    arguments, formula = (params, batch), _bytes((params, batch))
  else:
    arguments = state, frozen, batch
    count = _bytes(trained) // 4
    formula = TRAINED_BYTES * count + _bytes((frozen, state['state'], batch))
  with jax.set_mesh(mesh), warnings.catch_warnings():
    # Without a TPU its programs cannot be read back from a cache.
    warnings.filterwarnings('ignore', 'Error reading persistent compilation')
    traced = step.trace(*arguments)
    try:
      memory = traced.lower().compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
      raise errors.UserError(
          f'{config.name} does not compile for {slice_name}: '
          f'{" ".join(str(error).split())[:300]}') from error
  chip = devices[0].device_kind
  flops = metrics_lib.count_flops(metrics_lib.live(traced.jaxpr))
  return dict(
      config=config.name, scale=config.scale, slice=slice_name, chip=chip,
      chips=len(devices), mesh=dict(mesh.shape),
      step='forward' if forward else 'train',
      parameters=sum(math.prod(x.shape)
                     for x in jax.tree.leaves((trained, frozen))),
      trained_parameters=sum(math.prod(x.shape)
                             for x in jax.tree.leaves(trained)),
      argument_bytes=memory.argument_size_in_bytes,
      formula_bytes=formula // len(devices),
      temporary_bytes=memory.temp_size_in_bytes,
      peak_bytes=memory.peak_memory_in_bytes,
      memory_bytes=HBM_GIB[chip] * 2**30, flops=flops,
      least_seconds=flops / len(devices) / metrics_lib.PEAK_FLOPS[chip])


def text(found: dict) -> str:
  """Returns a plan as people read it, one figure a line."""
  gib = lambda size: f'{size / 2**30:8.2f} GiB'
  mesh = ' x '.join(f'{axis} {ways}' for axis, ways in found['mesh'].items()
                    if ways > 1) or 'one chip'
  share = found['peak_bytes'] / found['memory_bytes']
  apart = found['argument_bytes'] / found['formula_bytes'] - 1
  return '\n'.join([
      f'{found["config"]} ({found["scale"]} scale), {found["step"]} step',
      f'on {found["slice"]}: {found["chips"]} x {found["chip"]}, {mesh}',
      f'  parameters   {found["parameters"]:,}, trained '
      f'{found["trained_parameters"]:,}',
      f'  arguments  {gib(found["argument_bytes"])} a chip, {apart:+.1%} of '
      'the sum of their shapes',
      f'  temporaries{gib(found["temporary_bytes"])} a chip',
      f'  peak       {gib(found["peak_bytes"])} of '
      f'{found["memory_bytes"] / 2**30:.0f} GiB, {share:.0%}'
      f'{"" if share < 1 else ": DOES NOT FIT"}',
      f'  products     {found["flops"]:.3e} FLOPs a step on all chips, at '
      f'least {found["least_seconds"]:.2f} s at their peak'])


def main(argv=None):
  """Reads the command line, compiles, prints."""
  parser = argparse.ArgumentParser(
      prog='python -m mmgen.plan', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
  config_lib.add_arguments(parser)
  parser.add_argument('--slice', metavar='NAME',
                      help='such as v5e:16x16 (default: config.mesh.slice)')
  parser.add_argument('--forward', action='store_true',
                      help='the forward pass alone')
  parser.add_argument('--json', action='store_true', help='print JSON')
  args, unknown = parser.parse_known_args(argv)
  config = config_lib.from_arguments(args, unknown)
  name = args.slice or config.mesh.get('slice')
  if not name:
    raise errors.UserError(
        f'{config.name} names no slice: give --slice, such as v5e:2x2.')
  found = plan(config, name, args.forward)
  print(json.dumps(found, indent=1) if args.json else text(found))


if __name__ == '__main__':
  errors.run(lambda: main(sys.argv[1:]))
