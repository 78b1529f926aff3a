"""The observing arm: from a model or a checkpoint to findings. It never imports the acting arm."""
