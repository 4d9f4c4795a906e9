"""Objectives as pure functions of arrays: they see no model and no configuration."""
