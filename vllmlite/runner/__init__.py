"""The model runner: turns a schedule into arrays, runs the model, and samples ids."""
