"""Prepares a corpus: draws its scenes, trains its tokenizer.

  python -m mmgen.prepare --corpus=emoji/tiny --data_dir=data

A corpus that is already there is checked and left alone; one that was cut off
is made again.
"""

import argparse
import contextlib
import os

from rich import console
from rich import progress as bars

from mmgen import errors
from mmgen.data import corpora


def parser():
  """The command line."""
  result = argparse.ArgumentParser(
      prog='python -m mmgen.prepare', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
  result.add_argument(
      '--corpus', default='emoji/tiny', metavar='NAME/SIZE',
      help=f'one of {", ".join(corpora.addresses())}; emoji needs the picture '
      "packages (pip install 'mmgen[pictures]'), shapes needs nothing "
      '(default: %(default)s)')
  result.add_argument(
      '--data_dir', default=os.environ.get('MMGEN_DATA', 'data'),
      metavar='FOLDER',
      help='folder of all corpora (default: $MMGEN_DATA, or data)')
  result.add_argument(
      '--vocab', type=int, metavar='N',
      help='ids of the tokenizer (default: as the corpus says)')
  result.add_argument(
      '--train_examples', type=int, metavar='N',
      help='training scenes (default: as the corpus says)')
  result.add_argument(
      '--eval_examples', type=int, metavar='N',
      help='scenes of every other split (default: as the corpus says)')
  result.add_argument(
      '--seed', type=int, default=0, metavar='N',
      help='chooses the scenes, never what is held out (default: %(default)s)')
  return result


def main(argv=None):
  """Runs the command.

  Args:
    argv: list of str, or None for the process' own.
  """
  args = parser().parse_args(argv)
  screen = console.Console(stderr=True)
  columns = (
      bars.TextColumn('{task.description:<12}'), bars.BarColumn(),
      bars.MofNCompleteColumn(), bars.TimeRemainingColumn())
  bar = bars.Progress(*columns, console=screen, transient=True)
  tasks = {}
  with contextlib.ExitStack() as shown:

    def tick(split, done, total):
      if not tasks:  # an error before the first scene is one line, no bar
        shown.enter_context(bar)
      if split not in tasks:
        tasks[split] = bar.add_task(split, total=total)
      if done % 64 == 0 or done == total:
        bar.update(tasks[split], completed=done)

    about, new = corpora.prepare(
        args.data_dir, args.corpus, train=args.train_examples,
        evaluation=args.eval_examples, vocab=args.vocab, seed=args.seed,
        progress=tick)
  counts = ', '.join(f'{k} {v}' for k, v in about['splits'].items())
  state = 'prepared' if new else 'already there and whole'
  print(f'{corpora.folder(args.data_dir, args.corpus)}: {state} ({counts})')


if __name__ == '__main__':
  errors.run(main)
