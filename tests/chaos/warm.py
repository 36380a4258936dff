"""Import the modules that runs need and run one, once, before processes are forked from this one: so that none of them has to.

Only the server of forks imports this module.
"""

import logging
import tempfile
import warnings
from pathlib import Path

import torch

import tests.chaos.ranks
from tests.chaos.kinds import fit

assert tests.chaos.ranks.KINDS  # imported for the processes that are ranks
torch.set_num_threads(1)
warnings.simplefilter("ignore")
logging.getLogger("eventtrain").addHandler(logging.NullHandler())  # else it prints the file of each resumed run
for name in ("the default", "manual, fp16"):
    with tempfile.TemporaryDirectory() as folder:
        fit(name, Path(folder))
