"""Pipelines of diffusers: reading their folders, their schedules, their texts."""
