"""Weights as their authors published them: read from files, made into methods, kept as finished cells, given back."""
