"""The train step: one pure function from state and batch to state and metrics.

An objective is an object with

  names         of its losses
  coefficients  {name: factor in the total}
  coupled       whether the loss of an example depends on the other examples;
                with `draw`, `encode` and `couple` (see
                `objectives/contrastive.py`) it is taken in microbatches
                through a gradient cache
  weights(batch) -> {name: denominator}, from the batch alone
  __call__(params, frozen, state, batch, rng, step)
                -> ({name: (sum, weight)}, (new state, aux))
  init(key) -> params (optional), those that the model itself does not have
  project(params) -> params (optional), applied after each update

`aux` is for the log: {name: scalar or (sum, weight)}.

The total is the sum over names of coefficient * sum / denominator, with the
denominators of the global batch, so that a step in microbatches is the step
of the whole batch. With `optimizer.denominators='microbatch'` it is the mean
of what each microbatch alone would give: a target weighs more in a microbatch
that has few. So do data-parallel trainers of PyTorch, whose processes average
their gradients, and transformers before 4.46 when it accumulates them; 8
processes that accumulate twice are 16 microbatches here.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from mmgen import errors
from mmgen.objectives import contrastive
from mmgen.training import metrics as metrics_lib


def step_key(seed: int, step):
  """Returns the key of one step; the objective receives it as `rng`."""
  return jax.random.fold_in(jax.random.key(seed), step)


def init_state(params, optimizer, state=None):
  """Returns the train state at step 0.

  Args:
    params: trained parameters, float32.
    optimizer: as `make_optimizer` returns it.
    state: batch statistics and the like, which no gradient reaches.
  """
  transform, _ = optimizer
  return dict(params=params, opt=transform.init(params), state=state or {},
              step=jnp.zeros((), jnp.int32), bad=jnp.zeros((), jnp.int32))


def make_train_step(objective, optimizer, config, layout=None):
  """Builds the jitted step.

  Args:
    objective: see the head of this file.
    optimizer: (optax.GradientTransformation, schedule).
    config: the run's config; `seed`, `optimizer.accumulate` and
      `optimizer.denominators` are read.
    layout: NamedShardings of the train state, which the step preserves.

  Returns:
    step(train_state, frozen, batch) -> (train_state, metrics). The incoming
    state is donated. Metrics are scalars: `loss`, `loss/<name>`, `grad_norm`,
    `param_norm`, `update_norm`, `lr`, `bad`, the counts of
    `metrics.count_batch`, and the objective's `aux`.

    When the loss or a gradient is not finite, parameters, optimizer, state and
    step counter stay as they were and `bad` becomes 1; from then on every step
    leaves them alone, so the loop may notice it later.

  Raises:
    UserError: microbatches for an objective that couples examples and cannot
      be split into an encoder and a loss, or cannot have denominators of
      microbatches; or a wrong name.
  """
  accumulate = config.optimizer.accumulate
  if accumulate < 1:
    raise errors.UserError(
        f'config.optimizer.accumulate is {accumulate}; at least 1.')
  if objective.coupled and accumulate > 1 and not hasattr(
      objective, 'encode'):
    raise errors.UserError(
        f'config.optimizer.accumulate is {accumulate}, but the loss '
        f'{", ".join(objective.names)} couples all examples of a batch; set '
        'it to 1.')
  own = _own_denominators(config, objective)
  transform, schedule = optimizer
  project = getattr(objective, 'project', lambda params: params)

  def step(train_state, frozen, batch):
    params, count = train_state['params'], train_state['step']
    (loss, losses, state, aux), grads = _gradients(
        objective, params, frozen, train_state['state'], batch,
        step_key(config.seed, count), count, accumulate, own)
    updates, opt = transform.update(grads, train_state['opt'], params)
    grad_norm = optax.global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    good = finite & (train_state['bad'] == 0)
    new = dict(params=project(optax.apply_updates(params, updates)), opt=opt,
               state=state, step=count + 1, bad=train_state['bad'])
    new = jax.tree.map(functools.partial(jnp.where, good), new, train_state)
    new['bad'] = jnp.where(good, 0, 1).astype(jnp.int32)
    metrics = dict(
        loss=loss, **{f'loss/{name}': x for name, x in losses.items()},
        grad_norm=grad_norm, param_norm=optax.global_norm(new['params']),
        update_norm=optax.global_norm(updates),
        lr=jnp.asarray(schedule(count), jnp.float32), bad=new['bad'],
        **metrics_lib.count_batch(batch), **_divide(aux))
    return new, metrics

  return jax.jit(step, donate_argnums=0,
                 out_shardings=None if layout is None else (layout, None))


def _own_denominators(config, objective):
  """Says whether each microbatch is divided by weights of its own."""
  found = config.optimizer.get('denominators', DENOMINATORS[0])
  if found not in DENOMINATORS:
    raise errors.UserError(
        f'config.optimizer.denominators is {found!r}; allowed: '
        f'{", ".join(DENOMINATORS)}.')
  if found == 'microbatch' and objective.coupled:
    raise errors.UserError(
        "config.optimizer.denominators is 'microbatch', but the loss "
        f'{", ".join(objective.names)} couples all examples of a batch; set '
        "it to 'batch'.")
  return found == 'microbatch'


DENOMINATORS = ('batch', 'microbatch')


def _gradients(objective, params, frozen, state, batch, rng, step, accumulate,
               own):
  """Returns ((loss, {name: loss}, state, aux), gradients) of a whole batch."""
  if objective.coupled and accumulate > 1:
    return contrastive.gradient_cache(
        objective, params, frozen, state, batch, accumulate, rng)

  def denominators(batch):
    return {name: jnp.where(weight > 0, weight, 1.0)
            for name, weight in objective.weights(batch).items()}

  whole = denominators(batch)
  batch = _number_rows(batch)

  def loss_of(params, state, batch):
    weights = whole
    if own:  # of a mean over microbatches, which are summed below
      weights = {name: accumulate * weight
                 for name, weight in denominators(batch).items()}
    sums, (state, aux) = objective(params, frozen, state, batch, rng, step)
    losses = {name: sums[name][0] / weights[name] for name in sums}
    total = sum(objective.coefficients[name] * x for name, x in losses.items())
    return total, (losses, state, aux)

  gradient = jax.value_and_grad(loss_of, has_aux=True)
  if accumulate == 1:
    (loss, (losses, state, aux)), grads = gradient(params, state, batch)
    return (loss, losses, state, aux), grads

  def body(carry, microbatch):
    summed, state = carry
    (loss, (losses, state, aux)), grads = gradient(params, state, microbatch)
    return (jax.tree.map(jnp.add, summed, (loss, losses, grads)), state), aux

  micro = jax.tree.map(lambda x: _microbatches(x, accumulate), batch)
  first = jax.tree.map(lambda x: x[0], micro)
  loss, (losses, _, _) = jax.eval_shape(loss_of, params, state, first)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                       (loss, losses, params))
  ((loss, losses, grads), state), aux = jax.lax.scan(
      body, (zeros, state), micro)
  aux = jax.tree.map(lambda x: jnp.mean(x, axis=0), aux)
  return (loss, losses, state, aux), grads


def _divide(aux):
  """Turns pairs (sum, weight) into means; 0 where nothing has weight."""
  def one(x):
    if not isinstance(x, tuple):
      return x
    total, weight = x
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0.0)
  return {name: one(x) for name, x in aux.items()}


def _number_rows(batch):
  """Adds `row`: draws keyed by it do not depend on the microbatch."""
  def one(arrays):
    rows = jax.tree.leaves(arrays)[0].shape[0]
    return {**arrays, 'row': jnp.arange(rows, dtype=jnp.int32)}
  return {source: one(arrays) for source, arrays in batch.items()}


def _microbatches(x, count):
  """[R, ...] -> [count, R / count, ...]: rows i, i + count, ... are together.

  With strides every device keeps rows of its own in every microbatch.
  """
  return jnp.swapaxes(
      x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)
