"""Eight CPU devices and a compilation cache, set before jax starts."""

import os
import pathlib
import sys

# Before jax is imported. jaxlib 0.10.1 prints pages about two invented CPU
# features for every program that it takes from the compilation cache.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import jax

_ROOT = pathlib.Path(__file__).parents[1]
_CACHE = _ROOT / '.cache' / 'jax'

sys.path.append(str(_ROOT / '.venv' / 'plan'))  # see launch/test.sh

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Correctness only: less optimisation halves the time spent compiling.
os.environ['XLA_FLAGS'] = ' '.join(
    [os.environ.get('XLA_FLAGS', ''), '--xla_backend_optimization_level=0'])
# Processes that tests start share the cache and the platform.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
jax.config.update('jax_compilation_cache_dir',
                  os.environ['JAX_COMPILATION_CACHE_DIR'])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
