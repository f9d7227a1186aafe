"""`python -m corda_convert`."""

from corda_convert.cli import run

run()
