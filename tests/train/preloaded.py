"""Imported by the process server: what every rank needs and takes seconds to import."""

import importlib

from mera_ds.train.setup import prepare_environment

MODULES = (
    "mera_ds.cli.launch",
    "mera_ds.train.stage",
    "tensorboard.summary.writer.record_writer",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imports torch's compiler
    "pytest",  # whose script child processes take for their main module
)

for module in MODULES:
    importlib.import_module(module)
prepare_environment()
