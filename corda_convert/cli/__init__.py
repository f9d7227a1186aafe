"""The command line: click → operation → print. The one place that catches our errors.

Exit status: 0 done; 1 refused or failed, with what, why and the next step; 2 wrong usage; 130 interrupted;
143 terminated. Each command has a module; none imports torch before an operation needs it, so help and a wrong path answer
at once.
"""

from corda_convert.cli.group import cli
from corda_convert.cli.program import main, run

__all__ = ["cli", "main", "run"]
