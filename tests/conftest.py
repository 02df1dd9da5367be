"""What every test starts from: Hypothesis profiles, few threads."""

import os

import torch
from hypothesis import settings

settings.register_profile("default", max_examples=25, deadline=None)
settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

# One process of several (pytest -n): more threads than cores only wait for each other.
torch.set_num_threads(1)
