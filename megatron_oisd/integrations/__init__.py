"""Adapters that add OISD to other people's training loops; each is thin, the losses and the pipeline are the same."""
