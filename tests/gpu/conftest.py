"""Tests that need a GPU are collected where there is one; see `make test-gpu`."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
