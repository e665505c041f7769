"""Random seeds."""

from __future__ import annotations

import logging
import random
import secrets

import numpy as np
import torch


def seed_all_rng(seed: int | None = None) -> None:
    """Seed Python, NumPy and torch (all devices); None draws a seed and logs it."""
    if seed is None:
        seed = secrets.randbelow(2**31)
        logging.getLogger(__name__).info(f"Using a generated random seed {seed}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
