"""Runs a trained run's evaluators again, on its newest checkpoint.

  python -m mmgen.evaluate --run=runs/quickstart.patches.train.mini.s0-1a2b3c
  python -m mmgen.evaluate --run=<folder> --evaluator=vqa --evaluator=loss

Writes `predictions/<evaluator>.jsonl` and `evaluation.json` into the run's
folder and prints every score beside its siblings: the best blind guess, the
same model with grey pictures, and with pictures shuffled between scenes.
"""

import argparse
import json
import os
import sys

import jax
from rich import console as rich_console
from rich import table as rich_table

from mmgen import errors
from mmgen import evaluators as evaluators_lib
from mmgen import run_folder
from mmgen.training import checkpoint

SIBLINGS = ('blind', 'grey', 'shuffled')


def evaluate(run, data_dir, names=None, progress=lambda name: None):
  """Evaluates a run and writes what was found into its folder.

  Args:
    run: a `run_folder.Run`.
    data_dir: folder of the prepared corpora.
    names: which of the config's evaluators; None for all.
    progress: called with each evaluator's name before it runs.

  Returns:
    The content of `evaluation.json`: step, scores, fingerprints ...

  Raises:
    UserError: an unknown evaluator, a missing corpus, or a folder that cannot
      be written.
  """
  known = run.config.evaluators
  for name in names or ():
    if name not in known:
      raise errors.UserError(
          f'--evaluator={name}: this run has no such evaluator.'
          f'{errors.nearest(name, known)} It has: {", ".join(known)}.'
      )
  chosen = {name: known[name] for name in names or known}
  if not chosen:
    raise errors.UserError(f'{run.folder}: its config has no evaluators.')
  evaluators = evaluators_lib.build(chosen, evaluators_lib.Context(
      config=run.config, model=run.model, tokenizer=run.tokenizer,
      image_layout=run.image_layout, data_dir=data_dir,
  ))
  result = dict(
      name=run.config.name, step=run.step,
      **evaluators_lib.run_all(evaluators, run.params, run.folder, progress),
      device=jax.devices()[0].device_kind,
      git_revision=checkpoint.git_revision(),
  )
  path = run.folder / 'evaluation.json'
  with errors.writing(run.folder):
    path.write_text(json.dumps(result, indent=1) + '\n')
  return result


def table(result):
  """A rich table: one line a score, its siblings beside it."""
  out = rich_table.Table(
      title=f'{result["name"]}, step {result["step"]}', title_justify='left'
  )
  out.add_column('score')
  for column in ('value', *SIBLINGS):
    out.add_column(column, justify='right')
  out.add_column('fingerprint')
  scores = result['scores']
  for name in scores:
    if name.rsplit('/', 1)[-1] in SIBLINGS:
      continue
    cells = [scores.get(key) for key in (
        name, *(f'{name}/{sibling}' for sibling in SIBLINGS)
    )]
    out.add_row(
        name, *('' if cell is None else f'{cell:.4f}' for cell in cells),
        result['fingerprints'][name.split('/')[0]],
    )
  return out


def main(argv=None):
  """Reads the command line, evaluates, prints the table."""
  parser = argparse.ArgumentParser(
      prog='python -m mmgen.evaluate', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
  )
  parser.add_argument(
      '--run', required=True, metavar='FOLDER', help='folder of a trained run'
  )
  parser.add_argument(
      '--evaluator', action='append', metavar='NAME',
      help="one of the run's evaluators; may be repeated (default: all)",
  )
  parser.add_argument(
      '--data_dir', default=os.environ.get('MMGEN_DATA', 'data'),
      metavar='FOLDER',
      help='folder of prepared corpora (default: $MMGEN_DATA, else data)',
  )
  args = parser.parse_args(argv)
  run = run_folder.open_run(args.run)
  console = rich_console.Console()
  with console.status('') as status:
    result = evaluate(
        run, args.data_dir, args.evaluator,
        lambda name: status.update(f'evaluating {name}'),
    )
  console.print(table(result))
  console.print(
      f'{run.folder / "evaluation.json"}', markup=False, soft_wrap=True
  )


if __name__ == '__main__':
  errors.run(lambda: main(sys.argv[1:]))
