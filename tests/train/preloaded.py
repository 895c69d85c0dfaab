"""Imported by the process server: what every rank needs and takes seconds to import."""

import deepspeed.runtime.zero.muon.muon_optimizer  # imports torch's compiler
import pytest  # the script that child processes take for their main module

import mera_ds.cli.launch
import mera_ds.train.stage
import torch.utils.tensorboard
from mera_ds.train.engine import prepare_environment

prepare_environment()
