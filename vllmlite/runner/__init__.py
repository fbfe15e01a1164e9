"""Turns a schedule into arrays, runs the model, samples."""
