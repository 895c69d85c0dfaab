"""What the recipes of published datasets share: source files, selection, checked media, building.

A recipe of this sort is a module with a `DATASET` (`contents.Dataset`). It reads the official
annotation files into rows; everything else is done here.
"""
