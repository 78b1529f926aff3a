"""The live side of the audit: a model in training. All that imports torch in this arm is here."""
