"""Learning rates as functions of the step."""

import optax

from mmgen import errors


def make_schedule(config, steps: int):
  """Returns the learning rate as a function of the step, from 0.

  Warm-up is linear and ends at the peak; the decay takes the remaining steps
  and ends at `min_ratio` of the peak. The last step of a run is one before
  that end.

  Args:
    config: `schedule`, `peak_lr`, `warmup` in steps, `warmup_from` (a name in
      `WARMUPS`), `min_ratio`.
    steps: updates of the whole run.

  Raises:
    UserError: an unknown name, or a warm-up longer than the run.
  """
  for field, table in (('schedule', SCHEDULES), ('warmup_from', WARMUPS)):
    name = getattr(config, field)
    if name not in table:
      raise errors.UserError(
          f'config.optimizer.{field} is {name!r}; allowed: '
          f'{", ".join(table)}.')
  if not 0 <= config.warmup < steps:
    raise errors.UserError(
        f'config.optimizer.warmup is {config.warmup} steps; a run of {steps} '
        f'steps allows 0 to {steps - 1}.')
  decay = SCHEDULES[config.schedule](
      config.peak_lr, steps - config.warmup, config.min_ratio)
  if not config.warmup:
    return decay
  first = WARMUPS[config.warmup_from]
  warmup = lambda step: config.peak_lr * (step + first) / config.warmup
  return optax.join_schedules([warmup, decay], [config.warmup])


SCHEDULES = {
    'cosine': optax.cosine_decay_schedule,
    'linear': lambda peak, steps, ratio: optax.linear_schedule(
        peak, peak * ratio, steps),
    'constant': lambda peak, steps, ratio: optax.constant_schedule(peak),
}

# Rate of the first update, in units of peak / warmup: with 'one' update number
# `warmup` has the peak (open_clip, EVA-CLIP), with 'zero' the one after it has
# it and the first update moves nothing (transformers).
WARMUPS = {'one': 1, 'zero': 0}
