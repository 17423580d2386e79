"""Runs methods: the training loop, its clock, evaluation off the clock, and the record of the machine."""
