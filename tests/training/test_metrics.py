"""Counts, FLOPs, stability, files that survive a restart, the progress line."""

import json
import logging
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgen.training import metrics


def test_counts_of_a_packed_batch_by_hand():
  batch = {'a': dict(
      segments=jnp.array([[1, 1, 2, 0], [1, 1, 1, 1]]),
      image_index=jnp.array([[0, -1, -1, -1], [0, 0, 1, -1]]),
      image_box=jnp.array([[[0, 0, 2, 2], [0, 0, 0, 0]],
                           [[0, 0, 1, 2], [0, 0, 1, 1]]])),
      'text': dict(segments=jnp.array([[1, 0]]),
                   image_index=jnp.array([[-1, -1]]))}
  counts = {k: int(v) for k, v in metrics.count_batch(batch).items()}
  assert counts == dict(samples=4, images=3, text_tokens=4, visual_tokens=4)


def test_counts_of_pairs_by_hand():
  batch = {'p': dict(valid=jnp.array([[True, True], [True, False]]),
                     example_valid=jnp.array([True, False]))}
  counts = {k: int(v) for k, v in metrics.count_batch(batch).items()}
  assert counts == dict(samples=1, images=1, text_tokens=3, visual_tokens=0)


def test_flops_of_products_scans_and_gradients_by_hand():
  a, b = jnp.ones((2, 3)), jnp.ones((3, 5))
  def program(a, b):
    def body(carry, _):
      return carry + jnp.sum(jax.nn.relu(a @ b)), None
    total, _ = jax.lax.scan(body, 0.0, None, length=7)
    return total + jnp.sum(jax.jit(jnp.matmul)(a, b))
  one = 2 * 2 * 3 * 5
  assert metrics.count_flops(jax.make_jaxpr(program)(a, b)) == 8 * one
  gradient = jax.value_and_grad(
      lambda a, b: jnp.sum(jax.checkpoint(lambda a: jnp.sin(a @ b))(a)))
  # Forward, forward again for the checkpoint, and the gradient of `a`.
  assert metrics.count_flops(jax.make_jaxpr(gradient)(a, b)) == 3 * one


def test_flops_of_a_convolution_by_hand():
  conv = nn.Conv(5, (2, 2), strides=2, padding='VALID', use_bias=False)
  x = jnp.ones((1, 8, 6, 3))
  params = conv.init(jax.random.key(0), x)
  jaxpr = jax.make_jaxpr(lambda x: conv.apply(params, x))(x)
  assert metrics.count_flops(jaxpr) == 2 * (4 * 3) * 5 * (2 * 2 * 3)


def test_spikes_are_upward_and_far_out():
  rng = np.random.default_rng(0)
  calm = 5 - np.arange(300) / 100 + 0.1 * rng.normal(size=300)
  assert metrics.spikes(calm) == 0
  calm[150] += 5
  calm[200] -= 5
  assert metrics.spikes(calm) == 1


def test_stability_of_a_run():
  rows = [dict(step=i + 1, loss=1 + 0.01 * (i % 3), grad_norm=float(i))
          for i in range(200)]
  rows[100]['loss'] = 9.0
  rows.append({'step': 200, 'scores/x': 1.0})
  summary = metrics.stability(rows)
  assert summary['loss_spikes_per_1000'] == 5.0
  assert summary['grad_norm_p50'] == 99.5 and summary['grad_norm_max'] == 199


@pytest.mark.parametrize('losses, expected', [
    ([3.0, 2.0, 2.4], False),  # 1.2 times the lowest is not above it
    ([3.0, 2.0, 2.41], True),
    ([3.0, 2.0, 5.0, 2.1], False),  # a jump that was made good
    ([2.0, 3.0, 4.0], True),
    ([3.0, math.nan, 2.0], False),
    ([3.0, 2.0, math.nan], True),
    ([math.inf, math.inf], True),
])
def test_a_collapse_is_a_loss_that_ends_high(losses, expected):
  assert metrics.collapsed(losses) is expected


def followed(**losses):
  """Rows of a run whose held-out losses were taken every 10 steps."""
  rows = [dict(step=i + 1, loss=1.0, grad_norm=1.0) for i in range(40)]
  for i in range(max(map(len, losses.values()))):
    rows.append({'step': 10 * (i + 1), 'scores/vqa/accuracy': 9.0 ** i, **{
        f'scores/{name}/loss': values[i] for name, values in losses.items()}})
  return rows


def test_collapses_are_counted_where_held_out_losses_were_followed():
  held = metrics.stability(followed(a=[3.0, 2.0, 2.1]))
  assert held['collapsed'] == 0.0 and 'loss_spikes_per_1000' in held
  one_of_two = followed(a=[3.0, 2.0, 2.1], b=[3.0, 2.0, 3.0])
  assert metrics.stability(one_of_two)['collapsed'] == 1.0
  # One value cannot tell, also if a restart wrote it twice.
  once = followed(a=[2.0])
  assert 'collapsed' not in metrics.stability([*once, once[-1]])


def test_restart_cuts_rows_after_the_restored_step(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, 0)
  value = float(np.float32(1) / 3)
  for step in (1, 2, 3):
    writer.write(step, {'loss': value})
  writer.close()
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 4, "lo')  # killed while writing
  writer = metrics.MetricsWriter(tmp_path, 2)
  writer.write(3, {'loss': 7.0})
  writer.close()
  rows = metrics.read_rows(tmp_path)
  assert [row['step'] for row in rows] == [1, 2, 3]
  assert rows[1]['loss'] == value and rows[2]['loss'] == 7.0


def test_tensorboard_gets_scalars(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, 0)
  writer.plot(1, {'loss': 2.0})
  writer.close()
  files = list((tmp_path / 'tensorboard').iterdir())
  assert files and b'loss' in files[0].read_bytes()


def test_progress_line_names_rates(caplog, monkeypatch):
  clock = iter([0.0, 2.0])
  monkeypatch.setattr(metrics.time, 'perf_counter', lambda: next(clock))
  monkeypatch.setattr(metrics, 'peak_flops', lambda: 1000.0)
  progress = metrics.Progress(30, 10, flops=100, title='row')
  with caplog.at_level(logging.INFO):
    rates = progress.update(20, 1.5, tokens=600, images=20)
  assert rates == dict(seconds_per_step=0.2, tokens_per_second=300,
                       images_per_second=10, mfu=0.5)
  assert ('step 20/30  loss 1.5000  300 tokens/s  10 images/s  0:00:02 left  '
          '50.0% of peak') in caplog.text


def test_utilisation_is_not_claimed_where_the_peak_is_unknown():
  assert metrics.peak_flops() is None
  progress = metrics.Progress(2, 0, flops=1, title='row')
  assert 'mfu' not in progress.update(1, 1.0, 1, 1)


def test_rows_are_json_that_reads_back_exactly(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, 0)
  values = np.random.default_rng(0).normal(size=50).astype(np.float32)
  for i, value in enumerate(values):
    writer.write(i + 1, {'loss': float(value)})
  writer.close()
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  back = np.array([json.loads(line)['loss'] for line in lines], np.float32)
  assert back.tobytes() == values.tobytes()


def test_loops_of_unknown_length_are_refused():
  a = jnp.ones((2, 2))
  program = lambda a: jax.lax.while_loop(
      lambda x: jnp.sum(x) < 100, lambda x: x @ a, a)
  with pytest.raises(ValueError, match='unknown length'):
    metrics.count_flops(jax.make_jaxpr(program)(a))
